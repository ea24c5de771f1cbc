"""Provide small COCO files without defects, to which tests add defects, and summaries of reports."""

import json

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
BOX, AREA = [10, 10, 20, 20], 400  # of the square
RIGHT = [50, 10, 60, 10, 60, 30, 50, 30]  # at the right edge of an image of 40 x 60
ORIENTATION = 0x0112


def draw_image(seed, size=(40, 60)):
    """Return an image of `size` (H, W) with soft areas, different for each seed."""
    areas = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    return PIL.Image.fromarray(areas).resize(size[::-1], PIL.Image.Resampling.BICUBIC)


def save_rotated(path, seed, orientation):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    draw_image(seed).save(path, exif=exif, quality=95)


def square(number, image_id=1, category=1, **changes):
    """Return an annotation without defects; a change to `...` removes the field."""
    given = {"id": number, "image_id": image_id, "category_id": category, "bbox": BOX, "area": AREA, "iscrowd": 0}
    given = {**given, "segmentation": [SQUARE], **changes}
    return {name: value for name, value in given.items() if value is not ...}


def rle(size=(40, 60)):
    """Return the square as an RLE."""
    return {"size": list(size), "counts": coco_mask.frPyObjects([SQUARE], *size)[0]["counts"].decode()}


def image_entry(number, name, size=(40, 60), **changes):
    return {"id": number, "file_name": name, "height": size[0], "width": size[1], **changes}


def write_coco(path, images, annotations, categories=({"id": 1, "name": "roof"},)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": list(categories)}))
    return path


def counts_of(report):
    return {(found.kind, found.split): found.count for found in report.findings}


def errors_of(report):
    return {found.kind: found.count for found in report.findings if found.severity == "error"}


def folder_content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
