"""Say how sure a metric is: intervals from a bootstrap over images, and the comparison of two models.

The images of a dataset are a sample of all images that a model will see. The bootstrap
(https://doi.org/10.1214/aos/1176344552) draws as many images with replacement, again and again, and computes the
metrics of each draw. Detections are matched only once: a draw gives each image a weight, how often it was drawn.

AP of few objects is too high on average: at each recall it takes the highest of several precisions, which exceeds them
by their noise. This bias is proportional to 1 / sqrt(N), and a draw, in which images repeat, carries half as much
information as its images. So draws have sqrt(2) times the bias, and it is

    bias = (mean of the draws - metric) / (sqrt(2) - 1)

The interval is metric - bias plus or minus Student's t, with N - 1 degrees of freedom, times the root of the sum of the
squares of the standard deviation of the draws and of bias / 2, because the bias is not known exactly.
`MORE_RESULTS.md` has the coverage of this interval and of others in simulations.

Axis letters: B draws, N images, C classes, D detections of a class in all images, best first, T IoU thresholds.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from ..model.validation import require
from .coco_summary import COCO_MAX_DETECTIONS

FEW_IMAGES = 10  # with fewer, an interval can contain the truth less often than its level says
_RECALLS = np.linspace(0.0, 1.0, 101)  # at which COCO reads the precision
_NUM_THRESHOLDS = 10  # T
_AT_50 = 0  # index into T
_ALL_AREAS = 0  # index into A
_NUM_VALUES = 1 << 22  # of B x D at a time


class MatchTable(NamedTuple):
    """How the detections of one class match its objects."""

    num_objects: np.ndarray  # (N,) int64, without crowd regions
    images: np.ndarray  # (D,) int64, index of the image of each detection
    scores: np.ndarray  # (D,) float64, descending
    is_match: np.ndarray  # (T, D) bool
    is_ignored: np.ndarray  # (T, D) bool, detections of crowd regions


class PerImage(NamedTuple):
    """What each image contributes to the metrics."""

    image_ids: list[int]
    tables: dict[str, dict[str, MatchTable]]  # "segm" or "bbox" -> class name -> table
    pixels: np.ndarray  # (N, C + 1, 3) int64 of mean IoU; the last row is all classes as one. C is 0 without masks.


def per_image(evaluator: Any) -> PerImage:
    """Return the contributions of the images of an [`InstanceSegmentationEvaluator`]."""
    names = evaluator.ground_truth.category_names
    image_ids = sorted(evaluator.ground_truth.sizes)
    kinds = ("segm", "bbox") if evaluator.has_masks else ("bbox",)
    tables = {kind: match_tables(evaluator, kind) for kind in kinds}
    rows = [*names, None] if evaluator.has_masks else []
    pixels: np.ndarray = np.zeros((len(image_ids), len(rows), 3), np.int64)
    for index, image_id in enumerate(image_ids if rows else ()):
        for category, counts in evaluator.pixels_of(image_id).items():
            pixels[index, rows.index(category)] = counts
    return PerImage(image_ids, tables, pixels)


def match_tables(evaluator: Any, kind: str | None = None) -> dict[str, MatchTable]:
    """Return the table of each class by name, of "segm" or "bbox"; of masks, otherwise of boxes, by default."""
    tables = {}
    for name, table in evaluator.class_tables(kind).items():
        kept = table.ranks < COCO_MAX_DETECTIONS
        is_match, is_ignored = table.is_match[_ALL_AREAS][:, kept], table.is_ignored[_ALL_AREAS][:, kept]
        num_objects = table.num_objects[_ALL_AREAS]
        tables[name] = MatchTable(
            num_objects, table.images[kept], table.scores[kept], is_match & ~is_ignored, is_ignored
        )
    return tables


def average_precision(table: MatchTable, weights: np.ndarray) -> np.ndarray:
    """Return COCO's AP (B, T) of a class for weights of the images (B, N); NaN where no image with an object is drawn.

    AP is the mean over the 101 recalls of the highest precision at this recall or a higher one. Both change only at
    detections that match, so only these are looked at.
    """
    num_objects = weights @ table.num_objects.astype(np.float64)  # (B,)
    of_detection = weights[:, table.images]
    seen = np.cumsum(of_detection, axis=1)
    result = np.full((len(weights), _NUM_THRESHOLDS), np.nan)
    is_present = num_objects > 0
    for threshold in range(_NUM_THRESHOLDS):
        matches = np.flatnonzero(table.is_match[threshold])
        ignored = np.flatnonzero(table.is_ignored[threshold])
        found = np.cumsum(of_detection[:, matches], axis=1)
        num_ignored = np.pad(np.cumsum(of_detection[:, ignored], axis=1), ((0, 0), (1, 0)))
        counted = seen[:, matches] - num_ignored[:, np.searchsorted(ignored, matches)]
        precision = found / np.maximum(counted, 1)
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = found / np.where(is_present, num_objects, 1)[:, None]
        num_reached = np.searchsorted(_RECALLS, recall, side="right")
        steps = np.diff(num_reached, axis=1, prepend=0)
        result[is_present, threshold] = ((highest * steps).sum(1) / len(_RECALLS))[is_present]
    return result


def metrics_of(images: PerImage, weights: np.ndarray) -> dict[str, Any]:
    """Return the metrics of each draw, (B,) each and NaN where no object is drawn; `per_class` has those of a class."""
    metrics: dict[str, Any] = {}
    per_class: dict[str, dict[str, np.ndarray]] = {}
    for kind, tables in images.tables.items():
        of_classes = []
        for name, table in tables.items():
            chunk = max(1, _NUM_VALUES // max(len(table.images), 1))
            starts = range(0, len(weights), chunk)
            parts = [average_precision(table, weights[start : start + chunk]) for start in starts]
            of_classes.append(np.concatenate(parts))
            class_metrics = per_class.setdefault(name, {})
            class_metrics[f"{kind}_AP"] = of_classes[-1].mean(1)
            if kind == "segm":
                class_metrics["segm_AP50"] = of_classes[-1][:, _AT_50]
        values = np.array(of_classes).reshape(-1, len(weights), _NUM_THRESHOLDS)
        metrics[f"{kind}_AP"] = _mean_of_present(values.mean(2))
        metrics[f"{kind}_AP50"] = _mean_of_present(values[..., _AT_50])
    if images.pixels.shape[1]:
        sums = np.einsum("bn,ncx->cbx", weights, images.pixels.astype(np.float64))
        ious = np.where(sums[..., 2] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1), np.nan)
        metrics["mean_iou"] = _mean_of_present(ious[:-1])
        for name, iou in zip(per_class, ious[:-1], strict=True):
            per_class[name]["iou"] = iou
    return {**metrics, "per_class": per_class}


def _mean_of_present(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis of (C, B) without NaN; NaN if all are."""
    present = ~np.isnan(values)
    count = present.sum(0)
    return np.where(count > 0, np.where(present, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def draw_weights(num_images: int, draws: int, seed: int) -> np.ndarray:
    """Return weights (1 + B, N) float64: 1 for each image, then how often each image is in each draw."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=draws)
    return np.concatenate([np.ones((1, num_images)), drawn])


def confidence_intervals(
    images: PerImage, confidence: float = 0.95, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return intervals that contain the metrics on all images that could have been drawn, with this confidence.

    Args:
        images: What [`per_image`] returns.
        confidence: In (0, 1).
        draws: Number of draws.
        seed: Seed of the draws.

    Returns:
        `confidence`; metric -> (lowest, highest) in [0, 1] for `segm_AP`, `segm_AP50`, `bbox_AP`, `bbox_AP50` and
        `mean_iou`; `per_class`, class name -> the same of the class. (-1, -1) without an object.
    """
    require(0 < confidence < 1, "confidence", confidence, "in (0, 1)", "Use 0.95.")
    require(draws >= 1, "draws", draws, "at least 1")
    num_images = len(images.image_ids)
    values = metrics_of(images, draw_weights(num_images, draws, seed))
    per_class = {
        name: {metric: _bounded_interval(one, confidence, num_images) for metric, one in metrics.items()}
        for name, metrics in values.pop("per_class").items()
    }
    intervals = {metric: _bounded_interval(one, confidence, num_images) for metric, one in values.items()}
    return {"confidence": confidence, **intervals, "per_class": per_class}


def _bounded_interval(values: np.ndarray, confidence: float, num_images: int) -> tuple[float, float]:
    low, high = _interval(values, confidence, num_images)
    return (-1.0, -1.0) if np.isnan(low) else (max(low, 0.0), min(high, 1.0))


def _interval(values: np.ndarray, confidence: float, num_images: int) -> tuple[float, float]:
    """Return the interval of (1 + B,) values, that of all images first; NaN without an object."""
    draws = values[1:][~np.isnan(values[1:])]
    if not len(draws):
        return (np.nan, np.nan)
    bias = (draws.mean() - values[0]) / (np.sqrt(2) - 1)
    degrees = max(num_images - 1, 1)
    error = np.sqrt(draws.var() * (degrees + 1) / degrees + bias**2 / 4)
    half_width = student_t.ppf((1 + confidence) / 2, degrees) * error
    return float(values[0] - bias - half_width), float(values[0] - bias + half_width)


class Difference(NamedTuple):
    """The difference of a metric of two models on the same images, second minus first."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    num_images_needed: int | None  # for an interval without 0; None if the difference is 0

    @property
    def is_certain(self) -> bool:
        """Return whether the interval does not contain 0."""
        return self.low > 0 or self.high < 0


def compare(
    first: PerImage, second: PerImage, confidence: float = 0.95, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compare two models on the same images: each draw has the same images for both.

    Args:
        first, second: What [`per_image`] returns, of the same images.
        confidence, draws, seed: See [`confidence_intervals`].

    Returns:
        Metric -> [`Difference`] for the metrics that both have; `per_class`, class name -> the same of the class.

    Raises:
        ValueError: the images or the numbers of objects differ.
    """
    require(0 < confidence < 1, "confidence", confidence, "in (0, 1)", "Use 0.95.")
    _require_same_images(first, second)
    num_images = len(first.image_ids)
    weights = draw_weights(num_images, draws, seed)
    pairs = dict(_pairs(metrics_of(first, weights), metrics_of(second, weights)))
    result: dict[str, Any] = {"per_class": {}}
    for (name, metric), (one, other) in pairs.items():
        target = result if name is None else result["per_class"].setdefault(name, {})
        target[metric] = _difference(one, other, confidence, num_images)
    return result


def _require_same_images(first: PerImage, second: PerImage) -> None:
    if first.image_ids != second.image_ids:
        missing = set(first.image_ids) ^ set(second.image_ids)
        raise ValueError(
            f"both evaluations must have the same images, got {len(missing)} that only one has, such as"
            f" {min(missing)}. Evaluate both models on one split."
        )
    counts = [
        {name: table.num_objects.tolist() for name, table in one.tables["bbox"].items() if table.num_objects.any()}
        for one in (first, second)
    ]
    if counts[0] != counts[1]:
        names = [name for name in {**counts[0], **counts[1]} if counts[0].get(name) != counts[1].get(name)]
        raise ValueError(
            f"both evaluations must have the same ground truth, got other objects of {', '.join(names[:5])}. Evaluate"
            " both models again."
        )


def _pairs(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[tuple[str | None, str], tuple[np.ndarray, np.ndarray]]]:
    """Yield (class name or None, metric) and the values of both, for what both have."""
    groups = [(None, first, second)]
    groups += [(name, first["per_class"][name], second["per_class"].get(name, {})) for name in first["per_class"]]
    for name, one, other in groups:
        for metric in one:
            if metric != "per_class" and metric in other and not np.isnan(one[metric][0]):
                yield (name, metric), (one[metric], other[metric])


def _difference(first: np.ndarray, second: np.ndarray, confidence: float, num_images: int) -> Difference:
    """Return the difference of two metrics; the first value of (1 + B,) is that of all images."""
    difference = second - first
    low, high = _interval(difference, confidence, num_images)
    point = float(difference[0])
    needed = None if point == 0 else int(np.ceil(num_images * ((high - low) / 2 / point) ** 2))
    return Difference(float(first[0]), float(second[0]), point, low, high, needed)


# The form in which `evaluate --output` stores them


def to_json(images: PerImage) -> dict[str, Any]:
    """Return JSON values, from which [`from_json`] restores them; T bits of a detection are one number."""
    bits = 1 << np.arange(_NUM_THRESHOLDS)
    tables = {
        kind: {
            name: {
                "num_objects": table.num_objects.tolist(),
                "images": table.images.tolist(),
                "scores": table.scores.tolist(),
                "is_match": (bits @ table.is_match).tolist(),
                "is_ignored": (bits @ table.is_ignored).tolist(),
            }
            for name, table in of_kind.items()
        }
        for kind, of_kind in images.tables.items()
    }
    return {"image_ids": images.image_ids, "tables": tables, "pixels": images.pixels.tolist()}


def from_json(content: Mapping[str, Any]) -> PerImage:
    """Return what [`to_json`] was given.

    Raises:
        ValueError: the content has another form.
    """
    try:
        tables = {
            kind: {
                name: MatchTable(
                    np.array(table["num_objects"], np.int64),
                    np.array(table["images"], np.int64),
                    np.array(table["scores"], np.float64),
                    _read_bits(table["is_match"]),
                    _read_bits(table["is_ignored"]),
                )
                for name, table in of_kind.items()
            }
            for kind, of_kind in content["tables"].items()
        }
        image_ids = [int(image_id) for image_id in content["image_ids"]]
        pixels = np.array(content["pixels"], np.int64).reshape(len(image_ids), -1, 3)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "it must contain what `evaluate --confidence --output` writes, and reading it raised"
            f" {type(error).__name__}: {error}. Evaluate the model again."
        ) from error
    return PerImage(image_ids, tables, pixels)


def _read_bits(numbers: Any) -> np.ndarray:
    return (np.array(numbers, np.int64) >> np.arange(_NUM_THRESHOLDS)[:, None] & 1).astype(bool)
