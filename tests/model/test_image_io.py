"""Reading of PIL images, arrays, files and URLs. Oracles: hand arithmetic and numpy."""

import base64
import io
import logging
import re
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
import torch

from transformers_rfdetr.model.image_io import read_rgb

from processor_inputs import processor, random_image, raw, target


class TestPilModes:
    @pytest.mark.parametrize(
        ("mode", "color", "rgb"),
        [
            ("RGB", (255, 0, 51), (255, 0, 51)),
            ("1", 1, (255, 255, 255)),
            ("L", 51, (51, 51, 51)),
            ("LA", (51, 0), (51, 51, 51)),
            ("La", (60, 255), (60, 60, 60)),
            ("RGBA", (255, 0, 51, 0), (255, 0, 51)),
            ("RGBX", (255, 0, 51, 0), (255, 0, 51)),
            ("RGBa", (51, 51, 51, 255), (51, 51, 51)),
            ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
            ("YCbCr", (51, 128, 128), (51, 51, 51)),
            ("HSV", (0, 255, 255), (255, 0, 0)),
        ],
    )
    def test_of_8_bits_are_red_green_and_blue_without_alpha(self, mode, color, rgb):
        pixels = raw(PIL.Image.new(mode, (4, 3), color))
        assert pixels.shape == (3, 3, 4)
        assert (pixels[:, 2, 3] * 255).tolist() == pytest.approx(rgb)

    @pytest.mark.parametrize("mode", ["P", "PA"])
    def test_with_a_palette_are_looked_up(self, mode):
        image = PIL.Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 255, 0, 51])
        image.putpixel((1, 0), 1)
        assert (raw(image.convert(mode))[:, 0] * 255).T.flatten().tolist() == pytest.approx([0, 0, 0, 255, 0, 51])

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
    def test_of_16_bits_keep_their_scale(self, mode):
        values = np.array([[0, 13107, 65535]], np.uint16)
        image = PIL.Image.frombytes(mode, (3, 1), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
        torch.testing.assert_close(raw(image)[1, 0], torch.tensor([0, 0.2, 1.0]))

    def test_of_32_bit_integers_are_8_bit_values_or_refused(self):
        assert raw(PIL.Image.new("I", (2, 2), 51))[0, 0, 0] == pytest.approx(0.2)
        with pytest.raises(ValueError, match=r"image 0: .*\[0, 255\].*uint16"):
            raw(PIL.Image.new("I", (2, 2), 40000))

    def test_of_floats_are_in_0_1_or_refused(self):
        assert raw(PIL.Image.new("F", (2, 2), 0.25))[0, 0, 0] == 0.25
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            raw(PIL.Image.new("F", (2, 2), 200.0))

    def test_with_exif_rotation_are_turned(self):
        image = PIL.Image.fromarray(random_image(8, 12))
        exif = image.getexif()
        exif[0x0112] = 6  # turn a quarter clockwise
        file = io.BytesIO()
        image.save(file, "PNG", exif=exif)
        turned = torch.from_numpy(np.rot90(random_image(8, 12), -1).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(raw(PIL.Image.open(file)), turned)
        labels = processor()(PIL.Image.open(file), target(height=12, width=8)).labels[0]
        assert labels["orig_size"].tolist() == [12, 8]
        with pytest.raises(ValueError, match=r"image 0 \(image_id 7\): .*height.*12.*8"):
            processor()(PIL.Image.open(file), target(height=8, width=12))


class TestArrays:
    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
    def test_of_every_layout_are_one_image(self, kind):
        image = random_image(8, 9)
        expected = torch.from_numpy(image).permute(2, 0, 1) / 255
        alpha = np.concatenate([image, np.zeros_like(image[..., :1])], axis=2)
        for array in (image, image.transpose(2, 0, 1), alpha, alpha.transpose(2, 0, 1)):
            torch.testing.assert_close(raw(kind(array)), expected)
        grey = expected[:1].expand(3, -1, -1)
        for array in (image[..., 0], image[..., :1], image.transpose(2, 0, 1)[:1]):
            torch.testing.assert_close(raw(kind(array.copy())), grey)

    def test_of_every_dtype_are_scaled_by_their_range(self):
        bits = np.array([[0, 1]], bool)
        for array in (bits, bits * np.uint8(255), bits * np.uint16(65535), bits * 1.0, bits.astype(np.float16)):
            assert raw(array)[0, 0].tolist() == [0, 1]
        for array in (np.array([[0, 51]]), np.array([[0, 51]], np.int16), np.array([[0, 13107]], ">u2")):
            assert raw(array)[0, 0].tolist() == pytest.approx([0, 0.2])
        for tensor in (torch.tensor([[0, 51]]), torch.tensor([[0.0, 0.2]], dtype=torch.float64)):
            assert raw(tensor)[0, 0].tolist() == pytest.approx([0, 0.2])
        assert raw(torch.tensor([[0, 13107]], dtype=torch.uint16))[0, 0].tolist() == pytest.approx([0, 0.2])

    def test_of_a_view_with_negative_strides_are_read(self):
        image = random_image(8, 9)
        assert torch.equal(raw(image[:, ::-1]), raw(np.ascontiguousarray(image[:, ::-1])))

    def test_are_not_changed(self):
        for image in (
            torch.rand(3, 24, 24),
            torch.from_numpy(random_image()),
            np.random.default_rng(0).random((24, 24, 3)),
        ):
            before = image.clone() if isinstance(image, torch.Tensor) else image.copy()
            processor(24)(image)
            assert (before == image).all()

    def test_that_fit_both_layouts_need_input_data_format(self):
        array = random_image(3, 5)  # (3, 5, 3)
        with pytest.raises(ValueError, match="Pass a PIL image, or `input_data_format` to the image processor"):
            raw(array)
        assert raw(array, input_data_format="channels_first").shape == (3, 5, 3)
        assert raw(array, input_data_format="channels_last").shape == (3, 3, 5)
        assert raw(random_image(4, 4)).shape == (3, 4, 4)
        assert raw(random_image(1, 2)).shape == (3, 1, 2)
        with pytest.raises(ValueError, match="'last'"):
            raw(array, input_data_format="last")

    def test_without_rescaling_are_used_as_they_are(self):
        assert raw(np.full((4, 5), 7.5), do_rescale=False).unique().tolist() == [7.5]
        assert raw(np.full((4, 5), 51, np.uint8), do_rescale=False).unique().tolist() == [51]

    def test_in_a_batch_are_a_list(self):
        batch = np.stack([random_image(8, 9, 0), random_image(8, 9, 1)])
        for images in (batch, torch.from_numpy(batch), tuple(batch)):
            assert torch.equal(processor()(images).pixel_values, processor()(list(batch)).pixel_values)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.zeros((8, 9, 2), np.uint8), r"1, 3 or 4 channels.*\(8, 9, 2\)"),
            (np.zeros((8, 9, 5), np.uint8), r"\(8, 9, 5\)"),
            (np.zeros((0, 9, 3), np.uint8), r"pixel.*\(0, 9, 3\)"),
            (np.zeros((0, 0)), r"pixel.*\(0, 0\)"),
            (torch.zeros(3, 0, 5), r"pixel.*\(3, 0, 5\)"),
            (np.zeros(9), r"\(9,\)"),
            (np.full((4, 5), np.nan), "NaN"),
            (np.full((4, 5), np.inf), "infinite"),
            (np.full((4, 5), 200.0), r"\[0, 1\].*got.*\[200, 200\].*uint8"),
            (np.full((4, 5), -0.5), r"\[-0\.5, -0\.5\]"),
            (np.full((4, 5), 256), r"\[0, 255\]"),
            (np.full((4, 5), -1), r"\[0, 255\]"),
            (np.full((4, 5), 1j), "complex"),
            (torch.zeros((4, 5), dtype=torch.complex64), "complex64"),
            (np.full((4, 5), None), "object"),
            (None, "NoneType"),
            ([[0, 1], [1, 0]], "got list"),
            ("/nowhere/image.png", r"/nowhere/image\.png cannot be opened"),
            (Path("/nowhere/image.png"), r"/nowhere/image\.png cannot be opened"),
        ],
    )
    def test_that_are_no_image_raise_with_their_number(self, image, message):
        with pytest.raises(ValueError, match=f"image 1: .*{message}"):
            processor()([random_image(), image])

    def test_are_at_least_one(self):
        with pytest.raises(ValueError, match="images"):
            processor()([])


