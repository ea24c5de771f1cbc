"""The commands train, evaluate, benchmark and info, on tiny models and drawn images."""

import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from evaluation_cases import plain_cocoeval, twelve
from transformers_rfdetr import (
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    RfDetrTrainer,
    evaluate_instance_segmentation,
    load,
    load_instance_dataset,
)
from transformers_rfdetr.cli import benchmark, evaluate, info, train, training_run
from transformers_rfdetr.conversion import architecture
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
from transformers_rfdetr.inference import benchmark as measurement

from small_models import small_config, small_model

app = typer.Typer()
for command in (train.train, evaluate.evaluate, benchmark.benchmark, info.info):
    app.command()(command)

# One micro-batch in an optimizer step, and no data loader workers.
QUICK = ["gradient_accumulation_steps=1", "dataloader_num_workers=0", "multi_scale=false", "disable_tqdm=true"]
# A checkpoint after each of two optimizer steps.
TWO_STEPS = ["max_steps=2", *(f"{kind}_strategy=steps" for kind in ("save", "eval")), "save_steps=1"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments):
    """The line that a command ends with."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.stderr.splitlines() if line.startswith(f"{arguments[0]}: ")]
    assert result.stderr.endswith(f"{line}\n")
    assert "Traceback" not in result.stderr
    return line


def settings(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def draw_split(folder, count, first_seed):
    save_dataset(folder, *draw_dataset(count, first_seed=first_seed, classes=["building"]))


def save(model, folder):
    model.save_pretrained(folder)
    RfDetrImageProcessor.from_config(model.config, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw_split(folder / "train", 4, 0)
    draw_split(folder / "valid", 3, 100)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of four classes, none of which is in the data."""
    names = {0: "cat", 1: "dog", 2: "cow", 3: "__background__"}
    return save(small_model(num_labels=4, id2label=names), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def finished(data, checkpoint, tmp_path_factory):
    """A run of two optimizer steps, with a checkpoint after each."""
    output = tmp_path_factory.mktemp("runs") / "first"
    arguments = ["train", data, "--model", checkpoint, "--output", output, "--batch-size", 2, "--device", "cpu"]
    arguments += ["--lr", "1e-3", "--seed", 3, *settings(*QUICK, *TWO_STEPS)]
    return SimpleNamespace(output=output, arguments=arguments, result=run(*arguments))


@pytest.fixture
def copied(finished, tmp_path):
    """The same run in a folder of its own, and the command that makes it there."""
    output = tmp_path / "copied"
    shutil.copytree(finished.output, output)
    return output, [output if part == finished.output else part for part in finished.arguments]


# train


def test_train_saves_a_model_with_the_classes_of_the_data_and_prints_its_metrics(finished, data):
    assert finished.result.exit_code == 0, finished.result.output
    model, processor = load(str(finished.output / "model"))
    assert model.config.id2label == {0: "building"}
    assert processor.image_mean == [0.4, 0.5, 0.6]
    numbers = evaluate_instance_segmentation(model, processor, load_instance_dataset(data)["validation"])
    assert evaluate.format_numbers(numbers) in finished.result.output
    assert f"The model is in {finished.output / 'model'}\n" in finished.result.output
    before = small_model().state_dict()["transformer.decoder.layers.0.linear1.weight"]
    after = weights(finished.output / "model")["transformer.decoder.layers.0.linear1.weight"]
    assert 0 < (after - before).abs().max() < 0.1  # of the checkpoint, trained


def test_train_says_of_which_optimizer_step_the_best_weights_are(data, checkpoint, tmp_path):
    """Two epochs of one step, of which the lowest loss chooses the weights."""
    options = settings(*QUICK, "max_steps=2", "metric_for_best_model=loss", "greater_is_better=false")
    done = run("train", data, "--model", checkpoint, "--output", tmp_path / "run", "--device", "cpu", *options)
    assert done.exit_code == 0, done.output
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert set(losses) == {1, 2}
    step = min(losses, key=losses.get)
    expected = f"the weights of optimizer step {step} of 2, which have the best loss, {losses[step]:.4f}"
    assert f"The model is in {tmp_path / 'run' / 'model'}: {expected}\n" in done.output


def test_the_progress_shows_the_losses_and_the_ap_of_an_evaluation_only(data, checkpoint, tmp_path):
    options = settings(*QUICK[:-1], "max_steps=1", "disable_tqdm=false")
    done = run("train", data, "--model", checkpoint, "--output", tmp_path / "run", "--device", "cpu", *options)
    assert done.exit_code == 0, done.output
    [line] = [line for line in done.output.splitlines() if "eval_loss" in line]
    assert set(re.findall(r"'(\w[\w/]*)': ", line)) == {
        *("eval_loss", "eval_segm_AP", "eval_segm_AP50", "eval_bbox_AP", "eval_bbox_AP50", "eval_mean_iou", "epoch")
    }
    [state] = (tmp_path / "run").glob("checkpoint-*/trainer_state.json")
    assert "eval_segm_AR_10" in state.read_text()


def test_all_settings_are_stored_beside_every_model(finished, data, checkpoint):
    stored = yaml.safe_load((finished.output / "train.yaml").read_text())
    assert stored.pop("versions").keys() == {"transformers_rfdetr", "transformers", "torch"}
    assert stored == {
        "data": str(data),
        "device": "cpu",
        "model": str(checkpoint),
        "output": str(finished.output),
        "class_names": {1: "building"},
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "eval_strategy": "steps",
        "gradient_accumulation_steps": 1,
        "learning_rate": 0.001,
        "max_steps": 2,
        "multi_scale": False,
        "per_device_train_batch_size": 2,
        "save_steps": 1.0,
        "save_strategy": "steps",
        "seed": 3,
    }
    texts = {path.read_text() for path in finished.output.rglob("train.yaml")}
    assert len(texts) == 1
    folders = {path.parent.name for path in finished.output.rglob("train.yaml")}
    assert folders >= {"model", "checkpoint-1", "checkpoint-2", "best_total"}


def test_the_settings_file_of_a_run_repeats_it_in_another_folder(finished, tmp_path):
    result = run("train", "--config", finished.output / "train.yaml", "--output", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert_equal(weights(tmp_path / "again" / "model"), weights(finished.output / "model"))


def test_a_stopped_run_resumes_from_its_last_checkpoint(finished, copied):
    output, arguments = copied
    for folder in ("checkpoint-2", "model"):
        shutil.rmtree(output / folder)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"Resuming from {output / 'checkpoint-1'}" in result.output
    assert_equal(weights(output / "model"), weights(finished.output / "model"))


def test_a_finished_run_keeps_the_thresholds_that_it_was_calibrated_with_since(finished, copied):
    output, arguments = copied
    config = RfDetrConfig.from_pretrained(output / "model")
    config.score_thresholds, config.score_thresholds_note = {0: 0.25}, "chosen by hand"
    config.save_pretrained(output / "model")
    assert run(*arguments).exit_code == 0
    config = RfDetrConfig.from_pretrained(output / "model")
    assert (config.score_thresholds, config.score_thresholds_note) == ({0: 0.25}, "chosen by hand")
    assert_equal(weights(output / "model"), weights(finished.output / "model"))
    shutil.rmtree(output / "checkpoint-2")  # now an optimizer step is trained
    assert run(*arguments).exit_code == 0
    assert RfDetrConfig.from_pretrained(output / "model").score_thresholds is None


def test_ctrl_c_tells_what_the_same_command_does_next(finished, tmp_path, monkeypatch):
    output = tmp_path / "run"
    arguments = [output if part == finished.output else part for part in finished.arguments]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for owner, method, expected in (
        (training_run, "load", "Training has not begun. Run the same command again."),
        (RfDetrTrainer, "before_optimizer_step", "There is no checkpoint yet. The same command starts again."),
        (training_run, "format_numbers", f"The same command resumes from {output / 'checkpoint-2'}"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, method, interrupt)
            result = run(*arguments)
        assert result.exit_code == 130, result.output
        assert [line for line in result.stderr.splitlines() if "nterrupted" in line] == [f"Interrupted. {expected}"]
    assert f"Resuming from {output / 'checkpoint-2'}" in run(*arguments).output
    assert_equal(weights(output / "model"), weights(finished.output / "model"))


def test_a_run_with_other_settings_is_refused_until_the_old_one_may_be_moved(finished, copied):
    output, arguments = copied
    arguments = [*arguments, "--lr", "2e-3", "--set", "ema=false"]
    line = refusal(*arguments)
    assert line.startswith(
        f"train: {output} has a run with other settings (ema 'unset' there, False here; learning_rate 0.001 there,"
        " 0.002 here)"
    )
    assert "--no-resume" in line
    assert line.endswith(f"To train its model further, pass --model {output / 'model'} and another --output.")
    assert_equal(weights(output / "model"), weights(finished.output / "model"))
    result = run(*arguments, "--no-resume")
    assert result.exit_code == 0, result.output
    aside = output.with_name("copied.1")
    assert f"Moved the earlier run from {output} to {aside}" in result.output
    assert_equal(weights(aside / "model"), weights(finished.output / "model"))
    assert (aside / "checkpoint-1").is_dir()
    heads = [weights(folder / "model")["class_embed.weight"] for folder in (output, aside)]
    assert not torch.equal(*heads)
    recipes = [yaml.safe_load(path.read_text()) for path in aside.rglob("train.yaml")]
    assert len(recipes) > 3
    assert {recipe["output"] for recipe in recipes} == {str(aside)}
    shutil.rmtree(aside / "model")
    result = run("train", "--config", aside / "train.yaml")
    assert f"Resuming from {aside / 'checkpoint-2'}" in result.output
    assert_equal(weights(aside / "model"), weights(finished.output / "model"))


def test_a_run_resumes_with_another_device_output_and_logging(finished):
    stored = yaml.safe_load((finished.output / "train.yaml").read_text())
    free = {"device": "auto", "dataloader_num_workers": 2, "report_to": "none", "versions": {}, "output": "there"}
    found = training_run.find_checkpoint(finished.output, stored | free)
    assert found == str(finished.output / "checkpoint-2")


def test_a_folder_with_checkpoints_but_without_settings_is_not_written_to(copied):
    output, arguments = copied
    (output / "train.yaml").unlink()
    assert f"{output} must have a train.yaml beside checkpoint-1" in refusal(*arguments)


def test_a_dataset_without_masks_is_refused_before_the_output_folder_is_written(data, checkpoint, tmp_path):
    shutil.copytree(data / "train", tmp_path / "boxes" / "train")
    path = tmp_path / "boxes" / "train" / "_annotations.coco.json"
    coco = json.loads(path.read_text())
    coco["annotations"] = [one | {"segmentation": []} for one in coco["annotations"]]
    path.write_text(json.dumps(coco))
    output = tmp_path / "run"
    arguments = ["--model", checkpoint, "--output", output, "--device", "cpu"]
    assert "objects with boxes only" in refusal("train", tmp_path / "boxes", *arguments)
    assert not output.exists() or not list(output.iterdir())


def test_a_fraction_of_the_training_images_can_be_the_validation_split(data, checkpoint, tmp_path):
    given = [*settings(*QUICK, *TWO_STEPS), "--output", tmp_path / "run", "--model", checkpoint, "--validation", 0.5]
    result = run("train", data / "train", *given, "--device", "cpu", "--batch-size", 1)
    assert result.exit_code == 0, result.output
    assert "mean IoU" in result.output
    stored = yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())
    assert stored["validation"] == 0.5
    [evaluated] = (tmp_path / "run").glob("checkpoint-2/trainer_state.json")
    assert any("eval_segm_AP" in entry for entry in json.loads(evaluated.read_text())["log_history"])


def test_an_augmentation_is_chosen_by_its_name_and_stored(data, checkpoint, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(RfDetrTrainer, "train", lambda trainer, **options: chosen.append(trainer.augmentation))
    given = ["--model", checkpoint, "--output", tmp_path, "--device", "cpu", *settings("eval_strategy=no")]
    assert run("train", data, *given, "--augmentation", "strong").exit_code == 0
    assert chosen == ["strong"]
    assert yaml.safe_load((tmp_path / "train.yaml").read_text())["augmentation"] == "strong"
    line = refusal("train", data, *given, "--augmentation", "default")
    assert "other settings (augmentation 'strong' there, 'unset' here)" in line


def test_lora_class_balance_and_ignored_classes_are_options_that_the_settings_file_repeats(checkpoint, tmp_path):
    save_dataset(tmp_path / "train", *draw_dataset(5, classes=["building", "tree", "tank"]))
    given = ["--lora", 2, "--class-balance", 0.9, "--ignore-class", "tree", "--model", checkpoint, "--device", "cpu"]
    given += [*settings(*QUICK, "max_steps=1"), "--batch-size", 2, "--output", tmp_path / "first"]
    result = run("train", tmp_path / "train", *given)
    assert result.exit_code == 0, result.output
    assert "class balance 0.9: an epoch has" in result.output
    assert (tmp_path / "first" / "model" / "adapter" / "adapter_model.safetensors").is_file()
    again = run("train", "--config", tmp_path / "first" / "train.yaml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert_equal(weights(tmp_path / "again" / "model"), weights(tmp_path / "first" / "model"))
    assert load(str(tmp_path / "again" / "model"))[0].config.id2label == {0: "building", 1: "tank"}


def test_a_second_validation_split_is_refused(data, checkpoint, tmp_path):
    line = refusal("train", data, "--model", checkpoint, "--output", tmp_path, "--device", "cpu", "--validation", 0.2)
    assert "--validation requires data without a validation split, got 3 validation images" in line


def test_push_to_hub_uploads_once_at_the_end(tmp_path):
    arguments = training_run._training_arguments({"output": str(tmp_path), "device": "cpu", "push_to_hub": "me/barns"})
    assert (arguments.push_to_hub, arguments.hub_model_id, arguments.hub_strategy) == (True, "me/barns", "end")
    assert arguments.use_cpu


def test_too_little_memory_is_reported_with_the_batch_size(data, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(RfDetrTrainer, "train", fail)
    line = refusal("train", data, "--model", checkpoint, "--output", tmp_path, "--device", "cpu", "--batch-size", 3)
    assert "--batch-size 3 " in line


def read(path, *given):
    return training_run.read_recipe(path, given)


def test_options_override_the_file_and_defaults_are_omitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: rf-detr-seg-nano\ndata: images\noutput: run\nepochs: 5\nlr: 2e-4\nlearning-rate-encoder: 1e-5\n"
        "eval_strategy: no\nema: true\nseed: 42\nresolution: 96x48\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "versions: {torch: 2.6.0}\n"
    )
    assert read(path, ("num_train_epochs", 7), ("class_names", ["barn"])) == {
        "class_names": ["barn"],
        "data": str(tmp_path / "images"),
        "model": "rf-detr-seg-nano",
        "output": str(tmp_path / "run"),
        "resolution": [96, 48],
        "eval_strategy": "no",
        "learning_rate": 2e-4,
        "learning_rate_encoder": 1e-5,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "num_train_epochs": 7.0,
    }


GIVEN = ["train", "data", "--model", "m", "--output", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "m"], "`data` is required. Pass DATA, or set `data:` in the file of --config"),
        (["train", "data", "--output", "o"], "`model` is required. Pass --model rf-detr-seg-medium"),
        ([*GIVEN, "--set", "lerning_rate=1"], "'lerning_rate'. Did you mean 'learning_rate'?"),
        ([*GIVEN, "--set", "epoch=1"], "Did you mean 'epochs'?"),
        ([*GIVEN, "--set", "hub_token=hf_x"], "unknown setting 'hub_token'"),
        ([*GIVEN, "--epochs", "1", "--set", "num_train_epochs=2"], "`num_train_epochs` is given twice"),
        ([*GIVEN, "--set", "seed=1.5"], "seed must be an integer, got 1.5"),
        ([*GIVEN, "--set", "ema=yes"], "ema must be true or false, got 'yes'"),
        ([*GIVEN, "--set", "drop_path=true"], "drop_path must be a number or null, got True"),
        ([*GIVEN, "--set", "ema"], "--set must be NAME=VALUE, such as layer_decay=0.9, got ema"),
        ([*GIVEN, "--set", "ema=[1"], "--set ema=[1 must be YAML: while parsing"),
        ([*GIVEN, "--set", "layer_decay=2"], "`layer_decay` must be in (0, 1]"),
        (
            [*GIVEN, "--resolution", "100x"],
            "--resolution must be a side in pixels such as 432, or HxW such as 432x576, got 100x",
        ),
        (
            [*GIVEN, "--augmentation", "areal"],
            "`augmentation` must be one of default, aerial, microscopy, strong, none, got 'areal'",
        ),
        ([*GIVEN, "--device", "cuda:1"], "`device` must be one of auto, cpu"),
        ([*GIVEN, "--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (
            [*GIVEN, "--class-names", "none.txt"],
            "--class-names must be a file with one name per line, or 'cat,dog,...', got none.txt",
        ),
        (["train", "no/such/data", *GIVEN[2:], "--device", "cpu"], "got 'no/such/data'"),
        (["evaluate", "m", "data", "--threshold", "1"], "--threshold must be in [0, 1), got 1.0"),
        (["evaluate", "m", "data", "--output", "."], "evaluate: . is a folder"),
        (["benchmark", "m", "--json", "."], ". is a folder"),
        (["train", "data", *GIVEN[2:], "--config", "no.yaml"], "no.yaml cannot be read"),
        ([*GIVEN, "--epochs", "nan"], "--epochs must be above 0, got nan"),
        ([*GIVEN, "--set", "gradient_accumulation_steps=0"], "`gradient_accumulation_steps` must be at least 1"),
    ],
)
def test_a_command_prints_an_error_in_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(*arguments)
    assert line.startswith(f"{arguments[0]}: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "m", "data", "--batch-size", "0"],
        ["benchmark", "m", "--runs", "0"],
        ["benchmark", "m", "--dtype", "int8"],
    ],
)
def test_an_option_outside_its_range_is_named(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert arguments[-2] in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "recipe.yaml must be YAML: while parsing"), ("- a\n", "mapping"), ("\xff", "cannot be read")],
)
def test_a_file_that_holds_no_settings_is_refused(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text, encoding="latin-1")
    assert message in refusal("train", "--config", tmp_path / "recipe.yaml")


