"""Measure memory and time of a training step: forward, loss and backward, without the optimizer.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --variant rf-detr-seg-nano --batch-sizes 16 --time-batch 16 --bf16

Images are noise with 8 objects each. Bytes are the peak of the first step in a fresh process, above the built model,
and include the gradients. Each implementation uses its own loss; rfdetr samples random mask points.
"""

import argparse
from collections.abc import Callable
from typing import Any

import peers
import torch
from peers import Measurement
from rfdetr.config import SegmentationTrainConfig
from rfdetr.models.lwdetr import build_criterion_from_config
from rfdetr.utilities.tensors import NestedTensor
from torch import Tensor

from transformers_rfdetr import RfDetrConfig

IMPLEMENTATIONS = ("ours", "ours checkpointed", "port", "rfdetr")
OBJECTS = 8


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    peers.run(
        __doc__,
        argv,
        measure,
        repeats=3,
        batch_sizes={
            "type": int,
            "nargs": "*",
            "default": [1, 2, 4],
            "help": "batch sizes for the memory (default: %(default)s)",
        },
        time_batch={"type": int, "default": 2, "help": "batch size for the time; 0 skips it (default: %(default)s)"},
        bf16={"action": "store_true", "help": "run under autocast to bf16 (default: off)"},
    )


def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return bytes for each batch size, then seconds and images per second for one."""
    device, settings = arguments.device, (variant, arguments.quick, arguments.device, arguments.bf16)
    numbers = []
    for batch in arguments.batch_sizes[:1] if arguments.quick else arguments.batch_sizes:
        for name in IMPLEMENTATIONS:
            added = peers.peak_bytes(device, prepare, name, batch, *settings)
            numbers.append((f"peak memory, B={batch}", name, added, "B"))
    if batch := arguments.time_batch:
        steps = {name: prepare(name, batch, *settings) for name in IMPLEMENTATIONS}
        seconds = peers.time_in_turns(steps, arguments.repeats, device)
        numbers += [(f"time, B={batch}", name, value, "s") for name, value in seconds.items()]
        numbers += [(f"throughput, B={batch}", name, batch / value, "images/s") for name, value in seconds.items()]
    precision = ", bf16" if arguments.bf16 else ""
    return [
        Measurement("training step", variant, case + precision, name, value, unit, device)
        for case, name, value, unit in numbers
    ]


def prepare(name: str, batch: int, variant: str, quick: bool, device: str, bf16: bool) -> Callable[[], None]:
    """Build the model of one implementation, and return a function that runs a step."""
    config = peers.read_config(variant, quick)
    [model] = peers.build(config, variant, device, name.split()[0]).values()
    pixels, labels = draw_batch(config, batch, device)
    if name == "rfdetr":
        loss, parameters = _rfdetr_loss(model, pixels, labels), list(model.model.model.parameters())
    else:
        model.train()
        if name == "ours checkpointed":
            model.activation_checkpointing_enable()
        loss, parameters = lambda: model(pixel_values=pixels, labels=labels).loss, list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()

    return step


def draw_batch(config: RfDetrConfig, batch: int, device: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return images of noise (B, 3, H, W), and labels with 8 objects each."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, 3, config.resolution, config.resolution, generator=generator).to(device)
    labels = [
        {
            "class_labels": torch.randint(config.num_labels, (OBJECTS,), generator=generator).to(device),
            "boxes": boxes.to(device),
            "masks": (peers.ellipses(boxes, config.resolution, config.resolution) > 0).to(device),
        }
        for boxes in peers.draw_boxes(batch * OBJECTS, 0.1, 0.5, generator).split(OBJECTS)
    ]
    return pixels, labels


def _rfdetr_loss(peer: Any, pixels: Tensor, labels: list[dict[str, Tensor]]) -> Callable[[], Tensor]:
    """Return a function that computes the loss as rfdetr's training module does."""
    model = peer.model.model.train()
    settings = SegmentationTrainConfig(dataset_dir=".", output_dir=".")
    criterion = build_criterion_from_config(peer.model_config, settings)[0].to(pixels.device).train()
    targets = [{"labels": label["class_labels"], **label} for label in labels]
    samples = NestedTensor(pixels, torch.zeros_like(pixels[:, 0], dtype=torch.bool))

    def loss() -> Tensor:
        terms = criterion(model(samples, targets), targets)
        return sum(terms[name] * weight for name, weight in criterion.weight_dict.items() if name in terms)

    return loss


if __name__ == "__main__":
    main()
