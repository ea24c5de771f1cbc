"""Any input gives the result of a reference implementation, or a ValueError that explains why not.

Hypothesis draws the cases, the same in every run: 875 by default, ten times as many in the long run.
"""

import copy
import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor, predict
from transformers_rfdetr.data.checks.check import check_dataset
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.load import load_instance_dataset
from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.model.image_io import read_image
from transformers_rfdetr.model.masks import (
    box_and_area,
    rasterize,
    read_segmentation,
    region_to_rle,
    to_rle,
    upsample_masks,
)

from properties import holds, outcome
from small_models import small_config, small_model

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1.5, math.nan, math.inf, 10**30, "3", "x", "", [], [1], [[1]], {}, {"a": 1}]),
    st.recursive(st.integers(-2, 2) | st.text(max_size=2), lambda inner: st.lists(inner, max_size=2), max_leaves=4),
)


# -- segmentations ---------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(4, 24), st.integers(4, 24))
COORDINATES = st.one_of(st.floats(-40, 40, width=32), st.integers(-3, 30), st.sampled_from([-1e3, 1e3, 0.0, 24.0]))


@st.composite
def polygons(draw: Callable) -> list[list[float]]:
    """Draw one to three polygons of any area. The first point keeps them from being a bitmap of 0 and 1."""
    rows = draw(st.lists(st.lists(COORDINATES, max_size=10).map(lambda row: row[: len(row) // 2 * 2]), max_size=3))
    return [[2.5, 2.5, *rows[0]], *rows[1:]] if rows else []


@holds(60, shape=polygons(), size=SIZES, output=SIZES)
def test_polygons_cover_what_pycocotools_draws(shape, size, output):
    read, refused = outcome(read_segmentation, shape, size)
    rings = [row for row in shape if len(row) >= 6]
    if refused:  # a list of points instead of polygons
        assert not rings
        assert "polygon" in refused
        return
    if not rings:
        assert read is None
        return
    expected = coco_mask.merge(coco_mask.frPyObjects(rings, *size))
    assert to_rle(read, size)["counts"] == expected["counts"]
    assert box_and_area(read, size) == (coco_mask.toBbox(expected).tolist(), coco_mask.area(expected))
    scale = [output[1] / size[1], output[0] / size[0]]
    scaled = [[value * scale[i % 2] for i, value in enumerate(row)] for row in rings]
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, *output)))
    np.testing.assert_array_equal(rasterize([read], size, output)[0], drawn)


SPOILED = st.sampled_from([math.nan, math.inf, -math.inf, 1e7, -1e300, "12", None, [1, 2], {}, 1 + 2j])


@holds(50, shape=polygons().filter(bool), size=SIZES, value=SPOILED, place=st.integers(0, 9))
def test_an_invalid_coordinate_is_refused(shape, size, value, place):
    row = shape[place % len(shape)]
    row.insert(place % (len(row) + 1), value)
    row.append(0.5)  # an even count again: it is the value that is wrong
    assert "polygon" in outcome(read_segmentation, shape, size)[1]


@holds(20, shape=polygons().filter(bool), size=SIZES)
def test_an_odd_number_of_coordinates_is_refused(shape, size):
    shape[-1].append(1.5)
    assert "pairs" in outcome(read_segmentation, shape, size)[1]


@holds(30, value=JUNK | st.lists(JUNK, max_size=3) | st.dictionaries(st.sampled_from(["size", "counts"]), JUNK))
def test_an_invalid_segmentation_is_refused_or_empty(value):
    read, refused = outcome(read_segmentation, value, (5, 7))
    assert refused or read is None or set(read) == {"size", "counts"}


def runs_of(counts: str) -> list[int] | None:
    """Decode COCO's compressed runs by their definition (maskApi.c, rleFrString); None for an invalid string."""
    runs, place = [], 0
    while place < len(counts):
        value, bits, more = 0, 0, True
        while more:
            if place == len(counts) or not 48 <= ord(counts[place]) < 112:
                return None
            letter = ord(counts[place]) - 48
            value |= (letter & 31) << bits
            more, bits, place = bool(letter & 32), bits + 5, place + 1
        value -= (1 << bits) * bool(letter & 16)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


MASKS = SIZES.flatmap(lambda size: st.builds(lambda bits: drawn_mask(bits, size), st.integers(0, 2**64)))


def drawn_mask(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Return a mask of up to two rectangles, and noise in two of three cases."""
    rng = np.random.default_rng(seed)
    mask = rng.random(size) < rng.choice([0.0, 0.05, 0.5])
    for _ in range(seed % 3):
        (top, bottom), (left, right) = (np.sort(rng.integers(0, side + 1, 2)) for side in size)
        mask[top:bottom, left:right] = True
    return mask


@holds(30, mask=MASKS, form=st.sampled_from(["str", "bytes", "list", "array"]))
def test_rle_of_every_form_is_the_mask_that_was_encoded(mask, form):
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    text = rle["counts"].decode()
    forms = {"str": text, "bytes": rle["counts"], "list": runs_of(text), "array": np.array(runs_of(text))}
    read = read_segmentation({"size": list(mask.shape), "counts": forms[form]}, mask.shape)
    assert (read is None) == (not mask.any())
    if read is not None:
        np.testing.assert_array_equal(coco_mask.decode(read), mask)
        np.testing.assert_array_equal(rasterize([read], mask.shape, mask.shape)[0], mask)


@holds(60, mask=MASKS, place=st.integers(0, 40), letter=st.characters(codec="utf-8"), kind=st.integers(0, 2))
def test_damaged_rle_is_refused_unless_its_runs_still_fill_the_image(mask, place, letter, kind):
    text = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    place %= len(text)
    text = text[:place] + (letter if kind else "") + text[place + (kind < 2) :]  # removed, replaced or added
    read, refused = outcome(read_segmentation, {"size": list(mask.shape), "counts": text}, mask.shape)
    runs = runs_of(text)
    if not runs or min(runs) < 0 or sum(runs) != mask.size:
        assert "runs" in refused
        return
    pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape, order="F")
    assert refused is None
    np.testing.assert_array_equal(pixels if read is None else coco_mask.decode(read), pixels)
    assert (read is None) == (not pixels.any())


@holds(20, runs=st.lists(st.integers(-3, 70) | st.sampled_from([2**31, 2**63 - 20, -(2**63), 0.5])))
def test_uncompressed_runs_must_fill_the_image(runs):
    read, refused = outcome(read_segmentation, {"size": [6, 7], "counts": runs}, (6, 7))
    fit = all(type(run) is int and run >= 0 for run in runs) and sum(runs) == 42
    assert fit == (refused is None)
    if read:
        assert coco_mask.area(read) == sum(runs[1::2])


BITMAP_TYPES = st.sampled_from([bool, np.uint8, np.int64, np.float32, list])


@holds(40, mask=MASKS, kind=BITMAP_TYPES, high=st.sampled_from([1, 255, 2]), crop=st.integers(0, 1))
def test_bitmaps_are_read_unchanged(mask, kind, high, crop):
    high = 1 if kind is bool else high
    values = mask.astype(np.int64 if kind is list else kind) * (True if kind is bool else high)
    size = (mask.shape[0] + crop, mask.shape[1])
    read, refused = outcome(read_segmentation, values.tolist() if kind is list else values, size)
    if refused is None and crop and mask.any():
        # Rows of another size than that of the image are polygons, unless they have 8 bits or hold only 0, 1 and 255.
        assert kind not in (bool, np.uint8)
        assert high == 2
    elif refused is None:
        if isinstance(read, list):  # polygons of zeros: rows of another size than that of the image
            assert crop
            assert box_and_area(read, size)[1] == 0
        else:
            pixels = np.zeros(mask.shape) if read is None else coco_mask.decode(read)
            np.testing.assert_array_equal(pixels, mask)
    else:
        assert high == 2 or crop
        assert any(word in refused for word in ("bitmap", "pairs"))


@holds(
    40, mask=MASKS, top=st.integers(0, 5), left=st.integers(0, 5), more=st.tuples(st.integers(0, 4), st.integers(0, 4))
)
def test_a_region_is_encoded_as_pycocotools_encodes_the_image(mask, top, left, more):
    size = (top + mask.shape[0] + more[0], left + mask.shape[1] + more[1])
    image = np.zeros(size, np.uint8, order="F")
    image[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    expected = coco_mask.encode(image)
    assert region_to_rle(mask, top, left, size) == {"size": list(size), "counts": expected["counts"].decode()}


# Few values on small grids, so that pixels exactly at the threshold occur too.
LOGITS = st.lists(st.sampled_from([-8.0, -1.0, 0.0, 0.5, 3.0, 30.0]), min_size=24, max_size=24)


@holds(
    50,
    values=LOGITS,
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    threshold=st.sampled_from([-1.5, 0.0, 2.0]),
)
def test_masks_are_upsampled_as_by_torch(values, size, threshold):
    logits = torch.tensor(values).reshape(2, 3, 4)
    expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    # For a value within rounding of the threshold, either answer is right.
    clear = ((expected - threshold).abs() > 1e-5 * expected.abs().clamp(min=1)).numpy()
    for index, (region, top, left) in enumerate(upsample_masks(logits, size, threshold)):
        mask = np.zeros(size, bool)
        mask[top : top + region.shape[0], left : left + region.shape[1]] = region
        difference = mask != (expected[index] > threshold).numpy()
        assert not (difference & clear[index]).any()


# -- images ----------------------------------------------------------------------------------------------------------

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "F",
)
SIDES = st.integers(1, 40)


@functools.cache
def processor() -> RfDetrImageProcessor:
    return RfDetrImageProcessor(size=24)


def check_inputs(inputs: Any) -> None:
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_values"].isfinite().all()
    assert inputs["pixel_mask"].shape == (1, 24, 24)


@holds(40, mode=st.sampled_from(MODES), size=st.tuples(SIDES, SIDES), seed=st.integers(0, 99))
def test_images_of_every_mode_have_the_colors_of_pillow(mode, size, seed):
    noise = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))
    try:
        image = noise.convert(mode)
    except ValueError:  # Pillow converts only some modes to these
        image = noise.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, "L")).convert(mode) if mode != "LAB" else None
    if image is None:
        image = PIL.Image.new(mode, size[::-1])
    inputs, refused = outcome(processor(), image, return_tensors="pt")
    if mode == "F":
        assert "float pixels must be in" in refused or np.asarray(image).max() <= 1
        return
    assert refused is None
    check_inputs(inputs)
    if mode not in ("I", "I;16"):
        rgb = np.asarray((image.convert("LA") if mode == "La" else image).convert("RGB"), np.float32) / 255
        np.testing.assert_allclose(read_image(image, True, 1 / 255, None).permute(1, 2, 0), rgb, atol=1e-7)


ARRAY_TYPES = st.sampled_from(
    ["bool", "uint8", "int8", "uint16", "int64", "float16", "float64", ">i2", "complex64", "U2", "O"]
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 17]), max_size=4).map(tuple)
FILLS = st.sampled_from([0, 1, 0.5, 255, 256, -1, 70_000, math.nan, math.inf])


@holds(60, dtype=ARRAY_TYPES, shape=SHAPES | st.tuples(SIDES, SIDES, st.just(3)), fill=FILLS, as_tensor=st.booleans())
def test_arrays_of_every_type_are_scaled_by_their_range_or_refused(dtype, shape, fill, as_tensor):
    with np.errstate(all="ignore"):
        image = np.full(shape, 0 if dtype in ("U2", "O") or (not np.isfinite(fill) and dtype[0] in "ui>") else fill)
        image = image.astype(dtype)
    value = image.flat[0] if image.size else 0
    given_image = torch.from_numpy(image) if as_tensor and dtype not in (">i2", "U2", "O") else image
    inputs, refused = outcome(processor(), [given_image], return_tensors="pt")
    if refused is not None:
        assert refused.startswith("image 0: ")
        # An 8-bit image whose channels can only be the last axis is always read.
        assert dtype != "uint8" or not image.size or image.ndim != 3 or shape[2] != 3 or shape[0] in (1, 3, 4)
        return
    check_inputs(inputs)
    full = {"bool": 1, "uint16": 65535, "float16": 1, "float64": 1}.get(dtype, 255)
    read = read_image(given_image, True, 1 / 255, None)
    assert read.ndim == 3
    assert read.shape[0] == 3
    np.testing.assert_allclose(read, float(value) / full, rtol=1e-5)


@holds(
    20,
    size=JUNK
    | st.dictionaries(
        st.sampled_from(["height", "width", "shortest_edge", "longest_edge"]), st.integers(-1, 70) | JUNK
    ),
)
def test_a_processor_has_a_valid_size_or_is_refused(size):
    def width() -> int:
        inputs = RfDetrImageProcessor(size=size)(np.zeros((5, 7, 3), np.uint8), return_tensors="pt")
        return inputs["pixel_values"].shape[-1]

    read, refused = outcome(width)
    assert "size" in refused if read is None else read >= 1


NUMBERS = st.floats(-30, 60, width=32) | st.integers(-5, 60)
BOXES = st.lists(NUMBERS, min_size=4, max_size=4)
ANNOTATIONS = st.fixed_dictionaries(
    {"category_id": st.integers(0, 5), "bbox": BOXES},
    optional={
        "area": st.floats(0, 1e4),
        "iscrowd": st.sampled_from([0, 1]),
        "segmentation": polygons() | st.none(),
        "id": st.integers(1, 9) | JUNK,
    },
)


@holds(50, objects=st.lists(ANNOTATIONS, max_size=4), size=st.tuples(SIDES, SIDES), masks=st.booleans())
def test_labels_have_one_row_per_object(objects, size, masks):
    target = {"image_id": 1, "annotations": objects}
    arguments = {"return_segmentation_masks": masks, "return_tensors": "pt"}
    inputs, refused = outcome(processor(), PIL.Image.new("RGB", size[::-1]), target, **arguments)
    if refused is not None:
        assert "polygon" in refused or "bitmap" in refused
        return
    [labels] = inputs["labels"]
    kept = [labels[name] for name in ("class_labels", "boxes", "area", "iscrowd", *["masks"] * masks)]
    assert {len(part) for part in kept} == {len(labels["class_labels"])}
    low, extent = labels["boxes"][:, :2] - labels["boxes"][:, 2:] / 2, labels["boxes"][:, 2:]
    assert ((low > -1e-6) & (extent > 0) & (low + extent < 1 + 1e-6)).all()
    assert labels["area"].isfinite().all()
    if masks:
        has_pixels = labels["masks"].flatten(1).any(1)
        assert has_pixels.tolist() == labels.get("has_mask", torch.ones_like(has_pixels)).tolist()
        return
    expected = []
    for item in objects:
        x, y, width, height = item["bbox"]
        left, right = max(x, 0), min(x + width, size[1])
        top, bottom = max(y, 0), min(y + height, size[0])
        if right > left and bottom > top and not item.get("iscrowd"):
            expected.append((item["category_id"], (left + right) / 2 / size[1], (top + bottom) / 2 / size[0]))
    assert labels["class_labels"].tolist() == [label for label, *_ in expected]
    np.testing.assert_allclose(labels["boxes"][:, :2], np.array(expected).reshape(-1, 3)[:, 1:], atol=1e-5)


FIELDS = st.sampled_from(
    ["category_id", "bbox", "area", "iscrowd", "segmentation", "id", "image_id", "width", "height"]
)


def with_junk(target: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    target = copy.deepcopy(target)
    place = target if field in ("image_id", "width", "height") else target["annotations"][0]
    place[field] = value
    return target


@holds(60, field=FIELDS, value=JUNK, masks=st.booleans())
def test_an_invalid_field_is_refused_with_its_name_or_ignored(field, value, masks):
    box = {"category_id": 1, "bbox": [1, 1, 3, 3], "segmentation": [[1, 1, 4, 1, 4, 4]]}
    target = with_junk({"image_id": 1, "annotations": [box]}, field, value)
    inputs, refused = outcome(processor(), np.zeros((6, 6, 3), np.uint8), target, return_segmentation_masks=masks)
    if refused is not None:
        assert field in refused
        return
    [labels] = inputs["labels"]
    assert len(labels["class_labels"]) == len(labels["boxes"]) <= 1
    assert labels["boxes"].isfinite().all()
    assert labels["area"].isfinite().all()


@holds(30, field=FIELDS, value=JUNK)
def test_a_dataset_is_read_or_refused(field, value):
    image = {"id": 1, "file_name": "a.png", "width": 6, "height": 6}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "segmentation": [[1, 1, 4, 1, 4, 4]]}
    (image if field in ("width", "height") else box)[field] = value
    coco = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "roof"}]}

    def read() -> tuple[dict, dict]:
        dataset = InstanceDataset(coco, [PIL.Image.new("RGB", (6, 6))])
        return dataset[0], dataset.coco()

    found, refused = outcome(read)
    if refused is None:
        sample, written = found
        assert [item["category_id"] for item in sample["annotations"]] == [0]
        assert [item["category_id"] for item in written["annotations"]] == [1]
        json.dumps(written, allow_nan=False)


FIELDS_OF = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd"),
    "categories": ("id", "name", "supercategory"),
}
PLACES = [(part, name) for part, names in FIELDS_OF.items() for name in names]
NEAR = st.sampled_from([10**400, "1", 1.0, 2**63 - 1, [1, 1, 3, 3], [-2, 1, 9, 3], "b.png", "../a.png", 6, 8])
FAULTS = st.lists(st.tuples(st.sampled_from(PLACES), st.integers(0, 1), st.one_of(JUNK, NEAR)), max_size=3)
FILE_SIZES = st.sampled_from([(6, 8), (8, 6), (12, 16), (5, 5)])


@holds(40, faults=FAULTS, orientation=st.integers(1, 8), kind=st.sampled_from(["jpg", "tif"]), size=FILE_SIZES)
def test_a_repaired_copy_has_no_error_can_be_read_and_repeats_itself(faults, orientation, kind, size):
    """`size` is the stored size of the first image. The annotation file gives that of the second one for both."""
    wide = {"bbox": [1, 1, 7, 3], "segmentation": [[1, 1, 8, 1, 8, 4]], "area": 10, "iscrowd": 0}
    names = (f"a.{kind}", "b.png")
    coco: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": n, "file_name": name, "height": 6, "width": 8} for n, name in enumerate(names, 1)],
        "annotations": [{"id": n, "image_id": n, "category_id": n, **wide} for n in (1, 2)],
        "categories": [{"id": n, "name": name, "supercategory": "none"} for n, name in ((1, "roof"), (2, "tree"))],
    }
    for (part, name), index, value in faults:
        coco[part][index][name] = value
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    with tempfile.TemporaryDirectory() as folder:
        source, fixed, again = (Path(folder, name) for name in ("source", "fixed", "again"))
        source.mkdir()
        (source / "train.json").write_text(json.dumps(coco))
        PIL.Image.new("RGB", size[::-1], "red").save(source / f"a.{kind}", exif=exif)
        PIL.Image.new("RGB", (8, 6), "blue").save(source / "b.png")
        before = {path: path.read_bytes() for path in source.iterdir()}
        report, refused = outcome(check_dataset, source / "train.json", fix=fixed, workers=1)
        assert {path: path.read_bytes() for path in source.iterdir()} == before
        if refused is not None:
            assert "usable category" in refused
            assert not fixed.exists()
            return
        if report.count("nothing_repaired"):  # no image can be copied
            assert not fixed.exists()
            return
        assert not check_dataset(fixed, fix=again, workers=1).has_errors
        written = [json.loads((copied / "train" / "_annotations.coco.json").read_text()) for copied in (fixed, again)]
        assert written[0] == written[1]
        for sample in load_instance_dataset(fixed)["train"]:
            target = {"image_id": sample["image_id"], "annotations": sample["annotations"]}
            processor()(sample["image"], target, return_segmentation_masks=True)


# -- results ---------------------------------------------------------------------------------------------------------

SCORES = st.sampled_from([0.0, 0.3, 0.5, 0.999])
WILD = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -3.0])


def wild_outputs(seed: int, spoiled: list[tuple[int, float]], height: int = 5, width: int = 6) -> Any:
    """Return logits, boxes and mask logits of one image, four queries and three classes, with some unusual values."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(1, 4, *rest, generator=generator) for rest in ((3,), (4,), (height, width))]
    parts[1] = parts[1].abs()
    for place, value in spoiled:
        flat = parts[place % 3].view(-1)
        flat[place % len(flat)] = value
    return SimpleNamespace(logits=3 * parts[0], pred_boxes=parts[1], pred_masks=4 * parts[2])


@holds(
    60,
    seed=st.integers(0, 2**30),
    spoiled=st.lists(st.tuples(st.integers(0, 10**4), WILD), max_size=4),
    threshold=SCORES,
    size=st.tuples(SIDES, SIDES),
    top_k=st.none() | st.integers(1, 20),
)
def test_boxes_masks_labels_and_scores_have_one_row_per_instance(seed, spoiled, threshold, size, top_k):
    outputs = wild_outputs(seed, spoiled)
    arguments = {"threshold": threshold, "target_sizes": [size], "top_k": top_k}
    [found] = processor().post_process_object_detection(outputs, **arguments)
    pairs = []
    for query in range(4):
        if outputs.pred_boxes[0, query].isfinite().all():
            scores = outputs.logits[0, query].sigmoid().tolist()
            pairs += [(-score, 3 * query + label) for label, score in enumerate(scores) if score > threshold]
    expected = sorted(pairs)[: 4 if top_k is None else top_k]
    np.testing.assert_allclose(found["scores"], [-score for score, _ in expected], rtol=1e-6)
    assert found["labels"].tolist() == [pair % 3 for _, pair in expected]
    limits = torch.tensor([size[1], size[0]] * 2)
    assert found["boxes"].isfinite().all()
    assert ((found["boxes"] >= 0) & (found["boxes"] <= limits)).all()
    assert (found["boxes"][:, 2:] >= found["boxes"][:, :2]).all()

    forms = ({}, {"return_coco_annotation": True}, {"return_binary_maps": True})
    results = [processor().post_process_instance_segmentation(outputs, **arguments, **form)[0] for form in forms]
    segments = results[0]["segments_info"]
    assert all(result["segments_info"] == segments for result in results)
    assert [segment["label_id"] for segment in segments] == found["labels"].tolist()
    assert [segment["box"] for segment in segments] == found["boxes"].tolist()
    assert [segment["id"] for segment in segments] == list(range(1, len(segments) + 1))
    label_map, rles, maps = (result["segmentation"] for result in results)
    assert (len(rles), maps.shape) == (len(segments), (len(segments), *size))
    for segment, rle, dense in zip(segments, rles, maps, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(rle), dense)
        assert segment["area"] == coco_mask.area(rle) == dense.sum()
        assert segment["visible_area"] == (label_map == segment["id"]).sum()


@holds(20, sizes=JUNK | st.lists(JUNK | st.tuples(st.integers(-1, 3), st.integers(-1, 3)), max_size=2), top_k=JUNK)
def test_invalid_sizes_and_counts_are_refused(sizes, top_k):
    outputs = wild_outputs(0, [])
    good_size = sizes is None or (
        isinstance(sizes, list)
        and len(sizes) == 1
        and isinstance(sizes[0], list | tuple)
        and len(sizes[0]) == 2
        and all(type(side) is int and side >= 1 for side in sizes[0])
    )
    _, refused = outcome(processor().post_process_object_detection, outputs, target_sizes=sizes)
    assert good_size == (refused is None)
    _, refused = outcome(processor().post_process_object_detection, outputs, top_k=top_k)
    assert (refused is None) == (top_k is None or (type(top_k) is int and 0 < top_k < 2**63))


@functools.cache
def model() -> Any:
    return small_model()


@holds(25, size=st.tuples(SIDES, SIDES), threshold=SCORES, top_k=st.none() | st.integers(1, 9), seed=st.integers(0, 9))
def test_predictions_survive_every_conversion_unchanged(size, threshold, top_k, seed):
    image = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))
    found = predict(model(), RfDetrImageProcessor(size=48), image, threshold=threshold, top_k=top_k)[0]
    assert found.image_size == size
    assert {len(part) for part in (found.boxes, found.scores, found.labels, found.names, found.masks)} == {len(found)}
    assert len(found) <= (top_k or 6)
    assert (found.scores > threshold).all()
    assert [model().config.id2label[label] for label in found.labels] == found.names
    assert found.dense_masks().shape == (len(found), *size)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    again = Instances.from_dict(stored)
    assert again.to_dict() == stored == found.to_dict()
    order = np.random.default_rng(seed).permutation(len(found))
    some = found.select(order[: seed % (len(found) + 1)])
    for row, index in enumerate(order[: len(some)]):
        one, whole = some.to_dict()["instances"][row], stored["instances"][index]
        assert one == whole


