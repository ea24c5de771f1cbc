"""Read the JSON of VGG Image Annotator (VIA) 1 to 3: https://www.robots.ox.ac.uk/~vgg/software/via/.

A project is read, and the annotations that VIA 1 and 2 export as JSON. [`find_via_files`] recognises the format,
[`read_via`] reads it.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..model.validation import error_context
from .annotation_files import AnnotatedFiles, AnnotatedImage, ImageLocator, Part, SourceFiles
from .geometry import Geometry, ellipse, polygon, read_points, rotated_box

# The names by which the attribute of the class is chosen if the regions have several.
_CLASS_ATTRIBUTES = ("class", "label", "category", "name", "type")
# The geometries of VIA 3 by number.
_KINDS = {1: "point", 2: "rect", 3: "circle", 4: "ellipse", 5: "line", 6: "polyline", 7: "polygon"}


class Region(NamedTuple):
    """A region: its geometry, with the names of VIA 2, and the values of its attributes."""

    where: str
    geometry: Mapping[str, Any]
    attributes: Mapping[str, Any]


def is_via(content: Any) -> bool:
    """Return whether the content of a JSON file is VIA's."""
    if not isinstance(content, Mapping):
        return False
    if "_via_img_metadata" in content or _is_via_3(content):
        return True
    first = next(iter(content.values()), None)
    return isinstance(first, Mapping) and {"filename", "regions"} <= first.keys()


def _is_via_3(content: Mapping[str, Any]) -> bool:
    return {"project", "file", "view", "metadata"} <= content.keys()


def find_via_files(files: SourceFiles) -> list[Path]:
    """Return the JSON files of a source if there are files of VIA among them."""
    return files.find_json(is_via)


def read_via(files: SourceFiles, paths: list[Path], image_folder: Any) -> AnnotatedFiles:
    """Read the files; those in folders such as train and val are splits.

    A rectangle is a box without a mask. The class is the attribute that all regions have.
    """
    locator = ImageLocator(files.root, image_folder)
    result = AnnotatedFiles(files.source, locator.folder)
    read: list[tuple[str, AnnotatedImage, list[Region]]] = []
    contents = dict(result.read_json_files(paths, is_via, "VIA"))
    for (path, content), split in zip(contents.items(), files.splits_of(list(contents)), strict=True):
        with result.collect_problem(), error_context(str(path)):
            listed = _images_of_via_3(path, content) if _is_via_3(content) else _images_of_via_2(path, content)
            for name, problems, regions in listed:
                tail = PurePosixPath(name).name if isinstance(name, str) and "://" in name else name
                image = AnnotatedImage(locator.name(tail, path.parent, path.parent / "images"), problems=problems)
                read.append((split, image, regions))
    with error_context(str(files.source)):
        attribute = _class_attribute([region for _, _, regions in read for region in regions])
    for split, image, regions in read:
        for region in regions:
            with image.collect_problem(region.where):
                name = None if attribute is None else _class_name(region.attributes, attribute)
                image.add_parts({0: [Part(name, _read_geometry(region.geometry))]}, region.where)
        result.add_images([split], [image])
    return result


def _images_of_via_2(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[Region]]]:
    """Yield the name of each image, problems and regions."""
    entries = content.get("_via_img_metadata", content)
    if not isinstance(entries, Mapping):
        raise ValueError(f"'_via_img_metadata' must be a dict, got {type(entries).__name__}. Export it again.")
    for key, entry in entries.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("filename"), str):
            raise ValueError(
                f"{key!r:.80} must be a dict with 'filename' and 'regions', got {entry!r:.60}. Correct it."
            )
        listed = entry.get("regions") or []
        listed = list(listed.values()) if isinstance(listed, Mapping) else listed
        problems, regions = [], []
        for index, region in enumerate(listed if isinstance(listed, list) else [listed]):
            where = f"{path}: {entry['filename']!r:.200}: region {index}"
            geometry = region.get("shape_attributes") if isinstance(region, Mapping) else None
            attributes = (region.get("region_attributes") or {}) if isinstance(region, Mapping) else None
            if isinstance(geometry, Mapping) and isinstance(attributes, Mapping):
                regions.append(Region(where, geometry, attributes))
            else:
                problems.append(f"{where} must have 'shape_attributes', got {region!r:.60}. Correct or remove it.")
        yield entry["filename"], problems, regions


