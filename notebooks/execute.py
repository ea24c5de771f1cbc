"""Run the notebooks and store their outputs: `python notebooks/execute.py [NAME ...]`, by default all of them.

Only what a second run would repeat is stored: printed text, values and images, without logs, progress bars and times.
"""

import argparse
import base64
import io
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

_FOLDER = Path(__file__).parent
_MAX_PNG_BYTES = 60_000  # a larger image without transparency is stored as JPEG
_JPEG_QUALITY = 85


def execute(path: Path, folder: Path) -> NotebookNode:
    """Run a notebook in a new kernel, with its temporary files in `folder`, and return it with its outputs.

    The kernel uses one thread, so that the numbers do not depend on the number of cores, and no downloaded models.
    """
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    client = NotebookClient(notebook, timeout=1200, record_timing=False, resources={"metadata": {"path": str(folder)}})
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "TMPDIR": str(folder)}
    client.execute(env=os.environ | settings)
    notebook.metadata = metadata  # without the version of Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _clean(cell.outputs)
    return notebook


def _clean(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Drop logs and progress bars, join consecutive prints, and shrink images."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name != "stdout":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "image/png" in output.data:
            output.data = {"text/plain": output.data["text/plain"], **_shrink(output.data["image/png"])}
            output.metadata = {}
        elif output.output_type == "display_data":  # the Trainer's table, with a progress bar and times
            continue
        kept.append(output)
    return kept


def _shrink(png: str) -> dict[str, str]:
    """Return a PNG file in base64, or the same image as JPEG, by its type."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if len(png) * 3 / 4 <= _MAX_PNG_BYTES or (image.mode == "RGBA" and image.getextrema()[3][0] < 255):
        return {"image/png": png}
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return {"image/jpeg": base64.b64encode(stream.getvalue()).decode()}


def main() -> None:
    """Run the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as 01_predict", default=[])
    options = parser.parse_args()
    paths = [_FOLDER / f"{name}.ipynb" for name in options.names] or sorted(_FOLDER.glob("*.ipynb"))
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
