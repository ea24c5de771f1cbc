"""The image processor: images and COCO annotations to the model's inputs, and its outputs to instances.

Axis letters: B images, Q queries, C classes, K detections kept in an image, N annotated objects of an image, H W pixels
of the original image or of the model's input (the text says which), h w cells of the mask head.
Sizes are (height, width). Boxes are `boxes_cxcywh` in [0, 1] or `boxes_xyxy` in pixels.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging

from .coco_labels import ImageSizes, prepare_labels
from .configuration_rf_detr import RfDetrConfig
from .image_io import Pixels, as_tensor, read_pixels, size_of, to_float
from .masks import rasterize  # noqa: F401  transformers < 5.8 copies direct imports only; see tests/test_structure.py
from .post_processing_rf_detr import read_target_sizes, segment_instances, select_detections
from .resizing import resize_bilinear
from .validation import (
    are_numbers,
    config_errors_as_value_errors,
    error_context,
    is_number,
    refuse_class_attributes,
    require,
    to_builtin,
)
from .variants_rf_detr import VARIANTS  # noqa: F401  as above

logger = logging.get_logger(__name__)

_DEFAULT_SIZE = {"height": 432, "width": 432}  # of rf-detr-seg-medium
_BILINEAR = 2
# The most pixels that an image may have after resizing or padding: the settings may come from an untrusted file.
MAX_INPUT_PIXELS = 1 << 27
# Arguments of other processors in transformers, and the value that says what this one does in any case.
_FIXED_ARGUMENTS = {"do_convert_rgb": True, "do_center_crop": False, "default_to_square": True}
# Arguments of other processors that cannot change the result of this one.
_UNUSED_ARGUMENTS = ("crop_size", "disable_grouping", "image_seq_length", "masks_path")


class RfDetrImageProcessor(BaseImageProcessor):
    """Prepare images and COCO annotations for RF-DETR, and convert its outputs to boxes and masks.

    Images are scaled to [0, 1], resized (bilinear, half-pixel centers, no antialiasing) and normalized, in this order:
    the preprocessing of rfdetr's `predict`, for training as for prediction. torchvision is not needed.

    Example:
        >>> import numpy as np
        >>> from transformers_rfdetr import RfDetrImageProcessor
        >>> processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
        >>> processor(np.zeros((480, 640, 3), np.uint8), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 312, 312])

    Args:
        do_resize: Whether to resize to `size`.
        size: `{"height": H, "width": W}`, (H, W), or an int for a square: exactly this size, whatever the aspect ratio.
            Or `{"shortest_edge": S, "longest_edge": L}`: the aspect ratio is kept, and images of different sizes are
            padded at the bottom and right. 432 x 432 (rf-detr-seg-medium) by default.
        resample: 2 (bilinear), the only filter that the checkpoints were trained with.
        do_rescale: Whether to multiply 8-bit values by `rescale_factor`. Float images must be scaled already.
        rescale_factor: 1 / 255 by default.
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        image_mean: Three numbers, for images in [0, 1]; ImageNet's by default.
        image_std: Three numbers, for images in [0, 1]; ImageNet's by default.
        do_convert_annotations: Whether label boxes are converted to `boxes_cxcywh` in [0, 1]. Otherwise they are
            `boxes_xyxy` in pixels of the resized image.
        do_pad: Whether images of different sizes are padded to one size, and `pixel_mask` is returned.
        pad_size: Size to pad to, `{"height": H, "width": W}`, (H, W) or an int; the largest of the batch by default.
        format: "coco_detection".

    Raises:
        ValueError: if a setting is not supported; the message names it.
    """

    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 (the base class's form)

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | int | Sequence[int] | None = None,
        resample: int = _BILINEAR,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        do_convert_annotations: bool = True,
        do_pad: bool = True,
        pad_size: dict[str, int] | int | Sequence[int] | None = None,
        format: str = "coco_detection",
        **kwargs: Any,
    ) -> None:
        refuse_class_attributes(type(self), kwargs, allowed=("default_to_square",))
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = dict(_DEFAULT_SIZE) if size is None else _read_size(size, "size")
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = to_builtin(list(IMAGENET_DEFAULT_MEAN) if image_mean is None else image_mean)
        self.image_std = to_builtin(list(IMAGENET_DEFAULT_STD) if image_std is None else image_std)
        self.do_convert_annotations = do_convert_annotations
        self.do_pad = do_pad
        self.pad_size = None if pad_size is None else _read_size(pad_size, "pad_size")
        self.format = str(getattr(format, "value", format))
        self._check()

    def _check(self) -> None:
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_annotations", "do_pad"):
            require(isinstance(getattr(self, name), bool | np.bool_), name, getattr(self, name), "true or false")
        require(self.resample == _BILINEAR, "resample", self.resample, "2 (bilinear), the filter of all checkpoints")
        is_coco = self.format == "coco_detection"
        require(is_coco, "format", self.format, "'coco_detection'", "Convert the annotations to COCO format.")
        is_exact = self.pad_size is None or "height" in self.pad_size
        require(is_exact, "pad_size", self.pad_size, "{'height': ..., 'width': ...}")
        is_positive = is_number(self.rescale_factor) and self.rescale_factor > 0
        require(is_positive, "rescale_factor", self.rescale_factor, "a number above 0, usually 1 / 255")
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            require(are_numbers(values, 3), name, values, "a list of three numbers, one for each channel")
        require(min(self.image_std) > 0, "image_std", self.image_std, "three numbers above 0")

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Read the settings from a file or the Hub; raise ValueError if the file holds something else."""
        name = str(pretrained_model_name_or_path)
        with config_errors_as_value_errors(name):
            settings, rest = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        with error_context(name):
            require(isinstance(settings, dict), "preprocessor_config.json", settings, "a JSON object of settings")
        return settings, rest

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "RfDetrImageProcessor":
        """Create the processor of a published variant, with the variant's square size.

        Args:
            name: Any spelling that `RfDetrConfig.from_variant` takes.
            **overrides: Arguments of the constructor.

        Raises:
            ValueError: if `name` is not a published variant.
        """
        return cls.from_config(RfDetrConfig.from_variant(name), **overrides)

    @classmethod
    def from_config(cls, config: RfDetrConfig, **overrides: Any) -> "RfDetrImageProcessor":
        """Create the processor of a model, with the `resolution` of its configuration, an int or [height, width].

        Args:
            config: The model's configuration.
            **overrides: Arguments of the constructor.
        """
        return cls(**{"size": config.resolution, **overrides})

    def preprocess(
        self,
        images: Any,
        annotations: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        return_segmentation_masks: Literal["cropped"] | bool | None = None,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        data_format: str | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Convert images, and annotations in COCO format, to the model's inputs and labels.

        Args:
            images: One image or a list (or 4-D array) of images: PIL images (EXIF rotation is applied, alpha is
                dropped), paths, http(s) URLs, base64 strings, and arrays or tensors (height, width), (height, width,
                channels) or (channels, height, width) with 1, 3 or 4 channels. Bool, 8-bit and 16-bit unsigned values
                are scaled by their range; other integers must be in 0..255, floats in [0, 1] if `do_rescale`.
            annotations: For each image `{"image_id": int, "annotations": [...]}`. Each annotation has `category_id`
                and, in pixels of the (rotated) image, `bbox` [x, y, width, height] and `segmentation` (polygons, RLE
                or a bitmap), optionally `area` and `iscrowd`. A missing bbox or area comes from the segmentation.
                `width` and `height` next to `image_id` are checked if they are given.
            return_segmentation_masks: Whether labels have masks. With "cropped", they have only the pixels inside the
                box of each mask, which the loss reads as well; masks of many small objects need a hundredth of memory.
            return_tensors: "pt" (the same as None) or "np".
            input_data_format: "channels_first" or "channels_last", for arrays whose shape is ambiguous.
            data_format: "channels_first" (the default, as the models require) or "channels_last", of `pixel_values`.
            device: Device on which images are resized and the result is returned; by default that of the images.
            **overrides: Arguments of the constructor, for this call. Arguments of other processors in transformers are
                ignored, with a warning, if they cannot change the result.

        Returns:
            `pixel_values` (B, 3, H, W) float32; with `do_pad`, `pixel_mask` (B, H, W) int64, 1 on the image and 0 on
            padding; with annotations, `labels`, one dict for each image: `class_labels` (N,) int64; `boxes` (N, 4)
            float32 `boxes_cxcywh` in [0, 1] of the image without padding, as the model predicts them; `masks`
            (N, H, W) bool at the model's input size, if asked for, or "cropped": `mask_boxes` (N, 4) int64 of top,
            left, height and width, and `mask_pixels` (K,) bool, the pixels in each of these boxes, row by row, one box
            after the other; `area` (N,) float32 in pixels of the resized image; `iscrowd` (N,) int64; `image_id` (1,),
            and `orig_size` and `size` (2,) int64, (height, width) of the original image and of the model's input;
            `has_mask` (N,) bool, if some objects have only a box; `crowd_labels` (R,) int64 and `crowd_regions`
            (R, H, W) bool of the image without padding, if there are crowds. Objects whose box has no area inside the
            image, or whose mask has no pixel, are dropped.

        Raises:
            ValueError: if an image or annotation is invalid; the message names it and the field.
        """
        overrides = self._read_overrides(overrides)
        processor = type(self)(**{**vars(self), **overrides}) if overrides else self
        require(return_tensors in (None, "pt", "np"), "return_tensors", return_tensors, "'pt' or 'np'")
        data_format = getattr(data_format, "value", data_format)
        rule = "'channels_first' or 'channels_last'"
        require(data_format in (None, "channels_first", "channels_last"), "data_format", data_format, rule)
        masks = return_segmentation_masks
        require(masks in (None, False, True, "cropped"), "return_segmentation_masks", masks, 'a bool or "cropped"')
        inputs = processor._preprocess(_as_list(images), annotations, masks, input_data_format, device)
        if data_format == "channels_last":
            inputs["pixel_values"] = inputs["pixel_values"].permute(0, 2, 3, 1).contiguous()
        labels = inputs.pop("labels", None)
        batch = BatchFeature(inputs, tensor_type=return_tensors)
        if labels is not None:
            batch["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return batch

    def _read_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Return the settings among the arguments of a call; drop those of other processors that change nothing."""
        overrides = {name: value for name, value in overrides.items() if value is not None}
        for name in _FIXED_ARGUMENTS.keys() & overrides.keys():
            value, fixed = overrides.pop(name), _FIXED_ARGUMENTS[name]
            require(value == fixed, name, value, f"{fixed}, as this processor does it", "Remove the argument.")
        if unused := [name for name in _UNUSED_ARGUMENTS if name in overrides]:
            logger.warning_once(f"{', '.join(unused)} cannot change the result of {type(self).__name__}: ignored.")
        overrides = {name: value for name, value in overrides.items() if name not in unused}
        if unknown := sorted(overrides.keys() - vars(self).keys()):
            raise ValueError(f"arguments must be among the settings {sorted(vars(self))}, got {unknown}")
        return overrides

    def _preprocess(
        self,
        images: list[Any],
        annotations: dict[str, Any] | Sequence[dict[str, Any]] | None,
        masks: Literal["cropped"] | bool | None,
        input_data_format: str | None,
        device: torch.device | str | None,
    ) -> dict[str, Any]:
        if isinstance(annotations, Mapping):
            annotations = [annotations]
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(
                f"`annotations` must contain one dict for each of {len(images)} images, got {len(annotations)}"
            )
        pixels, sizes = [], []
        for index, image in enumerate(images):
            with error_context(f"image {index}"):
                original = read_pixels(image, self.do_rescale, input_data_format)
                pixels.append(self._resize_and_normalize(original, device))
            sizes.append((size_of(original), tuple(pixels[-1].shape[1:])))
        input_size = self._input_size([resized for _, resized in sizes])
        inputs: dict[str, Any] = self._pad(pixels, input_size)
        if annotations is not None:
            relative = self.do_convert_annotations
            labels = [
                prepare_labels(target, i, ImageSizes(*sizes[i], input_size), masks=masks, relative_boxes=relative)
                for i, target in enumerate(annotations)
            ]
            inputs["labels"] = [{name: value.to(device) for name, value in label.items()} for label in labels]
        return inputs

    def _resize_and_normalize(self, pixels: Pixels, device: torch.device | str | None) -> torch.Tensor:
        """Return the model's input (3, H, W) float32, without padding."""
        size = size_of(pixels)
        resized = _resized_size(size, self.size) if self.do_resize else size
        scale = functools.partial(to_float, do_rescale=self.do_rescale, rescale_factor=self.rescale_factor)
        if resized == size:
            image = scale(as_tensor(pixels).to(device))
        else:
            image = resize_bilinear(pixels, resized, scale, device)
        if self.do_normalize:
            mean, std = (image.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
            image = (image - mean).div_(std)
        return image

    def _input_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Return the one size of the batch, from the sizes of the resized images."""
        largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
        if len(set(sizes)) > 1:
            if not self.do_pad:
                raise ValueError(
                    f"`do_pad=False` requires images of one size, got {sorted(set(sizes))}. Set `do_pad`, or a `size`"
                    " with height and width."
                )
            _check_pixels(largest, "the padded images")
        if not self.do_pad or self.pad_size is None:
            return largest
        padded = (self.pad_size["height"], self.pad_size["width"])
        if padded[0] < largest[0] or padded[1] < largest[1]:
            raise ValueError(f"`pad_size` must be at least {largest}, the size of the resized images, got {padded}")
        return padded

    def _pad(self, images: list[torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        padded = [image if image.shape[1:] == size else _pad_image(image, size) for image in images]
        batch = {"pixel_values": torch.stack(padded)}
        if self.do_pad:
            batch["pixel_mask"] = torch.ones((len(images), *size), dtype=torch.int64, device=images[0].device)
            for mask, image in zip(batch["pixel_mask"], images, strict=True):
                mask[image.shape[1] :] = 0
                mask[:, image.shape[2] :] = 0
        return batch

    @torch.no_grad()
    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | Sequence[Sequence[int]] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Convert logits and boxes to the detections of each image, best first.

        As in rfdetr, the best `top_k` of all Q x C scores are selected (ties in the order of query and class), so a
        query may appear with several classes; of these, scores above `threshold` are kept. Queries with a NaN score or
        a box that is not finite are dropped.

        Args:
            outputs: Has `logits` (B, Q, C) and `pred_boxes` (B, Q, 4), `boxes_cxcywh` in [0, 1].
            threshold: A score in [0, 1].
            target_sizes: (height, width) of each original image, a list or a tensor (B, 2).
            top_k: Number of pairs of query and class to select; Q by default.

        Returns:
            For each image `scores` (K,) float32, `labels` (K,) int64 and `boxes` (K, 4) float32, `boxes_xyxy` clipped
            to the image: in its pixels, or in [0, 1] without `target_sizes`.

        Raises:
            ValueError: if `target_sizes` is not one positive (height, width) for each image, or `top_k` is below 1.
        """
        sizes = read_target_sizes(target_sizes, len(outputs.logits)) or [(1, 1)] * len(outputs.logits)
        detections = [select_detections(outputs, i, threshold, size, top_k) for i, size in enumerate(sizes)]
        return [{"scores": found.scores, "labels": found.labels, "boxes": found.boxes_xyxy} for found in detections]

    @torch.no_grad()
    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.0,
        target_sizes: torch.Tensor | Sequence[Sequence[int]] | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
        top_k: int | None = None,
        *,
        overlap_mask_area_threshold: float = 0.0,
        pixel_mask: torch.Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Convert logits, boxes and mask logits to the instances of each image, best first.

        The detections are those of [`post_process_object_detection`]. Their masks are upsampled bilinearly (half-pixel
        centers) and thresholded on the CPU, one instance at a time; they are not clipped to the boxes.

        Args:
            outputs: Has `logits` (B, Q, C), `pred_boxes` (B, Q, 4) and `pred_masks` (B, Q, h, w), mask logits.
            threshold: Instances with a score above it are kept.
            mask_threshold: Pixels with a mask logit above it belong to the instance; 0 is a probability of one half.
            target_sizes: (height, width) of each original image, a list or a tensor (B, 2); (h, w) by default.
            return_coco_annotation: Whether to return masks as COCO RLE.
            return_binary_maps: Whether to return masks as a bool tensor.
            top_k: Number of pairs of query and class to select; Q by default.
            overlap_mask_area_threshold: Instances are dropped if a smaller fraction of their mask than this is visible
                behind better instances, or if their mask is empty. With 0 every instance is kept.
            pixel_mask: (B, H, W), as given to the model, to exclude the padding from the masks of padded images.

        Returns:
            For each image

            * `segmentation`: int32 (H, W), the id of the best instance at each pixel, or -1; with
              `return_coco_annotation` one RLE dict for each instance; with `return_binary_maps` bool (K, H, W). RLEs
              and binary maps hold complete masks, overlaps included. Tensors are on the device of the outputs.
            * `segments_info`: one dict for each instance, in the same order: `id` (from 1), `label_id`, `score`, `box`
              [x0, y0, x1, y1] clipped to the image, `area`, and `visible_area` behind better instances, in pixels.

        Raises:
            ValueError: if the outputs have no masks or an argument is invalid; the message names it.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("`return_coco_annotation` and `return_binary_maps` exclude each other. Set one of them.")
        return segment_instances(
            outputs,
            threshold=threshold,
            mask_threshold=mask_threshold,
            target_sizes=target_sizes,
            top_k=top_k,
            mask_format="rle" if return_coco_annotation else "binary" if return_binary_maps else "label_map",
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            pixel_mask=pixel_mask,
        )


def _pad_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1]))


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4):
        if not len(images):
            raise ValueError("`images` must contain at least one image, got an empty list")
        return list(images)
    return [images]


