"""The same scenes by every way to run rf-detr-seg-tiny: the AP and the instances are those of PyTorch in float32."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from transformers_rfdetr import InstanceDataset, compile_for_inference, evaluate_instance_segmentation, load, predict
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.export import export, quantize
from transformers_rfdetr.export.exported_model import write_openvino

FIRST_SEED = 2_000_000  # seeds from here on were never drawn in training
# The largest difference of AP, and the least share of instances that are found again, by the precision.
LIMITS = {"float32": (1e-3, 0.99), "float16": (0.01, 0.97), "bfloat16": (0.03, 0.9), "int8": (0.02, 0.9)}


def drawn(number, first_seed=FIRST_SEED):
    images, coco = draw_dataset(number, (144, 160), metres_per_pixel=0.2, first_seed=first_seed)
    return images, InstanceDataset(coco, images)


def run(model, processor, images, data):
    return evaluate_instance_segmentation(model, processor, data, progress=False), predict(model, processor, images)


def flat_masks(instances):
    return instances.dense_masks().reshape(len(instances), -1).astype(np.float32)


def share_found(found, expected):
    """Return the share of the expected instances that have an instance of the same class with a mask IoU above 0.8."""
    hits = total = 0
    for one, other in zip(found, expected, strict=True):
        total += len(other)
        if len(one) and len(other):
            masks, expected_masks = (flat_masks(instances) for instances in (one, other))
            common = expected_masks @ masks.T
            iou = common / (expected_masks.sum(1)[:, None] + masks.sum(1) - common)
            same_class = np.array(other.names)[:, None] == np.array(one.names)
            hits += int(((iou > 0.8) & same_class).any(1).sum())
    assert total > 0
    return hits / total


def assert_agrees(found, expected, precision):
    largest, least = LIMITS[precision]
    for name in ("segm_AP", "bbox_AP"):
        assert found[0][name] == pytest.approx(expected[0][name], abs=largest)
    assert share_found(found[1], expected[1]) >= least
    assert share_found(expected[1], found[1]) >= least


@pytest.fixture(scope="module")
def few():
    model, processor = load("rf-detr-seg-tiny")
    images, data = drawn(6)
    return model, processor, images, data, run(model, processor, images, data)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_copy_for_inference_finds_the_same_in_a_few_scenes(few, precision):
    model, processor, images, data, expected = few
    fast = compile_for_inference(model, dtype=getattr(torch, precision), compiled=False)
    assert_agrees(run(fast, processor, images, data), expected, precision)
    assert share_found(expected[1][1:] + expected[1][:1], expected[1]) < 0.5  # other images: the measure can fail


@pytest.fixture(scope="module")
def scenes():
    images, data = drawn(32)
    expected = run(*load("rf-detr-seg-tiny"), images, data)
    assert expected[0]["segm_AP"] > 0.75
    return images, data, expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("files")
    model, processor = load("rf-detr-seg-tiny")
    export(model, folder / "float32.onnx", processor=processor)
    export(model, folder / "float16.onnx", dtype="float16", processor=processor)
    if find_spec("openvino"):
        runner, _ = load(str(folder / "float32.onnx"))
        write_openvino(folder / "float32.onnx", folder / "float32.xml", runner.metadata)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_copy_for_inference_finds_the_same(scenes, precision, compiled):
    images, data, expected = scenes
    model, processor = load("rf-detr-seg-tiny")
    fast = compile_for_inference(model, batch_size=4, dtype=getattr(torch, precision), compiled=compiled)
    assert "not compiled" not in fast.active
    assert_agrees(run(fast, processor, images, data), expected, precision)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["float32.onnx", "float16.onnx", "float32.xml", "float32.pte", "int8.onnx", "int8.xml"]
)
def test_a_file_finds_the_same(scenes, folder, name):
    images, data, expected = scenes
    precision, _, suffix = name.partition(".")
    if suffix == "xml":
        pytest.importorskip("openvino")
    if suffix == "pte":
        pytest.importorskip("executorch")
        model, processor = load("rf-detr-seg-tiny")
        export(model, folder / name, format="executorch", processor=processor)
    if precision == "int8":
        pytest.importorskip("nncf")
        _, others = drawn(32, FIRST_SEED - 500_000)
        quantize(folder / f"float32.{suffix}", folder / name, others, max_drop=0.05)
    assert_agrees(run(*load(str(folder / name)), images, data), expected, precision)
