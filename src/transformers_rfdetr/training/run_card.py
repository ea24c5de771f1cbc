"""What the model card says of a training run: its recipe, its numbers, pictures of what it finds."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import TrainerState
from transformers.trainer_utils import SchedulerType

from ..data.dataset import InstanceDataset
from ..data.drawing import draw_annotations, draw_instances
from ..inference.predict import predict
from .arguments import RfDetrTrainingArguments, best_key, best_of_ema_and_base, non_ema_key

DRAWN_SCORE = 0.5
_LONGEST = 480  # side of a picture on the card, in pixels
_MOST_NAMES = 10  # of objects in a picture, so that something is left to see


def recipe_of(
    args: RfDetrTrainingArguments, state: TrainerState, sizes: Sequence[tuple[int, int]], augmentation: Any
) -> dict[str, Any]:
    """What was set -> its value.

    Args:
        args: Of the run.
        state: How far it came.
        sizes: (height, width) of which every update drew one; none for the model's own.
        augmentation: Of training samples.
    """
    sides = ", ".join(str(size if size[0] != size[1] else size[0]) for size in sizes)
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.lr_scheduler_type == SchedulerType.CONSTANT_WITH_WARMUP:
        schedule = f"a tenth after {args.lr_drop_epochs:g} epochs"
    return {
        "epochs": f"{state.epoch or 0:g}",
        "updates": state.global_step,
        "pictures of an update": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": f"{args.learning_rate:g}, of DINOv2 {args.learning_rate_encoder:g}",
        "decay of the rate": f"{args.layer_decay:g} a block of DINOv2, {args.component_decay:g} a component",
        "schedule": schedule,
        "weight decay": f"{args.weight_decay:g}",
        "largest gradient norm": f"{args.max_grad_norm:g}",
        "average of the weights": f"decay {args.ema_decay:g}, tau {args.ema_tau:g}" if args.ema else "none",
        "resolution": f"drawn from {sides}" if sides else "the model's",
        "augmentation": "none" if augmentation is None else type(augmentation).__name__,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


def numbers_of(
    args: RfDetrTrainingArguments, state: TrainerState, splits: Sequence[str], kind: str
) -> dict[str, dict[str, Any]]:
    """What was measured on -> numbers of the weights that a run left in the model, as its log has them.

    Args:
        args: Of the run.
        state: With the log; what comes after the end of training is not looked at.
        splits: Names of the evaluated data sets; "" for one without a name.
        kind: The metric that is logged for each class: "segm_AP" or "bbox_AP".
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
    is_final = args.load_best_model_at_end or step == state.global_step
    results = {}
    for split in splits:
        prefix = f"eval_{split}_" if split else "eval_"
        prefix = non_ema_key(prefix) if is_base else prefix
        numbers = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
        numbers["per_class"] = {
            name.removeprefix(f"{kind}/"): {kind: value}
            for name, value in numbers.items()
            if name.startswith(f"{kind}/")
        }
        results[(split or "validation") + ("" if is_final else f" at update {step}")] = numbers
    return results


def draw_examples(model: Any, processor: Any, dataset: Any, count: int) -> list[tuple[Image.Image, Image.Image]]:
    """The first pictures with objects: with the ground truth, crowds left out, and with what the model finds.

    Each is reduced to 480 pixels on its longer side.

    Args:
        model: Of which predictions with a score above 0.5 are drawn.
        processor: Its image processor.
        dataset: An [`InstanceDataset`]; there are no pictures of others.
        count: Of pictures, which are looked for among the first 16 times as many.
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
    found = predict(model, processor, [sample["image"] for sample in samples], threshold=DRAWN_SCORE)
    names = model.config.id2label
    rows = []
    for sample, instances in zip(samples, found, strict=True):
        image, has_masks = sample["image"], instances.masks is not None
        objects = [one for one in sample["annotations"] if not one["iscrowd"]]
        if not has_masks:
            objects = [one | {"segmentation": None} for one in objects]
        truth = draw_annotations(image, objects, names, **_style([one["category_id"] for one in objects], names))
        boxes = None if has_masks else instances.boxes
        labels = instances.labels.tolist()
        predicted = draw_instances(image, instances.masks, boxes, **_style(labels, names))
        rows.append((_reduced(truth), _reduced(predicted)))
    return rows


def _reduced(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    return small


def _style(labels: Sequence[int], names: dict[int, str]) -> dict[str, Any]:
    """A colour for each class, or for each object of a single class; names where they do not hide the picture."""
    if len(names) == 1:
        return {"labels": None, "color_indices": None}
    titles = [names[label] for label in labels] if len(labels) <= _MOST_NAMES else None
    return {"labels": titles, "color_indices": labels}
