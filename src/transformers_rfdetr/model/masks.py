"""Polygons, run-length encodings (RLE), bitmaps and mask logits: every conversion, once.

Axis letters: N objects, H W pixels of the image, h w pixels of the output or cells of the mask head, R C rows and
columns of a region of the image. Sizes are (height, width). RLE is COCO's: column-major runs, background first.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

# What `read_segmentation` returns: polygons, each (2P,) float64 pixels x0, y0, x1, y1, ..., or one compressed RLE.
Segmentation = list[Any] | dict[str, Any]

_MAX_COORDINATE = 1e6
# The longest outline of an object: pycocotools walks along it in fifths of a pixel and keeps 40 bytes of each pixel.
MAX_OUTLINE_PIXELS = 1e7
MAX_POLYGONS = 10_000  # of an object
# Output pixels that are interpolated at a time: the intermediate floats stay in the cache.
_CHUNK_PIXELS = 1 << 17


def read_segmentation(segmentation: Any, image_size: tuple[int, int]) -> Segmentation | None:
    """Checks a COCO `segmentation` and brings it into one of two forms: polygons, or a compressed RLE.

    Args:
        segmentation: One of
            * polygons `[[x0, y0, x1, y1, ...], ...]` in pixels of the image, or one flat polygon. They are united,
              holes included, as COCO does; a polygon of fewer than three points encloses nothing and is left out;
            * an RLE `{"size": [H, W], "counts": str | bytes | list}`;
            * a bitmap of the image's size, nested lists or an array (H, W), of 0 and 1 (or 0 and 255). Rows of the
              image's size that hold nothing else are a bitmap, not polygons; so is every 2-D array of 8 bits or bool.
        image_size: (H, W) of the image.

    Returns:
        The shape, or None where nothing is enclosed: None, `[]`, `[[]]`, polygons of one or two points, an RLE or a
        bitmap without a pixel. (Polygons that enclose no pixel show when they are rasterised.)

    Raises:
        ValueError: what cannot be read: odd counts, NaN, text, a size other than the image's, corrupt RLE.
    """
    if segmentation is None:
        return None
    if isinstance(segmentation, torch.Tensor):
        segmentation = segmentation.numpy(force=True)
    if isinstance(segmentation, Mapping):
        return _read_rle(segmentation, image_size)
    if not _is_row(segmentation):
        kind = type(segmentation).__name__
        raise ValueError(f"{kind} {segmentation!r:.40} is no shape; pass polygons, an RLE dict or a bitmap (H, W)")
    bitmap = _read_bitmap(segmentation, image_size)
    if bitmap is None:
        return _read_polygons(segmentation)
    return coco_mask.encode(np.asfortranarray(bitmap)) if bitmap.any() else None


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _read_bitmap(segmentation: Any, image_size: tuple[int, int]) -> np.ndarray | None:
    """rows -> (H, W) uint8, or None where the rows are polygons."""
    lengths = {len(row) if _is_row(row) else 0 for row in segmentation}
    size = (len(segmentation), max(lengths, default=0))
    fits = size == tuple(image_size)
    # Nobody stores coordinates in 8 bits.
    must_be = isinstance(segmentation, np.ndarray) and segmentation.dtype.itemsize == 1
    # One or two rows of another length than the image's are polygons; so are rows of unequal lengths.
    if len(lengths) != 1 or 0 in lengths or (size[0] <= 2 and not fits and not must_be):
        return None
    try:
        values = np.asarray(segmentation)
    except ValueError:  # a list among the numbers
        return None
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        return None
    highest = values.max()
    binary = highest in (0, 1, 255) and bool(((values == 0) | (values == highest)).all())
    if fits and binary:
        return (values != 0).astype(np.uint8)
    if fits and (must_be or size[0] > 2):
        raise ValueError(f"a bitmap holds 0 and 1 (or 0 and 255), here up to {highest}; pass `array == object_id`")
    if not fits and (must_be or (binary and (highest in (1, 255) or values.dtype.kind == "b"))):
        raise ValueError(
            f"a bitmap of {size[0]}x{size[1]} is not of the image's size {image_size[0]}x{image_size[1]}"
            " (height x width); draw it at that size"
        )
    return None


def _read_polygons(segmentation: Any) -> list[np.ndarray] | None:
    rows = [row.numpy(force=True) if isinstance(row, torch.Tensor) else row for row in segmentation]
    if rows and not any(map(_is_row, rows)):
        rows = [rows]
    polygons = []
    for index, row in enumerate(rows):
        try:
            polygon = np.asarray(row)
        except ValueError:  # rows of unequal lengths inside one polygon
            polygon = np.asarray(None)
        if polygon.size and (polygon.ndim != 1 or polygon.dtype.kind not in "iuf"):
            raise ValueError(f"polygon {index} is {row!r:.60}, not a flat list of numbers x0, y0, x1, y1, ...")
        if polygon.size % 2:
            raise ValueError(f"polygon {index} has {polygon.size} numbers; it takes pairs x, y: add or drop one")
        if not (np.abs(polygon, dtype=np.float64, casting="unsafe") <= _MAX_COORDINATE).all():
            raise ValueError(f"polygon {index} holds {row!r:.60}; coordinates are finite pixels below 1e6")
        if polygon.size >= 6:
            polygons.append(polygon.astype(np.float64))
    if not polygons and len(rows) > 2 and all(len(row) == 2 for row in rows):
        raise ValueError(f"{len(rows)} pairs are points of one polygon; flatten them to [[x0, y0, x1, y1, ...]]")
    _check_outline(polygons)
    return polygons or None


def _check_outline(polygons: Sequence[np.ndarray]) -> None:
    """Raises ValueError where pycocotools would draw for minutes: many polygons, or a long way along their edges."""
    if len(polygons) > MAX_POLYGONS:
        raise ValueError(
            f"{len(polygons)} polygons are more than the {MAX_POLYGONS} of one object; encode the mask as RLE, or raise"
            " transformers_rfdetr.model.masks.MAX_POLYGONS"
        )
    points = [polygon.reshape(-1, 2) for polygon in polygons]
    length = sum(np.abs(np.diff(ring, axis=0, prepend=0, append=ring[:1])).max(1).sum() for ring in points)
    if length > MAX_OUTLINE_PIXELS:
        raise ValueError(
            f"the outline of the polygons is {length:.3g} pixels long, more than {MAX_OUTLINE_PIXELS:g}; give"
            " coordinates in pixels of the image, or raise transformers_rfdetr.model.masks.MAX_OUTLINE_PIXELS"
        )


def _read_rle(rle: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, Any] | None:
    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"an RLE has the keys 'size' and 'counts', here {sorted(map(str, rle))}; add what is missing")
    size, counts = np.asarray(rle["size"]).tolist(), rle["counts"]
    height, width = image_size
    if size != [height, width]:
        raise ValueError(
            f"the RLE's size {size} is not the image's [{height}, {width}] (height, width);"
            " encode the mask at the image's size"
        )
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    runs = _decompress(counts) if isinstance(counts, bytes) else np.asarray(counts)
    # pycocotools reads unset memory where the runs do not fill the image.
    if (
        runs is None
        or runs.ndim != 1
        or runs.dtype.kind not in "iu"
        or ((runs < 0) | (runs > height * width)).any()  # a sum of larger ones may wrap around
        or runs.sum() != height * width
    ):
        raise ValueError(
            f"the RLE's counts {counts!r:.40} are no runs that add up to {height} x {width} = {height * width};"
            " encode the mask again with pycocotools"
        )
    if not runs[1::2].any():
        return None
    if isinstance(counts, bytes):
        return {"size": size, "counts": counts}
    return coco_mask.frPyObjects({"size": size, "counts": runs.tolist()}, height, width)


def _decompress(counts: bytes) -> np.ndarray | None:
    """COCO's compressed counts -> runs (int64), or None for a string that is none.

    Five bits a character from '0' on, low bits first, the sixth bit says that more follow; from the third run on it
    is the difference from the run two before (maskApi.c, rleToString).
    """
    letters = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    more = (letters & 32) > 0
    ends = np.flatnonzero(~more)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if not letters.size or more[-1] or letters.min() < 0 or letters.max() > 63 or (ends - starts).max() > 6:
        return None
    place = 5 * (np.arange(letters.size) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((letters & 31) << place, starts)
    runs -= ((letters[ends] & 16) > 0) * (1 << (place[ends] + 5))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def to_rle(shape: Segmentation, image_size: tuple[int, int]) -> dict[str, Any]:
    """A shape in an image of `image_size` -> one compressed RLE, polygons united, by pycocotools."""
    return shape if isinstance(shape, dict) else coco_mask.merge(coco_mask.frPyObjects(shape, *image_size))


def mask_areas(rles: Sequence[dict[str, Any]]) -> np.ndarray:
    """Pixels of each RLE, (N,) float64. One at a time: pycocotools refuses more than 255 of them on numpy 2."""
    return np.array([coco_mask.area(rle) for rle in rles], np.float64)


def box_and_area(shape: Segmentation, image_size: tuple[int, int]) -> tuple[list[float], float]:
    """Box [x, y, width, height] and area of a shape, both in pixels of the image, by pycocotools."""
    rle = to_rle(shape, image_size)
    return coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle))


def rasterize(shapes: Sequence[Segmentation], image_size: tuple[int, int], output_size: tuple[int, int]) -> np.ndarray:
    """Shapes in an image of `image_size` -> masks (N, h, w) bool of `output_size`.

    Polygons are scaled and drawn straight at the output size, by pycocotools. RLE is decoded and resized by nearest
    neighbour around pixel centres, as torch's "nearest-exact" and PIL do: output pixel i takes input pixel
    floor((i + 0.5) * H / h). So both lie where the image's own bilinear resize puts the object. (The "nearest" of
    rfdetr's and the port's mask transforms lies up to half an output pixel beside it: on COCO photographs at 432 x 432
    its median IoU with the drawn polygon is 0.957, that of this rule 0.989.)

    Raises:
        ValueError: polygons that reach far out of a small image are too long to draw at a large output size.
    """
    (height, width), (out_height, out_width) = image_size, output_size
    every_row, every_column = np.arange(out_height), np.arange(out_width)
    nearest_row, nearest_column = _nearest(height, out_height), _nearest(width, out_width)
    masks: np.ndarray = np.zeros((len(shapes), out_height, out_width), bool)
    for mask, shape in zip(masks, shapes, strict=True):
        if isinstance(shape, dict):
            rle, row_of, column_of = shape, nearest_row, nearest_column
        else:
            scaled = [(polygon.reshape(-1, 2) * (out_width / width, out_height / height)).ravel() for polygon in shape]
            _check_outline(scaled)
            rle = coco_mask.merge(coco_mask.frPyObjects(scaled, out_height, out_width))
            row_of, column_of = every_row, every_column
        # Only the object's box is copied.
        x, y, box_width, box_height = coco_mask.toBbox(rle)
        top, bottom = (int(np.searchsorted(row_of, edge)) for edge in (y, y + box_height))
        left, right = (int(np.searchsorted(column_of, edge)) for edge in (x, x + box_width))
        mask[top:bottom, left:right] = coco_mask.decode(rle)[row_of[top:bottom, None], column_of[left:right]]
    return masks


def _nearest(source: int, target: int) -> np.ndarray:
    """Input index of each output index; in float32, so that the rounding is torch's."""
    index = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * (np.float32(source) / np.float32(target))
    return np.minimum(index.astype(np.int64), source - 1)


