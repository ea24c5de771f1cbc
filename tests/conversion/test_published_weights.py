"""Published weights: which file a name means, and downloads that break, continue and are checked."""

import hashlib
import random
import re
import socket
import struct
import threading
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers.utils import logging

from transformers_rfdetr.conversion import published_weights
from transformers_rfdetr.conversion.published_weights import (
    PUBLISHED,
    PublishedFile,
    download_weights,
    published_file,
    weights_folder,
)
from transformers_rfdetr.model.variants_rf_detr import ALIASES, VARIANTS

# The file, the variant whose architecture it has, and what names it besides its own full name.
SPELLINGS = {
    "rf-detr-nano.pth": ("rf-detr-nano", ["rf-detr-nano", "RFDETRNano", "RF_DETR_nano"]),
    "rf-detr-small.pth": ("rf-detr-small", ["rf-detr-small", "RFDETRSmall"]),
    "rf-detr-medium.pth": ("rf-detr-medium", ["rf-detr-medium", "RFDETRMedium"]),
    "rf-detr-large-2026.pth": ("rf-detr-large", ["rf-detr-large", "RFDETRLarge", "rf-detr-large-2026"]),
    "rf-detr-large.pth": ("rf-detr-large-deprecated", ["rf-detr-large-deprecated", "RFDETRLargeDeprecated"]),
    "rf-detr-base.pth": ("rf-detr-base", ["rf-detr-base", "RFDETRBase"]),
    "rf-detr-base-2.pth": ("rf-detr-base", ["rf-detr-base-2"]),
    "rf-detr-base-o365.pth": ("rf-detr-base", ["rf-detr-base-o365"]),
    "rf-detr-keypoint-preview-xlarge.pth": (
        "rf-detr-keypoint-preview",
        ["rf-detr-keypoint-preview-xlarge", "RFDETRKeypointPreview", "rf-detr-keypoint-preview"],
    ),
    "rf-detr-seg-preview.pt": ("rf-detr-seg-preview", ["rf-detr-seg-preview", "RFDETRSegPreview"]),
    "rf-detr-seg-nano.pt": ("rf-detr-seg-nano", ["rf-detr-seg-nano", "RFDETRSegNano", "rf-detr-seg-n"]),
    "rf-detr-seg-small.pt": ("rf-detr-seg-small", ["rf-detr-seg-small", "RFDETRSegSmall", "rf-detr-seg-s"]),
    "rf-detr-seg-medium.pt": ("rf-detr-seg-medium", ["rf-detr-seg-medium", "rfdetr_seg_medium", "rf-detr-seg-m"]),
    "rf-detr-seg-large.pt": ("rf-detr-seg-large", ["rf-detr-seg-large", "RFDETRSegLarge", "rf-detr-seg-l"]),
    "rf-detr-seg-xlarge.pt": ("rf-detr-seg-xlarge", ["rf-detr-seg-xlarge", "RFDETRSegXLarge", "rf-detr-seg-xl"]),
    "rf-detr-seg-xxlarge.pt": (
        "rf-detr-seg-2xlarge",
        ["rf-detr-seg-2xlarge", "RFDETRSeg2XLarge", "rf-detr-seg-xxlarge", "rf-detr-seg-2xl", "rf-detr-seg-xxl"],
    ),
}
CONTENT = random.Random(0).randbytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
OTHER_MD5 = "0" * 32
TRIES = 1 + len(published_weights._PAUSES_SECONDS)


