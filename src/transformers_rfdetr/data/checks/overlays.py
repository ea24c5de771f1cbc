"""Images with their annotations drawn over them, with the names of classes and problems."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask
from transformers.utils import logging

from ...atomic_files import atomic_file
from ...model.image_io import open_image, read_rgb
from ...model.masks import box_and_area, read_segmentation, to_rle
from ...model.validation import are_numbers, is_index, to_builtin
from ..drawing import draw_instances
from .findings import KINDS, Problem
from .images import UNREADABLE, open_source
from .raw_split import RawImage, RawSplit

_MAX_OVERLAYS = 50


class OverlayWriter:
    """Collects the first images with errors or warnings and the first without, and draws up to 50, the former first."""

    def __init__(self) -> None:
        self._with_problems: list[tuple[RawSplit, RawImage, list[Problem]]] = []
        self._without: list[tuple[RawSplit, RawImage, list[Problem]]] = []

    def offer(self, split: RawSplit, image: RawImage, problems: Sequence[Problem]) -> None:
        """Collect an image that can be decoded, unless there are enough."""
        severe = [problem for problem in problems if KINDS[problem.kind][0] != "info"]
        candidates = self._with_problems if severe else self._without
        if len(candidates) < _MAX_OVERLAYS:
            candidates.append((split, image, severe))

    def write(self, folder: Path) -> None:
        """Draw the images."""
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [*self._with_problems, *self._without][:_MAX_OVERLAYS]
        for number, (split, image, problems) in enumerate(logging.tqdm(chosen, desc="Drawing", delay=2)):
            stem = re.sub(r"[^\w.-]", "_", Path(str(image.label)).stem)
            with open_source(image.source) as file:
                drawn = _draw(read_rgb(open_image(file)), image, split.classes, problems)
            with atomic_file(folder / f"{number:02}_{split.name}_{stem[:50]}.jpg") as partial_file:
                drawn.save(partial_file, "JPEG", quality=90)


def _draw(
    pixels: PIL.Image.Image, image: RawImage, classes: Mapping[int, str], problems: Sequence[Problem]
) -> PIL.Image.Image:
    """Draw the annotations that can be read."""
    masks, boxes, labels = [], [], []
    height, width = size = pixels.size[::-1]
    for annotation in image.annotations:
        try:
            rle, mask_box = _read_mask(annotation.get("segmentation"), size)
            box = to_builtin(annotation.get("bbox"))
            x, y, box_width, box_height = box if are_numbers(box, 4) else mask_box
            category_id = annotation.get("category_id")
            words = [classes.get(category_id, "?") if is_index(category_id) else "?"]
        except UNREADABLE:
            continue
        words += ["crowd"] * (annotation.get("iscrowd") == 1)
        kinds = [problem.kind for problem in problems if problem.annotation_id == annotation.get("id")]
        masks.append(rle)
        corners = np.array([x, y, x + box_width, y + box_height], np.float64)
        boxes.append(corners.clip(-width - height, 2 * (width + height)))  # far outside, drawing would overflow
        labels.append(": ".join(filter(None, (" ".join(words), ", ".join(kinds)))))
    return draw_instances(pixels, masks or None, np.array(boxes) if boxes else None, labels or None)


def _read_mask(segmentation: Any, size: tuple[int, int]) -> tuple[dict[str, Any], list[float] | None]:
    """Return a mask as RLE and its box; an empty mask and None if it cannot be read."""
    try:
        shape = read_segmentation(segmentation, size)
    except UNREADABLE:
        shape = None
    if shape is None:
        return coco_mask.frPyObjects({"size": list(size), "counts": [size[0] * size[1]]}, *size), None
    return to_rle(shape, size), box_and_area(shape, size)[0]
