"""`RfDetrTrainer`: an evaluation that is exact, a run that resumes, gradients that do not depend on the batching."""

import copy
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from transformers import AutoModelForInstanceSegmentation, TrainerCallback, TrainingArguments

from transformers_rfdetr import RfDetrConfig, RfDetrForObjectDetection, RfDetrImageProcessor
from transformers_rfdetr.data.dataset import InstanceDataset, InstanceDatasets
from transformers_rfdetr.data.load import load_instance_dataset
from transformers_rfdetr.data.prepared import collate_fn
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.evaluation.coco_evaluator import evaluate_instance_segmentation
from transformers_rfdetr.model import modeling_rf_detr
from transformers_rfdetr.model.loss_rf_detr import fixed_points
from transformers_rfdetr.training.checkpoints import newest_checkpoint
from transformers_rfdetr.training.distributed import copy_full_tensor, full_tensor
from transformers_rfdetr.training.optimization import parameter_groups
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments
from transformers_rfdetr.training.weight_average import WeightAverage

import training_run
from faults import attempt
from small_models import pixels, small_config, small_model, targets
from training_run import QUICK, build_trainer, drawn, on_two_processes

TIMING = ("runtime", "per_second", "preparation_time")


def untimed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMING)} for entry in entries]


def same_numbers(metrics: dict[str, Any], others: dict[str, Any], prefix: str, other_prefix: str = "") -> None:
    """Every number of COCO, mean IoU and per class: equal."""
    for key, value in others.items():
        if key.startswith(other_prefix + "per_class"):
            assert metrics[prefix + key.removeprefix(other_prefix)] == value
        elif any(part in key for part in ("_AP", "_AR", "mean_iou")):
            assert metrics[prefix + key.removeprefix(other_prefix)] == pytest.approx(value, abs=1e-12), key


# -- arguments -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_recipes(tmp_path):
    args = RfDetrTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.learning_rate_encoder, args.weight_decay) == (1e-4, 1.5e-4, 1e-4)
    assert (args.layer_decay, args.component_decay, args.max_grad_norm) == (0.8, 0.7, 0.1)
    assert (args.ema, args.ema_decay, args.ema_tau) == (True, 0.993, 100)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert (args.num_train_epochs, args.lr_drop_epochs, args.lr_scheduler_type) == (100, 100, "constant_with_warmup")
    assert (args.early_stopping_patience, args.early_stopping_min_delta) == (10, 0.001)
    assert (args.metric_for_best_model, args.greater_is_better, args.load_best_model_at_end) == ("segm_AP", True, True)
    assert not args.remove_unused_columns
    assert not args.bf16
    assert not args.fp16


def test_without_evaluation_nothing_is_loaded_at_the_end(tmp_path):
    assert not RfDetrTrainingArguments(str(tmp_path), eval_strategy="no", use_cpu=True).load_best_model_at_end


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate_encoder", -1.0),
        ("layer_decay", 0.0),
        ("num_train_epochs", float("nan")),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", float("inf")),
        ("weight_decay", -1),
        ("dataloader_num_workers", -1),
        ("seed", -1),
        ("component_decay", 1.1),
        ("lr_drop_epochs", 0),
        ("ema_decay", 1.0),
        ("ema_tau", -1),
        ("drop_path", 1.0),
        ("early_stopping_patience", 0),
        ("early_stopping_min_delta", -0.1),
        ("eval_score_threshold", 1.5),
    ],
)
def test_an_argument_out_of_its_range_is_refused_with_its_value_and_rule(name, value, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}.* got {value}"):
        RfDetrTrainingArguments(str(tmp_path), **{name: value})


