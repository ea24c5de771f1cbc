"""Read a model's configuration from rfdetr's arguments and weight shapes, and write the arguments of a configuration.

Shapes determine most of the architecture, the stored arguments the rest. Where both speak, they must agree. What a file
does not store is taken from the published variant that has its shapes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.checkpoint_layouts import Change, num_query_groups
from ..model.configuration_rf_detr import RfDetrConfig, RfDetrDinov2Config
from ..model.validation import are_strings, as_pair
from ..model.variants_rf_detr import ALIASES, VARIANTS, normalize_name
from .rfdetr_checkpoint import shape_of, summarize_value

# rfdetr's encoders: width, heads, registers.
ENCODERS = {
    "dinov2_windowed_small": (384, 6, 0),
    "dinov2_windowed_base": (768, 12, 0),
    "dinov2_registers_windowed_small": (384, 6, 4),
}
# The fields of the configuration that arguments of rfdetr set.
_BACKBONE_FIELD_OF = {"out_feature_indexes": "out_indices", "patch_size": "patch_size", "num_windows": "num_windows"}
_FIELD_OF = {
    "projector_scale": "projector_scale",
    "hidden_dim": "d_model",
    "dec_layers": "decoder_layers",
    "sa_nheads": "decoder_self_attention_heads",
    "ca_nheads": "decoder_cross_attention_heads",
    "dec_n_points": "decoder_n_points",
    "num_queries": "num_queries",
}
# Arguments that have this value in every RF-DETR model.
_FIXED = {
    "two_stage": True,
    "bbox_reparam": True,
    "lite_refpoint_refine": True,
    "layer_norm": True,
    "decoder_norm": "LN",
    "num_decoder_registers": 0,
    "num_channels": 3,
}
_INTEGERS = (
    *("resolution", "patch_size", "num_windows", "positional_encoding_size", "hidden_dim", "dec_layers"),
    *("sa_nheads", "ca_nheads", "dec_n_points", "num_queries", "num_select", "group_detr", "num_classes"),
    *("dim_feedforward", "mask_downsample_ratio"),
)
_SCALARS = {*_FIXED, "encoder", "segmentation_head", "use_grouppose_keypoints"}
# Fields of the configuration that make up the architecture.
BACKBONE_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_windows", "num_register_tokens"),
    "out_indices",
)
DECODER_FIELDS = (
    *("d_model", "decoder_layers", "decoder_ffn_dim", "decoder_self_attention_heads", "decoder_cross_attention_heads"),
    *("decoder_n_points", "projector_scale", "mask_downsample_ratio"),
)
_MAX_GRID = 512  # patches along a side of the position table: images of 6,000 pixels and more
# Sizes in which a model may differ from its variant, as fields of the configuration and as arguments of rfdetr.
SIZES = ("position_grid", "num_queries", "resolution")
_FREE = {"resolution", "positional_encoding_size", "num_queries"}
# Arguments that no shape determines.
_NOT_IN_SHAPES = {
    *("num_windows", "out_feature_indexes", "projector_scale", "sa_nheads", "ca_nheads", "dec_n_points", "resolution")
}
_EMBEDDINGS = "backbone.0.encoder.encoder.embeddings."
_DECODER_LAYER = re.compile(r"transformer\.decoder\.layers\.(\d+)\.")
_EDITED = "The file may be edited or damaged. Use the file that rfdetr wrote."


def has_segmentation_head(state_dict: Mapping[str, Tensor]) -> bool:
    """Return whether the weights, by their original names, are those of a segmentation model."""
    return any(name.startswith("segmentation_head.") for name in state_dict)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a stored argument whose type is not the one that rfdetr stores."""
    for name, value in arguments.items():
        entries = value if isinstance(value, list | tuple) else []
        if name == "model_name":
            is_valid, rule = isinstance(value, str), "a string"
        elif name in _SCALARS:
            is_valid, rule = isinstance(value, str | int | float), "a string or a number"
        elif name in _INTEGERS:
            is_valid, rule = _is_integer(value), "an integer below 2^63"
        elif name == "out_feature_indexes":
            is_valid, rule = bool(entries) and all(map(_is_integer, entries)), "a list of integers below 2^63"
        elif name == "projector_scale":  # rfdetr takes a single name for a list of one
            is_valid, rule = isinstance(value, str) or (bool(entries) and are_strings(entries)), "a list of names"
        else:
            continue
        if not is_valid:
            raise ValueError(f"the stored argument `{name}` must be {rule}, got {summarize_value(value)}. {_EDITED}")
    grid = arguments.get("positional_encoding_size", 1)
    if not 1 <= grid <= _MAX_GRID:
        raise ValueError(
            f"the stored argument `positional_encoding_size` must be in [1, {_MAX_GRID}], got {grid}. {_EDITED}"
        )


