"""Every defect is counted once, and a repaired copy has none. The oracles are hand counts and pycocotools."""

import doctest
import json
from collections import Counter, defaultdict

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import typer
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner

from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.cli import check_dataset as command
from transformers_rfdetr.data.checks import check as check_data
from transformers_rfdetr.data.checks.check import check_dataset
from transformers_rfdetr.data.checks.findings import KINDS

from coco_files import (
    AREA,
    BOX,
    ORIENTATION,
    RIGHT,
    SQUARE,
    counts_of,
    draw_image,
    errors_of,
    folder_content,
    image_entry,
    rle,
    save_rotated,
    square,
    write_coco,
)
from small_models import shared_folder

pytestmark = pytest.mark.usefixtures("quiet")


# Every defect, in one dataset

TRAIN_IMAGES = [
    image_entry(1, "a.png"),
    image_entry(2, "cut.jpg"),
    image_entry(3, "empty.png"),
    image_entry(4, "text.png"),
    image_entry(5, "huge.png", (100, 100)),
    image_entry(6, "turned.jpg", (60, 40)),
    image_entry(7, "upside_down.jpg"),
    image_entry(8, "swapped.jpg"),
    image_entry(9, "taller.png", (20, 60)),
    image_entry(10, "unsized.png", width=None),
    image_entry(11, "nothing.png"),
    image_entry(11, "nothing_2.png"),
    image_entry(None, "unnumbered.png"),
    image_entry(13, "gone.png"),
    image_entry(14, "../secret.png"),
    image_entry(15, "a.png"),
    image_entry(16, "a_copy.png"),
    image_entry(17, "lost.png"),
    "text",
]
TRAIN_OBJECTS = [
    square(1),
    square(2, image_id=17, category=99),
    square(3, iscrowd="maybe"),
    square(4, iscrowd=1, segmentation=rle()),
    square(5, bbox="10 10 20 20"),
    square(6, bbox=[10, 10, 0, 20]),
    square(7, bbox=[30, 30, -20, -20]),
    square(8, bbox=[100, 100, 20, 20]),
    square(9, bbox=[50, 10, 15, 20], area=200, segmentation=[RIGHT]),
    square(10, bbox=[10, 10, 30, 20]),
    square(11, bbox=...),
    square(12, bbox=..., segmentation=...),
    square(13, area=-1),
    square(14, area=4000),
    square(15, area=...),
    square(16, segmentation=[SQUARE[:-1]]),
    square(17, segmentation=[[float("nan"), *SQUARE[1:]]]),
    square(18, segmentation=[SQUARE, [1, 1, 2, 2]]),
    square(19, segmentation=[[1, 1, 2, 2]]),
    square(20, segmentation=[[10, 10, 30, 30, 30, 10, 10, 30]], area=200),  # two triangles
    square(21, segmentation=[[50, 10, 70, 10, 70, 30, 50, 30]], bbox=[50, 10, 10, 20], area=200),
    square(22, segmentation=rle((50, 60))),
    square(23, segmentation={"size": [40, 60], "counts": "zzz"}),
    square(24, segmentation=7),
    square(25, segmentation=[]),
    square(1),
    square(None),
    square(28, image_id=999),
    "text",
    *[square(100 + number, image_id=number) for number in (2, 3, 4, 5, 6, 7, 9, 10, 13, 14, 15, 16)],
    square(108, image_id=8, segmentation=[RIGHT], bbox=[50, 10, 10, 20], area=200),
    square(200, image_id=16, category=2),
    square(201, image_id=16, category=3),
]
CATEGORIES = [
    {"id": 1, "name": "roof"},
    {"id": 2, "name": "tree"},
    {"id": 2, "name": "tree"},
    {"id": 3, "name": "roof"},
    {"id": 4, "name": "car"},
    {"id": "five", "name": "bus"},
]
ELSEWHERE = {  # kinds that other tests cover
    *("categories_differ", "no_categories", "shifted_category_ids", "invalid_label_line", "renamed_file"),
    *("layout", "shared_label_file", "box_layout", "no_images", "nothing_repaired", "dark_16_bit", "multiple_frames"),
    *("overlapping_crops_across_splits", "invalid_annotation_file", "invalid_object"),
    *("fractional_coordinates", "area_of_box", "object_vanishes", "small_self_intersection"),
    *("boxes_only", "no_objects", "nested_polygon"),
}
ONCE = KINDS.keys() - {
    *("image_without_objects", "object_without_mask", "near_duplicate_across_splits", "rle_corrupt"),
    "duplicate_object",
    *ELSEWHERE,
}
EXPECTED = {(kind, "train"): 1 for kind in ONCE} | {
    ("rle_corrupt", "train"): 1,
    ("image_without_objects", "train"): 3,  # the two of id 11, and the one without an id
    ("object_without_mask", "train"): 2,  # 12 and 25
    ("near_duplicate_across_splits", "validation"): 1,
    # Of image 1, 14 have the mask of the square, 7 only its box, and 2 the mask at the right edge; of image 16, two.
    ("duplicate_object", "train"): 13 + 6 + 1 + 1,
}


