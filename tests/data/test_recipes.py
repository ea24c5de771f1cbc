"""The recipes run on any image; large-scale jitter shows what a window of the image shows."""

import itertools
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from annotated_images import drawn_dataset, equal, processor
from transformers_rfdetr.data.augmentation import BlurAndNoise, ColorJitter, FlipAndCrop, ScaleJitter
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.recipes import RECIPES, Compose, as_augmentation
from transformers_rfdetr.data.synthetic import draw_dataset, draw_scene


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bitmap(segmentation, size: tuple[int, int]) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    return coco_mask.decode(segmentation) > 0


def empty_rle(size: tuple[int, int]) -> dict:
    return coco_mask.encode(np.zeros(size, np.uint8, order="F"))


def odd_annotations(size: tuple[int, int]) -> list[dict]:
    """Return objects of every kind at the border of an image, beyond it, and without a pixel."""
    height, width = size
    beyond = [[-9.0, -9.0, width + 9.0, -9.0, width + 9.0, height / 2, -9.0, height / 2]]
    full = coco_mask.encode(np.ones(size, np.uint8, order="F"))
    corner = np.zeros(size, np.uint8, order="F")
    corner[-1, -1] = 1
    box, last = [-9.0, -9.0, width + 18.0, height / 2 + 9], [width - 1.0, height - 1.0, 1.0, 1.0]
    rows = [
        {"segmentation": beyond, "bbox": box},
        {"segmentation": full, "bbox": [0.0, 0.0, width, height]},
        {"segmentation": full, "bbox": [0.0, 0.0, width, height], "iscrowd": 1},
        {"segmentation": coco_mask.encode(corner), "bbox": last},
        {"segmentation": empty_rle(size), "bbox": [0.0, 0.0, width, height]},
        {"segmentation": [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]], "bbox": last},
        {"segmentation": None, "bbox": box},
        {"bbox": [0.0, 0.0, 0.0, 0.0]},
        {"bbox": [0.0, 0.0, width, height], "iscrowd": 1},
    ]
    filled = {"iscrowd": 0, "category_id": 0}
    return [{**filled, "id": i, "area": float(row["bbox"][2] * row["bbox"][3]), **row} for i, row in enumerate(rows)]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 2), (60, 90)])
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_a_recipe_runs_on_objects_and_images_of_any_kind(name, size):
    augmentation = as_augmentation(name, drawn_dataset(4))
    image = Image.fromarray(rng().integers(0, 256, (*size, 3), np.uint8))
    for annotations, seed in itertools.product(([], odd_annotations(size)), range(4)):
        changed, found = augmentation(image, annotations, rng(seed))
        assert changed.mode == "RGB"
        assert all(one["id"] in range(len(annotations)) for one in found if "id" in one)
        # It refuses masks of another size than the image's.
        inputs = processor()(changed, {"image_id": 0, "annotations": found}, return_segmentation_masks=True)
        labels = inputs["labels"][0]
        assert len(labels["masks"]) == len(labels["boxes"])
        assert (labels["boxes"] >= 0).all()
        assert (labels["boxes"] <= 1).all()


def test_an_object_without_a_pixel_stays_one_without_a_pixel():
    annotation = {
        "segmentation": empty_rle((30, 40)),
        "bbox": [2, 2, 20, 20],
        "area": 4,
        "category_id": 0,
        "iscrowd": 0,
    }
    for augmentation in (FlipAndCrop(crop=1.0), FlipAndCrop(crop=0.0, rotate=1.0), ScaleJitter((0.5, 0.5), 16)):
        image, annotations = augmentation(Image.new("RGB", (40, 30)), [annotation], rng())
        assert len(annotations) == 1
        for masks, expected in ((True, 0), (False, 1)):  # it trains no mask, but the box of a detection model
            target = {"image_id": 0, "annotations": annotations}
            inputs = processor()(image, target, return_segmentation_masks=masks)
            assert len(inputs["labels"][0]["boxes"]) == expected


