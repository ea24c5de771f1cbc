"""Conversion of rfdetr's checkpoints on files that the tests make: forms, names, classes, and what can be wrong."""

import argparse
import functools
import os
import pickle
import re
import signal
import subprocess
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from transformers_rfdetr import (
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
)
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.conversion import convert as conversion
from transformers_rfdetr.conversion import published_weights
from transformers_rfdetr.conversion.convert import convert_to_rfdetr, convert_to_transformers, format_changes
from transformers_rfdetr.conversion.rfdetr_checkpoint import read_rfdetr_file, write_rfdetr_file
from transformers_rfdetr.model.variants_rf_detr import COCO_ID2LABEL, COCO_NAMES, VARIANTS

from faults import attempt
from small_models import randomised, stand_in_config

SCRIPTS = Path(__file__).resolve().parents[2] / "conversion_scripts"
NAMES = ["barn", "house", "shed", "silo"]  # of the stand-ins, whose heads have five rows


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    """rfdetr's small encoder with the width of the stand-ins, and no network."""
    monkeypatch.setitem(conversion.ENCODERS, "dinov2_windowed_small", (32, 2, 0))
    monkeypatch.setattr(published_weights, "BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("RF_HOME", str(tmp_path / "weights"))


def model_of(variant="rf-detr-seg-nano", **overrides):
    torch.manual_seed(0)
    kind = RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection
    return randomised(kind(stand_in_config(variant, **overrides))).eval()


def arguments_of(model, **changed):
    """The arguments that rfdetr stores of such a model."""
    config = model.config
    backbone = config.backbone_config
    return {
        "encoder": "dinov2_windowed_small",
        "patch_size": backbone.patch_size,
        "num_windows": backbone.num_windows,
        "out_feature_indexes": list(backbone.out_indices),
        "positional_encoding_size": backbone.position_grid[0],
        "resolution": config.resolution,
        "projector_scale": list(config.projector_scale),
        "hidden_dim": config.d_model,
        "dec_layers": config.decoder_layers,
        "sa_nheads": config.decoder_self_attention_heads,
        "ca_nheads": config.decoder_cross_attention_heads,
        "dec_n_points": config.decoder_n_points,
        "num_queries": config.num_queries,
        "num_select": config.num_queries,
        "group_detr": config.group_detr,
        "num_classes": config.num_labels - 1,
        "segmentation_head": isinstance(model, RfDetrForInstanceSegmentation),
        "two_stage": True,
        "class_names": NAMES,
    } | changed


@pytest.fixture
def model():
    return model_of()


@pytest.fixture
def save(tmp_path):
    def save(content, name="checkpoint.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


def legacy(model, **changed):
    return {"model": model.state_dict(), "args": argparse.Namespace(**arguments_of(model, **changed))}


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(stored, expected):
    assert set(stored) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())


# The forms


def best_file(model):
    arguments = arguments_of(model)
    state = model.state_dict()
    return {
        "model": state,
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "args": {"class_names": arguments.pop("class_names"), "lr": 1e-4, "encoder": None},
        "model_name": "RFDETRSegNano",
        "model_config": arguments,
    }


def lightning_file(model, prefix="model."):
    content = best_file(model)
    del content["model"]
    content["state_dict"] = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    return content | {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}


FORMS = {
    "the first versions' file": legacy,
    "a file with a SimpleNamespace": lambda model: (
        legacy(model) | {"args": types.SimpleNamespace(**arguments_of(model))}
    ),
    "Roboflow's weights.pt": lambda model: legacy(model) | {"args": arguments_of(model)},
    "a best file": best_file,
    "a Lightning file": lightning_file,
    "a compiled Lightning file": lambda model: lightning_file(model, "model._orig_mod."),
    "hyper-parameters": lambda model: {
        "state_dict": lightning_file(model)["state_dict"],
        "hyper_parameters": arguments_of(model),
    },
    "a model in DistributedDataParallel": lambda model: (
        legacy(model) | {"model": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}
    ),
    "a compiled encoder": lambda model: (
        legacy(model)
        | {"model": {name.replace("0.encoder.", "0.encoder._orig_mod."): t for name, t in model.state_dict().items()}}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_same_folder(form, model, save, tmp_path):
    done = convert_to_transformers(save(FORMS[form](model)), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())
    stored = RfDetrConfig.from_pretrained(tmp_path / "there")
    expected = RfDetrConfig.from_dict(model.config.to_dict())
    expected.id2label = {0: "barn", 1: "house", 2: "shed", 3: "silo", 4: "__background__"}
    expected.label2id = {name: label for label, name in expected.id2label.items()}
    expected.architectures, expected.dtype = ["RfDetrForInstanceSegmentation"], torch.float32
    assert stored.to_dict() == expected.to_dict()
    prefixes = [(change.stored, change.result) for change in done.changes if change.what == "names"]
    wrapped = {"a Lightning file": "model.*", "a compiled Lightning file": "model._orig_mod.*"}
    wrapped |= {"hyper-parameters": "model.*", "a model in DistributedDataParallel": "module.*"}
    wrapped |= {"a compiled encoder": "_orig_mod.*"}
    assert prefixes == ([(wrapped[form], "*")] if form in wrapped else [])
    processor = RfDetrImageProcessor.from_pretrained(tmp_path / "there")
    assert processor.size == {"height": stored.resolution, "width": stored.resolution}


def test_a_file_of_before_torch_1_6_is_read(model, save, tmp_path):
    convert_to_transformers(save(legacy(model), _use_new_zipfile_serialization=False), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shapes_of_a_published_model_say_all_that_its_file_does_not(variant):
    published = RfDetrConfig.from_variant(variant)
    with torch.device("meta"):
        kind = RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection
        state = kind(published).state_dict()
    if variant == "rf-detr-seg-large":  # the published file has more rows than the class of its name
        for name in ("query_feat.weight", "refpoint_embed.weight"):
            state[name] = state[name].new_empty(13 * 300, state[name].shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conversion.ENCODERS, "dinov2_windowed_small", (384, 6, 0))
        changes = []
        config = conversion._read_config(state, {}, None, variant == "rf-detr-seg-large", changes)
    config.id2label = published.id2label
    config.label2id = published.label2id
    assert config.to_dict() == published.to_dict()
    if variant == "rf-detr-seg-large":
        assert changes == []
    else:  # not known as the published one, so what was supposed is said
        assert [(change.what, change.result) for change in changes] == [("arguments", f"those of {variant}")]


def test_weights_without_arguments_of_no_published_size_ask_for_the_variant():
    config = RfDetrConfig.from_variant("rf-detr-seg-small", resolution=480)
    with torch.device("meta"):
        state = RfDetrForInstanceSegmentation(config).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conversion.ENCODERS, "dinov2_windowed_small", (384, 6, 0))
        with pytest.raises(ValueError, match=r"40 x 40 .*--variant.* rf-detr-seg-nano or rf-detr-seg-small$"):
            conversion._read_config(state, {}, None, False, [])
        named = conversion._read_config(state, {"model_name": "RFDETRSegSmall"}, None, False, [])
        said = conversion._read_config(state, {}, "rf-detr-seg-small", False, [])
        with pytest.raises(ValueError, match="the weights have dec_layers 4, and rf-detr-nano has 2; if it is no"):
            conversion._read_config(state, {"model_name": "RFDETRNano"}, None, False, [])
    for found in (named, said):
        assert (found.resolution, found.backbone_config.num_windows, found.num_queries) == (480, 2, 100)


def test_averaged_weights_are_taken_when_asked_for(model, save, tmp_path):
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    state = {f"module.model.{name}": tensor for name, tensor in average.items()} | {"n_averaged": torch.tensor(5)}
    callback = {"EMA": {"average_model_state_dict": state}, "Best": {"score": 0.5}}
    kinds = {"ema_model": average, "legacy_ema_state_dict": average, "callbacks": callback}
    for key, content in kinds.items():
        path = save(legacy(model) | {key: content}, f"{key}.pth")
        convert_to_transformers(path, tmp_path / key, ema=True)
        assert_equal(weights_in(tmp_path / key), average)
        convert_to_transformers(path, tmp_path / f"{key}_not")
        assert_equal(weights_in(tmp_path / f"{key}_not"), model.state_dict())
    with pytest.raises(ValueError, match=r"plain\.pth holds no averaged weights .* leave --ema"):
        convert_to_transformers(save(legacy(model), "plain.pth"), tmp_path / "none", ema=True)


def test_tensors_that_share_memory_or_are_not_contiguous_are_written(model, save, tmp_path):
    state = model.state_dict()
    shared = torch.randn(2, *state["class_embed.weight"].shape)
    state["class_embed.weight"] = shared[1]
    state["transformer.enc_out_class_embed.0.weight"] = shared[1]
    state["bbox_embed.layers.0.weight"] = state["bbox_embed.layers.0.weight"].T.contiguous().T
    expected = {name: tensor.clone() for name, tensor in state.items()}
    convert_to_transformers(save(legacy(model) | {"model": state}), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), expected)


# Tensors and arguments that do not fit


def test_more_queries_than_the_arguments_say_are_cut_in_each_group_and_reported(model, save, tmp_path):
    done = convert_to_transformers(save(legacy(model, num_queries=5, num_select=5)), tmp_path / "there")
    rows = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 14, 15, 16, 17, 18])  # of 3 x 7
    stored = weights_in(tmp_path / "there")
    for name in ("query_feat.weight", "refpoint_embed.weight"):
        assert torch.equal(stored[name], model.state_dict()[name][rows])
        assert (name, "3 x 7 rows", "3 x 5") in done.changes
    assert done.config.num_queries == 5


