"""Callbacks: events of the training loop for which Trainer has no method, a short progress, and early stopping."""

from typing import Any

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.utils import logging

from .arguments import best_of_ema_and_base

logger = logging.get_logger(__name__)

# A training of fewer optimizer steps is too short: in the demo, AP50 is 0.31 after 60, 0.87 after 150, 0.94 after 300.
_FEW_STEPS = 300
# Metrics of an evaluation that are read during a training.
_SHOWN = ("_loss", "segm_AP", "segm_AP50", "bbox_AP", "bbox_AP50", "mean_iou")


class TrainingEvents(TrainerCallback):
    """Passes events of the training loop to an RfDetrTrainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Load the state of a checkpoint, start the average of the weights, and say if the training is short."""
        if state.is_world_process_zero and state.max_steps < _FEW_STEPS:
            steps = f"{state.max_steps} optimizer step{'s' * (state.max_steps != 1)}"
            remedy = "Raise num_train_epochs (on the command line, --epochs)"
            if args.per_device_train_batch_size > 1:
                remedy += " or lower per_device_train_batch_size (--batch-size)"
            logger.warning(f"This run has {steps}, but a fine-tuning needs at least {_FEW_STEPS}. {remedy}.")
        self.trainer.begin_training()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Discard gradients that are not finite."""
        self.trainer.before_optimizer_step()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Update the average of the weights."""
        self.trainer.after_optimizer_step()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave the best weights in the model."""
        self.trainer.end_training()


class ShortProgress(ProgressCallback):
    """Shows the losses and the AP of an evaluation; the checkpoints' trainer_state.json has all metrics."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show what is read during a training."""
        shown = {name: value for name, value in logs.items() if name.endswith(_SHOWN) or not name.startswith("eval_")}
        super().on_log(args, state, control, logs=shown, **kwargs)


class BestMetricStopping(EarlyStoppingCallback):
    """Stops when the metric for the best model stops improving: the better of average and weights, or the average's."""

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.best: float | None = None

    def check_metric_value(self, args: Any, state: TrainerState, control: Any, metric_value: float) -> None:
        """Count evaluations without an improvement."""
        sign = 1 if args.greater_is_better else -1
        if self.best is None or sign * (metric_value - self.best) > self.early_stopping_threshold:
            self.best, self.early_stopping_patience_counter = metric_value, 0
        else:
            self.early_stopping_patience_counter += 1

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        """Stop after `early_stopping_patience` evaluations without an improvement."""
        metrics = metrics if args.early_stopping_use_ema else best_of_ema_and_base(args, metrics)
        super().on_evaluate(args, state, control, metrics, **kwargs)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the callback."""
        state = super().state()
        state["attributes"]["best"] = self.best
        return state
