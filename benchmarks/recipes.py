"""Compare recipes for little data: `python benchmarks/recipes.py [--real FOLDER]`, on one core.

Each run fine-tunes rf-detr-seg-tiny. The drawn data are trays of parts that it has never seen: 40 training images with
five classes, two of them rare, and 60 held-out images in which all classes are equally frequent. FOLDER is a dataset
that `load_instance_dataset` reads; a fifth of the images are held out if it has no validation split.

Finished runs are kept in a JSON lines file and are not repeated, unless checkpoint or number of steps differ. The table
of all of them is printed at the end; `MORE_RESULTS.md` has it.
"""

import argparse
import functools
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import set_seed

from transformers_rfdetr import RfDetrTrainer, load, load_instance_dataset, tiny_checkpoint
from transformers_rfdetr.cli.demo import fine_tuning_arguments
from transformers_rfdetr.data.class_balance import class_repeat_factors
from transformers_rfdetr.data.dataset import InstanceDataset, InstanceDatasets
from transformers_rfdetr.data.splits import split_dataset
from transformers_rfdetr.data.synthetic import draw_images
from transformers_rfdetr.data.synthetic.canvas import box_depth, disc_depth
from transformers_rfdetr.data.synthetic.tray import Tray

CLASSES = ("bolt", "nut", "washer", "pin", "square nut")
OFTEN, RARELY = (0.32, 0.32, 0.3, 0.03, 0.03), (0.2,) * 5
BALANCE = 0.5
# Training arguments, and the augmentation.
RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, "default"),
    "strong": ({}, "strong"),
    "strong + class_balance": ({"class_balance": BALANCE}, "strong"),
    "lora": ({"lora": True}, "default"),
    "freeze_backbone": ({"freeze_backbone": True}, "default"),
}
FIELDS = ("data", "recipe", "seed", "steps", "checkpoint")  # that identify a run


