"""Splits without common images, and with every class in each of them."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from transformers_rfdetr import InstanceDataset, folds, split_dataset
from transformers_rfdetr.data.dataset import InstanceDatasets
from transformers_rfdetr.data.splits import group_images, stratify


def noise(seed: int, size=(48, 64)) -> Image.Image:
    """Return an image of random spots, which is like no other."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)


def dataset(classes_of_images, names=None, images=None) -> InstanceDataset:
    """Return a dataset with one object of each of the given classes (1, 2, ...) in each image."""
    count = len(classes_of_images)
    names = names or [f"{chr(97 + number // 26)}{chr(97 + number % 26)}.png" for number in range(count)]
    coco = {
        "images": [{"id": i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": category, "bbox": [1, 1, 20, 20], "segmentation": [[1, 1, 21, 1, 21, 21]]}
            for i, categories in enumerate(classes_of_images)
            for category in categories
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(("cat", "dog", "yak"), start=1)],
    }
    return InstanceDataset(coco, images or [noise(seed) for seed in range(count)])


def ids(split) -> set[int]:
    return set(split.image_ids())


def test_the_splits_have_their_sizes_nothing_in_common_and_every_image():
    splits = split_dataset(dataset([[1]] * 20), validation=0.2, test=0.1, by=None)
    assert {name: len(split) for name, split in splits.items()} == {"train": 14, "validation": 4, "test": 2}
    assert set().union(*map(ids, splits.values())) == set(range(20))
    assert isinstance(splits, InstanceDatasets)


def test_rare_classes_are_in_every_split_in_proportion():
    data = dataset([[1]] * 30 + [[1, 2]] * 10 + [[3]] * 2)
    splits = split_dataset(data, validation=0.2, by=None)
    images = {name: [count.images for count in split.counts().values()] for name, split in splits.items()}
    assert images == {"train": [32, 8, 1], "validation": [8, 2, 1]}


def test_a_class_in_one_group_is_missing_somewhere_and_the_warning_says_so(caplog):
    splits = split_dataset(dataset([[1]] * 9 + [[2]]), by=None)
    assert sum(split.counts()[1].images for split in splits.values()) == 1
    assert "No object of dog is in validation" in caplog.text
    assert "yak" not in caplog.text  # no image has one


def test_the_seed_decides():
    data = dataset([[1]] * 20)
    assert ids(split_dataset(data, by=None)["validation"]) == ids(split_dataset(data, by=None)["validation"])
    others = [ids(split_dataset(data, by=None, seed=seed)["validation"]) for seed in range(4)]
    assert len(set(map(frozenset, others))) > 1


def test_copies_of_an_image_stay_together():
    images = [noise(seed) for seed in range(6)]
    images += [ImageEnhance.Brightness(image).enhance(0.9).resize((50, 40)).resize((64, 48)) for image in images[:3]]
    groups = group_images(dataset([[1]] * 9, images=images), "auto")
    assert (groups[:3] == groups[6:]).all()
    assert len(set(groups[:6])) == 6


def test_overlapping_crops_and_versions_of_a_scene_stay_together():
    names = ["town_0_0.png", "town_0_40.png", "town_40_40.png", "town_400_400.png", "hill_0_0.png"]
    names += ["a_jpg.rf.0123abcd.jpg", "a_jpg.rf.4567cdef.jpg"]
    groups = group_images(dataset([[1]] * 7, names), "auto").tolist()
    assert groups[0] == groups[1] == groups[2]  # 48 x 64 pixels: the first and the third overlap the second
    assert groups[5] == groups[6]
    assert len(set(groups)) == 4


def test_a_pattern_or_a_value_of_each_image_keeps_images_together():
    names = [f"site{number // 3}_{number}.png" for number in range(12)]
    data = dataset([[1]] * 12, names)
    expected = np.repeat(np.arange(4), 3).tolist()
    assert group_images(data, r"^(site\d+)_").tolist() == expected
    assert group_images(data, [name[:5] for name in names]).tolist() == expected
    splits = split_dataset(data, validation=0.25, by=r"site\d+")
    assert len(splits["validation"]) == 3
    assert len({name[:5] for name in splits["validation"].names_of(splits["validation"].image_ids())}) == 1


def test_each_image_is_validated_in_one_fold():
    data = dataset([[1]] * 10 + [[2]] * 5)
    pairs = folds(data, 5, by=None)
    assert sorted(number for pair in pairs for number in ids(pair["validation"])) == list(range(15))
    for pair in pairs:
        assert not ids(pair["train"]) & ids(pair["validation"])
        assert [count.images for count in pair["validation"].counts().values()] == [2, 1, 0]


def test_samples_and_category_ids_are_kept():
    data = dataset([[2], [1], [2], [1], [2]])
    splits = split_dataset(data, by=None)
    assert splits.category_ids == data.category_ids
    sample = splits["validation"][0]
    expected = data[sample["image_id"]]
    assert sample["annotations"] == expected["annotations"]
    assert sample["image"].tobytes() == expected["image"].tobytes()


def test_stratification_gives_each_part_its_share_of_every_class():
    rng = np.random.default_rng(0)
    in_group = (rng.random((300, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).astype(int)
    parts = stratify(in_group, np.ones(300, int), np.array([0.7, 0.2, 0.1]), np.random.default_rng(1))
    images = np.bincount(parts) / 300
    assert np.abs(images - [0.7, 0.2, 0.1]).max() < 0.03
    for part, share in enumerate([0.7, 0.2, 0.1]):
        found = in_group[parts == part].sum(0)
        assert (np.abs(found - share * in_group.sum(0)) <= 1.5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": 1.5}, "`validation` must be a fraction"),
        ({"validation": 0.6, "test": 0.5}, "`validation [+] test` must be below 1, got 1.1"),
        ({"by": "("}, "`by` must be a regular expression"),
        ({"by": "zebra"}, "`by` must match the name of every image, got 'zebra' for 'aa.png'"),
        ({"by": [1, 2]}, "one value for each of 4 images, got .*2 values"),
        ({"by": [1, 1, 1, 1]}, "got none for"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_dataset(dataset([[1]] * 4), **{"by": None} | arguments)


def test_too_many_folds_are_refused():
    with pytest.raises(ValueError, match="`count` must be at most the number of groups of images, got 5"):
        folds(dataset([[1]] * 4), 5, by=None)
    with pytest.raises(ValueError, match="`count` must be an integer of at least 2, got 1"):
        folds(dataset([[1]] * 4), 1)
    with pytest.raises(ValueError, match="`dataset` must be an InstanceDataset"):
        split_dataset([1, 2])
