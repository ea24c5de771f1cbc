"""Measure the forward pass of one image: FLOPs, and the time of every form that a user can run.

    python benchmarks/forward.py
    python benchmarks/forward.py --device cuda --variant rf-detr-seg-nano rf-detr-seg-medium --repeats 100

"ours compiled" is `compile_for_inference`; "rfdetr optimised" is rfdetr's `inference()`, which traces the exported
form. Its FLOPs are counted before tracing.
"""

import argparse

import peers
import torch
from peers import Measurement


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    peers.run(__doc__, argv, measure, repeats=15, batch={"type": int, "default": 1, "help": "batch size"})


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
    return [
        Measurement("forward", variant, f"{case}, B={arguments.batch}", name, value, unit, device)
        for case, unit, values in (("FLOPs", "FLOP", flops), ("time", "s", seconds))
        for name, value in values.items()
    ]


if __name__ == "__main__":
    main()
