"""Read labelme's JSON files, one for each image: https://github.com/wkentaro/labelme.

[`find_labelme_files`] recognises the format, [`read_labelme`] reads it.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..model.validation import error_context
from .annotation_files import AnnotatedFiles, AnnotatedImage, ImageLocator, Part, SourceFiles
from .geometry import Geometry, box, check_size, decode_base64, decode_png_mask, ellipse, polygon, read_points, region

# labelme's own names for regions that are no objects.
IGNORED_LABELS = ("__ignore__", "_background_")


def is_labelme(content: Any) -> bool:
    """Return whether the content of a JSON file is labelme's."""
    return isinstance(content, Mapping) and {"shapes", "imagePath"} <= content.keys()


def find_labelme_files(files: SourceFiles) -> list[Path]:
    """Return the JSON files of a source if there are files of labelme among them."""
    return files.find_json(is_labelme)


def read_labelme(files: SourceFiles, paths: list[Path], image_folder: Any) -> AnnotatedFiles:
    """Read the files; those in folders such as train and val are splits.

    A rectangle is a box without a mask. The parts of one label with one `group_id` are one object. The flag `iscrowd`
    of an object marks a crowd region.
    """
    locator = ImageLocator(files.root, image_folder)
    result = AnnotatedFiles(files.source, locator.folder)
    ignored: Counter[str] = Counter()
    images: dict[Path, AnnotatedImage] = {}
    embedded = []
    for path, content in result.read_json_files(paths, is_labelme, "labelme"):
        with result.collect_problem(), error_context(str(path)):
            images[path] = _read_image(path, content, locator, ignored)
            if content.get("imageData") and not locator.contains(images[path].file_name):
                embedded.append(path)
    result.add_images(files.splits_of(list(images)), images.values())
    result.notes += [f"{count} regions labelled {label!r} are not read." for label, count in ignored.items()]
    if embedded:
        result.notes.append(
            f"{len(embedded)} files embed an image (`imageData`) that does not exist as a file, such as {embedded[0]}."
            " Write the images to files with `labelme_export_json`."
        )
    return result


def _read_image(path: Path, content: Mapping[str, Any], locator: ImageLocator, ignored: Counter[str]) -> AnnotatedImage:
    size = None
    if content.get("imageHeight") is not None and content.get("imageWidth") is not None:
        size = check_size(content["imageHeight"], content["imageWidth"])
    image = AnnotatedImage(locator.name(content["imagePath"], path.parent), size)
    if not isinstance(content["shapes"], list):
        raise ValueError(f"'shapes' must be a list, got {type(content['shapes']).__name__}. Save the file again.")
    parts: dict[Any, list[Part]] = {}
    for index, item in enumerate(content["shapes"]):
        with image.collect_problem(f"{path}: shape {index}"):
            label, group = item["label"], item.get("group_id")
            if not isinstance(label, str) or not label:
                raise ValueError(f"`label` must be a name, got {label!r:.60}. Correct it.")
            if label in IGNORED_LABELS:
                ignored[label] += 1
                continue
            key = (index,) if group is None else (label, str(group))
            flags = item.get("flags")
            is_crowd = isinstance(flags, Mapping) and bool(flags.get("iscrowd"))
            part = Part(label, _read_geometry(item, size), {"iscrowd": int(is_crowd)})
            parts.setdefault(key, []).append(part)
    image.add_parts(parts, str(path))
    return image


def _read_geometry(item: Mapping[str, Any], size: tuple[int, int] | None) -> Geometry:
    kind, points = item.get("shape_type") or "polygon", read_points(item["points"])
    if kind in ("polygon", "rotation", "oriented_rectangle"):  # the last two are turned boxes of four points
        return polygon(points)
    if kind == "rectangle" and len(points) == 2:
        return box(*points[0], *points[1])
    if kind == "rectangle" and len(points) == 4:  # X-AnyLabeling
        is_upright = all(len(set(axis)) == 2 for axis in points.T.tolist())
        return box(*points.min(0), *points.max(0)) if is_upright else polygon(points)
    if kind == "circle" and len(points) == 2:  # its center, and a point on it
        radius = float(np.linalg.norm(points[1] - points[0]))
        return ellipse(points[0].tolist(), [radius, radius])
    if kind == "mask" and len(points) == 2:
        return _read_mask(item["mask"], points, size)
    if kind in ("rectangle", "circle", "mask"):
        raise ValueError(f"a {kind} must have 2 points, got {len(points)}. Draw or remove it.")
    raise ValueError(
        f"`shape_type` must be polygon, rectangle, circle or mask, got {kind!r:.40}, which encloses no pixels. Remove"
        " it, or draw it as a polygon."
    )


def _read_mask(text: Any, points: np.ndarray, size: tuple[int, int] | None) -> Geometry:
    """Return a mask: its PNG lies in the box between two pixels, both inside."""
    if size is None:
        raise ValueError("a mask requires `imageHeight` and `imageWidth` of the file. Add them.")
    (left, top), (right, bottom) = points.astype(int).tolist()
    expected = (bottom - top + 1, right - left + 1)
    mask = decode_png_mask(decode_base64(text), max_size=expected)
    if mask.shape != expected:
        raise ValueError(
            f"a mask must have the size of its box, {expected[0]} x {expected[1]} pixels, got {mask.shape[0]} x"
            f" {mask.shape[1]}. Draw it again."
        )
    return region(mask, top, left, size)
