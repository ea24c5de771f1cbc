"""Read Roboflow's checkpoint files without running their pickles, and write files that rfdetr loads.

Three forms circulate (https://github.com/roboflow/rf-detr):

* `{"model", "args"}`: the published files, those trained with rfdetr before 1.6, and Roboflow's `weights.pt`. The
  arguments are a namespace, and `ema_model` may hold EMA weights.
* `{"model", "state_dict", "args", "model_name", "model_config", ...}`: `checkpoint_best_*.pth` of later versions.
* `{"state_dict", "hyper_parameters", ...}`: Lightning's `.ckpt`, with names prefixed by `model.`; the state of a
  callback holds the EMA weights.
"""

import argparse
import os
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from ..atomic_files import atomic_file
from ..model.checkpoint_files import FLOATS
from ..model.checkpoint_layouts import Change

logger = logging.get_logger(__name__)


class RfdetrFile(NamedTuple):
    """What one of Roboflow's files holds, whatever its form."""

    state_dict: dict[str, Tensor]  # by the original names; the tensors may be mapped from the file
    arguments: dict[str, Any]  # architecture, class names and training arguments as rfdetr stored them
    changes: list[Change]


# Types of stored arguments. Both only hold attributes.
_NAMESPACES = [argparse.Namespace, types.SimpleNamespace]
# Prefixes of DistributedDataParallel and AveragedModel, Lightning's module, and torch.compile.
_WRAPPED = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_IN_MODULE = re.compile(r"(?:module\.)?model\.")
_PEFT_PREFIX = "base_model.model."
_ADAPTER = re.compile(r"^(.+)\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(?:\.weight)?$")
_LORA_ALPHA = 16  # rfdetr's, which its files do not store
# A file may take this many times its size in memory. Compression saves a tenth of real weights, and few are tied.
_MAX_GROWTH = 4
_SMALL_BYTES = 1 << 20  # a file of untrained weights, most of them zeros, compresses to almost nothing


def read_rfdetr_file(path: str | os.PathLike[str], *, ema: bool = False, trust_checkpoint: bool = False) -> RfdetrFile:
    """Read a checkpoint of rfdetr in any of the three forms.

    Args:
        path: The file.
        ema: Convert the EMA weights that the file contains beside the others.
        trust_checkpoint: Read a pickle that contains more than tensors, plain containers and namespaces. Such a
            pickle can run any code with your permissions.

    Raises:
        ValueError: The file is not such a checkpoint, is incomplete, or needs `trust_checkpoint`; the message names the
            file and the reason.
    """
    path = Path(path)
    archive = _check_kind(path)
    content = _unpickle(path, archive, trust_checkpoint)
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path} must contain a non-empty dict, got {type(content).__name__}. Give a checkpoint that rfdetr wrote."
        )
    weights = _ema_weights(path, content) if ema else _weights(path, content)
    _check_memory(path, weights, _unpacked_size(archive) if archive else path.stat().st_size)
    state_dict, changes = _strip_prefixes(path, weights)
    return RfdetrFile(_merge_lora(path, state_dict, changes), _read_arguments(content), changes)


def summarize_value(value: Any) -> str:
    """Return a stored value for a message: short strings, numbers, and short flat lists; of all else the type.

    Nested lists that share their parts can be small in a file and exponentially long as text.
    """
    if isinstance(value, str):
        return repr(value[:80]) + ("..." if len(value) > 80 else "")
    is_number = isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    if value is None or is_number:
        return repr(value)
    is_list = isinstance(value, list | tuple)
    if is_list and len(value) <= 8 and not any(isinstance(entry, list | tuple) for entry in value):
        return f"[{', '.join(map(summarize_value, value))}]"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def shape_of(tensor: Tensor) -> str:
    """Return the shape of a tensor for a message, such as 384x3x12x12."""
    return "x".join(map(str, tensor.shape)) or "a number"


