"""How often 95 % intervals contain the true AP: `python benchmarks/intervals.py [REPETITIONS]`, 300 by default.

A simulated detector finds 85 % of the objects. Images differ in difficulty, and each has one false detection of each
class on average. The true AP is that of 800,000 images. Beside ours: the percentiles of the draws, and the basic
interval (https://doi.org/10.1017/CBO9780511802843, section 5.2). MORE_RESULTS.md has the table.
"""

import sys
from typing import Any

import numpy as np

from transformers_rfdetr.evaluation.confidence import (
    MatchTable,
    PerImage,
    confidence_intervals,
    draw_weights,
    metrics_of,
)

# Images, classes, objects of a class in an image on average, and how good the masks are.
SETTINGS = ((60, 3, 1.0, 1.2), (60, 3, 1.0, 3.0), (100, 20, 0.2, 1.2), (300, 2, 1.0, 1.2), (200, 5, 3.0, 2.0))
SETTINGS += tuple((few, 3, objects, skill) for few in (2, 5, 10, 20) for objects, skill in ((1.0, 3.0), (2.0, 1.2)))


def simulated(
    rng: np.random.Generator, num_images: int, num_classes: int, objects_per_image: float, skill: float = 1.2
) -> PerImage:
    """Return a detector whose masks are as good as a normal variable says."""
    tables = {}
    thresholds = np.linspace(0.5, 0.95, 10)[:, None]
    for number in range(num_classes):
        num_objects, difficulty = rng.poisson(objects_per_image, num_images), rng.normal(0, 0.5, num_images)
        found = np.repeat(np.arange(num_images), num_objects)
        found = found[rng.random(len(found)) < 0.85]
        ious = 1 / (1 + np.exp(difficulty[found] - rng.normal(skill, 0.8, len(found))))
        false = np.repeat(np.arange(num_images), rng.poisson(1.0, num_images))
        scores = np.concatenate([2 * ious + rng.normal(0, 0.8, len(found)), rng.normal(-0.3, 0.9, len(false))])
        order = np.argsort(-scores)
        is_match = np.concatenate([ious >= thresholds, np.zeros((10, len(false)), bool)], axis=1)[:, order]
        images = np.concatenate([found, false])[order]
        tables[str(number)] = MatchTable(num_objects, images, scores[order], is_match, np.zeros_like(is_match))
    return PerImage(list(range(num_images)), {"bbox": tables}, np.zeros((num_images, 0, 3), np.int64))


def true_ap(rng: np.random.Generator, objects_per_image: float, skill: float = 1.2) -> float:
    """Return the AP of the detector, from 8 times 100,000 images."""
    weights = np.ones((1, 100_000))
    parts = [metrics_of(simulated(rng, 100_000, 1, objects_per_image, skill), weights) for _ in range(8)]
    return float(np.mean([part["bbox_AP"] for part in parts]))


def coverage(repetitions: int, setting: tuple[Any, ...], draws: int = 500, seed: int = 0) -> dict[str, float]:
    """Return the share of the repetitions in which each interval contains the true AP."""
    rng = np.random.default_rng(seed)
    num_images, _, *detector = setting
    truth = true_ap(rng, *detector)
    hits = []
    for number in range(repetitions):
        images = simulated(rng, *setting)
        ours = confidence_intervals(images, draws=draws, seed=number)["bbox_AP"]
        point, *drawn = metrics_of(images, draw_weights(num_images, draws, number))["bbox_AP"]
        low, high = np.quantile(drawn, [0.025, 0.975])
        intervals = {"ours": ours, "percentiles": (low, high), "basic": (2 * point - high, 2 * point - low)}
        hits.append({name: lowest <= truth <= highest for name, (lowest, highest) in intervals.items()})
    return {name: float(np.mean([one[name] for one in hits])) for name in hits[0]}


def main() -> None:
    """Print the table."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    print("| images | classes | objects of a class in an image | skill | ours | percentiles | basic |")
    print("|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        shares = coverage(repetitions, setting)
        cells = [*map(str, setting), *(f"{share:.3f}" for share in shares.values())]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
