"""Every form of annotated pictures becomes the same samples, with one label map; the forms are written here."""

import gc
import itertools
import json
import pickle
import random
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments

from transformers_rfdetr import RfDetrImageProcessor, load_instance_dataset
from transformers_rfdetr.data.augmentation import FlipAndCrop
from transformers_rfdetr.data.dataset import ClassCount, InstanceDataset, InstanceDatasets
from transformers_rfdetr.data.prepared import FollowEpoch, PreparedDataset, collate_fn
from transformers_rfdetr.data.streams import InstanceStream
from transformers_rfdetr.data.synthetic import draw_dataset

from small_models import shared_folder

datasets = pytest.importorskip("datasets")

# Two classes whose ids have a gap and stand in the wrong order; a crowd, a box without a mask, an empty picture.
CATEGORIES = [{"id": 7, "name": "tree"}, {"id": 3, "name": "roof"}]
SIZES = [(40, 60), (50, 30), (32, 32)]  # (H, W)
TRIANGLE = [[5.0, 5.0, 25.0, 5.0, 5.0, 25.0]]
TWO_PARTS = [[1.0, 1.0, 4.0, 1.0, 4.0, 4.0, 1.0, 4.0], [10.0, 10.0, 20.0, 10.0, 20.0, 15.0, 10.0, 15.0]]
OBJECTS = [
    [
        {"id": 11, "category_id": 7, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 200.0, "iscrowd": 0},
        {"id": 12, "category_id": 3, "bbox": [1.0, 1.0, 19.0, 14.0], "area": 59.0, "iscrowd": 0},
        {"id": 13, "category_id": 7, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 200.0, "iscrowd": 1},
    ],
    [{"id": 14, "category_id": 7, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 200.0, "iscrowd": 0}],
    [],
]
SHAPES = [[TRIANGLE, TWO_PARTS, TRIANGLE], [TRIANGLE], []]
NAMES = ["roof", "tree"]
BROKEN = b"no picture"


def pictures() -> list[PIL.Image.Image]:
    generator = np.random.default_rng(0)
    return [PIL.Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


def objects() -> list[list[dict]]:
    """The annotations of each picture."""
    return [
        [{**item, "segmentation": shape} for item, shape in zip(*pair, strict=True)]
        for pair in zip(OBJECTS, SHAPES, strict=True)
    ]


def coco(**changes) -> dict:
    """The data as COCO's JSON."""
    images = [
        {"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width}
        for i, (height, width) in enumerate(SIZES)
    ]
    annotations = [{**item, "image_id": 100 + i} for i, items in enumerate(objects()) for item in items]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}


def save_pictures(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures()):
        picture.save(folder / f"{index}.png")
    return folder


def save_coco(path: Path, content: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content or coco()))
    return path


def processor(side: int = 24, **settings) -> RfDetrImageProcessor:
    return RfDetrImageProcessor(size=side, **settings)


def drawn(num_pictures: int = 8) -> InstanceDataset:
    images, content = draw_dataset(num_pictures)
    return InstanceDataset(content, images)


def check_samples(dataset: InstanceDataset) -> None:
    """The data set holds pictures and objects as they stand above, with labels for categories."""
    assert len(dataset) == 3
    label_of = {3: 0, 7: 1}
    for index, expected in enumerate(objects()):
        sample = dataset[index]
        assert sample["image"].mode == "RGB"
        np.testing.assert_array_equal(np.asarray(sample["image"]), np.asarray(pictures()[index]))
        assert (sample["height"], sample["width"]) == SIZES[index]
        assert [item["category_id"] for item in sample["annotations"]] == [label_of[i["category_id"]] for i in expected]
        for item, given in zip(sample["annotations"], expected, strict=True):
            assert item["image_id"] == sample["image_id"]
            assert item["iscrowd"] == given["iscrowd"]
            assert item["segmentation"] == given["segmentation"]
            np.testing.assert_allclose(item["bbox"], given["bbox"])
            assert item["area"] == pytest.approx(given["area"], rel=0.1)  # a drawn triangle is 10 pixels short


# COCO dictionaries and files


def test_a_coco_dictionary_with_pictures_in_memory():
    dataset = InstanceDataset(coco(), pictures())
    check_samples(dataset)
    assert dataset.id2label == {0: "roof", 1: "tree"}
    assert dataset.label2id == {"roof": 0, "tree": 1}
    assert dataset.category_ids == [3, 7]
    assert [dataset[i]["image_id"] for i in range(3)] == [100, 101, 102]
    assert [item["id"] for item in dataset[0]["annotations"]] == [11, 12, 13]
    assert dataset[-1]["image_id"] == 102
    with pytest.raises(IndexError, match="index 3 is outside the 3 images"):
        dataset[3]


def test_pictures_may_be_a_mapping_from_image_id_or_file_name(tmp_path):
    check_samples(InstanceDataset(coco(), {100 + i: picture for i, picture in reversed([*enumerate(pictures())])}))
    folder = save_pictures(tmp_path)
    check_samples(InstanceDataset(coco(), {f"{i}.png": folder / f"{i}.png" for i in range(3)}))


@pytest.mark.parametrize("images", ["images", "."])
def test_a_coco_json_beside_its_pictures(tmp_path, images):
    save_pictures(tmp_path / images)
    data = load_instance_dataset(str(save_coco(tmp_path / "annotations.json")))
    assert list(data) == ["train"]
    check_samples(data["train"])
    assert data["train"][0]["file_name"] == "0.png"


def test_json_files_by_split_with_one_folder_of_pictures(tmp_path):
    folder = save_pictures(tmp_path / "photos")
    empty = coco(annotations=[])
    files = {"train": save_coco(tmp_path / "a.json"), "val": save_coco(tmp_path / "b.json", empty)}
    data = load_instance_dataset(files, image_folder=folder)
    assert list(data) == ["train", "validation"]
    check_samples(data["train"])
    assert [data["validation"][i]["annotations"] for i in range(3)] == [[], [], []]
    by_split = load_instance_dataset(files, image_folder={"train": folder, "validation": folder})
    check_samples(by_split["train"])


def test_the_layout_of_cocos_own_download(tmp_path):
    for split in ("val2017", "train2017"):
        save_coco(tmp_path / "annotations" / f"instances_{split}.json")
        save_pictures(tmp_path / split)
    data = load_instance_dataset(tmp_path)
    assert list(data) == ["train", "validation"]
    check_samples(data["validation"])


