"""Predict images, videos, Parquet and tar files into tables: in this process, or on a cluster with Ray.

The engine only decides where the units are predicted. One process, the caller's, writes all rows as they arrive, so
that a row is written once whatever is killed, and only the caller needs the output folder.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import PIL.Image
from transformers.utils import logging

from ..folder import FolderOptions, Summary
from ..prediction_files import check_settings, fingerprint, write_coco, write_settings
from .units import Unit, list_row_units, list_units

LARGEST_CHUNK = 256  # images whose rows arrive together
_CHUNKS_PER_WORKER = 8  # at least, if there are few images


def predict_dataset(
    model: Any,
    processor: Any,
    sources: Any,
    output: str | os.PathLike[str],
    options: FolderOptions | None = None,
    *,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    concurrency: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    coco: bool = False,
    retry_errors: bool = False,
    origin: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Summary:
    """Predict any number of images into Parquet files: one row an image, or frame of a video, also if it has an error.

    What an earlier run wrote is skipped, so that the same call resumes after any failure. Rows with an error are kept,
    unless `retry_errors`.

    Example:
        >>> model, processor = load("rf-detr-seg-tiny")  # doctest: +SKIP
        >>> predict_dataset(model, processor, ["s3://bucket/*.tar"], "found", engine="ray")  # doctest: +SKIP

    Args:
        model: A plain model on the CPU, or for `engine="local"` on any device; or an exported file, whose path must be
            valid on all machines.
        processor: The model's.
        sources: Files, folders, patterns and URLs; see [`list_units`]. Or a `datasets.IterableDataset` with one column
            of images.
        output: The folder. It is created if it does not exist; see the module `table`.
        options: How images are predicted; its options for drawings and crops have no effect.
        engine: "local" for this process; "ray" for workers, one for each GPU or for some CPUs.
        address: With Ray, the address of a cluster; "auto" finds the one that this machine belongs to. By default Ray
            is started on this machine, unless the program has initialized it.
        concurrency: With Ray, the number of workers. Default: what the cluster has room for.
        threads: With Ray, CPUs of a worker. Default: 1 beside a GPU, else 4 or as many as the machines have.
        device: With Ray, "auto" for GPUs if the cluster has some, or "cpu".
        coco: Whether to write predictions.coco.json too.
        retry_errors: Whether to predict again what has an error in the folder, such as that of a network.
        origin: Further settings that all runs into this folder must share, such as the names of model and sources.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: an argument is out of range, a source cannot be listed, the folder contains predictions made with
            other settings, or the cluster is too small.
        ImportError: Ray or pyarrow is not installed.
        DiskError: the disk is full.
    """
    try:
        from . import table
        from .unit_predictor import UnitPredictor
    except ImportError as error:
        raise ImportError('Parquet requires pyarrow: pip install "transformers-rfdetr[distributed]"') from error
    folder, options = Path(output), options or FolderOptions()
    if engine not in ("local", "ray"):
        raise ValueError(f"`engine` must be 'local' or 'ray', got {engine!r}")
    settings = {**(origin or {}), "weights": fingerprint(model), **options.to_settings(model.config)}
    settings = {name: value for name, value in settings.items() if name not in ("images", "crops", "color_by")}
    check_settings(folder, settings)
    units = _list(sources, folder)
    options.predict(model, processor, [PIL.Image.new("RGB", (64, 64))])  # raises for arguments that are wrong
    write_settings(folder, settings)
    if retry_errors:
        table.drop_errors(folder)
    names, num_rows = table.written_units(folder)
    todo = [unit for unit in units if unit.name not in names]
    summary = Summary(skipped=num_rows)
    with ExitStack() as stack:
        if engine == "ray" and todo:
            from .ray_workers import predict_with_ray, ray_cluster

            resources = stack.enter_context(ray_cluster(address, concurrency, threads, device))
            chunks = divide(todo, options.batch_size, resources.num_workers)
            arguments = (model, processor, options, chunks, resources)
            tables: Any = stack.enter_context(closing(predict_with_ray(*arguments)))
        else:
            tables = map(UnitPredictor(model, processor, options), divide(todo, options.batch_size, 1))
        bar = stack.enter_context(
            logging.tqdm(total=len(units), initial=len(units) - len(todo), unit=" units", disable=not progress)
        )
        writer = stack.enter_context(table.TableWriter(folder))
        for rows in tables:
            writer.add(rows)
            _count(summary, rows)
            bar.update(len(rows["unit"].unique()))
    if coco:
        write_coco(folder / "predictions.coco.json", table.read_predictions(folder), model.config)
    return summary


def _list(sources: Any, folder: Path) -> list[Unit]:
    if isinstance(sources, str | os.PathLike):
        sources = [os.fspath(sources)]
    if isinstance(sources, Sequence) and sources:
        return list_units([os.fspath(source) for source in sources], exclude=folder)
    if not hasattr(sources, "num_shards"):
        rule = "paths, URLs or a datasets.IterableDataset"
        raise ValueError(f"`sources` must be {rule}, got {sources!r:.200}. Load a dataset with streaming=True.")
    return list_row_units(sources)


def divide(units: Sequence[Unit], batch_size: int, num_workers: int) -> list[list[Unit]]:
    """Divide units into chunks that a worker predicts at once: each large unit by itself, and some images together."""
    images = [unit for unit in units if unit.kind == "image"]
    share = math.ceil(len(images) / (num_workers * _CHUNKS_PER_WORKER) / batch_size) * batch_size
    size = max(batch_size, min(LARGEST_CHUNK, share))
    large = [[unit] for unit in units if unit.kind != "image"]
    return large + [images[start : start + size] for start in range(0, len(images), size)]


def _count(summary: Summary, rows: Any) -> None:
    for name, error, scores in zip(*(rows[column].to_pylist() for column in ("image", "error", "scores")), strict=True):
        if error is not None:
            summary.failed.append((name, error))
        else:
            summary.done += 1
            summary.instances += len(scores)
