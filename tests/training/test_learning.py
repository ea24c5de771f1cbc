"""Training reaches a high AP on two images, and the command of `make demo` works."""

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from transformers_rfdetr import RfDetrForInstanceSegmentation
from transformers_rfdetr.cli import demo
from transformers_rfdetr.cli.evaluate import format_numbers
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_instance_segmentation
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import small_config
from training_run import QUICK, on_two_processes


@pytest.mark.long
def test_two_images_are_learned_to_a_mask_ap_of_0_9(tmp_path):
    images, coco = draw_dataset(2, (96, 96), metres_per_pixel=0.3, classes=["building"])
    data = InstanceDataset(coco, images)
    backbone = {"hidden_size": 64, "image_size": 96, "patch_size": 8}
    config = small_config(
        backbone_config=backbone,
        d_model=64,
        decoder_ffn_dim=128,
        decoder_layers=1,
        num_queries=8,
        mask_downsample_ratio=2,
        num_labels=1,
    )
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(config)
    with torch.no_grad():
        for biases in (model.class_embed, *model.transformer.enc_out_class_embed):
            biases.bias.fill_(-1.0)  # scores start at 0.27 instead of 0.01, so that they need fewer steps
    settings = QUICK | {
        "num_train_epochs": 180,
        "learning_rate": 2e-3,
        "learning_rate_encoder": 2e-3,
        "layer_decay": 1.0,
        "component_decay": 1.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "ema_decay": 0.95,
        "multi_scale": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 50,
    }
    arguments = RfDetrTrainingArguments(str(tmp_path), **settings)
    trainer = RfDetrTrainer(model, arguments, train_dataset=data, eval_dataset=None, augmentation=None)
    trainer.train()
    metrics = trainer.evaluate(data)
    assert metrics["eval_segm_AP"] >= 0.9
    assert metrics["eval_mean_iou"] >= 0.9

    # pycocotools by itself, on what the trainer predicts.
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = copy.deepcopy(coco)
        ground_truth.createIndex()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(trainer.predict(data).predictions), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert metrics["eval_segm_AP"] == pytest.approx(evaluation.stats[0], abs=1e-9)
    assert metrics["eval_segm_AP75"] == pytest.approx(evaluation.stats[2], abs=1e-9)
    assert metrics["eval_segm_AR_1"] == pytest.approx(evaluation.stats[6], abs=1e-9)

    # Seven images, two of them known: the same numbers for every batch size, outside training and on two processes.
    model.save_pretrained(tmp_path / "model")
    expected = trainer_of(str(tmp_path)).evaluate()
    assert 0.05 < expected["eval_segm_AP"] < 0.9
    others = [trainer_of(str(tmp_path), per_device_eval_batch_size=size).evaluate() for size in (1, 7)]
    others += on_two_processes(tmp_path, evaluate_of_one_rank)
    outside = evaluate_instance_segmentation(model, trainer.processing_class, seven_images(), progress=False)
    others.append({f"eval_{key}": value for key, value in outside.items()} | {"eval_loss": expected["eval_loss"]})
    for metrics in others:
        for key, value in expected.items():
            if any(part in key for part in ("_AP", "_AR", "mean_iou", "loss")):
                assert metrics[key] == pytest.approx(value, rel=1e-5), key


def seven_images() -> InstanceDataset:
    images, coco = draw_dataset(7, (96, 96), metres_per_pixel=0.3, classes=["building"])
    return InstanceDataset(coco, images)


def trainer_of(folder: str, **settings: Any) -> RfDetrTrainer:
    model = RfDetrForInstanceSegmentation.from_pretrained(f"{folder}/model")
    arguments = RfDetrTrainingArguments(folder, **(QUICK | settings))
    return RfDetrTrainer(model, arguments, eval_dataset=seven_images())


def evaluate_of_one_rank(folder: str) -> dict[str, Any]:
    return trainer_of(folder).evaluate()


def test_the_demo_trains_saves_loads_and_draws(tmp_path):
    options = ["--output", str(tmp_path), "--steps", "2", "--train", "16", "--validation", "8"]
    result = CliRunner().invoke(demo.app, options)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert format_numbers(metrics) in result.stdout
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "washer" in (tmp_path / "report.html").read_text()
    sheet = np.asarray(Image.open(tmp_path / "predictions.png"))
    side, gap = 288, 5
    assert sheet.shape[0] > 4 * side + 3 * gap
    assert sheet.shape[1] == 3 * side + 2 * gap
    image, ground_truth = sheet[-side:, :side], sheet[-side:, side + gap : -side - gap]
    assert not np.array_equal(image, ground_truth)
    files = {path.name for path in (tmp_path / "data" / "valid").iterdir()}
    assert len(files) == 9
    assert "_annotations.coco.json" in files


@pytest.mark.parametrize("option", ["--steps", "--train", "--validation"])
def test_the_demo_refuses_a_run_without_steps_or_images(option):
    result = CliRunner().invoke(demo.app, [option, "0"])
    assert result.exit_code == 2
    assert option in result.stderr
