"""Ground truth, detections and models for the tests of evaluation, and pycocotools' metrics as their oracle."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator

from small_models import shared_folder

AREAS = ("small", "medium", "large")
TWELVE = ["AP", "AP50", "AP75", *(f"AP_{area}" for area in AREAS), "AR_1", "AR_10", "AR_100"]
TWELVE += [f"AR_{area}" for area in AREAS]


def read(name):
    return json.loads((shared_folder("coco_eval100") / name).read_text())


def coco_updates(kind):
    """Of each image of the sample the arguments of `update`."""
    grouped = {}
    for result in read(f"instances_val2014_fake{kind}100_results.json"):
        grouped.setdefault(result["image_id"], []).append(result)
    updates = {}
    for image_id, results in grouped.items():
        found = {"scores": [r["score"] for r in results], "labels": [r["category_id"] for r in results]}
        if kind == "segm":
            found["masks"] = [r["segmentation"] for r in results]
        else:
            found["boxes"] = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in results)]
        updates[image_id] = found
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
    """Each annotation: a mask (H, W), its category, and what else it has."""
    return {
        "images": [{"id": i, "height": h, "width": w} for i, h, w in images],
        "annotations": [
            {"image_id": images[0][0], "category_id": category, "segmentation": rle(mask), **more}
            for mask, category, more in annotations
        ],
        "categories": [{"id": category, "name": f"class {category}"} for category in categories],
    }


def random_case(seed):
    """Ground truth and COCO results of 8 images: ties, crowds, empty masks, more than 100 a class."""
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


def plain_cocoeval(truth, results, kind):
    """The twelve numbers of pycocotools on the whole dataset at once."""
    unused = "bbox" if kind == "segm" else "segmentation"
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        found = coco.loadRes([{k: v for k, v in one.items() if k != unused} for one in copy.deepcopy(results)])
        evaluation = COCOeval(coco, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats
