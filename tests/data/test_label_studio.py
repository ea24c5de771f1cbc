"""Exports of Label Studio are read to the masks that PIL and numpy draw, by the loader and by the check."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw

from annotation_programs import SIZE, check_command, masks_of, objects_of, pixel_polygon, save_image
from transformers_rfdetr import check_dataset, load_instance_dataset
from transformers_rfdetr.data.label_studio import decode_brush
from transformers_rfdetr.data.writers.label_studio import encode_brush

HEIGHT, WIDTH = SIZE


def percent(points):
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]


def result(kind="polygonlabels", label="roof", number=0, **value) -> dict:
    """Return a result; without values it is a triangle."""
    value = value or {"points": percent([(2, 3), (30, 3), (30, 20)]), "closed": True}
    labels = {kind: [label]} if kind.endswith("labels") else {}
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    head = {"id": f"r{number}", "type": kind, "from_name": "label", "to_name": "image", "origin": "manual"}
    return {**head, **size, "value": {**value, **labels}}


def rectangle(x, y, width, height, **more) -> dict:
    [[left, top], [right, bottom]] = percent([(x, y), (x + width, y + height)])
    return {"x": left, "y": top, "width": right - left, "height": bottom - top, "rotation": 0, **more}


def task(*results, image="/data/upload/1/0a1b2c3d-a.png", number=1, **annotation) -> dict:
    done = {"id": 7, "was_cancelled": False, "ground_truth": False, "result": list(results), **annotation}
    return {"id": number, "data": {"image": image}, "annotations": [done], "predictions": []}


def save(folder, *tasks, name="export.json"):
    """Write an export, and the image a.png; return the folder."""
    save_image(folder / "images" / "a.png")
    (folder / name).write_text(json.dumps(tasks))
    return folder


def encode(values: np.ndarray, repeats: bool) -> list[int]:
    """Write values of 8 bits as Label Studio's RLE, as runs of equal values or as lists of all, and mixed."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    position = 0
    while position < len(values):
        end = position + 1
        while repeats and end < len(values) and values[end] == values[position]:
            end += 1
        if end - position < 3:
            end = min(position + 7, len(values))
            bits += f"001{end - position - 1:04b}" + "".join(f"{value:08b}" for value in values[position:end])
        else:
            end = min(end, position + 256)
            bits += f"110{end - position - 1:08b}{values[position]:08b}"
        position = end
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


def brush(mask: np.ndarray, repeats=True, **more) -> dict:
    rgba = np.repeat(mask.astype(np.uint8).ravel() * 255, 4)
    return result("brushlabels", format="rle", rle=encode(rgba, repeats), **more)


def test_an_export_and_its_folder_are_read_alike(tmp_path):
    save(tmp_path, task(result(label="tree"), result(number=1)))
    for source in (tmp_path, tmp_path / "export.json"):
        data = load_instance_dataset(source)
        assert (list(data), data.id2label) == (["train"], {0: "roof", 1: "tree"})
        first, second = data["train"][0]["annotations"]
        assert (first["category_id"], second["category_id"]) == (1, 0)
        assert first["segmentation"] == [[2, 3, 30, 3, 30, 20]]
    check_command(tmp_path, objects=2, masks=2)


def test_rectangles_are_boxes_and_rotated_ones_turn_clockwise_around_their_corner(tmp_path):
    save(
        tmp_path,
        task(
            result("rectanglelabels", **rectangle(10, 5, 20, 10)),
            result("rectanglelabels", number=1, **rectangle(20, 5, 20, 10, rotation=90)),
        ),
    )
    box, turned = objects_of(tmp_path)
    assert (box["bbox"], box.get("segmentation")) == (pytest.approx([10, 5, 20, 10]), None)
    assert turned["segmentation"][0] == pytest.approx([20, 5, 20, 25, 10, 25, 10, 5])


def test_ellipses_have_their_radii_in_per_cent_of_both_sides(tmp_path):
    value = {"x": 50, "y": 50, "radiusX": 100 * 18 / WIDTH, "radiusY": 100 * 4 / HEIGHT, "rotation": 30}
    save(tmp_path, task(result("ellipselabels", **value)))
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    x, y = columns - WIDTH / 2, rows - HEIGHT / 2
    along, across = x * np.cos(np.pi / 6) + y * np.sin(np.pi / 6), y * np.cos(np.pi / 6) - x * np.sin(np.pi / 6)
    exact = along**2 / 18**2 + across**2 / 4**2 < 1
    [found] = masks_of(tmp_path)
    assert (found & exact).sum() / (found | exact).sum() > 0.9


