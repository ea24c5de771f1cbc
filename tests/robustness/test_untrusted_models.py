"""Files from strangers: refused with a word, before they take memory, and never run. SECURITY.md says what is promised.

Elsewhere: pickles (test_conversion), class and file names in pages (test_report) and in model cards (test_hub).
"""

import ast
import importlib
import json
import os
import re
import struct
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForInstanceSegmentation

import transformers_rfdetr
from transformers_rfdetr import (
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrImageProcessor,
    load,
    load_instance_dataset,
    predict,
)
from transformers_rfdetr.data.checks.check import check_dataset
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.inference.folder import list_images, predict_to_folder
from transformers_rfdetr.model.image_io import read_rgb
from transformers_rfdetr.model.masks import rasterize, read_segmentation
from transformers_rfdetr.model.validation import LIMITS
from transformers_rfdetr.model.variants_rf_detr import VARIANTS

from small_models import small_config, small_model, stand_in_config

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
    """The same, to be spoilt."""
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


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_of_absurd_size_are_refused_with_the_file(what, folder):
    replace(folder / "model.safetensors", WEIGHTS[what])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as weights"):
        RfDetrForInstanceSegmentation.from_pretrained(folder)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(str(folder))


def test_a_tensor_of_no_numbers_in_place_of_weights_is_refused(folder):
    name = {"class_embed.weight": {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 0]}}
    replace(folder / "model.safetensors", header(name))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(str(folder))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors"])
def test_shards_outside_of_the_folder_are_not_read(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"class_embed.weight": name}}))
    with pytest.raises(ValueError, match="lists files outside its folder"):
        RfDetrForInstanceSegmentation.from_pretrained(folder)


def save_index(folder: Path, content: object) -> None:
    """The weights as one shard, with an index of their names that holds something else besides."""
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


@pytest.mark.parametrize("what", INDICES)
def test_an_index_of_something_else_is_refused(what, folder):
    save_index(folder, INDICES[what])
    for read in (RfDetrForInstanceSegmentation.from_pretrained, lambda name: load(str(name))):
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of weights"):
            read(folder)


@pytest.mark.parametrize("metadata", [{}, {"metadata": 5}], ids=["no metadata", "a number as metadata"])
def test_shards_are_read_whatever_their_index_says_of_itself(metadata, folder):
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
        r"refpoint_embed\.weight is of shape \[\]; it must be \(queries, width",
    ),
    ("refpoint_embed.weight", torch.zeros(0, 4), r"refpoint_embed\.weight is of shape \[0, 4\]; .* none of them 0"),
    ("query_feat.weight", torch.zeros(18, 0), r"query_feat\.weight is of shape \[18, 0\]"),
    (POSITIONS, torch.zeros(17), r"position_embeddings is of shape \[17\]; it must be \(1, 1 \+ patches, width\)"),
    (POSITIONS, torch.zeros(1, 0, 32), r"position_embeddings is of shape \[1, 0, 32\]"),
    (POSITIONS, torch.zeros(1, 8, 32), r"has 7 patches, neither 4 x 4 as its config\.json says nor a square"),
    (POSITIONS, torch.zeros(1, 1 + 513**2, 32), r"patches 513 is above the limit of 512"),
    ("transformer.enc_output.3.bias", torch.zeros(32), r"has 18 rows, no whole number for each of 4 first-stage heads"),
    *(
        (
            "class_embed.bias",
            torch.zeros(2, dtype=getattr(torch, dtype)),
            rf"class_embed\.bias is of {name}; .* bfloat16",
        )
        for dtype, name in (
            *(("bool", "BOOL"), ("uint16", "U16"), ("int64", "I64"), ("complex64", "C64")),
            *(("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2")),
        )
    ),
]


