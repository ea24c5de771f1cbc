"""Compare rfdetr, transformers' port and this package on one checkpoint of rfdetr, stage by stage.

    python conversion_scripts/verify_conversion.py checkpoint_best_total.pth --image photo.jpg

The exit code is 0 if ours agrees with the original, 1 if it does not, and 2 for invalid input. The original must be
installed: pip install rfdetr.
"""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from PIL import Image
from torch import Tensor, nn

import transformers_rfdetr
from transformers_rfdetr import RfDetrConfig, RfDetrImageProcessor
from transformers_rfdetr.cli.errors import one_line_errors
from transformers_rfdetr.cli.options import VariantOption
from transformers_rfdetr.conversion.architecture import rfdetr_class
from transformers_rfdetr.conversion.convert import convert_to_transformers
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.model.checkpoint_layouts import to_original_layout
from transformers_rfdetr.model.image_io import read_rgb
from transformers_rfdetr.model.variants_rf_detr import BACKGROUND, PARENT, resolve_variant
from transformers_rfdetr.text_table import format_table

TOLERANCE = 1e-3  # of a stage's largest magnitude, or of 1 where that is smaller
_NUM_SHOWN = 3  # detections of each implementation, if none scores above the threshold
_SELECTION = "first stage: class logits"  # the tokens with the highest ones become queries
# The modules of projector, first-stage norm and class head, and decoder layers: the original's, which are ours too, ...
_ORIGINAL = (
    "backbone.0.projector",
    "transformer.enc_output_norm.0",
    "transformer.enc_out_class_embed.0",
    "transformer.decoder.layers",
)
# ... and those of the port, in its RfDetrModel.
_PORT = ("backbone.projector", "enc_output_norm.0", "enc_out_class_embed.0", "decoder.layers")


# The name of the class, the score, and the box [x0, y0, x1, y1] in pixels of the image.
Detection = tuple[str, float, list[float]]


class Task(NamedTuple):
    """The input of each model."""

    image: Image.Image
    pixels: Tensor  # (1, 3, height, width), of our processor
    threshold: float
    classes: list[int]  # labels that are classes; rfdetr's fine-tuned heads have further rows
    logits: Tensor | None = None  # the original's first-stage logits, for the others


class Side(NamedTuple):
    """The results of one implementation."""

    stages: dict[str, Tensor]  # in the order of computation; first the pixels of its own preprocessing
    parameters: dict[str, Tensor]  # by the original names
    detections: list[Detection]


class Row(NamedTuple):
    """A stage or a parameter: the largest differences from the original."""

    name: str
    largest: float  # magnitude in the original; NaN where it has no such tensor
    ours: float | None  # infinite for another shape, None where one of the two has no such tensor
    port: float | None

    @property
    def agrees(self) -> bool:
        """Return whether ours is within the tolerance."""
        return self.ours is not None and self.ours <= TOLERANCE * max(1.0, self.largest)


class Comparison(NamedTuple):
    """The differences in all stages, and the detections."""

    stages: list[Row]
    parameters: list[Row]  # those that are not bitwise equal everywhere
    detections: dict[str, list[Detection]]
    notes: list[str]

    @property
    def agrees(self) -> bool:
        """Return whether ours computes what the original does, from bitwise equal parameters."""
        return all(row.agrees for row in self.stages) and not any(row.ours for row in self.parameters)


@one_line_errors
def verify_conversion(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint file of rfdetr: .pth, .pt or .ckpt.")],
    folder: Annotated[Path | None, typer.Option(help="Its conversion. Default: a temporary one.")] = None,
    image: Annotated[str | None, typer.Option(help="Path or URL of an image. Default: a drawn scene.")] = None,
    threshold: Annotated[float, typer.Option(help="Minimum score of a detection, from 0 to 1.")] = 0.5,
    variant: VariantOption = None,
) -> None:
    """Compare what rfdetr, transformers' port and this package compute from one checkpoint, stage by stage."""
    comparison = compare(checkpoint, folder, image=image, threshold=threshold, variant=variant)
    typer.echo(describe(comparison))
    if not comparison.agrees:
        raise typer.Exit(1)


