"""Instance masks of Pascal VOC are read exactly, with the palettes of VOC and with the colors of CVAT."""

import numpy as np
import pytest
from PIL import Image

from annotation_programs import SIZE, check_command, masks_of, save_image
from transformers_rfdetr import check_dataset, load_instance_dataset

OBJECTS = np.zeros(SIZE, np.uint8)
OBJECTS[2:12, 3:12] = 1
OBJECTS[12:20, 3:12] = 2
OBJECTS[20:40, 30:48] = 3
CLASSES = np.array([0, 15, 15, 7])[OBJECTS].astype(np.uint8)  # person, person, car
OBJECTS[20, 30:48] = CLASSES[20, 30:48] = OBJECTS[0] = CLASSES[0] = 255  # void
# The first colors of the color map of VOC's development kit.
COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
COLORS += [(128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128)]
COLORS += [(64, 128, 128), (192, 128, 128)]
VOID = (224, 224, 192)


def save_mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if values.ndim == 2:
        image.putpalette([number for color in COLORS for number in color] + [9] * (720 - 48) + [*VOID] * 16)
    image.save(path)


def save(folder, name="a", objects=OBJECTS, classes=CLASSES, **lists):
    """Write an image, its masks and the lists of splits; return the folder."""
    save_image(folder / "JPEGImages" / f"{name}.jpg")
    save_mask(folder / "SegmentationObject" / f"{name}.png", objects)
    save_mask(folder / "SegmentationClass" / f"{name}.png", classes)
    for split, names in lists.items():
        path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n")
    return folder


def colored(values, colors=COLORS):
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    table[255] = VOID
    return table[values]


def check_masks(folder):
    data = load_instance_dataset(folder)
    names = [data.id2label[item["category_id"]] for item in data["train"][0]["annotations"]]
    found = {(name, mask.tobytes()) for name, mask in zip(names, masks_of(folder), strict=True)}
    assert found == {(name, (value == OBJECTS).tobytes()) for value, name in [(1, "person"), (2, "person"), (3, "car")]}


def test_objects_have_the_class_of_their_pixels_and_void_belongs_to_none(tmp_path):
    check_masks(save(tmp_path))
    assert load_instance_dataset(tmp_path).id2label == {0: "car", 1: "person"}
    check_command(tmp_path, objects=3, masks=3)


def test_grey_and_color_images_are_read_as_those_with_a_palette(tmp_path):
    check_masks(save(tmp_path / "colors", objects=colored(OBJECTS), classes=colored(CLASSES)))
    folder = save(tmp_path / "grey")
    for name, values in (("SegmentationObject", OBJECTS), ("SegmentationClass", CLASSES)):
        Image.fromarray(values).save(folder / name / "a.png")
    check_masks(folder)


@pytest.mark.parametrize("kind", ["colors", "palette", "grey"])
def test_the_names_and_colors_of_a_labelmap_are_used(kind, tmp_path):
    classes = np.where(CLASSES == 15, 1, np.where(CLASSES == 7, 2, CLASSES)).astype(np.uint8)
    colors = [(0, 0, 0), (250, 50, 83), (51, 221, 255)]
    save(tmp_path, objects=colored(OBJECTS), classes=colored(classes, colors))
    image = Image.fromarray(classes)
    if kind == "palette":
        image.putpalette([number for color in colors for number in color])
    if kind != "colors":
        image.save(tmp_path / "SegmentationClass" / "a.png")
    lines = [
        "# label:color_rgb:parts:actions",
        "background:0,0,0::",
        "person:250,50,83::",
        "car:51,221,255::",
        "boat:1,2,3::",
    ]
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))
    check_masks(tmp_path)
    assert load_instance_dataset(tmp_path).id2label == {0: "boat", 1: "car", 2: "person"}


def test_lists_are_splits_and_what_they_leave_out_is_said(tmp_path, hf_log):
    for name in "abc":
        save(tmp_path, name)
    save(tmp_path, "d", train=["a"], val=["b"], trainval=["a", "b", "x"], test=["x", "c"])
    data = load_instance_dataset(tmp_path)
    names = {name: [sample["file_name"] for sample in split] for name, split in data.items()}
    assert names == {"train": ["JPEGImages/a.jpg"], "validation": ["JPEGImages/b.jpg"], "test": ["JPEGImages/c.jpg"]}
    assert "1 listed images have no file in SegmentationObject and are not read, such as 'x'" in hf_log.text
    assert "1 files of SegmentationObject are in no list and are not read, such as 'd'" in hf_log.text


def test_one_folder_for_each_split_is_read_too(tmp_path):
    for name in ("train", "val"):
        save(tmp_path / name, default=["a"])
    data = load_instance_dataset(tmp_path)
    assert {name: len(split) for name, split in data.items()} == {"train": 1, "validation": 1}


def test_images_may_lie_in_another_folder(tmp_path):
    save(tmp_path / "voc")
    (tmp_path / "voc" / "JPEGImages").rename(tmp_path / "photos")
    with pytest.raises(ValueError, match="1 of 1 images are not in"):
        load_instance_dataset(tmp_path / "voc")
    assert load_instance_dataset(tmp_path / "voc", image_folder=tmp_path / "photos")["train"][0]["file_name"] == "a.jpg"


BACKGROUND, MIXED = CLASSES.copy(), CLASSES.copy()
BACKGROUND[OBJECTS == 2] = 0
MIXED[12:16, 3:12] = 7
UNNAMED = np.where(OBJECTS == 2, 77, CLASSES).astype(np.uint8)
VOID_CLASS = np.where(OBJECTS == 2, 255, CLASSES).astype(np.uint8)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (BACKGROUND, "one class in SegmentationClass, got {0: 'None"),
        (MIXED, r"one class in SegmentationClass, got {7: 'car \(36 pixels\)', 15: 'person"),
        (UNNAMED, "got {77: 'None"),
        (VOID_CLASS, "only void pixels"),
    ],
)
def test_an_object_without_one_class_is_named(classes, message, tmp_path):
    save(tmp_path, classes=classes)
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert f"{tmp_path}/SegmentationObject/a.png: value 2: " in str(raised.value)
    check_command(tmp_path, objects=2, exit_code=1)


def test_masks_of_another_size_and_missing_ones_are_named(tmp_path):
    save(tmp_path, classes=np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"SegmentationClass/a\.png cannot be read as a mask: its size must be"):
        load_instance_dataset(tmp_path)
    save(tmp_path, "b")
    (tmp_path / "SegmentationClass" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"SegmentationClass/a\.png cannot be read as a mask"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_object") == 1


def test_lists_cannot_name_masks_outside_of_the_folder(tmp_path, hf_log):
    save(tmp_path / "other", "secret")
    save(tmp_path / "voc", train=["a", "../../other/SegmentationObject/secret", "/etc/passwd"])
    assert len(load_instance_dataset(tmp_path / "voc")["train"]) == 1
    assert "2 listed images have no file" in hf_log.text
