"""A split as it was read, before its values are checked: images, their annotations, and ids that are unique.

Each entry gets the id that it has in a repaired copy. Problems of ids and of image files are found here.
"""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...model.validation import are_numbers, is_index
from ..box_layout import BoxLayout
from ..coco import category_name, image_name
from .findings import DROPPED, Problem


@dataclass
class RawImage:
    """An entry of `images` with its annotations, and with the ids that they have in a repaired copy."""

    entry: dict[str, Any]
    id: Any
    file_name: Any
    source: Any  # a path, or a function that returns a path, the bytes of a file or a PIL image; None: no file
    copy_id: Any
    is_copied: bool = True
    annotations: list[dict[str, Any]] = field(default_factory=list)
    annotation_copy_ids: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def label(self) -> Any:
        """The file name, or else the id."""
        return self.id if self.file_name is None else self.file_name

    def copied_entry(self, size: tuple[int, int], folder: Path) -> dict[str, Any]:
        """Return the entry for a repaired copy: size (H, W), and the name relative to the image folder."""
        name = os.path.relpath(os.path.join(folder, self.file_name), folder)
        return self.entry | {"id": self.copy_id, "file_name": name, "height": size[0], "width": size[1]}

    def drop(self, kind: str, detail: str, extent: str = "") -> None:
        """Note a problem that keeps the image out of a repaired copy."""
        self.problems.append(Problem(kind, detail, change=f"{DROPPED}{extent}"))
        self.is_copied = False


