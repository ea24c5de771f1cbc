"""Run the Python blocks of README.md, offline: local folders stand in for the Hub, and small data for long runs."""

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

MODEL = "Roboflow/rf-detr-seg-medium"
DATASET = "merve/satellite-building-segmentation"


def write_dataset(folder: str) -> None:
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
    for split, count, seed in (("train", 4, 0), ("validation", 3, 100), ("test", 6, 200)):
        rows = []
        for sample in drawn(count, seed):
            objects = [one for one in sample["annotations"] if isinstance(one["segmentation"], list)]
            columns = {name: [one[name] for one in objects] for name in ("bbox", "segmentation")}
            rows.append({"image": sample["image"], "objects": columns | {"category": [0] * len(objects)}})
        Path(folder, "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(f"{folder}/data/{split}-00000-of-00001.parquet")


def shorten(arguments: Any) -> None:
    """Let a run of a README block take two optimizer steps of two images, with an evaluation after each."""
    from training_run import QUICK

    for name, value in QUICK.items():
        setattr(arguments, name, value)
    if arguments.max_steps > 0:
        arguments.max_steps, arguments.save_steps, arguments.eval_steps = 2, 1, 1
    else:
        arguments.num_train_epochs = 1


def prepare(namespace: dict[str, Any]) -> None:
    """Enter a folder with everything that the blocks name, and cut long runs short."""
    from transformers_rfdetr import RfDetrImageProcessor, RfDetrTrainingArguments
    from transformers_rfdetr.data.synthetic import draw_scene

    from small_models import small_model

    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_before"] = os.getcwd()
    os.chdir(namespace["_folder"].name)
    model = small_model()
    model.save_pretrained(MODEL)
    RfDetrImageProcessor.from_config(model.config).save_pretrained(MODEL)
    draw_scene(seed=0)[0].save("photo.jpg")
    write_dataset(DATASET)
    finish = RfDetrTrainingArguments.__post_init__

    def post_init(arguments: Any) -> None:
        shorten(arguments)
        finish(arguments)

    namespace["_uploads"] = []
    module = "transformers_rfdetr.training.run_upload"
    namespace["_patches"] = [
        mock.patch.object(RfDetrTrainingArguments, "__post_init__", post_init),
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
    if namespace["_uploads"]:
        from transformers import AutoModelForInstanceSegmentation

        saved = AutoModelForInstanceSegmentation.from_pretrained(folder / "buildings")
        assert saved.config.id2label == {0: "building"}
        assert namespace["trainer"].state.global_step == 2
        evaluated = [entry["step"] for entry in namespace["trainer"].state.log_history if "eval_loss" in entry]
        assert evaluated == [1, 2]
        assert namespace["numbers"]["segm_AP"] >= 0
        names = {file.name for file in namespace["_uploads"]}
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= names
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md"],
    excludes=["assets/*/README.md"],
    setup=prepare,
    teardown=check,
).pytest()
