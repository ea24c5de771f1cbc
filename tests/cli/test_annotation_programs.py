"""Every command that takes a dataset takes every format of files that is read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from annotation_programs import SIZE, save_image
from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.cli.app import app

from small_models import small_model

HEIGHT, WIDTH = SIZE
XML = """<annotations><version>1.1</version><image id="0" name="a.png" width="{1}" height="{0}">
<polygon label="roof" points="2,3;30,3;30,20"></polygon><box label="tree" xtl="1" ytl="2" xbr="9" ybr="9"></box>
</image></annotations>"""


def run(*arguments) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def save(folder: Path) -> Path:
    for split in ("train", "val"):
        save_image(folder / split / "images" / "a.png")
        (folder / split / "annotations.xml").write_text(XML.format(*SIZE))
    return folder


def save_via(folder: Path) -> None:
    region = {
        "shape_attributes": {"name": "polygon", "all_points_x": [2, 30, 30], "all_points_y": [3, 3, 20]},
        "region_attributes": {"class": "roof"},
    }
    image = {"filename": "a.png", "size": 1, "regions": [region], "file_attributes": {}}
    (folder / "via.json").write_text(json.dumps({"a.png1": image}))


def save_label_studio(folder: Path) -> None:
    value = {"points": [[5, 10], [60, 10], [60, 50]], "polygonlabels": ["roof"]}
    result = {"type": "polygonlabels", "value": value, "original_width": WIDTH, "original_height": HEIGHT}
    task = {"id": 1, "data": {"image": "a.png"}, "annotations": [{"id": 1, "result": [result]}]}
    (folder / "export.json").write_text(json.dumps([task]))


def save_supervisely(folder: Path) -> None:
    points = {"exterior": [[2, 3], [30, 3], [30, 20]], "interior": []}
    content = {"size": {"height": HEIGHT, "width": WIDTH}, "tags": []}
    content["objects"] = [{"classTitle": "roof", "geometryType": "polygon", "points": points}]
    (folder / "img").mkdir()
    (folder / "a.png").rename(folder / "img" / "a.png")
    (folder / "ann").mkdir()
    (folder / "ann" / "a.png.json").write_text(json.dumps(content))


def save_masks(folder: Path, names: dict[str, str], value: int = 1) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[3:20, 2:30] = value
    (folder / names.pop("images")).mkdir()
    (folder / "a.png").rename(folder / "a.tmp")
    for parent in names.values():
        (folder / parent).mkdir()
        Image.fromarray(mask).save(folder / parent / "a.png")


def save_voc(folder: Path) -> None:
    save_masks(folder, {"images": "JPEGImages", "objects": "SegmentationObject", "classes": "SegmentationClass"})
    (folder / "a.tmp").rename(folder / "JPEGImages" / "a.png")


def save_instance_maps(folder: Path) -> None:
    save_masks(folder, {"images": "images", "objects": "masks"})
    (folder / "a.tmp").rename(folder / "images" / "a.png")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    small_model().save_pretrained(folder)
    RfDetrImageProcessor(size=48).save_pretrained(folder)
    return folder


def use(data: Path, start: Path, output: Path) -> None:
    """Check, train on, evaluate on and predict a dataset."""
    run("check-dataset", data)
    quick = ["max_steps=1", "gradient_accumulation_steps=1", "multi_scale=false", "dataloader_num_workers=0"]
    options = [part for setting in quick for part in ("--set", setting)]
    run("train", data, "--model", start, "--output", output / "run", "--device", "cpu", "--batch-size", 1, *options)
    run("evaluate", output / "run" / "model", data, "--split", "train", "--device", "cpu")
    predict = ["--split", "train", "--output", output / "out", "--device", "cpu"]
    run("predict", output / "run" / "model", "--dataset", data, *predict)
    assert (output / "out" / "predictions.coco.json").is_file()


@pytest.mark.parametrize("format", ["coco", "yolo", "labelme", "cvat", "hub"])
def test_written_formats_are_checked_trained_on_evaluated_and_predicted(format, start, tmp_path, monkeypatch):
    if format == "hub":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = save(tmp_path / "source")
    run("convert-dataset", source, tmp_path / "data", "--to", format)
    use(tmp_path / "data", start, tmp_path)


@pytest.mark.parametrize(
    "save_files",
    [save_via, save_label_studio, save_supervisely, save_voc, save_instance_maps],
)
def test_other_formats_are_checked_trained_on_evaluated_and_predicted(save_files, start, tmp_path):
    data = tmp_path / "data"
    save_image(data / "a.png")
    save_files(data)
    use(data, start, tmp_path)