def test_a_roboflow_export_without_its_parent_category(tmp_path):
    parent = {"id": 0, "name": "things", "supercategory": "none"}
    children = [{**category, "supercategory": "things"} for category in CATEGORIES]
    for split in ("train", "valid", "test"):
        save_pictures(tmp_path / split)
        save_coco(tmp_path / split / "_annotations.coco.json", coco(categories=[parent, *children]))
    data = load_instance_dataset(tmp_path)
    assert list(data) == ["train", "validation", "test"]
    assert data.id2label == {0: "roof", 1: "tree"}
    assert data.category_ids == [3, 7]
    check_samples(data["test"])
    assert data["test"].coco()["categories"] == [{"id": 3, "name": "roof"}, {"id": 7, "name": "tree"}]


def test_a_category_of_its_own_group_keeps_its_label_without_objects(tmp_path):
    person = {"id": 1, "name": "person", "supercategory": "person"}  # as in COCO
    save_pictures(tmp_path)
    path = save_coco(tmp_path / "a.json", coco(categories=[person, *CATEGORIES]))
    assert load_instance_dataset(path).id2label == {0: "person", 1: "roof", 2: "tree"}


def test_a_parent_that_has_objects_in_any_split_keeps_its_label(tmp_path):
    parent = {"id": 0, "name": "things", "supercategory": "none"}
    categories = [parent, *({**category, "supercategory": "things"} for category in CATEGORIES)]
    used = {"id": 1, "image_id": 100, "category_id": 0, "bbox": [1, 1, 5, 5]}
    for split, annotations in (("train", []), ("valid", [used])):
        save_pictures(tmp_path / split)
        save_coco(tmp_path / split / "_annotations.coco.json", coco(categories=categories, annotations=annotations))
    assert load_instance_dataset(tmp_path).id2label == {0: "things", 1: "roof", 2: "tree"}


def test_the_nuclei_are_read_as_pycocotools_reads_them():
    root = shared_folder("dsb2018_nuclei")
    data = load_instance_dataset(
        {"train": root / "train.json", "validation": root / "val.json"}, image_folder=root / "images"
    )
    for split, file in (("train", "train.json"), ("validation", "val.json")):
        reference = COCO(root / file)
        dataset = data[split]
        assert len(dataset) == len(reference.imgs)
        assert dataset.counts() == {0: ClassCount(len(reference.anns), 0, len(reference.imgs))}
        assert [image["id"] for image in dataset.coco()["images"]] == list(reference.imgs)
        assert dataset.coco()["annotations"] == [
            {**{key: item[key] for key in found}, "category_id": 1}
            for found, item in zip(dataset.coco()["annotations"], reference.anns.values(), strict=True)
        ]
        sample = dataset[5]
        for item in sample["annotations"]:
            mask = coco_mask.merge(coco_mask.frPyObjects(item["segmentation"], sample["height"], sample["width"]))
            assert coco_mask.area(mask) == reference.annToMask(reference.anns[item["id"]]).sum()


def test_original_ids_crowds_and_missing_sizes_are_in_the_ground_truth(tmp_path):
    content = coco()
    for image in content["images"]:
        del image["height"], image["width"]
    dataset = InstanceDataset(content, save_pictures(tmp_path))
    truth = dataset.coco()
    assert [(image["height"], image["width"]) for image in truth["images"]] == SIZES
    assert [image["file_name"] for image in truth["images"]] == ["0.png", "1.png", "2.png"]
    assert truth["annotations"] == coco()["annotations"]
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
    dataset = InstanceDataset(coco(annotations=annotations), pictures())
    [parts], [drawn_rows], [diagonal, box, nothing] = (dataset[i]["annotations"] for i in range(3))
    assert (parts["bbox"], parts["area"], parts["iscrowd"], parts["id"]) == ([1.0, 1.0, 19.0, 14.0], 9 + 50, 0, 1)
    assert (drawn_rows["bbox"], drawn_rows["area"], drawn_rows["id"]) == ([5.0, 10.0, 5.0, 4.0], 20.0, 2)
    assert (diagonal["bbox"], diagonal["area"], diagonal["id"]) == ([0.0, 0.0, 32.0, 32.0], 32.0, 3)
    assert (box["bbox"], box["area"], box["id"]) == ([1.0, 2.0, 3.0, 4.0], 12.0, 4)
    assert "bbox" not in nothing
    assert nothing["id"] == 5


@pytest.mark.parametrize("ids", [[11, 12, 11, 14], [0, 1, 2, 3], ["a", "b", "c", "d"], [None, 1, 2, 3]])
def test_ids_that_are_no_ids_are_replaced_by_running_numbers(ids):
    content = coco()
    for annotation, number in zip(content["annotations"], ids, strict=True):
        annotation["id"] = number
    dataset = InstanceDataset(content, pictures())
    assert [item["id"] for item in dataset.coco()["annotations"]] == [1, 2, 3, 4]
    assert dataset[1]["annotations"][0]["id"] == 4


