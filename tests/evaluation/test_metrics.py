"""COCO's numbers, streamed. Oracles: the numbers of pycocotools on COCO's own sample, hand arithmetic, plain numpy."""

import copy
import doctest
import io
import json
import pickle
import random
import tracemalloc
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.evaluation import coco_evaluator as metrics
from transformers_rfdetr.evaluation.coco_evaluator import (
    InstanceSegmentationEvaluator,
    category_of_labels,
    detect,
    evaluate_instance_segmentation,
)

from small_models import shared_folder, small_model

AREAS = ("small", "medium", "large")
TWELVE = ["AP", "AP50", "AP75", *(f"AP_{area}" for area in AREAS), "AR_1", "AR_10", "AR_100"]
TWELVE += [f"AR_{area}" for area in AREAS]


def read(name):
    return json.loads((shared_folder("coco_eval100") / name).read_text())


@pytest.fixture(scope="module")
def truth():
    return read("instances_val2014_100.json")


@pytest.fixture(scope="module")
def expected():
    return read("expected.json")


def coco_updates(kind):
    """Of each image of the sample the arguments of `update`."""
    grouped = {}
    for result in read(f"instances_val2014_fake{kind}100_results.json"):
        grouped.setdefault(result["image_id"], []).append(result)
    updates = {}
    for image_id, results in grouped.items():
        found = {"scores": [r["score"] for r in results], "labels": [r["category_id"] for r in results]}
        if kind == "segm":
            found["masks"] = [r["segmentation"] for r in results]
        else:
            found["boxes"] = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in results)]
        updates[image_id] = found
    return updates


def evaluated(truth, updates, **settings):
    evaluator = InstanceSegmentationEvaluator(truth, **settings)
    for image_id, found in updates.items():
        evaluator.update(image_id, **found)
    return evaluator


