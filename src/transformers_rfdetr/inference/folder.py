"""Predict many images into a folder for people to look at; can be interrupted and resumed.

    output/
      settings.json, predictions.jsonl, predictions.coco.json      see prediction_files
      images/, crops/                                            drawn images and cut-outs, if asked for

An image's line is written after its other files, and all lines are read at the start, so that a run can be killed at
any time. [`predict_dataset`] predicts into tables, also on several machines.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image
from transformers.utils import logging

from ..atomic_files import atomic_file, translate_disk_errors
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_io import read_rgb, redact_url
from .image_list import InputImage, unique_names
from .instances import Instances, check_color_by
from .predict import DEFAULT_SCORE, predict
from .prediction_files import (
    LINES,
    check_settings,
    find_records,
    fingerprint,
    thresholds_setting,
    truncate_partial_line,
    write_results,
    write_settings,
)
from .tiling import predict_tiled

Item = TypeVar("Item")
_NUM_READERS = 4  # threads; Pillow releases Python's lock while it decodes
_MAX_CLASS_NAME = 40  # characters of a class name in a file name
_REMEDY = "Free some space, and run the same command again to resume."


class UnreadableImageError(ValueError):
    """An image that cannot be read, in a run that is `strict`."""


@dataclass(frozen=True)
class FolderOptions:
    """How images are predicted and what is written for each.

    Attributes:
        threshold: See `predict`.
        classes: See `predict`.
        batch_size: Number of images, or of tiles of one image, in a forward pass.
        tile: See `predict_tiled`, which is used if this is given; "auto" is its default size.
        overlap: See `predict_tiled`.
        draw: Whether to write each image with its instances drawn on it.
        crops: Whether to write a cut-out of each instance.
        color_by: See `Instances.draw`.
    """

    threshold: float | Literal["calibrated"] = DEFAULT_SCORE
    classes: Sequence[str] | None = None
    batch_size: int = 8
    tile: int | tuple[int, int] | str | None = None
    overlap: float = 0.2
    draw: bool = True
    crops: bool = False
    color_by: Literal["class", "instance"] = "class"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        check_color_by(self.color_by)

    def to_settings(self, config: RfDetrConfig) -> dict[str, Any]:
        """Return the options that the written files depend on, with a model's configuration, for settings.json."""
        return {
            "threshold": thresholds_setting(config, self.threshold),
            "classes": None if self.classes is None else sorted(self.classes),
            "tile": list(self.tile) if isinstance(self.tile, tuple) else self.tile,
            "overlap": None if self.tile is None else self.overlap,
            "images": self.draw,
            "crops": self.crops,
            "color_by": self.color_by,
        }

    def predict(self, model: Any, processor: Any, images: list[Image.Image]) -> list[Instances]:
        """Return the instances of each image."""
        common: dict[str, Any] = {name: getattr(self, name) for name in ("threshold", "classes", "batch_size")}
        if self.tile is None:
            return predict(model, processor, images, **common)
        common |= {"tile": None if self.tile == "auto" else self.tile, "overlap": self.overlap}
        return [predict_tiled(model, processor, image, **common) for image in images]


