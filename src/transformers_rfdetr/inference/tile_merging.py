"""Merge the instances of overlapping tiles into those of the image.

T tiles; P pieces, the instances of all tiles, numbered from 0; K instances of the image. Coordinates are pixels of the
image. Rectangles (tiles, extents, cells, zones) are x0, y0, x1, y1, the latter two exclusive. An inner border of a tile
is one at which the image continues.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from ..model.masks import box_xyxy_to_xywh, region_to_rle
from .instances import Instances

# A piece that ends closer than this to an inner border may be cut there. A cell of the mask head has 4 pixels.
_REACH = 4
# A cut piece of which at most this fraction lies in its tile's own cell is dropped: other tiles see that place better.
_OWNED = 0.1

Link = tuple[float, int, int]  # votes, piece, piece
Cover = tuple[bool, float, int]  # whether its score is above the threshold, pixels, piece


class Tile(NamedTuple):
    """A rectangle of an image."""

    top: int
    left: int
    height: int
    width: int


def merge_tiles(
    found: Sequence[tuple[Tile, Instances]], image_size: tuple[int, int], threshold: float | np.ndarray = 0.0
) -> Instances:
    """Merge the instances of tiles into those of the image.

    Each overlap is divided along its middle, so that every pixel belongs to the cell of the tile that sees most of its
    surroundings.

    1. A piece is dropped if it touches an inner border of its tile and lies almost entirely outside of its tile's cell.
    2. Two pieces of one class in two tiles belong to one object if they agree in the zone that both tiles see: their
       intersection there is half of their union, or half of the smaller piece. Pairs that agree in more pixels come
       first. An object has at most one piece from each tile, so that objects that a tile separates stay separate.
    3. A piece that is cut at a border of its tile is then added to the object of another tile that covers half of it in
       the common zone: its tile has split the object, or found it twice. It is not added if it lies next to another
       piece of its tile in that object, or if its tile sees one of the two completely.
    4. Pieces with a score of at most `threshold` follow after rules 2 and 3 were applied to the others: a border lowers
       the score of what it cuts. They only connect pieces, and add pixels to objects that no tile sees completely, and
       of which their tile has no other piece, so that there are never more objects than without them.
    5. An object that a tile sees completely gets that tile's mask, box and score; of several such tiles, those of the
       one in which it is farthest from the border. Otherwise each pixel is decided by the tile in whose cell it lies if
       that tile has a piece of the object, else by the tiles that have one; the box is the union of all boxes, and
       score and class are those of the largest piece. Only pieces above `threshold` count as such.

    Embeddings are those of the piece with the score and the class; that of the image is the mean of the tiles'.

    Args:
        found: The tiles of [`cut_tiles`], at least one, with their instances in pixels of the tile. Without masks,
            boxes are compared.
        image_size: (height, width) of the image.
        threshold: A score in [0, 1], or one for each label (C,).

    Returns:
        Instances with a score above `threshold`, best first.
    """
    image_embeddings = [one.image_embedding for _, one in found if one.image_embedding is not None]
    image_embedding = np.mean(image_embeddings, axis=0) if image_embeddings else None
    if not any(len(instances) for _, instances in found):
        return replace(found[0][1], image_size=image_size, image_embedding=image_embedding)
    pieces = _Pieces(found, image_size, threshold)
    groups = _group(pieces, *_compare_all(pieces))
    merged = [pieces.unite(group) for group in groups if pieces.is_sure[group].any()]
    merged.sort(key=lambda one: -pieces.instances.scores[one[0]])
    sources = np.array([source for source, _, _ in merged], np.int64)
    return replace(
        pieces.instances.select(sources),
        boxes=np.array([box for _, box, _ in merged], np.float32).reshape(-1, 4),
        masks=None if pieces.instances.masks is None else [mask for _, _, mask in merged],
        image_size=image_size,
        image_embedding=image_embedding,
    )


class _Part(NamedTuple):
    """The pieces of a tile that lie in a zone, which another tile sees too."""

    pieces: np.ndarray  # (n,) their numbers
    areas: np.ndarray  # (n,) pixels in the zone
    is_cut: np.ndarray  # (n,) whether they end in the zone at an inner border of their tile


class _Pieces:
    """The P pieces of all tiles, and where they are in the image.

    Attributes:
        instances: All of them, boxes and masks in pixels of their tiles.
        tiles: (T, 4) rectangles.
        cells: (T, 4), the rectangle of each tile that belongs to it.
        tile_of: (P,) number of the tile.
        boxes: (P, 4) in the image.
        extents: (P, 4), the rectangle of the mask, or the box without masks.
        areas: (P,) pixels.
        is_cut: (P,) whether a piece ends at an inner border of its tile.
        is_sure: (P,) whether the score is above the threshold.
        kept: Numbers of the pieces that rule 1 does not drop; complete after `parts` was called for all tiles.
        placed: Their masks in the image, as RLE.
    """

    def __init__(
        self, found: Sequence[tuple[Tile, Instances]], image_size: tuple[int, int], threshold: float | np.ndarray
    ) -> None:
        self.image_size = image_size
        self.tiles = np.array([[left, top, left + width, top + height] for (top, left, height, width), _ in found])
        self.cells = _cells(self.tiles)
        self.instances = _concatenate([instances for _, instances in found])
        self.tile_of: np.ndarray = np.repeat(np.arange(len(found)), [len(instances) for _, instances in found])
        if isinstance(threshold, np.ndarray):
            threshold = threshold[self.instances.labels]
        self.is_sure = self.instances.scores > threshold
        offsets = np.tile(self.tiles[self.tile_of, :2], 2)
        self.boxes = self.extents = self.instances.boxes + offsets
        self.areas = self.instances.areas
        if self.instances.masks is not None:
            x, y, width, height = coco_mask.toBbox(self.instances.masks).T
            of_masks = np.stack([x, y, x + width, y + height], axis=1) + offsets
            of_boxes = np.concatenate([np.floor(self.boxes[:, :2]), np.ceil(self.boxes[:, 2:])], axis=1)
            self.extents = np.where(self.areas[:, None] > 0, of_masks, of_boxes)
        self.is_cut = self.margins(self.extents, self.tiles[self.tile_of]) < _REACH
        self.kept: list[int] = []
        self.placed: dict[int, dict[str, Any]] = {}

    def margins(self, extents: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Return the pixels (...) from extents (..., 4) to the nearest inner border of tiles (..., 4), inf if none."""
        low = np.where(tiles[..., :2] > 0, extents[..., :2] - tiles[..., :2], np.inf)
        high = np.where(tiles[..., 2:] < self.image_size[::-1], tiles[..., 2:] - extents[..., 2:], np.inf)
        return np.minimum(low, high).min(-1)

    def interior(self, tile: np.ndarray) -> np.ndarray:
        """Return the part (4,) of a tile (4,) that is not close to its inner borders."""
        inner = np.concatenate([tile[:2] > 0, tile[2:] < self.image_size[::-1]])
        return tile + inner * np.array([_REACH, _REACH, -_REACH, -_REACH])

    def parts(self, tile: int, zones: np.ndarray) -> list[_Part]:
        """Apply rule 1 to the pieces of a tile; return the others in each of the zones (Z, 4) that it shares."""
        interior = _intersections(self.interior(self.tiles[tile]), zones)
        rectangles = np.concatenate([self.cells[tile][None], zones, interior])
        kept, counts = [], []
        for piece in np.flatnonzero(self.tile_of == tile).tolist():
            mask = self.decode(piece)
            count = self.count(piece, mask, rectangles)
            if self.is_cut[piece] and count[0] <= _OWNED * self.areas[piece]:
                continue
            kept.append(piece)
            counts.append(count)
            if mask is not None:
                region = self.cut_out(piece, mask, self.extents[piece])
                self.placed[piece] = region_to_rle(region, *_corner(self.extents[piece]), self.image_size)
        self.kept += kept
        _, areas, inside = np.split(np.array(counts).reshape(-1, len(rectangles)), [1, 1 + len(zones)], axis=1)
        numbers, is_in = np.array(kept, np.int64), areas > 0
        return [
            _Part(numbers[is_in[:, zone]], areas[is_in[:, zone], zone], (inside < areas)[is_in[:, zone], zone])
            for zone in range(len(zones))
        ]

    def decode(self, piece: int) -> np.ndarray | None:
        """Return the mask of a piece, bool of the size of its tile; None without masks."""
        return None if self.instances.masks is None else decode_mask(self.instances.masks[piece])

    def count(self, piece: int, mask: np.ndarray | None, rectangles: np.ndarray) -> np.ndarray:
        """Return the pixels (R,) of a piece in each of the rectangles (R, 4); those of its box without a mask."""
        inside = _intersections(self.extents[piece], rectangles)
        counts = (inside[:, 2:] - inside[:, :2]).prod(1)
        if mask is not None:
            for index in np.flatnonzero(counts):
                counts[index] = np.count_nonzero(self.cut_out(piece, mask, inside[index]))
        return counts

    def cut_out(self, piece: int, mask: np.ndarray, rectangle: np.ndarray) -> np.ndarray:
        """Cut a rectangle of the image, which the tile contains, out of the mask of a piece."""
        left, top = self.tiles[self.tile_of[piece], :2]
        return mask[_window(rectangle, left, top)]

    def shapes(self, pieces: Sequence[int] | np.ndarray) -> Any:
        """Return masks in the image as RLE, or boxes x, y, width, height, for pycocotools."""
        if self.instances.masks is not None:
            return [self.placed[int(piece)] for piece in pieces]
        return box_xyxy_to_xywh(self.boxes[pieces])

    def are_sure(self, *pieces: int) -> bool:
        """Return whether all of these pieces have a score above the threshold."""
        return all(self.is_sure[piece] for piece in pieces)

    def is_separate(self, piece: int, group: list[int]) -> bool:
        """Whether the tile of a piece has another piece in a group that is another object, by the end of rule 3."""
        others = [other for other in group if self.tile_of[other] == self.tile_of[piece]]
        if not others:
            return False
        if not self.are_sure(piece, *others):
            return True
        one, extents = self.extents[piece], self.extents[others]
        gaps = (np.maximum(one[:2], extents[:, :2]) - np.minimum(one[2:], extents[:, 2:])).max(1)
        is_copy = coco_mask.iou(self.shapes([piece]), self.shapes(others), [0] * len(others))[0] > 0.5
        return bool(((gaps < _REACH) & ~is_copy).any()) or not self.is_cut[[piece, *others]].all()

    def unite(self, group: list[int]) -> tuple[int, np.ndarray, dict[str, Any] | None]:
        """Return the piece that gives an object its score and class, the box and the mask of the object: rule 5."""
        sure = [piece for piece in group if self.is_sure[piece]]
        margins = self.margins(_hull(self.extents[sure]), self.tiles[self.tile_of[sure]])
        if margins.max() >= _REACH:
            source = sure[margins.argmax()]
            return source, self.boxes[source], self.placed.get(source)
        source, box = sure[self.areas[sure].argmax()], _hull(self.boxes[group])
        if self.instances.masks is None or len(group) == 1:
            return source, box, self.placed.get(source)
        extent = _hull(self.extents[group])
        return source, box, region_to_rle(self.unite_masks(group, extent), *_corner(extent), self.image_size)

    def unite_masks(self, group: list[int], extent: np.ndarray) -> np.ndarray:
        """Return the mask of an object in its extent (4,)."""
        left, top, right, bottom = extent.astype(int)
        united: np.ndarray = np.zeros((bottom - top, right - left), bool)
        masks = [(piece, decode_mask(self.instances.masks[piece])) for piece in group]
        for piece, mask in masks:
            united[_window(self.extents[piece], left, top)] |= self.cut_out(piece, mask, self.extents[piece])
        for inside in _intersections(extent, self.cells[self.tile_of[group]]):
            united[_window(inside, left, top)] = False
        for piece, mask in masks:
            [inside] = _intersections(self.extents[piece], self.cells[self.tile_of[piece]][None])
            united[_window(inside, left, top)] |= self.cut_out(piece, mask, inside)
        return united


