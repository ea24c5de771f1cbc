"""What goes to the Hub beside the weights: the model card and the code; and the upload itself.

[`model_card`] turns facts into text and reads nothing else.
"""

import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from transformers.utils import logging

from ..atomic_files import write_text
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.variants_rf_detr import is_background_label

logger = logging.get_logger(__name__)

CURVES, GRID, RECIPE = "training_curves.png", "predictions.png", "training_arguments.json"
# Numbers of the evaluation in the order of the card's table, and those that the Hub shows.
_NUMBERS = {
    "segm_AP": "Mask AP",
    "segm_AP50": "Mask AP50",
    "segm_AP75": "Mask AP75",
    "segm_AP_small": "Mask AP, small objects",
    "segm_AP_medium": "Mask AP, medium objects",
    "segm_AP_large": "Mask AP, large objects",
    "segm_AR_100": "Mask AR, 100 detections",
    "bbox_AP": "Box AP",
    "bbox_AP50": "Box AP50",
    "bbox_AP75": "Box AP75",
    "bbox_AR_100": "Box AR, 100 detections",
    "mean_iou": "Mean IoU",
}
_INDEXED = ("segm_AP", "segm_AP50", "segm_AP75", "bbox_AP", "bbox_AP50", "bbox_AP75", "mean_iou")

# -- the card --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is known of a training run. The card leaves out what stays empty.

    Attributes:
        base_model: Hub id of the checkpoint that was fine-tuned.
        datasets: Hub ids or names.
        splits: Name -> (pictures, objects).
        objects: Class -> objects to train on.
        results: What was measured on -> numbers of [`InstanceSegmentationEvaluator.compute`], AP in [0, 1], -1 where
            there is nothing to find.
        recipe: What was set -> its value.
        note: What a reader of the numbers must know.
        pictures: Files of the repository -> captions.
        is_adapter: Whether the repository holds a LoRA of `base_model` instead of a whole model.
    """

    base_model: str | None = None
    datasets: Sequence[str] = ()
    splits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    objects: Mapping[str, int] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)
    is_adapter: bool = False


_WITH_PACKAGE = """
With transformers-rfdetr (`pip install transformers-rfdetr`):

```python
from transformers_rfdetr import predict
from transformers_rfdetr.hub.load import load

model, processor = load({name})
[instances] = predict(model, processor, ["picture.jpg"], threshold=0.5)
print(instances.names, instances.scores, instances.boxes{masks})
```

After `import transformers_rfdetr`, `{auto}.from_pretrained` and `pipeline("{task}")` of
transformers load it too.
"""
_ADAPTER = """
With transformers-rfdetr and peft (`pip install transformers-rfdetr peft`):

```python
from peft import PeftModel
from transformers_rfdetr import predict
from transformers_rfdetr.hub.load import load

base, processor = load({base})
model = PeftModel.from_pretrained(base, {name}).merge_and_unload()
[instances] = predict(model, processor, ["picture.jpg"], threshold=0.5)
print(instances.names, instances.scores, instances.boxes{masks})
```
"""
_WITHOUT_PACKAGE = """
Without it, {how}:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto}

