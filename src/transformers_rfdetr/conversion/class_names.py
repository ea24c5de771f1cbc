"""Read which class each row of rfdetr's class heads stands for, and write the rows and names that rfdetr expects."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.checkpoint_layouts import Change
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.variants_rf_detr import BACKGROUND, COCO_ID2LABEL, COCO_NAMES, PARENT, is_background_label
from .rfdetr_checkpoint import summarize_value

_CLASS_HEADS = re.compile(r"^(?:class_embed|transformer\.enc_out_class_embed\.\d+)\.(weight|bias)$")
_BACKGROUND_LOGIT = -100.0  # sigmoid(-100) is 0 in half precision too
_REMEDY = "Pass the names of the classes with --class-names."


def read_class_names(
    num_rows: int, arguments: Mapping[str, Any], class_names: Sequence[str] | None, changes: list[Change]
) -> dict[int, str]:
    """Return the name of each row of a class head with `num_rows` rows.

    The published heads have a row for each category id of COCO. Since rfdetr 1.6, row i is class i, and the last row is
    the background. Before 1.6, rows were the category ids of the dataset: 1 to N for Roboflow's datasets, whose
    category 0 is the parent of the others and is never annotated.
    """
    names = _check_names(arguments.get("class_names") if class_names is None else class_names)
    if num_rows == len(COCO_ID2LABEL) and names in ([], list(COCO_NAMES.values())):
        if not names and arguments:
            changes.append(Change("class names", "not stored", "COCO's, for 91 rows; --class-names gives others"))
        return dict(COCO_ID2LABEL)
    if not names:
        changes.append(
            Change("class names", "not stored", f"class 0 to class {num_rows - 1}; --class-names gives others")
        )
        return {row: f"class {row}" for row in range(num_rows)}
    num_classes = arguments.get("num_classes")
    is_old = "model_name" not in arguments and num_classes is not None and num_classes != num_rows - 1
    first = 1 if is_old and num_classes == len(names) + 1 else 0
    if first + len(names) > num_rows or (num_rows == len(names) and not is_old and class_names is None):
        raise ValueError(
            f"`class_names` must fit the {num_rows} rows of the class head, which are one for each class and since"
            f" rfdetr 1.6 one for the background, got {len(names)} names ({_shorten(names)}). {_REMEDY}"
        )
    id2label = {row: f"__unused_{row}__" for row in range(num_rows)}
    id2label |= {first + index: name for index, name in enumerate(names)}
    if num_rows > len(names) and (not is_old or num_rows == len(names) + 1 - first):
        id2label[num_rows - 1] = BACKGROUND
    counts = f"{num_rows} rows, {len(names)} names"
    if first:
        id2label[0] = PARENT
        changes.append(Change("labels", counts, f"1 to {len(names)}, as before rfdetr 1.6; row 0 is the parent"))
    if unused := [row for row, name in id2label.items() if name.startswith("__unused")]:
        changes.append(Change("class head", counts, f"{len(unused)} unused rows, never reported"))
    return id2label


def _check_names(stored: Any) -> list[str]:
    """Return stored class names as a list in the order of their labels."""
    if isinstance(stored, Mapping) and all(type(label) is int for label in stored):
        stored = [stored[label] for label in sorted(stored)]
    names = [] if stored is None else [stored] if isinstance(stored, str) else stored
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"`class_names` must be a list of strings or a dict {{label: name}}, got {summarize_value(stored)}."
            f" {_REMEDY}"
        )
    if invalid := sorted(name for name, count in Counter(names).items() if is_background_label(name) or count > 1):
        raise ValueError(
            f"`class_names` must be distinct and not of the form __name__, got {_shorten(invalid)}. {_REMEDY}"
        )
    return list(names)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(f"{name:.80}" for name in names[:4]) + (", ..." if len(names) > 4 else "")


def write_class_names(state_dict: dict[str, Tensor], config: RfDetrConfig, changes: list[Change]) -> list[str] | None:
    """Return the class names as rfdetr stores them, and add the background row that rfdetr expects to the class heads.

    Returns None for a model whose file had no names, so that it is written as it was read.
    """
    names = [config.id2label[label] for label in range(len(config.id2label))]
    num_rows = len(state_dict["class_embed.bias"])
    if num_rows == len(COCO_ID2LABEL) and all(names[label] == name for label, name in COCO_NAMES.items()):
        return list(COCO_NAMES.values())
    if names == [f"class {row}" for row in range(num_rows)]:
        return None
    if not is_background_label(names[-1]):
        for name in filter(_CLASS_HEADS.match, list(state_dict)):
            row = torch.zeros_like(state_dict[name][:1])
            state_dict[name] = torch.cat([state_dict[name], row if row.ndim == 2 else row + _BACKGROUND_LOGIT])
        changes.append(Change("class heads", f"{num_rows} rows", f"{num_rows + 1}: the last is rfdetr's background"))
        names.append(BACKGROUND)
    return names[:-1]
