"""Charts of training runs and of precision over recall: values, pixel positions, and safe text."""

import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from transformers_rfdetr.evaluation import curves
from transformers_rfdetr.evaluation.curves import (
    Chart,
    Curve,
    draw_png,
    draw_svg,
    precision_recall_charts,
    training_charts,
)

LOG = [
    {"loss": 3.0, "step": 1},
    {"loss": float("nan"), "step": 2},
    {"eval_segm_AP": -1.0, "eval_loss": 2.0, "step": 2},
    {"eval_segm_AP": 0.25, "step": 4},
    {"train_runtime": 1.0, "step": 4},
]


def points(chart):
    """Label -> points (x, y)."""
    return {curve.label: list(zip(curve.x, curve.y, strict=True)) for curve in chart.curves}


def test_training_charts_have_the_values_of_the_log_without_those_that_cannot_be_drawn():
    loss, validation = training_charts(LOG)
    assert points(loss) == {"training": [(1, 3.0)], "validation": [(2, 2.0)]}
    assert points(validation) == {"mask AP": [(4, 0.25)]}
    assert training_charts(LOG[-1:]) == []


def test_the_evaluation_of_the_best_weights_after_a_run_adds_no_second_value_to_its_last_step():
    log = [{"step": 10, "eval_segm_AP": 0.2}, {"step": 20, "eval_segm_AP": 0.4}, {"step": 20, "eval_segm_AP": 0.3}]
    [chart] = training_charts(log)
    assert (chart.curves[0].x.tolist(), chart.curves[0].y.tolist()) == ([10, 20], [0.2, 0.4])


def test_a_run_without_masks_has_box_metrics_and_a_prefix_selects_the_dataset():
    log = [
        {"eval_city_bbox_AP": 0.2, "eval_village_bbox_AP": 0.7, "step": 1},
        {"learning_rate": 1e-4, "step": 1},
    ]
    validation, learning_rate = training_charts(log, "eval_village_")
    assert points(validation) == {"box AP": [(1, 0.7)]}
    assert points(learning_rate) == {"learning rate": [(1, 1e-4)]}
    assert [chart.title for chart in training_charts(log, "eval_city_", with_learning_rate=False)] == ["Validation"]


def test_precision_recall_charts_have_the_ap_of_each_class_and_of_their_mean():
    first, second = np.full((10, 101), 0.5), np.full((10, 101), 1.0)
    first[5] = 0.25  # at an IoU of 0.75
    charts = precision_recall_charts({"roof": first, "pool": second})
    assert [list(points(chart)) for chart in charts] == [
        ["roof 0.500", "pool 1.000", "mean of classes 0.750"],
        ["roof 0.250", "pool 1.000", "mean of classes 0.625"],
    ]
    assert [len(chart.curves) for chart in precision_recall_charts({"roof": first})] == [1, 1]
    assert precision_recall_charts({}) == []


def test_the_legend_of_many_classes_has_the_mean_only():
    charts = precision_recall_charts({f"class {number}": np.full((10, 101), 0.5) for number in range(30)})
    for chart in charts:
        assert len(chart.curves) == 31
        assert [curve.label for curve in chart.curves if curve.in_legend] == ["mean of classes 0.500"]


def test_a_curve_is_drawn_through_its_values():
    x = np.array([0.0, 100.0])
    chart = Chart("Loss", "optimizer step", "loss", [Curve("rising", x, np.array([0.0, 8.0]), "#ff0000")])
    other = Chart("Other", "optimizer step", "loss", [Curve("one point", np.array([5.0]), np.array([1.0]), "#0000ff")])
    image = Image.open(io.BytesIO(draw_png([chart, other])))
    assert image.size == (1120, 340)
    figure = curves._draw([chart, other], (5.6, 3.4))
    figure.draw_without_rendering()
    colors = np.asarray(image.convert("RGB"), dtype=int)
    # The legend and the title change the layout of the axes in height only.
    for fraction in (0.3, 0.5, 0.7):
        column = round(figure.axes[0].transData.transform((100 * fraction, 0))[0])
        rows = np.flatnonzero(np.abs(colors[:, column] - (255, 0, 0)).sum(axis=1) < 60)
        assert len(rows) > 0
        assert rows.max() - rows.min() < 6
    reds = [np.flatnonzero(np.abs(colors[:, c] - (255, 0, 0)).sum(axis=1) < 60).mean() for c in (150, 250, 350)]
    assert reds[0] - reds[1] == pytest.approx(reds[1] - reds[2], abs=2)  # a straight line
    assert reds[0] > reds[2]  # that rises
    assert (np.abs(colors[:, 560:] - (0, 0, 255)).sum(axis=2) < 60).sum() > 10


class Elements(HTMLParser):
    """The elements of a text and the words outside of style sheets."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"] and data.strip():
            self.words.append(data)


HOSTILE = [
    "</title></svg><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    r"$\frac{$",
    "_hidden",
    "\udcff",
]


def test_hostile_labels_are_text_in_svg_and_in_png():
    lines = [Curve(name, np.array([0.0, 1]), np.array([0.0, 1]), "#ff0000") for name in HOSTILE]
    svg = Elements(draw_svg(Chart("Loss", "step", "loss", lines)))
    assert set(svg.tags) <= {"svg", "style", "defs", "g", "path", "text", "title", "use", "clippath", "rect"}
    assert [word for word in svg.words if word in HOSTILE] == HOSTILE
    drawable = lines[:-1]  # no font has a lone surrogate; in a page it is replaced when the file is written
    assert Image.open(io.BytesIO(draw_png([Chart("Loss", "step", "loss", drawable)]))).size == (560, 340)


def test_charts_on_a_page_share_no_id_and_drawing_is_deterministic():
    charts = precision_recall_charts({"roof": np.full((10, 101), 0.5)})
    first, second = ([part.split('"')[0] for part in draw_svg(chart).split(' id="')[1:]] for chart in charts)
    assert set(first).isdisjoint(second)
    assert draw_svg(charts[0]) == draw_svg(charts[0])
