"""Read the ground truth of an evaluation from the content of a COCO JSON, or from objects given image by image."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from transformers.utils import logging

from ..model.masks import read_segmentation, to_rle
from ..model.validation import are_numbers, error_context, require, to_builtin
from .mask_records import Objects, PackedMasks, empty_rle

logger = logging.get_logger(__name__)

_MAX_IDS_SHOWN = 5  # in an error


@dataclass
class GroundTruth:
    """Categories, image sizes and objects.

    Attributes:
        category_names: Category id -> name; a name that several categories have is followed by the id.
        sizes: Image id -> (H, W), or None while it is unknown.
        objects: Image id -> objects, for images that have any.
    """

    category_names: dict[int, str]
    sizes: dict[int, tuple[int, int] | None]
    objects: dict[int, Objects]

    @property
    def has_masks(self) -> bool:
        """Return whether any object has a mask."""
        return any(objects.masks is not None for objects in self.objects.values())

    def objects_of(self, image_id: int) -> Objects:
        """Return the objects of an image, which may have none."""
        none = Objects(np.empty(0, np.int64), np.empty(0, bool), np.empty(0), np.empty((0, 4)), None)
        return self.objects.get(image_id, none)

    @classmethod
    def from_coco(cls, coco: Mapping[str, Any]) -> "GroundTruth":
        """Read the content of a COCO JSON; see `InstanceSegmentationEvaluator` for its fields and the errors."""
        if missing := [key for key in ("images", "annotations", "categories") if key not in coco]:
            raise ValueError(f"`coco` must have the keys images, annotations and categories, but {missing} are missing")
        ground_truth = cls(_read_categories(coco["categories"]), _read_sizes(coco["images"]), {})
        num_ignored = num_without_mask = num_empty_boxes = 0
        for image_id, annotations in ground_truth._group_by_image(coco["annotations"]).items():
            read = [ground_truth._read_object(image_id, annotation) for annotation in annotations]
            objects = [one for one in read if one is not None]
            num_ignored += len(read) - len(objects)
            if not objects:
                continue
            labels, is_crowd, areas, boxes, rles = zip(*objects, strict=True)
            num_without_mask += rles.count(None)
            num_empty_boxes += sum(min(box[2:]) <= 0 for box in boxes)
            ground_truth.objects[image_id] = Objects(
                np.array(labels, np.int64),
                np.array(is_crowd, bool),
                np.array(areas, np.float64),
                np.array(boxes, np.float64),
                PackedMasks.pack(rles, ground_truth.sizes[image_id]) if any(rles) else None,
            )
        if num_ignored:
            logger.warning(f"{num_ignored} annotations have neither a mask nor a box and are ignored.")
        if num_without_mask and ground_truth.has_masks:
            logger.warning(
                f"{num_without_mask} annotations have a box but no mask: they count in the bbox metrics, and detections"
                " inside them are ignored in the segm metrics."
            )
        if num_empty_boxes:
            logger.warning(
                f"{num_empty_boxes} annotations have a box without an area and count as missed in bbox metrics, as in"
                " pycocotools. Correct or remove them."
            )
        return ground_truth

    def _group_by_image(self, annotations: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
        """Return annotations by image id; ValueError if one refers to an unknown image or category."""
        grouped: dict[int, list[Mapping[str, Any]]] = {}
        unknown: dict[str, list[Any]] = {"image_id": [], "category_id": []}
        for annotation in annotations:
            ids = {field: to_builtin(annotation.get(field)) for field in unknown}
            for field, known in (("image_id", self.sizes), ("category_id", self.category_names)):
                if ids[field] not in known:
                    unknown[field].append((to_builtin(annotation.get("id")), ids[field]))
            grouped.setdefault(ids["image_id"], []).append(annotation)
        for field, pairs in unknown.items():
            if pairs:
                raise ValueError(
                    f"the {field} of each annotation must exist in the ground truth, got {len(pairs)} unknown ones,"
                    f" (annotation id, {field}): {pairs[:_MAX_IDS_SHOWN]}. Add the entries or drop the annotations."
                )
        return grouped

    def _read_object(self, image_id: int, annotation: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return category id, crowd flag, area, box and RLE (or None) of an annotation; None without mask and box."""
        with error_context(f"image {image_id}, annotation {to_builtin(annotation.get('id'))}"):
            box, area = (to_builtin(annotation.get(field)) for field in ("bbox", "area"))
            is_valid = box is None or are_numbers(box, 4)
            require(is_valid, "bbox", box, "four finite numbers [x, y, width, height]")
            is_valid = area is None or (are_numbers([area], 1) and area >= 0)
            require(is_valid, "area", area, "a number of at least 0")
            rle = self._read_mask(image_id, annotation.get("segmentation"))
        if box is None:
            if rle is None:
                return None
            box = coco_mask.toBbox(rle).tolist()
        if area is None:
            area = float(coco_mask.area(rle)) if rle else max(0.0, box[2] * box[3])
        return to_builtin(annotation["category_id"]), bool(to_builtin(annotation.get("iscrowd"))), area, box, rle

    def _read_mask(self, image_id: int, segmentation: Any) -> dict[str, Any] | None:
        """Return a `segmentation` in any form as RLE, or None if there is no mask.

        A mask may have no pixel: pycocotools counts its object too. RLE tells the size of an image that has none.
        """
        if self.sizes[image_id] is None and isinstance(segmentation, Mapping) and "size" in segmentation:
            height, width = to_builtin(segmentation["size"])
            self.sizes[image_id] = (int(height), int(width))
        size = self.sizes[image_id]
        if size is None and segmentation is not None and len(segmentation):
            raise ValueError("polygons require `height` and `width` of the image. Add them to its entry in images")
        shape = read_segmentation(segmentation, size or (0, 0))
        if shape is None:
            return empty_rle(size) if isinstance(segmentation, Mapping) else None
        return to_rle(shape, size)


