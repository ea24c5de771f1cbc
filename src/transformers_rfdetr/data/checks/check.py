"""A data set read from front to back: everything in it that would be lost or mean something else, and a repaired copy.

H W pixels of a picture. Sizes are (H, W), boxes COCO's [x, y, width, height] in pixels of the upright picture. Where a
reader stops at the first defect, here every one is counted; each annotation is held against the rules once, which says
at the same time what stands in its place in a repaired copy.
"""

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.ExifTags import Base
from pycocotools import mask as coco_mask
from transformers.utils import logging

from ...atomic_files import atomic_directory, atomic_file, escape_unprintable, is_partial
from ...model.coco_labels import clip_box
from ...model.image_io import open_image, read_rgb
from ...model.masks import Segmentation, box_and_area, read_segmentation, to_rle
from ...model.validation import are_numbers, is_index, to_builtin
from ..annotation_records import has_segmentation, with_box_and_area
from ..coco import find_coco_files, grouping_category_ids, read_coco_file
from ..drawing import draw_instances
from ..hub_rows import ArrowRows, is_hub_split, load_rows, read_hub_rows
from ..image_files import IMAGE_SUFFIXES, is_outside, upright_size
from ..label_maps import common_label_map, split_name
from ..text_files import read_text
from ..yolo import find_yolo_file, list_yolo_images, parse_yolo_line, read_data_yaml, yolo_label_path
from .repair import RepairedCopy, free_ids, json_value

SEVERITIES = ("error", "warning", "info")
# Kind -> severity, and what it means and what to do. An error loses data, changes their meaning, or stops a reader.
KINDS = {
    # pictures
    "unreadable_image": ("error", "the file cannot be opened as a picture; replace it or take the image out"),
    "empty_file": ("error", "the file has no content; copy it again or take the image out"),
    "truncated_image": ("error", "the file is damaged or ends early; copy it again or take the image out"),
    "huge_image": ("error", "Pillow refuses so many pixels, as an attack; scale the picture down or cut it into tiles"),
    "exif_rotation": ("info", "EXIF turns the picture and it is read upright; not every program does that"),
    "exif_frame_unknown": (
        "warning",
        "EXIF turns the picture, and its size does not tell whether the objects were drawn upright; see an overlay",
    ),
    "exif_swapped_size": (
        "error",
        "height and width are those before EXIF's rotation; give the upright picture's, or remove the EXIF tag",
    ),
    "size_mismatch": ("error", "height and width are not the file's; correct them, or pair the image with its file"),
    "missing_size": ("info", "height or width is missing; it is taken from the file, which not every program does"),
    "image_without_objects": ("info", "it is trained on as background"),
    "all_objects_lost": ("warning", "no object of the image can be used, and what shows them is no background"),
    "too_many_objects": ("warning", "a model cannot find more objects than it has queries; cut the picture into tiles"),
    # images of the annotation file
    "invalid_image": ("error", "an entry of 'images' is no dict; remove it"),
    "invalid_image_id": ("error", "an image needs an id, a number or a text; number the images"),
    "duplicate_image_id": ("error", "two images have one id, so that annotations cannot be told apart; renumber one"),
    "missing_file": ("error", "the image has no file; give the folder of the pictures, or remove the image"),
    "unsafe_file_name": ("error", "the file name leaves the folder of the pictures, and is not read; correct it"),
    "duplicate_file_name": ("warning", "two images are one file, each with a part of its objects; merge them"),
    "unlisted_file": ("warning", "a picture beside the others that no image names; it is not used"),
    "duplicate_image": ("warning", "the same file is in the split twice; remove one"),
    "near_duplicate_across_splits": (
        "warning",
        "a picture of another split looks the same, and an evaluation says too much; keep both in one split",
    ),
    # categories
    "no_categories": ("error", "no category can be used, so that every object is lost; define and number them"),
    "invalid_category": ("error", "a category needs a whole number of at least 0 as id; number the categories"),
    "duplicate_category_id": ("error", "two categories have one id; renumber one, and its objects"),
    "duplicate_category_name": ("error", "two categories have one name; name them apart, or give all objects one id"),
    "categories_differ": ("error", "all splits need the categories of the first, under the same ids and names"),
    "unknown_category": ("error", "the object's category is not defined; define it, or correct the object"),
    "unused_category": ("info", "no object of the split has this category"),
    "class_imbalance": ("info", "some classes have at least ten times the objects of others"),
    # annotations
    "invalid_annotation": ("error", "an annotation cannot be read; correct or remove it"),
    "invalid_annotation_id": ("warning", "ids are whole numbers from 1 on; pycocotools takes 0 for 'not matched'"),
    "duplicate_annotation_id": ("error", "two annotations have one id, and pycocotools loses one; renumber them"),
    "annotation_of_missing_image": ("error", "its image is not there; add the image or remove the annotation"),
    "invalid_label_line": ("error", "a line of a YOLO label file cannot be read; correct or remove it"),
    "invalid_iscrowd": ("error", "iscrowd is 0 or 1; correct it"),
    "crowd": ("info", "crowds are left out of training, and ignored in evaluation"),
    # boxes and areas
    "invalid_box": ("error", "a box is four finite numbers [x, y, width, height] in pixels; correct or remove it"),
    "empty_box": ("error", "width or height is 0, and the object is lost; correct the box"),
    "inverted_box": ("error", "width or height is negative; boxes are [x, y, width, height], not two corners"),
    "box_outside": ("error", "the box lies outside the picture, and the object is lost; correct the box"),
    "box_beyond_edge": ("warning", "the box reaches out of the picture by more than a pixel; it is clipped"),
    "box_mask_mismatch": ("warning", "the box is not the mask's: more than 2 pixels and 5 % of its longer side off"),
    "missing_box": ("info", "the box is missing; it is taken from the mask"),
    "no_box_or_mask": ("error", "neither a box nor a mask can be read, and the object is lost; give one"),
    "invalid_area": ("error", "an area is a number of at least 0; correct it, or leave it out"),
    "area_mismatch": (
        "warning",
        "the area is not the mask's, or larger than the box, and objects count as small, medium or large by it",
    ),
    "missing_area": ("info", "the area is missing; it is taken from the mask, or from the box"),
    # shapes
    "polygon_odd_numbers": ("error", "a polygon is x0, y0, x1, y1, ...: an even number of numbers; correct it"),
    "polygon_not_finite": ("error", "a polygon holds NaN or infinity; correct it"),
    "short_polygon": ("warning", "a polygon of fewer than three points encloses nothing; remove it"),
    "empty_segmentation": ("error", "the segmentation covers no pixel of the picture, and the mask is lost; draw it"),
    "self_intersecting_polygon": ("warning", "edges of a polygon cross, and parts may be missing; draw it again"),
    "polygon_outside": ("warning", "a polygon reaches out of the picture by more than a pixel; it is cut at the edge"),
    "rle_of_another_size": ("error", "the RLE is of another size than the picture; encode it at the picture's size"),
    "rle_corrupt": ("error", "the RLE cannot be decoded; encode the mask again"),
    "invalid_segmentation": ("error", "polygons, an RLE or a bitmap of 0 and 1 are read; convert the segmentation"),
    "object_without_mask": ("warning", "others have masks; trained with masks, this object is background"),
}
_MOST_EXAMPLES = 5
_MOST_OVERLAYS = 50
_LEFT_OUT = "left out"
_ALIKE_BITS = 2  # of 64, in which the hashes of two pictures that look the same may differ
_IMBALANCE = 10
_MOST_PAIRS = 1 << 20  # of edges of one polygon that are looked at for a crossing: half a second
_LONGEST_STEM = 50
_UNREADABLE = (ValueError, TypeError, OverflowError)  # what reading the numbers of a JSON may raise


