"""Write the model card: from the facts about a model and its training run to the text of its README.md on the Hub."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..inference.predict import own_threshold
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.validation import as_pair
from ..model.variants_rf_detr import class_labels

CURVES, GRID, RECIPE = "training_curves.png", "predictions.png", "training_arguments.json"
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
# Metrics of the evaluation in the order of the card's table, and those that the Hub shows.
_METRICS = {
    "segm_AP": "Mask AP",
    "segm_AP50": "Mask AP50",
    "segm_AP75": "Mask AP75",
    "segm_AP_small": "Mask AP, small objects",
    "segm_AP_medium": "Mask AP, medium objects",
    "segm_AP_large": "Mask AP, large objects",
    "segm_AR_100": "Mask AR, 100 detections",
    "bbox_AP": "Box AP",
    "bbox_AP50": "Box AP50",
    "bbox_AP75": "Box AP75",
    "bbox_AR_100": "Box AR, 100 detections",
    "mean_iou": "Mean IoU",
}
_HUB_METRICS = ("segm_AP", "segm_AP50", "segm_AP75", "bbox_AP", "bbox_AP50", "bbox_AP75", "mean_iou")


@dataclass
class Run:
    """The facts about a training run. The card omits empty ones.

    Attributes:
        base_model: Hub id of the checkpoint that was fine-tuned.
        datasets: Hub ids or names.
        splits: Name -> (images, objects).
        objects: Class -> objects in the training split.
        results: Name of the evaluated split -> metrics of [`InstanceSegmentationEvaluator.compute`], AP in [0, 1], -1
            where the ground truth has no such objects.
        recipe: Training setting -> its value.
        note: What a reader of the metrics must know, in Markdown.
        images: Files of the repository -> captions.
        is_adapter: Whether the repository holds a LoRA adapter of `base_model` instead of a whole model.
    """

    base_model: str | None = None
    datasets: Sequence[str] = ()
    splits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    objects: Mapping[str, int] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    is_adapter: bool = False


def model_card(
    name: str,
    config: RfDetrConfig,
    *,
    has_masks: bool,
    run: Run | None = None,
    with_code: bool = False,
    converted_from: str | None = None,
    changes: Sequence[tuple[str, str, str]] = (),
    title: str | None = None,
    tags: Sequence[str] = (),
    **metadata: Any,
) -> str:
    """Return the README.md of a model, with the metadata that the Hub shows and searches.

    Names of classes, datasets and files appear as plain text, whatever characters they hold.

    Args:
        name: What `from_pretrained` takes: the repository, or a folder.
        config: The model's configuration.
        has_masks: Whether it segments.
        run: The training run that produced it.
        with_code: Whether the repository holds the code as well; see [`add_code`].
        converted_from: Name of the checkpoint of rfdetr that it was converted from.
        changes: What the conversion changed: (name, in the source, in the result).
        title: The heading; the last part of `name` by default.
        tags: Tags besides those of the task.
        **metadata: For `huggingface_hub.ModelCardData`: `license`, `language`.
    """
    run = run or Run()
    title = one_line(title or Path(name).name)
    height, width = as_pair(config.resolution)
    class_columns, class_rows = _class_table(config, run)
    card = ModelCard.from_template(
        _metadata(title, run, has_masks, tags, metadata),
        template_path=str(_TEMPLATE),
        escape=escape,
        is_hub_id=is_hub_id,
        title=title,
        name=json.dumps(name),
        base_name=json.dumps(run.base_model or "the base model"),
        run=run,
        has_masks=has_masks,
        height=height,
        width=width,
        num_queries=config.num_queries,
        threshold=json.dumps(own_threshold(config)),
        thresholds_note=config.score_thresholds_note,
        converted_from=converted_from,
        changes=changes,
        result_rows=_result_rows(run),
        split_rows=[(split, *counts) for split, counts in run.splits.items()],
        confidence=next((one["intervals"]["confidence"] for one in run.results.values() if "intervals" in one), None),
        class_columns=class_columns,
        class_rows=class_rows,
        auto_class="AutoModelForInstanceSegmentation" if has_masks else "AutoModelForObjectDetection",
        pipeline_tag=_pipeline_tag(has_masks),
        post_process=f"post_process_{'instance_segmentation' if has_masks else 'object_detection'}",
        with_code=with_code,
        # The port has no P3 and P5, and swaps the sides of rectangles.
        port_reads_it=config.projector_scale == ["P4"] and isinstance(config.resolution, int),
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def _metadata(title: str, run: Run, has_masks: bool, tags: Sequence[str], metadata: Mapping[str, Any]) -> ModelCardData:
    results = _eval_results(run, has_masks)
    return ModelCardData(
        library_name="peft" if run.is_adapter else "transformers",
        pipeline_tag=_pipeline_tag(has_masks),
        base_model=run.base_model,
        datasets=[dataset for dataset in run.datasets if is_hub_id(dataset)] or None,
        tags=["rf-detr", "instance-segmentation" if has_masks else "object-detection", *tags],
        eval_results=results or None,
        model_name=title if results else None,
        **metadata,
    )


def _pipeline_tag(has_masks: bool) -> str:
    return "image-segmentation" if has_masks else "object-detection"


def _result_rows(run: Run) -> list[list[str]]:
    """Return a row for each metric that a split has, with a column for each split."""
    return [
        [label, *(_format_with_interval(key, metrics) for metrics in run.results.values())]
        for key, label in _METRICS.items()
        if any(key in metrics for metrics in run.results.values())
    ]


def _class_table(config: RfDetrConfig, run: Run) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of a table of the classes, with the counts and AP that are known of each."""
    columns: dict[str, Mapping[str, str]] = {}
    if run.objects:
        columns["objects to train on"] = {name: str(count) for name, count in run.objects.items()}
    for split, metrics in run.results.items():
        for key, label in (("segm_AP", "mask AP"), ("bbox_AP", "box AP")):
            values = {name: of_class[key] for name, of_class in metrics.get("per_class", {}).items() if key in of_class}
            if values:
                columns[f"{label}, {split}"] = {name: _format(value) for name, value in values.items()}
                break
    if config.score_thresholds is not None:
        scores = {config.id2label[label]: f"{score:.3f}" for label, score in config.score_thresholds.items()}
        columns["score threshold"] = scores
    rows = [
        [label, name, *(column.get(name, "") for column in columns.values())]
        for label, name in class_labels(config.id2label).items()
    ]
    return ["label", "class", *columns], rows


