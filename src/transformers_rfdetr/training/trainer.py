"""Fine-tune with transformers' Trainer, RF-DETR's training settings, and streamed evaluation.

RfDetrTrainer adds to Trainer: losses normalized by the objects of all micro-batches and processes, an exponential
moving average (EMA) of the weights, which is evaluated, an image size drawn for each optimizer step, compact records
instead of masks in evaluation, and resuming with the same numbers as a run that was not interrupted.
"""

import copy
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import logging

from ..data.dataset import InstanceDataset, as_instance_dataset
from ..data.prepared import FollowEpoch, PreparedDataset, collate_fn
from ..data.streams import InstanceStream, PreparedStream, collate_unless_skipped
from ..evaluation.coco_summary import metric_names
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from .arguments import RfDetrTrainingArguments, best_key, note_on_metrics
from .callbacks import BestMetricStopping, ShortProgress, TrainingEvents
from .checkpoints import BestModels
from .data_setup import (
    check_evaluated_objects,
    check_image_size,
    check_splits,
    check_training_objects,
    match_classes,
    unprepared,
)
from .distributed import start_sum
from .faults import NonFiniteGuard, discard_gradients
from .lora import add_lora
from .loss_log import LOSS_TERMS, LossLog
from .optimization import parameter_groups, resize_batch, step_schedule, training_sizes
from .run_upload import UploadingTrainer
from .weight_average import WeightAverage

logger = logging.get_logger(__name__)


