"""Score thresholds against brute force, and promises by simulations whose true recall and precision are known."""

import dataclasses
import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from transformers_rfdetr import RfDetrConfig, calibrate, load, load_instance_dataset
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
from transformers_rfdetr.evaluation.calibration import (
    Calibration,
    calibrate_evaluation,
    check_goal,
    holds_with_confidence,
    promised_precision,
    promised_recall,
)
from transformers_rfdetr.evaluation.confidence import MatchTable, match_tables
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_dataset
from transformers_rfdetr.evaluation.score_curves import THRESHOLDS, reliability, score_curves


def table_of(num_objects, images, scores, is_match, is_ignored=None):
    order = np.argsort(-np.array(scores, np.float64), kind="stable")
    is_match = np.tile(np.array(is_match, bool)[order], (10, 1))
    is_ignored = np.zeros_like(is_match) if is_ignored is None else np.tile(np.array(is_ignored)[order], (10, 1))
    return MatchTable(np.array(num_objects), np.array(images)[order], np.array(scores)[order], is_match, is_ignored)


def simulated(rng, num_images, together=0.5):
    """A detector on images that differ in difficulty, the more the larger `together` is."""
    num_objects, num_false = rng.poisson(3, num_images), rng.poisson(1, num_images)
    difficulty = rng.normal(0, together, num_images)
    images = np.repeat(np.arange(num_images), num_objects), np.repeat(np.arange(num_images), num_false)
    logits = [1.5 - difficulty[images[0]], -1.5 + difficulty[images[1]]]
    scores = 1 / (1 + np.exp(-np.concatenate(logits) - rng.normal(0, 0.8, num_objects.sum() + num_false.sum())))
    is_match = np.repeat([True, False], [num_objects.sum(), num_false.sum()])
    return table_of(num_objects, np.concatenate(images), scores, is_match)


def mean_over_images(table, threshold, goal):
    kept = table.scores > threshold
    found = np.bincount(table.images[kept & table.is_match[0]], minlength=len(table.num_objects))
    total = table.num_objects if goal == "recall" else np.bincount(table.images[kept], minlength=len(found))
    return (found[total > 0] / total[total > 0]).mean()


def broken_promises(goal, repetitions, num_images, together, choose, target=0.9):
    """The share of calibrations that promise too much, and the share that promise anything."""
    rng = np.random.default_rng(0)
    population = simulated(rng, 20_000, together)
    true, chosen = {}, [choose(simulated(rng, num_images, together), target) for _ in range(repetitions)]
    for threshold in {*chosen} - {None}:
        true[threshold] = mean_over_images(population, threshold, goal)
    promised = [threshold for threshold in chosen if threshold is not None]
    return sum(true[threshold] < target for threshold in promised) / repetitions, len(promised) / repetitions


def highest_recall_in_sample(table, target):
    return THRESHOLDS[score_curves(table).recall >= target].max()


def lowest_precision_in_sample(table, target):
    return THRESHOLDS[np.nan_to_num(score_curves(table).precision) >= target].min()


CHOOSE = {
    "recall": (lambda table, target: promised_recall(table, target, 0.9), highest_recall_in_sample),
    "precision": (lambda table, target: promised_precision(table, target, 0.9), lowest_precision_in_sample),
}


@pytest.mark.parametrize("goal", CHOOSE)
def test_promises_with_90_per_cent_confidence_are_broken_in_at_most_a_tenth_of_simulations(goal):
    promise, in_sample = CHOOSE[goal]
    broken, given = broken_promises(goal, 100, 120, 0.5, promise)
    assert broken <= 0.1
    assert given >= 0.8
    assert broken_promises(goal, 50, 120, 0.5, in_sample)[0] >= 0.3  # what reaches it in the sample


@pytest.mark.long
@pytest.mark.parametrize("goal", CHOOSE)
@pytest.mark.parametrize(("num_images", "together"), [(50, 0.5), (60, 2.0), (400, 0.0), (400, 2.0)])
def test_promises_hold_for_few_and_many_images_of_equal_or_different_difficulty(goal, num_images, together):
    broken, given = broken_promises(goal, 300, num_images, together, CHOOSE[goal][0])
    print(goal, num_images, together, broken, given)
    assert broken <= 0.1
    assert num_images < 100 or given > 0


