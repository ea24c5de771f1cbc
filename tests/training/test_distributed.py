"""Two gloo processes: plain DDP without the flag for unused parameters, and arguments that do not name the CPU."""

from typing import Any

import pytest
import torch
import torch.distributed

from transformers_rfdetr.model.loss_rf_detr import count_boxes
from transformers_rfdetr.training.arguments import RfDetrTrainingArguments

from small_models import pixels, small_model, targets
from training_run import on_two_processes

# The published models have taps like [3, 6, 9, 12], which read every block; [2, 5, 8, 11] does not read the last one.
TAPS = {"every block is read": [1, 2, 3, 4], "the last block is not read": [1, 2, 3]}
COUNTS = [(2, 1), (0, 0)]  # objects in the images of rank 0; rank 1 has none


def train(rank: int, taps: list[int]) -> dict[str, Any]:
    model = small_model(backbone_config={"out_indices": taps}).train()
    model.freeze_backbone()
    model.unfreeze_backbone()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    normalizer = count_boxes(targets(*COUNTS[rank]), 3, torch.device("cpu"), across_ranks=True)
    for _ in range(2):  # the second step fails if a parameter of the first had no gradient
        loss = parallel(pixels(seed=rank), labels=targets(*COUNTS[rank])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"normalizer": normalizer, "loss": loss.detach(), "state": model.state_dict()}


def train_each(folder: str) -> dict[str, Any]:
    """Train a model for each of TAPS in one process group."""
    torch.distributed.init_process_group("gloo")
    return {name: train(torch.distributed.get_rank(), taps) for name, taps in TAPS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_processes(tmp_path_factory.mktemp("ranks"), train_each)


@pytest.mark.parametrize("name", TAPS)
def test_two_processes_train_in_step_though_one_has_no_objects(name, ranks):
    first, second = (rank[name] for rank in ranks)
    taps = TAPS[name]
    assert first["normalizer"] == second["normalizer"] == 3 * 3 / 2  # objects x groups, mean over the ranks
    assert torch.isfinite(first["loss"])
    assert torch.isfinite(second["loss"])
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    fresh = small_model(backbone_config={"out_indices": taps}).state_dict()
    moved = {name for name, tensor in first["state"].items() if not torch.equal(tensor, fresh[name])}
    assert "class_embed.weight" in moved
    unread = [name for name in fresh if "mask_token" in name or (len(taps) == 3 and ".layer.3." in name)]
    assert not moved & set(unread)


def build_arguments(folder: str) -> dict[str, Any]:
    """Build the documented arguments without an accelerator, and with one among which accelerate divides no work."""
    arguments = RfDetrTrainingArguments(folder)
    found = {"processes": arguments.world_size, "device": arguments.device.type}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.accelerator, "is_available", lambda: True)
        with pytest.raises(ValueError, match="world_size") as refused:
            RfDetrTrainingArguments(folder)
    return {**found, "error": str(refused.value)}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_processes_without_a_gpu_share_the_work_on_the_cpu_or_are_refused(tmp_path):
    for rank in on_two_processes(tmp_path, build_arguments):
        assert (rank["processes"], rank["device"]) == (2, "cpu")
        assert "processes of torch.distributed, 2, got 1 with use_cpu=False" in rank["error"]
        assert "use_cpu=True (on the command line, --device cpu)" in rank["error"]


def test_one_process_does_not_choose_its_device_by_the_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not RfDetrTrainingArguments(str(tmp_path)).use_cpu
