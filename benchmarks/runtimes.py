"""Measure one image through PyTorch, torch.compile, onnxruntime and OpenVINO: our files and those of rfdetr's export.

    python benchmarks/runtimes.py --variant rf-detr-seg-nano rf-detr-seg-medium

The model alone is measured, from pixels to logits, boxes and masks, with as many threads as torch uses; and how long
each export takes, with its check against PyTorch.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from peers import Measurement

from transformers_rfdetr import compile_for_inference
from transformers_rfdetr.export.exporter import export


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    peers.run(__doc__, argv, measure, repeats=10, variants=("rf-detr-seg-nano", "rf-detr-seg-medium"))


@torch.no_grad()
def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return seconds of the export, then of one image."""
    config = peers.read_config(variant, arguments.quick)
    models = peers.build(config, variant, "cpu", "ours", "rfdetr")
    pixels = torch.randn(1, 3, config.resolution, config.resolution)
    fast = compile_for_inference(models["ours"], compiled=not arguments.quick)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: models["ours"](pixels),
        "ours compiled": lambda: fast(pixels),
        "rfdetr": lambda: models["rfdetr"].model.model(pixels),
    }
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"ours": Path(folder) / "ours.onnx", "rfdetr": Path(folder) / "rfdetr"}
        start = time.perf_counter()
        export(models["ours"], files["ours"], batch_size=1)
        seconds["ours"] = time.perf_counter() - start
        start = time.perf_counter()
        files["rfdetr"] = export_rfdetr(models["rfdetr"], files["rfdetr"])
        seconds["rfdetr"] = time.perf_counter() - start
        for name, file in files.items():
            calls[f"{name} onnxruntime"] = run_onnx(file, pixels.numpy())
            calls[f"{name} OpenVINO"] = run_openvino(file, pixels.numpy())
        medians = peers.time_in_turns(calls, arguments.repeats)
    return [
        Measurement("runtimes", variant, case, name, value, "s", "cpu")
        for case, values in (("export", seconds), ("time, B=1", medians))
        for name, value in values.items()
    ]


def export_rfdetr(model: Any, folder: Path) -> Path:
    """Return the ONNX file that rfdetr's own export writes."""
    model.export(output_dir=str(folder), verbose=False)
    [file] = folder.rglob("*.onnx")
    return file


def run_onnx(file: Path, pixels: np.ndarray) -> Callable[[], Any]:
    """Return a function that runs an ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: pixels}
    return lambda: session.run(None, inputs)


def run_openvino(file: Path, pixels: np.ndarray) -> Callable[[], Any]:
    """Return a function that runs an ONNX file in OpenVINO, in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda: compiled([pixels])


if __name__ == "__main__":
    main()
