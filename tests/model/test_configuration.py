"""The configuration, the table of variants, and legal sizes."""

import copy
import pickle

import numpy as np
import pytest

from transformers_rfdetr import RfDetrConfig, RfDetrDinov2Config
from transformers_rfdetr.model.variants_rf_detr import VARIANTS, resolve_variant

from small_models import small_config

# Section 1.2 of what rfdetr publishes: patch, windows, layers, resolution, position grid, queries.
PUBLISHED = {
    "rf-detr-nano": (16, 2, 2, 384, 24, 300),
    "rf-detr-small": (16, 2, 3, 512, 32, 300),
    "rf-detr-medium": (16, 2, 4, 576, 36, 300),
    "rf-detr-large": (16, 2, 4, 704, 44, 300),
    "rf-detr-base": (14, 4, 3, 560, 37, 300),
    "rf-detr-large-deprecated": (14, 4, 3, 560, 37, 300),
    "rf-detr-seg-preview": (12, 2, 4, 432, 36, 200),
    "rf-detr-seg-nano": (12, 1, 4, 312, 26, 100),
    "rf-detr-seg-small": (12, 2, 4, 384, 32, 100),
    "rf-detr-seg-medium": (12, 2, 5, 432, 36, 200),
    "rf-detr-seg-large": (12, 2, 5, 504, 42, 200),
    "rf-detr-seg-xlarge": (12, 2, 6, 624, 52, 300),
    "rf-detr-seg-2xlarge": (12, 2, 6, 768, 64, 300),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_variant_has_the_published_settings(name):
    config = RfDetrConfig.from_variant(name)
    backbone = config.backbone_config
    row = (
        backbone.patch_size,
        backbone.num_windows,
        config.decoder_layers,
        config.resolution,
        backbone.image_size // backbone.patch_size,
        config.num_queries,
    )
    assert row == PUBLISHED[name]
    assert config.dropout == 0.0  # the port's default is 0.1, which no checkpoint was trained with
    assert config.group_detr == 13


def test_the_table_holds_the_published_variants_and_no_other():
    assert set(VARIANTS) == set(PUBLISHED)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rf-detr-seg-medium", "rf-detr-seg-medium"),
        ("rfdetr-seg-medium", "rf-detr-seg-medium"),
        ("RFDETRSegMedium", "rf-detr-seg-medium"),
        ("Roboflow/rf-detr-seg-medium", "rf-detr-seg-medium"),
        ("rf_detr_seg_medium", "rf-detr-seg-medium"),
        ("rf-detr-seg-xxlarge", "rf-detr-seg-2xlarge"),
        ("RFDETRSeg2XLarge", "rf-detr-seg-2xlarge"),
        ("RFDETRLargeDeprecated", "rf-detr-large-deprecated"),
        ("RFDETRLarge", "rf-detr-large"),
        ("rf-detr-large-2026.pth", "rf-detr-large"),
        ("weights/rf-detr-seg-medium.pt", "rf-detr-seg-medium"),
    ],
)
def test_the_usual_spellings_name_the_variant(spelling, name):
    assert resolve_variant(spelling) == name
    assert RfDetrConfig.from_variant(spelling).to_dict() == RfDetrConfig.from_variant(name).to_dict()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"rf-detr-nano, .*rf-detr-seg-2xlarge, got 'rf-detr-huge'"):
        RfDetrConfig.from_variant("rf-detr-huge")


def test_a_variant_has_the_91_slots_of_the_checkpoints_with_coco_names():
    config = RfDetrConfig.from_variant("rf-detr-seg-nano")
    assert config.num_labels == 91
    assert (config.id2label[1], config.id2label[18], config.id2label[90]) == ("person", "dog", "toothbrush")
    assert sum(not name.startswith("unused") for name in config.id2label.values()) == 80
    assert {config.label2id[label]: label for label in config.id2label.values()} == config.id2label


def test_labels_of_ones_own_take_the_place_of_cocos():
    assert RfDetrConfig.from_variant("rf-detr-seg-nano", num_labels=3).num_labels == 3
    config = RfDetrConfig.from_variant("rf-detr-seg-nano", id2label={"0": "building"})
    assert (config.num_labels, config.label2id) == (1, {"building": 0})
    config = RfDetrConfig.from_variant("rf-detr-seg-nano", label2id={"roof": 1, "wall": 0}, id2label=None)
    assert config.id2label == {0: "wall", 1: "roof"}
    with pytest.raises(ValueError, match=r"id2label.*\[1, 2\]"):
        RfDetrConfig.from_variant("rf-detr-seg-nano", id2label={1: "roof", 2: "wall"})


def test_a_misspelt_field_of_a_variant_is_refused():
    with pytest.raises(ValueError, match=r"num_queries.*\['num_querys'\]"):
        RfDetrConfig.from_variant("rf-detr-seg-nano", num_querys=5)