class Problem(NamedTuple):
    """One thing that is odd. `change` is what a repaired copy has instead, None where it has the same."""

    kind: str  # of KINDS
    detail: str = ""
    annotation_id: Any = None
    change: str | None = None


@dataclass
class Finding:
    """All problems of one kind in a split.

    `examples` are the first five, dicts of image_id, file_name, annotation_id (each may be None) and detail.
    """

    kind: str
    severity: str
    split: str
    count: int
    rule: str
    examples: list[dict[str, Any]]


@dataclass
class DataReport:
    """What [`check_dataset`] found; `str` of it is for people, `to_dict()` for JSON.

    Attributes:
        source: What was read.
        splits: For each split `images`, `objects` (without crowds), `objects_with_mask`, `crowds`,
            `images_without_objects` and `classes`, objects by name.
        findings: Errors first, the most frequent first.
    """

    source: str
    splits: dict[str, dict[str, Any]]
    findings: list[Finding]

    @property
    def has_errors(self) -> bool:
        """Whether anything would be lost, mean something else, or stop a reader."""
        return any(finding.severity == "error" for finding in self.findings)

    def count(self, kind: str, split: str | None = None) -> int:
        """How many problems of a kind there are, in one split or in all."""
        return sum(found.count for found in self.findings if found.kind == kind and split in (None, found.split))

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON knows."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for name, counts in self.splits.items():
            common = sorted(counts["classes"].items(), key=lambda item: -item[1])
            classes = ", ".join(f"{label:.60} {number}" for label, number in common[:8]) + ", ..." * (len(common) > 8)
            lines.append(
                f"{name}: {counts['images']} images, {counts['images_without_objects']} of them without objects;"
                f" {counts['objects']} objects, {counts['objects_with_mask']} with a mask; {counts['crowds']} crowds"
                + f"; {classes}"
                * bool(classes)
            )
        for found in self.findings:
            lines.append(f"{found.severity:8}{found.count:>7}  {found.kind} ({found.split}): {found.rule}")
            lines += [f"{'':17}{_place(example)}" for example in found.examples]
        totals = Counter(found.severity for found in self.findings for _ in range(found.count))
        lines.append(", ".join(f"{severity}: {totals[severity]}" for severity in SEVERITIES))
        return "\n".join(map(escape_unprintable, lines))


def _place(example: Mapping[str, Any]) -> str:
    """An example in a line."""
    names = [example["file_name"] if example["image_id"] is None else f"image {example['image_id']!r:.40}"]
    if example["image_id"] is not None and example["file_name"] is not None:
        names = [f"{names[0]} ({example['file_name']!s:.80})"]
    if example["annotation_id"] is not None:
        names.append(f"annotation {example['annotation_id']!r:.40}")
    where = ", ".join(str(name) for name in names if name is not None)
    return ": ".join(part for part in (where, example["detail"]) if part)


def check_dataset(
    source: Any,
    *,
    image_folder: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    num_queries: int = 200,
    workers: int | None = None,
    fix: str | os.PathLike[str] | None = None,
    overlays: str | os.PathLike[str] | None = None,
) -> DataReport:
    """Read every picture and every annotation, and list what is wrong or odd, without stopping at it.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from transformers_rfdetr.data.checks.check import check_dataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset
        >>> folder = Path(tempfile.mkdtemp())
        >>> pictures, coco = draw_dataset(4)
        >>> for picture, image in zip(pictures, coco["images"]):
        ...     picture.save(folder / image["file_name"])
        >>> coco["annotations"][0]["bbox"] = [500, 500, 10, 10]
        >>> _ = (folder / "train.json").write_text(json.dumps(coco))
        >>> report = check_dataset(folder / "train.json")
        >>> [(found.kind, found.count) for found in report.findings if found.severity == "error"]
        [('box_outside', 1)]

    Args:
        source: What `load_instance_dataset` reads, but no stream: a COCO JSON, a mapping of splits to such files, a
            folder with train/_annotations.coco.json or annotations/instances_*.json, a data.yaml of YOLO, rows of the
            library datasets or a data set id on the Hub.
        image_folder: The pictures of a COCO JSON, or a mapping of splits to folders; of YOLO, the folder that places
            are relative to.
        num_queries: Of the model that is to be trained.
        workers: Threads that read pictures; as many as there are cores by default.
        fix: A new folder for a repaired copy in COCO's form, with the pictures as hard links where that is possible,
            and `changes.json`: `changes` lists what is not as it was, `left` what is as odd as before. What has one
            reading is repaired; annotations that have none are left out, and so are images that have none, or that
            have lost all of their objects. Reading the copy finds no error.
        overlays: A folder for at most 50 pictures with their annotations drawn over them, those with errors and
            warnings first.

    Returns:
        What was found. Each kind, its severity and rule stand in `KINDS`.

    Raises:
        ValueError: the source cannot be read at all, or no category of it can be used and there is nothing to `fix`;
            `fix` is not empty, or one of the folders lies in the source.
    """
    splits = _read_source(source, image_folder)
    for split in splits:
        if not re.fullmatch(r"\w[\w.-]*", split.name):
            raise ValueError(f"{split.name!r:.60} is no name of a split; give letters, digits, dots and hyphens")
    for option, folder in (("fix", fix), ("overlays", overlays)):
        if folder is not None:
            _check_output(option, Path(folder), _roots(source, splits))
    if fix is not None and any(split.folder is None for split in splits):
        raise ValueError("fix repairs files, and these are rows of datasets; correct them with `Dataset.map`")
    _check_categories(splits)
    if fix is not None and not any(split.head()["categories"] for split in splits):
        raise ValueError("no category can be used, and a repaired copy would hold no object; define and number them")
    findings = _Findings(is_listed=fix is not None)
    gallery = None if overlays is None else _Gallery()
    twins, counts = _Twins(), {}
    with nullcontext() if fix is None else atomic_directory(Path(fix).expanduser()) as folder:
        copy = None if folder is None else RepairedCopy(folder, {split.name: split.head() for split in splits})
        for split in splits:
            for problem in split.problems:
                findings.add(split.name, problem)
            counts[split.name] = tally = _Tally(images=len(split.images))
            for image, seen in _look_at_all(split, num_queries, workers):
                tally.add(seen)
                seen.problems += twins.compare(split.name, image, seen.picture)
                for problem in seen.problems:
                    findings.add(split.name, problem, image, in_copy=seen.way is not None)
                if copy is not None and seen.way is not None:
                    copy.add(split.name, image.repaired(seen.size, split.folder), seen.repaired, image.source, seen.way)
                if gallery is not None:
                    gallery.offer(split, image, seen)
            twins.end_split()
            for problem in tally.compare_classes():
                findings.add(split.name, problem)
        for split, path in _unlisted(splits):
            findings.add(split.name, Problem("unlisted_file", str(path)))
        if not any(tally.objects_with_mask for tally in counts.values()):
            findings.forget("object_without_mask")  # a data set of boxes
        if copy is not None:
            copy.write(findings.changes, findings.left)
    if gallery is not None:
        gallery.write(Path(overlays))
    return DataReport(str(source), {name: tally.to_dict() for name, tally in counts.items()}, findings.sorted())


