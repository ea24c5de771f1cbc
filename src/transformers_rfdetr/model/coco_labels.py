"""Convert the COCO annotations of an image to the labels that the model is trained on.

Axis letters: N objects of an image, H W pixels of the model's input. Sizes are (height, width).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import logging

from .masks import Segmentation, box_and_area, rasterize, read_segmentation
from .validation import are_numbers, error_context, is_index, is_number, require, to_builtin

logger = logging.get_logger(__name__)


class ImageSizes(NamedTuple):
    """(height, width) of one image before and after resizing, and of the padded batch."""

    original: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]


class _Object(NamedTuple):
    label: int
    box_xyxy: tuple[float, float, float, float]  # pixels of the original image, clipped to it
    area: float  # pixels of the original image
    segmentation: Segmentation | None


def prepare_labels(
    target: Any, index: int, sizes: ImageSizes, *, with_masks: bool | None, relative_boxes: bool
) -> dict[str, torch.Tensor]:
    """Convert the annotations of image `index` to labels; see `RfDetrImageProcessor.preprocess`.

    Crowd regions are dropped. Objects are dropped, with a log message, if their box has no area inside the image or
    if their mask is wanted and has no pixel.
    """
    image_id, where = _read_image_id(target, index, sizes.original)
    objects, num_dropped = _read_objects(target["annotations"], where, sizes.original, bool(with_masks))
    if with_masks:
        with error_context(f"{where}: segmentation"):
            masks = rasterize([item.segmentation for item in objects], sizes.original, sizes.resized)
        has_pixels = np.asarray(masks.any(axis=(1, 2)))
        if not has_pixels.all():
            masks = masks[has_pixels]
            objects = [item for item, keep in zip(objects, has_pixels, strict=True) if keep]
            num_dropped += len(has_pixels) - len(masks)
    if num_dropped:
        logger.warning_once(
            "Some annotations were dropped from the training labels: their box has no area inside the image, or their"
            " segmentation covers no pixel of the model's input. Set the log level to INFO to see which images are"
            " affected. This warning is shown once."
        )
        logger.info(f"{where}: dropped {num_dropped} of {len(target['annotations'])} annotations")

    boxes_xyxy = torch.tensor([item.box_xyxy for item in objects], dtype=torch.float32).reshape(-1, 4)
    scale = torch.tensor([new / old for new, old in zip(sizes.resized, sizes.original, strict=True)]).flip(0).repeat(2)
    labels = {
        "image_id": torch.tensor([image_id]),
        "class_labels": torch.tensor([item.label for item in objects], dtype=torch.int64),
        "boxes": boxes_xyxy * scale,
        "area": torch.tensor([item.area for item in objects], dtype=torch.float32) * scale[:2].prod(),
        "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
        "orig_size": torch.tensor(sizes.original),
        "size": torch.tensor(sizes.padded),
    }
    if relative_boxes:
        # Relative to the image, not to the padded input: the model's proposals and reference points are, by their
        # valid ratios, as in Deformable DETR and rfdetr. (transformers' own port divides by the padded size.)
        low, high = boxes_xyxy.split(2, dim=-1)
        original_xyxy = torch.tensor(sizes.original[::-1]).repeat(2)
        labels["boxes"] = torch.cat([(low + high) / 2, high - low], dim=-1) / original_xyxy
    if with_masks:
        bottom, right = (padded - resized for padded, resized in zip(sizes.padded, sizes.resized, strict=True))
        labels["masks"] = torch.from_numpy(masks)
        if bottom or right:
            labels["masks"] = F.pad(labels["masks"], (0, right, 0, bottom))
    return labels


def _read_image_id(target: Any, index: int, orig_size: tuple[int, int]) -> tuple[int, str]:
    """Check what stands beside the annotations of an image; return its id, and its name in error messages."""
    where = f"image {index}"
    with error_context(where):
        annotations = target.get("annotations") if isinstance(target, Mapping) else None
        is_list = isinstance(annotations, list | tuple) or (
            isinstance(annotations, np.ndarray) and annotations.ndim == 1
        )
        require(is_list, "annotations", target, "a dict {'image_id': ..., 'annotations': [...]}")
        image_id = to_builtin(target.get("image_id"))
        if isinstance(image_id, str) and image_id.isdecimal():
            image_id = int(image_id)
        require(is_index(image_id), "image_id", image_id, "an integer of at least 0")
    where = f"{where} (image_id {image_id})"
    for name, expected in zip(("height", "width"), orig_size, strict=True):
        given = to_builtin(target.get(name))
        with error_context(where):
            rule = f"the image's {name} after EXIF rotation, {expected}"
            require(given in (None, expected), name, given, rule, "Check that annotations and images are in one order.")
    return int(image_id), where


def _read_objects(
    annotations: Sequence[Any], where: str, image_size: tuple[int, int], with_masks: bool
) -> tuple[list[_Object], int]:
    """Return the objects of an image that are usable, and the number of those that are not; crowds are neither."""
    objects, num_dropped = [], 0
    for position, annotation in enumerate(annotations):
        with error_context(f"{where}, annotation {position}"):
            require(isinstance(annotation, Mapping), "annotation", annotation, "a dict in COCO format")
        with error_context(f"{where}, annotation {position} (id {to_builtin(annotation.get('id'))})"):
            crowd = to_builtin(annotation.get("iscrowd"))
            require(crowd in (None, 0, 1), "iscrowd", crowd, "0 or 1")
            if crowd:
                continue
            item = _read_object(annotation, image_size, with_masks)
        if item is None:
            num_dropped += 1
        else:
            objects.append(item)
    return objects, num_dropped


def _read_object(annotation: Mapping[str, Any], image_size: tuple[int, int], with_masks: bool) -> _Object | None:
    """Read one annotation; return None if it has no area inside the image, or no mask where one is wanted."""
    label, box, area = (to_builtin(annotation.get(field)) for field in ("category_id", "bbox", "area"))
    require(is_index(label), "category_id", label, "a class index, an integer of at least 0")
    require(area is None or (is_number(area) and area >= 0), "area", area, "a number of at least 0")
    require(box is None or are_numbers(box, 4), "bbox", box, "[x, y, width, height], four finite numbers in pixels")
    segmentation = None
    if with_masks or box is None:
        with error_context("segmentation"):
            segmentation = read_segmentation(annotation.get("segmentation"), image_size)
    if segmentation is not None and (box is None or area is None):
        mask_box, mask_area = box_and_area(segmentation, image_size)
        box, area = box or mask_box, mask_area if area is None else area
    x0, y0, x1, y1 = clip_box(box or [0, 0, 0, 0], image_size)
    if x1 <= x0 or y1 <= y0 or (with_masks and segmentation is None):
        return None
    return _Object(label, (x0, y0, x1, y1), (x1 - x0) * (y1 - y0) if area is None else area, segmentation)


def clip_box(box: Sequence[float], image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Convert [x, y, width, height] to x0, y0, x1, y1 clipped to the image; without an area if it lies outside."""
    x, y, width, height = box
    return max(x, 0), max(y, 0), min(x + width, image_size[1]), min(y + height, image_size[0])
