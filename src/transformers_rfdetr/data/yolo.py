"""Read YOLO annotations: for each image a text file with one line per object.

[`find_yolo_file`][transformers_rfdetr.data.yolo_layout.find_yolo_file] recognises the format, [`read_yolo_splits`]
reads it.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .annotation_records import AnnotatedSplit, Record
from .image_files import upright_size
from .label_maps import describe_classes
from .text_files import read_text
from .yolo_layout import YoloFolder, YoloImage, read_yolo_folder

logger = logging.get_logger(__name__)

_LINE_FORMAT = "'class x0 y0 x1 y1 x2 y2 ...' with at least three points, or 'class center_x center_y width height'"
_MIN_LINES = 3  # fewer lines do not show that all lines of a split are of another task


def read_yolo_splits(path: Path, image_folder: Any, class_names: Any) -> dict[str, AnnotatedSplit]:
    """Read the label files of the splits of a dataset; the arguments are those of [`read_yolo_folder`].

    Raises:
        ValueError: the description is invalid, images are missing or outside the folder, or share a label file.
    """
    folder = read_yolo_folder(path, image_folder, class_names)
    for note in folder.notes:
        logger.warning(f"{path}: {note}")
    for split, unused in folder.unused_labels.items():
        if unused:
            logger.warning(f"{path}: {len(unused)} label files of {split!r} belong to no image, such as {unused[0]}.")
    for split, images in folder.splits.items():
        if missing := [image.path for image in images if not image.path.is_file()]:
            raise ValueError(
                f"{path}: {split}: {len(missing)} of {len(images)} images do not exist, such as"
                f" {', '.join(map(str, missing[:3]))}. Correct {split!r}."
            )
    for label_path, paths in folder.shared_labels().items():
        raise ValueError(
            f"{label_path} must belong to one image, got {', '.join(map(str, paths[:3]))}. Rename an image and its"
            " labels, or remove it."
        )
    return {
        split: AnnotatedSplit(str(path), folder.classes, _yolo_records(images, folder), folder.root)
        for split, images in folder.splits.items()
    }


def _yolo_records(images: Sequence[YoloImage], folder: YoloFolder) -> Iterator[Record]:
    reader = LabelReader(folder)
    for index, image in enumerate(images):
        size = upright_size(image.path)
        annotations, errors = reader.read(image.label_path, size)
        if errors:
            raise ValueError(errors[0])
        is_inside = image.path.is_relative_to(folder.root)
        name = os.path.relpath(image.path, folder.root) if is_inside else str(image.path)
        fields = {"image_id": index, "file_name": name, "width": size[1], "height": size[0]}
        yield {**fields, "annotations": annotations}
    if problem := reader.find_other_task():
        raise ValueError(problem)


class LabelReader:
    """Read the label files of a split, and detect lines that are neither boxes nor polygons.

    Lines of other tasks, such as pose, also have a class and an even number of values. Some of these lines are
    recognized alone, others only because all lines of a split look alike. Both are refused.
    """

    def __init__(self, folder: YoloFolder) -> None:
        self._classes, self._keypoint_values = folder.classes, folder.keypoint_values
        self._looks: set[tuple[str | None, int]] = set()  # the task that a line may belong to, and its number of values
        self._num_lines, self._first_place = 0, ""

    def read(self, path: Path | None, size: tuple[int, int]) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the annotations of an image of `size` (H, W), in pixels, and the errors of lines that are invalid."""
        annotations: list[dict[str, Any]] = []
        try:
            lines = [] if path is None else read_text(path).splitlines()
        except ValueError as error:
            return annotations, [str(error)]
        errors = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                category, values = self._parse(line.split())
            except ValueError as error:
                errors.append(f"{place}: {error}")
                continue
            if len(values) > 4 and len(self._looks) < 2:
                self._looks.add((_possible_task(values), len(values)))
                self._num_lines, self._first_place = self._num_lines + 1, self._first_place or place
            annotations.append(_to_annotation(category, values, size))
        return annotations, errors

    def find_other_task(self) -> str | None:
        """Return an error if all lines that were read look like those of another task."""
        [(task, _)] = self._looks if len(self._looks) == 1 else [(None, 0)]
        if task is None or self._num_lines < _MIN_LINES:
            return None
        return f"{self._first_place}: {_other_task_error(task)} All {self._num_lines} lines look like this."

    def _parse(self, words: Sequence[str]) -> tuple[int, np.ndarray]:
        """Return the class and the values of a line."""
        try:
            number, values = float(words[0]), np.array(words[1:], np.float64)
            category = int(number)
            if category != number:
                raise ValueError
        except (ValueError, OverflowError) as error:
            raise ValueError(f"a line must be {_LINE_FORMAT}, got {' '.join(words)!r:.80}. Correct it.") from error
        if category not in self._classes:
            raise ValueError(
                f"the class must be one of {describe_classes(self._classes)}, got {category}. Correct it or add its"
                " name."
            )
        if task := _certain_task(values, self._keypoint_values):
            raise ValueError(_other_task_error(task))
        if len(values) % 2 or len(values) < 4:
            raise ValueError(
                f"a line must be {_LINE_FORMAT}, got {len(values)} numbers after the class. Correct it, or remove the"
                " confidence or track number at its end."
            )
        is_inside = (values > -0.01) & (values < 1.01)
        if not is_inside.all():
            raise ValueError(
                f"coordinates must be in [0, 1], got {values[~is_inside][0]:g}. Divide them by the image's width and"
                " height."
            )
        return category, values