@pytest.fixture(scope="module")
def defects(tmp_path_factory):
    """Return a folder with every defect once and its repaired copy, and the report."""
    parent = tmp_path_factory.mktemp("defects")
    train = parent / "data" / "train"
    write_coco(train / "_annotations.coco.json", TRAIN_IMAGES, TRAIN_OBJECTS, CATEGORIES)
    names = [
        "a.png",
        "taller.png",
        "unsized.png",
        "nothing.png",
        "nothing_2.png",
        "unnumbered.png",
        "unlisted.png",
        "lost.png",
    ]
    for seed, name in enumerate(names):
        draw_image(seed).save(train / name)
    draw_image(20, (100, 100)).save(train / "huge.png")
    draw_image(21).save(train / "cut.jpg")
    (train / "cut.jpg").write_bytes((train / "cut.jpg").read_bytes()[:-300])
    (train / "empty.png").write_bytes(b"")
    (train / "text.png").write_text("not an image")
    (parent / "data" / "secret.png").write_text("never read")
    (train / "a_copy.png").write_bytes((train / "a.png").read_bytes())
    for seed, (name, orientation) in enumerate([("turned.jpg", 6), ("upside_down.jpg", 3), ("swapped.jpg", 6)], 30):
        save_rotated(train / name, seed, orientation)
    valid = parent / "data" / "valid"
    write_coco(valid / "_annotations.coco.json", [image_entry(1, "v.jpg", (50, 75))], [square(1)])
    draw_image(0).resize((75, 50)).save(valid / "v.jpg", quality=90)

    before = folder_content(parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2400)  # refused are twice as many
        patch.setattr(PIL.Image, "warnings", _Silent())
        report = check_dataset(parent / "data", num_queries=20, fix=parent / "fixed", overlays=parent / "drawn")
    assert {path: before[path] for path in before} == {path: path.read_bytes() for path in before}
    return parent, report


class _Silent:
    """Replaces the module warnings in Pillow, which would warn about the lowered limit."""

    @staticmethod
    def warn(*args, **kwargs):
        pass


def test_every_defect_is_counted_once(defects):
    _, report = defects
    assert counts_of(report) == EXPECTED


def test_that_dataset_has_all_kinds_that_no_other_test_covers(defects):
    _, report = defects
    assert {found.kind for found in report.findings} == KINDS.keys() - ELSEWHERE


def test_an_example_names_the_image_and_the_annotation(defects):
    _, report = defects
    [found] = [found for found in report.findings if found.kind == "box_beyond_edge"]
    assert found.examples == [
        {"image_id": 1, "file_name": "a.png", "annotation_id": 9, "detail": "bbox [50, 10, 15, 20]"}
    ]
    assert "image 1 (a.png), annotation 9: bbox [50, 10, 15, 20]" in str(report)