class PartsTray(Tray):
    """A tray with two more kinds of parts, which the package does not draw."""

    def draw_pin(self) -> bool:
        """Draw a rod with round ends."""
        length, width, angle = self.rng.uniform(14, 26), self.rng.uniform(3, 5), self.rng.uniform(0, np.pi)
        window = self.window(self.random_point(), length / 2 + 5, angle)

        def rod(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return box_depth(x, y, (length / 2, width / 2), radius=width / 2)

        depth = rod(window.x, window.y)
        if not self.claim(CLASSES.index("pin") + 1, window, depth > 0, may_hide=0.25):
            return False
        self.shade(window, rod, angle, height=2.5)
        self.paint(window, self.metal(window) * (1.1 - 0.5 * np.abs(window.y / width))[..., None], depth)
        return True

    def draw_square_nut(self) -> bool:
        """Draw a square with a hole."""
        half, angle = self.rng.uniform(4, 6.5), self.rng.uniform(0, np.pi)
        window = self.window(self.random_point(), 1.5 * half + 5, angle)

        def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.minimum(box_depth(x, y, (half, half), radius=0.4), -disc_depth(x, y, 0.5 * half))

        depth = square(window.x, window.y)
        if not self.claim(CLASSES.index("square nut") + 1, window, depth > 0, may_hide=0.25):
            return False
        self.shade(window, square, angle, height=3.0)
        self.paint(window, self.metal(window), depth)
        return True


def draw_parts(seed: int, frequencies: tuple[float, ...]) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Return a tray of 144 px and its annotations, with `frequencies` of the classes."""
    rng = np.random.default_rng(seed)
    tray = PartsTray(rng, (144, 144), 144 / 60)
    tray.draw_ground()
    draw = (tray.draw_bolt, tray.draw_nut, tray.draw_washer, tray.draw_pin, tray.draw_square_nut)
    wanted = rng.integers(2, 10)
    for _ in range(6 * wanted):
        wanted -= draw[rng.choice(len(CLASSES), p=frequencies)]()
        if wanted == 0:
            break
    return tray.render(), tray.annotations(seed, range(1, len(CLASSES) + 1))


def drawn_split(first_seed: int, count: int, frequencies: tuple[float, ...]) -> InstanceDataset:
    """Return trays with `frequencies` of the classes."""
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    draw = functools.partial(draw_parts, frequencies=frequencies)
    images, coco = draw_images(range(first_seed, first_seed + count), categories, draw)
    return InstanceDataset(coco, images)


def real_data(folder: Path) -> InstanceDatasets:
    """Return the splits of a folder; `train.json` and `val.json` with `images/` are read as two splits."""
    files = {"train": folder / "train.json", "validation": folder / "val.json"}
    if all(path.is_file() for path in files.values()):
        return load_instance_dataset(files, image_folder=folder / "images")
    data = load_instance_dataset(folder)
    return data if "validation" in data else split_dataset(data["train"], validation=0.2)


def rare_classes(data: InstanceDatasets) -> list[str]:
    """Return the classes that `class_balance` repeats, unless it repeats all of them."""
    factors = class_repeat_factors(data["train"].classes_of_images(), BALANCE)
    rare = [data.id2label[label] for label in np.flatnonzero(factors > 1)]
    return rare if len(rare) < len(factors) else []


def train(data: InstanceDatasets, recipe: str, seed: int, steps: int, resolution: int, queries: int) -> dict[str, Any]:
    """Fine-tune and return mask AP, the mean mask AP of the rare classes, and the seconds."""
    started = time.perf_counter()
    settings, augmentation = RECIPES[recipe]
    set_seed(seed)
    model, processor = load(
        "rf-detr-seg-tiny", id2label=data.id2label, resolution=resolution, num_queries=queries, group_detr=3
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = fine_tuning_arguments(Path(folder), steps, seed, **settings)
        splits = {"train_dataset": data["train"], "eval_dataset": data["validation"]}
        trainer = RfDetrTrainer(model, arguments, **splits, processing_class=processor, augmentation=augmentation)
        trainer.train()
        numbers = trainer.evaluate()
    per_class = [numbers["eval_per_class"][name]["segm_AP"] for name in rare_classes(data)]
    return {
        "segm_AP": numbers["eval_segm_AP"],
        "rare_AP": float(np.mean(per_class)) if per_class else None,
        "seconds": round(time.perf_counter() - started),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table: the mean, and the lowest and highest value of several seeds."""
    lines = [
        "| data | recipe | seeds | mask AP | mask AP of rare classes | seconds a run |",
        "|---|---|---|---|---|---|",
    ]
    for data in dict.fromkeys(run["data"] for run in runs):
        for recipe in RECIPES:
            found = [run for run in runs if (run["data"], run["recipe"]) == (data, recipe)]
            if not found:
                continue
            cells = [_mean_and_range([run[name] for run in found]) for name in ("segm_AP", "rare_AP")]
            seconds = np.mean([run["seconds"] for run in found])
            lines.append(f"| {data} | {recipe} | {len(found)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def _mean_and_range(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{spread}"


def main() -> None:
    """Run what is not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="a dataset, one seed for each recipe")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of 4 images")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each recipe on drawn data")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes.jsonl"), help="file of the finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = hashlib.sha256((Path(tiny_checkpoint()) / "model.safetensors").read_bytes()).hexdigest()[:8]
    drawn = InstanceDatasets({"train": drawn_split(0, 40, OFTEN), "validation": drawn_split(9000, 60, RARELY)})
    sources = {"drawn": (drawn, options.seeds, 144, 60)}
    if options.real:
        sources[options.real.name] = (real_data(options.real), 1, 192, 120)
    wanted = [
        dict(zip(FIELDS, (data, recipe, seed, options.steps, checkpoint), strict=True))
        for data, (_, seeds, _, _) in sources.items()
        for seed in range(seeds)
        for recipe in RECIPES
    ]
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    text = options.runs.read_text() if options.runs.is_file() else ""
    finished = {tuple(run[name] for name in FIELDS): run for run in map(json.loads, text.splitlines())}
    for run in wanted:
        key = tuple(run.values())
        if key not in finished:
            data, _, resolution, queries = sources[run["data"]]
            finished[key] = run | train(data, run["recipe"], run["seed"], options.steps, resolution, queries)
            with options.runs.open("a") as file:
                file.write(json.dumps(finished[key]) + "\n")
            print(finished[key], flush=True)
    print(f"\n{options.steps} optimizer steps of 4 images\n")
    print(table([finished[tuple(run.values())] for run in wanted]))


if __name__ == "__main__":
    main()
