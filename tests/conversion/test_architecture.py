"""The architecture of a checkpoint: what shapes and stored arguments determine, and what they contradict."""

import tracemalloc

import pytest
import torch

from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from transformers_rfdetr.conversion import architecture
from transformers_rfdetr.conversion.architecture import read_config
from transformers_rfdetr.conversion.convert import convert_to_rfdetr, convert_to_transformers
from transformers_rfdetr.model.variants_rf_detr import VARIANTS

from rfdetr_files import POSITIONS, best_file, legacy, model_of, nested, weights_in


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shapes_of_a_published_model_determine_its_configuration(variant):
    published = RfDetrConfig.from_variant(variant)
    with torch.device("meta"):
        kind = RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection
        state = kind(published).state_dict()
    if variant == "rf-detr-seg-large":  # the published file has more rows than the class of its name
        for name in ("query_feat.weight", "refpoint_embed.weight"):
            state[name] = state[name].new_empty(13 * 300, state[name].shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architecture.ENCODERS, "dinov2_windowed_small", (384, 6, 0))
        changes = []
        config = read_config(state, {}, None, is_published=variant == "rf-detr-seg-large", changes=changes)
    config.id2label = published.id2label
    config.label2id = published.label2id
    assert config.to_dict() == published.to_dict()
    if variant == "rf-detr-seg-large":
        assert changes == []
    else:  # not known as the published file, so the assumption is reported
        assert [(change.what, change.result) for change in changes] == [("arguments", f"taken from {variant}")]


def test_weights_of_an_unpublished_size_without_arguments_require_the_variant():
    config = RfDetrConfig.from_variant("rf-detr-seg-small", resolution=480)
    with torch.device("meta"):
        state = RfDetrForInstanceSegmentation(config).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architecture.ENCODERS, "dinov2_windowed_small", (384, 6, 0))
        with pytest.raises(
            ValueError, match=r"`variant`.* 40 x 40 .*--variant .*rf-detr-seg-nano or rf-detr-seg-small\.$"
        ):
            read_config(state, {}, None, is_published=False, changes=[])
        named = read_config(state, {"model_name": "RFDETRSegSmall"}, None, is_published=False, changes=[])
        said = read_config(state, {}, "rf-detr-seg-small", is_published=False, changes=[])
        with pytest.raises(ValueError, match=r"`dec_layers`.* weights .* rf-detr-nano, got 4 and 2"):
            read_config(state, {"model_name": "RFDETRNano"}, None, is_published=False, changes=[])
    for found in (named, said):
        assert (found.resolution, found.backbone_config.num_windows, found.num_queries) == (480, 2, 100)


def test_queries_beyond_those_of_the_arguments_are_dropped_in_each_group_and_reported(model, save, tmp_path):
    done = convert_to_transformers(save(legacy(model, num_queries=5, num_select=5)), tmp_path / "there")
    rows = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 14, 15, 16, 17, 18])  # of 3 x 7
    stored = weights_in(tmp_path / "there")
    for name in ("query_feat.weight", "refpoint_embed.weight"):
        assert torch.equal(stored[name], model.state_dict()[name][rows])
        assert (name, "3 x 7 rows", "3 x 5") in done.changes
    assert done.config.num_queries == 5


INVALID_ARGUMENTS = [
    ("resolution", "640", "an integer"),
    ("num_queries", True, "an integer"),
    ("num_queries", [7], "an integer"),
    ("out_feature_indexes", 5, "a list of integers"),
    ("out_feature_indexes", [[3]], "a list of integers"),
    ("projector_scale", 5, "a list of names"),
    ("projector_scale", [], "a list of names"),
    ("positional_encoding_size", 10**6, "in .1, 512."),
]


@pytest.mark.parametrize(("name", "value", "rule"), INVALID_ARGUMENTS)
def test_arguments_of_another_type_are_refused(name, value, rule, model, save, tmp_path):
    with pytest.raises(ValueError, match=rf"checkpoint\.pth: the stored argument `{name}` must be {rule}"):
        convert_to_transformers(save(legacy(model, **{name: value})), tmp_path / "there")


NESTED_ARGUMENTS = ["resolution", "projector_scale", "class_names", "encoder", "two_stage", "use_grouppose_keypoints"]


@pytest.mark.parametrize("name", NESTED_ARGUMENTS)
def test_exponentially_nested_lists_are_refused_without_formatting_them(name, model, save, tmp_path):
    path = save(legacy(model, **{name: nested(22)}))
    tracemalloc.start()
    with pytest.raises(
        ValueError,
        match=r"checkpoint\.pth: the stored argument .* got a list|checkpoint\.pth: `class_names` .* got a list",
    ) as error:
        convert_to_transformers(path, tmp_path / "there")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert name.replace("_", " ") in str(error.value).replace("_", " ")
    assert peak < 4 << 20  # the text has 2^22 times "x"


