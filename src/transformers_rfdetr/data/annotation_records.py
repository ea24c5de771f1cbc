"""Annotation records: what a reader of an annotation format yields for each image, and how datasets store them.

A record is a dict of `image_id`, `annotations` and, as far as the data contain them, `file_name`, `width` and `height`.
Its annotations are COCO dicts with the category ids of the data. Sizes are (H, W).
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging

from ..model.coco_labels import clip_box
from ..model.image_io import read_rgb
from ..model.masks import box_and_area, has_segmentation, read_segmentation
from ..model.validation import are_numbers, error_context, is_index, is_number, to_builtin
from .image_files import is_outside
from .image_folder import ImageFolder, describe_renaming
from .label_maps import describe_classes

logger = logging.get_logger(__name__)

Record = dict[str, Any]


class AnnotatedSplit(NamedTuple):
    """A split as the reader of an annotation format returns it; `load.py` makes an `InstanceDataset` of it."""

    source: str  # the annotation file, which errors name
    classes: dict[int, str]  # names by category id, the same in all splits
    records: Iterable[Record]  # read once
    image_folder: Path  # where the file names of the records lie


def describe_image(record: Mapping[str, Any], index: int) -> str:
    """Return what errors call the image at `index`."""
    names = [f"{record[name]!r:.200}" for name in ("file_name", "image_id") if record.get(name) is not None]
    return f"image {index} ({', '.join(names)})" if names else f"image {index}"


def _describe_annotation(annotation: Mapping[str, Any], position: int) -> str:
    return f"annotation {position} (id {annotation.get('id')!s:.60})"


def read_sample(
    record: Record, image: Any, label_of: Mapping[int, int], image_id: int | None, first_id: int | None
) -> dict[str, Any]:
    """Return a record and its image (a path or PIL) as a sample of an `InstanceDataset`.

    `label_of` maps category ids to labels; `image_id` and `first_id` are those of [`complete_record`].
    """
    image = read_rgb(image)
    size = (image.height, image.width)
    declared = tuple(record.get(name) or side for name, side in zip(("height", "width"), size, strict=True))
    if declared != size:
        raise ValueError(
            f"`height` and `width` must be those of the upright image (EXIF rotation applied), {size}, got {declared}."
            " Correct the annotation file, or pair it with its own images."
        )
    fields, annotations = complete_record(record, size, image_id, first_id)
    for annotation in annotations:
        annotation["category_id"] = label_of[annotation["category_id"]]
    return {"image": image, **fields, "annotations": annotations}


def complete_record(
    record: Record, size: tuple[int, int], image_id: int | None, first_id: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the fields of a record's image of `size`, and its annotations with every field filled in.

    Unless they are None, `image_id` replaces that of the record, and `first_id`, `first_id` + 1, ... the annotations'.
    """
    name = record.get("file_name") or (record.get("image_id") if image_id is not None else None)
    fields = {
        "image_id": record["image_id"] if image_id is None else image_id,
        **({} if name is None else {"file_name": str(name)}),
        "width": size[1],
        "height": size[0],
    }
    annotations = []
    for position, given in enumerate(record["annotations"]):
        with error_context(_describe_annotation(given, position)):
            annotation = with_box_and_area(given, size)
        if first_id is not None:
            annotation["id"] = first_id + position
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        annotations.append({**annotation, "image_id": fields["image_id"]})
    return fields, annotations


