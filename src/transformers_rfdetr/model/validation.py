"""Validation of plain values: numbers, sizes, label maps, and the place that an error names."""

import json
import math
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# The largest values that a configuration may have: a file may come from anyone, and one number in it can ask for more
# memory than there is. Far above any model that was published; to go further, raise an entry.
LIMITS = {
    "parameters": 2_000_000_000,
    "num_hidden_layers": 1_000,
    "decoder_layers": 1_000,
    "group_detr": 1_000,
    "num_queries": 10_000,
    "num_labels": 100_000,
    "image_size": 8_192,  # pixels along a side
    "resolution": 8_192,
    "patches": 512,  # along a side
}


@contextmanager
def error_context(where: str) -> Iterator[None]:
    """Puts the place in front of the message of an error."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def config_errors_as_value_errors(what: str) -> Iterator[None]:
    """Turns what transformers raises for values that it does not expect, and for what is no JSON, into a ValueError."""
    try:
        yield
    except Exception as error:  # TypeError, AttributeError, KeyError, RecursionError, ...
        if isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError):
            raise
        if isinstance(error, OSError) and not isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError):
            raise
        reason = f"{type(error).__name__} {error!s:.200}"
        raise ValueError(f"{what} cannot be read as a configuration: {reason}; correct it") from error


def require(is_valid: bool, name: str, value: Any, rule: str, remedy: str = "") -> None:
    """Raise ValueError with the parameter's name, the rule and the value, unless `is_valid`."""
    if not is_valid:
        raise ValueError(f"`{name}` must be {rule}, got {value!r:.80}" + f". {remedy}" * bool(remedy))


def to_builtin(value: Any) -> Any:
    """Arrays, tensors and numpy's scalars, also in lists -> Python's numbers and lists; one number of any shape is one.

    They stand in the rows of a `datasets.Dataset` with a format.
    """
    if isinstance(value, list | tuple):
        return [to_builtin(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.item() if math.prod(value.shape) == 1 else to_builtin(value.tolist())
    return value


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite real number and not a bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def are_numbers(values: Any, count: int) -> bool:
    """Whether it is a list of `count` finite numbers."""
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))


def is_index(value: Any) -> bool:
    """Whether it is a whole number of at least 0 that fits into 64 bits."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) < 1 << 63


def are_all(values: Any, kind: type) -> bool:
    """Whether it is a list of values of a kind, which are no bool."""
    return isinstance(values, list | tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """Raise ValueError unless each named field of `config` is an integer of at least `least`, within its limit."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} {value!r:.80} must be a whole number of at least {least}")
        check_limit(name, int(value))


def check_numbers(config: Any, *names: str) -> None:
    """Raise ValueError unless each named field of `config` is a finite number of at least 0."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} {value!r:.80} must be a finite number of at least 0")


def check_limit(name: str, value: int) -> None:
    """Raise ValueError for a value above its limit; what has no entry in `LIMITS` has none."""
    if value > LIMITS.get(name, value):
        raise ValueError(
            f"{name} {value:.6g} is above the limit of {LIMITS[name]}, which no published model comes near; if it is"
            f" right and there is memory for it, raise transformers_rfdetr.model.validation.LIMITS[{name!r}]"
        )


def as_pair(size: Any) -> tuple[int, int]:
    """`size` as (height, width): a single number means a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def read_size(size: Any, name: str) -> int | tuple[int, int]:
    """A size in pixels, one number or (height, width), as plain ints.

    Raises:
        ValueError: if it is neither.
    """
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not all(isinstance(side, numbers.Integral) and not isinstance(side, bool) for side in sides):
        raise ValueError(f"{name} {size!r} is neither a whole number of pixels nor [height, width]")
    height, width = (int(side) for side in sides)
    return height if height == width else (height, width)


def nearest_legal_sizes(size: int, block: int) -> list[int]:
    """The multiples of `block` next to `size`, nearest first."""
    below = max(size // block * block, 0)
    return sorted({max(below, block), below + block}, key=lambda legal: abs(legal - size))


def check_resolution(size: Any, patch_size: int, num_windows: int, name: str = "resolution") -> None:
    """Raise ValueError, naming the nearest legal sizes, unless each side of `size` is a multiple of patch x windows."""
    block = patch_size * num_windows
    for side in as_pair(size):
        if side <= 0 or side % block:
            legal = " or ".join(map(str, nearest_legal_sizes(side, block)))
            raise ValueError(
                f"{name} {side} is not a multiple of {block} (patch {patch_size} x {num_windows} windows); try {legal}"
            )


def check_grid(name: str, size: Any, patch_size: int) -> None:
    """Raise ValueError if a side of `size` in pixels, or its number of patches, is above its limit."""
    for side in as_pair(size):
        check_limit(name, side)
        check_limit("patches", side // patch_size)


def read_label_maps(fields: dict[str, Any]) -> dict[str, Any]:
    """Configuration fields with the missing one of `id2label` and `label2id` derived from the other.

    Raises:
        ValueError: unless the classes are numbered from 0 without gaps, and have names.
    """
    fields = {name: value for name, value in fields.items() if value is not None or "label" not in name}
    for name in ("id2label", "label2id"):
        if not isinstance(fields.get(name, {}), Mapping):
            raise ValueError(f"{name} {fields[name]!r:.80} is no mapping; give {{0: 'roof', 1: 'tree'}} as id2label")
    if "id2label" in fields:
        fields["id2label"] = {_read_slot(slot): label for slot, label in fields["id2label"].items()}
        _check_names(fields["id2label"])
        fields.setdefault("label2id", {label: slot for slot, label in fields["id2label"].items()})
    elif "label2id" in fields:
        fields["id2label"] = {_read_slot(slot): label for label, slot in fields["label2id"].items()}
        _check_names(fields["id2label"])
    return fields


def _read_slot(slot: Any) -> int:
    """A class index as JSON's keys hold it, a text, or as a number."""
    if isinstance(slot, bool) or not isinstance(slot, numbers.Integral | str) or not str(slot).isdecimal():
        raise ValueError(f"{slot!r:.80} is no class index; number the classes from 0")
    return int(slot)


def _check_names(id2label: dict[int, str]) -> None:
    slots = sorted(id2label)
    if not slots or slots != list(range(len(slots))):
        shown = f"{slots!r:.80}"
        raise ValueError(f"id2label numbers its slots {shown}; they must be 0 .. {len(slots) - 1}, one for each class")
    if unnamed := [slot for slot in slots if not isinstance(id2label[slot], str)]:
        raise ValueError(f"id2label[{unnamed[0]}] is {id2label[unnamed[0]]!r:.80}, not a name; give a text")


def refuse_methods(cls: type, fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that would take the place of a method."""
    for name in fields:
        if callable(getattr(cls, name, None)):
            raise ValueError(f"{name!r:.80} is no setting of {cls.__name__} but a method; remove it")
