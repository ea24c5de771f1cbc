"""The average of the weights and the best models: what is evaluated, kept, and left in the model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from transformers import AutoModelForInstanceSegmentation

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.training.trainer import RfDetrTrainer

from training_run import assert_same_metrics, build_trainer, drawn

BY_LOSS = {"num_train_epochs": 3, "metric_for_best_model": "loss"}


def small_data() -> dict[str, Any]:
    return {"train_dataset": drawn(4), "eval_dataset": drawn(3, 100)}


def least_of(history: list[dict[str, Any]], key: str) -> float:
    return min(entry[key] for entry in history if key in entry)


def evaluate_folder(folder: Path, output: Path) -> dict[str, Any]:
    trainer = build_trainer(output, small_data())
    trainer.model.load_state_dict(AutoModelForInstanceSegmentation.from_pretrained(folder).state_dict())
    assert RfDetrImageProcessor.from_pretrained(folder).size == trainer.processing_class.size
    return trainer.evaluate()


def test_the_average_is_evaluated_once_an_epoch_and_the_best_checkpoint_scores_the_same(tmp_path):
    trainer = build_trainer(tmp_path / "run", small_data(), **BY_LOSS)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_segm_AP" in entry]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert not any("eval_base" in key for entry in history for key in entry)
    assert least_of(history, "eval_loss") == trainer.state.best_metric
    [best] = [entry for entry in history if entry["eval_loss"] == trainer.state.best_metric]
    for folder in ("best_total", "best_ema", Path(trainer.state.best_model_checkpoint).name):
        found = evaluate_folder(tmp_path / "run" / folder, tmp_path)
        assert_same_metrics(
            best, {key: found[key] for key in best if "AP" in key or "mean_iou" in key}, "eval_", "eval_"
        )
        assert found["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    saved = load_file(tmp_path / "run" / "best_total" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert {path.name for path in (tmp_path / "run" / "best_total").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert not list((tmp_path / "run").glob(".*"))


def test_with_eval_base_model_both_best_models_and_the_better_of_them_are_kept(tmp_path):
    trainer = build_trainer(tmp_path / "run", small_data(), eval_base_model=True, ema_decay=0.9, **BY_LOSS)
    trainer.train()
    history = trainer.state.log_history
    values = {"ema": least_of(history, "eval_loss"), "regular": least_of(history, "eval_base_loss")}
    assert values["ema"] != values["regular"]
    values["total"] = min(values.values())
    assert trainer.state.best_metric == values["total"]
    for kind, value in values.items():
        found = evaluate_folder(tmp_path / "run" / f"best_{kind}", tmp_path)
        assert found["eval_loss"] == pytest.approx(value, rel=1e-6), kind
    total = load_file(tmp_path / "run" / "best_total" / "model.safetensors")
    assert all(torch.equal(total[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_the_first_of_several_eval_datasets_chooses_the_best_model(tmp_path):
    sets = {"near": drawn(2, 100), "far": drawn(2, 200)}
    trainer = build_trainer(
        tmp_path,
        trainer={"train_dataset": drawn(4), "eval_dataset": sets},
        metric_for_best_model="loss",
        num_train_epochs=1,
    )
    trainer.train()
    [near] = [entry["eval_near_loss"] for entry in trainer.state.log_history if "eval_near_loss" in entry]
    assert trainer.state.best_metric == near
    assert any("eval_far_segm_AP" in entry for entry in trainer.state.log_history)


def test_a_second_run_of_a_trainer_keeps_nothing_of_the_first(tmp_path):
    trainer = build_trainer(tmp_path, small_data(), **(BY_LOSS | {"num_train_epochs": 1}))
    trainer.train()
    trainer.args.learning_rate = 0.0  # nothing after this is as good as what follows from other weights
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trainer.optimizer = None
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    trainer = build_trainer(tmp_path, metric_for_best_model="loss")
    for value, kept in [
        (math.nan, {}),
        (2.0, {"regular": 2.0, "total": 2.0}),
        (math.inf, {"regular": 2.0, "total": 2.0}),
    ]:
        trainer.best_models.keep("regular", value, tmp_path, lambda kind, folder: trainer.write_model(str(folder)))
        assert trainer.best_models.values == kept


def test_metrics_can_be_printed_and_saved_by_the_methods_of_trainer(tmp_path, capsys):
    trainer = build_trainer(tmp_path)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    assert "eval_segm_AP50" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_per_class"] == metrics["eval_per_class"]


def test_after_a_run_without_evaluation_the_model_holds_the_average(tmp_path):
    trainer = build_trainer(tmp_path, small_data(), eval_strategy="no", save_strategy="epoch")
    trainer.model.config.score_thresholds = {0: 0.4}
    trainer.train()
    assert trainer.model.config.score_thresholds is None  # they were those of the weights before
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    saved = load_file(last / "rf_detr_training_weights.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, saved[f"average.{name}"])
    assert not torch.equal(saved["average.class_embed.weight"], saved["weights.class_embed.weight"])


@pytest.mark.parametrize("use_ema", [False, True])
def test_training_stops_early_when_the_metric_stops_improving(use_ema, tmp_path, monkeypatch):
    base = iter([0.1, 0.3, 0.4, 0.4, 0.4, 0.4])
    average = iter([0.2, 0.2, 0.2, 0.2, 0.2, 0.2])
    original = RfDetrTrainer.evaluate

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        original_loop = self.evaluation_loop

        def loop(*args: Any, **kwargs: Any) -> Any:
            output = original_loop(*args, **kwargs)
            output.metrics.update({"eval_segm_AP": next(average), "eval_base_segm_AP": next(base)})
            return output

        monkeypatch.setattr(self, "evaluation_loop", loop)
        try:
            return original(self, *args, **kwargs)
        finally:
            monkeypatch.setattr(self, "evaluation_loop", original_loop)

    monkeypatch.setattr(RfDetrTrainer, "evaluate", evaluate)
    trainer = build_trainer(
        tmp_path,
        trainer={"train_dataset": drawn(2), "eval_dataset": drawn(1, 100)},
        num_train_epochs=6,
        eval_base_model=True,
        early_stopping=True,
        early_stopping_patience=2,
        early_stopping_use_ema=use_ema,
    )
    trainer.train()
    # The average does not improve after the first epoch, the weights not after the third; patience is two more.
    assert trainer.state.epoch == (3 if use_ema else 5)
    assert trainer.state.best_metric == 0.4
