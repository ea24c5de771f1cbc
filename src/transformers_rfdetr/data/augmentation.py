"""Augmentations of an image, its boxes and its masks together.

An augmentation is a callable `(image, annotations, rng) -> (image, annotations)`: a PIL image in RGB, COCO
annotations in its pixels, and the `numpy.random.Generator` that all its draws come from. It changes neither of them in
place. Sizes are (H, W); boxes are COCO's [x, y, width, height]; N objects; h w pixels of a working size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from ..model.masks import Segmentation, box_and_area, rasterize, read_segmentation, region_to_rle

Annotations = list[dict[str, Any]]
Augmentation = Callable[[Image.Image, Annotations, np.random.Generator], tuple[Image.Image, Annotations]]


def as_augmentation(augmentation: Any) -> Augmentation | None:
    """An augmentation, a pipeline of `torchvision.transforms.v2`, which is wrapped, or None -> an augmentation or None.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(augmentation, torch.nn.Module):
        return TorchvisionTransform(augmentation)
    if augmentation is not None and not callable(augmentation):
        raise ValueError(
            f"augmentation {augmentation!r:.80} cannot be called; pass FlipAndCrop(), a torchvision.transforms.v2"
            " pipeline or a function (image, annotations, rng) -> (image, annotations)"
        )
    return augmentation


