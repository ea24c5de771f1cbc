"""INT8 files: what quantization keeps, what it refuses, and which layers it leaves in float32."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from transformers_rfdetr import InstanceDataset, load
from transformers_rfdetr.cli import export as command
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
from transformers_rfdetr.export import export, quantization, quantize
from transformers_rfdetr.export.exported_model import write_openvino

from small_models import pixels, small_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("nncf")
openvino = pytest.importorskip("openvino")

NAMES = {0: "__parent__", 1: "building", 2: "tree", 3: "car", 4: "pool", 5: "tank", 6: "__background__"}
BACKBONE = {"num_hidden_layers": 2, "out_indices": [1, 2]}
SMALL = {"decoder_layers": 1, "backbone_config": BACKBONE, "id2label": NAMES, "num_labels": len(NAMES)}
FIRST_SEED = 2_000_000  # seeds from here on were never drawn in training


def drawn(number, first_seed=FIRST_SEED):
    return draw_dataset(number, (144, 160), metres_per_pixel=0.2, first_seed=first_seed)


def dataset(number, first_seed=FIRST_SEED):
    images, coco = drawn(number, first_seed)
    return InstanceDataset(coco, images)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model as an ONNX file for batches of 2, and for OpenVINO."""
    folder = tmp_path_factory.mktemp("small")
    model = small_model(**SMALL)
    model.config.score_thresholds = {1: 0.4}
    export(model, folder / "model.onnx", batch_size=2)
    runner, _ = load(str(folder / "model.onnx"))
    write_openvino(folder / "model.onnx", folder / "model.xml", runner.metadata)
    return SimpleNamespace(folder=folder, data=dataset(3))


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".xml", marks=pytest.mark.long)])
def test_an_int8_file_keeps_inputs_outputs_and_metadata(small, tmp_path, suffix):
    path, output = small.folder / f"model{suffix}", tmp_path / f"int8{suffix}"
    done = quantize(path, output, small.data, num_images=2)
    assert done.path == output
    assert done.after.size < done.before.size
    assert done.before.seconds > 0 < done.after.seconds
    before, _ = load(str(path))
    after, processor = load(str(output))
    expected = before.metadata | {"dtype": '"int8"'}
    versions = json.loads(after.metadata["versions"])
    assert versions.pop("nncf")
    assert versions == json.loads(expected.pop("versions"))
    assert {name: after.metadata[name] for name in expected} == expected
    assert after.config.score_thresholds == {1: 0.4}
    assert processor.size == {"height": 48, "width": 48}
    assert after.batch_size == 2
    inputs = pixels(2)
    found, exact = after(inputs), before(inputs)
    assert found.pred_masks.shape == exact.pred_masks.shape
    # Not the float32 file, and not another model. Single queries may come from other tokens than in float32.
    means = [outputs.logits[..., 1:6].mean().item() for outputs in (found, exact)]
    assert means[0] != means[1]
    assert means[0] == pytest.approx(means[1], abs=0.5)


def test_a_file_whose_ap_drops_by_more_is_refused_and_not_written(small, tmp_path, monkeypatch):
    """The numbers are those of two evaluations; the quantized file is the float32 one."""
    monkeypatch.setattr(quantization, "_quantize", lambda model, *_: model)
    monkeypatch.setattr(quantization, "_RUNS", 1)
    for drop, max_drop in [(0.02, 0.01), (float("nan"), 1)]:
        values = iter([0.5, 0.5 - drop])
        monkeypatch.setattr(quantization, "_average_precision", lambda *_, values=values: next(values))
        with pytest.raises(ValueError, match=rf"drop by at most {max_drop} .*from 0.5000 to .*No file was written"):
            quantize(small.folder / "model.onnx", tmp_path / "new" / "int8.onnx", small.data, max_drop=max_drop)
        assert list((tmp_path / "new").iterdir()) == []


