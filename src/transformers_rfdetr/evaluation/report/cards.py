"""Photos on the page, with the outlines of objects and detections over them. Sizes are (height, width)."""

from collections.abc import Sequence
from typing import Any

import PIL.Image

from ...inference.instances import Instances
from ..error_analysis import ImageQuality
from .crops import crop_instances, indices_inside, window_around
from .outlines import outline
from .page import to_data_uri

_LONGEST_SIDE = 640  # of an image on the page, in pixels
_LONGEST_CROP = 320  # of an example on the page, in pixels


def num_objects(image: ImageQuality) -> int:
    """Return the number of objects that are not crowd regions."""
    return len(image.objects) - image.object_outcomes.count("crowd")


def image_card(image: ImageQuality, dataset: Any) -> dict[str, Any]:
    """Return what the page shows of an image: the photo, and the outlines of objects and detections."""
    photo = dataset[image.index]["image"].convert("RGB")
    photo.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    size = (photo.height, photo.width)
    object_words, detection_words = _titles(image)
    truth = _layer(image.objects, image.object_outcomes, object_words, size)
    prediction = _layer(image.detections, image.detection_outcomes, detection_words, size)
    return {"image": image, "num_objects": num_objects(image), **_card(photo, truth, prediction)}


def object_card(image: ImageQuality, index: int, photo: PIL.Image.Image) -> dict[str, Any]:
    """Return what the page shows of an object with a problem: the photo around it, it and the detections there.

    Args:
        image: The image of the object.
        index: Index of the object, whose problem is not None.
        photo: The image.
    """
    object_words, detection_words = _titles(image)
    problem, window = image.problems[index], window_around(image.objects.boxes[[index]], image.objects.image_size)
    width, height = window[2] - window[0], window[3] - window[1]
    scale = _LONGEST_CROP / max(width, height)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    crop = photo.convert("RGB").crop(window).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    one = crop_instances(image.objects.select([index]), window)
    truth = _layer(one, [image.object_outcomes[index]], [object_words[index]], size)
    shown = indices_inside(image.detections, window)
    outcomes = [image.detection_outcomes[detection] for detection in shown]
    words = [detection_words[detection] for detection in shown]
    prediction = _layer(crop_instances(image.detections.select(shown), window), outcomes, words, size)
    prediction.sort(key=lambda path: path[0] == "duplicate")  # on top of the detection of the same object
    if problem.detection is not None and problem.detection.scores[0] not in image.detections.scores:
        weak = crop_instances(problem.detection, window)
        prediction += _layer(weak, ["weak"], [f"score {weak.scores[0]:.2f}, below the threshold"], size)
    return {"name": image.name, "object": image.objects.names[index], "problem": problem} | _card(
        crop, truth, prediction
    )


def _card(photo: PIL.Image.Image, truth: list[Any], prediction: list[Any]) -> dict[str, Any]:
    layers = {"truth": truth, "prediction": prediction}
    return {"width": photo.width, "height": photo.height, "photo": to_data_uri(photo), "layers": layers}


def _titles(image: ImageQuality) -> tuple[list[str], list[str]]:
    """Return the words about each object and each detection that the page shows beside its class."""
    objects, detections = image.objects, image.detections
    object_words, detection_words = list(image.object_outcomes), list(image.detection_outcomes)
    for index, (outcome, problem) in enumerate(zip(image.object_outcomes, image.problems, strict=True)):
        if outcome == "missed" and problem is not None:
            object_words[index] = f"missed: {problem}"
    for index, matched in enumerate(image.matches):
        if image.detection_outcomes[index] == "other class":
            object_words[matched] = f"found as {detections.names[index]}"
            detection_words[index] = f"annotated as {objects.names[matched]}"
        if matched >= 0:
            detection_words[index] += f", IoU {image.ious[index]:.2f}"
    return object_words, [
        f"score {score:.2f}, {words}" for score, words in zip(detections.scores, detection_words, strict=True)
    ]


def _layer(
    instances: Instances, outcomes: Sequence[str], words: Sequence[str], size: tuple[int, int]
) -> list[tuple[str, str, str]]:
    """Return outcome, path and title of each instance; the first, which is the best, comes last and is on top."""
    return [
        (outcomes[index], outline(instances, index, size), f"{instances.names[index]}, {words[index]}")
        for index in reversed(range(len(instances)))
    ]
