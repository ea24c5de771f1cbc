"""Evaluation by the trainer: exact, whatever the batch size, and in COCO's form."""

import pytest
import torch
import torch.distributed

from evaluation_cases import TWELVE, plain_cocoeval
from transformers_rfdetr import RfDetrForObjectDetection
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_dataset, evaluate_instance_segmentation
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import small_config
from training_run import QUICK, assert_same_metrics, build_trainer, drawn


def test_metrics_equal_those_outside_training_for_every_batch_size(tmp_path):
    data = drawn(7, 100)
    trainers = [build_trainer(tmp_path, per_device_eval_batch_size=size) for size in (1, 3, 7)]
    expected = evaluate_instance_segmentation(trainers[0].model, trainers[0].processing_class, data, progress=False)
    metrics = [trainer.evaluate() for trainer in trainers]
    for one in metrics:
        assert_same_metrics(one, expected, "eval_")
        assert one["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-5)
        assert one["eval_mean_iou"] > 0


def test_the_evaluation_loss_is_that_of_one_batch_with_all_images(tmp_path):
    trainer = build_trainer(tmp_path, per_device_eval_batch_size=2)
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(7)])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_only_an_evaluation_after_training_has_confidence_intervals_and_the_card_shows_them(tmp_path):
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "seed": 0}
    trainer = build_trainer(tmp_path, {"eval_dataset": drawn(10, 100)}, **settings)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "confidence intervals" not in (tmp_path / "README.md").read_text()
    found = trainer.evaluate()
    evaluator = evaluate_dataset(trainer.model, trainer.processing_class, drawn(10, 100), progress=False)
    expected = evaluator.compute(0.95)["intervals"]
    assert found["eval_intervals"] == {
        **{name: pytest.approx(expected[name], abs=1e-6) for name in expected if name != "per_class"},
        "per_class": found["eval_intervals"]["per_class"],
    }
    trainer.create_model_card()
    assert "95 % confidence intervals" in (tmp_path / "README.md").read_text()
    assert "eval_intervals" not in trainer.evaluate(drawn(9, 100))  # too few images for a card
    assert "eval_intervals" not in build_trainer(tmp_path, eval_confidence=None).evaluate(drawn(10, 100))


def test_predict_returns_detections_as_coco_results(tmp_path):
    data = drawn(3, 100)
    output = build_trainer(tmp_path).predict(data)
    oracle = plain_cocoeval(data.coco(), output.predictions, "segm").stats
    assert [output.metrics[f"test_segm_{name}"] for name in TWELVE] == pytest.approx(oracle, abs=1e-9)
    assert {found["image_id"] for found in output.predictions} == {100, 101, 102}
    assert {found["category_id"] for found in output.predictions} == {1}
    assert output.predictions[0]["segmentation"]["size"] == [96, 96]
    assert "test_segm_AP" in output.metrics


def test_the_ground_truth_of_several_evaluation_datasets_is_built_once_each(tmp_path, monkeypatch):
    data = {"one": drawn(2, 100), "other": drawn(3, 200)}
    trainer = build_trainer(tmp_path, trainer={"eval_dataset": data})
    built = []
    build = InstanceDataset.coco
    monkeypatch.setattr(InstanceDataset, "coco", lambda dataset: built.append(len(dataset)) or build(dataset))
    first, second = trainer.evaluate(), trainer.evaluate()
    names = [f"eval_{name}_segm_AR_100" for name in data]
    assert [first[name] for name in names] == [second[name] for name in names]
    assert built == [2, 3]


def test_prepared_samples_are_evaluated_against_eval_annotations(tmp_path):
    data = drawn(4, 100)
    expected = build_trainer(tmp_path).evaluate(data)
    trainer = build_trainer(tmp_path)
    samples = [data.with_processor(trainer.processing_class)[i] for i in range(4)]
    with pytest.raises(ValueError, match="eval_annotations"):
        trainer.evaluate(samples)
    with pytest.raises(ValueError, match="eval_annotations"):
        build_trainer(tmp_path, trainer={"eval_dataset": samples})
    ground_truth = data.coco()  # prepared samples have class indices as category ids
    with pytest.raises(ValueError, match=r"class indices 0 .. 0.*category ids \[1\]"):
        build_trainer(tmp_path, trainer={"eval_annotations": ground_truth}).evaluate(samples)
    ground_truth["categories"] = [{"id": 0, "name": "building"}]
    ground_truth["annotations"] = [one | {"category_id": 0} for one in ground_truth["annotations"]]
    trainer = build_trainer(tmp_path, trainer={"eval_annotations": ground_truth})
    assert_same_metrics(trainer.evaluate(samples), expected, "eval_", "eval_")


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
