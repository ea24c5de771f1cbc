"""Copy-paste keeps masks, boxes and areas equal to the visible pixels; the reference is pycocotools."""

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from transformers_rfdetr.data.copy_paste import CopyPaste
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.synthetic import draw_dataset

from properties import holds

CATEGORIES = [{"id": number, "name": name} for number, name in ((3, "roof"), (7, "tree"), (9, "car"))]


def rectangle(x: int, y: int, width: int, height: int) -> list[list[float]]:
    return [[float(v) for v in (x, y, x + width, y, x + width, y + height, x, y + height)]]


def rle_of(box: tuple[int, int, int, int], size: tuple[int, int]) -> dict:
    mask: np.ndarray = np.zeros(size, np.uint8, order="F")
    x, y, width, height = box
    mask[y : y + height, x : x + width] = 1
    return coco_mask.encode(mask)


def annotated(box, segmentation, category: int, **fields) -> dict:
    area = float(box[2] * box[3])
    given = {"bbox": [float(value) for value in box], "area": area, "segmentation": segmentation}
    return {"category_id": category, "iscrowd": 0, **given, **fields}


def dataset_of(
    annotations: list[list[dict]], size: tuple[int, int] = (20, 20), color: str = "white"
) -> InstanceDataset:
    """Return images of one color; category ids of the annotations are 3, 7 and 9."""
    images = [{"id": i, "height": size[0], "width": size[1]} for i in range(len(annotations))]
    listed = [{**one, "image_id": i} for i, items in enumerate(annotations) for one in items]
    coco = {"images": images, "annotations": listed, "categories": CATEGORIES}
    return InstanceDataset(coco, [Image.new("RGB", size[::-1], color)] * len(images))


def bitmap(annotation: dict, size: tuple[int, int]) -> np.ndarray:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    return coco_mask.decode(segmentation) > 0


class FixedRandom:
    """Paste one object at `top`, `left` at its own scale, without a flip."""

    def __init__(self, top: int, left: int) -> None:
        self.values = iter([0, 1, top, left])  # image, number of objects, position
        self.draws = iter([0.0, 0.9])  # whether to paste, whether to flip

    def random(self):
        return next(self.draws)

    def integers(self, *bounds, endpoint=False):
        return next(self.values)

    def uniform(self, low, high):
        return 1.0

    def permutation(self, count):
        return range(count)


def paste_square(annotations: list[dict], top: int, left: int) -> tuple[np.ndarray, list[dict]]:
    """Paste a white square of 6 x 6 pixels at (top, left) on a black image of 20 x 20."""
    dataset = dataset_of([[annotated((7, 7, 6, 6), rectangle(7, 7, 6, 6), 7)]])
    black = Image.new("RGB", (20, 20))
    # The region has a pixel of background around the object.
    image, result = CopyPaste(dataset)(black, annotations, FixedRandom(top - 1, left - 1))
    return np.asarray(image), result


def test_a_pasted_square_covers_a_quarter_of_another():
    square = annotated((2, 2, 6, 6), rectangle(2, 2, 6, 6), 0, id=4)
    pixels, [cut, pasted] = paste_square([square], 5, 5)
    assert (cut["id"], cut["category_id"], cut["bbox"], cut["area"]) == (4, 0, [2, 2, 6, 6], 27)
    expected = bitmap(square, (20, 20))
    expected[5:11, 5:11] = False
    np.testing.assert_array_equal(bitmap(cut, (20, 20)), expected)
    assert pasted["category_id"] == 1  # the label of category 7
    assert (pasted["bbox"], pasted["area"], pasted["iscrowd"]) == ([5, 5, 6, 6], 36, 0)
    np.testing.assert_array_equal(bitmap(pasted, (20, 20)), pixels[..., 0] > 0)
    assert (pixels[7:9, 7:9] > 250).all()  # opaque inside
    # At an edge, half of a Gaussian lies inside; at a corner a quarter.
    assert pixels[7, 5, 0] == pytest.approx(255 * 0.69, abs=6)  # half a pixel from the edge at a deviation of 1 pixel
    assert pixels[5, 5, 0] == pytest.approx(255 * 0.69**2, abs=8)
    assert square["segmentation"] == rectangle(2, 2, 6, 6)  # the input is not modified


