"""A training step: forward, loss and backward, without the optimizer. Its memory, and its time.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --variant rf-detr-seg-nano --batch-sizes 16 --time-batch 16 --bf16

Images are noise with 8 objects each. Bytes are those above the built model, of the first step of a fresh process; the
gradients are among them. Losses are those of each implementation's own recipe, rfdetr's with its sampled mask points.
"""

from collections.abc import Callable
from typing import Any

import torch
from rfdetr.config import SegmentationTrainConfig
from rfdetr.models.lwdetr import build_criterion_from_config
from rfdetr.utilities.tensors import NestedTensor
from torch import Tensor

from peers import Measurement, build, draw_boxes, ellipses, peak_bytes, read_arguments, read_config, report, time_in_turns

IMPLEMENTATIONS = ("ours", "ours checkpointed", "port", "rfdetr")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = read_arguments(
        __doc__,
        argv,
        repeats=3,
        batch_sizes={"type": int, "nargs": "*", "default": [1, 2, 4], "help": "for the memory"},
        time_batch={"type": int, "default": 2, "help": "batch size for the time; 0 leaves it out"},
        objects={"type": int, "default": 8, "help": "objects an image"},
        bf16={"action": "store_true", "help": "under autocast to bf16"},
    )
    measurements = []
    for variant in arguments.variant:
        precision = ", bf16" if arguments.bf16 else ""

        def add(case: str, name: str, value: float, unit: str, variant: str = variant) -> None:
            case += precision
            measurements.append(Measurement("training step", variant, case, name, value, unit, arguments.device))

        settings = (variant, arguments.quick, arguments.device, arguments.objects, arguments.bf16)
        for batch in arguments.batch_sizes[:1] if arguments.quick else arguments.batch_sizes:
            for name in IMPLEMENTATIONS:
                add(f"peak memory, B={batch}", name, peak_bytes(arguments.device, prepare, name, batch, *settings), "B")
        if arguments.time_batch:
            batch = arguments.time_batch
            steps = {name: prepare(name, batch, *settings) for name in IMPLEMENTATIONS}
            seconds = time_in_turns(steps, arguments.repeats, arguments.device)
            for name in IMPLEMENTATIONS:
                add(f"time, B={batch}", name, seconds[name], "s")
            for name in IMPLEMENTATIONS:
                add(f"throughput, B={batch}", name, batch / seconds[name], "images/s")
    report(measurements, arguments)


def prepare(
    name: str, batch: int, variant: str, quick: bool, device: str, num_objects: int, bf16: bool
) -> Callable[[], None]:
    """A step of one implementation, its model built."""
    config = read_config(variant, quick)
    [model] = build(config, variant, device, name.split()[0]).values()
    generator = torch.Generator().manual_seed(1)
    side = config.resolution
    pixels = torch.randn(batch, 3, side, side, generator=generator).to(device)
    labels = [_draw_labels(config.num_labels, num_objects, side, generator, device) for _ in range(batch)]
    if name == "rfdetr":
        loss, parameters = _rfdetr_loss(model, pixels, labels), list(model.model.model.parameters())
    else:
        model.train()
        if name == "ours checkpointed":
            model.gradient_checkpointing_enable()
        loss, parameters = lambda: model(pixel_values=pixels, labels=labels).loss, list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()

    return step


def _draw_labels(
    num_labels: int, count: int, side: int, generator: torch.Generator, device: str
) -> dict[str, Tensor]:
    boxes = draw_boxes(count, 0.1, 0.5, generator)
    labels = {
        "class_labels": torch.randint(num_labels, (count,), generator=generator),
        "boxes": boxes,
        "masks": ellipses(boxes, side, side) > 0,
    }
    return {name: value.to(device) for name, value in labels.items()}


def _rfdetr_loss(peer: Any, pixels: Tensor, labels: list[dict[str, Tensor]]) -> Callable[[], Tensor]:
    """rfdetr's weighted sum, as its training module makes it."""
    model = peer.model.model.train()
    recipe = SegmentationTrainConfig(dataset_dir=".", output_dir=".")
    criterion = build_criterion_from_config(peer.model_config, recipe)[0].to(pixels.device).train()
    targets = [{"labels": label["class_labels"], **label} for label in labels]
    padding = torch.zeros_like(pixels[:, 0], dtype=torch.bool)

    def loss() -> Tensor:
        terms = criterion(model(NestedTensor(pixels, padding), targets), targets)
        return torch.stack([terms[name] * weight for name, weight in criterion.weight_dict.items() if name in terms]).sum()

    return loss


if __name__ == "__main__":
    main()
