"""What the writers of all formats have in common: image files and their names, exact polygons, and lost details."""

import itertools
import os
import posixpath
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask
from transformers.utils import logging

from ...model.coco_labels import clip_box
from ...model.image_io import open_image, read_rgb
from ...model.masks import box_and_area, read_segmentation, to_rle
from ..dataset import InstanceDataset
from ..image_files import is_image_name

logger = logging.get_logger(__name__)

_MAX_BOX_DIFFERENCE = 2  # pixels between a box and its mask, which is drawn with an error of up to one pixel
_SPLITS = ("train", "validation", "test")
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}


class ImageObjects(NamedTuple):
    """An image to write, and its objects."""

    image: Any  # a path, the bytes of an image file, or a PIL image
    file_name: str  # relative to the folder of the split
    size: tuple[int, int]  # (H, W), upright
    objects: list[dict[str, Any]]  # COCO annotations with the category ids of the classes
    image_id: int | None = None  # by default the index of the image
    is_predicted: bool = False  # whether the objects are predictions, which nobody has looked at


Splits = Mapping[str, Iterable[ImageObjects]]


def dataset_images(dataset: InstanceDataset) -> Iterator[ImageObjects]:
    """Yield the images of a dataset, without the folders that all of them are in."""
    names = [_normalized(name) for name in dataset.names_of(dataset.image_ids())]
    folders = {posixpath.dirname(name) for name in names}
    is_relative = not any(name.startswith(("/", "../")) for name in names)
    shared = posixpath.commonpath(folders) if folders and is_relative else ""
    for index, (fields, annotations) in enumerate(dataset.annotated_images()):
        name = posixpath.relpath(_normalized(fields.get("file_name") or f"{fields['image_id']:06d}"), shared or ".")
        size = (fields["height"], fields["width"])
        yield ImageObjects(dataset.encoded_image(index), name, size, annotations, fields["image_id"])


