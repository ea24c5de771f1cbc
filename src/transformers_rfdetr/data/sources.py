"""From the forms in which people keep annotated pictures, to data sets: COCO, YOLO and rows of the library datasets."""

import json
import os
import re
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from ..model.configuration_rf_detr import check_limit, error_context
from ..model.image_processing_rf_detr import is_index, open_image
from .dataset import (
    AnnotationIndex,
    InstanceDataset,
    InstanceDatasets,
    InstanceStream,
    PackedRecords,
    checked_classes,
    coco_categories,
    coco_records,
    entries,
    is_outside,
    one_label_map,
    place_of,
    shown_classes,
    upright_size,
)

# What data sets on the Hub call the columns of a row, and the fields of its objects.
_COLUMNS = {
    "image": ("image", "img", "picture"),
    "image_id": ("image_id", "id", "img_id"),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    "objects": ("objects", "annotations", "annotation", "instances"),
}
_FIELDS = {
    "id": ("id", "bbox_id", "annotation_id"),
    "category_id": (
        *("category", "category_id", "categories", "category_ids", "label", "labels"),
        *("class", "classes", "class_id", "class_label"),
    ),
    "bbox": ("bbox", "bboxes", "box", "boxes"),
    "segmentation": ("segmentation", "segmentations", "segments", "polygons", "polygon", "rle", "mask", "masks"),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd", "crowd"),
}
_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
_SCAN_ROWS = 500  # that are translated at a time
_FORMS = (
    "a data set id on the Hub, a data set of the library datasets, a folder that it reads, a COCO JSON or a mapping of"
    " splits to such files, a folder with train/_annotations.coco.json or annotations/instances_*.json, or a data.yaml"
    " of YOLO"
)


def load_instance_dataset(
    source: Any,
    *,
    image_folder: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    streaming: bool = False,
    **load_dataset_arguments: Any,
) -> InstanceDatasets:
    """Read annotated pictures in any of the usual forms, with one label map for all splits.

    Labels are 0 to N-1, in the order of the data's category ids; `print` the result for a table of them.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from transformers_rfdetr import load_instance_dataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset
        >>> folder = Path(tempfile.mkdtemp())
        >>> pictures, coco = draw_dataset(4)
        >>> for picture, image in zip(pictures, coco["images"]):
        ...     picture.save(folder / image["file_name"])
        >>> _ = (folder / "train.json").write_text(json.dumps(coco))
        >>> data = load_instance_dataset(folder / "train.json")
        >>> data["train"][3]["annotations"], data.id2label
        ([], {0: 'building'})

    Args:
        source: One of
            * the id of a data set on the Hub, a folder that `datasets.load_dataset` or `load_from_disk` reads, or a
              `Dataset`, `DatasetDict`, `IterableDataset` or `IterableDatasetDict`. A row has an image and `objects`, a
              dict of lists or a list of dicts with `category` (a ClassLabel, text or a number), `bbox` and
              `segmentation`, and possibly `id`, `area` and `iscrowd`; other usual names of these are understood;
            * a COCO JSON, or a mapping of splits to such files; or a folder with annotations/instances_<split>.json;
            * a folder with train/_annotations.coco.json, valid/ and test/, as Roboflow exports it. A class that is
              only the parent of others and has no objects gets no label;
            * a data.yaml of YOLO, or a folder with one. Label files hold polygons, or boxes: objects without a mask.
            "valid" and "val" become "validation".
        image_folder: The pictures of a COCO JSON; or a mapping of splits to folders. By default the folder of the JSON
            or `images` in it. Of YOLO, the folder that places are relative to; by default `path` of the data.yaml, as
            far as it lies in the folder of that. No file outside is read, whatever the data say.
        class_names: A list, or a mapping from category id, for data that number their classes without naming them;
            for classes that are texts it gives their order. Without it numbers are their own names, and texts are
            sorted.
        streaming: Whether rows are read from the Hub as they are needed. Then nothing is counted and the classes must
            have names in the data or here.
        **load_dataset_arguments: For `datasets.load_dataset`: `split`, `revision`, `data_files`, ...

    Raises:
        ValueError: what cannot be read; pictures that are not there or lie outside of their folder; categories that
            are not defined, or not the same in all splits.
        ImportError: the library datasets is needed and not installed.
    """
    is_mapping = isinstance(source, Mapping) and source
    if is_hub_split(source) or (is_mapping and all(map(is_hub_split, source.values()))):
        return _load_hub(source, class_names)
    if not is_mapping and not isinstance(source, str | os.PathLike):
        raise ValueError(f"{source!r:.200} is no source of data; give {_FORMS}")
    path = None if is_mapping else Path(source).expanduser()
    files = coco_files(source if path is None else path)
    yaml_file = None if files or path is None else yolo_file(path)
    if not files and yaml_file is None:
        return _load_hub(load_rows(source, streaming, load_dataset_arguments), class_names)
    if streaming or load_dataset_arguments:
        given = [*(["streaming"] if streaming else []), *load_dataset_arguments]
        raise ValueError(f"{given} are for rows that `datasets.load_dataset` reads, not for {source!s}; leave them out")
    return (
        _load_yolo(yaml_file, image_folder, class_names) if yaml_file else _load_coco(files, image_folder, class_names)
    )


