"""An unusual or broken dataset is read completely or refused, and loader and check agree about what is lost."""

import io
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from transformers_rfdetr import check_dataset, load_instance_dataset

from coco_files import draw_image, image_entry, square
from properties import holds, outcome

pytestmark = pytest.mark.usefixtures("quiet")


def check_that_loader_and_check_agree(source: Any, num_objects: dict[str, int]) -> str | None:
    """Compare what the loader and the check find in a dataset that has `num_objects` by split.

    Returns:
        The message of the loader, if it refuses the dataset.
    """
    data, refused = outcome(load_instance_dataset, source)
    report, check_refused = outcome(check_dataset, source, workers=1)
    if refused is not None:
        assert check_refused is not None or report.has_errors, refused
        return refused
    assert check_refused is None
    loaded = {name: sum(len(sample["annotations"]) for sample in split) for name, split in data.items()}
    assert loaded == {name: counts["objects"] + counts["crowds"] for name, counts in report.splits.items()}
    lost = num_objects.keys() - loaded.keys() or sum(loaded.values()) < sum(num_objects.values())
    assert not lost or {found.severity for found in report.findings} & {"error", "warning"}
    return None


# -- YOLO --------------------------------------------------------------------------------------------------------------

# YAML reads some of them as other values than strings.
NAMES = ["yes", "007", "1.10", "null", "12:30", "a roof"]
POLYGON = "0.2 0.25 0.5 0.25 0.5 0.75 0.2 0.75"
BOX = "0.5 0.5 0.3 0.4"


