"""Predict units: read their images, predict them in batches, and return one row for each image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import PIL.Image
import pyarrow as pa

from ...model.image_io import redact_url
from ..folder import FolderOptions, read_ahead
from .table import to_row, to_table
from .units import StoredImage, Unit, read_unit


class UnitPredictor:
    """Predicts chunks of units; a worker has one.

    Args:
        model: On the device that it runs on.
        processor: The model's.
        options: See [`predict_dataset`].
    """

    def __init__(self, model: Any, processor: Any, options: FolderOptions) -> None:
        self._model, self._processor, self._options = model, processor, options

    def __call__(self, units: Sequence[Unit]) -> pa.Table:
        """Return the rows of some units, one for each image, as a table."""
        with _any_size_allowed(self._options.tile is not None):
            if units[0].kind == "video":
                rows = self._predict_video(units[0])
            else:
                rows = list(self._predict_images(units))
        return to_table(rows)

    def _predict_images(self, units: Sequence[Unit]) -> Iterator[dict[str, Any]]:
        broken: list[dict[str, Any]] = []

        def images() -> Iterator[StoredImage]:
            for unit in units:
                try:
                    yield from read_unit(unit)
                except Exception as error:  # a damaged file; its earlier images are kept
                    broken.append(error_row(unit, f"{type(error).__name__}: {error}"))

        batch_size = self._options.batch_size if self._options.tile is None else 1
        for batch in read_ahead(images(), StoredImage.decode, batch_size):
            readable = [pixels for _, pixels in batch if not isinstance(pixels, str)]
            found = iter(self._options.predict(self._model, self._processor, readable))
            for image, pixels in batch:
                row = {"image": image.key, "unit": image.unit, "source": image.source, "image_id": image.image_id}
                yield row | ({"error": pixels} if isinstance(pixels, str) else to_row(next(found)))
        yield from broken

    def _predict_video(self, unit: Unit) -> list[dict[str, Any]]:
        from ..video.predict_video import predict_video

        rows: list[dict[str, Any]] = []

        def add(frame: Any, instances: Any, _: Any) -> None:
            key = f"{unit.name}/{frame.index:07d}"
            row = {"image": key, "unit": unit.name, "source": redact_url(unit.source), "seconds": frame.seconds}
            rows.append(row | to_row(instances))

        options = {name: getattr(self._options, name) for name in ("threshold", "classes", "batch_size")}
        try:
            predict_video(self._model, self._processor, unit.source, on_frame=add, progress=False, **options)
        except (ValueError, OSError) as error:
            return [error_row(unit, str(error))]
        return rows


def error_row(unit: Unit, error: str) -> dict[str, Any]:
    """Return the row of a unit that cannot be read."""
    return {"image": unit.name, "unit": unit.name, "error": error}


@contextmanager
def _any_size_allowed(is_allowed: bool) -> Iterator[None]:
    """Read images of any size in tiles, for which large images are expected."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    try:
        if is_allowed:
            PIL.Image.MAX_IMAGE_PIXELS = None
        yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
