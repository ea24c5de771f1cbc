"""The transformers guide to instance segmentation runs with these classes, and what its metric is worth.

The guide lies beside the repository. Its Python blocks run in order, in one namespace; all that is replaced in them
stands in `substitutions`.
"""

import contextlib
import copy
import io
import itertools
import re
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from pycocotools import mask as coco_mask
from transformers import TrainingArguments

import transformers_rfdetr
from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from small_models import randomised, small_config

GUIDE = Path(__file__).resolve().parents[3] / "shared" / "guides" / "hf_instance_segmentation.md"
BATCH = 2
# A pixel whose logit is 0 but for rounding moves the mean of four images by less.
ONE_PIXEL = 1e-3


def substitutions(model_folder: Path, data_folder: Path) -> dict[str, str]:
    """What a machine without network, accounts, GPU and time replaces in the guide."""
    table = {
        "notebook_login()": "notebook_login",
        '"Roboflow/rf-detr-seg-medium"': repr(str(model_folder)),
        '"merve/satellite-building-segmentation"': repr(str(data_folder)),
        "num_train_epochs=10": "num_train_epochs=1",
        "per_device_train_batch_size=16": f"per_device_train_batch_size={BATCH}",
        "per_device_eval_batch_size=16": f"per_device_eval_batch_size={BATCH}",
        "fp16=True": "use_cpu=True",
        "dataloader_num_workers=4": "dataloader_num_workers=0",
        "push_to_hub=True": "push_to_hub=False",
        "trainer.push_to_hub(": "dict(",
    }
    if "warmup_ratio" not in TrainingArguments.__dataclass_fields__:
        table["warmup_ratio="] = "warmup_steps="
    return table


