"""Untrusted images, annotations, YAML and servers are refused without taking memory, and no code is run."""

import base64
import importlib
import json
import os
import re
import struct
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest
import typer
from typer.testing import CliRunner

from transformers_rfdetr import RfDetrImageProcessor, load_instance_dataset, predict
from transformers_rfdetr.cli import predict as predict_command
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.checks.check import check_dataset
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.hub.model_card import escape
from transformers_rfdetr.inference.folder import predict_to_folder
from transformers_rfdetr.inference.image_list import list_images
from transformers_rfdetr.inference.video.reader import VideoReader
from transformers_rfdetr.model.image_io import read_rgb
from transformers_rfdetr.model.masks import rasterize, read_segmentation
from transformers_rfdetr.model.validation import LIMITS

from coco_files import SQUARE, draw_image, folder_content, image_entry, square, write_coco
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


def run_predict(*arguments):
    command = typer.Typer()
    command.command()(predict_command.predict)
    return CliRunner().invoke(command, ["--device", "cpu", *map(str, arguments)])


# -- images ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(autouse=True)
def pillows_own_limit(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 89_478_485)  # rfdetr lifts it when it is imported


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A PNG of a few kilobytes that says it is 30,000 x 30,000 pixels."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b""))
    return path


def test_an_image_bomb_is_refused_with_its_name(bomb):
    for read in (read_rgb, RfDetrImageProcessor(size=48)):
        with pytest.raises(ValueError, match=r"bomb\.png.* exceeds limit"):
            read(bomb)
        with pytest.raises(ValueError, match="exceeds limit"):
            read(base64.b64encode(bomb.read_bytes()).decode())
    with pytest.raises(ValueError, match=r"0: .*bomb\.png"):
        predict(small_model(), RfDetrImageProcessor(size=48), str(bomb))
    coco = {"images": [{"id": 1, "file_name": "bomb.png"}], "categories": [{"id": 1, "name": "roof"}]}
    dataset = InstanceDataset(coco, bomb.parent)
    with pytest.raises(ValueError, match=r"0 \('bomb\.png', 1\).* exceeds limit"):
        dataset[0]
    with pytest.raises(ValueError, match=r"bomb\.png.* exceeds limit"):
        dataset.coco()


def test_a_folder_with_an_image_bomb_is_predicted_without_it(bomb, tmp_path):
    os.link(bomb, tmp_path / "bomb.png")
    PIL.Image.new("RGB", (20, 10)).save(tmp_path / "fine.png")
    summary = predict_to_folder(
        small_model(), RfDetrImageProcessor(size=48), list_images([str(tmp_path)]), tmp_path / "out", progress=False
    )
    [(key, reason)] = summary.failed
    assert (summary.done, Path(key).name) == (1, "bomb.png")
    assert "exceeds limit" in reason


