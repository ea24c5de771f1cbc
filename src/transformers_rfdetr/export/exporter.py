"""The models as ONNX and OpenVINO files, written only if their numbers are those of PyTorch.

Axes: B images, Q queries, C classes, K best pairs of query and class, h w mask grid.

A file is of one height and width: what depends on the size (anchors, sine tables, positions) is a constant in it. The
table of positions is resized before, as ONNX has no antialiased bicubic filter.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..atomic_files import translate_disk_errors
from ..data.synthetic import draw_scene
from ..inference.compiled import ForcedTopK, bake_position_embeddings, difference
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from ..model.validation import as_pair, check_resolution, is_index, read_size
from ..model.variants_rf_detr import is_background_label

# How far the outputs may be from those of PyTorch in float32, by the file's dtype: the largest difference of a number,
# absolute up to 1 and relative above. Small trained models use a tenth of it, random ones of full size up to a third.
TOLERANCES = MappingProxyType(
    {
        "float32": {"boxes": 1e-4, "logits": 1e-3, "masks": 1e-2},
        "float16": {"boxes": 5e-3, "logits": 5e-2, "masks": 5e-1},
    }
)
# The operators that the exporters of torch 2.6 and later write without converting them.
_OPSET = 18
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
# Pixels (B, 3, H, W) -> the outputs, and the indices that each top-k chose.
_Runner = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]


class Export(NamedTuple):
    """A file, and how far its outputs are from those of PyTorch: see [`export`]."""

    path: Path
    differences: dict[str, float]


def export(
    model: RfDetrForObjectDetection,
    output: str | os.PathLike[str],
    *,
    format: str = "onnx",
    resolution: int | Sequence[int] | None = None,
    post_process: bool = False,
    top_k: int | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    images: Sequence[Any] | None = None,
    processor: RfDetrImageProcessor | None = None,
    tolerance: Mapping[str, float] | None = None,
) -> Export:
    """Write a model as a file for onnxruntime, TensorRT or OpenVINO, and check it on images.

    The file takes `pixel_values` (B, 3, height, width) float32, normalised, and gives, all in float32,
    * `boxes` (B, Q, 4), (cx, cy, w, h) as fractions of the image; `logits` (B, Q, C), of -1e4 for rows of the
      head that are no class; of a segmentation model `masks` (B, Q, h, w), logits;
    * or with `post_process` the K best pairs of query and class, best first, as
      [`RfDetrImageProcessor.post_process_object_detection`] chooses them: `scores` (B, K), `labels` (B, K) int64,
      `boxes` (B, K, 4), (x0, y0, x1, y1) as fractions inside the image, `masks` (B, K, h, w). A query whose box is
      not finite has a score of 0.

    Its metadata, all JSON, says how to prepare an image and what the outputs are: `task`, `model`, `outputs`,
    `box_format`, `class_names` (by label), `resolution` (height, width), `resample`, `rescale_factor`, `image_mean`,
    `image_std`, `dtype`, `versions`.

    Example:
        >>> from transformers_rfdetr import RfDetrForInstanceSegmentation
        >>> from transformers_rfdetr.export import export
        >>> model = RfDetrForInstanceSegmentation.from_pretrained("Roboflow/rf-detr-seg-nano")  # doctest: +SKIP
        >>> export(model, "seg-nano.onnx", dtype="float16").differences  # doctest: +SKIP

    Args:
        model: A detection or segmentation model, which stays as it is.
        output: The file, not there yet: `.onnx`, or `.xml` with the weights in a `.bin` beside it. It appears when it
            is written and checked.
        format: "onnx", or "openvino", which is made from the ONNX file.
        resolution: Side in pixels, or (height, width), to which every image is resized; that of the model's
            configuration by default.
        post_process: Whether the file chooses the best pairs itself.
        top_k: K, the pairs that it chooses; Q by default.
        dtype: "float32", or "float16" for weights and activations. Boxes, class logits and the heads that predict
            them, references and their sine embedding, sampling points and the sampled values stay float32, and layer
            norms add up in float32.
        batch_size: B; None leaves it open.
        images: What the file is checked on, in any form that the processor takes; drawn scenes by default.
        processor: The model's processor, for the images and the metadata; by default one from its configuration.
        tolerance: Largest differences of `boxes`, `logits` and `masks`, instead of those in `TOLERANCES`.

    Returns:
        The path, and the differences seen: of each output the largest of a number, absolute up to 1 and relative above;
        and as `ranking` that of the logits that the top-k of the file chose from those that PyTorch would have, rank by
        rank. Where two are as good as tied, either choice is right; the outputs are compared for the file's choice.
        In float16 they are those of the file or of PyTorch in float16, the larger ones.

    Raises:
        ValueError: an argument is wrong, or a difference is larger than its tolerance; there is no file then.
        ImportError: a package is missing; the message has the command that installs it.
    """
    output, dtype = Path(output), str(dtype).removeprefix("torch.")
    limits = _check_arguments(model, output, format, dtype, batch_size, tolerance)
    height, width = _read_resolution(model, resolution)
    top_k = _read_top_k(model, top_k, post_process)
    _import_packages(format)

    reference = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    reference.config._attn_implementation = "sdpa"
    processor = processor or RfDetrImageProcessor.from_config(model.config)
    pixels = _prepare(images, processor, (height, width))
    expected = _Outputs(reference, post_process, top_k).eval()
    exported = _Outputs(_prepared(reference, (height, width), dtype), post_process, top_k).eval()
    batches = _batches(pixels, batch_size)
    metadata = _metadata(model, processor, expected.names, (height, width), dtype)
    rounded: dict[str, float] = {}
    with _new_files(output) as path, torch.no_grad():
        if dtype == "float16":
            # On a CPU onnxruntime computes much of a float16 file in float32. PyTorch rounds everything, as a GPU does.
            rounded = _differences(_run_torch(exported), expected, batches[-1:])
            _check(rounded, limits, "PyTorch", dtype)
        onnx_path = path.with_suffix(".onnx")
        _write_onnx(exported, batches[-1], batch_size is None, metadata, onnx_path)
        if format == "openvino":
            _write_openvino(onnx_path, path, metadata)
            onnx_path.unlink()
        run = _run_openvino(path) if format == "openvino" else _run_onnx(path)
        differences = _differences(run, expected, batches)
        _check(differences, limits, format, dtype)
    return Export(output, {name: max(value, rounded.get(name, 0.0)) for name, value in differences.items()})


# Arguments


def _check_arguments(
    model: Any, output: Path, format: str, dtype: str, batch_size: int | None, tolerance: Mapping[str, float] | None
) -> dict[str, float]:
    """Raise for what cannot be exported; return the tolerances."""
    if not isinstance(model, RfDetrForObjectDetection):
        raise ValueError(
            f"{type(model).__name__} has no class and box heads to export; give an RfDetrForInstanceSegmentation or an"
            " RfDetrForObjectDetection"
        )
    if format not in _SUFFIXES:
        raise ValueError(f"format {format!r} is unknown; choose {' or '.join(_SUFFIXES)}")
    if output.suffix != _SUFFIXES[format]:
        raise ValueError(f"{output} does not end in {_SUFFIXES[format]}, as a file of format {format} does; rename it")
    for path in {output, output.with_suffix(".bin")} if format == "openvino" else {output}:
        if path.exists():
            raise ValueError(f"{path} is there already; give another name, or remove it")
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose {' or '.join(TOLERANCES)}")
    if batch_size is not None and not (is_index(batch_size) and batch_size > 0):
        raise ValueError(f"batch_size {batch_size!r} is no whole number of at least 1; None leaves it open")
    limits = TOLERANCES[dtype]
    if unknown := sorted(set(tolerance or ()) - set(limits)):
        raise ValueError(f"tolerance of {unknown}: outputs that have one are {', '.join(limits)}")
    return {**limits, **(tolerance or {})}


def _read_resolution(model: RfDetrForObjectDetection, resolution: int | Sequence[int] | None) -> tuple[int, int]:
    config = model.config
    size = read_size(config.resolution if resolution is None else resolution, "resolution")
    check_resolution(size, config.backbone_config.patch_size, config.backbone_config.num_windows)
    return as_pair(size)


def _class_names(model: RfDetrForObjectDetection) -> dict[int, str]:
    """The names by label, without rows of the head that are no class."""
    return {label: name for label, name in model.config.id2label.items() if not is_background_label(name)}


def _read_top_k(model: RfDetrForObjectDetection, top_k: int | None, post_process: bool) -> int:
    num_pairs = model.config.num_queries * len(_class_names(model))
    if top_k is None:
        return min(model.config.num_queries, num_pairs)
    if not post_process:
        raise ValueError(f"top_k {top_k} belongs to post_process, which is off; switch it on, or leave top_k out")
    if not (is_index(top_k) and 0 < top_k <= num_pairs):
        raise ValueError(f"top_k {top_k!r} is no whole number from 1 to {num_pairs}, the pairs of query and class")
    return top_k


def _import_packages(format: str) -> None:
    commands = dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), 'pip install "transformers-rfdetr[export]"')
    if format == "openvino":
        commands["openvino"] = "pip install openvino"
    for name, command in commands.items():
        if find_spec(name) is None:
            raise ImportError(f"format {format} needs the package {name}, which is not installed: {command}")


# The images


def _prepare(images: Sequence[Any] | None, processor: RfDetrImageProcessor, size: tuple[int, int]) -> Tensor:
    """Images -> (N, 3, height, width), at least two: of a single one, it and its mirror image."""
    images = [draw_scene(seed)[0] for seed in (0, 1)] if images is None else images
    inputs = processor(images, do_resize=True, size={"height": size[0], "width": size[1]}, do_pad=False)
    pixels = inputs["pixel_values"]
    return pixels if len(pixels) > 1 else torch.cat([pixels, pixels.flip(-1)])


def _batches(pixels: Tensor, batch_size: int | None) -> list[Tensor]:
    """All images in batches, the last one filled up, of `batch_size`; where that is open, one by one and in twos."""
    batches: list[Tensor] = []
    for size in (1, 2) if batch_size is None else (batch_size,):
        missing = -len(pixels) % size
        batches += pixels[torch.arange(len(pixels) + missing) % len(pixels)].split(size)
    return batches


# The model that is written


class _Outputs(nn.Module):
    """A model whose `forward` takes pixels and returns the outputs of the file, in the order of `names`."""

    def __init__(self, model: RfDetrForObjectDetection, post_process: bool, top_k: int) -> None:
        super().__init__()
        self.model, self.post_process, self.top_k = model, post_process, top_k
        self.names = ["scores", "labels", "boxes"] if post_process else ["boxes", "logits"]
        if isinstance(model, RfDetrForInstanceSegmentation):
            self.names.append("masks")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, height, width) -> see [`export`]."""
        outputs = self.model(pixel_values)
        boxes, logits = outputs.pred_boxes.float(), outputs.logits.float()
        masks = [] if outputs.pred_masks is None else [outputs.pred_masks.float()]
        if not self.post_process:
            return boxes, logits, *masks
        scores, labels, queries = best_pairs(logits, boxes, self.top_k)
        # Rows of all images in one table, so that picking them needs no index for each pixel of a mask.
        rows = queries + boxes.shape[1] * torch.arange(boxes.shape[0], device=boxes.device)[:, None]
        boxes, *masks = (table.flatten(0, 1)[rows] for table in (boxes, *masks))
        center, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
        return scores, labels, torch.cat([center - half, center + half], dim=-1).clamp(0, 1), *masks


