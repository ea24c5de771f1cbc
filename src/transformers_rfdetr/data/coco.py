"""Read COCO instances JSON: https://cocodataset.org/#format-data.

[`find_coco_files`] recognises the format, [`read_coco_splits`] reads it. The other functions read one COCO dict, which
has the lists `images`, `annotations` and `categories`.
"""

import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..model.validation import are_numbers, error_context, is_index, to_builtin
from .annotation_records import AnnotatedSplit, Record, check_annotations, describe_image
from .label_maps import canonical_split_name, check_class_names, common_label_map, validate_classes
from .text_files import read_json_object

_ANNOTATION_FIELDS = ("id", "category_id", "bbox", "segmentation", "area", "iscrowd")


class CocoFile(NamedTuple):
    """A COCO JSON, and the folders that its images may be in."""

    path: Path
    image_folders: list[Path]


def find_coco_files(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, CocoFile]:
    """Return the COCO JSON of each split; empty if the source is not in COCO format.

    Args:
        source: A COCO JSON; a mapping from splits to COCO JSONs; a folder with `train/_annotations.coco.json`, as
            Roboflow exports it; or a folder with `annotations/instances_train2017.json`, as COCO publishes it.
    """
    if isinstance(source, Mapping):
        paths = {canonical_split_name(split): Path(path).expanduser() for split, path in source.items()}
        return {split: CocoFile(path, [path.parent, path.parent / "images"]) for split, path in paths.items()}
    source = Path(source).expanduser()
    if source.suffix.lower() == ".json":
        return {"train": CocoFile(source, [source.parent, source.parent / "images"])}
    exported = [source / split / "_annotations.coco.json" for split in ("train", "valid", "test")]
    if files := {
        canonical_split_name(path.parent.name): CocoFile(path, [path.parent]) for path in exported if path.is_file()
    }:
        return files
    if (source / "_annotations.coco.json").is_file():
        return {"train": CocoFile(source / "_annotations.coco.json", [source])}
    official = {}
    for path in sorted(source.glob("annotations/instances_*.json")):
        name = path.stem.removeprefix("instances_")  # such as train2017
        folders = [source / name, source / "images" / name, source / "images"]
        official[canonical_split_name(re.sub(r"\d+$", "", name))] = CocoFile(path, folders)
    return {split: official[split] for split in sorted(official, key=lambda split: (split != "train", split))}


def read_coco_splits(files: Mapping[str, CocoFile], image_folder: Any, class_names: Any) -> dict[str, AnnotatedSplit]:
    """Read the COCO JSON of each split.

    Args:
        files: What [`find_coco_files`] returned.
        image_folder: The folder of the images, or a mapping to it from splits; by default the first of the file's
            `image_folders` that contains them.
        class_names: None, or the classes that the files must define.

    Raises:
        ValueError: a file is not a COCO JSON, or the splits' categories differ.
    """
    cocos, classes = {}, {}
    used: dict[str, set[Any]] = {}
    for split, (path, _) in files.items():
        coco = cocos[split] = read_json_object(path)
        with error_context(str(path)):
            classes[split] = coco_categories(coco)
            categories = [annotation.get("category_id") for annotation in coco_entries(coco, "annotations")]
        used[split] = {category for category in categories if isinstance(category, Hashable)}
    for parent in parent_category_ids(cocos.values()) - set().union(*used.values()):
        for defined in classes.values():
            defined.pop(parent, None)
    for split, ids in used.items():  # name image and annotation, which `common_label_map` cannot
        if ids - classes[split].keys():
            with error_context(str(files[split].path)):
                defined = validate_classes(classes[split])
                for index, record in enumerate(coco_records(cocos[split])):
                    with error_context(describe_image(record, index)):
                        check_annotations(record["annotations"], defined)
    label_map = common_label_map(classes, used)
    check_class_names(class_names, label_map)
    splits = {}
    for split, (path, folders) in files.items():
        given = image_folder.get(split) if isinstance(image_folder, Mapping) else image_folder
        folders = folders if given is None else [Path(given).expanduser()]
        with error_context(str(path)):
            folder = _find_image_folder(cocos[split], folders)
        splits[split] = AnnotatedSplit(str(path), label_map, coco_records(cocos.pop(split)), folder)
    return splits


