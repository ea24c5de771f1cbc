"""Read the text, JSON and YAML files of a user; every error names the file."""

import json
from pathlib import Path
from typing import Any

import yaml

from .other_formats import recognise_json


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 text file, with or without a byte order mark.

    Raises:
        ValueError: the file does not exist, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Give an existing UTF-8 text file.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of COCO annotations.

    Raises:
        ValueError: the file cannot be read, is not JSON, its top level is not an object, or another program wrote it.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}. Export it again.") from error
    if found := recognise_json(content):
        raise ValueError(found.error(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object {{...}}, got {type(content).__name__}. Export it again.")
    return content


def read_yaml(text: str, loader: Any, source: str) -> Any:
    """Parse YAML without aliases: a few lines of nested aliases can expand to more text than fits into memory.

    Args:
        text: The YAML text.
        loader: A loader class of PyYAML.
        source: What errors call the text, such as its file or command line option.

    Raises:
        ValueError: the text is not YAML, or contains an alias.
    """
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, loader)):
            raise ValueError(f"{source} must not contain YAML aliases (*name). Write the value out.")
        return yaml.load(text, loader)
    except (yaml.YAMLError, RecursionError) as error:
        remedy = "Write / instead of \\ in paths" if "escape" in str(error) else "Correct it"
        raise ValueError(f"{source} must be YAML: {' '.join(str(error).split())}. {remedy}.") from error
