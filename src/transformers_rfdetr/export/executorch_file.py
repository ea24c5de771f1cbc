"""The ExecuTorch file of an exported module: XNNPACK computes what it can, and other kernels the rest.

A `.pte` file does not name its outputs. They stand in the order of `ExportedModel.names`, followed by the indices that
each top-k selected, for the comparison with PyTorch. Its method `metadata` returns the metadata as a JSON object.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.compiled import ForcedTopK
from .exported_model import ExportedModel


class _WithSelection(nn.Module):
    """Returns the outputs of an exported model, and the indices that each top-k selected."""

    def __init__(self, model: ExportedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        with ForcedTopK() as choices:
            outputs = self.model(pixel_values)
        return *outputs, *choices.made


def write_executorch(module: ExportedModel, example: Tensor, metadata: Mapping[str, str], path: Path) -> None:
    """Write a `.pte` file for batches as large as `example` (B, 3, H, W); `module` is changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ExecuTorch 1.5 calls what torch 2.14 deprecates
        from executorch.backends.xnnpack._passes.remove_noop_expand_copy_pass import RemoveNoopExpandCopyPass
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        # scaled_dot_product_attention becomes a search for rows that attend to nothing, which XNNPACK does not have.
        module.model.config._attn_implementation = "eager"
        edge = to_edge_transform_and_lower(
            _fold_constants(torch.export.export(_WithSelection(module).eval(), (example,))),
            transform_passes=[RemoveNoopExpandCopyPass()],
            partitioner=[XnnpackPartitioner()],
            constant_methods={"metadata": json.dumps(dict(metadata))},
        )
        path.write_bytes(edge.to_executorch().buffer)


def _fold_constants(program: Any) -> Any:
    """Compute what depends on weights only: XNNPACK multiplies by weights that are constants, and by no others."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    program = constant_prop_pass(program.run_decompositions({}))
    for name, tensor in program.constants.items():
        # For rows of a larger weight that do not start with its first one, ExecuTorch 1.5 writes the first ones.
        program.constants[name] = tensor.clone(memory_format=torch.contiguous_format)
    return program
