"""Draws instances on an image. N instances; H W pixels of the image; boxes_xyxy in its pixels."""

import colorsys
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from ..model.image_io import read_rgb
from ..model.masks import read_segmentation, to_rle

_OPACITY = 0.45  # of a mask
_DARK = (20, 20, 20)
_CROWD = 20  # instances; of more, plates that would hide something are left out
_GOLDEN_RATIO = (5**0.5 - 1) / 2

# x0, y0, x1, y1 in pixels, the latter two exclusive.
Place = tuple[int, int, int, int]


def color_of(index: int) -> tuple[int, int, int]:
    """The colour (red, green, blue) of instance or class number `index`: bright, and unlike that of its neighbours."""
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
    """Draw masks, boxes, and plates with label and score, whatever of these is given, over an image.

    A mask is a translucent colour with an outline of that colour and a dark edge, so that it shows on dark and on
    light ground; nothing is drawn outside of it but boxes and plates. Lines and letters grow with the image. Among
    more than 20 instances, plates that would hide other plates, or more than they name, are left out. Of two
    instances that overlap the earlier one lies on top: the better one where they are sorted by score.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from transformers_rfdetr.data.drawing import draw_instances
        >>> masks = np.zeros((1, 120, 160), bool)
        >>> masks[0, 40:80, 50:110] = True
        >>> draw_instances(Image.new("RGB", (160, 120)), masks, labels=["building"], scores=[0.9]).size
        (160, 120)

    Args:
        image: The image in any mode, with the scale that the image processor gives it; it stays as it is. (H, W) is
            its size with the EXIF rotation applied.
        masks: (N, H, W) bool, or N COCO RLEs of that size, of which one at a time is decoded.
        boxes: (N, 4) boxes_xyxy.
        labels: N texts.
        scores: N numbers, written with two digits.
        color_indices: N numbers of colours, such as class ids, for a colour a class; 0 to N-1 by default.

    Returns:
        A new RGB image, (H, W).

    Raises:
        ValueError: lengths that differ; masks or boxes of another shape; texts without masks or boxes to put them at.
    """
    parts = {"masks": masks, "boxes": boxes, "labels": labels, "scores": scores, "color_indices": color_indices}
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"different numbers of {lengths}; pass one of each for every instance")
    count = max(lengths.values(), default=0)
    if not count:
        return read_rgb(image)
    if masks is None and boxes is None:
        raise ValueError(f"{count} instances have neither masks nor boxes; pass one of the two")

    colors = [color_of(int(index)) for index in (range(count) if color_indices is None else color_indices)]
    pixels = np.array(read_rgb(image))
    line = max(1, round(min(pixels.shape[:2]) / 250))
    places: list[Place | None] = [None] * count
    if masks is not None:
        shown = masks if isinstance(masks, list) else _to_array(masks)
        for index in reversed(range(count)):
            mask = _bitmap(shown[index])
            if mask.dtype != bool or mask.shape != pixels.shape[:2]:
                raise ValueError(
                    f"masks of {mask.dtype} {mask.shape} are not bool of the image's (height, width)"
                    f" {pixels.shape[:2]}; post-process with target_sizes=[(height, width)] and return_binary_maps=True"
                )
            places[index] = place = _extent(mask)
            if place is not None:
                region = np.s_[place[1] : place[3], place[0] : place[2]]
                pixels[region] = _paint(pixels[region], mask[region], colors[index], line)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    if boxes is not None:
        corners = _to_array(boxes)
        if corners.shape[1:] != (4,):
            raise ValueError(f"boxes have shape {corners.shape}; pass (N, 4): x0, y0, x1, y1 in pixels")
        frames = [(int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in corners.round()]
        places = list(frames)
        for (x0, y0, x1, y1), color in reversed(list(zip(frames, colors, strict=True))):
            pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_DARK, width=line + 2)
            pen.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 2), max(y0 + 1, y1 - 2)), outline=color, width=line)
    plates: list[Place] = []
    for index, place in enumerate(places):
        words = [] if labels is None else [str(labels[index])]
        words += [] if scores is None else [f"{float(scores[index]):.2f}"]
        if words and place is not None:
            text = " ".join(" ".join(words).split())
            plate = _write(pen, text, place, colors[index], plates, is_crowded=count > _CROWD)
            plates += [] if plate is None else [plate]
    return drawn


