"""Untrusted checkpoints and configurations are refused without taking memory, and no code in them is run.

SECURITY.md lists the guarantees. Tests of pickles of rfdetr are in test_conversion.
"""

import ast
import json
import os
import re
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForInstanceSegmentation

import transformers_rfdetr
from transformers_rfdetr import (
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    load,
)
from transformers_rfdetr.model.validation import LIMITS

from small_models import small_config, small_model

PACKAGE = Path(transformers_rfdetr.__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small model and its processor."""
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    RfDetrImageProcessor(size=48).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved` that a test may change."""
    for file in saved.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # a link to the file that the other tests read
    path.write_bytes(content)


def rewrite(path: Path, *, backbone: dict | None = None, **fields: object) -> None:
    content = json.loads(path.read_bytes()) | fields
    if backbone:
        content["backbone_config"] |= backbone
    replace(path, json.dumps(content).encode())


# -- weights ---------------------------------------------------------------------------------------------------------


def header(tensors: dict, data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


WEIGHTS = {
    "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "a header of 99 MB that is not there": struct.pack("<Q", 99_000_000) + b"{}",
    "a tensor of 4 TB": header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
    "a shape that overflows": header({"a": {"dtype": "F32", "shape": [1 << 31, 1 << 33], "data_offsets": [0, 0]}}),
    "a header nested 100,000 times": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_with_a_false_size_are_refused_with_the_file(case, folder):
    replace(folder / "model.safetensors", WEIGHTS[case])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        RfDetrForInstanceSegmentation.from_pretrained(folder)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load(str(folder))


def test_an_empty_tensor_in_place_of_weights_is_refused(folder):
    name = {"class_embed.weight": {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]}}
    replace(folder / "model.safetensors", header(name))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load(str(folder))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors"])
def test_shards_outside_the_folder_are_not_read(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"class_embed.weight": name}}))
    with pytest.raises(ValueError, match=re.escape(name)):
        RfDetrForInstanceSegmentation.from_pretrained(folder)


def save_index(folder: Path, content: object) -> None:
    """Turn the weights into one shard, and write `content` as the index."""
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


INDICES = {
    "empty": {"weight_map": {}, "metadata": {}},
    "no map": {"metadata": {}},
    "a list": [1],
    "numbers for files": {"weight_map": {"class_embed.weight": 5}},
    "nested 200,000 times": b'{"weight_map":' + b"[" * 200_000,
}


@pytest.mark.parametrize("case", INDICES)
def test_an_invalid_index_is_refused(case, folder):
    save_index(folder, INDICES[case])
    for read in (RfDetrForInstanceSegmentation.from_pretrained, lambda name: load(str(name))):
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            read(folder)


@pytest.mark.parametrize("metadata", [{}, {"metadata": 5}], ids=["no metadata", "a number as metadata"])
def test_invalid_metadata_of_an_index_is_ignored(metadata, folder):
    weights = load_file(folder / "model.safetensors")
    save_index(folder, metadata | {"weight_map": dict.fromkeys(weights, "shard.safetensors")})
    model, _ = load(str(folder))
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], tensor), name


POSITIONS = "backbone.0.encoder.encoder.embeddings.position_embeddings"
TENSORS = [  # of a model of 16 patches and 3 groups of 6 queries, all 32 wide
    (
        "refpoint_embed.weight",
        torch.tensor(1.0),
        r"refpoint_embed\.weight.* \[\]",
    ),
    ("refpoint_embed.weight", torch.zeros(0, 4), r"refpoint_embed\.weight.* \[0, 4\]"),
    ("query_feat.weight", torch.zeros(18, 0), r"query_feat\.weight.* \[18, 0\]"),
    (POSITIONS, torch.zeros(17), r"position_embeddings.* \[17\]"),
    (POSITIONS, torch.zeros(1, 0, 32), r"position_embeddings.* \[1, 0, 32\]"),
    (POSITIONS, torch.zeros(1, 8, 32), r" 4 x 4 .*7 patches"),
    (POSITIONS, torch.zeros(1, 1 + 513**2, 32), r"patches.* 51[23].* 51[23]"),
    ("transformer.enc_output.3.bias", torch.zeros(32), r"refpoint_embed.* 4 groups.* 18"),
    *(
        (
            "class_embed.bias",
            torch.zeros(2, dtype=getattr(torch, dtype)),
            rf"class_embed\.bias.* {name}",
        )
        for dtype, name in (
            *(("bool", "BOOL"), ("uint16", "U16"), ("int64", "I64"), ("complex64", "C64")),
            *(("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2")),
        )
    ),
]


@pytest.mark.parametrize(("name", "tensor", "message"), TENSORS, ids=[f"{row[0]} {row[2][-25:]}" for row in TENSORS])
def test_tensors_of_a_wrong_shape_or_type_are_refused_by_name(name, tensor, message, folder):
    weights = load_file(folder / "model.safetensors") | {name: tensor}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    for read in (RfDetrForInstanceSegmentation.from_pretrained, lambda name: load(str(name))):
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*: .*{message}"):
            read(folder)


