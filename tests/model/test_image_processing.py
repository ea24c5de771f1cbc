"""Images and annotations to tensors. Oracles: hand arithmetic, torch, rfdetr's `predict`, the port in transformers."""

import base64
import inspect
import io
import json
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
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging as transformers_logging

from transformers_rfdetr import RfDetrConfig, RfDetrImageProcessor
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.model.image_io import read_rgb

from small_models import small_config

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def photo(height=30, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processor(size=24, **settings):
    return RfDetrImageProcessor(size=size, **settings)


def raw(image, **settings):
    """Pixels (3, H, W) in [0, 1] as read, before resizing and normalising."""
    return processor(do_resize=False, do_normalize=False)(image, **settings).pixel_values[0]


def port(**settings):
    pytest.importorskip("torchvision")
    module = pytest.importorskip("transformers.models.rf_detr.image_processing_rf_detr")
    return module.RfDetrImageProcessor(**settings)


def skip_if_it_antialiases(theirs):
    """The port of 5.9 to 5.15 resizes with antialiasing, unlike the original: its pixels are no oracle."""
    if "antialias=False" not in inspect.getsource(type(theirs)):
        pytest.skip("this version's port antialiases")


def annotation(**fields):
    return (
        {"id": 31, "category_id": 2, "bbox": [5, 3, 20, 12], "area": 240, "iscrowd": 0}
        | {"segmentation": [[5, 3, 25, 3, 25, 15, 5, 15]]}
        | fields
    )


def target(*annotations, **fields):
    return {"image_id": 7, "annotations": list(annotations)} | fields


def labels_of(*annotations, masks=True, size=(60, 100), photo=(30, 50), **settings):
    image = np.zeros((*photo, 3), np.uint8)
    inputs = processor(size, **settings)(image, target(*annotations), return_segmentation_masks=masks)
    return inputs["labels"][0]


class TestSettings:
    def test_default_is_the_square_of_seg_medium(self):
        inputs = RfDetrImageProcessor()(photo())
        assert inputs.pixel_values.shape == (1, 3, 432, 432)
        assert RfDetrImageProcessor.model_input_names == ["pixel_values", "pixel_mask"]
        assert RfDetrImageProcessor().size == RfDetrImageProcessor.from_variant("RFDETRSegMedium").size

    def test_come_from_a_variant_or_a_configuration(self):
        assert RfDetrImageProcessor.from_variant("rf-detr-seg-nano").size == {"height": 312, "width": 312}
        assert RfDetrImageProcessor.from_variant("rf-detr-seg-nano", do_pad=False).do_pad is False
        wide = small_config(backbone_config={"image_size": [48, 96]})
        assert RfDetrImageProcessor.from_config(wide).size == {"height": 48, "width": 96}
        assert RfDetrImageProcessor.from_config(RfDetrConfig.from_variant("rf-detr-base")).size["height"] == 560
        with pytest.raises(ValueError, match="known"):
            RfDetrImageProcessor.from_variant("rf-detr-huge")

    @pytest.mark.parametrize(
        ("size", "read"),
        [
            (48, {"height": 48, "width": 48}),
            ((24, 48), {"height": 24, "width": 48}),
            ({"height": 24, "width": 48, "longest_edge": None}, {"height": 24, "width": 48}),
            ({"shortest_edge": 800, "longest_edge": 1333}, {"shortest_edge": 800, "longest_edge": 1333}),
        ],
    )
    def test_size_has_several_forms(self, size, read):
        assert processor(size).size == read

    @pytest.mark.parametrize(
        "settings",
        [
            {"size": 0},
            {"size": 48.0},
            {"size": "48"},
            {"size": {"height": 48}},
            {"size": {"height": -1, "width": 2}},
            {"size": {}},
            {"pad_size": {"shortest_edge": 48}},
            {"resample": 3},
            {"format": "coco_panoptic"},
            {"image_mean": [0.5]},
            {"image_mean": 0.5},
            {"image_mean": [0.5, "0.5", 0.5]},
            {"image_mean": [0.5, float("nan"), 0.5]},
            {"image_std": [0.5, 0, 0.5]},
            {"rescale_factor": 0},
            {"rescale_factor": -1 / 255},
            {"rescale_factor": None},
        ],
    )
    def test_that_are_not_supported_raise(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            RfDetrImageProcessor(**settings)

    def test_survive_saving(self, tmp_path):
        saved = processor((24, 48), do_pad=False, image_std=[0.5, 0.5, 0.5], pad_size=60, my_note="kept")
        saved.save_pretrained(tmp_path)
        loaded = RfDetrImageProcessor.from_pretrained(tmp_path)
        assert loaded.to_dict() == saved.to_dict()
        assert loaded.my_note == "kept"
        assert RfDetrImageProcessor.from_pretrained(tmp_path, size={"height": 12, "width": 12}).size["height"] == 12

    def test_are_the_port_s_json(self, tmp_path):
        theirs = port(size={"height": 24, "width": 48})
        ours = processor((24, 48))
        assert ours.to_dict().keys() == theirs.to_dict().keys()
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        ours_read = RfDetrImageProcessor.from_pretrained(tmp_path / "theirs")
        theirs_read = type(theirs).from_pretrained(tmp_path / "ours")
        image = photo()
        expected = theirs(image, return_tensors="pt").pixel_values
        skip_if_it_antialiases(theirs)
        torch.testing.assert_close(theirs_read(image, return_tensors="pt").pixel_values, expected, atol=0, rtol=0)
        torch.testing.assert_close(ours_read(image).pixel_values, expected, atol=2e-6, rtol=0)

    def test_of_one_call_change_that_call_only(self):
        ours = processor(24)
        assert ours(photo(), size=(12, 36)).pixel_values.shape == (1, 3, 12, 36)
        assert "pixel_mask" not in ours(photo(), do_pad=False, size=None)
        assert ours(photo(), pad_size=30).pixel_values.shape == (1, 3, 30, 30)
        assert processor(24, image_mean=np.zeros(3))(photo(), do_pad=False).pixel_values.shape == (1, 3, 24, 24)
        assert ours(photo(), do_normalize=False).pixel_values.min() >= 0
        assert ours.size == {"height": 24, "width": 24}
        with pytest.raises(ValueError, match=r"got \['do_resise'\]"):
            ours(photo(), do_resise=False)

    def test_is_an_image_processor_without_a_backend(self):
        assert issubclass(RfDetrImageProcessor, BaseImageProcessor)
        assert RfDetrImageProcessor.__mro__[1] is BaseImageProcessor


class TestPixels:
    def test_are_scaled_then_resized_without_antialiasing_then_normalised(self):
        image = photo(97, 61)
        scaled = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        resized = F.interpolate(scaled, (24, 36), mode="bilinear", align_corners=False, antialias=False)
        expected = (resized - MEAN[:, None, None]) / STD[:, None, None]
        torch.testing.assert_close(processor((24, 36))(image).pixel_values, expected, atol=1e-6, rtol=0)

    def test_by_hand(self):
        image = np.zeros((1, 2, 3), np.uint8)
        image[0, 1] = 255  # black, white -> 0, 1/4, 3/4, 1 at twice the width
        pixels = processor((1, 4), do_normalize=False)(image).pixel_values[0, 0, 0]
        torch.testing.assert_close(pixels, torch.tensor([0, 0.25, 0.75, 1]))

    def test_equal_rfdetr_predict_bit_for_bit(self):
        rfdetr = pytest.importorskip("rfdetr")
        with pytest.warns(match="pretrain_weights=None"):
            model = rfdetr.RFDETRSegNano(pretrain_weights=None, device="cpu")
        seen = []

        def stop(_, inputs):
            seen.append(inputs[0])
            raise StopIteration

        model.model.model.register_forward_pre_hook(stop)
        images = [photo(333, 250), photo(40, 41), PIL.Image.fromarray(photo(77, 99)[..., 0])]
        with pytest.raises(StopIteration):
            model.predict([PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images])
        ours = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")(images)
        torch.testing.assert_close(ours.pixel_values, seen[0], atol=0, rtol=0)

    def test_are_the_port_s(self):
        for size in ({"height": 24, "width": 48}, {"shortest_edge": 40, "longest_edge": 66}):
            images = [photo(30, 50), photo(64, 48), photo(50, 30)]
            skip_if_it_antialiases(port())
            theirs = port(size=size)(images, return_tensors="pt")
            ours = processor(size)(images, return_tensors="pt")
            # The port multiplies by 1 / 255 where rfdetr and we divide by 255.
            torch.testing.assert_close(ours.pixel_values, theirs.pixel_values, atol=2e-6, rtol=0)
            assert torch.equal(ours.pixel_mask, theirs.pixel_mask)
            assert ours.pixel_mask.dtype == theirs.pixel_mask.dtype == torch.int64

    def test_do_not_depend_on_the_rest_of_the_batch(self):
        images = [photo(30, 50), photo(64, 48)]
        batch = processor(24)(images)
        for index, image in enumerate(images):
            assert torch.equal(batch.pixel_values[index], processor(24)(image).pixel_values[0])
        assert batch.pixel_mask.all()

    def test_of_unequal_sizes_are_padded_at_the_bottom_and_right(self):
        images = [np.full((20, 40, 3), 255, np.uint8), np.full((40, 20, 3), 255, np.uint8)]
        inputs = processor({"shortest_edge": 10}, image_mean=[0, 0, 0], image_std=[1, 1, 1])(images)
        assert inputs.pixel_values.shape == (2, 3, 20, 20)
        assert torch.equal(inputs.pixel_values[:, 0], inputs.pixel_mask.float())
        assert inputs.pixel_mask[0, :10].all()
        assert not inputs.pixel_mask[0, 10:].any()
        assert inputs.pixel_mask[1, :, :10].all()
        assert not inputs.pixel_mask[1, :, 10:].any()

    def test_are_padded_to_pad_size(self):
        assert processor((10, 20), pad_size=(30, 25))(photo()).pixel_mask.sum() == 200
        with pytest.raises(ValueError, match=r"pad_size.*\(15, 15\)"):
            processor((10, 20), pad_size=15)(photo())

    def test_of_unequal_sizes_cannot_go_without_padding(self):
        with pytest.raises(ValueError, match="do_pad"):
            processor(do_resize=False, do_pad=False)([photo(8, 9), photo(9, 8)])

    def test_return_tensors(self):
        assert isinstance(processor()(photo(), return_tensors="np").pixel_values, np.ndarray)
        assert processor()(photo(), return_tensors="pt").pixel_values.dtype == torch.float32
        with pytest.raises(ValueError, match=r"return_tensors.*'tf'"):
            processor()(photo(), return_tensors="tf")


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
        with pytest.raises(ValueError, match=r"image 0: .*0\.\.255.*uint16"):
            raw(PIL.Image.new("I", (2, 2), 40000))

    def test_of_floats_are_in_0_1_or_refused(self):
        assert raw(PIL.Image.new("F", (2, 2), 0.25))[0, 0, 0] == 0.25
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            raw(PIL.Image.new("F", (2, 2), 200.0))

    def test_with_exif_rotation_are_turned(self):
        image = PIL.Image.fromarray(photo(8, 12))
        exif = image.getexif()
        exif[0x0112] = 6  # turn a quarter clockwise
        file = io.BytesIO()
        image.save(file, "PNG", exif=exif)
        turned = torch.from_numpy(np.rot90(photo(8, 12), -1).copy()).permute(2, 0, 1) / 255
        torch.testing.assert_close(raw(PIL.Image.open(file)), turned)
        labels = processor()(PIL.Image.open(file), target(height=12, width=8)).labels[0]
        assert labels["orig_size"].tolist() == [12, 8]
        with pytest.raises(ValueError, match=r"image 0 \(image_id 7\): .*height.*12.*8"):
            processor()(PIL.Image.open(file), target(height=8, width=12))


class TestArrays:
    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
    def test_of_every_layout_are_one_image(self, kind):
        image = photo(8, 9)
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
        image = photo(8, 9)
        assert torch.equal(raw(image[:, ::-1]), raw(np.ascontiguousarray(image[:, ::-1])))

    def test_are_not_changed(self):
        for image in (torch.rand(3, 24, 24), torch.from_numpy(photo()), np.random.default_rng(0).random((24, 24, 3))):
            before = image.clone() if isinstance(image, torch.Tensor) else image.copy()
            processor(24)(image)
            assert (before == image).all()

    def test_that_fit_both_layouts_need_input_data_format(self):
        array = photo(3, 5)  # (3, 5, 3)
        with pytest.raises(ValueError, match="input_data_format"):
            raw(array)
        assert raw(array, input_data_format="channels_first").shape == (3, 5, 3)
        assert raw(array, input_data_format="channels_last").shape == (3, 3, 5)
        assert raw(photo(4, 4)).shape == (3, 4, 4)
        assert raw(photo(1, 2)).shape == (3, 1, 2)
        with pytest.raises(ValueError, match="'last'"):
            raw(array, input_data_format="last")

    def test_without_rescaling_are_used_as_they_are(self):
        assert raw(np.full((4, 5), 7.5), do_rescale=False).unique().tolist() == [7.5]
        assert raw(np.full((4, 5), 51, np.uint8), do_rescale=False).unique().tolist() == [51]

    def test_in_a_batch_are_a_list(self):
        batch = np.stack([photo(8, 9, 0), photo(8, 9, 1)])
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
            (np.full((4, 5), 256), r"0\.\.255"),
            (np.full((4, 5), -1), r"0\.\.255"),
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
            processor()([photo(), image])

    def test_are_at_least_one(self):
        with pytest.raises(ValueError, match="images"):
            processor()([])


class TestFilesAndUrls:
    @pytest.fixture
    def site(self, tmp_path):
        """A loopback web site of one folder; `/missing` and `/text` answer what they say."""
        PIL.Image.fromarray(photo()).save(tmp_path / "photo.png")
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
        expected = processor()(photo()).pixel_values[0]
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
        assert torch.equal(raw("~/photo.png"), raw(photo()))

    @pytest.mark.parametrize(
        "source", ["missing.png", "photo", "/tmp", "file:///photo.png", "s3://bucket/photo.png", "~/missing.png", ""]
    )
    def test_that_do_not_exist_are_said_not_to(self, source):
        message = f"image 1: {source} cannot be opened as an image: the file does not exist. Pass a path"
        with pytest.raises(ValueError, match=re.escape(message)):
            processor()([photo(), source])

    def damaged(self, folder):
        """An image whose second chunk of pixels has a wrong name; one that ends early; one with senseless EXIF."""
        pixels = io.BytesIO()
        PIL.Image.fromarray(photo(300, 500)).save(pixels, "PNG")
        data = pixels.getvalue()
        second = data.index(b"IDAT", data.index(b"IDAT") + 4)
        (folder / "chunk.png").write_bytes(data[:second] + b"\x19\x8d\x93]" + data[second + 4 :])
        (folder / "cut.png").write_bytes(data[:200])
        PIL.Image.fromarray(photo()).save(folder / "exif.png", exif=b"garbage")
        return [folder / f"{name}.png" for name in ("chunk", "cut", "exif")]

    def test_that_are_damaged_are_named(self, tmp_path):
        for path in self.damaged(tmp_path):
            for source in (path, base64.b64encode(path.read_bytes()).decode()):
                with pytest.raises(ValueError, match=r"image 1: .* cannot be opened as an image: ."):
                    processor()([photo(), source])
            with pytest.raises(ValueError, match=f"image 1: {path} "):
                processor()([photo(), path])

    def test_that_were_opened_by_the_caller_and_are_damaged_are_numbered(self, tmp_path):
        for path in self.damaged(tmp_path):
            with PIL.Image.open(path) as image, pytest.raises(ValueError, match=r"image 1: .* cannot be opened"):
                processor()([photo(), image])
        image = PIL.Image.fromarray(photo())
        image.info["exif"] = b"garbage"
        with pytest.raises(ValueError, match=r"image 1: .* cannot be opened"):
            processor()([photo(), image])

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


class TestReadRgb:
    def test_gives_8_bits_with_the_processor_s_scale(self):
        deep = PIL.Image.fromarray(np.array([[0, 13107, 65535]], np.uint16))
        floats = PIL.Image.fromarray(np.array([[0, 0.2, 1]], np.float32))
        integers = PIL.Image.fromarray(np.array([[0, 51, 255]], np.int32))
        for image in (deep, floats, integers):
            rgb = read_rgb(image)
            assert rgb.mode == "RGB"
            assert np.asarray(rgb).tolist() == [[[0] * 3, [51] * 3, [255] * 3]]
        assert np.array_equal(read_rgb(PIL.Image.fromarray(photo())), photo())
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            read_rgb(PIL.Image.new("F", (2, 2), 200.0))

    def test_is_upright(self):
        image = PIL.Image.fromarray(photo(8, 12))
        image.getexif()[0x0112] = 6
        assert np.array_equal(read_rgb(image), np.rot90(photo(8, 12), -1))


class TestLabels:
    def test_by_hand(self):
        labels = labels_of(annotation(), photo=(30, 50), size=(60, 100))
        assert labels["class_labels"].tolist() == [2]
        torch.testing.assert_close(labels["boxes"], torch.tensor([[15 / 50, 9 / 30, 20 / 50, 12 / 30]]))
        assert labels["masks"].shape == (1, 60, 100)
        assert labels["masks"][0, 6:30, 10:50].all()
        assert labels["masks"].sum() == 24 * 40
        assert labels["area"].tolist() == [240 * 4]
        assert labels["iscrowd"].tolist() == [0]
        assert labels["image_id"].tolist() == [7]
        assert labels["orig_size"].tolist() == [30, 50]
        assert labels["size"].tolist() == [60, 100]

    def test_have_fixed_dtypes_with_and_without_objects(self):
        integers = dict.fromkeys(["class_labels", "iscrowd", "image_id", "orig_size", "size"], torch.int64)
        dtypes = integers | {"boxes": torch.float32, "area": torch.float32, "masks": torch.bool}
        for number in (0, 2):
            labels = labels_of(*[annotation()] * number)
            assert {name: value.dtype for name, value in labels.items()} == dtypes
            shapes = {name: tuple(labels[name].shape) for name in ("class_labels", "boxes", "area", "iscrowd", "masks")}
            assert shapes == {
                "class_labels": (number,),
                "boxes": (number, 4),
                "area": (number,),
                "iscrowd": (number,),
                "masks": (number, 60, 100),
            }

    def test_are_the_port_s_where_it_works(self):
        generator = np.random.default_rng(0)
        annotations = []
        for number in range(6):
            x, y, width, height = generator.uniform(8, 20, 4)
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(annotation(bbox=[x, y, width, height], segmentation=[polygon], area=number + 0.5))
        image = photo(40, 40)
        kwargs = {"return_segmentation_masks": True, "return_tensors": "pt"}
        theirs = port(size={"height": 80, "width": 60})(image, annotations=target(*annotations), **kwargs).labels[0]
        ours = processor((80, 60))(image, annotations=target(*annotations), **kwargs).labels[0]
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"masks"}:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-6)
            assert ours[name].dtype == theirs[name].dtype
        overlap = (ours["masks"] & theirs["masks"]).sum((1, 2)) / (ours["masks"] | theirs["masks"]).sum((1, 2))
        assert overlap.min() > 0.8  # theirs are drawn at 40 x 40 and enlarged

    def test_serve_the_hugging_face_guide(self):
        images = [PIL.Image.fromarray(photo(30, 50, seed)) for seed in range(2)]
        inputs = processor()(
            images=images,
            annotations=[target(annotation(image_id=1)), target(annotation(), annotation(id=2))],
            return_segmentation_masks=True,
            return_tensors="pt",
        )
        assert list(inputs) == ["pixel_values", "pixel_mask", "labels"]
        assert [len(labels["boxes"]) for labels in inputs["labels"]] == [1, 2]

    def test_without_masks_need_no_segmentation(self):
        labels = labels_of(annotation(segmentation=None), masks=None)
        assert "masks" not in labels
        assert len(labels["boxes"]) == 1

    def test_are_numpy_on_demand(self):
        inputs = processor()(photo(), target(annotation()), return_segmentation_masks=True, return_tensors="np")
        assert all(isinstance(value, np.ndarray) for value in inputs.labels[0].values())

    def test_boxes_stay_pixels_without_conversion(self):
        labels = labels_of(annotation(), do_convert_annotations=False)
        torch.testing.assert_close(labels["boxes"], torch.tensor([[10.0, 6, 50, 30]]))

    def test_boxes_of_a_padded_image_are_relative_to_the_image_and_masks_to_the_input(self):
        labels = labels_of(annotation(), pad_size=(80, 120))
        torch.testing.assert_close(labels["boxes"], labels_of(annotation())["boxes"])
        assert labels["size"].tolist() == [80, 120]
        assert labels["masks"].shape == (1, 80, 120)
        assert torch.equal(labels["masks"][:, :60, :100], labels_of(annotation())["masks"])
        assert labels["masks"].sum() == 24 * 40
        assert labels["area"].tolist() == [240 * 4]

    def test_boxes_are_clamped_to_the_image(self):
        labels = labels_of(annotation(bbox=[-10, -5, 100, 10], segmentation=[[0, 0, 50, 0, 50, 5, 0, 5]]))
        torch.testing.assert_close(labels["boxes"], torch.tensor([[0.5, 2.5 / 30, 1.0, 5 / 30]]))

    def test_missing_box_and_area_come_from_the_shape(self):
        labels = labels_of(annotation(bbox=None, area=None))
        torch.testing.assert_close(labels["boxes"], labels_of(annotation())["boxes"])
        assert labels["area"].tolist() == [240 * 4]
        without = annotation()
        del without["bbox"], without["area"], without["iscrowd"]
        assert labels_of(without, masks=False)["area"].tolist() == [240 * 4]

    def test_missing_area_without_a_shape_is_the_box_s(self):
        assert labels_of(annotation(area=None, segmentation=None), masks=False)["area"].tolist() == [240 * 4]

    @pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float64, lambda value: np.array([value])])
    def test_are_the_same_of_numbers_of_numpy_and_torch(self, kind):
        def whole(value):
            return kind(value) if kind is not np.float64 else np.int32(value)

        fields = {"id": whole(1), "category_id": whole(2), "area": kind(240.0), "iscrowd": whole(0)}
        boxes = [[kind(float(side)) for side in (5, 3, 20, 12)], np.array([5, 3, 20, 12], np.float16)]
        for box in (*boxes, torch.tensor([5, 3, 20, 12])):
            objects = target(annotation(bbox=box, **fields), image_id=whole(7), height=whole(30), width=whole(50))
            labels = processor((60, 100))(np.zeros((30, 50, 3), np.uint8), objects, True).labels[0]
            expected = labels_of(annotation())
            assert all(torch.equal(labels[name], expected[name]) for name in expected)
        assert len(labels_of(annotation(iscrowd=whole(1)))["boxes"]) == 0

    @pytest.mark.parametrize("image_id", [12, "12", np.int64(12)])
    def test_image_id_is_an_integer(self, image_id):
        inputs = processor()(photo(), target(image_id=image_id))
        assert inputs.labels[0]["image_id"].tolist() == [12]


