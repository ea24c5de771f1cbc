"""Image files: whether they can be decoded, and the size and rotation that the annotations refer to.

Sizes are (H, W) in pixels. `actual` is that of the upright file, `stated` that of the annotation file.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from io import BufferedReader, BytesIO
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from ...model.image_io import open_image, read_orientation, read_rgb, upright
from ...model.masks import read_segmentation
from ...model.validation import are_numbers, to_builtin
from .duplicates import perceptual_hash
from .findings import DROPPED, Problem
from .raw_split import RawImage, as_index
from .repair import CopyMode

UNREADABLE = (ValueError, TypeError, OverflowError)  # what reading the numbers of a JSON may raise


class ImageFile(NamedTuple):
    """What decoding the file of an image showed."""

    size: tuple[int, int] | None = None  # upright; None if the file cannot be decoded
    orientation: int = 1  # of EXIF: 1 is upright; from 5 on, height and width are swapped
    digest: bytes | None = None  # of the content
    perceptual_hash: int | None = None
    problems: tuple[Problem, ...] = ()


class Frame(NamedTuple):
    """The size that the annotations of an image refer to, and what follows from it."""

    size: tuple[int, int] | None  # None if it is unknown
    copy_mode: CopyMode | None  # how the file goes into a repaired copy; None: it does not
    problems: list[Problem]


def open_source(source: Any) -> BytesIO | BufferedReader:
    """Open the file of an image; a PIL image is encoded as PNG."""
    value = source() if callable(source) else source
    if isinstance(value, PIL.Image.Image):
        buffer = BytesIO()
        value.save(buffer, "PNG")
        value = buffer.getvalue()
    return BytesIO(value) if isinstance(value, bytes) else open(value, "rb")


def read_image_file(source: Any) -> ImageFile:
    """Decode the whole file of an image."""
    kind = "unreadable_image"
    try:
        with open_source(source) as file:
            if not file.read(1):
                return ImageFile(problems=(Problem("empty_file", change=DROPPED),))
            file.seek(0)
            image = open_image(file)
            kind = "truncated_image"
            orientation = read_orientation(image)  # of a TIFF, which Pillow rotates when it loads it
            image.load()
            orientation = max(orientation, read_orientation(image))  # of a PNG, where it may follow the pixels
            rotated = upright(image)
            kind = "unreadable_image"
            if image.mode[0] in "IF":
                read_rgb(image)  # which refuses pixel values of an unknown range
            problems = tuple(_unusual_pixels(image))
            file.seek(0)
            digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).digest()
            size = (rotated.height, rotated.width)
            return ImageFile(size, orientation, digest, perceptual_hash(rotated), problems)
    except PIL.Image.DecompressionBombError as error:
        return ImageFile(problems=(Problem("huge_image", str(error), change=DROPPED),))
    except Exception as error:  # Pillow raises SyntaxError, struct.error, zlib.error and others for damaged files
        return ImageFile(problems=(Problem(kind, str(error)[:200] or type(error).__name__, change=DROPPED),))


def _unusual_pixels(image: PIL.Image.Image) -> Iterator[Problem]:
    """Yield what is unusual about the pixels of a decoded image."""
    if image.mode.startswith("I;16") and (highest := int(np.asarray(image).max())) < 1 << 13:
        yield Problem("dark_16_bit", f"the largest value is {highest}")
    # Further images of an MPO are previews or depth maps, and those of a PSD are layers.
    if image.format not in ("MPO", "PSD") and (num_frames := getattr(image, "n_frames", 1)) > 1:
        yield Problem("multiple_frames", f"{num_frames} frames")


def find_frame(image: RawImage, file: ImageFile) -> Frame:
    """Decide which size the annotations refer to.

    If the stated and the actual size differ, it is the one that contains all objects. If both do, neither is chosen.
    """
    given = [to_builtin(image.entry.get(side)) for side in ("height", "width")]
    sides = [side if side and side < 1 << 31 else None for side in map(as_index, given)]
    actual = file.size
    if actual is None:
        return Frame(None if None in sides else (sides[0], sides[1]), None, [])
    shown = f"height x width {given[0]!r:.20} x {given[1]!r:.20}"
    stated = (sides[0] or actual[0], sides[1] or actual[1])
    if stated != actual:
        return _choose_size(image, file, stated, f"{shown}, but the file has {actual[0]} x {actual[1]}")
    is_upright = file.orientation >= 5 and actual[0] != actual[1] and None not in sides
    frame = _rotate(image, file, is_upright)
    if given != list(actual):
        is_missing = all(side in (None, number) for side, number in zip(given, actual, strict=True))
        kind = "missing_size" if is_missing else "size_mismatch"
        frame.problems.insert(0, Problem(kind, shown, change=f"{actual[0]} x {actual[1]}"))
    return frame


def _choose_size(image: RawImage, file: ImageFile, stated: tuple[int, int], detail: str) -> Frame:
    actual = file.size
    assert actual is not None
    is_swapped = file.orientation >= 5 and stated == actual[::-1]
    kind = "exif_swapped_size" if is_swapped else "size_mismatch"
    in_actual, in_stated = _contains_all(actual, image.annotations), _contains_all(stated, image.annotations)
    if not image.annotations or (in_actual and not in_stated):
        frame = _rotate(image, file, True)
        frame.problems.insert(0, Problem(kind, detail, change=f"{actual[0]} x {actual[1]}"))
        return frame
    if is_swapped and in_stated and not in_actual:
        return Frame(stated, "stored", [Problem(kind, detail, change="written as stored, without the EXIF tag")])
    change = f"{DROPPED}: the size at which the objects were annotated is ambiguous"
    return Frame(stated, None, [Problem(kind, detail, change=change)])


def _rotate(image: RawImage, file: ImageFile, is_upright: bool) -> Frame:
    """Decide how a file of the right size is copied. `is_upright` is whether it is known to be annotated upright."""
    if file.orientation == 1:
        return Frame(file.size, "link", [])
    detail = f"orientation {file.orientation}"
    if is_upright or not image.annotations:
        return Frame(file.size, "upright", [Problem("exif_rotation", detail, change="written upright")])
    return Frame(file.size, "link", [Problem("exif_frame_unknown", detail)])


def _contains_all(size: tuple[int, int], annotations: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all objects lie in an image of that size, within a pixel."""
    for annotation in annotations:
        try:
            segmentation = read_segmentation(annotation.get("segmentation"), size)
            box = to_builtin(annotation.get("bbox"))
            if isinstance(segmentation, dict):  # an RLE of that size
                continue
            if not segmentation and not are_numbers(box, 4):
                return False
            points = np.concatenate(segmentation) if segmentation else [box[0] + box[2], box[1] + box[3]]
            if (np.reshape(points, (-1, 2)).max(0) > (size[1] + 1, size[0] + 1)).any():
                return False
        except UNREADABLE:
            return False
    return True
