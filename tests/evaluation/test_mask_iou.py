"""Mean IoU of masks. Oracles: arithmetic and plain numpy."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from evaluation_cases import evaluated, ground_truth, random_case, rectangle
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator


class TestMeanIou:
    def test_two_classes_with_a_crowd_in_two_images_by_hand(self):
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

    def test_the_score_threshold_can_be_changed(self):
        mask, half = rectangle((0, 10), (0, 10)), rectangle((0, 10), (0, 5))
        found = {1: {"scores": [0.3, 0.6], "labels": [1, 1], "masks": [mask, half]}}
        for threshold, iou in ((0.2, 1), (0.3, 0.5), (0.6, 0)):
            evaluator = evaluated(ground_truth((mask, 1, {})), found, iou_score_threshold=threshold)
            assert evaluator.mean_iou()["mean_iou"] == iou

    @pytest.mark.parametrize("seed", range(4))
    def test_random_masks_equal_plain_numpy(self, seed):
        truth, results = random_case(seed)
        predicted, objects, crowds = (
            np.zeros((4, 8, *(truth["images"][0][side] for side in ("height", "width"))), bool) for _ in range(3)
        )
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
