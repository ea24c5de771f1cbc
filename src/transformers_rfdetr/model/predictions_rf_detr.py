"""What a stage of the model predicts: a decoder layer, or the first stage. The model makes it, the loss reads it.

Axis letters: B images, N queries of all groups, C classes, D width, h w mask grid.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class MaskFactors(NamedTuple):
    """Mask logits as a product, <vectors, pixels> + offsets, of which the vectors and offsets come from the queries.

    Dense mask logits of all queries and layers are never materialized in training. The matcher projects all queries
    without gradients and multiplies at sampled points; the loss projects the matched queries only, with gradients.
    """

    pixels: Tensor  # (B, D, h, w)
    queries: Tensor  # (B, N, D)
    project: Callable[[Tensor], tuple[Tensor, Tensor]]  # queries (..., D) -> vectors (..., D) and offsets (..., 1)

    def logits(self) -> Tensor:
        """Materialize the dense mask logits (B, N, h, w)."""
        vectors, offsets = self.project(self.queries)
        return (vectors @ self.pixels.flatten(2) + offsets).unflatten(-1, self.pixels.shape[-2:])

    def logits_of(self, image: int, queries: Tensor) -> Tensor:
        """Materialize the mask logits (K, h, w) of K queries of one image."""
        selected = self._replace(pixels=self.pixels[image, None], queries=self.queries[image, queries][None])
        return selected.logits()[0]


class StagePrediction(NamedTuple):
    """The prediction of one stage for the N queries of each image."""

    logits: Tensor  # (B, N, C)
    boxes: Tensor  # (B, N, 4), (cx, cy, w, h)
    masks: MaskFactors | None = None
    # Of `predict_stage` only, and not of exported files:
    queries: Tensor | None = None  # (B, N, D), the queries after the last decoder layer
    features: Tensor | None = None  # (B, D) float32, the mean of the feature map over the image