# evaluate


def test_evaluation_prints_and_writes_the_numbers_of_the_metric(finished, data, tmp_path):
    folder, output = finished.output / "model", tmp_path / "new" / "metrics.json"
    command = ["evaluate", folder, data, "--per-class", "--batch-size", 2, "--device", "cpu"]
    rows = tmp_path / "new" / "predictions.json"
    result = run(*command, "--output", output, "--report", tmp_path / "report", "--predictions", rows)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert ">Worst images<" in page
    assert ">Training<" in page  # of the run that the model lies in
    dataset = load_instance_dataset(data)["validation"]
    expected = evaluate_instance_segmentation(*load(str(folder)), dataset)
    facts = {"model": str(folder), "data": str(data), "split": "validation", "num_images": 3, "threshold": None}
    assert json.loads(output.read_text()) == facts | expected
    assert evaluate.format_numbers(expected) in result.output
    oracle = plain_cocoeval(dataset.coco(), json.loads(rows.read_text()), "segm")
    assert twelve(expected, "segm") == pytest.approx(oracle.stats, abs=1e-9)
    objects = expected["per_class"]["building"]["num_objects"]
    assert ["building", str(objects)] in [line.split()[:2] for line in result.stdout.splitlines()]
    refused = refusal("evaluate", folder, data, "--split", "test")
    assert "--split must be a split of" in refused
    assert f"convert-dataset {data} NEW" in refused


