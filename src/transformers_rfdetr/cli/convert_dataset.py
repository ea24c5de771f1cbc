"""`transformers-rfdetr convert-dataset`: write a dataset in another format, and push it to the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import one_line_errors, terminated_as_interrupted
from .options import ClassNamesOption, Format, ImageFolderOption, PrivateOption, read_names

if TYPE_CHECKING:
    from ..data.dataset import InstanceDatasets

EXAMPLE = """examples:

transformers-rfdetr convert-dataset my-export yolo-data --to yolo --split 0.8,0.2

transformers-rfdetr convert-dataset annotations.xml rows --to hub --push me/my-dataset
"""

_Source = Annotated[
    str,
    typer.Argument(help="A folder or file of annotations, such as a COCO JSON or a data.yaml of YOLO, or a Hub id."),
]
_To = Annotated[Format, typer.Option("--to", help="Format to write; hub writes Parquet files that contain the images.")]
_Split = Annotated[
    str | None,
    typer.Option(
        metavar="TRAIN,VALIDATION[,TEST]",
        help="Divide all images anew: shares such as 0.8,0.2 or 0.7,0.2,0.1. Images that look alike stay together."
        " Default: the splits of SOURCE.",
    ),
]
_Copy = Annotated[
    bool,
    typer.Option(
        "--copy-images", help="Copy the images. Default: hard links, where possible; editing one changes both."
    ),
]
_Push = Annotated[
    str | None,
    typer.Option(metavar="USER/NAME", help="Upload to this dataset repository; requires --to hub. Default: no upload."),
]


@one_line_errors
@terminated_as_interrupted()
def convert_dataset(
    source: _Source,
    output: Annotated[Path, typer.Argument(help="The new folder.")],
    to: _To,
    split: _Split = None,
    copy_images: _Copy = False,
    image_folder: ImageFolderOption = None,
    class_names: ClassNamesOption = None,
    push: _Push = None,
    private: PrivateOption = False,
) -> None:
    """Write a dataset of any format that is read in another one, with the same objects.

    A warning counts what the new format cannot hold.
    """
    from ..data.load import load_instance_dataset
    from ..data.output_folder import check_output_folder
    from ..data.writers.write import write_dataset

    shares = None if split is None else _read_shares(split)
    if push is not None and to != Format.HUB:
        raise ValueError(f"--push requires --to hub, got {to}")
    folder = Path(source).expanduser()
    check_output_folder("OUTPUT", output, [folder.resolve()] if folder.is_dir() else [], must_be_empty=True)
    names = None if class_names is None else read_names("--class-names", class_names)
    data = load_instance_dataset(source, image_folder=image_folder, class_names=names)
    if shares is not None:
        data = _split(data, shares)
    write_dataset(data, output, format=to.value, copy_images=copy_images)
    typer.echo(str(data))
    typer.echo(f"Written to {output}.")
    if push is not None:
        from ..hub.push import create_repository, upload

        kept = f"The files are in {output}."
        repo_id = create_repository(push, private=private or None, token=None, kept=kept, repo_type="dataset")
        files = [path for path in output.rglob("*") if path.is_file()]
        upload(output, files, repo_id, kept=kept, repo_type="dataset", commit_message="Upload dataset")
        typer.echo(f'Pushed; load it with load_instance_dataset("{repo_id}").')


def _read_shares(text: str) -> list[float]:
    """Return the shares in "0.8,0.2" or "0.7,0.2,0.1"."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) not in (2, 3) or not all(0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"--split must be two or three shares with the sum 1, such as 0.8,0.2, got {text}")
    return shares


def _split(data: "InstanceDatasets", shares: list[float]) -> "InstanceDatasets":
    """Divide the images of all splits."""
    from torch.utils.data import ConcatDataset

    from ..data.splits import split_dataset

    return split_dataset(ConcatDataset([*data.values()]), validation=shares[1], test=sum(shares[2:]))
