"""Plain DDP on two gloo processes, without the flag for unused parameters."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from transformers_rfdetr.model.loss_rf_detr import count_boxes

from small_models import pixels, small_model, targets

# Taps as of the published models: [3, 6, 9, 12] reads every block, [2, 5, 8, 11] leaves the last one out.
TAPS = {"every block is read": [1, 2, 3, 4], "the last block is not read": [1, 2, 3]}
COUNTS = [(2, 1), (0, 0)]  # objects in the images of rank 0; rank 1 has none


def train(rank: int, folder: str, taps: list[int]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = small_model(backbone_config={"out_indices": taps}).train()
    model.freeze_backbone()
    model.unfreeze_backbone()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    normaliser = count_boxes(targets(*COUNTS[rank]), 3, torch.device("cpu"), across_ranks=True)
    for _ in range(2):  # the second step fails if a parameter of the first had no gradient
        loss = parallel(pixels(seed=rank), labels=targets(*COUNTS[rank])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save({"normaliser": normaliser, "loss": loss.detach(), "state": model.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS)
def test_two_processes_train_in_step_though_one_has_no_objects(taps, tmp_path: Path):
    torch.multiprocessing.spawn(train, (str(tmp_path), taps), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["normaliser"] == second["normaliser"] == 3 * 3 / 2  # objects x groups, mean over the ranks
    assert torch.isfinite(first["loss"])
    assert torch.isfinite(second["loss"])
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    fresh = small_model(backbone_config={"out_indices": taps}).state_dict()
    moved = {name for name, tensor in first["state"].items() if not torch.equal(tensor, fresh[name])}
    assert "class_embed.weight" in moved
    unread = [name for name in fresh if "mask_token" in name or (len(taps) == 3 and ".layer.3." in name)]
    assert not moved & set(unread)
