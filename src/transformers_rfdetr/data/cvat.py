"""Read the XML of "CVAT for images 1.1": https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/.

[`find_cvat_files`] recognises the format, [`read_cvat`] reads it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from ..model.validation import error_context
from .annotation_files import AnnotatedFiles, AnnotatedImage, ImageLocator, Part, SourceFiles, read_xml
from .geometry import Geometry, check_size, ellipse, polygon, read_points, region, rotated_box
from .label_maps import canonical_split_name

CROWD_ATTRIBUTE = "is_crowd"
_GEOMETRIES = ("polygon", "box", "mask", "ellipse")
_NO_PIXELS = ("polyline", "points", "cuboid", "skeleton")  # they enclose no pixels, or none that are known


def find_cvat_files(files: SourceFiles) -> list[Path]:
    """Return the XML files of a source that CVAT wrote."""
    return [path for path in files.with_suffix(".xml") if _is_cvat(path)]


def _is_cvat(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return re.search(r"<annotations[\s>]", file.read(4096)) is not None


def read_cvat(files: SourceFiles, paths: list[Path], image_folder: Any) -> AnnotatedFiles:
    """Read the files. The subset of an image is its split, or else the folder of the file.

    A box is a box without a mask; one that is rotated is a polygon. The parts of one label with one `group_id` are one
    object. `occluded` is kept, and the attribute `is_crowd` marks a crowd region.
    """
    locator = ImageLocator(files.root, image_folder)
    result = AnnotatedFiles(files.source, locator.folder)
    for path, split in zip(paths, files.splits_of(paths), strict=True):
        with result.collect_problem():
            root = read_xml(path)
            if root.tag != "annotations" or root.find("track") is not None:
                kind = "tracks of a video" if root.tag == "annotations" else f"<{root.tag:.40}>"
                raise ValueError(f"{path} must have <image> elements, got {kind}. Export it as CVAT for images 1.1.")
            meta = root.find("meta")
            labels = [] if meta is None else meta.iterfind(".//labels/label/name")
            result.class_names |= {label.text.strip() for label in labels if label.text and label.text.strip()}
            tags: Counter[str] = Counter()
            for element in root.iterfind("image"):
                where = f"{path}: {element.get('name')!r:.200}"
                subset = (element.get("subset") or "").strip()
                folders = [path.parent / "images" / subset, path.parent / "images", path.parent / subset, path.parent]
                with result.collect_problem(), error_context(where):
                    image = _read_image(element, locator, folders, where, tags)
                    is_named = subset.lower() not in ("", "default")
                    result.add_images([canonical_split_name(subset) if is_named else split], [image])
            result.notes += [f"{path}: {count} <{tag:.40}> are not read." for tag, count in tags.items()]
    return result


def _read_image(
    element: Element, locator: ImageLocator, folders: Sequence[Path], where: str, tags: Counter[str]
) -> AnnotatedImage:
    size = None
    if element.get("height") is not None and element.get("width") is not None:
        size = check_size(element.get("height"), element.get("width"))
    image = AnnotatedImage(locator.name(element.get("name"), *folders), size)
    parts: dict[Any, list[Part]] = {}
    for index, item in enumerate(element):
        if item.tag not in (*_GEOMETRIES, *_NO_PIXELS):  # <tag> of the image, and what later versions may add
            tags[item.tag] += 1
            continue
        with image.collect_problem(f"{where}: object {index}"):
            label = (item.get("label") or "").strip()
            if not label:
                raise ValueError("`label` must be a name, got none. Add it.")
            if item.tag in _NO_PIXELS:
                raise ValueError(
                    f"an object must be a polygon, box, mask or ellipse, got <{item.tag}> labelled {label!r:.60}, which"
                    " encloses no pixels. Remove it, or draw it as a polygon."
                )
            group = item.get("group_id")
            key = (index,) if group in (None, "", "0") else (label, group)
            fields = {"occluded": int(item.get("occluded") == "1"), "iscrowd": int(_is_crowd(item))}
            part = Part(label, _read_geometry(item, size), fields)
            parts.setdefault(key, []).append(part)
    image.add_parts(parts, where)
    return image


def _is_crowd(item: Element) -> bool:
    values = (attribute.text for attribute in item.iterfind("attribute") if attribute.get("name") == CROWD_ATTRIBUTE)
    return any((value or "").strip().lower() in ("true", "1") for value in values)


def _read_geometry(item: Element, size: tuple[int, int] | None) -> Geometry:
    if item.tag == "polygon":
        return polygon(read_points([pair.split(",") for pair in item.attrib["points"].split(";")]))
    if item.tag == "box":
        corners = read_points([_numbers(item, "xtl", "ytl"), _numbers(item, "xbr", "ybr")])
        return rotated_box(corners, _rotation(item), corners.mean(0).tolist())
    if item.tag == "ellipse":
        return ellipse(_numbers(item, "cx", "cy"), _numbers(item, "rx", "ry"), _rotation(item))
    if size is None:
        raise ValueError("a mask requires `height` and `width` of the image. Add them.")
    left, top, width, height = (int(value) for value in _numbers(item, "left", "top", "width", "height"))
    return region(_decode_runs(item.attrib["rle"], width, height, size), top, left, size)


def _numbers(item: Element, *names: str) -> list[float]:
    return [float(item.attrib[name]) for name in names]


def _rotation(item: Element) -> float:
    return float(item.get("rotation") or 0)


def _decode_runs(text: str, width: int, height: int, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (height, width) bool from its runs along the rows, background first."""
    runs = np.array(text.split(","), np.float64)
    limit = size[0] * size[1]
    is_inside = 0 < width <= size[1] and 0 < height <= size[0]
    if not is_inside or not ((runs >= 0) & (runs <= limit)).all() or runs.sum() != width * height or (runs % 1).any():
        raise ValueError(
            f"the runs of a mask must be integers with the sum width x height, and fit into the image, got"
            f" {text!r:.40} for {width} x {height} in {size[1]} x {size[0]}. Draw it again."
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs.astype(np.int64)).reshape(height, width)
