"""Define the training arguments: transformers' TrainingArguments with RF-DETR's defaults and fields."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from .lora import DEFAULT_RANK


@dataclass
class RfDetrTrainingArguments(TrainingArguments):
    """Extend `TrainingArguments` by RF-DETR's published training settings, as defaults and as further fields.

    All fields of `TrainingArguments` can be set. Some have other defaults: 4 images in a micro-batch, 4 micro-batches
    in an optimizer step, 100 epochs, AdamW at 1e-4 with weight decay 1e-4, gradients clipped at a norm of 0.1, bf16
    (else fp16) on a GPU, evaluation and checkpoint once an epoch, the newest and the best checkpoint kept, the best one
    by mask AP (box AP for detection) loaded at the end, a log entry every 10 steps, no columns removed from the
    samples. If evaluation or checkpoints are not once an epoch, `load_best_model_at_end` is False unless it is set.

    Args:
        learning_rate_encoder: Learning rate of DINOv2, which the following decays multiply.
        layer_decay: Factor of the learning rate from one block of DINOv2 to the block before it, in (0, 1].
        component_decay: Factor of the decoder's learning rate, in (0, 1]; its square is the factor for DINOv2.
        lr_scheduler_type: "step", which is "constant_with_warmup" with one drop; or another schedule of transformers,
            such as "cosine". `warmup_steps` is the length of a linear warm-up.
        lr_drop_epochs: Epochs after which "constant_with_warmup" drops to a tenth, 100 by default. Raise it with the
            number of epochs if the drop is to come later.
        ema: Whether to keep an exponential moving average (EMA) of the weights. The EMA weights are evaluated, saved in
            every checkpoint, and in the model after training.
        ema_decay: Decay of the EMA after many optimizer steps, in [0, 1).
        ema_tau: Optimizer steps after which the decay has reached 63 % of `ema_decay`.
        eval_base_model: Whether to evaluate the weights without EMA too, as `eval_base_*`.
        eval_score_threshold: Score that a detection must exceed to be evaluated. COCO's metrics have no threshold; any
            value but 0 is mentioned in the log and the model card.
        eval_max_detections: Number of detections per image and class for additional metrics, such as
            `eval_segm_AP_300`, for images with more than 100 objects.
        eval_confidence: Level of the confidence intervals, in (0, 1), that an evaluation after training returns as
            `eval_intervals` and the model card shows, if there are at least 10 images; None computes none.
        early_stopping: Whether to stop when the metric for the best model stops improving.
        early_stopping_patience: Evaluations without an improvement after which training stops.
        early_stopping_min_delta: Change of the metric that an improvement must exceed.
        early_stopping_use_ema: Whether to compare only the metric of the EMA weights; otherwise the better of EMA and
            base weights.
        class_balance: Repeat images with rare classes, by the repeat factors of LVIS: an image whose rarest class is in
            a fraction f of the images is read sqrt(`class_balance` / f) times in an epoch, if that is more than once.
            A value of 0.1 repeats classes in fewer than 10 % of the images; None repeats none.
        multi_scale: Whether each optimizer step draws its resolution at random, up to 5 blocks (patch size x windows)
            above and below the model's.
        drop_path: Stochastic depth of DINOv2's last block, in [0, 1); the configuration's by default.
        freeze_backbone: Whether to keep the weights of DINOv2 unchanged.
        lora: Rank of LoRA adapters of the attention of DINOv2, whose other weights are not changed. True is 16, 0 is no
            LoRA. Adapters learn at `learning_rate`. Model folders contain the merged weights, and in `adapter/` the
            adapter for peft.
        non_finite_loss: What to do if the loss or the gradient of an optimizer step is NaN or infinite. "stop" ends the
            run and names the images. "skip" discards the step with a warning, and ends the run after 10 in a row.
            Neither changes the weights.

    Several processes on a machine without a GPU train on its CPUs: `use_cpu` is then True.

    Raises:
        ValueError: a value is out of its range; or transformers cannot divide the work among the processes of the run.
    """

    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 100
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 0.1
    lr_scheduler_type: str = "step"
    bf16: bool | None = None
    fp16: bool = False
    data_seed: int | None = None
    dataloader_pin_memory: bool = True
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool | None = None
    metric_for_best_model: str | None = None
    eval_steps: float | None = None
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    eval_do_concat_batches: bool = False
    dataloader_num_workers: int = 2
    ddp_find_unused_parameters: bool | None = False

    learning_rate_encoder: float = 1.5e-4
    layer_decay: float = 0.8
    component_decay: float = 0.7
    lr_drop_epochs: float = 100
    ema: bool = True
    ema_decay: float = 0.993
    ema_tau: float = 100.0
    eval_base_model: bool = False
    eval_score_threshold: float = 0.0
    eval_max_detections: int = 100
    eval_confidence: float | None = 0.95
    early_stopping: bool = False
    early_stopping_patience: int = 10
    early_stopping_min_delta: float = 0.001
    early_stopping_use_ema: bool = False
    class_balance: float | None = None
    multi_scale: bool = True
    drop_path: float | None = None
    freeze_backbone: bool = False
    lora: int = 0
    non_finite_loss: str = "stop"

    def __post_init__(self) -> None:
        for name, is_valid, rule in (
            ("num_train_epochs", self.num_train_epochs > 0 or self.max_steps > 0, "above 0"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ("learning_rate", 0 <= self.learning_rate < math.inf, "a finite number of at least 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"),
            ("dataloader_num_workers", self.dataloader_num_workers >= 0, "at least 0, where 0 reads in this process"),
            ("seed", 0 <= self.seed < 1 << 32, "at least 0 and below 2**32"),
            ("learning_rate_encoder", self.learning_rate_encoder >= 0, "at least 0"),
            ("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1], where 1 is no decay"),
            ("component_decay", 0 < self.component_decay <= 1, "in (0, 1], where 1 is no decay"),
            ("lr_drop_epochs", self.lr_drop_epochs > 0, "above 0"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("ema_tau", self.ema_tau >= 0, "at least 0"),
            ("eval_score_threshold", 0 <= self.eval_score_threshold < 1, "in [0, 1)"),
            ("eval_max_detections", self.eval_max_detections >= 1, "at least 1"),
            ("eval_confidence", self.eval_confidence is None or 0 < self.eval_confidence < 1, "in (0, 1)"),
            ("early_stopping_patience", self.early_stopping_patience >= 1, "at least 1"),
            ("early_stopping_min_delta", self.early_stopping_min_delta >= 0, "at least 0"),
            ("class_balance", self.class_balance is None or 0 < self.class_balance <= 1, "in (0, 1]"),
            ("drop_path", self.drop_path is None or 0 <= self.drop_path < 1, "in [0, 1)"),
            ("lora", self.lora >= 0, "a rank, True or 0"),
            ("freeze_backbone", not (self.lora and self.freeze_backbone), "False with `lora`, which freezes DINOv2"),
            ("non_finite_loss", self.non_finite_loss in ("stop", "skip"), "'stop' or 'skip'"),
            ("early_stopping", not self.early_stopping or self.eval_strategy != "no", "False without eval_strategy"),
            ("deepspeed", not self.deepspeed, "None. FSDP can shard the EMA weights"),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        if self.lora is True:
            self.lora = DEFAULT_RANK
        # Without an accelerator, accelerate counts the processes of the run only if it is told to use the CPU.
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported(including_emulation=False)
            self.fp16 = self.fp16 or (on_gpu and not self.bf16)
        self.dataloader_pin_memory &= torch.cuda.is_available() and not self.use_cpu
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = "epoch" == self.eval_strategy == self.save_strategy
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.save_steps  # transformers' own choice, logging_steps, is too often for mask AP
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "loss" if self.prediction_loss_only else "segm_AP"
        if self.metric_for_best_model.removeprefix("eval_").startswith("base_"):
            raise ValueError(
                "`metric_for_best_model` must be a metric without base_, got"
                f" {self.metric_for_best_model!r}. eval_base_model=True compares EMA and base weights."
            )
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the images must not depend on random numbers drawn before the run
        # A resumed run must continue the count of evaluations without an improvement.
        self.restore_callback_states_from_checkpoint |= self.early_stopping
        if self.lr_scheduler_type == "step":
            self.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
        super().__post_init__()
        self._check_processes()

    def _check_processes(self) -> None:
        """Raise a ValueError if each process would train on all images, and write the files of the others."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        if (num_processes := torch.distributed.get_world_size()) > 1 and self.world_size == 1:
            raise ValueError(
                f"`world_size` must be the number of processes of torch.distributed, {num_processes}, got 1 with"
                f" use_cpu={self.use_cpu}. Start the processes with torchrun; to train on CPUs, set use_cpu=True"
                " (on the command line, --device cpu)."
            )


def best_key(args: RfDetrTrainingArguments) -> str:
    """Return the name of the metric for the best model in the log."""
    return "eval_" + args.metric_for_best_model.removeprefix("eval_")


def non_ema_key(key: str) -> str:
    """Return the name of a metric of the weights without EMA."""
    return key.replace("eval_", "eval_base_", 1)


def note_on_metrics(args: RfDetrTrainingArguments) -> str | None:
    """Return a note on `eval_score_threshold` for readers of the metrics, or None if it is 0."""
    if not args.eval_score_threshold:
        return None
    return (
        f"Detections up to a score of {args.eval_score_threshold} (`eval_score_threshold`) are not evaluated, so the AP"
        " is not COCO's, which has no threshold."
    )


def best_of_ema_and_base(args: RfDetrTrainingArguments, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics whose metric for the best model is the better of EMA and base weights, if both are known."""
    key = best_key(args)
    if non_ema_key(key) not in metrics:
        return metrics
    return {**metrics, key: (max if args.greater_is_better else min)(metrics[key], metrics[non_ema_key(key)])}
