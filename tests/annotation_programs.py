"""Small images, and what is read of annotations beside them, for the tests of the readers of annotation programs."""

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from transformers_rfdetr import check_dataset, load_instance_dataset
from transformers_rfdetr.cli.app import app

SIZE = (40, 48)  # (H, W)


def save_image(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(sum(path.name.encode())).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def objects_of(source, split: str = "train", index: int = 0, **arguments) -> list[dict]:
    return load_instance_dataset(source, **arguments)[split][index]["annotations"]


def masks_of(source, split: str = "train", index: int = 0, **arguments) -> list[np.ndarray]:
    """Return the masks of an image, drawn by pycocotools; they are empty for boxes."""
    sample = load_instance_dataset(source, **arguments)[split][index]
    height, width = sample["height"], sample["width"]
    masks = []
    for annotation in sample["annotations"]:
        segmentation = annotation.get("segmentation") or [[0, 0] * 3]
        rles = coco_mask.frPyObjects(segmentation, height, width) if isinstance(segmentation, list) else [segmentation]
        masks.append(coco_mask.decode(coco_mask.merge(rles)).astype(bool))
    return masks


def pixel_polygon(size: tuple[int, int] = SIZE):
    """Return a strategy of polygons, lists of at least three points in an image."""
    point = st.tuples(st.integers(0, size[1] - 1), st.integers(0, size[0] - 1)).map(list)
    return st.lists(point, min_size=3, max_size=6, unique_by=tuple)


def check_command(source, objects: int, exit_code: int = 0, masks: int | None = None) -> None:
    """Run `check-dataset`, and compare its counts with those of the loader and of `check_dataset`."""
    result = CliRunner().invoke(app, ["check-dataset", str(source), "--json", "-"])
    assert result.exit_code == exit_code, result.output
    splits = json.loads(result.stdout)["splits"]
    assert sum(split["objects"] for split in splits.values()) == objects
    assert check_dataset(source).splits == splits
    if masks is not None:
        assert sum(split["objects_with_mask"] for split in splits.values()) == masks
    if not exit_code:
        loaded = load_instance_dataset(source)
        assert sum(len(sample["annotations"]) for split in loaded.values() for sample in split) == objects
