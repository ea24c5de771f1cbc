"""Find the labels of a dataset that are probably wrong, from the detections of a model.

A model that has not seen the labels disagrees with some of them: it detects what is not annotated, does not detect what
is annotated, detects another class, or draws another mask. ObjectLab (https://arxiv.org/abs/2309.00832) scores such
disagreements object by object. Here, each is also weighted by how rare it is among the objects that are alike, as
confident learning (https://arxiv.org/abs/1911.00068) does with classes: that a model misses a small car says little if
it misses every tenth. The evidence is, for p = min(1, 0.05 / fraction of such objects with at least this value):

* missing: the score of a detection that overlaps no object, lies outside of crowds and of objects of its class;
* superfluous: p (1 - s), s the highest score of a detection that overlaps the object;
* wrong class: p s' (1 - s), s' and s the highest scores of detections of the object, of other classes and of its own;
* sloppy mask: p s / (1 + exp(4 - z)), s the score of the detection of its class, and z how far its IoU is below that
  of other objects of this class and size, in robust standard deviations.

Axis letters: N objects and K detections of an image, M objects of all images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from ..data.dataset import InstanceDataset
from ..inference.instances import Instances
from .coco_evaluator import InstanceSegmentationEvaluator
from .error_analysis import pairwise_ious, to_instances

KINDS = ("missing", "superfluous", "wrong class", "sloppy mask")
MIN_SCORE = 0.02  # of the detections that are compared; an object that none of them overlaps is not there
MIN_RECALL = 0.5  # below it, most suspects are errors of the model; measured in benchmarks/MORE_RESULTS.md
_SURE = 0.5  # score above which an object is found
_MIN_IOU = 0.5  # of a detection and the object that it is a detection of
_MIN_OVERLAP = 0.1  # IoU from which a detection is of the object, with another mask
_SHARE = 0.05  # of labels that are assumed to be wrong in each way, if nothing else is known
_MIN_GROUP = 30  # objects of a class from which sizes are told apart
_MIN_SPREAD, _FAR = 0.03, 4.0  # of IoUs; in how many spreads below the usual IoU a mask is as likely sloppy as not


@dataclass(frozen=True)
class Suspect:
    """A label that is probably wrong.

    Attributes:
        kind: "missing" (a detection where nothing is annotated), "superfluous" (an object where nothing is detected),
            "wrong class" or "sloppy mask" (a detection of its class has another mask).
        evidence: In [0, 1], comparable between the kinds.
        image: Index of the [`AuditedImage`].
        object: Index of the object in its image, or None if it is missing.
        detection: Index of the detection that speaks against the label, or None if it is superfluous.
        class_name: The annotated class, or None if the object is missing.
        suggestion: The detected class, or None if it is superfluous.
        score: Score of the detection, or the highest of any that overlaps a superfluous object.
        iou: IoU of object and detection, or 0.
        usual_iou: Median IoU of objects of this class and size with their detections; 0 if the mask is not suspected.
    """

    kind: str
    evidence: float
    image: int
    object: int | None
    detection: int | None
    class_name: str | None
    suggestion: str | None
    score: float
    iou: float = 0.0
    usual_iou: float = 0.0


@dataclass(frozen=True)
class AuditedImage:
    """The objects and the detections of an image.

    Attributes:
        index: Index of the image in the dataset.
        name: File name, or the image id if there is none.
        objects: N objects and crowd regions.
        is_crowd: (N,) bool
        annotation_ids: N annotation ids.
        detections: K detections with a score above MIN_SCORE and a mask that is not empty, best first.
    """

    index: int
    name: str
    objects: Instances
    is_crowd: np.ndarray
    annotation_ids: list[int]
    detections: Instances


class Support(NamedTuple):
    """What the detections of an image say about its N objects. Scores are 0 and indices -1 where there is none."""

    any_score: np.ndarray  # (N,), highest score of a detection that overlaps the object
    same_score: np.ndarray  # (N,), highest score of a detection of the object with its class
    other_score: np.ndarray  # (N,), the same with another class
    other: np.ndarray  # (N,) int64, index of that detection
    fit_iou: np.ndarray  # (N,), IoU with the detection of its class that fits best, weighted by the score
    fit_score: np.ndarray  # (N,), score of that detection
    fit: np.ndarray  # (N,) int64, index of that detection
    is_new: np.ndarray  # (K,) bool, detections of something that is not annotated


def audited_images(evaluator: InstanceSegmentationEvaluator, dataset: InstanceDataset) -> list[AuditedImage]:
    """Return the images of a dataset with the detections that an evaluator of it has."""
    annotation_ids: dict[int, list[int]] = {image_id: [] for image_id in evaluator.ground_truth.sizes}
    for annotation in dataset.coco()["annotations"]:
        if annotation.get("bbox") is not None:  # others are no objects of the evaluator
            annotation_ids[annotation["image_id"]].append(annotation["id"])
    images = []
    names = dataset.names_of(list(annotation_ids))
    state = evaluator.state()
    for index, (image_id, name) in enumerate(zip(annotation_ids, names, strict=True)):
        record, found = evaluator.ground_truth.objects_of(image_id), state[image_id]
        objects = to_instances(record, np.arange(len(record.labels)), image_id, evaluator)
        detections = to_instances(found, np.flatnonzero(found.scores > MIN_SCORE), image_id, evaluator)
        detections = detections.select(detections.areas > 0)  # an empty mask would overlap nothing, and be missing
        images.append(AuditedImage(index, name, objects, record.is_crowd, annotation_ids[image_id], detections))
    return images


def support_of(image: AuditedImage) -> Support:
    """Compare the detections of an image with its objects."""
    objects, detections = image.objects, image.detections
    scores: np.ndarray = detections.scores.astype(np.float64)
    is_object = ~image.is_crowd
    ious = pairwise_ious(detections, objects, np.zeros(len(objects), bool)) * is_object
    shares = pairwise_ious(detections, objects, np.ones(len(objects), bool))  # of a detection inside an object
    same_class = detections.labels[:, None] == objects.labels
    any_score, _ = _best(scores[:, None], ious >= _MIN_OVERLAP)
    same_score, _ = _best(scores[:, None], (ious >= _MIN_IOU) & same_class)
    other_score, other = _best(scores[:, None], (ious >= _MIN_IOU) & ~same_class)
    # A detection may overlap several objects of its class; it draws the mask of the one that it fits best.
    is_closest = ious == (ious * same_class).max(1, keepdims=True, initial=0)
    weighted, fit = _best(scores[:, None] * ious, (ious >= _MIN_OVERLAP) & same_class & is_closest)
    fit_score = np.where(fit >= 0, np.append(scores, 0)[fit], 0)
    fit_iou = np.divide(weighted, fit_score, out=np.zeros(len(objects)), where=fit >= 0)
    is_known = _is_of(ious, shares, same_class, image.is_crowd)
    is_new = _without_duplicates(detections, ~np.any(is_known, axis=1))
    return Support(any_score, same_score, other_score, other, fit_iou, fit_score, fit, is_new)


def recall_of(images: Sequence[AuditedImage]) -> float | None:
    """Return the fraction of the objects that are found, or None if there are no objects.

    An object is found if a detection of its class has a score above 0.5 and an IoU with it of at least 0.5.
    """
    is_found = [support_of(image).same_score[~image.is_crowd] > _SURE for image in images]
    flat = np.concatenate(is_found) if is_found else np.zeros(0, bool)
    return float(flat.mean()) if len(flat) else None


def _best(values: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest value of an allowed detection, and its index, for each object.

    values (K, 1) or (K, N)   allowed (K, N)   ->   values, 0 if there is none (N,)   indices or -1 (N,)
    """
    candidates = np.where(allowed, values, 0.0)
    if not candidates.size:
        return np.zeros(allowed.shape[1]), np.full(allowed.shape[1], -1)
    highest = candidates.max(0)
    return highest, np.where(highest > 0, candidates.argmax(0), -1)


