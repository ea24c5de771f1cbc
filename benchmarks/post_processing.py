"""Measure post-processing, from outputs to instances at the original image size: time and additional memory.

    python benchmarks/post_processing.py

The outputs are ellipses with sides of 5 to 35 % of the image, all with scores above the threshold. "Label map" is one
map of ids, "masks" is one bool mask for each instance, and "RLE" is their COCO run-length encoding (not in the port).
"Records" are what evaluation keeps, scores, boxes and RLE of 200 masks, with two threads and with one; "ours plain"
upsamples each mask, which defines the result.
"""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peers
import torch
from peers import Measurement
from rfdetr.models import PostProcess

from transformers_rfdetr import RfDetrConfig, RfDetrImageProcessor
from transformers_rfdetr.evaluation.evaluation_loop import detect
from transformers_rfdetr.model.masks import region_to_rle, upsample_masks

CASES = [(100, (3000, 4000)), (30, (480, 640))]
RECORDS = [(480, 640), (1080, 1920)]
NUM_RECORDS, CELLS = 200, 108  # of rf-detr-seg-medium
FORMS = {"label map": ("ours", "port"), "masks": ("ours", "port", "rfdetr"), "RLE": ("ours",)}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    peers.run(__doc__, argv, measure, repeats=3)


def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return seconds and bytes for each number of instances, size and form."""
    device, numbers = arguments.device, []
    for count, size in [(8, (600, 800))] if arguments.quick else CASES:
        for form, names in FORMS.items():
            settings = (form, count, size, variant, arguments.quick, device)
            case = f"{count} at {size[0]}x{size[1]}, {form}"
            calls = {name: prepare(name, *settings) for name in names}
            seconds = peers.time_in_turns(calls, arguments.repeats, device)
            numbers += [(case, name, value, "s") for name, value in seconds.items()]
            added = {name: peers.peak_bytes(device, prepare, name, *settings) for name in names}
            numbers += [(f"{case}, memory", name, value, "B") for name, value in added.items()]
    for size in RECORDS[: 1 if arguments.quick else None]:
        for num_threads in (2, 1):
            case = f"records of {NUM_RECORDS} at {size[0]}x{size[1]}, {num_threads} threads"
            seconds = time_records(size, num_threads, 10 * arguments.repeats, device)
            numbers += [(case, name, value, "s") for name, value in seconds.items()]
    return [Measurement("post-processing", variant, *number, device) for number in numbers]


def time_records(size: tuple[int, int], num_threads: int, repeats: int, device: str) -> dict[str, float]:
    """Return the seconds of `detect` for one image of `size` (H, W), and with masks that are upsampled one by one."""
    generator = torch.Generator().manual_seed(0)
    boxes = peers.draw_boxes(NUM_RECORDS, 20 / CELLS, 60 / CELLS, generator)  # radii of 10 to 30 cells
    logits = torch.full((1, NUM_RECORDS, 90), -10.0)
    logits[0, torch.arange(NUM_RECORDS), torch.randint(90, (NUM_RECORDS,), generator=generator)] = 1.0
    masks = 5 * peers.ellipses(boxes, CELLS, CELLS).clamp(min=-2)
    tensors = {"logits": logits, "pred_boxes": boxes[None], "pred_masks": masks[None]}
    outputs = SimpleNamespace(**{name: tensor.to(device) for name, tensor in tensors.items()})

    def plain() -> None:
        detect(SimpleNamespace(logits=outputs.logits, pred_boxes=outputs.pred_boxes), [size])
        for region in upsample_masks(outputs.pred_masks[0], size, 0.0):
            region_to_rle(*region, size)

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return peers.time_in_turns({"ours": lambda: detect(outputs, [size]), "ours plain": plain}, repeats, device)
    finally:
        torch.set_num_threads(before)


def prepare(
    name: str, form: str, count: int, size: tuple[int, int], variant: str, quick: bool, device: str
) -> Callable[[], Any]:
    """Return a function that runs the post-processing of one implementation to one form."""
    config = peers.read_config(variant, quick)
    outputs = draw_outputs(config, count, device)
    if name == "rfdetr":
        theirs = {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes, "pred_masks": outputs.pred_masks}
        sizes = torch.tensor([size], device=device)
        return lambda: PostProcess(config.num_queries)(theirs, sizes, score_threshold=0.5)
    processor = RfDetrImageProcessor() if name == "ours" else peers.PortProcessor()
    options = {"return_binary_maps": form == "masks", "return_coco_annotation": form == "RLE"}
    return lambda: processor.post_process_instance_segmentation(outputs, target_sizes=[size], **options)


def draw_outputs(config: RfDetrConfig, count: int, device: str) -> SimpleNamespace:
    """Return a model's outputs for one image with `count` detections."""
    generator = torch.Generator().manual_seed(0)
    side = config.resolution // config.mask_downsample_ratio
    boxes = peers.draw_boxes(config.num_queries, 0.05, 0.35, generator)
    logits = torch.full((config.num_queries, config.num_labels), -10.0)
    found = torch.randperm(config.num_queries, generator=generator)[:count]
    labels = torch.randint(config.num_labels, (count,), generator=generator)
    logits[found, labels] = 1 + torch.rand(count, generator=generator)
    masks = 5 * peers.ellipses(boxes, side, side).clamp(min=-2)
    tensors = {"logits": logits, "pred_boxes": boxes, "pred_masks": masks}
    return SimpleNamespace(**{name: tensor[None].to(device) for name, tensor in tensors.items()})


if __name__ == "__main__":
    main()
