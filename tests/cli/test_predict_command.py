"""`transformers-rfdetr predict`: unreadable files, resuming, datasets, URLs, videos, and what it writes."""

import http.server
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from evaluation_cases import evaluated, plain_cocoeval, twelve, updates_of
from transformers_rfdetr import RfDetrImageProcessor, load, load_instance_dataset, predict, predict_tiled
from transformers_rfdetr.cli import predict as command
from transformers_rfdetr.inference import folder as bulk_prediction
from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.inference.prediction_files import LINES
from transformers_rfdetr.inference.video.predict_video import VideoSummary
from transformers_rfdetr.inference.video.reader import VideoReader
from transformers_rfdetr.inference.video.writer import VideoWriter
from transformers_rfdetr.model.masks import region_to_rle

from small_models import small_model

NUM_GOOD = 193
BAD = {
    "empty.jpg": b"",
    "text.png": b"no image at all",
    "cut.jpg": None,  # the first half of an image
    "notes.doc": b"a list of things",
    "zeros.png": bytes(100),
    "deep/page.html": b"<html></html>",
    "deep/half.png": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = small_model(id2label={0: "cat", 1: "a/b", 2: "dog", 3: "dogs"})
    model.config.category_ids = [10, 20, 30, 40]
    model.save_pretrained(folder)
    RfDetrImageProcessor.from_config(model.config).save_pretrained(folder)
    return folder


def photo(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20 + seed % 5, 30, 3), np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 200 files, of which 7 cannot be read as images."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    for seed in range(NUM_GOOD):
        photo(seed).save(folder / ("deep" if seed % 10 == 0 else ".") / f"{seed:03d}.{'jpg' if seed % 2 else 'png'}")
    for name, content in BAD.items():
        whole = (folder / ("001.jpg" if name.endswith("jpg") else "deep/000.png")).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for seed in range(7):
        photo(seed).save(folder / f"{seed}.png")
    return folder


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command.predict)
    return CliRunner().invoke(app, ["--device", "cpu", "--threshold", "0.02", *map(str, arguments)])


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def first_run(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output = tmp_path_factory.mktemp("found") / "out"
    return output, run(model, photos, "-o", output)


def test_unreadable_files_are_listed_the_others_are_predicted_and_the_exit_code_is_1(first_run: tuple[Path, Result]):
    output, done = first_run
    assert done.exit_code == 1, done.output
    assert f"in {NUM_GOOD} images" in done.output
    assert "7 images could not be read" in done.output
    for name in BAD:
        assert name in done.output
    assert sum("error" in record for record in records(output)) == len(BAD)
    assert len(list((output / "images").rglob("*.*"))) == NUM_GOOD


def test_the_written_instances_are_those_of_predict(first_run: tuple[Path, Result], model: Path, photos: Path):
    output, _ = first_run
    loaded, processor = load(str(model))
    good = [record for record in records(output) if "error" not in record]
    assert [Path(record["image"]) for record in good] == sorted(Path(record["image"]) for record in good)
    for record in good[:: len(good) // 6]:
        assert record["source"] == str(photos / record["image"])
        [expected] = predict(loaded, processor, record["source"], threshold=0.02)
        found = Instances.from_dict(record)
        assert found.names == expected.names
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
        drawn = Image.open(output / "images" / record["image"])
        assert drawn.size == Image.open(record["source"]).size


def test_pycocotools_reads_the_coco_file(first_run: tuple[Path, Result], photos: Path):
    output, _ = first_run
    coco = COCO(output / "predictions.coco.json")
    found = {record["image"]: record for record in records(output) if "error" not in record}
    assert len(coco.imgs) == NUM_GOOD
    assert {category["id"]: category["name"] for category in coco.cats.values()} == {
        10: "cat",
        20: "a/b",
        30: "dog",
        40: "dogs",
    }
    for image in coco.imgs.values():
        one = found[image["file_name"]]
        assert [image["height"], image["width"]] == one["image_size"]
        annotations = coco.imgToAnns[image["id"]]
        assert [coco.cats[item["category_id"]]["name"] for item in annotations] == [i["name"] for i in one["instances"]]
        assert all(coco.annToMask(item).sum() == item["area"] for item in annotations)
    assert len(coco.anns) > NUM_GOOD


def test_the_coco_file_and_the_coco_results_of_the_instances_have_the_metrics_of_the_evaluator(
    first_run: tuple[Path, Result],
):
    output, _ = first_run
    coco = COCO(output / "predictions.coco.json")
    # Every third prediction is an object, so that some predictions are correct.
    objects = [{**one, "iscrowd": 0} for one in coco.dataset["annotations"][::3]]
    ground_truth = {**coco.dataset, "annotations": objects}
    image_ids = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
    results = []
    for record in records(output):
        if "error" not in record:
            results += Instances.from_dict(record).to_coco(image_ids[record["image"]])
    metrics = evaluated(ground_truth, updates_of(results)).compute()
    for predictions in (coco, results):
        stats = plain_cocoeval(ground_truth, predictions, "segm").stats
        assert twelve(metrics, "segm") == pytest.approx(stats, abs=1e-9)


def test_the_same_command_again_only_retries_unreadable_files(
    first_run: tuple[Path, Result], model: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    output, _ = first_run
    before = {name: (output / name).read_bytes() for name in ("predictions.jsonl", "predictions.coco.json")}
    monkeypatch.setattr(bulk_prediction, "predict", lambda _, __, images, **___: images and pytest.fail("again"))
    again = run(model, photos, "-o", output)
    assert again.exit_code == 1
    assert f"0 instances in 0 images, {NUM_GOOD} done before" in again.output
    for name, content in before.items():
        assert (output / name).read_bytes() == content


@pytest.mark.parametrize(
    ("option", "difference"),
    [
        (["--threshold", "0.4"], "threshold 0.02 instead of 0.4"),
        (["--color-by", "instance"], "color_by 'class' instead of 'instance'"),
        (["--no-images"], "images True instead of False"),
        (["--save-crops"], "crops False instead of True"),
        (["--classes", "cat"], "classes None instead of ['cat']"),
        (["--tile", "auto"], "tile None instead of 'auto'"),
        (["--dtype", "bfloat16"], "dtype 'float32' instead of 'bfloat16'"),
    ],
)
def test_every_option_that_changes_what_is_written_is_refused_in_the_same_folder(
    option: list[str], difference: str, whole: Path, model: Path, few: Path
):
    done = run(model, few, "-o", whole, *option)
    assert done.exit_code == 2
    assert difference in done.output


def test_strict_stops_at_the_first_unreadable_file(model: Path, photos: Path, tmp_path: Path):
    done = run(model, photos / "deep", "-o", tmp_path, "--strict", "--batch-size", "4")
    assert done.exit_code == 1
    assert "half.png" in done.output
    assert "page.html" not in done.output
    assert not (tmp_path / "predictions.jsonl").exists()


def test_an_output_folder_with_other_files_is_refused(model: Path, few: Path, photos: Path):
    done = run(model, few, "-o", photos)
    assert done.exit_code == 2
    assert "contains other files" in done.output


@pytest.fixture(scope="module")
def whole(model: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(model, few, "-o", output, "--batch-size", "1").exit_code == 0
    return output


def test_a_killed_run_resumes_after_its_last_complete_line(model: Path, few: Path, whole: Path, tmp_path: Path):
    written = (whole / "predictions.jsonl").read_bytes()
    settings = (whole / "settings.json").read_bytes()
    for number, cut in enumerate((0, 1, len(written) // 2, len(written) - 1, len(written))):
        output = tmp_path / str(number)
        output.mkdir(parents=True)
        (output / "settings.json").write_bytes(settings)
        (output / LINES).write_bytes(written[:cut])
        done = run(model, few, "-o", output, "--batch-size", "1")
        assert done.exit_code == 0, done.output
        num_done = written[:cut].count(b"\n")
        assert f"in {7 - num_done} images" in done.output
        assert (output / "predictions.jsonl").read_bytes() == written
        assert (output / "predictions.coco.json").read_bytes() == (whole / "predictions.coco.json").read_bytes()
        assert not (output / LINES).exists()


def test_class_names_in_the_file_names_of_crops_are_escaped(model: Path, few: Path, whole: Path, tmp_path: Path):
    assert run(model, few / "3.png", "-o", tmp_path, "--save-crops", "--no-images").exit_code == 0
    [record] = records(tmp_path)
    crops = sorted((tmp_path / "crops").iterdir())
    assert [crop.name for crop in crops] == [
        f"3.png-{index:03d}-{one['name'].replace('/', '_')}.png" for index, one in enumerate(record["instances"])
    ]
    assert Image.open(crops[0]).mode == "RGBA"
    assert not (tmp_path / "images").exists()


def test_instances_with_an_empty_mask_are_only_in_the_json_lines(
    model: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def find(model: object, processor: object, images: list, **_: object) -> list[Instances]:
        size = images[0].size[::-1]
        boxes, scores, labels = np.array([[2, 3, 8, 9], [4, 5, 20, 15]], np.float32), np.ones(2), np.zeros(2, int)
        masks = [region_to_rle(np.full((10, 16), has_pixels), 5, 4, size) for has_pixels in (False, True)]
        return [Instances(boxes, scores, labels, ["cat", "cat"], masks, size)]

    monkeypatch.setattr(bulk_prediction, "predict", find)
    assert run(model, few / "3.png", "-o", tmp_path, "--save-crops").exit_code == 0
    [record] = records(tmp_path)
    assert Instances.from_dict(record).areas.tolist() == [0, 160]
    assert [crop.name for crop in (tmp_path / "crops").iterdir()] == ["3.png-001-cat.png"]
    [annotation] = COCO(tmp_path / "predictions.coco.json").dataset["annotations"]
    assert (annotation["area"], annotation["bbox"]) == (160, [4, 5, 16, 10])


def test_images_with_the_same_name_get_different_names_in_the_output(model: Path, few: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    photo(50).save(tmp_path / "other" / "3.png")
    output = tmp_path / "out"
    done = run(model, few / "[23].png", tmp_path / "other" / "3.png", few / "3.png", "-o", output)
    assert done.exit_code == 0
    assert sorted(path.name for path in (output / "images").iterdir()) == ["2.png", "3-2.png", "3.png"]
    both = run(model, few, tmp_path / "other", "-o", tmp_path / "both")
    assert both.exit_code == 0
    assert (tmp_path / "both" / "images" / "other" / "3.png").is_file()
    assert len(list((tmp_path / "both" / "images" / few.name).iterdir())) == 7


def test_two_images_are_not_drawn_to_the_same_file(model: Path, tmp_path: Path):
    """A GIF is drawn to a PNG, whose name is that of another image."""
    (tmp_path / "photos").mkdir()
    for side, name in ((40, "a.gif"), (20, "a.gif.png"), (30, "a.jpg")):
        photo(0).resize((side, side)).save(tmp_path / "photos" / name)
    assert run(model, tmp_path / "photos", "-o", tmp_path / "out").exit_code == 0
    drawn = {path.name: Image.open(path).width for path in (tmp_path / "out" / "images").iterdir()}
    assert drawn == {"a.gif.png": 40, "a.gif-2.png": 20, "a.jpg": 30}


def test_another_source_or_other_weights_are_refused_in_the_same_folder(
    model: Path, few: Path, whole: Path, tmp_path: Path
):
    assert "sources" in run(model, few / "1.png", "-o", whole, "--batch-size", "1").output
    other = tmp_path / "model"
    shutil.copytree(model, other)
    assert run(other, few, "-o", tmp_path / "out").exit_code == 0
    weights = small_model(id2label={0: "cat", 1: "a/b", 2: "dog", 3: "dogs"})
    with torch.no_grad():
        weights.class_embed.bias.add_(1.0)
    weights.save_pretrained(other)  # trained on, under the same name
    again = run(other, few, "-o", tmp_path / "out")
    assert again.exit_code == 2
    assert "other settings: weights" in again.output
    assert "(--output)" in again.output


def test_a_run_that_finds_nothing_says_that_the_threshold_is_too_high(model: Path, few: Path, tmp_path: Path):
    done = run(model, few, "-o", tmp_path / "out", "--threshold", 1)
    assert "0 instances in" in done.output
    assert "Lower --threshold" in done.output
    again = run(model, few, "-o", tmp_path / "out", "--threshold", 1)
    assert "Lower --threshold" not in again.output  # it has predicted nothing


def test_an_output_folder_inside_the_folder_of_images_is_not_predicted(model: Path, few: Path, tmp_path: Path):
    shutil.copytree(few, tmp_path / "photos")
    for done_before in (0, 7):
        done = run(model, tmp_path / "photos", "-o", tmp_path / "photos" / "predictions")
        assert done.exit_code == 0, done.output
        assert f"in {7 - done_before} images" in done.output


def test_file_names_that_are_not_utf8_or_too_long_do_not_stop_a_run(model: Path, few: Path, tmp_path: Path):
    folder = tmp_path / "odd"
    shutil.copytree(few, folder)
    names = [os.fsdecode(b"b\xff.png"), f"{'x' * 250}.png", "new\nline #1?.png"]
    for name in names:
        shutil.copyfile(few / "1.png", folder / name)
    (folder / os.fsdecode(b"bad\xfe.png")).write_bytes(b"")
    done = run(model, folder, "-o", tmp_path / "out", "--save-crops")
    assert done.exit_code == 1, done.output
    assert "bad\\udcfe.png" in done.output
    assert "the name is too long" in done.output
    found = {record["image"] for record in records(tmp_path / "out") if "error" not in record}
    assert {names[0], names[2]} < found
    assert run(model, folder, "-o", tmp_path / "out", "--save-crops").exit_code == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
def test_a_full_disk_is_reported_with_the_file_and_the_same_command_resumes(
    model: Path, few: Path, whole: Path, tmp_path: Path
):
    part = tmp_path / "out" / LINES
    part.parent.mkdir(parents=True)
    shutil.copyfile(whole / "settings.json", tmp_path / "out" / "settings.json")
    part.symlink_to("/dev/full")
    done = run(model, few, "-o", tmp_path / "out", "--batch-size", "1")
    assert done.exit_code == 2, done.output
    assert (
        f"{part} cannot be written: No space left on device. Free some space, and run the same command" in done.output
    )
    part.unlink()
    assert run(model, few, "-o", tmp_path / "out", "--batch-size", "1").exit_code == 0
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_a_class_with_a_comma_in_its_name_can_be_selected(tmp_path: Path, few: Path):
    model = small_model(id2label={0: "cat", 1: "dog, big", 2: "dog", 3: "bird"})
    model.save_pretrained(tmp_path / "model")
    done = run(tmp_path / "model", few, "-o", tmp_path / "out", "--classes", "dog, big")
    assert done.exit_code == 0, done.output
    assert {one["name"] for record in records(tmp_path / "out") for one in record["instances"]} <= {"dog, big"}


def test_category_ids_of_other_classes_are_not_used(tmp_path: Path, few: Path):
    model = small_model(id2label={0: "cat", 1: "dog", 2: "cow", 3: "bird"})
    model.config.category_ids = [10, 20]
    model.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", few, "-o", tmp_path / "out").exit_code == 0
    coco = json.loads((tmp_path / "out" / "predictions.coco.json").read_text())
    assert [category["id"] for category in coco["categories"]] == [0, 1, 2, 3]


def test_videos_of_the_same_name_and_an_unreadable_one_are_all_processed(
    model: Path, video: Path, few: Path, tmp_path: Path
):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        shutil.copyfile(video, tmp_path / "in" / name / "x.mp4")
    (tmp_path / "in" / "a" / "a_bad.mp4").write_bytes(b"nothing")
    done = run(model, tmp_path / "in", "-o", tmp_path / "out", "--max-frames", "2")
    assert done.exit_code == 1
    assert "a_bad.mp4" in done.output
    assert all((tmp_path / "out" / "videos" / name / "x.mp4").is_file() for name in ("a", "b"))
    other = run(model, tmp_path / "in", "-o", tmp_path / "out")
    assert other.exit_code == 2
    assert "max_frames 2 instead of None" in other.output


def test_classes_are_selected_by_name(model: Path, few: Path, whole: Path, tmp_path: Path):
    assert run(model, few, "-o", tmp_path, "--classes", "dogs, cat").exit_code == 0
    names = [one["name"] for record in records(tmp_path) for one in record["instances"]]
    assert set(names) == {"dogs", "cat"}
    every = [one["name"] for record in records(whole) for one in record["instances"]]
    assert len(names) > sum(name in ("dogs", "cat") for name in every)  # others do not take their places
    done = run(model, few, "-o", tmp_path / "other", "--classes", "dgo")
    assert done.exit_code == 2
    assert "`classes` must be among the 4 classes of the model, got 'dgo'. Did you mean dog" in done.output


def test_annotation_files_in_a_folder_or_pattern_are_skipped(model: Path, few: Path, tmp_path: Path):
    shutil.copytree(few, tmp_path / "split")
    for name in ("_annotations.coco.json", "1.txt", "1.xml", "data.yaml", "README.roboflow.txt", ".DS_Store"):
        (tmp_path / "split" / name).write_text("{}")
    for number, source in enumerate((tmp_path / "split", tmp_path / "split" / "*")):
        done = run(model, source, "-o", tmp_path / str(number))
        assert done.exit_code == 0, done.output
        assert "in 7 images" in done.output
        assert "not read" not in done.output
    assert run(model, tmp_path / "split" / "1.txt", "-o", tmp_path / "text").exit_code == 1


def test_the_coco_file_of_a_coco_dataset_has_its_image_ids_and_category_ids(model: Path, few: Path, tmp_path: Path):
    shutil.copytree(few, tmp_path / "data" / "valid")
    content = {
        "images": [
            {"id": 100 - seed, "file_name": f"{seed}.png", "height": 20 + seed % 5, "width": 30} for seed in range(7)
        ],
        "annotations": [],
        "categories": [
            {"id": 10 + 10 * label, "name": name} for label, name in enumerate(("cat", "a/b", "dog", "dogs"))
        ],
    }
    (tmp_path / "data" / "valid" / "_annotations.coco.json").write_text(json.dumps(content))
    done = run(model, "--dataset", tmp_path / "data", "--split", "valid", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = COCO(tmp_path / "out" / "predictions.coco.json")
    assert found.getImgIds() == [100 - seed for seed in range(7)]
    loaded, processor = load(str(model))
    [expected] = predict(loaded, processor, few / "3.png", threshold=0.02)
    annotations = found.imgToAnns[97]
    labels = expected.labels[expected.areas > 0]
    assert [one["category_id"] for one in annotations] == [10 + 10 * label for label in labels]
    assert {one["image_id"] for one in annotations} == {97}
    perfect = COCO()
    perfect.dataset = content | {"annotations": json.loads(json.dumps(found.dataset["annotations"]))}
    perfect.createIndex()
    evaluation = COCOeval(perfect, found, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)
    wrong = run(model, "--dataset", tmp_path / "data", "--split", "test", "-o", tmp_path / "other")
    assert wrong.exit_code == 2
    assert "--split must be validation" in wrong.output


@pytest.mark.parametrize("format", ["coco", "yolo", "labelme", "cvat", "label-studio"])
def test_predictions_to_correct_are_read_back_with_the_same_names_and_masks(
    format: str, model: Path, few: Path, whole: Path, tmp_path: Path
):
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("images", "settings.json"))
    settings = json.loads((whole / "settings.json").read_text()) | {"images": False}
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    done = run(model, few, "-o", tmp_path / "out", "--save-as", format)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out" / "images").exists()
    data = load_instance_dataset(tmp_path / "out" / format)["train"]
    found = {Path(sample["file_name"]).stem: sample for sample in data}
    assert len(found) == len(records(whole)) == 7
    for record in records(whole):
        instances = Instances.from_dict(record)
        expected = instances.select(instances.areas > 0)
        sample = found[Path(record["image"]).stem]
        assert np.array_equal(np.asarray(sample["image"]), np.asarray(Image.open(few / record["image"])))
        assert [data.id2label[one["category_id"]] for one in sample["annotations"]] == expected.names
        for one, mask in zip(sample["annotations"], expected.masks, strict=True):
            segmentation, size = one["segmentation"], expected.image_size
            drawn = coco_mask.frPyObjects(segmentation, *size) if isinstance(segmentation, list) else [segmentation]
            assert coco_mask.iou([coco_mask.merge(drawn)], [mask], [0])[0, 0] == 1
    again = run(model, few, "-o", tmp_path / "out", "--save-as", format)
    assert "which was there already and is kept" in again.output


def test_predictions_of_a_dataset_to_correct_have_its_split_names_ids_and_linked_images(
    model: Path, few: Path, tmp_path: Path
):
    shutil.copytree(few, tmp_path / "data" / "valid")
    images = [{"id": 50 + n, "file_name": f"{n}.png", "height": 20 + n % 5, "width": 30} for n in range(7)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "data" / "valid" / "_annotations.coco.json").write_text(json.dumps(content))
    arguments = ["--dataset", tmp_path / "data", "--split", "valid", "-o", tmp_path / "out", "--save-as", "coco"]
    done = run(model, *arguments)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out" / "coco" / "valid" / "_annotations.coco.json").read_text())
    assert [(image["id"], image["file_name"]) for image in written["images"]] == [
        (50 + n, f"{n}.png") for n in range(7)
    ]
    assert (tmp_path / "out" / "coco" / "valid" / "3.png").samefile(tmp_path / "data" / "valid" / "3.png")
    scores = COCO(tmp_path / "out" / "predictions.coco.json").dataset["annotations"]
    assert [one["score"] for one in written["annotations"]] == [one["score"] for one in scores]
    assert len(scores) > 7


def test_a_dataset_is_predicted_by_its_column_of_images_and_keeps_its_image_ids(
    model: Path, few: Path, whole: Path, tmp_path: Path
):
    datasets = pytest.importorskip("datasets")
    rows = {"photo": [str(few / f"{seed}.png") for seed in range(7)], "image_id": list(range(50, 57))}
    features = datasets.Features({"photo": datasets.Image(), "image_id": datasets.Value("int64")})
    (tmp_path / "rows" / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows" / "data" / "test-00000.parquet")
    done = run(model, "--dataset", tmp_path / "rows", "-o", tmp_path / "out", "--batch-size", "1")
    assert done.exit_code == 0, done.output
    assert [one["instances"] for one in records(tmp_path / "out")] == [one["instances"] for one in records(whole)]
    assert len(list((tmp_path / "out" / "images").glob("*.jpg"))) == 7
    assert COCO(tmp_path / "out" / "predictions.coco.json").getImgIds() == list(range(50, 57))


@pytest.fixture
def server(few: Path) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = few / self.path.partition("?")[0].strip("/")
            if not path.is_file():
                path = few / f"{path.name}.png"
            self.send_response(200 if path.is_file() else 404)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            if path.is_file():
                self.wfile.write(path.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_images_are_read_from_urls_with_and_without_a_suffix(model: Path, whole: Path, server: str, tmp_path: Path):
    addresses = [f"{server}/0.png?size=large", f"{server}/1", f"{server}/missing.png"]
    done = run(model, *addresses, "-o", tmp_path, "--batch-size", "1")
    assert done.exit_code == 1, done.output
    assert "missing.png cannot be opened as an image: HTTP Error 404" in done.output
    good = [one["instances"] for one in records(tmp_path) if "error" not in one]
    assert good == [one["instances"] for one in records(whole)[:2]]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames of 48 x 32 pixels."""
    path = tmp_path_factory.mktemp("video") / "street.mp4"
    with VideoWriter(path, 5, (48, 32)) as writer:
        for index in range(10):
            writer.write(Image.fromarray(np.full((32, 48, 3), 20 * index, np.uint8)), index / 5)
    return path


def test_a_video_is_written_as_a_video_and_as_json_lines_once(model: Path, few: Path, video: Path, tmp_path: Path):
    done = run(model, video, few / "1.png", "-o", tmp_path, "--track")
    assert done.exit_code == 0, done.output
    assert "10 frames at" in done.output
    assert done.output.rstrip().endswith(f"street.mp4, {tmp_path / 'videos' / 'street.jsonl'}")
    with VideoReader(tmp_path / "videos" / "street.mp4") as written:
        frames = list(written)
    assert [frame.image.size for frame in frames] == [(48, 32)] * 10
    lines = [json.loads(line) for line in (tmp_path / "videos" / "street.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [index / 5 for index in range(10)]
    assert all("track_id" in one for line in lines for one in line["instances"])
    assert len(records(tmp_path)) == 1
    again = run(model, video, few / "1.png", "-o", tmp_path, "--track")
    assert again.exit_code == 0
    assert "done before" in again.output


def test_a_stopped_video_is_started_again(model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown: list[int] = []

    def window(_: Image.Image, milliseconds: int) -> None:
        shown.append(1)
        if len(shown) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "_open_window", lambda: window)
    stopped = run(model, video, "-o", tmp_path, "--show")
    assert stopped.exit_code == 130
    assert "4 frames" in stopped.output
    with VideoReader(tmp_path / "videos" / "street.mp4") as written:
        assert len(list(written)) == 4
    assert run(model, video, "-o", tmp_path, "--show").exit_code == 0
    assert len((tmp_path / "videos" / "street.jsonl").read_text().splitlines()) == 10


def test_sigterm_stops_a_video_like_ctrl_c(model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Schedulers and containers send it, and a live stream cannot be read again."""
    shown = itertools.count(1)

    def window(_: Image.Image, milliseconds: int) -> None:
        if next(shown) == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(command, "_open_window", lambda: window)
    before = signal.getsignal(signal.SIGTERM)
    assert run(model, video, "-o", tmp_path, "--show").exit_code == 130
    assert signal.getsignal(signal.SIGTERM) == before
    with VideoReader(tmp_path / "videos" / "street.mp4") as written:
        assert len(list(written)) == 4


def test_a_video_in_a_folder_of_images_is_a_video(model: Path, video: Path, tmp_path: Path):
    photo(1).save(video.parent / "beside.png")
    done = run(model, video.parent, "-o", tmp_path, "--no-images")
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["street.jsonl"]
    assert len(records(tmp_path)) == 1


def test_videos_of_cameras_and_discs_are_recognised_by_their_suffix(model: Path, video: Path, tmp_path: Path):
    suffixes = (".ts", ".MTS", ".m2ts", ".3gp", ".asf", ".vob")
    (tmp_path / "in").mkdir()
    for suffix in suffixes:
        shutil.copyfile(video, tmp_path / "in" / f"street{suffix}")
    done = run(model, tmp_path / "in", "-o", tmp_path / "out", "--no-images", "--max-frames", "1")
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out" / "videos").iterdir()}
    assert written == {f"street{suffix}.jsonl" for suffix in suffixes}


def test_large_images_are_predicted_in_tiles(model: Path, tmp_path: Path):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 110, 3), np.uint8))
    large.save(tmp_path / "large.png")
    done = run(model, tmp_path / "large.png", "-o", tmp_path / "out", "--tile", "auto", "--overlap", "0.25")
    assert done.exit_code == 0, done.output
    loaded, processor = load(str(model))
    expected = predict_tiled(loaded, processor, large, overlap=0.25, threshold=0.02, batch_size=8)
    [record] = records(tmp_path / "out")
    assert [one["mask"] for one in record["instances"]] == expected.masks
    assert "1.5 x as high and 2.3 x as wide" in done.output  # 70 / 48, 110 / 48


def test_passwords_in_urls_are_never_written(model: Path, server: str, tmp_path: Path):
    port = server.rpartition(":")[2]
    addresses = [f"http://me:hush@127.0.0.1:{port}/missing.png?key=hush", f"{server}/1.png?key=hush"]
    done = run(model, *addresses, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "missing.png" in done.output
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")]
    assert len(written) == 3
    assert not any(b"hush" in content for content in [*written, done.output.encode()])
    renewed = [address.replace("hush", "other") for address in addresses]
    assert "1 done before" in run(model, *renewed, "-o", tmp_path / "out").output


@pytest.mark.parametrize(("name", "is_done"), [("http://h/a/x.mp4", False), ("rtsp://h/live", True)])
def test_a_stopped_video_on_a_server_is_unfinished_and_a_stopped_stream_is_finished(
    name: str, is_done: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*arguments, jsonl, **_):
        Path(jsonl).write_text("{}\n")
        return VideoSummary(1, 1.0, 1.0, 0, 0, 0, interrupted=True, is_cut=False)

    monkeypatch.setattr("transformers_rfdetr.inference.video.predict_video.predict_video", stop)
    assert run(model, name, "-o", tmp_path).exit_code == 130
    lines = [path.name for path in (tmp_path / "videos").iterdir()]
    assert len(lines) == 1
    assert lines[0].endswith(".unfinished.jsonl") is not is_done


def test_a_video_whose_connection_was_lost_is_not_a_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cut = VideoSummary(1, 1.0, 1.0, 0, 0, 0, interrupted=False, is_cut=True)
    monkeypatch.setattr("transformers_rfdetr.inference.video.predict_video.predict_video", lambda *_, **__: cut)
    done = run(model, "http://h/a/x.mp4", "http://h/b/x.mp4", "-o", tmp_path)
    assert done.exit_code == 1
    assert "x.mp4: the connection ended after 1 frames" in done.output
    assert "x-2.mp4: the connection ended" in done.output


WRONG = {
    "no source": ([], "sources"),
    "missing": (["missing.png"], "`sources` must be files, folders, patterns"),
    "threshold": (["{few}", "--threshold", "2"], "`threshold` must be a score in [0, 1], got 2.0"),
    "dtype": (["{few}", "--dtype", "int8"], "--dtype"),
    "device": (["{few}", "--device", "cuda:9"], "`device` must be available, such as cpu, cuda or auto, got cuda:9"),
    "tile": (
        ["{few}", "--tile", "wide"],
        "--tile must be a side in pixels such as 432, or HxW such as 432x576, got wide",
    ),
    "no tile": (["{few}", "--tile", "0"], "0"),
    "batch": (["{few}", "--batch-size", "-1"], "--batch-size"),
    "empty": ([""], "URLs, got ''"),
    "track": (["{few}", "--track"], "--track requires videos"),
    "no classes": (["{few}", "--classes", ","], "--classes must not have an empty name"),
    "nowhere": (["http://127.0.0.1:1/a b"], "not read"),
    "display": (["{few}", "--show"], "--show requires a display"),
    "color": (["{few}", "--color-by", "size"], "`color_by` must be 'class' or 'instance', got 'size'"),
    "save-as": (["{video}", "--save-as", "coco"], "--save-as requires images, got sources without images"),
    "overlap": (["{few}", "--overlap", "0.3"], "--overlap requires --tile, got --overlap 0.3"),
    "url": (["http://[bad"], "http://[bad: Invalid IPv6 URL"),
    "of a video": (["{video}", "--threshold", "50"], "got 50.0"),
    "class in a video": (["{video}", "--classes", "nosuch"], "nosuch"),
    "frames": (["{video}", "--max-frames", "0"], "`max_frames` must be at least 1, got 0"),
    "no camera": (["77"], "camera 77"),
    "engine": (["{few}", "--engine", "ray", "--track"], "--track must be omitted with --engine, which writes Parquet"),
    "address": (["{few}", "--engine", "local", "--address", "auto"], "--address requires --engine ray, got"),
    "coco": (["{few}", "--coco"], "--coco requires --engine"),
    "tables of annotations": (["--dataset", "{few}/../data", "--engine", "local"], "cannot be loaded"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_give_one_line_and_exit_code_2(
    case: str, model: Path, few: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The output folder can then be used by the right command."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    arguments, message = WRONG[case]
    given = (argument.format(few=few, video=video) for argument in arguments)
    done = run(model, *given, "-o", tmp_path / "out")
    assert done.exit_code == (1 if case == "nowhere" else 2), done.output
    assert message in done.output
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert (left == []) == (case != "nowhere")
    if "video" in case:
        assert run(model, video, "-o", tmp_path / "out").exit_code == 0


def test_a_window_shows_each_image_until_q_is_pressed(
    model: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """OpenCV is replaced, because there is no display here."""
    shown = []
    keys = iter([-1, -1, ord("q")])
    stand_in = types.ModuleType("cv2")
    stand_in.imshow = lambda _, pixels: shown.append(pixels.shape)
    stand_in.waitKey = lambda _: next(keys)
    monkeypatch.setitem(sys.modules, "cv2", stand_in)
    monkeypatch.setenv("DISPLAY", ":0")
    done = run(model, few, "-o", tmp_path, "--show", "--batch-size", "2")
    assert done.exit_code == 130
    assert "the same command resumes" in done.output
    assert shown == [(20, 30, 3), (21, 30, 3), (22, 30, 3)]
    monkeypatch.delenv("DISPLAY")
    assert "in 4 images, 3 done before" in run(model, few, "-o", tmp_path).output
