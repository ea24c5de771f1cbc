"""Compute what the scores of detections are worth: precision, recall and F1 over the threshold, and their reliability.

Detections are matched at IoU 0.5. A match does not depend on detections with lower scores, so one matching gives the
numbers at every threshold.

Axis letters: D detections of a class in all images, best first, L thresholds.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .confidence import MatchTable

THRESHOLDS = np.arange(1000) / 1000  # L
AT_50 = 0  # index into the IoU thresholds
_NUM_BINS = 10  # of the reliability diagram


class ScoreCurves(NamedTuple):
    """Precision, recall and F1 of one class over `THRESHOLDS`, counted over all images; (L,) float64, NaN for 0 / 0."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def score_curves(table: MatchTable) -> ScoreCurves:
    """Return the curves of the detections with a score above each threshold."""
    num_kept = num_above_thresholds(table)
    found = np.append(0, np.cumsum(table.is_match[AT_50]))[num_kept]
    counted = np.append(0, np.cumsum(~table.is_ignored[AT_50]))[num_kept]
    num_objects = table.num_objects.sum()
    with np.errstate(invalid="ignore"):
        return ScoreCurves(found / counted, found / num_objects, 2 * found / (counted + num_objects))


def num_above_thresholds(table: MatchTable) -> np.ndarray:
    """Return how many detections (L,) have a score above each threshold."""
    return np.asarray(np.searchsorted(-table.scores, -THRESHOLDS, side="left"))


class Reliability(NamedTuple):
    """Whether scores are probabilities: the share of matches among detections with similar scores."""

    scores: np.ndarray  # (bins,) float64, mean score of each bin that has a detection
    shares: np.ndarray  # (bins,) float64, share of its detections that match an object
    error: float  # expected calibration error in [0, 1], https://arxiv.org/abs/1706.04599; NaN without a detection


def reliability(tables: Iterable[MatchTable]) -> Reliability:
    """Return the reliability diagram of the detections of all classes, in bins of a tenth."""
    pairs = [(table.scores[kept], table.is_match[AT_50][kept]) for table in tables for kept in [~table.is_ignored[0]]]
    scores, is_match = (np.concatenate([np.empty(0), *part]) for part in zip(*pairs, strict=True))
    bins = np.minimum((scores * _NUM_BINS).astype(int), _NUM_BINS - 1)
    counts = np.bincount(bins, minlength=_NUM_BINS)
    sums = [np.bincount(bins, values, _NUM_BINS)[counts > 0] for values in (scores, is_match)]
    counts = counts[counts > 0]
    error = float(np.abs(sums[0] - sums[1]).sum() / counts.sum()) if len(counts) else math.nan
    return Reliability(sums[0] / counts, sums[1] / counts, error)
