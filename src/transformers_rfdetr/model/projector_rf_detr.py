"""The projector: taps of the backbone to feature levels for the decoder.

Axis letters: B images, C channels, D width of the decoder, H W patch grid. Module names are those of the original
checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_rf_detr import PROJECTOR_SCALES, RfDetrConfig
from .layers_rf_detr import ChannelLayerNorm


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
    """The C2f block of YOLOv8: split in two halves, chain three bottlenecks on the second, fuse all five maps."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.cv1 = ConvNormAct(in_channels, 2 * half, 1)
        self.cv2 = ConvNormAct(5 * half, out_channels, 1)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        maps = list(self.cv1(x).chunk(2, dim=1))
        for bottleneck in self.m:
            maps.append(bottleneck(maps[-1]))
        return self.cv2(torch.cat(maps, dim=1))


class RfDetrProjector(nn.Module):
    """For each feature level: resample all taps to its scale, and fuse them."""

    def __init__(self, config: RfDetrConfig) -> None:
        super().__init__()
        width, num_taps = config.backbone_config.hidden_size, len(config.backbone_config.out_indices)
        scales = [PROJECTOR_SCALES[level] for level in config.projector_scale]
        self.stages_sampling = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*_resampling_layers(width, scale)) for _ in range(num_taps)) for scale in scales
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                C2f(num_taps * (width // 2 if scale > 1 else width), config.d_model), ChannelLayerNorm(config.d_model)
            )
            for scale in scales
        )

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Taps (B, C, H, W) -> a level (B, D, H·scale, W·scale) for each scale, fine to coarse."""
        return [
            fuse(torch.cat([resample(tap) for resample, tap in zip(resamplers, taps, strict=True)], dim=1))
            for resamplers, fuse in zip(self.stages_sampling, self.stages, strict=True)
        ]


def _resampling_layers(width: int, scale: float) -> list[nn.Module]:
    if scale == 2.0:
        return [nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)]
    if scale == 0.5:
        return [ConvNormAct(width, width, 3, stride=2, activation=F.relu)]  # ReLU here only, as in the original
    return []
