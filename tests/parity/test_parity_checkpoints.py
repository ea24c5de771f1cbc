"""State dicts of rfdetr's classes and ours, both ways."""

import torch
from safetensors.torch import load_file, save_file

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection

from peer import every_branch, record_choices, replay_choices, twins
from small_models import stand_in_config


@every_branch
def test_a_state_dict_goes_from_rfdetr_to_ours_and_back(variant, tmp_path):
    config = stand_in_config(variant)
    peer, _, _ = twins(variant, config)
    kind = RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection
    config.save_pretrained(tmp_path)
    save_file(peer.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    ours, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert [report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]] == []

    ours.save_pretrained(tmp_path / "back")
    state = load_file(tmp_path / "back" / "model.safetensors")
    expected = peer.state_dict()
    assert set(expected) - set(state) == {"_kp_active_mask"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    again, _, _ = twins(variant, config)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["_kp_active_mask"], [])
    images = torch.randn(1, 3, config.resolution, config.resolution, generator=torch.Generator().manual_seed(3))
    choices = []
    with torch.no_grad():
        with record_choices(choices):
            outputs = again.eval()(images)
        with replay_choices(choices):
            mine = ours(images)
    torch.testing.assert_close(mine.logits, outputs["pred_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.pred_boxes, outputs["pred_boxes"], atol=1e-4, rtol=0)
