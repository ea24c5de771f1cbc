"""From annotated images to the model's inputs and labels: augmentation, image processor and batches."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data
from transformers import TrainerCallback

from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.validation import error_context, is_index
from .class_balance import ClassBalance
from .recipes import as_augmentation


class SamplePreparation:
    """Apply augmentation and image processor to one sample.

    Args:
        processor: The model's image processor.
        augmentation: As in [`PreparedDataset`].
        seed: An integer >= 0.
        masks: As `return_segmentation_masks` of the processor.
        dataset: The dataset of the samples; None for a stream.
    """

    def __init__(
        self, processor: RfDetrImageProcessor, augmentation: Any, seed: int, masks: Any, dataset: Any = None
    ) -> None:
        if not is_index(seed):
            raise ValueError(f"`seed` must be an integer >= 0, got {seed!r}. Use 0.")
        self.processor, self.augmentation = processor, as_augmentation(augmentation, dataset)
        self.seed, self.masks = int(seed), masks
        self._has_fixed_size = processor.do_resize and "height" in processor.size and processor.pad_size is None

    def __call__(self, sample: Mapping[str, Any], *key: int) -> dict[str, Any]:
        """Return the model's inputs and labels of a sample; seed and `key` determine the random augmentation."""
        image, annotations = sample["image"], sample["annotations"]
        with error_context(f"{sample.get('file_name', 'image')!s}, image_id {sample['image_id']}"):
            if self.augmentation is not None:
                image, annotations = self.augmentation(image, annotations, np.random.default_rng([self.seed, *key]))
            target = {"image_id": sample["image_id"], "annotations": annotations}
            inputs = self.processor(image, target, return_segmentation_masks=self.masks, return_tensors="pt")
        prepared = {"pixel_values": inputs["pixel_values"][0], "labels": dict(inputs["labels"][0])}
        if "pixel_mask" in inputs and not self._has_fixed_size:
            prepared["pixel_mask"] = inputs["pixel_mask"][0]
        return prepared


class PreparedDataset(torch.utils.data.Dataset):
    """The model's inputs and labels of an [`InstanceDataset`], with a new random augmentation in each epoch.

    `prepared[i]` is a dict of `pixel_values` (3, H, W), `labels` (the processor's dict of tensors for one image) and,
    unless the processor resizes all images to the same size, `pixel_mask` (H, W). [`collate_fn`] makes batches of them.

    The augmentation depends only on seed, epoch and index, not on workers, order or global random generators.
    `set_epoch` also reaches persistent workers. With several processes, accelerate and the stock Trainer pass the epoch
    to the sampler and not to the dataset: give the Trainer `callbacks=[FollowEpoch()]`, or all epochs are augmented
    alike.

    With `class_balance`, `prepared[i]` is the i-th sample of an epoch, and not that of image i. An epoch has
    `len(prepared)` samples, and images with rare classes occur in several of them, each augmented differently.

    Args:
        dataset: The [`InstanceDataset`].
        processor: The model's image processor.
        augmentation: "default", "aerial", "microscopy", "strong" or "none", see `recipes.py`; a callable (image,
            annotations, rng) -> (image, annotations), such as
            [`FlipAndCrop`][transformers_rfdetr.data.augmentation.FlipAndCrop]; or a pipeline of
            `torchvision.transforms.v2`. None is "none".
        seed: An integer >= 0.
        masks: As `return_segmentation_masks` of the processor: True or "cropped" for instance segmentation.
        class_balance: Repeat images with classes that fewer than this fraction of the images have, in (0, 1]; see
            [`ClassBalance`].
    """

    def __init__(
        self,
        dataset: Any,
        processor: RfDetrImageProcessor,
        *,
        augmentation: Any = None,
        seed: int = 0,
        masks: Literal["cropped"] | bool = True,
        class_balance: float | None = None,
    ) -> None:
        self.dataset = dataset
        self._prepare = SamplePreparation(processor, augmentation, seed, masks, dataset)
        self.balance: ClassBalance | None = None
        if class_balance is not None:
            self.balance = ClassBalance(dataset.classes_of_images(), class_balance, self._prepare.seed)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset) if self.balance is None else self.balance.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Augment as in this epoch from now on, in running workers too, except for samples that are ready."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be in [{-len(self)}, {len(self)}), got {index}")
        epoch, place = int(self._epoch), int(index) % len(self)
        image = place if self.balance is None else int(self.balance.images(epoch)[place])
        return self._prepare(self.dataset[image], epoch, place)


class FollowEpoch(TrainerCallback):
    """Set the epoch of each [`PreparedDataset`] when it begins, for the stock Trainer.

    The category ids of the dataset are stored in the model's configuration, so that predictions have them. The training
    data may be a `Subset` or `ConcatDataset` of prepared datasets.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the category ids of the training data as `category_ids` of the configuration."""
        for prepared in _find_prepared(getattr(kwargs.get("train_dataloader"), "dataset", None)):
            category_ids = getattr(prepared.dataset, "category_ids", None)
            if category_ids is not None and hasattr(kwargs.get("model"), "config"):
                kwargs["model"].config.category_ids = list(category_ids)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch of each [`PreparedDataset`]."""
        for prepared in _find_prepared(getattr(kwargs.get("train_dataloader"), "dataset", None)):
            prepared.set_epoch(int(state.epoch or 0))


def _find_prepared(dataset: Any) -> list[PreparedDataset]:
    """Return the PreparedDatasets that a dataset reads from."""
    if isinstance(dataset, torch.utils.data.Subset):
        return _find_prepared(dataset.dataset)
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        return [prepared for part in dataset.datasets for prepared in _find_prepared(part)]
    return [dataset] if isinstance(dataset, PreparedDataset) else []


def collate_fn(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate samples of a [`PreparedDataset`] or [`PreparedStream`] into one batch.

    If their sizes differ, images and masks are padded at the bottom and right to the largest height and width, and
    `pixel_mask` is 1 inside the images. Boxes are relative to the image and do not change, nor do cropped masks.

    Args:
        samples: Dicts of `pixel_values` (3, H, W), `labels` and, optionally, `pixel_mask` (H, W).

    Returns:
        `pixel_values` (B, 3, H, W); `labels`, a list of B dicts; and, if sizes differ or samples have one,
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
