"""The models by themselves: shapes, options, precision, compilation, initial weights."""

import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrForObjectDetection, RfDetrModel
from transformers_rfdetr.model.loss_rf_detr import stage_losses
from transformers_rfdetr.model.mask_head_rf_detr import RfDetrSegmentationHead
from transformers_rfdetr.model.mask_points_rf_detr import fixed_points
from transformers_rfdetr.model.matcher_rf_detr import LossWeights, match
from transformers_rfdetr.model.modeling_rf_detr import RfDetrOutput, encoder_proposals
from transformers_rfdetr.model.modeling_rf_detr_dinov2 import (
    drop_path,
    merge_windows,
    partition_windows,
    resize_position_table,
)
from transformers_rfdetr.model.predictions_rf_detr import StagePrediction

from small_models import pixels, randomised, small_config, small_model, targets


def test_outputs_stand_in_the_documented_order_and_lead_with_the_batch():
    model = small_model()
    outputs = model(pixels(3), labels=targets(1, 0, 2), output_hidden_states=True, output_attentions=True)
    assert list(outputs)[:5] == ["loss", "loss_dict", "logits", "pred_boxes", "pred_masks"]
    assert outputs.logits.shape == (3, 6, 4)
    assert outputs.pred_boxes.shape == (3, 6, 4)
    assert outputs.pred_masks.shape == (3, 6, 12, 12)
    assert outputs.attentions[1].shape == (3, 2, 6, 6)
    assert outputs.cross_attentions[0].shape == (3, 6, 4, 1, 2)
    assert len(outputs.hidden_states) == 3
    for name, value in outputs.items():
        if name not in ("loss", "loss_dict"):
            assert all(tensor.shape[0] == 3 for tensor in (value if isinstance(value, tuple) else [value])), name


def test_the_trainer_keeps_the_loss_dict_logits_boxes_and_masks_and_nothing_else():
    ignored = set(RfDetrConfig.keys_to_ignore_at_inference)
    kept = [name for name in RfDetrOutput.__dataclass_fields__ if name not in ignored]
    assert kept == ["loss", "loss_dict", "logits", "pred_boxes", "pred_masks"]
    assert ignored < set(RfDetrOutput.__dataclass_fields__)


def test_training_runs_all_groups_and_evaluation_the_first(kind):
    model = small_model(kind)
    assert model(pixels()).logits.shape == (2, 6, 4)
    assert model.train()(pixels(), labels=targets(1, 1)).logits.shape == (2, 18, 4)


def test_a_tuple_is_returned_on_request():
    model = small_model()
    loss, loss_dict, logits = model(pixels(), labels=targets(1, 1), return_dict=False)[:3]
    assert loss.ndim == 0
    assert "loss_ce" in loss_dict
    assert logits.shape == (2, 6, 4)


def test_evaluation_materializes_the_masks_of_the_last_layer_only():
    model = small_model()
    with mock.patch.object(
        RfDetrSegmentationHead, "factors", autospec=True, side_effect=RfDetrSegmentationHead.factors
    ) as f:
        model(pixels())
        assert f.call_count == 1
        model(pixels(), labels=targets(1, 1))
        assert f.call_count == 1 + 3  # two decoder layers and the first stage, factored


@pytest.mark.parametrize("size", [(50, 48), (48, 36), (0, 48)])
def test_an_image_that_does_not_tile_is_refused_with_the_legal_sizes(size):
    with pytest.raises(ValueError, match=r"pixel_values.*multiple of 24 .*got \d+.*\d+"):
        small_model()(pixels(height=size[0], width=size[1]))


def test_a_window_partition_keeps_every_patch_in_its_place_in_any_shape():
    grid = torch.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
    windows = partition_windows(grid, 2)
    assert windows[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11]  # top right window of the first image, 2 x 3 patches
    assert torch.equal(merge_windows(windows, (4, 6), 2), grid)


def test_a_position_table_of_the_right_size_is_used_verbatim_and_a_constant_stays_constant():
    table = torch.randn(1, 1 + 16, 3)
    assert resize_position_table(table, (4, 4), (4, 4)) is table
    resized = resize_position_table(torch.full((1, 17, 3), 0.5), (4, 4), (6, 3))
    torch.testing.assert_close(resized, torch.full((1, 19, 3), 0.5))


