"""Make a Space of the Hub from a model: the page of `inference/web_page.py` in a repository with its requirements."""

import json
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData, constants

from ..assets import TINY_NAME
from ..atomic_files import write_text
from ..inference.runners import RUNTIMES
from .load import resolve_name
from .push import create_repository, upload

_APP = '''"""A page on which the model is tried, made by `transformers-rfdetr app --push-space`."""

from transformers_rfdetr import load
from transformers_rfdetr.inference.web_page import serve

serve(*load({name}, device="auto"), title={title})
'''


def push_space(
    name: str,
    model: Any,
    processor: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a Space with the page of a model in one commit; see [`push_to_hub`].

    A model of the Hub is loaded from there when the Space starts; a private one requires the secret HF_TOKEN in the
    settings of the Space. A local model becomes part of the Space.

    Args:
        name: What [`load`] was called with.
        model: The model that it returned.
        processor: The image processor.
        repo_id: The Space; it is created if it does not exist.
        private: Whether to create a private Space; the owner's default if None.
        token: The one that `hf auth login` stored by default.

    Returns:
        The URL of the Space.

    Raises:
        OSError: Nothing was uploaded; the message has the reason.
        ImportError: Gradio is not installed; the Space gets the same version.
    """
    try:
        gradio_version = version("gradio")
    except PackageNotFoundError as error:
        raise ImportError('A Space requires gradio: pip install "transformers-rfdetr[app]"') from error
    repo_id = create_repository(repo_id, private=private, token=token, repo_type="space")
    title = page_title(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = _add_model(folder, name, model, processor)
        requirements = ["transformers-rfdetr[app]", *([RUNTIMES[Path(name).suffix]] if Path(name).is_file() else [])]
        data = SpaceCardData(
            title=title,
            sdk="gradio",
            sdk_version=gradio_version,
            python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
            app_file="app.py",
            models=None if (folder / "model").exists() or source == TINY_NAME else [source],
        )
        write_text(folder / "README.md", f"---\n{data}\n---\n\nA page on which the model is tried.\n")
        write_text(folder / "app.py", _APP.format(name=json.dumps(source), title=json.dumps(title)))
        write_text(folder / "requirements.txt", "\n".join([*requirements, ""]))
        files = [path for path in folder.rglob("*") if path.is_file()]
        upload(folder, files, repo_id, token=token, repo_type="space", commit_message="Upload the page of the model")
    return f"{constants.ENDPOINT}/spaces/{repo_id}"


def page_title(name: str) -> str:
    """Return the heading of the page of a model: a Hub id or published name, or the name of a folder or file."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _add_model(folder: Path, name: str, model: Any, processor: Any) -> str:
    """Copy a local model to `folder`/model; return what `load` takes where the Space runs."""
    path = Path(name).expanduser()
    if path.is_file():
        (folder / "model").mkdir()
        for file in (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,):
            shutil.copyfile(file, folder / "model" / file.name)
        return f"model/{path.name}"
    if not path.is_dir():
        return TINY_NAME if name == TINY_NAME else resolve_name(name)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return "model"
