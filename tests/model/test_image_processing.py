"""Settings and pixel values of the image processor. Oracles: hand arithmetic, torch, rfdetr's `predict`, the port."""

import logging

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension

from transformers_rfdetr import RfDetrConfig, RfDetrImageProcessor

from processor_inputs import annotation, port, processor, random_image, skip_if_it_antialiases, target
from small_models import small_config

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class TestSettings:
    def test_default_is_the_square_of_seg_medium(self):
        inputs = RfDetrImageProcessor()(random_image())
        assert inputs.pixel_values.shape == (1, 3, 432, 432)
        assert RfDetrImageProcessor.model_input_names == ["pixel_values", "pixel_mask"]
        assert RfDetrImageProcessor().size == RfDetrImageProcessor.from_variant("RFDETRSegMedium").size

    def test_come_from_a_variant_or_a_configuration(self):
        assert RfDetrImageProcessor.from_variant("rf-detr-seg-nano").size == {"height": 312, "width": 312}
        assert RfDetrImageProcessor.from_variant("rf-detr-seg-nano", do_pad=False).do_pad is False
        wide = small_config(backbone_config={"image_size": [48, 96]})
        assert RfDetrImageProcessor.from_config(wide).size == {"height": 48, "width": 96}
        assert RfDetrImageProcessor.from_config(RfDetrConfig.from_variant("rf-detr-base")).size["height"] == 560
        with pytest.raises(ValueError, match="rf-detr-huge"):
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
        image = random_image()
        expected = theirs(image, return_tensors="pt").pixel_values
        skip_if_it_antialiases(theirs)
        torch.testing.assert_close(theirs_read(image, return_tensors="pt").pixel_values, expected, atol=0, rtol=0)
        torch.testing.assert_close(ours_read(image).pixel_values, expected, atol=2e-6, rtol=0)

    def test_of_one_call_change_that_call_only(self):
        ours = processor(24)
        assert ours(random_image(), size=(12, 36)).pixel_values.shape == (1, 3, 12, 36)
        assert "pixel_mask" not in ours(random_image(), do_pad=False, size=None)
        assert ours(random_image(), pad_size=30).pixel_values.shape == (1, 3, 30, 30)
        assert processor(24, image_mean=np.zeros(3))(random_image(), do_pad=False).pixel_values.shape == (1, 3, 24, 24)
        assert ours(random_image(), do_normalize=False).pixel_values.min() >= 0
        assert ours.size == {"height": 24, "width": 24}
        with pytest.raises(ValueError, match=r"got \['do_resise'\]"):
            ours(random_image(), do_resise=False)

    def test_is_an_image_processor_without_a_backend(self):
        assert issubclass(RfDetrImageProcessor, BaseImageProcessor)
        assert RfDetrImageProcessor.__mro__[1] is BaseImageProcessor


class TestPixels:
    def test_are_scaled_then_resized_without_antialiasing_then_normalised(self):
        image = random_image(97, 61)
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
        images = [random_image(333, 250), random_image(40, 41), PIL.Image.fromarray(random_image(77, 99)[..., 0])]
        with pytest.raises(StopIteration):
            model.predict([PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images])
        ours = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")(images)
        torch.testing.assert_close(ours.pixel_values, seen[0], atol=0, rtol=0)

    def test_are_the_port_s(self):
        for size in ({"height": 24, "width": 48}, {"shortest_edge": 40, "longest_edge": 66}):
            images = [random_image(30, 50), random_image(64, 48), random_image(50, 30)]
            skip_if_it_antialiases(port())
            theirs = port(size=size)(images, return_tensors="pt")
            ours = processor(size)(images, return_tensors="pt")
            # The port multiplies by 1 / 255 where rfdetr and we divide by 255.
            torch.testing.assert_close(ours.pixel_values, theirs.pixel_values, atol=2e-6, rtol=0)
            assert torch.equal(ours.pixel_mask, theirs.pixel_mask)
            assert ours.pixel_mask.dtype == theirs.pixel_mask.dtype == torch.int64

    def test_do_not_depend_on_the_rest_of_the_batch(self):
        images = [random_image(30, 50), random_image(64, 48)]
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
        assert processor((10, 20), pad_size=(30, 25))(random_image()).pixel_mask.sum() == 200
        with pytest.raises(ValueError, match=r"pad_size.*\(15, 15\)"):
            processor((10, 20), pad_size=15)(random_image())

    def test_of_unequal_sizes_cannot_go_without_padding(self):
        with pytest.raises(ValueError, match="do_pad"):
            processor(do_resize=False, do_pad=False)([random_image(8, 9), random_image(9, 8)])

    def test_return_tensors(self):
        assert isinstance(processor()(random_image(), return_tensors="np").pixel_values, np.ndarray)
        assert processor()(random_image(), return_tensors="pt").pixel_values.dtype == torch.float32
        with pytest.raises(ValueError, match=r"return_tensors.*'tf'"):
            processor()(random_image(), return_tensors="tf")


class TestArgumentsOfOtherProcessors:
    def test_that_mean_one_thing_here_are_obeyed(self):
        images = [random_image(), random_image(seed=1)]
        expected = processor()(images)
        for value in ("channels_last", ChannelDimension.LAST):
            found = processor()(images, data_format=value, return_tensors="np").pixel_values
            assert np.array_equal(found, expected.pixel_values.permute(0, 2, 3, 1).numpy())
        settings = {"data_format": "channels_first", "do_convert_rgb": True, "default_to_square": True}
        assert torch.equal(processor()(images, **settings).pixel_values, expected.pixel_values)
        with pytest.raises(ValueError, match=r"data_format.*'last'"):
            processor()(images, data_format="last")

    def test_device_is_that_of_every_tensor(self):
        inputs = processor()(random_image(), target(annotation()), True, device="meta")
        tensors = [inputs.pixel_values, inputs.pixel_mask, *inputs.labels[0].values()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}

    def test_that_change_nothing_are_ignored_with_one_warning(self, hf_log):
        logging.Logger.warning_once.cache_clear()
        for _ in range(2):
            inputs = processor()(random_image(), disable_grouping=True, crop_size={"height": 9, "width": 9})
            assert torch.equal(inputs.pixel_values, processor()(random_image()).pixel_values)
        assert len(hf_log.records) == 1
        assert "disable_grouping" in hf_log.text

    @pytest.mark.parametrize(("name", "value"), [("do_convert_rgb", False), ("do_center_crop", True)])
    def test_that_would_change_the_result_are_refused(self, name, value):
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            processor()(random_image(), **{name: value})
