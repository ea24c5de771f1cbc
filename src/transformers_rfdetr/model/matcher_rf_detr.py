"""Match queries to objects one to one (DETR, https://arxiv.org/abs/2005.12872), each query group on its own.

Axis letters: B images, G groups, Q queries of a group, C classes, T objects of an image, P points, D width, h w mask
grid. In training every object is matched once in each group (Group DETR, https://arxiv.org/abs/2207.13085); evaluation
has one group. Everything is float32.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .boxes_rf_detr import box_cxcywh_to_xyxy, iou_and_giou
from .mask_points_rf_detr import PointSource, sample_bilinear, sample_nearest
from .predictions_rf_detr import MaskFactors, StagePrediction

try:  # optional
    from torch_linear_assignment import batch_linear_assignment
except ImportError:
    batch_linear_assignment = None

# (query indices, object indices) of the matched pairs of one image.
Pairs = tuple[Tensor, Tensor]

# Logits and coordinates are clamped to this limit before the formulas, so that every finite prediction, bfloat16's 3e38
# included, has a finite loss. No image has a box a million times its size.
LIMIT = 1e6
# Number of problems, images x groups x stages of a step, from which torch-linear-assignment takes less time than SciPy:
# with 300 queries on an L4, 208 problems take half of it and 624 a sixth (rfdetr 1.11.2, models/_assignment.py).
MIN_PROBLEMS_ON_GPU = 200


class LossWeights(NamedTuple):
    """Weights of the matching cost and of the losses; the mask terms have the same weights in both."""

    class_cost: float = 2.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0
    loss_ce: float = 1.0
    loss_bbox: float = 5.0
    loss_giou: float = 2.0
    loss_mask_ce: float = 5.0
    loss_mask_dice: float = 5.0
    focal_alpha: float = 0.25


def clamp_to_limit(x: Tensor) -> Tensor:
    """Clamp a product of finite factors; where it overflowed to inf - inf, return 0."""
    return torch.nan_to_num(x, 0.0, LIMIT, -LIMIT).clamp(-LIMIT, LIMIT)


def class_cost(logits: Tensor, alpha: float) -> Tensor:
    """Return the focal cost (https://arxiv.org/abs/1708.02002, gamma 2) of predicting the class of each logit."""
    p = logits.sigmoid()
    return alpha * (1 - p) ** 2 * F.softplus(-logits) - (1 - alpha) * p**2 * F.softplus(logits)


def mask_costs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean cross-entropy and Dice cost of every query with every object, compared at the same points.

    Mask logits (G·Q, P) and labels in {0, 1} (T, P) -> two (G·Q, T).
    """
    cross_entropy = F.softplus(logits).mean(-1, keepdim=True) - logits @ labels.T / logits.shape[-1]
    p = logits.sigmoid()
    dice = 1 - (2 * p @ labels.T + 1) / (p.sum(-1, keepdim=True) + labels.sum(-1) + 1)
    return cross_entropy, dice


def sample_masks(masks: MaskFactors, points: Tensor) -> Tensor:
    """Return the mask logits of all queries at points (1, P, 2), without dense masks: -> (B, G·Q, P)."""
    pixels = sample_bilinear(masks.pixels, points.expand(len(masks.pixels), -1, -1))
    vectors, offsets = masks.project(masks.queries)
    return clamp_to_limit(vectors.float() @ pixels + offsets.float())


def matching_costs(
    stage: StagePrediction, targets: Sequence[Mapping], weights: LossWeights, points: Tensor | None
) -> list[Tensor]:
    """Return the cost of every pair of query and object, (G·Q, T) for each image; `points` are those of the masks."""
    sampled = None if stage.masks is None else sample_masks(stage.masks, points)
    costs = []
    for image, target in enumerate(targets):
        labels, boxes, predicted = target["class_labels"], target["boxes"], stage.boxes[image]
        _, giou = iou_and_giou(box_cxcywh_to_xyxy(predicted)[:, None], box_cxcywh_to_xyxy(boxes)[None])
        cost = weights.bbox_cost * torch.cdist(predicted, boxes, p=1)
        cost = cost + weights.class_cost * class_cost(stage.logits[image][:, labels], weights.focal_alpha)
        cost = cost - weights.giou_cost * giou
        if sampled is not None:
            objects = torch.arange(len(labels), device=labels.device)
            target_labels = sample_nearest(target["masks"], objects, points.expand(len(labels), -1, -1))
            cross_entropy, dice = mask_costs(sampled[image], target_labels)
            mask_cost = weights.loss_mask_ce * cross_entropy + weights.loss_mask_dice * dice
            if "has_mask" in target:
                mask_cost = mask_cost * target["has_mask"]
            cost = cost + mask_cost
        costs.append(cost)
    return costs


def finite_costs(costs: Tensor) -> Tensor:
    """Replace costs that are not finite by one above all others of the same image and stage, the last two dimensions.

    So a broken prediction is matched last and does not stop the solver.
    """
    finite = torch.isfinite(costs)
    largest = costs.abs().where(finite, 0).amax((-2, -1), keepdim=True)
    return costs.where(finite, 2 * largest + 1)


def assign(cost: Tensor, num_groups: int) -> Pairs:
    """Find the cheapest one-to-one pairs in each group (https://doi.org/10.1002/nav.3800020109).

    `cost` (G·Q, T) on the CPU -> query and object indices, (G·min(Q, T),) each, group after group.
    """
    if not torch.isfinite(cost).all():
        cost = finite_costs(cost)
    num_queries = len(cost) // num_groups
    queries, objects = [], []
    for group, block in enumerate(cost.split(num_queries)):
        rows, columns = linear_sum_assignment(block.numpy())
        queries.append(torch.from_numpy(rows) + group * num_queries)
        objects.append(torch.from_numpy(columns))
    return torch.cat(queries), torch.cat(objects)


def is_assigned_on_gpu(costs: Sequence[Tensor], num_groups: int) -> bool:
    """Return whether [`assign_together`] can assign these costs, and takes less time than [`assign`]."""
    is_possible = batch_linear_assignment is not None and costs[0].is_cuda
    most = max(cost.shape[1] for cost in costs)
    has_queries_for_all = 0 < most <= len(costs[0]) // num_groups
    return is_possible and has_queries_for_all and len(costs) * num_groups >= MIN_PROBLEMS_ON_GPU


def assign_together(costs: Sequence[Tensor], num_groups: int) -> list[Pairs]:
    """Find the pairs of [`assign`] for all costs at once, on their device, with torch-linear-assignment.

    `costs` (G·Q, T) each, T at least 1 in one of them and at most Q. The others get more objects, which cost 0 with
    every query. The pairs have another order, and are others where the cheapest ones are not unique.
    """
    padded = finite_costs(pad_sequence([cost.T for cost in costs], batch_first=True))
    problems = padded.unflatten(2, (num_groups, -1)).transpose(1, 2)  # (images x stages, G, T, Q)
    queries = batch_linear_assignment(problems.flatten(0, 1)).view(problems.shape[:3])
    queries = queries + problems.shape[3] * torch.arange(num_groups, device=queries.device)[:, None]
    objects = torch.arange(problems.shape[2], device=queries.device).expand_as(queries)
    sizes = [cost.shape[1] for cost in costs]
    return [(queries[one, :, :size].flatten(), objects[one, :, :size].flatten()) for one, size in enumerate(sizes)]


@torch.no_grad()
def match(
    stages: Mapping[str, StagePrediction],
    targets: Sequence[Mapping],
    *,
    num_groups: int,
    weights: LossWeights,
    points: PointSource,
    mask_point_sample_ratio: int,
) -> dict[str, list[Pairs]]:
    """Return the pairs of each image, for each stage.

    All masks of a stage are compared at one new set of points. The costs are moved to the CPU together, once, or
    assigned on the GPU.
    """
    costs = []
    for stage in stages.values():
        stage_points = None
        if stage.masks is not None:
            height, width = stage.masks.pixels.shape[-2:]
            stage_points = points(1, max(1, height * width // mask_point_sample_ratio), stage.logits.device)
        costs.extend(matching_costs(stage, targets, weights, stage_points))
    if is_assigned_on_gpu(costs, num_groups):
        pairs = assign_together(costs, num_groups)
    else:
        on_cpu = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
        device = costs[0].device
        pairs = [assign(flat.view(cost.shape), num_groups) for flat, cost in zip(on_cpu, costs, strict=True)]
        pairs = [(queries.to(device), objects.to(device)) for queries, objects in pairs]
    return {suffix: pairs[index * len(targets) :][: len(targets)] for index, suffix in enumerate(stages)}
