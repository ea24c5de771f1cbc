"""Run exported files with the interface of the plain model: .onnx in onnxruntime, .xml in OpenVINO, .pte in ExecuTorch.

Axis letters: B images, N queries or pairs of query and class, C classes, h w mask grid.
"""

import copy
import gc
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import BACKGROUND_LOGIT
from ..model.predictions_rf_detr import StagePrediction
from ..model.validation import error_context, require
from .fixed_size import FixedSizeModel

RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pte": "executorch"}  # the package that runs a file
_REMEDY = "Export the model with `transformers-rfdetr export`."


class DenseMasks(NamedTuple):
    """The masks that a file computes for all its N queries, with the methods of `MaskFactors` for inference."""

    dense: Tensor  # (B, N, h, w)

    def logits(self) -> Tensor:
        """Return the mask logits (B, N, h, w)."""
        return self.dense

    def logits_of(self, image: int, queries: Tensor) -> Tensor:
        """Return the mask logits (K, h, w) of K queries of one image."""
        return self.dense[image, queries]


class ModelFile(NamedTuple):
    """An opened file."""

    run: Callable[[Tensor], list[Tensor]]  # pixels (B, 3, height, width) -> the outputs in their order
    metadata: Mapping[str, str]
    inputs: dict[str, list[Any]]  # name -> shape, in which an int is a fixed side
    outputs: list[str]
    runtime: str


class RuntimeModel(FixedSizeModel):
    """An exported model that a runtime of [`RUNTIMES`] runs, loaded by [`load`] and called like the plain one.

    Attributes:
        metadata: The metadata of the file; see [`export`].
    """

    dtype = torch.float32  # of its inputs and outputs

    def __init__(self, path: Path, file: ModelFile, config: RfDetrConfig) -> None:
        batch_size, _, *size = file.inputs["pixel_values"]
        is_fixed = isinstance(batch_size, int)
        super().__init__(config, torch.device("cpu"), (size[0], size[1]), batch_size if is_fixed else None)
        self.active = [file.runtime, f"{self.batch_size or 'any'} x {size[0]} x {size[1]}"]
        self.metadata = file.metadata
        self._path, self._run, self._outputs = path, file.run, file.outputs

    def with_run(self, run: Callable[[Tensor], list[Tensor]]) -> "RuntimeModel":
        """Return a copy that computes its outputs by `run`, from pixels (B, 3, height, width)."""
        other = copy.copy(self)
        other._run = run
        return other

    def fingerprint(self) -> str:
        """Return a hash of the file."""
        digest = hashlib.md5(usedforsecurity=False)
        for path in (self._path, self._path.with_suffix(".bin")) if self._path.suffix == ".xml" else (self._path,):
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()

    def _stage(self, tensors: list[Tensor]) -> StagePrediction:
        outputs = dict(zip(self._outputs, tensors, strict=True))
        masks: Any = DenseMasks(outputs["masks"]) if "masks" in outputs else None
        if "logits" in outputs:
            return StagePrediction(outputs["logits"], outputs["boxes"], masks)
        # The pairs that the file selected, each as a query with one class.
        labels = outputs["labels"][..., None]
        logits = outputs["scores"].new_full((*labels.shape[:2], self.config.num_labels), BACKGROUND_LOGIT)
        logits = logits.scatter(-1, labels, torch.logit(outputs["scores"], eps=1e-12)[..., None])
        low, high = outputs["boxes"].split(2, dim=-1)
        return StagePrediction(logits, torch.cat([(low + high) / 2, high - low], dim=-1), masks)


def load_exported(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    providers: Sequence[Any] | None = None,
    threads: int | None = None,
) -> tuple[RuntimeModel, RfDetrImageProcessor]:
    """Load a file that [`export`] wrote; see [`load`].

    Raises:
        ValueError: the file cannot be read, was not written by this package, or the device is not available.
        ImportError: the runtime is not installed.
    """
    path = Path(path)
    with error_context(str(path)):
        require(threads is None or threads >= 1, "threads", threads, "at least 1")
        if not path.is_file():
            raise ValueError("the file must exist. Correct its name.")
        runtime = RUNTIMES[path.suffix]
        if find_spec(runtime) is None:
            raise ImportError(f"{path.suffix} files require {runtime}, which is not installed: pip install {runtime}")
        if runtime == "onnxruntime":
            file = _open_onnx(path, str(device or "cpu"), providers, threads)
        else:
            require(providers is None, "providers", providers, f"None for {runtime}", "Use `device`.")
            open_file = _open_openvino if runtime == "openvino" else _open_executorch
            file = open_file(path, str(device or "cpu"), threads)
        config, processor = _read_metadata(file)
    return RuntimeModel(path, file, config), processor


