"""Train from scratch on microscopy images of nuclei, on the CPU: `python benchmarks/nuclei.py FOLDER`.

FOLDER contains `train.json` (92 images) and `val.json` (28 images) in COCO format, and `images/`, all from stage 1 of
the 2018 Data Science Bowl (https://bbbc.broadinstitute.org/BBBC038). `MORE_RESULTS.md` has the result.
"""

import argparse
import time
from pathlib import Path

import torch

from transformers_rfdetr import (
    FlipAndCrop,
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrTrainer,
    RfDetrTrainingArguments,
    load_instance_dataset,
)
from transformers_rfdetr.cli.demo import FROM_SCRATCH


def main() -> None:
    """Train, and print the metrics on the held-out images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", default="runs/nuclei")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    files = {"train": options.folder / "train.json", "validation": options.folder / "val.json"}
    data = load_instance_dataset(files, image_folder=options.folder / "images")
    config = RfDetrConfig(
        backbone_config={
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 192,
            "patch_size": 8,
            "num_windows": 2,
            "out_indices": [2, 3, 5, 6],
        },
        d_model=128,
        decoder_layers=2,
        decoder_ffn_dim=256,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=8,
        num_queries=100,
        group_detr=3,
        # With fewer points, hardly any would lie on the small objects, and empty masks would have a low loss.
        mask_point_sample_ratio=2,
        mask_class_loss_coefficient=20.0,
        mask_dice_loss_coefficient=20.0,
        id2label=data.id2label,
    )
    torch.manual_seed(options.seed)
    arguments = RfDetrTrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        learning_rate_encoder=5e-4,
        warmup_steps=0.05,
        eval_steps=0.5,
        save_steps=0.5,
        seed=options.seed,
        **FROM_SCRATCH,
    )
    model = RfDetrForInstanceSegmentation(config)
    trainer = RfDetrTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        augmentation=FlipAndCrop(crop=0.9, crop_sides=(180, 500), turn=0.75),
    )
    trainer.train()
    numbers = trainer.evaluate()
    for name in ("segm_AP50", "segm_AP", "segm_AP75", "bbox_AP50", "bbox_AP", "mean_iou"):
        print(f"{name:<12} {numbers[f'eval_{name}']:.3f}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
