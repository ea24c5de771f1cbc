"""Points at which masks are compared, and masks sampled at points (PointRend, https://arxiv.org/abs/1912.08193).

Axis letters: N predicted masks, T annotated masks, K pixels inside their boxes, P points, D channels, h w mask grid,
H W annotated mask. Points are (x, y) in [0, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# (number of point sets, points in a set, device) -> (sets, points, 2).
PointSource = Callable[[int, int, torch.device], Tensor]


def random_points(num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """Draw uniform points from the device's generator: the source in training."""
    return torch.rand(num_sets, num_points, 2, device=device)


def fixed_points(num_sets: int, num_points: int, device: torch.device) -> Tensor:
    """Return the same uniform points for every call and every set, so that an evaluation loss can be reproduced."""
    points = torch.rand(1, num_points, 2, generator=torch.Generator().manual_seed(0))
    return points.to(device).expand(num_sets, -1, -1)


def sample_bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """Interpolate `maps` (N, D, h, w) at `points` (N, P, 2) -> (N, D, P); the border values continue outside."""
    return F.grid_sample(maps, 2.0 * points[:, None] - 1.0, padding_mode="border", align_corners=False)[:, :, 0]


class CroppedMasks(NamedTuple):
    """T masks of which only the pixels inside a box are stored: K of all boxes together."""

    pixels: Tensor  # (K + 1,) bool: the boxes one after the other, each row by row; last a False for all other pixels
    boxes: Tensor  # (T, 4) int64: top, left, height, width
    starts: Tensor  # (T,) int64: index of the first pixel of each box
    size: Tensor  # (2,) int64: height and width of the masks


def sample_nearest(masks: Tensor | CroppedMasks, indices: Tensor, points: Tensor) -> Tensor:
    """Sample `masks` (T, H, W) at `indices` (N,), each at its own `points` (N, P, 2) -> 0.0 or 1.0, (N, P)."""
    if not isinstance(masks, CroppedMasks):
        x, y = (_nearest(points[..., axis], size) for axis, size in enumerate(masks.shape[:-3:-1]))
        return (masks[indices[:, None], y, x] != 0).float()
    top, left, height, width = masks.boxes[indices, :, None].unbind(1)
    x, y = _nearest(points[..., 0], masks.size[1]) - left, _nearest(points[..., 1], masks.size[0]) - top
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixel = masks.starts[indices, None] + y * width + x
    return masks.pixels[pixel.where(is_inside, len(masks.pixels) - 1)].float()


def _nearest(coordinates: Tensor, size: int | Tensor) -> Tensor:
    """Return the index of the pixel in which each coordinate in [0, 1] lies, of `size` pixels."""
    grid = 2.0 * coordinates - 1.0  # rounds as grid_sample does, so that ties fall as in the original
    return (((grid + 1.0) * size - 1.0) / 2.0).round().long().clamp(min=0).clamp(max=size - 1)


def uncertain_points(mask_logits: Tensor, num_points: int, points: PointSource) -> Tensor:
    """Choose P points for each mask: of 3 P candidates the 3/4 P nearest to a logit of 0, and 1/4 P uniform ones.

    `mask_logits` (N, h, w) -> (N, P, 2).
    """
    candidates = points(len(mask_logits), 3 * num_points, mask_logits.device)
    certainty = sample_bilinear(mask_logits[:, None], candidates)[:, 0].abs()
    uncertain = certainty.topk(num_points * 3 // 4, dim=1, largest=False).indices
    chosen = candidates.gather(1, uncertain[..., None].expand(-1, -1, 2))
    uniform = points(len(mask_logits), num_points - uncertain.shape[1], mask_logits.device)
    return torch.cat([chosen, uniform], dim=1)