def best_pairs(logits: Tensor, boxes: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, Q, C) and boxes (B, Q, 4) -> scores, labels and queries (B, K) of the best pairs, best first.

    As `select_detections` of the image processor chooses them, without a threshold.
    """
    num_classes = logits.shape[2]
    usable = (boxes.abs() < math.inf).all(-1, keepdim=True) & (logits > -math.inf)  # false for NaN
    best = torch.topk(logits.masked_fill(~usable, -math.inf).flatten(1), top_k, dim=1)
    return best.values.sigmoid(), best.indices % num_classes, best.indices // num_classes


def _prepared(reference: RfDetrForObjectDetection, size: tuple[int, int], dtype: str) -> RfDetrForObjectDetection:
    """A copy whose table of positions is of `size` in pixels, and which computes in `dtype`."""
    model = copy.deepcopy(reference)
    bake_position_embeddings(model, size)
    if dtype == "float16":
        model.half()
        transformer = model.transformer
        heads = [model.class_embed, model.bbox_embed, *transformer.enc_out_class_embed, *transformer.enc_out_bbox_embed]
        for head in heads:
            head.float().register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))
    return model


# The files


def _write_onnx(module: _Outputs, example: Tensor, is_dynamic: bool, metadata: dict[str, str], path: Path) -> None:
    import onnx

    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=module.names,
        dynamic_shapes=({0: torch.export.Dim("batch")},) if is_dynamic else None,
        opset_version=_OPSET,
        verbose=False,
    )
    proto = program.model_proto
    for node in proto.graph.node:
        # The stack of Python calls that made it, with the paths of this machine.
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def _write_openvino(onnx_path: Path, path: Path, metadata: dict[str, str]) -> None:
    import openvino

    model = openvino.convert_model(onnx_path)
    for name, value in metadata.items():
        model.set_rt_info(value, ["model_info", name])
    openvino.save_model(model, path, compress_to_fp16=False)


def _metadata(
    model: RfDetrForObjectDetection,
    processor: RfDetrImageProcessor,
    names: Sequence[str],
    size: tuple[int, int],
    dtype: str,
) -> dict[str, str]:
    values = {
        "task": "instance-segmentation" if "masks" in names else "object-detection",
        "model": type(model).__name__,
        "outputs": names,
        "box_format": "xyxy" if "scores" in names else "cxcywh",
        "class_names": _class_names(model),
        "resolution": size,
        "resample": "bilinear, half-pixel centers, no antialiasing",
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "image_mean": processor.image_mean if processor.do_normalize else [0.0] * 3,
        "image_std": processor.image_std if processor.do_normalize else [1.0] * 3,
        "dtype": dtype,
        "versions": {name: version(name) for name in ("transformers-rfdetr", "transformers", "torch", "onnxscript")},
    }
    return {name: json.dumps(value) for name, value in values.items()}


@contextmanager
def _new_files(output: Path) -> Iterator[Path]:
    """A path to write to, in a folder of its own; the files there take their places when all is done, or go."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with translate_disk_errors(output), TemporaryDirectory(prefix=".", suffix=".partial", dir=output.parent) as partial:
        yield Path(partial, output.name)
        for path in sorted(Path(partial).iterdir()):  # .bin before .xml
            os.replace(path, output.with_name(path.name))


