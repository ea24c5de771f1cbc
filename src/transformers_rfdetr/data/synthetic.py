"""Draw synthetic aerial images of buildings with annotations, for the demo, the tests and the notebooks.

An image depends only on its seed, and nothing is downloaded. Lengths are in metres on the ground, in frames whose
origin is the middle of an object, with x to the right and y down. Positions are in pixels of the image (H, W).
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ..model.masks import box_and_area, rasterize, region_to_rle

CATEGORIES = [{"id": 1, "name": "building"}]

# A wing is an axis-aligned rectangle in the frame of its building: center x, y and half extents.
Wing = tuple[float, float, float, float]

_GROUNDS = np.array([[104, 122, 74], [122, 134, 82], [92, 110, 72], [160, 148, 104], [134, 116, 90], [116, 128, 92]])
_ROOFS = np.array(
    [[162, 98, 78], [142, 86, 70], [128, 98, 82], [98, 106, 118], [142, 144, 146], [188, 184, 176], [84, 84, 90]]
)
_ASPHALT, _PAINT, _CROWN = np.array([128, 127, 124]), np.array([214, 214, 220]), np.array([70, 94, 52])
_SHADE = np.array([0.42, 0.46, 0.56])  # brightness of red, green and blue in a shadow
_CORNERS = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])


def draw_scene(
    seed: int, size: tuple[int, int] = (384, 512), *, metres_per_pixel: float = 0.2
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw one aerial image of buildings, and return it with their annotations.

    Roofs are rectangles, L, T or enclose a courtyard, and are hipped, gabled or flat. Buildings cast shadows, and are
    partly hidden by taller neighbours and trees, or cut off by the border. An image whose seed ends in 3 has no
    buildings; one whose seed ends in 6 has a crowd of garden sheds among the houses.

    Example:
        >>> from transformers_rfdetr.data.synthetic import draw_scene
        >>> image, annotations = draw_scene(seed=0)
        >>> image.size, {annotation["category_id"] for annotation in annotations}
        ((512, 384), {1})

    Args:
        seed: An integer >= 0, also used as `image_id`.
        size: (H, W) of the image in pixels, at least 24 pixels and 20 metres each.
        metres_per_pixel: The ground resolution. Houses are 7 to 25 metres long.

    Returns:
        The RGB image, and a COCO annotation for each visible building: `id` from 1, `image_id`, `category_id`, `bbox`
        [x, y, width, height] and `area` in pixels, `iscrowd`, `segmentation`. Masks contain only visible pixels, so
        that they do not overlap. Fully visible buildings are polygons, one for each wing; others and crowds are RLE.

    Raises:
        ValueError: `size` is too small.
    """
    if min(size) < 24 or min(size) * metres_per_pixel < 20:
        raise ValueError(
            f"`size` must be at least 24 pixels and 20 metres on both sides, got {size} pixels of {metres_per_pixel}"
            " metres. Increase one of them."
        )
    scene = _Scene(seed, size, 1 / metres_per_pixel)
    scene.draw_ground()
    if seed % 10 == 6:
        scene.build_sheds()
    if seed % 10 != 3:
        scene.build_houses()
    scene.plant_trees()
    return scene.render(), scene.annotations(seed)


def draw_dataset(
    num_images: int, size: tuple[int, int] = (96, 96), *, metres_per_pixel: float = 0.6, first_seed: int = 0
) -> tuple[list[Image.Image], dict[str, Any]]:
    """Draw the images of `num_images` consecutive seeds, with their annotations as one COCO dict.

    Args:
        num_images: Number of images.
        size: (H, W) of each image in pixels.
        metres_per_pixel: The ground resolution.
        first_seed: Seed of the first image. Datasets without a common seed have no image in common.

    Returns:
        The images, and a dict of `images` in the same order, `annotations` and `categories`.
    """
    images, entries = [], []
    annotations: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + num_images):
        image, objects = draw_scene(seed, size, metres_per_pixel=metres_per_pixel)
        images.append(image)
        entries.append({"id": seed, "file_name": f"{seed:06d}.png", "height": size[0], "width": size[1]})
        annotations += [{**item, "id": len(annotations) + i} for i, item in enumerate(objects, start=1)]
    return images, {
        "images": entries,
        "annotations": annotations,
        "categories": [dict(category) for category in CATEGORIES],
    }


def save_dataset(folder: str | os.PathLike[str], num_images: int) -> Path:
    """Save the images of [`draw_dataset`] to a folder, and their annotations as `train.json` in COCO format.

    Returns:
        The path of the JSON.
    """
    images, coco = draw_dataset(num_images)
    for image, entry in zip(images, coco["images"], strict=True):
        image.save(Path(folder) / entry["file_name"])
    path = Path(folder) / "train.json"
    path.write_text(json.dumps(coco))
    return path


