"""The forward pass of one picture: its FLOPs, and its time in every form that a user can run.

    python benchmarks/forward.py
    python benchmarks/forward.py --device cuda --variant rf-detr-seg-nano rf-detr-seg-medium --repeats 100

"rfdetr optimised" is what rfdetr's own `inference()` makes of it: the exported form, traced. FLOPs are counted before it
is traced.
"""

import torch

from peers import (
    Form,
    Measurement,
    build,
    compiled_forms,
    count_flops,
    optimise_rfdetr,
    read_arguments,
    read_config,
    report,
    rfdetr_forms,
    time_in_turns,
    transformers_forms,
)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = read_arguments(__doc__, argv, repeats=15, batch={"type": int, "default": 1, "help": "batch size"})
    measurements = []
    for variant in arguments.variant:
        config = read_config(variant, arguments.quick)
        models = build(config, variant, arguments.device, "ours", "port", "rfdetr")
        for model in (models["ours"], models["port"], models["rfdetr"].model.model):
            model.requires_grad_(False)
        pixels = torch.randn(arguments.batch, 3, config.resolution, config.resolution).to(arguments.device)
        forms: dict[str, Form] = {
            **transformers_forms("ours", models["ours"], arguments.device),
            **transformers_forms("port", models["port"], arguments.device),
            **rfdetr_forms(models["rfdetr"], arguments.device),
        }

        def add(case: str, name: str, value: float, unit: str, variant: str = variant) -> None:
            case = f"{case}, B={arguments.batch}"
            measurements.append(Measurement("forward", variant, case, name, value, unit, arguments.device))

        counted = {name: forms[name].run for name in ("ours", "port", "rfdetr")}
        counted["rfdetr optimised"] = optimise_rfdetr(models["rfdetr"], compile=False).model.inference_model
        for name, run in counted.items():
            add("FLOPs", name, count_flops(lambda run=run: run(pixels)), "FLOP")
        if not arguments.quick:  # compiling takes a minute
            forms |= compiled_forms(models["ours"], arguments.device, arguments.batch)
        with torch.no_grad():
            calls = {name: lambda form=form: form.run(pixels) for name, form in forms.items()}
            for name, seconds in time_in_turns(calls, arguments.repeats, arguments.device).items():
                add("time", name, seconds, "s")
    report(measurements, arguments)


if __name__ == "__main__":
    main()