# -- configurations --------------------------------------------------------------------------------------------------

FIELDS_TOP = {
    "num_queries": st.integers(1, 40),
    "group_detr": st.integers(1, 3),
    "decoder_layers": st.integers(1, 3),
    "decoder_ffn_dim": st.integers(1, 9),
    "decoder_n_points": st.integers(1, 3),
    "d_model": st.sampled_from([4, 8, 12, 20]),
    "decoder_self_attention_heads": st.sampled_from([1, 2, 4]),
    "decoder_cross_attention_heads": st.sampled_from([1, 2, 4]),
    "projector_scale": st.sampled_from([["P4"], ["P3"], ["P5"], ["P3", "P5"], ["P3", "P4", "P5"]]),
    "mask_downsample_ratio": st.integers(1, 30),
    "num_labels": st.integers(1, 5),
}
BACKBONE = {
    "hidden_size": st.sampled_from([1, 2, 6, 8]),
    "num_attention_heads": st.sampled_from([1, 2]),
    "patch_size": st.sampled_from([1, 2, 4, 12]),
    "num_windows": st.integers(1, 3),
    "num_register_tokens": st.integers(0, 2),
    "image_size": st.sampled_from([12, 24, [12, 24]]),
    "out_indices": st.sampled_from([[1], [1, 2], [0, 4], [2, 3, 4]]),
}
UNUSUAL = [
    *("auxiliary_loss", "backbone_config", "class_cost", "dropout", "dtype", "focal_alpha", "giou_loss_coefficient"),
    *("id2label", "label2id", "layer_norm_eps", "mask_point_sample_ratio", "per_layer_config", "resolution", "to_dict"),
]
UNUSUAL_BACKBONE = [
    *("drop_path_rate", "initializer_range", "layerscale_value", "mlp_ratio", "num_hidden_layers", "num_labels"),
    *("out_features", "stage_names", "_out_indices"),
]