@dataclass
class Summary:
    """What a run did.

    Attributes:
        done: Number of images that this run predicted.
        skipped: Number of images that an earlier run had completed.
        instances: Number of instances in the images of this run.
        failed: Name and reason of each image that could not be read.
    """

    done: int = 0
    skipped: int = 0
    instances: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def predict_to_folder(
    model: Any,
    processor: Any,
    images: Sequence[InputImage],
    output: str | os.PathLike[str],
    options: FolderOptions = FolderOptions(),
    *,
    origin: Mapping[str, Any] | None = None,
    dataset: Any = None,
    strict: bool = False,
    on_image: Callable[[Image.Image, Instances], None] | None = None,
    progress: bool = True,
) -> Summary:
    """Predict images into a folder; images that an earlier run completed there are skipped.

    Args:
        model: See `predict`.
        processor: The model's.
        images: The images, in the order of the results.
        output: The folder. It is created if it does not exist.
        options: How images are predicted and what is written.
        origin: Further settings that all runs into this folder must share, such as the names of model and sources.
        dataset: Sequence of PIL images that `InputImage.source` indexes, instead of files.
        strict: Whether to stop at the first image that cannot be read.
        on_image: Called with each image and its instances.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: the folder contains predictions made with other settings, or other files.
        UnreadableImageError: with `strict`, an image cannot be read.
    """
    folder = Path(output)
    settings = {**(origin or {}), "weights": fingerprint(model), **options.to_settings(model.config)}
    check_settings(folder, settings)
    completed = {record.image for record in find_records(folder) if not record.has_failed}
    writer = _ImageWriter(folder, images, options)
    todo = [image for image in images if image.name not in completed]
    writer.summary.skipped = len(images) - len(todo)

    def read(image: InputImage) -> Image.Image:
        return read_rgb(image.source if dataset is None else dataset[image.source])

    with logging.tqdm(
        total=len(images), initial=writer.summary.skipped, desc="Predicting", disable=not progress
    ) as bar:
        for batch in read_ahead(todo, read, options.batch_size if options.tile is None else 1):
            found = iter(options.predict(model, processor, [each for _, each in batch if not isinstance(each, str)]))
            write_settings(folder, settings)  # now that a prediction has shown that they are valid
            for image, pixels in batch:
                bar.update()
                writer.write(image, pixels, None if isinstance(pixels, str) else next(found), strict, on_image)
    write_results(folder, [image.name for image in images], model.config)
    return writer.summary


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Image.Image], batch_size: int
) -> Iterator[list[tuple[Item, Image.Image | str]]]:
    """Yield batches of items with their pixels, or why they cannot be read; the next batch is prefetched."""

    def attempt(item: Item) -> Image.Image | str:
        try:
            return read(item)
        except Exception as error:  # a dataset's reader may raise anything for a broken file
            return str(error) or type(error).__name__

    remaining = iter(items)
    with ThreadPoolExecutor(_NUM_READERS) as readers:

        def submit() -> list[tuple[Item, Any]]:
            return [(item, readers.submit(attempt, item)) for item in islice(remaining, batch_size)]

        ahead = submit()
        while ahead:
            current, ahead = ahead, submit()
            yield [(item, reading.result()) for item, reading in current]


class _ImageWriter:
    """Write the files of each image, then its line, and count them."""

    def __init__(self, folder: Path, images: Sequence[InputImage], options: FolderOptions) -> None:
        self.summary = Summary()
        self._folder, self._options = folder, options
        self._lines = folder / LINES
        truncate_partial_line(self._lines)
        drawn_names = (image.name if _image_format(image.name) else f"{image.name}.png" for image in images)
        self._drawn_names = dict(zip((image.name for image in images), unique_names(drawn_names), strict=True))

    def write(
        self,
        image: InputImage,
        read: Image.Image | str,
        instances: Instances | None,
        strict: bool,
        on_image: Callable[[Image.Image, Instances], None] | None,
    ) -> None:
        """Write an image that was `read` with its instances, or the reason why it could not be read."""
        problem = read if isinstance(read, str) else self._write_images(image.name, read, instances)
        record = {"image": image.name, "source": redact_url(image.source)}
        if image.id is not None:
            record["image_id"] = image.id
        if problem is not None:
            self.summary.failed.append((image.name, problem))
            self._append({**record, "error": problem})
            if strict:
                raise UnreadableImageError(f"{image.name}: {problem}")
            return
        self._append({**record, **instances.to_dict()})
        self.summary.done += 1
        self.summary.instances += len(instances)
        if on_image is not None:
            on_image(read, instances)

    def _write_images(self, name: str, pixels: Image.Image, instances: Instances) -> str | None:
        """Write the drawn image and the cut-outs, or return why the image's name makes that impossible."""
        try:
            if self._options.draw:
                drawn = instances.draw(pixels, color_by=self._options.color_by)
                _save_image(drawn, self._folder / "images" / self._drawn_names[name])
            if self._options.crops:
                _save_crops(instances, pixels, self._folder / "crops" / name)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return f"the name is too long for the files that are written for it: {error.strerror}"
        return None

    def _append(self, record: Mapping[str, Any]) -> None:
        with translate_disk_errors(self._lines, _REMEDY), self._lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, default=str) + "\n")


def _image_format(name: str) -> str | None:
    """Return Pillow's format for a file name's suffix if drawn images can be written in it, else None."""
    kind = Image.registered_extensions().get(Path(name).suffix.lower())
    return kind if kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF") else None


def _save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = _image_format(path.name)
    with atomic_file(path, _REMEDY) as partial:
        image.save(partial, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}))


def _save_crops(instances: Instances, image: Image.Image, path: Path) -> None:
    crops = zip(instances.crops(image), instances.names, instances.areas > 0, strict=True)
    for index, (crop, name, has_pixels) in enumerate(crops):
        if not has_pixels:
            continue
        # A class name may contain any character.
        safe = "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in name).strip()
        _save_image(crop, path.with_name(f"{path.name}-{index:03d}-{safe[:_MAX_CLASS_NAME]}.png"))
