"""Validate plain values: numbers, sizes, label maps and limits."""

import json
import math
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# The largest values that a configuration may have, far above any published model. A configuration may come from an
# untrusted file, and one number in it can ask for more memory than there is. To allow more, raise an entry.
LIMITS = {
    "parameters": 2_000_000_000,  # counted when a model is built on the meta device, which takes no memory
    "hidden_size": 16_384,
    "d_model": 16_384,
    "decoder_ffn_dim": 1_000_000,
    "decoder_n_points": 1_000,
    "num_register_tokens": 1_000,
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
    """Prepend a place, such as a file or an annotation, to the message of an error that is raised inside."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


@contextmanager
def config_errors_as_value_errors(name: str) -> Iterator[None]:
    """Convert what transformers raises for unexpected values and invalid JSON to a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # TypeError, AttributeError, KeyError, RecursionError, ...
        if isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError):
            raise
        if isinstance(error, OSError) and not isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise ValueError(f"{name} cannot be read: {type(error).__name__} {error!s:.200}") from error


def require(is_valid: bool, name: str, value: Any, rule: str, remedy: str = "") -> None:
    """Raise ValueError with the parameter's name, the rule, the value and the remedy, unless `is_valid`."""
    if not is_valid:
        value = value.tolist() if isinstance(value, np.ndarray) else value
        raise ValueError(f"`{name}` must be {rule}, got {value!r:.80}" + (f". {remedy}" if remedy else ""))


def check_limit(name: str, value: int) -> None:
    """Raise ValueError if `LIMITS` has an entry `name` and the value is above it."""
    if value > LIMITS.get(name, value):
        raise ValueError(
            f"`{name}` must be at most {LIMITS[name]}, got {value:.6g}. If the value is right and there is memory for"
            f" it, raise transformers_rfdetr.model.validation.LIMITS[{name!r}]."
        )


# Numbers


def to_builtin(value: Any) -> Any:
    """Convert arrays, tensors and numpy scalars, also inside lists, to Python numbers and lists.

    Rows of a `datasets.Dataset` with a format hold them. An array with a single element becomes a number.
    """
    if isinstance(value, list | tuple):
        return [to_builtin(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.item() if math.prod(value.shape) == 1 else to_builtin(value.tolist())
    return value


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or numpy, but not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite real number, but not a bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def is_index(value: Any) -> bool:
    """Return whether a value is an integer of at least 0 that fits into 64 bits."""
    return is_integer(value) and 0 <= int(value) < 1 << 63


def are_numbers(values: Any, count: int) -> bool:
    """Return whether a value is a list of `count` finite numbers."""
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))


def are_strings(values: Any) -> bool:
    """Return whether a value is a list or tuple of strings."""
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


# Configurations


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """Check that fields of a configuration are integers of at least `least` and at most their limit."""
    for name in names:
        value = getattr(config, name)
        require(is_integer(value) and value >= least, name, value, f"an integer of at least {least}")
        check_limit(name, int(value))


def check_numbers(config: Any, *names: str) -> None:
    """Check that fields of a configuration are finite numbers of at least 0."""
    for name in names:
        value = getattr(config, name)
        require(is_number(value) and value >= 0, name, value, "a finite number of at least 0")


def refuse_class_attributes(cls: type, fields: Iterable[str], allowed: Collection[str] = ()) -> None:
    """Raise ValueError for a field that would replace a method or another attribute of the class."""
    for name in fields:
        if hasattr(cls, name) and name not in allowed and not isinstance(getattr(cls, name), property):
            raise ValueError(f"{name!r:.80} must not be set, it is an attribute of {cls.__name__}. Remove the setting.")


def read_label_maps(fields: dict[str, Any]) -> dict[str, Any]:
    """Derive the missing one of `id2label` and `label2id` in the fields of a configuration from the other one.

    Raises:
        ValueError: unless the classes are numbered from 0 without gaps, and have names.
    """
    fields = {name: value for name, value in fields.items() if value is not None or "label" not in name}
    for name in ("id2label", "label2id"):
        example = "a dict {0: 'roof', 1: 'tree'}" if name == "id2label" else "a dict {'roof': 0, 'tree': 1}"
        require(isinstance(fields.get(name, {}), Mapping), name, fields.get(name), example)
    if "id2label" in fields:
        fields["id2label"] = _check_labels(fields["id2label"].items())
        fields.setdefault("label2id", {label: index for index, label in fields["id2label"].items()})
    elif "label2id" in fields:
        fields["id2label"] = _check_labels((index, label) for label, index in fields["label2id"].items())
    return fields


def _check_labels(labels: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    id2label = {}
    for index, label in labels:
        is_valid = is_index(index) or (isinstance(index, str) and index.isdecimal())  # JSON has strings as keys
        require(is_valid, "id2label", index, "numbered with integers from 0")
        require(isinstance(label, str), f"id2label[{index}]", label, "a string, the name of the class")
        id2label[int(index)] = label
    is_gapless = bool(id2label) and sorted(id2label) == list(range(len(id2label)))
    require(is_gapless, "id2label", sorted(id2label), "numbered from 0 without gaps")
    return id2label


def read_score_thresholds(thresholds: Any, id2label: Mapping[int, str]) -> dict[int, float]:
    """Return score thresholds by label; JSON has strings as keys.

    Raises:
        ValueError: unless each is a score in [0, 1] of a label in `id2label`.
    """
    example = "a dict {label: score in [0, 1]}"
    require(isinstance(thresholds, Mapping), "score_thresholds", thresholds, example)
    read = {}
    for label, score in thresholds.items():
        is_label = is_index(label) or (isinstance(label, str) and label.isdecimal())
        is_known = is_label and int(label) in id2label
        require(is_known, "score_thresholds", label, f"a dict of labels from 0 to {len(id2label) - 1}")
        require(is_number(score) and 0 <= score <= 1, f"score_thresholds[{label}]", score, "a score in [0, 1]")
        read[int(label)] = float(score)
    return read


# Sizes


def as_pair(size: Any) -> tuple[int, int]:
    """Convert a size to (height, width); a single number means a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def read_size(size: Any, name: str) -> int | tuple[int, int]:
    """Check a size in pixels, one number or (height, width); return an int for a square, else a tuple of ints."""
    sides = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    require(all(map(is_integer, sides)), name, size, "an integer number of pixels or [height, width]")
    height, width = (int(side) for side in sides)
    return height if height == width else (height, width)


def nearest_legal_sizes(size: int, block: int) -> list[int]:
    """Return the multiples of `block` next to `size`, nearest first."""
    below = max(size // block * block, 0)
    return sorted({max(below, block), below + block}, key=lambda legal: abs(legal - size))


def check_multiple(size: Any, block: int, name: str, reason: str) -> None:
    """Check that each side of a size is a positive multiple of `block`; the error names the nearest legal sizes."""
    for side in as_pair(size):
        if side <= 0 or side % block:
            legal = " or ".join(map(str, nearest_legal_sizes(side, block)))
            raise ValueError(
                f"each side of `{name}` must be a multiple of {block} ({reason}), got {side}. Try {legal}."
            )


def check_resolution(size: Any, patch_size: int, num_windows: int, name: str = "resolution") -> None:
    """Check that each side of an input size is a multiple of patch size times windows."""
    check_multiple(size, patch_size * num_windows, name, f"patch size {patch_size} x {num_windows} windows")


def check_grid(name: str, size: Any, patch_size: int) -> None:
    """Check the limits of a size in pixels and of its number of patches."""
    for side in as_pair(size):
        check_limit(name, side)
        check_limit("patches", side // patch_size)
