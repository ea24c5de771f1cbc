"""What a training run does when something breaks: updates that are not finite, checkpoints cut off, dead processes."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .optimization import full_tensor

logger = logging.get_logger(__name__)

STATE_NAME = "rf_detr_state.json"
WEIGHTS_NAME = "rf_detr_training_weights.safetensors"
FILES_NAME = "rf_detr_files.json"
_MOST_NAMES = 16
_MOST_SKIPPED_IN_A_ROW = 10


# -- updates that are not finite -------------------------------------------------------------------------------------


class UpdateGuard:
    """Lets no update reach the weights whose loss or gradient is not finite on any process.

    A loss of NaN means that predictions, targets or the gradients' sum over the window are broken; one step on it
    makes every weight, and their average, NaN. The check costs one small sum over the processes for each update.

    Args:
        policy: "stop" raises; "skip" leaves the update out, until that was so 10 times in a row.
        names_of: Image ids -> how a message calls the images.
    """

    def __init__(self, policy: str, names_of: Callable[[Sequence[int]], list[str]]) -> None:
        self.policy, self.names_of = policy, names_of
        self.num_in_a_row = 0
        self._window: list[_Batch] = []

    def watch(self, loss: Tensor, labels: Sequence[Mapping[str, Tensor]], outputs: Mapping[str, Any]) -> None:
        """Note a micro-batch: its loss, its B images, and which of them have finite predictions."""
        parts = (outputs["logits"], outputs["pred_boxes"])
        finite = torch.stack([part.detach().float().flatten(1).sum(1) for part in parts]).isfinite().all(0)
        self._window.append(_Batch(loss.detach(), [target.get("image_id") for target in labels], finite))

    def passes(self, model: nn.Module, accelerator: Any, update: int) -> bool:
        """Whether the update may reach the weights; called on every process when its gradients are complete.

        Raises:
            FloatingPointError: it may not, and the policy is "stop"; the weights are still those before it.
        """
        window, self._window = self._window, []
        if not window:  # compute_loss is another one's
            return True
        finite = torch.stack([batch.loss for batch in window]).isfinite().all()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and accelerator.scaler is None:  # which looks for overflow itself, and expects it now and then
            finite = finite & full_tensor(torch.nn.utils.get_total_norm(gradients)).isfinite().to(finite.device)
        broken = accelerator.reduce((~finite).float(), reduction="sum").item()
        if not broken:
            self.num_in_a_row = 0
            return True
        self.num_in_a_row += 1
        what, pictures = self._blame(window)
        problem = f"the {what} of update {update} is not finite"
        bad_weights = [
            name for name, weight in model.named_parameters() if not full_tensor(weight.detach()).isfinite().all()
        ]
        if bad_weights:
            raise FloatingPointError(
                f"{problem} because weights of the model are not, such as {bad_weights[0]}; go on from an earlier"
                " checkpoint, or train from another one"
            )
        problem += f", with the pictures {pictures}"
        if self.policy == "stop" or self.num_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            often = "" if self.policy == "stop" else f", and {self.num_in_a_row} updates in a row were skipped"
            raise FloatingPointError(
                f"{problem}{often}. The weights were not changed. Look at these pictures and their annotations"
                " (`transformers-rfdetr check-dataset`), lower the learning rate, or train in float32 or bf16"
                + ("; non_finite_loss='skip' leaves such updates out." if self.policy == "stop" else ".")
            )
        logger.warning(f"{problem}; it is left out")
        return False

    def _blame(self, window: Sequence["_Batch"]) -> tuple[str, str]:
        """What is broken on any process, "loss" or "gradient", and the pictures that may have done it."""
        found = gather_object([self._describe(window)])
        is_of_loss = any(losses for losses, _ in found)
        names = [name for losses, names in found for name in names if losses or not is_of_loss]
        listed = ", ".join(names[:_MOST_NAMES]) + f" and {len(names) - _MOST_NAMES} more" * (len(names) > _MOST_NAMES)
        return "loss" if is_of_loss else "gradient", listed

    def _describe(self, window: Sequence["_Batch"]) -> tuple[bool, list[str]]:
        """Whether a loss of this process is broken, and the images that may have done it."""
        broken = [batch for batch in window if not batch.loss.isfinite()]
        ids = []
        for batch in broken or window:
            chosen = [
                ident for ident, is_fine in zip(batch.image_ids, batch.finite.tolist(), strict=True) if not is_fine
            ]
            ids += chosen or batch.image_ids  # its masks or its targets, so that it may be any of them
        return bool(broken), list(dict.fromkeys(self.names_of([int(ident) for ident in ids if ident is not None])))


class _Batch(NamedTuple):
    loss: Tensor
    image_ids: list[Tensor | None]
    finite: Tensor  # (B,) bool, whether the predictions of an image are


# -- checkpoints -----------------------------------------------------------------------------------------------------


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """The newest whole checkpoint of a folder.

    Raises:
        ValueError: there is none.
    """
    checkpoints = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [path for path in checkpoints if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        reason = find_checkpoint_problem(path) or ("" if (path / STATE_NAME).is_file() else f"it has no {STATE_NAME}")
        if not reason:
            return str(path)
        logger.warning(f"{path} is not a whole checkpoint ({reason}); looking for an older one")
    raise ValueError(f"no whole checkpoint in {output_dir}; train without resume_from_checkpoint first")


def list_files(checkpoint: str | os.PathLike[str]) -> None:
    """Note names and sizes of what is in a checkpoint, as the last but for its state."""
    folder = Path(checkpoint)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / FILES_NAME).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def find_checkpoint_problem(checkpoint: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint is not whole, or None if it is: its state, written last, and the lengths of its files."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it is no folder"
    try:
        TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        # The stock Trainer's have no such state.
        state = _read_json(folder / STATE_NAME) if (folder / STATE_NAME).is_file() else {}
        sizes = _read_json(folder / FILES_NAME) if state.get("lists_files") else {}
        for name, size in sizes.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} of {size} bytes"
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, "pt"):  # which compares the length with the header's
                pass
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        return f"a file is missing or cannot be read: {error}"
    return None


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def replace_folder(source: Path, target: Path) -> None:
    """Copy a model folder to `target`, which is never there in part; [`restore_folder`] mends a kill in between."""
    restore_folder(target)
    fresh, old = _beside(target)
    try:
        shutil.copytree(
            source, fresh, ignore=shutil.ignore_patterns("training_args.bin"), copy_function=shutil.copyfile
        )
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Give a folder that was being replaced when its process was killed its name back."""
    fresh, old = _beside(target)
    if old.exists() and not target.exists():
        os.replace(old, target)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)


