"""`python -m transformers_rfdetr.cli.demo`: fine-tuning from data to a saved model, on images that are drawn here."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForInstanceSegmentation
from transformers.utils import logging

from .. import (
    FlipAndCrop,
    InstanceDataset,
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrImageProcessor,
    RfDetrTrainer,
    RfDetrTrainingArguments,
    evaluate_instance_segmentation,
    load_instance_dataset,
)
from ..atomic_files import atomic_file, write_text
from ..data.drawing import draw_grid, draw_instances
from ..data.synthetic import draw_scene
from ..model.masks import rasterize, read_segmentation
from .evaluate import format_numbers

_SIZE = 96
_VALIDATION_SEED = 1_000_000  # the first one; training images are drawn from 0 on
_NUM_SHOWN = 6
# From random weights every part learns at one rate, and faster than in fine-tuning.
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
_THRESHOLD = 0.3  # of the instances that are drawn; a short training is not sure of anything


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line by default.

    Returns:
        The exit code: 0, or 2 after one line on stderr that says what was wrong with the arguments.
    """
    options = _parse(arguments)
    started = time.perf_counter()
    try:
        data = _draw_data(options.output / "data", {"train": options.train, "valid": options.validation})
    except (OSError, ValueError) as error:
        print("demo:", *str(error).splitlines()[:1], file=sys.stderr)
        return 2
    model = _build_model(options.seed, data.id2label)
    trainer = RfDetrTrainer(
        model,
        _recipe(options.output / "run", options.steps, options.seed, options.train),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        augmentation=FlipAndCrop(crop=0.0, turn=0.75),  # seen from above there is no up or down
    )
    trainer.train()
    saved = options.output / "model"
    trainer.save_model(str(saved))

    # What follows is all that a user of the saved folder needs.
    model = AutoModelForInstanceSegmentation.from_pretrained(saved)
    processor = RfDetrImageProcessor.from_pretrained(saved)
    numbers = evaluate_instance_segmentation(model, processor, data["validation"])
    print(format_numbers(numbers))
    image = options.output / "predictions.png"
    with atomic_file(image) as partial:
        _draw_predictions(model, processor, data["validation"]).save(partial, "PNG")
    write_text(options.output / "metrics.json", json.dumps(numbers, indent=1))
    print(
        f"{time.perf_counter() - started:.0f} s. The model is in {saved}, its predictions beside the ground truth in "
        f"{image}, the data in {options.output / 'data'}"
    )
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m transformers_rfdetr.cli.demo",
        description="Draw aerial images of buildings, train a small RF-DETR-Seg on them from scratch, evaluate it on "
        "others, save it, load it back and draw what it finds.",
        epilog="example: python -m transformers_rfdetr.cli.demo --seed 1 --output demo/seed1",
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for all results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of training (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="updates of 16 images (%(default)s)")
    parser.add_argument("--train", type=int, default=1024, help="images to train on (%(default)s)")
    parser.add_argument("--validation", type=int, default=96, help="held-out images (%(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("seed", 0), ("steps", 1), ("train", 16), ("validation", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}")
    return options


def _draw_data(folder: Path, counts: dict[str, int]) -> Any:
    """Draw the images into a folder as Roboflow exports them, and load it as such."""
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        first = _VALIDATION_SEED if split == "valid" else 0
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for seed in logging.tqdm(range(first, first + count), desc=f"Drawing {split}"):
            image, objects = draw_scene(seed, (_SIZE, _SIZE), metres_per_pixel=0.5)
            name = f"{seed:07d}.png"
            image.save(folder / split / name)
            images.append({"id": seed, "file_name": name, "height": _SIZE, "width": _SIZE})
            annotations += [{**item, "id": len(annotations) + i} for i, item in enumerate(objects, start=1)]
        coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "building"}]}
        write_text(folder / split / "_annotations.coco.json", json.dumps(coco))
    return load_instance_dataset(folder)


def small_config(backbone: dict[str, Any], **settings: Any) -> RfDetrConfig:
    """RF-DETR-Seg in small, 2.5 M parameters, that learns from random weights on a CPU.

    Args:
        backbone: What depends on the images: heads, `image_size`, `patch_size`, `num_windows`, `out_indices`.
        **settings: Of the configuration: queries, groups, classes, ...
    """
    return RfDetrConfig(
        backbone_config={"hidden_size": 128, "num_hidden_layers": 6, **backbone},
        d_model=128,
        decoder_layers=2,
        decoder_ffn_dim=256,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=8,
        **settings,
    )


def _build_model(seed: int, id2label: dict[int, str]) -> RfDetrForInstanceSegmentation:
    config = small_config(
        {
            "num_attention_heads": 2,
            "image_size": _SIZE,
            "patch_size": 12,
            "num_windows": 1,
            "out_indices": [2, 3, 4, 6],
        },
        num_queries=12,
        group_detr=5,
        mask_point_sample_ratio=4,  # of 24 x 24 cells
        id2label=id2label,
    )
    torch.manual_seed(seed)
    return RfDetrForInstanceSegmentation(config)


def _recipe(folder: Path, steps: int, seed: int, num_images: int) -> RfDetrTrainingArguments:
    steps_between = max(1, steps // 4)
    return RfDetrTrainingArguments(
        str(folder),
        num_train_epochs=steps * 16 / num_images,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
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


def _draw_predictions(
    model: RfDetrForInstanceSegmentation, processor: RfDetrImageProcessor, data: InstanceDataset
) -> Image.Image:
    """Rows of three: a held-out image, its ground truth, what the model finds."""
    rows = []
    for index in range(min(_NUM_SHOWN, len(data))):
        sample = data[index]
        image = sample["image"]
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        [found] = processor.post_process_instance_segmentation(
            outputs, _THRESHOLD, target_sizes=[image.size[::-1]], return_binary_maps=True
        )
        shapes = [read_segmentation(item["segmentation"], (_SIZE, _SIZE)) for item in sample["annotations"]]
        truth = rasterize(shapes, (_SIZE, _SIZE), (_SIZE, _SIZE))
        scores = [segment["score"] for segment in found["segments_info"]]
        large = image.resize((3 * _SIZE, 3 * _SIZE), Image.Resampling.BICUBIC)
        row = [large]
        for masks, values in ((truth, None), (found["segmentation"], scores)):
            wide = np.asarray(masks, bool).reshape(-1, _SIZE, _SIZE).repeat(3, axis=1).repeat(3, axis=2)
            row.append(draw_instances(large, wide, scores=values))
        rows.append(row)
    return draw_grid(rows, ["image", "ground truth", "found"])


if __name__ == "__main__":
    sys.exit(main())
