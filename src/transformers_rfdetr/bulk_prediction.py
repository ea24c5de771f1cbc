"""Many pictures to files: restartable, in shards for many processes, nothing done twice and nothing lost.

    output/
      settings.json           what the predictions were made with; another run must ask for the same
      parts/0-of-1.jsonl      one line a picture as soon as it is done, a file a process; gone when one has done all
      predictions.jsonl       all of them, in the order of the pictures
      predictions.coco.json   the same as a COCO data set with scores, for pycocotools and annotation tools
      pictures/, crops/       if asked for

A process writes a picture's line after its other files, and reads all lines when it starts, so that it can be killed at
any time. Processes need not meet: picture i is done by process i modulo their number, and whichever finds all of them
done writes the results, which are the same whoever writes them.
"""

import glob
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image
from pycocotools import mask as coco_mask
from transformers.utils import logging

from .configuration_rf_detr import RfDetrConfig, is_no_class
from .image_processing_rf_detr import read_rgb
from .inference import predict
from .instances import Instances, check_color_by
from .tiling import predict_tiled

_READERS = 4  # threads; Pillow decodes outside of Python's lock
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".m3u8"}


class UnreadablePictureError(ValueError):
    """A picture that cannot be read, where all were to be."""


class Picture(NamedTuple):
    """One picture to do.

    Attributes:
        key: What it is called in the results, the same in every run.
        source: What `read_rgb` takes, or a row's number in a data set.
        name: Relative path of the files that are made of it.
    """

    key: str
    source: Any
    name: str


@dataclass
class Summary:
    """What a run did.

    Attributes:
        done: Pictures that this run predicted.
        skipped: Pictures that an earlier run had done.
        instances: Number of instances in those of this run.
        failed: Key and reason of each picture that could not be read.
        complete: Whether the results of all pictures, of all processes, have been written.
    """

    done: int = 0
    skipped: int = 0
    instances: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    complete: bool = False


def list_pictures(sources: Sequence[str]) -> list[Picture]:
    """Files, folders (all that is in them but hidden files), patterns and URLs -> pictures in a fixed order.

    Raises:
        ValueError: a source does not exist, or a folder or a pattern has nothing in it.
    """
    found: dict[str, str] = {}
    for source in sources:
        path = Path(source).expanduser()
        if source.startswith(("http://", "https://")):
            found[source] = source.partition("?")[0].rstrip("/").rpartition("/")[2]
        elif path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            relative = [(file, file.relative_to(path)) for file in inside]
            shown = {str(file): str(name) for file, name in relative if not any(p.startswith(".") for p in name.parts)}
            if not shown:
                raise ValueError(f"the folder {source} has no files in it; give one with pictures")
            found |= {key: name for key, name in shown.items() if key not in found}
        elif path.is_file():
            found.setdefault(str(path), path.name)
        elif matches := sorted(match for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)):
            found |= {match: Path(match).name for match in matches if match not in found}
        else:
            raise ValueError(f"{source} is no file, folder, pattern with matches or http(s) URL; check its spelling")
    taken: set[str] = set()
    pictures = []
    for key, wanted in found.items():
        name, count = wanted, 1
        while name in taken:
            count += 1
            name = str(Path(wanted).with_stem(f"{Path(wanted).stem}-{count}"))
        taken.add(name)
        pictures.append(Picture(key, key, name))
    return pictures