def restore_best(output_dir: str | os.PathLike[str]) -> None:
    """Do so for the best models of a run."""
    for kind in ("ema", "regular", "total"):
        restore_folder(Path(output_dir, f"best_{kind}"))


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".new_{target.name}"), target.with_name(f".old_{target.name}")


# -- processes -------------------------------------------------------------------------------------------------------


def check_workers(num_workers: int) -> None:
    """Raise OSError where processes that read pictures could not hand them over, so that a run would wait for ever.

    They do it through sockets in the temporary folder, whose path may be too long for one.
    """
    if num_workers:
        try:
            Listener().close()
        except OSError as error:
            raise OSError(
                f"processes that read pictures cannot hand them over through {tempfile.gettempdir()}: {error}; set"
                " TMPDIR to a short path, such as /tmp, or pass dataloader_num_workers=0"
            ) from error


@contextmanager
def translate_worker_errors(num_processes: int, resumed_from: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Say in words what it means that a process which reads pictures, or another one of the run, is gone.

    Args:
        num_processes: Of the run.
        resumed_from: The output folder, where there is a training to be resumed.

    Raises:
        ChildProcessError: a worker of a data loader was killed.
        ConnectionAbortedError: another process of the run is gone.
    """
    try:
        yield
    except RuntimeError as error:
        text, remedy = str(error), ""
        if resumed_from is not None:
            with suppress(ValueError):
                remedy = f" resume_from_checkpoint=True goes on from {newest_checkpoint(resumed_from)}."
        if "DataLoader worker" in text and ("killed" in text or "exited unexpectedly" in text):
            raise ChildProcessError(
                f"a process that reads pictures ended: {text.rstrip('. ')}. Mostly memory was short: pass a lower"
                " dataloader_num_workers (0 reads in this process) or per_device_train_batch_size, or give a container"
                f" more shared memory (docker run --shm-size 8g).{remedy}"
            ) from error
        if num_processes > 1 and any(words in text.lower() for words in _GONE):
            raise ConnectionAbortedError(
                "another process of this run is gone, or cannot be reached; its own message, or the system's (short"
                f" memory?), says why.{remedy} This one saw: {text}"
            ) from error
        raise


# What gloo and NCCL say.
_GONE = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "remote process",
    "remote peer",
    "timed out",
    "timeout",
)
