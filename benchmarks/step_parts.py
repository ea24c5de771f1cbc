"""Measure where the time of a training step goes: transfer, parts of the forward pass, loss, backward and optimizer.

    python benchmarks/step_parts.py
    python benchmarks/step_parts.py --device cuda --variant rf-detr-seg-nano --batch 16 --bf16

On a GPU the times are those between two events in its queue, so that waiting for the host counts. "matching" is part
of "loss", and "assignment" is part of "matching". "ours scipy" assigns on the CPU; "ours" uses torch-linear-assignment
where it is installed, on a GPU. The operators that take the most time are printed, from torch's profiler.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import peers
import torch
from peers import Measurement
from training_step import draw_batch

from transformers_rfdetr.model import loss_rf_detr, matcher_rf_detr


class Clock:
    """Collects the seconds of named parts of a step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        """Return an event in the queue of the GPU, or the seconds."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function."""
        start = self.now()
        result = function(*arguments, **options)
        self.marks.append((name, start, self.now()))
        return result

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are timed."""
        return lambda *arguments, **options: self.timed(name, function, *arguments, **options)

    @contextmanager
    def patched(self, *parts: tuple[str, Any, str]) -> Iterator[None]:
        """Time the calls of functions, each given as the name of its part, its owner and its attribute there."""
        with ExitStack() as stack:
            for part, owner, name in parts:
                stack.enter_context(mock.patch.object(owner, name, self.wrap(part, getattr(owner, name))))
            yield

    def pop(self) -> dict[str, float]:
        """Return the sum of seconds of each part since the last call."""
        peers.synchronize(self.device)
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in self.marks:
            sums[name] += end - start if self.device == "cpu" else start.elapsed_time(end) / 1e3
        self.marks.clear()
        return sums


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    batch = {"type": int, "default": 2, "help": "batch size (default: %(default)s)"}
    bf16 = {"action": "store_true", "help": "run under autocast to bf16 (default: off)"}
    peers.run(__doc__, argv, measure, repeats=3, batch=batch, bf16=bf16)


def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return seconds of each part, with each way of assignment."""
    device = arguments.device
    clock = Clock(device)
    step = prepare(clock, variant, arguments)
    ways = {"ours": matcher_rf_detr.MIN_PROBLEMS_ON_GPU, "ours scipy": 1 << 62}
    if device == "cpu" or matcher_rf_detr.batch_linear_assignment is None:
        print("skipped: assignment on the GPU, which requires CUDA and torch-linear-assignment")
        del ways["ours"]
    found = []
    precision = ", bf16" if arguments.bf16 else ""
    for name, limit in ways.items():
        with mock.patch.object(matcher_rf_detr, "MIN_PROBLEMS_ON_GPU", limit):
            steps = [step() for _ in range(arguments.repeats + 1)][1:]
        for part in steps[0]:
            case = f"{part}, B={arguments.batch}{precision}"
            seconds = statistics.median(one[part] for one in steps)
            found.append(Measurement("step", variant, case, name, seconds, "s", device))
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    print(profile.key_averages().table(f"self_{device}_time_total", row_limit=15, max_name_column_width=60))
    return found


def prepare(clock: Clock, variant: str, arguments: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Return a function that runs a step and returns the seconds of its parts."""
    device, config = arguments.device, peers.read_config(variant, arguments.quick)
    [model] = peers.build(config, variant, device, "ours").values()
    model.train()
    pixels, labels = draw_batch(config, arguments.batch, "cpu")
    if device == "cuda":
        pixels, labels = pixels.pin_memory(), [{key: one.pin_memory() for key, one in each.items()} for each in labels]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    parts = (
        ("backbone", model.backbone[0], "forward"),
        ("first stage", model.transformer, "select_two_stage_proposals"),
        ("decoder", model, "decode"),
        ("heads", model, "stages"),
        ("loss", model, "loss"),
        ("matching", loss_rf_detr, "match"),
        ("assignment", matcher_rf_detr, "assign"),
        ("assignment", matcher_rf_detr, "assign_together"),
    )

    def load() -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        on_device = [{key: one.to(device, non_blocking=True) for key, one in each.items()} for each in labels]
        return pixels.to(device, non_blocking=True), on_device

    def run() -> None:
        given = clock.timed("transfer", load)
        with torch.autocast(device, torch.bfloat16, enabled=arguments.bf16):
            loss = clock.timed("forward and loss", model, given[0], labels=given[1]).loss
        clock.timed("backward", loss.backward)
        clock.timed("optimizer", optimizer.step)
        optimizer.zero_grad()

    def step() -> dict[str, float]:
        with clock.patched(*parts):
            clock.timed("step", run)
        return clock.pop()

    return step


if __name__ == "__main__":
    main()
