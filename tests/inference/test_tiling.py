"""Large images in tiles: how they are cut, and how what an oracle or a model finds in the tiles is put together."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from transformers_rfdetr import (
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    compile_for_inference,
    predict,
)
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.inference.tiling import Tile, cut_tiles, merge_tiles, predict_tiled
from transformers_rfdetr.model.masks import region_to_rle

from small_models import small_model

SEGMENTATION, DETECTION = RfDetrForInstanceSegmentation, RfDetrForObjectDetection

# -- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "overlap", "starts"),
    [
        (3, 0.25, [0]),
        (4, 0.25, [0]),
        (5, 0.25, [0, 1]),
        (10, 0.25, [0, 3, 6]),
        (10, 0.5, [0, 2, 4, 6]),
        (10, 0.0, [0, 3, 6]),  # three tiles of 4 cover 12: what is too much is spread
        (12, 0.0, [0, 4, 8]),
        (11, 0.25, [0, 2, 5, 7]),
    ],
)
def test_tiles_are_evenly_spaced_and_the_last_one_ends_at_the_edge(length, overlap, starts):
    side = min(length, 4)
    assert cut_tiles((length, 3), (4, 4), overlap) == [Tile(start, 0, side, 3) for start in starts]
    assert cut_tiles((3, length), (4, 4), overlap) == [Tile(0, start, 3, side) for start in starts]


@pytest.mark.parametrize("overlap", [0.0, 0.13, 0.2, 0.5])
def test_tiles_cover_the_image_and_have_at_least_the_given_overlap(overlap):
    for length in [*range(300, 700, 7), 4000]:
        lefts = np.array([tile.left for tile in cut_tiles((10, length), (312, 312), overlap)])
        assert lefts[0] == 0
        assert lefts[-1] == max(0, length - 312)
        assert (312 - np.diff(lefts) >= overlap * 312).all()
        assert (np.diff(lefts) > 0).all()


def test_tiles_are_ordered_row_by_row():
    tiles = cut_tiles((5, 6), (4, 4), 0.5)
    assert tiles == [Tile(0, 0, 4, 4), Tile(0, 2, 4, 4), Tile(1, 0, 4, 4), Tile(1, 2, 4, 4)]


# -- putting together, by hand ---------------------------------------------------------------------------------------

# Two tiles of 40 that share the columns 28 to 39; those from 34 on belong to the right one.
SIZE = (40, 68)
LEFT, RIGHT = cut_tiles(SIZE, (40, 40), 0.3)


def rectangle(x0, y0, x1, y1):
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def found_in(tile, *pieces, with_masks=True):
    """Pieces as (mask of the image, score) or (mask, score, label) -> instances in the tile's frame."""
    boxes, masks = [], []
    for mask, *_ in pieces:
        part = mask[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        rows, columns = np.nonzero(part)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(region_to_rle(part, 0, 0, (tile.height, tile.width)))
    labels = np.array([label for _, _, label in (((*piece, 0)[:3]) for piece in pieces)], np.int64)
    scores = np.array([score for _, score, *_ in pieces], np.float32)
    names = [f"class {label}" for label in labels]
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return tile, Instances(boxes, scores, labels, names, masks if with_masks else None, (tile.height, tile.width))


def merged(left, right, *, threshold=0.0, **settings):
    return merge_tiles([found_in(LEFT, *left, **settings), found_in(RIGHT, *right, **settings)], SIZE, threshold)


def test_each_side_of_an_object_that_crosses_tiles_has_the_mask_of_its_own_tile():
    [result] = merged([(rectangle(5, 10, 40, 20), 0.6)], [(rectangle(28, 12, 60, 22), 0.9)]).to_dict()["instances"]
    expected = rectangle(5, 10, 34, 20) | rectangle(34, 12, 60, 22)
    np.testing.assert_array_equal(coco_mask.decode(result["mask"]), expected)
    assert result["box"] == [5, 10, 60, 22]
    assert result["score"] == pytest.approx(0.6)  # of the larger piece, 350 pixels against 320
    assert result["name"] == "class 0"


def test_without_masks_the_boxes_are_compared_and_united():
    result = merged([(rectangle(5, 10, 40, 20), 0.6)], [(rectangle(28, 12, 60, 22), 0.9)], with_masks=False)
    assert result.masks is None
    assert result.boxes.tolist() == [[5, 10, 60, 22]]
    apart = merged([(rectangle(5, 10, 40, 20), 0.6)], [(rectangle(28, 16, 60, 30), 0.9)], with_masks=False)
    assert apart.boxes.tolist() == [[28, 16, 60, 30], [5, 10, 40, 20]]  # 4 of 20 rows in common


@pytest.mark.parametrize("with_masks", [True, False])
def test_an_object_that_one_tile_sees_completely_has_the_result_of_that_tile(with_masks):
    left, right = [(rectangle(15, 5, 35, 20), 0.6)], [(rectangle(28, 5, 36, 21), 0.9)]
    result = merged(left, right, with_masks=with_masks)
    assert result.boxes.tolist() == [[15, 5, 35, 20]]
    assert result.scores.tolist() == pytest.approx([0.6])
    if with_masks:
        np.testing.assert_array_equal(result.dense_masks()[0], rectangle(15, 5, 35, 20))


@pytest.mark.parametrize(("x0", "score"), [(25, 0.6), (29, 0.9)])
def test_of_two_tiles_that_see_an_object_completely_the_one_with_the_larger_margin_is_used(x0, score):
    tiles = cut_tiles((40, 60), (40, 40), 0.5)  # from 0 and from 20 on
    mask = np.zeros((40, 60), bool)
    mask[10:20, x0 : x0 + 6] = True
    result = merge_tiles([found_in(tiles[0], (mask, 0.6)), found_in(tiles[1], (mask, 0.9))], (40, 60))
    assert result.scores.tolist() == pytest.approx([score])


def test_an_object_that_only_one_tile_finds_is_kept():
    cut = rectangle(5, 10, 40, 20)
    np.testing.assert_array_equal(merged([(cut, 0.6)], []).dense_masks(), [cut])
    whole = rectangle(32, 10, 34, 20)  # in the left tile's part
    np.testing.assert_array_equal(merged([], [(whole, 0.6)]).dense_masks(), [whole])


def test_a_fragment_of_an_object_that_another_tile_sees_better_is_dropped():
    for x0 in (28, 30):  # drawn up to the border of its tile, or not quite
        assert len(merged([], [(rectangle(x0, 20, 33, 30), 0.9)])) == 0
    sliver = rectangle(28, 20, 32, 30)
    whole = rectangle(10, 5, 31, 15)
    result = merged([(whole, 0.5)], [(sliver, 0.9)])
    np.testing.assert_array_equal(result.dense_masks(), [whole])
    assert merged([(whole, 0.5)], [(sliver, 0.9)], with_masks=False).boxes.tolist() == [[10, 5, 31, 15]]


def test_touching_objects_of_one_class_are_not_merged():
    for border in range(28, 41):  # along the seam
        first, second = rectangle(10, 5, border, 25), rectangle(border, 5, 60, 25)
        left = [(first, 0.9)] + [(second, 0.8)] * (border < 40)
        right = [(first, 0.7)] * (border > 28) + [(second, 0.6)]
        np.testing.assert_array_equal(np.sort(merged(left, right).boxes[:, 0]), [10, border])
    first, second = rectangle(10, 5, 60, 15), rectangle(10, 15, 60, 25)  # across it
    result = merged([(first, 0.9), (second, 0.8)], [(first, 0.7), (second, 0.6)])
    np.testing.assert_array_equal(result.dense_masks(), [first, second])


@pytest.mark.parametrize("border", [30, 33])
def test_touching_objects_of_which_each_tile_finds_one_are_not_merged(border):
    first, second = rectangle(10, 5, border, 25), rectangle(border - 1, 5, 60, 25)  # one pixel in common
    np.testing.assert_array_equal(merged([(first, 0.9)], [(second, 0.8)]).dense_masks(), [first, second])


def test_objects_that_one_tile_separates_are_not_merged():
    first, second = rectangle(10, 5, 60, 17), rectangle(10, 17, 60, 25)
    result = merged([(first, 0.9), (second, 0.5)], [(first | second, 0.7)])
    np.testing.assert_array_equal(
        result.dense_masks(), [rectangle(10, 5, 34, 17) | rectangle(34, 5, 60, 25), rectangle(10, 17, 40, 25)]
    )


def test_a_complete_object_is_not_merged_with_an_object_that_its_tile_has_split():
    whole, cut, around = rectangle(29, 0, 35, 10), rectangle(10, 20, 40, 34), rectangle(28, 0, 60, 36)
    result = merged([(whole, 0.9), (cut, 0.8)], [(around, 0.7)])
    np.testing.assert_array_equal(result.boxes, [[10, 20, 40, 34], [28, 0, 60, 36]])


def test_of_two_candidates_a_piece_is_merged_with_the_one_that_agrees_in_more_pixels():
    mask, half = rectangle(10, 10, 60, 20), rectangle(28, 10, 60, 15)
    for right in ([(half, 0.9), (mask, 0.8)], [(mask, 0.8), (half, 0.9)]):
        result = merged([(mask, 0.6)], right)
        np.testing.assert_array_equal(result.dense_masks(), [half, mask])


def test_a_merged_object_is_not_added_to_a_larger_one_around_it():
    mask, around = rectangle(10, 10, 60, 20), rectangle(28, 5, 60, 30)
    result = merged([(mask, 0.6)], [(mask, 0.8), (around, 0.5)])
    np.testing.assert_array_equal(result.dense_masks(), [mask, around])


def test_pieces_of_different_classes_are_not_merged():
    mask = rectangle(5, 10, 60, 20)
    result = merged([(mask, 0.6, 1)], [(mask, 0.9, 2)])
    assert result.names == ["class 2", "class 1"]
    np.testing.assert_array_equal(result.boxes[:, 0], [28, 5])


def test_an_object_that_one_tile_has_split_is_merged():
    bars = [rectangle(10, row, 50, row + 5) for row in (4, 14, 24)]
    comb = np.any(bars, axis=0) | rectangle(50, 4, 55, 29)
    result = merged([(bar, 0.9) for bar in bars], [(comb, 0.8)])
    np.testing.assert_array_equal(result.dense_masks(), [comb])


def test_small_objects_are_merged_even_if_their_outlines_differ_a_lot():
    result = merged([(rectangle(31, 10, 35, 14), 0.9)], [(rectangle(30, 9, 36, 15), 0.8)])  # 16 of 36 pixels
    assert len(result) == 1


def test_an_object_found_twice_in_one_of_two_tiles_is_merged():
    mask, copy = rectangle(10, 5, 60, 20), rectangle(10, 6, 60, 20)
    np.testing.assert_array_equal(merged([(mask, 0.9), (copy, 0.8)], [(mask, 0.7)]).dense_masks(), [mask])


def test_an_object_found_twice_in_a_single_tile_is_returned_twice_as_by_predict():
    mask = rectangle(10, 5, 25, 20)
    assert len(merged([(mask, 0.9), (mask, 0.8)], [])) == 2


def test_a_tile_may_have_more_pieces_than_pycocotools_can_measure_at_once():
    pieces = [(rectangle(x, y, x + 2, y + 2), 0.5) for x in range(0, 40, 2) for y in range(0, 28, 2)]
    assert len(merge_tiles([found_in(Tile(0, 0, 40, 40), *pieces)], (40, 40))) == 20 * 14


def test_an_instance_with_an_empty_mask_is_kept_if_its_box_is_in_the_cell_of_its_tile():
    empty = {"size": [40, 40], "counts": region_to_rle(np.zeros((1, 1), bool), 0, 0, (40, 40))["counts"]}
    tile, instances = found_in(LEFT, (rectangle(5, 5, 15, 15), 0.9), (rectangle(30, 5, 38, 15), 0.8))
    instances.masks = [empty, empty]
    result = merge_tiles([(tile, instances), found_in(RIGHT)], SIZE)
    assert result.boxes.tolist() == [[5, 5, 15, 15]]
    assert coco_mask.area(result.masks).tolist() == [0]


def test_a_piece_below_the_threshold_completes_an_object_above_it():
    left, right = rectangle(25, 10, 40, 20), rectangle(28, 10, 60, 20)  # the right piece is larger
    whole = rectangle(25, 10, 60, 20)
    result = merged([(left, 0.9)], [(right, 0.2)], threshold=0.5)
    np.testing.assert_array_equal(result.dense_masks(), [whole])
    assert result.boxes.tolist() == [[25, 10, 60, 20]]
    assert result.scores.tolist() == pytest.approx([0.9])
    np.testing.assert_array_equal(merged([(left, 0.9)], [], threshold=0.5).dense_masks(), [left])


def test_pieces_below_the_threshold_are_not_objects_of_their_own():
    crossing = rectangle(5, 10, 60, 20)
    assert len(merged([(crossing, 0.4)], [(crossing, 0.3)], threshold=0.5)) == 0
    assert len(merged([(rectangle(5, 5, 15, 15), 0.4)], [], threshold=0.5, with_masks=False)) == 0


@pytest.mark.parametrize("x1", [40, 38])
def test_a_piece_below_the_threshold_does_not_take_the_place_of_one_above_it(x1):
    upper, both = rectangle(10, 10, 60, 20), rectangle(10, 10, x1, 26)
    result = merged([(upper, 0.8), (both, 0.2)], [(upper, 0.9), (both | upper, 0.3)], threshold=0.5)
    np.testing.assert_array_equal(result.dense_masks(), [upper])


def test_tiles_without_instances_give_no_instances():
    for with_masks in (True, False):
        result = merged([], [], with_masks=with_masks)
        assert len(result) == 0
        assert result.image_size == SIZE
        assert result.dense_masks().shape == (0, *SIZE)
        assert (result.masks is None) == (not with_masks)


# -- putting together, by an oracle ----------------------------------------------------------------------------------


class Scene:
    """Objects that do not overlap, placed where tiles meet; `owner` has the number of the object of each pixel."""

    def __init__(self, image_size, tile_size, overlap, seed):
        self.rng = np.random.default_rng(seed)
        self.tiles = cut_tiles(image_size, (tile_size, tile_size), overlap)
        self.owner = np.zeros(image_size, np.int16)
        self.labels = []
        self.side = tile_size
        # Where each tile but the first begins, and where the one before it ends, along y and x.
        self.zones = []
        for axis in (0, 1):
            starts = sorted({tile[axis] for tile in self.tiles})
            self.zones.append([(start, previous + tile_size) for previous, start in itertools.pairwise(starts)])

    def add(self, *shapes):
        """Shapes (function of y and x, extent) of one class, all of them or none; whether there was room."""
        taken = []
        for inside, (top, left, bottom, right) in shapes:
            if top < 0 or left < 0 or bottom > self.owner.shape[0] or right > self.owner.shape[1]:
                return False
            y, x = np.ogrid[top:bottom, left:right]
            area, mask = np.s_[top:bottom, left:right], np.broadcast_to(inside(y, x), (bottom - top, right - left))
            if self.owner[area][mask].any():
                return False
            taken.append((area, mask))
        label = int(self.rng.integers(3))
        for area, mask in taken:
            self.labels.append(label)
            self.owner[area][mask] = len(self.labels)
        return True

    def fill(self):
        """Every hard case several times where there is room, then others at random."""
        kinds = [self.large, self.bar, self.corner, self.along, self.across, self.sliver, self.small]
        for kind in kinds:
            placed = itertools.islice((True for _ in range(400) if self.add(*kind())), 4)
            assert sum(placed) >= 2, kind.__name__
        for _ in range(60):
            y, x = (int(self.rng.integers(length)) for length in self.owner.shape)
            self.add(ellipse(y, x, *self.rng.integers(45, 100, 2)))

    def seam(self, axis):
        low, high = self.zones[axis][self.rng.integers(len(self.zones[axis]))]
        return low, (low + high) // 2, high

    def somewhere(self, axis):
        return int(self.rng.integers(self.owner.shape[axis]))

    def large(self):
        return [ellipse(self.somewhere(0), self.somewhere(1), int(0.7 * self.side), int(0.55 * self.side))]

    def bar(self):
        top, left = self.somewhere(0), self.somewhere(1) // 2
        return [box(top, left, top + 90, left + int(1.8 * self.side))]

    def corner(self):
        return [ellipse(self.seam(0)[1], self.seam(1)[1], *self.rng.integers(60, 110, 2))]

    def along(self):
        low, middle, high = self.seam(1)
        top, x = self.somewhere(0), int(self.rng.choice([low + 1, low + 4, middle, high - 4, high - 1]))
        return [box(top, x - 120, top + 160, x), box(top, x, top + 160, x + 120)]

    def across(self):
        top, x = self.somewhere(0), self.seam(1)[1]
        return [box(top, x - 120, top + 100, x + 120), box(top + 100, x - 120, top + 200, x + 120)]

    def sliver(self):
        low, _, _ = self.seam(1)
        top, x = self.somewhere(0), low + int(self.rng.integers(1, 20))
        return [box(top, x - 110, top + 110, x)]

    def small(self):
        low, middle, high = self.seam(1)
        radius = min((high - low) // 2 - 6, 70)
        return [ellipse(self.somewhere(0), middle, radius + 10, radius)]

    def found(self, tile, missed=()):
        """What an oracle that does not draw well finds in a tile."""
        view = self.owner[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        pieces = []
        for number, where in enumerate(ndimage.find_objects(view), start=1):
            if where is None or number in missed:
                continue
            where = tuple(slice(max(0, side.start - 2), side.stop + 2) for side in where)
            mask = self.jittered(view[where] == number)
            if np.count_nonzero(mask) >= 12:
                pieces.append((mask, where, number))
        size = (tile.height, tile.width)
        masks = [region_to_rle(mask, where[0].start, where[1].start, size) for mask, where, _ in pieces]
        x, y, width, height = np.array(coco_mask.toBbox(masks) if masks else np.zeros((0, 4))).T
        labels = np.array([self.labels[number - 1] for *_, number in pieces], np.int64)
        scores = self.rng.uniform(0.5, 1, len(masks)).astype(np.float32)
        boxes = np.stack([x, y, x + width, y + height], axis=1).astype(np.float32)
        return tile, Instances(boxes, scores, labels, [f"class {label}" for label in labels], masks, size)

    def jittered(self, mask):
        """The outline moved in or out by up to 2 pixels (1 of small ones), another way every 16 pixels."""
        most = 2 if mask.size > 40_000 else 1
        cells = self.rng.integers(-most, most + 1, [side // 16 + 1 for side in mask.shape])
        shift = cells.repeat(16, 0).repeat(16, 1)[: mask.shape[0], : mask.shape[1]]
        moved = mask & (shift == 0)
        for step in range(1, most + 1):
            moved |= ndimage.binary_dilation(mask, iterations=step) & (shift == step)
            moved |= ndimage.binary_erosion(mask, iterations=step) & (shift == -step)
        return moved

    def truth(self):
        return [
            region_to_rle(self.owner[where] == number, where[0].start, where[1].start, self.owner.shape)
            for number, where in enumerate(ndimage.find_objects(self.owner), start=1)
        ]


def ellipse(y, x, ry, rx):
    extent = (y - ry, x - rx, y + ry, x + rx)
    return lambda rows, columns: ((rows - y) / ry) ** 2 + ((columns - x) / rx) ** 2 < 1, extent


def box(top, left, bottom, right):
    return lambda rows, columns: (rows == rows) & (columns == columns), (top, left, bottom, right)


def check(result, scene):
    truth = scene.truth()
    overlaps = coco_mask.iou(truth, result.masks, [0] * len(result))
    partner = overlaps.argmax(1)
    assert len(result) == len(truth)
    assert sorted(partner) == list(range(len(truth)))
    assert overlaps.max(1).min() >= 0.95
    assert result.labels[partner].tolist() == scene.labels
    x, y, width, height = coco_mask.toBbox(truth).T
    np.testing.assert_allclose(result.boxes[partner], np.stack([x, y, x + width, y + height], axis=1), atol=3)
    assert (np.diff(result.scores) <= 0).all()


@pytest.mark.parametrize(
    ("image_size", "tile_size", "overlap"),
    [
        ((3000, 4000), 384, 0.2),
        ((3000, 4000), 624, 0.15),
        ((1500, 2100), 432, 0.5),
    ],
)
def test_every_object_of_a_large_image_is_found_once_with_an_accurate_mask(image_size, tile_size, overlap):
    scene = Scene(image_size, tile_size, overlap, seed=tile_size)
    scene.fill()
    assert len(scene.labels) >= 40
    check(merge_tiles([scene.found(tile) for tile in scene.tiles], image_size), scene)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("tile_size", "overlap"), [(312, 0.3), (384, 0.2), (504, 0.25), (624, 0.15), (768, 0.5)])
def test_every_object_is_found_once_for_many_sizes_and_seeds(tile_size, overlap, seed):
    image_size = (3000 - 37 * seed, 4000 - 91 * seed)
    scene = Scene(image_size, tile_size, overlap, seed)
    scene.fill()
    check(merge_tiles([scene.found(tile) for tile in scene.tiles], image_size), scene)


@pytest.mark.parametrize("image_size", [(300, 1500), (1500, 300), (300, 350)])
def test_an_image_may_have_one_row_or_column_of_tiles_or_a_single_tile(image_size):
    scene = Scene(image_size, 384, 0.2, seed=1)
    for _ in range(40):
        scene.add(ellipse(scene.somewhere(0), scene.somewhere(1), *scene.rng.integers(40, 70, 2)))
    assert len(scene.labels) >= 2
    check(merge_tiles([scene.found(tile) for tile in scene.tiles], image_size), scene)


def test_an_object_is_found_if_all_but_one_of_several_tiles_miss_it():
    scene = Scene((1500, 2100), 432, 0.5, seed=2)
    whole = {}
    while len(scene.labels) < 25:
        y, x = scene.somewhere(0), scene.somewhere(1)
        if scene.add(ellipse(y, x, 50, 50)):
            whole[len(scene.labels)] = [
                tile
                for tile in scene.tiles
                if tile.top + 60 <= y <= tile.top + 372 and tile.left + 60 <= x <= tile.left + 372
            ]
    assert max(len(tiles) for tiles in whole.values()) >= 4
    chosen = {number: tiles[scene.rng.integers(len(tiles))] for number, tiles in whole.items() if tiles}
    missed = {tile: [number for number, finder in chosen.items() if finder != tile] for tile in scene.tiles}
    found = [scene.found(tile, missed[tile]) for tile in scene.tiles]
    check(merge_tiles(found, (1500, 2100)), scene)


def test_no_object_is_lost_if_its_class_changes_between_tiles():
    scene = Scene((900, 1200), 384, 0.2, seed=3)
    for _ in range(30):
        scene.add(ellipse(scene.somewhere(0), scene.somewhere(1), *scene.rng.integers(50, 90, 2)))
    found = []
    for tile in scene.tiles:
        _, instances = scene.found(tile)
        instances.labels[:] = scene.rng.integers(3, size=len(instances))
        found.append((tile, instances))
    result = merge_tiles(found, (900, 1200))
    assert len(result) >= len(scene.labels)
    best = coco_mask.iou(scene.truth(), result.masks, [1] * len(result)).max(1)
    assert best.min() > 0.4


@pytest.mark.long
def test_twenty_thousand_pieces_are_merged():
    image_size = (6000, 9000)
    mask = np.zeros(image_size, bool)
    for row in range(70):
        for column in range(105):
            mask[row * 85 + 20 : row * 85 + 50, column * 85 + 20 : column * 85 + 50] = True
    found = []
    for tile in cut_tiles(image_size, (384, 384), 0.5):
        view, _ = ndimage.label(mask[tile.top : tile.top + 384, tile.left : tile.left + 384])
        masks = [
            region_to_rle(view[where] == number, where[0].start, where[1].start, (384, 384))
            for number, where in enumerate(ndimage.find_objects(view), start=1)
        ]
        x, y, width, height = coco_mask.toBbox(masks).T
        boxes = np.stack([x, y, x + width, y + height], axis=1).astype(np.float32)
        count = len(masks)
        scores, labels = np.ones(count, np.float32), np.zeros(count, np.int64)
        found.append((tile, Instances(boxes, scores, labels, ["square"] * count, masks, (384, 384))))
    assert sum(len(instances) for _, instances in found) > 20_000
    result = merge_tiles(found, image_size)
    assert len(result) == 70 * 105
    assert {int(coco_mask.area(mask)) for mask in result.masks} == {900}


# -- with a model ----------------------------------------------------------------------------------------------------


def model_and_processor(kind=SEGMENTATION):
    """A small model for 48 pixels whose scores lie around a half."""
    model = small_model(kind)
    with torch.no_grad():
        model.class_embed.bias.add_(4.0)
    return model, RfDetrImageProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def photo():
    return draw_scene(seed=1)[0].resize((120, 100))


def same(found, expected, atol=1e-4):
    np.testing.assert_allclose(found.scores, expected.scores, atol=atol)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=100 * atol)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.names == expected.names
    assert found.image_size == expected.image_size
    assert (found.masks is None) == (expected.masks is None)
    assert (found.dense_masks() != expected.dense_masks()).mean() < 1e-3 if found.masks else True


@pytest.mark.parametrize("kind", [SEGMENTATION, DETECTION])
def test_an_image_of_one_tile_has_the_instances_of_predict(kind, photo):
    model, processor = model_and_processor(kind)
    small = photo.resize((48, 48))
    [expected] = predict(model, processor, small, threshold=0.0)
    found = predict_tiled(model, processor, small, threshold=0.0)
    assert len(found) == 6
    assert found.boxes.tolist() == expected.boxes.tolist()
    assert found.masks == expected.masks
    same(found, expected, atol=0)


@pytest.mark.parametrize("kind", [SEGMENTATION, DETECTION])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_instances_of_a_large_image_are_those_of_its_tiles_merged(kind, batch_size, photo):
    model, processor = model_and_processor(kind)
    tiles = cut_tiles((100, 120), (48, 48), 0.25)
    assert len(tiles) == 3 * 3
    crops = [photo.crop((t.left, t.top, t.left + 48, t.top + 48)) for t in tiles]
    found = predict(model, processor, crops, threshold=0.1)
    expected = merge_tiles(list(zip(tiles, found, strict=True)), (100, 120), 0.4)
    found = predict_tiled(model, processor, photo, overlap=0.25, threshold=0.4, batch_size=batch_size)
    assert len(expected) > 0
    same(found, expected)


def test_the_tile_size_is_the_input_size_of_the_model(photo, monkeypatch):
    model, processor = model_and_processor()
    sizes = []
    stage = model.predict_stage
    monkeypatch.setattr(model, "predict_stage", lambda pixels, mask: sizes.append(pixels.shape) or stage(pixels, mask))
    predict_tiled(model, processor, photo, tile=(72, 96), overlap=0)
    assert sizes == [(4, 3, 72, 96)]
    assert processor.size == {"height": 48, "width": 48}


def test_an_illegal_tile_size_is_rounded_up_with_a_warning(photo, hf_log):
    model, processor = model_and_processor()
    expected = predict_tiled(model, processor, photo, tile=(72, 48), threshold=0.4)
    same(predict_tiled(model, processor, photo, tile=(50, 48), threshold=0.4), expected)
    assert re.search(r"tile.*\(50, 48\).*\(72, 48\).*24", hf_log.text)


def test_tiles_are_cut_one_batch_at_a_time(photo, monkeypatch):
    model, processor = model_and_processor()
    sizes = []
    stage = model.predict_stage
    monkeypatch.setattr(model, "predict_stage", lambda pixels, mask: sizes.append(len(pixels)) or stage(pixels, mask))
    predict_tiled(model, processor, photo, overlap=0.25, batch_size=4, threshold=0.9)
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize("with_masks", [True, False])
def test_an_image_smaller_than_a_tile_is_padded_with_the_mean_and_results_are_clipped(with_masks, photo, monkeypatch):
    def find(model, processor, crops, **_):
        cut.extend(crops)
        masks = np.zeros((4, 48, 48), bool)
        masks[0, 20:45, 20:40] = masks[1, 2:9, 3:7] = masks[2, :, 30:] = masks[3, 41:, :] = True
        boxes = np.array([[20.5, 20, 40, 45], [3, 2, 7, 9], [30, 0, 48, 48], [0, 41, 48, 48]], np.float32)
        rles = [region_to_rle(mask, 0, 0, (48, 48)) for mask in masks] if with_masks else None
        scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
        return [Instances(boxes, scores, np.arange(4), list("abcd"), rles, (48, 48))]

    cut = []
    model, processor = model_and_processor()
    small = photo.resize((30, 41))
    monkeypatch.setattr("transformers_rfdetr.inference.tiling.predict", find)
    found = predict_tiled(model, processor, small)
    assert found.image_size == (41, 30)
    assert found.names == ["a", "b"]
    assert found.boxes.tolist() == [[20.5, 20, 30, 41], [3, 2, 7, 9]]
    if with_masks:
        expected = np.zeros((2, 41, 30), bool)
        expected[0, 20:41, 20:30] = expected[1, 2:9, 3:7] = True
        np.testing.assert_array_equal(found.dense_masks(), expected)
    filled = np.broadcast_to(np.array([0.485, 0.456, 0.406])[:, None, None], (3, 48, 48)).copy()
    filled[:, :41, :30] = np.asarray(small).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(cut[0].numpy(), filled, atol=1e-6)


def test_all_forms_of_an_image_give_the_same_instances(photo, tmp_path):
    model, processor = model_and_processor()
    photo.save(tmp_path / "image.png")
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    array = np.asarray(photo)
    forms = [
        tmp_path / "image.png",
        str(tmp_path / "turned.png"),
        array,
        array[::-1, ::-1].copy()[::-1, ::-1],
        array.astype(np.float32) / 255,
        array.astype(np.uint16) * 257,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    expected = predict_tiled(model, processor, photo, threshold=0.4)
    assert len(expected) > 3
    for form in forms:
        same(predict_tiled(model, processor, form, threshold=0.4), expected)


def test_an_image_with_16_bits_is_not_reduced_to_8(tmp_path):
    values = np.random.default_rng(0).integers(0, 500, (70, 90)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    model, processor = model_and_processor()
    same(
        predict_tiled(model, processor, tmp_path / "deep.png", threshold=0.0),
        predict_tiled(model, processor, values / np.float32(65535), threshold=0.0),
    )


def test_a_narrow_image_is_not_taken_for_channels():
    model, processor = model_and_processor()
    narrow = np.random.default_rng(0).integers(0, 256, (60, 3, 3), np.uint8)
    assert predict_tiled(model, processor, Image.fromarray(narrow), threshold=0.0).image_size == (60, 3)


def test_a_model_compiled_for_the_tile_size_finds_the_same_instances(photo):
    model, processor = model_and_processor()
    fast = compile_for_inference(model, batch_size=2, compiled=False)
    expected = predict_tiled(model, processor, photo, threshold=0.4)
    same(predict_tiled(fast, processor, photo, threshold=0.4), expected)
    assert predict_tiled(fast, processor, photo.resize((30, 30)), threshold=0.4).image_size == (30, 30)


def test_only_the_given_classes_are_predicted(photo):
    model, processor = model_and_processor()
    names = set(predict_tiled(model, processor, photo, threshold=0.4).names)
    assert len(names) > 1
    name = min(names)
    assert set(predict_tiled(model, processor, photo, threshold=0.4, classes=[name]).names) == {name}


def test_a_progress_bar_is_shown_on_request(photo, capsys):
    model, processor = model_and_processor()
    predict_tiled(model, processor, photo, threshold=0.9)
    assert "Tiles" not in capsys.readouterr().err
    predict_tiled(model, processor, photo, threshold=0.9, progress=True)
    assert "Tiles: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 0.6}, r"overlap.*\[0, 0\.5\], got 0\.6"),
        ({"overlap": -0.1}, r"overlap.*\[0, 0\.5\], got -0\.1"),
        ({"overlap": float("nan")}, r"overlap.*\[0, 0\.5\], got nan"),
        ({"batch_size": 0}, "batch_size.* got 0"),
        ({"threshold": 2}, r"threshold.*\[0, 1\], got 2"),
        ({"tile": "large"}, "tile.*'large'"),
        ({"tile": (48, 0)}, r"tile.*\(48, 0\)"),
        ({"image": "missing.png"}, r"missing\.png cannot be opened as an image"),
        ({"image": [1, 2]}, "image.*list"),
        ({"image": np.zeros((0, 9, 3), np.uint8)}, r"pixel.*got shape \(3, 0, 9\)"),
        ({"image": np.full((60, 60, 3), 7.0)}, r"pixels.*\[7, 7\]"),
    ],
)
def test_invalid_arguments_are_refused(settings, message, photo):
    model, processor = model_and_processor()
    with pytest.raises(ValueError, match=message):
        predict_tiled(model, processor, **({"image": photo} | settings))


# -- at full size ----------------------------------------------------------------------------------------------------

MEMORY = """
import json, re
from pathlib import Path
import numpy as np
import torch
from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor, predict
from transformers_rfdetr.inference.tiling import predict_tiled

def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.manual_seed(0)
model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano")).eval()
processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
loaded = memory("VmRSS")
image = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8)
scores = predict(model, processor, image[:312, :312], threshold=0.0)[0].scores
found = predict_tiled(model, processor, image, threshold=float(scores[12]))
print(json.dumps({"MiB": memory("VmHWM") - loaded, "found": len(found)}))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux")
def test_an_image_of_12_megapixels_needs_less_than_500_mib_besides_the_model():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    numbers = json.loads(re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)[0])
    assert numbers["found"] > 100
    assert numbers["MiB"] < 500


def recall_and_precision(found, annotations):
    """Of objects and of instances the part with a partner of IoU 0.5, over all images."""
    hits = [0, 0, 0, 0]
    for instances, objects in zip(found, annotations, strict=True):
        size = instances.image_size
        truth = []
        for item in objects:
            shape = item["segmentation"]
            polygons = isinstance(shape, list)
            truth.append(coco_mask.merge(coco_mask.frPyObjects(shape, *size)) if polygons else shape)
        overlaps = np.zeros((len(truth), len(instances)))
        if truth and len(instances):
            overlaps = np.array(coco_mask.iou(truth, instances.masks, [0] * len(instances)))
        hits[0] += (overlaps > 0.5).any(1).sum()
        hits[1] += len(truth)
        hits[2] += (overlaps > 0.5).any(0).sum()
        hits[3] += len(instances)
    return hits[0] / hits[1], hits[2] / max(1, hits[3])


@pytest.mark.long
def test_recall_in_tiles_is_that_of_images_of_the_size_of_a_tile(tmp_path):
    from transformers_rfdetr.cli import demo

    assert demo.main(["--output", str(tmp_path), "--steps", "300", "--validation", "16"]) == 0
    model = RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "model").eval()
    processor = RfDetrImageProcessor.from_pretrained(tmp_path / "model")

    def images_and_truth(first_seed, count, size):
        scenes = [draw_scene(first_seed + 10 * index, size, metres_per_pixel=0.5) for index in range(count)]
        return [image for image, _ in scenes], [annotations for _, annotations in scenes]

    small, small_truth = images_and_truth(2_000_000, 60, (96, 96))
    large, large_truth = images_and_truth(3_000_000, 6, (420, 500))
    recall, precision = recall_and_precision(predict(model, processor, small, threshold=0.4), small_truth)
    tiled = [predict_tiled(model, processor, image, overlap=0.3, threshold=0.4) for image in large]
    tiled_recall, tiled_precision = recall_and_precision(tiled, large_truth)
    untiled_recall, _ = recall_and_precision(predict(model, processor, large, threshold=0.4), large_truth)
    assert recall > 0.3
    assert tiled_recall >= recall - 0.05
    assert tiled_recall > untiled_recall
    assert tiled_precision >= precision - 0.15
