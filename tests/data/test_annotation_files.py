"""What all readers of annotation programs have in common: values of any type are named or read, and never crash."""

import json

import numpy as np
import pytest
import test_label_studio
import test_labelme
import test_supervisely
import test_via
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation_programs import save_image
from transformers_rfdetr import check_dataset, load_instance_dataset


def save_labelme(folder):
    mask = test_labelme.png(np.eye(2))
    parts = [{"group_id": 1}, {"kind": "mask", "points": [[1, 1], [2, 2]], "mask": mask, "group_id": 1}]
    return test_labelme.save(folder, *(test_labelme.item(**part) for part in parts)) / "a.json"


def save_via_2(folder):
    circle = {"name": "circle", "cx": 9, "cy": 9, "r": 5}
    return (
        test_via.save(folder, test_via.region(name="a"), test_via.region(circle, name="b"), project=True) / "via.json"
    )


def save_via_3(folder):
    return test_via.save_via_3(folder, {"1_a": test_via.entry(7, 2, 3, 30, 3, 30, 20)}) / "via.json"


def save_label_studio(folder):
    results = [test_label_studio.result(), test_label_studio.result("brushlabels", number=1, rle=[0, 0, 0, 4, 57])]
    save_image(folder / "a.png")
    (folder / "export.json").write_text(json.dumps([test_label_studio.task(*results)]))
    return folder / "export.json"


def save_supervisely(folder):
    hole = [[[10, 5], [20, 5], [20, 10]]]
    test_supervisely.save(
        folder, test_supervisely.item(interior=hole), test_supervisely.item("rectangle", [[1, 2], [3, 4]])
    )
    return folder / "ds" / "ann" / "a.png.json"


def places(content, path=()):
    """Yield the path of every value in a JSON."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(content, path, value):
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


VALUES = st.sampled_from(
    [None, True, -1, 0, 3, 1e300, float("nan"), 10**30, "", "x", "\0", [], [1], [[1, 2]], {}, {"a": 1}]
)


@pytest.mark.parametrize("save", [save_labelme, save_via_2, save_via_3, save_label_studio, save_supervisely])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused_with_the_file(save, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    path = save(folder)
    content = json.loads(path.read_text())
    place = data.draw(st.sampled_from([place for place in places(content) if place]))
    path.write_text(json.dumps(replaced(content, place, data.draw(VALUES))))
    for read in (load_instance_dataset, check_dataset):
        message = str(folder)
        try:
            read(folder)
        except ValueError as error:
            message = str(error)
        assert str(folder) in message