def test_a_report_names_the_scores_that_count_and_the_highest_one_where_none_does(finished, data, tmp_path):
    command = ["evaluate", finished.output / "model", data, "--device", "cpu", "--report", tmp_path]
    command += ["--max-detections", 300]
    result = run(*command, "--threshold", "0.001", "--min-score", "0.999")
    assert result.exit_code == 0, result.output
    assert "AP_300" in result.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "detections with a score above 0.001" in page
    assert "whatever their score" not in page
    [highest] = re.findall(r"no detection has a score above 0.999; the highest score is (0\.\d{3})", result.stdout)
    assert f"No detection has a score above 0.999; the highest score is {highest}." in page


def test_images_may_lie_elsewhere_than_their_json(finished, data, tmp_path):
    annotations = data / "valid" / "_annotations.coco.json"
    shutil.copyfile(annotations, tmp_path / "only.json")
    command = ["evaluate", finished.output / "model", tmp_path / "only.json", "--split", "train", "--device", "cpu"]
    assert "image_folder" in refusal(*command)
    assert run(*command, "--image-folder", annotations.parent).exit_code == 0
    recipe = training_run.read_recipe(
        None, [("model", "m"), ("data", "d"), ("output", "o"), ("image_folder", str(tmp_path))]
    )
    assert recipe["image_folder"] == str(tmp_path)


