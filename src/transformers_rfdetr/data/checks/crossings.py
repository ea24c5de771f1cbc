"""Whether the outline of a polygon crosses itself, and how much of its area that affects.

YOLO has one polygon for an object, so that writers join its parts and holes by bridges: lines without width, which the
outline follows forth and back. A bridge may lead across other edges without a change of the mask; that is not reported.

Axis letters: P points of a polygon, E edges of it. Edge i leads from point i to point i + 1.
"""

from itertools import pairwise
from typing import Any

import numpy as np

_MAX_EDGE_PAIRS = 1 << 20  # of one polygon that are compared for a crossing: half a second
_NUM_ROWS = 256  # along which areas are measured


def crosses_itself(polygon: np.ndarray) -> bool:
    """Return whether two edges of a polygon (2P,) cross. Edges may touch or overlap, and bridges may cross anything.

    False for a polygon with so many edges above each other that comparing them would take too long.
    """
    start = polygon.reshape(-1, 2)
    end = np.roll(start, -1, axis=0)
    if not _have_crossing(start, end):
        return False
    is_outline = _partners(polygon) < 0
    return bool(is_outline.all()) or _have_crossing(start[is_outline], end[is_outline])


def affected_share(polygon: np.ndarray) -> float:
    """Return the share, in [0, 1], of the area inside a polygon (2P,) that its crossings affect.

    Affected is what the outline encloses twice, which is not in the mask, and what it encloses in the other direction
    than the rest, as in a figure eight. Without bridges, the outline may be several rings, each of which has its own
    direction, such that the mask is on the same side of it as far as possible. Measured along 256 rows.
    """
    rings = _split_at_bridges(polygon)
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    ring_index: np.ndarray = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    low, high = start[:, 1].min(), start[:, 1].max()
    agreement, ring_area = np.zeros(len(rings)), np.zeros(len(rings))
    mask_area = 0.0
    for y in low + (np.arange(_NUM_ROWS) + 0.5) / _NUM_ROWS * (high - low):
        crossed = (start[:, 1] <= y) != (end[:, 1] <= y)
        (x0, y0), (x1, y1) = start[crossed].T, end[crossed].T
        x, ring = x0 + (y - y0) / (y1 - y0) * (x1 - x0), ring_index[crossed]
        order = x.argsort()
        x, ring, direction = x[order], ring[order], np.sign(y1 - y0)[order]
        side: np.ndarray = np.where(np.arange(len(x)) % 2, 1, -1)  # the mask begins at every second edge
        mask_area += (x * side).sum()
        np.add.at(agreement, ring, side * direction)
        np.add.at(ring_area, ring, x * direction)
    enclosed_area = abs((ring_area * np.where(agreement < 0, -1, 1)).sum())
    # What is enclosed twice counts twice in the enclosed area, and not in the mask; what is enclosed in the other
    # direction is subtracted from the one, and is in the other. Both differ by twice the affected area.
    affected = abs(mask_area - enclosed_area) / 2
    return float(affected / max(mask_area, (mask_area + enclosed_area) / 2, 1e-9))


def _partners(polygon: np.ndarray) -> np.ndarray:
    """Return for each edge that the outline also follows in the other direction the index of that edge, else -1."""
    start = polygon.reshape(-1, 2).tolist()
    partners: np.ndarray = np.full(len(start), -1)
    unpaired: dict[tuple[Any, ...], list[int]] = {}
    for index, edge in enumerate(pairwise([*start, start[0]])):
        one, other = map(tuple, edge)
        if waiting := unpaired.get((other, one)):
            partners[index] = waiting.pop()
            partners[partners[index]] = index
        else:
            unpaired.setdefault((one, other), []).append(index)
    return partners


def _split_at_bridges(polygon: np.ndarray) -> list[np.ndarray]:
    """Return the rings, each (V, 2), that remain of a polygon (2P,) without its bridges."""
    points, partners = polygon.reshape(-1, 2), _partners(polygon)
    # At a bridge, the ring continues where the outline comes back from it.
    following = (np.where(partners < 0, np.arange(len(points)), partners) + 1) % len(points)
    rings = []
    is_open = partners < 0
    for first in np.flatnonzero(is_open):
        ring, edge = [], int(first)
        while is_open[first]:
            if partners[edge] < 0:
                ring.append(edge)
            edge = int(following[edge])
            if edge == first:
                is_open[ring] = False
        if ring:
            rings.append(points[ring])
    return rings


def _have_crossing(start: np.ndarray, end: np.ndarray) -> bool:
    """Return whether two edges, from (E, 2) to (E, 2), cross."""
    order = np.minimum(start, end)[:, 0].argsort()
    start, end = start[order], end[order]
    low, high = np.minimum(start, end), np.maximum(start, end)
    # Edges are sorted by their left ends: an edge can cross only the later ones that begin left of its right end.
    stop: Any = np.searchsorted(low[:, 0], high[:, 0], "right")
    if (stop - np.arange(1, len(start) + 1)).sum() > _MAX_EDGE_PAIRS:
        return False
    for first in range(0, len(start), 256):  # all pairs at once may not fit in memory
        edges = np.arange(first, min(first + 256, len(start)))
        counts = stop[edges] - edges - 1
        one: np.ndarray = np.repeat(edges, counts)
        other = one + 1 + np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts)
        overlaps = (low[one, 1] <= high[other, 1]) & (low[other, 1] <= high[one, 1])
        a, b, c, d = start[one[overlaps]], end[one[overlaps]], start[other[overlaps]], end[other[overlaps]]
        if ((_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)).any():
            return True
    return False


def _side(start: np.ndarray, end: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(N, 2) each -> (N,) on which side of the line from start to end a point lies: -1, 1, or 0 on the line."""
    along, across = end - start, points - start
    cross = along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0]
    return np.sign(cross) * (np.abs(cross) > 1e-6)  # below 1e-6, rounding decides
