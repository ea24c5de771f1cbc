"""`python -m transformers_rfdetr.cli.demo`: train a small model on drawn images, save it, load it and draw results."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from ..atomic_files import atomic_file, write_text
from ..data.augmentation import FlipAndCrop
from ..data.dataset import InstanceDatasets
from ..data.drawing import draw_grid
from ..data.load import load_instance_dataset
from ..data.synthetic import draw_dataset
from ..evaluation.evaluation_loop import evaluate_instance_segmentation
from ..hub.load import load
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation
from ..training.arguments import RfDetrTrainingArguments
from ..training.run_card import DRAWN_SCORE, draw_examples
from ..training.trainer import RfDetrTrainer
from .errors import one_line_errors
from .evaluate import format_numbers

_SIZE = 96
_BATCH_SIZE = 16
_NUM_DRAWN = 6
_FIRST_VALIDATION_SEED = 1_000_000  # training images are drawn from seed 0 on
# With random weights, all parts learn at one rate, which is higher than in fine-tuning.
FROM_SCRATCH: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "layer_decay": 1.0,
    "component_decay": 1.0,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "multi_scale": False,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "dataloader_num_workers": 0,
    "report_to": "none",
}

app = typer.Typer(add_completion=False)


@app.command(epilog="example: python -m transformers_rfdetr.cli.demo --seed 1 --output demo/seed1")
@one_line_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and training.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 16 images.")] = 600,
    train: Annotated[int, typer.Option(min=16, help="Number of training images.")] = 1024,
    validation: Annotated[int, typer.Option(min=1, help="Number of validation images.")] = 96,
) -> None:
    """Draw aerial images of buildings, train a small RF-DETR-Seg on them from scratch, and evaluate it on others.

    The model is then loaded from the folder that it was saved to, and its predictions are drawn.
    """
    started = time.perf_counter()
    typer.echo(f"Drawing {train} images to train on and {validation} to evaluate on")
    data = _draw_data(output / "data", {"train": (train, 0), "valid": (validation, _FIRST_VALIDATION_SEED)})
    trainer = RfDetrTrainer(
        _build_model(seed, data.id2label),
        _arguments(output / "run", steps, seed, train),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        augmentation=FlipAndCrop(crop=0.0, rotate=0.75),  # aerial images have no upright direction
    )
    trainer.train()
    trainer.save_model(str(output / "model"))

    model, processor = load(str(output / "model"))
    metrics = evaluate_instance_segmentation(model, processor, data["validation"])
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))
    rows = [
        [drawn.resize((3 * _SIZE, 3 * _SIZE), Image.Resampling.BICUBIC) for drawn in pair]
        for pair in draw_examples(model, processor, data["validation"], _NUM_DRAWN)
    ]
    with atomic_file(output / "predictions.png") as partial:
        draw_grid(rows, ["ground truth", f"predictions above {DRAWN_SCORE:g}"]).save(partial, "PNG")
    typer.echo(format_numbers(metrics))
    typer.echo(
        f"{time.perf_counter() - started:.0f} s. The model is in {output / 'model'}, its predictions beside the ground"
        f" truth in {output / 'predictions.png'}, the data in {output / 'data'}."
    )


def _draw_data(folder: Path, splits: dict[str, tuple[int, int]]) -> InstanceDatasets:
    """Draw splits, given as (number of images, first seed), into a folder in Roboflow's layout, and load them."""
    for split, (count, first_seed) in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, coco = draw_dataset(
            count, (_SIZE, _SIZE), metres_per_pixel=0.5, first_seed=first_seed, classes=["building"]
        )
        for image, entry in zip(images, coco["images"], strict=True):
            image.save(folder / split / entry["file_name"])
        write_text(folder / split / "_annotations.coco.json", json.dumps(coco))
    return load_instance_dataset(folder)


def _build_model(seed: int, id2label: dict[int, str]) -> RfDetrForInstanceSegmentation:
    """Return a model of 2.5 million random weights, which learns on a CPU."""
    config = RfDetrConfig(
        backbone_config={
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "image_size": _SIZE,
            "patch_size": 12,
            "num_windows": 1,
            "out_indices": [2, 3, 4, 6],
        },
        d_model=128,
        decoder_layers=2,
        decoder_ffn_dim=256,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=8,
        num_queries=12,
        group_detr=5,
        mask_point_sample_ratio=4,  # of 24 x 24 cells
        id2label=id2label,
    )
    torch.manual_seed(seed)
    return RfDetrForInstanceSegmentation(config)


def _arguments(folder: Path, steps: int, seed: int, num_images: int) -> RfDetrTrainingArguments:
    steps_between = max(1, steps // 4)
    return RfDetrTrainingArguments(
        str(folder),
        num_train_epochs=steps * _BATCH_SIZE / num_images,
        per_device_train_batch_size=_BATCH_SIZE,
        per_device_eval_batch_size=_BATCH_SIZE,
        learning_rate=1e-3,
        learning_rate_encoder=1e-3,
        warmup_steps=steps // 10,
        eval_steps=steps_between,
        save_steps=steps_between,
        save_total_limit=1,
        logging_steps=max(1, steps // 20),
        seed=seed,
        **FROM_SCRATCH,
    )


if __name__ == "__main__":
    app()
