"""Make a folder with everything that the code and the commands of README.md and docs/ name."""

import functools
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor, load_instance_dataset, tiny_checkpoint, write_dataset
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.inference.video.writer import VideoWriter

from small_models import small_model
from training_run import drawn

# A model to fine-tune, as a folder under its names on the Hub and in this package.
MODELS = ("Roboflow/rf-detr-seg-medium", "rf-detr-seg-medium")
DATASET = "merve/satellite-building-segmentation"
SPLITS = (("train", 4, 0), ("validation", 3, 100), ("test", 6, 200))


def write_hub_dataset(folder: Path) -> None:
    """Save drawn scenes as a dataset of the Hub: one Parquet file for each split."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                "category": datasets.List(datasets.ClassLabel(names=["building"])),
                "segmentation": datasets.List(datasets.List(datasets.List(datasets.Value("float32")))),
            },
        }
    )
    (folder / "data").mkdir(parents=True)
    for split, count, seed in SPLITS:
        rows = []
        for sample in drawn(count, seed):
            objects = [one for one in sample["annotations"] if isinstance(one["segmentation"], list)]
            columns = {name: [one[name] for one in objects] for name in ("bbox", "segmentation")}
            rows.append({"image": sample["image"], "objects": columns | {"category": [0] * len(objects)}})
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(file)


def write_images(folder: Path) -> None:
    """Save a photo, a folder of photos, a large image and a video."""
    scenes = [draw_scene(seed=seed)[0] for seed in range(3)]
    scenes[0].save(folder / "photo.jpg")
    (folder / "photos").mkdir()
    for number, scene in enumerate(scenes):
        scene.save(folder / "photos" / f"{number}.jpg")
    Image.fromarray(np.tile(np.asarray(scenes[0]), (1, 2, 1))).save(folder / "survey.tif")
    with VideoWriter(folder / "street.mp4", 10, scenes[0].size) as video:
        for number, scene in enumerate(scenes):
            video.write(scene, number / 10)


@functools.cache
def sandbox() -> tempfile.TemporaryDirectory:
    """Return a folder with everything that the blocks name; each page works in a copy."""
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    model = small_model()
    for name in MODELS:
        model.save_pretrained(folder / name)
        RfDetrImageProcessor.from_config(model.config).save_pretrained(folder / name)
    shutil.copytree(tiny_checkpoint(), folder / "my-model")
    write_hub_dataset(folder / DATASET)
    write_dataset(load_instance_dataset(str(folder / DATASET)), folder / "data", format="coco")
    write_dataset(load_instance_dataset(folder / "data"), folder / "yolo", format="yolo")
    write_images(folder)
    return temporary
