"""Predicting large images in tiles."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from transformers_rfdetr import (
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    compile_for_inference,
    load,
    predict,
)
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.inference.tile_merging import Tile, merge_tiles
from transformers_rfdetr.inference.tiling import cut_tiles, predict_tiled
from transformers_rfdetr.model.masks import region_to_rle

from small_models import small_model

SEGMENTATION, DETECTION = RfDetrForInstanceSegmentation, RfDetrForObjectDetection

# -- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "overlap", "starts"),
    [
        (3, 0.25, [0]),
        (4, 0.25, [0]),
        (5, 0.25, [0, 1]),
        (10, 0.25, [0, 3, 6]),
        (10, 0.5, [0, 2, 4, 6]),
        (10, 0.0, [0, 3, 6]),  # three tiles of 4 cover 12: what is too much is spread
        (12, 0.0, [0, 4, 8]),
        (11, 0.25, [0, 2, 5, 7]),
    ],
)
def test_tiles_are_evenly_spaced_and_the_last_one_ends_at_the_edge(length, overlap, starts):
    side = min(length, 4)
    assert cut_tiles((length, 3), (4, 4), overlap) == [Tile(start, 0, side, 3) for start in starts]
    assert cut_tiles((3, length), (4, 4), overlap) == [Tile(0, start, 3, side) for start in starts]


@pytest.mark.parametrize("overlap", [0.0, 0.13, 0.2, 0.5])
def test_tiles_cover_the_image_and_have_at_least_the_given_overlap(overlap):
    for length in [*range(300, 700, 7), 4000]:
        lefts = np.array([tile.left for tile in cut_tiles((10, length), (312, 312), overlap)])
        assert lefts[0] == 0
        assert lefts[-1] == max(0, length - 312)
        assert (312 - np.diff(lefts) >= overlap * 312).all()
        assert (np.diff(lefts) > 0).all()


def test_tiles_are_ordered_row_by_row():
    tiles = cut_tiles((5, 6), (4, 4), 0.5)
    assert tiles == [Tile(0, 0, 4, 4), Tile(0, 2, 4, 4), Tile(1, 0, 4, 4), Tile(1, 2, 4, 4)]


# -- with a model ----------------------------------------------------------------------------------------------------


def model_and_processor(kind=SEGMENTATION):
    """A small model for 48 pixels whose scores lie around a half."""
    model = small_model(kind)
    with torch.no_grad():
        model.class_embed.bias.add_(4.0)
    return model, RfDetrImageProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def photo():
    return draw_scene(seed=1)[0].resize((120, 100))


def same(found, expected, atol=1e-4):
    np.testing.assert_allclose(found.scores, expected.scores, atol=atol)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=100 * atol)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.names == expected.names
    assert found.image_size == expected.image_size
    assert (found.masks is None) == (expected.masks is None)
    assert (found.dense_masks() != expected.dense_masks()).mean() < 1e-3 if found.masks else True


@pytest.mark.parametrize("kind", [SEGMENTATION, DETECTION])
def test_an_image_of_one_tile_has_the_instances_of_predict(kind, photo):
    model, processor = model_and_processor(kind)
    small = photo.resize((48, 48))
    [expected] = predict(model, processor, small, threshold=0.0)
    found = predict_tiled(model, processor, small, threshold=0.0)
    assert len(found) == 6
    assert found.boxes.tolist() == expected.boxes.tolist()
    assert found.masks == expected.masks
    same(found, expected, atol=0)


@pytest.mark.parametrize("kind", [SEGMENTATION, DETECTION])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_instances_of_a_large_image_are_those_of_its_tiles_merged(kind, batch_size, photo):
    model, processor = model_and_processor(kind)
    tiles = cut_tiles((100, 120), (48, 48), 0.25)
    assert len(tiles) == 3 * 3
    crops = [photo.crop((t.left, t.top, t.left + 48, t.top + 48)) for t in tiles]
    found = predict(model, processor, crops, threshold=0.1)
    expected = merge_tiles(list(zip(tiles, found, strict=True)), (100, 120), 0.4)
    found = predict_tiled(model, processor, photo, overlap=0.25, threshold=0.4, batch_size=batch_size)
    assert len(expected) > 0
    same(found, expected)


def test_the_tile_size_is_the_input_size_of_the_model(photo, monkeypatch):
    model, processor = model_and_processor()
    sizes = []
    stage = model.predict_stage
    monkeypatch.setattr(model, "predict_stage", lambda pixels, mask: sizes.append(pixels.shape) or stage(pixels, mask))
    predict_tiled(model, processor, photo, tile=(72, 96), overlap=0)
    assert sizes == [(4, 3, 72, 96)]
    assert processor.size == {"height": 48, "width": 48}


def test_an_illegal_tile_size_is_rounded_up_with_a_warning(photo, hf_log):
    model, processor = model_and_processor()
    expected = predict_tiled(model, processor, photo, tile=(72, 48), threshold=0.4)
    same(predict_tiled(model, processor, photo, tile=(50, 48), threshold=0.4), expected)
    assert re.search(r"tile.*\(50, 48\).*\(72, 48\).*24", hf_log.text)


def test_tiles_are_cut_one_batch_at_a_time(photo, monkeypatch):
    model, processor = model_and_processor()
    sizes = []
    stage = model.predict_stage
    monkeypatch.setattr(model, "predict_stage", lambda pixels, mask: sizes.append(len(pixels)) or stage(pixels, mask))
    predict_tiled(model, processor, photo, overlap=0.25, batch_size=4, threshold=0.9)
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize("with_masks", [True, False])
def test_an_image_smaller_than_a_tile_is_padded_with_the_mean_and_results_are_clipped(with_masks, photo, monkeypatch):
    def find(model, processor, crops, **_):
        cut.extend(crops)
        masks = np.zeros((4, 48, 48), bool)
        masks[0, 20:45, 20:40] = masks[1, 2:9, 3:7] = masks[2, :, 30:] = masks[3, 41:, :] = True
        boxes = np.array([[20.5, 20, 40, 45], [3, 2, 7, 9], [30, 0, 48, 48], [0, 41, 48, 48]], np.float32)
        rles = [region_to_rle(mask, 0, 0, (48, 48)) for mask in masks] if with_masks else None
        scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
        return [Instances(boxes, scores, np.arange(4), list("abcd"), rles, (48, 48))]

    cut = []
    model, processor = model_and_processor()
    small = photo.resize((30, 41))
    monkeypatch.setattr("transformers_rfdetr.inference.tiling.predict", find)
    found = predict_tiled(model, processor, small)
    assert found.image_size == (41, 30)
    assert found.names == ["a", "b"]
    assert found.boxes.tolist() == [[20.5, 20, 30, 41], [3, 2, 7, 9]]
    if with_masks:
        expected = np.zeros((2, 41, 30), bool)
        expected[0, 20:41, 20:30] = expected[1, 2:9, 3:7] = True
        np.testing.assert_array_equal(found.dense_masks(), expected)
    filled = np.broadcast_to(np.array([0.485, 0.456, 0.406])[:, None, None], (3, 48, 48)).copy()
    filled[:, :41, :30] = np.asarray(small).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(cut[0].numpy(), filled, atol=1e-6)


def test_all_forms_of_an_image_give_the_same_instances(photo, tmp_path):
    model, processor = model_and_processor()
    photo.save(tmp_path / "image.png")
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    array = np.asarray(photo)
    forms = [
        tmp_path / "image.png",
        str(tmp_path / "turned.png"),
        array,
        array[::-1, ::-1].copy()[::-1, ::-1],
        array.astype(np.float32) / 255,
        array.astype(np.uint16) * 257,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]
    expected = predict_tiled(model, processor, photo, threshold=0.4)
    assert len(expected) > 3
    for form in forms:
        same(predict_tiled(model, processor, form, threshold=0.4), expected)


def test_an_image_with_16_bits_is_not_reduced_to_8(tmp_path):
    values = np.random.default_rng(0).integers(0, 500, (70, 90)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    model, processor = model_and_processor()
    same(
        predict_tiled(model, processor, tmp_path / "deep.png", threshold=0.0),
        predict_tiled(model, processor, values / np.float32(65535), threshold=0.0),
    )


def test_a_narrow_image_is_not_taken_for_channels():
    model, processor = model_and_processor()
    narrow = np.random.default_rng(0).integers(0, 256, (60, 3, 3), np.uint8)
    assert predict_tiled(model, processor, Image.fromarray(narrow), threshold=0.0).image_size == (60, 3)


def test_a_model_compiled_for_the_tile_size_finds_the_same_instances(photo):
    model, processor = model_and_processor()
    fast = compile_for_inference(model, batch_size=2, compiled=False)
    expected = predict_tiled(model, processor, photo, threshold=0.4)
    same(predict_tiled(fast, processor, photo, threshold=0.4), expected)
    assert predict_tiled(fast, processor, photo.resize((30, 30)), threshold=0.4).image_size == (30, 30)


def test_only_the_given_classes_are_predicted(photo):
    model, processor = model_and_processor()
    names = set(predict_tiled(model, processor, photo, threshold=0.4).names)
    assert len(names) > 1
    name = min(names)
    assert set(predict_tiled(model, processor, photo, threshold=0.4, classes=[name]).names) == {name}


def test_a_progress_bar_is_shown_on_request(photo, capsys):
    model, processor = model_and_processor()
    predict_tiled(model, processor, photo, threshold=0.9)
    assert "Tiles" not in capsys.readouterr().err
    predict_tiled(model, processor, photo, threshold=0.9, progress=True)
    assert "Tiles: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 0.6}, r"overlap.*\[0, 0\.5\], got 0\.6"),
        ({"overlap": -0.1}, r"overlap.*\[0, 0\.5\], got -0\.1"),
        ({"overlap": float("nan")}, r"overlap.*\[0, 0\.5\], got nan"),
        ({"batch_size": 0}, "batch_size.* got 0"),
        ({"threshold": 2}, r"threshold.*\[0, 1\], got 2"),
        ({"tile": "large"}, "tile.*'large'"),
        ({"tile": (48, 0)}, r"tile.*\(48, 0\)"),
        ({"image": "missing.png"}, r"missing\.png cannot be opened as an image"),
        ({"image": [1, 2]}, "image.*list"),
        ({"image": np.zeros((0, 9, 3), np.uint8)}, r"pixel.*got shape \(0, 9, 3\)"),
        ({"image": np.full((60, 60, 3), 7.0)}, r"pixels.*\[7, 7\]"),
    ],
)
def test_invalid_arguments_are_refused(settings, message, photo):
    model, processor = model_and_processor()
    with pytest.raises(ValueError, match=message):
        predict_tiled(model, processor, **({"image": photo} | settings))


# -- at full size ----------------------------------------------------------------------------------------------------

MEMORY = """
import json, re
from pathlib import Path
import numpy as np
import torch
from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor, predict
from transformers_rfdetr.inference.tiling import predict_tiled

