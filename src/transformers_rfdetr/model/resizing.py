"""Resize images, bilinear with half-pixel centers and without antialiasing: the preprocessing of rfdetr.

Axis letters: H W pixels of the image, h w pixels of the result. Sizes are (height, width).
"""

from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from .image_io import Pixels, as_tensor, size_of


def resize_bilinear(
    pixels: Pixels, size: tuple[int, int], to_float: Callable[[Tensor], Tensor], device: torch.device | str | None
) -> Tensor:
    """Resize an image (H, W) to (3, h, w) float32 on `device`, or where the image is.

    `F.interpolate` is the definition. It needs the whole image in float32, but a result that is much smaller depends on
    four pixels for each of its own only. So these are picked first.

    Args:
        pixels: The image.
        size: (h, w).
        to_float: Converts pixels (1 or 3, any, any) of any dtype to (3, any, any) float32, each on its own.
        device: The device to interpolate on.
    """
    original = size_of(pixels)
    if 4 * size[0] * size[1] >= original[0] * original[1]:
        image = to_float(as_tensor(pixels).to(device))
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=False)[0]
    (rows, down), (columns, right) = (neighbors(*sides) for sides in zip(original, size, strict=True))
    near = to_float(_pick(pixels, rows, columns).to(device))  # (3, 2h, 2w)
    near = torch.lerp(near[:, 0::2], near[:, 1::2], down.to(near.device)[:, None])
    return torch.lerp(near[:, :, 0::2], near[:, :, 1::2], right.to(near.device))


def neighbors(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Return between which pixels of a row of `length` the `size` results lie, exactly as in `F.interpolate`.

    Returns:
        (size, 2) int64, both neighbors, and (size,) float32, the weight of the second.
    """
    # In float32, positions near 10,000 are rounded to 0.001, depending on the processor. Interpolated pixel numbers
    # modulo 8 tell the position to 5e-7 where they do not wrap from 7 to 0; one of two never does.
    pixel = torch.arange(length)
    ramps = torch.stack([pixel, pixel % 8, (pixel + 4) % 8]).float()[None, :, :, None]
    rough, *fine = F.interpolate(ramps, (size, 1), mode="bilinear", align_corners=False)[0, :, :, 0].double()
    below = rough.floor()
    is_near_wrap = (below % 8 == 0) | (below % 8 > 5)
    position = below + torch.where(is_near_wrap, fine[1] - (below + 4) % 8, fine[0] - below % 8)
    first = position.floor().clamp(max=length - 1)
    pairs = torch.stack([first, (first + 1).clamp(max=length - 1)], dim=1)
    return pairs.long(), (position - first).float()


def _pick(pixels: Pixels, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the pixels (1 or 3, 2h, 2w) of pairs of neighboring rows (h, 2) and columns (w, 2)."""
    if isinstance(pixels, PIL.Image.Image):  # converting only these rows is the fastest
        wanted = columns.flatten().numpy()
        array: np.ndarray = np.empty((2 * len(rows), len(wanted), 3), np.uint8)
        for index, (first, second) in enumerate(rows.tolist()):
            strip = np.asarray(pixels.crop((0, first, pixels.width, second + 1)))
            array[2 * index : 2 * index + 2] = strip.take(wanted, axis=1)
        return torch.from_numpy(array).permute(2, 0, 1)
    rows, columns = rows.flatten(), columns.flatten()
    if pixels.device.type != "cpu":
        return pixels[:, rows.to(pixels.device)][:, :, columns.to(pixels.device)]
    # NumPy picks several times faster than torch, in arrays of one block: (H, W, C) of a decoded image, or (C, H, W).
    last = pixels.permute(1, 2, 0)
    if last.is_contiguous():
        return torch.from_numpy(last.numpy().take(rows, axis=0).take(columns, axis=1)).permute(2, 0, 1)
    return torch.from_numpy(pixels.contiguous().numpy().take(rows, axis=1).take(columns, axis=2))
