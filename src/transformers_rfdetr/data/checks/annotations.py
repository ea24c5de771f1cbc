"""One annotation: its category, segmentation, box and area, and what a repaired copy has instead."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from ...model.coco_labels import clip_box
from ...model.masks import box_and_area, has_segmentation, rasterize, read_segmentation, to_rle
from ...model.validation import are_numbers, is_index, to_builtin
from ..annotation_records import has_fractions
from .crossings import affected_share, crosses_itself
from .findings import DROPPED, Problem
from .images import UNREADABLE
from .raw_split import as_index

_MIN_DUPLICATE_IOU = 0.95
_MAX_COMPARED_POLYGONS = 255  # of one object; pycocotools compares no more
_MIN_NESTED_SHARE = 0.99  # of a polygon inside a larger one
_MIN_AFFECTED_SHARE = 0.005  # of the area of a polygon that crosses itself
_MAX_VANISHING_AREA = 16  # pixels of the model's input, above which no mask is drawn to see if it vanishes


class Mask(NamedTuple):
    """A mask of at least one pixel, and what is measured of it."""

    rle: dict[str, Any]
    box: list[float]  # [x, y, width, height] in pixels
    area: float


class AnnotationCheck:
    """Checks an annotation, whose values may be of any type.

    Args:
        annotation: One of COCO's annotations.
        size: (H, W) of the image in pixels; None if it is unknown.
        classes: Names by category id.
        resolution: Side of the model's square input in pixels, at which masks must have a pixel; None if it is unknown.

    Attributes:
        problems: What was found.
        repaired: The annotation for a repaired copy, unless it `is_dropped`.
        class_name: None if the category is not defined.
        box: [x, y, width, height] inside the image; None if there is none.
        mask: None if there is none.
    """

    def __init__(
        self,
        annotation: Mapping[str, Any],
        size: tuple[int, int] | None,
        classes: Mapping[int, str],
        resolution: int | None = None,
    ) -> None:
        self.annotation, self.repaired = annotation, dict(annotation)
        self.problems: list[Problem] = []
        self.is_dropped = False
        self.box: list[float] | None = None
        self.mask: Mask | None = None
        self.class_name = self._check_category(classes)
        self.is_crowd = self._check_crowd()
        if has_fractions(annotation):
            self._drop("fractional_coordinates", f"bbox {annotation.get('bbox')!r:.80}")
        elif size is not None:
            self.mask = self._check_segmentation(size, resolution)
            self.box = self._check_box(size, self.mask)
            if self.box is not None:
                self._check_area(self.box, self.mask)

    def note_duplicate(self, earlier_id: Any, iou: float) -> None:
        """Note that an earlier annotation is nearly the same."""
        self._note("duplicate_object", f"IoU {iou:.3f} with annotation {earlier_id!r:.40}")

    def _note(self, kind: str, detail: str = "", change: str | None = None) -> None:
        self.problems.append(Problem(kind, detail, self.annotation.get("id"), change))

    def _drop(self, kind: str, detail: str) -> None:
        self._note(kind, detail, DROPPED)
        self.is_dropped = True

    def _check_category(self, classes: Mapping[int, str]) -> str | None:
        given = self.annotation.get("category_id")
        category_id = as_index(given)
        name = None if category_id is None else classes.get(category_id)
        if name is None:
            self._drop("unknown_category", f"category_id {given!r:.40}")
        elif not is_index(given):
            self._note("unknown_category", f"category_id {given!r:.40}", f"category_id {category_id}")
            self.repaired["category_id"] = category_id
        return name

    def _check_crowd(self) -> bool:
        crowd = to_builtin(self.annotation.get("iscrowd"))
        if isinstance(crowd, list | dict) or crowd not in (None, 0, 1):
            self._drop("invalid_iscrowd", f"iscrowd {crowd!r:.40}")
            crowd = 0
        self.repaired["iscrowd"] = int(bool(crowd))
        if crowd:
            self._note("crowd")
        return bool(crowd)

    def _check_segmentation(self, size: tuple[int, int], resolution: int | None) -> Mask | None:
        given = self.annotation.get("segmentation")
        mask = None
        try:
            segmentation = read_segmentation(given, size)
            if segmentation is not None:
                rle = to_rle(segmentation, size)
                mask = Mask(rle, *box_and_area(rle, size))
        except UNREADABLE as error:
            self._note(_segmentation_problem(given, size), str(error)[:300], "segmentation removed")
            del self.repaired["segmentation"]
            return None
        if segmentation is None or mask is None or not mask.area:
            if has_segmentation(given):
                self._note("empty_segmentation", f"{given!r:.80}", "segmentation removed")
            elif not self.is_crowd:
                self._note("object_without_mask")
            self.repaired.pop("segmentation", None)
            return None
        if isinstance(segmentation, list):
            self._check_polygons(given, segmentation, size)
        is_small = resolution is not None and mask.area * resolution**2 < _MAX_VANISHING_AREA * size[0] * size[1]
        if is_small and not self.is_crowd and not rasterize([segmentation], size, (resolution, resolution)).any():
            self._note("object_vanishes", f"area {mask.area:g} in {size[0]} x {size[1]}")
        return mask

    def _check_polygons(self, given: Any, polygons: list[np.ndarray], size: tuple[int, int]) -> None:
        rows = given if any(isinstance(row, Sequence | np.ndarray) for row in given) else [given]
        if short := [row for row in rows if 0 < len(row) < 6]:
            detail = f"{len(short)} of {len(rows)}, {short[0]!r:.60}"
            self._note("short_polygon", detail, f"{len(short)} polygons removed")
            self.repaired["segmentation"] = [row for row in rows if len(row) >= 6]
        points = np.concatenate(polygons).reshape(-1, 2)
        beyond = max(-points.min(), (points - size[::-1]).max())
        if beyond > 1:
            self._note("polygon_outside", f"by {beyond:.0f} pixels")
        if crossing := [polygon for polygon in polygons if crosses_itself(polygon)]:
            share = max(map(affected_share, crossing))
            kind = "self_intersecting_polygon" if share >= _MIN_AFFECTED_SHARE else "small_self_intersection"
            self._note(kind, f"{len(crossing)} of {len(polygons)} polygons; affects {share:.1%} of the area inside")
        if nested := _nested_areas(polygons, size):
            self._note("nested_polygon", f"{len(nested)} of {len(polygons)} polygons, {sum(nested):g} pixels")

    def _check_box(self, size: tuple[int, int], mask: Mask | None) -> list[float] | None:
        """Return the box within the image; None if there is none."""
        given = to_builtin(self.annotation.get("bbox"))
        if given is None and mask is not None:
            self._note("missing_box", "", f"bbox {mask.box}")
        elif given is None:
            self._drop("no_box_or_mask", "")
        elif (kind := _box_problem(given, size)) is not None and mask is not None:
            self._note(kind, f"bbox {given!r:.80}", f"bbox {mask.box}, that of the mask")
        elif kind is not None:
            self._drop(kind, f"bbox {given!r:.80}")
        else:
            return self._compare_box(given, size, mask)
        if mask is None:
            return None
        self.repaired["bbox"] = mask.box
        return mask.box

    def _compare_box(self, given: list[float], size: tuple[int, int], mask: Mask | None) -> list[float]:
        """Compare a valid box with the image and the mask; return it clipped to the image."""
        x0, y0, x1, y1 = clip_box(given, size)
        box = [x0, y0, x1 - x0, y1 - y0]
        if _largest_edge_distance(given, box) > 1:
            self._note("box_beyond_edge", f"bbox {given!r:.80}", f"bbox {box}")
            self.repaired["bbox"] = box
        if mask is not None and _largest_edge_distance(box, mask.box) > max(2, 0.05 * max(mask.box[2:])):
            self._note("box_mask_mismatch", f"bbox {given!r:.80}, that of the mask {mask.box}")
        return box

    def _check_area(self, box: list[float], mask: Mask | None) -> None:
        given = to_builtin(self.annotation.get("area"))
        measured, source = (box[2] * box[3], "box") if mask is None else (mask.area, "mask")
        if given is None:
            self._note("missing_area", "", f"area {measured:g}")
        elif not are_numbers([given], 1) or given < 0:
            self._note("invalid_area", f"area {given!r:.40}", f"area {measured:g}")
        else:
            # Half of the outline's pixels may be counted or not.
            tolerance = max(0.1 * max(given, measured), box[2] + box[3])
            # Without a mask, the area may be that of a mask which was not exported: any part of the box.
            excess = given - measured if mask is None else abs(given - measured)
            if excess <= tolerance:
                return
            is_of_box = mask is not None and abs(given - box[2] * box[3]) <= max(1, 0.01 * given)
            kind = "area_of_box" if is_of_box else "area_mismatch"
            self._note(kind, f"area {given:g}, that of the {source} {measured:g}", f"area {measured:g}")
        self.repaired["area"] = measured


def find_duplicate_objects(
    checks: Sequence[AnnotationCheck],
) -> Iterator[tuple[AnnotationCheck, AnnotationCheck, float]]:
    """Yield each object of an image that is nearly an earlier one, that earlier one, and their IoU.

    Objects that have masks are compared by these, others by their boxes.
    """
    objects = [check for check in checks if check.box is not None and not check.is_crowd and check.class_name]
    boxes = np.array([check.box if check.mask is None else check.mask.box for check in objects]).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    for index, check in enumerate(objects):
        distance = np.abs(corners[:index] - corners[index]).max(1)
        for near in np.flatnonzero(distance < 1 + 0.1 * boxes[index, 2:].max()):
            earlier = objects[near]
            if earlier.class_name == check.class_name and (earlier.mask is None) == (check.mask is None):
                shapes = [one.box if one.mask is None else one.mask.rle for one in (earlier, check)]
                iou = float(coco_mask.iou(shapes[:1], shapes[1:], [0])[0, 0])
                if iou > _MIN_DUPLICATE_IOU:
                    yield check, earlier, iou
                    break


def _nested_areas(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> list[float]:
    """Return the pixels of each polygon that lies inside a larger one of the same object."""
    if not 1 < len(polygons) <= _MAX_COMPARED_POLYGONS:
        return []
    rles = coco_mask.frPyObjects(polygons, *size)
    areas = coco_mask.area(rles).astype(float)
    inside = coco_mask.iou(rles, rles, [True] * len(rles))  # share of each row's polygon inside each column's
    is_nested = ((inside >= _MIN_NESTED_SHARE) & (areas[:, None] < areas)).any(1) & (areas > 0)
    return areas[is_nested].tolist()


def _segmentation_problem(segmentation: Any, size: tuple[int, int]) -> str:
    """Return the kind of problem of a segmentation that cannot be read."""
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


def _box_problem(box: Any, size: tuple[int, int]) -> str | None:
    """Return the kind of problem of an invalid box; None for a valid one."""
    if not are_numbers(box, 4):
        return "invalid_box"
    if min(box[2:]) <= 0:
        return "inverted_box" if min(box[2:]) < 0 else "empty_box"
    x0, y0, x1, y1 = clip_box(box, size)
    return "box_outside" if x1 <= x0 or y1 <= y0 else None


def _largest_edge_distance(box: Sequence[float], other: Sequence[float]) -> float:
    edges, other_edges = ([x, y, x + width, y + height] for x, y, width, height in (box, other))
    return max(abs(edge - other_edge) for edge, other_edge in zip(edges, other_edges, strict=True))
