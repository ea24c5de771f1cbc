"""Label maps: the classes of a dataset, by category id and by label."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..model.validation import is_index

_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}


class HasLabelMap:
    """Has the label map of `_classes`, which are names by category id, in the order of the ids."""

    _classes: dict[int, str]

    @property
    def id2label(self) -> dict[int, str]:
        """Label -> name, as a model's configuration has it."""
        return dict(enumerate(self._classes.values()))

    @property
    def label2id(self) -> dict[str, int]:
        """Name -> label."""
        return {name: label for label, name in self.id2label.items()}

    @property
    def category_ids(self) -> list[int]:
        """Category id of each label."""
        return list(self._classes)


def validate_classes(classes: Mapping[int, str]) -> dict[int, str]:
    """Names by category id, in the order of the ids."""
    wrong = [category for category in classes if not is_index(category)]
    if wrong:
        raise ValueError(f"category id {wrong[0]!r:.60} is not a whole number of at least 0; number the categories")
    # A few lines of YAML can nest a name so often that its text would fill the memory.
    unnamed = [category for category, name in classes.items() if not isinstance(name, str | int | float)]
    if unnamed:
        kind = type(classes[unnamed[0]]).__name__
        raise ValueError(f"category {unnamed[0]} is called by a {kind}, not by a text; name it")
    ordered = {int(category): str(classes[category]) for category in sorted(classes)}
    if not ordered:
        raise ValueError("the data define no category; give their names (`categories`, class_names or label_map)")
    by_name: dict[str, int] = {}
    for category, name in ordered.items():
        if by_name.setdefault(name, category) != category:
            raise ValueError(
                f"the categories {by_name[name]} and {category} are both called {name!r:.60}; names must differ:"
                " rename one, or give both annotations one id"
            )
    return ordered


def common_label_map(
    classes: Mapping[str, Mapping[int, str]], used: Mapping[str, Iterable[int]] | None = None
) -> dict[int, str]:
    """The classes that each split defines, and those that it uses (all, by default) -> the classes of all splits.

    They are those of "train", or of the first split where there is none.
    """
    first = "train" if "train" in classes else next(iter(classes))
    ours = classes[first]
    for split, theirs in classes.items():
        needed = sorted(theirs if used is None else used[split])
        if unknown := {category: theirs.get(category, "?") for category in needed if category not in ours}:
            raise ValueError(
                f"split {split!r} has the categories {describe_classes(unknown)}, which split {first!r} does not define:"
                f" it has {describe_classes(ours)}; define them there, or correct split {split!r}"
            )
        if renamed := {category: name for category, name in theirs.items() if ours.get(category, name) != name}:
            before = {category: ours[category] for category in renamed}
            raise ValueError(
                f"split {split!r} has the categories {describe_classes(renamed)}, which split {first!r} calls"
                f" {describe_classes(before)}; one id must have one name in all splits: correct one of them"
            )
    return validate_classes(ours)


def describe_classes(classes: Mapping[Any, str], most: int = 12) -> str:
    """The classes for a message, the first of them where they are many."""
    listed = ", ".join(f"{key}: {name!r:.60}" for key, name in list(classes.items())[:most])
    return f"{{{listed}{f', ... ({len(classes)} in all)' * (len(classes) > most)}}}"


def read_class_names(class_names: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    """Return the names by category id."""
    if isinstance(class_names, str):
        raise ValueError(f"class_names {class_names!r} is one text; give a list of names, or {{id: name}}")
    if not isinstance(class_names, Mapping | Sequence):
        raise ValueError(f"names of a {type(class_names).__name__} are none; give a list of names, or {{id: name}}")
    return dict(class_names) if isinstance(class_names, Mapping) else dict(enumerate(class_names))


def check_class_names(classes: Mapping[int, str], class_names: Any) -> None:
    """Raise ValueError if `class_names` are given and contradict the classes of the data."""
    if class_names is not None and read_class_names(class_names) != dict(classes):
        raise ValueError(
            f"class_names {class_names!r:.200} are not what the data call their classes, {describe_classes(classes)};"
            " leave class_names out"
        )


def split_name(name: str) -> str:
    """What a split is called here: "val" is "validation"."""
    return _SPLITS.get(name, name)