@pytest.mark.parametrize(
    ("value", "advice"),
    [(500, "504 or 480"), (433, "432 or 456"), (0, r"24\.$"), (-24, r"24\.$"), ([432, 440], "432 or 456")],
)
def test_an_illegal_resolution_is_refused_with_the_nearest_legal_sizes(value, advice):
    with pytest.raises(ValueError, match=rf"resolution.*multiple of 24 .*12 x 2 windows.*Try {advice}"):
        RfDetrConfig.from_variant("rf-detr-seg-medium", resolution=value)
    config = RfDetrConfig.from_variant("rf-detr-seg-medium")
    with pytest.raises(ValueError, match=f"Try {advice}"):
        config.resolution = value
    assert config.resolution == 432


def test_a_backbone_given_as_a_dictionary_becomes_a_configuration():
    config = small_config()
    config.backbone_config = config.backbone_config.to_dict()
    assert isinstance(config.backbone_config, RfDetrDinov2Config)


@pytest.mark.parametrize("value", [432.0, "432", [432], None, {}, True])
def test_a_resolution_that_is_no_size_is_refused(value):
    with pytest.raises(ValueError, match="resolution"):
        RfDetrConfig.from_variant("rf-detr-seg-medium").resolution = value


def test_a_resolution_may_be_a_number_of_numpy_and_is_stored_as_an_int():
    config = RfDetrConfig.from_variant("rf-detr-seg-medium", resolution=np.int64(504))
    assert (type(config.resolution), config.resolution) == (int, 504)


def test_a_resolution_is_checked_against_the_backbone_that_is_asked_for():
    config = RfDetrConfig.from_variant("rf-detr-seg-medium", backbone_config={"num_windows": 1}, resolution=444)
    assert (config.resolution, config.backbone_config.image_size) == (444, 444)
    assert RfDetrConfig.from_variant("rf-detr-seg-nano", backbone_config=config.backbone_config).resolution == 312


def test_a_resolution_takes_the_position_table_along_where_the_variant_does():
    assert RfDetrConfig.from_variant("rf-detr-seg-medium", resolution=504).backbone_config.image_size == 504
    base = RfDetrConfig.from_variant("rf-detr-base", resolution=672)
    assert (base.resolution, base.backbone_config.image_size) == (672, 518)


def test_the_default_resolution_is_the_table_or_the_next_legal_size():
    assert RfDetrConfig().resolution == 560  # a square is one number; 518 px do not tile into 14 x 4
    assert small_config().resolution == 48


def test_derived_values_follow_the_taps():
    backbone = RfDetrConfig.from_variant("rf-detr-seg-medium").backbone_config
    assert backbone.window_block_indexes == [0, 1, 2, 4, 5, 7, 8, 10, 11]  # global: 3, 6, 9
    assert backbone.out_features == ["stage3", "stage6", "stage9", "stage12"]
    assert RfDetrConfig.from_variant("rf-detr-base").backbone_config.num_used_layers == 11
    assert RfDetrDinov2Config(out_features=["stage1", "stage4"]).out_indices == [1, 4]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_queries": 0}, "num_queries.*0"),
        ({"d_model": 30}, "d_model.*decoder_cross_attention_heads.*4.*30"),
        ({"projector_scale": ["P5", "P3"]}, "projector_scale.*fine to coarse"),
        ({"projector_scale": ["P6"]}, "P6"),
        ({"activation_function": "gelu"}, "activation_function.*'silu'.*'gelu'"),
        ({"backbone_config": {"use_swiglu_ffn": True}}, "use_swiglu_ffn.*False.*True"),
        ({"backbone_config": {"image_size": 50}}, "image_size.*12.*50.*48 or 60"),
        ({"backbone_config": {"out_indices": [4, 2]}}, r"out_indices.*\[4, 2\]"),
        ({"backbone_config": {"out_indices": [2, 9]}}, r"out_indices.*0 to 4.*\[2, 9\]"),
        ({"backbone_config": {"drop_path_rate": 1.0}}, r"drop_path_rate.*\[0, 1\).*1\.0"),
        ({"backbone_config": {"hidden_size": 33}}, "hidden_size.*2.*33"),
        ({"backbone_config": {"num_windows": 0}}, "num_windows.*0"),
        ({"backbone_config": {"patch_size": [12, 14]}}, r"patch_size.*\(12, 14\)"),
        ({"backbone_config": {"window_block_indexes": []}}, r"window_block_indexes.*\[0\].*\[\]"),
        ({"backbone_config": {"out_features": ["stage2"]}}, "out_features"),
        ({"backbone_config": {"out_indices": []}}, r"out_indices.*\[\]"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps.*1e-06.*0.001"),
        ({"num_feature_levels": 3}, "num_feature_levels.*1.*3"),
        ({"mask_downsample_ratio": 0}, "mask_downsample_ratio.*0"),
        ({"dropout": 2.0}, r"dropout.*\[0, 1\).*2\.0"),
    ],
)
def test_settings_that_make_no_rf_detr_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        small_config(**settings)