def coco_categories(coco: Mapping[str, Any]) -> dict[int, str]:
    """Return the name of each category id.

    Raises:
        ValueError: the dict is not a COCO dict, or a category id is invalid or defined twice.
    """
    if not {"images", "categories"} <= coco.keys():
        keys = [f"{key:.60}" for key in sorted(map(str, coco))[:8]]
        raise ValueError(
            "COCO instances JSON must have the keys 'images', 'annotations' and 'categories', got"
            f" {keys}. Convert the annotations to it."
        )
    classes: dict[int, str] = {}
    for category in coco_entries(coco, "categories"):
        category_id = category.get("id")
        if not is_index(category_id):
            raise ValueError(f"category id must be an integer >= 0, got {category_id!r:.60}. Number the categories.")
        if category_id in classes:
            raise ValueError(f"category ids must be unique, got {category_id!r} twice. Remove one of the definitions.")
        classes[category_id] = str(category.get("name", category_id))
    return classes


def coco_entries(coco: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    """Return one of the three lists of a COCO dict; empty if it is missing.

    Raises:
        ValueError: it is not a list of dicts.
    """
    entries = coco.get(key)
    entries = [] if entries is None else entries
    if not isinstance(entries, list | tuple):
        raise ValueError(f"{key!r} must be a list of dicts, got {type(entries).__name__}. Export the file again.")
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{key!r}[{index}] must be a dict, got {entry!r:.60}. Correct or remove it.")
    return entries


def coco_records(coco: Mapping[str, Any]) -> Iterator[Record]:
    """Yield the record of each image of a COCO dict.

    Raises:
        ValueError: an image is invalid, image ids are missing or not unique, or an annotation belongs to no image.
    """
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for image in coco_entries(coco, "images"):
        image_id = image.get("id")
        _check_image(image)
        if image_id is None or not isinstance(image_id, Hashable) or image_id in by_image:
            raise ValueError(f"image ids must be present and unique, got {image_id!r:.60}. Renumber the images.")
        by_image[image_id] = []
    for annotation in coco_entries(coco, "annotations"):
        image_id = annotation.get("image_id")
        if not isinstance(image_id, Hashable) or image_id not in by_image:
            raise ValueError(
                f"annotation {annotation.get('id')!r:.60}: `image_id` must be the id of one of the {len(by_image)}"
                f" images, got {image_id!r:.60}. Add the image or remove the annotation."
            )
        by_image[image_id].append(annotation)
    for image in coco["images"]:
        fields = {name: image[name] for name in ("file_name", "width", "height") if image.get(name) is not None}
        annotations = [
            {field: annotation[field] for field in _ANNOTATION_FIELDS if annotation.get(field) is not None}
            for annotation in by_image[image["id"]]
        ]
        yield {"image_id": image["id"], **fields, "annotations": annotations}


def _check_image(image: Mapping[str, Any]) -> None:
    with error_context(f"image {image.get('id')!r:.60}"):
        name = image.get("file_name")
        if not isinstance(name, str | None):
            raise ValueError(f"`file_name` must be a string, got {name!r:.60}. Correct it.")
        for side in ("width", "height"):
            value = to_builtin(image.get(side))
            if value is not None and not (are_numbers([value], 1) and value >= 0 and value == int(value)):
                raise ValueError(f"`{side}` must be a whole number of pixels, got {value!r:.60}. Correct it.")


def parent_category_ids(cocos: Iterable[Mapping[str, Any]]) -> set[int]:
    """Return the ids of the categories that only group others, which the exports of Roboflow contain."""
    categories = [category for coco in cocos for category in coco_entries(coco, "categories")]
    groups = [category.get("supercategory") for category in categories]
    return {
        category["id"]
        for category in categories
        if category.get("supercategory") == "none" and category.get("name") in groups
    }


def _find_image_folder(coco: Mapping[str, Any], folders: Sequence[Path]) -> Path:
    """Return the first folder that contains the first image, or else the first folder."""
    name = next((image.get("file_name") for image in coco_entries(coco, "images")), None)
    name = name if isinstance(name, str) else ""
    return next((folder for folder in folders if os.path.isfile(folder / name)), folders[0])
