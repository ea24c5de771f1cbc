"""Projects of Supervisely are read to the masks that PIL and numpy draw, holes included."""

import base64
import json
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from annotation_programs import SIZE, check_command, masks_of, objects_of, save_image
from transformers_rfdetr import check_dataset, load_instance_dataset

HEIGHT, WIDTH = SIZE
SQUARE = [[4, 4], [34, 4], [34, 34], [4, 34]]
HOLE, OTHER_HOLE = [[10, 10], [20, 10], [20, 20], [10, 20]], [[24, 24], [30, 24], [30, 30]]


def item(kind="polygon", exterior=((2, 3), (30, 3), (30, 20)), interior=(), title="roof", **more) -> dict:
    points = {"exterior": exterior, "interior": interior}
    return {"id": 5, "classTitle": title, "geometryType": kind, "tags": [], "points": points, **more}


def bitmap(mask: np.ndarray, origin, **more) -> dict:
    """Return a mask as Supervisely's SDK writes it: a palette of two colors, of which the first is transparent."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    buffer = BytesIO()
    image.save(buffer, "PNG", transparency=0, optimize=0)
    data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
    fields = {"bitmap": {"data": data, "origin": list(origin)}, **more}
    return {"id": 6, "classTitle": "roof", "geometryType": "bitmap", "tags": [], **fields}


def save(project, *items, dataset="ds", name="a.png", size=None):
    """Write a project of one image; return its folder."""
    save_image(project / dataset / "img" / name)
    (project / dataset / "ann").mkdir(exist_ok=True)
    content = {"description": "", "tags": [], "size": size or {"height": HEIGHT, "width": WIDTH}, "objects": items}
    (project / dataset / "ann" / f"{name}.json").write_text(json.dumps(content))
    classes = [{"title": title, "shape": "any", "color": "#0F0"} for title in ("roof", "tree")]
    (project / "meta.json").write_text(json.dumps({"classes": classes, "tags": [], "projectType": "images"}))
    return project


def test_a_project_is_read_with_the_classes_of_its_description(tmp_path):
    save(tmp_path, item(), item("rectangle", [[30, 20], [10, 5]]))
    data = load_instance_dataset(tmp_path)
    assert data.id2label == {0: "roof", 1: "tree"}
    polygon, box = data["train"][0]["annotations"]
    assert polygon["segmentation"] == [[2, 3, 30, 3, 30, 20]]
    assert (box["bbox"], box.get("segmentation")) == ([10, 5, 20, 15], None)
    check_command(tmp_path, objects=2, masks=1)
    assert len(objects_of(tmp_path / "ds" / "ann" / "a.png.json", image_folder=tmp_path / "ds" / "img")) == 2


def test_holes_stay_holes(tmp_path):
    save(tmp_path, item(exterior=SQUARE, interior=[HOLE, OTHER_HOLE]), item(exterior=SQUARE))
    with_holes, filled = masks_of(tmp_path)
    expected = np.zeros(SIZE, bool)
    expected[4:34, 4:34] = True
    assert np.array_equal(filled, expected)
    expected[10:20, 10:20] = False
    triangle = coco_mask.frPyObjects([[24, 24, 30, 24, 30, 30]], HEIGHT, WIDTH)
    expected &= ~coco_mask.decode(coco_mask.merge(triangle)).astype(bool)
    assert np.array_equal(with_holes, expected)


@settings(max_examples=25, deadline=None)
@given(
    arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 9))),
    st.integers(-4, HEIGHT - 4),
    st.integers(-4, WIDTH - 4),
)
def test_bitmaps_are_read_exactly_and_cut_off_at_the_edges(tmp_path_factory, mask, top, left):
    folder = save(tmp_path_factory.mktemp("project"), bitmap(mask, (left, top)))
    canvas = Image.new("1", (WIDTH, HEIGHT))
    canvas.paste(Image.fromarray(mask), (left, top))
    assert np.array_equal(masks_of(folder)[0], np.array(canvas))


def test_bound_objects_of_one_class_are_one_object(tmp_path):
    mask = bitmap(np.ones((2, 2)), (40, 36), instance="5f")
    save(tmp_path, item(exterior=SQUARE, instance="5f"), mask, item(exterior=SQUARE, instance="5f", title="tree"))
    assert [int(mask.sum()) for mask in masks_of(tmp_path)] == [904, 900]


def test_bitmaps_without_transparency_are_read_too(tmp_path):
    mask = np.eye(5, dtype=bool)
    buffer = BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
    save(tmp_path, bitmap(mask, (3, 2)), bitmap(mask, (3, 2), bitmap={"data": data, "origin": [3, 2]}))
    first, second = masks_of(tmp_path)
    assert first.sum() == 5
    assert np.array_equal(first, second)


def test_datasets_that_are_called_as_splits_are_splits(tmp_path):
    for dataset in ("train", "val"):
        save(tmp_path, item(), dataset=dataset)
    data = load_instance_dataset(tmp_path)
    assert {name: [sample["file_name"] for sample in split] for name, split in data.items()} == {
        "train": ["train/img/a.png"],
        "validation": ["val/img/a.png"],
    }


BOMB = base64.b64encode(zlib.compress(bytes(1 << 20))).decode()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (item("line"), "must be polygon, rectangle or bitmap, got 'line'"),
        (item("point"), "got 'point'"),
        (item(exterior=[[1, 2], [3, 4]]), "at least 3 points"),
        (item(exterior=[[1, 2], [3, None], [5, 6]]), "pairs of finite numbers"),
        (item(interior=[[[1, 2]]]), "at least 3 points"),
        (item("rectangle", [[1, 2]]), "not enough values"),
        (item(title=""), "`classTitle` must be a name"),
        (item(points={}), "'exterior' is missing"),
        (bitmap(np.ones((2, 2)), (0, 0), bitmap={"data": "AAAA", "origin": [0, 0]}), "zlib"),
        (bitmap(np.ones((2, 2)), (0, 0), bitmap={"data": BOMB, "origin": [0, 0]}), "at most 1000 bytes"),
        (bitmap(np.ones((HEIGHT + 1, 2)), (0, 0)), "at most 40 x 48 pixels, got 41 x 2"),
        (bitmap(np.ones((2, 2)), (float("nan"), 0)), "pairs of finite numbers"),
        (bitmap(np.ones((2, 2)), (0, 0), bitmap={"data": None, "origin": [0, 0]}), "base64"),
        ("text", "values are invalid"),
    ],
)
def test_an_object_that_cannot_be_read_is_named_with_file_and_rule(broken, message, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_rfdetr.data.supervisely.MAX_PNG_BYTES", 1000)
    save(tmp_path, item(), broken)
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert f"{tmp_path}/ds/ann/a.png.json: object 1: " in str(raised.value)
    check_command(tmp_path, objects=1, exit_code=1)


def test_files_that_cannot_be_read_do_not_stop_the_check(tmp_path):
    save(tmp_path, item())
    save(tmp_path, item(), name="b.png", size={"height": 10**6, "width": 10**6})
    (tmp_path / "meta.json").write_text('{"classes": 5}')
    with pytest.raises(ValueError, match=r"meta\.json must have a list 'classes'.*\(1 more"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_annotation_file") == 2


def test_polygons_are_those_of_pil_up_to_their_outline(tmp_path):
    outline = [[3, 30], [20, 2], [44, 25], [20, 14]]
    save(tmp_path, item(exterior=outline))
    canvas = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline], fill=1)
    length = np.abs(np.diff([*outline, outline[0]], axis=0)).sum()
    assert (np.array(canvas) ^ masks_of(tmp_path)[0]).sum() <= length
