"""A hook of MkDocs: generate the reference of the commands from their own help."""

import enum
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from transformers_rfdetr.cli.app import app

PAGE = "reference/commands.md"
NAME = "transformers-rfdetr"


def choices(annotation: Any) -> list[str]:
    """Return the values of an Enum or of a Literal, also in an optional or a list; an empty list for other types."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [one.value for one in annotation]
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(arguments)
    return [value for argument in arguments for value in choices(argument)]


def option_names(parameter: Any) -> str:
    """Return the names of a parameter as code, `--dtype float16`, with its values if there is a list of them."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    values = [f"`{value}`" for value in choices(parameter.type_descriptor.annotation)]
    return f"{names}: {', '.join(values)}" if values else names


def description(parameter: Any) -> str:
    """Return the help of a parameter with its default, as one cell of a table."""
    text = " ".join((parameter.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
    default = parameter.default
    is_shown = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    if is_shown and getattr(parameter, "show_default", False) and "default" not in text.lower():
        text += f" Default: {getattr(default, 'value', default)}."
    return f"{text} Required." if parameter.required and parameter.param_type_name == "option" else text


def examples(epilog: str) -> str:
    """Return the epilog of a command: its examples as a block, and its notes."""
    lines = [line.strip().strip("\b") for line in inspect.cleandoc(epilog).splitlines()]
    commands = [line for line in lines if re.match(rf"{NAME} |torchrun |accelerate ", line)]
    notes = [line for line in lines if line and line not in commands and line != "examples:"]
    block = "\n".join(["```bash", *commands, "```"]) if commands else ""
    return f"{block}\n\n{' '.join(notes)}\n"


def command_section(name: str, command: Any) -> str:
    """Return the section of one command."""
    help_text = inspect.cleandoc(command.help or "").replace("\b", "").replace("<", "&lt;")
    parameters = [one for one in command.params if one.name != "help" and not getattr(one, "hidden", False)]
    rows = [f"| {option_names(one)} | {description(one)} |" for one in parameters]
    arguments = " ".join(
        one.name.upper() if one.required else f"[{one.name.upper()}]"
        for one in parameters
        if one.param_type_name == "argument"
    )
    table = "\n".join(["| argument or option | meaning |", "|---|---|", *rows])
    usage = f"```text\n{NAME} {name} [OPTIONS] {arguments}\n```"
    return f"## {name}\n\n{help_text}\n\n{usage}\n\n{table}\n\n{examples(command.epilog or '')}"


def command_reference() -> str:
    """Return the page of all commands."""
    commands = typer.main.get_command(app).commands
    head = f"# Commands\n\n`{NAME} COMMAND --help` prints the same."
    return "\n\n".join([head, *(command_section(name, command) for name, command in commands.items())])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the commands."""
    files.append(File.generated(config, PAGE, content=command_reference()))
    return files
