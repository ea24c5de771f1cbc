"""Choose a score threshold for each class: the best F1, or a recall or precision that is promised with confidence.

Detections are matched at IoU 0.5 as COCO does it: by mask, or by box without masks. A match does not depend on
detections with lower scores, so one matching gives the numbers at every threshold. As in COCO, the best 100 detections
of a class in an image count, of [`predict`] on whole images: tiles and tracks may reach more or less.

A promise is about the mean over images, of which each counts the same: recall is the mean share of an image's objects
that are found, over the images with an object; precision is the mean share of an image's detections that match an
object, over the images with a detection. The images must be drawn like those that the model will see, one independently
of the other; the objects of an image may depend on each other. Then, for each class by itself, the promise is broken by
the images to come after at most a fraction 1 - confidence of all calibrations: see [`holds_with_confidence`] for one
threshold, and fixed-sequence testing (https://arxiv.org/abs/2110.01052, section 2.2) for the choice among all. This is
the high-probability form (https://arxiv.org/abs/2101.02703) of conformal risk control
(https://arxiv.org/abs/2208.02814), which bounds the expectation.

`benchmarks/promises.py` compares other bounds by simulation: those that count objects, not images, break the promise in
more calibrations than stated, and Hoeffding and Bentkus' bound gives it more rarely.

Axis letters: N images, D detections of a class in all images, best first, L thresholds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..atomic_files import write_text
from ..data.dataset import as_instance_dataset
from ..model.validation import require
from .confidence import MatchTable, match_tables
from .evaluation_loop import evaluate_dataset, label_to_category_id
from .score_curves import AT_50, THRESHOLDS, num_above_thresholds, score_curves

_FIELDS = ("score_thresholds", "score_thresholds_note")  # of a configuration
_MAX_BET = 0.75  # of the capital; 0.5 and 0.75 are usual
_SEED = 0  # of the order in which images are bet on


def holds_with_confidence(shares: np.ndarray, target: float, confidence: float) -> bool:
    """Return whether the mean of a distribution is above `target`, judged by independent draws from it.

    For a mean of at most `target`, the answer is True with a probability of at most 1 - `confidence`, whatever the
    distribution. A bet on each draw in turn multiplies the capital by 1 + bet (share - target). The capital cannot be
    expected to grow if the mean is at most `target`, and reaches 1 / (1 - confidence) with at most that probability
    (https://arxiv.org/abs/2010.09686, theorem 3, with the bets of section 4.2).

    Args:
        shares: (n,) values in [0, 1], in random order.
        target: In (0, 1).
        confidence: In (0, 1).
    """
    log_goal = -math.log(1 - confidence)
    gains, counts = shares - target, np.arange(1, len(shares) + 1)
    # A bet depends on earlier draws only: on the sum of their squared deviations from the mean of those before.
    means = np.append(0, np.cumsum(gains)[:-1]) / counts
    variances = (0.25 + np.append(0, np.cumsum((gains - means) ** 2)[:-1])) / counts
    bets = np.minimum(np.sqrt(2 * log_goal / (variances * len(shares))), _MAX_BET / target)
    return bool(np.cumsum(np.log1p(bets * gains)).max(initial=0) >= log_goal)


def promised_recall(table: MatchTable, recall: float, confidence: float) -> float | None:
    """Return the highest threshold above which a recall can be promised, or None if there is none.

    Thresholds are tested in ascending order, until one fails: recall falls with the threshold.
    """
    promised, of_all, table = None, score_curves(table).recall, _shuffle_images(table)
    has_object = table.num_objects > 0
    for index, num_kept in enumerate(num_above_thresholds(table)):
        found, _ = _count_by_image(table, num_kept)
        shares = found[has_object] / table.num_objects[has_object]
        if not (of_all[index] >= recall and holds_with_confidence(shares, recall, confidence)):
            break
        promised = float(THRESHOLDS[index])
    return promised


def promised_precision(table: MatchTable, precision: float, confidence: float) -> float | None:
    """Return the lowest threshold above which a precision can be promised, or None if there is none.

    Thresholds are tested in descending order, until one fails: precision usually grows with the threshold. The first
    is the highest one above which as many images have a detection as half of the images with an object, or so many
    more that they can be sufficient. This looks at the scores only, not at the matches.
    """
    promised, of_all, num_kept = None, score_curves(table).precision, num_above_thresholds(table)
    table = _shuffle_images(table)
    for index in range(_first_tested(table, precision, confidence), -1, -1):
        found, counted = _count_by_image(table, int(num_kept[index]))
        shares = found[counted > 0] / counted[counted > 0]
        if not (of_all[index] >= precision and holds_with_confidence(shares, precision, confidence)):
            break
        promised = float(THRESHOLDS[index])
    return promised


def _first_tested(table: MatchTable, precision: float, confidence: float) -> int:
    """Return the index of the first threshold of [`promised_precision`], -1 if there are too few images."""
    num_images = float(np.count_nonzero(table.num_objects))
    sufficient = 2 * math.log(1 - confidence) / math.log(precision)  # half of them, if all detections match
    needed = max(1, math.ceil(min(num_images, max(num_images / 2, sufficient))))
    is_counted = ~table.is_ignored[AT_50]
    _, first = np.unique(table.images[is_counted], return_index=True)
    highest = np.sort(table.scores[is_counted][first])[::-1]  # of each image
    return int(np.searchsorted(THRESHOLDS, highest[needed - 1])) - 1 if len(highest) >= needed else -1


def _count_by_image(table: MatchTable, num_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of the best detections match an object, and how many are counted, in each image (N,)."""
    images, num_images = table.images[:num_kept], len(table.num_objects)
    found = np.bincount(images[table.is_match[AT_50, :num_kept]], minlength=num_images)
    return found, np.bincount(images[~table.is_ignored[AT_50, :num_kept]], minlength=num_images)


def _shuffle_images(table: MatchTable) -> MatchTable:
    """Return the table with its images in an order that does not depend on the dataset's."""
    order = np.random.default_rng(_SEED).permutation(len(table.num_objects))
    return table._replace(num_objects=table.num_objects[order], images=np.argsort(order)[table.images])


class ClassThreshold(NamedTuple):
    """The score threshold of a class, and what it reaches on the calibration images, counted over all of them."""

    threshold: float | None  # None without an object or a match
    num_objects: int
    precision: float  # NaN without a detection or an object
    recall: float
    f1: float
    problem: str = ""  # why nothing is promised although it was wanted


@dataclass(frozen=True)
class Calibration:
    """The score thresholds of a model.

    Attributes:
        goal: "F1", "recall" or "precision".
        target: Wanted recall or precision; None for F1.
        confidence: Confidence of the promise; None for F1.
        num_images: Number of calibration images.
        is_of_masks: Whether masks were matched, not boxes.
        classes: Class name -> its threshold. Where the wanted promise cannot be given, the threshold is that of F1.
    """

    goal: str
    target: float | None
    confidence: float | None
    num_images: int
    is_of_masks: bool
    classes: dict[str, ClassThreshold]

    @property
    def note(self) -> str:
        """Return what the thresholds promise, in one line of text."""
        kind = "masks" if self.is_of_masks else "boxes"
        source = f"calibrated on {self.num_images} images, {kind} at IoU 0.5"
        if self.goal == "F1":
            return f"highest F1, {source}"
        unit = "objects are found" if self.goal == "recall" else "detections match an object"
        known = {name: one for name, one in self.classes.items() if one.threshold is not None}
        without = [name for name, one in known.items() if one.problem]
        if len(without) == len(known):
            return f"highest F1, because the {self.goal} cannot be promised for any class; {source}"
        text = (
            f"for each class, with {100 * self.confidence:g} % confidence, on average over images at least"
            f" {100 * self.target:g} % of its {unit}; {source}"
        )
        return f"{text}; nothing is promised, and F1 is highest, for {', '.join(without)}" if without else text

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        classes = {
            name: {key: None if value != value else value for key, value in one._asdict().items()}
            for name, one in self.classes.items()
        }
        return {"goal": self.goal, "target": self.target, "confidence": self.confidence, "classes": classes}


def calibrate(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    recall: float | None = None,
    precision: float | None = None,
    confidence: float = 0.95,
    batch_size: int = 8,
    progress: bool = True,
) -> Calibration:
    """Choose a score threshold for each class of a model, and store them in its configuration.

    `predict(threshold="calibrated")` uses them, and `model.save_pretrained` saves them. Training discards them, and so
    does loading with other classes. By default a threshold has the highest F1. With `recall` it is the highest one,
    with `precision` the lowest one, above which this recall or precision can be promised; the docstring of this module
    says what a promise is.

    Example:
        >>> model, processor = transformers_rfdetr.load("rf-detr-seg-tiny")  # doctest: +SKIP
        >>> calibrate(model, processor, data["validation"], recall=0.9).classes["car"].threshold  # doctest: +SKIP

    Args:
        model: A model for instance segmentation or object detection.
        processor: Its image processor.
        dataset: Images that the model was not trained on; see [`evaluate_instance_segmentation`].
        recall: Wanted recall in (0, 1).
        precision: Wanted precision in (0, 1), instead of `recall`.
        confidence: Confidence of the promise, in (0, 1).
        batch_size: Images per batch.
        progress: Whether to show a progress bar.

    Returns:
        The thresholds, and what they reach in these images. A class without an object has none, and where too few
        objects were seen for a promise, `problem` says so, and the threshold is that of the highest F1.

    Raises:
        ValueError: a share is out of range, both are given, or the model does not know a category of the dataset.
    """
    check_goal(recall, precision, confidence)
    dataset = as_instance_dataset(dataset)
    evaluator = evaluate_dataset(model, processor, dataset, batch_size=batch_size, progress=progress)
    calibration = calibrate_evaluation(evaluator, recall=recall, precision=precision, confidence=confidence)
    store_thresholds(model.config, calibration, class_names(model.config, dataset, evaluator))
    return calibration


def check_goal(recall: float | None, precision: float | None, confidence: float) -> None:
    """Raise ValueError unless at most one share is wanted, and all numbers are in (0, 1)."""
    if recall is not None and precision is not None:
        raise ValueError(f"`recall` or `precision` must be None, got {recall} and {precision}. Give one of them.")
    for name, value in (("recall", recall), ("precision", precision), ("confidence", confidence)):
        require(value is None or 0 < value < 1, name, value, "in (0, 1)", "Use a share such as 0.9.")


def calibrate_evaluation(
    evaluator: Any, *, recall: float | None = None, precision: float | None = None, confidence: float = 0.95
) -> Calibration:
    """Return the thresholds for an evaluator with all detections in the images; see [`calibrate`]."""
    check_goal(recall, precision, confidence)
    goal = "F1" if recall is precision is None else "recall" if precision is None else "precision"
    target = recall if precision is None else precision
    tables = match_tables(evaluator)
    return Calibration(
        goal,
        target,
        None if target is None else confidence,
        len(evaluator.ground_truth.sizes),
        evaluator.has_masks,
        {name: _calibrate_class(name, table, goal, target, confidence) for name, table in tables.items()},
    )


def _calibrate_class(
    name: str, table: MatchTable, goal: str, target: float | None, confidence: float
) -> ClassThreshold:
    curves = score_curves(table)
    if not curves.f1.max() > 0:
        missing = "no object" if not table.num_objects.any() else "no match"
        return at_threshold(table, None)._replace(problem=f"{missing} of class {name}")
    best = np.flatnonzero(curves.f1 == curves.f1.max())
    of_f1 = float(THRESHOLDS[best[len(best) // 2]])
    if target is None:
        return at_threshold(table, of_f1)
    choose = promised_recall if goal == "recall" else promised_precision
    if (threshold := choose(table, target, confidence)) is not None:
        return at_threshold(table, threshold)
    highest = float(np.nanmax(getattr(curves, goal)))
    problem = f"too few objects of class {name} to promise it"
    if highest < target:
        problem = f"the {goal} of class {name} is at most {highest:.3f}"
    return at_threshold(table, of_f1)._replace(problem=problem)


def at_threshold(table: MatchTable, threshold: float | None) -> ClassThreshold:
    """Return what a threshold in [0, 1], rounded to one of `THRESHOLDS`, reaches in the images of a table."""
    num_objects = int(table.num_objects.sum())
    if threshold is None:
        return ClassThreshold(None, num_objects, math.nan, math.nan, math.nan)
    index = min(round(threshold * len(THRESHOLDS)), len(THRESHOLDS) - 1)
    precision, recall, f1 = (float(curve[index]) for curve in score_curves(table))
    return ClassThreshold(threshold, num_objects, precision, recall, f1)


def class_names(config: Any, dataset: Any, evaluator: Any) -> dict[int, str]:
    """Return label of a model -> name of the class in the evaluator of a dataset."""
    names = evaluator.ground_truth.category_names
    return {label: names[category] for label, category in label_to_category_id(config, dataset).items()}


def store_thresholds(config: Any, calibration: Calibration, names: Mapping[int, str]) -> None:
    """Store thresholds in a model's configuration; `names` are those of [`class_names`]."""
    found = {label: calibration.classes[name].threshold for label, name in names.items()}
    config.score_thresholds = {label: threshold for label, threshold in found.items() if threshold is not None}
    config.score_thresholds_note = calibration.note


def stored_thresholds(config: Any, dataset: Any, evaluator: Any) -> dict[str, float]:
    """Return the thresholds in a model's configuration by the names of the classes in the evaluator of a dataset."""
    thresholds = getattr(config, "score_thresholds", None) or {}
    names = class_names(config, dataset, evaluator)
    return {name: thresholds[label] for label, name in names.items() if label in thresholds}


def restore_thresholds(config: Any, folder: Path) -> None:
    """Give a configuration the thresholds that the config.json of a model's folder has."""
    earlier = type(config).from_pretrained(folder)
    for name in _FIELDS:
        setattr(config, name, getattr(earlier, name))


def save_thresholds(folder: Path, config: Any) -> None:
    """Write the thresholds of a configuration to the config.json of a model's folder; nothing else is changed."""
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {name: getattr(config, name) for name in _FIELDS}
    write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
