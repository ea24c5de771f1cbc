"""Convert polygons, run-length encodings (RLE), bitmaps and mask logits.

Axis letters: N objects, H W pixels of the image, h w pixels of the output or cells of the mask head, R C rows and
columns of a region of the image. Sizes are (height, width). RLE is COCO's: column-major runs, background first.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

# The result of `read_segmentation`: polygons, each (2P,) float64 pixels x0, y0, x1, y1, ..., or one compressed RLE.
Segmentation = list[Any] | dict[str, Any]

MAX_COORDINATE = 1e6
# Limits for one object. pycocotools walks along the outline in fifths of a pixel, and takes 40 bytes for each pixel.
MAX_OUTLINE_PIXELS = 1e7
MAX_POLYGONS = 10_000
# Number of output pixels that are interpolated at a time; their floats fit into the cache.
_CHUNK_PIXELS = 1 << 17


def read_segmentation(segmentation: Any, image_size: tuple[int, int]) -> Segmentation | None:
    """Check a COCO `segmentation` and convert it to polygons or to a compressed RLE.

    Args:
        segmentation: One of
            * polygons `[[x0, y0, x1, y1, ...], ...]` in pixels of the image, or one flat polygon. Their union is the
              mask, as in COCO. Polygons of fewer than three points are dropped;
            * an RLE `{"size": [H, W], "counts": str | bytes | list}`;
            * a bitmap of the image's size, nested lists or an array (H, W), of 0 and 1 (or 0 and 255). Rows of the
              image's size that hold nothing else are a bitmap, not polygons; so is every 2-D array of 8 bits or bool.
        image_size: (H, W) of the image.

    Returns:
        The segmentation; None for None, `[]`, `[[]]`, polygons of one or two points, and an RLE or bitmap without a
        pixel. (Whether polygons cover a pixel is only known after [`rasterize`].)

    Raises:
        ValueError: The segmentation cannot be read: an odd number of coordinates, NaN, text, another size than the
            image's, a corrupt RLE.
    """
    if segmentation is None:
        return None
    if isinstance(segmentation, torch.Tensor):
        segmentation = segmentation.numpy(force=True)
    if isinstance(segmentation, Mapping):
        return _read_rle(segmentation, image_size)
    if not _is_row(segmentation):
        kind = type(segmentation).__name__
        raise ValueError(
            f"a segmentation must be polygons, an RLE dict or a bitmap (H, W), got {kind} {segmentation!r:.40}"
        )
    bitmap = _read_bitmap(segmentation, image_size)
    if bitmap is None:
        return _read_polygons(segmentation)
    return coco_mask.encode(np.asfortranarray(bitmap)) if bitmap.any() else None


def has_segmentation(segmentation: Any) -> bool:
    """Return whether there is an RLE, a bitmap or a polygon; it may still enclose no pixel."""
    if isinstance(segmentation, Mapping) or not isinstance(segmentation, Iterable):
        return segmentation is not None
    return any(not isinstance(part, Sequence | np.ndarray) or len(part) for part in segmentation)


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _read_bitmap(segmentation: Any, image_size: tuple[int, int]) -> np.ndarray | None:
    """Return (H, W) uint8, or None if the rows are polygons."""
    lengths = {len(row) if _is_row(row) else 0 for row in segmentation}
    size = (len(segmentation), max(lengths, default=0))
    fits = size == tuple(image_size)
    # Coordinates are not stored in 8 bits.
    must_be = isinstance(segmentation, np.ndarray) and segmentation.dtype.itemsize == 1
    # Rows of unequal lengths are polygons, and so are one or two rows of another size than the image's.
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
        raise ValueError(
            f"a bitmap must contain 0 and 1 (or 0 and 255), got up to {highest}. Pass `array == object_id`."
        )
    if not fits and (must_be or (binary and (highest in (1, 255) or values.dtype.kind == "b"))):
        raise ValueError(
            f"a bitmap must have the image's size {image_size[0]}x{image_size[1]} (height x width), got"
            f" {size[0]}x{size[1]}"
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
            raise ValueError(f"polygon {index} must be a flat list of numbers x0, y0, x1, y1, ..., got {row!r:.60}")
        if polygon.size % 2:
            raise ValueError(
                f"polygon {index} must contain pairs x, y, got an odd number of {polygon.size} coordinates"
            )
        if not (np.abs(polygon, dtype=np.float64, casting="unsafe") <= MAX_COORDINATE).all():
            raise ValueError(f"polygon {index} must contain finite coordinates below 1e6, got {row!r:.60}")
        if polygon.size >= 6:
            polygons.append(polygon.astype(np.float64))
    if not polygons and len(rows) > 2 and all(len(row) == 2 for row in rows):
        raise ValueError(
            f"a polygon must be a flat list of numbers, got {len(rows)} pairs. Pass [[x0, y0, x1, y1, ...]]."
        )
    _check_outline(polygons)
    return polygons or None


def _check_outline(polygons: Sequence[np.ndarray]) -> None:
    """Raise ValueError for polygons that pycocotools would draw for minutes: too many, or with too long an outline."""
    if len(polygons) > MAX_POLYGONS:
        raise ValueError(
            f"one object must have at most {MAX_POLYGONS} polygons, got {len(polygons)}. Encode its mask as RLE, or"
            " raise transformers_rfdetr.model.masks.MAX_POLYGONS."
        )
    # A bound that is quick to compute; the exact length where it is too large.
    if sum(len(polygon) * float(polygon.max() - polygon.min()) for polygon in polygons) <= MAX_OUTLINE_PIXELS:
        return
    points = [polygon.reshape(-1, 2) for polygon in polygons]
    length = sum(np.abs(np.diff(ring, axis=0, append=ring[:1])).max(1).sum() for ring in points)
    if length > MAX_OUTLINE_PIXELS:
        raise ValueError(
            f"the outline of the polygons must have at most {MAX_OUTLINE_PIXELS:g} pixels, got {length:.3g}. Pass"
            " coordinates in pixels of the image, or raise transformers_rfdetr.model.masks.MAX_OUTLINE_PIXELS."
        )


def _read_rle(rle: Mapping[str, Any], image_size: tuple[int, int]) -> dict[str, Any] | None:
    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"an RLE must have the keys 'size' and 'counts', got {sorted(map(str, rle))}")
    size, counts = np.asarray(rle["size"]).tolist(), rle["counts"]
    height, width = image_size
    if size != [height, width]:
        raise ValueError(
            f"the RLE's size must be [{height}, {width}], the image's (height, width), got {size}. Encode the mask at"
            " that size."
        )
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    runs = decompress_runs(counts) if isinstance(counts, bytes) else np.asarray(counts)
    if runs is not None and runs.dtype.kind == "f" and np.array_equal(runs, runs.clip(0, height * width).round()):
        runs = runs.astype(np.int64)
    # pycocotools reads uninitialized memory if the runs do not fill the image.
    if (
        runs is None
        or runs.ndim != 1
        or runs.dtype.kind not in "iu"
        or ((runs < 0) | (runs > height * width)).any()  # the sum of larger ones may overflow
        or runs.sum() != height * width
    ):
        raise ValueError(
            f"the RLE's counts must be runs with the sum {height} x {width} = {height * width}, got {counts!r:.40}."
            " Encode the mask again with pycocotools."
        )
    if not runs[1::2].any():
        return None
    if isinstance(counts, bytes):
        return {"size": size, "counts": counts}
    return coco_mask.frPyObjects({"size": size, "counts": runs.tolist()}, height, width)


def decompress_runs(counts: bytes) -> np.ndarray | None:
    """Convert COCO's compressed counts to runs (int64); return None for a string that is not such counts.

    Each character, minus "0", holds five bits of a number, low bits first; a sixth bit is set if more characters of the
    number follow. From the third run on, the number is the difference to the run two before (maskApi.c, rleToString).
    """
    letters = np.frombuffer(counts, np.uint8)
    ends = np.flatnonzero(letters < 80)  # without the sixth bit
    lengths = np.diff(ends, prepend=-1)
    if not len(ends) or ends[-1] < len(letters) - 1 or letters.min() < 48 or letters.max() > 111 or lengths.max() > 7:
        return None
    return _read_runs(letters, ends)


def _read_runs(letters: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the runs of valid compressed counts, the numbers of which end at `ends`."""
    bits: np.ndarray = letters.astype(np.int64) - 48
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = 5 * (np.arange(len(bits)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((bits & 31) << place, starts)
    runs -= ((bits[ends] & 16) > 0) * (1 << (place[ends] + 5))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def to_rle(segmentation: Segmentation, image_size: tuple[int, int]) -> dict[str, Any]:
    """Convert a segmentation of an image of `image_size` to one compressed RLE, the union of polygons."""
    if isinstance(segmentation, dict):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, *image_size))