# The check


def _run_torch(module: _Outputs) -> _Runner:
    def run(pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with ForcedTopK() as choices:
            outputs = module(pixels)
        return list(outputs), choices.made

    return run


def _run_onnx(path: Path) -> _Runner:
    import onnx
    import onnxruntime

    proto = onnx.load(path)
    num_outputs = len(proto.graph.output)
    for node in proto.graph.node:
        if node.op_type == "TopK":
            proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[1]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of each constant of a type that it converts
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = [torch.from_numpy(array) for array in session.run(None, {"pixel_values": pixels.numpy()})]
        return found[:num_outputs], found[num_outputs:]

    return run


def _run_openvino(path: Path) -> _Runner:
    import openvino

    model = openvino.Core().read_model(path)
    num_outputs = len(model.outputs)
    model.add_outputs([node.output(1) for node in model.get_ordered_ops() if node.get_type_name() == "TopK"])
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = [torch.from_numpy(array) for array in compiled(pixels.numpy()).to_tuple()]
        return found[:num_outputs], [indices.long() for indices in found[num_outputs:]]

    return run


def _differences(run: _Runner, expected: _Outputs, batches: Sequence[Tensor]) -> dict[str, float]:
    """The largest differences of a runtime's outputs from PyTorch's.

    The first stage orders tokens by their logits, and near-tied ones may come in another order in another runtime;
    other queries then get them, and many numbers differ. So PyTorch computes with the tokens that the runtime chose,
    and how good these are is a difference by itself. The same goes for the best pairs.
    """
    differences = dict.fromkeys([*expected.names, "ranking"], 0.0)
    for pixels in batches:
        outputs, chosen = run(pixels)
        with ForcedTopK(chosen) as choices:
            wanted = expected(pixels)
        seen = dict(zip(expected.names, map(difference, outputs, wanted), strict=True))
        seen["ranking"] = max(choices.losses)
        differences = {name: max(differences[name], value) for name, value in seen.items()}
    return differences


def _check(differences: Mapping[str, float], limits: Mapping[str, float], runtime: str, dtype: str) -> None:
    """Raise where a difference is larger than it may be."""
    # A logit that is off by e moves the logit at a rank by 2 e at most, and a score by e / 4.
    limits = {**limits, "ranking": 2 * limits["logits"], "scores": limits["logits"] / 4, "labels": 0.0}
    wrong = [name for name, value in differences.items() if value > limits[name]]
    if wrong:
        listed = ", ".join(f"{name} by {differences[name]:.2g} (at most {limits[name]:.2g})" for name in wrong)
        remedy = {"float16": "export in float32", "float32": "try other versions of torch, onnxscript and onnxruntime"}
        raise ValueError(
            f"what {runtime} computes in {dtype} differs from PyTorch in float32: {listed}. No file was left;"
            f" {remedy[dtype]}, or allow more with `tolerance` if that is right for you"
        )
