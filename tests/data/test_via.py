"""Files of VIA 1, 2 and 3 are read to the same objects, by the loader and by the check."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageDraw

from annotation_programs import SIZE, check_command, masks_of, objects_of, pixel_polygon, save_image
from transformers_rfdetr import check_dataset, load_instance_dataset

HEIGHT, WIDTH = SIZE
TRIANGLE = {"name": "polygon", "all_points_x": [2, 30, 30], "all_points_y": [3, 3, 20]}


def region(geometry=None, **attributes) -> dict:
    return {"shape_attributes": TRIANGLE if geometry is None else geometry, "region_attributes": attributes}


def save(folder, *regions, name="via.json", image="a.png", project=False, as_dict=False):
    """Write the annotations of one image as VIA 2 exports them, and the image; return the folder."""
    save_image(folder / "a.png")
    listed = {str(index): item for index, item in enumerate(regions)} if as_dict else list(regions)
    content = {f"{image}99": {"filename": image, "size": 99, "regions": listed, "file_attributes": {}}}
    if project:
        content = {"_via_settings": {"ui": {}}, "_via_img_metadata": content, "_via_attributes": {"region": {}}}
    (folder / name).write_text(json.dumps(content))
    return folder


def save_via_3(folder, metadata, file_name="a.png"):
    save_image(folder / "a.png")
    options = {"0": "roof", "1": "tree"}
    content = {
        "project": {"pid": "__VIA_PROJECT_ID__", "data_format_version": "3.1.1"},
        "config": {},
        "attribute": {"1": {"aname": "class", "anchor_id": "FILE1_Z0_XY1", "type": 4, "options": options}},
        "file": {"1": {"fid": "1", "fname": file_name, "type": 2, "loc": 1, "src": file_name}},
        "metadata": metadata,
        "view": {"1": {"fid_list": ["1"]}},
    }
    (folder / "via.json").write_text(json.dumps(content))
    return folder


def entry(*numbers, av=None, **more) -> dict:
    return {"vid": "1", "flg": 0, "z": [], "xy": list(numbers), "av": av or {"1": "0"}, **more}


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_projects_and_exports_of_via_1_and_2_are_read_alike(project, as_dict, tmp_path):
    save(tmp_path, region(material="tile"), region(material="slate"), project=project, as_dict=as_dict)
    for source in (tmp_path, tmp_path / "via.json"):
        data = load_instance_dataset(source)
        assert data.id2label == {0: "slate", 1: "tile"}
        first, second = data["train"][0]["annotations"]
        assert (first["category_id"], second["category_id"]) == (1, 0)
        assert first["segmentation"] == [[2, 3, 30, 3, 30, 20]]
    check_command(tmp_path, objects=2, masks=2)


def test_rects_are_boxes_and_circles_and_ellipses_are_masks(tmp_path):
    geometries = [
        {"name": "rect", "x": 3, "y": 4, "width": 20, "height": 10},
        {"name": "circle", "cx": 24, "cy": 20, "r": 9.5},
        {"name": "ellipse", "cx": 24, "cy": 20, "rx": 18, "ry": 4, "theta": math.radians(30)},
        {"name": "ellipse", "cx": 24, "cy": 20, "rx": 18, "ry": 4},
    ]
    save(tmp_path, *(region(geometry, name="roof") for geometry in geometries))
    box = objects_of(tmp_path)[0]
    assert (box["bbox"], box.get("segmentation")) == ([3, 4, 20, 10], None)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    x, y = columns - 24, rows - 20
    turned = (x * math.cos(math.pi / 6) + y * math.sin(math.pi / 6)) ** 2 / 18**2
    turned += (y * math.cos(math.pi / 6) - x * math.sin(math.pi / 6)) ** 2 / 4**2
    exact = [x**2 + y**2 < 9.5**2, turned < 1, x**2 / 18**2 + y**2 / 4**2 < 1]
    for found, expected in zip(masks_of(tmp_path)[1:], exact, strict=True):
        assert (found & expected).sum() / (found | expected).sum() > 0.9


def test_a_project_of_via_3_is_read_like_one_of_via_2(tmp_path):
    metadata = {
        "1_a": entry(7, 2, 3, 30, 3, 30, 20),
        "1_b": entry(2, 3, 4, 20, 10, av={"1": "1"}),
        "1_c": entry(3, 24, 20, 9.5),
        "1_d": entry(4, 24, 20, 18, 4),
        "1_e": entry(av={"1": "0"}),  # an attribute of the image
    }
    save_via_3(tmp_path / "3", metadata)
    geometries = [
        TRIANGLE,
        {"name": "rect", "x": 3, "y": 4, "width": 20, "height": 10},
        {"name": "circle", "cx": 24, "cy": 20, "r": 9.5},
        {"name": "ellipse", "cx": 24, "cy": 20, "rx": 18, "ry": 4},
    ]
    names = ["roof", "tree", "roof", "roof"]
    save(tmp_path / "2", *(region(item, label=name) for item, name in zip(geometries, names, strict=True)))
    assert objects_of(tmp_path / "3") == objects_of(tmp_path / "2")
    assert load_instance_dataset(tmp_path / "3").id2label == {0: "roof", 1: "tree"}
    check_command(tmp_path / "3", objects=4, masks=3)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (entry(6, 2, 3, 30, 3, 30, 20), "got 'polyline', which encloses no pixels"),
        (entry(1, 2, 3), "got 'point'"),
        (entry(8, 2, 3, 4, 5), "got 'geometry 8'"),
        (entry(7, 2, 3, 4, 5), "at least 3 points"),
        (entry(2, 2, 3, 4), "'height' is missing"),
        (entry(2, 2, 3, 4, 5, z=[1.5]), "times of a video"),
    ],
)
def test_objects_of_via_3_that_cannot_be_read_are_named(metadata, message, tmp_path):
    save_via_3(tmp_path, {"1_a": entry(7, 2, 3, 30, 3, 30, 20), "1_b": metadata})
    with pytest.raises(ValueError, match=rf"via\.json: 'a\.png': region '1_b'.*{message}"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_object") == 1


@pytest.mark.parametrize("metadata", [{"1_a": {"vid": "9"}}, {"1_a": 5}, [1], {"1_a": entry(7, 1, 2, av={"7": "0"})}])
def test_a_project_of_via_3_with_missing_entries_is_refused(metadata, tmp_path):
    save_via_3(tmp_path, metadata)
    with pytest.raises(ValueError, match=r"via\.json: an entry is missing or invalid"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_annotation_file") == 1


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ([{"class": "roof", "note": "x"}, {"class": "tree", "note": "y"}], "roof"),
        ([{"kind": "roof", "note": "x"}, {"kind": "tree", "note": ""}], "roof"),
        ([{"Label": "roof", "note": "x"}, {"Label": "tree", "note": "y"}], "roof"),
        ([{"kind": {"roof": True, "tree": False}}, {"kind": {"tree": True}}], "roof"),
    ],
)
def test_the_class_is_the_attribute_that_all_regions_have(attributes, expected, tmp_path):
    save(tmp_path, *(region(**item) for item in attributes))
    assert load_instance_dataset(tmp_path).id2label == {0: expected, 1: "tree"}


def test_an_ambiguous_class_attribute_is_refused_with_the_candidates(tmp_path):
    save(tmp_path, region(kind="roof", material="tile"), region(kind="tree", material="wood"))
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=r"got 'kind', 'material'\. Keep one of them, or call it 'class'"):
            read(tmp_path)


def test_regions_without_attributes_are_one_class_that_can_be_named(tmp_path):
    save(tmp_path, region(), region())
    assert load_instance_dataset(tmp_path).id2label == {0: "object"}
    assert load_instance_dataset(tmp_path, class_names=["balloon"]).id2label == {0: "balloon"}
    with pytest.raises(ValueError, match="must have one name"):
        load_instance_dataset(tmp_path, class_names=["balloon", "kite"])
    check_command(tmp_path, objects=2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (region(name=""), "the attribute 'name' must be one class"),
        (region(name={"roof": True, "tree": True}), "must be one class, got"),
        (region({"name": "polyline", "all_points_x": [1, 2, 3], "all_points_y": [1, 2, 3]}, name="roof"), "polyline"),
        (region({"name": "point", "cx": 1, "cy": 2}, name="roof"), "got 'point'"),
        (region({"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1, 2]}, name="roof"), "zip"),
        (region({"name": "polygon", "all_points_x": [1, 2, 3]}, name="roof"), "'all_points_y' is missing"),
        (region({"name": "circle", "cx": 1, "cy": 2, "r": "wide"}, name="roof"), "wide"),
        (region({"name": "circle", "cx": 1, "cy": 2, "r": math.inf}, name="roof"), "finite"),
        (region({"name": "rect", "x": None, "y": 2, "width": 3, "height": 3}, name="roof"), "values are invalid"),
        (region({}, name="roof"), "got None"),
        ({"shape_attributes": 5}, "must have 'shape_attributes'"),
        (5, "must have 'shape_attributes'"),
    ],
)
def test_a_region_that_cannot_be_read_is_named_with_file_and_rule(broken, message, tmp_path):
    save(tmp_path, region(name="roof"), broken)
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert f"{tmp_path}/via.json: 'a.png': region 1" in str(raised.value)
    check_command(tmp_path, objects=1, exit_code=1)


def test_folders_name_the_splits(tmp_path):
    for name in ("train", "val"):
        save(tmp_path / name, region(name=name), name="via_region_data.json")
    data = load_instance_dataset(tmp_path)
    assert {name: len(split) for name, split in data.items()} == {"train": 1, "validation": 1}
    assert data.id2label == {0: "train", 1: "val"}


@pytest.mark.parametrize("name", ["https://example.com/photos/a.png", "photos\\a.png", "a.png"])
def test_images_are_found_by_the_end_of_their_address(name, tmp_path):
    save(tmp_path, region(name="roof"), image=name)
    assert load_instance_dataset(tmp_path)["train"][0]["file_name"] == "a.png"


def test_images_outside_of_the_folder_are_not_read(tmp_path):
    save_image(tmp_path / "b.png")
    save(tmp_path / "data", region(name="roof"), image="../b.png")
    with pytest.raises(ValueError, match="must stay inside the folder"):
        load_instance_dataset(tmp_path / "data")
    assert check_dataset(tmp_path / "data").count("unsafe_file_name") == 1


@settings(max_examples=20, deadline=None)
@given(pixel_polygon())
def test_polygons_are_those_of_pil_up_to_their_outline(tmp_path_factory, outline):
    folder = tmp_path_factory.mktemp("via")
    xs, ys = zip(*outline, strict=True)
    save(folder, region({"name": "polygon", "all_points_x": xs, "all_points_y": ys}, name="roof"))
    canvas = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline], fill=1)
    length = np.abs(np.diff([*outline, outline[0]], axis=0)).sum()
    assert (np.array(canvas) ^ masks_of(folder)[0]).sum() <= length + 4