model = {auto}.from_pretrained({name}{trust}).eval()
processor = AutoImageProcessor.from_pretrained({name}{trust})
image = Image.open("picture.jpg").convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
[result] = processor.{post_process}(outputs, threshold=0.5, target_sizes=[image.size[::-1]])
```
"""
_BY_CODE = (
    'by the code in this repository (`pip install "transformers>=5" torchvision scipy pycocotools`), which'
    " `trust_remote_code=True` runs"
)
_BY_PORT = (
    'by the port of RF-DETR that transformers has since 5.9 (`pip install "transformers>=5.9" torchvision scipy`)'
)


def model_card(
    name: str,
    config: RfDetrConfig,
    *,
    has_masks: bool,
    run: Run | None = None,
    with_code: bool = False,
    title: str | None = None,
    tags: Sequence[str] = (),
    **metadata: Any,
) -> str:
    """The README of a model on the Hub, with the metadata that the Hub shows and searches.

    Names of classes, data sets and files are text, whatever they hold.

    Args:
        name: What `from_pretrained` takes: the repository, or a folder.
        config: The model's configuration.
        has_masks: Whether it segments.
        run: The training run that it comes from.
        with_code: Whether the repository holds the code as well; see [`add_code`].
        title: The heading; the last part of `name` by default.
        tags: Tags besides those of the task.
        **metadata: For `huggingface_hub.ModelCardData`: `license`, `language`.
    """
    run = run or Run()
    results = _eval_results(run, has_masks)
    title = one_line(title or Path(name).name)
    data = ModelCardData(
        library_name="peft" if run.is_adapter else "transformers",
        pipeline_tag=_task(has_masks),
        base_model=run.base_model,
        datasets=[dataset for dataset in run.datasets if is_hub_id(dataset)] or None,
        tags=["rf-detr", "instance-segmentation" if has_masks else "object-detection", *tags],
        eval_results=results or None,
        model_name=title if results else None,
        **metadata,
    )
    names = {label: name for label, name in config.id2label.items() if not is_background_label(name)}
    parts = [
        f"# {escape(title)}",
        _summary(config, len(names), has_masks, run),
        _results(run),
        run.note or "",
        *(f"![{escape(caption)}]({file})\n\n*{escape(caption)}*" for file, caption in run.pictures.items()),
        "## Use\n" + _usage(name, config, has_masks, run, with_code),
        _classes(names, run),
        _training(run),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in parts if part) + "\n"


def _task(has_masks: bool) -> str:
    return "image-segmentation" if has_masks else "object-detection"


def _summary(config: RfDetrConfig, num_classes: int, has_masks: bool, run: Run) -> str:
    side = config.resolution
    height, width = (side, side) if isinstance(side, int) else side
    text = (
        f"RF-DETR for {'instance segmentation' if has_masks else 'object detection'}: {height} x {width} pixels,"
        f" {config.num_queries} queries, {num_classes} {'class' if num_classes == 1 else 'classes'}."
    )
    if run.base_model:
        kind = "A LoRA adapter of" if run.is_adapter else "Fine-tuned from"
        text += f" {kind} [{escape(run.base_model)}](https://huggingface.co/{run.base_model})."
    if run.datasets:
        text += f" Trained on {', '.join(map(_data_link, run.datasets))}."
    return text


def _data_link(name: str) -> str:
    return f"[{escape(name)}](https://huggingface.co/datasets/{name})" if is_hub_id(name) else escape(name)


def _usage(name: str, config: RfDetrConfig, has_masks: bool, run: Run, with_code: bool) -> str:
    fields = {
        "name": json.dumps(name),
        "auto": "AutoModelForInstanceSegmentation" if has_masks else "AutoModelForObjectDetection",
        "task": _task(has_masks),
        "masks": ", instances.masks" if has_masks else "",
        "post_process": f"post_process_{'instance_segmentation' if has_masks else 'object_detection'}",
    }
    if run.is_adapter:
        return _ADAPTER.format(base=json.dumps(run.base_model or "the base model"), **fields)
    text = _WITH_PACKAGE.format(**fields)
    # The port has no P3 and P5, and swaps the sides of rectangles.
    port_reads = config.projector_scale == ["P4"] and isinstance(config.resolution, int)
    if with_code:
        text += _WITHOUT_PACKAGE.format(how=_BY_CODE, trust=", trust_remote_code=True", **fields)
    elif port_reads:
        text += _WITHOUT_PACKAGE.format(how=_BY_PORT, trust="", **fields)
    return text


def _results(run: Run) -> str:
    """A table of the numbers, one column for each data set that was measured."""
    if not run.results:
        return ""
    rows = [
        [label, *(_number(numbers.get(key)) for numbers in run.results.values())]
        for key, label in _NUMBERS.items()
        if any(key in numbers for numbers in run.results.values())
    ]
    text = "## Results\n\n" + _table(["", *run.results], rows)
    return text + "\n\nCOCO's numbers, from 0 to 1; – where the data have nothing to find."


def _classes(names: Mapping[int, str], run: Run) -> str:
    """A table of the classes, with what is known of each; folded if it is long."""
    columns: dict[str, Mapping[str, str]] = {}
    if run.objects:
        columns["objects to train on"] = {name: str(count) for name, count in run.objects.items()}
    for title, numbers in run.results.items():
        for key, label in (("segm_AP", "mask AP"), ("bbox_AP", "box AP")):
            values = {name: one[key] for name, one in numbers.get("per_class", {}).items() if key in one}
            if values:
                columns[f"{label}, {title}"] = {name: _number(value) for name, value in values.items()}
                break
    rows = [[label, name, *(column.get(name, "") for column in columns.values())] for label, name in names.items()]
    table = _table(["label", "class", *columns], rows)
    if len(rows) > 20:
        table = f"<details><summary>{len(rows)} classes</summary>\n\n{table}\n\n</details>"
    return f"## Classes\n\n{table}"


def _training(run: Run) -> str:
    parts = []
    if run.splits:
        parts.append(_table(["split", "pictures", "objects"], [[name, *counts] for name, counts in run.splits.items()]))
    if run.recipe:
        parts.append(_table(["recipe", ""], [[name, value] for name, value in run.recipe.items()]))
    return "\n\n".join(["## Training", *parts]) if parts else ""


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(str(c) if line is lines[1] else escape(str(c)) for c in line)} |" for line in lines
    )


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else "–"


def _eval_results(run: Run, has_masks: bool) -> list[EvalResult]:
    """The numbers as the Hub's `model-index` has them."""
    dataset = one_line(run.datasets[0]) if run.datasets else "unnamed"
    return [
        EvalResult(
            task_type=_task(has_masks),
            dataset_type=dataset if is_hub_id(dataset) else "custom",
            dataset_name=dataset,
            dataset_split=one_line(split),
            metric_type="mean_iou" if key == "mean_iou" else "mean_average_precision",
            metric_name=_NUMBERS[key],
            metric_value=round(float(numbers[key]), 4),
        )
        for split, numbers in run.results.items()
        for key in _INDEXED
        if _number(numbers.get(key)) != "–"
    ]


def one_line(text: str) -> str:
    """Text without line breaks and without spaces in a row."""
    return " ".join(text.split())


def escape(text: str) -> str:
    """Text that Markdown shows as it is, whatever it holds."""
    # Colon and dot of https:// and www., which some readers make links.
    return re.sub(r"([\\`*_{}\[\]<>#|&~!$]|:(?=//)|(?<=www)\.)", r"\\\1", one_line(text))