def test_every_tensor_that_is_left_out_is_in_the_table(model, save, tmp_path):
    state = model.state_dict() | {"extra.weight": torch.zeros(2, 3), "_kp_active_mask": torch.zeros(0, 0).bool()}
    content = lightning_file(model) | {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
    content["state_dict"]["criterion.empty_weight"] = torch.ones(4)
    done = convert_to_transformers(save(content), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())
    table = format_changes(done.changes).splitlines()
    assert table[0].split() == ["what", "in", "the", "source", "in", "the", "result"]
    assert sorted(table[1:]) == [
        "_kp_active_mask         0x0            left out: empty, for key points",
        "criterion.empty_weight  4              left out: not of the model",
        "extra.weight            2x3            left out: not of the model",
        "names                   model.*        *",
    ]
    card = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    assert "| extra.weight | 2x3 | left out: not of the model |" in card


STRANGE_ARGUMENTS = [
    ("resolution", "640", "a whole number"),
    ("num_queries", True, "a whole number"),
    ("num_queries", [7], "a whole number"),
    ("out_feature_indexes", 5, "a list of whole numbers"),
    ("out_feature_indexes", [[3]], "a list of whole numbers"),
    ("projector_scale", 5, "a list of names"),
    ("projector_scale", [], "a list of names"),
    ("positional_encoding_size", 10**6, "within 1 .. 512"),
]


@pytest.mark.parametrize(("name", "value", "rule"), STRANGE_ARGUMENTS)
def test_arguments_of_another_kind_are_refused(name, value, rule, model, save, tmp_path):
    with pytest.raises(ValueError, match=rf"checkpoint\.pth: the stored argument {name} is .*, and not {rule}"):
        convert_to_transformers(save(legacy(model, **{name: value})), tmp_path / "there")


POSITIONS = "backbone.0.encoder.encoder.embeddings.position_embeddings"
STRANGE_TENSORS = [
    (POSITIONS, torch.zeros(5), r"position_embeddings is 5, which it is in no RF-DETR model"),
    (POSITIONS, torch.zeros(1, 6, 32), r"position table has 6 rows"),
    (POSITIONS, torch.zeros(1, 0, 32), r"position table has 0 rows"),
    ("class_embed.bias", torch.tensor(1.0), r"class_embed\.bias is a number, which"),
    ("refpoint_embed.weight", torch.zeros(18, 4), r"query_feat has 21 rows and refpoint_embed 18"),
    ("refpoint_embed.weight", torch.zeros(0, 4), r"query_feat has 21 rows and refpoint_embed 0"),
    ("bbox_embed.layers.0.bias", torch.zeros(32, dtype=torch.int32), r"bias \(torch.int32, .* finite floating-point"),
    ("bbox_embed.layers.0.bias", torch.full((32,), float("nan")), r"is not of finite floating-point numbers"),
    ("bbox_embed.layers.0.bias", torch.zeros(32).to_sparse(), r"sparse_coo, cpu\) is no plain table of numbers"),
    ("bbox_embed.layers.0.bias", torch.zeros(32, dtype=torch.float8_e4m3fn), r"bias \(torch.float8_e4m3fn, .* 16 to"),
    ("query_feat.weight", torch.zeros(21, 32, dtype=torch.float8_e4m3fn), r"query_feat\.weight \(torch.float8_e4m3fn"),
    ("bbox_embed.layers.0.lora_A.default.weight", torch.zeros(0, 32), r"an adapter has lora_A, lora_B and the weight"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), STRANGE_TENSORS)
def test_tensors_of_another_kind_are_refused(name, tensor, message, model, save, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        convert_to_transformers(
            save(legacy(model) | {"model": model.state_dict() | {name: tensor}}), tmp_path / "there"
        )
    assert "checkpoint.pth" in str(error.value)


def test_weights_in_several_precisions_are_kept_and_loaded_in_the_widest(model, save, tmp_path):
    state = model.state_dict()
    state["class_embed.bias"] = state["class_embed.bias"].half()
    convert_to_transformers(save(legacy(model) | {"model": state}), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), state)
    assert RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "there").dtype == torch.float32


