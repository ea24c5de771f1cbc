"""Merging the instances of tiles: cases by hand, and scenes of which an oracle finds the objects in each tile."""

import itertools

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage

from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.inference.tile_merging import Tile, merge_tiles
from transformers_rfdetr.inference.tiling import cut_tiles
from transformers_rfdetr.model.masks import region_to_rle

# -- by hand ---------------------------------------------------------------------------------------------------------

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


def test_a_piece_below_the_threshold_does_not_change_an_object_that_another_tile_sees_completely():
    complete, larger = rectangle(20, 10, 34, 20), rectangle(28, 10, 46, 20)
    result = merged([(complete, 0.9)], [(larger, 0.2)], threshold=0.5)
    np.testing.assert_array_equal(result.dense_masks(), [complete])


def test_pieces_below_the_threshold_are_not_objects_of_their_own():
    crossing = rectangle(5, 10, 60, 20)
    assert len(merged([(crossing, 0.4)], [(crossing, 0.3)], threshold=0.5)) == 0
    assert len(merged([(rectangle(5, 5, 15, 15), 0.4)], [], threshold=0.5, with_masks=False)) == 0


@pytest.mark.parametrize("x1", [40, 38])
def test_a_piece_below_the_threshold_does_not_take_the_place_of_one_above_it(x1):
    upper, both = rectangle(10, 10, 60, 20), rectangle(10, 10, x1, 26)
    result = merged([(upper, 0.8), (both, 0.2)], [(upper, 0.9), (both | upper, 0.3)], threshold=0.5)
    np.testing.assert_array_equal(result.dense_masks(), [upper])


def test_a_piece_below_the_threshold_does_not_separate_an_object_found_twice():
    mask, copy, larger = rectangle(10, 5, 60, 20), rectangle(10, 6, 60, 20), rectangle(28, 4, 60, 21)
    result = merged([(mask, 0.9), (copy, 0.8)], [(mask, 0.7), (larger, 0.2)], threshold=0.5)
    np.testing.assert_array_equal(result.dense_masks(), [mask])


def test_pieces_below_the_threshold_never_add_an_object():
    def piece(rng, low, score):
        x, y, width, height = rng.integers([low, 0, 3, 3], [low + 36, 30, 50, 20]).tolist()
        return rectangle(x, y, x + width, y + height), score

    for seed in range(150):
        rng = np.random.default_rng(seed)
        sides = [[piece(rng, low, score) for score in (0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1)] for low in (0, 28)]
        alone = merged(*(side[:4] for side in sides), threshold=0.5)
        assert len(merged(*sides, threshold=0.5)) <= len(alone)


def test_tiles_without_instances_give_no_instances():
    for with_masks in (True, False):
        result = merged([], [], with_masks=with_masks)
        assert len(result) == 0
        assert result.image_size == SIZE
        assert result.dense_masks().shape == (0, *SIZE)
        assert (result.masks is None) == (not with_masks)


# -- by an oracle ----------------------------------------------------------------------------------------------------


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
