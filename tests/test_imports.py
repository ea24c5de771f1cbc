"""What importing the package needs and changes, seen in one fresh interpreter without the optional packages."""

import json
import subprocess
import sys
from typing import Any

import pytest

# Importing torch and transformers takes most of the time, so all questions are put to one interpreter.
PROGRAM = """
import json, logging, os, random, sys, warnings
for name in ("accelerate", "datasets", "evaluate", "matplotlib", "torchmetrics"):
    sys.modules[name] = None  # every import of it fails

import torch, transformers
# What the package stands on; some of it sets warning filters of its own.
import PIL.Image, scipy.optimize, transformers.image_processing_utils, transformers.modeling_utils
from transformers.models.auto import configuration_auto, modeling_auto

def state():
    return {
        "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(), "torch seed": torch.initial_seed(),
        "cudnn": torch.backends.cudnn.benchmark, "precision": torch.get_float32_matmul_precision(),
        "random": random.getstate(), "filters": len(warnings.filters), "environment": dict(os.environ),
        "level": logging.getLogger().level, "handlers": list(logging.getLogger().handlers),
        "verbosity": transformers.logging.get_verbosity(),
    }

def error_of(action):
    try:
        action()
    except ImportError as error:
        return str(error)

before = state()
import transformers_rfdetr
found = {"changed": [name for name, value in state().items() if value != before[name]]}
found["trainer"] = "transformers_rfdetr.training.trainer" in sys.modules

from transformers_rfdetr.evaluation import coco_evaluator, curves, evaluate_modules
truth = {"images": [], "annotations": [], "categories": []}
found["AP"] = coco_evaluator.InstanceSegmentationEvaluator(truth).compute()["bbox_AP"]
charts = curves.training_charts([{"loss": 1.0, "step": 1}])
found["errors"] = {
    "torchmetrics": error_of(lambda: __import__("transformers_rfdetr.evaluation.torchmetrics_metric")),
    "matplotlib": error_of(lambda: curves.draw_png(charts)),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_changes_no_global_state(found):
    assert found["changed"] == []


def test_importing_the_package_imports_nothing_that_only_training_needs(found):
    assert not found["trainer"]


def test_metrics_are_computed_without_the_optional_packages(found):
    assert found["AP"] == -1


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("torchmetrics", "pip install"),
        ("matplotlib", 'pip install "transformers-rfdetr[report]"'),
    ],
)
def test_without_a_package_the_error_names_the_command_that_installs_it(found, package, command):
    assert command in found["errors"][package]
