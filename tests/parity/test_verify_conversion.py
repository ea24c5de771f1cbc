"""The script that compares the original, transformers' port and ours, on stand-ins that rfdetr builds and loads."""

import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rfdetr.models.lwdetr import build_model_from_config

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.conversion import architecture
from transformers_rfdetr.conversion.convert import convert_to_transformers

from peer import PEER_CLASSES, narrow_dinov2, peer_config, randomise
from small_models import stand_in_config

SCRIPT = Path(__file__).parents[2] / "conversion_scripts" / "verify_conversion.py"
SPEC = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
script: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

SEGMENTATION, DETECTION, TWO_LEVELS = "rf-detr-seg-nano", "rf-detr-nano", "rf-detr-large-deprecated"
LAYERS = {SEGMENTATION: 4, DETECTION: 2, TWO_LEVELS: 3}
NAMES = ["barn", "house", "shed", "silo"]  # the heads have a fifth row, which is no class


@pytest.fixture
def write_checkpoint(monkeypatch, tmp_path):
    """Write the checkpoint that rfdetr's training would write for a stand-in, with random weights."""

    def write(variant: str) -> Path:
        config = stand_in_config(variant, grid=8)
        settings = peer_config(variant, config)
        narrow.enter_context(narrow_dinov2(config))
        model = build_model_from_config(settings)
        randomise(model)
        with torch.no_grad():
            model.class_embed.bias[-1] = -10.0  # or it would take the places of objects among the best
        content = {
            "model": model.state_dict(),
            "args": {"class_names": NAMES},
            "model_name": PEER_CLASSES[variant].removesuffix("Config"),
            "model_config": settings.model_dump(),
            "rfdetr_version": "1.11.2",
        }
        torch.save(content, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    monkeypatch.setitem(architecture.ENCODERS, "dinov2_windowed_small", (32, 2, 0))
    with ExitStack() as narrow:
        yield write


@pytest.fixture
def run(monkeypatch):
    """Run the command, and return its exit code and its comparison."""
    kept: list[Any] = []
    compare = script.compare
    monkeypatch.setattr(script, "compare", lambda *args, **named: kept.append(compare(*args, **named)) or kept[-1])

    def command(*args: Any, **named: Any) -> tuple[int, Any]:
        try:
            script.verify_conversion(*args, **named)
        except typer.Exit as end:
            return end.exit_code, kept and kept[-1]
        return 0, kept[-1]

    return command


def change(path: Path, name: str, function: Any) -> None:
    content = torch.load(path, weights_only=True)
    content["model"][name] = function(content["model"][name])
    torch.save(content, path)


@pytest.mark.parametrize("variant", LAYERS)
def test_a_conversion_agrees_at_every_stage(variant, write_checkpoint, run):
    code, comparison = run(write_checkpoint(variant), threshold=0.9)
    assert code == 0
    assert [row.name for row in comparison.stages] == [
        "pixels",
        *(f"backbone: tap {tap}" for tap in (1, 2, 3, 4)),
        *(f"projector: level {level}" for level in ((1, 2) if variant == TWO_LEVELS else (1,))),
        *(f"first stage: {what}" for what in ("tokens", "class logits", "selected boxes")),
        *(f"decoder: layer {layer + 1}" for layer in range(LAYERS[variant])),
        *(["class logits", "boxes", "mask logits"] if variant == SEGMENTATION else ["class logits", "boxes"]),
    ]
    assert min(row.largest for row in comparison.stages) > 0.1  # a comparison of constants would prove nothing
    assert max(row.ours for row in comparison.stages) < 1e-4
    assert comparison.parameters == []
    if variant == TWO_LEVELS:
        assert {row.port for row in comparison.stages} == {None}
        assert any("one projector level" in note for note in comparison.notes)
    else:
        assert max(row.port for row in comparison.stages) < 1e-4

    original, ours = comparison.detections["original"], comparison.detections["ours"]
    assert [found[0] for found in ours] == [found[0] for found in original]
    assert {found[0] for found in ours} <= set(NAMES)
    assert len(ours) == 3 or min(found[1] for found in ours) > 0.9
    for (_, score, box), (_, expected_score, expected_box) in zip(ours, original, strict=True):
        assert score == pytest.approx(expected_score, abs=1e-4)
        assert box == pytest.approx(expected_box, abs=0.05)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("transformer.decoder.layers.0.norm3.bias", ["decoder: layer 1", "decoder: layer 2", "class logits", "boxes"]),
        ("transformer.enc_output.2.bias", []),  # of a group that only training runs
    ],
)
def test_a_parameter_that_changed_after_the_conversion_is_named(name, wrong, write_checkpoint, run, tmp_path, capsys):
    path = write_checkpoint(DETECTION)
    convert_to_transformers(path, tmp_path / "converted")
    change(path, name, lambda bias: bias + 0.5)
    code, comparison = run(path, tmp_path / "converted")
    assert code == 1
    assert [row.name for row in comparison.stages if not row.agrees] == wrong
    [row] = comparison.parameters
    assert (row.name, row.ours, row.port) == (name, pytest.approx(0.5), pytest.approx(0.5))
    assert name in capsys.readouterr().out


def test_tied_tokens_are_compared_in_the_order_of_the_original(write_checkpoint, run, tmp_path):
    path, name = write_checkpoint(DETECTION), "transformer.enc_out_class_embed.0.weight"
    change(path, name, lambda weight: 1e-4 * weight)
    convert_to_transformers(path, tmp_path / "converted")
    change(path, name, torch.neg)  # the best tokens become the worst ones, by a ten-thousandth
    _, comparison = run(path, tmp_path / "converted")
    assert any("ours selects 7 other first-stage tokens of 7" in note for note in comparison.notes)
    assert all(row.agrees for row in comparison.stages)


def test_without_the_port_its_column_is_empty_and_a_note_has_the_reason(write_checkpoint, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers.models.rf_detr.modeling_rf_detr", None)
    code, comparison = run(write_checkpoint(DETECTION))
    assert code == 0
    assert set(comparison.detections) == {"original", "ours"}
    assert "no column for the port in transformers" in capsys.readouterr().out


def test_invalid_input_ends_with_code_2_and_one_line(write_checkpoint, run, monkeypatch, tmp_path, capsys):
    path = write_checkpoint(DETECTION)
    assert run(tmp_path / "missing.pth")[0] == 2
    assert "missing.pth" in capsys.readouterr().err
    assert run(path, threshold=50)[0] == 2
    assert "--threshold must be within [0, 1], got 50" in capsys.readouterr().err
    stand_in_config(DETECTION, num_labels=7).save_pretrained(tmp_path / "another")
    RfDetrImageProcessor().save_pretrained(tmp_path / "another")
    assert run(path, tmp_path / "another")[0] == 2
    assert "must have the 5 labels of the checkpoint, got 7" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rfdetr", None)
    assert run(path)[0] == 2
    assert "pip install rfdetr" in capsys.readouterr().err
