"""Compare `predict_dataset` in one process and with two workers of Ray, and compute what 10 million images take.

    python benchmarks/large_scale.py
    python benchmarks/large_scale.py --images 500

Draws the images first. Each run is a fresh process; the memory of the processes is sampled every 0.1 s. The rows of
processes with one thread are the same to the bit; two threads round differently, which changes the instances of an
image with two proposals or scores that are nearly equal. The estimate is computed from the run with Ray, and from the
CPU time and memory that its rows and units take.
"""

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import psutil

# Threads of torch, and arguments of `predict_dataset`.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "local, 1 thread": (1, {}),
    "local, 2 threads": (2, {}),
    "Ray, 2 workers of 1 thread": (1, {"engine": "ray", "concurrency": 2, "threads": 1}),
}
LOCAL, _, RAY = RUNS
MANY, GPUS = 10_000_000, 16
GPU_RATE = 170  # images/s of a GPU: 5.9 ms each, Roboflow's latency of rf-detr-seg-medium on a T4


def main() -> None:
    """Print the table and the estimate in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of images (default: %(default)s)")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*arguments.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "images", arguments.images)
        print("| run | images | seconds | images/s | driver | largest worker | rest of Ray | Parquet an image |")
        print("|---|---|---|---|---|---|---|---|")
        for name, (threads, _) in RUNS.items():
            command = [sys.executable, __file__, "--run", name, f"{folder}/images", f"{folder}/{name}"]
            # 15 is the niceness of workers by default.
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAY_worker_niceness": "0"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            row = json.loads(done.splitlines()[-1])
            print(
                f"| {name} | {arguments.images:,} | {row['seconds']:.1f} | {arguments.images / row['seconds']:.1f}"
                f" | {row['driver'] / 1e6:,.0f} MB | {row['worker'] / 1e6:,.0f} MB | {row['rest'] / 1e6:,.0f} MB"
                f" | {row['bytes'] / arguments.images:,.0f} B |"
            )
        same = count_same(Path(folder, LOCAL), Path(folder, RAY))
        print(f"\nWith Ray, {same:,} images have the same instances to the bit as with one thread of this process.")
        print(estimate(Path(folder), row["bytes"] / arguments.images))


def draw(folder: Path, count: int) -> None:
    """Draw aerial scenes of the model's size, each in the 8 ways to flip and rotate it."""
    from PIL.Image import Transpose

    from transformers_rfdetr.data.synthetic import draw_scene

    folder.mkdir()
    for number in range(count):
        turn = number % 8
        if turn == 0:
            scene, _ = draw_scene(number, (144, 144), metres_per_pixel=0.6)
        image = scene if turn == 0 else scene.transpose(list(Transpose)[turn - 1])
        image.save(folder / f"{number:06d}.png")


def run(name: str, images: str, output: str) -> dict[str, float]:
    """Predict in this process or from it, and return seconds, peak bytes, and bytes of the results."""
    from transformers_rfdetr import load, predict_dataset

    model, processor = load("rf-detr-seg-tiny")
    workers, rest = [0], [0]
    threading.Thread(target=sample, args=(workers, rest), daemon=True).start()
    start = time.perf_counter()
    predict_dataset(model, processor, images, output, progress=False, **RUNS[name][1])
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(output, "predictions").iterdir())
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "driver": driver, "worker": max(workers), "rest": max(rest), "bytes": size}


def sample(workers: list[int], rest: list[int]) -> None:
    """Append the resident bytes of each worker, and of all other processes of Ray together, again and again."""
    while True:
        others = 0
        for process in psutil.Process(os.getpid()).children(recursive=True):
            try:
                size = process.memory_info().rss
                if "_Worker" in process.cmdline()[0]:
                    workers.append(size)
                else:
                    others += size
            except (psutil.Error, IndexError):  # it ended
                continue
        rest.append(others)
        time.sleep(0.1)


def count_same(folder: Path, other: Path) -> int:
    """Return for how many images two runs have the same instances, with the same names, scores, boxes and masks."""
    import numpy as np

    from transformers_rfdetr.inference.large_scale.table import read_predictions

    found = [{name: one for name, _, one in read_predictions(path)} for path in (folder, other)]
    assert found[0].keys() == found[1].keys()
    pairs = [(one, found[1][name]) for name, one in found[0].items()]
    return sum(
        one.names == other.names
        and one.masks == other.masks
        and np.array_equal(one.scores, other.scores)
        and np.array_equal(one.boxes, other.boxes)
        for one, other in pairs
    )


def estimate(folder: Path, bytes_per_image: float) -> str:
    """Return what many images take on many GPUs, from the rows and units of the run with Ray."""
    import pyarrow

    from transformers_rfdetr.inference.large_scale.predict_dataset import LARGEST_CHUNK
    from transformers_rfdetr.inference.large_scale.table import TableWriter, part_files
    from transformers_rfdetr.inference.large_scale.units import list_units

    rows = pyarrow.concat_tables(pyarrow.parquet.read_table(path) for path in part_files(folder / RAY))
    start = time.process_time()
    with TableWriter(folder / "again") as writer:
        for first in range(0, len(rows), LARGEST_CHUNK):
            writer.add(rows.slice(first, LARGEST_CHUNK))
    seconds_per_row = (time.process_time() - start) / len(rows)
    sources = [str(folder / "images")]
    list_units(sources)  # imports
    tracemalloc.start()
    units = list_units(sources)
    unit, _ = (size / len(units) for size in tracemalloc.get_traced_memory())
    sent = len(pickle.dumps(units)) / len(units)
    answer = rows.nbytes / len(rows)
    rate = GPUS * GPU_RATE
    return (
        f"{MANY:,} images on {GPUS} GPUs with {GPU_RATE} images/s each: {MANY / rate / 3600:.1f} h.\n"
        f"Results: {MANY * bytes_per_image / 1e9:.1f} GB of Parquet ({bytes_per_image:,.0f} B an image).\n"
        f"Driver: {seconds_per_row * 1e6:.0f} µs of CPU time a row, so at most {1 / seconds_per_row:,.0f} images/s,"
        f" {1 / seconds_per_row / rate:.0f} times what the GPUs predict.\n"
        f"Memory of the driver: {MANY * unit / 1e9:.1f} GB for the list of units ({unit:.0f} B a file).\n"
        f"Object store: {MANY * sent / 1e9:.1f} GB for the same units ({sent:.0f} B each), and a chunk of each worker,"
        f" {GPUS * LARGEST_CHUNK * answer / 1e6:.0f} MB ({answer:,.0f} B an image)."
    )


if __name__ == "__main__":
    main()