def test_a_file_that_was_packed_anew_with_compression_is_read_right(model, save, tmp_path):
    with (
        zipfile.ZipFile(save(legacy(model))) as archive,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    convert_to_transformers(tmp_path / "packed.pth", tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


def test_a_file_of_a_later_pickle_protocol_is_read_when_it_is_trusted(model, save, tmp_path):
    path = save(legacy(model), pickle_protocol=4)
    with pytest.raises(ValueError, match=r"holds what torch does not load as weights .*--trust-checkpoint"):
        convert_to_transformers(path, tmp_path / "there")
    convert_to_transformers(path, tmp_path / "there", trust_checkpoint=True)
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


def test_folders_that_are_damaged_are_refused_on_the_way_back(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    content = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for name, damaged in (("cut", content[:-100]), ("empty", b""), ("header", b"\xff" * 8 + content[8:])):
        model.config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.*model\.safetensors cannot be read as weights"):
            convert_to_rfdetr(tmp_path / name, tmp_path / "back.pth")
    model.config.save_pretrained(tmp_path / "outside")
    (tmp_path / "outside" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../whole/model.safetensors"}}'
    )
    with pytest.raises(ValueError, match="lists files outside its folder"):
        convert_to_rfdetr(tmp_path / "outside", tmp_path / "back.pth")
    (tmp_path / "whole" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        convert_to_rfdetr(tmp_path / "whole", tmp_path / "back.pth")


WRONG_ARGUMENTS = {
    "patch_size": (16, r"the weights have patch_size 12, and the stored arguments have 16"),
    "dec_layers": (3, r"the weights have dec_layers 4, and the stored arguments have 3"),
    "hidden_dim": (256, r"the weights have hidden_dim 32, and the stored arguments have 256"),
    "group_detr": (13, r"the weights have group_detr 3, and the stored arguments have 13"),
    "segmentation_head": (False, r"the weights have segmentation_head True, and the stored arguments have False"),
    "encoder": ("dinov2_windowed_base", r"have encoder 'dinov2_windowed_small', and .* 'dinov2_windowed_base'"),
    "num_queries": (9, r"the weights have num_queries 7, and the stored arguments have 9"),
    "two_stage": (False, r"the stored arguments have two_stage False, and every RF-DETR has True"),
    "dec_n_points": (4, r"sampling_offsets\.weight is 16x32, and in the model of the arguments 32x32"),
    "resolution": (50, r"resolution 50 is not a multiple of 12"),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_arguments_that_the_weights_contradict_are_an_error_with_both_values(name, model, save, tmp_path):
    value, message = WRONG_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message) as error:
        convert_to_transformers(save(legacy(model, **{name: value})), tmp_path / "there")
    assert "checkpoint.pth" in str(error.value)
    assert not (tmp_path / "there").exists()


def test_numbers_that_the_weights_or_the_model_do_not_have_are_reported(model, save, tmp_path):
    done = convert_to_transformers(save(legacy(model, num_classes=90, num_select=3)), tmp_path / "training")
    assert done.changes == [("num_classes", "90 in the arguments", "4, as the head has")]
    content = best_file(model)
    content["model_config"]["num_select"] = 3
    done = convert_to_transformers(save(content), tmp_path / "model")
    assert done.changes == [("num_select", "3", "top_k=3 when called")]


def test_a_file_with_the_name_of_another_published_model_is_an_error_with_both(model, save, tmp_path):
    path = save(legacy(model), "rf-detr-nano.pth")
    with pytest.raises(ValueError, match=r"weights have .*, and rf-detr-nano has .*if it is no rf-detr-nano, rename"):
        convert_to_transformers(path, tmp_path / "there")


def test_a_variant_that_the_weights_contradict_is_an_error_with_both(model, save, tmp_path):
    with pytest.raises(ValueError, match="the weights have dec_layers 4, and rf-detr-seg-xlarge has 6"):
        convert_to_transformers(save(legacy(model)), tmp_path / "there", variant="RFDETRSegXLarge")


def test_missing_tensors_are_an_error_that_names_them(model, save, tmp_path):
    content = legacy(model)
    del content["model"]["bbox_embed.layers.0.weight"], content["model"]["transformer.decoder.norm.bias"]
    with pytest.raises(ValueError, match=r"lacks 2 of the model's \d+ tensors: .*bbox_embed\.layers\.0\.weight"):
        convert_to_transformers(save(content), tmp_path / "there")
    content["model"] = torch.nn.Linear(2, 3).state_dict()
    with pytest.raises(ValueError, match=r"lacks .*query_feat\.weight, .*not of an RF-DETR model"):
        convert_to_transformers(save(content), tmp_path / "there")


def test_keypoint_models_are_refused(model, save, tmp_path):
    for path in (
        save(legacy(model, use_grouppose_keypoints=True), "argument.pth"),
        save(legacy(model) | {"model": model.state_dict() | {"keypoint_head.x": torch.ones(1)}}, "tensor.pth"),
        "rf-detr-keypoint-preview-xlarge",
        "RFDETRKeypointPreview",
    ):
        with pytest.raises(ValueError, match=r"is an RF-DETR keypoint model, and there is no class for it here"):
            convert_to_transformers(path, tmp_path / "there")


# Classes


def test_a_head_of_91_rows_has_coco_s_ids(save, tmp_path):
    model = model_of(num_labels=91)
    for number, names in enumerate((None, list(COCO_NAMES.values()), COCO_NAMES)):
        done = convert_to_transformers(save(legacy(model, class_names=names)), tmp_path / str(number))
        assert done.config.id2label == COCO_ID2LABEL
        assert done.config.id2label[90] == "toothbrush"
    assert [change.what for change in done.changes] == []
    unnamed = convert_to_transformers(save(legacy(model, class_names=None)), tmp_path / "unnamed")
    assert [change.what for change in unnamed.changes] == ["class names"]
    names = [f"kind {number}" for number in range(90)]  # 90 classes of the user's are not COCO
    done = convert_to_transformers(save(legacy(model, class_names=names)), tmp_path / "own")
    assert done.config.id2label[17] == "kind 17"
    assert done.config.id2label[90] == "__background__"


# rfdetr's own rules: (version and data, rows, what its arguments hold) -> names by row. Before 1.6 `train` gave the
# head `num_classes` rows: one more than names of Roboflow's data, whose ids count from 1, and as many of YOLO's.
HEADS = {
    "1.4, Roboflow": (4, {"class_names": NAMES[:3], "num_classes": 4}, ["__parent__", *NAMES[:3]]),
    "1.4, YOLO": (3, {"class_names": NAMES[:3], "num_classes": 3}, NAMES[:3]),
    "1.4, Roboflow, a model made with num_classes": (
        7,
        {"class_names": NAMES[:3], "num_classes": 4},
        ["__parent__", *NAMES[:3], "__unused_4__", "__unused_5__", "__unused_6__"],
    ),
    "1.7": (4, {"class_names": NAMES[:3], "model_name": "RFDETRNano"}, [*NAMES[:3], "__background__"]),
    "1.11": (
        4,
        {"class_names": NAMES[:3], "num_classes": 3, "model_name": "RFDETRNano"},
        [*NAMES[:3], "__background__"],
    ),
    "1.11, weights.pt": (4, {"class_names": NAMES[:3], "num_classes": 3}, [*NAMES[:3], "__background__"]),
    "1.11, a model made with num_classes": (
        5,
        {"class_names": NAMES[:3], "num_classes": 4, "model_name": "RFDETRNano"},
        [*NAMES[:3], "__unused_3__", "__background__"],
    ),
    "no names": (4, {"num_classes": 3}, ["class 0", "class 1", "class 2", "class 3"]),
    "a mapping": (4, {"class_names": {2: "c", 0: "a", 1: "b"}, "num_classes": 3}, ["a", "b", "c", "__background__"]),
}


@pytest.mark.parametrize("head", HEADS)
def test_rows_have_the_names_of_the_classes_that_rfdetr_trained_them_for(head):
    rows, arguments, expected = HEADS[head]
    changes = []
    assert conversion._read_classes(rows, arguments, None, changes) == dict(enumerate(expected))
    is_plain = expected in ([*NAMES[:3], "__background__"], NAMES[:3], ["a", "b", "c", "__background__"])
    assert bool(changes) == (not is_plain)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "c", "d"], r"head has 4 rows, and there are 4 class names \(a, b, c, d\)"),
        (["a", "b", "a"], "the class names a are there twice"),
        (["a", "b", "__background__"], "the class names __background__ are there twice, or are such as __background__"),
        (7, "the class names are 7, and not a list of names"),
        ([1, 2, 3], r"the class names are \[1, 2, 3\], and not a list of names"),
        ({"a": 1}, "the class names are a dict, and not a list of names"),
    ],
)
def test_names_that_cannot_be_the_rows_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        conversion._read_classes(4, {"class_names": names, "model_name": "RFDETRNano"}, None, [])


