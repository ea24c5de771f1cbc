"""RF-DETR (https://arxiv.org/abs/2511.09554): features, proposals, decoder, boxes, classes, masks, as the data flows.

Axes: B images, G groups, Q queries of a group, K proposals kept of a group (K = min(Q, S)), S tokens of all levels,
D width, C classes, L decoder layers, H W patch grid, h w mask grid, V feature levels, M heads, P sampling points.
Boxes are (cx, cy, w, h) as fractions of the input picture, unbounded, and float32 whatever the model's dtype:
bfloat16 would round them to two pixels of 432.

In training all G groups run side by side, with first-stage heads of their own; inference runs the first.
Module names are those of the original checkpoints: the state dict is the file.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .checkpoint_layouts import RfDetrCheckpoint
from .configuration_rf_detr import PROJECTOR_SCALES, RfDetrConfig
from .loss_rf_detr import (
    LossWeights,
    MaskFactors,
    StagePrediction,
    fixed_points,
    random_points,
    rf_detr_loss,
)
from .modeling_rf_detr_dinov2 import RfDetrDinov2Backbone, checkpointed, scaled_dot_product_attention
from .variants_rf_detr import is_background_label

# -- outputs ---------------------------------------------------------------------------------------------------------

# Of a label that is not looked for: a score of 0, and finite in half precision.
BACKGROUND_LOGIT = -1e4


@dataclass
class RfDetrOutput(ModelOutput):
    """What the models return; each fills the fields that it has. In training N = G·Q rows, else N = Q.

    Attributes:
        loss: float32 scalar, if labels were given.
        loss_dict: its parts; see [`rf_detr_loss`].
        logits: (B, N, C), class logits. There is no background class.
        pred_boxes: (B, N, 4) float32, (cx, cy, w, h) as fractions of the input picture.
        pred_masks: (B, N, h, w), mask logits on a grid of 1/4 of the input. None in a training step, whose masks stay
            factored.
        last_hidden_state: (B, N, D), the last decoder layer's queries, normalised.
        intermediate_hidden_states: (B, L, N, D), the same of every layer.
        init_reference_points: (B, N, 4), the boxes that every layer refines.
        backbone_features: (B, D, H, W), the finest projector level.
        enc_hidden_states: (B, G·K, D), tokens that the first stage chose.
        enc_outputs_class: (B, G·K, C), their class logits.
        enc_outputs_coord: (B, G·K, 4), their boxes.
        enc_indices: (B, G·K) int64, which tokens they are.
        hidden_states: L + 1 of (B, N, D), queries before the first layer and after each, not normalised.
        attentions: L of (B, G·M, Q, Q), self-attention weights.
        cross_attentions: L of (B, N, M, V, P), weights of the deformable attention's points.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    init_reference_points: Tensor | None = None
    backbone_features: Tensor | None = None
    enc_hidden_states: Tensor | None = None
    enc_outputs_class: Tensor | None = None
    enc_outputs_coord: Tensor | None = None
    enc_indices: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


# -- leaves, each of which knows how it starts -----------------------------------------------------------------------


class XavierLinear(nn.Linear):
    """A linear layer of the transformer: Xavier weights; its bias starts as any linear layer's."""

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)


class ZeroBiasXavierLinear(XavierLinear):
    """The same with a zero bias: projections around an attention."""

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: box deltas and attention weights."""

    def reset_parameters(self) -> None:
        """Set initial weights."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ClassLogits(nn.Linear):
    """The class head: every class starts with a probability of 1 % (https://arxiv.org/abs/1708.02002)."""

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        super().reset_parameters()
        nn.init.constant_(self.bias, -math.log(99.0))


