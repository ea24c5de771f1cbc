"""Files of labelme are read to the masks that PIL and pycocotools draw, by the loader and by the check."""

import base64
import json
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from annotation_programs import SIZE, check_command, masks_of, objects_of, pixel_polygon, save_image
from transformers_rfdetr import check_dataset, load_instance_dataset

HEIGHT, WIDTH = SIZE


def item(label="roof", kind="polygon", points=((2, 3), (30, 3), (30, 20)), **more) -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def save(folder, *items, name="a", image=True, **more):
    """Write a file of labelme, and its image; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if image:
        save_image(folder / f"{name}.png")
    content = {"version": "5.5.0", "flags": {}, "shapes": items, "imagePath": f"{name}.png", "imageData": None}
    content |= {"imageHeight": HEIGHT, "imageWidth": WIDTH} | more
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def png(mask: np.ndarray) -> str:
    buffer = BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_file_and_its_folder_are_read_alike(tmp_path):
    save(tmp_path, item("tree"), item("roof"))
    for source in (tmp_path, tmp_path / "a.json", str(tmp_path)):
        data = load_instance_dataset(source)
        assert (list(data), data.id2label) == (["train"], {0: "roof", 1: "tree"})
        assert data.category_ids == [1, 2]
        assert [found["category_id"] for found in data["train"][0]["annotations"]] == [1, 0]
    check_command(tmp_path, objects=2)


def test_polygons_are_read_as_they_are(tmp_path):
    save(tmp_path, item(points=[[2.5, 3], [30, 3.25], [30, 20]]))
    [found] = objects_of(tmp_path)
    assert found["segmentation"] == [[2.5, 3, 30, 3.25, 30, 20]]


def test_a_rectangle_is_a_box_without_a_mask_whichever_corners_it_has(tmp_path):
    save(tmp_path, item(kind="rectangle", points=[[30, 20], [10, 5]]))
    [found] = objects_of(tmp_path)
    assert found["bbox"] == [10, 5, 20, 15]
    assert not found.get("segmentation")
    assert check_dataset(tmp_path).count("boxes_only") == 1


def test_rectangles_of_four_corners_are_boxes_and_turned_ones_are_polygons(tmp_path):
    upright, turned = [[10, 5], [30, 5], [30, 20], [10, 20]], [[20, 5], [30, 15], [20, 25], [10, 15]]
    save(tmp_path, item(kind="rectangle", points=upright), item(kind="rotation", points=turned))
    first, second = objects_of(tmp_path)
    assert first["bbox"] == [10, 5, 20, 15]
    assert second["segmentation"] == [[20, 5, 30, 15, 20, 25, 10, 15]]


def test_a_circle_is_its_center_and_a_point_on_it(tmp_path):
    save(tmp_path, item(kind="circle", points=[[24, 20], [24 + 6, 20 + 8]]))
    [mask] = masks_of(tmp_path)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    exact = (columns - 24) ** 2 + (rows - 20) ** 2 < 10**2
    assert (mask & exact).sum() / (mask | exact).sum() > 0.97
    [found] = objects_of(tmp_path)
    assert found["bbox"] == pytest.approx([14, 10, 20, 20], abs=1)


def test_a_mask_lies_in_its_box_of_pixels(tmp_path):
    mask = np.zeros((6, 9), bool)
    mask[1:5, 2:] = True
    mask[3, 4] = False
    expected = np.zeros(SIZE, bool)
    expected[7:13, 11:20] = mask
    save(tmp_path, item(kind="mask", points=[[11.0, 7.0], [19.0, 12.0]], mask=png(mask)))
    assert np.array_equal(masks_of(tmp_path)[0], expected)
    check_command(tmp_path, objects=1)


def test_parts_of_a_group_and_label_are_one_object(tmp_path):
    square, other = [[2, 2], [8, 2], [8, 8], [2, 8]], [[20, 20], [26, 20], [26, 26], [20, 26]]
    mask = item(kind="mask", points=[[30, 30], [33, 33]], mask=png(np.ones((4, 4))), group_id=2)
    save(
        tmp_path,
        *(item(points=square, group_id=1), item("tree", points=square, group_id=1), item(points=other, group_id=1)),
        *(mask, item(points=square, group_id=2), item(points=square), item(points=other)),
        *(item(kind="rectangle", points=[[1, 1], [5, 5]], group_id=3),),
        *(item(kind="rectangle", points=[[9, 2], [11, 4]], group_id=3),),
    )
    masks = masks_of(tmp_path)
    assert [int(mask.sum()) for mask in masks] == [72, 36, 52, 36, 36, 0]
    assert objects_of(tmp_path)[-1]["bbox"] == [1, 1, 10, 4]


def test_ignored_labels_are_left_out_and_said(tmp_path, hf_log):
    save(tmp_path, item("__ignore__"), item("_background_"), item("__ignore__"), item())
    assert len(objects_of(tmp_path)) == 1
    assert "2 regions labelled '__ignore__' are not read" in hf_log.text
    assert check_dataset(tmp_path).count("layout") == 2


@pytest.mark.parametrize("kind", ["line", "linestrip", "point", "points", "cuboid", 7])
def test_what_encloses_no_pixels_is_refused_and_dropped_in_a_repaired_copy(kind, tmp_path):
    save(tmp_path / "source", item(), item(kind=kind, points=[[1, 2], [3, 4], [5, 5]]))
    with pytest.raises(ValueError, match=r"a\.json: shape 1: `shape_type` must be polygon"):
        load_instance_dataset(tmp_path / "source")
    report = check_dataset(tmp_path / "source", fix=tmp_path / "fixed")
    assert (report.has_errors, report.count("invalid_object")) == (True, 1)
    assert len(load_instance_dataset(tmp_path / "fixed")["train"][0]["annotations"]) == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (item(points=[[1, 2], [3, 4]]), "at least 3 points, got 2"),
        (item(points=[[1, 2], [3, 4], [5]]), "pairs of finite numbers"),
        (item(points=[[1, 2], [3, 4], [5, float("nan")]]), "pairs of finite numbers"),
        (item(points=[[1, 2], [3, 4], [5, 1e300]]), "below 1e6"),
        (item(points=[[1, 2], [3, 4], [5, 10**400]]), "pairs of finite numbers|invalid"),
        (item(points={}), "pairs of finite numbers"),
        (item(kind="rectangle", points=[[1, 2]]), "2 points, got 1"),
        (item(kind="circle", points=[[1, 2], [1, 2]]), "radii must be above 0"),
        (item(kind="mask", points=[[1, 2], [3, 4]]), "'mask' is missing"),
        (item(kind="mask", points=[[1, 2], [3, 4]], mask="%"), "base64"),
        (item(kind="mask", points=[[1, 2], [3, 4]], mask="AAAA"), "PNG"),
        (item(kind="mask", points=[[1, 2], [3, 4]], mask=png(np.ones((2, 3)))), "3 x 3 pixels, got 2 x 3"),
        (item(kind="mask", points=[[1, 2], [3, 4]], mask=png(np.ones((3000, 3000)))), "at most 3 x 3 pixels"),
        (item(label=None), "`label` must be a name, got None"),
        ({"label": "roof"}, "'points' is missing"),
        (7, "its values are invalid"),
        (None, "its values are invalid"),
    ],
)
def test_an_object_that_cannot_be_read_is_named_with_file_and_rule(broken, message, tmp_path):
    save(tmp_path, item(), broken)
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert f"{tmp_path}/a.json: shape 1: " in str(raised.value)
    assert check_dataset(tmp_path).count("invalid_object") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imageHeight": 10**9, "imageWidth": 10**9}, "height and width must be positive integers"),
        ({"imageHeight": "many"}, "many"),
        ({"imagePath": 5}, "name of the image must be a string, got 5"),
        ({"shapes": {}}, "'shapes' must be a list, got dict"),
    ],
)
def test_a_file_that_cannot_be_read_does_not_stop_the_check(change, message, tmp_path):
    save(save(tmp_path, item()), item(), name="b", **change)
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(tmp_path)
    report = check_dataset(tmp_path)
    assert (report.count("invalid_annotation_file"), report.splits["train"]["objects"]) == (2, 1)


def test_other_json_files_beside_the_annotations_are_named(tmp_path, hf_log):
    (save(tmp_path, item()) / "classes.json").write_text("[]")
    assert len(load_instance_dataset(tmp_path)["train"]) == 1
    assert "classes.json is not a file of labelme" in hf_log.text


def test_folders_name_the_splits(tmp_path):
    save(tmp_path / "valid", item("tree"))
    save(tmp_path / "train2017", item(), name="b")
    data = load_instance_dataset(tmp_path)
    assert {name: len(split) for name, split in data.items()} == {"train": 1, "validation": 1}
    assert data.id2label == {0: "roof", 1: "tree"}
    by_split = load_instance_dataset({"val": tmp_path / "valid", "train": tmp_path / "train2017"})
    assert {name: len(split) for name, split in by_split.items()} == {"train": 1, "validation": 1}
    assert by_split.id2label == data.id2label
    save(tmp_path, item(), name="c")
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=r"folders of splits, such as train, validation.*c\.json outside"):
            read(tmp_path)


@pytest.mark.parametrize("path", ["..\\images\\a.png", "../images/a.png", "C:\\work\\a.png", "/home/me/a.png"])
def test_images_are_found_under_paths_of_another_computer(path, tmp_path):
    save(tmp_path / "labels", item(), image=False, imagePath=path)
    save_image(tmp_path / "images" / "a.png")
    assert load_instance_dataset(tmp_path)["train"][0]["image"].size == (WIDTH, HEIGHT)
    assert load_instance_dataset(tmp_path / "labels", image_folder=tmp_path / "images")["train"][0]["image"]
    assert not check_dataset(tmp_path).has_errors


def test_images_outside_of_the_folder_are_not_read(tmp_path):
    save_image(tmp_path / "secret.png")
    folder = save(tmp_path / "data", item(), image=False, imagePath="../secret.png")
    with pytest.raises(ValueError, match="must stay inside the folder"):
        load_instance_dataset(folder)
    assert check_dataset(folder).count("unsafe_file_name") == 1
    assert load_instance_dataset(folder, image_folder=tmp_path)["train"][0]["image"]


def test_an_image_that_exists_only_in_the_file_is_named_with_a_remedy(tmp_path, hf_log):
    save(tmp_path, item(), image=False, imageData="AAAA")
    with pytest.raises(ValueError, match="1 of 1 images are not in"):
        load_instance_dataset(tmp_path)
    assert "labelme_export_json" in hf_log.text
    report = check_dataset(tmp_path)
    assert (report.count("missing_file"), report.count("layout")) == (1, 1)


def test_files_that_are_too_large_are_refused(tmp_path, monkeypatch):
    save(tmp_path, item())
    monkeypatch.setattr("transformers_rfdetr.data.annotation_files.MAX_FILE_BYTES", 2000)
    save(tmp_path, item(), name="b", imageData="A" * 2000)
    with pytest.raises(ValueError, match=r"b\.json must have at most 2000 bytes"):
        load_instance_dataset(tmp_path)


def test_an_empty_list_of_objects_is_an_image_without_objects(tmp_path):
    save(save(tmp_path, item()), name="b")
    assert [len(sample["annotations"]) for sample in load_instance_dataset(tmp_path)["train"]] == [1, 0]
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match="must have an object, got none"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("no_objects") == 1


@settings(max_examples=20, deadline=None)
@given(st.lists(pixel_polygon(), min_size=1, max_size=3), st.integers(0, 9), st.integers(0, 9))
def test_polygons_and_masks_of_one_outline_are_the_same_object(tmp_path_factory, outlines, top, left):
    """The mask is drawn by PIL, the polygon by pycocotools; they differ by pixels of the outline only."""
    folder = tmp_path_factory.mktemp("labelme")
    drawn = Image.new("1", (WIDTH, HEIGHT))
    for outline in outlines:
        ImageDraw.Draw(drawn).polygon([tuple(point) for point in outline], fill=1)
    mask = np.array(drawn)[top:, left:]
    box = [[left, top], [WIDTH - 1, HEIGHT - 1]]
    parts = [item("tree", points=outline, group_id=0) for outline in outlines]
    save(folder, item(kind="mask", points=box, mask=png(mask)), *parts)
    first, second = masks_of(folder)
    expected = np.array(drawn)
    expected[:top] = expected[:, :left] = False
    assert np.array_equal(first, expected)
    outline_pixels = sum(np.abs(np.diff([*line, line[0]], axis=0)).sum() + 4 for line in map(np.array, outlines))
    assert (second ^ np.array(drawn)).sum() <= outline_pixels
