"""`check_dataset`: check every image and annotation of a dataset without stopping at the first problem."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...atomic_files import atomic_directory
from ...model.masks import has_segmentation
from ..output_folder import check_output_folder
from .annotations import AnnotationCheck, find_duplicate_objects
from .categories import check_categories
from .duplicates import CropFinder, DuplicateFinder, find_unlisted_files
from .findings import DROPPED, DataReport, FindingCollector, Problem
from .images import ImageFile, find_frame, read_image_file
from .overlays import OverlayWriter
from .raw_split import RawImage, RawSplit
from .readers import read_source
from .repair import CopyMode, RepairedCopy

_IMBALANCE = 10  # times as many objects of the most frequent class as of the least frequent one
# objects exclude crowds
_COUNTS = ("objects", "objects_with_segmentation", "objects_with_mask", "crowds", "images_without_objects")


def check_dataset(
    source: Any,
    *,
    image_folder: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    num_queries: int = 200,
    resolution: int | None = None,
    workers: int | None = None,
    fix: str | os.PathLike[str] | None = None,
    overlays: str | os.PathLike[str] | None = None,
) -> DataReport:
    """List everything in a dataset that is wrong or unusual, and optionally write a repaired copy.

    Example:
        >>> import tempfile
        >>> from transformers_rfdetr import check_dataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
        >>> images, coco = draw_dataset(4)
        >>> coco["annotations"][0]["bbox"] = [500, 500, 10, 10]
        >>> check_dataset(save_dataset(tempfile.mkdtemp(), images, coco)).count("box_outside")
        1

    Args:
        source: What `load_instance_dataset` reads, except streams.
        image_folder: The images of the annotation file; for COCO, also a mapping of splits to folders; for YOLO, the
            root of its paths.
        num_queries: Of the model; images with more objects are reported.
        resolution: Side of the model's input in pixels; objects whose masks have no pixel there are reported.
        workers: Threads that read images. The default is the number of cores.
        fix: A new folder for a repaired copy as COCO files, in which a check finds no error. Images are hard links
            where possible. Annotations that cannot be repaired unambiguously are dropped, and so are images that
            cannot, or that lose all annotations, and splits without images. If no image is left, nothing is written.
            `changes.json` lists `changes`, and problems that are `left`.
        overlays: A folder for up to 50 images with their annotations, those with errors or warnings first.

    Raises:
        ValueError: `source` cannot be read at all, or has no usable category to `fix`; `fix` is not empty; `fix` or
            `overlays` lies in the source.
    """
    splits = read_source(source, image_folder)
    _check_arguments(source, splits, fix, overlays)
    check_categories(splits)
    run = _Run(
        FindingCollector(fix is not None), None if overlays is None else OverlayWriter(), num_queries, resolution
    )
    with suppress(_NothingRepaired), _copy_directory(fix) as folder:
        copy = None if folder is None else RepairedCopy(folder, _heads(splits))
        counts = {split.name: run.check(split, copy, workers) for split in splits}
        run.finish(splits, copy, counts)
    if run.overlays is not None:
        run.overlays.write(Path(overlays).expanduser())
    return DataReport(str(source), counts, run.collector.sorted())


class _NothingRepaired(Exception):
    """Leaves the directory of a repaired copy without images, so that it is not written."""


def _copy_directory(fix: str | os.PathLike[str] | None) -> AbstractContextManager[Path | None]:
    return nullcontext() if fix is None else atomic_directory(Path(fix).expanduser())


def _heads(splits: Sequence[RawSplit]) -> dict[str, dict[str, Any]]:
    """Return what a repaired copy starts with."""
    heads = {split.name: split.copied_head() for split in splits}
    if not any(head["categories"] for head in heads.values()):
        raise ValueError("`fix` requires a usable category, or the copy would hold no object. Define and number them.")
    return heads


def _check_arguments(source: Any, splits: Sequence[RawSplit], fix: Any, overlays: Any) -> None:
    for split in splits:
        if not re.fullmatch(r"\w[\w.-]*", split.name):
            raise ValueError(f"A split name must be letters, digits, dots and hyphens, got {split.name!r:.60}.")
    if isinstance(source, str | os.PathLike) and Path(source).expanduser().is_dir():
        roots = [Path(source).expanduser().resolve()]
    else:
        roots = [split.folder.resolve() for split in splits if split.folder is not None]
    for option, folder in (("fix", fix), ("overlays", overlays)):
        if folder is not None:
            check_output_folder(option, Path(folder), roots, must_be_empty=option == "fix")
    if fix is not None and any(split.folder is None for split in splits):
        raise ValueError("`fix` requires annotation files, got rows of datasets. Correct them with `Dataset.map`.")


@dataclass
class _Run:
    """Where the results of all splits go, and what the checks need to know of the model."""

    collector: FindingCollector
    overlays: OverlayWriter | None
    num_queries: int
    resolution: int | None
    duplicates: DuplicateFinder = field(default_factory=DuplicateFinder)
    crops: CropFinder = field(default_factory=CropFinder)

    def check(self, split: RawSplit, copy: RepairedCopy | None, workers: int | None) -> dict[str, Any]:
        """Check the images of a split; return its counts for the report."""
        for problem in split.problems:
            self.collector.add(split.name, problem)
        if not split.images:
            self.collector.add(split.name, Problem("no_images", change=DROPPED))
        counts, classes = Counter(dict.fromkeys(_COUNTS, 0)), Counter[str]()
        for image, result in _check_images(split, self.num_queries, self.resolution, workers):
            counts.update(result.counts)
            classes.update(result.classes)
            self._add(split, image, result, copy)
        self.duplicates.end_split()
        self.crops.end_split()
        if len(classes) > 1:
            (most, many), *_, (least, few) = classes.most_common()
            if many >= _IMBALANCE * few:
                detail = f"most {most!r:.60} with {many}, least {least!r:.60} with {few}: {many / few:.0f} times"
                self.collector.add(split.name, Problem("class_imbalance", detail))
        return {"images": len(split.images), **counts, "classes": dict(classes)}

    def _add(self, split: RawSplit, image: RawImage, result: "_ImageResult", copy: RepairedCopy | None) -> None:
        file, mode = result.file, result.copy_mode
        result.problems += self.duplicates.add(split.name, image.label, file.digest, file.perceptual_hash)
        if file.size is not None:
            result.problems += self.crops.add(split.name, image.label, file.size)
        for problem in result.problems:
            self.collector.add(split.name, problem, image.id, image.file_name, is_copied=mode is not None)
        if copy is not None and mode is not None:
            entry = image.copied_entry(result.size, split.folder)
            copy.add(split.name, entry, result.repaired, image.source, mode)
        if self.overlays is not None and file.size is not None:
            self.overlays.offer(split, image, result.problems)

    def finish(
        self, splits: Sequence[RawSplit], copy: RepairedCopy | None, counts: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Add what only all images of a split or all splits together show, and complete the copy."""
        for split, path in find_unlisted_files(splits):
            self.collector.add(split.name, Problem("unlisted_file", str(path)))
        for name, count in counts.items():
            if count["images"] and not count["objects"]:
                self.collector.add(name, Problem("no_objects", f"{count['images']} images, {count['crowds']} crowds"))
            elif count["objects"] and count["objects"] == self.collector.count("object_without_mask", name):
                self.collector.remove("object_without_mask", name)
                self.collector.add(name, Problem("boxes_only", f"{count['objects']} objects"))
        for split in splits:
            if split.folder is None:  # rows of the library datasets, which no reader of COCO files will read
                self.collector.remove("missing_size", split.name)
                self.collector.remove("missing_area", split.name)
        if copy is None:
            return
        for split in splits:
            if split.images and split.name not in copy.splits:
                detail = f"none of {len(split.images)} images"
                self.collector.add(split.name, Problem("nothing_repaired", detail, change=DROPPED))
        if not copy.splits:
            raise _NothingRepaired
        copy.write(self.collector.changes, self.collector.left)