class FlipAndCrop:
    """rfdetr's own recipe: sometimes a random square of the image instead of the whole, and mirrored or not.

    rfdetr resizes the image until its short side is one of `short_sides`, cuts a square out of that and resizes the
    square to the model's input. Here the square is cut out of the image as it is, in whole pixels, so that the
    processor's resize is the only one.

    Objects that lie outside the square leave. Boxes are clipped to it; areas are those of what is left of the shape, or
    of the box where there is no shape. Crowds are treated like objects.

    Example:
        >>> import numpy as np
        >>> from transformers_rfdetr.data.augmentation import FlipAndCrop
        >>> from transformers_rfdetr.data.synthetic import draw_scene
        >>> image, annotations = draw_scene(seed=0)
        >>> image, annotations = FlipAndCrop(crop=1.0)(image, annotations, np.random.default_rng(0))
        >>> image.size
        (339, 339)

    Args:
        flip: Probability that the image is mirrored, left to right.
        crop: Probability that a square is cut out.
        short_sides: Short sides in pixels that the image is thought to be resized to.
        crop_sides: Smallest and largest side in pixels of the square in that resized image; it is never larger than
            the image's short side.
        turn: Probability that the image is turned by one, two or three quarters: for images without an up and a
            down, such as those from above or from a microscope. The original recipe has none.

    Raises:
        ValueError: a probability outside [0, 1], a side below 1 pixel, or a smallest side above the largest.
    """

    def __init__(
        self,
        flip: float = 0.5,
        crop: float = 0.5,
        short_sides: Sequence[int] = (400, 500, 600),
        crop_sides: tuple[int, int] = (384, 600),
        turn: float = 0.0,
    ) -> None:
        for name, value in (("flip", flip), ("crop", crop), ("turn", turn)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is outside [0, 1]; it is a probability")
        if not short_sides or min(short_sides) < 1:
            raise ValueError(f"short_sides {short_sides!r} are not sides of at least 1 pixel; rfdetr's: 400, 500, 600")
        if len(crop_sides) != 2 or not 1 <= crop_sides[0] <= crop_sides[1]:
            raise ValueError(f"crop_sides {crop_sides!r} are not (smallest, largest) in pixels; rfdetr's: (384, 600)")
        self.flip, self.crop, self.turn = flip, crop, turn
        self.short_sides, self.crop_sides = tuple(short_sides), tuple(crop_sides)

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """The image, cut, mirrored and turned as `rng` says, with what is left of its annotations."""
        if rng.random() < self.crop:
            left, top, side = self._draw_square(image.size, rng)
            size = (image.height, image.width)
            image = image.crop((left, top, left + side, top + side))
            cut = (_crop(annotation, size, left, top, side) for annotation in annotations)
            annotations = [annotation for annotation in cut if annotation is not None]
        if rng.random() < self.flip:
            size = (image.height, image.width)
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            annotations = [_mirror(annotation, size) for annotation in annotations]
        if self.turn and rng.random() < self.turn:
            for _ in range(rng.integers(1, 4)):
                size = (image.height, image.width)
                image = image.transpose(Image.Transpose.ROTATE_90)
                annotations = [_turn(annotation, size) for annotation in annotations]
        return image, annotations

    def _draw_square(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int]:
        """(W, H) -> left, top and side of a square, in pixels."""
        resized = rng.choice(self.short_sides)
        wanted = rng.integers(self.crop_sides[0], self.crop_sides[1], endpoint=True)
        side = max(1, round(float(min(wanted / resized, 1)) * min(size)))
        left, top = (int(rng.integers(extent - side, endpoint=True)) for extent in size)
        return left, top, side


def _crop(annotation: dict[str, Any], size: tuple[int, int], left: int, top: int, side: int) -> dict[str, Any] | None:
    """What a square of an image of `size` shows of an annotation, or None."""
    shape = read_segmentation(annotation.get("segmentation"), size)
    box, area = annotation.get("bbox"), annotation.get("area")
    cut = dict(annotation)
    if box is not None:
        cut["bbox"] = clip_box([box[0] - left, box[1] - top, *box[2:]], (side, side))
        if min(cut["bbox"][2:]) <= 0:
            return None
        if area is not None and shape is None:
            cut["area"] = area * (cut["bbox"][2] * cut["bbox"][3]) / (box[2] * box[3])
    if shape is None:
        return cut if box is not None else None
    if isinstance(shape, dict):
        region = coco_mask.decode(shape)[top : top + side, left : left + side]
        shape = coco_mask.encode(np.asfortranarray(region))
    else:
        shape = [polygon - np.resize([left, top], polygon.size) for polygon in shape]
    visible_box, visible_area = box_and_area(shape, (side, side))
    if not visible_area:
        return None
    return {**cut, "segmentation": _as_coco(shape), "bbox": cut.get("bbox", visible_box), "area": visible_area}


def _mirror(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The annotation of the image of `size` mirrored left to right: x -> W - x."""
    # A pixel lies between two whole numbers, so that the last column's right edge, W, becomes 0.
    width = size[1]
    return _moved(
        annotation,
        size,
        box=lambda x, y, w, h: [width - x - w, y, w, h],
        points=lambda xy: xy * [-1, 1] + [width, 0],
        pixels=np.fliplr,
    )


def _turn(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The annotation of the image of `size` turned by a quarter, counterclockwise: (x, y) -> (y, W - x)."""
    width = size[1]
    return _moved(
        annotation,
        size,
        box=lambda x, y, w, h: [y, width - x - w, h, w],
        points=lambda xy: xy[:, ::-1] * [1, -1] + [0, width],
        pixels=np.rot90,
    )


def _moved(
    annotation: dict[str, Any],
    size: tuple[int, int],
    *,
    box: Callable[..., list[float]],
    points: Callable[[np.ndarray], np.ndarray],
    pixels: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """The annotation with its box, the points (P, 2) of its polygons or the pixels (H, W) of its RLE moved."""
    moved = dict(annotation)
    if annotation.get("bbox") is not None:
        moved["bbox"] = box(*annotation["bbox"])
    shape = read_segmentation(annotation.get("segmentation"), size)
    if isinstance(shape, dict):
        shape = coco_mask.encode(np.asfortranarray(pixels(coco_mask.decode(shape))))
    elif shape is not None:
        shape = [points(polygon.reshape(-1, 2)).ravel() for polygon in shape]
    if shape is not None:
        moved["segmentation"] = _as_coco(shape)
    return moved


def _as_coco(shape: Segmentation) -> Any:
    """A shape in one of the forms of COCO's JSON."""
    return shape if isinstance(shape, dict) else [polygon.tolist() for polygon in shape]


def clip_box(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """[x, y, width, height] -> the part inside an image of `size` (H, W); not above 0 wide or high where none is."""
    left, top = max(box[0], 0), max(box[1], 0)
    return [left, top, min(box[0] + box[2], size[1]) - left, min(box[1] + box[3], size[0]) - top]


class TorchvisionTransform:
    """A pipeline of `torchvision.transforms.v2` as an augmentation.

    The pipeline gets a `tv_tensors.Image` (3, h, w) uint8 and a dict of `boxes` (`tv_tensors.BoundingBoxes`, XYXY),
    `masks` (`tv_tensors.Mask`, (N, h, w)) and `labels` (the positions of the annotations, (N,)), and returns such a
    pair. Objects that it drops, as `SanitizeBoundingBoxes` does, leave; so do objects of which no pixel is left. Where
    an object has a mask, its new box and area are the mask's: torchvision's own box of a turned object is too large.

    Masks are drawn for all objects at once, so that image and masks are scaled down first if the image is large.
    The pipeline's draws come from `rng` alone, and torch's global generator stays as it is.

    Args:
        pipeline: It returns 8-bit or float pixels in [0, 1]; normalisation is the processor's.
        max_size: Longer side in pixels above which the image is scaled down.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: the pipeline returns something else.
    """

    def __init__(self, pipeline: Callable[..., Any], max_size: int = 1024) -> None:
        if max_size < 1:
            raise ValueError(f"max_size {max_size} is not a side of at least 1 pixel; 1024 is the default")
        self.pipeline, self.max_size = pipeline, max_size

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """What the pipeline makes of the image and its annotations."""
        size = (image.height, image.width)
        shapes = [read_segmentation(annotation.get("segmentation"), size) for annotation in annotations]
        scale = min(1.0, self.max_size / max(size))
        working = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        masks: np.ndarray = np.zeros((len(shapes), *working), bool)
        has_segmentation = [i for i, shape in enumerate(shapes) if shape is not None]
        masks[has_segmentation] = rasterize([shapes[i] for i in has_segmentation], size, working)
        boxes = [_box_of(annotation, shape, size) for annotation, shape in zip(annotations, shapes, strict=True)]
        if working != size:
            image = image.resize(working[::-1], Image.Resampling.BILINEAR)
        xywh = np.array(boxes, np.float32).reshape(-1, 4) * np.tile(np.divide(working, size)[::-1], 2)
        pixels, found = self._transform(image, xywh, masks, rng)
        size = (pixels.shape[1], pixels.shape[2])
        result = []
        for position, box, mask in zip(found["labels"], found["boxes"], found["masks"], strict=True):
            changed = dict(annotations[position])
            if shapes[position] is not None:
                if not mask.any():
                    continue
                changed["segmentation"] = region_to_rle(mask, 0, 0, size)
                box, area = box_and_area(changed["segmentation"], size)
            else:
                box = clip_box([box[0], box[1], box[2] - box[0], box[3] - box[1]], size)
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
                f"augmentation {type(self.pipeline).__name__} needs torchvision (pip install torchvision);"
                " FlipAndCrop does not"
            ) from error
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        canvas = masks.shape[1:]
        target = {
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(xyxy).float(), format="XYXY", canvas_size=canvas),
            "masks": tv_tensors.Mask(torch.from_numpy(masks)),
            "labels": torch.arange(len(masks)),
        }
        # Only the CPU's generator: the draws are made there, and seeding CUDA's would outlive the fork.
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
                f"the pipeline returned {type(result).__name__}, not the pair of image and target that it was given;"
                " keep the keys 'boxes', 'masks' and 'labels'"
            ) from error
        if len(lengths) != 1 or found_masks.shape[1:] != pixels.shape[1:]:
            raise ValueError(
                f"the pipeline returned {len(boxes)} boxes, masks of shape {tuple(found_masks.shape)} and"
                f" {len(labels)} labels for pixels of shape {tuple(pixels.shape)}; change all of them alike"
            )
        if pixels.is_floating_point():
            if not (pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
                raise ValueError(
                    f"the pipeline returned float pixels in [{pixels.min():g}, {pixels.max():g}], not in [0, 1];"
                    " take the normalisation out: the processor does it"
                )
            pixels = (pixels.clamp(0, 1) * 255).round().byte()
        if pixels.dtype != torch.uint8 or pixels.shape[0] != 3:
            raise ValueError(
                f"the pipeline returned {pixels.dtype} pixels of shape {tuple(pixels.shape)}; return (3, h, w), 8-bit"
                " or float in [0, 1]"
            )
        found = {"boxes": boxes.tolist(), "masks": found_masks.bool().numpy(), "labels": labels}
        return pixels.as_subclass(torch.Tensor), found


def _box_of(annotation: dict[str, Any], shape: Segmentation | None, size: tuple[int, int]) -> Sequence[float]:
    """The annotation's box, or its shape's, or an empty one."""
    if annotation.get("bbox") is not None:
        return annotation["bbox"]
    return [0.0, 0.0, 0.0, 0.0] if shape is None else box_and_area(shape, size)[0]
