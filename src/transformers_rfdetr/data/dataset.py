"""Annotated pictures, one at a time, and as batches of the model's inputs and labels.

Sizes are (H, W), boxes COCO's [x, y, width, height] in pixels of the upright picture (EXIF rotation applied). A
*category id* is the number that the data use; a *label* is the class index of the model, from 0 without gaps.
"""

import json
import os
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.distributed
import torch.nn.functional as F
import torch.utils.data
from PIL.ExifTags import Base
from transformers import TrainerCallback
from transformers.utils import logging

from ..atomic_files import escape_unprintable
from ..model.configuration_rf_detr import error_context
from ..model.image_processing_rf_detr import (
    RfDetrImageProcessor,
    are_numbers,
    clamp_box,
    is_index,
    open_image,
    read_rgb,
    to_builtin,
)
from ..model.masks import measure, read_segmentation
from .augmentation import as_augmentation

_FIELDS = ("id", "category_id", "bbox", "segmentation", "area", "iscrowd")  # of an annotation


class ClassCount(NamedTuple):
    """What a split holds of one class."""

    objects: int  # without crowds
    crowds: int
    images: int  # with at least one object


class _Labelled:
    """Has the label map of `_classes`, which are names by category id, in the order of the ids."""

    _classes: dict[int, str]

    @property
    def id2label(self) -> dict[int, str]:
        """Label -> name, as a model's configuration has it."""
        return dict(enumerate(self._classes.values()))

    @property
    def label2id(self) -> dict[str, int]:
        """Name -> label."""
        return {name: label for label, name in self.id2label.items()}

    @property
    def category_ids(self) -> list[int]:
        """Category id of each label."""
        return list(self._classes)


