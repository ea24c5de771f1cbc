"""Read COCO files, YOLO files and rows of the library datasets into raw splits, whatever values they hold."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...model.validation import is_index
from ..annotation_records import with_box_and_area
from ..hub_rows import ArrowRows, is_hub_source, is_hub_split, is_streamed, load_rows, read_hub_rows
from ..image_files import is_outside, upright_size
from ..label_maps import canonical_split_name
from ..load import recognise_format
from ..text_files import read_json_object, read_text
from ..yolo import list_yolo_images, parse_yolo_line, read_data_yaml, yolo_label_path
from .findings import DROPPED, Problem
from .raw_split import RawSplit, build_split


def read_source(source: Any, image_folder: Any) -> list[RawSplit]:
    """Read what `load_instance_dataset` reads, except streams."""
    name, files = recognise_format(source)
    if name == "coco":
        return [_read_coco(split, *found, image_folder) for split, found in files.items()]
    if name == "yolo":
        return _read_yolo(files, image_folder)
    if image_folder is not None:
        raise ValueError(f"`image_folder` requires COCO or YOLO files, got {source!s:.200}. Remove `image_folder`.")
    return _read_rows(source if is_hub_source(source) else load_rows(source, False, {}))


# COCO


def _read_coco(name: str, path: Path, folders: Sequence[Path], image_folder: Any) -> RawSplit:
    given = image_folder.get(name) if isinstance(image_folder, Mapping) else image_folder
    coco = read_json_object(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list) and (key != "annotations" or coco.get(key) is not None):
            kind = type(coco[key]).__name__ if key in coco else "nothing"
            raise ValueError(f"{path}: '{key}' must be a list, as COCO's instances JSON has it, got {kind}.")
    folders = folders if given is None else [Path(given).expanduser()]
    first = [entry for entry in coco["images"] if isinstance(entry, Mapping)][:50]
    folder = max(folders, key=lambda folder: sum(_find_file(folder, 0, entry)[1] is None for entry in first))
    return build_split(name, coco, folder, partial(_find_file, folder))


def _find_file(folder: Path, position: int, entry: Mapping[str, Any]) -> tuple[Path | None, Problem | None]:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return None, Problem("missing_file", f"file_name is {name!r:.60}", change=DROPPED)
    if is_outside(folder, name):
        return None, Problem("unsafe_file_name", f"{name!r:.200} in {folder}", change=DROPPED)
    path = folder / name
    return (path, None) if os.path.isfile(path) else (None, _missing(path))


def _missing(path: Path) -> Problem:
    return Problem("missing_file", f"{str(path)[:300]} does not exist", change=DROPPED)


# YOLO


def _read_yolo(path: Path, image_folder: Any) -> list[RawSplit]:
    classes, root, places = read_data_yaml(path, image_folder)
    image_files = {key: list_yolo_images(root, place, key) for key, place in places.items()}
    label_files = {yolo_label_path(file, root) for files in image_files.values() for file in files}
    splits = []
    for key, files in image_files.items():
        entries, line_problems = [], []
        annotations: list[dict[str, Any]] = []
        for image_id, file in enumerate(logging.tqdm(files, desc=f"Labels of {key}", delay=2)):
            entry, objects, problems = _read_yolo_image(image_id, file, root, classes)
            entries.append(entry)
            annotations += [{**item, "id": len(annotations) + i} for i, item in enumerate(objects, start=1)]
            line_problems.append(problems)
        categories = [{"id": category_id, "name": name} for category_id, name in classes.items()]
        coco = {"images": entries, "annotations": annotations, "categories": categories}
        split = build_split(canonical_split_name(key), coco, root, partial(_find_listed, files))
        for image, problems in zip(split.images, line_problems, strict=True):
            image.problems += problems
        label_folders = {yolo_label_path(file, root).parent for file in files} - {file.parent for file in files}
        other_files = {label for folder in label_folders for label in folder.glob("*.txt")} - label_files
        for label in sorted(label for label in other_files if label.name != "classes.txt"):  # of annotation tools
            split.note("annotation_of_missing_image", f"{label} belongs to no image")
        splits.append(split)
    return splits


def _read_yolo_image(
    image_id: int, path: Path, root: Path, classes: Mapping[int, str]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Problem]]:
    """Return an entry of `images`, annotations, and problems of the lines that cannot be read."""
    is_below = path.is_relative_to(root)
    entry = {"id": image_id, "file_name": os.path.relpath(path, root) if is_below else f"{image_id}_{path.name}"}
    try:
        size = upright_size(path)
    except ValueError:  # reported when the image is decoded
        return entry, [], []
    entry |= {"height": size[0], "width": size[1]}
    annotations, problems = [], []
    label_file = yolo_label_path(path, root)
    try:
        lines = read_text(label_file).splitlines() if label_file.is_file() else []
    except ValueError as error:
        return entry, [], [Problem("invalid_label_line", str(error), change=DROPPED)]
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            annotation = with_box_and_area(parse_yolo_line(line.split(), size, classes), size)
            annotations.append({**annotation, "image_id": image_id})
        except ValueError as error:
            detail = f"{label_file.name}, line {line_number}: {error}"
            problems.append(Problem("invalid_label_line", detail, change=DROPPED))
    return entry, annotations, problems


def _find_listed(sources: Sequence[Any], position: int, entry: Mapping[str, Any]) -> tuple[Any, Problem | None]:
    source = sources[position]
    return (None, _missing(source)) if isinstance(source, Path) and not source.is_file() else (source, None)


# Rows of the library datasets


def _read_rows(source: Any) -> list[RawSplit]:
    if any(map(is_streamed, [source] if is_hub_split(source) else source.values())):
        raise ValueError("`source` must not be a stream, since all rows are read. Load it without streaming=True.")
    rows, readers, classes = read_hub_rows(source)
    categories = [{"id": category_id, "name": name} for category_id, name in classes.items()]
    splits = []
    for name, split in rows.items():
        table = ArrowRows(split, readers[name])
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        given_ids = []
        for index, record in enumerate(table.records(f"Annotations of {name}")):
            objects = record.pop("annotations")
            given_ids.append(record.pop("image_id", None))
            entries.append({"id": index, **record})
            first = len(annotations) + 1
            annotations += [{"id": first + i, **item, "image_id": index} for i, item in enumerate(objects)]
        if all(map(is_index, given_ids)):  # otherwise, the loader numbers images by row too
            for entry, image_id in zip(entries, given_ids, strict=True):
                entry["id"] = image_id
            for annotation in annotations:
                annotation["image_id"] = given_ids[annotation["image_id"]]
        coco = {"images": entries, "annotations": annotations, "categories": categories}
        sources = [partial(table.encoded_image, index, {}) for index in range(len(entries))]
        splits.append(build_split(name, coco, None, partial(_find_listed, sources)))
    return splits
