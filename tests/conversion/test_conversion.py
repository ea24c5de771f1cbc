"""Conversions in both directions: what is written, reported, uploaded, and left after an interruption."""

import functools
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transformers_rfdetr import RfDetrForInstanceSegmentation
from transformers_rfdetr.conversion import convert
from transformers_rfdetr.conversion.convert import convert_to_rfdetr, convert_to_transformers
from transformers_rfdetr.conversion.rfdetr_checkpoint import write_rfdetr_file

from faults import attempt
from rfdetr_files import POSITIONS, assert_equal, legacy, lightning_file, model_of, weights_in


def test_shared_and_non_contiguous_tensors_are_written(model, save, tmp_path):
    state = model.state_dict()
    shared = torch.randn(2, *state["class_embed.weight"].shape)
    state["class_embed.weight"] = shared[1]
    state["transformer.enc_out_class_embed.0.weight"] = shared[1]
    state["bbox_embed.layers.0.weight"] = state["bbox_embed.layers.0.weight"].T.contiguous().T
    expected = {name: tensor.clone() for name, tensor in state.items()}
    convert_to_transformers(save(legacy(model) | {"model": state}), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), expected)


def test_mixed_dtypes_are_kept_and_loaded_in_the_widest(model, save, tmp_path):
    state = model.state_dict()
    state["class_embed.bias"] = state["class_embed.bias"].half()
    convert_to_transformers(save(legacy(model) | {"model": state}), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), state)
    assert RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "there").dtype == torch.float32


def test_every_dropped_tensor_is_reported(model, save, tmp_path):
    state = model.state_dict() | {"extra.weight": torch.zeros(2, 3), "_kp_active_mask": torch.zeros(0, 0).bool()}
    content = lightning_file(model) | {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
    content["state_dict"]["criterion.empty_weight"] = torch.ones(4)
    done = convert_to_transformers(save(content), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())
    assert sorted(done.changes) == [
        ("_kp_active_mask", "0x0", "dropped: empty, for keypoints"),
        ("criterion.empty_weight", "4", "dropped: not in the model"),
        ("extra.weight", "2x3", "dropped: not in the model"),
        ("names", "model.*", "*"),
    ]
    card = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    assert "| extra.weight | 2x3 | dropped: not in the model |" in card


def test_keypoint_models_are_refused(model, save, tmp_path):
    for path in (
        save(legacy(model, use_grouppose_keypoints=True), "argument.pth"),
        save(legacy(model) | {"model": model.state_dict() | {"keypoint_head.x": torch.ones(1)}}, "tensor.pth"),
        "rf-detr-keypoint-preview-xlarge",
        "RFDETRKeypointPreview",
    ):
        with pytest.raises(ValueError, match="got an RF-DETR keypoint model"):
            convert_to_transformers(path, tmp_path / "there")


def test_an_existing_folder_is_left_alone(model, save, tmp_path):
    (tmp_path / "there").mkdir()
    path = save(legacy(model))
    convert_to_transformers(path, tmp_path / "there")  # it was empty
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"`output` .*there, which exists"):
        convert_to_transformers(path, tmp_path / "there")
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"
    (tmp_path / "model.pth").write_text("mine")
    with pytest.raises(ValueError, match=r"`output` .*model\.pth, which exists"):
        convert_to_rfdetr(tmp_path / "there", tmp_path / "model.pth")


def test_an_interrupted_conversion_leaves_nothing(model, save, tmp_path, monkeypatch):
    path = save(legacy(model))
    convert_to_transformers(path, tmp_path / "fine")
    before = sorted(tmp_path.iterdir())

    def interrupt(content, target, *args):
        Path(target if isinstance(target, Path) else target.name).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_transformers(path, tmp_path / "there")
    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_rfdetr(tmp_path / "fine", tmp_path / "back.pth")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_conversion_leaves_no_folder_and_the_next_run_succeeds(model, save, tmp_path):
    path = save(legacy(model))
    convert_to_transformers(path, tmp_path / "fine")
    job = functools.partial(convert_to_transformers, path, tmp_path / "there")
    for fault in ({"longest": 10_000}, *({"dies_at": place} for place in range(0, 10, 2))):
        assert attempt(job, **fault).signal in (signal.SIGKILL, signal.SIGXFSZ)
        assert not (tmp_path / "there").exists(), fault
    job()
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


def test_written_files_do_not_depend_on_time_and_name(model, tmp_path):
    for name in ("one.pth", "other.pth"):
        write_rfdetr_file(tmp_path / name, model.state_dict(), "RFDETRSegNano", {"num_queries": 4}, None)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()


