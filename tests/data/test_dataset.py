"""A COCO dict and images become samples; counts, ids, errors."""

import gc
import json
import pickle

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as coco_mask

from annotated_images import (
    BROKEN,
    CATEGORIES,
    SIZES,
    TWO_PARTS,
    check_samples,
    make_coco,
    make_images,
    save_images,
    split_files,
)
from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.data.dataset import ClassCount, InstanceDataset, InstanceDatasets


def test_a_coco_dictionary_with_images_in_memory():
    dataset = InstanceDataset(make_coco(), make_images())
    check_samples(dataset)
    assert dataset.id2label == {0: "roof", 1: "tree"}
    assert dataset.label2id == {"roof": 0, "tree": 1}
    assert dataset.category_ids == [3, 7]
    assert [dataset[i]["image_id"] for i in range(3)] == [100, 101, 102]
    assert [item["id"] for item in dataset[0]["annotations"]] == [11, 12, 13]
    assert dataset[-1]["image_id"] == 102
    with pytest.raises(IndexError, match=r"index. must be in \[-3, 3\), got 3"):
        dataset[3]


def test_images_may_be_a_mapping_from_image_id_or_file_name(tmp_path):
    check_samples(InstanceDataset(make_coco(), {100 + i: image for i, image in reversed([*enumerate(make_images())])}))
    folder = save_images(tmp_path)
    check_samples(InstanceDataset(make_coco(), {f"{i}.png": folder / f"{i}.png" for i in range(3)}))


def test_original_ids_crowds_and_missing_sizes_are_in_the_ground_truth(tmp_path):
    content = make_coco()
    for image in content["images"]:
        del image["height"], image["width"]
    dataset = InstanceDataset(content, save_images(tmp_path))
    truth = dataset.coco()
    assert [(image["height"], image["width"]) for image in truth["images"]] == SIZES
    assert [image["file_name"] for image in truth["images"]] == ["0.png", "1.png", "2.png"]
    assert truth["annotations"] == make_coco()["annotations"]
    assert truth["categories"] == sorted(CATEGORIES, key=lambda category: category["id"])


def test_missing_fields_are_derived():
    rle = coco_mask.encode(np.asfortranarray(np.eye(32, dtype=np.uint8)))
    bitmap = np.zeros((50, 30), np.uint8)
    bitmap[10:14, 5:10] = 1
    annotations = [
        {"image_id": 101, "category_id": 3, "segmentation": bitmap},
        {"image_id": 102, "category_id": 3, "segmentation": rle},
        {"image_id": 100, "category_id": np.int64(7), "segmentation": TWO_PARTS},
        {"image_id": 102, "category_id": 7, "bbox": np.array([1.0, 2.0, 3.0, 4.0])},
        {"image_id": 102, "category_id": 7, "segmentation": []},
    ]
    dataset = InstanceDataset(make_coco(annotations=annotations), make_images())
    [parts], [drawn_rows], [diagonal, box, nothing] = (dataset[i]["annotations"] for i in range(3))
    assert (parts["bbox"], parts["area"], parts["iscrowd"], parts["id"]) == ([1.0, 1.0, 19.0, 14.0], 9 + 50, 0, 1)
    assert (drawn_rows["bbox"], drawn_rows["area"], drawn_rows["id"]) == ([5.0, 10.0, 5.0, 4.0], 20.0, 2)
    assert (diagonal["bbox"], diagonal["area"], diagonal["id"]) == ([0.0, 0.0, 32.0, 32.0], 32.0, 3)
    assert (box["bbox"], box["area"], box["id"]) == ([1.0, 2.0, 3.0, 4.0], 12.0, 4)
    assert "bbox" not in nothing
    assert nothing["id"] == 5


@pytest.mark.parametrize("ids", [[11, 12, 11, 14], [0, 1, 2, 3], ["a", "b", "c", "d"], [None, 1, 2, 3]])
def test_ids_that_are_no_ids_are_replaced_by_running_numbers(ids):
    content = make_coco()
    for annotation, number in zip(content["annotations"], ids, strict=True):
        annotation["id"] = number
    dataset = InstanceDataset(content, make_images())
    assert [item["id"] for item in dataset.coco()["annotations"]] == [1, 2, 3, 4]
    assert dataset[1]["annotations"][0]["id"] == 4


