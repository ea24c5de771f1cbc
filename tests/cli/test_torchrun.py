"""`train` on two nodes of one process each without a GPU, which torchrun starts and which connect on this machine."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from transformers_rfdetr import RfDetrImageProcessor, load
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset

from small_models import small_model


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="accelerate would choose the GPU of the Mac")
def test_two_nodes_train_one_model(tmp_path):
    """That the gradients are those of one process is tested in tests/training/test_optimizer_steps.py."""
    for split, count, seed in (("train", 8, 0), ("valid", 3, 100)):
        save_dataset(tmp_path / "data" / split, *draw_dataset(count, first_seed=seed, classes=["building"]))
    model = small_model(num_labels=1, id2label={0: "building"})
    model.save_pretrained(tmp_path / "start")
    RfDetrImageProcessor.from_config(model.config).save_pretrained(tmp_path / "start")
    settings = ["max_steps=3", "gradient_accumulation_steps=1", "dataloader_num_workers=0", "disable_tqdm=true"]
    settings += ["multi_scale=false", "warmup_steps=0", "logging_steps=1", "eval_strategy=no"]
    settings += ["save_strategy=steps", "save_steps=3"]
    train = ["train", tmp_path / "data", "--model", tmp_path / "start", "--output", tmp_path / "run"]
    train += ["--batch-size", 2, *(part for setting in settings for part in ("--set", setting))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    launch = [sys.executable, "-m", "torch.distributed.run", *address]
    nodes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(rank), "-m", "transformers_rfdetr.cli.app", *map(str, train)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]
    assert [node.wait(300) for node in nodes] == [0, 0]
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(tmp_path / "start" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert state["epoch"] == 1.5  # of 8 images, in steps of 2 x 2
    assert load(str(tmp_path / "run" / "model"))[0].config.id2label == {0: "building"}
