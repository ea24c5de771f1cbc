"""Read COCO instances JSON: https://cocodataset.org/#format-data.

[`find_coco_files`] recognises the format, [`read_coco_splits`] reads it. The other functions read one COCO dict, which
has the lists `images`, `annotations` and `categories`.
"""

import os
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from transformers.utils import logging

from ..model.validation import are_numbers, error_context, is_index, to_builtin
from .annotation_records import AnnotatedSplit, Record, check_annotations, describe_image
from .image_folder import ImageFolder
from .label_maps import (
    canonical_split_name,
    category_id_shift,
    check_class_names,
    common_label_map,
    describe_classes,
    validate_classes,
)
from .text_files import read_json_object

logger = logging.get_logger(__name__)

_KNOWN_SPLITS = ("train", "validation", "test")
_MAX_OTHER_FILES = 20  # a folder with more JSONs has one for each image, in another format
_NUM_TRIED_IMAGES = 50  # whose files are looked for to choose their folder
_NO_PARENT = ("", "none", "null")  # what tools write as the supercategory of a category without a parent
_ANNOTATION_FIELDS = ("id", "category_id", "bbox", "segmentation", "area", "iscrowd")


class CocoFile(NamedTuple):
    """A COCO JSON, and the folders that its images may be in."""

    path: Path
    image_folders: list[Path]


def find_coco_files(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, CocoFile]:
    """Return the COCO JSON of each split; empty if the source is not in a layout of COCO or Roboflow.

    Args:
        source: A COCO JSON; a mapping from splits to COCO JSONs; a folder with `train/_annotations.coco.json`, as
            Roboflow exports it; or a folder with `annotations/instances_train2017.json`, as COCO publishes it.
    """
    if isinstance(source, Mapping):
        return _by_split([(canonical_split_name(str(name)), Path(path).expanduser()) for name, path in source.items()])
    source = Path(source).expanduser()
    if source.suffix.lower() == ".json":
        return _by_split([("train", source)])
    for pattern in ("*/_annotations.coco.json", "_annotations.coco.json", "annotations/instances_*.json"):
        if paths := sorted(path for path in source.glob(pattern) if path.is_file()):
            return _by_split(_name_splits(source, paths), source)
    return {}


def find_other_coco_files(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, CocoFile]:
    """Return the COCO JSONs that lie in a folder under any other name; they are recognised by their keys."""
    if isinstance(source, Mapping):
        return {}
    source = Path(source).expanduser()
    paths = [path for pattern in ("*.json", "*/*.json") for path in sorted(source.glob(pattern)) if path.is_file()]
    if len(paths) > _MAX_OTHER_FILES:
        return {}
    paths = [path for path in paths if all(key in path.read_bytes() for key in (b'"images"', b'"categories"'))]
    files = _by_split(_name_splits(source, paths), source)
    if files:
        listed = ", ".join(f"{name!r} from {file.path}" for name, file in files.items())
        logger.warning(f"Reading the COCO JSONs that were found in {source}: {listed}.")
    return files


