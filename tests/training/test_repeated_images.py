"""Training with repeated images: the samples of an epoch on two processes, a resumed run, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from transformers_rfdetr.data.class_balance import ClassBalance
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.prepared import collate_fn
from transformers_rfdetr.data.streams import InstanceStream
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import small_model
from training_run import PLAIN, QUICK, on_two_processes

BALANCE = 0.7  # with 2 of 10 images: 8 + 2 sqrt(0.7 / 0.2) = 11.7 samples, rounded up to 12


def two_classes() -> InstanceDataset:
    """Ten images of a square each, of class a, and in images 0 and 1 of class b."""
    images = [Image.new("RGB", (48, 48), (20 * i, 90, 255 - 20 * i)) for i in range(10)]
    entries = [{"id": i, "file_name": f"{i}.png", "height": 48, "width": 48} for i in range(10)]
    square = {"bbox": [8, 8, 20, 20], "segmentation": [[8, 8, 28, 8, 28, 28, 8, 28]], "iscrowd": 0, "area": 400}
    annotations = [square | {"id": i + 1, "image_id": i, "category_id": 1 + (i < 2)} for i in range(10)]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    return InstanceDataset({"images": entries, "annotations": annotations, "categories": categories}, images)


def build(folder: Path | str, seen: list[int] | None = None, **settings: Any) -> RfDetrTrainer:
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        if seen is not None:
            seen.extend(sample["labels"]["image_id"].item() for sample in samples)
        return collate_fn(samples)

    given = QUICK | PLAIN | {"gradient_accumulation_steps": 1, "class_balance": BALANCE, "logging_steps": 1} | settings
    arguments = RfDetrTrainingArguments(str(folder), **given)
    model = small_model(num_labels=2).train()
    return RfDetrTrainer(model, arguments, data_collator=collate, train_dataset=two_classes())


def train_and_note_images(folder: str) -> dict[str, Any]:
    seen: list[int] = []
    trainer = build(folder, seen)
    trainer.train()
    return {"seen": seen, "steps": trainer.state.global_step, "state": trainer.model.state_dict()}


def test_two_processes_divide_the_samples_of_each_epoch(tmp_path):
    ranks = on_two_processes(tmp_path, train_and_note_images)
    balance = ClassBalance(two_classes().classes_of_images(), BALANCE, seed=42)
    assert [rank["steps"] for rank in ranks] == [6, 6]  # 2 epochs of 12 samples in steps of 2 x 2
    for epoch in range(2):
        seen = [image for rank in ranks for image in rank["seen"][6 * epoch : 6 * epoch + 6]]
        assert Counter(seen) == Counter(balance.images(epoch).tolist())
    first, second = (rank["state"] for rank in ranks)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_resumed_run_reads_the_same_images_and_ends_with_the_same_weights(tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": 8, "ema": True}
    whole = build(tmp_path / "whole", **settings)
    whole.train()  # 6 steps an epoch
    assert (whole.state.max_steps, whole.state.epoch) == (12, 2)
    assert "an epoch has 12 samples of 10 images; repeated: b x 1.9" in capsys.readouterr().out
    resumed = build(tmp_path / "resumed", **settings, dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, resumed)]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]


def test_data_whose_images_are_not_known_is_refused(tmp_path):
    arguments = RfDetrTrainingArguments(str(tmp_path), **(QUICK | PLAIN), class_balance=0.5, max_steps=1)
    with pytest.raises(ValueError, match=r"class_balance.* got InstanceStream. Load it without streaming"):
        RfDetrTrainer(small_model(), arguments, train_dataset=InstanceStream(None, None, {1: "a"}))
    with pytest.raises(ValueError, match=r"class_balance.* must be in \(0, 1\], got 2"):
        RfDetrTrainingArguments(str(tmp_path), class_balance=2)
