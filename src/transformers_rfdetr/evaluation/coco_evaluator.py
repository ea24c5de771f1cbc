"""COCO's average precision of masks and boxes, and mean IoU, streamed: of each image a compact record is kept.

Axis letters: K detections (or objects) of an image, C categories, T IoU thresholds, A ranges of area, L limits of the
number of detections, Q queries, H W pixels of the picture, h w cells of the mask head. Sizes are (height, width).
RLE is COCO's. The numbers are those of `pycocotools.cocoeval.COCOeval`, which computes them.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, redirect_stdout
from typing import Any, NamedTuple

import numpy as np
import PIL.ImageOps
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers.utils import logging

from ..model.masks import box_and_area, mask_areas, read_segmentation, region_to_rle, upsample_masks
from ..model.post_processing_rf_detr import read_target_sizes, select_detections, valid_size
from ..model.validation import are_numbers, error_context, to_builtin

logger = logging.get_logger(__name__)

# COCO looks at no more detections of an image and a category.
MAX_DETECTIONS = 100
# COCO's ranges of area in the order of COCOeval.
_AREAS = ("", "_small", "_medium", "_large")
_LIMITS = (1, 10, MAX_DETECTIONS)
_AT_50, _AT_75 = 0, 5  # among COCO's IoU thresholds 0.5, 0.55, ..., 0.95
_CURVE = (10, len(_AREAS))  # T, A
_NUM_NAMED = 5  # ids that an error names
_BACKENDS = (None, "pycocotools", "faster-coco-eval")


class PackedMasks(NamedTuple):
    """The RLE counts of K masks of an image in one string: no Python object for each."""

    size: tuple[int, int]
    counts: bytes
    offsets: np.ndarray  # (K + 1,) int64; where two are equal there is no mask

    @classmethod
    def pack(cls, rles: Sequence[dict[str, Any] | None], size: tuple[int, int]) -> "PackedMasks":
        """K compressed RLEs of one size, None where there is no mask."""
        counts = [b"" if rle is None else rle["counts"] for rle in rles]
        return cls(size, b"".join(counts), np.cumsum([0, *map(len, counts)]))

    def rles(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Those of the masks as COCO RLE, counts as bytes."""
        bounds = [(self.offsets[index], self.offsets[index + 1]) for index in indices]
        return [{"size": list(self.size), "counts": self.counts[start:end]} for start, end in bounds]


class Detections(NamedTuple):
    """What is kept of the K detections of an image, best first."""

    scores: np.ndarray  # (K,) float64
    labels: np.ndarray  # (K,) int64, category ids
    boxes: np.ndarray  # (K, 4) float64, [x, y, width, height] in pixels
    masks: PackedMasks | None  # None for boxes alone, and without a detection


class _Objects(NamedTuple):
    """The K objects of the ground truth of an image."""

    labels: np.ndarray  # (K,) int64, category ids
    is_crowd: np.ndarray  # (K,) bool
    areas: np.ndarray  # (K,) float64, pixels
    boxes: np.ndarray  # (K, 4) float64, [x, y, width, height] in pixels
    masks: PackedMasks | None  # None where the image has none

    @property
    def has_mask(self) -> np.ndarray:
        """(K,) bool."""
        return np.zeros(len(self.labels), bool) if self.masks is None else np.diff(self.masks.offsets) > 0


