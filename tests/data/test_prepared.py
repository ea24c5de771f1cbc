"""Datasets are prepared as inputs and labels of the model: augmentation, image processor, batches."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedConfig, Trainer, TrainerState, TrainingArguments

from annotated_images import drawn_dataset, equal, loader, make_coco, make_images, processor
from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.augmentation import FlipAndCrop
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.prepared import FollowEpoch, PreparedDataset, collate_fn
from transformers_rfdetr.data.synthetic import draw_dataset


def test_prepared_samples_equal_the_output_of_the_processor():
    dataset = InstanceDataset(make_coco(), make_images())
    prepared = dataset.with_processor(processor())
    assert prepared.dataset is dataset
    assert len(prepared) == 3
    for index in range(3):
        sample = dataset[index]
        target = {"image_id": sample["image_id"], "annotations": sample["annotations"]}
        expected = processor()(sample["image"], target, return_segmentation_masks=True)
        found = prepared[index]
        assert found.keys() == {"pixel_values", "labels"}
        assert type(found["labels"]) is dict
        assert torch.equal(found["pixel_values"], expected["pixel_values"][0])
        assert equal(found["labels"], dict(expected["labels"][0]))
    assert prepared[0]["labels"]["class_labels"].tolist() == [1, 0]  # without the crowd
    assert prepared[0]["labels"]["masks"].shape == (2, 24, 24)
    assert prepared[2]["labels"]["masks"].shape == (0, 24, 24)
    assert "masks" not in dataset.with_processor(processor(), masks=False)[0]["labels"]


def test_batches_of_one_size_are_stacked():
    prepared = InstanceDataset(make_coco(), make_images()).with_processor(processor())
    batch = collate_fn([prepared[0], prepared[1]])
    assert batch.keys() == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert equal(batch["labels"], [prepared[0]["labels"], prepared[1]["labels"]])


@pytest.mark.parametrize("do_pad", [True, False])
def test_batches_of_several_sizes_are_padded_as_the_processor_pads_them(do_pad):
    flexible = {"shortest_edge": 24, "longest_edge": 48}
    dataset = InstanceDataset(make_coco(), make_images())
    prepared = dataset.with_processor(RfDetrImageProcessor(size=flexible, do_pad=do_pad))
    assert ("pixel_mask" in prepared[0]) == do_pad
    batch = collate_fn([prepared[i] for i in range(3)])
    samples = [dataset[i] for i in range(3)]
    targets = [{"image_id": s["image_id"], "annotations": s["annotations"]} for s in samples]
    expected = RfDetrImageProcessor(size=flexible)(
        [s["image"] for s in samples], targets, return_segmentation_masks=True
    )
    assert batch["pixel_values"].shape == (3, 3, 40, 36)
    assert equal(batch["pixel_values"], expected["pixel_values"])
    assert equal(batch["pixel_mask"], expected["pixel_mask"])
    assert equal(batch["labels"], [dict(label) for label in expected["labels"]])


def test_the_augmentation_depends_only_on_seed_epoch_and_index():
    prepared = drawn_dataset().with_processor(processor(), augmentation=FlipAndCrop(), seed=5)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    forwards = [prepared[index] for index in range(8)]
    backwards = [prepared[index] for index in reversed(range(8))][::-1]
    assert equal(forwards, backwards)
    assert equal(prepared[-1], forwards[-1])
    prepared.set_epoch(1)
    later = [prepared[index] for index in range(8)]
    assert sum(not equal(*pair) for pair in zip(forwards, later, strict=True)) > 3
    prepared.set_epoch(0)
    assert equal([prepared[index] for index in range(8)], forwards)
    other = drawn_dataset().with_processor(processor(), augmentation=FlipAndCrop(), seed=6)
    assert not equal([other[index] for index in range(8)], forwards)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_each_index_is_augmented_differently():
    [image], content = draw_dataset(1, classes=["building"])
    content["images"] = [{**content["images"][0], "id": number} for number in range(6)]
    content["annotations"] = []
    prepared = InstanceDataset(content, [image] * 6).with_processor(processor(), augmentation=FlipAndCrop())
    assert len({prepared[index]["pixel_values"].numpy().tobytes() for index in range(6)}) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_augmentation_does_not_depend_on_workers_and_order(num_workers):
    prepared = drawn_dataset().with_processor(processor(), augmentation=FlipAndCrop(), seed=5)
    prepared.set_epoch(4)
    expected = [prepared[index] for index in range(8)]
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    batches = list(loader(prepared, num_workers, sampler=order))
    assert equal([label for batch in batches for label in batch["labels"]], [expected[i]["labels"] for i in order])
    found = list(itertools.chain.from_iterable(batch["pixel_values"] for batch in batches))
    assert equal(found, [expected[i]["pixel_values"] for i in order])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_persistent_workers_follow_the_epoch(start):
    prepared = drawn_dataset(2).with_processor(processor(), augmentation=FlipAndCrop())
    batches = loader(prepared, num_workers=1, persistent_workers=True, multiprocessing_context=start)
    for epoch in range(3):
        prepared.set_epoch(epoch)
        [batch] = batches
        assert equal(batch, collate_fn([prepared[0], prepared[1]]))


def test_prepared_data_can_be_pickled():
    prepared = drawn_dataset(2).with_processor(processor(), augmentation=FlipAndCrop())
    prepared.set_epoch(3)
    assert equal(pickle.loads(pickle.dumps(prepared))[1], prepared[1])


def test_the_callback_sets_the_epoch_at_its_beginning():
    prepared = drawn_dataset(2).with_processor(processor(), augmentation=FlipAndCrop())
    prepared.set_epoch(2)
    expected = [prepared[0], prepared[1]]
    prepared.set_epoch(0)
    assert not equal([prepared[0], prepared[1]], expected)
    state = TrainerState(epoch=2.0)
    FollowEpoch().on_epoch_begin(None, state, None, train_dataloader=loader(prepared))
    assert equal([prepared[0], prepared[1]], expected)
    FollowEpoch().on_epoch_begin(None, state, None, train_dataloader=loader([1, 2]))  # ignores other datasets


def test_the_stock_trainer_augments_differently_in_each_epoch(tmp_path):
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.config = PreTrainedConfig()
            self.seen = []

        def forward(self, pixel_values, labels):
            self.seen += [round(float(image.double().sum()), 3) for image in pixel_values]
            return {"loss": self.weight**2}

    # Each epoch crops different squares, so that the sums of the pixels differ.
    prepared = drawn_dataset(4).with_processor(processor(), augmentation=FlipAndCrop(crop=1.0, crop_sides=(100, 300)))
    expected = []
    for epoch in range(2):
        prepared.set_epoch(epoch)
        expected.append(sorted(round(float(prepared[i]["pixel_values"].double().sum()), 3) for i in range(4)))
    prepared.set_epoch(0)
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = Recorder()
    train_dataset = ConcatDataset([Subset(prepared, [0, 1, 2]), Subset(prepared, [3])])
    Trainer(model, arguments, data_collator=collate_fn, train_dataset=train_dataset, callbacks=[FollowEpoch()]).train()
    assert [sorted(model.seen[:4]), sorted(model.seen[4:])] == expected
    assert expected[0] != expected[1]
    assert model.config.category_ids == prepared.dataset.category_ids == [1]


def test_torchvision_pipelines_are_wrapped():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    mirrored = drawn_dataset(2).with_processor(processor(), augmentation=v2.Compose([v2.RandomHorizontalFlip(p=1.0)]))
    plain = drawn_dataset(2).with_processor(processor(), augmentation=FlipAndCrop(flip=1.0, crop=0.0))
    assert torch.equal(mirrored[0]["pixel_values"], plain[0]["pixel_values"])
    assert mirrored[0]["labels"]["masks"].shape == plain[0]["labels"]["masks"].shape


def test_an_error_in_the_augmentation_names_the_image():
    def broken(image, annotations, rng):
        raise ValueError("no luck")

    with pytest.raises(ValueError, match=r"0.png, image_id 100: no luck"):
        InstanceDataset(make_coco(), make_images()).with_processor(processor(), augmentation=broken)[0]
    with pytest.raises(ValueError, match=r"seed. .*got -1"):
        PreparedDataset(drawn_dataset(1), processor(), seed=-1)
