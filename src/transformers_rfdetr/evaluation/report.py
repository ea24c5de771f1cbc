"""Where a model is right and wrong on a dataset: numbers, curves, its worst images, and one page of all that.

Axis letters: C classes of the dataset, T IoU thresholds, R recalls, N objects and K detections of an image, H W its
pixels, V points of an outline. Boxes are boxes_xyxy in pixels, places on the page x, y.

The page is one file that loads nothing: its images are inside, its only script is the one that its policy names by
hash, and every text that comes from data or a checkpoint is escaped.
"""

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ..atomic_files import write_text
from ..inference.instances import Instances
from ..model.masks import box_and_area, rasterize, read_segmentation, to_rle
from .coco_evaluator import InstanceSegmentationEvaluator
from .curves import Chart, draw_svg, precision_recall_charts, training_charts
from .evaluation_loop import detect_in_dataset

_MIN_IOU = 0.5  # of a detection and its object
_LONGEST_SIDE = 640  # of an image on the page, in pixels
_MOST_JPEG_BYTES, _QUALITIES = 100_000, (85, 70, 50, 30, 15)
# Of an outline: pixels of the page's image that it may be beside the mask, and what makes it too long to be drawn.
_TOLERANCE, _MOST_EDGES, _MOST_CHARACTERS = 0.75, 4_000, 6_000
_MOST_CONFUSED = 20  # classes that the confusion matrix shows
_AT = {0.5: 0, 0.75: 5}  # IoU -> its place among COCO's thresholds


@dataclass
class ImageQuality:
    """The objects of one image beside what was found in it.

    A detection that scores above `min_score` takes, best first, the free object of its class with the highest IoU, if
    that is at least 0.5. Those that take none, and are not in a crowd of their class, then take what is left of objects
    of other classes.

    Attributes:
        index: Its number in the dataset.
        name: Its file name, or its image id where there is none.
        quality: In [0, 1], panoptic quality: the IoUs of the right detections, summed, over their number + half the
            number of all other detections and objects. 1 where there is nothing and nothing is found.
        truth: N objects, crowds too, their scores 1. One that has a box only, where others have masks, is its box.
        found: K detections.
        truth_outcomes: N times "found", "other class", "missed" or "crowd".
        found_outcomes: K times "right", "other class", "false" or "in a crowd".
        ious: (K,) float64, of each detection with the object that it takes, 0 where it takes none.
    """

    index: int
    name: str
    quality: float
    truth: Instances
    found: Instances
    truth_outcomes: list[str]
    found_outcomes: list[str]
    ious: np.ndarray

    @property
    def num_errors(self) -> int:
        """Objects that were not found and detections that are not right."""
        return sum(map(self.truth_outcomes.count, ("other class", "missed"))) + sum(
            map(self.found_outcomes.count, ("other class", "false"))
        )


@dataclass
class Analysis:
    """What [`analyse`] finds out.

    Attributes:
        metrics: The numbers of [`metrics.evaluate_instance_segmentation`].
        class_names: C names.
        curves: Class -> precision (T, R), as [`metrics.InstanceSegmentationEvaluator.precision_curves`] has it; only of
            classes that have an object.
        confusion: (C + 1, C + 1) int64: how many objects of the row's class were found as the column's. The last column
            counts objects that were missed, the last row detections that are false.
        images: One for each image, the worst first.
        min_score: What a detection had to exceed to count in `confusion` and `images`.
        score_threshold: What it had to exceed to count at all; None for nothing, as in COCO.
    """

    metrics: dict[str, Any]
    class_names: list[str]
    curves: dict[str, np.ndarray]
    confusion: np.ndarray
    images: list[ImageQuality]
    min_score: float
    score_threshold: float | None = None


