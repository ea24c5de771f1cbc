"""Compare `predict_dataset` in one process and with two workers of Ray: time, peak memory, bytes of results.

    python benchmarks/large_scale.py
    python benchmarks/large_scale.py --images 500

Draws the images first. Each engine runs in a fresh process; the memory of the workers is sampled every 0.1 s.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ENGINES: dict[str, dict[str, Any]] = {
    "local": {},
    "ray": {"engine": "ray", "concurrency": 2, "threads": 1},
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of images (default: %(default)s)")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*arguments.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "images", arguments.images)
        print("engine  images  seconds  images/s  driver MB  largest worker MB  bytes of Parquet an image")
        for engine in ENGINES:
            command = [sys.executable, __file__, "--run", engine, f"{folder}/images", f"{folder}/{engine}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(done.splitlines()[-1])
            print(
                f"{engine:6}  {arguments.images:6}  {row['seconds']:7.1f}  {arguments.images / row['seconds']:8.1f}"
                f"  {row['driver'] / 1e6:9.0f}  {row['worker'] / 1e6:17.0f}  {row['bytes'] / arguments.images:15.0f}"
            )
        print("largest difference of a score:", compare(Path(folder)))


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


def run(engine: str, images: str, output: str) -> dict[str, float]:
    """Predict in this process or from it, and return seconds, peak bytes, and bytes of the results."""
    from transformers_rfdetr import load, predict_dataset

    model, processor = load("rf-detr-seg-tiny")
    workers = [0]
    threading.Thread(target=sample, args=(workers,), daemon=True).start()
    start = time.perf_counter()
    predict_dataset(model, processor, images, output, progress=False, **ENGINES[engine])
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(output, "predictions").iterdir())
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "driver": driver, "worker": max(workers), "bytes": size}


def sample(workers: list[int]) -> None:
    """Append the resident bytes of each worker, again and again."""
    while True:
        for process in psutil.Process(os.getpid()).children(recursive=True):
            try:
                if "_Worker" in process.cmdline()[0]:
                    workers.append(process.memory_info().rss)
            except (psutil.Error, IndexError):  # it ended
                continue
        time.sleep(0.1)


def compare(folder: Path) -> float:
    """Return the largest difference of a score between the rows of both engines, whose instances must be the same."""
    import numpy as np

    from transformers_rfdetr.inference.large_scale.table import read_predictions

    found = [{name: one for name, _, one in read_predictions(folder / engine)} for engine in ENGINES]
    assert found[0].keys() == found[1].keys()
    pairs = [(one, found[1][name]) for name, one in found[0].items()]
    assert all(one.names == other.names for one, other in pairs)
    return max(float(np.abs(one.scores - other.scores).max(initial=0)) for one, other in pairs)


if __name__ == "__main__":
    main()
