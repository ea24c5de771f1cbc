"""Train rf-detr-seg-tiny, the model inside the package, from random weights on drawn scenes:

    pip install -e ".[train]"
    python examples/train_tiny.py runs/tiny

It draws the data, trains in rounds, each from the weights of the one before, and writes the last weights as float16 to
`runs/tiny/model`, with a sample image beside them. Run the command again after an interruption: it resumes from the
last checkpoint. One round takes about an hour and a half on one core.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.trainer_utils import get_last_checkpoint

from transformers_rfdetr import (
    FlipAndCrop,
    InstanceDataset,
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrImageProcessor,
    RfDetrTrainer,
    RfDetrTrainingArguments,
    analyse,
    load,
    load_instance_dataset,
)
from transformers_rfdetr.assets import TINY_NAME
from transformers_rfdetr.cli.evaluate import format_numbers
from transformers_rfdetr.data.synthetic import CLASSES, draw_dataset, draw_scene, save_dataset
from transformers_rfdetr.hub.model_card import Run, model_card

SIZE = 144
METRES_PER_PIXEL = (0.15, 0.28)
# (number of images, first seed)
SPLITS = {"train": (4096, 0), "valid": (100, 1_000_000)}
TEST_SEED = 2_000_000


class Round(NamedTuple):
    """A training from the weights of the round before."""

    steps: int  # optimizer steps of 8 images
    learning_rate: float  # the highest
    num_groups: int
    freeze_backbone: bool


# The first learns features and masks. The others cost half as much per step, and learn which of the queries on one
# object is to report it.
ROUNDS = [Round(2400, 8e-4, 5, False), Round(2200, 8e-4, 3, True), Round(1200, 8e-4, 3, True)]
NOTE = """\
This is a small model for tests, examples and first steps, not one of the published variants. It has only seen aerial
images that transformers-rfdetr draws, of 0.15 to 0.28 metres per pixel, and finds little in photographs. Its script is
`examples/train_tiny.py`. It comes with the package: `load("rf-detr-seg-tiny")`. `from_pretrained`
and `pipeline` take its folder, `transformers_rfdetr.tiny_checkpoint()`, instead of the name."""


def build_model(seed: int) -> RfDetrForInstanceSegmentation:
    """Return the model with 2.7 million random weights."""
    config = RfDetrConfig(
        backbone_config={
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 6,
            "num_windows": 2,
            "out_indices": [2, 3, 5, 6],
        },
        d_model=128,
        decoder_layers=3,
        decoder_ffn_dim=256,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=8,
        num_queries=60,
        group_detr=ROUNDS[0].num_groups,
        mask_downsample_ratio=3,  # 48 x 48 cells: a car covers fifteen
        mask_point_sample_ratio=3,
        id2label=dict(enumerate(CLASSES)),
    )
    torch.manual_seed(seed)
    return RfDetrForInstanceSegmentation(config)


def train_round(model: RfDetrForInstanceSegmentation, data: Any, folder: Path, settings: Round) -> None:
    """Train for one round, from its last checkpoint if there is one, and save the model."""
    arguments = RfDetrTrainingArguments(
        str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=settings.learning_rate,
        learning_rate_encoder=settings.learning_rate,
        freeze_backbone=settings.freeze_backbone,
        layer_decay=1.0,
        component_decay=1.0,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        multi_scale=False,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=400,
        save_steps=400,
        save_total_limit=1,
        logging_steps=50,
        dataloader_num_workers=1,
        report_to="none",
    )
    trainer = RfDetrTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        augmentation=FlipAndCrop(crop=0.0, rotate=0.75),  # aerial images have no upright direction
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(folder / "model"))


def write_model(model: RfDetrForInstanceSegmentation, data: Any, folder: Path) -> None:
    """Write the model in float16, its processor and its card, with the metrics on scenes that were never drawn."""
    processor = RfDetrImageProcessor.from_config(model.config)
    images, coco = draw_dataset(200, (SIZE, SIZE), metres_per_pixel=METRES_PER_PIXEL, first_seed=TEST_SEED)
    analysis = analyse(model, processor, InstanceDataset(coco, images))
    print(format_numbers(analysis.metrics))
    num_detections = sum(len(image.detections) for image in analysis.images)
    print(
        f"above a score of 0.5: precision {analysis.precision:.3f}, recall {analysis.recall:.3f}, duplicates"
        f" {analysis.num_duplicates} of {num_detections}"
    )
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # the type that the weights are loaded as
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    run = Run(
        splits={name: (len(split), split.num_objects()) for name, split in data.items()},
        results={"200 unseen scenes": analysis.metrics},
        recipe={f"round {number}": f"{item.steps} optimizer steps" for number, item in enumerate(ROUNDS, start=1)},
        note=NOTE,
    )
    card = model_card(TINY_NAME, model.config, has_masks=True, run=run, license="apache-2.0")
    (folder / "README.md").write_text(card)


def main() -> None:
    """Run all rounds that are not complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for split, (num_images, first_seed) in SPLITS.items():
        if not (options.output / "data" / split / "_annotations.coco.json").is_file():
            drawn = draw_dataset(num_images, (SIZE, SIZE), metres_per_pixel=METRES_PER_PIXEL, first_seed=first_seed)
            save_dataset(options.output / "data" / split, *drawn)
    data = load_instance_dataset(options.output / "data")
    for number, settings in enumerate(ROUNDS, start=1):
        folder = options.output / f"round{number}"
        if (folder / "model" / "model.safetensors").is_file():
            continue
        if number == 1:
            model = build_model(options.seed)
        else:
            model, _ = load(str(options.output / f"round{number - 1}" / "model"), group_detr=settings.num_groups)
        train_round(model, data, folder, settings)
    model, _ = load(str(options.output / f"round{len(ROUNDS)}" / "model"))
    write_model(model, data, options.output / "model")
    sample, _ = draw_scene(TEST_SEED, (2 * SIZE, 2 * SIZE), metres_per_pixel=0.1)
    sample.save(options.output / "sample.png")


if __name__ == "__main__":
    main()
