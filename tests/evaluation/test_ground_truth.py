"""Ground truth that an evaluator reads: what is derived, what is ignored with a warning, and what is refused."""

import re

import numpy as np
import pytest

from evaluation_cases import (
    evaluated,
    ground_truth,
    of_kind,
    plain_cocoeval,
    random_case,
    rectangle,
    rle,
    twelve,
    updates_of,
)
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator


class TestGroundTruth:
    def test_missing_fields_are_derived(self):
        mask = rectangle((10, 20), (30, 70))
        truth = ground_truth((mask, 1, {}))
        polygon = {"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 40, 0, 40, 40, 0, 40]]}
        boxed = {"image_id": 1, "category_id": 1, "bbox": [50, 50, 40, 30]}
        truth["annotations"] += [polygon, boxed]
        objects = InstanceSegmentationEvaluator(truth).ground_truth.objects[1]
        assert objects.boxes.tolist() == [[30, 10, 40, 10], [0, 0, 40, 40], [50, 50, 40, 30]]
        assert objects.areas.tolist() == [400, 1600, 1200]
        assert objects.is_crowd.tolist() == [False] * 3

    def test_a_detection_of_an_object_without_a_mask_is_neither_right_nor_wrong(self):
        mask, inside, elsewhere = (rectangle(rows, (30, 70)) for rows in ((10, 20), (42, 58), (80, 90)))
        truth = ground_truth((mask, 1, {}))
        truth["annotations"].append({"image_id": 1, "category_id": 1, "bbox": [28, 40, 44, 20]})
        found = {"scores": [0.9, 0.8, 0.7], "labels": [1, 1, 1], "masks": [inside, elsewhere, mask]}
        evaluator = InstanceSegmentationEvaluator(truth)
        evaluator.update(1, **found)
        numbers = evaluator.compute()
        # Of the two detections that count, the better one is wrong: the precision is 1/2 at every recall.
        assert numbers["segm_AP"] == pytest.approx(0.5)
        # By hand: 10 x 40 pixels are both, 10 x 40 are only predicted, and those inside the box are ignored.
        assert numbers["per_class"]["class 1"]["iou"] == pytest.approx(400 / 800)

    def test_annotations_without_mask_and_box_are_ignored_and_counted(self, hf_log):
        mask = rectangle((10, 20), (30, 70))
        truth = ground_truth((mask, 1, {}))
        head = {"image_id": 1, "category_id": 1}
        shapeless = [{"segmentation": []}, {"bbox": None}, {"segmentation": [[1, 1, 2, 2]]}]
        truth["annotations"] += [head | shape for shape in shapeless]
        truth["annotations"].append(head | {"bbox": [0, 0, 9, 9]})
        truth["annotations"].append(head | {"bbox": [5, 5, 0, 9]})
        evaluator = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}})
        assert [re.split(" and |: ", record.message)[0] for record in hf_log.records] == [
            "3 annotations have neither a mask nor a box",
            "2 annotations have a box but no mask",
            "1 annotations have a box without an area",
        ]
        numbers = evaluator.compute()
        assert numbers["segm_AP"] == pytest.approx(1)
        assert numbers["bbox_AR_100"] == pytest.approx(1 / 3)
        assert numbers["per_class"]["class 1"]["num_objects"] == 3

    @pytest.mark.parametrize("seed", range(4))
    def test_objects_without_pixels_and_boxes_without_area_count_as_in_pycocotools(self, seed):
        truth, results = random_case(seed)
        rng = np.random.default_rng(seed)
        for annotation in truth["annotations"]:
            height, width = annotation["segmentation"]["size"]
            change = rng.integers(6)
            if change == 0:
                annotation |= {"segmentation": rle(np.zeros((height, width), bool)), "area": 0.0}
            elif change == 1:
                annotation |= {
                    "segmentation": {"size": [height, width], "counts": [height * width]},
                    "bbox": [0, 0, 0, 0],
                }
            elif change == 2:
                annotation["segmentation"] = [[5.2, 5.2, 5.3, 5.2, 5.3, 5.3]]  # covers no pixel
            elif change == 3:
                annotation["bbox"][2 + rng.integers(2)] = 0
        metrics = evaluated(truth, updates_of(results)).compute()
        for kind in ("segm", "bbox"):
            oracle = plain_cocoeval(truth, of_kind(kind, results), kind)
            assert twelve(metrics, kind) == pytest.approx(oracle.stats, abs=1e-9)
        assert sum(of_class["num_objects"] for of_class in metrics["per_class"].values()) == sum(
            not annotation["iscrowd"] for annotation in truth["annotations"]
        )

    def test_rle_does_not_require_the_size_of_the_image(self):
        mask = rectangle((10, 20), (30, 70))
        truth = ground_truth((mask, 1, {}))
        truth["images"] = [{"id": 1}]
        numbers = evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [mask]}}).compute()
        assert (numbers["segm_AP"], numbers["mean_iou"]) == pytest.approx((1, 1))
        with pytest.raises(ValueError, match=r"image's size 100x100.*got 9x9"):
            evaluated(truth, {1: {"scores": [0.9], "labels": [1], "masks": [np.ones((9, 9), bool)]}})

    def test_an_image_without_size_and_objects_has_the_size_of_its_detected_masks(self):
        truth = ground_truth((rectangle((10, 20), (30, 70)), 1, {}), images=((1, 100, 100), (2, None, None)))
        evaluator = evaluated(truth, {2: {"scores": [0.9], "labels": [1], "masks": [np.ones((10, 10), bool)]}})
        other = InstanceSegmentationEvaluator(truth)
        other.merge(evaluator.state())
        assert other.mean_iou() == evaluator.mean_iou()
        assert other.mean_iou()["mean_iou"] == 0

    def test_categories_with_the_same_name_are_distinguished_by_id(self):
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
            ("image_id", 9, r"image_id .* got 1 .*\[\(77, 9\)\]"),
            ("category_id", 9, r"category_id .* got 1 .*\[\(77, 9\)\]"),
            ("category_id", None, r"category_id .*\[\(77, None\)\]"),
            ("bbox", [1, 2, 3], r"image 1, annotation 77: `bbox` .*\[1, 2, 3\]"),
            ("bbox", [1, 2, 3, float("nan")], "annotation 77: `bbox` .*finite.*nan"),
            ("area", -4, "annotation 77: `area` .*-4"),
            ("segmentation", [[1, 2, 3]], "annotation 77: polygon 0 .* 3 coordinates"),
        ],
    )
    def test_an_error_names_the_invalid_annotation(self, field, value, message):
        truth = ground_truth((rectangle((10, 20), (30, 70)), 1, {"id": 77, field: value}))
        with pytest.raises(ValueError, match=message):
            InstanceSegmentationEvaluator(truth)

    def test_repeated_ids_and_missing_sizes_are_refused(self):
        truth = ground_truth(images=((1, 9, 9), (2, 9, 9), (1, 9, 9)))
        with pytest.raises(ValueError, match=r"image ids .*unique.*\[1\]"):
            InstanceSegmentationEvaluator(truth)
        with pytest.raises(ValueError, match=r"category ids .*unique.*\[3\]"):
            InstanceSegmentationEvaluator(ground_truth(categories=(3, 3)))
        truth = ground_truth(images=((1, None, None),))
        polygon = [[0, 0, 4, 0, 4, 4]]
        truth["annotations"] = [{"id": 5, "image_id": 1, "category_id": 1, "segmentation": polygon}]
        with pytest.raises(ValueError, match=r"image 1, annotation 5: .*height.*width"):
            InstanceSegmentationEvaluator(truth)
        with pytest.raises(ValueError, match=r"`coco`.*\['categories'\]"):
            InstanceSegmentationEvaluator({"images": [], "annotations": []})

    def test_settings_are_checked(self):
        with pytest.raises(ValueError, match=r"iou_score_threshold.*\[0, 1\].*1\.5"):
            InstanceSegmentationEvaluator(ground_truth(), iou_score_threshold=1.5)
