"""Checkpoints: the four key layouts, tables of other sizes, precision, shards; to the port and back."""

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrForObjectDetection, RfDetrModel
from transformers_rfdetr.model.checkpoint_layouts import is_original_layout, to_original_layout
from transformers_rfdetr.model.variants_rf_detr import VARIANTS

from small_models import pixels, small_config, small_model

# Tensors of the published files, without the derived buffer _kp_active_mask, and parameters in millions.
PUBLISHED = {
    "rf-detr-nano": (465, 30.467),
    "rf-detr-small": (487, 32.111),
    "rf-detr-medium": (509, 33.687),
    "rf-detr-large": (509, 33.933),
    "rf-detr-base": (487, 32.175),
    "rf-detr-large-deprecated": (533, 135.637),
    "rf-detr-seg-preview": (544, 34.154),
    "rf-detr-seg-nano": (544, 33.577),
    "rf-detr-seg-small": (544, 33.711),
    "rf-detr-seg-medium": (572, 35.694),
    "rf-detr-seg-large": (572, 35.874),
    "rf-detr-seg-xlarge": (600, 38.114),
    "rf-detr-seg-2xlarge": (600, 38.648),
}
# The names in a file of rf-detr-seg-medium, with numbers replaced by N.
ORIGINAL_KEYS = """
backbone.N.encoder.encoder.embeddings.cls_token backbone.N.encoder.encoder.embeddings.mask_token
backbone.N.encoder.encoder.embeddings.position_embeddings
backbone.N.encoder.encoder.embeddings.patch_embeddings.projection.*
backbone.N.encoder.encoder.encoder.layer.N.norm1.* backbone.N.encoder.encoder.encoder.layer.N.norm2.*
backbone.N.encoder.encoder.encoder.layer.N.attention.attention.query.*
backbone.N.encoder.encoder.encoder.layer.N.attention.attention.key.*
backbone.N.encoder.encoder.encoder.layer.N.attention.attention.value.*
backbone.N.encoder.encoder.encoder.layer.N.attention.output.dense.*
backbone.N.encoder.encoder.encoder.layer.N.layer_scale1.lambda1
backbone.N.encoder.encoder.encoder.layer.N.layer_scale2.lambda1
backbone.N.encoder.encoder.encoder.layer.N.mlp.fc1.* backbone.N.encoder.encoder.encoder.layer.N.mlp.fc2.*
backbone.N.encoder.encoder.layernorm.*
backbone.N.projector.stages.N.N.cv1.conv.weight backbone.N.projector.stages.N.N.cv1.bn.*
backbone.N.projector.stages.N.N.cv2.conv.weight backbone.N.projector.stages.N.N.cv2.bn.*
backbone.N.projector.stages.N.N.m.N.cv1.conv.weight backbone.N.projector.stages.N.N.m.N.cv1.bn.*
backbone.N.projector.stages.N.N.m.N.cv2.conv.weight backbone.N.projector.stages.N.N.m.N.cv2.bn.*
backbone.N.projector.stages.N.N.* refpoint_embed.weight query_feat.weight
transformer.enc_output.N.* transformer.enc_output_norm.N.* transformer.enc_out_class_embed.N.*
transformer.enc_out_bbox_embed.N.layers.N.*
transformer.decoder.layers.N.self_attn.in_proj_weight transformer.decoder.layers.N.self_attn.in_proj_bias
transformer.decoder.layers.N.self_attn.out_proj.* transformer.decoder.layers.N.cross_attn.sampling_offsets.*
transformer.decoder.layers.N.cross_attn.attention_weights.* transformer.decoder.layers.N.cross_attn.value_proj.*
transformer.decoder.layers.N.cross_attn.output_proj.* transformer.decoder.layers.N.linear1.*
transformer.decoder.layers.N.linear2.* transformer.decoder.layers.N.norm1.* transformer.decoder.layers.N.norm2.*
transformer.decoder.layers.N.norm3.* transformer.decoder.norm.* transformer.decoder.ref_point_head.layers.N.*
class_embed.* bbox_embed.layers.N.* segmentation_head.bias segmentation_head.blocks.N.dwconv.*
segmentation_head.blocks.N.norm.* segmentation_head.blocks.N.pwconv1.* segmentation_head.spatial_features_proj.*
segmentation_head.query_features_block.norm_in.* segmentation_head.query_features_block.layers.N.*
segmentation_head.query_features_proj.*
""".split()  # noqa: SIM905


