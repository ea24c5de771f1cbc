"""Write one HTML page about a model on a dataset: metrics, curves, confusion matrix, worst and best images.

The page is one file that loads nothing: its images are inside, its policy allows only its own script, and Jinja2
escapes every text that comes from data or from a checkpoint.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ...atomic_files import write_text
from ...model.validation import require
from ..calibration import at_threshold
from ..curves import Chart, draw_svg, precision_recall_charts, score_threshold_charts, training_charts
from ..error_analysis import Analysis, ImageQuality, analyse
from ..score_curves import reliability, score_curves
from .cards import image_card, num_objects
from .missed import missed_section
from .page import page_environment, style_and_script

_MAX_CONFUSION_CLASSES = 20
_INDEX_50, _INDEX_75 = 0, 5  # of IoU 0.5 and 0.75 among COCO's thresholds
_KINDS = {"segm": "mask", "bbox": "box"}


def write_report(
    folder: str | Path,
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    min_score: float | None = None,
    num_images: int = 12,
    training: str | Path | None = None,
    title: str = "Evaluation",
    progress: bool = True,
) -> Path:
    """Evaluate a model on a dataset and write `report.html` about it: [`analyse`], then [`save_report`]."""
    analysis = analyse(model, processor, dataset, batch_size=batch_size, min_score=min_score, progress=progress)
    return save_report(folder, analysis, dataset, num_images=num_images, training=training, title=title)


def save_report(
    folder: str | Path,
    analysis: Analysis,
    dataset: Any,
    *,
    num_images: int = 12,
    training: str | Path | None = None,
    title: str = "Evaluation",
) -> Path:
    """Write an analysis as one HTML page, and return the file. It takes about 0.1 MB per image.

    Args:
        folder: Folder of `report.html`; it is created if it does not exist.
        analysis: The analysis of the dataset.
        dataset: The dataset that was analysed; its images are read again.
        num_images: Maximum number of the worst images, and of the best ones. Beside them, up to 3 objects are shown for
            each reason why objects were not found.
        training: Output folder of a training run, whose curves are shown too.
        title: Title of the page.

    Raises:
        ValueError: `training` has no log of a training run, or `num_images` is negative.
    """
    require(num_images >= 0, "num_images", num_images, "at least 0")
    worst, best = _worst_and_best(analysis.images, num_images)
    environment = page_environment()
    environment.filters["metric"] = _format_metric
    environment.filters["interval"] = _format_interval
    environment.filters["share"] = lambda value: "–" if math.isnan(value) else f"{value:.3f}"
    page = environment.get_template("page.html.jinja").render(
        title=title,
        analysis=analysis,
        tiles=_tiles(analysis),
        metric_table=_metric_table(analysis),
        class_rows=_class_rows(analysis),
        intervals=analysis.metrics.get("intervals"),
        has_iou="mean_iou" in analysis.metrics,
        curves=_draw(precision_recall_charts(analysis.curves)),
        thresholds=_thresholds(analysis),
        confusion=_confusion(analysis),
        missed=missed_section(analysis, dataset),
        training=_draw([] if training is None else training_charts(_read_log(Path(training)))),
        worst=[image_card(image, dataset) for image in worst],
        best=[image_card(image, dataset) for image in best],
        **style_and_script("page.js"),
    )
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page, errors="replace")  # file names may contain characters that are not valid in UTF-8
    return path


def _worst_and_best(images: Sequence[ImageQuality], num_images: int) -> tuple[list[ImageQuality], list[ImageQuality]]:
    """Select images to show from all images, the worst first. No image is selected twice.

    Images without objects and without detections are omitted. The best images have a correct detection.
    """
    shown = [image for image in images if len(image.objects) or len(image.detections)]
    has_correct = ["correct" in image.detection_outcomes for image in shown]
    middle = max(math.ceil(len(shown) / 2), has_correct.count(False))  # quality is 0 without a correct detection
    return shown[: min(num_images, middle)], shown[middle:][::-1][:num_images]


def _format_metric(value: float) -> str:
    return "–" if value < 0 else f"{value:.3f}"


def _format_interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None or interval[0] < 0 else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _kinds(analysis: Analysis) -> dict[str, str]:
    """Return the prefixes of the metrics and their names, masks first."""
    return {kind: name for kind, name in _KINDS.items() if f"{kind}_AP" in analysis.metrics}


def _tiles(analysis: Analysis) -> list[tuple[str, str]]:
    """Return the names and values of the most important numbers."""
    metrics, images = analysis.metrics, analysis.images
    kind, name = next(iter(_kinds(analysis).items()))
    tiles = [(f"{name} {key}", _format_metric(metrics[f"{kind}_{key}"])) for key in ("AP", "AP50", "AP75")]
    if "mean_iou" in metrics:
        tiles.append(("mean IoU", _format_metric(metrics["mean_iou"])))
    tiles += [("precision", _format_metric(analysis.precision)), ("recall", _format_metric(analysis.recall))]
    quality = float(np.mean([image.quality for image in images])) if images else -1.0
    num_all_objects = sum(num_objects(image) for image in images)
    return [
        *tiles,
        ("image quality", _format_metric(quality)),
        ("images", str(len(images))),
        ("objects", str(num_all_objects)),
    ]


def _metric_table(analysis: Analysis) -> dict[str, Any]:
    """Return the names of COCO's metrics, and their values for masks and for boxes."""
    kinds = _kinds(analysis)
    prefix = f"{next(iter(kinds))}_"
    keys = [key.removeprefix(prefix) for key in analysis.metrics if key.startswith(prefix)]
    rows = [(name, [analysis.metrics[f"{kind}_{key}"] for key in keys]) for kind, name in kinds.items()]
    return {"columns": [key.replace("_", " ") for key in keys], "rows": rows}


