"""Checkpoints that rfdetr's code wrote: to our folders and back, and loaded by rfdetr again."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rfdetr import RFDETR
from rfdetr.models.weights import apply_lora, interpolate_position_embeddings
from safetensors.torch import load_file
from transformers import AutoModelForInstanceSegmentation, AutoModelForObjectDetection

from transformers_rfdetr import (
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
)
from transformers_rfdetr.conversion import architecture
from transformers_rfdetr.conversion.convert import convert_to_rfdetr, convert_to_transformers
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.model.variants_rf_detr import BACKGROUND, COCO_NAMES

from peer import PEER_CLASSES, build_peer, every_branch, narrow_dinov2, randomise, record_choices, replay_choices
from small_models import stand_in_config

NAMES = ["barn", "house", "shed", "silo"]  # of the stand-ins, whose heads have five rows
FULL_SIZE = ["rf-detr-nano", "rf-detr-seg-nano", "rf-detr-seg-large", "rf-detr-large-deprecated"]


@pytest.fixture
def narrow(monkeypatch):
    """Give our table of rfdetr's small encoder the width of the stand-ins; `narrow_dinov2` does the same in rfdetr."""
    monkeypatch.setitem(architecture.ENCODERS, "dinov2_windowed_small", (32, 2, 0))


def described(model, settings, variant, **args):
    """Return the dictionary that rfdetr 1.11 writes, without the part of Lightning."""
    return {
        "model": model.state_dict(),
        "args": args,
        "model_name": PEER_CLASSES[variant].removesuffix("Config"),
        "model_config": settings.model_dump(),
        "rfdetr_version": "1.11.2",
    }


def predictions(peer, image):
    found = peer.predict(image, threshold=0.02)
    return found.xyxy, found.confidence, found.class_id, found.mask, found.data["class_name"]


def round_trip(variant, model, settings, folder, **args):
    source, back = folder / "source.pth", folder / "back.pth"
    torch.save(described(model, settings, variant, **args), source)
    there = convert_to_transformers(source, folder / "there")
    convert_to_rfdetr(folder / "there", back)

    expected, stored = model.state_dict(), load_file(folder / "there" / "model.safetensors")
    assert set(expected) - set(stored) == {"_kp_active_mask"}
    assert [change.what for change in there.changes] == ["_kp_active_mask"]
    returned = torch.load(back, weights_only=True)["model"]
    assert set(returned) == set(expected)
    assert all(torch.equal(returned[name], tensor) for name, tensor in expected.items())

    image = draw_scene(seed=0)[0]
    first, second = (RFDETR.from_checkpoint(path, device="cpu") for path in (source, back))
    assert first.model_config.model_dump(exclude={"pretrain_weights"}) == second.model_config.model_dump(
        exclude={"pretrain_weights"}
    )
    before, after = predictions(first, image), predictions(second, image)
    assert len(before[0]) > 0
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    return there, first