@dataclass
class _Tally:
    """What a split holds."""

    images: int
    objects: int = 0
    objects_with_mask: int = 0
    crowds: int = 0
    images_without_objects: int = 0
    classes: Counter[str] = field(default_factory=Counter)

    def add(self, seen: "_Seen") -> None:
        self.objects += seen.objects
        self.objects_with_mask += seen.masks
        self.crowds += seen.crowds
        self.images_without_objects += not seen.objects
        self.classes += seen.classes

    def compare_classes(self) -> Iterator[Problem]:
        """Notes a class imbalance."""
        if len(self.classes) > 1:
            (most, many), *_, (least, few) = self.classes.most_common()
            if many >= _IMBALANCE * few:
                detail = f"most {most!r:.60} with {many}, least {least!r:.60} with {few}: {many / few:.0f} times"
                yield Problem("class_imbalance", detail)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"classes": dict(self.classes)}


class _Findings:
    """Problems on their way into the report, and into the list of changes."""

    def __init__(self, is_listed: bool) -> None:
        self._found: dict[tuple[str, str], Finding] = {}
        self._is_listed = is_listed  # for changes.json
        self.changes: list[dict[str, Any]] = []
        self.left: list[dict[str, Any]] = []

    def add(self, split: str, problem: Problem, image: "_Image | None" = None, in_copy: bool = True) -> None:
        """Counts a problem; what is odd about an image that is not in the copy is not listed beside that."""
        severity, rule = KINDS[problem.kind]
        found = self._found.setdefault((problem.kind, split), Finding(problem.kind, severity, split, 0, rule, []))
        found.count += 1
        place = {
            "image_id": None if image is None else json_value(image.id),
            "file_name": None if image is None else json_value(image.name),
            "annotation_id": json_value(problem.annotation_id),
            "detail": problem.detail,
        }
        if len(found.examples) < _MOST_EXAMPLES:
            found.examples.append(place)
        if not self._is_listed:
            return
        entry = {"kind": problem.kind, "split": split, **place}
        if problem.change is not None and (in_copy or problem.change.startswith(_LEFT_OUT)):
            self.changes.append(entry | {"change": problem.change})
        elif severity != "info" and in_copy:
            self.left.append(entry)

    def forget(self, kind: str) -> None:
        self._found = {key: found for key, found in self._found.items() if key[0] != kind}
        self.left = [entry for entry in self.left if entry["kind"] != kind]

    def sorted(self) -> list[Finding]:
        return sorted(self._found.values(), key=lambda found: (SEVERITIES.index(found.severity), -found.count))


# What the data say


@dataclass
class _Image:
    """An entry of `images`, with its annotations and the ids that these have in a repaired copy."""

    record: dict[str, Any]
    source: Any = None  # a path, or a function that gives a path, the bytes of a file or a PIL picture
    copy_id: Any = None
    is_kept: bool = True  # in a repaired copy
    annotations: list[dict[str, Any]] = field(default_factory=list)
    copy_ids: list[int] = field(default_factory=list)  # of the annotations
    problems: list[Problem] = field(default_factory=list)

    @property
    def id(self) -> Any:
        return self.record.get("id")

    @property
    def name(self) -> Any:
        return self.record.get("file_name")

    def repaired(self, size: tuple[int, int], folder: Path) -> dict[str, Any]:
        """The entry in a repaired copy of what lies in a folder."""
        name = os.path.relpath(os.path.join(folder, self.name), folder)
        return self.record | {"id": self.copy_id, "file_name": name, "height": size[0], "width": size[1]}

    def leave_out(self, kind: str, detail: str, why: str = "") -> None:
        self.problems.append(Problem(kind, detail, change=f"{_LEFT_OUT}{why}"))
        self.is_kept = False


@dataclass
class _Split:
    """What was read of a split, with the problems that are not one image's."""

    name: str
    folder: Path | None  # of the pictures; None of rows
    categories: list[dict[str, Any]] = field(default_factory=list)  # those with an id
    classes: dict[int, str] = field(default_factory=dict)
    unclear: set[int] = field(default_factory=set)  # category ids that stand for two names
    groups: set[int] = field(default_factory=set)  # categories that only group others
    images: list[_Image] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)  # info, licenses, ...

    def note(self, kind: str, detail: str, annotation_id: Any = None, change: str | None = _LEFT_OUT) -> None:
        self.problems.append(Problem(kind, detail, annotation_id, change))

    def head(self) -> dict[str, Any]:
        """What a repaired copy has of it, but for images and annotations."""
        known = [entry for entry in self.categories if entry["id"] not in self.unclear | self.groups]
        categories = [entry | {"name": _named(entry)["name"]} for entry in known]
        return {**self.rest, "images": [], "annotations": [], "categories": categories}

    def used(self) -> set[Any]:
        """The category ids of the annotations, as far as they are defined."""
        given = (as_index(annotation.get("category_id")) for image in self.images for annotation in image.annotations)
        return set(given) & {category["id"] for category in self.categories}


# (position, entry of `images`) -> its source, and what is wrong with it
_Find = Callable[[int, Mapping[str, Any]], tuple[Any, Problem | None]]


def _read_source(source: Any, image_folder: Any) -> list[_Split]:
    is_mapping = isinstance(source, Mapping) and source
    if is_hub_split(source) or (is_mapping and all(map(is_hub_split, source.values()))):
        return _row_splits(source)
    if not is_mapping and not isinstance(source, str | os.PathLike):
        raise ValueError(f"{source!r:.200} is no source of data; give a folder, a COCO JSON or a data.yaml")
    path = None if is_mapping else Path(source).expanduser()
    if files := find_coco_files(source if path is None else path):
        return [_coco_split(name, *found, image_folder) for name, found in files.items()]
    if yaml_file := find_yolo_file(path):
        return _yolo_splits(yaml_file, image_folder)
    if image_folder is not None:
        raise ValueError(f"image_folder is for COCO and YOLO files, and {path} is none; leave it out")
    return _row_splits(load_rows(source, False, {}))


def _coco_split(name: str, path: Path, folders: Sequence[Path], image_folder: Any) -> _Split:
    given = image_folder.get(name) if isinstance(image_folder, Mapping) else image_folder
    coco = read_coco_file(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list) and (key != "annotations" or coco.get(key) is not None):
            kind = type(coco[key]).__name__ if key in coco else "missing"
            raise ValueError(f"{path}: {key!r} is {kind}, not a list as in COCO's instances JSON; export it again")
    folders = folders if given is None else [Path(given).expanduser()]
    first = [entry for entry in coco["images"] if isinstance(entry, Mapping)][:50]
    folder = max(folders, key=lambda folder: sum(_find_file(folder, 0, entry)[1] is None for entry in first))
    return _build_split(name, coco, folder, partial(_find_file, folder))