class SamplingOffsets(nn.Linear):
    """Offsets of deformable attention: head m starts looking along its own direction, point k at distance k."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        self.shape = (num_heads, num_levels, num_points, 2)
        super().__init__(width, math.prod(self.shape))

    def reset_parameters(self) -> None:
        """Set initial weights."""
        num_heads, _, num_points, _ = self.shape
        angles = torch.arange(num_heads, dtype=torch.float32) * (2.0 * math.pi / num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, num_points + 1, dtype=torch.float32)
        ring = (directions[:, None, None] * distances[:, None]).expand(self.shape)
        nn.init.zeros_(self.weight)
        init.copy_(self.bias, ring.reshape(-1))


class ZeroEmbedding(nn.Embedding):
    """A table that starts at zero: the learned part of the references."""

    def reset_parameters(self) -> None:
        """Set initial weights."""
        nn.init.zeros_(self.weight)


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
    """The head that predicts box deltas: it starts by predicting none."""
    return Mlp(nn.Linear(width, width), nn.Linear(width, width), ZeroLinear(width, 4))


# -- box arithmetic --------------------------------------------------------------------------------------------------


def apply_deltas(deltas: Tensor, boxes: Tensor) -> Tensor:
    """Move boxes by a fraction of their size and scale them: (dx, dy) w h + (cx, cy), exp(dw, dh) w h, in float32."""
    deltas = deltas.float()
    size = boxes[..., 2:]
    return torch.cat([deltas[..., :2] * size + boxes[..., :2], deltas[..., 2:].exp() * size], dim=-1)


def sine_embedding(boxes: Tensor, width: int) -> Tensor:
    """Sine embedding of the four box numbers, in the order cy, cx, w, h: (..., 4) -> (..., 2·D)."""
    channels = width // 2
    exponent = torch.arange(0, channels, 2, device=boxes.device, dtype=boxes.dtype) / channels
    angles = 2 * math.pi * boxes[..., [1, 0, 2, 3], None] / 10000.0**exponent
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


# -- projector -------------------------------------------------------------------------------------------------------


class ConvNormAct(nn.Module):
    """Convolution without bias, channel layer norm (called `bn` in the checkpoints), activation."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, activation: Callable = F.silu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = ChannelLayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H / stride, W / stride)."""
        return self.activation(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3 x 3 convolutions, without a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNormAct(channels, channels, 3)
        self.cv2 = ConvNormAct(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Split in two halves, chain three bottlenecks on the second, fuse all five pieces (the C2f block of YOLOv8)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.cv1 = ConvNormAct(in_channels, 2 * half, 1)
        self.cv2 = ConvNormAct(5 * half, out_channels, 1)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        pieces = list(self.cv1(x).chunk(2, dim=1))
        for bottleneck in self.m:
            pieces.append(bottleneck(pieces[-1]))
        return self.cv2(torch.cat(pieces, dim=1))


class RfDetrProjector(nn.Module):
    """Taps of the backbone to feature levels of width D: each tap resampled, all of them fused."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width, num_taps = config.backbone_config.hidden_size, len(config.backbone_config.out_indices)
        scales = [PROJECTOR_SCALES[level] for level in config.projector_scale]
        self.stages_sampling = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*self._resampler(width, scale)) for _ in range(num_taps)) for scale in scales
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                C2f(num_taps * (width // 2 if scale > 1 else width), config.d_model), ChannelLayerNorm(config.d_model)
            )
            for scale in scales
        )

    @staticmethod
    def _resampler(width: int, scale: float) -> list[nn.Module]:
        if scale == 2.0:
            return [nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)]
        if scale == 0.5:
            return [ConvNormAct(width, width, 3, stride=2, activation=F.relu)]  # as in the original, unlike the rest
        return []

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Taps (B, C, H, W) -> a level (B, D, H·scale, W·scale) for each scale, fine to coarse."""
        return [
            stage(torch.cat([resample(tap) for resample, tap in zip(resamplers, taps, strict=True)], dim=1))
            for resamplers, stage in zip(self.stages_sampling, self.stages, strict=True)
        ]


class RfDetrBackbone(nn.Module):
    """DINOv2 and the projector."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"encoder": RfDetrDinov2Backbone(config.backbone_config, config)})
        self.projector = RfDetrProjector(config)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Pixels (B, 3, height, width) -> feature levels (B, D, H, W), fine to coarse."""
        return self.projector(self.encoder["encoder"](pixel_values))


# -- padding ---------------------------------------------------------------------------------------------------------


def level_paddings(pixel_mask: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Where each level shows padding: `pixel_mask` (B, height, width), 1 = real -> bool (B, H, W), True = padding."""
    real = pixel_mask[:, None].float()
    return [F.interpolate(real, size=level.shape[-2:], mode="nearest")[:, 0] == 0 for level in levels]


def valid_ratios(paddings: Sequence[Tensor]) -> Tensor:
    """The part of each level that is picture: (B, V, 4) as (width, height, width, height)."""
    ratios = [torch.stack([(~pad[:, 0]).float().mean(-1), (~pad[:, :, 0]).float().mean(-1)], -1) for pad in paddings]
    return torch.stack(ratios, dim=1).repeat(1, 1, 2)


def encoder_proposals(shapes: Sequence[tuple[int, int]], paddings: Sequence[Tensor] | None, device: Any) -> tuple:
    """A box around each token's centre, as a fraction of the unpadded picture, of 5 % at the first level, then 10 %.

    Returns:
        Boxes (B or 1, S, 4), and which are invalid, bool (B or 1, S, 1): padding, or a number outside (0.01, 0.99).
        The boxes of invalid tokens are 0.
    """
    boxes = []
    for level, (height, width) in enumerate(shapes):
        y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
        if paddings is None:
            y, x = y[None] / height, x[None] / width
        else:
            y = y / (~paddings[level][:, :, 0]).sum(-1, keepdim=True)
            x = x / (~paddings[level][:, 0]).sum(-1, keepdim=True)
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
        size = torch.full_like(grid, 0.05 * 2**level)
        boxes.append(torch.cat([grid, size], dim=-1).flatten(1, 2))
    anchors = torch.cat(boxes, dim=1)
    invalid = ~((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    if paddings is not None:
        invalid = invalid | torch.cat([pad.flatten(1) for pad in paddings], dim=1)[..., None]
    return anchors.masked_fill(invalid, 0.0), invalid


# -- decoder ---------------------------------------------------------------------------------------------------------


class GroupSelfAttention(nn.Module):
    """Self-attention among the queries of a group; groups never see each other. Parameters as nn.MultiheadAttention."""

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
        """Draw initial weights."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)

    def forward(
        self, content: Tensor, position: Tensor, num_groups: int, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Contents and positions (B, G·Q, D) -> (B, G·Q, D), and weights (B, G·M, Q, Q) if asked for."""
        width = content.shape[-1]
        located = F.linear(content + position, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width])
        values = F.linear(content, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        queries, keys, values = (
            rows.unflatten(1, (num_groups, -1)).flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for rows in (*located.chunk(2, dim=-1), values)
        )
        dropout = self.config.dropout if self.training else 0.0
        context, weights = scaled_dot_product_attention(self, queries, keys, values, dropout, need_weights)
        context = context.flatten(-2).unflatten(0, (-1, num_groups)).flatten(1, 2)
        if weights is not None:
            weights = weights.unflatten(0, (-1, num_groups)).flatten(1, 2)
        return self.out_proj(context), weights


class DeformableAttention(nn.Module):
    """Each query looks at a few points around its box, on every level (https://arxiv.org/abs/2010.04159)."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width, num_levels = config.d_model, len(config.projector_scale)
        self.num_heads, self.num_points = config.decoder_cross_attention_heads, config.decoder_n_points
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
            queries: (B, N, D).
            references: (B, N, V, 4), the box on each level; V may be 1, for the same one on all.
            memory: (B, S, D), all levels one after the other, row-major.
            shapes: (H, W) of each level.
            padding: bool (B, S), True = not to be seen; or None.

        Returns:
            (B, N, D), and the weights (B, N, M, V, P) of the points.
        """
        values = self.value_proj(memory)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0.0)
        offsets = self.sampling_offsets(queries).unflatten(-1, self.sampling_offsets.shape).float()
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1)).float().softmax(-1)
        # (B, N, M, V, P, 2): a learned offset of 1 reaches half the box's size, divided by the number of points.
        boxes = references[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / self.num_points * boxes[..., 2:] * 0.5
        grids = (2.0 * locations - 1.0).transpose(1, 2).flatten(0, 1)  # (B·M, N, V, P, 2)
        maps = values.float().transpose(1, 2).unflatten(1, (self.num_heads, -1)).flatten(0, 1)  # (B·M, D/M, S)
        sampled = [
            F.grid_sample(level.unflatten(-1, shape), grids[:, :, index], padding_mode="zeros", align_corners=False)
            for index, (level, shape) in enumerate(zip(maps.split([h * w for h, w in shapes], -1), shapes, strict=True))
        ]
        mixed = torch.cat(sampled, dim=-1) * weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B·M, D/M, N, V·P)
        context = mixed.sum(-1).unflatten(0, (-1, self.num_heads)).flatten(1, 2).transpose(1, 2)
        return self.output_proj(context.to(queries.dtype)), weights.unflatten(-1, (len(shapes), -1))


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
        """Contents (B, G·Q, D) -> contents, and the weights of both attentions."""
        drop = lambda x: F.dropout(x, self.dropout, self.training)  # noqa: E731
        update, attention = self.self_attn(content, position, num_groups, need_weights)
        content = self.norm1(content + drop(update))
        update, cross_attention = self.cross_attn(content + position, references, memory, shapes, padding)
        content = self.norm2(content + drop(update))
        update = self.linear2(drop(F.relu(self.linear1(content))))
        return self.norm3(content + drop(update)), attention, cross_attention


class RfDetrDecoder(nn.Module):
    """The layers, the norm that the heads look through, and the embedding of the references."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.layers = nn.ModuleList(RfDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.ref_point_head = Mlp(XavierLinear(2 * width, width), XavierLinear(width, width))


class RfDetrTransformer(nn.Module):
    """First stage (a head of its own for each group) and decoder."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width, groups = config.d_model, range(config.group_detr)
        self.num_queries = config.num_queries
        self.decoder = RfDetrDecoder(config)
        self.enc_output = nn.ModuleList(XavierLinear(width, width) for _ in groups)
        self.enc_output_norm = nn.ModuleList(nn.LayerNorm(width) for _ in groups)
        self.enc_out_class_embed = nn.ModuleList(ClassLogits(width, config.num_labels) for _ in groups)
        self.enc_out_bbox_embed = nn.ModuleList(box_head(width) for _ in groups)

    def select_two_stage_proposals(
        self, memory: Tensor, anchors: Tensor, invalid: Tensor, num_groups: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each group chooses its K best tokens.

        Args:
            memory: (B, S, D).
            anchors: (B or 1, S, 4), each token's box.
            invalid: bool (B or 1, S, 1). These tokens are zeroed, but may be chosen, as in the original.
            num_groups: G.

        Returns:
            Chosen tokens (B, G·K, D), their class logits (B, G·K, C), their refined boxes (B, G·K, 4), and which of the
            S they are (B, G·K).
        """
        memory = memory.masked_fill(invalid, 0.0)
        anchors = anchors.expand(memory.shape[0], -1, -1)
        kept = min(self.num_queries, memory.shape[1])
        stages = []
        for group in range(num_groups):
            embed, classify = self.enc_output[group], self.enc_out_class_embed[group]
            tokens = self.enc_output_norm[group](embed(memory))
            best = torch.topk(classify(tokens).amax(-1), kept, dim=1).indices
            chosen, boxes = (
                rows.gather(1, best[..., None].expand(-1, -1, rows.shape[-1])) for rows in (memory, anchors)
            )
            # Once more for the chosen ones: the backward pass then keeps, and goes through, a fraction of the tokens.
            tokens = self.enc_output_norm[group](embed(chosen))
            boxes = apply_deltas(self.enc_out_bbox_embed[group](tokens), boxes)
            stages.append((tokens, classify(tokens), boxes, best))
        tokens, logits, boxes, best = (torch.cat(parts, dim=1) for parts in zip(*stages, strict=True))
        return tokens, logits, boxes, best


# -- masks -----------------------------------------------------------------------------------------------------------


class MaskBlock(GradientCheckpointingLayer):
    """Depthwise 3 x 3 convolution, layer norm, linear layer, GELU, around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        update = checkpointed(lambda x: self.pwconv1(self.norm(x)), self.dwconv(pixels).permute(0, 2, 3, 1))
        return pixels + F.gelu(update).permute(0, 3, 1, 2)


class QueryMlp(nn.Module):
    """A residual feed-forward network on the queries before they meet the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.ModuleList([nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)])

    def forward(self, queries: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden = self.norm_in(queries)
        for layer in self.layers:
            hidden = layer(hidden)
        return queries + hidden


class RfDetrSegmentationHead(nn.Module):
    """Masks as the product of pixel features, refined by one block for each decoder layer, and query vectors."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.downsample_ratio = config.mask_downsample_ratio
        self.blocks = nn.ModuleList(MaskBlock(width) for _ in range(config.decoder_layers))
        self.spatial_features_proj = nn.Conv2d(width, width, kernel_size=1)
        self.query_features_block = QueryMlp(width)
        self.query_features_proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial bias."""
        nn.init.zeros_(self.bias)

    def pixels(self, features: Tensor, image_size: tuple[int, int]) -> Iterator[Tensor]:
        """The mask grid's features before the first block and after each: (B, D, H, W) -> L + 1 of (B, D, h, w)."""
        size = (image_size[0] // self.downsample_ratio, image_size[1] // self.downsample_ratio)
        # Channels last, as the blocks' norms and linear layers need them: no block has to copy its pixels.
        features = features.contiguous(memory_format=torch.channels_last)
        pixels = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        yield pixels
        for block in self.blocks:
            pixels = block(pixels)
            yield pixels

    def project(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (..., D) -> vectors (..., D) and offsets (..., 1): a mask is <vector, pixel> + offset.

        The original projects every pixel p to W p + b and multiplies that with the query's q. As <q, W p + b> is
        <W^T q, p> + <q, b>, it is the queries that are projected here: there are fewer of them.
        """
        queries = queries.to(self.query_features_proj.weight.dtype)
        queries = self.query_features_proj(self.query_features_block(queries))
        projection = self.spatial_features_proj
        return queries @ projection.weight.flatten(1), queries @ projection.bias[:, None] + self.bias

    def factors(self, pixels: Tensor, queries: Tensor) -> MaskFactors:
        """Pixel features (B, D, h, w) and queries (B, N, D) -> their masks, factored."""
        return MaskFactors(pixels, queries, self.project)


# -- models ----------------------------------------------------------------------------------------------------------


class RfDetrPreTrainedModel(RfDetrCheckpoint):
    """What the models share with transformers: loading, saving, initial weights, capabilities."""

    config_class = RfDetrConfig
    base_model_prefix = "model"  # no such attribute: stock code then reads `model.`-prefixed files unaided
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_attention_backend = True
    _no_split_modules = ["RfDetrDinov2Layer", "RfDetrDecoderLayer"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for a phrase in the source; `attend` reads the configuration at every call

    def get_input_embeddings(self) -> None:
        """None: there is no table of tokens, which accelerate asks for before it shards a model."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Every leaf knows how it starts. torch.nn.init leaves loaded tensors alone while transformers loads a model.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def freeze_backbone(self) -> None:
        """Stop training DINOv2; the projector goes on."""
        self.backbone[0].encoder["encoder"].set_trainable(False)

    def set_drop_path(self, rate: float) -> None:
        """Set the stochastic depth of DINOv2: from 0 at the first block, evenly, to `rate` at the last."""
        self.backbone[0].encoder["encoder"].set_drop_path(rate)

    def unfreeze_backbone(self) -> None:
        """Train DINOv2 again, but for the mask token and blocks after the last tap, which nothing reads."""
        self.backbone[0].encoder["encoder"].set_trainable(True)


class RfDetrModel(RfDetrPreTrainedModel):
    """Backbone and transformer, without the final heads.

    Example:
        >>> import torch
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrModel
        >>> model = RfDetrModel(RfDetrConfig.from_variant("rf-detr-seg-nano")).eval()
        >>> model(torch.zeros(1, 3, 312, 312)).last_hidden_state.shape
        torch.Size([1, 100, 256])
    """

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__(config)
        num_rows = config.group_detr * config.num_queries
        self.backbone = nn.ModuleList([RfDetrBackbone(config)])
        self.transformer = RfDetrTransformer(config)
        self.refpoint_embed = ZeroEmbedding(num_rows, 4)
        self.query_feat = nn.Embedding(num_rows, config.d_model)
        self._add_heads(config)
        self.post_init()

    def _add_heads(self, config: RfDetrConfig) -> None:
        """Create what the task needs beyond the transformer, before the weights are initialised."""

    @property
    def num_groups(self) -> int:
        """Query groups that run: all in training, the first in evaluation."""
        return self.config.group_detr if self.training else 1

    def run(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> RfDetrOutput:
        """Pixels to decoded queries; the arguments are those of `forward`."""
        config, num_groups, decoder = self.config, self.num_groups, self.transformer.decoder
        need_weights = config.output_attentions if output_attentions is None else output_attentions
        need_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        levels = self.backbone[0](pixel_values)
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        paddings = None if pixel_mask is None else level_paddings(pixel_mask, levels)
        padding = None if paddings is None else torch.cat([pad.flatten(1) for pad in paddings], dim=1)

        anchors, invalid = encoder_proposals(shapes, paddings, memory.device)
        tokens, logits, boxes, chosen = self.transformer.select_two_stage_proposals(
            memory, anchors, invalid, num_groups
        )
        content, references = self.queries(boxes.detach(), num_groups)

        located = (
            references[:, :, None] if paddings is None else references[:, :, None] * valid_ratios(paddings)[:, None]
        )
        embedding = sine_embedding(located[:, :, 0], config.d_model)
        position = decoder.ref_point_head(embedding.to(content.dtype))
        states, attentions, cross_attentions = [content], [], []
        for layer in decoder.layers:
            content, attention, cross_attention = layer(
                content, position, located, memory, shapes, padding, num_groups, need_weights
            )
            states.append(content)
            attentions.append(attention)
            cross_attentions.append(cross_attention)
        decoded = torch.stack([decoder.norm(state) for state in states[1:]], dim=1)
        return RfDetrOutput(
            last_hidden_state=decoded[:, -1],
            intermediate_hidden_states=decoded,
            init_reference_points=references,
            backbone_features=levels[0],
            enc_hidden_states=tokens,
            enc_outputs_class=logits,
            enc_outputs_coord=boxes,
            enc_indices=chosen,
            hidden_states=tuple(states) if need_states else None,
            attentions=tuple(attentions) if need_weights else None,
            cross_attentions=tuple(cross_attentions) if need_weights else None,
        )

    def queries(self, proposals: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """What the decoder starts from: learned contents (B, G·Q, D), and references (B, G·Q, 4).

        The first G·K references are the learned ones applied to the proposals (B, G·K, 4); with fewer proposals than
        queries the others are the learned numbers themselves, as in the original.
        """
        batch, rows = proposals.shape[0], num_groups * self.config.num_queries
        learned = self.refpoint_embed.weight[:rows].float().expand(batch, -1, -1)
        references = apply_deltas(learned[:, : proposals.shape[1]], proposals)
        references = torch.cat([references, learned[:, proposals.shape[1] :]], dim=1)
        # A copy: of a view of a parameter, taken under no_grad, torch's FLOP counter expects a gradient function.
        return self.query_feat.weight[:rows].repeat(batch, 1, 1), references

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> RfDetrOutput:
        """Pixels to decoded queries; with `return_dict=False` as a tuple.

        Args:
            pixel_values: (B, 3, height, width), normalised; each side a multiple of patch size x windows.
            pixel_mask: (B, height, width), 1 = picture, 0 = padding. All ones is the same as None.
            output_attentions: Return the attention weights, which needs the eager attention formula.
            output_hidden_states: Return the decoder's states.

        Raises:
            ValueError: if the picture's size does not tile, with the nearest legal sizes.
        """
        return self.run(pixel_values, drop_full_mask(pixel_mask), output_attentions, output_hidden_states)


def drop_full_mask(pixel_mask: Tensor | None) -> Tensor | None:
    """None for a mask of ones: without padding there is nothing to do. A traced graph keeps its mask."""
    if pixel_mask is None or (not torch.compiler.is_compiling() and bool(pixel_mask.all())):
        return None
    return pixel_mask


class RfDetrForObjectDetection(RfDetrModel):
    """RF-DETR with class and box heads.

    Example:
        >>> import torch
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForObjectDetection
        >>> model = RfDetrForObjectDetection(RfDetrConfig.from_variant("rf-detr-nano")).eval()
        >>> outputs = model(torch.zeros(1, 3, 384, 384))
        >>> outputs.logits.shape, outputs.pred_boxes.shape
        (torch.Size([1, 300, 91]), torch.Size([1, 300, 4]))
    """

    def _add_heads(self, config: RfDetrConfig) -> None:
        self.class_embed = ClassLogits(config.d_model, config.num_labels)
        self.bbox_embed = box_head(config.d_model)

    def last_stage(self, base: RfDetrOutput, image_size: tuple[int, int]) -> StagePrediction:
        """What the last decoder layer predicts: all that a result needs."""
        hidden = base.last_hidden_state
        return StagePrediction(
            self.class_embed(hidden), apply_deltas(self.bbox_embed(hidden), base.init_reference_points)
        )

    def stages(self, base: RfDetrOutput, image_size: tuple[int, int]) -> dict[str, StagePrediction]:
        """What each supervised stage predicts, by the suffix of its losses; see [`rf_detr_loss`]."""
        hidden = base.intermediate_hidden_states
        logits = self.class_embed(hidden)
        boxes = apply_deltas(self.bbox_embed(hidden), base.init_reference_points[:, None])
        last = hidden.shape[1] - 1
        stages = {"": StagePrediction(logits[:, last], boxes[:, last])}
        if self.config.auxiliary_loss:
            stages |= {f"_{layer}": StagePrediction(logits[:, layer], boxes[:, layer]) for layer in range(last)}
        stages["_enc"] = StagePrediction(base.enc_outputs_class, base.enc_outputs_coord)
        return stages

    @torch.compiler.disable  # the solver is SciPy's
    def loss(
        self,
        stages: dict[str, StagePrediction],
        labels: list[dict[str, Tensor]],
        num_objects: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training objective: all groups and fresh points in training, one group and fixed points otherwise."""
        config = self.config
        num_boxes = None if num_objects is None else (num_objects * self.num_groups).clamp(min=1.0)
        weights = LossWeights(
            class_cost=config.class_cost,
            bbox_cost=config.bbox_cost,
            giou_cost=config.giou_cost,
            loss_ce=config.class_loss_coefficient,
            loss_bbox=config.bbox_loss_coefficient,
            loss_giou=config.giou_loss_coefficient,
            loss_mask_ce=config.mask_class_loss_coefficient,
            loss_mask_dice=config.mask_dice_loss_coefficient,
            focal_alpha=config.focal_alpha,
        )
        return rf_detr_loss(
            stages,
            labels,
            num_groups=self.num_groups,
            weights=weights,
            points=random_points if self.training else fixed_points,
            mask_point_sample_ratio=config.mask_point_sample_ratio,
            num_boxes=num_boxes,
            across_ranks=self.training,
        )

    def predict_stage(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> StagePrediction:
        """What a result is made of: the logits and boxes of the last layer, and its masks, not multiplied out."""
        base = self.run(pixel_values, drop_full_mask(pixel_mask), None, None)
        last = self.last_stage(base, (pixel_values.shape[-2], pixel_values.shape[-1]))
        return last._replace(logits=self.mask_background_logits(last.logits))

    def mask_background_logits(self, logits: Tensor) -> Tensor:
        """Very low logits where a head of rfdetr's has a row that is no class, so that no result reports it."""
        labels = [label for label, name in self.config.id2label.items() if is_background_label(name)]
        if labels:
            logits = logits.clone()
            for label in labels:
                logits[..., label] = BACKGROUND_LOGIT
        return logits

    # Outside of compiled graphs, which would be made anew for every number of objects; what it calls is compiled.
    @torch.compiler.disable(recursive=False)
    def _supervised(
        self, inputs: tuple, labels: list[dict[str, Tensor]], num_objects: Tensor | None
    ) -> tuple[RfDetrOutput, StagePrediction, Tensor, dict[str, Tensor]]:
        base = self.run(*inputs)
        stages = self.stages(base, (inputs[0].shape[-2], inputs[0].shape[-1]))
        loss, loss_dict = self.loss(stages, labels, num_objects)
        return base, stages[""], loss, loss_dict

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_objects: Tensor | None = None,
    ) -> RfDetrOutput:
        """Pixels to detections or instances, and with labels to the loss; with `return_dict=False` as a tuple.

        Args:
            pixel_values: (B, 3, height, width), normalised; each side a multiple of patch size x windows.
            pixel_mask: (B, height, width), 1 = picture, 0 = padding. All ones is the same as None.
            labels: For each image a dictionary of `class_labels`, `boxes` and, where masks are predicted, `masks`; see
                [`rf_detr_loss`].
            output_attentions: Return the attention weights, which needs the eager attention formula.
            output_hidden_states: Return the decoder's states.
            num_objects: Scalar that the losses are divided by, besides the number of groups; for batches that are
                parts of a larger one. By default the objects of the batch, in training their mean over all processes.

        Returns:
            Outside training the logits of labels such as `__background__` are -1e4: heads from rfdetr's fine-tuned
            checkpoints have rows that are no classes.

            Masks of the last layer only are multiplied out, and none in a training step. With labels the other layers
            and the first stage stay factored; without labels their masks are not computed.

        Raises:
            ValueError: if the picture's size does not tile, or a label cannot be trained on.
        """
        inputs = (pixel_values, drop_full_mask(pixel_mask), output_attentions, output_hidden_states)
        loss = loss_dict = None
        if labels is None:
            base = self.run(*inputs)
            last = self.last_stage(base, (pixel_values.shape[-2], pixel_values.shape[-1]))
        else:
            base, last, loss, loss_dict = self._supervised(inputs, labels, num_objects)
        factored = last.masks is None or (self.training and labels is not None)
        return RfDetrOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=last.logits if self.training else self.mask_background_logits(last.logits),
            pred_boxes=last.boxes,
            pred_masks=None if factored else last.masks.logits(),
            **base,
        )


class RfDetrForInstanceSegmentation(RfDetrForObjectDetection):
    """RF-DETR with class, box and mask heads.

    Example:
        >>> import torch
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation
        >>> model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano")).eval()
        >>> model(torch.zeros(1, 3, 312, 312)).pred_masks.shape
        torch.Size([1, 100, 78, 78])
    """

    def _add_heads(self, config: RfDetrConfig) -> None:
        super()._add_heads(config)
        self.segmentation_head = RfDetrSegmentationHead(config)

    def last_stage(self, base: RfDetrOutput, image_size: tuple[int, int]) -> StagePrediction:
        """What the last decoder layer predicts, with its masks."""
        for pixels in self.segmentation_head.pixels(base.backbone_features, image_size):
            last = pixels  # the others are not kept
        masks = self.segmentation_head.factors(last, base.last_hidden_state)
        return super().last_stage(base, image_size)._replace(masks=masks)

    def stages(self, base: RfDetrOutput, image_size: tuple[int, int]) -> dict[str, StagePrediction]:
        """What each supervised stage predicts, with its masks; those of the first stage skip the blocks."""
        head, hidden = self.segmentation_head, base.intermediate_hidden_states
        pixels = list(head.pixels(base.backbone_features, image_size))
        sources = {"": (pixels[-1], hidden[:, -1]), "_enc": (pixels[0], base.enc_hidden_states)}
        sources |= {f"_{layer}": (pixels[layer + 1], hidden[:, layer]) for layer in range(hidden.shape[1] - 1)}
        stages = super().stages(base, image_size)
        return {suffix: stage._replace(masks=head.factors(*sources[suffix])) for suffix, stage in stages.items()}
