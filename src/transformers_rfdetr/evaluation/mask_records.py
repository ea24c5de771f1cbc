"""Compact records of the detections and the objects of one image, with masks as compressed RLE.

Axis letters: K detections or objects of an image, H W pixels of the image. Sizes are (height, width). RLE is COCO's.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..model.masks import box_xyxy_to_xywh, read_segmentation
from ..model.validation import are_numbers, error_context, require, to_builtin
from .coco_summary import COCO_MAX_DETECTIONS


class PackedMasks(NamedTuple):
    """The RLE counts of K masks of an image in one string, so that a mask costs no Python object."""

    size: tuple[int, int]
    counts: bytes
    offsets: np.ndarray  # (K + 1,) int64; two equal offsets stand for a missing mask

    def __len__(self) -> int:
        """Return K."""
        return len(self.offsets) - 1

    @classmethod
    def pack(cls, rles: Sequence[dict[str, Any] | None], size: tuple[int, int]) -> "PackedMasks":
        """Pack K compressed RLEs of the same size with counts as bytes or str; None stands for a missing mask."""
        counts = [b"" if rle is None else rle["counts"] for rle in rles]
        counts = [one.encode("ascii") if isinstance(one, str) else one for one in counts]
        return cls(size, b"".join(counts), np.cumsum([0, *map(len, counts)]))

    def select(self, indices: Iterable[int]) -> "PackedMasks":
        """Return the masks at `indices`."""
        return PackedMasks.pack(self.rles(indices), self.size)

    def rles(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Return the masks at `indices` as COCO RLE with counts as bytes."""
        bounds = [(self.offsets[index], self.offsets[index + 1]) for index in indices]
        return [{"size": list(self.size), "counts": self.counts[start:end]} for start, end in bounds]


