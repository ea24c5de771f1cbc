"""Provide ground truth, detections and models for the tests of evaluation, with pycocotools as the oracle."""

import copy
import io
import json
import math
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator

from small_models import shared_folder

AREAS = ("small", "medium", "large")
TWELVE = ["AP", "AP50", "AP75", *(f"AP_{area}" for area in AREAS), "AR_1", "AR_10", "AR_100"]
TWELVE += [f"AR_{area}" for area in AREAS]


def read(name):
    return json.loads((shared_folder("coco_eval100") / name).read_text())


def coco_updates(kind):
    """Return the arguments of `update` for each image of the sample."""
    return updates_of(read(f"instances_val2014_fake{kind}100_results.json"))


def updates_of(results):
    """Return the arguments of `update` for each image: masks, or boxes for results without masks."""
    grouped = {}
    for result in results:
        grouped.setdefault(result["image_id"], []).append(result)
    updates = {}
    for image_id, rows in grouped.items():
        updates[image_id] = {"scores": [r["score"] for r in rows], "labels": [r["category_id"] for r in rows]}
        if "segmentation" in rows[0]:
            updates[image_id]["masks"] = [r["segmentation"] for r in rows]
        else:
            updates[image_id]["boxes"] = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in rows)]
    return updates


def evaluated(truth, updates, **settings):
    evaluator = InstanceSegmentationEvaluator(truth, **settings)
    for image_id, found in updates.items():
        evaluator.update(image_id, **found)
    return evaluator


