"""Fine-tuning: transformers' Trainer with RF-DETR's recipe, and an evaluation that streams.

What the stock Trainer does not do: it divides the losses by the objects of the whole accumulation window over all
processes, averages the weights and evaluates the average, draws a scale for each step, keeps compact results instead
of masks in evaluation, and resumes to the same numbers as a run that was not interrupted.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    HubStrategy,
    IntervalStrategy,
    SaveStrategy,
    SchedulerType,
    TrainOutput,
)
from transformers.utils import PushInProgress, logging

from ..atomic_files import atomic_file, translate_disk_errors, write_text
from ..data.augmentation import FlipAndCrop
from ..data.dataset import InstanceDataset, InstanceDatasets
from ..data.drawing import draw_grid
from ..data.load import load_instance_dataset
from ..data.prepared import FollowEpoch, PreparedDataset, collate_fn
from ..data.streams import InstanceStream, PreparedStream
from ..evaluation.coco_evaluator import (
    InstanceSegmentationEvaluator,
    category_of_labels,
    detect,
    number_names,
    with_categories,
)
from ..evaluation.curves import draw_png, training_charts
from ..hub.model_card import (
    CURVES,
    GRID,
    RECIPE,
    Run,
    add_code,
    create_repository,
    is_hub_id,
    model_card,
    upload,
)
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.variants_rf_detr import is_background_label
from .arguments import RfDetrTrainingArguments, best_key, best_of_ema_and_base, non_ema_key, note_on_numbers
from .optimization import (
    WeightAverage,
    copy_full_tensor,
    full_tensor,
    parameter_groups,
    resize_batch,
    step_schedule,
    training_sizes,
)
from .recovery import (
    STATE_NAME,
    WEIGHTS_NAME,
    UpdateGuard,
    check_workers,
    find_checkpoint_problem,
    list_files,
    newest_checkpoint,
    replace_folder,
    restore_best,
    translate_worker_errors,
)
from .run_card import DRAWN_SCORE, draw_examples, numbers_of, recipe_of

logger = logging.get_logger(__name__)

_UPLOADS = HfApi()  # its one thread makes commits one after the other
_RECIPE = FlipAndCrop()
# Of the output folder what goes to the Hub. Not training_args.bin: it is a pickle, and holds the token.
_PUSHED = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json", "adapter_*")
# Arguments that say nothing of the recipe but where it ran.
_LOCAL = ("output_dir", "logging_dir", "run_name", "project", "local_rank", "resume_from_checkpoint")
# Terms of the last layer, which are logged beside the loss.
_TERMS = {"loss_ce", "loss_bbox", "loss_giou", "loss_mask_ce", "loss_mask_dice"}
_FULL_DISK = (
    "nothing is left of what was begun, and what was whole still is; free some space, or lower save_total_limit, and"
    " train with resume_from_checkpoint=True"
)


class RfDetrTrainer(Trainer):
    """Trains RF-DETR by its recipe, and evaluates it as COCO does.

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

    Evaluation reports the numbers of [`InstanceSegmentationEvaluator`] as `eval_segm_AP`, ..., and `eval_loss`, the
    loss divided by the objects of the whole data set. They are the same for every batch size and number of processes.
    The output folder gets `best_ema/` and, with `eval_base_model`, `best_regular/`, and `best_total/`, the better of
    them: folders for `from_pretrained`. So is every checkpoint: its model is the average that was evaluated. (What
    resuming needs besides lies in files of its own.)

    Args:
        model: An RF-DETR model of this package.
        args: The recipe.
        data_collator: [`collate_fn`] by default.
        train_dataset: An [`InstanceDataset`] or [`InstanceStream`], which the trainer prepares and augments; or a data
            set of samples that the processor has prepared.
        eval_dataset: An [`InstanceDataset`]; a `datasets.Dataset` with an objects column and a transform that
            prepares it; or, with `eval_annotations`, any data set of prepared samples. Or a dictionary of these.
        processing_class: The image processor; the model's own by default.
        augmentation: Of training samples, see `augmentation.py`, or a torchvision.transforms.v2 pipeline; the original
            recipe by default, None for none.
        eval_annotations: A COCO dictionary, the ground truth of prepared samples: `image_id` in their labels tells
            which, and class indices are category ids.
        **kwargs: As of `Trainer`. `compute_metrics` would need all masks in memory and is refused.

    Raises:
        ValueError: several GPUs without a process for each; classes of the data set that are not the model's.
    """

    # Set by Trainer.
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    hub_model_id: str | None
    push_in_progress: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: RfDetrTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: RfDetrImageProcessor | None = None,
        *,
        augmentation: Any = _RECIPE,
        eval_annotations: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        args = RfDetrTrainingArguments("runs") if args is None else args
        if not isinstance(args, RfDetrTrainingArguments):
            raise ValueError(f"args is a {type(args).__name__}; RfDetrTrainer takes RfDetrTrainingArguments")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would split batches of labels wrongly; start one "
                f"process for each, `torchrun --nproc_per_node={args.n_gpu} script.py`, or show one GPU, "
                "`CUDA_VISIBLE_DEVICES=0 python script.py`"
            )
        for refused in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
            if kwargs.get(refused) is not None:
                raise ValueError(
                    f"RfDetrTrainer takes no {refused}: it computes the losses and COCO's metrics itself, without"
                    " keeping masks; leave it out or take transformers.Trainer"
                )
        args = copy.copy(args)  # what follows from model and data must not reach another trainer
        if eval_dataset is None and args.eval_strategy != "no":
            if train_dataset is not None:
                logger.warning("There is no eval_dataset: nothing is evaluated, and the last model is kept.")
            args.eval_strategy = IntervalStrategy.NO
            args.load_best_model_at_end = args.early_stopping = False
        _check_training_data(train_dataset)
        if isinstance(eval_dataset, InstanceDatasets):
            raise ValueError(f"eval_dataset is all splits {list(eval_dataset)}; pass one, such as data['validation']")
        if isinstance(eval_dataset, dict):
            metric = args.metric_for_best_model.removeprefix("eval_")
            if not any(metric.startswith(f"{name}_") for name in eval_dataset):
                args.metric_for_best_model = f"{next(iter(eval_dataset))}_{metric}"
        self.augmentation = augmentation
        self.eval_annotations = eval_annotations
        self._average: WeightAverage | None = None
        self._num_objects: Tensor | None = None  # of the accumulation window that is running
        self._step_loss: Tensor | None = None  # transformers' sum of the loss since then
        self._terms: dict[str, float] = {}  # of the log entry that is being written
        self._best: dict[str, float] = {}  # by kind of weights
        self._resumed: dict[str, Any] | None = None  # what a checkpoint holds that is not taken up yet
        self._evaluation: _Evaluation | None = None  # the last one, whose ground truth may serve again
        self._per_class: dict[str, Any] = {}
        self._measured: dict[str, dict[str, Any]] = {}  # of the trained model, by what it was measured on
        super().__init__(
            model,
            args,
            data_collator=data_collator or collate_fn,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._forget_updates()
        if not hasattr(self.model, "set_drop_path"):
            raise ValueError(
                f"{type(self.model).__module__}.{type(self.model).__name__} is no model of transformers_rfdetr;"
                " `import transformers_rfdetr` before from_pretrained loads it"
            )
        if self.processing_class is None:
            self.processing_class = RfDetrImageProcessor.from_config(self.model.config)
        if not self._has_masks:
            args.metric_for_best_model = args.metric_for_best_model.replace("segm_", "bbox_")
        if args.eval_strategy != "no":
            self._check_metric()
        if note := note_on_numbers(args):
            logger.warning(note)
        self._sizes = self._training_sizes() if args.multi_scale else []
        self.train_dataset = self._prepare_training(self.train_dataset)
        self._set_up_model()
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._prepare_evaluation(part) for name, part in self.eval_dataset.items()}
        else:
            self.eval_dataset = self._prepare_evaluation(self.eval_dataset)
        self.add_callback(_Recipe(self))
        self.add_callback(FollowEpoch)
        if args.early_stopping:
            self.add_callback(_EarlyStopping(args.early_stopping_patience, args.early_stopping_min_delta))

    def _check_metric(self) -> None:
        """Raise for a metric for the best model that the first evaluation would not find."""
        name = best_key(self.args).removeprefix("eval_")
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
        names = {name, *(name.removeprefix(f"{split}_") for split in splits)}
        known = ["loss"] if self.args.prediction_loss_only else ["loss", *number_names(self._has_masks)]
        if not names & {*known} and not any(name.startswith(f"{self._kind}/") for name in names):
            raise ValueError(
                f"metric_for_best_model {self.args.metric_for_best_model!r} is none of what is evaluated; give one of"
                f" {', '.join(known)}, or {self._kind}/<class>"
            )

    def _set_up_model(self) -> None:
        """What the arguments and the data say about the model, before it trains."""
        if isinstance(self.train_dataset, PreparedDataset | PreparedStream):
            adopt_classes(self.model.config, _raw(self.train_dataset), keep_ids=True)
        if self.args.freeze_backbone:
            self.model.freeze_backbone()
        if self.args.drop_path is not None:
            self.model.set_drop_path(self.args.drop_path)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model of `model_init`, set up as the first one."""
        model = super().call_model_init(trial)
        if hasattr(self, "_sizes"):
            self.model = model
            self._set_up_model()
        return model

    @property
    def _has_masks(self) -> bool:
        return hasattr(self.model, "segmentation_head")

    @property
    def _kind(self) -> str:
        return "segm_AP" if self._has_masks else "bbox_AP"

    @property
    def _averages(self) -> bool:
        return self._average is not None and self.is_in_train

    # -- data --------------------------------------------------------------------------------------------------------

    def _names_of(self, image_ids: Sequence[int]) -> list[str]:
        dataset = _raw(self.train_dataset)
        if isinstance(dataset, InstanceDataset):
            return dataset.names_of(image_ids)
        return [f"image_id {image_id}" for image_id in image_ids]

    def _training_sizes(self) -> list[tuple[int, int]]:
        size, backbone = self.processing_class.size, self.model.config.backbone_config
        if "height" not in size:
            raise ValueError(
                f"multi_scale draws sizes around one exact size, and the processor's is {size}; give it height and "
                "width, or pass multi_scale=False"
            )
        return training_sizes((size["height"], size["width"]), backbone.patch_size * backbone.num_windows)

    def _prepare_training(self, dataset: Any) -> Any:
        if not isinstance(dataset, InstanceDataset | InstanceStream):
            return dataset
        processor = copy.copy(self.processing_class)
        if self._sizes:  # batches shrink on the device, so pictures come at the largest size
            processor.size = dict(zip(("height", "width"), self._sizes[-1], strict=True))
        if isinstance(dataset, InstanceStream) and self.args.save_strategy == SaveStrategy.EPOCH:
            logger.warning(
                "A stream has no epochs: with save_strategy='epoch' there is one checkpoint, after max_steps; pass"
                " save_strategy='steps'."
            )
        augmentation, seed = self.augmentation, self.args.seed
        return dataset.with_processor(processor, augmentation=augmentation, seed=seed, masks=self._has_masks)

    def _prepare_evaluation(self, dataset: Any) -> Any:
        if isinstance(dataset, InstanceDataset):
            adopt_classes(self.model.config, dataset)
            return dataset.with_processor(self.processing_class, masks=self._has_masks)
        known = dataset is None or isinstance(dataset, str | PreparedDataset) or self.eval_annotations is not None
        if not known and not hasattr(dataset, "column_names"):
            raise ValueError(
                f"the ground truth of a {type(dataset).__name__} is not known; evaluate an InstanceDataset (from"
                " load_instance_dataset), or pass eval_annotations, a COCO dictionary"
            )
        return dataset

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Batches of prepared training samples."""
        if not isinstance(self.train_dataset, PreparedStream):
            return super().get_train_dataloader()
        # Each process reads its own part, which accelerate would divide again.
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Batches of prepared samples to evaluate."""
        return super().get_eval_dataloader(self._prepare_evaluation(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """Batches of prepared samples to predict."""
        return super().get_test_dataloader(self._prepare_evaluation(test_dataset))

    # -- optimisation ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, after a look at the data: a table of the classes, and pictures with more objects than queries.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest whole one of the output folder; a run
                that was killed while it wrote one goes on from the one before.
            *args: As of `Trainer.train`.
            **kwargs: As of `Trainer.train`.

        Raises:
            ValueError: the checkpoint is not whole.
            FloatingPointError: an update is not finite (see `non_finite_loss`).
            OSError: the disk is full; a process that reads pictures, or another one of the run, is gone
                (ChildProcessError, ConnectionAbortedError). What is on disk is whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_checkpoint()
        elif resume_from_checkpoint and (reason := find_checkpoint_problem(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} is not a whole checkpoint: {reason}; resume_from_checkpoint=True takes the"
                f" newest whole one of {self.args.output_dir}"
            )
        if self.args.should_save:
            restore_best(self.args.output_dir)
            if not resume_from_checkpoint:
                self._warn_of_an_earlier_run()
        check_workers(self.args.dataloader_num_workers)
        # Nothing of a run before this one is left; a checkpoint brings its own.
        self._best, self._resumed, self._average = {}, None, None
        self._measured = {}
        if self.is_world_process_zero():
            self._describe_data()
        with translate_worker_errors(self.args.world_size, self.args.output_dir):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        mean = output.training_loss * self._share_of_run()
        return output._replace(training_loss=mean, metrics={**output.metrics, "train_loss": mean})

    def _newest_checkpoint(self) -> str:
        """The first process's choice, on all of them: a file system may show them different folders."""
        return self._from_first(lambda: newest_checkpoint(self.args.output_dir))

    def _from_first(self, work: Callable[[], Any]) -> Any:
        """What the first process's `work` returns or raises, on all of them."""
        answer: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                answer = [work()]
            except Exception as error:  # the others wait for an answer
                answer = [error]
        broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _warn_of_an_earlier_run(self) -> None:
        with suppress(ValueError):
            logger.warning(
                f"{newest_checkpoint(self.args.output_dir)} is of an earlier run, which this one may overwrite; pass"
                " resume_from_checkpoint=True to go on with that run, or another output_dir"
            )

    def _describe_data(self) -> None:
        parts = {"train": self.train_dataset, "validation": self.eval_dataset}
        known = {name: part.dataset for name, part in parts.items() if isinstance(part, PreparedDataset)}
        if known:
            print(InstanceDatasets(known), flush=True)
        queries = self.model.config.num_queries
        for name, dataset in known.items():
            crowded = dataset.crowded(queries)
            if crowded:
                some = ", ".join(f"{picture} ({count})" for picture, count in crowded[:5])
                logger.warning(
                    f"{len(crowded)} pictures of {name} hold more objects than the model has queries ({queries}), so "
                    f"some objects cannot be found: {some}{', ...' if len(crowded) > 5 else ''}. "
                    "Pass num_queries to from_pretrained to have more."
                )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or another `optim`) over [`parameter_groups`]."""
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
        """The schedule of `lr_scheduler_type`."""
        if self.lr_scheduler is None and self.args.lr_scheduler_type == SchedulerType.CONSTANT_WITH_WARMUP:
            drop = float("inf")
            if not isinstance(self.train_dataset, torch.utils.data.IterableDataset):
                batches = len(self.train_dataset) / (self._train_batch_size * self.args.world_size)
                batches = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
                drop = self.args.lr_drop_epochs * math.ceil(batches / self.args.gradient_accumulation_steps)
            factor = step_schedule(self.args.get_warmup_steps(num_training_steps), drop)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one update, whose objects are counted over all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = sum(len(target["class_labels"]) for batch in batches for target in batch["labels"])
        total = torch.tensor(float(count), device=self.args.device)
        self._num_objects = self.accelerator.reduce(total, reduction="sum")
        return batches, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch at the size drawn for the step -> its loss, for the log."""
        resumed = self._resume_log()
        inputs = self._prepare_inputs(inputs)
        if self._sizes:
            draw = np.random.default_rng([self.args.seed, self.state.global_step]).integers(len(self._sizes))
            inputs = resize_batch(inputs, self._sizes[draw])
        loss = super().training_step(model, inputs, *args, **kwargs)
        loss = torch.where(loss.isfinite(), loss, 0)  # for the log, which leaves out the update that it belongs to
        self._update_sums["loss"] = self._update_sums.get("loss", 0) + loss
        return loss if resumed is None else resumed.to(loss.device) + loss

    def _forget_updates(self) -> None:
        """Begin with nothing of an earlier call, which may have ended in the middle of an update."""
        self._guard = UpdateGuard(self.args.non_finite_loss, self._names_of)
        self._sums: dict[str, Tensor] = {}  # of the terms of the loss since the last log entry
        self._update_sums: dict[str, Tensor] = {}  # of the loss and its terms over the update that is running
        self._num_skipped = 0  # updates since the last log entry that were left out
        self._num_skipped_in_all = 0
        self._share_of_window = 1.0  # steps of a log entry by those of them that were kept
        self._dropped: Tensor | float = 0.0  # their loss, which transformers' sum still has

    def _finish_update(self) -> bool:
        """Whether the weights may take the gradients; if not, what the log has of this update goes."""
        sums, self._update_sums = self._update_sums, {}
        loss = sums.pop("loss")
        if self._guard.passes(self.model, self.accelerator, self.state.global_step + 1):
            for name, value in sums.items():
                self._sums[name] = self._sums.get(name, 0) + value
            return True
        if self.accelerator.scaler is None or self.args.max_grad_norm:
            self.optimizer.zero_grad()
        else:  # a scaler that has not looked for overflow yet needs gradients, and leaves the step out if they overflow
            next(weight.grad for weight in self.model.parameters() if weight.grad is not None).fill_(float("inf"))
        self._num_skipped += 1
        self._num_skipped_in_all += 1
        self._dropped = self._dropped + loss
        return False

    def _share_of_run(self) -> float:
        """All steps of the run, by which transformers divides the sum of the loss, by those that were kept."""
        num_kept = self.state.global_step - self._num_skipped_in_all
        if num_kept == 0:
            return float("nan")
        return self.state.global_step / num_kept

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The losses of a micro-batch, divided by the objects x groups of the whole update.

        Gradients are averaged over processes by DDP, and over micro-batches by the Trainer; both are undone here, so
        that their sum is what one large batch on one process would give.
        """
        outputs = model(**inputs, num_objects=self._num_objects)
        loss = outputs["loss"] * (self.accelerator.num_processes * self.current_gradient_accumulation_steps)
        self._guard.watch(loss, inputs["labels"], outputs)
        for name in _TERMS & outputs["loss_dict"].keys():
            self._update_sums[name] = self._update_sums.get(name, 0) + outputs["loss_dict"][name]
        return (loss, outputs) if return_outputs else loss

    # -- log ---------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        tr_loss -= self._dropped
        self._dropped = 0.0
        self._step_loss = tr_loss
        num_steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and num_steps:
            num_kept = num_steps - self._num_skipped
            sums = {name: self.accelerator.reduce(value, reduction="sum") for name, value in sorted(self._sums.items())}
            self._terms = {name: value.item() / num_kept for name, value in sums.items()}
            self._sums = {}
            if self._num_skipped:
                self._terms["skipped_updates"] = self._num_skipped
            # transformers divides by all of them
            self._share_of_window = num_steps / num_kept if num_kept else float("nan")
            self._num_skipped = 0
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log numbers, beside the loss its terms of the last layer."""
        if "loss" in logs:
            logs = {**logs, **self._terms, "loss": logs["loss"] * self._share_of_window}
        if "train_loss" in logs:
            logs = {**logs, "train_loss": logs["train_loss"] * self._share_of_run()}
        super().log(logs, *args, **kwargs)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print the numbers of a split, all but the dictionary of each class."""
        super().log_metrics(split, {name: value for name, value in metrics.items() if not isinstance(value, dict)})

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluated_weights(self) -> AbstractContextManager[None]:
        """Inside, the model holds what evaluation and checkpoints are about: during training the average."""
        return self._average.in_model() if self._averages else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The numbers of a data set; `eval_per_class` is a dictionary, of which the log gets one number a class."""
        with translate_worker_errors(self.args.world_size):
            metrics = super().evaluate(*args, **kwargs)
        return metrics | self._per_class

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the average during training, and with `eval_base_model` the weights too."""
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        base: dict[str, Any] = {}
        if self._averages and self.args.eval_base_model:
            base = {non_ema_key(key): value for key, value in self._stream(*arguments).metrics.items()}
        with self._evaluated_weights():
            output = self._stream(*arguments)
        output.metrics.update(base)
        return output

    def _stream(self, dataloader: Any, description: str, *args: Any) -> EvalLoopOutput:
        """One pass over the data: `prediction_step` feeds the evaluator, and nothing else is kept."""
        prefix = args[-1]
        self._evaluation = evaluation = self._evaluation_of(dataloader.dataset)
        output = super().evaluation_loop(dataloader, description, *args)
        results = self._gather(evaluation)
        if not self.is_in_train:
            self._measured[self._title(evaluation.dataset, prefix)] = dict(results)
        per_class = results.pop("per_class", {})
        self._per_class = {f"{prefix}_per_class": per_class}
        if len(per_class) > 1:  # for the log, which takes numbers only
            results |= {f"{self._kind}/{category}": numbers[self._kind] for category, numbers in per_class.items()}
        output.metrics.update({f"{prefix}_{name}": value for name, value in results.items()})
        if description == "Prediction":
            output = output._replace(predictions=list(evaluation.evaluator.predictions()))
        return output

    def _evaluation_of(self, dataset: Any) -> "_Evaluation":
        """An empty evaluation against the ground truth of a data set."""
        raw, last = _raw(dataset), self._evaluation
        if last is not None and last.dataset is raw:
            last.evaluator.reset()
            return _Evaluation(raw, last.evaluator, last.category_of)
        if isinstance(raw, InstanceDataset):
            category_of = category_of_labels(self.model.config, raw)
            return _Evaluation(raw, InstanceSegmentationEvaluator(raw.coco()), category_of)
        truth = self.eval_annotations
        if truth is None:  # a datasets.Dataset whose transform prepares the samples
            truth = load_instance_dataset(dataset.with_format(None))["train"].coco()
        ids, num_labels = [category["id"] for category in truth["categories"]], self.model.config.num_labels
        if not set(ids) <= set(range(num_labels)):
            raise ValueError(
                f"the samples are prepared already, so that category ids {ids} must be the model's class "
                f"indices 0 .. {num_labels - 1}; pass load_instance_dataset(...) as eval_dataset, which maps"
                " them, or eval_annotations with class indices as ids"
            )
        return _Evaluation(raw, InstanceSegmentationEvaluator(truth), {number: number for number in ids})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Evaluate one batch. Everything that is kept of it is in the evaluator.

        Without a compute_metrics `Trainer.evaluate` always asks for the loss only, so the arguments decide about it.
        """
        inputs = self._prepare_inputs(inputs)
        num_new = self._count_new(len(inputs["pixel_values"]))
        # Sharded models must run in step, so a batch of repeated pictures only still runs one of them.
        inputs = {name: value[: max(1, num_new)] for name, value in inputs.items()}
        labels = inputs["labels"]
        missing = {"image_id", "orig_size"} - labels[0].keys()
        if missing:
            raise ValueError(
                f"labels without {sorted(missing)} cannot be evaluated; keep what the image processor returns"
            )
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, num_objects=torch.ones((), device=self.args.device))
        if num_new == 0:
            return None, None, None
        evaluation = self._evaluation
        evaluation.loss += outputs["loss"].item()
        evaluation.num_objects += sum(len(target["class_labels"]) for target in labels)
        if not self.args.prediction_loss_only:
            found = detect(
                outputs,
                [target["orig_size"].tolist() for target in labels],
                score_threshold=self.args.eval_score_threshold or None,
                pixel_mask=inputs.get("pixel_mask"),
            )
            for target, detections in zip(labels, found, strict=True):
                kept = with_categories(detections, evaluation.category_of)
                evaluation.evaluator.update(target["image_id"].item(), **kept)
        return None, None, None

    def _count_new(self, batch_size: int) -> int:
        """Pictures of this process's batch that are not repetitions, with which accelerate fills up the last ones."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch_size
        return min(max(state.remainder - self.args.process_index * self.args.eval_batch_size, 0), batch_size)

    def _gather(self, evaluation: "_Evaluation") -> dict[str, Any]:
        """The numbers of all processes' results, computed by the first one, on all of them."""
        parts: list[Any] = [(evaluation.evaluator.state(), evaluation.loss, evaluation.num_objects)]
        if self.args.world_size > 1:
            is_first = self.args.process_index == 0
            gathered = [None] * self.args.world_size if is_first else None
            torch.distributed.gather_object(parts[0], gathered)
            parts = gathered or []

        def numbers() -> dict[str, Any]:
            for state, _, _ in parts[1:]:
                evaluation.evaluator.merge(state)
            loss = sum(part[1] for part in parts) / max(1, sum(part[2] for part in parts))
            return {"loss": loss, **(evaluation.evaluator.compute() if len(evaluation.evaluator) else {})}

        return self._from_first(numbers)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, its configuration and the processor: during training with the averaged weights."""
        with self._evaluated_weights():
            self._write_model(output_dir, _internal_call)

    def _write_model(self, output_dir: str | None, _internal_call: bool = True) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # transformers writes shards, or nothing, by FSDP's kind of state; a model folder holds whole tensors.
        state = {name: full_tensor(tensor).cpu() for name, tensor in self.model.state_dict().items()}
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    # -- the Hub -----------------------------------------------------------------------------------------------------

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        with_code: bool = False,
        **card: Any,
    ) -> Any:
        """Save the model and upload it, with processor, model card, pictures and the arguments of the run.

        Checkpoints, `best_...` folders and training_args.bin, which holds the token, stay here.

        Args:
            commit_message: Of the one commit.
            blocking: Whether to wait; otherwise a `Future` is returned.
            token: `hub_token` of the arguments, or the one that `hf auth login` has stored, by default.
            revision: Branch; `hub_revision` of the arguments by default.
            private: Whether the repository is created as a private one; `hub_private_repo` by default.
            with_code: Whether to add the code of this package; see [`add_code`].
            **card: As of [`create_model_card`](RfDetrTrainer.create_model_card).

        Raises:
            OSError: the upload failed for good; everything is in the output folder then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        access: dict[str, Any] = {"token": token or self.args.hub_token, "kept": f"everything is in {folder}"}
        name = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = create_repository(name, private=private, **access)
        code = add_code(folder) if with_code else []
        self.create_model_card(with_code=with_code, **card)
        self._finish_current_push()
        files = [*_model_files(folder), *code, *(folder / name for name in ("README.md", RECIPE, CURVES, GRID))]
        settings = {"revision": revision or self.args.hub_revision, "commit_message": commit_message, **access}
        files = [path for path in files if path.is_file()]
        if blocking:
            return upload(folder, files, self.hub_model_id, **settings)
        return _UPLOADS.run_as_future(upload, folder, files, self.hub_model_id, **settings)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the model of a checkpoint in the background, and all of it where `hub_strategy` says so."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        checkpoint, folder = Path(checkpoint_folder), Path(args.output_dir)
        # Copies, because an old checkpoint may be deleted while it is uploaded.
        files = []
        for path in _model_files(checkpoint):
            with atomic_file(folder / path.name) as partial:
                shutil.copyfile(path, partial)
            files.append(folder / path.name)
        parts = [(folder, files, "")]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            whole_state = [
                path for path in checkpoint.rglob("*") if path.is_file() and path.name != "training_args.bin"
            ]
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            parts.append((checkpoint, whole_state, "last-checkpoint" if last else checkpoint.name))
        settings: dict[str, Any] = {
            "kept": f"everything is in {checkpoint}",
            "token": args.hub_token,
            "revision": args.hub_revision,
            "commit_message": f"Training in progress, update {self.state.global_step}",
        }
        jobs = [
            _UPLOADS.run_as_future(upload, *part, self.hub_model_id, path_in_repo=path_in_repo, **settings)
            for *part, path_in_repo in parts
        ]
        for job in jobs:
            job.add_done_callback(lambda job: job.exception() and logger.warning(str(job.exception())))
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def create_model_card(
        self,
        *,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        language: str | None = None,
        with_code: bool = False,
        num_pictures: int = 4,
    ) -> None:
        """Write README.md, curves, pictures of predictions and the run's arguments to the output folder.

        Args:
            model_name: The heading; the name of the repository or of the output folder by default.
            finetuned_from: Hub id of the checkpoint; by default the one that the model was loaded from.
            dataset: Hub ids or names of the data.
            dataset_tags: The same.
            tags: Tags for the Hub, besides those of the task.
            license: An identifier that the Hub knows.
            language: As the Hub has it.
            with_code: Whether the code goes to the Hub too.
            num_pictures: Pictures of the evaluation data that are shown with ground truth and predictions; 0 keeps
                them to yourself.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        run = self._describe_run()
        run.base_model = finetuned_from or run.base_model
        run.datasets = list(dict.fromkeys([*_as_list(dataset), *_as_list(dataset_tags)]))
        run.pictures = self._draw_run(folder, num_pictures)
        settings = {name: value for name, value in self.args.to_dict().items() if name not in _LOCAL}
        settings = {name: value for name, value in settings.items() if not name.startswith(("hub_", "push_to_hub"))}
        write_text(folder / RECIPE, f"{json.dumps(settings, indent=2, sort_keys=True)}\n")
        text = model_card(
            self.hub_model_id or folder.absolute().name,
            self.model.config,
            has_masks=self._has_masks,
            run=run,
            with_code=with_code,
            title=model_name,
            tags=[*_as_list(getattr(self.model, "model_tags", None)), *_as_list(tags)],
            license=license,
            language=language,
        )
        write_text(folder / "README.md", text)

    def _describe_run(self) -> Run:
        """What the arguments, the data and the log say."""
        args, config = self.args, self.model.config
        known = {"train": self.train_dataset}
        known |= self.eval_dataset if isinstance(self.eval_dataset, dict) else {"validation": self.eval_dataset}
        counts = {name: part.dataset.counts() for name, part in known.items() if isinstance(part, PreparedDataset)}
        splits = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [""]
        base = getattr(config, "_name_or_path", None)
        return Run(
            base_model=base if is_hub_id(base) else None,
            splits={name: (len(known[name]), sum(c.objects for c in of.values())) for name, of in counts.items()},
            objects={config.id2label[label]: count.objects for label, count in counts.get("train", {}).items()},
            results=numbers_of(args, self.state, splits, self._kind) | self._measured,
            recipe=recipe_of(args, self.state, self._sizes, self.augmentation),
            note=note_on_numbers(args),
            is_adapter=hasattr(self.model, "peft_config"),
        )

    def _title(self, dataset: Any, prefix: str) -> str:
        """What a data set is called in the card: the prefix of its numbers, or "validation"."""
        given = prefix.removeprefix("eval").strip("_")
        own = not isinstance(self.eval_dataset, dict) and dataset is _raw(self.eval_dataset)
        return given or ("validation" if own else f"{len(dataset)} other pictures")

    def _draw_run(self, folder: Path, num_pictures: int) -> dict[str, str]:
        """Write the pictures of the card -> their files and captions."""
        drawn = {}
        is_many = isinstance(self.eval_dataset, dict)
        prefix = f"eval_{next(iter(self.eval_dataset))}_" if is_many else "eval_"
        charts = training_charts(self.state.log_history, prefix, with_learning_rate=False)
        if charts:
            (folder / CURVES).write_bytes(draw_png(charts))
            drawn[CURVES] = "Loss and average precision during training"
        dataset = _raw(next(iter(self.eval_dataset.values())) if is_many else self.eval_dataset)
        rows = []
        if not self.is_fsdp_enabled:  # sharded weights would need every process
            with self._evaluated_weights():
                rows = draw_examples(self.model, self.processing_class, dataset, num_pictures)
        if rows:
            draw_grid(rows, ["ground truth", f"predictions above {DRAWN_SCORE:g}"]).save(folder / GRID)
            drawn[GRID] = f"Ground truth, and predictions with a score above {DRAWN_SCORE:g}"
        for stale in {CURVES, GRID} - drawn.keys():
            (folder / stale).unlink(missing_ok=True)
        return drawn

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        """Keep the best weights of each kind, and of all."""
        key = best_key(self.args)
        if key in metrics:
            self._keep_best("ema" if self._averages else "regular", metrics[key], trial)
        if non_ema_key(key) in metrics:
            self._keep_best("regular", metrics[non_ema_key(key)], trial)
        return super()._determine_best_metric(best_of_ema_and_base(self.args, metrics), trial)

    def _keep_best(self, kind: str, value: float, trial: Any) -> None:
        """Write `best_<kind>` if `value` is the best of its kind so far, and `best_total` if it is the best of all."""
        if not math.isfinite(value):
            return
        sign = 1 if self.args.greater_is_better else -1
        better = {other: sign * value > sign * self._best[other] for other in (kind, "total") if other in self._best}
        if not better.get(kind, True):
            return
        root = Path(self._get_output_dir(trial))
        written = root / f".best_{kind}"
        if self.args.should_save:
            shutil.rmtree(written, ignore_errors=True)  # of a run that was killed
        try:
            with translate_disk_errors(root / f"best_{kind}", _FULL_DISK):
                with self._average.in_model() if kind == "ema" else nullcontext():
                    self._write_model(str(written))
                for other in [kind] + ["total"] * better.get("total", True):
                    self._best[other] = value
                    if self.args.should_save:
                        replace_folder(written, root / f"best_{other}")
        finally:
            if self.args.should_save:
                shutil.rmtree(written, ignore_errors=True)

    def _load_best_model(self) -> None:
        """Load the best of all weights, which with `eval_base_model` need not be the ones of the best checkpoint."""
        best = Path(self.args.output_dir, "best_total")
        if "total" not in self._best or not best.is_dir():  # resumed in another folder
            super()._load_best_model()
        elif (best / "model.safetensors").is_file():
            weights = load_file(best / "model.safetensors")
            for name, parameter in self.model.named_parameters():
                copy_full_tensor(parameter, weights[name])
        else:  # an adapter, or several files
            checkpoint, self.state.best_model_checkpoint = self.state.best_model_checkpoint, str(best)
            super()._load_best_model()
            self.state.best_model_checkpoint = checkpoint
        self._average = None  # the model is not to be averaged over

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint: first what transformers does not know, last its state, which marks it as whole."""
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with translate_disk_errors(folder, _FULL_DISK):
                if self.args.should_save:
                    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)  # so that it is not whole from now on
                    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
                    folder.mkdir(parents=True)
                self._save_recipe(folder)
                super()._save_checkpoint(model, trial)
        except OSError:
            if self.args.should_save and find_checkpoint_problem(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every process writes, before the first one writes the state."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            list_files(output_dir)

    def _save_recipe(self, folder: Path) -> None:
        gather = self.accelerator.gather
        nothing = torch.zeros((), device=self.args.device)
        sums = {"loss": nothing if self._step_loss is None else self._step_loss, **self._sums}
        sums = {name: gather(value.detach().float().reshape(1)).tolist() for name, value in sorted(sums.items())}
        tensors: dict[str, Tensor] = {}
        if self._average is not None and not self.args.save_only_model:
            tensors = {f"average.{name}": tensor for name, tensor in self._average.state_dict().items()}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    tensors[f"weights.{name}"] = full_tensor(parameter)
        if not self.args.should_save:
            return
        if tensors:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)
        state = {
            "lists_files": not self.args.save_only_model,
            "num_updates": self._average.num_updates if self._average is not None else 0,
            "best": self._best,
            "sums_since_log": sums,
            "skipped_updates": [self._num_skipped, self._num_skipped_in_all],
            "last_logged_step": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
        }
        (folder / STATE_NAME).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights that training goes on with; the model file of a checkpoint holds their average."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        self._resumed = None
        if not (folder / STATE_NAME).is_file():
            return
        self._resumed = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        self._best = dict(self._resumed["best"])
        if (folder / WEIGHTS_NAME).is_file():
            tensors = load_file(folder / WEIGHTS_NAME)
            for name, parameter in (model or self.model).named_parameters():
                if f"weights.{name}" in tensors:
                    copy_full_tensor(parameter, tensors[f"weights.{name}"])
            self._resumed["average"] = {
                name.removeprefix("average."): tensor for name, tensor in tensors.items() if name.startswith("average.")
            }
        elif self._resumed["num_updates"]:
            logger.warning(f"{folder} holds averaged weights only (save_only_model); training goes on from them")

    def _start_average(self) -> None:
        """Begin the average with the weights as they are, or continue a checkpoint's."""
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            raise ValueError(
                "the weights cannot be averaged in the flat form of FSDP version 1; pass "
                'fsdp_config={"version": 2}, or ema=False'
            )
        self._average = WeightAverage(self.model, self.args.ema_decay, self.args.ema_tau)
        if self._resumed and "average" in self._resumed:
            self._average.load_state_dict(self._resumed["average"], self._resumed["num_updates"])

    def _resume_log(self) -> Tensor | None:
        """Once, before the first step of a resumed run: the sums since the last log entry; the loss's is returned."""
        if self._resumed is None:
            return None
        resumed, self._resumed = self._resumed, None
        rank = self.args.process_index
        sums = {
            name: torch.tensor(values[rank] if rank < len(values) else 0.0, device=self.args.device)
            for name, values in resumed["sums_since_log"].items()
        }
        self._globalstep_last_logged = resumed["last_logged_step"]
        self._total_loss_scalar = resumed["total_loss"]
        self._num_skipped, self._num_skipped_in_all = resumed.get("skipped_updates", (0, 0))
        if hasattr(self, "_initial_global_step"):  # newer transformers averages over the steps of this call only
            self._initial_global_step = 0
        loss = sums.pop("loss")
        self._sums = sums
        return loss


