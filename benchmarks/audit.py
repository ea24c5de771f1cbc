"""Measure the label audit: `python benchmarks/audit.py [--scenes 200] [--seed 0] [--trays --model FOLDER]`.

The labels of drawn scenes that rf-detr-seg-tiny has never seen are broken in four ways, each in 5 % of the objects:

* deleted: the annotation is removed;
* added: the mask of an object, with its class, is put where no object is;
* swapped: the class is another one;
* sloppy: the mask is shifted, dilated or replaced by that of its box, so that its IoU with the right one is 0.4 to 0.7.

No object is broken twice. A suspect is right if its kind is that of the break and its object is the broken one; a
missing object is right if its detection has an IoU of at least 0.5 with a deleted one.

With --trays the scenes are trays of bolts, nuts and washers, which --model must have learned.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_dilation, shift

from transformers_rfdetr import InstanceDataset, load
from transformers_rfdetr.data.synthetic import draw_dataset, draw_trays
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_dataset
from transformers_rfdetr.evaluation.label_audit import (
    MIN_SCORE,
    AuditedImage,
    Suspect,
    audited_images,
    find_suspects,
    recall_of,
)
from transformers_rfdetr.model.masks import read_segmentation, to_rle

FIRST_SEED = 3_000_000  # scenes from this seed on were never used in training
KINDS = {"deleted": "missing", "added": "superfluous", "swapped": "wrong class", "sloppy": "sloppy mask"}
LOWEST, HIGHEST = 0.4, 0.7  # IoU of a sloppy mask with the right one


class Break(NamedTuple):
    """A label that was broken."""

    kind: str
    image_id: int
    annotation_id: int  # of the deleted annotation, too
    mask: dict[str, Any]  # the right RLE; of an added object, its own


def break_labels(coco: dict[str, Any], share: float, seed: int) -> tuple[dict[str, Any], list[Break]]:
    """Return a COCO dict in which a share of the objects is broken in each way, and what was broken."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    annotations = {one["id"]: one for one in coco["annotations"]}
    masks = {key: mask_of(one, sizes[one["image_id"]]) for key, one in annotations.items()}
    objects = [key for key, one in annotations.items() if not one.get("iscrowd")]
    count = round(share * len(objects))
    order = iter(rng.permutation(objects).tolist())
    broken: dict[int, str] = {}
    changed: dict[int, dict[str, Any] | None] = {}
    for key in islice(order, count):
        category = rng.choice([one["id"] for one in coco["categories"] if one["id"] != annotations[key]["category_id"]])
        broken[key], changed[key] = "swapped", {**annotations[key], "category_id": int(category)}
    for key in islice(order, count):
        broken[key], changed[key] = "deleted", None
    for key in order:
        sloppy = make_sloppy(coco_mask.decode(masks[key]).astype(bool), rng) if len(broken) < 3 * count else None
        if sloppy is not None:
            broken[key], changed[key] = "sloppy", with_mask(annotations[key], sloppy)
    for key in range(max(annotations) + 1, max(annotations) + 1 + count):
        # Nothing is put on what was deleted either.
        there = [(one["image_id"], masks[other]) for other, one in {**annotations, **changed}.items() if one]
        deleted = [(annotations[other]["image_id"], masks[other]) for other in changed if changed[other] is None]
        image_id, mask = place_mask(rng, masks[int(rng.choice(objects))], sizes, there + deleted)
        category = annotations[int(rng.choice(objects))]["category_id"]
        one = {"id": key, "image_id": image_id, "category_id": category, "iscrowd": 0}
        broken[key], changed[key], masks[key] = "added", with_mask(one, mask), encode(mask)
    merged = {**annotations, **changed}
    places = {key: (annotations.get(key) or changed[key])["image_id"] for key in broken}
    breaks = [Break(kind, places[key], key, masks[key]) for key, kind in broken.items()]
    return {**coco, "annotations": [one for one in merged.values() if one is not None]}, breaks


