"""Killed processes and full disks: completed files are kept, and the next run resumes."""

import errno
import functools
import json
import math
import multiprocessing
import multiprocessing.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor
from transformers_rfdetr.atomic_files import (
    DiskError,
    atomic_directory,
    atomic_file,
    check_writable,
    make_directory,
    translate_disk_errors,
    write_text,
)
from transformers_rfdetr.data.checks.check import check_dataset
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.inference.folder import FolderOptions, predict_to_folder
from transformers_rfdetr.inference.image_list import list_images
from transformers_rfdetr.inference.prediction_files import LINES
from transformers_rfdetr.training.checkpoints import find_checkpoint_problem, newest_checkpoint, restore_folder
from transformers_rfdetr.training.faults import translate_worker_errors
from transformers_rfdetr.training.trainer import RfDetrTrainer

import training_run
from faults import Ended, attempt, tree
from small_models import small_config
from training_run import PLAIN, build_trainer, drawn

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and kills processes")

# -- a checkpoint ----------------------------------------------------------------------------------------------------

# 10 optimizer steps. The second save, at step 8, replaces best_ema and best_total, and removes checkpoint-4.
SETTINGS = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "multi_scale": False,
}
BEST = ("best_ema", "best_total")


class Case(NamedTuple):
    """A folder in which a fault hit the second save."""

    fault: str
    ended: Ended
    run: Path


class Saves(NamedTuple):
    """A run without faults, and copies of it in each of which a fault hit the second save."""

    weights: dict[str, torch.Tensor]
    first: dict[str, dict[str, bytes]]  # folder -> its files, after the first save
    second: dict[str, dict[str, bytes]]
    cases: list[Case]


def snapshot(run: Path) -> dict[str, dict[str, bytes]]:
    return {folder.name: tree(folder) for folder in run.iterdir() if not folder.name.startswith(".")}


# A process is killed before every tenth change of the disk, and in the long run before every change.
every_change = [10, pytest.param(1, marks=pytest.mark.long)]


