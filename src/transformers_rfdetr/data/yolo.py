"""Read YOLO annotations: a data.yaml, and beside each image a text file with one line per object.

[`find_yolo_file`] recognises the format, [`read_yolo_splits`] reads it.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..model.validation import check_limit, error_context, is_index
from .annotation_records import AnnotatedSplit, Record
from .image_files import IMAGE_SUFFIXES, is_outside, upright_size
from .label_maps import canonical_split_name, check_class_names, describe_classes, read_class_names, validate_classes
from .text_files import read_text, read_yaml

_LINE_FORMAT = "'class x0 y0 x1 y1 x2 y2 ...' with at least three points, or 'class center_x center_y width height'"


def find_yolo_file(source: str | os.PathLike[str] | Mapping[str, Any]) -> Path | None:
    """Return the data.yaml that the source is or contains; None if the source is not in YOLO format."""
    if isinstance(source, Mapping):
        return None
    path = Path(source).expanduser()
    if path.suffix.lower() in (".yaml", ".yml"):
        return path
    names = ("data.yaml", "data.yml", "dataset.yaml")
    return next((path / name for name in names if (path / name).is_file()), None)


def read_yolo_splits(path: Path, image_folder: Any, class_names: Any) -> dict[str, AnnotatedSplit]:
    """Read a data.yaml and the label files of its splits.

    Args:
        path: What [`find_yolo_file`] returned.
        image_folder: The folder that the paths in the data.yaml are relative to; by default as [`read_data_yaml`] says.
        class_names: None, or the classes, if the data.yaml does not name them.

    Raises:
        ValueError: the data.yaml is invalid, or images are missing or outside the folder.
    """
    classes, root, entries = read_data_yaml(path, image_folder, class_names)
    splits = {}
    with error_context(str(path)):
        for key, entry in entries.items():
            images = list_yolo_images(root, entry, key)
            if missing := [image for image in images if not image.is_file()]:
                raise ValueError(
                    f"{key}: {len(missing)} of {len(images)} images do not exist, such as"
                    f" {', '.join(map(str, missing[:3]))}. Correct {key!r}."
                )
            records = _yolo_records(images, root, classes)
            splits[canonical_split_name(key)] = AnnotatedSplit(str(path), classes, records, root)
    return splits


def read_data_yaml(
    path: Path, image_folder: Any = None, class_names: Any = None
) -> tuple[dict[int, str], Path, dict[str, Any]]:
    """Read a data.yaml.

    Returns:
        The names of the classes by id; the folder that all paths are relative to, and outside of which nothing is read;
        and the entries "train", "val", "valid" and "test", as far as they exist.

    Raises:
        ValueError: the file is not YAML, or lacks classes or splits.
    """
    description = read_yaml(read_text(path), yaml.SafeLoader, str(path))
    if not isinstance(description, dict):
        kind = type(description).__name__
        raise ValueError(f"{path} must contain the keys 'names' and 'train', got {kind}. Export it again.")
    with error_context(str(path)):
        names = description.get("names")
        classes = validate_classes(read_class_names(names or class_names or _numbered_names(description.get("nc"))))
        if names:
            check_class_names(class_names, classes)
        root = _image_root(path, description, image_folder)
        entries = {key: description[key] for key in ("train", "val", "valid", "test") if description.get(key)}
        if not entries:
            raise ValueError(
                f"data.yaml must name images under 'train', 'val' or 'test', got the keys {list(description)}."
                " Add one of them."
            )
    return classes, root, entries


def _numbered_names(count: Any) -> list[str]:
    """Return the names "0", "1", ... of `nc` classes; none for None."""
    if count is not None and not is_index(count):
        raise ValueError(f"`nc` must be an integer >= 0, got {type(count).__name__}. Correct it, or give 'names'.")
    check_limit("num_labels", count or 0)
    return [str(label) for label in range(count or 0)]


def _image_root(path: Path, description: Mapping[str, Any], image_folder: Any) -> Path:
    """Return `image_folder`, or the `path` of the data.yaml if it exists, or the folder of the data.yaml."""
    if isinstance(image_folder, Mapping):
        raise ValueError(
            f"`image_folder` must be one folder for YOLO data, got {image_folder!r:.80}. Give the folder that 'train'"
            " is relative to."
        )
    if image_folder is not None:
        return Path(image_folder).expanduser()
    declared = description.get("path")
    if not isinstance(declared, str) or not (path.parent / declared).is_dir():
        return path.parent
    if is_outside(path.parent, declared):
        raise ValueError(
            f"`path` must be a folder inside {path.parent}, got {declared!r:.200}. Move {path.name} there, or give the"
            " folder as `image_folder`."
        )
    return path.parent / declared


def list_yolo_images(root: Path, entry: Any, key: str) -> list[Path]:
    """Return the images of one split: those of a folder in the order of their names, those of a list in its order.

    Args:
        root: The folder that paths are relative to.
        entry: What the data.yaml has under `key`: a folder, a text file that lists images, or a list of these.
        key: The key of the split, which errors name.

    Raises:
        ValueError: a path does not exist or is outside `root`, or there are no images.
    """
    images: list[Path] = []
    for name in entry if isinstance(entry, list) else [entry]:
        if not isinstance(name, str):
            raise ValueError(f"{key!r} must be a folder or a list of images, got {type(name).__name__}. Correct it.")
        # The exports of Roboflow contain ../train/images where train/images is meant.
        candidates = [path for path in (root / name, root / name.removeprefix("../")) if path.exists()]
        path = next((path for path in candidates if not is_outside(root, path.absolute())), None)
        if path is None and (root / name).exists():
            raise ValueError(
                f"{key!r} must be inside {root}, got {name!r:.200}. Give a folder above as `image_folder`."
            )
        if path is None:
            raise ValueError(f"{key!r} must exist, got {root / name}. Correct it, or `path`, which is {root}.")
        if path.is_dir():
            images += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            lines = (line.strip() for line in read_text(path).splitlines())
            images += [path.parent / line for line in lines if line]
    if not images:
        raise ValueError(f"{key!r} must contain images, got none in {entry!r} of {root}. Correct it.")
    if outside := [path for path in images if is_outside(root, path.absolute())]:
        raise ValueError(
            f"the images of {key!r} must be inside {root}, got {', '.join(map(str, outside[:3]))}: {len(outside)} of"
            f" {len(images)} are outside. Correct {key!r}."
        )
    return images


def _yolo_records(images: Sequence[Path], root: Path, classes: Mapping[int, str]) -> Iterator[Record]:
    for index, path in enumerate(images):
        size = upright_size(path)
        annotations = []
        label_path = yolo_label_path(path, root)
        lines = read_text(label_path).splitlines() if label_path.is_file() else []
        for line_number, line in enumerate(lines, start=1):
            if line.strip():
                with error_context(f"{label_path}, line {line_number}"):
                    annotations.append(parse_yolo_line(line.split(), size, classes))
        name = os.path.relpath(path, root) if path.is_relative_to(root) else str(path)
        fields = {"image_id": index, "file_name": name, "width": size[1], "height": size[0]}
        yield {**fields, "annotations": annotations}


def yolo_label_path(image: Path, root: Path) -> Path:
    """Return the label file of an image: .../images/a/1.jpg -> .../labels/a/1.txt.

    It is beside the image if no folder of the path inside `root` is called images.
    """
    parts = list(image.parts)
    first = len(root.parts) if image.is_relative_to(root) else 0
    folders = [index for index, part in enumerate(parts) if part == "images" and index >= first]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def parse_yolo_line(words: Sequence[str], size: tuple[int, int], classes: Mapping[int, str]) -> dict[str, Any]:
    """Return a line of a label file as an annotation, in pixels.

    Args:
        words: The class id, and a polygon or a box in fractions of the image's width and height.
        size: (H, W) of the image.
        classes: Names by class id.

    Raises:
        ValueError: the line is invalid.
    """
    try:
        category, values = int(words[0].removesuffix(".0")), np.array(words[1:], np.float64)
    except ValueError as error:
        raise ValueError(f"a line must be {_LINE_FORMAT}, got {' '.join(words)!r:.80}. Correct it.") from error
    if category not in classes:
        raise ValueError(f"class must be one of {describe_classes(classes)}, got {category}. Correct it or add a name.")
    if len(values) % 2 or len(values) < 4:
        raise ValueError(f"a line must be {_LINE_FORMAT}, got {len(values)} numbers after the class. Correct it.")
    is_inside = (values > -0.01) & (values < 1.01)
    if not is_inside.all():
        raise ValueError(
            f"coordinates must be in [0, 1], got {values[~is_inside][0]:g}. Divide them by the image's width and"
            " height."
        )
    pixels = (values.reshape(-1, 2) * size[::-1]).ravel().round(3).tolist()
    if len(pixels) > 4:
        return {"category_id": category, "segmentation": [pixels]}
    center_x, center_y, width, height = pixels
    return {"category_id": category, "bbox": [center_x - width / 2, center_y - height / 2, width, height]}
