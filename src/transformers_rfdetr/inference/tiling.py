"""Predict a large image in overlapping tiles."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import Tensor
from transformers.utils import logging

from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_io import as_tensor, read_pixels, to_float
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.masks import mask_areas, region_to_rle
from ..model.modeling_rf_detr import RfDetrForObjectDetection
from ..model.validation import as_pair, read_size, require
from .fixed_size import FixedSizeModel
from .instances import Instances
from .predict import DEFAULT_SCORE, WEAK_SCORE, class_thresholds, predict
from .tile_merging import Tile, decode_mask, merge_tiles

logger = logging.get_logger(__name__)


def predict_tiled(
    model: RfDetrForObjectDetection | FixedSizeModel,
    processor: RfDetrImageProcessor,
    image: Any,
    *,
    tile: int | tuple[int, int] | None = None,
    overlap: float = 0.2,
    threshold: float | Literal["calibrated"] = DEFAULT_SCORE,
    batch_size: int = 4,
    classes: Sequence[str] | None = None,
    embeddings: bool = False,
    progress: bool = False,
) -> Instances:
    """Predict one large image in tiles, and merge the pieces of objects that tile borders cut.

    Tiles are not resized: objects have the size in pixels that they have in the image, while a model that was trained
    on whole images has seen them smaller. Only `batch_size` tiles are in memory besides the image, and masks as RLE.

    Example:
        >>> from PIL import Image
        >>> from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrImageProcessor
        >>> from transformers_rfdetr.inference.tiling import predict_tiled
        >>> model = RfDetrForInstanceSegmentation(RfDetrConfig.from_variant("rf-detr-seg-nano"))
        >>> processor = RfDetrImageProcessor.from_variant("rf-detr-seg-nano")
        >>> predict_tiled(model, processor, Image.new("RGB", (400, 300)), threshold=0.9).image_size
        (300, 400)

    Args:
        model: See [`predict`]; a compiled model must have the size of a tile.
        processor: The model's image processor; its `size` is ignored.
        image: One image in any form that the processor accepts. One that is smaller than a tile is padded with the
            processor's mean color.
        tile: Side of a tile in pixels, or (height, width); the model's resolution by default. It is rounded up, with a
            warning, to a multiple of patch size x windows.
        threshold: See [`predict`].
        overlap: Least overlap of neighboring tiles, in [0, 0.5], as a fraction of their side. Objects up to that size
            are complete in at least one tile. With 0, objects are not merged.
        batch_size: Number of tiles in a forward pass.
        classes: See [`predict`].
        embeddings: See [`predict`].
        progress: Whether to show a progress bar.

    Returns:
        The instances of the image; see [`merge_tiles`]. For an image of a single tile they are those of [`predict`].

    Raises:
        ValueError: the image cannot be read, or an argument is out of range.
    """
    thresholds = class_thresholds(model.config, threshold)
    least_score = min(float(thresholds.min()), WEAK_SCORE)
    settings: dict[str, Any] = {"tile": tile, "overlap": overlap, "batch_size": batch_size, "progress": progress}
    found, image_size = predict_pieces(
        model, processor, image, **settings, threshold=least_score, classes=classes, embeddings=embeddings
    )
    return merge_tiles(found, image_size, thresholds)


def predict_pieces(
    model: RfDetrForObjectDetection | FixedSizeModel,
    processor: RfDetrImageProcessor,
    image: Any,
    *,
    tile: int | tuple[int, int] | None,
    overlap: float,
    batch_size: int,
    progress: bool,
    **settings: Any,
) -> tuple[list[tuple[Tile, Instances]], tuple[int, int]]:
    """Predict the tiles of an image for [`merge_tiles`], and return them with (height, width) of the image.

    The arguments are those of [`predict_tiled`]; `settings` are for [`predict`].
    """
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    size = _legal_tile_size(model.config, tile)
    pixels = as_tensor(read_pixels(image, processor.do_rescale))
    image_size = (pixels.shape[1], pixels.shape[2])
    tiles = cut_tiles(image_size, size, overlap)
    tile_processor = copy.copy(processor)
    tile_processor.size, tile_processor.pad_size = {"height": size[0], "width": size[1]}, None
    found: list[tuple[Tile, Instances]] = []
    for start in logging.tqdm(range(0, len(tiles), batch_size), desc="Tiles", disable=not progress):
        batch = tiles[start : start + batch_size]
        crops = [_crop(processor, pixels, each, size) for each in batch]
        results = predict(model, tile_processor, crops, batch_size=batch_size, **settings)
        found += [(each, _without_padding(result, each)) for each, result in zip(batch, results, strict=True)]
    return found, image_size


def _legal_tile_size(config: RfDetrConfig, tile: int | tuple[int, int] | None) -> tuple[int, int]:
    size = as_pair(read_size(config.resolution if tile is None else tile, "tile"))
    require(min(size) > 0, "tile", tile, "a positive number of pixels")
    block = config.backbone_config.patch_size * config.backbone_config.num_windows
    height, width = (math.ceil(side / block) * block for side in size)
    if (height, width) != size:
        logger.warning_once(f"`tile` {size} is rounded up to {(height, width)}, multiples of {block} pixels")
    return height, width


def cut_tiles(image_size: tuple[int, int], size: tuple[int, int], overlap: float) -> list[Tile]:
    """Return the tiles of an image row by row: evenly spaced, inside the image, the last ones at its edges.

    Args:
        image_size: (height, width) of the image.
        size: (height, width) of a tile.
        overlap: Least overlap of neighboring tiles, in [0, 0.5], as a fraction of their side.

    Raises:
        ValueError: `overlap` is outside [0, 0.5].
    """
    require(0 <= overlap <= 0.5, "overlap", overlap, "a fraction of a tile in [0, 0.5]", "Pass one such as 0.2.")
    tops, lefts = (_starts(length, side, overlap) for length, side in zip(image_size, size, strict=True))
    height, width = np.minimum(image_size, size).tolist()
    return [Tile(top, left, height, width) for top in tops for left in lefts]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    room = length - side
    if room <= 0:
        return [0]
    steps = math.ceil(room / max(1, math.floor(side * (1 - overlap))))
    return [round(index * room / steps) for index in range(steps + 1)]


def _crop(processor: RfDetrImageProcessor, pixels: Tensor, tile: Tile, size: tuple[int, int]) -> Tensor:
    """Cut a tile out of (1 or 3, H, W): (3, *size) float32, scaled, padded with the mean color."""
    inside = pixels[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
    image = to_float(inside, processor.do_rescale, processor.rescale_factor)
    if image.shape[1:] == size:
        return image
    padded = image.new_tensor(processor.image_mean)[:, None, None].repeat(1, *size)
    padded[:, : tile.height, : tile.width] = image
    return padded


def _without_padding(found: Instances, tile: Tile) -> Instances:
    """Clip the instances of a padded tile to the image, and drop those in the padding."""
    size = (tile.height, tile.width)
    if found.image_size == size:
        return found
    boxes = np.minimum(found.boxes, np.array([*size[::-1], *size[::-1]], np.float32))
    is_kept, masks = (boxes[:, 2:] > boxes[:, :2]).all(1), found.masks
    if masks:
        masks = [region_to_rle(decode_mask(mask)[: tile.height, : tile.width], 0, 0, size) for mask in masks]
        is_kept &= mask_areas(masks) > 0
    return replace(found, boxes=boxes, masks=masks, image_size=size).select(is_kept)
