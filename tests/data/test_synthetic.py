"""Drawn aerial images and their annotations."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from transformers_rfdetr import RfDetrImageProcessor, load_instance_dataset
from transformers_rfdetr.data.synthetic import draw_dataset, draw_scene, draw_trays, save_dataset

SMALL = {"size": (96, 128), "metres_per_pixel": 0.5}


def draw(num_images: int, size: tuple[int, int], **settings: Any) -> tuple[list[Image.Image], COCO]:
    """Draw images, and read their JSON with pycocotools."""
    images, dictionary = draw_dataset(num_images, size, **settings)
    coco = COCO()
    coco.dataset = json.loads(json.dumps(dictionary))
    coco.createIndex()
    return images, coco


@pytest.fixture(scope="module")
def dataset() -> tuple[list[Image.Image], COCO]:
    """Thirty images of all classes."""
    return draw(30, (160, 160), metres_per_pixel=(0.14, 0.26))


@pytest.fixture(scope="module")
def buildings() -> COCO:
    """The buildings of many images."""
    return draw(70, (128, 128), metres_per_pixel=0.5, classes=["building"])[1]


def test_a_seed_always_draws_the_same_scene():
    (first, objects), (second, same_objects) = draw_scene(4, **SMALL), draw_scene(4, **SMALL)
    assert first.tobytes() == second.tobytes()
    assert objects == same_objects


def test_seeds_draw_different_scenes():
    assert len({draw_scene(seed, **SMALL)[0].tobytes() for seed in range(8)}) == 8


def test_drawing_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()
    draw_scene(0, **SMALL)
    assert (np.random.get_state()[1] == before).all()


def test_a_scene_has_the_size_asked_for():
    image, _ = draw_scene(1, size=(80, 200), metres_per_pixel=0.4)
    assert (image.mode, image.size) == ("RGB", (200, 80))


@pytest.mark.parametrize(("size", "metres"), [((16, 96), 2.0), ((96, 96), 0.1)])
def test_a_scene_too_small_for_a_building_is_refused(size: tuple[int, int], metres: float):
    with pytest.raises(ValueError, match="24 pixels and 20 metres"):
        draw_scene(0, size, metres_per_pixel=metres)


def test_box_and_area_are_those_that_pycocotools_reads_from_the_mask(dataset: tuple[list[Image.Image], COCO]):
    _, coco = dataset
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, width, height = annotation["bbox"]
        assert annotation["area"] == mask.sum() > 0
        assert (x, y, x + width, y + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_masks_of_a_scene_are_disjoint(dataset: tuple[list[Image.Image], COCO]):
    _, coco = dataset
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]]
        assert np.sum(masks, axis=0).max(initial=0) <= 1


def test_the_buildings_are_polygons_of_several_wings_rle_and_crowds(buildings: COCO):
    assert buildings.getCatIds() == [1]
    annotations = buildings.loadAnns(buildings.getAnnIds())
    houses = [annotation for annotation in annotations if not annotation["iscrowd"]]
    polygons = [house["segmentation"] for house in houses if isinstance(house["segmentation"], list)]
    assert {type(house["segmentation"]) for house in houses} == {list, dict}
    assert {len(wings) for wings in polygons} == {1, 2, 4}
    assert [item["image_id"] for item in annotations if item["iscrowd"]] == [6, 16, 26, 36, 46, 56, 66]


def test_the_scenes_hold_all_classes_up_to_forty_objects_and_empty_images(dataset: tuple[list[Image.Image], COCO]):
    _, coco = dataset
    counts = {image_id: len(coco.imgToAnns[image_id]) for image_id in coco.getImgIds()}
    assert [image_id for image_id, count in counts.items() if not count] == [3, 13, 23]
    assert 20 < max(counts.values()) < 50
    names = {annotation["category_id"]: 0 for annotation in coco.loadAnns(coco.getAnnIds())}
    assert [coco.cats[number]["name"] for number in sorted(names)] == ["building", "tree", "car", "pool", "tank"]


def test_only_the_classes_asked_for_are_annotated():
    image, everything = draw_scene(5, **SMALL)
    same_image, cars = draw_scene(5, **SMALL, classes=["car"])
    assert image.tobytes() == same_image.tobytes()
    found = [{**item, "id": 0} for item in everything if item["category_id"] == 3]
    assert [{**item, "id": 0} for item in cars] == found != []
    with pytest.raises(ValueError, match=r"`classes`.*boat"):
        draw_scene(5, **SMALL, classes=["car", "boat"])


def test_a_range_of_resolutions_draws_objects_of_different_sizes():
    sizes = []
    for seed in range(12):
        _, cars = draw_scene(seed, (120, 120), metres_per_pixel=(0.2, 0.8), classes=["car"])
        sizes += [max(car["bbox"][2:]) for car in cars]
    assert min(sizes) < 8
    assert max(sizes) > 20


def test_a_house_around_a_courtyard_has_a_hole(buildings: COCO):
    annotations = buildings.loadAnns(buildings.getAnnIds())
    courtyards = [
        item for item in annotations if isinstance(item["segmentation"], list) and len(item["segmentation"]) == 4
    ]
    assert courtyards
    for courtyard in courtyards:
        x, y, width, height = map(int, courtyard["bbox"])
        assert buildings.annToMask(courtyard)[y + height // 2, x + width // 2] == 0


def test_roofs_differ_from_the_ground_around_them(dataset: tuple[list[Image.Image], COCO]):
    images, coco = dataset
    pixels = np.asarray(images[4], dtype=float)
    mask = np.sum([coco.annToMask(annotation) for annotation in coco.imgToAnns[4]], axis=0, dtype=bool)
    assert np.abs(pixels[mask].mean(0) - pixels[~mask].mean(0)).max() > 10


def test_the_image_processor_reads_every_annotation_but_crowds(dataset: tuple[list[Image.Image], COCO]):
    images, coco = dataset
    targets = [{"image_id": i, "annotations": coco.imgToAnns[i]} for i in coco.getImgIds()]
    inputs = RfDetrImageProcessor(size=160)(images, targets, return_segmentation_masks=True)
    for labels, target in zip(inputs["labels"], targets, strict=True):
        houses = [annotation for annotation in target["annotations"] if not annotation["iscrowd"]]
        assert labels["masks"].sum((1, 2)).tolist() == [house["area"] for house in houses]


def test_a_tray_shows_parts_of_three_classes_with_holes_that_do_not_overlap():
    images, dictionary = draw_trays(20, first_seed=50)
    coco = COCO()
    coco.dataset = json.loads(json.dumps(dictionary))
    coco.createIndex()
    assert [category["name"] for category in dictionary["categories"]] == ["bolt", "nut", "washer"]
    assert {image.size for image in images} == {(144, 144)}
    for image_id in coco.getImgIds():
        annotations = coco.imgToAnns[image_id]
        assert 0 < len(annotations) < 12
        masks = [coco.annToMask(annotation) for annotation in annotations]
        assert np.sum(masks, axis=0).max() == 1
    washers = [item for item in dictionary["annotations"] if item["category_id"] == 3]
    shares = [item["area"] / np.prod(item["bbox"][2:]) for item in washers if min(item["bbox"][2:]) > 20]
    assert np.median(shares) < 0.65  # a disc would cover 0.79 of its box


def test_a_saved_dataset_is_read_as_a_split(tmp_path):
    path = save_dataset(tmp_path / "valid", *draw_trays(2))
    assert path.name == "_annotations.coco.json"
    data = load_instance_dataset(tmp_path)
    assert list(data) == ["validation"]
    assert data["validation"].num_objects() == len(draw_trays(2)[1]["annotations"])