def _other_task_error(task: str) -> str:
    return f"a line must be {_LINE_FORMAT}, got {task}. Export the labels for segmentation or detection."


def look_like_other_task(values: np.ndarray) -> bool:
    """Return whether the values of a line with a polygon may also be those of another task, such as pose."""
    return (_certain_task(values, None) or _possible_task(values)) is not None


def _certain_task(values: np.ndarray, keypoint_values: int | None) -> str | None:
    """Return the other task that a line certainly belongs to."""
    if len(values) <= 4:
        return None
    if keypoint_values is not None and len(values) == 4 + keypoint_values:
        return "a box and the keypoints that `kpt_shape` declares"
    if len(values) == 6 and values[5] >= 2 and values[5] % 1 == 0 and _inside(values[:5]):
        return "a box, a confidence and a track number"
    if len(values) % 3 == 1 and (values[6::3] == 2).any() and _possible_task(values):
        return "a box and keypoints with visibilities"
    if len(values) >= 10 and len(values) % 2 == 0 and _is_box_of_polygon(values):
        return "a box and a polygon of one object"
    return None


def _possible_task(values: np.ndarray) -> str | None:
    """Return the other task that the values of a line, at least six, may belong to."""
    low, high = _box_corners(values)
    if (values[2:4] <= 0).any() or (low < -0.01).any() or (high > 1.01).any():
        return None
    if len(values) == 6 and values[5] == 1:
        return "a box, a confidence and a track number"
    for dimension in (3, 2):
        keypoints = values[4:]
        if len(keypoints) % dimension or len(keypoints) < 2 * dimension:
            continue
        keypoints = keypoints.reshape(-1, dimension)
        if not np.isin(keypoints[:, 2:], (0, 1, 2)).all():
            continue
        visible = keypoints[keypoints[:, :2].any(1), :2]  # an invisible keypoint is 0 0
        if len(visible) < 2 or (visible < low - 0.02).any() or (visible > high + 0.02).any():
            continue
        # If the line is a small polygon, its first points read as a box are much larger than the polygon.
        if dimension == 3 or (np.ptp(visible, axis=0) >= 0.3 * values[2:4]).all():
            return "a box and keypoints"
    return None


def _is_box_of_polygon(values: np.ndarray) -> bool:
    """Return whether the first four values are the box around the points of the others."""
    for axis in (0, 1):
        center, extent, points = values[axis], values[2 + axis], values[4 + axis :: 2]
        tolerance = 0.001 + 0.02 * extent
        if abs(center - extent / 2 - points.min()) > tolerance or abs(center + extent / 2 - points.max()) > tolerance:
            return False
    return True


def _box_corners(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values[:2] - values[2:4] / 2, values[:2] + values[2:4] / 2


def _inside(values: np.ndarray) -> bool:
    return bool(((values > -0.01) & (values < 1.01)).all())


def _to_annotation(category: int, values: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Return the polygon or box of a line as an annotation, in pixels of an image of `size` (H, W)."""
    pixels = (values.reshape(-1, 2) * size[::-1]).ravel().round(3).tolist()
    if len(pixels) > 4:
        return {"category_id": category, "segmentation": [pixels]}
    center_x, center_y, width, height = pixels
    return {"category_id": category, "bbox": [center_x - width / 2, center_y - height / 2, width, height]}
