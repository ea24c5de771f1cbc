"""The section of the page that says why objects were missed, and what helps. C classes; sizes are COCO's."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...inference.predict import WEAK_SCORE
from ..error_analysis import Analysis, ImageQuality
from ..missed_objects import Problem, count_reasons, size_indices
from .cards import object_card

_MAX_EXAMPLES = 3
_MAX_CLASSES = 20
_MAX_QUERY_FACTOR = 4  # beyond it, more queries cost more than they find
_MEANINGS = {
    "no proposal": "No box of the first stage, at any position, had an IoU of at least 0.5 with the object.",
    "proposal not selected": "The first stage had a box near the object, but its score was not among the best, which"
    " become queries.",
    "lost in the decoder": "A query started near the object, but there was no detection of its class with a score"
    " above {floor}.",
    "not detected": "No detection of its class with a score above {floor} was near the object.",
    "below the threshold": "The detection was accurate, but its score was not above {threshold}.",
    "other class": "The best detection had another class.",
    "inaccurate box": "The best detection had a box with an IoU of 0.1 to 0.5.",
    "wrong mask": "The box was accurate, but the IoU of the masks was below 0.5.",
    "mask grid too coarse": "The box was accurate, but the model's mask grid cannot hold the shape of the object: the"
    " object itself, stored on it, has an IoU below 0.5.",
    "found twice": "The object was found, but a second detection of its class, a duplicate, has an IoU of at least 0.5"
    " too.",
}
_ADVICE = {
    "no proposal": "Use a higher resolution or tiles if these objects are small in the image; otherwise train with more"
    " of them.",
    "lost in the decoder": "Train longer, or with more images like these; label objects that touch or overlap"
    " consistently.",
    "not detected": "Evaluate the PyTorch model itself, not an exported file or a compiled copy, to see which stage"
    " lost them.",
    "other class": "Check the labels of the classes that the confusion matrix mixes up, and add images of the rarer"
    " one.",
    "inaccurate box": "Look whether one detection covers several objects or a part of one: label touching objects"
    " consistently, and use a higher resolution if they are small.",
    "wrong mask": "Compare the annotated outlines with the images; if they are right, train longer or with a higher"
    " resolution.",
    "mask grid too coarse": "Use a higher resolution or tiles: a cell of the mask grid is 4 x 4 pixels of the model's"
    " input.",
    "found twice": "Train longer, and check that no object is annotated twice; a higher threshold removes the weaker"
    " duplicates.",
}


def missed_section(analysis: Analysis, dataset: Any) -> dict[str, Any] | None:
    """Return what the section shows, or None if every object was found once."""
    objects = [(image, index) for image in analysis.images for index in range(len(image.objects))]
    objects = [(image, index) for image, index in objects if image.object_outcomes[index] != "crowd"]
    labels = np.array([image.objects.labels[index] for image, index in objects], np.int64)
    areas_of = {id(image): image.objects.areas for image in analysis.images}
    areas = np.array([areas_of[id(image)][index] for image, index in objects])
    problems = [image.problems[index] for image, index in objects]
    counts = count_reasons(problems, labels, areas, len(analysis.class_names))
    if not counts:
        return None
    largest = np.argsort(-areas, kind="stable").tolist()
    examples = {
        reason: _select_examples([objects[number] for number in largest if _is(problems[number], reason)])
        for reason in counts
    }
    cards = _cards(examples, dataset)
    floor = max(WEAK_SCORE, analysis.score_threshold or 0.0)
    limits = {"floor": f"{floor:g}", "threshold": analysis.limit}
    return {
        "reasons": [
            {
                "name": reason,
                "counts": [table.sum(), *table.sum(0)],
                "meaning": _MEANINGS[reason].format(**limits),
                "advice": advise(reason, [one for one in problems if _is(one, reason)], analysis.num_selected),
                "cards": cards[reason],
            }
            for reason, table in counts.items()
        ],
        "num_objects": [len(objects), *np.bincount(size_indices(areas), minlength=3)],
        **_class_table(counts, labels, analysis.class_names),
    }


def advise(reason: str, problems: Sequence[Problem | None], num_selected: int | None) -> str:
    """Return one sentence about what helps against a reason for which all `problems` stand."""
    values = sorted(problem.value for problem in problems if problem is not None and problem.value is not None)
    if reason == "below the threshold":
        middle = values[len(values) // 2]
        return (
            f"Lower the threshold, at the cost of false detections: half of these scores are at least {middle:.2f}, the"
            f" highest is {values[-1]:.2f}."
        )
    if reason == "proposal not selected":
        assert num_selected is not None
        return _advise_on_ranks(values, num_selected)
    return _ADVICE[reason]


def _advise_on_ranks(ranks: Sequence[float], num_selected: int) -> str:
    """Return what helps objects whose proposals, the best first, have these positions, in ascending order."""
    near = [rank for rank in ranks if rank < _MAX_QUERY_FACTOR * num_selected]
    if not near:
        return (
            f"Train longer: the boxes near these objects are not among the {_MAX_QUERY_FACTOR * num_selected} best,"
            f" and {num_selected} are used."
        )
    wanted = 10 * math.ceil((near[math.ceil(0.9 * len(near)) - 1] + 1) / 10)
    num_reached = sum(rank < wanted for rank in near)
    rest = "" if len(near) == len(ranks) else " For the others, train longer."
    return (
        f"Use more queries, or tiles: num_queries={wanted} instead of {num_selected}, and fine-tuning, would give"
        f" {num_reached} of these {len(ranks)} objects a query near them.{rest}"
    )


def _is(problem: Problem | None, reason: str) -> bool:
    return problem is not None and problem.reason == reason


def _select_examples(objects: Sequence[tuple[ImageQuality, int]]) -> list[tuple[ImageQuality, int]]:
    """Select the largest objects, from different images where possible."""
    first = {id(image): number for number, (image, _) in reversed(list(enumerate(objects)))}
    chosen = sorted(range(len(objects)), key=lambda number: (first[id(objects[number][0])] != number, number))
    return [objects[number] for number in chosen[:_MAX_EXAMPLES]]


def _cards(examples: dict[str, list[tuple[ImageQuality, int]]], dataset: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the cards of the examples; each image is read once."""
    photos: dict[int, Any] = {}
    for objects in examples.values():
        for image, _ in objects:
            photos.setdefault(image.index, None)
    cards: dict[tuple[int, int], dict[str, Any]] = {}
    for photo_index in photos:
        photo = dataset[photo_index]["image"]
        for objects in examples.values():
            for image, index in objects:
                if image.index == photo_index:
                    cards[photo_index, index] = object_card(image, index, photo)
    return {reason: [cards[image.index, index] for image, index in objects] for reason, objects in examples.items()}


def _class_table(counts: dict[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the rows of the classes that have problems, those with the most first."""
    table = np.stack([of_classes.sum(1) for of_classes in counts.values()], axis=1)
    num_objects = np.bincount(labels, minlength=len(class_names))
    with_problems = np.flatnonzero(table.any(1))
    order = with_problems[np.argsort(-table[with_problems].sum(1), kind="stable")]
    rows = [(class_names[label], int(num_objects[label]), table[label].tolist()) for label in order[:_MAX_CLASSES]]
    return {"class_rows": rows, "num_omitted": max(0, len(order) - _MAX_CLASSES)}
