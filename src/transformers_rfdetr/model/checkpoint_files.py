"""Load and save the models: find the weight files, check them, and fit them to the configuration."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file, logging

from .checkpoint_layouts import (
    fit_class_heads,
    fit_tables,
    is_original_layout,
    original_key,
    tables_fit,
    to_original_layout,
)
from .configuration_rf_detr import RfDetrConfig
from .validation import error_context, read_label_maps

logger = logging.get_logger(__name__)

# The types that weights may have, by their names in the header of a safetensors file.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHT = re.compile(r"(backbone|transformer|refpoint_embed|query_feat|class_embed|bbox_embed|segmentation_head)\.")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
_NONE_IF_MISSING = {"_raise_exceptions_for_missing_entries": False}
# Arguments of from_pretrained that are also attributes of a configuration, but say how the model is loaded.
_LOADING_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation", "name_or_path")


def weight_files(path: str, variant: str | None, use_safetensors: bool | None, hub: dict[str, Any]) -> list[str]:
    """Return the weight files of a model folder or Hub repository, sharded or not; an empty list if it has none."""
    infix = "" if variant is None else f".{variant}"
    kinds = [("model", "safetensors")] * (use_safetensors is not False)
    kinds += [("pytorch_model", "bin")] * (not use_safetensors)
    for stem, ending in kinds:
        if single := cached_file(path, f"{stem}{infix}.{ending}", **_NONE_IF_MISSING, **hub):
            return [single]
        if index := cached_file(path, f"{stem}.{ending}.index{infix}.json", **_NONE_IF_MISSING, **hub):
            return [cached_file(path, name, **hub) for name in _read_index(index)]
    return []


def _read_index(path: str) -> list[str]:
    """Return the names of the files that the index of a sharded checkpoint lists."""
    try:
        with open(path, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        outside = [name for name in names if os.path.basename(name) != name]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be the JSON index of a sharded checkpoint: {type(error).__name__} {error!s:.200}. Download or"
            " copy it again."
        ) from error
    if outside:
        raise ValueError(f"{path} must list files of its own folder, got {', '.join(outside)[:200]}")
    if not names:
        raise ValueError(f"{path} must name the file of each weight in weight_map, got an empty weight_map")
    return names


def _read_shapes(files: Sequence[str]) -> dict[str, list[int]]:
    """Return the shape of each tensor from the headers of safetensors files; check their types."""
    shapes: dict[str, list[int]] = {}
    for name in files:
        try:
            with safe_open(name, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                dtypes = {key: stored.get_dtype() for key, stored in slices.items()}
                shapes |= {key: stored.get_shape() for key, stored in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{name} cannot be read as weights: {error!s:.200}. Download or copy it again.") from error
        _check_dtypes(name, dtypes)
    return shapes


def read_tensors(files: Sequence[str]) -> dict[str, Tensor]:
    """Read the tensors of safetensors files or pickles, without running code in them.

    Raises:
        ValueError: A file cannot be read, or contains anything but dense tensors; weights must be floats.
    """
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            is_pickle = name.endswith(".bin")
            held = dict(torch.load(name, map_location="cpu", weights_only=True) if is_pickle else load_file(name))
        except Exception as error:  # neither library documents which
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{name} cannot be read as weights: {type(error).__name__} {reason:.200}") from error
        for key, tensor in held.items():
            if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ValueError(
                    f"{name} must contain only dense tensors by name, got {key!r:.80}: {type(tensor).__name__}"
                )
        _check_dtypes(name, {key: tensor.dtype for key, tensor in held.items()})
        tensors |= held
    return tensors


def _check_dtypes(path: str, dtypes: Mapping[str, Any]) -> None:
    for key, dtype in dtypes.items():
        if dtype not in (*FLOATS, *FLOATS.values()) and _WEIGHT.match(original_key(key)):
            raise ValueError(f"{path}: {key:.80} must be float32, float16, bfloat16 or float64, got {dtype}")


def _our_config(config: Any, hub: dict[str, Any]) -> RfDetrConfig:
    """Convert the port's configuration, one that was pushed with its code, a dict, a folder or a Hub id to ours."""
    if isinstance(config, RfDetrConfig):
        return config
    if isinstance(config, str | os.PathLike):
        return RfDetrConfig.from_pretrained(config, **hub)
    return RfDetrConfig.from_dict(config if isinstance(config, dict) else config.to_dict())


