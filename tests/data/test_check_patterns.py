"""What a check says of patterns: fractions, duplicate objects, crops of one scene, systematic areas, unusual files."""

import json
import struct
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import typer
from typer.testing import CliRunner

from transformers_rfdetr import RfDetrImageProcessor, check_dataset, load_instance_dataset
from transformers_rfdetr.cli import check_dataset as command

from coco_files import RIGHT, counts_of, draw_image, errors_of, image_entry, rle, square, write_coco

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def one(tmp_path):
    """Return a function that writes a COCO JSON of one image."""

    def write(annotations, file="a.png", size=(40, 60)):
        path = write_coco(tmp_path / "data" / "train.json", [image_entry(1, file, size)], annotations)
        if file == "a.png":
            draw_image(0, size).save(path.parent / "a.png")
        return path

    return write


# Objects


def test_fractions_of_the_image_are_no_pixels(one, tmp_path):
    fractions = [[0.2, 0.2, 0.6, 0.2, 0.6, 0.8, 0.2, 0.8]]
    items = [
        square(1, bbox=[0.2, 0.2, 0.4, 0.6], area=0.24, segmentation=fractions),
        square(2, bbox=[0.5, 0.5, 0.4, 0.4], area=..., segmentation=...),
        square(3, bbox=..., area=..., segmentation=fractions),
    ]
    path = one(items)
    with pytest.raises(ValueError, match=r"pixels, got only numbers from 0 to 1 in 3 annotations"):
        load_instance_dataset(path)
    assert errors_of(check_dataset(path)) == {"fractional_coordinates": 3}
    path = one([*items, square(4)])  # the other annotations are read
    assert len(load_instance_dataset(path)["train"][0]["annotations"]) == 4
    assert errors_of(check_dataset(path, fix=tmp_path / "fixed")) == {"fractional_coordinates": 3}
    assert len(load_instance_dataset(tmp_path / "fixed")["train"][0]["annotations"]) == 1


@pytest.mark.parametrize(("last", "is_valid"), [(1200.0, True), (1200.5, False), (float("nan"), False), (1e300, False)])
def test_whole_floats_are_counts_of_an_rle(one, last, is_valid):
    runs = {"size": [40, 60], "counts": [1000.0, 200.0, last]}
    path = one([square(1, segmentation=runs, bbox=..., area=...)])
    report = check_dataset(path)
    assert (report.count("rle_corrupt"), report.count("boxes_only")) == (not is_valid, 0)
    if is_valid:
        [annotation] = load_instance_dataset(path)["train"][0]["annotations"]
        assert (annotation["area"], annotation["bbox"]) == (200, [25, 0, 5, 40])  # columns 25 to 29


def test_one_pixel_at_the_origin_and_a_bitmap_are_no_fractions(one):
    bitmap = np.zeros((40, 60), int)
    bitmap[:20, :20] = 1
    pixel = square(1, bbox=[0, 0, 1, 1], area=1, segmentation=[[0, 0, 1, 0, 1, 1, 0, 1]])
    for item in (pixel, square(1, bbox=..., segmentation=bitmap.tolist())):
        assert not check_dataset(one([item])).has_errors
        assert len(load_instance_dataset(one([item]))["train"][0]["annotations"]) == 1


@pytest.mark.parametrize(
    ("changes", "is_duplicate"),
    [
        ({}, True),
        ({"segmentation": [[10, 10, 30, 10, 30, 30, 10.5, 30]]}, True),  # a pixel column off at most: 380 / 400
        ({"segmentation": rle()}, True),
        ({"bbox": [8, 8, 24, 24]}, True),  # its mask is the same
        ({"segmentation": [[10, 10, 32, 10, 32, 30, 10, 30]], "bbox": [10, 10, 22, 20]}, False),  # 400 / 440
        ({"category_id": 2}, False),
        ({"iscrowd": 1, "segmentation": rle()}, False),
        ({"segmentation": ...}, False),  # a box and a mask
    ],
)
def test_an_object_that_is_annotated_twice_is_found(tmp_path, changes, is_duplicate):
    categories = [{"id": 1, "name": "roof"}, {"id": 2, "name": "tree"}]
    items = [square(1), square(2, segmentation=[RIGHT], bbox=[50, 10, 10, 20]), square(3, **changes)]
    path = write_coco(tmp_path / "train.json", [image_entry(1, "a.png")], items, categories)
    draw_image(0).save(tmp_path / "a.png")
    report = check_dataset(path)
    assert report.count("duplicate_object") == is_duplicate
    if is_duplicate:
        [found] = [found for found in report.findings if found.kind == "duplicate_object"]
        assert found.examples[0]["annotation_id"] == 3
        assert "annotation 1" in found.examples[0]["detail"]