def _is_integer(value: Any) -> bool:
    return type(value) is int and value.bit_length() < 64


def read_config(
    state_dict: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    claimed: str | None,
    *,
    is_published: bool,
    changes: list[Change],
) -> RfDetrConfig:
    """Return the configuration on which the shapes, the stored arguments and the claimed variant agree.

    Args:
        state_dict: Weights by their original names.
        arguments: The stored arguments, checked by [`check_arguments`].
        claimed: The variant that the user or the name of the file says.
        is_published: Whether the file is a published one, at least by its name. The number of queries of its variant
            has priority over the file's then, and nothing is reported.
        changes: Gets an entry for each value that is not taken from the file as it is.
    """
    shapes, stored = _read_shapes(state_dict), _normalize_arguments(arguments)
    _require_equal(shapes, "the weights", stored, "the stored arguments", _EDITED)
    missing = sorted(_NOT_IN_SHAPES - set(stored))
    variant = claimed
    if missing and not variant:  # rfdetr 1.7 stores the name of its class and no sizes
        variant = ALIASES.get(normalize_name(stored.get("model_name", ""))) or _find_variant(shapes, missing)
    known = _variant_arguments(variant) if variant else {}
    remedy = f"If the model is not {variant}, rename the file or pass another --variant."
    _require_equal(shapes, "the weights", known, f"{variant}", remedy)
    _require_equal(stored, "the stored arguments", known, f"{variant}", remedy)
    if missing and not is_published:
        changes.append(Change("arguments", f"{', '.join(missing)} not stored", f"taken from {variant}"))
    num_queries = _read_num_queries(shapes, stored, known if is_published else {})
    _report_ignored_counts(shapes, stored, num_queries, changes)
    grid = stored.get("positional_encoding_size", shapes["positional_encoding_size"])
    if known and grid != known["positional_encoding_size"]:
        known["resolution"] = grid * shapes["patch_size"]
    sizes = {"positional_encoding_size": grid, "num_queries": num_queries}
    return _build_config({"mask_downsample_ratio": 4} | known | stored | shapes | sizes)


def _read_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the shapes of the weights determine, by the names of rfdetr's arguments."""
    num_axes = {
        f"{_EMBEDDINGS}patch_embeddings.projection.weight": 4,
        f"{_EMBEDDINGS}position_embeddings": 3,
        "query_feat.weight": 2,
        "refpoint_embed.weight": 2,
        "class_embed.bias": 1,
        "transformer.decoder.layers.0.linear1.weight": 2,
    }
    if missing := [name for name in num_axes if name not in state_dict]:
        raise ValueError(
            f"the weights of an RF-DETR model must contain {', '.join(missing)}, which are missing. {_EDITED}"
        )
    tensors = {name: state_dict[name] for name in num_axes}
    registers = state_dict.get(f"{_EMBEDDINGS}register_tokens", torch.empty(1, 0, 1))
    for name, tensor in (*tensors.items(), ("register_tokens", registers)):
        if tensor.ndim != num_axes.get(name, 3):
            raise ValueError(f"{name} must have {num_axes.get(name, 3)} axes, got shape {shape_of(tensor)}. {_EDITED}")
    patches, positions, queries, references, classes, ffn = (tensor.shape for tensor in tensors.values())
    grid = math.isqrt(max(positions[1] - 1, 0))
    if not grid or 1 + grid * grid != positions[1]:
        raise ValueError(f"position_embeddings must have 1 + n * n rows, got {positions[1]}")
    groups = max(num_query_groups(state_dict), 1)
    if queries[0] != references[0] or not queries[0] or queries[0] % groups:
        raise ValueError(
            f"query_feat and refpoint_embed must have the same number of rows, a multiple of {groups} groups, got"
            f" {queries[0]} and {references[0]}"
        )
    encoders = {(width, count): name for name, (width, _, count) in ENCODERS.items()}
    in_layer = [_DECODER_LAYER.match(name) for name in state_dict]
    width, num_registers = patches[0], registers.shape[1]
    return {
        "segmentation_head": has_segmentation_head(state_dict),
        "encoder": encoders.get((width, num_registers), f"width {width} with {num_registers} registers"),
        "patch_size": patches[-1],
        "hidden_dim": queries[1],
        "dec_layers": len({match[1] for match in in_layer if match}),
        "dim_feedforward": ffn[0],
        "positional_encoding_size": grid,
        "group_detr": groups,
        "num_queries": queries[0] // groups,
        "num_classes": classes[0] - 1,
    }


