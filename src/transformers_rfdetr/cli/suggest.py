"""`transformers-rfdetr suggest`: which images to annotate next."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..text_table import format_table
from .errors import one_line_errors
from .options import BatchSizeOption, DeviceOption, Dtype, DtypeOption, ModelOption, ThreadsOption, load_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..inference.image_list import InputImage

EXAMPLE = """example:

transformers-rfdetr suggest unlabelled/ --model runs/first/model --count 50 --annotated data/ --output next

transformers-rfdetr predict runs/first/model next/images --save-as labelme --output to-correct
"""
_MAX_SHOWN = 20


@one_line_errors
def suggest(
    images: Annotated[list[str], typer.Argument(help="Files, folders, patterns and URLs of images.")],
    model: ModelOption,
    count: Annotated[int, typer.Option(min=1, help="Number of images to suggest.")] = 50,
    annotated: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Images that are annotated already. May be repeated. Default: none."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the result.")] = Path("suggestions"),
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.FLOAT32,
    threads: ThreadsOption = None,
) -> None:
    """Suggest which images to annotate next: those that the model is unsure about, and that differ from one another.

    Writes suggestions.json, the most useful image first, and links the images into OUTPUT/images. Images that cannot be
    read are listed and skipped.
    """
    from ..data.output_folder import check_output_folder
    from ..inference.image_list import list_images
    from ..inference.suggestions import suggest as select

    check_output_folder("--output", output, must_be_empty=True)
    candidates, known = list_images(images), list_images(annotated) if annotated else []
    loaded, processor = load_model(model, device, dtype, threads)
    unreadable: list[str] = []
    readable: list[InputImage] = []
    found = select(
        loaded,
        processor,
        _read_images(candidates, readable, unreadable),
        count,
        annotated=_read_images(known, [], unreadable),
        batch_size=batch_size,
    )
    suggested = [(readable[one.image_index], one.expected_errors, one.distance) for one in found]
    _write(output, suggested)
    rows = [[image.name, f"{errors:.1f}", f"{distance:.2f}"] for image, errors, distance in suggested[:_MAX_SHOWN]]
    typer.echo(format_table(["image", "expected errors", "distance to the others"], rows))
    if len(found) > _MAX_SHOWN:
        typer.echo(f"and {len(found) - _MAX_SHOWN} more")
    typer.echo(f"{len(found)} of {len(readable)} images are in {output / 'images'}")
    if num_same := sum(one.distance < 0.01 for one in found):
        typer.echo(f"{num_same} of them look the same as an annotated image, or as one suggested before")
    if unreadable:
        typer.echo("\n".join([f"{len(unreadable)} images could not be read:", *unreadable[:_MAX_SHOWN]]), err=True)
        raise typer.Exit(1)


def _read_images(
    images: "Sequence[InputImage]", readable: "list[InputImage]", unreadable: list[str]
) -> "Iterator[Image]":
    """Yield the images that can be read; append each to one of the lists."""
    from ..model.image_io import read_rgb

    for image in images:
        try:
            pixels = read_rgb(image.source)
        except (ValueError, OSError) as error:
            unreadable.append(f"{image.name}: {error}")
        else:
            readable.append(image)
            yield pixels


def _write(folder: Path, suggested: "Sequence[tuple[InputImage, float, float]]") -> None:
    """Write the folder of the suggested images. Images from URLs are only named."""
    from ..atomic_files import atomic_directory
    from ..data.writers.output import link_or_copy

    content = [
        {"image": image.name, "source": image.source, "expected_errors": errors, "distance": distance}
        for image, errors, distance in suggested
    ]
    with atomic_directory(folder) as partial:
        for image, _, _ in suggested:
            if Path(image.source).is_file():
                target = partial / "images" / image.name
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(image.source, target)
        (partial / "suggestions.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
