"""Regions in which nothing is rewarded or punished, from the objects of a class that says so."""

from collections.abc import Collection
from typing import Any

from .annotation_records import Record


class IgnoredClassRecords:
    """Records in which the objects of ignored classes are crowd regions of every other class.

    COCO's evaluation and the loss ignore detections of the class of a crowd region, so that one of each class ignores
    all of them.

    Args:
        records: Has `record`, and `image` and `encoded_image` with the same arguments, such as [`PackedRecords`].
        ignored: Category ids of the ignored classes.
        kept: Those of the other classes.
    """

    def __init__(self, records: Any, ignored: Collection[int], kept: Collection[int]) -> None:
        self._records, self._ignored, self._kept = records, ignored, kept
        self.image, self.encoded_image = records.image, records.encoded_image

    def record(self, source: Any) -> Record:
        """Return a record, of which copies of a region have no `id`."""
        record, annotations = self._records.record(source), []
        for annotation in record["annotations"]:
            if annotation.get("category_id") not in self._ignored:
                annotations.append(annotation)
                continue
            region = {name: value for name, value in annotation.items() if name != "id"}
            annotations += [region | {"category_id": category, "iscrowd": 1} for category in self._kept]
        return {**record, "annotations": annotations}
