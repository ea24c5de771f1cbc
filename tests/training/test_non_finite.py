"""A non-finite loss or gradient stops the run with the names of the images, or is skipped without a trace."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from transformers_rfdetr.data.prepared import collate_fn
from transformers_rfdetr.training.checkpoints import newest_checkpoint

from training_run import PLAIN, build_trainer, drawn, on_two_processes


class Poison:
    """A collator that adds NaN to the images of some ids, as decoders and transforms of users may."""

    def __init__(self, *image_ids: int) -> None:
        self.image_ids = image_ids

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate_fn(samples)
        for pixels, target in zip(batch["pixel_values"], batch["labels"], strict=True):
            if int(target["image_id"]) in self.image_ids:
                pixels[:, 5, 5] = float("nan")
        return batch


class Watch(TrainerCallback):
    """Record weights and logged losses of every optimizer step; drop the gradient of some steps."""

    def __init__(self, *dropped_steps: int) -> None:
        self.dropped_steps = dropped_steps
        self.losses: list[float] = []
        self.skipped: list[int] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in self.dropped_steps:
            kwargs["optimizer"].zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({name: tensor.clone() for name, tensor in kwargs["model"].state_dict().items()})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])
            self.skipped.append(kwargs["logs"].get("skipped_steps", 0))


def are_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def train_poisoned(folder: Path, *image_ids: int, **settings: Any) -> Watch:
    watch = Watch()
    trainer = build_trainer(folder, {"data_collator": Poison(*image_ids), "callbacks": [watch]}, **(PLAIN | settings))
    watch.train_loss = trainer.train().training_loss
    assert trainer.state.log_history[-1]["train_loss"] == watch.train_loss
    return watch


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return train_poisoned(tmp_path_factory.mktemp("skip"), 3, non_finite_loss="skip", logging_steps=1)


def test_a_skipped_step_changes_nothing_and_the_others_are_unaffected(skipping, tmp_path):
    skipped = [1 + index for index, count in enumerate(skipping.skipped) if count]
    assert [1 + (step - 1) // 3 for step in skipped] == [1, 2]  # one in each epoch
    by_hand = Watch(*skipped)
    build_trainer(tmp_path, {"callbacks": [by_hand]}, **PLAIN, logging_steps=1).train()
    for step, (ours, theirs) in enumerate(zip(skipping.weights, by_hand.weights, strict=True)):
        assert are_equal(ours, theirs), step
    for step, (ours, theirs) in enumerate(zip(skipping.losses, by_hand.losses, strict=True), start=1):
        assert math.isnan(ours) if step in skipped else ours == theirs, step


def test_the_logged_mean_excludes_skipped_steps(skipping, tmp_path):
    logged = train_poisoned(tmp_path, 3, non_finite_loss="skip", logging_steps=3)
    assert logged.skipped == [1, 1]
    kept = [loss for loss in skipping.losses if math.isfinite(loss)]
    for watch in (logged, skipping):
        assert watch.train_loss == pytest.approx(sum(kept) / 4, rel=1e-6)
    for epoch, mean in enumerate(logged.losses):
        kept = [loss for loss in skipping.losses[3 * epoch : 3 * epoch + 3] if math.isfinite(loss)]
        assert len(kept) == 2
        assert mean == pytest.approx(sum(kept) / 2, rel=1e-6)


def test_the_ema_does_not_count_a_skipped_step(tmp_path):
    trainer = build_trainer(tmp_path, {"data_collator": Poison(3)}, **(PLAIN | {"ema": True}), non_finite_loss="skip")
    counts = []
    trainer.add_callback(
        type(
            "Count",
            (TrainerCallback,),
            {"on_step_end": lambda self, *args, **kwargs: counts.append(trainer.weight_average.num_updates)},
        )
    )
    trainer.train()
    assert counts[-1] == 4
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


def test_the_run_stops_with_the_name_of_the_image_and_resumes_from_its_last_checkpoint(skipping, tmp_path):
    step = 1 + skipping.skipped.index(1)
    assert step > 1
    settings = PLAIN | {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    trainer = build_trainer(tmp_path, {"data_collator": Poison(3)}, **settings)
    with pytest.raises(FloatingPointError, match=rf"loss of optimizer step {step} is not finite") as raised:
        trainer.train()
    assert "with the images 000003.png. The weights were not changed" in str(raised.value)
    assert "non_finite_loss='skip'" in str(raised.value)
    assert are_equal(trainer.model.state_dict(), skipping.weights[step - 1])
    assert newest_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step - 1}")
    again = build_trainer(tmp_path, {"data_collator": Poison(3)}, **settings, non_finite_loss="skip")
    again.train(resume_from_checkpoint=True)
    assert are_equal(again.model.state_dict(), skipping.weights[-1])


def test_skipping_ends_after_ten_steps_in_a_row_and_the_next_call_starts_counting_again(tmp_path, hf_log):
    settings = PLAIN | {"non_finite_loss": "skip", "num_train_epochs": 6, "gradient_accumulation_steps": 1}
    data = {"train_dataset": drawn(4), "eval_dataset": None, "data_collator": Poison(*range(4))}
    trainer = build_trainer(tmp_path, data, **settings)
    for call in (1, 2):
        with pytest.raises(FloatingPointError, match=r"optimizer step 10 .* 10 optimizer steps in a row"):
            trainer.train()
        assert hf_log.text.count("It is skipped") == 9 * call


def test_non_finite_weights_are_not_blamed_on_the_images(tmp_path):
    trainer = build_trainer(tmp_path, **PLAIN, non_finite_loss="skip")
    with torch.no_grad():
        trainer.model.bbox_embed.layers[0].weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"weights of the model are not, such as bbox_embed\.layers\.0"):
        trainer.train()


def test_a_non_finite_gradient_of_a_finite_loss_stops_the_run(tmp_path):
    trainer = build_trainer(tmp_path, **PLAIN, max_grad_norm=0.0)
    trainer.model.class_embed.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient of optimizer step 1 is not finite") as raised:
        trainer.train()
    assert str(raised.value).count(".png") == 4


def test_an_unknown_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"non_finite_loss.*'stop' or 'skip', got 'ignore'"):
        build_trainer(tmp_path, non_finite_loss="ignore")


def poisoned_on_one_of_two(folder: str) -> dict[str, Any]:
    found = {}
    try:
        train_poisoned(Path(folder), 3)
    except FloatingPointError as error:
        found["error"] = str(error)
    found |= vars(train_poisoned(Path(folder), 3, non_finite_loss="skip", logging_steps=1))
    return found


def test_two_processes_stop_and_skip_together(tmp_path):
    first, second = on_two_processes(tmp_path, poisoned_on_one_of_two)
    assert first["error"] == second["error"]
    assert "with the images 000003.png. The" in first["error"]
    assert sum(first["skipped"]) == 2
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert are_equal(ours, theirs)
        assert all(tensor.isfinite().all() for tensor in ours.values())
