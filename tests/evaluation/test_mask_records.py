"""Detections that an evaluator is given: their forms, what is kept of them, and what is refused."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from evaluation_cases import TWELVE, evaluated, ground_truth, rectangle, rle
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator


class TestUpdate:
    def test_every_form_of_masks_and_numbers_gives_the_same_record(self):
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
                states.append([*evaluator.predictions("segm"), *evaluator.predictions("bbox")])
        assert all(state == states[0] for state in states)
        assert [row["bbox"] for row in states[0][2:]] == [[0, 0, 40, 40], [20, 30, 40, 50]]

    def test_given_boxes_are_used_for_the_bbox_metrics(self):
        mask = rectangle((0, 40), (0, 40))
        found = {"scores": [0.5], "labels": [1], "masks": [mask], "boxes": [[0, 0, 40, 20]]}
        numbers = evaluated(ground_truth((mask, 1, {})), {1: found}).compute()
        assert numbers["segm_AP"] == pytest.approx(1)
        assert numbers["bbox_AP50"] == pytest.approx(1)  # an IoU of one half
        assert numbers["bbox_AP"] == pytest.approx(0.1)

    def test_detections_without_masks_have_bbox_metrics_only(self):
        mask = rectangle((0, 40), (0, 40))
        found = {1: {"scores": [0.5], "labels": [1], "boxes": torch.tensor([[0.0, 0, 40, 40]])}}
        evaluator = evaluated(ground_truth((mask, 1, {})), found)
        numbers = evaluator.compute()
        assert list(numbers) == [*(f"bbox_{name}" for name in TWELVE), "per_class"]
        assert numbers["per_class"] == {"class 1": {"bbox_AP": pytest.approx(1), "num_objects": 1}}
        assert next(evaluator.predictions()).keys() == {"image_id", "category_id", "score", "bbox"}
        with pytest.raises(ValueError, match=r"`kind` must be .* got 'segm'"):
            next(evaluator.predictions("segm"))
        with pytest.raises(ValueError, match="mean_iou"):
            evaluator.mean_iou()

    def test_a_ground_truth_without_masks_has_bbox_metrics_only(self):
        truth = ground_truth()
        truth["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40], "segmentation": []}]
        found = {1: {"scores": [0.5], "labels": [1], "masks": [rectangle((0, 40), (0, 40))]}}
        numbers = evaluated(truth, found).compute()
        assert numbers["bbox_AP"] == pytest.approx(1)
        assert not any(name.startswith(("segm", "mean")) for name in numbers)

    @pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
    def test_masks_in_some_images_and_only_boxes_in_others_are_refused(self, order):
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
        with pytest.raises(ValueError, match=rf"^image {order[2]}: .*(masks after boxes|boxes only after masks)"):
            evaluator.update(order[2], **found[order[2]])
        other = evaluated(truth, {order[2]: found[order[2]]})
        with pytest.raises(ValueError, match=rf"^image {order[2]}: .*masks"):
            evaluator.merge(other.state())
        evaluator.reset()
        evaluator.update(order[2], **found[order[2]])

    def test_a_repeated_image_counts_once(self, hf_log):
        mask = rectangle((0, 40), (0, 40))
        evaluator = InstanceSegmentationEvaluator(ground_truth((mask, 1, {}), images=((1, 100, 100), (2, 9, 9))))
        for _ in range(3):
            evaluator.update(1, scores=[0.5], labels=[1], masks=[mask])
            evaluator.update(2, scores=[], labels=[])
        assert len(evaluator) == 2
        assert len(list(evaluator.predictions())) == 1
        assert [record.message[:7] for record in hf_log.records if "repeated" in record.message] == ["image 1"]
        evaluator.reset()
        assert len(evaluator) == 0
        assert list(evaluator.predictions()) == []

    def test_two_records_of_an_image_merge_to_the_same_in_either_order(self):
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
            ({"image_id": 5}, "image_id.*one of the 1 .*5"),
            ({"labels": [1, 7]}, r"image 1: `labels` .*\[1\].*\[7\]"),
            ({"labels": [1.0, 1.0]}, r"image 1: `labels` .*integers.*\[1\.0, 1\.0\]"),
            ({"scores": [0.5]}, "same length.*{'scores': 1, 'labels': 2, 'masks': 2}"),
            ({"scores": [0.5, float("nan")]}, r"`scores` .*finite.*\[0\.5, nan\]"),
            ({"scores": ["high", "low"]}, r"`scores` .*numbers.*\['high', 'low'\]"),
            ({"masks": None}, "`masks` or `boxes`.* 2 detections"),
            ({"masks": [np.ones((100, 99), bool)] * 2}, "mask 0: .* 100x100 .*, got 100x99"),
            ({"masks": [np.ones((100, 100))] * 2}, r"mask 0: .*float64 of shape \(100, 100\)"),
            ({"masks": [rle(np.ones((9, 9)))] * 2}, r"mask 0: .* \[100, 100\], .* got \[9, 9\]"),
            ({"masks": [{"size": [100, 100], "counts": "11"}] * 2}, "mask 0: the RLE's counts"),
            ({"boxes": [[0, 0, 9, float("inf")], [0, 0, 9, 9]]}, "`boxes` .*finite.*inf"),
            ({"boxes": [[50, 50, 20, 20], [0, 0, 9, 9]]}, "`boxes` .*x0 <= x1.*50"),
            ({"boxes": [[0, 0, 9], [0, 0, 9]]}, r"`boxes` .*\[0\.0, 0\.0, 9\.0\]"),
        ],
    )
    def test_invalid_detections_are_refused_and_change_nothing(self, change, message):
        mask = rectangle((0, 40), (0, 40))
        evaluator = InstanceSegmentationEvaluator(ground_truth((mask, 1, {})))
        found = {"image_id": 1, "scores": [0.5, 0.4], "labels": [1, 1], "masks": [mask, mask]} | change
        with pytest.raises(ValueError, match=message):
            evaluator.update(found.pop("image_id"), **found)
        assert len(evaluator) == 0

    def test_100_compact_masks_cost_less_than_100_kilobytes(self):
        rng = np.random.default_rng(0)
        truth = ground_truth(images=[(i, 480, 640) for i in range(100)])
        truth["annotations"] = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 9, 9]} for i in range(100)]
        corners = rng.integers(0, 400, (100, 2))
        masks = [rle(rectangle((top, top + 40), (left, left + 30), (480, 640))) for top, left in corners]
        assert 50 < np.mean([len(mask["counts"]) for mask in masks]) < 150
        found = {"scores": rng.random(100), "labels": np.ones(100, int), "masks": masks}
        evaluator = InstanceSegmentationEvaluator(truth)
        tracemalloc.start()
        try:
            for image_id in range(20):
                evaluator.update(image_id, **found)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept / 20 < 100_000
        for image_id in range(20, 100):
            evaluator.update(image_id, **found)
        assert len(evaluator) == 100
        assert len(pickle.dumps(evaluator.state())) / 100 < 100_000
