"""Write the suspects of a label audit: as a list, and as marks in the dataset for annotation programs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.dataset import InstanceDataset
from ..data.outlines import editable_polygons
from ..data.writers.output import ImageObjects, dataset_images
from ..model.masks import box_xyxy_to_xywh
from .label_audit import MIN_RECALL, AuditedImage, Suspect


def explain(suspect: Suspect) -> str:
    """Return why a label is suspected, in one sentence."""
    detected = f"{suspect.suggestion} with a score of {suspect.score:.2f}"
    if suspect.kind == "missing":
        return f"Detected as {detected}; nothing is annotated."
    if suspect.kind == "superfluous":
        best = f"the best detection that overlaps it has a score of {suspect.score:.2f}"
        return f"Annotated as {suspect.class_name}; {best if suspect.score else 'no detection overlaps it'}."
    if suspect.kind == "wrong class":
        return f"Annotated as {suspect.class_name}, detected as {detected}."
    usual = f"{suspect.usual_iou:.2f} is usual for this class and size"
    return f"Detected as {detected}, but the IoU of the masks is {suspect.iou:.2f}; {usual}."


def explain_recall(recall: float | None) -> str:
    """Return how many annotated objects the model finds, and a warning if it finds so few that it cannot judge labels.

    `recall` is what [`recall_of`] returns.
    """
    if recall is None:
        return "No objects are annotated."
    found = f"{100 * recall:.0f} % of the annotated objects are found (class, score > 0.5, IoU >= 0.5)"
    if recall >= MIN_RECALL:
        return f"{found}."
    return (
        f"Only {found}, so most suspects are probably errors of the model, not of the labels. Train it for more epochs"
        " or on more images, with another --output. A few dozen images are judged better by eye: `transformers-rfdetr"
        " check-dataset --overlays`."
    )


def suspect_rows(images: Sequence[AuditedImage], suspects: Sequence[Suspect], dataset: Any) -> list[dict[str, Any]]:
    """Return the suspects as JSON values, with the file and the ids that the dataset has.

    `bbox` is that of the object or of the detection, [x, y, width, height] in pixels. `segmentation` is the RLE of the
    detection, None if there is none. `iou` and `usual_iou` are None unless the mask is suspected.
    """
    image_ids = dataset.image_ids()
    rows = []
    for suspect in suspects:
        image = images[suspect.image]
        shown, index = (image.detections, suspect.detection)
        if suspect.object is not None:
            shown, index = image.objects, suspect.object
        masks = image.detections.masks
        is_sloppy = suspect.kind == "sloppy mask"
        rows.append(
            {
                "image": image.name,
                "image_id": image_ids[image.index],
                "annotation_id": None if suspect.object is None else image.annotation_ids[suspect.object],
                "kind": suspect.kind,
                "evidence": round(suspect.evidence, 4),
                "class": suspect.class_name,
                "suggestion": suspect.suggestion,
                "score": round(suspect.score, 4),
                "iou": round(suspect.iou, 4) if is_sloppy else None,
                "usual_iou": round(suspect.usual_iou, 4) if is_sloppy else None,
                "reason": explain(suspect),
                "bbox": box_xyxy_to_xywh(shown.boxes[[index]].astype(float))[0].round(2).tolist(),
                "segmentation": None if masks is None or suspect.detection is None else masks[suspect.detection],
            }
        )
    return rows


def marked_images(
    dataset: InstanceDataset, images: Sequence[AuditedImage], suspects: Sequence[Suspect]
) -> Iterator[ImageObjects]:
    """Yield the images of a dataset with the suspects marked, for `write_annotations`.

    A suspected object has a `description`, which annotation programs show, and the field `suspect` in COCO. A missing
    object is added as a crowd region, which is ignored in training until somebody confirms it.
    """
    of_image: dict[int, list[Suspect]] = {}
    for suspect in suspects:
        of_image.setdefault(suspect.image, []).append(suspect)
    next_id = 1 + max((key for image in images for key in image.annotation_ids), default=0)
    category_of = {name: category for category, name in dataset.classes.items()}
    for number, (audited, image) in enumerate(zip(images, dataset_images(dataset), strict=True)):
        marks: dict[int, Suspect] = {}
        added = []
        for suspect in of_image.get(number, []):
            if suspect.object is not None:
                marks[audited.annotation_ids[suspect.object]] = suspect
            else:
                added.append({"id": next_id, "category_id": category_of[suspect.suggestion], "iscrowd": 1})
                added[-1] |= _geometry(audited, suspect.detection) | _mark(suspect)
                next_id += 1
        objects = [item | _mark(marks[item["id"]]) if item["id"] in marks else item for item in image.objects]
        yield image._replace(objects=[*objects, *added])


def _mark(suspect: Suspect) -> dict[str, Any]:
    fields = {name: value for name, value in dataclasses.asdict(suspect).items() if name in ("kind", "suggestion")}
    text = f"suspect, {suspect.kind} ({suspect.evidence:.2f}): {explain(suspect)}"
    return {"suspect": {**fields, "evidence": round(suspect.evidence, 4)}, "description": text}


def _geometry(image: AuditedImage, detection: int) -> dict[str, Any]:
    if image.detections.masks is None:
        return {"bbox": box_xyxy_to_xywh(image.detections.boxes[[detection]].astype(float))[0].tolist()}
    mask = image.detections.masks[detection]
    return {"segmentation": editable_polygons(mask) or mask}
