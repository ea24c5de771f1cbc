"""Checkpoints of rfdetr to folders of transformers, and back.

The tensors keep their names and bits: our module tree is the original one. What a conversion has to find out is the
architecture and the classes. Shapes say most of the architecture and the stored arguments the rest; where both speak,
they must agree. What a file does not say is taken from the published variant that has its shapes.
"""

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from ..atomic_files import atomic_directory
from ..hub.model_card import escape
from ..model.checkpoint_layouts import (
    FLOATS,
    Change,
    fit_tables,
    num_query_groups,
    read_tensors,
    to_original_layout,
    weight_files,
)
from ..model.configuration_rf_detr import RfDetrConfig, RfDetrDinov2Config
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from ..model.validation import as_pair, error_context
from ..model.variants_rf_detr import (
    ALIASES,
    BACKGROUND,
    COCO_ID2LABEL,
    COCO_NAMES,
    PARENT,
    VARIANTS,
    is_background_label,
    normalize_name,
    resolve_variant,
)
from .published_weights import PUBLISHED, download_weights, md5_of, published_file
from .rfdetr_checkpoint import read_rfdetr_file, shape_of, summarize_value, write_rfdetr_file

# rfdetr's encoders: width, heads, registers.
ENCODERS = {
    "dinov2_windowed_small": (384, 6, 0),
    "dinov2_windowed_base": (768, 12, 0),
    "dinov2_registers_windowed_small": (384, 6, 4),
}
# What another value of would be another network than RF-DETR.
_FIXED = {
    "two_stage": True,
    "bbox_reparam": True,
    "lite_refpoint_refine": True,
    "layer_norm": True,
    "decoder_norm": "LN",
    "num_decoder_registers": 0,
    "num_channels": 3,
}
_EMBEDDINGS = "backbone.0.encoder.encoder.embeddings."
_DECODER_LAYER = re.compile(r"transformer\.decoder\.layers\.(\d+)\.")
_CLASS_HEADS = re.compile(r"^(?:class_embed|transformer\.enc_out_class_embed\.\d+)\.(weight|bias)$")
# The logit of a row that is no class: sigmoid(-100) is 0 in half precision too.
_NEVER = -100.0


class Conversion(NamedTuple):
    """What a conversion made, and all that it did not take over as it was."""

    output: Path
    config: RfDetrConfig
    changes: list[Change]


def read_rfdetr_model(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    class_names: Sequence[str] | None = None,
    ema: bool = False,
    trust_checkpoint: bool = False,
) -> tuple[dict[str, Tensor], RfDetrConfig, list[Change], bool]:
    """A checkpoint file of rfdetr -> tensors, configuration, what is not taken over as it is, whether it is published.

    The arguments and errors are those of [`convert_to_transformers`].
    """
    path = Path(path)
    state_dict, arguments, changes = read_rfdetr_file(path, ema=ema, trust_checkpoint=trust_checkpoint)
    with error_context(str(path)):
        _check_arguments(arguments)
        if arguments.get("use_grouppose_keypoints") or any("keypoint" in name for name in state_dict):
            _refuse_keypoints()
        published = PUBLISHED.get(path.name)
        original = {file.md5: file for file in PUBLISHED.values()}.get(md5_of(path))
        if original is not None:
            # It runs as rfdetr's class of its variant says, whatever was set when it was trained.
            published, arguments = original, {}
        claimed = resolve_variant(variant) if variant else published.variant if published else None
        config = _read_config(state_dict, arguments, claimed, published is not None, changes)
        config.id2label = _read_classes(config.num_labels, arguments, class_names, changes)
        config.label2id = {name: label for label, name in config.id2label.items()}
        state_dict = _fitted(state_dict, config, changes)
        config.architectures = [_model_class(state_dict).__name__]
        config.dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in state_dict.values()})
    return state_dict, config, changes, original is not None


