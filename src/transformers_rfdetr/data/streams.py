"""A split that is read from front to back, and the model's inputs and labels of it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed
import torch.utils.data

from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.validation import error_context, is_index
from .annotation_records import check_annotations, read_sample
from .hub_rows import RowReader
from .ignored_classes import IgnoredClassRecords
from .label_maps import HasLabelMap
from .prepared import SamplePreparation


class InstanceStream(HasLabelMap):
    """Annotated images that are streamed; `with_processor` makes training data of them.

    Args:
        rows: A `datasets.IterableDataset`.
        reader: Converts its rows to records.
        classes: Names by category id.
    """

    def __init__(self, rows: Any, reader: RowReader | IgnoredClassRecords, classes: dict[int, str]) -> None:
        self.rows, self._reader, self._classes = rows, reader, classes

    def with_processor(
        self,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: Literal["cropped"] | bool = True,
        repeat: bool = True,
        buffer_size: int = 256,
        process: tuple[int, int] | None = None,
    ) -> "PreparedStream":
        """Return the model's inputs and labels of the images.

        `augmentation`, `seed` and `masks` are those of [`PreparedDataset`], the others those of [`PreparedStream`].
        """
        preparation = SamplePreparation(processor, augmentation, seed, masks)
        return PreparedStream(self, preparation, repeat=repeat, buffer_size=buffer_size, process=process)

    def samples(self, rows: Iterable[Mapping[str, Any]], num_skipped: int = 0) -> Iterator[dict[str, Any] | None]:
        """Yield the sample of each row, as `InstanceDataset` does; without an integer `image_id` it is the position.

        The first `num_skipped` rows are not decoded, and are None.
        """
        label_of = {category: label for label, category in enumerate(self._classes)}
        for position, row in enumerate(rows):
            if position < num_skipped:
                yield None
                continue
            with error_context(f"row {position}"):
                record = self._reader.record(row)
                check_annotations(record["annotations"], self._classes)
                image_id = None if is_index(record.get("image_id")) else position
                sample = read_sample(record, self._reader.image(row), label_of, image_id, first_id=1)
            yield sample


class PreparedStream(torch.utils.data.IterableDataset):
    """The model's inputs and labels of an [`InstanceStream`]; samples are those of a [`PreparedDataset`].

    Each process and each worker reads its own shards (files), so that together they read every row once per epoch;
    workers beyond the number of shards have nothing to read. The augmentation depends only on seed, epoch, process,
    worker and position.

    Args:
        stream: The annotated images.
        preparation: Image processor, augmentation, seed and form of the masks.
        repeat: Yield epoch after epoch without end, each in its own order, as training requires; otherwise one pass in
            the order of the stream.
        buffer_size: Number of encoded rows from which the next one is drawn, with `repeat`.
        process: (rank, number of processes). By default those of torch.distributed when reading starts, else the
            environment variables RANK and WORLD_SIZE, else (0, 1). Give (0, 1) if something else distributes the
            samples to the processes, as the dispatcher of accelerate does.

    Attributes:
        num_skipped: Number of samples that each worker begins with and that are not prepared but None: those that a run
            had used before it was interrupted. Their rows are read again, because a shuffled order depends on them.
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
        self.num_skipped = 0
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration with this epoch."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        rank, world_size = self.process or _current_process()
        worker = torch.utils.data.get_worker_info()
        epoch, num_skipped = int(self._epoch), self.num_skipped
        while True:
            position = -1
            for position, sample in enumerate(self.stream.samples(self._rows(epoch, rank, world_size), num_skipped)):
                key = (epoch, rank, worker.id if worker else 0, position)
                yield None if sample is None else self._prepare(sample, *key)
            # Without a shard the loop would never yield: end it.
            if not self.repeat or position < 0:
                return
            epoch, num_skipped = epoch + 1, max(0, num_skipped - position - 1)

    def _rows(self, epoch: int, rank: int, world_size: int) -> Iterable[Mapping[str, Any]]:
        """Return this process's rows of an epoch; `datasets` distributes them to the workers."""
        from datasets.distributed import split_dataset_by_node

        rows = self.stream.rows
        if self.repeat:
            rows = rows.shuffle(seed=self._prepare.seed, buffer_size=self.buffer_size)
        rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        if self.repeat:
            rows.set_epoch(epoch)
        return rows


def collate_unless_skipped(samples: Sequence[Any], collate: Callable[[Sequence[Any]], Any]) -> Any:
    """Return a batch, or an empty dict for samples that a [`PreparedStream`] has skipped."""
    return {} if samples[0] is None else collate(samples)


def _current_process() -> tuple[int, int]:
    """Return (rank, number of processes)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
