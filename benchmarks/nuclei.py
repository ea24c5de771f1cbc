"""Fine-tune rf-detr-seg-tiny on microscopy images of nuclei, on the CPU: `python benchmarks/nuclei.py FOLDER`.

FOLDER contains `train.json` (92 images) and `val.json` (28 images) in COCO format, and `images/`, all from stage 1 of
the 2018 Data Science Bowl (https://bbbc.broadinstitute.org/BBBC038). `MORE_RESULTS.md` has the result.
"""

import argparse
import time
from pathlib import Path

from transformers import set_seed

from transformers_rfdetr import FlipAndCrop, RfDetrTrainer, load, load_instance_dataset
from transformers_rfdetr.cli.demo import fine_tuning_arguments


def main() -> None:
    """Train, and print the metrics on the held-out images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", default="runs/nuclei")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 4 images")
    parser.add_argument("--resolution", type=int, default=192)
    parser.add_argument("--num-queries", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    files = {"train": options.folder / "train.json", "validation": options.folder / "val.json"}
    data = load_instance_dataset(files, image_folder=options.folder / "images")
    set_seed(options.seed)  # for the heads of the new class
    model, processor = load(
        "rf-detr-seg-tiny",
        id2label=data.id2label,
        resolution=options.resolution,
        num_queries=options.num_queries,
        group_detr=3,
    )
    arguments = fine_tuning_arguments(Path(options.output), options.steps, options.seed)
    trainer = RfDetrTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=processor,
        augmentation=FlipAndCrop(crop=0.9, crop_sides=(180, 500), rotate=0.75),
    )
    trainer.train()
    numbers = trainer.evaluate()
    for name in ("segm_AP50", "segm_AP", "segm_AP75", "bbox_AP50", "bbox_AP", "mean_iou"):
        print(f"{name:<12} {numbers[f'eval_{name}']:.3f}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