def test_a_mask_of_ones_changes_no_bit_and_padding_changes_the_result(kind):
    model = small_model(kind)
    images = pixels()
    plain = model(images)
    ones = model(images, pixel_mask=torch.ones(2, 48, 48, dtype=torch.long))
    assert torch.equal(plain.logits, ones.logits)
    assert torch.equal(plain.pred_boxes, ones.pred_boxes)
    with mock.patch("transformers_rfdetr.model.modeling_rf_detr.level_padding_masks", side_effect=AssertionError):
        model(images, pixel_mask=torch.ones(2, 48, 48, dtype=torch.long))  # it costs nothing either
    half = torch.ones(2, 48, 48, dtype=torch.long)
    half[1, 24:] = 0
    padded = model(images, pixel_mask=half)
    assert torch.equal(plain.logits[0], padded.logits[0])
    assert not torch.equal(plain.pred_boxes[1], padded.pred_boxes[1])


def test_a_mask_of_ones_in_a_traced_graph_changes_nothing():
    model = small_model()
    images, ones = pixels(), torch.ones(2, 48, 48, dtype=torch.long)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        traced = model(images, pixel_mask=ones)
    torch.testing.assert_close(traced.pred_boxes, model(images).pred_boxes)


def test_sdpa_and_eager_attention_agree_and_can_be_switched(kind):
    model = small_model(kind)
    function = torch.nn.functional.scaled_dot_product_attention
    outputs = {}
    for implementation, calls in (("eager", 0), ("sdpa", 6)):  # four blocks of the backbone, two decoder layers
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=function) as called:
            outputs[implementation] = model(pixels()).logits
        assert called.call_count == calls
    torch.testing.assert_close(outputs["sdpa"], outputs["eager"], atol=1e-5, rtol=1e-5)


def test_an_attention_function_of_transformers_gets_what_flash_attention_needs(monkeypatch):
    seen = []

    def stand_in(module, queries, keys, values, mask, dropout=0.0, scaling=None, **kwargs):
        seen.append((queries.shape, mask, module.is_causal, scaling))
        weights = (queries @ keys.transpose(-1, -2) * scaling).softmax(-1)
        return (weights @ values).transpose(1, 2), None

    model = small_model()
    expected = model(pixels()).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "stand_in", stand_in)
    model.config._attn_implementation = "stand_in"
    torch.testing.assert_close(model(pixels()).logits, expected, atol=1e-5, rtol=1e-5)
    assert model._supports_flash_attn
    windowed, last = seen[0], seen[-1]
    assert windowed == ((8, 2, 5, 16), None, False, 0.25)  # 2 images x 4 windows, heads, class token and 4 patches
    assert last == ((2, 2, 6, 16), None, False, 0.25)


def test_attention_weights_are_those_that_are_used():
    outputs = small_model()(pixels(), output_attentions=True)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 2, 6))
    torch.testing.assert_close(outputs.cross_attentions[1].sum((-1, -2)), torch.ones(2, 6, 4))
    torch.testing.assert_close(outputs.logits, small_model()(pixels()).logits, atol=1e-5, rtol=1e-5)


