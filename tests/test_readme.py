"""The README's Python blocks run, with what a machine without network and time replaces, listed here; and its table."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from transformers import AutoModelForInstanceSegmentation

from transformers_rfdetr import RfDetrImageProcessor, load_instance_dataset
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.dataset import InstanceDatasets
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import SHARED, small_model
from training_run import QUICK, drawn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(block: str, substitutions: dict[str, str], **names: Any) -> dict[str, Any]:
    for written, replacement in substitutions.items():
        assert written in block, written
        block = block.replace(written, replacement)
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_prediction_block_prints_instances(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = small_model()
    model.save_pretrained("checkpoint")
    RfDetrImageProcessor.from_config(model.config).save_pretrained("checkpoint")
    draw_scene(seed=0)[0].save("photo.jpg")
    substitutions = {
        '"Roboflow/rf-detr-seg-medium"': '"checkpoint"',
        "target_sizes=": "threshold=0.0, target_sizes=",  # random weights are sure of nothing
    }
    names = run(BLOCKS[0], substitutions)
    assert len(capsys.readouterr().out.splitlines()) == len(names["result"]["segments_info"]) == 6
    names = run(BLOCKS[1], {"threshold=0.5": "threshold=0.0", '"photo.jpg"': "image"}, **names)
    assert len(names["instances"]) == 6
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_fine_tuning_streaming_and_metrics_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_model().save_pretrained("checkpoint")
    drawn_data = InstanceDatasets({"train": drawn(4), "validation": drawn(3, 100), "test": drawn(3, 200)})
    quick = "**(QUICK | {'num_train_epochs': 1})"
    names = run(
        BLOCKS[2],
        {
            'load_instance_dataset("merve/satellite-building-segmentation")': "drawn_data",
            "Roboflow/rf-detr-seg-medium": "checkpoint",
            "num_train_epochs=10": quick,
        },
        drawn_data=drawn_data,
        QUICK=QUICK,
    )
    assert float(capsys.readouterr().out.splitlines()[-1]) >= 0
    saved = AutoModelForInstanceSegmentation.from_pretrained("buildings")
    state = names["model"].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.state_dict().items())
    assert saved.config.id2label == {0: "building"}

    rows = [{"image": sample["image"], "objects": {"bbox": [], "category": []}} for sample in drawn_data["train"]]
    stream = pytest.importorskip("datasets").Dataset.from_list(rows).to_iterable_dataset()
    substitutions = {
        'load_instance_dataset("merve/satellite-building-segmentation", ': 'load_instance_dataset({"train": stream}, ',
        "max_steps=10_000, save_strategy": f"max_steps=2, {quick}, save_strategy",
        "save_steps=1_000": "save_steps=1",
    }
    names = run(BLOCKS[3], substitutions, **(names | {"stream": stream}))
    assert names["trainer"].state.global_step == 2
    assert [entry["step"] for entry in names["trainer"].state.log_history if "eval_loss" in entry] == [1, 2]

    names = run(BLOCKS[4], {}, **names)
    assert names["numbers"]["segm_AP"] >= 0
    assert float(capsys.readouterr().out.splitlines()[-1]) == 0

    # To a stand-in for the Hub: test_hub pushes to a server.
    uploads = []
    monkeypatch.setattr("transformers_rfdetr.training.run_upload.create_repository", lambda name, **_: name)
    monkeypatch.setattr(
        "transformers_rfdetr.training.run_upload.upload", lambda _, files, *__, **___: uploads.append(files)
    )
    run(BLOCKS[5], {}, **names)
    [files] = uploads
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= {
        file.name for file in files
    }
    assert "user/buildings" in (Path("runs/stream") / "README.md").read_text(encoding="utf-8")
    assert len(BLOCKS) == 6


def rows_of_the_recipe() -> dict[str, tuple[str, str]]:
    """rfdetr's argument -> (what is ours, its default), from the table."""
    [table] = re.findall(r"\| rfdetr's `train\(\)` .*?\n\|[-|]+\n(.*?)\n\n", README, flags=re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {row[0].strip("| `"): (row[1], row[2].strip("| ") if len(row) > 2 else "") for row in rows}


def test_the_table_names_every_argument_of_rfdetrs_guide():
    guide = SHARED.parent / "guides" / "rfdetr_training.md"
    if not guide.is_file():
        pytest.skip(f"needs {guide}, which does not come with the repository")
    wanted = set(re.findall(r"<td><code>(\w+)</code></td>", guide.read_text(encoding="utf-8")))
    assert len(wanted) >= 20
    assert rows_of_the_recipe().keys() == wanted


def test_what_the_table_calls_ours_exists_and_has_the_default_that_it_says():
    fields = {field.name: field for field in dataclasses.fields(RfDetrTrainingArguments)}
    calls = {
        "load_instance_dataset": load_instance_dataset,
        "train": RfDetrTrainer.train,
    }
    checked = 0
    for ours, default in rows_of_the_recipe().values():
        names = re.findall(r"`([^`]+)`", ours)
        assert names
        defaults = default.split(", ") if re.fullmatch(r"[\w.,\- ]+", default) else []
        numbers = [name for name in names if re.fullmatch(r"[a-z_]+", name)]
        for name in names:
            if call := re.fullmatch(r"(\w+)\((\w+)=\.\.\.\)", name):
                function = calls.get(call[1])
                assert function is None or call[2] in inspect.signature(function).parameters
            elif name.startswith("activation_") or name.isupper() or "WANDB" in name:
                continue
            else:
                assert name.partition("=")[0] in fields, name
        for name, value in zip(numbers, defaults, strict=False):
            if value in ("True", "False") or re.fullmatch(r"[\d.e-]+", value):
                assert (fields[name].default or 0) == (value == "True" if value[0] in "TF" else float(value)), name
                checked += 1
    assert checked >= 16
    [besides] = re.findall(r"^Besides: (.*?)\n\n", README, flags=re.DOTALL | re.MULTILINE)
    named = {name for name in re.findall(r"`([^`]+)`", besides) if re.fullmatch(r"[a-z_]+", name)}
    assert len(named) == 9
    assert named <= fields.keys()


COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("transformers-rfdetr")])
def test_the_command_line_knows_every_option_that_is_written(line: str):
    _, name, *arguments = shlex.split(line)
    typer.main.get_command(app).commands[name].make_context(name, arguments)


def test_the_other_commands_are_of_files_and_targets_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    others = [line.split() for line in COMMANDS if line and not line.startswith("transformers-rfdetr")]
    assert len(others) > 5
    for words in others:
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        else:
            assert words[0] in ("pip", "torchrun", "accelerate")


def test_the_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for name in pictures:
        with Image.open(ROOT / name) as picture:
            assert picture.width <= 700
