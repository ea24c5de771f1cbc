"""The page on which a model is tried: its functions, and the page itself in Chromium."""

import base64
import json
import shutil
import struct
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
from PIL import Image

from evaluation_cases import rectangle, rle
from transformers_rfdetr import Instances, load, predict, predict_tiled
from transformers_rfdetr.assets import sample_image

pytest.importorskip("gradio", reason="the page needs the extra `app`")
from transformers_rfdetr.inference import web_page
from transformers_rfdetr.inference.tile_merging import Tile

CHROMIUM = shutil.which("chromium")
NASTY = '<img src=x onerror="document.title=1"> & **tree**'


def tiny():
    """rf-detr-seg-tiny, calibrated, with a class name and a note that a page must not run."""
    model, processor = load("rf-detr-seg-tiny")
    model.config.id2label = model.config.id2label | {1: NASTY}
    model.config.score_thresholds = {0: 0.5, 1: 0.9, 2: 0.7, 3: 0.05}
    model.config.score_thresholds_note = f"by hand {NASTY}"
    return model, processor


@pytest.fixture(scope="module")
def page():
    return web_page._Page(*tiny())


@pytest.fixture(scope="module")
def scene():
    return Image.open(sample_image()).convert("RGB")


@pytest.mark.parametrize(
    ("with_tiles", "function"), [(False, lambda *args, **kwargs: predict(*args, **kwargs)[0]), (True, predict_tiled)]
)
def test_what_is_selected_is_what_is_predicted_with_this_threshold(page, scene, with_tiles, function, monkeypatch):
    found = page.find(sample_image(), "sample.png", with_tiles)
    assert len(found.pieces) == (9 if with_tiles else 1)
    monkeypatch.setattr(page.model, "predict_stage", None)  # the model does not run again
    selected = found.select(np.full(5, 0.8, np.float32), None)
    calibrated = found.select(web_page.class_thresholds(page.model.config, "calibrated"), [1, 2])
    monkeypatch.undo()
    assert len(selected) > 5
    assert selected.to_dict() == function(page.model, page.processor, scene, threshold=0.8).to_dict()
    expected = function(page.model, page.processor, scene, threshold="calibrated")
    assert calibrated.to_dict() == expected.select(np.isin(expected.labels, [1, 2])).to_dict()


