"""Read the labels of a batch into targets that the loss can be computed for.

Axis letters: T objects and R crowd regions of an image, H W annotated mask. Boxes are (cx, cy, w, h) as fractions of
the model's input.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask_points_rf_detr import CroppedMasks

_RULES = {
    "class_labels": "an integer tensor (T,)",
    "boxes": "a float tensor (T, 4)",
    "masks": "a tensor (T, H, W) of bool, or of integers that are 0 outside the object",
    "mask_boxes": "an integer tensor (T, 4)",  # with mask_pixels, instead of masks
    "mask_pixels": "a bool tensor (K,)",
    "size": "an integer tensor (2,)",
}
_CROPPED_FIELDS = ("mask_boxes", "mask_pixels", "size")
_OPTIONAL_RULES = {
    "has_mask": "a bool tensor (T,)",
    "crowd_labels": "an integer tensor (R,)",
    "crowd_regions": "a bool tensor (R, H, W)",
}
_CLASS_FIELDS = ("class_labels", "crowd_labels")
_OBJECT_FIELDS = ("class_labels", "boxes", "masks", "mask_boxes", "has_mask")  # one entry for each object


def read_targets(
    labels: Sequence[Mapping[str, Any]], batch_size: int, num_classes: int, with_masks: bool
) -> list[dict[str, Any]]:
    """Return the fields that the loss reads, for each image; the optional ones only if they are given.

    `masks` are (T, H, W), or `CroppedMasks` where labels have `mask_boxes` and `mask_pixels`.

    Raises:
        ValueError: a field is missing or of the wrong type, or has values that cannot be trained on. The message names
            image, field and object.
    """
    if len(labels) != batch_size:
        raise ValueError(f"`labels` must contain one dictionary for each of {batch_size} images, got {len(labels)}")
    targets = []
    for image, target in enumerate(labels):
        mask_fields = _CROPPED_FIELDS if "mask_boxes" in target else ("masks",)
        fields = ("class_labels", "boxes", *(mask_fields if with_masks else ()))
        targets.append({field: _read_field(field, target, f"labels[{image}]") for field in fields})
    for image, (target, given) in enumerate(zip(targets, labels, strict=True)):
        _read_optional_fields(target, given, f"labels[{image}]", with_masks)
    for image, target in enumerate(targets):
        counts = {field: len(value) for field, value in target.items() if field in _OBJECT_FIELDS}
        if len(set(counts.values())) > 1:
            raise ValueError(f"`labels[{image}]` must have fields of equal length, one entry per object, got {counts}")
    # Moves one value from the device for the whole batch; the loops of `_refuse_values` only find the values to name.
    classes = torch.cat([target[field] for target in targets for field in _CLASS_FIELDS if field in target])
    boxes = torch.cat([target["boxes"] for target in targets])
    are_right = ((classes >= 0) & (classes < num_classes)).all() & (boxes.abs() <= 2).all()
    for target in targets:
        if "mask_boxes" in target:
            are_right = are_right & _fit_pixels(target)
    if not bool(are_right):
        _refuse_values(targets, num_classes)
    return [_with_cropped_masks(target) for target in targets]


def _fit_pixels(target: Mapping[str, Tensor]) -> Tensor:
    """Return whether the boxes of cropped masks lie inside the image and have as many pixels as are given."""
    corner, extent = target["mask_boxes"].split(2, dim=1)
    is_inside = (corner >= 0) & (extent >= 0) & (corner + extent <= target["size"])
    return is_inside.all() & (extent.prod(1).sum() == len(target["mask_pixels"]))


def _with_cropped_masks(target: dict[str, Any]) -> dict[str, Any]:
    """Return a target whose `masks` are the cropped ones, if it has such."""
    if "mask_boxes" not in target:
        return target
    boxes, pixels, size = (target.pop(field) for field in _CROPPED_FIELDS)
    num_pixels = boxes[:, 2:].prod(1)
    masks = CroppedMasks(F.pad(pixels, (0, 1)), boxes, num_pixels.cumsum(0) - num_pixels, size)
    return {**target, "masks": masks}


def _read_optional_fields(target: dict[str, Tensor], given: Mapping[str, Any], name: str, with_masks: bool) -> None:
    """Add the optional fields of an image to its target."""
    ndims = {"crowd_labels": 1, "crowd_regions": 3} | ({"has_mask": 1} if with_masks else {})
    for field, ndim in ndims.items():
        value = given.get(field)
        if value is None:
            continue
        has_dtype = _is_integer if field == "crowd_labels" else _is_bool
        if not isinstance(value, Tensor) or value.ndim != ndim or not has_dtype(value):
            kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`{name}[{field!r}]` must be {_OPTIONAL_RULES[field]}, got {kind}")
        target[field] = value
    if len(target.get("crowd_labels", ())) != len(target.get("crowd_regions", ())):
        raise ValueError(
            f"`{name}` must have one of 'crowd_labels' for each of 'crowd_regions', got"
            f" {len(target.get('crowd_labels', ()))} and {len(target.get('crowd_regions', ()))}"
        )


def _refuse_values(targets: Sequence[Mapping[str, Tensor]], num_classes: int) -> None:
    for image, target in enumerate(targets):
        for field in _CLASS_FIELDS:
            for index, label in enumerate(target[field].tolist() if field in target else []):
                if not 0 <= label < num_classes:
                    raise ValueError(
                        f"`labels[{image}][{field!r}][{index}]` must be from 0 to {num_classes - 1}, got {label}. "
                        "Map the category ids of the dataset to the keys of config.id2label."
                    )
        if "mask_boxes" in target and not bool(_fit_pixels(target)):
            raise ValueError(
                f"`labels[{image}]['mask_boxes']` must lie inside {target['size'].tolist()}, the `size` of the input,"
                f" and have as many pixels as 'mask_pixels', got {target['mask_boxes'].tolist()!s:.80} and"
                f" {len(target['mask_pixels'])} pixels. The image processor makes both."
            )
        for index, box in enumerate(target["boxes"].tolist()):
            if not all(abs(value) <= 2 for value in box):
                raise ValueError(
                    f"`labels[{image}]['boxes'][{index}]` must be (cx, cy, w, h) in finite fractions of the image, got "
                    f"{box}. Divide pixels by the width and height of the image."
                )


def _read_field(field: str, target: Mapping[str, Any], name: str) -> Tensor:
    if field not in target:
        raise ValueError(
            f"`{name}` must have {field!r}, got only {sorted(target)}. The image processor makes it (masks with "
            "return_segmentation_masks=True)."
        )
    value = target[field]
    if not isinstance(value, Tensor) or not _has_layout(field, value):
        kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{name}[{field!r}]` must be {_RULES[field]}, got {kind}")
    if field in ("class_labels", "mask_boxes"):
        return value.long()
    if field == "boxes":
        return value.float()
    return value if field != "masks" or len(value) else value.new_zeros((0, 1, 1))


def _has_layout(field: str, value: Tensor) -> bool:
    """Whether dtype and axes fit. Empty class labels and masks may have any: `torch.tensor([])` is float."""
    if field == "class_labels":
        return value.ndim == 1 and (_is_integer(value) or not len(value))
    if field == "mask_pixels":
        return value.ndim == 1 and _is_bool(value)
    if field == "size":
        return value.shape == (2,) and _is_integer(value)
    if field in ("boxes", "mask_boxes"):
        return value.ndim == 2 and value.shape[1] == 4 and (field == "boxes" or _is_integer(value))
    return not len(value) or (value.ndim == 3 and 0 not in value.shape and (_is_bool(value) or _is_integer(value)))


def _is_bool(value: Tensor) -> bool:
    return value.dtype == torch.bool


def _is_integer(value: Tensor) -> bool:
    return not _is_bool(value) and not value.is_floating_point() and not value.is_complex()