def test_text_as_image_id_becomes_the_row_number():
    content = make_coco()
    for image in content["images"]:
        image["id"] = f"photo-{image['id']}"
        del image["file_name"]
    for annotation in content["annotations"]:
        annotation["image_id"] = f"photo-{annotation['image_id']}"
    sample = InstanceDataset(content, make_images())[1]
    assert (sample["image_id"], sample["file_name"]) == (1, "photo-101")
    assert sample["annotations"][0]["image_id"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"id": 9, "image_id": 101, "category_id": 5, "bbox": [0, 0, 1, 1]}]},
            r"image 1 \('1.png', 101\): annotation 0 \(id 9\): .category_id. .*\{3: 'roof', 7: 'tree'\}, got 5",
        ),
        ({"annotations": [{"id": 9, "image_id": 55, "category_id": 3}]}, "annotation 9: .image_id. .*got 55"),
        (
            {"annotations": [{"id": 9, "image_id": 100, "category_id": 3, "bbox": [0, 0, 1]}]},
            r"annotation 0 \(id 9\): .bbox. .*got \[0, 0, 1\]",
        ),
        ({"categories": [*CATEGORIES, {"id": 9, "name": "tree"}]}, "'tree' for the categories 7 and 9"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "x"}]}, "category ids must be unique, got 3"),
        ({"categories": [{"id": "3", "name": "roof"}]}, "category id .*got '3'"),
        ({"categories": []}, "at least one category"),
        (
            {"images": [*make_coco()["images"][:2], make_coco()["images"][0]]},
            "image ids .*got 100",
        ),
        ({"images": make_coco()["images"][:2], "annotations": []}, "images. .*each of the 2 .*got 3"),
        (
            {"images": [*make_coco()["images"], {"id": 1, "file_name": "x.png"}]},
            r"1 of 4 images .* list of 3 images: .x\.png",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InstanceDataset(make_coco(**changes), make_images())


def test_keys_of_another_format_are_refused():
    with pytest.raises(ValueError, match="'images', 'annotations' and 'categories'"):
        InstanceDataset({"info": {}, "shapes": []}, make_images())


def test_an_image_of_another_size_than_the_annotations_say_is_refused():
    content = make_coco()
    content["images"][1] |= {"height": 30, "width": 50}
    dataset = InstanceDataset(content, make_images())
    with pytest.raises(ValueError, match=r"image 1 \('1.png', 101\).*height.*width.*\(50, 30\), got \(30, 50\)"):
        dataset[1]


def test_broken_images_and_shapes_are_named(tmp_path):
    content = make_coco()
    content["annotations"][0] = {"id": 11, "image_id": 100, "category_id": 3, "segmentation": [[1, 2, 3, 4, 5]]}
    dataset = InstanceDataset(content, save_images(tmp_path))
    with pytest.raises(ValueError, match=r"image 0 \('0.png', 100\): annotation 0 \(id 11\): polygon 0.* 5 "):
        dataset[0]
    (tmp_path / "1.png").write_bytes(BROKEN)
    with pytest.raises(ValueError, match=r"image 1 \('1.png', 101\): .*cannot be opened"):
        dataset[1]


def test_counts_by_hand():
    dataset = InstanceDataset(make_coco(), make_images())
    assert dataset.counts() == {0: ClassCount(1, 0, 1), 1: ClassCount(2, 1, 2)}
    assert dataset.crowded(1) == [("0.png", 2)]
    assert dataset.crowded(2) == []


def test_the_table_shows_classes_and_splits(tmp_path):
    content = make_coco()
    box = {"image_id": 101, "category_id": 3, "bbox": [0, 0, 4, 4]}
    content["annotations"] += [{**box, "id": 15}, {**box, "id": 16, "iscrowd": 1}]
    data = load_instance_dataset(split_files(tmp_path, train=content, validation=make_coco()))
    lines = str(data).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["0", "roof", "3", "2", "1", "2", "1", "0", "1"],
        ["1", "tree", "7", "2", "1", "2", "2", "1", "2"],
    ]
    assert lines[3:] == [
        f"{name}: 3 images, 1 of them without objects; {objects}; at most 2 in one image"
        for name, objects in {
            "train": "4 objects, 1 of them without a segmentation",
            "validation": "3 objects, 0 of them without a segmentation",
        }.items()
    ]


def test_annotations_lie_in_one_buffer():
    num_images, num_each = 500, 40
    shape = [[round(0.37 * i, 2) for i in range(40)]]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 20} for i in range(num_images)],
        "categories": CATEGORIES,
        "annotations": [
            {"id": 1 + i, "image_id": i // num_each, "category_id": 3, "bbox": [1, 1, 2, 2], "segmentation": shape}
            for i in range(num_images * num_each)
        ],
    }
    blank = PIL.Image.new("RGB", (20, 20))
    gc.collect()
    before = len(gc.get_objects())
    dataset = InstanceDataset(content, [blank] * num_images)
    gc.collect()
    assert len(gc.get_objects()) - before < 500  # there are 20,000 annotations
    as_text = len(json.dumps(content["annotations"]))
    assert len(pickle.dumps(dataset)) < as_text
    assert len(dataset[-1]["annotations"]) == num_each


def test_data_sets_with_different_label_maps_do_not_go_together():
    other = InstanceDataset(make_coco(), make_images(), label_map={3: "roof", 7: "tree", 8: "road"})
    with pytest.raises(ValueError, match="label_map"):
        InstanceDatasets({"train": other, "validation": InstanceDataset(make_coco(), make_images())})
    assert other.id2label == {0: "roof", 1: "tree", 2: "road"}
