"""The recipe of `transformers-rfdetr train`, which is its settings, and the run that follows it."""

import dataclasses
import difflib
import re
import shutil
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
import yaml
from transformers import TrainerCallback, set_seed

from .. import __version__
from ..atomic_files import make_directory, write_text
from ..data.load import load_instance_dataset
from ..data.text_files import read_text, read_yaml
from ..hub.load import load
from ..model.variants_rf_detr import is_background_label
from .evaluate import format_numbers
from .options import absolute, read_size

RECIPE_NAME = "train.yaml"
_MODEL_NAME = "model"
# Settings of the command besides the fields of RfDetrTrainingArguments, and what YAML may hold for them.
_OPTIONS: dict[str, set[Any]] = {
    "model": {str},
    "data": {str, dict},
    "output": {str},
    "device": {str},
    "resolution": {int, str, list},
    "class_names": {list, dict},
    "image_folder": {str},
    "push_to_hub": {str},
    "private": {bool},
}
_ALIASES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "output_dir": "output",
}
# Settings that the trained model does not depend on; a run resumes though they differ.
_FREE = {
    *("output", "device", "use_cpu", "push_to_hub", "versions", "report_to", "run_name", "project", "disable_tqdm"),
    *("private", "log_level", "save_total_limit", "per_device_eval_batch_size", "dataloader_num_workers"),
    *("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
}
_TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


# Settings


class _Loader(yaml.SafeLoader):
    """Reads YAML as people write it: 1e-4 is a number, and `no`, for eval_strategy, is a string."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_recipe(path: Path | None, given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the settings of a YAML file, overridden by those given beside it.

    Args:
        path: The file, if there is one.
        given: Names and values of options and of fields of `RfDetrTrainingArguments`.

    Returns:
        All settings that differ from their defaults: "model", "data", "output" and other options, and fields of
        `RfDetrTrainingArguments`. Paths that exist are absolute.

    Raises:
        ValueError: the file is not valid YAML; a name is unknown (the message has the nearest one) or given twice; a
            value has the wrong type; model, data or output is missing.
    """
    kinds, defaults = _fields()
    file = {} if path is None else _read_yaml(path)
    file.pop("versions", None)
    recipe = _checked(f"--config {path}", file.items(), kinds) | _checked("the options", given, kinds)
    for name, remedy in (("model", "--model rf-detr-seg-medium"), ("data", "DATA"), ("output", "--output runs/mine")):
        if not recipe.get(name):
            raise ValueError(f"`{name}` is required. Pass {remedy}, or set `{name}:` in the file of --config.")
    if isinstance(recipe.get("resolution"), str):
        recipe["resolution"] = read_size("--resolution", recipe["resolution"])
    if not recipe.get("num_train_epochs", 1) > 0 and recipe.get("max_steps", 0) <= 0:
        raise ValueError(f"--epochs must be above 0, got {recipe['num_train_epochs']:g}.")
    recipe |= {name: _absolute(recipe[name]) for name in ("model", "data", "image_folder") if name in recipe}
    recipe["output"] = str(Path(recipe["output"]).expanduser().absolute())
    kept = {name: value for name, value in recipe.items() if name in _OPTIONS or value != defaults[name]}
    return _plain({name: kept[name] for name in sorted(kept, key=lambda name: (name not in _OPTIONS, name))})


def _fields() -> tuple[dict[str, set[Any]], dict[str, Any]]:
    """Return the types that each setting may have, and the defaults of the training arguments."""
    from ..training.arguments import RfDetrTrainingArguments

    hints = typing.get_type_hints(RfDetrTrainingArguments)
    # Tokens do not belong in files, and `push_to_hub` of the command says what is uploaded where.
    excluded = ("hub_", "push_to_hub", "output_dir", "resume_from_checkpoint", "local_rank", "_")
    fields = [
        field
        for field in dataclasses.fields(RfDetrTrainingArguments)
        if field.init and not field.name.startswith(excluded)
    ]
    kinds = {field.name: _kinds(hints[field.name]) | {type(field.default)} & {types.NoneType} for field in fields}
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields
    }
    return kinds | _OPTIONS, defaults


