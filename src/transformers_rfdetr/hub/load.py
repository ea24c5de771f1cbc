"""Load a model and its image processor by one name: a folder, a repository on the Hub, a published checkpoint, ..."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from ..assets import TINY_NAME, tiny_checkpoint
from ..inference.runners import RUNTIMES, RuntimeModel, load_exported
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from ..model.variants_rf_detr import class_labels, resolve_variant

logger = logging.get_logger(__name__)


def load(
    name: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    id2label: Mapping[int, str] | None = None,
    **kwargs: Any,
) -> tuple[Any, RfDetrImageProcessor]:
    """Load a model as the class that it was saved as, in evaluation mode, and its image processor.

    A file that `transformers-rfdetr export` wrote becomes a [`RuntimeModel`], which is called like the plain model.

    Example:
        >>> model, processor = load("rf-detr-seg-tiny")
        >>> model.config.resolution
        144

    Args:
        name: A folder, a Hub id, a published checkpoint in any usual spelling (rf-detr-seg-medium, RFDETRSegMedium),
            rf-detr-seg-tiny, which is in the package, or an exported file, .onnx, .xml or .pte.
        device: Device of the model: "cpu", "cuda", "cuda:1", "mps", or "auto" for the first GPU, else the CPU. The CPU
            by default. An .xml file also runs on OpenVINO's devices, such as "gpu".
        dtype: Data type of the weights; float32 by default.
        id2label: Names of the classes by label. A class that the checkpoint does not have by name starts with rows
            of its other classes.
        **kwargs: For `from_pretrained` of the model: `revision`, `token`, `cache_dir`, `resolution`, ... For an
            exported file: `threads`, the number of CPU threads, and `providers`, those of onnxruntime.

    Raises:
        ValueError: The checkpoint does not exist, cannot be read, or lacks weights.
        ImportError: The package that runs the file is not installed.
    """
    if Path(name).suffix in RUNTIMES:
        return _load_file(name, device, dtype, id2label, kwargs)
    name = resolve_name(name)
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        if Path(name).is_dir():
            _check_folder(Path(name))
        config = RfDetrConfig.from_pretrained(name, **hub)
        has_masks = any("Segmentation" in architecture for architecture in config.architectures or ["Segmentation"])
        if id2label is not None and class_labels(config.id2label) != dict(id2label):
            kwargs |= {"id2label": dict(id2label), "ignore_mismatched_sizes": True}
        model_class = RfDetrForInstanceSegmentation if has_masks else RfDetrForObjectDetection
        model, report = model_class.from_pretrained(
            name, dtype=dtype or torch.float32, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:
            reason = "the shapes of its weights differ from config.json, as listed above. Correct config.json."
        raise ValueError(f"{name} cannot be loaded: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} must contain all weights of {model_class.__name__}, but {len(missing)} are missing:"
            f" {', '.join(missing[:3])}, ... Load a complete checkpoint, such as rf-detr-seg-medium."
        )
    size = {"size": model.config.resolution} if "resolution" in kwargs else {}
    try:
        processor = RfDetrImageProcessor.from_pretrained(name, **hub, **size)
    except OSError:
        logger.warning(
            f"{name} has no preprocessor_config.json. Images are prepared with the resolution of its config.json."
        )
        processor = RfDetrImageProcessor.from_config(model.config)
    return model.to(read_device(device)).eval(), processor


def _load_file(
    name: str, device: Any, dtype: torch.dtype | None, id2label: Mapping[int, str] | None, kwargs: dict[str, Any]
) -> tuple[RuntimeModel, RfDetrImageProcessor]:
    """Load an exported file, and refuse what it cannot change."""
    fixed = set(kwargs) - {"threads", "providers"}
    if dtype not in (None, torch.float32):
        fixed.add("dtype")
    if id2label is not None:
        fixed.add("id2label")
    if fixed:
        raise ValueError(f"`{min(fixed)}` must be omitted for the exported file {name}. Export the model with it.")
    return load_exported(Path(name).expanduser(), device=device, **kwargs)


def resolve_name(name: str) -> str:
    """Return the path of a folder or of the model in the package, or the Hub id of a repository or a published name."""
    if not name:
        raise ValueError("`name` must be a folder, a Hub id or a published name such as rf-detr-seg-medium, got ''")
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(
            f"`name` must be a folder, a Hub id or a published name, got the file {name}. Convert a checkpoint file of"
            f" rfdetr with `transformers-rfdetr convert {name} my-model`."
        )
    if path.is_dir():
        return str(path)
    if name == TINY_NAME:
        return str(tiny_checkpoint())
    with suppress(ValueError):
        return name if "/" in name else f"Roboflow/{resolve_variant(name)}"
    return name


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a folder without an RF-DETR model, for which transformers would build a default model."""
    if (folder / "config.json").is_file():
        check_model_type(str(folder))
    elif (folder / "adapter_config.json").is_file():
        raise ValueError(
            "the folder must contain a whole model, got an adapter. Merge it into its base model with"
            " PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(another_folder)."
        )
    else:
        raise ValueError(
            "the folder must contain config.json, which is missing. Give a folder that save_pretrained wrote."
        )


def check_model_type(name: str) -> None:
    """Raise ValueError if the config.json of a folder or repository has another model type."""
    model_type = RfDetrConfig.get_config_dict(name)[0].get("model_type")
    if model_type != RfDetrConfig.model_type:
        raise ValueError(f"`model_type` in config.json must be {RfDetrConfig.model_type!r}, got {model_type!r}.")


def read_device(device: torch.device | str | None) -> torch.device:
    """Return a device that is available: `device`, the first GPU else the CPU for "auto", the CPU for None.

    Raises:
        ValueError: The device does not exist or is not available.
    """
    if device in (None, "auto"):
        has_cuda = device == "auto" and torch.cuda.is_available()
        has_mps = device == "auto" and not has_cuda and torch.backends.mps.is_available()
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        available = torch.device(device)
        torch.empty(0, device=available)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` must be available, such as cpu, cuda or auto, got {device}: {reason}") from error
    return available
