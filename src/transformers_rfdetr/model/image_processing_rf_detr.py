"""Images and annotations to tensors; outputs to instances.

Axis letters: B images, Q queries, C classes, K detections kept of an image, N objects of an image, H W pixels of the
original picture or of the model's input (which of them, the text says), h w cells of the mask head.
Sizes are (height, width). Boxes are `boxes_cxcywh` in [0, 1] or `boxes_xyxy` in pixels.
"""

import base64
import importlib
import math
import numbers
import operator
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging

from .configuration_rf_detr import RfDetrConfig, config_errors_as_value_errors, error_context, refuse_methods
from .masks import measure, rasterize, read_segmentation, region_to_rle, upsample_masks

logger = logging.get_logger(__name__)

# The size of rf-detr-seg-medium.
_DEFAULT_SIZE = {"height": 432, "width": 432}
_BILINEAR = 2
_URL_TIMEOUT_SECONDS = 60
# The largest file that is fetched from a URL; a server may send without an end.
MAX_URL_BYTES = 1 << 28
# ... or so slowly that nobody waits for it.
MAX_URL_SECONDS = 300
# What Pillow reads by itself. EPS, for one, it hands to another program, whatever the name of the file.
_FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)
# The most pixels of a picture that settings may ask for; they may come from anyone too.
MAX_INPUT_PIXELS = 1 << 27