@dataclass
class YoloFiles:
    """The files of a YOLO dataset: two images in "train" and one in "val", with two objects each."""

    description: dict[str, Any] = field(
        default_factory=lambda: {"names": f"[{', '.join(NAMES)}]", "train": "train/images", "val": "val/images"}
    )
    description_name: str | None = "data.yaml"
    images: list[str] = field(default_factory=lambda: ["train/images/a.png", "train/images/b.png", "val/images/c.png"])
    labels: dict[str, list[str]] = field(
        default_factory=lambda: {
            name: [f"5 {POLYGON}", f"0 {BOX}"]
            for name in ("train/labels/a.txt", "train/labels/b.txt", "val/labels/c.txt")
        }
    )
    other: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the files, and return the folder."""
        content = {name: "\n".join(lines).encode() for name, lines in self.labels.items()} | self.other
        if self.description_name is not None:
            lines = [f"{key}: {value}" for key, value in self.description.items()]
            content[self.description_name] = "\n".join(lines).encode()
        for seed, name in enumerate(self.images):
            buffer = io.BytesIO()
            draw_image(seed).save(buffer, {"gif": "GIF", "ppm": "PPM", "png": "PNG"}.get(name[-3:], "JPEG"))
            content[name] = buffer.getvalue()
        for name, value in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value)
        return folder


def prefix_paths(files: YoloFiles, prefix: str, separator: str, quote: str) -> None:
    """Write the paths of the data.yaml as another computer has them."""
    for key, path in files.description.items():
        if key.lower() in ("train", "val", "valid", "validation"):
            files.description[key] = f"{quote}{prefix}{path.replace('/', separator)}{quote}"


def list_images(files: YoloFiles, prefix: str) -> None:
    """Replace the folder of a split by a list of images."""
    listed = "\r\n".join(prefix + name for name in files.images if name.startswith("train"))
    files.other["train.txt"] = listed.encode()
    files.description["train"] = "train.txt"


def move_labels(files: YoloFiles, rename: Callable[[str], str]) -> None:
    """Rename all label files."""
    files.labels = {rename(name): lines for name, lines in files.labels.items()}


def rename_images(files: YoloFiles, suffix: str) -> None:
    """Give the images another suffix, and labels that kept the old one the new one as well."""
    files.images = [name[:-4] + suffix for name in files.images]
    files.labels = {name.replace(".png.txt", f"{suffix}.txt"): lines for name, lines in files.labels.items()}


def remove_description(files: YoloFiles) -> None:
    """Replace the data.yaml by a list of classes."""
    files.description_name = None
    files.other["classes.txt"] = "\n".join(NAMES).encode()


def rename_key(files: YoloFiles, key: str, renamed: str) -> None:
    """Rename a key of the data.yaml."""
    if key in files.description:
        files.description[renamed] = files.description.pop(key)


def add_files(files: YoloFiles, *names: str) -> None:
    """Add files that are neither images nor labels."""
    files.other |= dict.fromkeys(names, b"0 0.5")


def replace_lines(files: YoloFiles, line: str) -> None:
    """Replace all lines of all label files."""
    files.labels = {name: [line, line] for name in files.labels}


def add_line(files: YoloFiles, line: str) -> None:
    """Add a line to the label file of the first image."""
    next(iter(files.labels.values())).append(line)


def describe(files: YoloFiles, **entries: str) -> None:
    """Add entries to the data.yaml, or change them."""
    files.description |= entries


READ_AS_MEANT = [
    *(
        (prefix_paths, prefix, separator, quote)
        for prefix, separator, quote in (
            (r"C:\Users\me\roofs" + "\\", "\\", ""),
            ("C:/Users/me/roofs/", "/", '"'),
            ("\\", "\\", "'"),
            ("", "\\", ""),
            ("/content/roofs/", "/", ""),
            ("project-1/", "/", ""),
            ("../", "/", ""),
            ("./", "/", "'"),
        )
    ),
    *((list_images, prefix) for prefix in ("", "./", "/content/roofs/", "data/")),
    (move_labels, lambda name: name.replace(".txt", ".png.txt")),
    (move_labels, lambda name: name.replace("/labels/", "/images/")),
    *((rename_images, suffix) for suffix in (".jfif", ".jpe", ".gif", ".ppm", ".jp2", ".avif", ".JPG")),
    (remove_description,),
    (rename_key, "val", "valid"),
    (rename_key, "val", "Validation"),
    (rename_key, "train", "Train"),
    (
        add_files,
        "train/images/._a.png",
        "train/images/.cache/a.png",
        "train/labels/._a.txt",
        "train/labels/classes.txt",
    ),
    (describe, {"test": "../test/images"}),
    (describe, {"path": "/not/there"}),
    (describe, {"nc": "7"}),
    (describe, {"names": "{" + ", ".join(f"{number}: {name}" for number, name in enumerate(NAMES)) + "}"}),
]
REFUSED = [
    (add_line, "5 0.5 0.5 0.3 0.4 0.9"),  # a confidence
    (add_line, "5 0.5 0.5 0.3 0.4 0.9 12"),  # a confidence and a track number
    (add_line, "5 0.5 0.5 0.3 0.4 0.35 0.3 0.65 0.3 0.65 0.7 0.35 0.7"),  # a box and its polygon
    (add_line, "5 0.5 0.5 0.3 0.4 0.4 0.4 2 0.6 0.6 0"),  # a box and keypoints with visibilities
    (add_line, "5 30 20 18 16"),  # pixels
    (add_line, "6 0.5 0.5 0.3 0.4"),  # an undefined class
    (replace_lines, "0 0.5 0.5 0.3 0.4 0.45 0.4 0.55 0.4 0.5 0.6"),  # a box and keypoints
    (replace_lines, "0 0.5 0.5 0.3 0.4 0.9 1"),
    (describe, {"names": "{0: roof, 0: tree}"}),
    (describe, {"names": "roof"}),
    (describe, {"names": "[roof, '']"}),
    (describe, {"train": "../elsewhere"}),
    (describe, {"val": "x/train/images", "train": "y/train/images"}),
]


def apply(files: YoloFiles, change: tuple[Any, ...]) -> None:
    function, *arguments = change
    function(files, **arguments[0]) if function is describe else function(files, *arguments)


@pytest.mark.parametrize("change", [*READ_AS_MEANT, *REFUSED])
def test_a_change_of_a_yolo_dataset_is_read_as_meant_or_refused(change, tmp_path):
    files = YoloFiles()
    apply(files, change)
    refused = check_that_loader_and_check_agree(files.write(tmp_path), {"train": 4, "validation": 2})
    assert (refused is not None) == (change in REFUSED), refused
    if refused is None:
        data = load_instance_dataset(tmp_path)
        assert data.id2label == dict(enumerate(NAMES))
        assert {name: len(split) for name, split in data.items()} == {"train": 2, "validation": 1}
        assert sum(len(sample["annotations"]) for split in data.values() for sample in split) == 6


@holds(40, changes=st.lists(st.sampled_from([*READ_AS_MEANT * 2, *REFUSED]), min_size=2, max_size=4, unique_by=repr))
def test_loader_and_check_agree_about_a_yolo_dataset_with_several_changes(changes):
    files = YoloFiles()
    for change in changes:
        apply(files, change)
    with tempfile.TemporaryDirectory() as folder:
        check_that_loader_and_check_agree(files.write(Path(folder)), {"train": 4, "validation": 2})


# -- COCO --------------------------------------------------------------------------------------------------------------


@dataclass
class CocoFiles:
    """The files of a COCO dataset: two images in "train" and one in "val", with two objects each."""

    annotation_files: dict[str, str] = field(
        default_factory=lambda: {name: f"annotations/instances_{name}2017.json" for name in ("train", "val")}
    )
    image_folder: str = "images"
    names: dict[str, str] = field(default_factory=dict)  # stated name -> name on disk, where they differ
    content: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            split: {
                "images": [image_entry(number, f"{split}_{number}.png") for number in numbers],
                "annotations": [
                    square(2 * number + is_second, image_id=number, category=is_second, **(LEFT if is_second else {}))
                    for number in numbers
                    for is_second in (0, 1)
                ],
                "categories": [{"id": 0, "name": "roof"}, {"id": 1, "name": "tree"}],
            }
            for split, numbers in (("train", [1, 2]), ("val", [3]))
        }
    )

    def write(self, folder: Path) -> Path:
        """Write the files, and return the folder."""
        for split, name in self.annotation_files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.content[split]))
        for split, first in (("train", 1), ("val", 3)):
            for number in range(first, 4 if first == 3 else 3):
                name = f"{split}_{number}.png"
                path = folder / self.image_folder / self.names.get(name, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_image(number).save(path)
        return folder


LEFT = {"bbox": [2, 4, 6, 30], "area": 180, "segmentation": [[2, 4, 8, 4, 8, 34, 2, 34]]}


def name_files(files: CocoFiles, train: str, val: str) -> None:
    """Give the annotation files other names."""
    files.annotation_files = {"train": train, "val": val}


def state_names(files: CocoFiles, pattern: str) -> None:
    """Write the names of the images as another computer has them."""
    for content in files.content.values():
        for image in content["images"]:
            image["file_name"] = pattern.format(image["file_name"])


def store_names(files: CocoFiles, pattern: str) -> None:
    """Give the images other names on disk."""
    names = [f"{split}_{number}.png" for split, number in (("train", 1), ("train", 2), ("val", 3))]
    files.names = {name: pattern.format(name) for name in names}


def change_case(files: CocoFiles) -> None:
    """Write the names of the images in upper case."""
    for content in files.content.values():
        for image in content["images"]:
            image["file_name"] = image["file_name"].upper()


def use_addresses(files: CocoFiles) -> None:
    """Replace the names of the images by addresses, as LVIS does."""
    for content in files.content.values():
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"


def change_annotations(files: CocoFiles, **changes: Any) -> None:
    """Change the first annotation of each image; a function gets the old value."""
    for content in files.content.values():
        for annotation in content["annotations"][::2]:
            for key, value in changes.items():
                annotation[key] = value(annotation.get(key)) if callable(value) else value
            for key in [key for key, value in annotation.items() if value is ...]:
                del annotation[key]


def change_all_annotations(files: CocoFiles, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace all annotations of all splits."""
    for content in files.content.values():
        content["annotations"] = [change(annotation) for annotation in content["annotations"]]


