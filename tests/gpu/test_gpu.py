"""A GPU computes what the CPU computes: `pytest -m gpu`, or `make test-gpu`. Without CUDA these tests skip.

`GPU_TESTS_ON=cpu` runs on the CPU what can run there, to try the tests themselves.
"""

import copy
import os
import warnings

import numpy as np
import pytest
import torch

from transformers_rfdetr import (
    RfDetrConfig,
    RfDetrForInstanceSegmentation,
    compile_for_inference,
    evaluate_instance_segmentation,
    load,
    predict,
)
from transformers_rfdetr.data.prepared import collate_fn
from transformers_rfdetr.model.mask_points_rf_detr import fixed_points
from transformers_rfdetr.model.mask_runs import encode_mask_logits
from transformers_rfdetr.model.matcher_rf_detr import assign, assign_together

from small_models import pixels, small_config, targets
from training_run import build_trainer, drawn

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
IS_CUDA = DEVICE == "cuda"
needs_device = pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="no CUDA")
needs_cuda = pytest.mark.skipif(not (IS_CUDA and torch.cuda.is_available()), reason="no CUDA")
# Largest difference from float32 on the CPU, relative to the largest magnitude of an output: bits of the mantissa are
# 24, 11 and 8, and the errors of twelve layers add up.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
# Smallest cosine of the gradient of all parameters and that in float32 on the CPU. On the CPU it is 0.96 and 0.90 in
# half precision: a token more or less is selected.
COSINES = {torch.float32: 0.9999, torch.float16: 0.9, torch.bfloat16: 0.7}
OUTPUTS = ("logits", "pred_boxes", "pred_masks")