def test_the_learning_rates_of_dinov2_are_those_of_the_reference():
    config = small_config(backbone_config={"out_indices": [3, 6, 9, 12], "num_hidden_layers": 12})
    model = RfDetrForObjectDetection(config)
    groups = parameter_groups(
        model,
        learning_rate=1e-4,
        learning_rate_encoder=1.5e-4,
        layer_decay=0.8,
        component_decay=0.7,
        weight_decay=1e-4,
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    encoder = "backbone.0.encoder.encoder."
    for name, rate, decay in [
        ("embeddings.cls_token", 3.23e-6, 0.0),
        ("embeddings.patch_embeddings.projection.weight", 3.23e-6, 0.0),
        ("encoder.layer.0.attention.attention.query.weight", 4.04e-6, 1e-4),
        ("encoder.layer.11.layer_scale1.lambda1", 4.70e-5, 1e-4),
        ("encoder.layer.11.mlp.fc1.bias", 4.70e-5, 0.0),
        ("layernorm.weight", 7.35e-5, 0.0),
    ]:
        assert found[encoder + name] == (pytest.approx(rate, rel=2e-3), decay), name
    assert found["transformer.decoder.layers.0.norm1.bias"] == (pytest.approx(7e-5), 1e-4)
    assert found["class_embed.bias"] == (1e-4, 1e-4)
    assert encoder + "embeddings.mask_token" not in found


# -- refusals --------------------------------------------------------------------------------------------------------


def test_several_gpus_in_one_process_are_refused_with_the_command_to_use(tmp_path, monkeypatch):
    monkeypatch.setattr(RfDetrTrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match=r"torchrun --nproc_per_node=4"):
        build_trainer(tmp_path)


def test_a_metric_that_no_evaluation_has_is_refused_before_the_first_step(tmp_path):
    build_trainer(tmp_path, metric_for_best_model="eval_segm_AP/building")
    splits = {"val": drawn(2, 100), "val_hard": drawn(2, 100)}
    build_trainer(tmp_path, {"eval_dataset": splits}, metric_for_best_model="val_hard_segm_AP")
    for name in ("nosuch", "eval_segm_ap"):
        with pytest.raises(ValueError, match=f"metric_for_best_model.* segm_AP50,.*'{name}'"):
            build_trainer(tmp_path, metric_for_best_model=name)


def test_compute_metrics_and_plain_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics"):
        build_trainer(tmp_path, trainer={"compute_metrics": lambda evaluation: {}})
    with pytest.raises(ValueError, match="`args` must be RfDetrTrainingArguments, got TrainingArguments"):
        RfDetrTrainer(small_model(), TrainingArguments(str(tmp_path)))


def test_other_classes_than_the_models_are_refused_and_nameless_ones_are_adopted(tmp_path):
    args = RfDetrTrainingArguments(str(tmp_path), **QUICK)
    with pytest.raises(ValueError, match=r"model.* 1 classes \{0: building\}.*2 classes .*car"):
        RfDetrTrainer(
            small_model(id2label={0: "car", 1: "bus"}, num_labels=2),
            args,
            train_dataset=drawn(1),
            eval_dataset=drawn(1),
        )
    model = small_model(num_labels=1)
    RfDetrTrainer(model, args, train_dataset=drawn(1), eval_dataset=drawn(1))
    assert (model.config.id2label, model.config.label2id) == ({0: "building"}, {"building": 0})
    assert model.config.category_ids == [1]
    model.save_pretrained(tmp_path / "saved")
    assert RfDetrConfig.from_pretrained(tmp_path / "saved").category_ids == [1]


def test_what_is_no_split_is_refused_before_the_first_step(tmp_path):
    data = InstanceDatasets({"train": drawn(1), "validation": drawn(1)})
    with pytest.raises(ValueError, match=r"data\['validation'\]"):
        build_trainer(tmp_path, trainer={"eval_dataset": data})
    with pytest.raises(ValueError, match=r"data\['train'\]"):
        build_trainer(tmp_path, trainer={"train_dataset": data})
    with pytest.raises(ValueError, match=r"rows of \['image'\].*load_instance_dataset"):
        build_trainer(tmp_path, trainer={"train_dataset": datasets.Dataset.from_dict({"image": [1]})})


def test_an_evaluation_set_of_other_ids_leaves_those_of_training_in_the_configuration(tmp_path):
    pictures, coco = draw_dataset(1, (96, 96))
    coco["categories"] = [{"id": 77, "name": "building"}]
    coco["annotations"] = [item | {"category_id": 77} for item in coco["annotations"]]
    trainer = build_trainer(tmp_path)
    assert trainer.evaluate(InstanceDataset(coco, pictures))["eval_per_class"]["building"]["num_objects"] > 0
    assert trainer.model.config.category_ids == [1]


def test_a_model_of_transformers_itself_is_refused(tmp_path):
    args = RfDetrTrainingArguments(str(tmp_path), **QUICK)
    with pytest.raises(ValueError, match="import transformers_rfdetr"):
        RfDetrTrainer(torch.nn.Linear(1, 1), args, train_dataset=drawn(1), eval_dataset=drawn(1))


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_evaluation_outside_training_whatever_the_batch(tmp_path):
    data = drawn(7, 100)
    trainers = [build_trainer(tmp_path, per_device_eval_batch_size=size) for size in (1, 3, 7)]
    expected = evaluate_instance_segmentation(trainers[0].model, trainers[0].processing_class, data, progress=False)
    metrics = [trainer.evaluate() for trainer in trainers]
    for one in metrics:
        same_numbers(one, expected, "eval_")
        assert one["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-5)
        assert one["eval_mean_iou"] > 0


def test_the_evaluation_loss_is_that_of_one_batch_with_all_pictures(tmp_path):
    trainer = build_trainer(tmp_path, per_device_eval_batch_size=2)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(7)])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_predict_gives_detections_in_the_form_of_coco_results(tmp_path):
    data = drawn(3, 100)
    output = build_trainer(tmp_path).predict(data)
    assert {found["image_id"] for found in output.predictions} == {100, 101, 102}
    assert {found["category_id"] for found in output.predictions} == {1}
    assert output.predictions[0]["segmentation"]["size"] == [96, 96]
    assert "test_segm_AP" in output.metrics


