"""The files in the package: rf-detr-seg-tiny, a small trained model, and an image that it finds objects in."""

from pathlib import Path

TINY_NAME = "rf-detr-seg-tiny"
_FOLDER = Path(__file__).parent


def tiny_checkpoint() -> Path:
    """Return the folder of rf-detr-seg-tiny, a segmentation model of 2.6 million parameters.

    It was trained on drawn aerial images only, by `examples/train_tiny.py`, for tests, examples and first steps. It is
    not one of the published variants.

    Example:
        >>> from transformers import AutoModelForInstanceSegmentation
        >>> from transformers_rfdetr import tiny_checkpoint
        >>> model = AutoModelForInstanceSegmentation.from_pretrained(tiny_checkpoint())
        >>> list(model.config.id2label.values())
        ['building', 'tree', 'car', 'pool', 'tank']
    """
    return _FOLDER / TINY_NAME


def sample_image() -> Path:
    """Return a drawn aerial image of 288 x 288 pixels (PNG), which rf-detr-seg-tiny was not trained on."""
    return _FOLDER / "sample.png"