def _normalized(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


@dataclass
class Output:
    """The folder that a dataset is written to.

    Args:
        folder: An empty folder.
        copy_images: Whether to copy image files instead of linking them.
    """

    folder: Path
    copy_images: bool = False
    _lost: Counter[str] = field(default_factory=Counter)
    _taken: set[str] = field(default_factory=set)  # comparable paths of the images

    def note(self, text: str, count: int = 1) -> None:
        """Count a detail that the format cannot hold; `text` follows the number in the warning."""
        self._lost[text] += count

    def warn(self, folder: str | os.PathLike[str]) -> None:
        """Log the numbers of lost details."""
        for text, count in self._lost.items():
            logger.warning(f"{folder}: {count} {text}")

    def name_image(self, image: ImageObjects, folder: Path, *, by_stem: bool = False) -> str:
        """Return the path of an image in a folder, which no other image has.

        Args:
            image: The image.
            folder: The folder.
            by_stem: Whether images may not differ only in their suffixes, since their annotation files have another.
        """
        wanted = PurePosixPath(clean_name(image.file_name))
        if isinstance(image.image, PIL.Image.Image):
            wanted = wanted.with_suffix(".png")
        elif not is_image_name(wanted.name):
            wanted = wanted.with_name(wanted.name + _suffix_of(image.image))
        for number in itertools.count(1):
            path = wanted.with_stem(f"{wanted.stem}_{number}") if number > 1 else wanted
            comparable = _comparable(folder / (path.with_suffix("") if by_stem else path))
            if comparable not in self._taken:
                self._taken.add(comparable)
                if number > 1 or clean_name(image.file_name) != image.file_name:
                    self.note("images have new names, because theirs cannot be used or another image has it.")
                return str(path)
        raise AssertionError("numbers do not end")

    def place_image(self, image: ImageObjects, folder: Path, *, by_stem: bool = False) -> Path:
        """Write an image file, and return its path; see [`name_image`]."""
        path = folder / self.name_image(image, folder, by_stem=by_stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image.image, str | os.PathLike) and not self.copy_images:
            link_or_copy(image.image, path)
        elif isinstance(image.image, str | os.PathLike):
            shutil.copyfile(image.image, path)
        else:
            path.write_bytes(image_bytes(image.image))
        return path

    def note_occluded(self, image: ImageObjects) -> None:
        """Count the objects of an image that are marked as occluded, if the format has no such mark."""
        if count := sum(bool(item.get("occluded")) for item in image.objects):
            self.note("marks of occluded objects are not written.", count)

    def note_boxes(self, image: ImageObjects) -> None:
        """Count the boxes of an image that are not those of their masks; a format without both loses them."""
        for item in image.objects:
            if "segmentation" in item:
                mask_box, _ = box_and_area(read_segmentation(item["segmentation"], image.size), image.size)
                pairs = zip(clip_box(item["bbox"], image.size), clip_box(mask_box, image.size), strict=True)
                if max(abs(one - other) for one, other in pairs) > _MAX_BOX_DIFFERENCE:
                    self.note("boxes are replaced by those of their masks, which differ by more than 2 pixels.")


def clean_name(name: str) -> str:
    """Return a relative path with /, without hidden files and folders, and without unprintable characters."""
    parts = [part for part in posixpath.normpath(name.replace("\\", "/")).split("/") if part not in ("", ".", "..")]
    printable = ("".join(letter if letter.isprintable() else "_" for letter in part) for part in parts)
    return "/".join(f"_{part[1:]}" if part.startswith(".") else part for part in printable) or "_"


def _comparable(path: Path) -> str:
    """Return what is equal for the names of one file on any operating system."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _suffix_of(image: Any) -> str:
    """Return the suffix of a file or its bytes, by the format of the content."""
    with open_image(BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return _SUFFIXES.get(opened.format, f".{opened.format.lower()}")


def image_bytes(image: Any) -> bytes:
    """Return the file of an image: a path, bytes, or a PIL image, which is encoded as PNG."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, PIL.Image.Image):
        file = BytesIO()
        read_rgb(image).save(file, "PNG")
        return file.getvalue()
    return Path(image).read_bytes()


def link_or_copy(source: str | os.PathLike[str], target: Path) -> None:
    """Make a hard link to a file, or copy it to another disk or to a file system without hard links."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


# Objects


def mask_of(item: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the mask of an object in an image of `size` (H, W) as compressed RLE."""
    return to_rle(read_segmentation(item["segmentation"], size), size)


def polygons_of(item: Mapping[str, Any], size: tuple[int, int]) -> list[np.ndarray] | None:
    """Return the polygons (P, 2) of an object, rounded as they are read.

    None if its mask is RLE, or if rounding changes it.
    """
    if isinstance(item["segmentation"], Mapping):
        return None
    rounded = [np.round(polygon, 3) for polygon in item["segmentation"]]
    mask = mask_of(item, size)
    if coco_mask.area(mask) and to_rle(rounded, size)["counts"] != mask["counts"]:
        return None
    return [polygon.reshape(-1, 2) for polygon in rounded]


# Names


def check_class_names(classes: Mapping[int, str], program: str) -> None:
    """Raise ValueError for a class name that the files of a program cannot hold."""
    for name in classes.values():
        if not name.strip() or name != name.strip() or any(unicodedata.category(letter)[0] == "C" for letter in name):
            raise ValueError(
                f"class names for {program} must not be empty, begin or end with a space, or have control characters,"
                f" got {name!r:.60}. Rename the class, or write COCO."
            )


def check_split_names(splits: Iterable[str], program: str) -> None:
    """Raise ValueError for a split that the files of a program cannot name."""
    for split in splits:
        if split not in _SPLITS:
            raise ValueError(
                f"splits for {program} must be train, validation and test, got {split!r:.60}. Rename the split, or"
                " divide the images anew with split_dataset (--split)."
            )
