"""Measure time, FLOPs and memory of a model on this machine."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging

from ..data.synthetic import draw_scene
from ..model.validation import require
from .compiled import compile_for_inference
from .fixed_size import FixedSizeModel
from .predict import predict

_IMAGE_SIZE = (480, 640)
_WARM_UP = 3


def measure(model: Any, processor: Any, *, batch_size: int, compiled: bool, runs: int) -> dict[str, Any]:
    """Return time, FLOPs and memory of a model.

    Args:
        model: In evaluation mode, on the device to measure; or an exported model.
        processor: Its image processor, with a fixed height and width.
        batch_size: Number of images in a batch.
        compiled: Whether to time a copy by [`compile_for_inference`]. The FLOPs are always those of the plain model.
        runs: Number of runs that are timed.

    Returns:
        * `forward`, the model alone with dense mask logits of all queries, and `predict`, from drawn images of
          480 x 640 to instances: `median_seconds` and `p90_seconds` of a batch, and `images_per_second` at the median;
        * `flops` of one image, two for each multiplication in matrix products, convolutions and attention, and
          `parameters`, their number; None for an exported model;
        * `active`, what a compiled copy or an exported model runs with, or None;
        * `peak_bytes` of the first prediction: on a GPU all that torch allocates, weights included; on a CPU the growth
          of the process, or None on other systems than Linux.
    """
    size = (processor.size["height"], processor.size["width"])
    pixels = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(0)).to(model.device)
    images = [draw_scene(0, _IMAGE_SIZE)[0]] * batch_size
    is_plain = not isinstance(model, FixedSizeModel)
    require(is_plain or not compiled, "compiled", compiled, "False for an exported model")
    run = model
    if compiled:
        run = compile_for_inference(model, size=size, batch_size=batch_size, dtype=model.dtype)
    numbers: dict[str, Any] = {"active": getattr(run, "active", None), "parameters": None, "flops": None}
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: run(pixels),
        "predict": lambda: predict(run, processor, images, batch_size=batch_size),
    }
    numbers["peak_bytes"] = _peak_bytes(calls["predict"], model.device)
    with torch.no_grad():
        if is_plain:
            numbers["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            model.requires_grad_(False)  # the counter asks views of trainable parameters for gradient functions
            with FlopCounterMode(display=False) as counter:
                model(pixels)
            numbers["flops"] = counter.get_total_flops() // batch_size
        for name, call in calls.items():
            seconds = _time(call, runs, model.device, name)
            median = float(np.median(seconds))
            p90 = float(np.percentile(seconds, 90))
            rate = batch_size / median
            numbers[name] = {"median_seconds": median, "p90_seconds": p90, "images_per_second": rate}
    return numbers


def _time(call: Callable[[], Any], runs: int, device: torch.device, title: str) -> list[float]:
    """Return the seconds of each run after the warm-up."""
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
    """Return the memory that one call needs; see [`measure`]."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    before = None
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # so that the call does not use memory that loading has freed
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _resident("VmRSS")
    call()
    return None if before is None or device.type != "cpu" else _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
