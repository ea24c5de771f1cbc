"""Kill a process, or fill its disk, at a chosen point of a job that writes files.

The job runs in a fork, so that one preparation serves for all points. A point is a change of the disk by Python (a
file opened for writing, renamed or removed, a folder created), which the interpreter reports to audit hooks; or a
length of a file, which the kernel also enforces for compiled code.
"""

import builtins
import errno
import io
import os
import pickle
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import tqdm.auto

from transformers_rfdetr.atomic_files import is_partial

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


class Ended(NamedTuple):
    """How a fork ended (by a signal, with an error, or normally), and how much it changed the disk."""

    signal: int
    error: Exception | None
    num_changes: int
    num_bytes: int


def attempt(
    job: Callable[[], Any],
    *,
    dies_at: int | None = None,
    room: int | None = None,
    longest: int | None = None,
    dies_of_length: bool = True,
) -> Ended:
    """Run a job in a fork.

    Args:
        job: The job that writes.
        dies_at: Index of the change of the disk before which the fork is killed.
        room: Bytes after which every write raises ENOSPC.
        longest: Maximum bytes of a file. Writing more kills the process or, without `dies_of_length`, raises.
    """
    receiver, sender = os.pipe()
    state = random.getstate()
    fork = os.fork()
    if fork == 0:
        try:
            random.setstate(state)  # Python seeds it again in a fork
            torch.set_num_threads(1)  # a fork has no threads of OpenMP
            tqdm.auto.tqdm.set_lock(threading.RLock())  # a killed fork would keep the shared lock
            os.close(receiver)
            ended = _run(job, dies_at, room, longest, dies_of_length)
            with open(sender, "wb", closefd=False) as report:
                report.write(pickle.dumps(ended))
        finally:
            os._exit(0)  # and never continue with the tests
    os.close(sender)
    with open(receiver, "rb") as report:
        content = report.read()
    _, status = os.waitpid(fork, 0)
    assert content or os.WIFSIGNALED(status), "the fork ended without a report"
    return pickle.loads(content) if content else Ended(os.WTERMSIG(status), None, -1, -1)


def _run(
    job: Callable[[], Any], dies_at: int | None, room: int | None, longest: int | None, dies_of_length: bool
) -> Ended:
    import resource  # POSIX only, like forks

    sys.dont_write_bytecode = True
    is_watching, num_changes = True, 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal num_changes
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and not str(args[0]).startswith("/dev/")
        if is_watching and (writes or event in _CHANGES):
            if num_changes == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            num_changes += 1

    sys.addaudithook(watch)
    if longest is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies_of_length else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, resource.RLIM_INFINITY))
    error = None
    try:
        with full_disk(sys.maxsize if room is None else room) if longest is None else _nothing() as disk:
            job()
    except Exception as raised:
        error = type(raised)(str(raised))
    is_watching = False
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return Ended(0, error, num_changes, disk.written)


class _Disk:
    def __init__(self, room: int) -> None:
        self.room, self.written = room, 0

    def take(self, length: int) -> int:
        """Return how many of `length` bytes fit."""
        taken = min(length, self.room - self.written)
        self.written += taken
        return taken


@contextmanager
def _nothing() -> Iterator[_Disk]:
    yield _Disk(0)


@contextmanager
def full_disk(room: int) -> Iterator[_Disk]:
    """Let Python raise ENOSPC after writing `room` bytes. safetensors and torch are made to write through Python."""
    disk, real_open = _Disk(room), io.open

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            data = memoryview(data).cast("B")
            taken = disk.take(len(data))
            super().write(data[:taken])
            if taken < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return taken

    def limited_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        is_written = not isinstance(file, int) and set(mode) & set("wax+") and not str(file).startswith("/dev/")
        if not is_written:
            return real_open(file, mode, buffering, *args, **kwargs)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *args, **kwargs)

    def serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        with limited_open(filename, "wb") as file:
            file.write(safetensors.torch.serialize(tensors, metadata))

    real_save = torch.save

    def save(value: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        stream = io.BytesIO()
        real_save(value, stream, *args, **kwargs)
        with limited_open(f, "wb") as file:
            file.write(stream.getvalue())

    replaced = [
        (builtins, "open", limited_open),
        (io, "open", limited_open),
        (safetensors.torch, "serialize_file", serialize_file),
        (torch, "save", save),
        (shutil, "_USE_CP_SENDFILE", False),  # which copies in the kernel
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    for place, name, value in replaced:
        setattr(place, name, value)
    try:
        yield disk
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of the files in a folder, except partial files of killed processes."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if not any(is_partial(part) for part in (path, *path.relative_to(folder).parents))
    }