def test_a_table_has_a_line_for_masks_and_one_for_boxes_and_a_dash_for_missing_values():
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100"]
    numbers = {f"bbox_{name}": index / 10 for index, name in enumerate(names)} | {"bbox_AP_large": -1.0}
    assert evaluate.format_numbers(numbers).splitlines() == [
        "        AP   AP50   AP75  AP_small  AP_medium  AP_large   AR_1  AR_10  AR_100",
        "box  0.000  0.100  0.200     0.300      0.400         -  0.600  0.700   0.800",
    ]
    numbers |= {f"segm_{name}": 0.25 for name in names} | {"mean_iou": 0.5}
    assert [line.split()[0] for line in evaluate.format_numbers(numbers).splitlines()] == ["AP", "mask", "box", "mean"]
    assert evaluate.format_numbers(numbers).endswith("mean IoU (score > 0.5): 0.500")
    per_class = {"a barn": {"num_objects": 12, "bbox_AP": 0.5}, "b": {"num_objects": 0, "bbox_AP": -1.0}}
    assert evaluate.format_classes(per_class).splitlines() == [
        "class   objects  box AP",
        "a barn       12   0.500",
        "b             0       -",
    ]
    long_name = 300 * "[b]"
    table = evaluate.format_classes({long_name: {"num_objects": 12, "bbox_AP": 0.5}})
    assert table.splitlines()[1].split() == [long_name, "12", "0.500"]


