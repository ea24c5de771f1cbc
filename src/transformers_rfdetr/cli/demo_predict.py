"""`python -m transformers_rfdetr.cli.demo_predict`: from a picture and a checkpoint to an overlay and its instances."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .. import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor, load, predict
from ..atomic_files import atomic_file
from ..data.synthetic import CATEGORIES, draw_scene
from ..model.configuration_rf_detr import error_context
from ..model.image_processing_rf_detr import read_rgb
from ..model.masks import mask_areas

_RANDOM_TOP_K = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line by default.

    Returns:
        The exit code: 0, or 2 after one line on stderr that says what was wrong with the arguments.
    """
    options = _parse(arguments)
    try:
        _predict(options.image, options.model, options.threshold, options.output)
    except (OSError, ValueError) as error:
        print("demo_predict:", *str(error).splitlines()[:1], file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m transformers_rfdetr.cli.demo_predict",
        description="Segment one picture, draw the instances over it, and list them.",
        epilog="example: python -m transformers_rfdetr.cli.demo_predict "
        "--image street.jpg --model Roboflow/rf-detr-seg-medium --output street.png",
    )
    parser.add_argument("--image", metavar="PATH_OR_URL", help="a picture; without it the package draws one")
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_HUB_ID",
        help="a checkpoint, or the name of a published one; without it a small random one is made",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="least score of an instance, 0 to 1 (0.5; with random weights 0, and the best few are shown)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo/overlay.png"), help="where the picture goes (%(default)s)"
    )
    return parser.parse_args(arguments)


def _predict(source: str | None, model_name: str | None, threshold: float | None, output: Path) -> None:
    if threshold is None:
        threshold = 0.5 if model_name else 0.0
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold {threshold} is outside [0, 1]; give a score such as 0.5")
    kind = Image.registered_extensions().get(output.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"--output {output} has no ending of a picture's format; give one such as overlay.png")
    image = draw_scene(seed=0)[0] if source is None else read_rgb(source)
    if model_name is None:
        print("The weights are RANDOM: the masks below mean nothing. Give a trained checkpoint with --model.")
        with tempfile.TemporaryDirectory() as folder:
            _save_random_checkpoint(folder)
            model, processor = load(folder)
    else:
        with error_context("--model"):
            model, processor = load(model_name)

    top_k = None if model_name else _RANDOM_TOP_K
    [found] = predict(model, processor, image, threshold=threshold, top_k=top_k)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as partial:
        found.draw(image, color_by="instance").save(partial, kind)

    size = f"{image.width} x {image.height}"
    print(f"{len(found) or 'No'} instances score above {threshold:g} in {source or 'a drawn picture'} ({size} pixels)")
    if len(found):
        print(f"{'id':>3}  {'label':<16} {'score':>6}  {'box x0 y0 x1 y1':^23}  {'area':>8}")
    areas = mask_areas(found.masks) if found.masks else (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)
    for index, (name, score, box, area) in enumerate(zip(found.names, found.scores, found.boxes, areas, strict=True)):
        sides = " ".join(f"{side:5.0f}" for side in box)
        print(f"{index:>3}  {name:<16} {score:>6.3f}  {sides}  {area:>8.0f}")
    print(f"The overlay is in {output}")


def _save_random_checkpoint(folder: str) -> None:
    """A checkpoint of the smallest sensible architecture, from a fixed seed, with its processor."""
    config = RfDetrConfig(
        backbone_config={
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 192,
            "patch_size": 12,
            "num_windows": 2,
            "out_indices": [1, 2, 3, 4],
        },
        d_model=64,
        num_queries=20,
        decoder_layers=2,
        decoder_ffn_dim=128,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        id2label={index: category["name"] for index, category in enumerate(CATEGORIES)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RfDetrForInstanceSegmentation(config).save_pretrained(folder)
    RfDetrImageProcessor.from_config(config).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
