"""Run a tiny fine-tuning with rfdetr, and list the files that it writes.

    python tests/parity/one_step_run.py OUT_FOLDER [--listing]

The model is rfdetr's RFDETRSegNano with random weights at 48 px, the images are drawn, and nothing is downloaded.
OUT_FOLDER receives 1.2 GB of checkpoints and the dataset. `--listing` rewrites `one_step_run_keys.txt`.

The epoch has five optimizer steps, the minimum of rfdetr. A single step would not be sufficient: the first step sets
the EMA weights to the weights, so that confusing the two would not be noticed.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rfdetr import RFDETRSegNano

from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset

LISTING = Path(__file__).with_name("one_step_run_keys.txt")
CLASSES = ["barn", "house", "shed"]
SPLITS = {"train": (0, 4), "valid": (4, 2), "test": (6, 2)}  # the first seed, and the number of images
BEST = "checkpoint_best_regular.pth", "checkpoint_best_ema.pth", "checkpoint_best_total.pth"
FILES = (*BEST, "last_ema.pth", "last.ckpt")
# 3 classes and a row that no class has, 3 groups of 5 queries, 4 x 4 patches and the class token.
SIZES = (
    "class_embed.weight",
    "transformer.enc_out_class_embed.0.weight",
    "refpoint_embed.weight",
    "query_feat.weight",
    "backbone.0.encoder.encoder.embeddings.position_embeddings",
)


def write_dataset(folder: Path) -> None:
    """Write drawn images as Roboflow exports them: category 0 is the parent of the classes, without objects.

    Raises:
        FileExistsError: if the dataset is there already.
    """
    categories = [{"id": 0, "name": "buildings", "supercategory": "none"}]
    categories += [{"id": i, "name": name, "supercategory": "buildings"} for i, name in enumerate(CLASSES, start=1)]
    for split, (seed, count) in SPLITS.items():
        (folder / split).mkdir(parents=True)
        photos, coco = draw_dataset(count, first_seed=seed, classes=["building"])
        for annotation in coco["annotations"]:
            annotation["category_id"] = 1 + annotation["id"] % len(CLASSES)
        path = save_dataset(folder / split, photos, coco | {"categories": categories})
        content = json.loads(path.read_text())  # without supercategories
        path.write_text(json.dumps(content | {"categories": categories}))


def fine_tune(folder: Path | str) -> None:
    """Train for one epoch on the CPU, in about 10 seconds; `folder` receives the files in `FILES`."""
    folder = Path(folder)
    write_dataset(folder / "dataset")
    torch.manual_seed(0)
    model = RFDETRSegNano(pretrain_weights=None, device="cpu", num_queries=5, num_select=5, group_detr=3)
    model.train(
        dataset_dir=folder / "dataset",
        output_dir=folder,
        device="cpu",
        resolution=48,
        multi_scale=False,
        epochs=1,
        batch_size=1,
        num_workers=0,
        amp_dtype=None,
        use_ema=True,
        eval_base_model=True,  # without it there is no checkpoint_best_regular.pth
        eval_backend="faster_coco_eval",  # the default one would be one more package
        tensorboard=False,
    )


def listing(folder: Path | str) -> str:
    """Return the keys in the files of `fine_tune`, and which of their weights are equal; without paths."""
    lines: list[str] = []
    trees: dict[str, str] = {}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name in FILES:
        content = torch.load(Path(folder, name), map_location="cpu", weights_only=True)
        lines += [f"{name}, which torch.load reads with weights_only=True", *_tree(content, trees, name), ""]
        weights |= {f"{name}: {place}": state for place, state in _weights(content).items()}
    config = json.loads(Path(folder, "training_config.json").read_text())
    lines += ["training_config.json", f"  {', '.join(config)}", "", "Weights"]
    for first, *others in _equal(weights):
        lines += [f"  {first}", *(f"  = {other}, bit for bit" for other in others)]
        lines += [f"    {name!r}: {tuple(weights[first][name].shape)}" for name in SIZES]
    return "\n".join([*lines, ""]).replace(str(Path(folder).resolve()), "OUT_FOLDER")


def _tree(content: dict[str, Any], trees: dict[str, str], name: str) -> list[str]:
    """Return the entries of a file; those equal to an earlier file's are replaced by its name, from `trees`."""
    lines: list[str] = []
    for key, value in content.items():
        head, *below = _describe(key, value, depth=1)
        earlier = trees.setdefault("\n".join([head, *below]), name)
        lines += [head, *below] if earlier == name or not below else [f"{head}, reads as in {earlier}"]
    return lines


def _describe(key: Any, value: Any, depth: int) -> list[str]:
    """Return a line for the value and one for each of its items, down to the third level; one line for a state dict."""
    head = f"{'  ' * depth}{key!r}: {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        return [f"{head} {value.dtype} {tuple(value.shape)}" + (f" = {value.item()}" if value.ndim == 0 else "")]
    if not isinstance(value, dict | list) or not value:
        return [f"{head} = {value!r}"]
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    if len(items) > 100 and isinstance(items[-1][1], torch.Tensor):
        dtypes = Counter(str(tensor.dtype) for _, tensor in items)
        return [f"{head} of {len(items)} tensors {dict(dtypes)}: {items[0][0]!r}, {items[1][0]!r} ... {items[-1][0]!r}"]
    if isinstance(value, list) and not isinstance(value[0], dict):
        return [f"{head} of {len(items)} = {value[:5]}{' ...' if len(value) > 5 else ''}"]
    below = [line for item in items for line in _describe(*item, depth + 1)] if depth < 3 else []
    return [f"{head} of {len(items)}", *below]


def _weights(content: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the sets of weights in a file by their place, with names without prefixes."""
    average = dict(content["callbacks"]["RFDETREMACallback"]["average_model_state_dict"])
    del average["n_averaged"]
    found = {"model": content["model"]} if "model" in content else {}
    found["state_dict"] = {key.removeprefix("model."): tensor for key, tensor in content["state_dict"].items()}
    found["average_model_state_dict"] = {key.removeprefix("module.model."): average[key] for key in average}
    return found


def _equal(weights: dict[str, dict[str, torch.Tensor]]) -> list[list[str]]:
    """Return groups of places with equal weights, in the order of the files."""
    groups: list[list[str]] = []
    for place, state in weights.items():
        for group in groups:
            first = weights[group[0]]
            if first.keys() == state.keys() and all(torch.equal(first[key], state[key]) for key in first):
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


if __name__ == "__main__":
    fine_tune(sys.argv[1])
    if "--listing" in sys.argv[2:]:
        LISTING.write_text(listing(sys.argv[1]))
