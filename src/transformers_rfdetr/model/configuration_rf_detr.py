"""What the architecture is: the configuration."""

import inspect
import numbers
import re
from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .validation import (
    are_all,
    as_pair,
    check_counts,
    check_grid,
    check_limit,
    check_numbers,
    check_resolution,
    config_errors_as_value_errors,
    nearest_legal_sizes,
    read_label_maps,
    read_size,
    refuse_methods,
)
from .variants_rf_detr import COCO_ID2LABEL, VARIANTS, resolve_variant

# The scale of each projector level relative to the patch grid: P3 is twice as fine, P5 half as fine.
PROJECTOR_SCALES = {"P3": 2.0, "P4": 1.0, "P5": 0.5}
# What transformers takes the name of an attention or expert kernel from, also with an underscore in front.
_KERNEL_FIELDS = ("attn_implementation", "experts_implementation", "implementation_internal")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Settings of other models' files that would have transformers read other weights than those that are checked here.
_FOREIGN_FIELDS = {
    "quantization_config": "quantised weights are not read; save the model as float32, float16 or bfloat16",
    "transformers_weights": "weights are read from model.safetensors or pytorch_model.bin; give the file that name",
}


def _take_fixed(kwargs: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Remove the settings that RF-DETR fixes from `kwargs`; another value would be another network, so it raises."""
    for key, value in fixed.items():
        given = kwargs.pop(key, None)
        if given is not None and given != value:
            raise ValueError(f"{key}={given!r} is not RF-DETR, which has {key}={value!r} here; remove the setting")


def _refuse_foreign(cls: type, fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that would take the place of the class's own, or belongs to other models' files."""
    known = {"model_type", *vars(PreTrainedConfig())}
    for name, value in fields.items():
        if hasattr(cls, name) and name not in known and not isinstance(getattr(cls, name), property):
            raise ValueError(f"{name!r:.80} is no setting of {cls.__name__} but part of the class; remove it")
        if value is not None and name in _FOREIGN_FIELDS:
            raise ValueError(f"{name} {value!r:.80} is not followed: {_FOREIGN_FIELDS[name]}, and remove the setting")


def _common_fields(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that every configuration of transformers has, as a file may hold them, checked."""
    refuse_methods(cls, fields)
    _refuse_foreign(cls, fields)
    fields = {name: value for name, value in fields.items() if name not in _FOREIGN_FIELDS}
    if not isinstance(fields.get("model_type", ""), str):
        raise ValueError(f"model_type {fields['model_type']!r:.80} is no name of a kind of model; give 'rf_detr'")
    architectures = fields.get("architectures")
    if architectures is not None and not are_all(architectures, str):
        example = "['RfDetrForInstanceSegmentation']"
        raise ValueError(f"architectures {architectures!r:.80} is no list of names of classes; give {example}")
    fields = read_label_maps(fields)
    classes = fields.get("num_labels", 1)
    if not isinstance(classes, numbers.Integral) or isinstance(classes, bool) or classes < 1:
        raise ValueError(f"num_labels {classes!r:.80} must be a whole number of at least 1")
    check_limit("num_labels", int(classes))
    check_limit("num_labels", len(fields.get("id2label", ())))
    for name in ("dtype", "torch_dtype"):
        dtype = fields.get(name)
        if dtype is not None and type(dtype).__name__ != "dtype" and dtype not in _DTYPES:
            raise ValueError(f"{name} {dtype!r:.80} is no floating-point type of torch; give one of {_DTYPES}")
    return fields


class RfDetrDinov2Config(PreTrainedConfig):
    """Configuration of the windowed DINOv2 backbone (https://arxiv.org/abs/2304.07193), JSON fields as transformers'.

    Args:
        hidden_size: Width of the tokens.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads of each block.
        image_size: Side in pixels, or (height, width), that the stored position table was made for. Other input
            sizes interpolate it.
        patch_size: Side of a patch in pixels.
        num_windows: Windows along each side of the picture; 1 means that every block attends globally.
        num_register_tokens: Register tokens in each window (https://arxiv.org/abs/2309.16588).
        out_indices: Number of blocks after which each feature map is tapped, ascending; `out_features`
            (`["stage3", ...]`) says the same.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it grows linearly from 0 at the first one.
        layerscale_value: Initial value of the residual scales.
        initializer_range: Standard deviation of the initial weights.
    """

    model_type = "rf_detr_dinov2"
    base_config_key = "backbone_config"
    # Settings of the DINOv2 family that RF-DETR never varies. They stand in the JSON for transformers' own reader.
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
        _take_fixed(kwargs, self._FIXED)
        private_indices, private_features = kwargs.pop("_out_indices", None), kwargs.pop("_out_features", None)
        out_indices = private_indices if out_indices is None else out_indices
        out_features = private_features if out_features is None else out_features
        if out_indices is None:
            out_indices = self._indices_of(out_features or [f"stage{num_hidden_layers}"])
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
        _take_fixed(kwargs, self._derived())
        with config_errors_as_value_errors("backbone_config"):
            super().__init__(**_common_fields(type(self), kwargs))

    @staticmethod
    def _indices_of(names: Any) -> list[int]:
        """Taps by the names of their stages."""
        if not are_all(names, str) or not all(re.fullmatch(r"stem|stage\d{1,9}", name) for name in names):
            raise ValueError(f"out_features {names!r:.80} are no names of stages; give 'stem', 'stage1', ...")
        return [0 if name == "stem" else int(name.removeprefix("stage")) for name in names]

    def _derived(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stage_names", "out_features", "window_block_indexes")}

    def _check(self) -> None:
        check_counts(self, "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_windows")
        check_counts(self, "num_register_tokens", least=0)
        check_numbers(self, "drop_path_rate", "layerscale_value", "initializer_range")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        in_order = are_all(self.out_indices, int) and self.out_indices == sorted(set(self.out_indices))
        if (
            not in_order
            or not self.out_indices
            or not 0 <= self.out_indices[0] <= self.out_indices[-1] <= self.num_hidden_layers
        ):
            raise ValueError(
                f"out_indices {self.out_indices!r:.80} must ascend within 0 .. {self.num_hidden_layers}, the number of"
                " blocks"
            )
        for side in as_pair(self.image_size):
            if side <= 0 or side % self.patch_size:
                legal = " or ".join(map(str, nearest_legal_sizes(side, self.patch_size)))
                raise ValueError(
                    f"image_size {side} is not a multiple of the patch size {self.patch_size}; try {legal}"
                )
        check_grid("image_size", self.image_size, self.patch_size)
        if not self.initializer_range:
            raise ValueError("initializer_range 0 leaves no weights to train; 0.02 is usual")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {self.drop_path_rate} is outside [0, 1)")

    @property
    def stage_names(self) -> list[str]:
        """Names of the states that can be tapped: after 0, 1, ... blocks."""
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]

    @property
    def out_features(self) -> list[str]:
        """Names of the states that are tapped."""
        return [self.stage_names[index] for index in self.out_indices]

    @property
    def position_grid(self) -> tuple[int, int]:
        """(height, width) of the stored position table, in patches."""
        height, width = as_pair(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def num_used_layers(self) -> int:
        """Blocks before the last tap. Later ones stand in the checkpoint but are never read."""
        return self.out_indices[-1]

    @property
    def window_block_indexes(self) -> list[int]:
        """Blocks (counted from 0) that attend inside windows; the others attend globally.

        The published checkpoints were trained with the numbers of `out_indices`, which count from 1 as taps, read
        once more as block numbers that count from 0. We keep that.
        """
        return [index for index in range(self.out_indices[-1] + 1) if index not in self.out_indices]

    def to_dict(self) -> dict[str, Any]:
        """The JSON fields, with the derived and the fixed ones that transformers' own reader wants."""
        return super().to_dict() | self._FIXED | self._derived()


def _backbone_fields(backbone: Any) -> dict[str, Any]:
    """The fields of a backbone's configuration, which transformers' port has a class of its own for."""
    if not isinstance(backbone, dict | PreTrainedConfig):
        raise ValueError(f"backbone_config {backbone!r:.80} is neither a configuration nor a dictionary of its fields")
    return backbone if isinstance(backbone, dict) else backbone.to_dict()


class RfDetrConfig(PreTrainedConfig):
    """Configuration of RF-DETR (https://arxiv.org/abs/2511.09554): architecture and loss weights, nothing else.

    Example:
        >>> from transformers_rfdetr import RfDetrConfig
        >>> config = RfDetrConfig.from_variant("rf-detr-seg-medium", resolution=504)
        >>> config.num_queries, config.resolution, config.legal_sizes(500)
        (200, 504, [504, 480])

    Args:
        backbone_config: The backbone, as [`RfDetrDinov2Config`] or its fields.
        projector_scale: Feature levels, fine to coarse, of "P3" (twice the patch grid), "P4" (the patch grid) and
            "P5" (half of it).
        d_model: Width D of queries and features.
        num_queries: Queries Q of a group, the most objects that one image can have.
        group_detr: Query groups G in training (https://arxiv.org/abs/2207.13085); inference uses the first.
        decoder_layers: Number of decoder layers.
        decoder_ffn_dim: Hidden width of their feed-forward networks.
        decoder_self_attention_heads: Heads of their self-attention.
        decoder_cross_attention_heads: Heads of their deformable cross-attention.
        decoder_n_points: Points that one head samples on one level.
        dropout: Dropout of the decoder; the published models train with 0.
        mask_downsample_ratio: Input pixels along one mask pixel.
        mask_point_sample_ratio: Mask pixels for each point that matcher and mask loss look at.
        class_cost, bbox_cost, giou_cost: Weights of the matching cost. The mask terms cost what they weigh in
            the loss.
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient, mask_class_loss_coefficient,
            mask_dice_loss_coefficient: Weights of the losses.
        focal_alpha: Alpha of the class cost, and of the class loss's target p^alpha IoU^(1-alpha).
        auxiliary_loss: Whether the decoder layers before the last are supervised too (the first stage always is).
        resolution: Side of the square input in pixels, or [height, width]; each side a multiple of patch size x
            windows. By default `image_size` of the backbone, or the next legal size above.

    Raises:
        ValueError: for sizes that do not tile, for settings that would be another network than RF-DETR, and for
            values above `LIMITS`.
    """

    model_type = "rf_detr"
    sub_configs = {"backbone_config": RfDetrDinov2Config}  # noqa: RUF012
    # The Trainer hands (loss_dict, logits, pred_boxes, pred_masks) to compute_metrics, and nothing else.
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
        **kwargs: Any,
    ) -> None:
        _take_fixed(kwargs, self._FIXED)
        # Derived here. transformers' port stores 1e-5 as layer_norm_eps, at which its projector departs from the
        # checkpoints; theirs is 1e-6, so that is what we compute with and write. Its intermediate_size is a default
        # that detection does not read.
        if kwargs.get("layer_norm_eps") == 1e-5:
            kwargs.pop("layer_norm_eps")
        kwargs.pop("intermediate_size", None)
        projector_scale = projector_scale or ["P4"]
        if not are_all(projector_scale, str):
            raise ValueError(f"projector_scale {projector_scale!r:.80} is no list of levels; give ['P4']")
        _take_fixed(kwargs, {"layer_norm_eps": 1e-6, "num_feature_levels": len(projector_scale)})
        if backbone_config is None:
            backbone_config = {
                "hidden_size": 384,
                "num_attention_heads": 6,
                "image_size": 518,
                "out_indices": [2, 5, 8, 11],
            }
        self.backbone_config: Any = backbone_config  # a RfDetrDinov2Config from here on; see __setattr__
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
        kwargs = _common_fields(type(self), kwargs)
        check_limit("parameters", self._num_parameters(len(kwargs.get("id2label", ())) or kwargs.get("num_labels", 2)))
        with config_errors_as_value_errors("the configuration"):
            super().__init__(**kwargs)

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
        if self.focal_alpha > 1:
            raise ValueError(f"focal_alpha {self.focal_alpha} is outside [0, 1]")
        if not isinstance(self.auxiliary_loss, bool):
            raise ValueError(f"auxiliary_loss {self.auxiliary_loss!r:.80} must be true or false")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout} is outside [0, 1)")
        levels = sorted(set(self.projector_scale) & set(PROJECTOR_SCALES))
        if not levels or self.projector_scale != levels:
            raise ValueError(
                f"projector_scale {self.projector_scale} must name levels of {list(PROJECTOR_SCALES)}, fine to coarse"
            )
        if "P3" in levels and self.backbone_config.hidden_size < 2:
            raise ValueError("projector_scale 'P3' halves the backbone's hidden_size, which is 1; give 2 or more")
        for heads in ("decoder_self_attention_heads", "decoder_cross_attention_heads"):
            if self.d_model % getattr(self, heads):
                raise ValueError(f"d_model {self.d_model} is not a multiple of {heads} {getattr(self, heads)}")
        if self.d_model % 4:
            raise ValueError(f"d_model {self.d_model} must be a multiple of 4: the box embedding gives it four parts")

    def _num_parameters(self, num_labels: int) -> int:
        """Parameters of the segmentation model, all its large tables and matrices; vectors are left out."""
        backbone, width, groups = self.backbone_config, self.d_model, self.group_detr
        height_patches, width_patches = backbone.position_grid
        tokens = height_patches * width_patches + backbone.num_register_tokens + 3 * backbone.patch_size**2
        hidden, taps = backbone.hidden_size, len(backbone.out_indices)
        levels, resampling = len(self.projector_scale), {"P3": 2, "P4": 0, "P5": 9}
        points = self.decoder_cross_attention_heads * levels * self.decoder_n_points
        layer = 7 * width**2 + 3 * width * points + 2 * width * self.decoder_ffn_dim
        return (
            12 * hidden**2 * backbone.num_hidden_layers
            + hidden * tokens
            + taps * hidden**2 * sum(resampling[level] for level in self.projector_scale)
            + levels * (taps * hidden * width + 16 * width**2)
            + self.decoder_layers * layer
            + groups * self.num_queries * (width + 4)
            + (groups + 1) * width * (3 * width + num_labels)
            + 13 * width**2
        )

    def _default_resolution(self) -> tuple[int, int]:
        block = self.backbone_config.patch_size * self.backbone_config.num_windows
        height, width = (-(-side // block) * block for side in as_pair(self.backbone_config.image_size))
        return height, width

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "resolution":
            value = read_size(value, "resolution")
            check_resolution(value, self.backbone_config.patch_size, self.backbone_config.num_windows)
            check_grid("resolution", value, self.backbone_config.patch_size)
            if min(as_pair(value)) < self.mask_downsample_ratio:
                raise ValueError(
                    f"mask_downsample_ratio {self.mask_downsample_ratio} leaves no mask pixel of resolution {value};"
                    " 4 is usual"
                )
        if name == "backbone_config" and not isinstance(value, RfDetrDinov2Config):
            value = RfDetrDinov2Config(**_backbone_fields(value))
        super().__setattr__(name, value)

    def legal_sizes(self, size: int) -> list[int]:
        """The input sides in pixels that tile into patches and windows, next to `size`, nearest first."""
        return nearest_legal_sizes(size, self.backbone_config.patch_size * self.backbone_config.num_windows)

    def to_dict(self) -> dict[str, Any]:
        """The JSON fields, with the derived and the fixed ones that transformers' own reader wants."""
        derived = {
            "layer_norm_eps": 1e-6,
            "num_feature_levels": len(self.projector_scale),
            "intermediate_size": 4 * self.d_model,
        }
        return super().to_dict() | self._FIXED | derived

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """The fields that a file holds; ValueError where it holds something else."""
        with config_errors_as_value_errors(str(pretrained_model_name_or_path)):
            fields, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not isinstance(fields, dict):
                raise ValueError(f"{pretrained_model_name_or_path}: config.json holds {fields!r:.80}, no dictionary")
            return fields, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "RfDetrConfig":
        """The configuration with these fields, but for names of attention kernels.

        transformers does not write them, and would fetch code of that name from the Hub.
        """
        stored = {name: value for name, value in config_dict.items() if not name.endswith(_KERNEL_FIELDS)}
        return super().from_dict(stored, **kwargs)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "RfDetrConfig":
        """The configuration of a published model.

        Args:
            name: A published name in any usual spelling; see [`resolve_variant`].
            overrides: Fields to set otherwise. `resolution` takes the position table along where the variant's table
                has the size of its resolution (all but base and large-deprecated). A `backbone_config` dictionary
                overrides single fields of the backbone. Without `num_labels` or `id2label` the head has the 91
                slots of the published checkpoints, with COCO's names.

        Raises:
            ValueError: for an unknown name, listing the known ones, and for an illegal resolution.
        """
        variant = VARIANTS[resolve_variant(name)]
        known = inspect.signature(cls).parameters
        if unknown := [name for name in overrides if name not in known and not hasattr(PreTrainedConfig(), name)]:
            raise ValueError(f"{unknown} are no fields of a configuration; these are: {', '.join(known)}")
        resolution = overrides.pop("resolution", variant.resolution)
        follows = variant.position_grid * variant.patch_size == variant.resolution
        backbone = overrides.pop("backbone_config", {})
        backbone = {
            "image_size": resolution if follows else variant.position_grid * variant.patch_size,
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