def split_name(name: str) -> str:
    """What a split is called here: "val" is "validation"."""
    return _SPLITS.get(name, name)


def read_text(path: Path) -> str:
    """A text file; ValueError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # of Windows' programs, some of which put a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; give an existing text file") from error


def read_yaml(text: str, loader: Any, where: str) -> Any:
    """YAML without aliases, a few lines of which can stand for more than the memory holds."""
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, loader)):
            raise ValueError(f"{where} holds an alias (*name), which may stand for any amount of text; write it out")
        return yaml.load(text, loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}; correct it") from error


def _read_class_names(class_names: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    if isinstance(class_names, str):
        raise ValueError(f"class_names {class_names!r} is one text; give a list of names, or {{id: name}}")
    if not isinstance(class_names, Mapping | Sequence):
        raise ValueError(f"names of a {type(class_names).__name__} are none; give a list of names, or {{id: name}}")
    return dict(class_names) if isinstance(class_names, Mapping) else dict(enumerate(class_names))


def _refuse_other_names(classes: Mapping[int, str], class_names: Any) -> None:
    if class_names is not None and _read_class_names(class_names) != dict(classes):
        raise ValueError(
            f"class_names {class_names!r:.200} are not what the data call their classes, {shown_classes(classes)};"
            " leave class_names out"
        )


# COCO files


def coco_files(source: Path | Mapping[str, Any]) -> dict[str, tuple[Path, list[Path]]]:
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


def read_coco(path: Path) -> dict[str, Any]:
    """A COCO JSON, whatever it holds; ValueError if that is no dict."""
    text = read_text(path)
    try:
        coco = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; export it again") from error
    if not isinstance(coco, dict):
        raise ValueError(f"{path} holds a {type(coco).__name__}, not a dict of COCO's form; export it again")
    return coco


def _load_coco(files: Mapping[str, tuple[Path, list[Path]]], image_folder: Any, class_names: Any) -> InstanceDatasets:
    read, classes = {}, {}
    for split, (path, _) in files.items():
        read[split] = read_coco(path)
        with error_context(str(path)):
            classes[split] = coco_categories(read[split])
    used = {
        split: {
            annotation.get("category_id")
            for annotation in entries(coco, "annotations")
            if isinstance(annotation.get("category_id"), Hashable)
        }
        for split, coco in read.items()
    }
    for parent in parent_ids(read.values()) - set().union(*used.values()):
        for named in classes.values():
            named.pop(parent, None)
    for split, ids in used.items():  # before the splits are compared: the more precise message
        if ids - classes[split].keys():
            with error_context(str(files[split][0])):
                deque(AnnotationIndex(checked_classes(classes[split])).watch(coco_records(read[split])), maxlen=0)
    label_map = one_label_map(classes, used)
    _refuse_other_names(label_map, class_names)
    splits = {}
    for split, (path, folders) in files.items():
        coco = read.pop(split)
        given = image_folder.get(split) if isinstance(image_folder, Mapping) else image_folder
        with error_context(str(path)):
            folder = _picture_folder(coco, folders if given is None else [Path(given).expanduser()])
            splits[split] = InstanceDataset(coco, folder, label_map=label_map)
    return InstanceDatasets(splits)


def parent_ids(cocos: Iterable[Mapping[str, Any]]) -> set[int]:
    """Ids of the categories that are listed only to group others, as Roboflow's exports do."""
    categories = [category for coco in cocos for category in entries(coco, "categories")]
    groups = [category.get("supercategory") for category in categories]
    return {
        category["id"]
        for category in categories
        if category.get("supercategory") == "none" and category.get("name") in groups
    }


