"""The notebooks run offline on drawn images, are stored without outputs, and mark the values to change."""

import ast
import itertools
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as coco_mask

from transformers_rfdetr import RfDetrTrainingArguments, resolve_variant
from transformers_rfdetr.model.masks import read_segmentation, to_rle

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MARK = '# CHANGE THIS: for a real checkpoint and your own images, use the values after "real:".'
CHANGES = re.compile(r"^(\w+) = (.+)  # real: (.+)$", flags=re.MULTILINE)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def cells(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    stored = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in stored if kind in (None, cell["cell_type"])]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[[str], tuple[dict[str, Any], list[Any]]]:
    """Return a function that runs a notebook -> its names, and the values of last lines, which Jupyter would show."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a notebook opened a connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setitem(os.environ, "MPLBACKEND", "Agg")

    def run_cells(name: str) -> tuple[dict[str, Any], list[Any]]:
        [path] = (path for path in NOTEBOOKS if path.stem == name)
        names: dict[str, Any] = {"__name__": "__main__"}
        shown = []
        for number, cell in enumerate(cells(path, "code"), start=1):
            tree, place = ast.parse(source(cell)), f"{name}, code cell {number}"
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, place, "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), place, "eval"), names))
        return names, [value for value in shown if value is not None]

    return run_cells


def test_there_are_five_notebooks():
    assert [path.stem[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]


@every_notebook
def test_a_notebook_is_stored_in_format_4_5_and_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) <= 15
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell.keys() == common | {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"], cell["metadata"]) == (None, [], {})
        else:
            assert cell["cell_type"] == "markdown"
            assert cell.keys() == common


@every_notebook
def test_every_code_cell_follows_a_text(path):
    kinds = [cell["cell_type"] for cell in cells(path)]
    assert kinds[0] == "markdown"
    assert source(cells(path)[0]).startswith(f"# {int(path.stem[:2])}. ")
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")


@every_notebook
def test_a_notebook_defines_no_classes_and_needs_no_ipython_syntax(path):
    for cell in cells(path, "code"):
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(source(cell))))


@every_notebook
def test_one_marked_cell_has_the_values_to_change_and_valid_replacements(path):
    marked = [index for index, cell in enumerate(cells(path)) if MARK in source(cell).splitlines()]
    assert len(marked) == 1
    assert "**Your turn" in source(cells(path)[marked[0] - 1])
    code = source(cells(path)[marked[0]]).partition(MARK)[2]
    changes = {name: ast.literal_eval(real) for name, _, real in CHANGES.findall(code)}
    assert code.count("# real: ") == len(changes) >= 2
    assert sum("# real: " in source(cell) for cell in cells(path)) == 1

    checkpoint = changes.pop("checkpoint")
    assert checkpoint.startswith("runs/buildings/") or resolve_variant(checkpoint)
    assert changes.get("photo", "photo.jpg") == "photo.jpg"
    assert changes.get("source", "merve/satellite-building-segmentation") == "merve/satellite-building-segmentation"
    RfDetrTrainingArguments(changes.get("output", "runs"), **changes.get("settings", {}))
    assert 0 <= changes.get("min_score", 0.5) <= 1


def test_01_finds_the_buildings_that_it_learned(run):
    names, shown = run("01_predict")
    objects = names["coco"]["annotations"]
    ground_truth = [to_rle(read_segmentation(one["segmentation"], (360, 480)), (360, 480)) for one in objects]
    best = coco_mask.iou(names["found"].masks, ground_truth, [0] * len(ground_truth)).max(0)
    # After so short a training, a processor that rounds differently may miss one.
    assert len(ground_truth) == 3
    assert (best > 0.7).sum() >= 2
    drawn, overlay, crop = shown
    assert drawn.size == overlay.size == (480, 360)
    assert not np.array_equal(np.asarray(drawn), np.asarray(overlay))
    assert crop.mode == "RGBA"


def test_05_computes_the_outputs_of_the_model_step_by_step(run, capsys):
    names, shown = run("05_inside_the_model")
    # rf-detr-seg-small: 384 pixels in patches of 12 in 2 x 2 windows, 100 queries of width 256, masks at a quarter.
    printed = capsys.readouterr().out
    for shape in ((1, 3, 384, 384), (4, 1 + 16 * 16, 384), (1, 384, 32, 32), (1, 1024, 256), (1, 100, 256)):
        assert str(shape) in printed, shape
    assert names["masks"].shape == (1, 100, 96, 96)
    for name, value in (("logits", "logits"), ("boxes", "pred_boxes"), ("masks", "pred_masks")):
        assert torch.allclose(names[name], names["outputs"][value], atol=1e-4)
    assert [type(image) for image in shown] == [PIL.Image.Image] * 2


@pytest.mark.long
def test_02_trains_a_model_that_finds_buildings(run, capsys):
    names, shown = run("02_finetune")
    assert max(entry.get("eval_segm_AP50", 0) for entry in names["history"]) > 0.15
    assert len(names["found"]) >= 1
    assert "building" in capsys.readouterr().out
    assert [image.size for image in shown if isinstance(image, PIL.Image.Image)][-1][0] > 2 * 2 * 192


@pytest.mark.long
def test_03_shows_correct_and_wrong_detections(run):
    names, shown = run("03_evaluate")
    analysis = names["analysis"]
    assert analysis.metrics["segm_AP50"] > 0.15
    assert analysis.class_names == ["house", "hall"]
    assert np.trace(analysis.confusion[:2, :2]) > 0  # something is right
    assert analysis.confusion.sum() > np.trace(analysis.confusion)  # and something is wrong
    assert (names["folder"] / "report" / "report.html").is_file()
    assert isinstance(shown[-1], PIL.Image.Image)


@pytest.mark.long
def test_04_converts_there_and_back_and_exports_the_same_numbers(run, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    names, _ = run("04_convert_and_export")
    assert max(names["done"].differences.values()) < 1e-2
    assert np.abs(names["masks"] - names["expected"].pred_masks.numpy()).max() < 1e-2
    assert names["metadata"]["class_names"] == {"0": "building"}
