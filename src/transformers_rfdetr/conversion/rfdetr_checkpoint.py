"""Roboflow's checkpoint files: read without running what they hold, and written so that rfdetr loads them.

Three forms circulate (https://github.com/roboflow/rf-detr):

* `{"model", "args"}`: the published files, those trained with rfdetr before 1.6, and Roboflow's `weights.pt`. The
  arguments are a namespace, and `ema_model` may hold averaged weights.
* `{"model", "state_dict", "args", "model_name", "model_config", ...}`: `checkpoint_best_*.pth` of later versions.
* `{"state_dict", "hyper_parameters", ...}`: Lightning's `.ckpt`, names behind `model.`; a callback's state holds the
  averaged weights.
"""

import argparse
import os
import pickle
import pickletools
import re
import types
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from ..atomic_files import atomic_file
from ..model.checkpoint_layouts import FLOATS, Change

logger = logging.get_logger(__name__)


class RfdetrFile(NamedTuple):
    """What one of Roboflow's files holds, whatever its form."""

    state_dict: dict[str, Tensor]  # by the original names; the tensors may be mapped from the file
    arguments: dict[str, Any]  # architecture, class names and training arguments as rfdetr stored them
    changes: list[Change]


# What a namespace of arguments is stored as; both only hold attributes.
_ALLOWED = [argparse.Namespace, types.SimpleNamespace]
# What the pickle of a state dict and its arguments names; for the message on others only.
_PLAIN = re.compile(
    r"collections\.OrderedDict|argparse\.Namespace|types\.SimpleNamespace|(__builtin__|builtins)\.(set|bytearray|complex)"
    r"|torch(\._utils\._rebuild_\w+|\.storage\.\w+|\.\w*Storage|\.Size|\.device|\.(float|bfloat|int|uint|bool|complex)\w*)"
)
# DistributedDataParallel and AveragedModel, Lightning's module, torch.compile.
_WRAPPED = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+|(?<=\.)_orig_mod\.")
_IN_MODULE = re.compile(r"(?:module\.)?model\.")
_PEFT_PREFIX = "base_model.model."
_ADAPTER = re.compile(r"^(.+)\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(?:\.weight)?$")
_LORA_ALPHA = 16  # rfdetr's, which its files do not store
# Times its own size that a file may take in memory. Compression spares a tenth of real weights, and few are tied.
_GROWTH = 4
_SMALL = 1 << 20  # bytes; a file of untrained weights, most of them zeros, shrinks to next to nothing


def read_rfdetr_file(path: str | os.PathLike[str], *, ema: bool = False, trust_checkpoint: bool = False) -> RfdetrFile:
    """Read a checkpoint of rfdetr in any of the three forms.

    Args:
        path: The file.
        ema: Take the averaged weights that the file holds beside the others.
        trust_checkpoint: Run the file's pickle where it holds more than tensors, plain containers and namespaces. It
            can do anything that you can.

    Raises:
        ValueError: the file is no such checkpoint, cannot be read whole, or would have to be trusted; the message
            names the file and the reason.
    """
    path = Path(path)
    archive = _check_kind(path)
    content = _unpickle(path, archive, trust_checkpoint)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, not the dictionary of an RF-DETR checkpoint")
    weights = _averaged_weights(path, content) if ema else _weights(path, content)
    _check_memory(path, weights, _unpacked_size(archive) if archive else path.stat().st_size)
    state_dict, changes = _bare_names(path, weights)
    merged = _merge_lora(path, state_dict, changes)
    return RfdetrFile(merged, _arguments(content), changes)