class Store:
    """A server of CONTENT. `script` names what goes wrong with the next requests; after these nothing does."""

    def __init__(self) -> None:
        self.script: list[str | int] = []  # a status, or one of the words that `answer` knows
        self.cut_after = 0  # bytes of an answer that breaks off
        self.ranges: list[str | None] = []  # asked for, one each request
        self.closing = threading.Event()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        self.ranges.append(asked)
        fault = self.script.pop(0) if self.script else None
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and fault != "no ranges" else 0
        if start >= len(CONTENT):
            fault = 416
        if isinstance(fault, int):
            handler.send_error(fault)
            return
        body = CONTENT[start:]
        handler.send_response(206 if start else 200)
        if start:
            shown = 0 if fault == "wrong start" else start
            handler.send_header("Content-Range", f"bytes {shown}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if fault != "no length":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if fault in ("ends", "stalls", "resets"):
            body = body[: self.cut_after]
        handler.wfile.write(body)
        if fault == "stalls":
            self.closing.wait()
        if fault == "resets":  # closed without lingering, a socket sends RST
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()


@pytest.fixture
def store(monkeypatch):
    store = Store()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/remote/weights":
                store.answer(self)
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(published_weights, "BASE_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield store
    store.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses between tries, which are not made."""
    pauses = []
    monkeypatch.setattr(published_weights.time, "sleep", pauses.append)
    return pauses


def weights(md5: str = MD5) -> PublishedFile:
    return PublishedFile("rf-detr-toy.pth", "remote/weights", md5, "rf-detr-nano")


def part_of(folder: Path) -> Path:
    return folder / "rf-detr-toy.pth.part"


def folder_holds_the_file_only(folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {"rf-detr-toy.pth": CONTENT}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_names_its_file(name):
    variant, spellings = SPELLINGS[name]
    assert PUBLISHED[name].variant == variant
    for spelling in [name, *spellings]:
        assert published_file(spelling) is PUBLISHED[name], spelling


def test_every_variant_has_its_file_and_every_file_was_looked_at():
    assert PUBLISHED.keys() == SPELLINGS.keys()
    assert {file.variant for file in PUBLISHED.values()} == {*VARIANTS, "rf-detr-keypoint-preview"}
    for spelling, variant in ALIASES.items():
        assert published_file(spelling).variant == variant


@pytest.mark.parametrize(
    "name",
    [
        *("", "nano", "detr-resnet-50", "rf-detr-giant"),
        *("nano.pth", "rf-detr-nano.onnx", "rf-detr-nano.pt", "rf-detr-seg-nano.pth", "RF-DETR-NANO.PTH"),
        *(
            "Roboflow/rf-detr-nano",
            "./rf-detr-nano",
            "rf-detr-nano/",
            "weights/rf-detr-nano.pth",
            "C:\\rf-detr-nano.pth",
        ),
        *("/rf-detr-nano", "\\rf-detr-nano"),
    ],
)
def test_other_names_and_paths_are_no_published_names(name):
    assert published_file(name) is None


@pytest.mark.parametrize(
    ("rf_home", "roboflow_home", "expected"),
    [
        ("/first", "/second", "/first"),
        ("", "/second", "/second"),
        (None, "~/second", "/home/user/second"),
        ("", "", "/home/user/.roboflow/models"),
        (None, None, "/home/user/.roboflow/models"),
    ],
)
def test_the_folder_is_rfdetrs(monkeypatch, rf_home, roboflow_home, expected):
    monkeypatch.setenv("HOME", "/home/user")
    for name, value in [("RF_HOME", rf_home), ("ROBOFLOW_HOME", roboflow_home)]:
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert weights_folder() == Path(expected)


def test_a_file_is_downloaded_once_into_a_new_folder(store, pauses, tmp_path):
    folder = tmp_path / "deep" / "models"
    assert download_weights(weights(), folder) == folder / "rf-detr-toy.pth"
    assert folder_holds_the_file_only(folder)
    assert download_weights(weights(), folder) == folder / "rf-detr-toy.pth"
    assert store.ranges == [None]
    assert pauses == []


def test_without_a_folder_it_goes_where_rfdetr_looks(store, monkeypatch, tmp_path):
    monkeypatch.setenv("RF_HOME", str(tmp_path))
    assert download_weights(weights()) == tmp_path / "rf-detr-toy.pth"
    assert folder_holds_the_file_only(tmp_path)


def test_a_download_of_unannounced_length_is_one_too(store, tmp_path):
    store.script = ["no length"]
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)


@pytest.mark.parametrize("fault", ["ends", "stalls"])
def test_a_connection_that_breaks_is_continued_and_no_byte_sent_twice(store, pauses, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(published_weights, "_TIMEOUT_SECONDS", 1)
    store.script, store.cut_after = [fault, fault], 100_000
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.ranges == [None, "bytes=100000-", "bytes=200000-"]
    assert pauses == [1, 2]


def test_a_connection_that_is_reset_is_continued(store, pauses, tmp_path):
    store.script, store.cut_after = ["resets"], 100_000
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert len(store.ranges) == 2
    assert pauses == [1]


def test_what_an_earlier_run_left_is_continued(store, pauses, tmp_path):
    part_of(tmp_path).write_bytes(CONTENT[:123_457])
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.ranges == ["bytes=123457-"]
    assert pauses == []


def test_the_bar_counts_from_what_is_there_to_the_whole(store, monkeypatch, tmp_path):
    bars = []

    def bar(**settings):
        bars.append(settings | {"updates": []})
        empty = logging.EmptyTqdm()
        empty.update = bars[-1]["updates"].append
        return empty

    monkeypatch.setattr(logging, "tqdm", bar)
    part_of(tmp_path).write_bytes(CONTENT[:100_000])
    download_weights(weights(), tmp_path)
    assert len(bars) == 1
    assert (bars[0]["desc"], bars[0]["initial"], bars[0]["total"]) == ("rf-detr-toy.pth", 100_000, 300_000)
    assert sum(bars[0]["updates"]) == 200_000


@pytest.mark.parametrize("fault", ["no ranges", "wrong start", 416])
def test_a_server_that_does_not_continue_sends_it_anew(store, pauses, tmp_path, fault):
    store.script = [fault]
    part_of(tmp_path).write_bytes(CONTENT[:1000])
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.ranges == (["bytes=1000-"] if fault == "no ranges" else ["bytes=1000-", None])
    assert pauses == []


def test_a_part_that_is_complete_needs_no_request(store, tmp_path):
    part_of(tmp_path).write_bytes(CONTENT)
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.ranges == []


@pytest.mark.parametrize("size", [300_000, 400_000])
def test_a_part_as_long_as_the_file_or_longer_that_is_not_it_is_replaced(store, tmp_path, size):
    part_of(tmp_path).write_bytes(bytes(size))
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.ranges == [f"bytes={size}-", None]


def test_a_longer_part_is_cut_where_the_server_knows_no_ranges(store, tmp_path):
    store.script = ["no ranges"]
    part_of(tmp_path).write_bytes(bytes(400_000))
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)


@pytest.mark.parametrize("start", [b"", b"of another file"], ids=["whole", "continued"])
def test_a_download_with_another_md5_is_deleted(store, tmp_path, start):
    part_of(tmp_path).write_bytes(start)
    md5 = OTHER_MD5 if not start else MD5
    found = hashlib.md5(start + CONTENT[len(start) :]).hexdigest()
    with pytest.raises(ValueError, match=f"/remote/weights came with md5 {found}, published is {md5}"):
        download_weights(weights(md5), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_the_name_is_left_alone(store, tmp_path):
    path = tmp_path / "rf-detr-toy.pth"
    path.write_bytes(b"mine")
    mine = hashlib.md5(b"mine").hexdigest()
    message = f"{path} has md5 {mine}, the published rf-detr-toy.pth has {MD5}; move it away .* or pass its path"
    with pytest.raises(ValueError, match=message):
        download_weights(weights(), tmp_path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]
    assert store.ranges == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_final(store, pauses, tmp_path, status):
    store.script = [status]
    with pytest.raises(OSError, match=rf"http://.*/remote/weights cannot be downloaded: the server answers {status} "):
        download_weights(weights(), tmp_path)
    assert store.ranges == [None]
    assert pauses == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_that_is_busy_or_fails_is_asked_again_after_growing_pauses(store, pauses, tmp_path, status):
    store.script = [status, status]
    part_of(tmp_path).write_bytes(CONTENT[:1000])
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.ranges == ["bytes=1000-"] * 3
    assert pauses == [1, 2]


def test_after_the_last_try_the_error_says_what_is_there_and_running_again_continues(store, pauses, tmp_path):
    store.script, store.cut_after = ["ends"] * TRIES, 10_000
    received = 10_000 * TRIES
    message = (
        rf"http://.*/remote/weights could not be downloaded: .*; "
        rf"{part_of(tmp_path)} holds the {received} bytes received so far, and running again continues it"
    )
    with pytest.raises(ConnectionError, match=message):
        download_weights(weights(), tmp_path)
    assert len(store.ranges) == TRIES
    assert pauses == [1, 2, 4, 8]
    download_weights(weights(), tmp_path)
    assert store.ranges[TRIES:] == [f"bytes={received}-"]
    assert folder_holds_the_file_only(tmp_path)


def test_a_server_that_is_not_there_is_an_error_of_the_connection(pauses, monkeypatch, tmp_path):
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(published_weights, "BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(ConnectionError, match=r"refused.* holds the 0 bytes received so far"):
            download_weights(weights(), tmp_path)
    assert len(pauses) == TRIES - 1


def test_an_interrupt_keeps_what_was_received_for_the_next_call(store, pauses, monkeypatch, tmp_path):
    read1, reads = HTTPResponse.read1, []

    def interrupted(response, size):
        reads.append(size)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return read1(response, min(size, 20_000))

    with monkeypatch.context() as patch:
        patch.setattr(HTTPResponse, "read1", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_weights(weights(), tmp_path)
    received = part_of(tmp_path).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["rf-detr-toy.pth.part"]
    assert 0 < len(received) <= 40_000
    assert received == CONTENT[: len(received)]
    download_weights(weights(), tmp_path)
    assert store.ranges == [None, f"bytes={len(received)}-"]
    assert folder_holds_the_file_only(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
@pytest.mark.parametrize("script", [[], ["ends"]], ids=["while it writes", "when it closes"])
def test_a_full_disk_is_named_at_once(store, pauses, monkeypatch, tmp_path, script):
    def open_there(path, mode):
        return open(path if mode == "rb" else "/dev/full", mode)

    monkeypatch.setattr(published_weights, "open", open_there, raising=False)
    store.script, store.cut_after = script, 1  # a single byte waits in the buffer till the file is closed
    with pytest.raises(OSError, match=rf"No space left on device: '{part_of(tmp_path)}'"):
        download_weights(weights(), tmp_path)
    assert store.ranges == [None]
    assert pauses == []


def test_a_folder_that_cannot_be_is_named(store, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(OSError, match=f"'{file}/models'"):
        download_weights(weights(), file / "models")
    assert store.ranges == []
