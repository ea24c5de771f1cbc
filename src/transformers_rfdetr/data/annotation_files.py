"""What the readers of annotation programs have in common: find files, collect problems, number classes, name splits.

Each reader returns [`AnnotatedFiles`]. `load.py` makes samples of them, and `checks.readers` reports their problems, so
that both read a format alike. The readers are ours because the libraries that read these formats lose a part of them:
`supervision`, for example, reads every mask into memory and knows no holes, groups or ignored objects.
"""

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from transformers.utils import logging

from .annotation_records import AnnotatedSplit, Record
from .geometry import Geometry, join
from .image_files import is_outside, visible_files
from .label_maps import canonical_split_name, check_class_names, read_class_names, validate_classes
from .text_files import read_text

logger = logging.get_logger(__name__)

MAX_FILE_BYTES = 1 << 29  # of an annotation file, except COCO's
_NUM_SAMPLES = 20  # files of a folder that are parsed to recognise its format
_SPLITS = ("train", "validation", "test")


class Part(NamedTuple):
    """A part of an object, or all of it."""

    class_name: str | None
    geometry: Geometry
    fields: Mapping[str, int] = {}  # further fields of the annotation; an object has the highest value of its parts


@dataclass
class AnnotatedImage:
    """An image as an annotation file describes it."""

    file_name: str  # relative to the folder of the images
    size: tuple[int, int] | None = None  # (H, W) as declared
    # Class name, COCO annotation. The name is None in data that do not name their only class.
    objects: list[tuple[str | None, dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # objects that cannot be read; each names the file and the object

    @contextmanager
    def collect_problem(self, where: str) -> Iterator[None]:
        """Keep an error about an object, whose values may be anything, as a problem at a place, `where`."""
        try:
            yield
        except KeyError as error:
            self.problems.append(f"{where}: {error!s:.60} is missing. Correct or remove the object.")
        except ValueError as error:
            self.problems.append(f"{where}: {error}")
        except (TypeError, AttributeError, IndexError, OverflowError) as error:
            self.problems.append(f"{where}: its values are invalid ({error!s:.200}). Correct or remove the object.")

    def add_parts(self, parts: Mapping[Any, Sequence[Part]], where: str) -> None:
        """Add one object for each key: the union of its parts."""
        for group in parts.values():
            with self.collect_problem(where):
                fields = {name: max(part.fields[name] for part in group) for name in group[0].fields}
                annotation = join([part.geometry for part in group], self.size)
                self.objects.append((group[0].class_name, {**annotation, **fields}))


@dataclass
class AnnotatedFiles:
    """A dataset as the files of an annotation program describe it."""

    source: Path  # what errors name
    image_folder: Path
    splits: dict[str, list[AnnotatedImage]] = field(default_factory=dict)
    class_names: set[str] = field(default_factory=set)  # defined ones, beside those that the objects have
    notes: list[str] = field(default_factory=list)  # what is not read as it is written
    problems: list[str] = field(default_factory=list)  # files that cannot be read

    @contextmanager
    def collect_problem(self) -> Iterator[None]:
        """Keep an error about one of many files as a problem."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))

    def read_json_files(
        self, paths: Iterable[Path], is_format: Callable[[Any], bool], program: str
    ) -> Iterator[tuple[Path, Any]]:
        """Yield each file of a program with its content; note other files."""
        for path in logging.tqdm(paths, desc="Reading annotations", unit=" files", delay=2):
            with self.collect_problem():
                content = read_json(path)
                if is_format(content):
                    yield path, content
                else:
                    self.notes.append(f"{path} is not a file of {program} and is not read.")

    def add_images(self, splits: Sequence[str], images: Iterable[AnnotatedImage]) -> None:
        """Add each image to its split."""
        for split, image in zip(splits, images, strict=True):
            self.splits.setdefault(split, []).append(image)

    def numbered(self, classes: Mapping[int, str]) -> list[tuple[str, list[Record]]]:
        """Return each split with the records of its images; train, validation and test come first."""
        numbered = []
        ids = {name: category_id for category_id, name in classes.items()}
        for split in sorted(self.splits, key=lambda name: (*_SPLITS, name).index(name)):
            records = []
            for image_id, image in enumerate(self.splits[split]):
                sides = {} if image.size is None else {"width": image.size[1], "height": image.size[0]}
                annotations = [
                    {"category_id": ids.get(name, 1), **annotation}  # the only class, if data do not name it
                    for name, annotation in image.objects
                ]
                head = {"image_id": image_id, "file_name": image.file_name, **sides}
                records.append({**head, "annotations": annotations})
            numbered.append((split, records))
        return numbered


def common_classes(parts: Sequence[AnnotatedFiles], class_names: Any = None) -> dict[int, str]:
    """Return the classes of all files: the names in alphabetical order, numbered from 1.

    Args:
        parts: The files.
        class_names: None, or the classes that the data must have. It names the class of data that do not name theirs.

    Raises:
        ValueError: `class_names` differs from the data.
    """
    images = (image for files in parts for images in files.splits.values() for image in images)
    names = {name for image in images for name, _ in image.objects}
    defined = set().union(*(files.class_names for files in parts))
    if names == {None} and not defined:
        given = ["object"] if class_names is None else list(validate_classes(read_class_names(class_names)).values())
        if len(given) != 1:
            raise ValueError(f"`class_names` must have one name for data of one class, got {given!r:.200}. Give one.")
        return {1: given[0]}
    classes = dict(enumerate(sorted(name for name in names | defined if name is not None), start=1))
    check_class_names(class_names, classes)
    return classes


def read_annotated_splits(parts: Sequence[AnnotatedFiles], class_names: Any) -> dict[str, AnnotatedSplit]:
    """Return the splits for loading.

    Raises:
        ValueError: a file or an object cannot be read, or there is no image or no class.
    """
    problems = [problem for files in parts for problem in files.problems]
    for images in (images for files in parts for images in files.splits.values()):
        problems += [problem for image in images for problem in image.problems]
    if problems:
        more = f" ({len(problems) - 1} more; check-dataset lists them)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")
    classes = common_classes(parts, class_names)
    for files in parts:
        for note in files.notes:
            logger.warning(f"{files.source}: {note}")
        if not classes or not files.splits:
            missing = "an object" if files.splits else "an image"
            raise ValueError(f"{files.source} must have {missing}, got none. Annotate it, or export it again.")
    return {
        split: AnnotatedSplit(str(files.source), classes, records, files.image_folder)
        for files in parts
        for split, records in files.numbered(classes)
    }


# Files


class SourceFiles:
    """The files of a source, which all readers look at to recognise their format. Each is read once.

    Args:
        source: A file or a folder. It need not exist.
        split: The split that all files belong to. By default the name of a folder decides.
    """

    def __init__(self, source: str | os.PathLike[str], split: str | None = None) -> None:
        self.source, self._split = Path(source).expanduser(), split
        self.is_folder = self.source.is_dir()
        self.root = self.source if self.is_folder else self.source.parent

    def splits_of(self, paths: Sequence[Path]) -> list[str]:
        """Return the split of each file: the folder in its path that is called as a split, or else "train".

        Raises:
            ValueError: some files are in folders of splits, and others are not.
        """
        if self._split is not None:
            return [self._split] * len(paths)
        splits = [_folder_split(path.relative_to(self.root)) for path in paths]
        if None in splits and (named := sorted(set(splits) - {None})):
            path = paths[splits.index(None)]
            raise ValueError(
                f"files must all be in folders of splits, such as {', '.join(named)}, or all outside of them, got"
                f" {path} outside. Move it."
            )
        return [split or "train" for split in splits]

    @cached_property
    def paths(self) -> list[Path]:
        """All visible files, those of each folder in the order of their names."""
        if self.is_folder:
            return list(visible_files(self.source))
        return [self.source] if self.source.is_file() else []

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """Return the files with one of the suffixes, such as ".json"."""
        return [path for path in self.paths if path.suffix.lower() in suffixes]

    @cached_property
    def json_contents(self) -> dict[Path, Any]:
        """The contents of the first JSON files, except invalid ones and those of COCO, which may be very large."""
        contents = {}
        for path in self.with_suffix(".json")[:_NUM_SAMPLES]:
            if path.stat().st_size > MAX_FILE_BYTES:
                continue
            content = path.read_bytes()
            if all(key in content for key in (b'"images"', b'"annotations"', b'"categories"')):
                continue
            try:
                contents[path] = json.loads(content)
            except (ValueError, RecursionError):
                continue
        return contents

    def find_json(self, is_format: Callable[[Any], bool]) -> list[Path]:
        """Return all JSON files if one of the first has a format; the reader notes those that do not."""
        return self.with_suffix(".json") if any(map(is_format, self.json_contents.values())) else []


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: the file cannot be read, is too large or is not JSON.
    """
    _check_file_size(path)
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        prefix = "" if str(path) in str(error) else f"{path} must be a JSON file: "
        raise ValueError(f"{prefix}{error}. Export it again.") from error


def _check_file_size(path: Path) -> None:
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path} must have at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}. Split it, or raise"
            " transformers_rfdetr.data.annotation_files.MAX_FILE_BYTES."
        )


