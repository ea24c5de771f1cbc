"""What several commands read from their arguments."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def read_dtype(name: str) -> "torch.dtype":
    """ "float32", "float16" or "bfloat16".

    Raises:
        ValueError: it is none of them.
    """
    import torch

    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is none of {', '.join(DTYPES)}")
    return getattr(torch, name)


def read_size(option: str, text: str) -> int | tuple[int, int]:
    """ "432" -> 432; "432x576" -> (432, 576), height and width.

    Raises:
        ValueError: it is neither.
    """
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise ValueError(f"{option} {text} is no number of pixels; give a side such as 432, or HxW such as 432x576")
    height, _, width = text.partition("x")
    return (int(height), int(width)) if width else int(height)


def absolute(name: str) -> str:
    """The same from every working directory, where it is a path that is there; otherwise the name as it is."""
    return str(Path(name).expanduser().absolute()) if os.path.exists(os.path.expanduser(name)) else name


def read_names(option: str, given: str) -> list[str]:
    """Names as "cat,dog" or in a text file with one a line -> the names.

    Raises:
        ValueError: there is no such file, it is no text, or a name is empty.
    """
    path = Path(given)
    if path.is_file():
        try:
            names = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{option} {path} is no text in UTF-8: {error}") from error
    elif path.suffix == ".txt" or path.name != given:
        raise ValueError(f"{option} {given} is no file; give one with a name a line, or 'cat,dog,...'")
    else:
        names = given.split(",")
    if "" in (stripped := [name.strip() for name in names]) or not stripped:
        raise ValueError(f"{option} {given} has a name that is empty, at label {[*stripped, ''].index('')}")
    return stripped
