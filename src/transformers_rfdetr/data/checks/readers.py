"""Read annotation files and rows of the library datasets into raw splits, whatever values they hold."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...model.validation import is_index
from ..annotation_files import AnnotatedFiles, common_classes
from ..annotation_records import Record, with_box_and_area
from ..coco import candidate_folders, choose_image_folder, image_name
from ..hub_rows import ArrowRows, is_hub_source, is_hub_split, is_streamed, load_rows, read_hub_rows
from ..image_files import is_outside, upright_size
from ..image_folder import ImageFolder, describe_renaming
from ..load import recognise_format
from ..text_files import read_json_object
from ..yolo import LabelReader
from ..yolo_layout import YoloImage, read_yolo_folder
from .findings import DROPPED, Problem
from .raw_split import RawSplit, build_split


def read_source(source: Any, image_folder: Any) -> list[RawSplit]:
    """Read what `load_instance_dataset` reads, except streams."""
    name, files = recognise_format(source)
    if name == "coco":
        folders = candidate_folders(files, image_folder)
        return [_read_coco(split, found.path, folders[split]) for split, found in files.items()]
    if name == "yolo":
        return _read_yolo(files, image_folder)
    if name is not None:
        return _read_annotated(files(image_folder))
    if image_folder is not None:
        raise ValueError(f"`image_folder` requires annotation files, got {source!s:.200}. Remove `image_folder`.")
    return _read_rows(source if is_hub_source(source) else load_rows(source, False, {}))


# COCO


def _read_coco(name: str, path: Path, folders: Sequence[Path]) -> RawSplit:
    coco = read_json_object(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list) and (key != "annotations" or coco.get(key) is not None):
            kind = type(coco[key]).__name__ if key in coco else "nothing"
            raise ValueError(f"{path}: '{key}' must be a list, as COCO's instances JSON has it, got {kind}.")
    folder = choose_image_folder(folders, coco["images"])
    return build_split(name, coco, folder, partial(_find_file, ImageFolder(folder)))


def _find_file(folder: ImageFolder, position: int, entry: Mapping[str, Any]) -> tuple[Path | None, Problem | None]:
    name = image_name(entry)
    if not isinstance(name, str) or not name:
        return None, Problem("missing_file", f"file_name is {name!r:.60}", change=DROPPED)
    found = folder.find(name)
    if found is None and is_outside(folder.folder, name):
        return None, Problem("unsafe_file_name", f"{name!r:.200} in {folder.folder}", change=DROPPED)
    if found is None:
        return None, _missing(folder.folder / name)
    problem = Problem("renamed_file", describe_renaming(found, name), change=f"file_name {found!r:.200}")
    return folder.folder / found, problem if found != name else None


def _missing(path: Path) -> Problem:
    return Problem("missing_file", f"{str(path)[:300]} does not exist", change=DROPPED)


# YOLO


def _read_yolo(path: Path, image_folder: Any) -> list[RawSplit]:
    folder = read_yolo_folder(path, image_folder)
    categories = [{"id": category_id, "name": name} for category_id, name in folder.classes.items()]
    shared = {image: (label, paths) for label, paths in folder.shared_labels().items() for image in paths}
    splits = []
    for name, images in folder.splits.items():
        reader = LabelReader(folder)
        read = [
            _read_yolo_image(image_id, image, folder.root, reader)
            for image_id, image in enumerate(logging.tqdm(images, desc=f"Labels of {name}", delay=2))
        ]
        if problem := reader.find_other_task():
            read = [(entry, [], [problem] if objects or errors else []) for entry, objects, errors in read]
        annotations = [item for _, objects, _ in read for item in objects]
        annotations = [{**item, "id": number} for number, item in enumerate(annotations, start=1)]
        coco = {"images": [entry for entry, *_ in read], "annotations": annotations, "categories": categories}
        split = build_split(name, coco, folder.root, partial(_find_listed, [image.path for image in images]))
        for raw, image, (*_, errors) in zip(split.images, images, read, strict=True):
            raw.problems += [Problem("invalid_label_line", error, change=DROPPED) for error in errors]
            if image.path in shared:
                label_path, paths = shared[image.path]
                raw.drop("shared_label_file", f"{label_path} of {', '.join(map(str, paths[:3]))}")
        for label_path in folder.unused_labels[name]:
            split.note("annotation_of_missing_image", f"{label_path} belongs to no image")
        splits.append(split)
    for note in folder.notes:
        splits[0].note("layout", note, change=None)
    return splits


def _read_yolo_image(
    image_id: int, image: YoloImage, root: Path, reader: LabelReader
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Return an entry of `images`, annotations, and the errors of the lines that cannot be read."""
    path = image.path
    is_below = path.is_relative_to(root)
    entry = {"id": image_id, "file_name": os.path.relpath(path, root) if is_below else f"{image_id}_{path.name}"}
    try:
        size = upright_size(path)
    except ValueError:  # reported when the image is decoded
        return entry, [], []
    annotations, errors = reader.read(image.label_path, size)
    annotations = [{**with_box_and_area(annotation, size), "image_id": image_id} for annotation in annotations]
    return {**entry, "height": size[0], "width": size[1]}, annotations, errors


def _find_listed(sources: Sequence[Any], position: int, entry: Mapping[str, Any]) -> tuple[Any, Problem | None]:
    source = sources[position]
    return (None, _missing(source)) if isinstance(source, Path) and not source.is_file() else (source, None)


# Files of annotation programs


def _read_annotated(parts: Sequence[AnnotatedFiles]) -> list[RawSplit]:
    classes = common_classes(parts)
    splits: list[RawSplit] = []
    categories = [{"id": category_id, "name": name} for category_id, name in classes.items()]
    for files in parts:
        folder = ImageFolder(files.image_folder)
        first = len(splits)
        for name, records in files.numbered(classes) or [("train", [])]:
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for record in records:
                entry, objects = _complete_entry(record, folder)
                images.append(entry)
                annotations += [{"id": number, **item} for number, item in enumerate(objects, len(annotations) + 1)]
            coco = {"images": images, "annotations": annotations, "categories": categories}
            splits.append(build_split(name, coco, files.image_folder, partial(_find_file, folder)))
            for raw, image in zip(splits[-1].images, files.splits.get(name, []), strict=True):
                raw.problems += [Problem("invalid_object", problem, change=DROPPED) for problem in image.problems]
        for problem in files.problems:
            splits[first].note("invalid_annotation_file", problem)
        for note in files.notes:
            splits[first].note("layout", note, change=None)
    return splits


def _complete_entry(record: Record, folder: ImageFolder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return an entry of `images` and its annotations, with the size of the image, boxes and areas if it exists."""
    entry = {"id": record["image_id"], **record}
    del entry["image_id"]
    objects = [{**item, "image_id": entry["id"]} for item in entry.pop("annotations")]
    if "height" not in entry and (found := folder.find(entry["file_name"])) is not None:
        with suppress(ValueError):  # reported when the image is decoded
            entry["height"], entry["width"] = upright_size(folder.folder / found)
    if "height" in entry:
        objects = [with_box_and_area(item, (entry["height"], entry["width"])) for item in objects]
    return entry, objects


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
        if not any("width" in entry for entry in entries):
            splits[-1].check_box_layout((record["annotations"], record) for record in table.first_records())
    return splits