def test_the_splits_are_counted(defects):
    _, report = defects
    classes = report.splits["train"].pop("classes")
    # 26 annotations of image 1 but for the crowd, and 16 of others.
    assert report.splits["train"] == {
        "images": 18,
        "objects": 41,
        "objects_with_segmentation": 41 - 2,  # 12 and 25 have none
        "objects_with_mask": 41 - 8,  # nor are those of 16, 17, 19, 22, 23 and 24 usable
        "crowds": 1,
        "images_without_objects": 3,
    }
    assert classes == {"roof": 39, "tree": 1}  # one object has no class
    report.splits["train"]["classes"] = classes
    assert json.loads(json.dumps(report.to_dict()))["splits"]["validation"]["objects"] == 1


def test_a_repaired_copy_has_no_error_and_can_be_read(defects):
    parent, _ = defects
    report = check_dataset(parent / "fixed", num_queries=20)
    assert errors_of(report) == {}
    data = load_instance_dataset(parent / "fixed")
    samples = {sample["file_name"]: sample for split in data.values() for sample in split}
    assert data.id2label == {0: "roof", 1: "tree", 2: "car"}
    assert samples.keys() == {
        *("a.png", "turned.jpg", "upside_down.jpg", "swapped.jpg", "taller.png", "unsized.png"),
        *("nothing.png", "nothing_2.png", "a_copy.png", "v.jpg"),
    }
    assert (samples["taller.png"]["height"], samples["taller.png"]["width"]) == (40, 60)
    assert (samples["unsized.png"]["height"], samples["unsized.png"]["width"]) == (40, 60)
    assert [item["category_id"] for item in samples["a_copy.png"]["annotations"]] == [0, 1, 0]  # roof 3 is roof 1


def test_the_copy_repairs_each_defect(defects):
    parent, _ = defects
    stored = json.loads((parent / "fixed" / "train" / "_annotations.coco.json").read_text())
    objects = {item["id"]: item for item in stored["annotations"]}
    assert len(objects) == len(stored["annotations"])
    assert not objects.keys() & {2, 3, 12, 28, 102, 103, 104, 105, 113, 114}
    assert {26, 27} < objects.keys()  # the second 1, and the one without an id
    for number in (5, 6, 7, 8, 11):
        assert objects[number]["bbox"] == BOX
    assert objects[9]["bbox"] == [50, 10, 10, 20]
    assert objects[10]["bbox"] == [10, 10, 30, 20]  # either may be right
    for number in (13, 14, 15):
        assert objects[number]["area"] == AREA
    for number in (16, 17, 19, 22, 23, 24):
        assert "segmentation" not in objects[number]
    assert objects[18]["segmentation"] == [SQUARE]
    assert len({item["id"] for item in stored["images"]}) == len(stored["images"])


def test_all_changes_and_what_is_left_are_listed(defects):
    parent, report = defects
    listed = json.loads((parent / "fixed" / "changes.json").read_text())
    changed = Counter(entry["kind"] for entry in listed["changes"])
    left = Counter(entry["kind"] for entry in listed["left"])
    severe = {found.kind: found.count for found in report.findings if found.severity == "error"}
    assert severe.items() <= changed.items()
    assert left.keys() == {
        *("exif_frame_unknown", "duplicate_file_name", "unlisted_file", "duplicate_image", "too_many_objects"),
        *("near_duplicate_across_splits", "box_mask_mismatch", "self_intersecting_polygon", "polygon_outside"),
        *("object_without_mask", "duplicate_object"),
    }
    assert [entry["change"] for entry in listed["changes"] if entry["file_name"] == "cut.jpg"] == ["dropped"]
    [entry] = [entry for entry in listed["changes"] if entry["kind"] == "box_beyond_edge"]
    assert (entry["file_name"], entry["annotation_id"], entry["change"]) == ("a.png", 9, "bbox [50, 10, 10, 20]")
    [entry] = [entry for entry in listed["changes"] if entry["kind"] == "category"]
    assert (entry["split"], entry["detail"], entry["change"]) == ("train", "category 3 'roof'", "id 1")


