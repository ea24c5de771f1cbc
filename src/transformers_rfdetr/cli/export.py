"""`transformers-rfdetr export`: a model as an ONNX or OpenVINO file, checked against PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from .errors import one_line_errors
from .options import DTYPES, read_size

EXAMPLE = """examples:

transformers-rfdetr export my-model my-model.onnx --dtype float16 --image street.jpg

transformers-rfdetr export Roboflow/rf-detr-seg-nano seg-nano.onnx --resolution 240x312 --post-process
"""


@one_line_errors
def export(
    model: Annotated[str, typer.Argument(help="a folder or Hub id that from_pretrained takes")],
    output: Annotated[Path, typer.Argument(help="the file to make: .onnx, or .xml of OpenVINO")],
    format: Annotated[str | None, typer.Option(help="onnx or openvino; by default what the file's name says")] = None,
    resolution: Annotated[
        str | None, typer.Option(metavar="N|HxW", help="pixels of the input, instead of the model's own")
    ] = None,
    post_process: Annotated[
        bool, typer.Option("--post-process", help="scores, labels and boxes of the best pairs instead of all logits")
    ] = False,
    top_k: Annotated[int | None, typer.Option(help="how many of them; as many as queries by default")] = None,
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES[:2]))] = "float32",
    batch_size: Annotated[int | None, typer.Option(help="pictures in a batch; any number by default")] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="PATH_OR_URL", help="a picture to check it on; may be repeated")
    ] = None,
) -> None:
    """Write a model as an ONNX or OpenVINO file, if it then computes what PyTorch computes."""
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
        pictures=image or None,
        processor=processor,
    )
    weights = done.path.with_suffix(".bin") if done.path.suffix == ".xml" else done.path
    batch = "any batch size" if batch_size is None else f"batches of {batch_size}"
    typer.echo(f"{done.path}: {weights.stat().st_size / 1e6:.1f} MB, {dtype}, {batch}")
    listed = ", ".join(f"{name} {value:.1e}" for name, value in done.differences.items())
    typer.echo(f"Largest differences from PyTorch on {len(image) if image else 'drawn'} pictures: {listed}")