def _format(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else "–"


def _format_with_interval(key: str, metrics: Mapping[str, Any]) -> str:
    low, high = metrics.get("intervals", {}).get(key, (-1.0, -1.0))
    interval = f" ({low:.3f} to {high:.3f})" if low >= 0 else ""
    return _format(metrics.get(key)) + interval


def _eval_results(run: Run, has_masks: bool) -> list[EvalResult]:
    """Return the metrics as the Hub's `model-index` has them."""
    dataset = one_line(run.datasets[0]) if run.datasets else "unnamed"
    return [
        EvalResult(
            task_type=_pipeline_tag(has_masks),
            dataset_type=dataset if is_hub_id(dataset) else "custom",
            dataset_name=dataset,
            dataset_split=one_line(split),
            metric_type="mean_iou" if key == "mean_iou" else "mean_average_precision",
            metric_name=_METRICS[key],
            metric_value=round(float(metrics[key]), 4),
        )
        for split, metrics in run.results.items()
        for key in _HUB_METRICS
        if _format(metrics.get(key)) != "–"
    ]


def one_line(text: Any) -> str:
    """Return the text without line breaks and repeated spaces."""
    return " ".join(str(text).split())


def escape(text: Any) -> str:
    """Return the text with backslashes, so that Markdown shows it literally."""
    # Colon and dot of https:// and www., which some renderers turn into links.
    return re.sub(r"([\\`*_{}\[\]<>#|&~!$]|:(?=//)|(?<=www)\.)", r"\\\1", one_line(text))


def is_hub_id(name: str | None) -> bool:
    """Return whether `name` can be a Hub repository with its owner, and is not a local folder."""
    return bool(name) and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)) and not Path(name).exists()
