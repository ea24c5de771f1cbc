"""The configuration: what defines the architecture of RF-DETR and the weights of its losses."""

import inspect
import re
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .validation import (
    are_strings,
    as_pair,
    check_counts,
    check_grid,
    check_limit,
    check_multiple,
    check_numbers,
    check_resolution,
    config_errors_as_value_errors,
    error_context,
    is_integer,
    nearest_legal_sizes,
    read_label_maps,
    read_score_thresholds,
    read_size,
    refuse_class_attributes,
    require,
)
from .variants_rf_detr import COCO_ID2LABEL, VARIANTS, resolve_variant

logger = logging.get_logger(__name__)

# The scale of each projector level relative to the patch grid: P3 is twice as fine, P5 half as fine.
PROJECTOR_SCALES = {"P3": 2.0, "P4": 1.0, "P5": 0.5}
# Fields that transformers takes the name of an attention or expert kernel from, also with a leading underscore.
_KERNEL_FIELDS = ("attn_implementation", "experts_implementation", "implementation_internal")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Fields with which transformers would read other weights than those that are checked here.
_REFUSED_FIELDS = {
    "quantization_config": "quantized weights are not supported. Save the model as float32, float16 or bfloat16",
    "transformers_weights": "weights are read from model.safetensors or pytorch_model.bin. Rename the file",
}


