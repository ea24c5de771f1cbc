"""Build one model in three implementations, measure time, memory and FLOPs, and print tables; for all benchmarks.

The implementations are ours, transformers' port and rfdetr, with the same random weights. Seconds are medians of runs
in turns (A B C A B C ...), so that a slow minute of the machine affects all of them. Bytes are measured in a fresh
process for each number. `import rfdetr` enables TF32 for float32 matrix products, so all three use it where the
device has it.
"""

import argparse
import copy
import ctypes
import gc
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import rfdetr
import torch
from evaluation_memory import resident
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.rf_detr.image_processing_rf_detr import RfDetrImageProcessor as PortProcessor
from transformers.models.rf_detr.modeling_rf_detr import RfDetrForInstanceSegmentation as PortModel
from transformers.utils.logging import disable_progress_bar

from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, compile_for_inference

# For --quick: the branches of rf-detr-seg-nano, with few patches and queries.
QUICK_VARIANT = "rf-detr-seg-nano"
QUICK_FIELDS = {"resolution": 48, "num_queries": 16, "group_detr": 2, "decoder_layers": 2}
PEERS = ("port", "rfdetr")
# Imported once for all processes that measure bytes on the CPU. CUDA does not work in forked processes.
_PRELOADED = ["transformers_rfdetr", "rfdetr", PortModel.__module__, PortProcessor.__module__]

disable_progress_bar()
logging.getLogger("rf-detr").setLevel(logging.ERROR)  # it warns about models without pretrained weights


class Measurement(NamedTuple):
    """One measured number."""

    area: str
    variant: str
    case: str
    implementation: str  # "ours", "port" or "rfdetr", with the form that was run if it is not the plain one
    value: float
    unit: str  # "s", "B", "FLOP" or "images/s"
    device: str


# Models


def read_config(variant: str, quick: bool) -> RfDetrConfig:
    """Return the configuration of a published variant, small for --quick."""
    return RfDetrConfig.from_variant(variant, **(QUICK_FIELDS if quick else {}))


def build(config: RfDetrConfig, variant: str, device: str, *names: str) -> dict[str, Any]:
    """Return the named ones of "ours", "port" and "rfdetr", with the same weights, in evaluation mode.

    "rfdetr" is the class that users call; its module is `.model.model`.
    """
    torch.manual_seed(0)
    ours = RfDetrForInstanceSegmentation(config).eval()
    with torch.no_grad():
        # Some parameters are initialized to zero, so all queries would have the same boxes and masks.
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    models: dict[str, Any] = {}
    if "port" in names:
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            models["port"] = PortModel.from_pretrained(folder).eval().to(device)
    if "rfdetr" in names:
        kind = variant.replace("-", "")  # "rf-detr-seg-medium" is RFDETRSegMedium
        models["rfdetr"] = next(value for name, value in vars(rfdetr).items() if name.lower() == kind)(
            pretrain_weights=None,
            device=device,
            resolution=config.resolution,
            positional_encoding_size=config.backbone_config.position_grid[0],
            num_queries=config.num_queries,
            num_select=config.num_queries,
            group_detr=config.group_detr,
            dec_layers=config.decoder_layers,
        )
        module = models["rfdetr"].model.model
        missing, unexpected = module.load_state_dict(ours.state_dict(), strict=False)
        if missing != ["_kp_active_mask"] or unexpected:
            raise ValueError(
                f"rfdetr's model has another architecture: it lacks {unexpected} and has {missing} in addition"
            )
        module.to(device).eval()
    if "ours" in names:
        models["ours"] = ours.to(device)
    return {name: models[name] for name in names}


class Form(NamedTuple):
    """A model and its call: pixels (B, 3, H, W) float32 -> outputs."""

    model: Any
    run: Callable[[Tensor], Any]


def build_forms(models: dict[str, Any], device: str, *, compiled: bool, batch: int = 1) -> dict[str, Form]:
    """Return every form of the three implementations; the first word of a name is the implementation.

    Ours and the port in float32 and in half precision (bf16 on a CPU, fp16 on a GPU); "ours compiled" is
    `compile_for_inference`, and "rfdetr optimised" is rfdetr's `inference()`, which traces the exported form; both in
    float32, and on a GPU in half precision too.
    """
    half = ("fp16", torch.float16) if device == "cuda" else ("bf16", torch.bfloat16)
    precisions = {"": torch.float32, f" {half[0]}": half[1]}
    forms = {}
    for name in ("ours", "port"):
        for suffix, dtype in precisions.items():
            forms[name + suffix] = _as_form(copy.deepcopy(models[name]).to(dtype), dtype)
    forms["rfdetr"] = Form(models["rfdetr"], models["rfdetr"].model.model)
    for suffix, dtype in precisions.items() if device == "cuda" else [("", torch.float32)]:
        optimised = optimise_rfdetr(models["rfdetr"], dtype=dtype)
        forms[f"rfdetr optimised{suffix}"] = Form(optimised, _as_form(optimised.model.inference_model, dtype).run)
        if compiled:
            fast = compile_for_inference(models["ours"], batch_size=batch, dtype=dtype)
            forms[f"ours compiled{suffix}"] = _as_form(fast, dtype)
            print(f"ours compiled{suffix}: {', '.join(fast.active)}")
    return forms


