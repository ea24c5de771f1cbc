"""Compile a model for inference on images of one size, and compare two ways to compute one model.

The plain model is the definition: [`compile_for_inference`] compares its copy with it.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from ..model.modeling_rf_detr import RfDetrForObjectDetection, pool_features
from ..model.modeling_rf_detr_dinov2 import resize_position_table
from ..model.predictions_rf_detr import MaskFactors, StagePrediction
from ..model.validation import as_pair, check_resolution, read_size, require
from .fixed_size import FixedSizeModel

logger = logging.get_logger(__name__)

# Largest allowed difference of an output from the plain model in float32, relative to its largest magnitude or to 1 if
# that is smaller. float16 has 11 bits of mantissa and bfloat16 8, and the errors of about 18 layers add up.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


class InferenceModel(FixedSizeModel):
    """A copy of a model that runs on batches of one size; created by [`compile_for_inference`].

    Attributes:
        differences: The largest difference of logits, boxes, masks, pooled features and the scores of the selected
            tokens from the plain model in float32 on a noise image, relative to the largest magnitude of each, or to 1
            if that is smaller.
    """

    def __init__(self, model: RfDetrForObjectDetection, size: tuple[int, int], batch_size: int, dtype: torch.dtype):
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        bake_position_embeddings(self._model, size)
        self._model.to(dtype)
        super().__init__(self._model.config, model.device, size, batch_size)
        self.dtype = dtype
        self.active = [str(dtype).removeprefix("torch."), f"{batch_size} x {size[0]} x {size[1]}"]
        self.differences: dict[str, float] = {}
        self._run: Callable[[Tensor], tuple] = self._tensors

    def _tensors(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        base = self._model.forward_features(pixel_values, None, False, False)
        stage = self._model.last_stage(base, self.size)
        embeddings = (base.last_hidden_state, pool_features(base.backbone_features, None))
        tensors = (base.enc_indices, self._model.mask_background_logits(stage.logits), stage.boxes, *embeddings)
        if stage.masks is None:
            return tensors
        return *tensors, stage.masks.pixels, *stage.masks.project(stage.masks.queries)

    def _stage(self, tensors: list[Tensor]) -> StagePrediction:
        _, logits, boxes, queries, features, *parts = tensors
        masks = None
        if parts:
            pixels, vectors, offsets = parts
            projected = torch.cat([vectors, offsets], dim=-1)
            masks = MaskFactors(pixels, projected, lambda q: (q[..., :-1], q[..., -1:]))
        return StagePrediction(logits, boxes, masks, queries, features)


def compile_for_inference(
    model: RfDetrForObjectDetection,
    *,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> InferenceModel:
    """Return a fast copy of a model for images of one size, compared with the model itself.

    The position table is resampled once, and torch.compile builds one graph of static shapes, with constant weights on
    the CPU and with CUDA graphs on a GPU. If compilation fails, a warning has the reason, and the copy runs without it.

    Args:
        model: The model, on the device on which the copy will run. It is not changed.
        size: Size of the input in pixels, a side or (height, width), multiples of patch size x windows; the resolution
            of the configuration by default.
        batch_size: Number of images in one run. Larger batches are split, and smaller ones are padded with zeros.
        dtype: float32, float16 or bfloat16; that of the model by default.
        compiled: Whether to use torch.compile.

    Returns:
        A model that [`predict`] takes, and that is called like the plain one.

    Raises:
        ValueError: The size or the dtype is invalid, or the outputs differ from the model's by more than rounding in
            `dtype` explains.
    """
    sides = as_pair(read_size(model.config.resolution if size is None else size, "size"))
    backbone = model.config.backbone_config
    check_resolution(sides, backbone.patch_size, backbone.num_windows, "size")
    dtype = dtype or model.dtype
    require(dtype in _TOLERANCES, "dtype", dtype, f"one of {', '.join(map(str, _TOLERANCES))}")
    fast = InferenceModel(model, sides, batch_size, dtype)
    image = torch.rand(1, 3, *sides, generator=torch.Generator().manual_seed(0)).mul(4).sub(2).to(model.device)
    if compiled:
        on_gpu = model.device.type == "cuda"
        mode = "reduce-overhead" if on_gpu else None
        # A copy of the code has graphs of its own: torch.compile allows one code 8 graphs, and a graph with constant
        # weights serves one model.
        function = FunctionType(InferenceModel._tensors.__code__.replace(), globals())
        fast._run = torch.compile(MethodType(function, fast), fullgraph=True, dynamic=False, mode=mode)
        try:
            with nullcontext() if on_gpu else _packed_weights():
                fast.predict_stage(image)
            fast.active += ["torch.compile", "CUDA graphs"] if on_gpu else ["torch.compile", "constant weights"]
        except Exception as error:  # of many types: the C++ compiler is missing, the driver is old, ...
            fast._run = fast._tensors
            fast.active.append("not compiled")
            logger.warning(f"torch.compile failed, so the model runs without it: {type(error).__name__}: {error}")
    _check(fast, model, image)
    logger.info(f"compiled for inference: {', '.join(fast.active)}")
    return fast


@contextmanager
def _packed_weights() -> Iterator[None]:
    """Let torch.compile build weights into its graph as constants, packed for oneDNN.

    The tracer reads the setting `freezing` itself, so that it has no effect as an option of `torch.compile`. Float32
    products are computed by oneDNN if TF32 is allowed while the graph is built, and else by MKL, which takes twice as
    long on AMD processors with AVX512. TF32 is not allowed when the graph runs, so oneDNN computes in float32.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)  # of torch 2.9
    precision = getattr(products, "fp32_precision", None)
    with torch._inductor.config.patch(freezing=True):
        if products is not None:
            products.fp32_precision = "tf32"
        try:
            yield
        finally:
            if products is not None:
                products.fp32_precision = precision