@dataclass
class _Evaluation:
    """What one pass over a data set adds up."""

    dataset: Any  # not prepared
    evaluator: InstanceSegmentationEvaluator
    category_of: dict[int, int]  # class index -> category id; classes without one are not evaluated
    loss: float = 0.0  # summed over objects
    num_objects: int = 0


class _Recipe(TrainerCallback):
    """Calls the trainer where transformers has no method to override."""

    def __init__(self, trainer: RfDetrTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.trainer._forget_updates()
        if args.ema:
            self.trainer._start_average()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.is_taken = self.trainer._finish_update()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        is_taken = self.is_taken and not self.trainer.accelerator.optimizer_step_was_skipped
        if self.trainer._average is not None and is_taken:
            self.trainer._average.update()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer._average is not None:
            self.trainer._average.copy_to_model()
            self.trainer._average = None


class _EarlyStopping(EarlyStoppingCallback):
    """Stops when the metric for the best model stays: the better of average and weights, or only the average's."""

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.best: float | None = None

    def check_metric_value(self, args: Any, state: TrainerState, control: Any, metric_value: float) -> None:
        sign = 1 if args.greater_is_better else -1
        if self.best is None or sign * (metric_value - self.best) > self.early_stopping_threshold:
            self.best, self.early_stopping_patience_counter = metric_value, 0
        else:
            self.early_stopping_patience_counter += 1

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        metrics = metrics if args.early_stopping_use_ema else best_of_ema_and_base(args, metrics)
        super().on_evaluate(args, state, control, metrics, **kwargs)

    def state(self) -> dict[str, Any]:
        state = super().state()
        state["attributes"]["best"] = self.best
        return state


def _raw(dataset: Any) -> Any:
    """The data set that a prepared one is made of."""
    if isinstance(dataset, PreparedDataset):
        return dataset.dataset
    return dataset.stream if isinstance(dataset, PreparedStream) else dataset


def _check_training_data(dataset: Any) -> None:
    """Raise for what is no data set of prepared or preparable samples."""
    columns = getattr(dataset, "column_names", None)
    is_raw = columns and "pixel_values" not in columns and getattr(dataset, "format", {}).get("type") != "custom"
    if isinstance(dataset, dict) or is_raw:
        raise ValueError(
            f"train_dataset is {'a dictionary' if isinstance(dataset, dict) else f'rows of {columns}'}, whose samples "
            "are not prepared; pass one split of load_instance_dataset(...), such as data['train']"
        )


def adopt_classes(config: RfDetrConfig, dataset: InstanceDataset | InstanceStream, keep_ids: bool = False) -> None:
    """Check that the model's classes are the data's; a model whose classes have no names yet takes them over.

    With `keep_ids` the data's own category ids are noted in the configuration, as `category_ids`.

    Raises:
        ValueError: the number or the names of the classes differ.
    """
    names, wanted = dict(config.id2label), dict(dataset.id2label)
    if names != wanted and len(names) == len(wanted) and all(name.startswith("LABEL_") for name in names.values()):
        config.id2label, config.label2id = wanted, {name: label for label, name in wanted.items()}
        names = wanted
    # The heads of rfdetr's fine-tuned checkpoints have one row more.
    if {label: name for label, name in names.items() if not is_background_label(name)} != wanted:
        raise ValueError(
            f"the model's {len(names)} classes {_shorten(names)} are not the data's {len(wanted)} {_shorten(wanted)}; "
            "load it with from_pretrained(..., id2label=data.id2label, ignore_mismatched_sizes=True)"
        )
    if keep_ids:
        config.category_ids = list(dataset.category_ids)


def _shorten(names: Mapping[int, str]) -> str:
    text = ", ".join(f"{label}: {name}" for label, name in list(names.items())[:4])
    return f"{{{text}{', ...' if len(names) > 4 else ''}}}"


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _model_files(folder: Path) -> list[Path]:
    """What `from_pretrained` reads in a folder, not in folders inside it."""
    return [path for pattern in _PUSHED for path in sorted(folder.glob(pattern))]