def analyse(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    min_score: float = 0.5,
    score_threshold: float | None = None,
    progress: bool = True,
) -> Analysis:
    """Evaluate a model on a dataset and keep, of every image, what is right and wrong.

    Args:
        model: For instance segmentation, or for object detection, whose boxes are compared.
        processor: Its image processor.
        dataset: An `InstanceDataset`.
        batch_size: Images at a time.
        min_score: Detections above it, in [0, 1], are compared with the objects of their image.
        score_threshold: What detections must exceed to count in `metrics` and `curves`; by default all do, as in COCO.
        progress: Show a progress bar.

    Raises:
        ValueError: the model does not know a category of the dataset, or `min_score` is no score.
    """
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score {min_score} is no score in [0, 1]; 0.5 is usual")
    evaluator = InstanceSegmentationEvaluator(dataset.coco())
    names = list(evaluator.category_names.values())
    label_of = {category: label for label, category in enumerate(evaluator.category_names)}
    confusion: np.ndarray = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    images = []
    found_in = detect_in_dataset(
        model, processor, dataset, batch_size=batch_size, score_threshold=score_threshold, progress=progress
    )
    with closing(found_in):
        for index, (sample, found) in enumerate(found_in):
            evaluator.update(sample["image_id"], **found)
            size = (sample["image"].height, sample["image"].width)
            has_masks = evaluator.ground_truth_has_masks and found["masks"] is not None
            categories = [dataset.category_ids[one["category_id"]] for one in sample["annotations"]]
            truth, is_crowd = _read_truth(sample["annotations"], [label_of[one] for one in categories], size, has_masks)
            detections = _sure_ones(found, min_score, label_of, size, has_masks)
            for instances in (truth, detections):
                instances.names = [names[label] for label in instances.labels]
            name = str(sample.get("file_name") or f"image {sample['image_id']}")
            images.append(_compare(index, name, truth, is_crowd, detections, confusion))
    images.sort(key=lambda image: (image.quality, -image.num_errors))
    return Analysis(
        evaluator.compute(), names, evaluator.precision_curves(), confusion, images, min_score, score_threshold
    )


def write_report(
    folder: str | Path,
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    batch_size: int = 8,
    min_score: float = 0.5,
    num_images: int = 12,
    training: str | Path | None = None,
    title: str = "Evaluation",
    progress: bool = True,
) -> Path:
    """Evaluate a model on a dataset and write `report.html` about it: [`analyse`], then [`save_report`]."""
    analysis = analyse(model, processor, dataset, batch_size=batch_size, min_score=min_score, progress=progress)
    return save_report(folder, analysis, dataset, num_images=num_images, training=training, title=title)


def save_report(
    folder: str | Path,
    analysis: Analysis,
    dataset: Any,
    *,
    num_images: int = 12,
    training: str | Path | None = None,
    title: str = "Evaluation",
) -> Path:
    """Write what was found out about a model as one HTML page, about 0.1 MB an image.

    Args:
        folder: Gets `report.html`; it is made where it is not there.
        analysis: Of the dataset.
        dataset: The one that was analysed; its images are read again.
        num_images: Of the worst images, and as many of the best; none is shown twice, and none that shows nothing.
        training: The output folder of a training run, whose curves are shown too.
        title: The page's.

    Returns:
        The file.

    Raises:
        ValueError: there are no curves in `training`, or `num_images` is negative.
    """
    if num_images < 0:
        raise ValueError(f"num_images {num_images} must be at least 0")
    charts = [] if training is None else training_charts(_read_history(Path(training)))
    images = [image for image in analysis.images if len(image.truth) or len(image.found)]
    half = math.ceil(len(images) / 2)
    worst, best = images[: min(num_images, half)], images[half:][::-1][:num_images]
    sections = [
        _Section("numbers", "Numbers", _numbers(analysis)),
        _Section("classes", "Classes", _class_table(analysis)),
        _Section("curves", "Precision and recall", _precision_charts(analysis)),
        _Section("confusion", "Confusion", _confusion_table(analysis)),
        _Section("training", "Training", _charts(charts) if charts else ""),
        _Section("worst", "Worst images", _gallery(worst, dataset)),
        _Section("best", "Best images", _gallery(best, dataset)),
        _Section("how", "How this is counted", _explanation(analysis)),
    ]
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may hold what is no UTF-8.
    write_text(path, _page(title, sections), errors="replace")
    return path


