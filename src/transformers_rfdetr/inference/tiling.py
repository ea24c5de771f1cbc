"""Large images in overlapping tiles: cut, predicted one batch at a time, and put together again.

T tiles, P pieces: what was found in the tiles, all numbered in one row, K instances of the image. Places are pixels
of the image; rectangles and extents are x0, y0, x1, y1, the latter two exclusive. A tile's inner borders are those at
which the image goes on.
"""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from transformers.utils import logging

from ..model.image_io import channels_first, decode_image, read_image
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.masks import mask_areas, region_to_rle
from ..model.modeling_rf_detr import RfDetrForObjectDetection
from ..model.validation import as_pair, check_resolution, read_size
from .compiled import InferenceModel
from .instances import Instances
from .predict import predict

# What ends closer than this to an inner border of its tile may go on behind it. The mask head's cells are 4 pixels.
_REACH = 4
# A piece that is cut, and of which its tile owns no more than this, is left to the tiles that see that place better.
_OWNED = 0.1

Link = tuple[float, int, int]


class Tile(NamedTuple):
    """A part of an image, wholly inside it, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def predict_tiled(
    model: RfDetrForObjectDetection | InferenceModel,
    processor: RfDetrImageProcessor,
    image: Any,
    *,
    tile: int | tuple[int, int] | None = None,
    overlap: float = 0.2,
    threshold: float = 0.5,
    batch_size: int = 4,
    classes: Sequence[str] | None = None,
    progress: bool = False,
) -> Instances:
    """One large image to instances: at its own scale, tile by tile, objects that cross tiles in one piece.

    Besides the image only `batch_size` tiles are held, and of what was found RLE.

    Example:
        >>> from PIL import Image
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor
        >>> from transformers_rfdetr.inference.tiling import predict_tiled
        >>> model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano"))
        >>> processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
        >>> predict_tiled(model, processor, Image.new("RGB", (500, 400)), threshold=0.9).image_size
        (400, 500)

    Args:
        model: In evaluation mode while this runs; or `compile_for_inference`'s, made for the size of a tile.
        processor: The model's. Tiles are not resized, whatever its `size`.
        image: One image in any form that the processor takes.
        tile: Side of a tile in pixels, or (height, width), each a multiple of patch size x windows; the model's
            resolution by default. Where the image is smaller, the processor's mean colour fills it up at the bottom
            and on the right.
        overlap: The part of its side, in [0, 0.5], that a tile shares with its neighbour at least. Objects up to that
            size are seen whole by a tile; with 0 nothing that crosses a border is put together.
        threshold: A score in [0, 1], to be exceeded.
        batch_size: Tiles that go through the model at once.
        classes: Names of the classes that are looked for; all by default.
        progress: Whether to show a progress bar.

    Returns:
        What was found, as `merge_tiles` puts it together. An image of one tile has what `predict` finds in it.

    Raises:
        ValueError: an image that cannot be read, an illegal size of tile, or an argument that is out of range.
    """
    size = as_pair(read_size(model.config.resolution if tile is None else tile, "tile"))
    backbone = model.config.backbone_config
    check_resolution(size, backbone.patch_size, backbone.num_windows, "tile")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    pixels = _pixels(processor, image)
    image_size = (pixels.shape[1], pixels.shape[2])
    tiles = cut_tiles(image_size, size, overlap)
    of_tiles = copy.copy(processor)
    of_tiles.size, of_tiles.pad_size = {"height": size[0], "width": size[1]}, None
    found: list[tuple[Tile, Instances]] = []
    for start in logging.tqdm(range(0, len(tiles), batch_size), desc="Tiles", disable=not progress):
        some = tiles[start : start + batch_size]
        crops = [_crop(processor, pixels, each, size) for each in some]
        results = predict(model, of_tiles, crops, threshold=threshold, classes=classes, batch_size=batch_size)
        found += [(each, _without_padding(result, each)) for each, result in zip(some, results, strict=True)]
    return merge_tiles(found, image_size)


def cut_tiles(image_size: tuple[int, int], size: tuple[int, int], overlap: float) -> list[Tile]:
    """The tiles of an image, row by row: evenly spread, the last ones flush with its edges, none larger than it.

    Args:
        image_size: (height, width) of the image.
        size: (height, width) of a tile.
        overlap: The part of its side, in [0, 0.5], that a tile shares with its neighbour at least.

    Raises:
        ValueError: `overlap` is outside [0, 0.5].
    """
    if not 0 <= overlap <= 0.5:
        raise ValueError(
            f"overlap {overlap} is outside [0, 0.5]; give the part of a tile that the next one sees too, such as 0.2"
        )
    tops, lefts = (_starts(length, side, overlap) for length, side in zip(image_size, size, strict=True))
    height, width = np.minimum(image_size, size).tolist()
    return [Tile(top, left, height, width) for top in tops for left in lefts]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    room = length - side
    if room <= 0:
        return [0]
    steps = math.ceil(room / max(1, math.floor(side * (1 - overlap))))
    return [round(index * room / steps) for index in range(steps + 1)]


def _pixels(processor: RfDetrImageProcessor, image: Any) -> Tensor:
    """An image in any form -> (1 or 3, H, W), upright, in its own type: a quarter of what float32 would take."""
    data_format = None
    if isinstance(image, str | os.PathLike | PIL.Image.Image):
        image, data_format = decode_image(image), "channels_last"
    if isinstance(image, np.ndarray) and image.dtype.kind in "biuf":
        image = torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), ["C", "W"]))
    if not isinstance(image, Tensor):
        return processor.read(image)  # it knows what is wrong with it
    return channels_first(image.detach(), data_format)


def _crop(processor: RfDetrImageProcessor, pixels: Tensor, tile: Tile, size: tuple[int, int]) -> Tensor:
    """A tile of (1 or 3, H, W) -> (3, *size) float32, scaled; the mean colour where the image has ended."""
    inside = pixels[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
    image = read_image(inside, processor.do_rescale, processor.rescale_factor, "channels_first")
    if image.shape[1:] == size:
        return image
    filled = image.new_tensor(processor.image_mean)[:, None, None].repeat(1, *size)
    filled[:, : tile.height, : tile.width] = image
    return filled


def _without_padding(found: Instances, tile: Tile) -> Instances:
    """Instances of a tile that was filled up, cut off where the image ends; those beyond it leave."""
    size = (tile.height, tile.width)
    if found.image_size == size:
        return found
    boxes = np.minimum(found.boxes, np.array([*size[::-1], *size[::-1]], np.float32))
    kept, masks = (boxes[:, 2:] > boxes[:, :2]).all(1), found.masks
    if masks:
        masks = [region_to_rle(_decoded(mask)[: tile.height, : tile.width], 0, 0, size) for mask in masks]
        kept &= mask_areas(masks) > 0
    return replace(found, boxes=boxes, masks=masks, image_size=size).select(kept)


def merge_tiles(found: Sequence[tuple[Tile, Instances]], image_size: tuple[int, int]) -> Instances:
    """What was found in each tile -> what is in the image.

    Overlaps are split down their middle: every pixel belongs to the tile that sees most around it.
    1. A piece that touches an inner border of its tile, and lies nearly wholly in other tiles' part, leaves: those see
       that place better, whether they found something there or not.
    2. Pieces of one class in two tiles are one object if they agree where both tiles see: half of the union there is
       common to both, or half of the smaller piece. Those that agree in most pixels come first; an object has but one
       piece of each tile, so that neighbours that one tile tells apart stay apart.
    3. A piece that goes on behind the border of its tile is a part of the object there that covers half of what both
       see of it: its tile has split that object, or found it twice. Right beside another part of its own tile, or one
       seen whole, it is a neighbour.
    4. An object that a tile sees whole has that tile's mask, box and score, of several the one where it lies deepest.
       Of others each pixel is decided by the tile that it belongs to, where that has a piece of it, otherwise by those
       that have; the box is the union of the pieces' boxes, the score that of the largest piece.

    Args:
        found: Tiles of a grid, at least one, with what was found in each, in the tile's own pixels. Boxes are compared
            where there are no masks.
        image_size: (height, width) of the image.

    Returns:
        Best first; masks as RLE of the image.
    """
    if not any(len(instances) for _, instances in found):
        return replace(found[0][1], image_size=image_size)
    pieces = _Pieces(found, image_size)
    merged = [pieces.unite(group) for group in _group(pieces, *_compare_all(pieces))]
    best = sorted(range(len(merged)), key=lambda index: -pieces.scores[merged[index][0]])
    sources = np.array([merged[index][0] for index in best], np.int64)
    return Instances(
        np.array([merged[index][1] for index in best], np.float32).reshape(-1, 4),
        pieces.scores[sources],
        pieces.labels[sources],
        [pieces.names[source] for source in sources],
        None if pieces.masks is None else [merged[index][2] for index in best],
        image_size,
    )


class _Part(NamedTuple):
    """What of a tile's pieces lies in a zone that another tile sees too."""

    pieces: np.ndarray  # (n,) their numbers
    areas: np.ndarray  # (n,) pixels in the zone
    is_cut: np.ndarray  # (n,) whether they end there at an inner border of their tile