def _check_kind(path: Path) -> list[zipfile.ZipInfo] | None:
    """Return the members of the zip archive that PyTorch files are since torch 1.6, or None for an older file.

    Raises:
        ValueError: The file is not a PyTorch checkpoint, or unpacks to much more than weights do.
    """
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a path that does not exist"
        raise ValueError(
            f"the checkpoint must be a file of rfdetr, such as checkpoint_best_total.pth, or a published name, such as"
            f" rf-detr-seg-nano, got {kind}: {path}"
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        return _check_archive(path, size)
    if not head:
        raise ValueError(f"{path} is empty. Download or copy it again.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        raise ValueError(f"{path} is a safetensors file. Load its folder with from_pretrained.")
    if head.startswith(b"version https://"):
        raise ValueError(f"{path} is a Git LFS pointer instead of the weights. Run `git lfs pull`.")
    if not head.startswith(b"\x80"):
        raise ValueError(f"{path} must be a PyTorch checkpoint, got a file that starts with {head[:8]!r}")
    return None


def _check_archive(path: Path, size: int) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is cut off after {size} bytes. Download or copy it again.") from error
    names = {member.filename.rsplit("/", 1)[-1] for member in members}
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a TorchScript module. Give the checkpoint that it was exported from.")
    if "data.pkl" not in names:
        raise ValueError(f"{path} must be a PyTorch checkpoint, got a zip archive without data.pkl")
    if (unpacked := _unpacked_size(members)) > _MAX_GROWTH * size + _SMALL_BYTES:
        raise ValueError(
            f"{path} must unpack to at most {_MAX_GROWTH} times its {size} bytes, got {unpacked} bytes. Give the file"
            " as its training saved it."
        )
    return members


def _unpacked_size(archive: Sequence[zipfile.ZipInfo]) -> int:
    return sum(member.file_size for member in archive)


def _unpickle(path: Path, archive: Sequence[zipfile.ZipInfo] | None, trust_checkpoint: bool) -> Any:
    # A compressed file cannot be mapped: torch would take the compressed bytes for weights.
    mmap = archive is not None and all(member.compress_type == zipfile.ZIP_STORED for member in archive)
    try:
        with torch.serialization.safe_globals(_NAMESPACES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error, if there is one, says what is wrong with the pickle
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        names = ", ".join(_unsafe_globals(path, error)) or "what torch does not load as weights"
        if not trust_checkpoint:
            raise ValueError(
                f"{path} must contain only tensors, plain containers and namespaces, got {names}. The file may be"
                " damaged, or it runs code when it is loaded. If you trust its author, pass --trust-checkpoint"
                " (trust_checkpoint=True)."
            ) from error
        logger.warning(f"{path}: the pickle may run code: it contains {names}, and trust_checkpoint is set")
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen types for bytes that are not a checkpoint
        raise _unreadable(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path} cannot be read as a PyTorch checkpoint: {reason:.200}")


def _unsafe_globals(path: Path, error: Exception) -> list[str]:
    """Return what the pickle of a refused file would call; it is read, not run."""
    names: list[str] = []
    with torch.serialization.safe_globals(_NAMESPACES), suppress(Exception):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # Of files from before torch 1.6, torch names the first one in its error only.
    names = sorted(names) or re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    return [re.sub(r"[^\w.]", "?", name)[:80] for name in names[:8]] + ["..."] * (len(names) > 8)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _weights(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    for candidate in (content.get("model"), content.get("state_dict"), content):
        if _is_state_dict(candidate):
            return candidate
    keys = ", ".join(summarize_value(key) for key in list(content)[:6])
    raise ValueError(f"{path} must contain weights as 'model' or 'state_dict', got the keys {keys}")


def _ema_weights(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else []
    averages = [state.get("average_model_state_dict") for state in states if isinstance(state, dict)]
    for candidate in (content.get("ema_model"), content.get("legacy_ema_state_dict"), *averages):
        if _is_state_dict(candidate):
            # AveragedModel counts its updates beside the weights.
            return {name: tensor for name, tensor in candidate.items() if name != "n_averaged"}
    hint = ", and its weights are the EMA weights already" if content.get("best_total_source") == "ema" else ""
    raise ValueError(f"`ema` requires EMA weights; {path} holds none{hint}. Omit --ema (ema=True).")


def _check_memory(path: Path, weights: Mapping[str, Tensor], size: int) -> None:
    """Raise ValueError for tensors that take much more memory than the `size` bytes of the unpacked file."""
    total = 0
    for name, tensor in weights.items():
        title = f"{path}: {summarize_value(name)} ({shape_of(tensor)})"
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(f"{title} must be a dense tensor, got {kind}")
        needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if needed > stored:
            raise ValueError(
                f"{title} must store each of its numbers, got {stored} bytes for {needed}. Save a clone of it."
            )
        total += needed
    if total > _MAX_GROWTH * size:
        raise ValueError(
            f"{path}: the tensors must take at most {_MAX_GROWTH} times the {size} stored bytes, got {total}: too many"
            " share memory. Save clones of them."
        )


def _strip_prefixes(path: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Change]]:
    """Return the weights by the names of rfdetr's model, without the prefixes of its wrappers, and what changed."""
    is_lightning = any(_IN_MODULE.match(name) for name in weights)
    stripped: dict[str, Tensor] = {}
    changes = []
    prefixes: set[str] = set()
    for key, tensor in weights.items():
        if is_lightning and not _IN_MODULE.match(key):  # of Lightning's module, beside the model
            changes.append(Change(key, shape_of(tensor), "dropped: not in the model"))
            continue
        name = _WRAPPED.sub("", key)
        if name in stripped:
            raise ValueError(
                f"{path} must contain {summarize_value(name)} once, got it again as {summarize_value(key)}"
            )
        prefixes |= {match[0] for match in _WRAPPED.finditer(key)}
        stripped[name] = tensor
    return stripped, changes + [Change("names", f"{prefix}*", "*") for prefix in sorted(prefixes)]


def _merge_lora(path: Path, state_dict: dict[str, Tensor], changes: list[Change]) -> dict[str, Tensor]:
    """Merge the adapters of a `backbone_lora=True` run into the weights that they adapt.

    DoRA (https://arxiv.org/abs/2402.09353): rows of `W + B A` scaled to the lengths in the magnitude vector.
    """
    adapters: dict[str, dict[str, Tensor]] = {}
    merged: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = key.replace(_PEFT_PREFIX, "")
        if match := _ADAPTER.match(name):
            adapters.setdefault(match[1], {})[match[2]] = tensor
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    for layer, adapter in adapters.items():
        title = f"{path}: the adapter of {summarize_value(layer)}"
        tensors = adapter | ({"weight": merged[f"{layer}.weight"]} if f"{layer}.weight" in merged else {})
        if not {"lora_A", "lora_B", "weight"} <= set(tensors):
            raise ValueError(f"{title} must have lora_A, lora_B and a weight, got {', '.join(sorted(tensors))}")
        if not _adapter_fits(tensors["weight"], adapter):
            shapes = ", ".join(f"{name} {shape_of(tensors[name])} ({tensors[name].dtype})" for name in sorted(tensors))
            raise ValueError(f"{title} must have the shape and dtype of its weight, got {shapes}")
        weight = tensors["weight"] + _LORA_ALPHA / len(adapter["lora_A"]) * (adapter["lora_B"] @ adapter["lora_A"])
        if "lora_magnitude_vector" in adapter:
            weight *= (adapter["lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
        merged[f"{layer}.weight"] = weight
    if adapters:
        changes.append(Change(f"LoRA adapters of {len(adapters)} layers", "beside the weights", "merged into them"))
    return merged


def _adapter_fits(weight: Tensor, adapter: Mapping[str, Tensor]) -> bool:
    """Return whether B (rows, rank) A (rank, columns) has the size of the weight; their product may be huge."""
    down, up, lengths = adapter["lora_A"], adapter["lora_B"], adapter.get("lora_magnitude_vector")
    return (
        down.ndim == up.ndim == 2
        and 0 < len(down) == up.shape[1]
        and weight.shape == (len(up), down.shape[1])
        and (lengths is None or lengths.shape == weight.shape[:1])
        and down.dtype == up.dtype
        and all(tensor.dtype in FLOATS.values() for tensor in (weight, *adapter.values()))
    )


def _read_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """Return the stored arguments; those of the architecture have priority over those of the training."""
    arguments: dict[str, Any] = {}
    for source in ("hyper_parameters", "args", "model_config"):
        stored = content.get(source)
        fields = stored if isinstance(stored, dict) else getattr(stored, "__dict__", {})
        if source != "model_config":  # a default of the training, which no model was built with
            fields = {name: value for name, value in fields.items() if name != "num_select"}
        arguments |= {name: value for name, value in fields.items() if value is not None}
    model_name = content.get("model_name")
    return arguments | ({"model_name": model_name} if isinstance(model_name, str) else {})


def write_rfdetr_file(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    model_name: str,
    model_config: dict[str, Any],
    class_names: list[str] | None,
) -> None:
    """Write a file that `rfdetr` 1.11.2 loads by `from_checkpoint` and as `pretrain_weights`, with plain containers.

    Args:
        path: The file. It appears when it is complete.
        state_dict: Weights by their original names.
        model_name: Class of rfdetr, such as `RFDETRSegNano`.
        model_config: Arguments of that class.
        class_names: Names of the classes in the order of their labels, or None.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": dict(state_dict),
        # rfdetr reads the names and the numbers of queries and groups from "args", and the rest from "model_config".
        "args": model_config | {"class_names": class_names},
        "model_name": model_name,
        "model_config": model_config,
    }
    # torch names the archive inside after a path that it is given, which is a new one each time.
    with atomic_file(path) as partial, partial.open("wb") as file:
        torch.save(content, file)
