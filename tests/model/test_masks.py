"""Polygons, RLE, bitmaps and mask logits; the oracle is pycocotools, or torch for upsampling."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from transformers_rfdetr.model.masks import (
    box_and_area,
    mask_areas,
    rasterize,
    read_segmentation,
    region_to_rle,
    upsample_masks,
)

SIZE = (10, 12)  # height, width
SQUARE = [3, 2, 7, 2, 7, 5, 3, 5]  # columns 3..6, rows 2..4


def square_mask():
    mask = np.zeros(SIZE, bool)
    mask[2:5, 3:7] = True
    return mask


def blob(size, seed):
    """A ragged region with holes, several parts and pixels at every edge."""
    return np.random.default_rng(seed).random(size) > 0.5


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def runs_of(mask):
    """Uncompressed counts, by walking the columns."""
    runs, last = [0], 0
    for value in mask.T.ravel().tolist():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return runs


def read_and_draw(segmentation, size=SIZE, output_size=None):
    return rasterize([read_segmentation(segmentation, size)], size, output_size or size)[0]


class TestEveryEncoding:
    @pytest.mark.parametrize(
        "segmentation",
        [
            [SQUARE],
            SQUARE,
            [np.array(SQUARE)],
            np.array([SQUARE], dtype=np.float32),
            [torch.tensor(SQUARE)],
            [[float(value) for value in SQUARE], [1.0, 2.0], []],
            encode(square_mask()),
            {"size": SIZE, "counts": encode(square_mask())["counts"].decode()},
            {"size": np.array(SIZE), "counts": runs_of(square_mask())},
            square_mask(),
            square_mask().astype(np.uint8) * 255,
            torch.from_numpy(square_mask()),
            square_mask().astype(int).tolist(),
            square_mask().tolist(),
        ],
    )
    def test_of_one_square_gives_one_mask(self, segmentation):
        np.testing.assert_array_equal(read_and_draw(segmentation), square_mask())

    def test_polygons_of_one_object_are_united_as_coco_does(self):
        polygons = [[0.0, 0, 6, 0, 6, 6, 0, 6], [2.0, 2, 4, 2, 4, 4, 2, 4], [8.0, 8, 12, 8, 12, 10, 8, 10]]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE)))
        np.testing.assert_array_equal(read_and_draw(polygons), expected)
        assert expected[3, 3] == 1  # a polygon inside another one is no hole
        assert expected[9, 9] == 1

    def test_polygons_are_scaled_and_drawn_straight_at_the_output_size(self):
        polygon = [1.3, 0.7, 10.9, 2.2, 6.1, 9.8]
        scaled = (np.array(polygon).reshape(-1, 2) * [48 / 12, 25 / 10]).ravel().tolist()
        expected = coco_mask.decode(coco_mask.frPyObjects([scaled], 25, 48))[..., 0]
        np.testing.assert_array_equal(read_and_draw([polygon], SIZE, (25, 48)), expected)

    @pytest.mark.parametrize("output_size", [(10, 12), (5, 6), (20, 24), (7, 31), (1, 1), (432, 432)])
    def test_rle_and_bitmaps_are_resized_around_pixel_centres(self, output_size):
        mask = blob(SIZE, 1)
        expected = (
            F.interpolate(torch.from_numpy(mask)[None, None].float(), output_size, mode="nearest-exact")[0, 0] > 0
        )
        for segmentation in (encode(mask), mask):
            np.testing.assert_array_equal(read_and_draw(segmentation, SIZE, output_size), expected.numpy())

    @pytest.mark.parametrize("source", [101, 333, 427, 640, 1023])
    def test_nearest_takes_torch_s_pixels_at_awkward_ratios(self, source):
        mask = blob((source, 3), source)
        for target in (78, 108, 312, 432, 999):
            expected = (
                F.interpolate(torch.from_numpy(mask)[None, None].float(), (target, 3), mode="nearest-exact")[0, 0] > 0
            )
            np.testing.assert_array_equal(read_and_draw(mask, mask.shape, (target, 3)), expected.numpy())

    def test_many_objects_keep_their_order(self):
        shapes = [read_segmentation(item, SIZE) for item in ([SQUARE], blob(SIZE, 3), [[0, 0, 5, 0, 5, 5]])]
        masks = rasterize(shapes, SIZE, SIZE)
        assert masks.shape == (3, 10, 12)
        assert masks.dtype == bool
        np.testing.assert_array_equal(masks[1], blob(SIZE, 3))
        assert rasterize([], SIZE, (4, 5)).shape == (0, 4, 5)

    def test_box_and_area_are_pycocotools(self):
        assert box_and_area(read_segmentation([SQUARE], SIZE), SIZE) == ([3.0, 2.0, 4.0, 3.0], 12.0)
        assert box_and_area(read_segmentation(square_mask(), SIZE), SIZE) == ([3.0, 2.0, 4.0, 3.0], 12.0)


class TestNestedLists:
    def test_of_zeros_and_ones_at_the_image_s_size_are_a_bitmap(self):
        rows = [[0, 1, 1, 0, 0, 1]] * 2  # two polygons of an image of any other size
        np.testing.assert_array_equal(read_and_draw(rows, (2, 6)), np.array(rows, bool))
        assert isinstance(read_segmentation(rows, (20, 60)), list)

    def test_of_equally_long_polygons_stay_polygons(self):
        polygons = [[0, 0, 4, 0, 4, 4], [5, 5, 9, 5, 9, 9], [0, 5, 4, 5, 4, 9]]
        assert len(read_segmentation(polygons, SIZE)) == 3

    def test_of_one_or_two_polygons_stay_polygons_at_the_image_s_size_too(self):
        assert len(read_segmentation([[0, 0, 4, 0, 4, 2], [1, 0, 5, 0, 5, 2]], (2, 6))) == 2

    @pytest.mark.parametrize("polygons", [[[0.0, 0, 255, 0, 255, 254]] * 3, [[0, 0, 255, 0, 255, 255]] * 2])
    def test_of_polygons_along_the_edges_of_the_image_stay_polygons(self, polygons):
        assert len(read_segmentation(polygons, (255, 255))) == len(polygons)


class TestAnotherSizeThanTheImage:
    LABELS = np.random.default_rng(0).integers(0, 5, (12, 10), dtype=np.uint8)

    @pytest.mark.parametrize(
        ("bitmap", "size"),
        [
            ([[0, 1, 1, 0, 0, 1]] * 5, "5x6"),
            ([[0, 255, 255, 0, 0, 255]] * 5, "5x6"),
            ([[False, True] * 3] * 5, "5x6"),
            (np.ones((12, 10), bool), "12x10"),
            (np.zeros((12, 10), bool), "12x10"),
            (np.zeros((12, 10), np.uint8), "12x10"),
            (np.full((12, 10), 255, np.uint8), "12x10"),
            (np.full((12, 10), 255), "12x10"),
            (np.full((2, 6), 255, np.uint8), "2x6"),
            (torch.full((12, 10), 255, dtype=torch.uint8), "12x10"),
            (torch.ones(1, 10, dtype=torch.bool), "1x10"),
            (LABELS, "12x10"),
            (torch.from_numpy(LABELS), "12x10"),
            (LABELS.astype(np.int8), "12x10"),
        ],
    )
    def test_makes_a_bitmap_or_a_label_map_an_error(self, bitmap, size):
        with pytest.raises(ValueError, match=f"image's size 10x12.*got {size}"):
            read_segmentation(bitmap, SIZE)

    def test_such_as_turned_by_a_quarter_makes_a_photograph_s_bitmap_an_error(self):
        mask = np.zeros((640, 480), np.uint8)
        mask[100:200, 50:70] = 255
        for bitmap in (mask, torch.from_numpy(mask), mask.tolist(), mask // 255, (mask // 255).tolist(), mask > 0):
            with pytest.raises(ValueError, match=r"image's size 480x640.*got 640x480"):
                read_segmentation(bitmap, (480, 640))


class TestNothingEnclosed:
    @pytest.mark.parametrize(
        "segmentation",
        [
            *(
                None,
                [],
                [[]],
                [[], []],
                [[1, 2]],
                [[1, 2, 3, 4]],
                [[1, 2], [3, 4]],
                [[1, 2, 3, 4]] * 3,
                np.zeros(0),
                np.zeros(SIZE, bool),
            ),
            *({"size": SIZE, "counts": [120]}, encode(np.zeros(SIZE)), np.zeros(SIZE, int).tolist()),
        ],
    )
    def test_is_none(self, segmentation):
        assert read_segmentation(segmentation, SIZE) is None

    @pytest.mark.parametrize(
        "polygon",
        [[0, 0, 10, 0, 5, 0], [-20, -20, -10, -20, -10, -10], [50, 50, 60, 50, 60, 60], [3, 20, 9, 20, 9, 30], [0] * 6],
    )
    def test_shows_when_a_flat_or_outlying_polygon_is_drawn(self, polygon):
        assert not read_and_draw([polygon]).any()


class TestWhatCannotBeRead:
    @pytest.mark.parametrize(
        ("segmentation", "message"),
        [
            ([[1, 2, 3, 4, 5]], "polygon 0.* 5 coordinates"),
            ([[1, 2, 3, 4, 5, 6, 7]], "7 coordinates"),
            ([SQUARE, [1, 2, 3]], "polygon 1.* 3 coordinates"),
            ([[1, 2, 3, 4, 5, float("nan")]], "finite coordinates"),
            ([[1, 2, 3, 4, 5, float("inf")]], "finite coordinates"),
            ([[1, 2, 3, 4, 5, 1e9]], "below 1e6"),
            ([["1", "2", "3", "4", "5", "6"]], "flat list of numbers"),
            ([[1, 2, 3, 4, 5, None]], "flat list of numbers"),
            ([[[1, 2], [3, 4], [5, 6]]], "flat list of numbers"),
            ([[1, [2], 3, 4, 5, 6]], "flat list of numbers"),
            ([[True, False, True, True, False, True]], "flat list of numbers"),
            ([[1, 2], [3, 2], [3, 4]], "3 pairs"),
            ("square", "a segmentation must be polygons"),
            (7, "a segmentation must be polygons"),
            (np.array(7), "a segmentation must be polygons"),
            ({}, "'size' and 'counts'"),
            ({"counts": [120]}, r"\[\'counts\'\]"),
            ({"size": [12, 10], "counts": [120]}, r"size must be \[10, 12\].*got \[12, 10\]"),
            ({"size": SIZE, "counts": [100]}, "the sum 10 x 12 = 120"),
            ({"size": SIZE, "counts": []}, "the sum"),
            ({"size": SIZE, "counts": [5, -5, 120]}, "must be runs"),
            ({"size": SIZE, "counts": [60.5, 59.5]}, "must be runs"),
            ({"size": SIZE, "counts": [2**62] * 4 + [120]}, "must be runs"),  # 120 after 64 bits have wrapped around
            ({"size": SIZE, "counts": [[60, 60]]}, "must be runs"),
            ({"size": SIZE, "counts": None}, "must be runs"),
            ({"size": SIZE, "counts": ""}, "must be runs"),
            ({"size": SIZE, "counts": "zz"}, "must be runs"),
            ({"size": SIZE, "counts": "\xff\xfe"}, "must be runs"),
            ({"size": SIZE, "counts": "o" * 40}, "must be runs"),
            ({"size": SIZE, "counts": encode(square_mask())["counts"][:3]}, "Encode the mask again"),
            (np.arange(120).reshape(SIZE), "0 and 1"),
            (np.full(SIZE, 0.5), "0 and 1"),
            (square_mask() * 2, "0 and 1"),
            (np.full(SIZE, np.nan), "0 and 1"),
            (np.ones((2, *SIZE)), "flat list of numbers"),
        ],
    )
    def test_raises_with_value_and_rule(self, segmentation, message):
        with pytest.raises(ValueError, match=message):
            read_segmentation(segmentation, SIZE)

    def test_is_found_in_every_damaged_rle_string_before_pycocotools_reads_it(self):
        random = np.random.default_rng(0)
        counts = encode(blob((40, 30), 5))["counts"]
        for _ in range(300):
            damaged = bytearray(counts)
            damaged[random.integers(len(damaged))] = random.integers(48, 112)
            try:
                shape = read_segmentation({"size": [40, 30], "counts": bytes(damaged)}, (40, 30))
            except ValueError:
                continue
            # Whatever still adds up is a mask of the image: its runs encode to themselves.
            mask = coco_mask.decode(shape)
            assert sum(runs_of(mask)) == 40 * 30
            assert coco_mask.area(shape) == mask.sum()

    @pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (7, 9), (200, 333), (1500, 1000)])
    def test_is_never_a_string_that_pycocotools_wrote(self, size):
        for seed in range(5):
            mask = blob(size, seed)
            mask[: size[0] // 2] = seed % 2  # long runs too
            mask.ravel()[-1] = True
            np.testing.assert_array_equal(read_and_draw(encode(mask), size), mask)


class TestRegionToRle:
    @pytest.mark.parametrize("seed", range(12))
    def test_is_pycocotools_encoding_of_the_whole_mask(self, seed):
        random = np.random.default_rng(seed)
        height, width = random.integers(1, 30, 2)
        rows, columns = random.integers(0, height + 1), random.integers(0, width + 1)
        top, left = random.integers(0, height - rows + 1), random.integers(0, width - columns + 1)
        region = random.random((rows, columns)) < random.choice([0.0, 0.3, 0.9, 1.0])
        mask = np.zeros((height, width), bool)
        mask[top : top + rows, left : left + columns] = region
        rle = region_to_rle(region, int(top), int(left), (int(height), int(width)))
        assert rle == {"size": [height, width], "counts": encode(mask)["counts"].decode()}
        assert json.loads(json.dumps(rle)) == rle

    @pytest.mark.parametrize("value", [True, False])
    def test_holds_for_full_height_runs_that_go_on_in_the_next_column(self, value):
        region = np.full((8, 5), value)
        mask = np.zeros((8, 9), bool)
        mask[:, 2:7] = region
        assert region_to_rle(region, 0, 2, (8, 9))["counts"] == encode(mask)["counts"].decode()
        assert region_to_rle(region, 0, 0, (8, 5))["counts"] == encode(region)["counts"].decode()


def paste(regions, size):
    masks = []
    for region, top, left in regions:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[top : top + region.shape[0], left : left + region.shape[1]] = torch.from_numpy(region)
        masks.append(mask)
    return torch.stack(masks)


def blobs(number, size, seed=0):
    """Smooth mask logits: one ellipse each, some beyond the border, with noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    center = torch.rand(number, 2, 1, 1, generator=generator) * torch.tensor(size)[:, None, None]
    radius = torch.rand(number, 2, 1, 1, generator=generator) * min(size) / 4 + 1
    distance = ((rows - center[:, 0]) / radius[:, 0]) ** 2 + ((columns - center[:, 1]) / radius[:, 1]) ** 2
    return (6 - 6 * distance).clamp(min=-9) + torch.randn(number, *size, generator=generator) / 5


