"""Box formulas, broadcast over leading axes.

`boxes_cxcywh` are (cx, cy, w, h) and `boxes_xyxy` are corners (x0, y0, x1, y1), both as fractions of the model's input.
They are unbounded, and float32 whatever the model's dtype: bfloat16 would round them to two pixels of 432.
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) -> (..., 4); a negative width or height counts as 0."""
    center, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([center - half, center + half], dim=-1)


def refine_boxes(deltas: Tensor, boxes: Tensor) -> Tensor:
    """Move `boxes` (cx, cy, w, h) to (cx + dx w, cy + dy h) and scale them to (w exp(dw), h exp(dh)), in float32.

    Deltas and boxes (..., 4) -> (..., 4). Deformable DETR adds deltas to inverse sigmoids instead; LW-DETR
    (https://arxiv.org/abs/2406.03459) and RF-DETR do this.
    """
    deltas = deltas.float()
    size = boxes[..., 2:]
    return torch.cat([deltas[..., :2] * size + boxes[..., :2], deltas[..., 2:].exp() * size], dim=-1)


def iou_and_giou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalized IoU (https://arxiv.org/abs/1902.09630): (..., 4) and (..., 4) -> two (...)."""
    areas = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(-1) + (others_xyxy[..., 2:] - others_xyxy[..., :2]).prod(
        -1
    )
    low = torch.maximum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    high = torch.minimum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = areas - intersection
    iou = intersection / union.clamp(min=1e-7)
    hull_low = torch.minimum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    hull_high = torch.maximum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    hull = (hull_high - hull_low).prod(-1)
    return iou, iou - (hull - union) / hull.clamp(min=1e-7)
