"""Random images, annotations and processors for the tests of the image processor."""

import inspect

import numpy as np
import pytest

from transformers_rfdetr import RfDetrImageProcessor


def random_image(height=30, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processor(size=24, **settings):
    return RfDetrImageProcessor(size=size, **settings)


def raw(image, **settings):
    """Pixels (3, H, W) in [0, 1] as read, before resizing and normalising."""
    return processor(do_resize=False, do_normalize=False)(image, **settings).pixel_values[0]


def port(**settings):
    pytest.importorskip("torchvision")
    module = pytest.importorskip("transformers.models.rf_detr.image_processing_rf_detr")
    return module.RfDetrImageProcessor(**settings)


def skip_if_it_antialiases(theirs):
    """The port of 5.9 to 5.15 resizes with antialiasing, unlike the original: its pixels are no oracle."""
    if "antialias=False" not in inspect.getsource(type(theirs)):
        pytest.skip("this version's port antialiases")


def annotation(**fields):
    return (
        {"id": 31, "category_id": 2, "bbox": [5, 3, 20, 12], "area": 240, "iscrowd": 0}
        | {"segmentation": [[5, 3, 25, 3, 25, 15, 5, 15]]}
        | fields
    )


def target(*annotations, **fields):
    return {"image_id": 7, "annotations": list(annotations)} | fields


def labels_of(*annotations, masks=True, size=(60, 100), image_size=(30, 50), **settings):
    image = np.zeros((*image_size, 3), np.uint8)
    inputs = processor(size, **settings)(image, target(*annotations), return_segmentation_masks=masks)
    return inputs["labels"][0]
