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

import errno
import glob
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from PIL import Image
from pycocotools import mask as coco_mask
from transformers.utils import logging

from ..atomic_files import atomic_file, translate_disk_errors, write_text
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_io import read_rgb, redact_url
from ..model.validation import is_index
from ..model.variants_rf_detr import is_background_label
from .instances import Instances, check_color_by
from .predict import predict
from .tiling import predict_tiled

_READERS = 4  # threads; Pillow decodes outside of Python's lock
_LONGEST_NAME = 40  # characters of a class's name in that of a file
_GOES_ON = "free some space, and the same command goes on where it stopped"


class UnreadableImageError(ValueError):
    """A picture that cannot be read, where all were to be."""


class Picture(NamedTuple):
    """One picture to do.

    Attributes:
        name: What it is called in the results, and the relative path of the files that are made of it: of no two the
            same, and the same in every run.
        source: What `read_rgb` takes, or a row's number in a data set.
    """

    name: str
    source: Any


@dataclass
class Summary:
    """What a run did.

    Attributes:
        done: Pictures that this run predicted.
        skipped: Pictures that an earlier run had done.
        instances: Number of instances in those of this run.
        failed: Name and reason of each picture that could not be read.
        complete: Whether the results of all pictures, of all processes, have been written.
    """

    done: int = 0
    skipped: int = 0
    instances: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    complete: bool = False


def list_images(sources: Sequence[str], leave_out: str | os.PathLike[str] | None = None) -> list[Picture]:
    """Files, folders (all that is in them but hidden files), patterns and URLs -> pictures in a fixed order.

    Args:
        sources: Of a folder the names are relative to it, below its own name where there are several folders.
        leave_out: A folder that may lie in one of these, and that nothing is taken from.

    Raises:
        ValueError: a source does not exist or cannot be read, or a folder or a pattern has nothing in it.
    """
    hidden = None if leave_out is None else Path(leave_out).expanduser().resolve()
    num_folders = sum(bool(source) and Path(source).expanduser().is_dir() for source in sources)
    found: dict[str, str] = {}
    for source in sources:
        path = Path(source).expanduser()
        if source.startswith(("http://", "https://")):
            found[source] = Path(urlsplit(source).path).name or "picture"
        elif source and path.is_dir():
            names = _files_in(path, hidden)
            if not names:
                raise ValueError(f"the folder {source} has no files in it; give one with pictures")
            prefix = Path(path.resolve().name) if num_folders > 1 else Path()
            found |= {str(path / name): str(prefix / name) for name in names}
        elif source and path.is_file():
            found.setdefault(str(path), path.name)
        elif source and (matches := sorted(glob.glob(str(path), recursive=True))):
            found |= {match: Path(match).name for match in matches if match not in found and os.path.isfile(match)}
        else:
            raise ValueError(f"{source!r} is no file, folder, pattern with matches or http(s) URL; check its spelling")
    return [Picture(name, source) for name, source in zip(distinct(found.values()), found, strict=True)]


def distinct(names: Iterable[str]) -> list[str]:
    """Names of files, of which those that come again get a number: a.jpg, a-2.jpg."""
    taken: dict[str, None] = {}
    for wanted in names:
        name, count = wanted, 1
        while name in taken:
            count += 1
            name = str(Path(wanted).with_stem(f"{Path(wanted).stem}-{count}"))
        taken[name] = None
    return list(taken)


