"""The mask head: masks as the product of pixel features and query vectors.

Axis letters: B images, N queries of all groups, D width, L decoder layers, H W patch grid, h w mask grid. Module names
are those of the original checkpoints.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_rf_detr import RfDetrConfig
from .layers_rf_detr import is_plain
from .modeling_rf_detr_dinov2 import checkpointed
from .predictions_rf_detr import MaskFactors


class MaskBlock(GradientCheckpointingLayer):
    """Depthwise 3 x 3 convolution, layer norm, linear layer, GELU, inside a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        hidden = checkpointed(lambda x: self.pwconv1(self.norm(x)), self.dwconv(pixels).permute(0, 2, 3, 1))
        return pixels + F.gelu(hidden).permute(0, 3, 1, 2)


class QueryMlp(nn.Module):
    """A residual feed-forward network on the queries."""

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
    """Pixel features, refined by one block for each decoder layer, times projected queries."""

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
        """Yield the pixel features before the first block and after each.

        Features (B, D, H, W) and the size of the model's input -> L + 1 of (B, D, h, w).
        """
        size = (image_size[0] // self.downsample_ratio, image_size[1] // self.downsample_ratio)
        # Channels last, as the norms and linear layers of the blocks need them: no block has to copy its pixels.
        features = features.contiguous(memory_format=torch.channels_last)
        pixels = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        yield pixels
        for block in self.blocks:
            pixels = block(pixels)
            yield pixels

    def factors(self, pixels: Tensor, queries: Tensor) -> MaskFactors:
        """Return the masks of queries (B, N, D) on pixels (B, D, h, w), not materialized.

        By definition every pixel p is projected to W p + b and multiplied by the projected query q. As <q, W p + b> is
        <W^T q, p> + <q, b>, the queries are multiplied by W instead if possible: there are fewer of them.
        """
        if not is_plain(self.spatial_features_proj, nn.Conv2d):
            pixels = self.spatial_features_proj(pixels)
        return MaskFactors(pixels, queries, self)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (..., D) -> vectors (..., D) and offsets (..., 1), such that a mask is <vector, pixel> + offset."""
        queries = queries.to(self.query_features_block.norm_in.weight.dtype)
        queries = self.query_features_proj(self.query_features_block(queries))
        projection = self.spatial_features_proj
        if not is_plain(projection, nn.Conv2d):
            return queries, self.bias.expand(*queries.shape[:-1], 1)
        return queries @ projection.weight.flatten(1), queries @ projection.bias[:, None] + self.bias
