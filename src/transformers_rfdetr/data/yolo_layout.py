"""Find the classes, the images and the label files of a YOLO dataset.

Programs write different layouts, and many datasets were moved after they were exported. What has one meaning is read,
with a note that says how; anything else is an error.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import yaml

from ..model.validation import check_limit, error_context
from .image_files import find_images, is_outside
from .label_maps import canonical_split_name, check_class_names, read_class_names, validate_classes
from .text_files import read_text, read_yaml

_YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels/classes.txt", "train/_darknet.labels")
_SPLITS = ("train", "validation", "test")
# What an escape sequence in double quotes, such as "\train", was before YAML replaced it.
_ESCAPES = {
    ord(character): f"\\{letter}" for character, letter in zip("\0\a\b\t\n\v\f\r\x1b", "0abtnvfre", strict=True)
}


class YoloImage(NamedTuple):
    """An image, which may not exist, and its label file; None if there is none."""

    path: Path
    label_path: Path | None


class YoloFolder(NamedTuple):
    """What a YOLO dataset consists of."""

    path: Path  # the description, which errors name
    root: Path  # all paths are inside
    classes: dict[int, str]  # names by class id
    splits: dict[str, list[YoloImage]]
    keypoint_values: int | None  # numbers of the keypoints in each line, if the labels are poses
    unused_labels: dict[str, list[Path]]  # by split: label files that belong to no image
    notes: list[str]  # what was not read as it is written

    def shared_labels(self) -> dict[Path, list[Path]]:
        """Return the label files that belong to several images, with these images."""
        images: dict[Path, set[Path]] = {}
        for image in chain.from_iterable(self.splits.values()):
            if image.label_path is not None:
                images.setdefault(image.label_path, set()).add(image.path)
        return {label_path: sorted(paths) for label_path, paths in images.items() if len(paths) > 1}


def find_yolo_file(source: str | os.PathLike[str] | Mapping[str, Any]) -> Path | None:
    """Return what describes a YOLO dataset; None if the source is not in YOLO format.

    It is the data.yaml that the source is or contains, or the obj.data of Darknet in it, or the folder itself if it
    contains label files.

    Raises:
        ValueError: the folder contains several YAML files that may be its data.yaml.
    """
    if isinstance(source, Mapping):
        return None
    path = Path(source).expanduser()
    if path.suffix.lower() in (".yaml", ".yml") or path.name == "obj.data":
        return path
    if not path.is_dir():
        return None
    for name in _YAML_NAMES:
        if (path / name).is_file():
            return path / name
    others = [file for file in sorted(path.glob("*.y*ml")) if file.is_file() and _looks_like_data_yaml(file)]
    if len(others) > 1:
        raise ValueError(f"{path} must contain one data.yaml, got {', '.join(map(str, others))}. Give one of them.")
    if others:
        return others[0]
    if (path / "obj.data").is_file():
        return path / "obj.data"
    folders = ("labels", "labels/*", "*/labels", "images", "images/*", "*/images", ".", "*")
    texts = chain.from_iterable(islice(path.glob(f"{folder}/*.txt"), 50) for folder in folders)
    return path if any(map(_looks_like_labels, texts)) else None


def _looks_like_data_yaml(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    return all(re.search(pattern, text, re.MULTILINE) for pattern in (r"^(names|nc)\s*:", r"^(train|val)\s*:"))


def _looks_like_labels(path: Path) -> bool:
    """Return whether the first line of a file is a class id and at least four numbers."""
    if path.name.startswith(".") or not path.is_file():
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return re.match(r"\s*\d+(\.0+)?(\s+-?\d*\.?\d+(e-?\d+)?){4}", file.readline(10_000)) is not None


def read_yolo_folder(path: Path, image_folder: Any = None, class_names: Any = None) -> YoloFolder:
    """Find the classes, images and label files of a YOLO dataset.

    Args:
        path: What [`find_yolo_file`] returned.
        image_folder: The folder that all paths are relative to. By default the `path` of the data.yaml if it exists,
            or the folder of the data.yaml.
        class_names: None, or the classes if the data do not name them.

    Raises:
        ValueError: classes or splits are missing or invalid, or a path does not exist or is outside the folder.
    """
    notes: list[str] = []
    folder = path if path.is_dir() else path.parent
    description = _read_description(path, notes)
    class_file = next((name for name in _CLASS_FILES if (folder / name).is_file()), None)
    if class_file is not None and not description.get("names"):
        description["names"] = class_file
        notes.append(f"the names of the classes are read from {class_file}.")
    with error_context(str(path)):
        root = _image_root(folder, description, image_folder)
        classes = _read_classes(description, folder, class_names, notes)
        paths = _image_paths(root, _split_entries(description), notes)
        labels = LabelFiles(root)
        splits = {split: [YoloImage(image, labels.find(image)) for image in images] for split, images in paths.items()}
        used = {image.label_path for images in splits.values() for image in images}
        for split, images in splits.items():
            notes += labels.notes(split, images)
        unused = {split: labels.unused(images, used) for split, images in splits.items()}
        return YoloFolder(path, root, classes, splits, _keypoint_values(description), unused, notes)


# The description


class _StringLoader(yaml.SafeLoader):
    """Read every scalar as the string that is written: YAML makes True of yes, 7 of 007 and 1.1 of 1.10."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated[0]!r:.60} is repeated", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def _read_description(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the content of a data.yaml, or the same keys for a dataset without one."""
    if path.is_dir():
        splits = _find_splits(path)
        listed = ", ".join(f"{split} ({name})" for split, name in splits.items())
        notes.append(f"there is no data.yaml. Images are read from the folders found: {listed}.")
        return splits
    text = read_text(path)
    if path.name == "obj.data":
        pairs = [line.partition("=") for line in text.splitlines() if "=" in line]
        return {{"classes": "nc"}.get(key.strip(), key.strip()): value.strip() for key, _, value in pairs}
    description = read_yaml(text, _StringLoader, str(path))
    if not isinstance(description, dict):
        kind = type(description).__name__
        raise ValueError(f"{path} must contain the keys 'names' and 'train', got {kind}. Export it again.")
    return description


def _find_splits(folder: Path) -> dict[str, str]:
    """Return the image folders of a dataset without a description, by split."""
    found: dict[str, str] = {}
    for parent in (folder, folder / "images"):
        for path in sorted(parent.iterdir()) if parent.is_dir() else []:
            split = canonical_split_name(path.name.lower())
            if split in _SPLITS and path.is_dir():
                images = path / "images" if (path / "images").is_dir() else path
                found.setdefault(split, str(images.relative_to(folder)))
    return found or {"train": "images" if (folder / "images").is_dir() else "."}


def _image_root(folder: Path, description: Mapping[str, Any], image_folder: Any) -> Path:
    if isinstance(image_folder, Mapping):
        raise ValueError(
            f"`image_folder` must be one folder for YOLO data, got {image_folder!r:.80}. Give the folder that 'train'"
            " is relative to."
        )
    if image_folder is not None:
        return Path(image_folder).expanduser()
    declared = description.get("path")
    if not isinstance(declared, str) or not (folder / declared).is_dir():
        return folder
    if is_outside(folder, declared):
        raise ValueError(
            f"`path` must be a folder inside {folder}, got {declared!r:.200}. Move the data.yaml there, or give the"
            " folder as `image_folder`."
        )
    return folder / declared


def _read_classes(description: Mapping[str, Any], folder: Path, class_names: Any, notes: list[str]) -> dict[int, str]:
    names, count = description.get("names") or None, _read_count(description.get("nc"))
    if isinstance(names, str):
        file = resolve_inside(folder, names)
        if file is None or not file.is_file():
            raise ValueError(f"'names' must be a list of names or a file of names, got {names!r:.80}. Make it a list.")
        names = read_text(file).rstrip().splitlines()
    if isinstance(names, Mapping):
        names = {int(key) if str(key).strip().isdecimal() else key: name for key, name in names.items()}
    if not (names or class_names or count):
        raise ValueError(
            "the names of the classes are missing. Add `names: [...]` to the data.yaml or a file classes.txt with one"
            " name per line, or give `class_names`."
        )
    given = names or class_names or [str(label) for label in range(count or 0)]
    classes = {key: name.strip() if isinstance(name, str) else name for key, name in read_class_names(given).items()}
    if unnamed := [category for category, name in classes.items() if name == ""]:
        raise ValueError(f"the name of category {unnamed[0]} must be a string, got nothing. Give it a name.")
    classes = validate_classes(classes)
    if names:
        check_class_names(class_names, classes)
        if count not in (None, len(classes)):
            notes.append(f"`nc` is {count}, but `names` has {len(classes)} classes, which are used.")
    return classes


def _read_count(value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip().isdecimal():
        raise ValueError(f"`nc` must be an integer >= 0, got {type(value).__name__}. Correct it, or give 'names'.")
    check_limit("num_labels", int(value))
    return int(value)


def _keypoint_values(description: Mapping[str, Any]) -> int | None:
    shape = description.get("kpt_shape")
    is_valid = isinstance(shape, list) and len(shape) == 2 and all(str(side).isdecimal() for side in shape)
    return int(shape[0]) * int(shape[1]) if is_valid else None


# Images


def _split_entries(description: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the key and the value of each split that the description has."""
    entries: dict[str, tuple[str, Any]] = {}
    for key, entry in description.items():
        split = canonical_split_name(str(key).lower())
        if split not in _SPLITS or not entry:
            continue
        if split in entries and entries[split][1] != entry:
            raise ValueError(f"{entries[split][0]!r} and {key!r} must not both name images. Remove one of them.")
        entries[split] = (str(key), entry)
    if not entries:
        raise ValueError(
            f"data.yaml must name images under 'train', 'val' or 'test', got the keys {list(description)}."
            " Add one of them."
        )
    return entries


def _image_paths(root: Path, entries: Mapping[str, tuple[str, Any]], notes: list[str]) -> dict[str, list[Path]]:
    """Return the images of each split. A split that was not exported is skipped with a note, unless it is "train"."""
    paths, problems = {}, {}
    moved: dict[Path, str] = {}
    for split, (key, entry) in entries.items():
        images, missing = [], []
        for name in entry if isinstance(entry, list) else [entry]:
            if not isinstance(name, str):
                raise ValueError(
                    f"{key!r} must be a folder or a list of images, got {type(name).__name__}. Correct it."
                )
            with error_context(repr(key)):
                path = resolve_inside(root, name)
            if path is None:
                missing.append(str(root / name))
                continue
            if path not in (root / name, root / name.removeprefix("../")):  # Roboflow adds ../
                notes.append(f"{key!r} is {name!r:.200}, which does not exist. {path} is read instead.")
                if moved.setdefault(path, name) != name:
                    raise ValueError(f"{notes[-1]} It is read for {moved[path]!r:.200} already. Correct the paths.")
            images += find_images(path) if path.is_dir() else _listed_images(path, root, key, notes)
        if missing:
            problems[split] = f"{key!r} must exist, got {', '.join(missing)}. Correct it, or `path`, which is {root}."
        elif not images:
            problems[split] = f"{key!r} must contain images, got none in {entry!r:.200} of {root}. Correct it."
        else:
            paths[split] = images
    for split, problem in problems.items():
        if split == "train" or not paths or isinstance(entries[split][1], list):
            raise ValueError(problem)
        notes.append(f"the split is not read: {problem}")
    return paths


def _listed_images(path: Path, root: Path, key: str, notes: list[str]) -> list[Path]:
    """Return the images that a text file lists, relative to its folder or to the root."""
    images, moved = [], []
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        image = path.parent / line
        if not image.exists() and (found := resolve_inside(root, line)) is not None:
            image = found
            moved.append((line, image))
        images.append(image)
    if outside := [image for image in images if is_outside(root, image.absolute())]:
        raise ValueError(
            f"the images of {key!r} must be inside {root}, got {', '.join(map(str, outside[:3]))}: {len(outside)} of"
            f" {len(images)} are outside. Correct {key!r}."
        )
    if moved:
        line, image = moved[0]
        notes.append(f"{len(moved)} images of {path} do not exist, such as {line!r:.200}. {image} is read instead.")
    return images


def resolve_inside(root: Path, name: str) -> Path | None:
    r"""Return the existing path inside the root that a name means; None if there is none.

    Datasets are moved without their description, and many are written on Windows. If the name does not exist, it is the
    longest end of it that does: train/images for C:\Users\me\roofs\train\images or /content/roofs/train/images.

    Raises:
        ValueError: the name exists outside of the root.
    """
    path = root / name
    if path.exists() and not is_outside(root, path.absolute()):
        return path
    parts = PurePosixPath(name.translate(_ESCAPES).replace("\\", "/")).parts
    parts = tuple(part for part in parts if part not in ("/", "//", "..", ".") and not re.fullmatch("[A-Za-z]:", part))
    if name.startswith("../") and parts and (root / Path(*parts)).exists():
        return root / Path(*parts)
    if path.exists():
        raise ValueError(f"{name!r:.200} must be inside {root}. Give a folder above as `image_folder`.")
    ends = (root / Path(*parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end.exists()), None)


# Label files


class LabelFiles:
    """Find the label files of images. Each folder is listed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[Path, dict[str, str]] = {}

    def find(self, image: Path) -> Path | None:
        """Return the label file of an image: a.txt or a.png.txt of a.png in one of the usual folders."""
        for folder in self.folders(image):
            listing = self._list(folder)
            for name in (f"{image.name}.txt", f"{image.stem}.txt"):
                if found := listing.get(unicodedata.normalize("NFC", name)):
                    return folder / found
        return None

    def folders(self, image: Path) -> Iterator[Path]:
        """Yield the folders that may contain the label file: first the one where YOLO keeps it.

        That is .../labels/train for .../images/train, and the folder of the image if none is called images.
        """
        parts, first = list(image.parent.parts), len(self.root.parts) if image.is_relative_to(self.root) else 0
        levels = [level for level, part in enumerate(parts) if part.lower() == "images" and level >= first]
        if levels:
            for name in ("labels", "Labels"):
                yield Path(*parts[: levels[-1]], name, *parts[levels[-1] + 1 :])
        yield image.parent
        if len(parts) > first:
            yield image.parent.parent / "labels"

    def _list(self, folder: Path) -> dict[str, str]:
        """Return the names of the text files in a folder, by their normalized form."""
        if folder not in self._listings:
            names = os.listdir(folder) if folder.is_dir() else []
            texts = (name for name in names if name.endswith(".txt") and not name.startswith("."))
            self._listings[folder] = {unicodedata.normalize("NFC", name): name for name in texts}
        return self._listings[folder]

    def notes(self, split: str, images: Sequence[YoloImage]) -> Iterator[str]:
        """Yield what is unusual about the label files of a split."""
        labelled = [image for image in images if image.label_path is not None]
        unusual = [image for image in labelled if image.label_path != self.usual_path(image.path)]
        if unusual:
            yield (
                f"{len(unusual)} label files of {split!r} do not have the usual name or folder, such as"
                f" {unusual[0].label_path} of {unusual[0].path}. They are read."
            )
        if not labelled:
            yield (
                f"None of the {len(images)} images of {split!r} has a label file, such as"
                f" {self.usual_path(images[0].path)}. They are read as images without objects."
            )

    def usual_path(self, image: Path) -> Path:
        """Return where YOLO keeps the label file of an image."""
        return next(self.folders(image)) / f"{image.stem}.txt"

    def unused(self, images: Sequence[YoloImage], used: set[Path | None]) -> list[Path]:
        """Return the files beside the label files of these images that belong to no image."""
        folders = {image.label_path.parent for image in images if image.label_path is not None}
        folders -= {image.path.parent for image in images}
        files = (folder / name for folder in folders for name in self._list(folder).values())
        return sorted(file for file in files if file not in used and file.name != "classes.txt")