def coco_from_images(
    references: Iterable[Mapping[str, Any]], labels: Iterable[int], class_names: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Return ground truth that is given image by image as the content of a COCO JSON.

    Args:
        references: For each image `image_id`, `height`, `width` and `objects`, COCO annotations without `image_id`.
            A repeated image is ignored.
        labels: Category ids of the detections, which may have no object.
        class_names: Category id -> name; the id is the default name.
    """
    images: dict[Any, Mapping[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for reference in references:
        image_id = reference["image_id"]
        if image_id not in images:
            images[image_id] = {"id": image_id, "height": reference["height"], "width": reference["width"]}
            annotations += [{**annotation, "image_id": image_id} for annotation in reference["objects"]]
    names = class_names or {}
    categories = sorted({*names, *labels, *(annotation["category_id"] for annotation in annotations)})
    return {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": category, "name": names.get(category, str(category))} for category in categories],
    }


def _read_categories(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    pairs = [(to_builtin(category["id"]), str(category.get("name", category["id"]))) for category in categories]
    _check_unique("category", [category_id for category_id, _ in pairs])
    counts = Counter(name for _, name in pairs)
    return {category_id: name if counts[name] == 1 else f"{name} (id {category_id})" for category_id, name in pairs}


def _read_sizes(images: Iterable[Mapping[str, Any]]) -> dict[int, tuple[int, int] | None]:
    entries = [[to_builtin(image.get(field)) for field in ("id", "height", "width")] for image in images]
    _check_unique("image", [image_id for image_id, _, _ in entries])
    return {image_id: (int(height), int(width)) if height and width else None for image_id, height, width in entries}


def _check_unique(kind: str, ids: list[Any]) -> None:
    repeated = [one for one, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f"{kind} ids must be unique; {len(repeated)} are repeated: {repeated[:_MAX_IDS_SHOWN]}")
