"""Write the predictions of a folder as a dataset that an annotation program opens, to correct them there."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.dataset import InstanceDataset
from ..data.outlines import editable_polygons
from ..data.writers.output import ImageObjects, dataset_images
from ..data.writers.write import write_annotations
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_io import read_rgb
from .image_list import InputImage
from .instances import Instances
from .prediction_files import class_names_of, coco_annotations


def save_predictions_as(
    folder: Path,
    format: str,
    images: Sequence[InputImage],
    config: RfDetrConfig,
    *,
    dataset: Any = None,
    split: str = "train",
) -> Path:
    """Write the predictions of a folder that is complete to FOLDER/FORMAT, and return that folder.

    Masks are polygons that can be edited, or RLE if no polygons draw exactly the same pixels. Images that could not be
    read, and instances without a pixel, are not written. A folder that exists is kept, because its annotations may
    have been corrected.

    Args:
        folder: The output folder of `predict_to_folder`.
        format: A format of `write_dataset`.
        images: The images that were predicted.
        config: The model's.
        dataset: The `InstanceDataset`, or sequence of PIL images, that `InputImage.source` indexes, instead of files.
        split: Split of the images in the written dataset.
    """
    target = folder / format
    if not target.exists():
        predicted = _predicted_images(folder, _read_images(images, dataset))
        write_annotations({split: predicted}, class_names_of(config), target, format=format)
    return target


def _read_images(images: Sequence[InputImage], dataset: Any) -> Iterator[tuple[str, ImageObjects]]:
    """Yield the name of each image in the predictions, and the image without objects."""
    if isinstance(dataset, InstanceDataset):
        yield from zip((image.name for image in images), dataset_images(dataset), strict=True)
        return
    for image in images:
        source = image.source if dataset is None else dataset[image.source]
        if dataset is None and source.startswith(("http://", "https://")):
            source = read_rgb(source)
        yield image.name, ImageObjects(source, image.name, (0, 0), [], image.id)


def _predicted_images(folder: Path, images: Iterator[tuple[str, ImageObjects]]) -> Iterator[ImageObjects]:
    with open(folder / "predictions.jsonl", encoding="utf-8") as lines:
        for line, (name, image) in zip(lines, images, strict=False):  # lines of earlier runs come last
            record = json.loads(line)
            if record["image"] != name:
                raise ValueError(f"{lines.name} must begin with the images, got {record['image']} for {name}")
            if "error" in record:
                continue
            instances = Instances.from_dict(record)
            objects = [_annotation(result) for result in coco_annotations(instances, 0)]
            yield image._replace(size=instances.image_size, objects=objects, is_predicted=True)


def _annotation(result: dict[str, Any]) -> dict[str, Any]:
    """Return a COCO annotation with a score as one that an annotation program can show and edit."""
    result = {**result, "description": f"score {result['score']:.2f}"}
    if "segmentation" in result:
        polygons = editable_polygons(result["segmentation"])
        result |= {"segmentation": polygons} if polygons is not None else {}
        del result["bbox"], result["area"]  # of the query, not of the mask
    return result