class _Pieces:
    """What was found in all tiles, in one row, with its places in the image."""

    def __init__(self, found: Sequence[tuple[Tile, Instances]], image_size: tuple[int, int]) -> None:
        instances = [each for _, each in found]
        self.image_size = image_size
        self.tiles = np.array([[left, top, left + width, top + height] for (top, left, height, width), _ in found])
        self.tile_of: np.ndarray = np.repeat(np.arange(len(found)), [len(each) for each in instances])
        self.scores = np.concatenate([each.scores for each in instances])
        self.labels = np.concatenate([each.labels for each in instances])
        self.names = [name for each in instances for name in each.names]
        corners = np.tile(self.tiles[self.tile_of, :2], 2)
        self.boxes = np.concatenate([each.boxes for each in instances]) + corners
        self.extents, self.areas = self.boxes, np.prod(self.boxes[:, 2:] - self.boxes[:, :2], axis=1)
        self.masks = None  # as they are in their tiles
        if instances[0].masks is not None:
            self.masks = [mask for each in instances for mask in each.masks or []]
            self.areas = mask_areas(self.masks)
            x, y, width, height = coco_mask.toBbox(self.masks).T
            of_masks = np.stack([x, y, x + width, y + height], axis=1) + corners
            rounded = np.concatenate([np.floor(self.boxes[:, :2]), np.ceil(self.boxes[:, 2:])], axis=1)
            self.extents = np.where(self.areas[:, None] > 0, of_masks, rounded)
        self.is_cut = self.margins(self.extents, self.tiles[self.tile_of]) < _REACH
        self.cells = _cells(self.tiles)
        # Filled tile by tile: the pieces that do not leave, and their masks in the image.
        self.kept: list[int] = []
        self.placed: dict[int, dict[str, Any]] = {}

    def margins(self, extents: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Pixels (...) from extents (..., 4) to the nearest inner border of tiles (..., 4); inf where there is none."""
        low = np.where(tiles[..., :2] > 0, extents[..., :2] - tiles[..., :2], np.inf)
        high = np.where(tiles[..., 2:] < self.image_size[::-1], tiles[..., 2:] - extents[..., 2:], np.inf)
        return np.minimum(low, high).min(-1)

    def interior(self, tile: np.ndarray) -> np.ndarray:
        """What of a tile (4,) is not near its inner borders."""
        inner = np.concatenate([tile[:2] > 0, tile[2:] < self.image_size[::-1]])
        return tile + inner * np.array([_REACH, _REACH, -_REACH, -_REACH])

    def parts(self, tile: int, zones: np.ndarray) -> list[_Part]:
        """Keep the pieces of a tile that do not leave -> their parts in the zones (Z, 4) that it shares with others."""
        interior = _intersections(self.interior(self.tiles[tile]), zones)
        rectangles = np.concatenate([self.cells[tile][None], zones, interior])
        members = np.flatnonzero(self.tile_of == tile)
        kept, counts = [], []
        for piece in members.tolist():
            mask = None if self.masks is None else self.decoded(piece)
            count = self.count(piece, mask, rectangles)
            if self.is_cut[piece] and count[0] <= _OWNED * self.areas[piece]:
                continue
            kept.append(piece)
            counts.append(count)
            if mask is not None:
                region = self.look(piece, mask, self.extents[piece])
                self.placed[piece] = region_to_rle(region, *_corner(self.extents[piece]), self.image_size)
        self.kept += kept
        _, areas, inside = np.split(np.array(counts).reshape(-1, len(rectangles)), [1, 1 + len(zones)], axis=1)
        numbers, reached = np.array(kept, np.int64), areas > 0
        return [
            _Part(numbers[reached[:, zone]], areas[reached[:, zone], zone], (inside < areas)[reached[:, zone], zone])
            for zone in range(len(zones))
        ]

    def count(self, piece: int, mask: np.ndarray | None, rectangles: np.ndarray) -> np.ndarray:
        """The pixels of a piece in each of the rectangles (R, 4), (R,); of its box without a mask."""
        inside = _intersections(self.extents[piece], rectangles)
        counts = (inside[:, 2:] - inside[:, :2]).prod(1)
        if mask is not None:
            for index in np.flatnonzero(counts):
                counts[index] = np.count_nonzero(self.look(piece, mask, inside[index]))
        return counts

    def decoded(self, piece: int) -> np.ndarray:
        """The mask of a piece, bool of its tile's size."""
        return _decoded(self.masks[piece])

    def look(self, piece: int, mask: np.ndarray, rectangle: np.ndarray) -> np.ndarray:
        """A rectangle of the image, inside the tile of a piece, out of the mask of its tile."""
        left, top = self.tiles[self.tile_of[piece], :2]
        return mask[_window(rectangle, left, top)]

    def shapes(self, pieces: Sequence[int] | np.ndarray) -> Any:
        """What pycocotools compares: n RLEs of the image, or (n, 4) x, y, width, height."""
        if self.masks is not None:
            return [self.placed[int(piece)] for piece in pieces]
        boxes = self.boxes[pieces]
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)

    def tells_apart(self, piece: int, group: list[int]) -> bool:
        """Whether the tile of a piece has another one in a group, neither split from it by the border nor its copy."""
        others = [other for other in group if self.tile_of[other] == self.tile_of[piece]]
        if not others:
            return False
        one, extents = self.extents[piece], self.extents[others]
        gaps = (np.maximum(one[:2], extents[:, :2]) - np.minimum(one[2:], extents[:, 2:])).max(1)
        alike = coco_mask.iou(self.shapes([piece]), self.shapes(others), [0] * len(others))[0]
        return bool(((gaps < _REACH) & (alike <= 0.5)).any()) or not self.is_cut[[piece, *others]].all()

    def unite(self, group: list[int]) -> tuple[int, np.ndarray, dict[str, Any] | None]:
        """The pieces of one object -> the piece that has its score and class, its box, its mask."""
        extent = _hull(self.extents[group])
        margins = self.margins(extent, self.tiles[self.tile_of[group]])
        if margins.max() >= _REACH:
            source = group[margins.argmax()]
            return source, self.boxes[source], self.placed.get(source)
        source, box = group[self.areas[group].argmax()], _hull(self.boxes[group])
        if self.masks is None or len(group) == 1:
            return source, box, self.placed.get(source)
        return source, box, region_to_rle(self.put_together(group, extent), *_corner(extent), self.image_size)

    def put_together(self, group: list[int], extent: np.ndarray) -> np.ndarray:
        """The pieces of one object -> its pixels, bool, in its extent (4,)."""
        left, top, right, bottom = extent.astype(int)
        united: np.ndarray = np.zeros((bottom - top, right - left), bool)
        masks = [(piece, self.decoded(piece)) for piece in group]
        for piece, mask in masks:
            united[_window(self.extents[piece], left, top)] |= self.look(piece, mask, self.extents[piece])
        for inside in _intersections(extent, self.cells[self.tile_of[group]]):
            united[_window(inside, left, top)] = False
        for piece, mask in masks:
            [inside] = _intersections(self.extents[piece], self.cells[self.tile_of[piece]][None])
            united[_window(inside, left, top)] |= self.look(piece, mask, inside)
        return united


