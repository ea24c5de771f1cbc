"""Read rows of the datasets library."""

import re
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from ..model.image_io import open_image
from ..model.validation import error_context
from .annotation_records import describe_image
from .label_maps import check_class_names, common_label_map, read_class_names, split_name, validate_classes

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
_SCAN_ROWS = 500  # that are translated at a time
SUPPORTED_SOURCES = (
    "a data set id on the Hub, a data set of the library datasets, a folder that it reads, a COCO JSON or a mapping of"
    " splits to such files, a folder with train/_annotations.coco.json or annotations/instances_*.json, or a data.yaml"
    " of YOLO"
)


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
        raise ValueError(f"{name} is a file, and no COCO JSON or data.yaml; give {SUPPORTED_SOURCES}")
    if not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"{name!r} is neither a folder nor a data set id; give {SUPPORTED_SOURCES}")
    datasets = _import_datasets()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    try:
        return datasets.load_dataset(str(path) if path.is_dir() else name, streaming=streaming, **arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name!r} cannot be loaded: {error}; give {SUPPORTED_SOURCES}") from error


def read_hub_rows(
    source: Any, class_names: Any = None
) -> tuple[dict[str, Any], dict[str, "RowReader"], dict[int, str]]:
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
        classes = common_label_map({name: reader.classes for name, reader in readers.items()})
        check_class_names(classes, class_names)
        return classes
    if class_names is not None:
        return validate_classes(read_class_names(class_names))
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
                raise ValueError(
                    f"split {name!r}, {describe_image(record, index)}: an object has no category; give it one"
                )
            found |= ids
    if kinds == {"string"}:
        return validate_classes(dict(enumerate(sorted(found))))
    return validate_classes({category: str(category) for category in found})


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
    return [dict(zip(columns, coco_entries, strict=True)) for coco_entries in zip(*columns.values(), strict=True)]


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
