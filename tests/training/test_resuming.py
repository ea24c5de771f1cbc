"""A run that was killed resumes bit for bit."""

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file
from transformers import TrainerCallback

from transformers_rfdetr.data.prepared import SamplePreparation
from transformers_rfdetr.training.checkpoints import newest_checkpoint
from transformers_rfdetr.training.trainer import RfDetrTrainer

import training_run
from faults import attempt
from training_run import build_trainer, drawn, drawn_stream, on_two_processes

TIMING = ("runtime", "per_second", "preparation_time")


def untimed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMING)} for entry in entries]


@pytest.mark.skipif(os.name != "posix", reason="forks and kills a process")
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_run_killed_in_the_middle_of_an_epoch_resumes_bit_for_bit(workers, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 4,  # at 4 neither an epoch (of 3 steps) nor a log interval (of 5) ends
        "logging_steps": 5,
        "save_total_limit": None,
        "load_best_model_at_end": False,
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": 1,
        "early_stopping": True,
        "drop_path": 0.2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    }

    def build(folder: Path, *callbacks: TrainerCallback) -> RfDetrTrainer:
        data = {"train_dataset": drawn(6), "eval_dataset": drawn(3, 100)}
        return build_trainer(folder, {"callbacks": [*callbacks], **data}, **settings)

    uninterrupted = build(tmp_path / "uninterrupted")
    uninterrupted.train()

    killed = tmp_path / "killed"

    def train_until_it_is_killed() -> None:
        build(killed, training_run.Die(5)).train()

    assert attempt(train_until_it_is_killed).signal == signal.SIGKILL
    (killed / "checkpoint-5").mkdir()  # a kill in the middle of a checkpoint leaves a folder without a state
    (killed / "checkpoint-7").mkdir()
    assert newest_checkpoint(str(killed)) == str(killed / "checkpoint-4")
    torch.manual_seed(123)  # nothing may depend on what was drawn before
    resumed = build(killed)
    resumed.train(resume_from_checkpoint=True)

    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert untimed(resumed.state.log_history) == untimed(uninterrupted.state.log_history)
    assert resumed.state.best_metric == uninterrupted.state.best_metric
    last = f"checkpoint-{uninterrupted.state.global_step}"
    for file in ("model.safetensors", "rf_detr_training_weights.safetensors"):
        ours, theirs = load_file(killed / last / file), load_file(tmp_path / "uninterrupted" / last / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (killed / last / "rf_detr_state.json").read_text() == (
        tmp_path / "uninterrupted" / last / "rf_detr_state.json"
    ).read_text()
    for file in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (torch.load(folder / last / file) for folder in (killed, tmp_path / "uninterrupted"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


STREAMED = {"max_steps": 5, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 2, "multi_scale": False}


def stream_trainer(folder: Path | str, *callbacks: TrainerCallback, **settings: Any) -> RfDetrTrainer:
    data = {"train_dataset": drawn_stream(), "eval_dataset": None}
    return build_trainer(folder, {"callbacks": [*callbacks], **data}, **(STREAMED | settings))


def test_a_stream_resumes_bit_for_bit_without_preparing_again_what_it_has_used(tmp_path, monkeypatch):
    uninterrupted = stream_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    resumed = stream_trainer(tmp_path / "resumed")
    prepared: list[int] = []
    prepare = SamplePreparation.__call__

    def count(self: Any, sample: Any, *key: int) -> Any:
        prepared.append(sample["image_id"])
        return prepare(self, sample, *key)

    monkeypatch.setattr(SamplePreparation, "__call__", count)
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-4"))
    assert len(prepared) <= 4  # the last of 5 steps of 2 images, and one batch that the data loader reads ahead
    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def train_stream(folder: str, *callbacks: TrainerCallback, resume: bool = False) -> dict[str, torch.Tensor]:
    trainer = stream_trainer(folder, *callbacks, dataloader_num_workers=2)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="forks and kills processes")
def test_a_stream_on_two_processes_with_two_workers_each_resumes_bit_for_bit_after_a_kill(tmp_path):
    for name in ("uninterrupted", "killed"):
        (tmp_path / name).mkdir()
    expected, _ = on_two_processes(tmp_path / "uninterrupted", train_stream)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        on_two_processes(tmp_path / "killed", train_stream_until_killed)
    assert newest_checkpoint(str(tmp_path / "killed")).endswith("checkpoint-2")
    for found in on_two_processes(tmp_path / "killed", functools.partial(train_stream, resume=True)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def train_stream_until_killed(folder: str) -> None:
    train_stream(folder, training_run.Die(3))


def test_a_run_with_copy_paste_resumes_bit_for_bit(tmp_path):
    settings = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 3, "multi_scale": False}

    def build(folder: str) -> RfDetrTrainer:
        return build_trainer(tmp_path / folder, {"augmentation": "strong", "train_dataset": drawn(4)}, **settings)

    uninterrupted = build("uninterrupted")  # two epochs of 2 steps
    uninterrupted.train()
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-3"))
    assert uninterrupted.state.global_step == resumed.state.global_step == 4
    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


class SmallMemory(RfDetrTrainer):
    """Runs out of memory in the third optimizer step."""

    num_calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().compute_loss(*args, **kwargs)


def test_after_an_out_of_memory_error_a_smaller_batch_trains_as_if_it_were_the_first(tmp_path, hf_log):
    settings = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 1, "multi_scale": False}
    settings["num_train_epochs"] = 1
    trainer = build_trainer(tmp_path / "small", **settings, per_device_train_batch_size=4, auto_find_batch_size=True)
    trainer.__class__ = SmallMemory
    trainer.train()
    size = trainer.train_batch_size
    assert size < 4
    assert f"per_device_train_batch_size={size}" in hf_log.text
    expected = build_trainer(tmp_path / "expected", **settings, per_device_train_batch_size=size)
    expected.train()
    assert untimed(trainer.state.log_history) == untimed(expected.state.log_history)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_a_folder_without_a_complete_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        build_trainer(tmp_path).train(resume_from_checkpoint=True)