def _picture_folder(coco: Mapping[str, Any], folders: Sequence[Path]) -> Path:
    """The folder that has the first picture, or else the first folder."""
    name = next((image.get("file_name") for image in entries(coco, "images")), None)
    name = name if isinstance(name, str) else ""
    return next((folder for folder in folders if os.path.isfile(folder / name)), folders[0])


# YOLO


def yolo_file(path: Path) -> Path | None:
    """The data.yaml that a path is or has in it."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return path
    found = [path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (path / name).is_file()]
    return found[0] if found else None


def _load_yolo(path: Path, image_folder: Any, class_names: Any) -> InstanceDatasets:
    classes, root, places = read_yolo_description(path, image_folder, class_names)
    splits = {}
    with error_context(str(path)):
        for key, place in places.items():
            tally, pictures = AnnotationIndex(classes), yolo_images(root, place, key)
            if missing := [path for path in pictures if not path.is_file()]:
                shown, total = ", ".join(map(str, missing[:3])), len(pictures)
                raise ValueError(f"{key}: {len(missing)} of {total} pictures are not there: {shown}; correct {key!r}")
            records = _yolo_records(pictures, root, classes)
            splits[split_name(key)] = InstanceDataset.of_rows(tally, PackedRecords(tally.watch(records), root))
    return InstanceDatasets(splits)


def read_yolo_description(
    path: Path, image_folder: Any = None, class_names: Any = None
) -> tuple[dict[int, str], Path, dict[str, Any]]:
    """A data.yaml -> classes, the folder that places are relative to, and the places of each split."""
    import yaml  # transformers needs it

    description = read_yaml(read_text(path), yaml.SafeLoader, str(path))
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds no keys; give 'names' and 'train'")
    with error_context(str(path)):
        names = description.get("names")
        classes = checked_classes(_read_class_names(names or class_names or _numbered(description.get("nc"))))
        if names:
            _refuse_other_names(classes, class_names)
        root = _yolo_root(path, description, image_folder)
        places = {key: description[key] for key in ("train", "val", "valid", "test") if description.get(key)}
        if not places:
            raise ValueError(f"the keys are {list(description)}; give 'train', 'val' or 'test' with pictures")
    return classes, root, places


def _numbered(number: Any) -> list[str]:
    """The names 0, 1, ... of this many classes."""
    if number is not None and not is_index(number):
        raise ValueError(f"nc {type(number).__name__} is no number of classes; give 'names', or a whole number")
    check_limit("num_labels", number or 0)
    return [str(label) for label in range(number or 0)]


def _yolo_root(path: Path, description: Mapping[str, Any], image_folder: Any) -> Path:
    """The folder that the places in a data.yaml are relative to, and that nothing outside of is read."""
    if isinstance(image_folder, Mapping):
        raise ValueError(f"image_folder {image_folder!r:.80} is for COCO; give the folder that 'train' is relative to")
    if image_folder is not None:
        return Path(image_folder).expanduser()
    place = description.get("path")
    if not isinstance(place, str) or not (path.parent / place).is_dir():
        return path.parent
    if is_outside(path.parent, place):
        raise ValueError(
            f"path {place!r:.200} leads out of {path.parent}; move {path.name} there, or load it with image_folder"
        )
    return path.parent / place


def yolo_images(root: Path, places: Any, key: str) -> list[Path]:
    """What a data.yaml says of one split -> its pictures, in the order of their names or of the list."""
    found: list[Path] = []
    for place in places if isinstance(places, list) else [places]:
        if not isinstance(place, str):
            raise ValueError(f"{key}: a {type(place).__name__} is no folder or list of pictures; correct {key!r}")
        # Roboflow's exports say ../train/images where train/images is meant.
        options = [root / place, root / place.removeprefix("../")]
        path = next((option for option in options if option.exists() and not is_outside(root, option.absolute())), None)
        if path is None and options[0].exists():
            raise ValueError(f"{key}: {place!r:.200} leads out of {root}; if it is right, give a folder above both")
        if path is None:
            raise ValueError(f"{key}: {options[0]} is not there; correct {key!r}, or 'path', which is {root}")
        if path.is_dir():
            found += sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
        else:
            lines = (line.strip() for line in read_text(path).splitlines())
            found += [path.parent / line for line in lines if line]
    if not found:
        raise ValueError(f"{key}: there are no pictures in {places!r} of {root}; correct {key!r}")
    if outside := [path for path in found if is_outside(root, path.absolute())]:
        shown = ", ".join(map(str, outside[:3]))
        raise ValueError(
            f"{key}: {len(outside)} of {len(found)} pictures lie outside of {root}: {shown}; correct {key!r}"
        )
    return found


def _yolo_records(pictures: Sequence[Path], root: Path, classes: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    for number, path in enumerate(pictures):
        size = upright_size(path)
        annotations = []
        labels = yolo_label_file(path, root)
        lines = read_text(labels).splitlines() if labels.is_file() else []
        for line_number, line in enumerate(lines, start=1):
            if line.strip():
                with error_context(f"{labels}, line {line_number}"):
                    annotations.append(read_yolo_line(line.split(), size, classes))
        name = os.path.relpath(path, root) if path.is_relative_to(root) else str(path)
        head = {"image_id": number, "file_name": name, "width": size[1], "height": size[0]}
        yield {**head, "annotations": annotations}


def yolo_label_file(picture: Path, root: Path) -> Path:
    """.../images/a/1.jpg -> .../labels/a/1.txt; beside the picture where no folder in `root` is called images."""
    parts = list(picture.parts)
    first = len(root.parts) if picture.is_relative_to(root) else 0
    folders = [i for i, part in enumerate(parts) if part == "images" and i >= first]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_yolo_line(words: Sequence[str], size: tuple[int, int], classes: Mapping[int, str]) -> dict[str, Any]:
    """`class x0 y0 x1 y1 x2 y2 ...` or `class cx cy w h`, in fractions of the picture -> an annotation in pixels."""
    rule = "a line is 'class x0 y0 x1 y1 x2 y2 ...', three points or more, or 'class cx cy w h'"
    try:
        category, values = int(words[0].removesuffix(".0")), np.array(words[1:], np.float64)
    except ValueError as error:
        raise ValueError(f"{' '.join(words)!r:.80} does not hold numbers; {rule}") from error
    if category not in classes:
        raise ValueError(f"class {category} is none of {shown_classes(classes)}; add its name, or correct the line")
    if len(values) % 2 or len(values) < 4:
        raise ValueError(f"{len(values)} numbers follow the class; {rule}")
    if not ((values > -0.01) & (values < 1.01)).all():
        raise ValueError(
            f"{values[(values <= -0.01) | (values >= 1.01) | np.isnan(values)][0]:g} lies outside [0, 1];"
            " coordinates are fractions of the picture's width and height: divide by them"
        )
    pixels = (values.reshape(-1, 2) * size[::-1]).ravel().round(3).tolist()
    if len(pixels) > 4:
        return {"category_id": category, "segmentation": [pixels]}
    center_x, center_y, width, height = pixels
    return {"category_id": category, "bbox": [center_x - width / 2, center_y - height / 2, width, height]}


# Rows of the library datasets


def is_hub_split(source: Any) -> bool:
    """Whether it is a Dataset or an IterableDataset."""
    return hasattr(source, "features") and hasattr(source, "select_columns")


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'rows of the Hub need the library datasets: pip install "transformers-rfdetr[train]"; COCO and YOLO files'
            " are read without it"
        ) from error
    return datasets


def load_rows(source: Any, streaming: bool, arguments: Mapping[str, Any]) -> Any:
    """A Hub id or a folder -> one split, or a mapping of them."""
    name, path = str(source), Path(source).expanduser()
    if path.is_file():
        raise ValueError(f"{name} is a file, and no COCO JSON or data.yaml; give {_FORMS}")
    if not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{name!r} is neither a folder nor a data set id; give {_FORMS}")
    datasets = _import_datasets()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    try:
        return datasets.load_dataset(str(path) if path.is_dir() else name, streaming=streaming, **arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name!r} cannot be loaded: {error}; give {_FORMS}") from error


def _load_hub(source: Any, class_names: Any) -> InstanceDatasets:
    """A Dataset or IterableDataset, or a mapping of splits to them."""
    read, readers, classes = read_hub(source, class_names)
    result: dict[str, InstanceDataset | InstanceStream] = {}
    for name, split in read.items():
        reader = readers[name]
        if not hasattr(split, "num_rows"):  # a stream
            needed = split.with_format(None).select_columns([*reader.columns.values()])
            result[name] = InstanceStream(needed, reader, classes)
            continue
        tally, rows = AnnotationIndex(classes), ArrowRows(split, reader)
        with error_context(f"split {name!r}"):
            deque(tally.watch(rows.scan(f"Annotations of {name}")), maxlen=0)
        result[name] = InstanceDataset.of_rows(tally, rows)
    return InstanceDatasets(result)


def read_hub(source: Any, class_names: Any = None) -> tuple[dict[str, Any], dict[str, "RowReader"], dict[int, str]]:
    """A Dataset or IterableDataset, or a mapping to them -> splits, how their rows are read, and the classes of all."""
    given = {str(getattr(source, "split", None) or "train"): source} if is_hub_split(source) else source
    splits = {split_name(name): split for name, split in given.items()}
    readers = {}
    for name, split in splits.items():
        with error_context(f"split {name!r}"):
            readers[name] = RowReader.of(split)
    classes = _hub_classes(readers, splits, class_names)
    ids = {text: category for category, text in classes.items()}
    for name, reader in readers.items():
        if reader.category_kind == "string":
            readers[name] = reader._replace(id_of=ids)
    return splits, readers, classes


def _hub_classes(readers: Mapping[str, "RowReader"], splits: Mapping[str, Any], class_names: Any) -> dict[int, str]:
    """The classes of all splits: those that the features name, or `class_names`, or what the rows hold."""
    kinds = {reader.category_kind for reader in readers.values()}
    if len(kinds) > 1:
        shown = {name: reader.category_kind for name, reader in readers.items()}
        raise ValueError(f"categories are {shown}; give them one type in all splits, with `cast_column`")
    if kinds == {"names"}:
        classes = one_label_map({name: reader.classes for name, reader in readers.items()})
        _refuse_other_names(classes, class_names)
        return classes
    if class_names is not None:
        return checked_classes(_read_class_names(class_names))
    if not all(hasattr(split, "num_rows") for split in splits.values()):  # streams
        raise ValueError(
            "the data do not name their classes, and a stream cannot be searched for them; give class_names, a list"
            " of names or {id: name}"
        )
    found: set[Any] = set()
    for name, split in splits.items():
        for index, record in enumerate(ArrowRows(split, readers[name]).scan(f"Classes of {name}")):
            ids = {annotation.get("category_id") for annotation in record["annotations"]}
            if None in ids:
                raise ValueError(f"split {name!r}, {place_of(record, index)}: an object has no category; give it one")
            found |= ids
    if kinds == {"string"}:
        return checked_classes(dict(enumerate(sorted(found))))
    return checked_classes({category: str(category) for category in found})


class RowReader(NamedTuple):
    """How the rows of a data set become records."""

    columns: dict[str, str]  # our name -> theirs
    fields: dict[str, str]  # the same of an object
    category_kind: str  # "names" (of a ClassLabel), "string" or "number"
    classes: dict[int, str]  # of a ClassLabel
    id_of: Mapping[str, int] | None = None  # category id of a text

    @classmethod
    def of(cls, split: Any) -> "RowReader":
        """The reader for a Dataset or IterableDataset."""
        features = split.features
        if features is None:  # of a stream that declares none
            features = _import_datasets().Dataset.from_list([next(iter(split))]).features
        if {"images", "annotations"} <= features.keys():
            raise ValueError("these rows are the lists of a COCO JSON; give that file itself, as in data/train.json")
        columns = _find(features, _COLUMNS, ("image", "objects"), "row", "rename_column")
        objects = _element(features[columns["objects"]])
        if not isinstance(objects, Mapping):
            raise ValueError(
                f"column {columns['objects']!r} holds {objects!r:.80}, not objects; give a dict of lists or a list of"
                " dicts, with category, bbox and segmentation"
            )
        fields = _find(objects, _FIELDS, ("category_id",), "object", "map")
        category = objects[fields["category_id"]]
        while not hasattr(category, "names") and category is not _element(category):
            category = _element(category)
        names = getattr(category, "names", None)
        is_text = "string" in str(getattr(category, "dtype", ""))
        kind = "names" if names else "string" if is_text else "number"
        return cls(columns, fields, kind, dict(enumerate(names or [])))

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row without its image -> a record."""
        given = {name: row[theirs] for name, theirs in self.columns.items() if row.get(theirs) is not None}
        annotations = []
        for item in _transposed(given.pop("objects", [])):
            annotation = {name: item[theirs] for name, theirs in self.fields.items() if item.get(theirs) is not None}
            shape = annotation.get("segmentation")
            if isinstance(shape, Mapping) and None in shape.values():  # what Arrow makes of a missing RLE
                del annotation["segmentation"]
            if self.id_of is not None:
                text = annotation.get("category_id")
                annotation["category_id"] = self.id_of.get(text, text)
            annotations.append(annotation)
        given.pop("image", None)
        return {**given, "annotations": annotations}

    def encoded(self, row: Mapping[str, Any]) -> Any:
        """The picture of a row, as a path, the bytes of a file or a PIL picture."""
        value = row[self.columns["image"]]
        return (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value

    def picture(self, row: Mapping[str, Any]) -> Any:
        """The picture of a row, as a path or a PIL picture."""
        value = self.encoded(row)
        return open_image(BytesIO(value)) if isinstance(value, bytes) else value


def _element(feature: Any) -> Any:
    """What a list of `datasets.Features` is a list of; anything else as it is."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def _find(
    available: Mapping[str, Any], usual: Mapping[str, Sequence[str]], required: Sequence[str], what: str, remedy: str
) -> dict[str, str]:
    """Our names -> what they are called among the available ones."""
    found = {}
    for name, aliases in usual.items():
        called = next((alias for alias in aliases if alias in available), None)
        if called is not None:
            found[name] = called
        elif name in required:
            raise ValueError(
                f"a {what} has {sorted(available)} and none of {list(aliases)}; name it so, with `{remedy}`"
            )
    return found


def _transposed(value: Any) -> Any:
    """A dict of equally long lists -> the list of dicts; what is a list already stays."""
    if not isinstance(value, Mapping):
        return value
    columns = {name: _transposed(column) for name, column in value.items() if column is not None}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of the objects have the lengths {lengths}; give each object one entry in each")
    return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]


class ArrowRows:
    """Records that are translated from Arrow when they are read; no picture is decoded for them."""

    def __init__(self, split: Any, reader: RowReader) -> None:
        self.reader = reader
        image = reader.columns["image"]
        split = split.with_format(None)
        self.pictures = split.select_columns([image])
        self.annotations = split.select_columns([name for key, name in reader.columns.items() if key != "image"])
        self.files = self.pictures
        if type(split.features[image]).__name__ == "Image":
            self.files = self.pictures.cast_column(image, _import_datasets().Image(decode=False))

    def scan(self, title: str) -> Iterator[dict[str, Any]]:
        """All records, one after the other."""
        batches = self.annotations.with_format("arrow").iter(_SCAN_ROWS)
        rows = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(logging.tqdm(rows, total=len(self.annotations), desc=title, delay=2)):
            with error_context(f"row {index}"):
                record = self.reader.record(row)
            yield record

    def record(self, index: int) -> dict[str, Any]:
        """Record number `index`."""
        return self.reader.record(self.annotations[index])

    def picture(self, index: int, record: Mapping[str, Any]) -> Any:
        """The picture of the record, as a path or a PIL picture."""
        return self.reader.picture(self.pictures[index])

    def encoded(self, index: int, record: Mapping[str, Any]) -> Any:
        """The picture of the record, as a path, the bytes of a file or a PIL picture."""
        return self.reader.encoded(self.files[index])