@pytest.mark.parametrize(("name", "tensor", "message"), TENSORS, ids=[f"{row[0]} {row[2][-25:]}" for row in TENSORS])
def test_tensors_that_are_no_weights_of_the_model_are_refused_by_name(name, tensor, message, folder):
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
    with pytest.raises(ValueError, match=r"enc_output\.1\.bias is missing; each of 3 groups has one"):
        load(str(folder), group_detr=2)


def test_a_table_of_another_width_is_not_made_larger(folder):
    weights = load_file(folder / "model.safetensors") | {"query_feat.weight": torch.zeros(3, 50_000)}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="Its weights have other shapes than its config"):
        load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_usual_precision_are_read(dtype, folder):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["steps"] = torch.tensor(5)  # nothing of the model
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    model, _ = load(str(folder))
    assert torch.equal(model.class_embed.weight, weights["class_embed.weight"].float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({5: torch.zeros(1)}, "holds 5: Tensor; a file of weights holds dense tensors by name"),
        ({"class_embed.bias": None}, "holds 'class_embed.bias': NoneType; "),
        ({"class_embed.bias": torch.zeros(2).to_sparse()}, "holds 'class_embed.bias': Tensor; .* dense"),
        ({"class_embed.bias": torch.zeros(2).long()}, "class_embed.bias is of torch.int64; weights are float32"),
        ({"model": {"class_embed.bias": torch.zeros(2)}}, "holds 'model': dict; "),
        ([1], "cannot be read as weights: TypeError"),
        (None, "cannot be read as weights: TypeError"),
    ],
    ids=["a number as name", "None", "sparse", "whole numbers", "nested", "a list", "nothing"],
)
def test_pickles_of_something_else_are_refused(content, message, folder):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    for read in (RfDetrForInstanceSegmentation.from_pretrained, lambda name: load(str(name))):
        with pytest.raises(ValueError, match=rf"pytorch_model\.bin:? .*{message}"):
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
}
# Each of these would be too many parameters: nine of ten tables and matrices are of these sizes.
HEAVY = [
    {"d_model": 10**7},
    {"decoder_ffn_dim": 10**12},
    {"decoder_n_points": 10**9},
    {"backbone": {"hidden_size": 10**7}},
    {"backbone": {"num_register_tokens": 10**12}},
    {"backbone": {"patch_size": 8_160, "image_size": 8_160, "num_windows": 1}, "resolution": 8_160, "d_model": 32_000},
    {"group_detr": 1_000, "num_queries": 10_000, "d_model": 1_024},
]


