"""The settings of `transformers-rfdetr train`, and the run that they describe."""

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
# Settings of the run's place and looks: what is trained does not depend on them.
_FREE = {
    *("output", "device", "use_cpu", "push_to_hub", "versions", "report_to", "run_name", "project", "disable_tqdm"),
    *("private", "log_level", "save_total_limit", "per_device_eval_batch_size", "dataloader_num_workers"),
    *("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
}
_KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    types.NoneType: "null",
}


# Settings


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and `no`, of eval_strategy, is a text."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_recipe(path: Path | None, given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The settings of a YAML file, and those given beside it, which go before.

    Args:
        path: Of the file, if there is one.
        given: Names and values, of options and fields of `RfDetrTrainingArguments`.

    Returns:
        What is not left at its default: "model", "data" and "output", possibly "device", "resolution", "class_names"
        and "push_to_hub", and training arguments under the names of their fields. Paths of what is there are absolute.

    Raises:
        ValueError: the file is no YAML; a name is not known (the message has the nearest one) or given twice; a value
            is of the wrong type; the model, the data or the output is missing.
    """
    kinds, defaults = _fields()
    file = {} if path is None else _read_yaml(path)
    file.pop("versions", None)
    recipe = _checked(f"--config {path}", file.items(), kinds) | _checked("the options", given, kinds)
    for name, remedy in (("model", "--model rf-detr-seg-medium"), ("data", "DATA"), ("output", "--output runs/mine")):
        if not recipe.get(name):
            raise ValueError(f"{name} is missing; give {remedy}, or {name}: in the file of --config")
    if isinstance(recipe.get("resolution"), str):
        recipe["resolution"] = read_size("--resolution", recipe["resolution"])
    if not recipe.get("num_train_epochs", 1) > 0 and recipe.get("max_steps", 0) <= 0:
        raise ValueError(f"--epochs {recipe['num_train_epochs']:g} trains nothing; give a number above 0")
    recipe |= {name: _absolute(recipe[name]) for name in ("model", "data", "image_folder") if name in recipe}
    recipe["output"] = str(Path(recipe["output"]).expanduser().absolute())
    kept = {name: value for name, value in recipe.items() if name in _OPTIONS or value != defaults[name]}
    return _plain({name: kept[name] for name in sorted(kept, key=lambda name: (name not in _OPTIONS, name))})


def _fields() -> tuple[dict[str, set[Any]], dict[str, Any]]:
    """What each setting may hold; and the defaults of the training arguments."""
    # Not at the top: the other commands run without accelerate.
    from ..training.arguments import RfDetrTrainingArguments

    hints = typing.get_type_hints(RfDetrTrainingArguments)
    # Tokens do not belong into files, and what is pushed where is said by push_to_hub.
    left_out = ("hub_", "push_to_hub", "output_dir", "resume_from_checkpoint", "local_rank", "_")
    fields = [
        field
        for field in dataclasses.fields(RfDetrTrainingArguments)
        if field.init and not field.name.startswith(left_out)
    ]
    kinds = {field.name: _kinds(hints[field.name]) | {type(field.default)} & {types.NoneType} for field in fields}
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields
    }
    return kinds | _OPTIONS, defaults


def _kinds(hint: Any) -> set[Any]:
    """`dict[str, Any] | None` -> {dict, NoneType}."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def _checked(source: str, given: Iterable[tuple[str, Any]], kinds: Mapping[str, set[Any]]) -> dict[str, Any]:
    """Settings under their own names, of the right types."""
    checked: dict[str, Any] = {}
    for spelled, value in given:
        name = str(spelled).replace("-", "_")
        name = _ALIASES.get(name, name)
        if name not in kinds:
            [near] = difflib.get_close_matches(name, [*kinds, *_ALIASES], n=1, cutoff=0.0)
            raise ValueError(f"{source}: there is no setting {str(spelled)!r}; did you mean {near!r}?")
        if name in checked:
            raise ValueError(f"{source}: {name} is given twice, the second time as {spelled!r}; leave one out")
        checked[name] = _fitted(f"{source}: {spelled}", value, kinds[name])
    return checked


