"""Predictions as rows of Parquet: one row an image, in files that are complete or do not exist.

    output/
      settings.json                   what the predictions were made with; another run must use the same settings
      predictions/part-*.parquet      the rows, without an order
      predictions.coco.json           the same as a COCO dataset with scores, on request

`SELECT * FROM 'output/predictions/*.parquet'` reads them in DuckDB, and `load_dataset("parquet", data_files=...)` in
`datasets`. The lists of a row have one element for each instance, best first; they are null in a row with an error.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from ...atomic_files import atomic_file
from ..instances import Instances

SCHEMA = pa.schema(
    [
        ("image", pa.string()),  # key: unique
        ("unit", pa.string()),  # what it was read with
        ("source", pa.string()),
        ("image_id", pa.int64()),  # of a dataset that has ids
        ("seconds", pa.float64()),  # time of a frame in its video
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("error", pa.string()),  # why the image could not be predicted
        ("boxes", pa.list_(pa.list_(pa.float32()))),  # boxes_xyxy in pixels
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int64())),
        ("category_ids", pa.list_(pa.int64())),  # null if the model does not know them
        ("names", pa.list_(pa.string())),
        # COCO RLE; null for a detection model
        ("masks", pa.list_(pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())]))),
    ]
)
_MAX_ROWS, _MAX_SECONDS = 4096, 30  # that a killed process loses
_REMEDY = "Free some space, and run the same command again to resume."


def to_row(instances: Instances) -> dict[str, Any]:
    """Return the columns of an image's instances."""
    height, width = instances.image_size
    return {
        "height": height,
        "width": width,
        "boxes": instances.boxes.tolist(),
        "scores": instances.scores.tolist(),
        "labels": instances.labels.tolist(),
        "category_ids": None if instances.category_ids is None else instances.category_ids.tolist(),
        "names": instances.names,
        "masks": instances.masks,
    }


def from_row(row: dict[str, Any]) -> Instances:
    """Return the instances of a row without an error."""
    import numpy as np

    categories = row["category_ids"]
    return Instances(
        np.array(row["boxes"], np.float32).reshape(-1, 4),
        np.array(row["scores"], np.float32),
        np.array(row["labels"], np.int64),
        row["names"],
        row["masks"],
        (row["height"], row["width"]),
        category_ids=None if categories is None else np.array(categories, np.int64),
    )


def to_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return rows as a table; columns that a row does not have are null."""
    return pa.Table.from_pylist(list(rows), SCHEMA)


class TableWriter:
    """Write tables into files of some thousand rows; a context manager that writes the rest at its end.

    A table is never divided, so that the rows of a unit are in one file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "predictions"
        self._tables: list[pa.Table] = []
        self._last = time.monotonic()

    def add(self, table: pa.Table) -> None:
        """Add rows, and write if there are many or the last file is half a minute old."""
        self._tables.append(table)
        is_old = time.monotonic() - self._last >= _MAX_SECONDS
        if is_old or sum(each.num_rows for each in self._tables) >= _MAX_ROWS:
            self._write()

    def _write(self) -> None:
        tables, self._tables, self._last = self._tables, [], time.monotonic()
        if not any(table.num_rows for table in tables):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._folder / f"part-{uuid.uuid4().hex}.parquet", _REMEDY) as partial:
            pyarrow.parquet.write_table(pa.concat_tables(tables), partial, compression="zstd")

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._write()  # also what came before an error or Ctrl-C


def part_files(folder: Path) -> list[Path]:
    """Return the complete files of an output folder."""
    return sorted((folder / "predictions").glob("part-*.parquet"))


def drop_errors(folder: Path) -> None:
    """Delete the rows of each unit that has an error, so that it is predicted again."""
    for path in part_files(folder):
        rows = pyarrow.parquet.read_table(path, partitioning=None)
        broken = rows.filter(pc.is_valid(rows["error"]))["unit"].unique()
        kept = rows.filter(pc.invert(pc.is_in(rows["unit"], value_set=broken)))
        if kept.num_rows == 0:
            path.unlink()
        elif kept.num_rows < rows.num_rows:
            with atomic_file(path, _REMEDY) as partial:
                pyarrow.parquet.write_table(kept, partial, compression="zstd")


def written_units(folder: Path) -> tuple[set[str], int]:
    """Return the names of the units whose rows are in an output folder, and the number of rows."""
    names: set[str] = set()
    num_rows = 0
    for path in part_files(folder):
        units = pyarrow.parquet.read_table(path, columns=["unit"], partitioning=None)["unit"]
        names.update(units.unique().to_pylist())
        num_rows += len(units)
    return names, num_rows


def read_predictions(folder: Path) -> Iterator[tuple[str, int | None, Instances]]:
    """Yield name, image id and instances of each image of an output folder that was predicted."""
    for path in part_files(folder):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            for row in batch.to_pylist():
                if row["error"] is None:
                    yield row["image"], row["image_id"], from_row(row)
