"""LoRA: what is trained, what the model folders contain, peft as the oracle of the adapter, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from transformers_rfdetr import RfDetrForInstanceSegmentation
from transformers_rfdetr.training.optimization import parameter_groups
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import pixels, small_model, targets
from training_run import QUICK, drawn

peft = pytest.importorskip("peft")
# peft asks transformers >= 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TAPS = {"backbone_config": {"out_indices": [1, 2, 3]}}  # the last of four blocks is not used
SETTINGS = {"lora": 2, "gradient_accumulation_steps": 1, "ema_tau": 2.0, "multi_scale": False}
ENCODER = "backbone.0.encoder.encoder."


def base() -> RfDetrForInstanceSegmentation:
    return small_model(num_labels=1, **TAPS).train()


def build(folder: Path | str, model: Any = None, **settings: Any) -> RfDetrTrainer:
    arguments = RfDetrTrainingArguments(str(folder), **(QUICK | SETTINGS | settings))
    data = {"train_dataset": drawn(6), "eval_dataset": drawn(3, 100)}
    return RfDetrTrainer(base() if model is None else model, arguments, **data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RfDetrTrainer:
    """A run of 2 epochs of 3 steps, with a checkpoint in the middle of the second."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    trainer = build(folder, save_strategy="steps", save_steps=4, save_total_limit=None, load_best_model_at_end=False)
    trainer.train()
    return trainer


def test_only_the_attention_of_used_blocks_is_adapted_and_all_after_dinov2_is_trained(tmp_path):
    plain = base()
    trained_before = {name for name, p in plain.named_parameters() if p.requires_grad}
    model = build(tmp_path, lora=True).model
    model(pixels(), labels=targets(1, 2, num_labels=1)).loss.backward()
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapters = {name for name in found if ".lora_" in name}
    layers = ("attention.query", "attention.key", "attention.value", "output.dense")
    assert adapters == {
        f"{ENCODER}encoder.layer.{block}.attention.{layer}.lora_{part}.default.weight"
        for block in range(3)
        for layer in layers
        for part in "AB"
    }
    assert all(min(found[name].shape) == 16 for name in adapters)
    assert found.keys() - adapters == {name for name in trained_before if not name.startswith(ENCODER)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == found.keys()
    rates = {"learning_rate": 1.0, "learning_rate_encoder": 2.0, "layer_decay": 0.8, "component_decay": 0.7}
    groups = parameter_groups(model, **rates, weight_decay=0.1)
    assert {group["lr"] for group in groups for p in group["params"] if any(p is found[n] for n in adapters)} == {1.0}


def test_a_folder_has_the_merged_weights_and_the_adapter_that_peft_loads(run):
    folder = Path(run.args.output_dir) / "best_total"
    run.best_models.load_total(run.model, folder.parent)
    expected = run.model.eval()(pixels())
    merged = RfDetrForInstanceSegmentation.from_pretrained(folder).eval()
    assert merged.state_dict().keys() == base().state_dict().keys()
    adapted = peft.PeftModel.from_pretrained(base().eval(), folder / "adapter").eval()
    for outputs in (merged(pixels()), adapted(pixel_values=pixels())):
        for name in ("logits", "pred_boxes", "pred_masks"):
            # Merged weights round differently: by up to 2e-5 in mask logits on one processor.
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base().eval()(pixels()).logits, expected.logits, atol=1e-3)
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_the_frozen_weights_do_not_change_and_the_adapted_ones_do(run):
    saved, before = load_file(Path(run.args.output_dir) / "best_total" / "model.safetensors"), base().state_dict()
    changed = {name for name in before if not torch.equal(saved[name], before[name])}
    encoder = {name for name in changed if name.startswith(ENCODER)}
    assert encoder == {
        f"{ENCODER}encoder.layer.{block}.attention.{layer}.weight"
        for block in range(3)
        for layer in ("attention.query", "attention.key", "attention.value", "output.dense")
    }
    assert {"class_embed.weight", "transformer.decoder.layers.0.linear1.weight"} <= changed


def test_save_pretrained_of_the_trained_model_writes_the_merged_weights(run, tmp_path):
    run.model.save_pretrained(tmp_path)
    loaded = RfDetrForInstanceSegmentation.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(pixels()).logits, run.model.eval()(pixels()).logits, rtol=0, atol=1e-5)


def test_a_resumed_run_ends_with_the_same_weights_also_from_the_model_of_a_checkpoint(run, tmp_path):
    checkpoint = Path(run.args.output_dir) / "checkpoint-4"
    run.best_models.load_total(run.model, Path(run.args.output_dir))
    settings = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None, "load_best_model_at_end": False}
    model = RfDetrForInstanceSegmentation.from_pretrained(checkpoint)  # merged: not the model that the run began with
    resumed = build(tmp_path, model, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    name = "rf_detr_training_weights.safetensors"
    ours, theirs = (load_file(folder / "checkpoint-6" / name) for folder in (tmp_path, checkpoint.parent))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert resumed.state.log_history[-2]["eval_segm_AP"] == run.state.log_history[-2]["eval_segm_AP"]


def test_another_rank_than_that_of_the_checkpoint_is_refused(run, tmp_path):
    checkpoint = str(Path(run.args.output_dir) / "checkpoint-4")
    for rank in (0, 3):
        with pytest.raises(ValueError, match=f"`lora` must be the rank in .*checkpoint-4, 2, got {rank}"):
            build(tmp_path, lora=rank).train(resume_from_checkpoint=checkpoint)


def test_without_an_average_the_weights_are_resumed_too(tmp_path):
    settings = {"ema": False, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    resumed = build(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_what_contradicts_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`freeze_backbone` must be False with `lora`"):
        RfDetrTrainingArguments(str(tmp_path), lora=8, freeze_backbone=True)
    with pytest.raises(ValueError, match=r"`lora` must be a rank, True or 0, got -1"):
        RfDetrTrainingArguments(str(tmp_path), lora=-1)
    assert RfDetrTrainingArguments(str(tmp_path), lora=True).lora == 16
    with pytest.raises(ValueError, match="model without adapters"):
        build(tmp_path, build(tmp_path).model)
