"""`transformers-rfdetr export`: export a model to ONNX, OpenVINO or ExecuTorch and compare it with PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..text_table import format_table
from .errors import one_line_errors
from .options import ImageFolderOption, ModelArgument, ResolutionOption, read_size

EXAMPLE = """examples:

transformers-rfdetr export my-model my-model.onnx --dtype float16 --image street.jpg

transformers-rfdetr export Roboflow/rf-detr-seg-nano seg-nano.onnx --resolution 240x312 --post-process

transformers-rfdetr export my-model my-model-int8.onnx --quantize int8 --calibration buildings/
"""


FormatOption = Annotated[
    str | None, typer.Option(help="onnx, openvino or executorch. Default: by the suffix of OUTPUT.")
]
PostProcessOption = Annotated[
    bool,
    typer.Option(
        "--post-process", help="Output the scores, labels and boxes of the best detections. Default: all logits."
    ),
]
TopKOption = Annotated[
    int | None, typer.Option(help="Number of detections with --post-process. Default: the number of queries.")
]
ImageOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH_OR_URL", help="Image for the comparison with PyTorch; may be repeated. Default: drawn images."
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="int8", help="Quantize weights and activations to INT8 with NNCF. Requires --calibration. Default: off."
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Annotated images, as for `evaluate`. --quantize runs those of the split train to find the ranges of the"
        " activations, and measures AP on those of the split validation; if one is missing, both on the same split."
        " With fewer than 10 validation images, AP is measured on those of train, if they are more.",
    ),
]
MaxDropOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Largest drop of mask AP by --quantize; with a larger drop, no file is written. 0 to 1."
    ),
]
NumImagesOption = Annotated[
    int, typer.Option(min=1, help="Largest number of images of each split for --quantize, chosen at random.")
]


@one_line_errors
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The new file: .onnx, .xml for OpenVINO, or .pte for ExecuTorch.")],
    format: FormatOption = None,
    resolution: ResolutionOption = None,
    post_process: PostProcessOption = False,
    top_k: TopKOption = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16; for ExecuTorch float32.")] = "float32",
    batch_size: Annotated[
        int | None, typer.Option(help="Fixed batch size. Default: any batch size; for ExecuTorch 1.")
    ] = None,
    image: ImageOption = None,
    quantize: QuantizeOption = None,
    calibration: CalibrationOption = None,
    image_folder: ImageFolderOption = None,
    max_drop: MaxDropOption = 0.01,
    num_images: NumImagesOption = 300,
) -> None:
    """Export a model to ONNX, OpenVINO or ExecuTorch; the file is kept only if its outputs agree with PyTorch."""
    from ..export import export as export_model
    from ..export.exporter import SUFFIXES
    from ..hub.load import load

    data = None
    if quantize is not None:
        data = _read_calibration(quantize, calibration, image_folder, dtype, output)
    elif calibration is not None:
        raise ValueError("--calibration requires --quantize int8. Add it.")
    loaded, processor = load(model)
    settings: dict[str, Any] = {
        "format": format or {suffix: name for name, suffix in SUFFIXES.items()}.get(output.suffix, "onnx"),
        "resolution": None if resolution is None else read_size("--resolution", resolution),
        "post_process": post_process,
        "top_k": top_k,
        "dtype": dtype,
        "batch_size": batch_size,
        "images": image or None,
        "processor": processor,
    }
    with TemporaryDirectory() as folder:
        done = export_model(loaded, output if data is None else Path(folder, output.name), **settings)
        batch = "any batch size" if done.batch_size is None else f"batches of {done.batch_size}"
        name = "float32" if data is not None else str(done.path)
        typer.echo(f"{name}: {_size(done.path) / 1e6:.1f} MB, {dtype}, {batch}")
        listed = ", ".join(f"{name} {value:.1e}" for name, value in done.differences.items())
        typer.echo(f"Largest differences from PyTorch on {len(image) if image else 'drawn'} images: {listed}")
        if data is not None:
            _quantize(done.path, output, data, max_drop, num_images)


def _size(path: Path) -> int:
    return (path.with_suffix(".bin") if path.suffix == ".xml" else path).stat().st_size


def _read_calibration(
    quantize: str, calibration: str | None, image_folder: str | None, dtype: str, output: Path
) -> Mapping[str, Any]:
    """Return the splits of the calibration data, before the export takes its time."""
    from ..data.load import load_instance_dataset
    from ..export.quantization import SUFFIXES

    if quantize != "int8":
        raise ValueError(f"--quantize must be int8, got {quantize}. For half precision use --dtype float16.")
    if calibration is None:
        raise ValueError("--quantize requires --calibration, annotated images on which AP is measured. Add it.")
    if dtype != "float32":
        raise ValueError(f"--quantize requires --dtype float32, got {dtype}. Omit --dtype.")
    if output.suffix not in SUFFIXES:
        raise ValueError(f"--quantize requires OUTPUT to be a file {' or '.join(SUFFIXES)}, got {output}. Rename it.")
    if output.exists():
        raise ValueError(f"OUTPUT must be new, got {output}. Give another name, or remove the file.")
    return load_instance_dataset(calibration, image_folder=image_folder)


def _quantize(path: Path, output: Path, splits: Mapping[str, Any], max_drop: float, num_images: int) -> None:
    """Quantize a file and print the table of what that changes."""
    from ..evaluation.confidence import FEW_IMAGES
    from ..export import quantize

    evaluated = "validation" if "validation" in splits else next(iter(splits))
    calibrated = "train" if "train" in splits else evaluated
    if len(splits[evaluated]) < FEW_IMAGES:  # on a few images, AP can rise although the model got worse
        evaluated = max(evaluated, calibrated, key=lambda name: len(splits[name]))
    settings: dict[str, Any] = {"max_drop": max_drop, "num_images": num_images}
    done = quantize(path, output, splits[evaluated], calibration=splits[calibrated], **settings)
    rows = [
        [name, f"{one.ap:.4f}", f"{one.size / 1e6:.2f} MB", f"{1e3 * one.seconds:.1f} ms"]
        for name, one in (("float32", done.before), ("int8", done.after))
    ]
    difference, ratio = done.after.ap - done.before.ap, done.after.size / done.before.size
    speed = done.after.seconds / done.before.seconds
    rows.append(["", f"{difference:+.4f}", f"x {ratio:.2f}", f"x {speed:.2f}"])
    typer.echo(format_table(["", "AP", "size", "latency"], rows))
    validated = f"{min(len(splits[evaluated]), num_images)} images of {evaluated}"
    typer.echo(f"{done.path}: calibrated on {calibrated}, AP on {validated}, latency of one batch on this machine")