def test_the_images_are_chosen_at_random_and_always_the_same():
    first, second = (quantization._choose(range(1000), 20).indices for _ in range(2))
    assert first == second == sorted(set(first))
    assert len(first) == 20
    assert max(first) > 500
    assert quantization._choose(range(3), 20).indices == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "model.pth"}, "`path` must be a file .onnx or .xml, got 'model.pth'"),
        ({"output": "int8.xml"}, "`output` must be a file .onnx, as `path`, got 'int8.xml'"),
        ({"output": "model.onnx"}, "`output` must be new"),
        ({"max_drop": -0.1}, "`max_drop` must be a number from 0 to 1, got -0.1"),
        ({"num_images": 0}, "`num_images` must be an integer of at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_named(small, settings, message):
    settings = {"path": "model.onnx", "output": "int8.onnx"} | settings
    path, output = (small.folder / settings.pop(name) for name in ("path", "output"))
    with pytest.raises(ValueError, match=message):
        quantize(path, output, small.data, **settings)


def test_a_file_that_is_not_float32_is_refused(small, tmp_path):
    proto = onnx.load(small.folder / "model.onnx")
    [dtype] = [entry for entry in proto.metadata_props if entry.key == "dtype"]
    dtype.value = '"float16"'
    onnx.save(proto, tmp_path / "half.onnx")
    with pytest.raises(ValueError, match=r"`path` must be a file in float32, got 'a file in float16'"):
        quantize(tmp_path / "half.onnx", tmp_path / "int8.onnx", small.data)


def test_a_missing_package_is_named_with_its_command(small, tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'nncf.*pip install "transformers-rfdetr\[int8\]"'):
        quantize(small.folder / "model.onnx", tmp_path / "int8.onnx", small.data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int4"], "--quantize must be int8, got int4"),
        (["--quantize", "int8"], "--quantize requires --calibration"),
        (["--quantize", "int8", "--calibration", "data", "--dtype", "float16"], "--quantize requires --dtype float32"),
        (["--calibration", "data"], "--calibration requires --quantize int8"),
    ],
)
def test_the_command_names_options_that_do_not_fit(tmp_path, options, message):
    result = CliRunner().invoke(app, ["export", "rf-detr-seg-tiny", str(tmp_path / "model.onnx"), *options])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(("number", "evaluated"), [(10, "validation"), (9, "train")])
def test_the_command_measures_ap_on_the_training_images_if_there_are_fewer_than_10_others(
    number, evaluated, monkeypatch, capsys
):
    asked = []

    def quantize(path, output, validation, *, calibration, **settings):
        asked.append((len(validation), len(calibration)))
        result = SimpleNamespace(ap=0.5, size=2_000_000, seconds=0.1)
        return SimpleNamespace(path=output, before=result, after=result)

    monkeypatch.setattr("transformers_rfdetr.export.quantize", quantize)
    splits = {"train": range(12), "validation": range(number)}
    command._quantize("model.onnx", "int8.onnx", splits, max_drop=0.01, num_images=300)
    assert asked == [(len(splits[evaluated]), 12)]
    assert f"calibrated on train, AP on {asked[0][0]} images of {evaluated}," in capsys.readouterr().out
    command._quantize("model.onnx", "int8.onnx", splits, max_drop=0.01, num_images=8)  # chosen from the split
    assert f"AP on 8 images of {evaluated}," in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_command_quantizes_the_tiny_model(tmp_path, suffix):
    """AP drops by at most 0.01 and the file has at most 0.35 of the size."""
    save_dataset(tmp_path / "data" / "valid", *drawn(64))
    save_dataset(tmp_path / "data" / "train", *drawn(100, FIRST_SEED - 500_000))
    output = tmp_path / f"int8{suffix}"
    arguments = [str(output), "--quantize", "int8", "--calibration", str(tmp_path / "data")]
    result = CliRunner().invoke(app, ["export", "rf-detr-seg-tiny", *arguments])
    assert result.exit_code == 0, result.output
    assert "calibrated on train, AP on 64 images of validation" in result.stdout
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if "ms" in line}
    assert float(rows["float32"][0]) > 0.8
    assert float(rows["float32"][0]) - float(rows["int8"][0]) <= 0.01
    assert float(rows["int8"][1]) <= 0.35 * float(rows["float32"][1])
    evaluated = CliRunner().invoke(app, ["evaluate", str(output), str(tmp_path / "data")])
    assert evaluated.exit_code == 0, evaluated.output


@pytest.mark.long
def test_layers_that_hurt_stay_in_float32(tmp_path):
    model, processor = load("rf-detr-seg-tiny")
    export(model, tmp_path / "model.xml", format="openvino", processor=processor)
    data, calibration = dataset(8), dataset(16, FIRST_SEED - 500_000)
    counts = {}
    for name, max_drop in (("loose", 1.0), ("strict", 0.002)):
        settings = {"calibration": calibration, "max_drop": max_drop}
        done = quantize(tmp_path / "model.xml", tmp_path / f"{name}.xml", data, **settings)
        quantized = openvino.Core().read_model(done.path)
        counts[name] = sum(node.get_type_name() == "FakeQuantize" for node in quantized.get_ops())
        if name == "loose":
            assert done.before.ap - done.after.ap > 0.002  # else the search has nothing to do
    assert done.before.ap - done.after.ap <= 0.002
    assert 0 < counts["strict"] < counts["loose"]
