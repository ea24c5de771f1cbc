"""A repaired copy of a dataset: COCO files, images, and the list of changes.

What is repaired, and how, is decided in the checks.
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import PIL.Image
from PIL.ExifTags import Base

from ...model.image_io import open_image, read_orientation, upright
from ..writers.coco import coco_paths
from ..writers.output import link_or_copy
from .findings import json_value
from .raw_split import free_ids

# How a file goes into a copy: "link" as it is; "upright" rotated as EXIF says, or "stored" not rotated, both without
# the EXIF tag.
CopyMode = Literal["link", "upright", "stored"]
# Formats that rotated images are saved in, with high quality.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
# EXIF orientation -> from upright back to stored.
_TO_STORED = {
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_90,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_270,
}


class RepairedCopy:
    """Writes splits with one list of categories for all of them.

    Args:
        folder: An empty folder that is filled.
        splits: By name, the JSON of each split with empty lists of images and annotations. In its `categories`, each
            id is unique.
    """

    def __init__(self, folder: Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self._written: dict[Path, tuple[str, CopyMode]] = {}  # file of the copy -> its source, and how it was copied
        categories, ids = _unite_categories(split["categories"] for split in splits.values())
        self._content = {name: {**split, "categories": categories} for name, split in splits.items()}
        paths = {split: coco_paths(folder, split, splits) for split in splits}
        self._image_folders = {split: images for split, (images, _) in paths.items()}
        self._annotation_files = {path: split for split, (_, path) in paths.items()}
        names = {split: {entry["id"]: entry["name"] for entry in splits[split]["categories"]} for split in splits}
        self._category_ids = {split: {old: ids[name] for old, name in names[split].items()} for split in splits}
        self._changes = [
            {"kind": "category", "split": split, "image_id": None, "file_name": None, "annotation_id": None}
            | {"detail": f"category {category_id} {name!r}", "change": f"id {ids[name]}"}
            for split in splits
            for category_id, name in names[split].items()
            if ids[name] != category_id
        ]

    def add(
        self,
        split: str,
        image: Mapping[str, Any],
        annotations: Iterable[Mapping[str, Any]],
        source: Path,
        mode: CopyMode,
    ) -> None:
        """Write an image file, and keep its entry of `images` and its annotations for [`write`]."""
        name = self._place_image(self._image_folders[split], image["file_name"], source, mode)
        content, category_ids = self._content[split], self._category_ids[split]
        content["images"].append({**image, "file_name": name})
        content["annotations"] += [
            {**annotation, "image_id": image["id"], "category_id": category_ids[annotation["category_id"]]}
            for annotation in annotations
        ]

    def _place_image(self, folder: Path, name: str, source: Path, mode: CopyMode) -> str:
        """Write an image file; return its name, which gets a number if another file already has it."""
        origin, path = (os.path.realpath(source), mode), Path(name)
        for number in itertools.count(2):
            target = folder / path
            if target not in self._annotation_files and self._written.setdefault(target, origin) == origin:
                break
            path = path.with_stem(f"{Path(name).stem}_{number}")
        if not target.exists():  # it does if two entries share the file
            _write_image(source, target, mode)
        return str(path)

    @property
    def splits(self) -> list[str]:
        """The splits that have images; the others are not written."""
        return [split for split, content in self._content.items() if content["images"]]

    def write(self, changes: Sequence[Mapping[str, Any]], left: Sequence[Mapping[str, Any]]) -> None:
        """Write the annotations and `changes.json`, with what was changed and the problems that are left."""
        for path, split in self._annotation_files.items():
            content = self._content[split]
            if not content["images"]:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                text = json.dumps(content, allow_nan=False)
            except ValueError:  # NaN or infinity in a field that is not checked
                text = json.dumps(json_value(content))
            path.write_text(text, encoding="utf-8")
        listed = {"changes": [*self._changes, *changes], "left": left}
        (self.folder / "changes.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")


def _unite_categories(splits: Iterable[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return one list of categories for all splits, and ids by name: the first id of a name, or a new one if taken."""
    ids: dict[str, int] = {}
    united = []
    for category in itertools.chain.from_iterable(splits):
        if (name := category["name"]) not in ids:
            is_taken = category["id"] in ids.values()
            ids[name] = next(free_ids(ids.values())) if is_taken else category["id"]
            united.append({**category, "id": ids[name]})
    return united, ids


def _write_image(source: Path, target: Path, mode: CopyMode) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if mode == "link":
        link_or_copy(source, target)
        return
    with open(source, "rb") as file, open_image(file) as opened:
        orientation = read_orientation(opened)
        # A copy, because the EXIF data of an open TIFF has its width and height as they are stored.
        image = (upright(opened) if mode == "upright" else opened).copy()
        if mode == "stored" and opened.format == "TIFF":  # which Pillow rotates when it loads it
            image = image.transpose(_TO_STORED[orientation])
        image.info.pop("xmp", None)  # which may hold the orientation too
        try:
            exif = image.getexif()
            exif.pop(Base.Orientation, None)
            exif_bytes = exif.tobytes()
        except Exception:  # broken EXIF data; which error depends on the damage and on the release of Pillow
            exif_bytes = b""
        kind = "JPEG" if opened.format == "MPO" else opened.format  # MPO: a JPEG of some cameras, with more behind it
        profile = opened.info.get("icc_profile")
        image.save(target, kind, exif=exif_bytes, icc_profile=profile, **_SAVE_OPTIONS.get(kind or "", {}))