def _files_in(folder: Path, hidden: Path | None) -> list[Path]:
    """Relative paths of the files in a folder and those below, links to folders followed, hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}; allow it, or give what is beside it")

    names, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(root).resolve()
        if real in seen or real == hidden:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(root, name).relative_to(folder) for name in files if not name.startswith(".")]
    return sorted(names)


def predict_to_folder(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    output: str | os.PathLike[str],
    *,
    origin: Mapping[str, Any] | None = None,
    dataset: Any = None,
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
    batch_size: int = 8,
    tile: int | tuple[int, int] | str | None = None,
    overlap: float = 0.2,
    draw: bool = True,
    crops: bool = False,
    color_by: str = "class",
    strict: bool = False,
    shard: tuple[int, int] = (0, 1),
    on_picture: Callable[[Image.Image, Instances], None] | None = None,
    progress: bool = True,
) -> Summary:
    """Predict pictures into a folder; what an earlier call has done there is not done again.

    Args:
        model: As of `predict`.
        processor: The model's.
        pictures: All of them, in the same order in every process.
        output: The folder, made if it does not exist.
        origin: What else another run into this folder must have in common, for `settings.json`: names of the model and
            of the sources.
        dataset: Sequence of PIL pictures that the `source` of the pictures counts in, instead of files.
        threshold: Of `predict`.
        classes: Of `predict`.
        batch_size: Pictures, or tiles, at a time.
        tile: Of `predict_tiled`, which is used if this is given; "auto" for its default.
        overlap: Of `predict_tiled`.
        draw: Whether to write each picture with its instances drawn over it.
        crops: Whether to write each instance's cut-out.
        color_by: Of `Instances.draw`.
        strict: Whether to stop at the first picture that cannot be read.
        shard: This process's number and the number of processes.
        on_picture: Called with each picture and its instances.
        progress: Show a progress bar.

    Raises:
        ValueError: the folder holds predictions made with other settings, or other files.
        UnreadablePictureError: with `strict`, a picture cannot be read.
    """
    folder, (rank, world) = Path(output), shard
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    if not 0 <= rank < world:
        raise ValueError(f"process {rank} of {world} is none; they are numbered from 0")
    check_color_by(color_by)
    settings = {
        **(origin or {}),
        "weights": fingerprint(model),
        "threshold": threshold,
        "classes": None if classes is None else sorted(classes),
        "tile": list(tile) if isinstance(tile, tuple) else tile,
        "overlap": None if tile is None else overlap,
        "pictures": draw,
        "crops": crops,
    }
    check_settings(folder, settings)
    done = {name for name, _, _, failed in _lines(folder) if not failed}
    drawn_names = (_drawn_name(picture.name) for picture in pictures)
    drawn = dict(zip((picture.name for picture in pictures), distinct(drawn_names), strict=True)) if draw else {}
    mine = [picture for index, picture in enumerate(pictures) if index % world == rank]
    todo = [picture for picture in mine if picture.name not in done]
    summary = Summary(skipped=len(mine) - len(todo))
    wanted: dict[str, Any] = {"threshold": threshold, "classes": classes, "batch_size": batch_size}

    def find(images: list[Image.Image]) -> list[Instances]:
        if tile is None:
            return predict(model, processor, images, **wanted)
        tiles: dict[str, Any] = {"tile": None if tile == "auto" else tile, "overlap": overlap, **wanted}
        return [predict_tiled(model, processor, image, **tiles) for image in images]

    def write(picture: Picture, image: Image.Image, instances: Instances) -> str | None:
        """The files of a picture -> why they cannot be made, if it is the picture's fault."""
        try:
            if draw:
                _save(instances.draw(image, color_by=color_by), folder / "pictures" / drawn[picture.name])
            if crops:
                _save_crops(instances, image, folder / "crops" / picture.name)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return f"the name is too long for the files that are made of it: {error.strerror}"
        return None

    part = folder / "parts" / f"{rank}-of-{world}.jsonl"
    _drop_half_line(part)
    with logging.tqdm(total=len(mine), initial=summary.skipped, desc="Predicting", disable=not progress) as bar:
        for batch in _read_ahead(todo, dataset, batch_size if tile is None else 1):
            images = [image for _, image in batch if isinstance(image, Image.Image)]
            found = iter(find(images))
            write_settings(folder, settings)  # which are possible, as has just been seen
            part.parent.mkdir(exist_ok=True)
            with translate_disk_errors(part, _GOES_ON), part.open("a", encoding="utf-8") as lines:
                for picture, image in batch:
                    bar.update()
                    line = {"image": picture.name, "source": redact_url(picture.source)}
                    if isinstance(image, Image.Image):
                        instances = next(found)
                        problem = write(picture, image, instances)
                    else:
                        problem = image
                    if problem is not None:
                        summary.failed.append((picture.name, problem))
                        _write_line(lines, {**line, "error": problem})
                        if strict:
                            raise UnreadableImageError(f"{picture.name}: {problem}")
                        continue
                    _write_line(lines, {**line, **instances.to_dict()})
                    summary.done += 1
                    summary.instances += len(instances)
                    if on_picture is not None:
                        on_picture(image, instances)
    summary.complete = _merge(folder, [picture.name for picture in pictures], model.config)
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
        except Exception as error:  # a data set's own reader lets everything through that a broken file raises
            return str(error) or type(error).__name__

    batches = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
    with ThreadPoolExecutor(_READERS) as readers:

        def submit(batch: Sequence[Picture]) -> list[tuple[Picture, Future]]:
            return [(picture, readers.submit(read, picture)) for picture in batch]

        ahead = submit(next(batches, ()))
        while ahead:
            current, ahead = ahead, submit(next(batches, ()))
            yield [(picture, reading.result()) for picture, reading in current]