def refused(folder: Path) -> str:
    """The message with which the folder is refused by each way of loading it."""
    messages = set()
    for read in (
        RfDetrConfig.from_pretrained,
        AutoConfig.from_pretrained,
        RfDetrForInstanceSegmentation.from_pretrained,
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read(folder)
        messages.add(str(error.value))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(str(folder))
    [message] = messages
    return message


@pytest.mark.parametrize("name", ABSURD)
def test_one_absurd_value_is_refused_by_its_name(name, folder):
    rewrite(folder / "config.json", **ABSURD[name])
    assert f"{name} " in refused(folder)
    assert f"LIMITS['{name}']" in refused(folder)


@pytest.mark.parametrize("fields", HEAVY, ids=str)
def test_more_parameters_than_any_model_has_are_refused(fields, folder):
    rewrite(folder / "config.json", **fields)
    assert "LIMITS['parameters']" in refused(folder)


def test_many_small_patches_are_refused():
    with pytest.raises(ValueError, match=r"patches 1000 is above the limit of 512.*LIMITS\['patches'\]"):
        small_config(backbone_config={"patch_size": 2}, resolution=2_000)


def test_a_limit_is_raised_by_its_name(monkeypatch):
    with pytest.raises(ValueError, match=r"num_queries 20000 is above the limit of 10000"):
        small_config(num_queries=20_000)
    monkeypatch.setitem(LIMITS, "num_queries", 20_000)
    assert small_config(num_queries=20_000).num_queries == 20_000


@pytest.mark.parametrize(
    "config",
    [RfDetrConfig.from_variant(name) for name in VARIANTS]
    + [stand_in_config("rf-detr-large-deprecated", num_labels=5_000)],
    ids=[*VARIANTS, "two levels"],
)
def test_the_parameters_that_are_limited_are_those_of_the_model(config):
    with torch.device("meta"):
        model = RfDetrForInstanceSegmentation(config)
    assert config._num_parameters(config.num_labels) == pytest.approx(model.num_parameters(), rel=0.03)


@pytest.mark.parametrize("fields", [*ABSURD.values(), *HEAVY], ids=str)
def test_what_is_refused_takes_no_memory(fields, folder):
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


@pytest.mark.parametrize("what", JUNK)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_files_of_settings_that_are_something_else_are_refused(name, what, folder):
    replace(folder / name, JUNK[what])
    with pytest.raises(ValueError, match=r"cannot be read|not a dictionary|no dictionary|4300 digits|cannot be loaded"):
        load(str(folder))
    reader = RfDetrConfig if name == "config.json" else RfDetrImageProcessor
    with pytest.raises(ValueError, match=r"."):
        reader.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_queries": "300"}, "num_queries '300' must be a whole number"),
        ({"dropout": "0.1"}, "dropout '0.1' must be a finite number"),
        ({"class_cost": float("nan")}, "class_cost nan must be a finite number"),
        ({"auxiliary_loss": "false"}, "auxiliary_loss 'false' must be true or false"),
        ({"id2label": {"1": "roof", "2": "tree"}}, r"slots \[1, 2\]; they must be 0 .. 1"),
        ({"id2label": {"0": None}}, r"id2label\[0\] is None, not a name"),
        ({"id2label": {}}, "id2label numbers its slots"),
        ({"id2label": ["roof"]}, "id2label .* is no mapping"),
        ({"backbone_config": 5}, "backbone_config 5 is neither"),
        ({"backbone": {"out_indices": {"a": []}}}, "out_indices .* must ascend"),
        ({"backbone": {"out_indices": None, "out_features": ["../stage1"]}}, "no names of stages"),
        ({"projector_scale": {"P4": 1}}, "projector_scale .* is no list of levels"),
        ({"to_dict": "x"}, "'to_dict' is no setting of RfDetrConfig but a method"),
        ({"dtype": "load"}, "dtype 'load' is no floating-point type"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is no floating-point type"),
        ({"architectures": 5}, "architectures 5 is no list of names of classes"),
        ({"architectures": [5]}, r"architectures \[5\] is no list of names of classes"),
        ({"model_type": [5]}, r"model_type \[5\] is no name of a kind of model|Its config.json is of \[5\]"),
        ({"quantization_config": 5}, "quantization_config 5 is not followed: quantised weights are not read"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quantization_config {.*} is not followed"),
        (
            {"backbone": {"quantization_config": {"quant_method": "torchao"}}},
            "quantization_config {.*} is not followed",
        ),
        ({"transformers_weights": 5}, r"transformers_weights 5 is not followed: .* model\.safetensors"),
        ({"transformers_weights": "../a.safetensors"}, "transformers_weights '../a.safetensors' is not followed"),
        *(
            ({name: 5}, f"'{name}' is no setting of RfDetrConfig but part of the class")
            for name in ("base_model_tp_plan", "sub_configs", "attribute_map", "_FIXED", "__dict__")
        ),
        ({"backbone": {"_FIXED": 5}}, "'_FIXED' is no setting of RfDetrDinov2Config but part of the class"),
    ],
)
def test_values_of_another_kind_are_refused_with_the_rule(fields, message, folder):
    rewrite(folder / "config.json", **fields)
    for read in (
        RfDetrConfig.from_pretrained,
        RfDetrForInstanceSegmentation.from_pretrained,
        lambda name: load(str(name)),
    ):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_settings_that_transformers_writes_empty_are_read(folder):
    rewrite(folder / "config.json", quantization_config=None, transformers_weights=None, architectures=None)
    assert load(str(folder))[0].config.num_queries == small_config().num_queries


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"height": 10**9, "width": 10**9}}, "size is 1000000000 x 1000000000, .*MAX_INPUT_PIXELS"),
        ({"pad_size": {"height": 10**9, "width": 48}}, "pad_size is 1000000000 x 48, .*MAX_INPUT_PIXELS"),
        ({"do_resize": "no"}, "do_resize 'no' is neither true nor false"),
        ({"preprocess": 1}, "'preprocess' is no setting of RfDetrImageProcessor but a method"),
        ({"image_mean": [0, 0, float("nan")]}, "image_mean"),
    ],
)
def test_settings_of_a_processor_are_refused_with_the_rule(fields, message, folder):
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
def test_a_stored_name_of_a_kernel_is_not_followed(name, folder):
    rewrite(folder / "config.json", **{name: "someone/kernel"})
    for auto in (AutoConfig, RfDetrConfig):
        assert "someone/kernel" not in str(vars(auto.from_pretrained(folder)))
    model = RfDetrForInstanceSegmentation.from_pretrained(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_nothing_of_ours_trusts_remote_code():
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "trust_remote_code" not in source:
            continue
        tree = ast.parse(source)
        called = [keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
        assert "trust_remote_code" not in called, path


# -- pictures --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(autouse=True)
def pillows_own_limit(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 89_478_485)  # rfdetr lifts it when it is imported


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A PNG of a few kilobytes that says it is 30,000 x 30,000 pixels."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b""))
    return path


def test_an_image_bomb_is_refused_with_its_name_wherever_it_is_read(bomb):
    for read in (read_rgb, RfDetrImageProcessor(size=48)):
        with pytest.raises(ValueError, match=r"bomb\.png cannot be opened as an image: .* exceeds limit"):
            read(bomb)
    with pytest.raises(ValueError, match=r"picture 0: .*bomb\.png"):
        predict(small_model(), RfDetrImageProcessor(size=48), str(bomb))
    coco = {"images": [{"id": 1, "file_name": "bomb.png"}], "categories": [{"id": 1, "name": "roof"}]}
    dataset = InstanceDataset(coco, bomb.parent)
    with pytest.raises(ValueError, match=r"image 0 \('bomb\.png', 1\): .* exceeds limit"):
        dataset[0]
    with pytest.raises(ValueError, match=r"bomb\.png.* exceeds limit"):
        dataset.coco()


def test_a_folder_with_an_image_bomb_is_predicted_but_for_that(bomb, tmp_path):
    os.link(bomb, tmp_path / "bomb.png")
    PIL.Image.new("RGB", (20, 10)).save(tmp_path / "fine.png")
    summary = predict_to_folder(
        small_model(), RfDetrImageProcessor(size=48), list_images([str(tmp_path)]), tmp_path / "out", progress=False
    )
    [(key, reason)] = summary.failed
    assert (summary.done, Path(key).name) == (1, "bomb.png")
    assert "exceeds limit" in reason


def test_the_limit_of_pictures_is_pillow_s(tmp_path, monkeypatch):
    PIL.Image.new("RGB", (30, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 149)  # Pillow warns above it and refuses twice as many
    with pytest.raises(ValueError, match="exceeds limit"):
        read_rgb(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 300)
    assert read_rgb(tmp_path / "a.png").size == (30, 10)


def test_a_narrow_picture_cannot_be_made_a_huge_one():
    with pytest.raises(ValueError, match=r"of 1 x 5000 would be resized to 480 x 2400000, more than .* pixels"):
        RfDetrImageProcessor(size={"shortest_edge": 480})(PIL.Image.new("RGB", (5_000, 1)))
    pictures = [np.zeros(shape, np.uint8) for shape in ((1, 20_000), (20_000, 1))]
    with pytest.raises(ValueError, match="the padded images would be 20000 x 20000, more than"):
        RfDetrImageProcessor(do_resize=False)(pictures)


def test_a_server_that_sends_without_an_end_is_left(monkeypatch):
    monkeypatch.setattr("transformers_rfdetr.model.image_io.MAX_URL_BYTES", 10_000)

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1_000))
            except OSError:  # the other side has closed
                pass

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Endless) as server:
        Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ValueError, match=r"it is larger than 10000 bytes; .*MAX_URL_BYTES"):
            read_rgb(f"http://127.0.0.1:{server.server_port}/a.png")


