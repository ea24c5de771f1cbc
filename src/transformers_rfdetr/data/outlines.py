"""Outlines of masks: the lines around their pixels, for formats that have polygons only.

Axis letters: R C rows and columns of a mask, V points of a ring. Points are x, y on the corners of pixels, and a ring
is closed: its first point is not repeated.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from ..model.masks import decode_box, to_rle

# Pixels that a simplified line may deviate from the middles of the sides of pixels. The centers of the pixels are
# 0.35 away from the line through these.
_TOLERANCE = 0.3


def trace_pixels(mask: np.ndarray) -> list[np.ndarray]:
    """Return the rings (V, 2) float64 around the pixels of a mask (R, C) bool, those of holes included.

    By the even-odd rule, they enclose exactly these pixels; pycocotools draws the same mask from them. Each begins at
    its upper left corner: of its highest corners, the leftmost.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    # Around each corner of pixels: an odd number of pixels means that the line turns. Two pixels that touch only here
    # mean that two lines turn.
    above_left, above_right = padded[:-1, :-1], padded[:-1, 1:]
    below_left, below_right = padded[1:, :-1], padded[1:, 1:]
    turns = (above_left + above_right + below_left + below_right) % 2
    turns += 2 * ((above_left == below_right) & (above_right == below_left) & (above_left != above_right))
    y, x = np.nonzero(turns)
    y, x = (np.repeat(axis, turns[y, x]) for axis in (y, x))
    # On each row, every second gap between the turns is a line; on each column too.
    across, down = _pair(np.lexsort((x, y))), _pair(np.lexsort((y, x)))
    rings: list[np.ndarray] = []
    is_open: np.ndarray = np.ones(len(x), bool)
    for start in range(len(x)):
        ring, corner = [], start
        while is_open[corner]:
            ring += [corner, across[corner]]
            is_open[ring[-2:]] = False
            corner = down[across[corner]]
        if ring:
            rings.append(np.stack([x[ring], y[ring]], 1).astype(np.float64))
    return rings


def trace_outer_rings(rle: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the rings (V, 2) int32 around the parts of the mask of a compressed RLE, without those of holes."""
    region, top, left = decode_box(rle)
    rings: list[np.ndarray] = [ring.astype(np.int32) for ring in trace_pixels(region)]
    # A ring begins at its upper left corner: the pixel right and below of it is inside.
    return [ring + np.array([left, top], np.int32) for ring in rings if region[ring[0, 1], ring[0, 0]]]


def _pair(order: np.ndarray) -> np.ndarray:
    """Return the partner of each element, if the elements are paired in this order."""
    partner = np.empty_like(order)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner


def join_rings(rings: Sequence[np.ndarray]) -> np.ndarray:
    """Return one ring (V, 2) that encloses, by the even-odd rule, what the rings enclose.

    A line without width leads from ring to ring, and back; pycocotools draws no pixel for it.
    """
    starts = [ring[:1] for ring in rings]
    closed = [points for ring in rings for points in (ring, ring[:1])]
    return np.concatenate([*closed, *starts[-2::-1]]) if len(rings) > 1 else rings[0]


def simplify_ring(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Return those points of a ring (V, 2) that a line within `tolerance` needs, by Douglas and Peucker's algorithm.

    A ring that would become a line or a point is returned as it is.
    """
    points = np.concatenate([ring, ring[:1]])
    farthest = int(np.hypot(*(points - points[0]).T).argmax())
    is_kept: np.ndarray = np.zeros(len(points), bool)
    is_kept[[0, farthest]] = True
    spans = [(0, farthest), (farthest, len(ring))]
    while spans:
        start, end = spans.pop()
        if end - start < 2:
            continue
        along = points[end] - points[start]
        away = points[start + 1 : end] - points[start]
        distances = np.abs(along[0] * away[:, 1] - along[1] * away[:, 0]) / np.hypot(*along)
        middle = start + 1 + int(distances.argmax())
        if distances[middle - start - 1] > tolerance:
            is_kept[middle] = True
            spans += [(start, middle), (middle, end)]
    is_kept[-1] = False
    return points[is_kept] if is_kept.sum() > 2 else ring


def editable_polygons(rle: Mapping[str, Any]) -> list[list[float]] | None:
    """Return polygons with few points, from which pycocotools draws exactly the mask of a compressed RLE.

    The lines lead through the middles of the sides of pixels, and may deviate by less than the distance to the nearest
    center of a pixel. None if no polygons draw the mask, such as with holes.
    """
    region, top, left = decode_box(rle)
    rings = [simplify_ring(_through_sides(ring), _TOLERANCE) for ring in trace_pixels(region)]
    polygons = [(ring + np.array([left, top])).ravel().tolist() for ring in rings]
    if not polygons:
        return None
    drawn = to_rle([np.array(polygon) for polygon in polygons], tuple(rle["size"]))
    return polygons if np.array_equal(coco_mask.decode(drawn), coco_mask.decode(rle)) else None


def _through_sides(ring: np.ndarray) -> np.ndarray:
    """Return the middles of the sides of pixels that a ring (V, 2) of corners leads along."""
    sides = np.roll(ring, -1, axis=0) - ring
    lengths = np.abs(sides).sum(1).astype(int)
    starts, steps = np.repeat(ring, lengths, axis=0), np.repeat(np.sign(sides), lengths, axis=0)
    along = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts + steps * (along[:, None] + 0.5)
