"""`transformers-rfdetr export`: a model as an ONNX or OpenVINO file, checked against PyTorch."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ..configuration_rf_detr import RfDetrConfig
from ..export import TOLERANCES
from ..export import export as export_model
from ..image_processing_rf_detr import RfDetrImageProcessor
from ..modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from .errors import one_line_errors

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
    dtype: Annotated[str, typer.Option(help=" or ".join(TOLERANCES))] = "float32",
    batch_size: Annotated[int | None, typer.Option(help="pictures in a batch; any number by default")] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="PATH_OR_URL", help="a picture to check it on; may be repeated")
    ] = None,
) -> None:
    """Write a model as an ONNX or OpenVINO file, if it then computes what PyTorch computes."""
    loaded, processor = _load(model)
    done = export_model(
        loaded,
        output,
        format=format or ("openvino" if output.suffix == ".xml" else "onnx"),
        resolution=None if resolution is None else _read_resolution(resolution),
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


def _read_resolution(text: str) -> int | list[int]:
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise ValueError(f"--resolution {text} is no number of pixels; give a side such as 432, or 432x576")
    sides = [int(side) for side in text.split("x")]
    return sides if len(sides) == 2 else sides[0]


def _load(name: str) -> tuple[RfDetrForObjectDetection, RfDetrImageProcessor]:
    """A model of the class that it was saved as, with its processor, or one from its configuration."""
    config = RfDetrConfig.from_pretrained(name)
    has_masks = any("Segmentation" in architecture for architecture in config.architectures or [])
    kind = RfDetrForInstanceSegmentation if has_masks else RfDetrForObjectDetection
    model, report = kind.from_pretrained(name, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} weights ({', '.join(missing[:3])}, ...) and cannot be exported")
    try:
        return model, RfDetrImageProcessor.from_pretrained(name)
    except OSError:
        typer.echo(f"{name} has no preprocessor_config.json: pictures are prepared as its config.json asks for.")
        return model, RfDetrImageProcessor.from_config(config)
