"""`transformers-rfdetr export`: export a model to ONNX or OpenVINO and compare it with PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line_errors
from .options import ModelArgument, ResolutionOption, read_size

EXAMPLE = """examples:

transformers-rfdetr export my-model my-model.onnx --dtype float16 --image street.jpg

transformers-rfdetr export Roboflow/rf-detr-seg-nano seg-nano.onnx --resolution 240x312 --post-process
"""


@one_line_errors
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="The new file: .onnx, or .xml for OpenVINO.")],
    format: Annotated[str | None, typer.Option(help="onnx or openvino. Default: by the suffix of OUTPUT.")] = None,
    resolution: ResolutionOption = None,
    post_process: Annotated[
        bool,
        typer.Option(
            "--post-process", help="Output the scores, labels and boxes of the best detections. Default: all logits."
        ),
    ] = False,
    top_k: Annotated[
        int | None, typer.Option(help="Number of detections with --post-process. Default: the number of queries.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    batch_size: Annotated[int | None, typer.Option(help="Fixed batch size. Default: any batch size.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH_OR_URL", help="Image for the comparison with PyTorch; may be repeated. Default: drawn images."
        ),
    ] = None,
) -> None:
    """Export a model to ONNX or OpenVINO; the file is kept only if its outputs agree with PyTorch."""
    from ..export import export as export_model
    from ..hub.load import load

    loaded, processor = load(model)
    done = export_model(
        loaded,
        output,
        format=format or ("openvino" if output.suffix == ".xml" else "onnx"),
        resolution=None if resolution is None else read_size("--resolution", resolution),
        post_process=post_process,
        top_k=top_k,
        dtype=dtype,
        batch_size=batch_size,
        images=image or None,
        processor=processor,
    )
    weights = done.path.with_suffix(".bin") if done.path.suffix == ".xml" else done.path
    batch = "any batch size" if batch_size is None else f"batches of {batch_size}"
    typer.echo(f"{done.path}: {weights.stat().st_size / 1e6:.1f} MB, {dtype}, {batch}")
    listed = ", ".join(f"{name} {value:.1e}" for name, value in done.differences.items())
    typer.echo(f"Largest differences from PyTorch on {len(image) if image else 'drawn'} images: {listed}")