# -- what is written -------------------------------------------------------------------------------------------------


def fingerprint(model: Any) -> str:
    """A number of a model that another one, of other weights or other classes, does not have."""
    digest = hashlib.md5(repr(sorted(model.config.id2label.items())).encode(), usedforsecurity=False)
    for tensor in getattr(model, "_model", model).state_dict().values():
        digest.update(tensor.flatten()[:16].float().numpy(force=True).tobytes())
    return digest.hexdigest()


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """ValueError if a folder holds predictions made with other settings, or other files."""
    path = folder / "settings.json"
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete {folder} or give another folder") from error
        if different := [key for key in settings if before.get(key) != settings[key]]:
            listed = ", ".join(f"{key} {before.get(key)!r} instead of {settings[key]!r}" for key in different)
            raise ValueError(f"{folder} holds predictions made with {listed}; give another folder, or delete that one")
    elif any(_is_foreign(path) for path in folder.rglob("*")):
        raise ValueError(f"{folder} holds other files, and no predictions; give an empty folder or a new one")


def _is_foreign(path: Path) -> bool:
    """Whether a file is none that a run leaves which has found nothing yet."""
    return path.is_file() and not path.name.startswith(".") and not path.name.endswith(".unfinished.jsonl")


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what a folder's predictions are made with, once."""
    if not (folder / "settings.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "settings.json", json.dumps(settings, indent=1))


def _write_line(lines: Any, record: Mapping[str, Any]) -> None:
    lines.write(json.dumps(record, default=str) + "\n")
    lines.flush()


def _drop_half_line(part: Path) -> None:
    """Cut off what a process that was killed had begun to write."""
    if part.is_file() and part.stat().st_size:
        with part.open("rb+") as file, mmap.mmap(file.fileno(), 0) as text:
            end = text.rfind(b"\n") + 1
        os.truncate(part, end)


def _lines(folder: Path) -> Iterator[tuple[str, Path, int, bool]]:
    """Name, file, place in it, and whether it failed, of every whole line that is written."""
    for path in [folder / "predictions.jsonl", *sorted((folder / "parts").glob("*.jsonl"))]:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            place = 0
            for line in file:
                with suppress(ValueError, KeyError, TypeError):  # half a line, or damaged: it is done again
                    record = json.loads(line)
                    if line.endswith(b"\n"):
                        yield record["image"], path, place, "error" in record
                place += len(line)


def _kind_of(name: str) -> str | None:
    """The kind of picture that its suffix says, of those that we write."""
    kind = Image.registered_extensions().get(Path(name).suffix.lower())
    return kind if kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF") else None


def _drawn_name(name: str) -> str:
    """The file of what is drawn over a picture."""
    return name if _kind_of(name) else f"{name}.png"


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = _kind_of(path.name)
    with atomic_file(path, _GOES_ON) as partial:
        picture.save(partial, kind, **({"quality": 92} if kind in ("JPEG", "WEBP") else {}))


def _save_crops(instances: Instances, image: Image.Image, path: Path) -> None:
    for index, (crop, name) in enumerate(zip(instances.crops(image), instances.names, strict=True)):
        # A name of a class may hold anything.
        safe = "".join(letter if letter.isalnum() or letter in " -_" else "_" for letter in name).strip()[
            :_LONGEST_NAME
        ]
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
    names = {label: name for label, name in config.id2label.items() if not is_background_label(name)}
    ids = getattr(config, "category_ids", None)
    ids = ids if isinstance(ids, list) and all(map(is_index, ids)) else []
    if len(ids) <= max(names, default=-1):  # none, or of the classes that a checkpoint had before
        ids = range(len(config.id2label))
    categories = [{"id": ids[label], "name": name} for label, name in names.items()]
    images: list[dict[str, Any]] = []
    number = 0
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _, _ in places.values()}}
        lines, coco = (
            stack.enter_context(stack.enter_context(atomic_file(folder / name)).open("w", encoding="utf-8"))
            for name in ("predictions.jsonl", "predictions.coco.json")
        )
        coco.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
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
        coco.write(f'],\n"images": {json.dumps(images)}}}\n')
    return True
