"""Augmentations transform image, boxes and masks alike; the references are numpy's flips and slices of pixels."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from transformers_rfdetr.data.augmentation import FlipAndCrop, TorchvisionTransform
from transformers_rfdetr.data.recipes import as_augmentation
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.model.masks import rasterize, read_segmentation

from small_models import shared_folder

SQUARE = [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]]


class FixedSquare(FlipAndCrop):
    """Crop a square that the test chooses."""

    def __init__(self, left: int, top: int, side: int, flip: float = 0.0) -> None:
        super().__init__(flip=flip, crop=1.0)
        self.square = (left, top, side)

    def _draw_square(self, size, rng):
        return self.square


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bitmap(annotation: dict, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, by pycocotools alone."""
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        shape = coco_mask.merge(coco_mask.frPyObjects(shape, *size))
    return coco_mask.decode(shape) > 0


def iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    return (ours & theirs).sum() / max(1, (ours | theirs).sum())


def blank(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.arange(height * width * 3, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3))


def annotated(**fields) -> dict:
    return {"id": 1, "image_id": 5, "category_id": 0, "iscrowd": 0, **fields}


def check_against_pixels(photo, annotations, square, flip):
    """Compare augmented annotations with the pixels of the original ones, sliced and flipped by numpy."""
    left, top, side = square
    size = (photo.height, photo.width)
    changed_image, changed = FixedSquare(*square, flip=float(flip))(photo, annotations, rng())
    where = np.s_[top : top + side, left : left + side]
    mirror = np.s_[:, ::-1] if flip else np.s_[:, :]
    np.testing.assert_array_equal(np.asarray(changed_image), np.asarray(photo)[where][mirror])
    kept = {annotation["id"]: annotation for annotation in changed}
    num_compared = 0
    for annotation in annotations:
        expected = bitmap(annotation, size)[where][mirror]
        if annotation["id"] not in kept:
            assert expected.sum() <= 2  # at most the edge of an object
            continue
        found = kept[annotation["id"]]
        mask = bitmap(found, (side, side))
        if isinstance(annotation["segmentation"], dict):
            np.testing.assert_array_equal(mask, expected)
        elif expected.sum() >= 400:  # in smaller ones, one pixel of the edge is more than 1 %
            assert iou(mask, expected) >= (0.98 if flip else 0.99)
            num_compared += 1
        # pycocotools samples a pixel 0.4 to the right of its left edge, so that a flipped polygon is 0.2 pixels off.
        assert found["area"] == (pytest.approx(mask.sum(), rel=0.05, abs=3) if flip else mask.sum())
        x, y, width, height = found["bbox"]
        assert 0 <= x < x + width <= side
        assert 0 <= y < y + height <= side
        rows, columns = np.nonzero(mask)
        assert x - 1 <= columns.min()
        assert columns.max() <= x + width
        assert y - 1 <= rows.min()
        assert rows.max() <= y + height
        assert {key: found[key] for key in ("category_id", "iscrowd")} == {
            key: annotation[key] for key in ("category_id", "iscrowd")
        }
    return num_compared


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 6])  # 6 has a crowd
def test_synthetic_scenes_are_cropped_and_flipped_as_their_pixels_are(seed, flip):
    photo, annotations = draw_scene(seed)
    squares = [(0, 0, 384), (128, 0, 384), (97, 61, 200), (256, 130, 254)]
    compared = [check_against_pixels(photo, annotations, square, flip) for square in squares]
    assert sum(compared) > 0 or not any(isinstance(item["segmentation"], list) for item in annotations)


def test_photographs_are_cropped_and_flipped_as_their_pixels_are():
    root = shared_folder("coco_permissive")
    coco = json.loads((root / "annotations.json").read_text())
    num_compared = 0
    for number, image in enumerate(coco["images"]):
        annotations = [item for item in coco["annotations"] if item["image_id"] == image["id"]]
        photo = Image.open(root / "images" / image["file_name"]).convert("RGB")
        left, top, side = FlipAndCrop()._draw_square(photo.size, rng(number))
        num_compared += check_against_pixels(photo, annotations, (left, top, side), number % 2)
    assert num_compared > 100