@pytest.mark.parametrize("together", [False, True])
def test_a_mean_at_the_target_is_not_judged_to_be_above_it(together):
    rng, judged = np.random.default_rng(0), []
    for _ in range(1000):
        objects = rng.random((100, 5)) < 0.9
        shares = objects[:, 0].astype(float) if together else objects.mean(1)
        judged.append(holds_with_confidence(shares, 0.9, 0.9))
    assert np.mean(judged) <= 0.1
    assert np.mean([holds_with_confidence((rng.random((100, 5)) < 0.97).mean(1), 0.9, 0.9) for _ in range(100)]) > 0.9


def bet_in_turn(shares, target, confidence):
    capital, gains, deviations = 1.0, [], 0.0
    for number, share in enumerate(shares, 1):
        variance, mean = (0.25 + deviations) / number, sum(gains) / number
        bet = min(math.sqrt(2 * math.log(1 / (1 - confidence)) / (variance * len(shares))), 0.75 / target)
        capital *= 1 + bet * (share - target)
        if capital >= 1 / (1 - confidence):
            return True
        gains.append(share - target)
        deviations += (share - target - mean) ** 2
    return False


def test_the_judgement_is_that_of_bets_in_turn():
    rng, expected = np.random.default_rng(1), []
    for confidence in (0.5, 0.8, 0.95):
        for _ in range(20):
            shares, target = rng.choice([1.0, 0.5, 0.0], 60, p=[0.9, 0.08, 0.02]), rng.uniform(0.7, 0.95)
            expected.append(bet_in_turn(shares, target, confidence))
            assert holds_with_confidence(shares, target, confidence) == expected[-1]
    assert 10 < sum(expected) < 50


def test_few_images_promise_nothing_however_good_they_are():
    assert not holds_with_confidence(np.ones(30), 0.9, 0.95)  # 0.9 ** 28 > 0.05: even a coin needs 29
    assert holds_with_confidence(np.ones(50), 0.9, 0.95)
    assert not holds_with_confidence(np.empty(0), 0.9, 0.95)


def test_curves_and_f1_are_those_of_counting_at_each_threshold():
    rng = np.random.default_rng(0)
    is_match = rng.random(40) < 0.6
    is_ignored = ~is_match & (rng.random(40) < 0.3)
    table = table_of([9, 0, 21], rng.integers(0, 3, 40), rng.random(40).round(3), is_match, is_ignored)
    curves = score_curves(table)
    for threshold, *found in zip(THRESHOLDS, *curves, strict=True):
        kept = table.scores > threshold
        matches, counted = (kept & table.is_match[0]).sum(), (kept & ~table.is_ignored[0]).sum()
        precision = matches / counted if counted else math.nan
        assert found == pytest.approx([precision, matches / 30, 2 * matches / (counted + 30)], nan_ok=True)


