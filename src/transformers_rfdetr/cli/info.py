"""`transformers-rfdetr info`: describe a checkpoint without running it."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from ..text_table import format_table
from .errors import one_line_errors

EXAMPLE = """examples:

transformers-rfdetr info rf-detr-seg-medium

transformers-rfdetr info runs/buildings/model --json

transformers-rfdetr info output/checkpoint_best_total.pth
"""
_MAX_SHOWN = 8  # classes and differences


@one_line_errors
def info(
    model: Annotated[
        str, typer.Argument(help="A folder, a Hub id, a published name, or a file of rfdetr (.pth, .pt, .ckpt).")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, with all classes. Default: a table.")
    ] = False,
) -> None:
    """Describe a model: variant, task, classes, sizes, parameters, file. A published name is not downloaded."""
    from ..conversion.describe import describe

    facts = describe(model)
    typer.echo(json.dumps(facts, indent=1) if as_json else _as_text(facts))


def _as_text(facts: Mapping[str, Any]) -> str:
    names = list(facts["classes"].values())
    backbone, decoder, preprocessing = facts["backbone"], facts["decoder"], facts["preprocessing"]
    windows = f"patch {backbone['patch_size']} x {backbone['num_windows']} windows"
    rows = {
        "model": f"{facts['model']} ({facts['source']})",
        "variant": _variant_text(facts["variant"], facts["differences"]),
        "task": facts["task"],
        "classes": f"{len(names)}: {', '.join(names[:_MAX_SHOWN])}{', ...' if len(names) > _MAX_SHOWN else ''}",
        "resolution": _join_sides(facts["resolution"]),
        "legal sizes": f"multiples of {facts['block']} ({windows}): {', '.join(map(str, facts['legal_sizes']))}, ...",
        "queries": f"{facts['num_queries']}, in {facts['group_detr']} groups during training",
        "parameters": f"{facts['parameters'] / 1e6:.1f} M" + (f", {facts['dtype']}" if facts["dtype"] else ""),
        "backbone": f"DINOv2, {backbone['num_hidden_layers']} layers, width {backbone['hidden_size']}",
        "decoder": f"{decoder['decoder_layers']} layers, width {decoder['d_model']}",
        "preprocessing": ", ".join(
            [
                " ".join(f"{name} {pixels}" for name, pixels in preprocessing["size"].items()),
                *(f"{name} {_join_numbers(preprocessing[f'image_{name}'])}" for name in ("mean", "std")),
            ]
        ),
    }
    if facts["file_size"]:
        layout = f", key layout: {facts['key_layout']}" if facts["key_layout"] else ""
        rows["weights"] = f"{facts['file_size'] / 1e6:.1f} MB{layout}"
    return format_table([], rows.items())


def _variant_text(variant: str, differences: Mapping[str, Sequence[Any]]) -> str:
    """Return "rf-detr-seg-medium", "rf-detr-seg-medium, at 504 x 504 px", or the nearest variant and what differs."""
    from ..conversion.architecture import SIZES

    if not differences:
        return variant
    other = {name: values for name, values in differences.items() if name not in SIZES}
    if other:
        listed = [f"{name} {there} (here {here})" for name, (here, there) in list(other.items())[:_MAX_SHOWN]]
        return f"not a published one; the nearest, {variant}, has {', '.join(listed)}"
    phrases = {"resolution": "at {} px", "num_queries": "with {} queries", "position_grid": "with {} positions"}
    changed = [phrases[name].format(_join_sides(differences[name][0])) for name in phrases if name in differences]
    return f"{variant}, {', '.join(changed)}"


def _join_sides(size: Any) -> str:
    return " x ".join(map(str, size)) if isinstance(size, list) else str(size)


def _join_numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