def _find_file(folder: Path, position: int, entry: Mapping[str, Any]) -> tuple[Path | None, Problem | None]:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        return None, Problem("missing_file", f"file_name is {name!r:.60}", change=_LEFT_OUT)
    if is_outside(folder, name):
        return None, Problem("unsafe_file_name", f"{name!r:.200} in {folder}", change=_LEFT_OUT)
    path = folder / name
    if not os.path.isfile(path):
        return None, Problem("missing_file", f"{str(path)[:300]} is not there", change=_LEFT_OUT)
    return path, None


def _build_split(name: str, coco: Mapping[str, Any], folder: Path | None, find: _Find) -> _Split:
    """COCO's three lists of whatever they hold -> images with their annotations, and problems."""
    split = _Split(name, folder, rest={key: coco[key] for key in coco.keys() - {"images", "annotations", "categories"}})
    for category in coco["categories"]:
        number = as_index(category.get("id")) if isinstance(category, Mapping) else None
        if number is not None:
            split.categories.append(category | {"id": number})
        if number is None or not is_index(category["id"]):
            split.note("invalid_category", f"{category!r:.80}", change=_LEFT_OUT if number is None else f"id {number}")
    by_id, pairs = _build_images(split, coco["images"], find)
    _attach_annotations(split, coco.get("annotations") or [], by_id)
    free = free_ids(by_id)
    for first, second in pairs:
        detail = f"{first.id!r:.40} is {first.name!r:.80} too"
        if first.annotations:  # of which picture, nobody knows
            first.is_kept = False
            second.leave_out("duplicate_image_id", detail, ", both images with their annotations")
        else:
            second.copy_id = next(free)
            second.problems.append(Problem("duplicate_image_id", detail, change=f"id {second.copy_id}"))
    return split


def _build_images(
    split: _Split, entries: Iterable[Any], find: _Find
) -> tuple[dict[Any, _Image], list[tuple[_Image, _Image]]]:
    """Fills in the images -> those by id, and pairs of different files with one id."""
    by_id: dict[Any, _Image] = {}
    by_name: dict[str, _Image] = {}
    pairs = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            split.note("invalid_image", f"entry {position} is {entry!r:.60}")
            continue
        image = _Image(dict(entry), copy_id=entry.get("id"))
        split.images.append(image)
        image.source, problem = find(position, entry)
        if problem is not None:
            image.problems.append(problem)
            image.is_kept = False
        if not _is_id(image.id):
            image.leave_out("invalid_image_id", f"id {image.id!r:.40}")
            continue
        first = by_id.setdefault(image.id, image)
        if first is not image and _path_of(first) == _path_of(image) is not None:
            image.leave_out("duplicate_image_id", f"{image.id!r:.40} is the same entry twice")
            image.source = None
        elif first is not image:
            pairs.append((first, image))
        elif (path := _path_of(image)) is not None and by_name.setdefault(path, image) is not image:
            detail = f"image {by_name[path].id!r:.40} is this file too"
            image.problems.append(Problem("duplicate_file_name", detail))
    return by_id, pairs


def _path_of(image: _Image) -> str | None:
    """The file name of an image without detours."""
    return os.path.normpath(image.name) if isinstance(image.name, str) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or are_numbers([value], 1)


def _attach_annotations(split: _Split, annotations: Sequence[Any], by_id: Mapping[Any, _Image]) -> None:
    given = (annotation.get("id") for annotation in annotations if isinstance(annotation, Mapping))
    free = free_ids({number for number in given if is_index(number)})
    taken: set[int] = set()
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, Mapping):
            split.note("invalid_annotation", f"entry {position} is {annotation!r:.60}")
            continue
        number, image_id = annotation.get("id"), annotation.get("image_id")
        image = by_id.get(image_id) if _is_id(image_id) else None
        if image is None:
            image = by_id.get(_other_form(image_id))
            detail = f"image_id {image_id!r:.40} is none of {len(by_id)}"
            if image is None:
                split.note("annotation_of_missing_image", detail, number)
                continue
            detail += f", and {image.id!r:.40} is"
            split.note("annotation_of_missing_image", detail, number, f"image_id {image.id!r:.40}")
        copy_id = number
        if not is_index(number) or number == 0 or number in taken:
            copy_id = next(free)
            kind = "duplicate_annotation_id" if is_index(number) and number else "invalid_annotation_id"
            image.problems.append(Problem(kind, f"id {number!r:.40}", number, f"id {copy_id}"))
        taken.add(copy_id)
        image.annotations.append(dict(annotation))
        image.copy_ids.append(copy_id)


def as_index(value: Any) -> int | None:
    """A whole number of at least 0, also one that is written as 3.0 or "3"; None for anything else."""
    is_text = isinstance(value, str) and value.isdecimal() and len(value) < 20
    if is_text or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return int(value) if is_index(value) else None


def _other_form(number: Any) -> Any:
    """A number as the text that some tools write, and the other way round; None for anything else."""
    return str(number) if is_index(number) else as_index(number)


def _yolo_splits(path: Path, image_folder: Any) -> list[_Split]:
    classes, root, places = read_data_yaml(path, image_folder)
    pictures = {key: list_yolo_images(root, place, key) for key, place in places.items()}
    known = {yolo_label_path(picture, root) for found in pictures.values() for picture in found}
    splits = []
    for key, found in pictures.items():
        images, problems = [], []
        annotations: list[dict[str, Any]] = []
        for number, picture in enumerate(logging.tqdm(found, desc=f"Labels of {key}", delay=2)):
            entry, objects, faults = _read_yolo_picture(number, picture, root, classes)
            images.append(entry)
            annotations += [{**item, "id": len(annotations) + i} for i, item in enumerate(objects, start=1)]
            problems.append(faults)
        categories = [{"id": number, "name": name} for number, name in classes.items()]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        split = _build_split(split_name(key), coco, root, partial(_find_listed, found))
        for image, faults in zip(split.images, problems, strict=True):
            image.problems += faults
        folders = {yolo_label_path(picture, root).parent for picture in found} - {picture.parent for picture in found}
        labels = {label for folder in folders for label in folder.glob("*.txt")} - known
        for label in sorted(label for label in labels if label.name != "classes.txt"):  # of programs that draw labels
            split.note("annotation_of_missing_image", f"{label} belongs to no picture")
        splits.append(split)
    return splits