def test_text_as_image_id_becomes_the_row_number():
    content = coco()
    for image in content["images"]:
        image["id"] = f"photo-{image['id']}"
        del image["file_name"]
    for annotation in content["annotations"]:
        annotation["image_id"] = f"photo-{annotation['image_id']}"
    sample = InstanceDataset(content, pictures())[1]
    assert (sample["image_id"], sample["file_name"]) == (1, "photo-101")
    assert sample["annotations"][0]["image_id"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"id": 9, "image_id": 101, "category_id": 5, "bbox": [0, 0, 1, 1]}]},
            r"image 1 \('1.png', 101\): annotation 0 \(id 9\): category_id 5 is none of the classes \{3: 'roof', 7",
        ),
        ({"annotations": [{"id": 9, "image_id": 55, "category_id": 3}]}, "annotation 9 belongs to image 55"),
        (
            {"annotations": [{"id": 9, "image_id": 100, "category_id": 3, "bbox": [0, 0, 1]}]},
            r"annotation 0 \(id 9\): bbox \[0, 0, 1\] is not",
        ),
        ({"categories": [*CATEGORIES, {"id": 9, "name": "tree"}]}, "7 and 9 are both called 'tree'"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "x"}]}, "category id 3 is defined twice"),
        ({"categories": [{"id": "3", "name": "roof"}]}, "'3' is not a whole number"),
        ({"categories": []}, "define no category"),
        ({"images": [*coco()["images"][:2], coco()["images"][0]]}, "image id 100 is missing or stands for two"),
        ({"images": coco()["images"][:2], "annotations": []}, "3 pictures for 2 images"),
        ({"images": [*coco()["images"], {"id": 1, "file_name": "x.png"}]}, "1 of 4 pictures are not in the list of 3"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        InstanceDataset(coco(**changes), pictures())


def test_keys_of_another_format_are_refused():
    with pytest.raises(ValueError, match="'images', 'annotations' and 'categories'"):
        InstanceDataset({"info": {}, "shapes": []}, pictures())


def test_missing_pictures_are_counted_and_named(tmp_path):
    path = save_coco(tmp_path / "train.json")
    (save_pictures(tmp_path) / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 pictures are not in .*among them '1.png'; give their folder"):
        load_instance_dataset(path)


def test_a_picture_of_another_size_than_the_annotations_say_is_refused():
    content = coco()
    content["images"][1] |= {"height": 30, "width": 50}
    dataset = InstanceDataset(content, pictures())
    with pytest.raises(
        ValueError, match=r"image 1 \('1.png', 101\).*said to be \(30, 50\).*the picture's are \(50, 30"
    ):
        dataset[1]


def test_broken_pictures_and_shapes_are_named(tmp_path):
    content = coco()
    content["annotations"][0] = {"id": 11, "image_id": 100, "category_id": 3, "segmentation": [[1, 2, 3, 4, 5]]}
    dataset = InstanceDataset(content, save_pictures(tmp_path))
    with pytest.raises(ValueError, match=r"image 0 \('0.png', 100\): annotation 0 \(id 11\): polygon 0 has 5 numbers"):
        dataset[0]
    (tmp_path / "1.png").write_bytes(BROKEN)
    with pytest.raises(ValueError, match=r"image 1 \('1.png', 101\): .*cannot be opened"):
        dataset[1]


# Splits


def split_files(folder: Path, **contents: dict) -> dict[str, Path]:
    save_pictures(folder)
    return {split: save_coco(folder / f"{split}.json", content) for split, content in contents.items()}


def test_a_category_that_train_does_not_define_is_refused(tmp_path):
    with_more = [*CATEGORIES, {"id": 9, "name": "road"}]
    annotation = {"id": 1, "image_id": 100, "category_id": 9, "bbox": [0, 0, 4, 4]}
    files = split_files(tmp_path, train=coco(), validation=coco(categories=with_more, annotations=[annotation]))
    with pytest.raises(ValueError, match=r"split 'validation' has the categories \{9: 'road'\}, which split 'train'"):
        load_instance_dataset(files)
    # One that is defined and not used does no harm.
    unused = load_instance_dataset(split_files(tmp_path, train=coco(), validation=coco(categories=with_more)))
    assert unused.id2label == unused["validation"].id2label == {0: "roof", 1: "tree"}


def test_one_id_with_two_names_is_refused(tmp_path):
    renamed = [{"id": 7, "name": "bush"}, {"id": 3, "name": "roof"}]
    files = split_files(tmp_path, train=coco(), validation=coco(categories=renamed))
    with pytest.raises(ValueError, match=r"split 'validation' has the categories \{7: 'bush'\}.*calls \{7: 'tree'\}"):
        load_instance_dataset(files)


def test_an_undefined_category_is_named_with_its_file_image_and_annotation(tmp_path):
    annotation = {"id": 5, "image_id": 101, "category_id": 8, "bbox": [0, 0, 4, 4]}
    files = split_files(tmp_path, train=coco(), validation=coco(annotations=[annotation]))
    message = r"validation.json: image 1 \('1.png', 101\): annotation 0 \(id 5\): category_id 8 is none of the classes"
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(files)


def test_data_sets_with_different_label_maps_do_not_go_together():
    other = InstanceDataset(coco(), pictures(), label_map={3: "roof", 7: "tree", 8: "road"})
    with pytest.raises(ValueError, match="pass the same label_map"):
        InstanceDatasets({"train": other, "validation": InstanceDataset(coco(), pictures())})
    assert other.id2label == {0: "roof", 1: "tree", 2: "road"}


def test_class_names_that_contradict_the_data_are_refused(tmp_path):
    save_pictures(tmp_path)
    path = save_coco(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"not what the data call their classes, \{3: 'roof', 7: 'tree'\}"):
        load_instance_dataset(path, class_names=["a", "b"])
    assert load_instance_dataset(path, class_names={7: "tree", 3: "roof"}).category_ids == [3, 7]


# Counts


def test_counts_by_hand():
    dataset = InstanceDataset(coco(), pictures())
    assert dataset.counts() == {0: ClassCount(1, 0, 1), 1: ClassCount(2, 1, 2)}
    assert dataset.crowded(1) == [("0.png", 2)]
    assert dataset.crowded(2) == []


def test_the_table_shows_classes_and_splits(tmp_path):
    content = coco()
    box = {"image_id": 101, "category_id": 3, "bbox": [0, 0, 4, 4]}
    content["annotations"] += [{**box, "id": 15}, {**box, "id": 16, "iscrowd": 1}]
    data = load_instance_dataset(split_files(tmp_path, train=content, validation=coco()))
    lines = str(data).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["0", "roof", "3", "2", "1", "2", "1", "0", "1"],
        ["1", "tree", "7", "2", "1", "2", "2", "1", "2"],
    ]
    assert lines[3:] == [
        "train: 3 images, 1 of them without objects; 4 objects, 1 of them without a mask; at most 2 in one image",
        "validation: 3 images, 1 of them without objects; 3 objects, 0 of them without a mask; at most 2 in one image",
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


# YOLO


def save_yolo(root: Path, lines: dict[str, list[str]], yaml: str) -> Path:
    save_pictures(root / "images" / "train")
    for name, content in lines.items():
        path = root / "labels" / "train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(content) + "\n")
    (root / "data.yaml").write_text(yaml)
    return root


NAMED = "names: [roof, tree]\ntrain: images/train\n"


def test_yolo_polygons_and_boxes(tmp_path):
    lines = {
        "0": ["1 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75", "", "0 0.5 0.5 0.25 0.5"],  # 60 x 40 pixels
        "1": ["1 0.0 0.0 1.0 0.0 1.0 0.5"],
    }
    data = load_instance_dataset(save_yolo(tmp_path, lines, NAMED))
    dataset = data["train"]
    assert data.id2label == {0: "roof", 1: "tree"}
    assert data.category_ids == [0, 1]
    polygon, box = dataset[0]["annotations"]
    assert polygon["segmentation"] == [[15.0, 10.0, 30.0, 10.0, 30.0, 30.0, 15.0, 30.0]]
    assert (polygon["category_id"], polygon["bbox"], polygon["area"]) == (1, [15.0, 10.0, 15.0, 20.0], 300.0)
    assert (box["category_id"], box["bbox"], box["area"]) == (0, [22.5, 10.0, 15.0, 20.0], 300.0)
    assert "segmentation" not in box
    assert dataset[1]["annotations"][0]["segmentation"] == [[0.0, 0.0, 30.0, 0.0, 30.0, 25.0]]
    assert dataset[2]["annotations"] == []
    assert [dataset[i]["file_name"] for i in range(3)] == [f"images/train/{i}.png" for i in range(3)]
    assert "3 objects, 1 of them without a mask" in str(data)


def test_yolo_fractions_are_of_the_upright_picture(tmp_path):
    save_yolo(tmp_path, {"a": ["0 0.0 0.0 0.5 0.0 0.5 0.25 0.0 0.25"]}, NAMED)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "images" / "train" / "a.jpg", exif=exif)
    sample = load_instance_dataset(tmp_path / "data.yaml")["train"][3]
    assert sample["image"].size == (40, 60)
    assert (sample["width"], sample["height"]) == (40, 60)
    assert sample["annotations"][0]["bbox"] == [0.0, 0.0, 20.0, 15.0]


@pytest.mark.parametrize(
    "yaml",
    [
        "names: {0: roof, 1: tree}\npath: .\ntrain: [images/train]\nval: list.txt\n",
        "names: [roof, tree]\npath: /not/there\ntrain: ../images/train\nvalid: list.txt\n",  # as Roboflow writes it
        "names: [roof, tree]\nnc: 2\ntrain: images/\nval: [list.txt]\n",
    ],
)
def test_yolo_folders_and_lists(tmp_path, yaml):
    save_yolo(tmp_path, {"2": ["1 0 0 1 0 1 1"]}, yaml)
    (tmp_path / "list.txt").write_text("./images/train/2.png\nimages/train/0.png\n")
    data = load_instance_dataset(tmp_path)
    assert {split: len(dataset) for split, dataset in data.items()} == {"train": 3, "validation": 2}
    assert len(data["train"][2]["annotations"]) == len(data["validation"][0]["annotations"]) == 1
    assert data["validation"][1]["image"].size == (60, 40)


def test_yolo_classes_without_names_are_numbered_or_named_by_the_caller(tmp_path):
    save_yolo(tmp_path, {}, "nc: 2\ntrain: images/train\n")
    assert load_instance_dataset(tmp_path).id2label == {0: "0", 1: "1"}
    assert load_instance_dataset(tmp_path, class_names=NAMES).id2label == {0: "roof", 1: "tree"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"1.txt, line 1: class 2 is none of \{0: 'roof', 1: 'tree'\}"),
        ("0 0.5 0.5 0.1 0.1 0.3", "5 numbers follow the class"),
        ("0 0.5 0.5", "2 numbers follow the class"),
        ("0 10 20 30 40", r"10 lies outside \[0, 1\].*divide by them"),
        ("0 nan 0 0 1 1 1", r"nan lies outside"),
        ("roof 0.5 0.5 0.1 0.1", "does not hold numbers"),
    ],
)
def test_yolo_lines_that_cannot_be_read_are_named(tmp_path, line, message):
    save_yolo(tmp_path, {"1": [line]}, NAMED)
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(tmp_path)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [roof]\n", "give 'train', 'val' or 'test'"),
        ("names: [roof]\ntrain: photos\n", "photos is not there; correct 'train'"),
        ("names: [roof]\ntrain: labels\n", "there are no pictures in 'labels'"),
        ("train: images/train\n", "define no category"),
        ("names: [\n", "is no YAML"),
        ("- 1\n", "holds no keys"),
    ],
)
def test_a_yolo_description_that_cannot_be_read_is_refused(tmp_path, yaml, message):
    save_yolo(tmp_path, {"0": []}, yaml)
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(tmp_path)


