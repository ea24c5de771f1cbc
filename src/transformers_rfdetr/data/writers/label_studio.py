"""Write tasks of Label Studio, and the labeling interface of a project for them.

    SPLIT/tasks.json, SPLIT/images/      tasks to import, and their images
    label_config.xml                     the labeling interface

Label Studio shows the images if LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED is true,
LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is the folder, and the project has a source storage of local files with the path
of SPLIT:
https://labelstud.io/guide/storage#Local-storage.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np
from pycocotools import mask as coco_mask

from ..label_studio import CROWD_TEXT
from .output import Output, Splits, check_class_names, check_split_names, mask_of, polygons_of

_TAGS = {"polygonlabels": "PolygonLabels", "brushlabels": "BrushLabels", "rectanglelabels": "RectangleLabels"}
_LENGTH_BITS = (3, 4, 8, 16)  # of the four kinds of runs


def write_label_studio(splits: Splits, classes: Mapping[int, str], output: Output) -> None:
    """Write splits. Predicted objects are predictions of their tasks, and others annotations."""
    check_split_names(splits, "Label Studio")
    check_class_names(classes, "Label Studio")
    kinds = {"polygonlabels"}
    for split, images in splits.items():
        folder = output.folder / split
        tasks = []
        for image in images:
            name = output.place_image(image, folder / "images").relative_to(output.folder).as_posix()
            output.note_boxes(image)
            output.note_occluded(image)
            results = [
                _result(index, item, classes[item["category_id"]], image.size)
                for index, item in enumerate(image.objects)
            ]
            kinds |= {result["type"] for result in results}
            key = "predictions" if image.is_predicted else "annotations"
            tasks.append({"data": {"image": f"/data/local-files/?d={quote(name)}"}, key: [{"result": results}]})
        folder.mkdir(exist_ok=True)
        (folder / "tasks.json").write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    _labeling_interface(kinds, classes).write(output.folder / "label_config.xml", encoding="utf-8")


def _labeling_interface(kinds: set[str], classes: Mapping[int, str]) -> ElementTree.ElementTree:
    root = Element("View")
    SubElement(root, "Image", {"name": "image", "value": "$image", "zoom": "true"})
    for kind in filter(kinds.__contains__, _TAGS):
        labels = SubElement(root, _TAGS[kind], {"name": kind, "toName": "image"})
        for name in classes.values():
            SubElement(labels, "Label", {"value": name})
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _result(index: int, item: Mapping[str, Any], name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return an object as a rectangle, a polygon or, if it is neither, a brush; lengths are per cent of the image."""
    kind, value = _geometry(item, size)
    result: dict[str, Any] = {
        "id": str(index),
        "type": kind,
        "from_name": kind,
        "to_name": "image",
        "original_width": size[1],
        "original_height": size[0],
        "image_rotation": 0,
        "value": {**value, kind: [name]},
    }
    if "score" in item:
        result["score"] = item["score"]
    texts = [
        *([CROWD_TEXT] if item.get("iscrowd") else []),
        *([str(item["description"])] if item.get("description") else []),
    ]
    return {**result, "meta": {"text": texts}} if texts else result


def _geometry(item: Mapping[str, Any], size: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    percent = 100 / np.array(size[::-1])
    if "segmentation" not in item:
        corner, extent = (np.array(item["bbox"]).reshape(2, 2) * percent).tolist()
        sides = dict(zip(("x", "y", "width", "height"), [*corner, *extent], strict=True))
        return "rectanglelabels", {**sides, "rotation": 0}
    polygons = polygons_of(item, size)
    if polygons is not None and len(polygons) == 1:
        return "polygonlabels", {"points": (polygons[0] * percent).tolist(), "closed": True}
    mask = coco_mask.decode(mask_of(item, size)).astype(bool)
    return "brushlabels", {"format": "rle", "rle": list(encode_brush(mask))}


def encode_brush(mask: np.ndarray) -> bytes:
    """Return a mask (H, W) bool as the RLE that [`decode_brush`] describes, with four equal values for each pixel."""
    values = mask.ravel()
    starts = np.flatnonzero(np.diff(values, prepend=~values[:1]))
    lengths = 4 * np.diff(starts, append=values.size)
    head = f"{4 * values.size:032b}{8 - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in _LENGTH_BITS)
    runs = zip(values[starts].tolist(), lengths.tolist(), strict=True)
    bits = head + "".join(part for value, length in runs for part in _encode_run(255 * value, length))
    return int(bits + "0" * (-len(bits) % 8), 2).to_bytes((len(bits) + 7) // 8)


def _encode_run(value: int, length: int) -> Iterator[str]:
    """Yield the bits of a repeated value: the mark of a repetition, the kind of the length, the length, the value."""
    while length:
        part = min(length, 1 << _LENGTH_BITS[-1])
        kind = next(kind for kind, bits in enumerate(_LENGTH_BITS) if part <= 1 << bits)
        yield f"1{kind:02b}{part - 1:0{_LENGTH_BITS[kind]}b}{value:08b}"
        length -= part
