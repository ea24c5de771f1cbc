"""How detections are matched with the ground truth, by hand arithmetic."""

import numpy as np
import pytest
from PIL import Image

from evaluation_cases import SCENE, SCENE_PROCESSOR, ScriptedModel, rectangle, rle, scene, scene_model
from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.evaluation.error_analysis import analyse
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_instance_segmentation

from small_models import small_model
from training_run import drawn


def analysed(masks=True, **settings):
    return analyse(scene_model(masks=masks), SCENE_PROCESSOR, scene(), batch_size=3, progress=False, **settings)


def analysed_image(annotations, found, size=SCENE):
    """The objects and detections of one image of two classes."""
    coco = {
        "images": [{"id": 5, "height": size[0], "width": size[1]}],
        "annotations": [{"image_id": 5, **annotation} for annotation in annotations],
        "categories": [{"id": 3, "name": "house"}, {"id": 7, "name": "pool"}],
    }
    dataset = InstanceDataset(coco, [Image.new("RGB", size[::-1])])
    [image] = analyse(ScriptedModel([found], ["house", "pool"]), SCENE_PROCESSOR, dataset, progress=False).images
    return image


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_detections_are_matched_with_objects_of_their_class_and_then_with_others(masks):
    analysis = analysed(masks)
    assert [image.name for image in analysis.images] == ["missed.png", "many.png", "right.png", "empty.png"]
    assert [image.index for image in analysis.images] == [3, 0, 1, 2]
    # One is correct with an IoU of 0.8; two detections and one object are errors.
    assert [image.quality for image in analysis.images] == pytest.approx([0, 0.8 / 2.5, 1, 1])
    assert [image.num_errors for image in analysis.images] == [1, 3, 0, 0]
    many = analysis.images[1]
    assert many.object_outcomes == ["found", "other class", "crowd"]
    assert many.detection_outcomes == ["correct", "duplicate", "other class", "in a crowd"]
    assert many.matches.tolist() == [0, -1, 1, -1]
    assert many.ious == pytest.approx([0.8, 0, 1, 0])
    assert many.objects.names == ["house", "pool", "pool"]
    assert many.detections.names == ["house", "house", "house", "pool"]
    assert analysis.class_names == ["house", "pool"]
    assert analysis.confusion.tolist() == [[2, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert (analysis.precision, analysis.recall, analysis.num_duplicates) == (2 / 4, 2 / 4, 1)
    assert analysis.highest_score == pytest.approx(0.9)
    assert ("segm_AP" in analysis.metrics) is masks


def test_a_lower_minimum_score_lets_more_detections_count():
    many = next(image for image in analysed(min_score=0.3).images if image.name == "many.png")
    assert many.detection_outcomes == ["correct", "duplicate", "false", "in a crowd", "correct"]
    assert many.quality == pytest.approx((0.8 + 1) / (2 + 2 / 2))
    with pytest.raises(ValueError, match=r"`min_score` must be .* got 50"):
        analysed(min_score=50)


def test_calibrated_thresholds_let_detections_of_their_class_count():
    found = [(label, 0.45, rectangle((0, 20), (0, 20), SCENE)) for label in (0, 1)]
    model = ScriptedModel([found] * 4, ["house", "pool"])
    coco = {
        "images": [{"id": 5, "height": SCENE[0], "width": SCENE[1]}],
        "annotations": [{"image_id": 5, "category_id": 3, "segmentation": rle(found[0][2])}],
        "categories": [{"id": 3, "name": "house"}, {"id": 7, "name": "pool"}],
    }
    dataset = InstanceDataset(coco, [Image.new("RGB", SCENE[::-1])])

    def outcomes(**settings):
        analysis = analyse(model, SCENE_PROCESSOR, dataset, progress=False, **settings)
        return analysis.images[0].object_outcomes, analysis.images[0].detections.names, analysis.limit

    assert outcomes() == (["missed"], [], "0.5")
    model.config.score_thresholds = {0: 0.4}
    assert outcomes() == (["found"], ["house"], "the threshold of its class")  # a pool needs 0.5
    assert outcomes(score_threshold=0.44) == (["found"], ["house"], "the threshold of its class")
    assert outcomes(min_score=0.44) == (["found"], ["house", "pool"], "0.44")


@pytest.mark.parametrize(("width", "outcome"), [(10, "correct"), (9, "false")])
def test_an_iou_of_0_5_is_a_match(width, outcome):
    house = {"category_id": 3, "segmentation": rle(rectangle((0, 20), (0, 20), SCENE))}
    image = analysed_image([house], [(0, 0.9, rectangle((0, 20), (0, width), SCENE))])
    assert image.detection_outcomes == [outcome]


def test_an_object_with_only_a_box_has_the_mask_of_its_box_and_one_without_either_is_ignored():
    image = analysed_image(
        [
            {"category_id": 3, "bbox": [4, 5, 10, 20], "segmentation": []},
            {"category_id": 7, "bbox": None, "segmentation": None},
            {"category_id": 3, "segmentation": [[0, 0, 10, 0, 10, 30, 0, 30]]},
        ],
        [],
    )
    assert image.name == "image_id 5"
    assert image.objects.boxes.tolist() == [[4, 5, 14, 25], [0, 0, 10, 30]]
    expected = [rectangle((5, 25), (4, 14), SCENE), rectangle((0, 30), (0, 10), SCENE)]
    assert (image.objects.dense_masks() == expected).all()
    assert image.object_outcomes == ["missed", "missed"]


def test_objects_and_detections_can_be_drawn():
    many = analysed().images[1]
    photo = scene()[many.index]["image"]
    is_drawn = np.asarray(many.objects.draw(photo)) != np.asarray(photo)
    assert is_drawn[:, :, 0][rectangle((25, 35), (25, 35), SCENE)].any()


def test_the_metrics_are_those_of_the_evaluation():
    dataset, model = drawn(3), small_model(num_labels=1)
    processor = RfDetrImageProcessor.from_config(model.config)
    expected = evaluate_instance_segmentation(model, processor, dataset, progress=False)
    analysis = analyse(model, processor, dataset, progress=False)
    assert analysis.metrics == expected
    assert len(analysis.images) == 3
    assert analysis.curves["building"].mean() == pytest.approx(expected["segm_AP"])
