"""Say why an object was missed: which stage of the model lost it.

Axis letters: N objects and K detections of an image, S tokens of the first stage, h w mask grid. Sizes are (height,
width).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from ..inference.instances import Instances
from ..model.masks import region_to_rle, upsample_masks
from ..model.modeling_rf_detr import RfDetrForObjectDetection
from ..model.post_processing_rf_detr import valid_size
from .ground_truth import GroundTruth

MIN_IOU = 0.5  # of a detection, or of a box of the first stage, and an object
_MIN_PARTIAL_IOU = 0.1  # as in TIDE (https://arxiv.org/abs/2008.08115)

# Why an object was not found, or was found twice, in the order of the stages.
REASONS = (
    "no proposal",
    "proposal not selected",
    "lost in the decoder",
    "not detected",
    "below the threshold",
    "other class",
    "inaccurate box",
    "wrong mask",
    "mask grid too coarse",
    "found twice",
)


class Problem(NamedTuple):
    """What was wrong with one object.

    Attributes:
        reason: One of `REASONS`.
        value: Rank of the best proposal near it, from 0, for "proposal not selected"; score of the detection for
            "below the threshold"; IoU of the masks, or of the boxes, for "wrong mask" and "inaccurate box"; IoU of the
            object with itself on the mask grid for "mask grid too coarse".
        detection: The detection that shows it, if there is one.
    """

    reason: str
    value: float | None = None
    detection: Instances | None = None

    @property
    def detail(self) -> str:
        """Return the value in words, or the class of the detection for "other class"; empty if there is none."""
        if self.reason == "other class" and self.detection is not None:
            return f"found as {self.detection.names[0]}"
        if self.value is None:
            return ""
        if self.reason == "proposal not selected":
            return f"number {self.value + 1:.0f} by score"
        return f"{'score' if self.reason == 'below the threshold' else 'IoU'} {self.value:.2f}"

    def __str__(self) -> str:
        return f"{self.reason}, {self.detail}" if self.detail else self.reason


# What only the model knows, collected while it runs


class StageRecord:
    """What the stages of a model made of the objects of each image; [`evaluate_dataset`] fills it.

    Attributes:
        proposal_ranks: Image id -> (N,) int64; see [`proposal_ranks`]. Empty for models that are not PyTorch models of
            this package, such as exported files: only their results are known.
        mask_grids: Image id -> rows and columns of the mask grid that the image covers. Empty without masks.
        num_selected: Number of proposals that become queries.
    """

    def __init__(self) -> None:
        self.proposal_ranks: dict[int, np.ndarray] = {}
        self.mask_grids: dict[int, tuple[float, float]] = {}
        self.num_selected = 0
        self._levels: list[torch.Tensor] = []

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Return the outputs of a model, and keep the features that `add` needs."""
        if not isinstance(model, RfDetrForObjectDetection):
            return model(**inputs)
        with model.backbone[0].register_forward_hook(self._keep):
            return model(**inputs)

    def _keep(self, module: torch.nn.Module, inputs: Any, levels: list[torch.Tensor]) -> None:
        self._levels = levels

    @torch.no_grad()
    def add(
        self, model: Any, ground_truth: GroundTruth, image_ids: Sequence[int], inputs: Mapping[str, Any], outputs: Any
    ) -> None:
        """Add the images of the last `run`, from its inputs and outputs."""
        pixel_mask = inputs.get("pixel_mask")
        if getattr(outputs, "pred_masks", None) is not None:
            grid = tuple(outputs.pred_masks.shape[-2:])
            for index, image_id in enumerate(image_ids):
                self.mask_grids[image_id] = grid if pixel_mask is None else valid_size(pixel_mask[index], grid)
        if not self._levels:
            return
        self.num_selected = outputs.enc_indices.shape[1]
        logits, boxes = model.all_proposals(self._levels, pixel_mask)
        self._levels = []
        scores = logits.amax(-1).float().numpy(force=True)
        center, extent = boxes.float().split(2, dim=-1)
        boxes_xywh = torch.cat([center - extent / 2, extent], dim=-1).double().numpy(force=True)
        for index, image_id in enumerate(image_ids):
            height, width = ground_truth.sizes[image_id]
            pixels = boxes_xywh[index] * (width, height, width, height)
            objects = ground_truth.objects_of(image_id).boxes
            self.proposal_ranks[image_id] = proposal_ranks(objects, pixels, scores[index])


