"""Split a dataset into training, validation and test images that have nothing in common.

Images of one group (copies of each other, crops of one scene, or what the caller says) stay in one part, and every
class is distributed over the parts by iterative stratification (Sechidis et al. 2011,
https://doi.org/10.1007/978-3-642-23808-6_10). Axis letters: N images, M groups, P parts, C classes.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch.utils.data import Subset
from transformers.utils import logging

from ..model.validation import is_integer, is_number, require
from .checks.duplicates import do_crops_overlap, find_similar, perceptual_hash, place_of_crop
from .dataset import InstanceDataset, InstanceDatasets, as_instance_dataset

logger = logging.get_logger(__name__)

Grouping = str | Sequence[Any] | None


def split_dataset(
    dataset: Any, *, validation: float = 0.2, test: float = 0.0, seed: int = 0, by: Grouping = "auto"
) -> InstanceDatasets:
    """Split a dataset into the splits train, validation and, if `test` is above 0, test.

    A class that lies in at least as many groups as there are splits is in each of them. A warning names the others.

    Example:
        >>> from transformers_rfdetr import InstanceDataset, split_dataset
        >>> from transformers_rfdetr.data.synthetic import draw_dataset
        >>> images, coco = draw_dataset(10)
        >>> {name: len(split) for name, split in split_dataset(InstanceDataset(coco, images)).items()}
        {'train': 8, 'validation': 2}

    Args:
        dataset: An [`InstanceDataset`], such as one split of what `load_instance_dataset` returns.
        validation: Fraction of the images in the validation split, in [0, 1).
        test: Fraction of the images in the test split, in [0, 1).
        seed: Seed of the random choices.
        by: What keeps images together. "auto": they look the same, or their names are those of overlapping crops or of
            versions of one scene. A regular expression: its first group, or all that it matches, is equal in their
            names, such as "^(patient[0-9]+)". A sequence with one value for each image: it is equal. None: nothing.

    Raises:
        ValueError: a fraction is out of its range, a split would be empty, `by` does not fit the images, or an image
            cannot be read.
    """
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    for name in ("validation", "test"):
        require(is_number(shares[name]) and 0 <= shares[name] < 1, name, shares[name], "a fraction in [0, 1)")
    require(shares["train"] > 0, "validation + test", validation + test, "below 1", "Leave images to train on.")
    shares = {name: share for name, share in shares.items() if share > 0}
    dataset = _as_dataset(dataset)
    parts = _distribute(dataset, list(shares.values()), seed, by)
    if empty := [name for name, part in zip(shares, parts, strict=True) if not len(part)]:
        raise ValueError(f"`dataset` must have images for each split, got none for {', '.join(empty)}. Add images.")
    splits = InstanceDatasets({name: _select(dataset, part) for name, part in zip(shares, parts, strict=True)})
    for label, in_all in dataset.counts().items():
        lacking = [name for name, split in splits.items() if in_all.images and not split.counts()[label].images]
        if lacking:
            logger.warning(
                f"No object of {dataset.id2label[label]} is in {', '.join(lacking)}: too few groups of images have one."
                " Annotate more."
            )
    return splits


def folds(dataset: Any, count: int = 5, *, seed: int = 0, by: Grouping = "auto") -> list[InstanceDatasets]:
    """Return `count` pairs of the splits train and validation; each image is in the validation split of one pair.

    Args:
        dataset: An [`InstanceDataset`].
        count: Number of folds, at least 2.
        seed: Seed of the random choices.
        by: What keeps images together; see [`split_dataset`].

    Raises:
        ValueError: `count` is below 2 or above the number of groups, `by` does not fit the images, or an image cannot
            be read.
    """
    dataset = _as_dataset(dataset)
    parts = fold_indices(dataset, count, seed=seed, by=by)
    return [
        InstanceDatasets(
            {
                "train": _select(dataset, np.sort(np.concatenate([*parts[:number], *parts[number + 1 :]]))),
                "validation": _select(dataset, parts[number]),
            }
        )
        for number in range(count)
    ]


def fold_indices(dataset: Any, count: int = 5, *, seed: int = 0, by: Grouping = "auto") -> list[np.ndarray]:
    """Return the indices of the images in the validation split of each of [`folds`], ascending."""
    require(is_integer(count) and count >= 2, "count", count, "an integer of at least 2")
    parts = _distribute(_as_dataset(dataset), [1 / count] * count, seed, by)
    require(all(map(len, parts)), "count", count, "at most the number of groups of images", "Use fewer folds.")
    return parts


def _as_dataset(dataset: Any) -> InstanceDataset:
    dataset = as_instance_dataset(dataset)
    rule = "an InstanceDataset, such as load_instance_dataset(...)['train']"
    require(isinstance(dataset, InstanceDataset), "dataset", dataset, rule)
    return dataset


def _select(dataset: InstanceDataset, indices: np.ndarray) -> InstanceDataset:
    return as_instance_dataset(Subset(dataset, indices.tolist()))


def _distribute(dataset: InstanceDataset, shares: Sequence[float], seed: int, by: Grouping) -> list[np.ndarray]:
    """Return the indices of the images of each part, ascending."""
    groups = group_images(dataset, by)
    in_image = dataset.classes_of_images()
    in_group: np.ndarray = np.zeros((groups.max(initial=-1) + 1, in_image.shape[1]), np.int64)
    np.add.at(in_group, groups, in_image)
    part_of_group = stratify(in_group, np.bincount(groups), np.array(shares), np.random.default_rng(seed))
    return [np.flatnonzero(part_of_group[groups] == part) for part in range(len(shares))]


def stratify(in_group: np.ndarray, sizes: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Assign groups to parts, such that each part has its share of the images of every class.

    The class in the fewest groups that are left comes first; each group that has it goes to the part that lacks most
    images of the class, or else most images.

    in_group (M, C), images with each class   sizes (M,), images   shares (P,)   ->   part of each group (M,)
    """
    order = rng.permutation(len(sizes))
    has_class = in_group > 0
    lacking = shares[:, None] * in_group.sum(0)  # (P, C)
    is_wide = has_class.sum(0) >= len(shares)  # a class that can be in every part
    lacking[:, is_wide] = np.maximum(lacking[:, is_wide], 1)
    lacking_images = shares * sizes.sum()
    part_of_group: np.ndarray = np.full(len(sizes), -1)

    def assign(group: int, wanted: np.ndarray) -> None:
        best = np.flatnonzero(wanted >= wanted.max() - 1e-9)
        part = best[lacking_images[best].argmax()]
        part_of_group[group] = part
        lacking[part] -= in_group[group]
        lacking_images[part] -= sizes[group]

    while (is_left := part_of_group < 0).any():
        num_left = has_class[is_left].sum(0)
        if not num_left.any():
            for group in order[is_left[order]]:
                assign(group, lacking_images)
            break
        rarest = np.where(num_left > 0, num_left, len(sizes) + 1).argmin()
        members = order[(is_left & has_class[:, rarest])[order]]
        for group in members[np.argsort(-in_group[members, rarest], kind="stable")]:
            assign(group, lacking[:, rarest])
    return part_of_group