def mask_areas(rles: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the pixels of each RLE, (N,) float64; in parts, as pycocotools refuses more than 255 on numpy 2."""
    parts = [coco_mask.area(rles[start : start + 255]) for start in range(0, len(rles), 255)]
    return np.concatenate([np.empty(0), *parts])


def box_xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes (..., 4) from x0, y0, x1, y1 to x, y, width, height."""
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def box_polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """Return the polygon around a box."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def box_and_area(segmentation: Segmentation, image_size: tuple[int, int]) -> tuple[list[float], float]:
    """Return box [x, y, width, height] and area of a segmentation in pixels of the image, as pycocotools does."""
    rle = to_rle(segmentation, image_size)
    return coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle))


def rasterize(
    segmentations: Sequence[Segmentation], image_size: tuple[int, int], output_size: tuple[int, int]
) -> np.ndarray:
    """Draw segmentations of an image of `image_size` as masks (N, h, w) bool of `output_size`.

    [`rasterize_regions`] documents how they are drawn, and raises the errors.
    """
    return paste_regions(list(rasterize_regions(segmentations, image_size, output_size)), output_size)


def paste_regions(regions: Sequence[tuple[np.ndarray, int, int]], size: tuple[int, int]) -> np.ndarray:
    """Return masks (N, H, W) bool of `size` from their boxes, each (R, C) bool, top, left."""
    masks: np.ndarray = np.zeros((len(regions), *size), bool)
    for mask, (region, top, left) in zip(masks, regions, strict=True):
        mask[top : top + region.shape[0], left : left + region.shape[1]] = region
    return masks


def rasterize_regions(
    segmentations: Iterable[Segmentation], image_size: tuple[int, int], output_size: tuple[int, int]
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Draw segmentations as masks of `output_size`; yield of each only its box: (R, C) bool, top, left.

    Polygons are scaled and drawn at the output size by pycocotools. RLE is decoded and resized by nearest neighbor
    around pixel centers, as by torch's "nearest-exact" and PIL: output pixel i takes input pixel
    floor((i + 0.5) * H / h). Both are aligned with the bilinear resize of the image. (The "nearest" of the mask
    transforms of rfdetr and of the port is shifted by up to half an output pixel. On COCO images at 432 x 432 its
    median IoU with the drawn polygon is 0.957, that of "nearest-exact" 0.989.)

    Raises:
        ValueError: The scaled outline of polygons is longer than `MAX_OUTLINE_PIXELS`.
    """
    (height, width), (out_height, out_width) = image_size, output_size
    nearest_row, nearest_column = _nearest(height, out_height), _nearest(width, out_width)
    scale = (out_width / width, out_height / height)
    for segmentation in segmentations:
        if isinstance(segmentation, dict):
            region, y, x = decode_box(segmentation)
            top, bottom = (int(np.searchsorted(nearest_row, edge)) for edge in (y, y + region.shape[0]))
            left, right = (int(np.searchsorted(nearest_column, edge)) for edge in (x, x + region.shape[1]))
            yield region[nearest_row[top:bottom, None] - y, nearest_column[left:right] - x], top, left
        else:
            scaled = [(polygon.reshape(-1, 2) * scale).ravel() for polygon in segmentation]
            _check_outline(scaled)
            yield decode_box(coco_mask.merge(coco_mask.frPyObjects(scaled, out_height, out_width)))


def decode_box(rle: Mapping[str, Any]) -> tuple[np.ndarray, int, int]:
    """Decode the pixels in the box of a valid RLE with compressed counts: (R, C) bool, top, left.

    The time depends on the box and not on the image.
    """
    (height, width), (left, top, num_columns, num_rows) = rle["size"], map(int, coco_mask.toBbox(rle))
    if not num_columns:
        return np.zeros((0, 0), bool), 0, 0
    counts = rle["counts"]
    letters = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8)
    runs = _read_runs(letters, np.flatnonzero(letters < 80))
    runs[0] -= left * height
    if len(runs) % 2:  # it ends with background
        runs[-1] -= (width - left - num_columns) * height
    is_object = np.arange(len(runs)) % 2 > 0
    columns: np.ndarray = np.repeat(is_object, runs).reshape(num_columns, height)
    return columns[:, top : top + num_rows].T, top, left