def test_boxes_are_compared_by_their_iou(tmp_path):
    items = [square(i, segmentation=..., bbox=[10, 10, 20, height]) for i, height in enumerate((20, 20.5, 22), start=1)]
    path = write_coco(tmp_path / "train.json", [image_entry(1, "a.png")], items)
    draw_image(0).save(tmp_path / "a.png")
    assert check_dataset(path).count("duplicate_object") == 1  # 20 / 20.5 = 0.976, 20.5 / 22 = 0.932


def test_objects_that_vanish_at_the_models_resolution_are_those_that_training_drops(one):
    sizes = (1, 2, 3, 5, 8, 13)
    items = []
    for number, side in enumerate(sizes, start=1):
        x, y = 150 * number, 37 * number
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        items.append(square(number, bbox=[x, y, side, side], area=side * side, segmentation=[polygon]))
    path = one(items, size=(400, 1000))
    sample = load_instance_dataset(path)["train"].with_processor(RfDetrImageProcessor(size=48))[0]
    num_lost = len(sizes) - len(sample["labels"]["class_labels"])
    assert 0 < num_lost < len(sizes)
    assert check_dataset(path, resolution=48).count("object_vanishes") == num_lost
    assert check_dataset(path).count("object_vanishes") == 0


def test_areas_of_boxes_are_one_remark_with_their_share_and_do_not_hide_wrong_areas(tmp_path):
    triangle = [[10, 10, 50, 10, 10, 38]]
    wrong = square(100, bbox=[10, 10, 40, 28], area=10, segmentation=triangle)
    items = [square(i, bbox=[10, 10, 40, 28], area=40 * 28, segmentation=triangle, image_id=i) for i in range(1, 10)]
    path = write_coco(tmp_path / "train.json", [image_entry(i, f"{i}.png") for i in range(1, 11)], [*items, wrong])
    for i in range(1, 11):
        draw_image(i).save(tmp_path / f"{i}.png")
    report = check_dataset(path)
    assert (report.count("area_of_box"), report.count("area_mismatch")) == (9, 1)
    assert {found.kind: found.severity for found in report.findings}["area_of_box"] == "info"
    assert "90% of the annotations" in str(report)


def test_a_polygon_inside_another_is_reported_because_coco_fills_it(one):
    outer, hole = [5, 5, 55, 5, 55, 35, 5, 35], [20, 10, 30, 10, 30, 20, 20, 20]
    beside = [60, 5, 70, 5, 70, 15, 60, 15]
    items = [
        square(1, bbox=[5, 5, 50, 30], area=..., segmentation=[hole, outer]),
        square(2, bbox=[5, 5, 65, 30], area=..., segmentation=[outer, beside]),
    ]
    [found] = [found for found in check_dataset(one(items)).findings if found.kind == "nested_polygon"]
    assert [example["annotation_id"] for example in found.examples] == [1]
    assert found.examples[0]["detail"] == "1 of 2 polygons, 100 pixels"


def test_a_tiny_loop_in_an_outline_is_a_remark(one):
    loop = [5, 5, 55, 5, 55, 35, 6, 35, 5, 34, 5, 35, 6, 34.5]
    report = check_dataset(one([square(1, bbox=[5, 5, 50, 30], area=..., segmentation=[loop])]))
    assert report.count("small_self_intersection") == 1
    assert report.count("self_intersecting_polygon") == 0


# Images


@pytest.mark.parametrize(
    ("train", "valid", "count"),
    [
        ("scene_0_0.png", "scene_30_0.png", 1),  # an image is 60 pixels wide
        ("scene_0_0.png", "scene_60_0.png", 0),  # beside it
        ("scene-r0-c0.png", "scene-r0-c30.png", 1),
        ("scene_0_0.png", "other_30_0.png", 0),
        ("img_1_png.rf.0a1b2c.jpg", "img_1_png.rf.9d8e7f.jpg", 1),  # two versions of one image, as Roboflow names them
        ("img_1_png.rf.0a1b2c.jpg", "img_2_png.rf.9d8e7f.jpg", 0),
        ("img_1.png", "img_2.png", 0),
        ("IMG_20230101_120000.png", "IMG_20230101_120500.png", 0),
    ],
)
def test_crops_of_one_scene_in_different_splits_are_found_by_their_names(tmp_path, train, valid, count):
    files = {}
    for seed, (split, name) in enumerate({"train": train, "validation": valid}.items()):
        files[split] = write_coco(tmp_path / split / "a.json", [image_entry(1, name)], [square(1)])
        draw_image(seed).save(tmp_path / split / name)
    assert check_dataset(files).count("overlapping_crops_across_splits", "validation") == count


