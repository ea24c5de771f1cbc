"""From a picture to boxes, labels and masks, one at a time, as users run it; and where our time goes.

    python benchmarks/prediction.py
    python benchmarks/prediction.py --device cuda --repeats 100

The picture is 480 x 640 pixels in memory, and ten detections are kept: the threshold lies below the tenth score. Masks
are bool arrays of the picture's size; "ours predict" is `transformers_rfdetr.predict`, which returns them as RLE. With
random weights they are noise over the whole picture, the worst case of post-processing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from peers import (
    Form,
    Measurement,
    PortProcessor,
    build,
    compiled_forms,
    read_arguments,
    read_config,
    report,
    rfdetr_forms,
    time_in_turns,
    transformers_forms,
)
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor, predict

VARIANTS = ("rf-detr-seg-nano", "rf-detr-seg-medium")
SIZE = (480, 640)
DETECTIONS = 10


class Way(NamedTuple):
    """The three steps of transformers' classes, ours or the port's."""

    processor: Any
    form: Form
    image: Image.Image
    threshold: float
    device: str

    def pixels(self) -> torch.Tensor:
        """What the model takes."""
        return self.processor(images=self.image, return_tensors="pt")["pixel_values"].to(self.device)

    def instances(self, outputs: Any) -> Any:
        """What the user gets."""
        return self.processor.post_process_instance_segmentation(
            outputs, threshold=self.threshold, target_sizes=[SIZE], return_binary_maps=True
        )

    def whole(self) -> Any:
        """All three."""
        return self.instances(self.form.run(self.pixels()))

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Each by itself."""
        pixels = self.pixels()
        outputs = self.form.run(pixels)
        return {
            "preprocessing": self.pixels,
            "model": lambda: self.form.run(pixels),
            "post-processing": lambda: self.instances(outputs),
        }


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = read_arguments(__doc__, argv, repeats=10, variants=VARIANTS)
    device, measurements = arguments.device, []
    with torch.no_grad():
        for variant in arguments.variant:
            ways = build_ways(variant, arguments.quick, device)
            calls = {name: way.whole if isinstance(way, Way) else way for name, way in ways.items()}
            cases = {("whole", name): s for name, s in time_in_turns(calls, arguments.repeats, device).items()}
            for name, way in ways.items():
                if isinstance(way, Way):
                    seconds = time_in_turns(way.steps(), arguments.repeats, device)
                    cases |= {(f"of it {step}", name): s for step, s in seconds.items()}
            for (case, name), seconds in sorted(cases.items(), key=lambda item: item[0][0] != "whole"):
                measurements.append(Measurement("prediction", variant, case, name, seconds, "s", device))
    report(measurements, arguments)


def build_ways(variant: str, quick: bool, device: str) -> dict[str, Way | Callable[[], Any]]:
    """All ways from the picture to its instances."""
    config = read_config(variant, quick)
    models = build(config, variant, device, "ours", "port", "rfdetr")
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*SIZE, 3), dtype=np.uint8))
    size = {"height": config.resolution, "width": config.resolution}
    ours, port = RfDetrImageProcessor(size=size), PortProcessor(size=size)
    forms = transformers_forms("ours", models["ours"], device)
    if not quick:  # compiling takes a minute
        forms |= compiled_forms(models["ours"], device)
    threshold = tenth_score(Way(ours, forms["ours"], image, 0.0, device))
    ways: dict[str, Any] = {name: Way(ours, form, image, threshold, device) for name, form in forms.items()}
    for name, form in forms.items():
        ways[name.replace("ours", "ours predict")] = lambda form=form: predict(
            form.model, ours, image, threshold=threshold
        )
    for name, form in transformers_forms("port", models["port"], device).items():
        ways[name] = Way(port, form, image, threshold, device)
    for name, form in rfdetr_forms(models["rfdetr"], device).items():
        ways[name] = lambda form=form: form.model.predict(image, threshold=threshold)
    return ways


def tenth_score(way: Way) -> float:
    """A threshold that `DETECTIONS` pairs of query and class exceed."""
    scores = way.form.run(way.pixels()).logits.sigmoid().flatten().sort(descending=True).values
    return scores[DETECTIONS - 1 : DETECTIONS + 1].mean().item()


if __name__ == "__main__":
    main()
