"""Convert state dicts to the names and table sizes of the models.

Four key layouts exist: the original one of Roboflow's files, which is also ours; the same with the prefix `model.`
(transformers 5.10 to 5.15); the names of transformers' own RF-DETR, called the port here; and mixtures of these. Each
rule below renames one of the port's names in any of them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_rf_detr import RfDetrConfig
from .modeling_rf_detr_dinov2 import resize_position_table
from .validation import check_limit
from .variants_rf_detr import class_labels

_LAYER = r"(\.layer\.\d+\.attention)"
_PROJECTOR = r"^(backbone\.0\.projector\.stages\.0\.0\..*?)"
_DECODER = r"^(transformer\.decoder\.layers\.\d+)"
_BLOCK = r"^(segmentation_head\.blocks\.\d+)"
_QUERY_BLOCK = r"^(segmentation_head\.query_features_block)"
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^(?:model\.)+", ""),
        # backbone
        (r"^backbone\.backbone\.", "backbone.0.encoder.encoder."),
        (_LAYER + r"\.q_proj\.", r"\1.attention.query."),
        (_LAYER + r"\.k_proj\.", r"\1.attention.key."),
        (_LAYER + r"\.v_proj\.", r"\1.attention.value."),
        (_LAYER + r"\.o_proj\.", r"\1.output.dense."),
        (r"^backbone\.projector\.layer_norm\.", "backbone.0.projector.stages.0.1."),
        (r"^backbone\.projector\.projector_layer\.", "backbone.0.projector.stages.0.0."),
        (_PROJECTOR + r"bottlenecks\.", r"\1m."),
        (_PROJECTOR + r"conv(\d)\.conv\.", r"\1cv\2.conv."),
        (_PROJECTOR + r"conv(\d)\.norm\.", r"\1cv\2.bn."),
        # transformer
        (r"^reference_point_embed\.", "refpoint_embed."),
        (r"^enc_", "transformer.enc_"),
        (r"^decoder\.", "transformer.decoder."),
        (r"^transformer\.decoder\.layernorm\.", "transformer.decoder.norm."),
        (_DECODER + r"\.self_attn_layer_norm\.", r"\1.norm1."),
        (_DECODER + r"\.cross_attn_layer_norm\.", r"\1.norm2."),
        (_DECODER + r"\.layer_norm\.", r"\1.norm3."),
        (_DECODER + r"\.mlp\.fc", r"\1.linear"),
        (_DECODER + r"\.self_attn\.o_proj\.", r"\1.self_attn.out_proj."),
        # masks
        (r"^(blocks|spatial_features_proj|query_features_proj|query_features_block)\.", r"segmentation_head.\1."),
        (r"^segmentation_bias$", "segmentation_head.bias"),
        (_BLOCK + r"\.layernorm\.", r"\1.norm."),
        (_BLOCK + r"\.depthwise_conv\.", r"\1.dwconv."),
        (_BLOCK + r"\.pointwise_conv\.", r"\1.pwconv1."),
        (_QUERY_BLOCK + r"\.norm\.", r"\1.norm_in."),
        (_QUERY_BLOCK + r"\.mlp\.fc1\.", r"\1.layers.0."),
        (_QUERY_BLOCK + r"\.mlp\.fc2\.", r"\1.layers.2."),
    ]
]
_SPLIT_PROJECTION = re.compile(r"^(transformer\.decoder\.layers\.\d+\.self_attn)\.([qkv])_proj\.(weight|bias)$")
_GROUP_HEAD = re.compile(r"^(transformer\.enc_(?:output|output_norm|out_class_embed|out_bbox_embed))\.(\d+)\.(.*)$")
_POSITIONS = "backbone.0.encoder.encoder.embeddings.position_embeddings"
_CLASS_HEAD = re.compile(r"(?:class_embed|transformer\.enc_out_class_embed\.\d+)\.(?:weight|bias)")
_QUERY_TABLES = ("refpoint_embed.weight", "query_feat.weight")
# The axes of each table, and the smallest size of each axis.
_TABLES = dict.fromkeys(_QUERY_TABLES, ("(queries, width)", (1, 1))) | {
    _POSITIONS: ("(1, 1 + patches, width)", (1, 2, 1))
}


class Change(NamedTuple):
    """One thing in a checkpoint that loading or converting changes."""

    what: str  # a tensor, a kind of tensors, or an argument
    stored: str
    result: str

    def __str__(self) -> str:
        return f"{self.what}: {self.stored} -> {self.result}"


def original_key(key: str) -> str:
    """Return the original name of a tensor in any layout; the port's separate q, k, v of the decoder keep theirs."""
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def is_original_layout(keys: Iterable[str]) -> bool:
    """Return whether every key is an original name."""
    return all(original_key(key) == key and not _SPLIT_PROJECTION.match(key) for key in keys)