class Matches(NamedTuple):
    """How the K detections of an image match its objects, one bit for each area range and IoU threshold (A x T)."""

    is_match: np.ndarray  # (5, K) uint8
    is_ignored: np.ndarray  # (5, K) uint8, detections of what does not count

    @classmethod
    def pack(cls, is_match: np.ndarray, is_ignored: np.ndarray) -> "Matches":
        """Pack two arrays (A, T, K) bool."""
        num_areas, num_thresholds, num_detections = is_match.shape
        shape = (num_areas * num_thresholds, num_detections)
        packed = (np.packbits(one.reshape(shape), axis=0) for one in (is_match, is_ignored))
        return cls(*packed)

    def unpack(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return both as (A, T, K) bool; `shape` is (A, T)."""
        is_match, is_ignored = (np.unpackbits(one, axis=0).view(bool).reshape(*shape, one.shape[1]) for one in self)
        return is_match, is_ignored


class ImageMatches(NamedTuple):
    """What an image contributes to the metrics."""

    bbox: Matches
    segm: Matches | None  # None without masks
    pixels: dict[int | None, np.ndarray]  # see `mask_iou.count_pixels`; empty without masks


class Detections(NamedTuple):
    """The K detections of an image that COCO evaluates, best first."""

    scores: np.ndarray  # (K,) float64
    labels: np.ndarray  # (K,) int64, category ids
    boxes: np.ndarray  # (K, 4) float64, [x, y, width, height] in pixels
    masks: PackedMasks | None  # None without masks, and without detections
    matches: ImageMatches | None = None  # with the ground truth of an evaluator

    def sort_key(self) -> tuple[bytes, ...]:
        """Return a key by which any two different records have an order."""
        arrays = (self.scores.tobytes(), self.labels.tobytes(), self.boxes.tobytes())
        return (*arrays, b"" if self.masks is None else self.masks.counts)


class Objects(NamedTuple):
    """The K ground truth objects of an image."""

    labels: np.ndarray  # (K,) int64, category ids
    is_crowd: np.ndarray  # (K,) bool
    areas: np.ndarray  # (K,) float64, pixels
    boxes: np.ndarray  # (K, 4) float64, [x, y, width, height] in pixels
    masks: PackedMasks | None  # None if no object of the image has a mask

    @property
    def has_mask(self) -> np.ndarray:
        """Return (K,) bool."""
        return np.zeros(len(self.labels), bool) if self.masks is None else np.diff(self.masks.offsets) > 0

    def regions(self, indices: Sequence[int], size: tuple[int, int]) -> list[dict[str, Any]]:
        """Return the masks of objects as RLE in an image of `size` (H, W); that of an object without one is its box."""
        rles = [{"counts": b""}] * len(indices) if self.masks is None else self.masks.rles(indices)
        boxes = [index for index, rle in zip(indices, rles, strict=True) if not rle["counts"]]
        filled = iter(coco_mask.frPyObjects(self.boxes[boxes], *size) if boxes else ())
        return [rle if rle["counts"] else next(filled) for rle in rles]

    def crowds(self, kind: str) -> np.ndarray:
        """Return which objects are ignored and can be detected repeatedly, (K,) bool, for `kind` "segm" or "bbox".

        By mask, those without a mask are too: detections in their box are ignored.
        """
        return self.is_crowd | ~self.has_mask if kind == "segm" else self.is_crowd


def pack_detections(
    scores: Any,
    labels: Any,
    masks: Any,
    boxes: Any,
    image_size: tuple[int, int] | None,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> Detections:
    """Check the detections of an image and return a record of the best of each category: 100, or `max_detections`.

    The arguments are those of `InstanceSegmentationEvaluator.update`. With `image_size` None, the size is that of the
    first mask.
    """
    scores, labels = _read_numbers("scores", scores, np.float64), _read_numbers("labels", labels, np.int64)
    if boxes is not None:
        boxes = _read_numbers("boxes", boxes, np.float64)
    fields = {"scores": scores, "labels": labels, "masks": masks, "boxes": boxes}
    lengths = {name: len(values) for name, values in fields.items() if values is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"scores, labels, masks and boxes must have the same length, got {lengths}")
    if not len(scores):
        return Detections(np.empty(0), np.empty(0, np.int64), np.empty((0, 4)), None)
    is_valid = scores.ndim == labels.ndim == 1 and bool(np.isfinite(scores).all())
    require(is_valid, "scores", scores, "one finite number per detection")
    if masks is None and boxes is None:
        raise ValueError(f"`masks` or `boxes` is required, got neither for {len(scores)} detections")
    best = best_per_class(scores, labels, max_detections)
    packed = None
    if isinstance(masks, PackedMasks):
        packed = masks.select(best)
    elif masks is not None:
        rles = []
        for index in best.tolist():
            with error_context(f"mask {index}"):
                rles.append(_read_detected_mask(masks[index], image_size))
            image_size = (rles[0]["size"][0], rles[0]["size"][1])
        packed = PackedMasks.pack(rles, image_size)
    boxes_xywh = coco_mask.toBbox(rles) if boxes is None else _boxes_xyxy_to_xywh(boxes, len(scores))[best]
    return Detections(scores[best], labels[best], boxes_xywh, packed)


def best_per_class(scores: np.ndarray, labels: np.ndarray, max_detections: int = COCO_MAX_DETECTIONS) -> np.ndarray:
    """Return the indices of the best detections of each label, best first, ties in order.

    Scores (K,)   labels (K,)   ->   at most 100, or `max_detections` if that is more, of each label
    """
    limit = max(COCO_MAX_DETECTIONS, max_detections)
    order = np.argsort(-scores, kind="stable")
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    is_kept: np.ndarray = np.zeros(len(scores), bool)
    is_kept[by_class[np.arange(len(scores)) - np.repeat(first, count) < limit]] = True
    return order[is_kept[order]]


def empty_rle(size: tuple[int, int]) -> dict[str, Any]:
    """Return the RLE of a mask (H, W) without a pixel."""
    height, width = size
    return coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)


def _read_numbers(name: str, values: Any, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (values.double() if values.is_floating_point() else values).numpy(force=True)  # numpy has no bfloat16
    array = np.asarray(values)
    is_valid = not array.size or array.dtype.kind in ("iu" if dtype is np.int64 else "iuf")
    require(is_valid, name, array, "an array of integers" if dtype is np.int64 else "an array of numbers")
    return array.astype(dtype)


def _boxes_xyxy_to_xywh(boxes: np.ndarray, num_detections: int) -> np.ndarray:
    is_valid = boxes.shape == (num_detections, 4) and np.isfinite(boxes).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
    require(is_valid, "boxes", boxes, "finite pixels [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1")
    return box_xyxy_to_xywh(boxes)


def _read_detected_mask(mask: Any, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return an RLE or a bitmap (H, W), which may have no pixel, as RLE."""
    if isinstance(mask, torch.Tensor):
        mask = mask.numpy(force=True)
    if not isinstance(mask, Mapping):
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.dtype.itemsize != 1:
            raise ValueError(f"a mask must be RLE or bool (height, width), got {mask.dtype} of shape {mask.shape}")
    given_size = to_builtin(mask.get("size")) if isinstance(mask, Mapping) else list(mask.shape)
    if image_size is None and are_numbers(given_size, 2):
        image_size = (int(given_size[0]), int(given_size[1]))
    rle = read_segmentation(mask, image_size or (0, 0))
    return rle if isinstance(rle, dict) else empty_rle(image_size)
