"""Write annotated images in one of the formats, and say what it cannot hold."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...atomic_files import atomic_directory
from ...model.masks import has_segmentation, read_segmentation
from ...model.validation import error_context, require, to_builtin
from ..annotation_records import check_annotations, with_box_and_area
from ..dataset import InstanceDataset, InstanceDatasets, as_instance_dataset
from ..image_files import upright_size
from ..label_maps import canonical_split_name, validate_classes
from ..output_folder import check_output_folder
from .coco import write_coco
from .cvat import write_cvat
from .hub import write_hub
from .label_studio import write_label_studio
from .labelme import write_labelme
from .output import ImageObjects, Output, Splits, dataset_images
from .yolo import write_yolo

WRITERS = {
    "coco": write_coco,
    "yolo": write_yolo,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "label-studio": write_label_studio,
    "hub": write_hub,
}


def write_dataset(
    dataset: Any, folder: str | os.PathLike[str], *, format: str = "coco", copy_images: bool = False
) -> Path:
    """Write a dataset to a new folder, which `load_instance_dataset` reads as the same images and objects.

    Polygons stay polygons and RLE stays exact. What a format cannot hold is counted in warnings. Folders that all
    images of a split are in are removed from their names.

    Example:
        >>> import tempfile
        >>> from transformers_rfdetr import InstanceDataset, load_instance_dataset, write_dataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset
        >>> images, coco = draw_dataset(2)
        >>> folder = write_dataset(InstanceDataset(coco, images), f"{tempfile.mkdtemp()}/roofs", format="yolo")
        >>> load_instance_dataset(folder)["train"].num_objects() == len(coco["annotations"])
        True

    Args:
        dataset: What `load_instance_dataset` returns, except streams; or one of its splits, which is written as
            "train".
        folder: A new or empty folder.
        format: One of
            * "coco": JSON beside the images, as Roboflow exports it;
            * "yolo": a data.yaml, and text files with polygons and boxes. RLE becomes a polygon around its pixels, and
              the parts of an object are joined to one polygon, as are holes. Crowd regions are not written;
            * "labelme": a JSON for each image. RLE becomes a `mask`;
            * "cvat": the XML of CVAT for images 1.1. RLE becomes a `mask`;
            * "label-studio": tasks to import and the labeling interface. RLE and objects of several parts become
              brushes;
            * "hub": Parquet files for `datasets.load_dataset`, which contain the images.
        copy_images: Whether to copy images. By default they are hard links where possible: editing one changes both.

    Returns:
        The folder.

    Raises:
        ValueError: `format` is unknown, `folder` is not empty, a name cannot be written, or an image cannot be read or
            has another size than declared.
        ImportError: "hub" requires the library `datasets`.
    """
    given = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    splits = {name: as_instance_dataset(split) for name, split in given.items()}
    for split in splits.values():
        rule = "what `load_instance_dataset` returns without streaming=True"
        require(isinstance(split, InstanceDataset), "dataset", split, rule)
    data = InstanceDatasets(splits)
    images = {name: dataset_images(split) for name, split in data.items()}
    return write_annotations(images, data.classes, folder, format=format, copy_images=copy_images)


def write_annotations(
    splits: Splits,
    classes: Mapping[int, str],
    folder: str | os.PathLike[str],
    *,
    format: str = "coco",
    copy_images: bool = False,
) -> Path:
    """Write images with their objects, such as predictions; see [`write_dataset`].

    The field `description` of an object is written where the program shows it: in labelme and Label Studio, and as an
    attribute in CVAT.

    Args:
        splits: The images of each split; they are iterated over once.
        classes: Names by category id.
        folder: A new or empty folder.
        format: See [`write_dataset`].
        copy_images: See [`write_dataset`].
    """
    require(format in WRITERS, "format", format, f"one of {list(WRITERS)}")
    folder = Path(folder).expanduser()
    check_output_folder("folder", folder, must_be_empty=True)
    named: dict[str, Iterable[ImageObjects]] = {}
    classes = validate_classes(classes)
    with atomic_directory(folder) as partial:
        output = Output(partial, copy_images)
        for name, images in splits.items():
            split = canonical_split_name(name)
            require(split not in named, "splits", list(splits), "different splits", "Rename one.")
            named[split] = (_prepared(image, classes, output) for image in images)
        WRITERS[format](named, classes, output)
    output.warn(folder)
    return folder


def _prepared(image: ImageObjects, classes: Mapping[int, str], output: Output) -> ImageObjects:
    """Return an image with objects whose masks are polygons or compressed RLE, with box, area and `iscrowd`.

    Raises:
        ValueError: the image cannot be opened or has another size, or an object is invalid.
    """
    with error_context(f"image {image.file_name!r:.200}"):
        size = upright_size(image.image)
        require(size == image.size, "size", image.size, f"(height, width) of the upright image, {size}", "Correct it.")
        check_annotations(image.objects, classes)
        objects = [_prepare_object(item, size, output) for item in image.objects]
    return image._replace(objects=[item for item in objects if item is not None])


def _prepare_object(item: Mapping[str, Any], size: tuple[int, int], output: Output) -> dict[str, Any] | None:
    given = item.get("segmentation")
    segmentation = read_segmentation(given, size)
    result = {name: to_builtin(value) for name, value in item.items() if name != "segmentation"}
    if isinstance(segmentation, dict):
        result["segmentation"] = {"size": list(size), "counts": segmentation["counts"].decode("ascii")}
    elif segmentation is not None:
        result["segmentation"] = [polygon.tolist() for polygon in segmentation]
    result = {**with_box_and_area(result, size), "iscrowd": int(result.get("iscrowd") or 0)}
    if result.get("bbox") is None:
        output.note("objects without a box and without a pixel are not written.")
        return None
    if segmentation is None and has_segmentation(given):
        output.note("masks without a pixel are written as boxes without a mask.")
    return result
