"""The training objective: match the queries of every stage to objects, and supervise all stages with the same weights.

Axis letters: B images, G groups, Q queries of a group, C classes, T objects of an image, N matched pairs of the batch,
P points, D width, h w mask grid, H W annotated mask, R crowd regions of an image. Everything is float32, whatever the
model's dtype.

Matching is in `matcher_rf_detr`, the points of the mask losses are in `mask_points_rf_detr`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from .boxes_rf_detr import box_cxcywh_to_xyxy, iou_and_giou
from .mask_points_rf_detr import PointSource, sample_bilinear, sample_nearest, uncertain_points
from .matcher_rf_detr import LIMIT, LossWeights, Pairs, clamp_to_limit, match
from .predictions_rf_detr import MaskFactors, StagePrediction
from .targets_rf_detr import read_targets


def rf_detr_loss(
    stages: Mapping[str, StagePrediction],
    labels: Sequence[Mapping[str, Tensor]],
    *,
    num_groups: int,
    weights: LossWeights,
    points: PointSource,
    mask_point_sample_ratio: int = 16,
    num_boxes: Tensor | None = None,
    across_ranks: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of all losses and the losses by name.

    Args:
        stages: Predictions by the suffix of their losses: "" is the last decoder layer, "_0", "_1", ... the earlier
            ones, "_enc" the first stage.
        labels: For each image `class_labels` int64 (T,), `boxes` float (T, 4), and for masks `masks` (T, H, W) of any
            size, bool or integers that are 0 outside the object, or cropped ones, as the image processor makes them
            (`mask_boxes`, `mask_pixels` and `size`). T may be 0. Optionally `has_mask` bool (T,): objects without a
            mask have no mask loss; and `crowd_labels` int64 (R,) with `crowd_regions` bool (R, H, W): queries in a
            region may have the class of the crowd.
        num_groups: G: `group_detr` in training, 1 in evaluation.
        weights: Weights of matching cost and losses.
        points: Source of the points at which masks are compared.
        mask_point_sample_ratio: Number of mask pixels for each point.
        num_boxes: Positive scalar that all losses are divided by; see [`count_boxes`] for the default.
        across_ranks: Whether the default is the mean over all processes.

    Returns:
        The sum, a float32 scalar, and detached float32 scalars: the unweighted losses `loss_ce`, `loss_bbox`,
        `loss_giou`, `loss_mask_ce`, `loss_mask_dice` with the suffix of each stage; for the last layer also
        `cardinality_error` (mean difference between the number of objects and of queries scored above 0.5) and
        `class_error` (per cent of matched queries whose best class is wrong); and `non_finite_predictions`, the
        number of queries in all stages whose logits, box or mask is NaN or infinite. If it is not 0, the sum is NaN.

    Raises:
        ValueError: labels that cannot be trained on; see [`read_targets`].
    """
    last = stages[""]
    device = last.logits.device
    targets = read_targets(labels, len(last.logits), last.logits.shape[-1], last.masks is not None)
    settings: dict[str, Any] = {"weights": weights, "points": points}
    settings["mask_point_sample_ratio"] = mask_point_sample_ratio
    with torch.autocast(device.type, enabled=False):
        if num_boxes is None:
            num_boxes = count_boxes(targets, num_groups, device, across_ranks)
        float_stages = {suffix: _in_float32(stage) for suffix, stage in stages.items()}
        pairs = match(float_stages, targets, num_groups=num_groups, **settings)
        total = torch.zeros((), device=device)
        loss_dict: dict[str, Tensor] = {}
        for suffix, stage in float_stages.items():
            with_masks = pairs_with_masks(pairs[suffix], targets)
            losses = stage_losses(stage, targets, pairs[suffix], with_masks, num_boxes=num_boxes, **settings)
            total = total + sum(getattr(weights, name) * loss for name, loss in losses.items())
            total = total + _zero_of_all_predictions(stage, with_masks)
            loss_dict |= {name + suffix: loss.detach() for name, loss in losses.items()}
        with torch.no_grad():
            loss_dict |= _matching_errors(float_stages[""], targets, pairs[""])
            loss_dict["non_finite_predictions"] = sum(_count_non_finite(stage) for stage in stages.values())
    # A broken prediction that is not matched is in no loss, but the trainer must see it: it looks at the sum.
    return total.masked_fill(loss_dict["non_finite_predictions"] > 0, float("nan")), loss_dict