@pytest.fixture(autouse=True)
def _float32_is_exact():
    """Turn off TF32 (11 bits): torch uses it in convolutions by default, and `import rfdetr` for all products."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_tf32(False, False)
    yield
    set_tf32(*before)


def set_tf32(in_convolutions, in_products):
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = in_convolutions, in_products


def difference(found, expected, quantile=1.0):
    found, expected = found.detach().float().cpu(), expected.detach().float()
    largest = np.quantile((found - expected).abs().numpy(), quantile)
    return float(largest) / max(float(expected.abs().max()), 1.0)


@pytest.fixture(scope="module")
def tiny():
    return load("rf-detr-seg-tiny")


@pytest.fixture(scope="module")
def batch(tiny):
    prepared = drawn(4).with_processor(tiny[1])
    return collate_fn([prepared[index] for index in range(4)])


def moved(labels):
    return [{name: value.to(DEVICE, non_blocking=True) for name, value in target.items()} for target in labels]


def check_outputs(found, expected, tolerance):
    """Compare the queries of the same tokens.

    Rounding may order tokens of similar scores differently, or select others, which the other queries attend to.
    """
    same = found.enc_indices.cpu() == expected.enc_indices.cpu()
    is_exact = tolerance == TOLERANCES[torch.float32]
    assert same.float().mean() > (0.99 if is_exact else 0.5)
    for name in OUTPUTS:
        pair = (getattr(outputs, name).cpu()[same] for outputs in (found, expected))
        assert difference(*pair, quantile=1.0 if is_exact else 0.95) <= tolerance, name


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tf32", [False, True], ids=["exact", "TF32"])
def test_outputs_are_those_of_the_cpu(tiny, batch, dtype, attention, tf32):
    set_tf32(tf32, tf32)
    model = copy.deepcopy(tiny[0]).eval()
    with torch.no_grad():
        expected = model(batch["pixel_values"])
        model.set_attn_implementation(attention)
        found = model.to(DEVICE, dtype)(batch["pixel_values"].to(DEVICE, dtype))
    # TF32 rounds the factors like float16.
    check_outputs(found, expected, TOLERANCES[torch.float16 if tf32 and dtype == torch.float32 else dtype])


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_losses_and_gradients_are_those_of_the_cpu(monkeypatch, dtype):
    # Random points differ between devices.
    monkeypatch.setattr("transformers_rfdetr.model.modeling_rf_detr.random_points", fixed_points)
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(small_config()).train()
    labels = targets(3, 1)
    on_device = copy.deepcopy(model).to(DEVICE)
    expected = model(pixels(2), labels=labels)
    expected.loss.backward()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        found = on_device(pixels(2).to(DEVICE), labels=moved(labels))
    found.loss.backward()
    assert difference(found.loss, expected.loss) <= TOLERANCES[dtype]
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    others = {name: on_device.get_parameter(name).grad.float().cpu() for name in gradients}
    together = (torch.cat([one.flatten() for one in ones.values()]) for ones in (gradients, others))
    assert torch.cosine_similarity(*together, dim=0) > COSINES[dtype]
    if dtype == torch.float32:
        for name, gradient in gradients.items():
            assert difference(others[name], gradient) <= 1e-2, name


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flash_attention_computes_what_sdpa_computes(tiny, batch, dtype):
    pytest.importorskip("flash_attn")
    model = copy.deepcopy(tiny[0]).eval().to(DEVICE, dtype)
    inputs = batch["pixel_values"].to(DEVICE, dtype)
    with torch.no_grad():
        expected = model(inputs)
        model.set_attn_implementation("flash_attention_2")
        check_outputs(model(inputs), expected, TOLERANCES[dtype])


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_compiled_model_finds_what_the_plain_one_finds(tiny, batch, dtype):
    model, processor = copy.deepcopy(tiny[0]).to(DEVICE), tiny[1]
    fast = compile_for_inference(model, batch_size=2, dtype=dtype, compiled=IS_CUDA)
    if IS_CUDA:
        assert "CUDA graphs" in fast.active
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    images = [sample["image"] for sample in drawn(4)]
    found = [predict(fast, processor, images) for _ in range(3)]  # a graph is captured, and replayed
    assert all([one.names for one in again] == [one.names for one in found[0]] for again in found)
    # In half precision, scores near the threshold may fall on its other side.
    counts, expected = ([len(one) for one in ones] for ones in (found[0], predict(model, processor, images)))
    assert sum(expected) > 10
    assert counts == expected if dtype == torch.float32 else sum(counts) == pytest.approx(sum(expected), rel=0.3)


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    # Each size is compiled.
    [{}, {"bf16": True}, {"fp16": IS_CUDA}, {"torch_compile": IS_CUDA, "multi_scale": False}],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_steps_reduce_the_loss(tmp_path, settings, checkpointing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(IS_CUDA))  # a process that sees several is refused
    trainer = build_trainer(
        tmp_path,
        use_cpu=not IS_CUDA,
        dataloader_pin_memory=IS_CUDA,
        max_steps=12,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        **settings,
    )
    assert trainer.args.device.type == DEVICE
    if checkpointing:
        enable = getattr(trainer.model, "activation_checkpointing_enable", None)  # the name since transformers 5.23
        (enable or trainer.model.gradient_checkpointing_enable)()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


@needs_device
@pytest.mark.gpu
def test_an_evaluation_on_the_device_has_the_metrics_of_the_cpu(tiny):
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    expected = evaluate_instance_segmentation(model, processor, drawn(6), progress=False)
    found = evaluate_instance_segmentation(model.to(DEVICE), processor, drawn(6), progress=False)
    for name in ("segm_AP", "segm_AP50", "bbox_AP", "mean_iou"):
        assert found[name] == pytest.approx(expected[name], abs=5e-3), name


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_masks_have_the_rle_of_the_cpu_bit_for_bit(noise):
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(-1, 1, 27)[:, None], torch.linspace(-1, 1, 36)
    radii = torch.rand(20, 2, 1, 1, generator=generator) + 0.1
    logits = 1 - (rows / radii[:, 0]) ** 2 - (columns / radii[:, 1]) ** 2
    logits += noise * torch.randn(logits.shape, generator=generator)
    for size in [(480, 640), (211, 333), (20, 20)]:
        found, expected = (encode_mask_logits(logits.to(device), size) for device in (DEVICE, "cpu"))
        assert found == expected


@needs_device
@pytest.mark.gpu
def test_an_assignment_on_the_device_costs_what_that_of_scipy_costs():
    pytest.importorskip("torch_linear_assignment")
    generator = torch.Generator().manual_seed(0)
    costs = [torch.randn(13 * 200, count, generator=generator) for count in (8, 0, 1, 37, 200)]
    pairs = assign_together([cost.to(DEVICE) for cost in costs], 13)
    for cost, (queries, objects) in zip(costs, pairs, strict=True):
        found, expected = cost[queries.cpu(), objects.cpu()].sum(), cost[assign(cost, 13)].sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@needs_cuda
@pytest.mark.gpu
def test_the_forward_pass_does_not_wait_for_the_device(tiny, batch):
    model = copy.deepcopy(tiny[0]).eval().to(DEVICE)
    inputs = batch["pixel_values"].pin_memory()
    with torch.no_grad():
        model(inputs.to(DEVICE))  # buffers are created
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(inputs.to(DEVICE, non_blocking=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.gpu
def test_a_training_step_of_the_medium_variant_needs_the_memory_of_the_readme():
    """The README has 4.3 GiB above the model for 4 images in float32, gradients included, measured on the CPU."""
    model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-medium")).to(DEVICE).train()
    side = model.config.resolution
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels = moved(targets(8, 8, 8, 8, size=(side, side)))
    model(torch.randn(4, 3, side, side, device=DEVICE), labels=labels).loss.backward()
    assert (torch.cuda.max_memory_allocated() - before) / 2**30 < 4.3 * 1.1


def test_the_tests_that_need_a_gpu_are_counted():
    """So that nobody takes a run without a GPU for one with it."""
    marks = [getattr(value, "pytestmark", ()) for value in globals().values()]
    num_tests = sum(any(mark.name == "gpu" for mark in of_one) for of_one in marks)
    assert num_tests == 10
    if IS_CUDA and not torch.cuda.is_available():
        warnings.warn(f"{num_tests} tests of a GPU were skipped: no CUDA", stacklevel=1)
