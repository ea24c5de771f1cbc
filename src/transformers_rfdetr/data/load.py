"""Load annotated images in any of the supported formats.

To add the format of an annotation program, write a module with a function that recognises its files, like
`labelme.find_labelme_files`, and a function that reads them, like `labelme.read_labelme`; then add them to
`FILE_FORMATS`, which the dataset check reads too. COCO and YOLO have a second reader in `checks.readers`, which also
reads values that loading refuses.
"""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..model.validation import error_context
from .annotation_files import SourceFiles, read_annotated_splits
from .annotation_records import AnnotationIndex, PackedRecords
from .box_layout import with_checked_boxes
from .coco import find_coco_files, find_other_coco_files, read_coco_splits
from .cvat import find_cvat_files, read_cvat
from .dataset import InstanceDataset, InstanceDatasets
from .hub_rows import SUPPORTED_SOURCES, ArrowRows, is_hub_source, is_streamed, load_rows, read_hub_rows
from .label_maps import canonical_split_name
from .label_studio import find_label_studio_files, read_label_studio
from .labelme import find_labelme_files, read_labelme
from .mask_images import find_mask_images, read_mask_images
from .pascal_voc import find_voc_folders, read_voc
from .streams import InstanceStream
from .supervisely import find_supervisely_files, read_supervisely
from .via import find_via_files, read_via
from .yolo import read_yolo_splits
from .yolo_layout import find_yolo_file

# The first function that finds files decides the format.
_FINDERS: tuple[tuple[str, Any], ...] = (
    ("coco", find_coco_files),
    ("yolo", find_yolo_file),
    ("coco", find_other_coco_files),
)
_READERS: dict[str, Any] = {"coco": read_coco_splits, "yolo": read_yolo_splits}
# The formats of annotation programs: (SourceFiles) -> what was found, and (SourceFiles, found, image folder) ->
# AnnotatedFiles.
FILE_FORMATS: dict[str, tuple[Any, Any]] = {
    "labelme": (find_labelme_files, read_labelme),
    "cvat": (find_cvat_files, read_cvat),
    "via": (find_via_files, read_via),
    "label studio": (find_label_studio_files, read_label_studio),
    "supervisely": (find_supervisely_files, read_supervisely),
    "pascal voc": (find_voc_folders, read_voc),
    "mask images": (find_mask_images, read_mask_images),
}


def recognise_format(source: Any) -> tuple[str | None, Any]:
    """Return the name of the format and the files that were found; (None, None) if `datasets` must read the source.

    Raises:
        ValueError: the source has a type that cannot be read.
    """
    if is_hub_source(source):
        return None, None
    if isinstance(source, InstanceDataset | InstanceDatasets):
        raise ValueError(f"`source` must not be loaded yet, got {type(source).__name__}. Give what it was loaded from.")
    paths = source.values() if isinstance(source, Mapping) else [source]
    if not source or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ValueError(f"`source` must be {SUPPORTED_SOURCES}, got {source!r:.200}. Give one of these.")
    if isinstance(source, Mapping):
        files = [SourceFiles(path, canonical_split_name(str(split))) for split, path in source.items()]
    else:
        files = [SourceFiles(source)]
    programs = [(name, partial(_find_annotated, name, files)) for name in FILE_FORMATS]
    # A folder may have files of another program beside its COCO JSON. The content of single files decides.
    is_folder = files[0].is_folder and not isinstance(source, Mapping)
    finders = [*_FINDERS, *programs] if is_folder else [*programs, *_FINDERS]
    found = ((name, find(source)) for name, find in finders)
    return next(((name, files) for name, files in found if files), (None, None))


def _find_annotated(name: str, sources: Sequence[SourceFiles], source: Any) -> Any:
    """Return a function (image folder) -> [AnnotatedFiles]; None if the sources have another format."""
    find, read = FILE_FORMATS[name]
    found = [find(files) for files in sources]
    if not all(found):
        return None
    return lambda image_folder: [read(*pair, image_folder) for pair in zip(sources, found, strict=True)]