def _normalize_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with lists where rfdetr stores one name; ValueError for those of another architecture."""
    stored = dict(arguments)
    if isinstance(stored.get("projector_scale"), str):
        stored["projector_scale"] = [stored["projector_scale"]]
    for name, value in _FIXED.items():
        if stored.get(name, value) != value:
            raise ValueError(
                f"the stored argument `{name}` must be {value!r} for RF-DETR, got {summarize_value(stored[name])}"
            )
    return stored


def _require_equal(
    first: Mapping[str, Any], first_source: str, second: Mapping[str, Any], second_source: str, remedy: str
) -> None:
    """Raise ValueError, with both values, for an argument that two sources give different values."""
    for name in sorted(set(first) & set(second) - _FREE - {"num_classes"}):
        if first[name] != second[name]:
            values = f"{summarize_value(first[name])} and {summarize_value(second[name])}"
            raise ValueError(f"`{name}` must be equal in {first_source} and {second_source}, got {values}. {remedy}")


def _find_variant(shapes: Mapping[str, Any], missing: Sequence[str]) -> str:
    """Return the published variant with these shapes; it supplies the arguments that the file does not store."""
    names = ("segmentation_head", "encoder", "patch_size", "hidden_dim", "dec_layers")
    known = {variant: _variant_arguments(variant) for variant in VARIANTS}
    similar = [variant for variant, row in known.items() if all(row[name] == shapes[name] for name in names)]
    grid = shapes["positional_encoding_size"]
    for variant in similar:
        if VARIANTS[variant].position_grid == grid:
            return variant
    sizes = ", ".join(f"{name} {shapes[name]!r}" for name in names)
    raise ValueError(
        f"`variant` must be given: the file does not store {', '.join(missing)}, and no published variant has {sizes}"
        f" and {grid} x {grid} positions. Pass --variant {' or '.join(similar or VARIANTS)}."
    )


def _read_num_queries(shapes: Mapping[str, Any], stored: Mapping[str, Any], published: Mapping[str, Any]) -> int:
    available = shapes["num_queries"]
    num_queries = stored.get("num_queries", published.get("num_queries")) or available
    if num_queries > available and "num_queries" in stored:
        raise ValueError(
            f"`num_queries` of the stored arguments must be at most {available}, as the weights have, got"
            f" {num_queries}. {_EDITED}"
        )
    return min(num_queries, available)


def _report_ignored_counts(
    shapes: Mapping[str, Any], stored: Mapping[str, Any], num_queries: int, changes: list[Change]
) -> None:
    """Report stored numbers that differ from those of the model."""
    num_classes, num_select = shapes["num_classes"], stored.get("num_select", num_queries)
    if stored.get("num_classes", num_classes) not in (num_classes, num_classes + 1):
        changes.append(
            Change("num_classes", f"{stored['num_classes']} in the arguments", f"{num_classes}, as in the head")
        )
    if num_select != num_queries:
        changes.append(Change("num_select", str(num_select), f"top_k={num_select} when called"))


def _build_config(arguments: Mapping[str, Any]) -> RfDetrConfig:
    if arguments["encoder"] not in ENCODERS:
        raise ValueError(f"`encoder` must be one of {', '.join(ENCODERS)}, got {arguments['encoder']}")
    hidden_size, heads, registers = ENCODERS[arguments["encoder"]]
    return RfDetrConfig(
        backbone_config={
            "hidden_size": hidden_size,
            "num_hidden_layers": 12,
            "num_attention_heads": heads,
            "num_register_tokens": registers,
            "image_size": arguments["positional_encoding_size"] * arguments["patch_size"],
            **{field: arguments[name] for name, field in _BACKBONE_FIELD_OF.items()},
        },
        **{field: arguments[name] for name, field in _FIELD_OF.items()},
        group_detr=arguments["group_detr"],
        decoder_ffn_dim=arguments["dim_feedforward"],
        mask_downsample_ratio=arguments["mask_downsample_ratio"],
        resolution=arguments["resolution"],
        num_labels=arguments["num_classes"] + 1,
    )


def rfdetr_arguments(config: RfDetrConfig, num_classes: int, *, has_masks: bool) -> dict[str, Any]:
    """Return the arguments with which rfdetr builds the model of a configuration.

    Raises:
        ValueError: rfdetr cannot build the model.
    """
    backbone: RfDetrDinov2Config = config.backbone_config
    sizes = (backbone.hidden_size, backbone.num_attention_heads, backbone.num_register_tokens)
    encoder = next((name for name, known in ENCODERS.items() if known == sizes), None)
    rules = {
        "encoder (width, heads, registers)": (sizes, f"one of {list(ENCODERS.values())}", encoder is not None),
        "number of encoder layers": (backbone.num_hidden_layers, 12, backbone.num_hidden_layers == 12),
        "decoder_ffn_dim": (config.decoder_ffn_dim, 2048, config.decoder_ffn_dim == 2048),
        "resolution": (config.resolution, "a square", len({*as_pair(config.resolution)}) == 1),
        "position table": (backbone.position_grid, "a square", len({*backbone.position_grid}) == 1),
    }
    for name, (value, rule, is_met) in rules.items():
        if not is_met:
            raise ValueError(f"rfdetr cannot build this model: {name} must be {rule}, got {value}")
    return {
        "encoder": encoder,
        "segmentation_head": has_masks,
        **_arguments_of(config),
        "num_select": config.num_queries,
        "group_detr": config.group_detr,
        "num_classes": num_classes,
        "mask_downsample_ratio": config.mask_downsample_ratio,
    }


def _variant_arguments(variant: str) -> dict[str, Any]:
    """Return the arguments of rfdetr's class of a published variant."""
    config = RfDetrConfig.from_variant(variant)
    encoder = {384: "dinov2_windowed_small", 768: "dinov2_windowed_base"}[config.backbone_config.hidden_size]
    return {"encoder": encoder, "segmentation_head": "-seg-" in variant, **_arguments_of(config)}