@torch.no_grad()
def compare(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    image: str | os.PathLike[str] | None = None,
    threshold: float = 0.5,
    variant: str | None = None,
) -> Comparison:
    """Run the three implementations in float32 on the same pixels; the arguments are those of the command.

    Raises:
        ImportError: rfdetr, or a package that it needs for this checkpoint, is not installed.
        ValueError: The checkpoint, the folder or the image cannot be read, or the threshold is outside [0, 1].
    """
    if not Path(checkpoint).is_file():
        raise ValueError(f"`checkpoint` must be a file of rfdetr, such as checkpoint_best_total.pth, got {checkpoint}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must be within [0, 1], got {threshold}")
    scene = draw_scene(seed=0)[0] if image is None else read_rgb(image)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            conversion = convert_to_transformers(checkpoint, Path(temporary) / "converted", variant=variant)
            folder, notes = conversion.output, [f"converted with {change}" for change in conversion.changes]
        return _compare(_load_original(checkpoint, variant), str(folder), scene, threshold, notes)


def _compare(original: Any, folder: str, image: Image.Image, threshold: float, notes: list[str]) -> Comparison:
    kind = "RfDetrForInstanceSegmentation" if original.model_config.segmentation_head else "RfDetrForObjectDetection"
    config, processor = RfDetrConfig.from_pretrained(folder), RfDetrImageProcessor.from_pretrained(folder)
    rows = original.model.model.class_embed.out_features
    if rows != config.num_labels:
        raise ValueError(f"`folder` must have the {rows} labels of the checkpoint, got {config.num_labels} in {folder}")
    classes = [label for label, name in config.id2label.items() if name not in (BACKGROUND, PARENT)]
    if len(classes) < len(config.id2label):
        notes.append("class head: rows that are not classes are excluded here; the others may report them as objects")
    task = Task(image, processor(image, return_tensors="pt").pixel_values, threshold, classes)

    sides = {"original": _original_side(original, task)}
    task = task._replace(logits=sides["original"].stages[_SELECTION])
    try:
        sides["port"] = _port_side(kind, folder, config, task)
    except Exception as error:  # any error of the port becomes a note
        version = f"transformers {transformers.__version__} (the port exists since 5.9)"
        notes.append(f"no column for the port in {version}: {_reason(error)}")
    model = getattr(transformers_rfdetr, kind).from_pretrained(folder, dtype=torch.float32)
    sides["ours"] = _side(model, model, _ORIGINAL, processor, task)

    notes += [note for name in sides for note in _selection_notes(name, sides, config.num_queries)]
    parameters = [row for row in _rows(sides, "parameters") if row.ours != 0 or ("port" in sides and row.port != 0)]
    detections = {name: side.detections for name, side in sides.items()}
    return Comparison(_rows(sides, "stages"), parameters, detections, notes)


# The implementations


def _load_original(checkpoint: str | os.PathLike[str], variant: str | None) -> Any:
    """Return rfdetr's model of the checkpoint; `variant` names its class if rfdetr cannot read it from the file."""
    try:
        import rfdetr
    except ImportError as error:
        raise ImportError(f"the original cannot be imported ({error}); pip install rfdetr") from error
    try:
        try:
            return rfdetr.RFDETR.from_checkpoint(checkpoint, device="cpu")
        except ValueError:
            if variant is None:
                raise
            named = getattr(rfdetr, rfdetr_class(resolve_variant(variant)))
            return named(pretrain_weights=str(checkpoint), device="cpu")
    except (ImportError, OSError):
        raise
    except Exception as error:  # torch's, pickle's and pydantic's too
        hint = "" if variant else " (--variant names its class)"
        raise ValueError(f"rfdetr cannot load {checkpoint}{hint}: {_reason(error)}") from error


