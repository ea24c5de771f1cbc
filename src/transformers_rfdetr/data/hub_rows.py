"""Read rows of the `datasets` library: a dataset on the Hub, a folder in its formats, or a dataset in memory.

A row has an image and its objects. A *split* is a `datasets.Dataset`, or an `IterableDataset`, which is streamed.
[`is_hub_source`] and [`load_rows`] recognise the format, [`read_hub_rows`] reads it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from ..model.image_io import open_image
from ..model.masks import has_segmentation
from ..model.validation import error_context
from .annotation_records import Record, describe_image
from .image_files import upright_size
from .label_maps import canonical_split_name, check_class_names, common_label_map, read_class_names, validate_classes
from .other_formats import recognise_file, refuse_other_formats

# The names that datasets on the Hub give to the columns of a row, and to the fields of its objects.
_COLUMN_ALIASES = {
    "image": ("image", "img", "picture"),
    "image_id": ("image_id", "id", "img_id"),
    "file_name": ("file_name",),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    "objects": ("objects", "annotations", "annotation", "instances"),
}
_FIELD_ALIASES = {
    "id": ("id", "bbox_id", "annotation_id"),
    "category_id": (
        *("category", "category_id", "categories", "category_ids", "label", "labels"),
        *("class", "classes", "class_id", "class_label"),
    ),
    "bbox": ("bbox", "bboxes", "box", "boxes"),
    "segmentation": ("segmentation", "segmentations", "segments", "polygons", "polygon", "rle", "mask", "masks"),
    "rle": ("rle",),  # of the objects without polygons
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd", "crowd"),
}
_BATCH_ROWS = 500  # converted from Arrow at a time
_FIRST_ROWS = 100  # whose boxes are compared with the sizes of their images
SUPPORTED_SOURCES = (
    "a dataset id on the Hub, a dataset of the `datasets` library or a folder that it reads, a COCO JSON or a dict"
    " {split: COCO JSON}, a folder with train/_annotations.coco.json or annotations/instances_*.json, a data.yaml or"
    " folder of YOLO, a file or folder of labelme, CVAT for images, VIA, Label Studio or Supervisely, or a folder of"
    " masks"
)


def is_hub_split(source: Any) -> bool:
    """Return whether it is a `Dataset` or an `IterableDataset` of the `datasets` library."""
    return hasattr(source, "features") and hasattr(source, "select_columns")


def is_hub_source(source: Any) -> bool:
    """Return whether it is a split, or a mapping of names to splits."""
    return is_hub_split(source) or (
        isinstance(source, Mapping) and len(source) > 0 and all(map(is_hub_split, source.values()))
    )


def is_streamed(split: Any) -> bool:
    """Return whether a split is an `IterableDataset`."""
    return not hasattr(split, "num_rows")


def import_datasets() -> Any:
    """Return the `datasets` library; raise ImportError with the command that installs it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Datasets of the Hub require the `datasets` library: pip install "transformers-rfdetr[train]".'
            " Annotation files are read without it."
        ) from error
    return datasets


def load_rows(source: Any, streaming: bool, arguments: Mapping[str, Any]) -> Any:
    """Load a Hub id or a folder with the `datasets` library.

    Returns:
        A split, or a mapping of names to splits.

    Raises:
        ValueError: the source is neither, or the library cannot load it.
    """
    name, path = str(source), Path(source).expanduser()
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    if path.is_file() and (found := recognise_file(path)):
        raise ValueError(found.error(path))
    if path.is_file() or not (path.is_dir() or is_hub_id):
        remark = "" if path.is_file() else ", which does not exist"
        raise ValueError(f"`source` must be {SUPPORTED_SOURCES}, got {name!r:.200}{remark}. Give one of these.")
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if path.is_dir() and not is_saved:
        refuse_other_formats(path, SUPPORTED_SOURCES)
    datasets = import_datasets()
    if is_saved:
        return datasets.load_from_disk(str(path))
    try:
        return datasets.load_dataset(str(path) if path.is_dir() else name, streaming=streaming, **arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"`source` {name!r:.200} cannot be loaded: {error}. Give {SUPPORTED_SOURCES}.") from error


