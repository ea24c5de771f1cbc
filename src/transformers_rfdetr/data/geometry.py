"""Convert what annotation programs draw to COCO's boxes, polygons and RLE.

A geometry is a dict: with `segmentation`, polygons or an RLE, or with `bbox` alone if a box was drawn, since a box does
not show which of its pixels belong to the object. Coordinates are pixels, y points down; sizes are (H, W).
"""

import base64
import binascii
import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from ..model.masks import MAX_COORDINATE, box_polygon, read_segmentation, region_to_rle, to_rle

Geometry = dict[str, Any]

_NUM_ELLIPSE_POINTS = 128  # the area is 0.04 % below that of the ellipse
_MAX_IMAGE_PIXELS = 1 << 31  # COCO's RLE counts them in 32 bits


def check_size(height: Any, width: Any) -> tuple[int, int]:
    """Return the size of an image that an annotation file declares.

    Raises:
        ValueError: it is not two positive integers, or Pillow would refuse an image of that size.
    """
    limit = min(2 * (PIL.Image.MAX_IMAGE_PIXELS or _MAX_IMAGE_PIXELS), _MAX_IMAGE_PIXELS)
    sides = [float(side) if isinstance(side, str | int | float) else 0.0 for side in (height, width)]
    if not all(1 <= side <= limit and side == int(side) for side in sides) or sides[0] * sides[1] > limit:
        raise ValueError(
            f"height and width must be positive integers of at most {limit} pixels together, got {height!r:.40} and"
            f" {width!r:.40}. Correct them."
        )
    return int(sides[0]), int(sides[1])


def read_points(values: Any) -> np.ndarray:
    """Return a list of pairs x, y as (P, 2).

    Raises:
        ValueError: it is anything else, or a number is not finite or too large.
    """
    try:
        points: np.ndarray = np.array(values, np.float64)
    except (ValueError, TypeError):
        points = np.zeros(0)
    if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) <= MAX_COORDINATE).all():
        raise ValueError(
            f"points must be a list of pairs of finite numbers below 1e6, got {values!r:.80}. Correct them."
        )
    return points


def polygon(points: np.ndarray) -> Geometry:
    """Return a polygon (P, 2).

    Raises:
        ValueError: it has fewer than three points, or a coordinate is not finite or too large.
    """
    if len(points) < 3:
        raise ValueError(f"a polygon must have at least 3 points, got {len(points)}. Draw or remove it.")
    flat: list[float] = points.astype(np.float64).round(3).ravel().tolist()
    read_segmentation([flat], (1, 1))  # checks the coordinates and the length of the outline
    return {"segmentation": [flat]}


def box(x0: float, y0: float, x1: float, y1: float) -> Geometry:
    """Return the box with two opposite corners."""
    corners = read_points([[x0, y0], [x1, y1]])
    (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    return {"bbox": [left, top, right - left, bottom - top]}


def rotated_box(corners: np.ndarray, degrees: float, center: Sequence[float]) -> Geometry:
    """Return a box, given as two corners (2, 2), that is turned clockwise around a point; turned, it is a polygon."""
    (x0, y0), (x1, y1) = corners
    if degrees % 360 == 0:
        return box(x0, y0, x1, y1)
    return polygon(_rotate(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), degrees, center))


def ellipse(center: Sequence[float], radii: Sequence[float], degrees: float = 0.0) -> Geometry:
    """Return an ellipse as a polygon: its center x, y; its radii along x and y before it is turned clockwise.

    Raises:
        ValueError: a radius is not positive, or a number is not finite.
    """
    read_points([center, radii])
    if min(radii) <= 0:
        raise ValueError(f"radii must be above 0, got {list(radii)!r:.80}. Draw or remove the ellipse.")
    angles = np.linspace(0, 2 * math.pi, _NUM_ELLIPSE_POINTS, endpoint=False)
    points = np.array(center) + np.stack([np.cos(angles), np.sin(angles)], 1) * radii
    return polygon(_rotate(points, degrees, center))


