"""Run the Python blocks of README.md and docs/, offline: local folders stand in for the Hub, small data for long runs.

Each page has a namespace and a folder of its own. `<!--- skip: next "reason" -->` before a block skips it.
"""

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# A model to fine-tune, as a folder under its names on the Hub and in this package.
MODELS = ("Roboflow/rf-detr-seg-medium", "rf-detr-seg-medium")
DATASET = "merve/satellite-building-segmentation"
SPLITS = (("train", 4, 0), ("validation", 3, 100), ("test", 6, 200))


def write_dataset(folder: Path) -> None:
    """Save drawn scenes as a dataset of the Hub: one Parquet file for each split."""
    import datasets

    from training_run import drawn

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
    import numpy as np
    from PIL import Image

    from transformers_rfdetr.data.synthetic import draw_scene
    from transformers_rfdetr.inference.video.writer import VideoWriter

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
    from transformers_rfdetr import RfDetrImageProcessor, load_instance_dataset, tiny_checkpoint
    from transformers_rfdetr.data.writers.write import write_dataset as write_copy

    from small_models import small_model

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    model = small_model()
    for name in MODELS:
        model.save_pretrained(folder / name)
        RfDetrImageProcessor.from_config(model.config).save_pretrained(folder / name)
    shutil.copytree(tiny_checkpoint(), folder / "my-model")
    write_dataset(folder / DATASET)
    write_copy(load_instance_dataset(str(folder / DATASET)), folder / "data", format="coco")
    write_images(folder)
    return temporary


def shorten(arguments: Any) -> None:
    """Let a run of a block take two optimizer steps of two images, with an evaluation after each."""
    from training_run import QUICK

    for name, value in QUICK.items():
        setattr(arguments, name, value)
    if arguments.max_steps > 0:
        arguments.max_steps, arguments.save_steps, arguments.eval_steps = 2, 1, 1
    else:
        arguments.num_train_epochs = 1


def prepare(namespace: dict[str, Any]) -> None:
    """Enter a folder with everything that the blocks name, and cut long runs short."""
    from transformers_rfdetr import RfDetrTrainingArguments
    from transformers_rfdetr.hub import load

    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_before"] = os.getcwd()
    shutil.copytree(sandbox().name, namespace["_folder"].name, dirs_exist_ok=True)
    os.chdir(namespace["_folder"].name)
    finish, resolve = RfDetrTrainingArguments.__post_init__, load.resolve_name

    def post_init(arguments: Any) -> None:
        shorten(arguments)
        finish(arguments)

    namespace["_uploads"] = []
    module = "transformers_rfdetr.training.run_upload"
    namespace["_patches"] = [
        mock.patch.object(RfDetrTrainingArguments, "__post_init__", post_init),
        # A published name is the folder of this name.
        mock.patch.object(load, "resolve_name", lambda name: name if name in MODELS else resolve(name)),
        # Stand-ins for the Hub: tests/hub pushes to a server.
        mock.patch(f"{module}.create_repository", lambda name, **_: name),
        mock.patch(f"{module}.upload", lambda _, files, *__, **___: namespace["_uploads"].extend(files)),
    ]
    for patch in namespace["_patches"]:
        patch.start()


def check(namespace: dict[str, Any]) -> None:
    """Leave the folder, and check what the blocks computed."""
    for patch in namespace["_patches"]:
        patch.stop()
    os.chdir(namespace["_before"])
    folder = Path(namespace["_folder"].name)
    if "result" in namespace:
        assert namespace["result"]["segmentation"].ndim == 2
        assert (folder / "found.png").is_file()
    if "numbers" in namespace:
        assert namespace["numbers"]["segm_AP"] >= 0
    if (folder / "buildings").is_dir():
        from transformers import AutoModelForInstanceSegmentation

        saved = AutoModelForInstanceSegmentation.from_pretrained(folder / "buildings")
        assert saved.config.id2label == {0: "building"}
    if "trainer" in namespace:
        state = namespace["trainer"].state
        assert state.global_step == 2
        evaluated = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
        assert evaluated == ({1, 2} if "stream" in namespace else {2})
    if namespace["_uploads"]:
        names = {file.name for file in namespace["_uploads"]}
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= names
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/**/*.md"],
    excludes=["assets/*/README.md"],
    setup=prepare,
    teardown=check,
).pytest()

# Pages of docs/ whose blocks run in every test, as those of README.md do; the blocks of the others are long tests.
SHORT = {"README", "first-prediction", "from-the-port", "data", "split"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the blocks of pages that take long, and allow what peft calls."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(
                pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
            )
            if item.path.stem not in SHORT:
                item.add_marker(pytest.mark.long)