class InstanceSegmentationEvaluator:
    """Average precision of masks and boxes as COCO computes it, and mean IoU, of a data set that passes image by image.

    Whatever the data set's size, an image costs the RLE of its detections and a few arrays: 100 simple masks come to
    some 20 KB, where the mask logits of rf-detr-seg-medium are 9 MB.

    Example:
        >>> import numpy as np
        >>> from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator
        >>> square = [[10, 10, 30, 10, 30, 30, 10, 30]]
        >>> evaluator = InstanceSegmentationEvaluator(
        ...     {
        ...         "images": [{"id": 7, "height": 40, "width": 40}],
        ...         "annotations": [{"image_id": 7, "category_id": 1, "segmentation": square}],
        ...         "categories": [{"id": 1, "name": "building"}],
        ...     }
        ... )
        >>> mask = np.zeros((40, 40), bool)
        >>> mask[10:30, 10:28] = True
        >>> evaluator.update(7, scores=[0.9], labels=[1], masks=[mask])
        >>> numbers = evaluator.compute()
        >>> round(numbers["segm_AP50"], 6), numbers["mean_iou"], numbers["per_class"]["building"]["num_objects"]
        (1.0, 0.9, 1)

    Args:
        coco: Ground truth as a COCO JSON holds it: `images` (`id`, and `height` and `width`, which only RLE does
            without), `annotations` (`image_id`, `category_id`, and `segmentation` in any form or `bbox`; `area`,
            `bbox` and `iscrowd` are derived where they are missing, ids are not looked at) and `categories` (`id`,
            `name`). It is read once, stays as it is and is not kept. Annotations with neither a mask nor a box that
            has an area are no objects; those with a box alone count in the bbox numbers. A warning counts both.
            All images count, also those that never come: their objects are missed.
        iou_score_threshold: Detections above this score make the mean IoU. A score in [0, 1].
        backend: "pycocotools" or "faster-coco-eval", which gives the same numbers sooner; by default the latter where
            it is installed.

    Raises:
        ValueError: ids that are there twice or refer to nothing, shapes that cannot be read, a missing size.
        ImportError: the backend is not installed.
    """

    def __init__(
        self, coco: Mapping[str, Any], *, iou_score_threshold: float = 0.5, backend: str | None = None
    ) -> None:
        if not 0 <= iou_score_threshold <= 1:
            raise ValueError(f"iou_score_threshold {iou_score_threshold} is no score in [0, 1]; 0.5 is usual")
        self.iou_score_threshold = iou_score_threshold
        self._coco_class, self._eval_class = _load_backend(backend)
        if missing := [key for key in ("images", "annotations", "categories") if key not in coco]:
            raise ValueError(f"the ground truth has no {missing}; pass what a COCO JSON of instances holds")
        self.category_names = _read_categories(coco["categories"])
        self._sizes = _read_images(coco["images"])
        self._objects = self._read_objects(coco["annotations"])
        self.truth_has_masks = any(objects.masks is not None for objects in self._objects.values())
        self._has_warned = False
        self.reset()

    def __len__(self) -> int:
        """Number of images that have come."""
        return len(self._detections)

    def reset(self) -> None:
        """Forget the detections; the ground truth stays."""
        self._detections: dict[int, Detections] = {}
        self._found_masks: bool | None = None  # None without a detection

    def update(self, image_id: int, *, scores: Any, labels: Any, masks: Any = None, boxes: Any = None) -> None:
        """Keep the detections of an image: of each category the best 100, all that COCO looks at.

        An image that has come already is left out, with one warning: samplers pad by repeating images.

        Args:
            image_id: One of the ground truth.
            scores: (K,) floats. Lists, arrays and tensors are taken alike.
            labels: (K,) category ids of the ground truth.
            masks: K COCO RLEs (counts as str, bytes or runs), or (K, H, W) bool, of the image's own size.
            boxes: (K, 4) boxes_xyxy in pixels of the image; those of the masks by default. Without masks only the
                bbox numbers are computed.

        Raises:
            ValueError: an unknown image or category; lengths that differ; a mask of another size; a score or box that
                is not finite; masks where other images have boxes alone.
        """
        image_id = self._known_image(image_id)
        if image_id in self._detections:
            if not self._has_warned:
                logger.warning(f"image {image_id} has come before and is left out; so are others, without a warning")
            self._has_warned = True
            return
        with error_context(f"image {image_id}"):
            self._add(image_id, pack_detections(scores, labels, masks, boxes, self._sizes[image_id]))

    def state(self) -> dict[int, Detections]:
        """What `update` has kept, by image: small, and picklable for `merge` in another process."""
        return dict(self._detections)

    def merge(self, state: Mapping[int, Detections]) -> None:
        """Take over the `state()` of an evaluator of the same ground truth.

        Of an image that both have one record stays, the same whatever the order of merging.

        Raises:
            ValueError: as `update`.
        """
        for image_id, found in state.items():
            image_id = self._known_image(image_id)
            if image_id in self._detections:
                found = min(found, self._detections[image_id], key=_bytes_of)
            with error_context(f"image {image_id}"):
                self._add(image_id, found)

    def predictions(self) -> Iterator[dict[str, Any]]:
        """The kept detections as COCO results, one dict each, which JSON takes.

        `image_id`, `category_id`, `score`, `bbox` [x, y, width, height] and, of masks, `segmentation` (RLE).
        """
        for image_id, found in sorted(self._detections.items()):
            rles = [] if found.masks is None else found.masks.rles(range(len(found.labels)))
            for index, (label, score, box) in enumerate(zip(found.labels, found.scores, found.boxes, strict=True)):
                result = {"image_id": image_id, "category_id": int(label), "score": float(score), "bbox": box.tolist()}
                if rles:
                    result["segmentation"] = {**rles[index], "counts": rles[index]["counts"].decode()}
                yield result

    def compute(self) -> dict[str, Any]:
        """The numbers of all images.

        Returns:
            Floats in [0, 1], or -1 where the ground truth has nothing to find, as pycocotools has it:
            * `segm_AP, segm_AP50, segm_AP75, segm_AP_small, segm_AP_medium, segm_AP_large, segm_AR_1, segm_AR_10,
              segm_AR_100, segm_AR_small, segm_AR_medium, segm_AR_large`, and the same with `bbox_`: COCO's twelve;
            * `mean_iou` and `mean_iou_class_blind`, see [`mean_iou`];
            * `per_class`, by name (with the id where names are the same): a dict of `segm_AP`, `segm_AP50`, `bbox_AP`,
              `iou` and `num_objects`, the number of objects that are no crowd.
            With boxes alone, or a ground truth without masks, only what is of boxes.
        """
        numbers = self.average_precision()
        per_class = numbers.pop("per_class")
        if self._has_masks():
            numbers |= self.mean_iou()
            for name, of_class in numbers.pop("per_class").items():
                per_class[name] |= of_class
        return {**numbers, "per_class": per_class}

    def average_precision(self) -> dict[str, Any]:
        """The part of [`compute`] that COCOeval computes, category by category."""
        images_of = self._images_of_categories()
        per_class: dict[str, dict[str, Any]] = {name: {} for name in self.category_names.values()}
        numbers: dict[str, Any] = {}
        for kind in ("segm", "bbox") if self._has_masks() else ("bbox",):
            results = [self._evaluate(category, images_of[category], kind) for category in self.category_names]
            precision = np.array([result[0] for result in results]).reshape(-1, *_CURVE)
            recall = np.array([result[1] for result in results]).reshape(-1, *_CURVE, len(_LIMITS))
            numbers |= {f"{kind}_{name}": number for name, number in _summarize(precision, recall).items()}
            for of_class, (of_category, _) in zip(per_class.values(), results, strict=True):
                of_class[f"{kind}_AP"] = _mean(of_category[:, 0])
                if kind == "segm":
                    of_class["segm_AP50"] = _mean(of_category[_AT_50, 0])
        counts = Counter(
            label for objects in self._objects.values() for label in objects.labels[~objects.is_crowd].tolist()
        )
        for category, name in self.category_names.items():
            per_class[name]["num_objects"] = counts[category]
        return {**numbers, "per_class": per_class}

    def precision_curves(self) -> dict[str, np.ndarray]:
        """Precision over recall of each class that has an object, by name: of masks, or of boxes where there are none.

        Returns:
            (T, R) float64 in [0, 1], COCOeval's: the best precision at COCO's IoU thresholds 0.5, 0.55, ..., 0.95 where
            at least recall 0, 0.01, ..., 1 is reached, and 0 where it is not. The mean of all is the class's AP.
        """
        kind, images_of, curves = "segm" if self._has_masks() else "bbox", self._images_of_categories(), {}
        for category, name in self.category_names.items():
            result = self._accumulate(category, images_of[category], kind)
            if result is not None:
                curves[name] = result["precision"][:, :, 0, 0, -1].copy()
        return curves

    def mean_iou(self) -> dict[str, Any]:
        """Mean intersection over union, as of semantic segmentation.

        Of a class c and an image let P be the union of the predicted masks of c with a score above
        `iou_score_threshold` (among the 100 that are kept), G the union of the masks of its objects, and X the pixels
        of its crowd regions where none of its objects is. Then, summed over all images before they are divided,

            iou(c) = sum |P & G| / sum |(P | G) - X|

        Returns:
            `mean_iou`, the mean of iou(c) over the classes of which the ground truth has a pixel;
            `mean_iou_class_blind`, the same with all categories taken as one; `per_class`, by name, with `iou`. -1 for
            classes of which the ground truth has no pixel. At the images' own sizes, in RLE.

        Raises:
            ValueError: there are boxes alone.
        """
        if not self._has_masks():
            raise ValueError("boxes alone have no mean IoU; pass masks, in the ground truth and to `update`")
        pixels: dict[int | None, np.ndarray] = {
            category: np.zeros(3, np.int64) for category in (*self.category_names, None)
        }
        for image_id in self._sizes:
            for category, counted in self._count_pixels(image_id):
                pixels[category] += counted
        ious = {
            category: float(intersection / union) if truth else -1.0
            for category, (intersection, union, truth) in pixels.items()
        }
        blind = ious.pop(None)
        return {
            "mean_iou": _mean(np.array(list(ious.values()))),
            "mean_iou_class_blind": blind,
            "per_class": {name: {"iou": ious[category]} for category, name in self.category_names.items()},
        }

    # Ground truth

    def _read_objects(self, annotations: Iterable[Mapping[str, Any]]) -> dict[int, _Objects]:
        """COCO annotations -> objects by image."""
        grouped: dict[int, list[Mapping[str, Any]]] = {}
        lost: dict[str, list[Any]] = {"image_id": [], "category_id": []}
        for annotation in annotations:
            ids = {field: to_builtin(annotation.get(field)) for field in lost}
            for field, known in (("image_id", self._sizes), ("category_id", self.category_names)):
                if ids[field] not in known:
                    lost[field].append((to_builtin(annotation.get("id")), ids[field]))
            grouped.setdefault(ids["image_id"], []).append(annotation)
        for field, pairs in lost.items():
            if pairs:
                raise ValueError(
                    f"{len(pairs)} annotations have an unknown {field}, (annotation, {field}): {pairs[:_NUM_NAMED]};"
                    " add what they refer to or leave them out"
                )
        num_shapeless = num_without_mask = 0
        objects = {}
        for image_id, of_image in grouped.items():
            read = [self._read_object(image_id, annotation) for annotation in of_image]
            fields = [one for one in read if one is not None]
            num_shapeless += len(read) - len(fields)
            if not fields:
                continue
            labels, is_crowd, areas, boxes, rles = zip(*fields, strict=True)
            num_without_mask += rles.count(None)
            objects[image_id] = _Objects(
                np.array(labels, np.int64),
                np.array(is_crowd, bool),
                np.array(areas, np.float64),
                np.array(boxes, np.float64),
                PackedMasks.pack(rles, self._sizes[image_id]) if any(rles) else None,
            )
        if num_shapeless:
            logger.warning(f"{num_shapeless} annotations have no usable shape: they are no objects and are left out")
        if num_without_mask and any(found.masks is not None for found in objects.values()):
            logger.warning(f"{num_without_mask} annotations have a box and no mask: they count in bbox numbers only")
        return objects

    def _read_object(self, image_id: int, annotation: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Category, crowd, area, box and RLE (or None) of an annotation, or None where there is no shape."""
        with error_context(f"image {image_id}, annotation {to_builtin(annotation.get('id'))}"):
            box, area = (to_builtin(annotation.get(field)) for field in ("bbox", "area"))
            if box is not None and not are_numbers(box, 4):
                raise ValueError(f"bbox {box!r:.60} is not [x, y, width, height], four finite numbers; correct it")
            if area is not None and not (are_numbers([area], 1) and area >= 0):
                raise ValueError(f"area {area!r:.60} is not a number of at least 0; correct it or leave it out")
            rle = self._read_mask(image_id, annotation.get("segmentation"))
        if box is None or min(box[2:]) <= 0:
            box = box_and_area(rle, self._sizes[image_id])[0] if rle else None
        if box is None or min(box[2:]) <= 0:
            return None
        if area is None:
            area = float(coco_mask.area(rle)) if rle else box[2] * box[3]
        return to_builtin(annotation["category_id"]), bool(to_builtin(annotation.get("iscrowd"))), area, box, rle

    def _read_mask(self, image_id: int, segmentation: Any) -> dict[str, Any] | None:
        """Any segmentation -> RLE, or None."""
        if self._sizes[image_id] is None and isinstance(segmentation, Mapping) and "size" in segmentation:
            height, width = to_builtin(segmentation["size"])
            self._sizes[image_id] = (int(height), int(width))
        size = self._sizes[image_id]
        if size is None and segmentation is not None and len(segmentation):
            raise ValueError("the image has no height and width, which polygons need; add them to its entry in images")
        shape = read_segmentation(segmentation, size or (0, 0))
        return coco_mask.merge(coco_mask.frPyObjects(shape, *size)) if isinstance(shape, list) else shape

    # Detections

    def _known_image(self, image_id: Any) -> int:
        known = to_builtin(image_id)
        if known not in self._sizes:
            raise ValueError(
                f"image id {known!r} is none of the {len(self._sizes)} of the ground truth; pass an id of its images"
            )
        return known

    def _add(self, image_id: int, found: Detections) -> None:
        if unknown := set(found.labels.tolist()) - set(self.category_names):
            raise ValueError(
                f"labels {sorted(unknown)[:_NUM_NAMED]} are no category ids of the ground truth, which has"
                f" {list(self.category_names)}; translate labels to category ids"
            )
        has_masks = found.masks is not None
        if len(found.labels):
            if self._found_masks not in (None, has_masks):
                here, elsewhere = ("masks", "boxes alone") if has_masks else ("boxes alone", "masks")
                raise ValueError(f"{here} where other images have {elsewhere}; pass the same of all images")
            self._found_masks = has_masks
        if found.masks is not None:
            self._sizes[image_id] = found.masks.size
        self._detections[image_id] = found

    def _has_masks(self) -> bool:
        return self.truth_has_masks and self._found_masks is not False

    # Numbers

    def _images_of_categories(self) -> dict[int, list[int]]:
        """Category -> the images with objects or detections of it, by id; no other image changes its numbers."""
        images_of: dict[int, list[int]] = {category: [] for category in self.category_names}
        for image_id in sorted(self._sizes):
            records = (self._objects.get(image_id), self._detections.get(image_id))
            labels = [record.labels for record in records if record is not None]
            for category in np.unique(np.concatenate(labels)).tolist() if labels else ():
                images_of[category].append(image_id)
        return images_of

    def _evaluate(self, category: int, image_ids: list[int], kind: str) -> tuple[np.ndarray, np.ndarray]:
        """AP (T, A), which is precision averaged over recall, and recall (T, A, L) of a category; -1 for nothing."""
        result = self._accumulate(category, image_ids, kind)
        if result is None:
            return np.full(_CURVE, -1.0), np.full((*_CURVE, len(_LIMITS)), -1.0)
        return result["precision"][:, :, 0, :, -1].mean(1), result["recall"][:, 0]

    def _accumulate(self, category: int, image_ids: list[int], kind: str) -> dict[str, np.ndarray] | None:
        """COCOeval's `precision` (T, R, 1, A, L) and `recall` (T, 1, A, L) of a category; None for nothing."""
        images, objects, detections = [], [], []
        for number, image_id in enumerate(image_ids, 1):
            height, width = self._sizes[image_id] or (0, 0)
            images.append({"id": number, "height": height, "width": width})
            objects += [{**one, "image_id": number} for one in self._objects_of(image_id, category, kind)]
            detections += [{**one, "image_id": number} for one in self._detections_of(image_id, category, kind)]
        if all(one["iscrowd"] for one in objects):
            return None
        with redirect_stdout(io.StringIO()):
            cocos = []
            for annotations in (objects, detections):
                # COCOeval takes a match with id 0 for none.
                for number, annotation in enumerate(annotations, 1):
                    annotation |= {"id": number, "category_id": category}
                cocos.append(self._coco_class())
                cocos[-1].dataset = {
                    "images": images,
                    "annotations": annotations,
                    "categories": [{"id": category}],
                }
                cocos[-1].createIndex()
            evaluation = self._eval_class(*cocos, kind)
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval

    def _objects_of(self, image_id: int, category: int, kind: str) -> list[dict[str, Any]]:
        """The objects of a category in an image as COCOeval reads them."""
        objects = self._objects.get(image_id)
        if objects is None:
            return []
        chosen = objects.labels == category
        if kind == "segm":
            chosen &= objects.has_mask
        indices = np.flatnonzero(chosen).tolist()
        found = [
            {"iscrowd": int(crowd), "area": area, "bbox": box}
            for crowd, area, box in zip(
                objects.is_crowd[indices], objects.areas[indices].tolist(), objects.boxes[indices].tolist(), strict=True
            )
        ]
        if kind == "segm" and indices:
            for one, rle in zip(found, objects.masks.rles(indices), strict=True):
                one["segmentation"] = rle
        return found

    def _detections_of(self, image_id: int, category: int, kind: str) -> list[dict[str, Any]]:
        """The detections of a category in an image as COCOeval reads them."""
        detections = self._detections.get(image_id)
        if detections is None:
            return []
        indices = np.flatnonzero(detections.labels == category).tolist()
        found = [
            {"score": score, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for score, box in zip(detections.scores[indices].tolist(), detections.boxes[indices].tolist(), strict=True)
        ]
        if kind == "segm" and indices:
            rles = detections.masks.rles(indices)
            for one, rle, area in zip(found, rles, mask_areas(rles).tolist(), strict=True):
                one |= {"segmentation": rle, "area": area}
        return found

    def _count_pixels(self, image_id: int) -> Iterator[tuple[int | None, np.ndarray]]:
        """Of each category in an image, and of all as one (None): pixels of intersection, union and ground truth."""
        size = self._sizes[image_id]
        objects, found = self._objects.get(image_id), self._detections.get(image_id)
        # By category: what is predicted, objects and crowd regions.
        parts: dict[int, tuple[list[dict[str, Any]], ...]] = defaultdict(lambda: ([], [], []))
        if found is not None and found.masks is not None:
            indices = np.flatnonzero(found.scores > self.iou_score_threshold).tolist()
            for label, rle in zip(found.labels[indices].tolist(), found.masks.rles(indices), strict=True):
                parts[label][0].append(rle)
        if objects is not None and objects.masks is not None:
            indices = np.flatnonzero(objects.has_mask).tolist()
            for index, rle in zip(indices, objects.masks.rles(indices), strict=True):
                parts[int(objects.labels[index])][1 + int(objects.is_crowd[index])].append(rle)
        for category, masks in parts.items():
            yield category, _overlap(size, *masks)
        if parts:
            of_all = ([rle for masks in parts.values() for rle in masks[kind]] for kind in range(3))
            yield None, _overlap(size, *of_all)


def pack_detections(scores: Any, labels: Any, masks: Any, boxes: Any, image_size: tuple[int, int] | None) -> Detections:
    """The detections of an image as `InstanceSegmentationEvaluator.update` takes them -> what is kept of them.

    `image_size` None takes the size of the first mask.
    """
    scores, labels = _read_numbers(scores, np.float64), _read_numbers(labels, np.int64)
    if boxes is not None:
        boxes = _read_numbers(boxes, np.float64)
    parts = {"scores": scores, "labels": labels, "masks": masks, "boxes": boxes}
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"different numbers of {lengths}; pass one of each for every detection")
    if not len(scores):
        return Detections(np.empty(0), np.empty(0, np.int64), np.empty((0, 4)), None)
    if scores.ndim != 1 or labels.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"scores {scores.tolist()!r:.60} are not one finite number a detection; leave the others out")
    if masks is None and boxes is None:
        raise ValueError(f"{len(scores)} detections have neither masks nor boxes; pass one of the two")

    best = best_of_each_class(scores, labels)
    packed = None
    if masks is not None:
        rles = []
        for index in best.tolist():
            with error_context(f"mask {index}"):
                rles.append(_read_detected_mask(masks[index], image_size))
            image_size = (rles[0]["size"][0], rles[0]["size"][1])
        packed = PackedMasks.pack(rles, image_size)
    if boxes is None:
        boxes_xywh = coco_mask.toBbox(rles)
    else:
        fine = boxes.shape == (len(scores), 4) and np.isfinite(boxes).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
        if not fine:
            raise ValueError(
                f"boxes {boxes.tolist()!r:.60} are not finite x0, y0, x1, y1 in pixels with x0 <= x1 and y0 <= y1;"
                " convert them"
            )
        boxes_xywh = np.concatenate([boxes[best, :2], boxes[best, 2:] - boxes[best, :2]], axis=1)
    return Detections(scores[best], labels[best], boxes_xywh, packed)