def group_images(dataset: InstanceDataset, by: Grouping) -> np.ndarray:
    """Return the number of the group of each image, (N,) from 0; see [`split_dataset`]."""
    if by is None:
        return np.arange(len(dataset))
    if by == "auto":
        return _group_by_content(dataset)
    if isinstance(by, str):
        values: Sequence[Any] = [_match(by, name) for name in dataset.names_of(dataset.image_ids())]
    else:
        values = list(by)
        require(
            len(values) == len(dataset), "by", f"{len(values)} values", f"one value for each of {len(dataset)} images"
        )
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def _match(pattern: str, name: str) -> str:
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise ValueError(f"`by` must be a regular expression, got {pattern!r}: {error}. Correct it.") from error
    if match is None:
        raise ValueError(f"`by` must match the name of every image, got {pattern!r} for {name!r}. Widen the pattern.")
    return match[1] if match.re.groups else match[0]


def _group_by_content(dataset: InstanceDataset) -> np.ndarray:
    """Join images that look the same, and those whose names are crops that overlap or versions of one scene."""
    pairs: list[tuple[int, int]] = []
    hashes: list[tuple[int, int]] = []
    crops: dict[str, list[tuple[int, tuple[int, int]]]] = defaultdict(list)
    names = dataset.names_of(dataset.image_ids())
    for index, name in enumerate(logging.tqdm(names, desc="Comparing images", delay=2)):
        image = dataset[index]["image"]
        if (bits := perceptual_hash(image)) is not None:
            hashes.append((index, bits))
        if crop := place_of_crop(name):
            scene, place = crop
            places = np.array([there for _, there in crops[scene]]).reshape(-1, 2)
            overlapping = np.flatnonzero(do_crops_overlap(places, place, (image.height, image.width)))
            pairs += [(index, crops[scene][other][0]) for other in overlapping]
            crops[scene].append((index, place))
    bits = np.array([number for _, number in hashes], np.uint64)
    pairs += [(hashes[a][0], hashes[b][0]) for a, b in find_similar(bits)]
    rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(dataset), len(dataset)))
    return connected_components(graph, directed=False)[1]