@pytest.mark.parametrize(
    ("top", "left", "visible"),
    [(12, 12, 36), (3, 3, 11), (2, 3, None), (2, 2, None)],  # 11 of 36 pixels are visible, 6 of 36, none
)
def test_an_object_is_dropped_if_less_than_a_fifth_of_it_is_visible(top, left, visible):
    square = annotated((2, 2, 6, 6), rectangle(2, 2, 6, 6), 0)
    _, result = paste_square([square], top, left)
    assert [one["area"] for one in result] == [visible, 36][visible is None :]
    if visible == 36:
        assert result[0] is square  # as it was, a polygon


def test_crowds_and_boxes_without_masks_keep_their_place():
    crowd = annotated((0, 0, 20, 20), rle_of((0, 0, 20, 20), (20, 20)), 1, iscrowd=1)
    boxes = [annotated((0, 0, 9, 9), None, 0), annotated((5, 5, 6, 5), None, 0)]
    _, result = paste_square([crowd, *boxes], 5, 5)
    assert result[:2] == [crowd, boxes[0]]  # the second box is covered
    assert len(result) == 3


def test_only_complete_objects_with_masks_are_pasted():
    size, inside = (20, 20), (7, 7, 6, 6)
    annotations = [
        annotated(inside, rectangle(*inside), 3, iscrowd=1),
        annotated(inside, None, 3),
        annotated((0, 7, 6, 6), rectangle(0, 7, 6, 6), 3),
        annotated((14, 7, 6, 6), rle_of((14, 7, 6, 6), size), 3),
        annotated((7, 0, 6, 6), rle_of((7, 0, 6, 6), size), 3),
        annotated((7, 14, 6, 6), rectangle(7, 14, 6, 6), 3),
        annotated((7, 7, 1, 1), rle_of((7, 7, 1, 1), size), 3),  # 3 pixels with background: too small
        annotated((7, 7, 0, 0), [[7.0, 7.0, 7.0, 7.0, 7.0, 7.0]], 3),
    ]
    augmentation = CopyPaste(dataset_of([annotations]), probability=1.0, scale=(1.0, 1.0))
    black = Image.new("RGB", (20, 20))
    for seed in range(20):
        image, result = augmentation(black, [], np.random.default_rng(seed))
        assert image is black
        assert result == []


boxes = st.tuples(*[st.integers(1, 20)] * 2, *[st.integers(1, 12)] * 2)
objects = st.lists(st.tuples(boxes, st.sampled_from(["polygon", "rle", "crowd", "box"]), st.integers(0, 2)), max_size=5)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def annotations_of(drawn: list, size: tuple[int, int], categories: list[int]) -> list[dict]:
    result = []
    for number, ((x, y, width, height), kind, category) in enumerate(drawn, start=1):
        box = (min(x, size[1] - 1), min(y, size[0] - 1), width, height)
        segmentation = {"polygon": rectangle(*box), "box": None}.get(kind, rle_of(box, size))
        fields = {"id": number, "iscrowd": int(kind == "crowd")}
        result.append(annotated(box, segmentation, categories[category], **fields))
    return result


