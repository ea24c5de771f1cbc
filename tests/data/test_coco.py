"""COCO JSON files of every layout become the same samples, with one label map for all splits."""

import importlib.util
import json
import random
import unicodedata

import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from annotated_images import (
    CATEGORIES,
    check_samples,
    make_annotations,
    make_coco,
    make_images,
    save_coco,
    save_images,
    split_files,
)
from transformers_rfdetr import check_dataset, load_instance_dataset
from transformers_rfdetr.data.dataset import ClassCount

from small_models import shared_folder


@pytest.mark.parametrize("images", ["images", "."])
def test_a_coco_json_beside_its_images(tmp_path, images):
    save_images(tmp_path / images)
    data = load_instance_dataset(str(save_coco(tmp_path / "annotations.json")))
    assert list(data) == ["train"]
    check_samples(data["train"])
    assert data["train"][0]["file_name"] == "0.png"


def test_json_files_by_split_with_one_folder_of_images(tmp_path):
    folder = save_images(tmp_path / "photos")
    empty = make_coco(annotations=[])
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
        save_images(tmp_path / split)
    data = load_instance_dataset(tmp_path)
    assert list(data) == ["train", "validation"]
    check_samples(data["validation"])


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["annotations/instances_Train.json", "annotations/instances_Validation.json"], ["train", "validation"]),
        (["annotations/instances_default.json"], ["train"]),
        (["annotations/instances_val2017.json"], ["validation"]),
        (["Train/_annotations.coco.json", "VAL/_annotations.coco.json"], ["train", "validation"]),
        (["trainval.json"], ["train"]),
        (["trainval.json", "test.json"], ["train", "test"]),
        (["annotations/lvis_v1_train.json", "annotations/lvis_v1_val.json"], ["train", "validation"]),
        (["train/labels.json", "valid/labels.json"], ["train", "validation"]),
    ],
)
def test_splits_are_recognised_by_the_names_that_tools_give_them(tmp_path, files, splits):
    for file in files:
        save_coco(tmp_path / file)
    save_images(tmp_path / "images" / "all")
    data = load_instance_dataset(tmp_path)
    assert list(data) == splits
    assert check_dataset(tmp_path).splits.keys() == set(splits)
    for split in data.values():
        check_samples(split)


def test_two_files_for_one_split_are_refused(tmp_path):
    for year in (2014, 2017):
        save_coco(tmp_path / "annotations" / f"instances_train{year}.json")
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=r"instances_train2014\.json .*instances_train2017\.json .*'train'"):
            read(tmp_path)
        with pytest.raises(ValueError, match="'validation'"):
            read({"val": tmp_path / "a.json", "valid": tmp_path / "b.json"})


def test_other_json_files_are_not_read_as_coco(tmp_path):
    (tmp_path / "labels.json").write_text('{"shapes": [], "images": []}')
    with pytest.raises(ValueError, match="shapes"):  # `datasets` reads it
        load_instance_dataset(tmp_path)


def test_the_folders_of_images_have_the_names_of_the_splits(tmp_path):
    file = {"val": save_coco(tmp_path / "a.json")}
    folder = save_images(tmp_path / "elsewhere" / "photos")
    save_images(tmp_path / "elsewhere" / "other")
    for read in (load_instance_dataset, check_dataset):
        assert list(getattr(read(file, image_folder={"val": folder}), "splits", ["validation"])) == ["validation"]
        with pytest.raises(ValueError, match=r"image_folder. .*\['validation'\], got \['train'\]"):
            read(file, image_folder={"train": folder})
    assert not check_dataset(file, image_folder={"val": folder}).has_errors


# Names of images that another computer wrote


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ("images\\0.png", "images/0.png"),
        ("images\\\\0.png", "images/0.png"),
        (unicodedata.normalize("NFC", "größe.png"), unicodedata.normalize("NFD", "größe.png")),
        (unicodedata.normalize("NFD", "größe.png"), unicodedata.normalize("NFC", "größe.png")),
        ("Images/0.PNG", "images/0.png"),
        ("0.png", "sub/folder/0.png"),
        ("C:\\Users\\me\\data\\0.png", "sub/0.png"),
        ("/home/me/data/0.png", "0.png"),
        ("upload/1/0.png", "0.png"),
    ],
)
def test_an_image_is_found_under_the_name_that_it_has_here(tmp_path, hf_log, stated, found):
    content = make_coco(images=[make_coco()["images"][0] | {"file_name": stated}], annotations=make_annotations()[0])
    for annotation in content["annotations"]:
        annotation["image_id"] = 100
    path = save_coco(tmp_path / "data" / "a.json", content)
    (tmp_path / "data" / found).parent.mkdir(parents=True, exist_ok=True)
    make_images()[0].save(tmp_path / "data" / found)
    [sample] = load_instance_dataset(path, image_folder=tmp_path / "data")["train"]
    assert sample["file_name"] == found
    is_visible = unicodedata.normalize("NFC", stated) != unicodedata.normalize("NFC", found)
    renaming = f"{found!r} for {stated!r}" if is_visible else f"{found!a} for {stated!a}"
    assert "1 of 1 images" in hf_log.text
    assert f"such as {renaming}. " in hf_log.text
    report = check_dataset(path, image_folder=tmp_path / "data", fix=tmp_path / "fixed")
    assert (report.count("renamed_file"), report.has_errors) == (1, False)
    assert load_instance_dataset(tmp_path / "fixed")["train"][0]["file_name"] == found