@pytest.mark.parametrize("scale", [0.3, 0.75, 1.0, 1.6])
@pytest.mark.parametrize("seed", [0, 6])  # 6 has a crowd
def test_jitter_shows_what_a_window_shows(scale, seed):
    image, annotations = draw_scene(seed, (96, 128), metres_per_pixel=0.5)
    shown, found = ScaleJitter((scale, scale))(image, annotations, rng(seed))
    assert shown.size == (round(128 / scale), round(96 / scale))
    # Search for the window: the pixels of the image are unchanged.
    pixels, canvas = np.asarray(image), np.asarray(shown)
    padding = np.array([124, 116, 104])
    if scale < 1:
        is_image = (canvas != padding).any(-1)
        rows, columns = np.flatnonzero(is_image.any(1)), np.flatnonzero(is_image.any(0))
        top, left = -rows[0], -columns[0]
        np.testing.assert_array_equal(canvas[rows[0] : rows[0] + 96, columns[0] : columns[0] + 128], pixels)
        assert (len(rows), len(columns)) == (96, 128)
    else:
        room = (range(96 - shown.height + 1), range(128 - shown.width + 1))
        windows = [(y, x) for y in room[0] for x in room[1]]
        [(top, left)] = [
            (y, x) for y, x in windows if np.array_equal(pixels[y : y + shown.height, x : x + shown.width], canvas)
        ]
    assert len(found) > 0
    by_id = {one["id"]: one for one in annotations}
    for one in found:
        before = bitmap(by_id[one["id"]]["segmentation"], (96, 128))
        around = np.pad(before, ((500, 500), (500, 500)))
        expected = around[500 + top : 500 + top + shown.height, 500 + left : 500 + left + shown.width]
        mask = bitmap(one["segmentation"], (shown.height, shown.width))
        assert (mask & expected).sum() >= 0.9 * (mask | expected).sum() - 3
        assert one["area"] == mask.sum()
        assert one["category_id"] == by_id[one["id"]]["category_id"]


def test_a_mask_does_not_extend_into_the_padding():
    annotations = odd_annotations((40, 60))
    image, found = ScaleJitter((0.5, 0.5))(Image.new("RGB", (60, 40), "white"), annotations, rng())
    is_image = (np.asarray(image) == 255).all(-1)
    assert is_image.sum() == 40 * 60
    first, full, crowd = found[:3]
    for one in (full, crowd):
        np.testing.assert_array_equal(bitmap(one["segmentation"], is_image.shape), is_image)
    assert bitmap(first["segmentation"], is_image.shape).sum() == 20 * 60
    rows, columns = np.nonzero(is_image)
    box = [columns.min(), rows.min(), 60, 20]
    assert first["bbox"] == box
    [without_mask] = [one for one in found if one["id"] == 6]
    assert without_mask["bbox"] == box


def test_only_a_canvas_above_the_largest_size_is_reduced():
    square = [[20.0, 20.0, 60.0, 20.0, 60.0, 60.0, 20.0, 60.0]]
    mask = coco_mask.merge(coco_mask.frPyObjects(square, 100, 200))
    rows = [{"segmentation": square}, {"segmentation": mask}, {"segmentation": None}]
    fields = {"bbox": [20.0, 20.0, 40.0, 40.0], "area": 1600.0, "category_id": 0, "iscrowd": 0}
    annotations = [{**row, **fields, "id": i} for i, row in enumerate(rows)]
    image, found = ScaleJitter((0.5, 0.5), max_size=200)(Image.new("RGB", (200, 100)), annotations, rng())
    assert image.size == (200, 100)
    assert [one["area"] for one in found] == [400, 400, 400]
    assert [one["bbox"][2:] for one in found] == [[20, 20]] * 3
    image, _ = ScaleJitter((1.0, 1.0), max_size=200)(Image.new("RGB", (200, 100)), annotations, rng())
    assert image.size == (200, 100)


def test_objects_of_less_than_two_pixels_of_the_model_are_dropped():
    small = {"bbox": [5.0, 5.0, 8.0, 8.0], "area": 64.0, "category_id": 0, "iscrowd": 0}
    large = {"bbox": [5.0, 5.0, 80.0, 80.0], "area": 6400.0, "category_id": 0, "iscrowd": 0}
    _, found = ScaleJitter((0.1, 0.1))(Image.new("RGB", (1000, 1000)), [small, large], rng())
    assert [one["bbox"][2] for one in found] == [pytest.approx(80 * 0.1024, rel=0.01)]


