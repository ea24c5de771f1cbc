"""Outputs to instances at the size of the original picture: time, and memory above what was there before.

    python benchmarks/post_processing.py

Scores, boxes and mask logits are those of ellipses with sides of 5 to 35 % of the picture, all above the threshold.
"Label map" is one map of ids, "masks" one bool mask for each instance, "RLE" COCO's form of these (the port has none).
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peers import (
    Measurement,
    PortProcessor,
    draw_boxes,
    ellipses,
    peak_bytes,
    read_arguments,
    read_config,
    report,
    time_in_turns,
)
from rfdetr.models import PostProcess

from transformers_rfdetr import RfDetrConfig, RfDetrImageProcessor

CASES = [(100, (3000, 4000)), (30, (480, 640))]
FORMS = {"label map": ("ours", "port"), "masks": ("ours", "port", "rfdetr"), "RLE": ("ours",)}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = read_arguments(__doc__, argv, repeats=3)
    device, measurements = arguments.device, []
    for variant in arguments.variant:
        for count, size in [(8, (600, 800))] if arguments.quick else CASES:
            for form, names in FORMS.items():
                settings = (form, count, size, variant, arguments.quick, device)
                case = f"{count} at {size[0]}x{size[1]}, {form}"
                calls = {name: prepare(name, *settings) for name in names}
                for name, seconds in time_in_turns(calls, arguments.repeats, device).items():
                    measurements.append(Measurement("post-processing", variant, case, name, seconds, "s", device))
                for name in names:
                    added = peak_bytes(device, prepare, name, *settings)
                    measurements.append(
                        Measurement("post-processing", variant, f"{case}, memory", name, added, "B", device)
                    )
    report(measurements, arguments)


def prepare(
    name: str, form: str, count: int, size: tuple[int, int], variant: str, quick: bool, device: str
) -> Callable[[], Any]:
    """The post-processing of one implementation to one form."""
    config = read_config(variant, quick)
    outputs = draw_outputs(config, count, device)
    if name == "rfdetr":
        theirs = {key: getattr(outputs, key) for key in ("pred_boxes", "pred_masks")} | {"pred_logits": outputs.logits}
        sizes = torch.tensor([size], device=device)
        return lambda: PostProcess(config.num_queries)(theirs, sizes, score_threshold=0.5)
    processor = RfDetrImageProcessor() if name == "ours" else PortProcessor()
    options = {"return_binary_maps": form == "masks", "return_coco_annotation": form == "RLE"}
    return lambda: processor.post_process_instance_segmentation(outputs, target_sizes=[size], **options)


def draw_outputs(config: RfDetrConfig, count: int, device: str) -> SimpleNamespace:
    """A model's outputs for one picture in which `count` queries find something."""
    generator = torch.Generator().manual_seed(0)
    side = config.resolution // config.mask_downsample_ratio
    boxes = draw_boxes(config.num_queries, 0.05, 0.35, generator)
    logits = torch.full((config.num_queries, config.num_labels), -10.0)
    found = torch.randperm(config.num_queries, generator=generator)[:count]
    logits[found, torch.randint(config.num_labels, (count,), generator=generator)] = 1 + torch.rand(
        count, generator=generator
    )
    masks = 5 * ellipses(boxes, side, side).clamp(min=-2)
    tensors = {"logits": logits, "pred_boxes": boxes, "pred_masks": masks}
    return SimpleNamespace(**{name: tensor[None].to(device) for name, tensor in tensors.items()})


if __name__ == "__main__":
    main()
