"""Draw instances on an image. N instances; H W pixels of the image; boxes_xyxy in its pixels."""

import colorsys
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from scipy import ndimage

from ..model.image_io import read_rgb
from ..model.masks import read_segmentation, to_rle
from ..model.validation import require

_OPACITY = 0.45  # of a mask
_DARK = (20, 20, 20)
_MAX_UNCROWDED = 20  # instances; with more, small ones have no label
_MAX_SHIFT = 2  # a label is drawn at most so many of its heights above or below its usual places
_GOLDEN_RATIO = (5**0.5 - 1) / 2

Color = tuple[int, int, int]  # red, green, blue
Extent = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the latter two exclusive


def color_of(index: int) -> Color:
    """Return a bright color for an instance or a class; neighboring indices have clearly different colors."""
    hue, value = (0.55 + index * _GOLDEN_RATIO) % 1, (1.0, 0.85)[index % 2]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.8, value))
    return red, green, blue


def draw_instances(
    image: Image.Image,
    masks: np.ndarray | torch.Tensor | Sequence[dict[str, Any]] | None = None,
    boxes: np.ndarray | torch.Tensor | Sequence[Sequence[float]] | None = None,
    labels: Sequence[str] | None = None,
    scores: np.ndarray | torch.Tensor | Sequence[float] | None = None,
    *,
    color_indices: Sequence[int] | None = None,
) -> Image.Image:
    """Draw masks, boxes, labels and scores on a copy of an image.

    A mask is tinted, and outlined in its color with a dark edge, which is visible on light and on dark images. Line
    width and text size grow with the image. Where instances overlap, the earlier one is on top. A label is at the
    largest part of a mask. It never covers the label of an earlier instance; one without a free place is not drawn,
    and with more than 20 instances, neither is one that is larger than its instance. An instance with an empty mask
    and no box is not drawn.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from transformers_rfdetr.data.drawing import draw_instances
        >>> masks = np.zeros((1, 120, 160), bool)
        >>> masks[0, 40:80, 50:110] = True
        >>> draw_instances(Image.new("RGB", (160, 120)), masks, labels=["building"], scores=[0.9]).size
        (160, 120)

    Args:
        image: An image of any mode, scaled to 8 bits as by the image processor. Its EXIF rotation is applied first.
        masks: (N, H, W) bool, or a list of N COCO RLEs, which are decoded one at a time.
        boxes: (N, 4) boxes_xyxy.
        labels: N strings.
        scores: N numbers, drawn with two decimals.
        color_indices: N arguments of [`color_of`], such as class ids; 0 to N - 1 by default.

    Returns:
        A new RGB image, (H, W).

    Raises:
        ValueError: the arguments have different lengths, masks or boxes have a wrong shape, or both are missing.
    """
    count = _common_length(masks=masks, boxes=boxes, labels=labels, scores=scores, color_indices=color_indices)
    if not count:
        return read_rgb(image)
    if masks is None and boxes is None:
        raise ValueError(f"`masks` or `boxes` is required, got neither for {count} instances")

    colors = [color_of(int(index)) for index in (range(count) if color_indices is None else color_indices)]
    pixels = np.array(read_rgb(image))
    line_width = max(1, round(min(pixels.shape[:2]) / 250))
    extents: Sequence[Extent | None] = []
    if masks is not None:
        extents = _draw_masks(pixels, masks if isinstance(masks, list) else _to_array(masks), colors, line_width)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    if boxes is not None:
        extents = _draw_boxes(pen, _to_array(boxes), colors, line_width)
    texts = [""] * count if labels is None else [str(label) for label in labels]
    if scores is not None:
        texts = [f"{text} {float(score):.2f}" for text, score in zip(texts, scores, strict=True)]
    _draw_texts(pen, [" ".join(text.split()) for text in texts], extents, colors)  # on one line
    return drawn


