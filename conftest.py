"""Run the Python blocks of README.md and docs/, offline: local folders stand in for the Hub, small data for long runs.

Each page has a namespace and a folder of its own. `<!--- skip: next "reason" -->` before a block skips it.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def shorten(arguments: Any) -> None:
    """Let a run of a block take two optimizer steps of two images, with an evaluation after each."""
    from training_run import QUICK

    for name, value in QUICK.items():
        setattr(arguments, name, value)
    if arguments.max_steps > 0:
        arguments.max_steps, arguments.save_steps, arguments.eval_steps = 2, 1, 1
    else:
        arguments.num_train_epochs = 1


def prepare(namespace: dict[str, Any]) -> None:
    """Enter a folder with everything that the blocks name, and cut long runs short."""
    from transformers_rfdetr import RfDetrTrainingArguments
    from transformers_rfdetr.hub import load

    from page_sandbox import MODELS, sandbox

    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_before"] = os.getcwd()
    shutil.copytree(sandbox().name, namespace["_folder"].name, dirs_exist_ok=True)
    os.chdir(namespace["_folder"].name)
    finish, resolve = RfDetrTrainingArguments.__post_init__, load.resolve_name

    def post_init(arguments: Any) -> None:
        shorten(arguments)
        finish(arguments)

    namespace["_uploads"] = []
    module = "transformers_rfdetr.training.run_upload"
    namespace["_patches"] = [
        mock.patch.object(RfDetrTrainingArguments, "__post_init__", post_init),
        # A published name is the folder of this name.
        mock.patch.object(load, "resolve_name", lambda name: name if name in MODELS else resolve(name)),
        # Stand-ins for the Hub: tests/hub pushes to a server.
        mock.patch(f"{module}.create_repository", lambda name, **_: name),
        mock.patch(f"{module}.upload", lambda _, files, *__, **___: namespace["_uploads"].extend(files)),
    ]
    for patch in namespace["_patches"]:
        patch.start()


def check(namespace: dict[str, Any]) -> None:
    """Leave the folder, and check what the blocks computed."""
    for patch in namespace["_patches"]:
        patch.stop()
    os.chdir(namespace["_before"])
    folder = Path(namespace["_folder"].name)
    if "result" in namespace:
        assert namespace["result"]["segmentation"].ndim == 2
        assert (folder / "found.png").is_file()
    if "numbers" in namespace:
        assert namespace["numbers"]["segm_AP"] >= 0
    if (folder / "buildings").is_dir():
        from transformers import AutoModelForInstanceSegmentation

        saved = AutoModelForInstanceSegmentation.from_pretrained(folder / "buildings")
        assert saved.config.id2label == {0: "building"}
    if "trainer" in namespace:
        state = namespace["trainer"].state
        assert state.global_step == 2
        evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
        assert evaluated == ({1, 2} if "stream" in namespace else {2})
    if namespace["_uploads"]:
        names = {file.name for file in namespace["_uploads"]}
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= names
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/**/*.md"],
    excludes=["assets/*/README.md"],
    setup=prepare,
    teardown=check,
).pytest()

collect_ignore_glob = ["docs/*.py"]  # plugins of mkdocs, which `make docs` installs

LONG = {"export", "multi-gpu"}  # pages whose blocks take more than 5 seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the blocks of pages that take long, and allow what peft calls."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(
                pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
            )
            if item.path.stem in LONG:
                item.add_marker(pytest.mark.long)
