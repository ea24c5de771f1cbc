"""`transformers-rfdetr evaluate`: COCO's numbers of a model on a dataset."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic_files import check_writable, make_directory, write_text
from ..text_table import format_table
from .errors import one_line_errors
from .options import BatchSizeOption, DeviceOption, Dtype, DtypeOption, ImageFolderOption, ModelArgument

EXAMPLE = """examples:

transformers-rfdetr evaluate rf-detr-seg-medium coco/ --device cuda --batch-size 32

transformers-rfdetr evaluate runs/buildings/model buildings/ --split test --per-class --report report
"""
_NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100")
_KINDS = {"segm": "mask", "bbox": "box"}
_OF_A_CLASS = {"segm_AP": "mask AP", "segm_AP50": "mask AP50", "iou": "mask IoU", "bbox_AP": "box AP"}


@one_line_errors
def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help="a folder, a COCO JSON, a data.yaml of YOLO, or a dataset on the Hub")],
    split: Annotated[str, typer.Option(help="of the data; a single JSON is the split train")] = "validation",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="write all numbers there, as JSON")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="print a line for each class too")] = False,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.FLOAT32,
    threshold: Annotated[
        float | None, typer.Option(help="score that a detection must exceed; COCO's numbers have none")
    ] = None,
    image_folder: ImageFolderOption = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write a page of curves, tables and the worst images there")
    ] = None,
) -> None:
    """Evaluate a model as COCO does: AP and AR of masks and boxes, and mean IoU."""
    import torch

    from ..data.load import load_instance_dataset
    from ..evaluation.error_analysis import analyse
    from ..evaluation.evaluation_loop import evaluate_instance_segmentation
    from ..evaluation.report import save_report
    from ..hub.load import load

    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"--threshold {threshold} is outside [0, 1); give a score such as 0.5, or leave it out")
    if output is not None:  # what forbids to write is better known now
        check_writable(output)
        make_directory(output.parent)
    if report is not None:
        make_directory(report)
    splits = load_instance_dataset(data, image_folder=image_folder)
    if split not in splits:
        raise ValueError(f"--split {split} is not in {data}, which has {', '.join(splits)}; give one of these")
    dataset = splits[split]
    loaded, processor = load(model, device=device, dtype=getattr(torch, dtype))
    settings: dict[str, Any] = {"batch_size": batch_size, "score_threshold": threshold}
    if report is None:
        numbers = evaluate_instance_segmentation(loaded, processor, dataset, **settings)
    else:
        analysis = analyse(loaded, processor, dataset, **settings)
        numbers = analysis.metrics
    typer.echo(f"{model} on {split} of {data}, {len(dataset)} images")
    typer.echo(format_numbers(numbers))
    if per_class:
        typer.echo(format_classes(numbers["per_class"]))
    if output is not None:
        facts = {"model": model, "data": data, "split": split, "num_images": len(dataset), "threshold": threshold}
        write_text(output, json.dumps(facts | numbers, indent=1))
    if report is not None:
        page = save_report(report, analysis, dataset, training=_run_of(model), title=f"{model} on {split} of {data}")
        typer.echo(f"the report is {page}")


def _run_of(model: str) -> Path | None:
    """The output folder of the training that left a model, if it is one in it."""
    path = Path(model).expanduser()
    for folder in (path, path.absolute().parent) if path.is_dir() else ():
        if any(folder.glob("checkpoint-*/trainer_state.json")):
            return folder
    return None


def format_numbers(numbers: Mapping[str, Any]) -> str:
    """The numbers of an evaluation, as [`evaluate_instance_segmentation`] returns them, as a table for people.

    A line each for masks, which a detection model does not have, and boxes, then the mean IoU; "-" stands where the
    ground truth has nothing to find.
    """
    kinds = [kind for kind in _KINDS if f"{kind}_AP" in numbers]
    rows = [[_KINDS[kind], *(_show(numbers[f"{kind}_{name}"]) for name in _NUMBERS)] for kind in kinds]
    text = format_table(["", *_NUMBERS], rows)
    if "mean_iou" in numbers:
        text += f"\nmean IoU (score > 0.5): {_show(numbers['mean_iou'])}"
    return text


def format_classes(per_class: Mapping[str, Mapping[str, Any]]) -> str:
    """The numbers of each class, as a table for people."""
    columns = [name for name in _OF_A_CLASS if any(name in of_class for of_class in per_class.values())]
    rows = [
        [label, of_class["num_objects"], *(_show(of_class.get(name, -1.0)) for name in columns)]
        for label, of_class in per_class.items()
    ]
    return format_table(["class", "objects", *(_OF_A_CLASS[name] for name in columns)], rows)


def _show(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"