def _is_of(ious: np.ndarray, shares: np.ndarray, same_class: np.ndarray, is_crowd: np.ndarray | bool) -> np.ndarray:
    """Return which of K detections are of which of N objects, or of a part of it: (K, N) bool.

    ious, shares of the detection inside the object, same_class (K, N)   is_crowd (N,)
    """
    result: np.ndarray = (ious >= _MIN_OVERLAP) | ((shares >= _MIN_IOU) & (same_class | is_crowd))
    return result


def _without_duplicates(detections: Instances, is_candidate: np.ndarray) -> np.ndarray:
    """Return which candidates (K,) bool are not detections of what a better candidate has found."""
    indices = np.flatnonzero(is_candidate)
    candidates = detections.select(indices)
    ious, shares = (pairwise_ious(candidates, candidates, np.full(len(candidates), crowd)) for crowd in (False, True))
    is_same = _is_of(ious, shares, candidates.labels[:, None] == candidates.labels, is_crowd=False)
    kept: list[int] = []
    for candidate in range(len(candidates)):  # best first
        if not is_same[candidate, kept].any():
            kept.append(candidate)
    result: np.ndarray = np.zeros(len(is_candidate), bool)
    result[indices[kept]] = True
    return result


def group_objects(labels: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Return the number of the group of each object (M,): its class, and a third of it by area if it has many."""
    groups: np.ndarray = 3 * labels
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) >= 3 * _MIN_GROUP:
            groups[members] += np.searchsorted(np.quantile(areas[members], [1 / 3, 2 / 3]), areas[members])
    return groups


def rarity(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return how probable it is that a value is as high because the label is wrong, in (0, 1].

    It is 1 for the highest values of a group, up to the share of labels that are assumed to be wrong, and falls with
    the number of values in the group that are as high: share / fraction.

    Args:
        values: (M,)
        groups: (M,) group of each value.
    """
    result = np.ones(len(values))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        ordered = np.sort(values[members])
        num_as_high = len(members) - np.searchsorted(ordered, values[members])
        result[members] = np.minimum(1, max(_SHARE * len(members), 1) / num_as_high)
    return result


def usual_ious(ious: np.ndarray, is_sure: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median IoU of the sure detections in the group of each object (M,), and their spread (M,).

    The spread is the median deviation from the median, times 1.4826 as for a normal distribution.
    """
    medians, spreads = np.zeros(len(ious)), np.full(len(ious), np.inf)
    for group in np.unique(groups):
        members = groups == group
        sure = ious[members & is_sure]
        if len(sure):
            medians[members] = median = np.median(sure)
            spreads[members] = max(1.4826 * np.median(np.abs(sure - median)), _MIN_SPREAD)
    return medians, spreads


def find_suspects(images: Sequence[AuditedImage], min_evidence: float = 0.5) -> list[Suspect]:
    """Return the labels that are probably wrong, with the most evidence first; at most one for each object."""
    supports = [support_of(image) for image in images]
    found = [*_suspect_objects(images, supports), *_suspect_detections(images, supports)]
    return sorted((one for one in found if one.evidence >= min_evidence), key=lambda one: -one.evidence)


def _suspect_objects(images: Sequence[AuditedImage], supports: Sequence[Support]) -> Iterator[Suspect]:
    """Yield each object, with the kind of error that most speaks for."""
    places = [(number, index) for number, image in enumerate(images) for index in np.flatnonzero(~image.is_crowd)]
    if not places:
        return
    labels = np.array([images[number].objects.labels[index] for number, index in places])
    areas = np.concatenate([image.objects.areas[~image.is_crowd] for image in images])
    of_all = [[getattr(supports[number], name)[index] for number, index in places] for name in Support._fields[:-1]]
    any_score, same_score, other_score, other, fit_iou, fit_score, fit = map(np.array, of_all)
    groups = group_objects(labels, areas)
    usual, spread = usual_ious(fit_iou, fit_score > _SURE, groups)
    distance = (usual - fit_iou) / spread
    evidence = np.stack(
        [
            (1 - any_score) * rarity(1 - any_score, groups),
            other_score * (1 - same_score),
            fit_score * expit(distance - _FAR),
        ]
    )
    evidence[1] *= rarity(evidence[1], np.zeros(len(places), np.int64))
    evidence[2] *= rarity(evidence[2], labels)
    kinds = evidence.argmax(0)
    for position, (number, index) in enumerate(places):
        image, most = images[number], float(evidence[kinds[position], position])
        name = image.objects.names[index]
        if kinds[position] == 0:
            yield Suspect("superfluous", most, number, int(index), None, name, None, float(any_score[position]))
        elif kinds[position] == 1:
            found = int(other[position])
            suggestion = image.detections.names[found] if found >= 0 else None
            score = float(other_score[position])
            yield Suspect("wrong class", most, number, int(index), found, name, suggestion, score)
        else:
            ious = {"iou": float(fit_iou[position]), "usual_iou": float(usual[position])}
            found, score = int(fit[position]), float(fit_score[position])
            yield Suspect("sloppy mask", most, number, int(index), found, name, name, score, **ious)


def _suspect_detections(images: Sequence[AuditedImage], supports: Sequence[Support]) -> Iterator[Suspect]:
    """Yield each detection of something that is not annotated. Its score is the evidence, even if there are many."""
    for number, (image, support) in enumerate(zip(images, supports, strict=True)):
        for index in np.flatnonzero(support.is_new).tolist():
            score = float(image.detections.scores[index])
            yield Suspect("missing", score, number, None, index, None, image.detections.names[index], score)
