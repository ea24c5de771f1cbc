"""Measure the forward pass of one image: FLOPs, and the time of every form that a user can run.

    python benchmarks/forward.py
    python benchmarks/forward.py --device cuda --variant rf-detr-seg-nano rf-detr-seg-medium --repeats 100

"ours compiled" is `compile_for_inference`; "rfdetr optimised" is rfdetr's `inference()`, which traces the exported
form. Its FLOPs are counted before tracing. With --throughput, images per second in bf16 are measured too.
"""

import argparse
import copy
from functools import partial
from typing import Any

import peers
import torch
from peers import Measurement

from transformers_rfdetr import RfDetrConfig, compile_for_inference


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    batch = {"type": int, "default": 1, "help": "batch size"}
    sizes = {"type": int, "nargs": "*", "default": [], "help": "batch sizes for images per second (default: none)"}
    peers.run(__doc__, argv, measure, repeats=15, batch=batch, throughput=sizes)


def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return FLOPs, then seconds."""
    device, config = arguments.device, peers.read_config(variant, arguments.quick)
    models = peers.build(config, variant, device, "ours", "port", "rfdetr")
    for model in (models["ours"], models["port"], models["rfdetr"].model.model):
        model.requires_grad_(False)
    pixels = torch.randn(arguments.batch, 3, config.resolution, config.resolution).to(device)
    runs = {"ours": models["ours"], "port": models["port"], "rfdetr": models["rfdetr"].model.model}
    runs["rfdetr optimised"] = peers.optimise_rfdetr(models["rfdetr"], compile=False).model.inference_model
    flops = {name: peers.count_flops(lambda run=run: run(pixels)) for name, run in runs.items()}

    forms = peers.build_forms(models, device, compiled=not arguments.quick, batch=arguments.batch)
    with torch.no_grad():
        calls = {name: lambda form=form: form.run(pixels) for name, form in forms.items()}
        seconds = peers.time_in_turns(calls, arguments.repeats, device)
    found = [
        Measurement("forward", variant, f"{case}, B={arguments.batch}", name, value, unit, device)
        for case, unit, values in (("FLOPs", "FLOP", flops), ("time", "s", seconds))
        for name, value in values.items()
    ]
    del forms, calls, runs
    for batch in arguments.throughput:
        for name, value in measure_throughput(models, config, batch, arguments).items():
            found.append(Measurement("forward", variant, f"throughput, B={batch}", name, value, "images/s", device))
    return found


@torch.no_grad()
def measure_throughput(
    models: dict[str, Any], config: RfDetrConfig, batch: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Return images per second in bf16."""
    pixels = torch.randn(batch, 3, config.resolution, config.resolution).to(arguments.device, torch.bfloat16)
    plain = {name: copy.deepcopy(models[name]).bfloat16() for name in ("ours", "port")}
    peer = peers.optimise_rfdetr(models["rfdetr"], batch_size=batch, dtype=torch.bfloat16)
    runs = {f"{name} bf16": model for name, model in plain.items()}
    runs["rfdetr optimised bf16"] = peer.model.inference_model
    if not arguments.quick:
        runs["ours compiled bf16"] = compile_for_inference(models["ours"], batch_size=batch, dtype=torch.bfloat16)
    calls = {name: partial(run, pixels) for name, run in runs.items()}
    seconds = peers.time_in_turns(calls, max(3, arguments.repeats // batch), arguments.device)
    return {name: batch / value for name, value in seconds.items()}


if __name__ == "__main__":
    main()
