"""What a training run does about losses and gradients that are not finite, and about processes that died."""

import os
import re
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Listener
from time import sleep
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from .checkpoints import newest_checkpoint
from .distributed import full_tensor

Result = TypeVar("Result")

logger = logging.get_logger(__name__)

_MAX_LISTED_IMAGES = 16
_MAX_SKIPPED_IN_A_ROW = 10
_SIGNAL_DELAY_SECONDS = 0.2


class NonFiniteGuard:
    """Prevents optimizer steps whose loss or gradient is not finite on any process.

    A NaN loss means that predictions, targets or the accumulated gradients are broken. One step on it makes every
    weight, and their average, NaN. The check costs one scalar all-reduce for each optimizer step.

    Args:
        policy: "stop" raises an error. "skip" discards the step with a warning, at most 9 times in a row.
        names_of: Maps image ids to the names that messages give the images.
    """

    def __init__(self, policy: str, names_of: Callable[[Sequence[int]], list[str]]) -> None:
        self.policy, self.names_of = policy, names_of
        self.num_in_a_row = 0
        self._micro_batches: list[_MicroBatch] = []

    def watch(self, loss: Tensor, labels: Sequence[Mapping[str, Tensor]], outputs: Mapping[str, Any]) -> None:
        """Remember a micro-batch: its loss, its B images, and which of them have finite predictions."""
        parts = (outputs["logits"], outputs["pred_boxes"])
        finite = torch.stack([part.detach().float().flatten(1).sum(1) for part in parts]).isfinite().all(0)
        self._micro_batches.append(_MicroBatch(loss.detach(), [target.get("image_id") for target in labels], finite))

    def allows_step(self, model: nn.Module, accelerator: Any, step: int) -> bool:
        """Return whether the optimizer may take a step; all processes call it when the gradients are complete.

        Raises:
            FloatingPointError: it may not, and the policy is "stop". The weights are those before the step.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        if not micro_batches:  # a subclass overrides compute_loss
            return True
        finite = torch.stack([batch.loss for batch in micro_batches]).isfinite().all()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and accelerator.scaler is None:  # a scaler finds overflows itself, and expects some
            finite = finite & full_tensor(torch.nn.utils.get_total_norm(gradients)).isfinite().to(finite.device)
        if not accelerator.reduce((~finite).float(), reduction="sum").item():
            self.num_in_a_row = 0
            return True
        self.num_in_a_row += 1
        problem = self._describe(micro_batches, model, step)
        if self.policy == "stop":
            raise FloatingPointError(f"{problem} {_REMEDY}; non_finite_loss='skip' discards such optimizer steps.")
        if self.num_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{problem} {self.num_in_a_row} optimizer steps in a row were skipped. {_REMEDY}.")
        logger.warning(f"{problem} It is skipped.")
        return False

    def _describe(self, micro_batches: Sequence["_MicroBatch"], model: nn.Module, step: int) -> str:
        """Return which value is not finite, and the images that may have caused it.

        Raises:
            FloatingPointError: weights of the model are not finite, so that no image is the cause.
        """
        found = gather_object([self._suspects(micro_batches)])
        is_loss = any(is_local_loss for is_local_loss, _ in found)
        names = [name for is_local_loss, names in found for name in names if is_local_loss or not is_loss]
        problem = f"The {'loss' if is_loss else 'gradient'} of optimizer step {step} is not finite"
        for name, weight in model.named_parameters():
            if not full_tensor(weight).isfinite().all():
                raise FloatingPointError(
                    f"{problem} because weights of the model are not, such as {name}. Resume from an earlier"
                    " checkpoint, or start from another model."
                )
        listed = ", ".join(names[:_MAX_LISTED_IMAGES])
        if len(names) > _MAX_LISTED_IMAGES:
            listed += f" and {len(names) - _MAX_LISTED_IMAGES} more"
        return f"{problem}, with the images {listed}. The weights were not changed."

    def _suspects(self, micro_batches: Sequence["_MicroBatch"]) -> tuple[bool, list[str]]:
        """Return whether a loss of this process is not finite, and the names of images that may have caused it."""
        broken = [batch for batch in micro_batches if not batch.loss.isfinite()]
        ids = []
        for batch in broken or micro_batches:
            chosen = [
                image_id
                for image_id, is_finite in zip(batch.image_ids, batch.finite.tolist(), strict=True)
                if not is_finite
            ]
            ids += chosen or batch.image_ids  # masks or targets are broken, so it may be any of them
        return bool(broken), list(dict.fromkeys(self.names_of([int(one) for one in ids if one is not None])))


_REMEDY = (
    "Check these images and their annotations (`transformers-rfdetr check-dataset`), lower the learning rate, or train"
    " in float32 or bf16"
)


class _MicroBatch(NamedTuple):
    loss: Tensor
    image_ids: list[Tensor | None]
    finite: Tensor  # (B,) bool: whether the predictions for an image are finite


def discard_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Any, is_clipped: bool) -> None:
    """Make the next optimizer step do nothing.

    Args:
        model: The model.
        optimizer: Its optimizer.
        accelerator: Its `scaler` skips steps with infinite gradients.
        is_clipped: Whether gradients were clipped, for which a scaler has looked for overflows already.
    """
    if accelerator.scaler is None or is_clipped:
        optimizer.zero_grad()
    else:  # a scaler that has not looked for overflows yet fails without gradients
        next(weight.grad for weight in model.parameters() if weight.grad is not None).fill_(float("inf"))


def check_workers(num_workers: int) -> None:
    """Raise an OSError if data loader workers could not send images to this process, which would wait forever.

    They send them through sockets in the temporary folder, whose path may be too long for a socket.
    """
    if num_workers:
        try:
            Listener().close()
        except OSError as error:
            raise OSError(
                f"Data loader workers cannot open a socket in the temporary folder {tempfile.gettempdir()}: {error}."
                " Set TMPDIR to a short path such as /tmp, or pass dataloader_num_workers=0."
            ) from error


def translate_worker_errors(
    run: Callable[[], Result], num_processes: int, output_dir: str | os.PathLike[str] | None = None
) -> Result:
    """Return `run()`; translate errors that a data loader worker, or the death of a worker or process, raises in it.

    Args:
        run: What is done. This is no context manager: if a worker died while its tensor was fetched, torch's signal
            handler may raise a second error before the first is handled, and `__exit__` cannot handle both.
        num_processes: Number of processes of the run.
        output_dir: Folder whose newest checkpoint the message names, if the run can be resumed.

    Raises:
        ChildProcessError: a data loader worker was killed.
        ConnectionAbortedError: another process of the run died.
        Exception: the error of a data loader worker, without the worker's traceback in its message.
    """
    try:
        try:
            return run()
        except Exception as error:
            _raise_translated(error, num_processes, output_dir)
    except RuntimeError as signal_error:  # raised in whatever code runs when the signal of a dead worker arrives
        _raise_translated(signal_error, num_processes, output_dir)


def _raise_translated(error: Exception, num_processes: int, output_dir: str | os.PathLike[str] | None) -> NoReturn:
    translated = _translate(error, num_processes, output_dir)
    if translated is error:
        raise error
    raise translated from error


def _translate(error: Exception, num_processes: int, output_dir: str | os.PathLike[str] | None) -> Exception:
    """Return the error to raise instead of `error`, or `error` itself."""
    text, remedy = str(error), ""
    if text.startswith("Caught ") and "in DataLoader worker process" in text.partition("\n")[0]:
        message = re.split(rf"\n(?:[\w.]+\.)?{type(error).__name__}: ", text.strip())[-1]
        return type(error)(message)
    is_cut_off = isinstance(error, ConnectionError | EOFError) and _is_from_worker(error)
    if not isinstance(error, RuntimeError) and not is_cut_off:
        return error
    if is_cut_off:  # the socket closes just before the signal arrives, whose error names the cause
        sleep(_SIGNAL_DELAY_SECONDS)
    if output_dir is not None:
        with suppress(ValueError):
            remedy = f" resume_from_checkpoint=True resumes from {newest_checkpoint(output_dir)}."
    if is_cut_off or ("DataLoader worker" in text and ("killed" in text or "exited unexpectedly" in text)):
        return ChildProcessError(
            f"A data loader worker died: {text.rstrip('. ')}. The usual cause is too little memory: lower"
            " dataloader_num_workers (0 reads in this process) or per_device_train_batch_size, or give a container"
            f" more shared memory (docker run --shm-size 8g).{remedy}"
        )
    if num_processes > 1 and any(words in text.lower() for words in _CONNECTION_LOST):
        return ConnectionAbortedError(
            "Another process of this run died or cannot be reached. Its own message, or the system log (out of"
            f" memory?), has the reason.{remedy} This process got: {text}"
        )
    return error


def _is_from_worker(error: BaseException) -> bool:
    """Return whether the error occurred while a tensor of a data loader worker was fetched: the worker was dead."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))  # reads no source: SIGCHLD may come now
    return any(frame.f_code.co_name == "rebuild_storage_fd" for frame in frames)


# What gloo and NCCL say.
_CONNECTION_LOST = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "remote process",
    "remote peer",
    "timed out",
    "timeout",
)