def test_scales_and_positions_are_uniform():
    augmentation, generator = ScaleJitter((0.5, 2.0)), rng()
    white = Image.new("RGB", (100, 100), "white")
    images = [np.asarray(augmentation(white, [], generator)[0]) for _ in range(600)]
    scales = np.array([100 / len(image) for image in images])
    assert abs(scales.mean() - 1.25) < 0.08  # four standard deviations
    assert scales.min() < 0.52
    assert scales.max() > 1.95
    padded = [(image == 255).all(-1) for image in images if len(image) > 150]
    tops = [np.flatnonzero(mask.any(1))[0] / (len(mask) - 100) for mask in padded]
    assert abs(np.mean(tops) - 0.5) < 0.12


@pytest.mark.parametrize("augmentation", [ColorJitter(probability=1.0), BlurAndNoise(probability=1.0)])
def test_colors_and_noise_change_pixels_only_and_keep_gray_images_gray(augmentation):
    gray = Image.fromarray(rng().integers(60, 190, (40, 50), np.uint8)).convert("RGB")
    annotations = [{"bbox": [1, 2, 3, 4]}]
    image, same = augmentation(gray, annotations, rng(1))
    assert same is annotations
    pixels = np.asarray(image)
    assert np.ptp(pixels, axis=-1).max() == 0
    assert not np.array_equal(pixels, np.asarray(gray))
    assert np.abs(pixels.mean() - np.asarray(gray).mean()) < 60


def test_noise_has_at_most_the_given_deviation():
    gray = Image.new("RGB", (100, 100), (128, 128, 128))
    augmentation = BlurAndNoise(blur=0.0, noise=0.05, probability=1.0)
    deviations = [np.asarray(augmentation(gray, [], rng(seed))[0]).std() for seed in range(50)]
    assert max(deviations) < 0.05 * 255 * 1.05
    assert max(deviations) > 0.04 * 255
    assert min(deviations) < 0.01 * 255


def test_aerial_images_are_shown_in_all_eight_orientations_equally_often():
    augmentation = RECIPES["aerial"](None).augmentations[1]
    generator, corner = rng(), np.zeros((8, 8, 3), np.uint8)
    corner[0, 1] = 255
    places = [np.asarray(augmentation(Image.fromarray(corner), [], generator)[0])[..., 0].argmax() for _ in range(800)]
    counts = np.unique(places, return_counts=True)[1]
    assert len(counts) == 8
    assert np.abs(counts - 100).max() < 4 * (800 / 8 * 7 / 8) ** 0.5


def test_default_is_rfdetrs_recipe_and_none_changes_nothing():
    image, annotations = draw_scene(1, (96, 96), metres_per_pixel=0.6)
    default = as_augmentation("default")
    for seed in range(5):
        one, other = default(image, annotations, rng(seed)), FlipAndCrop()(image, annotations, rng(seed))
        assert one[0].tobytes() == other[0].tobytes()
        assert one[1] == other[1]
    assert as_augmentation("none") is None


def test_augmentations_are_composed_with_pipelines():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    flip = FlipAndCrop(flip=1.0, crop=0.0)
    image, annotations = draw_scene(1, (96, 96), metres_per_pixel=0.6)
    composed = Compose(flip, None, "none", v2.Compose([v2.RandomHorizontalFlip(p=1.0)]), "default")
    assert [type(one).__name__ for one in composed.augmentations if one] == [
        "FlipAndCrop",
        "TorchvisionTransform",
        "FlipAndCrop",
    ]
    same, _ = Compose(flip, v2.Compose([v2.RandomHorizontalFlip(p=1.0)]))(image, annotations, rng())
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))


def test_an_unknown_name_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"one of default, aerial, microscopy, strong, none, a callable.*got 'areal'"):
        as_augmentation("areal")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_do_not_depend_on_order_and_need_no_torchvision(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    prepared = drawn_dataset(4).with_processor(processor(), augmentation=name, seed=5)
    forwards = [prepared[index] for index in range(4)]
    assert equal([prepared[index] for index in reversed(range(4))][::-1], forwards)


def test_strong_pastes_objects_of_the_dataset_that_is_augmented():
    images, coco = draw_dataset(4, classes=["building"])
    empty = {"id": 77, "file_name": "empty.png", "height": 96, "width": 96}
    dataset = InstanceDataset(
        {**coco, "images": [*coco["images"], empty]}, [*images, Image.new("RGB", (96, 96), "gray")]
    )
    prepared = dataset.with_processor(processor(96), augmentation="strong")
    counts = []
    for epoch in range(12):
        prepared.set_epoch(epoch)
        counts.append(len(prepared[4]["labels"]["class_labels"]))
    assert 0 in counts
    assert max(counts) > 0
