"""Unusual files that programs and people write: `check_dataset` and `load_instance_dataset` must agree about them."""

import json
import tracemalloc

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest
import typer
from typer.testing import CliRunner

from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.cli import check_dataset as command
from transformers_rfdetr.data.checks.check import check_dataset
from transformers_rfdetr.data.image_files import upright_size
from transformers_rfdetr.model.image_io import read_rgb
from transformers_rfdetr.model.masks import read_segmentation

from coco_files import (
    AREA,
    BOX,
    ORIENTATION,
    RIGHT,
    SQUARE,
    counts_of,
    draw_image,
    errors_of,
    folder_content,
    image_entry,
    save_rotated,
    square,
    write_coco,
)

app = typer.Typer()
app.command()(command.check_dataset)


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def one(tmp_path):
    """Return a function that writes a dataset of one image, a.png, of 40 x 60, with changes, and returns its JSON."""

    def write(annotations=None, images=None, **lists):
        path = tmp_path / "data" / "train.json"
        write_coco(
            path, images or [image_entry(1, "a.png")], [square(1)] if annotations is None else annotations, **lists
        )
        draw_image(0).save(path.parent / "a.png")
        return path

    return write


def read_copy(tmp_path):
    """Return the JSON of the repaired copy, in which a check finds no error."""
    assert errors_of(check_dataset(tmp_path / "fixed")) == {}
    return json.loads((tmp_path / "fixed" / "train" / "_annotations.coco.json").read_text())


# Images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "I;16"])
def test_a_tiff_is_upright_wherever_it_is_read(tmp_path, one, orientation, mode):
    path = one(images=[image_entry(1, "a.tif")])
    deep = PIL.Image.fromarray(np.asarray(draw_image(0).convert("L"), np.uint16) * 257)
    given = deep if mode == "I;16" else draw_image(0).convert(mode)
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    given.save(path.parent / "a.tif", exif=exif)
    stored = np.asarray(read_rgb(given))
    rotated = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored[::-1].swapaxes(0, 1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: stored[:, ::-1].swapaxes(0, 1),
    }
    upright = rotated.get(orientation, stored)
    assert np.array_equal(read_rgb(path.parent / "a.tif"), upright)
    assert upright_size(path.parent / "a.tif") == upright.shape[:2]
    write_coco(path, [image_entry(1, "a.tif", upright.shape[:2])], [square(1)])
    report = check_dataset(path, fix=tmp_path / "fixed")
    kind = "exif_rotation" if orientation >= 5 else "exif_frame_unknown"
    assert report.count(kind) == (orientation > 1)
    [sample] = load_instance_dataset(tmp_path / "fixed")["train"]
    assert np.array_equal(sample["image"], upright)


def test_a_tiff_that_was_annotated_as_stored_is_copied_as_stored(tmp_path, one):
    item = square(1, segmentation=[RIGHT], bbox=[50, 10, 10, 20], area=200)
    for orientation in (5, 6, 7, 8):
        path = one([item], [image_entry(1, "a.tif")])
        exif = PIL.Image.Exif()
        exif[ORIENTATION] = orientation
        draw_image(0).save(path.parent / "a.tif", exif=exif)
        fixed = tmp_path / str(orientation)
        assert errors_of(check_dataset(path, fix=fixed)) == {"exif_swapped_size": 1}
        assert counts_of(check_dataset(fixed)) == {}
        assert np.array_equal(load_instance_dataset(fixed)["train"][0]["image"], draw_image(0))


def test_a_repaired_copy_of_a_repaired_copy_is_identical(tmp_path, one):
    path = one([], [image_entry(1, "a.jpg", (99, 77))])
    save_rotated(path.parent / "a.jpg", 0, 6)
    check_dataset(path, fix=tmp_path / "fixed")
    assert check_dataset(tmp_path / "fixed", fix=tmp_path / "again").count("exif_rotation") == 0
    listed = json.loads((tmp_path / "again" / "changes.json").read_text())
    assert (listed["changes"], [entry["kind"] for entry in listed["left"]]) == ([], ["no_objects"])
    names = ("train/a.jpg", "train/_annotations.coco.json")
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "fixed" / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["webp", "avif", "png"])
def test_rotated_images_of_every_format_are_written_upright(tmp_path, one, kind):
    if kind != "png" and not PIL.features.check(kind):
        pytest.skip(f"Pillow was built without {kind}")
    path = one(images=[image_entry(1, f"a.{kind}", (60, 40))])
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    draw_image(0).save(path.parent / f"a.{kind}", exif=exif, **({"lossless": True} if kind == "webp" else {}))
    report = check_dataset(path, fix=tmp_path / "fixed")
    assert (report.count("exif_rotation"), report.has_errors) == (1, False)
    [sample] = load_instance_dataset(tmp_path / "fixed")["train"]
    difference = np.abs(np.asarray(sample["image"], int) - np.asarray(read_rgb(path.parent / f"a.{kind}"), int))
    assert sample["image"].size == (40, 60)
    assert difference.max() == 0 if kind != "avif" else difference.mean() < 3