def test_a_query_group_without_its_head_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.enc_output.1.bias"]
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"enc_output\.1\.bias.* 3 groups"):
        load(str(folder), group_detr=2)


def test_an_embedding_of_another_width_is_refused(folder):
    weights = load_file(folder / "model.safetensors") | {"query_feat.weight": torch.zeros(3, 50_000)}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_every_usual_precision_are_read(dtype, folder):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["steps"] = torch.tensor(5)  # not a weight of the model
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    model, _ = load(str(folder))
    assert torch.equal(model.class_embed.weight, weights["class_embed.weight"].float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({5: torch.zeros(1)}, "5: Tensor"),
        ({"class_embed.bias": None}, "'class_embed.bias': NoneType"),
        (
            {"class_embed.bias": torch.zeros(2).to_sparse()},
            "'class_embed.bias': Tensor",
        ),
        ({"class_embed.bias": torch.zeros(2).long()}, "class_embed.bias.* torch.int64"),
        ({"model": {"class_embed.bias": torch.zeros(2)}}, "'model': dict"),
        ([1], "TypeError"),
        (None, "TypeError"),
    ],
    ids=["a number as name", "None", "sparse", "whole numbers", "nested", "a list", "nothing"],
)
def test_pickles_without_weights_are_refused(content, message, folder):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    for read in (RfDetrForInstanceSegmentation.from_pretrained, lambda name: load(str(name))):
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin.*({message})"):
            read(folder)


# -- configurations --------------------------------------------------------------------------------------------------

ABSURD = {
    "num_queries": {"num_queries": 10**9},
    "decoder_layers": {"decoder_layers": 10**6},
    "group_detr": {"group_detr": 10**6},
    "num_labels": {"num_labels": 10**9, "id2label": None, "label2id": None},
    "resolution": {"resolution": 24 * 10**6},
    "num_hidden_layers": {"backbone": {"num_hidden_layers": 10**9}},
    "image_size": {"backbone": {"image_size": 12 * 10**8}},
    "d_model": {"d_model": 10**7},
    "decoder_ffn_dim": {"decoder_ffn_dim": 10**12},
    "decoder_n_points": {"decoder_n_points": 10**9},
    "hidden_size": {"backbone": {"hidden_size": 10**7}},
    "num_register_tokens": {"backbone": {"num_register_tokens": 10**12}},
}
# Each value is below its limit, but the model would have too many parameters.
HEAVY = [
    {"d_model": 16_000, "decoder_ffn_dim": 1_000_000},
    {"backbone": {"hidden_size": 16_000}},
    {"backbone": {"patch_size": 8_160, "image_size": 8_160, "num_windows": 1}, "resolution": 8_160, "d_model": 16_000},
    {"group_detr": 100, "num_queries": 10_000, "d_model": 4_096},
    {"num_labels": 100_000, "id2label": None, "label2id": None, "group_detr": 10, "d_model": 4_096},
]


def refused(folder: Path) -> str:
    """Return the message with which every loader refuses the folder."""
    messages = set()
    for read in (
        RfDetrConfig.from_pretrained,
        AutoConfig.from_pretrained,
        RfDetrForInstanceSegmentation.from_pretrained,
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read(folder)
        messages.add(str(error.value))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load(str(folder))
    [message] = messages
    return message


@pytest.mark.parametrize("name", ABSURD)
def test_a_value_above_its_limit_is_refused_by_name(name, folder):
    rewrite(folder / "config.json", **ABSURD[name])
    assert name in refused(folder)
    assert f"LIMITS['{name}']" in refused(folder)


@pytest.mark.parametrize("fields", HEAVY, ids=str)
def test_a_model_of_too_many_parameters_is_refused_before_it_takes_memory(fields, folder):
    rewrite(folder / "config.json", **fields)
    config = RfDetrConfig.from_pretrained(folder)
    for build in (
        lambda: RfDetrForInstanceSegmentation.from_pretrained(folder),
        lambda: AutoModelForInstanceSegmentation.from_pretrained(folder),
        lambda: RfDetrForInstanceSegmentation(config),
        lambda: RfDetrForObjectDetection(config),
    ):
        before = memory()
        with pytest.raises(ValueError, match=r"parameters.*LIMITS\['parameters'\]"):
            build()
        assert memory() - before < 500
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}.*LIMITS\['parameters'\]"):
        load(str(folder))