def assert_same_weights(model, expected) -> None:
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def load(folder, kind=RfDetrForInstanceSegmentation, **kwargs):
    model, report = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    return model, report


def clean(report) -> bool:
    return not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_tensors_and_parameters_of_its_published_file(variant):
    kind = RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection
    with torch.device("meta"):
        model = kind(RfDetrConfig.from_variant(variant))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert (len(model.state_dict()), round(parameters, 3)) == PUBLISHED[variant]


def test_the_state_dict_has_the_original_names():
    with torch.device("meta"):
        model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-medium"))
    names = {re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in model.state_dict()}
    expected = set()
    for name in ORIGINAL_KEYS:
        expected |= {name[:-1] + end for end in ("weight", "bias")} if name.endswith("*") else {name}
    assert names == expected
    assert is_original_layout(model.state_dict())


def test_saving_and_loading_twice_gives_the_model_in_memory(kind, tmp_path):
    model = small_model(kind)
    model.save_pretrained(tmp_path / "first")
    once, report = load(tmp_path / "first", kind)
    assert clean(report)
    once.save_pretrained(tmp_path / "second")
    twice, _ = load(tmp_path / "second", kind)
    assert_same_weights(once, model)
    assert_same_weights(twice, model)
    assert not twice.training
    assert torch.equal(twice(pixels()).logits, model(pixels()).logits)
    assert is_original_layout(load_file(tmp_path / "second" / "model.safetensors"))


def test_a_loaded_model_trains_what_a_new_one_trains(kind, tmp_path):
    model = small_model(kind, backbone_config={"out_indices": [1, 2, 3]})
    model.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, kind)
    frozen = [{name for name, p in m.named_parameters() if not p.requires_grad} for m in (model, loaded)]
    assert frozen[0] == frozen[1] != set()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_or_in_shards_loads_the_same(dtype, tmp_path):
    model = small_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, report = load(tmp_path, dtype="auto")
    assert clean(report)
    assert loaded.dtype == dtype
    assert_same_weights(loaded, model)
    assert load(tmp_path, dtype=torch.float32)[0].dtype == torch.float32


def test_a_prefixed_checkpoint_in_shards_loads_the_same(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    for path in tmp_path.glob("*.safetensors"):
        save_file({"model." + name: tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    loaded, report = load(tmp_path)
    assert clean(report)
    assert_same_weights(loaded, model)
    assert loaded.config.name_or_path == str(tmp_path)


# -- transformers' port ----------------------------------------------------------------------------------------------


@pytest.fixture
def port():
    return pytest.importorskip("transformers.models.rf_detr.modeling_rf_detr")


def port_model(port, kind, folder):
    """The port's model with the weights of ours."""
    small_model(kind).save_pretrained(folder)
    model, report = getattr(port, kind.__name__).from_pretrained(folder, output_loading_info=True)
    return model.eval(), report


@pytest.mark.parametrize("layout", ["original", "module tree", "mixed"])
def test_what_the_port_writes_loads_in_ours(layout, kind, port, tmp_path):
    model, _ = port_model(port, kind, tmp_path / "ours")
    if layout == "original":
        model.save_pretrained(tmp_path / "theirs")
    else:
        model.save_pretrained(tmp_path / "theirs", save_original_format=False)
    if layout == "mixed":
        type(model).from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "theirs")
    loaded, report = load(tmp_path / "theirs", kind)
    assert clean(report)
    assert_same_weights(loaded, small_model(kind))


def test_half_of_each_layout_in_one_file_loads_in_ours(port, tmp_path):
    model, _ = port_model(port, RfDetrForInstanceSegmentation, tmp_path)
    tree = model.state_dict()
    original = small_model().state_dict()
    mixture = {"model." + name: tensor for name, tensor in original.items() if name.startswith("transformer.")}
    names = set(to_original_layout(tree)) - {name.removeprefix("model.") for name in mixture}
    for name, tensor in tree.items():
        if set(to_original_layout({name: tensor} if "self_attn" not in name else {})) & names:
            mixture[name] = tensor
    assert_same_weights_of_dict(to_original_layout(mixture), original)


def assert_same_weights_of_dict(mine, theirs) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_ours_writes_loads_in_the_port_and_computes_the_same(kind, port, tmp_path):
    theirs, report = port_model(port, kind, tmp_path)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = small_model(kind)
    with torch.no_grad():
        expected, outputs = theirs(pixels()), ours(pixels())
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, atol=1e-4, rtol=0)
    if kind is RfDetrForInstanceSegmentation:
        torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "rf-detr-large-deprecated"])
