"""Measure validation: images per second, from images in memory to COCO's metrics, and the time of each part.

    python benchmarks/validation.py
    python benchmarks/validation.py --device cuda --variant rf-detr-seg-nano rf-detr-seg-medium --images 200 --batch 32

Images have 480 x 640 pixels of noise and 7 objects of 80 classes, as many as in COCO. The model has random weights: its
masks are noise over the whole image, which is the worst case for their encoding. "records" are scores, boxes and RLE of
all queries.
"""

import argparse
from typing import Any

import peers
import torch
from peers import Measurement
from preprocessing import draw_images
from step_parts import Clock
from torch.utils.data import Subset

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.evaluation import evaluation_loop
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator

SIZE, OBJECTS, CLASSES = (480, 640), 7, 80


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    images = {"type": int, "default": 16, "help": "number of images (default: %(default)s)"}
    batch = {"type": int, "default": 8, "help": "batch size (default: %(default)s)"}
    peers.run(__doc__, argv, measure, repeats=1, images=images, batch=batch)


def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return images per second of an evaluation, and seconds per image of its parts, in float32 and under autocast."""
    count, device = 2 if arguments.quick else arguments.images, arguments.device
    data = draw_dataset(count)
    config = peers.read_config(variant, arguments.quick)
    config.id2label = data.id2label
    model = peers.build(config, variant, device, "ours")["ours"]
    processor = RfDetrImageProcessor(size={"height": config.resolution, "width": config.resolution})
    clock, found = Clock(device), []
    for suffix, is_half in (("", False), (", bf16", True)):
        with torch.autocast(device, torch.bfloat16, enabled=is_half):
            for part in (Subset(data, range(min(count, arguments.batch))), data):  # the first one is not counted
                clock.pop()
                evaluate(clock, model, processor, part, arguments.batch)
        seconds = clock.pop()
        found.append((f"throughput{suffix}", count / seconds["whole"], "images/s"))
        found += [(f"{part}, per image{suffix}", value / count, "s") for part, value in seconds.items()]
    return [Measurement("validation", variant, case, "ours", value, unit, device) for case, value, unit in found]


def draw_dataset(count: int) -> InstanceDataset:
    """Return images of noise with polygons of all classes."""
    photos, drawn = draw_images([SIZE] * count)
    images = [{"id": key, "file_name": f"{key}.png", "height": SIZE[0], "width": SIZE[1]} for key in range(count)]
    objects = [(target["image_id"], one) for target in drawn for one in target["annotations"][:OBJECTS]]
    annotations = [
        {**one, "id": key + 1, "image_id": image_id, "category_id": key % CLASSES + 1}
        for key, (image_id, one) in enumerate(objects)
    ]
    categories = [{"id": key + 1, "name": f"class {key + 1}"} for key in range(CLASSES)]
    return InstanceDataset({"images": images, "annotations": annotations, "categories": categories}, photos)


def evaluate(clock: Clock, model: Any, processor: RfDetrImageProcessor, data: Any, batch_size: int) -> None:
    """Evaluate a model, and time the parts."""
    evaluator, run = InstanceSegmentationEvaluator, evaluation_loop.evaluate_instance_segmentation
    parts = (
        ("preprocessing", processor, "preprocess"),
        ("model", model, "forward"),
        ("records", evaluation_loop, "detect"),
        ("matching", evaluator, "update"),
        ("metrics", evaluator, "compute"),
    )
    with clock.patched(*parts):
        clock.timed("whole", run, model, processor, data, batch_size=batch_size, progress=False)


if __name__ == "__main__":
    main()
