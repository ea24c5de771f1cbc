"""rf-detr-seg-tiny detects the same in transformers' port and in rfdetr.

rfdetr offers encoders of width 384 and 768 only; here its modules are built with the width and the depth of the tiny.
"""

from dataclasses import replace

import pytest
import torch
from rfdetr.models._defaults import MODEL_DEFAULTS
from rfdetr.models.lwdetr import build_model_from_config

from transformers_rfdetr import load, tiny_checkpoint
from transformers_rfdetr.data.synthetic import draw_scene

from peer import narrow_dinov2, peer_config, record_choices, replay_choices

SEEDS = (2_000_000, 2_000_001, 2_000_004)


@pytest.fixture(scope="module")
def tiny():
    return load("rf-detr-seg-tiny")


@pytest.fixture(scope="module")
def pixels(tiny) -> torch.Tensor:
    images = [draw_scene(seed, (144, 144))[0] for seed in SEEDS]
    return tiny[1](images, return_tensors="pt")["pixel_values"]


def detections(logits: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return scores, labels, boxes and masks above a score of 0.5, of each image."""
    found = []
    for one_logits, one_boxes, one_masks in zip(logits, boxes, masks, strict=True):
        scores, labels = one_logits.sigmoid().max(-1)
        keep = scores > 0.5
        found.append((scores[keep], labels[keep], one_boxes[keep], one_masks[keep] > 0))
    return found


def assert_same(ours, theirs) -> None:
    assert sum(len(scores) for scores, *_ in ours) > 10
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[0], other[0], atol=1e-4, rtol=0)
        assert torch.equal(mine[1], other[1])
        torch.testing.assert_close(mine[2], other[2], atol=1e-4, rtol=0)
        assert (mine[3] != other[3]).float().mean() < 1e-3


def test_the_port_detects_the_same(tiny, pixels):
    port = pytest.importorskip("transformers.models.rf_detr")
    model = port.RfDetrForInstanceSegmentation.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()
    with torch.no_grad():
        outputs, expected = tiny[0](pixels), model(pixels)
    ours = detections(outputs.logits, outputs.pred_boxes, outputs.pred_masks)
    assert_same(ours, detections(expected.logits, expected.pred_boxes, expected.pred_masks))


def test_rfdetr_detects_the_same_with_the_converted_weights(tiny, pixels):
    model, _ = tiny
    config = model.config
    settings = peer_config("rf-detr-seg-nano", config)
    settings.mask_downsample_ratio = config.mask_downsample_ratio
    defaults = replace(MODEL_DEFAULTS, dim_feedforward=config.decoder_ffn_dim)
    with narrow_dinov2(config):
        peer = build_model_from_config(settings, defaults=defaults)
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    assert (set(missing), unexpected) == ({"_kp_active_mask"}, [])
    choices: list[torch.Tensor] = []
    with torch.no_grad():
        with record_choices(choices):
            expected = peer.eval()(pixels)
        with replay_choices(choices):
            outputs = model(pixels)
    ours = detections(outputs.logits, outputs.pred_boxes, outputs.pred_masks)
    assert_same(ours, detections(expected["pred_logits"], expected["pred_boxes"], expected["pred_masks"]))
