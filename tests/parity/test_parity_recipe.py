"""The training settings equal those of rfdetr: parameter groups, schedule, scales, EMA."""

from types import SimpleNamespace

import pytest
import torch
from rfdetr.datasets.coco import compute_multi_scale_scales
from rfdetr.training.callbacks.ema import RFDETREMACallback
from rfdetr.training.module_model import _build_managed_scheduler
from rfdetr.training.param_groups import get_param_dict
from torch.optim.swa_utils import AveragedModel

from transformers_rfdetr import RfDetrConfig
from transformers_rfdetr.model.variants_rf_detr import VARIANTS
from transformers_rfdetr.training.optimization import parameter_groups, step_schedule, training_sizes
from transformers_rfdetr.training.weight_average import WeightAverage

from peer import twins
from small_models import stand_in_config

RATES = {
    "learning_rate": 1e-4,
    "learning_rate_encoder": 1.5e-4,
    "layer_decay": 0.8,
    "component_decay": 0.7,
    "weight_decay": 1e-4,
}


def settings_of(model: torch.nn.Module, groups: list[dict], default_decay: float) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group.get("weight_decay", default_decay))
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("variant", ["rf-detr-seg-medium", "rf-detr-base", "rf-detr-large-deprecated"])
def test_each_parameter_learns_and_decays_as_in_the_original(variant):
    peer, _, ours = twins(variant, stand_in_config(variant))
    args = SimpleNamespace(
        lr=RATES["learning_rate"],
        lr_encoder=RATES["learning_rate_encoder"],
        lr_vit_layer_decay=RATES["layer_decay"],
        lr_component_decay=RATES["component_decay"],
        weight_decay=RATES["weight_decay"],
        out_feature_indexes=ours.config.backbone_config.out_indices,
    )
    expected = settings_of(peer, get_param_dict(args, peer), RATES["weight_decay"])
    found = settings_of(ours, parameter_groups(ours, **RATES), None)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained
    assert trained <= expected.keys()
    for name, settings in found.items():
        assert settings == pytest.approx(expected[name], rel=1e-12), name


@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_the_step_schedule_is_the_originals(warmup_steps):
    config = SimpleNamespace(lr_scheduler="step", lr_scheduler_kwargs={"lr_drop": 3})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    [expected] = _build_managed_scheduler(optimizer, config, 50, 10, warmup_steps).lr_lambdas
    factor = step_schedule(warmup_steps, 3 * 10)
    assert [factor(step) for step in range(50)] == [expected(step) for step in range(50)]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_training_draws_from_the_originals_scales(variant):
    config = RfDetrConfig.from_variant(variant)
    backbone = config.backbone_config
    block = backbone.patch_size * backbone.num_windows
    expected = compute_multi_scale_scales(config.resolution, True, backbone.patch_size, backbone.num_windows)
    sizes = training_sizes((config.resolution, config.resolution), block)
    assert sizes == [(side, side) for side in expected]


@pytest.mark.parametrize("tau", [0, 100])
def test_the_average_of_the_weights_is_the_originals(tau):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    callback = RFDETREMACallback(decay=0.9, tau=tau)
    expected = AveragedModel(model, multi_avg_fn=callback._multi_avg_fn)
    average = WeightAverage(model, decay=0.9, tau=tau)
    for step in range(25):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        expected.update_parameters(model)
        average.update()
        state = average.state_dict()
        for name, tensor in expected.module.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6)
