"""Predict a large image in slices with SAHI (pip install sahi), which merges boxes, and in tiles with predict_tiled.

python examples/predict_with_sahi.py rf-detr-seg-tiny survey.tif

SAHI 0.12.8 applies a softmax to the logits of a class whose name it does not know, which gives wrong scores: in the
sample image of this package it finds 53 boxes above 0.5 instead of 15. The class below has the scores of `predict`.
SAHI reads no masks from models of transformers; `predict_tiled` merges masks.
"""

import sys

from PIL import Image
from sahi.models.huggingface import HuggingfaceDetectionModel
from sahi.predict import get_sliced_prediction

from transformers_rfdetr import load, predict_tiled
from transformers_rfdetr.hub.load import resolve_name


class RfDetrDetectionModel(HuggingfaceDetectionModel):
    """A model of this package and its image processor, for SAHI's functions."""

    _SIGMOID_CLS_PREFIXES = ("RfDetr",)


def main(name: str, path: str) -> None:
    """Print how many objects both ways find."""
    model, processor = load(name)
    with Image.open(path) as file:
        image = file.convert("RGB")
    detector = RfDetrDetectionModel(resolve_name(name), confidence_threshold=0.5)
    side = model.config.resolution
    sliced = get_sliced_prediction(image, detector, slice_height=side, slice_width=side, verbose=0)
    print(f"SAHI: {len(sliced.object_prediction_list)} boxes")
    print(f"predict_tiled: {len(predict_tiled(model, processor, image))} masks")


if __name__ == "__main__":
    main(*sys.argv[1:])