def count_boxes(targets: Sequence[Mapping], num_groups: int, device: torch.device, across_ranks: bool) -> Tensor:
    """Return the normaliser of the losses: objects x groups, its mean over the ranks if `across_ranks`, at least 1.

    The mean is a collective operation that every rank must call. Evaluation does not use it: its ranks may run out of
    batches at different times.
    """
    count = torch.tensor(float(sum(len(target["class_labels"]) for target in targets) * num_groups), device=device)
    if across_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1.0)


def stage_losses(
    stage: StagePrediction,
    targets: Sequence[Mapping],
    pairs: Sequence[Pairs],
    with_masks: Sequence[Pairs],
    *,
    num_boxes: Tensor,
    weights: LossWeights,
    points: PointSource,
    mask_point_sample_ratio: int,
) -> dict[str, Tensor]:
    """Return the unweighted losses of one stage, each a scalar divided by `num_boxes`.

    `with_masks` are the pairs whose object has a mask.
    """
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
    queries = torch.cat([queries for queries, _ in pairs])
    classes, target_boxes = (
        torch.cat([target[field][objects] for target, (_, objects) in zip(targets, pairs, strict=True)])
        for field in ("class_labels", "boxes")
    )
    boxes = stage.boxes[images, queries]
    iou, giou = iou_and_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
    losses = {
        "loss_ce": class_loss(
            stage.logits,
            (images, queries, classes),
            iou.detach(),
            weights.focal_alpha,
            ignored_entries(stage, targets),
        ),
        "loss_bbox": (boxes - target_boxes).abs().sum(),
        "loss_giou": (1 - giou).sum(),
    }
    if stage.masks is not None:
        cross_entropy, dice = mask_losses(stage.masks, targets, with_masks, mask_point_sample_ratio, points)
        losses |= {"loss_mask_ce": cross_entropy, "loss_mask_dice": dice}
    return {name: loss / num_boxes for name, loss in losses.items()}


def class_loss(
    logits: Tensor,
    matched: tuple[Tensor, Tensor, Tensor],
    iou: Tensor,
    alpha: float,
    ignored: Tensor | None = None,
) -> Tensor:
    """Return the IoU-aware binary cross-entropy (https://arxiv.org/abs/2406.03459, equation 1), summed.

    A matched class has the soft target t = max(p^alpha u^(1-alpha), 0.01), where u is the IoU of its box. Every other
    entry is pushed to 0 with weight p^2, through which the gradient flows too.

    Args:
        logits: (B, G·Q, C).
        matched: Image, query and class of the N matched pairs, (N,) each.
        iou: (N,).
        alpha: Exponent of the score in the target.
        ignored: (B, G·Q, C) bool, entries that are not pushed to 0; none by default.
    """
    p = logits.sigmoid()
    matched_logits = logits[matched]
    target = (p[matched] ** alpha * iou ** (1 - alpha)).clamp(min=0.01).detach()
    positive = F.softplus(-matched_logits) + (1 - target) * matched_logits
    negative = p**2 * F.softplus(logits)
    if ignored is not None:
        negative = negative.masked_fill(ignored, 0.0)
    return negative.index_put(matched, positive).sum()


@torch.no_grad()
def ignored_entries(stage: StagePrediction, targets: Sequence[Mapping]) -> Tensor | None:
    """Return where a query lies in a crowd region of a class, (B, G·Q, C) bool; None if there are no crowd regions.

    It does if at least half of its box is inside the region.
    """
    if not any(len(target.get("crowd_labels", ())) for target in targets):
        return None
    ignored = torch.zeros_like(stage.logits, dtype=torch.bool)
    for image, target in enumerate(targets):
        for label, region in zip(target.get("crowd_labels", ()), target.get("crowd_regions", ()), strict=True):
            ignored[image, :, label] |= fraction_inside(stage.boxes[image], region) >= 0.5
    return ignored


def fraction_inside(boxes_cxcywh: Tensor, region: Tensor) -> Tensor:
    """Return the fraction of the pixels of each box that a region contains.

    Boxes (N, 4) relative to the image   region (H, W) bool   ->   (N,)
    """
    size = region.new_tensor([*region.shape[::-1]] * 2, dtype=torch.float32)
    boxes_xyxy = box_cxcywh_to_xyxy(boxes_cxcywh).nan_to_num()  # a broken prediction is inside nothing
    corners = (boxes_xyxy * size).round().clamp(torch.zeros_like(size), size).long()
    x0, y0, x1, y1 = corners.unbind(-1)
    sums = F.pad(region.float().cumsum(0).cumsum(1), (1, 0, 1, 0))  # pixels above and to the left of each corner
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return inside / ((x1 - x0) * (y1 - y0)).clamp(min=1)


