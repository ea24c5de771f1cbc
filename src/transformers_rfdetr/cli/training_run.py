"""The settings of `transformers-rfdetr train`, called its recipe, and the training run that they describe."""

import dataclasses
import difflib
import re
import shutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
import yaml
from transformers import TrainerCallback, set_seed

from .. import __version__
from ..atomic_files import make_directory, write_text
from ..data.dataset import InstanceDatasets
from ..data.load import load_instance_dataset
from ..data.recipes import RECIPES
from ..data.splits import split_dataset
from ..data.text_files import read_text, read_yaml
from ..evaluation.calibration import restore_thresholds
from ..hub.load import load
from ..model.validation import require
from .evaluate import format_numbers
from .options import absolute, read_size

RECIPE_NAME = "train.yaml"
_MODEL_NAME = "model"
# Settings of the command besides the fields of RfDetrTrainingArguments, and the types of their values in YAML.
_OPTIONS: dict[str, set[Any]] = {
    "model": {str},
    "data": {str, dict},
    "output": {str},
    "validation": {float},
    "device": {str},
    "resolution": {int, str, list},
    "augmentation": {str},
    "class_names": {list, dict},
    "ignore_classes": {list},
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
# Settings that are not stored: otherwise, a repetition of a run would replace the model that the run uploaded.
UPLOAD_SETTINGS = {"push_to_hub", "private"}
# Settings that do not change the trained model: a run may be resumed with other values.
FREE_SETTINGS = {
    *UPLOAD_SETTINGS,
    *("output", "device", "use_cpu", "versions", "report_to", "run_name", "project", "disable_tqdm"),
    *("log_level", "save_total_limit", "per_device_eval_batch_size", "dataloader_num_workers"),
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


# -- the recipe ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Read 1e-4 as a number and `no`, a value of eval_strategy, as a string, unlike YAML 1.1."""


class _Dumper(yaml.SafeDumper):
    """Quote the strings that _Loader would read as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # which read_yaml refuses


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_recipe(path: Path | None, given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the settings of a YAML file, overridden by those of the command line.

    Args:
        path: The file, if there is one.
        given: Names and values of options and of fields of `RfDetrTrainingArguments`.

    Returns:
        All settings that differ from their defaults: "model", "data", "output" and other options, and fields of
        `RfDetrTrainingArguments`. Paths that exist are absolute.

    Raises:
        ValueError: the file is not valid YAML; a name is unknown (the message suggests the nearest one) or given twice;
            a value has the wrong type; model, data or output is missing.
    """
    types_of, defaults = _fields()
    file = {} if path is None else _read_file(path)
    file.pop("versions", None)
    recipe = _validate(f"--config {path}", file.items(), types_of) | _validate("the options", given, types_of)
    for name, remedy in (("model", "--model rf-detr-seg-medium"), ("data", "DATA"), ("output", "--output runs/mine")):
        if not recipe.get(name):
            raise ValueError(f"`{name}` is required. Pass {remedy}, or set `{name}:` in the file of --config.")
    if isinstance(recipe.get("resolution"), str):
        size = read_size("--resolution", recipe["resolution"])
        recipe["resolution"] = list(size) if isinstance(size, tuple) else size
    if not recipe.get("num_train_epochs", 1) > 0 and recipe.get("max_steps", 0) <= 0:
        raise ValueError(f"--epochs must be above 0, got {recipe['num_train_epochs']:g}.")
    augmentation = recipe.get("augmentation", "default")
    require(augmentation in RECIPES, "augmentation", augmentation, f"one of {', '.join(RECIPES)}")
    recipe |= {name: _absolute(recipe[name]) for name in ("model", "data", "image_folder") if name in recipe}
    recipe["output"] = str(Path(recipe["output"]).expanduser().absolute())
    kept = [name for name in recipe if name not in defaults or recipe[name] != defaults[name]]
    return {name: recipe[name] for name in sorted(kept, key=lambda name: (name not in _OPTIONS, name))}


def _fields() -> tuple[dict[str, set[Any]], dict[str, Any]]:
    """Return the types that each setting may have, and the defaults of those that have one."""
    from ..training.arguments import RfDetrTrainingArguments

    hints = typing.get_type_hints(RfDetrTrainingArguments)
    # A token must not be written to a file, and the command has its own `push_to_hub` and `output`.
    excluded = ("hub_", "push_to_hub", "output_dir", "resume_from_checkpoint", "local_rank", "_")
    types_of = dict(_OPTIONS)
    defaults: dict[str, Any] = {"augmentation": "default"}
    for field in dataclasses.fields(RfDetrTrainingArguments):
        if field.init and not field.name.startswith(excluded):
            is_optional = field.default is None
            types_of[field.name] = _split_union(hints[field.name]) | ({types.NoneType} if is_optional else set())
            factory = field.default_factory
            defaults[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return types_of, defaults


def _split_union(hint: Any) -> set[Any]:
    """Return the types of an annotation: `dict[str, Any] | None` -> {dict, NoneType}."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_split_union, typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def _validate(source: str, given: Iterable[tuple[str, Any]], types_of: Mapping[str, set[Any]]) -> dict[str, Any]:
    """Return settings under their full names; raise ValueError for unknown names and for values of wrong types."""
    settings: dict[str, Any] = {}
    for spelled, value in given:
        name = str(spelled).replace("-", "_")
        name = _ALIASES.get(name, name)
        if name not in types_of:
            [near] = difflib.get_close_matches(name, [*types_of, *_ALIASES], n=1, cutoff=0.0)
            raise ValueError(f"{source}: unknown setting {str(spelled)!r}. Did you mean {near!r}?")
        if name in settings:
            raise ValueError(f"{source}: `{name}` is given twice, the second time as {spelled!r}. Remove one.")
        allowed = types_of[name]
        if type(value) is int and float in allowed and int not in allowed:
            value = float(value)
        if type(value) not in allowed and Any not in allowed:
            rule = " or ".join(text for kind, text in _TYPE_NAMES.items() if kind in allowed)
            raise ValueError(f"{source}: {spelled} must be {rule}, got {value!r:.60}.")
        settings[name] = value
    return settings


def read_setting(text: str) -> tuple[str, Any]:
    """Return name and value of "NAME=VALUE", the value read as YAML."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set must be NAME=VALUE, such as layer_decay=0.9, got {text}.")
    return name.strip(), read_yaml(value, _Loader, f"--set {text:.200}")


def _read_file(path: Path) -> dict[str, Any]:
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


def _to_yaml(recipe: Mapping[str, Any]) -> str:
    stored = {name: value for name, value in recipe.items() if name not in UPLOAD_SETTINGS}
    text = yaml.dump(stored, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return (
        f"# `transformers-rfdetr train --config {RECIPE_NAME}` resumes this run; with --output it repeats it."
        f" Neither uploads the model without --push-to-hub.\n{text}"
    )


# -- the run ---------------------------------------------------------------------------------------------------------


def run_recipe(recipe: Mapping[str, Any], *, resume: bool = True) -> None:
    """Train, evaluate and save a model by a recipe.

    Args:
        recipe: The settings, from [`read_recipe`].
        resume: Whether to resume a run in the output folder; otherwise its files are moved to a folder beside it.

    Raises:
        ValueError: the output folder has a run with other settings; or data, model or trainer refuse a setting.
    """
    try:
        from ..training.distributed import run_on_first_process
        from ..training.trainer import RfDetrTrainer
    except ImportError as error:
        raise ImportError(
            f'Training failed to import ({error}). Run: pip install "transformers-rfdetr[train]"'
        ) from error

    arguments = _training_arguments(recipe)
    is_first, output = arguments.process_index == 0, Path(recipe["output"])
    data = _load_data(recipe, arguments.seed)
    names = dict(zip(data.category_ids, data.id2label.values(), strict=True))
    data = data.ignore_classes(recipe.get("ignore_classes", []))
    recipe = {**recipe, "class_names": names, "versions": _versions()}
    checkpoint = None
    if resume:  # all processes must decide the same
        checkpoint = run_on_first_process(lambda: find_checkpoint(output, recipe), arguments.process_index)
    set_seed(arguments.seed)  # for the heads of new classes
    options = {"resolution": recipe["resolution"]} if "resolution" in recipe else {}
    model, processor = load(recipe["model"], id2label=data.id2label, **options)
    trainer = RfDetrTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=processor,
        augmentation=recipe.get("augmentation", "default"),
        callbacks=[_RecipeWriter(_to_yaml(recipe))],
    )
    with report_interruption(lambda: _describe_restart(output, resume), is_first):
        if is_first:
            _prepare_folder(output, recipe, resume)
            typer.echo(f"Resuming from {checkpoint}" if checkpoint else f"Starting a new run in {output}")
        with _explain_out_of_memory(arguments):
            trainer.train(resume_from_checkpoint=checkpoint)
        saved = output / _MODEL_NAME
        has_ended_before = checkpoint == str(output / f"checkpoint-{trainer.state.global_step}")
        if has_ended_before and (saved / "config.json").is_file():  # the model has been calibrated since, perhaps
            restore_thresholds(model.config, saved)
        trainer.write_model(str(saved))
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        if is_first:
            write_text(saved / RECIPE_NAME, _to_yaml(recipe))
            if metrics:
                typer.echo(format_numbers({name.removeprefix("eval_"): value for name, value in metrics.items()}))
            typer.echo(f"The model is in {saved}{_describe_choice(trainer)}")
        if "push_to_hub" in recipe:
            pushed = trainer.push_to_hub()
            if is_first:
                typer.echo(f"Uploaded to {pushed.repo_url}")


def _describe_choice(trainer: Any) -> str:
    """Return of which optimizer step the weights of the model are, if the evaluations chose them."""
    from ..training.arguments import best_key

    args, state = trainer.args, trainer.state
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return ""
    metric, step = best_key(args).removeprefix("eval_"), f"{state.best_global_step} of {state.global_step}"
    return f": the weights of optimizer step {step}, which have the best {metric}, {state.best_metric:.4f}"


def _load_data(recipe: Mapping[str, Any], seed: int) -> InstanceDatasets:
    """Load the data, and split off the validation images if the recipe says so."""
    data = load_instance_dataset(
        recipe["data"], class_names=recipe.get("class_names"), image_folder=recipe.get("image_folder")
    )
    if "train" not in data:
        raise ValueError(
            f"`data` must have a split named train, got {', '.join(data)} in {recipe['data']}. Rename one."
        )
    if "validation" not in recipe:
        return data
    if "validation" in data:
        raise ValueError(
            f"--validation requires data without a validation split, got {len(data['validation'])} validation images in"
            f" {recipe['data']}. Omit it."
        )
    return InstanceDatasets({**data, **split_dataset(data["train"], validation=recipe["validation"], seed=seed)})


@contextmanager
def report_interruption(describe: Callable[[], str], is_first: bool = True) -> Iterator[None]:
    """Print what the same command does next, and end with exit code 130, after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        if is_first:
            typer.echo(f"\nInterrupted. {describe()}", err=True)
        raise typer.Exit(130) from None


def _describe_restart(output: Path, resume: bool) -> str:
    """Return what the command does if it is given again after its run in `output` was interrupted."""
    from ..training.checkpoints import newest_checkpoint

    command = "The same command" if resume else "The same command without --no-resume"
    try:
        return f"{command} resumes from {newest_checkpoint(output)}"
    except ValueError:
        return f"There is no checkpoint yet. {command} starts again."


@contextmanager
def _explain_out_of_memory(arguments: Any) -> Iterator[None]:
    """Raise a ValueError that names the settings to change, for memory of a GPU that ran out."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        size, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        raise ValueError(
            f"--batch-size {size} needs more memory than the device has. Lower it, and raise"
            f" gradient_accumulation_steps ({steps}) in proportion; or lower --resolution. {error}"
        ) from error


def _training_arguments(recipe: Mapping[str, Any]) -> Any:
    from ..training.arguments import RfDetrTrainingArguments

    fields = {name: value for name, value in recipe.items() if name not in _OPTIONS}
    device = recipe.get("device", "auto")
    available = ["auto", "cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if device not in available:
        raise ValueError(
            f"`device` must be one of {', '.join(available)} on this machine, got {device}. To choose one of several"
            " GPUs, set CUDA_VISIBLE_DEVICES."
        )
    if device == "cpu":
        fields["use_cpu"] = True
    if "push_to_hub" in recipe:
        fields |= {"push_to_hub": True, "hub_model_id": recipe["push_to_hub"], "hub_strategy": "end"}
        fields["hub_private_repo"] = recipe.get("private")
    try:
        return RfDetrTrainingArguments(recipe["output"], **fields)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:  # transformers does not check all values
        raise ValueError(f"The training arguments are invalid together: {type(error).__name__}: {error}") from error


def find_checkpoint(output: Path, recipe: Mapping[str, Any]) -> str | None:
    """Return the newest complete checkpoint of a run in a folder, or None if there is none yet.

    Raises:
        ValueError: the folder has a run with other settings, or a run without its recipe.
    """
    from ..training.checkpoints import newest_checkpoint

    remedy = "Pass another --output, or --no-resume to move that run aside and start anew."
    files = _run_files(output)
    if all(path.name == RECIPE_NAME for path in files):
        return None
    if not (output / RECIPE_NAME).is_file():
        raise ValueError(f"{output} must have a {RECIPE_NAME} beside {files[0].name} to be resumed. {remedy}")
    earlier = _read_file(output / RECIPE_NAME)
    different = [
        f"{name} {earlier.get(name, 'unset')!r:.60} there, {recipe.get(name, 'unset')!r:.60} here"
        for name in sorted({*earlier, *recipe} - FREE_SETTINGS)
        if earlier.get(name) != recipe.get(name)
    ]
    if different:
        raise ValueError(
            f"{output} has a run with other settings ({'; '.join(different)}). {remedy} To train its model further,"
            f" pass --model {output / _MODEL_NAME} and another --output."
        )
    with suppress(ValueError):  # it was stopped before its first checkpoint
        return newest_checkpoint(output)
    return None


def _run_files(output: Path) -> list[Path]:
    """Return the files and folders of a run that exist in a folder."""
    patterns = (RECIPE_NAME, "checkpoint-*", "best_*", _MODEL_NAME)
    return [path for pattern in patterns for path in sorted(output.glob(pattern))]


def _prepare_folder(output: Path, recipe: Mapping[str, Any], resume: bool) -> None:
    """Write the recipe to the output folder; move the files of an earlier run aside unless it is resumed."""
    from ..training.checkpoints import restore_best_models

    restore_best_models(output)
    if not resume and (files := _run_files(output)):
        number = 1
        while (aside := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for path in files:
            shutil.move(path, aside / path.name)
        _set_output(aside)
        typer.echo(f"Moved the earlier run from {output} to {aside}")
    make_directory(output)
    write_text(output / RECIPE_NAME, _to_yaml(recipe))


def _set_output(folder: Path) -> None:
    """Make the recipes of a moved run, and of each of its models, resume it in its new folder."""
    for path in folder.rglob(RECIPE_NAME):
        with suppress(ValueError):  # a recipe that cannot be read is kept as it is
            write_text(path, _to_yaml({**_read_file(path), "output": str(folder)}))


def _versions() -> dict[str, str]:
    versions = {"transformers_rfdetr": __version__, "transformers": transformers.__version__}
    return versions | {"torch": str(torch.__version__)}


class _RecipeWriter(TrainerCallback):
    """Write the recipe beside every model of the run."""

    def __init__(self, text: str) -> None:
        self.text = text

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folders = (f"checkpoint-{state.global_step}", "best_total", "best_ema", "best_regular")
        for folder in folders if args.should_save else ():
            if (path := Path(args.output_dir, folder)).is_dir():
                write_text(path / RECIPE_NAME, self.text)
