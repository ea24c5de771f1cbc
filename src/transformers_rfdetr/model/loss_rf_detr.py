"""Predictions and targets, to matching, to losses: pure functions, in float32 whatever the model runs in.

Axes: B images, G groups, Q queries of a group, C classes, T objects of an image, N matched pairs of the batch,
P points, D width, h w mask grid, H W target mask. Boxes are (cx, cy, w, h) as fractions of the input picture.

Each group is matched on its own, so in training every object has G partners. Evaluation has one group.

Masks are never multiplied out for all queries: the matcher samples the pixel features at P points and multiplies
there, without gradients; the loss multiplies out the N matched masks. The choice of points is PointRend's
(https://arxiv.org/abs/1912.08193).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# (number of point sets, points in a set, device) -> (sets, points, 2): x and y in [0, 1].
PointSource = Callable[[int, int, torch.device], Tensor]
# (query indices, object indices) of the matched pairs of one image.
Pairs = tuple[Tensor, Tensor]

# Logits and coordinates beyond this are cut before the formulas, so that every finite prediction, bfloat16's 3e38
# among them, has a finite loss. No picture has a box a million times its size.
_LIMIT = 1e6


def bounded(x: Tensor) -> Tensor:
    """`x` within the limit. A product of finite factors may overflow to inf - inf, which then counts as 0."""
    return torch.nan_to_num(x, 0.0, _LIMIT, -_LIMIT).clamp(-_LIMIT, _LIMIT)


class MaskFactors(NamedTuple):
    """Masks of N queries, not yet multiplied out: logits = <vectors, pixels> + offsets, both made from the queries.

    The loss makes the vectors of the few queries that are matched, with their graph; the matcher those of all without.
    """

    pixels: Tensor  # (B, D, h, w)
    queries: Tensor  # (B, N, D)
    project: Callable[[Tensor], tuple[Tensor, Tensor]]  # queries (..., D) -> vectors (..., D) and offsets (..., 1)

    def logits(self) -> Tensor:
        """The mask logits (B, N, h, w)."""
        vectors, offsets = self.project(self.queries)
        return (vectors @ self.pixels.flatten(2) + offsets).unflatten(-1, self.pixels.shape[-2:])


class StagePrediction(NamedTuple):
    """What one decoder layer, or the first stage, predicts for G·Q queries of each image."""

    logits: Tensor  # (B, G·Q, C)
    boxes: Tensor  # (B, G·Q, 4)
    masks: MaskFactors | None = None


class LossWeights(NamedTuple):
    """Weights of matching cost and losses; the mask terms weigh the same in both."""

    class_cost: float = 2.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0
    loss_ce: float = 1.0
    loss_bbox: float = 5.0
    loss_giou: float = 2.0
    loss_mask_ce: float = 5.0
    loss_mask_dice: float = 5.0
    focal_alpha: float = 0.25


# -- points ----------------------------------------------------------------------------------------------------------


def random_points(num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """Uniform points from the device's generator: the source for training."""
    return torch.rand(num_sets, num_points, 2, device=device)


