"""The key layouts that circulate, and tables of other sizes, to what our models hold.

Four layouts exist: the original one of Roboflow's files, which is our module tree; the same behind `model.`
(transformers 5.10 to 5.15); the module tree of transformers' port; and mixtures of these. Each rule below renames one
of the port's names wherever it stands, so that every mixture is read.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file, logging

from .configuration_rf_detr import RfDetrConfig
from .modeling_rf_detr_dinov2 import resize_position_table
from .validation import check_limit, error_context, read_label_maps

logger = logging.get_logger(__name__)

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
_QUERY_TABLES = ("refpoint_embed.weight", "query_feat.weight")
# Of each table, the axes and the least that they may be.
_TABLES = dict.fromkeys(_QUERY_TABLES, ("(queries, width)", (1, 1))) | {
    _POSITIONS: ("(1, 1 + patches, width)", (1, 2, 1))
}
_WEIGHT = re.compile(r"(backbone|transformer|refpoint_embed|query_feat|class_embed|bbox_embed|segmentation_head)\.")
# What weights are stored in, by its name in the header of a safetensors file; torch computes little with others.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
_QUIET = {"_raise_exceptions_for_missing_entries": False}
# Arguments of from_pretrained that are also attributes of a configuration, but mean the model's loading.
_LOADING_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation", "name_or_path")


class Change(NamedTuple):
    """One thing that loading or converting a checkpoint does not take over as it is."""

    what: str  # a tensor, a kind of tensors, or an argument
    stored: str
    result: str

    def __str__(self) -> str:
        return f"{self.what}: {self.stored} -> {self.result}"


def original_key(key: str) -> str:
    """The original name of a tensor in any layout. The port's separate q, k, v of the decoder keep theirs."""
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def is_original_layout(keys: Iterable[str]) -> bool:
    """Whether every key already has its original name."""
    return all(original_key(key) == key and not _SPLIT_PROJECTION.match(key) for key in keys)


def to_original_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict in any of the four layouts to the original one, with q, k, v of the decoder stacked.

    Raises:
        ValueError: if two tensors would get one name, or one of q, k, v is missing or of another shape.
    """
    renamed: dict[str, Tensor] = {}
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        name = original_key(key)
        if match := _SPLIT_PROJECTION.match(name):
            split.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
            continue
        if name in renamed:
            raise ValueError(f"the checkpoint holds {name!r} twice, the second time as {key!r}")
        renamed[name] = tensor
    for name, parts in split.items():
        if set(parts) != set("qkv") or name in renamed:
            raise ValueError(f"the checkpoint holds {sorted(parts)} of {name!r}; it needs q, k and v, once")
        if len({tensor.shape for tensor in parts.values()}) > 1 or not parts["q"].ndim:
            shapes = ", ".join(f"{part} {list(parts[part].shape)}" for part in "qkv")
            raise ValueError(f"the parts of {name!r} are of shapes {shapes}; they must be of one shape")
        renamed[name] = torch.cat([parts[part] for part in "qkv"])
    return renamed


def num_query_groups(keys: Iterable[str]) -> int:
    """Query groups in a file: each has first-stage heads of its own."""
    return 1 + max((int(match[2]) for key in keys if (match := _GROUP_HEAD.match(key))), default=-1)


def _check_tables(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for tables without rows, or with another number of axes."""
    for name, (axes, least) in _TABLES.items():
        shape = list(shapes.get(name, least))
        if len(shape) != len(least) or any(size < low for size, low in zip(shape, least, strict=True)):
            raise ValueError(f"{name} is of shape {shape}; it must be {axes}, and none of them 0")


