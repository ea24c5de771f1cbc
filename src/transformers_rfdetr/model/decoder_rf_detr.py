"""The decoder: queries that attend to one another and to a few points of the image features around their boxes.

It is that of Deformable DETR (https://arxiv.org/abs/2010.04159), with the query groups of Group DETR
(https://arxiv.org/abs/2207.13085) and the reference boxes and their sine embedding of DAB-DETR
(https://arxiv.org/abs/2201.12329).

Axis letters: B images, G groups, Q queries of a group, D width, M heads, V feature levels, P sampling points on a
level, S tokens of all levels, H W patch grid of a level. Module names are those of the original checkpoints.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_rf_detr import RfDetrConfig
from .layers_rf_detr import Mlp, SamplingOffsets, XavierLinear, ZeroBiasXavierLinear, ZeroLinear
from .modeling_rf_detr_dinov2 import attention_weights, scaled_dot_product_attention


def sine_embedding(boxes_cxcywh: Tensor, width: int) -> Tensor:
    """Return the sine embedding of cy, cx, w and h, in this order: (..., 4) -> (..., 2·D)."""
    channels = width // 2
    exponent = torch.arange(0, channels, 2, device=boxes_cxcywh.device, dtype=boxes_cxcywh.dtype) / channels
    angles = 2 * math.pi * boxes_cxcywh[..., [1, 0, 2, 3], None] / 10000.0**exponent
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


class GroupSelfAttention(nn.Module):
    """Self-attention among the queries of each group. The parameters are those of `nn.MultiheadAttention`."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.decoder_self_attention_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.d_model, config.d_model))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.d_model))
        self.out_proj = ZeroBiasXavierLinear(config.d_model, config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(
        self, content: Tensor, position: Tensor, num_groups: int, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Content and position (B, G·Q, D) -> (B, G·Q, D), and the weights (B, G·M, Q, Q) if `need_weights`."""
        width = content.shape[-1]
        queries_and_keys = F.linear(
            content + position, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width]
        )
        values = F.linear(content, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        queries, keys, values = (  # (B·G, M, Q, D/M)
            x.unflatten(1, (num_groups, -1)).flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (*queries_and_keys.chunk(2, dim=-1), values)
        )
        dropout = self.config.dropout if self.training else 0.0
        weights = None
        if need_weights:
            # The returned tensor is the one that is used, so that gradients reach it.
            weights = attention_weights(queries, keys).unflatten(0, (-1, num_groups)).flatten(1, 2)
            group_weights = weights.unflatten(1, (num_groups, -1)).flatten(0, 1)
            context = (F.dropout(group_weights, dropout) @ values).transpose(1, 2)
        else:
            context = scaled_dot_product_attention(self, queries, keys, values, dropout)
        return self.out_proj(context.flatten(-2).unflatten(0, (-1, num_groups)).flatten(1, 2)), weights


class DeformableAttention(nn.Module):
    """Each query attends to P points on each level, around its reference box (https://arxiv.org/abs/2010.04159)."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width, num_levels = config.d_model, len(config.projector_scale)
        self.num_heads, self.num_levels = config.decoder_cross_attention_heads, num_levels
        self.num_points = config.decoder_n_points
        self.sampling_offsets = SamplingOffsets(width, self.num_heads, num_levels, self.num_points)
        self.attention_weights = ZeroLinear(width, self.num_heads * num_levels * self.num_points)
        self.value_proj = ZeroBiasXavierLinear(width, width)
        self.output_proj = ZeroBiasXavierLinear(width, width)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sample the memory around the references.

        Args:
            queries: (B, G·Q, D).
            references: (B, G·Q, V, 4), the box on each level; V may be 1, for the same box on all levels.
            memory: (B, S, D), the levels one after the other, each in row-major order.
            shapes: (H, W) of each level.
            padding: bool (B, S), True = padding, which counts as 0; or None.

        Returns:
            The context (B, G·Q, D), and the weights of the points (B, G·Q, M, V, P).
        """
        values = self.value_proj(memory)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0.0)
        locations = self.sampling_locations(queries, references)
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1)).float().softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        sampled = sample_values(values, locations, shapes)
        weighted = sampled * weights.flatten(-2).transpose(1, 2).flatten(0, 1)[:, None]  # (B·M, D/M, G·Q, V·P)
        context = weighted.sum(-1).unflatten(0, (-1, self.num_heads)).flatten(1, 2).transpose(1, 2)
        return self.output_proj(context.to(queries.dtype)), weights

    def sampling_locations(self, queries: Tensor, references: Tensor) -> Tensor:
        """Queries (B, G·Q, D) and references (B, G·Q, V, 4) -> (x, y) in [0, 1] on each level, (B, G·Q, M, V, P, 2).

        A learned offset of P reaches half the box's size.
        """
        shape = (self.num_heads, self.num_levels, self.num_points, 2)
        offsets = self.sampling_offsets(queries).unflatten(-1, shape).float()
        boxes = references[:, :, None, :, None]
        return boxes[..., :2] + offsets / self.num_points * boxes[..., 2:] * 0.5


def sample_values(values: Tensor, locations: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Interpolate `values` (B, S, D) at `locations` (B, G·Q, M, V, P, 2), in float32: -> (B·M, D/M, G·Q, V·P).

    Head m reads the m-th part of the channels. Locations outside a level are 0.
    """
    num_heads = locations.shape[2]
    grids = (2.0 * locations - 1.0).transpose(1, 2).flatten(0, 1)  # (B·M, G·Q, V, P, 2)
    maps = values.float().transpose(1, 2).unflatten(1, (num_heads, -1)).flatten(0, 1)  # (B·M, D/M, S)
    levels = maps.split([height * width for height, width in shapes], -1)
    sampled = [
        F.grid_sample(level.unflatten(-1, shape), grids[:, :, index], padding_mode="zeros", align_corners=False)
        for index, (level, shape) in enumerate(zip(levels, shapes, strict=True))
    ]
    return torch.cat(sampled, dim=-1)


class RfDetrDecoderLayer(GradientCheckpointingLayer):
    """One post-norm layer: self-attention, deformable cross-attention, feed-forward network."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.dropout = config.dropout
        self.self_attn = GroupSelfAttention(config)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = DeformableAttention(config)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = XavierLinear(width, config.decoder_ffn_dim)
        self.linear2 = XavierLinear(config.decoder_ffn_dim, width)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor | None,
        num_groups: int,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Content (B, G·Q, D) -> content, and the weights of both attentions; see them for the other arguments."""
        context, self_weights = self.self_attn(content, position, num_groups, need_weights)
        content = self.norm1(content + self._drop(context))
        context, cross_weights = self.cross_attn(content + position, references, memory, shapes, padding)
        content = self.norm2(content + self._drop(context))
        hidden = self.linear2(self._drop(F.relu(self.linear1(content))))
        return self.norm3(content + self._drop(hidden)), self_weights, cross_weights

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class RfDetrDecoder(nn.Module):
    """The layers, the norm before the heads, and the network that embeds the reference boxes."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.layers = nn.ModuleList(RfDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.ref_point_head = Mlp(XavierLinear(2 * width, width), XavierLinear(width, width))
