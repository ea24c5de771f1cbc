"""Repeat images with rare classes in an epoch, by the repeat factors of LVIS (https://arxiv.org/abs/1908.03195)."""

import math

import numpy as np

from ..model.validation import require


def class_repeat_factors(has_class: np.ndarray, threshold: float) -> np.ndarray:
    """Return the repeat factor of each class: max(1, sqrt(threshold / f)), where the fraction f of images has it.

    Args:
        has_class: (N, C) bool, whether an image has an object of a class.
        threshold: Fraction of images, in (0, 1], below which a class is repeated.

    Returns:
        (C,) float64; 1 for a class without objects.
    """
    fractions = has_class.mean(axis=0)
    return np.sqrt(np.maximum(threshold / np.where(fractions > 0, fractions, 1), 1))


class ClassBalance:
    """Draw which images an epoch reads. The factor of an image is the largest of its classes, 1 without objects.

    Each epoch has the same number of samples, the sum of the factors rounded up. An image with the factor 2.3 is read
    twice in each epoch, and a third time in 30 % of them. The draw depends only on seed and epoch, so that it is the
    same in all processes, in all workers and in a resumed run.

    Args:
        has_class: (N, C) bool, whether an image has an object of a class.
        threshold: Fraction of images, in (0, 1], below which a class is repeated.
        seed: An integer >= 0.

    Raises:
        ValueError: `threshold` is out of range.
    """

    def __init__(self, has_class: np.ndarray, threshold: float, seed: int = 0) -> None:
        require(0 < threshold <= 1, "class_balance", threshold, "in (0, 1]", "A class in fewer images is repeated.")
        self.threshold, self.seed = threshold, seed
        self.class_factors = class_repeat_factors(has_class, threshold)
        self.factors = np.where(has_class, self.class_factors, 1).max(axis=1, initial=1)
        self.num_samples = math.ceil(self.factors.sum() - 1e-6)  # without what rounding may have added
        self._drawn: tuple[int, np.ndarray] | None = None

    def images(self, epoch: int) -> np.ndarray:
        """Return the indices of the images that an epoch reads, (num_samples,) int64."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._draw(epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> np.ndarray:
        # The third number keeps the draw apart from the augmentation, which has the place of a sample there.
        rng = np.random.default_rng([self.seed, epoch, self.num_samples])
        order = rng.permutation(len(self.factors))
        whole, fraction = np.divmod(self.factors[order], 1)
        # Systematic sampling: an image whose interval of the summed fractions holds an integer is read once more.
        ends = np.floor(np.cumsum(fraction) + rng.random())
        counts = whole + np.diff(ends, prepend=0)
        images: np.ndarray = np.repeat(order, counts.astype(np.int64))
        # The fractions sum to the number of samples or to one less; then a random image is read once more.
        return np.append(images, rng.integers(len(order)))[: self.num_samples]
