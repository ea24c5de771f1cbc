"""A repaired copy of a data set: files in COCO's form, and the list of what is not as it was.

What is repaired, and how, is decided by `check_data`; here it is put together and written.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from PIL.ExifTags import Base

from ...model.image_io import open_image

# Of pictures that are turned, so that little is lost.
_SAVED_AS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
# From upright to as it is stored, by EXIF's orientation.
_BACK = {
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_90,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_270,
}
_EXPORTED = {"train": "train", "validation": "valid", "test": "test"}  # the folders of Roboflow's exports


class RepairedCopy:
    """Writes splits with one list of categories for all of them.

    Args:
        folder: What is filled.
        splits: The JSON of each, with empty lists of images and annotations; an id of its `categories` has one name.
    """

    def __init__(self, folder: Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self._written: dict[Path, tuple[Any, str]] = {}  # file of the copy -> its source, and the way that it came
        self._exported = splits.keys() <= _EXPORTED.keys()
        united, ids = _unite_categories(split["categories"] for split in splits.values())
        self._content = {name: {**split, "categories": united} for name, split in splits.items()}
        self._files = {self._annotation_file(split): split for split in splits}
        names = {split: {entry["id"]: entry["name"] for entry in splits[split]["categories"]} for split in splits}
        self._numbers = {split: {number: ids[name] for number, name in names[split].items()} for split in splits}
        self._notes = [
            {"kind": "category", "split": split, "image_id": None, "file_name": None, "annotation_id": None}
            | {"detail": f"category {number} {name!r}", "change": f"id {ids[name]}"}
            for split in splits
            for number, name in names[split].items()
            if ids[name] != number
        ]

    def add(
        self, split: str, image: Mapping[str, Any], annotations: Iterable[Mapping[str, Any]], source: Path, way: str
    ) -> None:
        """Write a picture, and keep its annotations for [`write`].

        `image` is its entry in the copy; `way` is "link" for the file as it is, "upright" to turn it as EXIF says, or
        "stored" not to turn it, the latter two without EXIF's tag.
        """
        name = self._place_picture(self._folder(split), image["file_name"], source, way)
        content, numbers = self._content[split], self._numbers[split]
        content["images"].append({**image, "file_name": name})
        content["annotations"] += [
            {**annotation, "image_id": image["id"], "category_id": numbers[annotation["category_id"]]}
            for annotation in annotations
        ]

    def _place_picture(self, folder: Path, name: str, source: Path, way: str) -> str:
        """Write the file of an image -> its name, another one where a file of another kind has that already."""
        origin, path = (os.path.realpath(source), way), Path(name)
        for number in itertools.count(2):
            target = folder / path
            if target not in self._files and self._written.setdefault(target, origin) == origin:
                break
            path = path.with_stem(f"{Path(name).stem}_{number}")
        if not target.exists():  # which it does for the second image of a file
            _write_picture(source, target, way)
        return str(path)

    def _annotation_file(self, split: str) -> Path:
        if self._exported:
            return self._folder(split) / "_annotations.coco.json"
        return self.folder / "annotations" / f"instances_{split}.json"

    def write(self, changes: Sequence[Mapping[str, Any]], left: Sequence[Mapping[str, Any]]) -> None:
        """Write the annotations, and `changes.json`: what was changed, and what is as odd as it was."""
        for path, split in self._files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            content = self._content[split]
            try:
                text = json.dumps(content, allow_nan=False)
            except ValueError:  # somewhere in what is not looked at
                text = json.dumps(json_value(content))
            path.write_text(text, encoding="utf-8")
        listed = {"changes": [*self._notes, *changes], "left": left}
        (self.folder / "changes.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")

    def _folder(self, split: str) -> Path:
        return self.folder / (_EXPORTED[split] if self._exported else split)


def json_value(value: Any) -> Any:
    """A value of a JSON file as every program reads it: null where Python knows a number that is not finite."""
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def free_ids(taken: Collection[Any]) -> Iterator[int]:
    """Whole numbers from 1 on that are none of those taken."""
    return (number for number in itertools.count(1) if number not in taken)


def _unite_categories(splits: Iterable[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """One list of categories for all splits, and id by name: the first that has it, a free one where that is taken."""
    numbers: dict[str, int] = {}
    united = []
    for number, category in ((entry["id"], entry) for entries in splits for entry in entries):
        if (name := category["name"]) not in numbers:
            numbers[name] = next(free_ids(numbers.values())) if number in numbers.values() else number
            united.append({**category, "id": numbers[name]})
    return united, numbers


def _write_picture(source: Path, target: Path, way: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if way == "link":
        try:
            os.link(os.path.realpath(source), target)
        except OSError:  # another disk, or one that knows no links
            shutil.copyfile(source, target)
        return
    with open(source, "rb") as file, open_image(file) as opened:
        orientation = opened.getexif().get(Base.Orientation)
        picture = PIL.ImageOps.exif_transpose(opened) if way == "upright" else opened.copy()
        if way == "stored" and opened.format == "TIFF":  # which Pillow has turned on its own
            picture = picture.transpose(_BACK[orientation])
        picture.info.pop("xmp", None)  # which may hold the orientation again
        exif = picture.getexif()
        exif.pop(Base.Orientation, None)
        kind = "JPEG" if opened.format == "MPO" else opened.format  # of some cameras: a JPEG with others behind it
        profile = opened.info.get("icc_profile")
        picture.save(target, kind, exif=exif, icc_profile=profile, **_SAVED_AS.get(kind or "", {}))
