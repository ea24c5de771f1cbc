"""Write files and folders atomically: they are complete or do not exist, even if the process is killed.

A file is written as `.<random>.partial` in the same folder, and renamed when it is complete. A killed process leaves
this hidden file, which is never read and may be deleted.
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

# Errors of a full or broken disk, which the caller cannot avoid.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_REMEDY = "Free some space, or pass another path."


class DiskError(OSError):
    """A file or folder could not be written, because the disk is full or broken."""


@contextmanager
def atomic_file(path: str | os.PathLike[str], remedy: str = _REMEDY) -> Iterator[Path]:
    """Yield a path to write to. Its file replaces `path` when the block ends, and is deleted if the block fails.

    Args:
        path: A file in an existing folder. The target of a link is replaced. Pipes, devices and files in folders
            without write permission are written directly.
        remedy: The end of the message of a DiskError.

    Raises:
        DiskError: The disk is full or broken; `path` is unchanged.
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
            except OSError as error:  # a mounted file, as in a container, cannot be replaced
                if error.errno != errno.EBUSY:
                    raise
                shutil.copyfile(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError if [`atomic_file`] could not write, for a check before long work."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Pass the path of a file.")
    above = path if path.exists() else path.absolute().parent
    while not above.exists():  # it will be created
        above = above.parent
    if above != path and not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written, because {above} is a file. Pass another path.")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no write permission for {above}. Pass another path.")


def make_directory(path: str | os.PathLike[str]) -> None:
    """Create a folder and its parents if they do not exist; raise OSError with the path that was given."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FileExistsError(f"{path} must be a folder, but it or one of its parents is a file") from error
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be created: {error.strerror}. Pass another path.") from error


def write_text(path: str | os.PathLike[str], text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8 with [`atomic_file`]."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def atomic_directory(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to fill. It is renamed to `folder` when the block ends, and deleted if the block fails.

    Args:
        folder: A folder that does not exist or is empty. Its parents are created.

    Raises:
        DiskError: The disk is full or broken; no partial folder remains.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A mounted folder cannot be replaced, and its parent may not be writable.
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
    """Convert errors of a full or broken disk, raised by any library, to a DiskError with the path and the remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_error(error)
        if reason is None:
            raise
        disk_failure = DiskError(f"{path} cannot be written: {reason}. {remedy}")
        disk_failure.errno = _errno(error)
        raise disk_failure from error


def disk_error(error: BaseException) -> str | None:
    """Return the OS message if a full or broken disk caused the error, else None; None for a DiskError too."""
    if isinstance(error, OSError | SafetensorError):
        number = _errno(error)
        return os.strerror(number) if number in _DISK_ERRORS and not isinstance(error, DiskError) else None
    # torch.save raises a RuntimeError without the OS message.
    is_from_torch = any(words in str(error) for words in ("inline_container", "PytorchStreamWriter", "iostream error"))
    return "the disk took only a part" if is_from_torch else None


def _errno(error: BaseException) -> int | None:
    """Return the OS error number, which safetensors and shutil.copytree give only in their messages."""
    number = getattr(error, "errno", None)
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error)) if number is None else None
    return int(found[1] or found[2]) if found else number


def escape_unprintable(text: str) -> str:
    """Escape control characters, which names of files and classes from untrusted sources may contain."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def is_partial(path: Path) -> bool:
    """Return whether a path is the partial file or folder of a killed process."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}.partial")
