"""Prepare samples for the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
import torch.utils.data
from transformers import TrainerCallback

from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.validation import error_context, is_index
from .augmentation import as_augmentation


class PreparedDataset(torch.utils.data.Dataset):
    """An [`InstanceDataset`] as the model's inputs and labels, augmented anew in each epoch.

    `prepared[i]` is a dict of `pixel_values` (3, H, W), `labels` (the processor's dict of tensors for one image) and,
    unless the processor makes every picture the same size, `pixel_mask` (H, W). [`collate_fn`] makes batches of them.

    What is drawn depends on seed, epoch and index alone, not on workers, order or the global generators. `set_epoch`
    reaches persistent workers too. accelerate, and with it the stock Trainer, tells the epoch to the sampler instead of
    the data set where there are several processes: pass `callbacks=[FollowEpoch()]` to it, or each epoch has the same
    draws.

    Args:
        dataset: The annotated pictures; `prepared.dataset`.
        processor: The model's image processor.
        augmentation: [`FlipAndCrop`][transformers_rfdetr.data.augmentation.FlipAndCrop] or any other callable (picture,
            annotations, rng) -> (picture, annotations), or a pipeline of `torchvision.transforms.v2`.
        seed: 0 or more.
        masks: Whether labels hold masks, which instance segmentation needs.
    """

    def __init__(
        self,
        dataset: Any,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: bool = True,
    ) -> None:
        self.dataset = dataset
        self._prepare = SamplePreparation(processor, augmentation, seed, masks)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """From now on the draws are those of this epoch, in running workers too, but for what they have prepared."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return self._prepare(sample, int(self._epoch), int(index) % len(self))


class SamplePreparation:
    """Augmentation and processor, one after the other, for one sample."""

    def __init__(self, processor: RfDetrImageProcessor, augmentation: Any, seed: int, masks: bool) -> None:
        if not is_index(seed):
            raise ValueError(f"seed {seed!r} is not a whole number of at least 0; 0 is usual")
        self.processor, self.augmentation = processor, as_augmentation(augmentation)
        self.seed, self.masks = int(seed), masks
        self.is_exact = processor.do_resize and "height" in processor.size and processor.pad_size is None

    def __call__(self, sample: Mapping[str, Any], *key: int) -> dict[str, Any]:
        """A sample of an [`InstanceDataset`] -> the model's inputs and labels, with the draws of `key`."""
        picture, annotations = sample["image"], sample["annotations"]
        with error_context(f"{sample.get('file_name', 'picture')!s}, image_id {sample['image_id']}"):
            if self.augmentation is not None:
                picture, annotations = self.augmentation(picture, annotations, np.random.default_rng([self.seed, *key]))
            target = {"image_id": sample["image_id"], "annotations": annotations}
            inputs = self.processor(picture, target, return_segmentation_masks=self.masks, return_tensors="pt")
        prepared = {"pixel_values": inputs["pixel_values"][0], "labels": dict(inputs["labels"][0])}
        if "pixel_mask" in inputs and not self.is_exact:
            prepared["pixel_mask"] = inputs["pixel_mask"][0]
        return prepared


class FollowEpoch(TrainerCallback):
    """Tells the training data which epoch begins, for the stock Trainer; see [`PreparedDataset`]."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes the epoch on."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if isinstance(dataset, PreparedDataset):
            dataset.set_epoch(int(state.epoch or 0))


def collate_fn(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of a [`PreparedDataset`] or [`PreparedStream`] -> one batch of the model's inputs and labels.

    Where sizes differ, pictures and masks are padded at the bottom and right to the largest height and width, and
    `pixel_mask` tells the picture from the padding; boxes are relative to the picture and stay.

    Args:
        samples: Dicts of `pixel_values` (3, H, W), `labels` and possibly `pixel_mask` (H, W).

    Returns:
        `pixel_values` (B, 3, H, W); `labels`, a list of B dicts; and, where sizes differ or samples have one,
        `pixel_mask` (B, H, W) int64.
    """
    sizes = [tuple(sample["pixel_values"].shape[-2:]) for sample in samples]
    largest = (max(height for height, _ in sizes), max(width for _, width in sizes))
    pixels, masks, labels = [], [], []
    for sample, size in zip(samples, sizes, strict=True):
        padding = (0, largest[1] - size[1], 0, largest[0] - size[0])
        label = dict(sample["labels"])
        if size != largest:
            label["size"] = torch.tensor(largest)
            if "masks" in label:
                label["masks"] = F.pad(label["masks"], padding)
        labels.append(label)
        pixels.append(F.pad(sample["pixel_values"], padding))
        mask = sample.get("pixel_mask")
        masks.append(F.pad(torch.ones(size, dtype=torch.int64) if mask is None else mask, padding))
    batch = {"pixel_values": torch.stack(pixels), "labels": labels}
    if len(set(sizes)) > 1 or any("pixel_mask" in sample for sample in samples):
        batch["pixel_mask"] = torch.stack(masks)
    return batch