def test_prepared_samples_are_evaluated_against_the_annotations_given(tmp_path):
    data = drawn(4, 100)
    expected = build_trainer(tmp_path).evaluate(data)
    trainer = build_trainer(tmp_path)
    samples = [data.with_processor(trainer.processing_class)[i] for i in range(4)]
    with pytest.raises(ValueError, match="eval_annotations"):
        trainer.evaluate(samples)
    with pytest.raises(ValueError, match="eval_annotations"):
        build_trainer(tmp_path, trainer={"eval_dataset": samples})
    truth = data.coco()  # prepared samples have class indices as category ids
    with pytest.raises(ValueError, match=r"class indices 0 .. 0.*category ids \[1\]"):
        build_trainer(tmp_path, trainer={"eval_annotations": truth}).evaluate(samples)
    truth["categories"] = [{"id": 0, "name": "building"}]
    truth["annotations"] = [annotation | {"category_id": 0} for annotation in truth["annotations"]]
    trainer = build_trainer(tmp_path, trainer={"eval_annotations": truth})
    same_numbers(trainer.evaluate(samples), expected, "eval_", "eval_")


def test_a_detection_model_reports_boxes(tmp_path):
    torch.manual_seed(0)
    model = RfDetrForObjectDetection(small_config(num_labels=1))
    args = RfDetrTrainingArguments(str(tmp_path), **(QUICK | {"num_train_epochs": 1}))
    trainer = RfDetrTrainer(model, args, train_dataset=drawn(4), eval_dataset=drawn(4, 100))
    trainer.train()
    assert trainer.args.metric_for_best_model == "bbox_AP"
    assert args.metric_for_best_model == "segm_AP"  # another trainer may take the same arguments
    assert not any("segm" in key for entry in trainer.state.log_history for key in entry)


