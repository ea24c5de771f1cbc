"""Image processors: 32 pictures with their masks to tensors and labels, and the same without masks.

    python benchmarks/preprocessing.py
    python benchmarks/preprocessing.py --folder FOLDER

FOLDER holds `train.json` (COCO, with polygons) and `images/`; its first 32 pictures are taken. Without it pictures are
drawn that have the sizes and the objects of the 2018 Data Science Bowl's nuclei: 37 polygons of 26 corners each.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from peers import Measurement, PortProcessor, read_arguments, read_config, report, time_in_turns
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor

SIZES = [(256, 256)] * 12 + [(256, 320)] * 12 + [(360, 360)] * 4 + [(512, 640)] * 2 + [(520, 696)] * 2
OBJECTS, CORNERS = 37, 26


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = read_arguments(
        __doc__,
        argv,
        repeats=5,
        folder={"type": Path, "help": "a data set instead of drawn pictures"},
        images={"type": int, "default": len(SIZES), "help": "how many pictures"},
    )
    count = 2 if arguments.quick else arguments.images
    pictures, annotations = (
        read_pictures(arguments.folder, count) if arguments.folder else draw_pictures(SIZES[:count])
    )
    print(f"{len(pictures)} pictures, {sum(len(target['annotations']) for target in annotations)} objects")
    measurements = []
    for variant in arguments.variant:
        size = {"height": (side := read_config(variant, arguments.quick).resolution), "width": side}
        processors = {"ours": RfDetrImageProcessor(size=size), "port": PortProcessor(size=size)}
        for case, with_masks in (("with masks", True), ("without masks", False)):
            calls = {
                name: lambda processor=processor, with_masks=with_masks: processor(
                    pictures, annotations, return_segmentation_masks=with_masks, return_tensors="pt"
                )
                for name, processor in processors.items()
            }
            for name, seconds in time_in_turns(calls, arguments.repeats).items():
                measurements.append(Measurement("preprocessing", variant, case, name, seconds, "s", "cpu"))
    report(measurements, arguments)


def draw_pictures(sizes: list[tuple[int, int]]) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Pictures of noise and the COCO annotations of ellipses, as polygons, of about 18 pixels across."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    pictures, annotations = [], []
    for image_id, (height, width) in enumerate(sizes):
        pictures.append(Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)))
        objects = []
        for _ in range(OBJECTS):
            radii = rng.uniform(5, 14, 2)
            center = rng.uniform(radii, np.array([width, height]) - radii)
            corners = center + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            objects.append(
                {
                    "category_id": 1,
                    "bbox": [*(center - radii).tolist(), *(2 * radii).tolist()],
                    "area": float(np.pi * radii.prod()),
                    "iscrowd": 0,
                    "segmentation": [corners.flatten().tolist()],
                }
            )
        annotations.append({"image_id": image_id, "annotations": objects})
    return pictures, annotations


def read_pictures(folder: Path, count: int) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """The first `count` pictures of a COCO file, decoded, and their annotations."""
    coco = json.loads((folder / "train.json").read_text())
    objects = defaultdict(list)
    for annotation in coco["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    images = coco["images"][:count]
    pictures = [Image.open(folder / "images" / image["file_name"]).convert("RGB") for image in images]
    return pictures, [{"image_id": image["id"], "annotations": objects[image["id"]]} for image in images]


if __name__ == "__main__":
    main()
