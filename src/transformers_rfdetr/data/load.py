"""Load a dataset in any of the supported annotation formats."""

import os
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.validation import error_context
from .annotation_records import AnnotationIndex, PackedRecords
from .coco import (
    coco_categories,
    coco_entries,
    coco_records,
    find_coco_files,
    find_image_folder,
    grouping_category_ids,
    read_coco_file,
)
from .dataset import InstanceDataset, InstanceDatasets
from .hub_rows import SUPPORTED_SOURCES, ArrowRows, is_hub_split, load_rows, read_hub_rows
from .label_maps import check_class_names, common_label_map, split_name, validate_classes
from .streams import InstanceStream
from .yolo import find_yolo_file, list_yolo_images, read_data_yaml, yolo_records


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
        raise ValueError(f"{source!r:.200} is no source of data; give {SUPPORTED_SOURCES}")
    path = None if is_mapping else Path(source).expanduser()
    files = find_coco_files(source if path is None else path)
    yaml_file = None if files or path is None else find_yolo_file(path)
    if not files and yaml_file is None:
        return _load_hub(load_rows(source, streaming, load_dataset_arguments), class_names)
    if streaming or load_dataset_arguments:
        given = [*(["streaming"] if streaming else []), *load_dataset_arguments]
        raise ValueError(f"{given} are for rows that `datasets.load_dataset` reads, not for {source!s}; leave them out")
    return (
        _load_yolo(yaml_file, image_folder, class_names) if yaml_file else _load_coco(files, image_folder, class_names)
    )


def _load_coco(files: Mapping[str, tuple[Path, list[Path]]], image_folder: Any, class_names: Any) -> InstanceDatasets:
    read, classes = {}, {}
    for split, (path, _) in files.items():
        read[split] = read_coco_file(path)
        with error_context(str(path)):
            classes[split] = coco_categories(read[split])
    used = {
        split: {
            annotation.get("category_id")
            for annotation in coco_entries(coco, "annotations")
            if isinstance(annotation.get("category_id"), Hashable)
        }
        for split, coco in read.items()
    }
    for parent in grouping_category_ids(read.values()) - set().union(*used.values()):
        for named in classes.values():
            named.pop(parent, None)
    for split, ids in used.items():  # before the splits are compared: the more precise message
        if ids - classes[split].keys():
            with error_context(str(files[split][0])):
                deque(AnnotationIndex(validate_classes(classes[split])).watch(coco_records(read[split])), maxlen=0)
    label_map = common_label_map(classes, used)
    check_class_names(label_map, class_names)
    splits = {}
    for split, (path, folders) in files.items():
        coco = read.pop(split)
        given = image_folder.get(split) if isinstance(image_folder, Mapping) else image_folder
        with error_context(str(path)):
            folder = find_image_folder(coco, folders if given is None else [Path(given).expanduser()])
            splits[split] = InstanceDataset(coco, folder, label_map=label_map)
    return InstanceDatasets(splits)


def _load_yolo(path: Path, image_folder: Any, class_names: Any) -> InstanceDatasets:
    classes, root, places = read_data_yaml(path, image_folder, class_names)
    splits = {}
    with error_context(str(path)):
        for key, place in places.items():
            tally, pictures = AnnotationIndex(classes), list_yolo_images(root, place, key)
            if missing := [path for path in pictures if not path.is_file()]:
                shown, total = ", ".join(map(str, missing[:3])), len(pictures)
                raise ValueError(f"{key}: {len(missing)} of {total} pictures are not there: {shown}; correct {key!r}")
            records = yolo_records(pictures, root, classes)
            splits[split_name(key)] = InstanceDataset.of_rows(tally, PackedRecords(tally.watch(records), root))
    return InstanceDatasets(splits)


def _load_hub(source: Any, class_names: Any) -> InstanceDatasets:
    """A Dataset or IterableDataset, or a mapping of splits to them."""
    read, readers, classes = read_hub_rows(source, class_names)
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