@holds(60, size=sizes, target=objects, source=objects, seed=st.integers(0, 1 << 32))
def test_masks_boxes_and_areas_are_those_of_the_visible_pixels(size, target, source, seed):
    source_size, complete = (34, 36), [((9, 9, 9, 7), "rle", 1)]
    dataset = dataset_of([annotations_of(source + complete, source_size, [3, 7, 9])], source_size)
    given = annotations_of(target, size, [0, 1, 2])
    black = Image.new("RGB", size[::-1])
    augmentation = CopyPaste(dataset, probability=1.0, min_visible=0.0)
    image, result = augmentation(black, given, np.random.default_rng(seed))
    assert image.size == black.size
    pasted = [one for one in result if "id" not in one]
    kept = {one["id"]: one for one in result if "id" in one}
    assert [one["id"] for one in result[: len(kept)]] == sorted(kept)  # the order of the others, then the pasted
    masks = [bitmap(one, size) for one in pasted]
    covered = np.any(masks, axis=0) if masks else np.zeros(size, bool)
    assert sum(mask.sum() for mask in masks) == covered.sum()  # pasted masks are disjoint
    np.testing.assert_array_equal((np.asarray(image) > 0).all(-1), covered)  # and are where white was drawn
    for one in pasted:
        assert (one["bbox"], one["area"]) == (
            coco_mask.toBbox(one["segmentation"]).tolist(),
            coco_mask.area(one["segmentation"]),
        )
        assert one["category_id"] in {category for _, kind, category in source + complete if kind in ("polygon", "rle")}
        assert one["iscrowd"] == 0
    for before in given:
        if before["iscrowd"] or before["segmentation"] is None:
            assert kept[before["id"]] is before
            continue
        visible = bitmap(before, size) & ~covered
        if visible.sum() == bitmap(before, size).sum():
            assert kept[before["id"]] is before
        elif not visible.any():
            assert before["id"] not in kept
        else:
            after = kept[before["id"]]
            np.testing.assert_array_equal(bitmap(after, size), visible)
            assert after["bbox"] == coco_mask.toBbox(after["segmentation"]).tolist()
            assert after["area"] == visible.sum()
            assert after["category_id"] == before["category_id"]


def test_the_objects_depend_only_on_the_generator():
    images, coco = draw_dataset(6)
    first, second = (CopyPaste(InstanceDataset(coco, images), probability=1.0) for _ in range(2))
    for seed in range(4):
        second(images[1], [], np.random.default_rng(99))  # nothing is remembered
        image, annotations = first(images[0], [], np.random.default_rng(seed))
        same_image, same_annotations = second(images[0], [], np.random.default_rng(seed))
        assert image.tobytes() == same_image.tobytes()
        assert annotations == same_annotations
    assert annotations != first(images[0], [], np.random.default_rng(9))[1]


def test_half_of_the_images_get_one_to_ten_objects_at_their_relative_size():
    box = (7, 7, 6, 6)
    dataset = dataset_of([[annotated(box, rectangle(*box), 3) for _ in range(10)]])
    augmentation, generator = CopyPaste(dataset, min_visible=0.0), np.random.default_rng(0)
    found = [augmentation(Image.new("RGB", (100, 100)), [], generator)[1] for _ in range(150)]
    counts = np.array([len(one) for one in found])
    assert abs((counts > 0).mean() - 0.5) < 4 * (0.25 / 150) ** 0.5  # four standard deviations
    assert {*counts.tolist()} == {*range(11)}
    sides = np.array([max(annotations[-1]["bbox"][2:]) for annotations in found if annotations])  # not covered
    assert 30 * 0.5 - 1 <= sides.min() <= 30 * 0.6  # 6 pixels of 20 are 30 of 100
    assert 30 * 1.4 <= sides.max() <= 30 * 1.5 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probability": 1.5}, r"probability.*got 1.5"),
        ({"min_visible": -1}, r"min_visible.*got -1"),
        ({"max_objects": 0}, r"max_objects.*got 0"),
        ({"scale": (2.0, 1.0)}, r"scale.*got \(2.0, 1.0\)"),
    ],
)
def test_invalid_settings_are_refused(arguments, message):
    dataset = dataset_of([[annotated((7, 7, 6, 6), rectangle(7, 7, 6, 6), 3)]])
    with pytest.raises(ValueError, match=message):
        CopyPaste(dataset, **arguments)


def test_a_dataset_without_masks_is_refused():
    crowd = annotated((7, 7, 6, 6), rectangle(7, 7, 6, 6), 3, iscrowd=1)
    with pytest.raises(ValueError, match=r"dataset.*with masks.*got '2 images without masks'"):
        CopyPaste(dataset_of([[annotated((7, 7, 6, 6), None, 3)], [crowd]]))
    with pytest.raises(ValueError, match=r"dataset.*InstanceDataset.*got 'list'"):
        CopyPaste([])