# Rows of the library datasets


def columns(items: list[dict]) -> dict[str, list]:
    return {key: [item[key] for item in items] for key in ("id", "category", "bbox", "segmentation", "area", "iscrowd")}


def rows(category=lambda number: number, as_columns: bool = False, **more) -> list[dict]:
    """The data as rows; `category` turns a category id into what the rows hold."""
    result = []
    for index, items in enumerate(objects()):
        named = [{**item, "category": category(item.pop("category_id"))} for item in items]
        listed = columns(named) if as_columns else named
        result.append({"image_id": 100 + index, "image": pictures()[index], "objects": listed})
    return result


def features(category, as_columns: bool, sequence=None):
    number, text = datasets.Value("int64"), datasets.Value("float32")
    fields = {"id": number, "category": category, "area": text, "iscrowd": number}
    many = sequence or datasets.Sequence
    lists = {"bbox": many(text, length=4) if sequence is None else many(text), "segmentation": many(many(text))}
    objects_ = {**fields, **lists}
    if as_columns:
        objects_ = {key: many(feature) for key, feature in objects_.items()}
    else:
        objects_ = [objects_]
    return datasets.Features({"image_id": number, "image": datasets.Image(), "objects": objects_})


INDEX = {3: 0, 7: 1}
ID_TO_NAME = {3: "roof", 7: "tree"}


