"""Read images from files, URLs, base64 strings and arrays."""

import base64
import math
import os
import time
import urllib.parse
import urllib.request
from io import BytesIO
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import PIL.Image
import torch
from PIL.ExifTags import Base
from PIL.Image import Transpose
from transformers.utils import logging

from .validation import require

logger = logging.get_logger(__name__)

# What is read of an image: an upright PIL image of mode RGB, or a tensor (1 or 3, H, W) of any dtype.
Pixels: TypeAlias = torch.Tensor | PIL.Image.Image

_URL_TIMEOUT_SECONDS = 60
# Limits of a download: an untrusted server may send forever, or very slowly.
MAX_URL_BYTES = 1 << 28
MAX_URL_SECONDS = 300
# The formats that Pillow decodes itself. For others, such as EPS, it starts another program.
_FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)
# How an image is turned upright, by its EXIF orientation.
_TO_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def read_rgb(image: PIL.Image.Image | str | os.PathLike[str]) -> PIL.Image.Image:
    """Read a PIL image, path, URL or base64 string as 8-bit RGB with EXIF rotation applied.

    The values are scaled like those that the image processor reads.
    """
    pixels = decode_image(image)
    if pixels.dtype != np.uint8:
        scaled = read_image(pixels, do_rescale=True, rescale_factor=1 / 255, input_data_format=None)
        pixels = (scaled * 255).round().byte().permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(pixels)


def decode_image(image: PIL.Image.Image | str | os.PathLike[str]) -> np.ndarray:
    """Decode a PIL image, path, URL or base64 string, with EXIF rotation applied.

    Of a file with several pages or frames the first one is read, with a warning.

    Returns:
        (H, W, 3) uint8, or (H, W) if the image has 16 or 32 bits per pixel.

    Raises:
        ValueError: if the image cannot be opened; the message names it.
    """
    loaded = _load(image)
    return np.array(loaded) if isinstance(loaded, PIL.Image.Image) else loaded


def _load(image: PIL.Image.Image | str | os.PathLike[str]) -> PIL.Image.Image | np.ndarray:
    """Return an upright image of mode RGB, or an array (H, W) if the image has 16 or 32 bits per pixel.

    Only the given image itself may have EXIF data, which then does not rotate it.
    """
    source = image
    try:
        if not isinstance(image, PIL.Image.Image):
            # Opened as a file object: Pillow memory-maps a TIFF that is given by its path, and rotates it wrongly.
            with _open_source(os.fspath(image)) as stream, open_image(stream) as image:
                # Further images of an MPO are previews or depth maps, and those of a PSD are layers.
                if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
                    logger.warning_once(
                        f"{redact_url(source)!s:.200} has several pages or frames, and only the first is read. Save"
                        " each as a file of its own to use all of them."
                    )
                image.load()
        file, image = image, upright(image)
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode == "F" or image.mode.startswith("I"):
            return _to_full_range(np.array(image), file)
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image is not source:
            image.info = {}
        return image
    except Exception as error:  # for damaged files Pillow raises SyntaxError, struct.error, zlib.error and others
        reason = str(error) or type(error).__name__
        raise ValueError(f"{redact_url(source)!s:.200} cannot be opened as an image: {reason}") from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Load an image, and turn it upright by its EXIF orientation; see [`read_orientation`].

    The EXIF data of the result is not changed.
    """
    image.load()
    method = _TO_UPRIGHT.get(read_orientation(image))
    return image if method is None else image.transpose(method)


def read_orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 if the EXIF data is missing or broken."""
    try:
        # The `getexif` of PNG images decodes the whole file, because EXIF may follow the pixels.
        orientation = PIL.Image.Image.getexif(image).get(Base.Orientation)
    except Exception:  # which one depends on the damage and on the release of Pillow
        return 1
    return orientation if orientation in _TO_UPRIGHT else 1


def _to_full_range(pixels: np.ndarray, image: PIL.Image.Image) -> np.ndarray:
    """Return integers that the file stores in 9 to 16 bits as uint16 from 0 to 65535, other pixels unchanged."""
    if image.format in ("PNG", "PPM") and image.mode == "I":  # scaled by Pillow, but as integers of 32 bits
        return pixels.astype(np.uint16)
    if image.format == "TIFF" and image.tag_v2.get(Base.BitsPerSample) == (12,):  # not scaled by Pillow
        return np.rint(pixels * (65535 / 4095)).astype(np.uint16)
    return pixels


