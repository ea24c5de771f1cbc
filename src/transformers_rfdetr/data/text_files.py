"""Read text and YAML files of users, with errors that name the file."""

from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A text file; ValueError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")  # of Windows' programs, some of which put a mark before the text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; give an existing text file") from error


def read_yaml(text: str, loader: Any, where: str) -> Any:
    """YAML without aliases, a few lines of which can stand for more than the memory holds."""
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, loader)):
            raise ValueError(f"{where} holds an alias (*name), which may stand for any amount of text; write it out")
        return yaml.load(text, loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}; correct it") from error
