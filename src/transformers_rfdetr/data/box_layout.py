"""Notice boxes that are not [x, y, width, height], as those of COCO are."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..model.validation import are_numbers, to_builtin

_CORNERS, _CENTER = "[x0, y0, x1, y1]", "[center_x, center_y, width, height]"
_MIN_OUTSIDE = 3  # boxes, and half of all, that must extend beyond their image


class BoxLayout:
    """Compare the boxes of a split with the sizes of their images."""

    def __init__(self) -> None:
        self._num_boxes = self._num_outside = 0
        self._possible = {_CORNERS, _CENTER}
        self._example = ""

    def add(self, annotations: Iterable[Mapping[str, Any]], size: tuple[Any, Any]) -> None:
        """Add the boxes of an image of `size` (H, W); without a size they are ignored."""
        height, width = map(to_builtin, size)
        if not are_numbers([height, width], 2) or not self._possible:
            return
        for annotation in annotations:
            box = to_builtin(annotation.get("bbox"))
            if not are_numbers(box, 4):
                continue
            a, b, c, d = box
            self._num_boxes += 1
            if a + c > width + 1 or b + d > height + 1:
                self._num_outside += 1
                self._example = self._example or f"{box} in an image of {height} x {width}"
            if not (a < c <= width + 1 and b < d <= height + 1):
                self._possible.discard(_CORNERS)
            if not (c / 2 - 1 <= a <= width + 1 - c / 2 and d / 2 - 1 <= b <= height + 1 - d / 2):
                self._possible.discard(_CENTER)

    def error(self) -> str | None:
        """Return an error if many boxes extend beyond their image, and all fit into it in another layout."""
        if not self._possible or self._num_outside < max(_MIN_OUTSIDE, self._num_boxes / 2):
            return None
        return (
            f"boxes must be [x, y, width, height], got {self._num_outside} of {self._num_boxes} that extend beyond the"
            f" image, such as {self._example}. All of them fit as {' or '.join(sorted(self._possible))}: convert them."
        )


def with_checked_boxes(records: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield the records; raise ValueError at the end if their boxes have another layout."""
    layout = BoxLayout()
    for record in records:
        layout.add(record["annotations"], (record.get("height"), record.get("width")))
        yield record
    if error := layout.error():
        raise ValueError(error)
