"""`transformers-rfdetr audit`: which labels of a dataset are probably wrong."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..atomic_files import write_text
from ..text_table import format_table
from .errors import one_line_errors
from .options import (
    BatchSizeOption,
    DataArgument,
    DeviceOption,
    Dtype,
    Format,
    IgnoreClassOption,
    ImageFolderOption,
    ThreadsOption,
    choose_split,
    load_model,
)

if TYPE_CHECKING:
    from ..data.dataset import InstanceDataset
    from ..evaluation.label_audit import AuditedImage, Suspect

EXAMPLE = """examples:

transformers-rfdetr audit new-data/ --model runs/first/model

transformers-rfdetr audit data/ --model rf-detr-seg-medium --folds 5 --output audit --save-as cvat
"""
_Model = Annotated[
    str,
    typer.Option(
        help="A model that has not been trained on these labels, unless --folds is given: a folder, a Hub id, or a"
        " published name."
    ),
]
_Folds = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="K",
        help="Fine-tune the model K times, each time without one of K parts of the images, which it then judges."
        " Default: use the model as it is.",
    ),
]
_Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Settings of `train` for --folds, as YAML. Default: those of `train`, but 10 epochs."
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of `train` for --folds. May be repeated."),
]


class _MarkedFormat(StrEnum):
    """The formats that have a place for the mark of a suspect."""

    COCO = Format.COCO
    LABELME = Format.LABELME
    CVAT = Format.CVAT
    LABEL_STUDIO = Format.LABEL_STUDIO


_SaveAs = Annotated[
    _MarkedFormat | None,
    typer.Option(
        help="Write the dataset with the suspects marked to OUTPUT/FORMAT, for an annotation program. Default: off."
    ),
]
_MinEvidence = Annotated[float, typer.Option(min=0, max=1, help="Evidence from which a label is a suspect.")]


@one_line_errors
def audit(
    data: DataArgument,
    model: _Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("audit"),
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    folds: _Folds = None,
    config: _Config = None,
    settings: _Settings = None,
    min_evidence: _MinEvidence = 0.5,
    save_as: _SaveAs = None,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    image_folder: ImageFolderOption = None,
    ignore_class: IgnoreClassOption = None,
) -> None:
    """Find labels that are probably wrong: missing and superfluous objects, wrong classes, and sloppy masks.

    Writes them to OUTPUT/audit.json and OUTPUT/audit.html, the most evidence first.
    """
    from ..data.label_maps import canonical_split_name
    from ..data.load import load_instance_dataset
    from ..evaluation.audit_files import explain_recall, suspect_rows
    from ..evaluation.evaluation_loop import evaluate_dataset
    from ..evaluation.label_audit import MIN_SCORE, audited_images, find_suspects, recall_of
    from ..evaluation.report.audit_page import save_audit_page

    if save_as is not None and ignore_class:
        raise ValueError("--save-as requires all classes, got --ignore-class, whose objects it would lose. Omit one.")
    if folds is None and (config is not None or settings):
        raise ValueError("--config and --set require --folds, got none. Add --folds 5.")
    splits = load_instance_dataset(data, image_folder=image_folder).ignore_classes(ignore_class or [])
    split = canonical_split_name(split)
    dataset = choose_split(splits, split, data)
    if save_as is not None and (output / save_as).exists():  # another --output would train all folds again
        raise ValueError(f"{output / save_as} must not exist. Delete or rename it.")
    if folds is None:
        loaded, processor = load_model(model, device, Dtype.FLOAT32, threads)
        evaluator = evaluate_dataset(loaded, processor, dataset, batch_size=batch_size, score_threshold=MIN_SCORE)
    else:
        from .audit_folds import evaluate_folds

        evaluator = evaluate_folds(dataset, model, folds, output / "folds", config, settings or [], device, batch_size)
    images = audited_images(evaluator, dataset)
    suspects = find_suspects(images, min_evidence)
    recall = recall_of(images)
    facts = {"model": model, "data": data, "split": split, "folds": folds, "num_images": len(images)}
    facts |= {"num_objects": dataset.num_objects(), "recall": None if recall is None else round(recall, 4)}
    content = {**facts, "suspects": suspect_rows(images, suspects, dataset)}
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "audit.json", json.dumps(content, indent=1))
    page = save_audit_page(output, images, suspects, dataset, title=f"Labels of {data}, {split}")
    typer.echo(_summary(suspects, dataset))
    typer.echo(explain_recall(recall))
    typer.echo(f"{output / 'audit.json'}, {page}")
    if save_as is not None:
        typer.echo(str(_save_as(output / save_as, save_as, dataset, split, images, suspects)))


def _summary(suspects: "list[Suspect]", dataset: "InstanceDataset") -> str:
    """Return a table of the numbers of suspects by kind and evidence."""
    from ..evaluation.label_audit import KINDS

    limits = (0.9, 0.7, 0.5)
    rows = []
    for kind in KINDS:
        evidence = [suspect.evidence for suspect in suspects if suspect.kind == kind]
        rows.append([kind, len(evidence), *(sum(one >= limit for one in evidence) for limit in limits)])
    header = ["", "suspects", *(f"evidence >= {limit}" for limit in limits)]
    return f"{format_table(header, rows)}\namong {dataset.num_objects()} objects in {len(dataset)} images"


def _save_as(
    folder: Path,
    format: _MarkedFormat,
    dataset: "InstanceDataset",
    split: str,
    images: "list[AuditedImage]",
    suspects: "list[Suspect]",
) -> Path:
    from ..data.writers.write import write_annotations
    from ..evaluation.audit_files import marked_images

    marked = {split: marked_images(dataset, images, suspects)}
    return write_annotations(marked, dataset.classes, folder, format=format.value)
