"""Data of strangers: files that want to run, grow, write or read elsewhere, leak, or say what they are not."""

import json
import os
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import typer
from typer.testing import CliRunner

from transformers_rfdetr import RfDetrImageProcessor, load_instance_dataset
from transformers_rfdetr.cli import predict as predict_command
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.checks.check import check_dataset
from transformers_rfdetr.hub.model_card import escape
from transformers_rfdetr.inference.video.reader import VideoReader
from transformers_rfdetr.model.image_io import read_rgb
from transformers_rfdetr.model.masks import read_segmentation

from coco_files import SQUARE, content, image, picture, square, write_coco
from small_models import small_model

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = small_model(id2label={0: "cat", 1: "dog\nforged: line", 2: "\x1b[31mred", 3: "x"})
    model.config.category_ids = True
    model.save_pretrained(folder)
    RfDetrImageProcessor.from_config(model.config).save_pretrained(folder)
    return folder


def predict(*arguments):
    command = typer.Typer()
    command.command()(predict_command.predict)
    return CliRunner().invoke(command, ["--device", "cpu", *map(str, arguments)])


# Running


@pytest.mark.parametrize("text", ["%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "XBM"])
def test_a_picture_is_not_handed_to_another_program(tmp_path, monkeypatch, text):
    def run(*arguments, **options):
        raise AssertionError("it ran")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", run)
    if text == "XBM":  # which may be Python too
        text = "#define im_width 8\n#define im_height 1\n#static char im_bits[] = {\n#0x00\n#};\nprint('it ran')\n"
    path = write_coco(tmp_path / "train.json", [image(1, "holiday.jpg")], [square(1)])
    (tmp_path / "holiday.jpg").write_text(text)
    with pytest.raises(ValueError, match=r"holiday\.jpg cannot be opened as an image: cannot identify"):
        read_rgb(tmp_path / "holiday.jpg")
    assert check_dataset(path).count("unreadable_image") == 1


def test_a_split_cannot_be_called_by_a_path(tmp_path):
    path = write_coco(tmp_path / "data" / "annotations" / "instances_...json", [image(1, "a.png")], [square(1)])
    (tmp_path / "data" / "images").mkdir()
    picture(0).save(tmp_path / "data" / "images" / "a.png")
    before = content(tmp_path)
    for source in (tmp_path / "data", {"../up": path}):
        with pytest.raises(ValueError, match=r"split name .* got '\.\.(/up)?'"):
            check_dataset(source, fix=tmp_path / "fixed", overlays=tmp_path / "drawn")
    assert content(tmp_path) == before


# Growing


def merged(levels):
    lines = [f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)]
    return "\n".join(["a0: &a0 {x: 1}", *lines, "names: [a]", "train: images"])


def nested(levels):
    return "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)), "lr: *a1"])


@pytest.mark.parametrize("text", [merged(40), nested(40)])
def test_yaml_with_aliases_is_refused_before_they_are_followed(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"data\.yaml holds an alias"):
        load_instance_dataset(tmp_path)
    result = CliRunner().invoke(app, ["train", "d", "--config", str(tmp_path / "data.yaml")])
    assert (result.exit_code, "holds an alias" in result.stderr) == (2, True)


def test_a_recipe_that_is_nested_without_an_end_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lr: " + "[" * 3_000)
    result = CliRunner().invoke(app, ["train", "d", "--config", str(tmp_path / "recipe.yaml")])
    assert (result.exit_code, "is no YAML" in result.stderr) == (2, True)


def test_an_object_of_very_many_polygons_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"10001 polygons are more than the 10000 .*masks\.MAX_POLYGONS"):
        read_segmentation([SQUARE] * 10_001, (40, 60))
    monkeypatch.setattr("transformers_rfdetr.model.masks.MAX_POLYGONS", 10_001)
    assert len(read_segmentation([SQUARE] * 10_001, (40, 60))) == 10_001


LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    ("images", "annotations", "categories"),
    [
        ([image(1, "a.png")], [square(1)], [{"id": 1, "name": LONG}, {"id": 2, "name": LONG}]),
        ([image(1, "a.png")], [square(1, category=LONG)], [{"id": 1, "name": "roof"}]),
        ([image(1, "a.png")], [square(1, category=[1] * 100_000)], [{"id": 1, "name": "roof"}]),
        ([image(1, "a.png")], [square(LONG, bbox="none")], [{"id": 1, "name": "roof"}]),
        ([image(1, LONG)], [square(1)], [{"id": 1, "name": "roof"}]),
        ([image(1, "a.png")], [square(1, image_id=LONG)], [{"id": 1, "name": "roof"}]),
        ([image(LONG, "a.png")], [square(1, image_id=LONG, area=-1)], [{"id": 1, "name": "roof"}]),
    ],
)
def test_no_message_holds_all_of_a_long_value(tmp_path, images, annotations, categories):
    path = write_coco(tmp_path / "train.json", images, annotations, categories)
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\w") as raised:
        load_instance_dataset(path)
    assert len(str(raised.value)) < 2_000
    assert max(map(len, str(check_dataset(path)).splitlines())) < 2_000