# -- annotations -----------------------------------------------------------------------------------------------------


def test_an_outline_that_would_take_minutes_to_draw_is_refused(monkeypatch):
    zigzag = [[-1e6, -1e6, 1e6, 1e6] * 100]
    with pytest.raises(ValueError, match=r"outline of the polygons is .* more than 1e\+07; .*MAX_OUTLINE_PIXELS"):
        read_segmentation(zigzag, (20, 30))
    small = read_segmentation([[-1e3, -1e3, 1e3, -1e3, 1e3, 1e3]], (1, 1))
    assert rasterize([small], (1, 1), (4, 4)).all(axis=(1, 2)).tolist() == [False]  # the lower left half
    with pytest.raises(ValueError, match="MAX_OUTLINE_PIXELS"):
        rasterize([small], (1, 1), (8_192, 8_192))
    monkeypatch.setattr("transformers_rfdetr.model.masks.MAX_OUTLINE_PIXELS", 1e9)
    assert read_segmentation(zigzag, (20, 30))


def save_coco(folder: Path, name: object) -> Path:
    (folder / "data").mkdir()
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [], "categories": [{"id": 1, "name": "roof"}]}
    (folder / "data" / "train.json").write_text(json.dumps(coco))
    for place in (folder, folder / "data"):
        PIL.Image.new("RGB", (6, 4)).save(place / "a.png")
    return folder / "data" / "train.json"


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "../data/../a.png"])
def test_a_coco_file_cannot_name_pictures_outside_of_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 1 file names lead out of .*image_folder"):
        load_instance_dataset(save_coco(tmp_path, name))