INVALID_TENSORS = [
    (POSITIONS, torch.zeros(5), r"position_embeddings .* got shape 5\."),
    (POSITIONS, torch.zeros(1, 6, 32), r"position_embeddings .* got 6"),
    (POSITIONS, torch.zeros(1, 0, 32), r"position_embeddings .* got 0"),
    ("class_embed.bias", torch.tensor(1.0), r"class_embed\.bias .* got shape a number"),
    ("refpoint_embed.weight", torch.zeros(18, 4), r"query_feat and refpoint_embed .* got 21 and 18"),
    ("refpoint_embed.weight", torch.zeros(0, 4), r"query_feat and refpoint_embed .* got 21 and 0"),
    ("bbox_embed.layers.0.bias", torch.zeros(32, dtype=torch.int32), r"bias must .* got torch\.int32"),
    ("bbox_embed.layers.0.bias", torch.full((32,), float("nan")), r"bbox_embed\.layers\.0\.bias must .* finite"),
    (
        "bbox_embed.layers.0.bias",
        torch.zeros(32).to_sparse(),
        r"bbox_embed.* must be a dense tensor, got .*sparse_coo, cpu",
    ),
    ("bbox_embed.layers.0.bias", torch.zeros(32, dtype=torch.float8_e4m3fn), r"bias must .* got torch\.float8_e4m3fn"),
    (
        "query_feat.weight",
        torch.zeros(21, 32, dtype=torch.float8_e4m3fn),
        r"query_feat\.weight must .* got torch\.float8_e4m3fn",
    ),
    ("bbox_embed.layers.0.lora_A.default.weight", torch.zeros(0, 32), r"bbox_embed.*lora_A"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), INVALID_TENSORS)
def test_tensors_of_another_shape_or_dtype_are_refused(name, tensor, message, model, save, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        convert_to_transformers(
            save(legacy(model) | {"model": model.state_dict() | {name: tensor}}), tmp_path / "there"
        )
    assert "checkpoint.pth" in str(error.value)


CONTRADICTING_ARGUMENTS = {
    "patch_size": (16, r"`patch_size` .* weights .* stored arguments, got 12 and 16"),
    "dec_layers": (3, r"`dec_layers` .* weights .* stored arguments, got 4 and 3"),
    "hidden_dim": (256, r"`hidden_dim` .* weights .* stored arguments, got 32 and 256"),
    "group_detr": (13, r"`group_detr` .* weights .* stored arguments, got 3 and 13"),
    "segmentation_head": (False, r"`segmentation_head` .* weights .* stored arguments, got True and False"),
    "encoder": ("dinov2_windowed_base", r"`encoder` .* got 'dinov2_windowed_small' and 'dinov2_windowed_base'"),
    "num_queries": (9, r"`num_queries` .* 7, .* got 9"),
    "two_stage": (False, r"`two_stage` must be True .* got False"),
    "dec_n_points": (4, r"sampling_offsets\.weight .* 32x32 .* got 16x32"),
    "resolution": (50, r"resolution.* 50"),
}


@pytest.mark.parametrize("name", CONTRADICTING_ARGUMENTS)
def test_arguments_that_contradict_the_weights_are_an_error_with_both_values(name, model, save, tmp_path):
    value, message = CONTRADICTING_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message) as error:
        convert_to_transformers(save(legacy(model, **{name: value})), tmp_path / "there")
    assert "checkpoint.pth" in str(error.value)
    assert not (tmp_path / "there").exists()


def test_counts_that_the_model_does_not_follow_are_reported(model, save, tmp_path):
    done = convert_to_transformers(save(legacy(model, num_classes=90, num_select=3)), tmp_path / "training")
    assert done.changes == [("num_classes", "90 in the arguments", "4, as in the head")]
    content = best_file(model)
    content["model_config"]["num_select"] = 3
    done = convert_to_transformers(save(content), tmp_path / "model")
    assert done.changes == [("num_select", "3", "top_k=3 when called")]


def test_a_file_named_like_another_published_model_is_an_error_with_both_values(model, save, tmp_path):
    path = save(legacy(model), "rf-detr-nano.pth")
    with pytest.raises(ValueError, match=r"weights and rf-detr-nano, got .* and .*rename"):
        convert_to_transformers(path, tmp_path / "there")


def test_a_variant_that_contradicts_the_weights_is_an_error_with_both_values(model, save, tmp_path):
    with pytest.raises(ValueError, match=r"`dec_layers` .* rf-detr-seg-xlarge, got 4 and 6"):
        convert_to_transformers(save(legacy(model)), tmp_path / "there", variant="RFDETRSegXLarge")


def test_missing_tensors_are_named(model, save, tmp_path):
    content = legacy(model)
    del content["model"]["bbox_embed.layers.0.weight"], content["model"]["transformer.decoder.norm.bias"]
    with pytest.raises(ValueError, match=r"2 are missing: .*bbox_embed\.layers\.0\.weight"):
        convert_to_transformers(save(content), tmp_path / "there")
    content["model"] = torch.nn.Linear(2, 3).state_dict()
    with pytest.raises(ValueError, match=r"query_feat\.weight.* missing"):
        convert_to_transformers(save(content), tmp_path / "there")


def test_models_that_rfdetr_cannot_build_are_refused(tmp_path):
    cases = {
        "resolution must be a square, got (24, 48)": {"resolution": [24, 48]},
        "decoder_ffn_dim must be 2048, got 64": {"decoder_ffn_dim": 64},
        "position table must be a square, got (2, 4)": {"backbone_config": {"image_size": [24, 48]}},
        "got (64, 2, 0)": {"backbone_config": {"hidden_size": 64}},
        "number of encoder layers must be 12, got 13": {"backbone_config": {"num_hidden_layers": 13}},
    }
    for number, (message, overrides) in enumerate(cases.items()):
        model_of(**overrides).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match="rfdetr cannot build this model") as error:
            convert_to_rfdetr(tmp_path / str(number), tmp_path / "back.pth")
        assert message in str(error.value)
    RfDetrConfig().save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty: model\.safetensors"):
        convert_to_rfdetr(tmp_path / "empty", tmp_path / "back.pth")
