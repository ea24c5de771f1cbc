"""An unusual or broken dataset is read completely or refused, and loader and check agree about what is lost."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from transformers_rfdetr import check_dataset, load_instance_dataset

from coco_files import draw_image
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
    *((rename_images, suffix) for suffix in (".jfif", ".jpe", ".gif", ".ppm", ".JPG")),
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
