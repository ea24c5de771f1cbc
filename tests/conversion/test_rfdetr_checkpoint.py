"""rfdetr's checkpoint files: the forms that circulate, and files that must not be loaded."""

import argparse
import os
import pickle
import re
import subprocess
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transformers_rfdetr import RfDetrConfig, RfDetrImageProcessor
from transformers_rfdetr.conversion.convert import convert_to_transformers
from transformers_rfdetr.conversion.rfdetr_checkpoint import read_rfdetr_file

from rfdetr_files import arguments_of, assert_equal, best_file, legacy, lightning_file, nested, weights_in

FORMS = {
    "the first versions' file": legacy,
    "a file with a SimpleNamespace": lambda model: (
        legacy(model) | {"args": types.SimpleNamespace(**arguments_of(model))}
    ),
    "Roboflow's weights.pt": lambda model: legacy(model) | {"args": arguments_of(model)},
    "a best file": best_file,
    "a Lightning file": lightning_file,
    "a compiled Lightning file": lambda model: lightning_file(model, "model._orig_mod."),
    "hyper-parameters": lambda model: {
        "state_dict": lightning_file(model)["state_dict"],
        "hyper_parameters": arguments_of(model),
    },
    "a model in DistributedDataParallel": lambda model: (
        legacy(model) | {"model": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}
    ),
    "a compiled encoder": lambda model: (
        legacy(model)
        | {"model": {name.replace("0.encoder.", "0.encoder._orig_mod."): t for name, t in model.state_dict().items()}}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_gives_the_same_folder(form, model, save, tmp_path):
    done = convert_to_transformers(save(FORMS[form](model)), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())
    stored = RfDetrConfig.from_pretrained(tmp_path / "there")
    expected = RfDetrConfig.from_dict(model.config.to_dict())
    expected.id2label = {0: "barn", 1: "house", 2: "shed", 3: "silo", 4: "__background__"}
    expected.label2id = {name: label for label, name in expected.id2label.items()}
    expected.architectures, expected.dtype = ["RfDetrForInstanceSegmentation"], torch.float32
    assert stored.to_dict() == expected.to_dict()
    prefixes = [(change.stored, change.result) for change in done.changes if change.what == "names"]
    wrapped = {"a Lightning file": "model.*", "a compiled Lightning file": "model._orig_mod.*"}
    wrapped |= {"hyper-parameters": "model.*", "a model in DistributedDataParallel": "module.*"}
    wrapped |= {"a compiled encoder": "_orig_mod.*"}
    assert prefixes == ([(wrapped[form], "*")] if form in wrapped else [])
    processor = RfDetrImageProcessor.from_pretrained(tmp_path / "there")
    assert processor.size == {"height": stored.resolution, "width": stored.resolution}


def test_a_file_from_before_torch_1_6_is_read(model, save, tmp_path):
    convert_to_transformers(save(legacy(model), _use_new_zipfile_serialization=False), tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


def test_ema_weights_are_taken_on_request(model, save, tmp_path):
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    state = {f"module.model.{name}": tensor for name, tensor in average.items()} | {"n_averaged": torch.tensor(5)}
    callback = {"EMA": {"average_model_state_dict": state}, "Best": {"score": 0.5}}
    kinds = {"ema_model": average, "legacy_ema_state_dict": average, "callbacks": callback}
    for key, content in kinds.items():
        path = save(legacy(model) | {key: content}, f"{key}.pth")
        convert_to_transformers(path, tmp_path / key, ema=True)
        assert_equal(weights_in(tmp_path / key), average)
        convert_to_transformers(path, tmp_path / f"{key}_not")
        assert_equal(weights_in(tmp_path / f"{key}_not"), model.state_dict())
    with pytest.raises(ValueError, match=r"`ema` .*plain\.pth .*--ema"):
        convert_to_transformers(save(legacy(model), "plain.pth"), tmp_path / "none", ema=True)


def test_a_recompressed_file_is_read_correctly(model, save, tmp_path):
    with (
        zipfile.ZipFile(save(legacy(model))) as archive,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    convert_to_transformers(tmp_path / "packed.pth", tmp_path / "there")
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


def test_a_file_of_a_later_pickle_protocol_is_read_if_trusted(model, save, tmp_path):
    path = save(legacy(model), pickle_protocol=4)
    with pytest.raises(ValueError, match=r"what torch does not load as weights.*--trust-checkpoint"):
        convert_to_transformers(path, tmp_path / "there")
    convert_to_transformers(path, tmp_path / "there", trust_checkpoint=True)
    assert_equal(weights_in(tmp_path / "there"), model.state_dict())


class Custom:
    pass


class Payload:
    """Runs a command while it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(sentinel):
    return {
        "os.system": Payload(os.system, f"touch {sentinel}"),
        "eval": Payload(eval, f"open({str(sentinel)!r}, 'w')"),
        "subprocess": Payload(subprocess.call, ["touch", str(sentinel)]),
        "a custom class": Custom(),
        "a path": Path("run"),
    }


# As pickle's protocol 2 writes them, and as torch 2.6 and later name them.
FOUND = {
    "os.system": r"posix\.system",
    "eval": r"((builtins|__builtin__)\.)?eval",
    "subprocess": r"(subprocess|commands)\.call",
}
FOUND |= {"a custom class": r"test_rfdetr_checkpoint\.Custom", "a path": r"pathlib.*PosixPath"}


@pytest.mark.skipif(os.name != "posix", reason="the names of the payloads are Posix's")
@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(kind, form, model, tmp_path):
    sentinel, path = tmp_path / "sentinel", tmp_path / "bad.pth"
    content = legacy(model) | {"extra": payloads(sentinel)[kind]}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content["extra"], protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    found = "what torch does not load as weights" if form == "pickle 4" else FOUND[kind]
    with pytest.raises(ValueError, match=rf"bad\.pth must .* got {found}\. .*--trust-checkpoint"):
        convert_to_transformers(path, tmp_path / "there")
    assert not sentinel.exists()
    assert not (tmp_path / "there").exists()


@pytest.mark.skipif(os.name != "posix", reason="the path is Posix's")
def test_a_file_with_other_objects_is_read_if_trusted(model, save, tmp_path):
    done = convert_to_transformers(save(legacy(model, notes=Path("run"))), tmp_path / "there", trust_checkpoint=True)
    assert_equal(weights_in(done.output), model.state_dict())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_refusal_shows_no_warnings_of_torch(model, save, recwarn):
    with pytest.raises(ValueError, match="--trust-checkpoint"):
        read_rfdetr_file(save(legacy(model), pickle_protocol=4))
    assert not recwarn.list


def test_files_of_another_format_are_refused_with_the_reason(model, save, tmp_path):
    whole = save(legacy(model)).read_bytes()
    save_file({"a": torch.ones(2)}, tmp_path / "renamed.pth")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("a.txt", "a")
    files = {
        "empty.pth": (b"", "is empty"),
        "cut.pth": (whole[: len(whole) // 2], f"is cut off after {len(whole) // 2} bytes"),
        "almost.pth": (whole[:-10], "is cut off"),
        "page.pth": (b"<!DOCTYPE html><html>404</html>", "got a file that starts with b'<!DOCTYP'"),
        "image.pth": (b"\x89PNG\r\n\x1a\n0000000000", "starts with b'\\x89PNG"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "renamed.pth": (None, "is a safetensors file"),
        "script.pt": (None, "is a TorchScript module"),
        "archive.pth": (None, "got a zip archive without data.pkl"),
        "noise.pth": (b"\x80" + bytes(range(256)), "got what torch does not load as weights"),
    }
    for name, (content, reason) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            read_rfdetr_file(tmp_path / name)
        assert reason in str(error.value)
    for content, reason in (
        ([1, 2], r"content\.pth .* got list"),
        ({}, r"content\.pth .* got dict"),
        ({"epoch": 3, "lr": 0.1}, r"'state_dict', got the keys 'epoch', 'lr'$"),
        ({"model": {"a": 1}}, r"'state_dict', got the keys 'model'$"),
        (torch.ones(2), r"content\.pth .* got Tensor"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_rfdetr_file(save(content, "content.pth"))
    with pytest.raises(ValueError, match=f"got a folder: {tmp_path}"):
        read_rfdetr_file(tmp_path)
    with pytest.raises(ValueError, match="does not exist: nowhere"):
        convert_to_transformers("nowhere", tmp_path / "there")


def test_long_keys_and_values_are_shortened_in_errors(model, save, tmp_path):
    with pytest.raises(ValueError, match=r"got the keys a tuple, 'epoch'$"):
        read_rfdetr_file(save({nested(12, tuple): 1, "epoch": 2}))
    with pytest.raises(ValueError, match="got the keys") as error:
        read_rfdetr_file(save({"a" * 10**6: 1, 10**600: 2}))
    assert f"'{'a' * 80}'..., an int" in str(error.value)
    for value, shown in ((10**600, "an int"), ([10**600], "[an int]"), (torch.ones(3), "a Tensor")):
        for name in ("num_queries", "out_feature_indexes", "model_name"):
            with pytest.raises(ValueError, match=rf"argument `{name}` must be .*, got {re.escape(shown)}"):
                convert_to_transformers(save(legacy(model, **{name: value})), tmp_path / "there")


def test_a_decompression_bomb_is_refused_unread(save, tmp_path):
    with zipfile.ZipFile(save({"model": {"x": torch.zeros(2)}})) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, size in (("small.pth", 1 << 19), ("bomb.pth", 3 << 20)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as packed:
            for member, content in members.items():
                packed.writestr(member, content + bytes(size) if member.endswith("data/1") else content)
            packed.writestr("checkpoint/data/1", bytes(size))
    assert set(read_rfdetr_file(tmp_path / "small.pth").state_dict) == {"x"}
    with pytest.raises(ValueError, match=r"bomb\.pth must .* 4 times its \d+ bytes, got 3\d{6} bytes"):
        read_rfdetr_file(tmp_path / "bomb.pth")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_expanded_tensors_are_refused_and_tied_ones_are_read(options, save):
    row = torch.ones(1, 1000)
    with pytest.raises(ValueError, match=r"'x' \(1000x1000\) .* got 4000 bytes for 4000000\."):
        read_rfdetr_file(save({"model": {"x": row.expand(1000, 1000)}}, **options))
    overlapping = torch.ones(1999).as_strided((1000, 1000), (1, 1))
    with pytest.raises(ValueError, match=r"'x' \(1000x1000\) .* got 7996 bytes for 4000000\."):
        read_rfdetr_file(save({"model": {"x": overlapping}}, **options))
    with pytest.raises(ValueError, match=r"4 times the \d+ stored bytes, got 400000:"):
        read_rfdetr_file(save({"model": {f"x{number}": row for number in range(100)}}, **options))
    tied = {"model": {"x": row, "y": row, "z": row[:, 500:]}, "ema_model": {"x": row}}
    assert set(read_rfdetr_file(save(tied, **options)).state_dict) == {"x", "y", "z"}


def test_adapters_whose_product_has_another_size_are_refused_before_it_is_computed(save):
    thin = {"lora_A": torch.ones(1, 10**6), "lora_B": torch.ones(10**6, 1)}  # of 4 TB
    whole = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2), "lora_magnitude_vector": torch.ones(4)}
    strange = {
        "thin": ({"weight": torch.ones(1)}, thin),
        "long": ({"weight": torch.ones(4, 3)}, whole | {"lora_magnitude_vector": torch.ones(10**6, 1)}),
        "of no rank": ({"weight": torch.ones(4, 3)}, {"lora_A": torch.ones(0, 3), "lora_B": torch.ones(4, 0)}),
        "a number": ({"weight": torch.ones(4, 3)}, {"lora_A": torch.tensor(1.0), "lora_B": torch.ones(4, 2)}),
        "in bytes": ({"weight": torch.ones(4, 3)}, {name: t.to(torch.float8_e4m3fn) for name, t in whole.items()}),
    }
    for weight, parts in strange.values():
        state = {"a.base_layer.weight": weight["weight"]}
        state |= {f"a.{name}.default.weight": part for name, part in parts.items()}
        with pytest.raises(ValueError, match=r"the adapter of 'a' must .* got lora_A .*, lora_B .*, weight "):
            read_rfdetr_file(save({"model": state}))


def test_a_tensor_with_two_keys_is_an_error(model, save, tmp_path):
    state = model.state_dict() | {"module.class_embed.bias": torch.ones(5)}
    with pytest.raises(ValueError, match=r"'class_embed\.bias' once, got it again as 'module\.class_embed\.bias'"):
        convert_to_transformers(save(legacy(model) | {"model": state}), tmp_path / "there")
