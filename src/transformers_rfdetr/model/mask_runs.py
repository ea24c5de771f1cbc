"""Encode mask logits as COCO RLE at the size of the image, without upsampling whole maps.

The definition is `upsample_masks` with threshold 0: an image pixel lies between two rows and two columns of cells, and
its logit is interpolated between these four, in float32. So a square of four neighboring cells with the same sign needs
no interpolation, and between two rows of cells the sign of an image column changes at most once:

* Products with a weight in [0, 1], sums and their rounding preserve the sign of equal signs, except that products of
  denormal numbers may round to 0. Masks with positive logits below 1e-20 are upsampled as the definition does.
* From one row of cells to the next, the weight of the upper row never grows and that of the lower one never falls. If
  the upper value is positive and the lower one is not, both products never grow, nor does their sum, since rounding is
  monotonic. The row at which the interpolated value is 0 is |upper| / (|upper| + |lower|) below the upper one, without
  cancellation, so its rounding error is a few 1e-7 of the number of rows. Pixels that are 1e-3 cells or more away from
  it have a known sign. Where one is closer, the values around it are computed as in the definition.

Axis letters: N masks, h w cells of the mask head, R C rows and columns of cells that the image covers, H W pixels of
the image, K columns of pixels after one of cells, S squares whose cells differ in sign, P places at which the sign of a
mask changes, in column-major order. Sizes are (height, width).
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from .masks import bilinear_taps, finite_logits, region_to_rle, upsample_masks

# Number of cells at a time: their arrays fit into the cache.
_CHUNK_CELLS = 1 << 20
# Number of interpolated values at a time, for masks of noise; and of pixels on a GPU.
_CHUNK_VALUES, _CHUNK_PIXELS = 1 << 20, 1 << 25
_SMALLEST, _LARGEST = 1e-20, 1e30  # without denormal products or infinity
_ROUNDING = 1e-3  # cells, more than the error of the place of a change on a grid of 1,000 cells


class Axis(NamedTuple):
    """How the pixels of one axis of the image are interpolated between cells."""

    lower: np.ndarray  # (H,) int64, cell before each pixel
    upper: np.ndarray  # (H,) int64, cell after it, or the same one at the end
    weight: np.ndarray  # (H,) float32, weight of the upper cell
    num_cells: int  # R
    first: np.ndarray  # (R + 1,) int64, number of pixels before each cell, and of all
    scale: float  # cells per pixel
    weights: np.ndarray  # (K, R + 1) float32, `weight` of the pixels after each cell, NaN where it has fewer than K

    @classmethod
    def of(cls, source: int, target: int, valid: float) -> "Axis":
        """Return the axis of `target` pixels on `source` cells, of which the image covers `valid`."""
        lower, upper, weight = bilinear_taps(source, target, valid)
        num_cells = min(source, math.ceil(valid))
        first: np.ndarray = np.append(0, np.cumsum(np.bincount(lower, minlength=num_cells)))
        pixels = first + np.arange(np.diff(first).max())[:, None]
        weights = np.where(pixels < np.append(first[1:], 0), weight.take(pixels, mode="clip"), np.float32("nan"))
        return cls(lower, upper, weight, num_cells, first, valid / target, weights)


def encode_mask_logits(
    mask_logits: torch.Tensor, image_size: tuple[int, int], valid_size: tuple[float, float] | None = None
) -> list[dict[str, Any]]:
    """Return the pixels of an image with a mask logit above 0 as COCO RLE, counts as str for JSON.

    Equal bit for bit to `[region_to_rle(*region, image_size) for region in upsample_masks(mask_logits, ...)]`. On a
    GPU, the maps are upsampled there, and only the changes between background and foreground are copied. On the CPU,
    one thread is used.

    Args:
        mask_logits: (N, h, w), any floating type; computed in float32.
        image_size: (H, W) of the image.
        valid_size: Number of rows and columns of (h, w) that the image covers; see `upsample_masks`.
    """
    num_masks, height, width = mask_logits.shape
    valid_height, valid_width = valid_size or (height, width)
    axes = Axis.of(height, image_size[0], valid_height), Axis.of(width, image_size[1], valid_width)
    mask_logits = mask_logits.detach().float()
    if mask_logits.device.type != "cpu":  # where it takes less time to upsample all than to select
        return places_to_rles(dense_changes(mask_logits, *axes), num_masks, image_size)

    rles: list[dict[str, Any]] = []
    for logits in mask_logits.split(max(1, _CHUNK_CELLS // max(1, height * width))):
        cells = logits.numpy()
        is_positive: np.ndarray = np.greater(cells, 0)
        if np.count_nonzero(is_positive) > np.count_nonzero(cells > _SMALLEST):
            regions = upsample_masks(logits, image_size, 0.0, valid_size)
            rles += [region_to_rle(*region, image_size) for region in regions]
        else:
            rles += _encode(cells, is_positive, axes, image_size)
    return rles


def _encode(
    logits: np.ndarray, is_positive: np.ndarray, axes: tuple[Axis, Axis], size: tuple[int, int]
) -> list[dict[str, Any]]:
    squares = _mixed_squares(is_positive, *axes)
    if len(logits) > 1 and len(squares[0]) * len(axes[1].weights) > _CHUNK_VALUES:
        half = len(logits) // 2
        parts = (slice(None, half), slice(half, None))
        return [rle for part in parts for rle in _encode(logits[part], is_positive[part], axes, size)]
    return places_to_rles(_changes(logits, squares, *axes), len(logits), size)


def _mixed_squares(is_positive: np.ndarray, rows: Axis, columns: Axis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mask, row and column (S,) of the squares of four cells with different signs; `is_positive` (N, h, w).

    Square (r, c) has the cells of rows r - 1 and r, and of columns c and c + 1. There is background above the first row
    and below the last one; the last column is repeated. Squares of this last column and of the first one of the next
    row, which neighbor it in memory, are among the results.
    """
    shape = (len(is_positive), rows.num_cells + 2, columns.num_cells + 1)
    padded: np.ndarray = np.zeros(shape, np.uint8)
    padded[:, 1:-1, :-1] = is_positive[:, : rows.num_cells, : columns.num_cells]
    padded[:, :, -1] = padded[:, :, -2]
    flat = padded.reshape(-1)  # one long loop takes less time than one for each row
    pairs = flat[:-1] + flat[1:]
    num_positive = pairs[: -shape[2]] + pairs[shape[2] :]
    num_positive -= 1  # none becomes 255
    mask, row, column = map(np.asarray, np.unravel_index(np.flatnonzero(num_positive < 3), shape))
    return mask, row, column


