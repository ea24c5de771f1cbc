"""Compare the outputs of an exported file with those of PyTorch in float32."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..inference.compiled import ForcedTopK, difference
from .exported_model import ExportedModel

# The largest allowed difference of a number, absolute up to 1 and relative above, by the data type of the file. Small
# trained models reach a tenth of it, random ones of full size up to a third.
TOLERANCES = MappingProxyType(
    {
        "float32": {"boxes": 1e-4, "logits": 1e-3, "masks": 1e-2},
        "float16": {"boxes": 5e-3, "logits": 5e-2, "masks": 5e-1},
    }
)
# Pixels (B, 3, H, W) -> the outputs, and the indices that each top-k selected.
Runner = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]


def run_torch(module: ExportedModel) -> Runner:
    """Return a function that runs a PyTorch module."""

    def run(pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with ForcedTopK() as choices:
            outputs = module(pixels)
        return list(outputs), choices.made

    return run


def run_onnx(path: Path) -> Runner:
    """Return a function that runs an ONNX file in onnxruntime on the CPU."""
    import onnx
    import onnxruntime

    proto = onnx.load(path)
    num_outputs = len(proto.graph.output)
    for node in proto.graph.node:
        if node.op_type == "TopK":
            proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[1]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of each constant whose type it converts
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = [torch.from_numpy(array) for array in session.run(None, {"pixel_values": pixels.numpy()})]
        return found[:num_outputs], found[num_outputs:]

    return run


def run_openvino(path: Path) -> Runner:
    """Return a function that runs an OpenVINO file on the CPU in float32."""
    import openvino

    model = openvino.Core().read_model(path)
    num_outputs = len(model.outputs)
    model.add_outputs([node.output(1) for node in model.get_ordered_ops() if node.get_type_name() == "TopK"])
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = [torch.from_numpy(array) for array in compiled(pixels.numpy()).to_tuple()]
        return found[:num_outputs], [indices.long() for indices in found[num_outputs:]]

    return run


def run_executorch(path: Path, num_outputs: int) -> Runner:
    """Return a function that runs an ExecuTorch file, whose outputs after `num_outputs` are the selected indices."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        found = method.execute([pixels])
        return found[:num_outputs], found[num_outputs:]

    return run


def find_differences(run: Runner, expected: ExportedModel, batches: Sequence[Tensor]) -> dict[str, float]:
    """Return the largest difference of each output from PyTorch, and of the logits that the top-k selected (`ranking`).

    The first stage orders tokens by their logits. Another runtime may order nearly equal ones differently; other
    queries get them then, and many numbers differ. So PyTorch computes with the tokens that the runtime selected, and
    their logits are compared rank by rank with those that PyTorch would have selected. The same holds for the pairs of
    query and class.
    """
    differences = dict.fromkeys([*expected.names, "ranking"], 0.0)
    for pixels in batches:
        outputs, chosen = run(pixels)
        with ForcedTopK(chosen) as choices:
            wanted = expected(pixels)
        seen = dict(zip(expected.names, map(difference, outputs, wanted), strict=True))
        seen["ranking"] = max(choices.losses)
        differences = {name: max(differences[name], value) for name, value in seen.items()}
    return differences


def check_differences(differences: Mapping[str, float], limits: Mapping[str, float], runtime: str, dtype: str) -> None:
    """Raise ValueError if a difference is larger than its limit; `limits` are those of boxes, logits and masks."""
    # If a logit is off by e, the logit at a rank is off by at most 2 e, and a score by e / 4.
    limits = {**limits, "ranking": 2 * limits["logits"], "scores": limits["logits"] / 4, "labels": 0.0}
    wrong = [name for name, value in differences.items() if value > limits[name]]
    if wrong:
        listed = ", ".join(f"{name} by {differences[name]:.2g} (at most {limits[name]:.2g})" for name in wrong)
        remedy = {
            "float16": "Export in float32",
            "float32": "Try other versions of torch and of the packages of that runtime",
        }
        raise ValueError(
            f"the outputs of {runtime} in {dtype} must agree with PyTorch in float32, got differences: {listed}. No"
            f" file was kept. {remedy[dtype]}, or allow larger differences with `tolerance`."
        )