def _read_size(size: Any, name: str) -> dict[str, int]:
    """Convert an int, (height, width) or a dict to a dict with height and width or with the edges."""
    given = size
    if isinstance(size, int | np.integer):
        size = (size, size)
    if isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    try:
        read = {key: operator.index(value) for key, value in dict(size).items() if value is not None}
    except (TypeError, ValueError):
        read = {}
    is_known = set(read) in ({"height", "width"}, {"shortest_edge", "longest_edge"}, {"shortest_edge"})
    rule = "an int, {'height': ..., 'width': ...} or {'shortest_edge': ..., 'longest_edge': ...} in positive pixels"
    require(is_known and min(read.values()) >= 1, name, given, rule)
    if "height" in read:
        _check_pixels((read["height"], read["width"]), f"`{name}`")
    return read


def _check_pixels(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_INPUT_PIXELS:
        raise ValueError(
            f"{name} must have at most {MAX_INPUT_PIXELS} pixels, got {size[0]} x {size[1]}. Choose a smaller size, or"
            " raise transformers_rfdetr.model.image_processing_rf_detr.MAX_INPUT_PIXELS."
        )


def _resized_size(image_size: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """(H, W) of an image -> (H, W) after resizing."""
    if "height" in size:
        return size["height"], size["width"]
    short, long = sorted(image_size)
    edge = float(size["shortest_edge"])
    if "longest_edge" in size and edge * long / short > size["longest_edge"]:
        edge = size["longest_edge"] * short / long
    resized = (max(1, round(edge)), max(1, int(edge * long / short)))
    _check_pixels(resized, f"the resized image (from {image_size[0]} x {image_size[1]})")
    return resized if image_size[0] <= image_size[1] else resized[::-1]
