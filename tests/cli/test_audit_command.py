"""`transformers-rfdetr audit`: what it writes, and folds whose models have not seen what they judge."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from transformers_rfdetr import RfDetrImageProcessor, load, load_instance_dataset
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.cli.audit_folds import evaluate_folds
from transformers_rfdetr.data.splits import fold_indices
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_dataset
from transformers_rfdetr.evaluation.label_audit import MIN_SCORE

from small_models import small_model

QUICK = ["max_steps=2", "gradient_accumulation_steps=1", "dataloader_num_workers=0", "multi_scale=false"]


def run(*arguments):
    return CliRunner().invoke(app, ["audit", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Return four scenes, of which the first has a building that is not annotated, and a tree annotated as a car."""
    folder = tmp_path_factory.mktemp("scenes")
    images, coco = draw_dataset(4, (144, 144), metres_per_pixel=(0.15, 0.28), first_seed=3_000_000)
    objects = [one for one in coco["annotations"] if one["image_id"] == 3_000_000 and not one["iscrowd"]]
    [building, *_] = sorted((one for one in objects if one["category_id"] == 1), key=lambda one: -one["area"])
    [tree, *_] = sorted((one for one in objects if one["category_id"] == 2), key=lambda one: -one["area"])
    coco["annotations"].remove(building)
    tree["category_id"] = 3
    save_dataset(folder / "train", images, coco)
    return folder


def test_the_suspects_are_listed_shown_and_marked_in_the_dataset(scenes, tmp_path):
    done = run(scenes, "--model", "rf-detr-seg-tiny", "-o", tmp_path / "out", "--save-as", "labelme")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert content["num_images"] == 4
    assert content["recall"] > 0.7
    assert f"{100 * content['recall']:.0f} % of the annotated objects are found" in done.output
    first = [one for one in content["suspects"] if one["image"] == "3000000.png"]
    assert {("missing", None, "building"), ("wrong class", "car", "tree")} <= {
        (one["kind"], one["class"], one["suggestion"]) for one in first
    }
    evidence = [one["evidence"] for one in content["suspects"]]
    assert evidence == sorted(evidence, reverse=True)
    assert (tmp_path / "out" / "audit.html").read_text().count("<figure") == len(evidence)
    before = load_instance_dataset(scenes)["train"]
    marked = load_instance_dataset(tmp_path / "out" / "labelme")["train"]
    num_missing = sum(one["kind"] == "missing" for one in content["suspects"])
    assert marked.num_objects() == before.num_objects()
    assert sum(map(len, (sample["annotations"] for sample in marked))) == num_missing + sum(
        map(len, (sample["annotations"] for sample in before))
    )
    again = run(scenes, "--model", "rf-detr-seg-tiny", "-o", tmp_path / "out", "--save-as", "labelme")
    assert again.exit_code == 2
    assert again.output.endswith("labelme must not exist. Delete or rename it.\n")


def test_each_image_is_judged_by_the_model_that_has_not_seen_it(tmp_path):
    images, coco = draw_dataset(5, (48, 48), classes=["building"])
    save_dataset(tmp_path / "data" / "train", images, coco)
    small_model(id2label={0: "building"}).save_pretrained(tmp_path / "model")
    RfDetrImageProcessor(size=48).save_pretrained(tmp_path / "model")
    settings = [part for setting in QUICK for part in ("--set", setting)]
    arguments = [tmp_path / "data", "--model", tmp_path / "model", "--folds", 2, *settings, "-o", tmp_path / "out"]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (content["folds"], content["recall"]) == (2, 0)
    assert "Only 0 % of the annotated objects are found" in done.output
    again = run(*arguments, "--min-evidence", 0, "--save-as", "coco")
    assert again.exit_code == 0, again.output
    assert done.output.count("Starting a new run") == again.output.count("Resuming from") == 2
    assert (tmp_path / "out" / "coco").is_dir()
    dataset = load_instance_dataset(tmp_path / "data")["train"]
    folder = tmp_path / "out" / "folds"
    for count, other in ((3, QUICK), (2, [*QUICK, "seed=7"])):
        with pytest.raises(ValueError, match=f"must have {count} folds of these labels and settings, got others"):
            evaluate_folds(dataset, str(tmp_path / "model"), count, folder, None, other, "cpu", 8)
    pushing = [*QUICK, "push_to_hub=me/labels"]  # folds are not uploaded
    evaluator = evaluate_folds(dataset, str(tmp_path / "model"), 2, folder, None, pushing, "cpu", 8)
    parts = fold_indices(dataset, 2)
    assert sorted(np.concatenate(parts)) == list(range(5))
    for number, part in enumerate(parts, start=1):
        names = {sample["file_name"] for sample in load_instance_dataset(folder / str(number) / "data")["train"]}
        held_out = dataset.names_of([dataset.image_ids()[index] for index in part])
        assert names.isdisjoint(held_out)
        assert len(names) + len(held_out) == 5
        model, processor = load(str(folder / str(number) / "run" / "model"))
        expected = evaluate_dataset(model, processor, dataset, score_threshold=MIN_SCORE, progress=False).state()
        for index in part:
            image_id = dataset.image_ids()[index]
            np.testing.assert_allclose(evaluator.state()[image_id].scores, expected[image_id].scores, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "max_steps=2"], "--config and --set require --folds"),
        (["--split", "test"], "--split must be a split of"),
        (["--folds", 1], "--folds"),
        (["--save-as", "coco", "--ignore-class", "tree"], "--save-as requires all classes, got --ignore-class"),
        (["--save-as", "yolo"], "'yolo' is not one of 'coco'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, scenes, tmp_path):
    done = run(scenes, "--model", "rf-detr-seg-tiny", "-o", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()