@pytest.mark.parametrize(
    ("stated", "files"),
    [
        (["0.png"], ["a/0.png", "b/0.png"]),  # either may be meant
        (["a/0.png", "b/0.png"], ["c/0.png"]),  # one file for two images
        (["../0.png"], ["a/0.png"]),
        (["0.png"], [".trash/0.png"]),
    ],
)
def test_an_image_that_may_be_another_one_is_missing(tmp_path, stated, files):
    images = [make_coco()["images"][0] | {"id": 1 + i, "file_name": name} for i, name in enumerate(stated)]
    path = save_coco(tmp_path / "data" / "a.json", make_coco(images=images, annotations=[]))
    for file in files:
        (tmp_path / "data" / file).parent.mkdir(parents=True)
        make_images()[0].save(tmp_path / "data" / file)
    with pytest.raises(ValueError, match=r"1 of [12]"):
        load_instance_dataset(path)
    report = check_dataset(path)
    assert report.count("missing_file") + report.count("unsafe_file_name") == 1


def test_images_of_lvis_are_named_by_their_address(tmp_path):
    content = make_coco()
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
    path = save_coco(tmp_path / "lvis_v1_val.json", content)
    save_images(tmp_path / "val2017")
    for folder in (tmp_path, tmp_path / "val2017"):
        check_samples(load_instance_dataset(path, image_folder=folder)["train"])
        assert check_dataset(path, image_folder=folder).count("missing_file") == 0


# Classes


def test_a_roboflow_export_without_its_parent_category(tmp_path):
    parent = {"id": 0, "name": "things", "supercategory": "none"}
    children = [{**category, "supercategory": "things"} for category in CATEGORIES]
    for split in ("train", "valid", "test"):
        save_images(tmp_path / split)
        save_coco(tmp_path / split / "_annotations.coco.json", make_coco(categories=[parent, *children]))
    data = load_instance_dataset(tmp_path)
    assert list(data) == ["train", "validation", "test"]
    assert data.id2label == {0: "roof", 1: "tree"}
    assert data.category_ids == [3, 7]
    check_samples(data["test"])
    assert data["test"].coco()["categories"] == [{"id": 3, "name": "roof"}, {"id": 7, "name": "tree"}]


def test_a_category_of_its_own_group_keeps_its_label_without_objects(tmp_path):
    person = {"id": 1, "name": "person", "supercategory": "person"}  # as in COCO
    save_images(tmp_path)
    path = save_coco(tmp_path / "a.json", make_coco(categories=[person, *CATEGORIES]))
    assert load_instance_dataset(path).id2label == {0: "person", 1: "roof", 2: "tree"}


def test_a_parent_that_has_objects_in_any_split_keeps_its_label(tmp_path):
    parent = {"id": 0, "name": "things", "supercategory": "none"}
    categories = [parent, *({**category, "supercategory": "things"} for category in CATEGORIES)]
    used = {"id": 1, "image_id": 100, "category_id": 0, "bbox": [1, 1, 5, 5]}
    for split, annotations in (("train", []), ("valid", [used])):
        save_images(tmp_path / split)
        save_coco(
            tmp_path / split / "_annotations.coco.json", make_coco(categories=categories, annotations=annotations)
        )
    assert load_instance_dataset(tmp_path).id2label == {0: "things", 1: "roof", 2: "tree"}


@pytest.mark.skipif(importlib.util.find_spec("rfdetr") is None, reason="rfdetr is not installed")
def test_classes_are_those_of_rfdetr_for_any_tree_of_categories(tmp_path):
    from rfdetr.detr import RFDETR

    generator = random.Random(0)
    for number in range(200):
        names = generator.sample(["none", "null", "animal", "mammal", "dog", "cat", "car"], generator.randint(1, 6))
        parents = [*names, "none", "null", "", "thing", None, ...]
        ids = generator.sample(range(10), len(names))
        categories = [
            {"id": category_id, "name": name}
            | ({} if (parent := generator.choice(parents)) is ... else {"supercategory": parent})
            for category_id, name in zip(ids, names, strict=True)
        ]
        used = generator.sample(ids, generator.randint(0, len(ids)))
        annotations = [
            {"id": 1 + i, "image_id": 100, "category_id": n, "bbox": [1, 1, 5, 5]} for i, n in enumerate(used)
        ]
        root = tmp_path / str(number)
        for split in ("train", "valid"):
            save_coco(
                root / split / "_annotations.coco.json", make_coco(categories=categories, annotations=annotations)
            )
        save_images(root)
        expected = RFDETR._load_classes(str(root))
        data = load_instance_dataset(root, image_folder=root)
        assert list(data.id2label.values()) == expected, json.dumps(categories)


