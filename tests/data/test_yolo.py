"""YOLO datasets, a data.yaml and label files, are read as samples."""

from pathlib import Path

import PIL.Image
import pytest

from annotated_images import NAMES, save_images
from transformers_rfdetr import check_dataset, load_instance_dataset


def save_yolo(root: Path, lines: dict[str, list[str]], yaml: str) -> Path:
    save_images(root / "images" / "train")
    for name, content in lines.items():
        path = root / "labels" / "train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(content) + "\n")
    (root / "data.yaml").write_text(yaml)
    return root


NAMED = "names: [roof, tree]\ntrain: images/train\n"


def test_yolo_polygons_and_boxes_are_read_in_pixels(tmp_path):
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
    assert "3 objects, 1 of them without a segmentation" in str(data)


def test_yolo_fractions_are_of_the_upright_image(tmp_path):
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
def test_splits_may_be_folders_and_lists(tmp_path, yaml):
    save_yolo(tmp_path, {"2": ["1 0 0 1 0 1 1"]}, yaml)
    (tmp_path / "list.txt").write_text("./images/train/2.png\nimages/train/0.png\n")
    data = load_instance_dataset(tmp_path)
    assert {split: len(dataset) for split, dataset in data.items()} == {"train": 3, "validation": 2}
    assert len(data["train"][2]["annotations"]) == len(data["validation"][0]["annotations"]) == 1
    assert data["validation"][1]["image"].size == (60, 40)


def test_yolo_classes_without_names_are_numbered_or_named_by_class_names(tmp_path):
    save_yolo(tmp_path, {}, "nc: 2\ntrain: images/train\n")
    assert load_instance_dataset(tmp_path).id2label == {0: "0", 1: "1"}
    assert load_instance_dataset(tmp_path, class_names=NAMES).id2label == {0: "roof", 1: "tree"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"1.txt, line 1: .*class .*\{0: 'roof', 1: 'tree'\}, got 2"),
        ("0 0.5 0.5 0.1 0.1 0.3", "got 5 numbers after the class"),
        ("0 0.5 0.5", "got 2 numbers after the class"),
        ("0 10 20 30 40", r"\[0, 1\], got 10\."),
        ("0 nan 0 0 1 1 1", r"\[0, 1\], got nan"),
        ("roof 0.5 0.5 0.1 0.1", "got 'roof 0.5 0.5 0.1 0.1'"),
    ],
)
def test_an_error_names_the_invalid_line(tmp_path, line, message):
    save_yolo(tmp_path, {"1": [line]}, NAMED)
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(tmp_path)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [roof]\n", r"'train', 'val' or 'test', got .*\['names'\]"),
        ("names: [roof]\ntrain: photos\n", "'train' must exist, got .*photos"),
        ("names: [roof]\ntrain: labels\n", "'train' .*'labels'"),
        ("train: images/train\n", "names of the classes"),
        ("names: [\n", "data.yaml must be YAML"),
        ("- 1\n", "data.yaml .*got list"),
    ],
)
def test_an_invalid_data_yaml_is_refused(tmp_path, yaml, message):
    save_yolo(tmp_path, {"0": []}, yaml)
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(tmp_path)


LINE = "0 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75\n"


