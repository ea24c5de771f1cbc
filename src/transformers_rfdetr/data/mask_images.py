"""Read objects that are drawn as images: an instance map for each image, or a mask for each object.

An instance map has one value for each object and 0 for the background, as Cellpose and other programs of microscopy
write it: `masks/a.png` of `images/a.png`. Masks of objects are one file each, as the 2018 Data Science Bowl stores
them: `ID/masks/*.png` of `ID/images/ID.png`, or `masks/a/*.png` of `images/a.png`. Classes have no names.
[`find_mask_images`] recognises the layout, [`read_mask_images`] reads it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from .annotation_files import AnnotatedFiles, AnnotatedImage, ImageLocator, SourceFiles
from .image_files import is_image_name, upright_size
from .instance_maps import find_objects, read_index_image

_MASK_FOLDERS = ("instance_masks", "instances", "masks", "mask")  # in place of "images"
_MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")  # of formats that lose no values
_ENDS = ("", "_mask", "_masks", "_instances", "_cp_masks")  # of the mask of a.png, such as a_mask.png
_ROW_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of a folder that `datasets` reads


class MaskedImage(NamedTuple):
    """An image, and the files of its objects: one instance map, or one mask of each object."""

    path: Path
    instance_map: Path | None
    masks: list[Path]


def find_mask_images(files: SourceFiles) -> list[MaskedImage]:
    """Return the images in folders called "images" of a source; empty if none has masks in a folder beside that."""
    if any(path.name in _ROW_FILES for path in files.paths):
        return []
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for path in files.paths:
        if is_image_name(path.name):
            by_folder[path.parent].append(path)
    found = [
        _find_masks(path, files.root, by_folder)
        for folder, paths in list(by_folder.items())
        if "images" in (parts := _lower_parts(folder, files.root)) and not set(_MASK_FOLDERS) & set(parts)
        for path in paths
    ]
    return found if any(image.instance_map or image.masks for image in found) else []


def _lower_parts(folder: Path, root: Path) -> list[str]:
    return [part.lower() for part in folder.relative_to(root).parts]


def _find_masks(path: Path, root: Path, by_folder: Mapping[Path, Sequence[Path]]) -> MaskedImage:
    parts = list(path.parent.parts)
    level = len(parts) - 1 - _lower_parts(path.parent, root)[::-1].index("images")  # of the last "images"
    for name in _MASK_FOLDERS:
        folder = Path(*parts[:level], name, *parts[level + 1 :])
        siblings = {file.name: file for file in by_folder.get(folder, ())}
        names = (f"{path.stem}{end}{suffix}" for end in _ENDS for suffix in _MASK_SUFFIXES)
        if instance_map := next((siblings[name] for name in names if name in siblings), None):
            return MaskedImage(path, instance_map, [])
        if masks := by_folder.get(folder / path.stem):
            return MaskedImage(path, None, list(masks))
        if siblings and path.stem == path.parent.parent.name and len(by_folder[path.parent]) == 1:
            return MaskedImage(path, None, list(siblings.values()))
    return MaskedImage(path, None, [])


def read_mask_images(files: SourceFiles, found: Sequence[MaskedImage], image_folder: Any) -> AnnotatedFiles:
    """Read the masks of the images; folders such as train and val are splits. Images without masks are not read.

    Raises:
        ValueError: `image_folder` is given, or the values of instance maps look like those of classes.
    """
    locator = ImageLocator(files.root, None)
    if image_folder is not None:
        raise ValueError(f"`image_folder` must be None for masks, which lie beside images, got {image_folder!r:.80}.")
    result = AnnotatedFiles(files.source, locator.folder)
    masked = [image for image in found if image.instance_map or image.masks]
    if len(masked) < len(found):
        first = next(image.path for image in found if not (image.instance_map or image.masks))
        result.notes.append(f"{len(found) - len(masked)} images without masks are not read, such as {first}.")
    used = {path for image in masked for path in (image.instance_map, *image.masks)} | {image.path for image in found}
    if unused := [path for path in files.paths if is_image_name(path.name) and path not in used]:
        result.notes.append(f"{len(unused)} files belong to no image in a folder 'images', such as {unused[0]}.")
    images: list[AnnotatedImage] = []
    scattered: list[str] = []
    for image in logging.tqdm(masked, desc="Reading masks", unit=" images", delay=2):
        images.append(_read_image(image, locator, scattered))
    result.add_images(files.splits_of([image.path for image in masked]), images)
    _check_instance_maps(files.source, scattered, [image for image, of in zip(images, masked, strict=True) if of[1]])
    return result


def _read_image(masked: MaskedImage, locator: ImageLocator, scattered: list[str]) -> AnnotatedImage:
    image = AnnotatedImage(str(masked.path.relative_to(locator.folder)))
    with image.collect_problem(str(masked.path)):
        image.size = upright_size(masked.path)
    if image.size is None:
        return image
    if masked.instance_map is not None:
        with image.collect_problem(str(masked.instance_map)):
            for found in find_objects(read_index_image(masked.instance_map, image.size).values):
                image.objects.append((None, found.geometry(image.size)))
                if not found.is_one_region():
                    scattered.append(f"value {found.value} of {masked.instance_map}")
    for path in masked.masks:
        with image.collect_problem(str(path)):
            objects = list(find_objects(read_index_image(path, image.size).values))
            if len(objects) != 1:
                raise ValueError(f"a mask must have 0 and one other value, got {len(objects)}. Draw or remove it.")
            image.objects.append((None, objects[0].geometry(image.size)))
    return image


def _check_instance_maps(source: Path, scattered: Sequence[str], images: Sequence[AnnotatedImage]) -> None:
    """Refuse maps of classes, whose values have many regions; objects seldom have more than one."""
    num_objects = sum(len(image.objects) for image in images)
    if 2 * len(scattered) > num_objects:
        raise ValueError(
            f"{source}: masks must have one value for each object, got {len(scattered)} of {num_objects} values with"
            f" several regions, such as {scattered[0]}: these are the values of classes. Number the objects, for"
            " example with scipy.ndimage.label."
        )