def _original_side(original: Any, task: Task) -> Side:
    model = original.model.model.float().eval()
    stages, outputs = _run(model, model, _ORIGINAL, task)
    score, count = _lowest_score(outputs["pred_logits"], task)
    prepared: list[Tensor] = []
    with model.register_forward_pre_hook(lambda _, inputs: prepared.append(inputs[0])):
        found = original.predict(task.image, threshold=score)
    detections = _detections(found.data["class_name"].tolist(), found.confidence.tolist(), found.xyxy.tolist())
    return Side({"pixels": prepared[0]} | stages, model.state_dict(), detections[:count])


def _port_side(kind: str, folder: str, config: RfDetrConfig, task: Task) -> Side:
    """Run the port by its own modules, because the Auto classes return ours."""
    port = "transformers.models.rf_detr"
    modeling, processing = (import_module(f"{port}.{name}_rf_detr") for name in ("modeling", "image_processing"))
    if config.projector_scale != ["P4"] or config.backbone_config.num_register_tokens:
        raise ValueError("the port has one projector level, P4, and no register tokens; this model has others")
    model = getattr(modeling, kind).from_pretrained(folder, dtype=torch.float32)
    root = next(module for module in model.modules() if isinstance(module, modeling.RfDetrModel))
    return _side(model, root, _PORT, processing.RfDetrImageProcessor.from_pretrained(folder), task)


def _side(model: Any, root: nn.Module, modules: Sequence[str], processor: Any, task: Task) -> Side:
    prepared = processor(task.image, return_tensors="pt").pixel_values
    stages, outputs = _run(model.eval(), root, modules, task)
    score, count = _lowest_score(outputs.logits, task)
    [found] = processor.post_process_object_detection(outputs, score, target_sizes=[task.image.size[::-1]])
    names = [model.config.id2label[label] for label in found["labels"].tolist()]
    detections = _detections(names, found["scores"].tolist(), found["boxes"].tolist())
    return Side({"pixels": prepared} | stages, to_original_layout(model.state_dict()), detections[:count])


def _lowest_score(logits: Tensor, task: Task) -> tuple[float, int | None]:
    """Return the score that shown detections exceed and their number: the best few if none exceeds the threshold."""
    best = logits[..., task.classes].sigmoid().flatten().sort(descending=True).values[:_NUM_SHOWN]
    return (task.threshold, None) if best[0] > task.threshold else (0.999 * best[-1].item(), _NUM_SHOWN)


def _detections(names: list[str], scores: list[float], boxes: list[list[float]]) -> list[Detection]:
    found = zip(names, scores, boxes, strict=True)
    return [detection for detection in found if detection[0] not in (BACKGROUND, PARENT)]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# Stages