def to_original_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict in any of the four layouts to the original one; q, k, v of the decoder are stacked.

    Raises:
        ValueError: Two tensors get one name, or one of q, k, v is missing or has another shape.
    """
    renamed: dict[str, Tensor] = {}
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        name = original_key(key)
        if match := _SPLIT_PROJECTION.match(name):
            split.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
            continue
        if name in renamed:
            raise ValueError(f"the checkpoint must contain {name!r} once, got it again as {key!r}")
        renamed[name] = tensor
    for name, parts in split.items():
        if set(parts) != set("qkv") or name in renamed:
            raise ValueError(f"the checkpoint must contain q, k and v of {name!r} once, got {sorted(parts)}")
        if len({tensor.shape for tensor in parts.values()}) > 1 or not parts["q"].ndim:
            shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in "qkv")
            raise ValueError(f"q, k and v of {name!r} must have one shape, got {shapes}")
        renamed[name] = torch.cat([parts[part] for part in "qkv"])
    return renamed


def num_query_groups(keys: Iterable[str]) -> int:
    """Return the number of query groups in a checkpoint: each has first-stage heads of its own."""
    return 1 + max((int(match[2]) for key in keys if (match := _GROUP_HEAD.match(key))), default=-1)


def tables_fit(shapes: Mapping[str, Sequence[int]], stored: RfDetrConfig, config: RfDetrConfig) -> bool:
    """Return whether the tables of a checkpoint have the sizes of `config`; see [`fit_tables`].

    `shapes` are those of all tensors, in the original layout.
    """
    _check_tables(shapes)
    rows = config.group_detr * config.num_queries
    height, width = grid = config.backbone_config.position_grid
    return (
        num_query_groups(shapes) in (0, config.group_detr)
        and all(name not in shapes or shapes[name][0] == rows for name in _QUERY_TABLES)
        and (_POSITIONS not in shapes or shapes[_POSITIONS][1] == 1 + height * width)
        and stored.backbone_config.position_grid == grid
    )


def fit_tables(
    state_dict: Mapping[str, Tensor], stored: RfDetrConfig, config: RfDetrConfig
) -> tuple[dict[str, Tensor], list[Change]]:
    """Fit the tables of a state dict in the original layout to the sizes of a configuration.

    The position table is interpolated. Of each group's queries the first are kept. If more are wanted than are stored,
    the stored ones are repeated in order, and so are groups with their first-stage heads. Tables of another width are
    not changed: they belong to another model.

    Args:
        state_dict: In the original layout.
        stored: The configuration that came with it, for the sides of a position table that is not square.
        config: The configuration wanted.

    Returns:
        The fitted state dict, and each change.

    Raises:
        ValueError: The query rows are not divisible by the number of first-stage heads, one of these heads is missing,
            the position table does not fill a grid, or a table is empty.
    """
    _check_tables({name: state_dict[name].shape for name in _TABLES if name in state_dict})
    fitted, changes = dict(state_dict), []
    changes += _fit_positions(fitted, stored, config)
    groups = num_query_groups(fitted) or config.group_detr
    changes += _fit_queries(fitted, groups, config)
    if num_query_groups(fitted) not in (0, config.group_detr):
        _fit_group_heads(fitted, groups, config.group_detr)
        changes.append(Change("first-stage heads", f"{groups} groups", str(config.group_detr)))
    return fitted, changes


def fit_class_heads(
    state_dict: dict[str, Tensor], stored: Mapping[int, str], wanted: Mapping[int, str]
) -> list[Change]:
    """Fit the class heads of a state dict in the original layout to other classes, and return the change.

    A class that the checkpoint has by name keeps its row; new classes start with the rows of its other classes in turn.
    So the heads score what looks like an object from the first optimizer step on, and the first stage selects such
    tokens. (rfdetr gives class i row i, transformers random ones; `benchmarks/MORE_RESULTS.md` has a comparison.)

    Args:
        state_dict: In the original layout; it is changed. Heads with another number of rows than `stored` stay.
        stored: Names of its classes by label.
        wanted: Names of the wanted classes by label.
    """
    heads = [key for key in state_dict if _CLASS_HEAD.fullmatch(key) and state_dict[key].shape[:1] == (len(stored),)]
    trained = [label for label, name in class_labels(stored).items() if name != f"unused {label}"]
    if not heads or not trained:
        return []
    label_of = {stored[label]: label for label in trained if not stored[label].startswith("LABEL_")}  # default names
    known = [name for name in wanted.values() if name in label_of]
    new = [name for name in wanted.values() if name not in label_of]
    others = [label for label in trained if stored[label] not in known] or trained
    row_of = label_of | {name: others[place % len(others)] for place, name in enumerate(new)}
    for key in heads:
        state_dict[key] = state_dict[key][[row_of[name] for name in wanted.values()]]
    listed = f"{', '.join(known[:5])}{', ...' * (len(known) > 5)}" if known else "none"
    return [Change("class heads", f"{len(stored)} classes", f"{len(wanted)}, of which kept by name: {listed}")]


def _check_tables(shapes: Mapping[str, Sequence[int]]) -> None:
    for name, (axes, least) in _TABLES.items():
        shape = list(shapes.get(name, least))
        if len(shape) != len(least) or any(size < low for size, low in zip(shape, least, strict=True)):
            raise ValueError(f"{name} must have shape {axes} without an axis of 0, got {shape}")


def _fit_positions(state_dict: dict[str, Tensor], stored: RfDetrConfig, config: RfDetrConfig) -> list[Change]:
    table = state_dict.get(_POSITIONS)
    if table is None or table.shape[::2] != (1, config.backbone_config.hidden_size):
        return []
    old, new = _stored_grid(table.shape[1] - 1, stored), config.backbone_config.position_grid
    if old == new:
        return []
    state_dict[_POSITIONS] = resize_position_table(table, old, new)
    sizes = (f"{height}x{width} patches" for height, width in (old, new))
    return [Change("position table", *sizes)]


def _stored_grid(patches: int, stored: RfDetrConfig) -> tuple[int, int]:
    """Return (height, width) of a position table: those of its configuration if they fit, else of a square."""
    height, width = grid = stored.backbone_config.position_grid
    side = round(patches**0.5)
    if height * width == patches:
        return grid
    if side * side != patches:
        raise ValueError(
            f"{_POSITIONS} must have {height} x {width} patches as in config.json, or a square, got {patches} patches"
        )
    check_limit("patches", side)
    return side, side


def _fit_queries(state_dict: dict[str, Tensor], groups: int, config: RfDetrConfig) -> list[Change]:
    changes = []
    for name, width in zip(_QUERY_TABLES, (4, config.d_model), strict=True):
        table = state_dict.get(name)
        if table is None or table.shape[1] != width:
            continue
        if len(table) % groups:
            raise ValueError(
                f"the number of rows of {name} must be a multiple of the {groups} groups, got {len(table)}"
            )
        queries = len(table) // groups  # the file of seg-large has 13 x 300 rows, its configuration 200 queries
        if (groups, queries) == (config.group_detr, config.num_queries):
            continue
        table = table.unflatten(0, (groups, queries))
        table = table[torch.arange(config.group_detr) % groups][:, torch.arange(config.num_queries) % queries]
        state_dict[name] = table.flatten(0, 1)
        changes.append(Change(name, f"{groups} x {queries} rows", f"{config.group_detr} x {config.num_queries}"))
    return changes


def _fit_group_heads(state_dict: dict[str, Tensor], groups: int, wanted: int) -> None:
    matches = [match for key in state_dict if (match := _GROUP_HEAD.match(key))]
    heads = {(match[1], int(match[2]), match[3]): state_dict.pop(match[0]) for match in matches}
    for head, rest in {(head, rest) for head, _, rest in heads}:
        for group in range(wanted):
            if (head, group % groups, rest) not in heads:
                raise ValueError(f"{head}.{group % groups}.{rest} is missing. Each of {groups} groups must have one.")
            state_dict[f"{head}.{group}.{rest}"] = heads[head, group % groups, rest]
