"""What compiled and exported models have in common: they run on images of one size, and cannot be trained."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.configuration_rf_detr import RfDetrConfig
from ..model.modeling_rf_detr import RfDetrOutput
from ..model.predictions_rf_detr import StagePrediction


class FixedSizeModel:
    """A model for images of one size that is called like the plain one, by [`predict`] and in evaluation.

    Subclasses define `_run`, and `_stage`, which converts what it returns.

    Attributes:
        config: The configuration of the plain model.
        device: The device of its inputs and outputs.
        size: (height, width) of the images in pixels.
        batch_size: Number of images in one run, or None for any number. Larger batches are split, and smaller ones are
            padded with zeros.
        active: What it runs with, as text: the runtime, dtype, shape of a batch.
    """

    training = False
    _run: Callable[[Tensor], Sequence[Tensor]]  # pixels (B, 3, height, width) -> tensors whose first axis is B

    def __init__(self, config: RfDetrConfig, device: torch.device, size: tuple[int, int], batch_size: int | None):
        self.config, self.device, self.size, self.batch_size = config, device, size, batch_size
        self.active: list[str] = []

    def eval(self) -> "FixedSizeModel":
        """Return the model itself, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = False) -> "FixedSizeModel":
        """Return the model itself.

        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise ValueError("a model for inference cannot be trained. Train the model that it was made from.")
        return self

    def to(self, device: torch.device | str) -> "FixedSizeModel":
        """Return the model itself.

        Raises:
            ValueError: it runs on another device.
        """
        if torch.device(device) != self.device:
            raise ValueError(f"`device` must be {self.device}, on which the model was prepared, got {device}.")
        return self

    def _stage(self, tensors: list[Tensor]) -> StagePrediction:
        raise NotImplementedError

    @torch.no_grad()
    def predict_stage(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> StagePrediction:
        """Predict as the plain model does, for any number of images.

        Raises:
            ValueError: The images have another size, or are padded.
        """
        if tuple(pixel_values.shape[-2:]) != self.size or (pixel_mask is not None and not pixel_mask.all()):
            raise ValueError(
                f"`pixel_values` must be images of {self.size} without padding, for which this model was prepared, got"
                f" {tuple(pixel_values.shape[-2:])}. Compile or export the model for that size, or use the plain model."
            )
        parts = []
        for some in pixel_values.to(self.device).split(self.batch_size or len(pixel_values)):
            filling = some.new_zeros((self.batch_size or len(some)) - len(some), *some.shape[1:])
            # Cloned, because the next run of a CUDA graph writes to the same memory.
            parts.append([tensor[: len(some)].clone() for tensor in self._run(torch.cat([some, filling]))])
        return self._stage([torch.cat(tensors) for tensors in zip(*parts, strict=True)])

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> RfDetrOutput:
        """Return logits, boxes and mask logits of all queries."""
        stage = self.predict_stage(pixel_values, pixel_mask)
        masks = None if stage.masks is None else stage.masks.logits()
        return RfDetrOutput(logits=stage.logits, pred_boxes=stage.boxes, pred_masks=masks)
