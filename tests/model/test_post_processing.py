"""Outputs to instances. Oracles: hand arithmetic, pycocotools, `F.interpolate`, rfdetr's PostProcess, the port."""

import ctypes
import json
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from test_image_processing import port

from transformers_rfdetr import RfDetrImageProcessor

PROCESSOR = RfDetrImageProcessor()


def random_outputs(batch=2, queries=12, classes=4, size=(20, 24), seed=0):
    """Scores on both sides of one half, boxes that leave the image, masks of a few smooth blobs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, queries, 4, 5, generator=generator) * 4
    masks = F.interpolate(coarse, size, mode="bicubic")
    return SimpleNamespace(
        logits=torch.randn(batch, queries, classes, generator=generator) * 2,
        pred_boxes=torch.rand(batch, queries, 4, generator=generator),
        pred_masks=masks + 0.1 * torch.randn(masks.shape, generator=generator),
    )


def one_image(scores, masks=None, boxes=None, label=1, classes=3):
    """Outputs of one image: query i has class `label` with scores[i]."""
    logits = torch.full((1, len(scores), classes), -20.0)
    logits[0, :, label] = torch.logit(torch.tensor(scores, dtype=torch.float64)).float()
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5]] * len(scores)) if boxes is None else torch.tensor(boxes)
    masks = torch.full((len(scores), 8, 8), -1.0) if masks is None else masks
    return SimpleNamespace(logits=logits, pred_boxes=boxes[None], pred_masks=masks[None])


def rectangles(*slices, size=(8, 8)):
    masks = torch.full((len(slices), *size), -4.0)
    for mask, inside in zip(masks, slices, strict=True):
        mask[inside] = 4.0
    return masks


def instances(outputs, **settings):
    return PROCESSOR.post_process_instance_segmentation(outputs, **settings)


class TestDetection:
    def test_boxes_by_hand(self):
        outputs = one_image([0.9], boxes=[[0.5, 0.25, 0.2, 0.1]])
        (found,) = PROCESSOR.post_process_object_detection(outputs, target_sizes=[(100, 200)])
        torch.testing.assert_close(found["boxes"], torch.tensor([[80.0, 20, 120, 30]]))
        torch.testing.assert_close(found["scores"], torch.tensor([0.9]))
        assert found["labels"].tolist() == [1]

    def test_boxes_are_clamped_and_never_inverted(self):
        outputs = one_image([0.9, 0.8], boxes=[[0.1, 0.9, 0.6, 0.6], [0.5, 0.5, -0.2, 0.1]])
        (found,) = PROCESSOR.post_process_object_detection(outputs, target_sizes=[(100, 200)])
        torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 60, 80, 100], [100, 45, 100, 55]]))

    def test_without_target_sizes_boxes_are_relative(self):
        (found,) = PROCESSOR.post_process_object_detection(one_image([0.9], boxes=[[0.5, 0.25, 0.2, 0.1]]))
        torch.testing.assert_close(found["boxes"], torch.tensor([[0.4, 0.2, 0.6, 0.3]]))

    def test_equals_rfdetr(self):
        postprocess = pytest.importorskip("rfdetr.models.postprocess").PostProcess
        outputs = random_outputs()
        outputs.logits[0, 3] = outputs.logits[0, 5]  # ties
        sizes = torch.tensor([[37, 61], [80, 20]])
        raw = {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
        theirs = postprocess(num_select=12)(raw, sizes)
        ours = PROCESSOR.post_process_object_detection(outputs, threshold=0.85, target_sizes=sizes)
        for their, our in zip(theirs, ours, strict=True):
            keep = their["scores"] > 0.85
            assert 1 < keep.sum() < 12
            assert torch.equal(our["labels"], their["labels"][keep])
            torch.testing.assert_close(our["scores"], their["scores"][keep])
            torch.testing.assert_close(our["boxes"], their["boxes"][keep])

    def test_equals_the_port_inside_the_image(self):
        outputs = random_outputs()
        outputs.pred_boxes = outputs.pred_boxes * torch.tensor([0.4, 0.4, 0.2, 0.2]) + 0.3
        for sizes in (None, [(37, 61), (80, 20)], torch.tensor([[37, 61], [80, 20]])):
            theirs = port().post_process_object_detection(outputs, 0.4, sizes, top_k=9)
            ours = PROCESSOR.post_process_object_detection(outputs, 0.4, sizes, top_k=9)
            for their, our in zip(theirs, ours, strict=True):
                assert our.keys() == their.keys()
                for name in our:
                    torch.testing.assert_close(our[name], their[name])

    def test_a_query_may_have_several_classes(self):
        outputs = one_image([0.9, 0.2])
        outputs.logits[0, 0, 2] = 1.0
        (found,) = PROCESSOR.post_process_object_detection(outputs)
        assert found["labels"].tolist() == [1, 2]
        (found,) = PROCESSOR.post_process_object_detection(outputs, threshold=0.0, top_k=3)
        assert found["labels"].tolist() == [1, 2, 1]
        (found,) = PROCESSOR.post_process_object_detection(outputs, threshold=0.0)
        assert len(found["labels"]) == 2  # as many as queries

    def test_the_score_must_exceed_the_threshold(self):
        outputs = one_image([0.5, 0.6])
        assert outputs.logits[0, 0, 1] == 0
        assert len(PROCESSOR.post_process_object_detection(outputs, threshold=0.5)[0]["scores"]) == 1
        assert len(PROCESSOR.post_process_object_detection(outputs, threshold=1.0)[0]["scores"]) == 0

    def test_nan_scores_never_survive_nor_take_a_place(self):
        outputs = one_image([0.9, 0.8])
        outputs.logits[0, 0] = float("nan")
        for threshold in (-1.0, 0.0, 0.5):
            (found,) = PROCESSOR.post_process_object_detection(outputs, threshold=threshold, top_k=1)
            assert found["scores"].tolist() == pytest.approx([0.8])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_boxes_that_are_not_finite_never_survive_nor_take_a_place(self, bad):
        outputs = one_image([0.9, 0.8], boxes=[[0.5, 0.5, bad, 0.5], [0.5, 0.5, 0.5, 0.5]])
        for threshold in (-1.0, 0.5):
            (found,) = PROCESSOR.post_process_object_detection(outputs, threshold=threshold, top_k=1)
            assert found["scores"].tolist() == pytest.approx([0.8])
            (result,) = instances(outputs, threshold=threshold, top_k=1)
            assert [segment["score"] for segment in result["segments_info"]] == pytest.approx([0.8])

    def test_ties_keep_the_order_of_queries(self):
        outputs = one_image([0.9] * 40, boxes=[[number / 100, 0.5, 0, 0] for number in range(40)])
        (found,) = PROCESSOR.post_process_object_detection(outputs, top_k=7)
        torch.testing.assert_close(found["boxes"][:, 0], torch.arange(7) / 100)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype):
        half = {name: value.to(dtype) for name, value in vars(random_outputs()).items()}
        full = {name: value.float() for name, value in half.items()}
        found, expected = (
            PROCESSOR.post_process_object_detection(SimpleNamespace(**outputs), 0.4, [(3000, 4000)] * 2)
            for outputs in (half, full)
        )
        for our, their in zip(found, expected, strict=True):
            assert our["boxes"].dtype == our["scores"].dtype == torch.float32
            assert all(torch.equal(our[name], their[name]) for name in our)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"target_sizes": [(10, 10)]}, r"target_sizes.*2 images.*\[\(10, 10\)\]"),
            ({"target_sizes": torch.ones(3, 2)}, "target_sizes.*2 images"),
            ({"target_sizes": 10}, "target_sizes.*2 images.*10"),
            ({"target_sizes": (10, 12)}, "target_sizes.*10"),
            ({"target_sizes": ["10", "12"]}, "target_sizes.*'10'"),
            ({"target_sizes": [None, None]}, "target_sizes.*None"),
            ({"target_sizes": [(10.7, 12), (1, 1)]}, r"target_sizes.*\(10\.7, 12\)"),
            ({"target_sizes": torch.tensor([[float("nan"), 3], [1, 1]])}, r"target_sizes.*\[nan, 3\.0\]"),
            ({"target_sizes": [(float("inf"), 3), (1, 1)]}, r"target_sizes.*\(inf, 3\)"),
            ({"target_sizes": [(10, 10), (0, 10)]}, r"\(0, 10\)"),
            ({"target_sizes": [(10, 10), (10, 10, 3)]}, r"\(10, 10, 3\)"),
            ({"top_k": 0}, "top_k.*0"),
            ({"top_k": 2.5}, r"top_k.*2\.5"),
        ],
    )
    def test_wrong_arguments_raise(self, settings, message):
        for method in (PROCESSOR.post_process_object_detection, PROCESSOR.post_process_instance_segmentation):
            with pytest.raises(ValueError, match=message):
                method(random_outputs(), **settings)


class TestLabelMap:
    def test_by_hand(self):
        masks = rectangles(np.s_[0:4, 0:4], np.s_[2:6, 2:6])
        (result,) = instances(one_image([0.9, 0.8], masks, boxes=[[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]))
        expected = torch.full((8, 8), -1, dtype=torch.int32)
        expected[2:6, 2:6] = 2
        expected[0:4, 0:4] = 1
        assert torch.equal(result["segmentation"], expected)
        assert result["segmentation"].dtype == torch.int32
        first, second = result["segments_info"]
        assert first == {
            "id": 1,
            "label_id": 1,
            "score": pytest.approx(0.9),
            "box": [0.0, 0.0, 4.0, 4.0],
            "area": 16,
            "visible_area": 16,
        }
        assert (second["id"], second["area"], second["visible_area"], second["box"]) == (
            2,
            16,
            12,
            [2.0, 2.0, 6.0, 6.0],
        )
        json.dumps(result["segments_info"])

    def test_a_covered_instance_stays_with_its_box_and_area(self):
        masks = rectangles(np.s_[0:6, 0:6], np.s_[1:3, 1:3], np.s_[7:8, 7:8])
        (result,) = instances(one_image([0.9, 0.8, 0.7], masks))
        assert [segment["id"] for segment in result["segments_info"]] == [1, 2, 3]
        assert [segment["area"] for segment in result["segments_info"]] == [36, 4, 1]
        assert [segment["visible_area"] for segment in result["segments_info"]] == [36, 0, 1]
        assert result["segmentation"].unique().tolist() == [-1, 1, 3]

    def test_an_instance_without_a_mask_stays_aligned(self):
        masks = rectangles(np.s_[0:0, 0:0], np.s_[1:3, 1:3])
        for form in ({}, {"return_binary_maps": True}, {"return_coco_annotation": True}):
            (result,) = instances(one_image([0.9, 0.8], masks), target_sizes=[(16, 16)], **form)
            assert [segment["area"] > 0 for segment in result["segments_info"]] == [False, True]
            if form:
                assert len(result["segmentation"]) == 2

    def test_is_the_port_s_where_nothing_is_hidden(self):
        outputs = random_outputs()
        sizes = [(75, 101), (40, 33)]
        theirs = port().post_process_instance_segmentation(outputs, 0.6, 0.2, sizes)
        ours = instances(outputs, threshold=0.6, mask_threshold=0.2, target_sizes=sizes)
        for their, our in zip(theirs, ours, strict=True):
            # The port leaves covered instances out and renumbers.
            visible = [segment for segment in our["segments_info"] if segment["visible_area"]]
            assert len(visible) > 2
            for ours_segment, their_segment in zip(visible, their["segments_info"], strict=True):
                assert ours_segment.keys() >= their_segment.keys()
                assert ours_segment["label_id"] == their_segment["label_id"]
                assert ours_segment["score"] == pytest.approx(their_segment["score"], abs=1e-6)
                mask = our["segmentation"] == ours_segment["id"]
                assert torch.equal(mask, their["segmentation"] == their_segment["id"])
                assert mask.sum() == ours_segment["visible_area"]
            assert our["segmentation"].dtype == their["segmentation"].dtype

    def test_overlap_threshold_drops_covered_instances(self):
        masks = rectangles(np.s_[0:4, 0:4], np.s_[0:4, 1:5], np.s_[0:4, 2:6], np.s_[0:0, 0:0])
        outputs = one_image([0.9, 0.8, 0.7, 0.6], masks)
        assert [s["visible_area"] for s in instances(outputs)[0]["segments_info"]] == [16, 4, 4, 0]
        # Without the second (a quarter visible), the third shows one half.
        for form in ({}, {"return_binary_maps": True}, {"return_coco_annotation": True}):
            (result,) = instances(outputs, overlap_mask_area_threshold=0.5, **form)
            assert [(s["id"], s["visible_area"]) for s in result["segments_info"]] == [(1, 16), (2, 8)]
            if form:
                assert len(result["segmentation"]) == 2

    def test_without_target_sizes_has_the_size_of_the_mask_logits(self):
        (result, _) = instances(random_outputs())
        assert result["segmentation"].shape == (20, 24)
        assert max(segment["box"][2] for segment in result["segments_info"]) <= 24

    @pytest.mark.parametrize(
        "sizes", [[(16, 24)], [[16, 24]], [torch.tensor([16, 24])], torch.tensor([[16.0, 24]]), np.array([[16, 24]])]
    )
    def test_target_sizes_have_several_forms(self, sizes):
        assert instances(one_image([0.9]), target_sizes=sizes)[0]["segmentation"].shape == (16, 24)


class TestWholeMasks:
    @pytest.mark.parametrize("sizes", [None, [(75, 101), (40, 33)], [(300, 20), (1, 1)]])
    def test_equal_upsampling_every_map(self, sizes):
        outputs = random_outputs()
        binary = instances(outputs, threshold=0.6, target_sizes=sizes, return_binary_maps=True)
        coco = instances(outputs, threshold=0.6, target_sizes=sizes, return_coco_annotation=True)
        maps = instances(outputs, threshold=0.6, target_sizes=sizes)
        for index in range(2):
            scores, order = outputs.logits[index].sigmoid().flatten().sort(descending=True)
            queries = order[:12][scores[:12] > 0.6] // 4
            size = (20, 24) if sizes is None else sizes[index]
            whole = F.interpolate(outputs.pred_masks[index, queries][None], size, mode="bilinear", align_corners=False)
            assert torch.equal(binary[index]["segmentation"], whole[0] > 0)
            decoded = coco_mask.decode(coco[index]["segmentation"]).transpose(2, 0, 1)
            np.testing.assert_array_equal(decoded, whole[0] > 0)
            for rle in coco[index]["segmentation"]:
                assert rle == json.loads(json.dumps(rle))
                assert rle["size"] == list(size)
            areas = [segment["area"] for segment in maps[index]["segments_info"]]
            assert areas == coco_mask.area(coco[index]["segmentation"]).tolist()
            assert maps[index]["segments_info"] == binary[index]["segments_info"] == coco[index]["segments_info"]

    def test_equal_rfdetr(self):
        postprocess = pytest.importorskip("rfdetr.models.postprocess").PostProcess
        outputs = random_outputs()
        raw = {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes, "pred_masks": outputs.pred_masks}
        sizes = torch.tensor([[75, 101], [40, 33]])
        theirs = postprocess(num_select=12)(raw, sizes, score_threshold=0.6)
        for their, our in zip(
            theirs, instances(outputs, threshold=0.6, target_sizes=sizes, return_binary_maps=True), strict=True
        ):
            assert torch.equal(our["segmentation"], their["masks"][:, 0])
            boxes = torch.tensor([segment["box"] for segment in our["segments_info"]])
            torch.testing.assert_close(boxes, their["boxes"])
            assert [segment["label_id"] for segment in our["segments_info"]] == their["labels"].tolist()

    def test_equal_the_port_s_binary_maps(self):
        outputs = random_outputs()
        sizes = [(75, 101), (40, 33)]
        theirs = port().post_process_instance_segmentation(outputs, 0.6, 0.0, sizes, return_binary_maps=True)
        ours = instances(outputs, threshold=0.6, target_sizes=sizes, return_binary_maps=True)
        for their, our in zip(theirs, ours, strict=True):
            assert torch.equal(our["segmentation"], their["segmentation"])

    @pytest.mark.parametrize("part", [-0.1, 1.5, float("nan")])
    def test_overlap_threshold_is_a_part(self, part):
        with pytest.raises(ValueError, match=rf"overlap_mask_area_threshold.*\[0, 1\].*{part}"):
            instances(random_outputs(), overlap_mask_area_threshold=part)

    @pytest.mark.parametrize("mask", [torch.ones(32, 32), torch.ones(1, 32, 32), torch.zeros(2, 32, 32)])
    def test_pixel_mask_covers_something_of_every_image(self, mask):
        with pytest.raises(ValueError, match=r"pixel_mask.*\(B, H, W\).*2 images"):
            instances(random_outputs(), pixel_mask=mask)

    def test_cannot_be_asked_for_in_both_forms(self):
        with pytest.raises(ValueError, match=r"return_coco_annotation.*return_binary_maps"):
            instances(random_outputs(), return_coco_annotation=True, return_binary_maps=True)

    def test_need_masks(self):
        with pytest.raises(ValueError, match="pred_masks"):
            instances(SimpleNamespace(logits=torch.zeros(1, 2, 3), pred_boxes=torch.zeros(1, 2, 4)))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_of_half_precision_are_computed_in_float32(self, dtype):
        half = {name: value.to(dtype) for name, value in vars(random_outputs()).items()}
        full = {name: value.float() for name, value in half.items()}
        found, expected = (
            instances(SimpleNamespace(**outputs), target_sizes=[(300, 400)] * 2, return_binary_maps=True)
            for outputs in (half, full)
        )
        for our, their in zip(found, expected, strict=True):
            assert torch.equal(our["segmentation"], their["segmentation"])
            assert our["segments_info"] == their["segments_info"]

    def test_lose_the_padding(self):
        """An image of 30 x 50 in the top left 12 x 20 of an input of 32 x 32, whose masks are 8 x 8."""
        masks = rectangles(np.s_[0:3, 0:5], np.s_[3:8, 0:8])  # what the image covers, and padding
        pixel_mask = torch.zeros(1, 32, 32, dtype=torch.int64)
        pixel_mask[:, :12, :20] = 1
        result = instances(
            one_image([0.9, 0.8], masks), target_sizes=[(30, 50)], return_binary_maps=True, pixel_mask=pixel_mask
        )[0]
        assert result["segmentation"][0].all()
        assert not result["segmentation"][1].any()
        whole = torch.ones(1, 32, 32, dtype=torch.int64)
        outputs = random_outputs(batch=1)
        (cut,) = instances(outputs, target_sizes=[(75, 101)], pixel_mask=whole)
        (plain,) = instances(outputs, target_sizes=[(75, 101)])
        assert torch.equal(cut["segmentation"], plain["segmentation"])


class TestNothingFound:
    def test_has_the_right_shapes(self):
        outputs = random_outputs()
        for result in instances(outputs, threshold=1.0, target_sizes=[(30, 40)] * 2):
            assert torch.equal(result["segmentation"], torch.full((30, 40), -1, dtype=torch.int32))
            assert result["segments_info"] == []
        for result in instances(outputs, threshold=1.0, target_sizes=[(30, 40)] * 2, return_binary_maps=True):
            assert result["segmentation"].shape == (0, 30, 40)
            assert result["segmentation"].dtype == torch.bool
        for result in instances(outputs, threshold=1.0, target_sizes=[(30, 40)] * 2, return_coco_annotation=True):
            assert result == {"segmentation": [], "segments_info": []}
        for result in PROCESSOR.post_process_object_detection(outputs, threshold=1.0):
            assert result["boxes"].shape == (0, 4)
            assert result["labels"].dtype == torch.int64

    def test_without_queries(self):
        outputs = SimpleNamespace(**{name: value[:, :0] for name, value in vars(random_outputs()).items()})
        assert [result["segments_info"] for result in instances(outputs)] == [[], []]
        assert len(PROCESSOR.post_process_object_detection(outputs)[0]["boxes"]) == 0

    def test_in_an_empty_batch(self):
        assert instances(random_outputs(batch=0)) == []
        assert PROCESSOR.post_process_object_detection(random_outputs(batch=0)) == []


def test_gradients_are_not_kept():
    outputs = random_outputs()
    for value in vars(outputs).values():
        value.requires_grad_()
    (result, _) = instances(outputs)
    assert result["segments_info"]
    assert not PROCESSOR.post_process_object_detection(outputs)[0]["boxes"].requires_grad


def peak() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def memory_of_100_large_instances() -> list[float]:
    """Return the MiB by which this process grows in each form; those of one form include those of the forms before."""
    torch.set_num_threads(1)  # a fork has no threads of OpenMP
    rows, columns = torch.meshgrid(torch.arange(27) + 0.5, torch.arange(36) + 0.5, indexing="ij")
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(100, 2, 1, 1, generator=generator) * torch.tensor([27, 36])[:, None, None]
    masks = 4 - (rows - center[:, 0]) ** 2 - (columns - center[:, 1]) ** 2
    outputs = one_image(torch.linspace(0.95, 0.55, 100).tolist(), masks)
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, or the forms would reuse it
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, grown = peak(), []
    for form in ({}, {"return_coco_annotation": True}, {"return_binary_maps": True}):
        (result,) = instances(outputs, target_sizes=[(3000, 4000)], **form)
        assert len(result["segments_info"]) == 100
        grown.append(peak() - before)
    return grown


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux")
def test_large_images_take_little_memory():
    """100 instances of 12 megapixels, which as floats would take 4.8 GB and as bool 1.2 GB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as executor:
        label_map, rle, binary_maps = executor.submit(memory_of_100_large_instances).result()
    assert 10 < label_map < 200
    assert rle < 300
    assert binary_maps < 800  # of which the empty parts are never touched
