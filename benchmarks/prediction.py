"""Measure prediction, from one image to boxes, labels and masks, and the time of each of our steps.

    python benchmarks/prediction.py
    python benchmarks/prediction.py --device cuda --repeats 100

The image has 480 x 640 pixels and is in memory. The threshold is just below the tenth score, so ten detections are
kept. Masks are bool arrays of the image's size; "predict" is `transformers_rfdetr.predict`, which returns RLE. With
random weights the masks are noise over the whole image, which is the worst case for post-processing.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import peers
import torch
from peers import Form, Measurement
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor, predict

SIZE = (480, 640)
DETECTIONS = 10


class Way(NamedTuple):
    """Prediction in three steps with transformers' classes, ours or the port's."""

    processor: Any
    form: Form
    image: Image.Image
    device: str
    threshold: float = 0.0

    def pixels(self) -> torch.Tensor:
        """Return the input of the model."""
        return self.processor(images=self.image, return_tensors="pt")["pixel_values"].to(self.device)

    def instances(self, outputs: Any) -> Any:
        """Return the detections."""
        return self.processor.post_process_instance_segmentation(
            outputs, threshold=self.threshold, target_sizes=[SIZE], return_binary_maps=True
        )

    def __call__(self) -> Any:
        """Run all three steps."""
        return self.instances(self.form.run(self.pixels()))

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Return a function for each step alone."""
        pixels = self.pixels()
        outputs = self.form.run(pixels)
        model, after = (lambda: self.form.run(pixels)), (lambda: self.instances(outputs))
        return {"preprocessing alone": self.pixels, "model alone": model, "post-processing alone": after}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    peers.run(__doc__, argv, measure, repeats=10, variants=("rf-detr-seg-nano", "rf-detr-seg-medium"))


@torch.no_grad()
def measure(variant: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Return seconds of each way, then of our steps in float32."""
    device = arguments.device
    ways = build_ways(variant, arguments.quick, device)
    whole = peers.time_in_turns(ways, arguments.repeats, device)
    steps = peers.time_in_turns(ways["ours"].steps(), arguments.repeats, device)
    cases = [("whole", name, seconds) for name, seconds in whole.items()]
    cases += [(step, "ours", seconds) for step, seconds in steps.items()]
    return [Measurement("prediction", variant, case, name, seconds, "s", device) for case, name, seconds in cases]


def build_ways(variant: str, quick: bool, device: str) -> dict[str, Any]:
    """Return a function for each way from the image to its instances."""
    config = peers.read_config(variant, quick)
    models = peers.build(config, variant, device, "ours", "port", "rfdetr")
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*SIZE, 3), dtype=np.uint8))
    size = {"height": config.resolution, "width": config.resolution}
    ours, port = RfDetrImageProcessor(size=size), peers.PortProcessor(size=size)
    forms = peers.build_forms(models, device, compiled=not quick)
    way = Way(ours, forms["ours"], image, device)
    scores = way.form.run(way.pixels()).logits.sigmoid().flatten().sort(descending=True).values
    threshold = scores[DETECTIONS - 1 : DETECTIONS + 1].mean().item()
    ways: dict[str, Any] = {}
    for name, form in forms.items():
        if name.startswith("rfdetr"):
            ways[name] = lambda form=form: form.model.predict(image, threshold=threshold)
        else:
            ways[name] = Way(ours if name.startswith("ours") else port, form, image, device, threshold)
        if name.startswith("ours"):
            ways[f"{name} predict"] = lambda form=form: predict(form.model, ours, image, threshold=threshold)
    return ways


if __name__ == "__main__":
    main()