def test_another_score_threshold_is_named_in_log_and_card(tmp_path, hf_log):
    trainer = build_trainer(tmp_path, eval_score_threshold=0.7, max_steps=1, save_strategy="no", eval_strategy="no")
    assert "up to a score of 0.7" in hf_log.text
    assert len(trainer.predict(drawn(3, 100)).predictions) < len(build_trainer(tmp_path).predict(drawn(3, 100))[0])
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "up to a score of 0.7" in (tmp_path / "README.md").read_text()


# -- the average, the best model -------------------------------------------------------------------------------------


BY_LOSS = {"num_train_epochs": 3, "metric_for_best_model": "loss"}


def least_of(history: list[dict[str, Any]], key: str) -> float:
    return min(entry[key] for entry in history if key in entry)


def evaluate_folder(folder: Path, output: Path) -> dict[str, Any]:
    trainer = build_trainer(output)
    trainer.model.load_state_dict(AutoModelForInstanceSegmentation.from_pretrained(folder).state_dict())
    assert RfDetrImageProcessor.from_pretrained(folder).size == trainer.processing_class.size
    return trainer.evaluate()


def test_the_average_is_evaluated_once_an_epoch_and_the_best_checkpoint_scores_the_same(tmp_path):
    trainer = build_trainer(tmp_path / "run", **BY_LOSS)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_segm_AP" in entry]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert not any("eval_base" in key for entry in history for key in entry)
    assert least_of(history, "eval_loss") == trainer.state.best_metric
    [best] = [entry for entry in history if entry["eval_loss"] == trainer.state.best_metric]
    for folder in ("best_total", "best_ema", Path(trainer.state.best_model_checkpoint).name):
        found = evaluate_folder(tmp_path / "run" / folder, tmp_path)
        same_numbers(best, {key: found[key] for key in best if "AP" in key or "mean_iou" in key}, "eval_", "eval_")
        assert found["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    saved = load_file(tmp_path / "run" / "best_total" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert {path.name for path in (tmp_path / "run" / "best_total").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert not list((tmp_path / "run").glob(".*"))


def test_with_eval_base_model_the_folder_holds_the_best_of_both_and_the_better_of_them(tmp_path):
    trainer = build_trainer(tmp_path / "run", eval_base_model=True, ema_decay=0.9, **BY_LOSS)
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


def test_several_sets_are_evaluated_and_the_first_decides(tmp_path):
    sets = {"near": drawn(3, 100), "far": drawn(3, 200)}
    trainer = build_trainer(tmp_path, trainer={"eval_dataset": sets}, metric_for_best_model="loss", num_train_epochs=1)
    trainer.train()
    [near] = [entry["eval_near_loss"] for entry in trainer.state.log_history if "eval_near_loss" in entry]
    assert trainer.state.best_metric == near
    assert any("eval_far_segm_AP" in entry for entry in trainer.state.log_history)


def test_a_second_run_of_a_trainer_forgets_the_first(tmp_path):
    trainer = build_trainer(tmp_path, **(BY_LOSS | {"num_train_epochs": 1}))
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


def test_the_numbers_can_be_printed_and_saved_by_transformers_helpers(tmp_path, capsys):
    trainer = build_trainer(tmp_path)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    assert "eval_segm_AP50" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_per_class"] == metrics["eval_per_class"]


def test_after_a_run_without_evaluation_the_model_holds_the_average(tmp_path):
    trainer = build_trainer(tmp_path, eval_strategy="no", save_strategy="epoch")
    trainer.train()
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    saved = load_file(last / "rf_detr_training_weights.safetensors")
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, saved[f"average.{name}"])
    assert not torch.equal(saved["average.class_embed.weight"], saved["weights.class_embed.weight"])


@pytest.mark.parametrize("use_ema", [False, True])
def test_training_stops_early_when_the_deciding_metric_stays(use_ema, tmp_path, monkeypatch):
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
        trainer={"train_dataset": drawn(2)},
        num_train_epochs=6,
        eval_base_model=True,
        early_stopping=True,
        early_stopping_patience=2,
        early_stopping_use_ema=use_ema,
    )
    trainer.train()
    # The average stays after the first epoch, the weights after the third; two more without an improvement end it.
    assert trainer.state.epoch == (3 if use_ema else 5)
    assert trainer.state.best_metric == 0.4