def open_image(file: Any) -> PIL.Image.Image:
    """Open a file or path without decoding the pixels, if it has a common format.

    Pillow knows more formats, but starts other programs for some of them.
    """
    PIL.Image.init()
    return PIL.Image.open(file, formats=[name for name in _FORMATS if name in PIL.Image.OPEN])


def _open_source(source: str) -> BinaryIO:
    """Open a path, http(s) URL or base64 string as a binary file object."""
    if source.startswith(("http://", "https://")):
        return BytesIO(_download(source))
    path = source if os.path.isfile(source) else os.path.expanduser(source)
    if os.path.isfile(path):
        return open(path, "rb")
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        stream = BytesIO(base64.b64decode("".join(encoded.split()), validate=True))
        open_image(stream)
    except (ValueError, OSError) as error:
        if os.path.isdir(path):
            raise ValueError(
                f'it is a folder. Pass its files, such as sorted(Path({source!r:.200}).glob("*.jpg")), or use'
                " `predict_dataset` or the command `predict`, which read folders."
            ) from error
        raise ValueError("the file does not exist. Pass a path, an http(s) URL or a base64 string.") from error
    return stream


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http(s) only, and send credentials only to the server that the URL names."""

    def redirect_request(self, request: urllib.request.Request, *response: Any) -> urllib.request.Request | None:
        redirected = super().redirect_request(request, *response)
        if redirected is not None:
            here, there = (urllib.parse.urlsplit(each.full_url) for each in (request, redirected))
            if there.scheme not in ("http", "https"):
                raise ValueError(f"a redirect must lead to http or https, got {there.scheme}")
            if (here.scheme, here.netloc) != (there.scheme, there.netloc):
                redirected.remove_header("Authorization")
        return redirected


def open_url(url: str) -> Any:
    """Open an http(s) URL, which may contain user and password, and return the response as a binary file object.

    Raises:
        ValueError: The URL is invalid, or redirects to another scheme.
        OSError: The server is not available, or answers with an error.
        http.client.HTTPException: The server does not answer in HTTP.
    """
    parts = urllib.parse.urlsplit(url)
    headers = {"User-Agent": "transformers-rfdetr"}
    user, at, host = parts.netloc.rpartition("@")
    if at:
        user = urllib.parse.unquote(user if ":" in user else f"{user}:")
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    return urllib.request.build_opener(_Redirects).open(request, timeout=_URL_TIMEOUT_SECONDS)


def _download(url: str) -> bytes:
    """Download a URL, unless it is larger or slower than the limits allow."""
    content, start = bytearray(), time.monotonic()
    with open_url(url) as response:
        while chunk := response.read1(1 << 20):
            content += chunk
            for value, limit, unit, name in (
                (len(content), MAX_URL_BYTES, "bytes", "MAX_URL_BYTES"),
                (time.monotonic() - start, MAX_URL_SECONDS, "seconds", "MAX_URL_SECONDS"),
            ):
                if value > limit:
                    raise ValueError(
                        f"the download takes more than {limit} {unit}. Download it yourself, or raise"
                        f" transformers_rfdetr.model.image_io.{name}."
                    )
    return bytes(content)


def redact_url(source: Any) -> Any:
    """Remove user, password and query from a URL, so that it can be logged; return anything else unchanged."""
    if not isinstance(source, str) or "://" not in source:
        return source
    scheme, _, rest = source.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def read_image(image: Any, do_rescale: bool, rescale_factor: float, input_data_format: str | None) -> torch.Tensor:
    """Read any image as (3, H, W) float32, scaled to [0, 1] if `do_rescale`; see `RfDetrImageProcessor.preprocess`."""
    return to_float(as_tensor(read_pixels(image, do_rescale, input_data_format)), do_rescale, rescale_factor)


def as_tensor(pixels: Pixels) -> torch.Tensor:
    """Return pixels as a tensor (1 or 3, H, W)."""
    is_image = isinstance(pixels, PIL.Image.Image)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1) if is_image else pixels


def size_of(pixels: Pixels) -> tuple[int, int]:
    """Return (H, W)."""
    return pixels.size[::-1] if isinstance(pixels, PIL.Image.Image) else (pixels.shape[1], pixels.shape[2])


def read_pixels(image: Any, do_rescale: bool, input_data_format: str | None = None) -> Pixels:
    """Read any image, in its own data type: uint8 takes a quarter of the memory of float32.

    Arrays and tensors are not copied, if that is possible.

    Raises:
        ValueError: The image cannot be read, or has values that are out of range; see [`read_image`].
    """
    if isinstance(image, str | os.PathLike | PIL.Image.Image):
        image, input_data_format = _load(image), "channels_last"
        if isinstance(image, PIL.Image.Image):
            return image
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise ValueError(f"an image array must contain real numbers, got dtype {image.dtype}")
        image = torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), ["C", "W"]))
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"an image must be a PIL image, array, tensor, path or URL, got {type(image).__name__}")
    if image.is_complex():
        raise ValueError(f"an image tensor must contain real numbers, got {image.dtype}")
    pixels = channels_first(image.detach(), input_data_format)
    if 0 in pixels.shape:
        raise ValueError(f"an image must have at least one pixel, got shape {tuple(image.shape)}")
    _check_range(pixels, do_rescale)
    return pixels


def to_float(pixels: torch.Tensor, do_rescale: bool, rescale_factor: float) -> torch.Tensor:
    """Convert pixels (1 or 3, H, W) of any dtype to (3, H, W) float32, scaled to [0, 1] if `do_rescale`."""
    values = pixels.to(torch.float32)
    if not pixels.is_floating_point():
        if pixels.dtype == torch.bool:
            values *= 255
        elif pixels.dtype == torch.uint16:
            values /= 257
        if do_rescale:
            # x / 255 rounds like rfdetr; x * (1 / 255) differs in the last bit.
            values /= 1 / rescale_factor
    return values.expand(3, -1, -1)


def _check_range(pixels: torch.Tensor, do_rescale: bool) -> None:
    dtype = pixels.dtype
    if dtype in (torch.bool, torch.uint8):
        return
    if dtype == torch.uint16:
        if 0 < pixels.numpy(force=True).max() < 4096:
            logger.warning_once(
                "All values of a 16-bit image are below 4096, and it is read as nearly black, because 65535 is"
                " white. If its values have 10 or 12 bits, multiply them by 64 or 16 and save it again. This"
                " warning is shown once."
            )
        return
    lowest, highest = pixels.min().item(), pixels.max().item()
    if not dtype.is_floating_point:
        if lowest < 0 or highest > 255:
            raise ValueError(
                f"{dtype} pixels must be in [0, 255], got values in [{lowest:g}, {highest:g}]. Pass uint8, uint16 (full"
                " range 65535) or floats in [0, 1]."
            )
    elif not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError(
            f"pixels must be finite, got values in [{lowest:g}, {highest:g}]. Replace NaN and infinite values."
        )
    elif do_rescale and not (lowest >= -1e-5 and highest <= 1 + 1e-5):  # the caller's own scaling may round
        raise ValueError(
            f"float pixels must be in [0, 1] if `do_rescale` is set, got values in [{lowest:g}, {highest:g}]. Scale"
            " them, or pass uint8."
        )


def channels_first(image: torch.Tensor, input_data_format: str | None) -> torch.Tensor:
    """Return an image (H, W), (H, W, channels) or (channels, H, W) as (1 or 3, H, W); alpha is dropped."""
    shape = tuple(image.shape)
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"an image must have the axes height, width and at most channels, got shape {shape}")
    data_format = getattr(input_data_format, "value", input_data_format)
    is_known = data_format in (None, "channels_first", "channels_last")
    require(is_known, "input_data_format", input_data_format, "'channels_first' or 'channels_last'")
    for channels in ((3,), (1, 4)):  # (4, 4, 3) is RGB of four rows
        first = data_format != "channels_last" and shape[0] in channels
        last = data_format != "channels_first" and shape[2] in channels
        if first or last:
            break
    if first and last:
        raise ValueError(
            f"the axis of the channels must be unambiguous, got an image of shape {shape}. Pass a PIL image, or"
            " `input_data_format` to the image processor."
        )
    if not (first or last):
        raise ValueError(f"an image must have 1, 3 or 4 channels in the first or last axis, got shape {shape}")
    return (image.permute(2, 0, 1) if last else image)[:3]
