"""Turn masks into the SVG paths around them.

Axis letters: H W pixels of a mask, V points of a ring. Points are x, y.
"""

import math

import numpy as np

from ...data.outlines import simplify_ring
from ...inference.instances import Instances
from ...model.masks import rasterize

_TOLERANCE = 0.75  # pixels of the page's image that an outline may be beside the mask
_MAX_TRACED_POINTS, _MAX_CHARACTERS = 8_000, 6_000  # of a mask's outline


def outline(instances: Instances, index: int, size: tuple[int, int]) -> str:
    """Return the path around an instance in an image of `size` (height, width).

    If the outline of a mask is too long, the mask is traced on a coarser grid. The path of the box is returned if that
    does not help, if no pixel is left at this size, or if there is no mask.
    """
    if instances.masks is not None:
        for shrink in (1, 2, 4, 8):
            grid = (math.ceil(size[0] / shrink), math.ceil(size[1] / shrink))
            [mask] = rasterize([instances.masks[index]], instances.image_size, grid)
            rings = trace_rings(mask)
            if sum(map(len, rings)) > _MAX_TRACED_POINTS:
                continue
            path = "".join(_path(simplify_ring(ring, _TOLERANCE), grid, size) for ring in rings)
            if 0 < len(path) <= _MAX_CHARACTERS:
                return path
    x0, y0, x1, y1 = instances.boxes[index]
    return _path(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), instances.image_size, size)


def _path(points: np.ndarray, from_size: tuple[int, int], to_size: tuple[int, int]) -> str:
    """Return the closed path through points (V, 2) that are scaled from one (height, width) to another."""
    scaled = points * (to_size[1] / from_size[1], to_size[0] / from_size[0])
    return f"M{' '.join(f'{x:.4g} {y:.4g}' for x, y in scaled)}Z"


def trace_rings(mask: np.ndarray) -> list[np.ndarray]:
    """Return the closed lines (V, 2) float64 around the pixels of a mask (H, W) bool.

    The first point is not repeated. By the even-odd rule, the lines contain the centers of exactly these pixels.
    """
    import contourpy  # comes with matplotlib

    lines = contourpy.contour_generator(z=np.pad(mask, 1).astype(np.float64)).lines(0.5)
    return [line[:-1] - 0.5 for line in lines]  # from padded indices of pixels to coordinates of the image