def _read_yolo_picture(
    number: int, path: Path, root: Path, classes: Mapping[int, str]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Problem]]:
    """A picture and its label file -> an entry of `images`, annotations, and the lines that cannot be read."""
    is_below = path.is_relative_to(root)
    entry = {"id": number, "file_name": os.path.relpath(path, root) if is_below else f"{number}_{path.name}"}
    try:
        size = upright_size(path)
    except ValueError:  # which is reported when the picture is decoded
        return entry, [], []
    entry |= {"height": size[0], "width": size[1]}
    objects, problems = [], []
    labels = yolo_label_path(path, root)
    try:
        lines = read_text(labels).splitlines() if labels.is_file() else []
    except ValueError as error:
        return entry, [], [Problem("invalid_label_line", str(error), change=_LEFT_OUT)]
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = with_box_and_area(parse_yolo_line(line.split(), size, classes), size)
            objects.append({**found, "image_id": number})
        except ValueError as error:
            problems.append(
                Problem("invalid_label_line", f"{labels.name}, line {line_number}: {error}", change=_LEFT_OUT)
            )
    return entry, objects, problems


def _find_listed(sources: Sequence[Any], position: int, entry: Mapping[str, Any]) -> tuple[Any, Problem | None]:
    source = sources[position]
    if isinstance(source, Path) and not source.is_file():
        return None, Problem("missing_file", f"{str(source)[:300]} is not there", change=_LEFT_OUT)
    return source, None


def _row_splits(source: Any) -> list[_Split]:
    """Rows of the library datasets."""
    if not all(hasattr(split, "num_rows") for split in ([source] if is_hub_split(source) else source.values())):
        raise ValueError("these rows are streams; load them without streaming=True, to read all of them")
    rows, readers, classes = read_hub_rows(source)
    splits = []
    for name, split in rows.items():
        table = ArrowRows(split, readers[name])
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        given = []
        for index, record in enumerate(table.scan(f"Annotations of {name}")):
            objects = record.pop("annotations")
            given.append(record.pop("image_id", None))
            images.append({"id": index, **record})
            first = len(annotations) + 1
            annotations += [{"id": first + i, **item, "image_id": index} for i, item in enumerate(objects)]
        if all(map(is_index, given)):  # others are numbered by their rows when they are read
            for image, number in zip(images, given, strict=True):
                image["id"] = number
            for item in annotations:
                item["image_id"] = given[item["image_id"]]
        categories = [{"id": category, "name": text} for category, text in classes.items()]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        sources = [partial(table.encoded, index, {}) for index in range(len(images))]
        splits.append(_build_split(name, coco, None, partial(_find_listed, sources)))
    return splits


# Categories


def _check_categories(splits: Sequence[_Split]) -> None:
    used = {split.name: split.used() for split in splits}
    named = [{"categories": [_named(category) for category in split.categories]} for split in splits]
    groups = grouping_category_ids(named) - set().union(*used.values())
    for split in splits:
        split.groups = groups
        if not split.categories and any(image.annotations for image in split.images):
            split.note("no_categories", "", change=None)
        ids: dict[str, tuple[int, str, bool]] = {}  # of each name: id, group, and whether the data give it
        for category in split.categories:
            number, name, parent = _named(category).values()
            if number in split.classes:
                _note_second(split, number, name)
                continue
            split.classes[number] = name
            if number in groups:
                split.note("unused_category", f"{number} {name!r:.60} only groups others")
                continue
            is_named = isinstance(category.get("name"), str) and bool(name.strip())
            before = ids.setdefault(name, (number, parent, is_named))
            if before[0] != number:
                # Without a name, or in different groups, they may be different classes.
                is_one = before[1:] == (parent, True) and is_named
                if not is_one:
                    split.unclear |= {before[0], number}
                change = "merged" if is_one else "left out, with their objects: whether they are one cannot be told"
                split.note("duplicate_category_name", f"{before[0]} and {number}: {name!r:.60}", change=change)
            elif number not in used[split.name]:
                split.note("unused_category", f"{number} {name!r:.60}", change=None)
    wrong = {"no_categories", "duplicate_category_id", "duplicate_category_name"}
    if wrong & {problem.kind for split in splits for problem in split.problems}:
        return
    first = next((split for split in splits if split.name == "train"), splits[0])
    for split in splits:
        both = {s.name: {n: name for n, name in s.classes.items() if n not in groups} for s in (first, split)}
        try:
            common_label_map(both, {name: used[name] for name in both})
        except ValueError as error:
            split.note("categories_differ", str(error), change=f"numbered by name, as in {first.name!r}")


def _named(category: Mapping[str, Any]) -> dict[str, Any]:
    number = int(category["id"])
    parent = category.get("supercategory")
    return {"id": number, "name": str(category.get("name", number)), "supercategory": str(parent)}


def _note_second(split: _Split, number: int, name: str) -> None:
    """The second definition of a category id."""
    before = split.classes[number]
    change = "one definition is left out"
    if name != before:
        split.unclear.add(number)
        change = "left out, with its objects: which of the two they are cannot be told"
    split.note("duplicate_category_id", f"{number} is {before!r:.60} and {name!r:.60}", change=change)


# Pictures


class _Picture(NamedTuple):
    """What the file of an image is."""

    size: tuple[int, int] | None = None  # (H, W), upright; None where it cannot be read
    orientation: int = 1  # EXIF's: 1 is upright, from 5 on height and width are exchanged
    digest: bytes | None = None  # of the file
    look: int | None = None  # 64 bits: see _look_of
    problem: Problem | None = None


def _open(source: Any) -> BytesIO | BufferedReader:
    """The file of an image, or one of the pixels of a PIL picture."""
    value = source() if callable(source) else source
    if isinstance(value, PIL.Image.Image):
        buffer = BytesIO()
        value.save(buffer, "PNG")
        value = buffer.getvalue()
    return BytesIO(value) if isinstance(value, bytes) else open(value, "rb")


def _read_picture(source: Any) -> _Picture:
    """Decode the file of an image, all of it."""
    kind = "unreadable_image"
    try:
        with _open(source) as file:
            if not file.read(1):
                return _Picture(problem=Problem("empty_file", change=_LEFT_OUT))
            file.seek(0)
            picture = open_image(file)
            kind = "truncated_image"
            given = picture.getexif().get(Base.Orientation)  # which a TIFF no longer has when it is loaded, and upright
            picture.load()
            orientation = given if given in range(2, 9) else 1
            is_turned = picture.getexif().get(Base.Orientation, 1) != 1
            upright = PIL.ImageOps.exif_transpose(picture) if is_turned else picture
            kind = "unreadable_image"
            if upright.mode[0] in "IF":
                read_rgb(upright)  # which refuses values whose scale is unknown
            file.seek(0)
            digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).digest()
            return _Picture((upright.height, upright.width), orientation, digest, _look_of(upright))
    except PIL.Image.DecompressionBombError as error:
        return _Picture(problem=Problem("huge_image", str(error), change=_LEFT_OUT))
    except Exception as error:  # Pillow answers broken files with SyntaxError, struct.error, zlib.error and others
        return _Picture(problem=Problem(kind, str(error)[:200] or type(error).__name__, change=_LEFT_OUT))


