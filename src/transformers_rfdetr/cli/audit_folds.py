"""Fine-tune a model without each part of a dataset in turn, and let it judge that part."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from torch.utils.data import Subset

from ..atomic_files import make_directory, write_text
from ..data.dataset import InstanceDataset
from ..data.splits import fold_indices
from ..data.writers.write import write_dataset
from ..evaluation.coco_evaluator import InstanceSegmentationEvaluator
from ..evaluation.evaluation_loop import evaluate_dataset
from ..evaluation.label_audit import MIN_SCORE
from .options import Dtype, load_model
from .training_run import FREE_SETTINGS, UPLOAD_SETTINGS, read_recipe, read_setting, run_recipe

EPOCHS = 10  # of a fine-tuning, unless the user says how long


def evaluate_folds(
    dataset: InstanceDataset,
    model: str,
    count: int,
    folder: Path,
    config: Path | None,
    settings: Sequence[str],
    device: str,
    batch_size: int,
) -> InstanceSegmentationEvaluator:
    """Return an evaluator with detections in all images, each of a model that has not been trained on the image.

    Each fold is a run of `train` in a folder, FOLDER/1, ..., which is resumed if it was interrupted, and not uploaded.

    Args:
        dataset: The dataset.
        model: Name of the model that each fine-tuning starts from.
        count: Number of folds.
        folder: Folder of the runs.
        config: Recipe of `train`, or None.
        settings: "NAME=VALUE", which override it.
        device: Device of training and evaluation.
        batch_size: Images per batch of the evaluation.

    Raises:
        ValueError: the folder has folds of other data, of other settings, or another number of them.
    """
    given = [*map(read_setting, settings)]
    if config is None and not {"epochs", "num_train_epochs", "max_steps"} & {name for name, _ in given}:
        given.append(("epochs", EPOCHS))
    places = {"model": model, "data": str(folder), "output": str(folder), "device": device}
    recipe = read_recipe(config, [*given, *places.items()])
    recipe = {name: value for name, value in recipe.items() if name not in UPLOAD_SETTINGS}
    fixed = {name: value for name, value in recipe.items() if name not in FREE_SETTINGS and name != "data"}
    coco = dataset.coco()
    facts = {"folds": count, "data": hashlib.sha256(repr(coco).encode()).hexdigest(), "settings": fixed}
    _check_folder(folder, facts)
    evaluator = InstanceSegmentationEvaluator(coco)
    image_ids = dataset.image_ids()
    parts = fold_indices(dataset, count)
    for number, part in enumerate(parts, start=1):
        typer.echo(f"Fold {number} of {count}: training without {len(part)} of {len(dataset)} images")
        others = sorted({*range(len(dataset))} - set(part.tolist()))
        data, run = folder / str(number) / "data", folder / str(number) / "run"
        if not data.exists():
            write_dataset({"train": Subset(dataset, others)}, data)
        run_recipe({"eval_strategy": "no", **recipe, "data": str(data.absolute()), "output": str(run.absolute())})
        loaded, processor = load_model(str(run / "model"), device, Dtype.FLOAT32, None)
        held_out = Subset(dataset, part.tolist())
        found = evaluate_dataset(loaded, processor, held_out, batch_size=batch_size, score_threshold=MIN_SCORE)
        # A subset numbers its images anew if they have no ids.
        evaluator.merge({image_ids[index]: one for index, one in zip(part, found.state().values(), strict=True)})
    return evaluator


def _check_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Write what the folds in a folder are of, or raise ValueError if it has folds of something else."""
    path, text = folder / "folds.json", json.dumps(facts)
    if not path.exists():
        make_directory(folder)
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{folder} must have {facts['folds']} folds of these labels and settings, got others. Delete it, or pass"
            " another --output."
        )
