"""Run a model over a dataset and evaluate its detections.

Axis letters: B images of a batch, Q queries, C labels, K detections of an image, H W pixels, h w cells of the mask
head. Sizes are (height, width).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..data.dataset import as_instance_dataset
from ..model.image_io import decode_image
from ..model.mask_runs import encode_mask_logits
from ..model.post_processing_rf_detr import read_target_sizes, select_detections, valid_size
from .coco_evaluator import InstanceSegmentationEvaluator
from .coco_summary import COCO_MAX_DETECTIONS
from .mask_records import PackedMasks, best_per_class
from .missed_objects import StageRecord


@torch.no_grad()
def detect(
    outputs: Any,
    target_sizes: torch.Tensor | Sequence[Sequence[int]],
    *,
    score_threshold: float | None = None,
    pixel_mask: torch.Tensor | None = None,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> list[dict[str, Any]]:
    """Return the detections that COCO evaluates from a model's outputs, with masks as RLE.

    They are those of `RfDetrImageProcessor.post_process_instance_segmentation` without a threshold: the best Q of all
    Q x C pairs of query and label, at most 100 of each label, or `max_detections` if that is more.

    Args:
        outputs: Has `logits` (B, Q, C), `pred_boxes` (B, Q, 4), `boxes_cxcywh` in [0, 1], and `pred_masks`
            (B, Q, h, w), mask logits, or None.
        target_sizes: (height, width) of each image.
        score_threshold: Score that a detection must exceed, in [0, 1]; by default there is none.
        pixel_mask: (B, H, W), the model's input of that name, for padded images.

    Returns:
        For each image, best first, arrays `scores` (K,) float32, `labels` (K,) int64, `boxes` (K, 4) float32,
        `boxes_xyxy` in pixels inside the image, and `masks`, [`PackedMasks`] or None.

    Raises:
        ValueError: `target_sizes` is not one positive (height, width) for each image.
    """
    sizes = read_target_sizes(target_sizes if target_sizes is not None else [], len(outputs.logits))
    mask_logits = getattr(outputs, "pred_masks", None)
    results = []
    for index, size in enumerate(sizes):
        selected = select_detections(outputs, index, -1.0 if score_threshold is None else score_threshold, size, None)
        scores, labels, queries, boxes = (values.numpy(force=True) for values in selected)
        best = best_per_class(scores, labels, max_detections)
        masks = None
        if mask_logits is not None:
            valid = None if pixel_mask is None else valid_size(pixel_mask[index], mask_logits.shape[-2:])
            used, mask_of = np.unique(queries[best], return_inverse=True)  # a query may be detected as several classes
            maps = mask_logits[index]
            maps = maps if len(used) == len(maps) else maps[torch.from_numpy(used)]
            rles = encode_mask_logits(maps, size, valid)
            masks = PackedMasks.pack([rles[one] for one in mask_of], size)
        results.append({"scores": scores[best], "labels": labels[best], "boxes": boxes[best], "masks": masks})
    return results


def label_to_category_id(config: Any, dataset: Any) -> dict[int, int]:
    """Return a model's label -> the dataset's category id, matched by class name.

    Labels without a category in the dataset are omitted. Names are not compared if both maps are equal, or if the
    model has default names (`LABEL_0`, ...) and as many labels as the dataset.

    Args:
        config: The model's configuration, with `id2label`.
        dataset: An `InstanceDataset`: `id2label`, label -> name, and `category_ids`, label -> category id.

    Raises:
        ValueError: the name of a category is not the name of exactly one label of the model.
    """
    model_names, dataset_names = dict(config.id2label), dict(dataset.id2label)
    has_default_names = all(name == f"LABEL_{label}" for label, name in model_names.items())
    if model_names == dataset_names or (has_default_names and len(model_names) == len(dataset_names)):
        return {label: dataset.category_ids[label] for label in dataset_names}
    counts = Counter(model_names.values())
    if unmatched := sorted({name for name in dataset_names.values() if counts[name] != 1}):
        raise ValueError(
            f"each category of the dataset must be the name of one label of the model, {list(model_names.values())},"
            f" got {unmatched}. Set `id2label` to the classes that the model was trained on, or rename the categories"
        )
    if repeated := [name for name, count in Counter(dataset_names.values()).items() if count > 1]:
        raise ValueError(f"category names of the dataset must be unique, got {repeated} repeatedly")
    labels = {name: label for label, name in model_names.items()}
    return {labels[name]: dataset.category_ids[label] for label, name in dataset_names.items()}


def to_category_ids(detections: Mapping[str, Any], category_ids: Mapping[int, int]) -> dict[str, Any]:
    """Return what [`detect`] returns for an image as arguments of the evaluator's `update`.

    Args:
        detections: `scores` (K,), `labels` (K,), `boxes` (K, 4) and `masks`, packed or None.
        category_ids: Label -> category id, from [`label_to_category_id`]. Detections of other labels are dropped.
    """
    kept = [index for index, label in enumerate(detections["labels"].tolist()) if label in category_ids]
    masks = detections["masks"]
    return {
        "scores": detections["scores"][kept],
        "labels": [category_ids[label] for label in detections["labels"][kept].tolist()],
        "boxes": detections["boxes"][kept],
        "masks": None if masks is None else masks.select(kept),
    }


def evaluate_dataset(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    score_threshold: float | None = None,
    max_detections: int = COCO_MAX_DETECTIONS,
    device: torch.device | str | None = None,
    progress: bool = True,
    stages: StageRecord | None = None,
) -> InstanceSegmentationEvaluator:
    """Return an evaluator with the detections of a model in all images of a dataset.

    The arguments are those of [`evaluate_instance_segmentation`], and `stages`, a new record that is filled with what
    [`analyse_evaluation`] needs to say why objects were missed.
    """
    dataset = as_instance_dataset(dataset)
    evaluator = InstanceSegmentationEvaluator(dataset.coco(), max_detections=max_detections)
    category_ids = label_to_category_id(model.config, dataset)
    was_training, original_device = model.training, model.device
    model.eval().to(device or original_device)
    try:
        starts = range(0, len(dataset), batch_size)
        for start in logging.tqdm(starts, desc="Evaluating", disable=not progress):
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            images = [decode_image(sample["image"]) for sample in samples]
            inputs = processor(images, input_data_format="channels_last", return_tensors="pt").to(model.device)
            with torch.no_grad():
                outputs = model(**inputs) if stages is None else stages.run(model, inputs)
            sizes = [image.shape[:2] for image in images]
            results = detect(
                outputs,
                sizes,
                score_threshold=score_threshold,
                pixel_mask=inputs.get("pixel_mask"),
                max_detections=max_detections,
            )
            for sample, detections in zip(samples, results, strict=True):
                evaluator.update(sample["image_id"], **to_category_ids(detections, category_ids))
            if stages is not None:
                image_ids = [sample["image_id"] for sample in samples]
                stages.add(model, evaluator.ground_truth, image_ids, inputs, outputs)
    finally:
        model.train(was_training).to(original_device)
    return evaluator


def evaluate_instance_segmentation(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    score_threshold: float | None = None,
    max_detections: int = COCO_MAX_DETECTIONS,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Return the metrics of a model on a dataset, outside of training: `InstanceSegmentationEvaluator.compute()`.

    Args:
        model: A model for instance segmentation, or for object detection, which has bbox metrics only. It is put into
            evaluation mode and on `device`; both are restored.
        processor: Its image processor.
        dataset: An `InstanceDataset`, a `Subset` or `ConcatDataset` of them, or a dataset of samples with `image` and
            `image_id` that has `coco()`, `id2label` and `category_ids`.
        batch_size: Images per batch.
        score_threshold: Score that a detection must exceed; by default all count, as in COCO.
        max_detections: See the evaluator.
        device: By default the model's.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: the model does not know a category of the dataset.
    """
    evaluator = evaluate_dataset(
        model,
        processor,
        dataset,
        batch_size=batch_size,
        score_threshold=score_threshold,
        max_detections=max_detections,
        device=device,
        progress=progress,
    )
    return evaluator.compute()
