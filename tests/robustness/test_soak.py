"""Twenty minutes of training, evaluation and prediction in one process must not leak memory or open files.

Set SOAK_SECONDS=90 to try it for 90 seconds.
"""

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from transformers_rfdetr import RfDetrForInstanceSegmentation, predict
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_instance_segmentation
from transformers_rfdetr.hub.load import load
from transformers_rfdetr.inference.folder import FolderOptions, predict_to_folder
from transformers_rfdetr.inference.image_list import list_images
from transformers_rfdetr.inference.tiling import predict_tiled
from transformers_rfdetr.inference.video.predict_video import predict_video
from transformers_rfdetr.inference.video.writer import VideoWriter
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import small_config
from training_run import QUICK, drawn

# MiB a cycle. safetensors 0.8.0 keeps about 60 bytes of each tensor that it reads, which is 0.08 MiB a cycle here.
# A run of one minute, in which caches still warm up, reaches 0.2.
MOST = 0.25
COUNTS = ("files", "threads", "children", "temporary")


# -- the measure of growth---------------------------------------------------------------------------------------------


def growth(cycles: list[dict[str, float]]) -> tuple[float, float]:
    """Return the growth of memory in MiB per cycle, measured in two ways that tolerate outliers.

    The first is the median slope between any two cycles after the first third, when caches are warm. The second is the
    median of the last fifth of the cycles minus that of the second fifth, which also detects late, sudden growth.
    """
    mib, fifth = [cycle["MiB"] for cycle in cycles], len(cycles) // 5
    rise = statistics.median(mib[-fifth:]) - statistics.median(mib[fifth : 2 * fifth])
    return scipy.stats.theilslopes(mib[len(mib) // 3 :]).slope, rise / (len(mib) - 2 * fifth)


def find_growth(cycles: list[dict[str, float]]) -> list[str]:
    """Return what has grown: memory, or the number of a resource, which is compared with that after a third."""
    warm, last = cycles[len(cycles) // 3], cycles[-1]
    found = ["memory"] if max(growth(cycles)) > MOST else []
    return found + [name for name in COUNTS if last[name] > warm[name]]


def table(cycles: list[dict[str, float]]) -> str:
    """Format ten of the cycles, including the first and the last one, and the growth of memory."""
    chosen = [cycles[round(place)] for place in np.linspace(0, len(cycles) - 1, 10)]
    rows = [list(chosen[0]), *([f"{value:.1f}" for value in cycle.values()] for cycle in chosen)]
    slope, rise = growth(cycles)
    ending = f"MiB a cycle: {slope:.3f}, and {rise:.3f} from the second to the last fifth; at most {MOST}"
    return "\n".join(["".join(f"{value:>10}" for value in row) for row in rows] + [ending])


# -- the work --------------------------------------------------------------------------------------------------------


def measure() -> dict[str, float]:
    """Return the memory of this process in MiB, without mapped files, and the number of its open resources."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {
        "MiB": sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap")) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "children": sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children")),
        "temporary": sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
    }


class Work:
    """Do the work of one cycle: fine-tuning that is resumed once, and every way to use the resulting model."""

    def __init__(self, folder: Path) -> None:
        self.data = {"train_dataset": drawn(6), "eval_dataset": drawn(4, 100)}
        self.images = [draw_scene(seed, (96, 128), metres_per_pixel=0.6)[0] for seed in range(200, 204)]
        self.large = draw_scene(210, (160, 200), metres_per_pixel=0.6)[0]
        self.folder = folder / "images"
        self.folder.mkdir()
        for number, image in enumerate(self.images):
            image.save(self.folder / f"{number}.png")
        self.film = folder / "film.mp4" if importlib.util.find_spec("av") else None
        if self.film is not None:
            with VideoWriter(self.film, 25, (128, 96)) as writer:
                for number in range(12):
                    writer.write(self.images[number % 4], number / 25)

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            self.train(Path(name, "run"))
            self.use(*load(str(Path(name, "run"))), Path(name))

    def train(self, folder: Path) -> None:
        for epochs in (1, 2):
            model = RfDetrForInstanceSegmentation(small_config(num_labels=1))
            settings = QUICK | {"dataloader_num_workers": 2, "num_train_epochs": epochs}
            trainer = RfDetrTrainer(model, RfDetrTrainingArguments(str(folder), **settings), **self.data)
            trainer.train(resume_from_checkpoint=epochs > 1)
        trainer.evaluate()
        trainer.save_model()

    def use(self, model: Any, processor: Any, folder: Path) -> None:
        evaluate_instance_segmentation(model, processor, self.data["eval_dataset"], progress=False)
        several = predict(model, processor, self.images, threshold=0.0)
        one = predict_tiled(model, processor, self.large, threshold=0.0)
        one.draw(self.large, color_by="instance")
        for image, found in zip(self.images, several, strict=True):
            found.draw(image)
        wanted, common = list_images([str(self.folder)]), {"threshold": 0.0, "progress": False}
        predict_to_folder(
            model,
            processor,
            wanted,
            folder / "found",
            FolderOptions(threshold=0.0, tile="auto", crops=True),
            progress=False,
        )
        if self.film is not None:
            tracks = importlib.util.find_spec("trackers") is not None
            predict_video(model, processor, self.film, folder / "found.mp4", track=tracks, **common)


def soak(seconds: float) -> list[dict[str, float]]:
    """Work in cycles for `seconds`; return the measurements after each."""
    with tempfile.TemporaryDirectory() as name:
        work, cycles, start = Work(Path(name)), [], time.monotonic()
        while (passed := time.monotonic() - start) < seconds:
            work.run()
            cycles.append({"cycle": len(cycles) + 1, "minutes": passed / 60, **measure()})
    return cycles


# -- tests -----------------------------------------------------------------------------------------------------------


def made(mib: np.ndarray, **last: int) -> list[dict[str, float]]:
    """Return made-up cycles; `last` is added to the counts of the last one."""
    cycles = [{"MiB": float(value), "files": 5, "threads": 3, "children": 0, "temporary": 7} for value in mib]
    for name, count in last.items():
        cycles[-1][name] += count
    return cycles


def noise(count: int) -> np.ndarray:
    """Return memory in MiB that warms up and then fluctuates, with a high value in every seventh cycle."""
    cycle = np.arange(count)
    drawn_noise = np.random.default_rng(0).normal(0, 2, count) + 40 * (cycle % 7 == 3)
    return 600 - 30 * np.exp(-cycle / 5) + drawn_noise


def test_fluctuating_memory_is_not_growth():
    assert find_growth(made(noise(200))) == []
    assert find_growth(made(np.full(20, 600.0))) == []


def test_one_mib_per_cycle_is_growth_in_a_short_run_and_less_in_a_long_one():
    assert find_growth(made(600 + np.arange(10.0))) == ["memory"]
    assert find_growth(made(noise(200) + np.arange(200))) == ["memory"]
    assert find_growth(made(noise(200) + 0.3 * np.arange(200))) == ["memory"]


def test_memory_that_is_taken_late_and_kept_is_growth():
    kept = made(np.repeat([600.0, 640.0], [170, 30]))
    assert growth(kept) == (0, 40 / 120)  # the fifths begin 120 cycles apart
    assert find_growth(kept) == ["memory"]


@pytest.mark.parametrize("name", COUNTS)
def test_one_resource_that_is_not_released_is_growth(name):
    assert find_growth(made(noise(200), **{name: 1})) == [name]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory and open files are counted in /proc")
def test_twenty_minutes_of_work_leak_no_memory_and_no_files(tmp_path, capfd):
    # The temporary folder has a short path: workers pass images through sockets in it.
    with tempfile.TemporaryDirectory() as temporary:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),  # the helpers of the tests
            "TMPDIR": temporary,
            "OMP_NUM_THREADS": "1",
            # glibc returns freed memory: one arena, and blocks of 64 KiB and more are mapped separately.
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        command = [sys.executable, __file__, str(tmp_path / "cycles.json"), os.environ.get("SOAK_SECONDS", "1200")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cycles = json.loads((tmp_path / "cycles.json").read_text())
    assert len(cycles) >= 10, "too few cycles to judge"
    with capfd.disabled():
        print(f"\n{table(cycles)}")
    assert find_growth(cycles) == [], table(cycles)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(soak(float(sys.argv[2]))))