def _fitted(where: str, value: Any, kinds: set[Any]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if type(value) not in kinds and Any not in kinds:
        rule = " or ".join(text for kind, text in _KIND_NAMES.items() if kind in kinds)
        raise ValueError(f"{where} is {value!r:.60}; it must be {rule}")
    return value


def read_setting(text: str) -> tuple[str, Any]:
    """Return name and value of "NAME=VALUE", the value read as YAML."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text} has no value; give NAME=VALUE, such as layer_decay=0.9")
    return name.strip(), read_yaml(value, _Loader, f"--set {text:.200}")


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(read_text(path), _Loader, str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings; it needs lines such as `lr: 1e-4`")
    return content


def _absolute(place: Any) -> Any:
    """The same from every working directory, where it is a path that is there."""
    if isinstance(place, Mapping):
        return {name: _absolute(part) for name, part in place.items()}
    if not isinstance(place, str):
        raise ValueError(f"{place!r:.60} is no path; give a folder, a file or a data set on the Hub")
    return absolute(place)


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """As YAML gives it back, so that it can be compared with what was written."""
    return yaml.load(yaml.safe_dump(_without_tuples(recipe), sort_keys=False, allow_unicode=True), _Loader)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_tuples(part) for name, part in value.items()}
    return [*map(_without_tuples, value)] if isinstance(value, list | tuple) else value


# The run


def run_recipe(recipe: Mapping[str, Any], *, resume: bool = True) -> None:
    """Train, evaluate and save what [`read_recipe`] returns.

    Args:
        recipe: The settings.
        resume: Whether a run in the output folder goes on; otherwise its files are moved to a folder beside it.

    Raises:
        ValueError: the output folder holds a run with other settings; or what model, data and trainer refuse.
    """
    try:
        from accelerate.utils import broadcast_object_list
    except ImportError as error:
        raise ImportError('training needs accelerate: pip install "transformers-rfdetr[train]"') from error
    from ..training.checkpoints import restore_best_models
    from ..training.trainer import RfDetrTrainer

    arguments = _training_arguments(recipe)
    is_first, output = arguments.process_index == 0, Path(recipe["output"])
    data = load_instance_dataset(
        recipe["data"], class_names=recipe.get("class_names"), image_folder=recipe.get("image_folder")
    )
    if "train" not in data:
        raise ValueError(f"{recipe['data']} has the splits {', '.join(data)}, and no train; rename one, or add it")
    names = dict(zip(data.category_ids, data.id2label.values(), strict=True))
    recipe = {**recipe, "class_names": names, "versions": _versions()}
    if is_first:
        restore_best_models(output)
    # The first process alone looks and changes: what the others would find depends on when they look.
    [checkpoint] = broadcast_object_list([find_checkpoint(output, recipe) if resume and is_first else None])
    set_seed(arguments.seed)  # of heads for new classes
    model, processor = _load_model(recipe, data)
    if is_first:
        _prepare_folder(output, recipe, resume)
        typer.echo(f"Resuming from {checkpoint}" if checkpoint else f"A new run, in {output}")
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
        rule = "not on this machine" if device in is_here else f"none of {', '.join(is_here)}"
        raise ValueError(f"device {device} is {rule}; of several GPUs CUDA_VISIBLE_DEVICES=1 shows the second alone")
    if device == "cpu":
        fields["use_cpu"] = True
    if "push_to_hub" in recipe:
        fields |= {"push_to_hub": True, "hub_model_id": recipe["push_to_hub"], "hub_strategy": "end"}
    try:
        return RfDetrTrainingArguments(recipe["output"], **fields)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:  # transformers does not look at all of them
        raise ValueError(f"the training arguments do not fit together: {type(error).__name__}: {error}") from error


def _load_model(recipe: Mapping[str, Any], data: Any) -> tuple[Any, Any]:
    """The checkpoint, with new heads unless its classes are the data's."""
    options = {"resolution": recipe["resolution"]} if "resolution" in recipe else {}
    model, processor = load(recipe["model"], **options)
    if {label: name for label, name in model.config.id2label.items() if not is_background_label(name)} != data.id2label:
        options |= {"id2label": data.id2label, "ignore_mismatched_sizes": True}
        model, processor = load(recipe["model"], **options)
    return model, processor


def find_checkpoint(output: Path, recipe: Mapping[str, Any]) -> str | None:
    """The newest whole checkpoint of a run in a folder, or None where there is none yet.

    Raises:
        ValueError: the folder holds a run with other settings, or what may be one.
    """
    from ..training.checkpoints import newest_checkpoint

    remedy = "give another --output, or --no-resume to move what is there aside and begin anew"
    traces = _traces(output)
    if all(trace.name == RECIPE_NAME for trace in traces):  # nothing, or a run that left nothing to go on from
        return None
    if not (output / RECIPE_NAME).is_file():
        raise ValueError(f"{output} holds {traces[0].name} and no {RECIPE_NAME} that says of which run; {remedy}")
    earlier = _read_yaml(output / RECIPE_NAME)
    wanted = _plain(recipe)
    different = [
        f"{name} {earlier.get(name, 'unset')!r:.60} there, {wanted.get(name, 'unset')!r:.60} here"
        for name in sorted({*earlier, *wanted} - _FREE)
        if earlier.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(f"{output} holds a run with other settings ({'; '.join(different)}); {remedy}")
    try:
        return newest_checkpoint(str(output))
    except ValueError:  # it was stopped before the first one
        return None


def _traces(output: Path) -> list[Path]:
    """What a run leaves in its folder."""
    patterns = (RECIPE_NAME, "checkpoint-*", "best_*", _MODEL_NAME)
    return [path for pattern in patterns for path in sorted(output.glob(pattern))]


def _prepare_folder(output: Path, recipe: Mapping[str, Any], resume: bool) -> None:
    if not resume and (traces := _traces(output)):
        number = 1
        while (aside := output.with_name(f"{output.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for path in traces:
            shutil.move(path, aside / path.name)
        typer.echo(f"The run that was in {output} is in {aside} now")
    make_directory(output)
    write_text(output / RECIPE_NAME, _as_yaml(recipe))


def _as_yaml(recipe: Mapping[str, Any]) -> str:
    text = yaml.safe_dump(_without_tuples(recipe), sort_keys=False, allow_unicode=True)
    return f"# transformers-rfdetr train --config {RECIPE_NAME} goes on with this run; --output repeats it\n{text}"


def _versions() -> dict[str, str]:
    versions = {"transformers_rfdetr": __version__, "transformers": transformers.__version__}
    return versions | {"torch": str(torch.__version__)}


class _KeepRecipe(TrainerCallback):
    """Writes the settings beside every model of the run."""

    def __init__(self, text: str) -> None:
        self.text = text

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folders = (f"checkpoint-{state.global_step}", "best_total", "best_ema", "best_regular")
        for folder in folders if args.should_save else ():
            if (path := Path(args.output_dir, folder)).is_dir():
                write_text(path / RECIPE_NAME, self.text)