def memory() -> float:
    """Return the highest resident memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_too_many_patches_are_refused():
    with pytest.raises(ValueError, match=r"patches.* 1000.*LIMITS\['patches'\]"):
        small_config(backbone_config={"patch_size": 2}, resolution=2_000)


def test_a_limit_can_be_raised(monkeypatch):
    with pytest.raises(ValueError, match=r"num_queries.* 20000"):
        small_config(num_queries=20_000)
    monkeypatch.setitem(LIMITS, "num_queries", 20_000)
    assert small_config(num_queries=20_000).num_queries == 20_000


@pytest.mark.parametrize("fields", ABSURD.values(), ids=ABSURD)
def test_a_refused_configuration_takes_no_memory(fields, folder):
    rewrite(folder / "config.json", **fields)
    tracemalloc.start()
    with pytest.raises(ValueError, match="LIMITS"):
        RfDetrConfig.from_pretrained(folder)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


JUNK = {
    "nested 100,000 times": b"[" * 100_000,
    "a list": b"[1]",
    "a text": b'"rf_detr"',
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "a number of 5,000 digits": b'{"model_type": "rf_detr", "num_queries": 1' + b"0" * 5_000 + b"}",
}


@pytest.mark.parametrize("case", JUNK)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_invalid_json_files_are_refused(name, case, folder):
    replace(folder / name, JUNK[case])
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}|digits"):
        load(str(folder))
    reader = RfDetrConfig if name == "config.json" else RfDetrImageProcessor
    with pytest.raises(ValueError, match=r"."):
        reader.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_queries": "300"}, "num_queries.* '300'"),
        ({"dropout": "0.1"}, "dropout.* '0.1'"),
        ({"class_cost": float("nan")}, "class_cost.* nan"),
        ({"auxiliary_loss": "false"}, "auxiliary_loss.* 'false'"),
        ({"id2label": {"1": "roof", "2": "tree"}}, r"id2label.* \[1, 2\]"),
        ({"id2label": {"0": None}}, r"id2label\[0\].* None"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": ["roof"]}, r"id2label.* (\['roof'\]|list)"),
        ({"backbone_config": 5}, "backbone_config.* 5"),
        ({"backbone": {"out_indices": {"a": []}}}, r"out_indices.* \{'a': \[\]\}"),
        ({"backbone": {"out_indices": None, "out_features": ["../stage1"]}}, "out_features.*'../stage1'"),
        ({"projector_scale": {"P4": 1}}, r"projector_scale.* \{'P4': 1\}"),
        ({"to_dict": "x"}, "to_dict"),
        ({"dtype": "load"}, "dtype.* 'load'"),
        ({"dtype": "float8_e4m3fn"}, "dtype.* 'float8_e4m3fn'"),
        ({"architectures": 5}, "architectures.* 5"),
        ({"architectures": [5]}, r"architectures.* \[5\]"),
        ({"model_type": [5]}, r"\[5\]"),
        ({"quantization_config": 5}, "quantization_config.* 5"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quantization_config"),
        (
            {"backbone": {"quantization_config": {"quant_method": "torchao"}}},
            "quantization_config",
        ),
        ({"transformers_weights": 5}, "transformers_weights.* 5"),
        ({"transformers_weights": "../a.safetensors"}, "transformers_weights.* '../a.safetensors'"),
        *(({name: 5}, name) for name in ("base_model_tp_plan", "sub_configs", "attribute_map", "_FIXED", "__dict__")),
        ({"backbone": {"_FIXED": 5}}, "_FIXED"),
    ],
)
def test_configuration_values_of_a_wrong_type_are_refused(fields, message, folder):
    rewrite(folder / "config.json", **fields)
    for read in (
        RfDetrConfig.from_pretrained,
        RfDetrForInstanceSegmentation.from_pretrained,
        lambda name: load(str(name)),
    ):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_empty_settings_that_transformers_writes_are_read(folder):
    rewrite(folder / "config.json", quantization_config=None, transformers_weights=None, architectures=None)
    assert load(str(folder))[0].config.num_queries == small_config().num_queries


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"height": 10**9, "width": 10**9}}, "size.* 1000000000 x 1000000000.*MAX_INPUT_PIXELS"),
        ({"pad_size": {"height": 10**9, "width": 48}}, "pad_size.* 1000000000 x 48.*MAX_INPUT_PIXELS"),
        ({"do_resize": "no"}, "do_resize.* 'no'"),
        ({"preprocess": 1}, "preprocess"),
        ({"image_mean": [0, 0, float("nan")]}, "image_mean"),
    ],
)
def test_invalid_processor_settings_are_refused(fields, message, folder):
    rewrite(folder / "preprocessor_config.json", **fields)
    with pytest.raises(ValueError, match=message):
        RfDetrImageProcessor.from_pretrained(folder)


# -- code ------------------------------------------------------------------------------------------------------------


def test_code_beside_a_model_is_not_run(folder):
    sentinel = folder / "was_run"
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    names = {"AutoConfig": "evil.RfDetrConfig", "AutoModelForInstanceSegmentation": "evil.Model"}
    rewrite(folder / "config.json", auto_map=names)
    rewrite(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Processor"})
    model, processor = load(str(folder))
    assert (
        type(AutoModelForInstanceSegmentation.from_pretrained(folder)) is type(model) is RfDetrForInstanceSegmentation
    )
    assert type(AutoImageProcessor.from_pretrained(folder)) is type(processor) is RfDetrImageProcessor
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_stored_attention_kernel_is_not_fetched(name, folder):
    rewrite(folder / "config.json", **{name: "someone/kernel"})
    for auto in (AutoConfig, RfDetrConfig):
        assert "someone/kernel" not in str(vars(auto.from_pretrained(folder)))
    model = RfDetrForInstanceSegmentation.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_the_package_never_trusts_remote_code():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "trust_remote_code" not in source:
            continue
        tree = ast.parse(source)
        called = [keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
        assert "trust_remote_code" not in called, path
