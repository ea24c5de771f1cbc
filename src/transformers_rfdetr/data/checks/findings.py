"""What a check can find: the kinds of findings with severity and rule, and the report of all of them."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ...atomic_files import escape_unprintable

SEVERITIES = ("error", "warning", "info")
# Kind -> (severity, rule and remedy). An error loses data, changes its meaning, or stops a reader.
KINDS = {
    # image files
    "unreadable_image": ("error", "the file cannot be opened as an image; replace it, or remove its entry"),
    "empty_file": ("error", "the file is empty; copy it again, or remove its entry"),
    "truncated_image": ("error", "the file is damaged or truncated; copy it again, or remove its entry"),
    "huge_image": ("error", "Pillow refuses this many pixels as an attack; downscale the image or cut it into tiles"),
    "exif_rotation": ("info", "EXIF rotates the image, and it is read upright; other programs may ignore EXIF"),
    "exif_frame_unknown": ("warning", "EXIF rotates the image, but it may have been annotated unrotated; see overlays"),
    "exif_swapped_size": ("error", "height and width must be those after EXIF's rotation; swap them, or drop the tag"),
    "size_mismatch": ("error", "height and width must be those of the file; correct them, or the file name"),
    "missing_size": ("info", "height or width is missing and is read from the file; other programs may need it"),
    "dark_16_bit": (
        "warning",
        "the values use less than an eighth of 16 bits, so that the image is read as black; scale them",
    ),
    "multiple_frames": ("warning", "only the first frame or page of the file is read; save the others as files"),
    "image_without_objects": ("info", "the image is used as background in training"),
    "no_objects": ("warning", "no object of the split can be used; crowds that are single objects need iscrowd 0"),
    "all_objects_lost": ("warning", "no annotation of the image can be used, so that its objects count as background"),
    "too_many_objects": ("warning", "the image has more objects than the model has queries; cut it into tiles"),
    # files and entries of `images`
    "layout": ("warning", "the data are not laid out as their format says; the detail says how they are read"),
    "shared_label_file": (
        "error",
        "a label file must belong to one image; rename an image and its labels, or remove it",
    ),
    "invalid_image": ("error", "an entry of 'images' must be a dict; remove it"),
    "invalid_image_id": ("error", "an image id must be a number or a string; number the images"),
    "duplicate_image_id": ("error", "an image id must be unique; renumber one of the images and its annotations"),
    "missing_file": ("error", "the image file must exist; correct the image folder or the name, or remove the entry"),
    "renamed_file": ("warning", "the image was found under another name than its entry gives; correct the name"),
    "unsafe_file_name": ("error", "the file name points outside the image folder and is not read; correct it"),
    "duplicate_file_name": ("warning", "two images share one file, each with some of its objects; merge them"),
    "unlisted_file": ("warning", "an image file beside the others has no entry; it is not used"),
    "duplicate_image": ("warning", "two files of the split have the same content; remove one"),
    "near_duplicate_across_splits": ("warning", "an image of another split looks the same; keep both in one split"),
    "overlapping_crops_across_splits": (
        "warning",
        "by its name, the image overlaps one of another split, or is a frame beside it; keep a scene in one split",
    ),
    "no_images": ("error", "the split must have an image; add some, or remove the split"),
    "nothing_repaired": ("error", "no image of the split can be repaired, so that a repaired copy lacks the split"),
    # categories
    "no_categories": ("error", "no category can be used, so that all objects are lost; define and number categories"),
    "invalid_category": ("error", "a category id must be a whole number of at least 0; number the categories"),
    "duplicate_category_id": ("error", "a category id must be unique; renumber one category and its annotations"),
    "duplicate_category_name": ("error", "a category name must be unique; rename one, or merge the categories"),
    "categories_differ": ("error", "all splits must have the same categories as the first, with the same ids"),
    "unknown_category": ("error", "the category of the annotation must be defined; define it, or correct its id"),
    "shifted_category_ids": ("error", "the category ids must be the defined ones, and are all one too high or too low"),
    "unused_category": ("info", "no annotation of the split has this category"),
    "class_imbalance": ("info", "some classes have at least ten times as many objects as others"),
    # annotations
    "invalid_annotation": ("error", "the annotation cannot be read; correct or remove it"),
    "invalid_annotation_id": ("warning", "an id must be a whole number of at least 1; pycocotools reads 0 as no match"),
    "duplicate_annotation_id": ("error", "an annotation id must be unique, or pycocotools drops one; renumber them"),
    "annotation_of_missing_image": ("error", "the image of the annotation must exist; add it, or correct the id"),
    "invalid_annotation_file": ("error", "an annotation file cannot be read; correct or remove it"),
    "invalid_object": ("error", "an object of an annotation file cannot be read; correct or remove it"),
    "invalid_label_line": ("error", "a line of a YOLO label file cannot be read; correct or remove it"),
    "invalid_iscrowd": ("error", "iscrowd must be 0 or 1; correct it"),
    "duplicate_object": ("warning", "another object of the class has almost the same mask or box; remove one"),
    "fractional_coordinates": ("error", "coordinates must be in pixels; multiply them by the image's width and height"),
    "crowd": ("info", "crowds are not used in training, and ignored in evaluation"),
    # boxes and areas
    "invalid_box": ("error", "a box must be four finite numbers [x, y, width, height] in pixels; correct or remove it"),
    "empty_box": ("error", "width and height of a box must be above 0, or the object is lost; correct the box"),
    "inverted_box": ("error", "a box must be [x, y, width, height], and not two corners; correct the negative side"),
    "box_layout": ("error", "boxes must be [x, y, width, height], and all boxes of the split have another layout"),
    "box_outside": ("error", "a box must overlap the image, or the object is lost; correct the box"),
    "box_beyond_edge": ("warning", "the box extends more than a pixel beyond the image; it is clipped"),
    "box_mask_mismatch": ("warning", "the box is more than 2 pixels and 5 % of its longer side off that of the mask"),
    "missing_box": ("info", "the box is missing and is computed from the mask"),
    "no_box_or_mask": ("error", "neither a box nor a mask can be read, so that the object is lost; add one"),
    "invalid_area": ("error", "an area must be a finite number of at least 0; correct or remove it"),
    "area_mismatch": ("warning", "the area is not that of the mask, or exceeds the box; metrics by size depend on it"),
    "area_of_box": ("info", "the area is that of the box and not that of the mask; metrics by size depend on it"),
    "missing_area": ("info", "the area is missing and is computed from the mask or the box"),
    # segmentations
    "polygon_odd_numbers": ("error", "a polygon must be x0, y0, x1, y1, ...: an even number of values; correct it"),
    "polygon_not_finite": ("error", "a polygon must not hold NaN or infinity; correct it"),
    "short_polygon": ("warning", "a polygon of fewer than three points has no area; remove it"),
    "empty_segmentation": (
        "error",
        "it must cover a pixel of the image, or training with masks drops the object; redraw it",
    ),
    "self_intersecting_polygon": ("warning", "edges of a polygon cross, so that parts may be missing; redraw it"),
    "small_self_intersection": ("info", "edges of a polygon cross, and less than 0.5 % of its area is affected"),
    "nested_polygon": (
        "warning",
        "a polygon lies inside another of the same object, and is filled as COCO does; if it is a hole, store RLE",
    ),
    "object_vanishes": ("warning", "at the model's resolution, the mask covers no pixel, so that the object is lost"),
    "polygon_outside": ("warning", "a polygon extends more than a pixel beyond the image; it is clipped"),
    "rle_of_another_size": ("error", "the size of the RLE must be that of the image; encode the mask again"),
    "rle_corrupt": ("error", "the RLE cannot be decoded; encode the mask again"),
    "invalid_segmentation": ("error", "a segmentation must be polygons, an RLE or a bitmap of 0 and 1; convert it"),
    "boxes_only": ("warning", "no object of the split has a mask: only a detection model can be trained with it"),
    "object_without_mask": ("warning", "other objects have masks; in training with masks this one is background"),
}
DROPPED = "dropped"
_MAX_EXAMPLES = 5


class Problem(NamedTuple):
    """One violation of a rule, or one remark."""

    kind: str  # a key of KINDS
    detail: str = ""
    annotation_id: Any = None
    change: str | None = None  # what the repaired copy has instead; None where it keeps the original


@dataclass
class Finding:
    """All problems of one kind in one split.

    `examples` are the first five: dicts with image_id, file_name, annotation_id (each may be None) and detail.
    """

    kind: str
    severity: str
    split: str
    count: int
    rule: str
    examples: list[dict[str, Any]]


@dataclass
class DataReport:
    """What [`check_dataset`] found. `str(report)` is for people, `report.to_dict()` for JSON.

    Attributes:
        source: The dataset that was read.
        splits: By split, the counts `images`, `objects` (crowds excluded), `objects_with_segmentation`,
            `objects_with_mask` (their segmentation is readable and covers a pixel), `crowds` and
            `images_without_objects`, and `classes`, the number of objects by class name.
        findings: Errors first; within a severity, the most frequent first.
    """

    source: str
    splits: dict[str, dict[str, Any]]
    findings: list[Finding]

    @property
    def has_errors(self) -> bool:
        """Whether data would be lost, change its meaning, or stop a reader."""
        return any(finding.severity == "error" for finding in self.findings)

    def count(self, kind: str, split: str | None = None) -> int:
        """Return the number of problems of a kind, in one split or in all."""
        return sum(found.count for found in self.findings if found.kind == kind and split in (None, found.split))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return asdict(self)

    def _share(self, finding: Finding) -> str:
        """Return the share of annotations that a finding about annotations has, if it is at least 1 %."""
        counts = self.splits[finding.split]
        share = finding.count / max(counts["objects"] + counts["crowds"], 1)
        is_of_annotations = any(example["annotation_id"] is not None for example in finding.examples)
        return f", {min(share, 1):.0%} of the annotations" if is_of_annotations and share >= 0.01 else ""

    def __str__(self) -> str:
        lines = []
        for name, counts in self.splits.items():
            classes = [f"{label:.60} {number}" for label, number in Counter(counts["classes"]).most_common(9)]
            classes[8:] = ["..."] * (len(classes) > 8)
            num_objects, num_segmentations = counts["objects"], counts["objects_with_segmentation"]
            num_unusable = num_segmentations - counts["objects_with_mask"]
            lines.append(
                f"{name}: {counts['images']} images, {counts['images_without_objects']} of them without objects;"
                f" {num_objects} objects, {num_objects - num_segmentations} of them without a segmentation"
                f"{f', {num_unusable} with an unusable one' if num_unusable else ''}; {counts['crowds']} crowds"
                f"{'; ' if classes else ''}{', '.join(classes)}"
            )
        totals: Counter[str] = Counter()
        for finding in self.findings:
            totals[finding.severity] += finding.count
            share = self._share(finding)
            lines.append(
                f"{finding.severity:8}{finding.count:>7}  {finding.kind} ({finding.split}{share}): {finding.rule}"
            )
            lines += [f"{'':17}{_describe(example)}" for example in finding.examples]
        lines.append(", ".join(f"{severity}: {totals[severity]}" for severity in SEVERITIES))
        return "\n".join(map(escape_unprintable, lines))


def _describe(example: Mapping[str, Any]) -> str:
    """Return an example as one line: image, annotation and detail."""
    image_id, file_name, annotation_id, detail = example.values()
    if image_id is None:
        image = "" if file_name is None else f"{file_name!s:.80}"
    else:
        image = f"image {image_id!r:.40}" + ("" if file_name is None else f" ({file_name!s:.80})")
    annotation = "" if annotation_id is None else f"annotation {annotation_id!r:.40}"
    return ": ".join(filter(None, (", ".join(filter(None, (image, annotation))), detail)))


def json_value(value: Any) -> Any:
    """Replace NaN and infinity, which Python reads from JSON and other programs do not, by None."""
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class FindingCollector:
    """Groups problems into findings and, if `lists_changes`, lists them for `changes.json` of a repaired copy."""

    def __init__(self, lists_changes: bool) -> None:
        self._findings: dict[tuple[str, str], Finding] = {}
        self._lists_changes = lists_changes
        self.changes: list[dict[str, Any]] = []
        self.left: list[dict[str, Any]] = []

    def add(
        self, split: str, problem: Problem, image_id: Any = None, file_name: Any = None, is_copied: bool = True
    ) -> None:
        """Count a problem. Of an image that is not in the copy, only what is dropped is listed."""
        severity, rule = KINDS[problem.kind]
        finding = self._findings.setdefault((problem.kind, split), Finding(problem.kind, severity, split, 0, rule, []))
        finding.count += 1
        place = {
            "image_id": json_value(image_id),
            "file_name": json_value(file_name),
            "annotation_id": json_value(problem.annotation_id),
            "detail": problem.detail,
        }
        if len(finding.examples) < _MAX_EXAMPLES:
            finding.examples.append(place)
        if not self._lists_changes:
            return
        entry = {"kind": problem.kind, "split": split, **place}
        if problem.change is not None and (is_copied or problem.change.startswith(DROPPED)):
            self.changes.append(entry | {"change": problem.change})
        elif severity != "info" and is_copied:
            self.left.append(entry)

    def count(self, kind: str, split: str) -> int:
        """Return how many problems of a kind a split has."""
        return self._findings[kind, split].count if (kind, split) in self._findings else 0

    def remove(self, kind: str, split: str) -> None:
        """Remove all problems of a kind in a split."""
        self._findings.pop((kind, split), None)
        self.left = [entry for entry in self.left if (entry["kind"], entry["split"]) != (kind, split)]

    def sorted(self) -> list[Finding]:
        """Return errors first; within a severity, the most frequent first."""
        return sorted(self._findings.values(), key=lambda found: (SEVERITIES.index(found.severity), -found.count))
