"""Streamed splits."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed
import torch.utils.data

from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.validation import error_context, is_index
from .annotation_records import check_annotations, read_sample
from .label_maps import (
    HasLabelMap,
)
from .prepared import SamplePreparation


class InstanceStream(HasLabelMap):
    """A split that is read from front to back and never as a whole: `with_processor` makes a training set of it.

    Args:
        rows: A `datasets.IterableDataset`.
        reader: `reader.record(row)` makes a record of a row, `reader.picture(row)` gives its picture, PIL or a path.
        classes: Names by category id.
    """

    def __init__(self, rows: Any, reader: Any, classes: dict[int, str]) -> None:
        self.rows, self._reader, self._classes = rows, reader, classes

    def with_processor(
        self,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: bool = True,
        repeat: bool = True,
        buffer_size: int = 256,
        process: tuple[int, int] | None = None,
    ) -> "PreparedStream":
        """The same data as the model's inputs and labels; see [`PreparedStream`] for the arguments."""
        preparation = SamplePreparation(processor, augmentation, seed, masks)
        return PreparedStream(self, preparation, repeat=repeat, buffer_size=buffer_size, process=process)

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows -> what `InstanceDataset` gives for an image; `image_id` is the position where rows have no number."""
        label_of = {category: label for label, category in enumerate(self._classes)}
        for position, row in enumerate(rows):
            with error_context(f"row {position}"):
                record = self._reader.record(row)
                check_annotations(record["annotations"], self._classes)
                image_id = None if is_index(record.get("image_id")) else position
                sample = read_sample(record, self._reader.picture(row), label_of, image_id, first_id=1)
            yield sample


class PreparedStream(torch.utils.data.IterableDataset):
    """An [`InstanceStream`] as the model's inputs and labels; samples as those of a [`PreparedDataset`].

    Each process and each worker reads its own part, so that together they read every row once in an epoch. There can be
    no more workers at work than the stream has shards (files). What is drawn depends on seed, epoch, process, worker
    and position alone.

    Args:
        stream: The annotated pictures.
        preparation: Processor, augmentation, seed and whether there are masks.
        repeat: Whether epoch follows epoch without an end, each in an order of its own, as training wants it; otherwise
            there is one pass in the stream's order.
        buffer_size: With `repeat`, the rows, still encoded, among which the next one is drawn.
        process: (rank, number of processes) of this process. By default what torch.distributed says when the reading
            starts, else the environment variables RANK and WORLD_SIZE, else (0, 1). Give (0, 1) where something else
            hands the samples out to the processes, as accelerate's dispatcher does.
    """

    def __init__(
        self,
        stream: InstanceStream,
        preparation: SamplePreparation,
        *,
        repeat: bool = True,
        buffer_size: int = 256,
        process: tuple[int, int] | None = None,
    ) -> None:
        self.stream, self._prepare = stream, preparation
        self.repeat, self.buffer_size, self.process = repeat, buffer_size, process
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The next reading starts with this epoch."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, world_size = self.process or _process()
        worker = torch.utils.data.get_worker_info()
        epoch = int(self._epoch)
        while True:
            position = -1
            for position, sample in enumerate(self.stream.samples(self._rows(epoch, rank, world_size))):
                yield self._prepare(sample, epoch, rank, worker.id if worker else 0, position)
            # A worker without a shard would wait for its first sample for ever.
            if not self.repeat or position < 0:
                return
            epoch += 1

    def _rows(self, epoch: int, rank: int, world_size: int) -> Iterable[Mapping[str, Any]]:
        """This process's rows of an epoch; datasets itself shares them out among the workers."""
        from datasets.distributed import split_dataset_by_node

        rows = self.stream.rows
        if self.repeat:
            rows = rows.shuffle(seed=self._prepare.seed, buffer_size=self.buffer_size)
        rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        if self.repeat:
            rows.set_epoch(epoch)
        return rows


def _process() -> tuple[int, int]:
    """(rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
