"""Exported files that run as models: what they find, and which files are refused."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from transformers_rfdetr import (
    InstanceDataset,
    evaluate_instance_segmentation,
    load,
    predict,
    predict_tiled,
)
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.synthetic import draw_dataset, draw_scene, save_dataset
from transformers_rfdetr.export import export
from transformers_rfdetr.export.exported_model import write_openvino
from transformers_rfdetr.inference import runners

from small_models import small_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

UNSEEN = 2_000_000  # seeds from here on were never drawn in training
FILES = ["model.onnx", "model.xml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """rf-detr-seg-tiny as ONNX and for OpenVINO."""
    folder = tmp_path_factory.mktemp("models")
    model, processor = load("rf-detr-seg-tiny")
    export(model, folder / "model.onnx", processor=processor)
    if "model.xml" in available(FILES):
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        write_openvino(folder / "model.onnx", folder / "model.xml", session.get_modelmeta().custom_metadata_map)
    return folder


def available(files):
    try:
        import openvino  # noqa: F401
    except ImportError:
        return [file for file in files if not file.endswith(".xml")]
    return files


@pytest.fixture(scope="module")
def drawn():
    return draw_dataset(8, (144, 160), metres_per_pixel=0.2, first_seed=UNSEEN)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_equal(found, expected):
    assert found.names == expected.names
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    masks = expected.dense_masks()
    # A logit next to 0 may be rounded to the other side.
    assert (found.dense_masks() != masks).sum() <= 1e-4 * masks.size


@pytest.mark.long
@pytest.mark.parametrize("file", available(FILES))
def test_a_file_finds_what_the_model_finds_with_the_same_ap(folder, drawn, file):
    runner, processor = load(str(folder / file), threads=1)
    model, plain_processor = load("rf-detr-seg-tiny")
    images, coco = drawn
    expected = predict(model, plain_processor, images)
    for one, other in zip(predict(runner, processor, images), expected, strict=True):
        assert_equal(one, other)
    assert sum(map(len, expected)) > 20
    data = InstanceDataset(coco, images)
    found = evaluate_instance_segmentation(runner, processor, data, progress=False)
    expected_metrics = evaluate_instance_segmentation(model, plain_processor, data, progress=False)
    assert expected_metrics["segm_AP"] > 0.5
    for name in ("segm_AP", "segm_AP50", "bbox_AP", "mean_iou"):
        assert found[name] == pytest.approx(expected_metrics[name], abs=1e-3)


@pytest.fixture(scope="module")
def selecting(tmp_path_factory):
    """A small model, and its file for 72 x 48 pixels that selects pairs, for 2 images."""
    names = {0: "__parent__", 1: "building", 2: "tree", 3: "__background__"}
    backbone = {"num_hidden_layers": 2, "out_indices": [1, 2]}
    model = small_model(decoder_layers=1, backbone_config=backbone, id2label=names)
    model.config.score_thresholds, model.config.score_thresholds_note = {1: 0.004, 2: 0.02}, "highest F1"
    path = tmp_path_factory.mktemp("selecting") / "best.onnx"
    export(model, path, resolution=(72, 48), post_process=True, batch_size=2)
    return model, path


def test_a_file_of_another_size_that_selects_pairs_finds_what_the_model_finds(selecting, drawn):
    model, path = selecting
    runner, processor = load(str(path))
    assert processor.size == {"height": 72, "width": 48}
    images = drawn[0][:3]
    expected = predict(model, processor, images, threshold=0.01)
    assert min(map(len, expected)) > 3
    for one, other in zip(predict(runner, processor, images, threshold=0.01), expected, strict=True):
        assert_equal(one, other)
    assert runner.config.score_thresholds == {1: 0.004, 2: 0.02}
    assert runner.config.score_thresholds_note == "highest F1"
    calibrated = predict(model, processor, images, threshold="calibrated")
    assert {name for instances in calibrated for name in instances.names} == {"building", "tree"}
    for one, other in zip(predict(runner, processor, images, threshold="calibrated"), calibrated, strict=True):
        assert_equal(one, other)


@pytest.mark.long
def test_a_file_takes_tiles_of_its_size(folder):
    runner, processor = load(str(folder / "model.onnx"))
    image, _ = draw_scene(UNSEEN + 1, (200, 240), metres_per_pixel=0.2)
    expected = predict_tiled(*load("rf-detr-seg-tiny"), image)
    assert len(expected) > 10
    assert_equal(predict_tiled(runner, processor, image), expected)
    with pytest.raises(ValueError, match=r"must be images of \(144, 144\).*Compile or export the model for that size"):
        predict_tiled(runner, processor, image, tile=96)


@pytest.mark.long
def test_the_commands_take_a_file(folder, drawn, tmp_path):
    save_dataset(tmp_path / "data" / "valid", *drawn)
    file = folder / "model.onnx"
    predicted = run("predict", file, tmp_path / "data" / "valid", "-o", tmp_path / "found")
    assert predicted.exit_code == 0, predicted.output
    assert len((tmp_path / "found" / "predictions.jsonl").read_text().splitlines()) == 8
    options = ("--threads", 1, "--per-class", "--reference", "rf-detr-seg-tiny")
    evaluated = run("evaluate", file, tmp_path / "data", *options)
    assert evaluated.exit_code == 0, evaluated.output
    text, reference = evaluated.stdout.split("rf-detr-seg-tiny, the reference\n")
    assert text.split("images\n")[1].strip() == reference.strip()
    measured = run("benchmark", file, "--runs", 1, "--json", tmp_path / "numbers.json")
    assert measured.exit_code == 0, measured.output
    assert "onnxruntime CPUExecutionProvider" in measured.output
    assert json.loads((tmp_path / "numbers.json").read_text())["flops"] is None
    assert "must be (144, 144), the size of the file" in run("benchmark", file, "--size", 96).output


def write_foreign(path, name="pixel_values", shape=("batch", 3, 8, 8), metadata=None):
    helper = onnx.helper
    node = helper.make_node("Identity", [name], ["boxes"])
    values = [helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, shape) for one in (name, "boxes")]
    proto = helper.make_model(helper.make_graph([node], "graph", values[:1], values[1:]), ir_version=9)
    proto.opset_import[0].version = 18
    helper.set_model_props(proto, metadata or {})
    onnx.save(proto, path)


CONFIG = {"config": json.dumps({"model_type": "rf_detr"}), "processor": "{}"}


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        ({"name": "image"}, "must have one input, pixel_values .*got {'image'"),
        ({"shape": ("batch", 3, "height", "width")}, "must have one input, pixel_values"),
        (
            {},
            "must have the metadata that `transformers-rfdetr export` writes, got none"
            ".*Export the model with `transformers-rfdetr export`",
        ),
        ({"metadata": {"outputs": "[", **CONFIG}}, "must have the metadata"),
        ({"metadata": {"outputs": '["boxes"]', "config": "[]", "processor": "{}"}}, "must have the metadata"),
        ({"metadata": {"outputs": '["boxes", "logits"]', **CONFIG}}, "must have the outputs .*got .'boxes'.\\."),
    ],
)
def test_foreign_files_are_refused_with_what_was_expected(tmp_path, foreign, words):
    write_foreign(tmp_path / "model.onnx", **foreign)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize("suffix", available([".onnx", ".xml"]))
def test_broken_and_missing_files_are_named(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(ValueError, match="the file must exist"):
        load(str(path))
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"model{suffix}.* cannot read the file"):
        load(str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": torch.float16}, "`dtype` must be omitted for the exported file"),
        ({"id2label": {0: "house"}}, "`id2label` must be omitted"),
        ({"resolution": 96}, "`resolution` must be omitted"),
        ({"threads": 0}, "`threads` must be at least 1"),
        ({"device": "mps"}, "`device` must be cpu, auto, or cuda"),
    ],
)
def test_what_a_file_cannot_change_is_refused(selecting, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(str(selecting[1]), **arguments)


def test_a_file_cannot_be_trained_or_moved(selecting):
    runner, _ = load(str(selecting[1]))
    assert runner.eval().train(False).to("cpu") is runner
    with pytest.raises(ValueError, match="cannot be trained"):
        runner.train(True)
    with pytest.raises(ValueError, match="`device` must be cpu"):
        runner.to("meta")


def test_a_missing_runtime_is_named_with_its_command(selecting, monkeypatch):
    monkeypatch.setattr("transformers_rfdetr.inference.runners.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        load(str(selecting[1]))


def test_auto_is_the_cpu_in_float32_where_openvino_has_no_other_device(tmp_path, monkeypatch):
    """Its own AUTO ignores the precision, and computes INT8 and bfloat16 files differently."""
    openvino = pytest.importorskip("openvino")
    if openvino.Core().available_devices != ["CPU"]:
        pytest.skip("another device")
    parameter = openvino.opset13.parameter([1, 2], np.float32, name="pixels")
    openvino.save_model(openvino.Model([openvino.opset13.relu(parameter)], [parameter]), tmp_path / "model.xml")
    compile_model, asked = openvino.Core.compile_model, []

    def record(self, model, device, options):
        asked.append((device, options["INFERENCE_PRECISION_HINT"]))
        return compile_model(self, model, device, options)

    monkeypatch.setattr(openvino.Core, "compile_model", record)
    for device in ("auto", "cpu"):
        runners._open_openvino(tmp_path / "model.xml", device, None)
    assert asked == [("CPU", "f32")] * 2