# -- right and wrong ---------------------------------------------------------------------------------------------------


def _read_truth(
    annotations: Sequence[Mapping[str, Any]], labels: Sequence[int], size: tuple[int, int], has_masks: bool
) -> tuple[Instances, np.ndarray]:
    """Annotations and their labels (N,) -> objects, without those that have no shape, and which are crowds, (N,)."""
    boxes, masks, kept, is_crowd = [], [], [], []
    for annotation, label in zip(annotations, labels, strict=True):
        shape, box = read_segmentation(annotation.get("segmentation"), size), annotation.get("bbox")
        if (box is None or min(box[2:]) <= 0) and shape is not None:
            box = box_and_area(shape, size)[0]
        if box is None or min(box[2:]) <= 0:
            continue
        x, y, width, height = box
        boxes.append([x, y, x + width, y + height])
        kept.append(label)
        is_crowd.append(bool(annotation.get("iscrowd")))
        if has_masks:
            corners = np.array([x, y, x + width, y, x + width, y + height, x, y + height], np.float64)
            rle = to_rle([corners] if shape is None else shape, size)
            masks.append({"size": list(size), "counts": rle["counts"].decode()})
    objects = Instances(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.ones(len(kept), np.float32),
        np.array(kept, np.int64),
        [],
        masks if has_masks else None,
        size,
    )
    return objects, np.array(is_crowd, bool)


def _sure_ones(
    found: Mapping[str, Any], min_score: float, label_of: Mapping[int, int], size: tuple[int, int], has_masks: bool
) -> Instances:
    """What `detect_in_dataset` gives of an image -> its detections above `min_score`."""
    sure = np.flatnonzero(found["scores"] > min_score)
    return Instances(
        found["boxes"][sure],
        found["scores"][sure],
        np.array([label_of[found["labels"][index]] for index in sure], np.int64),
        [],
        [found["masks"][index] for index in sure] if has_masks else None,
        size,
    )


def _compare(
    index: int, name: str, truth: Instances, is_crowd: np.ndarray, found: Instances, confusion: np.ndarray
) -> ImageQuality:
    """Match the detections of an image with its objects, and count them in `confusion` (C + 1, C + 1)."""
    ious = _ious(found, truth, is_crowd)
    object_of, in_crowd = _match(ious, found.labels[:, None] == truth.labels, is_crowd)
    truth_outcomes = ["crowd" if crowd else "missed" for crowd in is_crowd]
    found_outcomes = ["in a crowd" if crowd else "false" for crowd in in_crowd]
    taken = np.zeros(len(found))
    nothing = len(confusion) - 1
    for detection, label in enumerate(found.labels):
        one = object_of[detection]
        if one >= 0:
            is_right = truth.labels[one] == label
            truth_outcomes[one], found_outcomes[detection] = ("found", "right") if is_right else ("other class",) * 2
            taken[detection] = ious[detection, one]
            confusion[truth.labels[one], label] += 1
        elif not in_crowd[detection]:
            confusion[nothing, label] += 1
    for label, outcome in zip(truth.labels, truth_outcomes, strict=True):
        confusion[label, nothing] += outcome == "missed"
    image = ImageQuality(index, name, 1.0, truth, found, truth_outcomes, found_outcomes, taken)
    is_right = np.array([outcome == "right" for outcome in found_outcomes], bool)
    if is_right.any() or image.num_errors:
        image.quality = float(taken[is_right].sum() / (is_right.sum() + image.num_errors / 2))
    return image