def with_box_and_area(annotation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return a copy of an annotation of an image of `size` (H, W), with missing `bbox` and `area` from its mask.

    Without a mask, the area is that of the box inside the image.
    """
    complete = dict(annotation)
    box, area = annotation.get("bbox"), annotation.get("area")
    if box is None or area is None:
        mask = read_segmentation(annotation.get("segmentation"), size)
        if mask is not None:
            mask_box, mask_area = box_and_area(mask, size)
            complete |= {"bbox": mask_box if box is None else box, "area": mask_area if area is None else area}
        elif box is not None:
            x0, y0, x1, y1 = clip_box(box, size)
            complete["area"] = max(0, x1 - x0) * max(0, y1 - y0)
    return complete


def has_fractions(annotation: Mapping[str, Any]) -> bool:
    """Return whether all coordinates of an annotation lie in [0, 1], and not only 0 and 1: they are no pixels."""
    box, segmentation = to_builtin(annotation.get("bbox")), annotation.get("segmentation")
    if isinstance(box, list) and not all(is_number(value) and 0 <= value <= 1 for value in box):
        return False
    if isinstance(segmentation, Mapping):
        return False
    rows = segmentation if isinstance(segmentation, list | tuple) else []
    polygons = [value for row in rows for value in (row if isinstance(row, list | tuple) else [row])]
    values = [*(box if isinstance(box, list) else []), *polygons]
    return all(is_number(value) and 0 <= value <= 1 for value in values) and any(0 < value < 1 for value in values)


def check_annotations(annotations: Sequence[Mapping[str, Any]], classes: Mapping[int, str]) -> None:
    """Raise ValueError for an invalid category, box, area or iscrowd; a segmentation is checked when it is read."""
    for position, annotation in enumerate(annotations):
        category, box = annotation.get("category_id"), annotation.get("bbox")
        area, crowd = to_builtin(annotation.get("area")), to_builtin(annotation.get("iscrowd"))
        problem = None
        if not is_index(category) or category not in classes:
            problem = (
                f"`category_id` must be one of {describe_classes(classes)}, got {category!r:.60}. Define the category,"
                " or correct the annotation."
            )
        elif box is not None and not are_numbers(to_builtin(box), 4):
            problem = (
                f"`bbox` must be four finite numbers [x, y, width, height] in pixels, got {box!r:.60}. Correct it, or"
                " remove it if the annotation has a segmentation."
            )
        elif area is not None and not (are_numbers([area], 1) and area >= 0):
            problem = f"`area` must be a finite number >= 0, got {area!r:.60}. Correct or remove it."
        elif crowd not in (None, 0, 1):
            problem = f"`iscrowd` must be 0 or 1, got {crowd!r:.60}. Correct it."
        if problem is not None:
            raise ValueError(f"{_describe_annotation(annotation, position)}: {problem}")


class AnnotationIndex:
    """Validate records while they are read, and keep a few bytes of each annotation for counting.

    Attributes:
        classes: Names by category id.
        label_of: Label of each category id.
        offsets: The annotations of image i are those from `offsets[i]` up to, but not including, `offsets[i + 1]`.
        labels: (N,) int32, the label of each annotation.
        is_crowd, has_mask: (N,) bool, of each annotation.
        has_annotation_ids: Whether the annotations' ids are unique integers >= 1, so that they can be kept.
        has_image_ids: Whether the images' ids are integers >= 0.
    """

    def __init__(self, classes: dict[int, str]) -> None:
        self.classes = classes
        self.label_of = {category: label for label, category in enumerate(classes)}
        self.offsets = array("q", [0])

    def validated(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield each record after validating it; the other attributes exist when the iteration has ended.

        Raises:
            ValueError: an annotation is invalid, all coordinates are fractions, or two images have the same id.
        """
        labels, ids, image_ids = array("i"), array("q"), array("q")
        is_crowd, has_mask = array("b"), array("b")
        only_fractions = True
        for index, record in enumerate(records):
            image_id = record.get("image_id")
            image_ids.append(image_id if is_index(image_id) else -1)
            with error_context(describe_image(record, index)):
                check_annotations(record["annotations"], self.classes)
            only_fractions = only_fractions and all(map(has_fractions, record["annotations"]))
            for annotation in record["annotations"]:
                ids.append(annotation["id"] if is_index(annotation.get("id")) else 0)
                labels.append(self.label_of[annotation["category_id"]])
                is_crowd.append(bool(annotation.get("iscrowd")))
                has_mask.append(has_segmentation(annotation.get("segmentation")))
            self.offsets.append(len(ids))
            yield record
        if ids and only_fractions:
            raise ValueError(
                f"coordinates must be in pixels, got only numbers from 0 to 1 in {len(ids)} annotations. Multiply x and"
                " width by the width of the image, y and height by its height."
            )
        self.labels = np.array(labels, np.int32)
        self.is_crowd, self.has_mask = np.array(is_crowd, bool), np.array(has_mask, bool)
        self.has_annotation_ids = min(ids, default=1) > 0 and len(np.unique(ids)) == len(ids)
        self.has_image_ids = min(image_ids, default=0) >= 0
        unique, counts = np.unique(image_ids, return_counts=True)
        if self.has_image_ids and (counts > 1).any():
            raise ValueError(
                f"image ids must be unique, got {unique[counts > 1][0]} for {counts[counts > 1][0]} images. Renumber"
                " the images, or remove their ids."
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.offsets) - 1

    def image_indices(self) -> np.ndarray:
        """Return the index of the image of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def objects_per_image(self) -> np.ndarray:
        """Return the number of annotations of each image, crowds excluded."""
        return np.bincount(self.image_indices()[~self.is_crowd], minlength=len(self))


class PackedRecords:
    """Store records as JSON in one buffer.

    One Python object per annotation would be ten times as large. Each forked worker would also copy it, because every
    read writes the reference count of the object.

    Args:
        records: The records.
        images: The folder of the file names; PIL images or paths in the order of the records; or a mapping to them from
            image id or file name.

    Raises:
        ValueError: an image is missing, or a file name leads out of the folder.
    """

    def __init__(self, records: Iterable[Record], images: Any) -> None:
        self.images = os.fspath(images) if isinstance(images, str | os.PathLike) else images
        buffer, ends, missing, outside, renamed = bytearray(), array("q", [0]), [], [], []
        folder = ImageFolder(self.images) if isinstance(self.images, str) else None
        for index, record in enumerate(logging.tqdm(records, desc="Reading annotations", unit=" images", delay=2)):
            name = record.get("file_name")
            if folder is not None and (found := folder.find(name)) is not None:
                record["file_name"] = found
                renamed += [(found, str(name))] * (found != name)
            elif folder is not None and is_outside(folder.folder, name):
                outside.append(name)
            elif not self._has_image(record, index):
                missing.append(name or record.get("image_id"))
            buffer += json.dumps(record, separators=(",", ":"), default=_json_default).encode()
            ends.append(len(buffer))
        self.buffer, self.ends = np.frombuffer(buffer, np.uint8), np.array(ends)
        self._check_images(missing, outside)
        if renamed:
            logger.warning(
                f"{len(renamed)} of {len(self.ends) - 1} images were found in {self.images!r} under other names than"
                f" annotated, such as {describe_renaming(*renamed[0])}. Check that they are the same images."
            )

    def _has_image(self, record: Record, index: int) -> bool:
        if isinstance(self.images, Mapping):
            return record.get("image_id") in self.images or record.get("file_name") in self.images
        return not isinstance(self.images, str) and index < len(self.images)

    def _check_images(self, missing: list[Any], outside: list[Any]) -> None:
        count = len(self.ends) - 1
        if outside:
            raise ValueError(
                f"file names must stay inside the folder {self.images!r}, got {_list_first(outside)}:"
                f" {len(outside)} of {count} lead out of it. Correct them, or give a folder that contains all images,"
                " as `image_folder` or `images`."
            )
        if missing:
            kind = type(self.images).__name__
            place = repr(self.images) if kind == "str" else f"the {kind} of {len(self.images)} images"
            raise ValueError(
                f"{len(missing)} of {count} images are not in {place}: {_list_first(missing)}. Give the folder that"
                " contains them, as `image_folder` or `images`."
            )
        if not isinstance(self.images, str | Mapping) and len(self.images) != count:
            raise ValueError(
                f"`images` must contain one image for each of the {count} entries of 'images', in their order, got"
                f" {len(self.images)}. Add or remove images."
            )

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        return json.loads(self.buffer[self.ends[index] : self.ends[index + 1]].tobytes())

    def image(self, index: int, record: Record) -> Any:
        """Return the record's image as a path or a PIL image."""
        if isinstance(self.images, str):
            return os.path.join(self.images, record["file_name"])
        if isinstance(self.images, Mapping):
            key = record["image_id"] if record.get("image_id") in self.images else record["file_name"]
            return self.images[key]
        return self.images[index]

    encoded_image = image


def _list_first(names: Sequence[Any]) -> str:
    return ", ".join(f"{name!r:.200}" for name in names[:3]) + ", ..." * (len(names) > 3)


def _json_default(value: Any) -> Any:
    """Convert what `json` cannot write: the bytes of an RLE, and numpy numbers, arrays and bitmaps."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.itemsize == 1:  # a bitmap
        return read_segmentation(value, value.shape)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(
        f"annotations must contain numbers, strings, lists, RLE dicts or arrays, got {type(value).__name__}"
        f" {value!r:.60}. Convert it."
    )
