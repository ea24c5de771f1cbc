"""`transformers-rfdetr compare`: whether one of two models is better on the same images."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_line_errors
from .evaluate import format_comparison

EXAMPLE = """example:

transformers-rfdetr evaluate runs/first/model DATA --confidence 0.95 --output first.json
transformers-rfdetr evaluate runs/second/model DATA --confidence 0.95 --output second.json
transformers-rfdetr compare first.json second.json
"""


@one_line_errors
def compare(
    first: Annotated[Path, typer.Argument(help="A file that `evaluate --confidence --output` wrote.")],
    second: Annotated[Path, typer.Argument(help="The same of another model on the same images.")],
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
) -> None:
    """Compare the metrics of two models on the same images, with intervals of the differences.

    They are from a paired bootstrap over the images: a difference whose interval does not contain 0 is not by chance.
    """
    from ..evaluation import confidence as statistics
    from ..model.validation import error_context

    contents = [_read(file) for file in (first, second)]
    images = []
    for file, content in zip((first, second), contents, strict=True):
        with error_context(str(file)):
            images.append(statistics.from_json(content.get("per_image")))
    typer.echo(f"first: {contents[0].get('model', first)}\nsecond: {contents[1].get('model', second)}")
    typer.echo(format_comparison(statistics.compare(images[0], images[1], confidence), len(images[0].image_ids)))


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} must be a file that `evaluate --confidence --output` wrote: {error}") from error
