"""Private names of transformers' Trainer are used in one module only."""

import ast
import functools
import inspect
from pathlib import Path

import pytest
from transformers import Trainer

import transformers_rfdetr.training
from transformers_rfdetr.training.private_trainer_api import PrivateTrainerApi

FILES = sorted(Path(transformers_rfdetr.training.__file__).parent.glob("*.py"))
ALLOWED = Path(inspect.getsourcefile(PrivateTrainerApi))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@functools.cache
def private_names_of_trainer() -> set[str]:
    """Methods, attributes of `self`, and parameters, as the source of Trainer has them."""
    names = {name for name in dir(Trainer) if is_private(name)}
    for node in ast.walk(ast.parse(inspect.getsource(Trainer))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if is_private(name)}


def used_names(path: Path) -> set[str]:
    """Names that a file defines in classes, reads or sets as attributes, or passes as arguments."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.ClassDef):
            names |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("path", [path for path in FILES if path != ALLOWED], ids=lambda path: path.stem)
def test_a_file_uses_no_private_name_of_trainer(path):
    assert used_names(path) & private_names_of_trainer() == set()


def test_the_private_names_are_those_that_the_module_explains():
    assert used_names(ALLOWED) & private_names_of_trainer() == {
        "_save_checkpoint",
        "_save_rng_state",
        "_push_from_checkpoint",
        "_internal_call",
        "_get_output_dir",
        "_train_batch_size",
    }


def test_the_walk_finds_private_names():
    names = private_names_of_trainer()
    assert {"_save_checkpoint", "_inner_training_loop", "_train_batch_size", "_internal_call"} <= names
    assert {"_save_checkpoint", "_get_output_dir", "_internal_call"} <= used_names(ALLOWED)