def _look_of(picture: PIL.Image.Image) -> int | None:
    """A picture -> 64 bits, a difference hash: whether each of 8 x 9 areas is brighter than the one left of it.

    None of a picture that is nearly flat, whose bits are noise.
    """
    if picture.mode.startswith("I"):
        picture = picture.convert("I").convert("F")
    elif picture.mode == "LAB":
        picture = picture.convert("RGB").convert("L")
    elif picture.mode != "F":
        picture = picture.convert("L")
    # Scaled in two steps, since the first one rounds to whole grey levels.
    small = np.asarray(picture.resize((72, 64), PIL.Image.Resampling.BOX), np.float32)
    areas = small.reshape(8, 8, 9, 8).mean((1, 3))
    if not np.ptp(areas) > 0.02 * np.abs(areas).max():
        return None
    return int.from_bytes(np.packbits(areas[:, 1:] > areas[:, :-1]).tobytes(), "big")


class _Twins:
    """Finds pictures that were there before: the same file in a split, the same look in an earlier one."""

    def __init__(self) -> None:
        self._digests: dict[bytes, tuple[str, Any]] = {}  # first file -> split and name
        self._looks: list[int] = []
        self._places: list[tuple[str, Any]] = []
        self._earlier: np.ndarray = np.zeros(0, np.uint64)  # looks of the splits that have ended

    def compare(self, split: str, image: _Image, picture: _Picture) -> Iterator[Problem]:
        """What is to be said about a picture; it is there from now on."""
        if picture.digest is None:
            return
        place = (split, image.id if image.name is None else image.name)
        first = self._digests.setdefault(picture.digest, place)
        if first[0] != split:
            yield Problem("near_duplicate_across_splits", f"the same file as {first[1]!s:.80} of {first[0]}")
        elif first != place:
            yield Problem("duplicate_image", f"the same file as {first[1]!s:.80}")
        elif picture.look is not None:
            differing = self._earlier ^ np.uint64(picture.look)
            for _ in range(_ALIKE_BITS):
                differing &= differing - np.uint64(1)  # without its lowest bit
            for index in np.flatnonzero(differing == 0)[:1]:
                other, bits = self._places[index], (self._looks[index] ^ picture.look).bit_count()
                detail = f"{bits} of 64 bits differ from {other[1]!s:.80} of {other[0]}"
                yield Problem("near_duplicate_across_splits", detail)
        if picture.look is not None:
            self._looks.append(picture.look)
            self._places.append(place)

    def end_split(self) -> None:
        self._earlier = np.array(self._looks, np.uint64)


def _unlisted(splits: Sequence[_Split]) -> Iterator[tuple[_Split, Path]]:
    """Pictures that lie beside those that were found, and are none of them."""
    named = {
        os.path.abspath(image.source) for split in splits if split.folder for image in split.images if image.source
    }
    searched: set[str] = set()
    for split in splits:
        found = {
            os.path.dirname(os.path.abspath(image.source)) for image in split.images if split.folder and image.source
        }
        for folder in sorted(found - searched):
            searched.add(folder)
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.path not in named and entry.is_file():
                    yield split, Path(entry.path)


# One image


@dataclass
class _Seen:
    """What an image and its annotations are, and what a repaired copy has of them."""

    picture: _Picture
    problems: list[Problem]
    size: tuple[int, int] | None  # in the copy
    way: str | None  # how the picture goes into the copy: "link", "upright", "stored"; None: it does not
    repaired: list[dict[str, Any]] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)  # objects by name
    objects: int = 0  # without crowds
    crowds: int = 0
    masks: int = 0


def _look_at_all(split: _Split, num_queries: int, workers: int | None) -> Iterator[tuple[_Image, _Seen]]:
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and of large pictures
        seen = pool.map(partial(_look_at, split, num_queries), split.images)
        images = logging.tqdm(split.images, desc=f"Checking {split.name}", unit=" images")
        try:
            yield from zip(images, seen, strict=True)
        finally:  # also of an interruption, which would wait for all others otherwise
            pool.shutdown(wait=False, cancel_futures=True)


def _look_at(split: _Split, num_queries: int, image: _Image) -> _Seen:
    picture = _Picture() if image.source is None else _read_picture(image.source)
    size, way, problems = _settle_size(image, picture)
    if picture.problem is not None:
        problems.insert(0, picture.problem)
    seen = _Seen(picture, [*image.problems, *problems], size, way if image.is_kept else None)
    for annotation, copy_id in zip(image.annotations, image.copy_ids, strict=True):
        try:
            examined = _Examination(annotation, size, split.classes)
        except Exception as error:  # whatever a JSON can hold
            detail = f"{type(error).__name__} {error}"[:200]
            seen.problems.append(Problem("invalid_annotation", detail, annotation.get("id"), _LEFT_OUT))
            continue
        seen.problems += examined.problems
        if not examined.is_lost and examined.repaired["category_id"] not in split.unclear:
            seen.repaired.append({**examined.repaired, "id": copy_id})
        if examined.is_crowd:
            seen.crowds += 1
        else:
            seen.objects += 1
            seen.masks += examined.has_mask
            if examined.class_name is not None:
                seen.classes[examined.class_name] += 1
    num_given = len(image.annotations) + sum(problem.kind == "invalid_label_line" for problem in image.problems)
    if num_given and not seen.repaired:
        seen.way = None
        seen.problems.append(Problem("all_objects_lost", f"{num_given} objects", change=_LEFT_OUT))
    elif not seen.objects:
        seen.problems.append(Problem("image_without_objects"))
    if seen.objects > num_queries:
        seen.problems.append(Problem("too_many_objects", f"{seen.objects} objects, {num_queries} queries"))
    return seen


def _settle_size(image: _Image, picture: _Picture) -> tuple[tuple[int, int] | None, str | None, list[Problem]]:
    """The size that the annotations were drawn at, how the picture goes into a copy, and what is odd about both.

    Where data and file differ, the sizes at which all objects lie inside decide; where both do, nothing can.
    """
    given = [to_builtin(image.record.get(side)) for side in ("height", "width")]
    sides = [_as_side(side) for side in given]
    actual, turned = picture.size, picture.orientation
    if actual is None:
        return (None if None in sides else (sides[0], sides[1])), None, []
    shown = f"{given[0]!r:.20} x {given[1]!r:.20}"
    stated = (sides[0] or actual[0], sides[1] or actual[1])
    if stated == actual:
        is_certain = turned >= 5 and actual[0] != actual[1] and None not in sides
        way, problems = _settle_turn(image, picture, is_certain)
        if given != list(actual):
            is_missing = all(side in (None, number) for side, number in zip(given, actual, strict=True))
            kind = "missing_size" if is_missing else "size_mismatch"
            change = f"{actual[0]} x {actual[1]}"
            problems.insert(0, Problem(kind, f"height x width {shown}", change=change))
        return actual, way, problems
    is_swapped = turned >= 5 and stated == actual[::-1]
    kind = "exif_swapped_size" if is_swapped else "size_mismatch"
    detail = f"height x width {shown}, the picture's {actual[0]} x {actual[1]}"
    in_actual, in_stated = _fit(image.annotations, actual), _fit(image.annotations, stated)
    if not image.annotations or (in_actual and not in_stated):
        way, problems = _settle_turn(image, picture, True)
        return actual, way, [Problem(kind, detail, change=f"{actual[0]} x {actual[1]}"), *problems]
    if is_swapped and in_stated and not in_actual:
        return stated, "stored", [Problem(kind, detail, change="written as it is stored, without the EXIF tag")]
    why = f"{_LEFT_OUT}: at which size the objects were drawn cannot be told"
    return stated, None, [Problem(kind, detail, change=why)]


