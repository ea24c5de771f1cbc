"""hyperparameter_search of transformers with optuna."""

import pytest
import torch

from transformers_rfdetr import RfDetrForInstanceSegmentation
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import small_config
from training_run import QUICK, drawn

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def new_model() -> RfDetrForInstanceSegmentation:
    torch.manual_seed(0)
    return RfDetrForInstanceSegmentation(small_config(num_labels=1))


def test_each_trial_trains_a_new_model_and_the_best_by_the_metric_is_returned(tmp_path):
    rates = [1e-2, 0.0]  # the second trial learns nothing
    settings = {
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "num_train_epochs": 1,
        "multi_scale": False,
    }
    settings |= {"learning_rate_encoder": 0.0, "multi_scale": False}
    trainer = RfDetrTrainer(
        args=RfDetrTrainingArguments(str(tmp_path), **(QUICK | settings)),
        model_init=new_model,
        train_dataset=drawn(4),
        eval_dataset=drawn(3, 100),
    )
    before = trainer.evaluate()["eval_loss"]
    space = {"learning_rate": rates}
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler(space, seed=0),
    )
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert best.objective < before
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {"run-0", "run-1"}
    assert all((tmp_path / name / "best_total" / "model.safetensors").is_file() for name in folders)


def test_the_objective_is_the_metric_for_the_best_model_and_is_maximized(tmp_path, monkeypatch):
    given = {}

    def search(self, hp_space, compute_objective, n_trials, direction, **kwargs):
        given.update(objective=compute_objective({"eval_segm_AP": 0.3, "eval_per_class": {}}), direction=direction)

    monkeypatch.setattr("transformers.Trainer.hyperparameter_search", search)
    arguments = RfDetrTrainingArguments(str(tmp_path), **QUICK)
    trainer = RfDetrTrainer(args=arguments, model_init=new_model, train_dataset=drawn(1), eval_dataset=drawn(1))
    trainer.hyperparameter_search()
    assert given == {"objective": 0.3, "direction": "maximize"}


def test_a_search_without_model_init_says_so(tmp_path):
    arguments = RfDetrTrainingArguments(str(tmp_path), **QUICK)
    trainer = RfDetrTrainer(new_model(), arguments, train_dataset=drawn(1), eval_dataset=drawn(1))
    with pytest.raises(RuntimeError, match="model_init"):
        trainer.hyperparameter_search(backend="optuna")