class RfDetrImageProcessor(BaseImageProcessor):
    """Prepares images and COCO annotations for RF-DETR and turns its outputs into boxes and masks.

    Images are scaled to [0, 1], resized (bilinear, half-pixel centres, no antialiasing) and normalised, in that order:
    the preprocessing of rfdetr's `predict`, for training as for prediction. torchvision is not needed.

    Example:
        >>> import numpy as np
        >>> from transformers_rfdetr import RfDetrImageProcessor
        >>> processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
        >>> processor(np.zeros((480, 640, 3), np.uint8), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 312, 312])

    Args:
        do_resize: Whether to resize to `size`.
        size: `{"height": H, "width": W}`, an int for a square, or (H, W): exactly this size, whatever the aspect ratio.
            Or `{"shortest_edge": S, "longest_edge": L}`: the aspect ratio is kept, and images that come out different
            are padded at the bottom and right. 432 x 432 (rf-detr-seg-medium) by default.
        resample: 2 (bilinear); the checkpoints were trained with nothing else.
        do_rescale: Whether to multiply 8-bit values by `rescale_factor`. Float images are taken as scaled already.
        rescale_factor: 1 / 255.
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        image_mean: Three numbers, of images in [0, 1]; ImageNet's by default.
        image_std: Three numbers, of images in [0, 1]; ImageNet's by default.
        do_convert_annotations: Whether label boxes become `boxes_cxcywh` in [0, 1]. Otherwise they stay `boxes_xyxy`,
            in pixels of the resized picture.
        do_pad: Whether images of different sizes are padded to one size, and `pixel_mask` is returned.
        pad_size: Size to pad to, in the forms of `size` that are exact; the largest of the batch by default.
        format: "coco_detection".

    Raises:
        ValueError: a size, format, resampling filter or number that is not supported.
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
        refuse_methods(type(self), kwargs)
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
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_annotations", "do_pad"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} {getattr(self, name)!r:.80} is neither true nor false")
        if self.resample != _BILINEAR:
            raise ValueError(f"resample {resample} is not 2 (bilinear), the filter of every checkpoint; leave it out")
        if self.format != "coco_detection":
            raise ValueError(f"format {self.format!r} is not supported; convert the annotations to 'coco_detection'")
        if self.pad_size is not None and "height" not in self.pad_size:
            raise ValueError(f"pad_size {pad_size} is not exact; give 'height' and 'width'")
        if not _is_number(rescale_factor) or rescale_factor <= 0:
            raise ValueError(f"rescale_factor {rescale_factor!r} is not a number above 0; 1 / 255 is usual")
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if not are_numbers(values, 3):
                raise ValueError(f"{name} {values!r} is not one number for each of the 3 channels; give three")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std {self.image_std} divides the pixels; give three numbers above 0")

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """The settings that a file holds; ValueError where it holds something else."""
        with config_errors_as_value_errors(str(pretrained_model_name_or_path)):
            settings, rest = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
            if not isinstance(settings, dict):
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the settings are {settings!r:.80}, not a dictionary"
                )
            return settings, rest

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "RfDetrImageProcessor":
        """The processor of a published variant: its square size.

        Args:
            name: Any spelling that `RfDetrConfig.from_variant` takes.
            **overrides: Arguments of the constructor.

        Raises:
            ValueError: `name` is no published variant.
        """
        return cls.from_config(RfDetrConfig.from_variant(name), **overrides)

    @classmethod
    def from_config(cls, config: RfDetrConfig, **overrides: Any) -> "RfDetrImageProcessor":
        """The processor of a model: the resolution of its configuration, square or rectangular.

        Args:
            config: The model's configuration; its `resolution` is an int or [height, width].
            **overrides: Arguments of the constructor.
        """
        return cls(**{"size": config.resolution, **overrides})

    def push_to_hub(self, repo_id: str, *, with_code: bool = False, **settings: Any) -> Any:
        """Upload the processor, and its code where asked; see `transformers_rfdetr.hub.model_card.push_to_hub`."""
        try:
            model_card = importlib.import_module("transformers_rfdetr.hub.model_card")
        except ModuleNotFoundError:  # this file came with a model, which transformers pushes as it came
            return super().push_to_hub(repo_id, **settings)
        return model_card.push_to_hub(self, repo_id, with_code=with_code, **settings)

    def preprocess(
        self,
        images: Any,
        annotations: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        return_segmentation_masks: bool | None = None,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Images, and annotations in COCO form, to the model's inputs and labels.

        Args:
            images: One image or a list (or a 4-D array) of
                * PIL images of any mode, with the EXIF rotation applied and the alpha channel dropped;
                * paths, http(s) URLs or base64 strings;
                * arrays or tensors (height, width), (height, width, channels) or (channels, height, width), of one,
                  three or four (alpha is dropped) channels.
                8-bit, bool and 16-bit unsigned values (PIL's I;16 too) are scaled by their full range. Other integers
                (PIL's I too) are 8-bit values and must lie in 0..255. Floats (PIL's F too) must lie in [0, 1], taken
                as scaled already. With `do_rescale=False` floats are used as they are.
            annotations: For each image `{"image_id": int, "annotations": [...]}`, with in each annotation `category_id`
                and, in pixels of the (rotated) picture, `bbox` [x, y, width, height] and `segmentation` (polygons, RLE
                or a bitmap); optionally `area` and `iscrowd`. A missing bbox or area is taken from the shape.
                `width` and `height` beside `image_id`, where given, are checked.
                Crowd regions leave the labels, and so does what has no usable shape: a box without an area inside the
                picture and, when masks are asked for, a segmentation that covers no pixel of the model's input.
            return_segmentation_masks: Whether labels hold masks.
            return_tensors: "pt" (the same as None) or "np".
            input_data_format: "channels_first" or "channels_last", for arrays whose shape leaves it open.
            **overrides: Arguments of the constructor, for this call.

        Returns:
            `pixel_values` (B, 3, H, W) float32; with `do_pad`, `pixel_mask` (B, H, W) int64, 1 where the picture is;
            with annotations, `labels`, one dict an image: `class_labels` (N,) int64; `boxes` (N, 4) float32
            `boxes_cxcywh` in [0, 1] of the picture without padding, which is the frame of the model's boxes; with
            masks, `masks` (N, H, W) bool at the model's input size; `area` (N,) float32 in pixels of the resized
            picture; `iscrowd` (N,) int64; `image_id` (1,) int64; `orig_size` (2,) and `size` (2,) int64, height and
            width of the picture and of the model's input.

        Raises:
            ValueError: what cannot be read, with the image, the annotation and the field.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if overrides:
            settings = vars(self)
            if unknown := sorted(overrides.keys() - settings.keys()):
                raise ValueError(f"unknown arguments {unknown}; the processor's settings are {sorted(settings)}")
            return type(self)(**{**settings, **overrides}).preprocess(
                images,
                annotations,
                return_segmentation_masks,
                return_tensors=return_tensors,
                input_data_format=input_data_format,
            )
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors {return_tensors!r} is not supported; choose 'pt' or 'np'")
        images = _as_list(images)
        if isinstance(annotations, Mapping):
            annotations = [annotations]
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"{len(annotations)} annotations for {len(images)} images; pass one dict for each image")

        pixels, orig_sizes = [], []
        for index, image in enumerate(images):
            with error_context(f"image {index}"):
                picture = read_image(image, self.do_rescale, self.rescale_factor, input_data_format)
            orig_sizes.append((picture.shape[1], picture.shape[2]))
            pixels.append(self._resize_and_normalize(picture))
        sizes = [(picture.shape[1], picture.shape[2]) for picture in pixels]
        input_size = self._input_size(sizes)
        data = {"pixel_values": pixels[0].new_zeros((len(pixels), 3, *input_size))}
        if self.do_pad:
            data["pixel_mask"] = torch.zeros((len(pixels), *input_size), dtype=torch.int64, device=pixels[0].device)
        for index, (height, width) in enumerate(sizes):
            data["pixel_values"][index, :, :height, :width] = pixels[index]
            if self.do_pad:
                data["pixel_mask"][index, :height, :width] = 1
        inputs = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            labels = [
                self._read_target(target, index, orig_sizes[index], sizes[index], input_size, return_segmentation_masks)
                for index, target in enumerate(annotations)
            ]
            inputs["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return inputs

    def read(self, image: Any) -> torch.Tensor:
        """One image in any form that [`preprocess`] takes -> (3, H, W) float32 of its own size, scaled."""
        return read_image(image, self.do_rescale, self.rescale_factor, None)

    def _resize_and_normalize(self, picture: torch.Tensor) -> torch.Tensor:
        """(3, H, W) original -> (3, H, W) of the model's input, without padding."""
        if self.do_resize:
            size = _resized_size((picture.shape[1], picture.shape[2]), self.size)
            if size != tuple(picture.shape[1:]):
                picture = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=False)[0]
        if self.do_normalize:
            mean, std = (picture.new_tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
            picture = (picture - mean).div_(std)
        return picture

    def _input_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """The one size of the batch."""
        largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
        if not self.do_pad and len(set(sizes)) > 1:
            raise ValueError(f"images come out at different sizes {sorted(set(sizes))}; set do_pad or a fixed size")
        if len(set(sizes)) > 1:
            _check_pixels(largest, "the padded images would be")
        if not self.do_pad or self.pad_size is None:
            return largest
        padded = (self.pad_size["height"], self.pad_size["width"])
        if padded[0] < largest[0] or padded[1] < largest[1]:
            raise ValueError(f"pad_size {padded} is smaller than the resized images' {largest}; raise it")
        return padded

    def _read_target(
        self,
        target: dict[str, Any],
        index: int,
        orig_size: tuple[int, int],
        resized_size: tuple[int, int],
        input_size: tuple[int, int],
        with_masks: bool | None,
    ) -> dict[str, torch.Tensor]:
        """The COCO annotations of image number `index` -> its labels."""
        image_id, where = _read_target_head(target, index, orig_size)
        labels, boxes, areas, shapes, num_dropped = [], [], [], [], 0
        for position, annotation in enumerate(target["annotations"]):
            here = f"{where}, annotation {position}"
            _require(isinstance(annotation, Mapping), here, "", annotation, "a dict in COCO form")
            here = f"{here} (id {to_builtin(annotation.get('id'))})"
            fields = ("category_id", "bbox", "area", "iscrowd")
            label, box, area, crowd = (to_builtin(annotation.get(field)) for field in fields)
            _require(crowd in (None, 0, 1), here, "iscrowd", crowd, "0 or 1")
            if crowd:
                continue
            _require(is_index(label), here, "category_id", label, "a class index, a whole number of at least 0")
            _require(area is None or (_is_number(area) and area >= 0), here, "area", area, "a number of at least 0")
            fine = box is None or are_numbers(box, 4)
            _require(fine, here, "bbox", box, "[x, y, width, height], four finite numbers in pixels")
            shape = None
            if with_masks or box is None:
                with error_context(f"{here}, segmentation"):
                    shape = read_segmentation(annotation.get("segmentation"), orig_size)
            if shape is not None and (box is None or area is None):
                shape_box, shape_area = measure(shape, orig_size)
                box, area = box or shape_box, shape_area if area is None else area
            x0, y0, x1, y1 = clamp_box(box or [0, 0, 0, 0], orig_size)
            if x1 <= x0 or y1 <= y0 or (with_masks and shape is None):
                num_dropped += 1
                continue
            labels.append(label)
            boxes.append([x0, y0, x1, y1])
            areas.append((x1 - x0) * (y1 - y0) if area is None else area)
            if shape is not None:
                shapes.append(shape)

        keep: Any = slice(None)
        if with_masks:
            with error_context(f"{where}, segmentation"):
                masks = rasterize(shapes, orig_size, resized_size)
            keep = masks.any(axis=(1, 2))
            if not keep.all():
                masks = masks[keep]
            num_dropped += len(keep) - len(masks)
        if num_dropped:
            logger.warning_once(
                "Objects without a usable shape (a box without an area inside the picture, or a segmentation that"
                " covers no pixel of the model's input) leave the training targets. At log level INFO each image that"
                " loses some is named. This warning is given once."
            )
            logger.info(f"{where}: {num_dropped} of {len(target['annotations'])} annotations have no usable shape")

        scale = torch.tensor([resized_size[1] / orig_size[1], resized_size[0] / orig_size[0]]).repeat(2)
        boxes_xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[keep]
        data = {
            "image_id": torch.tensor([image_id]),
            "class_labels": torch.tensor(labels, dtype=torch.int64)[keep],
            "boxes": boxes_xyxy * scale,
            "area": torch.tensor(areas, dtype=torch.float32)[keep] * scale[:2].prod(),
            "iscrowd": torch.zeros(len(boxes_xyxy), dtype=torch.int64),
            "orig_size": torch.tensor(orig_size),
            "size": torch.tensor(input_size),
        }
        if self.do_convert_annotations:
            # Relative to the picture, not to the padded input: the model's proposals and reference points are, by
            # their valid ratios, as in Deformable DETR and rfdetr. (The port divides by the padded size.)
            low, high = boxes_xyxy.split(2, dim=-1)
            data["boxes"] = torch.cat([(low + high) / 2, high - low], dim=-1) / torch.tensor(orig_size[::-1]).repeat(2)
        if with_masks:
            data["masks"] = torch.from_numpy(masks)
            if input_size != resized_size:
                padding = (0, input_size[1] - resized_size[1], 0, input_size[0] - resized_size[0])
                data["masks"] = F.pad(data["masks"], padding)
        return data

    @torch.no_grad()
    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | Sequence[Sequence[int]] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Logits and boxes -> the detections of each image, best first.

        A query may appear with several classes: the best `top_k` of all Q x C scores are taken (ties in the order of
        query and class), then those whose score exceeds `threshold`, as rfdetr does. NaN scores never do, nor do
        queries whose box is not finite.

        Args:
            outputs: Has `logits` (B, Q, C) and `pred_boxes` (B, Q, 4), `boxes_cxcywh` in [0, 1].
            threshold: A score in [0, 1].
            target_sizes: (height, width) of each original picture, a list or a tensor (B, 2).
            top_k: Q by default.

        Returns:
            For each image `scores` (K,) float32, `labels` (K,) int64 and `boxes` (K, 4) float32, `boxes_xyxy` inside
            the picture: in its pixels, or in [0, 1] without `target_sizes`.

        Raises:
            ValueError: `target_sizes` is not one positive (height, width) for each image; `top_k` is no whole number
                of at least 1.
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
        """Logits, boxes and mask logits -> the instances of each image, best first.

        Detections are those of [`post_process_object_detection`]. Masks are upsampled bilinearly (half-pixel centres)
        and thresholded, one instance at a time and only where it can be. They are not clipped to the boxes.

        Args:
            outputs: Has `logits` (B, Q, C), `pred_boxes` (B, Q, 4) and `pred_masks` (B, Q, h, w), mask logits.
            threshold: A score in [0, 1], to be exceeded.
            mask_threshold: A logit, to be exceeded: 0 is a probability of one half.
            target_sizes: (height, width) of each original picture, a list or a tensor (B, 2). Without it the result
                has the size (h, w) of the mask logits.
            return_coco_annotation: Return masks as COCO RLE.
            return_binary_maps: Return masks as a bool tensor.
            top_k: Number of pairs of query and class that are looked at; Q by default.
            overlap_mask_area_threshold: An instance leaves if less than this part of its mask is not covered by better
                ones, and if it has no mask at all. 0 keeps every instance.
            pixel_mask: (B, H, W), the model's input of that name, to cut the padding from the masks of padded images.

        Returns:
            For each image
            * `segmentation`: int32 (H, W), the id of the best instance at each pixel, -1 for none; or with
              `return_coco_annotation` one RLE dict an instance, which pycocotools and JSON take; or with
              `return_binary_maps` bool (K, H, W). The last two hold whole masks, overlaps included;
            * `segments_info`: one dict an instance in the same order: `id` (from 1), `label_id`, `score`, `box`
              [x0, y0, x1, y1] inside the picture and `area` and `visible_area` (what better instances leave of it, 0
              when covered), in pixels of `segmentation`.
            Tensors lie on the device of the outputs; the work is done on the CPU.

        Raises:
            ValueError: both forms are asked for; there are no masks; `target_sizes` is not one positive
                (height, width) for each image; `top_k` is no whole number of at least 1;
                `overlap_mask_area_threshold` lies outside [0, 1]; `pixel_mask` has another shape or covers nothing.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps are two forms of one result; choose one")
        if getattr(outputs, "pred_masks", None) is None:
            raise ValueError(
                "the outputs hold no pred_masks; take a segmentation model or post_process_object_detection"
            )
        if not 0 <= overlap_mask_area_threshold <= 1:
            raise ValueError(
                f"overlap_mask_area_threshold {overlap_mask_area_threshold} is outside [0, 1]; 0 keeps every instance"
            )
        if pixel_mask is not None:
            pixel_mask = torch.as_tensor(pixel_mask)
            if pixel_mask.ndim != 3 or len(pixel_mask) != len(outputs.logits) or not pixel_mask.any(2).any(1).all():
                raise ValueError(
                    f"pixel_mask of shape {tuple(pixel_mask.shape)} is not (B, H, W) with some of each of"
                    f" {len(outputs.logits)} images; pass the model's input of that name"
                )
        mask_size = tuple(outputs.pred_masks.shape[-2:])
        sizes = read_target_sizes(target_sizes, len(outputs.logits)) or [mask_size] * len(outputs.logits)
        results = []
        for index, size in enumerate(sizes):
            found = select_detections(outputs, index, threshold, size, top_k)
            mask_logits = outputs.pred_masks[index, found.queries]
            covered = None if pixel_mask is None else valid_size(pixel_mask[index], mask_size)
            label_map: np.ndarray = np.full(size, -1, np.int32)
            binary_maps: np.ndarray = np.zeros((len(mask_logits) if return_binary_maps else 0, *size), bool)
            rles: list[dict[str, Any]] = []
            segments: list[dict[str, Any]] = []
            instances = zip(
                upsample_masks(mask_logits, size, mask_threshold, covered),
                found.scores.tolist(),
                found.labels.tolist(),
                found.boxes_xyxy.tolist(),
                strict=True,
            )
            for (region, top, left), score, label, box in instances:
                inside = np.s_[top : top + region.shape[0], left : left + region.shape[1]]
                visible = region & (label_map[inside] < 0)
                area, visible_area = int(np.count_nonzero(region)), int(np.count_nonzero(visible))
                if overlap_mask_area_threshold > 0 and visible_area < max(1, overlap_mask_area_threshold * area):
                    continue
                if return_binary_maps:
                    binary_maps[len(segments)][inside] = region
                if return_coco_annotation:
                    rles.append(region_to_rle(region, top, left, size))
                segment = {"id": len(segments) + 1, "label_id": label, "score": score, "box": box}
                segments.append({**segment, "area": area, "visible_area": visible_area})
                np.copyto(label_map[inside], len(segments), where=visible)
            maps = torch.from_numpy(binary_maps[: len(segments)] if return_binary_maps else label_map)
            segmentation = rles if return_coco_annotation else maps.to(mask_logits.device)
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results


# Sizes


def _read_size(size: Any, name: str) -> dict[str, int]:
    """int, (height, width) or a dict with one of the two pairs of keys -> such a dict."""
    if isinstance(size, numbers.Integral):
        size = (size, size)
    if isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    try:
        read = {key: operator.index(value) for key, value in dict(size).items() if value is not None}
    except (TypeError, ValueError):
        read = {}
    keys = set(read)
    if (
        keys not in ({"height", "width"}, {"shortest_edge", "longest_edge"}, {"shortest_edge"})
        or min(read.values()) < 1
    ):
        raise ValueError(
            f"{name} {size!r} is no size in positive whole pixels; give an int,"
            " {'height': ..., 'width': ...} or {'shortest_edge': ..., 'longest_edge': ...}"
        )
    if "height" in read:
        _check_pixels((read["height"], read["width"]), f"{name} is")
    return read


def _check_pixels(size: tuple[int, int], what: str) -> None:
    if size[0] * size[1] > MAX_INPUT_PIXELS:
        raise ValueError(
            f"{what} {size[0]} x {size[1]}, more than {MAX_INPUT_PIXELS} pixels; choose a smaller size, or raise"
            " transformers_rfdetr.model.image_processing_rf_detr.MAX_INPUT_PIXELS"
        )


def _resized_size(image_size: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """(H, W) of a picture -> (H, W) after resizing."""
    if "height" in size:
        return size["height"], size["width"]
    short, long = sorted(image_size)
    edge = float(size["shortest_edge"])
    if "longest_edge" in size and edge * long / short > size["longest_edge"]:
        edge = size["longest_edge"] * short / long
    resized = (max(1, round(edge)), max(1, int(edge * long / short)))
    _check_pixels(resized, f"an image of {image_size[0]} x {image_size[1]} would be resized to")
    return resized if image_size[0] <= image_size[1] else resized[::-1]


# Images


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4):
        if not len(images):
            raise ValueError("no images; pass at least one")
        return list(images)
    return [images]


def read_rgb(image: PIL.Image.Image | str | os.PathLike[str]) -> PIL.Image.Image:
    """A picture, or its path, URL or base64 -> 8-bit RGB, upright (EXIF), with the values that the processor reads."""
    pixels = decode_image(image)
    if pixels.dtype != np.uint8:
        scaled = read_image(pixels, do_rescale=True, rescale_factor=1 / 255, input_data_format=None)
        pixels = (scaled * 255).round().byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(pixels)


def decode_image(image: PIL.Image.Image | str | os.PathLike[str]) -> np.ndarray:
    """A picture, or its path, URL or base64 -> upright, (H, W, 3) uint8 or, of 16 or 32 bits a pixel, (H, W)."""
    source = image
    try:
        if not isinstance(image, PIL.Image.Image):
            image = _open(os.fspath(image))
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode == "La":
            image = image.convert("LA")
        if not image.mode.startswith("I") and image.mode != "F":
            image = image.convert("RGB")
        return np.array(image)
    except Exception as error:  # Pillow answers broken files with SyntaxError, struct.error, zlib.error and others
        reason = str(error) or type(error).__name__
        raise ValueError(f"{redact_url(source)!s:.200} cannot be opened as an image: {reason}") from error


def _open(source: str) -> PIL.Image.Image:
    """A path, http(s) URL or base64 string -> the picture in its own mode (transformers clips 16 bits to 8)."""
    # Not by its path, of which Pillow maps the pixels and turns those of a TIFF wrongly.
    with _stream(source) as stream, open_image(stream) as image:
        image.load()
        return image


def open_image(file: Any) -> PIL.Image.Image:
    """A file or its path -> the picture, not loaded yet, if it is in one of the usual formats.

    Pillow knows more of them; for some it starts other programs.
    """
    PIL.Image.init()
    return PIL.Image.open(file, formats=[name for name in _FORMATS if name in PIL.Image.OPEN])


def _stream(source: str) -> BinaryIO:
    if source.startswith(("http://", "https://")):
        return BytesIO(_fetch(source))
    path = source if os.path.isfile(source) else os.path.expanduser(source)
    if os.path.isfile(path):
        return open(path, "rb")
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        stream = BytesIO(base64.b64decode("".join(encoded.split()), validate=True))
        open_image(stream)
    except (ValueError, OSError) as error:
        raise ValueError("there is no such file; give a path, an http(s) URL or base64") from error
    return stream


def _fetch(url: str) -> bytes:
    """What a server sends, which may be neither too much nor too slow."""
    place = urllib.parse.urlsplit(url)
    headers = {"User-Agent": "transformers-rfdetr"}
    user, at, host = place.netloc.rpartition("@")
    if at:
        user = urllib.parse.unquote(user if ":" in user else f"{user}:")
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    request = urllib.request.Request(place._replace(netloc=host).geturl(), headers=headers)
    content, begun = bytearray(), time.monotonic()
    with urllib.request.urlopen(request, timeout=_URL_TIMEOUT_SECONDS) as response:
        while part := response.read1(1 << 20):
            content += part
            if len(content) > MAX_URL_BYTES:
                raise ValueError(
                    f"it is larger than {MAX_URL_BYTES} bytes; fetch it yourself, or raise"
                    " transformers_rfdetr.model.image_processing_rf_detr.MAX_URL_BYTES"
                )
            if time.monotonic() - begun > MAX_URL_SECONDS:
                raise ValueError(
                    f"it took longer than {MAX_URL_SECONDS} seconds; fetch it yourself, or raise"
                    " transformers_rfdetr.model.image_processing_rf_detr.MAX_URL_SECONDS"
                )
    return bytes(content)


def redact_url(source: Any) -> Any:
    """A source as it may be written down and shown: the user and the query of a URL may hold a password."""
    if not isinstance(source, str) or "://" not in source:
        return source
    scheme, _, rest = source.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def read_image(image: Any, do_rescale: bool, rescale_factor: float, input_data_format: str | None) -> torch.Tensor:
    """Any image -> (3, H, W) float32, scaled to [0, 1] where `do_rescale`."""
    if isinstance(image, str | os.PathLike | PIL.Image.Image):
        image, input_data_format = decode_image(image), "channels_last"
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise ValueError(f"an array of {image.dtype} is no image; pass numbers")
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"{type(image).__name__} is no image; pass a PIL image, an array, a tensor, a path or a URL")
    if image.is_complex():
        raise ValueError(f"a tensor of {image.dtype} is no image; pass real numbers")

    picture = channels_first(image.detach(), input_data_format)
    if 0 in picture.shape:
        raise ValueError(f"shape {tuple(image.shape)} has no pixels; leave the image out")
    values = picture.to(torch.float32, memory_format=torch.contiguous_format)
    if image.is_floating_point():
        lowest, highest = values.min().item(), values.max().item()
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError("a pixel is NaN or infinite; pass finite values")
        # A rounding error of the caller's own scaling is no other scale.
        if do_rescale and not (lowest >= -1e-5 and highest <= 1 + 1e-5):
            raise ValueError(
                f"float pixels lie in [{lowest:g}, {highest:g}]; with do_rescale they must lie in [0, 1]:"
                " scale them or pass uint8"
            )
    else:
        if image.dtype == torch.bool:
            values *= 255
        elif image.dtype == torch.uint16:
            values /= 257
        elif image.dtype != torch.uint8 and not (values.min() >= 0 and values.max() <= 255):
            raise ValueError(
                f"{image.dtype} pixels lie in [{values.min():g}, {values.max():g}], not in 0..255, so that their scale"
                " is unknown; pass uint8, uint16 (full range 65535) or floats in [0, 1]"
            )
        if do_rescale:
            # x / 255 is rfdetr's rounding; x * (1 / 255) differs in the last bit.
            values /= 1 / rescale_factor
    return values.expand(3, -1, -1)


def channels_first(image: torch.Tensor, input_data_format: str | None) -> torch.Tensor:
    """(H, W), (H, W, channels) or (channels, H, W) -> (1 or 3, H, W)."""
    shape = tuple(image.shape)
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"shape {shape} is no image; pass (height, width) and at most one axis of channels")
    data_format = getattr(input_data_format, "value", input_data_format)
    if data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format {input_data_format!r} is neither 'channels_first' nor 'channels_last'")
    for channels in ((3,), (1, 4)):  # (4, 4, 3) is RGB of four rows
        first = data_format != "channels_last" and shape[0] in channels
        last = data_format != "channels_first" and shape[2] in channels
        if first or last:
            break
    if first and last:
        raise ValueError(f"shape {shape} may have its channels first or last; say which with input_data_format")
    if not (first or last):
        raise ValueError(f"shape {shape} has no axis of 1, 3 or 4 channels where one is expected; convert it to RGB")
    if last:
        image = image.permute(2, 0, 1)
    return image[:3]


# Annotations


def _require(fine: bool, where: str, field: str, value: Any, rule: str) -> None:
    """Raises with the place, the value and the rule, which says what to give instead."""
    if not fine:
        raise ValueError(f"{where}{', ' * bool(field)}{field}: {value!r:.60} is not {rule}")


def to_builtin(value: Any) -> Any:
    """Arrays, tensors and numpy's scalars, also in lists -> Python's numbers and lists; one number of any shape is one.

    They stand in the rows of a `datasets.Dataset` with a format.
    """
    if isinstance(value, list | tuple):
        return [to_builtin(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.item() if math.prod(value.shape) == 1 else to_builtin(value.tolist())
    return value


def _is_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of `count` finite numbers."""
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def is_index(value: Any) -> bool:
    """Whether it is a whole number of at least 0 that fits into 64 bits."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) < 1 << 63


def _read_target_head(target: Any, index: int, orig_size: tuple[int, int]) -> tuple[int, str]:
    """What stands beside the annotations of an image -> its id, and its place for messages."""
    where = f"image {index}"
    annotations = target.get("annotations") if isinstance(target, Mapping) else None
    fine = isinstance(annotations, list | tuple) or (isinstance(annotations, np.ndarray) and annotations.ndim == 1)
    _require(fine, where, "annotations", target, "{'image_id': ..., 'annotations': [...]}")
    image_id = to_builtin(target.get("image_id"))
    if isinstance(image_id, str) and image_id.isdecimal():
        image_id = int(image_id)
    _require(is_index(image_id), where, "image_id", image_id, "a whole number of at least 0; number the images")
    where = f"{where} (image_id {image_id})"
    for name, expected in zip(("height", "width"), orig_size, strict=True):
        given = to_builtin(target.get(name))
        rule = f"the picture's {expected} (EXIF rotation applied); pair the annotations with their own picture"
        _require(given in (None, expected), where, name, given, rule)
    return int(image_id), where


def clamp_box(box: Sequence[float], image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """[x, y, width, height] -> x0, y0, x1, y1 inside the picture; without an area where it lies outside."""
    x, y, width, height = box
    return max(x, 0), max(y, 0), min(x + width, image_size[1]), min(y + height, image_size[0])


# Outputs


class _Detections(NamedTuple):
    """The K kept pairs of query and class of one image, best first."""

    scores: torch.Tensor  # (K,) float32
    labels: torch.Tensor  # (K,)
    queries: torch.Tensor  # (K,)
    boxes_xyxy: torch.Tensor  # (K, 4) float32, clamped to the picture


def select_detections(
    outputs: Any, index: int, threshold: float, size: tuple[int, int], top_k: int | None
) -> _Detections:
    """The detections of image number `index`, in a picture of `size`.

    Thresholding first leaves the same pairs as taking the best `top_k` first, and little to sort.
    """
    num_queries, num_classes = outputs.logits.shape[1:]
    if top_k is not None and not (is_index(top_k) and top_k > 0):
        raise ValueError(
            f"top_k {top_k!r} is not a whole number of at least 1; give how many pairs of query and class to look at"
        )
    top_k = num_queries if top_k is None else top_k
    is_finite = outputs.pred_boxes[index].isfinite().all(dim=-1, keepdim=True)
    scores = outputs.logits[index].float().sigmoid().masked_fill(~is_finite, math.nan).flatten()
    candidates = (scores > threshold).nonzero()[:, 0]
    best = candidates[scores[candidates].argsort(descending=True, stable=True)[:top_k]]
    queries = best // num_classes
    center, extent = outputs.pred_boxes[index, queries].float().split(2, dim=-1)
    extent = extent.clamp(min=0)
    limit = center.new_tensor([size[1], size[0]]).repeat(2)
    boxes_xyxy = (torch.cat([center - extent / 2, center + extent / 2], dim=-1) * limit).clamp(min=0).minimum(limit)
    return _Detections(scores[best], best % num_classes, queries, boxes_xyxy)


def read_target_sizes(target_sizes: Any, batch_size: int) -> list[tuple[int, int]] | None:
    """A list, array or tensor of `batch_size` pairs -> (H, W) of each image; ValueError for anything else but None."""
    if target_sizes is None:
        return None
    pairs = target_sizes.tolist() if isinstance(target_sizes, np.ndarray | torch.Tensor) else target_sizes
    if not isinstance(pairs, list | tuple) or len(pairs) != batch_size:
        raise ValueError(
            f"target_sizes {pairs!r:.80} are not a list of {batch_size}; pass one (height, width) for each image"
        )
    for pair in pairs:
        size = to_builtin(pair)
        if not are_numbers(size, 2) or min(size) < 1 or any(side != int(side) for side in size):
            raise ValueError(f"target size {pair!r} is not (height, width) in positive whole pixels; give such a pair")
    return [(int(height), int(width)) for height, width in pairs]


def valid_size(pixel_mask: torch.Tensor, mask_size: tuple[int, int]) -> tuple[float, float]:
    """Pixel mask (H, W) -> rows and columns of the mask head's (h, w) that the picture covers."""
    rows, columns = pixel_mask.any(1).sum().item(), pixel_mask.any(0).sum().item()
    return rows / pixel_mask.shape[0] * mask_size[0], columns / pixel_mask.shape[1] * mask_size[1]
