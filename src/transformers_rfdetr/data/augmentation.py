"""Augment an image together with its boxes and masks.

An augmentation is a callable `(image, annotations, rng) -> (image, annotations)`: an RGB PIL image, COCO annotations
in its pixels, and the `numpy.random.Generator` that every random number comes from. It must not modify its inputs.
`recipes.py` combines them. Sizes are (H, W); boxes are COCO's [x, y, width, height]; axis letters: N objects, h w
pixels of a working size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from pycocotools import mask as coco_mask

from ..model.coco_labels import clip_box
from ..model.masks import (
    Segmentation,
    box_and_area,
    has_segmentation,
    rasterize,
    read_segmentation,
    region_to_rle,
    to_rle,
)
from ..model.validation import is_number, require

Annotations = list[dict[str, Any]]
Augmentation = Callable[[Image.Image, Annotations, np.random.Generator], tuple[Image.Image, Annotations]]

_PADDING = (124, 116, 104)  # the mean of ImageNet, which the image processor normalizes to 0
_MIN_BOX_FRACTION = 1e-5  # of the canvas: 2 pixels of 432 x 432
_WITHOUT_PIXELS = [[0.0, 0.0]]  # a segmentation that covers no pixel of an image of any size


class FlipAndCrop:
    """Crop a random square from the image, flip it horizontally and rotate it, each with a probability.

    The defaults are rfdetr's recipe. It resizes the image until its short side is one of `short_sides`, crops a square
    from the result and resizes the square to the model's input. Here, the equivalent square in whole pixels is cropped
    from the original image, so that it is resized only once, by the image processor.

    Objects outside the square are dropped, and boxes are clipped to it. The new area of an object is that of its
    remaining mask, or without a mask that of its remaining box. Crowds are treated like objects.

    Example:
        >>> import numpy as np
        >>> from transformers_rfdetr.data.augmentation import FlipAndCrop
        >>> from transformers_rfdetr.data.synthetic import draw_scene
        >>> image, annotations = draw_scene(seed=0)
        >>> image, annotations = FlipAndCrop(crop=1.0)(image, annotations, np.random.default_rng(0))
        >>> image.size
        (339, 339)

    Args:
        flip: Probability of a horizontal flip.
        crop: Probability of a crop.
        short_sides: Short sides, in pixels, of the resized image.
        crop_sides: Smallest and largest side, in pixels, of the square in the resized image; a larger square than the
            image is reduced to its short side.
        rotate: Probability of a rotation by 90, 180 or 270 degrees, for images without a natural orientation, such as
            aerial and microscopy images. rfdetr's recipe has none.

    Raises:
        ValueError: a probability is outside [0, 1], a side is below 1 pixel, or `crop_sides` is not ascending.
    """

    def __init__(
        self,
        flip: float = 0.5,
        crop: float = 0.5,
        short_sides: Sequence[int] = (400, 500, 600),
        crop_sides: tuple[int, int] = (384, 600),
        rotate: float = 0.0,
    ) -> None:
        for name, value in (("flip", flip), ("crop", crop), ("rotate", rotate)):
            require(is_number(value) and 0 <= value <= 1, name, value, "a probability in [0, 1]")
        is_valid = len(short_sides) > 0 and min(short_sides) >= 1
        require(is_valid, "short_sides", short_sides, "sides of at least 1 pixel", "Use (400, 500, 600).")
        is_valid = len(crop_sides) == 2 and 1 <= crop_sides[0] <= crop_sides[1]
        require(is_valid, "crop_sides", crop_sides, "(smallest, largest) in pixels", "Use (384, 600).")
        self.flip, self.crop, self.rotate = flip, crop, rotate
        self.short_sides, self.crop_sides = tuple(short_sides), tuple(crop_sides)

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """Return the augmented image and annotations."""
        if rng.random() < self.crop:
            left, top, side = self._draw_square(image.size, rng)
            size = (image.height, image.width)
            image = image.crop((left, top, left + side, top + side))
            annotations = _crop_all(annotations, size, (left, top, side, side))
        if rng.random() < self.flip:
            size = (image.height, image.width)
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            annotations = [_flip(annotation, size) for annotation in annotations]
        if self.rotate and rng.random() < self.rotate:
            for _ in range(rng.integers(1, 4)):
                size = (image.height, image.width)
                image = image.transpose(Image.Transpose.ROTATE_90)
                annotations = [_rotate_90(annotation, size) for annotation in annotations]
        return image, annotations

    def _draw_square(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int]:
        """(W, H) -> left, top and side of a random square, in pixels."""
        resized = rng.choice(self.short_sides)
        wanted = rng.integers(self.crop_sides[0], self.crop_sides[1], endpoint=True)
        side = max(1, round(float(min(wanted / resized, 1)) * min(size)))
        left, top = (int(rng.integers(extent - side, endpoint=True)) for extent in size)
        return left, top, side


class ScaleJitter:
    """Show the image larger or smaller on a canvas of its own aspect ratio, at a random position.

    This is the large-scale jitter of https://arxiv.org/abs/2012.07177 with its scales. At a scale above 1, a window of
    1 / scale of the height and width is cropped; at a scale below 1, the image is padded with ImageNet's mean color to
    1 / scale of its height and width. The image processor resizes both to the model's input. The image is resized here
    only if the canvas would be larger than `max_size`, so that most images are resized once.

    Objects outside the canvas, and objects whose box covers less than 1/100,000 of it, are dropped.

    Args:
        scale: Smallest and largest scale; it is uniformly distributed between them.
        max_size: Longer side of the canvas in pixels; the image is reduced if the canvas would be larger.

    Raises:
        ValueError: `scale` is not positive and ascending, or `max_size` is below 1.
    """

    def __init__(self, scale: tuple[float, float] = (0.1, 2.0), max_size: int = 1024) -> None:
        check_range("scale", scale)
        require(max_size >= 1, "max_size", max_size, "at least 1 pixel", "Use 1024.")
        self.scale, self.max_size = scale, max_size

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """Return the augmented image and annotations."""
        scale, size = rng.uniform(*self.scale), (image.height, image.width)
        reduction = min(1.0, self.max_size * scale / max(size))
        resized = (max(1, round(size[0] * reduction)), max(1, round(size[1] * reduction)))
        height, width = (max(1, round(side * reduction / scale)) for side in size)
        if resized != size:
            image = image.resize(resized[::-1], Image.Resampling.BILINEAR)
            annotations = [_resize(annotation, size, resized) for annotation in annotations]
        room = (resized[1] - width, resized[0] - height)
        left, top = (int(rng.integers(min(extent, 0), max(extent, 0), endpoint=True)) for extent in room)
        canvas = Image.new("RGB", (width, height), _PADDING)
        canvas.paste(image, (-left, -top))
        annotations = _crop_all(annotations, resized, (left, top, width, height))
        smallest = _MIN_BOX_FRACTION * height * width
        return canvas, [one for one in annotations if one["bbox"][2] * one["bbox"][3] >= smallest]


def check_range(name: str, value: Any) -> None:
    """Raise ValueError unless a parameter is (smallest, largest), two positive numbers."""
    is_valid = len(value) == 2 and all(map(is_number, value)) and 0 < value[0] <= value[1]
    require(is_valid, name, value, "(smallest, largest), two positive numbers")


class ColorJitter:
    """Multiply brightness, contrast and saturation by random factors, with a probability.

    Args:
        brightness: The factor is uniformly distributed in [1 - brightness, 1 + brightness].
        contrast: The same for contrast.
        saturation: The same for saturation.
        probability: Probability of any change.

    Raises:
        ValueError: a value is outside [0, 1].
    """

    def __init__(
        self, brightness: float = 0.3, contrast: float = 0.3, saturation: float = 0.3, probability: float = 0.8
    ) -> None:
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, value in (strengths | {"probability": probability}).items():
            require(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        self.strengths, self.probability = tuple(strengths.values()), probability

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """Return the augmented image and the same annotations."""
        if rng.random() < self.probability:
            kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for kind, strength in zip(kinds, self.strengths, strict=True):
                image = kind(image).enhance(rng.uniform(1 - strength, 1 + strength))
        return image, annotations


class BlurAndNoise:
    """Blur the image, and add Gaussian noise to its brightness, each with a probability.

    The noise is the same in red, green and blue, so that a gray image remains gray.

    Args:
        blur: Largest standard deviation of the Gaussian blur, in pixels; it is uniformly distributed from 0.
        noise: Largest standard deviation of the noise, as a fraction of white; it is uniformly distributed from 0.
        probability: Probability of blur, and independently of noise.

    Raises:
        ValueError: a value is negative, or the probability is above 1.
    """

    def __init__(self, blur: float = 1.5, noise: float = 0.05, probability: float = 0.3) -> None:
        for name, value in (("blur", blur), ("noise", noise)):
            require(is_number(value) and value >= 0, name, value, "a number of at least 0")
        require(is_number(probability) and 0 <= probability <= 1, "probability", probability, "in [0, 1]")
        self.blur, self.noise, self.probability = blur, noise, probability

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """Return the augmented image and the same annotations."""
        if rng.random() < self.probability:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, self.blur)))
        if rng.random() < self.probability:
            noise = rng.standard_normal((image.height, image.width, 1), np.float32)
            pixels = np.asarray(image, np.float32) + 255 * rng.uniform(0, self.noise) * noise
            image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        return image, annotations


def _crop_all(annotations: Annotations, size: tuple[int, int], window: tuple[int, int, int, int]) -> Annotations:
    """Return the parts of annotations of an image of `size` inside a window: left, top, width and height in pixels.

    The window may extend beyond the image; there is no object there.
    """
    cropped = (_crop(annotation, size, window) for annotation in annotations)
    return [annotation for annotation in cropped if annotation is not None]


def _crop(
    annotation: dict[str, Any], size: tuple[int, int], window: tuple[int, int, int, int]
) -> dict[str, Any] | None:
    """Return the part of an annotation that lies in a window; None if there is none."""
    left, top, width, height = window
    mask = read_segmentation(annotation.get("segmentation"), size)
    box, area = annotation.get("bbox"), annotation.get("area")
    cropped = dict(annotation)
    if box is not None:
        x, y, *extent = _clip(box, size)
        cropped["bbox"] = _clip([x - left, y - top, *extent], (height, width))
        if min(cropped["bbox"][2:]) <= 0:
            return None
        if area is not None and mask is None:
            cropped["area"] = area * (cropped["bbox"][2] * cropped["bbox"][3]) / (box[2] * box[3])
    if mask is None:
        if has_segmentation(annotation.get("segmentation")):
            cropped["segmentation"] = _WITHOUT_PIXELS
        return cropped if box is not None else None
    is_padded = left < 0 or top < 0 or left + width > size[1] or top + height > size[0]
    if is_padded and not isinstance(mask, dict) and any(_leaves_image(polygon, size) for polygon in mask):
        mask = to_rle(mask, size)  # which ends at the border of the image
    if isinstance(mask, dict):
        region = coco_mask.decode(mask)[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
        mask = region_to_rle(region.astype(bool), max(-top, 0), max(-left, 0), (height, width))
    else:
        mask = [polygon - np.resize([left, top], polygon.size) for polygon in mask]
    mask_box, mask_area = box_and_area(mask, (height, width))
    if not mask_area:
        return None
    box = mask_box if box is None else cropped["bbox"]
    return {**cropped, "segmentation": _as_coco(mask), "bbox": box, "area": mask_area}


def _leaves_image(polygon: np.ndarray, size: tuple[int, int]) -> bool:
    """Return whether a polygon (2P,) extends beyond an image of `size`."""
    return bool(polygon.min() < 0 or (polygon.reshape(-1, 2) > size[::-1]).any())


def _resize(annotation: dict[str, Any], size: tuple[int, int], resized: tuple[int, int]) -> dict[str, Any]:
    """Scale an annotation of an image of `size`."""
    scale = np.divide(resized, size)[::-1]
    changed = _transform_annotation(
        annotation,
        size,
        box=lambda x, y, w, h: (np.array([x, y, w, h]) * np.tile(scale, 2)).tolist(),
        points=lambda xy: xy * scale,
        pixels=lambda mask: np.asarray(Image.fromarray(mask).resize(resized[::-1], Image.Resampling.NEAREST)),
    )
    if annotation.get("area") is not None:
        changed["area"] = float(annotation["area"] * scale.prod())
    return changed


def _flip(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Flip an annotation of an image of `size` horizontally: x -> W - x."""
    # Coordinates are of pixel edges, so that W, the right edge of the last column, becomes 0.
    width = size[1]
    return _transform_annotation(
        annotation,
        size,
        box=lambda x, y, w, h: [width - x - w, y, w, h],
        points=lambda xy: xy * [-1, 1] + [width, 0],
        pixels=np.fliplr,
    )


