"""Match the detections of an image with its objects as COCO does, and compute precision and recall from the matches.

The rules are those of COCOeval (https://github.com/cocodataset/cocoapi, PythonAPI/pycocotools/cocoeval.py), whose
numbers the tests compare. Images are matched one by one while they are added, so that few numbers are kept, and no
image is matched twice.

Axis letters: K detections and N objects of an image, D detections of a class in all images, best first, T IoU
thresholds 0.5, 0.55, ..., 0.95, A area ranges, R recalls 0, 0.01, ..., 1, L limits of the number of detections.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from ..model.masks import mask_areas
from .mask_iou import count_pixels
from .mask_records import Detections, ImageMatches, Matches, Objects

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
# All objects, small, medium and large ones: pixels (A, 2), both ends included.
AREA_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]], np.float64)
_SHAPE = (len(AREA_RANGES), len(IOU_THRESHOLDS))


class ClassTable(NamedTuple):
    """How the detections of one class in all images match its objects."""

    num_objects: np.ndarray  # (A, images) int64, without crowd regions
    images: np.ndarray  # (D,) int64, index of the image of each detection
    ranks: np.ndarray  # (D,) int64, place of the detection among those of its class and image, from 0
    scores: np.ndarray  # (D,) float64, descending
    is_match: np.ndarray  # (A, T, D) bool
    is_ignored: np.ndarray  # (A, T, D) bool, detections of crowd regions and of objects outside of the area range


def match_image(
    objects: Objects, detections: Detections, size: tuple[int, int] | None, *, has_masks: bool, score_threshold: float
) -> ImageMatches:
    """Return the matches of an image of `size` (H, W) by boxes and, with `has_masks`, by masks.

    Detections with a score above `score_threshold` count in the pixels of mean IoU.
    """
    by_boxes = _match(objects, _box_ious(objects, detections), detections.boxes[:, 2:].prod(1), "bbox")
    if not has_masks:
        return ImageMatches(by_boxes, None, {})
    regions = objects.regions(range(len(objects.labels)), size) if size is not None else []
    rles = [] if detections.masks is None else detections.masks.rles(range(len(detections.labels)))
    same_class = detections.labels[:, None] == objects.labels
    ious = np.zeros(same_class.shape)
    compared = np.flatnonzero(same_class.any(1))
    if len(compared):
        is_crowd = objects.crowds("segm").tolist()
        ious[compared] = coco_mask.iou([rles[index] for index in compared], regions, is_crowd)
    by_masks = _match(objects, ious * same_class, mask_areas(rles), "segm")
    pixels = dict(count_pixels(size, objects, detections, score_threshold))
    return ImageMatches(by_boxes, by_masks, pixels)


def _box_ious(objects: Objects, detections: Detections) -> np.ndarray:
    same_class = detections.labels[:, None] == objects.labels
    if not same_class.any():
        return np.zeros(same_class.shape)
    return coco_mask.iou(detections.boxes, objects.boxes, objects.is_crowd.tolist()) * same_class


def _match(objects: Objects, ious: np.ndarray, areas: np.ndarray, kind: str) -> Matches:
    """Match K detections with N objects, each with the free object of its class and the highest IoU.

    ious (K, N), 0 for other classes   areas (K,)   ->   bits of (A, T, K)
    """
    is_crowd = objects.crowds(kind)
    is_ignored_object = is_crowd | _is_outside(objects.areas)  # (A, N)
    is_match: np.ndarray = np.zeros((*_SHAPE, len(areas)), bool)
    is_ignored = np.repeat(_is_outside(areas)[:, None], _SHAPE[1], axis=1)  # (A, T, K)
    is_free: np.ndarray = np.ones((*_SHAPE, len(is_crowd)), bool)
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    for index in np.flatnonzero(ious.max(1, initial=0) >= IOU_THRESHOLDS[0]):
        near = np.flatnonzero(ious[index] >= IOU_THRESHOLDS[0])
        iou = ious[index, near]
        allowed = is_free[:, :, near] & (iou >= thresholds)
        # Objects that count come before the others, then the highest IoU, then the last one.
        preference = np.where(allowed, iou - 2.0 * is_ignored_object[:, None, near], -4)
        best = len(near) - 1 - preference[..., ::-1].argmax(-1)  # (A, T)
        matched = np.take_along_axis(allowed, best[..., None], -1)[..., 0]
        best = near[best]
        area, threshold = np.nonzero(matched)
        found = best[area, threshold]
        is_match[area, threshold, index] = True
        is_ignored[area, threshold, index] = is_ignored_object[area, found]
        is_free[area, threshold, found] = is_crowd[found]
    return Matches.pack(is_match, is_ignored)


def _is_outside(areas: np.ndarray) -> np.ndarray:
    """Return whether areas (N,) are outside of each range, (A, N)."""
    return (areas < AREA_RANGES[:, :1]) | (areas > AREA_RANGES[:, 1:])


def class_tables(
    categories: Sequence[int],
    image_ids: Sequence[int],
    objects: Mapping[int, Objects],
    detections: Mapping[int, Detections],
    kind: str,
) -> dict[int, ClassTable]:
    """Return the table of each category by id.

    Args:
        categories: Category ids.
        image_ids: All images, in the order in which detections with equal scores are taken.
        objects, detections: Image id -> record; those of detections have matches.
        kind: "segm" or "bbox".
    """
    index_of = {image_id: index for index, image_id in enumerate(image_ids)}
    found = [(index_of[image_id], detections[image_id]) for image_id in image_ids if image_id in detections]
    images = _join([np.full(len(one.labels), index) for index, one in found], np.int64)
    labels = _join([one.labels for _, one in found], np.int64)
    scores = _join([one.scores for _, one in found], np.float64)
    none: np.ndarray = np.empty((_SHAPE[0] * _SHAPE[1] // 8, 0), np.uint8)
    all_matches, all_ignored = (
        np.concatenate([none, *(getattr(one.matches, kind)[part] for _, one in found)], axis=1) for part in (0, 1)
    )
    annotated = [(index_of[image_id], objects[image_id]) for image_id in image_ids if image_id in objects]
    image_of_object = _join([np.full(len(one.labels), index) for index, one in annotated], np.int64)
    object_labels = _join([one.labels for _, one in annotated], np.int64)
    is_crowd = _join([one.crowds(kind) for _, one in annotated], bool)
    counts = ~(is_crowd | _is_outside(_join([one.areas for _, one in annotated], np.float64)))  # (A, all objects)
    tables = {}
    for category in categories:
        indices = np.flatnonzero(labels == category)
        # Detections of an image are in the order of their scores.
        first = np.searchsorted(images[indices], images[indices])
        ranks = np.arange(len(indices)) - first
        order = np.argsort(-scores[indices], kind="stable")
        indices = indices[order]
        is_object = counts & (object_labels == category)
        num_objects = np.stack([np.bincount(image_of_object[one], minlength=len(image_ids)) for one in is_object])
        is_match, is_ignored = Matches(all_matches[:, indices], all_ignored[:, indices]).unpack(_SHAPE)
        tables[category] = ClassTable(num_objects, images[indices], ranks[order], scores[indices], is_match, is_ignored)
    return tables


def _join(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def precision_and_recall(table: ClassTable, limits: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return COCOeval's precision (T, R, A, L) and recall (T, A, L) of a class, or None without an object to find.

    Where an area range has no object, both are -1. The precision at a recall is the highest one at this recall or a
    higher one, and 0 if the recall is not reached.
    """
    num_objects = table.num_objects.sum(1)
    if not num_objects.any():
        return None
    shape = (len(IOU_THRESHOLDS), len(RECALLS), len(AREA_RANGES), len(limits))
    precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    for last, limit in enumerate(limits):
        kept = table.ranks < limit
        for area in np.flatnonzero(num_objects):
            is_match, is_ignored = table.is_match[area][:, kept], table.is_ignored[area][:, kept]
            right = np.cumsum(is_match & ~is_ignored, axis=1, dtype=np.float64)
            wrong = np.cumsum(~is_match & ~is_ignored, axis=1, dtype=np.float64)
            recalls = right / num_objects[area]
            values = right / (wrong + right + np.spacing(1))
            highest = np.maximum.accumulate(values[:, ::-1], axis=1)[:, ::-1]
            highest = np.pad(highest, ((0, 0), (0, 1)))
            for threshold, row in enumerate(recalls):
                precision[threshold, :, area, last] = highest[threshold, np.searchsorted(row, RECALLS)]
            recall[:, area, last] = recalls[:, -1] if recalls.shape[1] else 0
    return precision, recall
