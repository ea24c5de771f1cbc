"""Processes that die, and disks that fill up, at a place of our choice in something that writes files.

A fault happens in a fork of this process, so that what was prepared once serves for every place. Places are the
changes of the disk that Python makes (a file opened for writing, renamed, removed, a folder made), which the
interpreter reports to its audit hooks, and lengths of files, which the system watches also where compiled code writes.
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
    """How a fork ended: by a signal, an error, or well; and the changes of the disk that it had made."""

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
        job: What writes.
        dies_at: Number of the change of the disk before which the fork gets SIGKILL.
        room: Bytes after which every write raises ENOSPC.
        longest: Bytes that a file may have. The write of more kills the process or, without `dies_of_length`, fails.
    """
    receiver, sender = os.pipe()
    drawn = random.getstate()
    fork = os.fork()
    if fork == 0:
        try:
            random.setstate(drawn)  # which Python draws anew in a fork
            torch.set_num_threads(1)  # the threads of OpenMP are not forked
            tqdm.auto.tqdm.set_lock(threading.RLock())  # its own is shared with forks, and kept by one that dies
            os.close(receiver)
            ended = _run(job, dies_at, room, longest, dies_of_length)
            with open(sender, "wb", closefd=False) as report:
                report.write(pickle.dumps(ended))
        finally:
            os._exit(0)  # and never goes on as this process
    os.close(sender)
    with open(receiver, "rb") as report:
        told = report.read()
    _, status = os.waitpid(fork, 0)
    assert told or os.WIFSIGNALED(status), "the fork ended without a word"
    return pickle.loads(told) if told else Ended(os.WTERMSIG(status), None, -1, -1)


def _run(
    job: Callable[[], Any], dies_at: int | None, room: int | None, longest: int | None, dies_of_length: bool
) -> Ended:
    import resource  # of POSIX only, as forks are

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
        """How many of these bytes there is room for."""
        taken = min(length, self.room - self.written)
        self.written += taken
        return taken


@contextmanager
def _nothing() -> Iterator[_Disk]:
    yield _Disk(0)


@contextmanager
def full_disk(room: int) -> Iterator[_Disk]:
    """Let writes of Python raise ENOSPC after `room` bytes; what safetensors and torch write is written by Python."""
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
        (shutil, "_USE_CP_SENDFILE", False),  # the kernel's own copy
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
    """The files under a folder, but for what a killed process has begun."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if not any(is_partial(part) for part in (path, *path.relative_to(folder).parents))
    }