def predict_to_folder(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    output: str | os.PathLike[str],
    *,
    model_name: str = "",
    dataset: Any = None,
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
    batch_size: int = 8,
    tile: int | tuple[int, int] | None = None,
    overlap: float = 0.2,
    draw: bool = True,
    crops: bool = False,
    color_by: str = "class",
    strict: bool = False,
    shard: tuple[int, int] = (0, 1),
    on_picture: Any = None,
    progress: bool = True,
) -> Summary:
    """Predict pictures into a folder; what an earlier call has done there is not done again.

    Args:
        model: As of `predict`.
        processor: The model's.
        pictures: All of them, in the same order in every process.
        output: The folder, made if it does not exist.
        model_name: What the settings call the model.
        dataset: Sequence of PIL pictures that the `source` of the pictures counts in, instead of files.
        threshold: Of `predict`.
        classes: Of `predict`.
        batch_size: Pictures, or tiles, at a time.
        tile: Of `predict_tiled`, which is used if this is given; 0 for its default.
        overlap: Of `predict_tiled`.
        draw: Whether to write each picture with its instances drawn over it.
        crops: Whether to write each instance's cut-out.
        color_by: Of `Instances.draw`.
        strict: Whether to stop at the first picture that cannot be read.
        shard: This process's number and the number of processes.
        on_picture: Called with key, picture and instances.
        progress: Show a progress bar.

    Raises:
        ValueError: the folder holds predictions made with other settings, or other files.
        UnreadablePictureError: with `strict`, a picture cannot be read.
    """
    folder = Path(output)
    settings = {
        "model": model_name,
        "threshold": threshold,
        "classes": None if classes is None else list(classes),
        "tile": list(tile) if isinstance(tile, tuple) else tile,
        "overlap": None if tile is None else overlap,
        "pictures": f"by {color_by}" if draw else None,
        "crops": crops,
    }
    check_color_by(color_by)
    _check_settings(folder, settings)
    done = {key for key, _, _, failed in _lines(folder) if not failed}
    rank, world = shard
    mine = [picture for index, picture in enumerate(pictures) if index % world == rank]
    todo = [picture for picture in mine if picture.key not in done]
    summary = Summary(skipped=len(mine) - len(todo))
    wanted = {"threshold": threshold, "classes": classes, "batch_size": batch_size}

    def find(images: list[Image.Image]) -> list[Instances]:
        if tile is None:
            return predict(model, processor, images, **wanted)
        tiles: dict[str, Any] = {"tile": tile or None, "overlap": overlap, **wanted}
        return [predict_tiled(model, processor, image, **tiles) for image in images]

    part = folder / "parts" / f"{rank}-of-{world}.jsonl"
    _drop_half_line(part)
    with logging.tqdm(total=len(mine), initial=summary.skipped, desc="Predicting", disable=not progress) as bar:
        for batch in _read_ahead(todo, dataset, batch_size if tile is None else 1):
            images = {picture: image for picture, image in batch if isinstance(image, Image.Image)}
            found = dict(zip(images, find(list(images.values())), strict=True))
            _write_settings(folder, settings)  # which are possible, as has just been seen
            part.parent.mkdir(exist_ok=True)
            with part.open("a", encoding="utf-8") as lines:
                for picture, image in batch:
                    bar.update()
                    if not isinstance(image, Image.Image):
                        summary.failed.append((picture.key, image))
                        _write_line(lines, {"image": picture.key, "error": image})
                        if strict:
                            raise UnreadablePictureError(f"{picture.key}: {image}")
                        continue
                    instances = found[picture]
                    if draw:
                        _save(instances.draw(image, color_by=color_by), folder / "pictures" / picture.name)
                    if crops:
                        _save_crops(instances, image, folder / "crops" / picture.name)
                    _write_line(lines, {"image": picture.key, **instances.to_dict()})
                    summary.done += 1
                    summary.instances += len(instances)
                    if on_picture is not None:
                        on_picture(picture.key, image, instances)
    summary.complete = _merge(folder, [picture.key for picture in pictures], model.config)
    if summary.complete and world == 1:  # otherwise another process may be writing to its own
        for path in part.parent.glob("*.jsonl"):
            path.unlink()
    return summary


def _read_ahead(
    pictures: Sequence[Picture], dataset: Any, batch_size: int
) -> Iterator[list[tuple[Picture, Image.Image | str]]]:
    """Batches of pictures with their pixels, or the reason why there are none; the next batch is read meanwhile."""

    def read(picture: Picture) -> Image.Image | str:
        try:
            return read_rgb(picture.source if dataset is None else dataset[picture.source])
        except (ValueError, OSError) as error:
            return str(error)

    batches = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
    with ThreadPoolExecutor(_READERS) as readers:

        def submit(batch: Sequence[Picture]) -> list[tuple[Picture, Future]]:
            return [(picture, readers.submit(read, picture)) for picture in batch]

        ahead = submit(next(batches, ()))
        while ahead:
            current, ahead = ahead, submit(next(batches, ()))
            yield [(picture, reading.result()) for picture, reading in current]