def _kinds(hint: Any) -> set[Any]:
    """Return the types of an annotation: `dict[str, Any] | None` -> {dict, NoneType}."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def _checked(source: str, given: Iterable[tuple[str, Any]], kinds: Mapping[str, set[Any]]) -> dict[str, Any]:
    """Return settings under their canonical names, with values of the right types."""
    checked: dict[str, Any] = {}
    for spelled, value in given:
        name = str(spelled).replace("-", "_")
        name = _ALIASES.get(name, name)
        if name not in kinds:
            [near] = difflib.get_close_matches(name, [*kinds, *_ALIASES], n=1, cutoff=0.0)
            raise ValueError(f"{source}: unknown setting {str(spelled)!r}. Did you mean {near!r}?")
        if name in checked:
            raise ValueError(f"{source}: `{name}` is given twice, the second time as {spelled!r}. Remove one.")
        checked[name] = _fitted(f"{source}: {spelled}", value, kinds[name])
    return checked


def _fitted(where: str, value: Any, kinds: set[Any]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if type(value) not in kinds and Any not in kinds:
        rule = " or ".join(text for kind, text in _TYPE_NAMES.items() if kind in kinds)
        raise ValueError(f"{where} must be {rule}, got {value!r:.60}.")
    return value


def read_setting(text: str) -> tuple[str, Any]:
    """Return name and value of "NAME=VALUE", the value read as YAML."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set must be NAME=VALUE, such as layer_decay=0.9, got {text}.")
    return name.strip(), read_yaml(value, _Loader, f"--set {text:.200}")


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(read_text(path), _Loader, str(path))
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must be a mapping of settings, with lines such as `lr: 1e-4`, got {type(content).__name__}."
        )
    return content


