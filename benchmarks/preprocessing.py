"""Measure preprocessing: 32 images to tensors and labels, with and without masks; one image of 0.3 and 12 megapixels.

"1 thread" is what a worker of a data loader has.

The bytes of the labels are those of all tensors of a collated batch of these 32 images.

    python benchmarks/preprocessing.py
    python benchmarks/preprocessing.py --folder FOLDER

FOLDER contains `train.json` (COCO, with polygons) and `images/`; its first 32 images are used. Without `--folder`,
images are drawn with the sizes and objects of nuclei in the 2018 Data Science Bowl: 37 polygons of 26 corners each.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from peers import Measurement
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.prepared import collate_fn

SIZES = [(256, 256)] * 12 + [(256, 320)] * 12 + [(360, 360)] * 4 + [(512, 640)] * 2 + [(520, 696)] * 2
OBJECTS, CORNERS = 37, 26


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    folder = {"type": Path, "help": "a dataset (default: drawn images)"}
    peers.run(__doc__, argv, measure, repeats=5, folder=folder)


def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return seconds with masks, without, and for single images."""
    count = 2 if arguments.quick else len(SIZES)
    read = read_images(arguments.folder, count) if arguments.folder else draw_images(SIZES[:count])
    photos, annotations = read
    print(f"{len(photos)} images, {sum(len(target['annotations']) for target in annotations)} objects")
    side = peers.read_config(variant, arguments.quick).resolution
    size = {"height": side, "width": side}
    processors = {"ours": RfDetrImageProcessor(size=size), "port": peers.PortProcessor(size=size)}
    cases: dict[str, tuple[Any, ...]] = {
        "with masks": (photos, annotations, True),
        "without masks": (photos, annotations, False),
    }
    for height, width in [(480, 640)] if arguments.quick else [(480, 640), (3000, 4000)]:
        cases[f"one image of {height} x {width}"] = (draw_images([(height, width)])[0], None, False)
    measurements = []
    for case, given in cases.items():
        calls = {
            name: lambda processor=processor, given=given: processor(*given, return_tensors="pt")
            for name, processor in processors.items()
        }
        if given[2]:  # as in training
            calls["ours cropped"] = lambda given=given: processors["ours"](*given[:2], "cropped", return_tensors="pt")
            for name, call in calls.items():
                size = count_bytes(call())
                measurements.append(Measurement("preprocessing", variant, "labels", name, size, "B", "cpu"))
        threads = torch.get_num_threads()
        threads_of = {case: threads} | ({f"{case}, 1 thread": 1} if given[2] else {})
        for shown, num_threads in threads_of.items():
            torch.set_num_threads(num_threads)
            for name, seconds in peers.time_in_turns(calls, arguments.repeats).items():
                measurements.append(Measurement("preprocessing", variant, shown, name, seconds, "s", "cpu"))
        torch.set_num_threads(threads)
    return measurements


def count_bytes(inputs: Any) -> int:
    """Return the bytes of the labels of all images in one batch."""
    parts = zip(inputs["pixel_values"], inputs["labels"], strict=True)
    samples = [{"pixel_values": pixels, "labels": label} for pixels, label in parts]
    tensors = [tensor for label in collate_fn(samples)["labels"] for tensor in label.values()]
    return sum(tensor.nbytes for tensor in tensors)


def draw_images(sizes: list[tuple[int, int]]) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Return images of noise, and COCO annotations of ellipses as polygons, about 19 pixels across."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    photos, annotations = [], []
    for image_id, (height, width) in enumerate(sizes):
        photos.append(Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)))
        radii = rng.uniform(5, 14, (OBJECTS, 2))
        corners = [rng.uniform(r, np.array([width, height]) - r) + r * circle for r in radii]
        objects = [
            {
                "category_id": 1,
                "bbox": [*outline.min(0).tolist(), *np.ptp(outline, axis=0).tolist()],
                "area": float(np.pi * r.prod()),
                "iscrowd": 0,
                "segmentation": [outline.flatten().tolist()],
            }
            for r, outline in zip(radii, corners, strict=True)
        ]
        annotations.append({"image_id": image_id, "annotations": objects})
    return photos, annotations


def read_images(folder: Path, count: int) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Return the first `count` images of a COCO file, decoded, and their annotations."""
    coco = json.loads((folder / "train.json").read_text())
    objects = defaultdict(list)
    for annotation in coco["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    images = coco["images"][:count]
    photos = [Image.open(folder / "images" / image["file_name"]).convert("RGB") for image in images]
    return photos, [{"image_id": image["id"], "annotations": objects[image["id"]]} for image in images]


if __name__ == "__main__":
    main()