# -- what is written -------------------------------------------------------------------------------------------------


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if different := [key for key in settings if before.get(key) != settings[key]]:
            listed = ", ".join(f"{key} {before.get(key)!r} instead of {settings[key]!r}" for key in different)
            raise ValueError(f"{folder} holds predictions made with {listed}; give another folder, or delete that one")
    elif folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other files, and no predictions; give an empty folder or a new one")


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    if not (folder / "settings.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / "settings.json") as file:
            file.write(json.dumps(settings, indent=1))


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when all of it has been written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    partial.replace(path)


def _write_line(lines: Any, record: Mapping[str, Any]) -> None:
    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    lines.flush()


def _drop_half_line(part: Path) -> None:
    """Cut off what a process that was killed had begun to write."""
    if part.is_file() and part.stat().st_size:
        with part.open("rb+") as file, mmap.mmap(file.fileno(), 0) as text:
            end = text.rfind(b"\n") + 1
        os.truncate(part, end)


def _lines(folder: Path) -> Iterator[tuple[str, Path, int, bool]]:
    """Key, file, place in it, and whether it failed, of every whole line that is written."""
    for path in [folder / "predictions.jsonl", *sorted((folder / "parts").glob("*.jsonl"))]:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            place = 0
            for line in file:
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    yield record["image"], path, place, "error" in record
                place += len(line)


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        path, kind = path.with_name(f"{path.name}.png"), "PNG"
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}))
    partial.replace(path)


def _save_crops(instances: Instances, image: Image.Image, path: Path) -> None:
    for index, (crop, name) in enumerate(zip(instances.crops(image), instances.names, strict=True)):
        # A name of a class may hold anything.
        safe = "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in name).strip()[:60]
        _save(crop, path.with_name(f"{path.name}-{index:03d}-{safe}.png"))


def _merge(folder: Path, keys: Sequence[str], config: RfDetrConfig) -> bool:
    """Write the results in the order of the pictures, if all of them are there."""
    places: dict[str, tuple[Path, int, bool]] = {}
    for key, path, place, has_failed in _lines(folder):
        if key not in places or places[key][2]:
            places[key] = (path, place, has_failed)
    if any(key not in places for key in keys):
        return False
    now = set(keys)
    order = [*keys, *(key for key in places if key not in now)]  # the latter of earlier calls
    ids = getattr(config, "category_ids", None) or {label: label for label in config.id2label}
    categories = [{"id": ids[label], "name": name} for label, name in config.id2label.items() if not is_no_class(name)]
    images: list[dict[str, Any]] = []
    number = 0
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _, _ in places.values()}}
        lines = stack.enter_context(_replacing(folder / "predictions.jsonl"))
        coco = stack.enter_context(_replacing(folder / "predictions.coco.json"))
        coco.write(f'{{"categories": {json.dumps(categories, ensure_ascii=False)},\n"annotations": [')
        for key in order:
            path, place, has_failed = places[key]
            files[path].seek(place)
            line = files[path].readline().decode()
            lines.write(line)
            if has_failed:
                continue
            record = json.loads(line)
            height, width = record["image_size"]
            images.append({"id": len(images) + 1, "file_name": key, "height": height, "width": width})
            instances = Instances.from_dict(record)
            for result, (x0, y0, x1, y1) in zip(
                instances.to_coco(len(images), ids), instances.boxes.tolist(), strict=True
            ):
                number += 1
                box = [x0, y0, x1 - x0, y1 - y0]
                area = float(coco_mask.area(result["segmentation"])) if "segmentation" in result else box[2] * box[3]
                annotation = {"id": number, **result, "bbox": box, "area": area, "iscrowd": 0}
                coco.write(f"{',' * (number > 1)}\n{json.dumps(annotation)}")
        coco.write(f'],\n"images": {json.dumps(images, ensure_ascii=False)}}}\n')
    return True