def test_pillows_pixel_limit_applies(tmp_path, monkeypatch):
    PIL.Image.new("RGB", (30, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 149)  # Pillow warns above it and refuses twice as many
    with pytest.raises(ValueError, match="exceeds limit"):
        read_rgb(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 300)
    assert read_rgb(tmp_path / "a.png").size == (30, 10)


def test_a_narrow_image_is_not_resized_or_padded_to_a_huge_one():
    with pytest.raises(ValueError, match=r"1 x 5000.* 480 x 2400000"):
        RfDetrImageProcessor(size={"shortest_edge": 480})(PIL.Image.new("RGB", (5_000, 1)))
    images = [np.zeros(shape, np.uint8) for shape in ((1, 20_000), (20_000, 1))]
    with pytest.raises(ValueError, match="20000 x 20000"):
        RfDetrImageProcessor(do_resize=False)(images)


@pytest.mark.parametrize("text", ["%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "XBM"])
def test_an_image_is_never_passed_to_another_program(tmp_path, monkeypatch, text):
    def run(*arguments, **options):
        raise AssertionError("it ran")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", run)
    if text == "XBM":  # which may be Python too
        text = "#define im_width 8\n#define im_height 1\n#static char im_bits[] = {\n#0x00\n#};\nprint('it ran')\n"
    path = write_coco(tmp_path / "train.json", [image_entry(1, "holiday.jpg")], [square(1)])
    (tmp_path / "holiday.jpg").write_text(text)
    with pytest.raises(ValueError, match=r"holiday\.jpg.* cannot identify"):
        read_rgb(tmp_path / "holiday.jpg")
    assert check_dataset(path).count("unreadable_image") == 1


@pytest.mark.parametrize("name", ["clip.m3u8", "clip.mp4"])
def test_a_playlist_in_a_folder_opens_no_other_file(tmp_path, name):
    pytest.importorskip("av")
    (tmp_path / name).write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n../private.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="playlist"):
        VideoReader(tmp_path / name)


def test_a_folder_called_tilde_takes_precedence_over_the_home_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "~").mkdir()
    draw_image(0).save(home / "a.png")
    draw_image(1).save(tmp_path / "~" / "a.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(read_rgb("~/a.png"), draw_image(1))
    (tmp_path / "~" / "a.png").unlink()
    assert np.array_equal(read_rgb("~/a.png"), draw_image(0))


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def requests():
    """Path and credentials of each request that `server` gets."""
    return []


@pytest.fixture
def server(requests):
    """Sends bytes without end to /endless, and one every 20 ms to /slow.

    me:s3cret gets an image, and from /to/URL a redirect to URL.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers["Authorization"]))
            is_authorized = self.headers["Authorization"] == "Basic bWU6czNjcmV0"  # me:s3cret
            is_stream = self.path in ("/endless", "/slow")
            is_redirect = is_authorized and self.path.startswith("/to/")
            self.send_response(302 if is_redirect else 200 if is_authorized or is_stream else 401)
            if is_redirect:
                self.send_header("Location", self.path.removeprefix("/to/"))
            self.send_header("WWW-Authenticate", 'Basic realm="images"')
            self.end_headers()
            try:
                while is_stream:
                    self.wfile.write(b"x" if self.path == "/slow" else bytes(1_000))
                    time.sleep(0.02 if self.path == "/slow" else 0)
            except OSError:  # the client has closed the connection
                return
            if is_authorized and not is_redirect:
                draw_image(0).save(self.wfile, "PNG")

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_credentials_in_a_url_are_sent_to_the_server_and_never_shown(server, model, tmp_path):
    assert np.array_equal(read_rgb(f"http://me:s3cret@{server}/a.png"), draw_image(0))
    for url in (f"http://me:wr0ng@{server}/a.png?token=wr0ng", "http://me:wr0ng@127.0.0.1:1/a.png?token=wr0ng"):
        with pytest.raises(ValueError, match=r"a\.png") as raised:
            read_rgb(url)
        assert "wr0ng" not in str(raised.value)
        done = run_predict(model, url, "-o", tmp_path / "out")
        written = [path.read_text() for path in (tmp_path / "out").rglob("*.json*")]
        assert not any("wr0ng" in text for text in [*written, done.output])


@pytest.mark.parametrize("read", ["image", "video", "command"])
def test_credentials_are_not_sent_to_the_target_of_a_redirect(server, requests, model, tmp_path, read):
    target = f"http://{server.replace('127.0.0.1', 'localhost')}/a"  # another server, by its name
    url = f"http://me:s3cret@{server}/to/{target}"
    if read == "command":
        run_predict(model, url, "-o", tmp_path / "out")
    else:
        with pytest.raises(ValueError, match=r"Unauthorized|cannot be opened as a video"):
            read_rgb(url) if read == "image" else VideoReader(url)
    assert (f"/to/{target}", "Basic bWU6czNjcmV0") in requests
    assert {authorization for path, authorization in requests if path == "/a"} == {None}


def test_credentials_are_sent_to_the_same_server_after_a_redirect(server):
    assert np.array_equal(read_rgb(f"http://me:s3cret@{server}/to/http://{server}/a.png"), draw_image(0))


@pytest.mark.parametrize("target", ["ftp://127.0.0.1:1/a.png", "file:///a.png", "data:image/png;base64,AAAA"])
def test_a_redirect_to_another_scheme_is_refused(server, requests, target):
    with pytest.raises(ValueError, match=target.partition(":")[0]):
        read_rgb(f"http://me:s3cret@{server}/to/{target}")
    assert len(requests) == 1


def test_a_slow_response_is_aborted(server, monkeypatch):
    monkeypatch.setattr("transformers_rfdetr.model.image_io.MAX_URL_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"0\.2 seconds.*MAX_URL_SECONDS"):
        read_rgb(f"http://{server}/slow")


def test_an_endless_response_is_aborted(server, monkeypatch):
    monkeypatch.setattr("transformers_rfdetr.model.image_io.MAX_URL_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"10000 bytes.*MAX_URL_BYTES"):
        read_rgb(f"http://{server}/endless")


# -- annotations -------------------------------------------------------------------------------------------------------


def test_a_very_long_polygon_outline_is_refused(monkeypatch):
    zigzag = [[-1e6, -1e6, 1e6, 1e6] * 100]
    with pytest.raises(ValueError, match=r"1e\+07.*MAX_OUTLINE_PIXELS"):
        read_segmentation(zigzag, (20, 30))
    small = read_segmentation([[-1e3, -1e3, 1e3, -1e3, 1e3, 1e3]], (1, 1))
    assert rasterize([small], (1, 1), (4, 4)).all(axis=(1, 2)).tolist() == [False]  # the lower left half
    with pytest.raises(ValueError, match="MAX_OUTLINE_PIXELS"):
        rasterize([small], (1, 1), (8_192, 8_192))
    monkeypatch.setattr("transformers_rfdetr.model.masks.MAX_OUTLINE_PIXELS", 1e9)
    assert read_segmentation(zigzag, (20, 30))


def test_too_many_polygons_of_one_object_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"1000[01].*1000[01].*MAX_POLYGONS"):
        read_segmentation([SQUARE] * 10_001, (40, 60))
    monkeypatch.setattr("transformers_rfdetr.model.masks.MAX_POLYGONS", 10_001)
    assert len(read_segmentation([SQUARE] * 10_001, (40, 60))) == 10_001


def test_boxes_of_any_size_can_be_drawn(tmp_path):
    items = [square(1, segmentation=..., bbox=[10**300, 1, 10**308, 5])]
    path = write_coco(tmp_path / "data" / "train.json", [image_entry(1, "a.png")], items)
    draw_image(0).save(path.parent / "a.png")
    assert check_dataset(path, overlays=tmp_path / "drawn").count("box_outside") == 1


def save_coco(folder: Path, name: object) -> Path:
    (folder / "data").mkdir()
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [], "categories": [{"id": 1, "name": "roof"}]}
    (folder / "data" / "train.json").write_text(json.dumps(coco))
    for place in (folder, folder / "data"):
        PIL.Image.new("RGB", (6, 4)).save(place / "a.png")
    return folder / "data" / "train.json"


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "../data/../a.png"])
def test_a_coco_file_cannot_name_images_outside_its_folder(name, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 1 .*image_folder"):
        load_instance_dataset(save_coco(tmp_path, name))


@pytest.mark.parametrize("name", ["x/../a.png", "./a.png"])
def test_a_name_that_leaves_and_reenters_the_folder_is_read(name, tmp_path):
    path = save_coco(tmp_path, name)
    (tmp_path / "data" / "x").mkdir()
    assert len(load_instance_dataset(path)["train"]) == 1


@pytest.mark.parametrize("name", [5, ["a.png"], "a\x00.png", "a" * 5_000, "", None, "http://127.0.0.1:1/b.png"])
def test_invalid_file_names_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"file_name|(image|image)s?.*not "):
        load_instance_dataset(save_coco(tmp_path, name))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("images", {"a": 1}, "'images'.* dict"),
        ("images", [5], r"'images'\[0\].* 5"),
        ("images", [{"id": [1], "file_name": "a.png"}], r"ids .*\[1\]"),
        ("images", [{"id": 1, "file_name": "a.png", "width": "6"}], "width.* '6'"),
        ("annotations", "none", "'annotations'.* str"),
        ("annotations", [{"id": 1, "image_id": {}, "category_id": 1}], r"image.* \{\}"),
        ("annotations", [{"id": 1, "image_id": 1, "category_id": []}], r"category_id.* \[\]"),
        ("annotations", [{"id": 1, "image_id": 1, "category_id": 1, "area": "big"}], "area.* 'big'"),
        ("annotations", [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": [0, 1]}], "iscrowd.* 0 or 1"),
        ("categories", [{"id": {}, "name": "roof"}], r"category id.* \{\}"),
        ("categories", [{"id": 1, "name": "roof", "supercategory": []}, 7], r"'categories'\[1\].* 7"),
    ],
)
def test_invalid_coco_lists_are_refused_with_the_entry(key, value, message, tmp_path):
    path = save_coco(tmp_path, "a.png")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(path)


def test_deeply_nested_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json"):
        load_instance_dataset(tmp_path / "a.json")


def test_a_split_name_cannot_be_a_path(tmp_path):
    annotations = tmp_path / "data" / "annotations"
    for name in ("instances_train.json", "instances_...json"):
        path = write_coco(annotations / name, [image_entry(1, "a.png")], [square(1)])
    (tmp_path / "data" / "images").mkdir()
    draw_image(0).save(tmp_path / "data" / "images" / "a.png")
    before = folder_content(tmp_path)
    for source in (tmp_path / "data", {"../up": path}):
        with pytest.raises(ValueError, match=r"split name .* got '\.\.(/up)?'"):
            check_dataset(source, fix=tmp_path / "fixed", overlays=tmp_path / "drawn")
    assert folder_content(tmp_path) == before


def test_rows_that_cannot_be_parsed_are_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": {"b": [')
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_instance_dataset(tmp_path)


# -- YAML --------------------------------------------------------------------------------------------------------------


def save_yolo(folder: Path, yaml: str, listed: str = "") -> Path:
    for place in (folder / "data" / "images", folder / "private" / "images"):
        place.mkdir(parents=True)
        PIL.Image.new("RGB", (6, 4)).save(place / "a.png")
    (folder / "data" / "list.txt").write_text(listed)
    (folder / "data" / "data.yaml").write_text("names: [roof]\n" + yaml.format(folder=folder))
    return folder / "data" / "data.yaml"


@pytest.mark.parametrize(
    ("yaml", "listed", "message"),
    [
        ("train: ../private/images\n", "", "'../private/images'"),
        ("train: {folder}/private/images\n", "", "private/images"),
        ("path: ../private\ntrain: images\n", "", "path.* '../private'"),
        ("path: {folder}/private\ntrain: images\n", "", "path.* '.*/private'"),
        ("train: list.txt\n", "../private/images/a.png\n", "private.* 1 of 1 "),
        ("train: list.txt\n", "images/a.png\n/etc/hostname\n", "hostname.* 1 of 2 "),
    ],
)
def test_a_data_yaml_cannot_name_images_outside_its_folder(yaml, listed, message, tmp_path):
    path = save_yolo(tmp_path, yaml, listed)
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize("yaml", ["train: {folder}/private/images\n", "train: private/images\n"])
def test_image_folder_allows_images_outside_the_folder_of_a_data_yaml(yaml, tmp_path):
    data = load_instance_dataset(save_yolo(tmp_path, yaml), image_folder=tmp_path)
    assert data["train"][0]["image"].size == (6, 4)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [[x, [y]]]\ntrain: images\n", "0 .* list"),
        ("names: [roof]\ntrain: [[a]]\n", "train.* list"),
        ("nc: 1000000000\ntrain: images\n", r"LIMITS\['num_labels'\]"),
        ("nc: [1]\ntrain: images\n", "nc.* list"),
        ("names: 5\ntrain: images\n", "names.* '5'"),
        ("[" * 500 + "]" * 500, "YAML"),
        ("names: !!python/object/apply:os.system [exit]\n", "YAML"),
    ],
    ids=["names", "train", "nc", "list as nc", "number as names", "nested", "an object of Python"],
)
def test_unsafe_yaml_is_refused(yaml, message, tmp_path):
    path = save_yolo(tmp_path, "")
    path.write_text(yaml)
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert len(str(error.value)) < 2_000


def nested_mappings(depth):
    levels = [f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]" for n in range(1, depth)]
    return "\n".join(["a0: &a0 {x: 1}", *levels, "names: [a]", "train: images"])


def nested_lists(depth):
    levels = [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, depth)]
    return "\n".join(["a0: &a0 [x]", *levels, f"names: *a{depth - 1}", "train: images", "lr: *a1"])


@pytest.mark.parametrize("text", [nested_mappings(40), nested_lists(40)], ids=["mappings", "lists"])
def test_yaml_aliases_are_refused_before_they_are_expanded(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=r"data\.yaml.* alias") as raised:
            read(tmp_path)
        assert len(str(raised.value)) < 2_000
    result = CliRunner().invoke(app, ["train", "d", "--config", str(tmp_path / "data.yaml")])
    assert (result.exit_code, " alias" in result.stderr) == (2, True)


def test_a_deeply_nested_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lr: " + "[" * 3_000)
    result = CliRunner().invoke(app, ["train", "d", "--config", str(tmp_path / "recipe.yaml")])
    assert (result.exit_code, "YAML" in result.stderr) == (2, True)


# -- messages and names ------------------------------------------------------------------------------------------------


LONG = "x" * 1_000_000


@pytest.mark.parametrize(
    ("images", "annotations", "categories"),
    [
        ([image_entry(1, "a.png")], [square(1)], [{"id": 1, "name": LONG}, {"id": 2, "name": LONG}]),
        ([image_entry(1, "a.png")], [square(1, category=LONG)], [{"id": 1, "name": "roof"}]),
        ([image_entry(1, "a.png")], [square(1, category=[1] * 100_000)], [{"id": 1, "name": "roof"}]),
        ([image_entry(1, "a.png")], [square(LONG, bbox="none")], [{"id": 1, "name": "roof"}]),
        ([image_entry(1, LONG)], [square(1)], [{"id": 1, "name": "roof"}]),
        ([image_entry(1, "a.png")], [square(1, image_id=LONG)], [{"id": 1, "name": "roof"}]),
        ([image_entry(LONG, "a.png")], [square(1, image_id=LONG, area=-1)], [{"id": 1, "name": "roof"}]),
    ],
)
def test_messages_truncate_long_values(tmp_path, images, annotations, categories):
    path = write_coco(tmp_path / "train.json", images, annotations, categories)
    draw_image(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\w") as raised:
        load_instance_dataset(path)
    assert len(str(raised.value)) < 2_000
    assert max(map(len, str(check_dataset(path)).splitlines())) < 2_000


def test_messages_truncate_long_keys(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({LONG: 1}))
    with pytest.raises(ValueError, match="COCO") as raised:
        load_instance_dataset(tmp_path / "train.json")
    assert len(str(raised.value)) < 2_000


def test_names_cannot_inject_control_characters_or_lines(model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "\x1b]0;title\x07.png").write_text("not an image")
    done = run_predict(model, tmp_path / "photos", "-o", tmp_path / "out")
    assert (done.exit_code, "\\x1b]0;title\\x07.png" in done.output) == (1, True)
    described = CliRunner().invoke(app, ["info", str(model)])
    path = write_coco(
        tmp_path / "train.json", [image_entry(1, "a.png")], [square(1)], [{"id": 1, "name": "\x1b[1m\nx"}]
    )
    draw_image(0).save(tmp_path / "a.png")
    missing = CliRunner().invoke(app, ["evaluate", "m", f"{os.fspath(tmp_path)}/\x1b[1m.json"])
    for text in (done.output, described.output, str(load_instance_dataset(path)), missing.output):
        assert "\x1b" not in text
        assert not any(line.startswith(("forged", "x ")) for line in text.splitlines())


def test_invalid_category_ids_of_a_configuration_are_not_used(model, tmp_path):
    (tmp_path / "photos").mkdir()
    draw_image(0).save(tmp_path / "photos" / "a.png")
    assert run_predict(model, tmp_path / "photos", "-o", tmp_path / "out", "--threshold", "0.02").exit_code == 0
    coco = json.loads((tmp_path / "out" / "predictions.coco.json").read_text())
    assert [category["id"] for category in coco["categories"]] == [0, 1, 2, 3]


def test_names_in_a_model_card_do_not_become_links():
    assert escape("https://x.y www.x.y a: b. c") == r"https\://x.y www\.x.y a: b. c"


# -- SECURITY.md -------------------------------------------------------------------------------------------------------


def test_every_limit_and_test_named_in_security_md_exists():
    path = Path(__file__).resolve().parents[2] / "SECURITY.md"
    if not path.is_file():
        pytest.skip("SECURITY.md does not come with the package")
    page = path.read_text(encoding="utf-8")
    assert set(LIMITS) <= set(re.findall(r'"(\w+)"', page))
    sources = [file.read_text(encoding="utf-8") for file in Path(__file__).parents[1].rglob("test_*.py")]
    named = re.findall(r"`((?:test|check)_\w+)`", page)
    assert len(named) > 20
    for name in named:
        assert any(f"def {name}(" in source for source in sources), name
    for place in re.findall(r"`transformers_rfdetr\.([\w.]+)", page):
        module, _, limit = place.rpartition(".")
        assert hasattr(importlib.import_module(f"transformers_rfdetr.{module}"), limit), place
