"""The help of the command line is there at once."""

import json
import subprocess
import sys

# All in one interpreter, whose name is that of the console script; Click prints the help and exits.
PROGRAM = """
import contextlib, io, json, sys
sys.argv = ["/usr/bin/transformers-rfdetr"]
from transformers_rfdetr.cli.app import app
import typer

def help_of(*command):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        app([*command, "--help"], prog_name="transformers-rfdetr")
    return text.getvalue()

commands = list(typer.main.get_command(app).commands)
texts = {command: help_of(command) for command in commands}
imported = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps({"help": help_of(), "commands": texts, "imported": imported}))
"""


def test_help_imports_neither_torch_nor_transformers():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found["commands"]) == 14
    assert all(command in found["help"] for command in found["commands"])
    assert all(f"Usage: transformers-rfdetr {command}" in text for command, text in found["commands"].items())
    assert found["imported"] == []
