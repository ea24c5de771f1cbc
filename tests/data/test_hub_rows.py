"""Rows of the library `datasets` are read as samples, for all usual names of columns."""

import sys
from io import BytesIO

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from annotated_images import (
    BROKEN,
    ID_TO_NAME,
    INDEX,
    NAMES,
    SIZES,
    check_samples,
    features,
    make_annotations,
    make_images,
    rows,
    save_coco,
    save_images,
)
from transformers_rfdetr import RfDetrImageProcessor, check_dataset, load_instance_dataset
from transformers_rfdetr.data.dataset import ClassCount, InstanceDatasets

datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize("as_columns", [True, False], ids=["dict of lists", "list of dicts"])
@pytest.mark.parametrize("kind", ["ClassLabel", "text", "number"])
def test_rows_of_all_layouts_are_read(as_columns, kind):
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


def test_the_nested_sequences_of_older_datasets():
    """`Sequence({...})`, which loading scripts used, is stored as a dict of lists."""
    number, real = datasets.Value("int64"), datasets.Value("float32")
    inner = {
        **{"id": number, "category": datasets.ClassLabel(names=NAMES), "area": real, "iscrowd": number},
        "bbox": datasets.Sequence(real, length=4),
        "segmentation": datasets.Sequence(datasets.Sequence(real)),
    }
    nested = datasets.Features({"image_id": number, "image": datasets.Image(), "objects": datasets.Sequence(inner)})
    table = datasets.Dataset.from_list(rows(INDEX.get, as_columns=True), features=nested)
    check_samples(load_instance_dataset(table)["train"])


def test_large_lists_of_class_labels_are_read():
    schema = features(datasets.ClassLabel(names=NAMES), as_columns=True, sequence=datasets.LargeList)
    data = load_instance_dataset(datasets.Dataset.from_list(rows(INDEX.get, as_columns=True), features=schema))
    assert data.id2label == {0: "roof", 1: "tree"}
    check_samples(data["train"])


@pytest.mark.parametrize("column", ["img", "picture"])
def test_other_usual_names_and_missing_fields_are_read(column):
    renamed = [
        {
            column: row["image"],
            "id": f"photo {index}",
            "annotations": [{"label": ID_TO_NAME[i["category_id"]], "polygons": i["segmentation"]} for i in items],
        }
        for index, (row, items) in enumerate(zip(rows(), make_annotations(), strict=True))
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
def test_rle_in_rows_is_read(as_columns, missing):
    mask = np.zeros((40, 60), np.uint8)
    mask[3:9, 7:30] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    rle["counts"] = rle["counts"].decode()
    listed = [{"category": "roof", "mask": rle}, {"category": "roof", "mask": missing, "bbox": [1.0, 2.0, 3.0, 4.0]}]
    for item in listed:
        item.setdefault("bbox", None)
    content = {key: [item[key] for item in listed] for key in listed[0]} if as_columns else listed
    table = datasets.Dataset.from_list([{"image": make_images()[0], "objects": content}])
    dataset = load_instance_dataset(table)["train"]
    first, second = dataset[0]["annotations"]
    assert (first["bbox"], first["area"]) == ([7.0, 3.0, 23.0, 6.0], 138.0)
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), mask)
    assert (second["bbox"], second["area"]) == ([1.0, 2.0, 3.0, 4.0], 12.0)
    assert "2 objects, 1 of them without a segmentation" in str(InstanceDatasets({"train": dataset}))


def test_a_segmentation_without_a_pixel_is_counted_alike_by_dataset_and_check_and_is_not_trained(quiet):
    line = [10.0, 10.0, 20.0, 10.0, 30.0, 10.0, 20.0, 10.0]  # forth and back
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    items = [{"category": "roof", "bbox": [10.0, 10.0, 20.0, 20.0], "segmentation": [part]} for part in (line, square)]
    content = {key: [item[key] for item in items] for key in items[0]}
    table = datasets.Dataset.from_list([{"image": make_images()[0], "objects": content}])
    data = load_instance_dataset(table)
    assert "2 objects, 0 of them without a segmentation;" in str(data)
    report = check_dataset(table)
    assert "2 objects, 0 of them without a segmentation, 1 with an unusable one;" in str(report)
    assert report.count("empty_segmentation") == 1
    for masks, num_trained in ((True, 1), (False, 2)):
        sample = data["train"].with_processor(RfDetrImageProcessor(size=48), masks=masks)[0]
        assert len(sample["labels"]["class_labels"]) == num_trained


def test_class_names_name_number_categories_and_order_string_categories():
    numbers = datasets.Dataset.from_list(rows())
    data = load_instance_dataset(numbers, class_names={3: "roof", 7: "tree", 9: "road"})
    assert (data.id2label, data.category_ids) == ({0: "roof", 1: "tree", 2: "road"}, [3, 7, 9])
    check_samples(data["train"])
    texts = datasets.Dataset.from_list(rows(ID_TO_NAME.get))
    data = load_instance_dataset(texts, class_names=["tree", "roof"])
    assert data.id2label == {0: "tree", 1: "roof"}
    assert [item["category_id"] for item in data["train"][0]["annotations"]] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"split 'train'.*annotation 0 .*category_id. .*got 7"):
        load_instance_dataset(numbers, class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"category_id. .*got 'roof'"):
        load_instance_dataset(texts, class_names=["tree", "road"])