def is_hub_id(name: str | None) -> bool:
    """Whether it can be the name of a repository, owner included, and is no folder here."""
    return bool(name) and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)) and not Path(name).exists()


# -- the code --------------------------------------------------------------------------------------------------------

_MODEL_FOLDER = Path(__file__).parents[1] / "model"
CODE_FILES = tuple(sorted(path.name for path in _MODEL_FOLDER.glob("*.py") if path.name != "__init__.py"))
_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_rf_detr.RfDetrImageProcessor"}
_DETECTION_MAP = {
    "AutoConfig": "configuration_rf_detr.RfDetrConfig",
    "AutoModel": "modeling_rf_detr.RfDetrModel",
    "AutoModelForObjectDetection": "modeling_rf_detr.RfDetrForObjectDetection",
}
_SEGMENTATION_MAP = {
    "AutoModelForInstanceSegmentation": "modeling_rf_detr.RfDetrForInstanceSegmentation",
    "AutoModelForImageSegmentation": "modeling_rf_detr.RfDetrForInstanceSegmentation",
}


def add_code(folder: Path) -> list[Path]:
    """Put the code beside a saved model or image processor, so that both load where this package is absent.

    `trust_remote_code=True` runs it then, instead of the port of transformers >= 5.9.

    Returns:
        The files of the code.
    """
    for name, auto_map in (
        ("config.json", _DETECTION_MAP | _PROCESSOR_MAP),
        ("preprocessor_config.json", _PROCESSOR_MAP),
    ):
        path = folder / name
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if any("Segmentation" in architecture for architecture in stored.get("architectures") or []):
                auto_map = auto_map | _SEGMENTATION_MAP
            text = json.dumps(stored | {"auto_map": auto_map}, indent=2, sort_keys=True)
            write_text(path, f"{text}\n")
    return [Path(shutil.copyfile(_MODEL_FOLDER / name, folder / name)) for name in CODE_FILES]


# -- the upload ------------------------------------------------------------------------------------------------------

_WAITS = (1.0, 4.0, 16.0)  # seconds before each further attempt
_LONGEST_WAIT = 300.0  # that a server may ask for; the Hub counts requests over five minutes
_Result = TypeVar("_Result")