def _concatenate(found: Sequence[Instances]) -> Instances:
    ids = [each.category_ids for each in found if each.category_ids is not None]
    embeddings = [each.embeddings for each in found if each.embeddings is not None]
    return Instances(
        np.concatenate([each.boxes for each in found]),
        np.concatenate([each.scores for each in found]),
        np.concatenate([each.labels for each in found]),
        [name for each in found for name in each.names],
        None if found[0].masks is None else [mask for each in found for mask in each.masks or []],
        found[0].image_size,
        category_ids=np.concatenate(ids) if ids else None,
        embeddings=np.concatenate(embeddings) if embeddings else None,
    )


def _cells(tiles: np.ndarray) -> np.ndarray:
    """Return the cells (T, 4) of the tiles (T, 4) of a grid, which divide each overlap along its middle."""
    cells = tiles.copy()
    for axis in (0, 1):
        spans = np.unique(tiles[:, [axis, axis + 2]], axis=0)
        middles = (spans[1:, 0] + spans[:-1, 1]) // 2
        position = np.searchsorted(spans[:, 0], tiles[:, axis])
        cells[:, axis] = np.concatenate([spans[:1, 0], middles])[position]
        cells[:, axis + 2] = np.concatenate([middles, spans[-1:, 1]])[position]
    return cells


