"""Written datasets are read as the same objects, by our readers and by other programs."""

import base64
import json
import os
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from annotated_images import make_annotations, make_coco, make_images, save_coco, save_images
from annotation_programs import SIZE, check_command, save_image
from transformers_rfdetr import InstanceDataset, load_instance_dataset, write_dataset
from transformers_rfdetr.data.dataset import InstanceDatasets
from transformers_rfdetr.data.writers.output import ImageObjects
from transformers_rfdetr.data.writers.write import WRITERS, write_annotations

from coco_files import save_rotated
from properties import holds

HEIGHT, WIDTH = SIZE
CLASSES = {3: "roof", 7: "tall tree"}
FILE_FORMATS = [name for name in WRITERS if name != "hub"]


def encode(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def draw(segmentation, size=SIZE) -> np.ndarray:
    rles = coco_mask.frPyObjects(segmentation, *size) if isinstance(segmentation, list) else [segmentation]
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


def ring_mask() -> np.ndarray:
    """Return a mask with a hole that touches two edges of the image."""
    mask = np.zeros(SIZE, bool)
    mask[20:, 30:] = True
    mask[25:30, 35:44] = False
    return mask


def item(segmentation=None, category=3, **fields) -> dict:
    return {"category_id": category, **({} if segmentation is None else {"segmentation": segmentation}), **fields}


def read(folder, tmp_path=None):
    arguments = {} if tmp_path is None else {"cache_dir": str(tmp_path / "cache")}
    return load_instance_dataset(folder, **arguments)


def write(folder: Path, objects, format: str, image=None, name="a.png") -> Path:
    image = save_image(folder.parent / "source" / "a.png") if image is None else image
    entry = ImageObjects(image, name, SIZE, objects)
    return write_annotations({"train": [entry]}, CLASSES, folder, format=format)


def objects_in(folder, tmp_path) -> list[dict]:
    [sample] = read(folder, tmp_path if (folder / "data").is_dir() else None)["train"]
    return sample["annotations"]


# Round trips


@pytest.mark.parametrize("format", WRITERS)
def test_a_dataset_is_read_back_with_its_splits_classes_boxes_marks_and_masks(format, tmp_path, hf_log):
    pytest.importorskip("datasets")
    dataset = InstanceDataset(make_coco(), make_images())
    data = InstanceDatasets({"train": dataset, "validation": dataset})
    folder = write_dataset(data, tmp_path / "out", format=format)
    again = read(folder, tmp_path if format == "hub" else None)
    assert {name: len(split) for name, split in again.items()} == {"train": 3, "validation": 3}
    assert again.id2label == {0: "roof", 1: "tree"}
    for sample, items in zip(again["validation"], make_annotations(), strict=True):
        expected = [item for item in items if format != "yolo" or not item["iscrowd"]]
        assert len(sample["annotations"]) == len(expected)
        for found, given in zip(sample["annotations"], expected, strict=True):
            assert (found["category_id"], found["iscrowd"]) == ({3: 0, 7: 1}[given["category_id"]], given["iscrowd"])
            size = (sample["height"], sample["width"])
            assert np.array_equal(draw(found["segmentation"], size), draw(given["segmentation"], size))
            np.testing.assert_allclose(found["bbox"], given["bbox"], atol=1.5)
    for index, image in enumerate(make_images()):
        np.testing.assert_array_equal(np.asarray(again["train"][index]["image"]), np.asarray(image))
    lost = "2 crowd regions are not written, because YOLO has none"
    assert (lost in hf_log.text) == (format == "yolo")


number = st.floats(-6, 54, allow_nan=False).map(lambda value: round(value, 5))
polygon = st.lists(st.tuples(number, number), min_size=3, max_size=6).map(lambda points: [x for p in points for x in p])
mask = arrays(bool, SIZE, elements=st.booleans(), fill=st.just(False)).filter(np.any)
blocks = st.lists(st.tuples(*[st.integers(0, 30)] * 4), min_size=1, max_size=4)


@st.composite
def segmentations(drawn):
    """Polygons, also beyond the image, overlapping or crossing themselves, and RLE of blocks and of single pixels."""
    if drawn(st.booleans()):
        return drawn(st.lists(polygon, min_size=1, max_size=3))
    pixels = drawn(mask)
    for top, left, height, width in drawn(blocks):
        pixels[top : top + height, left : left + width] ^= True
    return encode(pixels if pixels.any() else ~pixels)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return save_image(tmp_path_factory.mktemp("images") / "a.png")


@pytest.mark.parametrize("format", FILE_FORMATS)
def test_all_masks_are_read_as_pycocotools_draws_what_was_written(format, image, tmp_path, quiet):
    numbers = iter(range(10_000))

    @holds(25, given=st.lists(segmentations(), min_size=1, max_size=4))
    def check(given):
        folder = tmp_path / str(next(numbers))
        objects = [item([[1, 1, 20, 1, 20, 9]]), *map(item, given)]
        write(folder, objects, format, image)
        found = objects_in(folder, tmp_path)
        assert len(found) == len(objects)
        for one, other in zip(found, objects, strict=True):
            assert np.array_equal(draw(one["segmentation"]), draw(other["segmentation"]))
            if format != "yolo":
                assert isinstance(one["segmentation"], dict) >= isinstance(other["segmentation"], dict)

    check(1)


@pytest.mark.parametrize("polygon", [[0.0] * 10, [3.0, 4.0] * 7])
def test_a_polygon_of_one_repeated_point_can_be_read_from_yolo(polygon, tmp_path):
    [found] = objects_in(write(tmp_path / "out", [item([polygon])], "yolo"), tmp_path)
    assert not draw(found["segmentation"]).any()


@pytest.mark.parametrize("format", WRITERS)
def test_boxes_without_a_mask_stay_so(format, tmp_path):
    pytest.importorskip("datasets")
    objects = [item(bbox=[3.25, 4.5, 20, 11.125]), item([[1, 1, 9, 1, 9, 9]], 7), item([], bbox=[0, 0, 48, 40])]
    first, second, third = objects_in(write(tmp_path / "out", objects, format), tmp_path)
    assert not first.get("segmentation")
    assert second["segmentation"]
    np.testing.assert_allclose(first["bbox"], [3.25, 4.5, 20, 11.125], atol=0.002)
    assert third["bbox"] == [0, 0, 48, 40]


@pytest.mark.parametrize("format", ["coco", "labelme", "cvat", "label-studio", "hub"])
def test_crowd_regions_with_polygons_rle_and_boxes_stay_crowd_regions(format, tmp_path):
    pytest.importorskip("datasets")
    crowds = [item([[1, 1, 9, 1, 9, 9]]), item(encode(ring_mask())), item(bbox=[1.0, 2.0, 3.0, 4.0])]
    objects = [*({**crowd, "iscrowd": 1} for crowd in crowds), item([[1, 1, 9, 1, 9, 9]], 7)]
    found = objects_in(write(tmp_path / "out", objects, format), tmp_path)
    assert [one["iscrowd"] for one in found] == [1, 1, 1, 0]
    assert [bool(one.get("segmentation")) for one in found] == [True, True, False, True]


def test_the_mark_occluded_of_cvat_is_kept_in_cvat_and_counted_elsewhere(tmp_path, hf_log):
    objects = [item([[1, 1, 9, 1, 9, 9]], occluded=1)]
    assert objects_in(write(tmp_path / "cvat", objects, "cvat"), tmp_path)[0]["occluded"] == 1
    assert "occluded" not in hf_log.text
    write(tmp_path / "yolo", objects, "yolo")
    assert "yolo: 1 marks of occluded objects are not written" in hf_log.text


# Other programs read what is written


def test_pycocotools_reads_the_masks_of_coco(tmp_path):
    folder = write(tmp_path / "out", [item(encode(ring_mask())), item([[1, 1, 9, 1, 9, 9]], 7)], "coco")
    coco = COCO(folder / "train" / "_annotations.coco.json")
    first, second = coco.loadAnns(coco.getAnnIds())
    assert np.array_equal(coco.annToMask(first).astype(bool), ring_mask())
    assert (first["area"], coco.cats[second["category_id"]]["name"]) == (int(ring_mask().sum()), "tall tree")


def test_pil_reads_the_mask_of_labelme(tmp_path):
    folder = write(tmp_path / "out", [item(encode(ring_mask()), 7)], "labelme")
    content = json.loads((folder / "train" / "a.json").read_text())
    [shape] = content["shapes"]
    (x0, y0), (x1, y1) = shape["points"]
    found = np.zeros(SIZE, bool)
    found[y0 : y1 + 1, x0 : x1 + 1] = np.array(Image.open(BytesIO(base64.b64decode(shape["mask"])))) > 0
    assert np.array_equal(found, ring_mask())
    assert (shape["label"], shape["shape_type"], content["imagePath"]) == ("tall tree", "mask", "a.png")
    assert (content["imageHeight"], content["imageWidth"]) == SIZE


def test_the_runs_of_cvat_go_along_the_rows_of_the_box(tmp_path):
    folder = write(tmp_path / "out", [item(encode(ring_mask()), 7)], "cvat")
    element = ElementTree.parse(folder / "annotations.xml").find("image/mask")
    left, top, width, height = (int(element.get(name)) for name in ("left", "top", "width", "height"))
    values, value = [], 0
    for run in element.get("rle").split(","):
        values += [value] * int(run)
        value = 1 - value
    found = np.zeros(SIZE, bool)
    for position, value in enumerate(values):
        found[top + position // width, left + position % width] = value
    assert len(values) == width * height
    assert np.array_equal(found, ring_mask())


def test_a_line_of_yolo_is_one_polygon_in_fractions_of_the_image(tmp_path, hf_log):
    folder = write(tmp_path / "out", [item(encode(ring_mask()), 7)], "yolo")
    label, *values = (folder / "labels" / "train" / "a.txt").read_text().split()
    points = np.array(values, float).reshape(-1, 2) * (WIDTH, HEIGHT)
    assert label == "1"
    assert np.array_equal(draw([points.ravel().tolist()]), ring_mask())
    assert "1 objects of several parts or with holes are one polygon" in hf_log.text
    assert "path" not in (folder / "data.yaml").read_text()


def test_the_library_datasets_reads_the_rows_with_their_features(tmp_path):
    datasets = pytest.importorskip("datasets")
    objects = [item(encode(ring_mask()), 7), item([[1.5, 1, 9, 1, 9, 9]])]
    folder = write(tmp_path / "out", objects, "hub", name="sub/a.png")
    [row] = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    table = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(table.features["image"], datasets.Image)
    names = table.features["objects"]["category"].feature.names
    assert [names[label] for label in row["objects"]["category"]] == ["tall tree", "roof"]
    assert row["objects"]["segmentation"] == [[], [[1.5, 1, 9, 1, 9, 9]]]
    assert np.array_equal(draw(row["objects"]["rle"][0]), ring_mask())
    assert row["objects"]["rle"][1] is None or row["objects"]["rle"][1]["counts"] is None
    assert (row["image"].size, row["file_name"], row["width"], row["height"]) == ((48, 40), "sub/a.png", 48, 40)
    assert read(folder, tmp_path)["train"][0]["file_name"] == "sub/a.png"


def test_many_rows_are_written_to_several_files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("transformers_rfdetr.data.writers.hub._MAX_SHARD_BYTES", 1)
    monkeypatch.setattr("transformers_rfdetr.data.writers.hub._GROUP_ROWS", 2)
    folder = write_dataset(InstanceDataset(make_coco(), make_images()), tmp_path / "out", format="hub")
    names = sorted(path.name for path in (folder / "data").iterdir())
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [sample["image_id"] for sample in read(folder, tmp_path)["train"]] == [100, 101, 102]


# Images


def test_images_are_hard_links_or_copies_and_stay_as_they_are(tmp_path):
    source = save_images(tmp_path / "source")
    data = load_instance_dataset(save_coco(source / "train.json"))
    for copy_images in (False, True):
        folder = write_dataset(data, tmp_path / f"copy {copy_images}", format="labelme", copy_images=copy_images)
        assert os.path.samefile(folder / "train" / "0.png", source / "0.png") is not copy_images
        assert (folder / "train" / "0.png").read_bytes() == (source / "0.png").read_bytes()


@pytest.mark.parametrize("format", FILE_FORMATS)
def test_names_of_any_letters_and_equal_names_in_folders_are_kept_apart(format, tmp_path, hf_log):
    names = ["site é/日本 1.png", "site b/日本 1.png", "site b/日本 1.bmp", "site b/.hidden.png", "Ñ 100%#.png"]
    source = tmp_path / "source" / "all"
    images = [
        {"id": number, "file_name": f"all/{name}", "height": HEIGHT, "width": WIDTH}
        for number, name in enumerate(names)
    ]
    for name in names:
        save_image(source / name)
    annotations = [
        {"id": 1 + n, "image_id": n, "category_id": 1, "segmentation": [[n, n, n + 9, n, n + 9, n + 9]]}
        for n in (0, 2, 3, 4)
    ]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "my roof, 50 % é"}]}
    save_coco(tmp_path / "source" / "train.json", coco)
    folder = write_dataset(load_instance_dataset(tmp_path / "source" / "train.json"), tmp_path / "out", format=format)
    again = load_instance_dataset(folder)["train"]
    assert again.id2label == {0: "my roof, 50 % é"}
    found = {
        tuple(sample["annotations"][0]["segmentation"][0][:2]) if sample["annotations"] else (1, 1): np.asarray(
            sample["image"]
        )
        for sample in again
    }
    assert len(found) == len(names)
    for number, name in enumerate(names):
        np.testing.assert_array_equal(found[number, number], np.asarray(Image.open(source / name)))
    renamed = 1 if format in ("coco", "cvat", "label-studio") else 2
    assert f"{renamed} images have new names" in hf_log.text
    assert not any("all" in path.parts for path in folder.rglob("*.png"))


