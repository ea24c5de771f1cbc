"""Categories: unique ids and names within a split, and the same in all splits."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..coco import category_name, parent_category_ids
from ..label_maps import category_id_shift, common_label_map, describe_classes
from .raw_split import RawSplit


def check_categories(splits: Sequence[RawSplit]) -> None:
    """Fill in the classes of each split, and note the problems of its categories."""
    used = {split.name: split.used_category_ids() for split in splits}
    groups = parent_category_ids([{"categories": split.categories} for split in splits], set().union(*used.values()))
    for split in splits:
        split.group_ids = groups
        if not split.categories and any(image.annotations for image in split.images):
            split.note("no_categories", "", change=None)
        _check_split(split, used[split.name])
        if shift := category_id_shift(split.classes, used[split.name]):
            split.ambiguous_ids |= split.classes.keys()
            detail = f"used are {sorted(used[split.name])[:12]}, defined {describe_classes(split.classes)}"
            split.note("shifted_category_ids", f"{detail}: add {-shift} to each category_id, or define what is missing")
    inconsistent = {"no_categories", "duplicate_category_id", "duplicate_category_name", "shifted_category_ids"}
    if not inconsistent & {problem.kind for split in splits for problem in split.problems}:
        _compare_splits(splits, used, groups)


def _check_split(split: RawSplit, used: set[int]) -> None:
    by_name: dict[str, Mapping[str, Any]] = {}
    for category in split.categories:
        category_id, name = category["id"], category_name(category)
        if category_id in split.classes:
            change = "the repeated definition is dropped"
            if name != (first_name := split.classes[category_id]):
                split.ambiguous_ids.add(category_id)
                change = "dropped, with its objects: which of the two names is right is ambiguous"
            detail = f"{category_id} is {first_name!r:.60} and {name!r:.60}"
            split.note("duplicate_category_id", detail, change=change)
            continue
        split.classes[category_id] = name
        if category_id in split.group_ids:
            split.note("unused_category", f"{category_id} {name!r:.60} only groups others")
            continue
        first = by_name.setdefault(name, category)
        if first is not category:
            change = "merged"
            if not _are_same_class(first, category):
                split.ambiguous_ids |= {first["id"], category_id}
                change = "dropped, with their objects: whether they are one class is ambiguous"
            split.note("duplicate_category_name", f"{first['id']} and {category_id}: {name!r:.60}", change=change)
        elif category_id not in used:
            split.note("unused_category", f"{category_id} {name!r:.60}", change=None)


def _are_same_class(*categories: Mapping[str, Any]) -> bool:
    """Whether categories of one name are one class: the data name them, and they are in the same group."""
    is_named = all(isinstance(category.get("name"), str) and category["name"].strip() for category in categories)
    return is_named and len({str(category.get("supercategory")) for category in categories}) == 1


def _compare_splits(splits: Sequence[RawSplit], used: Mapping[str, set[int]], groups: set[int]) -> None:
    first = next((split for split in splits if split.name == "train"), splits[0])
    for split in splits:
        both = {s.name: {n: name for n, name in s.classes.items() if n not in groups} for s in (first, split)}
        try:
            common_label_map(both, {name: used[name] & defined.keys() for name, defined in both.items()})
        except ValueError as error:
            split.note("categories_differ", str(error), change=f"numbered by name, as in {first.name!r}")
