"""Convert the COCO annotations of an image to the labels that the model is trained on.

Axis letters: N objects and R crowd regions of an image, H W pixels of the model's input. Sizes are (height, width).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from .masks import (
    Segmentation,
    box_and_area,
    box_polygon,
    has_segmentation,
    paste_regions,
    rasterize_regions,
    read_segmentation,
)
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
    target: Any, index: int, sizes: ImageSizes, *, masks: Literal["cropped"] | bool | None, relative_boxes: bool
) -> dict[str, torch.Tensor]:
    """Convert the annotations of image `index` to labels; see `RfDetrImageProcessor.preprocess`.

    Objects are dropped, with a log message, if their box has no area inside the image, or if their mask is wanted and
    has no pixel. Crowd regions become regions in which the class loss ignores detections.
    """
    image_id, where = _read_image_id(target, index, sizes.original)
    objects, crowds, num_dropped = _read_objects(target["annotations"], where, sizes.original, bool(masks))
    with error_context(f"{where}: segmentation"):
        if masks:
            drawn = list(_draw_regions(objects, sizes))
            has_mask = np.array([item.segmentation is not None for item in objects], bool)
            is_kept = np.array([region.any() for region, _, _ in drawn], bool) | ~has_mask
            if not is_kept.all():
                objects, drawn = list(compress(objects, is_kept)), list(compress(drawn, is_kept))
                has_mask = has_mask[is_kept]
                num_dropped += int(np.sum(~is_kept))
        crowd_regions = list(_draw_regions(crowds, sizes, fill_boxes=True))
    if num_dropped:
        logger.warning_once(
            "Some annotations were dropped from the training labels: their box has no area inside the image, or their"
            " segmentation covers no pixel of the model's input. Random crops cause this at their borders, and then"
            " nothing is wrong. If it is also shown without augmentation, run `transformers-rfdetr check-dataset`, or"
            " set TRANSFORMERS_VERBOSITY=info to see which images are affected. Each process that reads data says this"
            " once."
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
    if masks == "cropped":
        labels |= _crop(drawn)
    elif masks:
        labels["masks"] = torch.from_numpy(paste_regions(drawn, sizes.padded))
    if masks and not has_mask.all():
        labels["has_mask"] = torch.from_numpy(has_mask)
    if crowds:
        labels["crowd_labels"] = torch.tensor([item.label for item in crowds])
        labels["crowd_regions"] = torch.from_numpy(paste_regions(crowd_regions, sizes.resized))
    return labels


def _draw_regions(
    objects: Sequence[_Object], sizes: ImageSizes, fill_boxes: bool = False
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield the mask of each object in the resized image, cropped as by `rasterize_regions`.

    The mask of an object without one is empty, or with `fill_boxes` its box.
    """
    shapes: list[Segmentation] = []
    for item in objects:
        box = item.box_xyxy if fill_boxes else (0, 0, 0, 0)
        shapes.append(item.segmentation or [np.array(box_polygon(*box), np.float64)])
    return rasterize_regions(shapes, sizes.original, sizes.resized)


def _crop(regions: Sequence[tuple[np.ndarray, int, int]]) -> dict[str, torch.Tensor]:
    """Return the pixels of all regions, one after the other, and where they are; see `CroppedMasks`."""
    pixels = np.concatenate([np.zeros(0, bool), *(region.ravel() for region, _, _ in regions)])
    boxes = [(top, left, *region.shape) for region, top, left in regions]
    return {
        "mask_pixels": torch.from_numpy(pixels),
        "mask_boxes": torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4),
    }


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
) -> tuple[list[_Object], list[_Object], int]:
    """Return the objects and the crowd regions of an image that are usable, and the number of objects that are not."""
    objects: list[_Object] = []
    crowds: list[_Object] = []
    num_dropped = 0
    for position, annotation in enumerate(annotations):
        with error_context(f"{where}, annotation {position}"):
            require(isinstance(annotation, Mapping), "annotation", annotation, "a dict in COCO format")
        with error_context(f"{where}, annotation {position} (id {to_builtin(annotation.get('id'))})"):
            crowd = to_builtin(annotation.get("iscrowd"))
            require(crowd in (None, 0, 1), "iscrowd", crowd, "0 or 1")
            item = _read_object(annotation, image_size, with_masks or bool(crowd))
        if item is not None:
            (crowds if crowd else objects).append(item)
        elif not crowd:
            num_dropped += 1
    return objects, crowds, num_dropped


def _read_object(annotation: Mapping[str, Any], image_size: tuple[int, int], with_masks: bool) -> _Object | None:
    """Read one annotation; return None if it has no area inside the image, or a segmentation without a pixel."""
    label, box, area = (to_builtin(annotation.get(field)) for field in ("category_id", "bbox", "area"))
    require(is_index(label), "category_id", label, "a class index, an integer of at least 0")
    require(area is None or (is_number(area) and area >= 0), "area", area, "a number of at least 0")
    require(box is None or are_numbers(box, 4), "bbox", box, "[x, y, width, height], four finite numbers in pixels")
    segmentation = None
    if with_masks or box is None:
        with error_context("segmentation"):
            segmentation = read_segmentation(annotation.get("segmentation"), image_size)
        if with_masks and segmentation is None and has_segmentation(annotation.get("segmentation")):
            return None
    if segmentation is not None and (box is None or area is None):
        mask_box, mask_area = box_and_area(segmentation, image_size)
        box, area = box or mask_box, mask_area if area is None else area
    x0, y0, x1, y1 = clip_box(box or [0, 0, 0, 0], image_size)
    if np.float32(x1) <= np.float32(x0) or np.float32(y1) <= np.float32(y0):  # the type of the labels
        return None
    return _Object(label, (x0, y0, x1, y1), (x1 - x0) * (y1 - y0) if area is None else area, segmentation)


def clip_box(box: Sequence[float], image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Convert [x, y, width, height] to x0, y0, x1, y1 clipped to the image; without an area if it lies outside."""
    x, y, width, height = box
    return max(x, 0), max(y, 0), min(x + width, image_size[1]), min(y + height, image_size[0])
