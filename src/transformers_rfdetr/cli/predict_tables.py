"""The options of `transformers-rfdetr predict` with `--engine`, which writes tables."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import absolute

if TYPE_CHECKING:
    from ..inference.folder import FolderOptions, Summary


class Engine(StrEnum):
    """Where images are predicted into tables."""

    LOCAL = "local"
    RAY = "ray"


EngineOption = Annotated[
    Engine | None,
    typer.Option(
        help="Write Parquet instead of drawn images and JSON, one row an image: `local` predicts in this process, `ray`"
        " on all GPUs and machines of a Ray cluster. Sources may also be Parquet, tars and URLs such as s3://. Default:"
        " off."
    ),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster, or auto. Default: start Ray on this machine.")
]
ConcurrencyOption = Annotated[
    int | None, typer.Option(help="Number of workers of Ray. Default: as many as there is room for.", min=1)
]
RetryOption = Annotated[
    bool,
    typer.Option("--retry-errors", help="With --engine, predict again what failed before. Default: keep the errors."),
]
CocoOption = Annotated[
    bool, typer.Option("--coco", help="With --engine, write predictions.coco.json too. Default: off.")
]


def check_engine(
    engine: Engine | None,
    for_people: Mapping[str, bool],
    address: str | None,
    concurrency: int | None,
    coco: bool,
    retry_errors: bool,
) -> None:
    """Raise ValueError for an option that would have no effect with, or without, an engine."""
    for option, is_given in for_people.items():
        if engine is not None and is_given:
            raise ValueError(f"{option} must be omitted with --engine, which writes Parquet only. Omit one of them.")
    for option, value in {"--address": address, "--concurrency": concurrency}.items():
        if value is not None and engine != Engine.RAY:
            raise ValueError(f"{option} requires --engine ray, got {option} {value} alone. Add --engine ray.")
    if retry_errors and engine is None:
        raise ValueError("--retry-errors requires --engine; without it, errors are always retried. Omit it.")
    if coco and engine is None:
        raise ValueError("--coco requires --engine; without it, the file is always written. Omit it.")


def predict_tables(
    model: Any,
    processor: Any,
    options: "FolderOptions",
    source: list[str] | tuple[str | None, str],
    output: Path,
    origin: dict[str, Any],
    run_in: dict[str, Any],
) -> "Summary":
    """Predict sources, or a split of a dataset, into Parquet."""
    from ..inference.large_scale.predict_dataset import predict_dataset
    from ..model.image_io import redact_url

    is_dataset = isinstance(source, tuple)
    names = [" ".join(map(str, source))] if is_dataset else sorted({redact_url(absolute(each)) for each in source})
    sources = _read_stream(*source) if is_dataset else source
    origin = {**origin, "sources": names}
    return predict_dataset(model, processor, sources, output, options, origin=origin, **run_in)


def _read_stream(name: str, split: str) -> Any:
    """Return a split of a dataset that `datasets` reads, as an IterableDataset."""
    from ..data.load import recognise_format

    if recognise_format(name)[0] is not None:
        rule = "of images that `datasets` reads, without annotation files,"
        raise ValueError(f"--dataset must be {rule} with --engine, got {name}. Pass the folder of images as a source.")
    return load_rows(name, split, streaming=True)


def load_rows(name: str, split: str, streaming: bool = False) -> Any:
    """Load a split of a dataset with `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('--dataset requires datasets: pip install "transformers-rfdetr[train]"') from error
    try:
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetsError, FileNotFoundError) as error:
        raise ValueError(f"--dataset {name} cannot be loaded: {error}") from error