@pytest.mark.parametrize("shift", [(-40, 0), (40, 0), (0, -40), (0, 40), (-30, 30), (37.3, -21.7)], ids=str)
def test_polygons_beyond_each_border_are_clipped_as_on_a_larger_canvas(shift):
    angles = np.linspace(0, 2 * np.pi, 31)[:-1]
    radii = np.where(np.arange(30) % 2, 30, 45)
    star = np.stack([50 + radii * np.cos(angles), 50 + radii * np.sin(angles)], 1) + shift
    inside = rasterize([[star.ravel()]], (100, 100), (100, 100))[0]
    around = rasterize([[(star + 100).ravel()]], (300, 300), (300, 300))[0]
    # pycocotools rounds corners to fifths of a pixel, towards zero where they are negative.
    assert (inside != around[100:200, 100:200]).sum() <= 2
    assert 0 < inside.sum() < around.sum()


def test_a_flipped_box_is_reflected_at_the_middle_of_the_image():
    photo, annotations = FlipAndCrop(flip=1.0, crop=0.0)(
        blank(10, 20), [annotated(bbox=[2.0, 2.0, 6.0, 6.0], area=36.0, segmentation=SQUARE)], rng()
    )
    assert photo.size == (20, 10)
    [flipped] = annotations
    assert flipped["bbox"] == [12.0, 2.0, 6.0, 6.0]
    assert flipped["area"] == 36.0
    assert flipped["segmentation"] == [[18.0, 2.0, 12.0, 2.0, 12.0, 8.0, 18.0, 8.0]]


def test_a_cropped_box_is_clipped_and_its_area_is_that_of_the_remaining_part():
    annotations = [
        annotated(bbox=[2.0, 2.0, 6.0, 6.0], area=36.0, segmentation=SQUARE),
        annotated(bbox=[0.0, 0.0, 8.0, 6.0], area=24.0),  # half of its box
        annotated(bbox=[2.0, 2.0, 9.0, 6.0], area=36.0, segmentation=SQUARE),  # a box that is larger than its mask
        annotated(bbox=[0.0, 0.0, 4.0, 10.0], area=40.0),  # outside
        annotated(
            bbox=[2.0, 2.0, 6.0, 6.0], area=12.0, segmentation=[[2, 2, 4, 2, 4, 8, 2, 8]]
        ),  # of which only the box overlaps
    ]
    _, changed = FixedSquare(4, 0, 10)(blank(10, 20), annotations, rng())
    assert [item["bbox"] for item in changed] == [[0.0, 2.0, 4.0, 6.0], [0.0, 0.0, 4.0, 6.0], [0.0, 2.0, 7.0, 6.0]]
    assert [item["area"] for item in changed] == [24.0, 12.0, 24.0]
    assert annotations[0]["bbox"] == [2.0, 2.0, 6.0, 6.0]  # the inputs are not modified
    assert annotations[0]["segmentation"] is SQUARE


def test_an_object_without_a_box_gets_that_of_its_remaining_mask():
    _, [cropped] = FixedSquare(4, 0, 10)(blank(10, 20), [annotated(segmentation=SQUARE)], rng())
    assert (cropped["bbox"], cropped["area"]) == ([0.0, 2.0, 4.0, 6.0], 24.0)
    _, changed = FixedSquare(4, 0, 10)(blank(10, 20), [annotated(segmentation=[])], rng())
    assert changed == []


def test_all_random_numbers_come_from_the_generator():
    photo, annotations = draw_scene(1)
    augmentation = FlipAndCrop()
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    results = [augmentation(photo, annotations, rng(seed)) for seed in (0, 0, *range(1, 9))]
    assert results[0][0].tobytes() == results[1][0].tobytes()
    assert results[0][1] == results[1][1]
    assert len({result[0].tobytes() for result in results}) > 4
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_half_of_the_images_are_flipped_and_half_are_cropped():
    photo = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8)[None, :, None], (40, 1, 3)))
    generator, augmentation = rng(), FlipAndCrop()
    results = [np.asarray(augmentation(photo, [], generator)[0]) for _ in range(600)]
    num_cropped = sum(result.shape[1] < 80 for result in results)
    num_flipped = sum(result[0, 0, 0] > result[0, -1, 0] for result in results)
    for count in (num_cropped, num_flipped):
        assert abs(count - 300) < 4 * (600 * 0.25) ** 0.5  # four standard deviations


