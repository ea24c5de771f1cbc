"""Write YOLO: data.yaml, images/train and labels/train, with one polygon or box in each line."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from ...model.coco_labels import clip_box
from ...model.masks import decode_box, to_rle
from ..outlines import join_rings, trace_pixels
from ..yolo import look_like_other_task
from ..yolo_layout import LabelFiles
from .output import Output, Splits, check_class_names, check_split_names, mask_of

_MAX_STARTS = 100  # points of an outline that are tried as the first one


def write_yolo(splits: Splits, classes: Mapping[int, str], output: Output) -> None:
    """Write splits; the labels are the numbers of the classes in their order."""
    check_split_names(splits, "YOLO")
    check_class_names(classes, "YOLO")
    labels = {category: label for label, category in enumerate(classes)}
    label_files = LabelFiles(output.folder)
    description: dict[str, Any] = {}
    for split, images in splits.items():
        key = "val" if split == "validation" else split
        for image in images:
            description[key] = f"images/{key}"  # a split without images cannot be read
            path = output.place_image(image, output.folder / "images" / key, by_stem=True)
            output.note_boxes(image)
            output.note_occluded(image)
            lines = []
            for item in image.objects:
                if item.get("iscrowd"):
                    output.note("crowd regions are not written, because YOLO has none: they become background.")
                elif values := yolo_values(item, image.size, output):
                    lines.append(f"{labels[item['category_id']]} {' '.join(f'{value:.10g}' for value in values)}\n")
            label_path = label_files.usual_path(path)
            label_path.parent.mkdir(parents=True, exist_ok=True)
            label_path.write_text("".join(lines), encoding="utf-8")
    description["names"] = dict(enumerate(classes.values()))
    text = yaml.safe_dump(description, allow_unicode=True, sort_keys=False)
    (output.folder / "data.yaml").write_text(text, encoding="utf-8")


def yolo_values(item: Mapping[str, Any], size: tuple[int, int], output: Output) -> list[float]:
    """Return the values of a line after the class, as fractions of an image of `size` (H, W); empty without a box."""
    if "segmentation" not in item:
        x0, y0, x1, y1 = clip_box(item["bbox"], size)
        if x1 <= x0 or y1 <= y0:
            output.note("boxes without a pixel in the image are not written.")
            return []
        if [x0, y0, x1 - x0, y1 - y0] != item["bbox"]:
            output.note("boxes are clipped to the image.")
        corners = np.array([[x0, y0], [x1, y1]]) / size[::-1]
        return [*corners.mean(0).tolist(), *(corners[1] - corners[0]).tolist()]
    outline, is_joined = _outline(item, size)
    if is_joined:
        output.note("objects of several parts or with holes are one polygon, with lines of no width between its parts.")
    return _arrange(outline / size[::-1]).ravel().tolist()


def _outline(item: Mapping[str, Any], size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """Return one ring (V, 2) that has the mask of an object, and whether several were joined."""
    mask = mask_of(item, size)
    region, top, left = decode_box(mask)
    if not isinstance(item["segmentation"], Mapping):
        rings = [np.array(polygon).reshape(-1, 2).clip(0, size[::-1]) for polygon in item["segmentation"]]
        joined = join_rings(rings).round(3)
        if not region.any() or to_rle([joined.ravel()], size)["counts"] == mask["counts"]:
            return joined, len(rings) > 1
    rings = [ring + np.array([left, top]) for ring in trace_pixels(region)]
    return join_rings(rings), len(rings) > 1


def _arrange(points: np.ndarray) -> np.ndarray:
    """Let a ring (V, 2) of fractions start where its line cannot be read as one of another task, such as pose."""
    # Without repeated points, the ring encloses the same; one without an area may have only those.
    is_new = np.any(points != np.roll(points, 1, axis=0), axis=1)
    distinct = points[is_new] if is_new.sum() >= 3 else points[:3]
    for ring in (points, points[::-1], np.concatenate([points, points[:1]]), distinct):
        for start in range(min(len(ring), _MAX_STARTS)):
            turned = np.roll(ring, -start, axis=0)
            if not look_like_other_task(turned.ravel()):
                return turned
    return points
