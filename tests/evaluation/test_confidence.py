"""Intervals and comparisons against COCOeval on real resampled datasets, hand arithmetic and simulated detectors."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator
from transformers_rfdetr.evaluation.confidence import (
    MatchTable,
    _interval,
    average_precision,
    compare,
    confidence_intervals,
    draw_weights,
    from_json,
    metrics_of,
    per_image,
    to_json,
)

METRICS = ("segm_AP", "segm_AP50", "bbox_AP", "bbox_AP50", "mean_iou")


def jittered(seed, num_images=6):
    """Ground truth of drawn scenes, and as detections its shifted copies, some missing, and some false ones."""
    rng = np.random.default_rng(seed)
    _, coco = draw_dataset(num_images, first_seed=3, classes=["building", "tree"])
    updates = {}
    for image in coco["images"]:
        found = {"scores": [], "labels": [], "masks": []}
        for item in coco["annotations"]:
            if item["image_id"] != image["id"] or rng.random() < 0.2:
                continue
            x, y, width, height = item["bbox"]
            mask = np.zeros((image["height"], image["width"]), bool)
            dx, dy = rng.integers(-2, 3, 2)
            mask[max(0, int(y) + dy) : int(y + height) + dy, max(0, int(x) + dx) : int(x + width) + dx] = True
            found["masks"].append(mask)
            found["labels"].append(item["category_id"] if rng.random() < 0.9 else 3 - item["category_id"])
            found["scores"].append(rng.random())
        updates[image["id"]] = found
    return coco, updates


def evaluated(coco, updates):
    evaluator = InstanceSegmentationEvaluator(coco)
    for image_id, found in updates.items():
        evaluator.update(image_id, **found)
    return evaluator


def repeated(coco, updates, weights):
    """The dataset in which each image occurs as often as its weight says."""
    new, new_updates = {**coco, "images": [], "annotations": []}, {}
    for image, weight in zip(sorted(coco["images"], key=lambda one: one["id"]), weights, strict=True):
        for _ in range(int(weight)):
            image_id = len(new["images"])
            new["images"].append({**image, "id": image_id})
            new["annotations"] += [
                {**item, "image_id": image_id} for item in coco["annotations"] if item["image_id"] == image["id"]
            ]
            new_updates[image_id] = copy.deepcopy(updates[image["id"]])
    return new, new_updates


def test_a_draw_has_the_metrics_that_coco_computes_for_the_repeated_images():
    coco, updates = jittered(0)
    images = per_image(evaluated(coco, updates))
    weights = draw_weights(len(images.image_ids), 8, seed=0)
    assert (weights.sum(1) == len(images.image_ids)).all()
    assert (weights[0] == 1).all()
    assert (weights == 0).any()
    assert (weights > 1).any()
    found = metrics_of(images, weights)
    for row, weight in enumerate(weights):
        expected = evaluated(*repeated(coco, updates, weight)).compute()
        for name in METRICS:
            assert found[name][row] == pytest.approx(expected[name], abs=1e-9), (name, weight)
        for class_name, metrics in expected["per_class"].items():
            for name in ("segm_AP", "segm_AP50", "bbox_AP", "iou"):
                value = found["per_class"][class_name][name][row]
                assert (-1 if np.isnan(value) else value) == pytest.approx(metrics[name], abs=1e-9)


def test_the_ap_of_draws_is_that_of_hand_arithmetic():
    # Two images with one object each; it is found in the first one only. AP is 51/101 for both once (51 of the recalls
    # 0, 0.01, ... are at most 0.5), 1 for the first twice and 0 for the second twice.
    match = np.ones((10, 1), bool)
    table = MatchTable(np.array([1, 1]), np.array([0]), np.array([0.9]), match, ~match)
    weights = np.array([[1.0, 1], [2, 0], [0, 2]])
    assert average_precision(table, weights)[:, 0].tolist() == [51 / 101, 1.0, 0.0]


def test_an_interval_is_that_of_hand_arithmetic():
    # The mean of three draws is 0.6, 0.1 above the metric, so the bias is 0.1 / 0.41421 = 0.24142. Their variance is
    # (0.04 + 0 + 0.04) / 3; with three images it counts 3 / 2 times. t of 2 degrees of freedom is 4.30265 at 97.5 %.
    half_width = 4.30265 * (0.04 + 0.24142**2 / 4) ** 0.5
    assert _interval(np.array([0.5, 0.4, 0.6, 0.8]), 0.95, 3) == pytest.approx(
        (0.5 - 0.24142 - half_width, 0.5 - 0.24142 + half_width), abs=1e-4
    )


def test_compute_has_intervals_around_coco_s_numbers_only_if_they_are_wanted():
    evaluator = evaluated(*jittered(0))
    plain, metrics = evaluator.compute(), evaluator.compute(confidence=0.9)
    intervals = metrics.pop("intervals")
    assert metrics == plain
    assert intervals.keys() == {"confidence", *METRICS, "per_class"}
    for name in METRICS:
        low, high = intervals[name]
        assert 0 <= low < high <= 1
    wide = evaluator.compute(confidence=0.99)["intervals"]["segm_AP"]
    assert wide[1] - wide[0] > intervals["segm_AP"][1] - intervals["segm_AP"][0]
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\), got 95"):
        evaluator.compute(confidence=95)


def test_without_an_object_of_a_class_there_is_no_interval():
    coco, updates = jittered(0)
    coco["annotations"] = [item for item in coco["annotations"] if item["category_id"] == 1]
    intervals = evaluated(coco, updates).compute(confidence=0.95)["intervals"]
    assert intervals["per_class"]["tree"]["segm_AP"] == (-1.0, -1.0)
    assert intervals["per_class"]["building"]["segm_AP"][1] > 0


@pytest.fixture
def coverage(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from intervals import coverage

    return coverage


@pytest.mark.long
@pytest.mark.parametrize("setting", [(60, 3, 1.0, 1.2), (300, 2, 1.0, 1.2), (100, 20, 0.2, 1.2)])
def test_95_per_cent_intervals_contain_the_true_ap_in_95_per_cent_of_simulations(setting, coverage):
    assert 0.93 <= coverage(300, setting)["ours"] <= 0.97


def test_intervals_contain_the_true_ap_in_most_simulations(coverage):
    assert coverage(50, (60, 3, 1.0, 1.2), draws=200)["ours"] >= 0.88


def test_two_models_are_compared_on_the_same_draws():
    coco, updates = jittered(0, 10)
    first = per_image(evaluated(coco, updates))
    worse = {
        image_id: {**found, "masks": [np.roll(mask, 2, axis=1) for mask in found["masks"]]}
        for image_id, found in updates.items()
    }
    second = per_image(evaluated(coco, worse))
    found = compare(first, second)
    expected = [evaluated(coco, one).compute()["segm_AP"] for one in (updates, worse)]
    assert [found["segm_AP"].first, found["segm_AP"].second] == pytest.approx(expected, abs=1e-9)
    assert found["segm_AP"].high < 0
    assert found["segm_AP"].is_certain
    assert found["segm_AP"].num_images_needed <= 10
    widths = np.ptp([found["segm_AP"].low, found["segm_AP"].high]), np.ptp(confidence_intervals(first)["segm_AP"])
    assert widths[0] < widths[1]  # the difficulty of an image is the same for both
    same = compare(first, first)["segm_AP"]
    assert (same.difference, same.low, same.high, same.num_images_needed, same.is_certain) == (0, 0, 0, None, False)


def test_other_images_and_other_ground_truth_are_not_compared():
    coco, updates = jittered(0)
    first = per_image(evaluated(coco, updates))
    with pytest.raises(ValueError, match="must have the same images, got 1 that only one has, such as 3"):
        compare(first, first._replace(image_ids=first.image_ids[1:]))
    coco["annotations"] = coco["annotations"][1:]
    with pytest.raises(ValueError, match="must have the same ground truth, got other objects of"):
        compare(first, per_image(evaluated(coco, updates)))


def test_what_is_stored_is_restored():
    images = per_image(evaluated(*jittered(0)))
    restored = from_json(json.loads(json.dumps(to_json(images))))
    assert restored.image_ids == images.image_ids
    np.testing.assert_array_equal(restored.pixels, images.pixels)
    for kind, tables in images.tables.items():
        for name, table in tables.items():
            for one, other in zip(table, restored.tables[kind][name], strict=True):
                np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="must contain what `evaluate --confidence --output` writes"):
        from_json({"tables": {}})


def test_the_commands_evaluate_with_intervals_and_compare(tmp_path):
    save_dataset(tmp_path / "data" / "valid", *draw_dataset(4, (144, 144), metres_per_pixel=0.2, first_seed=2_000_000))
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, threshold in zip(files, ("0", "0.6"), strict=True):
        command = ["evaluate", "rf-detr-seg-tiny", tmp_path / "data", "--confidence", 0.9, "--output", file]
        command += ["--report", tmp_path]
        result = CliRunner().invoke(app, [str(part) for part in [*command, "--threshold", threshold]])
        assert result.exit_code == 0, result.output
        assert "90 % confidence" in result.output
        assert "With fewer than 10 images, an interval can be wrong more often than its level says." in result.output
        low, high = json.loads(file.read_text())["intervals"]["segm_AP"]
        page = (tmp_path / "report.html").read_text()
        assert "With 90 % confidence" in page
        assert f"mask AP {low:.3f} to {high:.3f};" in page
    result = CliRunner().invoke(app, ["compare", *map(str, files)])
    assert result.exit_code == 0, result.output
    assert "mask AP, car" in result.output
    assert "worse" in result.output or "cannot be told apart with these 4 images" in result.output
    files[0].write_text("{}")
    result = CliRunner().invoke(app, ["compare", *map(str, files)])
    assert result.exit_code == 2
    assert "first.json: it must contain what" in result.output
