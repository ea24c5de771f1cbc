"""The TensorRT example refuses what it cannot do; it needs a GPU for the rest."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "build_tensorrt.py"


@pytest.mark.parametrize(
    ("tensorrt", "message"),
    [(None, "pip install tensorrt"), (ModuleType("tensorrt"), "requires an NVIDIA GPU")],
)
def test_the_example_names_what_is_missing(tmp_path, monkeypatch, tensorrt, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(path), str(tmp_path / "model.engine")])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [(("missing.onnx", "model.engine"), "missing.onnx must exist"), (("model.onnx", "model.onnx"), "must be new")],
)
def test_the_example_names_wrong_files(tmp_path, monkeypatch, names, message):
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *(str(tmp_path / name) for name in names)])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
