"""Arguments and datasets: what is refused before the first step, and what the user is told."""

from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.distributed
from torch.utils.data import ConcatDataset, Subset
from transformers import ProgressCallback, TrainerState, TrainingArguments

from transformers_rfdetr import RfDetrConfig, RfDetrForObjectDetection, RfDetrImageProcessor, analyse
from transformers_rfdetr.data.dataset import InstanceDataset, InstanceDatasets
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.training import callbacks
from transformers_rfdetr.training.callbacks import ShortProgress, TrainingEvents
from transformers_rfdetr.training.optimization import parameter_groups
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import small_config, small_model
from training_run import QUICK, assert_same_metrics, build_trainer, drawn


def test_the_defaults_are_the_published_training_settings(tmp_path):
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
def test_an_argument_out_of_range_is_refused_with_its_value(name, value, tmp_path):
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


def test_several_gpus_in_one_process_are_refused_with_the_command_to_use(tmp_path, monkeypatch):
    monkeypatch.setattr(RfDetrTrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match=r"torchrun --nproc_per_node=4"):
        build_trainer(tmp_path)


def test_a_metric_that_is_not_evaluated_is_refused_before_the_first_step(tmp_path):
    build_trainer(tmp_path, metric_for_best_model="eval_segm_AP/building")
    splits = {"val": drawn(2, 100), "val_hard": drawn(2, 100)}
    build_trainer(tmp_path, {"eval_dataset": splits}, metric_for_best_model="val_hard_segm_AP")
    for name in ("nosuch", "eval_segm_ap"):
        with pytest.raises(ValueError, match=f"metric_for_best_model.* segm_AP50,.*'{name}'"):
            build_trainer(tmp_path, metric_for_best_model=name)


def test_compute_metrics_and_plain_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics"):
        build_trainer(tmp_path, trainer={"compute_metrics": lambda evaluation: {}})
    with pytest.raises(ValueError, match=r"must be RfDetrTrainingArguments, got TrainingArguments\. Replace"):
        RfDetrTrainer(small_model(), TrainingArguments(str(tmp_path)))