def check_forward(config: Any) -> None:
    torch.manual_seed(0)
    network = RfDetrForInstanceSegmentation(config).eval()
    sides = (config.resolution,) * 2 if isinstance(config.resolution, int) else config.resolution
    with torch.no_grad():
        outputs = network(torch.rand(1, 3, *sides, generator=torch.Generator().manual_seed(0)))
    assert outputs.logits.shape == (1, config.num_queries, config.num_labels)
    assert outputs.pred_boxes.shape == (1, config.num_queries, 4)
    ratio = config.mask_downsample_ratio
    assert outputs.pred_masks.shape == (1, config.num_queries, sides[0] // ratio, sides[1] // ratio)
    assert all(part.isfinite().all() for part in (outputs.logits, outputs.pred_boxes, outputs.pred_masks))


@holds(30, top=st.fixed_dictionaries({}, optional=FIELDS_TOP), backbone=st.fixed_dictionaries({}, optional=BACKBONE))
def test_a_configuration_is_refused_or_its_model_runs(top, backbone):
    config, refused = outcome(small_config, backbone_config=backbone, **top)
    assert config is None or refused is None
    if refused is None:
        check_forward(config)


@holds(50, field=st.sampled_from([*FIELDS_TOP, *UNUSUAL]), value=JUNK)
def test_a_configuration_with_one_unusual_value_is_refused_or_its_model_runs(field, value):
    config, refused = outcome(small_config, **{field: value if field != "backbone_config" else {"image_size": value}})
    if refused is None:
        check_forward(config)


@holds(30, field=st.sampled_from([*BACKBONE, *UNUSUAL_BACKBONE]), value=JUNK)
def test_a_backbone_with_one_unusual_value_is_refused_or_its_model_runs(field, value):
    config, refused = outcome(small_config, backbone_config={field: value})
    if refused is None:
        check_forward(config)