@pytest.mark.parametrize("as_columns", [True, False], ids=["dict of lists", "list of dicts"])
@pytest.mark.parametrize("kind", ["ClassLabel", "text", "number"])
def test_rows_of_every_form(as_columns, kind):
    category, feature = {
        "ClassLabel": (INDEX.get, datasets.ClassLabel(names=NAMES)),
        "text": (ID_TO_NAME.get, datasets.Value("string")),
        "number": (lambda number: number, datasets.Value("int32")),
    }[kind]
    table = datasets.Dataset.from_list(rows(category, as_columns), features=features(feature, as_columns))
    data = load_instance_dataset(table)
    assert list(data) == ["train"]
    dataset = data["train"]
    check_samples(dataset)
    assert data.id2label == ({0: "3", 1: "7"} if kind == "number" else {0: "roof", 1: "tree"})
    assert data.category_ids == ([3, 7] if kind == "number" else [0, 1])
    assert [dataset[i]["image_id"] for i in range(3)] == [100, 101, 102]
    assert dataset.counts() == {0: ClassCount(1, 0, 1), 1: ClassCount(2, 1, 2)}
    truth = dataset.coco()
    assert [(image["height"], image["width"]) for image in truth["images"]] == SIZES
    assert [item["category_id"] for item in truth["annotations"]] == (
        [7, 3, 7, 7] if kind == "number" else [1, 0, 1, 1]
    )
    assert dataset.crowded(1) == [(100, 2)]


def test_the_nested_sequences_of_older_data_sets():
    """Sequence({...}) is what scripts wrote; it is stored as a dict of lists."""
    number, real = datasets.Value("int64"), datasets.Value("float32")
    inner = {
        **{"id": number, "category": datasets.ClassLabel(names=NAMES), "area": real, "iscrowd": number},
        "bbox": datasets.Sequence(real, length=4),
        "segmentation": datasets.Sequence(datasets.Sequence(real)),
    }
    nested = datasets.Features({"image_id": number, "image": datasets.Image(), "objects": datasets.Sequence(inner)})
    table = datasets.Dataset.from_list(rows(INDEX.get, as_columns=True), features=nested)
    check_samples(load_instance_dataset(table)["train"])


def test_large_lists_of_class_labels():
    schema = features(datasets.ClassLabel(names=NAMES), as_columns=True, sequence=datasets.LargeList)
    data = load_instance_dataset(datasets.Dataset.from_list(rows(INDEX.get, as_columns=True), features=schema))
    assert data.id2label == {0: "roof", 1: "tree"}
    check_samples(data["train"])


def test_other_usual_names_and_missing_fields():
    renamed = [
        {
            "img": row["image"],
            "id": f"photo {index}",
            "annotations": [{"label": ID_TO_NAME[i["category_id"]], "polygons": i["segmentation"]} for i in items],
        }
        for index, (row, items) in enumerate(zip(rows(), objects(), strict=True))
    ]
    dataset = load_instance_dataset(datasets.Dataset.from_list(renamed))["train"]
    sample = dataset[0]
    assert (sample["image_id"], sample["file_name"]) == (0, "photo 0")
    assert [item["id"] for item in sample["annotations"]] == [1, 2, 3]
    assert [item["category_id"] for item in sample["annotations"]] == [1, 0, 1]
    assert sample["annotations"][1]["bbox"] == [1.0, 1.0, 19.0, 14.0]
    assert sample["annotations"][1]["area"] == 59.0
    assert [item["iscrowd"] for item in sample["annotations"]] == [0, 0, 0]
    assert [item["id"] for item in dataset.coco()["annotations"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("as_columns", [True, False])
@pytest.mark.parametrize("missing", [None, {"size": None, "counts": None}])
def test_rle_in_rows(as_columns, missing):
    mask = np.zeros((40, 60), np.uint8)
    mask[3:9, 7:30] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    listed = [{"category": "roof", "mask": rle}, {"category": "roof", "mask": missing, "bbox": [1.0, 2.0, 3.0, 4.0]}]
    for item in listed:
        item.setdefault("bbox", None)
    content = {key: [item[key] for item in listed] for key in listed[0]} if as_columns else listed
    table = datasets.Dataset.from_list([{"image": pictures()[0], "objects": content}])
    dataset = load_instance_dataset(table)["train"]
    first, second = dataset[0]["annotations"]
    assert (first["bbox"], first["area"]) == ([7.0, 3.0, 23.0, 6.0], 138.0)
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), mask)
    assert (second["bbox"], second["area"]) == ([1.0, 2.0, 3.0, 4.0], 12.0)
    assert "2 objects, 1 of them without a mask" in str(InstanceDatasets({"train": dataset}))


def test_class_names_name_numbers_and_order_texts():
    numbers = datasets.Dataset.from_list(rows())
    data = load_instance_dataset(numbers, class_names={3: "roof", 7: "tree", 9: "road"})
    assert (data.id2label, data.category_ids) == ({0: "roof", 1: "tree", 2: "road"}, [3, 7, 9])
    check_samples(data["train"])
    texts = datasets.Dataset.from_list(rows(ID_TO_NAME.get))
    data = load_instance_dataset(texts, class_names=["tree", "roof"])
    assert data.id2label == {0: "tree", 1: "roof"}
    assert [item["category_id"] for item in data["train"][0]["annotations"]] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"split 'train'.*annotation 0 .*category_id 7 is none of the classes"):
        load_instance_dataset(numbers, class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="category_id 'roof' is none of"):
        load_instance_dataset(texts, class_names=["tree", "road"])


def test_splits_of_rows_share_one_label_map():
    table = datasets.Dataset.from_list(rows(ID_TO_NAME.get))
    data = load_instance_dataset(datasets.DatasetDict({"train": table.select([1, 2]), "valid": table}))
    assert data["train"].id2label == data["validation"].id2label == {0: "roof", 1: "tree"}
    assert len(data["train"]) == 2
    check_samples(data["validation"])


def test_class_labels_that_differ_between_splits_are_refused():
    tables = [
        datasets.Dataset.from_list(rows(INDEX.get), features=features(datasets.ClassLabel(names=names), False))
        for names in (NAMES, ["roof", "bush"])
    ]
    with pytest.raises(ValueError, match=r"\{1: 'bush'\}, which split 'train' calls \{1: 'tree'\}"):
        load_instance_dataset({"train": tables[0], "validation": tables[1]})


def test_a_class_label_outside_its_names_is_refused_with_its_place():
    schema = features(datasets.Value("int64"), as_columns=False)
    table = datasets.Dataset.from_list(rows(), features=schema)
    wrong = table.with_format("arrow")
    label = features(datasets.ClassLabel(names=NAMES), as_columns=False)
    relabelled = datasets.Dataset(wrong.data.table, info=datasets.DatasetInfo(features=label))
    message = (
        r"split 'train': image 0 \(100\): annotation 0 \(id 11\): category_id 7 is none of the classes \{0: 'roof'"
    )
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(relabelled)


