"""Published weights: which file a name means, and downloads that break, are retried, and are checked."""

import hashlib
import random
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pooch
import pytest
import requests
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
NUM_ATTEMPTS = 1 + published_weights._NUM_RETRIES


class Store:
    """A server of CONTENT. `faults` are those of the next requests; later requests have none."""

    def __init__(self) -> None:
        self.faults: list[str | int] = []  # a status, or one of the words that `answer` knows
        self.cut_after = 0  # bytes of an answer that breaks off
        self.num_requests = 0
        self.closing = threading.Event()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.num_requests += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            handler.send_error(fault)
            return
        handler.send_response(200)
        if fault != "no length":
            handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        is_cut = fault in ("ends", "stalls", "resets")
        handler.wfile.write(CONTENT[: self.cut_after] if is_cut else CONTENT)
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
    """The pauses between attempts, which are not made."""
    pauses = []
    monkeypatch.setattr(pooch.core.time, "sleep", pauses.append)
    return pauses


def weights(md5: str = MD5) -> PublishedFile:
    return PublishedFile("rf-detr-toy.pth", "remote/weights", md5, "rf-detr-nano")


def folder_holds_the_file_only(folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {"rf-detr-toy.pth": CONTENT}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_names_its_file(name):
    variant, spellings = SPELLINGS[name]
    assert PUBLISHED[name].variant == variant
    for spelling in [name, *spellings]:
        assert published_file(spelling) is PUBLISHED[name], spelling


def test_every_variant_has_a_file_and_every_file_a_known_variant():
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
def test_other_names_and_paths_are_not_published_names(name):
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
def test_the_folder_is_that_of_rfdetr(monkeypatch, rf_home, roboflow_home, expected):
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
    assert store.num_requests == 1
    assert pauses == []


def test_the_default_folder_is_that_of_rfdetr(store, monkeypatch, tmp_path):
    monkeypatch.setenv("RF_HOME", str(tmp_path))
    assert download_weights(weights()) == tmp_path / "rf-detr-toy.pth"
    assert folder_holds_the_file_only(tmp_path)


def test_a_download_of_unknown_length_is_complete(store, tmp_path):
    store.faults = ["no length"]
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)


@pytest.mark.parametrize("fault", ["ends", "stalls", "resets"])
def test_a_broken_connection_is_retried(store, pauses, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(published_weights, "_TIMEOUT_SECONDS", 1)
    store.faults, store.cut_after = [fault, fault], 100_000
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.num_requests == 3
    assert pauses == [1, 2]


@pytest.mark.parametrize("is_shown", [True, False])
def test_the_progress_bar_follows_the_setting_of_transformers(is_shown, store, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(logging, "is_progress_bar_enabled", lambda: is_shown)
    download_weights(weights(), tmp_path)
    assert ("300k/300k" in capsys.readouterr().err) == is_shown


def test_a_download_with_another_md5_is_deleted(store, tmp_path):
    with pytest.raises(ValueError, match=rf"rf-detr-toy\.pth.*{OTHER_MD5}.*{MD5}"):
        download_weights(weights(OTHER_MD5), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_the_name_is_left_alone(store, tmp_path):
    path = tmp_path / "rf-detr-toy.pth"
    path.write_bytes(b"mine")
    mine = hashlib.md5(b"mine").hexdigest()
    with pytest.raises(ValueError, match=rf"{path} .* {MD5} .* got {mine}\."):
        download_weights(weights(), tmp_path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]
    assert store.num_requests == 0


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_final(store, pauses, tmp_path, status):
    store.faults = [status]
    with pytest.raises(OSError, match=rf"http://.*/remote/weights .* {status} "):
        download_weights(weights(), tmp_path)
    assert store.num_requests == 1
    assert pauses == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_or_failing_server_is_retried_after_growing_pauses(store, pauses, tmp_path, status):
    store.faults = [status, status]
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)
    assert store.num_requests == 3
    assert pauses == [1, 2]


def test_after_the_last_attempt_the_error_names_the_url_and_nothing_is_left(store, pauses, tmp_path):
    store.faults, store.cut_after = ["ends"] * NUM_ATTEMPTS, 10_000
    with pytest.raises(ConnectionError, match=r"http://.*/remote/weights"):
        download_weights(weights(), tmp_path)
    assert store.num_requests == NUM_ATTEMPTS
    assert pauses == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)


def test_a_missing_server_is_a_connection_error(pauses, monkeypatch, tmp_path):
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(published_weights, "BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/")
        with pytest.raises(ConnectionError, match="refused"):
            download_weights(weights(), tmp_path)
    assert len(pauses) == NUM_ATTEMPTS - 1


def test_an_interrupt_leaves_no_partial_file(store, pauses, monkeypatch, tmp_path):
    def interrupted(response, chunk_size):
        yield CONTENT[:1000]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(requests.Response, "iter_content", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_weights(weights(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    download_weights(weights(), tmp_path)
    assert folder_holds_the_file_only(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_full_disk_is_named_at_once(store, pauses, monkeypatch, tmp_path):
    monkeypatch.setattr(pooch.downloaders, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match=rf"{tmp_path / 'rf-detr-toy.pth'} .*No space left on device"):
        download_weights(weights(), tmp_path)
    assert store.num_requests == 1
    assert pauses == []


def test_a_folder_that_cannot_be_created_is_named(store, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(OSError, match=f"{file}/models"):
        download_weights(weights(), file / "models")
    assert store.num_requests == 0