def load_instance_dataset(
    source: Any,
    *,
    image_folder: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    streaming: bool = False,
    **load_dataset_arguments: Any,
) -> InstanceDatasets:
    """Load annotated images in any of the usual formats, with one label map for all splits.

    Labels are 0 to N - 1 in the order of the category ids; `print` the result for a table of them. Splits are called
    "train", "validation" and "test" if they have a usual name, such as "val2017". The guide "Your data" shows the
    formats.

    Example:
        >>> import tempfile
        >>> from transformers_rfdetr import load_instance_dataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
        >>> data = load_instance_dataset(save_dataset(tempfile.mkdtemp(), *draw_dataset(4)))
        >>> data["train"][3]["annotations"], data.id2label
        ([], {0: 'building', 1: 'tree', 2: 'car', 3: 'pool', 4: 'tank'})

    Args:
        source: A file or a folder in one of the guide's formats (COCO, YOLO, labelme, CVAT, VIA, masks, ...);
            a dict {split: path}; or a dataset id on the Hub, a folder that the `datasets` library reads, or one of its
            datasets, whose rows have an image and `objects`, a dict of lists or a list of dicts with `category`,
            `bbox`, `segmentation`, `id`, `area` and `iscrowd`, or other usual names.
        image_folder: The folder of the images; for COCO, also a dict {split: folder}. By default that of the COCO JSON
            or `images` in it; for YOLO, `path` of the data.yaml if it is inside its folder; for annotation programs,
            where their files say, inside the folder of the source. A missing image is replaced by the only one of its
            name in the sub-folders, with a warning.
        class_names: A list of names or a dict {category id: name}, for data that do not name their classes. By default
            numbers are their own names, and names that the objects contain are sorted.
        streaming: Read rows from the Hub when they are needed. The classes must then have names in the data or here.
        **load_dataset_arguments: Passed to `datasets.load_dataset`: `split`, `revision`, `data_files`, ... It converts
            Parquet files once to Arrow files in `cache_dir`, which allow random access; `streaming` does not.

    Raises:
        ValueError: the source cannot be read, images are missing or outside their folder, or the categories differ.
        ImportError: the `datasets` library is needed and not installed.
    """
    name, files = recognise_format(source)
    if name is None and image_folder is not None:
        raise ValueError(f"`image_folder` requires annotation files, got {source!s:.200}. Remove `image_folder`.")
    if name is None:
        rows = source if is_hub_source(source) else load_rows(source, streaming, load_dataset_arguments)
        return _load_hub_rows(rows, class_names)
    if streaming or load_dataset_arguments:
        given = [*(["streaming"] if streaming else []), *load_dataset_arguments]
        raise ValueError(f"{given} require a source for `datasets.load_dataset`, got {source!s}. Remove them.")
    splits = {}
    if name in FILE_FORMATS:
        annotated = read_annotated_splits(files(image_folder), class_names)
    else:
        annotated = _READERS[name](files, image_folder, class_names)
    for split_name, split in annotated.items():
        index = AnnotationIndex(split.classes)
        with error_context(split.source):
            records = PackedRecords(index.validated(with_checked_boxes(split.records)), split.image_folder)
        splits[split_name] = InstanceDataset.from_index(index, records)
    return InstanceDatasets(splits)


def _load_hub_rows(source: Any, class_names: Any) -> InstanceDatasets:
    splits, readers, classes = read_hub_rows(source, class_names)
    result: dict[str, InstanceDataset | InstanceStream] = {}
    for name, split in splits.items():
        reader = readers[name]
        if is_streamed(split):
            columns = split.with_format(None).select_columns([*reader.columns.values()])
            result[name] = InstanceStream(columns, reader, classes)
            continue
        index, rows = AnnotationIndex(classes), ArrowRows(split, reader)
        with error_context(f"split {name!r}"):
            deque(index.validated(rows.records(f"Annotations of {name}")), maxlen=0)  # exhaust it to build the index
            deque(with_checked_boxes(rows.first_records()), maxlen=0)
        result[name] = InstanceDataset.from_index(index, rows)
    return InstanceDatasets(result)