def test_an_absolute_name_is_read_where_its_folder_is_given(tmp_path):
    path = save_coco(tmp_path, str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="file names lead out of"):
        load_instance_dataset(path)
    [sample] = load_instance_dataset(path, image_folder=tmp_path)["train"]
    assert sample["image"].size == (6, 4)


@pytest.mark.parametrize("name", ["x/../a.png", "./a.png"])
def test_a_name_that_comes_back_is_inside(name, tmp_path):
    path = save_coco(tmp_path, name)
    (tmp_path / "data" / "x").mkdir()
    assert len(load_instance_dataset(path)["train"]) == 1


@pytest.mark.parametrize("name", [5, ["a.png"], "a\x00.png", "a" * 5_000, "", None, "http://127.0.0.1:1/a.png"])
def test_names_that_are_no_files_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"file_name|pictures are not in"):
        load_instance_dataset(save_coco(tmp_path, name))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("images", {"a": 1}, "'images' is a dict, not a list"),
        ("images", [5], "entry 0 of 'images' is 5, not a dictionary"),
        ("images", [{"id": [1], "file_name": "a.png"}], r"image id \[1\] is missing"),
        ("images", [{"id": 1, "file_name": "a.png", "width": "6"}], "width '6' is no number of pixels"),
        ("annotations", "none", "'annotations' is a str, not a list"),
        ("annotations", [{"id": 1, "image_id": {}, "category_id": 1}], r"belongs to image \{\}"),
        ("annotations", [{"id": 1, "image_id": 1, "category_id": []}], r"category_id \[\] is none of the classes"),
        ("annotations", [{"id": 1, "image_id": 1, "category_id": 1, "area": "big"}], "area 'big' is not a finite"),
        ("annotations", [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": [0, 1]}], "iscrowd .* is not 0 or 1"),
        ("categories", [{"id": {}, "name": "roof"}], r"category id \{\} is not a whole number"),
        ("categories", [{"id": 1, "name": "roof", "supercategory": []}, 7], "entry 1 of 'categories'"),
    ],
)
def test_coco_lists_of_something_else_are_refused_with_the_place(key, value, message, tmp_path):
    path = save_coco(tmp_path, "a.png")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(path)


