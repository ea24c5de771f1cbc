"""A Gradio page on which a model is tried: upload an image, see the instances, download them as JSON.

The model runs once for each image, and again if tiles are switched on or off. Threshold and classes select among the
instances that it found.
"""

import html
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..assets import sample_image
from ..model.image_io import open_image, read_rgb
from ..model.masks import rasterize, region_to_rle
from ..model.variants_rf_detr import class_labels
from .endpoint_request import answer_request
from .instances import Instances
from .predict import DEFAULT_SCORE, WEAK_SCORE, class_thresholds, labels_of, predict
from .tile_merging import Tile, merge_tiles
from .tiling import predict_pieces

try:
    import gradio
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ImportError as error:
    raise ImportError('The page requires gradio: pip install "transformers-rfdetr[app]"') from error

# Limits of an upload: visitors of a page share its memory.
MAX_UPLOAD_BYTES = 1 << 27
MAX_UPLOAD_PIXELS = 1 << 26
_SHOWN_SIDE = 1280  # pixels; larger images are drawn at this size
_CACHE_SECONDS = 3600  # uploads and results are deleted after this time
_STYLE = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto; overflow-wrap: break-word}
.gradio-container main {width: 100%}
h1 {overflow-wrap: anywhere}
"""


@dataclass
class Found:
    """What a model found in an image.

    Attributes:
        image: The image, RGB, reduced to at most 1,280 pixels a side.
        size: (height, width) of the image as it was uploaded.
        pieces: The tiles with their instances, in pixels of the tile; without tiles, one tile that is the image. All
            scores above the lowest threshold that the page offers.
    """

    image: PIL.Image.Image
    size: tuple[int, int]
    pieces: list[tuple[Tile, Instances]]

    def select(self, thresholds: np.ndarray, labels: Sequence[int] | None) -> Instances:
        """Return the instances above the threshold of their label, (C,), with one of the labels; all if None."""
        least_score = min(float(thresholds.min()), WEAK_SCORE)  # as `predict_tiled`
        pieces = [(tile, one.select(one.scores > least_score)) for tile, one in self.pieces]
        merged = merge_tiles(pieces, self.size, thresholds)
        return merged if labels is None else merged.select(np.isin(merged.labels, labels))

    def draw(self, instances: Instances) -> PIL.Image.Image:
        """Return the image with instances drawn on it, by class."""
        size = (self.image.height, self.image.width)
        if size == self.size:
            return instances.draw(self.image)
        masks = instances.masks
        if masks is not None:
            reduced = (rasterize([mask], self.size, size)[0] for mask in masks)
            masks = [region_to_rle(mask, 0, 0, size) for mask in reduced]
        scale = np.array([size[1] / self.size[1], size[0] / self.size[0]] * 2, np.float32)
        return replace(instances, boxes=instances.boxes * scale, masks=masks, image_size=size).draw(self.image)


def read_upload(path: Path, name: str) -> PIL.Image.Image:
    """Open and decode an uploaded file.

    Raises:
        ValueError: The file is not an image, is damaged, or is too large; the message is for the visitor.
    """
    try:
        image = open_image(BytesIO(path.read_bytes()))
        if image.width * image.height <= MAX_UPLOAD_PIXELS:
            image.load()
            return image
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{name} must be an image, such as JPEG, PNG, WebP or TIFF.") from error
    except PIL.Image.DecompressionBombError:
        pass
    except Exception as error:  # for damaged files Pillow raises SyntaxError, struct.error, zlib.error and others
        raise ValueError(f"{name} is damaged and cannot be read: {error}.") from error
    raise ValueError(
        f"{name} must have at most {MAX_UPLOAD_PIXELS / 1e6:.0f} million pixels. Reduce it, or cut it into parts."
    )


class _Page:
    """What the events of the page do.

    Args:
        model: A model, as [`predict`] takes it.
        processor: Its image processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.names = list(dict.fromkeys(class_labels(model.config.id2label).values()))
        self.is_calibrated = getattr(model.config, "score_thresholds", None) is not None
        self._lock = threading.Lock()  # one image at a time

    def find(self, path: Path, name: str, with_tiles: bool) -> Found:
        """Predict an uploaded image; errors are those of [`read_upload`] and [`predict`]."""
        image = read_upload(path, name)
        calibrated = class_thresholds(self.model.config, "calibrated").min() if self.is_calibrated else 1.0
        lowest = min(WEAK_SCORE, float(calibrated))
        with self._lock:
            if with_tiles:
                settings: dict[str, Any] = {"tile": None, "overlap": 0.2, "batch_size": 4, "progress": False}
                pieces, size = predict_pieces(self.model, self.processor, image, threshold=lowest, **settings)
            else:
                [instances] = predict(self.model, self.processor, image, threshold=lowest)
                size = instances.image_size
                pieces = [(Tile(0, 0, *size), instances)]
        shown = read_rgb(image)
        shown.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        return Found(shown, size, pieces)

    def on_image(self, file: dict[str, Any] | None, tiles: bool, *choices: Any) -> tuple[Any, ...]:
        """Predict the image that was uploaded, and show it; without an image, clear the page."""
        if file is None:
            return None, None, "", gradio.update(value=None, interactive=False)
        name = Path(file.get("orig_name") or file["path"]).name
        try:
            found = self.find(Path(file["path"]), name, tiles)
        except (ValueError, OSError) as error:
            return None, None, str(error), gradio.update(value=None, interactive=False)
        return found, *self.on_choice(found, *choices)

    def on_choice(
        self, found: Found | None, threshold: float, calibrated: bool, classes: Sequence[str] | None
    ) -> tuple[Any, ...]:
        """Show the instances with a score above the threshold; return the drawing, its description and the JSON."""
        if found is None:
            return gradio.skip(), gradio.skip(), gradio.skip()
        config = self.model.config
        thresholds = class_thresholds(config, "calibrated" if calibrated else threshold)
        instances = found.select(thresholds, labels_of(config, classes).tolist() if classes else None)
        text, cache = json.dumps(instances.to_dict()), gradio.utils.get_upload_folder()
        file = gradio.processing_utils.save_bytes_to_cache(text.encode(), "instances.json", cache)
        return found.draw(instances), _describe(instances), gradio.update(value=file, interactive=True)

    def on_slider(self, found: Found | None, threshold: float, classes: Sequence[str] | None) -> tuple[Any, ...]:
        """Show the instances with a score above the slider's, which replaces the calibrated thresholds."""
        return False, *self.on_choice(found, threshold, False, classes)

    async def on_request(self, request: Request) -> JSONResponse:
        """Answer a POST request as the handler of an Inference Endpoint does."""
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_UPLOAD_BYTES:
            return JSONResponse({"error": f"Content-Length must be at most {MAX_UPLOAD_BYTES}"}, 413)
        body = await request.body()
        is_image = request.headers.get("content-type", "").startswith("image/")
        try:
            answer = await run_in_threadpool(self._answer, body, is_image)
        except (ValueError, TypeError, OSError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return JSONResponse(answer)

    def _answer(self, body: bytes, is_image: bool) -> dict[str, Any]:
        data = {"inputs": open_image(BytesIO(body))} if is_image else json.loads(body)
        if not isinstance(data, dict):
            raise ValueError(f"the request must be a JSON object with `inputs`, got {type(data).__name__}")
        with self._lock:
            return answer_request(self.model, self.processor, data)


def _describe(instances: Instances) -> str:
    """Return the number of instances of each class, the most frequent first."""
    if not len(instances):
        return "No instances. Lower the threshold, or choose other classes."
    counts = ", ".join(f"{count} {name}" for name, count in Counter(instances.names).most_common())
    return f"{len(instances)} instance{'s' * (len(instances) > 1)}: {counts}"


def _build(page: _Page, title: str) -> gradio.Blocks:
    """Return the page, with its components and events."""
    cache = (_CACHE_SECONDS, _CACHE_SECONDS)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=cache, fill_width=True) as blocks:
        found = gradio.State(time_to_live=_CACHE_SECONDS)
        gradio.HTML(f"<h1>{html.escape(title)}</h1>")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", show_label=False, buttons=["fullscreen"])
                tiles = gradio.Checkbox(
                    label="Tiles", info="For large images: predicts tiles of the model's size, and merges them."
                )
                gradio.Examples([[str(sample_image())]], [image], label="Example")
            with gradio.Column():
                buttons = ["download", "fullscreen"]
                drawing = gradio.Image(
                    show_label=False, buttons=buttons, format="png", interactive=False, elem_id="drawing"
                )
                result = gradio.Textbox(label="Result", interactive=False, lines=2)
                threshold = gradio.Slider(WEAK_SCORE, 1.0, DEFAULT_SCORE, step=0.01, label="Score threshold")
                calibrated = gradio.Checkbox(
                    page.is_calibrated,
                    label="Calibrated threshold of each class",
                    info=getattr(page.model.config, "score_thresholds_note", None),
                    visible=page.is_calibrated,
                )
                classes = gradio.Dropdown(page.names, multiselect=True, label="Classes", info="All if none is chosen.")
                download = gradio.DownloadButton("Download as JSON", interactive=False)
        shown = [drawing, result, download]
        # Without `preprocess`, Gradio does not open the file, whose errors it would print with their traceback.
        settings: dict[str, Any] = {"api_visibility": "private", "preprocess": False, "trigger_mode": "always_last"}
        choices = [threshold, calibrated, classes]
        gradio.on([image.change, tiles.input], page.on_image, [image, tiles, *choices], [found, *shown], **settings)
        settings["show_progress"] = "hidden"
        gradio.on([calibrated.input, classes.input], page.on_choice, [found, *choices], shown, **settings)
        threshold.input(page.on_slider, [found, threshold, classes], [calibrated, *shown], **settings)
    return blocks