def draw_annotations(
    image: Image.Image, annotations: Sequence[Mapping[str, Any]], id2label: Mapping[int, str], **style: Any
) -> Image.Image:
    """Draw the ground truth of an image: COCO annotations, crowds too, in a colour a class.

    Args:
        image: The image, upright.
        annotations: Each with `category_id` as label, and `segmentation` or `bbox`: x, y, width, height in pixels.
        id2label: Label -> name.
        **style: Of [`draw_instances`]: `color_indices`.
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
    """Images in rows, such as an image, its ground truth and what was found, under the titles of the columns.

    Gaps and letters grow with the images.

    Args:
        rows: At least one, each of as many images of any size.
        titles: A line of text for each column; none by default.
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


def _to_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.is_floating_point() else values).numpy(force=True)  # numpy has no bfloat16
    return np.asarray(values)


def _bitmap(mask: Any) -> np.ndarray:
    return coco_mask.decode(mask).astype(bool) if isinstance(mask, dict) else np.asarray(mask)


def _extent(mask: np.ndarray) -> Place | None:
    """Where a mask (H, W) is, or None where it is nowhere."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if rows.size else None


def _paint(pixels: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], line: int) -> np.ndarray:
    """Pixels (h, w, 3) under a mask (h, w): tinted inside, the colour along its outline, dark on the very edge."""
    edge = _erode(mask, 1)
    inside = _erode(edge, line + 1)
    tinted = (1 - _OPACITY) * pixels + _OPACITY * np.array(color)
    painted = np.where(inside[..., None], tinted, np.where(edge[..., None], color, _DARK))
    return np.where(mask[..., None], painted, pixels).astype(np.uint8)


def _erode(mask: np.ndarray, steps: int) -> np.ndarray:
    """Mask (h, w) without its outermost `steps` pixels; outside of the array there is no mask."""
    for _ in range(steps):
        wide = np.pad(mask, 1)
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    place: Place,
    color: tuple[int, int, int],
    taken: Sequence[Place],
    is_crowded: bool,
) -> Place | None:
    """Write on a plate at `place`, inside the image and off the `taken` plates if there is room -> the plate.

    In a crowd a plate that hides others, or is larger than what it names, is left out: None.
    """
    width, height = pen.im.size
    left, top, right, bottom = place
    size = max(10, round(min(width, height) / 30))
    font = ImageFont.load_default(size)
    margin = max(1, size // 5)
    plate_width = round(pen.textlength(text, font)) + 2 * margin
    plate_height = sum(font.getmetrics()) + margin
    if is_crowded and plate_width * plate_height > (right - left) * (bottom - top):
        return None
    above, inside = top - plate_height, bottom - plate_height
    plates = []
    for x, y in ((left, above), (left, top), (left, bottom), (right - plate_width, above), (left, inside)):
        x, y = max(0, min(x, width - plate_width)), max(0, min(y, height - plate_height))
        plates.append((x, y, x + plate_width, y + plate_height))
    free = (p for p in plates if not any(p[0] < t[2] and t[0] < p[2] and p[1] < t[3] and t[1] < p[3] for t in taken))
    plate = next(free, None if is_crowded else plates[0])
    if plate is None:
        return None
    pen.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=color)
    is_light = np.dot(color, (0.299, 0.587, 0.114)) > 120
    ink = _DARK if is_light else (255, 255, 255)
    pen.text((plate[0] + margin, plate[1] + margin // 2), text, fill=ink, font=font)
    return plate
