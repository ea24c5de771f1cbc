"""Predict the instances of images. Masks are computed for detections only, and upsampled one at a time."""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_io import Pixels, read_pixels, size_of
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.mask_runs import encode_mask_logits
from ..model.modeling_rf_detr import BACKGROUND_LOGIT, RfDetrForObjectDetection, RfDetrOutput
from ..model.post_processing_rf_detr import Detections, select_detections, valid_size
from ..model.validation import error_context, is_index, is_number, require
from ..model.variants_rf_detr import class_labels
from .fixed_size import FixedSizeModel
from .instances import Instances

# Tracking and tiling start from instances with a score above this one, as ByteTrack does
# (https://arxiv.org/abs/2110.06864): an occluded or cut object often has a low score, but the next frame or the
# neighboring tile confirms it.
WEAK_SCORE = 0.1
DEFAULT_SCORE = 0.5  # the threshold of a class that was not calibrated


@torch.no_grad()
def predict(
    model: RfDetrForObjectDetection | FixedSizeModel,
    processor: RfDetrImageProcessor,
    images: Any,
    *,
    threshold: float | Literal["calibrated"] = DEFAULT_SCORE,
    classes: Sequence[str] | None = None,
    top_k: int | None = None,
    batch_size: int = 8,
    embeddings: bool = False,
) -> list[Instances]:
    """Predict the instances of images.

    Example:
        >>> from PIL import Image
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor, predict
        >>> model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano"))
        >>> processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
        >>> predict(model, processor, Image.new("RGB", (640, 480)), threshold=0.9)[0].dense_masks().shape
        (0, 480, 640)

    Args:
        model: A model on any device and in any dtype, in evaluation mode while this function runs; the result of
            [`compile_for_inference`]; or an exported model from [`load`].
        processor: The model's image processor.
        images: One image in any form that the processor accepts (path, URL, PIL image, array or tensor), or any
            iterable of them: a list, a generator, a 4-D array or tensor, a column of a `datasets.Dataset`.
        threshold: A score in [0, 1]. Instances with a score above it are returned. "calibrated" takes the threshold of
            each class that [`calibrate`] has stored in the model's configuration, and 0.5 for classes without one.
        classes: Names of the classes to predict; all by default.
        top_k: Number of pairs of query and class to select in each image; the number of queries by default.
        batch_size: Number of images in a forward pass.
        embeddings: Whether to return vectors of instances and images for search and clustering; see
            [`Instances.embeddings`]. Exported files do not contain them.

    Returns:
        The instances of each image.

    Raises:
        ValueError: an image cannot be read (the message has its index), an argument is out of range, the model is not
            calibrated, or an exported model is to return embeddings.
    """
    thresholds = class_thresholds(model.config, threshold)
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    wanted = None if classes is None else labels_of(model.config, classes)
    is_single = isinstance(images, str | os.PathLike | PIL.Image.Image) or getattr(images, "ndim", 4) != 4
    remaining = iter([images] if is_single or not isinstance(images, Iterable) else images)
    found: list[Instances] = []
    was_training = model.training
    model.eval()
    try:
        while batch := list(islice(remaining, batch_size)):
            pixels: list[Pixels] = []
            for index, image in enumerate(batch, start=len(found)):
                with error_context(f"image {index}"):
                    pixels.append(read_pixels(image, processor.do_rescale))
            found += _predict_batch(model, processor, pixels, thresholds, wanted, top_k, embeddings)
    finally:
        model.train(was_training)
    return found


def own_threshold(config: RfDetrConfig) -> float | Literal["calibrated"]:
    """Return "calibrated" for a calibrated model, otherwise the default of [`predict`]."""
    return DEFAULT_SCORE if config.score_thresholds is None else "calibrated"


