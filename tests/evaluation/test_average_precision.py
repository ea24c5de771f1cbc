"""COCO's metrics, accumulated image by image. Oracles: pycocotools on COCO's sample and random cases; arithmetic."""

import copy
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest

from evaluation_cases import (
    AREAS,
    TWELVE,
    coco_updates,
    evaluated,
    ground_truth,
    of_kind,
    plain_cocoeval,
    random_case,
    read,
    rectangle,
    twelve,
    updates_of,
)
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator
from transformers_rfdetr.evaluation.coco_summary import average_over_recall
from transformers_rfdetr.evaluation.mask_records import best_per_class
from transformers_rfdetr.evaluation.matching import precision_and_recall


@pytest.fixture(scope="module")
def truth():
    return read("instances_val2014_100.json")


@pytest.fixture(scope="module")
def expected():
    return read("expected.json")


class TestAgainstPycocotools:
    @pytest.mark.parametrize("kind", ["segm", "bbox"])
    def test_the_sample_of_coco_has_the_metrics_of_pycocotools(self, truth, expected, kind):
        evaluator = evaluated(truth, coco_updates(kind))
        numbers = evaluator.compute()
        assert twelve(numbers, kind) == pytest.approx(expected[kind]["stats"], abs=1e-9)
        names = {category["id"]: category["name"] for category in truth["categories"]}
        per_category = {names[int(key)]: ap for key, ap in expected[kind]["ap_per_category"].items()}
        ours = {name: of_class[f"{kind}_AP"] for name, of_class in numbers["per_class"].items()}
        assert {name: ap for name, ap in ours.items() if ap > -1} == pytest.approx(per_category, abs=1e-9)
        results = [precision_and_recall(table, [100]) for table in evaluator.class_tables(kind).values()]
        curves = np.array([average_over_recall(result, [100])[0][:, 0, -1] for result in results])
        per_iou = [curve[curve > -1].mean() for curve in curves.T]
        assert per_iou == pytest.approx(expected[kind]["ap_per_iou"], abs=1e-9)

    @pytest.mark.parametrize("max_detections", [5, 250])
    @pytest.mark.parametrize("kind", ["segm", "bbox"])
    def test_another_number_of_detections_adds_its_metrics_to_those_of_coco(self, kind, max_detections):
        truth, results = random_case(1)
        assert max(Counter((one["image_id"], one["category_id"]) for one in results).values()) > 100
        updates = updates_of(results)
        expected = plain_cocoeval(truth, of_kind(kind, results), kind, sorted({1, 10, 100, max_detections})).eval
        index = sorted({1, 10, 100, max_detections}).index(max_detections)
        precision, recall = expected["precision"][:, :, :, 0, index], expected["recall"][:, :, 0, index]
        numbers = evaluated(truth, updates, max_detections=max_detections).compute()
        for name, values in (("AP", precision), ("AP50", precision[0]), ("AP75", precision[5]), ("AR", recall)):
            assert numbers[f"{kind}_{name}_{max_detections}"] == pytest.approx(values[values > -1].mean(), abs=1e-9)
        standard = evaluated(truth, updates).compute()
        for name in TWELVE:
            assert numbers[f"{kind}_{name}"] == standard[f"{kind}_{name}"]
        with pytest.raises(ValueError, match="`max_detections` must be an integer of at least 1, got 0"):
            InstanceSegmentationEvaluator(truth, max_detections=0)

    @pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in (3, 4, 5))])
    def test_random_cases_have_the_metrics_and_curves_of_pycocotools(self, seed):
        truth, results = random_case(seed)
        truth["categories"].append({"id": 9, "name": "without objects"})
        updates = updates_of(results)
        shuffled = {
            image_id: updates[image_id] for image_id in random.Random(seed).sample(sorted(updates), len(updates))
        }
        evaluator = evaluated(truth, shuffled)
        metrics, curves = evaluator.compute(), evaluator.precision_curves()
        oracles = {kind: plain_cocoeval(truth, of_kind(kind, results), kind) for kind in ("segm", "bbox")}
        for kind, oracle in oracles.items():
            assert twelve(metrics, kind) == pytest.approx(oracle.stats, abs=1e-9)
            rows = json.loads(json.dumps(list(evaluator.predictions(kind))))
            assert plain_cocoeval(truth, rows, kind).stats == pytest.approx(oracle.stats, abs=1e-9)
        assert list(curves) == ["1", "2", "3"]
        for index, curve in enumerate(curves.values()):
            np.testing.assert_allclose(curve, oracles["segm"].eval["precision"][:, :, index, 0, -1], atol=1e-12)

    def test_order_and_division_among_processes_do_not_matter(self, truth):
        updates = coco_updates("segm")
        whole = evaluated(truth, updates).compute()
        image_ids = random.Random(0).sample(sorted(updates), len(updates))
        assert evaluated(truth, {i: updates[i] for i in image_ids}).compute() == whole
        # Three processes with some images in common, as padding samplers deal them.
        shares = [image_ids[0:40], image_ids[30:70], [*image_ids[65:], image_ids[0]]]
        states = [
            pickle.loads(pickle.dumps(evaluated(truth, {i: updates[i] for i in share}).state())) for share in shares
        ]
        for order in ([0, 1, 2], [2, 0, 1]):
            merged = InstanceSegmentationEvaluator(truth)
            for index in order:
                merged.merge(states[index])
            assert len(merged) == len(updates)
            assert merged.compute() == whole

    def test_predictions_are_results_for_pycocotools(self, truth, expected):
        results = json.loads(json.dumps(list(evaluated(truth, coco_updates("segm")).predictions())))
        assert len(results) == 734
        assert results[0].keys() == {"image_id", "category_id", "score", "segmentation"}
        assert plain_cocoeval(truth, results, "segm").stats == pytest.approx(expected["segm"]["stats"], abs=1e-9)

    def test_the_given_ground_truth_is_not_changed(self, truth):
        before = copy.deepcopy(truth)
        evaluated(truth, coco_updates("segm")).compute()
        assert truth == before

    def test_an_object_with_id_0_can_be_found(self):
        # COCOeval marks what is not matched with a 0.
        mask = rectangle((10, 50), (10, 50))
        truth = ground_truth((mask, 1, {"id": 0}))
        assert evaluated(truth, {1: {"scores": [0.5], "labels": [1], "masks": [mask]}}).compute()[
            "segm_AP"
        ] == pytest.approx(1)


