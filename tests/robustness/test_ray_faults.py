"""Prediction with Ray whose worker, machine or driver is killed, or whose disk is full: each image has one row.

Only processes that these tests started are killed: descendants of the test's own process.
"""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor, load
from transformers_rfdetr.atomic_files import DiskError
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.export import export
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


@pytest.fixture
def two_cpus() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield
    ray.shutdown()


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


def workers() -> list[Any]:
    """Return the processes of this process's descendants that have loaded the model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended
            found += [process] if "_Worker" in " ".join(process.cmdline()[:1]) else []
    return found


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


def test_the_images_of_a_killed_worker_are_predicted_once(model, photos, tmp_path, monkeypatch, two_cpus):
    arrived = after_the_first_rows(lambda: workers()[0].kill(), monkeypatch)
    predict_dataset(*model, photos, tmp_path, OPTIONS, **ON_RAY)
    check(tmp_path, arrived)


def test_the_images_of_a_killed_machine_are_predicted_by_the_other_one(model, photos, tmp_path, monkeypatch):
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


DRIVER = """
import sys
from transformers_rfdetr import load, predict_dataset
from transformers_rfdetr.export import export
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


def processor_that(act: Callable[[], None], config: Any) -> Any:
    """Return a processor that acts, instead of preprocessing, if an image is 50 pixels wide."""

    class Processor(RfDetrImageProcessor):  # local: Ray sends its code to the workers
        def __call__(self, images: Any, **kwargs: Any) -> Any:
            if any(image.width == 50 for image in images):
                act()
            return super().__call__(images, **kwargs)

    return Processor.from_config(config)


@pytest.fixture
def photos_with_a_wide_one(photos: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(11):
        os.link(photos / f"{number}.png", folder / f"{number}.png")
    Image.new("RGB", (50, 40)).save(folder / "wide.png")
    return folder


def test_an_image_that_kills_its_workers_becomes_a_row_with_an_error(
    model, photos_with_a_wide_one, tmp_path, two_cpus, hf_log
):
    processor = processor_that(lambda: os._exit(1), model[0].config)
    options = FolderOptions(threshold=0.3, batch_size=4)
    summary = predict_dataset(model[0], processor, photos_with_a_wide_one, tmp_path / "out", options, **ON_RAY)
    assert summary.failed == [("wide.png", "3 workers died of it")]
    assert sorted(images_of(tmp_path / "out")) == sorted([*(f"{number}.png" for number in range(11)), "wide.png"])
    assert "3 workers died of 4 units, which are predicted one by one" in hf_log.text


def test_the_exception_of_a_worker_is_raised_and_its_workers_end(
    model, photos_with_a_wide_one, tmp_path, two_cpus, monkeypatch, hf_log
):
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    processor = processor_that(fail, model[0].config)
    monkeypatch.setattr(ray, "available_resources", dict)  # as if another job had all
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as raised:
        predict_dataset(model[0], processor, photos_with_a_wide_one, tmp_path / "out", OPTIONS, **ON_RAY)
    assert "in fail" in raised.value.__notes__[0]
    psutil.wait_procs(workers(), timeout=60)
    assert workers() == []
    assert "The cluster is busy: a worker needs 1 CPUs, and 0 CPUs and 0 GPUs are free" in hf_log.text


def test_a_full_disk_is_an_error_that_keeps_complete_files(model, photos, tmp_path, monkeypatch, two_cpus):
    sizes: list[int] = []
    write = pyarrow.parquet.write_table

    def write_twice(rows: Any, path: Path, **kwargs: Any) -> None:
        sizes.append(rows.num_rows)
        if len(sizes) > 2:
            path.touch()
            path = "/dev/full"  # the kernel answers each write with ENOSPC
        write(rows, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(table, "_MAX_ROWS", 50)
        patch.setattr(pyarrow.parquet, "write_table", write_twice)
        with pytest.raises(
            DiskError, match=r"parquet cannot be written: No space left.* run the same command"
        ) as raised:
            predict_dataset(*model, photos, tmp_path, OPTIONS, **ON_RAY)
    assert raised.value.errno == errno.ENOSPC
    before = images_of(tmp_path)
    assert len(before) == sum(sizes[:2]) < NUM_IMAGES
    assert len(list((tmp_path / "predictions").iterdir())) == 2  # no partial file
    summary = predict_dataset(*model, photos, tmp_path, OPTIONS, **ON_RAY)
    assert (summary.skipped, summary.done) == (len(before), NUM_IMAGES - len(before))
    assert sorted(images_of(tmp_path)) == sorted(f"{number}.png" for number in range(NUM_IMAGES))


def test_workers_that_open_an_exported_file_write_the_rows_of_one_process(model, photos, tmp_path, two_cpus):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(model[0], tmp_path / "model.onnx", processor=model[1])
    images = [photos / f"{number}.png" for number in range(4)]
    rows = []
    for name, engine in (("local", {"progress": False}), ("ray", ON_RAY)):
        exported = load(tmp_path / "model.onnx", threads=1)
        assert predict_dataset(*exported, images, tmp_path / name, FolderOptions(threshold=0.005), **engine).done == 4
        found = pyarrow.parquet.read_table(tmp_path / name / "predictions").to_pylist()
        rows.append(sorted(found, key=lambda row: row["image"]))
    assert rows[0] == rows[1]
    assert all(row["scores"] for row in rows[0])