# benchmark


def test_a_benchmark_writes_its_numbers_with_what_was_measured(checkpoint, tmp_path):
    output = tmp_path / "new" / "numbers.json"
    result = run(
        *("benchmark", checkpoint, "--size", "96x48", "--batch-size", 2, "--runs", 2, "--device", "cpu"),
        *("--json", output),
    )
    assert result.exit_code == 0, result.output
    numbers = json.loads(output.read_text())
    assert {"size": [96, 48], "batch_size": 2, "dtype": "float32", "runs": 2, "active": None}.items() <= numbers.items()
    assert numbers["parameters"] == sum(tensor.numel() for tensor in weights(checkpoint).values())
    for name in ("forward", "predict"):
        times = numbers[name]
        assert 0 < times["median_seconds"] <= times["p90_seconds"]
        assert times["images_per_second"] == pytest.approx(2 / times["median_seconds"])
    assert f"{checkpoint} at 96 x 48 px, float32, on cpu" in result.output
    assert re.search("--size.*24.*50", refusal("benchmark", checkpoint, "--size", "50"))


def test_time_rate_and_flops_equal_hand_arithmetic(monkeypatch):
    model = torch.nn.Conv2d(3, 5, 1, bias=False)
    model.device = torch.device("cpu")
    ticks = [0.0] * 3 + [tick for duration in (3.0, 1.0, 2.0, 5.0, 4.0) for tick in (10.0, 10.0 + duration)]
    clock = iter(ticks * 2)  # the first three are of the warm-up
    monkeypatch.setattr(measurement, "draw_scene", lambda *arguments: (None, []))
    monkeypatch.setattr(measurement, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(measurement, "predict", lambda *arguments, **options: None)
    processor = SimpleNamespace(size={"height": 4, "width": 6})
    numbers = measurement.measure(model, processor, batch_size=2, compiled=False, runs=5)
    assert numbers["parameters"] == 15
    assert numbers["flops"] == 2 * 3 * 5 * 4 * 6
    expected = {"median_seconds": 3.0, "p90_seconds": 4.6, "images_per_second": pytest.approx(2 / 3)}
    assert numbers["forward"] == numbers["predict"] == expected


def test_peak_memory_is_the_growth_of_the_process_during_a_call():
    there = torch.ones(8 << 20)  # 32 MiB, kept
    peak = measurement._peak_bytes(lambda: (there[:1] + torch.ones(16 << 20)).sum(), torch.device("cpu"))
    if peak is None:
        pytest.skip("the system does not tell")
    assert 120 << 20 <= peak <= 160 << 20  # two tensors of 64 MiB


# info


@pytest.mark.parametrize(("name", "millions"), [("RFDETRSegMedium", 35.694), ("rf-detr-nano", 30.467)])
def test_a_published_name_is_described_without_its_weights(name, millions):
    facts = json.loads(run("info", name, "--json").output)
    assert round(facts["parameters"] / 1e6, 3) == millions  # as counted in rfdetr
    assert facts["differences"] == {}
    assert facts["num_classes"] == len(facts["classes"]) == 80
    assert facts["classes"]["1"] == "person"
    assert facts["file_size"] is None


def test_info_prints_a_published_name_as_text():
    lines = run("info", "rf-detr-seg-medium").output.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    assert found["variant"] == "rf-detr-seg-medium"
    assert found["task"] == "instance segmentation"
    assert found["classes"].startswith("80: person, bicycle, car, ")
    assert found["resolution"] == "432 x 432"
    assert found["legal"] == "sizes    multiples of 24 (patch 12 x 2 windows): 408, 432, 456, ..."
    assert found["queries"] == "200, in 13 groups during training"
    assert found["parameters"] == "35.7 M"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"resolution": 504}, "variant        rf-detr-seg-medium, at 504 x 504 px"),
        (
            {"num_queries": 90, "resolution": [432, 480]},
            "variant        rf-detr-seg-medium, at 432 x 480 px, with 90 queries",
        ),
        ({"decoder_n_points": 4}, "the nearest, rf-detr-seg-medium, has decoder_n_points 2 (here 4)"),
    ],
)
def test_info_names_the_nearest_variant_and_the_differences(overrides, text, tmp_path):
    config = RfDetrConfig.from_variant("rf-detr-seg-medium", num_labels=2)
    for name, value in overrides.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    assert text in run("info", tmp_path).output