def _ious(found: Instances, truth: Instances, is_crowd: np.ndarray) -> np.ndarray:
    """(K, N) float64 of masks, or of boxes where there are none; with a crowd it is the part inside of it."""
    if not len(found) or not len(truth):
        return np.zeros((len(found), len(truth)))
    if found.masks is not None and truth.masks is not None:
        return coco_mask.iou(found.masks, truth.masks, is_crowd.tolist())
    boxes = [np.concatenate([one.boxes[:, :2], one.boxes[:, 2:] - one.boxes[:, :2]], axis=1) for one in (found, truth)]
    return coco_mask.iou(*(one.astype(np.float64) for one in boxes), is_crowd.tolist())


def _match(ious: np.ndarray, same_class: np.ndarray, is_crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, N), (K, N), (N,) -> of each detection the object that it takes or -1, (K,), and whether a crowd has it."""
    object_of: np.ndarray = np.full(len(ious), -1)
    in_crowd = (ious * (same_class & is_crowd)).max(1, initial=0) >= _MIN_IOU
    is_free = ~is_crowd
    for allowed in (same_class, ~in_crowd[:, None] & ~same_class):
        for detection in np.flatnonzero(object_of < 0):
            free_ious = ious[detection] * (allowed[detection] & is_free)
            if free_ious.max(initial=0) >= _MIN_IOU:
                object_of[detection] = one = free_ious.argmax()
                is_free[one] = False
    return object_of, in_crowd & (object_of < 0)


# -- the page ----------------------------------------------------------------------------------------------------------


class _Section(NamedTuple):
    key: str
    title: str
    body: str


def _explanation(analysis: Analysis) -> str:
    threshold = analysis.score_threshold
    counted = "of all detections, whatever their score" if threshold is None else f"but of detections above {threshold}"
    return _EXPLANATION.format(counted, max(analysis.min_score, threshold or 0.0))


def _page(title: str, sections: Iterable[_Section]) -> str:
    shown = [section for section in sections if section.body]
    contents = "".join(f'<a href="#{section.key}">{section.title}</a>' for section in shown)
    parts = [f'<section id="{one.key}"><h2>{one.title}</h2>{one.body}</section>' for one in shown]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>"
        f"<body><header><h1>{_text(title)}</h1><nav>{contents}</nav></header>"
        f"{_TOOLBAR}<main>{''.join(parts)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _text(words: Any) -> str:
    """What may stand in the page, in quotes too, as nothing but these words."""
    return html.escape(str(words))


def _number(value: float) -> str:
    return "–" if value < 0 else f"{value:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells of HTML; the first of each row heads it."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _numbers(analysis: Analysis) -> str:
    metrics, images = analysis.metrics, analysis.images
    kinds = {kind: name for kind, name in {"segm": "mask", "bbox": "box"}.items() if f"{kind}_AP" in metrics}
    first, of_what = next(iter(kinds.items()))
    tiles = [(f"{of_what} {name}", _number(metrics[f"{first}_{name}"])) for name in ("AP", "AP50", "AP75")]
    if "mean_iou" in metrics:
        tiles.append(("mean IoU", _number(metrics["mean_iou"])))
    tiles.append(("image quality", _number(float(np.mean([image.quality for image in images])) if images else -1.0)))
    tiles += [("images", str(len(images))), ("objects", str(sum(_num_objects(image) for image in images)))]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    names = [name.removeprefix(f"{first}_") for name in metrics if name.startswith(f"{first}_")]
    rows = [[name, *(_number(metrics[f"{kind}_{one}"]) for one in names)] for kind, name in kinds.items()]
    return f'<dl class="tiles">{shown}</dl>' + _table(["", *(name.replace("_", " ") for name in names)], rows)


def _num_objects(image: ImageQuality) -> int:
    return len(image.truth) - image.truth_outcomes.count("crowd")


def _class_table(analysis: Analysis) -> str:
    """A row a class, the worst AP first, those without objects last."""
    has_iou = "mean_iou" in analysis.metrics
    columns = ["class", "objects", "AP", "AP50", "AP75", *["mean IoU"] * has_iou, "found", "missed", "false"]
    rows = []
    for label, name in enumerate(analysis.class_names):
        of_class, curve = analysis.metrics["per_class"][name], analysis.curves.get(name)
        means = [-1.0] * 3 if curve is None else [curve.mean(), curve[_AT[0.5]].mean(), curve[_AT[0.75]].mean()]
        right = analysis.confusion[label, label]
        lost, wrong = analysis.confusion[label].sum() - right, analysis.confusion[:, label].sum() - right
        numbers = [_number(value) for value in [*means, *[of_class.get("iou", -1.0)] * has_iou]]
        row = [_text(name), str(of_class["num_objects"]), *numbers, str(right), str(lost), str(wrong)]
        rows.append((math.inf if curve is None else means[0], row))
    rows.sort(key=lambda pair: pair[0])
    return _table(columns, (row for _, row in rows))


def _confusion_table(analysis: Analysis) -> str:
    """Rows are what is there, columns what was found; a cell is as dark as its share of the row."""
    counts, names = analysis.confusion, [*map(_text, analysis.class_names), "<i>nothing</i>"]
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    classes = sorted(np.argsort(-errors[:-1], kind="stable")[:_MOST_CONFUSED].tolist())
    order = [*classes, len(names) - 1]
    heads = "".join(f'<th scope="col"><span>{names[label]}</span></th>' for label in classes)
    rows = []
    for label in order:
        total = max(1, counts[label].sum())
        cells = "".join(
            f'<td style="--share:{counts[label, other] / total:.3f}" class="{"right" if label == other else ""}">'
            f"{counts[label, other] or ''}</td>"
            for other in order
        )
        rows.append(f'<tr><th scope="row">{names[label]}</th>{cells}</tr>')
    left_out = len(analysis.class_names) - len(classes)
    note = f" Shown are the {len(classes)} classes with the most errors; {left_out} are left out." if left_out else ""
    return (
        f"<p>Rows are the objects that are there, columns what they were found as.{note}</p>"
        f'<div class="wide"><table class="confusion"><thead><tr><th>there / found</th>{heads}'
        f'<th scope="col"><span><i>missed</i></span></th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


# -- charts ------------------------------------------------------------------------------------------------------------


def _charts(charts: Iterable[Chart]) -> str:
    return f'<div class="charts">{"".join(map(_chart, charts))}</div>'


def _chart(chart: Chart) -> str:
    legend = "".join(
        f'<li><i style="background:{curve.color}"></i>{_text(curve.label)}</li>'
        for curve in chart.curves
        if curve.in_legend
    )
    return f'<figure class="chart"><figcaption>{chart.title}</figcaption>{draw_svg(chart)}<ul>{legend}</ul></figure>'


def _precision_charts(analysis: Analysis) -> str:
    if not analysis.curves:
        return ""
    words = "<p>The best precision where at least that recall is reached; the numbers are areas, AP at that IoU.</p>"
    return words + _charts(precision_recall_charts(analysis.curves))


def _read_history(folder: Path) -> list[dict[str, Any]]:
    """The log of a training run: of the folder itself, or of its last checkpoint."""
    found = [path for path in folder.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    found.sort(key=lambda path: int(path.parent.name[11:]))
    found += [path for path in [folder / "trainer_state.json"] if path.is_file()]
    if not found:
        raise ValueError(
            f"{folder} has no trainer_state.json, nor has a checkpoint in it; give the output folder of a training run"
        )
    try:
        history = json.loads(found[-1].read_text(encoding="utf-8"))["log_history"]
        return [dict(entry) for entry in history]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{found[-1]} is no log of a Trainer ({error!r:.80}); give another training run") from error


# -- images ----------------------------------------------------------------------------------------------------------


def _gallery(images: Sequence[ImageQuality], dataset: Any) -> str:
    cards = "".join(_card(image, dataset[image.index]["image"]) for image in images)
    return f'<div class="gallery">{cards}</div>' if cards else ""


def _card(image: ImageQuality, photo: Image.Image) -> str:
    shown = photo.convert("RGB")
    shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    width, height = shown.size
    truth, found = image.truth_outcomes, image.found_outcomes
    true_words = list(truth)
    found_words = [
        f"{score:.2f}, {outcome}" + (f", IoU {iou:.2f}" if iou else "")
        for score, outcome, iou in zip(image.found.scores, found, image.ious, strict=True)
    ]
    layers = _layer("truth", image.truth, truth, true_words, (height, width))
    layers += _layer("prediction", image.found, found, found_words, (height, width))
    num_objects = _num_objects(image)
    counts = [f"quality {image.quality:.2f}"]
    counts.append(f"{truth.count('found')} of {num_objects} objects found" if num_objects else "no object")
    counts += [f"{found.count('other class')} in another class"] * ("other class" in found)
    counts += [f"{found.count('false')} false"] * ("false" in found)
    return (
        f'<figure class="card"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(image.name)}">'
        f'<image width="{width}" height="{height}" href="{_as_jpeg(shown)}"/>{layers}</svg>'
        f"<figcaption><b>{_text(image.name)}</b><br>{' · '.join(counts)}</figcaption></figure>"
    )


def _layer(
    name: str, instances: Instances, outcomes: Sequence[str], words: Sequence[str], size: tuple[int, int]
) -> str:
    """Instances as outlines over an image of `size` (height, width); the first, the best, on top."""
    paths = []
    for index in reversed(range(len(instances))):
        title = f"{_text(instances.names[index])}: {words[index]}"
        outline = _outline(instances, index, size)
        paths.append(f'<path class="{outcomes[index].replace(" ", "-")}" d="{outline}"><title>{title}</title></path>')
    return f'<g class="{name}">{"".join(paths)}</g>'


def _as_jpeg(photo: Image.Image) -> str:
    """An image as a data URI, of a quality at which it is not too large."""
    for quality in _QUALITIES:
        stream = io.BytesIO()
        photo.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= _MOST_JPEG_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _outline(instances: Instances, index: int, size: tuple[int, int]) -> str:
    """The path around an instance, in an image of `size`: its mask's rings, or its box.

    A mask of very many parts is drawn on a coarser grid, as its box if that does not help, or where no pixel is left.
    """
    if instances.masks is not None:
        for shrink in (1, 2, 4, 8):
            grid = (math.ceil(size[0] / shrink), math.ceil(size[1] / shrink))
            [mask] = rasterize([instances.masks[index]], instances.image_size, grid)
            if np.count_nonzero(mask[1:] ^ mask[:-1]) + np.count_nonzero(mask[:, 1:] ^ mask[:, :-1]) > _MOST_EDGES:
                continue
            scale = np.array(size[::-1]) / grid[::-1]
            path = "".join(_path(simplify_ring(ring, _TOLERANCE) * scale) for ring in trace_rings(mask))
            if 0 < len(path) <= _MOST_CHARACTERS:
                return path
    scale = np.array(size[::-1]) / instances.image_size[::-1]
    x0, y0, x1, y1 = (instances.boxes[index].reshape(2, 2) * scale).ravel()
    return _path(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]))


def _path(points: np.ndarray) -> str:
    return f"M{' '.join(f'{x:.4g} {y:.4g}' for x, y in points)}Z"


def trace_rings(mask: np.ndarray) -> list[np.ndarray]:
    """Mask (H, W) bool -> the closed lines between its pixels and the others, (V, 2) int64 corners x, y each.

    Filled by the even-odd rule they give the mask.
    """
    height, width = mask.shape
    around = np.pad(mask, 1)
    # From each corner the corners that follow, with the mask on the right: above it to the right, beside it down, ...
    following: dict[int, list[int]] = {}
    for down, right, start, end in (
        (-1, 0, (0, 0), (0, 1)),
        (0, 1, (0, 1), (1, 1)),
        (1, 0, (1, 1), (1, 0)),
        (0, -1, (1, 0), (0, 0)),
    ):
        rows, columns = np.nonzero(mask & ~around[1 + down : 1 + down + height, 1 + right : 1 + right + width])
        starts = (rows + start[0]) * (width + 1) + columns + start[1]
        ends = (rows + end[0]) * (width + 1) + columns + end[1]
        for one, other in zip(starts.tolist(), ends.tolist(), strict=True):
            following.setdefault(one, []).append(other)
    rings = []
    while following:
        first = corner = next(iter(following))
        ring: list[int] = []
        while not ring or corner != first:
            ring.append(corner)
            choices = following[corner]
            corner = choices.pop()
            if not choices:
                del following[ring[-1]]
        rows, columns = np.divmod(np.array(ring), width + 1)
        rings.append(np.stack([columns, rows], axis=1))
    return rings


def simplify_ring(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Points (V, 2) of a closed line -> those of them that a line needs to stay within `tolerance` (Douglas-Peucker).

    What would shrink to a line or a point stays as it is.
    """
    points = np.concatenate([ring, ring[:1]]).astype(np.float64)
    far = int(np.hypot(*(points - points[0]).T).argmax())
    is_kept: np.ndarray = np.zeros(len(points), bool)
    is_kept[[0, far]] = True
    spans = [(0, far), (far, len(ring))]
    while spans:
        start, end = spans.pop()
        if end - start < 2:
            continue
        along = points[end] - points[start]
        away = points[start + 1 : end] - points[start]
        distances = np.abs(along[0] * away[:, 1] - along[1] * away[:, 0]) / np.hypot(*along)
        furthest = int(distances.argmax())
        if distances[furthest] > tolerance:
            middle = start + 1 + furthest
            is_kept[middle] = True
            spans += [(start, middle), (middle, end)]
    is_kept[-1] = False
    return points[is_kept] if is_kept.sum() > 2 else ring


