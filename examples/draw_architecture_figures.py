"""Draw the figures of docs/concepts/architecture.md: `python examples/draw_architecture_figures.py docs/images`

rf-detr-seg-tiny computes everything that they show. They need `pip install ".[report]"`.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor

from transformers_rfdetr import load, sample_image
from transformers_rfdetr.data.drawing import color_of, draw_instances
from transformers_rfdetr.model.boxes_rf_detr import box_cxcywh_to_xyxy
from transformers_rfdetr.model.modeling_rf_detr import encoder_proposals

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_WIDTH_INCHES = 6.9
_NUM_PROPOSALS = 12


def save(figure: Any, path: Path) -> None:
    """Write a figure of at most 700 pixels and close it."""
    figure.savefig(path, dpi=100)
    plt.close(figure)


def show(axis: Any, image: Any, title: str, **settings: Any) -> None:
    """Show an image without ticks."""
    axis.imshow(image, **settings)
    axis.set(xticks=[], yticks=[], title=title)


def draw_windows(model: Any, image: Image.Image, path: Path) -> None:
    """Draw the windows in which most blocks of the backbone attend."""
    count = model.config.backbone_config.num_windows
    sides = torch.tensor([*image.size, *image.size])
    cells = [(x / count, y / count, (x + 1) / count, (y + 1) / count) for y in range(count) for x in range(count)]
    figure, axes = plt.subplots(1, 2, figsize=(_WIDTH_INCHES, 3.6), layout="constrained")
    names = [f"window {index + 1}" for index in range(count**2)]
    show(axes[0], draw_instances(image, boxes=torch.tensor(cells) * sides, labels=names), "most blocks")
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) * sides
    show(axes[1], draw_instances(image, boxes=whole, labels=["all tokens"]), "the other blocks")
    save(figure, path)


def draw_proposals(model: Any, image: Image.Image, levels: list[Tensor], path: Path) -> None:
    """Draw the highest class score of each token, and the best proposals."""
    shapes = [tuple(level.shape[-2:]) for level in levels]
    memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    anchors, invalid = encoder_proposals(shapes, None, memory.device)
    _, logits, _ = model.transformer.predict_proposals(memory, anchors, group=0)
    _, _, proposals, _ = model.transformer.select_two_stage_proposals(memory, anchors, invalid, num_groups=1)
    height, width = shapes[0]
    scores = logits[0, : height * width].amax(-1).sigmoid().unflatten(0, (height, width))
    boxes = box_cxcywh_to_xyxy(proposals[0, :_NUM_PROPOSALS]) * torch.tensor([*image.size, *image.size])
    figure, axes = plt.subplots(1, 2, figsize=(_WIDTH_INCHES, 3.6), layout="constrained")
    show(axes[0], scores, "score of each token")
    show(axes[1], draw_instances(image, boxes=boxes), f"the {_NUM_PROPOSALS} best proposals")
    save(figure, path)


def draw_queries(model: Any, image: Image.Image, pixels: Tensor, path: Path) -> None:
    """Draw the points at which the best query of each of three classes samples the memory, and its mask."""
    points: list[tuple[Tensor, Tensor]] = []
    layer = model.transformer.decoder.layers[-1].cross_attn
    hook = layer.register_forward_hook(
        lambda module, inputs, outputs: points.append((module.sampling_locations(*inputs[:2]), outputs[1]))
    )
    outputs = model(pixels, output_attentions=True)
    hook.remove()
    [(locations, weights)] = points
    scores, query_of = outputs.logits[0].sigmoid().max(0)
    best = scores.topk(3).indices.tolist()
    width, height = image.size
    figure, axes = plt.subplots(2, 3, figsize=(_WIDTH_INCHES, 4.8), layout="constrained")
    for column, label in enumerate(best):
        query = query_of[label].item()
        show(axes[0, column], image, f"{model.config.id2label[label]}: points")
        xy = locations[0, query].reshape(-1, 2) * torch.tensor([width, height])
        color = [part / 255 for part in color_of(column)]
        axes[0, column].scatter(*xy.T, s=150 * weights[0, query].flatten(), color=color, edgecolor="black")
        axes[0, column].set(xlim=(0, width), ylim=(height, 0))
        show(axes[1, column], outputs.pred_masks[0, query].sigmoid(), "mask", vmin=0, vmax=1)
    save(figure, path)


@torch.no_grad()
def main(output: str) -> None:
    """Draw the figures into the folder `output`."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = load("rf-detr-seg-tiny")
    image = Image.open(sample_image()).convert("RGB")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    backbone = model.backbone[0]
    levels = backbone.projector(backbone.encoder["encoder"](pixels))
    draw_windows(model, image, folder / "windows.png")
    draw_proposals(model, image, levels, folder / "proposals.png")
    draw_queries(model, image, pixels, folder / "queries.png")


if __name__ == "__main__":
    main(sys.argv[1])