def bake_position_embeddings(model: RfDetrForObjectDetection, size: tuple[int, int]) -> None:
    """Replace the position table of a model by the one for images of (height, width)."""
    config = model.config.backbone_config
    grid = (size[0] // config.patch_size, size[1] // config.patch_size)
    embeddings = model.backbone[0].encoder["encoder"].embeddings
    table = resize_position_table(embeddings.position_embeddings.detach(), config.position_grid, grid)
    embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
    config.image_size = size


# Comparing two ways to compute one model


class ForcedTopK(TorchFunctionMode):
    """Record the indices that each `torch.topk` selects, or replace them by `given` ones and record the difference.

    The first stage orders tokens by their logits. Rounding may swap two tokens with nearly equal logits; other queries
    get them then, and many numbers differ. So two ways are compared with the selection of one of them.
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
    """Return the largest difference of two tensors' numbers, absolute up to 1 and relative above.

    It is infinite if the shapes differ, a number is NaN, or an infinite number differs from the other one.
    """
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double(), expected.double()
    differences = (found - expected).abs() / expected.abs().clamp(min=1.0)
    return differences.masked_fill(found == expected, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max().item()


@torch.no_grad()
def _check(fast: InferenceModel, model: RfDetrForObjectDetection, image: Tensor) -> None:
    """Compare with the plain model in float32, which takes the tokens that the fast one selected.

    Raises:
        ValueError: A difference is larger than the tolerance.
    """
    tolerance = _TOLERANCES[fast.dtype]
    tensors = (tensor[:1].clone() for tensor in fast._run(image.expand(fast.batch_size, -1, -1, -1)))
    chosen, logits, boxes, _, features, *parts = tensors
    with ForcedTopK([chosen]) as choices:
        expected = copy.deepcopy(model).eval().float().predict_stage(image.float())
    pairs = {"logits": (logits, expected.logits), "boxes": (boxes, expected.boxes)}
    pairs["features"] = (features, expected.features)
    if expected.masks is not None:
        pixels, projected, offsets = (part.float() for part in parts)
        masks = MaskFactors(pixels, projected, lambda vectors: (vectors, offsets))
        pairs["masks"] = (masks.logits(), expected.masks.logits())
    fast.differences["selected tokens"] = max(choices.losses)
    for name, (one, other) in pairs.items():
        scale = other[other > -1e3].abs().max().clamp(min=1)  # without rows that are not classes
        fast.differences[name] = difference(one / scale, other / scale)
    for name, value in fast.differences.items():
        if not value <= tolerance:
            raise ValueError(
                f"the {name} of the compiled model ({', '.join(fast.active)}) must agree with the plain model within"
                f" {tolerance}, got a difference of {value:.3g}. Use dtype=torch.float32 or compiled=False."
            )