@dataclass
class _ImageResult:
    """What an image and its annotations are, and what a repaired copy has of them."""

    file: ImageFile
    problems: list[Problem]
    size: tuple[int, int] | None  # (H, W) in the copy
    copy_mode: CopyMode | None  # None: the copy does not have the image
    repaired: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # by the names in _COUNTS
    classes: Counter[str] = field(default_factory=Counter)  # objects by class name


def _check_images(
    split: RawSplit, num_queries: int, resolution: int | None, workers: int | None
) -> Iterator[tuple[RawImage, _ImageResult]]:
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow warns about unusual EXIF and large images
        results = pool.map(partial(_check_image, split, num_queries, resolution), split.images)
        images = logging.tqdm(split.images, desc=f"Checking {split.name}", unit=" images")
        try:
            yield from zip(images, results, strict=True)
        finally:  # an interruption must not wait for all other images
            pool.shutdown(wait=False, cancel_futures=True)


def _check_image(split: RawSplit, num_queries: int, resolution: int | None, image: RawImage) -> _ImageResult:
    file = ImageFile() if image.source is None else read_image_file(image.source)
    size, copy_mode, frame_problems = find_frame(image, file)
    problems = [*image.problems, *file.problems, *frame_problems]
    result = _ImageResult(file, problems, size, copy_mode if image.is_copied else None)
    _check_annotations(split, image, resolution, result)
    num_unreadable = sum(problem.kind in ("invalid_label_line", "invalid_object") for problem in image.problems)
    num_annotations, num_objects = len(image.annotations) + num_unreadable, result.counts["objects"]
    result.counts["images_without_objects"] = int(not num_objects)
    if num_annotations and not result.repaired:
        result.copy_mode = None
        result.problems.append(Problem("all_objects_lost", f"{num_annotations} objects", change=DROPPED))
    elif not num_objects:
        result.problems.append(Problem("image_without_objects"))
    if num_objects > num_queries:
        result.problems.append(Problem("too_many_objects", f"{num_objects} objects, {num_queries} queries"))
    return result


def _check_annotations(split: RawSplit, image: RawImage, resolution: int | None, result: _ImageResult) -> None:
    """Add the annotations of an image, their counts and problems to its result."""
    checks = []
    for annotation, copy_id in zip(image.annotations, image.annotation_copy_ids, strict=True):
        try:
            check = AnnotationCheck(annotation, result.size, split.classes, resolution)
        except Exception as error:  # the values come from JSON and may be anything
            detail = f"{type(error).__name__} {error}"[:200]
            result.problems.append(Problem("invalid_annotation", detail, annotation.get("id"), DROPPED))
            continue
        check.repaired["id"] = copy_id
        check.is_dropped = check.is_dropped or check.repaired["category_id"] in split.ambiguous_ids
        checks.append(check)
        result.counts["crowds" if check.is_crowd else "objects"] += 1
        if not check.is_crowd:
            result.counts["objects_with_segmentation"] += has_segmentation(annotation.get("segmentation"))
            result.counts["objects_with_mask"] += check.mask is not None
            result.classes.update(filter(None, [check.class_name]))
    for check, earlier, iou in find_duplicate_objects(checks):
        check.note_duplicate(earlier.annotation.get("id"), iou)
    result.problems += [problem for check in checks for problem in check.problems]
    result.repaired = [check.repaired for check in checks if not check.is_dropped]
