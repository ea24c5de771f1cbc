"""Exported files compared with PyTorch: their outputs, their metadata, and that a wrong file is not kept."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from transformers_rfdetr import (
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    RfDetrModel,
)
from transformers_rfdetr.cli.export import export as export_command
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.export import export
from transformers_rfdetr.export import exporter as export_module
from transformers_rfdetr.export.exported_model import best_pairs
from transformers_rfdetr.inference.compiled import difference

from small_models import pixels, small_config, small_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "predict_onnx.py"
NAMES = {0: "__parent__", 1: "barn", 2: "house", 3: "__background__"}
# Tracing takes most of the time here: one windowed and one global block, one decoder layer.
SMALL = {"decoder_layers": 1, "backbone_config": {"num_hidden_layers": 2, "out_indices": [1, 2]}, "id2label": NAMES}


def run(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": inputs.numpy()})), strict=True))


def scenes(*seeds):
    return [draw_scene(seed, (90, 120), metres_per_pixel=0.6)[0] for seed in seeds]


def described(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switches = [(name, tensor.dtype, tensor.requires_grad) for name, tensor in model.named_parameters()]
    return state, switches, model.training, model.config.to_dict(), model.config._attn_implementation


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A segmentation model of 48 x 48, exported in training mode for 72 x 48 and any batch size."""
    model = small_model(**SMALL).train()
    model.config._attn_implementation = "eager"
    before = described(model)
    processor = RfDetrImageProcessor.from_config(model.config, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    path = tmp_path_factory.mktemp("plain") / "new folder" / "model.onnx"
    done = export(model, path, resolution=(72, 48), processor=processor, images=scenes(0))
    after = described(model)
    data = path.read_bytes()
    return SimpleNamespace(
        model=model.eval(), processor=processor, path=path, done=done, before=before, after=after, data=data
    )


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A segmentation model exported by the command; the file selects the best 5 pairs of each of 2 images."""
    folder = tmp_path_factory.mktemp("chosen")
    model = small_model(**SMALL)
    model.save_pretrained(folder / "model")
    scenes(1)[0].save(folder / "scene.png")
    app = typer.Typer()
    app.command()(export_command)
    options = ["--post-process", "--top-k", "5", "--batch-size", "2", "--image", str(folder / "scene.png")]
    result = CliRunner().invoke(app, [str(folder / "model"), str(folder / "model.onnx"), *options])
    return SimpleNamespace(model=model, path=folder / "model.onnx", result=result, folder=folder, app=app)


# The numbers


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_file_for_another_size_agrees_with_the_model_for_every_batch_size(plain, batch_size):
    inputs = pixels(batch_size, 72, 48)
    with torch.no_grad():
        expected = plain.model(inputs)
    found = run(plain.path, inputs)
    assert found.keys() == {"boxes", "logits", "masks"}
    torch.testing.assert_close(found["boxes"], expected.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["logits"], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["masks"], expected.pred_masks, atol=1e-3, rtol=1e-3)
    assert found["masks"].shape == (batch_size, 6, 18, 12)


def test_the_largest_differences_are_returned(plain):
    assert plain.done.path == plain.path
    assert plain.done.differences.keys() == {"boxes", "logits", "masks", "ranking"}
    assert all(0 <= value < 1e-3 for value in plain.done.differences.values())


def test_rows_that_are_not_classes_score_0(plain, chosen):
    logits = run(plain.path, pixels(2, 72, 48))["logits"]
    assert (logits[..., [0, 3]].sigmoid() == 0).all()
    assert (logits[..., [1, 2]].sigmoid() > 0).all()
    assert set(run(chosen.path, pixels(2))["labels"].unique().tolist()) <= {1, 2}


def test_the_best_pairs_are_those_of_the_image_processor(chosen):
    inputs = pixels(2)
    with torch.no_grad():
        outputs = chosen.model(inputs)
    processor = RfDetrImageProcessor.from_config(chosen.model.config)
    expected = processor.post_process_object_detection(outputs, threshold=0.0, top_k=5)
    found = run(chosen.path, inputs)
    assert list(found) == ["scores", "labels", "boxes", "masks"]
    for index, image in enumerate(expected):
        assert found["labels"][index].tolist() == image["labels"].tolist()
        torch.testing.assert_close(found["scores"][index], image["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["boxes"][index], image["boxes"], atol=1e-5, rtol=0)
    queries = best_pairs(outputs.logits, outputs.pred_boxes, 5)[2]
    masks = torch.stack([image[rows] for image, rows in zip(outputs.pred_masks, queries, strict=True)])
    torch.testing.assert_close(found["masks"], masks, atol=1e-3, rtol=1e-3)


def test_infinite_and_nan_outputs_are_ranked_as_the_image_processor_ranks_them():
    logits = torch.tensor([[[0.0, 2.0], [torch.nan, 1.0], [9.0, 9.0], [8.0, 3.0], [2.0, -1e4]]])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(1, 5, 1)
    boxes[0, 2, 3] = torch.inf
    boxes[0, 3, 0] = torch.nan
    scores, labels, queries = best_pairs(logits, boxes, 6)
    # By hand: 2 (query 0, class 1), 2 (query 4, class 0), 1 (query 1, class 1), 0 (query 0, class 0); the rest is 0.
    assert labels[0, :4].tolist() == [1, 0, 1, 0]
    assert queries[0, :4].tolist() == [0, 4, 1, 0]
    assert scores[0, 4:].tolist() == [0.0, 0.0]
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    [expected] = RfDetrImageProcessor().post_process_object_detection(outputs, threshold=0.0)
    assert expected["labels"].tolist() == labels[0, :4].tolist()
    assert torch.equal(expected["scores"], scores[0, :4])


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A float16 file of a detection model with two feature levels whose proposals are all tied."""
    backbone = {"num_hidden_layers": 1, "out_indices": [1]}
    settings = {**SMALL, "backbone_config": backbone, "projector_scale": ["P3", "P5"]}
    model = small_model(RfDetrForObjectDetection, **settings).bfloat16()
    with torch.no_grad():
        for head in model.transformer.enc_out_class_embed:
            head.weight.zero_()
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    done = export(model, path, dtype="float16", batch_size=1, images=scenes(0, 1))
    return SimpleNamespace(model=model.float(), path=path, done=done)


@pytest.mark.long
def test_tied_proposals_in_another_order_are_not_differences(half):
    inputs = pixels(1)
    with torch.no_grad():
        other_order = half.model(inputs).pred_boxes
    assert (run(half.path, inputs)["boxes"] - other_order).abs().max() > 0.1
    assert half.done.differences["ranking"] == 0
    assert 0 < half.done.differences["boxes"] < 5e-3


@pytest.mark.long
def test_a_float16_file_keeps_its_inputs_outputs_and_heads_in_float32(half):
    model = onnx.load(half.path)
    types = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert types == dict.fromkeys(["pixel_values", "boxes", "logits"], onnx.TensorProto.FLOAT)
    sizes = {onnx.TensorProto.FLOAT: 0, onnx.TensorProto.FLOAT16: 0}
    for tensor in model.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += np.prod(tensor.dims, dtype=int)
        if "bbox_embed" in tensor.name or "class_embed" in tensor.name:
            assert tensor.data_type == onnx.TensorProto.FLOAT
    assert sizes[onnx.TensorProto.FLOAT16] > 5 * sizes[onnx.TensorProto.FLOAT]
    [logits] = run(half.path, pixels(1))["logits"]
    assert (logits[:, [0, 3]].sigmoid() == 0).all()
    assert logits.isfinite().all()


def test_differences_are_absolute_up_to_1_and_relative_above():
    inf, nan = float("inf"), float("nan")
    assert difference(torch.tensor([0.25, 10.0]), torch.tensor([0.5, 8.0])) == 0.25
    assert difference(torch.tensor([0.5, 10.0]), torch.tensor([0.5, 8.0])) == 0.25
    assert difference(torch.tensor([-inf, inf]), torch.tensor([-inf, inf])) == 0
    for found, expected in [(nan, 0.0), (0.0, nan), (nan, nan), (inf, 0.0), (0.0, inf), (inf, -inf)]:
        assert difference(torch.tensor([found]), torch.tensor([expected])) == inf
    assert difference(torch.zeros(1), torch.zeros(2)) == inf


# Metadata and paths


def test_the_metadata_describe_preprocessing_and_outputs(plain):
    model = onnx.load(plain.path)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata.pop("versions").keys() == {"transformers-rfdetr", "transformers", "torch", "onnxscript"}
    config, processor = (metadata.pop(name) for name in ("config", "processor"))
    restored, expected = RfDetrConfig.from_dict(config).to_dict(), plain.model.config.to_dict()
    assert list(restored.pop("resolution")) == [72, 48]
    assert restored == {name: value for name, value in expected.items() if name != "resolution"}
    assert processor["size"] == {"height": 72, "width": 48}
    assert processor["image_mean"] == [0.4, 0.5, 0.6]
    assert metadata == {
        "task": "instance-segmentation",
        "model": "RfDetrForInstanceSegmentation",
        "outputs": ["boxes", "logits", "masks"],
        "box_format": "cxcywh",
        "class_names": {"1": "barn", "2": "house"},
        "resolution": [72, 48],
        "resample": "bilinear, half-pixel centers, no antialiasing",
        "rescale_factor": 1 / 255,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "dtype": "float32",
    }
    for value in [*model.graph.input, *model.graph.output]:
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_file_has_no_paths_of_the_machine_that_wrote_it(plain):
    assert str(Path(export_module.__file__).parent).encode() not in plain.data
    assert b"modeling_rf_detr" not in plain.data


def test_the_file_has_no_name_of_a_checkpoint(chosen):
    [config] = [one.value for one in onnx.load(chosen.path).metadata_props if one.key == "config"]
    assert json.loads(config)["_name_or_path"] == ""
    assert str(chosen.folder) not in config


def test_the_model_is_not_changed(plain):
    (state, *before), (later_state, *after) = plain.before, plain.after
    assert before == after
    assert before[1] is True
    assert all(torch.equal(state[name], later_state[name]) for name in state)


# Wrong files


def break_outputs(proto, name):
    """Add 0.05 to the output `name`."""
    for node in proto.graph.node:
        for index, output in enumerate(node.output):
            if output == name:
                node.output[index] = "before"
    constant = onnx.numpy_helper.from_array(np.full((), 0.05, np.float32), "fault")
    proto.graph.initializer.append(constant)
    proto.graph.node.append(onnx.helper.make_node("Add", ["before", "fault"], [name]))


def break_ranking(proto, _):
    """Select the worst tokens instead of the best."""
    [node] = [node for node in proto.graph.node if node.op_type == "TopK"]
    kept = [attribute for attribute in node.attribute if attribute.name != "largest"]
    node.ClearField("attribute")
    node.attribute.extend([*kept, onnx.helper.make_attribute("largest", 0)])


def break_numbers(proto, name):
    """Set the output `name` to NaN."""
    break_outputs(proto, name)
    [constant] = [tensor for tensor in proto.graph.initializer if tensor.name == "fault"]
    constant.CopyFrom(onnx.numpy_helper.from_array(np.full((), np.nan, np.float32), "fault"))


def break_batches(proto, name):
    """Give every image the output `name` of the first one."""
    break_outputs(proto, name)
    constant = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "first")
    proto.graph.initializer.append(constant)
    proto.graph.node[-1].CopyFrom(onnx.helper.make_node("Gather", ["before", "first"], ["one"], axis=0))
    proto.graph.node.append(onnx.helper.make_node("Sub", ["before", "before"], ["nothing"]))
    proto.graph.node.append(onnx.helper.make_node("Add", ["one", "nothing"], [name]))


