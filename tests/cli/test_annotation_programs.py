"""Every command that takes a dataset takes the files of an annotation program."""

from pathlib import Path

from typer.testing import CliRunner

from annotation_programs import SIZE, save_image
from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.cli.app import app

from small_models import small_model

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


def test_the_files_of_an_annotation_program_are_checked_trained_on_evaluated_and_predicted(tmp_path):
    data, start, output = save(tmp_path / "data"), tmp_path / "start", tmp_path / "run"
    small_model().save_pretrained(start)
    RfDetrImageProcessor(size=48).save_pretrained(start)
    run("check-dataset", data)
    quick = ["max_steps=1", "gradient_accumulation_steps=1", "multi_scale=false", "dataloader_num_workers=0"]
    options = [part for setting in quick for part in ("--set", setting)]
    run("train", data, "--model", start, "--output", output, "--device", "cpu", "--batch-size", 1, *options)
    run("evaluate", output / "model", data, "--device", "cpu")
    run(
        "predict",
        output / "model",
        "--dataset",
        data,
        "--split",
        "val",
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert (tmp_path / "out" / "predictions.coco.json").is_file()
