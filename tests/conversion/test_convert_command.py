"""`transformers-rfdetr convert` and `convert-back`, and the scripts of the same content."""

import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_rfdetr.cli.app import app

from rfdetr_files import assert_equal, legacy, weights_in

SCRIPTS = Path(__file__).resolve().parents[2] / "conversion_scripts"


def test_the_commands_convert_in_both_directions(model, save, tmp_path):
    path = save(legacy(model, class_names=None))
    (tmp_path / "class_names.txt").write_text("barn\nhouse\nshed\nsilo\n")
    there, back = tmp_path / "there", tmp_path / "back.pth"
    result = CliRunner().invoke(
        app, ["convert", str(path), str(there), "--class-names", str(tmp_path / "class_names.txt")]
    )
    assert result.exit_code == 0
    assert "4 classes (barn, house, shed, silo)" in result.output
    assert "Nothing was changed." in result.output
    assert f'AutoModelForInstanceSegmentation.from_pretrained("{there}")' in result.output
    result = CliRunner().invoke(app, ["convert-back", str(there), str(back)])
    assert result.exit_code == 0
    assert_equal(weights_in(there), model.state_dict())
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "given"), "--class-names", "a, b,c,d"])
    assert "4 classes (a, b, c, d)" in result.output
    for names, message in (("none.txt", "none.txt"), ("a,,c,d", "got one at label 1"), ("", "empty")):
        result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "wrong"), "--class-names", names])
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_command_prints_an_error_in_one_line(tmp_path):
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "none.pth"), str(tmp_path / "there")])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "convert: the checkpoint must be a file of rfdetr, such as checkpoint_best_total.pth, or a published name, such"
        f" as rf-detr-seg-nano, got a path that does not exist: {tmp_path / 'none.pth'}"
    ]


@pytest.mark.parametrize("script", ["convert_rfdetr_to_hf.py", "convert_hf_to_rfdetr.py"])
def test_the_scripts_are_the_commands(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, str(tmp_path / "none"), str(tmp_path / "x")])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert "Traceback" not in error