def _read_numbers(values: Any, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (values.double() if values.is_floating_point() else values).numpy(force=True)  # numpy has no bfloat16
    array = np.asarray(values)
    if array.size and array.dtype.kind not in ("iu" if dtype is np.int64 else "iuf"):
        kind = "whole numbers" if dtype is np.int64 else "numbers"
        raise ValueError(f"{array.tolist()!r:.60} are no {kind}; pass an array of them")
    return array.astype(dtype)


def _read_detected_mask(mask: Any, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """RLE or bitmap (H, W) -> RLE; other than an object, a detection may be empty."""
    if isinstance(mask, torch.Tensor):
        mask = mask.numpy(force=True)
    if not isinstance(mask, Mapping):
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.dtype.itemsize != 1:
            raise ValueError(f"{mask.dtype} of shape {mask.shape} is no mask; pass RLE, or bool of (height, width)")
    given = to_builtin(mask.get("size")) if isinstance(mask, Mapping) else list(mask.shape)
    if image_size is None and are_numbers(given, 2):
        image_size = (int(given[0]), int(given[1]))
    rle = read_segmentation(mask, image_size or (0, 0))
    return rle if isinstance(rle, dict) else _empty_rle(image_size)


def best_of_each_class(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores (K,), labels (K,) -> indices of the best 100 of each label, best first; ties stay in order."""
    order = np.argsort(-scores, kind="stable")
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, first, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    is_kept: np.ndarray = np.zeros(len(scores), bool)
    is_kept[by_class[np.arange(len(scores)) - np.repeat(first, count) < MAX_DETECTIONS]] = True
    return order[is_kept[order]]


def _bytes_of(found: Detections) -> tuple[bytes, ...]:
    arrays = (found.scores.tobytes(), found.labels.tobytes(), found.boxes.tobytes())
    return (*arrays, b"" if found.masks is None else found.masks.counts)


# Ground truth


def _read_categories(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Ids -> names, no two the same."""
    pairs = [(to_builtin(category["id"]), str(category.get("name", category["id"]))) for category in categories]
    _check_distinct("category", [category for category, _ in pairs])
    times = Counter(name for _, name in pairs)
    return {category: name if times[name] == 1 else f"{name} (id {category})" for category, name in pairs}


def _read_images(images: Iterable[Mapping[str, Any]]) -> dict[int, tuple[int, int] | None]:
    """Ids -> (H, W), or None where they are not given."""
    entries = [[to_builtin(image.get(field)) for field in ("id", "height", "width")] for image in images]
    _check_distinct("image", [image_id for image_id, _, _ in entries])
    return {image_id: (int(height), int(width)) if height and width else None for image_id, height, width in entries}


def _check_distinct(what: str, ids: list[Any]) -> None:
    repeated = [one for one, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} {what} ids are there twice: {repeated[:_NUM_NAMED]}; give each its own id")


def coco_of_images(
    references: Iterable[Mapping[str, Any]], labels: Iterable[int], class_names: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Ground truth that comes image by image -> as a COCO JSON holds it.

    Args:
        references: Of each image `image_id`, `height`, `width` and `objects`, COCO annotations without `image_id`. An
            image that comes again is left out.
        labels: Category ids of the detections, some of which no object may have.
        class_names: Names of categories; their ids by default.
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


def evaluator_of_rows(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str] | None = None,
    **settings: Any,
) -> InstanceSegmentationEvaluator:
    """An evaluator of ground truth and detections that come as rows, one of each for an image.

    Args:
        predictions: Of each image `image_id`, and `scores`, `labels` and `masks` as `update` takes them.
        references: See [`coco_of_images`].
        class_names: Names of categories; their ids by default.
        **settings: Of the evaluator.
    """
    labels = {label for row in predictions for label in row["labels"]}
    evaluator = InstanceSegmentationEvaluator(coco_of_images(references, labels, class_names), **settings)
    for row in predictions:
        evaluator.update(row["image_id"], scores=row["scores"], labels=row["labels"], masks=row["masks"])
    return evaluator


# Numbers


def _load_backend(backend: str | None) -> tuple[Any, Any]:
    """-> the classes COCO and COCOeval."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {_BACKENDS}; leave it out")
    if backend == "pycocotools":
        return COCO, COCOeval
    try:
        import faster_coco_eval
    except ImportError as error:
        if backend is None:
            return COCO, COCOeval
        raise ImportError("faster-coco-eval is not installed; pip install faster-coco-eval") from error
    return faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster


def number_names(has_masks: bool) -> list[str]:
    """What [`InstanceSegmentationEvaluator.compute`] calls its numbers."""
    empty = (np.zeros((1, *_CURVE)), np.zeros((1, *_CURVE, len(_LIMITS))))
    kinds = ("segm", "bbox") if has_masks else ("bbox",)
    names = [f"{kind}_{name}" for kind in kinds for name in _summarize(*empty)]
    return [*names, "mean_iou", "mean_iou_class_blind"] if has_masks else names


def _summarize(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """Average precision (C, T, A) and recall (C, T, A, L) of categories -> COCO's twelve numbers."""
    numbers = {
        "AP": _mean(precision[:, :, 0]),
        "AP50": _mean(precision[:, _AT_50, 0]),
        "AP75": _mean(precision[:, _AT_75, 0]),
    }
    numbers |= {f"AP{area}": _mean(precision[:, :, index]) for index, area in enumerate(_AREAS) if area}
    numbers |= {f"AR_{limit}": _mean(recall[:, :, 0, index]) for index, limit in enumerate(_LIMITS)}
    return numbers | {f"AR{area}": _mean(recall[:, :, index, -1]) for index, area in enumerate(_AREAS) if area}


def _mean(values: np.ndarray) -> float:
    """The mean of what is there, as `COCOeval.summarize`: -1 stands for what is not."""
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0


def _overlap(
    size: tuple[int, int], predicted: list[dict[str, Any]], objects: list[dict[str, Any]], crowds: list[dict[str, Any]]
) -> np.ndarray:
    """RLEs -> pixels (3,) int64: of the intersection, of the union without crowd regions, and of the ground truth."""
    found, truth, crowd = (coco_mask.merge([_empty_rle(size), *rles]) for rles in (predicted, objects, crowds))
    both, in_crowd = (coco_mask.merge([found, other], intersect=True) for other in (truth, crowd))
    in_all = coco_mask.merge([both, crowd], intersect=True)
    areas = coco_mask.area([found, truth, both, in_crowd, in_all]).astype(np.int64)
    # A crowd region is ignored where no object is: of the union it can only take what is predicted there.
    return np.array([areas[2], areas[0] + areas[1] - areas[2] - (areas[3] - areas[4]), areas[1]])


def _empty_rle(size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    return coco_mask.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)


# Models


@torch.no_grad()
def detect(
    outputs: Any,
    target_sizes: torch.Tensor | Sequence[Sequence[int]],
    *,
    score_threshold: float | None = None,
    pixel_mask: torch.Tensor | None = None,
) -> list[dict[str, Any]]:
    """Outputs of a model -> the detections that an evaluation looks at, as small as they can be.

    Those of `RfDetrImageProcessor.post_process_instance_segmentation`, but without a threshold: the best Q of all Q x C
    pairs of query and class, of each class at most 100. A mask at the picture's size lives until the next one.

    Args:
        outputs: Has `logits` (B, Q, C), `pred_boxes` (B, Q, 4), `boxes_cxcywh` in [0, 1], and `pred_masks`
            (B, Q, h, w), mask logits, or None.
        target_sizes: (height, width) of each picture.
        score_threshold: A score in [0, 1], to be exceeded.
        pixel_mask: (B, H, W), the model's input of that name, of padded images.

    Returns:
        For each image, best first, arrays `scores` (K,) float32, `labels` (K,) int64, `boxes` (K, 4) float32,
        `boxes_xyxy` in pixels inside the picture, and `masks`, a list of K COCO RLEs with counts as str, or None.

    Raises:
        ValueError: `target_sizes` is not one positive (height, width) for each image.
    """
    sizes = read_target_sizes(target_sizes if target_sizes is not None else [], len(outputs.logits))
    mask_logits = getattr(outputs, "pred_masks", None)
    results = []
    for index, size in enumerate(sizes):
        found = select_detections(outputs, index, -1.0 if score_threshold is None else score_threshold, size, None)
        scores, labels, queries, boxes = (part.numpy(force=True) for part in found)
        best = best_of_each_class(scores, labels)
        masks = None
        if mask_logits is not None:
            covered = None if pixel_mask is None else valid_size(pixel_mask[index], mask_logits.shape[-2:])
            regions = upsample_masks(mask_logits[index, torch.from_numpy(queries[best])], size, 0.0, covered)
            masks = [region_to_rle(region, top, left, size) for region, top, left in regions]
        results.append({"scores": scores[best], "labels": labels[best], "boxes": boxes[best], "masks": masks})
    return results


def category_of_labels(config: Any, dataset: Any) -> dict[int, int]:
    """A model's label -> the data set's own category id, by the class's name.

    Labels that are no category of the data set are not in it. Names are not compared where the model has the data
    set's own map, or none (`LABEL_0`, ...) and as many labels.

    Args:
        config: The model's, with `id2label`.
        dataset: An `InstanceDataset`: `id2label`, label -> name, and `category_ids`, label -> category id.

    Raises:
        ValueError: a category that the model does not know, or that is a name of several labels.
    """
    ours, theirs = dict(config.id2label), dict(dataset.id2label)
    unnamed = len(ours) == len(theirs) and all(name == f"LABEL_{label}" for label, name in ours.items())
    if unnamed or ours == theirs:
        return {label: dataset.category_ids[label] for label in theirs}
    times = Counter(ours.values())
    if wrong := sorted({name for name in theirs.values() if times[name] != 1}):
        raise ValueError(
            f"categories {wrong} of the data set are not the name of one label of the model, which has"
            f" {list(ours.values())}; pass id2label of the data set it was trained with, or rename the categories"
        )
    if repeated := [name for name, count in Counter(theirs.values()).items() if count > 1]:
        raise ValueError(f"several categories of the data set are named {repeated}; give each a name of its own")
    label_of = {name: label for label, name in ours.items()}
    return {label_of[name]: dataset.category_ids[label] for label, name in theirs.items()}


def with_categories(detections: Mapping[str, Any], category_of: Mapping[int, int]) -> dict[str, Any]:
    """What [`detect`] finds in an image -> arguments of the evaluator's `update`, without labels of no category.

    Args:
        detections: `scores` (K,), `labels` (K,), `boxes` (K, 4) and `masks`, a list of K or None.
        category_of: Label -> category id, see [`category_of_labels`].
    """
    kept = [index for index, label in enumerate(detections["labels"].tolist()) if label in category_of]
    masks = detections["masks"]
    return {
        "scores": detections["scores"][kept],
        "labels": [category_of[label] for label in detections["labels"][kept].tolist()],
        "boxes": detections["boxes"][kept],
        "masks": None if masks is None else [masks[index] for index in kept],
    }


def evaluate_instance_segmentation(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    score_threshold: float | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """A model's numbers on a data set, outside of training: those of `InstanceSegmentationEvaluator.compute`.

    Args:
        model: For instance segmentation, or for object detection, which has bbox numbers only. It is put into
            evaluation mode and on `device`, and back.
        processor: Its image processor.
        dataset: An `InstanceDataset`: samples with `image` and `image_id`, and `coco()`, `id2label`, `category_ids`.
        batch_size: Images at a time.
        score_threshold: A score that detections must exceed; by default all count, as in COCO.
        device: The model's by default.
        progress: Show a progress bar.

    Raises:
        ValueError: the model does not know a category of the data set.
    """
    evaluator = InstanceSegmentationEvaluator(dataset.coco())
    found_in = detect_in_dataset(
        model,
        processor,
        dataset,
        batch_size=batch_size,
        score_threshold=score_threshold,
        device=device,
        progress=progress,
    )
    with closing(found_in):
        for sample, found in found_in:
            evaluator.update(sample["image_id"], **found)
    return evaluator.compute()


def detect_in_dataset(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    score_threshold: float | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Generator[tuple[dict[str, Any], dict[str, Any]], None, None]:
    """A data set sample by sample, in its order, each with what a model finds as the evaluator's `update` takes it.

    The arguments are those of [`evaluate_instance_segmentation`]. Until the iterator ends or is closed, the model is in
    evaluation mode and on `device`.
    """
    category_of = category_of_labels(model.config, dataset)
    was_training, was_on = model.training, model.device
    model.eval().to(device or was_on)
    try:
        starts = range(0, len(dataset), batch_size)
        for start in logging.tqdm(starts, desc="Evaluating", disable=not progress):
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            images = [PIL.ImageOps.exif_transpose(sample["image"]) for sample in samples]
            inputs = processor(images, return_tensors="pt").to(model.device)
            with torch.no_grad():
                outputs = model(**inputs)
            sizes = [(image.height, image.width) for image in images]
            found = detect(outputs, sizes, score_threshold=score_threshold, pixel_mask=inputs.get("pixel_mask"))
            for sample, detections in zip(samples, found, strict=True):
                yield sample, with_categories(detections, category_of)
    finally:
        model.train(was_training).to(was_on)