class RfDetrCheckpoint(PreTrainedModel):
    """Loading of models in any key layout, and saving in the original one."""

    # Derived from settings of keypoints, which these models do not have; recent files hold it, empty.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)_kp_active_mask$"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any):
        """Load a checkpoint in any of the four key layouts; see transformers' `from_pretrained` for the arguments.

        Fields of the configuration can be given as arguments. Tables of another size than the configuration asks for
        are fitted, and each change is logged; see [`fit_tables`]. As with every model of transformers, other classes
        than those of the checkpoint require `ignore_mismatched_sizes=True`; see [`fit_class_heads`] for their heads.
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
            if path is not None and cached_file(str(path), "config.json", **_NONE_IF_MISSING, **hub):
                stored = RfDetrConfig.from_pretrained(path, **hub)

        has_new_classes = bool(kwargs.get("ignore_mismatched_sizes")) and stored.id2label != config.id2label
        if state_dict is None and path is not None:
            files = weight_files(str(path), kwargs.get("variant"), kwargs.get("use_safetensors"), hub)
            shapes = _read_shapes([name for name in files if name.endswith(".safetensors")])
            # transformers reads shards by the metadata of their index, which may be anything.
            is_single = [os.path.basename(name) for name in files] == ["model.safetensors"]
            with error_context(str(path)):
                fits = is_single and is_original_layout(shapes) and tables_fit(shapes, stored, config)
            if (fits and not has_new_classes) or not files:
                return cls._loaded(super().from_pretrained(path, *model_args, config=config, **kwargs))
            state_dict = read_tensors(files)
        if state_dict is not None:
            with torch.device("meta"):
                cls(config)  # refuses a model of too many parameters before its tables take memory
            with error_context(str(path)):
                state_dict, changes = fit_tables(to_original_layout(state_dict), stored, config)
                if has_new_classes:
                    changes += fit_class_heads(state_dict, stored.id2label, config.id2label)
            for change in changes:
                logger.warning(f"{path}: {change}")
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        return cls._loaded(loaded, path)

    @staticmethod
    def _loaded(loaded: Any, path: Any = None) -> Any:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers makes every loaded parameter trainable, also those that are not used.
        model.backbone[0].encoder["encoder"].freeze_unused()
        if path is not None:
            model.name_or_path = model.config.name_or_path = str(path)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save in the original layout, which rfdetr, transformers' port and this package read.

        LoRA layers that `peft.inject_adapter_in_model` has put into the model are merged into the saved weights.
        """
        state_dict = kwargs.get("state_dict") or self.state_dict()
        if any(".base_layer." in name for name in state_dict):
            kwargs["state_dict"] = _merge_lora(self, state_dict)
        kwargs["save_original_format"] = False  # our names are the original ones: nothing must be renamed,
        self._weight_conversions: list = []  # which transformers 5.9 to 5.12 do otherwise
        super().save_pretrained(save_directory, *args, **kwargs)


def _merge_lora(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under the names without adapters, with weight + scaling x B A instead of the weights."""
    merged = {}
    for name, tensor in state_dict.items():
        layer, is_adapted, rest = name.partition(".base_layer.")
        if is_adapted and rest == "weight":
            module = model.get_submodule(layer)
            for adapter in module.active_adapters:
                down, up = (state_dict[f"{layer}.lora_{part}.{adapter}.weight"] for part in "AB")
                tensor = tensor + module.scaling[adapter] * (up @ down)
        if is_adapted or ".lora_" not in name:
            merged[f"{layer}.{rest}" if is_adapted else name] = tensor
        elif ".lora_A." not in name and ".lora_B." not in name:
            raise ValueError(
                f"{name:.200} cannot be merged into the saved weights. Call peft's merge_and_unload first."
            )
    return merged
