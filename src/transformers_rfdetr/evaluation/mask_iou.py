"""Mean intersection over union of masks, from pixel counts summed over all images."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .mask_records import Detections, Objects, empty_rle


def count_pixels(
    size: tuple[int, int] | None, objects: Objects | None, detections: Detections | None, score_threshold: float
) -> Iterator[tuple[int | None, np.ndarray]]:
    """Count the pixels of one image for each category in it, and for all categories as one.

    Args:
        size: (H, W) of the image; it is known where there are masks.
        objects: Its ground truth.
        detections: Its detections; those with a score above `score_threshold` count.
        score_threshold: A score in [0, 1].

    Yields:
        Category id, or None for all categories as one, and pixels (3,) int64 of the intersection, of the union without
        crowd regions and the boxes of objects without a mask, and of the ground truth.
    """
    # Category id -> RLEs of the detections, of the objects and of the ignored regions.
    masks: dict[int, tuple[list[dict[str, Any]], ...]] = defaultdict(lambda: ([], [], []))
    if detections is not None and detections.masks is not None:
        indices = np.flatnonzero(detections.scores > score_threshold).tolist()
        for label, rle in zip(detections.labels[indices].tolist(), detections.masks.rles(indices), strict=True):
            masks[label][0].append(rle)
    if objects is not None and size is not None:
        is_ignored = objects.is_crowd | ~objects.has_mask
        for index, rle in enumerate(objects.regions(range(len(objects.labels)), size)):
            masks[int(objects.labels[index])][1 + int(is_ignored[index])].append(rle)
    for category, rles in masks.items():
        yield category, _overlap(size, *rles)
    if masks:
        yield None, _overlap(size, *([rle for rles in masks.values() for rle in rles[kind]] for kind in range(3)))


def _overlap(
    size: tuple[int, int], predicted: list[dict[str, Any]], objects: list[dict[str, Any]], crowds: list[dict[str, Any]]
) -> np.ndarray:
    """Return pixels (3,) int64 of the intersection, of the union without crowd regions, and of the ground truth."""
    prediction, truth, crowd = (coco_mask.merge([empty_rle(size), *rles]) for rles in (predicted, objects, crowds))
    both, in_crowd = (coco_mask.merge([prediction, other], intersect=True) for other in (truth, crowd))
    in_all = coco_mask.merge([both, crowd], intersect=True)
    areas = coco_mask.area([prediction, truth, both, in_crowd, in_all]).astype(np.int64)
    # Crowd regions are ignored where there is no object: they can only remove predicted pixels from the union.
    return np.array([areas[2], areas[0] + areas[1] - areas[2] - (areas[3] - areas[4]), areas[1]])