def twelve(numbers, kind):
    return [numbers[f"{kind}_{name}"] for name in TWELVE]


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def rectangle(rows, columns, size=(100, 100)):
    mask = np.zeros(size, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def ground_truth(*annotations, images=((1, 100, 100),), categories=(1,)):
    """Each annotation: a mask (H, W), its category, and what else it has."""
    return {
        "images": [{"id": i, "height": h, "width": w} for i, h, w in images],
        "annotations": [
            {"image_id": images[0][0], "category_id": category, "segmentation": rle(mask), **more}
            for mask, category, more in annotations
        ],
        "categories": [{"id": category, "name": f"class {category}"} for category in categories],
    }


def random_case(seed):
    """Ground truth and COCO results of 8 images: ties, crowds, empty masks, more than 100 a class."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 140, 2))

    def shape():
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        return rectangle((top, top + rng.integers(2, height)), (left, left + rng.integers(2, width)), (height, width))

    images = [{"id": int(i), "height": height, "width": width} for i in rng.permutation(8)]
    annotations, results = [], []
    for image in images:
        for _ in range(rng.integers(1, 6)):
            mask = shape()
            box = coco_mask.toBbox(rle(mask)).tolist()
            crowd = int(rng.random() < 0.25)
            fields = {"image_id": image["id"], "category_id": int(rng.integers(1, 4)), "segmentation": rle(mask)}
            annotations.append(
                fields | {"id": len(annotations) + 1, "iscrowd": crowd, "area": float(mask.sum()), "bbox": box}
            )
        for _ in range(rng.choice([0, 5, 20, 330])):
            mask = shape()
            if rng.random() < 0.6:
                near = coco_mask.decode(annotations[rng.integers(len(annotations))]["segmentation"])
                mask = np.roll(near, rng.integers(-2, 3, 2), (0, 1))
            if rng.random() < 0.1:
                mask = np.zeros_like(mask)
            label, score = int(rng.integers(1, 4)), float(rng.integers(0, 8)) / 8
            fields = {"image_id": image["id"], "category_id": label, "score": score}
            results.append(fields | {"segmentation": rle(mask), "bbox": coco_mask.toBbox(rle(mask)).tolist()})
    categories = [{"id": category, "name": str(category)} for category in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def plain_cocoeval(truth, results, kind):
    """The twelve numbers of pycocotools on the whole data set at once."""
    unused = "bbox" if kind == "segm" else "segmentation"
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        found = coco.loadRes([{k: v for k, v in one.items() if k != unused} for one in copy.deepcopy(results)])
        evaluation = COCOeval(coco, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.fixture(params=["pycocotools", "faster-coco-eval"])
def backend(request):
    if request.param == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    return request.param


class TestAgainstPycocotools:
    @pytest.mark.parametrize("kind", ["segm", "bbox"])
    def test_the_sample_of_coco_has_the_numbers_of_pycocotools(self, truth, expected, kind, backend):
        evaluator = evaluated(truth, coco_updates(kind), backend=backend)
        numbers = evaluator.compute()
        assert twelve(numbers, kind) == pytest.approx(expected[kind]["stats"], abs=1e-9)
        names = {category["id"]: category["name"] for category in truth["categories"]}
        per_category = {names[int(key)]: ap for key, ap in expected[kind]["ap_per_category"].items()}
        ours = {name: of_class[f"{kind}_AP"] for name, of_class in numbers["per_class"].items()}
        assert {name: ap for name, ap in ours.items() if ap > -1} == pytest.approx(per_category, abs=1e-9)
        images_of = evaluator._images_of_categories()
        curves = np.array([evaluator._evaluate(category, images_of[category], kind)[0][:, 0] for category in names])
        per_iou = [curve[curve > -1].mean() for curve in curves.T]
        assert per_iou == pytest.approx(expected[kind]["ap_per_iou"], abs=1e-9)

    @pytest.mark.parametrize("seed", range(6))
    def test_random_cases_have_the_numbers_of_pycocotools(self, seed, backend):
        truth, results = random_case(seed)
        evaluator = InstanceSegmentationEvaluator(truth, backend=backend)
        for image_id in random.Random(seed).sample(range(8), 8):
            of_image = [one for one in results if one["image_id"] == image_id]
            scores, labels = ([one[key] for one in of_image] for key in ("score", "category_id"))
            evaluator.update(image_id, scores=scores, labels=labels, masks=[one["segmentation"] for one in of_image])
        numbers = evaluator.compute()
        for kind in ("segm", "bbox"):
            assert twelve(numbers, kind) == pytest.approx(plain_cocoeval(truth, results, kind), abs=1e-9)

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

    def test_predictions_are_coco_results(self, truth, expected):
        results = json.loads(json.dumps(list(evaluated(truth, coco_updates("segm")).predictions())))
        assert len(results) == 734
        assert plain_cocoeval(truth, results, "segm") == pytest.approx(expected["segm"]["stats"], abs=1e-9)

    def test_the_ground_truth_stays_as_it_is(self, truth):
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
    def test_a_detection_in_a_crowd_region_is_neither_right_nor_wrong(self):
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

    def test_of_each_class_the_100_best_detections_count(self):
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
        assert metrics.best_of_each_class(scores, labels).tolist() == [150, *range(99)]

    def test_what_the_ground_truth_has_nothing_of_is_minus_1(self):
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

    def test_images_that_never_come_are_missed(self):
        mask = rectangle((0, 50), (0, 50))
        truth = ground_truth((mask, 1, {}), images=((1, 100, 100), (2, 100, 100)))
        truth["annotations"].append({**truth["annotations"][0], "image_id": 2})
        numbers = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}}).compute()
        assert numbers["segm_AR_100"] == 0.5
        assert numbers["mean_iou"] == 0.5

    def test_nothing_found_is_zero_and_nothing_to_find_is_minus_1(self):
        truth = ground_truth((rectangle((0, 50), (0, 50)), 1, {}))
        numbers = InstanceSegmentationEvaluator(truth).compute()
        assert (numbers["segm_AP"], numbers["bbox_AR_100"], numbers["mean_iou"]) == (0, 0, 0)
        truth["annotations"] = []
        mask = rectangle((0, 9), (0, 9))
        numbers = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}}).compute()
        assert numbers["bbox_AP"] == -1
        assert "segm_AP" not in numbers

    def test_numbers_are_plain(self, truth):
        numbers = evaluated(truth, coco_updates("segm")).compute()
        assert json.loads(json.dumps(numbers)) == numbers
        assert {type(value) for name, value in numbers.items() if name != "per_class"} == {float}
        assert list(numbers)[:12] == [f"segm_{name}" for name in TWELVE]
        assert list(numbers)[-3:] == ["mean_iou", "mean_iou_class_blind", "per_class"]


class TestMeanIou:
    def test_two_classes_a_crowd_and_two_images_by_hand(self):
        size = (10, 10)
        truth = ground_truth(
            (rectangle((0, 4), (0, 10), size), 1, {}),  # 40 pixels
            (rectangle((2, 8), (0, 10), size), 1, {"iscrowd": 1}),  # 40 of its 60 pixels hold no object
            (rectangle((4, 5), (0, 10), size), 2, {}),  # 10 pixels
            images=((1, *size), (2, *size)),
            categories=(1, 2),
        )
        truth["annotations"].append({**truth["annotations"][0], "image_id": 2})
        first = [
            (0.9, 1, rectangle((1, 3), (0, 10), size)),
            (0.8, 1, rectangle((2, 6), (0, 10), size)),  # with the former rows 1 to 6: 50 pixels, 20 in the crowd
            (0.6, 1, rectangle((8, 10), (0, 5), size)),  # 10 pixels of nothing
            (0.5, 1, rectangle((0, 10), (0, 10), size)),  # not above the threshold
            (0.9, 2, rectangle((4, 5), (0, 5), size)),  # 5 of 10 pixels
        ]
        scores, labels, masks = zip(*first, strict=True)
        evaluator = evaluated(truth, {1: {"scores": scores, "labels": labels, "masks": masks}})
        evaluator.update(2, scores=[0.7], labels=[2], masks=[rectangle((0, 2), (0, 10), size)])
        numbers = evaluator.compute()
        # Class 1: image 1 finds 30 of 40; the union is 40 + 10, without the 20 in the crowd. Image 2 misses 40.
        # Class 2: image 1 finds 5 of 10; in image 2 there are 20 wrong pixels.
        first_class, second_class = 30 / (50 + 40), 5 / (10 + 20)
        assert numbers["per_class"]["class 1"]["iou"] == pytest.approx(first_class)
        assert numbers["per_class"]["class 2"]["iou"] == pytest.approx(second_class)
        assert numbers["mean_iou"] == pytest.approx((first_class + second_class) / 2)
        # As one class: rows 0 to 4 are objects; predicted are rows 1 to 5 and 10 pixels below; row 5 is crowd only.
        # Image 2: 20 of 40.
        assert numbers["mean_iou_class_blind"] == pytest.approx((40 + 20) / (50 + 10 + 40))

    def test_a_threshold_of_its_own(self):
        mask, half = rectangle((0, 10), (0, 10)), rectangle((0, 10), (0, 5))
        found = {1: {"scores": [0.3, 0.6], "labels": [1, 1], "masks": [mask, half]}}
        for threshold, iou in ((0.2, 1), (0.3, 0.5), (0.6, 0)):
            evaluator = evaluated(ground_truth((mask, 1, {})), found, iou_score_threshold=threshold)
            assert evaluator.mean_iou()["mean_iou"] == iou

    @pytest.mark.parametrize("seed", range(4))
    def test_random_masks_equal_plain_numpy(self, seed):
        truth, results = random_case(seed)
        predicted, objects, crowds = (np.zeros((4, 8, *rle_size(truth)), bool) for _ in range(3))
        for one in truth["annotations"]:
            canvas = crowds if one["iscrowd"] else objects
            canvas[one["category_id"], one["image_id"]] |= coco_mask.decode(one["segmentation"]).astype(bool)
        evaluator = InstanceSegmentationEvaluator(truth)
        for image_id in range(8):
            of_image = [one for one in results if one["image_id"] == image_id]
            for label in (1, 2, 3):
                of_class = sorted((one for one in of_image if one["category_id"] == label), key=lambda r: -r["score"])
                for one in of_class[:100]:
                    if one["score"] > 0.5:
                        predicted[label, image_id] |= coco_mask.decode(one["segmentation"]).astype(bool)
            scores, labels = ([one[key] for one in of_image] for key in ("score", "category_id"))
            evaluator.update(image_id, scores=scores, labels=labels, masks=[one["segmentation"] for one in of_image])
        numbers = evaluator.mean_iou()

        def iou(found, real, crowd):
            return (found & real).sum() / ((found | real) & ~(crowd & ~real)).sum()

        by_class = [iou(predicted[label], objects[label], crowds[label]) for label in (1, 2, 3)]
        assert [numbers["per_class"][str(label)]["iou"] for label in (1, 2, 3)] == pytest.approx(by_class)
        assert numbers["mean_iou"] == pytest.approx(np.mean(by_class))
        assert numbers["mean_iou_class_blind"] == pytest.approx(iou(predicted.any(0), objects.any(0), crowds.any(0)))


def rle_size(truth):
    return truth["images"][0]["height"], truth["images"][0]["width"]


class TestUpdate:
    def test_every_form_of_masks_and_numbers_gives_the_same(self):
        masks = np.stack([rectangle((0, 40), (0, 40)), rectangle((30, 80), (20, 60))])
        truth = ground_truth((masks[0], 1, {}), (masks[1], 1, {}))
        runs = {"size": [100, 100], "counts": [0, *[40, 60] * 39, 40, 6060]}
        assert (coco_mask.decode(coco_mask.frPyObjects(runs, 100, 100)) == masks[0]).all()
        text = {"size": [100, 100], "counts": rle(masks[1])["counts"].decode()}
        forms = [masks, torch.from_numpy(masks), list(masks), masks.astype(np.uint8), [rle(m) for m in masks]]
        forms.append([runs, text])
        numbers = [([0.75, 0.5], [1, 1]), (np.array([0.75, 0.5]), np.array([1, 1], np.uint8))]
        numbers.append((torch.tensor([0.75, 0.5], dtype=torch.bfloat16), torch.tensor([1, 1])))
        states = []
        for form in forms:
            for scores, labels in numbers:
                evaluator = InstanceSegmentationEvaluator(truth)
                evaluator.update(torch.tensor(1), scores=scores, labels=labels, masks=form)
                states.append(list(evaluator.predictions()))
        assert all(state == states[0] for state in states)
        assert [result["bbox"] for result in states[0]] == [[0, 0, 40, 40], [20, 30, 40, 50]]

    def test_given_boxes_are_those_of_the_bbox_numbers(self):
        mask = rectangle((0, 40), (0, 40))
        found = {"scores": [0.5], "labels": [1], "masks": [mask], "boxes": [[0, 0, 40, 20]]}
        numbers = evaluated(ground_truth((mask, 1, {})), {1: found}).compute()
        assert numbers["segm_AP"] == pytest.approx(1)
        assert numbers["bbox_AP50"] == pytest.approx(1)  # an IoU of one half
        assert numbers["bbox_AP"] == pytest.approx(0.1)

    def test_boxes_alone_give_bbox_numbers_alone(self):
        mask = rectangle((0, 40), (0, 40))
        found = {1: {"scores": [0.5], "labels": [1], "boxes": torch.tensor([[0.0, 0, 40, 40]])}}
        evaluator = evaluated(ground_truth((mask, 1, {})), found)
        numbers = evaluator.compute()
        assert list(numbers) == [*(f"bbox_{name}" for name in TWELVE), "per_class"]
        assert numbers["per_class"] == {"class 1": {"bbox_AP": pytest.approx(1), "num_objects": 1}}
        assert next(evaluator.predictions()).keys() == {"image_id", "category_id", "score", "bbox"}
        with pytest.raises(ValueError, match="boxes alone have no mean IoU"):
            evaluator.mean_iou()

    def test_a_ground_truth_of_boxes_gives_bbox_numbers_alone(self):
        truth = ground_truth()
        truth["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40], "segmentation": []}]
        found = {1: {"scores": [0.5], "labels": [1], "masks": [rectangle((0, 40), (0, 40))]}}
        numbers = evaluated(truth, found).compute()
        assert numbers["bbox_AP"] == pytest.approx(1)
        assert not any(name.startswith(("segm", "mean")) for name in numbers)

    @pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
    def test_masks_of_some_images_and_boxes_alone_of_others_are_refused(self, order):
        mask = rectangle((0, 40), (0, 40))
        truth = ground_truth((mask, 1, {}), images=[(i, 100, 100) for i in (1, 2, 3)])
        found = {
            1: {"scores": [0.5], "labels": [1], "masks": [mask]},
            2: {"scores": [], "labels": [], "boxes": []},  # says nothing about it
            3: {"scores": [0.5], "labels": [1], "boxes": [[0, 0, 40, 40]]},
        }
        evaluator = InstanceSegmentationEvaluator(truth)
        evaluator.update(order[0], **found[order[0]])
        evaluator.update(2, **found[2])
        with pytest.raises(ValueError, match=rf"^image {order[2]}: .* where other images have .*pass the same"):
            evaluator.update(order[2], **found[order[2]])
        other = evaluated(truth, {order[2]: found[order[2]]})
        with pytest.raises(ValueError, match="where other images have"):
            evaluator.merge(other.state())
        evaluator.reset()
        evaluator.update(order[2], **found[order[2]])

    def test_an_image_that_comes_twice_counts_once(self, hf_log):
        mask = rectangle((0, 40), (0, 40))
        evaluator = InstanceSegmentationEvaluator(ground_truth((mask, 1, {}), images=((1, 100, 100), (2, 9, 9))))
        for _ in range(3):
            evaluator.update(1, scores=[0.5], labels=[1], masks=[mask])
            evaluator.update(2, scores=[], labels=[])
        assert len(evaluator) == 2
        assert len(list(evaluator.predictions())) == 1
        assert [record.message[:7] for record in hf_log.records if "come before" in record.message] == ["image 1"]
        evaluator.reset()
        assert len(evaluator) == 0
        assert list(evaluator.predictions()) == []

    def test_two_different_records_of_an_image_merge_alike_in_either_order(self):
        masks = [rectangle((0, 40), (0, width)) for width in (30, 40)]
        truth = ground_truth((masks[1], 1, {}))
        one, other = (evaluated(truth, {1: {"scores": [0.5], "labels": [1], "masks": [mask]}}) for mask in masks)
        states = one.state(), other.state()
        one.merge(states[1])
        other.merge(states[0])
        assert list(one.predictions()) == list(other.predictions())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_id": 5}, "image id 5 is none of the 1 of the ground truth; pass an id"),
            ({"labels": [1, 7]}, r"image 1: labels \[7\] are no category ids .* \[1\]; translate"),
            ({"labels": [1.0, 1.0]}, "are no whole numbers; pass"),
            ({"scores": [0.5]}, "different numbers of {'scores': 1, 'labels': 2, 'masks': 2}; pass one"),
            ({"scores": [0.5, float("nan")]}, "not one finite number a detection"),
            ({"scores": ["high", "low"]}, "are no numbers"),
            ({"masks": None}, "2 detections have neither masks nor boxes"),
            ({"masks": [np.ones((100, 99), bool)] * 2}, "mask 0: a bitmap of 100x99 .* 100x100"),
            ({"masks": [np.ones((100, 100))] * 2}, r"mask 0: float64 of shape \(100, 100\) is no mask"),
            ({"masks": [rle(np.ones((9, 9)))] * 2}, r"mask 0: the RLE's size \[9, 9\] is not .* \[100, 100\]"),
            ({"masks": [{"size": [100, 100], "counts": "11"}] * 2}, "mask 0: the RLE's counts"),
            ({"boxes": [[0, 0, 9, float("inf")], [0, 0, 9, 9]]}, "not finite x0, y0, x1, y1"),
            ({"boxes": [[50, 50, 20, 20], [0, 0, 9, 9]]}, "with x0 <= x1 and y0 <= y1; convert"),
            ({"boxes": [[0, 0, 9], [0, 0, 9]]}, "not finite x0, y0, x1, y1"),
        ],
    )
    def test_what_cannot_be_is_refused_and_leaves_no_trace(self, change, message):
        mask = rectangle((0, 40), (0, 40))
        evaluator = InstanceSegmentationEvaluator(ground_truth((mask, 1, {})))
        found = {"image_id": 1, "scores": [0.5, 0.4], "labels": [1, 1], "masks": [mask, mask]} | change
        with pytest.raises(ValueError, match=message):
            evaluator.update(found.pop("image_id"), **found)
        assert len(evaluator) == 0

    def test_100_compact_masks_cost_less_than_100_kilobytes(self):
        rng = np.random.default_rng(0)
        truth = ground_truth(images=[(i, 480, 640) for i in range(500)])
        truth["annotations"] = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 9, 9]} for i in range(500)]
        corners = rng.integers(0, 400, (100, 2))
        masks = [rle(rectangle((top, top + 40), (left, left + 30), (480, 640))) for top, left in corners]
        assert 50 < np.mean([len(mask["counts"]) for mask in masks]) < 150
        found = {"scores": rng.random(100), "labels": np.ones(100, int), "masks": masks}
        evaluator = InstanceSegmentationEvaluator(truth)
        tracemalloc.start()
        try:
            for image_id in range(50):
                evaluator.update(image_id, **found)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept / 50 < 100_000
        for image_id in range(50, 500):
            evaluator.update(image_id, **found)
        assert len(evaluator) == 500
        assert len(pickle.dumps(evaluator.state())) / 500 < 100_000


def test_the_example_runs():
    results = doctest.testmod(metrics)
    assert results.attempted
    assert not results.failed


class TestGroundTruth:
    def test_missing_fields_are_derived(self):
        mask = rectangle((10, 20), (30, 70))
        truth = ground_truth((mask, 1, {}))
        polygon = {"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 40, 0, 40, 40, 0, 40]]}
        boxed = {"image_id": 1, "category_id": 1, "bbox": [50, 50, 40, 30]}
        truth["annotations"] += [polygon, boxed]
        objects = InstanceSegmentationEvaluator(truth)._objects[1]
        assert objects.boxes.tolist() == [[30, 10, 40, 10], [0, 0, 40, 40], [50, 50, 40, 30]]
        assert objects.areas.tolist() == [400, 1600, 1200]
        assert objects.is_crowd.tolist() == [False] * 3

    def test_annotations_without_a_shape_are_no_objects_and_are_counted(self, hf_log):
        mask = rectangle((10, 20), (30, 70))
        truth = ground_truth((mask, 1, {}))
        head = {"image_id": 1, "category_id": 1}
        shapeless = [
            {"segmentation": []},
            {"segmentation": None, "bbox": [5, 5, 0, 9]},
            {"bbox": None},
            {"segmentation": [[1, 1, 2, 2]]},
        ]
        truth["annotations"] += [head | shape for shape in shapeless]
        truth["annotations"].append(head | {"bbox": [0, 0, 9, 9]})
        evaluator = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}})
        messages = [record.message for record in hf_log.records]
        assert [message[:33] for message in messages] == [
            "4 annotations have no usable shap",
            "1 annotations have a box and no m",
        ]
        numbers = evaluator.compute()
        assert numbers["segm_AP"] == pytest.approx(1)
        assert numbers["bbox_AR_100"] == 0.5
        assert numbers["per_class"]["class 1"]["num_objects"] == 2

    def test_rle_does_without_the_size_of_the_image(self):
        mask = rectangle((10, 20), (30, 70))
        truth = ground_truth((mask, 1, {}))
        truth["images"] = [{"id": 1}]
        numbers = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}}).compute()
        assert (numbers["segm_AP"], numbers["mean_iou"]) == pytest.approx((1, 1))
        with pytest.raises(ValueError, match="a bitmap of 9x9 is not of the picture's size 100x100"):
            evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [np.ones((9, 9), bool)]}})

    def test_an_image_without_size_and_objects_takes_that_of_its_masks(self):
        truth = ground_truth((rectangle((10, 20), (30, 70)), 1, {}), images=((1, 100, 100), (2, None, None)))
        evaluator = evaluated(truth, {2: {"scores": [0.9], "labels": [1], "masks": [np.ones((10, 10), bool)]}})
        other = InstanceSegmentationEvaluator(truth)
        other.merge(evaluator.state())
        assert other.mean_iou() == evaluator.mean_iou()
        assert other.mean_iou()["mean_iou"] == 0

    def test_categories_of_the_same_name_are_told_apart(self):
        truth = ground_truth(categories=(1, 2, 3))
        truth["categories"][2]["name"] = "class 1"
        assert list(InstanceSegmentationEvaluator(truth).compute()["per_class"]) == [
            "class 1 (id 1)",
            "class 2",
            "class 1 (id 3)",
        ]

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("image_id", 9, r"1 annotations have an unknown image_id, .*\[\(77, 9\)\]; add"),
            ("category_id", 9, r"1 annotations have an unknown category_id, .*\[\(77, 9\)\]; add"),
            ("category_id", None, r"unknown category_id, .*\[\(77, None\)\]; add"),
            ("bbox", [1, 2, 3], r"image 1, annotation 77: bbox \[1, 2, 3\] is not"),
            ("bbox", [1, 2, 3, float("nan")], "annotation 77: bbox .* four finite numbers"),
            ("area", -4, "annotation 77: area -4 is not a number of at least 0"),
            ("segmentation", [[1, 2, 3]], "annotation 77: polygon 0 has 3 numbers"),
        ],
    )
    def test_annotations_that_cannot_be_read_are_named(self, field, value, message):
        truth = ground_truth((rectangle((10, 20), (30, 70)), 1, {"id": 77, field: value}))
        with pytest.raises(ValueError, match=message):
            InstanceSegmentationEvaluator(truth)

    def test_ids_that_are_there_twice_and_missing_sizes_are_refused(self):
        truth = ground_truth(images=((1, 9, 9), (2, 9, 9), (1, 9, 9)))
        with pytest.raises(ValueError, match=r"1 image ids are there twice: \[1\]"):
            InstanceSegmentationEvaluator(truth)
        with pytest.raises(ValueError, match=r"1 category ids are there twice: \[3\]"):
            InstanceSegmentationEvaluator(ground_truth(categories=(3, 3)))
        truth = ground_truth(images=((1, None, None),))
        polygon = [[0, 0, 4, 0, 4, 4]]
        truth["annotations"] = [{"id": 5, "image_id": 1, "category_id": 1, "segmentation": polygon}]
        with pytest.raises(ValueError, match="image 1, annotation 5: the image has no height and width"):
            InstanceSegmentationEvaluator(truth)
        with pytest.raises(ValueError, match=r"no \['categories'\]"):
            InstanceSegmentationEvaluator({"images": [], "annotations": []})

    def test_settings_are_checked(self):
        with pytest.raises(ValueError, match=r"iou_score_threshold 1.5 is no score in \[0, 1\]"):
            InstanceSegmentationEvaluator(ground_truth(), iou_score_threshold=1.5)
        with pytest.raises(ValueError, match="backend 'coco' is not one of"):
            InstanceSegmentationEvaluator(ground_truth(), backend="coco")


def outputs_of(masks, scores, labels, num_classes):
    """Model outputs that show `masks` (B, Q, h, w) bool, one class a query."""
    logits = torch.full((*masks.shape[:2], num_classes), -20.0)
    logits.scatter_(2, labels[..., None], torch.logit(scores)[..., None])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(*masks.shape[:2], 4)
    return SimpleNamespace(logits=logits, pred_boxes=boxes, pred_masks=masks.float() * 8 - 4)


class TestDetect:
    def outputs(self, classes=3):
        generator = torch.Generator().manual_seed(0)
        return SimpleNamespace(
            logits=torch.randn(2, 9, classes, generator=generator),
            pred_boxes=torch.rand(2, 9, 4, generator=generator),
            pred_masks=torch.randn(2, 9, 12, 12, generator=generator),
        )

    @pytest.mark.parametrize("threshold", [None, 0.7])
    @pytest.mark.parametrize("padded", [False, True])
    def test_equals_the_instances_of_the_image_processor(self, threshold, padded):
        outputs, sizes = self.outputs(), [(37, 61), (80, 20)]
        pixel_mask = torch.zeros(2, 48, 48, dtype=torch.int64)
        pixel_mask[0, :30], pixel_mask[1, :, :20] = 1, 1
        pixel_mask = pixel_mask if padded else None
        found = detect(outputs, sizes, score_threshold=threshold, pixel_mask=pixel_mask)
        theirs = RfDetrImageProcessor().post_process_instance_segmentation(
            outputs, -1 if threshold is None else threshold, 0.0, sizes, True, pixel_mask=pixel_mask
        )
        for ours, their in zip(found, theirs, strict=True):
            segments = their["segments_info"]
            assert len(segments) == 9 if threshold is None else 0 < len(segments) < 9
            assert ours["masks"] == their["segmentation"]
            assert ours["labels"].tolist() == [segment["label_id"] for segment in segments]
            assert ours["scores"].tolist() == [segment["score"] for segment in segments]
            assert ours["boxes"].tolist() == [segment["box"] for segment in segments]

    def test_a_detection_model_has_no_masks(self):
        outputs = self.outputs()
        outputs.pred_masks = None
        (found, _) = detect(outputs, torch.tensor([[37, 61], [80, 20]]))
        assert found["masks"] is None
        assert found["boxes"].shape == (9, 4)
        with pytest.raises(ValueError, match="target_sizes"):
            detect(outputs, None)

    def test_of_a_class_at_most_100_are_kept(self):
        outputs = SimpleNamespace(logits=torch.zeros(1, 150, 2), pred_boxes=torch.rand(1, 150, 4))
        outputs.logits[..., 1] = -torch.linspace(1, 2, 150)
        outputs.logits[0, 120:, 1] = 1
        (found,) = detect(outputs, [(10, 10)])
        assert np.bincount(found["labels"]).tolist() == [100, 30]


class Answers(torch.nn.Module):
    """A model that answers each batch with the outputs prepared for it."""

    def __init__(self, answers, id2label):
        super().__init__()
        self.answers, self.config = iter(answers), SimpleNamespace(id2label=id2label)
        self.device = torch.device("cpu")

    def forward(self, pixel_values, pixel_mask=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        answer = next(self.answers)
        assert len(pixel_values) == len(answer.logits)
        return answer


class Pictures:
    """Pictures with one class, as an InstanceDataset."""

    id2label, category_ids = {0: "class 4"}, [4]

    def __init__(self, pictures, truth):
        self.pictures, self.truth = pictures, truth

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return {"image": self.pictures[index], "image_id": self.truth["images"][index]["id"]}

    def coco(self):
        return self.truth


class Drawn:
    """Three pictures of 24 x 24, with an object of each of two classes, as an InstanceDataset."""

    id2label, category_ids = {0: "roof", 1: "pool"}, [4, 9]

    def __init__(self):
        self.pictures = [Image.new("RGB", (24, 24))] * 3
        shapes = [rectangle((0, 10), (0, 10), (24, 24)), rectangle((12, 20), (8, 24), (24, 24))]
        self.masks = torch.from_numpy(np.stack([[np.roll(m, 2 * i, 1) for m in shapes] for i in range(3)]))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": self.pictures[index], "image_id": 100 + index, "annotations": []}

    def coco(self):
        annotations = [
            {"image_id": 100 + index, "category_id": category, "segmentation": rle(mask)}
            for index in range(3)
            for category, mask in zip(self.category_ids, self.masks[index].numpy(), strict=True)
        ]
        categories = [{"id": 4, "name": "roof"}, {"id": 9, "name": "pool"}]
        images = [{"id": 100 + index, "height": 24, "width": 24} for index in range(3)]
        return {"images": images, "annotations": annotations, "categories": categories}


class TestEvaluateAModel:
    def test_a_model_that_shows_the_objects_under_other_labels_has_an_ap_of_1(self):
        dataset = Drawn()
        # Three queries: the two objects, and a third with a label that the data set does not have.
        masks = torch.cat([dataset.masks, dataset.masks[:, :1]], dim=1)
        labels = torch.tensor([[2, 1, 0]] * 3)
        answers = [
            outputs_of(masks[part], torch.tensor([[0.9, 0.8, 0.95]] * 3)[part], labels[part], 3)
            for part in (slice(0, 2), slice(2, 3))
        ]
        model = Answers(answers, {0: "__background__", 1: "pool", 2: "roof"}).train()
        processor = RfDetrImageProcessor(size=24, do_pad=False)
        numbers = evaluate_instance_segmentation(model, processor, dataset, batch_size=2, progress=False)
        assert (numbers["segm_AP"], numbers["mean_iou"]) == pytest.approx((1, 1))
        assert numbers["per_class"]["pool"]["num_objects"] == 3
        assert model.training

    def test_pictures_count_upright_and_padding_is_cut(self):
        stored, turned = io.BytesIO(), Image.new("RGB", (40, 20))
        turned.getexif()[0x0112] = 6  # by 90 degrees: it is 40 high and 20 wide
        turned.save(stored, "png", exif=turned.getexif())
        pictures = [Image.open(stored), Image.new("RGB", (40, 20))]
        halves = [rectangle((0, 40), (0, 10), (40, 20)), rectangle((0, 10), (0, 40), (20, 40))]
        truth = ground_truth((halves[0], 4, {}), images=((100, 40, 20), (101, 20, 40)), categories=(4,))
        truth["annotations"].append({"image_id": 101, "category_id": 4, "segmentation": rle(halves[1])})
        dataset = Pictures(pictures, truth)
        masks = torch.zeros(2, 1, 40, 40, dtype=torch.bool)  # the model's input, padded
        for mask, half in zip(masks[:, 0], halves, strict=True):
            mask[: half.shape[0], : half.shape[1]] = torch.from_numpy(half)
        masks[0, 0, :, 20:], masks[1, 0, 20:] = True, True  # in the padding
        answer = outputs_of(masks, torch.full((2, 1), 0.9), torch.zeros(2, 1, dtype=torch.int64), 1)
        processor = RfDetrImageProcessor(size={"shortest_edge": 20, "longest_edge": 40})
        numbers = evaluate_instance_segmentation(Answers([answer], {0: "class 4"}), processor, dataset, progress=False)
        assert (numbers["segm_AP"], numbers["mean_iou"]) == pytest.approx((1, 1))

    def test_a_model_has_the_numbers_of_pycocotools_on_its_instances(self):
        model = small_model(num_labels=2)
        processor = RfDetrImageProcessor.from_config(model.config)
        noise = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), np.uint8)
        dataset = Drawn()  # its names, and other pictures
        dataset.pictures = [Image.fromarray(pixels) for pixels in noise]
        results = []
        for image_id, picture in enumerate(dataset.pictures, 100):
            with torch.no_grad():
                outputs = model(**processor(picture, return_tensors="pt"))
            (found,) = processor.post_process_instance_segmentation(outputs, -1, 0.0, [(60, 80)], True)
            for segment, mask in zip(found["segments_info"], found["segmentation"], strict=True):
                category = dataset.category_ids[segment["label_id"]]
                fields = {"image_id": image_id, "category_id": category, "score": segment["score"]}
                results.append(fields | {"segmentation": mask})
        # The objects are what some of the instances show, so that these are right.
        annotations = []
        for number, one in enumerate(results[::3], 1):
            area, box = float(coco_mask.area(one["segmentation"])), coco_mask.toBbox(one["segmentation"]).tolist()
            annotations.append({**one, "id": number, "iscrowd": 0, "area": area, "bbox": box})
        assert all(annotation["area"] for annotation in annotations)
        images = [{"id": 100 + index, "height": 60, "width": 80} for index in range(3)]
        truth = {**dataset.coco(), "images": images, "annotations": annotations}
        dataset.coco = lambda: truth
        numbers = evaluate_instance_segmentation(model, processor, dataset, batch_size=2, progress=False)
        assert twelve(numbers, "segm") == pytest.approx(plain_cocoeval(truth, results, "segm"), abs=1e-9)
        assert 0.1 < numbers["segm_AP"] < 1

    def test_the_numbers_of_a_detection_model_are_of_boxes(self):
        answer = outputs_of(Drawn().masks, torch.full((3, 2), 0.9), torch.tensor([[0, 1]] * 3), 2)
        answer.pred_masks = None
        model = Answers([answer], {0: "roof", 1: "pool"}).eval()
        processor = RfDetrImageProcessor(size=24, do_pad=False)
        numbers = evaluate_instance_segmentation(model, processor, Drawn(), progress=False)
        assert "segm_AP" not in numbers
        assert 0 <= numbers["bbox_AP"] < 1
        assert not model.training


class TestLabels:
    def dataset(self, *names):
        return SimpleNamespace(id2label=dict(enumerate(names)), category_ids=[10 * (i + 1) for i in range(len(names))])

    def test_labels_are_matched_by_name(self):
        config = SimpleNamespace(id2label={0: "__background__", 1: "roof", 2: "tree", 3: "pool"})
        assert category_of_labels(config, self.dataset("pool", "roof")) == {3: 10, 1: 20}

    def test_without_names_they_are_taken_in_order(self):
        config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
        assert category_of_labels(config, self.dataset("pool", "roof")) == {0: 10, 1: 20}
        with pytest.raises(ValueError, match=r"\['pool', 'roof', 'tree'\] of the data set .*LABEL_0"):
            category_of_labels(config, self.dataset("pool", "roof", "tree"))

    def test_the_same_map_may_name_classes_twice(self):
        config = SimpleNamespace(id2label={0: "roof", 1: "roof"})
        assert category_of_labels(config, self.dataset("roof", "roof")) == {0: 10, 1: 20}

    @pytest.mark.parametrize(
        ("model_names", "names", "message"),
        [
            (["roof", "tree"], ["roof", "pool"], r"\['pool'\] of the data set .* \['roof', 'tree'\]; pass id2label"),
            (["roof", "roof", "x"], ["roof"], r"\['roof'\] of the data set are not the name of one label"),
            (["roof", "tree"], ["roof", "roof"], r"are named \['roof'\]; give each"),
        ],
    )
    def test_names_that_do_not_tell_are_refused(self, model_names, names, message):
        config = SimpleNamespace(id2label=dict(enumerate(model_names)))
        with pytest.raises(ValueError, match=message):
            category_of_labels(config, self.dataset(*names))
