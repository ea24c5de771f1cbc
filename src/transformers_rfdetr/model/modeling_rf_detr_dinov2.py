"""Pixels to patch features: the windowed DINOv2 backbone (https://arxiv.org/abs/2304.07193).

Axes: B images, H W patch grid, C token width, V windows of an image (num_windows squared), N tokens of a window.
Tokens stay in window layout (B·V, N, C) from the embeddings to the taps; a global block only looks at them as
(B, V·N, C). Module names are those of the original checkpoints, so that a state dict needs no renaming.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_rf_detr import RfDetrDinov2Config
from .validation import check_resolution


class VitInitialisation:
    """Weights that start as those of a vision transformer: truncated normal, with zero bias."""

    std: float
    weight: Tensor
    bias: Tensor

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        nn.init.trunc_normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class VitLinear(VitInitialisation, nn.Linear):
    """A linear layer of the backbone."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features)


class VitPatchProjection(VitInitialisation, nn.Conv2d):
    """The patch embedding: one convolution whose kernel is its stride."""

    def __init__(self, width: int, patch_size: int, std: float) -> None:
        self.std = std
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size)


def scaled_dot_product_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0, need_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, by the implementation that the model's configuration names.

    Args:
        module: The attention module; its `config` is the top one, so that `set_attn_implementation` is obeyed.
        queries, keys, values: (B, heads, N, d).
        dropout: Probability to drop a weight.
        need_weights: Return the weights too; they exist in the eager formula only, which is then used.

    Returns:
        The context (B, N, heads, d), and the weights (B, heads, N, N) or None.
    """
    scaling = queries.shape[-1] ** -0.5
    implementation = module.config._attn_implementation
    if need_weights or implementation in (None, "eager"):
        weights = (queries @ keys.transpose(-1, -2) * scaling).softmax(-1)
        context = F.dropout(weights, dropout) @ values
        return context.transpose(1, 2), weights
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, queries, keys, values, None, dropout=dropout, scaling=scaling)[0], None


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, of whose steps the backward pass repeats the cheap ones instead of keeping what they gave.

    `function` ends with a linear layer, which is not repeated: the repetition stops when all that is needed is there.
    A compiler decides that by itself.
    """
    if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def resize_position_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample a position table to another patch grid: antialiased bicubic in float32, as the checkpoints expect.

    Args:
        table: (1, 1 + H·W, C): the class token's entry, then the old grid's rows.
        old_grid: (H, W) of the table, in patches.
        new_grid: (H', W') wanted.

    Returns:
        (1, 1 + H'·W', C) in the dtype of `table`, which itself is returned where the grids agree.
    """
    # In a graph for any size the sides are no ints: it resamples always, which changes nothing at the same size.
    if all(isinstance(side, int) for side in new_grid) and tuple(old_grid) == tuple(new_grid):
        return table
    patches = table[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)
    patches = F.interpolate(
        patches.float(),
        size=new_grid,
        mode="bicubic",
        align_corners=False,
        antialias=table.device.type != "mps",  # not implemented there; the original departs in the same way
    )
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def partition_windows(tokens: Tensor, num_windows: int) -> Tensor:
    """(B, H, W, C) -> (B·V, N, C): windows in row-major order, and row-major tokens inside each."""
    batch, height, width, channels = tokens.shape
    n = num_windows
    tokens = tokens.reshape(batch, n, height // n, n, width // n, channels).transpose(2, 3)
    return tokens.reshape(batch * n * n, (height // n) * (width // n), channels)


def merge_windows(tokens: Tensor, grid: tuple[int, int], num_windows: int) -> Tensor:
    """(B·V, N, C) -> (B, H, W, C), the inverse of [`partition_windows`]."""
    n = num_windows
    height, width = grid
    tokens = tokens.reshape(-1, n, n, height // n, width // n, tokens.shape[-1]).transpose(2, 3)
    return tokens.reshape(-1, height, width, tokens.shape[-1])


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (https://arxiv.org/abs/1603.09382): zero whole rows of the batch, scale up the others."""
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1.0 - rate)
    return x * keep / (1.0 - rate)


class RfDetrDinov2Embeddings(nn.Module):
    """Pixels to tokens in window layout: patches, a class token for each window, positions, registers."""

    def __init__(self, config: RfDetrDinov2Config) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        height_patches, width_patches = config.position_grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))  # nothing reads it; it stands in every checkpoint
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + height_patches * width_patches, width))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, width))
        projection = VitPatchProjection(width, config.patch_size, config.initializer_range)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial tokens and positions."""
        nn.init.trunc_normal_(self.cls_token, std=self.config.initializer_range)
        nn.init.trunc_normal_(self.position_embeddings, std=self.config.initializer_range)
        nn.init.zeros_(self.mask_token)
        if self.config.num_register_tokens:
            nn.init.zeros_(self.register_tokens)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) pixels -> (B·V, N, C) tokens: class token, registers, patches of each window."""
        config = self.config
        check_resolution(pixel_values.shape[-2:], config.patch_size, config.num_windows, "pixel_values")
        projection = self.patch_embeddings["projection"]
        patches = projection(pixel_values.to(projection.weight.dtype))
        grid = (patches.shape[-2], patches.shape[-1])
        positions = resize_position_table(self.position_embeddings, config.position_grid, grid)
        patches = patches.flatten(2).transpose(1, 2) + positions[:, 1:]
        windows = partition_windows(patches.unflatten(1, grid), config.num_windows)
        prefix = self.cls_token + positions[:, :1]
        if config.num_register_tokens:
            prefix = torch.cat([prefix, self.register_tokens], dim=1)
        return torch.cat([prefix.to(windows.dtype).expand(windows.shape[0], -1, -1), windows], dim=1)


