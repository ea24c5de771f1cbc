"""Recognise annotations in formats that are not read, and say how to convert them.

These have no masks (Create ML, and Pascal VOC's boxes, which some programs count from 0 and others from 1), are an
export beside a complete one (Label Studio's JSON-MIN, VIA's CSV), or are read and written by one program (Datumaro).

A folder of the user that no reader knows must not reach `datasets`, which would copy its images into a cache.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .image_files import is_image_name, visible_files

_MAX_BYTES = 1 << 26  # of a JSON that is parsed
_MAX_FILES = 20  # of each kind that are looked at
# Suffixes of files whose rows `datasets` reads.
_ROW_SUFFIXES = {".arrow", ".csv", ".gz", ".jsonl", ".ndjson", ".parquet", ".tar", ".tsv", ".xz", ".zip", ".zst"}


class OtherFormat(NamedTuple):
    """An annotation format that is not read."""

    name: str
    remedy: str

    def error(self, path: Path) -> str:
        """Return the error about an annotation file of the format."""
        return f"`source` must have a format that is read, got annotations of {self.name} in {path}. {self.remedy}."


def _datumaro(name: str) -> str:
    return f"Convert it: `pip install datumaro`, `datum convert -if {name} -i FOLDER -f coco_instances -o OUTPUT`"


VIA = OtherFormat("VGG Image Annotator (VIA)", "Export the annotations in VIA as JSON")  # CSV
VOC = OtherFormat("Pascal VOC", _datumaro("voc"))
LABEL_STUDIO = OtherFormat("Label Studio (JSON-MIN)", "Export the project in Label Studio as JSON")
CREATE_ML = OtherFormat("Create ML", "Export the dataset as COCO or YOLO in the program that wrote it")
DATUMARO = OtherFormat("Datumaro", _datumaro("datumaro"))


def recognise_json(content: Any) -> OtherFormat | None:
    """Return the format of the content of a JSON file; None if it is unknown, or COCO."""
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], Mapping) else {}
        if {"annotation_id", "annotator"} <= first.keys():
            return LABEL_STUDIO
        return CREATE_ML if {"image", "annotations"} <= first.keys() else None
    if not isinstance(content, Mapping) or {"images", "annotations"} <= content.keys():
        return None
    if {"items", "categories"} <= content.keys():
        return DATUMARO
    return None


def recognise_file(path: Path) -> OtherFormat | None:
    """Return the format of an annotation file; None if it is unknown, or one that is read."""
    suffix = path.suffix.lower()
    if suffix == ".json" and path.stat().st_size <= _MAX_BYTES:
        try:
            return recognise_json(json.loads(path.read_bytes()))
        except (ValueError, RecursionError):
            return None
    if suffix not in (".xml", ".csv"):
        return None
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        head = file.read(4096)
    if suffix == ".xml" and re.search(r"<annotation[\s>]", head):
        return VOC
    if suffix == ".csv" and head.lstrip("#").startswith("filename,file_size,file_attributes,region_count"):
        return VIA
    return None


def refuse_other_formats(folder: Path, supported: str) -> None:
    """Raise ValueError for a folder that neither a reader nor `datasets` can read as annotated images.

    Args:
        folder: A folder that no reader recognised.
        supported: The sources that are read, which the error lists.
    """
    num_images, num_read = 0, dict.fromkeys((".json", ".xml", ".csv"), 0)
    for path in visible_files(folder):
        suffix = path.suffix.lower()
        num_images += is_image_name(path.name)
        if num_read.get(suffix, _MAX_FILES) < _MAX_FILES:
            num_read[suffix] += 1
            if found := recognise_file(path):
                raise ValueError(found.error(path))
        if suffix in _ROW_SUFFIXES:
            return
    if num_images or not num_read[".json"]:
        raise ValueError(
            f"`source` must be {supported}, got {folder} with {num_images} images and no annotations that are read. If"
            " it contains a COCO JSON, give the path of the JSON."
        )
