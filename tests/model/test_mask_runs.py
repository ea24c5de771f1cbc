"""RLE from mask logits. Oracle: the masks that `upsample_masks` draws, which other tests compare with torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from transformers_rfdetr import predict
from transformers_rfdetr.data.synthetic.aerial import draw_scene
from transformers_rfdetr.hub.load import load
from transformers_rfdetr.model import mask_runs
from transformers_rfdetr.model.mask_runs import Axis, compress_runs, dense_changes, encode_mask_logits, places_to_rles
from transformers_rfdetr.model.masks import decompress_runs, region_to_rle, upsample_masks

from properties import holds


def plain(logits, size, valid_size=None):
    return [region_to_rle(*region, size) for region in upsample_masks(logits, size, 0.0, valid_size)]


def dense(logits, size, valid_size=None):
    """As on a GPU, in blocks of a few columns."""
    axes = [Axis.of(*sides) for sides in zip(logits.shape[1:], size, valid_size or logits.shape[1:], strict=True)]
    return places_to_rles(dense_changes(logits, *axes), len(logits), size)


def blobs(count, size, seed=0, noise=0.2):
    """Mask logits (N, h, w): one ellipse each, some beyond the border, with noise."""
    random = np.random.default_rng(seed)
    center, radius = random.random((2, count, 2, 1, 1)) * np.reshape(size, (2, 1, 1)) * [[[[[1]]]], [[[[0.4]]]]]
    rows, columns = np.ogrid[: size[0], : size[1]]
    distance = ((rows - center[:, 0]) / (radius[:, 0] + 1)) ** 2 + ((columns - center[:, 1]) / (radius[:, 1] + 1)) ** 2
    return torch.tensor(5 - 5 * distance.clip(max=3) + noise * random.standard_normal((count, *size))).float()


@pytest.fixture(scope="module")
def trained():
    """Return a trained model, its processor, an image and the outputs."""
    model, processor = load("rf-detr-seg-tiny")
    image, _ = draw_scene(4)
    with torch.no_grad():
        return model, processor, image, model(**processor(image, return_tensors="pt"))


SIZES = [(480, 640), (1080, 1920), (211, 333), (27, 36), (54, 72), (26, 19), (7, 100), (100, 5), (1, 1), (1, 90)]


class TestEqualsUpsamplingTheWholeMap:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("noise", [0.2, 3.0])
    def test_of_objects(self, size, noise):
        logits = blobs(6, (27, 36), seed=sum(size), noise=noise)
        assert encode_mask_logits(logits, size) == plain(logits, size)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (40, 3), (13, 11)])
    @pytest.mark.parametrize("size", [(50, 70), (6, 5), (1, 33), (33, 1), (9, 9)])
    def test_of_noise_on_grids_of_any_size(self, shape, size):
        logits = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
        expected = plain(logits, size)
        assert encode_mask_logits(logits, size) == expected
        assert dense(logits, size) == expected

    @pytest.mark.parametrize("valid_size", [(20.0, 30.0), (19.3, 35.99), (0.4, 1.2), (27.0, 0.01)])
    def test_of_images_with_padding(self, valid_size):
        logits = blobs(4, (27, 36), noise=1)
        expected = plain(logits, (90, 77), valid_size)
        assert encode_mask_logits(logits, (90, 77), valid_size) == expected
        assert dense(logits, (90, 77), valid_size) == expected

    def test_of_a_trained_model(self, trained):
        _, _, image, outputs = trained
        (logits,) = outputs.pred_masks
        assert (logits > 0).any(2).any(1).sum() > 20
        for size in [image.size[::-1], (701, 999), (33, 44)]:
            assert encode_mask_logits(logits, size) == plain(logits, size)
        assert dense(logits, (130, 170)) == plain(logits, (130, 170))

    @pytest.mark.parametrize("value", [-1.0, -0.0, 0.0, 1e-45, 1e-30, 1.0, 3.4e38, float("inf"), float("nan")])
    def test_of_constant_maps(self, value):
        logits = torch.full((2, 7, 8), value)
        counts = coco_mask.encode(np.full((50, 41), value > 0, np.uint8, order="F"))["counts"].decode()
        found = encode_mask_logits(logits, (50, 41))
        assert found == plain(logits, (50, 41)) == dense(logits, (50, 41))
        # Products of the smallest number round to 0.
        assert found == 2 * [{"size": [50, 41], "counts": counts}] or value == 1e-45

    @pytest.mark.parametrize("sign", [1, -1])
    def test_where_pixels_are_exactly_at_the_threshold(self, sign):
        # The pixels of the even sizes lie on the cells, and at quarters between them.
        pattern = torch.tensor([[0.0, 1, -1, 0], [1, -1, 0, 0], [-3, 1, 3, -1], [0, 0, 0, 1]]) * sign
        logits = torch.stack([pattern, pattern.T, pattern.flip(0), pattern.roll(1, 1)])
        for size in [(4, 4), (8, 8), (12, 12), (20, 28), (64, 16), (4, 7)]:
            whole = F.interpolate(logits.double()[None], size, mode="bilinear", align_corners=False)[0]
            assert (whole == 0).any()
            assert encode_mask_logits(logits, size) == plain(logits, size)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_other_floating_types(self, dtype):
        logits = blobs(3, (27, 36)).to(dtype)
        assert encode_mask_logits(logits, (300, 200)) == plain(logits.float(), (300, 200))

    def test_of_strided_logits_that_require_gradients(self):
        logits = blobs(8, (20, 20)).transpose(1, 2)[::2, :, 3:].requires_grad_()
        assert encode_mask_logits(logits, (99, 101)) == plain(logits, (99, 101))

    def test_in_chunks_of_any_size(self, monkeypatch):
        logits = torch.cat([blobs(9, (14, 15)), torch.randn(4, 14, 15, generator=torch.Generator().manual_seed(0))])
        expected = plain(logits, (60, 80))
        for cells, values, pixels in [(1, 1, 1), (500, 1000, 5000), (1 << 20, 2000, 13 * 60 * 7)]:
            monkeypatch.setattr(mask_runs, "_CHUNK_CELLS", cells)
            monkeypatch.setattr(mask_runs, "_CHUNK_VALUES", values)
            monkeypatch.setattr(mask_runs, "_CHUNK_PIXELS", pixels)
            assert encode_mask_logits(logits, (60, 80)) == expected
            assert dense(logits, (60, 80)) == expected

    def test_of_no_mask(self):
        assert encode_mask_logits(torch.zeros(0, 9, 9), (50, 60)) == []
        assert dense(torch.zeros(0, 9, 9), (50, 60)) == []


NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.3, -7.0, 1e-45, -1e-45, 3e-39, 1e-30, -1e-30, 1e-26, 3e38, -3.4e38, 1e20, -1e20]
NUMBERS += [float("nan"), float("inf"), -float("inf")]


@holds(
    60,
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    padding=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)) | st.none(),
    numbers=st.data(),
)
def test_any_logits_give_the_masks_of_the_definition(height, width, size, padding, numbers):
    count = 3 * height * width
    cells = st.sampled_from(NUMBERS) | st.floats(-10, 10, width=32)
    logits = torch.tensor(numbers.draw(st.lists(cells, min_size=count, max_size=count))).view(3, height, width)
    valid_size = padding and (padding[0] * height, padding[1] * width)
    expected = plain(logits, size, valid_size)
    assert encode_mask_logits(logits, size, valid_size) == expected
    assert dense(logits, size, valid_size) == expected


def test_predicted_masks_are_those_of_the_definition(trained):
    model, processor, image, outputs = trained
    size = image.size[::-1]
    (expected,) = processor.post_process_instance_segmentation(outputs, 0.3, 0.0, [size], True)
    (found,) = predict(model, processor, image, threshold=0.3)
    assert len(found) > 3
    assert found.masks == expected["segmentation"]


def test_runs_are_compressed_as_by_pycocotools():
    random = np.random.default_rng(0)
    counts = [random.integers(0, 1 << random.integers(1, 30, size), size) for size in (1, 2, 3, 4, 5, 300)]
    first = np.cumsum([0, *map(len, counts)])
    text, offsets = compress_runs(np.concatenate(counts), first[:-1])
    for runs, start, end in zip(counts, offsets, offsets[1:], strict=False):
        rle = coco_mask.frPyObjects({"size": [1, int(runs.sum())], "counts": runs.tolist()}, 1, int(runs.sum()))
        assert text[start:end] == rle["counts"].decode()
        np.testing.assert_array_equal(decompress_runs(rle["counts"]), runs)
    assert offsets[-1] == len(text)
