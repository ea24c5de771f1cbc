"""`transformers-rfdetr evaluate`: COCO's metrics of a model on a dataset."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic_files import check_writable, make_directory, write_text
from ..text_table import format_table
from .errors import one_line_errors
from .options import (
    AnyModelArgument,
    BatchSizeOption,
    DataArgument,
    DeviceOption,
    Dtype,
    DtypeOption,
    IgnoreClassOption,
    ImageFolderOption,
    ThreadsOption,
    choose_split,
    load_model,
)

EXAMPLE = """examples:

transformers-rfdetr evaluate rf-detr-seg-medium coco/ --device cuda --batch-size 32

transformers-rfdetr evaluate runs/buildings/model buildings/ --split test --per-class --report report
"""
_HIDDEN = ("AR_small", "AR_medium", "AR_large")
_KINDS = {"segm": "mask", "bbox": "box"}
_INTERVAL_METRICS = {
    "segm_AP": "mask AP",
    "segm_AP50": "mask AP50",
    "bbox_AP": "box AP",
    "bbox_AP50": "box AP50",
    "mean_iou": "mean IoU",
}
_CLASS_METRICS = {"segm_AP": "mask AP", "segm_AP50": "mask AP50", "iou": "mask IoU", "bbox_AP": "box AP"}


SplitOption = Annotated[str, typer.Option(help="Split of the dataset. A single JSON file has only the split train.")]
OutputOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write all metrics to this file as JSON. Default: print only.")
]
PredictionsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the detections to this file, as JSON for COCO.loadRes of pycocotools: with masks, or with boxes"
        " for a detection model.",
    ),
]
PerClassOption = Annotated[
    bool, typer.Option("--per-class", help="Also print the metrics of each class. Default: off.")
]
ThresholdOption = Annotated[
    float | None, typer.Option(help="Score that a detection must exceed to count. Default: all count, as in COCO.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Write a report with curves, errors and images to this folder, as HTML. Default: none."
    ),
]
MaxDetectionsOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="Detections per image and class for additional metrics such as AP_300, for images with more than 100"
        " objects. COCO's metrics count 100.",
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Another model, such as the one that was exported, to print beside. Default: none."
    ),
]
ConfidenceOption = Annotated[
    float | None,
    typer.Option(
        help="Level of confidence intervals, such as 0.95. The file of --output then contains what `compare` needs."
        " Default: none. Also the confidence of --recall and --precision, there 0.95 by default."
    ),
]
CalibrateOption = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Choose a score threshold for each class, that of the highest F1, and store them in the folder of MODEL."
        " Use images that the model was not trained on. Default: off.",
    ),
]
RecallOption = Annotated[
    float | None,
    typer.Option(help="With --calibrate: choose the highest thresholds that promise this recall. Default: none."),
]
PrecisionOption = Annotated[
    float | None,
    typer.Option(help="With --calibrate: choose the lowest thresholds that promise this precision. Default: none."),
]
MinScoreOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Score that a detection must exceed to be shown in the report. Default: the model's calibrated thresholds,"
        " or 0.5.",
    ),
]


@one_line_errors
def evaluate(
    model: AnyModelArgument,
    data: DataArgument,
    split: SplitOption = "validation",
    output: OutputOption = None,
    predictions: PredictionsOption = None,
    per_class: PerClassOption = False,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.FLOAT32,
    threads: ThreadsOption = None,
    threshold: ThresholdOption = None,
    image_folder: ImageFolderOption = None,
    ignore_class: IgnoreClassOption = None,
    report: ReportOption = None,
    min_score: MinScoreOption = None,
    max_detections: MaxDetectionsOption = 100,
    reference: ReferenceOption = None,
    confidence: ConfidenceOption = None,
    calibrate: CalibrateOption = False,
    recall: RecallOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Evaluate a model as COCO does: AP and AR of masks and boxes, and mean IoU."""
    from ..data.load import load_instance_dataset
    from ..evaluation.calibration import (
        calibrate_evaluation,
        check_goal,
        class_names,
        save_thresholds,
        store_thresholds,
    )
    from ..evaluation.confidence import FEW_IMAGES, compare, confidence_intervals, per_image, to_json
    from ..evaluation.error_analysis import analyse_evaluation
    from ..evaluation.evaluation_loop import evaluate_dataset
    from ..evaluation.missed_objects import StageRecord
    from ..evaluation.report import save_report

    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"--threshold must be in [0, 1), got {threshold}. Omit it to count all detections.")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"--confidence must be in (0, 1), got {confidence}. Use 0.95.")
    _make_directories(output, predictions, report)
    goal = {"recall": recall, "precision": precision, "confidence": confidence or 0.95}
    if calibrate:
        check_goal(**goal)
        _check_calibration(model, threshold)
    elif recall is not None or precision is not None:
        raise ValueError("--recall and --precision require --calibrate. Add it.")
    splits = load_instance_dataset(data, image_folder=image_folder).ignore_classes(ignore_class or [])
    dataset = choose_split(splits, split, data)
    loaded, processor = load_model(model, device, dtype, threads)
    settings: dict[str, Any] = {"score_threshold": threshold, "max_detections": max_detections}
    settings["batch_size"] = batch_size
    stages = None if report is None else StageRecord()
    evaluator = evaluate_dataset(loaded, processor, dataset, stages=stages, **settings)
    if calibrate:
        calibration = calibrate_evaluation(evaluator, **goal)
        store_thresholds(loaded.config, calibration, class_names(loaded.config, dataset, evaluator))
        save_thresholds(Path(model).expanduser(), loaded.config)
    if report is None:
        metrics = evaluator.compute()
    else:
        scores: dict[str, Any] = {"min_score": min_score, "score_threshold": threshold}
        analysis = analyse_evaluation(evaluator, dataset, loaded.config, stages=stages, **scores)
        metrics = analysis.metrics
    typer.echo(f"{model} on {split} of {data}, {len(dataset)} images")
    typer.echo(format_numbers(metrics))
    images = None if confidence is None else per_image(evaluator)
    if images is not None and confidence is not None:
        metrics["intervals"] = confidence_intervals(images, confidence)
        typer.echo(format_intervals(metrics))
        if len(images.image_ids) < FEW_IMAGES:
            typer.echo(f"With fewer than {FEW_IMAGES} images, an interval can be wrong more often than its level says.")
    if per_class:
        typer.echo(format_classes(metrics["per_class"]))
    if calibrate:
        metrics["calibration"] = calibration.to_dict()
        typer.echo(format_calibration(calibration))
        typer.echo(f"stored in {Path(model) / 'config.json'}; `predict` uses them unless --threshold is given")
    if reference is not None:
        loaded, processor = load_model(reference, device, dtype, threads)
        other = evaluate_dataset(loaded, processor, dataset, **settings)
        typer.echo(f"{reference}, the reference")
        other_metrics = other.compute()
        typer.echo(format_numbers(other_metrics))
        if per_class:
            typer.echo(format_classes(other_metrics["per_class"]))
        if images is not None:
            level = metrics["intervals"]["confidence"]
            typer.echo(format_comparison(compare(per_image(other), images, level), len(images.image_ids)))
    if evaluator.highest_score is None:
        typer.echo("the model detects nothing in these images")
    elif report is not None and not analysis.has_counted:
        typer.echo(
            f"no detection has a score above {analysis.limit}; the highest score is {evaluator.highest_score:.3f}"
        )
    if output is not None:
        facts = {"model": model, "data": data, "split": split, "num_images": len(dataset), "threshold": threshold}
        text = json.dumps(facts | metrics, indent=1)
        if images is not None:
            text = f'{text[:-2]},\n "per_image": {json.dumps(to_json(images))}\n}}'  # on one line: it is for `compare`
        write_text(output, text)
    if predictions is not None:
        rows = ",\n".join(map(json.dumps, evaluator.predictions()))
        write_text(predictions, f"[{rows}]\n")
    if report is not None:
        title = f"{model} on {split} of {data}"
        page = save_report(report, analysis, dataset, training=_find_training_run(model), title=title)
        typer.echo(f"the report is {page}")


