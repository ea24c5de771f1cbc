"""Annotated images as a PyTorch dataset, and its splits with one label map.

Sizes are (H, W); boxes are COCO's [x, y, width, height] in pixels of the upright image (EXIF rotation applied).
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.utils.data
from transformers.utils import logging

from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.validation import error_context
from ..text_table import format_table
from .annotation_records import AnnotationIndex, PackedRecords, complete_record, describe_image, read_sample
from .coco import coco_categories, coco_records
from .ignored_classes import IgnoredClassRecords
from .image_files import upright_size
from .label_maps import HasLabelMap, common_label_map, describe_classes, validate_classes
from .prepared import PreparedDataset
from .streams import InstanceStream


class ClassCount(NamedTuple):
    """Numbers of one class in a split."""

    objects: int  # crowds excluded
    crowds: int
    images: int  # with at least one object


class InstanceDataset(HasLabelMap, torch.utils.data.Dataset):
    """Annotated images, read one at a time; the annotations are kept as compact as in the annotation file.

    `dataset[i]` is a dict of `image` (PIL, RGB, upright), `image_id`, `width`, `height`, `file_name` if it is known,
    and `annotations`: COCO dicts with `category_id` replaced by the label, and with `id`, `image_id`, `bbox`, `area`
    and `iscrowd` also if the data do not contain them. Missing boxes and areas come from the mask, else areas come from
    the box.

    Image ids that are not integers are replaced by the index of the image. Annotation ids are replaced by 1, 2, ...
    unless all of them are unique and at least 1.

    Example:
        >>> from transformers_rfdetr.data.dataset import InstanceDataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset
        >>> images, coco = draw_dataset(4, classes=["building"])
        >>> dataset = InstanceDataset(coco, images)
        >>> len(dataset), dataset.id2label, dataset.category_ids
        (4, {0: 'building'}, [1])
        >>> {annotation["category_id"] for annotation in dataset[0]["annotations"]}
        {0}

    Args:
        coco: A COCO dict with `images`, `annotations` and `categories`.
        images: The images: the folder that their file names are relative to; PIL images or paths in the order of
            `images`; or a mapping to these from image id or file name.
        label_map: Names of the classes by category id; by default those of `categories`.

    Raises:
        ValueError: an image is missing, ids are not unique, an annotation has an undefined category, belongs to no
            image, or has an invalid box, area or iscrowd.
    """

    def __init__(
        self,
        coco: Mapping[str, Any],
        images: str | os.PathLike[str] | Sequence[Any] | Mapping[Any, Any],
        *,
        label_map: Mapping[int, str] | None = None,
    ) -> None:
        index = AnnotationIndex(validate_classes(label_map or coco_categories(coco)))
        self._set_records(index, PackedRecords(index.validated(coco_records(coco)), images))

    @classmethod
    def from_index(cls, index: AnnotationIndex, records: Any) -> "InstanceDataset":
        """Return the dataset of records that `index` has validated, such as [`PackedRecords`]."""
        dataset = cls.__new__(cls)
        dataset._set_records(index, records)
        return dataset

    def _set_records(self, index: AnnotationIndex, records: Any) -> None:
        self._index, self._records, self._classes = index, records, index.classes

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be in [{-len(self)}, {len(self)}), got {index}")
        index = int(index) % len(self)
        record = self._records.record(index)
        with error_context(describe_image(record, index)):
            image = self._records.image(index, record)
            return read_sample(record, image, self._index.label_of, *self._replacement_ids(index))

    def _replacement_ids(self, index: int) -> tuple[int | None, int | None]:
        """Return the image id and the id of the first annotation of an image; None if the record's ids are kept."""
        image_id = None if self._index.has_image_ids else index
        return image_id, None if self._index.has_annotation_ids else self._index.offsets[index] + 1

    def image_ids(self) -> list[int]:
        """Return the id of each image."""
        indices = range(len(self))
        return [self._records.record(i)["image_id"] for i in indices] if self._index.has_image_ids else list(indices)

    def coco(self) -> dict[str, Any]:
        """Return a COCO dict of `images`, `annotations` and `categories`, with the category ids of the data.

        It contains crowds, and the size of every image, read from the header of the file if the data lack it.
        """
        images, annotations = [], []
        for fields, completed in self.annotated_images():
            images.append({"id": fields.pop("image_id"), **fields})
            annotations += completed
        categories = [{"id": category, "name": name} for category, name in self._classes.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def annotated_images(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Yield `image_id`, `width`, `height` and `file_name` of each image, and its annotations as in [`coco`]."""
        for index in logging.tqdm(range(len(self)), desc="Annotations", delay=2):
            record = self._records.record(index)
            with error_context(describe_image(record, index)):
                size = (record.get("height"), record.get("width"))
                if not all(size):
                    size = upright_size(self._records.encoded_image(index, record))
                fields, annotations = complete_record(record, size, *self._replacement_ids(index))
            yield fields, annotations

    def encoded_image(self, index: int) -> Any:
        """Return an image without decoding it: a path, the bytes of a file or a PIL image."""
        return self._records.encoded_image(index, self._records.record(index))

    def counts(self) -> dict[int, ClassCount]:
        """Return the numbers of objects, crowds and images of each label."""
        labels, is_crowd, image_indices = self._index.labels, self._index.is_crowd, self._index.image_indices()
        counts = {}
        for label in self.id2label:
            is_object = (labels == label) & ~is_crowd
            crowds = int(((labels == label) & is_crowd).sum())
            counts[label] = ClassCount(int(is_object.sum()), crowds, len(np.unique(image_indices[is_object])))
        return counts

    def classes_of_images(self) -> np.ndarray:
        """Return whether each image has an object of each label, (N, C) bool, crowds excluded."""
        has_class: np.ndarray = np.zeros((len(self), len(self.id2label)), bool)
        is_object = ~self._index.is_crowd
        has_class[self._index.image_indices()[is_object], self._index.labels[is_object]] = True
        return has_class

    def num_objects(self, *, with_mask: bool = False) -> int:
        """Return the number of objects, crowds excluded: of all, or of those that have a segmentation."""
        is_counted = ~self._index.is_crowd & (self._index.has_mask | (not with_mask))
        return int(is_counted.sum())

    def indices_with_masks(self) -> np.ndarray:
        """Return the indices of the images that have an object with a mask, crowds excluded, (M,) int64."""
        return np.unique(self._index.image_indices()[self._index.has_mask & ~self._index.is_crowd])

    def crowded(self, num_queries: int) -> list[tuple[str | int, int]]:
        """Return the images with more objects than `num_queries`, of which a model can find only as many.

        Returns:
            (file name, else image id; number of objects without crowds) of each, in the order of the data.
        """
        counts = self._index.objects_per_image()
        images = []
        for index in np.flatnonzero(counts > num_queries).tolist():
            record = self._records.record(index)
            name = record.get("file_name") or record.get("image_id")
            images.append((index if name is None else name, int(counts[index])))
        return images

    def names_of(self, image_ids: Sequence[int]) -> list[str]:
        """Return the file name, else "image_id 7", of each image id."""
        names = dict.fromkeys(image_ids)
        for index, image_id in enumerate(self.image_ids()):
            if image_id in names:
                names[image_id] = self._records.record(index).get("file_name")
        return [str(names[image_id] or f"image_id {image_id}") for image_id in image_ids]

    def with_processor(
        self,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: Literal["cropped"] | bool = True,
        class_balance: float | None = None,
    ) -> PreparedDataset:
        """Return the model's inputs and labels of the images; [`PreparedDataset`] documents the arguments."""
        return PreparedDataset(
            self, processor, augmentation=augmentation, seed=seed, masks=masks, class_balance=class_balance
        )

    def summary(self) -> str:
        """Return the numbers of images and objects in one line.

        Segmentations are counted and not drawn, which would take longer than reading them: one that covers no pixel
        counts too. `check_dataset` finds these.
        """
        counts = self._index.objects_per_image()
        without_segmentation = int((~self._index.has_mask & ~self._index.is_crowd).sum())
        return (
            f"{len(self)} images, {int((counts == 0).sum())} of them without objects;"
            f" {int(counts.sum())} objects, {without_segmentation} of them without a segmentation;"
            f" at most {int(counts.max(initial=0))} in one image"
        )


class InstanceDatasets(dict[str, Any], HasLabelMap):
    """Splits by name, each an [`InstanceDataset`] or [`InstanceStream`], with one label map; `str` of it is a table.

    Raises:
        ValueError: there are no splits, or their label maps differ.
    """

    def __init__(self, splits: Mapping[str, InstanceDataset | InstanceStream]) -> None:
        super().__init__(splits)
        if not splits:
            raise ValueError("`splits` must contain at least one split, got none. Add one.")
        self._classes = common_label_map({name: split._classes for name, split in splits.items()})
        for name, split in splits.items():
            if split._classes != self._classes:
                raise ValueError(
                    f"all splits must have the same classes, {describe_classes(self._classes)}, got"
                    f" {describe_classes(split._classes)} in split {name!r}. Pass the same `label_map` to all of them."
                )

    def ignore_classes(self, names: Sequence[str]) -> "InstanceDatasets":
        """Return the splits without some classes, whose objects become regions in which detections are ignored.

        Neither training nor evaluation rewards or punishes detections of any class in these regions: they become crowds
        of each class.

        Example:
            >>> from transformers_rfdetr.data.dataset import InstanceDataset, InstanceDatasets
            >>> from transformers_rfdetr.data.synthetic import draw_dataset
            >>> images, coco = draw_dataset(4)
            >>> data = InstanceDatasets({"train": InstanceDataset(coco, images)}).ignore_classes(["tree"])
            >>> data.id2label
            {0: 'building', 1: 'car', 2: 'pool', 3: 'tank'}

        Args:
            names: Names of the classes.

        Raises:
            ValueError: a name is not that of a class, or no class is left.
        """
        if not names:
            return self
        ids = {name: category for category, name in self._classes.items()}
        if unknown := [name for name in names if name not in ids]:
            raise ValueError(f"ignored classes must be among {describe_classes(self._classes)}, got {unknown}.")
        ignored = {ids[name] for name in names}
        classes = {category: name for category, name in self._classes.items() if category not in ignored}
        if not classes:
            raise ValueError(f"at least one class must not be ignored, got {list(names)}. Ignore fewer classes.")
        splits: dict[str, InstanceDataset | InstanceStream] = {}
        for split_name, split in self.items():
            if isinstance(split, InstanceStream):
                reader = IgnoredClassRecords(split._reader, ignored, classes)
                splits[split_name] = InstanceStream(split.rows, reader, classes)
                continue
            records, index = IgnoredClassRecords(split._records, ignored, classes), AnnotationIndex(classes)
            deque(index.validated(map(records.record, range(len(split)))), maxlen=0)  # exhaust it to build the index
            splits[split_name] = InstanceDataset.from_index(index, records)
        return InstanceDatasets(splits)

    def __str__(self) -> str:
        counted = {name: split for name, split in self.items() if isinstance(split, InstanceDataset)}
        header = ["label", "name", "category id"]
        rows: list[list[object]] = [
            [label, self.id2label[label], category] for label, category in enumerate(self.category_ids)
        ]
        for name, split in counted.items():
            header += [f"{name} objects", "crowds", "images"]
            for row, count in zip(rows, split.counts().values(), strict=True):
                row += count
        lines = [
            f"{name}: {split.summary() if name in counted else 'streamed, not counted'}" for name, split in self.items()
        ]
        return "\n".join([format_table(header, rows, left=(1,)), *lines])


def as_instance_dataset(dataset: Any) -> Any:
    """Return a `Subset` or `ConcatDataset` of [`InstanceDataset`]s as one of them, and any other object unchanged.

    Image ids are kept if they are unique. Otherwise they are replaced by the index of the image.

    Raises:
        ValueError: the concatenated datasets have different classes.
    """
    places = None if isinstance(dataset, InstanceDataset) else _list_places(dataset)
    if not places:
        return dataset
    parts = {f"datasets[{number}]": part for number, part in enumerate({id(part): part for part, _ in places}.values())}
    index = AnnotationIndex(InstanceDatasets(parts)._classes)
    records = _SelectedRecords(places)
    deque(index.validated(records.record(i) for i in range(len(places))), maxlen=0)  # exhaust it to build the index
    return InstanceDataset.from_index(index, records)


def _list_places(dataset: Any) -> list[tuple[InstanceDataset, int]] | None:
    """Return the dataset and the index of each image in it, or None if the images are not those of InstanceDatasets."""
    if isinstance(dataset, InstanceDataset):
        return [(dataset, index) for index in range(len(dataset))]
    if isinstance(dataset, torch.utils.data.Subset):
        places = _list_places(dataset.dataset)
        return places and [places[int(index)] for index in dataset.indices]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [_list_places(part) for part in dataset.datasets]
        return None if None in parts else [place for part in parts for place in part]
    return None


class _SelectedRecords:
    """Records of other datasets, with the interface of [`PackedRecords`]."""

    def __init__(self, places: list[tuple[InstanceDataset, int]]) -> None:
        self.places = places
        ids = [dataset._records.record(index).get("image_id") for dataset, index in places]
        self.has_unique_ids = len(set(ids)) == len(ids)

    def record(self, index: int) -> dict[str, Any]:
        dataset, place = self.places[index]
        record = dataset._records.record(place)
        return record if self.has_unique_ids else {**record, "image_id": None}

    def image(self, index: int, record: Any) -> Any:
        dataset, place = self.places[index]
        return dataset._records.image(place, dataset._records.record(place))

    def encoded_image(self, index: int, record: Any) -> Any:
        dataset, place = self.places[index]
        return dataset._records.encoded_image(place, dataset._records.record(place))
