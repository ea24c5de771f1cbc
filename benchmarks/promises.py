"""How often bounds promise a recall that is not there, and how often they promise one that is there.

python benchmarks/promises.py [REPETITIONS]

An image has a number of objects, and each is found with the image's own probability, Beta distributed. The correlation
of two objects of an image is 0 if all images have the same probability, and 1 if it is 0 or 1. The wanted recall is
0.9, at a confidence of 95 %.
"""

import sys
from collections.abc import Callable

import numpy as np
from scipy.stats import beta, binom, t

from transformers_rfdetr.evaluation.calibration import holds_with_confidence

TARGET, CONFIDENCE = 0.9, 0.95
COUNTS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "1 object in an image": lambda rng, num_images: np.ones(num_images, int),
    "Poisson, mean 5": lambda rng, num_images: rng.poisson(5, num_images),
    "geometric, mean 9": lambda rng, num_images: rng.geometric(0.1, num_images) - 1,
}


def found_objects(rng: np.random.Generator, counts: np.ndarray, recall: float, correlation: float) -> np.ndarray:
    """Return how many objects of each image are found."""
    if correlation == 0:
        return rng.binomial(counts, recall)
    if correlation == 1:
        return counts * (rng.random(len(counts)) < recall)
    total = (1 - correlation) / correlation
    return rng.binomial(counts, rng.beta(recall * total, (1 - recall) * total, len(counts)))


def ours(found: np.ndarray, counts: np.ndarray) -> bool:
    """Judge the mean of the images' recalls by betting."""
    return holds_with_confidence((found / np.maximum(counts, 1))[counts > 0], TARGET, CONFIDENCE)


def hoeffding_bentkus(found: np.ndarray, counts: np.ndarray) -> bool:
    """Judge the mean of the images' recalls by Bentkus' part of https://arxiv.org/abs/2110.01052, section 1.1."""
    missed = (1 - found / np.maximum(counts, 1))[counts > 0]
    return np.e * binom.cdf(np.ceil(missed.sum()), len(missed), 1 - TARGET) <= 1 - CONFIDENCE


def t_test(found: np.ndarray, counts: np.ndarray) -> bool:
    """Judge the mean of the images' recalls by its standard error."""
    gains = (found / np.maximum(counts, 1) - TARGET)[counts > 0]
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return gains.mean() > t.ppf(CONFIDENCE, len(gains) - 1) * error


def clopper_pearson(found: np.ndarray, counts: np.ndarray) -> bool:
    """Judge the recall of all objects as if they were independent."""
    return _is_above(found.sum() / counts.sum(), counts.sum())


def korn_graubard(found: np.ndarray, counts: np.ndarray) -> bool:
    """Judge it with an effective number of objects, from the variance between images (Survey Methodology 24, 1998)."""
    num_images, share, total = np.count_nonzero(counts), found.sum() / counts.sum(), counts.sum()
    variance = num_images / (num_images - 1) * ((found - share * counts) ** 2).sum() / total**2
    effective = min(total, share * (1 - share) / variance) if variance else total**2 / (counts**2).sum()
    return _is_above(share, effective * (t.ppf(CONFIDENCE, total - 1) / t.ppf(CONFIDENCE, num_images - 1)) ** 2)


def _is_above(share: float, number: float) -> bool:
    return share > 0 and beta.cdf(TARGET, number * share, number * (1 - share) + 1) <= 1 - CONFIDENCE


BOUNDS = (ours, hoeffding_bentkus, t_test, clopper_pearson, korn_graubard)


def main() -> None:
    """Print the share of repetitions in which each bound promises the recall."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(f"| objects | correlation | images | true recall | {' | '.join(one.__name__ for one in BOUNDS)} |")
    print(f"|{'---|' * (4 + len(BOUNDS))}")
    for recall, correlations in ((TARGET, (0, 0.2, 1)), (0.95, (0.1,)), (0.98, (0.1,))):
        for name, draw in COUNTS.items():
            for correlation in correlations:
                for num_images in (50, 100, 250):
                    rng, promised = np.random.default_rng(0), np.zeros(len(BOUNDS))
                    for _ in range(repetitions):
                        counts = draw(rng, num_images)
                        found = found_objects(rng, counts, recall, correlation)
                        promised += [bound(found, counts) for bound in BOUNDS]
                    shares = " | ".join(f"{share:.3f}" for share in promised / repetitions)
                    print(f"| {name} | {correlation} | {num_images} | {recall} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