def read_hub_rows(
    source: Any, class_names: Any = None
) -> tuple[dict[str, Any], dict[str, "RowReader"], dict[int, str]]:
    """Return the splits by name, the reader of each split's rows, and the classes of all splits.

    Args:
        source: A split, or a mapping of names to splits.
        class_names: None, or the classes, if the features of the splits do not name them.

    Raises:
        ValueError: columns are missing, or the splits' categories differ.
    """
    given = {str(getattr(source, "split", None) or "train"): source} if is_hub_split(source) else source
    splits = {canonical_split_name(name): split for name, split in given.items()}
    readers = {}
    for name, split in splits.items():
        with error_context(f"split {name!r}"):
            readers[name] = RowReader.from_split(split)
    classes = _read_classes(readers, splits, class_names)
    id_of_name = {name: category for category, name in classes.items()}
    for name, reader in readers.items():
        if reader.category_type == "string":
            readers[name] = reader._replace(id_of_name=id_of_name)
    return splits, readers, classes


def _read_classes(readers: Mapping[str, "RowReader"], splits: Mapping[str, Any], class_names: Any) -> dict[int, str]:
    """Return the classes of all splits: those that the features name, or `class_names`, or those found in the rows."""
    types = {name: reader.category_type for name, reader in readers.items()}
    if len(set(types.values())) > 1:
        raise ValueError(
            f"category columns must have one type in all splits, got {types}. Convert them with `cast_column`."
        )
    category_type = next(iter(types.values()))
    if category_type == "ClassLabel":
        classes = common_label_map({name: reader.classes for name, reader in readers.items()})
        check_class_names(class_names, classes)
        return classes
    if class_names is not None:
        return validate_classes(read_class_names(class_names))
    if any(map(is_streamed, splits.values())):
        raise ValueError(
            f"`class_names` must be given for a stream whose categories are of type {category_type}, not ClassLabel,"
            " got None. Give a list of names or a dict {id: name}."
        )
    found: set[Any] = set()
    for name, split in splits.items():
        for index, record in enumerate(ArrowRows(split, readers[name]).records(f"Classes of {name}")):
            ids = {annotation.get("category_id") for annotation in record["annotations"]}
            if None in ids:
                place = f"split {name!r}, {describe_image(record, index)}"
                raise ValueError(f"{place}: category must be a name or a number, got None. Give each object one.")
            found |= ids
    if category_type == "string":
        return validate_classes(dict(enumerate(sorted(found))))
    return validate_classes({category: str(category) for category in found})


