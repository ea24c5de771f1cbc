"""Models compiled for inference on images of one size.

[`compile_for_inference`] makes an [`InferenceModel`] and compares it with the plain model, which is its definition.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from ..model.configuration_rf_detr import RfDetrConfig
from ..model.modeling_rf_detr import RfDetrForObjectDetection, RfDetrOutput
from ..model.modeling_rf_detr_dinov2 import resize_position_table
from ..model.predictions_rf_detr import MaskFactors, StagePrediction
from ..model.validation import as_pair, check_resolution, read_size

logger = logging.get_logger(__name__)

# Greatest difference of logits and boxes from the plain model in float32, relative to the largest of each (and to 1).
# bfloat16 has 8 bits of mantissa, float16 11; a dozen and a half layers add up.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


class InferenceModel:
    """A copy of a model made fast for images of one size; made by [`compile_for_inference`].

    Attributes:
        active: What it runs with, for people: dtype, memory format, compiler, CUDA graphs.
        differences: Of logits, boxes, masks and the scores of the chosen tokens the greatest difference from the plain
            model in float32 on a noise image, relative to the greatest of them all and to 1 at least.
    """

    training = False  # whatever `train` is called with, as of every predictor

    def __init__(self, model: RfDetrForObjectDetection, size: tuple[int, int], batch_size: int, dtype: torch.dtype):
        self.size, self.batch_size = size, batch_size
        self.active = [str(dtype).removeprefix("torch."), f"{batch_size} x {size[0]} x {size[1]}"]
        self.differences: dict[str, float] = {}
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        bake_position_embeddings(self._model, size)
        self._model.to(dtype)
        self._run: Callable[[Tensor], tuple] = self._tensors

    @property
    def config(self) -> RfDetrConfig:
        """The model's configuration."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """What it runs in."""
        return self._model.dtype

    def eval(self) -> "InferenceModel":
        """Itself: it has no other mode."""
        return self

    def train(self, mode: bool = False) -> "InferenceModel":
        """Itself; ValueError if it is to be trained."""
        if mode:
            raise ValueError("a model compiled for inference cannot be trained; train the one that it was made from")
        return self

    def _tensors(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        base = self._model.forward_features(pixel_values, None, False, False)
        stage = self._model.last_stage(base, self.size)
        tensors = (base.enc_indices, self._model.mask_background_logits(stage.logits), stage.boxes)
        if stage.masks is None:
            return tensors
        return *tensors, stage.masks.pixels, *stage.masks.project(stage.masks.queries)

    @torch.no_grad()
    def predict_stage(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> StagePrediction:
        """As the model's own, for any number of images of its size: they run `batch_size` at a time.

        Raises:
            ValueError: images of another size, or padded ones.
        """
        if tuple(pixel_values.shape[-2:]) != self.size or (pixel_mask is not None and not pixel_mask.all()):
            raise ValueError(
                f"this model is compiled for whole images of {self.size}, these are {tuple(pixel_values.shape[-2:])}"
                " or padded; compile one for their size, or use the model that it was made from"
            )
        parts = []
        for some in pixel_values.to(self.device).split(self.batch_size):
            filling = some.new_zeros(self.batch_size - len(some), *some.shape[1:])
            # A copy: the next run of a CUDA graph writes where this one did.
            parts.append([tensor[: len(some)].clone() for tensor in self._run(torch.cat([some, filling]))])
        _, logits, boxes, *masks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if not masks:
            return StagePrediction(logits, boxes)
        pixels, vectors, offsets = masks
        projected = torch.cat([vectors, offsets], dim=-1)
        return StagePrediction(logits, boxes, MaskFactors(pixels, projected, lambda q: (q[..., :-1], q[..., -1:])))

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> RfDetrOutput:
        """The outputs that a result is made of: logits, boxes, and masks of all queries."""
        stage = self.predict_stage(pixel_values, pixel_mask)
        masks = None if stage.masks is None else stage.masks.logits()
        return RfDetrOutput(logits=stage.logits, pred_boxes=stage.boxes, pred_masks=masks)


def compile_for_inference(
    model: RfDetrForObjectDetection,
    *,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> InferenceModel:
    """A copy of `model` made fast for images of one size, checked against `model` itself.

    The position table is resampled once, and torch.compile makes one graph of static shapes, with weights as constants
    on the CPU and with CUDA graphs on a GPU. What cannot be had is said in a warning, and the plain path is taken.

    Args:
        model: On the device that the copy is to run on. It is not changed.
        size: Images' size for the model, one side or (height, width), each a multiple of patch size x windows; the
            configuration's resolution by default.
        batch_size: Images in one run. Others are filled up or split.
        dtype: float32, float16 or bfloat16; the model's by default.
        compiled: Whether to compile.

    Returns:
        What `predict` takes as model, and what is called as the model is.

    Raises:
        ValueError: an illegal size; a dtype that is none of these; or outputs further from the model's than rounding
            in `dtype` explains.
    """
    size = as_pair(read_size(model.config.resolution if size is None else size, "size"))
    backbone = model.config.backbone_config
    check_resolution(size, backbone.patch_size, backbone.num_windows, "size")
    dtype = dtype or model.dtype
    if dtype not in _TOLERANCES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(map(str, _TOLERANCES))}")
    fast = InferenceModel(model, size, batch_size, dtype)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).mul(4).sub(2).to(model.device)
    if compiled:
        on_gpu = model.device.type == "cuda"
        options = {"mode": "reduce-overhead"} if on_gpu else {"options": {"freezing": True}}
        fast._run = torch.compile(fast._tensors, fullgraph=True, dynamic=False, **options)
        try:
            fast.predict_stage(image)
            fast.active += ["torch.compile", "CUDA graphs"] if on_gpu else ["torch.compile", "constant weights"]
        except Exception as error:  # a missing C++ compiler, an old driver: torch raises what it finds
            fast._run = fast._tensors
            fast.active.append("not compiled")
            logger.warning(f"torch.compile failed, so the model runs as it is: {type(error).__name__}: {error}")
    _check(fast, model, image)
    logger.info(f"compiled for inference: {', '.join(fast.active)}")
    return fast


def bake_position_embeddings(model: RfDetrForObjectDetection, size: tuple[int, int]) -> None:
    """Resample the position table to images of (height, width), for good."""
    config = model.config.backbone_config
    grid = (size[0] // config.patch_size, size[1] // config.patch_size)
    embeddings = model.backbone[0].encoder["encoder"].embeddings
    table = resize_position_table(embeddings.position_embeddings.detach(), config.position_grid, grid)
    embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
    config.image_size = size


# -- comparing two ways to compute one model -------------------------------------------------------------------------


class ForcedTopK(TorchFunctionMode):
    """Notes the indices that each `torch.topk` chooses, or makes it take `given` ones and notes how much is lost.

    The first stage orders tokens by their logits. Rounding may change the order of two that are as good as tied, after
    which other queries get them and many numbers differ; so two ways are compared with the choice of one of them.
    """

    def __init__(self, given: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.given = None if given is None else iter(given)
        self.made: list[Tensor] = []
        self.losses = [0.0]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.topk:
            if self.given is not None:
                indices = next(self.given)
                values = args[0].gather(1, indices)
                self.losses.append(difference(values, result.values))
                result = type(result)((values, indices))
            self.made.append(result.indices)
        return result


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors' numbers, absolute up to 1 and relative above.

    It is infinite for tensors of two shapes, and where one number is NaN, or is infinite and the other is another.
    """
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double(), expected.double()
    differences = (found - expected).abs() / expected.abs().clamp(min=1.0)
    return differences.masked_fill(found == expected, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max().item()


@torch.no_grad()
def _check(fast: InferenceModel, model: RfDetrForObjectDetection, image: Tensor) -> None:
    """Compare with the plain model in float32, which takes the tokens that the fast one chose."""
    tolerance = _TOLERANCES[fast.dtype]
    chosen, *found = (tensor[:1].clone() for tensor in fast._run(image.expand(fast.batch_size, -1, -1, -1)))
    with ForcedTopK([chosen]) as choices:
        expected = copy.deepcopy(model).eval().float().predict_stage(image.float())
    pairs = {"logits": (found[0], expected.logits), "boxes": (found[1], expected.boxes)}
    if expected.masks is not None:
        masks = MaskFactors(found[2].float(), found[3].float(), lambda vectors: (vectors, found[4].float()))
        pairs["masks"] = (masks.logits(), expected.masks.logits())
    fast.differences["choice of tokens"] = max(choices.losses)
    for name, (one, other) in pairs.items():
        scale = other[other > -1e3].abs().max().clamp(min=1)  # of rows that are classes
        fast.differences[name] = difference(one / scale, other / scale)
    for name, value in fast.differences.items():
        if not value <= tolerance:
            raise ValueError(
                f"the {name} of the model made for inference ({', '.join(fast.active)}) differ from the plain ones by"
                f" {value:.3g} of the largest, more than {tolerance}; use dtype=torch.float32 or compiled=False"
            )