class _Recorder:
    """Hooks that store the output of each stage."""

    def __init__(self, expected: Tensor | None) -> None:
        self.stages: dict[str, Tensor] = {}
        self.expected = expected

    def attach(self, root: nn.Module, modules: Sequence[str]) -> ExitStack:
        """Return a context with the hooks, which are removed at its end."""
        projector, norm, head, layers = (root.get_submodule(name) for name in modules)
        pairs = [(projector, self._projector), (norm, self._tokens), (head, self._logits)]
        hooks = ExitStack()
        for module, hook in [*pairs, *((layer, self._layer) for layer in layers)]:
            hooks.enter_context(module.register_forward_hook(hook))
        hooks.enter_context(layers[0].register_forward_pre_hook(self._boxes, with_kwargs=True))
        return hooks

    def _projector(self, module: nn.Module, inputs: Any, levels: Any) -> None:
        levels = [levels] if isinstance(levels, Tensor) else levels
        self.stages |= {f"backbone: tap {index}": tap for index, tap in enumerate(inputs[0], start=1)}
        self.stages |= {f"projector: level {index}": level for index, level in enumerate(levels, start=1)}

    def _tokens(self, module: nn.Module, inputs: Any, tokens: Tensor) -> None:
        self.stages.setdefault("first stage: tokens", tokens)  # the original normalizes the selected ones again

    def _logits(self, module: nn.Module, inputs: Any, logits: Tensor) -> Tensor | None:
        """Continue with the original's logits if those of the first stage agree with them.

        Rounding decides the order of tokens with nearly equal scores, and queries in another order cannot be compared.
        """
        if _SELECTION in self.stages:  # called again, for the selected tokens
            return None
        self.stages[_SELECTION] = logits
        return self.expected if _row(_SELECTION, self.expected, logits, None).agrees else None

    def _boxes(self, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        boxes = named["reference_points"] if "reference_points" in named else inputs[2]
        self.stages["first stage: selected boxes"] = boxes[:, :, 0]  # the same for each level

    def _layer(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        number = 1 + sum(name.startswith("decoder") for name in self.stages)
        self.stages[f"decoder: layer {number}"] = outputs if isinstance(outputs, Tensor) else outputs[0]


def _run(model: nn.Module, root: nn.Module, modules: Sequence[str], task: Task) -> tuple[dict[str, Tensor], Any]:
    """Return the output of each stage, and the outputs of the model."""
    recorder = _Recorder(task.logits)
    with recorder.attach(root, modules):
        outputs = model(task.pixels)
    logits = outputs["pred_logits" if "pred_logits" in outputs else "logits"]
    last = {"class logits": logits[..., task.classes], "boxes": outputs["pred_boxes"]}
    masks = {"mask logits": outputs["pred_masks"]} if "pred_masks" in outputs else {}
    return recorder.stages | last | masks, outputs


def _selection_notes(name: str, sides: Mapping[str, Side], num_queries: int) -> list[str]:
    """Return a note on the tokens that a side selects by its own logits, if they differ."""
    expected, own = (sides[side].stages[_SELECTION][0].amax(-1) for side in ("original", name))
    expected_tokens, tokens = (
        scores.topk(min(num_queries, len(scores))).indices.tolist() for scores in (expected, own)
    )
    if expected_tokens == tokens:
        return []
    count = len(set(tokens) - set(expected_tokens))
    difference = (
        f"{count} other first-stage tokens of {len(tokens)}" if count else "first-stage tokens in another order"
    )
    return [f"{name} selects {difference}; if its logits agree, it continued with the original's"]


# Differences


def _rows(sides: Mapping[str, Side], field: str) -> list[Row]:
    """Return a row for each stage or parameter that is not empty."""
    held = [getattr(sides[side], field) if side in sides else {} for side in ("original", "ours", "port")]
    names = dict.fromkeys(name for tensors in held for name, tensor in tensors.items() if tensor.numel())
    return [_row(name, *(tensors.get(name) for tensors in held)) for name in names]


def _row(name: str, expected: Tensor | None, ours: Tensor | None, port: Tensor | None) -> Row:
    largest = math.nan if expected is None else expected.abs().max().item()
    return Row(name, largest, _difference(expected, ours), _difference(expected, port))


def _difference(expected: Tensor | None, found: Tensor | None) -> float | None:
    if expected is None or found is None:
        return None
    return (found - expected).abs().max().item() if found.shape == expected.shape else math.inf


# The report


def describe(comparison: Comparison) -> str:
    """Return the comparison as text."""
    head = ["largest in the original", "ours - original", "port - original"]
    stages = [[row.name, *map(_number, row[1:]), "" if row.agrees else "<-"] for row in comparison.stages]
    parameters = [[row.name, *map(_number, row[1:])] for row in comparison.parameters]
    ranks = zip_longest(*comparison.detections.values())
    detections = [[rank, *map(_object, found)] for rank, found in enumerate(ranks, start=1)]
    verdict = "agrees with" if comparison.agrees else "DIFFERS from"
    parts = [
        "\n".join(comparison.notes),
        format_table(["stage", *head, ""], stages),
        format_table(["parameters that differ", *head], parameters) if parameters else "No parameter differs.",
        format_table(["", *comparison.detections], detections, left=range(1 + len(comparison.detections))),
        f"Ours {verdict} the original (tolerance: {TOLERANCE:g} of the largest magnitude in a stage, of at least 1).",
    ]
    return "\n\n".join(filter(None, parts))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _object(found: Detection | None) -> str:
    return f"{found[0]} {found[1]:.3f} {' '.join(f'{side:.1f}' for side in found[2])}" if found else ""


if __name__ == "__main__":
    typer.run(verify_conversion)
