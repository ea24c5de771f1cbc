"""The published variants: their architectures, names and classes."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Variant(NamedTuple):
    """The settings of one published model that differ between the variants. Sizes are in pixels."""

    patch_size: int
    num_windows: int
    decoder_layers: int
    resolution: int
    position_grid: int  # side of the stored position table in patches
    num_queries: int
    out_indices: tuple[int, ...] = (3, 6, 9, 12)
    hidden_size: int = 384  # of the backbone, 64 for each attention head
    decoder: MappingProxyType = MappingProxyType({})  # other fields of RfDetrConfig


_LARGE_DEPRECATED = MappingProxyType(
    {
        "d_model": 384,
        "decoder_self_attention_heads": 12,
        "decoder_cross_attention_heads": 24,
        "decoder_n_points": 4,
        "projector_scale": ["P3", "P5"],
    }
)
# https://github.com/roboflow/rf-detr, configuration of each published class.
VARIANTS = {
    "rf-detr-nano": Variant(16, 2, 2, 384, 24, 300),
    "rf-detr-small": Variant(16, 2, 3, 512, 32, 300),
    "rf-detr-medium": Variant(16, 2, 4, 576, 36, 300),
    "rf-detr-large": Variant(16, 2, 4, 704, 44, 300),
    "rf-detr-base": Variant(14, 4, 3, 560, 37, 300, (2, 5, 8, 11)),
    "rf-detr-large-deprecated": Variant(14, 4, 3, 560, 37, 300, (2, 5, 8, 11), 768, _LARGE_DEPRECATED),
    "rf-detr-seg-preview": Variant(12, 2, 4, 432, 36, 200),
    "rf-detr-seg-nano": Variant(12, 1, 4, 312, 26, 100),
    "rf-detr-seg-small": Variant(12, 2, 4, 384, 32, 100),
    "rf-detr-seg-medium": Variant(12, 2, 5, 432, 36, 200),
    "rf-detr-seg-large": Variant(12, 2, 5, 504, 42, 200),
    "rf-detr-seg-xlarge": Variant(12, 2, 6, 624, 52, 300),
    "rf-detr-seg-2xlarge": Variant(12, 2, 6, 768, 64, 300),
}


def normalize_name(name: str) -> str:
    """Return the letters and digits of a name in lower case, equal for all its usual spellings."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


# A usual spelling differs from the name in case and punctuation only (RFDETRSegMedium, rfdetr-seg-medium), or is one of
# these.
ALIASES = {normalize_name(name): name for name in VARIANTS} | {
    "rfdetrlarge2026": "rf-detr-large",
    "rfdetrsegn": "rf-detr-seg-nano",
    "rfdetrsegs": "rf-detr-seg-small",
    "rfdetrsegm": "rf-detr-seg-medium",
    "rfdetrsegl": "rf-detr-seg-large",
    "rfdetrsegxl": "rf-detr-seg-xlarge",
    "rfdetrseg2xl": "rf-detr-seg-2xlarge",
    "rfdetrsegxxl": "rf-detr-seg-2xlarge",
    "rfdetrsegxxlarge": "rf-detr-seg-2xlarge",
}


def resolve_variant(name: str) -> str:
    """Return the published name of any usual spelling: `RFDETRSegMedium`, `Roboflow/rf-detr-seg-medium`, ...

    Raises:
        ValueError: if `name` is not a published variant; the message lists them.
    """
    stem = re.sub(r"\.(pth?|ckpt)$", "", str(name).rstrip("/").rsplit("/", 1)[-1])
    variant = ALIASES.get(normalize_name(stem))
    if variant is None:
        raise ValueError(f"`name` must be a published RF-DETR variant, one of {', '.join(VARIANTS)}, got {name!r}")
    return variant


# fmt: off
COCO_NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}
# fmt: on
# The published heads have one row for each COCO category id, 0 to 90; eleven of the ids are not used.
COCO_ID2LABEL = {label: COCO_NAMES.get(label, f"unused {label}") for label in range(91)}
# Checkpoints that rfdetr fine-tuned have one more row in their class heads: after the classes, or, before rfdetr 1.6,
# in front of them for Roboflow's category 0. No object was trained with these labels, so they are not predicted.
BACKGROUND, PARENT = "__background__", "__parent__"


def is_background_label(name: str) -> bool:
    """Return whether the name of a label, such as `__background__`, marks a row of the head without a class."""
    return name.startswith("__") and name.endswith("__")


def class_labels(id2label: Mapping[int, str]) -> dict[int, str]:
    """Return the labels that stand for classes, with their names."""
    return {label: name for label, name in id2label.items() if not is_background_label(name)}
