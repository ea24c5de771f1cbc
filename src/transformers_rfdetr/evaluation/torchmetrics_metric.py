"""The metrics of `InstanceSegmentationEvaluator` as a torchmetrics metric, which torchmetrics synchronises.

Axis letters: K detections and N objects of an image, H W pixels of the image.
"""

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
    raise ImportError('torchmetrics is required: pip install "transformers-rfdetr[train]"') from error


class InstanceSegmentationMetric(Metric):
    """Compute COCO's average precision of masks and boxes, and mean IoU, with the interface of torchmetrics.

    `update` takes ground truth and detections, as `torchmetrics.detection.MeanAveragePrecision` does; `compute` returns
    the metrics of `InstanceSegmentationEvaluator.compute`. Masks are kept as RLE.

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
        class_names: Label -> name in `per_class`; the label is the default name.
        iou_score_threshold: See the evaluator.
        **kwargs: For `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        class_names: Mapping[int, str] | None = None,
        *,
        iou_score_threshold: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.class_names = dict(class_names or {})
        self.iou_score_threshold = iou_score_threshold
        # Concatenated pickles of the records of the images, as uint8.
        self.add_state("records", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Discard all images."""
        super().reset()
        # For a process without images torchmetrics would gather an empty float tensor, which cannot be concatenated.
        self.records = [torch.empty(0, dtype=torch.uint8, device=self.device)]

    def update(self, preds: Sequence[Mapping[str, Any]], target: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            preds: For each image `scores` (K,), `labels` (K,) and `masks` (K, H, W) bool or K COCO RLEs, or `boxes`
                (K, 4) boxes_xyxy in pixels, or both.
            target: For each image `labels` (N,) and `masks` or `boxes` in the same forms; optionally `iscrowd` (N,),
                `area` (N,) and `image_id`. An image with a repeated id is ignored.

        Raises:
            ValueError: the errors of `InstanceSegmentationEvaluator.update`.
        """
        if len(preds) != len(target):
            raise ValueError(f"`preds` and `target` must have the same length, got {len(preds)} and {len(target)}")
        for index, (prediction, of_image) in enumerate(zip(preds, target, strict=True)):
            with error_context(f"image {index}"):
                image_size = _image_size(of_image.get("masks")) or _image_size(prediction.get("masks"))
                masks, boxes = prediction.get("masks"), prediction.get("boxes")
                detections = pack_detections(prediction["scores"], prediction["labels"], masks, boxes, image_size)
                reference = _read_target(of_image, image_size)
            record = bytearray(pickle.dumps((reference, detections)))
            self.records.append(torch.frombuffer(record, dtype=torch.uint8).to(self.device))

    def compute(self) -> dict[str, Any]:
        """Return the metrics of the images of all processes; see `InstanceSegmentationEvaluator.compute`."""
        records = list(self._read_records())
        given_ids = [reference["image_id"] for reference, _ in records if reference["image_id"] is not None]
        new_ids = itertools.count(max(given_ids, default=0) + 1)
        for reference, _ in records:
            if reference["image_id"] is None:
                reference["image_id"] = next(new_ids)
        labels = {label for _, detections in records for label in detections.labels.tolist()}
        coco = coco_from_images((reference for reference, _ in records), labels, self.class_names)
        evaluator = InstanceSegmentationEvaluator(coco, iou_score_threshold=self.iou_score_threshold)
        for reference, detections in records:
            evaluator.merge({reference["image_id"]: detections})
        return evaluator.compute()

    def _read_records(self) -> Iterator[tuple[dict[str, Any], Detections]]:
        tensors = self.records if isinstance(self.records, list) else [self.records]  # one tensor when synchronised
        for tensor in tensors:
            content = tensor.to("cpu", torch.uint8).numpy().tobytes()
            stream = io.BytesIO(content)
            while stream.tell() < len(content):
                yield pickle.load(stream)


def _image_size(masks: Any) -> tuple[int, int] | None:
    """Return (H, W) of masks in any form, or None without a mask."""
    if masks is None or not len(masks):
        return None
    size = masks[0]["size"] if isinstance(masks[0], Mapping) else masks[0].shape
    height, width = (int(side) for side in size)
    return height, width


def _read_target(target: Mapping[str, Any], image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return a target in torchmetrics' form as an image and its objects in COCO's form, with masks as RLE."""
    labels = _to_list(target["labels"])
    optional = ("masks", "boxes", "iscrowd", "area")
    lengths = {name: len(target[name]) for name in ("labels", *optional) if target.get(name) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join(lengths)} of the target must have the same length, got {lengths}")
    masks, boxes, crowds, areas = map(target.get, optional)
    if labels and masks is None and boxes is None:
        raise ValueError(f"`masks` or `boxes` is required in the target, got neither for {len(labels)} objects")
    objects: list[dict[str, Any]] = [{"category_id": label} for label in labels]
    for index, one in enumerate(objects):
        if masks is not None:
            one["segmentation"] = _encode(masks[index])
        if boxes is not None:
            x0, y0, x1, y1 = _to_list(boxes[index])
            one["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        if crowds is not None:
            one["iscrowd"] = int(crowds[index])
        if areas is not None and float(areas[index]) > 0:  # torchmetrics derives an area of 0, too
            one["area"] = float(areas[index])
    height, width = image_size or (None, None)
    return {"image_id": to_builtin(target.get("image_id")), "height": height, "width": width, "objects": objects}


def _encode(mask: Any) -> Any:
    """Return a mask (H, W) as RLE; RLE is returned as it is."""
    if isinstance(mask, Mapping):
        return mask
    if isinstance(mask, torch.Tensor):
        mask = mask.numpy(force=True)
    return coco_mask.encode(np.asfortranarray(np.asarray(mask), np.uint8))


def _to_list(values: Any) -> list[Any]:
    return [to_builtin(value) for value in values]
