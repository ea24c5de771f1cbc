"""The instances of an image, and conversions: bitmaps, polygons, crops, drawings, supervision, COCO and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from ..data.drawing import draw_instances
from ..data.outlines import trace_outer_rings
from ..model.masks import box_xyxy_to_xywh, mask_areas

_NUM_SHOWN = 10  # instances, when they are printed


@dataclass(repr=False)
class Instances:
    """The K instances of one image, best first; all fields have the same order.

    Attributes:
        boxes: (K, 4) float32, `boxes_xyxy` in pixels, inside the image.
        scores: (K,) float32 in [0, 1].
        labels: (K,) int64.
        names: K class names.
        masks: K COCO RLEs of the size of the image, with `counts` as str, as JSON and pycocotools take them; None for a
            detection model.
        image_size: (height, width) of the image.
        track_ids: (K,) int64, ids that objects keep from frame to frame of a video, -1 for an object without a
            confirmed track; None without tracking.
        category_ids: (K,) int64, category ids of the dataset that the model was trained on; None if the model's
            configuration does not have them.
        embeddings: (K, D) float32, the query of each instance after the last decoder layer; None unless [`predict`] was
            asked for them. Instances that look alike to the model have similar vectors. They are not normalized: divide
            them by their norms, and inner products are cosine similarities.
        image_embedding: (D,) float32, the mean over the image of the features that the decoder reads, not normalized;
            None as above.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    masks: list[dict[str, Any]] | None
    image_size: tuple[int, int]
    track_ids: np.ndarray | None = None
    category_ids: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    image_embedding: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        best = [f"{name} {score:.2f}" for name, score in zip(self.names[:_NUM_SHOWN], self.scores, strict=False)]
        more = ["..."] * (len(self) > _NUM_SHOWN)
        return f"<Instances: {len(self)}{': ' * bool(best)}{', '.join(best + more)}>"

    @property
    def areas(self) -> np.ndarray:
        """Return the pixels of each mask, or of each box without masks: (K,) float64. An empty mask has area 0."""
        return (
            box_xyxy_to_xywh(self.boxes.astype(float))[:, 2:].prod(1) if self.masks is None else mask_areas(self.masks)
        )

    def select(self, indices: Sequence[int] | np.ndarray) -> "Instances":
        """Return the instances at `indices`, in their order, or those where a (K,) bool array is True."""
        chosen = np.arange(len(self))[np.asarray(indices, dtype=None if len(indices) else np.int64)]
        return Instances(
            self.boxes[chosen],
            self.scores[chosen],
            self.labels[chosen],
            [self.names[index] for index in chosen],
            None if self.masks is None else [self.masks[index] for index in chosen],
            self.image_size,
            None if self.track_ids is None else self.track_ids[chosen],
            None if self.category_ids is None else self.category_ids[chosen],
            None if self.embeddings is None else self.embeddings[chosen],
            self.image_embedding,
        )

    def dense_masks(self) -> np.ndarray:
        """Return the masks as bool (K, height, width)."""
        if not self.masks:
            return np.zeros((0, *self.image_size), bool)
        return coco_mask.decode(self.masks).transpose(2, 0, 1).astype(bool)

    def polygons(self) -> list[list[np.ndarray]]:
        """Return the outer contours of each mask, without holes, each (V, 2) int32 x, y.

        They lead along the edges of the pixels: the contour of pixels 5 to 24 reaches from 5 to 25.
        """
        return [trace_outer_rings(mask) for mask in self.masks or []]

    def crops(self, image: PIL.Image.Image) -> list[PIL.Image.Image]:
        """Return K crops of the image: RGBA, transparent outside of the mask, or RGB crops of the boxes without masks.

        The crop of an empty mask is a single transparent pixel.
        """
        self._check_image(image)
        image = image.convert("RGB")
        crops = []
        for index in range(len(self)):
            if self.masks is None:
                x0, y0, x1, y1 = self.boxes[index]
                left, top, width, height = int(x0), int(y0), int(np.ceil(x1)) - int(x0), int(np.ceil(y1)) - int(y0)
            else:
                left, top, width, height = (int(side) for side in coco_mask.toBbox(self.masks[index]))
            area = (left, top, left + max(width, 1), top + max(height, 1))
            crop = image.crop(area)
            if self.masks is not None:
                inside = coco_mask.decode(self.masks[index])[area[1] : area[3], area[0] : area[2]]
                crop.putalpha(PIL.Image.fromarray(inside * np.uint8(255)))
            crops.append(crop)
        return crops

    def to_supervision(self) -> Any:
        """Convert to supervision's `Detections`, with dense masks, and names as `data["class_name"]`.

        Requires the extra `vision`. Newer releases of supervision warn if OpenCV is missing; this method needs none.
        """
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
        """Convert to COCO results, as pycocotools' `loadRes` and COCO's server take them, ready for JSON.

        Results with masks have no `bbox`, because `loadRes` would compute the areas from it. Instances without area are
        left out.

        Args:
            image_id: Id of the image in the dataset.
            category_ids: Label -> category id; by default `self.category_ids`, or the labels if that is None.
        """
        results = []
        for index in np.flatnonzero(self.areas > 0).tolist():
            label = int(self.labels[index])
            if category_ids is not None:
                category_id = category_ids[label]
            else:
                category_id = label if self.category_ids is None else int(self.category_ids[index])
            result: dict[str, Any] = {
                "image_id": image_id,
                "category_id": category_id,
                "score": float(self.scores[index]),
            }
            if self.masks is None:
                result["bbox"] = box_xyxy_to_xywh(self.boxes[index].astype(float)).tolist()
            else:
                result["segmentation"] = self.masks[index]
            results.append(result)
        return results

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON: `image_size`, and `instances`, a list with one dictionary per instance.

        Embeddings are in it if there are any, which is about 5 KB of JSON for each vector; set both fields to None to
        omit them.
        """
        instances = []
        for index, name in enumerate(self.names):
            one = {
                "name": name,
                "label": int(self.labels[index]),
                "score": float(self.scores[index]),
                "box": self.boxes[index].tolist(),
            }
            for key, ids in (("category_id", self.category_ids), ("track_id", self.track_ids)):
                if ids is not None:
                    one[key] = int(ids[index])
            if self.masks is not None:
                one["mask"] = self.masks[index]
            if self.embeddings is not None:
                one["embedding"] = self.embeddings[index].tolist()
            instances.append(one)
        stored: dict[str, Any] = {"image_size": list(self.image_size), "instances": instances}
        if self.image_embedding is not None:
            stored["image_embedding"] = self.image_embedding.tolist()
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Instances":
        """Restore what [`to_dict`](Instances.to_dict) returned."""
        found = stored["instances"]

        def optional(key: str, dtype: type = np.int64) -> np.ndarray | None:
            return np.array([one[key] for one in found], dtype) if found and key in found[0] else None

        image_embedding = np.array(stored["image_embedding"], np.float32) if "image_embedding" in stored else None
        embeddings = optional("embedding", np.float32)
        if embeddings is None and image_embedding is not None and not found:
            embeddings = np.empty((0, len(image_embedding)), np.float32)

        return cls(
            np.array([one["box"] for one in found], np.float32).reshape(-1, 4),
            np.array([one["score"] for one in found], np.float32),
            np.array([one["label"] for one in found], np.int64),
            [one["name"] for one in found],
            [one["mask"] for one in found] if all("mask" in one for one in found) else None,
            tuple(stored["image_size"]),
            optional("track_id"),
            optional("category_id"),
            embeddings,
            image_embedding,
        )

    def draw(self, image: PIL.Image.Image, *, color_by: str = "class") -> PIL.Image.Image:
        """Draw masks, or boxes without masks, with names and scores on a copy of the image; see [`draw_instances`].

        Args:
            image: The image, upright.
            color_by: "class" for one color per class; "instance" for one per instance, or per track.
        """
        check_color_by(color_by)
        self._check_image(image)
        names, colors = self.names, self.labels if color_by == "class" else np.arange(len(self))
        if self.track_ids is not None:
            colors = colors if color_by == "class" else self.track_ids
            tracks = zip(self.track_ids.tolist(), self.names, strict=True)
            names = [name if track < 0 else f"#{track} {name}" for track, name in tracks]
        boxes = self.boxes if self.masks is None else None
        return draw_instances(image, self.masks, boxes, names, self.scores, color_indices=colors.tolist())

    def _check_image(self, image: PIL.Image.Image) -> None:
        if not isinstance(image, PIL.Image.Image):
            raise TypeError(f"`image` must be a PIL image, got {type(image).__name__}. Open files with PIL.Image.open.")
        if image.size[::-1] != self.image_size:
            raise ValueError(
                f"`image` must have the (height, width) of the instances, {self.image_size}, got {image.size[::-1]}."
                " Pass the image in which they were found, upright (PIL.ImageOps.exif_transpose)."
            )


def check_color_by(color_by: str) -> None:
    """Raise ValueError unless [`Instances.draw`] knows this way to choose colors."""
    if color_by not in ("class", "instance"):
        raise ValueError(f"`color_by` must be 'class' or 'instance', got {color_by!r}")


def _supervision() -> Any:
    try:
        import supervision
    except ImportError as error:
        raise ImportError('`to_supervision` requires supervision: pip install "transformers-rfdetr[vision]"') from error
    return supervision