class TestFilesAndUrls:
    @pytest.fixture
    def site(self, tmp_path):
        """A loopback web site of one folder; `/missing` and `/text` answer what they say."""
        PIL.Image.fromarray(random_image()).save(tmp_path / "photo.png")
        PIL.Image.fromarray(np.full((4, 5), 13107, np.uint16)).save(tmp_path / "deep.png")

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/moved":
                    self.send_response(302)
                    self.send_header("Location", "/photo.png")
                    self.end_headers()
                    return
                file = tmp_path / self.path[1:]
                self.send_response(404 if self.path == "/missing" else 200)
                self.end_headers()
                self.wfile.write(file.read_bytes() if file.is_file() else b"no image here")

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()

    def test_are_read_like_images(self, site):
        folder, url = site
        expected = processor()(random_image()).pixel_values[0]
        encoded = base64.b64encode((folder / "photo.png").read_bytes()).decode()
        uri = f"data:image/png;base64,{encoded}"
        lines = base64.encodebytes((folder / "photo.png").read_bytes()).decode()
        sources = [folder / "photo.png", str(folder / "photo.png"), f"{url}/photo.png", f"{url}/moved", encoded]
        sources += [uri, lines]
        for pixels in processor()(sources).pixel_values:
            assert torch.equal(pixels, expected)
        assert torch.equal(processor()(f"{url}/photo.png").pixel_values[0], expected)

    def test_keep_16_bits(self, site):
        folder, url = site
        encoded = base64.b64encode((folder / "deep.png").read_bytes()).decode()
        for source in (folder / "deep.png", f"{url}/deep.png", encoded, f"data:image/png;base64,{encoded}"):
            torch.testing.assert_close(raw(source), torch.full((3, 4, 5), 0.2))

    def test_begin_at_home_with_a_tilde(self, site, monkeypatch):
        monkeypatch.setenv("HOME", str(site[0]))
        assert torch.equal(raw("~/photo.png"), raw(random_image()))

    @pytest.mark.parametrize(
        "source", ["missing.png", "photo", "file:///photo.png", "s3://bucket/photo.png", "~/missing.png", ""]
    )
    def test_that_do_not_exist_are_said_not_to(self, source):
        message = f"image 1: {source} cannot be opened as an image: the file does not exist. Pass a path"
        with pytest.raises(ValueError, match=re.escape(message)):
            processor()([random_image(), source])

    def test_that_are_folders_are_said_to_be(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "photos").mkdir()
        for source in (f"{tmp_path}/photos/", "~/photos", tmp_path / "photos"):
            with pytest.raises(ValueError, match="it is a folder") as raised:
                processor()(source)
            assert f"Path({str(source)!r}).glob" in str(raised.value)
            assert "`predict_dataset`" in str(raised.value)

    def damaged(self, folder):
        """An image whose second chunk of pixels has a wrong name, and one that ends early."""
        pixels = io.BytesIO()
        PIL.Image.fromarray(random_image(300, 500)).save(pixels, "PNG")
        data = pixels.getvalue()
        second = data.index(b"IDAT", data.index(b"IDAT") + 4)
        (folder / "chunk.png").write_bytes(data[:second] + b"\x19\x8d\x93]" + data[second + 4 :])
        (folder / "cut.png").write_bytes(data[:200])
        return [folder / "chunk.png", folder / "cut.png"]

    def test_that_are_damaged_are_named(self, tmp_path):
        for path in self.damaged(tmp_path):
            for source in (path, base64.b64encode(path.read_bytes()).decode()):
                with pytest.raises(ValueError, match=r"image 1: .* cannot be opened as an image: ."):
                    processor()([random_image(), source])
            with pytest.raises(ValueError, match=f"image 1: {path} "):
                processor()([random_image(), path])

    def test_that_were_opened_by_the_caller_and_are_damaged_are_numbered(self, tmp_path):
        for path in self.damaged(tmp_path):
            with PIL.Image.open(path) as image, pytest.raises(ValueError, match=r"image 1: .* cannot be opened"):
                processor()([random_image(), image])

    @pytest.mark.parametrize(
        "error", [SyntaxError("x"), EOFError(), struct.error("x"), zlib.error("x"), OverflowError()]
    )
    def test_that_break_pillow_in_any_way_are_numbered(self, error, monkeypatch):
        monkeypatch.setattr(PIL.Image.Image, "convert", Mock(side_effect=error))
        with pytest.raises(ValueError, match=f"image 0: .* cannot be opened as an image: (x|{type(error).__name__})$"):
            processor()(PIL.Image.new("L", (8, 8)))

    def test_of_too_many_pixels_are_named(self, site, monkeypatch):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"image 0: .*photo\.png cannot be opened as an image: .* exceeds limit"):
            processor()(site[0] / "photo.png")

    def test_that_fail_are_named(self, site):
        folder, url = site
        (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:200])
        sources = [f"{url}/missing", f"{url}/text", "http://127.0.0.1:1/x.png", "http://", folder / "cut.png", folder]
        for source in sources:
            with pytest.raises(ValueError, match=r"image 0: .* cannot be opened as an image") as raised:
                processor()(source)
            assert str(source) in str(raised.value)


