"""`transformers-rfdetr train`: fine-tune a model by options and a YAML file of settings, the recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_line_errors
from .options import IgnoreClassOption, ImageFolderOption, PrivateOption, ResolutionOption, read_names

EXAMPLE = """examples:

transformers-rfdetr train buildings/ --model rf-detr-seg-medium --output runs/buildings --epochs 20

transformers-rfdetr train --config runs/buildings/train.yaml --set layer_decay=0.9 --output runs/slower

torchrun --nproc-per-node 8 -m transformers_rfdetr.cli.app train --config recipe.yaml

recipe.yaml sets options by their names (model: rf-detr-seg-medium) and any field of RfDetrTrainingArguments
(early_stopping: true)
"""

_Data = Annotated[
    str | None,
    typer.Argument(
        help="A folder or file of annotations, such as a COCO JSON or a data.yaml of YOLO, or a dataset on the Hub."
    ),
]
_Model = Annotated[str | None, typer.Option(help="A folder, a Hub id, or a published name such as rf-detr-seg-medium.")]
_Output = Annotated[str | None, typer.Option("--output", "-o", help="Output folder of the run.")]
_Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="YAML file of settings; options override it. Default: none.")
]
_Validation = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the training images to validate on instead of to train on, if the data have no validation"
        " split. Default: train without validation."
    ),
]
_Epochs = Annotated[float | None, typer.Option(help="Number of epochs. Default: 100.")]
_BatchSize = Annotated[
    int | None, typer.Option(help="Images in a micro-batch; an optimizer step takes 4 micro-batches. Default: 4.")
]
_LearningRate = Annotated[float | None, typer.Option(help="Learning rate of the decoder and the heads. Default: 1e-4.")]
_Augmentation = Annotated[
    str | None,
    typer.Option(
        help="Augmentation of training images: default (flips and crops), aerial, microscopy, strong (large-scale"
        " jitter and copy-paste) or none. Default: default."
    ),
]
_Seed = Annotated[int | None, typer.Option(help="Seed of new heads, data order and augmentation. Default: 42.")]
_Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps or auto, which uses a GPU if there is one. Default: auto.")
]
_ClassNames = Annotated[
    str | None,
    typer.Option(help="'cat,dog,...' or a text file with one name per line. Default: the names in the data."),
]
_ClassBalance = Annotated[
    float | None,
    typer.Option(
        help="Repeat images with classes that fewer than this fraction of the training images have, such as 0.1."
        " Default: every image once an epoch."
    ),
]
_Lora = Annotated[
    int | None,
    typer.Option(
        metavar="RANK",
        help="Train LoRA adapters of this rank, such as 16, instead of DINOv2; the heads are trained as without it."
        " Default: train DINOv2.",
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any field of RfDetrTrainingArguments. May be repeated."),
]
_Resume = Annotated[
    bool,
    typer.Option(help="Resume from the newest checkpoint in OUTPUT, or rename an earlier run and start a new one."),
]
_PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="USER/NAME",
        help="Upload the final model to this Hub repository, with validation images. Default: no upload.",
    ),
]


@one_line_errors
def train(
    data: _Data = None,
    model: _Model = None,
    output: _Output = None,
    config: _Config = None,
    validation: _Validation = None,
    epochs: _Epochs = None,
    batch_size: _BatchSize = None,
    lr: _LearningRate = None,
    resolution: ResolutionOption = None,
    augmentation: _Augmentation = None,
    seed: _Seed = None,
    device: _Device = None,
    class_names: _ClassNames = None,
    class_balance: _ClassBalance = None,
    ignore_class: IgnoreClassOption = None,
    lora: _Lora = None,
    settings: _Settings = None,
    resume: _Resume = True,
    image_folder: ImageFolderOption = None,
    push_to_hub: _PushToHub = None,
    private: PrivateOption = False,
) -> None:
    """Fine-tune a model, evaluate it on the validation split, and save it as OUTPUT/model.

    OUTPUT/train.yaml stores all settings except --push-to-hub, and the versions; --config reads it. The same command
    again resumes from the newest checkpoint. torchrun and accelerate launch run it on several GPUs.
    """
    from .training_run import read_recipe, read_setting, report_interruption, run_recipe

    options: dict[str, Any] = {
        "data": data,
        "model": model,
        "output": output,
        "validation": validation,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "resolution": resolution,
        "augmentation": augmentation,
        "seed": seed,
        "device": device,
        "class_names": None if class_names is None else read_names("--class-names", class_names),
        "class_balance": class_balance,
        "ignore_classes": ignore_class or None,
        "lora": lora,
        "image_folder": image_folder,
        "push_to_hub": push_to_hub,
        "private": private or None,
    }
    given = [(name, value) for name, value in options.items() if value is not None]
    recipe = read_recipe(config, [*map(read_setting, settings or []), *given])
    with report_interruption(lambda: "Training has not begun. Run the same command again."):
        run_recipe(recipe, resume=resume)
