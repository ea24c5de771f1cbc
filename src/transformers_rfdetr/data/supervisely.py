"""Read projects of Supervisely: https://docs.supervisely.com/customization-and-integration/00_ann_format_navi.

A project has `meta.json` with the classes, and for each image `DATASET/ann/a.png.json` beside `DATASET/img/a.png`.
[`find_supervisely_files`] recognises the format, [`read_supervisely`] reads it.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.validation import error_context
from .annotation_files import AnnotatedFiles, AnnotatedImage, ImageLocator, Part, SourceFiles, read_json
from .geometry import (
    Geometry,
    box,
    check_size,
    decode_base64,
    decode_png_mask,
    polygon_with_holes,
    read_points,
    region,
)

MAX_PNG_BYTES = 1 << 26  # of a compressed mask after zlib, before the PNG is decoded


def is_supervisely(content: Any) -> bool:
    """Return whether the content of a JSON file is Supervisely's annotation of an image."""
    return isinstance(content, Mapping) and "objects" in content and isinstance(content.get("size"), Mapping)


def find_supervisely_files(files: SourceFiles) -> list[Path]:
    """Return the JSON files of a source, except `meta.json`, if there are annotations of Supervisely among them."""
    return [path for path in files.find_json(is_supervisely) if path.name != "meta.json"]


def read_supervisely(files: SourceFiles, paths: list[Path], image_folder: Any) -> AnnotatedFiles:
    """Read the files; a dataset of the project that is called as a split, such as train or val, is one.

    A rectangle is a box without a mask. The holes of polygons are kept. Objects of one class that Supervisely binds
    (`instance`) are one. Coordinates are those of Supervisely's own export to COCO.
    """
    locator = ImageLocator(files.root, image_folder)
    result = AnnotatedFiles(files.source, locator.folder)
    for path in files.with_suffix(".json"):
        if path.name == "meta.json":
            with result.collect_problem():
                result.class_names |= _read_classes(path)
    images: dict[Path, AnnotatedImage] = {}
    for path, content in result.read_json_files(paths, is_supervisely, "Supervisely"):
        with result.collect_problem(), error_context(str(path)):
            size = check_size(content["size"].get("height"), content["size"].get("width"))
            name = locator.name(path.name.removesuffix(".json"), path.parent.parent / "img", path.parent)
            images[path] = _read_image(path, content["objects"], AnnotatedImage(name, size))
    result.add_images(files.splits_of(list(images)), images.values())
    return result


def _read_classes(path: Path) -> set[str]:
    content = read_json(path)
    classes = content.get("classes") if isinstance(content, Mapping) else None
    if not isinstance(classes, list) or not all(
        isinstance(item, Mapping) and isinstance(item.get("title"), str) for item in classes
    ):
        raise ValueError(
            f"{path} must have a list 'classes' with a 'title' each, got {classes!r:.60}. Export it again."
        )
    return {item["title"] for item in classes}


def _read_image(path: Path, objects: Any, image: AnnotatedImage) -> AnnotatedImage:
    if not isinstance(objects, list):
        raise ValueError(f"'objects' must be a list, got {type(objects).__name__}. Export it again.")
    parts: dict[Any, list[Part]] = {}
    for index, item in enumerate(objects):
        with image.collect_problem(f"{path}: object {index}"):
            name = item["classTitle"]
            if not isinstance(name, str) or not name:
                raise ValueError(f"`classTitle` must be a name, got {name!r:.60}. Correct it.")
            part = Part(name, _read_geometry(item, image.size))
            bound = item.get("instance")
            parts.setdefault((index,) if bound is None else (str(bound), name), []).append(part)
    image.add_parts(parts, str(path))
    return image


def _read_geometry(item: Mapping[str, Any], size: tuple[int, int]) -> Geometry:
    kind = item.get("geometryType")
    if kind == "polygon":
        exterior, *holes = (read_points(ring) for ring in [item["points"]["exterior"], *item["points"]["interior"]])
        return polygon_with_holes(exterior, holes, size)
    if kind == "rectangle":
        (x0, y0), (x1, y1) = read_points(item["points"]["exterior"]).tolist()
        return box(x0, y0, x1, y1)
    if kind == "bitmap":
        left, top = read_points([item["bitmap"]["origin"]])[0].astype(int).tolist()
        mask = decode_png_mask(_decompress(decode_base64(item["bitmap"]["data"])), max_size=size)
        return region(mask, top, left, size)
    raise ValueError(
        f"`geometryType` must be polygon, rectangle or bitmap, got {kind!r:.40}. Remove the object, or convert it in"
        " Supervisely to a bitmap."
    )


def _decompress(content: bytes) -> bytes:
    """Return what zlib compressed, but at most `MAX_PNG_BYTES`; a PNG itself may also be uncompressed."""
    if content.startswith(b"\x89PNG"):
        return content
    decompressor = zlib.decompressobj()
    try:
        png = decompressor.decompress(content, MAX_PNG_BYTES)
    except zlib.error as error:
        raise ValueError(f"`data` must be a PNG that zlib compressed: {error}. Export it again.") from error
    if decompressor.unconsumed_tail:
        raise ValueError(
            f"`data` must be a PNG of at most {MAX_PNG_BYTES} bytes, got more. Export it again, or raise"
            " transformers_rfdetr.data.supervisely.MAX_PNG_BYTES."
        )
    return png