def gradients(model, labels):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    model(pixels(), labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients():
    model, labels = small_model().train(), targets(2, 1)
    plain = gradients(model, labels)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # the name since 5.23
    runs = []
    for module in (model.segmentation_head.blocks[0].dwconv, model.transformer.decoder.layers[0].linear1):
        module.register_forward_hook(lambda *_: runs.append(1))
    model.backbone[0].encoder["encoder"].encoder["layer"][0].norm1.register_forward_hook(lambda *_: runs.append(1))
    checkpointed = gradients(model, labels)
    assert len(runs) == 6  # a module of backbone, decoder and mask head, each run twice
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_every_trained_parameter_has_a_gradient_with_and_without_auxiliary_losses(kind):
    for auxiliary in (True, False):
        model = small_model(kind, auxiliary_loss=auxiliary).train()
        missing = [name for name, gradient in gradients(model, targets(2, 1)).items() if gradient is None]
        assert missing == []


def test_freezing_stops_dinov2_and_unfreezing_leaves_what_nothing_reads():
    model = small_model(backbone_config={"out_indices": [1, 2, 3]})
    unread = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all("mask_token" in name or ".layer.3." in name for name in unread)
    assert any(".layer.3." in name for name in unread)
    model.freeze_backbone()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(name.startswith("backbone.0.encoder") for name in trained)
    assert any(name.startswith("backbone.0.projector") for name in trained)
    model.unfreeze_backbone()
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == unread


def test_blocks_after_the_last_tap_are_skipped():
    model = small_model(backbone_config={"out_indices": [1, 2, 3]})
    before = model(pixels()).logits
    with torch.no_grad():
        for parameter in model.backbone[0].encoder["encoder"].encoder["layer"][3].parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(model(pixels()).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_predicts_close_to_float32_and_trains(kind, dtype):
    reference = small_model(kind)(pixels())
    model = small_model(kind).to(dtype)
    outputs = model(pixels().to(dtype))
    assert outputs.logits.dtype == dtype
    assert outputs.pred_boxes.dtype == torch.float32
    # Features, not logits: a rounded score may change the order of two proposals, and with it that of two queries.
    difference = outputs.backbone_features.float() - reference.backbone_features
    assert difference.std() < 0.02 * reference.backbone_features.std()
    loss = model.train()(pixels().to(dtype), labels=targets(2, 0)).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bf16_autocast_trains_a_step_near_the_float32_loss(kind):
    model = small_model(kind).train()
    torch.manual_seed(0)
    expected = model(pixels(), labels=targets(2, 3)).loss
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(pixels(), labels=targets(2, 3)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_stochastic_depth_drops_rows_and_keeps_the_expectation():
    model = small_model(backbone_config={"drop_path_rate": 0.5})
    rates = [layer.drop_path_rate for layer in model.backbone[0].encoder["encoder"].encoder["layer"]]
    assert rates == pytest.approx([0.0, 0.5 / 3, 1.0 / 3, 0.5])
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(10_000, 3), 0.25, training=True)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropped[:, 0], dropped[:, 2])
    assert torch.equal(drop_path(torch.ones(4, 3), 0.25, training=False), torch.ones(4, 3))
    assert torch.equal(model(pixels()).logits, small_model()(pixels()).logits)
    model.train()
    assert not torch.equal(model.backbone[0](pixels())[0], model.backbone[0](pixels())[0])


def test_decoder_dropout_works_in_training_only():
    layer = small_model(dropout=0.5).transformer.decoder.layers[0]
    content = torch.randn(1, 6, 32)
    arguments = (content, content, torch.full((1, 6, 1, 4), 0.5), torch.randn(1, 16, 32), [(4, 4)], None, 1, False)
    assert torch.equal(layer(*arguments)[0], layer(*arguments)[0])
    layer.train()
    assert not torch.equal(layer(*arguments)[0], layer(*arguments)[0])


def test_two_feature_levels_run_and_train(kind):
    model = small_model(kind, projector_scale=["P3", "P5"])
    outputs = model(pixels(), labels=targets(2, 1), output_attentions=True)
    assert outputs.backbone_features.shape == (2, 32, 8, 8)
    assert outputs.cross_attentions[0].shape == (2, 6, 4, 2, 2)
    missing = [name for name, gradient in gradients(model.train(), targets(2, 1)).items() if gradient is None]
    assert missing == []


def test_a_quantised_backbone_can_be_frozen_and_unfrozen():
    model = small_model()
    dense = model.backbone[0].encoder["encoder"].encoder["layer"][0].mlp["fc1"]
    dense.weight = torch.nn.Parameter(torch.zeros(dense.weight.shape, dtype=torch.int8), requires_grad=False)
    model.freeze_backbone()
    model.unfreeze_backbone()
    assert not dense.weight.requires_grad
    assert dense.bias.requires_grad


def test_the_initial_weights_are_those_of_the_paper():
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(small_config())
    state = model.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    heads = ["class_embed", *(f"transformer.enc_out_class_embed.{group}" for group in range(3))]
    for head in heads:
        torch.testing.assert_close(state[f"{head}.bias"], torch.full((4,), -math.log(99.0)))
        assert state[f"{head}.weight"].std() > 0
    for name in (
        "bbox_embed.layers.2.weight",
        "transformer.enc_out_bbox_embed.1.layers.2.bias",
        "refpoint_embed.weight",
    ):
        assert not state[name].any(), name
    assert state["query_feat.weight"].std() == pytest.approx(1.0, rel=0.1)
    offsets = state["transformer.decoder.layers.0.cross_attn.sampling_offsets.bias"].reshape(4, 1, 2, 2)
    torch.testing.assert_close(offsets[1, 0], torch.tensor([[0.0, 1.0], [0.0, 2.0]]))  # head 1 looks down
    assert state["backbone.0.encoder.encoder.encoder.layer.0.layer_scale1.lambda1"].eq(1).all()
    width = state["backbone.0.encoder.encoder.encoder.layer.0.mlp.fc1.weight"].std()
    assert width == pytest.approx(0.02, rel=0.1)
    settings = {"initializer_range": 0.5, "layerscale_value": 0.1}
    other = RfDetrForInstanceSegmentation(small_config(backbone_config=settings)).state_dict()
    assert other["backbone.0.encoder.encoder.encoder.layer.0.mlp.fc1.weight"].std() > 0.3
    assert other["backbone.0.encoder.encoder.encoder.layer.3.layer_scale2.lambda1"].eq(0.1).all()
    # Xavier: uniform within sqrt(6 / (in + out)).
    bound = math.sqrt(6 / (32 + 64))
    linear = state["transformer.decoder.layers.0.linear1.weight"].abs().max()
    assert 0.9 * bound < linear <= bound


def test_an_untrained_model_predicts_each_proposal_unchanged():
    torch.manual_seed(0)
    outputs = RfDetrForObjectDetection(small_config()).eval()(pixels())
    torch.testing.assert_close(outputs.pred_boxes, outputs.init_reference_points)
    torch.testing.assert_close(outputs.pred_boxes[..., 2:], torch.full((2, 6, 2), 0.05))


def test_the_base_model_reads_the_same_parameters():
    model = small_model()
    base = RfDetrModel(small_config()).eval()
    base.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in base.state_dict()})
    assert torch.equal(base(pixels()).last_hidden_state, model(pixels()).last_hidden_state)


