"""Files and folders that are there whole or not at all, whatever stops the process that writes them.

What is being written has a hidden name, `.<random>.partial`, beside the one that it takes when all of it is there. A
process that is killed leaves that hidden file; nothing reads it, and it may be deleted.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What the system says where it is the disk that stops a write, and not its caller.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_REMEDY = "free some space, or give another place"


class DiskError(OSError):
    """A file or folder could not be written, because the disk is full or broken."""


@contextmanager
def atomic_file(path: str | os.PathLike[str], remedy: str = _REMEDY) -> Iterator[Path]:
    """A path to write to; the file there takes the place of `path` when the block ends, or goes when it fails.

    Args:
        path: In a folder that exists. Of a link what it points to is replaced. Pipes and devices are written as they
            are, and so is a file in a folder that nothing may be added to.
        remedy: What an error about the disk says at its end.

    Raises:
        DiskError: `path` is what it was.
    """
    path, given = Path(path).resolve(), Path(path).absolute()
    check_writable(path)
    is_special = given.exists() and not given.is_file()
    if is_special or (path.exists() and not os.access(path.parent, os.W_OK)):
        with translate_disk_errors(given, remedy):
            yield given
        return
    partial = _partial(path)
    try:
        with translate_disk_errors(path, remedy):
            yield partial
            if path.exists():
                shutil.copymode(path, partial)
            try:
                os.replace(partial, path)
            except OSError as error:  # a file that is mounted, as into a container
                if error.errno != errno.EBUSY:
                    raise
                shutil.copyfile(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError where [`atomic_file`] could not write: before long work, and with the name that was given."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    above = path if path.exists() else path.absolute().parent
    while not above.exists():  # it will be made
        above = above.parent
    if above != path and not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written, because {above} is a file; give another place")
    if not os.access(above, os.W_OK):
        what = "it" if above == path else above
        raise PermissionError(f"{path} cannot be written, because {what} may not be changed; give another place")


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those above it, unless it is there; raise OSError with the name that was given."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"{path} is a file, or lies in one; give a folder") from error
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be made: {error.strerror}; give another place") from error


def write_text(path: str | os.PathLike[str], text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8, by [`atomic_file`]."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def atomic_directory(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill; it takes the name `folder` when the block ends, or goes when it fails.

    Args:
        folder: One that does not exist, or an empty one. Folders above it are made.

    Raises:
        DiskError: nothing is left.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # What is mounted cannot be renamed over, and a folder may be all that one is allowed to write to.
    is_fixed = folder.exists() and (folder.is_mount() or not os.access(folder.parent, os.W_OK))
    partial = _partial(folder / "inside" if is_fixed else folder)
    try:
        with translate_disk_errors(folder):
            partial.mkdir()
            yield partial
            if is_fixed:
                for path in partial.iterdir():
                    os.replace(path, folder / path.name)
            else:
                if folder.exists():
                    folder.rmdir()
                os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def translate_disk_errors(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Raise a DiskError with file and remedy for what a full or broken disk raises inside, by whatever library."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_error(error)
        if reason is None:
            raise
        told = DiskError(f"{path} cannot be written: {reason}; {remedy}")
        told.errno = _errno(error)
        raise told from error


def disk_error(error: BaseException) -> str | None:
    """What a full or broken disk has to do with an error of a write, or None if it is of another kind, or was told."""
    if isinstance(error, OSError | SafetensorError):
        number = _errno(error)
        return os.strerror(number) if number in _DISK_ERRORS and not isinstance(error, DiskError) else None
    # torch.save has no error of its own, and does not say what the system said.
    is_of_torch = any(words in str(error) for words in ("inline_container", "PytorchStreamWriter", "iostream error"))
    return "the disk took a part only" if is_of_torch else None


def _errno(error: BaseException) -> int | None:
    """The system's number of an error, which safetensors and shutil.copytree have in their texts only."""
    number = getattr(error, "errno", None)
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error)) if number is None else None
    return int(found[1] or found[2]) if found else number


def escape_unprintable(text: str) -> str:
    """Text without what moves the cursor or cannot be written: the name of a file or class may hold anything."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def is_partial(path: Path) -> bool:
    """Whether a file or folder is what a process that was killed had begun."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}.partial")
