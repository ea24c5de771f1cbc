"""README.md and docs/: tables, commands, links and images. Their Python blocks run by themselves, see conftest.py."""

import dataclasses
import inspect
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from page_sandbox import sandbox
from small_models import SHARED
from training_run import QUICK

ROOT = Path(__file__).parents[1]
# Pages that are written by hand; the others include files of the repository.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]


def rows_of_the_argument_table() -> dict[str, tuple[str, str]]:
    """rfdetr's argument -> (what is ours, its default), from the table."""
    text = TEXTS["docs/guides/from-rfdetr.md"]
    [table] = re.findall(r"\| rfdetr's `train\(\)` .*?\n\|[-|]+\n(.*?)\n\n", text, flags=re.DOTALL)
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
    text = TEXTS["docs/guides/fine-tuning.md"]
    [additional] = re.findall(r"^Additional arguments: (.*?)\n\n", text, flags=re.DOTALL | re.MULTILINE)
    named = {name for name in re.findall(r"`([^`]+)`", additional) if re.fullmatch(r"[a-z_]+", name)}
    assert len(named) == 12
    assert named <= fields.keys()


COMMANDS = {
    page: [
        line.partition("  #")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    for page, text in TEXTS.items()
}
OURS = sorted({line for lines in COMMANDS.values() for line in lines if line.startswith("transformers-rfdetr")})


@pytest.mark.parametrize("line", OURS)
def test_the_command_line_knows_every_option_that_is_written(line: str):
    _, name, *arguments = shlex.split(line)
    typer.main.get_command(app).commands[name].make_context(name, arguments)


# Pages whose commands need nothing but the folder of page_sandbox.py: no server, cluster, network or other checkpoint.
COMMAND_PAGES = [
    "get-started/first-fine-tuning",
    "get-started/first-prediction",
    "guides/check-and-repair",
    "guides/evaluation",
    "guides/thresholds",
    "guides/what-to-label-next",
]


@pytest.mark.long
@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_the_commands_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    """On the checkpoint in the package instead of a published one, with training runs of two optimizer steps."""
    finish = RfDetrTrainingArguments.__post_init__

    def post_init(arguments):
        for name, value in (QUICK | {"num_train_epochs": 1}).items():
            setattr(arguments, name, value)
        finish(arguments)

    shutil.copytree(sandbox().name, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RfDetrTrainingArguments, "__post_init__", post_init)
    lines = [line for line in COMMANDS[f"docs/{page}.md"] if line in OURS]
    assert lines
    for line in lines:
        done = CliRunner().invoke(app, shlex.split(line.replace("rf-detr-seg-medium", "my-model"))[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}"


def test_every_command_is_shown():
    names = typer.main.get_command(app).commands
    assert {line.split()[1] for line in OURS} == set(names)
    assert len([line for line in OURS if line in COMMANDS["README.md"]]) >= len(names) - 1  # not convert-back


def test_the_other_commands_are_of_files_and_targets_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    others = [line.split() for lines in COMMANDS.values() for line in lines if line and line not in OURS]
    assert len(others) > 15
    for words in others:
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("pip", "torchrun", "accelerate")


def test_every_extra_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        extra
        for text in TEXTS.values()
        for group in re.findall(r'"\.\[([\w,]+)\]"', text)
        for extra in group.split(",")
    }
    assert len(named) >= 5
    assert named <= extras.keys()


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_is_short_and_its_links_lead_to_files(page: str):
    text = TEXTS[page]
    assert text.count("\n") <= (150 if page == "README.md" else 120)
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        # The page of the commands is generated: docs/command_reference.py.
        if not target.startswith("https://") and not target.endswith("commands.md"):
            assert ((ROOT / page).parent / target).is_file(), target


def test_the_images_are_not_wide():
    images = {
        ((ROOT / page).parent / name).resolve()
        for page, text in TEXTS.items()
        for name in re.findall(r"!\[.*?\]\((.*?)\)", text)
    }
    assert images == set((ROOT / "docs" / "images").iterdir())
    for path in images:
        with Image.open(path) as image:
            assert image.width <= 700


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {page.removeprefix("docs/") for page in TEXTS if page.startswith("docs/")}
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == pages | {"reference/commands.md"}