def _make_directories(output: Path | None, predictions: Path | None, report: Path | None) -> None:
    """Make the directories of the results, so that the command fails before the evaluation and not after it."""
    for file in filter(None, (output, predictions)):
        check_writable(file)
        make_directory(file.parent)
    if report is not None:
        make_directory(report)


def _check_calibration(model: str, threshold: float | None) -> None:
    """Raise ValueError unless thresholds can be chosen among all detections, and stored in the folder of a model."""
    if threshold is not None:
        raise ValueError(f"--calibrate requires all detections, got --threshold {threshold}. Omit it.")
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return check_writable(path / "config.json")
    remedy = f'In Python, save it first: m, p = load("{model}"), m.save_pretrained("my-model"), p.save_pretrained(...).'
    if path.is_file():
        remedy = "Calibrate the model that was exported, and export it again."
    raise ValueError(f"--calibrate requires the folder of a model, got {model}. {remedy}")


def _find_training_run(model: str) -> Path | None:
    """Return the output folder of the training run in which a model lies, or None."""
    path = Path(model).expanduser()
    for folder in (path, path.absolute().parent) if path.is_dir() else ():
        if any(folder.glob("checkpoint-*/trainer_state.json")):
            return folder
    return None


def format_numbers(metrics: Mapping[str, Any]) -> str:
    """Return a table of the metrics that [`evaluate_instance_segmentation`] returns.

    It has a line for masks, if the model predicts them, a line for boxes, and the mean IoU. "-" means that the ground
    truth has no such objects.
    """
    kinds = [kind for kind in _KINDS if f"{kind}_AP" in metrics]
    names = [name.removeprefix("bbox_") for name in metrics if name.startswith("bbox_")]
    columns = [name for name in names if name not in _HIDDEN]
    rows = [[_KINDS[kind], *(_format(metrics[f"{kind}_{name}"]) for name in columns)] for kind in kinds]
    text = format_table(["", *columns], rows)
    if "mean_iou" in metrics:
        text += f"\nmean IoU (score > 0.5): {_format(metrics['mean_iou'])}"
    return text