def _cells(tiles: np.ndarray) -> np.ndarray:
    """Tiles of a grid (T, 4) -> the part (T, 4) of each that belongs to it: overlaps are split down their middle."""
    cells = tiles.copy()
    for axis in (0, 1):
        spans = np.unique(tiles[:, [axis, axis + 2]], axis=0)
        middles = (spans[1:, 0] + spans[:-1, 1]) // 2
        position = np.searchsorted(spans[:, 0], tiles[:, axis])
        cells[:, axis] = np.concatenate([spans[:1, 0], middles])[position]
        cells[:, axis + 2] = np.concatenate([middles, spans[-1:, 1]])[position]
    return cells


def _compare_all(pieces: _Pieces) -> tuple[list[Link], dict[int, tuple[float, int]]]:
    """Every two tiles that overlap -> the pairs of pieces that may be one object, and how sure that is.

    Returns:
        (pixels that agree less those that do not, piece, piece) of the pairs that agree; and for pieces that end at
        their tile's border inside a piece of another tile (the pixels that they have in common, that piece).
    """
    links: list[Link] = []
    continued: dict[int, tuple[float, int]] = {}
    waiting: dict[tuple[int, int], _Part] = {}
    for tile, rectangle in enumerate(pieces.tiles):
        zones = _intersections(rectangle, pieces.tiles)
        others = np.flatnonzero((zones[:, 2:] > zones[:, :2]).all(1) & (np.arange(len(zones)) != tile))
        for other, part in zip(others.tolist(), pieces.parts(tile, zones[others]), strict=True):
            if other > tile:
                waiting[tile, other] = part
            else:
                _compare(pieces, waiting.pop((other, tile)), part, links, continued)
    return links, continued


