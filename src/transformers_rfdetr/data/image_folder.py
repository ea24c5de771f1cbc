"""Find the image that an annotation file names, also if the name was written on another computer."""

import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

from .image_files import is_outside


class ImageFolder:
    """The image files of a folder and its sub-folders, by the names that annotation files give them.

    Args:
        folder: The folder. It need not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._name_of_found: dict[str, str] = {}

    def contains(self, name: Any) -> bool:
        """Return whether there is a file of exactly this name."""
        return isinstance(name, str) and not is_outside(self.folder, name) and os.path.isfile(self.folder / name)

    def find(self, name: Any) -> str | None:
        """Return the path of an image relative to the folder; None if no file, or more than one, can be meant.

        A file of another name is found if its path differs only in backslashes, Unicode form or case, or else if it is
        the only file in the folder and its sub-folders with the last part of the name. It is found for one name only.
        """
        if not isinstance(name, str) or self.contains(name):
            return name if isinstance(name, str) else None
        comparable = _comparable(name)
        if comparable.startswith("../"):
            return None
        candidates = self._files.get(comparable) or self._files.get(f"*/{posixpath.basename(comparable)}", [])
        if len(candidates) != 1 or self._name_of_found.setdefault(candidates[0], name) != name:
            return None
        return candidates[0]

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """Paths relative to the folder, by comparable path and by `*/` and the comparable last part of it."""
        files: dict[str, list[str]] = defaultdict(list)
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            for name in names:
                path = os.path.relpath(os.path.join(parent, name), self.folder)
                files[_comparable(path)].append(path)
                files[f"*/{_comparable(name)}"].append(path)
        return files


def describe_renaming(found: str, name: str) -> str:
    """Return "'found' for 'name'", with escaped letters if the names look the same."""
    is_visible = unicodedata.normalize("NFC", found) != unicodedata.normalize("NFC", name)
    return f"{found!r:.200} for {name!r:.200}" if is_visible else f"{found!a:.200} for {name!a:.200}"


def _comparable(name: str) -> str:
    """Return what is equal for names that only operating systems distinguish."""
    name = posixpath.normpath(re.sub(r"\\+", "/", name))
    return unicodedata.normalize("NFC", name).casefold()