def test_annotations_are_read_without_decoding_pictures():
    broken = [
        {**row, "image": {"bytes": BROKEN, "path": None}, "height": size[0], "width": size[1]}
        for row, size in zip(rows(), SIZES, strict=True)
    ]
    schema = features(datasets.Value("int64"), as_columns=False)
    sizes = {"height": datasets.Value("int64"), "width": datasets.Value("int64")}
    data = load_instance_dataset(datasets.Dataset.from_list(broken, features=datasets.Features({**schema, **sizes})))
    assert "3 objects" in str(data)
    assert [(image["height"], image["width"]) for image in data["train"].coco()["images"]] == SIZES
    with pytest.raises(ValueError, match="cannot"):
        data["train"][0]


def test_sizes_of_rows_come_from_the_headers_of_the_files():
    file = BytesIO()
    pictures()[0].save(file, "PNG")
    cut_off = {"bytes": file.getvalue()[:100], "path": None}
    content = [{"image": cut_off, "objects": [{"category": 3, "bbox": [1.0, 2.0, 3.0, 4.0]}]}]
    item = {"category": datasets.Value("int64"), "bbox": datasets.Sequence(datasets.Value("float32"))}
    plain = datasets.Features({"image": datasets.Image(), "objects": [item]})
    truth = load_instance_dataset(datasets.Dataset.from_list(content, features=plain))["train"].coco()
    assert truth["images"] == [{"id": 0, "height": 40, "width": 60}]


def test_splits_whose_categories_are_of_two_kinds_are_refused():
    tables = [datasets.Dataset.from_list(rows(category)) for category in (ID_TO_NAME.get, lambda number: number)]
    with pytest.raises(ValueError, match=r"\{'train': 'string', 'test': 'number'\}; give them one type"):
        load_instance_dataset({"train": tables[0], "test": tables[1]})


def test_rows_that_were_selected_or_formatted_read_alike():
    table = datasets.Dataset.from_list(rows() + rows()).select([3, 1, 5]).with_format("torch")
    with pytest.raises(ValueError, match="none of the classes"):
        load_instance_dataset(table, class_names=["x"])
    check_samples(load_instance_dataset(table)["train"])


def test_folders_that_the_library_reads(tmp_path):
    table = datasets.Dataset.from_list(
        rows(INDEX.get), features=features(datasets.ClassLabel(names=NAMES), as_columns=False)
    )
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    data = load_instance_dataset(tmp_path / "parquet", cache_dir=str(tmp_path / "cache"))
    assert data.id2label == {0: "roof", 1: "tree"}
    check_samples(data["train"])
    one = load_instance_dataset(tmp_path / "parquet", split="train", cache_dir=str(tmp_path / "cache"))
    assert list(one) == ["train"]
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    check_samples(load_instance_dataset(tmp_path / "saved")["train"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": 1, "text": "a"}], r"a row has \['image', 'text'\] and none of \['objects'"),
        ([{"objects": [{"category": 1}]}], "none of .'image'"),
        ([{"image": "a.png", "objects": [1, 2]}], "not objects"),
        ([{"image": "a.png", "objects": [{"bbox": [1, 2, 3, 4]}]}], "none of .'category'"),
        ([{"image": "a.png", "objects": {"category": [1, 2], "area": [1.0]}}], "the lists of the objects have the len"),
        ([{"image": "a.png", "objects": [{"category": None, "id": 1}, {"category": 3, "id": 2}]}], "has no category"),
        ([{"image": "a", "image_id": 4, "objects": [{"category": 3}]}] * 2, "image id 4 stands for 2 images"),
    ],
)
def test_rows_without_what_is_needed_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(datasets.Dataset.from_list(content))


def test_without_the_library_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-rfdetr\[train\]"'):
        load_instance_dataset("someone/buildings")
    save_pictures(tmp_path)
    check_samples(load_instance_dataset(save_coco(tmp_path / "a.json"))["train"])


# Sources


def test_an_empty_folder_is_refused_with_what_can_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be loaded.*give a data set id on the Hub"):
        load_instance_dataset(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/not/there/at/all", "neither a folder nor a data set id; give a data set id on the Hub"),
        ("not/there/train.json", "cannot be read"),
        (5, "5 is no source of data"),
        ({}, "is no source of data"),
    ],
)
def test_an_unknown_source_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(source)


