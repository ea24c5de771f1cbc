"""`python -m transformers_rfdetr.cli.demo`: fine-tune rf-detr-seg-tiny on drawn images of new classes."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from ..assets import TINY_NAME
from ..atomic_files import atomic_file, write_text
from ..data.augmentation import FlipAndCrop
from ..data.checks.check import check_dataset
from ..data.dataset import InstanceDataset
from ..data.drawing import draw_annotations, draw_grid
from ..data.load import load_instance_dataset
from ..data.synthetic import draw_trays, save_dataset
from ..evaluation.error_analysis import analyse_evaluation
from ..evaluation.evaluation_loop import evaluate_dataset
from ..evaluation.missed_objects import StageRecord
from ..evaluation.report import save_report
from ..hub.load import load
from ..inference.predict import predict
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForObjectDetection
from ..training.arguments import RfDetrTrainingArguments
from ..training.trainer import RfDetrTrainer
from .errors import one_line_errors
from .evaluate import format_numbers

_NUM_DRAWN = 4
_FIRST_VALIDATION_SEED = 1_000_000  # training images are drawn from seed 0 on

app = typer.Typer(add_completion=False)


@app.command(epilog="example: python -m transformers_rfdetr.cli.demo --steps 500 --output demo/longer")
@one_line_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of training.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 4 images.")] = 300,
    train: Annotated[int, typer.Option(min=8, help="Number of training images.")] = 200,
    validation: Annotated[int, typer.Option(min=1, help="Number of validation images.")] = 50,
) -> None:
    """Draw bolts, nuts and washers on trays, check the data, fine-tune rf-detr-seg-tiny on them, and evaluate it.

    The model has only seen aerial images before.
    """
    started = time.perf_counter()
    typer.echo(f"Drawing {train} images to train on and {validation} to evaluate on")
    save_dataset(output / "data" / "train", *draw_trays(train))
    save_dataset(output / "data" / "valid", *draw_trays(validation, first_seed=_FIRST_VALIDATION_SEED))
    typer.echo(check_dataset(output / "data"))
    data = load_instance_dataset(output / "data")

    model, processor = load(TINY_NAME, id2label=data.id2label)
    trainer = RfDetrTrainer(
        model,
        fine_tuning_arguments(output / "run", steps, seed, logging_steps=max(1, steps // 12)),
        train_dataset=data["train"],
        processing_class=processor,
        augmentation=FlipAndCrop(crop=0.0, rotate=0.75),  # trays have no upright direction
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model(str(output / "model"))

    model, processor = load(str(output / "model"))
    stages = StageRecord()
    evaluator = evaluate_dataset(model, processor, data["validation"], stages=stages)
    analysis = analyse_evaluation(evaluator, data["validation"], model.config, stages=stages)
    write_text(output / "metrics.json", json.dumps(analysis.metrics, indent=1))
    save_report(output, analysis, data["validation"], training=output / "run", title="the demo")
    with atomic_file(output / "predictions.png") as partial:
        _draw_predictions(model, processor).save(partial, "PNG")
    typer.echo(format_numbers(analysis.metrics))
    typer.echo(
        f"{time.perf_counter() - started:.0f} s. Look at {output / 'predictions.png'} and {output / 'report.html'}."
        f" Then try your own images:\n  transformers-rfdetr predict {output / 'model'} IMAGES"
        f"\n  transformers-rfdetr train DATA --model {TINY_NAME} --output runs/first --epochs 10"
    )


def fine_tuning_arguments(folder: Path, steps: int, seed: int, **settings: Any) -> RfDetrTrainingArguments:
    """Return arguments for a short training of rf-detr-seg-tiny; `settings` are further ones.

    Small batches give more optimizer steps in the same time. All weights learn at one rate: drawn parts look so
    different from aerial images that the first layers must change too.
    """
    return RfDetrTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=8e-4,
        learning_rate_encoder=8e-4,
        layer_decay=1.0,
        component_decay=1.0,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        multi_scale=False,
        ema_decay=0.95,  # an average over twenty optimizer steps
        eval_strategy="no",
        save_strategy="no",
        dataloader_num_workers=0,
        seed=seed,
        report_to="none",
        **settings,
    )


def _draw_predictions(model: RfDetrForObjectDetection, processor: RfDetrImageProcessor) -> Image.Image:
    """Draw the first validation images, at twice the resolution, with their ground truth and their predictions."""
    images, coco = draw_trays(_NUM_DRAWN, (288, 288), first_seed=_FIRST_VALIDATION_SEED)
    dataset = InstanceDataset(coco, images)
    rows = [
        [image, draw_annotations(image, sample["annotations"], dataset.id2label), found.draw(image)]
        for image, sample, found in zip(images, dataset, predict(model, processor, images), strict=True)
    ]
    return draw_grid(rows, ["image", "ground truth", "predictions"])


if __name__ == "__main__":
    app()
