"""Read images whose pixel values are the numbers of objects or classes.

An *instance map* has one value for each object and 0 for the background. The value of a color image is
red * 65536 + green * 256 + blue.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from ..model.image_io import open_image
from .geometry import Geometry, check_size, region

MAX_OBJECTS = 10_000  # of one instance map; a photo has more colors


class IndexImage(NamedTuple):
    """The values of an image (H, W)."""

    values: np.ndarray
    is_color: bool  # whether the values are colors
    palette: dict[int, int]  # the colors of the values, if the file has a palette


class MapObject(NamedTuple):
    """An object of an instance map: the box around it as slices of rows and columns, and its mask in the box."""

    value: int
    rows: slice
    columns: slice
    mask: np.ndarray

    def geometry(self, size: tuple[int, int]) -> Geometry:
        """Return the RLE in an image of `size` (H, W)."""
        return region(self.mask, self.rows.start, self.columns.start, size)

    def is_one_region(self) -> bool:
        """Return whether the pixels are connected, also by corners."""
        return ndimage.label(self.mask, np.ones((3, 3)))[1] == 1


def read_index_image(path: Path, size: tuple[int, int]) -> IndexImage:
    """Return the values of a file, without the colors of its palette.

    Raises:
        ValueError: the file cannot be decoded, its values are not integers, it has several pages, or not the `size`.
    """
    try:
        with open(path, "rb") as file, open_image(file) as image:
            if check_size(image.height, image.width) != size:
                raise ValueError(f"its size must be that of its image, {size}, got {(image.height, image.width)}")
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it must have one page, got {image.n_frames}")
            palette: dict[int, int] = {}
            if image.mode == "P":
                colors = np.array(image.getpalette("RGB"), np.int64).reshape(-1, 3)
                palette = dict(enumerate(_pack(colors).tolist()))
            is_indexed = image.mode in ("1", "L", "P", "F") or image.mode.startswith("I")
            pixels = np.array(image if is_indexed else image.convert("RGB"))
    except Exception as error:  # Pillow raises many types, among them DecompressionBombError
        raise ValueError(f"{path} cannot be read as a mask: {error}. Replace the file.") from error
    values = _pack(pixels.astype(np.int64)) if pixels.ndim == 3 else pixels
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values % 1 == 0)).all():
        raise ValueError(f"{path} must have integers as values, got fractions. Number the objects.")
    return IndexImage(values.astype(np.int64), pixels.ndim == 3, palette)


def _pack(colors: np.ndarray) -> np.ndarray:
    return colors @ np.array([1 << 16, 1 << 8, 1])


def find_objects(values: np.ndarray, ignored: tuple[int, ...] = (0,)) -> Iterator[MapObject]:
    """Yield the objects of an instance map, in the order of their values.

    Raises:
        ValueError: there are more than `MAX_OBJECTS` values.
    """
    unique, numbers = _number(values)
    if len(unique) > MAX_OBJECTS:
        raise ValueError(
            f"an instance map must have at most {MAX_OBJECTS} objects, got {len(unique)} values. Save it without lossy"
            " compression, or raise transformers_rfdetr.data.instance_maps.MAX_OBJECTS."
        )
    for number, (value, box) in enumerate(zip(unique.tolist(), ndimage.find_objects(numbers), strict=True), start=1):
        if value not in ignored:
            yield MapObject(value, box[0], box[1], numbers[box] == number)


def _number(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different values in their order, and for each pixel the number of its value, from 1."""
    if values.min() < 0 or values.max() >= 1 << 16:
        unique, numbers = np.unique(values, return_inverse=True)
        return unique, numbers.reshape(values.shape) + 1
    is_used = np.bincount(values.ravel()) > 0  # much faster than sorting
    return np.flatnonzero(is_used), np.cumsum(is_used, dtype=np.int32)[values]
