"""The benchmarks run, compare equal work of the three implementations, and measure correctly."""

import importlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peer import narrow_dinov2
from small_models import STAND_IN_BACKBONE

FOLDER = Path(__file__).parents[2] / "benchmarks"
GET_CONTEXT = multiprocessing.get_context
SCRIPTS = {
    "forward": {"ours", "ours bf16", "port", "port bf16", "rfdetr", "rfdetr optimised"},
    "training_step": {"ours", "ours checkpointed", "port", "rfdetr"},
    "preprocessing": {"ours", "ours cropped", "port"},
    "post_processing": {"ours", "port", "rfdetr"},
    "prediction": {"ours", "ours predict", "port", "rfdetr", "rfdetr optimised"},
    "step_parts": {"ours scipy"},
    "validation": {"ours"},
    "runtimes": {f"{name}{form}" for name in ("ours", "rfdetr") for form in ("", " onnxruntime", " OpenVINO")},
}


@pytest.fixture(autouse=True)
def _benchmarks_are_importable_and_small(monkeypatch):
    """Give the models of --quick a narrow backbone, and fork the processes that measure bytes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    peers = module("peers")
    monkeypatch.setitem(peers.QUICK_FIELDS, "backbone_config", STAND_IN_BACKBONE)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: GET_CONTEXT("fork"))
    with narrow_dinov2(peers.read_config(peers.QUICK_VARIANT, quick=True)):
        yield


def module(name: str) -> Any:
    return importlib.import_module(name)


def run(script: str, file: Path, *arguments: str) -> list:
    module(script).main(["--json", str(file), *arguments])
    return [module("peers").Measurement(**json.loads(line)) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[pytest.mark.long] if name == "runtimes" else []) for name in SCRIPTS]
)
def test_a_quick_run_measures_all_implementations(script, tmp_path, capsys, monkeypatch):
    if script == "training_step":  # its processes would take longest, and the steps that they run are timed here too
        monkeypatch.setattr(module("peers"), "peak_bytes", lambda *_: 1)
    found = run(script, tmp_path / "lines", "--quick")
    assert {m.implementation for m in found} >= SCRIPTS[script]
    assert all(math.isfinite(m.value) and m.value > 0 for m in found)
    printed = capsys.readouterr().out
    assert all(f"| {m.case} | {m.implementation} |" in printed for m in found)


def test_throughput_is_measured_for_each_batch_size(tmp_path):
    found = run("forward", tmp_path / "lines", "--quick", "--throughput", "1", "2")
    batches = [m.case for m in found if m.unit == "images/s" and m.implementation == "ours bf16"]
    assert batches == ["throughput, B=1", "throughput, B=2"]


def test_the_parts_of_a_step_lie_within_it(tmp_path):
    seconds = {m.case.split(",")[0]: m.value for m in run("step_parts", tmp_path / "lines", "--quick")}
    assert seconds["assignment"] < seconds["matching"] < seconds["loss"]
    forward = sum(seconds[part] for part in ("backbone", "first stage", "decoder", "heads", "loss"))
    assert forward < seconds["forward and loss"]
    assert sum(seconds[part] for part in ("transfer", "forward and loss", "backward", "optimizer")) < seconds["step"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_scripts_of_a_run_accept_their_options(device, monkeypatch):
    for line in module("run_all").SCRIPTS[device]:
        name, *options = line.split()
        variants: list[str] = []
        monkeypatch.setattr(
            module(name), "measure", lambda variant, _, variants=variants: variants.append(variant) or []
        )
        module(name).main([*options, "--device", device])
        assert variants


def test_providers_that_are_not_installed_are_skipped_and_named(monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    installed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: installed)
    assert module("runtimes").list_providers("cuda") == {"onnxruntime CUDA": "CUDAExecutionProvider"}
    assert "skipped: TensorRT" in capsys.readouterr().out


def test_the_three_models_compute_the_same():
    peers = module("peers")
    config = peers.read_config(peers.QUICK_VARIANT, quick=True)
    models = peers.build(config, peers.QUICK_VARIANT, "cpu", "ours", "port", "rfdetr")
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, port, peer = models["ours"](pixels), models["port"](pixels), models["rfdetr"].model.model(pixels)
    for name, other in (("logits", "pred_logits"), ("pred_boxes", "pred_boxes"), ("pred_masks", "pred_masks")):
        assert ours[name].std() > 0.1
        torch.testing.assert_close(port[name], ours[name], atol=1e-3, rtol=0)
        torch.testing.assert_close(peer[other], ours[name], atol=1e-3, rtol=0)


def test_the_losses_of_a_step_reach_the_same_parameters(monkeypatch):
    peers, steps = module("peers"), module("training_step")
    built, build = {}, peers.build
    monkeypatch.setattr(peers, "build", lambda *arguments: built.update(build(*arguments)) or {"": built["rfdetr"]})
    steps.prepare("rfdetr", 1, peers.QUICK_VARIANT, True, "cpu", False)()
    monkeypatch.setattr(peers, "build", lambda *arguments: built.update(build(*arguments)) or {"": built["ours"]})
    steps.prepare("ours", 1, peers.QUICK_VARIANT, True, "cpu", False)()
    theirs = dict(built["rfdetr"].model.model.named_parameters())
    trained = {name for name, parameter in built["ours"].named_parameters() if parameter.grad is not None}
    assert trained
    assert trained == {name for name, parameter in theirs.items() if parameter.grad is not None}


def test_a_linear_layer_counts_two_for_each_multiplication():
    layer = torch.nn.Linear(5, 7).requires_grad_(False)
    assert module("peers").count_flops(lambda: layer(torch.ones(3, 5))) == 2 * 3 * 5 * 7


def allocate(before: int, after: int) -> Callable[[], torch.Tensor]:
    kept = torch.ones(before, dtype=torch.uint8)
    return lambda: torch.ones(after, dtype=torch.uint8) + kept[0]


@pytest.mark.parametrize("is_forked", [True, pytest.param(False, marks=pytest.mark.long)], ids=["fork", "fresh"])
def test_peak_bytes_are_those_that_the_function_adds_and_not_those_before(is_forked, monkeypatch):
    if not is_forked:
        monkeypatch.setattr(multiprocessing, "get_context", GET_CONTEXT)
    added = module("peers").peak_bytes("cpu", allocate, 300_000_000, 50_000_000)
    assert 100_000_000 <= added < 150_000_000  # the ones and the sum


def test_functions_take_turns_and_the_first_run_of_each_does_not_count(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def spend(name: str, seconds: list[float]) -> Callable[[], None]:
        def function() -> None:
            order.append(name)
            clock[0] += seconds.pop(0)

        return function

    functions = {"a": spend("a", [100, 1, 5, 3]), "b": spend("b", [100, 2, 2, 8])}
    assert module("peers").time_in_turns(functions, repeats=3) == {"a": 3, "b": 2}
    assert order == ["a", "b"] * 4


def measurement(implementation: str, value: float, **fields: Any) -> Any:
    usual = {"area": "forward", "variant": "rf-detr-seg-medium", "case": "time, B=1", "unit": "s", "device": "cpu"}
    return module("peers").Measurement(implementation=implementation, value=value, **usual | fields)


def test_tables_show_the_ratios_to_both_peers():
    lines = module("peers").table([measurement("ours", 0.3), measurement("port", 0.6), measurement("rfdetr", 1.2)])
    assert "| forward | seg-medium | time, B=1 | ours | 300 ms | 0.5 | 0.25 |" in lines
    assert "| forward | seg-medium | time, B=1 | rfdetr | 1.20 s | 2 | 1 |" in lines


def test_targets_are_met_up_to_their_limit():
    run_all = module("run_all")
    numbers = [measurement("ours", 0.9), measurement("port", 2.0), measurement("rfdetr optimised", 1.0)]
    numbers.append(measurement("ours", 3 * 2**20, area="evaluation", case="kept", unit="B"))
    targets = [
        run_all.Target("forward", "time, B=1", "ours", 0.9, "rfdetr optimised"),
        run_all.Target("forward", "time, B=1", "ours", 0.4, "port"),
        run_all.Target("forward", "time, B=1", "ours", 0.8, "rfdetr"),
        run_all.Target("evaluation", "kept", "ours", 2.0**21),
    ]
    rows = run_all.targets_table(numbers, targets).splitlines()[2:]
    start = "| forward, seg-medium, time, B=1 | 2.00 s | optimised 1.00 s |"
    assert rows[0] == f"{start} 900 ms | 0.9 x | 0.9 x rfdetr optimised | yes |"
    assert rows[1] == f"{start} 900 ms | 0.45 x | 0.4 x port | **no** |"
    assert rows[2] == f"{start} not measured |  |  |  |"
    assert rows[3] == "| evaluation, seg-medium, kept |  |  | 3 MiB | 3 MiB | 2 MiB | **no** |"


def test_every_target_on_the_cpu_is_among_what_is_measured(tmp_path, monkeypatch):
    peers, run_all = module("peers"), module("run_all")
    small, compiled = peers.read_config(peers.QUICK_VARIANT, quick=True), SimpleNamespace(active=[])
    monkeypatch.setattr(peers, "read_config", lambda variant, quick: small)
    optimised = SimpleNamespace(model=SimpleNamespace(inference_model=None))
    monkeypatch.setattr(peers, "optimise_rfdetr", lambda *_, **__: optimised)
    monkeypatch.setattr(peers, "count_flops", lambda *_: 1)
    monkeypatch.setattr(peers, "time_in_turns", lambda functions, *_: dict.fromkeys(functions, 1.0))
    monkeypatch.setattr(peers, "peak_bytes", lambda *_: 1)
    for script in ("training_step", "post_processing"):
        monkeypatch.setattr(module(script), "prepare", lambda *_: None)
    for name in ("export", "run_onnx", "run_openvino", "compile_for_inference"):
        monkeypatch.setattr(module("runtimes"), name, lambda *_, **__: None)
    monkeypatch.setattr(module("runtimes"), "export_rfdetr", lambda *_: "rfdetr.onnx")
    monkeypatch.setattr(peers, "compile_for_inference", lambda *_, **__: compiled)
    monkeypatch.setattr(run_all, "stream", None)
    monkeypatch.setattr(run_all, "count_outputs_of_the_port", lambda: [("logits", 1.0)])
    monkeypatch.setattr(run_all, "alone", lambda function, *_: function() if function else {"rss": 1.0, "compute": 1.0})
    numbers = run_all.measure_evaluation(5000)
    for script in ("forward", "training_step", "preprocessing", "post_processing", "runtimes"):
        numbers += run(script, tmp_path / script)
    page = run_all.write_page("command", numbers, run_all.TARGETS["cpu"], [])
    assert "not measured" not in page
    assert page.count("| yes |") + page.count("| **no** |") == len(run_all.TARGETS["cpu"])