def _nearest(source: int, target: int) -> np.ndarray:
    """Return the input index of each output index, computed in float32 to round as torch does."""
    index = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * (np.float32(source) / np.float32(target))
    return np.minimum(index.astype(np.int64), source - 1)


def region_to_rle(region: np.ndarray, top: int, left: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """Convert a region (R, C) bool at (top, left) of an empty image to COCO RLE of the image, counts as str for JSON.

    Only the region is read; the mask of the whole image is never created.
    """
    height, width = image_size
    num_rows = region.shape[0]
    columns = np.zeros((region.shape[1], num_rows + 2), bool)
    columns[:, 1:-1] = region.T
    # Positions at which a column changes: alternately the first pixel of a run and the first pixel after it.
    column, row = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), num_rows + 1)
    change = (left + column) * height + top + row
    # A run down to the bottom edge continues at the top of the next column: two changes at one position cancel.
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
    """Upsample mask logits; yield the region of the image that holds the mask of each object: (R, C) bool, top, left.

    Equal to `F.interpolate(mask_logits, output_size, mode="bilinear", align_corners=False) > threshold`, but computed
    only where a cell above `threshold` has an influence. NaN is background. It runs on the CPU in one thread: so many
    small parallel steps took 20 times as long where cores are shared.

    Args:
        mask_logits: (N, h, w), any floating type; computed in float32.
        output_size: (H, W) of the image.
        threshold: Pixels with a logit above it belong to the object.
        valid_size: Number of rows and columns of (h, w), not necessarily whole, that the image covers from the top
            left; the rest is padding. All by default.
    """
    logits = finite_logits(mask_logits.float().numpy(force=True))
    valid_height, valid_width = valid_size or logits.shape[1:]
    above, below, down = bilinear_taps(logits.shape[1], output_size[0], valid_height)
    before, after, across = bilinear_taps(logits.shape[2], output_size[1], valid_width)
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


def finite_logits(logits: np.ndarray) -> np.ndarray:
    """Return logits that can be interpolated: inf times a weight of 0 would be NaN. NaN is background."""
    return np.nan_to_num(logits, nan=-1e30, posinf=1e30, neginf=-1e30).clip(-3e38, 3e38)


def bilinear_taps(source: int, target: int, valid: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lower and upper input index and the weight of the upper one, (target,) each, in float32 as torch does."""
    scale = np.float32(valid) / np.float32(target)
    position = ((np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)).clip(min=0)
    last = min(source, math.ceil(valid)) - 1
    lower = position.astype(np.int64).clip(max=last)
    return lower, (lower + 1).clip(max=last), position - lower.astype(np.float32)


def _reached(positive: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the range [first, last) of the output indices that read any positive cell of (N, source)."""
    touched = positive[:, lower] | positive[:, upper]
    some = touched.any(1)
    first = touched.argmax(1) * some
    last = (touched.shape[1] - touched[:, ::-1].argmax(1)) * some
    return first.tolist(), last.tolist()
