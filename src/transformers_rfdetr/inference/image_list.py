"""Which images are predicted, and what each is called in the results."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class InputImage(NamedTuple):
    """An image to predict.

    Attributes:
        name: Name in the results, and relative path of the files that are written for it: unique, and the same in
            every run.
        source: What `read_rgb` takes, or a row number of a dataset.
        id: Image id in a dataset that has one.
    """

    name: str
    source: Any
    id: int | None = None


VIDEO_FILE_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ogv", ".mpg", ".mpeg", ".m2v", ".vob"),
    *(".wmv", ".asf", ".3gp", ".3g2", ".ts", ".mts", ".m2ts", ".mxf"),
}
VIDEO_SUFFIXES = {*VIDEO_FILE_SUFFIXES, ".m3u8"}  # the latter is a stream
# Files that lie beside the images of a dataset.
_ANNOTATION_SUFFIXES = {".json", ".jsonl", ".txt", ".xml", ".yaml", ".yml", ".csv", ".md", ".cache", ".names"}


def list_images(sources: Sequence[str], exclude: str | os.PathLike[str] | None = None) -> list[InputImage]:
    """Return the images of files, folders, patterns and URLs in a fixed order.

    Folders are searched recursively. In folders and matches of patterns, hidden files and annotation files are skipped.

    Args:
        sources: Names are relative to a folder. With several folders they begin with the folder's own name.
        exclude: A folder below these whose files are not listed.

    Raises:
        ValueError: a source does not exist or cannot be read, or a folder or pattern has no images.
    """
    excluded = None if exclude is None else Path(exclude).expanduser().resolve()
    num_folders = sum(bool(source) and Path(source).expanduser().is_dir() for source in sources)
    found: dict[str, str] = {}
    for source in sources:
        path = Path(source).expanduser()
        if source.startswith(("http://", "https://")):
            found[source] = Path(urlsplit(source).path).name or "image"
        elif source and path.is_dir():
            names = _files_in(path, excluded)
            if not names:
                raise ValueError(f"`sources` must contain images, got the folder {source} without images")
            prefix = Path(path.resolve().name) if num_folders > 1 else Path()
            found |= {str(path / name): str(prefix / name) for name in names}
        elif source and path.is_file():
            found.setdefault(str(path), path.name)
        elif source and (matches := sorted(glob.glob(str(path), recursive=True))):
            files = [match for match in matches if os.path.isfile(match) and not is_skipped(match)]
            found = {file: Path(file).name for file in files} | found
        else:
            rule = "files, folders, patterns with matches or http(s) URLs"
            raise ValueError(f"`sources` must be {rule}, got {source!r}. Check the spelling.")
    return [InputImage(name, source) for name, source in zip(unique_names(found.values()), found, strict=True)]


def unique_names(names: Iterable[str]) -> list[str]:
    """Return file names in which repeated ones are numbered: a.jpg, a-2.jpg."""
    taken: dict[str, None] = {}
    for wanted in names:
        name, count = wanted, 1
        while name in taken:
            count += 1
            name = str(Path(wanted).with_stem(f"{Path(wanted).stem}-{count}"))
        taken[name] = None
    return list(taken)


def _files_in(folder: Path, excluded: Path | None) -> list[Path]:
    """Return the relative paths of the files below a folder that may be images; links to folders are followed."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"the folder {error.filename} must be readable: {error.strerror}. Change its permissions.")

    names, visited = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        resolved = Path(root).resolve()
        if resolved in visited or resolved == excluded:
            folders.clear()
            continue
        visited.add(resolved)
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(root, name).relative_to(folder) for name in files if not is_skipped(name)]
    return sorted(names)


def is_skipped(name: str) -> bool:
    """Return whether a file of a folder is hidden or has annotations."""
    path = Path(name)
    return path.name.startswith(".") or path.suffix.lower() in _ANNOTATION_SUFFIXES