class _TreeBuilder(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE before its entities, which a few lines can expand to gigabytes, are read."""

    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise ValueError("it must not have a DOCTYPE, whose entities may expand in memory. Remove the DOCTYPE.")


def read_xml(path: Path) -> ElementTree.Element:
    """Return the root element of an XML file.

    Raises:
        ValueError: the file cannot be read, is too large or is not XML, or has a DOCTYPE.
    """
    _check_file_size(path)
    try:
        return ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_TreeBuilder()))
    except (OSError, ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"{path} must be an XML file: {error}. Export it again.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _folder_split(path: Path) -> str | None:
    names = (re.sub(r"^stage\d+_|\d+$", "", part) for part in path.parts[:-1])  # stage1_train, train2017
    return next((split for name in names if (split := canonical_split_name(name)) in _SPLITS), None)


class ImageLocator:
    """Find the images that annotation files name.

    Args:
        root: The folder of the dataset.
        image_folder: The folder of the images that the user gave, or None.

    Raises:
        ValueError: `image_folder` is a mapping.
    """

    def __init__(self, root: Path, image_folder: Any) -> None:
        if isinstance(image_folder, Mapping):
            raise ValueError(f"`image_folder` must be one folder for {root}, got {image_folder!r:.80}. Give a folder.")
        self.is_given = image_folder is not None
        self.folder = Path(image_folder).expanduser() if self.is_given else root

    def name(self, given: Any, *folders: Path) -> str:
        """Return the path of an image relative to the folder: of an existing file, or else of the one that is missing.

        Args:
            given: The path that the annotation file has, also of another computer.
            folders: Where the path is relative to, inside the root; unused if the user gave a folder.

        Raises:
            ValueError: `given` is not a file name.
        """
        if not isinstance(given, str) or not given or "\0" in given:
            raise ValueError(f"the name of the image must be a string, got {given!r:.60}. Correct it.")
        path = given.replace("\\", "/")
        bases = [self.folder] if self.is_given else folders or [self.folder]
        relative = [os.path.relpath(os.path.join(base, path), self.folder) for base in bases]
        beside = [os.path.relpath(os.path.join(base, posixpath.basename(path)), self.folder) for base in bases]
        existing = (name for name in [*relative, *beside] if self.contains(name))
        return next(existing, path if path.startswith("/") else relative[0])

    def contains(self, name: str) -> bool:
        """Return whether a path relative to the folder is a file in it."""
        return not is_outside(self.folder, name) and os.path.isfile(self.folder / name)