def png_of(width, height):
    """A PNG whose header promises a size, without the pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


HOSTILE = {
    "words.png": (b"not an image", r"words.png must be an image, such as JPEG, PNG, WebP or TIFF\."),
    "empty.jpg": (b"", r"empty.jpg must be an image"),
    "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "must be an image"),
    "half.png": (sample_image().read_bytes()[:20_000], "half.png is damaged and cannot be read: "),
    "large.png": (png_of(9000, 9000), "large.png must have at most 67 million pixels"),
    "bomb.png": (png_of(60_000, 60_000), "bomb.png must have at most 67 million pixels"),
    "short.png": (png_of(500, 500), "short.png is damaged and cannot be read: "),
    "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "figure.eps must be an image"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gets_a_message_without_paths(page, tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "upload").write_bytes(content)
    file = {"path": str(tmp_path / "upload"), "orig_name": name}
    found, drawn, text, _ = page.on_image(file, False, 0.5, False, [])
    assert (found, drawn) == (None, None)
    with pytest.raises(ValueError, match=message) as error:
        web_page.read_upload(tmp_path / "upload", name)
    assert text == str(error.value)
    assert str(tmp_path) not in text


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_other_modes_are_predicted(page, tmp_path, scene, mode):
    path = tmp_path / ("scene.tif" if mode == "CMYK" else "scene.png")
    gray = np.array(scene.convert("L")).astype(np.uint16)
    image = Image.fromarray(gray * 257) if mode == "I;16" else scene.convert(mode)
    image.save(path)
    found = page.find(path, path.name, False)
    assert found.image.size == scene.size
    assert found.image.mode == "RGB"
    assert len(found.select(np.full(5, 0.1), None)) > 0


def test_large_images_are_drawn_reduced_with_masks_where_they_are():
    size, shown = (960, 2560), (480, 1280)
    mask = rle(rectangle((320, 640), (800, 1600), size))
    box = np.array([[800, 320, 1600, 640]], np.float32)
    one = Instances(box, np.ones(1, np.float32), np.zeros(1, np.int64), [""], [mask], size)
    found = web_page.Found(Image.new("RGB", shown[::-1]), size, [(Tile(0, 0, *size), one)])
    for instances in (one, Instances(box, one.scores, one.labels, [""], None, size)):
        rows, columns = np.nonzero(np.array(found.draw(instances)).max(-1) > 30)
        extent = np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1])
        assert (np.abs(extent - (160, 320, 400, 800)) <= (40, 1, 1, 1)).all()  # the score is above it
    drawn = np.array(found.draw(one)).astype(int)
    assert (drawn[165:315, 405:795].sum(-1) > 0).all()
    assert not drawn[321:].any()


def test_the_result_names_the_classes_and_how_to_find_more(page):
    found = page.find(sample_image(), "sample.png", False)
    *_, text, _ = page.on_choice(found, 1.0, False, [])
    assert text == "No instances. Lower the threshold, or choose other classes."
    *_, text, _ = page.on_choice(found, 0.5, False, ["pool"])
    assert text == "2 instances: 2 pool"


@pytest.fixture(scope="module")
def server():
    """The page of a model that counts how often it runs."""
    model, processor = tiny()
    runs, predict_stage = [], model.predict_stage
    model.predict_stage = lambda *args: runs.append(1) or predict_stage(*args)
    blocks = web_page.serve(model, processor, title=NASTY, wait=False)
    blocks.runs, blocks.model, blocks.processor = runs, model, processor
    yield blocks
    blocks.close()


def post(server, body, content_type="application/json"):
    request = urllib.request.Request(f"{server.local_url}predict", body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_requests_are_answered_as_by_the_handler_of_an_endpoint(server, scene):
    [expected] = predict(server.model, server.processor, scene, threshold=0.8)
    content = sample_image().read_bytes()
    encoded = {"inputs": base64.b64encode(content).decode(), "parameters": {"threshold": 0.8}}
    assert post(server, json.dumps(encoded).encode()) == (200, expected.to_dict())
    [expected] = predict(server.model, server.processor, scene)
    assert post(server, content, "image/png") == (200, expected.to_dict())
    for body, message in ((b"{", "Expecting"), (b"[1]", "must be a JSON object"), (b"{}", "`inputs` must be an image")):
        status, answer = post(server, body)
        assert status == 400
        assert message in answer["error"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def view(server, browser):
    """The page in a new tab; at the end nothing has failed in it."""
    view = browser.new_page(viewport={"width": 1280, "height": 1000})
    errors = []
    view.on("pageerror", lambda error: errors.append(error))
    view.set_default_timeout(60_000)
    view.goto(server.local_url)
    view.get_by_label("Score threshold").first.wait_for()
    server.runs.clear()
    yield view
    assert view.title() == NASTY
    assert errors == []
    view.close()


def upload(view, file):
    view.locator("input[type=file]").first.set_input_files(file)


def wait_for(view, text):
    """Wait until the result is a text."""
    view.wait_for_function("text => document.querySelector('textarea').value.startsWith(text)", arg=text)


def wait_for_drawing(view, expected):
    """Wait until an image is shown as the result."""
    shown = view.locator("#drawing img")
    for _ in range(100):
        assert shown.evaluate("async image => { await image.decode(); return image.naturalWidth }") == expected.width
        with urllib.request.urlopen(shown.get_attribute("src")) as answer:
            if np.array_equal(Image.open(answer).convert("RGB"), expected):
                return
        view.wait_for_timeout(100)
    raise AssertionError("another image is shown")


def test_in_a_browser_an_image_is_predicted_once_and_threshold_and_classes_select(server, view, page, scene):
    upload(view, sample_image())
    [calibrated] = predict(page.model, page.processor, scene, threshold="calibrated")
    wait_for(view, web_page._describe(calibrated))
    view.locator("input[type=range]").fill("0.8")
    [everything] = predict(page.model, page.processor, scene, threshold=0.8)
    wait_for(view, web_page._describe(everything))
    assert not view.get_by_label("Calibrated threshold of each class").is_checked()
    wait_for_drawing(view, everything.draw(scene))
    view.get_by_label("Classes").click()
    view.get_by_role("option", name="car").click()
    cars = everything.select([name == "car" for name in everything.names])
    assert 0 < len(cars) < len(everything)
    wait_for(view, web_page._describe(cars))
    wait_for_drawing(view, cars.draw(scene))
    with view.expect_download() as waiting:
        view.get_by_role("button", name="Download as JSON").click()
    with open(waiting.value.path(), encoding="utf-8") as file:
        assert json.load(file) == cars.to_dict()
    assert len(server.runs) == 1


def test_in_a_browser_a_hostile_upload_gets_a_message_and_an_image_after_it_is_predicted(server, view, tmp_path):
    for name in ("words.png", "half.png"):
        (tmp_path / name).write_bytes(HOSTILE[name][0])
        upload(view, tmp_path / name)
        wait_for(view, name)
        assert "Traceback" not in view.content()
        view.get_by_label("Clear").or_(view.get_by_label("Remove Image")).first.click()
    assert view.locator("#drawing img").count() == 0
    assert view.get_by_role("button", name="Download as JSON").is_disabled()
    view.set_viewport_size({"width": 390, "height": 800})
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.locator(".gallery button, .gallery-item").first.click()
    wait_for(view, "1")
    assert len(server.runs) == 1