def _as_side(value: Any) -> int | None:
    """Pixels, as a number or its text; None for anything else."""
    number = as_index(value)
    return number if number and number < 1 << 31 else None


def _settle_turn(image: _Image, picture: _Picture, is_certain: bool) -> tuple[str, list[Problem]]:
    """How a picture goes into a copy, and what is odd about its EXIF rotation."""
    if picture.orientation == 1:
        return "link", []
    detail = f"orientation {picture.orientation}"
    if is_certain or not image.annotations:
        return "upright", [Problem("exif_rotation", detail, change="written upright")]
    return "link", [Problem("exif_frame_unknown", detail)]


def _fit(annotations: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> bool:
    """Whether all objects are ones of a picture of that size, within a pixel."""
    for annotation in annotations:
        try:
            shape = read_segmentation(annotation.get("segmentation"), size)
            box = to_builtin(annotation.get("bbox"))
            if isinstance(shape, dict):
                continue
            if not shape and not are_numbers(box, 4):
                return False
            points = np.concatenate(shape) if shape else [box[0] + box[2], box[1] + box[3]]
            if (np.reshape(points, (-1, 2)).max(0) > (size[1] + 1, size[0] + 1)).any():
                return False
        except _UNREADABLE:
            return False
    return True


# One annotation


class _Examination:
    """An annotation held against the rules; `repaired` stands in its place in a copy, unless it `is_lost`.

    Args:
        annotation: One of COCO's dicts, of whatever values.
        size: (H, W) of the picture; None where nobody knows it.
        classes: Names by category id.
    """

    def __init__(self, annotation: Mapping[str, Any], size: tuple[int, int] | None, classes: Mapping[int, str]) -> None:
        self.annotation, self.repaired = annotation, dict(annotation)
        self.problems: list[Problem] = []
        self.is_lost = self.has_mask = False
        given, crowd = annotation.get("category_id"), to_builtin(annotation.get("iscrowd"))
        category = as_index(given)
        self.class_name = None if category is None else classes.get(category)
        if self.class_name is None:
            self._lose("unknown_category", f"category_id {given!r:.40}")
        elif not is_index(given):
            self._note("unknown_category", f"category_id {given!r:.40}", f"category_id {category}")
            self.repaired["category_id"] = category
        if isinstance(crowd, list | dict) or crowd not in (None, 0, 1):
            self._lose("invalid_iscrowd", f"iscrowd {crowd!r:.40}")
            crowd = 0
        self.is_crowd = bool(crowd)
        self.repaired["iscrowd"] = int(self.is_crowd)
        if self.is_crowd:
            self._note("crowd")
        if size is not None:
            mask = self._check_shape(size)
            self.has_mask = mask is not None
            box = self._check_box(size, mask)
            if box is not None:
                self._check_area(box, mask)

    def _note(self, kind: str, detail: str = "", change: str | None = None) -> None:
        self.problems.append(Problem(kind, detail, self.annotation.get("id"), change))

    def _lose(self, kind: str, detail: str) -> None:
        self._note(kind, detail, _LEFT_OUT)
        self.is_lost = True

    def _check_shape(self, size: tuple[int, int]) -> tuple[list[float], float] | None:
        """Box and area of the mask, None where there is none."""
        given = self.annotation.get("segmentation")
        try:
            shape = read_segmentation(given, size)
            box, area = ([], 0.0) if shape is None else box_and_area(shape, size)
        except _UNREADABLE as error:
            self._note(_shape_kind(given, size), str(error)[:300], "segmentation removed")
            del self.repaired["segmentation"]
            return None
        if shape is None or not area:
            if has_segmentation(given):
                self._note("empty_segmentation", f"{given!r:.80}", "segmentation removed")
            elif not self.is_crowd:
                self._note("object_without_mask")
            self.repaired.pop("segmentation", None)
            return None
        if isinstance(shape, list):
            self._check_polygons(given, shape, size)
        return box, area

    def _check_polygons(self, given: Any, polygons: list[np.ndarray], size: tuple[int, int]) -> None:
        rows = given if any(isinstance(row, Sequence | np.ndarray) for row in given) else [given]
        if few := [row for row in rows if 0 < len(row) < 6]:
            self._note("short_polygon", f"{len(few)} of {len(rows)}, {few[0]!r:.60}", f"{len(few)} polygons removed")
            self.repaired["segmentation"] = [row for row in rows if len(row) >= 6]
        points = np.concatenate(polygons).reshape(-1, 2)
        beyond = max(-points.min(), (points - size[::-1]).max())
        if beyond > 1:
            self._note("polygon_outside", f"by {beyond:.0f} pixels")
        if crossing := sum(map(_crosses_itself, polygons)):
            self._note("self_intersecting_polygon", f"{crossing} of {len(polygons)} polygons")

    def _check_box(self, size: tuple[int, int], mask: tuple[list[float], float] | None) -> list[float] | None:
        """The box of the object, inside the picture; None where it has none."""
        given = to_builtin(self.annotation.get("bbox"))
        if given is None and mask is not None:
            self._note("missing_box", "", f"bbox {mask[0]}")
        elif given is None:
            self._lose("no_box_or_mask", "")
        elif (kind := _box_fault(given, size)) is not None and mask is not None:
            self._note(kind, f"bbox {given!r:.80}", f"bbox {mask[0]}, the mask's")
        elif kind is not None:
            self._lose(kind, f"bbox {given!r:.80}")
        else:
            return self._compare_box(given, size, mask)
        if mask is None:
            return None
        self.repaired["bbox"] = mask[0]
        return mask[0]

    def _compare_box(
        self, given: list[float], size: tuple[int, int], mask: tuple[list[float], float] | None
    ) -> list[float]:
        """A legal box, clipped to the picture."""
        x0, y0, x1, y1 = clip_box(given, size)
        box = [x0, y0, x1 - x0, y1 - y0]
        if _distance(given, box) > 1:
            self._note("box_beyond_edge", f"bbox {given!r:.80}", f"bbox {box}")
            self.repaired["bbox"] = box
        if mask is not None and _distance(box, mask[0]) > max(2, 0.05 * max(mask[0][2:])):
            self._note("box_mask_mismatch", f"bbox {given!r:.80}, the mask's {mask[0]}")
        return box

    def _check_area(self, box: list[float], mask: tuple[list[float], float] | None) -> None:
        given = to_builtin(self.annotation.get("area"))
        measured = box[2] * box[3] if mask is None else mask[1]
        if given is None:
            self._note("missing_area", "", f"area {measured:g}")
        elif not are_numbers([given], 1) or given < 0:
            self._note("invalid_area", f"area {given!r:.40}", f"area {measured:g}")
        else:
            # Half the outline's pixels may be counted or not.
            slack = max(0.1 * max(given, measured), box[2] + box[3])
            excess = given - measured if mask is None else abs(given - measured)
            if excess <= slack:
                return
            where = "the box's" if mask is None else "the mask's"
            self._note("area_mismatch", f"area {given:g}, {where} {measured:g}", f"area {measured:g}")
        self.repaired["area"] = measured


def _shape_kind(segmentation: Any, size: tuple[int, int]) -> str:
    """The kind of a segmentation that cannot be read."""
    if isinstance(segmentation, Mapping):
        stated = to_builtin(segmentation.get("size"))
        return "rle_of_another_size" if are_numbers(stated, 2) and stated != list(size) else "rle_corrupt"
    if not isinstance(segmentation, list):
        return "invalid_segmentation"
    rows = [row for row in segmentation if isinstance(row, list)] or [segmentation]
    if not all(isinstance(value, int | float) for row in rows for value in row):
        return "invalid_segmentation"
    if any(len(row) % 2 for row in rows):
        return "polygon_odd_numbers"
    is_finite = all(are_numbers(row, len(row)) for row in rows)
    return "invalid_segmentation" if is_finite else "polygon_not_finite"


def _box_fault(box: Any, size: tuple[int, int]) -> str | None:
    """The kind of a box that no object can have."""
    if not are_numbers(box, 4):
        return "invalid_box"
    if min(box[2:]) <= 0:
        return "inverted_box" if min(box[2:]) < 0 else "empty_box"
    x0, y0, x1, y1 = clip_box(box, size)
    return "box_outside" if x1 <= x0 or y1 <= y0 else None


def _distance(box: Sequence[float], other: Sequence[float]) -> float:
    """Pixels between the sides of two boxes, at most."""
    edges, others = ([x, y, x + width, y + height] for x, y, width, height in (box, other))
    return max(abs(edge - another) for edge, another in zip(edges, others, strict=True))


def _crosses_itself(polygon: np.ndarray) -> bool:
    """Whether two edges of a polygon (2P,) cross; to touch, or to lie on each other, is allowed.

    Of one with very many edges above each other nobody knows: False.
    """
    start = polygon.reshape(-1, 2)
    end = np.roll(start, -1, axis=0)
    order = np.minimum(start, end)[:, 0].argsort()
    start, end = start[order], end[order]
    low, high = np.minimum(start, end), np.maximum(start, end)
    # Of the edges behind it in the order of their left ends, an edge can meet those that begin before it ends.
    stop: Any = np.searchsorted(low[:, 0], high[:, 0], "right")
    if (stop - np.arange(1, len(start) + 1)).sum() > _MOST_PAIRS:
        return False
    for first in range(0, len(start), 256):  # P x P pairs would not fit where P is large
        edges = np.arange(first, min(first + 256, len(start)))
        counts = stop[edges] - edges - 1
        one: np.ndarray = np.repeat(edges, counts)
        other = one + 1 + np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts)
        meet = (low[one, 1] <= high[other, 1]) & (low[other, 1] <= high[one, 1])
        a, b, c, d = start[one[meet]], end[one[meet]], start[other[meet]], end[other[meet]]
        if ((_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)).any():
            return True
    return False