def test_values_of_12_bits_in_16_are_read_as_a_black_image(one):
    path = one([square(1)], "a.tif")
    values = np.asarray(draw_image(0).convert("L"), np.uint16)
    for factor, is_dark in ((16, True), (257, False)):
        PIL.Image.fromarray(values * factor).save(path.parent / "a.tif")
        assert np.asarray(load_instance_dataset(path)["train"][0]["image"]).max() < (17 if is_dark else 256)
        assert check_dataset(path).count("dark_16_bit") == is_dark


@pytest.mark.parametrize(("name", "count"), [("a.tif", 1), ("a.gif", 1), ("a.webp", 1), ("a.mpo", 0)])
def test_files_of_several_images_are_found(one, name, count):
    path = one([square(1)], name)
    first, *others = [draw_image(seed) for seed in range(3)]
    first.save(path.parent / name, save_all=True, append_images=others)
    assert check_dataset(path).count("multiple_frames") == count


def gps_without_denominators():
    """Return EXIF with the orientation 6 and the latitude 0/0, which Pillow cannot write."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x8825, 4, 1, 38)
    gps = struct.pack("<H", 1) + struct.pack("<HHII", 2, 5, 3, 56) + bytes(4)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4) + gps + bytes(24)


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (gps_without_denominators(), (60, 40)),
        (b"Exif\0\0", (40, 60)),
        (b"Exif\0\0II*\0\x08\0\0\0\x01\0", (40, 60)),
        (b"Exif\0\0" + bytes(range(64)), (40, 60)),
    ],
)
def test_an_image_with_damaged_exif_is_read_and_copied(one, tmp_path, monkeypatch, exif, size):
    path = one([square(1, bbox=[10, 10, 10, 10], area=100, segmentation=...)], "a.jpg", size)
    encoded = BytesIO()
    draw_image(0).save(encoded, "JPEG", quality=95)
    content = encoded.getvalue()
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (path.parent / "a.jpg").write_bytes(content[:2] + segment + content[2:])

    def fail(self, offset=8):  # as older releases of Pillow do
        raise ZeroDivisionError

    monkeypatch.setattr(PIL.Image.Exif, "tobytes", fail)
    assert load_instance_dataset(path)["train"][0]["image"].size == size[::-1]
    assert errors_of(check_dataset(path, fix=tmp_path / "fixed")) == {}
    assert load_instance_dataset(tmp_path / "fixed")["train"][0]["image"].size == size[::-1]


# Copies


def test_a_copy_without_images_is_not_written(one, tmp_path):
    path = one([square(1)], "missing.png")
    report = check_dataset(path, fix=tmp_path / "fixed")
    assert errors_of(report) == {"missing_file": 1, "nothing_repaired": 1}
    assert not (tmp_path / "fixed").exists()
    app = typer.Typer()
    app.command()(command.check_dataset)
    result = CliRunner().invoke(app, [str(path), "--fix", str(tmp_path / "fixed")])
    assert result.exit_code == 1
    assert "No repaired copy" in result.stdout


def test_a_split_of_which_nothing_can_be_repaired_is_not_in_the_copy(tmp_path):
    for split, name in (("train", "a.png"), ("valid", "missing.png")):
        write_coco(tmp_path / "data" / split / "_annotations.coco.json", [image_entry(1, name)], [square(1)])
    draw_image(0).save(tmp_path / "data" / "train" / "a.png")
    report = check_dataset(tmp_path / "data", fix=tmp_path / "fixed")
    assert report.count("nothing_repaired", "validation") == 1
    assert list(load_instance_dataset(tmp_path / "fixed")) == ["train"]
    changes = json.loads((tmp_path / "fixed" / "changes.json").read_text())["changes"]
    assert {"validation"} == {entry["split"] for entry in changes if entry["kind"] == "nothing_repaired"}


def test_a_split_of_crowds_is_one_warning(one):
    report = check_dataset(one([square(1, iscrowd=1), square(2, iscrowd=1)]))
    counts = counts_of(report)
    assert (counts["no_objects", "train"], counts["crowd", "train"]) == (1, 2)
    assert "1 images, 2 crowds" in str(report)
    assert "crowds that are single objects need iscrowd 0" in str(report)


def test_a_split_without_images_is_an_error(tmp_path):
    assert counts_of(check_dataset(write_coco(tmp_path / "train.json", [], []))) == {("no_images", "train"): 1} | {
        ("unused_category", "train"): 1
    }