def test_nested_categories_that_only_group_others_have_no_label(tmp_path):
    tree = [("animal", "none"), ("mammal", "animal"), ("dog", "mammal"), ("cat", "mammal"), ("none", None)]
    categories = [{"id": i, "name": name, "supercategory": parent} for i, (name, parent) in enumerate(tree)]
    used = [{"id": i, "image_id": 100, "category_id": i, "bbox": [1, 1, 5, 5]} for i in (2, 3)]
    path = save_coco(save_images(tmp_path) / "a.json", make_coco(categories=categories, annotations=used))
    assert load_instance_dataset(path).id2label == {0: "dog", 1: "cat", 2: "none"}
    assert check_dataset(path).splits["train"]["classes"] == {"dog": 1, "cat": 1}


@pytest.mark.parametrize("shift", [1, -1])
def test_category_ids_that_are_all_shifted_are_named_as_such(tmp_path, shift):
    categories = [{"id": 5 + i, "name": name} for i, name in enumerate(["roof", "tree", "car"])]
    used = [{"id": 1 + i, "image_id": 100, "category_id": 5 + i + shift, "bbox": [1, 1, 5, 5]} for i in range(3)]
    path = save_coco(save_images(tmp_path / "data") / "a.json", make_coco(categories=categories, annotations=used))
    with pytest.raises(ValueError, match=rf"category_id. .*counted from {5 + shift}\. Add {-shift} "):
        load_instance_dataset(path)
    report = check_dataset(path)
    assert report.count("shifted_category_ids") == 1
    with pytest.raises(ValueError, match="fix"):  # which names are right is for people to decide
        check_dataset(path, fix=tmp_path / "fixed")


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


def test_missing_images_are_counted_and_named(tmp_path):
    path = save_coco(tmp_path / "train.json")
    (save_images(tmp_path) / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images .*'1\.png'.*image_folder"):
        load_instance_dataset(path)


def test_a_category_that_train_does_not_define_is_refused(tmp_path):
    with_more = [*CATEGORIES, {"id": 9, "name": "road"}]
    annotation = {"id": 1, "image_id": 100, "category_id": 9, "bbox": [0, 0, 4, 4]}
    files = split_files(
        tmp_path, train=make_coco(), validation=make_coco(categories=with_more, annotations=[annotation])
    )
    with pytest.raises(ValueError, match=r"split 'validation' .* split 'train', .*got \{9: 'road'\}"):
        load_instance_dataset(files)
    # One that is defined and not used does no harm.
    unused = load_instance_dataset(split_files(tmp_path, train=make_coco(), validation=make_coco(categories=with_more)))
    assert unused.id2label == unused["validation"].id2label == {0: "roof", 1: "tree"}


def test_one_id_with_two_names_is_refused(tmp_path):
    renamed = [{"id": 7, "name": "bush"}, {"id": 3, "name": "roof"}]
    files = split_files(tmp_path, train=make_coco(), validation=make_coco(categories=renamed))
    with pytest.raises(ValueError, match=r"\{7: 'bush'\} in split 'validation' and \{7: 'tree'\} in split 'train'"):
        load_instance_dataset(files)


def test_an_undefined_category_is_named_with_its_file_image_and_annotation(tmp_path):
    annotation = {"id": 5, "image_id": 101, "category_id": 8, "bbox": [0, 0, 4, 4]}
    files = split_files(tmp_path, train=make_coco(), validation=make_coco(annotations=[annotation]))
    message = r"validation.json: image 1 \('1.png', 101\): annotation 0 \(id 5\): .category_id. .*got 8"
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(files)


def test_class_names_that_contradict_the_data_are_refused(tmp_path):
    save_images(tmp_path)
    path = save_coco(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"class_names.*\{3: 'roof', 7: 'tree'\}, got \['a', 'b'\]"):
        load_instance_dataset(path, class_names=["a", "b"])
    assert load_instance_dataset(path, class_names={7: "tree", 3: "roof"}).category_ids == [3, 7]


def test_corners_as_boxes_are_refused(tmp_path):
    content = make_coco()
    for annotation in content["annotations"]:
        annotation["bbox"] = [15.0, 20.0, 29.0, 30.0]
    save_images(tmp_path / "data")
    path = save_coco(tmp_path / "data" / "train.json", content)
    with pytest.raises(ValueError, match=r"train\.json: boxes .* 4 of 4 .*\[x0, y0, x1, y1\]"):
        load_instance_dataset(path)
    assert check_dataset(path, fix=tmp_path / "fixed").count("box_layout") == 1
    [first, *_] = load_instance_dataset(tmp_path / "fixed")["train"]
    assert first["annotations"][1]["bbox"] == [1.0, 1.0, 19.0, 14.0]  # of the mask
