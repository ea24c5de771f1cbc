"""Read the JSON that Label Studio exports: https://labelstud.io/guide/task_format.

[`find_label_studio_files`] recognises the format, [`read_label_studio`] reads it.
"""

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from ..model.validation import error_context
from .annotation_files import AnnotatedFiles, AnnotatedImage, ImageLocator, Part, SourceFiles
from .geometry import Geometry, check_size, ellipse, polygon, read_points, region, rotated_box
from .image_files import is_image_name
from .image_folder import ImageFolder

CROWD_TEXT = "iscrowd"  # in the meta information of an object
# Results that describe the image or an object, and are none.
_NO_OBJECTS = ("choices", "textarea", "rating", "number", "datetime", "taxonomy", "pairwise", "ranker", "relation")


def is_label_studio(content: Any) -> bool:
    """Return whether the content of a JSON file is a list of tasks."""
    first = content[0] if isinstance(content, list) and content else None
    is_task = isinstance(first, Mapping) and isinstance(first.get("data"), Mapping)
    return is_task and bool({"annotations", "completions", "predictions"} & first.keys())


def find_label_studio_files(files: SourceFiles) -> list[Path]:
    """Return the JSON files of a source if there are exports of Label Studio among them."""
    return files.find_json(is_label_studio)


def read_label_studio(files: SourceFiles, paths: list[Path], image_folder: Any) -> AnnotatedFiles:
    """Read the completed annotations; files in folders such as train and val are splits.

    A rectangle is a box without a mask; one that is rotated is a polygon. An object with the meta text `iscrowd` is a
    crowd region. Tasks that are skipped or not annotated are not read. Predictions are read from tasks to import, which
    have nothing else.
    """
    locator = ImageLocator(files.root, image_folder)
    result = AnnotatedFiles(files.source, locator.folder)
    folder = ImageFolder(locator.folder)
    contents = dict(result.read_json_files(paths, is_label_studio, "Label Studio"))
    for (path, tasks), split in zip(contents.items(), files.splits_of(list(contents)), strict=True):
        num_open = 0
        for index, task in enumerate(tasks):
            where = f"{path}: task {task.get('id', index) if isinstance(task, Mapping) else index!r}"
            with result.collect_problem(), error_context(where):
                annotations = _completed(task)
                if not annotations:
                    num_open += 1
                    continue
                image = AnnotatedImage(_find_image(task["data"], locator, folder, path.parent))
                with image.collect_problem(where):
                    _read_annotation(_choose(annotations), image, where)
                result.add_images([split], [image])
        if num_open:
            result.notes.append(f"{path}: {num_open} tasks without a completed annotation are not read.")
    return result


def _completed(task: Any) -> list[Mapping[str, Any]]:
    """Return the annotations of a task that were not skipped; of a task with predictions only, these."""
    if not isinstance(task, Mapping) or not isinstance(task.get("data"), Mapping):
        raise ValueError(f"a task must have 'data' and 'annotations', got {task!r:.60}. Export it again.")
    key = next((key for key in ("annotations", "completions", "predictions") if key in task), "annotations")
    given = task.get(key) or []
    if not isinstance(given, list) or not all(isinstance(item, Mapping) for item in given):
        raise ValueError(f"{key!r} must be a list of dicts, got {given!r:.60}. Export it again.")
    return [item for item in given if not item.get("was_cancelled") and not item.get("skipped")]