# -- steps -----------------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """The gradients of the first update, and the sizes of the batches."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = getattr(model, "module", model)
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


COUNTS = [3, 0, 1, 5]  # objects of each picture; one micro-batch of one picture is empty


def one_update(folder: Path | str, batch_size: int, accumulation: int, world: int = 1) -> Gradients:
    images, labels = pixels(4), targets(*COUNTS)
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    settings = QUICK | {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "ema": False,
    }
    gradients = Gradients()
    trainer = RfDetrTrainer(
        small_model(), RfDetrTrainingArguments(str(folder), **settings), train_dataset=samples, callbacks=[gradients]
    )
    trainer.train()
    gradients.log = trainer.state.log_history
    return gradients


def check_equal(gradients: Gradients, expected: Gradients) -> None:
    assert gradients.found.keys() == expected.found.keys()
    total = torch.stack([gradient.norm() for gradient in expected.found.values()]).norm()
    for name, gradient in expected.found.items():
        # (That of the keys' bias is nothing but rounding: softmax does not see it.)
        difference = (gradients.found[name] - gradient).norm() / torch.maximum(gradient.norm(), 1e-5 * total)
        assert difference < 1e-4, (name, difference)
    for key, value in expected.log[0].items():
        if "loss" in key:
            assert gradients.log[0][key] == pytest.approx(value, rel=1e-4), key


@pytest.fixture
def same_points(monkeypatch):
    monkeypatch.setattr(modeling_rf_detr, "random_points", fixed_points)


