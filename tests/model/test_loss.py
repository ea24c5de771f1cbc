"""The loss: hand arithmetic, invariants, and input that is extreme, broken or empty."""

import math

import pytest
import torch
import torch.nn.functional as F

from transformers_rfdetr.model.boxes_rf_detr import box_cxcywh_to_xyxy, iou_and_giou
from transformers_rfdetr.model.loss_rf_detr import (
    class_loss,
    count_boxes,
    fraction_inside,
    mask_losses,
    rf_detr_loss,
)
from transformers_rfdetr.model.mask_points_rf_detr import (
    fixed_points,
    random_points,
    sample_bilinear,
    sample_nearest,
    uncertain_points,
)
from transformers_rfdetr.model.matcher_rf_detr import LossWeights, assign, class_cost, mask_costs
from transformers_rfdetr.model.predictions_rf_detr import MaskFactors, StagePrediction

from small_models import pixels, small_model, targets

CPU = torch.device("cpu")


def loss(stages, labels, num_groups=1, **settings):
    return rf_detr_loss(stages, labels, num_groups=num_groups, weights=LossWeights(), points=fixed_points, **settings)


def as_they_are(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return queries, queries.new_zeros(*queries.shape[:-1], 1)


def perfect(
    labels, num_queries: int, num_classes: int, num_groups: int = 1, confidence: float = 6.0
) -> StagePrediction:
    """A prediction of every object, once in each group, and of nothing else."""
    batch, size = len(labels), labels[0]["masks"].shape[-2:]
    width = max(len(target["boxes"]) for target in labels)
    logits = torch.full((batch, num_groups, num_queries, num_classes), -confidence)
    boxes = torch.full((batch, num_groups, num_queries, 4), 0.5)
    queries = torch.zeros(batch, num_groups, num_queries, width)
    pixel_features = torch.full((batch, width, *size), -10.0)
    for image, target in enumerate(labels):
        for index, label in enumerate(target["class_labels"]):
            logits[image, :, index, label] = confidence
            boxes[image, :, index] = target["boxes"][index]
            queries[image, :, index, index] = 1.0
            pixel_features[image, index] = torch.where(target["masks"][index], 10.0, -10.0)
    masks = MaskFactors(pixel_features, queries.flatten(1, 2), as_they_are)
    return StagePrediction(logits.flatten(1, 2), boxes.flatten(1, 2), masks)


# -- objects without a mask, and crowd regions ------------------------------------------------------------------------


def factored(num_queries: int = 6, num_classes: int = 4, size: int = 8) -> StagePrediction:
    """A prediction of one image with random logits, boxes and factors of masks, all of which have gradients."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, num_queries, num_classes, generator=generator).requires_grad_()
    boxes = (0.2 + 0.6 * torch.rand(1, num_queries, 4, generator=generator)).requires_grad_()
    queries = torch.randn(1, num_queries, 3, generator=generator).requires_grad_()
    features = torch.randn(1, 3, size, size, generator=generator).requires_grad_()
    return StagePrediction(logits, boxes, MaskFactors(features, queries, as_they_are))


def with_half_of_the_masks(labels):
    return [target | {"has_mask": torch.arange(len(target["boxes"])) % 2 == 0} for target in labels]


def test_an_object_without_a_mask_trains_class_and_box_and_no_mask():
    labels = targets(2)
    has_one = [labels[0] | {"has_mask": torch.tensor([True, False])}]
    predicted = factored()
    _, losses = loss({"": predicted}, has_one)
    # By hand: the losses of class and box are those of both objects, those of the mask are those of the first one.
    blank = [labels[0] | {"masks": torch.zeros_like(labels[0]["masks"]), "has_mask": torch.tensor([False, False])}]
    _, without = loss({"": predicted}, blank)
    assert without["loss_mask_ce"] == without["loss_mask_dice"] == 0
    assert without["loss_bbox"] > 0
    assert losses["loss_mask_ce"] > 0
    other = [has_one[0] | {"masks": torch.stack([labels[0]["masks"][0], ~labels[0]["masks"][1]])}]
    _, the_same = loss({"": predicted}, other)  # the mask of the second object is never read
    assert all(torch.equal(value, the_same[name]) for name, value in losses.items())


def test_absent_masks_have_exactly_no_gradient():
    predicted = factored()
    labels = [target | {"has_mask": torch.zeros(3, dtype=torch.bool)} for target in targets(3)]
    total, _ = loss({"": predicted}, labels)
    total.backward()
    assert not predicted.masks.queries.grad.any()
    assert not predicted.masks.pixels.grad.any()
    assert predicted.boxes.grad.any()
    assert predicted.logits.grad.any()


def test_labels_that_say_that_all_have_masks_change_no_bit():
    labels = targets(3)
    expected, expected_losses = loss({"": factored()}, labels)
    total, losses = loss({"": factored()}, [labels[0] | {"has_mask": torch.ones(3, dtype=torch.bool)}])
    assert torch.equal(total, expected)
    assert all(torch.equal(losses[name], value) for name, value in expected_losses.items())


def test_a_model_trains_on_objects_of_which_some_have_no_mask():
    model = small_model().train()
    outputs = model(pixels(), labels=with_half_of_the_masks(targets(3, 2)))
    outputs.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_the_fraction_of_a_box_inside_a_region_is_counted_in_pixels():
    region = torch.zeros(10, 20, dtype=torch.bool)
    region[2:6, 5:15] = True
    boxes = torch.tensor(
        [
            [0.5, 0.4, 0.5, 0.4],  # x 5 to 15, y 2 to 6: all of it
            [0.5, 0.4, 1.0, 0.4],  # x 0 to 20: half of it
            [0.5, 0.8, 0.5, 0.2],  # y 7 to 9: nothing
            [0.25, 0.3, 0.5, 0.6],  # x 0 to 10, y 0 to 6: 5 x 4 of 10 x 6
            [0.0, 0.0, 0.0, 0.0],
        ]
    )
    assert fraction_inside(boxes, region).tolist() == pytest.approx([1, 0.5, 0, 20 / 60, 0])


def test_in_a_crowd_region_a_query_that_is_not_matched_may_have_the_class_of_the_crowd():
    logits = torch.tensor([[[3.0, 1.0], [2.0, -1.0], [0.5, 0.5]]])
    boxes = torch.tensor([[[0.25, 0.5, 0.4, 0.8], [0.75, 0.5, 0.4, 0.8], [0.3, 0.5, 0.2, 0.5]]])
    target = {"class_labels": torch.tensor([0]), "boxes": boxes[0, :1]}
    region = torch.zeros(1, 10, 10, dtype=torch.bool)
    region[:, :, :5] = True  # the left half: the boxes of queries 0 and 2
    crowd = target | {"crowd_labels": torch.tensor([0]), "crowd_regions": region}

    def negative(x: float) -> float:  # p^2 softplus(x)
        return math.log1p(math.exp(x)) / (1 + math.exp(-x)) ** 2

    without, with_crowd = (loss({"": StagePrediction(logits, boxes, None)}, [one])[1] for one in (target, crowd))
    # Query 0 is matched, and query 1 is outside: only the entry of query 2 and class 0 is ignored.
    assert float(without["loss_ce"] - with_crowd["loss_ce"]) == pytest.approx(negative(0.5), rel=1e-5)
    assert torch.equal(without["loss_bbox"], with_crowd["loss_bbox"])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("has_mask", torch.ones(2), r"\['has_mask'\]` must be a bool tensor \(T,\), got torch.float32"),
        ("has_mask", torch.ones(3, dtype=torch.bool), "equal length"),
        ("crowd_regions", torch.ones(1, 4, 4), r"\['crowd_regions'\]` must be a bool tensor"),
        ("crowd_labels", torch.tensor([1]), "one of 'crowd_labels' for each of 'crowd_regions', got 1 and 0"),
        (
            "crowd_labels",
            torch.tensor([0.5]),
            r"must be an integer tensor \(R,\), got torch.float32",
        ),
    ],
)
def test_optional_fields_of_another_kind_are_refused_by_name(field, value, words):
    with pytest.raises(ValueError, match=rf"labels\[0\].*{words}"):
        loss({"": factored()}, [targets(2)[0] | {field: value}])


@pytest.mark.parametrize("label", [-1, 1000])
def test_a_crowd_of_an_unknown_class_is_refused(label):
    crowd = {"crowd_labels": torch.tensor([label]), "crowd_regions": torch.ones(1, 4, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=rf"`labels\[0\]\['crowd_labels'\]\[0\]` must be from 0 to \d+, got {label}"):
        loss({"": factored()}, [targets(2)[0] | crowd])


# -- formulas against hand arithmetic --------------------------------------------------------------------------------


def test_boxes_of_known_overlap_have_the_iou_and_giou_of_the_paper():
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    second = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    iou, giou = iou_and_giou(first, second)
    assert iou.item() == pytest.approx(1 / 7)
    assert giou.item() == pytest.approx(1 / 7 - 2 / 9)  # hull 9, union 7
    apart = iou_and_giou(first, torch.tensor([[4.0, 0.0, 6.0, 2.0]]))
    assert (apart[0].item(), apart[1].item()) == pytest.approx((0.0, -4 / 12))
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert all(torch.isfinite(value).all() for value in iou_and_giou(point, point))


def test_a_negative_width_counts_as_none():
    assert box_cxcywh_to_xyxy(torch.tensor([0.5, 0.5, -0.2, 0.2])).tolist() == pytest.approx([0.5, 0.4, 0.5, 0.6])


def test_the_class_cost_is_the_focal_cost():
    p = 1 / (1 + math.exp(-0.7))
    expected = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
    assert class_cost(torch.tensor(0.7), 0.25).item() == pytest.approx(expected, rel=1e-5)


def test_the_class_loss_is_the_iou_aware_cross_entropy():
    logits = torch.tensor([[[0.3, -1.2]]])
    p, q = (1 / (1 + math.exp(-x)) for x in (0.3, -1.2))
    t = p**0.25 * 0.6**0.75
    expected = -t * math.log(p) - (1 - t) * math.log(1 - p) - q**2 * math.log(1 - q)
    where = (torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert class_loss(logits, where, torch.tensor([0.6]), 0.25).item() == pytest.approx(expected, rel=1e-5)


def test_the_class_loss_lets_the_gradient_through_the_weight_of_negatives():
    logits = torch.tensor([[[0.4]]], requires_grad=True)
    nothing = tuple(torch.zeros(0, dtype=torch.long) for _ in range(3))
    class_loss(logits, nothing, torch.zeros(0), 0.25).backward()
    p = 1 / (1 + math.exp(-0.4))
    expected = 2 * p * p * (1 - p) * -math.log(1 - p) + p**2 * p  # d/dx of p^2 softplus(x)
    assert logits.grad.item() == pytest.approx(expected, rel=1e-5)


def test_mask_costs_are_mean_cross_entropy_and_dice_of_every_pair():
    logits, labels = torch.randn(3, 10), (torch.rand(2, 10) > 0.5).float()
    cross_entropy, dice = mask_costs(logits, labels)
    for query in range(3):
        for index in range(2):
            expected = F.binary_cross_entropy_with_logits(logits[query], labels[index])
            torch.testing.assert_close(cross_entropy[query, index], expected)
            p = logits[query].sigmoid()
            overlap = (2 * (p * labels[index]).sum() + 1) / (p.sum() + labels[index].sum() + 1)
            torch.testing.assert_close(dice[query, index], 1 - overlap)


def test_points_outside_the_outermost_centres_see_the_border():
    constant = torch.full((1, 1, 4, 4), 5.0)
    edges = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.999]]])
    assert sample_bilinear(constant, edges).tolist() == [[[5.0, 5.0, 5.0, 5.0]]]
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 3, 5] = True
    assert sample_nearest(
        mask, torch.tensor([0]), torch.tensor([[[0.99, 0.99], [0.8, 0.99], [1.0, 1.0]]])
    ).tolist() == [[1.0, 0.0, 1.0]]


def test_points_gather_where_the_mask_is_uncertain():
    ramp = torch.linspace(-4, 4, 64).expand(1, 64, 64)  # 0 in the middle column
    chosen = uncertain_points(ramp, 100, fixed_points)
    assert chosen.shape == (1, 100, 2)
    distance = (chosen[0, :, 0] - 0.5).abs()
    assert distance[:75].max() < 0.2  # of 300 candidates the nearest 75 fill a quarter of the width
    assert distance[75:].mean() > 0.15


def test_an_assignment_is_the_cheapest_in_each_group():
    cost = torch.tensor([[4.0, 1.0], [2.0, 3.0], [9.0, 9.0], [9.0, 0.0], [0.0, 9.0], [5.0, 5.0]])
    queries, objects = assign(cost, num_groups=2)
    assert list(zip(queries.tolist(), objects.tolist(), strict=True)) == [(0, 1), (1, 0), (3, 1), (4, 0)]


def test_a_factored_mask_multiplies_out_as_its_definition():
    factors = MaskFactors(torch.randn(2, 5, 3, 4), torch.randn(2, 6, 5), lambda q: (2 * q, q[..., :1] + 0.3))
    expected = 2 * torch.einsum("bdhw,bnd->bnhw", *factors[:2]) + factors.queries[:, :, :1, None] + 0.3
    torch.testing.assert_close(factors.logits(), expected)


def test_the_mask_loss_of_factored_masks_is_that_of_dense_ones_with_its_gradients():
    labels = targets(2, 1)
    pixel_features = torch.randn(2, 5, 12, 12, requires_grad=True)
    queries = torch.randn(2, 6, 5, requires_grad=True)
    pairs = [(torch.tensor([4, 1]), torch.tensor([0, 1])), (torch.tensor([3]), torch.tensor([0]))]
    losses = mask_losses(MaskFactors(pixel_features, queries, as_they_are), labels, pairs, 16, fixed_points)
    factored = torch.autograd.grad(sum(losses), [pixel_features, queries])

    dense = torch.einsum("bdhw,bnd->bnhw", pixel_features, queries)  # the plain definition, every mask in full
    logits = torch.stack([dense[0, 4], dense[0, 1], dense[1, 3]])
    truth = [labels[0]["masks"][0], labels[0]["masks"][1], labels[1]["masks"][0]]
    where = uncertain_points(logits.detach(), 12, fixed_points)
    sampled = F.grid_sample(logits[:, None], 2 * where[:, None] - 1, padding_mode="border", align_corners=False)[
        :, 0, 0
    ]
    target = torch.stack(
        [sample_nearest(m[None], torch.tensor([0]), w[None])[0] for m, w in zip(truth, where, strict=True)]
    )
    cross_entropy = F.binary_cross_entropy_with_logits(sampled, target, reduction="none").mean(1).sum()
    p = sampled.sigmoid()
    dice = (1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)).sum()
    torch.testing.assert_close(torch.stack(losses), torch.stack([cross_entropy, dice]))
    for mine, expected in zip(
        factored, torch.autograd.grad(cross_entropy + dice, [pixel_features, queries]), strict=True
    ):
        torch.testing.assert_close(mine, expected)


# -- invariants ------------------------------------------------------------------------------------------------------


def test_a_perfect_predictor_beats_one_that_repeats_every_object():
    labels = targets(3, 2)
    once = perfect(labels, 10, 4)
    best, _ = loss({"": once}, labels)
    repeated = StagePrediction(
        once.logits.repeat(1, 13, 1),
        once.boxes.repeat(1, 13, 1),
        once.masks._replace(queries=once.masks.queries.repeat(1, 13, 1)),
    )
    worse, _ = loss({"": repeated}, labels)  # evaluation has one group, so twelve of thirteen are false
    assert best < 0.5  # what is left: masks between the pixels of their outline
    assert worse > 10 * best


def test_thirteen_groups_cost_what_one_costs():
    labels = targets(3, 2)
    one, _ = loss({"": perfect(labels, 10, 4)}, labels)
    thirteen, _ = loss({"": perfect(labels, 10, 4, num_groups=13)}, labels, num_groups=13)
    torch.testing.assert_close(thirteen, one)


def test_the_order_of_objects_and_queries_does_not_matter():
    labels = targets(3, 2)
    generator = torch.Generator().manual_seed(0)
    stage = StagePrediction(torch.randn(2, 6, 4, generator=generator), torch.rand(2, 6, 4, generator=generator))
    expected, _ = loss({"": stage}, labels)
    flipped = [{name: value.flip(0) for name, value in target.items()} for target in labels]
    torch.testing.assert_close(loss({"": stage}, flipped)[0], expected)
    shuffled = StagePrediction(stage.logits.flip(1), stage.boxes.flip(1))
    torch.testing.assert_close(loss({"": shuffled}, labels)[0], expected)


def test_an_image_is_matched_as_if_it_were_alone():
    model, images, labels = small_model(), pixels(3), targets(2, 0, 3)
    together = model(images, labels=labels).loss_dict
    alone = [model(images[i : i + 1], labels=labels[i : i + 1]).loss_dict for i in range(3)]
    for name in ("loss_bbox", "loss_giou", "loss_mask_ce", "loss_mask_dice_0", "loss_ce_enc"):
        parts = [part[name] * max(1, count) for part, count in zip(alone, (2, 0, 3), strict=True)]
        torch.testing.assert_close(together[name] * 5, sum(parts), rtol=1e-4, atol=1e-5, msg=name)


def test_an_evaluation_loss_can_be_repeated_and_a_training_loss_draws_new_points():
    model = small_model()
    assert torch.equal(model(pixels(), labels=targets(2, 1)).loss, model(pixels(), labels=targets(2, 1)).loss)
    assert not torch.equal(random_points(1, 5, CPU), random_points(1, 5, CPU))
    assert torch.equal(fixed_points(2, 5, CPU)[0], fixed_points(1, 9, CPU)[0, :5])
    model.train()
    assert not torch.equal(model(pixels(), labels=targets(2, 1)).loss, model(pixels(), labels=targets(2, 1)).loss)


def test_more_objects_than_queries_are_matched_as_far_as_queries_go():
    outputs = small_model()(pixels(1), labels=targets(9))
    assert torch.isfinite(outputs.loss)


def test_target_masks_of_any_size_give_nearly_the_same_loss():
    model = small_model()
    small = model(pixels(), labels=targets(2, 1, size=(48, 48))).loss
    large = model(pixels(), labels=targets(2, 1, size=(480, 240))).loss
    torch.testing.assert_close(large, small, rtol=0.02, atol=0)


def test_the_normaliser_counts_objects_times_groups_and_can_be_given():
    labels = targets(3, 2)
    assert count_boxes(labels, 13, CPU, across_ranks=False) == 65
    assert count_boxes(targets(0, 0), 13, CPU, across_ranks=True) == 1
    stage = {"": perfect(labels, 10, 4)}
    halved, _ = loss(stage, labels, num_boxes=torch.tensor(10.0))
    torch.testing.assert_close(halved * 2, loss(stage, labels)[0])


def test_the_loss_dict_holds_unweighted_detached_float32_scalars():
    total, parts = loss({"": perfect(targets(3, 2), 10, 4)}, targets(3, 2))
    assert all(value.dtype == torch.float32 and value.ndim == 0 and not value.requires_grad for value in parts.values())
    weights = LossWeights()
    expected = sum(getattr(weights, name) * value for name, value in parts.items() if name.startswith("loss"))
    torch.testing.assert_close(total, expected)


# -- extreme, broken, empty ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extreme", [6.25, 8.0, 16.0, 100.0, 65504.0, 3e38])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_loss_and_its_gradients_are_finite_for_every_finite_prediction(extreme, sign):
    labels = targets(2, 1)
    logits = torch.full((2, 6, 4), sign * extreme, requires_grad=True)
    boxes = torch.rand(2, 6, 4)
    boxes[:, :, 2:] = extreme if sign > 0 else -extreme
    boxes.requires_grad_()
    queries = torch.full((2, 6, 5), sign * min(extreme, 1e15), requires_grad=True)
    pixel_features = torch.full((2, 5, 12, 12), min(extreme, 1e15), requires_grad=True)
    total, parts = loss({"": StagePrediction(logits, boxes, MaskFactors(pixel_features, queries, as_they_are))}, labels)
    assert torch.isfinite(total), parts
    total.backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (logits, boxes, queries, pixel_features))


@pytest.mark.parametrize("scale", [1e10, 1e20, 3e37])
def test_mask_factors_whose_product_overflows_have_a_finite_loss(scale):
    generator = torch.Generator().manual_seed(0)
    stage = perfect(targets(2, 1), 6, 4)
    queries = (scale * torch.randn(2, 6, 5, generator=generator)).requires_grad_()
    pixel_features = (scale * torch.randn(2, 5, 12, 12, generator=generator)).requires_grad_()
    total, parts = loss({"": stage._replace(masks=MaskFactors(pixel_features, queries, as_they_are))}, targets(2, 1))
    assert torch.isfinite(total)
    assert parts["non_finite_predictions"] == 0
    total.backward()
    assert torch.isfinite(queries.grad).all()
    assert torch.isfinite(pixel_features.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_at_the_ends_of_their_range_have_a_finite_loss(dtype):
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[largest, -largest, 0.0, 1.0]], dtype=dtype).expand(2, 6, 4)
    stage = StagePrediction(logits, torch.rand(2, 6, 4, dtype=dtype))
    total, _ = loss({"": stage}, targets(2, 1))
    assert total.dtype == torch.float32
    assert torch.isfinite(total)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["logits", "boxes", "queries", "pixels"])
def test_a_broken_prediction_is_counted_and_leaves_the_loss_not_finite(field, value):
    labels = targets(2, 1)
    stage = perfect(labels, 6, 4)
    broken = {
        "logits": stage.logits,
        "boxes": stage.boxes,
        "queries": stage.masks.queries,
        "pixels": stage.masks.pixels,
    }
    broken[field][1, -1] = value  # an unmatched query of the second image, or a channel of its pixels
    total, parts = loss({"": stage}, labels)
    assert not torch.isfinite(total)
    assert parts["non_finite_predictions"] == (6 if field == "pixels" else 1)


def test_a_broken_prediction_of_any_stage_is_counted():
    stage, enc = perfect(targets(2, 1), 6, 4), perfect(targets(2, 1), 6, 4)
    enc.masks.queries[1, -1, 0] = float("nan")
    total, parts = loss({"": stage, "_enc": enc}, targets(2, 1))
    assert not torch.isfinite(total)
    assert parts["non_finite_predictions"] == 1


def test_predictions_that_are_all_nan_do_not_stop_the_matcher():
    stage = StagePrediction(torch.full((1, 6, 4), float("nan")), torch.full((1, 6, 4), float("nan")))
    total, parts = loss({"": stage}, targets(3))
    assert torch.isnan(total)
    assert parts["non_finite_predictions"] == 6


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_images_and_batches_give_a_scalar_that_reaches_every_parameter(kind, counts, training):
    model = small_model(kind).train(training)
    outputs = model(pixels(), labels=targets(*counts))
    assert outputs.loss.shape == ()
    assert torch.isfinite(outputs.loss)
    outputs.loss.backward()
    if training:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert [name for name in trained if model.get_parameter(name).grad is None] == []


@pytest.mark.parametrize("label", [-1, 4, 90])
def test_a_label_outside_the_classes_is_refused_by_name(kind, label):
    labels = targets(2, 1)
    labels[1]["class_labels"][0] = label
    with pytest.raises(ValueError, match=rf"labels\[1\]\['class_labels'\]\[0\]`.* 3, got {label}"):
        small_model(kind)(pixels(), labels=labels)


def test_targets_that_cannot_be_trained_on_are_refused_by_name():
    model = small_model()
    with pytest.raises(ValueError, match=r"`labels`.* 2 images, got 1"):
        model(pixels(), labels=targets(1))
    without = targets(1, 1)
    del without[0]["masks"]
    with pytest.raises(ValueError, match=r"labels\[0\]`.*'masks'.*return_segmentation_masks=True"):
        model(pixels(), labels=without)
    uneven = targets(2, 1)
    uneven[0]["boxes"] = uneven[0]["boxes"][:1]
    with pytest.raises(ValueError, match=r"labels\[0\]`.*'boxes': 1"):
        model(pixels(), labels=uneven)
    broken = targets(2, 1)
    broken[0]["boxes"][1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"labels\[0\]\['boxes'\]\[1\]`.*finite.*, got \[.*nan"):
        model(pixels(), labels=broken)


@pytest.mark.parametrize("value", [255, 1])
def test_integer_masks_mean_the_object_where_they_are_not_0(value):
    model, labels = small_model(), targets(2, 1)
    as_png = [target | {"masks": target["masks"].to(torch.uint8) * value} for target in labels]
    assert torch.equal(model(pixels(), labels=as_png).loss, model(pixels(), labels=labels).loss)


def test_the_usual_empty_labels_are_legal():
    empty = {"class_labels": torch.tensor([]), "boxes": torch.zeros(0, 4), "masks": torch.zeros(0)}
    labels = [targets(1)[0], empty]
    assert torch.isfinite(small_model()(pixels(), labels=labels).loss)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("masks", torch.rand(2, 48, 48), r"a tensor \(T, H, W\) of bool.*, got torch.float32 \(2, 48, 48\)"),
        ("masks", torch.zeros(2, 1, 48, 48, dtype=torch.bool), r"got .*\(2, 1, 48, 48\)"),
        ("masks", torch.zeros(2, 0, 0, dtype=torch.bool), r"got .*\(2, 0, 0\)"),
        ("class_labels", torch.tensor([True, False]), "an integer tensor.*, got torch.bool"),
        ("class_labels", [0, 1], "an integer tensor.*, got list"),
        ("boxes", torch.rand(2, 5), r"a float tensor \(T, 4\), got .*\(2, 5\)"),
        ("boxes", torch.tensor([[20.0, 20.0, 9.0, 9.0], [0.5, 0.5, 0.1, 0.1]]), "got .20.0, 20.0"),
    ],
)
def test_a_field_of_another_kind_is_refused_by_name(field, value, words):
    labels = targets(2, 1)
    labels[0][field] = value
    with pytest.raises(ValueError, match=rf"labels\[0\]\['{field}'\].*{words}"):
        small_model()(pixels(), labels=labels)


def test_small_integers_are_class_labels_too():
    labels = targets(2, 1)
    expected = small_model()(pixels(), labels=labels).loss
    labels[0]["class_labels"] = labels[0]["class_labels"].to(torch.uint8)
    assert torch.equal(small_model()(pixels(), labels=labels).loss, expected)


def test_the_loss_is_computed_in_float32_inside_autocast():
    labels = targets(2, 1)
    generator = torch.Generator().manual_seed(0)
    features, queries = torch.randn(2, 5, 12, 12, generator=generator), torch.randn(2, 6, 5, generator=generator)
    masks = MaskFactors(features, queries, as_they_are)
    stage = StagePrediction(torch.randn(2, 6, 4, generator=generator), torch.rand(2, 6, 4, generator=generator), masks)
    expected, _ = loss({"": stage}, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = loss({"": stage}, labels)
    assert torch.equal(inside, expected)


@pytest.mark.parametrize(
    ("field", "term"),
    [
        ("class_loss_coefficient", "loss_ce"),
        ("bbox_loss_coefficient", "loss_bbox"),
        ("giou_loss_coefficient", "loss_giou"),
        ("mask_class_loss_coefficient", "loss_mask_ce"),
        ("mask_dice_loss_coefficient", "loss_mask_dice"),
    ],
)
def test_each_weight_of_the_configuration_weighs_its_loss(field, term):
    labels = targets(6, 6)  # as many objects as queries: all are matched, whatever the costs
    plain = small_model(auxiliary_loss=False)(pixels(), labels=labels)
    model = small_model(auxiliary_loss=False)
    setattr(model.config, field, 1e6)
    weighted = model(pixels(), labels=labels)
    terms = [value for name, value in weighted.loss_dict.items() if name.removesuffix("_enc") == term]
    assert len(terms) == 2
    assert weighted.loss > plain.loss
    torch.testing.assert_close(weighted.loss, 1e6 * sum(terms), rtol=1e-3, atol=0)


@pytest.mark.parametrize("field", ["class_cost", "bbox_cost", "giou_cost", "focal_alpha"])
def test_each_cost_of_the_configuration_changes_the_matching(field):
    model, labels = small_model(), targets(3, 3)
    plain = model(pixels(), labels=labels).loss_dict
    setattr(model.config, field, 0.9 if field == "focal_alpha" else 1000.0)
    assert any(not torch.equal(plain[name], value) for name, value in model(pixels(), labels=labels).loss_dict.items())


def test_without_auxiliary_losses_only_the_last_layer_and_the_first_stage_are_supervised():
    parts = small_model(auxiliary_loss=False)(pixels(), labels=targets(2, 1)).loss_dict
    assert "loss_ce_enc" in parts
    assert not any(name.endswith("_0") for name in parts)
    assert "loss_ce_0" in small_model()(pixels(), labels=targets(2, 1)).loss_dict