@pytest.mark.parametrize("name", ["../../a.png", "/a.png", "..\\..\\a.png", "b/../../../a.png", "..", ""])
def test_names_cannot_leave_the_folder(name, tmp_path):
    image, output = save_image(tmp_path / "x.png"), tmp_path / "inside" / "out"
    folder = write(output, [item([[1, 1, 9, 1, 9, 9]])], "coco", image, name)
    [sample] = read(folder)["train"]
    assert (folder / "train" / sample["file_name"]).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"inside", "x.png"}
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["out"]


@pytest.mark.parametrize("format", WRITERS)
def test_rows_become_image_files_with_a_suffix(format, tmp_path):
    datasets = pytest.importorskip("datasets")
    buffer = BytesIO()
    make_images()[0].save(buffer, "JPEG")
    objects = [{"category": "roof", "bbox": [1.0, 2.0, 3.0, 4.0]}]
    rows = datasets.Dataset.from_list([{"image": {"bytes": buffer.getvalue(), "path": None}, "objects": objects}] * 2)
    data = load_instance_dataset(rows.cast_column("image", datasets.Image()))
    again = read(write_dataset(data, tmp_path / "out", format=format), tmp_path if format == "hub" else None)["train"]
    assert [sample["file_name"].rpartition("/")[2] for sample in again] == ["000000.jpg", "000001.jpg"]
    np.testing.assert_array_equal(np.asarray(again[1]["image"]), np.asarray(Image.open(buffer)))


