"""A model and its image processor by one name: a folder, a repository on the Hub, or a published checkpoint."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from ..model.variants_rf_detr import resolve_variant

logger = logging.get_logger(__name__)


def load(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **kwargs: Any
) -> tuple[RfDetrForObjectDetection, RfDetrImageProcessor]:
    """A model of the class that it was saved as, in evaluation mode, and its image processor.

    Example:
        >>> model, processor = load("rf-detr-seg-medium")  # doctest: +SKIP

    Args:
        name: A folder, a Hub id, or a published checkpoint in any usual spelling (rf-detr-seg-medium, RFDETRSegMedium).
        device: Where the model goes: "cpu", "cuda", "cuda:1", "mps", or "auto" for the first GPU if there is one; the
            CPU by default.
        dtype: float32 by default.
        **kwargs: For `from_pretrained` of the model: `revision`, `token`, `cache_dir`, `resolution`, ...

    Raises:
        ValueError: there is no such checkpoint, it cannot be read, or it lacks weights; the message says which.
    """
    if not name:
        raise ValueError("no name of a model; give a folder, a Hub id or a published name such as rf-detr-seg-medium")
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(
            f"{name} is a file; make a folder of it with `transformers-rfdetr convert {name} my-model`, and give that"
        )
    if "/" not in name and not folder.is_dir():
        with suppress(ValueError):
            name = f"Roboflow/{resolve_variant(name)}"
    elif folder.is_dir():
        name = str(folder)
    shared = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        if folder.is_dir():
            _check_folder(folder)
        config = RfDetrConfig.from_pretrained(name, **shared)
        has_masks = any("Segmentation" in architecture for architecture in config.architectures or ["Segmentation"])
        kind = RfDetrForInstanceSegmentation if has_masks else RfDetrForObjectDetection
        model, report = kind.from_pretrained(name, dtype=dtype or torch.float32, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:
            reason = "Its weights have other shapes than its config.json says, as listed above; correct config.json."
        raise ValueError(f"{name} cannot be loaded; give a folder or a Hub id. {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {kind.__name__} ({', '.join(missing[:3])}, ...);"
            " give a checkpoint that has them, such as rf-detr-seg-medium"
        )
    size = {"size": model.config.resolution} if "resolution" in kwargs else {}
    try:
        processor = RfDetrImageProcessor.from_pretrained(name, **shared, **size)
    except OSError:
        logger.warning(f"{name} has no preprocessor_config.json: pictures are prepared as its config.json asks for")
        processor = RfDetrImageProcessor.from_config(model.config)
    return model.to(read_device(device)).eval(), processor


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that is no RF-DETR model; transformers would build its default one."""
    has_config = (folder / "config.json").is_file()
    if not has_config and (folder / "adapter_config.json").is_file():
        raise ValueError(
            "It holds an adapter and no whole model: merge that into its base model first, with"
            " PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(another_folder)."
        )
    if not has_config:
        raise ValueError("It has no config.json, as save_pretrained writes it.")
    check_model_type(str(folder))


def check_model_type(name: str) -> None:
    """Raise ValueError where the config.json of a folder or a repository is of another kind of model."""
    given = RfDetrConfig.get_config_dict(name)[0].get("model_type")
    if given != RfDetrConfig.model_type:
        raise ValueError(f"Its config.json is of {given!r} and not of {RfDetrConfig.model_type!r}.")


def read_device(device: torch.device | str | None) -> torch.device:
    """ "cpu", "cuda:0", ... or "auto", the first GPU if there is one; None is the CPU.

    Raises:
        ValueError: no such device, or none that is here.
    """
    if device in (None, "auto"):
        on_gpu = device == "auto" and torch.cuda.is_available()
        on_mps = device == "auto" and not on_gpu and torch.backends.mps.is_available()
        return torch.device("cuda" if on_gpu else "mps" if on_mps else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {device} cannot be had: {str(error).splitlines()[0]}; give cpu, cuda or auto"
        ) from error
    return found