def _pop_fixed(kwargs: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Remove settings that RF-DETR fixes; raise ValueError for another value, which means another network."""
    for name, value in fixed.items():
        given = kwargs.pop(name, None)
        require(given is None or given == value, name, given, f"{value!r} in RF-DETR", "Remove the setting.")


def _check_common_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Check the fields that all configurations of transformers share; derive the label maps from each other.

    transformers sets each field of a file as an attribute, whatever it is, and checks the types of some in some of its
    versions only.
    """
    refuse_class_attributes(cls, fields, allowed={"model_type", *vars(PreTrainedConfig())})
    for name, reason in _REFUSED_FIELDS.items():
        if (value := fields.get(name)) is not None:
            raise ValueError(f"`{name}` must not be set, got {value!r:.80}: {reason}, and remove the setting.")
    fields = {name: value for name, value in fields.items() if name not in _REFUSED_FIELDS}
    model_type, architectures = fields.get("model_type", ""), fields.get("architectures")
    require(isinstance(model_type, str), "model_type", model_type, "a string, 'rf_detr'")
    is_valid = architectures is None or are_strings(architectures)
    require(is_valid, "architectures", architectures, "a list such as ['RfDetrForInstanceSegmentation']")
    fields = read_label_maps(fields)
    num_labels = fields.get("num_labels", 1)
    require(is_integer(num_labels) and num_labels >= 1, "num_labels", num_labels, "an integer of at least 1")
    check_limit("num_labels", max(int(num_labels), len(fields.get("id2label", ()))))
    for name in ("dtype", "torch_dtype"):
        dtype = fields.get(name)
        is_valid = dtype is None or type(dtype).__name__ == "dtype" or dtype in _DTYPES
        require(is_valid, name, dtype, f"a floating-point type, one of {_DTYPES}")
    return fields


class RfDetrDinov2Config(PreTrainedConfig):
    """Configuration of the windowed DINOv2 backbone (https://arxiv.org/abs/2304.07193).

    The JSON fields are those of transformers' own RF-DETR.

    Args:
        hidden_size: Width of the tokens.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads of each block.
        image_size: Side in pixels, or (height, width), of the images for which the position embeddings are stored. For
            other input sizes they are interpolated.
        patch_size: Side of a patch in pixels.
        num_windows: Windows along each side of the image; with 1 every block attends globally.
        num_register_tokens: Register tokens in each window (https://arxiv.org/abs/2309.16588).
        out_indices: The numbers of blocks after which a feature map is taken, ascending. `[3, 6]` takes two, after 3
            and after 6 blocks.
        out_features: The same by name, `["stage3", "stage6"]`; only read if `out_indices` is None.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it grows linearly from 0 in the first block.
        layerscale_value: Initial value of the LayerScale parameters.
        initializer_range: Standard deviation of the initial weights.

    Raises:
        ValueError: if a field is invalid or defines another network than RF-DETR's; the message names it.
    """

    model_type = "rf_detr_dinov2"
    base_config_key = "backbone_config"
    # Settings of the DINOv2 family that RF-DETR never varies. The JSON holds them for transformers' own RF-DETR.
    _FIXED = {  # noqa: RUF012
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "num_channels": 3,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "use_mask_token": True,
    }

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        image_size: int | list[int] = 224,
        patch_size: int = 14,
        num_windows: int = 4,
        num_register_tokens: int = 0,
        out_indices: list[int] | None = None,
        out_features: list[str] | None = None,
        drop_path_rate: float = 0.0,
        layerscale_value: float = 1.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        _pop_fixed(kwargs, self._FIXED)
        private_indices, private_features = kwargs.pop("_out_indices", None), kwargs.pop("_out_features", None)
        out_indices = private_indices if out_indices is None else out_indices
        out_features = private_features if out_features is None else out_features
        if out_indices is None:
            out_indices = self._read_stages(out_features or [f"stage{num_hidden_layers}"])
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = read_size(image_size, "image_size")
        self.patch_size: Any = read_size(patch_size, "patch_size")
        self.num_windows = num_windows
        self.num_register_tokens = num_register_tokens
        self.out_indices = list(out_indices) if isinstance(out_indices, tuple) else out_indices
        self.drop_path_rate = drop_path_rate
        self.layerscale_value = layerscale_value
        self.initializer_range = initializer_range
        self._check()
        kwargs["out_features"] = out_features
        _pop_fixed(kwargs, self._derived())
        with config_errors_as_value_errors("backbone_config"):
            super().__init__(**_check_common_fields(type(self), kwargs))

    @staticmethod
    def _read_stages(names: Any) -> list[int]:
        is_valid = are_strings(names) and all(re.fullmatch(r"stem|stage\d{1,9}", name) for name in names)
        require(is_valid, "out_features", names, "a list of 'stem', 'stage1', 'stage2', ...")
        return [0 if name == "stem" else int(name.removeprefix("stage")) for name in names]

    def _derived(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stage_names", "out_features", "window_block_indexes")}

    def _check(self) -> None:
        check_counts(self, "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_windows")
        check_counts(self, "num_register_tokens", least=0)
        check_numbers(self, "drop_path_rate", "layerscale_value", "initializer_range")
        rule = f"a multiple of num_attention_heads ({self.num_attention_heads})"
        require(self.hidden_size % self.num_attention_heads == 0, "hidden_size", self.hidden_size, rule)
        taps, last = self.out_indices, self.num_hidden_layers
        is_valid = isinstance(taps, list) and all(map(is_integer, taps)) and bool(taps) and taps == sorted(set(taps))
        is_valid = is_valid and 0 <= taps[0] <= taps[-1] <= last
        require(is_valid, "out_indices", taps, f"a list of ascending integers within 0 to {last}, the number of blocks")
        check_multiple(self.image_size, self.patch_size, "image_size", "the patch size")
        check_grid("image_size", self.image_size, self.patch_size)
        require(self.initializer_range > 0, "initializer_range", self.initializer_range, "above 0, usually 0.02")
        require(self.drop_path_rate < 1, "drop_path_rate", self.drop_path_rate, "in [0, 1)")

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps after 0, 1, ... blocks: "stem", "stage1", ..."""
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]

    @property
    def out_features(self) -> list[str]:
        """Names of the feature maps that are taken."""
        return [self.stage_names[index] for index in self.out_indices]

    @property
    def position_grid(self) -> tuple[int, int]:
        """(height, width) of the stored position embeddings, in patches."""
        height, width = as_pair(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def num_used_layers(self) -> int:
        """Number of blocks that are run; those after the last feature map are in the checkpoint, but not used."""
        return self.out_indices[-1]

    @property
    def window_block_indexes(self) -> list[int]:
        """Indices (from 0) of the blocks that attend inside windows; the others attend globally.

        The global blocks are those whose index is in `out_indices`. As `out_indices` counts blocks from 1, each of
        them is the block after a feature map. The published checkpoints were trained in this way.
        """
        return [index for index in range(self.out_indices[-1] + 1) if index not in self.out_indices]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON fields, with the derived and the fixed ones that transformers' own RF-DETR reads."""
        return super().to_dict() | self._FIXED | self._derived()


def _backbone_fields(backbone: Any) -> dict[str, Any]:
    """Return the fields of a backbone, which may be given as the configuration class of transformers' own RF-DETR."""
    require(isinstance(backbone, dict | PreTrainedConfig), "backbone_config", backbone, "a configuration or a dict")
    return backbone if isinstance(backbone, dict) else backbone.to_dict()


_DEFAULT_BACKBONE = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "out_indices": [2, 5, 8, 11]}


class RfDetrConfig(PreTrainedConfig):
    """Configuration of RF-DETR (https://arxiv.org/abs/2511.09554): the architecture and the loss weights.

    Example:
        >>> from transformers_rfdetr import RfDetrConfig
        >>> config = RfDetrConfig.from_variant("rf-detr-seg-medium", resolution=504)
        >>> config.num_queries, config.resolution, config.legal_sizes(500)
        (200, 504, [504, 480])

    Args:
        backbone_config: The backbone, as [`RfDetrDinov2Config`] or a dict of its fields.
        projector_scale: Feature levels, fine to coarse: "P3" (twice the resolution of the patch grid), "P4" (the patch
            grid) and "P5" (half of it).
        d_model: Width D of queries and features.
        num_queries: Queries Q of each group, the highest number of objects that the model can find in an image.
        group_detr: Query groups G in training (https://arxiv.org/abs/2207.13085); inference uses the first.
        decoder_layers: Number of decoder layers.
        decoder_ffn_dim: Hidden width of the decoder's feed-forward networks.
        decoder_self_attention_heads: Heads of the decoder's self-attention.
        decoder_cross_attention_heads: Heads of the decoder's deformable cross-attention.
        decoder_n_points: Points that each head samples on each level.
        dropout: Dropout of the decoder; the published models were trained with 0.
        mask_downsample_ratio: Width of a mask pixel in input pixels.
        mask_point_sample_ratio: Number of mask pixels for each point that matcher and mask loss sample.
        class_cost: Weight of the class cost in matching; the mask costs have the weights of the mask losses.
        bbox_cost: Weight of the L1 cost of boxes in matching.
        giou_cost: Weight of the generalized IoU cost in matching.
        class_loss_coefficient: Weight of the class loss.
        bbox_loss_coefficient: Weight of the L1 loss of boxes.
        giou_loss_coefficient: Weight of the generalized IoU loss.
        mask_class_loss_coefficient: Weight of the cross-entropy loss of masks.
        mask_dice_loss_coefficient: Weight of the dice loss of masks.
        focal_alpha: Alpha of the class cost, and of the class loss's target p^alpha IoU^(1-alpha).
        auxiliary_loss: Whether the decoder layers before the last have losses too (the first stage always has).
        resolution: Side of the square input in pixels, or [height, width]; each side a multiple of patch size times
            windows. By default `image_size` of the backbone, or the next legal size above.
        score_thresholds: Label -> score in [0, 1] above which `predict(threshold="calibrated")` keeps an instance.
            [`calibrate`] stores it; other implementations of RF-DETR ignore it. New classes (`id2label`) discard it.
        score_thresholds_note: What the thresholds promise, for readers; discarded with them.

    Raises:
        ValueError: if a field is invalid, above its entry in `validation.LIMITS`, or defines another network than
            RF-DETR; the message names it.
    """

    model_type = "rf_detr"
    sub_configs = {"backbone_config": RfDetrDinov2Config}  # noqa: RUF012
    # The Trainer passes the other outputs, (loss_dict, logits, pred_boxes, pred_masks), to compute_metrics.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "last_hidden_state",
        "intermediate_hidden_states",
        "init_reference_points",
        "backbone_features",
        "enc_hidden_states",
        "enc_outputs_class",
        "enc_outputs_coord",
        "enc_indices",
        "hidden_states",
        "attentions",
        "cross_attentions",
    ]
    _FIXED = {  # noqa: RUF012
        "hidden_expansion": 0.5,
        "c2f_num_blocks": 3,
        "activation_function": "silu",
        "decoder_activation_function": "relu",
        "segmentation_head_activation_function": "gelu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }

    def __init__(
        self,
        backbone_config: RfDetrDinov2Config | dict[str, Any] | None = None,
        projector_scale: list[str] | None = None,
        d_model: int = 256,
        num_queries: int = 300,
        group_detr: int = 13,
        decoder_layers: int = 3,
        decoder_ffn_dim: int = 2048,
        decoder_self_attention_heads: int = 8,
        decoder_cross_attention_heads: int = 16,
        decoder_n_points: int = 2,
        dropout: float = 0.0,
        mask_downsample_ratio: int = 4,
        mask_point_sample_ratio: int = 16,
        class_cost: float = 2.0,
        bbox_cost: float = 5.0,
        giou_cost: float = 2.0,
        class_loss_coefficient: float = 1.0,
        bbox_loss_coefficient: float = 5.0,
        giou_loss_coefficient: float = 2.0,
        mask_class_loss_coefficient: float = 5.0,
        mask_dice_loss_coefficient: float = 5.0,
        focal_alpha: float = 0.25,
        auxiliary_loss: bool = True,
        resolution: int | list[int] | None = None,
        score_thresholds: dict[int, float] | None = None,
        score_thresholds_note: str | None = None,
        **kwargs: Any,
    ) -> None:
        projector_scale = projector_scale or ["P4"]
        self._pop_fixed_fields(kwargs, projector_scale)
        self.backbone_config: Any = _DEFAULT_BACKBONE if backbone_config is None else backbone_config  # see __setattr__
        self.projector_scale = list(projector_scale)
        self.d_model = d_model
        self.num_queries = num_queries
        self.group_detr = group_detr
        self.decoder_layers = decoder_layers
        self.decoder_ffn_dim = decoder_ffn_dim
        self.decoder_self_attention_heads = decoder_self_attention_heads
        self.decoder_cross_attention_heads = decoder_cross_attention_heads
        self.decoder_n_points = decoder_n_points
        self.dropout = dropout
        self.mask_downsample_ratio = mask_downsample_ratio
        self.mask_point_sample_ratio = mask_point_sample_ratio
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost
        self.class_loss_coefficient = class_loss_coefficient
        self.bbox_loss_coefficient = bbox_loss_coefficient
        self.giou_loss_coefficient = giou_loss_coefficient
        self.mask_class_loss_coefficient = mask_class_loss_coefficient
        self.mask_dice_loss_coefficient = mask_dice_loss_coefficient
        self.focal_alpha = focal_alpha
        self.auxiliary_loss = auxiliary_loss
        self._check()
        self.resolution = self._default_resolution() if resolution is None else resolution
        kwargs = _check_common_fields(type(self), kwargs)
        with config_errors_as_value_errors("the configuration"):
            super().__init__(**kwargs)
        self.score_thresholds = score_thresholds  # after the classes, with which they are checked
        self.score_thresholds_note = score_thresholds_note

    def _pop_fixed_fields(self, kwargs: dict[str, Any], projector_scale: Any) -> None:
        """Remove the fields that RF-DETR fixes or derives from other fields."""
        require(are_strings(projector_scale), "projector_scale", projector_scale, "a list of levels such as ['P4']")
        # transformers' own RF-DETR stores 1e-5 as layer_norm_eps, but the checkpoints were trained with 1e-6 in the
        # projector, so this is what we compute with and write. Detection does not read its intermediate_size.
        if kwargs.get("layer_norm_eps") == 1e-5:
            kwargs.pop("layer_norm_eps")
        kwargs.pop("intermediate_size", None)
        derived = {"layer_norm_eps": 1e-6, "num_feature_levels": len(projector_scale)}
        _pop_fixed(kwargs, self._FIXED | derived)

    def _check(self) -> None:
        check_counts(
            self,
            *("d_model", "num_queries", "group_detr", "decoder_layers", "decoder_ffn_dim", "decoder_n_points"),
            *("decoder_self_attention_heads", "decoder_cross_attention_heads"),
            *("mask_downsample_ratio", "mask_point_sample_ratio"),
        )
        check_numbers(
            self,
            *("dropout", "focal_alpha", "class_cost", "bbox_cost", "giou_cost", "class_loss_coefficient"),
            *("bbox_loss_coefficient", "giou_loss_coefficient", "mask_class_loss_coefficient"),
            "mask_dice_loss_coefficient",
        )
        require(self.focal_alpha <= 1, "focal_alpha", self.focal_alpha, "in [0, 1]")
        require(self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(isinstance(self.auxiliary_loss, bool), "auxiliary_loss", self.auxiliary_loss, "true or false")
        levels = sorted(set(self.projector_scale) & set(PROJECTOR_SCALES))
        is_valid = bool(levels) and self.projector_scale == levels
        rule = f"levels of {list(PROJECTOR_SCALES)}, fine to coarse"
        require(is_valid, "projector_scale", self.projector_scale, rule)
        hidden_size = self.backbone_config.hidden_size
        require("P3" not in levels or hidden_size >= 2, "hidden_size", hidden_size, "at least 2 for projector_scale P3")
        for heads in ("decoder_self_attention_heads", "decoder_cross_attention_heads"):
            num_heads = getattr(self, heads)
            require(self.d_model % num_heads == 0, "d_model", self.d_model, f"a multiple of {heads} ({num_heads})")
        # The embedding of a box has four parts of equal width.
        require(self.d_model % 4 == 0, "d_model", self.d_model, "a multiple of 4")

    def _default_resolution(self) -> tuple[int, int]:
        block = self.backbone_config.patch_size * self.backbone_config.num_windows
        height, width = (-(-side // block) * block for side in as_pair(self.backbone_config.image_size))
        return height, width

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "resolution":
            value = read_size(value, "resolution")
            check_resolution(value, self.backbone_config.patch_size, self.backbone_config.num_windows)
            check_grid("resolution", value, self.backbone_config.patch_size)
            ratio = self.mask_downsample_ratio
            is_valid = ratio <= min(as_pair(value))
            require(is_valid, "mask_downsample_ratio", ratio, f"at most the resolution, {value}", "Usually it is 4.")
        if name == "backbone_config" and not isinstance(value, RfDetrDinov2Config):
            value = RfDetrDinov2Config(**_backbone_fields(value))
        if name == "score_thresholds" and value is not None:
            value = read_score_thresholds(value, self.id2label)
        if name == "score_thresholds_note":
            require(value is None or isinstance(value, str), name, value, "a string")
        if name == "id2label" and value != getattr(self, "id2label", value):
            self.discard_score_thresholds("the classes have changed")
        super().__setattr__(name, value)

    def discard_score_thresholds(self, reason: str) -> None:
        """Remove calibrated score thresholds, with a warning if there are any."""
        if getattr(self, "score_thresholds", None) is not None:
            logger.warning(f"score_thresholds are discarded: {reason}. Calibrate the model again.")
            self.score_thresholds = self.score_thresholds_note = None

    def legal_sizes(self, size: int) -> list[int]:
        """Return the multiples of patch size times windows next to `size` in pixels, nearest first."""
        return nearest_legal_sizes(size, self.backbone_config.patch_size * self.backbone_config.num_windows)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON fields, with the derived and the fixed ones that transformers' own RF-DETR reads."""
        derived = {
            "layer_norm_eps": 1e-6,
            "num_feature_levels": len(self.projector_scale),
            "intermediate_size": 4 * self.d_model,
        }
        absent = {name for name in ("score_thresholds", "score_thresholds_note") if getattr(self, name) is None}
        fields = super().to_dict() | self._FIXED | derived
        return {name: value for name, value in fields.items() if name not in absent}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Read the fields from a file or the Hub; raise ValueError if the file holds something else."""
        name = str(pretrained_model_name_or_path)
        with config_errors_as_value_errors(name):
            fields, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        with error_context(name):
            require(isinstance(fields, dict), "config.json", fields, "a JSON object of settings")
        return fields, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "RfDetrConfig":
        """Create a configuration from its fields, without names of attention kernels.

        transformers never writes these names, but would download code with such a name from the Hub and run it.
        """
        stored = {name: value for name, value in config_dict.items() if not name.endswith(_KERNEL_FIELDS)}
        return super().from_dict(stored, **kwargs)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "RfDetrConfig":
        """Create the configuration of a published variant.

        Args:
            name: A published name in any usual spelling; see [`resolve_variant`].
            **overrides: Fields to set to other values. `resolution` also sets the size of the position embeddings if
                the variant has them at its resolution (all but base and large-deprecated). A `backbone_config`
                dict overrides single fields of the backbone. Without `num_labels` or `id2label` the model has the 91
                classes of the published checkpoints, with COCO's names.

        Raises:
            ValueError: if the name is unknown, listing the known ones, or a field is invalid.
        """
        variant = VARIANTS[resolve_variant(name)]
        known = inspect.signature(cls).parameters.keys() - {"kwargs"}
        if unknown := [name for name in overrides if name not in known and not hasattr(PreTrainedConfig(), name)]:
            raise ValueError(f"fields of a configuration must be among {', '.join(sorted(known))}, got {unknown}")
        resolution = overrides.pop("resolution", variant.resolution)
        is_native = variant.position_grid * variant.patch_size == variant.resolution
        backbone = overrides.pop("backbone_config", {})
        backbone = {
            "image_size": resolution if is_native else variant.position_grid * variant.patch_size,
            "patch_size": variant.patch_size,
            "num_windows": variant.num_windows,
            "out_indices": list(variant.out_indices),
            "hidden_size": variant.hidden_size,
            "num_attention_heads": variant.hidden_size // 64,
            **_backbone_fields(backbone),
        }
        check_resolution(read_size(resolution, "resolution"), backbone["patch_size"], backbone["num_windows"])
        if not {"num_labels", "id2label", "label2id"} & set(overrides):
            overrides["id2label"] = COCO_ID2LABEL
        fields = {
            "decoder_layers": variant.decoder_layers,
            "num_queries": variant.num_queries,
            **variant.decoder,
            **read_label_maps(overrides),
        }
        return cls(backbone_config=backbone, resolution=resolution, **fields)