def _compare(
    pieces: _Pieces, one: _Part, other: _Part, links: list[Link], continued: dict[int, tuple[float, int]]
) -> None:
    """Add what the pieces of two tiles in the zone that both see say."""
    if not len(one.pieces) or not len(other.pieces):
        return
    # Of a "crowd" pycocotools gives the common part of the first shape.
    common = coco_mask.iou(pieces.shapes(one.pieces), pieces.shapes(other.pieces), [1] * len(other.pieces))
    common = common * pieces.areas[one.pieces][:, None]
    same_class = pieces.labels[one.pieces][:, None] == pieces.labels[other.pieces]
    i, j = np.nonzero((common > 0) & same_class)
    common, p, q, area_p, area_q = common[i, j], one.pieces[i], other.pieces[j], one.areas[i], other.areas[j]
    votes = 3 * common - area_p - area_q  # common less the rest of the union
    agree = (votes >= 0) | (2 * common >= np.minimum(pieces.areas[p], pieces.areas[q]))
    links += zip(votes[agree].tolist(), p[agree].tolist(), q[agree].tolist(), strict=True)
    for is_cut, area, some, around in ((one.is_cut[i], area_p, p, q), (other.is_cut[j], area_q, q, p)):
        inside = is_cut & (2 * common >= area)
        for pixels, piece, other_piece in zip(common[inside], some[inside], around[inside], strict=True):
            continued[int(piece)] = max(continued.get(int(piece), (0.0, -1)), (float(pixels), int(other_piece)))


