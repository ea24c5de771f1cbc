"""Image files, URLs, base64 strings and arrays to RGB images and tensors."""

import base64
import math
import os
import time
import urllib.parse
import urllib.request
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

_URL_TIMEOUT_SECONDS = 60
# The largest file that is fetched from a URL; a server may send without an end.
MAX_URL_BYTES = 1 << 28
# ... or so slowly that nobody waits for it.
MAX_URL_SECONDS = 300
# What Pillow reads by itself. EPS, for one, it hands to another program, whatever the name of the file.
_FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)


def read_rgb(image: PIL.Image.Image | str | os.PathLike[str]) -> PIL.Image.Image:
    """A picture, or its path, URL or base64 -> 8-bit RGB, upright (EXIF), with the values that the processor reads."""
    pixels = decode_image(image)
    if pixels.dtype != np.uint8:
        scaled = read_image(pixels, do_rescale=True, rescale_factor=1 / 255, input_data_format=None)
        pixels = (scaled * 255).round().byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(pixels)


def decode_image(image: PIL.Image.Image | str | os.PathLike[str]) -> np.ndarray:
    """A picture, or its path, URL or base64 -> upright, (H, W, 3) uint8 or, of 16 or 32 bits a pixel, (H, W)."""
    source = image
    try:
        if not isinstance(image, PIL.Image.Image):
            image = _open(os.fspath(image))
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode == "La":
            image = image.convert("LA")
        if not image.mode.startswith("I") and image.mode != "F":
            image = image.convert("RGB")
        return np.array(image)
    except Exception as error:  # Pillow answers broken files with SyntaxError, struct.error, zlib.error and others
        reason = str(error) or type(error).__name__
        raise ValueError(f"{redact_url(source)!s:.200} cannot be opened as an image: {reason}") from error


def _open(source: str) -> PIL.Image.Image:
    """A path, http(s) URL or base64 string -> the picture in its own mode (transformers clips 16 bits to 8)."""
    # Not by its path, of which Pillow maps the pixels and turns those of a TIFF wrongly.
    with _stream(source) as stream, open_image(stream) as image:
        image.load()
        return image


def open_image(file: Any) -> PIL.Image.Image:
    """A file or its path -> the picture, not loaded yet, if it is in one of the usual formats.

    Pillow knows more of them; for some it starts other programs.
    """
    PIL.Image.init()
    return PIL.Image.open(file, formats=[name for name in _FORMATS if name in PIL.Image.OPEN])


def _stream(source: str) -> BinaryIO:
    if source.startswith(("http://", "https://")):
        return BytesIO(_fetch(source))
    path = source if os.path.isfile(source) else os.path.expanduser(source)
    if os.path.isfile(path):
        return open(path, "rb")
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        stream = BytesIO(base64.b64decode("".join(encoded.split()), validate=True))
        open_image(stream)
    except (ValueError, OSError) as error:
        raise ValueError("there is no such file; give a path, an http(s) URL or base64") from error
    return stream


def _fetch(url: str) -> bytes:
    """What a server sends, which may be neither too much nor too slow."""
    place = urllib.parse.urlsplit(url)
    headers = {"User-Agent": "transformers-rfdetr"}
    user, at, host = place.netloc.rpartition("@")
    if at:
        user = urllib.parse.unquote(user if ":" in user else f"{user}:")
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    request = urllib.request.Request(place._replace(netloc=host).geturl(), headers=headers)
    content, begun = bytearray(), time.monotonic()
    with urllib.request.urlopen(request, timeout=_URL_TIMEOUT_SECONDS) as response:
        while part := response.read1(1 << 20):
            content += part
            if len(content) > MAX_URL_BYTES:
                raise ValueError(
                    f"it is larger than {MAX_URL_BYTES} bytes; fetch it yourself, or raise"
                    " transformers_rfdetr.model.image_io.MAX_URL_BYTES"
                )
            if time.monotonic() - begun > MAX_URL_SECONDS:
                raise ValueError(
                    f"it took longer than {MAX_URL_SECONDS} seconds; fetch it yourself, or raise"
                    " transformers_rfdetr.model.image_io.MAX_URL_SECONDS"
                )
    return bytes(content)


def redact_url(source: Any) -> Any:
    """A source as it may be written down and shown: the user and the query of a URL may hold a password."""
    if not isinstance(source, str) or "://" not in source:
        return source
    scheme, _, rest = source.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def read_image(image: Any, do_rescale: bool, rescale_factor: float, input_data_format: str | None) -> torch.Tensor:
    """Any image -> (3, H, W) float32, scaled to [0, 1] where `do_rescale`."""
    if isinstance(image, str | os.PathLike | PIL.Image.Image):
        image, input_data_format = decode_image(image), "channels_last"
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise ValueError(f"an array of {image.dtype} is no image; pass numbers")
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"{type(image).__name__} is no image; pass a PIL image, an array, a tensor, a path or a URL")
    if image.is_complex():
        raise ValueError(f"a tensor of {image.dtype} is no image; pass real numbers")

    picture = channels_first(image.detach(), input_data_format)
    if 0 in picture.shape:
        raise ValueError(f"shape {tuple(image.shape)} has no pixels; leave the image out")
    values = picture.to(torch.float32, memory_format=torch.contiguous_format)
    if image.is_floating_point():
        lowest, highest = values.min().item(), values.max().item()
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError("a pixel is NaN or infinite; pass finite values")
        # A rounding error of the caller's own scaling is no other scale.
        if do_rescale and not (lowest >= -1e-5 and highest <= 1 + 1e-5):
            raise ValueError(
                f"float pixels lie in [{lowest:g}, {highest:g}]; with do_rescale they must lie in [0, 1]:"
                " scale them or pass uint8"
            )
    else:
        if image.dtype == torch.bool:
            values *= 255
        elif image.dtype == torch.uint16:
            values /= 257
        elif image.dtype != torch.uint8 and not (values.min() >= 0 and values.max() <= 255):
            raise ValueError(
                f"{image.dtype} pixels lie in [{values.min():g}, {values.max():g}], not in 0..255, so that their scale"
                " is unknown; pass uint8, uint16 (full range 65535) or floats in [0, 1]"
            )
        if do_rescale:
            # x / 255 is rfdetr's rounding; x * (1 / 255) differs in the last bit.
            values /= 1 / rescale_factor
    return values.expand(3, -1, -1)


def channels_first(image: torch.Tensor, input_data_format: str | None) -> torch.Tensor:
    """(H, W), (H, W, channels) or (channels, H, W) -> (1 or 3, H, W)."""
    shape = tuple(image.shape)
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"shape {shape} is no image; pass (height, width) and at most one axis of channels")
    data_format = getattr(input_data_format, "value", input_data_format)
    if data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(f"input_data_format {input_data_format!r} is neither 'channels_first' nor 'channels_last'")
    for channels in ((3,), (1, 4)):  # (4, 4, 3) is RGB of four rows
        first = data_format != "channels_last" and shape[0] in channels
        last = data_format != "channels_first" and shape[2] in channels
        if first or last:
            break
    if first and last:
        raise ValueError(f"shape {shape} may have its channels first or last; say which with input_data_format")
    if not (first or last):
        raise ValueError(f"shape {shape} has no axis of 1, 3 or 4 channels where one is expected; convert it to RGB")
    if last:
        image = image.permute(2, 0, 1)
    return image[:3]
