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

from small_models import pixels, small_config, targets
from training_run import build_trainer, drawn

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
IS_CUDA = DEVICE == "cuda"
needs_device = pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="no CUDA")
needs_cuda = pytest.mark.skipif(not (IS_CUDA and torch.cuda.is_available()), reason="no CUDA")
# Largest difference from float32 on the CPU, relative to the largest magnitude of an output: bits of the mantissa are
# 24, 11 and 8, and the errors of twelve layers add up.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
OUTPUTS = ("logits", "pred_boxes", "pred_masks")


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


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_outputs_are_those_of_the_cpu(tiny, batch, dtype, attention):
    model = copy.deepcopy(tiny[0]).eval()
    with torch.no_grad():
        expected = model(batch["pixel_values"])
        model.set_attn_implementation(attention)
        found = model.to(DEVICE, dtype)(batch["pixel_values"].to(DEVICE, dtype))
    # Rounding may order tokens of similar scores differently, or select others, which the other queries attend to.
    same = found.enc_indices.cpu() == expected.enc_indices
    is_exact = dtype == torch.float32
    assert same.float().mean() > (0.99 if is_exact else 0.5)
    for name in OUTPUTS:
        pair = getattr(found, name).cpu()[same], getattr(expected, name)[same]
        assert difference(*pair, quantile=1.0 if is_exact else 0.95) <= TOLERANCES[dtype], name


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
    if dtype == torch.float32:
        for (name, weight), other in zip(model.named_parameters(), on_device.parameters(), strict=True):
            if weight.grad is not None:
                assert difference(other.grad, weight.grad) <= 1e-2, name


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_flash_attention_computes_what_sdpa_computes(tiny, batch, dtype):
    pytest.importorskip("flash_attn")
    model = copy.deepcopy(tiny[0]).eval().to(DEVICE, dtype)
    inputs = batch["pixel_values"].to(DEVICE, dtype)
    with torch.no_grad():
        expected = model(inputs).logits.float().cpu()
        model.set_attn_implementation("flash_attention_2")
        assert difference(model(inputs).logits, expected) <= TOLERANCES[dtype]


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_compiled_model_finds_what_the_plain_one_finds(tiny, batch, dtype):
    model, processor = copy.deepcopy(tiny[0]).to(DEVICE), tiny[1]
    fast = compile_for_inference(model, batch_size=2, dtype=dtype, compiled=IS_CUDA)
    assert not IS_CUDA or "CUDA graphs" in fast.active
    images = [sample["image"] for sample in drawn(4)]
    found = [predict(fast, processor, images) for _ in range(3)]  # a graph is captured, and replayed
    assert all([one.names for one in again] == [one.names for one in found[0]] for again in found)
    # In half precision, scores near the threshold may fall on its other side.
    counts, expected = ([len(one) for one in ones] for ones in (found[0], predict(model, processor, images)))
    assert sum(expected) > 10
    assert counts == expected if dtype == torch.float32 else sum(counts) == pytest.approx(sum(expected), rel=0.3)


@needs_device
@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"fp16": IS_CUDA}, {"torch_compile": IS_CUDA}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_steps_reduce_the_loss(tmp_path, settings, checkpointing):
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
    """The README has 4.3 GiB above the model for 4 images in float32, measured on the CPU."""
    model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-medium")).to(DEVICE).train()
    side = model.config.resolution
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    model(torch.randn(4, 3, side, side, device=DEVICE), labels=moved(targets(3, 1, 5, 2))).loss.backward()
    assert (torch.cuda.max_memory_allocated() - before - gradients) / 2**30 < 4.3 * 1.1


def test_the_tests_that_need_a_gpu_are_counted():
    """So that nobody takes a run without a GPU for one with it."""
    marks = [getattr(value, "pytestmark", ()) for value in globals().values()]
    num_tests = sum(any(mark.name == "gpu" for mark in of_one) for of_one in marks)
    assert num_tests == 8
    if IS_CUDA and not torch.cuda.is_available():
        warnings.warn(f"{num_tests} tests of a GPU were skipped: no CUDA", stacklevel=1)
