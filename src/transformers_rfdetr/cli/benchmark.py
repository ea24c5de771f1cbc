"""`transformers-rfdetr benchmark`: time, FLOPs and memory of a model on this machine."""

import ctypes
import gc
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from .. import __version__
from ..atomic_files import check_writable, make_directory, write_text
from ..data.synthetic import draw_scene
from ..hub.load import load
from ..inference.predict import compile_for_inference, predict
from ..model.configuration_rf_detr import as_pair, check_resolution
from .errors import one_line_errors
from .options import read_dtype, read_size

EXAMPLE = """examples:

transformers-rfdetr benchmark rf-detr-seg-medium

transformers-rfdetr benchmark my-model --device cuda --dtype float16 --compile --batch-size 8 --json numbers.json
"""
_PICTURE_SIZE = (480, 640)
_WARM_UP = 3


@one_line_errors
def benchmark(
    model: Annotated[str, typer.Argument(help="a folder, a Hub id, or a published name such as rf-detr-seg-medium")],
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="pixels of the model's input, instead of its own")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="pictures at a time")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="make it fast for this size with torch.compile")] = False,
    runs: Annotated[int, typer.Option(help="that are timed, after a few that are not")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the numbers there, as JSON")
    ] = None,
) -> None:
    """Measure a model: its forward pass alone, and from a picture to instances, with FLOPs and memory."""
    for option, number in (("--batch-size", batch_size), ("--runs", runs)):
        if number < 1:
            raise ValueError(f"{option} {number} must be at least 1")
    if json_file is not None:
        check_writable(json_file)
    loaded, processor = load(model, device=device, dtype=read_dtype(dtype))
    sides = as_pair(loaded.config.resolution if size is None else read_size("--size", size))
    backbone = loaded.config.backbone_config
    check_resolution(sides, backbone.patch_size, backbone.num_windows, "--size")
    processor.size = dict(zip(("height", "width"), sides, strict=True))
    facts = {
        "model": model,
        "size": list(sides),
        "batch_size": batch_size,
        "device": str(loaded.device),
        "device_name": _device_name(loaded.device),
        "dtype": dtype,
        "compiled": compiled,
        "runs": runs,
    }
    numbers = facts | measure(loaded, processor, batch_size=batch_size, compiled=compiled, runs=runs)
    typer.echo(_as_text(numbers))
    if json_file is not None:
        versions = {"transformers_rfdetr": __version__, "transformers": transformers.__version__}
        numbers["versions"] = versions | {"torch": str(torch.__version__)}
        make_directory(json_file.parent)
        write_text(json_file, json.dumps(numbers, indent=1))


def measure(model: Any, processor: Any, *, batch_size: int, compiled: bool, runs: int) -> dict[str, Any]:
    """Time, FLOPs and memory of a model.

    Args:
        model: In evaluation mode, on the device that it is measured on.
        processor: Its image processor, of one exact size.
        batch_size: Pictures at a time.
        compiled: Whether the times are those of [`compile_for_inference`]'s copy. The FLOPs are the plain model's.
        runs: How many are timed.

    Returns:
        `forward`, the model alone with all masks multiplied out, and `predict`, from drawn pictures of 480 x 640 to
        instances, each with `median_seconds` and `p90_seconds` of a batch and `pictures_per_second` at the median;
        `flops` of one picture, two for each multiplication of matrix products, convolutions and attention;
        `parameters`; `active`, what a compiled copy runs with, else None; `peak_bytes` of the first prediction: all
        that torch allocates on a GPU, weights included; on a CPU what the process grew by, None where the system does
        not tell (it has to be Linux).
    """
    model.requires_grad_(False)  # the counter asks views of trainable parameters for gradient functions
    size = (processor.size["height"], processor.size["width"])
    pixels = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(0)).to(model.device)
    pictures = [draw_scene(0, _PICTURE_SIZE)[0]] * batch_size
    numbers = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "active": None}
    run = model
    if compiled:
        run = compile_for_inference(model, size=size, batch_size=batch_size, dtype=model.dtype)
        numbers["active"] = run.active
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: run(pixels),
        "predict": lambda: predict(run, processor, pictures, batch_size=batch_size),
    }
    numbers["peak_bytes"] = _peak_bytes(calls["predict"], model.device)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(pixels)
        numbers["flops"] = counter.get_total_flops() // batch_size
        for name, call in calls.items():
            seconds = _time(call, runs, model.device, name)
            median = float(np.median(seconds))
            p90 = float(np.percentile(seconds, 90))
            rate = batch_size / median
            numbers[name] = {"median_seconds": median, "p90_seconds": p90, "pictures_per_second": rate}
    return numbers


def _time(call: Callable[[], Any], runs: int, device: torch.device, title: str) -> list[float]:
    """Seconds of each run, after the warm-up."""
    seconds = []
    for index in logging.tqdm(range(_WARM_UP + runs), desc=title):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        if index >= _WARM_UP:
            seconds.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory of one call; see [`measure`]."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    before = None
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed would else be used before the process grows
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _resident("VmRSS")
    call()
    return None if before is None or device.type != "cpu" else _resident("VmHWM") - before


def _resident(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _as_text(numbers: Mapping[str, Any]) -> str:
    height, width = numbers["size"]
    how = ", ".join(numbers["active"] or [numbers["dtype"]])
    place = f"{numbers['device']} ({numbers['device_name']})"
    lines = [
        f"{numbers['model']} at {height} x {width} px, {how}, on {place}, {numbers['runs']} runs of"
        f" {numbers['batch_size']}",
        f"{'':<10}{'median':>12}{'p90':>12}{'pictures/s':>12}",
    ]
    for name in ("forward", "predict"):
        times = numbers[name]
        cells = [f"{1e3 * times[f'{kind}_seconds']:.1f} ms" for kind in ("median", "p90")]
        lines.append(f"{name:<10}{cells[0]:>12}{cells[1]:>12}{times['pictures_per_second']:>12.1f}")
    peak = numbers["peak_bytes"]
    memory = "not measured on this system" if peak is None else f"{peak / 2**20:.0f} MiB"
    what = "" if numbers["device"].startswith("cuda") else " above the loaded model"
    lines += [
        f"{numbers['flops'] / 1e9:.3g} GFLOP a picture, {numbers['parameters'] / 1e6:.1f} M parameters",
        f"peak memory{what}: {memory}",
    ]
    return "\n".join(lines)
