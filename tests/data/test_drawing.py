"""Instances and annotations drawn over an image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from transformers_rfdetr.data.drawing import color_of, draw_instances

GREY = Image.new("RGB", (160, 120), (90, 90, 90))


def square(*corners: tuple[int, int], side: int = 40) -> np.ndarray:
    """Masks (N, 120, 160): a square at each (y, x)."""
    masks = np.zeros((len(corners), 120, 160), bool)
    for mask, (y, x) in zip(masks, corners, strict=True):
        mask[y : y + side, x : x + side] = True
    return masks


def test_only_pixels_of_the_masks_change():
    masks = square((10, 20), (60, 90))
    changed = (np.asarray(draw_instances(GREY, masks)) != np.asarray(GREY)).any(-1)
    assert (changed == masks.any(0)).all()


def test_the_inside_of_a_mask_takes_its_colour_and_keeps_the_image_under_it():
    light_and_dark = np.asarray(GREY).copy()
    light_and_dark[:, 40:] = 200
    drawn = np.asarray(draw_instances(Image.fromarray(light_and_dark), square((10, 20)))).astype(int)
    for x, ground in ((32, 90), (48, 200)):
        expected = 0.55 * ground + 0.45 * np.array(color_of(0))
        assert np.abs(drawn[30, x] - expected).max() <= 1


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_the_outline_stands_out_from_any_ground(ground: int):
    image = Image.new("L", (160, 120), ground)
    drawn = np.asarray(draw_instances(image, square((10, 20)))).astype(int)
    edge, line = drawn[30, 20], drawn[30, 21]
    assert tuple(line) == color_of(0)
    assert max(np.abs(edge - ground).max(), np.abs(line - ground).max()) > 100


def test_the_earlier_of_two_overlapping_instances_is_on_top():
    masks = square((10, 20), (30, 40))
    drawn = np.asarray(draw_instances(GREY, masks))
    alone = np.asarray(draw_instances(GREY, masks[:1]))
    outline = drawn[10:50, 59] == alone[10:50, 59]
    assert outline.all()


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_boxes_can_be_drawn_without_masks(kind: type):
    drawn = np.asarray(draw_instances(GREY, boxes=kind([[20.0, 10.0, 100.0, 90.0]])))
    changed = (drawn != np.asarray(GREY)).any(-1)
    assert changed[10, 20:100].all()
    assert changed[10:90, 99].all()
    assert not changed[20:80, 30:90].any()
    assert not changed[90:].any()


def test_plates_stay_inside_the_image_and_off_each_other():
    boxes = [[0, 0, 40, 40], [2, 1, 42, 42], [150, 110, 160, 120]]
    bare = np.asarray(draw_instances(GREY, boxes=boxes)).astype(int)
    written = np.asarray(draw_instances(GREY, boxes=boxes, labels=["a", "b", "c"], scores=[0.9, 0.8, 0.7])).astype(int)
    for index in range(3):
        plate = (written == color_of(index)).all(-1) & (bare != color_of(index)).any(-1)
        assert plate.sum() > 100


@pytest.mark.parametrize("size", [(160, 120), (48, 32)])
def test_a_label_is_never_covered_by_that_of_a_later_instance(size: tuple[int, int]):
    image = Image.new("RGB", size, (90, 90, 90))
    boxes = [[2, size[1] - 30, 32, size[1]]] * 4  # four detections of one object
    bare, alone = draw_instances(image, boxes=boxes), draw_instances(image, boxes=boxes, labels=["bolt", "", "", ""])
    written = draw_instances(image, boxes=boxes, labels=["bolt", "nut", "washer", "washer"])
    plate = ImageChops.difference(bare, alone).getbbox()
    assert written.crop(plate).tobytes() == alone.crop(plate).tobytes()
    if size == (160, 120):  # room for all
        pixels, without = np.asarray(written), np.asarray(bare)
        for index in range(4):
            assert ((pixels == color_of(index)).all(-1) & (without != color_of(index)).any(-1)).sum() > 100


def test_a_label_is_at_the_largest_part_of_a_mask():
    mask = np.zeros((1, 120, 160), bool)
    mask[0, 60:64, 0:2] = True  # stray pixels on the left
    mask[0, 50:90, 100:150] = True
    written = draw_instances(GREY, mask, labels=["nut"])
    difference = ImageChops.difference(draw_instances(GREY, mask), written).getbbox()
    assert (difference[0], difference[3]) == (100, 50)


def test_many_instances_have_no_plates_that_would_hide_others():
    image = Image.new("RGB", (640, 480), (90, 90, 90))
    small = [[20 + 60 * (n % 10), 100 + 60 * (n // 10), 30 + 60 * (n % 10), 110 + 60 * (n // 10)] for n in range(20)]
    boxes = [*small, [300, 300, 600, 460]]
    bare = draw_instances(image, boxes=boxes)
    written = draw_instances(image, boxes=boxes, labels=["house"] * 21)
    difference = ImageChops.difference(bare, written).getbbox()
    assert difference[0] == 300  # of the large one alone
    assert difference[3] <= 300
    few = ImageChops.difference(
        bare.crop((0, 0, 640, 290)), draw_instances(image, boxes=small, labels=["house"] * 20).crop((0, 0, 640, 290))
    )
    assert few.getbbox()[0] <= 20


def test_colour_indices_give_instances_of_a_class_one_colour():
    drawn = np.asarray(draw_instances(GREY, square((10, 20), (60, 90)), color_indices=[7, 7]))
    assert (drawn[30, 40] == drawn[80, 110]).all()
    assert len({color_of(index) for index in range(100)}) == 100


@pytest.mark.parametrize("empty", [True, False])
def test_images_of_16_bits_and_of_floats_are_drawn_on_at_their_own_scale(empty: bool):
    boxes = [] if empty else [[0, 0, 10, 10]]
    for image in (
        Image.fromarray(np.full((60, 80), 13107, np.uint16)),
        Image.fromarray(np.full((60, 80), 0.2, np.float32)),
    ):
        drawn = draw_instances(image, boxes=boxes)
        assert (drawn.mode, drawn.size) == ("RGB", (80, 60))
        assert drawn.getpixel((40, 30)) == (51, 51, 51)


def test_an_image_with_exif_rotation_is_drawn_upright():
    image = Image.new("RGB", (160, 120))
    image.getexif()[274] = 6
    assert draw_instances(image, np.ones((1, 160, 120), bool)).size == (120, 160)


def test_boxes_and_scores_of_half_precision_can_be_drawn():
    boxes, scores = torch.tensor([[20, 10, 100, 90]]), torch.tensor([0.5])
    drawn = draw_instances(GREY, boxes=boxes.bfloat16(), scores=scores.bfloat16())
    assert drawn.tobytes() == draw_instances(GREY, boxes=boxes, scores=scores).tobytes()


def test_a_label_of_two_lines_is_written_on_one():
    boxes = [[20, 40, 100, 90]]
    written = draw_instances(GREY, boxes=boxes, labels=["traffic\nlight"])
    assert written.tobytes() == draw_instances(GREY, boxes=boxes, labels=["traffic light"]).tobytes()


@pytest.mark.parametrize(
    "empty", [{}, {"masks": np.zeros((0, 120, 160), bool), "boxes": [], "labels": [], "scores": []}]
)
def test_no_instances_give_an_equal_image(empty: dict):
    drawn = draw_instances(GREY, **empty)
    assert drawn is not GREY
    assert drawn.tobytes() == GREY.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2000, 1500)])
def test_images_of_any_size_can_be_drawn_on(size: tuple[int, int]):
    masks = np.ones((2, *size[::-1]), bool)
    masks[1] = False
    drawn = draw_instances(Image.new("RGB", size), masks, [[0, 0, 1, 1], [0, 0, *size]], ["building"] * 2, [1, 0])
    assert drawn.size == size


def test_an_empty_mask_has_no_plate():
    assert draw_instances(GREY, square((10, 20), side=0), labels=["building"]).tobytes() == GREY.tobytes()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"masks": square((0, 0)), "scores": [0.5, 0.4]}, "'masks': 1, 'scores': 2"),
        ({"labels": ["building"]}, "masks.*boxes.*1 instances"),
        ({"masks": square((0, 0))[:, :60]}, r"masks.*120, 160.*\(60, 160\)"),
        ({"masks": square((0, 0)).astype(float)}, "masks.*float64"),
        ({"boxes": [[1, 2, 3]]}, r"boxes.*\(N, 4\).*\[\[1, 2, 3\]\]"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(parts: dict, message: str):
    with pytest.raises(ValueError, match=message):
        draw_instances(GREY, **parts)