def drawn(folder, num_images, first_seed):
    images = draw_dataset(num_images, (144, 144), metres_per_pixel=0.2, first_seed=first_seed)
    save_dataset(folder / "valid", *images)
    return load_instance_dataset(str(folder))["validation"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    dataset, (model, processor) = drawn(folder, 6, 2_000_000), load("rf-detr-seg-tiny")
    return folder, dataset, model, evaluate_dataset(model, processor, dataset, progress=False)


def test_the_threshold_of_the_highest_f1_is_in_the_middle_of_equal_ones(evaluated):
    *_, evaluator = evaluated
    calibration = calibrate_evaluation(evaluator)
    for name, table in match_tables(evaluator).items():
        one, f1 = calibration.classes[name], score_curves(table).f1
        assert one.num_objects == table.num_objects.sum()
        if one.threshold is None:
            assert one.problem == f"no object of class {name}"
            continue
        assert one.f1 == f1.max() == f1[one.threshold == THRESHOLDS][0]
        equal = THRESHOLDS[f1 == f1.max()]
        assert abs((equal < one.threshold).sum() - (equal > one.threshold).sum()) <= 1
    assert calibration.note == "highest F1, calibrated on 6 images, masks at IoU 0.5"


def test_with_too_few_objects_the_class_is_named_and_has_the_threshold_of_f1(evaluated):
    *_, evaluator = evaluated
    of_f1, promised = calibrate_evaluation(evaluator), calibrate_evaluation(evaluator, recall=0.9)
    assert promised.classes["car"].problem == "too few objects of class car to promise it"
    assert promised.classes["car"].threshold == of_f1.classes["car"].threshold
    assert promised.note.startswith("highest F1, because the recall cannot be promised for any class; calibrated on 6")
    some = dataclasses.replace(promised, classes=promised.classes | {"car": of_f1.classes["car"]})
    assert "for each class, with 95 % confidence, on average over images at least 90 % of its objects" in some.note
    assert "nothing is promised, and F1 is highest, for building, tree" in some.note
    low = calibrate_evaluation(evaluator, recall=0.5, confidence=0.6).classes["car"]
    assert (low.problem, low.threshold > of_f1.classes["car"].threshold) == ("", True)


def test_a_class_that_is_never_found_has_no_threshold():
    empty = MatchTable(np.array([2]), np.empty(0, int), np.empty(0), np.empty((10, 0), bool), np.empty((10, 0), bool))
    assert np.isnan(score_curves(empty).precision).all()
    assert promised_recall(empty, 0.9, 0.95) is promised_precision(empty, 0.9, 0.95) is None
    never = table_of([2], [0], [0.9], [False])
    assert score_curves(never).f1.max() == 0
    assert promised_precision(never, 0.9, 0.95) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0.9, 0.9, 0.95), "`recall` or `precision` must be None, got 0.9 and 0.9"),
        ((1.0, None, 0.95), r"`recall` must be in \(0, 1\), got 1.0"),
        ((None, 90, 0.95), r"`precision` must be in \(0, 1\), got 90"),
        ((0.9, None, 95), r"`confidence` must be in \(0, 1\), got 95"),
    ],
)
def test_goals_outside_of_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_goal(*settings)


def test_reliability_is_the_share_of_matches_in_bins_of_a_tenth():
    table = table_of([4], [0] * 5, [0.95, 0.91, 0.35, 0.32, 0.31], [True, False, True, False, False], [False] * 5)
    ignored = table_of([0], [0], [0.5], [False], [True])
    found = reliability([table, ignored])
    np.testing.assert_allclose(found.scores, [0.98 / 3, 0.93])
    np.testing.assert_allclose(found.shares, [1 / 3, 0.5])
    assert found.error == pytest.approx((abs(0.98 - 1) + abs(1.86 - 1)) / 5)
    assert math.isnan(reliability([ignored]).error)


def test_calibrate_stores_thresholds_that_are_saved_and_loaded(evaluated, tmp_path):
    _, dataset, model, evaluator = evaluated
    processor = load("rf-detr-seg-tiny")[1]
    calibration = calibrate(model, processor, dataset, progress=False)
    assert calibration.classes == calibrate_evaluation(evaluator).classes
    thresholds = {label: calibration.classes[name].threshold for label, name in model.config.id2label.items()}
    expected = {label: threshold for label, threshold in thresholds.items() if threshold is not None}
    assert 0 < len(expected) < len(thresholds)  # these images have no tank
    assert model.config.score_thresholds == expected
    model.config.save_pretrained(tmp_path)
    loaded = RfDetrConfig.from_pretrained(tmp_path)
    assert loaded.score_thresholds == expected
    assert loaded.score_thresholds_note == calibration.note
    model.config.score_thresholds = model.config.score_thresholds_note = None


