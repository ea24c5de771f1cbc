"""What a run writes to its output folder: checkpoints that are complete or not used, and the best models."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..atomic_files import translate_disk_errors
from .arguments import RfDetrTrainingArguments
from .distributed import copy_full_tensor
from .lora import ADAPTER_FOLDER, load_adapter

logger = logging.get_logger(__name__)

_STATE_NAME = "rf_detr_state.json"
_WEIGHTS_NAME = "rf_detr_training_weights.safetensors"
_FILES_NAME = "rf_detr_files.json"
_FULL_DISK = (
    "Completed files are kept and partial files are removed. Free some space or lower save_total_limit, then train with"
    " resume_from_checkpoint=True."
)


# -- complete checkpoints --------------------------------------------------------------------------------------------


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """Return the newest complete checkpoint in a folder.

    Raises:
        ValueError: the folder has none.
    """
    checkpoints = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [path for path in checkpoints if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        problem = find_checkpoint_problem(path)
        if problem is None and not (path / _STATE_NAME).is_file():
            problem = f"it has no {_STATE_NAME}"
        if problem is None:
            return str(path)
        logger.warning(f"{path} is not a complete checkpoint: {problem}. Looking for an older one.")
    raise ValueError(f"{output_dir} has no complete checkpoint. Train without resume_from_checkpoint first.")


def find_checkpoint_problem(checkpoint: str | os.PathLike[str]) -> str | None:
    """Return why a checkpoint is not complete, or None if it is.

    The trainer state is written last, after a list of all other files with their sizes.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it is not a folder"
    try:
        TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        # A checkpoint of transformers' own Trainer has neither the state nor the list.
        state = _read_json(folder / _STATE_NAME) if (folder / _STATE_NAME).is_file() else {}
        sizes = _read_json(folder / _FILES_NAME) if state.get("lists_files") else {}
        for name, size in sizes.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} of {size} bytes"
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, "pt"):  # compares the file's length with its header
                pass
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        return f"a file is missing or cannot be read: {error}"
    return None


@contextmanager
def new_checkpoint(folder: Path, is_writer: bool) -> Iterator[None]:
    """Empty the folder of a checkpoint that is written inside the block; remove it if the disk fails.

    Args:
        folder: The checkpoint; one of an earlier run may be there.
        is_writer: Whether this process changes the folder.

    Raises:
        DiskError: the disk is full or broken.
    """
    try:
        with translate_disk_errors(folder, _FULL_DISK):
            if is_writer:
                # A folder without this file is incomplete, even if the deletion is interrupted.
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            yield
    except OSError:
        if is_writer and find_checkpoint_problem(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def write_file_list(checkpoint: Path) -> None:
    """Write names and sizes of the files of a checkpoint, when only its trainer state is missing."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    (checkpoint / _FILES_NAME).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


# -- the state of training -------------------------------------------------------------------------------------------


def write_training_state(checkpoint: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write what resuming needs besides the files of transformers: a JSON state and tensors by name."""
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint / _WEIGHTS_NAME)
    (checkpoint / _STATE_NAME).write_text(json.dumps(state, indent=1), encoding="utf-8")


def read_training_state(checkpoint: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return what [`write_training_state`] wrote; None and no tensors for transformers' own checkpoints."""
    if not (checkpoint / _STATE_NAME).is_file():
        return None, {}
    weights = checkpoint / _WEIGHTS_NAME
    return _read_json(checkpoint / _STATE_NAME), load_file(weights) if weights.is_file() else {}


def lora_rank(checkpoint: Path) -> int:
    """Return the rank of the LoRA weights in a checkpoint, 0 if there are none."""
    state = checkpoint / _STATE_NAME
    return _read_json(state).get("lora", 0) if state.is_file() else 0


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# -- the best models -------------------------------------------------------------------------------------------------


class BestModels:
    """The best models of a run: `best_ema`, `best_regular`, and `best_total`, the better of them.

    Args:
        args: Arguments of the run: the direction of the metric, and whether this process writes files.
    """

    def __init__(self, args: RfDetrTrainingArguments) -> None:
        self.args = args
        self.values: dict[str, float] = {}  # "ema", "regular" or "total" -> the best value of the metric

    def keep(self, kind: str, value: float, directory: Path, write: Callable[[str, Path], None]) -> None:
        """Write `best_<kind>` if `value` is the best of its kind so far, and `best_total` if it is the best of all.

        Args:
            kind: "ema" or "regular".
            value: The metric. One that is not finite is never the best.
            directory: Output folder of the run.
            write: Writes the weights of a kind to a folder; called on all processes.

        Raises:
            DiskError: the disk is full or broken; the folders are unchanged.
        """
        if not math.isfinite(value):
            return
        sign = 1 if self.args.greater_is_better else -1
        is_better = {
            name: name not in self.values or sign * value > sign * self.values[name] for name in (kind, "total")
        }
        if not is_better[kind]:
            return
        partial, is_writer = directory / f".best_{kind}", self.args.should_save
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)  # from a run that was killed
        try:
            with translate_disk_errors(directory / f"best_{kind}", _FULL_DISK):
                write(kind, partial)
                for name in [kind] + ["total"] * is_better["total"]:
                    self.values[name] = value
                    if is_writer:
                        replace_folder(partial, directory / f"best_{name}")
        finally:
            if is_writer:
                shutil.rmtree(partial, ignore_errors=True)

    def load_total(self, model: nn.Module, directory: Path) -> None:
        """Load `best_total`, which need not be the best checkpoint's model if `eval_base_model` is set.

        A run that was resumed in another output folder has none; the model is left as it is.
        """
        folder = directory / "best_total"
        if "total" not in self.values or not folder.is_dir():
            return
        if self.args.lora:
            load_adapter(model, folder / ADAPTER_FOLDER)
        elif (folder / "model.safetensors").is_file():
            weights = load_file(folder / "model.safetensors")
            for name, parameter in model.named_parameters():
                copy_full_tensor(parameter, weights[name])
        elif hasattr(model, "load_adapter"):
            model.load_adapter(str(folder), model.active_adapters[0])


def replace_folder(source: Path, target: Path) -> None:
    """Copy a model folder to `target` by renaming a complete copy; after a kill, [`restore_folder`] restores it."""
    restore_folder(target)
    new, old = _temporary_names(target)
    try:
        ignored = shutil.ignore_patterns("training_args.bin")
        shutil.copytree(source, new, ignore=ignored, copy_function=shutil.copyfile)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Undo the rename of a folder whose replacement was interrupted, and delete what is left over."""
    new, old = _temporary_names(target)
    if old.exists() and not target.exists():
        os.replace(old, target)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)


def restore_best_models(output_dir: str | os.PathLike[str]) -> None:
    """Call [`restore_folder`] for the best models of a run."""
    for kind in ("ema", "regular", "total"):
        restore_folder(Path(output_dir, f"best_{kind}"))


def _temporary_names(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".new_{target.name}"), target.with_name(f".old_{target.name}")
