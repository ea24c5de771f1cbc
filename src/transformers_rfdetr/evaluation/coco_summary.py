"""COCO's twelve summary metrics.

Axis letters: T IoU thresholds 0.5, 0.55, ..., 0.95, R recalls 0, 0.01, ..., 1, A area ranges, L limits of
the number of detections.
"""

from collections.abc import Sequence

import numpy as np

# COCO evaluates at most this number of detections per image and category.
COCO_MAX_DETECTIONS = 100
# In the order of COCOeval.
_AREAS = ("", "_small", "_medium", "_large")
_AT_50, _AT_75 = 0, 5  # indices into T
_PRECISION_SHAPE = (10, len(_AREAS))  # T, A


def detection_limits(max_detections: int) -> list[int]:
    """Return COCOeval's numbers of detections per image and category, ascending: COCO's 1, 10 and 100, and another."""
    return sorted({1, 10, COCO_MAX_DETECTIONS, max_detections})


def average_over_recall(
    result: tuple[np.ndarray, np.ndarray] | None, limits: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return AP (T, A, L) and recall (T, A, L) from the result of [`matching.precision_and_recall`]; -1 for None."""
    if result is None:
        absent = np.full((*_PRECISION_SHAPE, len(limits)), -1.0)
        return absent, absent
    precision, recall = result
    return precision.mean(1), recall


def summarize(results: Sequence[tuple[np.ndarray, np.ndarray]], max_detections: int) -> dict[str, float]:
    """Return COCO's twelve metrics from AP (T, A, L) and recall (T, A, L) of each category.

    If `max_detections` is not COCO's 100, AP_N, AP50_N, AP75_N and AR_N are added, for this number N of detections.
    """
    limits = detection_limits(max_detections)
    shape = (-1, *_PRECISION_SHAPE, len(limits))
    precision, recall = (np.array([pair[part] for pair in results]).reshape(shape) for part in (0, 1))
    of_coco = limits.index(COCO_MAX_DETECTIONS)

    def average_precision(suffix: str, index: int) -> dict[str, float]:
        return {
            f"AP{suffix}": mean_of_present(precision[:, :, 0, index]),
            f"AP50{suffix}": mean_of_present(precision[:, _AT_50, 0, index]),
            f"AP75{suffix}": mean_of_present(precision[:, _AT_75, 0, index]),
        }

    metrics = average_precision("", of_coco)
    areas = [(index, area) for index, area in enumerate(_AREAS) if area]
    metrics |= {f"AP{area}": mean_of_present(precision[:, :, index, of_coco]) for index, area in areas}
    metrics |= {f"AR_{limit}": mean_of_present(recall[:, :, 0, index]) for index, limit in enumerate(limits)}
    metrics |= {f"AR{area}": mean_of_present(recall[:, :, index, of_coco]) for index, area in areas}
    if max_detections != COCO_MAX_DETECTIONS:
        metrics |= average_precision(f"_{max_detections}", limits.index(max_detections))
    return metrics


def summarize_class(precision: np.ndarray, kind: str, max_detections: int) -> dict[str, float]:
    """Return `<kind>_AP`, and `segm_AP50` for masks, from the AP (T, A, L) of one category."""
    of_coco = precision[:, 0, detection_limits(max_detections).index(COCO_MAX_DETECTIONS)]
    metrics = {f"{kind}_AP": mean_of_present(of_coco)}
    return metrics | ({"segm_AP50": mean_of_present(of_coco[_AT_50])} if kind == "segm" else {})


def metric_names(has_masks: bool, max_detections: int) -> list[str]:
    """Return the keys of `InstanceSegmentationEvaluator.compute()` without `per_class`."""
    kinds = ("segm", "bbox") if has_masks else ("bbox",)
    names = [f"{kind}_{name}" for kind in kinds for name in summarize([], max_detections)]
    return [*names, "mean_iou", "mean_iou_class_blind"] if has_masks else names


def mean_of_present(values: np.ndarray) -> float:
    """Return the mean of the values other than -1, or -1 if there is none, as `COCOeval.summarize` does."""
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0
