"""The exponential moving average (EMA) of the trainable weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed import copy_full_tensor, full_tensor, local_shard


class WeightAverage:
    """An exponential moving average of the trainable weights, in float32.

    Update t moves the average by 1 - d_t towards the weights, with d_t = decay (1 - exp(-t / tau)). The first update
    copies the weights, as rfdetr's EMA callback does. Frozen weights are not part of the average.

    Args:
        model: The model. If FSDP version 2 shards its parameters, the average is sharded in the same way.
        decay: Limit of d_t, in [0, 1).
        tau: Number of updates after which d_t has reached 63 % of `decay`; 0 for a constant d_t.
    """

    def __init__(self, model: nn.Module, decay: float = 0.993, tau: float = 100.0) -> None:
        self.decay, self.tau = decay, tau
        self.num_updates = 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights, after an optimizer step."""
        self.num_updates += 1
        decay = self.decay * (1 - math.exp(-self.num_updates / self.tau)) if self.tau else self.decay
        if self.num_updates == 1:
            decay = 0.0
        average = [local_shard(tensor) for tensor in self._average.values()]
        weights = [local_shard(parameter.detach()).float() for parameter in self._parameters.values()]
        torch._foreach_mul_(average, decay)
        torch._foreach_add_(average, weights, alpha=1.0 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the model's weights by the average."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._average[name])

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Replace the model's weights by the average inside the block, and restore them bit for bit after it."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average as full tensors by parameter name. All processes must call it if weights are sharded."""
        return {name: full_tensor(tensor).clone() for name, tensor in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Continue from a [`state_dict`]. A parameter that it lacks continues from the model's weights.

        Args:
            state: Full tensors by parameter name.
            num_updates: Number of updates that went into them.
        """
        self.num_updates = num_updates
        for name, tensor in self._average.items():
            copy_full_tensor(tensor, state[name] if name in state else full_tensor(self._parameters[name]))