def test_an_update_is_the_same_for_1x4_2x2_and_4x1_micro_batches_one_of_them_empty(same_points, tmp_path):
    expected = one_update(tmp_path, 4, 1)
    for batch_size, accumulation in [(2, 2), (1, 4)]:
        check_equal(one_update(tmp_path, batch_size, accumulation), expected)
    # The sum of the losses of one batch of four, by hand: the model's own normaliser is the objects of the batch.
    model = small_model().train()
    model.zero_grad()
    size = training_size(48, step=0)
    images = torch.nn.functional.interpolate(pixels(4), (size, size), mode="bilinear", align_corners=False)
    model(images, labels=targets(*COUNTS)).loss.backward()
    for name, gradient in expected.found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def training_size(side: int, step: int, seed: int = 42) -> int:
    """The size that a step draws: numpy's generator of (seed, step) over the sizes that rfdetr's rule gives."""
    import numpy as np

    sizes = [blocks * 24 for blocks in range(max(2, side // 24 - 5), side // 24 + 6)]
    return sizes[np.random.default_rng([seed, step]).integers(len(sizes))]


def update_of_one_rank(folder: str) -> dict[str, Any]:
    modeling_rf_detr.random_points = fixed_points
    found = one_update(folder, 1, 2)
    return {"found": found.found, "log": found.log}


def test_an_update_is_the_same_on_two_processes(same_points, tmp_path):
    expected = one_update(tmp_path, 4, 1)
    for found in on_two_processes(tmp_path, update_of_one_rank):
        gradients = Gradients()
        gradients.found, gradients.log = found["found"], found["log"] or expected.log
        check_equal(gradients, expected)


def train_on_a_stream(folder: str) -> dict[str, Any]:
    """Three steps of two pictures; which pictures came, and what they left in the model."""
    pictures, coco = draw_dataset(12, (96, 96))
    objects = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"] and isinstance(annotation["segmentation"], list):
            objects[annotation["image_id"]].append(annotation)
    columns = ("id", "bbox", "category_id", "segmentation", "area", "iscrowd")
    rows = [
        {
            "image": picture,
            "image_id": key,
            "objects": {name: [found[name] for found in objects[key]] for name in columns},
        }
        for key, picture in enumerate(pictures)
    ]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    data = load_instance_dataset({"train": stream}, streaming=True, class_names={1: "building"})["train"]
    seen: list[int] = []

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(sample["labels"]["image_id"].item() for sample in samples)
        return collate_fn(samples)

    settings = {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no", "ema": False, "logging_steps": 1}
    trainer = build_trainer(
        folder, trainer={"train_dataset": data, "eval_dataset": None, "data_collator": collate}, **settings
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seen": seen, "losses": losses, "state": trainer.model.state_dict()}


def test_a_stream_is_divided_among_two_processes(tmp_path):
    first, second = on_two_processes(tmp_path, train_on_a_stream)
    assert sorted(first["seen"] + second["seen"]) == list(range(12))
    assert len(first["seen"]) == len(second["seen"]) == 6
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    assert len(first["losses"]) == 3
    assert all(math.isfinite(loss) for loss in first["losses"])


def average_of_shards(folder: str) -> dict[str, Any]:
    """The average of a model that FSDP has sharded, and of one that is whole, over the same steps."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    fully_shard(model, mesh=mesh)
    averages = [WeightAverage(one, decay=0.9, tau=5) for one in (model, twin)]
    for step in range(4):
        values = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        for one, average in zip((model, twin), averages, strict=True):
            copy_full_tensor(one.weight, values)
            average.update()
    again = WeightAverage(model)
    again.load_state_dict(averages[0].state_dict(), num_updates=4)
    with averages[0].in_model():
        inside = full_tensor(model.weight).clone()
    return {
        "states": [average.state_dict() for average in (*averages, again)],
        "inside": inside,
        "after": full_tensor(model.weight),
        "last": values,
    }


def test_the_average_of_sharded_weights_is_that_of_whole_ones(tmp_path):
    for found in on_two_processes(tmp_path, average_of_shards):
        sharded, expected, again = found["states"]
        assert expected["weight"].shape == (3, 5)
        assert all(torch.equal(sharded[name], expected[name]) for name in expected)
        assert all(torch.equal(again[name], expected[name]) for name in expected)
        assert torch.equal(found["inside"], expected["weight"])
        assert torch.equal(found["after"], found["last"])


def test_each_step_draws_its_size_and_pictures_come_at_the_largest(tmp_path, monkeypatch):
    sizes = []
    trainer = build_trainer(tmp_path, max_steps=6, eval_strategy="no", save_strategy="no")
    forward = trainer.model.forward

    def watched(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(pixel_values.shape[-1])
        return forward(pixel_values, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", watched)
    assert trainer.train_dataset[0]["pixel_values"].shape == (3, 168, 168)
    assert trainer.eval_dataset[0]["pixel_values"].shape == (3, 48, 48)
    trainer.train()
    assert sizes == [training_size(48, step) for step in range(6)]
    assert len(set(sizes)) > 1


def test_the_step_schedule_drops_after_its_epochs(tmp_path):
    trainer = build_trainer(
        tmp_path, num_train_epochs=3, lr_drop_epochs=2, warmup_steps=2, eval_strategy="no", save_strategy="no"
    )
    trainer.args.logging_steps = trainer.state.logging_steps = 1
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(rates) == 15
    peak = max(rates)
    factors = [rate / peak for rate in rates]
    # Logged before or after the scheduler's step, by version of transformers: the drop is at step 10 or 9.
    assert factors.count(pytest.approx(0.1)) in (5, 6)
    assert factors[:1] in ([pytest.approx(0.0)], [pytest.approx(0.5)])
    assert sorted(factors[2:], reverse=True) == factors[2:]


def test_frozen_dinov2_stays_and_drop_path_is_set(tmp_path):
    trainer = build_trainer(
        tmp_path, max_steps=2, eval_strategy="no", save_strategy="no", freeze_backbone=True, drop_path=0.3
    )
    layers = trainer.model.backbone[0].encoder["encoder"].encoder["layer"]
    assert [layer.drop_path_rate for layer in layers] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "class_embed.weight" in moved
    assert not any(name.startswith("backbone.0.encoder") for name in moved)


def test_the_terms_of_the_loss_add_up_to_it_in_the_log(tmp_path):
    settings = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no", "gradient_accumulation_steps": 2}
    trainer = build_trainer(tmp_path, **settings)
    trainer.model.config.auxiliary_loss = False
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    terms = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2, "loss_mask_ce": 5, "loss_mask_dice": 5}
    last = sum(weight * entry[name] for name, weight in terms.items())
    assert 0 < last < entry["loss"]  # the rest is the first stage
    assert math.isfinite(entry["loss"])


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="forks and kills a process")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_in_the_middle_of_an_epoch_resumes_bit_for_bit(workers, tmp_path):
    settings = {
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 4,  # at 8 neither an epoch (of 5) nor a log interval (of 3) ends
        "save_total_limit": None,
        "load_best_model_at_end": False,
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": 1,
        "early_stopping": True,
        "drop_path": 0.2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    }
    whole = build_trainer(tmp_path / "whole", **settings)
    whole.train()

    killed = tmp_path / "killed"

    def train_until_it_is_killed() -> None:
        build_trainer(killed, {"callbacks": [training_run.Die(11)]}, **settings).train()

    assert attempt(train_until_it_is_killed).signal == signal.SIGKILL
    (killed / "checkpoint-9").mkdir()  # a kill in the middle of a checkpoint leaves a folder without a state
    (killed / "checkpoint-12").mkdir()
    assert newest_checkpoint(str(killed)) == str(killed / "checkpoint-8")
    torch.manual_seed(123)  # nothing may depend on what was drawn before
    resumed = build_trainer(killed, **settings)
    resumed.train(resume_from_checkpoint=True)

    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert untimed(resumed.state.log_history) == untimed(whole.state.log_history)
    assert resumed.state.best_metric == whole.state.best_metric
    last = f"checkpoint-{whole.state.global_step}"
    for file in ("model.safetensors", "rf_detr_training_weights.safetensors"):
        ours, theirs = load_file(killed / last / file), load_file(tmp_path / "whole" / last / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (killed / last / "rf_detr_state.json").read_text() == (
        tmp_path / "whole" / last / "rf_detr_state.json"
    ).read_text()
    for file in ("optimizer.pt", "scheduler.pt"):
        ours, theirs = (torch.load(folder / last / file) for folder in (killed, tmp_path / "whole"))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_without_data_to_evaluate_training_goes_on_with_a_warning(tmp_path, hf_log):
    trainer = build_trainer(tmp_path, trainer={"eval_dataset": None}, num_train_epochs=1)
    trainer.train()
    assert "eval_dataset" in hf_log.text
    assert (tmp_path / "checkpoint-5" / "model.safetensors").is_file()


def test_no_whole_checkpoint_is_an_error_that_says_so(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        build_trainer(tmp_path).train(resume_from_checkpoint=True)


# -- what the user sees ----------------------------------------------------------------------------------------------


def test_a_table_of_the_classes_comes_before_the_first_step(tmp_path, capsys):
    build_trainer(tmp_path, max_steps=1, eval_strategy="no", save_strategy="no").train()
    assert "building" in capsys.readouterr().out


def test_pictures_with_more_objects_than_queries_are_named(tmp_path, hf_log):
    pictures, coco = draw_dataset(1, (96, 96))
    box = {"image_id": 0, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 9, 9], "area": 81.0}
    square = {"segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
    coco["annotations"] = [{**box, **square, "id": i} for i in range(1, 9)]
    data = InstanceDataset(coco, pictures)
    settings = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    build_trainer(tmp_path, trainer={"train_dataset": data}, **settings).train()
    assert "more objects than the model has queries (6)" in hf_log.text
    assert "000000.png (8)" in hf_log.text
