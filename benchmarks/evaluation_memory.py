"""Host memory of an evaluation of masks: what streaming keeps of an image, and what the stock Trainer would.

    python benchmarks/evaluation_memory.py
    python benchmarks/evaluation_memory.py --images 500 --backend pycocotools

Each line is measured in a process of its own. Masks are of 480 x 640 pixels, 100 an image, one class: compact ones (an
ellipse, about 100 bytes of RLE each) and noisy ones (an ellipse of 60 % random pixels). The stock Trainer keeps every
output but the loss until the evaluation ends; what that is is counted on one batch of transformers' own RF-DETR with
the configuration of rf-detr-seg-medium and random weights.
"""

import argparse
import ctypes
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (480, 640)
DETECTIONS, OBJECTS = 100, 7  # COCO has 7 objects an image
CATEGORY = 1


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[500, 2000], help="numbers of images to stream")
    parser.add_argument("--noisy-images", type=int, default=100, help="images with noisy masks; 0 leaves them out")
    parser.add_argument("--backend", nargs="+", default=["pycocotools", "faster-coco-eval"], help="for compute()")
    parser.add_argument("--no-port", action="store_true", help="do not run transformers' own model")
    arguments = parser.parse_args()

    cases = [(count, "compact") for count in arguments.images]
    if arguments.noisy_images:
        cases.append((arguments.noisy_images, "noisy"))
    print("                                 kept of an image, KB      update,     compute()")
    print("masks    images  backend            RSS    exact  pickled   ms/image   seconds  adds at most, MB of RSS")
    for count, kind in cases:
        for backend in arguments.backend:
            row = alone(stream, count, kind, backend)
            print(
                f"{kind:8} {count:6}  {backend:16} {row['rss'] / count / 1e3:6.1f}  {row['exact'] / count / 1e3:7.1f}"
                f"  {row['pickled'] / count / 1e3:7.1f}  {row['update'] / count * 1e3:9.1f}  {row['compute']:8.1f}"
                f"  {row['added'] / 1e6:6.0f} of {row['peak'] / 1e6:.0f}"
            )
    if not arguments.no_port:
        sizes = alone(count_outputs_of_the_port)
        total = sum(size for _, size in sizes)
        print(f"\nstock Trainer with transformers' rf_detr, medium: {total / 1e6:.1f} MB an image, of which")
        for name, size in sorted(sizes, key=lambda pair: -pair[1])[:6]:
            print(f"  {name:38} {size / 1e6:6.2f} MB")


def alone(function: Any, *arguments: Any) -> Any:
    """The result of a function that runs in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def stream(num_images: int, kind: str, backend: str) -> dict[str, float]:
    """Bytes and seconds of an evaluation."""
    import pickle

    from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator

    rng = np.random.default_rng(0)
    pool = [draw(rng, kind) for _ in range(400)]
    truth = {
        "images": [{"id": image_id, "height": SIZE[0], "width": SIZE[1]} for image_id in range(num_images)],
        "annotations": [
            {"image_id": image_id, "category_id": CATEGORY, "segmentation": pool[rng.integers(len(pool))]}
            for image_id in range(num_images)
            for _ in range(OBJECTS)
        ],
        "categories": [{"id": CATEGORY, "name": "thing"}],
    }
    evaluator = InstanceSegmentationEvaluator(truth, backend=backend)
    labels = np.full(DETECTIONS, CATEGORY)
    # What drawing has freed goes back to the system, so that it is not used up before the process grows.
    ctypes.CDLL(None).malloc_trim(0)
    before, seconds = resident("VmRSS"), 0.0
    for image_id in range(num_images):
        masks = [pool[index] for index in rng.integers(len(pool), size=DETECTIONS)]
        scores = rng.random(DETECTIONS)
        start = time.perf_counter()
        evaluator.update(image_id, scores=scores, labels=labels, masks=masks)
        seconds += time.perf_counter() - start
    kept = resident("VmRSS") - before
    records = evaluator.state().values()
    exact = sum(
        found.scores.nbytes + found.labels.nbytes + found.boxes.nbytes + found.masks.offsets.nbytes for found in records
    ) + sum(len(found.masks.counts) for found in records)
    pickled = len(pickle.dumps(evaluator.state()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    start, at_start = time.perf_counter(), resident("VmRSS")
    evaluator.compute()
    return {
        "rss": kept,
        "exact": exact,
        "pickled": pickled,
        "update": seconds,
        "compute": time.perf_counter() - start,
        "peak": resident("VmHWM"),
        "added": resident("VmHWM") - at_start,
    }


def draw(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    """The RLE of an ellipse."""
    from pycocotools import mask as coco_mask

    center, radii = rng.uniform((50, 50), (SIZE[0] - 50, SIZE[1] - 50)), rng.uniform(15, 45, 2)
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    mask = ((rows - center[0]) / radii[0]) ** 2 + ((columns - center[1]) / radii[1]) ** 2 < 1
    if kind == "noisy":
        mask &= rng.random(SIZE) < 0.6
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status is not there; run this on Linux")


def count_outputs_of_the_port() -> list[tuple[str, float]]:
    """Names and bytes an image of what the stock Trainer keeps of the port's outputs."""
    import torch
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrConfig
    from transformers.models.rf_detr.modeling_rf_detr import RfDetrForInstanceSegmentation

    from transformers_rfdetr import RfDetrConfig as OurConfig

    variant = OurConfig.from_variant("rf-detr-seg-medium").to_dict()
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(RfDetrConfig.from_dict(variant)).eval()
    labels = []
    for _ in range(2):
        boxes, masks = torch.full((3, 4), 0.5), torch.zeros(3, 432, 432)
        masks[:, 100:300, 100:300] = 1
        labels.append({"class_labels": torch.arange(3), "boxes": boxes, "masks": masks})
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 432, 432), labels=labels)
    ignored = getattr(model.config, "keys_to_ignore_at_inference", [])
    sizes = []
    for name, value in outputs.items():
        # As Trainer.prediction_step.
        if name != "loss" and name not in ignored:
            sizes.append((name, count_bytes(value) / 2))
    return sizes


def count_bytes(value: Any) -> int:
    """Bytes of the tensors in nested lists and dicts."""
    if isinstance(value, dict):
        return sum(map(count_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(count_bytes, value))
    return value.nbytes if hasattr(value, "nbytes") else 0


if __name__ == "__main__":
    main()
