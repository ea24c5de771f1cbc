"""From images to instances.

`predict` multiplies out the masks of detections only, and upsamples each where it can be only; see
`masks.upsample_masks`.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.masks import region_to_rle, upsample_masks
from ..model.modeling_rf_detr import BACKGROUND_LOGIT, RfDetrForObjectDetection, RfDetrOutput
from ..model.post_processing_rf_detr import select_detections, valid_size
from ..model.predictions_rf_detr import MaskFactors
from ..model.validation import error_context
from ..model.variants_rf_detr import class_labels
from .compiled import InferenceModel
from .instances import Instances


@torch.no_grad()
def predict(
    model: RfDetrForObjectDetection | InferenceModel,
    processor: RfDetrImageProcessor,
    images: Any,
    *,
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
    top_k: int | None = None,
    batch_size: int = 8,
) -> list[Instances]:
    """Images to instances.

    Example:
        >>> from PIL import Image
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor, predict
        >>> model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano"))
        >>> processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
        >>> predict(model, processor, Image.new("RGB", (640, 480)), threshold=0.9)[0].dense_masks().shape
        (0, 480, 640)

    Args:
        model: In evaluation mode while this runs, on any device and in any dtype; or [`compile_for_inference`]'s.
        processor: The model's.
        images: One image or a sequence of them, in any form that the processor takes: paths, URLs, PIL images,
            uint8 arrays (H, W, 3), tensors; a column of a `datasets.Dataset` too.
        threshold: A score in [0, 1], to be exceeded.
        classes: Names of the classes that are looked for; all by default.
        top_k: Number of pairs of query and class that are looked at in an image; by default the number of queries.
        batch_size: Images that go through the model at once.

    Returns:
        For each image what was found in it.

    Raises:
        ValueError: an image cannot be read (the message has its number), or an argument is out of range.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} is outside [0, 1]; give a score such as 0.5")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    wanted = None if classes is None else labels_of(model.config, classes)
    sequence = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    was_training = model.training
    model.eval()
    try:
        return [
            instances
            for start in range(0, len(sequence), batch_size)
            for instances in _predict_batch(model, processor, sequence, start, batch_size, threshold, wanted, top_k)
        ]
    finally:
        model.train(was_training)


def labels_of(config: RfDetrConfig, names: str | Sequence[str]) -> Tensor:
    """Names of classes -> all their labels, (L,) int64.

    Raises:
        ValueError: a name is none of the model's; the message has the nearest ones.
    """
    names = [names] if isinstance(names, str) else names
    known = list(class_labels(config.id2label).values())
    if not names:
        raise ValueError(f"no classes to look for; name some of {', '.join(known[:10])}, or leave classes out for all")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, cutoff=0.4) or known[:10]
            raise ValueError(
                f"{name!r} is no class of the model, which has {len(known)}; did you mean {', '.join(near)}?"
            )
    return torch.tensor([label for label, name in config.id2label.items() if name in names])


def _predict_batch(
    model: Any,
    processor: RfDetrImageProcessor,
    sequence: Sequence[Any],
    start: int,
    batch_size: int,
    threshold: float,
    wanted: Tensor | None,
    top_k: int | None,
) -> Iterator[Instances]:
    tensors = []
    for index in range(start, min(start + batch_size, len(sequence))):
        with error_context(f"image {index}"):
            tensors.append(processor.read(sequence[index]))
    inputs = processor(tensors, input_data_format="channels_first").to(model.device)
    pixel_mask = inputs.get("pixel_mask")
    stage = model.predict_stage(inputs["pixel_values"], pixel_mask)
    logits = stage.logits
    if wanted is not None:  # before the best ones are chosen, of which others would take the places
        unwanted = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        unwanted[wanted.to(logits.device)] = False
        logits = logits.masked_fill(unwanted, BACKGROUND_LOGIT)
    outputs = RfDetrOutput(logits=logits, pred_boxes=stage.boxes)
    for index, tensor in enumerate(tensors):
        size = (tensor.shape[1], tensor.shape[2])
        found = select_detections(outputs, index, threshold, size, top_k)
        masks = None
        if stage.masks is not None:
            logits = _kept_masks(stage.masks, index, found.queries)
            covered = None if pixel_mask is None else valid_size(pixel_mask[index], logits.shape[-2:])
            masks = [region_to_rle(*region, size) for region in upsample_masks(logits, size, 0.0, covered)]
        scores, labels, boxes = (part.numpy(force=True) for part in (found.scores, found.labels, found.boxes_xyxy))
        names = [model.config.id2label[label] for label in labels.tolist()]
        yield Instances(boxes, scores, labels, names, masks, size)


def _kept_masks(masks: MaskFactors, index: int, queries: Tensor) -> Tensor:
    """The mask logits (K, h, w) of K queries of one image."""
    return masks._replace(pixels=masks.pixels[index, None], queries=masks.queries[index, queries][None]).logits()[0]