def test_the_variant_is_found_by_its_architecture():
    for name in ("rf-detr-large", "rf-detr-seg-large", "rf-detr-seg-2xlarge", "rf-detr-base"):
        assert architecture.nearest_variant(RfDetrConfig.from_variant(name), "-seg-" in name) == (name, {})


def test_info_describes_the_classes_weights_and_preprocessing_of_a_folder(checkpoint):
    facts = json.loads(run("info", checkpoint, "--json").output)
    assert facts["classes"] == {"0": "cat", "1": "dog", "2": "cow"}
    assert facts["dtype"] == "float32"
    assert facts["key_layout"] == "original"
    assert facts["file_size"] == (checkpoint / "model.safetensors").stat().st_size
    assert facts["parameters"] == sum(tensor.numel() for tensor in weights(checkpoint).values())
    assert facts["preprocessing"]["size"] == {"height": 48, "width": 48}
    assert facts["preprocessing"]["image_mean"] == [0.4, 0.5, 0.6]
    assert facts["legal_sizes"] == [24, 48, 72]


def test_a_detection_model_in_half_precision_is_described_as_such(tmp_path):
    RfDetrForObjectDetection(small_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    facts = json.loads(run("info", tmp_path, "--json").output)
    assert facts["task"] == "object detection"
    assert facts["dtype"] == "bfloat16"
    assert "-seg-" not in facts["variant"]


def test_a_file_of_rfdetr_is_read_without_converting_it(tmp_path, monkeypatch):
    monkeypatch.setitem(architecture.ENCODERS, "dinov2_windowed_small", (32, 2, 0))
    config = small_config(backbone_config={"num_hidden_layers": 12, "out_indices": [3, 6, 9, 12]}, resolution=96)
    model = RfDetrForInstanceSegmentation(config)
    arguments = {
        "num_windows": 2,
        "out_feature_indexes": [3, 6, 9, 12],
        "projector_scale": ["P4"],
        "sa_nheads": 2,
        "ca_nheads": 4,
        "dec_n_points": 2,
        "resolution": 96,
        "class_names": ["barn", "house", "silo"],
    }
    path = tmp_path / "checkpoint_best_total.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**arguments)}, path)
    facts = json.loads(run("info", path, "--json").output)
    assert list(facts["classes"].values()) == ["barn", "house", "silo"]
    assert facts["resolution"] == [96, 96]
    assert facts["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert facts["file_size"] == path.stat().st_size
    assert [*tmp_path.iterdir()] == [path]


def test_info_refuses_other_models_and_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "'rf_detr', got 'bert'" in refusal("info", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "must be an RF-DETR model" in refusal("info", tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    assert "must be a PyTorch checkpoint" in refusal("info", tmp_path / "notes.txt")
