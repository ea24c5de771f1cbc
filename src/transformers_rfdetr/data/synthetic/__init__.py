"""Draw datasets with exact annotations, for the demo, the tests and the notebooks.

An image depends only on its seed, and nothing is downloaded.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..dataset import InstanceDataset
from ..writers.coco import write_coco_split
from ..writers.output import Output, dataset_images
from . import tray
from .aerial import CLASSES, draw_scene
from .tray import draw_tray

__all__ = ["CLASSES", "draw_dataset", "draw_scene", "draw_tray", "draw_trays", "save_dataset"]

Dataset = tuple[list[Image.Image], dict[str, Any]]


def draw_dataset(
    num_images: int,
    size: tuple[int, int] = (96, 96),
    *,
    metres_per_pixel: float | tuple[float, float] = 0.6,
    classes: Sequence[str] = CLASSES,
    first_seed: int = 0,
) -> Dataset:
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
    categories = [{"id": CLASSES.index(name) + 1, "name": name} for name in CLASSES if name in classes]
    seeds = range(first_seed, first_seed + num_images)
    return draw_images(
        seeds, categories, lambda seed: draw_scene(seed, size, metres_per_pixel=metres_per_pixel, classes=classes)
    )


def draw_trays(num_images: int, size: tuple[int, int] = (144, 144), *, first_seed: int = 0) -> Dataset:
    """Draw the trays of `num_images` consecutive seeds, as [`draw_dataset`] does aerial images."""
    categories = [{"id": number, "name": name} for number, name in enumerate(tray.CLASSES, start=1)]
    return draw_images(range(first_seed, first_seed + num_images), categories, lambda seed: draw_tray(seed, size))


def draw_images(
    seeds: range, categories: list[dict[str, Any]], draw: Callable[[int], tuple[Image.Image, Any]]
) -> Dataset:
    """Draw the images of `seeds`, where `draw` returns an image and its annotations, as [`draw_dataset`] does."""
    images, entries = [], []
    annotations: list[dict[str, Any]] = []
    for seed in seeds:
        image, objects = draw(seed)
        images.append(image)
        entries.append({"id": seed, "file_name": f"{seed:06d}.png", "height": image.height, "width": image.width})
        annotations += [{**item, "id": len(annotations) + i} for i, item in enumerate(objects, start=1)]
    return images, {"images": entries, "annotations": annotations, "categories": categories}


def save_dataset(folder: str | os.PathLike[str], images: Sequence[Image.Image], coco: dict[str, Any]) -> Path:
    """Save images and their annotations as Roboflow exports a split: `_annotations.coco.json` beside the images.

    The annotations are written last, so that a folder that has them is complete.

    Returns:
        The path of the annotations.
    """
    dataset = InstanceDataset(coco, images)
    path = Path(folder, "_annotations.coco.json")
    write_coco_split(dataset_images(dataset), dataset.classes, Path(folder), path, Output(Path(folder)))
    return path