@pytest.fixture
def write(monkeypatch, plain):
    """Replace the file that torch writes by that of `plain` with a fault in it."""

    def replace(fault=lambda proto, name: None, name=""):
        proto = onnx.load_from_string(plain.data)
        fault(proto, name)
        monkeypatch.setattr(export_module, "write_onnx", lambda *arguments: onnx.save(proto, arguments[-1]))

    return replace


@pytest.mark.parametrize(
    ("fault", "name", "message"),
    [
        (break_outputs, "boxes", r"boxes by 0.05 \(at most 0.0001\)"),
        (break_outputs, "logits", r"logits by 0.0\d+ \(at most 0.001\)"),
        (break_outputs, "masks", r"masks by 0.0[45]\d* \(at most 0.01\)"),
        (break_ranking, "", r"ranking by"),
        (break_numbers, "masks", r"masks by inf"),
        (break_batches, "boxes", r"boxes by"),
    ],
)
def test_a_wrong_file_is_refused_and_not_kept(plain, write, tmp_path, fault, name, message):
    write(fault, name)
    settings = {"resolution": (72, 48), "processor": plain.processor, "images": scenes(0)}
    with pytest.raises(ValueError, match=rf"onnx in float32 .*{message}.*No file was kept"):
        export(plain.model, tmp_path / "new" / "model.onnx", **settings)
    assert list((tmp_path / "new").iterdir()) == []
    if name == "logits":
        done = export(plain.model, tmp_path / "model.onnx", **settings, tolerance={"logits": 0.1})
        assert 0.001 < done.differences["logits"] <= 0.0501