def _tables_fit(shapes: Mapping[str, Any], stored: RfDetrConfig, config: RfDetrConfig) -> bool:
    """Whether a file in the original layout can be loaded as it is; ValueError for tables of no such shape."""
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
    state_dict: dict[str, Tensor], stored: RfDetrConfig, config: RfDetrConfig
) -> tuple[dict[str, Tensor], list[Change]]:
    """Fit the tables of a state dict in the original layout to a configuration of other sizes.

    Positions are interpolated. Of the queries the first of each group are kept; wanted ones beyond the stored repeat
    them in order, and so do groups with their first-stage heads. Tables of another width are another model's, and are
    left as they are.

    Args:
        state_dict: In the original layout.
        stored: The configuration that came with it; it gives a position table that is not square its sides.
        config: The configuration wanted.

    Returns:
        The fitted state dict, and each change.

    Raises:
        ValueError: if the query rows do not fall into as many groups as there are first-stage heads, one of these is
            missing, the positions fill no grid, or a table has no rows.
    """
    _check_tables({name: state_dict[name].shape for name in _TABLES if name in state_dict})
    fitted, changes = dict(state_dict), []
    if _POSITIONS in fitted and fitted[_POSITIONS].shape[::2] == (1, config.backbone_config.hidden_size):
        table = fitted[_POSITIONS]
        old, new = _stored_grid(table.shape[1] - 1, stored), config.backbone_config.position_grid
        if old != new:
            fitted[_POSITIONS] = resize_position_table(table, old, new)
            sizes = (f"{height}x{width} patches" for height, width in (old, new))
            changes.append(Change("position table", *sizes))
    groups = num_query_groups(fitted) or config.group_detr
    for name, width in zip(_QUERY_TABLES, (4, config.d_model), strict=True):
        if name not in fitted or fitted[name].shape[1] != width:
            continue
        rows = len(fitted[name])
        if rows % groups:
            raise ValueError(f"{name} has {rows} rows, no whole number for each of {groups} first-stage heads")
        queries = rows // groups  # the file of seg-large has 13 x 300 rows where its configuration says 200
        if (groups, queries) == (config.group_detr, config.num_queries):
            continue
        table = fitted[name].unflatten(0, (groups, queries))
        table = table[torch.arange(config.group_detr) % groups][:, torch.arange(config.num_queries) % queries]
        fitted[name] = table.flatten(0, 1)
        changes.append(Change(name, f"{groups} x {queries} rows", f"{config.group_detr} x {config.num_queries}"))
    heads = {match[0]: match for key in fitted if (match := _GROUP_HEAD.match(key))}
    if heads and groups != config.group_detr:
        tensors = {(match[1], int(match[2]), match[3]): fitted.pop(key) for key, match in heads.items()}
        for head, rest in {(head, rest) for head, _, rest in tensors}:
            for group in range(config.group_detr):
                if (head, group % groups, rest) not in tensors:
                    raise ValueError(f"{head}.{group % groups}.{rest} is missing; each of {groups} groups has one")
                fitted[f"{head}.{group}.{rest}"] = tensors[head, group % groups, rest]
        changes.append(Change("first-stage heads", f"{groups} groups", str(config.group_detr)))
    return fitted, changes


def _stored_grid(patches: int, stored: RfDetrConfig) -> tuple[int, int]:
    """(height, width) of a position table with so many patches: its configuration's, or else a square."""
    height, width = grid = stored.backbone_config.position_grid
    side = round(patches**0.5)
    if height * width == patches:
        return grid
    if side * side != patches:
        raise ValueError(
            f"{_POSITIONS} has {patches} patches, neither {height} x {width} as its config.json says nor a square"
        )
    check_limit("patches", side)
    return side, side


def weight_files(path: str, variant: str | None, use_safetensors: bool | None, hub: dict[str, Any]) -> list[str]:
    """The weight files of a model folder or Hub repository, sharded or not; none if there are none."""
    infix = "" if variant is None else f".{variant}"
    kinds = [("model", "safetensors")] * (use_safetensors is not False)
    kinds += [("pytorch_model", "bin")] * (not use_safetensors)
    for stem, ending in kinds:
        if single := cached_file(path, f"{stem}{infix}.{ending}", **_QUIET, **hub):
            return [single]
        if index := cached_file(path, f"{stem}.{ending}.index{infix}.json", **_QUIET, **hub):
            return [cached_file(path, name, **hub) for name in _read_index(index)]
    return []