def test_squares_have_the_sizes_of_the_recipe_and_any_position():
    augmentation, generator = FlipAndCrop(), rng()
    squares = [augmentation._draw_square((1200, 800), generator) for _ in range(3000)]
    lefts, tops, sides = np.array(squares).T
    assert (lefts >= 0).all()
    assert (tops >= 0).all()
    assert (lefts + sides <= 1200).all()
    assert (tops + sides <= 800).all()
    # The smallest square is 384 pixels of the short side of 600; a square larger than the short side is reduced to it.
    assert sides.min() == round(800 * 384 / 600)
    assert sides.max() == 800
    # Of 217 sides in 384..600, the whole short side is taken by 1 of a short side of 600, 101 of 500 and 201 of 400.
    whole = (1 / 217 + 101 / 217 + 201 / 217) / 3
    assert abs((sides == 800).mean() - whole) < 4 * (whole * (1 - whole) / 3000) ** 0.5
    # The position is uniform too: in the middle on average.
    assert abs(((lefts + sides / 2) / 1200).mean() - 0.5) < 0.02


@pytest.mark.parametrize("crop_sides", [(384, 600), (1, 10)])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (2, 1)])
def test_images_of_a_few_pixels_can_be_cropped(size, crop_sides):
    for seed in range(8):
        photo, _ = FlipAndCrop(crop=1.0, crop_sides=crop_sides)(
            blank(*size), [annotated(bbox=[0, 0, 1, 1], area=1)], rng(seed)
        )
        assert 1 <= photo.width == photo.height <= min(size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flip": 1.5}, r"flip.*got 1.5"),
        ({"crop": -0.1}, r"crop.*got -0.1"),
        ({"short_sides": ()}, "short_sides"),
        ({"crop_sides": (600, 384)}, "crop_sides"),
    ],
)
def test_invalid_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlipAndCrop(**arguments)


def test_an_augmentation_must_be_callable():
    assert as_augmentation(None) is None
    with pytest.raises(ValueError, match=r"augmentation.*got 'flip'"):
        as_augmentation("flip")


# torchvision


@pytest.fixture
def v2():
    return pytest.importorskip("torchvision.transforms.v2")


def test_a_torchvision_flip_equals_ours(v2):
    photo, annotations = draw_scene(6)
    ours, our_annotations = FlipAndCrop(flip=1.0, crop=0.0)(photo, annotations, rng())
    pipeline = as_augmentation(v2.Compose([v2.RandomHorizontalFlip(p=1.0)]))
    theirs, their_annotations = pipeline(photo, annotations, rng())
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert len(our_annotations) == len(their_annotations) > 3
    for mine, yours in zip(our_annotations, their_annotations, strict=True):
        assert iou(bitmap(mine, (384, 512)), bitmap(yours, (384, 512))) > 0.97
        np.testing.assert_allclose(mine["bbox"], yours["bbox"], atol=1.01)
        assert mine["id"] == yours["id"]
        assert mine["iscrowd"] == yours["iscrowd"]


def test_a_torchvision_crop_clips_masks_and_boxes_and_drops_objects_outside(v2):
    class Corner(v2.Transform):
        def transform(self, inpt, params):
            return v2.functional.crop(inpt, 0, 4, 10, 10)

    annotations = [
        annotated(id=1, segmentation=SQUARE, area=36.0, bbox=[2.0, 2.0, 6.0, 6.0]),
        annotated(id=2, bbox=[0.0, 0.0, 8.0, 6.0], area=1.0),
        annotated(id=3, bbox=[0.0, 0.0, 4.0, 10.0], area=40.0),
        annotated(id=4, segmentation=[[0, 0, 3, 0, 3, 3, 0, 3]]),
    ]
    photo, changed = TorchvisionTransform(Corner())(blank(10, 20), annotations, rng())
    assert photo.size == (10, 10)
    assert [item["id"] for item in changed] == [1, 2]
    assert [item["bbox"] for item in changed] == [[0.0, 2.0, 4.0, 6.0], [0.0, 0.0, 4.0, 6.0]]
    assert [item["area"] for item in changed] == [24.0, 24.0]
    assert changed[1].get("segmentation") is None


def test_objects_that_the_pipeline_drops_are_dropped(v2):
    annotations = [annotated(id=i, segmentation=SQUARE, bbox=[2.0, 2.0, 6.0, 6.0], area=36.0) for i in (1, 2)]
    annotations.insert(1, annotated(id=3, bbox=[1.0, 1.0, 0.5, 0.5], area=0.25))
    pipeline = v2.Compose([v2.SanitizeBoundingBoxes(min_size=2)])
    _, changed = TorchvisionTransform(pipeline)(blank(10, 20), annotations, rng())
    assert [item["id"] for item in changed] == [1, 2]