def region_to_rle(region: np.ndarray, top: int, left: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """A region (R, C) bool at (top, left) of an empty image -> COCO RLE of the image, counts as str for JSON.

    Neither the image's mask nor its empty columns are ever visited.
    """
    height, width = image_size
    num_rows = region.shape[0]
    columns = np.zeros((region.shape[1], num_rows + 2), bool)
    columns[:, 1:-1] = region.T
    # Where a column changes: alternately the first pixel of a run and the first pixel after it.
    column, row = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), num_rows + 1)
    change = (left + column) * height + top + row
    # A run down to the bottom edge goes on at the top of the next column: two changes in one place are none.
    touching: np.ndarray = np.flatnonzero(change[1:-1:2] == change[2::2]) * 2 + 1
    change = np.delete(change, np.concatenate([touching, touching + 1]))
    counts = np.diff(change, prepend=0, append=height * width)
    if change.size and counts[-1] == 0:
        counts = counts[:-1]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


def upsample_masks(
    mask_logits: torch.Tensor,
    output_size: tuple[int, int],
    threshold: float,
    valid_size: tuple[float, float] | None = None,
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Mask logits (N, h, w) -> per object the region of the image that holds its mask: (R, C) bool, top, left.

    Equal to `F.interpolate(mask_logits, output_size, mode="bilinear", align_corners=False) > threshold`, which it
    never computes outside the region that the cells above `threshold` can reach. A NaN logit is background. It runs on
    the CPU, in one thread: where cores are shared, so many small parallel steps took 20 times as long.

    Args:
        mask_logits: (N, h, w), any floating type; computed in float32.
        output_size: (H, W) of the image.
        threshold: A logit; a pixel belongs to the object above it.
        valid_size: Rows and columns of (h, w), not necessarily whole, that the image covers from the top left on;
            the rest is padding. All by default.
    """
    # Bounds that no product overflows and no zero weight turns into NaN.
    logits = mask_logits.float().nan_to_num(nan=-1e30, posinf=1e30, neginf=-1e30).numpy(force=True)
    valid_height, valid_width = valid_size or logits.shape[1:]
    above, below, down = _bilinear_taps(logits.shape[1], output_size[0], valid_height)
    before, after, across = _bilinear_taps(logits.shape[2], output_size[1], valid_width)
    positive = logits > threshold
    tops, bottoms = _reached(positive.any(2), above, below)
    lefts, rights = _reached(positive.any(1), before, after)
    for grid, top, bottom, left, right in zip(logits, tops, bottoms, lefts, rights, strict=True):
        columns = slice(left, right)
        wide = grid[:, before[columns]] * (1 - across[columns]) + grid[:, after[columns]] * across[columns]
        region: np.ndarray = np.empty((bottom - top, right - left), bool)
        step = max(1, _CHUNK_PIXELS // max(1, right - left))
        for start in range(top, bottom, step):
            rows = slice(start, min(start + step, bottom))
            values, lower = wide[above[rows]], wide[below[rows]]
            values *= 1 - down[rows, None]
            lower *= down[rows, None]
            values += lower
            np.greater(values, threshold, out=region[rows.start - top : rows.stop - top])
        yield region, top, left


def _bilinear_taps(source: int, target: int, valid: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per output index: lower and upper input index and the upper one's weight, (target,) each, in torch's float32."""
    scale = np.float32(valid) / np.float32(target)
    position = ((np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)).clip(min=0)
    last = min(source, math.ceil(valid)) - 1
    lower = position.astype(np.int64).clip(max=last)
    return lower, (lower + 1).clip(max=last), position - lower.astype(np.float32)


def _reached(positive: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> tuple[list[int], list[int]]:
    """Cells with a positive value (N, source) -> first and one past the last output index that reads any of them."""
    touched = positive[:, lower] | positive[:, upper]
    some = touched.any(1)
    first = touched.argmax(1) * some
    last = (touched.shape[1] - touched[:, ::-1].argmax(1)) * some
    return first.tolist(), last.tolist()