def push_to_hub(
    thing: Any,
    repo_id: str,
    *,
    with_code: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Sequence[str] = (),
) -> CommitInfo:
    """Upload a model or an image processor in one commit; a model with a card, unless the repository has one.

    What fails and may pass (no connection, too many requests, an error of the server) is tried again. Large files that
    arrived are not sent twice, also not by another push.

    Args:
        thing: The model or image processor.
        repo_id: The repository; it is created if it is not there.
        with_code: Whether to add the code of this package; see [`add_code`].
        commit_message: "Upload model" or "Upload processor" by default.
        commit_description: Of the commit.
        private: Whether it is created as a private one; the owner's default otherwise.
        token: The one that `hf auth login` has stored by default.
        revision: Branch; created from `main` if it is not there.
        create_pr: Whether to open a pull request instead.
        max_shard_size: Of a model's weights.
        tags: For the model card.

    Raises:
        OSError: nothing was pushed; the message says why.
    """
    is_model = hasattr(thing, "state_dict")
    kept = "nothing is lost here"
    repo_id = create_repository(repo_id, private=private, token=token, kept=kept)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if is_model:
            thing.save_pretrained(folder, max_shard_size=max_shard_size)
            _add_card(folder, thing, repo_id, with_code, tags, revision=revision, token=token)
        else:
            thing.save_pretrained(folder)
        if with_code:
            add_code(folder)
        return upload(
            folder,
            [path for path in folder.rglob("*") if path.is_file()],
            repo_id,
            kept=kept,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {'model' if is_model else 'processor'}",
            commit_description=commit_description,
        )


def _add_card(
    folder: Path, model: Any, repo_id: str, with_code: bool, tags: Sequence[str], *, revision: Any, token: Any
) -> None:
    """Write a card for a model of which nothing but itself is known, or add tags to the one that is there."""
    api = HfApi(token=token)
    if not api.file_exists(repo_id, "README.md", revision=revision):
        text = model_card(
            repo_id,
            model.config,
            has_masks=hasattr(model, "segmentation_head"),
            with_code=with_code,
            tags=tags,
        )
        write_text(folder / "README.md", text)
    elif tags:
        card = ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(folder / "README.md")


def create_repository(repo_id: str, *, private: bool | None, token: str | bool | None, kept: str) -> str:
    """Create a repository if it is not there -> its name with the owner's. OSError as of [`upload`]."""
    create = HfApi(token=token).create_repo
    return _persist(lambda: create(repo_id, private=private, exist_ok=True).repo_id, repo_id, kept)


def upload(
    folder: Path,
    files: Sequence[Path],
    repo_id: str,
    *,
    kept: str,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    path_in_repo: str = "",
    **commit: Any,
) -> CommitInfo:
    """Upload files of a folder in one commit: a reader sees all of them or none.

    Args:
        folder: What their names in the repository are relative to.
        files: The files.
        repo_id: A repository that is there.
        kept: Where everything is if the upload fails, for the message.
        token: As of [`push_to_hub`].
        revision: As of [`push_to_hub`].
        create_pr: As of [`push_to_hub`].
        path_in_repo: Folder of the repository.
        **commit: `commit_message`, `commit_description`.

    Raises:
        OSError: the upload failed for good.
    """
    api = HfApi(token=token)

    def attempt() -> CommitInfo:
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(str(Path(path_in_repo, path.relative_to(folder)).as_posix()), str(path))
            for path in sorted(files)
        ]
        return api.create_commit(repo_id, operations, revision=revision, create_pr=create_pr, **commit)

    return _persist(attempt, repo_id, kept)


def _persist(action: Callable[[], _Result], repo_id: str, kept: str) -> _Result:
    """The result of an action, tried again after what may pass; OSError with a remedy after the rest."""
    for wait in (*_WAITS, None):
        try:
            return action()
        except Exception as error:  # huggingface_hub raises its own, its HTTP client's and RuntimeError
            causes = [error, error.__cause__, getattr(error.__cause__, "__cause__", None)]
            response = next((r for cause in causes if (r := getattr(cause, "response", None)) is not None), None)
            status = getattr(response, "status_code", None)
            if wait is None or not _may_pass(status, causes):
                reason = one_line(str(error.__cause__ or error) if isinstance(error, RuntimeError) else str(error))
                raise OSError(f"{repo_id} was not pushed: {reason} {_remedy(status)}; {kept}") from error
            asked = str(response.headers.get("Retry-After", "")) if response is not None else ""
            wait = min(float(asked), _LONGEST_WAIT) if asked.isdigit() else wait
            logger.warning(f"{repo_id}: {one_line(str(error))}; trying again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(status: int | None, causes: Iterable[BaseException | None]) -> bool:
    if status is not None:
        return status in (408, 409, 412, 429) or status >= 500  # 409, 412: of two commits at a time
    return any(
        isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith("httpx")
        for cause in causes
    )


def _remedy(status: int | None) -> str:
    if status in (401, 403, 404):
        return "Log in with `hf auth login`, or pass a token that may write there"
    if status is None or status in (408, 429) or status >= 500:
        return "Push again: what has arrived is not sent twice"
    return "Correct that and push again"