def _rotate(points: np.ndarray, degrees: float, center: Sequence[float]) -> np.ndarray:
    """Turn points (P, 2) around a center; clockwise as it looks, because y points down."""
    if not math.isfinite(degrees):
        raise ValueError(f"the rotation must be a finite number of degrees, got {degrees}. Correct it.")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (points - center) @ np.array([[cos, sin], [-sin, cos]]) + center


def polygon_with_holes(exterior: np.ndarray, holes: Sequence[np.ndarray], size: tuple[int, int]) -> Geometry:
    """Return a polygon (P, 2) without holes (Q, 2): as RLE if there is one, since COCO unites polygons."""
    if not holes:
        return polygon(exterior)
    filled, hole = (
        coco_mask.decode(to_rle([np.array(ring) for part in parts for ring in part["segmentation"]], size))
        for parts in ([polygon(exterior)], [polygon(hole) for hole in holes])
    )
    return region(filled & ~hole & 1 == 1, 0, 0, size)


def region(mask: np.ndarray, top: int, left: int, size: tuple[int, int]) -> Geometry:
    """Return a mask (R, C) bool at (top, left) of an image as RLE; what extends beyond the image is cut off."""
    height, width = size
    inside = mask[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]
    return {"segmentation": region_to_rle(inside, max(top, 0), max(left, 0), size)}


def join(parts: Sequence[Geometry], size: tuple[int, int] | None) -> Geometry:
    """Return the union of the parts of one object. `size` of the image is needed only for RLE.

    The union of boxes is the box around them. Beside other parts, a box is a part of the mask.
    """
    if len(parts) == 1:
        return parts[0]
    if all("bbox" in part for part in parts):
        boxes = np.array([part["bbox"] for part in parts])
        low, high = boxes[:, :2].min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)
        return box(*low.tolist(), *high.tolist())
    segmentations = [_as_segmentation(part) for part in parts]
    if all(isinstance(segmentation, list) for segmentation in segmentations):
        return {"segmentation": [ring for segmentation in segmentations for ring in segmentation]}
    if size is None:
        raise ValueError("the height and width of the image must be known to join masks. Add them to the file.")
    rles = [to_rle(read, size) for s in segmentations if (read := read_segmentation(s, size)) is not None]
    merged = coco_mask.merge(rles)
    return {"segmentation": {"size": list(size), "counts": merged["counts"].decode()}}


def _as_segmentation(part: Geometry) -> Any:
    if "segmentation" in part:
        return part["segmentation"]
    x, y, width, height = part["bbox"]
    return [box_polygon(x, y, x + width, y + height)]


def decode_base64(text: Any) -> bytes:
    """Return the bytes of a base64 string.

    Raises:
        ValueError: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"a mask must be a base64 string, got {text!r:.40}: {error}. Export it again.") from error


def decode_png_mask(content: bytes, max_size: tuple[int, int] | None = None) -> np.ndarray:
    """Return a PNG of two values, such as annotation programs embed, as (R, C) bool.

    Set is what is not black, or not transparent if the PNG has transparency. The size is read before the pixels are
    decompressed.

    Raises:
        ValueError: it is not a PNG, or larger than `max_size` (H, W).
    """
    try:
        with PIL.Image.open(BytesIO(content), formats=["PNG"]) as image:
            size = (image.height, image.width)
            if max_size is not None and (size[0] > max_size[0] or size[1] > max_size[1]):
                raise ValueError(f"it must be at most {max_size[0]} x {max_size[1]} pixels, got {size[0]} x {size[1]}")
            if "A" in image.getbands() or "transparency" in image.info:
                return np.array(image.convert("RGBA"))[..., 3] > 0
            return np.array(image if image.mode in ("1", "L", "P") else image.convert("L")) > 0
    except Exception as error:  # Pillow raises many types, among them DecompressionBombError
        raise ValueError(f"a mask cannot be decoded as a PNG: {error}. Export it again.") from error