def test_a_rotated_object_has_the_box_of_its_mask(v2):
    pipeline = v2.RandomRotation((45, 45))
    photo, annotations = blank(100, 100), [annotated(segmentation=[[30, 30, 70, 30, 70, 70, 30, 70]])]
    _, [turned] = as_augmentation(pipeline)(photo, annotations, rng())
    rows, columns = np.nonzero(bitmap(turned, (100, 100)))
    expected = [columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]
    assert turned["bbox"] == expected
    assert abs(turned["bbox"][2] - 40 * 2**0.5) < 2


def test_torchvision_draws_from_the_generator_and_does_not_change_that_of_torch(v2):
    photo, annotations = draw_scene(1)
    augmentation = as_augmentation(v2.Compose([v2.RandomAffine(20, (0.2, 0.2)), v2.ColorJitter(0.5)]))
    before = torch.get_rng_state()
    first, again, other = (augmentation(photo, annotations, rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert first[0].tobytes() == again[0].tobytes() != other[0].tobytes()
    assert first[1] == again[1] != other[1]


def test_large_images_are_scaled_down_before_masks_are_rasterized(v2):
    seen = []

    class Look(v2.Transform):
        def transform(self, inpt, params):
            seen.append(tuple(inpt.shape))
            return inpt

    annotations = [annotated(segmentation=[[20, 20, 80, 20, 80, 80, 20, 80]], bbox=[20, 20, 60, 60], area=3600)]
    annotations.append(annotated(bbox=[40, 8, 80, 16], area=1280))
    photo, [changed, box] = TorchvisionTransform(Look(), max_size=50)(blank(100, 200), annotations, rng())
    assert sorted(seen) == [(2, 4), (2, 25, 50), (3, 25, 50)]
    assert photo.size == (50, 25)
    assert changed["bbox"] == [5.0, 5.0, 15.0, 15.0]
    assert (box["bbox"], box["area"]) == ([10.0, 2.0, 20.0, 4.0], 80.0)
    assert read_segmentation(changed["segmentation"], (25, 50)) is not None


def test_pipelines_may_return_floats_but_not_normalized_ones(v2):
    photo = blank(8, 8)
    floats = v2.Compose([v2.ToDtype(torch.float32, scale=True)])
    same, _ = TorchvisionTransform(floats)(photo, [], rng())
    np.testing.assert_array_equal(np.asarray(same), np.asarray(photo))
    normalised = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.1] * 3)])
    with pytest.raises(ValueError, match=r"\[0, 1\], got \["):
        TorchvisionTransform(normalised)(photo, [], rng())


def test_a_pipeline_that_returns_something_else_is_refused(v2):
    with pytest.raises(ValueError, match=r"'boxes', 'masks' and 'labels'.*got Image"):
        TorchvisionTransform(lambda image, target: image)(blank(8, 8), [annotated(bbox=[0, 0, 2, 2])], rng())

    def crop_image_only(image, target):
        return image[:, :4], target

    with pytest.raises(ValueError, match="labels for pixels of shape"):
        TorchvisionTransform(crop_image_only)(blank(8, 8), [annotated(bbox=[0, 0, 2, 2])], rng())


def test_without_torchvision_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        as_augmentation(torch.nn.Identity())(blank(8, 8), [], rng())


@pytest.mark.parametrize("quarters", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 6])
def test_scenes_are_rotated_as_their_pixels_are(quarters, seed):
    photo, annotations = draw_scene(seed, (96, 128), metres_per_pixel=0.5)
    generator = np.random.default_rng(0)
    stub = type("Rotations", (), {"random": generator.random, "integers": lambda self, low, high: quarters})()
    rotated_image, rotated = FlipAndCrop(flip=0.0, crop=0.0, rotate=1.0)(photo, annotations, stub)
    np.testing.assert_array_equal(np.asarray(rotated_image), np.rot90(np.asarray(photo), quarters))
    assert len(rotated) == len(annotations)
    for before, after in zip(annotations, rotated, strict=True):
        expected = np.rot90(bitmap(before, (96, 128)), quarters)
        mask = bitmap(after, expected.shape)
        if isinstance(before["segmentation"], dict):
            np.testing.assert_array_equal(mask, expected)
        assert iou(mask, expected) > 0.9  # a rotated polygon is up to 0.2 pixels off in pycocotools
        x, y, width, height = after["bbox"]
        rows, columns = np.nonzero(expected)
        assert [x, y, x + width, y + height] == pytest.approx(
            [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=1.5
        )
        assert after["area"] == before["area"]
