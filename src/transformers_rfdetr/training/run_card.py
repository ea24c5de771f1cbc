"""What the model card says about a training run: its settings, its metrics, images with predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import TrainerState
from transformers.trainer_utils import SchedulerType

from ..data.dataset import InstanceDataset
from ..data.drawing import draw_annotations, draw_instances
from ..inference.predict import own_threshold, predict
from .arguments import RfDetrTrainingArguments, best_key, best_of_ema_and_base, non_ema_key

_MAX_SIDE = 480  # pixels of an image on the card


def training_settings(
    args: RfDetrTrainingArguments, state: TrainerState, start: str, sizes: Sequence[tuple[int, int]], augmentation: Any
) -> dict[str, Any]:
    """Return names and values of the settings that reproduce the run.

    Args:
        args: Arguments of the run.
        state: State of the run, which says how long it was.
        start: Name or folder of the checkpoint that was fine-tuned; empty if there was none.
        sizes: (height, width) that optimizer steps drew from; empty for the model's own.
        augmentation: Augmentation of training samples, or the name of its recipe.
    """
    images_in_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sides = ", ".join(str(size if size[0] != size[1] else size[0]) for size in sizes)
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.lr_scheduler_type == SchedulerType.CONSTANT_WITH_WARMUP:
        schedule = f"divided by 10 after {args.lr_drop_epochs:g} epochs"
    return {
        **({"started from": "/".join(Path(start).parts[-2:])} if start else {}),  # not the whole path
        "epochs": f"{state.epoch or 0:g}",
        "optimizer steps": state.global_step,
        "images in an optimizer step": images_in_step,
        "learning rate": f"{args.learning_rate:g}, {args.learning_rate_encoder:g} for DINOv2",
        "decay of the learning rate": f"{args.layer_decay:g} a block of DINOv2, {args.component_decay:g} a component",
        **({"LoRA": f"rank {args.lora}, of the attention of DINOv2"} if args.lora else {}),
        "schedule": schedule,
        "weight decay": f"{args.weight_decay:g}",
        "maximum gradient norm": f"{args.max_grad_norm:g}",
        "EMA of the weights": f"decay {args.ema_decay:g}, tau {args.ema_tau:g}" if args.ema else "none",
        "resolution": f"drawn from {sides}" if sides else "the model's",
        **({"class balance": f"{args.class_balance:g}"} if args.class_balance is not None else {}),
        "augmentation": _name_augmentation(augmentation),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


def _name_augmentation(augmentation: Any) -> str:
    if augmentation is None or isinstance(augmentation, str):
        return augmentation or "none"
    return type(augmentation).__name__


def metrics_of_run(
    args: RfDetrTrainingArguments, state: TrainerState, splits: Sequence[str], class_metric: str
) -> dict[str, dict[str, Any]]:
    """Return, for each evaluated split, the metrics that the log has for the weights which the run kept.

    Args:
        args: Arguments of the run.
        state: State of the run, with its log. Entries after the end of training are ignored.
        splits: Names of the evaluated splits; "" for one without a name.
        class_metric: The metric that is logged for each class: "segm_AP" or "bbox_AP".
    """
    history = state.log_history
    ends = [index for index, entry in enumerate(history) if "train_runtime" in entry]
    history = history[: ends[-1]] if ends else history
    key = best_key(args)
    entries = [entry for entry in history if key in entry]
    if not entries:
        return {}
    sign = 1 if args.greater_is_better else -1
    chosen = entries[-1]
    if args.load_best_model_at_end:
        chosen = max(entries, key=lambda entry: sign * best_of_ema_and_base(args, entry)[key])
    step = chosen["step"]
    flat = {name: value for entry in history if entry.get("step") == step for name, value in entry.items()}
    is_base = best_of_ema_and_base(args, flat)[key] != flat[key]
    is_kept = args.load_best_model_at_end or step == state.global_step
    results = {}
    for split in splits:
        prefix = f"eval_{split}_" if split else "eval_"
        prefix = non_ema_key(prefix) if is_base else prefix
        metrics = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
        metrics["per_class"] = {
            name.removeprefix(f"{class_metric}/"): {class_metric: value}
            for name, value in metrics.items()
            if name.startswith(f"{class_metric}/")
        }
        results[(split or "validation") + ("" if is_kept else f" at optimizer step {step}")] = metrics
    return results


def describe_drawn(config: Any) -> str:
    """Return which predictions [`draw_examples`] draws."""
    threshold = own_threshold(config)
    return f"predictions with a score above {'the threshold of its class' if threshold == 'calibrated' else threshold}"


def draw_examples(model: Any, processor: Any, dataset: Any, count: int) -> list[tuple[Image.Image, Image.Image]]:
    """Return the first images with objects, each with its ground truth and with predictions drawn on it.

    Crowds are not drawn. The longer side of the images is reduced to 480 pixels.

    Args:
        model: A model, of which predictions with a score above its calibrated thresholds or 0.5 are drawn.
        processor: Its image processor.
        dataset: An [`InstanceDataset`]; other datasets give no images.
        count: Number of images, which are looked for among the first 16 times as many.
    """
    if not isinstance(dataset, InstanceDataset):
        return []
    samples: list[dict[str, Any]] = []
    for index in range(min(len(dataset), 16 * count)):
        if len(samples) < count:
            sample = dataset[index]
            samples += [sample] * bool(sample["annotations"])
    if not samples:
        return []
    found = predict(model, processor, [sample["image"] for sample in samples], threshold=own_threshold(model.config))
    names = model.config.id2label
    rows = []
    for sample, instances in zip(samples, found, strict=True):
        image, has_masks = sample["image"], instances.masks is not None
        objects = [one for one in sample["annotations"] if not one["iscrowd"]]
        if not has_masks:
            objects = [one | {"segmentation": None} for one in objects]
        ground_truth = draw_annotations(image, objects, names, **_style([one["category_id"] for one in objects], names))
        boxes = None if has_masks else instances.boxes
        labels = instances.labels.tolist()
        predicted = draw_instances(image, instances.masks, boxes, **_style(labels, names))
        rows.append((_shrink(ground_truth), _shrink(predicted)))
    return rows


def _shrink(image: Image.Image) -> Image.Image:
    small = image.copy()
    small.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    return small


def _style(labels: Sequence[int], names: dict[int, str]) -> dict[str, Any]:
    """Return names and a color for each class, or for each object of a single class."""
    if len(names) == 1:
        return {"labels": None, "color_indices": None}
    return {"labels": [names[label] for label in labels], "color_indices": labels}
