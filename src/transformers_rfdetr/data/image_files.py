"""Locate image files, and read their sizes from the headers."""

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.ExifTags import Base

from ..model.image_io import open_image, read_orientation

# All that some release of Pillow can read, so that an image it cannot read is an error and is never skipped.
IMAGE_SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}


def is_image_name(name: str) -> bool:
    """Return whether a file name is that of an image and not hidden, as ._a.png of macOS is."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, those of each folder in the order of their names; hidden ones are skipped."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def find_images(folder: Path) -> list[Path]:
    """Return the images below a folder in the order of their paths; hidden files and folders are skipped."""
    return sorted(path for path in visible_files(folder) if is_image_name(path.name))


def is_outside(folder: str | os.PathLike[str], name: Any) -> bool:
    """Return whether a file name, relative to `folder` or absolute, leads out of it; symbolic links are not resolved.

    False for a name that is not a path.
    """
    if not isinstance(name, str | os.PathLike):
        return False
    root = os.path.abspath(folder)
    return not Path(os.path.abspath(os.path.join(root, name))).is_relative_to(root)


def upright_size(image: Any) -> tuple[int, int]:
    """Return (H, W) after the EXIF rotation, read from the header without decoding the pixels.

    Args:
        image: A path, the bytes of an image file or a PIL image.

    Raises:
        ValueError: the image cannot be opened.
    """
    if not isinstance(image, PIL.Image.Image):
        try:
            with open_image(BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return upright_size(opened)
        except Exception as error:  # Pillow raises many types, among them DecompressionBombError
            raise ValueError(f"{image!r:.200} cannot be opened as an image: {error}. Replace the file.") from error
    swaps_sides = read_orientation(image) >= 5
    width, height = image.size
    if swaps_sides and image.format == "TIFF":  # some releases of Pillow give the rotated size of a TIFF
        width, height = (image.tag_v2[tag] for tag in (Base.ImageWidth, Base.ImageLength))
    return (width, height) if swaps_sides else (height, width)
