"""Read COCO annotations."""

import json
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.validation import are_numbers, is_index, to_builtin
from .label_maps import (
    split_name,
)
from .text_files import read_text

_FIELDS = ("id", "category_id", "bbox", "segmentation", "area", "iscrowd")  # of an annotation


def find_coco_files(source: Path | Mapping[str, Any]) -> dict[str, tuple[Path, list[Path]]]:
    """Split -> JSON and the folders that its pictures may lie in; empty where the source is of another form."""
    if isinstance(source, Mapping):
        paths = {split_name(split): Path(path).expanduser() for split, path in source.items()}
        return {split: (path, [path.parent, path.parent / "images"]) for split, path in paths.items()}
    if source.suffix.lower() == ".json":
        return {"train": (source, [source.parent, source.parent / "images"])}
    exported = [source / split / "_annotations.coco.json" for split in ("train", "valid", "test")]
    if files := {split_name(path.parent.name): (path, [path.parent]) for path in exported if path.is_file()}:
        return files
    if (source / "_annotations.coco.json").is_file():
        return {"train": (source / "_annotations.coco.json", [source])}
    official = {}
    for path in sorted(source.glob("annotations/instances_*.json")):
        name = path.stem.removeprefix("instances_")  # train2017
        folders = [source / name, source / "images" / name, source / "images"]
        official[split_name(re.sub(r"\d+$", "", name))] = (path, folders)
    return {split: official[split] for split in sorted(official, key=lambda split: (split != "train", split))}


def read_coco_file(path: Path) -> dict[str, Any]:
    """A COCO JSON, whatever it holds; ValueError if that is no dict."""
    text = read_text(path)
    try:
        coco = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; export it again") from error
    if not isinstance(coco, dict):
        raise ValueError(f"{path} holds a {type(coco).__name__}, not a dict of COCO's form; export it again")
    return coco


def coco_categories(coco: Mapping[str, Any]) -> dict[int, str]:
    """Category id -> name."""
    if not {"images", "categories"} <= coco.keys():
        raise ValueError(
            f"the keys are {[f'{key:.60}' for key in sorted(map(str, coco))[:8]]}, not those of COCO's instances JSON:"
            " 'images', 'annotations' and 'categories'; convert the annotations to it"
        )
    classes: dict[int, str] = {}
    for category in coco_entries(coco, "categories"):
        number = category.get("id")
        if not is_index(number):
            raise ValueError(f"category id {number!r:.60} is not a whole number of at least 0; number the categories")
        if number in classes:
            raise ValueError(f"category id {number!r} is defined twice; remove one of the two definitions")
        classes[number] = str(category.get("name", number))
    return classes


def coco_entries(coco: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    """One of the three lists of a COCO dictionary; ValueError unless it is a list of dictionaries."""
    found = coco.get(key)
    found = [] if found is None else found
    if not isinstance(found, list | tuple):
        kind = type(found).__name__
        raise ValueError(f"{key!r} is a {kind}, not a list as in COCO's instances JSON; export it again")
    wrong = next((index for index, entry in enumerate(found) if not isinstance(entry, Mapping)), None)
    if wrong is not None:
        raise ValueError(f"entry {wrong} of {key!r} is {found[wrong]!r:.60}, not a dictionary; correct or remove it")
    return found


def _check_image(image: Mapping[str, Any]) -> None:
    name = image.get("file_name")
    if not isinstance(name, str | None):
        raise ValueError(f"image {image.get('id')!r:.60}: file_name {name!r:.60} is not a text; correct it")
    for side in ("width", "height"):
        given = to_builtin(image.get(side))
        if given is not None and not (are_numbers([given], 1) and given >= 0 and given == int(given)):
            raise ValueError(f"image {image.get('id')!r:.60}: {side} {given!r:.60} is no number of pixels; correct it")


def coco_records(coco: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The images of a COCO dictionary, each with its annotations."""
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for image in coco_entries(coco, "images"):
        number = image.get("id")
        _check_image(image)
        if number is None or not isinstance(number, Hashable) or number in by_image:
            raise ValueError(f"image id {number!r:.60} is missing or stands for two images; number the images")
        by_image[number] = []
    for annotation in coco_entries(coco, "annotations"):
        number = annotation.get("image_id")
        if not isinstance(number, Hashable) or number not in by_image:
            raise ValueError(
                f"annotation {annotation.get('id')!r:.60} belongs to image {number!r:.60}, which is none"
                f" of the {len(by_image)} images; add the image or remove the annotation"
            )
        by_image[annotation["image_id"]].append(annotation)
    for image in coco["images"]:
        given = {name: image[name] for name in ("file_name", "width", "height") if image.get(name) is not None}
        objects = [
            {field: annotation[field] for field in _FIELDS if annotation.get(field) is not None}
            for annotation in by_image[image["id"]]
        ]
        yield {"image_id": image["id"], **given, "annotations": objects}


def grouping_category_ids(cocos: Iterable[Mapping[str, Any]]) -> set[int]:
    """Ids of the categories that are listed only to group others, as Roboflow's exports do."""
    categories = [category for coco in cocos for category in coco_entries(coco, "categories")]
    groups = [category.get("supercategory") for category in categories]
    return {
        category["id"]
        for category in categories
        if category.get("supercategory") == "none" and category.get("name") in groups
    }


def find_image_folder(coco: Mapping[str, Any], folders: Sequence[Path]) -> Path:
    """The folder that has the first picture, or else the first folder."""
    name = next((image.get("file_name") for image in coco_entries(coco, "images")), None)
    name = name if isinstance(name, str) else ""
    return next((folder for folder in folders if os.path.isfile(folder / name)), folders[0])
