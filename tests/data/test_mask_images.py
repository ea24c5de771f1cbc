"""Objects that are drawn as images are read exactly: one instance map for each image, or one mask for each object."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from annotation_programs import SIZE, check_command, masks_of, save_image
from transformers_rfdetr import check_dataset, load_instance_dataset

HEIGHT, WIDTH = SIZE
MAP = np.zeros(SIZE, np.uint8)  # three objects, two of which touch
MAP[2:8, 3:12] = 7
MAP[8:12, 3:12] = 2
MAP[20:40, 30:48] = 255


def save_map(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def save(folder, values=MAP, name="a", **arguments):
    """Write an image and its instance map; return the folder."""
    save_image(folder / "images" / f"{name}.png")
    save_map(folder / "masks" / f"{name}.png", values, **arguments)
    return folder


def test_each_value_of_an_instance_map_is_an_object(tmp_path):
    save(tmp_path)
    masks = masks_of(tmp_path)
    assert [np.array_equal(mask, value == MAP) for mask, value in zip(masks, (2, 7, 255), strict=True)] == [True] * 3
    assert load_instance_dataset(tmp_path).id2label == {0: "object"}
    assert load_instance_dataset(tmp_path, class_names={1: "nucleus"}).id2label == {0: "nucleus"}
    check_command(tmp_path, objects=3, masks=3)


def test_maps_of_16_and_32_bits_palettes_and_colors_are_read_alike(tmp_path):
    colors = np.stack([MAP * 3, MAP, MAP // 2], -1)
    palette = Image.fromarray(MAP, "P")
    palette.putpalette([0, 0, 0] * 256)  # all colors are black
    for index, image in enumerate(
        [Image.fromarray(MAP.astype(np.uint16) * 200), Image.fromarray(MAP.astype(np.int32) * 70_000), palette]
    ):
        suffix = ".tif" if image.mode == "I" else ".png"
        folder = save(tmp_path / str(index))
        (folder / "masks" / "a.png").unlink()
        image.save(folder / "masks" / f"a_masks{suffix}")
        assert np.array_equal(masks_of(folder), [value == MAP for value in (2, 7, 255)])
    save(tmp_path / "colors", colors)
    order = sorted((2, 7, 255), key=lambda value: colors[value == MAP][0].tolist())
    assert np.array_equal(masks_of(tmp_path / "colors"), [value == MAP for value in order])


@settings(max_examples=25, deadline=None)
@given(arrays(np.uint16, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 4)))
def test_any_instance_map_is_read_exactly_as_masks_of_objects(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("masks")
    values = np.kron(small, np.ones((7, 9), np.uint16))[:HEIGHT, :WIDTH]
    values = np.pad(values, [(0, HEIGHT - values.shape[0]), (0, WIDTH - values.shape[1])])
    expected = [values == value for value in np.unique(values) if value]
    assume(expected)
    save_image(folder / "one" / "images" / "one.png")
    for index, mask in enumerate(expected):
        save_map(folder / "one" / "masks" / f"{index}.png", mask.astype(np.uint8) * 255)
    assert np.array_equal(masks_of(folder), expected)


@pytest.mark.parametrize("layout", ["{0}/images/{0}.png|{0}/masks/", "images/{0}.png|masks/{0}/"])
def test_masks_of_objects_are_read_in_both_layouts(layout, tmp_path):
    image, masks = layout.split("|")
    for name in ("9ab4", "c0ffee"):
        save_image(tmp_path / image.format(name))
        for index, value in enumerate((7, 2, 255)):
            save_map(tmp_path / masks.format(name) / f"{index}.png", ((value == MAP) * 255).astype(np.uint8))
    data = load_instance_dataset(tmp_path)
    assert (len(data["train"]), len(data["train"][0]["annotations"])) == (2, 3)
    assert np.array_equal(masks_of(tmp_path), [value == MAP for value in (7, 2, 255)])
    check_command(tmp_path, objects=6, masks=6)


def test_the_folders_of_the_data_science_bowl_are_splits_and_those_without_masks_are_said(tmp_path, hf_log):
    for split, name in (("stage1_train", "aa"), ("stage1_test", "bb"), ("stage1_val", "cc")):
        save_image(tmp_path / split / name / "images" / f"{name}.png")
        if split != "stage1_test":
            save_map(tmp_path / split / name / "masks" / "x.png", (MAP > 0).astype(np.uint8))
    assert {name: len(split) for name, split in load_instance_dataset(tmp_path).items()} == {
        "train": 1,
        "validation": 1,
    }
    assert "1 images without masks are not read" in hf_log.text


def test_splits_may_be_above_or_below_the_folder_of_images(tmp_path):
    for name in ("train", "val"):
        save(tmp_path / "above" / name)
        save_image(tmp_path / "below" / "images" / name / "a.png")
        save_map(tmp_path / "below" / "masks" / name / "a.png", MAP)
    for folder in ("above", "below"):
        data = load_instance_dataset(tmp_path / folder)
        assert {name: len(split) for name, split in data.items()} == {"train": 1, "validation": 1}


def test_a_map_without_objects_is_an_image_without_objects(tmp_path):
    save(save(tmp_path), np.zeros_like(MAP), name="b")
    assert [len(sample["annotations"]) for sample in load_instance_dataset(tmp_path)["train"]] == [3, 0]


def test_maps_of_classes_are_refused(tmp_path):
    save(tmp_path, (MAP > 0).astype(np.uint8) * 255)
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match=r"1 of 1 values with several regions.*values of classes\. Number"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((HEIGHT, WIDTH + 1), np.uint8), r"size must be that of its image, \(40, 48\), got \(40, 49\)"),
        (np.zeros((3000, 3000), np.uint8), "size must be that of its image"),
        (np.full(SIZE, 0.5, np.float32), "must have integers"),
    ],
)
def test_a_map_that_cannot_be_read_is_named_with_its_rule(values, message, tmp_path):
    save(save(tmp_path), name="b")
    suffix = ".tif" if values.dtype == np.float32 else ".png"
    (tmp_path / "masks" / "b.png").unlink()
    path = save_map(tmp_path / "masks" / f"b{suffix}", values)
    with pytest.raises(ValueError, match=message) as raised:
        load_instance_dataset(tmp_path)
    assert str(path) in str(raised.value)
    check_command(tmp_path, objects=3, exit_code=1)


def test_photos_and_damaged_files_are_no_maps(tmp_path, monkeypatch):
    save(save(tmp_path), name="b")
    (tmp_path / "masks" / "a.png").write_bytes(b"no image")
    generator = np.random.default_rng(0)
    save_map(tmp_path / "masks" / "b.png", generator.integers(0, 256, (*SIZE, 3), np.uint8))
    monkeypatch.setattr("transformers_rfdetr.data.instance_maps.MAX_OBJECTS", 1000)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a mask.*\(1 more"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_object") == 2


@pytest.mark.parametrize("values", [np.zeros_like(MAP), MAP])
def test_a_mask_of_one_object_must_have_one_value(values, tmp_path):
    save_image(tmp_path / "images" / "a.png")
    save_map(tmp_path / "masks" / "a" / "0.png", (MAP > 0).astype(np.uint8))
    save_map(tmp_path / "masks" / "a" / "1.png", values)
    with pytest.raises(ValueError, match=r"masks/a/1\.png: a mask must have 0 and one other value, got"):
        load_instance_dataset(tmp_path)
    assert check_dataset(tmp_path).count("invalid_object") == 1


def test_masks_without_image_are_said(tmp_path, hf_log):
    save(tmp_path)
    save_map(tmp_path / "masks" / "other.png", MAP)
    load_instance_dataset(tmp_path)
    assert "1 files belong to no image in a folder 'images'" in hf_log.text
    assert check_dataset(tmp_path).count("layout") == 1


def test_a_folder_that_datasets_reads_is_left_to_it(tmp_path, monkeypatch):
    save(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}")
    monkeypatch.setattr("transformers_rfdetr.data.hub_rows.import_datasets", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_instance_dataset(tmp_path)


def test_an_image_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`image_folder` must be None for masks"):
        load_instance_dataset(save(tmp_path), image_folder=tmp_path)