def to_fractions(annotation: dict[str, Any]) -> dict[str, Any]:
    """Divide coordinates by the size of the images, 40 x 60."""
    x, y, width, height = annotation["bbox"]
    [polygon] = annotation["segmentation"]
    polygon = [value / (40 if index % 2 else 60) for index, value in enumerate(polygon)]
    return annotation | {"bbox": [x / 60, y / 40, width / 60, height / 40], "segmentation": [polygon]}


def to_float_runs(segmentation: Any) -> dict[str, Any]:
    """Return polygons as an RLE whose counts are floats; anything else is returned unchanged."""
    if not isinstance(segmentation, list) or not isinstance(segmentation[0], list):
        return segmentation
    [encoded] = coco_mask.frPyObjects(segmentation, 40, 60)
    flat = coco_mask.decode(encoded).ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    return {"size": [40, 60], "counts": [float(end - start) for start, end in itertools.pairwise(edges)]}


def repeat_annotations(files: CocoFiles) -> None:
    """Annotate each object twice."""
    for content in files.content.values():
        content["annotations"] += [{**item, "id": item["id"] + 100} for item in content["annotations"]]


def change_images(files: CocoFiles, **changes: Any) -> None:
    """Change the first image of each split."""
    for content in files.content.values():
        content["images"][0] |= changes