def _rotate_90(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Rotate an annotation of an image of `size` counterclockwise by 90 degrees: (x, y) -> (y, W - x)."""
    width = size[1]
    return _transform_annotation(
        annotation,
        size,
        box=lambda x, y, w, h: [y, width - x - w, h, w],
        points=lambda xy: xy[:, ::-1] * [1, -1] + [0, width],
        pixels=np.rot90,
    )


def _transform_annotation(
    annotation: dict[str, Any],
    size: tuple[int, int],
    *,
    box: Callable[..., list[float]],
    points: Callable[[np.ndarray], np.ndarray],
    pixels: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """Transform the box, and the points (P, 2) of the polygons or the pixels (H, W) of the RLE, of an annotation."""
    transformed = dict(annotation)
    if annotation.get("bbox") is not None:
        transformed["bbox"] = box(*annotation["bbox"])
    mask = read_segmentation(annotation.get("segmentation"), size)
    if isinstance(mask, dict):
        mask = coco_mask.encode(np.asfortranarray(pixels(coco_mask.decode(mask))))
    elif mask is not None:
        mask = [points(polygon.reshape(-1, 2)).ravel() for polygon in mask]
    if mask is not None:
        transformed["segmentation"] = _as_coco(mask)
    elif has_segmentation(annotation.get("segmentation")):
        transformed["segmentation"] = _WITHOUT_PIXELS
    return transformed


def _as_coco(mask: Segmentation) -> Any:
    return mask if isinstance(mask, dict) else [polygon.tolist() for polygon in mask]


def _clip(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Clip [x, y, width, height] to an image of `size`; width or height is <= 0 if the box lies outside."""
    x0, y0, x1, y1 = clip_box(box, size)
    return [x0, y0, x1 - x0, y1 - y0]


class TorchvisionTransform:
    """Wrap a pipeline of `torchvision.transforms.v2` as an augmentation.

    The pipeline receives a `tv_tensors.Image` (3, h, w) uint8 and a dict of `boxes` (`tv_tensors.BoundingBoxes`, XYXY),
    `masks` (`tv_tensors.Mask`, (N, h, w)) and `labels` (the indices of the annotations, (N,)), and must return such a
    pair. Objects that it drops, as `SanitizeBoundingBoxes` does, and objects without a remaining pixel are dropped. The
    new box and area of an object with a mask are those of its mask, because torchvision's box of a rotated object is
    too large.

    The masks of all objects are dense, so that a large image is first scaled down together with its masks. The pipeline
    draws its random numbers from `rng`, and torch's global generator is not changed.

    Args:
        pipeline: It must return uint8 pixels, or floats in [0, 1]; the image processor normalizes them.
        max_size: The longer side, in pixels, to which larger images are scaled down.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: the pipeline returns something else.
    """

    def __init__(self, pipeline: Callable[..., Any], max_size: int = 1024) -> None:
        require(max_size >= 1, "max_size", max_size, "at least 1 pixel", "Use 1024.")
        self.pipeline, self.max_size = pipeline, max_size

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """Return the augmented image and annotations."""
        size = (image.height, image.width)
        segmentations = [read_segmentation(annotation.get("segmentation"), size) for annotation in annotations]
        scale = min(1.0, self.max_size / max(size))
        working = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        masks: np.ndarray = np.zeros((len(annotations), *working), bool)
        has_mask = [i for i, segmentation in enumerate(segmentations) if segmentation is not None]
        masks[has_mask] = rasterize([segmentations[i] for i in has_mask], size, working)
        boxes = [_box_of(*pair, size) for pair in zip(annotations, segmentations, strict=True)]
        if working != size:
            image = image.resize(working[::-1], Image.Resampling.BILINEAR)
        xywh = np.array(boxes, np.float32).reshape(-1, 4) * np.tile(np.divide(working, size)[::-1], 2)
        pixels, found = self._transform(image, xywh, masks, rng)
        size = (pixels.shape[1], pixels.shape[2])
        result = []
        for index, box, mask in zip(found["labels"], found["boxes"], found["masks"], strict=True):
            changed = dict(annotations[index])
            if segmentations[index] is not None:
                if not mask.any():
                    continue
                changed["segmentation"] = region_to_rle(mask, 0, 0, size)
                box, area = box_and_area(changed["segmentation"], size)
            else:
                box = _clip([box[0], box[1], box[2] - box[0], box[3] - box[1]], size)
                area = box[2] * box[3]
                if min(box[2:]) <= 0:
                    continue
            result.append({**changed, "bbox": box, "area": area})
        return Image.fromarray(pixels.permute(1, 2, 0).numpy()), result

    def _transform(
        self, image: Image.Image, xywh: np.ndarray, masks: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """-> pixels (3, h, w) uint8, and `labels` and `boxes` (XYXY) as lists and `masks` (N, h, w) bool."""
        try:
            from torchvision import tv_tensors
            from torchvision.transforms.v2 import functional
        except ImportError as error:
            raise ImportError(
                f"`augmentation` {type(self.pipeline).__name__} requires torchvision: pip install torchvision."
                " FlipAndCrop does not require it."
            ) from error
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        canvas = masks.shape[1:]
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(xyxy).float(), format="XYXY", canvas_size=canvas),
            "masks": tv_tensors.Mask(torch.from_numpy(masks)),
            "labels": torch.arange(len(masks)),
        }
        # Fork only the CPU's generator, which the pipeline uses. `torch.manual_seed` would also seed CUDA's.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(1 << 63)))
            result = self.pipeline(tv_tensors.Image(functional.pil_to_tensor(image)), target)
        try:
            pixels, target = result
            boxes, found_masks, labels = target["boxes"], target["masks"], target["labels"].tolist()
            if isinstance(boxes, tv_tensors.BoundingBoxes):
                boxes = functional.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
            if isinstance(pixels, Image.Image):
                pixels = functional.pil_to_tensor(pixels.convert("RGB"))
            lengths = {len(boxes), len(found_masks), len(labels)}
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                "the pipeline must return an image and a dict with the keys 'boxes', 'masks' and 'labels', as it"
                f" receives them, got {type(result).__name__}. Keep the keys."
            ) from error
        if len(lengths) != 1 or found_masks.shape[1:] != pixels.shape[1:]:
            raise ValueError(
                f"the pipeline must transform boxes, masks, labels and pixels alike, got {len(boxes)} boxes, masks of"
                f" shape {tuple(found_masks.shape)} and {len(labels)} labels for pixels of shape {tuple(pixels.shape)}."
                " Correct the transform."
            )
        found = {"boxes": boxes.tolist(), "masks": found_masks.bool().numpy(), "labels": labels}
        return _as_uint8(pixels).as_subclass(torch.Tensor), found


def _as_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Convert the pixels (3, h, w) that a pipeline returned."""
    if pixels.is_floating_point():
        if not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
            raise ValueError(
                f"float pixels of the pipeline must be in [0, 1], got [{pixels.min():g}, {pixels.max():g}]. Remove the"
                " normalization; the image processor normalizes."
            )
        pixels = (pixels.clamp(0, 1) * 255).round().byte()
    if pixels.dtype != torch.uint8 or pixels.shape[0] != 3:
        raise ValueError(
            "the pipeline must return pixels (3, h, w) as uint8 or floats, got"
            f" {pixels.dtype} of shape {tuple(pixels.shape)}. Convert them."
        )
    return pixels


def _box_of(annotation: dict[str, Any], segmentation: Segmentation | None, size: tuple[int, int]) -> Sequence[float]:
    """Return the box of an annotation, or else that of its mask, or else an empty one."""
    if annotation.get("bbox") is not None:
        return annotation["bbox"]
    return [0.0, 0.0, 0.0, 0.0] if segmentation is None else box_and_area(segmentation, size)[0]
