"""A streamed split is read once per epoch by all processes and workers together."""

import functools
import itertools

import PIL.Image
import pytest
import torch

from annotated_images import ID_TO_NAME, INDEX, NAMES, equal, features, loader, processor, rows
from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.data.augmentation import FlipAndCrop
from transformers_rfdetr.data.dataset import InstanceDatasets
from transformers_rfdetr.data.streams import InstanceStream, collate_unless_skipped

datasets = pytest.importorskip("datasets")


def stream(num_shards: int, num_rows: int = 12, **arguments):
    item = {"category": datasets.ClassLabel(names=NAMES), "bbox": datasets.Sequence(datasets.Value("float32"))}
    schema = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(), "objects": [item]})
    content = [
        {
            "image_id": number,
            "image": PIL.Image.new("RGB", (30, 20), (number, 0, 0)),
            "objects": [{"category": 1, "bbox": [1.0, 2.0, 10.0, 10.0]}],
        }
        for number in range(num_rows)
    ]
    table = datasets.Dataset.from_list(content, features=schema)
    split = load_instance_dataset(table.to_iterable_dataset(num_shards=num_shards))["train"]
    return split.with_processor(processor(), masks=False, **arguments)


def seen(prepared, num_workers: int = 0, limit: int | None = None) -> list[int]:
    batches = loader(prepared, num_workers=num_workers, batch_size=1)
    return [int(batch["labels"][0]["image_id"]) for batch in itertools.islice(batches, limit)]


def test_a_stream_yields_samples_with_labels():
    prepared = stream(1, repeat=False)
    assert isinstance(prepared.stream, InstanceStream)
    assert prepared.stream.id2label == {0: "roof", 1: "tree"}
    samples = list(prepared)
    assert [int(sample["labels"]["image_id"]) for sample in samples] == list(range(12))
    assert samples[3]["labels"]["class_labels"].tolist() == [1]
    red = (3 / 255 - 0.485) / 0.229
    assert samples[3]["pixel_values"][0].mean() == pytest.approx(red, abs=1e-5)
    assert "streamed, not counted" in str(InstanceDatasets({"train": prepared.stream}))


# With two workers and three shards, one worker reads more rows, so that the epochs of the two end at different times.
@pytest.mark.parametrize(
    ("num_shards", "num_workers", "repeat"),
    [*itertools.product((3, 4), (0, 2), (False,)), (3, 0, True), (4, 0, True), (4, 2, True)],
)
def test_two_processes_see_each_row_of_an_epoch_once(num_shards, num_workers, repeat):
    arguments = {"repeat": repeat, "buffer_size": 4}
    parts = [stream(num_shards, process=(rank, 2), **arguments) for rank in range(2)]
    limit = 6 if repeat else None
    found = [seen(part, num_workers, limit) for part in parts]
    assert sorted(found[0] + found[1]) == list(range(12))
    assert [len(part) for part in found] == [6, 6]
    assert [seen(part, num_workers, limit) for part in parts] == found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_samples_are_not_prepared_and_the_others_are_the_same(num_workers):
    prepared = stream(4, buffer_size=4, augmentation=FlipAndCrop())
    collate = functools.partial(collate_unless_skipped, collate=list)
    skipped = 8 if num_workers else 15  # of each worker: with 12 rows an epoch, also some of the second one

    def batches():
        found = torch.utils.data.DataLoader(prepared, 1, num_workers=num_workers, collate_fn=collate)
        return list(itertools.islice(found, 20))

    whole, prepared.num_skipped = batches(), skipped
    rest = batches()
    num_empty = skipped * max(num_workers, 1)
    assert rest[:num_empty] == [{}] * num_empty
    assert equal(rest[num_empty:], whole[num_empty:])


def test_rank_and_world_size_are_read_from_the_environment(monkeypatch):
    prepared = stream(2, repeat=False)
    assert len(list(prepared)) == 12
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        found += seen(prepared)
    assert sorted(found) == list(range(12))


