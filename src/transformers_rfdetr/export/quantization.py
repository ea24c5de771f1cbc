"""Quantize an exported float32 file to INT8 with NNCF, and keep the result only if it is as accurate as demanded.

Weights and activations of matrix products and convolutions become 8-bit integers. NNCF chooses their ranges on images
of the user, and moves outliers of the activations into the weights (SmoothQuant). If AP drops by too much, it measures
AP without each group of layers, and leaves those that hurt most in float32. This requires an ONNX file whose weights
are constants, as `write_onnx` makes them: NNCF 3.4 takes a weight that is transposed, scaled or reshaped in the graph
for the tensor before that, and its SmoothQuant fails.

Weights alone are not quantized, because that saves no time: the computation remains in float32. NNCF's ONNX files of
that kind do not run in onnxruntime either: the scales of their depthwise convolutions have the wrong shape.

Source: https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from ..evaluation.evaluation_loop import evaluate_dataset
from ..inference.benchmark import measure
from ..inference.runners import RuntimeModel, load_exported, run_openvino
from ..model.image_io import decode_image
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.validation import is_index, is_number, require
from .exported_model import set_openvino_metadata
from .exporter import new_files

SUFFIXES = (".onnx", ".xml")
_RUNS = 10  # of a measurement of the latency
# Images on which AP is measured without each group of layers. There are about 100 groups.
_RANKING_IMAGES = 32


class FileNumbers(NamedTuple):
    """What a file is worth and what it costs."""

    ap: float  # of masks, or of boxes if the model has no masks
    size: int  # of the weights in bytes
    seconds: float  # median of a run of one batch on this machine


class Quantized(NamedTuple):
    """A quantized file, and the numbers of the float32 file and of itself."""

    path: Path
    before: FileNumbers
    after: FileNumbers


def quantize(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dataset: Any,
    *,
    calibration: Any = None,
    max_drop: float = 0.01,
    num_images: int = 300,
) -> Quantized:
    """Quantize a float32 file that [`export`] wrote to INT8; write the result if AP drops by at most `max_drop`.

    The result has the same inputs, outputs and metadata, and `transformers_rfdetr.load` loads it. NNCF and OpenVINO
    send usage statistics to Intel unless they are turned off with the command `opt_in_out --opt_out`.

    Example:
        >>> data = load_instance_dataset("buildings/")  # doctest: +SKIP
        >>> export(model, "model.onnx")  # doctest: +SKIP
        >>> quantize("model.onnx", "model-int8.onnx", data["validation"], calibration=data["train"])  # doctest: +SKIP

    Args:
        path: The float32 file, `.onnx` or `.xml`.
        output: The new file, with the same suffix.
        dataset: Annotated images on which AP is measured, as for [`evaluate_instance_segmentation`].
        calibration: A dataset whose images NNCF runs to find the ranges of the activations; `dataset` by default.
        max_drop: Largest drop of AP, from 0 to 1: of mask AP, or of box AP if the model has no masks.
        num_images: Largest number of images of each of the two. If there are more, they are chosen at random.

    Raises:
        ValueError: an argument is invalid, or AP drops by more; no file is written.
        ImportError: a package is missing; the message has the command that installs it.
    """
    path, output = Path(path), Path(output)
    _check_arguments(path, output, max_drop, num_images)
    model, processor = load_exported(path)
    dtype = json.loads(model.metadata["dtype"])
    require(dtype == "float32", "path", f"a file in {dtype}", "a file in float32", "Export the model in float32.")
    images = _choose(dataset, num_images)
    before = _measure(path, images)
    with new_files(output) as partial:
        with _without_messages():
            samples = _calibration_batches(model, processor, _choose(calibration or dataset, num_images))
            write = _write_onnx if path.suffix == ".onnx" else _write_openvino
            write(path, partial, samples, _Validation(model, processor, images), max_drop)
        after = _measure(partial, images)
        if not before.ap - after.ap <= max_drop:
            raise ValueError(
                f"AP must drop by at most {max_drop} (`max_drop`), got a drop of {before.ap - after.ap:.4f}, from"
                f" {before.ap:.4f} to {after.ap:.4f}, on {len(images)} images. No file was written. Allow a larger"
                " drop, calibrate on more images (`num_images`), or export the model in float16."
            )
    return Quantized(output, before, after)


def _check_arguments(path: Path, output: Path, max_drop: float, num_images: int) -> None:
    require(path.suffix in SUFFIXES, "path", path.name, "a file " + " or ".join(SUFFIXES))
    require(output.suffix == path.suffix, "output", output.name, f"a file {path.suffix}, as `path`")
    for file in {output, output.with_suffix(".bin")} if output.suffix == ".xml" else {output}:
        require(not file.exists(), "output", str(file), "new", "Give another name, or remove the file.")
    require(is_number(max_drop) and 0 <= max_drop <= 1, "max_drop", max_drop, "a number from 0 to 1")
    require(is_index(num_images) and num_images > 0, "num_images", num_images, "an integer of at least 1")
    if find_spec("nncf") is None:
        raise ImportError('INT8 requires the package nncf. Run: pip install "transformers-rfdetr[int8]"')


def _choose(dataset: Any, num_images: int) -> Subset:
    """Return at most `num_images` images of a dataset, always the same ones."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, sorted(order[:num_images].tolist()))