def summarize_value(value: Any) -> str:
    """A stored value for a message: short texts, numbers, and flat lists of a few; of all else what it is.

    A list that holds another one twice, and that one a third twice, is small in its file and without an end as a text.
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


def _unpickle(path: Path, archive: Sequence[zipfile.ZipInfo] | None, trust_checkpoint: bool) -> Any:
    # What is compressed cannot be mapped: torch would take the compressed bytes for weights.
    mapped = archive is not None and all(member.compress_type == zipfile.ZIP_STORED for member in archive)
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the pickle is in the error, if it is one
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = _foreign_names(path, archive)
        held = f"{', '.join(found[:8])}{', ...' if len(found) > 8 else ''}" or "what torch does not load as weights"
        if not trust_checkpoint:
            raise ValueError(
                f"{path} holds {held} besides tensors, plain containers and namespaces, or is damaged; to load it would"
                " be to run code from the file. If you know who made it, convert it with --trust-checkpoint"
                " (trust_checkpoint=True)"
            ) from error
        logger.warning(f"{path}: running the file's pickle, with {held}, as trust_checkpoint asks for")
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen kinds for bytes that are no checkpoint
        raise _unreadable(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{path} cannot be read as a PyTorch checkpoint: {reason:.200}")


def _foreign_names(path: Path, archive: Sequence[zipfile.ZipInfo] | None) -> list[str]:
    """What a file's pickle would call besides tensors, plain containers and namespaces; it is read, not run."""
    names, strings = set(), ["", ""]
    with ExitStack() as files, suppress(Exception):  # of what is no pickle any more
        stream: IO[bytes] = files.enter_context(open(path, "rb"))
        if archive is not None:
            pickled = next(member for member in archive if _stem(member) == "data.pkl")
            stream = files.enter_context(files.enter_context(zipfile.ZipFile(stream)).open(pickled))
        for _ in range(1 if archive else 4):  # before torch 1.6 the fourth pickle of a file is its content
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST"):
                    names.add(argument.replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return sorted(re.sub(r"[^\w.]", "?", name)[:80] for name in names if not _PLAIN.fullmatch(name))


def _stem(member: zipfile.ZipInfo) -> str:
    return member.filename.rsplit("/", 1)[-1]


def _unpacked_size(archive: Sequence[zipfile.ZipInfo]) -> int:
    return sum(member.file_size for member in archive)


def _check_kind(path: Path) -> list[zipfile.ZipInfo] | None:
    """The members of the zip archive that a PyTorch file is since torch 1.6, or None of an older one.

    Raises:
        ValueError: it is no PyTorch checkpoint, or one that unpacks to much more than any weights do.
    """
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(
            f"{path} {kind}; give a checkpoint file of rfdetr, such as checkpoint_best_total.pth, or a published name"
            " such as rf-detr-seg-nano"
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        raise ValueError(f"{path} is empty; download or copy it again")
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path} is cut off after {size} bytes; download or copy it again") from error
        stems = {_stem(member) for member in members}
        if "constants.pkl" in stems:
            raise ValueError(f"{path} is a TorchScript module; give the checkpoint that it was exported from")
        if "data.pkl" not in stems:
            raise ValueError(f"{path} is a zip archive without data.pkl, so no PyTorch checkpoint")
        if (unpacked := _unpacked_size(members)) > _GROWTH * size + _SMALL:
            raise ValueError(
                f"{path} has {size} bytes and unpacks to {unpacked}, and weights to no more than {_GROWTH} times as"
                " many; give the file as its training saved it"
            )
        return members
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        raise ValueError(f"{path} is a safetensors file; from_pretrained loads its folder as it is")
    if head.startswith(b"version https://"):
        raise ValueError(f"{path} is a Git LFS pointer instead of the weights; run `git lfs pull`")
    if not head.startswith(b"\x80"):
        raise ValueError(f"{path} starts with {head[:8]!r}, so it is no PyTorch checkpoint")
    return None


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
    raise ValueError(f"{path} holds {keys}: no RF-DETR checkpoint, which has its weights as 'model' or 'state_dict'")


def _check_memory(path: Path, weights: Mapping[str, Tensor], size: int) -> None:
    """Raise ValueError for tensors that are small in the file, of `size` bytes unpacked, and large when written out."""
    total = 0
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
            raise ValueError(f"{path}: {summarize_value(name)} ({kind}) is no plain table of numbers; save it as one")
        needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if needed > stored:
            raise ValueError(
                f"{path}: {summarize_value(name)} ({shape_of(tensor)}) takes {needed} bytes, and {stored} are stored for it;"
                " save a clone of it, which repeats no number"
            )
        total += needed
    if total > _GROWTH * size:
        raise ValueError(
            f"{path}: its tensors take {total} bytes, more than {_GROWTH} times the {size} that are stored: too many of"
            " them share memory; save clones of them"
        )


def _averaged_weights(path: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else []
    averages = [state.get("average_model_state_dict") for state in states if isinstance(state, dict)]
    for candidate in (content.get("ema_model"), content.get("legacy_ema_state_dict"), *averages):
        if _is_state_dict(candidate):
            # AveragedModel counts its updates beside the weights.
            return {name: tensor for name, tensor in candidate.items() if name != "n_averaged"}
    hint = " (its weights are the averaged ones already)" if content.get("best_total_source") == "ema" else ""
    raise ValueError(f"{path} holds no averaged weights besides its own{hint}; leave --ema (ema=True) away")


def _bare_names(path: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Change]]:
    """The weights under the names of rfdetr's model, without the prefixes of what it was wrapped in."""
    # Lightning's file also holds what its module has besides the model.
    is_lightning = any(_IN_MODULE.match(name) for name in weights)
    bare: dict[str, Tensor] = {}
    changes = []
    prefixes: set[str] = set()
    for name, tensor in weights.items():
        if is_lightning and not _IN_MODULE.match(name):
            changes.append(Change(name, shape_of(tensor), "dropped: not in the model"))
            continue
        stripped = _WRAPPED.sub("", name)
        if stripped in bare:
            raise ValueError(
                f"{path} holds {summarize_value(stripped)} twice, the second time as {summarize_value(name)}"
            )
        prefixes |= {match[0] for match in _WRAPPED.finditer(name)}
        bare[stripped] = tensor
    return bare, changes + [Change("names", f"{prefix}*", "*") for prefix in sorted(prefixes)]


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape for people: 384x3x12x12."""
    return "x".join(map(str, tensor.shape)) or "a number"


def _adapter_fits(weight: Tensor, parts: Mapping[str, Tensor]) -> bool:
    """Whether B A, (rows, rank) by (rank, columns), has the weight's size; that of two thin matrices may be huge."""
    down, up, lengths = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    return (
        down.ndim == up.ndim == 2
        and 0 < len(down) == up.shape[1]
        and weight.shape == (len(up), down.shape[1])
        and (lengths is None or lengths.shape == weight.shape[:1])
        and down.dtype == up.dtype
        and all(tensor.dtype in FLOATS.values() for tensor in (weight, *parts.values()))
    )


def _merge_lora(path: Path, state_dict: dict[str, Tensor], changes: list[Change]) -> dict[str, Tensor]:
    """Merge the adapters of a `backbone_lora=True` run into the weights that they adapt.

    DoRA (https://arxiv.org/abs/2402.09353): rows of `W + B A` scaled to the lengths in the magnitude vector.
    """
    adapters: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.replace(_PEFT_PREFIX, "")
        if match := _ADAPTER.match(name):
            adapters.setdefault(match[1], {})[match[2]] = tensor
        else:
            plain[name.replace(".base_layer.", ".")] = tensor
    for layer, parts in adapters.items():
        weight = plain.get(f"{layer}.weight")
        if weight is None or not {"lora_A", "lora_B"} <= set(parts):
            raise ValueError(
                f"{path} holds {sorted(parts)} of {summarize_value(layer)}; an adapter has lora_A, lora_B and the weight"
            )
        if not _adapter_fits(weight, parts):
            all_parts = {"weight": weight} | parts
            shapes = ", ".join(f"{name} {shape_of(part)} ({part.dtype})" for name, part in all_parts.items())
            raise ValueError(f"{path}: the adapter of {summarize_value(layer)} does not fit: {shapes}")
        merged = weight + _LORA_ALPHA / len(parts["lora_A"]) * (parts["lora_B"] @ parts["lora_A"])
        if "lora_magnitude_vector" in parts:
            merged *= (parts["lora_magnitude_vector"] / merged.norm(dim=1))[:, None]
        plain[f"{layer}.weight"] = merged
    if adapters:
        changes.append(Change(f"LoRA adapters of {len(adapters)} layers", "beside the weights", "merged into them"))
    return plain


def _arguments(content: dict[str, Any]) -> dict[str, Any]:
    """The stored arguments; those of the architecture, where stored apart, over those of the training."""
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
    """Write a file that `rfdetr` 1.11.2 loads by `from_checkpoint` and as `pretrain_weights`; plain containers only.

    Args:
        path: The file. It is there when it is whole.
        state_dict: Weights by their original names.
        model_name: Class of rfdetr, such as `RFDETRSegNano`.
        model_config: Arguments of that class.
        class_names: Names of the classes in the order of their labels, or None.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": dict(state_dict),
        # rfdetr looks here for the names and for the numbers of queries and groups, and below for the rest.
        "args": model_config | {"class_names": class_names},
        "model_name": model_name,
        "model_config": model_config,
    }
    # torch names the archive inside after a path that it is given, and that one is new each time.
    with atomic_file(path) as partial, partial.open("wb") as file:
        torch.save(content, file)