def assert_ours_predicts_the_same(folder, variant, peer):
    config_auto = AutoModelForInstanceSegmentation if "-seg-" in variant else AutoModelForObjectDetection
    ours, report = config_auto.from_pretrained(folder, output_loading_info=True)
    assert isinstance(ours, RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixel_values = RfDetrImageProcessor.from_pretrained(folder)(draw_scene(seed=0)[0], return_tensors="pt")[
        "pixel_values"
    ]
    choices = []
    with torch.no_grad():
        with record_choices(choices):
            expected = peer.model.model.eval()(pixel_values)
        with replay_choices(choices):
            outputs = ours.eval()(pixel_values)
    classes = [label for label, name in ours.config.id2label.items() if name != BACKGROUND]
    torch.testing.assert_close(
        outputs.logits[..., classes], expected["pred_logits"][..., classes], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(outputs.pred_boxes, expected["pred_boxes"], atol=1e-4, rtol=1e-4)
    if "-seg-" in variant:
        torch.testing.assert_close(outputs.pred_masks, expected["pred_masks"], atol=1e-3, rtol=1e-3)


@every_branch
def test_a_small_model_is_converted_there_and_back_bit_for_bit_and_predicts_the_same(variant, tmp_path, narrow):
    config = stand_in_config(variant)
    model, settings = build_peer(variant, config)
    with narrow_dinov2(config):
        there, peer = round_trip(variant, model, settings, tmp_path, class_names=NAMES)
        assert list(there.config.id2label.values()) == [*NAMES, BACKGROUND]
        assert there.config.backbone_config.to_dict() == config.backbone_config.to_dict()
        same = ("resolution", "num_queries", "group_detr", "decoder_layers", "projector_scale", "decoder_n_points")
        assert [getattr(there.config, name) for name in same] == [getattr(config, name) for name in same]
        assert_ours_predicts_the_same(tmp_path / "there", variant, peer)


@pytest.mark.long
@pytest.mark.parametrize("variant", FULL_SIZE)
def test_a_full_size_model_is_converted_there_and_back_bit_for_bit_and_predicts_the_same(variant, tmp_path):
    model, settings = build_peer(variant)
    there, peer = round_trip(variant, model, settings, tmp_path, class_names=list(COCO_NAMES.values()))
    assert there.config.id2label[18] == "dog"
    returned = torch.load(tmp_path / "back.pth", weights_only=True, mmap=True)
    assert returned["model_name"] == PEER_CLASSES[variant].removesuffix("Config")
    assert_ours_predicts_the_same(tmp_path / "there", variant, peer)
    shutil.rmtree(tmp_path)


@pytest.mark.long
def test_the_published_form_of_seg_large_keeps_the_first_200_of_300_queries_of_each_group(tmp_path):
    """Its file holds 13 x 300 query rows; the class has 200. No arguments are needed: its shapes are one variant's."""
    model, _ = build_peer("rf-detr-seg-large")
    state = model.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name in ("query_feat.weight", "refpoint_embed.weight"):
        state[name] = torch.randn(13 * 300, state[name].shape[1], generator=generator)
    del state["_kp_active_mask"]
    torch.save({"model": state}, tmp_path / "rf-detr-seg-large.pt")
    there = convert_to_transformers(tmp_path / "rf-detr-seg-large.pt", tmp_path / "there")
    assert there.config.num_queries == 200
    assert {change.what: change.result for change in there.changes} == {
        "refpoint_embed.weight": "13 x 200",
        "query_feat.weight": "13 x 200",
    }
    stored = load_file(tmp_path / "there" / "model.safetensors")
    for group in (0, 1, 12):
        expected = state["query_feat.weight"][300 * group : 300 * group + 200]
        assert torch.equal(stored["query_feat.weight"][200 * group : 200 * group + 200], expected)

    # rfdetr makes groups beyond the first of other rows, and predicts with the first one.
    torch.save({"model": state, "args": {"pretrain_weights": "none"}}, tmp_path / "rf-detr-seg-large.pt")
    peer = RFDETR.from_checkpoint(tmp_path / "rf-detr-seg-large.pt", device="cpu")
    assert_ours_predicts_the_same(tmp_path / "there", "rf-detr-seg-large", peer)
    shutil.rmtree(tmp_path)


def test_class_names_of_the_first_versions_are_at_the_rows_that_rfdetr_trained(tmp_path, narrow):
    """rfdetr 1.4 trained Roboflow's data with the ids 1 to N as labels, in a head of N + 1 rows."""
    config = stand_in_config("rf-detr-seg-nano")
    model, settings = build_peer("rf-detr-seg-nano", config)
    settings = settings.model_dump(exclude={"model_name"}) | {"num_classes": 5}
    args = argparse.Namespace(**settings, class_names=NAMES, epochs=2)
    torch.save({"model": model.state_dict(), "args": args, "epoch": 1, "optimizer": {}}, tmp_path / "best.pth")
    there = convert_to_transformers(tmp_path / "best.pth", tmp_path / "there")
    assert there.config.id2label == {0: "__parent__", 1: "barn", 2: "house", 3: "shed", 4: "silo"}
    assert there.config.resolution == config.resolution

    # Today's rfdetr, too, names them right once it has the file back: it counts names from label 0.
    convert_to_rfdetr(tmp_path / "there", tmp_path / "back.pth")
    with narrow_dinov2(config):
        names = RFDETR.from_checkpoint(tmp_path / "back.pth", device="cpu").class_names
    assert names == ["__parent__", "barn", "house", "shed", "silo"]


def test_a_position_table_of_another_size_than_the_arguments_is_resized_as_in_rfdetr(tmp_path, narrow):
    config = stand_in_config("rf-detr-seg-nano", grid=4)
    model, settings = build_peer("rf-detr-seg-nano", config)
    content = described(model, settings, "rf-detr-seg-nano", class_names=NAMES)
    content["model_config"] |= {"positional_encoding_size": 6, "resolution": 72}
    torch.save(content, tmp_path / "source.pth")
    there = convert_to_transformers(tmp_path / "source.pth", tmp_path / "there")
    assert ("position table", "4x4 patches", "6x6 patches") in there.changes
    name = "backbone.0.encoder.encoder.embeddings.position_embeddings"
    expected = {name: content["model"][name]}
    interpolate_position_embeddings(expected, 6)
    torch.testing.assert_close(load_file(tmp_path / "there" / "model.safetensors")[name], expected[name])


def test_adapters_of_a_lora_run_are_merged_as_peft_merges_them(tmp_path, narrow):
    config = stand_in_config("rf-detr-nano")
    model, settings = build_peer("rf-detr-nano", config)
    apply_lora(model)
    randomise(model, seed=2)
    wrapped = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("lora_magnitude_vector" in name for name in wrapped)
    torch.save(described(model, settings, "rf-detr-nano", class_names=NAMES), tmp_path / "lora.pth")
    there = convert_to_transformers(tmp_path / "lora.pth", tmp_path / "there")
    assert "LoRA adapters of 36 layers" in [change.what for change in there.changes]
    model.backbone[0].encoder = model.backbone[0].encoder.merge_and_unload()
    expected, stored = model.state_dict(), load_file(tmp_path / "there" / "model.safetensors")
    assert set(expected) - set(stored) == {"_kp_active_mask"}
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="session")
def one_step_run(tmp_path_factory):
    one_step = pytest.importorskip("one_step_run")
    folder = tmp_path_factory.mktemp("one_step")
    one_step.fine_tune(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", ["checkpoint_best_total.pth", "checkpoint_best_ema.pth", "last.ckpt"])
def test_files_of_a_training_run_of_rfdetr_are_converted_there_and_back(name, one_step_run, tmp_path):
    there = convert_to_transformers(one_step_run / name, tmp_path / "there")
    assert there.config.id2label == {0: "barn", 1: "house", 2: "shed", 3: "__background__"}
    assert there.config.resolution == 48
    content = torch.load(one_step_run / name, weights_only=True)
    expected = content.get("model") or {
        key.removeprefix("model."): value for key, value in content["state_dict"].items()
    }
    convert_to_rfdetr(tmp_path / "there", tmp_path / "back.pth")
    returned = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert set(returned) == set(expected)
    assert all(torch.equal(returned[key], tensor) for key, tensor in expected.items())
    first, second = (
        RFDETR.from_checkpoint(path, device="cpu") for path in (one_step_run / name, tmp_path / "back.pth")
    )
    assert first.class_names == second.class_names == ["barn", "house", "shed"]
    assert_ours_predicts_the_same(tmp_path / "there", "rf-detr-seg-nano", first)


@pytest.mark.long
def test_the_averaged_weights_of_a_lightning_file_are_those_of_the_best_file(one_step_run, tmp_path):
    averaged = convert_to_transformers(one_step_run / "last.ckpt", tmp_path / "averaged", ema=True)
    convert_to_transformers(one_step_run / "last.ckpt", tmp_path / "live")
    ema = torch.load(one_step_run / "last_ema.pth", weights_only=True)["model"]
    stored, live = (load_file(tmp_path / folder / "model.safetensors") for folder in ("averaged", "live"))
    assert averaged.config.id2label[2] == "shed"
    assert all(torch.equal(tensor, ema[name]) for name, tensor in stored.items())
    assert not torch.equal(live["class_embed.weight"], stored["class_embed.weight"])


@pytest.mark.long
def test_the_listing_in_the_tree_is_of_such_a_run(one_step_run):
    one_step = pytest.importorskip("one_step_run")
    assert one_step.listing(one_step_run) == Path(one_step.LISTING).read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak as Linux gives it")
def test_a_conversion_needs_little_more_memory_than_the_weights(tmp_path):
    """At most 2.5 times the file and 100 MB above a process that has done the imports; an optimizer is not read."""
    model, settings = build_peer("rf-detr-large-deprecated")
    source = tmp_path / "source.pth"
    torch.save(described(model, settings, "rf-detr-large-deprecated"), source)
    size = source.stat().st_size
    moments = {index: (torch.randn_like(p), torch.rand_like(p)) for index, p in enumerate(model.parameters())}
    content = described(model, settings, "rf-detr-large-deprecated") | {"optimizer": {"state": moments}}
    torch.save(content, tmp_path / "with_optimizer.pth")
    del model, moments, content
    code = """
import sys
import transformers_rfdetr.conversion.convert as conversion
from transformers_rfdetr import RfDetrForObjectDetection, RfDetrImageProcessor
def peak():  # of this program; getrusage's would be that of its parent too
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
before = peak()
getattr(conversion, sys.argv[1])(sys.argv[2], sys.argv[3])
print(1024 * (peak() - before))
"""
    for function, name, output in (
        ("convert_to_transformers", "source.pth", "there"),
        ("convert_to_transformers", "with_optimizer.pth", "there_too"),
        ("convert_to_rfdetr", "there", "back.pth"),
    ):
        command = [sys.executable, "-c", code, function, str(tmp_path / name), str(tmp_path / output)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert 0.5 * size < int(done.stdout.split()[-1]) <= 2.5 * size + 100e6
    shutil.rmtree(tmp_path)
