"""Match the detections of a model with the ground truth of each image: outcomes, image quality, confusion matrix.

Axis letters: C classes of the dataset, T IoU thresholds, R recalls, N objects and K detections of an image.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..data.dataset import as_instance_dataset
from ..inference.instances import Instances
from ..inference.predict import DEFAULT_SCORE, WEAK_SCORE
from ..model.masks import box_xyxy_to_xywh
from ..model.validation import require
from .calibration import stored_thresholds
from .coco_evaluator import InstanceSegmentationEvaluator
from .confidence import MatchTable, match_tables
from .evaluation_loop import evaluate_dataset
from .mask_records import Detections, Objects
from .missed_objects import MIN_IOU, Problem, StageRecord, explain_missed, iou_on_grid

_ERRORS = ("other class", "duplicate", "false")  # outcomes of detections


@dataclass
class ImageQuality:
    """The objects and the detections of one image, and how they match.

    A detection with a score above the limit of its class is matched, the best first, with the free object of its class
    with the highest IoU, if that is at least 0.5. Detections that remain and are not inside a crowd region of their
    class are then matched with the remaining objects of other classes. A detection that is left over is a duplicate if
    it has an IoU of at least 0.5 with an object of its class, which another detection has found.

    Attributes:
        index: Index of the image in the dataset.
        name: File name, or the image id if there is none.
        objects: N objects and crowd regions with score 1. An object without a mask, among others with masks, has the
            mask of its box.
        detections: K detections.
        object_outcomes: N times "found", "other class", "missed" or "crowd".
        detection_outcomes: K times "correct", "other class", "duplicate", "false" or "in a crowd".
        matches: (K,) int64, index of the object that each detection is matched with, or -1.
        ious: (K,) float64, IoU of each detection with that object, or 0.
        problems: N times why the object was not found, or that it was found twice; None for the others.
    """

    index: int
    name: str
    objects: Instances
    detections: Instances
    object_outcomes: list[str]
    detection_outcomes: list[str]
    matches: np.ndarray
    ious: np.ndarray
    problems: list[Problem | None]

    @property
    def num_errors(self) -> int:
        """Return the number of objects that were not found and of detections that are not correct."""
        return sum(outcome in ("other class", "missed") for outcome in self.object_outcomes) + sum(
            outcome in _ERRORS for outcome in self.detection_outcomes
        )

    @property
    def quality(self) -> float:
        """Return the panoptic quality in [0, 1].

        It is the sum of the IoUs of the correct detections, divided by their number plus half the number of all errors;
        1 if there is nothing to find and nothing was found.
        """
        is_correct = np.array([outcome == "correct" for outcome in self.detection_outcomes], bool)
        weight = is_correct.sum() + self.num_errors / 2
        return float(self.ious[is_correct].sum() / weight) if weight else 1.0


@dataclass
class Analysis:
    """The results of [`analyse`].

    Attributes:
        metrics: The metrics of [`evaluate_instance_segmentation`].
        class_names: C names.
        curves: Class -> precision (T, R), from [`InstanceSegmentationEvaluator.precision_curves`].
        confusion: (C + 1, C + 1) int64: number of objects of the row's class that were detected as the column's. The
            last column counts missed objects, the last row false and duplicate detections.
        images: All images, the worst first.
        min_scores: Class -> score that a detection must exceed to count in `confusion` and `images`.
        highest_score: Highest score of all detections, or None if there are none.
        score_threshold: Score that a detection must exceed to count in `metrics` and `curves`; None for all, as in
            COCO.
        num_selected: Number of proposals of the first stage that become queries; None if the first stage is unknown,
            as that of an exported file.
        match_tables: Class -> how its detections match, for curves over the score threshold.
        thresholds: Class -> calibrated score threshold, if the model has one.
        thresholds_note: What the thresholds promise.
    """

    metrics: dict[str, Any]
    class_names: list[str]
    curves: dict[str, np.ndarray]
    confusion: np.ndarray
    images: list[ImageQuality]
    min_scores: dict[str, float]
    highest_score: float | None
    score_threshold: float | None = None
    num_selected: int | None = None
    match_tables: dict[str, MatchTable] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    thresholds_note: str | None = None

    @property
    def precision(self) -> float:
        """Return the fraction of the counted detections that are correct; -1 if there are none."""
        num_detections = self.confusion[:, :-1].sum()
        return float(np.trace(self.confusion) / num_detections) if num_detections else -1.0

    @property
    def recall(self) -> float:
        """Return the fraction of the objects that a counted detection has found; -1 if there are none."""
        num_objects = self.confusion[:-1].sum()
        return float(np.trace(self.confusion) / num_objects) if num_objects else -1.0

    @property
    def has_counted(self) -> bool:
        """Return whether any detection counts in `confusion` and `images`."""
        return any(len(image.detections) for image in self.images)

    @property
    def limit(self) -> str:
        """Return the score that a detection must exceed, in words."""
        scores = sorted(set(self.min_scores.values()))
        return f"{scores[0]:g}" if len(scores) == 1 else "the threshold of its class"

    @property
    def num_duplicates(self) -> int:
        """Return the number of counted detections of objects that another detection has found."""
        return sum(image.detection_outcomes.count("duplicate") for image in self.images)


def analyse(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    min_score: float | None = None,
    score_threshold: float | None = None,
    progress: bool = True,
) -> Analysis:
    """Evaluate a model on a dataset, and match its detections with the ground truth of each image.

    Args:
        model: A model for instance segmentation, or for object detection, whose boxes are matched.
        processor: Its image processor.
        dataset: An `InstanceDataset`.
        batch_size: Images per batch.
        min_score: Score in [0, 1] that a detection must exceed to be matched with the objects of its image; by default
            the calibrated threshold of its class, or 0.5 where there is none.
        score_threshold: Score that a detection must exceed to count in `metrics` and `curves`; by default all count, as
            in COCO.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: the model does not know a category of the dataset, or `min_score` is outside [0, 1].
    """
    require(min_score is None or 0 <= min_score <= 1, "min_score", min_score, "in [0, 1]")
    dataset = as_instance_dataset(dataset)
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    stages = StageRecord()
    evaluator = evaluate_dataset(model, processor, dataset, score_threshold=score_threshold, stages=stages, **settings)
    scores: dict[str, Any] = {"min_score": min_score, "score_threshold": score_threshold}
    return analyse_evaluation(evaluator, dataset, model.config, stages=stages, **scores)


def analyse_evaluation(
    evaluator: InstanceSegmentationEvaluator,
    dataset: Any,
    config: Any,
    *,
    min_score: float | None = None,
    score_threshold: float | None = None,
    stages: StageRecord | None = None,
) -> Analysis:
    """Return the analysis of an evaluator with the detections in all images of a dataset, as [`analyse`] does.

    `config` is the model's configuration, from which calibrated score thresholds are read. `stages` are those that
    [`evaluate_dataset`] recorded; without them, missed objects that the first stage and the decoder have lost are not
    told apart.
    """
    stages = stages or StageRecord()
    ground_truth, detections = evaluator.ground_truth, evaluator.state()
    thresholds = stored_thresholds(config, dataset, evaluator)
    floor = score_threshold or 0.0
    min_scores = {
        category: max(floor, thresholds.get(name, DEFAULT_SCORE) if min_score is None else min_score)
        for category, name in ground_truth.category_names.items()
    }
    images = []
    image_names = dataset.names_of(list(ground_truth.sizes))
    for index, (image_id, name) in enumerate(zip(ground_truth.sizes, image_names, strict=True)):
        record, found = ground_truth.objects_of(image_id), detections[image_id]
        is_strong = found.scores > np.array([min_scores[category] for category in found.labels.tolist()])
        indices = np.flatnonzero(is_strong)
        objects = to_instances(record, np.arange(len(record.labels)), image_id, evaluator)
        strong = to_instances(found, indices, image_id, evaluator)
        image = match_image(index, name, objects, record.is_crowd, strong)
        if "missed" in image.object_outcomes:
            weak = np.flatnonzero(~is_strong & (found.scores > WEAK_SCORE))
            unmatched = np.concatenate([indices[image.matches < 0], weak])
            _explain(image, to_instances(found, unmatched, image_id, evaluator), is_strong[unmatched], stages, image_id)
        images.append(image)
    images.sort(key=lambda image: (image.quality, -image.num_errors))
    return Analysis(
        evaluator.compute(),
        list(ground_truth.category_names.values()),
        evaluator.precision_curves(),
        confusion_matrix(images, len(ground_truth.category_names)),
        images,
        {name: min_scores[category] for category, name in ground_truth.category_names.items()},
        evaluator.highest_score,
        score_threshold,
        stages.num_selected or None,
        match_tables(evaluator),
        thresholds,
        getattr(config, "score_thresholds_note", None),
    )


def to_instances(
    record: Objects | Detections, indices: np.ndarray, image_id: int, evaluator: InstanceSegmentationEvaluator
) -> Instances:
    """Return the objects or detections at `indices` of an image; objects have score 1."""
    categories, size = evaluator.ground_truth.category_names, evaluator.ground_truth.sizes[image_id]
    scores = record.scores[indices] if isinstance(record, Detections) else np.ones(len(indices))
    category_ids, boxes = record.labels[indices].tolist(), record.boxes[indices]
    masks = None
    if evaluator.has_masks:
        rles = [{"counts": b""}] * len(indices) if record.masks is None else record.masks.rles(indices)
        of_boxes = coco_mask.frPyObjects(boxes, *size) if len(boxes) else []
        counts = [(rle if rle["counts"] else box)["counts"] for rle, box in zip(rles, of_boxes, strict=True)]
        masks = [{"size": list(size), "counts": text.decode()} for text in counts]
    label_of = {category: label for label, category in enumerate(categories)}
    return Instances(
        np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32),
        scores.astype(np.float32),
        np.array([label_of[category] for category in category_ids], np.int64),
        [categories[category] for category in category_ids],
        masks,
        size,
    )


def match_image(index: int, name: str, objects: Instances, is_crowd: np.ndarray, detections: Instances) -> ImageQuality:
    """Match the detections of an image, the best first, with its N objects; `is_crowd` is (N,) bool."""
    ious = pairwise_ious(detections, objects, is_crowd)
    same_class = detections.labels[:, None] == objects.labels
    matches, in_crowd = _match(ious, same_class, is_crowd)
    object_outcomes = ["crowd" if crowd else "missed" for crowd in is_crowd]
    ious_of_class = ious * (same_class & ~is_crowd)
    is_duplicate = ious_of_class.max(1, initial=0) >= MIN_IOU
    detection_outcomes = [
        "in a crowd" if crowd else "duplicate" if duplicate else "false"
        for crowd, duplicate in zip(in_crowd, is_duplicate, strict=True)
    ]
    matched_ious = np.zeros(len(detections))
    for detection in np.flatnonzero(matches >= 0):
        matched = matches[detection]
        is_correct = same_class[detection, matched]
        object_outcomes[matched] = "found" if is_correct else "other class"
        detection_outcomes[detection] = "correct" if is_correct else "other class"
        matched_ious[detection] = ious[detection, matched]
    problems: list[Problem | None] = [None] * len(objects)
    for number in reversed(range(len(detections))):  # of several duplicates the best one is kept
        if detection_outcomes[number] == "duplicate":
            twice = int(ious_of_class[number].argmax())
            problems[twice] = Problem("found twice", None, detections.select([number]))
        elif detection_outcomes[number] == "other class":
            problems[matches[number]] = Problem("other class", None, detections.select([number]))
    return ImageQuality(
        index, name, objects, detections, object_outcomes, detection_outcomes, matches, matched_ious, problems
    )


def _explain(
    image: ImageQuality, unmatched: Instances, is_strong: np.ndarray, stages: StageRecord, image_id: int
) -> None:
    """Set the problems of the missed objects of an image, from its unmatched detections with a score above 0.1."""
    objects = image.objects
    is_crowd = np.array([outcome == "crowd" for outcome in image.object_outcomes])
    of_class = (unmatched.labels[:, None] == objects.labels) & ~is_crowd
    ious = pairwise_ious(unmatched, objects, is_crowd) * of_class
    box_ious = _pairwise_box_ious(unmatched, objects, is_crowd) * of_class
    ranks = stages.proposal_ranks.get(image_id)
    reasons = explain_missed(ious, box_ious, unmatched.scores, is_strong, ranks, stages.num_selected)
    for index, (reason, detection) in enumerate(reasons):
        if image.object_outcomes[index] != "missed":
            continue
        value = None
        if reason == "proposal not selected":
            value = float(ranks[index])
        elif reason == "below the threshold":
            value = float(unmatched.scores[detection])
        elif reason == "inaccurate box":
            value = float(box_ious[detection, index])
        elif reason == "wrong mask":
            value = float(ious[detection, index])
            if image_id in stages.mask_grids:
                on_grid = iou_on_grid(objects.masks[index], stages.mask_grids[image_id])
                reason, value = ("mask grid too coarse", on_grid) if on_grid < MIN_IOU else (reason, value)
        image.problems[index] = Problem(reason, value, None if detection < 0 else unmatched.select([detection]))


def pairwise_ious(detections: Instances, objects: Instances, is_crowd: np.ndarray) -> np.ndarray:
    """Return IoUs (K, N) float64 of masks, or of boxes without masks; with a crowd region, the share inside it."""
    if not len(detections) or not len(objects):
        return np.zeros((len(detections), len(objects)))
    if detections.masks is not None and objects.masks is not None:
        return coco_mask.iou(detections.masks, objects.masks, is_crowd.tolist())
    return _pairwise_box_ious(detections, objects, is_crowd)


def _pairwise_box_ious(detections: Instances, objects: Instances, is_crowd: np.ndarray) -> np.ndarray:
    if not len(detections) or not len(objects):
        return np.zeros((len(detections), len(objects)))
    boxes_xywh = [box_xyxy_to_xywh(one.boxes.astype(np.float64)) for one in (detections, objects)]
    return coco_mask.iou(*boxes_xywh, is_crowd.tolist())


def _match(ious: np.ndarray, same_class: np.ndarray, is_crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match K detections with N objects.

    ious (K, N)   same_class (K, N)   is_crowd (N,)   ->   index of the matched object or -1 (K,), in a crowd (K,)
    """
    matches: np.ndarray = np.full(len(ious), -1)
    in_crowd = (ious * (same_class & is_crowd)).max(1, initial=0) >= MIN_IOU
    is_free = ~is_crowd
    for allowed in (same_class, ~in_crowd[:, None] & ~same_class):
        for detection in np.flatnonzero(matches < 0):
            free_ious = ious[detection] * (allowed[detection] & is_free)
            if free_ious.max(initial=0) >= MIN_IOU:
                matches[detection] = best = free_ious.argmax()
                is_free[best] = False
    return matches, in_crowd & (matches < 0)


def confusion_matrix(images: Iterable[ImageQuality], num_classes: int) -> np.ndarray:
    """Return (C + 1, C + 1) int64, described at [`Analysis`]."""
    counts: np.ndarray = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for image in images:
        for label, outcome in zip(image.objects.labels, image.object_outcomes, strict=True):
            counts[label, -1] += outcome == "missed"
        for label, outcome, matched in zip(
            image.detections.labels, image.detection_outcomes, image.matches, strict=True
        ):
            if matched >= 0:
                counts[image.objects.labels[matched], label] += 1
            else:
                counts[-1, label] += outcome in ("duplicate", "false")
    return counts