def proposal_ranks(objects_xywh: np.ndarray, boxes_xywh: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return for each object how many boxes of the first stage score higher than the best one near it.

    objects (N, 4)   boxes (S, 4)   scores (S,)   ->   (N,) int64, 0 for the best box; -1 if no box has an IoU of at
    least 0.5 with the object
    """
    if not len(objects_xywh):
        return np.empty(0, np.int64)
    is_near = coco_mask.iou(boxes_xywh, objects_xywh, [0] * len(objects_xywh)) >= MIN_IOU
    is_near = is_near[np.argsort(-scores, kind="stable")]
    return np.where(is_near.any(0), is_near.argmax(0), -1)


def iou_on_grid(mask: dict[str, Any], grid: tuple[float, float]) -> float:
    """Return the IoU of a mask, as RLE, with itself after it was stored on the mask grid and upsampled again.

    A cell of the grid (rows, columns) holds the share of its pixels that belong to the object.
    """
    size = (mask["size"][0], mask["size"][1])
    pixels = torch.from_numpy(coco_mask.decode(mask))[None, None].float()
    cells = F.interpolate(pixels, [max(1, round(side)) for side in grid], mode="area")
    [region] = upsample_masks(cells[0], size, 0.5)
    return float(coco_mask.iou([mask], [region_to_rle(*region, size)], [0])[0, 0])


# The decision


def explain_missed(
    ious: np.ndarray,
    box_ious: np.ndarray,
    scores: np.ndarray,
    is_strong: np.ndarray,
    ranks: np.ndarray | None,
    limit: int,
) -> list[tuple[str, int]]:
    """Return for each object the reason why it was missed, if it was, and the detection that shows it, or -1.

    A detection belongs to the object that it overlaps most. If an object has one with an IoU of at least 0.5, only its
    score was too low. Otherwise, if it has one whose box has an IoU of at least 0.5, the mask is wrong. Otherwise, if
    it has a strong one whose box has an IoU of at least 0.1, the box is inaccurate. Without any, the first stage tells
    whether it had proposed the object.

    Args:
        ious: (K, N) of the detections with a score above 0.1 that match no object, and all objects; 0 where the classes
            differ.
        box_ious: (K, N), the same of their boxes.
        scores: (K,).
        is_strong: (K,) bool, whether the score exceeds that of the class.
        ranks: (N,), from [`proposal_ranks`]; None if they are unknown.
        limit: Number of proposals that are selected.
    """
    is_accurate = ious.max(1, initial=0) >= MIN_IOU
    # With an additional column, so that a detection without any overlap belongs to no object.
    nearest, nearest_box = (np.pad(values, ((0, 0), (1, 0))).argmax(1) - 1 for values in (ious, box_ious))
    best_box_iou = box_ious.max(1, initial=0)
    reasons = []
    for index in range(ious.shape[1]):
        is_box_near = ~is_accurate & (nearest_box == index)
        evidence = {
            "below the threshold": is_accurate & (nearest == index),
            "wrong mask": is_box_near & (best_box_iou >= MIN_IOU),
            "inaccurate box": is_box_near & (best_box_iou >= _MIN_PARTIAL_IOU) & is_strong,
        }
        shown = [(reason, int((scores * is_shown).argmax())) for reason, is_shown in evidence.items() if is_shown.any()]
        reasons.append(shown[0] if shown else (_lost_before_detection(ranks, index, limit), -1))
    return reasons


def _lost_before_detection(ranks: np.ndarray | None, index: int, limit: int) -> str:
    if ranks is None:
        return "not detected"
    rank = ranks[index]
    return "no proposal" if rank < 0 else "proposal not selected" if rank >= limit else "lost in the decoder"


def size_indices(areas: np.ndarray) -> np.ndarray:
    """Return COCO's size of areas (N,) in pixels: 0 for small, below 32², 1 for medium, below 96², 2 for large."""
    return np.digitize(areas, [32**2, 96**2])


def count_reasons(
    problems: Sequence[Problem | None], labels: np.ndarray, areas: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    """Return reason -> (C, 3) int64, the objects of each class and of each of COCO's sizes.

    Args:
        problems: One for each of N objects, or None.
        labels: (N,).
        areas: (N,) pixels; see [`size_indices`].
        num_classes: C.

    Returns:
        The reasons that occur, in the order of `REASONS`.
    """
    counts: dict[str, np.ndarray] = {reason: np.zeros((num_classes, 3), np.int64) for reason in REASONS}
    for problem, label, size in zip(problems, labels, size_indices(areas), strict=True):
        if problem is not None:
            counts[problem.reason][label, size] += 1
    return {reason: table for reason, table in counts.items() if table.any()}