def test_a_repeated_stream_is_shuffled_differently_in_each_epoch():
    prepared = stream(3, repeat=True, buffer_size=6, seed=2)
    order = seen(prepared, limit=36)
    epochs = [order[start : start + 12] for start in (0, 12, 24)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    prepared.set_epoch(1)
    assert seen(prepared, limit=24) == epochs[1] + epochs[2]


def test_the_augmentation_of_a_stream_depends_on_seed_epoch_and_position():
    def samples(**arguments):
        prepared = stream(2, augmentation=FlipAndCrop(), repeat=False, **arguments)
        return [sample["labels"]["boxes"] for sample in prepared]

    def epoch(number):
        prepared = stream(2, augmentation=FlipAndCrop(), repeat=False)
        prepared.set_epoch(number)
        return [sample["labels"]["boxes"] for sample in prepared]

    assert equal(samples(), samples())
    assert not equal(samples(), samples(seed=1))
    assert equal(epoch(0), samples())
    assert not equal(epoch(0), epoch(1))


def test_each_process_and_each_worker_augments_differently():
    # All rows hold the same box; 2 shards of 6 rows.
    arguments = {"augmentation": FlipAndCrop(crop=1.0, crop_sides=(200, 500)), "repeat": False}
    processes = [[sample["labels"]["boxes"] for sample in stream(2, process=(rank, 2), **arguments)] for rank in (0, 1)]
    assert len(processes[0]) == len(processes[1]) == 6
    assert not equal(*processes)
    batches = [batch["labels"][0]["boxes"] for batch in loader(stream(2, **arguments), num_workers=2, batch_size=1)]
    assert len(batches) == 12
    assert not equal(batches[::2], batches[1::2])


def test_copy_paste_is_refused_for_a_stream():
    assert len(list(stream(1, augmentation="microscopy", repeat=False))) == 12
    with pytest.raises(ValueError, match=r"'strong' requires a dataset that is not streamed"):
        stream(1, augmentation="strong")


def test_a_worker_without_a_shard_ends_instead_of_waiting():
    assert sorted(seen(stream(1, num_rows=3), num_workers=2, limit=6)) == [0, 0, 1, 1, 2, 2]


def test_a_stream_without_class_labels_requires_class_names():
    table = datasets.Dataset.from_list(rows(ID_TO_NAME.get)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"class_names. .*stream.*got"):
        load_instance_dataset(table)
    split = load_instance_dataset(table, class_names=NAMES)["train"]
    samples = list(split.with_processor(processor(), repeat=False))
    assert samples[0]["labels"]["class_labels"].tolist() == [1, 0]
    assert samples[0]["labels"]["masks"].shape == (2, 24, 24)
    numbers = datasets.Dataset.from_list(rows()).to_iterable_dataset()
    wrong = load_instance_dataset(numbers, class_names=NAMES)["train"].with_processor(processor(), repeat=False)
    with pytest.raises(ValueError, match=r"row 0: annotation 0 .id 11.: .category_id. .*got 7"):
        list(wrong)


def test_a_stream_may_declare_no_features():
    table = datasets.IterableDataset.from_generator(lambda: iter(rows(ID_TO_NAME.get)))
    split = load_instance_dataset(table, class_names=NAMES)["train"]
    assert len(list(split.with_processor(processor(), repeat=False))) == 3


def test_folders_are_streamed_without_a_copy_in_the_cache(tmp_path):
    table = datasets.Dataset.from_list(
        rows(INDEX.get), features=features(datasets.ClassLabel(names=NAMES), as_columns=False)
    )
    table.to_parquet(tmp_path / "train.parquet")
    data = load_instance_dataset(tmp_path, streaming=True, cache_dir=str(tmp_path / "cache"))
    assert data.id2label == {0: "roof", 1: "tree"}
    assert len(list(data["train"].with_processor(processor(), repeat=False))) == 3
    assert list((tmp_path / "cache").rglob("*.arrow")) == []
