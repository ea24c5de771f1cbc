"""transformers' own Trainer: what it passes to metrics, training that learns, and a run that resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor

from small_models import pixels, shared_folder, small_config, small_model, targets


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """The guide's collator."""
    out = {"pixel_values": torch.stack([x["pixel_values"] for x in batch]), "labels": [x["labels"] for x in batch]}
    if "pixel_mask" in batch[0]:
        out["pixel_mask"] = torch.stack([x["pixel_mask"] for x in batch])
    return out


def random_dataset(counts: list[int]) -> list[dict]:
    images, labels = pixels(len(counts)), targets(*counts)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def nuclei(folder: Path, split: str, count: int) -> list[dict[str, Any]]:
    """Return microscopy images at 48 px with their labels."""
    coco = json.loads((folder / "annotations.json").read_text())
    processor, samples = RfDetrImageProcessor.from_config(small_config()), []
    for image in [image for image in coco["images"] if image["split"] == split][:count]:
        annotations = [one | {"category_id": 0} for one in coco["annotations"] if one["image_id"] == image["id"]]
        target = {"image_id": image["id"], "annotations": annotations}
        with Image.open(folder / "images" / image["file_name"]) as opened:
            encoded = processor(opened, target, return_segmentation_masks=True, return_tensors="pt")
        samples.append({"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]})
    return samples


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "remove_unused_columns": False,
        "eval_do_concat_batches": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | settings))


def test_evaluate_passes_the_loss_dict_logits_boxes_and_masks_to_the_metric(tmp_path):
    model, dataset = small_model(), random_dataset([2, 0, 1, 3])
    seen = {}

    def compute_metrics(evaluation) -> dict[str, float]:
        seen["predictions"], seen["labels"] = evaluation.predictions, evaluation.label_ids
        return {"batches": float(len(evaluation.predictions))}

    trainer = Trainer(model, arguments(tmp_path), data_collator=collate, compute_metrics=compute_metrics)
    metrics = trainer.evaluate(dataset)
    assert metrics["eval_batches"] == 2
    for batch, predictions in enumerate(seen["predictions"]):
        expected = model(torch.stack([dataset[2 * batch + i]["pixel_values"] for i in range(2)]))
        assert len(predictions) == 4
        assert "loss_mask_dice_enc" in predictions[0]
        torch.testing.assert_close(torch.as_tensor(predictions[1]), expected.logits)
        torch.testing.assert_close(torch.as_tensor(predictions[2]), expected.pred_boxes)
        torch.testing.assert_close(torch.as_tensor(predictions[3]), expected.pred_masks)  # the guide's pred_batch[3]
    counts = [len(label["class_labels"]) for batch in seen["labels"] for label in batch]
    assert counts == [2, 0, 1, 3]
    losses = [model(**collate(dataset[i : i + 2])).loss.item() for i in (0, 2)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_a_batch_without_objects_trains_and_bf16_and_checkpointing_are_flags(tmp_path):
    name = "gradient_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        name = "activation_checkpointing"  # since 5.23
    settings = arguments(tmp_path, max_steps=2, bf16=True, save_strategy="no", **{name: True})
    model = small_model()
    before = model.class_embed.weight.clone()
    Trainer(model, settings, data_collator=collate, train_dataset=random_dataset([0, 0, 0, 0])).train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not torch.equal(model.class_embed.weight, before)


def test_training_on_real_images_learns_and_resumes_to_the_weights_of_an_uninterrupted_run(tmp_path):
    folder = shared_folder("dsb2018_nuclei")
    train, validation = nuclei(folder, "train", 16), nuclei(folder, "val", 6)
    schedule = {"num_train_epochs": 4, "save_strategy": "epoch", "learning_rate": 1e-3, "logging_steps": 1, "seed": 3}

    def run(name: str, resume: str | None = None) -> tuple[Trainer, dict]:
        torch.manual_seed(0)
        model = RfDetrForInstanceSegmentation(small_config(num_labels=1, num_queries=16))
        trainer = Trainer(
            model,
            arguments(tmp_path / name, **schedule),
            data_collator=collate,
            train_dataset=train,
            eval_dataset=validation,
        )
        before = trainer.evaluate() if resume is None else {}
        trainer.train(resume_from_checkpoint=resume)
        return trainer, before

    whole, before = run("whole")
    assert whole.evaluate()["eval_loss"] < 0.9 * before["eval_loss"]
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])

    half = str(tmp_path / "whole" / f"checkpoint-{whole.state.max_steps // 2}")
    resumed, _ = run("resumed", half)
    assert resumed.state.global_step == whole.state.global_step
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name

    last = tmp_path / "whole" / f"checkpoint-{whole.state.max_steps}"
    loaded = RfDetrForInstanceSegmentation.from_pretrained(last)
    assert all(torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_the_best_model_is_loaded_back_at_the_end(tmp_path):
    settings = arguments(
        tmp_path,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        learning_rate=1e-3,
    )
    dataset = random_dataset([2, 1, 3, 1])
    model = small_model()
    trainer = Trainer(model, settings, data_collator=collate, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    best = RfDetrForInstanceSegmentation.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in best.state_dict().items())