def _as_form(model: Any, dtype: torch.dtype) -> Form:
    return Form(model, lambda pixels: model(pixels.to(dtype)))


def optimise_rfdetr(peer: Any, **settings: Any) -> Any:
    """Return a copy of rfdetr's model after `inference(**settings)`; its module is `.model.inference_model`."""
    optimised = copy.deepcopy(peer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the tracer
        optimised.inference(**settings)
    return optimised


# Inputs


def draw_boxes(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return random `boxes_cxcywh` (count, 4) inside [0, 1], with sides between `low` and `high`."""
    extent = low + (high - low) * torch.rand(count, 2, generator=generator)
    return torch.cat([extent / 2 + (1 - extent) * torch.rand(count, 2, generator=generator), extent], dim=1)


def ellipses(boxes_cxcywh: Tensor, height: int, width: int) -> Tensor:
    """Return maps (N, height, width): 1 at the center of the ellipse in each box, 0 on its edge, negative outside."""
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    center_x, center_y, extent_x, extent_y = boxes_cxcywh[:, :, None].unbind(1)
    dx, dy = (x - center_x) * 2 / extent_x, (y - center_y) * 2 / extent_y
    return 1 - dx[:, None, :] ** 2 - dy[:, :, None] ** 2


# Clocks, counters


def time_in_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Return the median seconds of each function, after one run of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: str) -> None:
    """Wait until the GPU is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def count_flops(function: Callable[[], Any]) -> int:
    """Return the FLOPs that torch counts: two for each multiplication in matrix products, convolutions and attention.

    Models must be frozen: the counter reads the gradient function of views of parameters that require gradients, and
    there is none under no_grad.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(device: str, prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Return the peak bytes that `prepare(*arguments)()` adds to a fresh process that has run `prepare(*arguments)`.

    On the CPU this is resident memory, on a GPU memory that torch allocates.
    """
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(_PRELOADED)
    # An executor, because a Pool waits forever for a process that the system killed for its memory.
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_peak_here, device, prepare, arguments).result()


def _peak_here(device: str, prepare: Callable[..., Callable[[], Any]], arguments: tuple) -> int:
    run = prepare(*arguments)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, or the run would reuse it
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


# Command line and tables


def run(
    description: str,
    argv: list[str] | None,
    measure: Callable[[str, argparse.Namespace], list[Measurement]],
    *,
    repeats: int,
    variants: Sequence[str] = ("rf-detr-seg-medium",),
    **options: dict[str, Any],
) -> None:
    """Read the command line, `measure` each variant, print a table, and append the numbers to the file of --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--variant",
        nargs="+",
        default=variants,
        metavar="NAME",
        help="published segmentation models (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each form (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the numbers to FILE, one JSON object per line (default: none)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="check that the script runs, with small models and inputs (default: off)"
    )
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.variant, arguments.repeats = [QUICK_VARIANT], 1
    measurements = [measurement for variant in arguments.variant for measurement in measure(variant, arguments)]
    print(table(measurements))
    if arguments.json:
        with arguments.json.open("a") as file:
            file.writelines(json.dumps(measurement._asdict()) + "\n" for measurement in measurements)


def table(measurements: list[Measurement]) -> str:
    """Return a Markdown table, with the ratios to both peers where they have the same case."""
    values = {m[:4]: m.value for m in measurements}
    lines = ["| area | model | what | who | measured | x port | x rfdetr |", "|---|---|---|---|---:|---:|---:|"]
    for m in measurements:
        peers = (values.get((m.area, m.variant, m.case, peer)) for peer in PEERS)
        ratios = ("" if value is None else f"{m.value / value:.3g}" for value in peers)
        cells = [m.area, m.variant.removeprefix("rf-detr-"), m.case, m.implementation, show(m.value, m.unit), *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(value: float, unit: str) -> str:
    """Return a number with its unit, in about three digits."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    if unit == "B":
        return f"{value / 2**20:,.0f} MiB" if value >= 2**20 else f"{value / 2**10:.1f} KiB"
    return f"{value / 1e9:.1f} G" if unit == "FLOP" else f"{value:.1f} {unit}"