def fixed_points(num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """The same uniform points at every call and for every set: an evaluation loss that can be repeated."""
    points = torch.rand(1, num_points, 2, generator=torch.Generator().manual_seed(0))
    return points.to(device).expand(num_sets, -1, -1)


def sample_bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """`maps` (N, D, h, w) at `points` (N, P, 2) -> (N, D, P). Beyond the outermost pixel centres the border goes on."""
    return F.grid_sample(maps, 2.0 * points[:, None] - 1.0, padding_mode="border", align_corners=False)[:, :, 0]


def sample_nearest(masks: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """The masks (T, H, W) numbered `rows` (N,), each at its own `points` (N, P, 2) -> float (N, P)."""
    height, width = masks.shape[-2:]
    grid = 2.0 * points - 1.0  # grid_sample's order of rounding, so that ties fall as in the original
    x = (((grid[..., 0] + 1.0) * width - 1.0) / 2.0).round().long().clamp(0, width - 1)
    y = (((grid[..., 1] + 1.0) * height - 1.0) / 2.0).round().long().clamp(0, height - 1)
    return (masks[rows[:, None], y, x] != 0).float()


def uncertain_points(mask_logits: Tensor, num_points: int, points: PointSource) -> Tensor:
    """PointRend's choice for each of N masks: of 3P candidates the 3/4 P nearest the outline, and 1/4 P uniform ones.

    `mask_logits` (N, h, w) -> (N, P, 2).
    """
    candidates = points(len(mask_logits), 3 * num_points, mask_logits.device)
    certainty = sample_bilinear(mask_logits[:, None], candidates)[:, 0].abs()
    nearest = certainty.topk(num_points * 3 // 4, dim=1, largest=False).indices
    chosen = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    uniform = points(len(mask_logits), num_points - nearest.shape[1], mask_logits.device)
    return torch.cat([chosen, uniform], dim=1)


# -- boxes -----------------------------------------------------------------------------------------------------------


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) -> (x0, y0, x1, y1); a negative width or height counts as 0."""
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def iou_and_giou(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU (https://arxiv.org/abs/1902.09630) of corner boxes, broadcast: (..., 4) -> (...)."""
    size = (boxes[..., 2:] - boxes[..., :2]).prod(-1) + (others[..., 2:] - others[..., :2]).prod(-1)
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = size - intersection
    iou = intersection / union.clamp(min=1e-7)
    hull_low = torch.minimum(boxes[..., :2], others[..., :2])
    hull_high = torch.maximum(boxes[..., 2:], others[..., 2:])
    hull = (hull_high - hull_low).prod(-1)
    return iou, iou - (hull - union) / hull.clamp(min=1e-7)


# -- matching --------------------------------------------------------------------------------------------------------


def class_cost(logits: Tensor, alpha: float) -> Tensor:
    """Focal cost (https://arxiv.org/abs/1708.02002, gamma 2) of giving a query the class that `logits` are of."""
    p = logits.sigmoid()
    return alpha * (1 - p) ** 2 * F.softplus(-logits) - (1 - alpha) * p**2 * F.softplus(logits)


def mask_costs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and Dice of every prediction with every target.

    Prediction `logits` (N, P) and target `labels` (T, P) in {0, 1}, at the same points -> two (N, T).
    """
    cross_entropy = F.softplus(logits).mean(-1, keepdim=True) - logits @ labels.T / logits.shape[-1]
    p = logits.sigmoid()
    dice = 1 - (2 * p @ labels.T + 1) / (p.sum(-1, keepdim=True) + labels.sum(-1) + 1)
    return cross_entropy, dice


def matching_cost(stage: StagePrediction, targets: Sequence[Mapping], weights: LossWeights, points: Tensor | None):
    """The cost (G·Q, T) of every pair of query and object, for each image.

    `points` (1, P, 2) are where masks are compared: one set for the whole batch.
    """
    sampled = None
    if stage.masks is not None:
        pixels = sample_bilinear(stage.masks.pixels, points.expand(len(targets), -1, -1))
        vectors, offsets = stage.masks.project(stage.masks.queries)
        sampled = bounded(vectors.float() @ pixels + offsets.float())
    costs = []
    for index, target in enumerate(targets):
        labels, boxes = target["class_labels"], target["boxes"]
        predicted = stage.boxes[index]
        _, giou = iou_and_giou(box_cxcywh_to_xyxy(predicted)[:, None], box_cxcywh_to_xyxy(boxes)[None])
        cost = weights.bbox_cost * torch.cdist(predicted, boxes, p=1)
        cost = cost + weights.class_cost * class_cost(stage.logits[index][:, labels], weights.focal_alpha)
        cost = cost - weights.giou_cost * giou
        if sampled is not None:
            objects = torch.arange(len(labels), device=labels.device)
            truth = sample_nearest(target["masks"], objects, points.expand(len(labels), -1, -1))
            cross_entropy, dice = mask_costs(sampled[index], truth)
            cost = cost + weights.loss_mask_ce * cross_entropy + weights.loss_mask_dice * dice
        costs.append(cost)
    return costs


def assign(cost: Tensor, num_groups: int) -> Pairs:
    """The cheapest one-to-one pairs (https://doi.org/10.1002/nav.3800020109) in each group of queries.

    `cost` (G·Q, T) on the CPU -> query and object indices (G·min(Q, T),), group after group. A cost that is not
    finite counts as more than any other, so that a broken prediction is matched last and never stops the solver.
    """
    finite = torch.isfinite(cost)
    if not finite.all():
        largest = cost[finite].abs().max() if finite.any() else cost.new_zeros(())
        cost = torch.where(finite, cost, 2 * largest + 1)
    num_queries = len(cost) // num_groups
    queries, objects = [], []
    for group, block in enumerate(cost.split(num_queries)):
        rows, columns = linear_sum_assignment(block.numpy())
        queries.append(torch.from_numpy(rows) + group * num_queries)
        objects.append(torch.from_numpy(columns))
    return torch.cat(queries), torch.cat(objects)


@torch.no_grad()
def match(
    stages: Sequence[StagePrediction],
    targets: Sequence[Mapping],
    *,
    num_groups: int,
    weights: LossWeights,
    points: PointSource,
    mask_point_sample_ratio: int,
) -> list[list[Pairs]]:
    """Match each stage with fresh points: for each stage, for each image, the pairs. One transfer to the host."""
    costs = []
    for stage in stages:
        where = None
        if stage.masks is not None:
            height, width = stage.masks.pixels.shape[-2:]
            where = points(1, max(1, height * width // mask_point_sample_ratio), stage.logits.device)
        costs.extend(matching_cost(stage, targets, weights, where))
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    pieces = flat.split([cost.numel() for cost in costs])
    device = stages[0].logits.device
    pairs = [assign(piece.view(cost.shape), num_groups) for piece, cost in zip(pieces, costs, strict=True)]
    pairs = [(queries.to(device), objects.to(device)) for queries, objects in pairs]
    return [pairs[start : start + len(targets)] for start in range(0, len(pairs), len(targets))]


# -- losses of one stage ---------------------------------------------------------------------------------------------


def class_loss(logits: Tensor, where: tuple[Tensor, Tensor, Tensor], iou: Tensor, alpha: float) -> Tensor:
    """IoU-aware binary cross-entropy (https://arxiv.org/abs/2406.03459, equation 1), summed.

    A matched class has the soft target t = max(p^alpha u^(1-alpha), 0.01), u its box's IoU; every other entry is
    pushed to 0 with weight p^2, through which the gradient flows too.

    Args:
        logits: (B, G·Q, C).
        where: Image, query and class of the N matched pairs.
        iou: (N,).
        alpha: Share of the score in the target.
    """
    p = logits.sigmoid()
    matched = logits[where]
    target = (p[where] ** alpha * iou ** (1 - alpha)).clamp(min=0.01).detach()
    positive = F.softplus(-matched) + (1 - target) * matched
    return (p**2 * F.softplus(logits)).index_put(where, positive).sum()


def mask_losses(
    masks: MaskFactors, targets: Sequence[Mapping], pairs: Sequence[Pairs], ratio: int, points: PointSource
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (mean over points) and Dice loss of the matched masks, each summed over the N pairs."""
    height, width = masks.pixels.shape[-2:]
    num_points = max(height, height * width // ratio)
    counts = [len(queries) for queries, _ in pairs]
    images = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(counts)).to(masks.queries.device)
    rows = masks.queries[images, torch.cat([queries for queries, _ in pairs])]
    vectors, offsets = (part.float() for part in masks.project(rows))
    # unbind, because the gradient of an index is a tensor of the whole batch for each of its images.
    matched = [
        torch.einsum("nd,dhw->nhw", of_image, pixels)
        for of_image, pixels in zip(vectors.split(counts), masks.pixels.unbind(), strict=True)
    ]
    logits = torch.cat(matched) + offsets[..., None]
    with torch.no_grad():
        where = uncertain_points(logits, num_points, points)
        truth = torch.cat(
            [
                sample_nearest(target["masks"], objects, some)
                for target, (_, objects), some in zip(targets, pairs, where.split(counts), strict=True)
            ]
        )
    sampled = bounded(sample_bilinear(logits[:, None], where)[:, 0])
    cross_entropy = (F.softplus(sampled) - sampled * truth).mean(-1).sum()
    p = sampled.sigmoid()
    dice = 1 - (2 * (p * truth).sum(-1) + 1) / (p.sum(-1) + truth.sum(-1) + 1)
    return cross_entropy, dice.sum()


def stage_losses(
    stage: StagePrediction,
    targets: Sequence[Mapping],
    pairs: Sequence[Pairs],
    *,
    num_boxes: Tensor,
    weights: LossWeights,
    points: PointSource,
    mask_point_sample_ratio: int,
) -> dict[str, Tensor]:
    """The unweighted losses of one stage, each a scalar divided by `num_boxes`."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
    queries = torch.cat([queries for queries, _ in pairs])
    classes = torch.cat([target["class_labels"][objects] for target, (_, objects) in zip(targets, pairs, strict=True)])
    truth = torch.cat([target["boxes"][objects] for target, (_, objects) in zip(targets, pairs, strict=True)])
    boxes = stage.boxes[images, queries]
    iou, giou = iou_and_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(truth))
    losses = {
        "loss_ce": class_loss(stage.logits, (images, queries, classes), iou.detach(), weights.focal_alpha),
        "loss_bbox": (boxes - truth).abs().sum(),
        "loss_giou": (1 - giou).sum(),
    }
    if stage.masks is not None:
        cross_entropy, dice = mask_losses(stage.masks, targets, pairs, mask_point_sample_ratio, points)
        losses |= {"loss_mask_ce": cross_entropy, "loss_mask_dice": dice}
    return {name: loss / num_boxes for name, loss in losses.items()}


# -- the whole -------------------------------------------------------------------------------------------------------


def count_boxes(targets: Sequence[Mapping], num_groups: int, device: torch.device, across_ranks: bool) -> Tensor:
    """The normaliser of the losses: objects x groups, at least 1; its mean over the ranks if `across_ranks`.

    The mean is a collective, so every rank must ask for it. Evaluation does not: its ranks may run out of batches at
    different times.
    """
    count = torch.tensor(float(sum(len(target["class_labels"]) for target in targets) * num_groups), device=device)
    if across_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1.0)


def read_targets(
    labels: Sequence[Mapping[str, Any]], batch_size: int, num_classes: int, with_masks: bool
) -> list[dict[str, Tensor]]:
    """The fields of the labels that the losses look at, checked.

    Raises:
        ValueError: for targets that cannot be trained on, with image, object and field.
    """
    if len(labels) != batch_size:
        raise ValueError(f"{len(labels)} labels for {batch_size} images; pass one dictionary for each image")
    fields = ["class_labels", "boxes"] + ["masks"] * with_masks
    targets = [
        {field: _read_field(field, target, f"labels[{image}]") for field in fields}
        for image, target in enumerate(labels)
    ]
    for image, target in enumerate(targets):
        counts = {field: len(value) for field, value in target.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"labels[{image}] has fields of different lengths, {counts}; each object needs all of them"
            )
    # One look at the device for the whole batch; the loops below run only to word the error.
    classes = torch.cat([target["class_labels"] for target in targets])
    boxes = torch.cat([target["boxes"] for target in targets])
    if bool(((classes >= 0) & (classes < num_classes)).all() & (boxes.abs() <= 2).all()):
        return targets
    for image, target in enumerate(targets):
        for index, label in enumerate(target["class_labels"].tolist()):
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"labels[{image}]['class_labels'][{index}] is {label}, outside 0 .. {num_classes - 1}; map the "
                    "category ids of the data set to the slots of config.id2label"
                )
        for index, box in enumerate(target["boxes"].tolist()):
            if not all(abs(value) <= 2 for value in box):
                raise ValueError(
                    f"labels[{image}]['boxes'][{index}] is {box}; boxes are (cx, cy, w, h), finite fractions of the "
                    "picture: divide pixels by its width and height"
                )
    return targets


def _read_field(field: str, target: Mapping[str, Any], where: str) -> Tensor:
    if field not in target:
        raise ValueError(
            f"{where} has no {field!r}, only {sorted(target)}; "
            "the image processor makes it (masks with return_segmentation_masks=True)"
        )
    value = target[field]
    rule, fine = {
        "class_labels": ("an integer tensor (T,)", lambda: value.ndim == 1 and (_is_integer(value) or not len(value))),
        "boxes": ("a float tensor (T, 4)", lambda: value.ndim == 2 and value.shape[1] == 4),
        "masks": (
            "a tensor (T, H, W) of bool, or of integers that are 0 outside the object",
            lambda: (
                not len(value)
                or (value.ndim == 3 and 0 not in value.shape and (value.dtype == torch.bool or _is_integer(value)))
            ),
        ),
    }[field]
    if not isinstance(value, Tensor) or not fine():
        kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}[{field!r}] is {kind}; it must be {rule}")
    if field == "class_labels":
        return value.long()
    if field == "boxes":
        return value.float()
    return value if len(value) else value.new_zeros((0, 1, 1))


def _is_integer(value: Tensor) -> bool:
    return value.dtype != torch.bool and not value.is_floating_point() and not value.is_complex()


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
    """RF-DETR's training objective: every stage matched and supervised with the same weights.

    Args:
        stages: Predictions by the suffix of their losses: "" is the last decoder layer, "_0", "_1", ... the ones
            before it, "_enc" the first stage.
        labels: For each image `class_labels` int64 (T,), `boxes` float (T, 4), and for masks `masks` (T, H, W), of any
            size, bool or integers that are 0 outside the object. T may be 0, for one image or for all.
        num_groups: G, the groups that the queries fall into: `group_detr` in training, 1 in evaluation.
        weights: Weights of the costs and losses.
        points: Source of the points at which masks are compared.
        mask_point_sample_ratio: Mask pixels for each point.
        num_boxes: Normaliser of all losses, a positive scalar; by default this batch's objects x groups, see
            [`count_boxes`], of which `across_ranks` takes the mean over all processes.
        across_ranks: see above.

    Returns:
        The weighted sum, a float32 scalar, and a dictionary of detached float32 scalars: the unweighted losses
        `loss_ce`, `loss_bbox`, `loss_giou`, `loss_mask_ce`, `loss_mask_dice` with each suffix; for the last layer
        also `cardinality_error` (mean difference between the number of objects and of queries scored over 0.5) and
        `class_error` (per cent of matched queries whose best class is another); and `non_finite_predictions`, the
        number of queries, over all stages, whose logits, box or mask is NaN or infinite. Where that is not 0 the sum
        is not finite either.

    Raises:
        ValueError: for labels outside the classes, boxes that are no fractions of the picture, fields that are
            missing, of another kind, or out of step.
    """
    last = stages[""]
    targets = read_targets(labels, len(last.logits), last.logits.shape[-1], last.masks is not None)
    device = last.logits.device
    with torch.autocast(device.type, enabled=False):
        if num_boxes is None:
            num_boxes = count_boxes(targets, num_groups, device, across_ranks)
        float_stages = [_in_float32(stage) for stage in stages.values()]
        settings: dict[str, Any] = {
            "weights": weights,
            "points": points,
            "mask_point_sample_ratio": mask_point_sample_ratio,
        }
        all_pairs = match(float_stages, targets, num_groups=num_groups, **settings)
        total = torch.zeros((), device=device)
        loss_dict: dict[str, Tensor] = {}
        for suffix, stage, pairs in zip(stages, float_stages, all_pairs, strict=True):
            losses = stage_losses(stage, targets, pairs, num_boxes=num_boxes, **settings)
            total = total + sum(getattr(weights, name) * loss for name, loss in losses.items())
            total = total + _connection(stage, has_pairs=any(len(queries) for queries, _ in pairs))
            loss_dict |= {name + suffix: loss.detach() for name, loss in losses.items()}
        with torch.no_grad():
            final = list(stages).index("")
            loss_dict |= _statistics(float_stages[final], targets, all_pairs[final])
            broken = sum(_count_non_finite(stage) for stage in stages.values())
            loss_dict["non_finite_predictions"] = broken
    # Unmatched broken predictions must not go unseen: a guard looks at the sum.
    return total.masked_fill(broken > 0, float("nan")), loss_dict


def _in_float32(stage: StagePrediction) -> StagePrediction:
    logits = stage.logits.float().clamp(-_LIMIT, _LIMIT)
    boxes = stage.boxes.float().clamp(-_LIMIT, _LIMIT)
    masks = None if stage.masks is None else stage.masks._replace(pixels=stage.masks.pixels.float())
    return StagePrediction(logits, boxes, masks)


def _connection(stage: StagePrediction, has_pairs: bool) -> Tensor:
    """0 that depends on every prediction, so that a batch or a rank without objects still reaches every parameter."""
    parts = [stage.boxes]
    if stage.masks is not None and not has_pairs:
        parts += [stage.masks.pixels, *stage.masks.project(stage.masks.queries[:, :1])]
    return sum((part * 0).sum() for part in parts)


def _count_non_finite(stage: StagePrediction) -> Tensor:
    broken = ~torch.isfinite(stage.logits).all(-1) | ~torch.isfinite(stage.boxes).all(-1)
    if stage.masks is not None:
        broken = broken | ~torch.isfinite(stage.masks.queries).all(-1)
        broken = broken | ~torch.isfinite(stage.masks.pixels).flatten(1).all(-1, keepdim=True)
    return broken.sum().float()


def _statistics(stage: StagePrediction, targets: Sequence[Mapping], pairs: Sequence[Pairs]) -> dict[str, Tensor]:
    objects = torch.tensor([float(len(target["class_labels"])) for target in targets], device=stage.logits.device)
    confident = (stage.logits.sigmoid().amax(-1) > 0.5).sum(-1)
    right = torch.cat(
        [
            stage.logits[image, queries].argmax(-1) == target["class_labels"][matched]
            for image, (target, (queries, matched)) in enumerate(zip(targets, pairs, strict=True))
        ]
    )
    accuracy = right.float().mean() if len(right) else right.new_zeros((), dtype=torch.float32)
    return {"cardinality_error": (confident - objects).abs().mean(), "class_error": 100 - 100 * accuracy}