# -- what is the same on every page ------------------------------------------------------------------------------------

_TOOLBAR = """<div class="toolbar" role="group" aria-label="layers of the images">
<label><input type="checkbox" id="show-truth" checked> ground truth <kbd>t</kbd></label>
<span class="key truth"><i class="found"></i>found <i class="missed"></i>missed</span>
<label><input type="checkbox" id="show-prediction" checked> predictions <kbd>p</kbd></label>
<span class="key prediction"><i class="right"></i>right <i class="other-class"></i>other class
<i class="false"></i>false</span>
<span class="hint">click an instance to hide it, <kbd>Esc</kbd> brings all back</span>
</div>"""

_EXPLANATION = """<p>AP and AR are COCO's, {}, averaged over IoU thresholds from 0.5 to 0.95; AP50 and
AP75 at one of them; small, medium and large are objects of less than 32², less than 96² and more pixels; AR 1, 10 and
100 allow that many detections of a class in an image. “–” stands where there is no object.</p>
<p>Mean IoU unites the masks of a class that score above 0.5, and sums intersection and union over all images.</p>
<p>In the columns found, missed and false, in the confusion matrix and on the images only detections that score above
{} count. The best first, each takes the free object of its class with the highest IoU, if that is at least 0.5; what is
left is compared with objects of other classes. Crowds are neither found nor missed.</p>
<p>An image's quality is its panoptic quality: the IoUs of the right detections, summed, over their number + half the
number of all other detections and objects; 1 where there is nothing and nothing was found. Images of which that is
true are not shown.</p>"""

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#5b6475;--line:#d9dee7;--paper:#fff;--card:#f6f8fb;--accent:#3b82f6}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e9ef;--soft:#9aa4b5;--line:#343b48;--paper:#14181f;--card:#1c222c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 24px}
h1{font-size:26px;line-height:1.25;margin:28px 0 10px;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 10px}
section{scroll-margin-top:60px}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;padding-bottom:12px}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
p{max-width:78ch;color:var(--soft);margin:6px 0 12px}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 18px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 18px;min-width:112px}
dt{color:var(--soft);font-size:13px}
dd{margin:0;font-size:24px;font-weight:600;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:13px}
tbody th,thead th:first-child{text-align:left}
tbody th{font-weight:500;max-width:34ch;overflow:hidden;text-overflow:ellipsis}
.confusion td{background:rgb(239 68 68/calc(var(--share)*.75));min-width:44px;border:1px solid var(--line)}
.confusion td.right{background:rgb(59 130 246/calc(var(--share)*.75))}
.confusion thead th{vertical-align:bottom}
.confusion thead span{writing-mode:vertical-rl;transform:rotate(180deg);max-height:16ch;overflow:hidden;
text-overflow:ellipsis}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:18px}
figure{margin:0;break-inside:avoid}
.chart{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;max-width:460px}
.chart figcaption{font-weight:600;margin-bottom:4px}
.chart svg{width:100%;height:auto;display:block;color:var(--soft)}
.chart text{font-family:inherit!important}
.chart ul{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:6px 0 0;padding:0;font-size:13px}
.chart li{overflow-wrap:anywhere}
.chart li i{display:inline-block;width:16px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
.toolbar{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:4px 16px;align-items:center;padding:8px 24px;
justify-content:center;background:var(--card);border-block:1px solid var(--line);font-size:14px}
.toolbar label{font-weight:600;cursor:pointer}
.hint,.key{color:var(--soft)}
.key i{display:inline-block;width:13px;height:13px;border-radius:3px;border:2px solid;margin:0 4px 0 8px;
vertical-align:-2px}
kbd{border:1px solid var(--line);border-radius:4px;padding:0 5px;font-size:12px;background:var(--paper)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:18px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.card svg{width:100%;display:block}
.card figcaption{padding:8px 12px 10px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
.card b{color:var(--ink)}
.card path{stroke:var(--c);fill:var(--c);fill-opacity:.22;fill-rule:evenodd;stroke-width:2px;stroke-linejoin:round;
vector-effect:non-scaling-stroke;cursor:pointer}
.truth path{stroke-dasharray:5 3;fill-opacity:.12}
.card path:hover{fill-opacity:.5}
.card path.off{stroke-opacity:.25;fill-opacity:0;stroke-width:1px}
.key i{border-color:var(--c)}
.truth .found{--c:#22c55e}
.truth .missed,.truth .other-class{--c:#facc15}
.prediction .right{--c:#3b9dff}
.prediction .other-class{--c:#e254f0}
.prediction .false{--c:#ff4a3d}
.crowd,.in-a-crowd{--c:#b9c0cc}
.hide-truth g.truth,.hide-prediction g.prediction{display:none}
h2{break-after:avoid}
@media print{.toolbar label,.hint{display:none}.toolbar{position:static}.wide{overflow:visible}
th,td{padding:3px 6px;font-size:11px;white-space:normal}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.gallery{grid-template-columns:1fr 1fr}}
"""

_SCRIPT = """
"use strict";
const LAYERS = {t: "truth", p: "prediction"};
function show(layer, shown) {
  document.body.classList.toggle("hide-" + layer, !shown);
  document.getElementById("show-" + layer).checked = shown;
}
function followAddress() {
  const hidden = location.hash.match(/^#hide=(.*)/);
  if (hidden) for (const layer of Object.values(LAYERS)) show(layer, !hidden[1].split(",").includes(layer));
}
for (const layer of Object.values(LAYERS)) {
  const box = document.getElementById("show-" + layer);
  box.addEventListener("change", () => show(layer, box.checked));
  show(layer, box.checked);
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const layer = LAYERS[event.key];
  if (layer) show(layer, document.body.classList.contains("hide-" + layer));
  if (event.key === "Escape") for (const path of document.querySelectorAll("path.off")) path.classList.remove("off");
});
document.addEventListener("click", event => {
  const path = event.target.closest(".card path");
  if (path) path.classList.toggle("off");
});
addEventListener("hashchange", followAddress);
followAddress();
"""