def test_names_can_be_given(model, save, tmp_path):
    path = save(legacy(model, class_names=None))
    done = convert_to_transformers(path, tmp_path / "given", class_names=["a", "b", "c", "d"])
    assert list(done.config.id2label.values()) == ["a", "b", "c", "d", "__background__"]
    with pytest.raises(ValueError, match=r"head has 5 rows, and there are 6 class names"):
        convert_to_transformers(path, tmp_path / "many", class_names=["a", "b", "c", "d", "e", "f"])


def test_a_head_without_names_goes_back_as_it_was(model, save, tmp_path):
    convert_to_transformers(save(legacy(model, class_names=None)), tmp_path / "there")
    assert convert_to_rfdetr(tmp_path / "there", tmp_path / "back.pth").changes == []
    returned = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(returned["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert returned["args"]["class_names"] is None


@pytest.mark.parametrize(("names", "never"), [(NAMES, [4]), (["barn", "house", "shed", "silo"], [0])])
def test_rows_that_are_no_class_are_never_reported(names, never, model, save, tmp_path):
    with torch.no_grad():
        model.class_embed.bias[never] = 20.0
    count = 4 if never == [4] else 5  # as of version 1.11, and of 1.4
    convert_to_transformers(save(legacy(model, class_names=names, num_classes=count)), tmp_path / "there")
    ours = RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "there").eval()
    processor = RfDetrImageProcessor.from_pretrained(tmp_path / "there")
    inputs = processor(np.full((30, 40, 3), 90, np.uint8), return_tensors="pt")
    with torch.no_grad():
        outputs = ours(**inputs)
        raw = ours.class_embed(outputs.last_hidden_state)
    classes = [label for label in range(5) if label not in never]
    assert torch.equal(outputs.logits[..., classes], raw[..., classes])
    assert (raw[..., never].sigmoid() > 0.5).all()
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(30, 40)])[0]
    assert len(found["labels"]) == ours.config.num_queries
    assert set(found["labels"].tolist()) <= set(classes)
    ours.train()  # where every row is a target of the loss
    assert (ours(**inputs).logits > -100).all()