def test_files_that_are_no_json_are_refused(tmp_path):
    path = tmp_path / "train.json"
    for content, message in (("{", "is no JSON"), ("[1]", "holds a list"), ('{"a": 1}', r"train.json: the keys are")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_instance_dataset(path)


def test_arguments_for_rows_are_refused_for_files(tmp_path):
    save_pictures(tmp_path)
    path = save_coco(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"\['streaming', 'revision'\] are for rows"):
        load_instance_dataset(path, streaming=True, revision="main")


# Inputs and labels


def same(first, second) -> bool:
    """Whether two samples or batches hold the same tensors."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second)


def loader(dataset, num_workers: int = 0, **arguments) -> DataLoader:
    return DataLoader(dataset, collate_fn=collate_fn, num_workers=num_workers, **{"batch_size": 2, **arguments})


def test_prepared_samples_are_what_the_processor_makes():
    dataset = InstanceDataset(coco(), pictures())
    prepared = dataset.with_processor(processor())
    assert prepared.dataset is dataset
    assert len(prepared) == 3
    for index in range(3):
        sample = dataset[index]
        target = {"image_id": sample["image_id"], "annotations": sample["annotations"]}
        expected = processor()(sample["image"], target, return_segmentation_masks=True)
        found = prepared[index]
        assert found.keys() == {"pixel_values", "labels"}
        assert type(found["labels"]) is dict
        assert torch.equal(found["pixel_values"], expected["pixel_values"][0])
        assert same(found["labels"], dict(expected["labels"][0]))
    assert prepared[0]["labels"]["class_labels"].tolist() == [1, 0]  # without the crowd
    assert prepared[0]["labels"]["masks"].shape == (2, 24, 24)
    assert prepared[2]["labels"]["masks"].shape == (0, 24, 24)
    assert "masks" not in dataset.with_processor(processor(), masks=False)[0]["labels"]


def test_batches_of_one_size_are_stacked():
    prepared = InstanceDataset(coco(), pictures()).with_processor(processor())
    batch = collate_fn([prepared[0], prepared[1]])
    assert batch.keys() == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert same(batch["labels"], [prepared[0]["labels"], prepared[1]["labels"]])


@pytest.mark.parametrize("do_pad", [True, False])
def test_batches_of_several_sizes_are_padded_as_the_processor_pads_them(do_pad):
    flexible = {"shortest_edge": 24, "longest_edge": 48}
    dataset = InstanceDataset(coco(), pictures())
    prepared = dataset.with_processor(RfDetrImageProcessor(size=flexible, do_pad=do_pad))
    assert ("pixel_mask" in prepared[0]) == do_pad
    batch = collate_fn([prepared[i] for i in range(3)])
    samples = [dataset[i] for i in range(3)]
    targets = [{"image_id": s["image_id"], "annotations": s["annotations"]} for s in samples]
    expected = RfDetrImageProcessor(size=flexible)(
        [s["image"] for s in samples], targets, return_segmentation_masks=True
    )
    assert batch["pixel_values"].shape == (3, 3, 40, 36)
    assert same(batch["pixel_values"], expected["pixel_values"])
    assert same(batch["pixel_mask"], expected["pixel_mask"])
    assert same(batch["labels"], [dict(label) for label in expected["labels"]])


def test_draws_follow_from_seed_epoch_and_index_alone():
    prepared = drawn().with_processor(processor(), augmentation=FlipAndCrop(), seed=5)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    forwards = [prepared[index] for index in range(8)]
    backwards = [prepared[index] for index in reversed(range(8))][::-1]
    assert same(forwards, backwards)
    assert same(prepared[-1], forwards[-1])
    prepared.set_epoch(1)
    later = [prepared[index] for index in range(8)]
    assert sum(not same(*pair) for pair in zip(forwards, later, strict=True)) > 3
    prepared.set_epoch(0)
    assert same([prepared[index] for index in range(8)], forwards)
    other = drawn().with_processor(processor(), augmentation=FlipAndCrop(), seed=6)
    assert not same([other[index] for index in range(8)], forwards)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_each_index_has_draws_of_its_own():
    [image], content = draw_dataset(1)
    content["images"] = [{**content["images"][0], "id": number} for number in range(6)]
    content["annotations"] = []
    prepared = InstanceDataset(content, [image] * 6).with_processor(processor(), augmentation=FlipAndCrop())
    assert len({prepared[index]["pixel_values"].numpy().tobytes() for index in range(6)}) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_order_change_nothing(num_workers):
    prepared = drawn().with_processor(processor(), augmentation=FlipAndCrop(), seed=5)
    prepared.set_epoch(4)
    expected = [prepared[index] for index in range(8)]
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    batches = list(loader(prepared, num_workers, sampler=order))
    assert same([label for batch in batches for label in batch["labels"]], [expected[i]["labels"] for i in order])
    found = list(itertools.chain.from_iterable(batch["pixel_values"] for batch in batches))
    assert same(found, [expected[i]["pixel_values"] for i in order])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_persistent_workers_follow_the_epoch(start):
    prepared = drawn(2).with_processor(processor(), augmentation=FlipAndCrop())
    batches = loader(prepared, num_workers=1, persistent_workers=True, multiprocessing_context=start)
    for epoch in range(3):
        prepared.set_epoch(epoch)
        [batch] = batches
        assert same(batch, collate_fn([prepared[0], prepared[1]]))


def test_prepared_data_can_be_pickled():
    prepared = drawn(2).with_processor(processor(), augmentation=FlipAndCrop())
    prepared.set_epoch(3)
    assert same(pickle.loads(pickle.dumps(prepared))[1], prepared[1])


def test_the_callback_tells_the_epoch_that_begins():
    prepared = drawn(2).with_processor(processor(), augmentation=FlipAndCrop())
    prepared.set_epoch(2)
    expected = [prepared[0], prepared[1]]
    prepared.set_epoch(0)
    assert not same([prepared[0], prepared[1]], expected)
    state = TrainerState(epoch=2.0)
    FollowEpoch().on_epoch_begin(None, state, None, train_dataloader=loader(prepared))
    assert same([prepared[0], prepared[1]], expected)
    FollowEpoch().on_epoch_begin(None, state, None, train_dataloader=loader([1, 2]))  # of no concern to it


def test_the_stock_trainer_draws_anew_in_each_epoch(tmp_path):
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def forward(self, pixel_values, labels):
            self.seen += [round(float(picture.double().sum()), 3) for picture in pixel_values]
            return {"loss": self.weight**2}

    # Each epoch cuts other squares, and so has other sums of pixels.
    prepared = drawn(4).with_processor(processor(), augmentation=FlipAndCrop(crop=1.0, crop_sides=(100, 300)))
    expected = []
    for epoch in range(2):
        prepared.set_epoch(epoch)
        expected.append(sorted(round(float(prepared[i]["pixel_values"].double().sum()), 3) for i in range(4)))
    prepared.set_epoch(0)
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = Recorder()
    Trainer(model, arguments, data_collator=collate_fn, train_dataset=prepared, callbacks=[FollowEpoch()]).train()
    assert [sorted(model.seen[:4]), sorted(model.seen[4:])] == expected
    assert expected[0] != expected[1]


def test_torchvision_pipelines_are_wrapped():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    mirrored = drawn(2).with_processor(processor(), augmentation=v2.Compose([v2.RandomHorizontalFlip(p=1.0)]))
    plain = drawn(2).with_processor(processor(), augmentation=FlipAndCrop(flip=1.0, crop=0.0))
    assert torch.equal(mirrored[0]["pixel_values"], plain[0]["pixel_values"])
    assert mirrored[0]["labels"]["masks"].shape == plain[0]["labels"]["masks"].shape


def test_errors_while_a_sample_is_prepared_name_it():
    def broken(picture, annotations, rng):
        raise ValueError("no luck")

    with pytest.raises(ValueError, match=r"0.png, image_id 100: no luck"):
        InstanceDataset(coco(), pictures()).with_processor(processor(), augmentation=broken)[0]
    with pytest.raises(ValueError, match="seed -1 is not"):
        PreparedDataset(drawn(1), processor(), seed=-1)


# Streams


def stream(num_shards: int, num_rows: int = 12, **arguments):
    item = {"category": datasets.ClassLabel(names=NAMES), "bbox": datasets.Sequence(datasets.Value("float32"))}
    schema = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": [item]})
    content = [
        {
            "image_id": number,
            "image": PIL.Image.new("RGB", (30, 20), (number, 0, 0)),
            "objects": [{"category": 1, "bbox": [1.0, 2.0, 10.0, 10.0]}],
        }
        for number in range(num_rows)
    ]
    table = datasets.Dataset.from_list(content, features=schema)
    split = load_instance_dataset(table.to_iterable_dataset(num_shards=num_shards))["train"]
    return split.with_processor(processor(), masks=False, **arguments)


def seen(prepared, num_workers: int = 0, limit: int | None = None) -> list[int]:
    batches = loader(prepared, num_workers=num_workers, batch_size=1)
    return [int(batch["labels"][0]["image_id"]) for batch in itertools.islice(batches, limit)]


def test_a_stream_gives_samples_with_labels():
    prepared = stream(1, repeat=False)
    assert isinstance(prepared.stream, InstanceStream)
    assert prepared.stream.id2label == {0: "roof", 1: "tree"}
    samples = list(prepared)
    assert [int(sample["labels"]["image_id"]) for sample in samples] == list(range(12))
    assert samples[3]["labels"]["class_labels"].tolist() == [1]
    red = (3 / 255 - 0.485) / 0.229
    assert samples[3]["pixel_values"][0].mean() == pytest.approx(red, abs=1e-5)
    assert "streamed, not counted" in str(InstanceDatasets({"train": prepared.stream}))


# Of two workers on three shards, one has more to read than the other, so that their endless epochs end apart.
@pytest.mark.parametrize(
    ("num_shards", "num_workers", "repeat"),
    [*itertools.product((3, 4), (0, 2), (False,)), (3, 0, True), (4, 0, True), (4, 2, True)],
)
def test_two_processes_see_each_row_of_an_epoch_once(num_shards, num_workers, repeat):
    arguments = {"repeat": repeat, "buffer_size": 4}
    parts = [stream(num_shards, process=(rank, 2), **arguments) for rank in range(2)]
    limit = 6 if repeat else None
    found = [seen(part, num_workers, limit) for part in parts]
    assert sorted(found[0] + found[1]) == list(range(12))
    assert [len(part) for part in found] == [6, 6]
    assert [seen(part, num_workers, limit) for part in parts] == found


def test_processes_are_known_from_the_environment(monkeypatch):
    prepared = stream(2, repeat=False)
    assert len(list(prepared)) == 12
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found += seen(prepared)
    assert sorted(found) == list(range(12))


def test_an_endless_stream_is_shuffled_anew_in_each_epoch():
    prepared = stream(3, repeat=True, buffer_size=6, seed=2)
    order = seen(prepared, limit=36)
    epochs = [order[start : start + 12] for start in (0, 12, 24)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    prepared.set_epoch(1)
    assert seen(prepared, limit=24) == epochs[1] + epochs[2]


def test_draws_of_a_stream_follow_from_seed_epoch_and_place():
    def samples(**arguments):
        prepared = stream(2, augmentation=FlipAndCrop(), repeat=False, **arguments)
        return [sample["labels"]["boxes"] for sample in prepared]

    def epoch(number):
        prepared = stream(2, augmentation=FlipAndCrop(), repeat=False)
        prepared.set_epoch(number)
        return [sample["labels"]["boxes"] for sample in prepared]

    assert same(samples(), samples())
    assert not same(samples(), samples(seed=1))
    assert same(epoch(0), samples())
    assert not same(epoch(0), epoch(1))


def test_each_process_and_each_worker_has_draws_of_its_own():
    # All rows hold the same box; 2 shards of 6 rows.
    arguments = {"augmentation": FlipAndCrop(crop=1.0, crop_sides=(200, 500)), "repeat": False}
    processes = [[sample["labels"]["boxes"] for sample in stream(2, process=(rank, 2), **arguments)] for rank in (0, 1)]
    assert len(processes[0]) == len(processes[1]) == 6
    assert not same(*processes)
    batches = [batch["labels"][0]["boxes"] for batch in loader(stream(2, **arguments), num_workers=2, batch_size=1)]
    assert len(batches) == 12
    assert not same(batches[::2], batches[1::2])


def test_a_worker_without_a_shard_ends_instead_of_waiting():
    assert sorted(seen(stream(1, num_rows=3), num_workers=2, limit=6)) == [0, 0, 1, 1, 2, 2]


def test_a_stream_without_class_names_needs_them():
    table = datasets.Dataset.from_list(rows(ID_TO_NAME.get)).to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream cannot be searched for them; give class_names"):
        load_instance_dataset(table)
    split = load_instance_dataset(table, class_names=NAMES)["train"]
    samples = list(split.with_processor(processor(), repeat=False))
    assert samples[0]["labels"]["class_labels"].tolist() == [1, 0]
    assert samples[0]["labels"]["masks"].shape == (2, 24, 24)
    numbers = datasets.Dataset.from_list(rows()).to_iterable_dataset()
    wrong = load_instance_dataset(numbers, class_names=NAMES)["train"].with_processor(processor(), repeat=False)
    with pytest.raises(ValueError, match=r"row 0: annotation 0 .id 11.: category_id 7 is none of the classes"):
        list(wrong)


def test_a_stream_may_declare_no_features():
    table = datasets.IterableDataset.from_generator(lambda: iter(rows(ID_TO_NAME.get)))
    split = load_instance_dataset(table, class_names=NAMES)["train"]
    assert len(list(split.with_processor(processor(), repeat=False))) == 3


def test_folders_are_streamed(tmp_path):
    table = datasets.Dataset.from_list(
        rows(INDEX.get), features=features(datasets.ClassLabel(names=NAMES), as_columns=False)
    )
    table.to_parquet(tmp_path / "train.parquet")
    data = load_instance_dataset(tmp_path, streaming=True)
    assert data.id2label == {0: "roof", 1: "tree"}
    assert len(list(data["train"].with_processor(processor(), repeat=False))) == 3
