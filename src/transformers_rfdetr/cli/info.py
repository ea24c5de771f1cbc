"""`transformers-rfdetr info`: what a checkpoint is, without running it."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ..atomic_files import escape_unprintable
from .errors import one_line_errors

EXAMPLE = """examples:

transformers-rfdetr info rf-detr-seg-medium

transformers-rfdetr info runs/buildings/model --json

transformers-rfdetr info output/checkpoint_best_total.pth
"""
_NUM_SHOWN = 8  # of classes and of differences


@one_line_errors
def info(
    model: Annotated[
        str, typer.Argument(help="a folder, a Hub id, a published name, or a file of rfdetr (.pth, .pt, .ckpt)")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print all of it as JSON, every class too")] = False,
) -> None:
    """Say what a model is: variant, task, classes, sizes, parameters, file. Of a published name nothing is loaded."""
    from ..conversion.describe import describe

    facts = describe(model)
    typer.echo(json.dumps(facts, indent=1) if as_json else _as_text(facts))


def _as_text(facts: Mapping[str, Any]) -> str:
    names = list(map(escape_unprintable, facts["classes"].values()))
    backbone, decoder, preprocessing = facts["backbone"], facts["decoder"], facts["preprocessing"]
    windows = f"patch {backbone['patch_size']} x {backbone['num_windows']} windows"
    rows = {
        "model": f"{facts['model']} ({facts['source']})",
        "variant": _variant_text(facts["variant"], facts["differences"]),
        "task": facts["task"],
        "classes": f"{len(names)}: {', '.join(names[:_NUM_SHOWN])}{', ...' if len(names) > _NUM_SHOWN else ''}",
        "resolution": _by(facts["resolution"]),
        "legal sizes": f"multiples of {facts['block']} ({windows}): {', '.join(map(str, facts['legal_sizes']))}, ...",
        "queries": f"{facts['num_queries']}, in training {facts['group_detr']} groups of them",
        "parameters": f"{facts['parameters'] / 1e6:.1f} M" + (f", {facts['dtype']}" if facts["dtype"] else ""),
        "backbone": f"DINOv2, {backbone['num_hidden_layers']} layers, {backbone['hidden_size']} wide",
        "decoder": f"{decoder['decoder_layers']} layers, {decoder['d_model']} wide",
        "preprocessing": ", ".join(
            [
                " ".join(f"{name} {pixels}" for name, pixels in preprocessing["size"].items()),
                *(f"{name} {_numbers(preprocessing[f'image_{name}'])}" for name in ("mean", "std")),
            ]
        ),
    }
    if facts["file_size"]:
        layout = f", key layout: {facts['key_layout']}" if facts["key_layout"] else ""
        rows["weights"] = f"{facts['file_size'] / 1e6:.1f} MB{layout}"
    return "\n".join(f"{name:<15}{text}" for name, text in rows.items())


def _variant_text(variant: str, differences: Mapping[str, Sequence[Any]]) -> str:
    """ "rf-detr-seg-medium", "as rf-detr-seg-medium, at 504 x 504 px", or what else differs."""
    from ..conversion.describe import SIZES

    if not differences:
        return variant
    other = {name: values for name, values in differences.items() if name not in SIZES}
    if other:
        listed = [f"{name} {there} (here {here})" for name, (here, there) in list(other.items())[:_NUM_SHOWN]]
        return f"none that is published; the nearest one, {variant}, has {', '.join(listed)}"
    phrases = {"resolution": "at {} px", "num_queries": "with {} queries", "position_grid": "with {} positions"}
    changed = [phrases[name].format(_by(differences[name][0])) for name in phrases if name in differences]
    return f"as {variant}, {', '.join(changed)}"


def _by(size: Any) -> str:
    return " x ".join(map(str, size)) if isinstance(size, list) else str(size)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
