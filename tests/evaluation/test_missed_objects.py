"""Why objects were missed: the rules by hand arithmetic, and a trained model that is made to fail at each stage."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation_cases import SCENE_PROCESSOR, rectangle, rle, scene, scene_model
from transformers_rfdetr import InstanceDataset, RfDetrForObjectDetection, analyse, compile_for_inference, load
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.evaluation.missed_objects import (
    Problem,
    count_reasons,
    explain_missed,
    iou_on_grid,
    proposal_ranks,
)
from transformers_rfdetr.evaluation.report.missed import advise

from small_models import pixels, small_model

BOX = [10, 10, 20, 20]  # x, y, width, height; moved by 5 of 20 pixels it has IoU 15 / 25, by 10 it has 10 / 30


# The rules


def test_the_rank_of_an_object_is_that_of_the_best_box_near_it():
    objects = np.array([BOX, [60, 60, 20, 20], [90, 0, 20, 20]], float)
    boxes = np.array([[15, 10, 20, 20], [20, 10, 20, 20], [60, 65, 20, 20], BOX], float)
    scores = np.array([0.2, 0.9, 0.4, 0.6])
    assert proposal_ranks(objects, boxes, scores).tolist() == [1, 2, -1]  # the best box of all is near none of them
    assert proposal_ranks(objects[:0], boxes, scores).tolist() == []


def test_all_proposals_contain_those_that_the_model_selects():
    model, inputs = small_model(), pixels()
    levels = []
    with torch.no_grad(), model.backbone[0].register_forward_hook(lambda _, inputs, output: levels.extend(output)):
        outputs = model(inputs)
        logits, boxes = model.all_proposals(levels, torch.ones(2, 48, 48))
    assert logits.shape == (2, 16, 4)
    best = logits.amax(-1).topk(6).indices
    assert torch.equal(best, outputs.enc_indices)
    torch.testing.assert_close(boxes.gather(1, best[..., None].expand(-1, -1, 4)), outputs.enc_outputs_coord)


def test_a_mask_on_the_grid_has_the_iou_that_torch_computes():
    aligned = rectangle((8, 16), (4, 12))
    assert iou_on_grid(rle(aligned), (25, 25)) > 0.85  # cells of 4 x 4 pixels: only the corners are rounded
    assert iou_on_grid(rle(rectangle((0, 100), (9, 10))), (25, 25)) == 0  # a quarter of each cell
    mask = np.hypot(*(np.mgrid[:100, :100] - 41)) < 13
    cells = mask.reshape(25, 4, 25, 4).mean((1, 3))
    upsampled = F.interpolate(torch.from_numpy(cells)[None, None].float(), (100, 100), mode="bilinear")[0, 0] > 0.5
    expected = (upsampled.numpy() & mask).sum() / (upsampled.numpy() | mask).sum()
    assert iou_on_grid(rle(mask), (25, 25)) == pytest.approx(expected)
    assert 0.8 < expected < 1


@pytest.mark.parametrize(
    ("ious", "box_ious", "scores", "expected"),
    [
        ([[0.6, 0]], [[0.2, 0]], [0.3], ("below the threshold", 0)),
        ([[0.6, 0], [0.4, 0]], [[0.6, 0], [0.7, 0]], [0.3, 0.8], ("below the threshold", 0)),
        ([[0.6, 0], [0.7, 0]], [[0.6, 0], [0.7, 0]], [0.4, 0.3], ("below the threshold", 0)),
        ([[0.6, 0.7]], [[0.6, 0.7]], [0.3], ("lost in the decoder", -1)),  # it belongs to the other object
        ([[0.4, 0]], [[0.5, 0]], [0.3], ("wrong mask", 0)),
        ([[0.4, 0], [0, 0]], [[0.6, 0], [0.3, 0]], [0.3, 0.8], ("wrong mask", 0)),
        ([[0.4, 0]], [[0.4, 0]], [0.8], ("inaccurate box", 0)),
        ([[0.4, 0]], [[0.4, 0.45]], [0.8], ("lost in the decoder", -1)),
        ([[0.4, 0]], [[0.4, 0]], [0.5], ("lost in the decoder", -1)),
        ([[0.09, 0]], [[0.09, 0]], [0.8], ("lost in the decoder", -1)),
        ([[0, 0]], [[0, 0]], [0.8], ("lost in the decoder", -1)),
        ([], [], [], ("lost in the decoder", -1)),
    ],
)
def test_the_detections_near_an_object_decide_why_it_was_missed(ious, box_ious, scores, expected):
    arrays = (np.reshape(np.array(values, float), (-1, 2)) for values in (ious, box_ious))
    first, _ = explain_missed(*arrays, np.array(scores), np.array(scores) > 0.5, ranks=np.array([9, 9]), limit=10)
    assert first == expected


def test_without_a_detection_the_first_stage_decides():
    none = np.zeros((0, 3))
    reasons = explain_missed(none, none, np.zeros(0), np.zeros(0, bool), ranks=np.array([-1, 10, 9]), limit=10)
    assert [reason for reason, _ in reasons] == ["no proposal", "proposal not selected", "lost in the decoder"]
    reasons = explain_missed(none, none, np.zeros(0), np.zeros(0, bool), ranks=None, limit=0)
    assert [reason for reason, _ in reasons] == ["not detected"] * 3


def test_reasons_are_counted_by_class_and_by_the_sizes_of_coco():
    problems = [Problem("wrong mask"), Problem("wrong mask"), Problem("other class"), None, Problem("wrong mask")]
    labels, areas = np.array([0, 0, 1, 1, 2]), np.array([1023, 1024, 9215, 5, 9216])
    counts = count_reasons(problems, labels, areas, 3)
    assert {reason: table.tolist() for reason, table in counts.items()} == {
        "other class": [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
        "wrong mask": [[1, 1, 0], [0, 0, 0], [0, 0, 1]],
    }


def test_advice_has_the_numbers_of_the_objects():
    ranks = [Problem("proposal not selected", float(rank)) for rank in (310, 305, *range(100, 118))]
    assert "num_queries=120 instead of 100, and fine-tuning, would give 18 of these 20" in advise(
        "proposal not selected", ranks, 100
    )
    far = [Problem("proposal not selected", float(rank)) for rank in (572, 400)]
    assert advise("proposal not selected", far, 100).startswith("Train longer: ")
    assert "would give 18 of these 22" in (mixed := advise("proposal not selected", [*ranks, *far], 100))
    assert mixed.endswith("For the others, train longer.")
    scores = [Problem("below the threshold", score) for score in (0.12, 0.45, 0.31, 0.2)]
    assert "half of these scores are at least 0.31, the highest is 0.45" in advise("below the threshold", scores, None)


# A trained model that is made to fail


@pytest.fixture(scope="module")
def dataset():
    images, coco = draw_dataset(3, (144, 144), metres_per_pixel=0.2, first_seed=2_000_000)
    return InstanceDataset(coco, images)


def fewer_queries(model):
    model.config.num_queries = model.transformer.num_queries = 3


def small_proposals(model):
    [head, *_] = model.transformer.enc_out_bbox_embed
    head.layers[-1].bias.data[2:] -= 4.0  # the sides shrink to 2 %
    model.class_embed.bias.data -= 20.0


def unsure_decoder(model):
    model.class_embed.bias.data -= 20.0


def lower_scores(model):
    model.class_embed.bias.data -= 2.0


def other_classes(model):
    for parameter in (model.class_embed.weight, model.class_embed.bias):
        parameter.data = parameter.data.roll(1, 0)


def empty_masks(model):
    model.segmentation_head.bias.data -= 1e4


def coarse_masks(model):
    model.segmentation_head.downsample_ratio = 36  # 4 x 4 cells


def duplicated_queries(model):
    def repeat(module, inputs, outputs):
        best = outputs.logits.amax(-1).argsort(descending=True)
        for image, order in enumerate(best):
            for field in (outputs.logits, outputs.pred_boxes, outputs.pred_masks):
                field[image, order[-5:]] = field[image, order[:5]]

    model.register_forward_hook(repeat)


@pytest.mark.parametrize(
    ("fail", "reason", "least_share"),
    [
        (fewer_queries, "proposal not selected", 0.8),
        (small_proposals, "no proposal", 0.95),
        (unsure_decoder, "lost in the decoder", 0.8),
        (lower_scores, "below the threshold", 0.8),
        (other_classes, "other class", 0.8),
        (empty_masks, "wrong mask", 0.8),
        (coarse_masks, "mask grid too coarse", 0.5),
        (duplicated_queries, "found twice", 0.6),
    ],
)
def test_a_model_that_is_made_to_fail_at_a_stage_is_reported_with_that_stage(fail, reason, least_share, dataset):
    model, processor = load("rf-detr-seg-tiny")
    fail(model)
    analysis = analyse(model, processor, dataset, progress=False)
    outcomes = [outcome for image in analysis.images for outcome in image.object_outcomes]
    problems = [problem for image in analysis.images for problem in image.problems]
    reasons = Counter(problem.reason for problem in problems if problem is not None)
    assert reasons[reason] >= least_share * reasons.total() > 0, reasons
    if reason != "found twice":
        assert reasons.total() - reasons["found twice"] == outcomes.count("missed") + outcomes.count("other class")
        assert reasons.total() > 20


def test_a_broken_box_head_loses_objects_in_the_decoder(dataset):
    tiny, processor = load("rf-detr-seg-tiny")
    model = RfDetrForObjectDetection(tiny.config).eval()  # masks would be found without their boxes
    model.load_state_dict(tiny.state_dict(), strict=False)
    model.bbox_embed.layers[-1].bias.data[:2] += 30.0  # all boxes lie outside of the image
    analysis = analyse(model, processor, dataset, progress=False)
    reasons = Counter(problem.reason for image in analysis.images for problem in image.problems)
    assert reasons["lost in the decoder"] > 0.8 * reasons.total() > 20


def test_without_a_first_stage_the_stages_before_the_detection_are_one(dataset):
    model, processor = load("rf-detr-seg-tiny")
    unsure_decoder(model)
    fast = compile_for_inference(model, batch_size=3, compiled=False)
    analysis = analyse(fast, processor, dataset, progress=False)
    reasons = Counter(problem.reason for image in analysis.images for problem in image.problems if problem)
    assert set(reasons) == {"not detected"}
    assert analysis.num_selected is None


def test_problems_follow_from_the_outcomes():
    images = {image.name: image for image in analyse(scene_model(), SCENE_PROCESSOR, scene(), progress=False).images}
    assert [str(problem) for problem in images["many.png"].problems] == [
        "found twice",
        "other class, found as house",
        "None",
    ]
    assert [str(problem) for problem in images["missed.png"].problems] == ["not detected"]
    images = {
        image.name: image
        for image in analyse(scene_model(), SCENE_PROCESSOR, scene(), min_score=0.75, progress=False).images
    }
    assert str(images["many.png"].problems[1]) == "below the threshold, score 0.40"
