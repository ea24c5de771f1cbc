"""The module that is exported, and the ONNX and OpenVINO files that are written from it.

A file is made for one height and width: everything that depends on the size (anchors, sine tables, positions) is a
constant in it. The table of positions is resampled before, because ONNX has no antialiased bicubic filter.

Axes: B images, Q queries, C classes, K pairs of query and class, h w mask grid.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.compiled import bake_position_embeddings
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection

# The operators that the exporters of torch 2.6 and later write without converting them.
_OPSET = 18
_NO_LIMIT = 2**62  # of the number of elements of a tensor


class ExportedModel(nn.Module):
    """A model whose `forward` takes pixels and returns the outputs of the file, in the order of `names`."""

    def __init__(self, model: RfDetrForObjectDetection, post_process: bool, top_k: int) -> None:
        super().__init__()
        self.model, self.post_process, self.top_k = model, post_process, top_k
        self.names = ["scores", "labels", "boxes"] if post_process else ["boxes", "logits"]
        if isinstance(model, RfDetrForInstanceSegmentation):
            self.names.append("masks")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Pixels (B, 3, height, width) -> the outputs that [`export`] describes."""
        outputs = self.model(pixel_values)
        boxes, logits = outputs.pred_boxes.float(), outputs.logits.float()
        masks = [] if outputs.pred_masks is None else [outputs.pred_masks.float()]
        if not self.post_process:
            return boxes, logits, *masks
        scores, labels, queries = best_pairs(logits, boxes, self.top_k)
        # Rows of all images in one table, so that selecting them needs no index for each pixel of a mask.
        rows = queries + boxes.shape[1] * torch.arange(boxes.shape[0], device=boxes.device)[:, None]
        boxes, *masks = (table.flatten(0, 1)[rows] for table in (boxes, *masks))
        center, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
        return scores, labels, torch.cat([center - half, center + half], dim=-1).clamp(0, 1), *masks


def best_pairs(logits: Tensor, boxes: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, Q, C), boxes (B, Q, 4) -> scores, labels and queries (B, K) of the pairs with the highest scores.

    They are selected as the image processor does it without a threshold: a query whose box is not finite scores 0.
    """
    num_classes = logits.shape[2]
    usable = (boxes.abs() < math.inf).all(-1, keepdim=True) & (logits > -math.inf)  # False for NaN
    best = torch.topk(logits.masked_fill(~usable, -math.inf).flatten(1), top_k, dim=1)
    return best.values.sigmoid(), best.indices % num_classes, best.indices // num_classes


def prepare_for_export(model: RfDetrForObjectDetection, size: tuple[int, int], dtype: str) -> RfDetrForObjectDetection:
    """Return a copy with the table of positions for images of (height, width), which computes in `dtype`."""
    model = copy.deepcopy(model)
    bake_position_embeddings(model, size)
    if dtype == "float16":
        model.half()
        transformer = model.transformer
        heads = [model.class_embed, model.bbox_embed, *transformer.enc_out_class_embed, *transformer.enc_out_bbox_embed]
        for head in heads:
            head.float().register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))
    return model


def write_onnx(
    module: ExportedModel, example: Tensor, is_dynamic: bool, metadata: Mapping[str, str], path: Path
) -> None:
    """Write an ONNX file; with `is_dynamic` it takes any number of images, else as many as `example` (B, 3, H, W)."""
    import onnx

    program: Any = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=module.names,
        dynamic_shapes=({0: torch.export.Dim("batch")},) if is_dynamic else None,
        opset_version=_OPSET,
        verbose=False,
        optimize=False,
    )
    _fold_constants(program.model)
    proto = program.model_proto
    for node in proto.graph.node:
        # The stack of Python calls that made it, with the paths of this machine.
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def _fold_constants(model: Any) -> None:
    """Simplify an `onnx_ir.Model`: compute what depends on weights only, and merge equal nodes and weights.

    torch's own optimization takes half of the time of an export, for rewriting rules that change the speed of our
    files by nothing that can be measured. And it folds small tensors only: it leaves weights that are transposed,
    sliced, reshaped or scaled in the graph, which NNCF cannot quantize.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    optimizer.fold_constants(model, onnx_shape_inference=True, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)
    for run in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        run(model)


def write_openvino(onnx_path: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Convert an ONNX file to OpenVINO's `.xml`, with the weights in a `.bin` beside it."""
    import openvino

    model = openvino.convert_model(onnx_path)
    set_openvino_metadata(model, metadata)
    openvino.save_model(model, path, compress_to_fp16=False)


def set_openvino_metadata(model: Any, metadata: Mapping[str, str]) -> None:
    """Store metadata in an `openvino.Model`."""
    for name, value in metadata.items():
        model.set_rt_info(value, ["model_info", name])