class TestObjectsThatLeave:
    def test_crowds_leave_in_step(self):
        labels = labels_of(
            annotation(category_id=1),
            annotation(category_id=5, iscrowd=1, segmentation={"size": [30, 50], "counts": [100, 1000, 400]}),
            annotation(category_id=3, bbox=[0, 0, 10, 10], segmentation=[[0, 0, 10, 0, 10, 10, 0, 10]], area=100),
        )
        assert labels["class_labels"].tolist() == [1, 3]
        assert labels["area"].tolist() == [960, 400]
        assert labels["iscrowd"].tolist() == [0, 0]
        assert labels["masks"].flatten(1).sum(1).tolist() == [960, 400]
        assert labels["boxes"][:, 2].tolist() == pytest.approx([0.4, 0.2])

    @pytest.mark.parametrize(
        "segmentation",
        [
            *([], [[]], None, [[1, 2]], [[1, 2, 3, 4]], [[5, 5, 20, 5, 9, 5]], [[90, 90, 99, 90, 99, 99]]),
            *(np.zeros((30, 50), bool), {"size": [30, 50], "counts": [1500]}),
        ],
    )
    def test_shapeless_objects_leave_in_step(self, segmentation):
        labels = labels_of(annotation(category_id=1), annotation(category_id=5, segmentation=segmentation))
        assert labels["class_labels"].tolist() == [1]
        assert len(labels["boxes"]) == len(labels["masks"]) == len(labels["area"]) == len(labels["iscrowd"]) == 1

    def test_a_missing_key_is_no_segmentation(self):
        shapeless = annotation()
        del shapeless["segmentation"]
        assert len(labels_of(shapeless)["boxes"]) == 0
        del shapeless["bbox"]
        assert len(labels_of(shapeless, masks=False)["boxes"]) == 0

    @pytest.mark.parametrize("bbox", [[5, 5, 0, 9], [5, 5, 9, 0], [5, 5, -3, 9], [60, 5, 9, 9], [5, -20, 9, 9]])
    def test_boxes_without_an_area_in_the_image_leave(self, bbox):
        for masks in (True, False):
            assert labels_of(annotation(bbox=bbox), annotation(), masks=masks)["boxes"].shape == (1, 4)

    def test_an_object_too_small_for_the_model_s_input_leaves(self):
        bitmap = np.zeros((30, 50), bool)
        bitmap[1, 1] = True
        assert len(labels_of(annotation(segmentation=bitmap), size=(6, 10))["boxes"]) == 0
        assert len(labels_of(annotation(segmentation=bitmap), size=(30, 50))["boxes"]) == 1

    def test_an_object_that_vanishes_between_others_takes_its_own_area_along(self):
        speck = np.zeros((30, 50), bool)
        speck[1, 1] = True
        corner = {"bbox": [0, 0, 10, 10], "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}
        labels = labels_of(
            annotation(category_id=1, area=25),
            annotation(category_id=2, area=50, segmentation=speck),
            annotation(category_id=3, area=100, **corner),
            size=(6, 10),
        )
        assert labels["class_labels"].tolist() == [1, 3]
        assert labels["area"].tolist() == pytest.approx([1, 4])  # a 25th of the pixels
        assert labels["boxes"][:, 2].tolist() == pytest.approx([0.4, 0.2])
        assert labels["masks"].flatten(1).sum(1).tolist() == [8, 4]

    def test_the_warning_comes_once_and_each_image_is_named(self, hf_log):
        type(transformers_logging.get_logger("x")).warning_once.cache_clear()
        with hf_log.at_level(logging.INFO, logger="transformers_rfdetr.model.coco_labels"):
            for _ in range(3):
                labels_of(annotation(segmentation=[]))
        assert [record.levelname for record in hf_log.records].count("WARNING") == 1
        assert hf_log.text.count("image 0 (image_id 7): dropped 1 of 1 annotations") == 3

    def test_nothing_leaves_in_silence(self, hf_log):
        with hf_log.at_level(logging.INFO, logger="transformers_rfdetr.model.coco_labels"):
            labels_of(annotation(segmentation=[]), annotation())
        assert "image 0 (image_id 7): dropped 1 of 2 annotations" in hf_log.text


class TestWhatCannotBeRead:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"segmentation": [[1, 2, 3, 4, 5]]}, "segmentation: polygon 0 has 5 numbers"),
            ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "segmentation: polygon 0"),
            ({"segmentation": [["1", 2, 3, 4, 5, 6]]}, "segmentation: polygon 0"),
            ({"segmentation": {"size": [50, 30], "counts": [1500]}}, r"segmentation: .*\[50, 30\].*\[30, 50\]"),
            ({"segmentation": {"size": [30, 50], "counts": "zz"}}, "segmentation: .*counts"),
            ({"segmentation": np.ones((50, 30), bool)}, "segmentation: .*50x30"),
            ({"category_id": -1}, "category_id.*-1"),
            ({"category_id": 1.0}, "category_id.*1.0"),
            ({"category_id": "1"}, "category_id.*'1'"),
            ({"category_id": True}, "category_id.*True"),
            ({"category_id": None}, "category_id.*None"),
            ({"bbox": [1, 2, 3]}, r"bbox.*\[1, 2, 3\]"),
            ({"bbox": [1, 2, 3, "4"]}, "bbox.*'4'"),
            ({"bbox": [1, 2, 3, True]}, "bbox"),
            ({"bbox": [1, 2, 3, float("nan")]}, "bbox"),
            ({"bbox": []}, "bbox"),
            ({"bbox": "1234"}, "bbox"),
            ({"area": -1}, "area.*-1"),
            ({"area": "12"}, "area.*'12'"),
            ({"area": float("inf")}, "area.*inf"),
            ({"iscrowd": 2}, "iscrowd.*2"),
            ({"iscrowd": np.array([0, 1])}, r"iscrowd.*\[0, 1\]"),
            ({"iscrowd": torch.tensor([1, 0])}, r"iscrowd.*\[1, 0\]"),
            ({"category_id": torch.tensor([1, 2])}, r"category_id.*\[1, 2\]"),
            ({"bbox": torch.tensor(3.0)}, "bbox.*3.0"),
        ],
    )
    def test_names_image_annotation_and_field(self, fields, message):
        pair = [target(image_id=3), target(annotation(), annotation(id=99, **fields))]
        place = r"image 1 \(image_id 7\), annotation 1 \(id 99\): .*"
        with pytest.raises(ValueError, match=place + message):
            processor()([photo(30, 50)] * 2, pair, return_segmentation_masks=True)

    @pytest.mark.parametrize(
        ("annotations", "message"),
        [
            (target(image_id="a1"), "image 0: .*image_id.*'a1'"),
            (target(image_id=None), "image 0: .*image_id.*None"),
            (target(image_id=1.5), "image 0: .*image_id.*1.5"),
            ({"annotations": []}, "image 0: .*image_id.*None"),
            ({"image_id": 1}, "image 0: .*annotations"),
            ({"image_id": 1, "annotations": {}}, "image 0: .*annotations"),
            ({"image_id": 1, "annotations": np.array({})}, "image 0: .*annotations"),
            (target(image_id=torch.tensor([1, 2])), r"image 0: .*image_id.*\[1, 2\]"),
            (target(height=np.array([30, 30])), r"height.*30.*\[30, 30\]"),
            ([[annotation()]], "image 0: .*annotations"),
            (target("square"), "annotation 0: .*'square'"),
            (target(width=51), r"image 0 \(image_id 7\): .*width.*50.*51"),
            ([target(), target()], "annotations.*1 images.*2"),
        ],
    )
    def test_names_what_stands_around_the_annotations(self, annotations, message):
        with pytest.raises(ValueError, match=message):
            processor()(photo(30, 50), annotations)


