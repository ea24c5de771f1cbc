"""Draw training curves and precision-recall curves with matplotlib: PNG for a model card, SVG for an HTML page.

matplotlib is imported when something is drawn, with its object-oriented API: no pyplot, no window, no global figure.
"""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .score_curves import THRESHOLDS, Reliability, ScoreCurves

# The ink is replaced by `currentColor` in SVG; the gray of the grid is visible on light and on dark pages.
_INK, _GRAY = "#1c2330", "#8a8f98"
_COLORS = ("#3b82f6", "#ef8a17", "#16a34a", "#d946ef", "#0ea5b7", "#dc2626", "#8b6f47", "#7c7c8a")
_RECALLS = np.linspace(0, 1, 101)
_IOU_INDICES = {0.5: 0, 0.75: 5}  # among COCO's IoU thresholds 0.5, 0.55, ..., 0.95
_STEP = 20  # among the thresholds, of those that are drawn
_MAX_MARKED_POINTS = 40  # a curve of more points is a line without markers


class Curve(NamedTuple):
    """One line of a chart."""

    label: str
    x: np.ndarray  # (P,) float64
    y: np.ndarray  # (P,) float64
    color: str
    width: float = 2.0  # of the line, in points
    in_legend: bool = True


class Chart(NamedTuple):
    """Curves over one pair of axes. x starts at 0; y ends at `y_max`, or above the highest point."""

    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    y_max: float | None = None


def training_charts(
    log_history: Sequence[Mapping[str, Any]], prefix: str = "eval_", *, with_learning_rate: bool = True
) -> list[Chart]:
    """Return the charts of losses, validation metrics and learning rate for which a Trainer's log has values.

    Negative and non-finite values are dropped: COCO's metrics are -1 where the ground truth has no object.

    Args:
        log_history: `TrainerState.log_history`.
        prefix: Prefix of the validation metrics in the log.
        with_learning_rate: Whether to include the chart of the learning rate.
    """
    boxes = {f"{prefix}bbox_AP": "box AP", f"{prefix}bbox_AP50": "box AP50"}
    masks = {f"{prefix}segm_AP": "mask AP", f"{prefix}segm_AP50": "mask AP50", f"{prefix}mean_iou": "mean IoU"}
    has_masks = any(f"{prefix}segm_AP" in entry for entry in log_history)
    specifications: list[tuple[str, str, dict[str, str], float | None]] = [
        ("Loss", "loss", {"loss": "training", f"{prefix}loss": "validation"}, None),
        ("Validation", "AP, IoU" if has_masks else "AP", masks if has_masks else boxes, 1.0),
    ]
    if with_learning_rate:
        specifications.append(("Learning rate", "learning rate", {"learning_rate": "learning rate"}, None))
    charts = []
    for title, y_label, labels, y_max in specifications:
        curves = []
        for color, (key, label) in zip(_COLORS, labels.items(), strict=False):
            pairs = [(entry.get("step"), entry.get(key)) for entry in log_history]
            points = np.array([pair for pair in pairs if all(map(_can_be_drawn, pair))], np.float64).reshape(-1, 2)
            _, first = np.unique(points[:, 0], return_index=True)  # an evaluation of the best weights repeats the step
            points = points[first]
            if len(points):
                curves.append(Curve(label, points[:, 0], points[:, 1], color))
        if curves:
            charts.append(Chart(title, "optimizer step", y_label, curves, y_max))
    return charts


