"""Layers with the initial weights of the paper, which each sets in `reset_parameters`."""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module only computes with its weights, so that they may be used without calling it.

    A hook must fire, and an adapter, a quantizer, pruning or offloading must act: then the module has to be called.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


def first_rows(embedding: nn.Module, count: int, device: torch.device) -> Tensor:
    """Return the first `count` rows of an embedding, (count, D)."""
    if is_plain(embedding, nn.Embedding) or is_plain(embedding, ZeroEmbedding):
        return embedding.weight[:count]
    return embedding(torch.arange(count, device=device))


class XavierLinear(nn.Linear):
    """A linear layer with Xavier weights and the bias of `nn.Linear`."""

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class ZeroBiasXavierLinear(XavierLinear):
    """A projection before or after attention: Xavier weights and a zero bias."""

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: box deltas and attention weights."""

    def reset_parameters(self) -> None:
        """Set the initial weights."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroEmbedding(nn.Embedding):
    """An embedding that starts at zero: the learned part of the reference boxes."""

    def reset_parameters(self) -> None:
        """Set the initial weights."""
        nn.init.zeros_(self.weight)


class ClassHead(nn.Linear):
    """The class head: every class starts with a probability of 1 % (https://arxiv.org/abs/1708.02002)."""

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        super().reset_parameters()
        nn.init.constant_(self.bias, -math.log(99.0))


class SamplingOffsets(nn.Linear):
    """Offsets of deformable attention: head m starts in a direction of its own, its point k at distance k."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        self.shape = (num_heads, num_levels, num_points, 2)
        super().__init__(width, math.prod(self.shape))

    def reset_parameters(self) -> None:
        """Set the initial weights."""
        num_heads, _, num_points, _ = self.shape
        angles = torch.arange(num_heads, dtype=torch.float32) * (2.0 * math.pi / num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, num_points + 1, dtype=torch.float32)
        offsets = (directions[:, None, None] * distances[:, None]).expand(self.shape)
        nn.init.zeros_(self.weight)
        init.copy_(self.bias, offsets.reshape(-1))


class GroupHeads(nn.Module):
    """The same head for each query group, with weights of its own.

    It is called with the number of the group, and not a `ModuleList`, so that an adapter can replace it.
    """

    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        for group, head in enumerate(heads):
            self.add_module(str(group), head)

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def forward(self, x: Tensor, group: int) -> Tensor:
        """(..., in) -> (..., out) by the head of the group."""
        return getattr(self, str(group))(x)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def box_head(width: int) -> Mlp:
    """Create a head that predicts box deltas; its initial deltas are 0."""
    return Mlp(nn.Linear(width, width), nn.Linear(width, width), ZeroLinear(width, 4))