def test_a_model_that_overflows_in_float16_is_refused_before_anything_is_written(tmp_path):
    model = small_model(**SMALL)
    with torch.no_grad():
        model.segmentation_head.bias.fill_(1e5)  # float16 ends at 65504
    with pytest.raises(ValueError, match=r"PyTorch in float16 .*masks by inf"):
        export(model, tmp_path / "model.onnx", dtype="float16", images=scenes(0))
    assert list(tmp_path.iterdir()) == []


# The command and the example


def test_the_command_exports_and_prints_the_differences(chosen):
    assert chosen.result.exit_code == 0, chosen.result.output
    lines = chosen.result.stdout.strip().splitlines()
    assert lines[-2].startswith(f"{chosen.path}: ")
    assert lines[-2].endswith("MB, float32, batches of 2")
    assert lines[-1].startswith("Largest differences from PyTorch on 1 images: scores ")
    assert "ranking " in lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["new.onnx", "--resolution", "100x"],
            "--resolution must be a side in pixels such as 432, or HxW such as 432x576, got 100x",
        ),
        (["new.onnx", "--resolution", "50"], "`resolution` must be a multiple of 24"),
        (["new.onnx", "--format", "openvino"], "`output` must be a file .xml"),
        (["model.onnx"], "`output` must be new"),
    ],
)
def test_the_command_prints_an_error_in_one_line(chosen, options, message):
    arguments = [str(chosen.folder / "model"), str(chosen.folder / options[0]), *options[1:]]
    result = CliRunner().invoke(chosen.app, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


WITHOUT_TORCH = """
import json, runpy, sys
for name in ("torch", "transformers", "transformers_rfdetr"):
    sys.modules[name] = None
import numpy, onnxruntime
from PIL import Image
script, folder, *files = sys.argv[1:]
names = runpy.run_path(script)
for index, (path, threshold) in enumerate(zip(files[::2], map(float, files[1::2]))):
    session = onnxruntime.InferenceSession(path)
    found = names["predict"](session, Image.open(f"{folder}/scene.png"), threshold)
    numpy.savez(f"{folder}/{index}.npz", *found)
sys.argv = [script, files[0], f"{folder}/scene.png", "--threshold", files[1], "--output", f"{folder}/overlay.png"]
runpy.run_path(script, run_name="__main__")
"""


def test_the_example_without_torch_finds_the_same_as_model_and_processor(plain, chosen, tmp_path):
    [image] = scenes(2)
    image.save(tmp_path / "scene.png")
    size = image.size[::-1]
    stock = RfDetrImageProcessor.from_config(chosen.model.config)
    arguments, expected = [], []
    for case, processor, resolution in [(plain, plain.processor, (72, 48)), (chosen, stock, (48, 48))]:
        inputs = processor(image, size=resolution, do_pad=False, return_tensors="pt")
        with torch.no_grad():
            outputs = case.model(**inputs)
        scores = outputs.logits[..., [1, 2]].sigmoid().flatten().sort(descending=True).values
        threshold = scores[3:5].mean().item()  # for four pairs
        arguments += [str(case.path), repr(threshold)]
        expected += processor.post_process_instance_segmentation(
            outputs, threshold, target_sizes=[size], return_binary_maps=True
        )
    command = [sys.executable, "-c", WITHOUT_TORCH, str(EXAMPLE), str(tmp_path), *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for index, result in enumerate(expected):
        scores, labels, boxes, masks = np.load(tmp_path / f"{index}.npz").values()
        segments = result["segments_info"]
        assert len(segments) == 4
        assert labels.tolist() == [segment["label_id"] for segment in segments]
        np.testing.assert_allclose(scores, [segment["score"] for segment in segments], atol=1e-4)
        np.testing.assert_allclose(boxes, [segment["box"] for segment in segments], atol=0.05)
        assert masks.shape == (4, *size)
        assert (masks != result["segmentation"].numpy()).mean() < 1e-3
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:4]] == [NAMES[s["label_id"]] for s in expected[0]["segments_info"]]
    assert lines[4].startswith("4 objects ")
    assert Image.open(tmp_path / "overlay.png").size == image.size