def _changes(
    logits: np.ndarray, squares: tuple[np.ndarray, np.ndarray, np.ndarray], rows: Axis, columns: Axis
) -> np.ndarray:
    """Return the places (P,) at which the sign changes."""
    mask, row, column = squares
    above_left, above_right, below_left, below_right = _corners(logits, squares, rows, columns)
    after: np.ndarray = columns.weights.take(column, axis=1)
    before: np.ndarray = 1 - after
    top, bottom = above_left * before + above_right * after, below_left * before + below_right * after
    changing = np.flatnonzero((top > 0) != (bottom > 0))
    offset, square = np.divmod(changing, len(mask))
    x = columns.first.take(column).take(square) + offset
    y = _change_in_column(row.take(square), top.take(changing), bottom.take(changing), rows)
    places = mask.take(square) * _stride(rows, columns) + x * len(rows.lower) + y
    places.sort()
    return places


def _corners(
    logits: np.ndarray, squares: tuple[np.ndarray, np.ndarray, np.ndarray], rows: Axis, columns: Axis
) -> np.ndarray:
    """Return the logits (4, S) of the cells of squares: above left and right, below left and right."""
    mask, row, column = squares
    height, width = logits.shape[1:]
    left, right = (np.minimum(one, columns.num_cells - 1) for one in (column, column + 1))
    above, below = ((mask * height + np.clip(one, 0, rows.num_cells - 1)) * width for one in (row - 1, row))
    cells: np.ndarray = logits.reshape(-1).take([one + side for one in (above, below) for side in (left, right)])
    if not (np.abs(cells) < _LARGEST).all():
        cells = finite_logits(cells)
    cells[:2, row == 0] = cells[2:, row == rows.num_cells] = -1
    return cells


def _stride(rows: Axis, columns: Axis) -> int:
    """Return the number of places of a mask: its pixels, and the end."""
    return len(rows.lower) * len(columns.lower) + 1


def _change_in_column(row: np.ndarray, top: np.ndarray, bottom: np.ndarray, rows: Axis) -> np.ndarray:
    """Return the first pixel (P,) of a column that has the sign of the value below, between two rows of cells.

    row (P,), the lower one   top, bottom (P,) float32, values in the two rows, of different signs
    """
    bounds: np.ndarray = np.append(0.0, rows.first)
    low: np.ndarray = bounds.take(row)
    high: np.ndarray = bounds.take(row + 1)
    low[row == rows.num_cells] = len(rows.lower)  # the pixels after the last row of cells have its value
    with np.errstate(divide="ignore", over="ignore"):  # infinity gives 0
        fraction = 1 / (1 - bottom / top)
    change = (row + (fraction - np.float32(0.5))) * (1 / rows.scale) - 0.5
    unsure = np.flatnonzero(np.abs(change - np.rint(change)) < _ROUNDING / rows.scale)
    pixel: np.ndarray = np.ceil(change).clip(low, high).astype(np.int64)
    pixel[unsure] = _correct(rows.weight, *(one.take(unsure) for one in (pixel, low, high, top, bottom)))
    return pixel


