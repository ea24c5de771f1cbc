"""Find image files and read their sizes without decoding them."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.ExifTags import Base

from ..model.image_io import open_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def is_outside(folder: str | os.PathLike[str], name: Any) -> bool:
    """Whether a file name, relative to the folder or absolute, means a file outside of it; links are not looked at."""
    if not isinstance(name, str | os.PathLike):
        return False
    root = os.path.abspath(folder)
    return not Path(os.path.abspath(os.path.join(root, name))).is_relative_to(root)


def upright_size(picture: Any) -> tuple[int, int]:
    """A path, the bytes of a file or a PIL picture -> (H, W) with the EXIF rotation applied, from the header."""
    if not isinstance(picture, PIL.Image.Image):
        try:
            with open_image(BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
                return upright_size(opened)
        except Exception as error:  # Pillow's are many, among them that of too many pixels
            raise ValueError(f"{picture!r:.200} cannot be opened as an image: {error}") from error
    # A PNG's own `getexif` decodes the whole file first, in case there is EXIF behind the pixels.
    turned = PIL.Image.Image.getexif(picture).get(Base.Orientation) in range(5, 9)  # width and height are exchanged
    width, height = picture.size
    if turned and picture.format == "TIFF":  # whose size some releases of Pillow give turned already
        width, height = (picture.tag_v2[tag] for tag in (Base.ImageWidth, Base.ImageLength))
    return (width, height) if turned else (height, width)
