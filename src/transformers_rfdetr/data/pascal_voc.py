"""Read the instance masks of Pascal VOC: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html.

`SegmentationObject/a.png` has one value for each object, `SegmentationClass/a.png` the class of each pixel. CVAT
("Segmentation mask 1.1") and Datumaro write both as color images, with the colors of the classes in `labelmap.txt`.
Boxes in `Annotations` are not read. [`find_voc_folders`] recognises the layout, [`read_voc`] reads it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .annotation_files import AnnotatedFiles, AnnotatedImage, ImageLocator, SourceFiles
from .geometry import check_size
from .image_files import IMAGE_SUFFIXES, upright_size
from .instance_maps import IndexImage, MapObject, find_objects, read_index_image
from .label_maps import canonical_split_name
from .text_files import read_text

_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)  # of the values 1 to 20
_VOID = 255  # pixels that belong to no object and not to the background
_VOID_COLOR = 224 << 16 | 224 << 8 | 192
_MIN_SHARE = 0.9  # of the pixels of an object that have its class


def find_voc_folders(files: SourceFiles) -> list[Path]:
    """Return the folders of a source that contain `SegmentationObject` and `SegmentationClass` with PNG files."""
    folders = {path.parent for path in files.with_suffix(".png")}
    found = {folder.parent for folder in folders if folder.name == "SegmentationObject"}
    return sorted(folder for folder in found if folder / "SegmentationClass" in folders)


def read_voc(files: SourceFiles, folders: Sequence[Path], image_folder: Any) -> AnnotatedFiles:
    """Read the masks that `ImageSets/Segmentation/train.txt`, val.txt, ... list, or all if there are no lists.

    Void pixels (255, or 224, 224, 192 of color images) belong to no object.
    """
    locator = ImageLocator(files.root, image_folder)
    result = AnnotatedFiles(files.source, locator.folder)
    for folder, of_folder in zip(
        folders, files.splits_of([folder / "labelmap.txt" for folder in folders]), strict=True
    ):
        masks = {
            path.relative_to(folder / "SegmentationObject").with_suffix("").as_posix(): path
            for path in files.with_suffix(".png")
            if path.is_relative_to(folder / "SegmentationObject")
        }
        classes = _Classes(folder)
        result.class_names |= classes.defined
        images = _ImagesByStem(files, folder, locator)
        listed = _image_sets(files, folder, of_folder) or {of_folder: sorted(masks)}
        for split, stems in listed.items():
            for stem in logging.tqdm(stems, desc=f"Reading masks of {split}", unit=" images", delay=2):
                if stem in masks:
                    result.add_images([split], [_read_image(masks[stem], folder, images.name(stem), locator, classes)])
        everywhere = {stem for stems in listed.values() for stem in stems}
        for missing, text in (
            (everywhere - masks.keys(), "listed images have no file in SegmentationObject"),
            (masks.keys() - everywhere, "files of SegmentationObject are in no list"),
        ):
            if missing:
                result.notes.append(f"{folder}: {len(missing)} {text} and are not read, such as {min(missing)!r:.80}.")
    return result


def _image_sets(files: SourceFiles, folder: Path, of_folder: str) -> dict[str, list[str]]:
    """Return the names of the images of each split."""
    sets: dict[str, list[str]] = {}
    parent = folder / "ImageSets" / "Segmentation"
    paths = {path.stem: path for path in files.with_suffix(".txt") if path.parent == parent}
    if {"train", "val"} & paths.keys():
        paths.pop("trainval", None)  # both
    for name, path in paths.items():
        split = of_folder if name in ("default", "trainval") else canonical_split_name(name)
        sets.setdefault(split, []).extend(filter(None, map(str.strip, read_text(path).splitlines())))
    return sets


class _ImagesByStem:
    """The images of a folder of VOC, by their names without suffix."""

    def __init__(self, files: SourceFiles, folder: Path, locator: ImageLocator) -> None:
        self._default = folder / "JPEGImages"
        base = locator.folder if locator.is_given else self._default
        paths = SourceFiles(base).paths if locator.is_given else files.paths
        self._names = {
            path.relative_to(base).with_suffix("").as_posix(): path.relative_to(locator.folder).as_posix()
            for path in paths
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_relative_to(base)
        }
        self._missing = "" if locator.is_given else f"{self._default.relative_to(locator.folder).as_posix()}/"

    def name(self, stem: str) -> str:
        """Return the path of an image relative to the folder of the images."""
        return self._names.get(stem, f"{self._missing}{stem}.jpg")


class _Classes:
    """The names of the classes: those of `labelmap.txt`, or else the twenty of VOC."""

    def __init__(self, folder: Path) -> None:
        path = folder / "labelmap.txt"
        defined = [("background", _color(0)), *((name, _color(value)) for value, name in enumerate(_NAMES, start=1))]
        if path.is_file():
            lines = [line for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")]
            defined = [_read_class(line, index) for index, line in enumerate(lines)]
        self._by_value = {value: name for value, (name, _) in enumerate(defined) if name != "background"}
        self._by_color = {color: name for name, color in defined if name != "background"}
        # Most data without a file of classes have only some of the twenty.
        self.defined = set(self._by_color.values()) if path.is_file() else set()

    def name(self, value: int, image: IndexImage) -> str | None:
        """Return the name of the class that a value of a class image means; None for the background."""
        if image.is_color:
            return self._by_color.get(value)
        return self._by_color.get(image.palette.get(value, -1), self._by_value.get(value))


def _read_class(line: str, index: int) -> tuple[str, int]:
    """Return the name and the color of a line of `labelmap.txt`: name:red,green,blue:parts:actions."""
    name, _, rest = line.partition(":")
    color = [number.strip() for number in rest.partition(":")[0].split(",")]
    if len(color) != 3 or not all(number.isdecimal() and len(number) < 4 for number in color):
        return name.strip(), _color(index)
    red, green, blue = map(int, color)
    return name.strip(), red << 16 | green << 8 | blue


def _color(index: int) -> int:
    """Return the color that VOC gives a value: its bits, in turn for red, green and blue, are their highest bits."""
    return sum(
        (index >> (3 * bit + channel) & 1) << (7 - bit + 8 * (2 - channel)) for bit in range(8) for channel in range(3)
    )


def _read_image(path: Path, folder: Path, name: str, locator: ImageLocator, classes: _Classes) -> AnnotatedImage:
    image = AnnotatedImage(name)
    with image.collect_problem(str(path)):
        image.size = upright_size(locator.folder / name) if locator.contains(name) else _size_of_mask(path)
        objects = read_index_image(path, image.size)
        class_path = folder / "SegmentationClass" / path.relative_to(folder / "SegmentationObject")
        class_image = read_index_image(class_path, image.size)
        void = _VOID_COLOR if objects.is_color else _VOID if objects.values.max() <= _VOID else 0
        for found in find_objects(objects.values, (0, void)):
            with image.collect_problem(f"{path}: value {found.value}"):
                image.objects.append((_class_of(found, class_image, classes), found.geometry(image.size)))
    return image


def _size_of_mask(path: Path) -> tuple[int, int]:
    height, width = upright_size(path)
    return check_size(height, width)


def _class_of(found: MapObject, image: IndexImage, classes: _Classes) -> str:
    """Return the class that nearly all pixels of an object have in the class image."""
    values, counts = np.unique(image.values[found.rows, found.columns][found.mask], return_counts=True)
    is_void = values == (_VOID_COLOR if image.is_color else _VOID)
    if is_void.all():
        raise ValueError("an object must have a class, got only void pixels in SegmentationClass. Draw its class.")
    values, counts = values[~is_void], counts[~is_void]
    value = int(values[counts.argmax()])
    name = classes.name(value, image)
    if name is None or counts.max() < _MIN_SHARE * counts.sum():
        shown = {
            int(v): f"{classes.name(int(v), image)} ({n} pixels)" for v, n in zip(values[:6], counts, strict=False)
        }
        raise ValueError(f"an object must have one class in SegmentationClass, got {shown}. Correct the images.")
    return name
