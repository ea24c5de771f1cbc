"""What other tools expect of a model's modules: hooks, gradients of outputs, adapters, pruning, offloading."""

import pytest
import torch
from torch.nn.utils import prune

from transformers_rfdetr import RfDetrForInstanceSegmentation

from small_models import pixels, small_config, small_model, targets


def modules_with_weights(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if [*module.parameters(recurse=False)]}


def assert_same_outputs(outputs, expected) -> None:
    for name in ("logits", "pred_boxes", "pred_masks"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_fire_on_every_module_with_weights_and_change_no_output(register):
    model, called = small_model(), set()
    expected = model(pixels())
    for name, module in modules_with_weights(model).items():
        getattr(module, register)(lambda *_, name=name: called.add(name))
    assert_same_outputs(model(pixels()), expected)
    model.train()(pixels(), labels=targets(1, 2)).loss.backward()
    assert called == modules_with_weights(model).keys()


@pytest.mark.parametrize("place", ["attention", "attention.output.dense", "mlp.fc2", "layer_scale1"])
def test_one_hook_in_a_block_replaces_the_output_of_its_module(place):
    model = small_model()
    block = model.get_submodule("backbone.0.encoder.encoder.encoder.layer.0")
    expected = model(pixels())
    block.get_submodule(place).register_forward_hook(lambda *arguments: 2 * arguments[2])
    hooked = model(pixels()).backbone_features
    with torch.no_grad():
        block.get_submodule("layer_scale2" if place == "mlp.fc2" else "layer_scale1").lambda1.mul_(2)
    block.get_submodule(place)._forward_hooks.clear()
    torch.testing.assert_close(hooked, model(pixels()).backbone_features, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(hooked, expected.backbone_features, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_loss_reach_every_output_that_it_depends_on(training):
    model = small_model().train(training)
    outputs = model(pixels(), labels=targets(1, 2), output_attentions=True, output_hidden_states=True)
    tensors = {}
    for name, value in outputs.items():
        for index, tensor in enumerate(value if isinstance(value, tuple) else [value]):
            if name not in ("loss", "loss_dict", "enc_indices", "pred_masks"):  # dense masks are not used by the loss
                tensors[f"{name} {index}"] = tensor
                tensor.retain_grad()
    outputs.loss.backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is None] == []


def test_weights_and_outputs_are_the_same_for_the_same_seed_and_no_weight_is_shared():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(RfDetrForInstanceSegmentation(small_config()).eval())
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(models[0](pixels()).pred_masks, models[1](pixels()).pred_masks)
    assert len({tensor.data_ptr() for tensor in first.values()}) == len(first)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["dense", "fc2", "spatial_features_proj", "query_feat"]},
        {"target_modules": ["query"], "modules_to_save": ["class_embed", "bbox_embed", "segmentation_head"]},
    ],
    ids=["all linear layers", "fused layers", "whole heads"],
)
def test_adapters_train_save_load_and_merge(settings, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(small_model(), peft.LoraConfig(r=2, **settings)).train()
    adapted(pixel_values=pixels(), labels=targets(1, 2)).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    changed = adapted.eval()(pixel_values=pixels())
    assert not torch.allclose(changed.logits, small_model()(pixels()).logits, atol=1e-2)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path / "adapter").eval()
    assert_same_outputs(loaded(pixel_values=pixels()), changed)
    merged = loaded.merge_and_unload()
    assert_same_outputs(merged(pixels()), changed)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_outputs(RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "merged")(pixels()), changed)


def test_pruned_weights_are_used():
    model = small_model()
    names = ["backbone.0.encoder.encoder.encoder.layer.0.mlp.fc2", "segmentation_head.spatial_features_proj"]
    for name in names:
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)
    pruned = model(pixels())
    for name in names:
        prune.remove(model.get_submodule(name), "weight")
    assert_same_outputs(pruned, model(pixels()))
    assert not torch.allclose(pruned.pred_masks, small_model()(pixels()).pred_masks, atol=1e-2)


class WithoutWeight(torch.nn.Module):
    """Computes what a module computes, and like the layers of quantisers has no tensor called weight."""

    def __init__(self, module):
        super().__init__()
        self.packed = module

    def forward(self, inputs):
        return self.packed(inputs)


def test_modules_that_a_quantiser_replaces_are_called():
    model, expected = small_model(), small_model()(pixels())
    block = "backbone.0.encoder.encoder.encoder.layer.0"
    for name in (f"{block}.attention.output.dense", f"{block}.mlp.fc2", "segmentation_head.spatial_features_proj"):
        model.set_submodule(name, WithoutWeight(model.get_submodule(name)))
    assert_same_outputs(model(pixels()), expected)


def test_an_offloaded_model_computes_the_same():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(small_model(), execution_device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with torch.no_grad():
        assert_same_outputs(model(pixels()), small_model()(pixels()))
