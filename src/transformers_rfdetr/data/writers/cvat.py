"""Write the XML of "CVAT for images 1.1", with the images in images/SPLIT."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from ...model.masks import decode_box
from ..cvat import CROWD_ATTRIBUTE
from .output import ImageObjects, Output, Splits, check_class_names, mask_of, polygons_of

_DESCRIPTION = "description"


def write_cvat(splits: Splits, classes: Mapping[int, str], output: Output) -> None:
    """Write splits as subsets. A crowd region has the attribute `is_crowd`, and a description is an attribute too."""
    check_class_names(classes, "CVAT")
    for split in splits:
        if split != split.strip() or split.lower() in ("", "default"):
            raise ValueError(f"splits for CVAT must have a name other than 'default', got {split!r}. Rename the split.")
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    labels = SubElement(SubElement(SubElement(root, "meta"), "task"), "labels")
    is_described = False
    for split, images in splits.items():
        for image in images:
            folder = output.folder / "images" / split
            name = output.place_image(image, folder).relative_to(folder).as_posix()
            output.note_boxes(image)
            is_described |= any(item.get("description") for item in image.objects)
            root.append(cvat_image(image, classes, {"id": str(len(root) - 2), "name": name, "subset": split}))
    attributes = {CROWD_ATTRIBUTE: ("checkbox", "false")} | ({_DESCRIPTION: ("text", "")} if is_described else {})
    for name in classes.values():
        label = SubElement(labels, "label")
        SubElement(label, "name").text = name
        _define_attributes(SubElement(label, "attributes"), attributes)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(output.folder / "annotations.xml", encoding="utf-8", xml_declaration=True)


def _define_attributes(element: Element, attributes: Mapping[str, tuple[str, str]]) -> None:
    """Define attributes of a label: name -> type of its input, and default."""
    for name, (input_type, default) in attributes.items():
        attribute = SubElement(element, "attribute")
        fields = {"name": name, "mutable": "False", "input_type": input_type}
        for key, value in {**fields, "default_value": default, "values": default}.items():
            SubElement(attribute, key).text = value


def cvat_image(image: ImageObjects, classes: Mapping[int, str], attributes: Mapping[str, str]) -> Element:
    """Return the element of an image."""
    height, width = image.size
    element = Element("image", {**attributes, "width": str(width), "height": str(height)})
    for group, item in enumerate(image.objects, start=1):
        parts = _geometries(item, image.size)
        for tag, values in parts:
            common = {"label": classes[item["category_id"]], "source": "manual"}
            common |= {"occluded": str(int(bool(item.get("occluded")))), "z_order": "0"}
            if len(parts) > 1:
                common["group_id"] = str(group)
            part = SubElement(element, tag, {**common, **values})
            SubElement(part, "attribute", {"name": CROWD_ATTRIBUTE}).text = str(bool(item.get("iscrowd"))).lower()
            if item.get("description"):
                SubElement(part, "attribute", {"name": _DESCRIPTION}).text = str(item["description"])
    return element


def _geometries(item: Mapping[str, Any], size: tuple[int, int]) -> list[tuple[str, dict[str, str]]]:
    """Return tag and attributes of a box, of a polygon for each part, or of a mask."""
    if "segmentation" not in item:
        x, y, width, height = item["bbox"]
        return [("box", {"xtl": f"{x}", "ytl": f"{y}", "xbr": f"{x + width}", "ybr": f"{y + height}"})]
    polygons = polygons_of(item, size)
    if polygons is not None:
        return [("polygon", {"points": ";".join(f"{x},{y}" for x, y in points.tolist())}) for points in polygons]
    region, top, left = decode_box(mask_of(item, size))
    frame = {"left": left, "top": top, "width": region.shape[1], "height": region.shape[0]}
    return [("mask", {"rle": ", ".join(map(str, _runs(region))), **{key: str(value) for key, value in frame.items()}})]


def _runs(mask: np.ndarray) -> list[int]:
    """Return the lengths of the runs along the rows of a mask (R, C) bool, background first."""
    values = mask.ravel()
    changes: np.ndarray = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff(changes, prepend=0, append=values.size).tolist()
    return [0, *runs] if values[0] else runs