# OpenVINO, packages and arguments


def test_an_openvino_file_is_compared_too(plain, write, tmp_path):
    openvino = pytest.importorskip("openvino")
    write(break_outputs, "boxes")
    settings = {"format": "openvino", "resolution": (72, 48), "processor": plain.processor}
    done = export(plain.model, tmp_path / "model.xml", **settings, tolerance={"boxes": 0.06})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert done.differences.pop("boxes") == pytest.approx(0.05, abs=1e-4)
    assert all(0 <= value < 1e-3 for value in done.differences.values())
    model = openvino.Core().read_model(done.path)
    assert json.loads(model.get_rt_info(["model_info", "class_names"]).value) == {"1": "barn", "2": "house"}


@pytest.mark.parametrize(
    ("format", "package", "command"),
    [
        ("onnx", "onnx", r'pip install "transformers-rfdetr\[export\]"'),
        ("onnx", "onnxscript", r'pip install "transformers-rfdetr\[export\]"'),
        ("onnx", "onnxruntime", r'pip install "transformers-rfdetr\[export\]"'),
        ("openvino", "openvino", "pip install openvino"),
        ("executorch", "executorch", r'pip install "transformers-rfdetr\[executorch\]"'),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, tmp_path, format, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f"model{export_module.SUFFIXES[format]}"
    with pytest.raises(ImportError, match=f"the package {package}, .*{command}"):
        export(RfDetrForObjectDetection(small_config(**SMALL)), path, format=format)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "model.pth"}, "`output` .*model.pth"),
        ({"output": "model.onnx", "format": "openvino"}, "`output` .*model.onnx"),
        ({"format": "tflite"}, "`format` .*onnx or openvino or executorch, got 'tflite'"),
        ({"resolution": 50}, "`resolution`.*24.*50"),
        ({"dtype": "bfloat16"}, "`dtype` .*float32 or float16, got 'bfloat16'"),
        (
            {"output": "model.pte", "format": "executorch", "dtype": "float16"},
            "`dtype` must be float32 for format executorch, got 'float16'",
        ),
        ({"batch_size": 0}, "`batch_size` .*got 0"),
        ({"top_k": 3}, "`top_k` requires `post_process`"),
        ({"top_k": 13, "post_process": True}, "`top_k` .*12.*got 13"),
        ({"tolerance": {"scores": 1.0}}, "`tolerance` .*boxes, logits, masks.*scores"),
        ({"model": RfDetrModel}, "`model` .*got 'RfDetrModel'"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, settings, message):
    settings = {"model": RfDetrForObjectDetection, "output": "model.onnx", **settings}
    model = settings.pop("model")(small_config(**SMALL))
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / settings.pop("output"), **settings)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_full_size_model_exports(tmp_path, dtype):
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano")).eval()
    # Small steps: twelve blocks with random weights of 0.1 multiply rounding errors of float32 to 3 % of an image.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    done = export(model, tmp_path / "model.onnx", dtype=dtype)
    assert max(done.differences.values()) > 0
    assert done.path.stat().st_size < {"float32": 125e6, "float16": 64e6}[dtype]
    assert run(done.path, pixels(3, 312, 312))["masks"].shape == (3, 100, 78, 78)


def test_the_command_does_not_quantize_an_executorch_file(tmp_path):
    options = ["--quantize", "int8", "--calibration", str(tmp_path)]
    app = typer.Typer()
    app.command()(export_command)
    result = CliRunner().invoke(app, ["rf-detr-seg-tiny", str(tmp_path / "model.pte"), *options])
    assert result.exit_code == 2
    assert "--quantize requires OUTPUT to be a file .onnx or .xml, got" in result.output