def serve(
    model: Any, processor: Any, *, title: str, host: str | None = None, port: int | None = None, wait: bool = True
) -> Any:
    """Serve the page of a model, and answer POST requests to /predict as the handler of an Inference Endpoint does.

    Example:
        >>> from transformers_rfdetr import load
        >>> page = serve(*load("rf-detr-seg-tiny"), title="Aerial images", wait=False)
        >>> page.close(verbose=False)

    Args:
        model: A model, as [`predict`] takes it.
        processor: Its image processor.
        title: The heading of the page.
        host: Address to listen at; 0.0.0.0 for all of this computer's. That of GRADIO_SERVER_NAME, else 127.0.0.1, by
            default.
        port: Port; that of GRADIO_SERVER_PORT, else the first free one from 7860 on, by default.
        wait: Whether to return only after an interrupt.

    Returns:
        The page, a `gradio.Blocks`, with `local_url` and `close()`.

    Raises:
        OSError: The port is not free.
    """
    page = _Page(model, processor)
    blocks = _build(page, title)
    blocks.queue(max_size=64).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        app_kwargs={"routes": [Route("/predict", page.on_request, methods=["POST"])]},
        max_file_size=MAX_UPLOAD_BYTES,
        footer_links=["gradio"],
        css=_STYLE,
        ssr_mode=False,
        quiet=True,
        share=False,
    )
    return blocks
