"""The Dockerfile, without Docker: its commands run in a fresh virtual environment, and its server answers."""

import json
import os
import re
import shlex
import signal
import site
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from transformers_rfdetr import load, predict
from transformers_rfdetr.assets import sample_image

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1)) for line in (ROOT / "Dockerfile").read_text().splitlines() if line and line[0] != "#"
]


def values(instruction):
    return [value for name, value in INSTRUCTIONS if name == instruction]


def test_it_is_short_and_copies_only_what_the_build_makes():
    assert INSTRUCTIONS[0][0] == "FROM"
    assert {name for name, _ in INSTRUCTIONS} == {"FROM", "COPY", "RUN", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    [copied] = values("COPY")
    assert copied == "dist/transformers_rfdetr-*.whl /wheels/"
    assert (ROOT / ".dockerignore").read_text().split() == ["*", "!dist"]
    minimum = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert int(re.search(r"python:3\.(\d+)", values("FROM")[0])[1]) >= int(minimum)
    assert values("EXPOSE") == ["7860"]


def fresh_environment(folder):
    """Make a virtual environment with all installed packages but this one, as links: they are gigabytes."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    linked = folder / "linked"
    linked.mkdir()
    for entry in (entry for path in site.getsitepackages() for entry in Path(path).iterdir()):
        if "transformers_rfdetr" not in entry.name and entry.suffix != ".pth" and entry.name[:3] != "pip":
            (linked / entry.name).symlink_to(entry)
    (packages / "linked.pth").write_text(f"{linked}\n")


@pytest.mark.long
def test_its_commands_install_the_wheel_and_its_server_answers(tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("onnxruntime")
    wheels, environment = tmp_path / "wheels", tmp_path / "environment"
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "--wheel-dir", str(wheels)]
    if subprocess.run(build, cwd=tmp_path).returncode:
        pytest.skip("needs a package index, for hatchling")
    fresh_environment(environment)
    settings = dict(shlex.split(setting)[0].split("=", 1) for value in values("ENV") for setting in value.split())
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    variables["PATH"] = f"{environment / 'bin'}:{variables['PATH']}"
    for command in values("RUN"):
        subprocess.run(command.replace("/wheels", str(wheels)), shell=True, check=True, env=variables)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    [entry], [arguments] = values("ENTRYPOINT"), values("CMD")
    command = [str(environment / "bin" / json.loads(entry)[0]), *json.loads(arguments), "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env=variables)
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/predict", sample_image().read_bytes(), {"Content-Type": "image/png"}
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    found = json.load(answer)
                break
            except urllib.error.URLError:
                assert server.poll() is None
                time.sleep(0.5)
        [expected] = predict(*load("rf-detr-seg-tiny"), sample_image())
        assert [one["mask"] for one in found["instances"]] == expected.masks
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
        assert b"rf-detr-seg-tiny" in page
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    code = [environment / "bin" / "python", "-c", "import transformers_rfdetr; print(transformers_rfdetr.__file__)"]
    installed = subprocess.run(code, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    assert installed.stdout.startswith(str(environment))
