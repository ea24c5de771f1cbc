"""Repeat factors against hand arithmetic, and the images that an epoch reads."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.class_balance import ClassBalance, class_repeat_factors
from transformers_rfdetr.data.dataset import InstanceDataset

# 8 images: class 0 in all, class 1 in images 0 and 1, class 2 in image 0, class 3 nowhere; image 7 has no objects.
HAS_CLASS = np.zeros((8, 4), bool)
HAS_CLASS[:7, 0] = HAS_CLASS[:2, 1] = HAS_CLASS[0, 2] = True


def test_the_factors_are_those_of_the_paper():
    # sqrt(0.5 / f) for f = 2/8 and 1/8; f = 7/8 is above the threshold.
    assert class_repeat_factors(HAS_CLASS, 0.5) == pytest.approx([1, 2**0.5, 2, 1])
    balance = ClassBalance(HAS_CLASS, 0.5)
    assert balance.factors == pytest.approx([2, 2**0.5, 1, 1, 1, 1, 1, 1])
    assert balance.num_samples == 10  # 9.41 rounded up


def test_each_epoch_has_the_same_number_of_samples_and_the_mean_of_the_repeats_is_the_factor():
    balance = ClassBalance(HAS_CLASS, 0.5, seed=3)
    epochs = [balance.images(epoch) for epoch in range(2000)]
    assert {len(images) for images in epochs} == {10}
    counts = np.array([np.bincount(images, minlength=8) for images in epochs])
    assert counts.min() == 1
    assert set(counts[:, 1]) <= {1, 2, 3}
    # 10 - 9.41 samples of an epoch are images at random.
    assert counts.mean(axis=0) == pytest.approx(balance.factors + (10 - balance.factors.sum()) / 8, abs=0.03)


def test_an_epoch_depends_on_seed_and_epoch_only():
    first, second = ClassBalance(HAS_CLASS, 0.5, seed=3), ClassBalance(HAS_CLASS, 0.5, seed=3)
    later = [second.images(epoch).tolist() for epoch in (7, 6, 5)]
    assert [first.images(epoch).tolist() for epoch in (5, 6, 7)] == later[::-1]
    orders = {tuple(ClassBalance(HAS_CLASS, 0.5, seed=seed).images(epoch)) for seed in (0, 1) for epoch in range(3)}
    assert len(orders) == 6


def test_integer_factors_repeat_exactly_and_without_a_rare_class_every_image_is_read_once():
    has_class = np.zeros((10, 2), bool)
    has_class[:, 0] = has_class[4, 1] = True
    balance = ClassBalance(has_class, 0.9)  # sqrt(0.9 / 0.1)
    assert balance.num_samples == 12
    for epoch in range(50):
        assert Counter(balance.images(epoch).tolist()) == Counter([*range(10), 4, 4])
    assert sorted(ClassBalance(has_class, 0.1).images(0)) == [*range(10)]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, float("nan")])
def test_a_threshold_that_is_not_a_fraction_is_refused(threshold):
    with pytest.raises(ValueError, match=r"`class_balance` must be in \(0, 1\], got"):
        ClassBalance(HAS_CLASS, threshold)


def test_a_prepared_dataset_reads_the_images_of_its_epoch_and_augments_the_copies_differently():
    entries = [{"id": 10 + i, "file_name": f"{i}.png", "height": 24, "width": 24} for i in range(10)]
    square = {"bbox": [2, 2, 9, 9], "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]], "iscrowd": 0, "area": 81}
    crowd = square | {"iscrowd": 1}  # does not count
    annotations = [square | {"id": i + 1, "image_id": 10 + i, "category_id": 1 + (i == 4)} for i in range(10)]
    annotations.append(crowd | {"id": 11, "image_id": 10, "category_id": 2})
    coco = {
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    dataset = InstanceDataset(coco, [Image.new("RGB", (24, 24))] * 10)
    draws = []

    def augment(image, annotations, rng):
        draws.append(rng.random())
        return image, annotations

    processor = RfDetrImageProcessor(size=24)
    prepared = dataset.with_processor(processor, augmentation=augment, seed=1, class_balance=0.9)
    prepared.set_epoch(3)
    assert len(prepared) == 12
    ids = [sample["labels"]["image_id"].item() for sample in prepared]
    assert ids == (10 + ClassBalance(dataset.classes_of_images(), 0.9, seed=1).images(3)).tolist()
    assert Counter(ids) == Counter([*range(10, 20), 14, 14])
    assert len(set(draws)) == 12
    assert prepared[-1]["labels"]["image_id"].item() == ids[-1]
