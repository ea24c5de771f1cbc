"""`transformers-rfdetr check-dataset`: list the problems of a dataset, and write a repaired copy."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..atomic_files import check_writable, make_directory, write_text
from .errors import one_line_errors, terminated_as_interrupted

EXAMPLE = """examples:

transformers-rfdetr check-dataset my-export --overlays overlays

transformers-rfdetr check-dataset train.json --image-folder images --fix repaired --json report.json
"""


SourceArgument = Annotated[
    str,
    typer.Argument(help="A folder or file of annotations, such as a COCO JSON or a data.yaml of YOLO, or a Hub id."),
]
FixOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write a repaired copy to this folder, with a list of all changes. Images are hard links to the same"
        " files: editing one changes both.",
    ),
]
OverlaysOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Draw up to 50 annotated images to this folder, those with problems first."),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the report as JSON to this file; with -, print only JSON."),
]
ImageFolderOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the images, or root of the paths in data.yaml. Default: the folder of the annotation file."
    ),
]
NumQueriesOption = Annotated[
    int, typer.Option(help="Number of queries of the model; images with more objects are reported.", min=1)
]
ResolutionOption = Annotated[
    int | None,
    typer.Option(help="Resolution of the model in pixels; objects without a pixel there are reported.", min=1),
]
WorkersOption = Annotated[int | None, typer.Option(help="Number of threads. Default: the number of cores.", min=1)]


@one_line_errors
@terminated_as_interrupted()
def check_dataset(
    source: SourceArgument,
    fix: FixOption = None,
    overlays: OverlaysOption = None,
    json_file: JsonOption = None,
    image_folder: ImageFolderOption = None,
    num_queries: NumQueriesOption = 200,
    resolution: ResolutionOption = None,
    workers: WorkersOption = None,
) -> None:
    """Check every image and annotation, and list what would be lost, change its meaning, or is unusual.

    The exit code is 0 without errors, 1 with errors in SOURCE (also if --fix repaired them), and 2 if SOURCE cannot be
    read at all. Warnings and infos do not count.
    """
    from ..data.checks import check

    if json_file is not None and str(json_file) != "-":
        check_writable(json_file)
        if json_file.is_file() and json_file.stat().st_size and not _is_report(json_file):
            raise ValueError(f"--json must be a new file or an earlier report, got {json_file}. Give another name.")
    report = check.check_dataset(
        source,
        image_folder=image_folder,
        num_queries=num_queries,
        resolution=resolution,
        workers=workers,
        fix=fix,
        overlays=overlays,
    )
    as_json = None if json_file is None else json.dumps(report.to_dict(), indent=1)
    if str(json_file) == "-":
        typer.echo(as_json)
    else:
        if as_json is not None:
            make_directory(json_file.parent)
            write_text(json_file, as_json)
        typer.echo(str(report))
        if fix is not None and not (fix / "changes.json").is_file():
            typer.echo("No repaired copy was written, because no image can be repaired.")
        elif fix is not None:
            typer.echo(f"The repaired copy is in {fix}; {fix / 'changes.json'} lists the changes.")
    if report.has_errors:
        raise typer.Exit(1)


def _is_report(path: Path) -> bool:
    beginning = b'{\n "source": '  # a dataset may be too large to parse
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning
