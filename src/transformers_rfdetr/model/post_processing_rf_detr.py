"""Convert the model's outputs to detections and instance masks.

Axis letters: B images, Q queries, C classes, K detections kept in an image, H W pixels of the original image, h w cells
of the mask head. Sizes are (height, width). Boxes are `boxes_cxcywh` in [0, 1] or `boxes_xyxy` in pixels.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .masks import region_to_rle, upsample_masks
from .validation import are_numbers, is_index, to_builtin


class Detections(NamedTuple):
    """The K pairs of query and class kept in one image, best first."""

    scores: torch.Tensor  # (K,) float32
    labels: torch.Tensor  # (K,)
    queries: torch.Tensor  # (K,)
    boxes_xyxy: torch.Tensor  # (K, 4) float32, clipped to the image


def select_detections(
    outputs: Any, index: int, threshold: float, size: tuple[int, int], top_k: int | None
) -> Detections:
    """Select the detections of image `index` and scale their boxes to `size`.

    Of equal scores, those of earlier queries are selected.
    """
    num_queries, num_classes = outputs.logits.shape[1:]
    if top_k is not None and not (is_index(top_k) and top_k > 0):
        raise ValueError(f"`top_k` must be an integer of at least 1, got {top_k!r}")
    top_k = num_queries if top_k is None else top_k
    is_finite = outputs.pred_boxes[index].isfinite().all(dim=-1, keepdim=True)
    scores = outputs.logits[index].float().sigmoid().masked_fill(~is_finite, math.nan).flatten()
    is_candidate = scores > threshold
    lowest = scores.masked_fill(~is_candidate, -math.inf).topk(min(top_k, len(scores))).values[-1:]
    candidates = (is_candidate & (scores >= lowest)).nonzero()[:, 0]  # few, or more where scores are equal
    best = candidates[scores[candidates].argsort(descending=True, stable=True)[:top_k]]
    queries = best // num_classes
    center, extent = outputs.pred_boxes[index, queries].float().split(2, dim=-1)
    extent = extent.clamp(min=0)
    limit = center.new_tensor([size[1], size[0]]).repeat(2)
    boxes_xyxy = (torch.cat([center - extent / 2, center + extent / 2], dim=-1) * limit).clamp(min=0).minimum(limit)
    return Detections(scores[best], best % num_classes, queries, boxes_xyxy)


def read_target_sizes(target_sizes: Any, batch_size: int) -> list[tuple[int, int]] | None:
    """Convert a list, array or tensor of `batch_size` pairs to (height, width) tuples; None stays None."""
    if target_sizes is None:
        return None
    pairs = target_sizes.tolist() if isinstance(target_sizes, np.ndarray | torch.Tensor) else target_sizes
    if not isinstance(pairs, list | tuple) or len(pairs) != batch_size:
        raise ValueError(
            f"`target_sizes` must contain one (height, width) for each of {batch_size} images, got {pairs!r:.80}"
        )
    for pair in pairs:
        size = to_builtin(pair)
        if not are_numbers(size, 2) or min(size) < 1 or any(side != int(side) for side in size):
            raise ValueError(f"`target_sizes` must contain pairs (height, width) of positive integers, got {pair!r}")
    return [(int(height), int(width)) for height, width in pairs]


def valid_size(pixel_mask: torch.Tensor, mask_size: tuple[int, int]) -> tuple[float, float]:
    """Return how many rows and columns of the mask head's (h, w) the image covers, from its `pixel_mask` (H, W)."""
    rows, columns = pixel_mask.any(1).sum().item(), pixel_mask.any(0).sum().item()
    return rows / pixel_mask.shape[0] * mask_size[0], columns / pixel_mask.shape[1] * mask_size[1]


def segment_instances(
    outputs: Any,
    *,
    threshold: float,
    mask_threshold: float,
    target_sizes: torch.Tensor | Sequence[Sequence[int]] | None,
    top_k: int | None,
    mask_format: str,
    overlap_mask_area_threshold: float,
    pixel_mask: torch.Tensor | None,
) -> list[dict[str, Any]]:
    """Return the instances of each image; see `RfDetrImageProcessor.post_process_instance_segmentation`.

    `mask_format` is "label_map", "rle" or "binary".
    """
    if getattr(outputs, "pred_masks", None) is None:
        raise ValueError(
            "`outputs` must have `pred_masks`, got outputs without masks. Use a segmentation model, or call"
            " post_process_object_detection."
        )
    if not 0 <= overlap_mask_area_threshold <= 1:
        raise ValueError(f"`overlap_mask_area_threshold` must be in [0, 1], got {overlap_mask_area_threshold}")
    batch_size = len(outputs.logits)
    if pixel_mask is not None:
        pixel_mask = torch.as_tensor(pixel_mask)
        if pixel_mask.ndim != 3 or len(pixel_mask) != batch_size or not pixel_mask.any(2).any(1).all():
            raise ValueError(
                f"`pixel_mask` must be (B, H, W) with at least one pixel of each of {batch_size} images, got shape"
                f" {tuple(pixel_mask.shape)}. Pass the model's input of that name."
            )
    mask_size = tuple(outputs.pred_masks.shape[-2:])
    results = []
    for index, size in enumerate(read_target_sizes(target_sizes, batch_size) or [mask_size] * batch_size):
        detections = select_detections(outputs, index, threshold, size, top_k)
        mask_logits = outputs.pred_masks[index, detections.queries]
        covered = None if pixel_mask is None else valid_size(pixel_mask[index], mask_size)
        masks = upsample_masks(mask_logits, size, mask_threshold, covered)
        results.append(_stack_instances(detections, masks, size, mask_format, overlap_mask_area_threshold))
    return results


def _stack_instances(
    detections: Detections,
    masks: Iterable[tuple[np.ndarray, int, int]],
    size: tuple[int, int],
    mask_format: str,
    min_visible: float,
) -> dict[str, Any]:
    """Stack the masks of one image, the best instance on top, in the format that is asked for.

    Args:
        masks: For each detection its region, (rows, columns) bool, and the region's top and left in the image.
        min_visible: The fraction of an instance's mask that must be visible; with 0 every instance is kept.
    """
    label_map: np.ndarray = np.full(size, -1, np.int32)
    num_binary = len(detections.scores) if mask_format == "binary" else 0
    binary_masks: np.ndarray = np.zeros((num_binary, *size), bool)
    rles: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    columns = (detections.scores.tolist(), detections.labels.tolist(), detections.boxes_xyxy.tolist())
    for (region, top, left), score, label, box in zip(masks, *columns, strict=True):
        inside = np.s_[top : top + region.shape[0], left : left + region.shape[1]]
        visible = region & (label_map[inside] < 0)
        area, visible_area = int(np.count_nonzero(region)), int(np.count_nonzero(visible))
        if min_visible > 0 and visible_area < max(1, min_visible * area):
            continue
        if mask_format == "binary":
            binary_masks[len(segments)][inside] = region
        if mask_format == "rle":
            rles.append(region_to_rle(region, top, left, size))
        segment = {"id": len(segments) + 1, "label_id": label, "score": score, "box": box}
        segments.append({**segment, "area": area, "visible_area": visible_area})
        np.copyto(label_map[inside], len(segments), where=visible)
    if mask_format == "rle":
        return {"segmentation": rles, "segments_info": segments}
    array = binary_masks[: len(segments)] if mask_format == "binary" else label_map
    return {"segmentation": torch.from_numpy(array).to(detections.scores.device), "segments_info": segments}
