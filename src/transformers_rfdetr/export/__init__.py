"""Export a model to other runtimes, and quantize the file."""

from .exporter import export
from .quantization import quantize

__all__ = ["export", "quantize"]
