"""COCO JSON files of every layout become the same samples, with one label map for all splits."""

import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from annotated_images import CATEGORIES, check_samples, make_coco, save_coco, save_images, split_files
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