class InstanceDataset(_Labelled, torch.utils.data.Dataset):
    """Pictures with their objects, read one at a time; the annotations stay compressed, as they were given.

    `dataset[i]` is a dict of `image` (PIL, RGB, upright), `image_id`, `width`, `height`, `file_name` where there is
    one, and `annotations`: COCO's dicts with `category_id` the label, and `id`, `image_id`, `bbox`, `area` and
    `iscrowd` also where the data leave them out (bbox and area as far as there is a shape or a box to take them from).

    Image ids that are no whole numbers are replaced by the row's number, and ids of annotations, unless they all differ
    and are at least 1, by running numbers from 1.

    Example:
        >>> from transformers_rfdetr.data.dataset import InstanceDataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset
        >>> pictures, coco = draw_dataset(4)
        >>> dataset = InstanceDataset(coco, pictures)
        >>> len(dataset), dataset.id2label, dataset.category_ids
        (4, {0: 'building'}, [1])
        >>> {annotation["category_id"] for annotation in dataset[0]["annotations"]}
        {0}

    Args:
        coco: `images`, `annotations` and `categories` as COCO's JSON has them.
        pictures: The folder of the `file_name`s; or PIL pictures or paths, in the order of `images` or in a mapping
            from image id or file name.
        label_map: Category id -> name of the classes; by default those of `categories`.

    Raises:
        ValueError: a file that is not there, a category that is not defined, an annotation of an unknown image, ids
            that are not unique, a box that is not four numbers.
    """

    def __init__(
        self,
        coco: Mapping[str, Any],
        pictures: str | os.PathLike[str] | Sequence[Any] | Mapping[Any, Any],
        *,
        label_map: Mapping[int, str] | None = None,
    ) -> None:
        tally = AnnotationIndex(checked_classes(label_map or coco_categories(coco)))
        self._hold(tally, PackedRecords(tally.watch(coco_records(coco)), pictures))

    @classmethod
    def of_rows(cls, tally: "AnnotationIndex", rows: Any) -> "InstanceDataset":
        """The data set of records that the tally has watched; `rows` reads them as a [`PackedRecords`] does."""
        dataset = cls.__new__(cls)
        dataset._hold(tally, rows)
        return dataset

    def _hold(self, tally: "AnnotationIndex", rows: Any) -> None:
        self._tally, self._rows, self._classes = tally, rows, tally.classes

    def __len__(self) -> int:
        return len(self._tally.first) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} images of the data set")
        index = int(index) % len(self)
        record = self._rows.record(index)
        with error_context(place_of(record, index)):
            return _read_sample(record, self._rows.picture(index, record), self._tally.label_of, *self._ids(index))

    def _ids(self, index: int) -> tuple[int | None, int | None]:
        """The image id and the id of the first annotation of an image, where its record's are not to be used."""
        image_id = None if self._tally.keeps_image_ids else index
        return image_id, None if self._tally.keeps_ids else self._tally.first[index] + 1

    def coco(self) -> dict[str, Any]:
        """`images`, `annotations` and `categories` as COCO's JSON has them, with the data's own category ids.

        Crowds are there, and the size of every image, from the files' headers where the data do not give it.
        """
        images, annotations = [], []
        for index in logging.tqdm(range(len(self)), desc="Annotations", delay=2):
            record = self._rows.record(index)
            with error_context(place_of(record, index)):
                size = (record.get("height"), record.get("width"))
                if not all(size):
                    size = upright_size(self._rows.encoded(index, record))
                head, objects = _complete(record, size, *self._ids(index))
            images.append({"id": head.pop("image_id"), **head})
            annotations += objects
        categories = [{"id": category, "name": name} for category, name in self._classes.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def counts(self) -> dict[int, ClassCount]:
        """Label -> how many objects, crowds and images with objects there are."""
        labels, is_crowd, image = self._tally.labels(), self._tally.crowds(), self._tally.images()
        result = {}
        for label in self.id2label:
            objects = (labels == label) & ~is_crowd
            crowds = int(((labels == label) & is_crowd).sum())
            result[label] = ClassCount(int(objects.sum()), crowds, len(np.unique(image[objects])))
        return result

    def crowded(self, num_queries: int) -> list[tuple[str | int, int]]:
        """The images that hold more objects than a model has queries, with their numbers of objects.

        Of such an image the model can find `num_queries` objects at most, and in training the rest go unmatched.

        Args:
            num_queries: As in the model's configuration.

        Returns:
            (file name, or image id where there is none; objects without crowds), in the order of the data.
        """
        counts = self._tally.objects_per_image()
        found = []
        for index in np.flatnonzero(counts > num_queries).tolist():
            record = self._rows.record(index)
            name = record.get("file_name") or record.get("image_id")
            found.append((index if name is None else name, int(counts[index])))
        return found

    def names_of(self, image_ids: Sequence[int]) -> list[str]:
        """File names, or "image_id 7" where there is none, of images in the order of their ids given."""
        wanted = dict.fromkeys(image_ids)
        for index in range(len(self)):
            record, (image_id, _) = self._rows.record(index), self._ids(index)
            image_id = record["image_id"] if image_id is None else image_id
            if image_id in wanted:
                wanted[image_id] = record.get("file_name")
        return [str(wanted[image_id] or f"image_id {image_id}") for image_id in image_ids]

    def with_processor(
        self,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: bool = True,
    ) -> "PreparedDataset":
        """The same data as the model's inputs and labels; see [`PreparedDataset`] for the arguments."""
        return PreparedDataset(self, processor, augmentation=augmentation, seed=seed, masks=masks)

    def _summary(self) -> str:
        counts = self._tally.objects_per_image()
        masked = self._tally.masked()
        parts = [
            f"{len(self)} images, {int((counts == 0).sum())} of them without objects",
            f"{int(counts.sum())} objects, {int((~masked & ~self._tally.crowds()).sum())} of them without a mask",
            f"at most {int(counts.max(initial=0))} in one image",
        ]
        return "; ".join(parts)


class InstanceDatasets(dict[str, Any], _Labelled):
    """Splits by name, [`InstanceDataset`] or [`InstanceStream`], with one label map; `str` of it is a table.

    Raises:
        ValueError: the splits' label maps differ.
    """

    def __init__(self, splits: Mapping[str, "InstanceDataset | InstanceStream"]) -> None:
        super().__init__(splits)
        if not splits:
            raise ValueError("there is no split; give at least one")
        self._classes = one_label_map({name: split._classes for name, split in splits.items()})
        for name, split in splits.items():
            if split._classes != self._classes:
                raise ValueError(
                    f"split {name!r} has the classes {split._classes}, another the classes {self._classes};"
                    " pass the same label_map to all of them"
                )

    def __str__(self) -> str:
        counted = {name: split for name, split in self.items() if isinstance(split, InstanceDataset)}
        header = ["label", "name", "category id"]
        rows = [
            [str(label), escape_unprintable(self.id2label[label]), str(category)]
            for label, category in enumerate(self.category_ids)
        ]
        for name, split in counted.items():
            header += [f"{name} objects", "crowds", "images"]
            for row, count in zip(rows, split.counts().values(), strict=True):
                row += map(str, count)
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if i == 1 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in [header, *rows])
        ]
        lines += [
            f"{name}: {split._summary() if name in counted else 'streamed, not counted'}"
            for name, split in self.items()
        ]
        return "\n".join(lines)


