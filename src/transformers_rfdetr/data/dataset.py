"""Annotated images as datasets."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.utils.data
from transformers.utils import logging

from ..atomic_files import escape_unprintable
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.validation import error_context
from .annotation_records import AnnotationIndex, PackedRecords, complete_record, describe_image, read_sample
from .coco import coco_categories, coco_records
from .image_files import upright_size
from .label_maps import (
    HasLabelMap,
    common_label_map,
    validate_classes,
)
from .prepared import PreparedDataset
from .streams import InstanceStream


class ClassCount(NamedTuple):
    """What a split holds of one class."""

    objects: int  # without crowds
    crowds: int
    images: int  # with at least one object


class InstanceDataset(HasLabelMap, torch.utils.data.Dataset):
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
        tally = AnnotationIndex(validate_classes(label_map or coco_categories(coco)))
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
        with error_context(describe_image(record, index)):
            return read_sample(record, self._rows.picture(index, record), self._tally.label_of, *self._ids(index))

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
            with error_context(describe_image(record, index)):
                size = (record.get("height"), record.get("width"))
                if not all(size):
                    size = upright_size(self._rows.encoded(index, record))
                head, objects = complete_record(record, size, *self._ids(index))
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


class InstanceDatasets(dict[str, Any], HasLabelMap):
    """Splits by name, [`InstanceDataset`] or [`InstanceStream`], with one label map; `str` of it is a table.

    Raises:
        ValueError: the splits' label maps differ.
    """

    def __init__(self, splits: Mapping[str, "InstanceDataset | InstanceStream"]) -> None:
        super().__init__(splits)
        if not splits:
            raise ValueError("there is no split; give at least one")
        self._classes = common_label_map({name: split._classes for name, split in splits.items()})
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
