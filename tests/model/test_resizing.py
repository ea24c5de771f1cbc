"""Bilinear resizing: equal to `F.interpolate`, of which it reads only the pixels that are needed."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.model.image_io import as_tensor, to_float
from transformers_rfdetr.model.resizing import neighbors, resize_bilinear

SIZES = [
    ((864, 864), (432, 432)),
    ((501, 1000), (24, 96)),
    ((12_007, 3), (301, 3)),
    ((2, 9999), (7, 101)),
    ((1, 64), (1, 1)),
]


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    return to_float(pixels, True, 1 / 255)


def random_image(size: tuple[int, int]) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8))


@pytest.mark.parametrize(("original", "size"), SIZES)
def test_picked_pixels_give_the_values_of_f_interpolate(original, size):
    image = random_image(original)
    last = as_tensor(image)
    expected = F.interpolate(to_unit(last)[None], size, mode="bilinear", align_corners=False)[0]
    assert 4 * size[0] * size[1] < original[0] * original[1] or original == (864, 864)
    given = {"image": image, "channels last": last, "channels first": last.contiguous(), "part": last[:, :, :]}
    given["16 bits"] = (last.contiguous().to(torch.int32) * 257).to(torch.uint16)
    for name, pixels in given.items():
        found = resize_bilinear(pixels, size, to_unit, None)
        assert (found - expected).abs().max() < 1e-6, name
    gray = resize_bilinear(last[:1], size, to_unit, None)
    assert (gray - expected[:1]).abs().max() < 1e-6


@pytest.mark.parametrize("length", [1, 2, 7, 63, 640, 4001, 65_537])
def test_neighbors_and_weights_are_those_of_f_interpolate(length):
    rng = torch.Generator().manual_seed(length)
    values = torch.rand(length, generator=rng)
    for size in {1, 2, max(1, length // 3), max(1, length // 2), length, 2 * length + 1}:
        pairs, weights = neighbors(length, size)
        expected = F.interpolate(values[None, None, :, None], (size, 1), mode="bilinear", align_corners=False).flatten()
        found = torch.lerp(values[pairs[:, 0]], values[pairs[:, 1]], weights)
        assert (found - expected).abs().max() < 1e-6
        assert 0 <= pairs.min() <= pairs.max() < length
        assert ((weights >= 0) & (weights < 1)).all()


def test_the_processor_gives_the_same_for_an_image_and_its_array():
    image = random_image((700, 900))
    processor = RfDetrImageProcessor(size=96)
    as_image, as_array = (processor(given).pixel_values for given in (image, np.array(image)))
    assert torch.equal(as_image, as_array)
    expected = F.interpolate(to_unit(as_tensor(image))[None], (96, 96), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    assert (as_image - (expected - mean) / std).abs().max() < 5e-6