class TestByHand:
    def test_a_detection_in_a_crowd_region_is_ignored(self):
        thing, crowd = rectangle((0, 40), (0, 40)), rectangle((50, 100), (0, 100))
        masks = [rectangle((60, 80), (10, 30)), rectangle((60, 80), (50, 70)), thing]
        found = {1: {"scores": [0.9, 0.8, 0.7], "labels": [1, 1, 1], "masks": masks}}
        numbers = evaluated(ground_truth((thing, 1, {}), (crowd, 1, {"iscrowd": 1})), found).compute()
        assert numbers["segm_AP"] == pytest.approx(1)
        assert numbers["bbox_AP"] == pytest.approx(1)
        assert numbers["per_class"]["class 1"]["num_objects"] == 1
        # As an object it would be missed, and both detections in it wrong: precision 1/3 up to a recall of 1/2, that
        # is, at 51 of the 101 recalls.
        numbers = evaluated(ground_truth((thing, 1, {}), (crowd, 1, {"iscrowd": 0})), found).compute()
        assert numbers["segm_AP"] == pytest.approx(51 / 101 / 3)
        assert numbers["per_class"]["class 1"]["num_objects"] == 2

    def test_the_100_best_detections_of_each_class_count(self):
        thing, elsewhere = rectangle((0, 40), (0, 40)), rectangle((50, 90), (50, 90))
        truth = ground_truth((thing, 1, {}), (thing, 2, {}), categories=(1, 2))

        def score(wrong):
            masks = [thing, thing] + [elsewhere] * wrong
            scores = [0.1, 0.1] + [0.9] * wrong
            evaluator = evaluated(truth, {1: {"scores": scores, "labels": [1, 2] + [1] * wrong, "masks": masks}})
            return evaluator, evaluator.compute()["per_class"]

        evaluator, per_class = score(99)
        assert per_class["class 1"]["segm_AP"] == pytest.approx(1 / 100)
        assert len(list(evaluator.predictions())) == 101
        evaluator, per_class = score(100)
        assert per_class["class 1"]["segm_AP"] == 0
        assert per_class["class 2"]["segm_AP"] == pytest.approx(1)  # which the other class does not push out
        assert len(list(evaluator.predictions())) == 101

    def test_ties_for_the_last_places_keep_their_order(self):
        scores, labels = np.array([0.5] * 150 + [0.7]), np.zeros(151, int)
        assert best_per_class(scores, labels).tolist() == [150, *range(99)]

    def test_a_metric_without_objects_is_minus_1(self):
        mask = rectangle((0, 20), (0, 20))  # 400 pixels: small
        truth = ground_truth((mask, 1, {}), categories=(1, 2))
        numbers = evaluated(truth, {1: {"scores": [0.6, 0.9], "labels": [1, 2], "masks": [mask, mask]}}).compute()
        assert [numbers[f"segm_AP_{area}"] for area in AREAS] == pytest.approx([1, -1, -1])
        assert [numbers[f"bbox_AR_{area}"] for area in AREAS] == [1, -1, -1]
        assert numbers["segm_AP"] == pytest.approx(1)  # class 2 has no object and no number
        assert numbers["mean_iou"] == 1
        nothing = {"segm_AP": -1, "segm_AP50": -1, "bbox_AP": -1, "num_objects": 0, "iou": -1}
        assert numbers["per_class"]["class 2"] == nothing

    def test_areas_are_those_of_the_annotations_and_of_the_predicted_masks(self):
        # A mask of 400 pixels in a box of 400 that is annotated as large, and a wrong one of 10,000.
        mask, wrong = rectangle((0, 20), (0, 20)), rectangle((0, 100), (0, 100))
        truth = ground_truth((mask, 1, {"area": 20000}))
        found = {1: {"scores": [0.9, 0.5], "labels": [1, 1], "masks": [wrong, mask]}}
        numbers = evaluated(truth, found).compute()
        # The wrong one is large too (96 x 96 = 9,216) and comes first.
        assert [numbers[f"segm_AP_{area}"] for area in AREAS] == pytest.approx([-1, -1, 0.5])

    def test_objects_of_images_without_update_are_missed(self):
        mask = rectangle((0, 50), (0, 50))
        truth = ground_truth((mask, 1, {}), images=((1, 100, 100), (2, 100, 100)))
        truth["annotations"].append({**truth["annotations"][0], "image_id": 2})
        numbers = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}}).compute()
        assert numbers["segm_AR_100"] == 0.5
        assert numbers["mean_iou"] == 0.5

    def test_without_detections_metrics_are_0_and_without_objects_minus_1(self):
        truth = ground_truth((rectangle((0, 50), (0, 50)), 1, {}))
        numbers = InstanceSegmentationEvaluator(truth).compute()
        assert (numbers["segm_AP"], numbers["bbox_AR_100"], numbers["mean_iou"]) == (0, 0, 0)
        truth["annotations"] = []
        mask = rectangle((0, 9), (0, 9))
        numbers = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}}).compute()
        assert numbers["bbox_AP"] == -1
        assert "segm_AP" not in numbers

    def test_metrics_are_python_numbers(self, truth):
        numbers = evaluated(truth, coco_updates("segm")).compute()
        assert json.loads(json.dumps(numbers)) == numbers
        assert {type(value) for name, value in numbers.items() if name != "per_class"} == {float}
        assert list(numbers)[:12] == [f"segm_{name}" for name in TWELVE]
        assert list(numbers)[-3:] == ["mean_iou", "mean_iou_class_blind", "per_class"]
