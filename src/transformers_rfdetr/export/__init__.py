"""Export a model to other runtimes."""

from .exporter import export

__all__ = ["export"]