def _absolute(place: Any) -> Any:
    """Return paths that exist as absolute ones, so that the recipe works from every working directory."""
    if isinstance(place, Mapping):
        return {name: _absolute(part) for name, part in place.items()}
    if not isinstance(place, str):
        raise ValueError(f"`data` must be a folder, a file or a dataset on the Hub, got {place!r:.60}.")
    return absolute(place)


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe as it is read back from YAML, for comparison with one that was written."""
    return yaml.load(yaml.safe_dump(_without_tuples(recipe), sort_keys=False, allow_unicode=True), _Loader)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_tuples(part) for name, part in value.items()}
    return [*map(_without_tuples, value)] if isinstance(value, list | tuple) else value


# The run


def run_recipe(recipe: Mapping[str, Any], *, resume: bool = True) -> None:
    """Train, evaluate and save a model by a recipe.

    Args:
        recipe: The settings, from [`read_recipe`].
        resume: Whether a run in the output folder is resumed; otherwise its files are moved to a folder beside it.

    Raises:
        ValueError: the output folder has a run with other settings; or model, data or trainer refuse theirs.
    """
    try:
        from accelerate.utils import broadcast_object_list
    except ImportError as error:
        raise ImportError('Training requires accelerate. Run: pip install "transformers-rfdetr[train]"') from error
    from ..training.checkpoints import restore_best_models
    from ..training.trainer import RfDetrTrainer

    arguments = _training_arguments(recipe)
    is_first, output = arguments.process_index == 0, Path(recipe["output"])
    data = load_instance_dataset(
        recipe["data"], class_names=recipe.get("class_names"), image_folder=recipe.get("image_folder")
    )
    if "train" not in data:
        raise ValueError(
            f"`data` must have a split named train, got {', '.join(data)} in {recipe['data']}. Rename one."
        )
    names = dict(zip(data.category_ids, data.id2label.values(), strict=True))
    recipe = {**recipe, "class_names": names, "versions": _versions()}
    if is_first:
        restore_best_models(output)
    # Only the first process reads and changes the folder, so that all of them decide the same.
    [checkpoint] = broadcast_object_list([find_checkpoint(output, recipe) if resume and is_first else None])
    set_seed(arguments.seed)  # for the heads of new classes
    model, processor = _load_model(recipe, data)
    if is_first:
        _prepare_folder(output, recipe, resume)
        typer.echo(f"Resuming from {checkpoint}" if checkpoint else f"Starting a new run in {output}")
    trainer = RfDetrTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=processor,
        callbacks=[_KeepRecipe(_as_yaml(recipe))],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    saved = output / _MODEL_NAME
    trainer.write_model(str(saved))
    numbers = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if is_first:
        write_text(saved / RECIPE_NAME, _as_yaml(recipe))
        if numbers:
            typer.echo(format_numbers({name.removeprefix("eval_"): value for name, value in numbers.items()}))
        typer.echo(f"The model is in {saved}")
    if "push_to_hub" in recipe:
        trainer.push_to_hub(private=recipe.get("private"))


def _training_arguments(recipe: Mapping[str, Any]) -> Any:
    from ..training.arguments import RfDetrTrainingArguments

    fields = {name: value for name, value in recipe.items() if name not in _OPTIONS}
    device = recipe.get("device", "auto")
    is_here = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_here.get(device):
        usable = [name for name, is_available in is_here.items() if is_available]
        raise ValueError(
            f"`device` must be one of {', '.join(usable)} on this machine, got {device}. To choose one of several GPUs,"
            " set CUDA_VISIBLE_DEVICES."
        )
    if device == "cpu":
        fields["use_cpu"] = True
    if "push_to_hub" in recipe:
        fields |= {"push_to_hub": True, "hub_model_id": recipe["push_to_hub"], "hub_strategy": "end"}
    try:
        return RfDetrTrainingArguments(recipe["output"], **fields)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:  # transformers does not check all values
        raise ValueError(f"The training arguments are invalid together: {type(error).__name__}: {error}") from error


def _load_model(recipe: Mapping[str, Any], data: Any) -> tuple[Any, Any]:
    """Load the checkpoint, with new heads unless its classes are those of the data."""
    options = {"resolution": recipe["resolution"]} if "resolution" in recipe else {}
    model, processor = load(recipe["model"], **options)
    if {label: name for label, name in model.config.id2label.items() if not is_background_label(name)} != data.id2label:
        options |= {"id2label": data.id2label, "ignore_mismatched_sizes": True}
        model, processor = load(recipe["model"], **options)
    return model, processor


def find_checkpoint(output: Path, recipe: Mapping[str, Any]) -> str | None:
    """Return the newest complete checkpoint of a run in a folder, or None if it has none yet.

    Raises:
        ValueError: the folder has a run with other settings, or files that may be of one.
    """
    from ..training.checkpoints import newest_checkpoint

    remedy = "Pass another --output, or --no-resume to move that run aside and start anew."
    files = _run_files(output)
    if all(path.name == RECIPE_NAME for path in files):  # nothing, or a run that was stopped before a checkpoint
        return None
    if not (output / RECIPE_NAME).is_file():
        raise ValueError(f"{output} must have a {RECIPE_NAME} beside {files[0].name} to be resumed. {remedy}")
    earlier = _read_yaml(output / RECIPE_NAME)
    wanted = _plain(recipe)
    different = [
        f"{name} {earlier.get(name, 'unset')!r:.60} there, {wanted.get(name, 'unset')!r:.60} here"
        for name in sorted({*earlier, *wanted} - _FREE)
        if earlier.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(f"{output} has a run with other settings ({'; '.join(different)}). {remedy}")
    try:
        return newest_checkpoint(str(output))
    except ValueError:  # it was stopped before the first one
        return None


def _run_files(output: Path) -> list[Path]:
    """Return what a run writes to its folder, as far as it exists."""
    patterns = (RECIPE_NAME, "checkpoint-*", "best_*", _MODEL_NAME)
    return [path for pattern in patterns for path in sorted(output.glob(pattern))]


def _prepare_folder(output: Path, recipe: Mapping[str, Any], resume: bool) -> None:
    if not resume and (files := _run_files(output)):
        number = 1
        while (aside := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for path in files:
            shutil.move(path, aside / path.name)
        typer.echo(f"Moved the earlier run from {output} to {aside}")
    make_directory(output)
    write_text(output / RECIPE_NAME, _as_yaml(recipe))


def _as_yaml(recipe: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(_without_tuples(recipe), sort_keys=False, allow_unicode=True)
    return f"# transformers-rfdetr train --config {RECIPE_NAME} resumes this run; with --output it repeats it\n{text}"


def _versions() -> dict[str, str]:
    versions = {"transformers_rfdetr": __version__, "transformers": transformers.__version__}
    return versions | {"torch": str(torch.__version__)}


class _KeepRecipe(TrainerCallback):
    """Writes the recipe beside every model of the run."""

    def __init__(self, text: str) -> None:
        self.text = text

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folders = (f"checkpoint-{state.global_step}", "best_total", "best_ema", "best_regular")
        for folder in folders if args.should_save else ():
            if (path := Path(args.output_dir, folder)).is_dir():
                write_text(path / RECIPE_NAME, self.text)