def add_category(files: CocoFiles, **category: Any) -> None:
    """Define another category in all splits, whose name is the supercategory of the others."""
    for content in files.content.values():
        children = [{**child, "supercategory": category["name"]} for child in content["categories"]]
        content["categories"] = [*children, category]


COCO_READ_AS_MEANT = [
    (name_files, "annotations/instances_Train.json", "annotations/instances_Validation.json"),
    (name_files, "Train/_annotations.coco.json", "VALID/_annotations.coco.json"),
    (name_files, "annotations/lvis_v1_train.json", "annotations/lvis_v1_val.json"),
    (name_files, "trainval.json", "coco_val.json"),
    (name_files, "train/labels.json", "val/labels.json"),
    *((state_names, pattern) for pattern in ("images\\{}", "C:\\data\\{}", "/home/me/{}", "upload/{}", "./{}")),
    *((store_names, pattern) for pattern in ("sub/{}", "a/b/{}")),
    (change_case,),
    (use_addresses,),
    (repeat_annotations,),
    (add_category, {"id": 7, "name": "thing", "supercategory": "none"}),
    *((change_annotations, changes) for changes in ({"area": 0}, {"area": ...}, {"bbox": ...}, {"iscrowd": 1})),
    (change_annotations, {"segmentation": lambda polygons: polygons[0]}),
    (change_annotations, {"segmentation": to_float_runs}),
    (change_annotations, {"segmentation": ...}),
]
COCO_REFUSED = [
    (change_all_annotations, to_fractions),
    (change_all_annotations, lambda annotation: annotation | {"category_id": annotation["category_id"] + 1}),
    (change_annotations, {"category_id": 9}),
    (change_annotations, {"image_id": 77}),
    (change_annotations, {"bbox": [1, 2, float("inf"), 4]}),
    (change_images, {"id": 2}),
    (change_images, {"file_name": "absent.png"}),
    (change_images, {"file_name": "../absent.png"}),
    (name_files, "annotations/train2014.json", "annotations/train2017.json"),
]


def apply_to_coco(files: CocoFiles, change: tuple[Any, ...]) -> None:
    function, *arguments = change
    by_name = function in (change_annotations, change_images, add_category)
    function(files, **arguments[0]) if by_name else function(files, *arguments)


@pytest.mark.parametrize("change", [*COCO_READ_AS_MEANT, *COCO_REFUSED])
def test_a_change_of_a_coco_dataset_is_read_as_meant_or_refused(change, tmp_path):
    files = CocoFiles()
    apply_to_coco(files, change)
    num_objects = {"train": len(files.content["train"]["annotations"]), "validation": 2}
    refused = check_that_loader_and_check_agree(files.write(tmp_path), num_objects)
    assert (refused is not None) == (change in COCO_REFUSED), refused
    if refused is None:
        data = load_instance_dataset(tmp_path)
        assert data.id2label == {0: "roof", 1: "tree"}
        assert {name: len(split) for name, split in data.items()} == {"train": 2, "validation": 1}


@holds(
    40,
    changes=st.lists(st.sampled_from([*COCO_READ_AS_MEANT * 2, *COCO_REFUSED]), min_size=2, max_size=4, unique_by=repr),
)
def test_loader_and_check_agree_about_a_coco_dataset_with_several_changes(changes):
    files = CocoFiles()
    try:
        for change in changes:
            apply_to_coco(files, change)
    except (KeyError, TypeError, ValueError):  # a change of what another one removed
        return
    num_objects = {
        {"train": "train", "val": "validation"}[split]: len(content["annotations"])
        for split, content in files.content.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        check_that_loader_and_check_agree(files.write(Path(folder)), num_objects)