# Tracing takes most of the time here: one windowed and one global block.
SHALLOW = {"backbone_config": {"num_hidden_layers": 2, "out_indices": [1, 2]}}
# The graph of a detection model is a part of that of a segmentation model.
graphs = pytest.mark.parametrize(
    "kind",
    [RfDetrForInstanceSegmentation, pytest.param(RfDetrForObjectDetection, marks=pytest.mark.long)],
    ids=["segmentation", "detection"],
)


@pytest.mark.long
@graphs
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_evaluation_forward_compiles_into_one_graph(kind):
    model = small_model(kind, **SHALLOW)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, outputs = model(pixels()), compiled(pixels())
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_training_step_has_the_same_gradients_and_any_number_of_objects_without_compiling_anew():
    model = small_model().train()
    expected = gradients(model, targets(2, 1))
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, targets(2, 1))
    for name, gradient in expected.items():
        other = found[f"_orig_mod.{name}"]
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for counts in ((5, 0), (0, 0), (1, 7)):
        gradients(compiled, targets(*counts))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiled_evaluation_forward_computes_the_same(kind, dynamic):
    torch.compiler.reset()  # which has a limit of compilations in a process
    model = small_model(kind)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for size in [(2, 48, 48), (1, 48, 48), (3, 96, 120)][: 3 if dynamic else 1]:
        with torch.no_grad():
            expected, outputs = model(pixels(*size)), compiled(pixels(*size))
        torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)


@graphs
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_evaluation_forward_exports_for_any_batch_and_any_legal_size(kind):
    model = small_model(kind, **SHALLOW)
    batch, height, width = (torch.export.Dim(name, min=1, max=16) for name in ("batch", "height", "width"))
    shapes = {"pixel_values": {0: batch, 2: 24 * height, 3: 24 * width}}
    with torch.no_grad():
        program = torch.export.export(model, (pixels(2, 72, 96),), dynamic_shapes=shapes).module()
        for size in [(1, 48, 48), (5, 96, 120), (2, 72, 96)]:  # the first has the size of the position table
            expected, outputs = model(pixels(*size)), program(pixels(*size))
            torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Sees every operation, forward and backward, and keeps the largest number of elements that one returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return result


def test_a_training_step_forms_no_mask_of_every_query_and_group():
    model = small_model(num_queries=50, group_detr=13, mask_downsample_ratio=1).train()
    labels = targets(2, 1)
    with LargestTensor() as seen:
        model(pixels(), labels=labels).loss.backward()
    dense = 2 * 13 * 50 * 48 * 48  # one layer's masks; the port forms them for every layer
    assert seen.largest < dense / 10


