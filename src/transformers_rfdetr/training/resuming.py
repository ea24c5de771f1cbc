"""A training run that can be resumed, and that keeps its best models."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .arguments import best_key, best_of_ema_and_base, non_ema_key
from .checkpoints import (
    BestModels,
    find_checkpoint_problem,
    lora_rank,
    new_checkpoint,
    newest_checkpoint,
    read_training_state,
    restore_best_models,
    write_file_list,
    write_training_state,
)
from .data_setup import describe_data
from .distributed import copy_full_tensor, full_tensor, run_on_first_process
from .faults import check_workers, translate_worker_errors
from .lora import ADAPTER_FOLDER, save_adapter
from .loss_log import LossLog
from .streamed_evaluation import EvaluatingTrainer
from .weight_average import WeightAverage

logger = logging.get_logger(__name__)


class ResumableTrainer(EvaluatingTrainer):
    """A trainer whose checkpoints have all that a resumed run needs to end with the same weights."""

    best_models: BestModels
    loss_log: LossLog
    _checkpoint: Path | None = None  # that is resumed from
    _first_state: dict[str, Tensor] | None = None  # weights and random state before the first step
    _hyperparameter_trial: Any = None

    def reset_losses(self) -> None:
        """Forget the losses of an earlier run, which may have ended in the middle of an optimizer step."""
        raise NotImplementedError

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, after a table of the classes and a warning about images with more objects than queries.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest complete one of the output folder. A run
                that was killed while it wrote a checkpoint resumes from the one before.
            trial: Trial of a hyperparameter search.
            *args: Other arguments of `Trainer.train`.
            **kwargs: Other arguments of `Trainer.train`.

        Raises:
            ValueError: the checkpoint is not complete, or is that of a run with another rank of LoRA.
            FloatingPointError: a loss or gradient is not finite (see `non_finite_loss`).
            OSError: the disk is full, a data loader worker died (ChildProcessError), or another process of the run died
                (ConnectionAbortedError). Completed files are kept; partial files are never treated as complete.
        """
        output_dir, checkpoint = self.args.output_dir, resume_from_checkpoint or None
        if checkpoint is True:  # processes may see different files, so the first one decides
            checkpoint = run_on_first_process(lambda: newest_checkpoint(output_dir), self.args.process_index)
        elif checkpoint and (problem := find_checkpoint_problem(checkpoint)):
            raise ValueError(
                f"`resume_from_checkpoint` must be a complete checkpoint, got {checkpoint}: {problem}."
                f" resume_from_checkpoint=True takes the newest complete one of {output_dir}."
            )
        if checkpoint and (rank := lora_rank(Path(checkpoint))) != self.args.lora:
            raise ValueError(
                f"`lora` must be the rank in {checkpoint}, {rank}{' (no LoRA)' * (not rank)}, got {self.args.lora}."
                f" Pass lora={rank}, or train without resume_from_checkpoint."
            )
        if self.args.should_save:
            restore_best_models(output_dir)
            if not checkpoint:
                _warn_about_earlier_run(output_dir)
        check_workers(self.args.dataloader_num_workers)
        self._checkpoint = Path(str(checkpoint)) if checkpoint else None
        self._hyperparameter_trial = trial
        self.weight_average, self.measured, self._first_state = None, {}, None
        if self.is_world_process_zero() and self.model is not None:  # a hyperparameter search deletes it after a trial
            describe_data(self.train_dataset, self.eval_dataset, self.model.config.num_queries, self.has_masks)
        run = partial(super().train, checkpoint, trial, *args, **kwargs)
        output = translate_worker_errors(run, self.args.world_size, output_dir)
        mean = self.loss_log.mean_of_run()
        return output._replace(training_loss=mean, metrics={**output.metrics, "train_loss": mean})

    def num_passed_batches(self) -> int:
        """Return how many batches of a stream a resumed run passes over: those before its checkpoint."""
        if self._checkpoint is None or self.args.ignore_data_skip:
            return 0
        num_steps = TrainerState.load_from_json(str(self._checkpoint / TRAINER_STATE_NAME)).global_step
        return num_steps % self.args.max_steps * self.args.gradient_accumulation_steps

    def begin_training(self) -> None:
        """Start from the checkpoint that is resumed from, whose model file has the averaged weights, or anew."""
        if self.args.auto_find_batch_size:
            self._undo_failed_attempt()
        self.reset_losses()
        self.model.config.discard_score_thresholds("they are those of the weights before training")
        state, tensors = read_training_state(self._checkpoint) if self._checkpoint else (None, {})
        self.best_models.values = dict(state["best"]) if state else {}
        if state:
            self.loss_log.load_state_dict(state["losses"])
        for name, parameter in self.model.named_parameters():
            if f"weights.{name}" in tensors:
                copy_full_tensor(parameter, tensors[f"weights.{name}"])
        if state and state["num_ema_updates"] and not tensors:
            logger.warning(
                f"{self._checkpoint} has averaged weights only (save_only_model). Training resumes from them."
            )
        if not self.args.ema:
            return
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            raise ValueError(
                '`fsdp_config` must have "version": 2 if `ema` is set, got version 1, whose flat weights cannot be'
                ' averaged. Pass fsdp_config={"version": 2} or ema=False.'
            )
        self.weight_average = WeightAverage(self.model, self.args.ema_decay, self.args.ema_tau)
        if tensors:
            average = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
            self.weight_average.load_state_dict(average, state["num_ema_updates"])

    @torch.no_grad()
    def _undo_failed_attempt(self) -> None:
        """Restore weights, optimizer and random state if memory ran out and Trainer begins again with fewer images."""
        device = self.args.device
        parameters = {f"weights.{name}": parameter for name, parameter in self.model.named_parameters()}
        if self._first_state is None:
            self._first_state = {name: parameter.to("cpu", copy=True) for name, parameter in parameters.items()}
            self._first_state["random"] = torch.get_rng_state()
            if device.type == "cuda":
                self._first_state["random_cuda"] = torch.cuda.get_rng_state(device)
            return
        for name, parameter in parameters.items():
            parameter.copy_(self._first_state[name])
        torch.set_rng_state(self._first_state["random"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self._first_state["random_cuda"], device)
        if self._checkpoint is None:
            self.optimizer.state.clear()
        logger.warning(
            f"Memory ran out. Training begins again, with {self.train_batch_size} images in a micro-batch; pass"
            f" per_device_train_batch_size={self.train_batch_size} next time."
        )

    def end_training(self) -> None:
        """Leave the best weights, or without `load_best_model_at_end` the averaged ones, in the model."""
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self.best_models.load_total(self.model, self.run_directory(self._hyperparameter_trial))
        elif self.weight_average is not None:
            self.weight_average.copy_to_model()
        self.weight_average = None

    # -- the best models ---------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the metrics of a dataset; `eval_per_class` is a dictionary, of which one metric a class is logged.

        In training it also keeps the best models. The metric for the best model that it then returns, by which Trainer
        chooses the best checkpoint, is the better of average and base weights.
        """
        is_for_training = self.is_in_train and self.control.should_evaluate and eval_dataset is None
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if not is_for_training:
            return metrics
        self.keep_best_models(metrics)
        return best_of_ema_and_base(self.args, metrics)

    def keep_best_models(self, metrics: Mapping[str, Any]) -> None:
        """Write the average, and with `eval_base_model` the weights, if they are the best so far."""
        key, directory = best_key(self.args), self.run_directory(self._hyperparameter_trial)
        evaluated = "ema" if self._evaluates_average else "regular"
        for kind, name in ((evaluated, key), ("regular", non_ema_key(key))):
            if name in metrics:
                self.best_models.keep(kind, metrics[name], directory, self._write_weights)

    def _write_weights(self, kind: str, folder: Path) -> None:
        with self.weight_average.in_model() if kind == "ema" else nullcontext():
            self.write_model(str(folder))

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def write_model(self, output_dir: str) -> None:
        """Write the weights that the model has, its configuration and the processor, without an upload."""
        if not self.is_fsdp_enabled:
            super().write_model(output_dir)
            if self.args.lora and self.args.should_save:
                save_adapter(self.model, self.args.lora, Path(output_dir, ADAPTER_FOLDER))
            return
        # transformers writes shards, or nothing, by FSDP's kind of state; a model folder has full tensors.
        state = {name: full_tensor(tensor).cpu() for name, tensor in self.model.state_dict().items()}
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state)
            self.processing_class.save_pretrained(output_dir)

    def write_checkpoint(self, folder: Path, write_files: Callable[[], None]) -> None:
        """Write a checkpoint: first what transformers does not know, last its state, which marks it as complete."""
        with new_checkpoint(folder, self.args.should_save):
            self._write_training_state(folder)
            write_files()

    def complete_checkpoint(self, folder: Path) -> None:
        """List the files of a checkpoint, of which all processes have written theirs."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_file_list(folder)

    def _write_training_state(self, folder: Path) -> None:
        average, tensors = self.weight_average, {}
        if not self.args.save_only_model and (average is not None or self.args.lora):
            averages = average.state_dict() if average is not None else {}
            tensors = {f"average.{name}": tensor for name, tensor in averages.items()}
            for name, parameter in self.model.named_parameters():
                # The model file has the sum of a base layer and its adapter.
                if parameter.requires_grad or ".base_layer." in name:
                    tensors[f"weights.{name}"] = full_tensor(parameter)
        state = {
            "lists_files": not self.args.save_only_model,
            "lora": self.args.lora if tensors else 0,
            "num_ema_updates": average.num_updates if average is not None else 0,
            "best": self.best_models.values,
            "losses": self.loss_log.state_dict(),
        }
        if self.args.should_save:
            write_training_state(folder, state, tensors)


def _warn_about_earlier_run(output_dir: str) -> None:
    with suppress(ValueError):
        logger.warning(
            f"{newest_checkpoint(output_dir)} is from an earlier run, which this run may overwrite. Pass"
            " resume_from_checkpoint=True to resume that run, or another output_dir."
        )
