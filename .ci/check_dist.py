"""Check the files in dist/ against the repository, and try the wheel offline in an empty environment: `make dist`."""

import email
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
# In the environment of the wheel, every connection ends the program.
NO_NETWORK = (
    "import sys; sys.addaudithook(lambda event, what: "
    "event in ('socket.connect', 'socket.getaddrinfo') and sys.exit(f'not offline: {event} {what}'))"
)
TRIAL = """
import transformers_rfdetr
from transformers_rfdetr import load, predict, sample_image, tiny_checkpoint

print(transformers_rfdetr.__file__)
assert transformers_rfdetr.__file__.startswith({folder!r})
[instances] = predict(*load(str(tiny_checkpoint())), sample_image())
print(len(instances.scores), "instances in the sample image")
assert len(instances.scores)
"""


def git_files(folder: str) -> set[str]:
    """Return the files of a folder of the repository that git tracks."""
    done = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return set(filter(None, done.stdout.split("\0")))


def check_files(wheel: ZipFile) -> None:
    """Check that the wheel contains the package as git tracks it, and nothing else."""
    packed = {f"src/{name}" for name in wheel.namelist() if ".dist-info/" not in name}
    tracked = git_files("src")
    assert packed == tracked, f"missing: {sorted(tracked - packed)}; unexpected: {sorted(packed - tracked)}"
    print(f"The wheel has the {len(packed)} files of src/.")


def check_links(wheel: ZipFile) -> None:
    """Check that each link of the description leads to the repository, to a file that is there, or elsewhere."""
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    address = metadata["Project-URL"].partition(", ")[2]
    files, targets = git_files("."), re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", metadata.get_payload(decode=True).decode())
    assert any(image for image, _ in targets)
    for image, target in targets:
        root = f"{address}/{'raw' if image else 'blob'}/v{metadata['Version']}/"
        is_in_repository = target.startswith(root) and target.removeprefix(root).partition("#")[0] in files
        assert is_in_repository or (target.startswith("https://") and not target.startswith(address)), target
    print(f"{len(targets)} links and images of the description are absolute.")


def check_sdist(wheel: Path, folder: str) -> None:
    """Check that the wheel, which `python -m build` makes from the sdist, is the one that the repository makes."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT], check=True)
    assert (Path(folder) / wheel.name).read_bytes() == wheel.read_bytes(), "the sdist builds another wheel"
    print("The sdist and the repository build the same wheel.")


def try_wheel(wheel: Path, folder: str) -> None:
    """Install the wheel into an empty environment, and predict there without network."""
    programs = Path(folder).resolve() / "environment" / "bin"
    venv.create(programs.parent, with_pip=True)
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    [packages] = programs.parent.glob("lib/python*/site-packages")
    (packages / "no_network.pth").write_text(NO_NETWORK)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for command in (
        ["python", "-c", TRIAL.format(folder=str(programs.parent))],
        ["transformers-rfdetr", "--help"],
        ["transformers-rfdetr", "predict", "rf-detr-seg-tiny", "-o", "found"],
    ):
        subprocess.run([programs / command[0], *command[1:]], cwd=folder, env=environment, check=True)
    assert any((Path(folder) / "found").rglob("*.*"))


if __name__ == "__main__":
    [path] = (ROOT / "dist").glob("*.whl")
    with ZipFile(path) as opened:
        check_files(opened)
        check_links(opened)
    with tempfile.TemporaryDirectory() as temporary:
        check_sdist(path, temporary)
        try_wheel(path, temporary)