def _read_index(path: str) -> list[str]:
    """The names of the files that the index of a sharded checkpoint lists."""
    try:
        with open(path, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        outside = [name for name in names if os.path.basename(name) != name]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no index of weights: {type(error).__name__} {error!s:.200}") from error
    if outside:
        raise ValueError(f"{path} lists files outside its folder: {', '.join(outside)[:200]}")
    if not names:
        raise ValueError(f"{path} is no index of weights: its weight_map must name the file of each weight")
    return names


def _check_dtypes(path: str, dtypes: Mapping[str, Any]) -> None:
    """Raise ValueError for weights of the model that are no floats of 16, 32 or 64 bits."""
    for key, dtype in dtypes.items():
        if dtype not in (*FLOATS, *FLOATS.values()) and _WEIGHT.match(original_key(key)):
            raise ValueError(f"{path}: {key:.80} is of {dtype}; weights are float32, float16, bfloat16 or float64")


def _read_shapes(files: Sequence[str]) -> dict[str, list[int]]:
    """The shape of each tensor, from the headers of safetensors files; ValueError for what is no weights."""
    shapes: dict[str, list[int]] = {}
    for name in files:
        try:
            with safe_open(name, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                dtypes = {key: stored.get_dtype() for key, stored in slices.items()}
                shapes |= {key: stored.get_shape() for key, stored in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{name} cannot be read as weights: {error!s:.200}; download or copy it again") from error
        _check_dtypes(name, dtypes)
    return shapes


def read_tensors(files: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of safetensors files, or of pickles, which are not run; ValueError for what is no weights."""
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            is_pickle = name.endswith(".bin")
            held = dict(torch.load(name, map_location="cpu", weights_only=True) if is_pickle else load_file(name))
        except Exception as error:  # neither library promises which
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{name} cannot be read as weights: {type(error).__name__} {reason:.200}") from error
        for key, tensor in held.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                kind = type(tensor).__name__
                raise ValueError(f"{name} holds {key!r:.80}: {kind}; a file of weights holds dense tensors by name")
        _check_dtypes(name, {key: tensor.dtype for key, tensor in held.items()})
        tensors |= held
    return tensors


def _our_config(config: Any, hub: dict[str, Any]) -> RfDetrConfig:
    """A configuration as ours: the port's, one that was pushed with its code, a dictionary, a folder or Hub id."""
    if isinstance(config, RfDetrConfig):
        return config
    if isinstance(config, str | os.PathLike):
        return RfDetrConfig.from_pretrained(config, **hub)
    return RfDetrConfig.from_dict(config if isinstance(config, dict) else config.to_dict())


class RfDetrCheckpoint(PreTrainedModel):
    """Loading and saving of the models: any layout in, the original one out."""

    # Derived from the keypoint settings, which we do not have; recent files hold it, empty.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)_kp_active_mask$"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any):
        """Load a checkpoint in any of the four key layouts; see transformers' `from_pretrained` for the arguments.

        Fields of the configuration can be given as arguments. Tables of another size than the configuration asks for
        are fitted, and each change is reported; see [`fit_tables`]. Heads with another number of classes are
        initialised anew under `ignore_mismatched_sizes=True`, as everywhere in transformers.
        """
        path, state_dict = pretrained_model_name_or_path, kwargs.pop("state_dict", None)
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        if config is None:
            stored = RfDetrConfig.from_pretrained(path, **hub)
            names = [name for name in kwargs if hasattr(stored, name) and name not in _LOADING_ARGUMENTS]
            fields = read_label_maps({name: kwargs.pop(name) for name in names})
            if stored.dropout and "dropout" not in fields:
                logger.warning(f"{path}: trains with dropout {stored.dropout}, as stored; the published models had 0")
            config = RfDetrConfig.from_pretrained(path, **hub, **fields)
        else:
            stored = config = _our_config(config, hub)
            if path is not None and cached_file(str(path), "config.json", **_QUIET, **hub):
                stored = RfDetrConfig.from_pretrained(path, **hub)

        if state_dict is None and path is not None:
            files = weight_files(str(path), kwargs.get("variant"), kwargs.get("use_safetensors"), hub)
            shapes = _read_shapes([name for name in files if name.endswith(".safetensors")])
            # transformers reads shards by what their index says of itself, which may be anything.
            is_single = [os.path.basename(name) for name in files] == ["model.safetensors"]
            with error_context(str(path)):
                fits = is_single and is_original_layout(shapes) and _tables_fit(shapes, stored, config)
            if fits or not files:
                return cls._loaded(super().from_pretrained(path, *model_args, config=config, **kwargs))
            state_dict = read_tensors(files)
        if state_dict is not None:
            with error_context(str(path)):
                state_dict, changes = fit_tables(to_original_layout(state_dict), stored, config)
            for change in changes:
                logger.warning(f"{path}: {change}")
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        return cls._loaded(loaded, path)

    @staticmethod
    def _loaded(loaded: Any, path: Any = None) -> Any:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers makes every loaded parameter trainable, also those that nothing reads.
        model.backbone[0].encoder["encoder"].freeze_unread()
        if path is not None:
            model.name_or_path = model.config.name_or_path = str(path)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save in the original layout, which rfdetr, transformers' port and this package read."""
        kwargs["save_original_format"] = False  # our keys are the original ones: nothing is to be renamed,
        self._weight_conversions: list = []  # not by transformers 5.9 to 5.12 either
        super().save_pretrained(save_directory, *args, **kwargs)
