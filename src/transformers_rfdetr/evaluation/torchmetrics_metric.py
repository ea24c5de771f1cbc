"""The numbers of `metrics.py` as a torchmetrics metric, synchronised among processes by torchmetrics."""

import io
import itertools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from ..model.validation import error_context, to_builtin
from .coco_evaluator import InstanceSegmentationEvaluator
from .ground_truth import coco_from_images
from .mask_records import Detections, pack_detections

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError('this needs torchmetrics: pip install "transformers-rfdetr[train]"') from error


class InstanceSegmentationMetric(Metric):
    """COCO's average precision of masks and boxes, and mean IoU, in the form of torchmetrics' detection metrics.

    Ground truth and detections both come in `update`, as they do in `torchmetrics.detection.MeanAveragePrecision`; the
    numbers are those of `InstanceSegmentationEvaluator.compute`. Masks are kept as RLE.

    Example:
        >>> import torch
        >>> from transformers_rfdetr.evaluation.torchmetrics_metric import InstanceSegmentationMetric
        >>> masks = torch.zeros(1, 40, 40, dtype=torch.bool)
        >>> masks[0, 10:30, 10:30] = True
        >>> metric = InstanceSegmentationMetric(class_names={1: "building"})
        >>> metric.update(
        ...     [{"masks": masks, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}],
        ...     [{"masks": masks, "labels": torch.tensor([1])}],
        ... )
        >>> round(metric.compute()["per_class"]["building"]["segm_AP50"], 6)
        1.0

    Args:
        class_names: Names of the labels for `per_class`; without one a label is named by its number.
        iou_score_threshold: As of the evaluator.
        backend: As of the evaluator.
        **kwargs: As of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        class_names: Mapping[int, str] | None = None,
        *,
        iou_score_threshold: float = 0.5,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.class_names = dict(class_names or {})
        self.iou_score_threshold = iou_score_threshold
        self.backend = backend
        # Pickled records of images, one after the other, as uint8.
        self.add_state("records", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        # torchmetrics gives a process without any image an empty float tensor, which does not fit into the others'.
        self.records = [torch.empty(0, dtype=torch.uint8, device=self.device)]

    def update(self, preds: Sequence[Mapping[str, Any]], target: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            preds: Of each image `scores` (K,), `labels` (K,) and `masks` (K, H, W) bool or K COCO RLEs, or `boxes`
                (K, 4) boxes_xyxy in pixels, or both.
            target: Of each image `labels` (N,) and `masks` or `boxes` in the same forms; optionally `iscrowd` (N,),
                `area` (N,) and `image_id`, by which an image that comes again is known.

        Raises:
            ValueError: as `InstanceSegmentationEvaluator.update`.
        """
        if len(preds) != len(target):
            raise ValueError(f"{len(preds)} predictions for {len(target)} targets; pass one of each for every image")
        for index, (found, truth) in enumerate(zip(preds, target, strict=True)):
            with error_context(f"image {index}"):
                image_size = _image_size(truth.get("masks")) or _image_size(found.get("masks"))
                detections = pack_detections(
                    found["scores"], found["labels"], found.get("masks"), found.get("boxes"), image_size
                )
                reference = _read_target(truth, image_size)
            record = bytearray(pickle.dumps((reference, detections)))
            self.records.append(torch.frombuffer(record, dtype=torch.uint8).to(self.device))

    def compute(self) -> dict[str, Any]:
        """The numbers of all images, of all processes: see `InstanceSegmentationEvaluator.compute`."""
        records = list(self._read_records())
        named = [reference["image_id"] for reference, _ in records if reference["image_id"] is not None]
        numbers = itertools.count(max(named, default=0) + 1)
        for reference, _ in records:
            if reference["image_id"] is None:
                reference["image_id"] = next(numbers)
        labels = {label for _, detections in records for label in detections.labels.tolist()}
        coco = coco_from_images((reference for reference, _ in records), labels, self.class_names)
        evaluator = InstanceSegmentationEvaluator(
            coco, iou_score_threshold=self.iou_score_threshold, backend=self.backend
        )
        for reference, detections in records:
            evaluator.merge({reference["image_id"]: detections})
        return evaluator.compute()

    def _read_records(self) -> Iterator[tuple[dict[str, Any], Detections]]:
        parts = self.records if isinstance(self.records, list) else [self.records]  # synchronised: one tensor
        for part in parts:
            content = part.to("cpu", torch.uint8).numpy().tobytes()
            stream = io.BytesIO(content)
            while stream.tell() < len(content):
                yield pickle.load(stream)


def _image_size(masks: Any) -> tuple[int, int] | None:
    """(H, W) of masks in any form, or None."""
    if masks is None or not len(masks):
        return None
    size = masks[0]["size"] if isinstance(masks[0], Mapping) else masks[0].shape
    height, width = (int(side) for side in size)
    return height, width


def _read_target(target: Mapping[str, Any], image_size: tuple[int, int] | None) -> dict[str, Any]:
    """A target in torchmetrics' form -> the image and its objects in COCO's form, masks as RLE."""
    labels = _plain_list(target["labels"])
    optional = ("masks", "boxes", "iscrowd", "area")
    lengths = {name: len(target[name]) for name in ("labels", *optional) if target.get(name) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"different numbers of {lengths} in the target; pass one of each for every object")
    masks, boxes, crowds, areas = map(target.get, optional)
    objects: list[dict[str, Any]] = [{"category_id": label} for label in labels]
    if labels and masks is None and boxes is None:
        raise ValueError(f"{len(labels)} objects have neither masks nor boxes; pass one of the two")
    for index, one in enumerate(objects):
        if masks is not None:
            one["segmentation"] = _encode(masks[index])
        if boxes is not None:
            x0, y0, x1, y1 = _plain_list(boxes[index])
            one["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if crowds is not None:
            one["iscrowd"] = int(crowds[index])
        if areas is not None and float(areas[index]) > 0:  # torchmetrics derives it where it is 0
            one["area"] = float(areas[index])
    height, width = image_size or (None, None)
    return {"image_id": to_builtin(target.get("image_id")), "height": height, "width": width, "objects": objects}


def _encode(mask: Any) -> Any:
    """A mask (H, W) -> RLE, which stays as it is."""
    if isinstance(mask, Mapping):
        return mask
    if isinstance(mask, torch.Tensor):
        mask = mask.numpy(force=True)
    return coco_mask.encode(np.asfortranarray(np.asarray(mask), np.uint8))


def _plain_list(values: Any) -> list[Any]:
    return [to_builtin(value) for value in values]
