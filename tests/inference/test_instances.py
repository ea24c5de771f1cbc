"""Instances and their conversions, compared with supervision, pycocotools and masks made by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from transformers_rfdetr import load, predict
from transformers_rfdetr.data.drawing import color_of, draw_annotations, draw_grid, draw_instances
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.inference.instances import Instances

SIZE = (60, 80)
EMBEDDINGS = (np.arange(6, dtype=np.float32).reshape(3, 2) / 7, np.array([0.1, -3], np.float32))


def bitmaps() -> np.ndarray:
    """A square, an L of two parts, and nothing."""
    masks = np.zeros((3, *SIZE), bool)
    masks[0, 10:30, 5:25] = True
    masks[1, 40:50, 30:70] = masks[1, 20:50, 60:70] = True
    return masks


def found(tracked: bool = False, masks: bool = True) -> Instances:
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in bitmaps()]
    return Instances(
        np.array([[5, 10, 25, 30], [30, 20, 70, 50], [1.5, 2.5, 3.5, 9.5]], np.float32),
        np.array([0.9, 0.75, 0.5], np.float32),
        np.array([2, 0, 2]),
        ["dog", "cat", "dog"],
        [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles] if masks else None,
        SIZE,
        np.array([4, 7, -1]) if tracked else None,
        np.array([30, 10, 30]) if tracked else None,
        *(EMBEDDINGS if tracked else ()),
    )


def equal(one: Instances, other: Instances) -> bool:
    assert (one.names, one.masks, one.image_size) == (other.names, other.masks, other.image_size)
    for name in ("boxes", "scores", "labels", "track_ids", "category_ids", "embeddings", "image_embedding"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None and theirs is None) or (mine.dtype == theirs.dtype and (mine == theirs).all())
    return True


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_instances_survive_a_round_trip_through_json(tracked: bool, masks: bool):
    instances = found(tracked, masks)
    assert equal(Instances.from_dict(json.loads(json.dumps(instances.to_dict()))), instances)


@pytest.mark.parametrize("chosen", [[2, 0], np.array([True, False, True]), np.array([1]), [0, 1, 2]])
def test_select_applies_to_all_fields(chosen):
    instances = found(tracked=True)
    some = instances.select(chosen)
    numbers = np.arange(3)[np.asarray(chosen)]
    assert some.scores.tolist() == instances.scores[numbers].tolist()
    assert some.names == [instances.names[number] for number in numbers]
    assert (some.dense_masks() == bitmaps()[numbers]).all()
    assert (some.boxes == instances.boxes[numbers]).all()
    assert some.track_ids.tolist() == instances.track_ids[numbers].tolist()
    assert some.category_ids.tolist() == instances.category_ids[numbers].tolist()
    assert some.embeddings.tolist() == instances.embeddings[numbers].tolist()
    assert some.image_embedding.tolist() == instances.image_embedding.tolist()


def test_printed_instances_have_their_names_and_scores_but_no_masks():
    assert repr(found()) == "<Instances: 3: dog 0.90, cat 0.75, dog 0.50>"
    assert repr(found().select([0] * 11)).endswith("dog 0.90, ...>")
    assert repr(found().select([])) == "<Instances: 0>"


def test_all_conversions_accept_zero_instances():
    none = found(tracked=True).select([])
    assert len(none) == 0
    assert none.dense_masks().shape == (0, *SIZE)
    assert none.to_coco(1) == none.polygons() == none.crops(Image.new("RGB", SIZE[::-1])) == []
    stored = none.to_dict()
    assert stored == {"image_size": [60, 80], "instances": [], "image_embedding": EMBEDDINGS[1].tolist()}
    assert Instances.from_dict(stored).embeddings.shape == (0, 2)
    assert len(none.to_supervision()) == 0


def test_supervision_reads_the_segmentation_of_the_image_processor():
    supervision = pytest.importorskip("supervision")
    model, processor = load("rf-detr-seg-tiny")
    image, _ = draw_scene(2_000_000, (144, 144), metres_per_pixel=0.2)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    [result] = processor.post_process_instance_segmentation(outputs, target_sizes=[(144, 144)])
    found = supervision.Detections.from_transformers(result, model.config.id2label)
    [expected] = predict(model, processor, image)
    assert found.data["class_name"].tolist() == expected.names
    assert found.confidence == pytest.approx(expected.scores, abs=1e-5)
    visible = expected.dense_masks() & ~(np.cumsum(expected.dense_masks(), axis=0) > 1)  # the best is on top
    np.testing.assert_array_equal(found.mask, visible)


def test_supervision_can_draw_its_detections():
    supervision = pytest.importorskip("supervision")
    detections = found(tracked=True).to_supervision()
    assert detections["class_name"].tolist() == ["dog", "cat", "dog"]
    assert detections.tracker_id.tolist() == [4, 7, -1]
    image = np.full((*SIZE, 3), 100, np.uint8)
    drawn = supervision.MaskAnnotator().annotate(image.copy(), detections)
    assert ((drawn != image).any(-1) == bitmaps().any(0)).all()
    assert supervision.BoxAnnotator().annotate(image.copy(), found(masks=False).to_supervision()).any()


def test_the_outline_of_a_square_is_its_corners():
    [square], [_], nothing = found().polygons()
    assert sorted(map(tuple, square.tolist())) == [(5, 10), (5, 30), (25, 10), (25, 30)]
    assert nothing == []


def test_outlines_need_no_other_library_and_have_no_holes(monkeypatch):
    for name in ("supervision", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    instances = found().select([0])
    mask = bitmaps()[0]
    mask[12:15, 7:9] = False
    mask[35, 50] = True
    instances.masks = [coco_mask.encode(np.asfortranarray(mask))]
    [[square, pixel]] = instances.polygons()
    assert sorted(map(tuple, square.tolist())) == [(5, 10), (5, 30), (25, 10), (25, 30)]
    assert sorted(map(tuple, pixel.tolist())) == [(50, 35), (50, 36), (51, 35), (51, 36)]
    with pytest.raises(ImportError, match=r"`to_supervision` requires supervision: pip install .*vision"):
        instances.to_supervision()


def test_pycocotools_loads_results_with_the_category_ids_of_the_dataset_and_without_empty_masks():
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 3, "height": 60, "width": 80}],
        "annotations": [],
        "categories": [{"id": 10, "name": "cat"}, {"id": 20, "name": "x"}, {"id": 30, "name": "dog"}],
    }
    coco.createIndex()
    results = json.loads(json.dumps(found().to_coco(3, [10, 20, 30])))
    loaded = coco.loadRes(results).loadAnns([1, 2])
    assert [one["category_id"] for one in loaded] == [30, 10]
    assert [one["area"] for one in loaded] == [400, 600]
    assert loaded[1]["bbox"].tolist() == [30, 20, 40, 30]
    assert found(masks=False).to_coco(3)[2]["bbox"] == [1.5, 2.5, 2, 7]
    assert [one["category_id"] for one in found(masks=False).to_coco(3)] == [2, 0, 2]
    assert [one["category_id"] for one in found(masks=False, tracked=True).to_coco(3)] == [30, 10, 30]


def test_areas_are_pixels_of_masks_or_of_boxes():
    assert found().areas.tolist() == [400, 600, 0]
    assert found(masks=False).areas.tolist() == [400, 1200, 14]


def test_crops_of_masks_have_the_mask_as_alpha_and_crops_of_boxes_all_pixels():
    image = Image.fromarray(np.arange(60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8))
    square, bent, nothing = found().crops(image)
    assert (square.mode, square.size, bent.size, nothing.size) == ("RGBA", (20, 20), (40, 30), (1, 1))
    assert (np.asarray(bent)[..., 3] > 0).sum() == 600
    assert (np.asarray(square)[..., :3] == np.asarray(image)[10:30, 5:25]).all()
    *_, box = found(masks=False).crops(image)
    assert (box.mode, box.size) == ("RGB", (3, 8))


@pytest.mark.parametrize("method", ["draw", "crops"])
def test_a_path_and_an_image_of_another_size_are_refused(method: str):
    with pytest.raises(ValueError, match=r"image.*\(60, 80\), got \(80, 60\)"):
        getattr(found(), method)(Image.new("RGB", (60, 80)))
    with pytest.raises(TypeError, match=r"`image` must be a PIL image, got str\. Open files with PIL.Image.open"):
        getattr(found(), method)("photo.jpg")


def test_colors_are_chosen_by_class_instance_or_track():
    image = Image.new("RGB", SIZE[::-1], (90, 90, 90))

    def outline(drawn: Image.Image) -> tuple[tuple[int, ...], ...]:
        return drawn.getpixel((6, 20)), drawn.getpixel((31, 45))

    assert outline(found().draw(image)) == (color_of(2), color_of(0))
    assert outline(found().draw(image, color_by="instance")) == (color_of(0), color_of(1))
    assert outline(found(tracked=True).draw(image, color_by="instance")) == (color_of(4), color_of(7))
    with pytest.raises(ValueError, match=r"color_by.*'score'"):
        found().draw(image, color_by="score")


def test_only_confirmed_tracks_are_labeled_with_their_id(monkeypatch):
    labels = []
    monkeypatch.setattr(
        "transformers_rfdetr.inference.instances.draw_instances", lambda *drawn, **_: labels.extend(drawn[3])
    )
    found(tracked=True).draw(Image.new("RGB", SIZE[::-1]))
    assert labels == ["#4 dog", "#7 cat", "dog"]


@pytest.mark.parametrize("masks", [True, False])
def test_crops_convert_the_image_once(masks: bool, monkeypatch):
    conversions = []
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda *given, **_: conversions.append(given) or convert(*given, **_))
    assert len(found(masks=masks).crops(Image.new("L", SIZE[::-1]))) == 3
    assert len([given for given in conversions if given[0].size == SIZE[::-1]]) == 1


def test_rle_is_drawn_as_bitmaps_are():
    image = Image.new("RGB", SIZE[::-1], (90, 90, 90))
    instances = found()
    expected = draw_instances(image, bitmaps(), None, instances.names, instances.scores, color_indices=[2, 0, 2])
    assert instances.draw(image).tobytes() == expected.tobytes()


def test_ground_truth_is_drawn_from_polygons_and_from_boxes():
    image = Image.new("RGB", SIZE[::-1], (90, 90, 90))
    square = [[5.0, 10.0, 25.0, 10.0, 25.0, 30.0, 5.0, 30.0]]
    annotations = [{"category_id": 1, "segmentation": square, "bbox": [5, 10, 20, 20]}]
    drawn = draw_annotations(image, annotations, {1: "dog"})
    assert drawn.tobytes() == draw_instances(image, bitmaps()[:1], labels=["dog"], color_indices=[1]).tobytes()
    boxes = draw_annotations(image, [{"category_id": 1, "bbox": [5, 10, 20, 20]}], {1: "dog"})
    expected = draw_instances(image, boxes=[[5, 10, 25, 30]], labels=["dog"], color_indices=[1])
    assert boxes.tobytes() == expected.tobytes()
    assert draw_annotations(image, [], {}).tobytes() == image.tobytes()


def test_a_grid_has_rows_of_images_under_the_titles_of_its_columns():
    red, blue = (Image.new("RGB", (80, 60), colour) for colour in ("red", "blue"))
    grey = Image.new("RGB", (30, 20), (128, 128, 128))
    grid = draw_grid([(red, blue), (grey, grey)], ["truth", "found"])
    head, gap = grid.height - 60 - 20 - 4, 4
    assert grid.width == 2 * 80 + gap
    assert grid.getpixel((0, head)) == grid.getpixel((79, head + 59)) == (255, 0, 0)
    assert grid.getpixel((80 + gap, head)) == (0, 0, 255)
    assert grid.getpixel((80 + gap, head + 60 + gap)) == (128, 128, 128)
    assert grid.getpixel((82, head + 30)) == grid.getpixel((60, grid.height - 1)) == (255, 255, 255)
    for left in (0, 80 + gap):
        assert min(grid.crop((left, 0, left + 80, head)).convert("L").getextrema()) < 100  # letters


def test_a_column_is_as_wide_as_its_title_and_without_titles_there_is_no_header():
    small = Image.new("RGB", (100, 60))
    assert draw_grid([(small,)], ["a title that is wider than the image"]).width > 150
    assert draw_grid([(small, small)]).size == (2 * 100 + 4, 60)
