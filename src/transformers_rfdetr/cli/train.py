"""`transformers-rfdetr train`: fine-tuning from options and a YAML file, which it leaves beside what it makes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_line_errors
from .options import read_names

EXAMPLE = """examples:

transformers-rfdetr train buildings/ --model rf-detr-seg-medium --output runs/buildings --epochs 20

transformers-rfdetr train --config runs/buildings/train.yaml --set layer_decay=0.9 --output runs/slower

torchrun --nproc-per-node 8 -m transformers_rfdetr.cli.app train --config recipe.yaml

recipe.yaml: options by their names (model: rf-detr-seg-medium), and any field of RfDetrTrainingArguments
(early_stopping: true)
"""


@one_line_errors
def train(
    data: Annotated[
        str | None, typer.Argument(help="a folder, a COCO JSON, a data.yaml of YOLO, or a data set on the Hub")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="a folder, a Hub id, or a published name such as rf-detr-seg-medium")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="the folder of the run")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a YAML file of settings; options go before it")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the data; 100 by default")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="pictures at a time, 4 by default; an update takes 4 times as many")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate of the decoder and heads; 1e-4 by default")] = None,
    resolution: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="pixels of the model's input, instead of the checkpoint's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of new heads, order and augmentation; 42 by default")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps; by default auto, which takes a GPU if there is one")
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(help="'cat,dog,...' or a text file with a name a line, for data that only number them")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="any field of RfDetrTrainingArguments; may be repeated"),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="go on from the last checkpoint in OUTPUT, or move what is there aside and begin anew")
    ] = True,
    image_folder: Annotated[
        str | None, typer.Option(help="where the pictures are, if not beside the JSON or data.yaml")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="upload the model there in the end, its card shows validation pictures"),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="create that repository as a private one")] = False,
) -> None:
    """Fine-tune a model, evaluate it on the split validation, and save it as OUTPUT/model.

    OUTPUT/train.yaml gets all that was set, and the versions; --config takes it. The same command again goes on from
    the last checkpoint. torchrun and accelerate launch start it on several GPUs.
    """
    from .training_run import read_recipe, read_setting, run_recipe

    options: dict[str, Any] = {
        "data": data,
        "model": model,
        "output": output,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "resolution": resolution,
        "seed": seed,
        "device": device,
        "class_names": None if class_names is None else read_names("--class-names", class_names),
        "image_folder": image_folder,
        "push_to_hub": push_to_hub,
        "private": private or None,
    }
    given = [(name, value) for name, value in options.items() if value is not None]
    recipe = read_recipe(config, [*map(read_setting, settings or []), *given])
    run_recipe(recipe, resume=resume)