def _group(pieces: _Pieces, links: list[Link], continued: dict[int, tuple[float, int]]) -> list[list[int]]:
    """Pairs of pieces -> the pieces of each object."""
    group_of = {piece: [piece] for piece in pieces.kept}

    def join(one: list[int], other: list[int]) -> None:
        one += other
        for piece in other:
            group_of[piece] = one

    for _, p, q in sorted(links, key=lambda link: (-link[0], *link[1:])):
        one, other = group_of[p], group_of[q]
        if set(pieces.tile_of[one]).isdisjoint(pieces.tile_of[other]):
            join(one, other)
    for piece, (_, around) in continued.items():
        one, other = group_of[around], group_of[piece]
        if one is not other and not any(pieces.tells_apart(each, one) for each in other):
            join(one, other)
    return list({id(group): group for group in group_of.values()}.values())


def _intersections(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What a rectangle (4,) shares with each of others (R, 4): (R, 4), of no width or height where that is nothing."""
    low = np.maximum(one[:2], others[:, :2])
    return np.concatenate([low, np.maximum(low, np.minimum(one[2:], others[:, 2:]))], axis=1)


def _hull(rectangles: np.ndarray) -> np.ndarray:
    """The smallest rectangle (4,) around others (R, 4)."""
    return np.concatenate([rectangles[:, :2].min(0), rectangles[:, 2:].max(0)])


def _window(rectangle: np.ndarray, left: int, top: int) -> tuple[slice, slice]:
    """A rectangle of whole pixels -> its rows and columns in an array that begins at (left, top)."""
    x0, y0, x1, y1 = (rectangle.astype(int) - (left, top, left, top)).tolist()
    return slice(y0, y1), slice(x0, x1)


def _corner(extent: np.ndarray) -> tuple[int, int]:
    """The upper left pixel: top, left."""
    return int(extent[1]), int(extent[0])


def _decoded(mask: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode(mask).view(bool)