def mask_of(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the mask of an annotation as RLE."""
    return to_rle(read_segmentation(annotation["segmentation"], size), size)


def with_mask(annotation: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Return an annotation with another mask (H, W) bool."""
    rle = encode(mask)
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    kept = {name: value for name, value in annotation.items() if name not in ("bbox", "area")}
    return {**kept, "segmentation": segmentation}


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask (H, W) bool as RLE."""
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def make_sloppy(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Return a mask whose IoU with `mask` is 0.4 to 0.7, or None if none was found."""
    ways = [dilations(mask), shifts(mask, rng), boxes(mask)]
    for way in rng.permutation(len(ways)):
        for sloppy in ways[way]:
            if LOWEST <= (sloppy & mask).sum() / (sloppy | mask).sum() <= HIGHEST:
                return sloppy
    return None


def dilations(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the mask with 1, 2, ... pixels around it."""
    for pixels in range(1, 12):
        yield binary_dilation(mask, iterations=pixels)


def shifts(mask: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the mask moved by 1, 2, ... pixels in one direction."""
    angle = rng.uniform(0, 2 * np.pi)
    for pixels in range(1, 20):
        offset = np.round(pixels * np.array([np.sin(angle), np.cos(angle)]))
        yield shift(mask.astype(np.uint8), offset, order=0).astype(bool)


def boxes(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the box of the mask."""
    rows, columns = np.nonzero(mask)
    box = np.zeros_like(mask)
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    yield box


def place_mask(
    rng: np.random.Generator,
    rle: dict[str, Any],
    sizes: dict[int, tuple[int, int]],
    there: Sequence[tuple[int, dict[str, Any]]],
) -> tuple[int, np.ndarray]:
    """Return an image and a mask of the form of `rle` in it, more than 3 pixels away from all that is `there`."""
    rows, columns = np.nonzero(coco_mask.decode(rle))
    while True:
        image_id = int(rng.choice(list(sizes)))
        height, width = sizes[image_id]
        top, left = rng.integers(height - np.ptp(rows)), rng.integers(width - np.ptp(columns))
        mask: np.ndarray = np.zeros((height, width), bool)
        mask[rows - rows.min() + top, columns - columns.min() + left] = True
        others = [other for place, other in there if place == image_id]
        if not others or not coco_mask.iou(others, [encode(binary_dilation(mask, iterations=3))], [0]).any():
            return image_id, mask


def is_right(suspect: Suspect, image: AuditedImage, image_id: int, broken: Sequence[Break]) -> Break | None:
    """Return the break that a suspect has found, or None."""
    for one in broken:
        if one.image_id != image_id or KINDS[one.kind] != suspect.kind:
            continue
        if suspect.object is not None:
            if image.annotation_ids[suspect.object] == one.annotation_id:
                return one
        elif coco_mask.iou([image.detections.masks[suspect.detection]], [one.mask], [0])[0, 0] >= 0.5:
            return one
    return None


def measure(images: Sequence[AuditedImage], image_ids: Sequence[int], broken: list[Break]) -> dict[str, Any]:
    """Return how many suspects are right, and how many breaks are found, by kind."""
    suspects = find_suspects(images, 0.0)
    left = list(broken)
    right: list[Break | None] = []
    for suspect in suspects:
        found = is_right(suspect, images[suspect.image], image_ids[suspect.image], left)
        if found is not None:
            left.remove(found)
        right.append(found)
    return {"suspects": suspects, "right": right, "broken": broken, "recall": recall_of(images)}


def table(result: dict[str, Any]) -> str:
    """Return the measurement as a Markdown table: right suspects, of how many, and the share of the breaks found."""
    suspects, right, broken = result["suspects"], result["right"], result["broken"]
    cuts = {"first 100 suspects": 100, "as many as broken labels": len(broken)}
    cuts["evidence >= 0.5"] = sum(one.evidence >= 0.5 for one in suspects)
    lines = [f"| labels | broken | {' | '.join(cuts)} |", "|---|---|" + "---|" * len(cuts)]
    for kind in [*KINDS, None]:
        num_broken = sum(kind in (None, one.kind) for one in broken)
        cells = []
        for count in cuts.values():
            pairs = list(zip(suspects, right, strict=True))[:count]
            shown = [found for suspect, found in pairs if kind is None or suspect.kind == KINDS[kind]]
            num_right = sum(found is not None for found in shown)
            precision, recall = num_right / max(len(shown), 1), num_right / max(num_broken, 1)
            cells.append(f"{precision:.2f} of {len(shown)}, {recall:.2f}")
        lines.append(f"| {kind or 'all'} | {num_broken} | {' | '.join(cells)} |")
    return "\n".join(lines)


def audit_scenes(
    num_scenes: int, share: float, seed: int, *, trays: bool = False, model_name: str = "rf-detr-seg-tiny"
) -> dict[str, Any]:
    """Break the labels of drawn scenes, audit them with a model, and [`measure`] it."""
    if trays:
        images, coco = draw_trays(num_scenes, (320, 400), first_seed=FIRST_SEED)
    else:
        images, coco = draw_dataset(num_scenes, (144, 144), metres_per_pixel=(0.15, 0.28), first_seed=FIRST_SEED)
    broken_coco, broken = break_labels(coco, share, seed)
    dataset = InstanceDataset(broken_coco, images)
    model, processor = load(model_name)
    evaluator = evaluate_dataset(model, processor, dataset, score_threshold=MIN_SCORE)
    return measure(audited_images(evaluator, dataset), dataset.image_ids(), broken)


def main() -> None:
    """Break labels, audit them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--trays", action="store_true")
    parser.add_argument("--model", default="rf-detr-seg-tiny")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    which = {"trays": arguments.trays, "model_name": arguments.model}
    result = audit_scenes(arguments.scenes, arguments.share, arguments.seed, **which)
    print(f"{table(result)}\n{100 * result['recall']:.0f} % of the annotated objects are found")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