def test_an_invalid_orientation_is_ignored(one):
    path = one(images=[image_entry(1, "a.jpg")])
    save_rotated(path.parent / "a.jpg", 0, 9)
    assert upright_size(path.parent / "a.jpg") == (40, 60)
    assert not check_dataset(path).has_errors


def test_an_image_that_the_processor_refuses_is_an_error(tmp_path, one):
    path = one(
        images=[image_entry(1, "a.tif"), image_entry(2, "b.tif")], annotations=[square(1), square(2, image_id=2)]
    )
    for name, highest in (("a.tif", 255), ("b.tif", 300)):
        values = np.linspace(0, highest, 2400).reshape(40, 60).astype(np.int32)
        PIL.Image.fromarray(values, "I").save(path.parent / name)
    report = check_dataset(path, overlays=tmp_path / "drawn")
    assert errors_of(report) == {"unreadable_image": 1}
    [found] = [found for found in report.findings if found.kind == "unreadable_image"]
    assert "[0, 300]" in found.examples[0]["detail"]
    assert len(list((tmp_path / "drawn").iterdir())) == 1


def test_lab_images_are_read(one):
    path = one(images=[image_entry(1, "a.tif")])
    PIL.Image.new("LAB", (60, 40), (120, 90, 60)).save(path.parent / "a.tif")
    assert not check_dataset(path).has_errors
    assert load_instance_dataset(path)["train"][0]["image"].size == (60, 40)


