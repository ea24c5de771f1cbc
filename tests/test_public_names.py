"""docs/reference/api.md, the package, and what README, docs/, examples and notebooks import agree."""

import ast
import importlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import transformers_rfdetr
from transformers_rfdetr import export

ROOT = Path(__file__).parents[1]
NAME = "transformers_rfdetr"
TEXT = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
PUBLIC, INTERNAL = TEXT.split("## Names of the notebooks and examples")
TOP_LEVEL, MODULES = re.split(r"(?m)^\| module ", PUBLIC)
# What the reference shows -> the options of the entry.
ENTRIES = {
    path: options
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for path, options in re.findall(r"(?m)^::: ([\w.]+)$((?:\n    .*)*)", page.read_text(encoding="utf-8"))
}


def names(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def names_of_modules(text: str) -> dict[str, set[str]]:
    """Module -> names, from the rows of a table."""
    rows = [row.split(" | ") for row in re.findall(r"(?m)^\| (`.*) \|$", text)]
    return {module.strip("`").removeprefix(f"{NAME}."): names(listed) for module, listed, *_ in rows}


def sources() -> Iterator[tuple[str, str]]:
    """Yield the folder and the code of blocks, examples and cells."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            yield "docs", block
    for path in (ROOT / "examples").glob("*.py"):
        yield "examples", path.read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield "notebooks", "".join(cell["source"])


def imported(folders: set[str]) -> dict[str, set[str]]:
    """Module of this package -> names that are imported from it."""
    found: dict[str, set[str]] = {}
    for folder, code in sources():
        for node in ast.walk(ast.parse(code)) if folder in folders else ():
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == NAME:
                module = node.module.removeprefix(NAME).removeprefix(".")
                found.setdefault(module, set()).update(alias.name for alias in node.names)
    return found


STABLE = {"": set(transformers_rfdetr.__all__), **names_of_modules(MODULES)}


def test_the_page_lists_what_the_package_offers():
    listed = set().union(*(names(row) for row in re.findall(r"(?m)^\| (`.*?) \| ", TOP_LEVEL)))
    assert listed == set(transformers_rfdetr.__all__)
    assert STABLE["export"] == set(export.__all__)
    for module, listed in names_of_modules(MODULES + INTERNAL).items():
        assert all(hasattr(importlib.import_module(f"{NAME}.{module}"), name) for name in listed), module


def test_readme_and_docs_import_public_names_only():
    found = imported({"docs"})
    assert len(found[""]) > 15
    assert {module: bad for module, one in found.items() if (bad := one - STABLE.get(module, set()))} == {}


def test_the_internal_names_of_notebooks_and_examples_are_those_of_the_page():
    found = imported({"examples", "notebooks"})
    found = {module: rest for module, one in found.items() if (rest := one - STABLE.get(module, set()))}
    assert found == names_of_modules(INTERNAL)


def test_every_public_name_has_a_reference():
    shown = {path.rpartition(".")[2] for path in ENTRIES}
    wanted = set().union(*(listed for module, listed in STABLE.items() if module != "evaluation.evaluate_modules"))
    assert wanted <= shown


@pytest.mark.parametrize("path", ENTRIES)
def test_the_reference_shows_members_that_are_there(path: str):
    module, _, name = path.rpartition(".")
    shown = getattr(importlib.import_module(module), name)
    members = yaml.safe_load(ENTRIES[path])["options"]["members"] if ENTRIES[path] else []
    assert all(getattr(shown, member).__doc__ for member in members)


def test_the_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    supported = dict(re.findall(r"(?m)^\| (\w+) \| ([\d.]+) and later", TEXT))
    assert supported.keys() == {"Python", "transformers", "PyTorch"}
    assert project["requires-python"] == f">={supported['Python']}"
    assert f"transformers>={supported['transformers']},<6" in project["dependencies"]
    assert f"torch>={supported['PyTorch']}" in project["dependencies"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == transformers_rfdetr.__version__
