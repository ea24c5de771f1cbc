"""Paste objects of other images into an image, as an augmentation.

Sizes are (H, W); boxes are COCO's [x, y, width, height] in pixels; R C are rows and columns of a pasted region.
"""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask

from ..model.coco_labels import clip_box
from ..model.masks import box_and_area, read_segmentation, region_to_rle, to_rle
from ..model.validation import is_index, is_number, require
from .augmentation import Annotations, check_range

_MIN_SIDE = 4  # pixels of the region of a pasted object
_BLEND_SIGMA = 1.0  # pixels
_BLEND_MARGIN = 4  # pixels around an object that its blended edge depends on


class _Pasted(NamedTuple):
    annotation: dict[str, Any]
    pixels: np.ndarray  # (R, C, 3) uint8
    mask: np.ndarray  # (R, C) bool
    top: int
    left: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        rows, columns = self.mask.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + columns)


class CopyPaste:
    """Paste random objects of one random image of a dataset, following https://arxiv.org/abs/2012.07177.

    The paper changes the scale of both images and pastes objects where they are. Here each object has its own scale,
    position and flip, and lies inside the image; [`ScaleJitter`] changes the scale of the result. An object keeps the
    size that it has relative to its own image, times a random scale. Objects that touch the border of their image are
    incomplete and are not pasted, nor are crowds and objects without a mask.

    The mask of a covered object becomes its visible part, with new box and area; the object is dropped if too little
    of it is visible. Crowds stay unchanged, and so do objects without a mask unless too little of their box is visible.

    The objects depend only on `rng`: nothing is cached, so that a run resumes exactly and no memory is used. One more
    image is read for each image with pasted objects.

    Example:
        >>> import numpy as np
        >>> from transformers_rfdetr.data.copy_paste import CopyPaste
        >>> from transformers_rfdetr.data.dataset import InstanceDataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset
        >>> images, coco = draw_dataset(8)
        >>> dataset = InstanceDataset(coco, images)
        >>> augmentation = CopyPaste(dataset, probability=1.0)
        >>> image, annotations = augmentation(images[0], [], np.random.default_rng(0))
        >>> len(annotations) > 0
        True

    Args:
        dataset: An [`InstanceDataset`]; the label map of its objects is that of the augmented images.
        probability: Probability of pasting.
        max_objects: Largest number of pasted objects; it is uniformly distributed from 1.
        scale: Smallest and largest scale of a pasted object; it is uniformly distributed between them.
        min_visible: Objects of which a smaller fraction is visible are dropped.

    Raises:
        ValueError: the dataset has no objects with masks, or a value is outside its range.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        probability: float = 0.5,
        max_objects: int = 10,
        scale: tuple[float, float] = (0.5, 1.5),
        min_visible: float = 0.2,
    ) -> None:
        rule, remedy = "an InstanceDataset, as load_instance_dataset returns it", "Choose another augmentation."
        require(hasattr(dataset, "indices_with_masks"), "dataset", type(dataset).__name__, rule, remedy)
        self._indices = dataset.indices_with_masks()
        rule = "a dataset with masks, so that objects can be pasted"
        require(len(self._indices) > 0, "dataset", f"{len(dataset)} images without masks", rule, remedy)
        for name, value in (("probability", probability), ("min_visible", min_visible)):
            require(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        require(is_index(max_objects) and max_objects >= 1, "max_objects", max_objects, "an integer of at least 1")
        check_range("scale", scale)
        self.dataset, self.probability, self.max_objects = dataset, probability, max_objects
        self.scale, self.min_visible = scale, min_visible

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """Return the image with pasted objects, and the annotations of what is visible."""
        if rng.random() >= self.probability:
            return image, annotations
        size = (image.height, image.width)
        pasted = self._draw_objects(size, rng)
        if not pasted:
            return image, annotations
        pixels = np.array(image)
        for one in pasted:
            _blend(pixels[one.window], one)
        covered: np.ndarray = np.zeros(size, bool)
        visible = []
        for one in reversed(pasted):
            visible.append(self._visible_part(one.annotation, covered))
            covered[one.window] |= one.mask
        kept = [self._visible_part(annotation, covered) for annotation in annotations]
        return Image.fromarray(pixels), [one for one in kept + visible[::-1] if one is not None]

    def _draw_objects(self, size: tuple[int, int], rng: np.random.Generator) -> list[_Pasted]:
        """Return random objects of a random image, placed in an image of `size`; the later ones cover the earlier."""
        sample = self.dataset[int(self._indices[rng.integers(len(self._indices))])]
        count = rng.integers(1, self.max_objects, endpoint=True)
        pasted: list[_Pasted] = []
        for index in rng.permutation(len(sample["annotations"])):
            placed = self._place(sample["image"], sample["annotations"][index], size, rng)
            pasted += [] if placed is None else [placed]
            if len(pasted) == count:
                break
        return pasted

    def _place(
        self, source: Image.Image, annotation: dict[str, Any], size: tuple[int, int], rng: np.random.Generator
    ) -> _Pasted | None:
        """Return an object of the image `source` placed in an image of `size`; None if it cannot be pasted."""
        source_size = (source.height, source.width)
        segmentation = read_segmentation(annotation.get("segmentation"), source_size)
        if segmentation is None or annotation["iscrowd"]:
            return None
        rle = to_rle(segmentation, source_size)
        x, y, width, height = coco_mask.toBbox(rle).astype(int).tolist()
        x0, y0, x1, y1 = x - 1, y - 1, x + width + 1, y + height + 1  # with a pixel of background
        if min(width, height) == 0 or min(x0, y0) < 0 or x1 > source.width or y1 > source.height:
            return None
        wanted = (size[0] * size[1] / (source_size[0] * source_size[1])) ** 0.5 * rng.uniform(*self.scale)
        factor = min(wanted, size[0] / (y1 - y0), size[1] / (x1 - x0))
        rows, columns = round((y1 - y0) * factor), round((x1 - x0) * factor)
        if min(rows, columns) < _MIN_SIDE:
            return None
        region = Image.fromarray(255 * coco_mask.decode(rle)[y0:y1, x0:x1])
        mask = np.asarray(region.resize((columns, rows), Image.Resampling.BILINEAR)) >= 128
        pixels = np.asarray(source.resize((columns, rows), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)))
        if rng.random() < 0.5:
            mask, pixels = mask[:, ::-1], pixels[:, ::-1]
        top, left = (int(rng.integers(room, endpoint=True)) for room in (size[0] - rows, size[1] - columns))
        if not mask.any():
            return None
        label = {"category_id": annotation["category_id"], "iscrowd": 0}
        return _Pasted(label | _describe_mask(mask, top, left, size), pixels, mask, top, left)

    def _visible_part(self, annotation: dict[str, Any], covered: np.ndarray) -> dict[str, Any] | None:
        """Return an annotation without the pixels that are covered, (H, W) bool; None if too little of it is visible.

        A mask without a covered pixel stays unchanged.
        """
        size = (covered.shape[0], covered.shape[1])
        if annotation.get("iscrowd"):
            return annotation
        segmentation = read_segmentation(annotation.get("segmentation"), size)
        if segmentation is None:
            x0, y0, x1, y1 = map(round, clip_box(annotation["bbox"], size))
            box = covered[y0:y1, x0:x1]
            return None if box.size and 1 - box.mean() < self.min_visible else annotation
        rle = to_rle(segmentation, size)
        left, top, width, height = coco_mask.toBbox(rle).astype(int).tolist()
        window = slice(top, top + height), slice(left, left + width)
        if not covered[window].any():
            return annotation
        mask = coco_mask.decode(rle)[window] > 0
        visible = mask & ~covered[window]
        if visible.sum() < max(1, self.min_visible * mask.sum()):
            return None
        return annotation if (visible == mask).all() else annotation | _describe_mask(visible, top, left, size)


def _describe_mask(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """Return segmentation, box and area of a region (R, C) bool at (top, left) of an image of `size`."""
    rle = region_to_rle(mask, top, left, size)
    box, area = box_and_area(rle, size)
    return {"segmentation": rle, "bbox": box, "area": area}


def _blend(background: np.ndarray, one: _Pasted) -> None:
    """Draw an object on a region (R, C, 3) uint8; towards its edge it becomes half transparent.

    Nothing is drawn outside the mask, where the background of the object's own image would be visible.
    """
    mask = Image.fromarray(np.pad(255 * one.mask.astype(np.uint8), _BLEND_MARGIN))
    blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(_BLEND_SIGMA)), np.float32) / 255
    inner = slice(_BLEND_MARGIN, -_BLEND_MARGIN)
    alpha = (blurred[inner, inner] * one.mask)[..., None]
    background[...] = (alpha * one.pixels + (1 - alpha) * background).round()