def test_only_the_beginning_of_a_file_that_is_not_an_image_is_read(one):
    path = one(images=[image_entry(1, "b.png")])
    with open(path.parent / "b.png", "wb") as file:
        file.truncate(1 << 28)
    tracemalloc.start()
    report = check_dataset(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert errors_of(report) == {"unreadable_image": 1}
    assert peak < 1 << 24


# Sizes


@pytest.mark.parametrize(
    ("height", "width", "kind"),
    [
        (None, None, "missing_size"),
        (40, None, "missing_size"),
        ("40", "60", "size_mismatch"),
        (40, "", "size_mismatch"),
        (False, 60, "size_mismatch"),
        ([], {}, "size_mismatch"),
        (40.0, 60, None),
    ],
)
def test_a_missing_or_invalid_size_is_read_from_the_file(tmp_path, one, height, width, kind):
    path = one(images=[image_entry(1, "a.png") | {"height": height, "width": width}])
    report = check_dataset(path, fix=tmp_path / "fixed")
    assert counts_of(report) == ({} if kind is None else {(kind, "train"): 1})
    assert [(item["height"], item["width"]) for item in read_copy(tmp_path)["images"]] == [(40, 60)]
    if kind == "size_mismatch":
        with pytest.raises(ValueError, match=r"height|width"):
            _ = [sample["image"] for sample in load_instance_dataset(path)["train"]]


def test_an_invalid_box_does_not_stop_the_search_for_the_size(one):
    for box in ([10, 10], {"x": 1}):
        report = check_dataset(one([square(1, segmentation=..., bbox=box)], [image_entry(1, "a.png", (80, 120))]))
        assert errors_of(report) == {"size_mismatch": 1, "invalid_box": 1}


# Objects and numbers


def test_huge_integers_are_errors_of_their_field(tmp_path, one):
    long = 10**400
    report = check_dataset(one([square(1, area=long), square(2, segmentation=[[long, *SQUARE[1:]]])]))
    assert errors_of(report) == {"invalid_area": 1, "polygon_not_finite": 1}
    for change in ({"area": long}, {"bbox": [long, 1, 2, 3]}):
        with pytest.raises(ValueError, match="finite"):
            load_instance_dataset(one([square(1, **change)]))
    with pytest.raises(ValueError, match="polygon"):
        read_segmentation([[long, *SQUARE[1:]]], (40, 60))


def test_a_polygon_of_very_many_points_is_not_searched_for_crossings(one):
    """Of 16,000 points, with every edge above all others: 128 million pairs."""
    count = 8000
    rising = np.stack([np.tile([11.0, 29.0], count), np.linspace(10, 29, 2 * count)], 1)
    outline = [*rising.ravel().tolist(), 30.0, 30.0, 30.0, 10.0]
    report = check_dataset(one([square(1, segmentation=[outline], area=...)]))
    assert not report.has_errors
    assert report.count("self_intersecting_polygon") == 0


def test_an_image_that_loses_all_objects_is_dropped(tmp_path, one):
    images = [image_entry(1, "a.png"), image_entry(2, "b.png"), image_entry(3, "c.png")]
    path = one([square(1), square(2, image_id=2, category=9), square(3, category=9)], images)
    for seed, name in enumerate(("b.png", "c.png"), 1):
        draw_image(seed).save(path.parent / name)
    report = check_dataset(path, fix=tmp_path / "fixed")
    assert (report.count("all_objects_lost"), report.count("image_without_objects")) == (1, 1)
    assert [item["id"] for item in read_copy(tmp_path)["images"]] == [1, 3]


def test_an_image_with_only_ambiguous_classes_is_dropped(tmp_path, one):
    two = [{"id": 1, "name": "m", "supercategory": "a"}, {"id": 2, "name": "m", "supercategory": "b"}]
    images = [image_entry(1, "a.png"), image_entry(2, "b.png")]
    path = one([square(1), square(2, image_id=2, category=3)], images, categories=[*two, {"id": 3, "name": "roof"}])
    draw_image(1).save(path.parent / "b.png")
    assert check_dataset(path, fix=tmp_path / "fixed").count("all_objects_lost") == 1
    assert [item["id"] for item in read_copy(tmp_path)["images"]] == [2]


def test_an_image_id_of_thousands_of_digits_is_a_finding(one):
    assert errors_of(check_dataset(one([square(1, image_id="9" * 5000)]))) == {"annotation_of_missing_image": 1}


@pytest.mark.parametrize(("stated", "used"), [("7", 7), (7, "7")])
def test_an_image_id_may_be_a_string_in_one_place_and_a_number_in_another(tmp_path, one, stated, used):
    report = check_dataset(one([square(1, image_id=used)], [image_entry(stated, "a.png")]), fix=tmp_path / "fixed")
    assert errors_of(report) == {"annotation_of_missing_image": 1}
    assert report.splits["train"]["objects"] == 1
    assert [item["image_id"] for item in read_copy(tmp_path)["annotations"]] == [stated]


def test_new_ids_fit_in_64_bits(tmp_path, one):
    last = (1 << 63) - 1
    check_dataset(one([square(last), square(last)]), fix=tmp_path / "fixed")
    assert [item["id"] for item in read_copy(tmp_path)["annotations"]] == [last, 1]


def test_non_finite_numbers_become_null_in_a_copy(tmp_path, one):
    path = one([square(1, score=float("inf"))], [image_entry(1, "a.png", note=[float("nan")])])
    check_dataset(path, fix=tmp_path / "fixed")
    copy = read_copy(tmp_path)
    assert (copy["annotations"][0]["score"], copy["images"][0]["note"]) == (None, [None])
    report = check_dataset(one(images=[image_entry(float("inf"), "a.png")], annotations=[]))
    json.dumps(report.to_dict(), allow_nan=False)


def test_annotations_may_be_null(one):
    path = one()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": None}))
    assert check_dataset(path).splits["train"]["objects"] == len(load_instance_dataset(path)["train"][0]["annotations"])


# Categories


@pytest.mark.parametrize("number", ["1", 1.0])
def test_a_category_id_that_is_a_string_or_a_float_becomes_an_integer(tmp_path, one, number):
    path = one([square(1, category=number)], categories=[{"id": number, "name": "roof"}])
    report = check_dataset(path, fix=tmp_path / "fixed")
    assert errors_of(report) == {"invalid_category": 1, "unknown_category": 1}
    copy = read_copy(tmp_path)
    assert (copy["categories"][0]["id"], copy["annotations"][0]["category_id"]) == (1, 1)


def test_a_repair_requires_a_usable_category(tmp_path, one):
    for categories in ([], [{"id": -1, "name": "roof"}]):
        path = one(categories=categories)
        assert check_dataset(path).count("no_categories") == 1
        with pytest.raises(ValueError, match=r"`fix` .*category"):
            check_dataset(path, fix=tmp_path / "fixed")
        assert not (tmp_path / "fixed").exists()


@pytest.mark.parametrize(
    ("first", "second", "are_merged"),
    [
        ({"name": "mouse"}, {"name": "mouse"}, True),
        ({"name": "mouse", "supercategory": "animal"}, {"name": "mouse", "supercategory": "electronic"}, False),
        ({"name": "2"}, {}, False),
        ({}, {"name": "1"}, False),
        ({"name": " "}, {"name": " "}, False),
    ],
)
def test_categories_of_one_name_are_merged_only_if_they_are_one_class(tmp_path, one, first, second, are_merged):
    categories = [{"id": 1} | first, {"id": 2} | second, {"id": 3, "name": "roof"}]
    path = one([square(number, category=number) for number in (1, 2, 3)], categories=categories)
    assert errors_of(check_dataset(path, fix=tmp_path / "fixed")) == {"duplicate_category_name": 1}
    assert [item["category_id"] for item in read_copy(tmp_path)["annotations"]] == ([1, 1, 3] if are_merged else [3])


def test_the_largest_id_of_two_classes_is_replaced(tmp_path):
    last = (1 << 63) - 1
    for seed, (split, name) in enumerate((("train", "roof"), ("valid", "tree"))):
        path = tmp_path / "data" / split / "_annotations.coco.json"
        write_coco(path, [image_entry(1, "a.png")], [square(1, category=last)], [{"id": last, "name": name}])
        draw_image(seed).save(path.parent / "a.png")
    check_dataset(tmp_path / "data", fix=tmp_path / "fixed")
    assert {item["id"] for item in read_copy(tmp_path)["categories"]} == {1, last}


# File names


def test_a_repaired_copy_never_writes_to_a_source_image(tmp_path):
    """An image has the name of the annotation file of the copy, and is a link to a file of the user."""
    data = tmp_path / "data"
    path = write_coco(
        data / "train.json", [image_entry(1, "_annotations.coco.json"), image_entry(2, "b.png")], [square(1)]
    )
    draw_image(0).save(tmp_path / "private.png")
    (data / "_annotations.coco.json").symlink_to(tmp_path / "private.png")
    draw_image(1).save(data / "b.png")
    before = folder_content(tmp_path)
    check_dataset(path, fix=tmp_path / "fixed")
    assert {file: file.read_bytes() for file in before} == before
    names = {item["id"]: item["file_name"] for item in read_copy(tmp_path)["images"]}
    assert names == {1: "_annotations.coco_2.json", 2: "b.png"}
    assert (tmp_path / "fixed" / "train" / names[1]).samefile(tmp_path / "private.png")


def test_one_file_of_two_images_is_copied_once_for_each_rotation(tmp_path, one):
    """EXIF rotates the file: one image was annotated upright, the other as stored."""
    upright = [10, 45, 30, 45, 30, 55, 10, 55]
    items = [square(1, segmentation=[upright], bbox=[10, 45, 20, 10], area=200)]
    items += [square(2, image_id=2, segmentation=[RIGHT], bbox=[50, 10, 10, 20], area=200)]
    path = one(items, [image_entry(1, "a.jpg", (60, 40)), image_entry(2, "a.jpg", (40, 60))])
    save_rotated(path.parent / "a.jpg", 0, 6)
    check_dataset(path, fix=tmp_path / "fixed")
    copy = read_copy(tmp_path)
    sizes = {item["file_name"]: (item["height"], item["width"]) for item in copy["images"]}
    assert sizes == {"a.jpg": (60, 40), "a_2.jpg": (40, 60)}
    for name, size in sizes.items():
        assert PIL.Image.open(tmp_path / "fixed" / "train" / name).size == size[::-1]


def test_names_that_differ_by_a_symbolic_link_are_two_files_in_the_copy(tmp_path, one):
    path = one(
        images=[image_entry(1, "a.png"), image_entry(2, "link/../a.png")],
        annotations=[square(1), square(2, image_id=2)],
    )
    (tmp_path / "elsewhere" / "inside").mkdir(parents=True)
    draw_image(5).save(tmp_path / "elsewhere" / "a.png")
    (path.parent / "link").symlink_to(tmp_path / "elsewhere" / "inside")
    check_dataset(path, fix=tmp_path / "fixed")
    names = {item["id"]: item["file_name"] for item in read_copy(tmp_path)["images"]}
    for number, seed in ((1, 0), (2, 5)):
        assert np.array_equal(PIL.Image.open(tmp_path / "fixed" / "train" / names[number]), draw_image(seed))


def test_two_spellings_of_a_name_with_one_id_are_one_entry(tmp_path, one):
    report = check_dataset(one(images=[image_entry(1, "a.png"), image_entry(1, "./a.png")]), fix=tmp_path / "fixed")
    assert errors_of(report) == {"duplicate_image_id": 1}
    assert len(read_copy(tmp_path)["annotations"]) == 1


def test_image_folder_decides_which_names_are_inside(tmp_path, one):
    """A name with ../ and an absolute one are read by loader and check if they lie in `image_folder`."""
    path = one()
    images = tmp_path / "images"
    images.mkdir()
    for name in ("../images/b.png", str(images / "b.png")):
        draw_image(1).save(images / "b.png")
        write_coco(path, [image_entry(1, name)], [square(1)])
        with pytest.raises(ValueError, match="image_folder"):
            load_instance_dataset(path)
        assert errors_of(check_dataset(path)) == {"unsafe_file_name": 1}
        assert np.array_equal(load_instance_dataset(path, image_folder=images)["train"][0]["image"], draw_image(1))
        report = check_dataset(path, image_folder=images, fix=tmp_path / "fixed")
        assert counts_of(report) == {}
        assert [item["file_name"] for item in read_copy(tmp_path)["images"]] == ["b.png"]
        for written in sorted((tmp_path / "fixed").rglob("*"), reverse=True):
            written.rmdir() if written.is_dir() else written.unlink()


def test_a_coco_json_of_any_name_in_a_folder_is_read_and_named(one, hf_log):
    path = one()
    assert not check_dataset(path.parent).has_errors
    assert len(load_instance_dataset(path.parent)["train"]) == 1
    assert str(path) in hf_log.text


def test_a_byte_order_mark_is_ignored(one):
    path = one()
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert not check_dataset(path).has_errors
    assert len(load_instance_dataset(path)["train"]) == 1
    path.write_text("{")
    for read in (check_dataset, load_instance_dataset):
        with pytest.raises(ValueError, match=r"train\.json") as raised:
            read(path)
        assert str(raised.value).count("train.json") == 1


def test_an_image_as_source_is_refused_and_not_searched_on_the_hub(one):
    result = CliRunner().invoke(app, [str(one().parent / "a.png")])
    assert (result.exit_code, "a.png" in result.stderr, "COCO JSON" in result.stderr) == (2, True, True)


# YOLO


@pytest.fixture
def yolo(tmp_path):
    folder = tmp_path / "yolo"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    draw_image(0).save(folder / "images" / "a.png")
    (folder / "labels" / "a.txt").write_text("0 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75")
    (folder / "data.yaml").write_text("names: [roof]\ntrain: images\n")
    return folder


def test_files_of_annotation_tools_beside_the_labels_are_ignored(yolo):
    (yolo / "labels" / "classes.txt").write_text("roof\n")
    (yolo / "labels" / "a.txt").write_text("0.0 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75\n", encoding="utf-8-sig")
    assert counts_of(check_dataset(yolo)) == {}
    assert len(load_instance_dataset(yolo)["train"][0]["annotations"]) == 1


def test_a_box_clipped_at_the_edge_has_the_clipped_area(yolo):
    (yolo / "labels" / "a.txt").write_text("0 0.0 0.5 0.9 0.5\n")
    report = check_dataset(yolo)
    assert counts_of(report) == {("box_beyond_edge", "train"): 1, ("boxes_only", "train"): 1}
    [item] = load_instance_dataset(yolo)["train"][0]["annotations"]
    assert item["area"] == pytest.approx(0.45 * 60 * 0.5 * 40)


def test_labels_are_found_below_a_folder_called_images(tmp_path, yolo):
    root = tmp_path / "images" / "set"
    (root / "train").mkdir(parents=True)
    (yolo / "images" / "a.png").rename(root / "train" / "a.png")
    (yolo / "labels" / "a.txt").rename(root / "train" / "a.txt")
    (root / "data.yaml").write_text("names: [roof]\ntrain: train\n")
    assert check_dataset(root).splits["train"]["objects"] == 1
    assert len(load_instance_dataset(root)["train"][0]["annotations"]) == 1


def test_an_image_without_a_readable_label_is_dropped(tmp_path, yolo):
    draw_image(1).save(yolo / "images" / "b.png")
    (yolo / "labels" / "b.txt").write_text("0 0.5 x\n")
    report = check_dataset(yolo, fix=tmp_path / "fixed")
    assert (report.count("all_objects_lost"), report.count("image_without_objects")) == (1, 0)
    assert [item["file_name"] for item in read_copy(tmp_path)["images"]] == ["images/a.png"]


def test_a_missing_image_of_a_list_is_a_finding(yolo):
    (yolo / "train.txt").write_text("images/a.png\nimages/gone.png\n")
    (yolo / "data.yaml").write_text("names: [roof]\ntrain: train.txt\n")
    assert errors_of(check_dataset(yolo)) == {"missing_file": 1}
    with pytest.raises(ValueError, match=r"1 of 2 .*gone\.png"):
        load_instance_dataset(yolo)


def test_a_data_yaml_beside_its_folder_is_checked_with_image_folder(yolo, tmp_path):
    description = tmp_path / "configs" / "data.yaml"
    description.parent.mkdir()
    description.write_text("path: ../yolo\nnames: [roof]\ntrain: images\n")
    with pytest.raises(ValueError, match="image_folder"):
        check_dataset(description)
    assert counts_of(check_dataset(description, image_folder=yolo)) == {}
    assert len(load_instance_dataset(description, image_folder=yolo)["train"]) == 1


# Rows


def test_rows_may_share_a_string_id(tmp_path):
    datasets = pytest.importorskip("datasets")
    objects = [{"bbox": [10.0, 10, 20, 20], "category": 0, "area": float(AREA), "segmentation": [SQUARE]}]
    wide = [
        {
            "bbox": [70.0, 10, 20, 20],
            "category": 0,
            "area": float(AREA),
            "segmentation": [[70.0, 10, 90, 10, 90, 30, 70, 30]],
        }
    ]
    given = [
        {"image": draw_image(0), "image_id": "scene", "objects": objects},
        {"image": draw_image(1, (40, 100)), "image_id": "scene", "objects": wide},
    ]
    rows = datasets.Dataset.from_list(given).cast_column("image", datasets.Image())
    report = check_dataset(rows)
    assert counts_of(report) == {}
    assert report.splits["train"]["objects"] == 2
    assert len(load_instance_dataset(rows)["train"]) == 2
    json.dumps(report.to_dict())


# The command


def test_a_report_with_unprintable_names_is_printed_and_written(tmp_path, one):
    names = ["\x1b[2J.png", "a\nb.png", "\ud800.png", "日本.png", "e" * 245 + ".png"]
    images = [image_entry(number, name) for number, name in enumerate(names, 1)]
    path = one([square(number, image_id=number) for number in range(1, 4)], images)
    for seed, name in enumerate(names):
        if name.isprintable():
            draw_image(seed).save(path.parent / name)
    report = tmp_path / "report.json"
    for charset in ("utf-8", "cp1252"):
        given = [str(path), "--json", str(report), "--overlays", str(tmp_path / "drawn")]
        result = CliRunner(charset=charset).invoke(app, given)
        assert result.exit_code == 1, result.output
        assert "\x1b" not in result.stdout
        assert "missing_file" in result.stdout
        assert "a\\nb.png" in result.stdout
        found = json.loads(report.read_text())["findings"]
        assert [example["file_name"] for example in found[0]["examples"]] == names[:3]
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_the_option_json_never_overwrites_another_file(tmp_path, one):
    path = one()
    before = folder_content(tmp_path)
    for taken in (path, path.parent / "a.png"):
        result = CliRunner().invoke(app, [str(path), "--json", str(taken)])
        assert result.exit_code == 2
        assert f"--json must be a new file or an earlier report, got {taken}" in result.stderr
        assert folder_content(tmp_path) == before
    (path.parent / "report.json").touch()
    for _ in range(2):  # an empty file and an earlier report are overwritten
        assert CliRunner().invoke(app, [str(path), "--json", str(path.parent / "report.json")]).exit_code == 0
    assert json.loads(path.read_text())["annotations"][0]["bbox"] == BOX
