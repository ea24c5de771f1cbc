"""The XML of "CVAT for images 1.1" is read to the masks that PIL and numpy draw, by the loader and by the check."""

import itertools
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw

from annotation_programs import SIZE, check_command, masks_of, objects_of, pixel_polygon, save_image
from transformers_rfdetr import check_dataset, load_instance_dataset

HEIGHT, WIDTH = SIZE


def element(tag="polygon", label="roof", **attributes) -> str:
    attributes = {"label": label, "occluded": 0, "z_order": 0, "source": "manual", **attributes}
    if tag == "polygon":
        attributes = {"points": "2.0,3.0;30.0,3.0;30.0,20.0", **attributes}
    listed = " ".join(f"{name}={quoteattr(str(value))}" for name, value in attributes.items())
    return f'<{tag} {listed}><attribute name="state">new</attribute></{tag}>'


def image(*elements, name="a.png", **attributes) -> str:
    attributes = {"id": 0, "name": name, "width": WIDTH, "height": HEIGHT, **attributes}
    listed = " ".join(f"{key}={quoteattr(str(value))}" for key, value in attributes.items() if value is not None)
    return f"<image {listed}>{''.join(elements)}</image>"


def save(folder, *images, labels=("roof",), head='<?xml version="1.0" encoding="utf-8"?>', name="annotations.xml"):
    """Write an XML of CVAT, and the image a.png; return the folder."""
    save_image(folder / "images" / "a.png")
    defined = "".join(f"<label><name>{label}</name><type>any</type></label>" for label in labels)
    meta = f"<meta><task><name>task</name><labels>{defined}</labels></task></meta>"
    body = f"{head}<annotations><version>1.1</version>{meta}{''.join(images)}</annotations>"
    (folder / name).write_text(body, encoding="utf-8")
    return folder


def runs(mask: np.ndarray) -> str:
    """Return the lengths of runs of equal pixels along the rows, background first."""
    grouped = [(value, len(list(group))) for value, group in itertools.groupby(mask.astype(bool).ravel().tolist())]
    return ", ".join(map(str, [0] * grouped[0][0] + [length for _, length in grouped]))


def mask_element(mask, left, top, **more) -> str:
    height, width = mask.shape
    return element("mask", rle=runs(mask), left=left, top=top, width=width, height=height, **more)


def test_a_file_and_its_folder_are_read_alike(tmp_path):
    save(tmp_path, image(element(label="tree"), element(occluded=1)), labels=("tree", "roof", "pool"))
    for source in (tmp_path, tmp_path / "annotations.xml"):
        data = load_instance_dataset(source)
        assert (list(data), data.id2label) == (["train"], {0: "pool", 1: "roof", 2: "tree"})
        [sample] = data["train"]
        assert [found["category_id"] for found in sample["annotations"]] == [2, 1]
        assert [found["occluded"] for found in sample["annotations"]] == [0, 1]
        assert sample["annotations"][0]["segmentation"] == [[2, 3, 30, 3, 30, 20]]
    check_command(tmp_path, objects=2, masks=2)


def test_a_box_has_no_mask_unless_it_is_rotated(tmp_path):
    corners = {"xtl": 10, "ytl": 5, "xbr": 30, "ybr": 15}
    save(tmp_path, image(element("box", **corners), element("box", **corners, rotation="90.00")))
    box, turned = objects_of(tmp_path)
    assert (box["bbox"], box.get("segmentation")) == ([10, 5, 20, 10], None)
    assert turned["bbox"] == pytest.approx([15, 0, 10, 20], abs=1)


def test_rotations_are_clockwise_around_the_center(tmp_path):
    corners = {"xtl": 10, "ytl": 10, "xbr": 30, "ybr": 20}
    radii = {"cx": 24, "cy": 20, "rx": 18, "ry": 4}
    save(tmp_path, image(element("box", **corners, rotation=30), element("ellipse", **radii, rotation=30)))
    box, ellipse = masks_of(tmp_path)
    # A horizontal object that is turned clockwise goes from the upper left to the lower right.
    canvas = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).rectangle([10, 10, 29, 19], fill=1)
    for found, drawn, center in (
        (box, np.array(canvas.rotate(-30, center=(20, 15))) > 0, (15, 20)),
        (ellipse, _ellipse(24, 20, 18, 4, 30), (20, 24)),
    ):
        assert (found & drawn).sum() / (found | drawn).sum() > 0.85
        assert found[: center[0], : center[1]].sum() > found[: center[0], center[1] :].sum()


def _ellipse(x, y, radius_x, radius_y, degrees) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    angle = np.radians(degrees)
    along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
    return (along / radius_x) ** 2 + (across / radius_y) ** 2 <= 1


def test_parts_of_a_group_and_label_are_one_object(tmp_path):
    square, other = "2,2;8,2;8,8;2,8", "20,20;26,20;26,26;20,26"
    parts = [element(points=points, group_id=1, occluded=index) for index, points in enumerate((square, other))]
    mask = mask_element(np.ones((4, 4)), 30, 30, group_id=1)
    save(tmp_path, image(*parts, mask, element(points=other, group_id=0), element(points=square)))
    assert [int(mask.sum()) for mask in masks_of(tmp_path)] == [88, 36, 36]
    assert [found["occluded"] for found in objects_of(tmp_path)] == [1, 0, 0]