def save_files(root: Path, images: list[str], texts: dict[str, str]) -> Path:
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (60, 40)).save(root / name)
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        # Label Studio
        (["images/a.png"], {"labels/a.txt": LINE, "classes.txt": "roof\n", "notes.json": "{}"}),
        # LabelImg
        (["a.png"], {"a.txt": LINE, "classes.txt": "roof\n"}),
        # Darknet, as CVAT exports it
        (
            ["obj_train_data/a.png"],
            {
                "obj.data": "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
                "obj.names": "roof\n",
                "train.txt": "data/obj_train_data/a.png\n",
                "obj_train_data/a.txt": LINE,
            },
        ),
        # Darknet, as Roboflow exports it
        (["train/a.png"], {"train/a.txt": LINE, "train/_darknet.labels": "roof\n"}),
        (
            ["train/images/a.png"],
            {"train/labels/a.txt": LINE, "roofs.yaml": "nc: 1\nnames: [roof]\ntrain: train/images\n"},
        ),
        # macOS stores names decomposed: a and a combining diaeresis
        (["images/\u00e4.png"], {"labels/a\u0308.txt": LINE, "data.yaml": "names: [roof]\ntrain: images\n"}),
    ],
    ids=["Label Studio", "LabelImg", "CVAT", "Roboflow", "another name", "decomposed name"],
)
def test_layouts_of_other_programs_are_read(tmp_path, images, texts):
    data = load_instance_dataset(save_files(tmp_path, images, texts))
    assert data.id2label == {0: "roof"}
    [sample] = data["train"]
    assert [item["bbox"] for item in sample["annotations"]] == [[15.0, 10.0, 15.0, 20.0]]
    assert not check_dataset(tmp_path).has_errors


def test_label_files_without_class_names_require_class_names(tmp_path):
    save_files(tmp_path, ["images/a.png"], {"labels/a.txt": LINE})
    with pytest.raises(ValueError, match="class_names"):
        load_instance_dataset(tmp_path)
    assert load_instance_dataset(tmp_path, class_names=["roof"]).id2label == {0: "roof"}


def test_images_that_share_a_label_file_are_refused(tmp_path):
    save_files(
        tmp_path, ["images/a.png", "images/a.jpg"], {"labels/a.txt": LINE, "data.yaml": "names: [roof]\ntrain: images"}
    )
    with pytest.raises(ValueError, match=r"a\.txt .*a\.jpg, .*a\.png"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("shared_label_file") == 2
    for name in ("a.jpg.txt", "a.png.txt"):
        (tmp_path / "labels" / name).write_text(LINE)
    assert [len(sample["annotations"]) for sample in load_instance_dataset(tmp_path)["train"]] == [1, 1]


def test_a_training_split_that_does_not_exist_is_refused(tmp_path):
    save_files(tmp_path, ["val/a.png"], {"val/a.txt": LINE, "data.yaml": "names: [roof]\ntrain: train\nval: val\n"})
    with pytest.raises(ValueError, match="'train' must exist"):
        load_instance_dataset(tmp_path)


def test_the_lines_of_poses_are_refused_by_kpt_shape(tmp_path):
    yaml = "kpt_shape: [3, 2]\nnames: [person]\ntrain: images\n"
    line = "0 0.5 0.5 0.3 0.4 0.45 0.4 0.55 0.4 0.5 0.6"
    save_files(tmp_path, ["images/a.png"], {"labels/a.txt": f"0 0.5 0.5 0.3 0.4\n{line}\n", "data.yaml": yaml})
    with pytest.raises(ValueError, match=r"a\.txt, line 2: .*kpt_shape"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_label_line") == 1


def test_images_without_any_label_file_are_reported(tmp_path):
    save_files(tmp_path, ["images/a.png"], {"data.yaml": "names: [roof]\ntrain: images\n"})
    assert len(load_instance_dataset(tmp_path)["train"]) == 1
    [found] = [found for found in check_dataset(tmp_path).findings if found.kind == "layout"]
    assert str(tmp_path / "labels" / "a.txt") in found.examples[0]["detail"]


def test_two_yaml_files_that_may_be_the_data_yaml_are_refused(tmp_path):
    yaml = "names: [roof]\ntrain: images\n"
    save_files(tmp_path, ["images/a.png"], {"a.yaml": yaml, "b.yaml": yaml, "labels/a.txt": LINE})
    with pytest.raises(ValueError, match=r"a\.yaml, .*b\.yaml"):
        load_instance_dataset(tmp_path)
    assert len(load_instance_dataset(tmp_path / "b.yaml")["train"]) == 1