def _read_metadata(file: ModelFile) -> tuple[RfDetrConfig, RfDetrImageProcessor]:
    """Return the configuration and the image processor that the file describes."""
    shape = file.inputs.get("pixel_values", [])
    if list(file.inputs) != ["pixel_values"] or len(shape) != 4 or not all(isinstance(n, int) for n in shape[2:]):
        raise ValueError(
            f"the file must have one input, pixel_values (B, 3, height, width), got {file.inputs or 'none'}. {_REMEDY}"
        )
    try:
        names = json.loads(file.metadata["outputs"])
        config = RfDetrConfig.from_dict(json.loads(file.metadata["config"]))
        processor = RfDetrImageProcessor.from_dict(json.loads(file.metadata["processor"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "the file must have the metadata that `transformers-rfdetr export` writes, got"
            f" {sorted(file.metadata) or 'none'}: {type(error).__name__}: {error}. {_REMEDY}"
        ) from error
    if file.outputs != names:
        raise ValueError(f"the file must have the outputs {names} of its metadata, got {file.outputs}. {_REMEDY}")
    return config, processor


def _open_onnx(path: Path, device: str, providers: Sequence[Any] | None, threads: int | None) -> ModelFile:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if providers is None:
        providers = _providers_of(device, available)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of each constant whose type it converts
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # of many types, all derived from Exception only
        raise ValueError(f"onnxruntime cannot read the file: {error}. {_REMEDY}") from error
    outputs = [output.name for output in session.get_outputs()]

    def run(pixel_values: Tensor) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(outputs, {"pixel_values": pixel_values.numpy()})]

    return ModelFile(
        run,
        session.get_modelmeta().custom_metadata_map,
        {one.name: one.shape for one in session.get_inputs()},
        outputs,
        f"onnxruntime {session.get_providers()[0]}",
    )


def _providers_of(device: str, available: Sequence[str]) -> list[Any]:
    """Return onnxruntime's providers for a device in torch's spelling."""
    kind, _, index = device.partition(":")
    has_cuda = "CUDAExecutionProvider" in available
    if kind == "cpu" or (kind == "auto" and not has_cuda):
        return ["CPUExecutionProvider"]
    if kind not in ("auto", "cuda") or not has_cuda:
        raise ValueError(
            f"`device` must be cpu, auto, or cuda with pip install onnxruntime-gpu, got {device} with"
            f" {', '.join(available)}. Name other providers in Python: load(path, providers=[...])."
        )
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def _open_openvino(path: Path, device: str, threads: int | None) -> ModelFile:
    import openvino

    core = openvino.Core()
    name = {"auto": "AUTO", "cpu": "CPU"}.get(device, device.upper())
    if name == "AUTO" and core.available_devices == ["CPU"]:
        name = "CPU"
    if name != "AUTO" and name not in core.available_devices:
        raise ValueError(
            f"`device` must be auto or one that OpenVINO has here, {', '.join(core.available_devices)}, got {device}."
        )
    try:
        model = core.read_model(path)
        # On some CPUs OpenVINO computes in bfloat16 unless it is told not to.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} if name == "CPU" else {}
        compiled = core.compile_model(model, name, options | ({"INFERENCE_NUM_THREADS": threads} if threads else {}))
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot read the file: {error}. {_REMEDY}") from error
    metadata: dict[str, str] = {}
    if model.has_rt_info("model_info"):
        metadata = dict(model.get_rt_info("model_info").value)

    shapes = {
        one.any_name: [side.get_length() if side.is_static else str(side) for side in one.partial_shape]
        for one in model.inputs
    }
    outputs = [one.any_name for one in model.outputs]
    return ModelFile(lambda pixels: run_openvino(compiled, pixels), metadata, shapes, outputs, f"openvino {name}")


def run_openvino(compiled: Any, pixel_values: Tensor) -> list[Tensor]:
    """Return the outputs of an `openvino.CompiledModel` for pixels (B, 3, height, width)."""
    return [torch.from_numpy(array) for array in compiled(pixel_values.numpy()).to_tuple()]


def _open_executorch(path: Path, device: str, threads: int | None) -> ModelFile:
    from executorch.runtime import Runtime

    require(device in ("cpu", "auto"), "device", device, "cpu or auto for ExecuTorch")
    _set_executorch_threads(threads)
    try:
        program = Runtime.get().load_program(path)
        method = program.load_method("forward")
        shapes = [
            list(method.metadata.input_tensor_meta(index).sizes()) for index in range(method.metadata.num_inputs())
        ]
    except (RuntimeError, IndexError, KeyError) as error:  # IndexError of an input that is not a tensor
        raise ValueError(f"ExecuTorch cannot read the file: {error}. {_REMEDY}") from error
    _EXECUTORCH_METHODS.add(method)
    metadata, names = _executorch_metadata(program)
    # A file does not name its inputs and outputs, and outputs follow that are for its comparison with PyTorch only.
    inputs = {"pixel_values": shapes[0]} if len(shapes) == 1 else {f"input {i}": one for i, one in enumerate(shapes)}
    outputs = names[: method.metadata.num_outputs()]
    return ModelFile(
        lambda pixels: method.execute([pixels.contiguous()])[: len(outputs)], metadata, inputs, outputs, "executorch"
    )


def _executorch_metadata(program: Any) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of an `executorch.runtime.Program` and the names of its outputs, empty if it has none."""
    try:
        [text] = program.load_method("metadata").execute([])
        metadata = json.loads(text)
        return metadata, list(json.loads(metadata["outputs"]))
    except (RuntimeError, KeyError, ValueError, TypeError):
        return {}, []


# The open ones keep a pointer to the pool of threads, which is one for the process.
_EXECUTORCH_METHODS: weakref.WeakSet = weakref.WeakSet()


def _set_executorch_threads(threads: int | None) -> None:
    import executorch.extension.pybindings.portable_lib as executorch

    now = executorch._threadpool_get_thread_count()
    if threads in (None, now):
        return
    gc.collect()  # of those that an exception keeps
    if _EXECUTORCH_METHODS:
        raise ValueError(
            f"`threads` must be {now}, as for the .pte files that are open, got {threads}. Delete their models first."
        )
    executorch._unsafe_reset_threadpool(threads)
