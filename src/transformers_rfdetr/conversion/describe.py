"""Describe a checkpoint from its configuration and headers, without running it."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from ..assets import TINY_NAME, tiny_checkpoint
from ..hub.load import check_model_type
from ..model.checkpoint_files import FLOATS, weight_files
from ..model.checkpoint_layouts import is_original_layout
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from ..model.validation import as_pair
from ..model.variants_rf_detr import COCO_ID2LABEL, COCO_NAMES, is_background_label, resolve_variant
from .architecture import BACKBONE_FIELDS, DECODER_FIELDS, has_segmentation_head, nearest_variant
from .convert import read_rfdetr_model


class _Checkpoint(NamedTuple):
    """The parts of a checkpoint that are described."""

    source: str
    config: RfDetrConfig
    has_masks: bool
    processor: RfDetrImageProcessor
    dtype: str | None = None
    key_layout: str | None = None
    file_size: int | None = None  # bytes


def describe(name: str) -> dict[str, Any]:
    """Describe a checkpoint in built-in types.

    Args:
        name: A folder, a Hub id, a published name in any usual spelling, or a file of rfdetr. Weights are not
            downloaded: those of a Hub repository are read only if they are in the cache.

    Returns:
        `model`, `source`, `variant` (the nearest published one), `differences` from it (field -> [here, there]),
        `task`, `num_classes`, `classes` (label -> name), `resolution` [height, width], `block` (sides are multiples of
        it), `legal_sizes` next to the resolution, `num_queries`, `group_detr`, `parameters`, `backbone` and `decoder`
        (layers, width, ...), `preprocessing`; and `dtype`, `key_layout` and `file_size` in bytes, None where no weights
        are read.

    Raises:
        ValueError: It is not an RF-DETR model, or cannot be read.
    """
    path = tiny_checkpoint() if name == TINY_NAME else Path(name).expanduser()
    if path.is_file():
        checkpoint = _read_file(path)
    elif path.is_dir() or (variant := _published_name(name)) is None:
        checkpoint = _read_repository(str(path) if path.is_dir() else name)
    else:
        config = RfDetrConfig.from_variant(variant)
        source = "a published checkpoint; nothing was downloaded"
        checkpoint = _Checkpoint(source, config, "-seg-" in variant, RfDetrImageProcessor.from_config(config))
    config, has_masks = checkpoint.config, checkpoint.has_masks
    backbone = config.backbone_config
    nearest, differences = nearest_variant(config, has_masks)
    classes = {label: text for label, text in config.id2label.items() if _is_class(label, text)}
    sides = as_pair(config.resolution)
    return {
        "model": name,
        "source": checkpoint.source,
        "variant": nearest,
        "differences": differences,
        "task": "instance segmentation" if has_masks else "object detection",
        "num_classes": len(classes),
        "classes": classes,
        "resolution": list(sides),
        "block": backbone.patch_size * backbone.num_windows,
        "legal_sizes": sorted({size for side in sides for step in (-1, 1) for size in config.legal_sizes(side + step)}),
        "num_queries": config.num_queries,
        "group_detr": config.group_detr,
        "parameters": _count_parameters(config, has_masks),
        "dtype": checkpoint.dtype,
        "key_layout": checkpoint.key_layout,
        "file_size": checkpoint.file_size,
        "backbone": {name: getattr(backbone, name) for name in BACKBONE_FIELDS},
        "decoder": {name: getattr(config, name) for name in DECODER_FIELDS},
        "preprocessing": {name: getattr(checkpoint.processor, name) for name in ("size", "image_mean", "image_std")},
    }


def _is_class(label: int, name: str) -> bool:
    """Return whether a label is a class; the published heads have rows without a category of COCO."""
    return not is_background_label(name) and not (label not in COCO_NAMES and name == COCO_ID2LABEL.get(label))


def _count_parameters(config: RfDetrConfig, has_masks: bool) -> int:
    with torch.device("meta"):  # shapes without memory
        model = (RfDetrForInstanceSegmentation if has_masks else RfDetrForObjectDetection)(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _published_name(name: str) -> str | None:
    if "/" not in name:
        with suppress(ValueError):
            return resolve_variant(name)
    return None


def _read_repository(name: str) -> _Checkpoint:
    """Read a folder or a repository on the Hub."""
    is_folder = Path(name).is_dir()
    try:
        check_model_type(name)
        config = RfDetrConfig.from_pretrained(name)
        cached = None if is_folder else try_to_load_from_cache(name, "model.safetensors")
        files = weight_files(name, None, None, {}) if is_folder else [cached] if isinstance(cached, str) else []
        dtype, key_layout = _read_headers([file for file in files if file.endswith(".safetensors")])
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} must be an RF-DETR model in a folder or on the Hub: {reason}") from error
    try:
        processor = RfDetrImageProcessor.from_pretrained(name)
    except OSError:  # as `load` does
        processor = RfDetrImageProcessor.from_config(config)
    return _Checkpoint(
        "a folder" if is_folder else "a repository on the Hub",
        config,
        any("Segmentation" in architecture for architecture in config.architectures or ["Segmentation"]),
        processor,
        dtype,
        key_layout,
        sum(Path(file).stat().st_size for file in files) or None,
    )


def _read_headers(files: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the dtypes and the key layout of safetensors files."""
    dtypes: dict[str, str] = {}
    for name in files:
        with safe_open(name, framework="pt") as file:
            dtypes |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    if not dtypes:
        return None, None
    names = sorted({str(FLOATS.get(dtype, dtype)).removeprefix("torch.") for dtype in dtypes.values()})
    return ", ".join(names), "original" if is_original_layout(dtypes) else "transformers' port's, in whole or in part"


def _read_file(path: Path) -> _Checkpoint:
    """Read a checkpoint file of rfdetr as `convert` does."""
    model = read_rfdetr_model(path)
    return _Checkpoint(
        "a file of rfdetr; `transformers-rfdetr convert` converts it to a folder",
        model.config,
        has_segmentation_head(model.state_dict),
        RfDetrImageProcessor.from_config(model.config),
        ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.state_dict.values()})),
        "original",
        path.stat().st_size,
    )