def test_a_training_of_few_optimizer_steps_is_a_warning(monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(callbacks.logger, "warning", warnings.append)
    events = TrainingEvents(SimpleNamespace(begin_training=lambda: None))
    for steps, is_first, batch in ((299, True, 4), (300, True, 4), (1, False, 4), (1, True, 1)):
        args = SimpleNamespace(per_device_train_batch_size=batch)
        events.on_train_begin(args, TrainerState(max_steps=steps, is_world_process_zero=is_first), None)
    first, second = warnings
    assert first.startswith("This run has 299 optimizer steps, but a fine-tuning needs at least 300. Raise num_train")
    assert first.endswith("(on the command line, --epochs) or lower per_device_train_batch_size (--batch-size).")
    assert second.startswith("This run has 1 optimizer step, but")
    assert second.endswith("--epochs).")


def test_a_progress_of_the_user_is_kept(tmp_path):
    class Progress(ProgressCallback):
        pass

    trainer = build_trainer(tmp_path, {"callbacks": [Progress()]}, disable_tqdm=False)
    found = [type(one) for one in trainer.callback_handler.callbacks if isinstance(one, ProgressCallback)]
    assert found == [Progress, ShortProgress]


def test_other_classes_than_the_models_are_refused_and_classes_without_names_are_named(tmp_path):
    args = RfDetrTrainingArguments(str(tmp_path), **QUICK)
    with pytest.raises(ValueError, match=r"model.* 1 classes .*building.* 2 classes .*car"):
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


def test_all_splits_and_raw_rows_are_refused_before_the_first_step(tmp_path):
    data = InstanceDatasets({"train": drawn(1), "validation": drawn(1)})
    with pytest.raises(ValueError, match=r"data\['validation'\]"):
        build_trainer(tmp_path, trainer={"eval_dataset": data})
    with pytest.raises(ValueError, match=r"data\['train'\]"):
        build_trainer(tmp_path, trainer={"train_dataset": data})
    with pytest.raises(ValueError, match=r"rows of \['image'\].*load_instance_dataset"):
        build_trainer(tmp_path, trainer={"train_dataset": datasets.Dataset.from_dict({"image": [1]})})


WITHOUT_OBJECTS = {
    "images": ({"images": []}, "0 images"),
    "annotations": ({"annotations": []}, "4 images without annotations"),
    "objects": ({"iscrowd": 1}, r"4 images with \d+ crowds only"),
    "masks": ({"segmentation": []}, r"\d+ objects with boxes only"),
}


def without(kind: str) -> InstanceDataset:
    """Four images that lack something in all annotations."""
    images, coco = draw_dataset(4, (96, 96), classes=["building"])
    changes, _ = WITHOUT_OBJECTS[kind]
    if kind in ("objects", "masks"):
        coco["annotations"] = [one | changes for one in coco["annotations"]]
    else:
        coco |= {"annotations": []} | changes
    return InstanceDataset(coco, images if coco["images"] else [])


@pytest.mark.parametrize("kind", WITHOUT_OBJECTS)
def test_data_without_objects_are_refused_before_the_first_step(kind, tmp_path):
    found = WITHOUT_OBJECTS[kind][1]
    with pytest.raises(ValueError, match=f"train_dataset.* got {found}"):
        build_trainer(tmp_path, {"train_dataset": without(kind)})
    with pytest.raises(ValueError, match=f"eval_dataset.* segm_AP, got {found}"):
        build_trainer(tmp_path, {"eval_dataset": without(kind)})
    splits = {"empty": without(kind), "drawn": drawn(2, 100)}
    with pytest.raises(ValueError, match=f"eval_dataset.* segm_AP50, got {found}"):
        build_trainer(tmp_path, {"eval_dataset": splits}, metric_for_best_model="empty_segm_AP50")
    build_trainer(tmp_path, {"eval_dataset": splits}, metric_for_best_model="drawn_segm_AP")


def test_boxes_train_a_detection_model_and_evaluate_the_boxes_of_a_segmentation_model(tmp_path):
    args = RfDetrTrainingArguments(str(tmp_path), **QUICK)
    boxes = without("masks")
    RfDetrTrainer(RfDetrForObjectDetection(small_config(num_labels=1)), args, train_dataset=boxes, eval_dataset=boxes)
    images, coco = draw_dataset(4, (96, 96), classes=["building"])
    coco["categories"] = [*coco["categories"], {"id": 2, "name": "bus"}]
    coco["annotations"] = [one | {"segmentation": None} for one in coco["annotations"]]
    two_classes = InstanceDataset(coco, images)
    model = small_model(id2label={0: "building", 1: "bus"}, num_labels=2)
    args = RfDetrTrainingArguments(str(tmp_path), **QUICK, metric_for_best_model="bbox_AP")
    metrics = RfDetrTrainer(model, args, eval_dataset=two_classes).evaluate()
    assert 0 <= metrics["eval_bbox_AP/building"] <= 1
    assert not any("segm" in name for name in metrics)


def test_subsets_and_concatenations_are_trained_and_evaluated_as_the_images_that_they_hold(tmp_path):
    data = {"train_dataset": drawn(4), "eval_dataset": drawn(3, 100)}
    seven, two_parts = drawn(7, 97), [drawn(2), drawn(2, 2)]
    others = {"train_dataset": ConcatDataset(two_parts), "eval_dataset": Subset(seven, torch.tensor([3, 4, 5]))}
    settings = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no"}
    trainers = []
    for given in (data, others):
        trainers.append(build_trainer(tmp_path, given, **settings))  # which sets the seed
        trainers[-1].train()
    weights, same_weights = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(tensor, same_weights[name]) for name, tensor in weights.items())
    metrics, same_metrics = (trainer.evaluate() for trainer in trainers)
    assert_same_metrics(metrics, same_metrics, "eval_", "eval_")
    assert_same_metrics(trainers[0].evaluate(Subset(seven, [3, 4, 5])), metrics, "eval_", "eval_")
    analysis = analyse(trainers[0].model, trainers[0].processing_class, Subset(seven, [3, 4, 5]), progress=False)
    assert_same_metrics(metrics, analysis.metrics, "eval_")
    assert sorted(image.name for image in analysis.images) == ["000100.png", "000101.png", "000102.png"]


