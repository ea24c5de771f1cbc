"""RF-DETR's recipe: learning rates by depth, the step schedule, the scales of training, the average of the weights."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """The trainable parameters, grouped by learning rate and weight decay as rfdetr's `get_param_dict` sets them.

    With n = 1 + the last tap's number, block i of DINOv2 learns at `learning_rate_encoder` x `layer_decay`^(n - i) x
    `component_decay`^2, its embeddings as a block -1, its last norm at i = n. The decoder learns at `learning_rate` x
    `component_decay`, everything else (projector, first stage, heads, query tables) at `learning_rate`.

    Args:
        model: Has the original's parameter names, also behind the prefix of a wrapper, and a configuration.
        learning_rate: Of projector, first stage, heads and query tables.
        learning_rate_encoder: Of DINOv2 after its last block, before `component_decay`.
        layer_decay: Factor from a block of DINOv2 to the one before it.
        component_decay: Factor of the decoder, and twice of DINOv2.
        weight_decay: Of everything but biases, norms, positions and the patch embedding of DINOv2.

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
        if _ENCODER in name:
            rate = learning_rate_encoder * layer_decay ** (last - _encoder_block(name, last)) * component_decay**2
            decay = 0.0 if any(part in name for part in _NOT_DECAYED) else weight_decay
        elif _DECODER in name:
            rate = learning_rate * component_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items() if params]


def _encoder_block(name: str, last: int) -> int:
    """The number of the block that a parameter of DINOv2 stands in: -1 before the first, `last` after all."""
    if ".layer." in name:
        return int(name.split(".layer.")[1].split(".")[0])
    return -1 if ".embeddings." in name else last


def step_schedule(warmup_steps: int, drop_step: float) -> Callable[[int], float]:
    """The factor of the learning rates at a step: linear warm-up, 1, and a tenth from `drop_step` on."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return 1.0 if step < drop_step else 0.1

    return factor


def training_sizes(size: tuple[int, int], block: int) -> list[tuple[int, int]]:
    """The sizes (height, width) that training draws from, smallest first: up to 5 blocks more or less, at least 2.

    Args:
        size: (height, width) of prediction.
        block: Pixels of a patch x windows, of which sides are multiples.

    Returns:
        Of a rectangle the shorter side goes in steps of a block, and the longer one follows the aspect ratio.
    """
    short = min(size) // block
    scales = [blocks / short for blocks in range(max(2, short - 5), short + 6)]
    return [(round(size[0] * scale / block) * block, round(size[1] * scale / block) * block) for scale in scales]


def resize_batch(inputs: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Pixels (B, 3, H, W) and their mask (B, H, W) at another size. Labels are fractions of it, and masks any size."""
    resized = dict(inputs)
    pixels = inputs["pixel_values"]
    resized["pixel_values"] = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    if inputs.get("pixel_mask") is not None:
        mask = F.interpolate(inputs["pixel_mask"][:, None].float(), size, mode="nearest")
        resized["pixel_mask"] = mask[:, 0].to(inputs["pixel_mask"].dtype)
    return resized


class WeightAverage:
    """An exponential moving average of the trainable weights, in float32.

    Update t moves it by 1 - d_t towards the weights, d_t = decay (1 - exp(-t / tau)); the first one copies them
    (rfdetr's EMA callback). Weights that are not trained are the model's own.

    Args:
        model: The model; under FSDP version 2 its parameters are shards, and so is the average.
        decay: d of many updates, in [0, 1).
        tau: Updates after which d has reached 63 % of `decay`; 0 for a constant d.
    """

    def __init__(self, model: nn.Module, decay: float = 0.993, tau: float = 100.0) -> None:
        self.decay, self.tau = decay, tau
        self.num_updates = 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        self.num_updates += 1
        decay = self.decay * (1 - math.exp(-self.num_updates / self.tau)) if self.tau else self.decay
        if self.num_updates == 1:
            decay = 0.0
        average = [_local(tensor) for tensor in self._average.values()]
        weights = [_local(parameter.detach()).float() for parameter in self._parameters.values()]
        torch._foreach_mul_(average, decay)
        torch._foreach_add_(average, weights, alpha=1.0 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Put the average into the model for good."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._average[name])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model holds the average inside, and gets its weights back bit for bit."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average by the names of the parameters; see [`full_tensor`]."""
        return {name: full_tensor(tensor).clone() for name, tensor in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Continue from a [`state_dict`]; a parameter that it does not hold goes on from the model's.

        Args:
            state: Whole tensors.
            num_updates: Updates that went into them.
        """
        self.num_updates = num_updates
        for name, tensor in self._average.items():
            copy_full_tensor(tensor, state[name] if name in state else full_tensor(self._parameters[name]))


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded by FSDP version 2; a collective then."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_full_tensor(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor that may be sharded from all of its values."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def _local(tensor: Tensor) -> Tensor:
    """A sharded tensor's own shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
