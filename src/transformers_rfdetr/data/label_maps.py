"""Label maps: the classes of a dataset by category id (the number in the annotation files) and by label.

A *label* is the model's class index: 0 to N - 1, in the order of the category ids. `classes` is always a dict
{category id: name}.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..model.validation import is_index

_SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def canonical_split_name(name: str) -> str:
    """Return "train", "validation" or "test" for their usual names in any case, and any other name unchanged."""
    return _SPLIT_ALIASES.get(name.lower(), name)


class HasLabelMap:
    """Provide the label map of `_classes`, names by category id in the order of the ids."""

    _classes: dict[int, str]

    @property
    def classes(self) -> dict[int, str]:
        """Name of each category id."""
        return dict(self._classes)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each label, as in the model's configuration."""
        return dict(enumerate(self._classes.values()))

    @property
    def label2id(self) -> dict[str, int]:
        """Label of each name."""
        return {name: label for label, name in self.id2label.items()}

    @property
    def category_ids(self) -> list[int]:
        """Category id of each label."""
        return list(self._classes)


def validate_classes(classes: Mapping[int, str]) -> dict[int, str]:
    """Return the classes in the order of their ids, ids as int and names as str.

    Raises:
        ValueError: there are no classes, an id is not an integer >= 0, a name is not text or a number, or two classes
            have the same name.
    """
    if invalid := [category for category in classes if not is_index(category)]:
        raise ValueError(f"category id must be an integer >= 0, got {invalid[0]!r:.60}. Number the categories.")
    for category, name in classes.items():
        # str() of a deeply nested value, which a few lines of YAML can define, would fill the memory.
        if not isinstance(name, str | int | float):
            kind = type(name).__name__
            raise ValueError(f"the name of category {category} must be a string, got {kind}. Give it a name.")
    ordered = {int(category): str(classes[category]) for category in sorted(classes)}
    if not ordered:
        raise ValueError(
            "the data must define at least one category, got none. Name them in the data's `categories`, or with"
            " `class_names` or `label_map`."
        )
    category_of: dict[str, int] = {}
    for category, name in ordered.items():
        if category_of.setdefault(name, category) != category:
            raise ValueError(
                f"category names must be unique, got {name!r:.60} for the categories {category_of[name]} and"
                f" {category}. Rename one of them, or give the annotations of both the same category id."
            )
    return ordered


def common_label_map(
    classes: Mapping[str, Mapping[int, str]], used: Mapping[str, Iterable[int]] | None = None
) -> dict[int, str]:
    """Return the classes of all splits: those of "train", or of the first split if there is no "train".

    Args:
        classes: The classes that each split defines.
        used: The category ids of each split's annotations; by default all that it defines.

    Raises:
        ValueError: another split uses a category that the reference split does not define, or gives it another name.
    """
    reference = "train" if "train" in classes else next(iter(classes))
    expected = classes[reference]
    for split, defined in classes.items():
        needed = sorted(defined if used is None else used[split])
        if unknown := {category: defined.get(category, "?") for category in needed if category not in expected}:
            raise ValueError(
                f"the categories of split {split!r} must be defined in split {reference!r},"
                f" {describe_classes(expected)}, got {describe_classes(unknown)}. Define them in {reference!r}, or"
                f" correct {split!r}."
            )
        if renamed := {category: name for category, name in defined.items() if expected.get(category, name) != name}:
            names = {category: expected[category] for category in renamed}
            raise ValueError(
                f"each category must have the same name in all splits, got {describe_classes(renamed)} in split"
                f" {split!r} and {describe_classes(names)} in split {reference!r}. Correct one of the splits."
            )
    return validate_classes(expected)


def category_id_shift(defined: Iterable[int], used: Iterable[int]) -> int:
    """Return 1 or -1 if the annotations' category ids seem to be that much above the defined ones, else 0.

    They seem so if the defined ids have no gap, and the used ids are defined only after the shift is subtracted.
    """
    defined, used = set(defined), set(used)
    has_gap = len(defined) != max(defined, default=0) - min(defined, default=1) + 1
    if has_gap or used <= defined:
        return 0
    return next((shift for shift in (1, -1) if used <= {category + shift for category in defined}), 0)


def describe_classes(classes: Mapping[Any, str], limit: int = 12) -> str:
    """Return the first `limit` classes as text for an error."""
    listed = ", ".join(f"{key}: {name!r:.60}" for key, name in list(classes.items())[:limit])
    return f"{{{listed}{f', ... ({len(classes)} in all)' * (len(classes) > limit)}}}"


def read_class_names(class_names: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    """Return a list of names, or a mapping, as {category id: name}.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(class_names, str) or not isinstance(class_names, Mapping | Sequence):
        raise ValueError(
            f"`class_names` must be a list of names or a dict {{id: name}}, got {type(class_names).__name__}"
            f" {class_names!r:.80}. Put the names into a list."
        )
    return dict(class_names) if isinstance(class_names, Mapping) else dict(enumerate(class_names))


def check_class_names(class_names: Any, classes: Mapping[int, str]) -> None:
    """Raise ValueError if the user gave `class_names` that differ from the classes that the data define."""
    if class_names is not None and read_class_names(class_names) != dict(classes):
        raise ValueError(
            f"`class_names` must equal the classes that the data define, {describe_classes(classes)}, got"
            f" {class_names!r:.200}. Remove `class_names`."
        )
