"""Combine augmentations, and name combinations that suit a kind of images: the recipes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..model.validation import require
from .augmentation import (
    Annotations,
    Augmentation,
    BlurAndNoise,
    ColorJitter,
    FlipAndCrop,
    ScaleJitter,
    TorchvisionTransform,
)
from .copy_paste import CopyPaste


class Compose:
    """Apply augmentations one after another.

    Args:
        *augmentations: Callables (image, annotations, rng) -> (image, annotations), or `torchvision.transforms.v2`
            pipelines.
    """

    def __init__(self, *augmentations: Any) -> None:
        self.augmentations = [as_augmentation(augmentation) for augmentation in augmentations]

    def __call__(
        self, image: Image.Image, annotations: Annotations, rng: np.random.Generator
    ) -> tuple[Image.Image, Annotations]:
        """Return the augmented image and annotations."""
        for augmentation in self.augmentations:
            if augmentation is not None:
                image, annotations = augmentation(image, annotations, rng)
        return image, annotations


def _default(dataset: Any) -> Augmentation:
    """Flip horizontally (0.5) and crop a square (0.5): rfdetr's recipe."""
    return FlipAndCrop()


def _aerial(dataset: Any) -> Augmentation:
    """Scale by 0.5 to 2.0 on a fixed canvas; flip and turn by quarters, all eight orientations equally often."""
    return Compose(ScaleJitter((0.5, 2.0)), FlipAndCrop(flip=0.5, crop=0.0, rotate=0.75))


def _microscopy(dataset: Any) -> Augmentation:
    """Do as aerial; jitter colors by up to 30 % (0.8); blur by up to 1.5 pixels (0.3); add up to 5 % noise (0.3)."""
    return Compose(_aerial(dataset), ColorJitter(), BlurAndNoise())


def _strong(dataset: Any) -> Augmentation:
    """Paste up to 10 objects (0.5); scale by 0.1 to 2.0; flip horizontally (0.5); jitter colors by up to 30 % (0.8)."""
    if dataset is None:
        raise ValueError(
            "`augmentation` 'strong' requires a dataset that is not streamed, because it pastes objects of random"
            " images. Load the dataset without streaming=True, or use 'default'."
        )
    return Compose(CopyPaste(dataset), ScaleJitter(), FlipAndCrop(flip=0.5, crop=0.0), ColorJitter())


RECIPES: dict[str, Callable[[Any], Augmentation | None]] = {
    "default": _default,
    "aerial": _aerial,
    "microscopy": _microscopy,
    "strong": _strong,
    "none": lambda dataset: None,
}


def as_augmentation(augmentation: Any, dataset: Any = None) -> Augmentation | None:
    """Return the augmentation that a name, a callable, a `torchvision.transforms.v2` pipeline or None stands for.

    Args:
        augmentation: A key of `RECIPES`, or a callable, which is returned unchanged unless it is a pipeline.
        dataset: The [`InstanceDataset`] that is augmented; None for a stream.

    Raises:
        ValueError: it cannot be called and is not the name of a recipe, or the recipe requires a dataset.
    """
    if isinstance(augmentation, str) and augmentation in RECIPES:
        return RECIPES[augmentation](dataset)
    if isinstance(augmentation, torch.nn.Module):
        return TorchvisionTransform(augmentation)
    rule = (
        f"one of {', '.join(RECIPES)}, a callable (image, annotations, rng) -> (image, annotations) or a"
        " torchvision.transforms.v2 pipeline"
    )
    require(augmentation is None or callable(augmentation), "augmentation", augmentation, rule, "Use 'default'.")
    return augmentation