def test_every_variant_but_the_two_level_one_fits_the_port_tensor_by_tensor(variant, port, tmp_path):
    from transformers import AutoConfig  # noqa: F401
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrConfig as PortConfig

    kind = RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection
    config = RfDetrConfig.from_variant(variant)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = getattr(port, kind.__name__)(PortConfig.from_pretrained(tmp_path))
        ours = kind(config)
    expected = {name: tuple(tensor.shape) for name, tensor in to_original_layout(theirs.state_dict()).items()}
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == expected


# -- other sizes -----------------------------------------------------------------------------------------------------


def test_positions_are_interpolated_to_another_size_and_reported(tmp_path, hf_log):
    model = small_model()
    model.save_pretrained(tmp_path)
    backbone = small_config(backbone_config={"image_size": 96}).backbone_config
    larger, report = load(tmp_path, backbone_config=backbone.to_dict(), resolution=96)
    assert clean(report)
    assert "position table: 4x4 patches -> 8x8 patches" in hf_log.text
    assert larger.backbone[0].encoder["encoder"].embeddings.position_embeddings.shape == (1, 65, 32)
    # The same table is interpolated in the forward of the model that keeps its own.
    torch.testing.assert_close(larger(pixels(1, 96, 96)).logits, model(pixels(1, 96, 96)).logits, atol=1e-4, rtol=1e-4)


def test_fewer_queries_are_the_first_of_each_group(kind, tmp_path, hf_log):
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    fewer, report = load(tmp_path, kind, num_queries=4, group_detr=2)
    assert clean(report)
    assert "query_feat.weight: 3 x 6 rows -> 2 x 4" in hf_log.text
    table = model.query_feat.weight.reshape(3, 6, 32)
    assert torch.equal(fewer.query_feat.weight.reshape(2, 4, 32), table[:2, :4])
    name = "transformer.enc_output.1.weight"
    assert torch.equal(fewer.get_parameter(name), model.get_parameter(name))


def test_more_queries_and_groups_repeat_the_stored_ones(tmp_path, hf_log):
    model = small_model()
    model.save_pretrained(tmp_path)
    more, report = load(tmp_path, num_queries=8, group_detr=4)
    assert clean(report)
    assert "first-stage heads: 3 groups -> 4" in hf_log.text
    table, stored = more.query_feat.weight.reshape(4, 8, 32), model.query_feat.weight.reshape(3, 6, 32)
    assert torch.equal(table[3, 6:], stored[0, :2])
    names = [f"transformer.enc_out_class_embed.{group}.bias" for group in (3, 0)]
    assert torch.equal(more.get_parameter(names[0]), model.get_parameter(names[1]))


