"""Compute COCO's average precision of masks and boxes, and mean IoU, image by image.

Axis letters: K detections of an image, T IoU thresholds, R recalls, H W pixels of the image.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from ..model.validation import error_context, is_integer, require, to_builtin
from .coco_summary import (
    COCO_MAX_DETECTIONS,
    average_over_recall,
    detection_limits,
    mean_of_present,
    summarize,
    summarize_class,
)
from .confidence import confidence_intervals, per_image
from .ground_truth import GroundTruth, coco_from_images
from .mask_iou import count_pixels
from .mask_records import Detections, pack_detections
from .matching import ClassTable, class_tables, match_image, precision_and_recall

logger = logging.get_logger(__name__)

_MAX_IDS_SHOWN = 5  # in an error message


class InstanceSegmentationEvaluator:
    """Compute COCO's average precision of masks and boxes, and mean IoU, from detections that are added image by image.

    Detections are matched with the objects when an image is added. For each image it keeps the RLE of the detections
    and a few arrays: about 25 KB for 100 simple masks. The mask logits of rf-detr-seg-medium would be 9 MB.

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
        >>> metrics = evaluator.compute()
        >>> round(metrics["segm_AP50"], 6), metrics["mean_iou"], metrics["per_class"]["building"]["num_objects"]
        (1.0, 0.9, 1)

    Args:
        coco: Ground truth, the content of a COCO JSON: `images` (`id`, `height`, `width`; not needed with RLE masks),
            `annotations` (`image_id`, `category_id`, and `segmentation` in any form or `bbox`; missing `area`, `bbox`
            and `iscrowd` are derived, `id` is not read) and `categories` (`id`, `name`). It is not changed.
            Objects count as in pycocotools, also those whose mask has no pixel or whose box has no area.
            Annotations with neither a mask nor a box are ignored; those with a box but no mask count in the bbox
            metrics, and in the segm metrics detections inside their box are ignored. Warnings count both. The objects
            of images that are never passed to `update` count as missed.
        iou_score_threshold: Detections with a score above it count in the mean IoU; in [0, 1].
        max_detections: Number of detections per image and category for additional metrics, such as `segm_AP_300`, for
            images with more than 100 objects. COCO's metrics count 100.

    Raises:
        ValueError: ids are repeated or unknown, a mask or box is invalid, or the size of an image is missing.
    """

    def __init__(
        self,
        coco: Mapping[str, Any],
        *,
        iou_score_threshold: float = 0.5,
        max_detections: int = COCO_MAX_DETECTIONS,
    ) -> None:
        require(0 <= iou_score_threshold <= 1, "iou_score_threshold", iou_score_threshold, "in [0, 1]")
        rule = "an integer of at least 1"
        require(is_integer(max_detections) and max_detections >= 1, "max_detections", max_detections, rule)
        self.max_detections = max_detections
        self.iou_score_threshold = iou_score_threshold
        self.ground_truth = GroundTruth.from_coco(coco)
        self._limits = detection_limits(max_detections)
        self._has_warned = False
        self.reset()

    def __len__(self) -> int:
        """Return the number of images passed to `update`."""
        return len(self._detections)

    @property
    def has_masks(self) -> bool:
        """Return whether ground truth and detections have masks, so that there are metrics of masks."""
        return self.ground_truth.has_masks and self._detections_have_masks is not False

    @property
    def highest_score(self) -> float | None:
        """Return the highest score of all detections, or None if there are none."""
        return max(
            (detections.scores.max() for detections in self._detections.values() if len(detections.scores)),
            default=None,
        )

    def reset(self) -> None:
        """Discard all detections. The ground truth is kept."""
        self._detections: dict[int, Detections] = {}
        self._detections_have_masks: bool | None = None  # None if there are no detections

    def update(self, image_id: int, *, scores: Any, labels: Any, masks: Any = None, boxes: Any = None) -> None:
        """Add the detections of an image. The best 100 of each category are kept, or `max_detections` if that is more.

        A repeated image is ignored, with one warning: samplers pad by repeating images.

        Args:
            image_id: An id of the ground truth.
            scores: (K,) floats. Lists, arrays and tensors are accepted.
            labels: (K,) category ids of the ground truth.
            masks: K COCO RLEs (counts as str, bytes or runs), or (K, H, W) bool, of the image's size.
            boxes: (K, 4) boxes_xyxy in pixels of the image; by default those of the masks. Without masks only the
                bbox metrics are computed.

        Raises:
            ValueError: an image or category is unknown, lengths differ, a mask has another size, a score or box is not
                finite, or only some images have masks.
        """
        image_id = self._check_image_id(image_id)
        if image_id in self._detections:
            if not self._has_warned:
                logger.warning(f"image {image_id} is repeated and ignored; further repeats are ignored silently.")
            self._has_warned = True
            return
        with error_context(f"image {image_id}"):
            size = self.ground_truth.sizes[image_id]
            self._add(image_id, pack_detections(scores, labels, masks, boxes, size, self.max_detections))

    def state(self) -> dict[int, Detections]:
        """Return the detections by image id: small, and picklable for `merge` in another process."""
        return dict(self._detections)

    def merge(self, state: Mapping[int, Detections]) -> None:
        """Add the `state()` of an evaluator of the same ground truth with the same settings.

        If both have an image, one of the two records is kept, the same in whatever order states are merged. Errors are
        those of `update`.
        """
        for image_id, detections in state.items():
            image_id = self._check_image_id(image_id)
            if image_id in self._detections:
                detections = min(detections, self._detections[image_id], key=Detections.sort_key)
            with error_context(f"image {image_id}"):
                self._add(image_id, detections)

    def predictions(self, kind: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the kept detections as rows for `COCO.loadRes`, which can be saved as JSON.

        From the rows of one kind, COCOeval of pycocotools computes the metrics of this kind that [`compute`] returns.
        Mask rows have no boxes, because `loadRes` would take the areas from the boxes.

        Args:
            kind: "segm" for rows of `image_id`, `category_id`, `score` and `segmentation` (RLE); "bbox" for rows with
                `bbox` [x, y, width, height] instead of the mask. By default "segm" if ground truth and detections
                have masks.
        """
        if kind is None:
            kind = "segm" if self.has_masks else "bbox"
        is_valid = kind == "bbox" or (kind == "segm" and self._detections_have_masks is not False)
        require(is_valid, "kind", kind, '"bbox", or "segm" for detections with masks')
        for image_id, detections in sorted(self._detections.items()):
            if kind == "bbox":
                shapes = [{"bbox": box} for box in detections.boxes.tolist()]
            else:
                rles = [] if detections.masks is None else detections.masks.rles(range(len(detections.labels)))
                shapes = [{"segmentation": {**rle, "counts": rle["counts"].decode()}} for rle in rles]
            fields = (detections.labels.tolist(), detections.scores.tolist(), shapes)
            for label, score, shape in zip(*fields, strict=True):
                yield {"image_id": image_id, "category_id": label, "score": score, **shape}

    def compute(self, confidence: float | None = None) -> dict[str, Any]:
        """Return the metrics of all images.

        Args:
            confidence: Level of confidence intervals in (0, 1), such as 0.95; none by default.

        Returns:
            Floats in [0, 1], or -1 where the ground truth has no object, as in pycocotools:

            * `segm_AP, segm_AP50, segm_AP75, segm_AP_small, segm_AP_medium, segm_AP_large, segm_AR_1, segm_AR_10,
              segm_AR_100, segm_AR_small, segm_AR_medium, segm_AR_large`, and the same with `bbox_`: COCO's twelve;
            * `mean_iou` and `mean_iou_class_blind`, see [`mean_iou`];
            * `per_class`, class name -> `segm_AP`, `segm_AP50`, `bbox_AP`, `iou` and `num_objects`, the number of
              objects that are not crowd regions. If several classes have the same name, the id is added to it.
            * with `confidence`, `intervals`: see [`confidence.confidence_intervals`].

            Without masks in the detections or in the ground truth, only the bbox metrics.
        """
        intervals = {} if confidence is None else {"intervals": confidence_intervals(per_image(self), confidence)}
        metrics = self.average_precision()
        per_class = metrics.pop("per_class")
        if self.has_masks:
            metrics |= self.mean_iou()
            for name, class_metrics in metrics.pop("per_class").items():
                per_class[name] |= class_metrics
        return {**metrics, "per_class": per_class, **intervals}

    def average_precision(self) -> dict[str, Any]:
        """Return average precision and recall, the part of [`compute`] that COCOeval computes."""
        per_class: dict[str, dict[str, Any]] = {name: {} for name in self.ground_truth.category_names.values()}
        metrics: dict[str, Any] = {}
        for kind in ("segm", "bbox") if self.has_masks else ("bbox",):
            results = [
                average_over_recall(precision_and_recall(table, self._limits), self._limits)
                for table in self.class_tables(kind).values()
            ]
            metrics |= {f"{kind}_{name}": value for name, value in summarize(results, self.max_detections).items()}
            for class_metrics, (precision, _) in zip(per_class.values(), results, strict=True):
                class_metrics |= summarize_class(precision, kind, self.max_detections)
        counts = Counter(
            label
            for objects in self.ground_truth.objects.values()
            for label in objects.labels[~objects.is_crowd].tolist()
        )
        for category, name in self.ground_truth.category_names.items():
            per_class[name]["num_objects"] = counts[category]
        return {**metrics, "per_class": per_class}

    def precision_curves(self) -> dict[str, np.ndarray]:
        """Return the precision over recall of each class that has an object, by name: of masks, otherwise of boxes.

        Returns:
            (T, R) float64 in [0, 1] of COCOeval: at the IoU thresholds 0.5, 0.55, ..., 0.95, the best precision where
            at least recall 0, 0.01, ..., 1 is reached, and 0 where it is not. The mean of all is the class's AP.
        """
        curves = {}
        for name, table in self.class_tables().items():
            result = precision_and_recall(table, [COCO_MAX_DETECTIONS])
            if result is not None:
                curves[name] = result[0][:, :, 0, 0]
        return curves

    def class_tables(self, kind: str | None = None) -> dict[str, ClassTable]:
        """Return how the detections of each class match its objects, by name: of masks, otherwise of boxes, by default.

        Indices of images are those of `sorted(ground_truth.sizes)`.
        """
        kind = kind or ("segm" if self.has_masks else "bbox")
        names, image_ids = self.ground_truth.category_names, sorted(self.ground_truth.sizes)
        tables = class_tables(list(names), image_ids, self.ground_truth.objects, self._detections, kind)
        return {names[category]: table for category, table in tables.items()}

    def pixels_of(self, image_id: int) -> dict[int | None, np.ndarray]:
        """Return the pixels of an image by category for mean IoU; see [`mask_iou.count_pixels`]."""
        if image_id in self._detections:
            return self._detections[image_id].matches.pixels
        size, objects = self.ground_truth.sizes[image_id], self.ground_truth.objects.get(image_id)
        return dict(count_pixels(size, objects, None, self.iou_score_threshold))

    def mean_iou(self) -> dict[str, Any]:
        """Return the mean intersection over union, as in semantic segmentation, at the images' own sizes.

        For a class c and an image let P be the union of the predicted masks of c with a score above
        `iou_score_threshold` (among those that are kept), G the union of the masks of its objects, and X the pixels
        of its crowd regions without an object of c. Numerator and denominator are summed over all images before the
        division:

            iou(c) = sum |P & G| / sum |(P | G) - X|

        Returns:
            `mean_iou`, the mean of iou(c) over the classes with a pixel in the ground truth; `mean_iou_class_blind`,
            the same with all categories as one; `per_class`, class name -> `iou`, -1 without a pixel.

        Raises:
            ValueError: there are boxes only.
        """
        if not self.has_masks:
            raise ValueError(
                "`mean_iou` requires masks in the ground truth and in `update`, got boxes only. Call"
                " `average_precision`."
            )
        pixels: dict[int | None, np.ndarray] = {
            category: np.zeros(3, np.int64) for category in (*self.ground_truth.category_names, None)
        }
        for image_id in self.ground_truth.sizes:
            for category, counts in self.pixels_of(image_id).items():
                pixels[category] += counts
        ious = {
            category: float(intersection / union) if num_pixels else -1.0
            for category, (intersection, union, num_pixels) in pixels.items()
        }
        class_blind = ious.pop(None)
        return {
            "mean_iou": mean_of_present(np.array(list(ious.values()))),
            "mean_iou_class_blind": class_blind,
            "per_class": {name: {"iou": ious[category]} for category, name in self.ground_truth.category_names.items()},
        }

    def _check_image_id(self, image_id: Any) -> int:
        image_id = to_builtin(image_id)
        rule = f"one of the {len(self.ground_truth.sizes)} image ids of the ground truth"
        require(image_id in self.ground_truth.sizes, "image_id", image_id, rule)
        return image_id

    def _add(self, image_id: int, detections: Detections) -> None:
        if unknown := set(detections.labels.tolist()) - set(self.ground_truth.category_names):
            raise ValueError(
                f"`labels` must be category ids of the ground truth, {list(self.ground_truth.category_names)}, got"
                f" {sorted(unknown)[:_MAX_IDS_SHOWN]}. Map the model's labels to category ids."
            )
        has_masks = detections.masks is not None
        if len(detections.labels):
            if self._detections_have_masks not in (None, has_masks):
                here, elsewhere = ("masks", "boxes only") if has_masks else ("boxes only", "masks")
                raise ValueError(
                    f"either all images or none must have masks, got {here} after {elsewhere}. Pass masks for all"
                    " images."
                )
            self._detections_have_masks = has_masks
        if detections.masks is not None:
            self.ground_truth.sizes[image_id] = detections.masks.size
        if detections.matches is None:
            matches = match_image(
                self.ground_truth.objects_of(image_id),
                detections,
                self.ground_truth.sizes[image_id],
                has_masks=self.ground_truth.has_masks and (has_masks or not len(detections.labels)),
                score_threshold=self.iou_score_threshold,
            )
            detections = detections._replace(matches=matches)
        self._detections[image_id] = detections


def evaluator_from_rows(
    predictions: Sequence[Mapping[str, Any]],
    references: Sequence[Mapping[str, Any]],
    class_names: Mapping[int, str] | None = None,
    **settings: Any,
) -> InstanceSegmentationEvaluator:
    """Return an evaluator of ground truth and detections that are given as one row per image.

    Args:
        predictions: For each image `image_id`, and `scores`, `labels` and `masks` as for `update`.
        references: See [`coco_from_images`].
        class_names: Category id -> name; the id is the default name.
        **settings: Keyword arguments of the evaluator.
    """
    labels = {label for row in predictions for label in row["labels"]}
    evaluator = InstanceSegmentationEvaluator(coco_from_images(references, labels, class_names), **settings)
    for row in predictions:
        evaluator.update(row["image_id"], scores=row["scores"], labels=row["labels"], masks=row["masks"])
    return evaluator