def _correct(
    weights: np.ndarray, pixel: np.ndarray, low: np.ndarray, high: np.ndarray, top: np.ndarray, bottom: np.ndarray
) -> np.ndarray:
    """Move each pixel (P,) in [low, high] until it has the sign of the value below, and the one before it has not."""
    is_positive = top > 0

    def is_above(pixel: np.ndarray) -> np.ndarray:
        weight: np.ndarray = weights.take(pixel)
        return (top * (1 - weight) + bottom * weight > 0) == is_positive

    while True:
        step = (pixel < high) & is_above(pixel.clip(max=len(weights) - 1))
        back = (pixel > low) & ~is_above((pixel - 1).clip(0))
        if not (step.any() or back.any()):
            return pixel
        pixel = pixel + step - back


def dense_changes(mask_logits: torch.Tensor, rows: Axis, columns: Axis) -> np.ndarray:
    """Return the places (P,) at which the sign changes, from all pixels, on the device of the logits."""
    device, (height, width) = mask_logits.device, (len(rows.lower), len(columns.lower))
    logits = mask_logits.nan_to_num(nan=-1e30, posinf=1e30, neginf=-1e30).clamp(-3e38, 3e38)
    above, below, down, before, after, across = (
        torch.from_numpy(one).to(device) for axis in (rows, columns) for one in axis[:3]
    )
    first_place = torch.arange(len(logits), device=device)[:, None] * _stride(rows, columns)
    last: torch.Tensor = torch.zeros(len(logits), 1, dtype=torch.bool, device=device)
    found = []
    step = max(1, _CHUNK_PIXELS // max(1, len(logits) * height))
    for start in range(0, width, step):
        part = slice(start, start + step)
        wide = logits[:, :, before[part]] * (1 - across[part]) + logits[:, :, after[part]] * across[part]
        values = wide[:, above] * (1 - down)[:, None] + wide[:, below] * down[:, None]
        positive = (values > 0).transpose(1, 2).flatten(1)
        changes = positive != torch.cat([last, positive[:, :-1]], dim=1)
        last = positive[:, -1:]
        places = first_place + torch.arange(start * height, start * height + positive.shape[1], device=device)
        found.append(places[changes])
    return torch.cat(found).sort().values.numpy(force=True)


def places_to_rles(places: np.ndarray, num_masks: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the RLE of N masks from the places (P,) at which their sign changes, in order.

    A place is mask * (H * W + 1) + pixel. Two changes at the same place cancel.
    """
    height, width = size
    begin: np.ndarray = np.arange(num_masks) * (height * width + 1)
    end: np.ndarray = begin + height * width  # the end of the last run, which may be a change too
    left, right = (np.asarray(places.searchsorted(end, side)) for side in ("left", "right"))
    missing = np.flatnonzero((right - left) % 2 == 0)
    places = np.insert(places, right[missing], end[missing])
    same = np.flatnonzero(places[1:] == places[:-1])
    start = np.maximum.accumulate(np.where(np.diff(same, prepend=-2) > 1, same, 0))
    pair = same[(same - start) % 2 == 0]
    places = np.delete(places, np.append(pair, pair + 1))
    first = np.asarray(places.searchsorted(begin))
    runs = np.diff(places, prepend=-1)
    runs[first] -= 1
    counts, offsets = compress_runs(runs, first)
    return [{"size": [height, width], "counts": counts[start:end]} for start, end in itertools.pairwise(offsets)]


def compress_runs(runs: np.ndarray, first: np.ndarray) -> tuple[str, list[int]]:
    """Return the compressed counts of N masks in one string, and the offsets (N + 1) at which each begins and ends.

    The inverse of `masks.decompress_runs`, which describes the format, for runs of N masks one after the other; `first`
    (N,) is the index of the first run of each.
    """
    values = runs.copy()
    values[2:] -= runs[:-2]
    for skipped in range(3):
        at = first[first + skipped < np.append(first[1:], len(runs))] + skipped
        values[at] = runs[at]
    magnitude = values ^ (values >> 63)
    length: np.ndarray = np.ones(len(values), np.uint8)
    index = np.flatnonzero(magnitude > 15)
    longer = []  # for each place after the first, the values that have a letter there
    while len(index):
        longer.append(index)
        length[index] += 1
        index = index[magnitude[index] >> 4 + 5 * len(longer) > 0]
    start = np.cumsum(length, dtype=np.int64) - length
    letters: np.ndarray = np.empty(length.sum(), np.uint8)
    letters[start] = (values.astype(np.uint8) & 31) + 48 + ((length > 1).view(np.uint8) << 5)
    for place, index in enumerate(longer, 1):
        more = length[index] > place + 1
        letters[start[index] + place] = (values[index] >> 5 * place & 31) + 48 + 32 * more
    return letters.tobytes().decode("ascii"), [*start[first].tolist(), len(letters)]