def _images_of_via_3(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[Region]]]:
    """Yield the name of each image, problems and regions."""
    try:
        attributes = {key: (item["aname"], item.get("options") or {}) for key, item in content["attribute"].items()}
        names = {str(key): item["fname"] for key, item in content["file"].items()}
        images: dict[str, tuple[str, list[str], list[Region]]]
        images = {key: (names[str(view["fid_list"][0])], [], []) for key, view in content["view"].items()}
        for key, item in content["metadata"].items():
            name, problems, regions = images[str(item["vid"])]
            where = f"{path}: {name!r:.200}: region {key!r:.40}"
            if item.get("z"):
                problems.append(f"{where} must belong to an image, got the times of a video. Remove it.")
            elif item.get("xy"):
                values = {attributes[key][0]: _option(value, attributes[key][1]) for key, value in item["av"].items()}
                regions.append(Region(where, _named_geometry(item["xy"]), values))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"an entry is missing or invalid ({type(error).__name__} {error!s:.80}). Save it again."
        ) from error
    yield from images.values()


def _option(value: Any, options: Mapping[str, Any]) -> Any:
    """Return the name of the chosen option of an attribute, of several as a dict; a text is its own value."""
    chosen = str(value).split(",") if options else []
    if not chosen or not all(key in options for key in chosen):
        return value
    return options[chosen[0]] if len(chosen) == 1 else {str(options[key]): True for key in chosen}


def _named_geometry(numbers: list[Any]) -> dict[str, Any]:
    """Return a geometry of VIA 3, a number for its kind and numbers, with the names of VIA 2."""
    kind, values = _KINDS.get(numbers[0], f"geometry {numbers[0]!r:.20}"), numbers[1:]
    if kind == "polygon":
        return {"name": kind, "all_points_x": values[::2], "all_points_y": values[1::2]}
    fields = {"rect": ("x", "y", "width", "height"), "circle": ("cx", "cy", "r"), "ellipse": ("cx", "cy", "rx", "ry")}
    return {"name": kind, **dict(zip(fields.get(kind, ()), values, strict=False))}


def _class_attribute(regions: list[Region]) -> str | None:
    """Return the attribute that holds the class; None if there are no attributes.

    Raises:
        ValueError: it cannot be decided.
    """
    given = [
        {str(key) for key, value in region.attributes.items() if value not in ("", None, {})} for region in regions
    ]
    names = set().union(*given)
    common = set.intersection(*given) if given else set()
    for candidates in (common, names):
        if len(candidates) == 1:
            return next(iter(candidates))
        for usual in (("class",), _CLASS_ATTRIBUTES):
            if len(found := [name for name in candidates if name.lower() in usual]) == 1:
                return found[0]
    if not names:
        return None
    listed = ", ".join(f"{name!r:.60}" for name in sorted(names)[:8])
    raise ValueError(
        f"the class must be one attribute of all regions, got {listed}. Keep one of them, or call it 'class'."
    )


def _class_name(attributes: Mapping[str, Any], attribute: str) -> str:
    value = attributes.get(attribute)
    if isinstance(value, Mapping):  # a checkbox
        chosen = [str(name) for name, is_chosen in value.items() if is_chosen]
        value = chosen[0] if len(chosen) == 1 else chosen
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"the attribute {attribute!r:.60} must be one class, got {value!r:.60}. Choose one.")
    return str(value).strip()


def _read_geometry(geometry: Mapping[str, Any]) -> Geometry:
    kind = geometry.get("name")
    if kind == "polygon":
        xs, ys = geometry["all_points_x"], geometry["all_points_y"]
        return polygon(read_points([list(pair) for pair in zip(xs, ys, strict=True)]))
    if kind == "rect":
        x, y, width, height = (float(geometry[name]) for name in ("x", "y", "width", "height"))
        return rotated_box(read_points([[x, y], [x + width, y + height]]), 0, [x, y])
    if kind == "circle":
        return ellipse([float(geometry["cx"]), float(geometry["cy"])], [float(geometry["r"])] * 2)
    if kind == "ellipse":
        center, radii = ([float(geometry[name]) for name in names] for names in (("cx", "cy"), ("rx", "ry")))
        return ellipse(center, radii, math.degrees(float(geometry.get("theta") or 0)))
    raise ValueError(
        f"a region must be a polygon, rect, circle or ellipse, got {kind!r:.40}, which encloses no pixels. Remove it,"
        " or draw it as a polygon."
    )
