"""The records of a folder of predictions: settings, one JSON line an image, and the results in order.

    output/
      settings.json           what the predictions were made with; another run must use the same settings
      unfinished.jsonl        one line an image, appended when it is complete; deleted at the end
      predictions.jsonl       all lines, in the order of the images
      predictions.coco.json   the same as a COCO dataset with scores, for pycocotools and annotation tools

COCOeval takes `COCO("predictions.coco.json")` as detections. `loadRes` is not for it: with boxes beside the masks, it
would take the areas from the boxes. `Instances.to_coco` returns results for `loadRes`.

A process that is killed leaves complete lines and at most one partial line, which is never treated as complete.
"""

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from ..atomic_files import atomic_file, write_text
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.masks import box_xyxy_to_xywh
from ..model.variants_rf_detr import class_labels
from .instances import Instances
from .predict import category_ids_of, class_thresholds
from .runners import RuntimeModel

LINES = "unfinished.jsonl"


def fingerprint(model: Any) -> str:
    """Return a hash of a model's classes and of the first 16 numbers of each weight, or of its exported file."""
    if isinstance(model, RuntimeModel):
        return model.fingerprint()
    digest = hashlib.md5(repr(sorted(model.config.id2label.items())).encode(), usedforsecurity=False)
    for tensor in getattr(model, "_model", model).state_dict().values():
        digest.update(tensor.flatten()[:16].float().numpy(force=True).tobytes())
    return digest.hexdigest()


def thresholds_setting(config: RfDetrConfig, threshold: float | Literal["calibrated"]) -> float | dict[str, float]:
    """Return a score threshold for settings.json; "calibrated" becomes the threshold of each label."""
    if threshold != "calibrated":
        return threshold
    return {str(label): round(score, 6) for label, score in enumerate(class_thresholds(config, threshold).tolist())}


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a folder contains predictions made with other settings, or other files."""
    path = folder / "settings.json"
    if path.is_file():
        try:
            stored = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}). Delete {folder}, or give another output folder.") from error
        if different := [key for key in settings if stored.get(key) != settings[key]]:
            listed = ", ".join(f"{key} {stored.get(key)!r} instead of {settings[key]!r}" for key in different)
            raise ValueError(
                f"{folder} contains predictions made with other settings: {listed}. Pass another output folder"
                " (--output), or delete this one."
            )
    elif any(_is_foreign(path) for path in folder.rglob("*")):
        raise ValueError(f"the output folder must be new or empty, got {folder}, which contains other files")


def _is_foreign(path: Path) -> bool:
    """Whether a file cannot come from a run that has not predicted anything yet."""
    return path.is_file() and not path.name.startswith(".") and not path.name.endswith(".unfinished.jsonl")


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder's predictions, unless they are there."""
    if not (folder / "settings.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "settings.json", json.dumps(settings, indent=1))


def truncate_partial_line(path: Path) -> None:
    """Remove the line that a killed process had begun to write at the end of a JSONL file."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file, mmap.mmap(file.fileno(), 0) as text:
            end = text.rfind(b"\n") + 1
        os.truncate(path, end)


class Record(NamedTuple):
    """Where the JSON line of an image is: its file, the offset in bytes, and whether the image failed."""

    image: str
    path: Path
    offset: int
    has_failed: bool


def find_records(folder: Path) -> Iterator[Record]:
    """Yield the records of all complete lines of a folder, those of earlier runs first."""
    for path in (folder / "predictions.jsonl", folder / LINES):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            offset = 0
            for line in file:
                with suppress(ValueError, KeyError, TypeError):  # partial or damaged: the image is predicted again
                    record = json.loads(line)
                    if line.endswith(b"\n"):
                        yield Record(record["image"], path, offset, "error" in record)
                offset += len(line)


def write_results(folder: Path, names: Sequence[str], config: RfDetrConfig) -> None:
    """Write predictions.jsonl and predictions.coco.json from the lines of all images, and delete the other lines."""
    records: dict[str, Record] = {}
    for place in find_records(folder):
        if place.image not in records or records[place.image].has_failed:
            records[place.image] = place
    wanted = set(names)
    order = [*names, *(name for name in records if name not in wanted)]  # the latter are of earlier runs
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {place.path for place in records.values()}}
        partial = stack.enter_context(atomic_file(folder / "predictions.jsonl"))
        lines = stack.enter_context(partial.open("w", encoding="utf-8"))

        def copied() -> Iterator[tuple[str, int | None, Instances]]:
            for name in order:
                _, path, offset, has_failed = records[name]
                files[path].seek(offset)
                line = files[path].readline().decode()
                lines.write(line)
                if not has_failed:
                    record = json.loads(line)
                    yield name, record.get("image_id"), Instances.from_dict(record)

        write_coco(folder / "predictions.coco.json", copied(), config)
    (folder / LINES).unlink(missing_ok=True)


def write_coco(path: Path, predictions: Iterable[tuple[str, int | None, Instances]], config: RfDetrConfig) -> None:
    """Write predictions as a COCO dataset with scores, in one pass and without keeping them in memory.

    Args:
        path: The file to write.
        predictions: Name, image id (by default its position, from 1) and instances of each image.
        config: The model's.
    """
    categories = [{"id": category, "name": name} for category, name in class_names_of(config).items()]
    num_annotations = 0
    with (
        atomic_file(path) as partial,
        partial.open("w", encoding="utf-8") as coco,
        _scratch_file(partial.with_name(f".images-{partial.name[1:]}")) as images,
    ):
        coco.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
        for number, (name, given_id, instances) in enumerate(predictions, start=1):
            image_id = number if given_id is None else given_id
            height, width = instances.image_size
            entry = {"id": image_id, "file_name": name, "height": height, "width": width}
            images.write(", " * (number > 1) + json.dumps(entry))
            for annotation in coco_annotations(instances, image_id):
                num_annotations += 1
                coco.write("," * (num_annotations > 1) + "\n" + json.dumps({"id": num_annotations, **annotation}))
        coco.write('],\n"images": [')
        images.seek(0)
        shutil.copyfileobj(images, coco)
        coco.write("]}\n")


@contextmanager
def _scratch_file(path: Path) -> Iterator[IO[str]]:
    """Open a text file that is deleted at the end."""
    try:
        with path.open("w+", encoding="utf-8") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def class_names_of(config: RfDetrConfig) -> dict[int, str]:
    """Return the name of each category id of a model, or of each label if it does not know them."""
    category_ids = category_ids_of(config) or range(len(config.id2label))
    return {category_ids[label]: name for label, name in class_labels(config.id2label).items()}


def coco_annotations(instances: Instances, image_id: int) -> Iterator[dict[str, Any]]:
    """Yield the instances of an image that have a pixel as COCO annotations with scores."""
    instances = instances.select(instances.areas > 0)  # as `to_coco` does
    boxes = box_xyxy_to_xywh(instances.boxes.astype(float)).tolist()
    for result, box, area in zip(instances.to_coco(image_id), boxes, instances.areas.tolist(), strict=True):
        yield {**result, "bbox": box, "area": area, "iscrowd": 0}
