"""Learning rates by depth, the step schedule, and the image sizes of multi-scale training, as rfdetr sets them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

_ENCODER, _DECODER = "backbone.0.encoder.", "transformer.decoder."
# Of the encoder, parameters with one of these in their names are not decayed. LayerScale's `lambda1` is.
_NOT_DECAYED = ("gamma", "pos_embed", "rel_pos", "bias", "norm", "embeddings")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    learning_rate_encoder: float,
    layer_decay: float,
    component_decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay, as rfdetr's `get_param_dict` sets them.

    With n = 1 + the last tap's number, block i of DINOv2 learns at `learning_rate_encoder` x `layer_decay`^(n - i) x
    `component_decay`^2, its embeddings as a block -1, its last norm at i = n. The decoder learns at `learning_rate` x
    `component_decay`, everything else (projector, first stage, heads, query tables, LoRA) at `learning_rate`.

    Args:
        model: A model with rfdetr's parameter names, which a wrapper may prefix, and a configuration.
        learning_rate: Rate of projector, first stage, heads and query tables.
        learning_rate_encoder: Rate of DINOv2 after its last block, before `component_decay`.
        layer_decay: Factor from a block of DINOv2 to the one before it.
        component_decay: Factor of the decoder's rate; its square is that of DINOv2's.
        weight_decay: Weight decay, except of biases, norms, positions and the patch embedding of DINOv2.

    Returns:
        Groups for an optimizer, with `params`, `lr` and `weight_decay`.
    """
    last = max(model.config.backbone_config.out_indices) + 1
    # The first group's rate is the one that transformers logs.
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(learning_rate, weight_decay): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay = learning_rate, weight_decay
        if _ENCODER in name and ".lora_" not in name:
            rate = learning_rate_encoder * layer_decay ** (last - _encoder_block(name, last)) * component_decay**2
            decay = 0.0 if any(part in name for part in _NOT_DECAYED) else weight_decay
        elif _DECODER in name:
            rate = learning_rate * component_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items() if params]


def _encoder_block(name: str, last: int) -> int:
    """Return the index of the block that has a parameter of DINOv2: -1 before the first, `last` after all."""
    if ".layer." in name:
        return int(name.split(".layer.")[1].split(".")[0])
    return -1 if ".embeddings." in name else last


def step_schedule(warmup_steps: int, drop_step: float) -> Callable[[int], float]:
    """Return a function from step to factor of the learning rates: linear warm-up, 1, and 0.1 from `drop_step` on."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return 1.0 if step < drop_step else 0.1

    return factor


def training_sizes(size: tuple[int, int], block: int) -> list[tuple[int, int]]:
    """Return the sizes (height, width) that training draws from, the smallest first.

    The shorter side has up to 5 blocks more or less than that of `size`, and at least 2; the longer side follows the
    aspect ratio.

    Args:
        size: (height, width) of prediction.
        block: Patch size x windows; sides are multiples of it.
    """
    short = min(size) // block
    scales = [blocks / short for blocks in range(max(2, short - 5), short + 6)]
    return [(round(size[0] * scale / block) * block, round(size[1] * scale / block) * block) for scale in scales]


def resize_batch(inputs: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Resize pixels (B, 3, H, W) and their mask (B, H, W). Boxes are relative to the size, and masks may have any."""
    resized = dict(inputs)
    pixels = inputs["pixel_values"]
    resized["pixel_values"] = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    if inputs.get("pixel_mask") is not None:
        mask = F.interpolate(inputs["pixel_mask"][:, None].float(), size, mode="nearest")
        resized["pixel_mask"] = mask[:, 0].to(inputs["pixel_mask"].dtype)
    return resized
