"""Write the JSON files of labelme, one beside each image."""

import base64
import json
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image

from ...model.masks import decode_box
from ..labelme import IGNORED_LABELS
from .output import (
    ImageObjects,
    Output,
    Splits,
    check_class_names,
    check_split_names,
    mask_of,
    polygons_of,
)

_FLAGS = ("iscrowd", "suspect")  # of an object


def write_labelme(splits: Splits, classes: Mapping[int, str], output: Output) -> None:
    """Write splits as folders. Crowd regions have the flag `iscrowd`; suspects and their images have `suspect`."""
    check_split_names(splits, "labelme")
    check_class_names(classes, "labelme")
    if ignored := set(IGNORED_LABELS) & set(classes.values()):
        raise ValueError(f"class names for labelme must not be {ignored.pop()!r}, which it ignores. Rename the class.")
    unused = set(classes)
    for split, images in splits.items():
        for image in images:
            path = output.place_image(image, output.folder / split, by_stem=True)
            output.note_boxes(image)
            output.note_occluded(image)
            content = labelme_content(image, classes, path.name)
            path.with_suffix(".json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
            unused -= {item["category_id"] for item in image.objects}
    if unused:
        listed = ", ".join(classes[category] for category in sorted(unused)[:12])
        output.note(f"classes are lost, because labelme names no class without an object: {listed}.", len(unused))


def labelme_content(image: ImageObjects, classes: Mapping[int, str], image_path: str) -> dict[str, Any]:
    """Return the content of the file of an image."""
    shapes: list[dict[str, Any]] = []
    for group, item in enumerate(image.objects, start=1):
        parts = list(_shapes(item, image.size))
        common = {
            "label": classes[item["category_id"]],
            "group_id": group if len(parts) > 1 else None,
            "description": str(item.get("description") or ""),
            "flags": {flag: True for flag in _FLAGS if item.get(flag)},
        }
        shapes += [{**common, **part} for part in parts]
    return {
        "version": "5.5.0",
        "flags": {"suspect": True} if any(item.get("suspect") for item in image.objects) else {},  # of the image
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": image.size[0],
        "imageWidth": image.size[1],
    }


def _shapes(item: Mapping[str, Any], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Yield the geometries of an object: a rectangle, a polygon for each part, or a mask."""
    if "segmentation" not in item:
        x, y, width, height = item["bbox"]
        yield {"points": [[x, y], [x + width, y + height]], "shape_type": "rectangle", "mask": None}
        return
    polygons = polygons_of(item, size)
    for polygon in polygons or []:
        yield {"points": polygon.tolist(), "shape_type": "polygon", "mask": None}
    if polygons is None:
        region, top, left = decode_box(mask_of(item, size))
        file = BytesIO()
        PIL.Image.fromarray(region.astype(np.uint8)).save(file, "PNG")
        corners = [[left, top], [left + region.shape[1] - 1, top + region.shape[0] - 1]]
        yield {"points": corners, "shape_type": "mask", "mask": base64.b64encode(file.getvalue()).decode()}