class RowReader(NamedTuple):
    """Convert the rows of a split to records."""

    columns: dict[str, str]  # the split's name of each column in _COLUMN_ALIASES
    fields: dict[str, str]  # the split's name of each field in _FIELD_ALIASES
    category_type: str  # "ClassLabel", "string" or "number"
    classes: dict[int, str]  # of a ClassLabel
    id_of_name: Mapping[str, int] | None = None  # category ids of names, if the rows contain names

    @classmethod
    def from_split(cls, split: Any) -> "RowReader":
        """Return the reader for the features of a split.

        Raises:
            ValueError: the features lack the image, the objects or their categories.
        """
        features = split.features
        if features is None:  # a stream may not declare them
            features = import_datasets().Dataset.from_list([next(iter(split))]).features
        if {"images", "annotations"} <= features.keys():
            raise ValueError(
                "a row must contain one image and its objects, got the lists of a COCO JSON. Give the path of the JSON"
                " file, such as data/train.json."
            )
        columns = _find_names(features, _COLUMN_ALIASES, ("image", "objects"), "a row", "rename_column")
        objects = _list_element(features[columns["objects"]])
        if not isinstance(objects, Mapping):
            raise ValueError(
                f"column {columns['objects']!r} must contain a dict of lists or a list of dicts with category, bbox and"
                f" segmentation, got {objects!r:.80}. Convert it with `map`."
            )
        fields = _find_names(objects, _FIELD_ALIASES, ("category_id",), "an object", "map")
        category = objects[fields["category_id"]]
        while not hasattr(category, "names") and category is not _list_element(category):
            category = _list_element(category)
        names = getattr(category, "names", None)
        is_string = "string" in str(getattr(category, "dtype", ""))
        category_type = "ClassLabel" if names else "string" if is_string else "number"
        return cls(columns, fields, category_type, dict(enumerate(names or [])))

    def record(self, row: Mapping[str, Any]) -> Record:
        """Return the record of a row, whose image may be missing."""
        given = {name: row[column] for name, column in self.columns.items() if row.get(column) is not None}
        annotations = []
        for item in _transpose(given.pop("objects", [])):
            annotation = {name: item[field] for name, field in self.fields.items() if item.get(field) is not None}
            for name in ("segmentation", "rle"):
                value = annotation.get(name)
                if isinstance(value, Mapping) and None in value.values():  # Arrow's form of a missing RLE
                    del annotation[name]
            if (rle := annotation.pop("rle", None)) and not has_segmentation(annotation.get("segmentation")):
                annotation["segmentation"] = rle
            if self.id_of_name is not None:
                name = annotation.get("category_id")
                annotation["category_id"] = self.id_of_name.get(name, name)
            annotations.append(annotation)
        given.pop("image", None)
        return {**given, "annotations": annotations}

    def encoded_image(self, row: Mapping[str, Any]) -> Any:
        """Return the image of a row as a path, the bytes of a file or a PIL image, without decoding it."""
        value = row[self.columns["image"]]
        return (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value

    def image(self, row: Mapping[str, Any]) -> Any:
        """Return the image of a row as a path or a PIL image."""
        value = self.encoded_image(row)
        return open_image(BytesIO(value)) if isinstance(value, bytes) else value


def _list_element(feature: Any) -> Any:
    """Return the feature of a list's elements; a feature that is not a list is returned unchanged."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)


def _find_names(
    available: Mapping[str, Any], aliases: Mapping[str, Sequence[str]], required: Sequence[str], owner: str, method: str
) -> dict[str, str]:
    """Return the first available alias of each name."""
    found = {}
    for name, usual in aliases.items():
        alias = next((alias for alias in usual if alias in available), None)
        if alias is not None:
            found[name] = alias
        elif name in required:
            raise ValueError(
                f"{owner} must have one of {list(usual)}, got {sorted(available)}. Rename the column or field with"
                f" `{method}`."
            )
    return found


def _transpose(value: Any) -> Any:
    """Convert a dict of equally long lists to the list of dicts; a list is returned unchanged."""
    if not isinstance(value, Mapping):
        return value
    columns = {name: _transpose(column) for name, column in value.items() if column is not None}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists of the objects must be equally long, got {lengths}. Give each object one entry.")
    return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]


class ArrowRows:
    """Read the records and images of a `datasets.Dataset` on demand; a record decodes no image."""

    def __init__(self, split: Any, reader: RowReader) -> None:
        self.reader = reader
        image_column = reader.columns["image"]
        split = split.with_format(None)
        self._images = self._encoded_images = split.select_columns([image_column])
        self._annotations = split.select_columns([column for key, column in reader.columns.items() if key != "image"])
        if type(split.features[image_column]).__name__ == "Image":
            self._encoded_images = self._images.cast_column(image_column, import_datasets().Image(decode=False))

    def records(self, title: str) -> Iterator[Record]:
        """Yield all records, with a progress bar of this title."""
        batches = self._annotations.with_format("arrow").iter(_BATCH_ROWS)
        rows = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(logging.tqdm(rows, total=len(self._annotations), desc=title, delay=2)):
            with error_context(f"row {index}"):
                record = self.reader.record(row)
            yield record

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        return self.reader.record(self._annotations[index])

    def first_records(self) -> Iterator[Record]:
        """Yield the first records, with missing sizes from the headers of their images."""
        for index in range(min(_FIRST_ROWS, len(self._annotations))):
            record = self.record(index)
            if not (record.get("height") and record.get("width")):
                try:
                    record["height"], record["width"] = upright_size(self.encoded_image(index, record))
                except ValueError:  # raised again when the image is read
                    continue
            yield record

    def image(self, index: int, record: Record) -> Any:
        """Return the image at `index` as a path or a PIL image."""
        return self.reader.image(self._images[index])

    def encoded_image(self, index: int, record: Record) -> Any:
        """Return the image at `index` as a path, the bytes of a file or a PIL image, without decoding it."""
        return self.reader.encoded_image(self._encoded_images[index])