def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.manual_seed(0)
model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano")).eval()
processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
loaded = memory("VmRSS")
image = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8)
scores = predict(model, processor, image[:312, :312], threshold=0.0)[0].scores
found = predict_tiled(model, processor, image, threshold=float(scores[12]))
print(json.dumps({"MiB": memory("VmHWM") - loaded, "found": len(found)}))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux")
def test_an_image_of_12_megapixels_needs_less_than_500_mib_besides_the_model():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    numbers = json.loads(re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)[0])
    assert numbers["found"] > 100
    assert numbers["MiB"] < 500


def recall_and_precision(found, annotations):
    """Of objects and of instances the part with a partner of IoU 0.5, over all images."""
    hits = [0, 0, 0, 0]
    for instances, objects in zip(found, annotations, strict=True):
        size = instances.image_size
        truth = []
        for item in objects:
            shape = item["segmentation"]
            polygons = isinstance(shape, list)
            truth.append(coco_mask.merge(coco_mask.frPyObjects(shape, *size)) if polygons else shape)
        overlaps = np.zeros((len(truth), len(instances)))
        if truth and len(instances):
            overlaps = np.array(coco_mask.iou(truth, instances.masks, [0] * len(instances)))
        hits[0] += (overlaps > 0.5).any(1).sum()
        hits[1] += len(truth)
        hits[2] += (overlaps > 0.5).any(0).sum()
        hits[3] += len(instances)
    return hits[0] / hits[1], hits[2] / max(1, hits[3])


@pytest.mark.long
def test_recall_in_tiles_is_that_of_images_of_the_size_of_a_tile():
    model, processor = load("rf-detr-seg-tiny")

    def images_and_truth(first_seed, count, size):
        scenes = [draw_scene(first_seed + 10 * index, size, metres_per_pixel=0.2) for index in range(count)]
        return [image for image, _ in scenes], [annotations for _, annotations in scenes]

    small, small_truth = images_and_truth(2_000_000, 40, (144, 144))
    large, large_truth = images_and_truth(3_000_000, 4, (420, 500))
    recall, precision = recall_and_precision(predict(model, processor, small, threshold=0.4), small_truth)
    tiled = [predict_tiled(model, processor, image, overlap=0.3, threshold=0.4) for image in large]
    tiled_recall, tiled_precision = recall_and_precision(tiled, large_truth)
    untiled_recall, _ = recall_and_precision(predict(model, processor, large, threshold=0.4), large_truth)
    assert recall > 0.6
    assert tiled_recall >= recall - 0.15  # a building may be nearly as large as a tile
    assert tiled_recall > untiled_recall + 0.2
    assert tiled_precision >= precision - 0.15