def test_a_long_key_of_a_json_is_not_shown_whole(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({LONG: 1}))
    with pytest.raises(ValueError, match="not those of COCO's instances JSON") as raised:
        load_instance_dataset(tmp_path / "train.json")
    assert len(str(raised.value)) < 2_000


def test_boxes_of_any_size_can_be_drawn(tmp_path):
    items = [square(1, segmentation=..., bbox=[10**300, 1, 10**308, 5])]
    path = write_coco(tmp_path / "data" / "train.json", [image(1, "a.png")], items)
    picture(0).save(path.parent / "a.png")
    assert check_dataset(path, overlays=tmp_path / "drawn").count("box_outside") == 1


def test_rows_that_cannot_be_made_are_refused_with_the_folder(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": {"b": [')
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_instance_dataset(tmp_path)


# Reading elsewhere


def test_a_file_in_a_folder_called_tilde_is_that_file(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "~").mkdir()
    picture(0).save(home / "a.png")
    picture(1).save(tmp_path / "~" / "a.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(read_rgb("~/a.png"), picture(1))
    (tmp_path / "~" / "a.png").unlink()
    assert np.array_equal(read_rgb("~/a.png"), picture(0))


@pytest.mark.parametrize("name", ["clip.m3u8", "clip.mp4"])
def test_a_playlist_in_a_folder_opens_no_other_file(tmp_path, name):
    pytest.importorskip("av")
    (tmp_path / name).write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n../private.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match=r"source.*playlist"):
        VideoReader(tmp_path / name)


# Servers


@pytest.fixture
def server():
    """Answers /slow with a byte every 20 ms, and anything else with a picture to user me with password s3cret."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"x")
                        time.sleep(0.02)
                except OSError:
                    return
            is_known = self.headers["Authorization"] == "Basic bWU6czNjcmV0"  # me:s3cret
            self.send_response(200 if is_known else 401)
            self.end_headers()
            if is_known:
                picture(0).save(self.wfile, "PNG")

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_the_user_in_a_url_is_told_to_the_server_and_to_nobody_else(server, model, tmp_path):
    assert np.array_equal(read_rgb(f"http://me:s3cret@{server}/a.png"), picture(0))
    for url in (f"http://me:wr0ng@{server}/a.png?token=wr0ng", "http://me:wr0ng@127.0.0.1:1/a.png?token=wr0ng"):
        with pytest.raises(ValueError, match="cannot be opened as an image") as raised:
            read_rgb(url)
        assert "wr0ng" not in str(raised.value)
        done = predict(model, url, "-o", tmp_path / "out")
        written = [path.read_text() for path in (tmp_path / "out").rglob("*.json*")]
        assert not any("wr0ng" in text for text in [*written, done.output])


def test_a_server_that_drips_is_left(server, monkeypatch):
    monkeypatch.setattr("transformers_rfdetr.model.image_io.MAX_URL_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"it took longer than 0\.2 seconds; .*MAX_URL_SECONDS"):
        read_rgb(f"http://{server}/slow")


# Saying what they are not


def test_names_move_no_cursor_and_forge_no_line(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "\x1b]0;title\x07.png").write_text("no picture")
    done = predict(model, tmp_path / "photos", "-o", tmp_path / "out")
    assert (done.exit_code, "\\x1b]0;title\\x07.png" in done.output) == (1, True)
    described = CliRunner().invoke(app, ["info", str(model)])
    path = write_coco(tmp_path / "train.json", [image(1, "a.png")], [square(1)], [{"id": 1, "name": "\x1b[1m\nx"}])
    picture(0).save(tmp_path / "a.png")
    missing = CliRunner().invoke(app, ["evaluate", "m", f"{os.fspath(tmp_path)}/\x1b[1m.json"])
    for text in (done.output, described.output, str(load_instance_dataset(path)), missing.output):
        assert "\x1b" not in text
        assert not any(line.startswith(("forged", "x ")) for line in text.splitlines())


def test_category_ids_that_are_none_are_not_used(model, tmp_path):
    (tmp_path / "photos").mkdir()
    picture(0).save(tmp_path / "photos" / "a.png")
    assert predict(model, tmp_path / "photos", "-o", tmp_path / "out", "--threshold", "0.02").exit_code == 0
    coco = json.loads((tmp_path / "out" / "predictions.coco.json").read_text())
    assert [category["id"] for category in coco["categories"]] == [0, 1, 2, 3]


def test_a_name_in_a_card_is_no_link():
    assert escape("https://x.y www.x.y a: b. c") == r"https\://x.y www\.x.y a: b. c"