def pairs_with_masks(pairs: Sequence[Pairs], targets: Sequence[Mapping]) -> list[Pairs]:
    """Return the pairs whose object has a mask."""
    selected = []
    for (queries, objects), target in zip(pairs, targets, strict=True):
        is_selected = target["has_mask"][objects] if "has_mask" in target else slice(None)
        selected.append((queries[is_selected], objects[is_selected]))
    return selected


def matched_mask_logits(masks: MaskFactors, pairs: Sequence[Pairs]) -> Tensor:
    """Materialize the masks of the matched queries only: -> (N, h, w), in float32."""
    counts = [len(queries) for queries, _ in pairs]
    images = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(counts)).to(masks.queries.device)
    matched = masks.queries[images, torch.cat([queries for queries, _ in pairs])]
    vectors, offsets = (factor.float() for factor in masks.project(matched))
    # unbind, because the gradient of an index is a tensor of the whole batch for each of its images.
    products = [
        torch.einsum("nd,dhw->nhw", image_vectors, pixels)
        for image_vectors, pixels in zip(vectors.split(counts), masks.pixels.unbind(), strict=True)
    ]
    return torch.cat(products) + offsets[..., None]


def mask_losses(
    masks: MaskFactors, targets: Sequence[Mapping], pairs: Sequence[Pairs], ratio: int, points: PointSource
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy (mean over points) and Dice loss of the matched masks, each summed over the N pairs."""
    height, width = masks.pixels.shape[-2:]
    num_points = max(height, height * width // ratio)
    logits = matched_mask_logits(masks, pairs)
    with torch.no_grad():
        mask_points = uncertain_points(logits, num_points, points)
        points_of_images = mask_points.split([len(objects) for _, objects in pairs])
        target_labels = torch.cat(
            [
                sample_nearest(target["masks"], objects, image_points)
                for target, (_, objects), image_points in zip(targets, pairs, points_of_images, strict=True)
            ]
        )
    sampled = clamp_to_limit(sample_bilinear(logits[:, None], mask_points)[:, 0])
    cross_entropy = (F.softplus(sampled) - sampled * target_labels).mean(-1).sum()
    p = sampled.sigmoid()
    dice = 1 - (2 * (p * target_labels).sum(-1) + 1) / (p.sum(-1) + target_labels.sum(-1) + 1)
    return cross_entropy, dice.sum()


def _in_float32(stage: StagePrediction) -> StagePrediction:
    logits = stage.logits.float().clamp(-LIMIT, LIMIT)
    boxes = stage.boxes.float().clamp(-LIMIT, LIMIT)
    masks = None if stage.masks is None else stage.masks._replace(pixels=stage.masks.pixels.float())
    return StagePrediction(logits, boxes, masks)


def _zero_of_all_predictions(stage: StagePrediction, with_masks: Sequence[Pairs]) -> Tensor:
    """Return 0 as a function of every prediction: every parameter has a gradient also on a rank without objects."""
    parts = [stage.boxes]
    if stage.masks is not None and not any(len(queries) for queries, _ in with_masks):
        parts += [stage.masks.pixels, *stage.masks.project(stage.masks.queries[:, :1])]
    return sum((part * 0).sum() for part in parts)


def _count_non_finite(stage: StagePrediction) -> Tensor:
    broken = ~torch.isfinite(stage.logits).all(-1) | ~torch.isfinite(stage.boxes).all(-1)
    if stage.masks is not None:
        broken = broken | ~torch.isfinite(stage.masks.queries).all(-1)
        broken = broken | ~torch.isfinite(stage.masks.pixels).flatten(1).all(-1, keepdim=True)
    return broken.sum().float()


def _matching_errors(stage: StagePrediction, targets: Sequence[Mapping], pairs: Sequence[Pairs]) -> dict[str, Tensor]:
    """Return DETR's `cardinality_error` and `class_error`."""
    num_objects = torch.tensor([float(len(target["class_labels"])) for target in targets], device=stage.logits.device)
    num_confident = (stage.logits.sigmoid().amax(-1) > 0.5).sum(-1)
    is_right = torch.cat(
        [
            stage.logits[image, queries].argmax(-1) == target["class_labels"][objects]
            for image, (target, (queries, objects)) in enumerate(zip(targets, pairs, strict=True))
        ]
    )
    accuracy = is_right.float().mean() if len(is_right) else is_right.new_zeros((), dtype=torch.float32)
    return {"cardinality_error": (num_confident - num_objects).abs().mean(), "class_error": 100 - 100 * accuracy}
