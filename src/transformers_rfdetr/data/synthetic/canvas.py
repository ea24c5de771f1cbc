"""Paint objects on an image, and keep track of the object that each pixel shows.

Lengths are in units (metres on the ground, millimetres on a tray), in frames whose origin is the middle of an object,
with x to the right and y down. Positions are in pixels of the image. Sizes are (H, W).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ...model.masks import box_and_area, rasterize, region_to_rle

SHADE = np.array([0.42, 0.46, 0.56])  # brightness of red, green and blue in a shadow
_LEAST_PIXELS = 12  # an object of fewer pixels is not drawn
_LEAST_INSIDE = 0.4  # nor is one of which less lies within the image
# Signed distance to an outline, positive inside, of the points x, y (h, w).
Depth = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Window(NamedTuple):
    """The pixels around an object, also those beyond the border of the image, and the object's frame."""

    x: np.ndarray  # (h, w) in units
    y: np.ndarray
    origin: np.ndarray  # (x, y) of the first pixel in the image
    canvas: tuple[slice, slice]  # the pixels within the image, as slices of the image
    inside: tuple[slice, slice]  # the same pixels as slices of the window


class Drawn(NamedTuple):
    """An object on the canvas."""

    category_id: int
    area: int  # pixels in the image before other objects hid some
    outlines: list[list[float]] | None  # polygons, if they describe its whole mask
    is_crowd: bool = False