@settings(max_examples=25, deadline=None)
@given(
    arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 9))),
    st.integers(0, HEIGHT - 8),
    st.integers(0, WIDTH - 9),
    pixel_polygon(),
)
def test_masks_are_exact_and_polygons_those_of_pil_up_to_their_outline(tmp_path_factory, mask, top, left, outline):
    folder = tmp_path_factory.mktemp("cvat")
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in outline)
    save(folder, image(mask_element(mask, left, top), element(points=points)))
    found, drawn = masks_of(folder)
    expected = np.zeros(SIZE, bool)
    expected[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    assert np.array_equal(found, expected)
    canvas = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in outline], fill=1)
    length = np.abs(np.diff([*outline, outline[0]], axis=0)).sum()
    assert (np.array(canvas) ^ drawn).sum() <= length + 4


def test_subsets_are_splits(tmp_path):
    for name in ("Train", "Validation"):
        save_image(tmp_path / "images" / name / "a.png", (HEIGHT, WIDTH + len(name)))
    images = [image(element(), subset=name, width=WIDTH + len(name)) for name in ("Train", "Validation")]
    save(tmp_path, *images, image(element(), name="a.png", subset="default"))
    data = load_instance_dataset(tmp_path)
    assert {name: [sample["file_name"] for sample in split] for name, split in data.items()} == {
        "train": ["images/Train/a.png", "images/a.png"],
        "validation": ["images/Validation/a.png"],
    }
    check_command(tmp_path, objects=3)


def test_several_tasks_are_read_together_and_folders_are_splits(tmp_path):
    for name in ("train", "val"):
        save(tmp_path / name, image(element(label=name)), labels=())
    data = load_instance_dataset(tmp_path)
    assert data.id2label == {0: "train", 1: "val"}
    assert {name: len(split) for name, split in data.items()} == {"train": 1, "validation": 1}


@pytest.mark.parametrize("tag", ["polyline", "points", "cuboid", "skeleton"])
def test_what_encloses_no_pixels_is_refused(tag, tmp_path):
    save(tmp_path, image(element(), element(tag)))
    with pytest.raises(ValueError, match=rf"annotations\.xml: 'a\.png': object 1: .*got <{tag}> labelled 'roof'"):
        load_instance_dataset(tmp_path)
    check_command(tmp_path, objects=1, exit_code=1)
    assert check_dataset(tmp_path).count("invalid_object") == 1


def test_tags_are_left_out_and_said(tmp_path, hf_log):
    save(tmp_path, image(element(), element("tag", label="night")))
    assert len(objects_of(tmp_path)) == 1
    assert "1 <tag> are not read" in hf_log.text


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (element(points="1,2;3,4"), "at least 3 points"),
        (element(points="1,2;3;5,6"), "pairs of finite numbers"),
        (element(points="1,2;3,x;5,6"), "pairs of finite numbers"),
        (element(points="1,2;3,nan;5,6"), "pairs of finite numbers"),
        (element(label=""), "`label` must be a name"),
        ("<polygon label='roof'/>", "'points' is missing"),
        (element("box", xtl=1, ytl=2, xbr="inf", ybr=3), "pairs of finite numbers"),
        (element("box", xtl=1, ytl=2, xbr=4), "'ybr' is missing"),
        (element("ellipse", cx=1, cy=2, rx=0, ry=2), "radii must be above 0"),
        (element("ellipse", cx=1, cy=2, rx=1, ry=2, rotation="nan"), "finite number of degrees"),
        (mask_element(np.ones((2, 2)), 0, 0).replace('height="2"', 'height="3"'), "sum width x height"),
        (element("mask", rle="1e12", left=0, top=0, width=10**6, height=10**6), "fit into the image"),
        (element("mask", rle="-1,5", left=0, top=0, width=2, height=2), "integers"),
        (element("mask", rle="1,x", left=0, top=0, width=2, height=2), "x"),
    ],
)
def test_an_object_that_cannot_be_read_is_named_with_file_and_rule(broken, message, tmp_path):
    save(tmp_path, image(element(), broken))
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert f"{tmp_path}/annotations.xml: 'a.png': object 1: " in str(raised.value)
    assert check_dataset(tmp_path).count("invalid_object") == 1


ENTITIES = '<!DOCTYPE a [<!ENTITY b "bbbb">' + "".join(f'<!ENTITY b{i} "&b;&b;">' for i in range(3)) + "]>"


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        ('<?xml version="1.0"?>' + ENTITIES, image(element(label="&b;")), "must not have a DOCTYPE"),
        ("<!DOCTYPE a SYSTEM 'file:///etc/passwd'>", image(element()), "must not have a DOCTYPE"),
        ("", "<image", "must be an XML file"),
        ("", "<track id='0'/>", "tracks of a video"),
        ("", image(element(), width=10**6, height=10**6), "height and width must be positive integers"),
        ("", image(element(), name=""), "name of the image must be a string"),
        ("<?xml version='1.0' encoding='nonsense'?>", "", "must be an XML file"),
    ],
)
def test_hostile_files_are_refused_with_their_name(head, body, message, tmp_path):
    save(tmp_path, body, head=head)
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert "annotations.xml" in str(raised.value)
    assert check_dataset(tmp_path).count("invalid_annotation_file") == 1


def test_images_outside_of_the_folder_are_not_read(tmp_path):
    save_image(tmp_path / "secret.png")
    folder = save(tmp_path / "data", image(element(), name="../../secret.png"))
    with pytest.raises(ValueError, match="must stay inside the folder"):
        load_instance_dataset(folder)
    assert check_dataset(folder).count("unsafe_file_name") == 1