def twelve(numbers, kind):
    return [numbers[f"{kind}_{name}"] for name in TWELVE]


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def rectangle(rows, columns, size=(100, 100)):
    mask = np.zeros(size, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def ground_truth(*annotations, images=((1, 100, 100),), categories=(1,)):
    """Return annotations, each given by a mask (H, W), its category and further fields."""
    return {
        "images": [{"id": i, "height": h, "width": w} for i, h, w in images],
        "annotations": [
            {"image_id": images[0][0], "category_id": category, "segmentation": rle(mask), **more}
            for mask, category, more in annotations
        ],
        "categories": [{"id": category, "name": f"class {category}"} for category in categories],
    }


def random_case(seed):
    """Return ground truth and COCO results of 8 images: ties, crowds, empty masks, more than 100 per class."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 140, 2))

    def shape():
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        return rectangle((top, top + rng.integers(2, height)), (left, left + rng.integers(2, width)), (height, width))

    images = [{"id": int(i), "height": height, "width": width} for i in rng.permutation(8)]
    annotations, results = [], []
    for image in images:
        for _ in range(rng.integers(1, 6)):
            mask = shape()
            box = coco_mask.toBbox(rle(mask)).tolist()
            crowd = int(rng.random() < 0.25)
            fields = {"image_id": image["id"], "category_id": int(rng.integers(1, 4)), "segmentation": rle(mask)}
            annotations.append(
                fields | {"id": len(annotations) + 1, "iscrowd": crowd, "area": float(mask.sum()), "bbox": box}
            )
        for _ in range(rng.choice([0, 5, 20, 330])):
            mask = shape()
            if rng.random() < 0.6:
                near = coco_mask.decode(annotations[rng.integers(len(annotations))]["segmentation"])
                mask = np.roll(near, rng.integers(-2, 3, 2), (0, 1))
            if rng.random() < 0.1:
                mask = np.zeros_like(mask)
            label, score = int(rng.integers(1, 4)), float(rng.integers(0, 8)) / 8
            fields = {"image_id": image["id"], "category_id": label, "score": score}
            results.append(fields | {"segmentation": rle(mask), "bbox": coco_mask.toBbox(rle(mask)).tolist()})
    categories = [{"id": category, "name": str(category)} for category in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def plain_cocoeval(truth, predictions, kind, limits=(1, 10, 100)):
    """Return pycocotools' COCOeval of all images at once; `stats` are the twelve metrics.

    The predictions are a COCO dataset or results, as they are; `limits` are COCOeval's `maxDets`.
    """
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        if not isinstance(predictions, COCO):
            predictions = coco.loadRes(copy.deepcopy(predictions))
        evaluation = COCOeval(coco, predictions, kind)
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def of_kind(kind, results):
    """Return results without the boxes for "segm", from which `loadRes` would take the areas, or without the masks."""
    unused = "bbox" if kind == "segm" else "segmentation"
    return [{key: value for key, value in one.items() if key != unused} for one in results]


HOUSE, POOL = 0, 1
SCENE = (40, 40)  # size of the images


class ScriptedModel(torch.nn.Module):
    """A model that returns the given (label, score, mask) for each image, in the order of the images."""

    def __init__(self, found, names, masks=True):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))
        self.device, self.found, self.has_masks = torch.device("cpu"), iter(found), masks

    def forward(self, pixel_values, pixel_mask=None):
        of_images = [next(self.found) for _ in pixel_values]
        num_queries = max([1, *map(len, of_images)])
        height, width = next((found[0][2].shape for found in of_images if found), SCENE)
        logits = torch.full((len(of_images), num_queries, len(self.config.id2label)), -20.0)
        boxes = torch.full((len(of_images), num_queries, 4), 0.5)
        masks = torch.full((len(of_images), num_queries, height, width), -5.0)
        for image, found in enumerate(of_images):
            for query, (label, score, mask) in enumerate(found):
                logits[image, query, label] = math.log(score / (1 - score))
                masks[image, query][torch.from_numpy(mask)] = 5.0
                x, y, w, h = coco_mask.toBbox(rle(mask))
                boxes[image, query] = torch.tensor(
                    [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height], dtype=torch.float32
                )
        return SimpleNamespace(logits=logits, pred_boxes=boxes, pred_masks=masks if self.has_masks else None)


# For each image its objects (label, crowd, mask) and what is found (label, score, mask).
IMAGES = {
    "many.png": (
        [
            (HOUSE, 0, rectangle((0, 20), (0, 20), SCENE)),
            (POOL, 0, rectangle((25, 35), (25, 35), SCENE)),
            (POOL, 1, rectangle((0, 10), (30, 40), SCENE)),
        ],
        [
            (HOUSE, 0.9, rectangle((0, 20), (0, 16), SCENE)),  # 320 of the house's 400 pixels
            (HOUSE, 0.8, rectangle((0, 20), (0, 20), SCENE)),  # the same once more
            (HOUSE, 0.7, rectangle((25, 35), (25, 35), SCENE)),  # the pool
            (POOL, 0.6, rectangle((2, 6), (32, 36), SCENE)),  # in the crowd
            (POOL, 0.4, rectangle((25, 35), (25, 35), SCENE)),
        ],
    ),
    "right.png": (
        [(HOUSE, 0, rectangle((10, 30), (10, 30), SCENE))],
        [(HOUSE, 0.9, rectangle((10, 30), (10, 30), SCENE))],
    ),
    "empty.png": ([], []),
    "missed.png": ([(POOL, 0, rectangle((0, 20), (0, 20), SCENE))], []),
}


def scene(names=("house", "pool"), files=tuple(IMAGES)):
    """Return the images above as a dataset, with category ids 3 and 7."""
    images, annotations = [], []
    for index, (objects, _) in enumerate(IMAGES.values()):
        images.append({"id": index, "file_name": files[index], "height": SCENE[0], "width": SCENE[1]})
        annotations += [
            {"image_id": index, "category_id": (3, 7)[label], "iscrowd": crowd, "segmentation": rle(mask)}
            for label, crowd, mask in objects
        ]
    categories = [{"id": (3, 7)[label], "name": name} for label, name in enumerate(names)]
    pixels = np.random.default_rng(0).integers(0, 256, (len(images), *SCENE, 3), np.uint8)
    coco = {"images": images, "annotations": annotations, "categories": categories}
    return InstanceDataset(coco, [Image.fromarray(photo) for photo in pixels])


def scene_model(names=("house", "pool"), **settings):
    """Return the model with the detections of the scene."""
    return ScriptedModel([found for _, found in IMAGES.values()], names, **settings)


SCENE_PROCESSOR = RfDetrImageProcessor(size=SCENE[0], do_pad=False)