def test_images_are_linked_or_written_as_they_were_annotated(defects):
    parent, _ = defects
    source, copy = parent / "data" / "train", parent / "fixed" / "train"
    assert (copy / "a.png").samefile(source / "a.png")
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(source / "turned.jpg"))
    for name, expected in (("turned.jpg", upright), ("swapped.jpg", PIL.Image.open(source / "swapped.jpg"))):
        written = PIL.Image.open(copy / name)
        assert written.getexif().get(ORIENTATION) is None
        assert written.size == expected.size
        assert np.abs(np.asarray(written, int) - np.asarray(expected, int)).mean() < 3


def test_overlays_begin_with_images_with_problems(defects):
    parent, _ = defects
    names = sorted(path.name for path in (parent / "drawn").iterdir())
    assert names[0] == "00_train_a.jpg"
    # a, upside_down, swapped, taller, the second nothing, unnumbered, a again, its copy, lost and v have problems.
    assert len(names) == 13
    assert {name[3:] for name in names[10:]} == {"train_turned.jpg", "train_unsized.jpg", "train_nothing.jpg"}
    drawn, plain = np.asarray(PIL.Image.open(parent / "drawn" / names[0]), int), np.asarray(draw_image(0), int)
    assert np.abs(drawn - plain)[10:30, 10:30].mean() > 20


