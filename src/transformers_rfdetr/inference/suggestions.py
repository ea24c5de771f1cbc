"""Suggest which images to annotate next: those that a model is unsure about, and that differ from one another.

Axis letters: N images, K detections of an image, D features, M annotated images.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..model.validation import is_integer, require
from .instances import Instances
from .predict import WEAK_SCORE, predict


class Suggestion(NamedTuple):
    """An image to annotate.

    Attributes:
        image_index: Its index among the images.
        expected_errors: Expected number of wrong and of missed objects at a threshold of 0.5.
        distance: Distance of its features to those of the nearest image that is annotated or was suggested before it,
            relative to a typical distance from the mean of all images; 1 for the first image if there is none.
    """

    image_index: int
    expected_errors: float
    distance: float


def suggest(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    count: int,
    *,
    annotated: Iterable[Any] = (),
    batch_size: int = 8,
) -> list[Suggestion]:
    """Return the images that are worth annotating next, the most useful first.

    Each is the one with the largest product of expected errors and distance to the images before it and to the
    annotated ones: greedy k-center selection (https://arxiv.org/abs/1708.00489) with a weight. Images are read one
    batch at a time.

    Args:
        model: A model, or the result of [`compile_for_inference`]; exported files have no features to compare.
        processor: The model's image processor.
        images: N images without annotations, in any form that [`predict`] accepts.
        count: Number of images to suggest; all of them are ranked if there are fewer.
        annotated: Images that are annotated already.
        batch_size: Number of images in a forward pass.

    Raises:
        ValueError: `count` is not an integer of at least 1, or an image cannot be read.
    """
    require(is_integer(count) and count >= 1, "count", count, "an integer of at least 1")
    options: dict[str, Any] = {"threshold": WEAK_SCORE, "batch_size": batch_size, "embeddings": True}
    known = _embeddings(predict(model, processor, annotated, **options))
    found = predict(model, processor, images, **options)
    return rank(np.array([expected_errors(one.scores) for one in found]), _embeddings(found), known, count)


def expected_errors(scores: np.ndarray) -> float:
    """Return the expected number of wrong decisions about K detections at a threshold of 0.5.

    A detection with the score p is right with probability p, as far as scores are calibrated. Above the threshold it is
    wrong with probability 1 - p; below, an object is missed with probability p.
    """
    return float(np.minimum(scores, 1 - scores).sum())


def rank(errors: np.ndarray, embeddings: np.ndarray, known: np.ndarray, count: int) -> list[Suggestion]:
    """Select images one after the other.

    Args:
        errors: (N,) expected errors.
        embeddings: (N, D) features of the images.
        known: (M, D) features of the annotated images.
        count: Number of images to select.
    """
    if not len(errors):
        return []
    spread = np.sqrt(((embeddings - embeddings.mean(0)) ** 2).sum(1).mean()) or 1.0
    distances = np.ones(len(errors))
    if len(known):
        distances = np.min([np.linalg.norm(embeddings - one, axis=1) for one in known], axis=0) / spread
    is_free: np.ndarray = np.ones(len(errors), bool)
    selected = []
    for _ in range(min(count, len(errors))):
        # Images of equal value, such as those without detections, are told apart by their distance.
        best = max(np.flatnonzero(is_free), key=lambda index: (errors[index] * distances[index], distances[index]))
        selected.append(Suggestion(int(best), float(errors[best]), float(distances[best])))
        is_free[best] = False
        of_best = np.linalg.norm(embeddings - embeddings[best], axis=1) / spread
        distances = of_best if len(selected) == 1 and not len(known) else np.minimum(distances, of_best)
    return selected


def _embeddings(found: list[Instances]) -> np.ndarray:
    return np.array([one.image_embedding for one in found], np.float64)
