"""Losses and gradients of ours and of rfdetr, both taking their random points from one table."""

from unittest import mock

import pytest
import torch

from transformers_rfdetr.model import modeling_rf_detr
from transformers_rfdetr.model.matcher_rf_detr import LossWeights, match

import peer
from peer import (
    every_branch,
    peer_criterion,
    random_targets,
    record_choices,
    replay_choices,
    table_points,
    table_rand,
    twins,
)
from small_models import stand_in_config

COUNTS = [4, 0, 9]  # more objects than queries in one image, none in another


def peer_targets(targets: list[dict]) -> list[dict]:
    return [
        {"labels" if name == "class_labels" else name: value for name, value in target.items()} for target in targets
    ]


def peer_stages(outputs: dict) -> dict:
    stages = {"": outputs} | {f"_{index}": stage for index, stage in enumerate(outputs["aux_outputs"])}
    return stages | {"_enc": outputs["enc_outputs"]}


def compare(
    variant: str, config, training: bool, monkeypatch, counts=COUNTS, dtype=torch.float32, tolerance: float = 1e-4
) -> None:
    theirs_model, settings, ours = (part.to(dtype) if hasattr(part, "to") else part for part in twins(variant, config))
    config = ours.config
    theirs_model.train(training)
    ours.train(training)
    criterion = peer_criterion(settings).train(training)
    side = config.resolution
    pixels = torch.randn(len(counts), 3, side, side, generator=torch.Generator().manual_seed(2)).to(dtype)
    targets = random_targets(config, counts, (side, side))
    for target in targets:
        target["boxes"] = target["boxes"].to(dtype)
    segments = "-seg-" in variant
    if not segments:
        targets = [{name: target[name] for name in ("class_labels", "boxes")} for target in targets]
    for name in ("random_points", "fixed_points"):
        monkeypatch.setattr(modeling_rf_detr, name, table_points)

    choices = []
    with record_choices(choices):
        expected_outputs = theirs_model(pixels)
    theirs = peer_targets(targets)
    with replay_choices(choices):
        base = ours.forward_features(pixels)
    stages = ours.stages(base, (side, side))
    with table_rand():
        expected = criterion(expected_outputs, theirs)
        groups = config.group_detr if training else 1
        for suffix, stage in peer_stages(expected_outputs).items():
            pairs = criterion.matcher(stage, theirs, group_detr=groups)
            mine = match(
                {suffix: stages[suffix]},
                targets,
                num_groups=groups,
                weights=LossWeights(),
                points=table_points,
                mask_point_sample_ratio=16,
            )
            for (queries, objects), (peer_queries, peer_objects) in zip(mine[suffix], pairs, strict=True):
                assert set(zip(queries.tolist(), objects.tolist(), strict=True)) == set(
                    zip(peer_queries.tolist(), peer_objects.tolist(), strict=True)
                ), f"stage {suffix!r} is matched otherwise"
    assert sum(counts) == 0 or any(len(queries) for queries, _ in pairs)

    with mock.patch.object(ours, "forward_features", return_value=base):
        outputs = ours(pixels, labels=targets)
    for suffix in peer_stages(expected_outputs):
        names = ["loss_ce", "loss_bbox", "loss_giou"] + ["loss_mask_ce", "loss_mask_dice"] * segments
        for name in names:
            torch.testing.assert_close(
                outputs.loss_dict[name + suffix],
                expected[name + suffix].detach(),
                rtol=tolerance,
                atol=1e-7,
                check_dtype=False,
            )
    for name in ("cardinality_error", "class_error"):
        torch.testing.assert_close(outputs.loss_dict[name], expected[name].detach(), check_dtype=False)

    total = sum(criterion.weight_dict[name] * loss for name, loss in expected.items() if name in criterion.weight_dict)
    torch.testing.assert_close(outputs.loss, total, rtol=tolerance, atol=1e-7, check_dtype=False)
    total.backward()
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs_model.named_parameters()}
    largest = max(gradient.norm() for gradient in gradients.values() if gradient is not None)
    trained = [(name, parameter) for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert len(trained) > 100
    errors = {}
    for name, parameter in trained:
        if gradients[name] is None:  # in evaluation: heads of the groups that do not run
            assert parameter.grad is None, name
            continue
        # A gradient that cancels to nothing is known as well as the terms that cancel: 1e-6 of the largest of all.
        scale = gradients[name].norm() + 0.01 * largest
        errors[name] = ((parameter.grad - gradients[name]).norm() / scale).item()
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_branch
def test_losses_and_gradients_of_every_stage_agree(variant, training, monkeypatch):
    compare(variant, stand_in_config(variant), training, monkeypatch)


def test_losses_agree_with_fewer_patches_than_queries(monkeypatch):
    config = stand_in_config("rf-detr-seg-medium", grid=4, num_queries=30)
    compare("rf-detr-seg-medium", config, True, monkeypatch)


def test_losses_agree_with_two_feature_levels_and_masks(monkeypatch):
    config = stand_in_config("rf-detr-seg-medium", grid=4, projector_scale=["P3", "P5"])
    compare("rf-detr-seg-medium", config, True, monkeypatch)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_batch_without_objects_costs_the_same(training, monkeypatch):
    compare("rf-detr-nano", stand_in_config("rf-detr-nano"), training, monkeypatch, counts=[0, 0])


@pytest.mark.long
@pytest.mark.parametrize(
    "variant", ["rf-detr-seg-nano", "rf-detr-seg-medium", "rf-detr-base", "rf-detr-large-deprecated"]
)
def test_losses_and_gradients_of_the_full_size_model_agree(variant, monkeypatch):
    # In float64. The gradient of a sampling location jumps where the location crosses a pixel centre, and among the
    # 100,000 points of a full-size model some lie within float32's rounding of one.
    # Anchors stay float32, in both alike.
    to_float32 = torch.Tensor.float
    wide = (torch.float64, torch.bool)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double() if x.dtype in wide else to_float32(x))
    monkeypatch.setattr(peer, "_TABLE", peer._TABLE.double())
    compare(variant, None, True, monkeypatch, counts=[3], dtype=torch.float64)