def test_a_brush_that_label_studio_converter_wrote_is_decoded():
    """The bytes are those of `encode_rle` of label-studio-converter 0.0.59."""
    expected = np.zeros((3, 5), bool)
    expected[1, 1:4] = True
    written = [0, 0, 0, 60, 57, 27, 254, 23, 0, 183, 255, 133, 192, 0]
    assert np.array_equal(decode_brush(written, (3, 5)), expected)
    assert len(encode_brush(expected)) == len(written)


@settings(max_examples=40, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 300)), fill=st.booleans()))
def test_a_mask_that_is_encoded_as_a_brush_is_decoded_again(mask):
    assert np.array_equal(decode_brush(list(encode_brush(mask)), mask.shape), mask)


def test_runs_of_more_pixels_than_a_length_can_count_are_divided():
    mask = np.zeros((400, 500), bool)
    mask[150:390] = True
    assert np.array_equal(decode_brush(list(encode_brush(mask)), mask.shape), mask)


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 7), st.integers(1, 8), st.just(4))), st.booleans())
def test_any_brush_is_where_alpha_is_set(rgba, repeats):
    assert np.array_equal(decode_brush(encode(rgba.ravel(), repeats), rgba.shape[:2]), rgba[..., 3] >= 128)


@settings(max_examples=15, deadline=None)
@given(pixel_polygon(), st.booleans())
def test_a_brush_and_a_polygon_of_one_outline_are_the_same_object(tmp_path_factory, outline, repeats):
    canvas = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline], fill=1)
    polygon = result(number=1, points=percent(outline))
    folder = save(tmp_path_factory.mktemp("studio"), task(brush(np.array(canvas), repeats), polygon))
    drawn, found = masks_of(folder)
    assert np.array_equal(drawn, np.array(canvas))
    length = np.abs(np.diff([*outline, outline[0]], axis=0)).sum()
    assert (np.array(canvas) ^ found).sum() <= length + 4


def test_a_label_may_be_in_another_result_of_the_same_id(tmp_path):
    value = rectangle(10, 5, 20, 10)
    geometry = {**result("rectangle", number=1, **value)}
    save(
        tmp_path,
        task(
            *(result("choices", choices=["night"]), geometry, result("labels", "tree", number=1, **value)),
            *(result("labels", "roof", number=2, points=percent([(2, 3), (30, 3), (30, 20)])),),
            {"type": "relation", "from_id": "r1", "to_id": "r2", "direction": "right"},
        ),
    )
    assert load_instance_dataset(tmp_path).id2label == {0: "roof", 1: "tree"}
    check_command(tmp_path, objects=2, masks=1)


