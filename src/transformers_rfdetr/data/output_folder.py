"""Check the folder that a copy of a dataset is written to."""

from collections.abc import Iterable
from pathlib import Path

from ..atomic_files import is_partial


def check_output_folder(name: str, folder: Path, sources: Iterable[Path] = (), *, must_be_empty: bool) -> None:
    """Raise ValueError if a folder, which errors call `name`, lies in one of the sources, is a file, or has files."""
    path = folder.expanduser().resolve()
    for source in sources:
        if path == source or source in path.parents:
            raise ValueError(f"`{name}` must lie outside of the source {source}, got {folder}. Give another folder.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"`{name}` must be a folder, got the file {folder}. Give a new folder.")
    if must_be_empty and path.exists() and any(not is_partial(inside) for inside in path.iterdir()):
        raise ValueError(f"`{name}` must be new or empty, got the folder {folder} with files in it. Give a new folder.")
