"""Export a model to ONNX, OpenVINO or ExecuTorch, and keep the file only if its outputs agree with PyTorch.

The file takes `pixel_values` (B, 3, height, width) float32, normalized. Its outputs are float32:
* `boxes` (B, Q, 4), (cx, cy, w, h) as fractions of the image; `logits` (B, Q, C), -1e4 for rows of the head that are
  not classes; `masks` (B, Q, h, w) of a segmentation model, logits;
* with `post_process` the K best pairs of query and class, best first, as
  [`RfDetrImageProcessor.post_process_object_detection`] selects them: `scores` (B, K), `labels` (B, K) int64, `boxes`
  (B, K, 4), (x0, y0, x1, y1) as fractions inside the image, `masks` (B, K, h, w).

Its metadata, all JSON, describes preprocessing and outputs: `task`, `model`, `outputs`, `box_format`, `class_names` (by
label), `resolution` (height, width), `resample`, `rescale_factor`, `image_mean`, `image_std`, `dtype`, `versions`; and
`config` and `processor`, the configuration and the image processor, with which `transformers_rfdetr.load` runs it.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..atomic_files import translate_disk_errors
from ..data.synthetic import draw_scene
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForObjectDetection
from ..model.validation import as_pair, check_resolution, is_index, read_size, require
from ..model.variants_rf_detr import class_labels
from .comparison import (
    TOLERANCES,
    Runner,
    check_differences,
    find_differences,
    run_executorch,
    run_onnx,
    run_openvino,
    run_torch,
)
from .executorch_file import write_executorch
from .exported_model import ExportedModel, prepare_for_export, write_onnx, write_openvino

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte"}
# Which package installs what writes and runs a file.
_ONNX_COMMANDS = dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), 'pip install "transformers-rfdetr[export]"')
_COMMANDS = {
    "onnx": _ONNX_COMMANDS,
    "openvino": {**_ONNX_COMMANDS, "openvino": "pip install openvino"},
    "executorch": {"executorch": 'pip install "transformers-rfdetr[executorch]"'},
}


class Export(NamedTuple):
    """An exported file, and the largest differences of its outputs from PyTorch.

    Differences are absolute for values up to 1 and relative for larger values. `ranking` compares the logits that the
    top-k of the file selected with those that PyTorch would have selected; see [`find_differences`]. For float16, each
    difference is the larger one of two: of the file, and of PyTorch in float16. `batch_size` is fixed, or None for any.
    """

    path: Path
    differences: dict[str, float]
    batch_size: int | None


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
    """Export a model for onnxruntime, TensorRT, OpenVINO or ExecuTorch, and compare the file with PyTorch on images.

    The docstring of this module describes inputs, outputs and metadata of the file.

    Example:
        >>> model, processor = transformers_rfdetr.load("rf-detr-seg-nano")  # doctest: +SKIP
        >>> export(model, "seg-nano.onnx", dtype="float16").differences  # doctest: +SKIP

    Args:
        model: A detection or segmentation model. It is not changed.
        output: The new file: `.onnx`, `.xml` with the weights in a `.bin` beside it, or `.pte`.
        format: "onnx"; "openvino", which is converted from ONNX; or "executorch", in float32 and with XNNPACK, which
            takes minutes.
        resolution: Size of the input in pixels, an integer or (height, width); the configuration's by default.
        post_process: Whether the file selects the best pairs of query and class.
        top_k: Number K of pairs that `post_process` selects; Q by default.
        dtype: "float32", or "float16" for weights and activations. Prediction heads, references and their sine
            embedding, sampling points and sampled values stay float32, and layer norms accumulate in float32.
        batch_size: Fixed batch size B; by default the file accepts any, for ExecuTorch 1.
        images: Images for the comparison, in any form that the processor takes; drawn scenes by default.
        processor: The image processor of the model; one from its configuration by default.
        tolerance: Largest differences of `boxes`, `logits` and `masks` instead of `TOLERANCES`.

    Raises:
        ValueError: An argument is invalid, or a difference is larger than its tolerance; no file is kept.
        ImportError: A package is missing; the message has the command that installs it.
    """
    output, dtype = Path(output), str(dtype).removeprefix("torch.")
    limits = _check_arguments(model, output, format, dtype, batch_size, tolerance)
    batch_size = 1 if format == "executorch" and batch_size is None else batch_size
    size, top_k = _read_resolution(model, resolution), _read_top_k(model, top_k, post_process)
    processor = copy.deepcopy(processor or RfDetrImageProcessor.from_config(model.config))
    processor.do_resize, processor.do_pad = True, False
    processor.size = dict(zip(("height", "width"), size, strict=True))
    batches = _make_batches(_read_pixels(images, processor), batch_size)
    reference = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    reference.config._attn_implementation = "sdpa"
    expected = ExportedModel(reference, post_process, top_k).eval()
    exported = ExportedModel(prepare_for_export(reference, size, dtype), post_process, top_k).eval()
    metadata = _metadata(model, processor, expected.names, size, dtype, format)
    with new_files(output) as path, torch.no_grad():
        rounded: dict[str, float] = {}
        if dtype == "float16":
            # On a CPU onnxruntime computes much of a float16 file in float32. PyTorch rounds everything, as a GPU does.
            rounded = find_differences(run_torch(exported), expected, batches[-1:])
            check_differences(rounded, limits, "PyTorch", dtype)
        run = _write(exported, batches[-1], batch_size is None, metadata, path, format)
        differences = find_differences(run, expected, batches)
        check_differences(differences, limits, format, dtype)
    differences = {name: max(value, rounded.get(name, 0.0)) for name, value in differences.items()}
    return Export(output, differences, batch_size)


def _check_arguments(
    model: Any, output: Path, format: str, dtype: str, batch_size: int | None, tolerance: Mapping[str, float] | None
) -> dict[str, float]:
    """Check the arguments of [`export`], and return the tolerances."""
    is_model = isinstance(model, RfDetrForObjectDetection)
    rule = "an RfDetrForInstanceSegmentation or an RfDetrForObjectDetection"
    require(is_model, "model", type(model).__name__, rule)
    require(format in SUFFIXES, "format", format, " or ".join(SUFFIXES))
    require(output.suffix == SUFFIXES[format], "output", output.name, f"a file {SUFFIXES[format]} for format {format}")
    for path in {output, output.with_suffix(".bin")} if format == "openvino" else {output}:
        require(not path.exists(), "output", str(path), "new", "Give another name, or remove the file.")
    require(dtype in TOLERANCES, "dtype", dtype, " or ".join(TOLERANCES))
    is_possible = format != "executorch" or dtype == "float32"
    require(is_possible, "dtype", dtype, "float32 for format executorch", "Omit it, or export to ONNX.")
    is_valid = batch_size is None or (is_index(batch_size) and batch_size > 0)
    require(is_valid, "batch_size", batch_size, "an integer of at least 1, or None for any")
    limits = TOLERANCES[dtype]
    is_known = set(tolerance or ()) <= set(limits)
    require(is_known, "tolerance", tolerance, f"a dict of {', '.join(limits)}")
    _require_packages(format)
    return {**limits, **(tolerance or {})}


def _read_resolution(model: RfDetrForObjectDetection, resolution: int | Sequence[int] | None) -> tuple[int, int]:
    config = model.config
    size = read_size(config.resolution if resolution is None else resolution, "resolution")
    check_resolution(size, config.backbone_config.patch_size, config.backbone_config.num_windows)
    return as_pair(size)


def _read_top_k(model: RfDetrForObjectDetection, top_k: int | None, post_process: bool) -> int:
    num_pairs = model.config.num_queries * len(class_labels(model.config.id2label))
    if top_k is None:
        return min(model.config.num_queries, num_pairs)
    if not post_process:
        raise ValueError(f"`top_k` requires `post_process`, got top_k={top_k} without it. Set post_process=True.")
    is_valid = is_index(top_k) and 0 < top_k <= num_pairs
    require(is_valid, "top_k", top_k, f"an integer from 1 to {num_pairs}, the number of pairs of query and class")
    return top_k


def _require_packages(format: str) -> None:
    for name, command in _COMMANDS[format].items():
        if find_spec(name) is None:
            raise ImportError(f"format {format} requires the package {name}, which is not installed. Run: {command}")


def _read_pixels(images: Sequence[Any] | None, processor: RfDetrImageProcessor) -> Tensor:
    """Return images as (N, 3, height, width), at least two: a single one is followed by its mirror image."""
    images = [draw_scene(seed)[0] for seed in (0, 1)] if images is None else images
    pixels = processor(images)["pixel_values"]
    return pixels if len(pixels) > 1 else torch.cat([pixels, pixels.flip(-1)])


def _make_batches(pixels: Tensor, batch_size: int | None) -> list[Tensor]:
    """Return all images in batches of `batch_size`, repeating the first ones; if it is None, in batches of 1 and 2."""
    batches: list[Tensor] = []
    for size in (1, 2) if batch_size is None else (batch_size,):
        missing = -len(pixels) % size
        batches += pixels[torch.arange(len(pixels) + missing) % len(pixels)].split(size)
    return batches


def _metadata(
    model: RfDetrForObjectDetection,
    processor: RfDetrImageProcessor,
    names: Sequence[str],
    size: tuple[int, int],
    dtype: str,
    format: str,
) -> dict[str, str]:
    exporter = "executorch" if format == "executorch" else "onnxscript"
    values = {
        "task": "instance-segmentation" if "masks" in names else "object-detection",
        "model": type(model).__name__,
        "outputs": names,
        "box_format": "xyxy" if "scores" in names else "cxcywh",
        "class_names": class_labels(model.config.id2label),
        "resolution": size,
        "resample": "bilinear, half-pixel centers, no antialiasing",
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "image_mean": processor.image_mean if processor.do_normalize else [0.0] * 3,
        "image_std": processor.image_std if processor.do_normalize else [1.0] * 3,
        "dtype": dtype,
        # Without the name of the checkpoint, which may be a folder of this machine.
        "config": model.config.to_dict() | {"resolution": size, "_name_or_path": ""},
        "processor": processor.to_dict(),
        "versions": {name: version(name) for name in ("transformers-rfdetr", "transformers", "torch", exporter)},
    }
    return {name: json.dumps(value) for name, value in values.items()}


@contextmanager
def new_files(output: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder; at the end without an error, all files of the folder move beside `output`."""
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with translate_disk_errors(output), TemporaryDirectory(prefix=".", suffix=".partial", dir=output.parent) as partial:
        yield Path(partial, output.name)
        for path in sorted(Path(partial).iterdir()):  # .bin before .xml
            os.replace(path, output.with_name(path.name))


def _write(
    module: ExportedModel, example: Tensor, is_dynamic: bool, metadata: Mapping[str, str], path: Path, format: str
) -> Runner:
    """Write the files of a format, and return the function that runs them."""
    if format == "onnx":
        write_onnx(module, example, is_dynamic, metadata, path)
        return run_onnx(path)
    if format == "executorch":
        write_executorch(module, example, metadata, path)
        return run_executorch(path, len(module.names))
    onnx_path = path.with_suffix(".onnx")
    write_onnx(module, example, is_dynamic, metadata, onnx_path)
    write_openvino(onnx_path, path, metadata)
    onnx_path.unlink()
    return run_openvino(path)
