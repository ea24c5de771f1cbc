"""Outlines of masks: the lines around their pixels, for formats that have polygons only.

Axis letters: R C rows and columns of a mask, V points of a ring. Points are x, y on the corners of pixels, and a ring
is closed: its first point is not repeated.
"""

from collections.abc import Sequence

import numpy as np


def trace_pixels(mask: np.ndarray) -> list[np.ndarray]:
    """Return the rings (V, 2) float64 around the pixels of a mask (R, C) bool, those of holes included.

    By the even-odd rule, they enclose exactly these pixels; pycocotools draws the same mask from them.
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