def test_a_configuration_survives_saving_copying_and_pickling(tmp_path):
    config = small_config(resolution=[48, 72], projector_scale=["P3", "P5"], backbone_config={"num_register_tokens": 2})
    config.save_pretrained(tmp_path)
    for twin in (RfDetrConfig.from_pretrained(tmp_path), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        twin_dict, expected = twin.to_dict(), config.to_dict()
        for volatile in ("_name_or_path", "transformers_version"):
            twin_dict.pop(volatile, None), expected.pop(volatile, None)
        assert twin_dict == expected


def test_the_json_has_every_field_of_the_port_and_the_port_reads_it(tmp_path):
    port = pytest.importorskip("transformers.models.rf_detr.configuration_rf_detr")
    ours = RfDetrConfig.from_variant("rf-detr-seg-medium")
    theirs = port.RfDetrConfig()
    unread = {"dice_loss_coefficient", "mask_loss_coefficient", "eos_coefficient", "disable_custom_kernels", "init_std"}
    assert set(theirs.to_dict()) - set(ours.to_dict()) <= unread
    assert set(theirs.backbone_config.to_dict()) - set(ours.backbone_config.to_dict()) <= {
        "_out_features",
        "_out_indices",
    }
    ours.score_thresholds, ours.score_thresholds_note = {3: 0.25}, "highest F1"  # which the port ignores
    ours.save_pretrained(tmp_path)
    read = port.RfDetrConfig.from_pretrained(tmp_path)
    read.save_pretrained(tmp_path)
    assert RfDetrConfig.from_pretrained(tmp_path).score_thresholds == {3: 0.25}
    for name in (
        "d_model",
        "num_queries",
        "group_detr",
        "decoder_layers",
        "decoder_n_points",
        "layer_norm_eps",
        "dropout",
    ):
        assert getattr(read, name) == getattr(ours, name, 1e-6), name
    for name in ("image_size", "patch_size", "num_windows", "hidden_size", "out_features", "window_block_indexes"):
        assert getattr(read.backbone_config, name) == getattr(ours.backbone_config, name), name
    theirs.save_pretrained(tmp_path)
    assert RfDetrConfig.from_pretrained(tmp_path).backbone_config.out_indices == [2, 5, 8, 11]


class TestScoreThresholds:
    def config(self, **settings):
        return RfDetrConfig.from_variant("rf-detr-seg-nano", id2label={0: "roof", 1: "tree"}, **settings)

    def test_labels_are_numbers_also_after_json(self, tmp_path):
        config = self.config(score_thresholds={0: 0.25, 1: 1}, score_thresholds_note="highest F1")
        config.save_pretrained(tmp_path)
        loaded = RfDetrConfig.from_pretrained(tmp_path)
        assert loaded.score_thresholds == {0: 0.25, 1: 1.0}
        assert loaded.score_thresholds_note == "highest F1"
        self.config().save_pretrained(tmp_path)
        assert "score_thresholds" not in (tmp_path / "config.json").read_text()

    @pytest.mark.parametrize(
        ("thresholds", "message"),
        [
            ([0.5], "`score_thresholds` must be a dict"),
            ({2: 0.5}, "`score_thresholds` must be a dict of labels from 0 to 1, got 2"),
            ({"roof": 0.5}, "`score_thresholds` must be a dict of labels from 0 to 1, got 'roof'"),
            ({0: 1.5}, r"`score_thresholds\[0\]` must be a score in \[0, 1\], got 1.5"),
            ({0: None}, r"`score_thresholds\[0\]` must be a score in \[0, 1\], got None"),
        ],
    )
    def test_other_values_are_refused(self, thresholds, message):
        with pytest.raises(ValueError, match=message):
            self.config(score_thresholds=thresholds)
        with pytest.raises(ValueError, match="`score_thresholds_note` must be a string, got 1"):
            self.config(score_thresholds_note=1)

    def test_new_classes_discard_them_with_a_warning(self, tmp_path, hf_log):
        config = self.config(score_thresholds={0: 0.25}, score_thresholds_note="highest F1")
        config.id2label = {0: "roof", 1: "tree"}
        assert config.score_thresholds == {0: 0.25}
        config.save_pretrained(tmp_path)
        loaded = RfDetrConfig.from_pretrained(tmp_path, id2label={0: "tree", 1: "roof"})
        assert loaded.score_thresholds is loaded.score_thresholds_note is None
        assert "score_thresholds are discarded: the classes have changed" in hf_log.text
