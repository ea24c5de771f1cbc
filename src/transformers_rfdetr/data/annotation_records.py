"""Annotation records: one dict for each image."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from ..model.coco_labels import clip_box
from ..model.image_io import read_rgb
from ..model.masks import box_and_area, read_segmentation
from ..model.validation import are_numbers, error_context, is_index, to_builtin
from .image_files import is_outside
from .label_maps import describe_classes


def describe_image(record: Mapping[str, Any], index: int) -> str:
    """What messages call image number `index`."""
    names = [f"{record[name]!r:.200}" for name in ("file_name", "image_id") if record.get(name) is not None]
    return f"image {index} ({', '.join(names)})" if names else f"image {index}"


def describe_annotation(annotation: Mapping[str, Any], position: int) -> str:
    """Return what errors call an annotation."""
    return f"annotation {position} (id {annotation.get('id')!s:.60})"


def read_sample(
    record: Mapping[str, Any],
    image: Any,
    label_of: Mapping[int, int],
    image_id: int | None,
    first_id: int | None,
) -> dict[str, Any]:
    """A record and its picture, PIL or a path -> what `InstanceDataset` gives; the ids as in [`_complete`]."""
    picture = read_rgb(image)
    size = (picture.height, picture.width)
    given = tuple(record.get(name) or side for name, side in zip(("height", "width"), size, strict=True))
    if given != size:
        raise ValueError(
            f"height and width are said to be {given}, but the picture's are {size} (EXIF rotation applied);"
            " correct the annotations' sizes, or pair them with their own pictures"
        )
    head, annotations = complete_record(record, size, image_id, first_id)
    for annotation in annotations:
        annotation["category_id"] = label_of[annotation["category_id"]]
    return {"image": picture, **head, "annotations": annotations}


def complete_record(
    record: Mapping[str, Any], size: tuple[int, int], image_id: int | None, first_id: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is said about an image, and its annotations with every field.

    `image_id`, and running ids of annotations from `first_id` on, stand in for the record's unless they are None.
    """
    name = record.get("file_name") or (record.get("image_id") if image_id is not None else None)
    head = {
        "image_id": record["image_id"] if image_id is None else image_id,
        **({} if name is None else {"file_name": str(name)}),
        "width": size[1],
        "height": size[0],
    }
    annotations = []
    for position, given in enumerate(record["annotations"]):
        with error_context(describe_annotation(given, position)):
            annotation = with_box_and_area(given, size)
        if first_id is not None:
            annotation["id"] = first_id + position
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        annotations.append({**annotation, "image_id": head["image_id"]})
    return head, annotations


