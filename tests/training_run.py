"""Run one small fine-tuning on drawn images: in this process, in a process that is killed, or on two processes."""

import copy
import functools
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import TrainerCallback

from transformers_rfdetr import RfDetrForInstanceSegmentation
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.load import load_instance_dataset
from transformers_rfdetr.data.streams import InstanceStream
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import small_config

QUICK = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 2,
    "logging_steps": 3,
    "learning_rate": 1e-3,
    "learning_rate_encoder": 1e-3,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}

# 3 optimizer steps an epoch, with 4, 4 and 2 images.
PLAIN = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "gradient_accumulation_steps": 2,
    "ema": False,
    "multi_scale": False,
}


@functools.cache
def _draw(num_images: int, first_seed: int) -> tuple[list[Image.Image], dict[str, Any]]:
    return draw_dataset(num_images, (96, 96), first_seed=first_seed, classes=["building"])


def drawn(num_images: int, first_seed: int = 0) -> InstanceDataset:
    """Return aerial images of 96 px; of ten consecutive seeds one has no building and one a crowd."""
    images, coco = copy.deepcopy(_draw(num_images, first_seed))  # a test may change them
    return InstanceDataset(coco, images)


def drawn_stream() -> InstanceStream:
    """Return 12 aerial images as a stream of 4 shards."""
    images, coco = draw_dataset(12, (96, 96), classes=["building"])
    objects = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"] and isinstance(annotation["segmentation"], list):
            objects[annotation["image_id"]].append(annotation)
    columns = ("id", "bbox", "category_id", "segmentation", "area", "iscrowd")
    rows = [
        {
            "image": image,
            "image_id": key,
            "objects": {name: [found[name] for found in objects[key]] for name in columns},
        }
        for key, image in enumerate(images)
    ]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    return load_instance_dataset({"train": stream}, streaming=True, class_names={1: "building"})["train"]


def build_trainer(folder: Path | str, trainer: dict[str, Any] | None = None, **settings: Any) -> RfDetrTrainer:
    """Return a trainer with a new model of 48 px, 10 training images and 7 validation images."""
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(small_config(num_labels=1))
    with torch.no_grad():
        model.class_embed.bias.fill_(0.5)  # scores above one half, so that there is a mean IoU
    given = dict(trainer or {})
    for name, (num_images, first_seed) in {"train_dataset": (10, 0), "eval_dataset": (7, 100)}.items():
        if name not in given:
            given[name] = drawn(num_images, first_seed)
    return RfDetrTrainer(model, RfDetrTrainingArguments(str(folder), **(QUICK | settings)), **given)


def assert_same_metrics(metrics: dict[str, Any], others: dict[str, Any], prefix: str, other_prefix: str = "") -> None:
    """Check that COCO's metrics, mean IoU and the metrics of each class are equal."""
    for key, value in others.items():
        if key.startswith(other_prefix + "per_class"):
            assert metrics[prefix + key.removeprefix(other_prefix)] == value
        elif any(part in key for part in ("_AP", "_AR", "mean_iou")):
            assert metrics[prefix + key.removeprefix(other_prefix)] == pytest.approx(value, abs=1e-12), key


class Die(TrainerCallback):
    """Kill the process at a step, like `kill -9`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def note_free_port(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))


def run_rank(rank: int, folder: str, job: Callable[[str], Any]) -> None:
    """Run one process of two, which connect through the port stored in the folder."""
    port = Path(folder, "port").read_text()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # state of the parent process
    torch.save(job(folder), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def on_two_processes(folder: Path, job: Callable[[str], Any]) -> list[Any]:
    """Return the results of `job(folder)` on two processes, which connect like those of torchrun."""
    note_free_port(folder)
    torch.multiprocessing.start_processes(run_rank, (str(folder), job), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
