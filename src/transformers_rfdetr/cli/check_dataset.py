"""`transformers-rfdetr check-dataset`: what is wrong or odd in a data set, and a repaired copy of it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..atomic_files import check_writable, make_directory, write_text
from .errors import one_line_errors, terminated_as_interrupted

EXAMPLE = """examples:

transformers-rfdetr check-dataset my-export --overlays look

transformers-rfdetr check-dataset train.json --image-folder pictures --fix repaired --json report.json
"""


@one_line_errors
@terminated_as_interrupted()
def check_dataset(
    source: Annotated[
        str, typer.Argument(help="a COCO JSON, a folder with one for each split, a data.yaml of YOLO, or a Hub id")
    ],
    fix: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="write a repaired copy there, with a list of all changes; pictures are links to the same files, so"
            " that drawing into one changes both",
        ),
    ] = None,
    overlays: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="draw up to 50 annotated pictures there, the odd ones first")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the report as JSON; - prints nothing else")
    ] = None,
    image_folder: Annotated[
        Path | None, typer.Option(help="the pictures of a COCO JSON; of YOLO what its places are relative to")
    ] = None,
    num_queries: Annotated[int, typer.Option(help="of the model; images with more objects are named", min=1)] = 200,
    workers: Annotated[int | None, typer.Option(help="threads; as many as cores by default", min=1)] = None,
) -> None:
    """Read every picture and annotation, and list all that would be lost, mean something else, or is odd.

    The exit code is 0 without errors, 1 if there are errors in SOURCE (also when --fix repaired them), and 2 if it
    cannot be read at all. Warnings and remarks do not count.
    """
    from ..data.checks import check as check_data

    if json_file is not None and str(json_file) != "-":
        check_writable(json_file)
        if json_file.is_file() and json_file.stat().st_size and not _is_report(json_file):
            raise ValueError(f"--json {json_file} exists, and is no report of this command; give another name")
    report = check_data.check_dataset(
        source, image_folder=image_folder, num_queries=num_queries, workers=workers, fix=fix, overlays=overlays
    )
    as_json = None if json_file is None else json.dumps(report.to_dict(), indent=1)
    if str(json_file) == "-":
        typer.echo(as_json)
    else:
        if as_json is not None:
            make_directory(json_file.parent)
            write_text(json_file, as_json)
        typer.echo(str(report))
        if fix is not None:
            typer.echo(f"The repaired copy is in {fix}; {fix / 'changes.json'} lists what is different.")
    if report.has_errors:
        raise typer.Exit(1)


def _is_report(path: Path) -> bool:
    begins = b'{\n "source": '  # a data set may be too large to be read for this
    with path.open("rb") as file:
        return file.read(len(begins)) == begins
