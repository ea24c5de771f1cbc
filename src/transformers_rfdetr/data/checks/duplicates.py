"""Images that are in a dataset more than once or overlap, and image files that it does not list."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import PIL.Image

from ..image_files import is_image_name
from .findings import Problem
from .raw_split import RawSplit

# Of 64 bits. On 573 drawn, COCO and microscopy images, the two closest different images differ in 14 bits; of copies
# that were scaled, brightened by 15 % or saved as JPEG of quality 20 to 90, at least 98 % differ in 4 or fewer.
_MAX_DIFFERENT_BITS = 4
# scene_512_1024.png and scene-r0-c512.png: the name of a scene, and two numbers.
_CROP_NAME = re.compile(r"(.+?)[_-][a-z]{0,3}(\d{1,6})[_-][a-z]{0,3}(\d{1,6})", re.IGNORECASE)
_ROBOFLOW_NAME = re.compile(r"(.+)\.rf\.[0-9a-zA-Z]+")  # a version of the image called before it


def perceptual_hash(image: PIL.Image.Image) -> int | None:
    """Return the 64 bits of `imagehash.phash`; None for a nearly uniform image, whose bits would be noise."""
    grey = _to_grey(image)
    # In its 8 x 8 areas, a uniform image varies by no more than the noise of its sensor or encoding.
    areas = np.asarray(grey.resize((8, 8), PIL.Image.Resampling.BOX))
    if np.ptp(areas) <= 0.02 * areas.max():
        return None
    return int(str(imagehash.phash(grey)), 16)


def _to_grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image in 8 bits; values of more bits are scaled by the largest one."""
    if image.mode == "LAB":
        return image.convert("RGB").convert("L")
    if image.mode[0] not in "IF":
        return image.convert("L")
    values = np.asarray(image, np.float64)
    return PIL.Image.fromarray((values.clip(0) * (255 / max(values.max(), 1e-9))).astype(np.uint8))


def count_different_bits(hashes: np.ndarray, hash_bits: int) -> np.ndarray:
    """Return in how many bits each of the hashes (N,) uint64 differs from another."""
    different = hashes ^ np.uint64(hash_bits)
    return np.unpackbits(different.view(np.uint8).reshape(-1, 8), axis=1).sum(1)


def find_similar(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs of hashes (N,) uint64 of images that look the same."""
    for index in range(1, len(hashes)):
        for other in np.flatnonzero(count_different_bits(hashes[:index], int(hashes[index])) <= _MAX_DIFFERENT_BITS):
            yield index, int(other)


def place_of_crop(name: Any) -> tuple[str, tuple[int, int]] | None:
    """Return the scene that the name of an image contains, and its place there; None for other names."""
    stem = os.path.splitext(os.path.basename(str(name)))[0]
    match = _ROBOFLOW_NAME.fullmatch(stem) or _CROP_NAME.fullmatch(stem)
    if match is None:
        return None
    scene, *numbers = match.groups()
    return scene, (int(numbers[0]), int(numbers[1])) if numbers else (0, 0)


def do_crops_overlap(places: np.ndarray, place: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return whether crops of `size` (H, W) of one scene overlap: those at `places` (N, 2), and one at `place`."""
    return (np.sort(np.abs(places - place)) < sorted(size)).all(1)


class DuplicateFinder:
    """Finds the same file twice in a split, and images that look like one of an earlier split."""

    def __init__(self) -> None:
        self._first_by_digest: dict[bytes, tuple[str, Any]] = {}  # -> (split, image)
        self._hashes: list[int] = []
        self._hashed: list[tuple[str, Any]] = []
        self._earlier: np.ndarray = np.zeros(0, np.uint64)  # hashes of the splits that have ended

    def add(self, split: str, image: Any, digest: bytes | None, hash_bits: int | None) -> Iterator[Problem]:
        """Yield the problems of an image, given by its name, and remember it.

        `digest` is that of its file, None if it could not be read; `hash_bits` is its `perceptual_hash`.
        """
        if digest is None:
            return
        place = (split, image)
        first = self._first_by_digest.setdefault(digest, place)
        if first[0] != split:
            yield Problem("near_duplicate_across_splits", f"the same file as {first[1]!s:.80} of {first[0]}")
        elif first != place:
            yield Problem("duplicate_image", f"the same file as {first[1]!s:.80}")
        elif hash_bits is not None and len(self._earlier):
            counts = count_different_bits(self._earlier, hash_bits)
            nearest = int(counts.argmin())
            if counts[nearest] <= _MAX_DIFFERENT_BITS:
                other_split, other = self._hashed[nearest]
                detail = f"{counts[nearest]} of 64 bits differ from {other!s:.80} of {other_split}"
                yield Problem("near_duplicate_across_splits", detail)
        if hash_bits is not None:
            self._hashes.append(hash_bits)
            self._hashed.append(place)

    def end_split(self) -> None:
        """Compare further images with those of this split too."""
        self._earlier = np.array(self._hashes, np.uint64)


class CropFinder:
    """Finds images whose names say that they overlap an image of an earlier split: crops and versions of one scene."""

    def __init__(self) -> None:
        self._images: dict[str, list[str]] = defaultdict(list)  # by scene, of all splits
        self._places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._earlier: dict[str, np.ndarray] = {}  # (N, 2) of the splits that have ended

    def add(self, split: str, image: Any, size: tuple[int, int]) -> Iterator[Problem]:
        """Yield the problem of an image of `size` (H, W), given by its name, and remember it."""
        crop = place_of_crop(image)
        if crop is None:
            return
        scene, place = crop
        earlier = self._earlier.get(scene, np.zeros((0, 2)))
        overlapping = np.flatnonzero(do_crops_overlap(earlier, place, size))
        if len(overlapping):
            yield Problem("overlapping_crops_across_splits", self._images[scene][overlapping[0]])
        self._images[scene].append(f"{image!s:.80} of {split}")
        self._places[scene].append(place)

    def end_split(self) -> None:
        """Compare further images with those of this split too."""
        self._earlier = {scene: np.array(places) for scene, places in self._places.items()}


def find_unlisted_files(splits: Sequence[RawSplit]) -> Iterator[tuple[RawSplit, Path]]:
    """Yield image files that lie beside the listed ones and are not listed in any split."""
    listed = {
        split.name: {os.path.abspath(image.source) for image in split.images if split.folder and image.source}
        for split in splits
    }
    all_listed = set().union(*listed.values())
    searched: set[str] = set()
    for split in splits:
        for folder in sorted({os.path.dirname(path) for path in listed[split.name]} - searched):
            searched.add(folder)
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if is_image_name(entry.name) and entry.path not in all_listed and entry.is_file():
                    yield split, Path(entry.path)