def convert_to_transformers(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    variant: str | None = None,
    class_names: Sequence[str] | None = None,
    ema: bool = False,
    trust_checkpoint: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Conversion:
    """Convert a checkpoint of rfdetr to a folder that `from_pretrained` loads, ours and that of transformers' port.

    Example:
        >>> from transformers_rfdetr.conversion.convert import convert_to_transformers
        >>> convert_to_transformers("rf-detr-seg-nano", "seg-nano")  # doctest: +SKIP

    Args:
        source: A published name in any spelling, which is downloaded or found in rfdetr's cache; or a file: a published
            one, `checkpoint_best_*.pth`, Lightning's `.ckpt`, Roboflow's `weights.pt`.
        output: The folder, not there yet. It appears when all in it is written.
        variant: The published variant that the model is of, for a file whose shapes and arguments do not tell.
        class_names: Names of the classes in the order of their labels, instead of the stored ones.
        ema: Take the averaged weights that the file holds beside its weights.
        trust_checkpoint: Run a pickle that holds more than tensors and plain containers; see [`read_rfdetr_file`].
        push_to_hub: Hub repository to upload the folder to; created if it is not there.
        private: Whether it is created as a private one.

    Raises:
        ValueError: the file cannot be read, is no detection or segmentation model, lacks tensors, or says two
            different things of its architecture or classes; the message has both.
    """
    output, path = Path(output), Path(source)
    _check_is_new(output)
    published = PUBLISHED.get(path.name) if path.is_file() else published_file(os.fspath(source))
    with error_context(os.fspath(source)):
        if published is not None and published.variant not in VARIANTS:
            _refuse_keypoints()
    if push_to_hub is not None:
        HfApi().create_repo(push_to_hub, private=private, exist_ok=True)  # what forbids it is better known now
    if published is not None and not path.is_file():
        path = download_weights(published)
    state_dict, config, changes, is_published = read_rfdetr_model(
        path, variant=variant, class_names=class_names, ema=ema, trust_checkpoint=trust_checkpoint
    )
    with atomic_directory(output) as folder:
        config.save_pretrained(folder)
        RfDetrImageProcessor.from_config(config).save_pretrained(folder)
        save_file(_unshared(state_dict), folder / "model.safetensors", {"format": "pt"})
        card = _model_card(push_to_hub or output.name, path.name, config, changes, is_published)
        card.save(folder / "README.md")
    if push_to_hub is not None:
        try:
            HfApi().upload_folder(repo_id=push_to_hub, folder_path=output, commit_message=f"Converted from {path.name}")
        except Exception as error:
            raise OSError(
                f"{output} is whole, but was not uploaded: {error}; upload it with `hf upload {push_to_hub} {output}`"
            ) from error
    return Conversion(output, config, changes)


def convert_to_rfdetr(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Conversion:
    """Convert a folder or Hub repository, ours or of transformers' port, to a file that rfdetr 1.11.2 loads.

    Args:
        source: Folder or Hub id of a detection or segmentation model, in any of the four key layouts.
        output: The file, such as `model.pth`, not there yet. `RFDETR.from_checkpoint` loads it, and the variant's class
            takes it as `pretrain_weights`.

    Raises:
        ValueError: rfdetr cannot build the model (rectangular input, other widths of the encoder, ...), or it lacks
            tensors.
    """
    output, source = Path(output), os.fspath(source)
    if output.exists():
        raise ValueError(f"{output} is there already; give another name, or remove it")
    with error_context(source):
        if not cached_file(source, "config.json"):  # RfDetrConfig would be the default one
            raise ValueError("holds no config.json, so that the architecture is not known")
        config = RfDetrConfig.from_pretrained(source)
        files = weight_files(source, None, None, {})
        if not files:
            raise ValueError("holds no weights: neither model.safetensors nor pytorch_model.bin")
        changes: list[Change] = []
        state_dict = _fitted(to_original_layout(read_tensors(files)), config, changes)
        class_names = _write_classes(state_dict, config, changes)
        arguments = _rfdetr_arguments(state_dict, config)
    variant = _nearest_variant(arguments)
    state_dict["_kp_active_mask"] = torch.zeros(0, 0, dtype=torch.bool)  # no key points; rfdetr's own files have it
    write_rfdetr_file(output, state_dict, rfdetr_class(variant), arguments, class_names)
    return Conversion(output, config, changes)


def format_changes(changes: Sequence[Change]) -> str:
    """The changes as a table for people, a line each."""
    rows = [("what", "in the source", "in the result"), *changes]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{what:<{widths[0]}}  {stored:<{widths[1]}}  {result}" for what, stored, result in rows)


def _refuse_keypoints() -> None:
    raise ValueError(
        "this is an RF-DETR keypoint model, and there is no class for it here: this package detects objects and"
        " segments instances. Roboflow's rfdetr runs it, as RFDETRKeypointPreview"
    )


# The architecture


_COUNTS = (
    *("resolution", "patch_size", "num_windows", "positional_encoding_size", "hidden_dim", "dec_layers"),
    *("sa_nheads", "ca_nheads", "dec_n_points", "num_queries", "num_select", "group_detr", "num_classes"),
    *("dim_feedforward", "mask_downsample_ratio"),
)
_LISTS = {"out_feature_indexes": int, "projector_scale": str}
# Other arguments that are read.
_PLAIN = {*_FIXED, "encoder", "segmentation_head", "use_grouppose_keypoints"}
_LARGEST_GRID = 512  # patches along a side of the position table: pictures of 6,000 pixels and more


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a stored argument that is not of its kind."""
    for name in sorted(_PLAIN & set(arguments)):
        if not isinstance(arguments[name], str | int | float):
            raise ValueError(
                f"the stored argument {name} is {summarize_value(arguments[name])}, and not a text or a number"
            )
    if not isinstance(arguments.get("model_name", ""), str):
        raise ValueError(
            f"the stored argument model_name is {summarize_value(arguments['model_name'])}, and not a text"
        )
    for name in sorted({*_COUNTS, *_LISTS} & set(arguments)):
        value = arguments[name]
        kind = _LISTS.get(name, int)
        values = value if name in _LISTS and isinstance(value, list | tuple) else [value]
        fits = (name in _COUNTS or kind is str or value is values) and all(type(entry) is kind for entry in values)
        fits &= kind is str or all(type(entry) is not int or entry.bit_length() < 64 for entry in values)
        if not fits or not values:
            rule = "a whole number" if name in _COUNTS else f"a list of {'names' if kind is str else 'whole numbers'}"
            raise ValueError(f"the stored argument {name} is {summarize_value(value)}, and not {rule}")
    if not 1 <= arguments.get("positional_encoding_size", 1) <= _LARGEST_GRID:
        raise ValueError(
            f"the stored argument positional_encoding_size is {arguments['positional_encoding_size']}, and not within"
            f" 1 .. {_LARGEST_GRID}"
        )


def _read_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of the weights say, by the names of rfdetr's arguments."""
    needed = {
        f"{_EMBEDDINGS}patch_embeddings.projection.weight": 4,
        f"{_EMBEDDINGS}position_embeddings": 3,
        "query_feat.weight": 2,
        "refpoint_embed.weight": 2,
        "class_embed.bias": 1,
        "transformer.decoder.layers.0.linear1.weight": 2,
    }
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(f"lacks {', '.join(missing)}, so its weights are not of an RF-DETR model")
    tensors = {name: state_dict[name] for name in needed}
    registers = state_dict.get(f"{_EMBEDDINGS}register_tokens", torch.empty(1, 0, 1))
    for name, tensor in (*tensors.items(), ("register_tokens", registers)):
        if tensor.ndim != needed.get(name, 3):
            raise ValueError(f"{name} is {shape_of(tensor)}, which it is in no RF-DETR model")
    patches, positions, queries, references, classes, ffn = (tensor.shape for tensor in tensors.values())
    grid = math.isqrt(max(positions[1] - 1, 0))
    if not grid or 1 + grid * grid != positions[1]:
        raise ValueError(f"the position table has {positions[1]} rows, and not 1 more than a square's")
    groups = max(num_query_groups(state_dict), 1)
    if queries[0] != references[0] or not queries[0] or queries[0] % groups:
        raise ValueError(
            f"query_feat has {queries[0]} rows and refpoint_embed {references[0]}; both need as many for each of"
            f" {groups} groups"
        )
    encoders = {(width, count): name for name, (width, _, count) in ENCODERS.items()}
    in_layer = [_DECODER_LAYER.match(name) for name in state_dict]
    sizes = (patches[0], registers.shape[1])
    return {
        "segmentation_head": any(name.startswith("segmentation_head.") for name in state_dict),
        "encoder": encoders.get(sizes, f"{sizes[0]} wide with {sizes[1]} registers"),
        "patch_size": patches[-1],
        "hidden_dim": queries[1],
        "dec_layers": len({match[1] for match in in_layer if match}),
        "dim_feedforward": ffn[0],
        "positional_encoding_size": grid,
        "group_detr": groups,
        "num_queries": queries[0] // groups,
        "num_classes": classes[0] - 1,
    }


def _variant_arguments(variant: str) -> dict[str, Any]:
    """The arguments of rfdetr's class of a published variant."""
    config, row = RfDetrConfig.from_variant(variant), VARIANTS[variant]
    return {
        "segmentation_head": "-seg-" in variant,
        "encoder": {384: "dinov2_windowed_small", 768: "dinov2_windowed_base"}[row.hidden_size],
        "patch_size": row.patch_size,
        "hidden_dim": config.d_model,
        "dec_layers": row.decoder_layers,
        "positional_encoding_size": row.position_grid,
        "num_queries": row.num_queries,
        "resolution": row.resolution,
        "num_windows": row.num_windows,
        "out_feature_indexes": list(row.out_indices),
        "projector_scale": config.projector_scale,
        "sa_nheads": config.decoder_self_attention_heads,
        "ca_nheads": config.decoder_cross_attention_heads,
        "dec_n_points": config.decoder_n_points,
    }


# Sizes that a model may have otherwise and still be of its variant.
_FREE = {"resolution", "positional_encoding_size", "num_queries"}
# What no shape tells.
_UNSEEN = {
    "num_windows",
    "out_feature_indexes",
    "projector_scale",
    "sa_nheads",
    "ca_nheads",
    "dec_n_points",
    "resolution",
}


def _agree(first: Mapping[str, Any], says: str, second: Mapping[str, Any], says_too: str, remedy: str) -> None:
    """Raise ValueError, with both values, for an argument of which two sources say different things."""
    for name in sorted(set(first) & set(second) - _FREE - {"num_classes"}):
        if first[name] != second[name]:
            raise ValueError(
                f"{says} {name} {summarize_value(first[name])}, and {says_too} {summarize_value(second[name])}; {remedy}"
            )


def _find_variant(shapes: Mapping[str, Any], missing: Sequence[str]) -> str:
    """The published variant with these shapes, whose arguments stand in for those that a file does not hold."""
    names = ("segmentation_head", "encoder", "patch_size", "hidden_dim", "dec_layers")
    rows = {variant: _variant_arguments(variant) for variant in VARIANTS}
    similar = [variant for variant, row in rows.items() if all(row[name] == shapes[name] for name in names)]
    grid = shapes["positional_encoding_size"]
    for variant in similar:
        if VARIANTS[variant].position_grid == grid:
            return variant
    sizes = ", ".join(f"{name} {shapes[name]!r}" for name in names)
    raise ValueError(
        f"the file does not hold {', '.join(missing)}, and no published variant has {sizes} and {grid} x {grid}"
        f" positions; say with --variant of which it is: {' or '.join(similar or VARIANTS)}"
    )


def _read_config(
    state_dict: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    claimed: str | None,
    is_published: bool,
    changes: list[Change],
) -> RfDetrConfig:
    """The configuration that the shapes, the stored arguments and the claimed variant agree on.

    `claimed` is what the user or the file's name says; `is_published`, that the file is one of the published ones, at
    least by its name, so that the variant's number of queries goes before the file's.
    """
    shapes, stored = _read_shapes(state_dict), dict(arguments)
    if isinstance(stored.get("projector_scale"), str):
        stored["projector_scale"] = [stored["projector_scale"]]
    for name, value in _FIXED.items():
        if stored.get(name, value) != value:
            raise ValueError(
                f"the stored arguments have {name} {summarize_value(stored[name])}, and every RF-DETR has {value!r}"
            )
    whole = "the file was changed, or put together from two"
    _agree(shapes, "the weights have", stored, "the stored arguments have", whole)
    missing = sorted(_UNSEEN - set(stored))
    variant = claimed
    if missing and not variant:  # files of 1.7 name their class, and no sizes
        variant = ALIASES.get(normalize_name(stored.get("model_name", ""))) or _find_variant(shapes, missing)
    known = _variant_arguments(variant) if variant else {}
    other = f"if it is no {variant}, rename the file or give another --variant"
    _agree(shapes, "the weights have", known, f"{variant} has", other)
    _agree(stored, "the stored arguments have", known, f"{variant} has", other)
    if missing and not is_published:
        changes.append(Change("arguments", f"no {', '.join(missing)}", f"those of {variant}"))

    grid = stored.get("positional_encoding_size", shapes["positional_encoding_size"])
    queries = stored.get("num_queries", known.get("num_queries") if is_published else None) or shapes["num_queries"]
    if queries > shapes["num_queries"] and "num_queries" in stored:
        raise ValueError(
            f"the weights have num_queries {shapes['num_queries']}, and the stored arguments have {queries}; {whole}"
        )
    queries = min(queries, shapes["num_queries"])
    fits = grid == known.get("positional_encoding_size")
    said = {"resolution": known["resolution"] if fits else grid * shapes["patch_size"]} if known else {}
    said = known | said | stored
    classes = shapes["num_classes"]
    if stored.get("num_classes", classes) not in (classes, classes + 1):
        changes.append(
            Change("num_classes", f"{stored['num_classes']} in the arguments", f"{classes}, as the head has")
        )
    if stored.get("num_select", queries) != queries:
        changes.append(Change("num_select", str(stored["num_select"]), f"top_k={stored['num_select']} when called"))
    if shapes["encoder"] not in ENCODERS:
        raise ValueError(f"the encoder is {shapes['encoder']}, and none of RF-DETR's: {', '.join(ENCODERS)}")
    hidden_size, heads, registers = ENCODERS[shapes["encoder"]]
    return RfDetrConfig(
        backbone_config={
            "hidden_size": hidden_size,
            "num_hidden_layers": 12,
            "num_attention_heads": heads,
            "image_size": grid * shapes["patch_size"],
            "patch_size": shapes["patch_size"],
            "num_windows": said["num_windows"],
            "num_register_tokens": registers,
            "out_indices": list(said["out_feature_indexes"]),
        },
        projector_scale=list(said["projector_scale"]),
        d_model=shapes["hidden_dim"],
        num_queries=queries,
        group_detr=shapes["group_detr"],
        decoder_layers=shapes["dec_layers"],
        decoder_ffn_dim=shapes["dim_feedforward"],
        decoder_self_attention_heads=said["sa_nheads"],
        decoder_cross_attention_heads=said["ca_nheads"],
        decoder_n_points=said["dec_n_points"],
        mask_downsample_ratio=stored.get("mask_downsample_ratio", 4),
        resolution=said["resolution"],
        num_labels=shapes["num_classes"] + 1,
    )


def _rfdetr_arguments(state_dict: Mapping[str, Tensor], config: RfDetrConfig) -> dict[str, Any]:
    """The arguments with which rfdetr builds the model of a configuration."""
    backbone: RfDetrDinov2Config = config.backbone_config
    sizes = (backbone.hidden_size, backbone.num_attention_heads, backbone.num_register_tokens)
    encoder = next((name for name, known in ENCODERS.items() if known == sizes), None)
    grid, resolution = set(backbone.position_grid), set(as_pair(config.resolution))
    rules = {
        "encoder (width, heads, registers)": (sizes, list(ENCODERS.values()), encoder is not None),
        "number of encoder layers": (backbone.num_hidden_layers, 12, backbone.num_hidden_layers == 12),
        "decoder_ffn_dim": (config.decoder_ffn_dim, 2048, config.decoder_ffn_dim == 2048),
        "resolution": (config.resolution, "a square", len(resolution) == 1),
        "position table": (backbone.position_grid, "a square", len(grid) == 1),
    }
    for what, (value, rule, holds) in rules.items():
        if not holds:
            raise ValueError(f"rfdetr cannot build this model: {what} is {value}, and has to be {rule} there")
    return {
        "encoder": encoder,
        "out_feature_indexes": list(backbone.out_indices),
        "patch_size": backbone.patch_size,
        "num_windows": backbone.num_windows,
        "positional_encoding_size": grid.pop(),
        "resolution": resolution.pop(),
        "projector_scale": list(config.projector_scale),
        "hidden_dim": config.d_model,
        "dec_layers": config.decoder_layers,
        "sa_nheads": config.decoder_self_attention_heads,
        "ca_nheads": config.decoder_cross_attention_heads,
        "dec_n_points": config.decoder_n_points,
        "num_queries": config.num_queries,
        "num_select": config.num_queries,
        "group_detr": config.group_detr,
        "num_classes": len(state_dict["class_embed.bias"]) - 1,
        "segmentation_head": _model_class(state_dict) is RfDetrForInstanceSegmentation,
        "mask_downsample_ratio": config.mask_downsample_ratio,
    }


def _nearest_variant(arguments: Mapping[str, Any]) -> str:
    """The published variant whose class rfdetr is to build, given the arguments in which the model differs from it."""

    def distance(variant: str) -> tuple[int, int]:
        known = _variant_arguments(variant)
        different = [name for name in set(known) - _FREE if known[name] != arguments[name]]
        return len(different), abs(known["resolution"] - arguments["resolution"])

    alike = [name for name in VARIANTS if ("-seg-" in name) == arguments["segmentation_head"]]
    return min(alike, key=distance)


def rfdetr_class(variant: str) -> str:
    """rfdetr's class of a published variant: RFDETRSeg2XLarge."""
    parts = variant.removeprefix("rf-detr-").split("-")
    return "RFDETR" + "".join({"xlarge": "XLarge", "2xlarge": "2XLarge"}.get(part, part.capitalize()) for part in parts)


# The classes


def _read_classes(
    rows: int, arguments: Mapping[str, Any], class_names: Sequence[str] | None, changes: list[Change]
) -> dict[int, str]:
    """The name of each row of a class head with `rows` rows.

    The published heads have a row for each category id of COCO. Since rfdetr 1.6 row i is class i, and there is one
    more row than classes, which is no object's. Before, rows were the ids of the data: on Roboflow's data 1 to N, as
    id 0 is the parent of the others and never annotated, with as many rows as that needs.
    """
    names = _names_of(arguments.get("class_names") if class_names is None else class_names)
    if rows == len(COCO_ID2LABEL) and names in ([], list(COCO_NAMES.values())):
        if not names and arguments:
            changes.append(Change("class names", "none", "COCO's, as the head has 91 rows; or give --class-names"))
        return dict(COCO_ID2LABEL)
    if not names:
        changes.append(Change("class names", "none", f"class 0 to class {rows - 1}; give them with --class-names"))
        return {row: f"class {row}" for row in range(rows)}
    count = arguments.get("num_classes")
    is_old = "model_name" not in arguments and count is not None and count != rows - 1
    first = 1 if is_old and count == len(names) + 1 else 0
    if first + len(names) > rows or (rows == len(names) and not is_old and class_names is None):
        raise ValueError(
            f"the class head has {rows} rows, and there are {len(names)} class names ({_first(names)}); it needs a row"
            " for each, and one more since rfdetr 1.6: give the names of the classes with --class-names"
        )
    found = {row: f"__unused_{row}__" for row in range(rows)}
    found |= {first + row: name for row, name in enumerate(names)}
    if rows > len(names) and (not is_old or rows == len(names) + 1 - first):
        found[rows - 1] = BACKGROUND
    if first:
        found[0] = PARENT
        rule = f"{first} to {len(names)}, as before rfdetr 1.6; row 0 is the parent category"
        changes.append(Change("labels", f"{rows} rows, {len(names)} names", rule))
    if unused := [row for row, name in found.items() if name.startswith("__unused")]:
        changes.append(Change("class head", f"{rows} rows, {len(names)} names", f"{len(unused)} rows are not reported"))
    return found


def _names_of(stored: Any) -> list[str]:
    """The stored names of classes in the order of their labels; a mapping is by label."""
    if isinstance(stored, Mapping) and all(type(label) is int for label in stored):
        stored = [stored[label] for label in sorted(stored)]
    names = [] if stored is None else [stored] if isinstance(stored, str) else stored
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"the class names are {summarize_value(stored)}, and not a list of names; give them with --class-names"
        )
    if wrong := sorted(name for name, count in Counter(names).items() if is_background_label(name) or count > 1):
        raise ValueError(
            f"the class names {_first(wrong)} are there twice, or are such as __background__, which are no classes;"
            " give others with --class-names"
        )
    return list(names)


def _first(names: Sequence[str]) -> str:
    return ", ".join(f"{name:.80}" for name in names[:4]) + (", ..." if len(names) > 4 else "")


def _write_classes(state_dict: dict[str, Tensor], config: RfDetrConfig, changes: list[Change]) -> list[str] | None:
    """The class names as rfdetr stores them, or None. Heads that lack the last row, which is no class there, get it."""
    names = [config.id2label[label] for label in range(len(config.id2label))]
    rows = len(state_dict["class_embed.bias"])
    if rows == len(COCO_ID2LABEL) and all(names[slot] == name for slot, name in COCO_NAMES.items()):
        return list(COCO_NAMES.values())
    if names == [f"class {row}" for row in range(rows)]:  # of a file that had no names, and goes back as it was
        return None
    if not is_background_label(names[-1]):
        for name in filter(_CLASS_HEADS.match, list(state_dict)):
            row = torch.zeros_like(state_dict[name][:1])
            state_dict[name] = torch.cat([state_dict[name], row if row.ndim == 2 else row + _NEVER])
        changes.append(Change("class heads", f"{rows} rows", f"{rows + 1}: rfdetr takes the last one for no object's"))
        names.append(BACKGROUND)
    return names[:-1]


# The files


def _model_class(state_dict: Mapping[str, Tensor]) -> type[RfDetrForObjectDetection]:
    has_masks = any(name.startswith("segmentation_head.") for name in state_dict)
    return RfDetrForInstanceSegmentation if has_masks else RfDetrForObjectDetection


def _fitted(state_dict: dict[str, Tensor], config: RfDetrConfig, changes: list[Change]) -> dict[str, Tensor]:
    """The tensors of the model in its order, its tables fitted; ValueError for missing, strange and other ones."""
    with torch.device("meta"):
        model = _model_class(state_dict)(config).state_dict()
    for name in [name for name in model if name in state_dict]:
        _check_numbers(name, state_dict[name])
    state_dict, fitted = fit_tables(state_dict, config, config)
    changes += fitted
    if missing := [name for name in model if name not in state_dict]:
        names = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        raise ValueError(f"lacks {len(missing)} of the model's {len(model)} tensors: {names}")
    for name, wanted in model.items():
        if state_dict[name].shape != wanted.shape:
            raise ValueError(
                f"{name} is {shape_of(state_dict[name])}, and in the model of the arguments {shape_of(wanted)}"
            )
    for name in state_dict:
        if name not in model:
            reason = "left out: empty, for key points" if name == "_kp_active_mask" else "left out: not of the model"
            changes.append(Change(name, shape_of(state_dict[name]), reason))
    return {name: state_dict[name] for name in model}


def _check_numbers(name: str, tensor: Tensor) -> None:
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in FLOATS.values()
    if not is_plain or (tensor.numel() and not tensor.isfinite().all()):  # torch overflows on some shapes of no number
        raise ValueError(
            f"{name} ({tensor.dtype}, {tensor.layout}) is not of finite floating-point numbers of 16 to 64 bits"
        )


def _unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a safetensors file holds them: contiguous, each with memory of its own."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in state_dict.items():
        pointer = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone(memory_format=torch.contiguous_format) if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return unshared


def _check_is_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; give another name, or remove it")


_CARD = """
# {title}

An RF-DETR model for {task} ({resolution} x {resolution} pixels, {queries} queries, {labels} classes), converted from
{source} of [rfdetr](https://github.com/roboflow/rf-detr) with transformers-rfdetr
(`pip install transformers-rfdetr`).

```python
from PIL import Image
from transformers import AutoImageProcessor, {auto}

import transformers_rfdetr

model = {auto}.from_pretrained("{name}").eval()
processor = AutoImageProcessor.from_pretrained("{name}")
image = Image.open("picture.jpg")
outputs = model(**processor(image, return_tensors="pt"))
results = processor.{post_process}(outputs, threshold=0.5, target_sizes=[image.size[::-1]])
```

| label | class |
|---|---|
{classes}

| not taken over as it was | in the source | here |
|---|---|---|
{changes}
"""


def _model_card(
    name: str, source: str, config: RfDetrConfig, changes: Sequence[Change], is_published: bool
) -> ModelCard:
    masks = config.architectures == [RfDetrForInstanceSegmentation.__name__]
    names = {label: name for label, name in config.id2label.items() if not is_background_label(name)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation" if masks else "object-detection",
        license="apache-2.0" if is_published else None,
        tags=["rf-detr", "instance-segmentation" if masks else "object-detection"],
    )
    text = _CARD.format(
        title=escape(Path(name).name),
        name=name,
        source=escape(source),
        task="instance segmentation" if masks else "object detection",
        auto="AutoModelForInstanceSegmentation" if masks else "AutoModelForObjectDetection",
        post_process="post_process_instance_segmentation" if masks else "post_process_object_detection",
        resolution=config.resolution,
        queries=config.num_queries,
        labels=len(names),
        classes="\n".join(f"| {label} | {escape(name)} |" for label, name in names.items()),
        changes="\n".join(f"| {' | '.join(map(escape, change))} |" for change in changes) or "| nothing | | |",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
