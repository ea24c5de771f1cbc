"""The command convert-dataset writes what every other command reads, in splits that the user asks for."""

import json

import pytest
from typer.testing import CliRunner

from annotated_images import make_coco, save_coco, save_images
from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset


def convert(*arguments):
    return CliRunner().invoke(app, ["convert-dataset", *map(str, arguments)])


def refusal(*arguments) -> str:
    result = convert(*arguments)
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith("convert-dataset: ")]
    return line


@pytest.fixture
def source(tmp_path):
    folder = save_images(tmp_path / "source" / "train")
    save_coco(folder / "_annotations.coco.json")
    save_coco(save_images(tmp_path / "source" / "valid") / "_annotations.coco.json")
    return tmp_path / "source"


@pytest.mark.parametrize("format", ["coco", "yolo", "labelme", "cvat", "hub"])
def test_the_splits_of_the_source_are_kept_and_counted(format, source, tmp_path):
    pytest.importorskip("datasets")
    result = convert(source, tmp_path / "out", "--to", format)
    assert result.exit_code == 0, result.output
    assert "train: 3 images, 1 of them without objects" in result.stdout
    arguments = {"cache_dir": str(tmp_path / "cache")} if format == "hub" else {}
    data = load_instance_dataset(tmp_path / "out", **arguments)
    assert {name: len(split) for name, split in data.items()} == {"train": 3, "validation": 3}


def test_split_divides_the_images_of_all_splits_anew(tmp_path):
    for name, first_seed in (("train", 0), ("valid", 7)):
        drawn = draw_dataset(7 if name == "train" else 3, (48, 48), first_seed=first_seed)
        save_dataset(tmp_path / "source" / name, *drawn)
    for shares, sizes in (("0.8,0.2", [8, 2]), ("0.6,0.2,0.2", [6, 2, 2])):
        folder = tmp_path / shares
        result = convert(tmp_path / "source", folder, "--to", "yolo", "--split", shares, "--copy-images")
        assert result.exit_code == 0, result.output
        data = load_instance_dataset(folder)
        assert [len(split) for split in data.values()] == sizes
        names = [sample["file_name"].rpartition("/")[2] for split in data.values() for sample in split]
        assert sorted(names) == [f"{seed:06d}.png" for seed in range(10)]


def test_images_and_classes_can_be_given(tmp_path):
    save_images(tmp_path / "photos")
    path = save_coco(tmp_path / "annotations" / "train.json")
    options = ["--image-folder", tmp_path / "photos", "--to", "coco"]
    assert convert(path, tmp_path / "out", *options).exit_code == 0
    written = json.loads((tmp_path / "out" / "train" / "_annotations.coco.json").read_text())
    assert written["categories"] == [{"id": 3, "name": "roof"}, {"id": 7, "name": "tree"}]
    assert [image["id"] for image in written["images"]] == [image["id"] for image in make_coco()["images"]]


def test_what_cannot_be_done_is_refused_in_one_line(source, tmp_path):
    out = tmp_path / "out"
    assert "--push requires --to hub, got yolo" in refusal(source, out, "--to", "yolo", "--push", "me/data")
    for shares in ("0.8", "0.8,0.3", "a,b", "1,0", "0.5,0.2,0.2,0.1", "nan,0.2"):
        line = refusal(source, out, "--to", "coco", "--split", shares)
        assert f"with the sum 1, such as 0.8,0.2, got {shares}" in line
    assert "must lie outside of the source" in refusal(source, source / "copy", "--to", "coco")
    assert "must be new or empty" in refusal(source, tmp_path, "--to", "coco")
    assert "nowhere" in refusal(tmp_path / "nowhere", out, "--to", "coco")
    (source / "train" / "1.png").unlink()
    assert "1 of 3 images are not in" in refusal(source, out, "--to", "coco")
    assert convert(source, out, "--to", "voc").exit_code == 2
    assert not out.exists()
