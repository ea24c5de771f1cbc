"""Every use of private API of transformers' Trainer, so that a release that changes it breaks one module.

Names with an underscore may change without notice. Only this module overrides, calls or reads those of
`transformers.Trainer`; tests/training/test_private_trainer_api.py checks it. RfDetrTrainer implements the hooks without
an underscore. Each entry says which public alternative was tried on transformers 5.0 to 5.24, and why it fails.

What public API does instead of a private name:

| private | public |
|---|---|
| `_maybe_log_save_evaluate`, `_tr_loss`, `_total_loss_scalar`, `_globalstep_last_logged` | `LossLog` and `log` |
| `_determine_best_metric` | the metrics that `evaluate` returns |
| `_load_best_model` | the event `on_train_end` |
| `_load_from_checkpoint` | the event `on_train_begin` |
| `_prepare_inputs` | `accelerate.utils.send_to_device` |
| `_save` | `save_pretrained` |
| `_created_lr_scheduler` | `create_scheduler` of the base class, whose schedule is then replaced |
| `_finish_current_push` | `push_in_progress.wait_until_done()` |
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class PrivateTrainerApi(Trainer):
    """Turns private methods of Trainer into hooks, and private attributes into properties."""

    # Set by Trainer.
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    hub_model_id: str | None
    push_in_progress: Any = None  # Trainer sets it where `push_to_hub` is set
    optimizer: Any
    lr_scheduler: Any

    # -- hooks -------------------------------------------------------------------------------------------------------

    def write_checkpoint(self, folder: Path, write_files: Callable[[], None]) -> None:
        """Write a checkpoint; `write_files` writes what transformers has in one, and deletes old checkpoints."""
        raise NotImplementedError

    def complete_checkpoint(self, folder: Path) -> None:
        """Finish a checkpoint whose trainer state alone is missing; called on all processes."""
        raise NotImplementedError

    def upload_checkpoint(self, folder: Path) -> None:
        """Upload a checkpoint, if `push_to_hub` is set."""
        raise NotImplementedError

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Put the weights that are evaluated and saved into the model inside the block."""
        raise NotImplementedError

    # -- private API -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Call `write_checkpoint`.

        The event `on_save` comes when older checkpoints are deleted already, too late to clear the folder, and does not
        come at all if the disk is full. `save_model` is also called for other folders.
        """
        folder = self.run_directory(trial) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        save_checkpoint = super()._save_checkpoint
        self.write_checkpoint(folder, lambda: save_checkpoint(model, trial))

    def _save_rng_state(self, output_dir: str) -> None:
        """Call `complete_checkpoint`.

        This is the last file that every process writes, and the next one is the trainer state, which marks a checkpoint
        as complete. No event comes between them.
        """
        super()._save_rng_state(output_dir)
        self.complete_checkpoint(Path(output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Call `upload_checkpoint`.

        transformers would upload training_args.bin, which holds the token. Only `hub_strategy="end"` turns that off,
        and `args` and the files of a run would then say something that the user did not set.
        """
        self.upload_checkpoint(Path(checkpoint_folder))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, its configuration and the processor: during training with the averaged weights.

        Trainer passes `_internal_call=True` where it does not want the upload; the parameter has no public name.
        """
        with self.evaluated_weights():
            self.write_model(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_model(self, output_dir: str) -> None:
        """Write the weights that the model has, its configuration and the processor, without an upload."""
        super().save_model(output_dir, _internal_call=True)

    def run_directory(self, trial: Any) -> Path:
        """Return the folder of a run, which is inside `output_dir` for a trial of a hyperparameter search.

        The name of that folder depends on the search backend, and no public method returns it.
        """
        return Path(self._get_output_dir(trial))

    @property
    def train_batch_size(self) -> int:
        """Number of samples in a micro-batch of one process, as `auto_find_batch_size` has set it.

        `args.train_batch_size` is what the user set; `state.train_batch_size` changes after the data loader is made.
        """
        return self._train_batch_size
