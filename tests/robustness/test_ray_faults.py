"""Prediction with Ray whose worker, machine or driver is killed: each image has one row, and nothing waits for it.

Only processes that these tests started are killed: descendants of the test's own process.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.inference.folder import FolderOptions

from small_models import small_config

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
import pyarrow.parquet  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from transformers_rfdetr.inference.large_scale import table  # noqa: E402
from transformers_rfdetr.inference.large_scale.predict_dataset import predict_dataset  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="Linux ends Ray with its driver")]
NUM_IMAGES = 600
OPTIONS = FolderOptions(threshold=0.3, batch_size=1)
ON_RAY: dict[str, Any] = {"engine": "ray", "concurrency": 2, "threads": 1, "progress": False}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default, which starves them on a busy machine
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "2000")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(draw_dataset(4, (40, 56))[0]):
        image.save(folder / f"{number}.png")
    for number in range(4, NUM_IMAGES):
        os.link(folder / f"{number % 4}.png", folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = RfDetrForInstanceSegmentation(small_config(num_labels=2)).eval()
    return model, RfDetrImageProcessor.from_config(model.config)


def images_of(output: Path) -> list[str]:
    parts = (output / "predictions").glob("*.parquet")
    return [name for path in parts for name in pyarrow.parquet.read_table(path, columns=["image"])["image"].to_pylist()]


def after_the_first_rows(action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Call `action` once, when rows have arrived; return the list to which it adds the number of rows of each table."""
    arrived: list[int] = []
    original = table.TableWriter.add

    def add(writer: table.TableWriter, rows: Any) -> None:
        original(writer, rows)
        arrived.append(rows.num_rows)
        if len(arrived) == 1:
            action()

    monkeypatch.setattr(table.TableWriter, "add", add)
    return arrived


def check(output: Path, arrived: list[int]) -> None:
    assert sorted(images_of(output)) == sorted(f"{number}.png" for number in range(NUM_IMAGES))
    assert len(arrived) > 4  # the fault was in the middle


def test_the_images_of_a_killed_worker_are_predicted_once(model, photos, tmp_path, monkeypatch, hf_log):
    def kill_a_worker() -> None:
        descendants = psutil.Process().children(recursive=True)
        workers = [process for process in descendants if process.cmdline()[:1] and "_Worker" in process.cmdline()[0]]
        assert workers
        workers[0].kill()

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        arrived = after_the_first_rows(kill_a_worker, monkeypatch)
        predict_dataset(*model, photos, tmp_path, OPTIONS, **ON_RAY)
    finally:
        ray.shutdown()
    check(tmp_path, arrived)
    assert "A worker of Ray died" in hf_log.text


def test_the_images_of_a_killed_machine_are_predicted_by_the_other_one(model, photos, tmp_path, monkeypatch, hf_log):
    memory = {"object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    try:
        machines = [cluster.add_node(num_cpus=1, **memory) for _ in range(2)]
        cluster.wait_for_nodes()
        arrived = after_the_first_rows(lambda: cluster.remove_node(machines[0], allow_graceful=False), monkeypatch)
        predict_dataset(*model, photos, tmp_path, OPTIONS, address=cluster.address, **ON_RAY)
    finally:
        ray.shutdown()
        cluster.shutdown()
    check(tmp_path, arrived)
    assert "A worker of Ray died" in hf_log.text


DRIVER = """
import sys
from transformers_rfdetr import load, predict_dataset
from transformers_rfdetr.inference.folder import FolderOptions
from transformers_rfdetr.inference.large_scale import table

table._MAX_ROWS = 1
options = FolderOptions(threshold=0.3, batch_size=1)
arguments = {"engine": "ray", "concurrency": 1, "threads": 1, "progress": False}
predict_dataset(*load(sys.argv[1]), sys.argv[2], sys.argv[3], options, **arguments)
"""


def test_after_the_driver_was_killed_only_what_is_missing_is_predicted(model, photos, tmp_path):
    for part in model:
        part.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "model"), str(photos), str(output)])
    deadline = time.monotonic() + 300
    while not images_of(output):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    descendants = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = images_of(output)
    assert 0 < len(before) < NUM_IMAGES
    summary = predict_dataset(*model, photos, output, OPTIONS, progress=False)
    assert (summary.skipped, summary.done) == (len(before), NUM_IMAGES - len(before))
    assert sorted(images_of(output)) == sorted(f"{number}.png" for number in range(NUM_IMAGES))
    _, alive = psutil.wait_procs(descendants, timeout=60)
    assert alive == []  # Ray ends with its driver