def _compare_all(pieces: _Pieces) -> tuple[list[Link], dict[int, Cover]]:
    """Compare the pieces of all pairs of tiles that overlap.

    Returns:
        The pairs of rule 2, each with its votes: pixels that agree, minus pixels that do not. And for each piece of
        rule 3 the piece of another tile that covers most of it, one above the threshold if there is any.
    """
    links: list[Link] = []
    covering: dict[int, Cover] = {}
    waiting: dict[tuple[int, int], _Part] = {}
    for tile, rectangle in enumerate(pieces.tiles):
        zones = _intersections(rectangle, pieces.tiles)
        others = np.flatnonzero((zones[:, 2:] > zones[:, :2]).all(1) & (np.arange(len(zones)) != tile))
        for other, part in zip(others.tolist(), pieces.parts(tile, zones[others]), strict=True):
            if other > tile:
                waiting[tile, other] = part
            else:
                _compare(pieces, waiting.pop((other, tile)), part, links, covering)
    return links, covering


def _compare(pieces: _Pieces, one: _Part, other: _Part, links: list[Link], covering: dict[int, Cover]) -> None:
    """Compare the pieces of two tiles in the zone that both see; add to `links` and `covering`."""
    if not len(one.pieces) or not len(other.pieces):
        return
    # For a crowd, pycocotools returns the intersection as a fraction of the first shape.
    common = coco_mask.iou(pieces.shapes(one.pieces), pieces.shapes(other.pieces), [1] * len(other.pieces))
    common = common * pieces.areas[one.pieces][:, None]
    labels = pieces.instances.labels
    i, j = np.nonzero((common > 0) & (labels[one.pieces][:, None] == labels[other.pieces]))
    common, p, q, area_p, area_q = common[i, j], one.pieces[i], other.pieces[j], one.areas[i], other.areas[j]
    votes = 3 * common - area_p - area_q  # the intersection, minus the rest of the union
    agree = (votes >= 0) | (2 * common >= np.minimum(pieces.areas[p], pieces.areas[q]))
    links += zip(votes[agree].tolist(), p[agree].tolist(), q[agree].tolist(), strict=True)
    for is_cut, area, cut, cover in ((one.is_cut[i], area_p, p, q), (other.is_cut[j], area_q, q, p)):
        inside = is_cut & (2 * common >= area)
        for pixels, piece, other_piece in zip(common[inside], cut[inside], cover[inside], strict=True):
            candidate = (bool(pieces.is_sure[other_piece]), float(pixels), int(other_piece))
            covering[int(piece)] = max(covering.get(int(piece), candidate), candidate)