def _name_splits(source: Path, paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name the split of each COCO JSON by its folder, or else by its file; a single unknown name means "train"."""
    named = []
    for path in paths:
        folder = "" if path.parent == source else path.parent.name
        name = folder if path.name == "_annotations.coco.json" else path.stem.removeprefix("instances_")
        words = map(canonical_split_name, re.split(r"[\W_\d]+", f"{folder} {name}"))
        named.append((next((word for word in words if word in _KNOWN_SPLITS), name), path))
    unknown = [name for name, _ in named if name not in _KNOWN_SPLITS]
    if len(unknown) == 1 and "train" not in dict(named):
        named = [("train" if name == unknown[0] else name, path) for name, path in named]
    return sorted(named, key=lambda pair: (*_KNOWN_SPLITS, pair[0]).index(pair[0]))


def _by_split(named: Sequence[tuple[str, Path]], source: Path | None = None) -> dict[str, CocoFile]:
    """Return the COCO JSON of each split, with the folders of the usual layouts that its images may be in."""
    files: dict[str, CocoFile] = {}
    for name, path in named:
        if name in files:
            raise ValueError(
                f"each split must have one COCO JSON, got {files[name].path} and {path} for {name!r}. Give a dict"
                " {split: COCO JSON}."
            )
        folders = [path.parent, path.parent / "images"]
        if source is not None and path.parent != source:
            stem = path.stem.removeprefix("instances_")  # such as train2017
            folders += [source / stem, source / "images" / stem, source / "images", source]
        files[name] = CocoFile(path, folders)
    return files


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
    for parent in parent_category_ids(cocos.values(), set().union(*used.values())):
        for defined in classes.values():
            defined.pop(parent, None)
    for split, ids in used.items():  # name image and annotation, which `common_label_map` cannot
        if ids - classes[split].keys():
            with error_context(str(files[split].path)):
                defined = validate_classes(classes[split])
                _check_shift(defined, ids)
                for index, record in enumerate(coco_records(cocos[split])):
                    with error_context(describe_image(record, index)):
                        check_annotations(record["annotations"], defined)
    label_map = common_label_map(classes, used)
    check_class_names(class_names, label_map)
    splits = {}
    for split, folders in candidate_folders(files, image_folder).items():
        coco = cocos.pop(split)
        folder = choose_image_folder(folders, coco_entries(coco, "images"))
        splits[split] = AnnotatedSplit(str(files[split].path), label_map, coco_records(coco), folder)
    return splits


def _check_shift(classes: Mapping[int, str], used: Collection[Any]) -> None:
    if shift := category_id_shift(classes, used):
        raise ValueError(
            f"`category_id` must be one of {describe_classes(classes)}, got {sorted(used)[:12]}, as if the annotations"
            f" counted from {min(classes) + shift}. Add {-shift} to each `category_id`, or define the missing category."
        )


def candidate_folders(files: Mapping[str, CocoFile], image_folder: Any) -> dict[str, list[Path]]:
    """Return the folders that the images of each split may be in.

    Raises:
        ValueError: `image_folder` names a split that does not exist.
    """
    if not isinstance(image_folder, Mapping):
        image_folder = {} if image_folder is None else dict.fromkeys(files, image_folder)
    given = {canonical_split_name(str(name)): [Path(folder).expanduser()] for name, folder in image_folder.items()}
    if unknown := given.keys() - files.keys():
        raise ValueError(f"`image_folder` must name splits of {list(files)}, got {sorted(unknown)}. Rename them.")
    return {split: given.get(split, file.image_folders) for split, file in files.items()}


def choose_image_folder(folders: Sequence[Path], images: Sequence[Any]) -> Path:
    """Return the folder that contains the most of the first images; the first one if none contains any."""
    names = [image_name(image) for image in images[:_NUM_TRIED_IMAGES] if isinstance(image, Mapping)]
    tried = [ImageFolder(folder) for folder in folders]
    best = max(tried, key=lambda folder: sum(map(folder.contains, names)))
    if not any(map(best.contains, names)):
        best = max(tried, key=lambda folder: sum(folder.find(name) is not None for name in names))
    return best.folder


def image_name(image: Mapping[str, Any]) -> Any:
    """Return the file name of an entry of `images`; without one, as in LVIS, the path of its `coco_url`."""
    name, url = image.get("file_name"), image.get("coco_url")
    if name is None and isinstance(url, str):
        return unquote(urlsplit(url).path).lstrip("/")
    return name


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
        classes[category_id] = category_name(category)
    return classes


def category_name(category: Mapping[str, Any]) -> str:
    """Return the name of a category; without a name, its id."""
    return str(category["id"] if category.get("name") is None else category["name"])


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
        given = {"file_name": image_name(image), "width": image.get("width"), "height": image.get("height")}
        fields = {name: value for name, value in given.items() if value is not None}
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


def parent_category_ids(cocos: Iterable[Mapping[str, Any]], used: Collection[Any]) -> set[int]:
    """Return the ids of the categories that only group others, which the exports of Roboflow contain.

    The rule is rfdetr's: another category names them as its supercategory, and no annotation has them (`used`). If this
    holds for all categories, none only groups others.
    """
    categories = [category for coco in cocos for category in coco_entries(coco, "categories")]
    parents = {
        category["supercategory"]
        for category in categories
        if isinstance(category.get("supercategory"), str)
        and category["supercategory"] not in (*_NO_PARENT, category.get("name"))
    }
    grouping = {category["id"] for category in categories if str(category.get("name")) in parents} - set(used)
    return set() if len(grouping) == len({category["id"] for category in categories}) else grouping
