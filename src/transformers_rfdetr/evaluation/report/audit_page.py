"""Write one HTML page about the suspects of a label audit: a crop of each, with both outlines and the reason."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ...atomic_files import write_text
from ..audit_files import explain, explain_recall
from ..label_audit import KINDS, MIN_RECALL, AuditedImage, Suspect, recall_of
from .crops import crop_instances, indices_inside, window_around
from .outlines import outline
from .page import page_environment, style_and_script, to_data_uri

_MAX_SUSPECTS = 300  # on the page
_SIDE = 360  # of a crop on the page, in pixels


def save_audit_page(
    folder: str | Path,
    images: Sequence[AuditedImage],
    suspects: Sequence[Suspect],
    dataset: Any,
    *,
    title: str = "Label audit",
) -> Path:
    """Write `audit.html` about the first 300 suspects, and return the file. It takes about 15 KB per suspect.

    Args:
        folder: An existing folder.
        images: The images that were audited.
        suspects: What [`find_suspects`] returns.
        dataset: The dataset that was audited; its images are read again.
        title: Title of the page.
    """
    recall = recall_of(images)
    shown = suspects[:_MAX_SUSPECTS]
    by_image: dict[int, list[int]] = {}
    for number, suspect in enumerate(shown):
        by_image.setdefault(suspect.image, []).append(number)
    cards: dict[int, dict[str, Any]] = {}
    for index, numbers in by_image.items():
        photo = dataset[images[index].index]["image"].convert("RGB")
        cards |= {number: _card(shown[number], images[index], photo) for number in numbers}
    page = (
        page_environment()
        .get_template("audit.html.jinja")
        .render(
            title=title,
            cards=[cards[number] for number in range(len(shown))],
            recall=explain_recall(recall),
            is_weak=recall is not None and recall < MIN_RECALL,
            num_suspects=len(suspects),
            num_objects=sum(int((~image.is_crowd).sum()) for image in images),
            num_images=len(images),
            kinds=[(kind, count) for kind in KINDS if (count := Counter(one.kind for one in shown)[kind])],
            classes=sorted({card["class_name"] for card in cards.values()}),
            **style_and_script("audit.js"),
        )
    )
    path = Path(folder) / "audit.html"
    write_text(path, page, errors="replace")  # file names may contain characters that are not valid in UTF-8
    return path


def _card(suspect: Suspect, image: AuditedImage, photo: PIL.Image.Image) -> dict[str, Any]:
    """Return what the page shows of a suspect: the crop of the photo, and the outlines of objects and detection."""
    place = [image.objects.boxes[suspect.object]] if suspect.object is not None else []
    place += [image.detections.boxes[suspect.detection]] if suspect.detection is not None else []
    window = window_around(np.array(place), (photo.height, photo.width))
    left, top, right, bottom = window
    scale = _SIDE / max(right - left, bottom - top)
    size = (round((bottom - top) * scale), round((right - left) * scale))
    others = [index for index in indices_inside(image.objects, window) if index != suspect.object]
    objects = crop_instances(image.objects.select([*others, *_listed(suspect.object)]), window)
    detections = crop_instances(image.detections.select(_listed(suspect.detection)), window)
    paths = [outline(objects, index, size) for index in range(len(objects))]
    return {
        "suspect": suspect,
        "kind": suspect.kind,
        "class_name": suspect.class_name or suspect.suggestion,
        "reason": explain(suspect),
        "name": image.name,
        "annotation_id": None if suspect.object is None else image.annotation_ids[suspect.object],
        "width": size[1],
        "height": size[0],
        "photo": to_data_uri(photo.crop(window).resize(size[::-1], PIL.Image.Resampling.BICUBIC)),
        "others": list(zip(paths, objects.names, strict=True))[: len(others)],
        "annotated": paths[len(others) :],
        "detected": [outline(detections, index, size) for index in range(len(detections))],
    }


def _listed(index: int | None) -> list[int]:
    return [] if index is None else [index]
