"""The Auto classes and pipelines answer with ours, and importing changes nothing else."""

import importlib.util
import os

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import AutoModelForImageSegmentation, AutoModelForUniversalSegmentation

from transformers_rfdetr import (
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    RfDetrModel,
)

from small_models import small_model


@pytest.fixture
def folder(kind, tmp_path):
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    RfDetrImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    return tmp_path


def photo(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    noise = torch.randint(
        0, 255, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(noise.numpy())


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoModel, RfDetrModel),
        (AutoModelForObjectDetection, RfDetrForObjectDetection),
        (AutoModelForInstanceSegmentation, RfDetrForInstanceSegmentation),
        (AutoModelForImageSegmentation, RfDetrForInstanceSegmentation),
        (AutoModelForUniversalSegmentation, RfDetrForInstanceSegmentation),
    ],
    ids=lambda value: value.__name__,
)
def test_the_auto_models_answer_with_ours(auto, expected, folder):
    assert type(auto.from_pretrained(folder)) is expected
    assert type(auto.from_config(AutoConfig.from_pretrained(folder))) is expected


def test_the_auto_configuration_and_processor_answer_with_ours(folder):
    assert type(AutoConfig.from_pretrained(folder)) is RfDetrConfig
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is RfDetrImageProcessor
    assert processor.size == {"height": 48, "width": 48}


@pytest.mark.parametrize("name", ["RfDetrImageProcessorFast", None])
def test_a_processor_saved_under_another_name_is_ours_too(name, folder):
    import json

    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.pop("image_processor_type")
    path.write_text(json.dumps(settings if name is None else settings | {"image_processor_type": name}))
    assert type(AutoImageProcessor.from_pretrained(folder)) is RfDetrImageProcessor


def test_attention_dtype_and_configuration_can_be_chosen_while_loading(folder):
    model = AutoModelForObjectDetection.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.bfloat16, dropout=0.2
    )
    assert model.config._attn_implementation == "eager"
    assert (model.dtype, model.config.dropout) == (torch.bfloat16, 0.2)


def pipeline_of(task: str, model, **settings):
    processor = RfDetrImageProcessor.from_config(model.config)
    return pipeline(task, model=model, image_processor=processor, **settings)


def test_the_segmentation_pipeline_runs_ours_one_by_one_and_in_batches(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    RfDetrImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    segment = pipeline("image-segmentation", model=str(tmp_path))
    assert type(segment.model) is RfDetrForInstanceSegmentation
    assert type(segment.image_processor) is RfDetrImageProcessor
    photos = [photo(seed) for seed in range(3)]
    settings = {"threshold": 0.01, "mask_threshold": 0.0, "subtask": "instance"}
    single = [segment(image, **settings) for image in photos]
    batched = segment(photos, batch_size=2, **settings)
    assert any(single)
    for one, other in zip(single, batched, strict=True):
        assert [found["label"] for found in one] == [found["label"] for found in other]
        for mine, theirs in zip(one, other, strict=True):
            assert mine["mask"].size == (80, 60)
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_the_segmentation_pipeline_runs_with_its_own_defaults():
    segment = pipeline_of("image-segmentation", small_model())
    assert isinstance(segment(photo(0)), list)


def test_the_detection_pipeline_runs_ours_one_by_one_and_in_batches(tmp_path):
    model = small_model(RfDetrForObjectDetection)
    model.save_pretrained(tmp_path)
    RfDetrImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    detect = pipeline("object-detection", model=str(tmp_path))
    assert type(detect.model) is RfDetrForObjectDetection
    photos = [photo(seed) for seed in range(3)]
    single = [detect(image, threshold=0.01) for image in photos]
    batched = detect(photos, batch_size=2, threshold=0.01)
    assert any(single)
    for one, other in zip(single, batched, strict=True):
        assert [found["box"] for found in one] == [found["box"] for found in other]


def test_importing_leaves_transformers_own_classes_as_they_were(tmp_path):
    port = pytest.importorskip("transformers.models.rf_detr.modeling_rf_detr")
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrConfig as PortConfig

    small_model().save_pretrained(tmp_path)
    theirs, report = port.RfDetrForInstanceSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__module__.startswith("transformers.")
    assert not report["missing_keys"]
    assert type(theirs.config) is PortConfig
    assert type(AutoModelForInstanceSegmentation.from_config(theirs.config)) is port.RfDetrForInstanceSegmentation
    theirs.save_pretrained(tmp_path / "theirs")
    ours = RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "theirs")
    assert torch.equal(ours.query_feat.weight, small_model().query_feat.weight)


@pytest.mark.parametrize("pushed", [RfDetrModel, RfDetrForInstanceSegmentation, RfDetrImageProcessor])
def test_push_to_hub_is_the_one_that_writes_the_card(pushed, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "transformers_rfdetr.hub.push.push_to_hub", lambda *args, **settings: calls.append((args, settings))
    )
    instance = object.__new__(pushed)
    instance.push_to_hub("me/barns", with_code=True, private=True)
    assert calls == [((instance, "me/barns"), {"with_code": True, "private": True})]


def test_a_lane_has_what_it_is_named_for():
    lane = os.environ.get("LANE", "newest")  # set by `make test-versions`
    assert (importlib.util.find_spec("torchvision") is None) == (lane == "no-torchvision")
    if lane[0].isdigit():
        assert transformers.__version__ == lane


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_everything_works_without_torchvision(folder):
    assert type(AutoImageProcessor.from_pretrained(folder)) is RfDetrImageProcessor
    assert RfDetrImageProcessor.from_pretrained(folder)(photo(0), return_tensors="pt").pixel_values.shape == (
        1,
        3,
        48,
        48,
    )