def faults_of(clean: Ended, step: int, lengths: Sequence[int], num_parts: int) -> dict[str, dict[str, Any]]:
    """Return faults before every `step`-th change of the disk, and in the middle of the files."""
    parts = (clean.num_bytes * part // num_parts for part in range(1, num_parts))
    return {
        **{f"killed before change {place}": {"dies_at": place} for place in range(0, clean.num_changes, step)},
        **{f"killed in a file at byte {length}": {"longest": length} for length in lengths},
        **{f"disk full after {room} bytes": {"room": room} for room in (0, 1, *parts, clean.num_bytes - 2)},
    }


def improving_trainer() -> RfDetrTrainer:
    """Return a trainer of which each evaluation is better than the last."""
    trainer = build_trainer("run", **SETTINGS)
    evaluation_loop = trainer.evaluation_loop

    def improving(*args: Any, **kwargs: Any) -> Any:
        output = evaluation_loop(*args, **kwargs)
        output.metrics["eval_segm_AP"] = trainer.state.global_step / 100
        return output

    trainer.evaluation_loop = improving
    return trainer


@pytest.fixture(scope="module", params=every_change, ids="every {} changes".format)
def saves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saves]:
    root = tmp_path_factory.mktemp("saves")
    cases: list[Case] = []
    first: dict[str, dict[str, bytes]] = {}
    with pytest.MonkeyPatch.context() as patch:
        (root / "clean").mkdir()
        patch.chdir(root / "clean")  # "run" is a different folder in every case
        trainer = improving_trainer()
        keep_best_models = trainer.keep_best_models

        def second_save(metrics: dict[str, Any]) -> None:
            if trainer.state.global_step == 8:
                first.update(snapshot(Path("run")))

                def save() -> None:
                    os.chdir(root / str(len(cases)))
                    keep_best_models(metrics)
                    trainer._determine_best_metric(metrics, None)
                    trainer._save_checkpoint(trainer.model, None)

                def save_with_fault(name: str, **fault: Any) -> Ended:
                    run = root / str(len(cases)) / "run"
                    shutil.copytree("run", run)
                    ended = attempt(save, **fault)
                    cases.append(Case(name, ended, run))
                    return ended

                clean = save_with_fault("none")
                largest = max(path.stat().st_size for path in cases[0].run.rglob("*") if path.is_file())
                lengths = [0, 1, 1000, largest // 3, largest - 1]
                for name, fault in faults_of(clean, request.param, lengths, num_parts=7).items():
                    save_with_fault(name, **fault)
                for length in lengths:
                    save_with_fault(f"a file larger than {length}", longest=length, dies_of_length=False)
            keep_best_models(metrics)

        trainer.keep_best_models = second_save
        trainer.train()
        weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        yield Saves(weights, first, snapshot(cases[0].run), cases)


def test_the_faults_hit_every_part_of_a_save(saves):
    clean = saves.cases[0].ended
    assert (clean.signal, clean.error) == (0, None)
    assert set(saves.first) == {*BEST, "checkpoint-4"}
    assert set(saves.second) == {*BEST, "checkpoint-8"}
    signals = {case.ended.signal for case in saves.cases}
    assert signals == {0, signal.SIGKILL, signal.SIGXFSZ}
    assert clean.num_changes > 40


def test_after_any_fault_the_newest_checkpoint_is_complete(saves):
    newest = []
    for case in saves.cases[1:]:
        name = Path(newest_checkpoint(case.run)).name
        expected = saves.first if name == "checkpoint-4" else saves.second
        assert tree(case.run / name) == expected[name], case.fault
        if case.ended.signal == signal.SIGKILL:
            newest.append(name)
    assert newest == sorted(newest)  # once the new one is complete, it stays
    assert set(newest) == {"checkpoint-4", "checkpoint-8"}


def test_after_any_fault_the_best_models_are_those_of_the_first_or_second_save(saves):
    for case in saves.cases[1:]:
        for name in BEST:
            if case.ended.signal == 0:  # after an error, nothing needs to be restored
                assert (case.run / name).is_dir(), case.fault
            restore_folder(case.run / name)
            assert tree(case.run / name) in (saves.first[name], saves.second[name]), case.fault


def test_an_error_of_a_full_disk_names_the_folder_and_leaves_no_partial_files(saves):
    failed = [case for case in saves.cases if case.ended.error is not None]
    assert len(failed) > 8
    for case in failed:
        assert isinstance(case.ended.error, OSError), case.fault
        text = str(case.ended.error)
        assert "cannot be written: " in text, case.fault
        assert "resume_from_checkpoint=True" in text
        if case.fault.startswith("disk full"):
            assert "No space left on device" in text
        assert not (case.run / "checkpoint-8").exists() or find_checkpoint_problem(case.run / "checkpoint-8") is None, (
            case.fault
        )
        assert not [path for path in case.run.iterdir() if path.name.startswith(".")], case.fault


class Die(TrainerCallback):
    """Kill the process in an evaluation."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["killed in evaluation", "killed in a file", "disk full"])
def test_training_resumes_to_the_same_weights(kind, saves, monkeypatch):
    if kind == "killed in evaluation":
        [case] = [case for case in saves.cases if case.fault == "killed before change 0"]
        monkeypatch.chdir(case.run.parent)

        def evaluate() -> None:
            trainer = improving_trainer()
            trainer.add_callback(Die())
            trainer.train(resume_from_checkpoint=True)

        assert attempt(evaluate).signal == signal.SIGKILL
        assert snapshot(case.run) == saves.first
    else:
        cases = [case for case in saves.cases if case.fault.startswith(kind)]
        case = cases[len(cases) // 2]
        monkeypatch.chdir(case.run.parent)
    trainer = improving_trainer()
    trainer.train(resume_from_checkpoint=True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, saves.weights[name]), name


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def any_trainer(tmp_path_factory: pytest.TempPathFactory) -> RfDetrTrainer:
    return build_trainer(tmp_path_factory.mktemp("trainer"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: truncate(folder / "model.safetensors"), r"model.safetensors has \d+ of \d+ bytes"),
        (
            lambda folder: truncate(folder / "rf_detr_training_weights.safetensors"),
            r"training_weights.safetensors has \d+ of \d+ bytes",
        ),
        (lambda folder: truncate(folder / "optimizer.pt"), r"optimizer.pt has \d+ of \d+ bytes"),
        (lambda folder: truncate(folder / "trainer_state.json"), "a file is missing or cannot be read: Expecting"),
        (lambda folder: truncate(folder / "rf_detr_state.json"), "a file is missing or cannot be read: "),
        (lambda folder: (folder / "rf_detr_files.json").unlink(), "No such file.*rf_detr_files.json"),
        (lambda folder: truncate(folder / "rf_detr_files.json"), "a file is missing or cannot be read: Expecting"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "No such file.*model.safetensors"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "No such file.*optimizer.pt"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "No such file.*rng_state.pth"),
        (shutil.rmtree, "it is not a folder"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(damage, reason, saves, any_trainer, tmp_path):
    """As after an interrupted copy, or a deletion."""
    complete = saves.cases[0].run / "checkpoint-8"
    for name in ("checkpoint-8", "checkpoint-10"):
        shutil.copytree(complete, tmp_path / name)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    damage(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint.*checkpoint-10: .*{reason}"):
        any_trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


def test_a_checkpoint_of_another_run_is_incomplete_while_it_is_overwritten(saves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saves.cases[0].run / "checkpoint-8", "run/checkpoint-8")
    trainer = improving_trainer()
    trainer.state.global_step = 8
    trainer.create_optimizer_and_scheduler(10)
    save = functools.partial(trainer._save_checkpoint, trainer.model, None)
    assert attempt(save, longest=100_000).signal == signal.SIGXFSZ
    with pytest.raises(ValueError, match=r"run has no complete checkpoint"):
        newest_checkpoint("run")


def test_a_run_in_the_folder_of_another_run_warns_and_replaces_its_checkpoints_completely(saves, tmp_path, hf_log):
    for name in ("checkpoint-1", "checkpoint-8"):
        shutil.copytree(saves.cases[0].run / "checkpoint-8", tmp_path / name)
    settings = PLAIN | {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "save_only_model": True}
    build_trainer(tmp_path, **settings).train()
    assert "checkpoint-8 is from an earlier run" in hf_log.text
    assert find_checkpoint_problem(tmp_path / "checkpoint-1") is None
    assert not set(tree(tmp_path / "checkpoint-1")) & {
        "rf_detr_training_weights.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "rf_detr_files.json",
    }


# -- killed processes -------------------------------------------------------------------------------------------------


class DeadlyImages:
    """Images of which one kills the worker that reads it, once, as the system does if memory runs out."""

    def __init__(self, images: Any, index: int, flag: Path) -> None:
        self.images, self.index, self.flag = images, index, flag

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if index == self.index and multiprocessing.parent_process() is not None and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index]


@pytest.mark.parametrize("use", ["train", "evaluate"])
def test_a_killed_worker_is_reported_and_the_run_resumes(use, tmp_path):
    def build() -> RfDetrTrainer:
        coco = drawn(10).coco()
        images, _ = draw_dataset(10, (96, 96), classes=["building"])
        data = InstanceDataset(coco, DeadlyImages(images, 7, tmp_path / "flag"))
        datasets = {f"{use.removesuffix('uate')}_dataset": data}
        settings = PLAIN | {"dataloader_num_workers": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
        return build_trainer(tmp_path / "run", datasets, **settings)

    with pytest.raises(ChildProcessError, match=r"data loader worker.*dataloader_num_workers"):
        getattr(build(), use)()
    if use == "train":
        trainer, checkpoint = build(), None
        with suppress(ValueError):  # the worker may die before the first checkpoint is complete
            checkpoint = newest_checkpoint(tmp_path / "run")
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 3
    else:
        assert math.isfinite(build().evaluate()["eval_loss"])


@pytest.mark.parametrize("lost", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_a_worker_that_dies_while_its_tensor_is_fetched_is_reported(lost, tmp_path):
    def rebuild_storage_fd():  # of torch.multiprocessing.reductions, where the socket of the worker is read
        raise lost("the socket was closed")

    def other():
        raise lost("of another server")

    with pytest.raises(ChildProcessError, match="the socket was closed"):
        translate_worker_errors(rebuild_storage_fd, 1, tmp_path)
    with pytest.raises(lost, match="of another server"):
        translate_worker_errors(other, 1, tmp_path)


def test_the_signal_of_a_dead_worker_may_arrive_while_its_closed_socket_is_reported(tmp_path, monkeypatch):
    def rebuild_storage_fd():
        raise ConnectionResetError("the socket was closed")

    def sleep(_seconds):  # what torch's handler of SIGCHLD raises in whatever code runs
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("transformers_rfdetr.training.faults.sleep", sleep)
    with pytest.raises(ChildProcessError, match=r"pid 7\) is killed by signal"):
        translate_worker_errors(rebuild_storage_fd, 1, tmp_path)


def test_the_error_of_a_worker_has_no_traceback_in_its_message(tmp_path):
    images, coco = draw_dataset(2, (96, 96), classes=["building"])
    paths = []
    for image, entry in zip(images, coco["images"], strict=True):
        paths.append(tmp_path / entry["file_name"])
        image.save(paths[-1])
    trainer = build_trainer(
        tmp_path / "run", {"train_dataset": InstanceDataset(coco, paths)}, **PLAIN, dataloader_num_workers=1
    )
    paths[1].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^image 1 \('000001.png', 1\): ") as raised:
        trainer.train()
    assert "Traceback" not in str(raised.value)


def test_an_unwritable_path_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for path in (tmp_path / "a.json", tmp_path / "new" / "folder" / "a.json"):
        with pytest.raises(PermissionError, match=f"^{path} cannot be written: no write permission for {tmp_path}"):
            check_writable(path)
    with (
        pytest.raises(PermissionError, match=f"^{tmp_path / 'a.json'} cannot be written"),
        atomic_file(tmp_path / "a.json"),
    ):
        pass
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"because .*file is a file"):
        check_writable(tmp_path / "file" / "new" / "a.json")
    with pytest.raises(FileExistsError, match=f"^{tmp_path / 'file'} must be a folder"):
        make_directory(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_temporary_folder_with_a_long_path_is_refused(tmp_path, monkeypatch):
    (deep := tmp_path / ("d" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", tempfile.gettempdir)  # which is created once per process
    trainer = build_trainer(tmp_path, **PLAIN, dataloader_num_workers=1)
    with pytest.raises(OSError, match=r"d{100}: AF_UNIX path too long\. Set TMPDIR"):
        trainer.train()


def die_on_the_second(folder: str, report: Any) -> None:
    """Kill rank 1 after the second optimizer step; rank 0 reports its error."""
    trainer = build_trainer(folder, **(PLAIN | {"save_strategy": "steps", "save_steps": 1}))
    if trainer.args.process_index == 1:
        trainer.add_callback(training_run.Die(2))
    try:
        trainer.train()
    except Exception as error:
        report.put(f"{type(error).__name__}: {error}")


def test_if_one_of_two_processes_dies_the_other_stops_with_a_message(tmp_path):
    forks = multiprocessing.get_context("fork")
    report = forks.Queue()
    training_run.note_free_port(tmp_path)
    job = functools.partial(die_on_the_second, report=report)
    ranks = [forks.Process(target=training_run.run_rank, args=(rank, str(tmp_path), job)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    ranks[1].join(120)
    assert ranks[1].exitcode == -signal.SIGKILL
    said = report.get(timeout=60)  # "within a minute"
    ranks[0].join(60)
    assert said.startswith("ConnectionAbortedError: ")
    assert f"resumes from {tmp_path / 'checkpoint-1'}" in said or f"resumes from {tmp_path / 'checkpoint-2'}" in said
    resumed = build_trainer(tmp_path, **PLAIN)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


# -- other files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(draw_dataset(3, (64, 64), classes=["building"])[0]):
        image.save(folder / f"{number}.png")
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(small_config(num_labels=1)).eval()
    processor = RfDetrImageProcessor.from_config(model.config)
    paths = list_images([str(folder)])
    options = FolderOptions(threshold=0.02, batch_size=1, crops=True)
    return lambda output: predict_to_folder(model, processor, paths, output, options, progress=False)


@pytest.fixture(scope="module")
def repairing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    folder = tmp_path_factory.mktemp("data")
    images, coco = draw_dataset(3, (64, 64), classes=["building"])
    for image, entry in zip(images, coco["images"], strict=True):
        image.save(folder / entry["file_name"])
    coco["annotations"][0]["bbox"][2] = -5
    (folder / "train.json").write_text(json.dumps(coco))
    return lambda output: check_dataset(folder / "train.json", fix=output, workers=1)


@pytest.mark.parametrize("step", every_change)
@pytest.mark.parametrize("name", ["predicting", "repairing"])
def test_after_any_fault_files_are_complete_or_absent_and_the_next_run_finishes(name, step, request, tmp_path):
    job = request.getfixturevalue(name)
    clean = attempt(functools.partial(job, tmp_path / "clean"))
    assert (clean.signal, clean.error) == (0, None)
    expected = tree(tmp_path / "clean")
    for number, (fault, settings) in enumerate(faults_of(clean, step, [0, 1, 300, 2000], num_parts=5).items()):
        output = tmp_path / str(number)
        ended = attempt(functools.partial(job, output), **settings)
        assert ended.signal or isinstance(ended.error, OSError) or fault.startswith("killed in a file"), fault
        if ended.error is not None:
            assert "cannot be written: No space left on device" in str(ended.error), fault
            assert str(tmp_path) in str(ended.error)
        # This file grows line by line; its last line may be incomplete.
        found = {path: content for path, content in tree(output).items() if path != LINES}
        assert found.items() <= expected.items(), fault
        if name == "repairing":
            assert found in ({}, expected), fault
        if found != expected or name == "predicting":
            job(output)
        assert tree(output) == expected, fault


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    target = tmp_path / "numbers.json"
    target.write_text("before")
    job = functools.partial(write_text, target, "x" * 1000)
    for settings in ({"longest": 10}, {"longest": 10, "dies_of_length": False}, {"room": 10}, {"dies_at": 1}):
        attempt(job, **settings)
        assert target.read_text() == "before"
    target.chmod(0o600)
    assert attempt(job).num_changes >= 2  # opened, renamed
    assert target.read_text() == "x" * 1000
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) != [target]  # partial files of the killed processes


def test_links_and_pipes_are_written_through(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"
    write_text("/dev/null", "gone")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)


@pytest.mark.parametrize(
    ("error", "is_disk_error"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: I/O error: No such file or directory (os error 2)"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), True),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_only_errors_of_the_disk_are_translated(error, is_disk_error, tmp_path):
    with (
        pytest.raises(type(error) if not is_disk_error else DiskError) as raised,
        translate_disk_errors(tmp_path / "file"),
    ):
        raise error
    assert ("file cannot be written: " in str(raised.value)) == is_disk_error


@pytest.mark.parametrize(
    ("text", "num_processes", "is_translated"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2", 2, True),
        ("NCCL error: remote process exited or there was a network error", 2, True),
        ("NCCL error: Duplicate GPU detected", 2, False),
        ("Connection closed by peer", 1, False),
        ("cannot read data/igloos/1.png", 2, False),
    ],
)
def test_only_errors_of_a_lost_process_are_translated(text, num_processes, is_translated):
    def lose_connection():
        raise RuntimeError(text)

    with pytest.raises(ConnectionAbortedError if is_translated else RuntimeError, match=re.escape(text)):
        translate_worker_errors(lose_connection, num_processes)


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with atomic_directory(tmp_path / name) as folder:
            (folder / "file").write_text("it")
            assert tree(tmp_path) == {}
        assert tree(tmp_path) == {f"{name}/file": b"it"}
        shutil.rmtree(tmp_path / name)


MOUNTED = """
import sys
import tempfile
from test_faults import improving_trainer
trainer = improving_trainer()
trainer.train(resume_from_checkpoint=sys.argv[1] == "again")
"""


@pytest.mark.long
def test_a_full_file_system_ends_the_run_and_a_larger_one_resumes_it(saves, tmp_path):
    """A tmpfs of a few megabytes, in a mount namespace of its own."""

    def as_root(commands: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
        script = f"mount -t tmpfs -o size={3 * size // 2} none {tmp_path} && cd {tmp_path} || exit 77; {commands}"
        command = ["unshare", "-rm", "env", f"PYTHONPATH={path}", "sh", "-c", script]
        return subprocess.run(command, capture_output=True, text=True)

    size = sum(len(content) for files in saves.first.values() for content in files.values())
    if as_root("exit 0").returncode:
        pytest.skip("mounting is not allowed here")
    train, saved = f"{sys.executable} -c '{MOUNTED}'", tmp_path.with_name("saved")
    done = as_root(
        f"{train} new && exit 78; mount -o remount,size={8 * size} {tmp_path} && {train} again"
        f" && cp -r run/best_total {saved}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"checkpoint-\d+ cannot be written: |best_\w+ cannot be written: ", done.stderr)
    weights = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, saves.weights[name]) for name, tensor in weights.items())
