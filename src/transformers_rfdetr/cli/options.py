"""Define the arguments and options that several commands share, and read their values."""

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic_files import escape_unprintable


class Dtype(StrEnum):
    """The data types that a model can run in, by their names in torch."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Format(StrEnum):
    """The formats in which annotations can be written."""

    COCO = "coco"
    YOLO = "yolo"
    LABELME = "labelme"
    CVAT = "cvat"
    LABEL_STUDIO = "label-studio"
    HUB = "hub"


_MODELS = (
    "A folder, a Hub id, a published name such as rf-detr-seg-medium, or rf-detr-seg-tiny, which is in the package"
)
ModelArgument = Annotated[str, typer.Argument(help=f"{_MODELS}.")]
AnyModelArgument = Annotated[str, typer.Argument(help=f"{_MODELS}; or an exported file, .onnx, .xml or .pte.")]
ModelOption = Annotated[str, typer.Option(help=f"{_MODELS}.")]
DataArgument = Annotated[
    str,
    typer.Argument(
        help="A folder or file of annotations, such as a COCO JSON or a data.yaml of YOLO, or a dataset on the Hub."
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Number of CPU threads. Default: one for each core.", min=1)]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto, which uses a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Data type of the weights and the computation.")]
BatchSizeOption = Annotated[int, typer.Option(help="Number of images in a batch.", min=1)]
ResolutionOption = Annotated[
    str | None, typer.Option(metavar="N|HxW", help="Size of the model's input in pixels. Default: the model's own.")
]
VariantOption = Annotated[
    str | None, typer.Option(help="Published variant of the model. Default: determined by the file.")
]
ClassNamesOption = Annotated[
    str | None, typer.Option(help="'cat,dog,...' or a text file with one name per line. Default: the stored names.")
]
ImageFolderOption = Annotated[
    str | None, typer.Option(help="Folder of the images. Default: the folder of the JSON file or data.yaml.")
]
IgnoreClassOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-class",
        metavar="NAME",
        help="A class of the data whose objects are regions in which detections are ignored. May be repeated.",
    ),
]
PushToHubOption = Annotated[
    str | None, typer.Option(metavar="USER/NAME", help="Upload the model to this Hub repository. Default: no upload.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private. Default: public.")]


def load_model(name: str, device: str, dtype: Dtype, threads: int | None) -> Any:
    """Load a model of any kind and its image processor, to run with `threads` CPU threads."""
    import torch

    from ..hub.load import load
    from ..inference.runners import RUNTIMES

    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"threads": threads} if Path(name).suffix in RUNTIMES else {}
    return load(name, device=device, dtype=getattr(torch, dtype), **options)


def choose_split(splits: Any, split: str, data: str) -> Any:
    """Return a split of a dataset; raise ValueError with their names if it is not one of them."""
    if split not in splits:
        raise ValueError(
            f"--split must be a split of {data}, {', '.join(splits)}, got {split}. `transformers-rfdetr convert-dataset"
            f" {data} NEW --to coco --split 0.8,0.2` writes the data with a validation split."
        )
    return splits[split]


def choose_threshold(config: Any, threshold: float | None) -> Any:
    """Return the score threshold that is given, else "calibrated" if the model is calibrated, else 0.5; print which."""
    if threshold is not None:
        return threshold
    if config.score_thresholds is None:
        typer.echo("score threshold: 0.5 (the model is not calibrated)")
        return 0.5
    typer.echo(
        f"score thresholds: those of the model ({escape_unprintable(config.score_thresholds_note or 'no note')})"
    )
    return "calibrated"


def read_size(option: str, text: str) -> int | tuple[int, int]:
    """Return 432 for "432", and (height, width) for "432x576".

    Raises:
        ValueError: The text is neither.
    """
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise ValueError(f"{option} must be a side in pixels such as 432, or HxW such as 432x576, got {text}")
    height, _, width = text.partition("x")
    return (int(height), int(width)) if width else int(height)


def absolute(name: str) -> str:
    """Return the absolute path of a file or folder that exists, and any other name unchanged."""
    path = Path(name).expanduser()
    return str(path.absolute()) if os.path.exists(path) else name


def read_names(option: str, given: str) -> list[str]:
    """Return the names in "cat,dog", or in a text file with one name per line.

    Raises:
        ValueError: The file does not exist or is not text, or a name is empty.
    """
    from ..data.text_files import read_text

    path = Path(given)
    if path.is_file():
        names = read_text(path).rstrip().splitlines()
    elif path.suffix == ".txt" or path.name != given:
        raise ValueError(f"{option} must be a file with one name per line, or 'cat,dog,...', got {given}")
    else:
        names = given.split(",")
    names = [name.strip() for name in names]
    if "" in names or not names:
        raise ValueError(f"{option} must not have an empty name, got one at label {[*names, ''].index('')} in {given}")
    return names
