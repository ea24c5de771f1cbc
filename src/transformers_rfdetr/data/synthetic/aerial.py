"""Draw aerial images of buildings, trees, cars, pools and tanks.

Lengths are in metres on the ground.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .canvas import Canvas, Window, axes, box_depth, disc_depth

CLASSES = ("building", "tree", "car", "pool", "tank")
_BUILDING, _TREE, _CAR, _POOL, _TANK = range(1, len(CLASSES) + 1)  # category ids

# A wing is an axis-aligned rectangle in the frame of its building: center x, y and half extents.
Wing = tuple[float, float, float, float]

_GROUNDS = np.array([[104, 122, 74], [122, 134, 82], [92, 110, 72], [160, 148, 104], [134, 116, 90], [116, 128, 92]])
_ROOFS = np.array(
    [[162, 98, 78], [142, 86, 70], [128, 98, 82], [98, 106, 118], [142, 144, 146], [188, 184, 176], [84, 84, 90]]
)
_CROWNS = np.array([[70, 94, 52], [58, 84, 54], [86, 106, 56], [92, 98, 48]])
_BODIES = np.array(
    [[226, 226, 228], [178, 182, 186], [52, 54, 60], [150, 38, 36], [44, 70, 128], [96, 102, 108], [190, 172, 132]]
)
_WATERS = np.array([[84, 176, 198], [64, 148, 190], [104, 190, 196]])
_TANKS = np.array([[222, 222, 216], [196, 198, 194], [170, 160, 146], [148, 110, 90]])
_ASPHALT, _PAINT, _GLASS = np.array([128, 127, 124]), np.array([214, 214, 220]), np.array([38, 44, 52])
_COPING = np.array([206, 200, 188])
_CORNERS = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
_ROAD_HALF_WIDTH = 3.2


def draw_scene(
    seed: int,
    size: tuple[int, int] = (384, 512),
    *,
    metres_per_pixel: float | tuple[float, float] = 0.2,
    classes: Sequence[str] = CLASSES,
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw one aerial image of a village, a works or a park, and return it with its annotations.

    Roofs are rectangles, L, T or enclose a courtyard, and are hipped, gabled or flat. Objects cast shadows, and are
    partly hidden by taller ones or cut off by the border. Cars are parked in rows, and crowns touch and overlap. An
    image whose seed ends in 3 has no objects; one whose seed ends in 6 has a crowd of garden sheds.

    Example:
        >>> from transformers_rfdetr.data.synthetic import draw_scene
        >>> image, annotations = draw_scene(seed=0)
        >>> image.size, sorted({annotation["category_id"] for annotation in annotations})
        ((512, 384), [1, 2, 3, 4])

    Args:
        seed: An integer >= 0, also used as `image_id`.
        size: (H, W) of the image in pixels, at least 24 pixels and 20 metres each.
        metres_per_pixel: The ground resolution, or the range that it is drawn from. Houses are 7 to 25 metres long.
        classes: Names of the classes to annotate. Category ids are places in `CLASSES`, from 1.

    Returns:
        The RGB image, and a COCO annotation for each object: `id` from 1, `image_id`, `category_id`, `bbox`
        [x, y, width, height] and `area` in pixels, `iscrowd`, `segmentation`. Masks contain only visible pixels, so
        that they do not overlap. Fully visible buildings are polygons, one for each wing; all others are RLE.

    Raises:
        ValueError: `size` is too small, or a class is unknown.
    """
    if unknown := set(classes) - set(CLASSES):
        raise ValueError(f"`classes` must be among {', '.join(CLASSES)}, got {', '.join(sorted(unknown))}.")
    finest, coarsest = np.broadcast_to(metres_per_pixel, 2)
    if min(size) < 24 or min(size) * finest < 20:
        raise ValueError(
            f"`size` must be at least 24 pixels and 20 metres on both sides, got {size} pixels of {metres_per_pixel}"
            " metres. Increase one of them."
        )
    rng = np.random.default_rng(seed)
    scene = _Aerial(rng, size, 1 / rng.uniform(finest, coarsest))
    scene.draw_ground()
    if seed % 10 == 6:
        scene.build_sheds()
    if seed % 10 != 3:
        scene.draw_objects()
    return scene.render(), scene.annotations(seed, [CLASSES.index(name) + 1 for name in classes])