def _measure(path: Path, images: Subset) -> FileNumbers:
    model, processor = load_exported(path)
    weights = path.with_suffix(".bin") if path.suffix == ".xml" else path
    times = measure(model, processor, batch_size=model.batch_size or 1, compiled=False, runs=_RUNS)
    ap = _average_precision(model, processor, images)
    return FileNumbers(ap, weights.stat().st_size, times["forward"]["median_seconds"])


def _average_precision(model: RuntimeModel, processor: RfDetrImageProcessor, images: Subset) -> float:
    metrics = evaluate_dataset(model, processor, images, progress=False).compute()
    return metrics["segm_AP" if "segm_AP" in metrics else "bbox_AP"]


@contextmanager
def _without_messages() -> Iterator[None]:
    """Show NNCF's progress bars, but of its messages only the warnings."""
    import nncf  # noqa: F401  # sets the level of its messages

    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _calibration_batches(model: RuntimeModel, processor: RfDetrImageProcessor, images: Subset) -> Any:
    """Return a dataset of NNCF: for each image a batch that begins with it, as large as the file requires."""
    import nncf

    def read(index: int) -> dict[str, Any]:
        indices = [(index + offset) % len(images) for offset in range(model.batch_size or 1)]
        batch = [decode_image(images[one]["image"]) for one in indices]
        return {"pixel_values": processor(batch, input_data_format="channels_last")["pixel_values"].numpy()}

    return nncf.Dataset(range(len(images)), read)


class _Validation(NamedTuple):
    """Measures AP for NNCF."""

    model: RuntimeModel  # the float32 file
    processor: RfDetrImageProcessor
    images: Subset

    def __call__(self, quantized: Any, indices: Iterable[int]) -> tuple[float, list[float]]:
        """Return the AP of an ONNX model or a compiled OpenVINO model on some of the images, and a value for each.

        NNCF ranks the layers on the images whose values drop most. AP is not a mean over images: all get the same one.
        """
        chosen = list(indices)
        with TemporaryDirectory() as folder:
            if hasattr(quantized, "SerializeToString"):
                path = Path(folder, "model.onnx")
                path.write_bytes(quantized.SerializeToString())
                runner, _ = load_exported(path)
            else:
                runner = self.model.with_run(lambda pixels: run_openvino(quantized, pixels))
            ap = _average_precision(runner, self.processor, Subset(self.images, chosen))
        return ap, [ap] * len(chosen)


def _quantize(model: Any, samples: Any, validate: _Validation, max_drop: float, ignored: Sequence[str] = ()) -> Any:
    """Return a quantized ONNX or OpenVINO model, without the nodes of the names `ignored`."""
    import nncf

    return nncf.quantize_with_accuracy_control(
        model,
        samples,
        nncf.Dataset(range(len(validate.images))),
        validate,
        max_drop=max_drop,
        subset_size=samples.get_length(),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=list(ignored)),
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
            ranking_subset_size=_RANKING_IMAGES, num_ranking_workers=1
        ),
    )


def _metadata(model: RuntimeModel) -> dict[str, str]:
    versions = json.loads(model.metadata["versions"]) | {"nncf": version("nncf")}
    return {**model.metadata, "dtype": json.dumps("int8"), "versions": json.dumps(versions)}


def _write_onnx(path: Path, output: Path, samples: Any, validate: _Validation, max_drop: float) -> None:
    import onnx

    model = onnx.load(path)
    # In a file for a fixed batch size the values of the first attention among queries are constants. NNCF quantizes
    # them as weights, with a scale for each channel, which onnxruntime computes for matrices only.
    constants = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 2}
    ignored = [node.name for node in model.graph.node if node.op_type == "MatMul" and constants & set(node.input)]
    quantized = _quantize(model, samples, validate, max_drop, ignored)
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, _metadata(validate.model))
    onnx.save(quantized, output)


def _write_openvino(path: Path, output: Path, samples: Any, validate: _Validation, max_drop: float) -> None:
    import openvino

    quantized = _quantize(openvino.Core().read_model(path), samples, validate, max_drop)
    set_openvino_metadata(quantized, _metadata(validate.model))
    openvino.save_model(quantized, output, compress_to_fp16=False)
