"""`transformers-rfdetr benchmark`: time, FLOPs and memory of a model on this machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..atomic_files import check_writable, make_directory, write_text
from .errors import one_line_errors
from .options import read_dtype, read_size

EXAMPLE = """examples:

transformers-rfdetr benchmark rf-detr-seg-medium

transformers-rfdetr benchmark my-model --device cuda --dtype float16 --compile --batch-size 8 --json numbers.json
"""


@one_line_errors
def benchmark(
    model: Annotated[str, typer.Argument(help="a folder, a Hub id, or a published name such as rf-detr-seg-medium")],
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="pixels of the model's input, instead of its own")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="make it fast for this size with torch.compile")] = False,
    runs: Annotated[int, typer.Option(help="that are timed, after a few that are not")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the numbers there, as JSON")
    ] = None,
) -> None:
    """Measure a model: its forward pass alone, and from an image to instances, with FLOPs and memory."""
    import torch
    import transformers

    from ..hub.load import load
    from ..inference.benchmark import device_name, measure
    from ..model.validation import as_pair, check_resolution

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
        "device_name": device_name(loaded.device),
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


def _as_text(numbers: Mapping[str, Any]) -> str:
    height, width = numbers["size"]
    how = ", ".join(numbers["active"] or [numbers["dtype"]])
    place = f"{numbers['device']} ({numbers['device_name']})"
    lines = [
        f"{numbers['model']} at {height} x {width} px, {how}, on {place}, {numbers['runs']} runs of"
        f" {numbers['batch_size']}",
        f"{'':<10}{'median':>12}{'p90':>12}{'images/s':>12}",
    ]
    for name in ("forward", "predict"):
        times = numbers[name]
        cells = [f"{1e3 * times[f'{kind}_seconds']:.1f} ms" for kind in ("median", "p90")]
        lines.append(f"{name:<10}{cells[0]:>12}{cells[1]:>12}{times['images_per_second']:>12.1f}")
    peak = numbers["peak_bytes"]
    memory = "not measured on this system" if peak is None else f"{peak / 2**20:.0f} MiB"
    what = "" if numbers["device"].startswith("cuda") else " above the loaded model"
    lines += [
        f"{numbers['flops'] / 1e9:.3g} GFLOP an image, {numbers['parameters'] / 1e6:.1f} M parameters",
        f"peak memory{what}: {memory}",
    ]
    return "\n".join(lines)
