"""Measure the host memory that an evaluation of masks keeps per image: streamed, and in the stock Trainer.

    python benchmarks/evaluation_memory.py
    python benchmarks/evaluation_memory.py --images 500 --backend pycocotools

Each line is measured in a fresh process. An image has 100 masks of 480 x 640 pixels of one class: compact masks (an
ellipse, about 100 bytes of RLE each) or noisy masks (60 % of the pixels of an ellipse, at random). The stock Trainer
keeps every output except the loss until the evaluation ends; its bytes are counted on one batch of transformers' port
of rf-detr-seg-medium with random weights.
"""

import argparse
import ctypes
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (480, 640)
DETECTIONS, OBJECTS = 100, 7  # COCO has 7 objects per image
CATEGORY = 1


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, nargs="+", default=[500, 2000], help="numbers of images to stream (default: %(default)s)"
    )
    parser.add_argument(
        "--noisy-images", type=int, default=100, help="images with noisy masks; 0 skips them (default: %(default)s)"
    )
    parser.add_argument(
        "--backend",
        nargs="+",
        default=["pycocotools", "faster-coco-eval"],
        help="backends of compute() (default: %(default)s)",
    )
    parser.add_argument(
        "--no-port", action="store_true", help="do not measure transformers' port (default: measure it)"
    )
    arguments = parser.parse_args()

    cases = [(count, "compact") for count in arguments.images]
    if arguments.noisy_images:
        cases.append((arguments.noisy_images, "noisy"))
    print("                                 kept per image, KB        update,     compute()")
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
        print(f"\nstock Trainer with transformers' rf_detr, medium: {total / 1e6:.1f} MB per image, of which")
        for name, size in sorted(sizes, key=lambda pair: -pair[1])[:6]:
            print(f"  {name:38} {size / 1e6:6.2f} MB")


def alone(function: Any, *arguments: Any) -> Any:
    """Run a function in a fresh process and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def stream(num_images: int, kind: str, backend: str) -> dict[str, float]:
    """Return bytes and seconds of an evaluation."""
    import pickle

    from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator

    rng = np.random.default_rng(0)
    pool = [draw(rng, kind) for _ in range(400)]
    ground_truth = {
        "images": [{"id": image_id, "height": SIZE[0], "width": SIZE[1]} for image_id in range(num_images)],
        "annotations": [
            {"image_id": image_id, "category_id": CATEGORY, "segmentation": pool[rng.integers(len(pool))]}
            for image_id in range(num_images)
            for _ in range(OBJECTS)
        ],
        "categories": [{"id": CATEGORY, "name": "object"}],
    }
    evaluator = InstanceSegmentationEvaluator(ground_truth, backend=backend)
    labels = np.full(DETECTIONS, CATEGORY)
    # Return freed memory to the system, or the evaluation would reuse it.
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
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
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
    """Return the RLE of an ellipse."""
    from pycocotools import mask as coco_mask

    center, radii = rng.uniform((50, 50), (SIZE[0] - 50, SIZE[1] - 50)), rng.uniform(15, 45, 2)
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    mask = ((rows - center[0]) / radii[0]) ** 2 + ((columns - center[1]) / radii[1]) ** 2 < 1
    if kind == "noisy":
        mask &= rng.random(SIZE) < 0.6
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def resident(field: str) -> int:
    """Return resident bytes of this process: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status must have {field}, which only Linux provides. Run this on Linux.")


def count_outputs_of_the_port() -> list[tuple[str, float]]:
    """Return names and bytes per image of the port's outputs that the stock Trainer keeps."""
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
        # Like Trainer.prediction_step.
        if name != "loss" and name not in ignored:
            sizes.append((name, count_bytes(value) / 2))
    return sizes


def count_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested lists and dicts."""
    if isinstance(value, dict):
        return sum(map(count_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(count_bytes, value))
    return value.nbytes if hasattr(value, "nbytes") else 0


if __name__ == "__main__":
    main()