@pytest.mark.parametrize("format", WRITERS)
def test_rotated_images_have_their_objects_in_the_upright_image(format, tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "source.jpg"
    save_rotated(path, 0, 6)  # stored as 40 x 60
    entry = ImageObjects(path, "a.jpg", (60, 40), [item([[1, 1, 9, 1, 9, 50]])])
    folder = write_annotations({"train": [entry]}, CLASSES, tmp_path / "out", format=format)
    [sample] = read(folder, tmp_path if format == "hub" else None)["train"]
    assert sample["image"].size == (40, 60)
    assert np.array_equal(
        draw(sample["annotations"][0]["segmentation"], (60, 40)), draw([[1, 1, 9, 1, 9, 50]], (60, 40))
    )


# What cannot be written


@pytest.mark.parametrize("format", ["yolo", "labelme", "cvat"])
def test_what_a_format_cannot_hold_is_counted(format, tmp_path, hf_log):
    objects = [
        item([[1, 1, 9, 1, 9, 9]]),
        item([[10, 10, 20, 10, 20, 20]], bbox=[0, 0, 30, 30]),
        item({"size": [*SIZE], "counts": [HEIGHT * WIDTH]}, bbox=[1, 1, 5, 5]),
        item({"size": [*SIZE], "counts": [HEIGHT * WIDTH]}),
        item(),
    ]
    found = objects_in(write(tmp_path / "out", objects, format), tmp_path)
    assert [bool(one.get("segmentation")) for one in found] == [True, True, False]
    for text in (
        "1 boxes are replaced by those of their masks",
        "1 masks without a pixel are written as boxes",
        "2 objects without a box and without a pixel are not written",
    ):
        assert text in hf_log.text
    assert ("1 classes are lost, because labelme names no class without an object: tall tree" in hf_log.text) == (
        format == "labelme"
    )


def test_boxes_of_yolo_end_at_the_image(tmp_path, hf_log):
    objects = [item(bbox=[-5, -5, 15, 10]), item(bbox=[60, 1, 5, 5])]
    [found] = objects_in(write(tmp_path / "out", objects, "yolo"), tmp_path)
    np.testing.assert_allclose(found["bbox"], [0, 0, 10, 5], atol=0.002)
    assert "1 boxes are clipped" in hf_log.text
    assert "1 boxes without a pixel in the image are not written" in hf_log.text


def test_triangles_at_the_bottom_are_not_taken_for_tracked_boxes(tmp_path):
    triangle = [[20, 20, 20, 20.5, 10, 40]]  # as a line: a box, 0.208 and 1
    found = objects_in(write(tmp_path / "out", [item(triangle)] * 4, "yolo"), tmp_path)
    assert all(np.array_equal(draw(one["segmentation"]), draw(triangle)) for one in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "voc"}, r"`format` must be one of \['coco'.*got 'voc'"),
        ({"dataset": 5}, "`dataset` must be what `load_instance_dataset` returns.*got 5"),
        ({"dataset": {}}, "at least one split"),
        ({"name": "roof "}, r"class names for labelme .*'roof '"),
        ({"name": "__ignore__"}, "class names for labelme must not be '__ignore__'"),
        ({"split": "extra"}, "splits for labelme must be train, validation and test, got 'extra'"),
        ({"split": "extra\n", "format": "hub"}, "splits for the Hub"),
        ({"split": "default", "format": "cvat"}, "splits for CVAT .*'default'"),
        ({"name": "a\x07b", "format": "cvat"}, "class names for CVAT"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(change, message, tmp_path):
    pytest.importorskip("datasets")
    coco = make_coco(categories=[{"id": 7, "name": change.get("name", "tree")}, {"id": 3, "name": "roof"}])
    given = {change.get("split", "train"): InstanceDataset(coco, make_images())}
    with pytest.raises(ValueError, match=message):
        write_dataset(change.get("dataset", given), tmp_path / "out", format=change.get("format", "labelme"))
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_overwritten(tmp_path):
    dataset = InstanceDataset(make_coco(), make_images())
    (tmp_path / "out").mkdir()
    write_dataset(dataset, tmp_path / "out")  # empty
    with pytest.raises(ValueError, match="`folder` must be new or empty"):
        write_dataset(dataset, tmp_path / "out")
    with pytest.raises(ValueError, match="`folder` must be a folder, got the file"):
        write_dataset(dataset, tmp_path / "out" / "train" / "0.png")


@pytest.mark.parametrize("format", WRITERS)
def test_a_missing_or_exchanged_image_is_named_and_nothing_is_left(format, tmp_path):
    pytest.importorskip("datasets")
    source = save_images(tmp_path / "source")
    data = load_instance_dataset(save_coco(source / "train.json"))
    make_images()[0].save(source / "1.png")
    with pytest.raises(ValueError, match=r"'1\.png'.*\(50, 30\)"):
        write_dataset(data, tmp_path / "out", format=format)
    (source / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png.* cannot be opened"):
        write_dataset(data, tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("format", FILE_FORMATS)
def test_the_check_finds_no_error_in_what_is_written(format, tmp_path):
    objects = [item(encode(ring_mask())), item([[1, 1, 9, 1, 9, 9], [20, 1, 30, 1, 30, 9]], 7)]
    check_command(write(tmp_path / "out", objects, format), objects=2, masks=2)