class _Scene:
    """An image that is being drawn, and the building that each of its pixels shows."""

    def __init__(self, seed: int, size: tuple[int, int], pixels_per_metre: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.size, self.scale = size, pixels_per_metre
        self.colors: np.ndarray = np.zeros((*size, 3), np.float32)
        self.grain = 0.07 * self.noise(12) + 0.05 * self.noise(2.5) + 0.04 * self.noise(0.8)
        self.road_angle, sun_angle = self.rng.uniform(0, 2 * np.pi, 2)
        self.to_sun = _axes(sun_angle)[0]
        self.road: np.ndarray = np.zeros(size, bool)
        self.owner: np.ndarray = np.zeros(size, np.int64)  # number of the building at each pixel; 0 is the ground
        # By number: the polygons in pixels (None for the ground and a crowd), and the area in pixels when built.
        self.polygons: list[list[list[float]] | None] = [None]
        self.areas = [0]

    def noise(self, cell: float) -> np.ndarray:
        """Return smooth noise (H, W) with a standard deviation of about 1 and spots that are `cell` metres wide."""
        cells = [max(2, round(side / self.scale / cell)) for side in self.size]
        grid = Image.fromarray(self.rng.normal(0, 1.3, cells).astype(np.float32))
        return np.asarray(grid.resize(self.size[::-1], Image.Resampling.BICUBIC))

    def random_point(self) -> np.ndarray:
        """Return a random point (x, y) of the image in pixels."""
        return self.rng.random(2) * self.size[::-1]

    def window(self, center: np.ndarray, reach: float, angle: float = 0.0) -> tuple[Any, np.ndarray, np.ndarray]:
        """Return slices of the pixels within `reach` metres of `center`, and their x and y in a frame at `angle`."""
        low = np.clip(np.floor(center - reach * self.scale), 0, self.size[::-1]).astype(int)
        high = np.clip(np.ceil(center + reach * self.scale), 0, self.size[::-1]).astype(int)
        where = np.s_[low[1] : high[1], low[0] : high[0]]
        y, x = np.mgrid[where] + 0.5
        points = np.stack([x - center[0], y - center[1]], axis=-1) / self.scale @ _axes(angle).T
        return where, points[..., 0], points[..., 1]

    def paint(
        self, where: Any, color: np.ndarray, depth: np.ndarray, softness: float = 0.0, opacity: float = 1.0
    ) -> None:
        """Paint `color` where `depth`, the metres inside an outline, is positive.

        The edge is `softness` metres wide, at least a pixel.
        """
        coverage = opacity * np.clip(depth / max(softness, 1 / self.scale) + 0.5, 0, 1)
        self.colors[where] += coverage[..., None] * (color - self.colors[where])

    def draw_ground(self) -> None:
        """Draw parcels along a road, some of them ploughed, and cars."""
        start = self.random_point()
        where, x, y = self.window(start, 2 * max(self.size) / self.scale, self.road_angle)
        widths = self.rng.uniform(18, 40, 2)
        columns, rows = (x // widths[0]).astype(int), (y // widths[1]).astype(int)
        parcels = (columns - columns.min()) * (np.ptp(rows) + 1) + rows - rows.min()
        colors = self.rng.choice(_GROUNDS, parcels.max() + 1)
        ploughed = self.rng.random(parcels.max() + 1) < 0.25
        tone = 1 + self.grain + 0.06 * ploughed[parcels] * np.sin(2 * np.pi * y / 1.6)
        self.colors[:] = colors[parcels] * tone[..., None]
        self.paint(where, _ASPHALT * (1 + 0.4 * self.grain[..., None]), 3.2 - np.abs(y))
        self.paint(where, _PAINT, np.where(x % 6 < 3, 0.15, -1) - np.abs(y), opacity=0.7)
        self.road[:] = np.abs(y) < 4.2
        for along in np.arange(x.min(), x.max(), 14):
            place = [along + self.rng.uniform(0, 9), self.rng.choice([-1.6, 1.6])]
            parked, u, v = self.window(start + place @ _axes(self.road_angle) * self.scale, 3, self.road_angle)
            body = _depths([(0, 0, 2.1, 0.9)], u, v).min(1)[0]
            color = _PAINT * self.rng.uniform(0.3, 1.1) * self.rng.uniform(0.8, 1.1, 3)
            self.paint(parked, color, body, opacity=float(self.rng.integers(2)))

    def build_houses(self) -> None:
        """Draw houses where there is space; every third attempt may hide a part of other houses."""
        most = max(2, round(self.size[0] * self.size[1] / self.scale**2 / 420))
        wanted = self.rng.integers(1, most + 1)
        for attempt in range(30 * wanted):
            angle = self.road_angle + self.rng.integers(4) * np.pi / 2 + self.rng.normal(0, 0.12)
            height = self.rng.uniform(2.5, 5)
            wanted -= self.build(_draw_wings(self.rng), self.random_point(), angle, height, 0.2 * (attempt % 3 == 0))
            if wanted == 0:
                break

    def build_sheds(self) -> None:
        """Draw a crowd: rows of garden sheds, too small and too many to be annotated one by one."""
        first, center = len(self.areas), (self.random_point() + np.array(self.size[::-1]) / 2) / 2
        for cell in np.ndindex(6, 4):
            place = (np.array(cell) - [2.5, 1.5]) * 4.4 + self.rng.uniform(-0.6, 0.6, 2)
            wings = [(0.0, 0.0, self.rng.uniform(1.2, 1.7), self.rng.uniform(0.9, 1.2))]
            self.build(wings, center + place @ _axes(self.road_angle) * self.scale, self.road_angle, height=1.0)
        self.owner[self.owner > first] = first
        self.polygons[first:] = [None]
        self.areas[first:] = [sum(self.areas[first:])]

    def build(self, wings: list[Wing], center: np.ndarray, angle: float, height: float, may_hide: float = 0.0) -> bool:
        """Draw a building of `height` metres and its shadow, and return True if there is space for it.

        There is none if it would cover the road, or more than a fraction `may_hide` of another building.
        """
        corners = np.array([wing[:2] + _CORNERS * wing[2:] for wing in wings])
        outlines = np.round(center + corners @ _axes(angle) * self.scale, 2).reshape(len(wings), -1)
        where, x, y = self.window(center, np.abs(corners).sum(-1).max() + height + 1, angle)
        if not x.size:
            return False
        origin = np.tile([where[1].start, where[0].start], 4)
        mask = rasterize([list(outlines - origin)], x.shape, x.shape)[0]
        hidden = np.bincount(self.owner[where][mask], minlength=len(self.areas))
        if not mask.any() or self.road[where][mask].any() or (hidden[1:] > may_hide * np.array(self.areas[1:])).any():
            return False
        self.owner[where][mask] = len(self.areas)
        self.polygons.append(outlines.tolist())
        self.areas.append(int(mask.sum()))
        sun = _axes(angle) @ self.to_sun
        shadows = [_depths(wings, x + t * sun[0], y + t * sun[1]).min(1).max(0) for t in np.linspace(0, height, 8)]
        self.paint(where, self.colors[where] * _SHADE, np.max(shadows, axis=0), softness=0.8)
        depths = _depths(wings, x, y)
        slopes = np.concatenate([sun, -sun])  # how much each face is turned to the sun
        outline = depths.min(1).max(0)
        roof = self.rng.choice(["hip", "gable", "flat"], p=[0.45, 0.3, 0.25])
        if roof == "gable" and len(wings) == 1:
            depths[:, [0, 2]] = np.inf  # no face slopes to the short sides
        face = np.take_along_axis(depths.argmin(1), depths.min(1).argmax(0)[None], axis=0)[0]
        tone = np.where(outline < 0.5, 1.1, 0.97) if roof == "flat" else 1 + 0.25 * slopes[face]
        color = self.rng.choice(_ROOFS) * self.rng.uniform(0.9, 1.1)
        self.paint(where, color * (tone + 0.5 * self.grain[where])[..., None], outline)
        return True

    def plant_trees(self) -> None:
        """Draw trees beside houses and road; their crowns hide what is below."""
        for _ in range(self.rng.integers(round(self.size[0] * self.size[1] / self.scale**2 / 160) + 1)):
            center, radius = self.random_point(), self.rng.uniform(1.3, 3.6)
            trunk, _, _ = self.window(center, self.rng.choice([0.5, 3.0], p=[0.3, 0.7]))
            if self.owner[trunk].any() or self.road[trunk].any():
                continue
            where, x, y = self.window(center, 2.5 * radius + 1)
            around = np.arctan2(y, x)
            lobes = 1 + 0.1 * np.sin(self.rng.integers(3, 8) * around + 3 * radius) + 0.06 * np.sin(9 * around)
            crown = radius * lobes - np.hypot(x, y)
            shift = 0.9 * radius * self.to_sun
            self.paint(where, self.colors[where] * _SHADE, radius - np.hypot(x + shift[0], y + shift[1]), softness=0.8)
            tone = 1 + 0.35 * (x * self.to_sun[0] + y * self.to_sun[1]) / radius + 2 * self.grain[where]
            self.paint(where, _CROWN * self.rng.uniform(0.8, 1.2) * tone[..., None], crown)
            self.owner[where][crown > 0] = 0

    def render(self) -> Image.Image:
        """Return the image with blur and noise, as a camera takes it."""
        colors = self.colors + self.rng.normal(0, 3, (*self.size, 1))
        return Image.fromarray(colors.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))

    def annotations(self, image_id: int) -> list[dict[str, Any]]:
        """Return a COCO annotation for each building with a visible pixel."""
        found: list[dict[str, Any]] = []
        for number, polygons in enumerate(self.polygons[1:], start=1):
            mask = self.owner == number
            if not mask.any():
                continue
            corners = np.array(polygons or [[-1.0, -1.0]]).reshape(-1, 2)
            is_inside = (corners >= 0).all() and (corners <= self.size[::-1]).all()
            is_whole = is_inside and mask.sum() == self.areas[number]
            segmentation = polygons if is_whole else region_to_rle(mask, 0, 0, self.size)
            bbox, area = box_and_area(segmentation, self.size)
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES[0]["id"],
                    "bbox": bbox,
                    "area": area,
                    "iscrowd": int(polygons is None),
                    "segmentation": segmentation,
                }
            )
        return found


def _axes(angle: float) -> np.ndarray:
    """Return the axes of a frame at `angle` radians, as rows (2, 2)."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


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