def draw_annotations(
    image: Image.Image, annotations: Sequence[Mapping[str, Any]], id2label: Mapping[int, str], **style: Any
) -> Image.Image:
    """Draw the ground truth of an image, crowds included, with a color for each class.

    Args:
        image: The image, upright.
        annotations: COCO annotations, with labels as `category_id`, and `segmentation` or `bbox` in pixels.
        id2label: Label -> name.
        **style: Arguments of [`draw_instances`] that replace those chosen here.
    """
    size = (image.height, image.width)
    shapes = [read_segmentation(one.get("segmentation"), size) for one in annotations]
    labels = [one["category_id"] for one in annotations]
    style = {"labels": [id2label[label] for label in labels], "color_indices": labels} | style
    if annotations and all(shape is not None for shape in shapes):
        return draw_instances(image, [to_rle(shape, size) for shape in shapes], **style)
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (one["bbox"] for one in annotations)]
    return draw_instances(image, None, boxes, **style)


def draw_grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] | None = None) -> Image.Image:
    """Arrange images in rows and columns, such as an image, its ground truth and its predictions.

    Gaps and text size grow with the images.

    Args:
        rows: At least one row; all rows have the same number of images, which may differ in size.
        titles: One line of text above each column; none by default.
    """
    height = max(image.height for image in rows[0])
    gap = max(4, round(height / 60))
    font = ImageFont.load_default(max(10, round(height / 20)))
    head = sum(font.getmetrics()) + gap if titles else 0
    titles = titles or [""] * len(rows[0])
    columns = zip(titles, zip(*rows, strict=True), strict=True)
    widths = [max(math.ceil(font.getlength(title)), *(one.width for one in column)) for title, column in columns]
    heights = [max(image.height for image in row) for row in rows]
    lefts = list(itertools.accumulate((width + gap for width in widths), initial=0))
    tops = list(itertools.accumulate((height + gap for height in heights), initial=head))
    grid = Image.new("RGB", (lefts[-1] - gap, tops[-1] - gap), "white")
    for left, title in zip(lefts, titles, strict=False):
        ImageDraw.Draw(grid).text((left, 0), title, fill=_DARK, font=font)
    for top, row in zip(tops, rows, strict=False):
        for left, image in zip(lefts, row, strict=False):
            grid.paste(image, (left, top))
    return grid


def _common_length(**parts: Any) -> int:
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{', '.join(lengths)} must have the same length, got {lengths}. Pass one of each for every instance."
        )
    return max(lengths.values(), default=0)


def _to_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.is_floating_point() else values).numpy(force=True)  # numpy has no bfloat16
    return np.asarray(values)


def _draw_masks(
    pixels: np.ndarray, masks: np.ndarray | list[dict[str, Any]], colors: Sequence[Color], line_width: int
) -> list[Extent | None]:
    """Draw masks on pixels (H, W, 3) in place; return the extent of each mask's largest part, None of an empty one."""
    extents: list[Extent | None] = [None] * len(masks)
    for index in reversed(range(len(masks))):
        mask = masks[index]
        mask = coco_mask.decode(mask).view(bool) if isinstance(mask, dict) else np.asarray(mask)
        if mask.dtype != bool or mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"`masks` must be bool (N, {pixels.shape[0]}, {pixels.shape[1]}), as the image, got {mask.dtype}"
                f" {mask.shape}. Post-process with target_sizes=[(height, width)] and return_binary_maps=True."
            )
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size:
            left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
            cut = mask[top:bottom, left:right]
            pixels[top:bottom, left:right] = _paint(pixels[top:bottom, left:right], cut, colors[index], line_width)
            x0, y0, x1, y1 = _largest_part(cut)
            extents[index] = (left + x0, top + y0, left + x1, top + y1)
    return extents


