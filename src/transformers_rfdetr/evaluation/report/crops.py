"""Cut the surroundings of objects out of images, with what lies in them. Windows are left, top, right, bottom."""

import numpy as np
from pycocotools import mask as coco_mask

from ...inference.instances import Instances
from ...model.masks import region_to_rle

_MARGIN, _MIN_CROP = 0.75, 64  # around an object, as a share of its longer side; pixels of the image


def window_around(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a square around boxes_xyxy (B, 4), moved into an image of `size` (H, W).

    It is cut off at an image that is smaller.
    """
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = max((high - low).max() * (1 + 2 * _MARGIN), _MIN_CROP)
    limit = np.array(size[::-1])
    start = np.clip((low + high) / 2 - side / 2, 0, np.maximum(limit - side, 0))
    left, top = np.floor(start).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(start + side), limit).astype(int).tolist()
    return left, top, right, bottom


def indices_inside(instances: Instances, window: tuple[int, int, int, int]) -> list[int]:
    """Return the indices of the instances whose boxes overlap a window."""
    left, top, right, bottom = window
    x0, y0, x1, y1 = instances.boxes.T
    return np.flatnonzero((x0 < right) & (x1 > left) & (y0 < bottom) & (y1 > top)).tolist()


def crop_instances(instances: Instances, window: tuple[int, int, int, int]) -> Instances:
    """Return instances in the coordinates of a window: left, top, right, bottom in pixels inside the image."""
    left, top, right, bottom = window
    size = (bottom - top, right - left)
    boxes = (instances.boxes - np.array([left, top] * 2, np.float32)).clip(0, np.array([*size[::-1]] * 2, np.float32))
    masks = instances.masks
    if masks is not None:
        regions = [coco_mask.decode(mask)[top:bottom, left:right].astype(bool) for mask in masks]
        masks = [region_to_rle(region, 0, 0, size) for region in regions]
    return Instances(boxes, instances.scores, instances.labels, instances.names, masks, size)
