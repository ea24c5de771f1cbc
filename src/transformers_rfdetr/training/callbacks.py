"""Callbacks: events of the training loop for which Trainer has no method, and early stopping."""

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from .arguments import best_of_ema_and_base


class TrainingEvents(TrainerCallback):
    """Passes events of the training loop to an RfDetrTrainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Load the state of a checkpoint, and start the average of the weights."""
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
