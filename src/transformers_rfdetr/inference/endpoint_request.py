"""Answer a request as Inference Endpoints of the Hub send them: an image in, instances with masks as COCO RLE out."""

import base64
import binascii
from io import BytesIO
from typing import Any

import PIL.Image

from ..model.image_io import open_image
from .predict import predict
from .tiling import predict_tiled

PARAMETERS = ("threshold", "classes", "tile", "overlap")


def answer_request(model: Any, processor: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Return the instances of an image.

    Args:
        model: A model, as [`predict`] takes it.
        processor: Its image processor.
        data: `inputs`, a PIL image or an image file in base64; paths and URLs are not read. `parameters`, a dict that
            may have `threshold` and `classes` of [`predict`], and for large images `tile` ("auto" for the size of the
            model, or a size) and `overlap` of [`predict_tiled`].

    Returns:
        `image_size` [height, width] and `instances`, best first, each with `name`, `label`, `score`, `box` [x0, y0, x1,
        y1] in pixels and `mask`, a COCO RLE; see [`Instances.to_dict`].

    Raises:
        ValueError: The image cannot be read, or a parameter is unknown or out of its range.
    """
    parameters = dict(data.get("parameters") or {})
    if unknown := sorted(parameters.keys() - set(PARAMETERS)):
        raise ValueError(f"`parameters` must be among {', '.join(PARAMETERS)}, got {', '.join(unknown)}")
    image = _read_image(data.get("inputs"))
    tile = parameters.pop("tile", None)
    if tile is not None:
        size = None if tile == "auto" else tile
        return predict_tiled(model, processor, image, tile=size, progress=False, **parameters).to_dict()
    if "overlap" in parameters:
        raise ValueError(f"`overlap` requires `tile`, got overlap {parameters['overlap']} alone. Add tile: 'auto'.")
    [found] = predict(model, processor, image, **parameters)
    return found.to_dict()


def _read_image(inputs: Any) -> PIL.Image.Image:
    """Return a PIL image as it is, and open base64; a path or a URL would let a request read what it may not."""
    if isinstance(inputs, PIL.Image.Image):
        return inputs
    if not isinstance(inputs, str):
        raise ValueError(f"`inputs` must be an image or base64 of an image file, got {type(inputs).__name__}")
    try:
        encoded = inputs.partition(",")[2] if inputs.startswith("data:image/") else inputs
        image = open_image(BytesIO(base64.b64decode(encoded, validate=True)))
        image.load()
    except (binascii.Error, ValueError, OSError) as error:
        raise ValueError(f"`inputs` must be base64 of an image file, got {inputs[:40]!r}: {error}") from error
    return image