def test_splits_of_rows_share_one_label_map():
    table = datasets.Dataset.from_list(rows(ID_TO_NAME.get))
    data = load_instance_dataset(datasets.DatasetDict({"train": table.select([1, 2]), "valid": table}))
    assert data["train"].id2label == data["validation"].id2label == {0: "roof", 1: "tree"}
    assert len(data["train"]) == 2
    check_samples(data["validation"])


def test_class_labels_must_be_the_same_in_all_splits():
    tables = [
        datasets.Dataset.from_list(rows(INDEX.get), features=features(datasets.ClassLabel(names=names), False))
        for names in (NAMES, ["roof", "bush"])
    ]
    with pytest.raises(ValueError, match=r"\{1: 'bush'\} .* \{1: 'tree'\} in split 'train'"):
        load_instance_dataset({"train": tables[0], "validation": tables[1]})


def test_a_class_label_without_a_name_is_refused():
    schema = features(datasets.Value("int64"), as_columns=False)
    table = datasets.Dataset.from_list(rows(), features=schema)
    wrong = table.with_format("arrow")
    label = features(datasets.ClassLabel(names=NAMES), as_columns=False)
    relabelled = datasets.Dataset(wrong.data.table, info=datasets.DatasetInfo(features=label))
    message = r"split 'train': image 0 \(100\): annotation 0 \(id 11\): .category_id. .*\{0: 'roof', 1: 'tree'\}, got 7"
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(relabelled)


def test_annotations_are_read_without_decoding_images():
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
    make_images()[0].save(file, "PNG")
    cut_off = {"bytes": file.getvalue()[:100], "path": None}
    content = [{"image": cut_off, "objects": [{"category": 3, "bbox": [1.0, 2.0, 3.0, 4.0]}]}]
    item = {"category": datasets.Value("int64"), "bbox": datasets.Sequence(datasets.Value("float32"))}
    plain = datasets.Features({"image": datasets.Image(), "objects": [item]})
    truth = load_instance_dataset(datasets.Dataset.from_list(content, features=plain))["train"].coco()
    assert truth["images"] == [{"id": 0, "height": 40, "width": 60}]


def test_categories_must_have_the_same_type_in_all_splits():
    tables = [datasets.Dataset.from_list(rows(category)) for category in (ID_TO_NAME.get, lambda number: number)]
    with pytest.raises(ValueError, match=r"type .*\{'train': 'string', 'test': 'number'\}"):
        load_instance_dataset({"train": tables[0], "test": tables[1]})


def test_selected_and_formatted_rows_are_read():
    table = datasets.Dataset.from_list(rows() + rows()).select([3, 1, 5]).with_format("torch")
    with pytest.raises(ValueError, match=r"category_id. .*\{0: .x.\}, got"):
        load_instance_dataset(table, class_names=["x"])
    check_samples(load_instance_dataset(table)["train"])


def test_folders_of_parquet_and_saved_datasets_are_read(tmp_path):
    table = datasets.Dataset.from_list(
        rows(INDEX.get), features=features(datasets.ClassLabel(names=NAMES), as_columns=False)
    )
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    data = load_instance_dataset(tmp_path / "parquet", cache_dir=str(tmp_path / "cache"))
    assert data.id2label == {0: "roof", 1: "tree"}
    check_samples(data["train"])
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1  # for random access without reading it into memory
    one = load_instance_dataset(tmp_path / "parquet", split="train", cache_dir=str(tmp_path / "cache"))
    assert list(one) == ["train"]
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    check_samples(load_instance_dataset(tmp_path / "saved")["train"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": 1, "text": "a"}], r"\['objects', .*got \['image', 'text'\]"),
        ([{"objects": [{"category": 1}]}], r"\['image', .*got \['objects'\]"),
        ([{"image": "a.png", "objects": [1, 2]}], "'objects' must"),
        ([{"image": "a.png", "objects": [{"bbox": [1, 2, 3, 4]}]}], r"\['category', .*got \['bbox'\]"),
        ([{"image": "a.png", "objects": {"category": [1, 2], "area": [1.0]}}], "lists of the objects .*'category': 2"),
        (
            [{"image": "a.png", "objects": [{"category": None, "id": 1}, {"category": 3, "id": 2}]}],
            "image 0: category .*got None",
        ),
        ([{"image": "a", "image_id": 4, "objects": [{"category": 3}]}] * 2, "image ids .*got 4 for 2 images"),
    ],
)
def test_rows_with_missing_or_invalid_columns_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(datasets.Dataset.from_list(content))


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-rfdetr\[train\]"'):
        load_instance_dataset("someone/buildings")
    save_images(tmp_path)
    check_samples(load_instance_dataset(save_coco(tmp_path / "a.json"))["train"])


@pytest.mark.parametrize(
    ("box", "layout"),
    [([30.0, 5, 50, 35], r"\[x0, y0, x1, y1\]"), ([45.0, 30, 20, 16], r"\[center_x, center_y, width, height\]")],
)
def test_boxes_in_another_layout_are_refused(box, layout):
    content = [{"image": make_images()[0], "objects": [{"category": 0, "bbox": box}] * 2} for _ in range(2)]
    table = datasets.Dataset.from_list(content).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=rf"4 of 4 that extend .* fit as {layout}:"):
        load_instance_dataset(table)
    assert check_dataset(table).count("box_layout") == 1
    assert len(load_instance_dataset(table.select([0]))["train"]) == 1  # two boxes may be mistakes