def _class_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Return the numbers of each class, the worst AP first, classes without objects last."""
    rows = []
    for label, name in enumerate(analysis.class_names):
        curve, metrics = analysis.curves.get(name), analysis.metrics["per_class"][name]
        aps = [-1.0] * 3 if curve is None else [curve.mean(), curve[_INDEX_50].mean(), curve[_INDEX_75].mean()]
        found = analysis.confusion[label, label]
        rows.append(
            {
                "name": name,
                "num_objects": metrics["num_objects"],
                "interval": _interval_of_class(analysis, name),
                "metrics": [*aps, metrics["iou"]] if "iou" in metrics else aps,
                "found": found,
                "missed": analysis.confusion[label].sum() - found,
                "false": analysis.confusion[:, label].sum() - found,
            }
        )
    return sorted(rows, key=lambda row: math.inf if row["metrics"][0] < 0 else row["metrics"][0])


def _interval_of_class(analysis: Analysis, name: str) -> tuple[float, float] | None:
    of_class = analysis.metrics.get("intervals", {"per_class": {}})["per_class"].get(name, {})
    return of_class.get(f"{next(iter(_kinds(analysis)))}_AP")


def _thresholds(analysis: Analysis) -> dict[str, Any]:
    """Return the charts over the score threshold, and what the calibrated thresholds reach in these images."""
    tables = analysis.match_tables
    curves = {name: score_curves(table) for name, table in tables.items()}
    rows = [(name, at_threshold(tables[name], threshold)) for name, threshold in analysis.thresholds.items()]
    charts = _draw(score_threshold_charts(curves, reliability(tables.values())))
    return {"charts": charts, "rows": rows, "note": analysis.thresholds_note}


def _confusion(analysis: Analysis) -> dict[str, Any]:
    """Return the rows and columns of the confusion matrix that are shown: the classes with the most errors."""
    counts = analysis.confusion
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-errors[:-1], kind="stable")[:_MAX_CONFUSION_CLASSES])
    columns: np.ndarray = np.append(shown, -1)
    counts = counts[columns]
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    return {
        "names": [analysis.class_names[label] for label in shown],
        "counts": counts[:, columns].tolist(),
        "shares": shares[:, columns].tolist(),
        "num_omitted": len(analysis.class_names) - len(shown),
    }


def _draw(charts: Sequence[Chart]) -> list[tuple[Chart, Markup]]:
    return [(chart, Markup(draw_svg(chart))) for chart in charts]


def _read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log of a training run, from its output folder or from its last checkpoint."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    folders = [*sorted(checkpoints, key=lambda path: int(path.name[11:])), folder]
    logs = [path / "trainer_state.json" for path in folders if (path / "trainer_state.json").is_file()]
    if not logs:
        raise ValueError(
            f"`training` must be a folder with trainer_state.json, the output of a training run, got {folder}"
        )
    try:
        history = json.loads(logs[-1].read_text(encoding="utf-8"))["log_history"]
        return [dict(entry) for entry in history]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{logs[-1]} must be the log of a Trainer, got {error!r:.80}. Give another run.") from error