class Canvas:
    """An image (H, W) that is being drawn, at `scale` pixels per unit."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], scale: float) -> None:
        self.rng, self.size, self.scale = rng, size, scale
        self.colors: np.ndarray = np.zeros((*size, 3), np.float32)
        self.owner: np.ndarray = np.zeros(size, np.int64)  # number of the object at each pixel; 0 is the ground
        self.objects: list[Drawn] = [Drawn(0, 0, None)]  # by number
        self.light = axes(rng.uniform(0, 2 * np.pi))[0]  # direction to the light
        self.grain = 0.04 * self.noise(0.8)

    def noise(self, cell: float) -> np.ndarray:
        """Return smooth noise (H, W) with a standard deviation of about 1 and spots that are `cell` units wide."""
        cells = [max(2, round(side / self.scale / cell)) for side in self.size]
        grid = Image.fromarray(self.rng.normal(0, 1.3, cells).astype(np.float32))
        return np.asarray(grid.resize(self.size[::-1], Image.Resampling.BICUBIC))

    def random_point(self) -> np.ndarray:
        """Return a random point (x, y) of the image in pixels."""
        return self.rng.random(2) * self.size[::-1]

    def window(self, center: np.ndarray, reach: float | None = None, angle: float = 0.0) -> Window:
        """Return the pixels within `reach` units of `center`, or the whole image, in a frame at `angle`."""
        low: np.ndarray = np.zeros(2, int)
        high = np.array(self.size[::-1])
        if reach is not None:
            low = np.floor(center - reach * self.scale).astype(int)
            high = np.ceil(center + reach * self.scale).astype(int)
        y, x = np.mgrid[low[1] : high[1], low[0] : high[0]] + 0.5
        points = np.stack([x - center[0], y - center[1]], axis=-1) / self.scale @ axes(angle).T
        first, last = (np.clip(corner, 0, self.size[::-1]) for corner in (low, high))
        canvas = np.s_[first[1] : last[1], first[0] : last[0]]
        inside = np.s_[first[1] - low[1] : last[1] - low[1], first[0] - low[0] : last[0] - low[0]]
        return Window(points[..., 0], points[..., 1], low, canvas, inside)

    def paint(
        self, window: Window, color: np.ndarray, depth: np.ndarray, softness: float = 0.0, opacity: float = 1.0
    ) -> None:
        """Paint `color`, (3,) or (h, w, 3), where `depth` (h, w), the units inside an outline, is positive.

        The edge is `softness` units wide, at least a pixel.
        """
        coverage = opacity * np.clip(depth[window.inside] / max(softness, 1 / self.scale) + 0.5, 0, 1)
        color = color[window.inside] if color.ndim == 3 else color
        self.colors[window.canvas] += coverage[..., None] * (color - self.colors[window.canvas])

    def shade(self, window: Window, depth: Depth, angle: float, height: float) -> None:
        """Paint the shadow of an object of `height` units, whose frame is at `angle`."""
        light = axes(angle) @ self.light
        steps = np.linspace(0, height, 8)
        shadow = np.max([depth(window.x + t * light[0], window.y + t * light[1]) for t in steps], axis=0)
        shaded = np.zeros((*shadow.shape, 3), np.float32)
        shaded[window.inside] = self.colors[window.canvas] * SHADE
        self.paint(window, shaded, shadow, softness=0.2 * height)

    def tone(self, window: Window, strength: float) -> np.ndarray:
        """Return brightness (h, w, 1) that varies with the grain of the image by `strength`."""
        tone = np.ones((*window.x.shape, 1), np.float32)
        tone[window.inside] += strength * self.grain[window.canvas][..., None]
        return tone

    def claim(
        self,
        category_id: int,
        window: Window,
        mask: np.ndarray,
        may_hide: float = 0.0,
        outlines: np.ndarray | None = None,
    ) -> bool:
        """Give the pixels of `mask` (h, w) to a new object; if there is no space for it, return False.

        There is none if too little of it lies in the image, or if more than a fraction `may_hide` of another object
        were hidden.
        """
        visible = mask[window.inside]
        if visible.sum() < max(_LEAST_PIXELS, _LEAST_INSIDE * mask.sum()):
            return False
        owner = self.owner[window.canvas]
        hidden = np.bincount(owner[visible], minlength=len(self.objects))[1:]
        left = np.bincount(self.owner.ravel(), minlength=len(self.objects))[1:] - hidden
        least = (1 - may_hide) * np.array([item.area for item in self.objects[1:]])
        if ((hidden > 0) & (left < np.maximum(least, _LEAST_PIXELS))).any():
            return False
        owner[visible] = len(self.objects)
        polygons = None
        if outlines is not None and (outlines >= 0).all() and (outlines.reshape(-1, 2) <= self.size[::-1]).all():
            polygons = outlines.tolist()
        self.objects.append(Drawn(category_id, int(visible.sum()), polygons))
        return True

    def rasterize(self, window: Window, outlines: np.ndarray) -> np.ndarray:
        """Return the pixels (h, w) of polygons (N, 2P) in pixels of the image."""
        origin = np.tile(window.origin, outlines.shape[1] // 2)
        return rasterize([list(outlines - origin)], window.x.shape, window.x.shape)[0]

    def join(self, first: int) -> None:
        """Turn the objects from number `first` on into one crowd."""
        if len(self.objects) > first:
            self.owner[self.owner > first] = first
            area = sum(item.area for item in self.objects[first:])
            self.objects[first:] = [Drawn(self.objects[first].category_id, area, None, is_crowd=True)]

    def render(self) -> Image.Image:
        """Return the image as a camera takes it: with its exposure, white balance, blur and noise."""
        exposure = self.rng.uniform(0.7, 1.2) * self.rng.normal(1, 0.04, 3)
        noise = self.rng.normal(0, self.rng.uniform(1, 7), (*self.size, 1))
        colors = (self.colors * exposure + noise).clip(0, 255).astype(np.uint8)
        return Image.fromarray(colors).filter(ImageFilter.GaussianBlur(self.rng.uniform(0.2, 0.7)))

    def annotations(self, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return a COCO annotation for each object of the categories: polygons if wholly visible, else an RLE."""
        found: list[dict[str, Any]] = []
        for number, item in enumerate(self.objects):
            if number == 0 or item.category_id not in category_ids:
                continue
            mask = self.owner == number
            is_whole = item.outlines is not None and mask.sum() == item.area
            segmentation = item.outlines if is_whole else region_to_rle(mask, 0, 0, self.size)
            bbox, area = box_and_area(segmentation, self.size)
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": image_id,
                    "category_id": item.category_id,
                    "bbox": bbox,
                    "area": area,
                    "iscrowd": int(item.is_crowd),
                    "segmentation": segmentation,
                }
            )
        return found


def axes(angle: float) -> np.ndarray:
    """Return the axes of a frame at `angle` radians, as rows (2, 2)."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def disc_depth(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the depth inside a disc around the origin."""
    return radius - np.hypot(x, y)


def box_depth(x: np.ndarray, y: np.ndarray, half: tuple[float, float], radius: float = 0.0) -> np.ndarray:
    """Return the depth inside a box around the origin, of half extents `half` and corners rounded by `radius`."""
    beyond_x, beyond_y = np.abs(x) - half[0] + radius, np.abs(y) - half[1] + radius
    outside = np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0))
    return radius - outside - np.minimum(np.maximum(beyond_x, beyond_y), 0)