def class_thresholds(config: RfDetrConfig, threshold: float | Literal["calibrated"]) -> np.ndarray:
    """Return the score threshold of each label, (C,) float32.

    Raises:
        ValueError: the threshold is not a score in [0, 1], or the model is not calibrated.
    """
    if threshold != "calibrated":
        rule = "a score in [0, 1]" if is_number(threshold) else 'a score in [0, 1] or "calibrated"'
        require(is_number(threshold) and 0 <= threshold <= 1, "threshold", threshold, rule)
        return np.full(len(config.id2label), threshold, np.float32)
    calibrated = getattr(config, "score_thresholds", None)
    if calibrated is None:
        raise ValueError(
            '`threshold` must be a score in [0, 1] for a model that is not calibrated, got "calibrated". Call'
            " `calibrate(model, processor, dataset)` first."
        )
    scores = [calibrated.get(label, DEFAULT_SCORE) for label in range(len(config.id2label))]
    return np.array(scores, np.float32)


def labels_of(config: RfDetrConfig, names: str | Sequence[str]) -> Tensor:
    """Return all labels of some class names, (L,) int64.

    Raises:
        ValueError: the model does not have one of the classes; the message has similar names.
    """
    names = [names] if isinstance(names, str) else names
    known = list(class_labels(config.id2label).values())
    require(len(names) > 0, "classes", names, "names of classes", f"Omit it, or name some of {', '.join(known[:10])}.")
    for name in names:
        similar = difflib.get_close_matches(name, known, cutoff=0.4) or known[:10]
        rule = f"among the {len(known)} classes of the model"
        require(name in known, "classes", name, rule, f"Did you mean {', '.join(similar)}?")
    return torch.tensor([label for label, name in config.id2label.items() if name in names])


def category_ids_of(config: RfDetrConfig) -> list[int] | None:
    """Return the category id of each label in the dataset that a model was trained on, or None if it is unknown."""
    ids = getattr(config, "category_ids", None)
    num_classes = 1 + max(class_labels(config.id2label), default=-1)
    # A shorter list is left from the classes of an earlier checkpoint.
    return ids if isinstance(ids, list) and all(map(is_index, ids)) and len(ids) >= num_classes else None


def _predict_batch(
    model: Any,
    processor: RfDetrImageProcessor,
    images: Sequence[Pixels],
    thresholds: np.ndarray,
    wanted: Tensor | None,
    top_k: int | None,
    embeddings: bool,
) -> Iterator[Instances]:
    inputs = processor(images, input_data_format="channels_first").to(model.device)
    pixel_mask = inputs.get("pixel_mask")
    stage = model.predict_stage(inputs["pixel_values"], pixel_mask)
    if embeddings and stage.features is None:
        raise ValueError(
            "`embeddings` requires a PyTorch model, got an exported file, which does not contain them. Use the model"
            " that was exported."
        )
    logits = stage.logits
    if wanted is not None:  # before the top-k selection, which other classes would fill
        unwanted = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        unwanted[wanted.to(logits.device)] = False
        logits = logits.masked_fill(unwanted, BACKGROUND_LOGIT)
    outputs = RfDetrOutput(logits=logits, pred_boxes=stage.boxes)
    category_ids = category_ids_of(model.config)
    for index, image in enumerate(images):
        size = size_of(image)
        found = select_detections(outputs, index, float(thresholds.min()), size, top_k)
        if (thresholds != thresholds[0]).any():
            is_kept = found.scores > torch.from_numpy(thresholds).to(found.scores.device)[found.labels]
            found = Detections(*(part[is_kept] for part in found))
        masks = None
        if stage.masks is not None:
            mask_logits = stage.masks.logits_of(index, found.queries)
            covered = None if pixel_mask is None else valid_size(pixel_mask[index], mask_logits.shape[-2:])
            masks = encode_mask_logits(mask_logits, size, covered)
        scores, labels, boxes = (part.numpy(force=True) for part in (found.scores, found.labels, found.boxes_xyxy))
        names = [model.config.id2label[label] for label in labels.tolist()]
        categories = None if category_ids is None else np.array(category_ids, np.int64)[labels]
        instances = Instances(boxes, scores, labels, names, masks, size, category_ids=categories)
        if embeddings:
            instances.embeddings = stage.queries[index, found.queries].float().numpy(force=True)
            instances.image_embedding = stage.features[index].numpy(force=True)
        yield instances