def with_box_and_area(annotation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The annotation with `bbox` and `area`, from its shape where they are missing, the area else from its box.

    Of a box the part inside the picture counts, (H, W) in `size`.
    """
    complete = dict(annotation)
    box, area = annotation.get("bbox"), annotation.get("area")
    if box is None or area is None:
        shape = read_segmentation(annotation.get("segmentation"), size)
        if shape is not None:
            shape_box, shape_area = box_and_area(shape, size)
            complete |= {"bbox": shape_box if box is None else box, "area": shape_area if area is None else area}
        elif box is not None:
            x0, y0, x1, y1 = clip_box(box, size)
            complete["area"] = max(0, x1 - x0) * max(0, y1 - y0)
    return complete


def has_segmentation(segmentation: Any) -> bool:
    """Whether there is an RLE, a bitmap or a polygon; whether it encloses a pixel is not looked at."""
    if isinstance(segmentation, Mapping) or not isinstance(segmentation, Iterable):
        return segmentation is not None
    return any(not isinstance(part, Sequence | np.ndarray) or len(part) for part in segmentation)


def check_annotations(annotations: Sequence[Mapping[str, Any]], classes: Mapping[int, str]) -> None:
    """Raise ValueError for a category that is not in `classes`, or an invalid box, area or iscrowd."""
    for position, annotation in enumerate(annotations):
        category, box = annotation.get("category_id"), annotation.get("bbox")
        if not is_index(category) or category not in classes:
            raise ValueError(
                f"{describe_annotation(annotation, position)}: category_id {category!r:.60} is none of the classes"
                f" {describe_classes(classes)}; define it in the data's categories, or correct the annotation"
            )
        if box is not None and not are_numbers(to_builtin(box), 4):
            raise ValueError(
                f"{describe_annotation(annotation, position)}: bbox {box!r:.60} is not [x, y, width, height],"
                " four finite numbers in pixels; correct it, or leave it out where there is a segmentation"
            )
        area, crowd = to_builtin(annotation.get("area")), to_builtin(annotation.get("iscrowd"))
        if area is not None and not (are_numbers([area], 1) and area >= 0):
            raise ValueError(
                f"{describe_annotation(annotation, position)}: area {area!r:.60} is not a finite number of at"
                " least 0; correct it or leave it out"
            )
        if crowd not in (None, 0, 1):
            raise ValueError(
                f"{describe_annotation(annotation, position)}: iscrowd {crowd!r:.60} is not 0 or 1; correct it"
            )


class AnnotationIndex:
    """Checks records on their way and counts what they hold, in a few bytes an object."""

    def __init__(self, classes: dict[int, str]) -> None:
        self.classes = classes
        self.label_of = {category: label for label, category in enumerate(classes)}
        self.first = array("q", [0])  # number of annotations before each image, and of all
        self.keeps_ids = self.keeps_image_ids = True
        self._label, self._flags = array("i"), array("b")

    def watch(self, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields the records on; the counts are there when it ends."""
        ids, image_ids = array("q"), array("q")
        for index, record in enumerate(records):
            image_id = record.get("image_id")
            image_ids.append(image_id if is_index(image_id) else -1)
            with error_context(describe_image(record, index)):
                check_annotations(record["annotations"], self.classes)
            for annotation in record["annotations"]:
                ids.append(annotation["id"] if is_index(annotation.get("id")) else 0)
                self._label.append(self.label_of[annotation["category_id"]])
                self._flags.append(
                    bool(annotation.get("iscrowd")) + 2 * has_segmentation(annotation.get("segmentation"))
                )
            self.first.append(len(ids))
            yield record
        self.keeps_ids = min(ids, default=1) > 0 and len(np.unique(ids)) == len(ids)
        self.keeps_image_ids = min(image_ids, default=0) >= 0
        values, repeats = np.unique(image_ids, return_counts=True)
        if self.keeps_image_ids and (repeats > 1).any():
            raise ValueError(
                f"image id {values[repeats > 1][0]} stands for {repeats[repeats > 1][0]} images; number the images, or"
                " leave their ids out"
            )

    def labels(self) -> np.ndarray:
        """Label of each annotation."""
        return np.array(self._label, np.int32)

    def crowds(self) -> np.ndarray:
        """Whether each annotation is a crowd."""
        return (np.array(self._flags, np.int8) & 1) > 0

    def masked(self) -> np.ndarray:
        """Whether each annotation has a segmentation."""
        return (np.array(self._flags, np.int8) & 2) > 0

    def images(self) -> np.ndarray:
        """Number of the image of each annotation."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    def objects_per_image(self) -> np.ndarray:
        """Number of annotations of each image that are no crowds."""
        return np.bincount(self.images()[~self.crowds()], minlength=len(self.first) - 1)


class PackedRecords:
    """Records as JSON, one after the other in one buffer.

    A Python object for each annotation would be 10 times as large, and its reference count, which every reader writes,
    would make each forked worker copy it.
    """

    def __init__(self, records: Iterable[dict[str, Any]], pictures: Any) -> None:
        self.pictures = os.fspath(pictures) if isinstance(pictures, str | os.PathLike) else pictures
        buffer, ends, missing, outside = bytearray(), array("q", [0]), [], []
        for record in logging.tqdm(records, desc="Reading annotations", unit=" images", delay=2):
            buffer += json.dumps(record, separators=(",", ":"), default=_as_json).encode()
            ends.append(len(buffer))
            if isinstance(self.pictures, str) and is_outside(self.pictures, record.get("file_name")):
                outside.append(record["file_name"])
            elif not self._is_there(record, len(ends) - 2):
                missing.append(record.get("file_name") or record.get("image_id"))
        if outside:
            raise ValueError(
                f"{len(outside)} of {len(ends) - 1} file names lead out of {self.pictures!r}, among them"
                f" {_first(outside)}; correct them, or give, as image_folder or pictures, the folder"
                " that all pictures lie in"
            )
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(ends) - 1} pictures are not in {_kind(self.pictures)}, among them"
                f" {_first(missing)}; give their folder, as image_folder or pictures"
            )
        if isinstance(pictures, Sequence) and not isinstance(pictures, str) and len(pictures) != len(ends) - 1:
            raise ValueError(f"{len(pictures)} pictures for {len(ends) - 1} images; give one for each, in their order")
        self.buffer, self.ends = np.frombuffer(buffer, np.uint8), np.array(ends)

    def _is_there(self, record: dict[str, Any], index: int) -> bool:
        if isinstance(self.pictures, str):
            return isinstance(record.get("file_name"), str) and os.path.isfile(
                os.path.join(self.pictures, record["file_name"])
            )
        if isinstance(self.pictures, Mapping):
            return record.get("image_id") in self.pictures or record.get("file_name") in self.pictures
        return index < len(self.pictures)

    def record(self, index: int) -> dict[str, Any]:
        """Record number `index`."""
        return json.loads(self.buffer[self.ends[index] : self.ends[index + 1]].tobytes())

    def picture(self, index: int, record: Mapping[str, Any]) -> Any:
        """The picture of the record, as a path or a PIL picture."""
        if isinstance(self.pictures, str):
            return os.path.join(self.pictures, record["file_name"])
        if isinstance(self.pictures, Mapping):
            key = record["image_id"] if record.get("image_id") in self.pictures else record["file_name"]
            return self.pictures[key]
        return self.pictures[index]

    encoded = picture


def _first(names: Sequence[Any]) -> str:
    return ", ".join(f"{name!r:.200}" for name in names[:3])


def _kind(pictures: Any) -> str:
    return repr(pictures) if isinstance(pictures, str) else f"the {type(pictures).__name__} of {len(pictures)} pictures"


def _as_json(value: Any) -> Any:
    """What json cannot write: numpy's numbers and arrays, and the bytes of an RLE."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.itemsize == 1:  # a bitmap
        return read_segmentation(value, value.shape)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(f"an annotation holds {value!r:.60}; give numbers, lists, an RLE or an array")