def test_a_file_with_more_rows_than_its_configuration_says_is_sliced_group_by_group(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    small_config(num_queries=4).save_pretrained(tmp_path)  # as rf-detr-seg-large: 13 x 300 rows, 200 queries
    loaded, report = load(tmp_path)
    assert clean(report)
    assert torch.equal(loaded.query_feat.weight.reshape(3, 4, 32), model.query_feat.weight.reshape(3, 6, 32)[:, :4])


def test_rows_that_do_not_fall_into_groups_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    save_file(state | {"query_feat.weight": state["query_feat.weight"][:17].clone()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"query_feat\.weight.* 3 groups.* 17"):
        load(tmp_path)


@pytest.mark.parametrize(("groups", "queries"), [(6, 3), (2, 9), (1, 18)])
def test_groups_are_those_of_the_first_stage_heads_also_where_the_number_of_rows_agrees(groups, queries, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    stored = model.query_feat.weight.reshape(3, 6, 32)
    from_state = RfDetrForInstanceSegmentation.from_pretrained(
        None, config=small_config(group_detr=groups, num_queries=queries), state_dict=model.state_dict()
    )
    for loaded in (load(tmp_path, group_detr=groups, num_queries=queries)[0], from_state):
        table = loaded.query_feat.weight.reshape(groups, queries, 32)
        for group in range(groups):
            for query in range(queries):
                assert torch.equal(table[group, query], stored[group % 3, query % 6])


HEADS = {f"{head}.{end}" for head in ("class_embed", *(f"transformer.enc_out_class_embed.{g}" for g in range(3)))
         for end in ("weight", "bias")}  # fmt: skip


def test_new_classes_start_with_the_rows_of_the_others_in_turn_and_the_rest_is_kept(kind, tmp_path):
    model = small_model(kind)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        load(tmp_path, kind, num_labels=3)
    stored = model.state_dict()
    for count, rows in ((1, [0]), (3, [0, 1, 2]), (6, [0, 1, 2, 3, 0, 1])):
        loaded, report = load(tmp_path, kind, num_labels=count, ignore_mismatched_sizes=True)
        assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, stored[name][rows] if name in HEADS else stored[name]), name
    assert stored.keys() >= HEADS


def test_a_class_that_is_known_by_name_keeps_its_row(tmp_path, caplog):
    names = {0: "cat", 1: "dog", 2: "cow", 3: "unused 3", 4: "fox", 5: "__background__"}
    model = small_model(num_labels=6, id2label=names)
    model.save_pretrained(tmp_path)
    wanted = {0: "bird", 1: "dog", 2: "cat", 3: "hen", 4: "owl"}
    loaded, _ = load(tmp_path, id2label=wanted, ignore_mismatched_sizes=True)
    for name in HEADS:
        stored, tensor = model.state_dict()[name], loaded.state_dict()[name]
        assert torch.equal(tensor, stored[[2, 1, 0, 4, 2]])  # not of rows that stand for no class
    assert "class heads: 6 classes -> 5, of which kept by name: dog, cat" in caplog.text
    same, _ = load(tmp_path, ignore_mismatched_sizes=True)
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_same_number_of_other_classes_is_fitted_by_name_too(tmp_path):
    model = small_model(num_labels=2, id2label={0: "cat", 1: "dog"})
    model.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, id2label={0: "dog", 1: "cat"}, ignore_mismatched_sizes=True)
    assert torch.equal(loaded.class_embed.weight, model.class_embed.weight.flip(0))


def test_detection_and_segmentation_files_load_into_each_other(tmp_path):
    segmentation = small_model()
    segmentation.save_pretrained(tmp_path / "seg")
    detection, report = load(tmp_path / "seg", RfDetrForObjectDetection)
    assert not report["missing_keys"]
    assert all("segmentation_head." in name for name in report["unexpected_keys"])
    assert torch.equal(detection(pixels()).logits, segmentation(pixels()).logits)
    detection.save_pretrained(tmp_path / "det")
    again, report = load(tmp_path / "det")
    assert all(name.startswith("segmentation_head.") for name in report["missing_keys"])
    assert all(torch.isfinite(tensor).all() for tensor in again.state_dict().values())
    base, report = load(tmp_path / "det", RfDetrModel)
    assert not report["missing_keys"]
    assert torch.equal(base(pixels()).last_hidden_state, detection(pixels()).last_hidden_state)


def test_missing_tensors_are_named_and_initialised_and_loaded_ones_are_kept(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    gone = ["class_embed.bias", "segmentation_head.bias", "transformer.decoder.layers.0.self_attn.in_proj_weight"]
    gone.append("backbone.0.encoder.encoder.embeddings.cls_token")
    save_file({name: tensor for name, tensor in state.items() if name not in gone}, path, {"format": "pt"})
    loaded, report = load(tmp_path)
    assert set(report["missing_keys"]) == set(gone)
    torch.testing.assert_close(loaded.class_embed.bias.data, torch.full((4,), -math.log(99.0)))
    assert all(torch.isfinite(tensor).all() for tensor in loaded.state_dict().values())
    for name, tensor in loaded.state_dict().items():
        assert name in gone or torch.equal(tensor, state[name]), name


def test_a_state_dict_in_any_layout_can_be_given(tmp_path):
    model = small_model()
    state = {"model." + name: tensor for name, tensor in model.state_dict().items()}
    loaded = RfDetrForInstanceSegmentation.from_pretrained(None, config=small_config(), state_dict=state)
    assert_same_weights(loaded, model)
    with pytest.raises(ValueError, match="once"):
        to_original_layout(state | {"class_embed.bias": state["model.class_embed.bias"]})
    with pytest.raises(ValueError, match="must contain q, k and v"):
        to_original_layout({"model.model.decoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})


def test_the_derived_buffer_of_recent_files_is_ignored(tmp_path):
    small_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"_kp_active_mask": torch.zeros(0, 0, dtype=torch.bool)}, path, {"format": "pt"})
    assert clean(load(tmp_path)[1])
    with safe_open(path, framework="pt") as file:
        assert "_kp_active_mask" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("shards", [1, 2])
def test_a_bin_file_is_renamed_and_fitted_too(shards, tmp_path, hf_log):
    model = small_model()
    model.config.save_pretrained(tmp_path)
    state = {"model." + name: tensor for name, tensor in model.state_dict().items()}
    names = ["pytorch_model.bin"] if shards == 1 else ["first.bin", "second.bin"]
    for index, name in enumerate(names):
        torch.save(dict(list(state.items())[index::shards]), tmp_path / name)
    if shards == 2:
        weight_map = {name: names[index % 2] for index, name in enumerate(state)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded, report = load(tmp_path)
    assert clean(report)
    assert_same_weights(loaded, model)
    fewer, report = load(tmp_path, num_queries=4)
    assert clean(report)
    assert torch.equal(fewer.query_feat.weight.reshape(3, 4, 32), model.query_feat.weight.reshape(3, 6, 32)[:, :4])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_folder_inside_a_repository_is_found(prefix, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "inner")
    path = tmp_path / "inner" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    loaded, report = load(tmp_path, subfolder="inner")
    assert clean(report)
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("form", ["ours", "dictionary", "folder", "the port's"])
def test_a_configuration_can_be_given_in_any_form(form, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    if form == "the port's":
        port = pytest.importorskip("transformers.models.rf_detr.configuration_rf_detr")
        config = port.RfDetrConfig.from_pretrained(tmp_path)
    else:
        config = {"ours": model.config, "dictionary": model.config.to_dict(), "folder": str(tmp_path)}[form]
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "model.safetensors")
    loaded, report = load(tmp_path / "weights", config=config)  # a folder without a configuration of its own
    assert clean(report)
    assert_same_weights(loaded, model)


def test_labels_given_while_loading_replace_both_maps(tmp_path):
    small_model().save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, id2label={0: "a", 1: "b", 2: "c", 3: "d"})
    assert loaded.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_a_stored_dropout_is_obeyed_and_reported(tmp_path, hf_log):
    small_model(dropout=0.1).save_pretrained(tmp_path)  # the default of the port
    assert load(tmp_path)[0].config.dropout == 0.1
    assert "trains with dropout 0.1, as stored" in hf_log.text
    assert load(tmp_path, dropout=0.0)[0].config.dropout == 0.0