def test_concatenated_datasets_must_have_the_same_classes(tmp_path):
    images, coco = draw_dataset(2, (96, 96), classes=["building"])
    coco["categories"] = [{"id": 1, "name": "house"}]
    with pytest.raises(ValueError, match=r"same (classes|name)"):
        build_trainer(tmp_path, {"train_dataset": ConcatDataset([drawn(2), InstanceDataset(coco, images)])})


def test_the_configuration_keeps_the_category_ids_of_the_training_data(tmp_path):
    images, coco = draw_dataset(1, (96, 96), classes=["building"])
    coco["categories"] = [{"id": 77, "name": "building"}]
    coco["annotations"] = [item | {"category_id": 77} for item in coco["annotations"]]
    trainer = build_trainer(tmp_path)
    assert trainer.evaluate(InstanceDataset(coco, images))["eval_per_class"]["building"]["num_objects"] > 0
    assert trainer.model.config.category_ids == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (48, 60)}, r"`processing_class.size` must be a multiple of 24 .* got 60\. Try 48 or 72"),
        ({"size": 48, "pad_size": 50}, r"`processing_class.pad_size` must be a multiple of 24 .* got 50\. Try 48"),
    ],
)
@pytest.mark.parametrize("multi_scale", [True, False])
def test_images_that_do_not_fill_windows_are_refused_before_the_first_step(settings, message, multi_scale, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, {"processing_class": RfDetrImageProcessor(**settings)}, multi_scale=multi_scale)


def test_images_of_another_size_than_the_models_are_trained_with_a_warning(tmp_path, hf_log):
    build_trainer(tmp_path, {"processing_class": RfDetrImageProcessor(size=48)})
    one_edge = RfDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    build_trainer(tmp_path, {"processing_class": one_edge}, multi_scale=False)
    assert "resolution" not in hf_log.text
    trainer = build_trainer(tmp_path, {"processing_class": RfDetrImageProcessor(size=(72, 48))})
    assert "`model.config.resolution` is 48" in hf_log.text
    assert "Pass resolution=(72, 48) to from_pretrained" in hf_log.text
    assert trainer.eval_dataset[0]["pixel_values"].shape[-2:] == (72, 48)


def test_a_model_of_another_package_is_refused(tmp_path):
    args = RfDetrTrainingArguments(str(tmp_path), **QUICK)
    with pytest.raises(ValueError, match="import transformers_rfdetr"):
        RfDetrTrainer(torch.nn.Linear(1, 1), args, train_dataset=drawn(1), eval_dataset=drawn(1))


def test_training_without_an_eval_dataset_warns_and_saves(tmp_path, hf_log):
    trainer = build_trainer(tmp_path, {"eval_dataset": None, "train_dataset": drawn(4)}, num_train_epochs=1)
    trainer.train()
    assert hf_log.text.count("eval_dataset") == 1
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_a_table_of_the_classes_is_printed_before_the_first_step(tmp_path, capsys):
    build_trainer(tmp_path, max_steps=1, eval_strategy="no", save_strategy="no").train()
    assert "building" in capsys.readouterr().out


def test_objects_without_a_mask_and_images_with_more_objects_than_queries_are_reported(tmp_path, hf_log):
    images, coco = draw_dataset(1, (96, 96), classes=["building"])
    box = {"image_id": 0, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 9, 9], "area": 81.0}
    square = {"segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
    coco["annotations"] = [{**box, **square, "id": i} for i in range(1, 8)] + [{**box, "id": 8}]
    data = InstanceDataset(coco, images)
    settings = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    build_trainer(tmp_path, trainer={"train_dataset": data}, **settings).train()
    assert "more objects than the model has queries (6)" in hf_log.text
    assert "000000.png (8)" in hf_log.text
    assert "1 of 8 training objects have no mask" in hf_log.text