def _arguments_of(config: RfDetrConfig) -> dict[str, Any]:
    """Return the arguments that rfdetr has for fields of a configuration of square images."""
    backbone = config.backbone_config
    return {
        **{name: getattr(backbone, field) for name, field in _BACKBONE_FIELD_OF.items()},
        **{name: getattr(config, field) for name, field in _FIELD_OF.items()},
        "positional_encoding_size": backbone.position_grid[0],
        "resolution": as_pair(config.resolution)[0],
    }


def nearest_variant(config: RfDetrConfig, has_masks: bool) -> tuple[str, dict[str, list[Any]]]:
    """Return the published variant nearest to a configuration, and the differences: field -> [here, there]."""
    ours = _architecture(config)
    differences = {}
    for variant in VARIANTS:
        if ("-seg-" in variant) == has_masks:
            theirs = _architecture(RfDetrConfig.from_variant(variant))
            differences[variant] = {name: [ours[name], theirs[name]] for name in ours if ours[name] != theirs[name]}

    def distance(variant: str) -> tuple[int, bool, int, int]:
        changed = differences[variant]
        difference = abs(max(ours["resolution"]) - VARIANTS[variant].resolution)
        return len(changed.keys() - {*SIZES}), "position_grid" in changed, len(changed), difference

    nearest = min(differences, key=distance)
    return nearest, differences[nearest]


def _architecture(config: RfDetrConfig) -> dict[str, Any]:
    backbone = config.backbone_config
    return {
        **{name: getattr(backbone, name) for name in BACKBONE_FIELDS},
        **{name: getattr(config, name) for name in DECODER_FIELDS},
        "position_grid": list(backbone.position_grid),
        "num_queries": config.num_queries,
        "resolution": list(as_pair(config.resolution)),
    }


def rfdetr_class(variant: str) -> str:
    """Return the name of rfdetr's class of a published variant, such as RFDETRSeg2XLarge."""
    parts = variant.removeprefix("rf-detr-").split("-")
    return "RFDETR" + "".join({"xlarge": "XLarge", "2xlarge": "2XLarge"}.get(part, part.capitalize()) for part in parts)
