"""The backbone: windowed DINOv2 (https://arxiv.org/abs/2304.07193), from pixels to patch features.

Axis letters: B images, H W patch grid, C token width, V windows of an image (num_windows squared), N tokens of a
window. Tokens are (B·V, N, C) from the embeddings to the taps; a global block reshapes them to (B, V·N, C) for its
attention. Module names are those of the original checkpoints.
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
from .layers_rf_detr import is_plain
from .validation import check_resolution


class VitInitialisation:
    """The initial weights of a vision transformer: truncated normal, with zero bias."""

    std: float
    weight: Tensor
    bias: Tensor

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        nn.init.trunc_normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class VitLinear(VitInitialisation, nn.Linear):
    """A linear layer of the backbone."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features)


class VitPatchProjection(VitInitialisation, nn.Conv2d):
    """The patch embedding: a convolution with a stride of its kernel size."""

    def __init__(self, width: int, patch_size: int, std: float) -> None:
        self.std = std
        super().__init__(3, width, kernel_size=patch_size, stride=patch_size)


def scaled_dot_product_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0
) -> Tensor:
    """Return softmax(queries · keys / sqrt(d)) · values by the implementation that the model's configuration names.

    Args:
        module: The attention module; its `config` is the model's, which `set_attn_implementation` changes.
        queries, keys, values: (B, heads, N, d).
        dropout: Probability to drop a weight.

    Returns:
        The context (B, N, heads, d).
    """
    implementation = module.config._attn_implementation
    if implementation in (None, "eager"):
        return (F.dropout(attention_weights(queries, keys), dropout) @ values).transpose(1, 2)
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, queries, keys, values, None, dropout=dropout, scaling=queries.shape[-1] ** -0.5)[0]


def attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Queries and keys (B, heads, N, d) -> softmax(queries · keys / sqrt(d)), (B, heads, N, N)."""
    return (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`, and compute it again in the backward pass instead of keeping its intermediate tensors.

    `function` must end with a linear layer. Its product is not computed again: torch stops when every tensor that the
    backward pass needs exists. In a compiled graph the compiler decides what is computed again.
    """
    if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


def resize_position_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample a position table to another patch grid: antialiased bicubic in float32, as the checkpoints expect.

    Args:
        table: (1, 1 + H·W, C), the entry of the class token and those of the patches, row by row.
        old_grid: (H, W) of the table, in patches.
        new_grid: (H', W') wanted.

    Returns:
        (1, 1 + H'·W', C) in the dtype of `table`; `table` itself if the grids are equal.
    """
    # In a graph of dynamic size the sides are symbols. It always resamples, which changes nothing at equal sizes.
    if all(isinstance(side, int) for side in new_grid) and tuple(old_grid) == tuple(new_grid):
        return table
    patches = table[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)
    patches = F.interpolate(
        patches.float(),
        size=new_grid,
        mode="bicubic",
        align_corners=False,
        antialias=table.device.type != "mps",  # not implemented there, and off in the original too
    )
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def partition_windows(tokens: Tensor, num_windows: int) -> Tensor:
    """(B, H, W, C) -> (B·V, N, C), with windows, and tokens in each window, in row-major order."""
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
    """Set random rows of the batch to 0 and scale up the others: stochastic depth (https://arxiv.org/abs/1603.09382)."""
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1.0 - rate)
    return x * keep / (1.0 - rate)


class RfDetrDinov2Embeddings(nn.Module):
    """Tokens of all windows: class token, registers and patches of each, with positions."""

    def __init__(self, config: RfDetrDinov2Config) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        height_patches, width_patches = config.position_grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))  # not used, but in every checkpoint
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
        """Pixels (B, 3, height, width) -> tokens (B·V, N, C)."""
        config = self.config
        check_resolution(pixel_values.shape[-2:], config.patch_size, config.num_windows, "pixel_values")
        patches = self.patch_embeddings["projection"](pixel_values.to(self.cls_token.dtype))
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
        self.is_causal = False  # read by transformers' sdpa, which is causal by default
        self.num_heads = config.num_attention_heads
        width, std = config.hidden_size, config.initializer_range
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: VitLinear(width, width, std) for name in names})
        self.output = nn.ModuleDict({"dense": VitLinear(width, width, std)})

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.output["dense"](self.context(tokens))

    def context(self, tokens: Tensor) -> Tensor:
        """Attend without the output projection: (B, N, C) -> (B, N, C)."""
        queries, keys, values = (
            self.attention[name](tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        return scaled_dot_product_attention(self, queries, keys, values).flatten(-2)


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

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.lambda1


def scaled_linear(linear: nn.Module, scale: nn.Module, x: Tensor) -> Tensor:
    """Return `scale(linear(x))` of a linear layer and a LayerScale.

    If possible the weights are scaled instead of the result, so that training does not keep the unscaled result.
    """
    if not (is_plain(linear, VitLinear) and is_plain(scale, RfDetrDinov2LayerScale)):
        return scale(linear(x))
    return F.linear(x, scale.lambda1[:, None] * linear.weight, scale.lambda1 * linear.bias)


class RfDetrDinov2Layer(GradientCheckpointingLayer):
    """One pre-norm block. A global block attends over all windows of an image, class tokens included."""

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
        if is_plain(self.attention, RfDetrDinov2Attention):
            context = self.attention.context(sequence)
            context = scaled_linear(self.attention.output["dense"], self.layer_scale1, context)
        else:
            context = self.layer_scale1(self.attention(sequence))
        tokens = tokens + drop_path(context.reshape(tokens.shape), self.drop_path_rate, self.training)
        hidden = checkpointed(lambda x: self.mlp["fc1"](self.norm2(x)), tokens)
        hidden = checkpointed(lambda x: scaled_linear(self.mlp["fc2"], self.layer_scale2, F.gelu(x)), hidden)
        return tokens + drop_path(hidden, self.drop_path_rate, self.training)


class RfDetrDinov2Backbone(nn.Module):
    """Windowed DINOv2, with one feature map for each tap.

    Blocks after the last tap are in the checkpoint (the [2, 5, 8, 11] variants have one), but are not run.
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
        """Set the stochastic depth: from 0 at the first block, linearly, to `rate` at the last."""
        layers = self.encoder["layer"]
        for index, layer in enumerate(layers):
            layer.drop_path_rate = rate * index / max(len(layers) - 1, 1)

    def set_trainable(self, trainable: bool) -> None:
        """Switch the gradients of all parameters that are used."""
        for parameter in self.parameters():
            if parameter.is_floating_point():  # quantized parameters have no gradients
                parameter.requires_grad_(trainable)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Freeze the mask token and the blocks after the last tap: DDP fails if a trained parameter has no gradient."""
        unused = [self.embeddings.mask_token]
        unused += self.encoder["layer"][self.config.num_used_layers :].parameters()
        for parameter in unused:
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
