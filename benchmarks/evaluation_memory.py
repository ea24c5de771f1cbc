"""Measure the time of an evaluation of masks and the host memory that it keeps per image; also in the stock Trainer.

    python benchmarks/evaluation_memory.py
    python benchmarks/evaluation_memory.py --images 5000 --pycocotools

Each line is measured in a fresh process. An image has 7 objects and 100 detections of 80 classes, with masks of 480 x
640 pixels: compact masks (an ellipse, about 100 bytes of RLE each) or noisy masks (60 % of the pixels of an ellipse, at
random). 21 of the detections have the masks of objects. With --pycocotools, COCOeval computes the 24 numbers from the
same detections, and the largest difference is printed. The stock Trainer keeps every output except the loss until the
evaluation ends; its bytes are counted on one batch of transformers' port of rf-detr-seg-medium with random weights.
"""

import argparse
import ctypes
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (480, 640)
DETECTIONS, OBJECTS, CLASSES = 100, 7, 80  # COCO has 7 objects per image
FOUND = 3 * OBJECTS


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
        "--pycocotools", action="store_true", help="compare with COCOeval, which takes minutes (default: off)"
    )
    parser.add_argument(
        "--no-port", action="store_true", help="do not measure transformers' port (default: measure it)"
    )
    arguments = parser.parse_args()

    cases = [(count, "compact") for count in arguments.images]
    if arguments.noisy_images:
        cases.append((arguments.noisy_images, "noisy"))
    print("                kept per image, KB        update,     compute()                         COCOeval")
    print("masks    images    RSS    exact  pickled   ms/image   seconds  adds at most, MB of RSS  seconds  differs by")
    for count, kind in cases:
        row = alone(stream, count, kind, arguments.pycocotools)
        compared = f"  {row['coco']:7.1f}  {row['difference']:.1e}" if arguments.pycocotools else ""
        print(
            f"{kind:8} {count:6} {row['rss'] / count / 1e3:6.1f}  {row['exact'] / count / 1e3:7.1f}"
            f"  {row['pickled'] / count / 1e3:7.1f}  {row['update'] / count * 1e3:9.1f}  {row['compute']:8.1f}"
            f"  {row['added'] / 1e6:6.0f} of {row['peak'] / 1e6:.0f}{compared}"
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


def stream(num_images: int, kind: str, compare: bool = False) -> dict[str, float]:
    """Return bytes and seconds of an evaluation; with `compare`, also the seconds and the difference of COCOeval."""
    import pickle

    from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator

    rng = np.random.default_rng(0)
    pool = [draw(rng, kind) for _ in range(400)]
    shapes, classes = (
        rng.integers(len(pool), size=(num_images, OBJECTS)),
        rng.integers(CLASSES, size=(num_images, OBJECTS)),
    )
    ground_truth = {
        "images": [{"id": image_id, "height": SIZE[0], "width": SIZE[1]} for image_id in range(num_images)],
        "annotations": [
            {"image_id": image_id, "category_id": int(category), "segmentation": pool[shape]}
            for image_id in range(num_images)
            for shape, category in zip(shapes[image_id], classes[image_id], strict=True)
        ],
        "categories": [{"id": category, "name": str(category)} for category in range(CLASSES)],
    }
    evaluator = InstanceSegmentationEvaluator(ground_truth)
    # Return freed memory to the system, or the evaluation would reuse it.
    ctypes.CDLL(None).malloc_trim(0)
    before, seconds = resident("VmRSS"), 0.0
    for image_id in range(num_images):
        others = DETECTIONS - FOUND
        found = [*np.tile(shapes[image_id], 3), *rng.integers(len(pool), size=others)]
        labels = np.concatenate([np.tile(classes[image_id], 3), rng.choice(classes[image_id], others)])
        scores = rng.random(DETECTIONS)
        start = time.perf_counter()
        evaluator.update(image_id, scores=scores, labels=labels, masks=[pool[index] for index in found])
        seconds += time.perf_counter() - start
    kept = resident("VmRSS") - before
    records = evaluator.state().values()
    exact = sum(
        found.scores.nbytes + found.labels.nbytes + found.boxes.nbytes + found.masks.offsets.nbytes for found in records
    ) + sum(len(found.masks.counts) for found in records)
    pickled = len(pickle.dumps(evaluator.state()))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    start, at_start = time.perf_counter(), resident("VmRSS")
    metrics = evaluator.compute()
    row = {
        "rss": kept,
        "exact": exact,
        "pickled": pickled,
        "update": seconds,
        "compute": time.perf_counter() - start,
        "peak": resident("VmHWM"),
        "added": resident("VmHWM") - at_start,
    }
    return row | (run_cocoeval(ground_truth, evaluator, metrics) if compare else {})


def run_cocoeval(ground_truth: dict[str, Any], evaluator: Any, metrics: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of COCOeval of pycocotools, and the largest difference between its numbers and `metrics`."""
    import copy
    import io
    from contextlib import redirect_stdout

    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {**one, "id": number, "iscrowd": 0, "area": float(coco_mask.area(one["segmentation"]))}
        | {"bbox": coco_mask.toBbox(one["segmentation"]).tolist()}
        for number, one in enumerate(ground_truth["annotations"], 1)
    ]
    seconds, difference = 0.0, 0.0
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**ground_truth, "annotations": annotations}
        truth.createIndex()
        for kind in ("segm", "bbox"):
            rows = copy.deepcopy(list(evaluator.predictions(kind)))
            start = time.perf_counter()
            evaluation = COCOeval(truth, truth.loadRes(rows), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            seconds += time.perf_counter() - start
            ours = [value for name, value in metrics.items() if name.startswith(kind)]
            difference = max(difference, float(np.abs(np.array(ours) - evaluation.stats).max()))
    return {"coco": seconds, "difference": difference}


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