def run(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


def test_the_commands_calibrate_and_then_predict_with_the_thresholds(evaluated, tmp_path):
    folder, _, model, evaluator = evaluated
    model.save_pretrained(tmp_path / "model")
    load("rf-detr-seg-tiny")[1].save_pretrained(tmp_path / "model")
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    command = ["evaluate", tmp_path / "model", folder, "--calibrate", "--output", tmp_path / "m.json"]
    result = run(*command, "--report", tmp_path)
    assert result.exit_code == 0, result.output
    note = "highest F1, calibrated on 6 images, masks at IoU 0.5"
    assert f"score thresholds: {note}" in result.output
    calibration: Calibration = calibrate_evaluation(evaluator)
    assert json.loads((tmp_path / "m.json").read_text())["calibration"] == calibration.to_dict()
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    thresholds = after.pop("score_thresholds")
    used = {name: one.threshold or 0.5 for name, one in calibration.classes.items()}
    assert thresholds.items() <= {str(label): used[name] for label, name in model.config.id2label.items()}.items()
    assert after == before | {"score_thresholds_note": note}
    page = (tmp_path / "report.html").read_text()
    assert 'id="thresholds"' in page
    assert f"The model is calibrated: {note}." in page
    assert f"expected calibration error {reliability(match_tables(evaluator).values()).error:.3f}" in page

    result = run("predict", tmp_path / "model", folder / "valid", "--output", tmp_path / "found")
    assert result.exit_code == 0, result.output
    assert f"score thresholds: those of the model ({note})" in result.output
    lines = [json.loads(line) for line in (tmp_path / "found" / "predictions.jsonl").read_text().splitlines()]
    names = [one["name"] for line in lines for one in line["instances"]]
    for name, table in match_tables(evaluator).items():
        assert names.count(name) == (table.scores > used[name]).sum()
    settings = json.loads((tmp_path / "found" / "settings.json").read_text())
    assert list(settings["threshold"].values()) == pytest.approx(list(used.values()), abs=1e-6)
    result = run("predict", tmp_path / "model", folder / "valid", "--output", tmp_path / "found", "--threshold", 0.5)
    assert result.exit_code == 2
    assert "predictions made with other settings: threshold" in result.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["rf-detr-seg-tiny", "data", "--calibrate"],
            "--calibrate requires the folder of a model, got rf-detr-seg-tiny",
        ),
        (["FILE", "data", "--calibrate"], "Calibrate the model that was exported, and export it again."),
        (["m", "data", "--calibrate", "--threshold", 0.5], "--calibrate requires all detections, got --threshold 0.5"),
        (["m", "data", "--recall", 0.9], "--recall and --precision require --calibrate"),
        (["m", "data", "--calibrate", "--recall", 90], "`recall` must be in (0, 1), got 90"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_the_evaluation(command, message, tmp_path):
    (tmp_path / "a.onnx").touch()
    result = run("evaluate", *[tmp_path / "a.onnx" if part == "FILE" else part for part in command])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.long
@pytest.mark.parametrize("goal", ["recall", "precision"])
def test_on_fresh_drawn_images_promises_hold_in_the_promised_share_of_repetitions(goal, drawn_evaluator):
    """Each repetition calibrates on some images of a pool, and looks at the others."""
    rng, confidence = np.random.default_rng(0), 0.9
    pool = match_tables(drawn_evaluator)
    broken, given = [], []
    for _ in range(200):
        order = rng.permutation(len(pool["car"].num_objects))
        for table in pool.values():
            seen, fresh = (chosen_images(table, part) for part in np.split(order, [150]))
            threshold = CHOOSE[goal][0](seen, 0.9)
            given.append(threshold is not None)
            if threshold is not None:
                broken.append(mean_over_images(fresh, threshold, goal) < 0.9)
    print(goal, np.sum(broken) / len(given), np.mean(given))
    assert np.sum(broken) / len(given) <= 1 - confidence
    assert np.mean(given) > 0.3


@pytest.fixture(scope="module")
def drawn_evaluator(tmp_path_factory):
    dataset = drawn(tmp_path_factory.mktemp("pool"), 500, 3_000_000)
    return evaluate_dataset(*load("rf-detr-seg-tiny"), dataset, progress=False)


def chosen_images(table, images):
    position = np.full(len(table.num_objects), -1)
    position[images] = np.arange(len(images))
    kept = position[table.images] >= 0
    parts = table.is_match[:, kept], table.is_ignored[:, kept]
    return MatchTable(table.num_objects[images], position[table.images[kept]], table.scores[kept], *parts)
