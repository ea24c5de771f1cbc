"""Write COCO JSON: as Roboflow exports it, or as COCO publishes it if there are other splits than Roboflow's."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .output import ImageObjects, Output, Splits

_ROBOFLOW_FOLDERS = {"train": "train", "validation": "valid", "test": "test"}


def write_coco(splits: Splits, classes: Mapping[int, str], output: Output) -> None:
    """Write splits."""
    for split, images in splits.items():
        write_coco_split(images, classes, *coco_paths(output.folder, split, splits), output)


def coco_paths(folder: Path, split: str, splits: Collection[str]) -> tuple[Path, Path]:
    """Return the folder of the images of a split, and its annotation file."""
    if set(splits) <= _ROBOFLOW_FOLDERS.keys():
        images = folder / _ROBOFLOW_FOLDERS[split]
        return images, images / "_annotations.coco.json"
    return folder / split, folder / "annotations" / f"instances_{split}.json"


def write_coco_split(
    images: Iterable[ImageObjects], classes: Mapping[int, str], folder: Path, path: Path, output: Output
) -> None:
    """Write the images of a split to a folder, then its annotations to a file: if that exists, it is complete."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in images:
        name = output.place_image(image, folder).relative_to(folder).as_posix()
        image_id = len(entries) if image.image_id is None else image.image_id
        entries.append({"id": image_id, "file_name": name, "width": image.size[1], "height": image.size[0]})
        for item in image.objects:
            annotations.append({"id": len(annotations) + 1, **item, "image_id": image_id})
    categories = [{"id": category, "name": name} for category, name in classes.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": entries, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content), encoding="utf-8")
