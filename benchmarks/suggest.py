"""Compare `suggest` with random choice in a simulated annotation loop: `python benchmarks/suggest.py`, on one core.

The pool is 200 trays of parts of five classes, two of them rare, as in `recipes.py`; in the held-out images they are
equally frequent. In each round, 20 more images are annotated, and the model is trained further on all annotated ones;
it begins as rf-detr-seg-tiny. The first 20 are chosen at random. Finished runs are kept in a JSON lines file and are
not repeated. `MORE_RESULTS.md` has the table.
"""

import argparse
import copy
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes import OFTEN, RARELY, drawn_split
from torch.utils.data import Subset
from transformers import set_seed

from transformers_rfdetr import RfDetrTrainer, evaluate_instance_segmentation, load, suggest
from transformers_rfdetr.cli.demo import fine_tuning_arguments
from transformers_rfdetr.data.dataset import InstanceDataset, as_instance_dataset

PER_ROUND = 20
STRATEGIES = ("random", "suggest")


def train(model: Any, processor: Any, data: InstanceDataset, annotated: list[int], steps: int, seed: int) -> Any:
    """Train a copy of a model further on the annotated images, and return it."""
    set_seed(seed)
    model = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = fine_tuning_arguments(Path(folder), steps, seed)
        RfDetrTrainer(model, arguments, train_dataset=Subset(data, annotated), processing_class=processor).train()
    return model


def annotate_more(
    strategy: str, model: Any, processor: Any, data: InstanceDataset, annotated: list[int], rng: np.random.Generator
) -> list[int]:
    """Return the indices of the annotated images after one more round."""
    rest = [index for index in range(len(data)) if index not in annotated]
    if strategy == "random":
        chosen = rng.choice(len(rest), PER_ROUND, replace=False)
    else:
        images, known = ([data[index]["image"] for index in indices] for indices in (rest, annotated))
        chosen = [one.image_index for one in suggest(model, processor, images, PER_ROUND, annotated=known)]
    return [*annotated, *(rest[index] for index in chosen)]


@functools.cache
def first_round(pool: InstanceDataset, steps: int, seed: int) -> tuple[list[int], Any, Any]:
    """Return images that are chosen at random, and a model that is trained on them: the same for all strategies."""
    annotated = np.random.default_rng(seed).choice(len(pool), PER_ROUND, replace=False).tolist()
    set_seed(seed)  # of the new classes
    model, processor = load("rf-detr-seg-tiny", id2label=pool.id2label, group_detr=3)
    return annotated, train(model, processor, pool, annotated, steps, seed), processor


def run(strategy: str, seed: int, rounds: int, steps: int, pool: InstanceDataset, held_out: InstanceDataset) -> dict:
    """Return the mask AP and the number of objects after each round."""
    rng, started = np.random.default_rng([seed, 1]), time.perf_counter()
    annotated, model, processor = first_round(pool, steps, seed)
    aps, objects = [], []
    for number in range(rounds):
        if number > 0:
            annotated = annotate_more(strategy, model, processor, pool, annotated, rng)
            model = train(model, processor, pool, annotated, steps, seed + number)
        metrics = evaluate_instance_segmentation(model, processor, held_out, progress=False)
        aps.append(metrics["segm_AP"])
        objects.append(as_instance_dataset(Subset(pool, annotated)).num_objects())
    seconds = round(time.perf_counter() - started)
    return {"strategy": strategy, "seed": seed, "steps": steps, "segm_AP": aps, "objects": objects, "seconds": seconds}


def main() -> None:
    """Run what is not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of 4 images in each round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/suggest.jsonl"), help="file of the finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool, held_out = drawn_split(20_000, 200, OFTEN), drawn_split(9000, 60, RARELY)
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    text = options.runs.read_text() if options.runs.is_file() else ""
    runs = [json.loads(line) for line in text.splitlines()]
    for seed in range(options.seeds):
        for strategy in STRATEGIES:
            if not any((one["strategy"], one["seed"], one["steps"]) == (strategy, seed, options.steps) for one in runs):
                runs.append(run(strategy, seed, options.rounds, options.steps, pool, held_out))
                with options.runs.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
                print(runs[-1], flush=True)
    print("| images | " + " | ".join(f"{name}: mask AP | objects" for name in STRATEGIES) + " |")
    print("|---|" + "---|---|" * len(STRATEGIES))
    for number in range(options.rounds):
        cells = []
        for strategy in STRATEGIES:
            found = [one for one in runs if (one["strategy"], one["steps"]) == (strategy, options.steps)]
            aps = [one["segm_AP"][number] for one in found]
            cells.append(f"{np.mean(aps):.3f} ({min(aps):.3f} to {max(aps):.3f})")
            cells.append(f"{np.mean([one['objects'][number] for one in found]):.0f}")
        print(f"| {PER_ROUND * (number + 1)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