class RfDetrTrainer(UploadingTrainer):
    """Train RF-DETR with its published settings, and evaluate it as COCO does.

    Example:
        >>> from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation
        >>> from transformers_rfdetr import RfDetrTrainer, RfDetrTrainingArguments, load_instance_dataset
        >>> data = load_instance_dataset("merve/satellite-building-segmentation")  # doctest: +SKIP
        >>> model = AutoModelForInstanceSegmentation.from_pretrained(  # doctest: +SKIP
        ...     "Roboflow/rf-detr-seg-medium", id2label=data.id2label, ignore_mismatched_sizes=True
        ... )
        >>> trainer = RfDetrTrainer(  # doctest: +SKIP
        ...     model,
        ...     RfDetrTrainingArguments("runs/buildings", num_train_epochs=10),
        ...     train_dataset=data["train"],
        ...     eval_dataset=data["validation"],
        ... )
        >>> trainer.train()  # doctest: +SKIP

    Evaluation returns the metrics of [`InstanceSegmentationEvaluator`] as `eval_segm_AP`, ..., and `eval_loss`, the
    loss divided by the objects of the whole dataset. They do not depend on the batch size and number of processes.
    The output folder contains `best_ema/`, with `eval_base_model` also `best_regular/`, and `best_total/`, the better
    of the two. `from_pretrained` loads these and every checkpoint; the weights are the evaluated EMA weights.

    Args:
        model: An RF-DETR model of this package.
        args: The training arguments.
        data_collator: [`collate_fn`] by default.
        train_dataset: An [`InstanceDataset`], a `Subset` or `ConcatDataset` of them, or an [`InstanceStream`], which
            the trainer prepares and augments; or a dataset of samples that the processor has prepared.
        eval_dataset: An [`InstanceDataset`], or a `Subset` or `ConcatDataset` of them; a `datasets.Dataset` with an
            objects column and a transform that prepares it; or, with `eval_annotations`, any dataset of prepared
            samples. Or a dictionary of these.
        processing_class: The image processor; by default one for the model's `config.resolution`.
        augmentation: Augmentation of training samples: "default" (that of rfdetr), "aerial", "microscopy", "strong" or
            "none", see `data/recipes.py`; a callable, see `data/augmentation.py`; or a torchvision.transforms.v2
            pipeline.
        eval_annotations: The ground truth of prepared samples, a COCO dictionary. `image_id` in the labels of a sample
            is an image id, and its class labels are category ids.
        **kwargs: Other arguments of `Trainer`. `compute_metrics` is refused, because it would need all masks in memory.

    Raises:
        ValueError: several GPUs in one process; an image size that is not a multiple of patch size x windows; a dataset
            whose classes are not the model's; training data without an object, or for a segmentation model without a
            mask; evaluation data from which the metric for the best model cannot be computed.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: RfDetrTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: RfDetrImageProcessor | None = None,
        *,
        augmentation: Any = "default",
        eval_annotations: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        args = _checked_arguments(args, kwargs, train_dataset, eval_dataset)
        check_splits(train_dataset, eval_dataset)
        self.augmentation, self.eval_annotations = augmentation, eval_annotations
        self.weight_average: WeightAverage | None = None
        self.best_models = BestModels(args)
        self.measured: dict[str, dict[str, Any]] = {}
        # Returns the objects in all micro-batches of the current optimizer step.
        self._num_objects: Callable[[], Tensor] | None = None
        self._is_step_taken = True
        super().__init__(
            model,
            args,
            data_collator=data_collator or collate_fn,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._set_up_model_and_data()
        self.reset_losses()
        for callback in list(self.callback_handler.callbacks):
            if type(callback) is ProgressCallback:  # not a subclass, which the user passed
                self.remove_callback(callback)
                self.add_callback(ShortProgress)
        self.add_callback(TrainingEvents(self))
        self.add_callback(FollowEpoch)
        if args.early_stopping:
            self.add_callback(BestMetricStopping(args.early_stopping_patience, args.early_stopping_min_delta))

    # -- set-up ------------------------------------------------------------------------------------------------------

    def _set_up_model_and_data(self) -> None:
        args = self.args
        if not hasattr(self.model, "set_drop_path"):
            raise ValueError(
                "`model` must be a model of transformers_rfdetr, got"
                f" {type(self.model).__module__}.{type(self.model).__name__}. `import transformers_rfdetr` before"
                " from_pretrained loads it."
            )
        if self.processing_class is None:
            self.processing_class = RfDetrImageProcessor.from_config(self.model.config)
        check_image_size(self.processing_class, self.model.config)
        if not self.has_masks:
            args.metric_for_best_model = args.metric_for_best_model.replace("segm_", "bbox_")
        if note := note_on_metrics(args):
            logger.warning(note)
        self.sizes = self._training_sizes() if args.multi_scale else []
        self.train_dataset = self._prepare_training(self.train_dataset)
        self._set_up_model()
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self.prepare_evaluation(part) for name, part in self.eval_dataset.items()}
        else:
            self.eval_dataset = self.prepare_evaluation(self.eval_dataset)
        if args.eval_strategy != "no":
            self._check_metric()

    def _check_metric(self) -> None:
        """Raise ValueError if the evaluation does not compute `metric_for_best_model`."""
        name = best_key(self.args).removeprefix("eval_")
        known = ["loss"]
        if not self.args.prediction_loss_only:
            known += metric_names(self.has_masks, self.args.eval_max_detections)
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for split, dataset in splits.items():
            metric = name.removeprefix(f"{split}_")
            if metric == "loss":
                return
            if metric in known or metric.startswith(f"{self.class_metric}/"):
                check_evaluated_objects(unprepared(dataset), metric)
                return
        raise ValueError(
            f"`metric_for_best_model` must be one of {', '.join(known)}, or {self.class_metric}/<class>, got"
            f" {self.args.metric_for_best_model!r}. Omit it for the AP."
        )

    def _set_up_model(self) -> None:
        if isinstance(self.train_dataset, PreparedDataset | PreparedStream):
            match_classes(self.model.config, unprepared(self.train_dataset), keep_category_ids=True)
        if self.args.freeze_backbone:
            self.model.freeze_backbone()
        if self.args.lora:
            if self.is_fsdp_enabled:
                raise ValueError(f"`lora` must be 0 with FSDP, got {self.args.lora}. Use DDP instead.")
            add_lora(self.model, self.args.lora)
        if self.args.drop_path is not None:
            self.model.set_drop_path(self.args.drop_path)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new model of `model_init`, set up like the first one."""
        model = super().call_model_init(trial)
        if hasattr(self, "sizes"):
            self.model = model
            self._set_up_model()
        return model

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, Any]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Search for better training arguments, with a new model of `model_init` in each trial.

        Args:
            hp_space: Function from a trial to training arguments. The datasets are prepared once, so that `seed`,
                `multi_scale` and `class_balance` of the data are those that the trainer was made with.
            compute_objective: Function from the metrics of an evaluation to the objective. By default it returns the
                metric for the best model. The objective of a trial is that of its last evaluation.
            n_trials: Number of trials.
            direction: "maximize" or "minimize"; by default that of the metric for the best model.
            **kwargs: Other arguments of `Trainer.hyperparameter_search`, such as `backend="optuna"`.

        Returns:
            The best run: `run_id`, `objective` and `hyperparameters`.
        """
        if compute_objective is None:
            compute_objective = operator.itemgetter(best_key(self.args))
            direction = direction or ("maximize" if self.args.greater_is_better else "minimize")
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction or "minimize", **kwargs)

    # -- data --------------------------------------------------------------------------------------------------------

    def _names_of(self, image_ids: Sequence[int]) -> list[str]:
        dataset = unprepared(self.train_dataset)
        if isinstance(dataset, InstanceDataset):
            return dataset.names_of(image_ids)
        return [f"image_id {image_id}" for image_id in image_ids]

    def _training_sizes(self) -> list[tuple[int, int]]:
        size, backbone = self.processing_class.size, self.model.config.backbone_config
        if "height" not in size:
            raise ValueError(
                f"`size` of the image processor must have height and width if `multi_scale` is set, got {size}. Pass"
                " multi_scale=False."
            )
        return training_sizes((size["height"], size["width"]), backbone.patch_size * backbone.num_windows)

    def _prepare_training(self, dataset: Any) -> Any:
        dataset = as_instance_dataset(dataset)
        if dataset is not None:
            check_training_objects(unprepared(dataset), self.has_masks)
        balance = self.args.class_balance
        if balance is not None and not isinstance(dataset, InstanceDataset):
            raise ValueError(
                "`class_balance` requires a `train_dataset` that is read into memory by load_instance_dataset, got"
                f" {type(dataset).__name__}. Load it without streaming and do not prepare it, or pass"
                " class_balance=None."
            )
        if not isinstance(dataset, InstanceDataset | InstanceStream):
            return dataset
        processor = copy.copy(self.processing_class)
        if self.sizes:  # images are prepared at the largest size, and batches are resized on the device
            processor.size = dict(zip(("height", "width"), self.sizes[-1], strict=True))
        if isinstance(dataset, InstanceStream) and self.args.save_strategy == SaveStrategy.EPOCH:
            logger.warning(
                "A stream has no epochs: save_strategy='epoch' writes one checkpoint, after max_steps. Pass"
                " save_strategy='steps'."
            )
        options = {"augmentation": self.augmentation, "seed": self.args.seed, "masks": self.has_masks and "cropped"}
        if balance is not None:
            options["class_balance"] = balance
        return dataset.with_processor(processor, **options)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Return batches of prepared training samples."""
        if not isinstance(self.train_dataset, PreparedStream):
            return super().get_train_dataloader()
        # The base class skips the batches of an interrupted run: of these, whole ones of each worker are not prepared.
        num_batches = self.num_passed_batches() // max(self.args.dataloader_num_workers, 1)
        self.train_dataset.num_skipped = num_batches * self.train_batch_size
        # Each process reads its own shard, which accelerate would divide again.
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.train_batch_size,
            collate_fn=functools.partial(collate_unless_skipped, collate=self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    # -- optimizer ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW (or another `optim`) over [`parameter_groups`]."""
        if self.optimizer is None:
            args = self.args
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                args, self.model
            )
            groups = parameter_groups(
                self.model if model is None else model,
                learning_rate=args.learning_rate,
                learning_rate_encoder=args.learning_rate_encoder,
                layer_decay=args.layer_decay,
                component_decay=args.component_decay,
                weight_decay=args.weight_decay,
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the schedule of `lr_scheduler_type`."""
        is_step_schedule = self.args.lr_scheduler_type == SchedulerType.CONSTANT_WITH_WARMUP
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and is_step_schedule:  # the base class has stored that the next run needs a new schedule
            drop = float("inf")
            if not isinstance(self.train_dataset, torch.utils.data.IterableDataset):
                batches = len(self.train_dataset) / (self.train_batch_size * self.args.world_size)
                batches = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
                drop = self.args.lr_drop_epochs * math.ceil(batches / self.args.gradient_accumulation_steps)
            factor = step_schedule(self.args.get_warmup_steps(num_training_steps), drop)
            scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)
        return scheduler

    # -- loss --------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], None]:
        """Return the micro-batches of one optimizer step, whose objects are counted over all processes.

        The counts are added while the first forward pass runs; its loss waits for their sum.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = sum(len(target["class_labels"]) for batch in batches for target in batch["labels"])
        # A tensor from a number would be copied to a GPU, and the host would wait for all that was launched before.
        self._num_objects = start_sum(torch.full((), float(count), device=self.args.device))
        return batches, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one micro-batch at the size drawn for the step; return its loss."""
        inputs = send_to_device(inputs, self.args.device)
        if self.sizes:
            draw = np.random.default_rng([self.args.seed, self.state.global_step]).integers(len(self.sizes))
            inputs = resize_batch(inputs, self.sizes[draw])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.loss_log.add("loss", loss / self.accelerator.num_processes)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of a micro-batch, normalized by the objects x groups of the whole optimizer step.

        DDP averages gradients over processes, and Trainer over micro-batches. Both are undone here, so that their sum
        is the gradient of one large batch on one process.
        """
        outputs = model(**inputs, num_objects=self._num_objects)
        loss = outputs["loss"] * (self.accelerator.num_processes * self.current_gradient_accumulation_steps)
        self.guard.watch(loss, inputs["labels"], outputs)
        for name in outputs["loss_dict"].keys() & {*LOSS_TERMS}:
            self.loss_log.add(name, outputs["loss_dict"][name])
        return (loss, outputs) if return_outputs else loss

    def reset_losses(self) -> None:
        """Forget the losses of an earlier run, which may have ended in the middle of an optimizer step."""
        self.guard = NonFiniteGuard(self.args.non_finite_loss, self._names_of)
        self.loss_log = LossLog(self.accelerator)

    def before_optimizer_step(self) -> None:
        """Discard gradients that are not finite."""
        self._is_step_taken = self.guard.allows_step(self.model, self.accelerator, self.state.global_step + 1)
        self.loss_log.end_step(self._is_step_taken)
        if not self._is_step_taken:
            discard_gradients(self.model, self.optimizer, self.accelerator, bool(self.args.max_grad_norm))

    def after_optimizer_step(self) -> None:
        """Update the EMA weights."""
        is_taken = self._is_step_taken and not self.accelerator.optimizer_step_was_skipped
        if self.weight_average is not None and is_taken:
            self.weight_average.update()

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log metrics, with the losses of [`LossLog`] instead of those of Trainer."""
        if self.is_in_train and "loss" in logs:
            logs = {**logs, **self.loss_log.pop_entry()}
        if "train_loss" in logs:  # transformers 5.0 logs it when `is_in_train` is False already
            logs = {**logs, "train_loss": self.loss_log.mean_of_run()}
        super().log(logs, *args, **kwargs)


def _checked_arguments(
    args: RfDetrTrainingArguments | None, trainer_options: Mapping[str, Any], train_dataset: Any, eval_dataset: Any
) -> RfDetrTrainingArguments:
    """Return a copy of the arguments, without settings that these datasets do not allow.

    Raises:
        ValueError: arguments or options of `Trainer` that RfDetrTrainer does not support.
    """
    args = RfDetrTrainingArguments("runs") if args is None else args
    if not isinstance(args, RfDetrTrainingArguments):
        raise ValueError(
            f"`args` must be RfDetrTrainingArguments, got {type(args).__name__}. Replace the name of the class: it"
            " accepts all of TrainingArguments."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"each process must see one GPU, got {args.n_gpu}: nn.DataParallel would split the labels incorrectly."
            f" Start one process for each GPU, `torchrun --nproc_per_node={args.n_gpu} script.py`, or make one GPU"
            " visible, `CUDA_VISIBLE_DEVICES=0 python script.py`."
        )
    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        if trainer_options.get(name) is not None:
            raise ValueError(
                f"`{name}` must be None: RfDetrTrainer computes the losses and COCO's metrics itself, without keeping"
                " masks. Omit it, or use transformers.Trainer for other losses or metrics."
            )
    args = copy.copy(args)  # another trainer may use the caller's
    if eval_dataset is None and args.eval_strategy != "no":
        if train_dataset is not None:
            logger.warning(
                "Without `eval_dataset` nothing is evaluated, and the last model is kept. `split_dataset` (on the"
                " command line, --validation 0.2) sets images aside for it."
            )
        args.eval_strategy = IntervalStrategy.NO
        args.load_best_model_at_end = args.early_stopping = False
    if isinstance(eval_dataset, dict):
        metric = args.metric_for_best_model.removeprefix("eval_")
        if not any(metric.startswith(f"{name}_") for name in eval_dataset):
            args.metric_for_best_model = f"{next(iter(eval_dataset))}_{metric}"
    return args