def _group(pieces: _Pieces, links: list[Link], covering: dict[int, Cover]) -> list[list[int]]:
    """Return the pieces of each object, by rules 2 to 4."""
    group_of = {piece: [piece] for piece in pieces.kept}

    def join(one: list[int], other: list[int]) -> None:
        one += other
        for piece in other:
            group_of[piece] = one

    links.sort(key=lambda link: (-link[0], link[1], link[2]))
    for are_sure in (True, False):
        for _, p, q in links:
            one, other = group_of[p], group_of[q]
            if pieces.are_sure(p, q) == are_sure and set(pieces.tile_of[one]).isdisjoint(pieces.tile_of[other]):
                join(one, other)
        for piece, (*_, cover) in covering.items():
            one, other = group_of[cover], group_of[piece]
            is_considered = pieces.are_sure(piece, cover) == are_sure and one is not other
            if is_considered and not any(pieces.is_separate(each, one) for each in other):
                join(one, other)
    return list({id(group): group for group in group_of.values()}.values())


def _intersections(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersections (R, 4) of a rectangle (4,) with others (R, 4), of width or height 0 if there is none."""
    low = np.maximum(one[:2], others[:, :2])
    return np.concatenate([low, np.maximum(low, np.minimum(one[2:], others[:, 2:]))], axis=1)


def _hull(rectangles: np.ndarray) -> np.ndarray:
    """Return the smallest rectangle (4,) around others (R, 4)."""
    return np.concatenate([rectangles[:, :2].min(0), rectangles[:, 2:].max(0)])


def _window(rectangle: np.ndarray, left: int, top: int) -> tuple[slice, slice]:
    """Return the rows and columns of a rectangle of whole pixels, in an array whose first pixel is (left, top)."""
    x0, y0, x1, y1 = (rectangle.astype(int) - (left, top, left, top)).tolist()
    return slice(y0, y1), slice(x0, x1)


def _corner(extent: np.ndarray) -> tuple[int, int]:
    """Return top and left of an extent."""
    return int(extent[1]), int(extent[0])


def decode_mask(mask: dict[str, Any]) -> np.ndarray:
    """Return an RLE as bool (H, W)."""
    return coco_mask.decode(mask).view(bool)