def guide_blocks(table: dict[str, str]) -> list[str]:
    """The guide's Python blocks without their prompts, with the substitutions, each of which must hit once."""
    text = GUIDE.read_text(encoding="utf-8")
    blocks = [
        re.sub(r"^(>>>|\.\.\.) ?", "", block, flags=re.MULTILINE)
        for block in re.findall(r"^```py\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]
    for written, replacement in table.items():
        assert sum(block.count(written) for block in blocks) == 1, f"{written} does not stand once in the guide"
        blocks = [block.replace(written, replacement) for block in blocks]
    return blocks


def run(blocks: list[str], names: dict[str, Any], folder: Path) -> str:
    """Run the blocks in one namespace, with `folder` for all that they write -> what they print."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        matplotlib.use("Agg")
        for number, block in enumerate(blocks):
            exec(compile(block, f"{GUIDE.name}, Python block {number}", "exec"), names)
        plt.close("all")
    return printed.getvalue()


def rows_of_whole_buildings(counts: list[int], first_seed: int) -> list[dict[str, Any]]:
    """Drawn images with `counts` buildings, in the columns of the guide's dataset.

    Buildings that are hidden in part are RLE and leave the objects, because the guide draws polygons only.
    """
    rows: list[dict[str, Any]] = []
    for seed in itertools.count(first_seed):
        image, annotations = draw_scene(seed, (96, 96), metres_per_pixel=0.7, classes=["building"])
        whole = [annotation for annotation in annotations if isinstance(annotation["segmentation"], list)]
        if len(whole) == counts[len(rows)]:
            objects = {
                name: [item[name] for item in whole] for name in ("id", "bbox", "area", "segmentation", "iscrowd")
            }
            objects["category"] = [0] * len(whole)
            rows.append({"image": image, "image_id": seed, "width": 96, "height": 96, "objects": objects})
        if len(rows) == len(counts):
            return rows


def union_iou_of_each(model: torch.nn.Module, processor: RfDetrImageProcessor, rows: list[dict]) -> list[float]:
    """The guide's metric, image by image: all masks of all queries in one, against all buildings in one.

    Nothing of the guide, the Trainer or our reading of polygons takes part.
    """
    model.eval()
    ious = []
    for row in rows:
        inputs = processor(row["image"], return_tensors="pt")
        height, width = inputs["pixel_values"].shape[-2:]
        with torch.no_grad():
            mask_logits = model(**inputs).pred_masks
        mask_logits = F.interpolate(mask_logits, (height, width), mode="bilinear", align_corners=False)[0]
        predicted = (mask_logits.numpy() > 0).any(axis=0)
        scale = np.tile([width / row["width"], height / row["height"]], 4)
        polygons = [list(scale * polygon) for wings in row["objects"]["segmentation"] for polygon in wings]
        buildings = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width)).any(axis=2)
        ious.append(float((predicted & buildings).sum() / (predicted | buildings).sum()))
    return ious


def logged_mean_iou(trainer: transformers.Trainer) -> float:
    """What the Trainer logged after its only epoch."""
    [logged] = [entry["eval_mean_iou"] for entry in trainer.state.log_history if "eval_mean_iou" in entry]
    return logged


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The namespace that the guide leaves, with `blocks`, what they `printed`, and `rows`, the validation set."""
    if not GUIDE.is_file():
        pytest.skip(f"needs {GUIDE}, which does not come with the repository")
    folder = tmp_path_factory.mktemp("guide")
    torch.manual_seed(0)
    model = randomised(RfDetrForInstanceSegmentation(small_config(num_labels=91)))
    with torch.no_grad():
        model.segmentation_head.bias -= 6  # masks that do not cover the whole image together
    model.save_pretrained(folder / "model")
    RfDetrImageProcessor.from_config(model.config).save_pretrained(folder / "model")
    splits = {
        "train": rows_of_whole_buildings([1, 2, 1, 3], first_seed=0),
        "validation": rows_of_whole_buildings([2, 1, 3, 2], first_seed=100),
        "test": rows_of_whole_buildings([1], first_seed=200),
    }
    for name, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{name}.parquet")
    blocks, names = guide_blocks(substitutions(folder / "model", folder / "data")), {}
    printed = run(blocks, names, folder)
    return names | {"blocks": blocks, "printed": printed, "rows": splits["validation"]}


def test_the_guide_trains_our_model_with_the_stock_trainer_from_its_first_block_to_its_last(guide):
    trainer = guide["trainer"]
    assert type(trainer) is transformers.Trainer
    assert type(guide["model"]) is transformers_rfdetr.RfDetrForInstanceSegmentation
    assert type(guide["image_processor"]) is transformers_rfdetr.RfDetrImageProcessor
    assert trainer.model is guide["model"]
    assert guide["model"].config.id2label == {0: "building"}  # of a file with 91 classes
    assert trainer.state.global_step == 2
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert trainer.state.best_metric == logged_mean_iou(trainer)
    printed = guide["printed"].splitlines()
    assert printed[0] == "Train: 4 images, Valid: 4 images"
    assert "pixel_values shape: torch.Size([3, 48, 48])" in printed
    assert printed[-1].startswith("Detected ")


def test_the_guide_draws_the_instances_that_it_finds(guide, tmp_path):
    """A model of two steps is sure of nothing, so that the last two blocks ran over no instance."""
    inference, drawing = guide["blocks"][-2:]
    assert inference.count("threshold=0.5") == 1
    names = dict(guide)
    printed = run([inference.replace("threshold=0.5", "threshold=0.0"), drawing], names, tmp_path).splitlines()
    assert printed[0] == "Detected 6 buildings"
    assert len(printed) == 1 + 5  # of which it prints five
    found = np.any(names["overlay"] != np.asarray(names["image"]), axis=2)
    assert found.any()
    assert not found[names["seg_map"] == -1].any()


def test_the_guides_mean_iou_is_right_where_the_last_batch_is_full(guide):
    ious = union_iou_of_each(guide["model"], guide["image_processor"], guide["rows"])
    assert np.count_nonzero(ious) >= 3
    assert max(ious) > min(ious) + 0.01
    assert logged_mean_iou(guide["trainer"]) == pytest.approx(np.mean(ious), abs=ONE_PIXEL)


def test_the_stock_trainer_cuts_the_labels_of_a_last_batch_that_is_not_full_so_the_guides_mean_iou_is_wrong(
    guide, monkeypatch
):
    counts = [2, 1, 3, 1, 3]
    rows = rows_of_whole_buildings(counts, first_seed=300)
    received = []

    def compute_metrics(evaluation):
        received.extend(label for batch in evaluation.label_ids for label in batch)
        return guide["compute_metrics"](evaluation)

    monkeypatch.setattr(guide["trainer"], "compute_metrics", compute_metrics)
    dataset = datasets.Dataset.from_list(rows).with_transform(guide["transform"])
    logged = guide["trainer"].evaluate(dataset)["eval_mean_iou"]

    remainder = len(rows) % BATCH
    assert [len(dataset[i]["labels"]["masks"]) for i in range(len(rows))] == counts
    assert [len(label["masks"]) for label in received] == [*counts[:-1], remainder]
    assert [len(label["boxes"]) for label in received] == [*counts[:-1], remainder]
    assert [len(label["orig_size"]) for label in received] == [2, 2, 2, 2, remainder]  # a width is missing, too

    ious = union_iou_of_each(guide["model"], guide["image_processor"], rows)
    assert logged != pytest.approx(np.mean(ious), abs=5 * ONE_PIXEL)
    rows[-1]["objects"] = {name: column[:remainder] for name, column in rows[-1]["objects"].items()}
    ious = union_iou_of_each(guide["model"], guide["image_processor"], rows)
    assert logged == pytest.approx(np.mean(ious), abs=ONE_PIXEL)


def pooled_iou(model: torch.nn.Module, processor: RfDetrImageProcessor, rows: list[dict]) -> float:
    """Mean IoU of one class, at the images' own size: queries that score above 0.5 against all buildings."""
    intersection = union = 0
    for row in rows:
        with torch.no_grad():
            outputs = model(**processor(row["image"], return_tensors="pt"))
        size = (row["height"], row["width"])
        sure = outputs.logits[0, :, 0].sigmoid() > 0.5
        assert 0 < sure.sum() < len(sure)
        mask_logits = F.interpolate(outputs.pred_masks[:, sure], size, mode="bilinear", align_corners=False)[0]
        predicted = (mask_logits.numpy() > 0).any(axis=0)
        polygons = [polygon for wings in row["objects"]["segmentation"] for polygon in wings]
        buildings = coco_mask.decode(coco_mask.frPyObjects(polygons, *size)).any(axis=2)
        intersection += int((predicted & buildings).sum())
        union += int((predicted | buildings).sum())
    return intersection / union


def test_the_trainer_of_this_package_is_right_on_the_same_data_by_taking_its_place(guide, tmp_path):
    rows = rows_of_whole_buildings([2, 1, 3, 1, 3], first_seed=300)
    model = copy.deepcopy(guide["model"]).eval()
    with torch.no_grad():
        outputs = [model(**guide["image_processor"](row["image"], return_tensors="pt")) for row in rows]
        scores = torch.cat([output.logits for output in outputs]).flatten()
        model.class_embed.bias -= scores.median()  # half of the queries are sure
    trainer = RfDetrTrainer(
        model=model,
        args=RfDetrTrainingArguments(str(tmp_path), per_device_eval_batch_size=BATCH, use_cpu=True, report_to="none"),
        eval_dataset=datasets.Dataset.from_list(rows).with_transform(guide["transform"]),
        processing_class=guide["image_processor"],
        data_collator=guide["collate_fn"],
    )
    metrics = trainer.evaluate()
    assert metrics["eval_mean_iou"] == pytest.approx(pooled_iou(model, guide["image_processor"], rows), abs=ONE_PIXEL)
    assert metrics["eval_mean_iou"] > 0.01
    assert metrics["eval_per_class"]["0"]["num_objects"] == 10