def test_a_folder_of_transformers_port_is_converted_back(tmp_path):
    port = pytest.importorskip("transformers.models.rf_detr.modeling_rf_detr")
    model = model_of("rf-detr-seg-small")
    model.config.score_thresholds = {1: 0.25}  # which the port and rfdetr ignore
    model.save_pretrained(tmp_path / "ours")
    theirs = port.RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "ours")
    for original_format in (True, False):
        folder = tmp_path / f"port_{original_format}"
        theirs.save_pretrained(folder, save_original_format=original_format)
        convert_to_rfdetr(folder, tmp_path / f"{folder.name}.pth")
        returned = torch.load(tmp_path / f"{folder.name}.pth", weights_only=True)["model"]
        for name, tensor in model.state_dict().items():
            rows = slice(None) if "class_embed" not in name else slice(5)
            assert torch.equal(returned[name][rows], tensor)


def test_damaged_folders_are_not_converted_back(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    content = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for name, damaged in (("cut", content[:-100]), ("empty", b""), ("header", b"\xff" * 8 + content[8:])):
        model.config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.*model\.safetensors "):
            convert_to_rfdetr(tmp_path / name, tmp_path / "back.pth")
    model.config.save_pretrained(tmp_path / "outside")
    (tmp_path / "outside" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../whole/model.safetensors"}}'
    )
    with pytest.raises(ValueError, match=r"index\.json must .*\.\./whole/model\.safetensors"):
        convert_to_rfdetr(tmp_path / "outside", tmp_path / "back.pth")
    (tmp_path / "whole" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        convert_to_rfdetr(tmp_path / "whole", tmp_path / "back.pth")


INVALID_TABLES = {
    "a reference that is a number": {"refpoint_embed.weight": torch.tensor(1.0)},
    "positions in a row": {POSITIONS: torch.zeros(17)},
    "no positions": {POSITIONS: torch.zeros(1, 0, 32)},
    "no queries": {"refpoint_embed.weight": torch.zeros(0, 4), "query_feat.weight": torch.zeros(0, 32)},
    "floats of a byte": {"class_embed.bias": torch.zeros(5, dtype=torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("what", INVALID_TABLES)
def test_folders_with_invalid_tensors_are_refused_with_their_names(what, model, tmp_path):
    model.config.save_pretrained(tmp_path / "ours")
    save_file(model.state_dict() | INVALID_TABLES[what], tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"ours.* ({'|'.join(map(re.escape, INVALID_TABLES[what]))}) "):
        convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_an_empty_shape_whose_product_overflows_is_refused(model, tmp_path):
    model.config.save_pretrained(tmp_path / "ours")
    header = b'{"mask_token": {"dtype": "F32", "shape": [0, %d, %d], "data_offsets": [0, 0]}}' % (2**62, 2**60)
    header = header.replace(b"mask_token", POSITIONS.replace("position_embeddings", "mask_token").encode())
    (tmp_path / "ours" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"ours: .* \d+ are missing"):
        convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")


def test_class_names_are_escaped_in_the_card(model, save, tmp_path):
    names = ["<script>alert(1)</script>", "a|b", "*bold* [x](y)", "line\nbreak"]
    convert_to_transformers(save(legacy(model, class_names=names)), tmp_path / "there")
    card = (tmp_path / "there" / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in card
    assert r"| 1 | a\|b |" in card
    assert r"| 2 | \*bold\* \[x\](y) |" in card
    assert "| 3 | line break |" in card
    assert "__background__" not in card
    assert "pipeline_tag: image-segmentation" in card


def test_the_folder_is_uploaded_on_request(model, save, tmp_path, monkeypatch):
    calls = []

    def create(repo_id, **options):
        calls.append(("create", repo_id, options["private"]))
        return repo_id

    def upload(folder, files, repo_id, **options):
        calls.append(("upload", repo_id, sorted(path.name for path in files)))

    monkeypatch.setattr(convert, "create_repository", create)
    monkeypatch.setattr(convert, "upload", upload)
    convert_to_transformers(save(legacy(model)), tmp_path / "there", push_to_hub="me/barns", private=True)
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert calls == [("create", "me/barns", True), ("upload", "me/barns", files)]
    assert 'from_pretrained("me/barns")' in (tmp_path / "there" / "README.md").read_text(encoding="utf-8")

    def refuse(*_, kept, **options):
        raise OSError(f"me/barns was not pushed: 401; {kept}")

    monkeypatch.setattr(convert, "upload", refuse)
    with pytest.raises(OSError, match=r"me/barns was not pushed: 401; .*again"):
        convert_to_transformers(save(legacy(model)), tmp_path / "again", push_to_hub="me/barns")
    assert_equal(weights_in(tmp_path / "again"), model.state_dict())


def test_a_file_that_cannot_be_converted_creates_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "create_repository", lambda *_, **__: pytest.fail("a repository is created"))
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"cut\.pth"):
        convert_to_transformers(tmp_path / "cut.pth", tmp_path / "there", push_to_hub="me/barns")