def _side(start: np.ndarray, end: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(N, 2) each -> on which side of the lines from start to end the points lie, -1 or 1; 0 where rounding decides."""
    along, across = end - start, points - start
    cross = along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0]
    return np.sign(cross) * (np.abs(cross) > 1e-6)


# Where it is written


def _roots(source: Any, splits: Sequence[_Split]) -> list[Path]:
    """The folders of the source."""
    if isinstance(source, str | os.PathLike) and Path(source).expanduser().is_dir():
        return [Path(source).expanduser().resolve()]
    return [split.folder.resolve() for split in splits if split.folder is not None]


def _check_output(option: str, folder: Path, roots: Iterable[Path]) -> None:
    path = folder.expanduser().resolve()
    for root in roots:
        if path == root or root in path.parents:
            raise ValueError(f"{option} {folder} lies in {root}, which is only read; give a folder outside of it")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {folder} is a file; give a new folder")
    if option == "fix" and path.exists() and any(not is_partial(inside) for inside in path.iterdir()):
        raise ValueError(f"{option} {folder} is not empty; give a new folder")


# Overlays


class _Gallery:
    """Keeps the first images with errors and warnings, and the first without, and draws them."""

    def __init__(self) -> None:
        self._odd: list[tuple[_Split, _Image, list[Problem]]] = []
        self._fine: list[tuple[_Split, _Image, list[Problem]]] = []

    def offer(self, split: _Split, image: _Image, seen: _Seen) -> None:
        """Keep an image that can be drawn, while there is room."""
        if seen.picture.size is None:
            return
        odd = [problem for problem in seen.problems if KINDS[problem.kind][0] != "info"]
        room = self._odd if odd else self._fine
        if len(room) < _MOST_OVERLAYS:
            room.append((split, image, odd))

    def write(self, folder: Path) -> None:
        """Draw them."""
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        shown = [*self._odd, *self._fine][:_MOST_OVERLAYS]
        for number, (split, image, problems) in enumerate(logging.tqdm(shown, desc="Drawing", delay=2)):
            stem = re.sub(r"[^\w.-]", "_", Path(str(image.id if image.name is None else image.name)).stem)
            with _open(image.source) as file:
                drawn = _draw(read_rgb(open_image(file)), image, split.classes, problems)
            with atomic_file(folder / f"{number:02}_{split.name}_{stem[:_LONGEST_STEM]}.jpg") as partial_file:
                drawn.save(partial_file, "JPEG", quality=90)


def _draw(
    picture: PIL.Image.Image, image: _Image, classes: Mapping[int, str], problems: Sequence[Problem]
) -> PIL.Image.Image:
    """The annotations over a picture, as far as they can be read, with the names of their classes and problems."""
    masks, boxes, labels = [], [], []
    height, width = size = picture.size[::-1]
    for annotation in image.annotations:
        try:
            rle, mask_box = _outline(annotation.get("segmentation"), size)
            box = to_builtin(annotation.get("bbox"))
            x, y, box_width, box_height = box if are_numbers(box, 4) else mask_box
            category = annotation.get("category_id")
            words = [classes.get(category, "?") if is_index(category) else "?"]
        except _UNREADABLE:
            continue
        words += ["crowd"] * (annotation.get("iscrowd") == 1)
        words += [problem.kind for problem in problems if problem.annotation_id == annotation.get("id")]
        masks.append(rle)
        corners = np.array([x, y, x + box_width, y + box_height], np.float64)
        boxes.append(corners.clip(-width - height, 2 * (width + height)))
        labels.append(" ".join(words))
    return draw_instances(picture, masks or None, np.array(boxes) if boxes else None, labels or None)


def _outline(segmentation: Any, size: tuple[int, int]) -> tuple[dict[str, Any], list[float] | None]:
    """A mask as RLE and its box; nothing and None where it cannot be read."""
    try:
        shape: Segmentation | None = read_segmentation(segmentation, size)
    except _UNREADABLE:
        shape = None
    if shape is None:
        return coco_mask.frPyObjects({"size": list(size), "counts": [size[0] * size[1]]}, *size), None
    return to_rle(shape, size), box_and_area(shape, size)[0]
