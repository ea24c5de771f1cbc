"""Read YOLO annotations."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..model.validation import check_limit, error_context, is_index
from .image_files import IMAGE_SUFFIXES, is_outside, upright_size
from .label_maps import (
    check_class_names,
    describe_classes,
    read_class_names,
    validate_classes,
)
from .text_files import read_text, read_yaml


def find_yolo_file(path: Path) -> Path | None:
    """The data.yaml that a path is or has in it."""
    if path.suffix.lower() in (".yaml", ".yml"):
        return path
    found = [path / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (path / name).is_file()]
    return found[0] if found else None


def read_data_yaml(
    path: Path, image_folder: Any = None, class_names: Any = None
) -> tuple[dict[int, str], Path, dict[str, Any]]:
    """A data.yaml -> classes, the folder that places are relative to, and the places of each split."""
    import yaml  # transformers needs it

    description = read_yaml(read_text(path), yaml.SafeLoader, str(path))
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds no keys; give 'names' and 'train'")
    with error_context(str(path)):
        names = description.get("names")
        classes = validate_classes(read_class_names(names or class_names or _numbered(description.get("nc"))))
        if names:
            check_class_names(classes, class_names)
        root = _yolo_root(path, description, image_folder)
        places = {key: description[key] for key in ("train", "val", "valid", "test") if description.get(key)}
        if not places:
            raise ValueError(f"the keys are {list(description)}; give 'train', 'val' or 'test' with pictures")
    return classes, root, places


def _numbered(number: Any) -> list[str]:
    """The names 0, 1, ... of this many classes."""
    if number is not None and not is_index(number):
        raise ValueError(f"nc {type(number).__name__} is no number of classes; give 'names', or a whole number")
    check_limit("num_labels", number or 0)
    return [str(label) for label in range(number or 0)]


def _yolo_root(path: Path, description: Mapping[str, Any], image_folder: Any) -> Path:
    """The folder that the places in a data.yaml are relative to, and that nothing outside of is read."""
    if isinstance(image_folder, Mapping):
        raise ValueError(f"image_folder {image_folder!r:.80} is for COCO; give the folder that 'train' is relative to")
    if image_folder is not None:
        return Path(image_folder).expanduser()
    place = description.get("path")
    if not isinstance(place, str) or not (path.parent / place).is_dir():
        return path.parent
    if is_outside(path.parent, place):
        raise ValueError(
            f"path {place!r:.200} leads out of {path.parent}; move {path.name} there, or load it with image_folder"
        )
    return path.parent / place


def list_yolo_images(root: Path, places: Any, key: str) -> list[Path]:
    """What a data.yaml says of one split -> its pictures, in the order of their names or of the list."""
    found: list[Path] = []
    for place in places if isinstance(places, list) else [places]:
        if not isinstance(place, str):
            raise ValueError(f"{key}: a {type(place).__name__} is no folder or list of pictures; correct {key!r}")
        # Roboflow's exports say ../train/images where train/images is meant.
        options = [root / place, root / place.removeprefix("../")]
        path = next((option for option in options if option.exists() and not is_outside(root, option.absolute())), None)
        if path is None and options[0].exists():
            raise ValueError(f"{key}: {place!r:.200} leads out of {root}; if it is right, give a folder above both")
        if path is None:
            raise ValueError(f"{key}: {options[0]} is not there; correct {key!r}, or 'path', which is {root}")
        if path.is_dir():
            found += sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
        else:
            lines = (line.strip() for line in read_text(path).splitlines())
            found += [path.parent / line for line in lines if line]
    if not found:
        raise ValueError(f"{key}: there are no pictures in {places!r} of {root}; correct {key!r}")
    if outside := [path for path in found if is_outside(root, path.absolute())]:
        shown = ", ".join(map(str, outside[:3]))
        raise ValueError(
            f"{key}: {len(outside)} of {len(found)} pictures lie outside of {root}: {shown}; correct {key!r}"
        )
    return found


def yolo_records(pictures: Sequence[Path], root: Path, classes: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    """Yield the annotation record of each image."""
    for number, path in enumerate(pictures):
        size = upright_size(path)
        annotations = []
        labels = yolo_label_path(path, root)
        lines = read_text(labels).splitlines() if labels.is_file() else []
        for line_number, line in enumerate(lines, start=1):
            if line.strip():
                with error_context(f"{labels}, line {line_number}"):
                    annotations.append(parse_yolo_line(line.split(), size, classes))
        name = os.path.relpath(path, root) if path.is_relative_to(root) else str(path)
        head = {"image_id": number, "file_name": name, "width": size[1], "height": size[0]}
        yield {**head, "annotations": annotations}


def yolo_label_path(picture: Path, root: Path) -> Path:
    """.../images/a/1.jpg -> .../labels/a/1.txt; beside the picture where no folder in `root` is called images."""
    parts = list(picture.parts)
    first = len(root.parts) if picture.is_relative_to(root) else 0
    folders = [i for i, part in enumerate(parts) if part == "images" and i >= first]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def parse_yolo_line(words: Sequence[str], size: tuple[int, int], classes: Mapping[int, str]) -> dict[str, Any]:
    """`class x0 y0 x1 y1 x2 y2 ...` or `class cx cy w h`, in fractions of the picture -> an annotation in pixels."""
    rule = "a line is 'class x0 y0 x1 y1 x2 y2 ...', three points or more, or 'class cx cy w h'"
    try:
        category, values = int(words[0].removesuffix(".0")), np.array(words[1:], np.float64)
    except ValueError as error:
        raise ValueError(f"{' '.join(words)!r:.80} does not hold numbers; {rule}") from error
    if category not in classes:
        raise ValueError(f"class {category} is none of {describe_classes(classes)}; add its name, or correct the line")
    if len(values) % 2 or len(values) < 4:
        raise ValueError(f"{len(values)} numbers follow the class; {rule}")
    if not ((values > -0.01) & (values < 1.01)).all():
        raise ValueError(
            f"{values[(values <= -0.01) | (values >= 1.01) | np.isnan(values)][0]:g} lies outside [0, 1];"
            " coordinates are fractions of the picture's width and height: divide by them"
        )
    pixels = (values.reshape(-1, 2) * size[::-1]).ravel().round(3).tolist()
    if len(pixels) > 4:
        return {"category_id": category, "segmentation": [pixels]}
    center_x, center_y, width, height = pixels
    return {"category_id": category, "bbox": [center_x - width / 2, center_y - height / 2, width, height]}
