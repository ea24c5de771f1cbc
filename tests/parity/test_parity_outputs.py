"""Outputs of ours and of rfdetr with the same random weights."""

import pytest
import torch
from rfdetr.utilities.tensors import NestedTensor

from peer import PEER_CLASSES, record_choices, replay_choices, twins
from small_models import stand_in_config

SEGMENTATION = [name for name in PEER_CLASSES if "-seg-" in name]
BRANCHES = {
    "wide image": ("rf-detr-seg-medium", {"grid": 8}, (72, 120), None),
    "tall image": ("rf-detr-seg-nano", {"grid": 3}, (48, 24), None),
    "interpolated positions": ("rf-detr-base", {"grid": 5}, (112, 112), None),
    "padding": ("rf-detr-seg-medium", {"grid": 8}, (96, 144), (60, 100)),
    "padding on two levels": ("rf-detr-large-deprecated", {"grid": 8}, (112, 168), (60, 100)),
    "three levels": ("rf-detr-seg-medium", {"grid": 4, "projector_scale": ["P3", "P4", "P5"]}, (48, 48), None),
    "register tokens": ("rf-detr-seg-medium", {"backbone_config": {"num_register_tokens": 4}}, (48, 48), None),
    "fewer patches than queries": ("rf-detr-seg-medium", {"grid": 4, "num_queries": 30}, (48, 48), None),
    "invalid anchors at the border of 52 patches": ("rf-detr-seg-xlarge", {"grid": 52}, (624, 624), None),
}


def compare(variant: str, config, size: tuple[int, int], image: tuple[int, int] | None = None) -> None:
    peer, _, ours = twins(variant, config)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, *size, dtype=torch.bool)
    if image is not None:
        padding[1, image[0] :] = True
        padding[1, :, image[1] :] = True
    choices = []
    with torch.no_grad():
        with record_choices(choices):
            expected = peer(pixels if image is None else NestedTensor(pixels, padding))
        with replay_choices(choices):
            outputs = ours(pixels, pixel_mask=(~padding).long())
    assert expected["pred_logits"].std() > 0.1  # a comparison of constants would prove nothing
    torch.testing.assert_close(outputs.logits, expected["pred_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.pred_boxes, expected["pred_boxes"], atol=1e-4, rtol=0)
    if "-seg-" in variant:
        assert expected["pred_masks"].std() > 0.1
        torch.testing.assert_close(outputs.pred_masks, expected["pred_masks"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", PEER_CLASSES)
def test_a_small_model_with_each_variants_branches_computes_the_same(variant):
    config = stand_in_config(variant)
    compare(variant, config, (config.resolution, config.resolution))


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_other_branch_computes_the_same(branch):
    variant, overrides, size, image = BRANCHES[branch]
    compare(variant, stand_in_config(variant, **overrides), size, image)


@pytest.mark.long
@pytest.mark.parametrize("variant", [*SEGMENTATION, "rf-detr-nano", "rf-detr-base", "rf-detr-large-deprecated"])
def test_the_full_size_model_computes_the_same(variant):
    from transformers_rfdetr import RfDetrConfig

    resolution = RfDetrConfig.from_variant(variant).resolution
    compare(variant, None, (resolution, resolution))