class TestUpsampleMasks:
    @pytest.mark.parametrize("size", [(480, 640), (1021, 333), (50, 70), (27, 36), (1, 1), (108, 2000)])
    @pytest.mark.parametrize("threshold", [0.0, 0.5, -1.3])
    def test_equals_upsampling_the_whole_map(self, size, threshold):
        logits = blobs(6, (27, 36))
        logits[5] = torch.randn(27, 36, generator=torch.Generator().manual_seed(1))  # positive everywhere
        whole = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
        masks = paste(upsample_masks(logits, size, threshold), size)
        # Every pixel whose logit is further than 1e-5 from the threshold, so that the logits agree that well.
        clear = (whole - threshold).abs() > 1e-5
        assert clear.float().mean() > 0.99
        assert torch.equal(masks[clear], (whole > threshold)[clear])

    def test_logits_agree_to_1e_5_at_every_level(self):
        logits = blobs(1, (27, 36))
        whole = F.interpolate(logits[None], (97, 131), mode="bilinear", align_corners=False)[0]
        levels = torch.cat([whole.flatten()[::401] - 1e-5, whole.flatten()[::401] + 1e-5]).tolist()
        for level in levels:
            masks = paste(upsample_masks(logits, (97, 131), level), (97, 131))
            assert not (masks & (whole <= level - 1e-5)).any()
            assert not (~masks & (whole > level + 1e-5)).any()

    def test_visits_no_more_than_the_mask_can_reach(self):
        logits = torch.full((1, 20, 20), -5.0)
        logits[0, 10, 4] = 5.0
        ((region, top, left),) = upsample_masks(logits, (200, 400), 0.0)
        # Cell 10 is read by the pixels whose centre lies within one cell of its own: rows 95..114, columns 70..109.
        assert (top, left, *region.shape) == (95, 70, 20, 40)

    def test_an_object_without_a_positive_cell_has_an_empty_region(self):
        ((region, _, _),) = upsample_masks(torch.full((1, 9, 9), -1.0), (50, 60), 0.0)
        assert region.size == 0
        assert list(upsample_masks(torch.zeros(0, 9, 9), (50, 60), 0.0)) == []

    @pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
    def test_nan_and_minus_infinity_are_background_and_stay_local(self, bad):
        logits = torch.full((1, 8, 8), 3.0)
        logits[0, 2, 2] = bad
        mask = paste(upsample_masks(logits, (80, 80), 0.0), (80, 80))[0]
        assert not mask[25, 25]
        assert mask[:10].all()
        assert mask[40:].all()

    def test_plus_infinity_is_foreground(self):
        logits = torch.full((1, 8, 8), -3.0)
        logits[0, 2, 2] = float("inf")
        mask = paste(upsample_masks(logits, (80, 80), 0.0), (80, 80))[0]
        assert mask[25, 25]
        assert not mask[40:].any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        logits = blobs(4, (27, 36)).to(dtype)
        expected = F.interpolate(logits.float()[None], (300, 200), mode="bilinear", align_corners=False)[0] > 0
        assert torch.equal(paste(upsample_masks(logits, (300, 200), 0.0), (300, 200)), expected)

    def test_padding_is_cut_off(self):
        logits = blobs(4, (27, 36))
        expected = F.interpolate(logits[None, :, :20, :30], (300, 200), mode="bilinear", align_corners=False)[0] > 0
        masks = paste(upsample_masks(logits, (300, 200), 0.0, valid_size=(20.0, 30.0)), (300, 200))
        assert torch.equal(masks, expected)


def test_more_masks_than_pycocotools_takes_at_once_have_their_areas():
    masks = [np.asfortranarray(np.arange(300) < count)[:, None].astype(np.uint8) for count in range(300)]
    assert mask_areas([coco_mask.encode(np.asfortranarray(mask)) for mask in masks]).tolist() == list(range(300))


def test_rle_with_counts_as_text_is_drawn_as_with_bytes():
    rle = coco_mask.encode(np.asfortranarray(blob((40, 30), 0).astype(np.uint8)))
    as_text = {**rle, "counts": rle["counts"].decode()}
    drawn = rasterize([rle, as_text], (40, 30), (20, 15))
    assert drawn.any()
    np.testing.assert_array_equal(drawn[1], drawn[0])