def _can_be_drawn(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def precision_recall_charts(curves: Mapping[str, np.ndarray]) -> list[Chart]:
    """Return a chart of precision over recall for the IoU thresholds 0.5 and 0.75.

    Each label ends in the AP at that threshold. With more classes than colors, the classes are thin gray lines and the
    legend has only the mean.

    Args:
        curves: Class name -> precision (T, R), as `InstanceSegmentationEvaluator.precision_curves` returns it.
    """
    charts = []
    for iou, index in _IOU_INDICES.items() if curves else ():
        of_classes = {name: precision[index] for name, precision in curves.items()}
        lines = _class_lines({f"{name} {one.mean():.3f}": one for name, one in of_classes.items()}, _RECALLS)
        if len(lines) > 1:
            mean = np.mean([precision[index] for precision in curves.values()], axis=0)
            lines.append(Curve(f"mean of classes {mean.mean():.3f}", _RECALLS, mean, _INK, width=3.0))
        charts.append(Chart(f"IoU at least {iou}", "recall", "precision", lines, 1.0))
    return charts


def _class_lines(values: Mapping[str, np.ndarray], x: np.ndarray) -> list[Curve]:
    """Return a curve for each class; with more classes than colors, thin gray ones that are not in the legend."""
    has_colors = len(values) <= len(_COLORS)
    colors = _COLORS if has_colors else [_GRAY] * len(values)
    return [
        Curve(label, x, y, color, in_legend=has_colors)
        for (label, y), color in zip(values.items(), colors, strict=False)
    ]


def score_threshold_charts(curves: Mapping[str, ScoreCurves], reliability: Reliability) -> list[Chart]:
    """Return charts of precision, recall and F1 over the score threshold, and the reliability diagram.

    Args:
        curves: Class name -> curves over `THRESHOLDS`; classes without an object have no recall and are omitted there.
        reliability: That of the detections of all classes.
    """
    charts = []
    for title, name in (("Precision", "precision"), ("Recall", "recall"), ("F1", "f1")):
        values = {label: getattr(one, name)[::_STEP] for label, one in curves.items()}
        values = {label: y for label, y in values.items() if np.isfinite(y).any()}
        if values:
            charts.append(
                Chart(
                    title,
                    "score threshold",
                    title.lower() if title != "F1" else title,
                    _class_lines(values, THRESHOLDS[::_STEP]),
                    1.0,
                )
            )
    if len(reliability.scores):
        diagonal = Curve("equal", np.array([0.0, 1.0]), np.array([0.0, 1.0]), _GRAY, width=1.0)
        label = f"expected calibration error {reliability.error:.3f}"
        measured = Curve(label, reliability.scores, reliability.shares, _COLORS[0])
        charts.append(Chart("Reliability", "score", "share of matches", [diagonal, measured], 1.0))
    return charts


def require_matplotlib() -> Any:
    """Return `matplotlib`, or raise ImportError with the command that installs it."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError('curves require matplotlib: pip install "transformers-rfdetr[report]"') from error
    return matplotlib


def draw_png(charts: Sequence[Chart]) -> bytes:
    """Return charts side by side as a PNG file: 560 x 340 pixels each, on white, with title and legend."""
    figure = _draw(charts, size=(5.6, 3.4))
    for axes, chart in zip(figure.axes, charts, strict=True):
        axes.set_title(chart.title, color=_INK)
        lines = [line for line, curve in zip(axes.lines, chart.curves, strict=True) if curve.in_legend]
        legend = axes.legend(lines, [curve.label for curve in chart.curves if curve.in_legend], frameon=False)
        for text in legend.get_texts():
            text.set(color=_INK, parse_math=False)  # a name with dollar signs is not a formula
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100, facecolor="white")
    return stream.getvalue()


def draw_svg(chart: Chart) -> str:
    """Return a chart as an `<svg>` element for a page, without title and legend.

    Text and the mean line have the color of the surrounding text. Pointing at a curve shows its label, which is
    escaped and the only text from data in the element.
    """
    figure = _draw([chart], size=(4.2, 2.9))
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text remains text; ids depend on the chart, so that those of two charts on a page differ.
    with require_matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    _, _, svg = stream.getvalue().partition("<svg ")
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg.replace(_INK, "currentColor"))  # ids that nothing refers to
    svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's
    for index, curve in enumerate(chart.curves):
        start = f'<g id="curve-{index}">'
        svg = svg.replace(start, f'<g class="curve"><title>{html.escape(curve.label)}</title>')
    return f'<svg role="img" aria-label="{html.escape(chart.title)}" {svg}'


def _draw(charts: Sequence[Chart], size: tuple[float, float]) -> Any:
    """Return a `matplotlib.figure.Figure` of charts side by side, each of `size` (width, height) in inches."""
    width, height = size
    figure = require_matplotlib().figure.Figure(figsize=(width * len(charts), height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for number, chart in enumerate(charts, 1):
        axes = figure.add_subplot(1, len(charts), number)
        for index, curve in enumerate(chart.curves):
            (line,) = axes.plot(curve.x, curve.y, color=curve.color, linewidth=curve.width, clip_on=False)
            line.set(gid=f"curve-{index}", marker="o" if len(curve.x) < _MAX_MARKED_POINTS else "", markersize=4)
        axes.set_xlim(0, max(curve.x.max() for curve in chart.curves) or 1)
        axes.set_ylim(0, chart.y_max or 1.05 * max(curve.y.max() for curve in chart.curves) or 1)
        axes.set_xlabel(chart.x_label, color=_INK)
        axes.set_ylabel(chart.y_label, color=_INK)
        axes.tick_params(color=_GRAY, labelcolor=_INK)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color=_GRAY, alpha=0.3)
        axes.spines[:].set_visible(False)
    return figure