def test_json_that_is_nested_without_an_end_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        load_instance_dataset(tmp_path / "a.json")


def save_yolo(folder: Path, yaml: str, listed: str = "") -> Path:
    for place in (folder / "data" / "images", folder / "private" / "images"):
        place.mkdir(parents=True)
        PIL.Image.new("RGB", (6, 4)).save(place / "a.png")
    (folder / "data" / "list.txt").write_text(listed)
    (folder / "data" / "data.yaml").write_text("names: [roof]\n" + yaml.format(folder=folder))
    return folder / "data" / "data.yaml"


@pytest.mark.parametrize(
    ("yaml", "listed", "message"),
    [
        ("train: ../private/images\n", "", "'../private/images' leads out of"),
        ("train: {folder}/private/images\n", "", "leads out of"),
        ("path: ../private\ntrain: images\n", "", "path '../private' leads out of"),
        ("path: {folder}/private\ntrain: images\n", "", "path .* leads out of"),
        ("train: list.txt\n", "../private/images/a.png\n", "1 of 1 pictures lie outside of"),
        ("train: list.txt\n", "images/a.png\n/etc/hostname\n", "1 of 2 pictures lie outside of"),
    ],
)
def test_a_yolo_description_cannot_name_pictures_outside_of_its_folder(yaml, listed, message, tmp_path):
    path = save_yolo(tmp_path, yaml, listed)
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize("yaml", ["train: {folder}/private/images\n", "train: private/images\n"])
def test_a_yolo_description_may_name_pictures_of_a_folder_that_is_given(yaml, tmp_path):
    data = load_instance_dataset(save_yolo(tmp_path, yaml), image_folder=tmp_path)
    assert data["train"][0]["image"].size == (6, 4)


BILLION = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (BILLION + "names: *k\ntrain: images\n", "holds an alias"),
        ("names: [[x, [y]]]\ntrain: images\n", "category 0 is called by a list"),
        ("names: [roof]\ntrain: [[a]]\n", "a list is no folder"),
        ("nc: 1000000000\ntrain: images\n", r"LIMITS\['num_labels'\]"),
        ("nc: [1]\ntrain: images\n", "nc list is no number of classes"),
        ("names: 5\ntrain: images\n", "names of a int are none"),
        ("[" * 500 + "]" * 500, "is no YAML"),
        ("names: !!python/object/apply:os.system [exit]\n", "is no YAML"),
    ],
    ids=["alias", "names", "train", "nc", "list as nc", "number as names", "nested", "an object of Python"],
)
def test_yaml_that_grows_or_runs_is_refused(yaml, message, tmp_path):
    path = save_yolo(tmp_path, "")
    path.write_text(yaml)
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert len(str(error.value)) < 2_000


def test_every_limit_and_every_test_of_the_page_exists():
    path = Path(__file__).resolve().parents[2] / "SECURITY.md"
    if not path.is_file():
        pytest.skip("SECURITY.md does not come with the package")
    page = path.read_text(encoding="utf-8")
    assert set(LIMITS) <= set(re.findall(r'"(\w+)"', page))
    sources = [file.read_text(encoding="utf-8") for file in Path(__file__).parents[1].rglob("test_*.py")]
    named = re.findall(r"`((?:test|check)_\w+)`", page)
    assert len(named) > 20
    for name in named:
        assert any(f"def {name}(" in source for source in sources), name
    for place in re.findall(r"`transformers_rfdetr\.([\w.]+)", page):
        module, _, limit = place.rpartition(".")
        assert hasattr(importlib.import_module(f"transformers_rfdetr.{module}"), limit), place