def test_only_completed_annotations_are_read(tmp_path, hf_log):
    empty, predicted = task(number=2), {**task(number=3), "annotations": [], "predictions": [{"result": [result()]}]}
    skipped, twice = task(result(), number=4, was_cancelled=True), task(result(), number=5)
    twice["annotations"].append({**twice["annotations"][0], "was_cancelled": True})
    marked = task(result(), number=6)
    marked["annotations"].append({"result": [result(), result(number=1)], "ground_truth": True})
    save(tmp_path, empty, predicted, skipped, twice, marked)
    assert [len(sample["annotations"]) for sample in load_instance_dataset(tmp_path)["train"]] == [0, 1, 2]
    assert "2 tasks without a completed annotation are not read" in hf_log.text
    marked["annotations"][0]["ground_truth"] = True
    save(tmp_path, task(result()), marked)
    with pytest.raises(ValueError, match=r"export\.json: task 6: .*one completed annotation, got 2"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_object") == 1


def test_predictions_are_read_from_tasks_to_import_which_have_no_annotations(tmp_path):
    tasks = [{"data": task(number=1)["data"], "predictions": [{"result": [result(), result(number=1)]}]}]
    save(tmp_path, *tasks)
    check_command(tmp_path, objects=2, masks=2)


def test_the_meta_text_iscrowd_marks_a_crowd_region(tmp_path):
    marked = {**result(number=1), "meta": {"text": ["iscrowd", "many"]}}
    save(tmp_path, task(result(), marked, {**result(number=2), "meta": {"text": "iscrowd"}}))
    assert [one["iscrowd"] for one in objects_of(tmp_path)] == [0, 1, 1]


@pytest.mark.parametrize(
    "address",
    [
        *("/data/upload/1/0a1b2c3d-a.png", "/data/local-files/?d=photos/images/a.png", "s3://bucket/photos/a.png"),
        *("https://example.com/photos/a.png?token=1", "images/a.png", "C:\\photos\\a.png", "/home/me/a.png"),
    ],
)
def test_images_are_found_by_the_end_of_their_address(address, tmp_path):
    save(tmp_path, task(result(), image=address))
    assert load_instance_dataset(tmp_path)["train"][0]["file_name"] == "images/a.png"
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert load_instance_dataset(tmp_path)["train"][0]["file_name"] == "elsewhere/a.png"


def test_images_outside_of_the_folder_are_not_read(tmp_path):
    save_image(tmp_path / "secret.png")
    folder = save(tmp_path / "data", task(result(), image="/data/local-files/?d=../../secret.png"))
    with pytest.raises(ValueError, match="1 of 1 images are not in"):
        load_instance_dataset(folder)
    assert check_dataset(folder).count("missing_file") == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (result("keypointlabels", x=1, y=2, width=1), "`type` must be polygon, brush, rectangle or ellipse"),
        (result("vectorlabels", vertices=[]), "got 'vectorlabels'"),
        (result(points=[[1, 2], [3, 4]]), "at least 3 points"),
        (result(points=[[1, 2], [3, 4], [5, "x"]]), "pairs of finite numbers"),
        (result(points=percent([(2, 3), (30, 3), (30, 20)]), closed=False), "must be closed"),
        (result("polygon"), "must have one label, got None"),
        ({**result(), "value": {**result()["value"], "polygonlabels": ["a", "b"]}}, "must have one label, got"),
        ({**result(), "original_width": 10**9}, "height and width must be positive integers"),
        ({**result(), "original_width": 50}, "one size, got"),
        ({**result(), "image_rotation": 90}, "`image_rotation` 90"),
        (result("ellipselabels", x=1, y=2, radiusX=0, radiusY=1), "radii must be above 0"),
        (result("rectanglelabels", x=1, y=2, width=3), "'height' is missing"),
        (result("rectanglelabels", **rectangle(1, 2, 3, 4, rotation=float("inf"))), "finite number of degrees"),
        (result("brushlabels", rle=[1, 2, 300]), "list of bytes"),
        (result("brushlabels", rle=[1, 2]), "ends after 2 bytes"),
        (result("brushlabels", rle=encode(np.zeros(4, np.uint8), True)), "4 x 40 x 48 values"),
        (result("brushlabels", rle=encode(np.zeros(4 * HEIGHT * WIDTH, np.uint8), True)[:-3]), "all pixels"),
        (result("brushlabels", rle=encode(np.arange(4 * HEIGHT * WIDTH) % 256, False)[:-3]), "all pixels"),
        ("text", "values are invalid"),
    ],
)
def test_a_result_that_cannot_be_read_is_named_with_file_and_rule(broken, message, tmp_path):
    if isinstance(broken, dict):
        broken["id"] = "broken"
    save(tmp_path, task(result(), broken))
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert f"{tmp_path}/export.json: task 1: result 1: " in str(raised.value)
    check_command(tmp_path, objects=1, exit_code=1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"id": 2, "data": 5}, "a task must have 'data' and 'annotations'"),
        ({"id": 2, "data": {"image": "a.png"}, "annotations": {"a": 1}}, "'annotations' must be a list of dicts"),
        ({"id": 2, "data": {"image": "a.png"}, "annotations": [5]}, "'annotations' must be a list of dicts"),
        ({**task(result(), number=2), "data": {"text": "no image"}}, "'data' must name one image"),
        ({**task(result(), number=2), "data": {"left": "a.png", "right": "b.png"}}, "'data' must name one image"),
        (7, "a task must have"),
    ],
)
def test_a_task_that_cannot_be_read_does_not_stop_the_check(broken, message, tmp_path):
    save(tmp_path, task(result()), broken)
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_annotation_file") == 1
