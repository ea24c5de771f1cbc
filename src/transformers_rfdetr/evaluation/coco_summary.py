"""COCOeval for one category at a time, and COCO's twelve summary metrics.

Axis letters: T IoU thresholds 0.5, 0.55, ..., 0.95, R recalls 0, 0.01, ..., 1, A area ranges, L limits of
the number of detections.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..model.validation import require

# COCO evaluates at most this number of detections per image and category.
COCO_MAX_DETECTIONS = 100
# In the order of COCOeval.
_AREAS = ("", "_small", "_medium", "_large")
_AT_50, _AT_75 = 0, 5  # indices into T
_PRECISION_SHAPE = (10, len(_AREAS))  # T, A
_BACKENDS = (None, "pycocotools", "faster-coco-eval")


class CocoLists(NamedTuple):
    """What COCOeval reads of one category."""

    images: list[dict[str, Any]]
    objects: list[dict[str, Any]]  # annotations without `id` and `category_id`, which are added
    detections: list[dict[str, Any]]  # results with `area`, without `id` and `category_id`


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


def detection_limits(max_detections: int) -> list[int]:
    """Return COCOeval's numbers of detections per image and category, ascending: COCO's 1, 10 and 100, and another."""
    return sorted({1, 10, COCO_MAX_DETECTIONS, max_detections})


def run_cocoeval(
    backend: tuple[Any, Any], lists: CocoLists, kind: str, limits: list[int]
) -> dict[str, np.ndarray] | None:
    """Return COCOeval's `precision` (T, R, 1, A, L) and `recall` (T, 1, A, L) of one category.

    Args:
        backend: The classes that [`load_backend`] returns.
        lists: The category's images, objects and detections.
        kind: "segm" or "bbox".
        limits: L numbers of detections, from [`detection_limits`].

    Returns:
        None if there is no object to find: crowd regions alone are ignored.
    """
    if all(annotation["iscrowd"] for annotation in lists.objects):
        return None
    evaluation = _make_cocoeval(backend, lists, kind)
    evaluation.params.maxDets = limits
    with redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval


def match_detections(lists: CocoLists, kind: str) -> list[dict[str, Any] | None]:
    """Return how COCOeval of pycocotools matches the best 100 detections of one category, for each image.

    The arguments are those of [`run_cocoeval`].

    Returns:
        For each image None, or a dict with `dtScores` (K,), `dtMatches` and `dtIgnore` (T, K) and `gtIgnore` (N,).
    """
    evaluation = _make_cocoeval((COCO, COCOeval), lists, kind)
    evaluation.params.maxDets = [COCO_MAX_DETECTIONS]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    with redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return evaluation.evalImgs


def _make_cocoeval(backend: tuple[Any, Any], lists: CocoLists, kind: str) -> Any:
    coco_class, eval_class = backend
    with redirect_stdout(io.StringIO()):
        cocos = []
        for annotations in (lists.objects, lists.detections):
            # Ids start at 1: COCOeval marks an unmatched annotation with 0.
            numbered = [{**one, "id": number, "category_id": 1} for number, one in enumerate(annotations, 1)]
            cocos.append(coco_class())
            cocos[-1].dataset = {"images": lists.images, "annotations": numbered, "categories": [{"id": 1}]}
            cocos[-1].createIndex()
        return eval_class(*cocos, kind)


def average_over_recall(result: dict[str, np.ndarray] | None, limits: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return AP (T, A, L) and recall (T, A, L) of a category from [`run_cocoeval`]'s result; -1 for None."""
    if result is None:
        absent = np.full((*_PRECISION_SHAPE, len(limits)), -1.0)
        return absent, absent
    return result["precision"][:, :, 0].mean(1), result["recall"][:, 0]


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
