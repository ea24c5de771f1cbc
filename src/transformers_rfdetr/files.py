"""Files and folders that are there whole or not at all, whatever stops the process that writes them.

What is being written has a hidden name, `.<random>.partial`, beside the one that it takes when all of it is there. A
process that is killed leaves that hidden file; nothing reads it, and it may be deleted.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What the system says where it is the disk that stops a write, and not its caller.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


_REMEDY = "nothing of it is left; free some space, or give another place"


@contextmanager
def whole_file(path: str | os.PathLike[str], remedy: str = _REMEDY) -> Iterator[Path]:
    """A path to write to; the file there takes the place of `path` when the block ends, or goes when it fails.

    Args:
        path: In a folder that exists. A pipe or a device is written as it is; of a link, what it points to.
        remedy: What an error about the disk says at its end.

    Raises:
        OSError: the disk is full or broken; `path` is what it was.
    """
    path = Path(path).resolve()
    is_special = path.exists() and not path.is_file()
    partial = path if is_special else _partial(path)
    try:
        with explained(path, remedy):
            yield partial
            if not is_special:
                os.replace(partial, path)
    finally:
        if not is_special:
            partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8, by [`whole_file`]."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def whole_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill; it takes the name `folder` when the block ends, or goes when it fails.

    Args:
        folder: One that does not exist, or an empty one. Folders above it are made.

    Raises:
        OSError: the disk is full or broken.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_mount = folder.is_mount()  # which cannot be renamed over
    partial = _partial(folder / "inside" if is_mount else folder)
    try:
        with explained(folder):
            partial.mkdir()
            yield partial
            if is_mount:
                for path in partial.iterdir():
                    os.replace(path, folder / path.name)
            else:
                if folder.exists():
                    folder.rmdir()
                os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def explained(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Let what a full or broken disk raises inside, an OSError or a library's own error, name file and remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_error(error)
        if reason is None:
            raise
        told = OSError(f"{path} cannot be written: {reason}; {remedy}")
        told.errno = getattr(error, "errno", None)
        raise told from error


def disk_error(error: BaseException) -> str | None:
    """What a full or broken disk has to do with an error of a write, or None if it is of another kind."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _DISK_ERRORS else None
    text = str(error)
    if isinstance(error, SafetensorError):
        return text if "os error" in text.lower() or "i/o error" in text.lower() else None
    # torch.save has no error of its own, and does not say what the system said.
    is_of_torch = any(words in text for words in ("inline_container", "PytorchStreamWriter", "iostream error"))
    return "the disk took a part only" if is_of_torch else None


def _partial(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}.partial")