def _largest_part(mask: np.ndarray) -> Extent:
    """Return the extent of the largest connected part of a mask (h, w)."""
    parts, _ = ndimage.label(mask)
    rows, columns = ndimage.find_objects(parts)[np.bincount(parts.ravel())[1:].argmax()]
    return columns.start, rows.start, columns.stop, rows.stop


def _paint(pixels: np.ndarray, mask: np.ndarray, color: Color, line_width: int) -> np.ndarray:
    """Return pixels (h, w, 3) with a mask (h, w) in three layers: a dark edge, an outline, and the tinted inside."""
    edge = _erode(mask, 1)
    inside = _erode(edge, line_width + 1)
    tinted = (1 - _OPACITY) * pixels + _OPACITY * np.array(color)
    painted = np.where(inside[..., None], tinted, np.where(edge[..., None], color, _DARK))
    return np.where(mask[..., None], painted, pixels).astype(np.uint8)


def _erode(mask: np.ndarray, steps: int) -> np.ndarray:
    """Remove the outermost `steps` pixels of a mask (h, w); pixels outside of the array are not in the mask."""
    for _ in range(steps):
        wide = np.pad(mask, 1)
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask


def _draw_boxes(
    pen: ImageDraw.ImageDraw, boxes: np.ndarray, colors: Sequence[Color], line_width: int
) -> list[Extent | None]:
    require(boxes.shape[1:] == (4,), "boxes", boxes, "an array of shape (N, 4), x0, y0, x1, y1 in pixels")
    extents = [(int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in boxes.round()]
    for (x0, y0, x1, y1), color in reversed(list(zip(extents, colors, strict=True))):
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_DARK, width=line_width + 2)
        pen.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 2), max(y0 + 1, y1 - 2)), outline=color, width=line_width)
    return list(extents)


def _draw_texts(
    pen: ImageDraw.ImageDraw, texts: Sequence[str], extents: Sequence[Extent | None], colors: Sequence[Color]
) -> None:
    """Draw the text of each instance that has an extent, on a plate in its color."""
    font = ImageFont.load_default(max(10, round(min(pen.im.size) / 30)))
    margin = max(1, int(font.size) // 5)
    plates: list[Extent] = []
    is_crowded = sum(extent is not None for extent in extents) > _MAX_UNCROWDED
    for text, extent, color in zip(texts, extents, colors, strict=True):
        if not text or extent is None:
            continue
        size = round(pen.textlength(text, font)) + 2 * margin, sum(font.getmetrics()) + margin
        plate = _place_plate(size, extent, plates, pen.im.size, is_crowded=is_crowded)
        if plate is None:
            continue
        plates.append(plate)
        x0, y0, x1, y1 = plate
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=color)
        is_light = np.dot(color, (0.299, 0.587, 0.114)) > 120
        pen.text((x0 + margin, y0 + margin // 2), text, fill=_DARK if is_light else (255, 255, 255), font=font)


def _place_plate(
    size: tuple[int, int], extent: Extent, taken: Sequence[Extent], image_size: tuple[int, int], *, is_crowded: bool
) -> Extent | None:
    """Return where a plate is drawn: inside the image, beside the plates that are `taken`, and near its instance.

    Return None if there is no such place, or if the plate is larger than an instance in a crowd. Sizes are
    (width, height).
    """
    (width, height), (left, top, right, bottom) = size, extent
    if is_crowded and width * height > (right - left) * (bottom - top):
        return None
    above, inside = top - height, bottom - height
    places = [(left, above), (left, top), (left, bottom), (right - width, above), (left, inside)]
    shifts = [row * height for row in range(1, _MAX_SHIFT + 1)]
    places += [(left, y) for shift in shifts for y in (above - shift, bottom + shift, top + shift)]
    for x, y in places:
        x, y = max(0, min(x, image_size[0] - width)), max(0, min(y, image_size[1] - height))
        if not any(x < x1 and x0 < x + width and y < y1 and y0 < y + height for x0, y0, x1, y1 in taken):
            return x, y, x + width, y + height
    return None
