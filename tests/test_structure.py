"""Imports point one way between the groups, without circles, and a model can be pushed with its code."""

import ast
import functools
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import transformers_rfdetr

PACKAGE = Path(transformers_rfdetr.__file__).parent
# A group may import from itself and from the groups before it. A name without a folder is a file.
ORDER = [
    "assets",
    "model",
    "atomic_files",
    "text_table",
    "data",
    "inference",
    "evaluation",
    "hub",
    "training",
    "export",
    "conversion",
    "registration",
    "__init__",
    "cli",
]
# The handler is copied into repositories, where it imports the package as any program does.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "handler.py")
MODULES = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in FILES}


def name_of(path: Path) -> str:
    return ".".join(part for part in MODULES[path] if part != "__init__") or "__init__"


KNOWN = {name_of(path) for path in FILES}


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Names of the modules of this package that a file imports anywhere, functions included."""
    package = MODULES[path][:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            found |= {
                name.partition(".")[2] or "__init__" for name in modules if name.startswith("transformers_rfdetr")
            }
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
        elif (node.module or "").partition(".")[0] == "transformers_rfdetr":
            base = node.module.split(".")[1:]
        else:
            continue
        module = ".".join(base)
        members = {".".join([*base, alias.name]) for alias in node.names} & KNOWN
        found |= members or {module or "__init__"}
        found |= {module} if module and len(members) < len(node.names) else set()
    return found


def group_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_from_its_group_and_earlier_ones_only(path):
    group = group_of(name_of(path))
    allowed = ORDER[: ORDER.index(group) + 1]
    assert {module for module in imported_modules(path) if group_of(module) not in allowed} == set()


def test_there_is_no_circle_of_imports():
    edges = {name_of(path): imported_modules(path) - {name_of(path)} for path in FILES}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert edges == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_of_the_package_is_imported_by_a_string(path):
    """The public names of `__init__` are loaded when they are used; everything else is imported by a statement."""
    if name_of(path) == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: the name must be a literal"
            assert not node.args[0].value.startswith((".", "transformers_rfdetr")), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=name_of)
def test_a_file_of_the_model_imports_its_neighbours_as_from_dot_name(path):
    """Only `from .name import x` is followed when a model is pushed with its code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module
            assert "." not in node.module


@pytest.mark.parametrize("name", ["configuration_rf_detr", "image_processing_rf_detr", "modeling_rf_detr"])
def test_a_file_that_a_checkpoint_names_imports_all_that_it_needs_itself(name):
    """From a local folder, transformers < 5.8 copies this file and its direct imports, not the imports of those."""
    path = PACKAGE / "model" / f"{name}.py"
    assert set(get_relative_imports(path)) == {Path(file).stem for file in get_relative_import_files(path)}


def test_every_public_name_is_there():
    for name in transformers_rfdetr.__all__:
        assert getattr(transformers_rfdetr, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = transformers_rfdetr.nonsense
