"""Images and annotations of COCO (crowds, RLE, grayscale) and of nuclei, which are not part of the repository."""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from transformers_rfdetr import RfDetrImageProcessor

from small_models import shared_folder

SIDE = 432
# Folder, file, and step: of the nuclei every eighth image, and in the long run every image.
FILES = [
    ("coco_permissive", "annotations.json", 1),
    ("dsb2018_nuclei", "annotations.json", 8),
    ("dsb2018_nuclei", "annotations_rle.json", 8),
    pytest.param("dsb2018_nuclei", "annotations.json", 1, marks=pytest.mark.long),
    pytest.param("dsb2018_nuclei", "annotations_rle.json", 1, marks=pytest.mark.long),
]


@cache
def read(folder: str, file: str) -> list[tuple[Path, dict, dict]]:
    """Return (path, entry of `images`, target) for each image."""
    root = shared_folder(folder)
    data = json.loads((root / file).read_text())
    annotations = defaultdict(list)
    for annotation in data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    return [
        (
            root / "images" / image["file_name"],
            image,
            {"image_id": image["id"], "annotations": annotations[image["id"]]},
        )
        for image in data["images"]
    ]


def full_size_masks(annotations: list[dict], height: int, width: int) -> np.ndarray:
    """Return masks (N, height, width) bool, decoded by pycocotools."""
    rles = []
    for annotation in annotations:
        shape = annotation["segmentation"]
        rles.append(coco_mask.merge(coco_mask.frPyObjects(shape, height, width)) if isinstance(shape, list) else shape)
    decoded = coco_mask.decode(rles) if rles else np.zeros((height, width, 0), np.uint8)
    return np.ascontiguousarray(decoded.transpose(2, 0, 1)).view(bool)


def nearest(masks: np.ndarray) -> np.ndarray:
    if not len(masks):
        return np.zeros((0, SIDE, SIDE), bool)
    bits = torch.from_numpy(masks.view(np.uint8))[None]
    return F.interpolate(bits, (SIDE, SIDE), mode="nearest-exact")[0].numpy() > 0


def scaled_polygons(annotation: dict, height: int, width: int) -> list[list[float]]:
    return [
        (np.array(polygon).reshape(-1, 2) * [SIDE / width, SIDE / height]).ravel().tolist()
        for polygon in annotation["segmentation"]
    ]


def iou(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours & theirs).sum((1, 2)) / (ours | theirs).sum((1, 2))


@pytest.mark.parametrize(("folder", "file", "step"), FILES)
def test_every_image_becomes_inputs_and_labels(folder, file, step):
    processor = RfDetrImageProcessor.from_variant("rf-detr-seg-medium")
    for path, image, target in read(folder, file)[::step]:
        inputs = processor(path, target, return_segmentation_masks=True, return_tensors="pt")
        assert inputs.pixel_values.shape == (1, 3, SIDE, SIDE)
        assert inputs.pixel_values.isfinite().all()
        labels = inputs.labels[0]
        kept = [annotation for annotation in target["annotations"] if not annotation["iscrowd"]]
        assert labels["class_labels"].tolist() == [annotation["category_id"] for annotation in kept]
        assert labels["masks"].shape == (len(kept), SIDE, SIDE)
        assert labels["masks"].flatten(1).any(1).all()
        assert labels["orig_size"].tolist() == [image["height"], image["width"]]
        assert ((labels["boxes"] >= 0) & (labels["boxes"] <= 1)).all()


def test_the_coco_images_include_crowds_and_grayscale():
    records = read("coco_permissive", "annotations.json")
    assert sum(annotation["iscrowd"] for _, _, target in records for annotation in target["annotations"]) == 3
    assert any(PIL.Image.open(path).mode == "L" for path, _, _ in records)


@pytest.mark.parametrize(("folder", "file", "step"), FILES)
def test_masks_agree_with_pycocotools(folder, file, step, record_property):
    processor = RfDetrImageProcessor.from_variant("rf-detr-seg-medium")
    drawn, resized = [], []
    for _, image, target in read(folder, file)[::step]:
        height, width = image["height"], image["width"]
        kept = [annotation for annotation in target["annotations"] if not annotation["iscrowd"]]
        blank = np.zeros((height, width), np.uint8)
        masks = processor(blank, target, return_segmentation_masks=True).labels[0]["masks"].numpy()
        full = full_size_masks(kept, height, width)
        is_polygon = np.array([isinstance(annotation["segmentation"], list) for annotation in kept], bool)
        np.testing.assert_array_equal(masks[~is_polygon], nearest(full[~is_polygon]))
        if is_polygon.any():
            polygons = [annotation for annotation in kept if isinstance(annotation["segmentation"], list)]
            scaled = [{"segmentation": scaled_polygons(annotation, height, width)} for annotation in polygons]
            drawn.extend(iou(masks[is_polygon], full_size_masks(scaled, SIDE, SIDE)))
            large = is_polygon & (full.sum((1, 2)) >= 1024)
            resized.extend(iou(masks[large], nearest(full[large])))
    if drawn:
        median, first_percentile = np.median(resized), np.percentile(resized, 1)
        record_property("IoU", f"{len(resized)} objects: median {median:.4f}, first percentile {first_percentile:.4f}")
        assert min(drawn) >= 0.99
        assert median >= 0.97
        assert first_percentile >= 0.9
