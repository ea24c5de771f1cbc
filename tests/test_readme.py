"""README.md: its tables, commands and images. Its Python blocks run by themselves, see conftest.py."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image

from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import SHARED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows_of_the_argument_table() -> dict[str, tuple[str, str]]:
    """rfdetr's argument -> (what is ours, its default), from the table."""
    [table] = re.findall(r"\| rfdetr's `train\(\)` .*?\n\|[-|]+\n(.*?)\n\n", README, flags=re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {row[0].strip("| `"): (row[1], row[2].strip("| ") if len(row) > 2 else "") for row in rows}


def test_the_table_names_every_argument_of_rfdetrs_guide():
    guide = SHARED.parent / "guides" / "rfdetr_training.md"
    if not guide.is_file():
        pytest.skip(f"needs {guide}, which does not come with the repository")
    wanted = set(re.findall(r"<td><code>(\w+)</code></td>", guide.read_text(encoding="utf-8")))
    assert len(wanted) >= 20
    assert rows_of_the_argument_table().keys() == wanted


def test_what_the_table_calls_ours_exists_and_has_the_default_that_it_says():
    fields = {field.name: field for field in dataclasses.fields(RfDetrTrainingArguments)}
    calls = {
        "load_instance_dataset": load_instance_dataset,
        "train": RfDetrTrainer.train,
    }
    checked = 0
    for ours, default in rows_of_the_argument_table().values():
        names = re.findall(r"`([^`]+)`", ours)
        assert names
        defaults = default.split(", ") if re.fullmatch(r"[\w.,\- ]+", default) else []
        numbers = [name for name in names if re.fullmatch(r"[a-z_]+", name)]
        for name in names:
            if call := re.fullmatch(r"(\w+)\((\w+)=\.\.\.\)", name):
                function = calls.get(call[1])
                assert function is None or call[2] in inspect.signature(function).parameters
            elif name.startswith("activation_") or name.isupper() or "WANDB" in name:
                continue
            else:
                assert name.partition("=")[0] in fields, name
        for name, value in zip(numbers, defaults, strict=False):
            if value in ("True", "False") or re.fullmatch(r"[\d.e-]+", value):
                assert (fields[name].default or 0) == (value == "True" if value[0] in "TF" else float(value)), name
                checked += 1
    assert checked >= 16
    [additional] = re.findall(r"^Additional arguments: (.*?)\n\n", README, flags=re.DOTALL | re.MULTILINE)
    named = {name for name in re.findall(r"`([^`]+)`", additional) if re.fullmatch(r"[a-z_]+", name)}
    assert len(named) == 12
    assert named <= fields.keys()


COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("transformers-rfdetr")])
def test_the_command_line_knows_every_option_that_is_written(line: str):
    _, name, *arguments = shlex.split(line)
    typer.main.get_command(app).commands[name].make_context(name, arguments)


def test_the_other_commands_are_of_files_and_targets_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    others = [line.split() for line in COMMANDS if line and not line.startswith("transformers-rfdetr")]
    assert len(others) > 5
    for words in others:
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("pip", "torchrun", "accelerate")


def test_the_images_exist():
    images = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert images
    for name in images:
        with Image.open(ROOT / name) as image:
            assert image.width <= 700
