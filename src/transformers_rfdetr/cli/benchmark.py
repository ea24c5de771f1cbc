"""`transformers-rfdetr benchmark`: time, FLOPs and memory of a model on this machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..atomic_files import check_writable, make_directory, write_text
from ..text_table import format_table
from .errors import one_line_errors
from .options import (
    AnyModelArgument,
    BatchSizeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ResolutionOption,
    ThreadsOption,
    load_model,
    read_size,
)

EXAMPLE = """examples:

transformers-rfdetr benchmark rf-detr-seg-medium

transformers-rfdetr benchmark my-model --device cuda --dtype float16 --compile --batch-size 8 --json numbers.json
"""


@one_line_errors
def benchmark(
    model: AnyModelArgument,
    size: ResolutionOption = None,
    batch_size: BatchSizeOption = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.FLOAT32,
    threads: ThreadsOption = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model for this size and batch size. Default: off.")
    ] = False,
    runs: Annotated[int, typer.Option(help="Number of timed runs, after three warm-up runs.", min=1)] = 20,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the numbers to this file as JSON. Default: not written."),
    ] = None,
) -> None:
    """Measure time, FLOPs and memory of a model: the forward pass alone, and prediction from images to instances."""
    import torch
    import transformers

    from ..inference.benchmark import device_name, measure
    from ..inference.runners import RUNTIMES
    from ..model.validation import as_pair, check_resolution, require

    if json_file is not None:
        check_writable(json_file)
    loaded, processor = load_model(model, device, dtype, threads)
    sides = as_pair(loaded.config.resolution if size is None else read_size("--size", size))
    backbone = loaded.config.backbone_config
    if Path(model).suffix in RUNTIMES:
        require(sides == loaded.size, "--size", sides, f"{loaded.size}, the size of the file")
    check_resolution(sides, backbone.patch_size, backbone.num_windows, "--size")
    processor.size = dict(zip(("height", "width"), sides, strict=True))
    facts = {
        "model": model,
        "size": list(sides),
        "batch_size": batch_size,
        "device": str(loaded.device),
        "device_name": device_name(loaded.device),
        "dtype": dtype.value,
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


def _as_text(numbers: Mapping[str, Any]) -> str:
    height, width = numbers["size"]
    how = ", ".join(numbers["active"] or [numbers["dtype"]])
    place = f"{numbers['device']} ({numbers['device_name']})"
    rows = []
    for name in ("forward", "predict"):
        times = numbers[name]
        milliseconds = (f"{1e3 * times[f'{kind}_seconds']:.1f} ms" for kind in ("median", "p90"))
        rows.append([name, *milliseconds, f"{times['images_per_second']:.1f}"])
    peak = numbers["peak_bytes"]
    memory = "not measured on this system" if peak is None else f"{peak / 2**20:.0f} MiB"
    what = "" if numbers["device"].startswith("cuda") else " above the loaded model"
    lines = [
        f"{numbers['model']} at {height} x {width} px, {how}, on {place}, {numbers['runs']} runs of"
        f" {numbers['batch_size']}",
        format_table(["", "median", "p90", "images/s"], rows),
        f"peak memory{what}: {memory}",
    ]
    if numbers["flops"] is not None:
        lines.insert(2, f"{numbers['flops'] / 1e9:.3g} GFLOP per image, {numbers['parameters'] / 1e6:.1f} M parameters")
    return "\n".join(lines)
