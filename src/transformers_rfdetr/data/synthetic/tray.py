"""Draw photographs of bolts, nuts and washers on a tray, seen from above.

Lengths are in millimetres.
"""

from typing import Any

import numpy as np
from PIL import Image

from .canvas import Canvas, Window, axes, box_depth, disc_depth

CLASSES = ("bolt", "nut", "washer")
_TRAYS = np.array([[66, 88, 112], [150, 122, 92], [86, 90, 92], [176, 172, 164], [64, 98, 84]])
_METALS = np.array([[186, 188, 192], [150, 152, 156], [192, 164, 96], [70, 72, 78], [176, 122, 92]])


def draw_tray(seed: int, size: tuple[int, int] = (160, 160)) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw one tray, 60 mm wide along its shorter side, and return it with the annotations of its parts.

    Parts touch and overlap each other, and nuts and washers have holes.

    Example:
        >>> from transformers_rfdetr.data.synthetic import draw_tray
        >>> image, annotations = draw_tray(seed=1)
        >>> image.size, sorted({annotation["category_id"] for annotation in annotations})
        ((160, 160), [1, 2, 3])

    Args:
        seed: An integer >= 0, also used as `image_id`.
        size: (H, W) of the image in pixels.

    Returns:
        The RGB image, and a COCO annotation with an RLE of the visible pixels for each part. Category ids are places in
        `CLASSES`, from 1.
    """
    rng = np.random.default_rng(seed)
    tray = Tray(rng, size, min(size) / 60)
    tray.draw_ground()
    wanted = rng.integers(2, 10)
    for _ in range(6 * wanted):
        kind = rng.integers(len(CLASSES))
        wanted -= (tray.draw_bolt, tray.draw_nut, tray.draw_washer)[kind]()
        if wanted == 0:
            break
    return tray.render(), tray.annotations(seed, range(1, len(CLASSES) + 1))


class Tray(Canvas):
    """A tray that is being drawn, at `scale` pixels per millimetre."""

    def draw_ground(self) -> None:
        """Draw the bottom of the tray, brushed in one direction."""
        window = self.window(self.random_point(), angle=self.rng.uniform(0, np.pi))
        brushed = 0.02 * np.sin(2.2 * window.y + 0.5 * np.sin(0.3 * window.x))
        tone = 1 + self.grain + 0.06 * self.noise(25) + brushed
        self.colors[:] = self.rng.choice(_TRAYS) * tone[..., None]

    def metal(self, window: Window) -> np.ndarray:
        """Return the color (h, w, 3) of a metal, brighter towards the light."""
        slope = 0.012 * (window.x * self.light[0] + window.y * self.light[1])
        return self.rng.choice(_METALS) * self.rng.uniform(0.9, 1.1) * (self.tone(window, 0.6) + slope[..., None])

    def draw_washer(self) -> bool:
        """Draw a flat ring."""
        outer = self.rng.uniform(5, 9)
        inner = outer * self.rng.uniform(0.45, 0.6)
        window = self.window(self.random_point(), outer + 3)

        def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.minimum(disc_depth(x, y, outer), -disc_depth(x, y, inner))

        depth = ring(window.x, window.y)
        if not self.claim(CLASSES.index("washer") + 1, window, depth > 0, may_hide=0.25):
            return False
        self.shade(window, ring, 0.0, height=1.2)
        color = self.metal(window)
        self.paint(window, color, depth)
        self.paint(window, color * 1.15, 0.3 - np.abs(depth - 0.6), opacity=0.7)
        return True

    def draw_nut(self) -> bool:
        """Draw a hexagon with a threaded hole."""
        apothem, angle = self.rng.uniform(4, 7), self.rng.uniform(0, np.pi)
        window = self.window(self.random_point(), 1.2 * apothem + 5, angle)

        def nut(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.minimum(_hexagon_depth(x, y, apothem), -disc_depth(x, y, 0.5 * apothem))

        depth = nut(window.x, window.y)
        if not self.claim(CLASSES.index("nut") + 1, window, depth > 0, may_hide=0.25):
            return False
        self.shade(window, nut, angle, height=3.5)
        color = self.metal(window)
        self.paint(window, color * 0.85, depth)
        chamfer = np.minimum(disc_depth(window.x, window.y, 0.97 * apothem), depth - 0.3)
        self.paint(window, color * 1.1, chamfer)
        return True

    def draw_bolt(self) -> bool:
        """Draw a bolt that lies on its side: a head and a threaded shaft."""
        length, width, angle = self.rng.uniform(14, 28), self.rng.uniform(3.5, 6), self.rng.uniform(0, 2 * np.pi)
        head = 0.7 * width
        window = self.window(self.random_point(), length / 2 + head + 4, angle)

        def bolt(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            shaft = box_depth(x, y, (length / 2, width / 2), radius=0.4)
            return np.maximum(shaft, box_depth(x + length / 2, y, (head, 0.9 * width), radius=0.6))

        depth = bolt(window.x, window.y)
        if not self.claim(CLASSES.index("bolt") + 1, window, depth > 0, may_hide=0.25):
            return False
        self.shade(window, bolt, angle, height=3.0)
        across = axes(angle)[1] @ self.light
        is_head = window.x < -length / 2 + head
        rounding = 0.25 * across * window.y / width - 0.3 * np.abs(window.y / width) ** 2
        thread = np.where(is_head, 0, 0.12 * np.sin(2 * np.pi * window.x / 1.6))
        facets = np.where(is_head & (np.abs(window.y) > 0.45 * width), -0.12, 0)
        self.paint(window, self.metal(window) * (1 + rounding + thread + facets)[..., None], depth)
        return True


def _hexagon_depth(x: np.ndarray, y: np.ndarray, apothem: float) -> np.ndarray:
    """Return the depth inside a regular hexagon around the origin, `apothem` from its middle to a side."""
    normals = [axes(side * np.pi / 3)[0] for side in range(3)]
    return np.min([apothem - np.abs(x * normal[0] + y * normal[1]) for normal in normals], axis=0)
