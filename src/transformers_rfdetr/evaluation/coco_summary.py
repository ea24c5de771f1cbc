"""COCOeval for one category at a time, and COCO's twelve summary metrics.

Axis letters: T IoU thresholds 0.5, 0.55, ..., 0.95, R recalls 0, 0.01, ..., 1, A area ranges, L limits of
the number of detections.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..model.validation import require

# COCO evaluates at most this number of detections per image and category.
MAX_DETECTIONS = 100
# In the order of COCOeval.
_AREAS = ("", "_small", "_medium", "_large")
_LIMITS = (1, 10, MAX_DETECTIONS)
_AT_50, _AT_75 = 0, 5  # indices into T
_PRECISION_SHAPE = (10, len(_AREAS))  # T, A
_BACKENDS = (None, "pycocotools", "faster-coco-eval")


def load_backend(backend: str | None) -> tuple[Any, Any]:
    """Return the classes `COCO` and `COCOeval` of a backend; None selects faster-coco-eval if it is installed."""
    require(backend in _BACKENDS, "backend", backend, f"one of {_BACKENDS}")
    if backend == "pycocotools":
        return COCO, COCOeval
    try:
        import faster_coco_eval
    except ImportError as error:
        if backend is None:
            return COCO, COCOeval
        raise ImportError(f"`backend` {backend!r} requires faster-coco-eval; pip install faster-coco-eval") from error
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def run_cocoeval(
    backend: tuple[Any, Any],
    images: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    detections: list[dict[str, Any]],
    kind: str,
) -> dict[str, np.ndarray] | None:
    """Return COCOeval's `precision` (T, R, 1, A, L) and `recall` (T, 1, A, L) of one category.

    Args:
        backend: The classes that [`load_backend`] returns.
        images: COCO images.
        objects: COCO annotations; `id` and `category_id` are added here.
        detections: COCO results with `area`; `id` and `category_id` are added here.
        kind: "segm" or "bbox".

    Returns:
        None if there is no object to find: crowd regions alone are ignored.
    """
    if all(annotation["iscrowd"] for annotation in objects):
        return None
    coco_class, eval_class = backend
    with redirect_stdout(io.StringIO()):
        cocos = []
        for annotations in (objects, detections):
            # Ids start at 1: COCOeval marks an unmatched annotation with 0.
            numbered = [{**one, "id": number, "category_id": 1} for number, one in enumerate(annotations, 1)]
            cocos.append(coco_class())
            cocos[-1].dataset = {"images": images, "annotations": numbered, "categories": [{"id": 1}]}
            cocos[-1].createIndex()
        evaluation = eval_class(*cocos, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def average_over_recall(result: dict[str, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return AP (T, A) and recall (T, A, L) of a category from [`run_cocoeval`]'s result; -1 for None."""
    if result is None:
        return np.full(_PRECISION_SHAPE, -1.0), np.full((*_PRECISION_SHAPE, len(_LIMITS)), -1.0)
    return result["precision"][:, :, 0, :, -1].mean(1), result["recall"][:, 0]


def summarize(results: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Return COCO's twelve metrics from AP (T, A) and recall (T, A, L) of each category."""
    precision = np.array([of_category for of_category, _ in results]).reshape(-1, *_PRECISION_SHAPE)
    recall = np.array([of_category for _, of_category in results]).reshape(-1, *_PRECISION_SHAPE, len(_LIMITS))
    metrics = {
        "AP": mean_of_present(precision[:, :, 0]),
        "AP50": mean_of_present(precision[:, _AT_50, 0]),
        "AP75": mean_of_present(precision[:, _AT_75, 0]),
    }
    metrics |= {f"AP{area}": mean_of_present(precision[:, :, index]) for index, area in enumerate(_AREAS) if area}
    metrics |= {f"AR_{limit}": mean_of_present(recall[:, :, 0, index]) for index, limit in enumerate(_LIMITS)}
    return metrics | {
        f"AR{area}": mean_of_present(recall[:, :, index, -1]) for index, area in enumerate(_AREAS) if area
    }


def summarize_class(precision: np.ndarray, kind: str) -> dict[str, float]:
    """Return `<kind>_AP`, and `segm_AP50` for masks, from the AP (T, A) of one category."""
    metrics = {f"{kind}_AP": mean_of_present(precision[:, 0])}
    return metrics | ({"segm_AP50": mean_of_present(precision[_AT_50, 0])} if kind == "segm" else {})


def metric_names(has_masks: bool) -> list[str]:
    """Return the keys of `InstanceSegmentationEvaluator.compute()` without `per_class`."""
    names = [f"{kind}_{name}" for kind in (("segm", "bbox") if has_masks else ("bbox",)) for name in summarize([])]
    return [*names, "mean_iou", "mean_iou_class_blind"] if has_masks else names


def mean_of_present(values: np.ndarray) -> float:
    """Return the mean of the values other than -1, or -1 if there is none, as `COCOeval.summarize` does."""
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0
