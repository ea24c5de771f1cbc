"""What other libraries do with our models: SAHI itself, and the calls of FiftyOne 1.22.1, which needs a database."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto.modeling_auto import AutoModelForObjectDetection, AutoModelForUniversalSegmentation

from transformers_rfdetr import load, predict, tiny_checkpoint
from transformers_rfdetr.assets import sample_image


@pytest.fixture(scope="module")
def scene():
    with Image.open(sample_image()) as file:
        return file.convert("RGB")


@pytest.fixture(scope="module")
def expected(scene):
    [found] = predict(*load("rf-detr-seg-tiny"), scene)
    return found


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    pytest.importorskip("sahi", reason="needs sahi")
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "predict_with_sahi.py"))


def test_sahi_finds_the_boxes_and_scores_of_predict_with_the_class_of_the_example(scene, expected, example):
    from sahi.predict import get_prediction

    detector = example["RfDetrDetectionModel"](str(tiny_checkpoint()), confidence_threshold=0.5, device="cpu")
    found = get_prediction(scene, detector, verbose=0).object_prediction_list
    found.sort(key=lambda one: -one.score.value)
    assert [one.category.name for one in found] == expected.names
    np.testing.assert_allclose([one.score.value for one in found], expected.scores, atol=1e-5)
    np.testing.assert_allclose([one.bbox.to_xyxy() for one in found], expected.boxes, atol=1e-3)


@pytest.mark.long
def test_the_example_of_sahi_runs(example, capsys):
    example["main"]("rf-detr-seg-tiny", str(sample_image()))
    assert capsys.readouterr().out == "SAHI: 22 boxes\npredict_tiled: 19 masks\n"


@pytest.mark.parametrize("auto_class", [AutoModelForObjectDetection, AutoModelForUniversalSegmentation])
def test_the_calls_of_fiftyone_return_the_instances_of_predict(scene, expected, auto_class):
    """`convert_transformers_model(model)` with task="object-detection" or "universal-segmentation"."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint(), use_fast=True)
    model = auto_class.from_pretrained(tiny_checkpoint()).eval()
    assert "ForObjectDetection" in type(model).__name__ or "Segmentation" in type(model).__name__
    with torch.no_grad():
        outputs = model(**processor(images=[scene, scene], return_tensors="pt"))
    sizes = torch.tensor([[288, 288], [288, 288]])
    if auto_class is AutoModelForObjectDetection:
        for result in processor.post_process_object_detection(outputs, target_sizes=sizes, threshold=0.5):
            np.testing.assert_allclose(result["boxes"], expected.boxes, atol=1e-3)
            assert result["labels"].tolist() == expected.labels.tolist()
        return
    settings = {"threshold": 0.5, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.8, "return_binary_maps": True}
    for result in processor.post_process_instance_segmentation(outputs, target_sizes=[(288, 288)] * 2, **settings):
        labels = [segment["label_id"] for segment in result["segments_info"]]
        assert labels == expected.labels.tolist()
        masks, dense = result["segmentation"].numpy() > 0, expected.dense_masks()
        assert not (masks & ~dense).any()  # its threshold of 0.5 is one of logits here: a little smaller
        assert (masks.sum((1, 2)) > 0.8 * dense.sum((1, 2))).all()