class RfDetrDinov2Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: RfDetrDinov2Config, top_config: Any) -> None:
        super().__init__()
        self.config = top_config
        self.is_causal = False  # transformers' sdpa is causal unless told otherwise
        self.num_heads = config.num_attention_heads
        width, std = config.hidden_size, config.initializer_range
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: VitLinear(width, width, std) for name in names})
        self.output = nn.ModuleDict({"dense": VitLinear(width, width, std)})

    def forward(self, tokens: Tensor, scale: "RfDetrDinov2LayerScale") -> Tensor:
        """(B, N, C) -> (B, N, C), scaled."""
        queries, keys, values = (
            self.attention[name](tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        context, _ = scaled_dot_product_attention(self, queries, keys, values)
        return scale(self.output["dense"], context.flatten(-2))


class RfDetrDinov2LayerScale(nn.Module):
    """A learned scale for each channel of a residual branch (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, width: int, initial_value: float) -> None:
        super().__init__()
        self.initial_value = initial_value
        self.lambda1 = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial scale."""
        nn.init.constant_(self.lambda1, self.initial_value)

    def forward(self, linear: nn.Module, x: Tensor) -> Tensor:
        """What `linear` makes of `x`, scaled.

        The rows of a plain layer's weights are scaled instead of what it gives, which nothing then has to keep.
        """
        if type(linear) is not VitLinear:  # it has an adapter, or is quantised
            return linear(x) * self.lambda1
        return F.linear(x, self.lambda1[:, None] * linear.weight, self.lambda1 * linear.bias)


class RfDetrDinov2Layer(GradientCheckpointingLayer):
    """One pre-norm block. A global one sees all windows of an image as a single sequence, class tokens included."""

    def __init__(self, config: RfDetrDinov2Config, top_config: Any, index: int) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.attends_globally = index not in config.window_block_indexes
        self.windows_per_image = config.num_windows**2
        self.drop_path_rate = 0.0
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = RfDetrDinov2Attention(config, top_config)
        self.layer_scale1 = RfDetrDinov2LayerScale(width, config.layerscale_value)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": VitLinear(width, 4 * width, std), "fc2": VitLinear(4 * width, width, std)})
        self.layer_scale2 = RfDetrDinov2LayerScale(width, config.layerscale_value)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B·V, N, C) -> (B·V, N, C)."""
        sequence = self.norm1(tokens)
        if self.attends_globally:
            rows, length, width = sequence.shape
            sequence = sequence.reshape(rows // self.windows_per_image, self.windows_per_image * length, width)
        context = self.attention(sequence, self.layer_scale1).reshape(tokens.shape)
        tokens = tokens + drop_path(context, self.drop_path_rate, self.training)
        hidden = checkpointed(lambda x: self.mlp["fc1"](self.norm2(x)), tokens)
        hidden = checkpointed(lambda x: self.layer_scale2(self.mlp["fc2"], F.gelu(x)), hidden)
        return tokens + drop_path(hidden, self.drop_path_rate, self.training)


class RfDetrDinov2Backbone(nn.Module):
    """Windowed DINOv2: pixels to one feature map for each tap.

    Blocks after the last tap stand in the checkpoint (the [2, 5, 8, 11] variants have one) and are never run.
    """

    def __init__(self, config: RfDetrDinov2Config, top_config: Any) -> None:
        super().__init__()
        self.config = config
        self.embeddings = RfDetrDinov2Embeddings(config)
        layers = [RfDetrDinov2Layer(config, top_config, index) for index in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.set_drop_path(config.drop_path_rate)
        self.freeze_unused()

    def set_drop_path(self, rate: float) -> None:
        """Set the stochastic depth: from 0 at the first block, evenly, to `rate` at the last."""
        layers = self.encoder["layer"]
        for index, layer in enumerate(layers):
            layer.drop_path_rate = rate * index / max(len(layers) - 1, 1)

    def set_trainable(self, trainable: bool) -> None:
        """Switch gradients of everything that is read."""
        for parameter in self.parameters():
            if parameter.is_floating_point():  # quantised ones have none
                parameter.requires_grad_(trainable)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Freeze the mask token and the blocks after the last tap: without gradients they would stop plain DDP."""
        unread = [self.embeddings.mask_token]
        unread += self.encoder["layer"][self.config.num_used_layers :].parameters()
        for parameter in unread:
            parameter.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Pixels (B, 3, height, width) -> a feature map (B, C, H, W) for each tap."""
        config = self.config
        grid = (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size)
        tokens, taps = self.embeddings(pixel_values), []
        for index in range(config.num_used_layers + 1):
            tokens = self.encoder["layer"][index - 1](tokens) if index else tokens
            if index in config.out_indices:
                patches = self.layernorm(tokens)[:, 1 + config.num_register_tokens :]
                taps.append(merge_windows(patches, grid, config.num_windows).permute(0, 3, 1, 2))
        return taps
