"""The script that compares the original, transformers' port and ours, on checkpoints that rfdetr's code wrote."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rfdetr.models.lwdetr import build_model_from_config
from safetensors.torch import load_file, save_file

from transformers_rfdetr import conversion

from peer import PEER_CLASSES, narrow_dinov2, peer_config, randomise
from small_models import stand_in_config

SCRIPT = Path(__file__).parents[2] / "conversion_scripts" / "verify_conversion.py"
SPEC = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
script: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

NAMES = ["barn", "house", "shed", "silo"]  # the stand-ins' heads have a fifth row, which is no class
sys_variants = list(PEER_CLASSES)
SEGMENTATION, DETECTION, TWO_LEVELS = "rf-detr-seg-nano", "rf-detr-base", "rf-detr-large-deprecated"
CHANGED = "transformer.decoder.layers.1.linear1.bias"


@pytest.fixture
def write_checkpoint(monkeypatch, tmp_path):
    """Writes what rfdetr's training would, of a stand-in with random weights, and lets both sides read it."""

    def write(variant: str, **overrides: Any) -> Path:
        config = stand_in_config(variant, **overrides)
        settings = peer_config(variant, config)
        monkeypatch.setitem(conversion.ENCODERS, "dinov2_windowed_small", (32, 2, 0))
        narrow.enter_context(narrow_dinov2(config))
        model = build_model_from_config(settings)
        randomise(model)
        content = {
            "model": model.state_dict(),
            "args": {"class_names": NAMES},
            "model_name": PEER_CLASSES[variant].removesuffix("Config"),
            "model_config": settings.model_dump(),
            "rfdetr_version": "1.11.2",
        }
        torch.save(content, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    with script.ExitStack() as narrow:
        yield write



@pytest.mark.parametrize("variant,kw", [("rf-detr-seg-medium", dict(grid=24, num_queries=400)), ("rf-detr-seg-xlarge", dict(grid=52, num_queries=100)), ("rf-detr-large-deprecated", dict(grid=16, num_queries=300))])
def test_explore(variant, kw, write_checkpoint, capsys):
    path = write_checkpoint(variant, **kw)
    c = script.compare(path)
    with capsys.disabled():
        print("\n", variant); print(script.describe(c)[:4000])