def assert_equal_gradients(losses, inputs):
    mine, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_projecting_the_queries_is_projecting_every_pixel_with_its_gradients():
    head = small_model().segmentation_head
    features, queries = torch.randn(2, 32, 7, 9, requires_grad=True), torch.randn(2, 5, 32, requires_grad=True)
    masks = head.factors(features, queries).logits()
    hook = head.spatial_features_proj.register_forward_hook(lambda *_: None)  # it makes the head project every pixel
    plain = head.factors(features, queries).logits()
    hook.remove()
    torch.testing.assert_close(masks, plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(masks)
    inputs = [
        features,
        queries,
        head.bias,
        *head.spatial_features_proj.parameters(),
        *head.query_features_proj.parameters(),
    ]
    assert_equal_gradients([(weights * masks).sum(), (weights * plain).sum()], inputs)


def test_the_first_stage_computes_chosen_tokens_as_it_would_all_with_its_gradients():
    transformer = small_model().transformer
    memory = torch.randn(2, 16, 32, requires_grad=True)
    anchors, invalid = encoder_proposals([(4, 4)], None, torch.device("cpu"))
    *chosen, which = transformer.select_two_stage_proposals(memory, anchors, invalid, 3)
    stages = []
    for group in range(3):  # the plain definition: everything of every token, then the best
        tokens, logits, boxes = transformer.predict_proposals(memory.masked_fill(invalid, 0.0), anchors, group)
        boxes = boxes.expand(2, -1, -1)
        best = logits.amax(-1).topk(6, dim=1).indices[..., None]
        assert torch.equal(best[..., 0], which[:, 6 * group : 6 * group + 6])
        stages.append([rows.gather(1, best.expand(-1, -1, rows.shape[-1])) for rows in (tokens, logits, boxes)])
    plain = [torch.cat(parts, dim=1) for parts in zip(*stages, strict=True)]
    inputs = [memory, *(parameter for name, parameter in transformer.named_parameters() if name.startswith("enc_"))]
    weights = [torch.randn_like(part) for part in plain]
    losses = [sum((w * part).sum() for w, part in zip(weights, parts, strict=True)) for parts in (chosen, plain)]
    for mine, theirs in zip(chosen, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert_equal_gradients(losses, inputs)


def a_step(model):
    """(loss, gradients, FLOPs, kept bytes) of a training step."""
    torch.manual_seed(0)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(pixels(), labels=targets(2, 1)).loss
        bytes_kept = sum(storage.nbytes() for storage in kept.values())
        loss.backward()
    return loss, [p.grad for p in model.parameters()], counter.get_total_flops(), bytes_kept


def test_repeating_cheap_steps_keeps_less_and_changes_no_number_and_no_matrix_product(monkeypatch):
    model = small_model().train()
    loss, found, flops, kept = a_step(model)
    model.zero_grad()
    for module in ("mask_head_rf_detr", "modeling_rf_detr_dinov2"):
        monkeypatch.setattr(f"transformers_rfdetr.model.{module}.checkpointed", lambda function, x: function(x))
    plain_loss, expected, plain_flops, plain_kept = a_step(model)
    assert torch.equal(loss, plain_loss)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert flops == plain_flops
    assert kept < 0.95 * plain_kept


def test_the_vectors_of_masks_have_a_graph_for_matched_queries_only():
    model = small_model(num_queries=50).train()
    rows = []
    linear = model.segmentation_head.query_features_proj
    linear.register_forward_hook(
        lambda module, inputs, output: rows.append(output.numel() // 32) if output.requires_grad else None
    )
    model(pixels(), labels=targets(2, 1)).loss.backward()
    assert rows == [(2 + 1) * 3] * 3  # objects x groups, for each of two layers and the first stage


def test_the_losses_of_matched_boxes_form_no_square_matrix():
    count = 2000
    stage = StagePrediction(torch.zeros(1, count, 4), torch.rand(1, count, 4))
    pairs, labels = [(torch.arange(count), torch.arange(count))], targets(count, size=(2, 2))
    settings = {"points": fixed_points, "mask_point_sample_ratio": 16}
    with LargestTensor() as seen:
        losses = stage_losses(stage, labels, pairs, pairs, num_boxes=torch.tensor(1), weights=LossWeights(), **settings)
    assert torch.isfinite(losses["loss_giou"])
    assert seen.largest <= 4 * count


def test_the_matcher_looks_at_as_many_points_whatever_the_batch():
    model, asked = small_model(), []

    def points(num_sets: int, num_points: int, device: torch.device) -> torch.Tensor:
        asked.append((num_sets, num_points))
        return fixed_points(num_sets, num_points, device)

    for batch in (1, 4):
        stages = model.stages(model.forward_features(pixels(batch)), (48, 48))
        labels = targets(*[2] * batch)
        match({"": stages[""]}, labels, num_groups=1, weights=LossWeights(), points=points, mask_point_sample_ratio=16)
    assert asked == [(1, 9), (1, 9)]  # 12 x 12 mask pixels / 16


def test_torchs_flop_counter_runs_under_no_grad(kind):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small_model(kind)(pixels())
    assert counter.get_total_flops() > 0


def test_more_queries_than_patches_is_no_error(kind):
    outputs = small_model(kind, num_queries=30)(pixels(), labels=targets(2, 1))
    assert outputs.logits.shape == (2, 30, 4)
    assert outputs.enc_outputs_class.shape == (2, 16, 4)
    assert torch.isfinite(outputs.loss)


def test_randomised_models_differ_from_initial_ones():
    fresh = RfDetrForObjectDetection(small_config())
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    assert not any(torch.equal(tensor, before[name]) for name, tensor in randomised(fresh).state_dict().items())