def _choose(annotations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the only annotation, or the only one that is marked as ground truth."""
    marked = [item for item in annotations if item.get("ground_truth")]
    candidates = marked or annotations
    if len(candidates) > 1:
        raise ValueError(
            f"a task must have one completed annotation, got {len(candidates)}, which may annotate the same objects."
            " Mark one as ground truth, or skip the others."
        )
    return candidates[0]


# Images


def _find_image(data: Mapping[str, Any], locator: ImageLocator, folder: ImageFolder, parent: Path) -> str:
    """Return the path of the image of a task relative to the folder of the images."""
    names = {key: _path_of(value) for key, value in data.items() if isinstance(value, str)}
    names = {key: name for key, name in names.items() if is_image_name(posixpath.basename(name))}
    name = names.get("image") or next(iter(names.values()), None)
    if name is None or (len(names) > 1 and "image" not in names):
        raise ValueError(f"'data' must name one image, got {dict(data)!r:.80}. Call it 'image'.")
    parts = name.split("/")
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    # An upload gets eight digits and a hyphen before its name.
    candidates = [*tails, re.sub(r"^[0-9a-f]{8}-", "", parts[-1])]
    for candidate in candidates:
        if candidate and locator.contains(found := locator.name(candidate, parent, parent / "images")):
            return found
    return next(filter(None, map(folder.find, candidates[-2:])), locator.name(candidates[-1], parent))


def _path_of(address: str) -> str:
    """Return the path in a URL of Label Studio, of a server or of a storage, or the path itself."""
    try:
        parts = urlsplit(address.replace("\\", "/"))
    except ValueError:
        return ""
    local = parse_qs(parts.query).get("d") if parts.path.rstrip("/").endswith("/data/local-files") else None
    return (local[0] if local else unquote(parts.path)).lstrip("/")


# Objects


def _read_annotation(annotation: Mapping[str, Any], image: AnnotatedImage, where: str) -> None:
    """Add the objects of an annotation. The label of a geometry may be in another result of the same id."""
    labels: dict[Any, Any] = {}
    objects: dict[Any, Mapping[str, Any]] = {}
    for index, item in enumerate(annotation["result"]):
        place = f"{where}: result {index}"
        with image.collect_problem(place):
            kind, value, key = str(item["type"]), item.get("value", {}), str(item.get("id", index))
            if kind in _NO_OBJECTS:
                continue
            if kind.endswith("labels") and value.get(kind):
                labels[key] = value[kind]
            if _geometry_kind(kind, value) is not None:
                objects.setdefault(key, {**item, "place": place})
            elif kind != "labels":
                raise ValueError(
                    f"`type` must be polygon, brush, rectangle or ellipse, with or without labels, got {kind!r:.40}."
                    " Remove the object, or draw it as a polygon."
                )
    for key, item in objects.items():
        with image.collect_problem(item["place"]):
            names = labels.get(key)
            if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
                raise ValueError(f"an object must have one label, got {names!r:.60}. Choose one.")
            size = check_size(item["original_height"], item["original_width"])
            image.size = image.size or size
            if size != image.size or item.get("image_rotation"):
                raise ValueError(
                    f"objects must be drawn on an upright image of one size, got {size} beside {image.size} and"
                    f" `image_rotation` {item.get('image_rotation')!r:.20}. Draw them again."
                )
            part = Part(names[0], _read_geometry(item, size), {"iscrowd": int(_is_crowd(item))})
            image.add_parts({key: [part]}, item["place"])


def _is_crowd(item: Mapping[str, Any]) -> bool:
    """Return whether an annotator, or our writer, has noted that an object is a crowd region."""
    meta = item.get("meta")
    texts = meta.get("text") if isinstance(meta, Mapping) else None
    return CROWD_TEXT in texts if isinstance(texts, list) else texts == CROWD_TEXT


def _geometry_kind(kind: str, value: Mapping[str, Any]) -> str | None:
    """Return "polygon", "brush", "rectangle" or "ellipse", also of results of the type labels; None for others."""
    fields = {"polygon": "points", "brush": "rle", "ellipse": "radiusX", "rectangle": "width"}
    name = kind.removesuffix("labels")
    if name:
        return name if name in fields else None
    return next((name for name, field in fields.items() if field in value), None)


def _read_geometry(item: Mapping[str, Any], size: tuple[int, int]) -> Geometry:
    """Return the geometry of a result, which has per cent of the width and the height."""
    value = item["value"]
    kind = _geometry_kind(item["type"], value)
    scale = np.array(size[::-1]) / 100
    if kind == "polygon":
        if value.get("closed") is False:
            raise ValueError("a polygon must be closed, got an open one. Close or remove it.")
        return polygon(read_points(value["points"]) * scale)
    if kind == "brush":
        return region(decode_brush(value["rle"], size), 0, 0, size)
    rotation = float(value.get("rotation") or 0)
    if kind == "ellipse":
        center, radii = read_points([[value["x"], value["y"]], [value["radiusX"], value["radiusY"]]]) * scale
        return ellipse(center.tolist(), radii.tolist(), rotation)
    corner, extent = read_points([[value["x"], value["y"]], [value["width"], value["height"]]]) * scale
    return rotated_box(np.stack([corner, corner + extent]), rotation, corner.tolist())


def decode_brush(numbers: Any, size: tuple[int, int]) -> np.ndarray:
    """Return the mask (H, W) bool of Label Studio's RLE: bytes of bits, the highest first.

    The RLE is that of https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack. 32 bits hold the number of
    values, 5 the bits of a value minus 1, and four times 4 the bits of the four kinds of lengths minus 1. Then follow
    runs: a bit that tells whether one value is repeated or all are listed, 2 for the kind of length, the length minus
    1, and the value or the values. The values are red, green, blue and alpha of each pixel along the rows; the mask is
    where alpha is at least 128.

    Raises:
        ValueError: the RLE is damaged, or of another size.
    """
    try:
        content = bytes(numbers)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`rle` must be a list of bytes, got {numbers!r:.40}. Export it again.") from error
    num_bits, position = 8 * len(content), 0

    def read(count: int) -> int:
        nonlocal position
        end = position + count
        if end > num_bits:
            raise ValueError(f"`rle` must describe all pixels, but ends after {len(content)} bytes. Export it again.")
        chunk = int.from_bytes(content[position // 8 : (end + 7) // 8])
        position = end
        return chunk >> (-end % 8) & ((1 << count) - 1)

    num_values, value_bits = read(32), read(5) + 1
    length_bits = [read(4) + 1 for _ in range(4)]
    if num_values != 4 * size[0] * size[1] or value_bits != 8:
        raise ValueError(
            f"`rle` must have 4 x {size[0]} x {size[1]} values of 8 bits, got {num_values} of {value_bits}. Export it"
            " again."
        )
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    alpha: np.ndarray = np.zeros(size[0] * size[1], np.uint8)
    start = 0
    while start < num_values:
        is_repeated, kind = read(1), read(2)
        end = start + read(length_bits[kind]) + 1
        pixels = slice(start // 4, end // 4)  # whose alpha is in the run
        if is_repeated:
            alpha[pixels] = read(8)
        else:
            count = 8 * (end - start)
            if position + count > num_bits or end > num_values:
                raise ValueError("`rle` must describe all pixels and no more. Export it again.")
            values = np.packbits(bits[position : position + count])
            alpha[pixels] = values[3 - start % 4 :: 4]
            position += count
        start = end
    if start != num_values:
        raise ValueError("`rle` must describe all pixels and no more. Export it again.")
    return (alpha >= 128).reshape(size)