@pytest.fixture(scope="module")
def dataset():
    """Five images of houses, the fourth without any, as objects in rows and in columns; in whole pixels."""
    datasets = pytest.importorskip("datasets")
    photos, coco = draw_dataset(5)
    fields = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    rows = []
    for photo, image in zip(photos, coco["images"], strict=True):
        found = [item for item in coco["annotations"] if item["image_id"] == image["id"]]
        found = [item for item in found if isinstance(item["segmentation"], list)]
        for item in found:
            item["segmentation"] = [[float(round(side)) for side in polygon] for polygon in item["segmentation"]]
        columns = {field: [item[field] for item in found] for field in fields}
        size = {"height": 96, "width": 96}
        rows.append({"image": photo, "image_id": image["id"], "annotations": found, "objects": columns} | size)
    return datasets.Dataset.from_list(rows)


class TestDatasets:
    @staticmethod
    def from_columns(objects):
        return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]

    @pytest.mark.parametrize("layout", ["annotations", "objects"])
    @pytest.mark.parametrize("form", ["numpy", "torch"])
    def test_with_a_format_give_the_same_labels(self, dataset, form, layout):
        for plain, row in zip(dataset, dataset.with_format(form), strict=True):
            labels = []
            for item in (plain, row):
                objects = item[layout] if layout == "annotations" else self.from_columns(item["objects"])
                objects = {"image_id": item["image_id"], "annotations": objects, "height": item["height"]}
                labels.append(processor(96)(plain["image"], objects, return_segmentation_masks=True).labels[0])
            expected, found = labels
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], msg=f"{name} of image {plain['image_id']}")

    def test_with_an_empty_image_give_every_batch_of_one(self, dataset):
        def transform(rows):
            targets = [
                {"image_id": image_id, "annotations": self.from_columns(objects)}
                for image_id, objects in zip(rows["image_id"], rows["objects"], strict=True)
            ]
            return processor(96)(rows["image"], targets, return_segmentation_masks=True, return_tensors="pt")

        rows = dataset.with_transform(transform)
        batches = list(torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=lambda batch: batch))
        counts = [len(batch[0]["labels"]["boxes"]) for batch in batches]
        assert counts == [len(objects) for objects in dataset["annotations"]]
        assert len(counts) == 5
        assert counts[3] == 0


def test_every_row_of_the_port_s_crashes_now_trains():
    """One image with each encoding of one square, after a crowd: known_defects.md, "Images and annotations"."""
    bitmap = np.zeros((30, 50), np.uint8)
    bitmap[3:15, 5:25] = 1
    compressed = coco_mask.encode(np.asfortranarray(bitmap))
    text = {"size": [30, 50], "counts": compressed["counts"].decode()}
    shapes = [annotation()["segmentation"], compressed, text, bitmap, bitmap.tolist()]
    labels = labels_of(annotation(iscrowd=1), *[annotation(segmentation=shape) for shape in shapes], size=(30, 50))
    assert labels["masks"].shape == (5, 30, 50)
    assert (labels["masks"] == torch.from_numpy(bitmap).bool()).all()
    json.dumps(text)