def format_intervals(metrics: Mapping[str, Any]) -> str:
    """Return a table of the metrics that have an interval, with it."""
    intervals = {name: metrics["intervals"][name] for name in _INTERVAL_METRICS if name in metrics["intervals"]}
    rows = [
        [_INTERVAL_METRICS[name], _format(metrics[name]), "-" if low < 0 else f"{low:.3f} to {high:.3f}"]
        for name, (low, high) in intervals.items()
    ]
    return format_table(["", "all images", f"{100 * metrics['intervals']['confidence']:g} % confidence"], rows)


def format_comparison(comparison: Mapping[str, Any], num_images: int) -> str:
    """Return a table of the differences that [`compare`] found, those of each class last."""
    rows = [_describe(_INTERVAL_METRICS[name], one) for name, one in comparison.items() if name != "per_class"]
    for class_name, differences in comparison["per_class"].items():
        kind = "segm_AP" if "segm_AP" in differences else "bbox_AP"
        rows.append(_describe(f"{_INTERVAL_METRICS[kind]}, {class_name}", differences[kind]))
    first = comparison["segm_AP" if "segm_AP" in comparison else "bbox_AP"]
    text = format_table(["", "first", "second", "difference", "interval", ""], rows)
    if first.is_certain:
        return text
    needed = "" if first.num_images_needed is None else f"; about {first.num_images_needed} would be needed"
    return f"{text}\nThe two cannot be told apart with these {num_images} images{needed}."


def _describe(name: str, difference: Any) -> list[str]:
    interval = f"{difference.low:+.3f} to {difference.high:+.3f}"
    verdict = "" if not difference.is_certain else "better" if difference.difference > 0 else "worse"
    numbers = [_format(difference.first), _format(difference.second), f"{difference.difference:+.3f}"]
    return [name, *numbers, interval, verdict]


def format_classes(per_class: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the metrics of each class."""
    columns = [name for name in _CLASS_METRICS if any(name in metrics for metrics in per_class.values())]
    rows = [
        [label, metrics["num_objects"], *(_format(metrics.get(name, -1.0)) for name in columns)]
        for label, metrics in per_class.items()
    ]
    return format_table(["class", "objects", *(_CLASS_METRICS[name] for name in columns)], rows)


def format_calibration(calibration: Any) -> str:
    """Return a table of calibrated score thresholds and what they reach, and what they promise."""
    rows = [
        [
            name,
            one.num_objects,
            *("-" if value != value else f"{value:.3f}" for value in (one.precision, one.recall, one.f1)),
            "-" if one.threshold is None else f"{one.threshold:.3f}",
            one.problem,
        ]
        for name, one in calibration.classes.items()
    ]
    header = ["class", "objects", "precision", "recall", "F1", "threshold", ""]
    return f"{format_table(header, rows, left=(0, 6))}\nscore thresholds: {calibration.note}"


def _format(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"
