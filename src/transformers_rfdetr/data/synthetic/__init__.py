"""Draw datasets with exact annotations, for the demo, the tests and the notebooks.

An image depends only on its seed, and nothing is downloaded.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .aerial import CLASSES, draw_scene
from .tray import draw_tray

__all__ = ["CLASSES", "draw_dataset", "draw_scene", "draw_tray", "save_dataset"]


def draw_dataset(
    num_images: int,
    size: tuple[int, int] = (96, 96),
    *,
    metres_per_pixel: float | tuple[float, float] = 0.6,
    classes: Sequence[str] = CLASSES,
    first_seed: int = 0,
) -> tuple[list[Image.Image], dict[str, Any]]:
    """Draw the aerial images of `num_images` consecutive seeds, with their annotations as one COCO dict.

    Args:
        num_images: Number of images.
        size: (H, W) of each image in pixels.
        metres_per_pixel: The ground resolution, or the range that each image's is drawn from.
        classes: Names of the classes to annotate.
        first_seed: Seed of the first image. Datasets without a common seed have no image in common.

    Returns:
        The images, and a dict of `images` in the same order, `annotations` and `categories`.
    """
    images, entries = [], []
    annotations: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + num_images):
        image, objects = draw_scene(seed, size, metres_per_pixel=metres_per_pixel, classes=classes)
        images.append(image)
        entries.append({"id": seed, "file_name": f"{seed:06d}.png", "height": size[0], "width": size[1]})
        annotations += [{**item, "id": len(annotations) + i} for i, item in enumerate(objects, start=1)]
    categories = [{"id": CLASSES.index(name) + 1, "name": name} for name in CLASSES if name in classes]
    return images, {"images": entries, "annotations": annotations, "categories": categories}


def save_dataset(folder: str | os.PathLike[str], num_images: int) -> Path:
    """Save the images of [`draw_dataset`] to a folder, and their annotations as `train.json` in COCO format.

    Returns:
        The path of the JSON.
    """
    images, coco = draw_dataset(num_images)
    for image, entry in zip(images, coco["images"], strict=True):
        image.save(Path(folder) / entry["file_name"])
    path = Path(folder) / "train.json"
    path.write_text(json.dumps(coco))
    return path