@dataclass
class RawSplit:
    """The categories and images of a split, and the problems that do not belong to one image."""

    name: str
    folder: Path | None  # of the image files; None for rows of the library datasets
    categories: list[dict[str, Any]] = field(default_factory=list)  # those with a usable id
    classes: dict[int, str] = field(default_factory=dict)  # names by category id
    ambiguous_ids: set[int] = field(default_factory=set)  # category ids whose class cannot be decided
    group_ids: set[int] = field(default_factory=set)  # categories that only group others
    images: list[RawImage] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    other_keys: dict[str, Any] = field(default_factory=dict)  # info, licenses, ...

    def note(self, kind: str, detail: str, annotation_id: Any = None, change: str | None = DROPPED) -> None:
        """Add a problem."""
        self.problems.append(Problem(kind, detail, annotation_id, change))

    def check_box_layout(self, images: Iterable[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> None:
        """Remove all boxes if those of images, given as annotations and entry, have another layout than COCO."""
        layout = BoxLayout()
        for annotations, entry in images:
            layout.add(annotations, (entry.get("height"), entry.get("width")))
        if error := layout.error():
            self.note("box_layout", error, change="boxes removed")
            for annotation in (annotation for image in self.images for annotation in image.annotations):
                annotation.pop("bbox", None)

    def copied_head(self) -> dict[str, Any]:
        """Return what a repaired copy has of the split, with empty lists of images and annotations."""
        usable = [entry for entry in self.categories if entry["id"] not in self.ambiguous_ids | self.group_ids]
        categories = [entry | {"name": category_name(entry)} for entry in usable]
        return {**self.other_keys, "images": [], "annotations": [], "categories": categories}

    def used_category_ids(self) -> set[int]:
        """Return the category ids of the annotations, also those that are not defined."""
        given = (as_index(annotation.get("category_id")) for image in self.images for annotation in image.annotations)
        return {category_id for category_id in given if category_id is not None}


# (position, entry of `images`) -> the source of the image, and the problem with it
FindSource = Callable[[int, Mapping[str, Any]], tuple[Any, Problem | None]]


def build_split(name: str, coco: Mapping[str, Any], folder: Path | None, find_source: FindSource) -> RawSplit:
    """Sort COCO's three lists, which may hold any values, into images with their annotations, and problems."""
    other_keys = {key: coco[key] for key in coco.keys() - {"images", "annotations", "categories"}}
    split = RawSplit(name, folder, other_keys=other_keys)
    for category in coco["categories"]:
        category_id = as_index(category.get("id")) if isinstance(category, Mapping) else None
        if category_id is not None:
            split.categories.append(category | {"id": category_id})
        if category_id is None or not is_index(category["id"]):
            change = DROPPED if category_id is None else f"id {category_id}"
            split.note("invalid_category", f"{category!r:.80}", change=change)
    by_id, same_id_pairs = _add_images(split, coco["images"], find_source)
    _attach_annotations(split, coco.get("annotations") or [], by_id)
    new_ids = free_ids(by_id)
    for first, second in same_id_pairs:
        detail = f"{first.id!r:.40} is also {first.file_name!r:.80}"
        if first.annotations:  # which belong to either of the two files
            first.is_copied = False
            second.drop("duplicate_image_id", detail, ", both images with their annotations")
        else:
            second.copy_id = next(new_ids)
            second.problems.append(Problem("duplicate_image_id", detail, change=f"id {second.copy_id}"))
    split.check_box_layout((image.annotations, image.entry) for image in split.images)
    return split


def _add_images(
    split: RawSplit, entries: Iterable[Any], find_source: FindSource
) -> tuple[dict[Any, RawImage], list[tuple[RawImage, RawImage]]]:
    """Add the images to the split; return them by id, and the pairs of different files with the same id."""
    by_id: dict[Any, RawImage] = {}
    by_name: dict[str, RawImage] = {}
    same_id_pairs = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            split.note("invalid_image", f"entry {position} is {entry!r:.60}")
            continue
        source, problem = find_source(position, entry)
        image = RawImage(dict(entry), entry.get("id"), image_name(entry), source, copy_id=entry.get("id"))
        split.images.append(image)
        if problem is not None:
            image.problems.append(problem)
            image.is_copied = source is not None
            image.file_name = image.file_name if source is None else os.path.relpath(source, split.folder)
        if not _is_image_id(image.id):
            image.drop("invalid_image_id", f"id {image.id!r:.40}")
            continue
        first, name = by_id.setdefault(image.id, image), _normalized_name(image)
        if first is not image and name is not None and _normalized_name(first) == name:
            image.drop("duplicate_image_id", f"the entry with id {image.id!r:.40} is repeated")
            image.source = None
        elif first is not image:
            same_id_pairs.append((first, image))
        elif name is not None and by_name.setdefault(name, image) is not image:
            detail = f"image {by_name[name].id!r:.40} has the same file"
            image.problems.append(Problem("duplicate_file_name", detail))
    return by_id, same_id_pairs


def _attach_annotations(split: RawSplit, annotations: Sequence[Any], by_id: Mapping[Any, RawImage]) -> None:
    """Add each annotation to its image, with an id that is unique in a repaired copy."""
    given = (annotation.get("id") for annotation in annotations if isinstance(annotation, Mapping))
    new_ids = free_ids({annotation_id for annotation_id in given if is_index(annotation_id)})
    taken: set[int] = set()
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, Mapping):
            split.note("invalid_annotation", f"entry {position} is {annotation!r:.60}")
            continue
        annotation_id, image_id = annotation.get("id"), annotation.get("image_id")
        image = by_id.get(image_id) if _is_image_id(image_id) else None
        if image is None:
            image = by_id.get(_other_type(image_id))
            detail = f"image_id {image_id!r:.40} is not among {len(by_id)} images"
            if image is None:
                split.note("annotation_of_missing_image", detail, annotation_id)
                continue
            detail += f", but {image.id!r:.40} is"
            split.note("annotation_of_missing_image", detail, annotation_id, f"image_id {image.id!r:.40}")
        copy_id = annotation_id
        if not is_index(annotation_id) or annotation_id == 0 or annotation_id in taken:
            copy_id = next(new_ids)
            is_valid = is_index(annotation_id) and annotation_id != 0
            kind = "duplicate_annotation_id" if is_valid else "invalid_annotation_id"
            image.problems.append(Problem(kind, f"id {annotation_id!r:.40}", annotation_id, f"id {copy_id}"))
        taken.add(copy_id)
        image.annotations.append(dict(annotation))
        image.annotation_copy_ids.append(copy_id)


def _normalized_name(image: RawImage) -> str | None:
    return os.path.normpath(image.file_name) if isinstance(image.file_name, str) else None


def _is_image_id(value: Any) -> bool:
    return isinstance(value, str) or are_numbers([value], 1)


def as_index(value: Any) -> int | None:
    """Return a whole number of at least 0, also from 3.0 or "3"; None for anything else."""
    is_numeral = isinstance(value, str) and value.isdecimal() and len(value) < 20
    if is_numeral or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return int(value) if is_index(value) else None


def _other_type(image_id: Any) -> Any:
    """Return a number as a string and a string as a number; None for anything else."""
    return str(image_id) if is_index(image_id) else as_index(image_id)


def free_ids(taken: Collection[Any]) -> Iterator[int]:
    """Yield whole numbers from 1 on that are not taken."""
    return (number for number in itertools.count(1) if number not in taken)