def exif(*entries: bytes, rest: bytes = b"") -> bytes:
    """EXIF data of entries (tag, type, count, value), and what lies behind them."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0" + rest


TURNED = struct.pack("<HHII", 0x0112, 3, 1, 6)  # by a quarter
GPS_AT = 8 + 2 + 2 * 12 + 4
# Latitude 0/0 0/0 0/0, as written by cameras without reception.
GPS = struct.pack("<HHHII", 1, 2, 5, 3, GPS_AT + 18) + bytes(4 + 24)
BROKEN_EXIF = {
    "twice": (b"Exif\0\0" + exif(TURNED), True),
    "GPS 0/0": (exif(TURNED, struct.pack("<HHII", 0x8825, 4, 1, GPS_AT), rest=GPS), True),
    "cut": (exif(TURNED)[:14], False),
    "empty": (b"", False),
    "noise": (bytes(range(64)), False),
    "an impossible orientation": (exif(struct.pack("<HHII", 0x0112, 3, 1, 77)), False),
}


@pytest.mark.parametrize("case", BROKEN_EXIF)
@pytest.mark.parametrize("is_opened", [True, False])
def test_images_with_broken_exif_are_read(case, is_opened, tmp_path):
    content, is_turned = BROKEN_EXIF[case]
    buffer = io.BytesIO()
    PIL.Image.fromarray(random_image()).save(buffer, "JPEG", quality=95)
    expected = np.asarray(PIL.Image.open(buffer))
    segment = b"\xff\xe1" + struct.pack(">H", len(content) + 8) + b"Exif\0\0" + content
    (tmp_path / "image.jpg").write_bytes(buffer.getvalue()[:2] + segment + buffer.getvalue()[2:])
    source = PIL.Image.open(tmp_path / "image.jpg") if is_opened else tmp_path / "image.jpg"
    found = np.asarray(read_rgb(source))
    if case == "twice" and found.shape == expected.shape:  # only some releases of Pillow read it
        is_turned = False
    assert np.array_equal(found, np.rot90(expected, -1) if is_turned else expected)


OLD_PILLOW = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 11, reason="it cannot read the MPO that it writes")


@pytest.mark.parametrize("image_format", ["TIFF", "GIF", "WEBP", "PNG", pytest.param("MPO", marks=OLD_PILLOW)])
def test_the_first_of_several_pages_is_read_with_a_warning(image_format, tmp_path, hf_log):
    pages = [PIL.Image.fromarray(random_image(seed=seed)).convert("L").convert("RGB") for seed in range(3)]
    path = tmp_path / "pages"
    settings = {"lossless": True} if image_format == "WEBP" else {"quality": 95} if image_format == "MPO" else {}
    pages[0].save(path, image_format, save_all=True, append_images=pages[1:], **settings)
    found = np.asarray(read_rgb(path)).astype(int)
    assert abs(found - np.asarray(pages[0])).max() <= (12 if image_format == "MPO" else 0)
    assert (f"{path} has several pages or frames" in hf_log.text) == (image_format != "MPO")
    hf_log.clear()
    pages[0].save(path, "JPEG" if image_format == "MPO" else image_format, **settings)
    read_rgb(path)
    assert not hf_log.text


def test_a_frame_that_the_caller_has_chosen_is_read(tmp_path, hf_log):
    pages = [PIL.Image.fromarray(random_image(seed=seed)) for seed in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with PIL.Image.open(tmp_path / "pages.tif") as image:
        image.seek(1)
        assert np.array_equal(read_rgb(image), pages[1])
    assert not hf_log.text


def test_values_of_12_bits_in_16_are_read_with_a_warning(tmp_path, hf_log):
    values = np.array([[0, 2048, 4095]], np.uint16)
    PIL.Image.fromarray(values).save(tmp_path / "image.tif")
    logging.Logger.warning_once.cache_clear()
    torch.testing.assert_close(raw(tmp_path / "image.tif")[0, 0], torch.tensor([0, 2048 / 65535, 4095 / 65535]))
    assert "below 4096" in hf_log.text
    hf_log.clear()
    logging.Logger.warning_once.cache_clear()
    raw(values * 16)
    assert not hf_log.text


def test_a_tiff_of_12_bits_and_a_pgm_of_more_than_8_are_scaled_by_their_range(tmp_path):
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags)
    header = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    assert len(header) == 122
    (tmp_path / "image.tif").write_bytes(header + bytes.fromhex("000fff 800333"))  # 0, 4095, 2048, 819
    expected = torch.tensor([0, 1, 2048 / 4095, 0.2])
    torch.testing.assert_close(raw(tmp_path / "image.tif")[1, 0], expected, atol=1e-5, rtol=0)
    (tmp_path / "image.pgm").write_bytes(b"P5 4 1 4095\n" + np.array([0, 4095, 2048, 819], ">u2").tobytes())
    torch.testing.assert_close(raw(tmp_path / "image.pgm")[1, 0], expected, atol=1e-5, rtol=0)


class TestReadRgb:
    def test_gives_8_bits_with_the_processor_s_scale(self):
        deep = PIL.Image.fromarray(np.array([[0, 13107, 65535]], np.uint16))
        floats = PIL.Image.fromarray(np.array([[0, 0.2, 1]], np.float32))
        integers = PIL.Image.fromarray(np.array([[0, 51, 255]], np.int32))
        for image in (deep, floats, integers):
            rgb = read_rgb(image)
            assert rgb.mode == "RGB"
            assert np.asarray(rgb).tolist() == [[[0] * 3, [51] * 3, [255] * 3]]
        assert np.array_equal(read_rgb(PIL.Image.fromarray(random_image())), random_image())
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            read_rgb(PIL.Image.new("F", (2, 2), 200.0))

    def test_is_upright(self):
        image = PIL.Image.fromarray(random_image(8, 12))
        image.getexif()[0x0112] = 6
        assert np.array_equal(read_rgb(image), np.rot90(random_image(8, 12), -1))