def test_overlays_name_the_problems_of_an_object_after_its_class(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(
        "transformers_rfdetr.data.checks.overlays.draw_instances",
        lambda image, masks, boxes, texts: labels.extend(texts) or image,
    )
    items = [square(1), square(2, iscrowd=1), square(3, bbox=[10, 10, 30, 20], area=4000)]
    path = write_coco(tmp_path / "data" / "train.json", [image_entry(1, "a.png")], items)
    draw_image(0).save(path.parent / "a.png")
    check_dataset(path, overlays=tmp_path / "drawn")
    assert labels == ["roof", "roof crowd", "roof: box_mask_mismatch, area_mismatch, duplicate_object"]


# Values of any type

ANYTHING = [None, "x", "", [], {}, [[]], -1, 0, 1.5, True, 10**400, float("nan"), float("inf"), [[1, "x"]], {"a": []}]


def test_values_of_wrong_types_are_findings(tmp_path):
    shapes = [{"size": size, "counts": "1"} for size in ANYTHING] + [{"size": [40, 60], "counts": c} for c in ANYTHING]
    fields = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    objects = [square(10 + i, **{field: value}) for field in fields for i, value in enumerate(ANYTHING)]
    objects += [square(1000 + i, segmentation=shape) for i, shape in enumerate(shapes)]
    objects += [square(2000 + i, bbox=[value] * 4) for i, value in enumerate(ANYTHING)]
    images = [
        image_entry(100 + 20 * j + i, "a.png", **{name: value})
        for j, name in enumerate(("id", "file_name", "height", "width"))
        for i, value in enumerate(ANYTHING)
    ]
    categories = [{"id": value, "name": "x"} for value in ANYTHING] + [{"id": 1, "name": "roof"}, *ANYTHING]
    categories += [{"id": 50 + i, "name": v, "supercategory": v} for i, v in enumerate(ANYTHING)]
    path = write_coco(
        tmp_path / "data" / "train.json",
        [image_entry(1, "a.png"), *images, *ANYTHING],
        [*objects, *ANYTHING],
        categories,
    )
    draw_image(0).save(path.parent / "a.png")
    report = check_dataset(path, fix=tmp_path / "fixed", overlays=tmp_path / "drawn")
    assert report.count("invalid_annotation") == len(ANYTHING) - 2  # of the entries two are dicts
    assert report.count("invalid_segmentation") >= 5
    assert errors_of(check_dataset(tmp_path / "fixed")) == {}
    str(report)
    json.dumps(report.to_dict())


# Sizes that differ


@pytest.mark.parametrize(
    ("stated", "shape", "orientation", "change"),
    [
        ((80, 120), SQUARE, 1, None),  # twice as large: either may be right
        (
            (80, 120),
            [70, 50, 90, 50, 90, 70, 70, 70],
            1,
            None,
        ),  # inside the larger size only
        ((80, 60), SQUARE, 1, None),  # another aspect ratio
        ((20, 60), SQUARE, 1, (40, 60)),  # too small for the object
        (("40", None), SQUARE, 1, (40, 60)),  # the file agrees
        ((99, None), SQUARE, 1, None),
        ((80, 120), rle(), 1, (40, 60)),  # the RLE tells
        ((40, 60), RIGHT, 6, (40, 60)),  # fits what is stored
        ((40, 60), [10, 45, 30, 45, 30, 55, 10, 55], 6, (60, 40)),  # fits what is upright
        ((40, 60), SQUARE, 6, None),  # fits both
    ],
)
def test_the_size_at_which_all_objects_lie_inside_is_taken(tmp_path, stated, shape, orientation, change):
    box = BOX if isinstance(shape, dict) else [*shape[:2], shape[2] - shape[0], shape[5] - shape[1]]
    segmentation = shape if isinstance(shape, dict) else [shape]
    item = square(1, segmentation=segmentation, bbox=box, area=box[2] * box[3])
    path = write_coco(tmp_path / "data" / "train.json", [image_entry(1, "a.jpg", stated)], [item])
    save_rotated(path.parent / "a.jpg", 0, orientation)
    report = check_dataset(path, fix=tmp_path / "fixed")
    kind = "exif_swapped_size" if orientation == 6 else "size_mismatch"
    assert errors_of(report) == ({kind: 1, "nothing_repaired": 1} if change is None else {kind: 1})
    if change is not None:
        copy = json.loads((tmp_path / "fixed" / "train" / "_annotations.coco.json").read_text())
        assert [(item["height"], item["width"]) for item in copy["images"]] == [change]
        [sample] = load_instance_dataset(tmp_path / "fixed")["train"]
        assert sample["image"].size == change[::-1]


# A copy is complete or absent


def test_a_copy_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    path = write_coco(tmp_path / "data" / "train.json", [image_entry(1, "a.png")], [square(1)])
    draw_image(0).save(path.parent / "a.png")

    def interrupt(copy, changes, left):
        assert (copy.folder / "train" / "a.png").is_file()
        assert not (tmp_path / "fixed").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(check_data.RepairedCopy, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(path, fix=tmp_path / "fixed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


# Ids and categories


def test_two_files_with_one_id_and_objects_are_both_dropped(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    images = [image_entry(number, name) for number, name in zip((1, 1, 2), names, strict=True)]
    path = write_coco(tmp_path / "data" / "train.json", images, [square(1), square(2, image_id=2)])
    for seed, name in enumerate(names):
        draw_image(seed).save(path.parent / name)
    assert errors_of(check_dataset(path, fix=tmp_path / "fixed")) == {"duplicate_image_id": 1}
    copy = json.loads((tmp_path / "fixed" / "train" / "_annotations.coco.json").read_text())
    assert [item["file_name"] for item in copy["images"]] == ["c.png"]


def test_a_repeated_entry_is_kept_once(tmp_path):
    path = write_coco(tmp_path / "data" / "train.json", [image_entry(1, "a.png"), image_entry(1, "a.png")], [square(1)])
    draw_image(0).save(path.parent / "a.png")
    assert errors_of(check_dataset(path, fix=tmp_path / "fixed")) == {"duplicate_image_id": 1}
    [sample] = load_instance_dataset(tmp_path / "fixed")["train"]
    assert len(sample["annotations"]) == 1


def two_splits(folder, train_categories, valid_categories):
    """Write two splits with one image each, which has an object of category 1 and one of category 2."""
    for seed, (split, categories) in enumerate([("train", train_categories), ("valid", valid_categories)]):
        items = [square(1), square(2, category=2)]
        write_coco(folder / split / "_annotations.coco.json", [image_entry(1, "a.png")], items, categories)
        draw_image(seed).save(folder / split / "a.png")
    return folder


def test_splits_with_different_category_ids_get_the_same_ids(tmp_path):
    ours, theirs = (
        [{"id": 1, "name": "roof"}, {"id": 2, "name": "tree"}],
        [
            {"id": 1, "name": "tree"},
            {"id": 2, "name": "bush"},
        ],
    )
    report = check_dataset(two_splits(tmp_path / "data", ours, theirs), fix=tmp_path / "fixed")
    assert counts_of(report) == {("categories_differ", "validation"): 1}
    assert errors_of(check_dataset(tmp_path / "fixed")) == {}
    data = load_instance_dataset(tmp_path / "fixed")
    names = {
        split: [data.id2label[item["category_id"]] for item in samples[0]["annotations"]]
        for split, samples in data.items()
    }
    assert names == {"train": ["roof", "tree"], "validation": ["tree", "bush"]}


def test_objects_of_a_category_id_with_two_names_are_dropped(tmp_path):
    ours = [{"id": 1, "name": "roof"}, {"id": 2, "name": "tree"}, {"id": 2, "name": "bush"}]
    report = check_dataset(two_splits(tmp_path / "data", ours, ours[:2]), fix=tmp_path / "fixed")
    assert errors_of(report) == {"duplicate_category_id": 1}
    data = load_instance_dataset(tmp_path / "fixed")
    assert [len(data[split][0]["annotations"]) for split in ("train", "validation")] == [1, 2]


def test_a_category_that_only_groups_others_is_not_a_duplicate(tmp_path):
    exported = [
        {"id": 0, "name": "roof", "supercategory": "none"},
        {"id": 1, "name": "roof", "supercategory": "roof"},
        {"id": 2, "name": "tree", "supercategory": "roof"},
    ]
    report = check_dataset(two_splits(tmp_path / "data", exported, exported), fix=tmp_path / "fixed")
    assert counts_of(report) == {("unused_category", "train"): 1, ("unused_category", "validation"): 1}
    assert load_instance_dataset(tmp_path / "fixed").category_ids == [1, 2]


def test_splits_with_other_names_are_copied_as_coco_names_them(tmp_path):
    two_splits(
        tmp_path / "data", [{"id": i, "name": str(i)} for i in (1, 2)], [{"id": i, "name": str(i)} for i in (1, 2)]
    )
    files = {"train": "train", "holdout": "valid"}
    source = {split: tmp_path / "data" / name / "_annotations.coco.json" for split, name in files.items()}
    assert not check_dataset(source, fix=tmp_path / "fixed").has_errors
    assert {name: len(split) for name, split in load_instance_dataset(tmp_path / "fixed").items()} == {
        "train": 1,
        "holdout": 1,
    }


# Boxes alone, polygons


def test_a_split_without_masks_is_one_warning(tmp_path):
    items = [square(1, segmentation=...), square(2, segmentation=[], area=150), square(3, segmentation=[], area=900)]
    boxes = write_coco(tmp_path / "boxes.json", [image_entry(1, "a.png")], items)
    masks = write_coco(tmp_path / "masks.json", [image_entry(2, "b.png")], [square(4, image_id=2)])
    for seed, name in enumerate(["a.png", "b.png"]):
        draw_image(seed).save(tmp_path / name)
    report = check_dataset({"train": masks, "validation": boxes})
    # An area inside the box may be that of a mask that is not here; one of 900 is not inside 400.
    expected = {"boxes_only": 1, "area_mismatch": 1, "duplicate_object": 2}
    assert counts_of(report) == {(kind, "validation"): count for kind, count in expected.items()}
    assert "3 objects" in str(report)
    assert "detection model" in str(report)


# Duplicates


def test_images_that_look_the_same_in_another_split_are_found_in_every_mode(tmp_path):
    files = {}
    for split in ("train", "validation"):
        path = write_coco(tmp_path / split / "a.json", [image_entry(i, f"{i}.png") for i in range(1, 5)], [square(1)])
        files[split] = path
    grey = draw_image(5).convert("L")
    deep = PIL.Image.fromarray(np.asarray(grey, np.uint16) * 200)  # the same in 16 bits
    flat = PIL.Image.new("L", (60, 40), 90)
    for folder, images in (
        ("train", [draw_image(1), grey, flat, draw_image(3)]),
        ("validation", [draw_image(2), deep, flat]),
    ):
        for number, item in enumerate(images, start=1):
            item.save(tmp_path / folder / f"{number}.png")
    PIL.Image.new("L", (60, 40), 91).save(tmp_path / "validation" / "4.png")  # flat too, but another one
    report = check_dataset(files)
    [found] = [found for found in report.findings if found.kind == "near_duplicate_across_splits"]
    assert [(example["file_name"], example["detail"]) for example in found.examples] == [
        ("2.png", "0 of 64 bits differ from 2.png of train"),
        ("3.png", "the same file as 3.png of train"),
    ]


# Other sources


@pytest.fixture
def yolo(tmp_path):
    folder = tmp_path / "yolo"
    for split, names in (("train", ["a.png", "b.jpg"]), ("valid", ["c.png"])):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "labels").mkdir()
        for name in names:
            draw_image(ord(name[0])).save(folder / split / "images" / name)
    broken = folder / "train" / "images" / "b.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    lines = ["0 0.25 0.25 0.5 0.25 0.5 0.75", "1 0.5 0.5 0.5 0.5", "7 0.5 0.5 0.5 0.5", "0 0.5 x", "", "1 1 1 0.5 0"]
    (folder / "train" / "labels" / "a.txt").write_text("\n".join(lines))
    (folder / "train" / "labels" / "lost.txt").write_text("0 0.5 0.5 0.5 0.5")
    (folder / "data.yaml").write_text("names: [roof, tree]\ntrain: train/images\nval: valid/images\n")
    return folder


def test_yolo_files_are_read_line_by_line(tmp_path, yolo):
    report = check_dataset(yolo, fix=tmp_path / "fixed")
    assert counts_of(report) == {
        ("truncated_image", "train"): 1,
        ("invalid_label_line", "train"): 2,
        ("annotation_of_missing_image", "train"): 1,
        ("layout", "train"): 1,  # "val" has no label files
        ("empty_box", "train"): 1,
        ("object_without_mask", "train"): 2,
        ("image_without_objects", "train"): 1,
        ("image_without_objects", "validation"): 1,
        ("no_objects", "validation"): 1,
        ("unused_category", "validation"): 2,
    }
    assert errors_of(check_dataset(tmp_path / "fixed")) == {}
    [sample] = load_instance_dataset(tmp_path / "fixed")["train"]
    boxes = [item["bbox"] for item in sample["annotations"]]
    np.testing.assert_allclose(boxes, [[15, 10, 15, 20], [15, 10, 30, 20]], atol=1)  # a drawn triangle is a row short


def test_rows_of_datasets_are_checked_but_not_repaired(tmp_path):
    datasets = pytest.importorskip("datasets")
    objects = {"bbox": [BOX, [100.0, 0, 9, 9]], "category": ["roof", "tree"], "segmentation": [[SQUARE], [SQUARE]]}
    rows = datasets.Dataset.from_list([{"image": draw_image(0), "objects": objects}])
    rows = rows.cast_column("image", datasets.Image())
    report = check_dataset({"train": rows})
    assert counts_of(report) == {("box_outside", "train"): 1}  # rows need neither sizes nor areas
    with pytest.raises(ValueError, match=r"`fix` .*`Dataset\.map`"):
        check_dataset(rows, fix=tmp_path / "fixed")


# Photographs


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("coco_permissive", "annotations.json"),
        ("dsb2018_nuclei", "val.json"),
        ("coco_eval100", "instances_val2014_100.json"),  # without its photographs
    ],
)
def test_real_annotations_are_judged_as_pycocotools_measures_them(folder, file):
    path = shared_folder(folder) / file
    report = check_dataset(path)
    coco = COCO(path)
    objects, expected = defaultdict(int), Counter()
    for item in coco.loadAnns(coco.getAnnIds()):
        expected["crowd"] += item["iscrowd"]
        objects[item["image_id"]] += not item["iscrowd"]
        encoded = coco.annToRLE(item)
        area, (x, y, width, height) = int(coco_mask.area(encoded)), coco_mask.toBbox(encoded)
        given = item["bbox"]
        corners = np.array([x, y, x + width, y + height])
        off = np.abs(corners - [given[0], given[1], given[0] + given[2], given[1] + given[3]]).max()
        expected["box_mask_mismatch"] += off > max(2, 0.05 * max(width, height))
        expected["area_mismatch"] += abs(item["area"] - area) > max(0.1 * max(area, item["area"]), sum(given[2:]))
    expected["image_without_objects"] = sum(not objects[number] for number in coco.getImgIds())
    for kind, count in expected.items():
        assert report.count(kind) == count, kind
    assert report.splits["train"]["objects"] == sum(objects.values())
    assert errors_of(report) == ({"missing_file": 100} if folder == "coco_eval100" else {})


# The command

app = typer.Typer()
app.command(epilog=command.EXAMPLE)(command.check_dataset)


@pytest.fixture
def small(tmp_path):
    """Return a COCO JSON without an error, in its own folder."""
    path = write_coco(tmp_path / "data" / "train.json", [image_entry(1, "a.png")], [square(1)])
    draw_image(0).save(path.parent / "a.png")
    return path


def test_the_command_ends_with_0_without_errors_and_1_with_errors(small, tmp_path):
    result = CliRunner().invoke(app, [str(small), "--num-queries", "0"])
    assert result.exit_code == 2
    result = CliRunner().invoke(app, [str(small)])
    assert result.exit_code == 0
    assert (
        "train: 1 images, 0 of them without objects; 1 objects, 0 of them without a segmentation; 0 crowds; roof 1"
        in result.stdout
    )
    write_coco(small, [image_entry(1, "a.png"), image_entry(2, "b.png")], [square(1)])
    result = CliRunner().invoke(app, [str(small), "--fix", str(tmp_path / "fixed"), "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 1
    assert "missing_file (train)" in result.stdout
    assert "changes.json lists the changes" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["findings"][0]["kind"] == "missing_file"
    assert CliRunner().invoke(app, [str(tmp_path / "fixed"), "--workers", "1"]).exit_code == 0


def test_the_command_prints_only_json_on_request(small):
    result = CliRunner().invoke(app, [str(small), "--json", "-"])
    report = json.loads(result.stdout)
    assert report["source"] == str(small)
    assert report["splits"]["train"]["classes"] == {"roof": 1}
    assert report["findings"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "train.json"),
        ("[]", "list"),
        ("{}", "train.json: 'images'"),
        ('{"images": [], "annotations": 3, "categories": []}', "train.json: 'annotations' must be a list"),
    ],
)
def test_the_command_explains_an_unreadable_source_in_one_line(tmp_path, content, message):
    (tmp_path / "train.json").write_text(content)
    result = CliRunner().invoke(app, [str(tmp_path / "train.json")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("option", "place", "message"),
    [
        ("--fix", "data", "outside of the source"),
        ("--fix", "data/fixed", "outside of the source"),
        ("--fix", "other", "new or empty"),
        ("--fix", "other/file", "the file"),
        ("--overlays", "data/drawn", "outside of the source"),
    ],
)
def test_nothing_is_written_into_the_source_or_over_other_files(small, tmp_path, option, place, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("of somebody")
    before = folder_content(tmp_path)
    result = CliRunner().invoke(app, [str(small), option, str(tmp_path / place)])
    assert result.exit_code == 2
    assert f"`{option[2:]}` must" in result.stderr
    assert message in result.stderr
    assert str(tmp_path / place) in result.stderr
    assert folder_content(tmp_path) == before


def test_the_images_may_lie_in_another_folder(small, tmp_path):
    (small.parent / "a.png").rename(tmp_path / "a.png")
    assert errors_of(check_dataset(small)) == {"missing_file": 1}
    assert not check_dataset(small, image_folder=tmp_path).has_errors
    assert not check_dataset({"train": small}, image_folder={"train": tmp_path}).has_errors


def test_the_example_runs():
    assert doctest.testmod(check_data).failed == 0


def test_an_invalid_source_is_refused(tmp_path):
    for source in (5, {}, tmp_path / "none.json", tmp_path / "none.yaml"):
        with pytest.raises(ValueError, match=r"`source`|none\."):
            check_dataset(source)
