"""Measure one image through PyTorch, torch.compile, onnxruntime and OpenVINO: our files and those of rfdetr's export.

    python benchmarks/runtimes.py --variant rf-detr-seg-nano rf-detr-seg-medium
    python benchmarks/runtimes.py --device cuda --variant rf-detr-seg-nano rf-detr-seg-medium --repeats 100

The model alone is measured, from pixels to logits, boxes and masks, with as many threads as torch uses; and how long
each export takes, with its check against PyTorch. On a GPU, onnxruntime runs the files with its providers for CUDA and
TensorRT, where they are installed, and inputs and outputs stay on the GPU. The files are float32, and the providers may
use TF32, as torch does here.
"""

import argparse
import copy
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
    device = arguments.device
    models = peers.build(config, variant, device, "ours", "rfdetr")
    pixels = torch.randn(1, 3, config.resolution, config.resolution).to(device)
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
        export(copy.deepcopy(models["ours"]).cpu(), files["ours"], batch_size=1)
        seconds["ours"] = time.perf_counter() - start
        start = time.perf_counter()
        files["rfdetr"] = export_rfdetr(models["rfdetr"], files["rfdetr"])
        seconds["rfdetr"] = time.perf_counter() - start
        for name, file in files.items():
            for form, provider in list_providers(device).items():
                calls[f"{name} {form}"] = run_onnx(file, pixels, provider)
            if device == "cpu":
                calls[f"{name} OpenVINO"] = run_openvino(file, pixels.numpy())
        medians = peers.time_in_turns(calls, arguments.repeats, device)
    return [
        Measurement("runtimes", variant, case, name, value, "s", device)
        for case, values in (("export", seconds), ("time, B=1", medians))
        for name, value in values.items()
    ]


def export_rfdetr(model: Any, folder: Path) -> Path:
    """Return the ONNX file that rfdetr's own export writes."""
    model.export(output_dir=str(folder), verbose=False)
    [file] = folder.rglob("*.onnx")
    return file


def list_providers(device: str) -> dict[str, str]:
    """Return the providers of onnxruntime that are installed for a device, by name; print what is missing."""
    import onnxruntime

    if device == "cpu":
        return {"onnxruntime": "CPUExecutionProvider"}
    wanted = {"onnxruntime CUDA": "CUDAExecutionProvider", "TensorRT": "TensorrtExecutionProvider"}
    installed = onnxruntime.get_available_providers()
    for form, provider in wanted.items():
        if provider not in installed:
            print(f"skipped: {form}, which requires onnxruntime-gpu with {provider}")
    return {form: provider for form, provider in wanted.items() if provider in installed}


def run_onnx(file: Path, pixels: torch.Tensor, provider: str) -> Callable[[], Any]:
    """Return a function that runs an ONNX file in onnxruntime; input and outputs stay on the device."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    if session.get_providers()[0] != provider:  # without one of its libraries, it would run on the CPU
        raise RuntimeError(f"{provider} must run {file.name}, got {session.get_providers()}. See the messages above.")
    device, binding = pixels.device.type, session.io_binding()
    pixels_on_device = onnxruntime.OrtValue.ortvalue_from_numpy(pixels.numpy(force=True), device, 0)
    binding.bind_ortvalue_input(session.get_inputs()[0].name, pixels_on_device)
    for output in session.get_outputs():
        binding.bind_output(output.name, device)
    return lambda: session.run_with_iobinding(binding)


def run_openvino(file: Path, pixels: np.ndarray) -> Callable[[], Any]:
    """Return a function that runs an ONNX file in OpenVINO, in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda: compiled([pixels])


if __name__ == "__main__":
    main()