class _Aerial(Canvas):
    """An aerial image that is being drawn, at `scale` pixels per metre."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int], scale: float) -> None:
        super().__init__(rng, size, scale)
        self.road_angle = rng.uniform(0, 2 * np.pi)
        self.paved: np.ndarray = np.zeros(size, bool)  # where nothing is built or planted
        self.grain = self.grain + 0.07 * self.noise(12) + 0.05 * self.noise(2.5)

    def draw_ground(self) -> None:
        """Draw parcels along a road, some of them ploughed."""
        self.road_start = self.random_point()
        window = self.window(self.road_start, angle=self.road_angle)
        x, y = window.x, window.y
        widths = self.rng.uniform(18, 40, 2)
        columns, rows = (x // widths[0]).astype(int), (y // widths[1]).astype(int)
        parcels = (columns - columns.min()) * (np.ptp(rows) + 1) + rows - rows.min()
        colors = self.rng.choice(_GROUNDS, parcels.max() + 1)
        ploughed = self.rng.random(parcels.max() + 1) < 0.25
        tone = 1 + self.grain + 0.06 * ploughed[parcels] * np.sin(2 * np.pi * y / 1.6)
        self.colors[:] = colors[parcels] * tone[..., None]
        self.paint(window, _ASPHALT * self.tone(window, 0.4), _ROAD_HALF_WIDTH - np.abs(y))
        dashes = np.where(x % 6 < 3, 0.15, -1) - np.abs(y)
        self.paint(window, _PAINT, dashes, opacity=0.7)
        self.paved[:] = np.abs(y) < _ROAD_HALF_WIDTH + 1

    def draw_objects(self) -> None:
        """Draw the objects of a village, a works or a park, from the ground upwards."""
        area = self.size[0] * self.size[1] / self.scale**2
        kind = self.rng.choice(["village", "works", "park"], p=[0.45, 0.35, 0.2])
        if self.rng.random() < {"village": 0.2, "works": 0.5, "park": 0.1}[kind]:
            self.pave_car_park()
        self.repeat(self.drive_car, area / 120)
        if kind != "works":
            self.repeat(self.dig_pool, area / 700)
        if kind != "park":
            self.repeat(self.build_house, area / 350)
        if kind == "works":
            self.repeat(self.build_tank, area / 80)
        self.repeat(self.plant_tree, area / {"village": 120, "works": 300, "park": 60}[kind])

    def repeat(self, draw: Callable[[], bool], most: float) -> None:
        """Call `draw` until it has found space for a random number of objects, up to about `most`."""
        wanted = self.rng.integers(round(most) + 2)
        for _ in range(8 * wanted):
            wanted -= draw()
            if wanted == 0:
                break

    def drive_car(self) -> bool:
        """Draw a car on the road or at its side."""
        along = self.rng.uniform(-1, 1) * sum(self.size) / self.scale
        place = [along, self.rng.choice([-1, 1]) * self.rng.choice([1.6, 4.4])]
        center = self.road_start + place @ axes(self.road_angle) * self.scale
        return self.park(center, self.road_angle + self.rng.normal(0, 0.04))

    def pave_car_park(self) -> None:
        """Draw a car park with rows of cars along the road."""
        center, angle = self.random_point(), self.road_angle + self.rng.integers(2) * np.pi / 2
        rows, columns = self.rng.integers(1, 4), self.rng.integers(3, 9)
        half = (1.35 * columns + 1, 2.7 * rows + 1)
        window = self.window(center, sum(half), angle)
        depth = box_depth(window.x, window.y, half)
        self.paint(window, _ASPHALT * self.rng.uniform(0.8, 1.1) * self.tone(window, 0.4), depth)
        lines = 0.12 - np.abs((window.x + 1.35 * columns + 1.35) % 2.7 - 1.35)
        self.paint(window, _PAINT, np.minimum(lines, depth - 1), opacity=0.6)
        self.paved[window.canvas] |= depth[window.inside] > -1
        share = self.rng.uniform(0.3, 1)
        for column, row in np.ndindex(columns, rows):
            if self.rng.random() < share:
                place = np.array([2.7 * (column - columns / 2 + 0.5), 5.4 * (row - rows / 2 + 0.5)])
                self.park(center + place @ axes(angle) * self.scale, angle + np.pi / 2 + self.rng.normal(0, 0.03))

    def park(self, center: np.ndarray, angle: float) -> bool:
        """Draw a car."""
        length, width = self.rng.choice([[4.3, 1.9], [4.9, 2.0], [6.4, 2.3]], p=[0.5, 0.35, 0.15])
        half = np.array([length, width]) * self.rng.uniform(0.48, 0.54)
        window = self.window(center, length, angle)

        def body(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return box_depth(x, y, half, radius=0.5)

        depth = body(window.x, window.y)
        if not self.claim(_CAR, window, depth > 0):
            return False
        self.shade(window, body, angle, height=1.0)
        color = self.rng.choice(_BODIES) * self.rng.uniform(0.85, 1.1)
        self.paint(window, color * self.tone(window, 0.3), depth)
        direction = self.rng.choice([-1, 1])
        for middle, extent in ((0.3, 0.13), (-0.68, 0.1)):  # windscreen and rear window
            glass = box_depth(window.x - direction * middle * half[0], window.y, (extent * half[0], 0.8 * half[1]), 0.1)
            self.paint(window, _GLASS, glass, opacity=0.9)
        return True

    def dig_pool(self) -> bool:
        """Draw a swimming pool: a rectangle with round corners, a disc or a kidney."""
        angle = self.road_angle + self.rng.integers(4) * np.pi / 2 + self.rng.normal(0, 0.12)
        long, wide = self.rng.uniform(2.5, 5.5), self.rng.uniform(1.6, 2.6)
        window = self.window(self.random_point(), long + wide + 1, angle)
        kind = self.rng.choice(["box", "disc", "kidney"], p=[0.5, 0.2, 0.3])
        if kind == "box":
            depth = box_depth(window.x, window.y, (long, wide), radius=self.rng.uniform(0.1, 1.5))
        elif kind == "disc":
            depth = disc_depth(window.x, window.y, wide)
        else:
            ends = [disc_depth(window.x - side * 0.55 * long, window.y, 0.45 * long + wide / 4) for side in (-1, 1)]
            depth = np.maximum(ends[0] - 0.3, ends[1])
        is_free = not self.owner[window.canvas][(depth > -1)[window.inside]].any()
        if self.is_paved(window, depth > -1) or not is_free or not self.claim(_POOL, window, depth > 0):
            return False
        self.paint(window, _COPING * self.tone(window, 0.3), depth + self.rng.uniform(0.3, 0.8))
        ripples = 0.05 * np.sin(5 * window.x + 3 * np.sin(2 * window.y))
        water = self.rng.choice(_WATERS) * (self.tone(window, 0.5) + ripples[..., None])
        self.paint(window, water * np.clip(1.15 - 0.12 * depth, 0.7, 1.1)[..., None], depth)
        return True

    def build_house(self) -> bool:
        """Draw a house; one of three may hide a part of others."""
        angle = self.road_angle + self.rng.integers(4) * np.pi / 2 + self.rng.normal(0, 0.12)
        may_hide = self.rng.choice([0, 0.2], p=[0.67, 0.33])
        return self.build(_draw_wings(self.rng), self.random_point(), angle, self.rng.uniform(2.5, 5), may_hide)

    def build_sheds(self) -> None:
        """Draw a crowd: rows of garden sheds, too small and too many to be annotated one by one."""
        first, center = len(self.objects), (self.random_point() + np.array(self.size[::-1]) / 2) / 2
        for cell in np.ndindex(6, 4):
            place = (np.array(cell) - [2.5, 1.5]) * 4.4 + self.rng.uniform(-0.6, 0.6, 2)
            wings = [(0.0, 0.0, self.rng.uniform(1.2, 1.7), self.rng.uniform(0.9, 1.2))]
            self.build(wings, center + place @ axes(self.road_angle) * self.scale, self.road_angle, height=1.0)
        self.join(first)

    def is_paved(self, window: Window, mask: np.ndarray) -> bool:
        """Return whether a road or a car park is below a pixel of `mask`."""
        return bool(self.paved[window.canvas][mask[window.inside]].any())

    def build(self, wings: list[Wing], center: np.ndarray, angle: float, height: float, may_hide: float = 0.0) -> bool:
        """Draw a building of `height` metres and its shadow, and return True if there is space for it."""
        corners = np.array([wing[:2] + _CORNERS * wing[2:] for wing in wings])
        outlines = np.round(center + corners @ axes(angle) * self.scale, 2).reshape(len(wings), -1)
        window = self.window(center, np.abs(corners).sum(-1).max() + height + 1, angle)
        mask = self.rasterize(window, outlines)
        if self.is_paved(window, mask) or not self.claim(_BUILDING, window, mask, may_hide, outlines):
            return False
        self.shade(window, lambda x, y: _depths(wings, x, y).min(1).max(0), angle, height)
        depths = _depths(wings, window.x, window.y)
        light = axes(angle) @ self.light
        slopes = np.concatenate([light, -light])  # how much each face is turned to the light
        outline = depths.min(1).max(0)
        roof = self.rng.choice(["hip", "gable", "flat"], p=[0.45, 0.3, 0.25])
        if roof == "gable" and len(wings) == 1:
            depths[:, [0, 2]] = np.inf  # no face slopes to the short sides
        face = np.take_along_axis(depths.argmin(1), depths.min(1).argmax(0)[None], axis=0)[0]
        tone = np.where(outline < 0.5, 1.1, 0.97) if roof == "flat" else 1 + 0.25 * slopes[face]
        color = self.rng.choice(_ROOFS) * self.rng.uniform(0.9, 1.1)
        self.paint(window, color * (tone[..., None] + self.tone(window, 0.5) - 1), outline)
        return True

    def build_tank(self) -> bool:
        """Draw a round tank with a fixed or a floating roof, often beside another."""
        radius, height = self.rng.uniform(2, 5.5), self.rng.uniform(2, 6)
        window = self.window(self.random_point(), radius + height + 1)
        depth = disc_depth(window.x, window.y, radius)
        if self.is_paved(window, depth > 0) or not self.claim(_TANK, window, depth > 0):
            return False
        self.shade(window, lambda x, y: disc_depth(x, y, radius), 0.0, height)
        color = self.rng.choice(_TANKS) * self.rng.uniform(0.9, 1.05)
        slope = 0.15 * (window.x * self.light[0] + window.y * self.light[1]) / radius
        self.paint(window, color * (self.tone(window, 0.4) + slope[..., None]), depth)
        if self.rng.random() < 0.4:  # the wall casts a shadow on a floating roof
            shift = self.rng.uniform(0.2, 0.5) * radius * self.light
            lit = disc_depth(window.x + shift[0], window.y + shift[1], radius - 0.3)
            self.paint(window, color * 0.55, np.minimum(depth - 0.3, -lit), softness=0.3)
        else:
            self.paint(window, color * 1.12, 0.2 - np.abs(depth - 0.35), opacity=0.8)
            self.paint(window, color * 0.7, disc_depth(window.x, window.y, 0.12 * radius))
        return True

    def plant_tree(self) -> bool:
        """Draw a tree beside houses and roads; its crown may hide a part of what is below."""
        center, radius = self.random_point(), self.rng.uniform(1.4, 3.8)
        trunk = self.window(center, 0.5)
        owners = self.owner[trunk.canvas]
        if self.paved[trunk.canvas].any() or any(
            self.objects[number].category_id != _TREE for number in owners[owners > 0]
        ):
            return False
        window = self.window(center, 2.5 * radius + 1)
        around = np.arctan2(window.y, window.x)
        lobes = 1 + 0.08 * np.sin(self.rng.integers(3, 8) * around + 3 * radius) + 0.03 * np.sin(9 * around)
        crown = radius * lobes - np.hypot(window.x, window.y)
        if not self.claim(_TREE, window, crown > 0, may_hide=0.3):
            return False
        self.shade(window, lambda x, y: disc_depth(x, y, radius), 0.0, height=radius)
        slope = 0.3 * (window.x * self.light[0] + window.y * self.light[1]) / radius
        color = self.rng.choice(_CROWNS) * self.rng.uniform(0.9, 1.3)
        self.paint(window, color * (self.tone(window, 1.5) + slope[..., None]), crown)
        return True


def _depths(wings: list[Wing], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the metres (wings, 4, h, w) inside the right, lower, left and upper side of each wing."""
    return np.array([[hx - x + cx, hy - y + cy, hx + x - cx, hy + y - cy] for cx, cy, hx, hy in wings])


def _draw_wings(rng: np.random.Generator) -> list[Wing]:
    """Return the wings of a house: rectangular, L-shaped, T-shaped or around a courtyard."""
    half, depth, reach = rng.uniform(5, 9), rng.uniform(3.5, 5), rng.uniform(4, 7)
    shape = rng.choice(["rectangle", "L", "T", "courtyard"], p=[0.4, 0.25, 0.2, 0.15])
    if shape == "courtyard":
        side, depth = half + 3, 0.7 * depth
        ring = side - depth
        return [(0, -ring, side, depth), (0, ring, side, depth), (-ring, 0, depth, side), (ring, 0, depth, side)]
    wings = [(0.0, 0.0, half, depth)]
    if shape != "rectangle":
        across = min(depth, 0.6 * half)
        wings.append((half - across if shape == "L" else 0.0, reach, across, depth + reach))
    return wings
