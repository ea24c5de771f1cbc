"""Fine-tune a model without each part of a dataset in turn, and let it judge that part."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from torch.utils.data import Subset

from ..data.dataset import InstanceDataset
from ..data.splits import fold_indices
from ..data.writers.write import write_dataset
from ..evaluation.coco_evaluator import InstanceSegmentationEvaluator
from ..evaluation.evaluation_loop import evaluate_dataset
from ..evaluation.label_audit import MIN_SCORE
from .options import Dtype, load_model
from .training_run import read_recipe, read_setting, run_recipe

EPOCHS = 10  # of a fine-tuning, if nothing else is given


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

    Each fold is a run of `train` in a folder, FOLDER/1, ..., which is resumed if it was interrupted.

    Args:
        dataset: The dataset.
        model: Name of the model that each fine-tuning starts from.
        count: Number of folds.
        folder: Folder of the runs.
        config: Recipe of `train`, or None.
        settings: "NAME=VALUE", which override it.
        device: Device of training and evaluation.
        batch_size: Images per batch of the evaluation.
    """
    evaluator = InstanceSegmentationEvaluator(dataset.coco())
    image_ids = dataset.image_ids()
    parts = fold_indices(dataset, count)
    for number, part in enumerate(parts, start=1):
        typer.echo(f"Fold {number} of {count}: training without {len(part)} of {len(dataset)} images")
        others = sorted({*range(len(dataset))} - set(part.tolist()))
        data, run = folder / str(number) / "data", folder / str(number) / "run"
        if not data.exists():
            write_dataset({"train": Subset(dataset, others)}, data)
        given: list[tuple[str, Any]] = [("model", model), ("data", str(data)), ("output", str(run)), ("device", device)]
        recipe = read_recipe(config, [*map(read_setting, settings), *given])
        if not {"num_train_epochs", "max_steps"} & recipe.keys():
            recipe["num_train_epochs"] = float(EPOCHS)
        run_recipe({"eval_strategy": "no", **recipe})
        loaded, processor = load_model(str(run / "model"), device, Dtype.FLOAT32, None)
        held_out = Subset(dataset, part.tolist())
        found = evaluate_dataset(loaded, processor, held_out, batch_size=batch_size, score_threshold=MIN_SCORE)
        # A subset numbers its images anew if they have no ids.
        evaluator.merge({image_ids[index]: one for index, one in zip(part, found.state().values(), strict=True)})
    return evaluator
