"""What was found in an image, and its forms: RLE, bitmaps, outlines, cut-outs, supervision, COCO, JSON, a drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from ..data.drawing import draw_instances


@dataclass
class Instances:
    """What was found in one image, best first; everything has K entries in the same order.

    Attributes:
        boxes: (K, 4) float32, `boxes_xyxy` in pixels, inside the image.
        scores: (K,) float32 in [0, 1].
        labels: (K,) int64.
        names: K names of classes.
        masks: K COCO RLEs of the image's size, `counts` as str, which JSON and pycocotools take; None of a detection
            model.
        image_size: (height, width) of the image.
        track_ids: (K,) int64, the number that an object keeps from one frame of a video to the next, -1 while a
            tracker is not sure of it; None where nothing is tracked.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    masks: list[dict[str, Any]] | None
    image_size: tuple[int, int]
    track_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, indices: Sequence[int] | np.ndarray) -> "Instances":
        """Some of them, by their numbers or by (K,) bool, in the order given."""
        chosen = np.arange(len(self))[np.asarray(indices, dtype=None if len(indices) else np.int64)]
        return Instances(
            self.boxes[chosen],
            self.scores[chosen],
            self.labels[chosen],
            [self.names[index] for index in chosen],
            None if self.masks is None else [self.masks[index] for index in chosen],
            self.image_size,
            None if self.track_ids is None else self.track_ids[chosen],
        )

    def dense_masks(self) -> np.ndarray:
        """The masks as bool (K, height, width)."""
        if not self.masks:
            return np.zeros((0, *self.image_size), bool)
        return coco_mask.decode(self.masks).transpose(2, 0, 1).astype(bool)

    def polygons(self) -> list[list[np.ndarray]]:
        """The outlines of each mask's parts as (V, 2) x, y in pixels, without holes, by supervision."""
        polygons_of = _supervision().mask_to_polygons
        return [polygons_of(coco_mask.decode(mask).astype(bool)) for mask in self.masks or []]

    def crops(self, image: PIL.Image.Image) -> list[PIL.Image.Image]:
        """Each instance cut out of the image: RGBA of its mask's extent, transparent around it; 1 x 1 if empty.

        Without masks, RGB of its box.
        """
        self._check_size(image)
        crops = []
        for index in range(len(self)):
            if self.masks is None:
                x0, y0, x1, y1 = self.boxes[index]
                left, top, width, height = int(x0), int(y0), int(np.ceil(x1)) - int(x0), int(np.ceil(y1)) - int(y0)
            else:
                left, top, width, height = (int(side) for side in coco_mask.toBbox(self.masks[index]))
            area = (left, top, left + max(width, 1), top + max(height, 1))
            crop = image.convert("RGB").crop(area)
            if self.masks is not None:
                inside = coco_mask.decode(self.masks[index])[area[1] : area[3], area[0] : area[2]]
                crop.putalpha(PIL.Image.fromarray(inside * np.uint8(255)))
            crops.append(crop)
        return crops

    def to_supervision(self) -> Any:
        """supervision's `Detections`: masks as bool (K, height, width), names under `data["class_name"]`."""
        return _supervision().Detections(
            xyxy=self.boxes.astype(np.float32),
            mask=None if self.masks is None else self.dense_masks(),
            confidence=self.scores,
            class_id=self.labels.astype(int),
            tracker_id=None if self.track_ids is None else self.track_ids.astype(int),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_coco(
        self, image_id: int, category_ids: Mapping[int, int] | Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Results as COCO's server and pycocotools' `loadRes` take them, ready for JSON.

        With masks they have no boxes, as COCO's format for segmentation: `loadRes` would take areas from them.

        Args:
            image_id: The image's in the dataset.
            category_ids: Label -> category id in the dataset; the labels themselves by default.
        """
        results = []
        for index, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            label = int(self.labels[index])
            result = {
                "image_id": image_id,
                "category_id": label if category_ids is None else category_ids[label],
                "score": float(self.scores[index]),
            }
            where = {"bbox": [x0, y0, x1 - x0, y1 - y0]} if self.masks is None else {"segmentation": self.masks[index]}
            results.append(result | where)
        return results

    def to_dict(self) -> dict[str, Any]:
        """All of it in what JSON knows: `image_size`, and under `instances` one dictionary for each."""
        instances = []
        for index, name in enumerate(self.names):
            one = {
                "name": name,
                "label": int(self.labels[index]),
                "score": float(self.scores[index]),
                "box": self.boxes[index].tolist(),
            }
            if self.track_ids is not None:
                one["track_id"] = int(self.track_ids[index])
            if self.masks is not None:
                one["mask"] = self.masks[index]
            instances.append(one)
        return {"image_size": list(self.image_size), "instances": instances}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Instances":
        """What [`to_dict`](Instances.to_dict) made."""
        found = stored["instances"]
        return cls(
            np.array([one["box"] for one in found], np.float32).reshape(-1, 4),
            np.array([one["score"] for one in found], np.float32),
            np.array([one["label"] for one in found], np.int64),
            [one["name"] for one in found],
            [one["mask"] for one in found] if all("mask" in one for one in found) else None,
            tuple(stored["image_size"]),
            np.array([one["track_id"] for one in found], np.int64) if found and "track_id" in found[0] else None,
        )

    def draw(self, image: PIL.Image.Image, *, color_by: str = "class") -> PIL.Image.Image:
        """The image with masks, outlines, names and scores over it, boxes where there are no masks.

        Args:
            image: The image, upright.
            color_by: "class" for a colour a class; "instance" for one each, or one a track.
        """
        check_color_by(color_by)
        self._check_size(image)
        tracks = self.track_ids
        colors = self.labels if color_by == "class" else np.arange(len(self)) if tracks is None else tracks
        names = self.names if tracks is None else [f"#{t} {n}" for t, n in zip(tracks, self.names, strict=True)]
        boxes = self.boxes if self.masks is None else None
        return draw_instances(image, self.masks, boxes, names, self.scores, color_indices=colors.tolist())

    def _check_size(self, image: PIL.Image.Image) -> None:
        if image.size[::-1] != self.image_size:
            raise ValueError(
                f"the image is {image.size[::-1]}, its instances are in one of {self.image_size} (height, width);"
                " pass the image that they were found in, upright (PIL.ImageOps.exif_transpose)"
            )


def check_color_by(color_by: str) -> None:
    """ValueError unless it is a way to colour instances that [`Instances.draw`] knows."""
    if color_by not in ("class", "instance"):
        raise ValueError(f"color_by {color_by!r} is neither 'class' nor 'instance'")


def _supervision() -> Any:
    try:
        import supervision
    except ImportError as error:
        raise ImportError('this needs supervision: pip install "transformers-rfdetr[vision]"') from error
    return supervision
