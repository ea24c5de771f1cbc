"""`load`: a model and its processor by one name."""

import json

import pytest
import torch
from transformers import PreTrainedModel

from transformers_rfdetr import (
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    load,
)

from small_models import small_model


def test_a_folder_gives_the_model_that_was_saved_and_its_processor(kind, tmp_path):
    saved = small_model(kind)
    saved.save_pretrained(tmp_path)
    RfDetrImageProcessor.from_config(saved.config, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    model, processor = load(str(tmp_path))
    assert type(model) is kind
    assert not model.training
    assert processor.image_mean == [0.1, 0.2, 0.3]
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_folder_without_a_processor_takes_the_one_of_its_configuration_and_warns(tmp_path, caplog):
    small_model().save_pretrained(tmp_path)
    _, processor = load(str(tmp_path))
    assert processor.size == {"height": 48, "width": 48}
    assert "has no preprocessor_config.json" in caplog.text


def test_another_resolution_goes_to_both(tmp_path):
    saved = small_model()
    saved.save_pretrained(tmp_path)
    RfDetrImageProcessor.from_config(saved.config).save_pretrained(tmp_path)
    model, processor = load(str(tmp_path), resolution=72, dtype=torch.bfloat16)
    assert model.config.resolution == 72
    assert processor.size == {"height": 72, "width": 72}
    assert model.dtype == torch.bfloat16


def test_heads_are_new_only_for_other_classes(tmp_path):
    saved = small_model(num_labels=2, id2label={0: "building", 1: "__background__"})
    saved.save_pretrained(tmp_path)
    kept, _ = load(str(tmp_path), id2label={0: "building"}, resolution=[96, 48])
    assert all(torch.equal(kept.state_dict()[name], tensor) for name, tensor in saved.state_dict().items())
    assert kept.config.resolution == (96, 48)
    new, _ = load(str(tmp_path), id2label={0: "barn", 1: "house", 2: "silo"})
    assert new.config.id2label == {0: "barn", 1: "house", 2: "silo"}
    changed = {name for name, tensor in new.state_dict().items() if tensor.shape != saved.state_dict()[name].shape}
    assert changed
    assert all("class_embed" in name for name in changed)


def test_the_weights_are_read_once_also_for_other_classes(tmp_path, monkeypatch):
    small_model().save_pretrained(tmp_path)
    calls, original = [], PreTrainedModel.from_pretrained.__func__

    def counted(cls, *arguments, **named):
        calls.append(cls)
        return original(cls, *arguments, **named)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    load(str(tmp_path), id2label={0: "barn", 1: "house"})
    assert calls == [RfDetrForInstanceSegmentation]


@pytest.mark.parametrize("name", ["RFDETRSegMedium", "rfdetr-seg-medium", "rf-detr-seg-medium"])
def test_published_names_are_looked_for_on_the_hub(name, monkeypatch):
    def asked(repository, **_):
        raise OSError(f"asked for {repository}")

    monkeypatch.setattr("transformers_rfdetr.hub.load.RfDetrConfig.from_pretrained", asked)
    with pytest.raises(ValueError, match="asked for Roboflow/rf-detr-seg-medium"):
        load(name)


def test_an_unloadable_path_is_an_error_with_the_remedy(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"`name` .*model\.pth.*transformers-rfdetr convert"):
        load(str(tmp_path / "model.pth"))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*config\.json"):
        load(str(tmp_path))
    for name, text, message in (
        ("adapter_config.json", "{}", "got an adapter.*merge_and_unload"),
        ("config.json", '{"model_type": "detr"}', "`model_type` .*'rf_detr', got 'detr'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    small_model(RfDetrForObjectDetection).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace(RfDetrForObjectDetection.__name__, RfDetrForInstanceSegmentation.__name__)
    )
    with pytest.raises(ValueError, match=r"RfDetrForInstanceSegmentation.* \d+ .*: segmentation_head"):
        load(str(tmp_path))


def test_weights_of_other_shapes_are_blamed_on_the_configuration(tmp_path):
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_ffn_dim": 2 * config["decoder_ffn_dim"]}))
    with pytest.raises(ValueError, match=r"shapes .* config\.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_available_is_refused(device, tmp_path):
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`device` .* got {device}"):
        load(str(tmp_path), device=device)


def test_auto_is_an_available_device(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert load(str(tmp_path), device="auto")[0].device.type in ("cpu", "cuda", "mps")
