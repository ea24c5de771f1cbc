"""Metrics for the `evaluate` library, loaded from the installed package: `evaluate.load(str(MASK_MAP))`."""

from pathlib import Path
from typing import Any

MEAN_IOU = Path(__file__).parent / "mean_iou"
MASK_MAP = Path(__file__).parent / "mask_map"

INPUTS = """
Args:
    predictions: For each image a dict of `image_id`, `scores` (K,), `labels` (K,), which are category ids, and `masks`,
        K COCO RLEs {"size": [height, width], "counts": str} of the image's size, as
        `post_process_instance_segmentation(..., return_coco_annotation=True)` returns them.
    references: For each image a dict of `image_id`, `height`, `width` and `objects`, a list of dicts of `category_id`,
        `segmentation` (COCO RLE), `iscrowd` and `area`; the last two may be None.
    class_names: Category id -> name in `per_class`; the id is the default name.
"""


def features() -> Any:
    """Return the columns of `predictions` and `references`."""
    from datasets import Features, Value

    rle = {"size": [Value("int64")], "counts": Value("string")}
    annotation = {
        "category_id": Value("int64"),
        "segmentation": rle,
        "iscrowd": Value("int64"),
        "area": Value("float64"),
    }
    return Features(
        {
            "predictions": {
                "image_id": Value("int64"),
                "scores": [Value("float64")],
                "labels": [Value("int64")],
                "masks": [rle],
            },
            "references": {
                "image_id": Value("int64"),
                "height": Value("int64"),
                "width": Value("int64"),
                "objects": [annotation],
            },
        }
    )
