"""The handler of an Inference Endpoint, as the Hub's server imports it from the repository."""

import base64
import importlib.util
import io
import json

import pytest

from transformers_rfdetr import Instances, load, predict, predict_tiled, tiny_checkpoint
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.hub.model_code import add_endpoint


@pytest.fixture(scope="module")
def handler(tmp_path_factory):
    model, processor = load("rf-detr-seg-tiny")
    folder = tmp_path_factory.mktemp("repository")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in add_endpoint(folder)} == {"handler.py", "requirements.txt"}
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def scene():
    return draw_scene(2_000_000, (288, 288), metres_per_pixel=0.2)[0]


def test_an_image_is_answered_with_the_instances_of_predict_as_json(handler, scene):
    answer = json.loads(json.dumps(handler({"inputs": scene})))
    [expected] = predict(*load(str(tiny_checkpoint())), scene)
    assert len(expected) > 5
    assert answer == expected.to_dict()
    assert Instances.from_dict(answer).dense_masks().any((1, 2)).all()


def test_base64_and_parameters_are_taken(handler, scene):
    file = io.BytesIO()
    scene.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    cars = handler({"inputs": encoded, "parameters": {"threshold": 0.3, "classes": ["car"]}})["instances"]
    assert {one["name"] for one in cars} == {"car"}
    tiled = handler({"inputs": f"data:image/png;base64,{encoded}", "parameters": {"tile": "auto", "overlap": 0.3}})
    expected = predict_tiled(*load("rf-detr-seg-tiny"), scene, overlap=0.3).to_dict()
    assert tiled == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "`inputs` must be an image or base64.*NoneType"),
        ({"inputs": "/etc/hostname"}, "`inputs` must be base64 of an image file, got '/etc/hostname'"),
        ({"inputs": "http://localhost/a.png"}, "`inputs` must be base64 of an image file"),
        ({"inputs": "AAAA"}, "`inputs` must be base64 of an image file"),
        ({"inputs": None, "parameters": {"batch_size": 3}}, "`parameters` must be among threshold.*got batch_size"),
    ],
)
def test_other_requests_are_refused(handler, data, message):
    with pytest.raises(ValueError, match=message):
        handler(data)


def test_parameters_out_of_range_are_refused(handler, scene):
    for parameters, message in (({"overlap": 0.1}, "`overlap` requires `tile`"), ({"threshold": 3}, "threshold")):
        with pytest.raises(ValueError, match=message):
            handler({"inputs": scene, "parameters": parameters})