# Records: {"image_id", "annotations", and where known "file_name", "width", "height"}, with the data's category ids


def place_of(record: Mapping[str, Any], index: int) -> str:
    """What messages call image number `index`."""
    names = [f"{record[name]!r:.200}" for name in ("file_name", "image_id") if record.get(name) is not None]
    return f"image {index} ({', '.join(names)})" if names else f"image {index}"


def _read_sample(
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
    head, annotations = _complete(record, size, image_id, first_id)
    for annotation in annotations:
        annotation["category_id"] = label_of[annotation["category_id"]]
    return {"image": picture, **head, "annotations": annotations}


def _complete(
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
        with error_context(_named(given, position)):
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
            shape_box, shape_area = measure(shape, size)
            complete |= {"bbox": shape_box if box is None else box, "area": shape_area if area is None else area}
        elif box is not None:
            x0, y0, x1, y1 = clamp_box(box, size)
            complete["area"] = max(0, x1 - x0) * max(0, y1 - y0)
    return complete


def has_segmentation(segmentation: Any) -> bool:
    """Whether there is an RLE, a bitmap or a polygon; whether it encloses a pixel is not looked at."""
    if isinstance(segmentation, Mapping) or not isinstance(segmentation, Iterable):
        return segmentation is not None
    return any(not isinstance(part, Sequence | np.ndarray) or len(part) for part in segmentation)


def _named(annotation: Mapping[str, Any], position: int) -> str:
    return f"annotation {position} (id {annotation.get('id')!s:.60})"


def _check_annotations(annotations: Sequence[Mapping[str, Any]], classes: Mapping[int, str]) -> None:
    for position, annotation in enumerate(annotations):
        category, box = annotation.get("category_id"), annotation.get("bbox")
        if not is_index(category) or category not in classes:
            raise ValueError(
                f"{_named(annotation, position)}: category_id {category!r:.60} is none of the classes"
                f" {shown_classes(classes)}; define it in the data's categories, or correct the annotation"
            )
        if box is not None and not are_numbers(to_builtin(box), 4):
            raise ValueError(
                f"{_named(annotation, position)}: bbox {box!r:.60} is not [x, y, width, height],"
                " four finite numbers in pixels; correct it, or leave it out where there is a segmentation"
            )
        area, crowd = to_builtin(annotation.get("area")), to_builtin(annotation.get("iscrowd"))
        if area is not None and not (are_numbers([area], 1) and area >= 0):
            raise ValueError(
                f"{_named(annotation, position)}: area {area!r:.60} is not a finite number of at"
                " least 0; correct it or leave it out"
            )
        if crowd not in (None, 0, 1):
            raise ValueError(f"{_named(annotation, position)}: iscrowd {crowd!r:.60} is not 0 or 1; correct it")


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
            with error_context(place_of(record, index)):
                _check_annotations(record["annotations"], self.classes)
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


def shown_classes(classes: Mapping[Any, str], most: int = 12) -> str:
    """The classes for a message, the first of them where they are many."""
    listed = ", ".join(f"{key}: {name!r:.60}" for key, name in list(classes.items())[:most])
    return f"{{{listed}{f', ... ({len(classes)} in all)' * (len(classes) > most)}}}"


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


def is_outside(folder: str | os.PathLike[str], name: Any) -> bool:
    """Whether a file name, relative to the folder or absolute, means a file outside of it; links are not looked at."""
    if not isinstance(name, str | os.PathLike):
        return False
    root = os.path.abspath(folder)
    return not Path(os.path.abspath(os.path.join(root, name))).is_relative_to(root)


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


def upright_size(picture: Any) -> tuple[int, int]:
    """A path, the bytes of a file or a PIL picture -> (H, W) with the EXIF rotation applied, from the header."""
    if not isinstance(picture, PIL.Image.Image):
        try:
            with open_image(BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
                return upright_size(opened)
        except Exception as error:  # Pillow's are many, among them that of too many pixels
            raise ValueError(f"{picture!r:.200} cannot be opened as an image: {error}") from error
    # A PNG's own `getexif` decodes the whole file first, in case there is EXIF behind the pixels.
    turned = PIL.Image.Image.getexif(picture).get(Base.Orientation) in range(5, 9)  # width and height are exchanged
    width, height = picture.size
    if turned and picture.format == "TIFF":  # whose size some releases of Pillow give turned already
        width, height = (picture.tag_v2[tag] for tag in (Base.ImageWidth, Base.ImageLength))
    return (width, height) if turned else (height, width)


# COCO


def coco_categories(coco: Mapping[str, Any]) -> dict[int, str]:
    """Category id -> name."""
    if not {"images", "categories"} <= coco.keys():
        raise ValueError(
            f"the keys are {[f'{key:.60}' for key in sorted(map(str, coco))[:8]]}, not those of COCO's instances JSON:"
            " 'images', 'annotations' and 'categories'; convert the annotations to it"
        )
    classes: dict[int, str] = {}
    for category in entries(coco, "categories"):
        number = category.get("id")
        if not is_index(number):
            raise ValueError(f"category id {number!r:.60} is not a whole number of at least 0; number the categories")
        if number in classes:
            raise ValueError(f"category id {number!r} is defined twice; remove one of the two definitions")
        classes[number] = str(category.get("name", number))
    return classes


def entries(coco: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
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
    for image in entries(coco, "images"):
        number = image.get("id")
        _check_image(image)
        if number is None or not isinstance(number, Hashable) or number in by_image:
            raise ValueError(f"image id {number!r:.60} is missing or stands for two images; number the images")
        by_image[number] = []
    for annotation in entries(coco, "annotations"):
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


# Label maps


def checked_classes(classes: Mapping[int, str]) -> dict[int, str]:
    """Names by category id, in the order of the ids."""
    wrong = [category for category in classes if not is_index(category)]
    if wrong:
        raise ValueError(f"category id {wrong[0]!r:.60} is not a whole number of at least 0; number the categories")
    # A few lines of YAML can nest a name so often that its text would fill the memory.
    unnamed = [category for category, name in classes.items() if not isinstance(name, str | int | float)]
    if unnamed:
        kind = type(classes[unnamed[0]]).__name__
        raise ValueError(f"category {unnamed[0]} is called by a {kind}, not by a text; name it")
    ordered = {int(category): str(classes[category]) for category in sorted(classes)}
    if not ordered:
        raise ValueError("the data define no category; give their names (`categories`, class_names or label_map)")
    by_name: dict[str, int] = {}
    for category, name in ordered.items():
        if by_name.setdefault(name, category) != category:
            raise ValueError(
                f"the categories {by_name[name]} and {category} are both called {name!r:.60}; names must differ:"
                " rename one, or give both annotations one id"
            )
    return ordered


def one_label_map(
    classes: Mapping[str, Mapping[int, str]], used: Mapping[str, Iterable[int]] | None = None
) -> dict[int, str]:
    """The classes that each split defines, and those that it uses (all, by default) -> the classes of all splits.

    They are those of "train", or of the first split where there is none.
    """
    first = "train" if "train" in classes else next(iter(classes))
    ours = classes[first]
    for split, theirs in classes.items():
        needed = sorted(theirs if used is None else used[split])
        if unknown := {category: theirs.get(category, "?") for category in needed if category not in ours}:
            raise ValueError(
                f"split {split!r} has the categories {shown_classes(unknown)}, which split {first!r} does not define:"
                f" it has {shown_classes(ours)}; define them there, or correct split {split!r}"
            )
        if renamed := {category: name for category, name in theirs.items() if ours.get(category, name) != name}:
            before = {category: ours[category] for category in renamed}
            raise ValueError(
                f"split {split!r} has the categories {shown_classes(renamed)}, which split {first!r} calls"
                f" {shown_classes(before)}; one id must have one name in all splits: correct one of them"
            )
    return checked_classes(ours)


# Inputs and labels


class PreparedDataset(torch.utils.data.Dataset):
    """An [`InstanceDataset`] as the model's inputs and labels, augmented anew in each epoch.

    `prepared[i]` is a dict of `pixel_values` (3, H, W), `labels` (the processor's dict of tensors for one image) and,
    unless the processor makes every picture the same size, `pixel_mask` (H, W). [`collate_fn`] makes batches of them.

    What is drawn depends on seed, epoch and index alone, not on workers, order or the global generators. `set_epoch`
    reaches persistent workers too. accelerate, and with it the stock Trainer, tells the epoch to the sampler instead of
    the data set where there are several processes: pass `callbacks=[FollowEpoch()]` to it, or each epoch has the same
    draws.

    Args:
        dataset: The annotated pictures; `prepared.dataset`.
        processor: The model's image processor.
        augmentation: [`FlipAndCrop`][transformers_rfdetr.data.augmentation.FlipAndCrop] or any other callable (picture,
            annotations, rng) -> (picture, annotations), or a pipeline of `torchvision.transforms.v2`.
        seed: 0 or more.
        masks: Whether labels hold masks, which instance segmentation needs.
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: bool = True,
    ) -> None:
        self.dataset = dataset
        self._prepare = _Preparation(processor, augmentation, seed, masks)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """From now on the draws are those of this epoch, in running workers too, but for what they have prepared."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return self._prepare(sample, int(self._epoch), int(index) % len(self))


class _Preparation:
    """Augmentation and processor, one after the other, for one sample."""

    def __init__(self, processor: RfDetrImageProcessor, augmentation: Any, seed: int, masks: bool) -> None:
        if not is_index(seed):
            raise ValueError(f"seed {seed!r} is not a whole number of at least 0; 0 is usual")
        self.processor, self.augmentation = processor, as_augmentation(augmentation)
        self.seed, self.masks = int(seed), masks
        self.is_exact = processor.do_resize and "height" in processor.size and processor.pad_size is None

    def __call__(self, sample: Mapping[str, Any], *key: int) -> dict[str, Any]:
        """A sample of an [`InstanceDataset`] -> the model's inputs and labels, with the draws of `key`."""
        picture, annotations = sample["image"], sample["annotations"]
        with error_context(f"{sample.get('file_name', 'picture')!s}, image_id {sample['image_id']}"):
            if self.augmentation is not None:
                picture, annotations = self.augmentation(picture, annotations, np.random.default_rng([self.seed, *key]))
            target = {"image_id": sample["image_id"], "annotations": annotations}
            inputs = self.processor(picture, target, return_segmentation_masks=self.masks, return_tensors="pt")
        prepared = {"pixel_values": inputs["pixel_values"][0], "labels": dict(inputs["labels"][0])}
        if "pixel_mask" in inputs and not self.is_exact:
            prepared["pixel_mask"] = inputs["pixel_mask"][0]
        return prepared


class FollowEpoch(TrainerCallback):
    """Tells the training data which epoch begins, for the stock Trainer; see [`PreparedDataset`]."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes the epoch on."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if isinstance(dataset, PreparedDataset):
            dataset.set_epoch(int(state.epoch or 0))


def collate_fn(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of a [`PreparedDataset`] or [`PreparedStream`] -> one batch of the model's inputs and labels.

    Where sizes differ, pictures and masks are padded at the bottom and right to the largest height and width, and
    `pixel_mask` tells the picture from the padding; boxes are relative to the picture and stay.

    Args:
        samples: Dicts of `pixel_values` (3, H, W), `labels` and possibly `pixel_mask` (H, W).

    Returns:
        `pixel_values` (B, 3, H, W); `labels`, a list of B dicts; and, where sizes differ or samples have one,
        `pixel_mask` (B, H, W) int64.
    """
    sizes = [tuple(sample["pixel_values"].shape[-2:]) for sample in samples]
    largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
    pixels, masks, labels = [], [], []
    for sample, size in zip(samples, sizes, strict=True):
        padding = (0, largest[1] - size[1], 0, largest[0] - size[0])
        label = dict(sample["labels"])
        if size != largest:
            label["size"] = torch.tensor(largest)
            if "masks" in label:
                label["masks"] = F.pad(label["masks"], padding)
        labels.append(label)
        pixels.append(F.pad(sample["pixel_values"], padding))
        mask = sample.get("pixel_mask")
        masks.append(F.pad(torch.ones(size, dtype=torch.int64) if mask is None else mask, padding))
    batch = {"pixel_values": torch.stack(pixels), "labels": labels}
    if len(set(sizes)) > 1 or any("pixel_mask" in sample for sample in samples):
        batch["pixel_mask"] = torch.stack(masks)
    return batch


# Streams


class InstanceStream(_Labelled):
    """A split that is read from front to back and never as a whole: `with_processor` makes a training set of it.

    Args:
        rows: A `datasets.IterableDataset`.
        reader: `reader.record(row)` makes a record of a row, `reader.picture(row)` gives its picture, PIL or a path.
        classes: Names by category id.
    """

    def __init__(self, rows: Any, reader: Any, classes: dict[int, str]) -> None:
        self.rows, self._reader, self._classes = rows, reader, classes

    def with_processor(
        self,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: bool = True,
        repeat: bool = True,
        buffer_size: int = 256,
        process: tuple[int, int] | None = None,
    ) -> "PreparedStream":
        """The same data as the model's inputs and labels; see [`PreparedStream`] for the arguments."""
        preparation = _Preparation(processor, augmentation, seed, masks)
        return PreparedStream(self, preparation, repeat=repeat, buffer_size=buffer_size, process=process)

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows -> what `InstanceDataset` gives for an image; `image_id` is the position where rows have no number."""
        label_of = {category: label for label, category in enumerate(self._classes)}
        for position, row in enumerate(rows):
            with error_context(f"row {position}"):
                record = self._reader.record(row)
                _check_annotations(record["annotations"], self._classes)
                image_id = None if is_index(record.get("image_id")) else position
                sample = _read_sample(record, self._reader.picture(row), label_of, image_id, first_id=1)
            yield sample


class PreparedStream(torch.utils.data.IterableDataset):
    """An [`InstanceStream`] as the model's inputs and labels; samples as those of a [`PreparedDataset`].

    Each process and each worker reads its own part, so that together they read every row once in an epoch. There can be
    no more workers at work than the stream has shards (files). What is drawn depends on seed, epoch, process, worker
    and position alone.

    Args:
        stream: The annotated pictures.
        preparation: Processor, augmentation, seed and whether there are masks.
        repeat: Whether epoch follows epoch without an end, each in an order of its own, as training wants it; otherwise
            there is one pass in the stream's order.
        buffer_size: With `repeat`, the rows, still encoded, among which the next one is drawn.
        process: (rank, number of processes) of this process. By default what torch.distributed says when the reading
            starts, else the environment variables RANK and WORLD_SIZE, else (0, 1). Give (0, 1) where something else
            hands the samples out to the processes, as accelerate's dispatcher does.
    """

    def __init__(
        self,
        stream: InstanceStream,
        preparation: _Preparation,
        *,
        repeat: bool = True,
        buffer_size: int = 256,
        process: tuple[int, int] | None = None,
    ) -> None:
        self.stream, self._prepare = stream, preparation
        self.repeat, self.buffer_size, self.process = repeat, buffer_size, process
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The next reading starts with this epoch."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, world_size = self.process or _process()
        worker = torch.utils.data.get_worker_info()
        epoch = int(self._epoch)
        while True:
            position = -1
            for position, sample in enumerate(self.stream.samples(self._rows(epoch, rank, world_size))):
                yield self._prepare(sample, epoch, rank, worker.id if worker else 0, position)
            # A worker without a shard would wait for its first sample for ever.
            if not self.repeat or position < 0:
                return
            epoch += 1

    def _rows(self, epoch: int, rank: int, world_size: int) -> Iterable[Mapping[str, Any]]:
        """This process's rows of an epoch; datasets itself shares them out among the workers."""
        from datasets.distributed import split_dataset_by_node

        rows = self.stream.rows
        if self.repeat:
            rows = rows.shuffle(seed=self._prepare.seed, buffer_size=self.buffer_size)
        rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        if self.repeat:
            rows.set_epoch(epoch)
        return rows


def _process() -> tuple[int, int]:
    """(rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
