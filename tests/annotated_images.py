"""Provide three annotated images in all formats that are read, for the tests of data/."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.prepared import collate_fn
from transformers_rfdetr.data.synthetic import draw_dataset

# Two classes whose ids have a gap and stand in the wrong order; a crowd, a box without a mask, an empty image.
CATEGORIES = [{"id": 7, "name": "tree"}, {"id": 3, "name": "roof"}]
SIZES = [(40, 60), (50, 30), (32, 32)]  # (H, W)
TRIANGLE = [[5.0, 5.0, 25.0, 5.0, 5.0, 25.0]]
TWO_PARTS = [[1.0, 1.0, 4.0, 1.0, 4.0, 4.0, 1.0, 4.0], [10.0, 10.0, 20.0, 10.0, 20.0, 15.0, 10.0, 15.0]]
OBJECTS = [
    [
        {"id": 11, "category_id": 7, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 200.0, "iscrowd": 0},
        {"id": 12, "category_id": 3, "bbox": [1.0, 1.0, 19.0, 14.0], "area": 59.0, "iscrowd": 0},
        {"id": 13, "category_id": 7, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 200.0, "iscrowd": 1},
    ],
    [{"id": 14, "category_id": 7, "bbox": [5.0, 5.0, 20.0, 20.0], "area": 200.0, "iscrowd": 0}],
    [],
]
SHAPES = [[TRIANGLE, TWO_PARTS, TRIANGLE], [TRIANGLE], []]
NAMES = ["roof", "tree"]
BROKEN = b"no image"


def make_images() -> list[PIL.Image.Image]:
    generator = np.random.default_rng(0)
    return [PIL.Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


def make_annotations() -> list[list[dict]]:
    """Return the annotations of each image."""
    return [
        [{**item, "segmentation": shape} for item, shape in zip(*pair, strict=True)]
        for pair in zip(OBJECTS, SHAPES, strict=True)
    ]


def make_coco(**changes) -> dict:
    """Return the data as a COCO JSON."""
    images = [
        {"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width}
        for i, (height, width) in enumerate(SIZES)
    ]
    annotations = [{**item, "image_id": 100 + i} for i, items in enumerate(make_annotations()) for item in items]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}


def save_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(make_images()):
        image.save(folder / f"{index}.png")
    return folder


def save_coco(path: Path, content: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content or make_coco()))
    return path


def processor(side: int = 24, **settings) -> RfDetrImageProcessor:
    return RfDetrImageProcessor(size=side, **settings)


def drawn_dataset(num_images: int = 8) -> InstanceDataset:
    images, content = draw_dataset(num_images, classes=["building"])
    return InstanceDataset(content, images)


def check_samples(dataset: InstanceDataset) -> None:
    """Check that a dataset contains the images and objects above, with labels instead of category ids."""
    assert len(dataset) == 3
    label_of = {3: 0, 7: 1}
    for index, expected in enumerate(make_annotations()):
        sample = dataset[index]
        assert sample["image"].mode == "RGB"
        np.testing.assert_array_equal(np.asarray(sample["image"]), np.asarray(make_images()[index]))
        assert (sample["height"], sample["width"]) == SIZES[index]
        assert [item["category_id"] for item in sample["annotations"]] == [label_of[i["category_id"]] for i in expected]
        for item, given in zip(sample["annotations"], expected, strict=True):
            assert item["image_id"] == sample["image_id"]
            assert item["iscrowd"] == given["iscrowd"]
            assert item["segmentation"] == given["segmentation"]
            np.testing.assert_allclose(item["bbox"], given["bbox"])
            assert item["area"] == pytest.approx(given["area"], rel=0.1)  # a drawn triangle is 10 pixels short


def columns(items: list[dict]) -> dict[str, list]:
    return {key: [item[key] for item in items] for key in ("id", "category", "bbox", "segmentation", "area", "iscrowd")}


def rows(category=lambda number: number, as_columns: bool = False, **more) -> list[dict]:
    """Return the data as rows; `category` maps a category id to the value in the rows."""
    result = []
    for index, items in enumerate(make_annotations()):
        named = [{**item, "category": category(item.pop("category_id"))} for item in items]
        listed = columns(named) if as_columns else named
        result.append({"image_id": 100 + index, "image": make_images()[index], "objects": listed})
    return result


def features(category, as_columns: bool, sequence=None):
    import datasets

    number, text = datasets.Value("int64"), datasets.Value("float32")
    fields = {"id": number, "category": category, "area": text, "iscrowd": number}
    many = sequence or datasets.Sequence
    lists = {"bbox": many(text, length=4) if sequence is None else many(text), "segmentation": many(many(text))}
    objects_ = {**fields, **lists}
    if as_columns:
        objects_ = {key: many(feature) for key, feature in objects_.items()}
    else:
        objects_ = [objects_]
    return datasets.Features({"image_id": number, "image": datasets.Image(), "objects": objects_})


INDEX = {3: 0, 7: 1}
ID_TO_NAME = {3: "roof", 7: "tree"}


def equal(first, second) -> bool:
    """Return whether two samples or batches contain equal tensors."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second)


def loader(dataset, num_workers: int = 0, **arguments) -> DataLoader:
    return DataLoader(dataset, collate_fn=collate_fn, num_workers=num_workers, **{"batch_size": 2, **arguments})


def split_files(folder: Path, **contents: dict) -> dict[str, Path]:
    save_images(folder)
    return {split: save_coco(folder / f"{split}.json", content) for split, content in contents.items()}