# Files that are not what they should be


class Custom:
    pass


class Payload:
    """Runs a command while it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(sentinel):
    return {
        "os.system": Payload(os.system, f"touch {sentinel}"),
        "eval": Payload(eval, f"open({str(sentinel)!r}, 'w')"),
        "subprocess": Payload(subprocess.call, ["touch", str(sentinel)]),
        "a custom class": Custom(),
        "a path": Path("run"),
    }


# As protocol 2 writes them, and as torch 2.6 and later name them.
FOUND = {
    "os.system": r"posix\.system",
    "eval": r"(builtins|__builtin__)\.eval",
    "subprocess": r"(subprocess|commands)\.call",
}
FOUND |= {"a custom class": r"test_conversion\.Custom", "a path": r"pathlib.*PosixPath"}


@pytest.mark.skipif(os.name != "posix", reason="the names of the payloads are Posix's")
@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(kind, form, model, tmp_path):
    sentinel, path = tmp_path / "sentinel", tmp_path / "bad.pth"
    content = legacy(model) | {"extra": payloads(sentinel)[kind]}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=rf"bad\.pth holds {FOUND[kind]} .*--trust-checkpoint"):
        convert_to_transformers(path, tmp_path / "there")
    assert not sentinel.exists()
    assert not (tmp_path / "there").exists()


@pytest.mark.skipif(os.name != "posix", reason="the path is Posix's")
def test_a_file_with_more_is_read_when_it_is_trusted(model, save, tmp_path):
    done = convert_to_transformers(save(legacy(model, notes=Path("run"))), tmp_path / "there", trust_checkpoint=True)
    assert_equal(weights_in(done.output), model.state_dict())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_files_of_another_kind_are_refused_with_the_reason(model, save, tmp_path):
    whole = save(legacy(model)).read_bytes()
    save_file({"a": torch.ones(2)}, tmp_path / "renamed.pth")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("a.txt", "a")
    files = {
        "empty.pth": (b"", "is empty"),
        "cut.pth": (whole[: len(whole) // 2], f"is cut off after {len(whole) // 2} bytes"),
        "almost.pth": (whole[:-10], "is cut off"),
        "page.pth": (b"<!DOCTYPE html><html>404</html>", "starts with b'<!DOCTYP'"),
        "picture.pth": (b"\x89PNG\r\n\x1a\n0000000000", "starts with b'\\x89PNG"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "renamed.pth": (None, "is a safetensors file"),
        "script.pt": (None, "is a TorchScript module"),
        "archive.pth": (None, "is a zip archive without data.pkl"),
        "noise.pth": (b"\x80" + bytes(range(256)), "holds what torch does not load as weights"),
    }
    for name, (content, reason) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            read_rfdetr_file(tmp_path / name)
        assert reason in str(error.value)
    for content, reason in (
        ([1, 2], "holds a list"),
        ({}, "holds a dict"),
        ({"epoch": 3, "lr": 0.1}, "holds 'epoch', 'lr': no RF-DETR checkpoint"),
        ({"model": {"a": 1}}, "holds 'model': no RF-DETR checkpoint"),
        (torch.ones(2), "holds a Tensor"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_rfdetr_file(save(content, "content.pth"))
    with pytest.raises(ValueError, match="is a folder"):
        read_rfdetr_file(tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        convert_to_transformers("nowhere", tmp_path / "there")


def nested(levels, kind=list):
    """A list of two references to a list of two references to ...: some bytes in a file, 2^levels texts when shown."""
    value = kind(["x"])
    for _ in range(levels):
        value = kind([value, value])
    return value


GROWING = ["resolution", "projector_scale", "class_names", "encoder", "two_stage", "use_grouppose_keypoints"]


@pytest.mark.parametrize("name", GROWING)
def test_stored_lists_that_grow_are_refused_without_their_text(name, model, save, tmp_path):
    path = save(legacy(model, **{name: nested(22)}))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"checkpoint\.pth: the .*(is|are) a list, and not") as error:
        convert_to_transformers(path, tmp_path / "there")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert name.replace("_", " ") in str(error.value).replace("_", " ")
    assert peak < 4 << 20  # the text has 2^22 times "x"


def test_keys_and_texts_that_grow_are_cut_in_messages(model, save, tmp_path):
    with pytest.raises(ValueError, match=r"holds a tuple, 'epoch': no RF-DETR checkpoint"):
        read_rfdetr_file(save({nested(12, tuple): 1, "epoch": 2}))
    with pytest.raises(ValueError, match="no RF-DETR checkpoint") as error:
        read_rfdetr_file(save({"a" * 10**6: 1, 10**600: 2}))
    assert f"'{'a' * 80}'..., an int:" in str(error.value)
    for value, shown in ((10**600, "an int"), ([10**600], "[an int]"), (torch.ones(3), "a Tensor")):
        for name in ("num_queries", "out_feature_indexes", "model_name"):
            with pytest.raises(ValueError, match=rf"argument {name} is {re.escape(shown)}, and not"):
                convert_to_transformers(save(legacy(model, **{name: value})), tmp_path / "there")


def test_an_archive_that_unpacks_to_much_more_than_its_size_is_refused_unread(save, tmp_path):
    with zipfile.ZipFile(save({"model": {"x": torch.zeros(2)}})) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, size in (("fine.pth", 1 << 19), ("bomb.pth", 3 << 20)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as packed:
            for member, content in members.items():
                packed.writestr(member, content + bytes(size) if member.endswith("data/1") else content)
            packed.writestr("checkpoint/data/1", bytes(size))
    assert set(read_rfdetr_file(tmp_path / "fine.pth").state_dict) == {"x"}
    with pytest.raises(ValueError, match=r"bomb\.pth has \d+ bytes and unpacks to 3\d{6}, .* no more than 4 times as"):
        read_rfdetr_file(tmp_path / "bomb.pth")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_tensors_that_repeat_what_is_stored_once_are_refused_and_tied_ones_are_not(options, save):
    row = torch.ones(1, 1000)
    with pytest.raises(ValueError, match=r"'x' \(1000x1000\) takes 4000000 bytes, and 4000 are stored for it; save a"):
        read_rfdetr_file(save({"model": {"x": row.expand(1000, 1000)}}, **options))
    overlapping = torch.ones(1999).as_strided((1000, 1000), (1, 1))
    with pytest.raises(ValueError, match=r"'x' \(1000x1000\) takes 4000000 bytes, and 7996 are stored for it"):
        read_rfdetr_file(save({"model": {"x": overlapping}}, **options))
    with pytest.raises(ValueError, match=r"its tensors take 400000 bytes, more than 4 times the \d+ that are stored"):
        read_rfdetr_file(save({"model": {f"x{number}": row for number in range(100)}}, **options))
    tied = {"model": {"x": row, "y": row, "z": row[:, 500:]}, "ema_model": {"x": row}}
    assert set(read_rfdetr_file(save(tied, **options)).state_dict) == {"x", "y", "z"}


def test_adapters_whose_product_is_of_another_size_are_refused_before_it_is_made(save):
    thin = {"lora_A": torch.ones(1, 10**6), "lora_B": torch.ones(10**6, 1)}  # of 4 TB
    whole = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2), "lora_magnitude_vector": torch.ones(4)}
    strange = {
        "thin": ({"weight": torch.ones(1)}, thin),
        "long": ({"weight": torch.ones(4, 3)}, whole | {"lora_magnitude_vector": torch.ones(10**6, 1)}),
        "of no rank": ({"weight": torch.ones(4, 3)}, {"lora_A": torch.ones(0, 3), "lora_B": torch.ones(4, 0)}),
        "a number": ({"weight": torch.ones(4, 3)}, {"lora_A": torch.tensor(1.0), "lora_B": torch.ones(4, 2)}),
        "in bytes": ({"weight": torch.ones(4, 3)}, {name: t.to(torch.float8_e4m3fn) for name, t in whole.items()}),
    }
    for weight, parts in strange.values():
        state = {"a.base_layer.weight": weight["weight"]}
        state |= {f"a.{name}.default.weight": part for name, part in parts.items()}
        with pytest.raises(ValueError, match=r"the adapter of 'a' does not fit: weight .*, lora_A .*, lora_B "):
            read_rfdetr_file(save({"model": state}))


def test_a_refusal_comes_without_warnings_of_torch(model, save, recwarn):
    with pytest.raises(ValueError, match="--trust-checkpoint"):
        read_rfdetr_file(save(legacy(model), pickle_protocol=4))
    assert not recwarn.list


def test_a_tensor_that_is_there_twice_is_an_error(model, save, tmp_path):
    state = model.state_dict() | {"module.class_embed.bias": torch.ones(5)}
    with pytest.raises(
        ValueError, match=r"holds 'class_embed.bias' twice, the second time as 'module.class_embed.bias'"
    ):
        convert_to_transformers(save(legacy(model) | {"model": state}), tmp_path / "there")


# Nothing half-written


def test_a_folder_that_is_there_is_left_alone(model, save, tmp_path):
    (tmp_path / "there").mkdir()
    path = save(legacy(model))
    convert_to_transformers(path, tmp_path / "there")  # it was empty
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"there is there already; give another name, or remove it"):
        convert_to_transformers(path, tmp_path / "there")
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"
    (tmp_path / "model.pth").write_text("mine")
    with pytest.raises(ValueError, match=r"model\.pth is there already"):
        convert_to_rfdetr(tmp_path / "there", tmp_path / "model.pth")


def test_an_interrupted_conversion_leaves_nothing(model, save, tmp_path, monkeypatch):
    path = save(legacy(model))
    convert_to_transformers(path, tmp_path / "fine")
    before = sorted(tmp_path.iterdir())

    def interrupt(content, target, *args):
        Path(target if isinstance(target, Path) else target.name).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_transformers(path, tmp_path / "there")
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_rfdetr(tmp_path / "fine", tmp_path / "back.pth")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_conversion_leaves_no_folder_of_that_name_and_the_next_run_makes_it(model, save, tmp_path):
    path = save(legacy(model))
    convert_to_transformers(path, tmp_path / "fine")
    job = functools.partial(convert_to_transformers, path, tmp_path / "there")
    for fault in ({"longest": 10_000}, *({"dies_at": place} for place in range(0, 10, 2))):
        assert attempt(job, **fault).signal in (signal.SIGKILL, signal.SIGXFSZ)
        assert not (tmp_path / "there").exists(), fault
    job()
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


# The way back


def test_a_model_is_the_same_file_whenever_and_under_whatever_name_it_is_written(model, tmp_path):
    for name in ("one.pth", "other.pth"):
        write_rfdetr_file(tmp_path / name, model.state_dict(), "RFDETRSegNano", {"num_queries": 4}, None)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()


def test_our_own_heads_get_the_row_that_rfdetr_takes_for_no_class(tmp_path):
    model = model_of(num_labels=None, id2label=dict(enumerate(["a", "b", "c"])))
    model.save_pretrained(tmp_path / "ours")
    done = convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")
    assert done.changes == [("class heads", "3 rows", "4: rfdetr takes the last one for no object's")]
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert content["args"]["class_names"] == ["a", "b", "c"]
    assert content["model_config"]["num_classes"] == 3
    heads = [name for name in content["model"] if "class_embed" in name]
    assert len(heads) == 2 * (1 + 3)
    for name, tensor in content["model"].items():
        if name == "_kp_active_mask":
            assert tensor.shape == (0, 0)
        elif name in heads:
            assert torch.equal(tensor[:3], model.state_dict()[name])
            assert (tensor[3:] == (-100 if name.endswith("bias") else 0)).all()
        else:
            assert torch.equal(tensor, model.state_dict()[name])
    there = convert_to_transformers(tmp_path / "back.pth", tmp_path / "again")
    assert list(there.config.id2label.values()) == ["a", "b", "c", "__background__"]


def test_coco_s_heads_go_back_as_they_are(tmp_path):
    model = model_of("rf-detr-nano", num_labels=None, id2label=COCO_ID2LABEL)
    model.save_pretrained(tmp_path / "ours")
    done = convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert done.changes == []
    assert content["args"]["class_names"] == list(COCO_NAMES.values())
    assert content["model_config"]["num_classes"] == 90
    assert content["model_name"] == "RFDETRNano"


def test_a_folder_of_transformers_port_goes_back(tmp_path):
    port = pytest.importorskip("transformers.models.rf_detr.modeling_rf_detr")
    model = model_of("rf-detr-seg-small")
    model.save_pretrained(tmp_path / "ours")
    theirs = port.RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "ours")
    for original_format in (True, False):
        folder = tmp_path / f"port_{original_format}"
        theirs.save_pretrained(folder, save_original_format=original_format)
        convert_to_rfdetr(folder, tmp_path / f"{folder.name}.pth")
        returned = torch.load(tmp_path / f"{folder.name}.pth", weights_only=True)["model"]
        for name, tensor in model.state_dict().items():
            rows = slice(None) if "class_embed" not in name else slice(5)
            assert torch.equal(returned[name][rows], tensor)


def test_what_rfdetr_cannot_build_is_refused(tmp_path):
    cases = {
        "resolution is (24, 48)": {"resolution": [24, 48]},
        "decoder_ffn_dim is 64": {"decoder_ffn_dim": 64},
        "position table is (2, 4)": {"backbone_config": {"image_size": [24, 48]}},
        "encoder (width, heads, registers) is (64, 2, 0)": {"backbone_config": {"hidden_size": 64}},
        "number of encoder layers is 13": {"backbone_config": {"num_hidden_layers": 13}},
    }
    for number, (message, overrides) in enumerate(cases.items()):
        model_of(**overrides).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match="rfdetr cannot build this model") as error:
            convert_to_rfdetr(tmp_path / str(number), tmp_path / "back.pth")
        assert message in str(error.value)
    RfDetrConfig().save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty: holds no weights"):
        convert_to_rfdetr(tmp_path / "empty", tmp_path / "back.pth")


STRANGE_TABLES = {
    "a reference that is a number": {"refpoint_embed.weight": torch.tensor(1.0)},
    "positions in a row": {POSITIONS: torch.zeros(17)},
    "no positions": {POSITIONS: torch.zeros(1, 0, 32)},
    "no queries": {"refpoint_embed.weight": torch.zeros(0, 4), "query_feat.weight": torch.zeros(0, 32)},
    "floats of a byte": {"class_embed.bias": torch.zeros(5, dtype=torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("what", STRANGE_TABLES)
def test_strange_tables_in_a_folder_are_refused_by_name_on_the_way_back(what, model, tmp_path):
    model.config.save_pretrained(tmp_path / "ours")
    save_file(model.state_dict() | STRANGE_TABLES[what], tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"ours.* ({'|'.join(map(re.escape, STRANGE_TABLES[what]))}) ") as error:
        convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")
    assert " is " in str(error.value)
    assert not (tmp_path / "back.pth").exists()


def test_a_shape_of_no_numbers_whose_product_overflows_is_refused_by_name(model, tmp_path):
    model.config.save_pretrained(tmp_path / "ours")
    header = b'{"mask_token": {"dtype": "F32", "shape": [0, %d, %d], "data_offsets": [0, 0]}}' % (2**62, 2**60)
    header = header.replace(b"mask_token", POSITIONS.replace("position_embeddings", "mask_token").encode())
    (tmp_path / "ours" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"ours: lacks \d+ of the model's"):
        convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")


# The card, the Hub and the commands


def test_names_of_classes_are_text_in_the_card(model, save, tmp_path):
    names = ["<script>alert(1)</script>", "a|b", "*bold* [x](y)", "line\nbreak"]
    convert_to_transformers(save(legacy(model, class_names=names)), tmp_path / "there")
    card = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card
    assert r"| 1 | a\|b |" in card
    assert r"| 2 | \*bold\* \[x\](y) |" in card
    assert "| 3 | line break |" in card
    assert "__background__" not in card
    assert "pipeline_tag: image-segmentation" in card


def test_the_folder_is_uploaded_when_asked_for(model, save, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(conversion, "HfApi", Api)
    convert_to_transformers(save(legacy(model)), tmp_path / "there", push_to_hub="me/barns", private=True)
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert calls == [("create", "me/barns", {"private": True, "exist_ok": True}), ("upload", "me/barns", files)]
    assert 'from_pretrained("me/barns")' in (tmp_path / "there" / "README.md").read_text(encoding="utf-8")

    def refuse(self, **options):
        raise RuntimeError("401")

    monkeypatch.setattr(Api, "upload_folder", refuse)
    with pytest.raises(OSError, match=r"again is whole, but was not uploaded: 401; .* `hf upload me/barns .*again`"):
        convert_to_transformers(save(legacy(model)), tmp_path / "again", push_to_hub="me/barns")
    assert_equal(weights_in(tmp_path / "again"), model.state_dict())


def test_the_commands_convert_there_and_back(model, save, tmp_path):
    path = save(legacy(model, class_names=None))
    (tmp_path / "class_names.txt").write_text("barn\nhouse\nshed\nsilo\n")
    there, back = tmp_path / "there", tmp_path / "back.pth"
    result = CliRunner().invoke(
        app, ["convert", str(path), str(there), "--class-names", str(tmp_path / "class_names.txt")]
    )
    assert result.exit_code == 0
    assert "4 classes (barn, house, shed, silo)" in result.output
    assert "Everything was taken over as it was." in result.output
    assert f'AutoModelForInstanceSegmentation.from_pretrained("{there}")' in result.output
    result = CliRunner().invoke(app, ["convert-back", str(there), str(back)])
    assert result.exit_code == 0
    assert_equal(weights_in(there), model.state_dict())
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "given"), "--class-names", "a, b,c,d"])
    assert "4 classes (a, b, c, d)" in result.output
    for names, message in (("none.txt", "is no file"), ("a,,c,d", "a name that is empty, at label 1"), ("", "empty")):
        result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "wrong"), "--class-names", names])
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_command_says_in_a_line_what_is_wrong(tmp_path):
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "none.pth"), str(tmp_path / "there")])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"convert: {tmp_path / 'none.pth'} does not exist; give a checkpoint file of rfdetr, such as"
        " checkpoint_best_total.pth, or a published name such as rf-detr-seg-nano"
    ]


@pytest.mark.parametrize("script", ["convert_rfdetr_to_hf.py", "convert_hf_to_rfdetr.py"])
def test_the_scripts_are_the_commands(script, tmp_path):
    command = [sys.executable, str(SCRIPTS / script), str(tmp_path / "none"), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr
