"""Imports point one way, and the files that can be pushed with a model import their neighbours in the plain form."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_rfdetr

PACKAGE = Path(transformers_rfdetr.__file__).parent
# Later files may import earlier ones.
ORDER = [
    "files",
    "masks",
    "configuration_rf_detr",
    "loss_rf_detr",
    "modeling_rf_detr_dinov2",
    "checkpoint_layouts",
    "modeling_rf_detr",
    "image_processing_rf_detr",
    "registration",
    "published_weights",
    "rfdetr_files",
    "visualization",
    "model_card",
    "conversion",
    "instances",
    "inference",
    "loading",
    "tiling",
    "video",
    "bulk_prediction",
    "demo_data",
    "export",
    "augmentation",
    "data",
    "data_sources",
    "metrics",
    "torch_metric",
    "report",
    "repair_data",
    "check_data",
    "optimization",
    "recovery",
    "training_arguments",
    "run_card",
    "trainer",
    "__init__",
]
PUSHED_WITH_A_MODEL = [name for name in ORDER if "_rf_detr" in name] + ["masks", "checkpoint_layouts"]


def neighbours(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add(node.module or "")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers_rfdetr"):
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_earlier_ones_only(name):
    assert neighbours(PACKAGE / f"{name}.py") <= set(ORDER[: ORDER.index(name)])


def test_every_file_of_the_package_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


def test_importing_the_package_imports_nothing_that_only_training_needs():
    later = ["accelerate", "datasets", "evaluate", "torchmetrics"]
    code = f"""
import sys
for name in {later}:
    sys.modules[name] = None
import transformers_rfdetr
assert "transformers_rfdetr.trainer" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    for name in transformers_rfdetr.__all__:
        assert getattr(transformers_rfdetr, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = transformers_rfdetr.nonsense


@pytest.mark.parametrize("name", sorted(set(PUSHED_WITH_A_MODEL)))
def test_a_file_that_is_pushed_with_a_model_imports_as_from_dot_name(name):
    assert all(module and "." not in module for module in neighbours(PACKAGE / f"{name}.py"))
