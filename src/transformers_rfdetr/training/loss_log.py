"""The mean loss of the log, over the optimizer steps that were taken."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

# Terms of the last decoder layer's loss that are logged beside the sum of all layers.
LOSS_TERMS = ("loss_ce", "loss_bbox", "loss_giou", "loss_mask_ce", "loss_mask_dice")


class LossLog:
    """Sums the loss and its terms since the last log entry, and the loss since the beginning of the run.

    A discarded optimizer step counts in neither. Values are this process's share of a sum over all processes, and are
    added up over processes only for a log entry.

    Args:
        accelerator: Reduces and gathers over processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._step_sums: dict[str, Tensor] = {}  # over the micro-batches of the current optimizer step
        self._sums: dict[str, Tensor] = {}  # over the steps since the last log entry
        self._num_taken = self._num_discarded = 0  # steps since the last log entry
        self._run_loss, self._run_steps = 0.0, 0  # summed over the steps of the run that are in the log

    def add(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's share of the loss or of a term."""
        self._step_sums[name] = self._step_sums.get(name, 0) + value.detach().float()

    def end_step(self, is_taken: bool) -> None:
        """Count an optimizer step, whose losses are discarded with it if it is not taken."""
        step_sums, self._step_sums = self._step_sums, {}
        if is_taken:
            self._num_taken += 1
            for name, value in step_sums.items():
                self._sums[name] = self._sums.get(name, 0) + value
        else:
            self._num_discarded += 1

    def pop_entry(self) -> dict[str, float]:
        """Return the means since the last log entry and begin a new one; all processes must call it."""
        sums = self._reduce_sums()
        entry = {"loss": float("nan")} | {name: value / self._num_taken for name, value in sums.items()}
        if self._num_discarded:
            entry["skipped_steps"] = self._num_discarded
        self._run_loss += sums.get("loss", 0.0)
        self._run_steps += self._num_taken
        self._sums, self._num_taken, self._num_discarded = {}, 0, 0
        return entry

    def mean_of_run(self) -> float:
        """Return the mean loss of all steps taken since the beginning of the run; all processes must call it."""
        num_steps = self._run_steps + self._num_taken
        loss = self._run_loss + self._reduce_sums().get("loss", 0.0)
        return loss / num_steps if num_steps else float("nan")

    def _reduce_sums(self) -> dict[str, float]:
        return {name: self.accelerator.reduce(self._sums[name], "sum").item() for name in sorted(self._sums)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes, as JSON can hold it; all processes must call it."""
        gather = self.accelerator.gather
        return {
            "sums": {name: gather(self._sums[name].reshape(1)).tolist() for name in sorted(self._sums)},
            "num_taken": self._num_taken,
            "num_discarded": self._num_discarded,
            "run_loss": self._run_loss,
            "run_steps": self._run_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a [`state_dict`]; a process that did not exist then has no share."""
        rank, device = self.accelerator.process_index, self.accelerator.device
        self._sums = {
            name: torch.tensor(values[rank] if rank < len(values) else 0.0, device=device)
            for name, values in state["sums"].items()
        }
        self._num_taken, self._num_discarded = state["num_taken"], state["num_discarded"]
        self._run_loss, self._run_steps = state["run_loss"], state["run_steps"]
