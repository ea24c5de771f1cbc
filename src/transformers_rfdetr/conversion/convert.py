"""Convert rfdetr's checkpoints to folders that `from_pretrained` loads, and back.

The tensors keep their names and bits, because our module tree is the original one. A conversion reads the architecture
(`architecture.py`) and the classes (`class_names.py`), and checks that every tensor of the model is there.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pooch
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from ..atomic_files import atomic_directory, write_text
from ..hub.load import resolve_name
from ..hub.model_card import model_card
from ..hub.push import create_repository, upload
from ..model.checkpoint_files import FLOATS, read_tensors, weight_files
from ..model.checkpoint_layouts import Change, fit_tables, to_original_layout
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.image_processing_rf_detr import RfDetrImageProcessor
from ..model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection
from ..model.validation import error_context
from ..model.variants_rf_detr import VARIANTS, resolve_variant
from .architecture import (
    check_arguments,
    has_segmentation_head,
    nearest_variant,
    read_config,
    rfdetr_arguments,
    rfdetr_class,
)
from .class_names import read_class_names, write_class_names
from .published_weights import PUBLISHED, download_weights, published_file
from .rfdetr_checkpoint import read_rfdetr_file, shape_of, write_rfdetr_file


class Conversion(NamedTuple):
    """The output of a conversion, and a list of everything in the source that was changed or dropped."""

    output: Path
    config: RfDetrConfig
    changes: list[Change]


class RfdetrModel(NamedTuple):
    """The content of a checkpoint file of rfdetr, as this package names it."""

    state_dict: dict[str, Tensor]
    config: RfDetrConfig
    changes: list[Change]
    is_published: bool  # by its md5


def read_rfdetr_model(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    class_names: Sequence[str] | None = None,
    ema: bool = False,
    trust_checkpoint: bool = False,
) -> RfdetrModel:
    """Read a checkpoint file of rfdetr; for arguments and errors see [`convert_to_transformers`]."""
    path = Path(path)
    state_dict, arguments, changes = read_rfdetr_file(path, ema=ema, trust_checkpoint=trust_checkpoint)
    with error_context(str(path)):
        check_arguments(arguments)
        if arguments.get("use_grouppose_keypoints") or any("keypoint" in name for name in state_dict):
            _refuse_keypoints()
        named_as = PUBLISHED.get(path.name)
        original = {file.md5: file for file in PUBLISHED.values()}.get(pooch.file_hash(path, "md5"))
        if original is not None:  # rfdetr ignores the stored arguments, and builds the class of its variant
            named_as, arguments = original, {}
        claimed = resolve_variant(variant) if variant else named_as.variant if named_as else None
        config = read_config(state_dict, arguments, claimed, is_published=named_as is not None, changes=changes)
        config.id2label = read_class_names(config.num_labels, arguments, class_names, changes)
        config.label2id = {name: label for label, name in config.id2label.items()}
        state_dict = _model_tensors(state_dict, config, changes)
        config.architectures = [_model_class(state_dict).__name__]
        config.dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in state_dict.values()})
    return RfdetrModel(state_dict, config, changes, original is not None)


def convert_to_transformers(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    variant: str | None = None,
    class_names: Sequence[str] | None = None,
    ema: bool = False,
    trust_checkpoint: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Conversion:
    """Convert a checkpoint of rfdetr to a folder that `from_pretrained` of this package and of transformers' port load.

    Example:
        >>> from transformers_rfdetr.conversion.convert import convert_to_transformers
        >>> convert_to_transformers("rf-detr-seg-nano", "seg-nano")  # doctest: +SKIP

    Args:
        source: A published name in any spelling, which is downloaded unless it is in rfdetr's cache; or a file, such as
            a published one, `checkpoint_best_*.pth`, Lightning's `.ckpt` or Roboflow's `weights.pt`.
        output: The new folder. It is created when all of its files are complete.
        variant: The published variant of the model, for a file whose shapes and arguments do not determine it.
        class_names: Names of the classes in the order of their labels, instead of the stored ones.
        ema: Convert the EMA weights of the file instead of its weights.
        trust_checkpoint: Read a pickle that contains more than tensors and plain containers, which can run any code;
            see [`read_rfdetr_file`].
        push_to_hub: Hub repository to upload the folder to; created if it does not exist.
        private: Whether a new repository is private.

    Raises:
        ValueError: The file cannot be read, is not a detection or segmentation model, lacks tensors, or has
            contradictory values of its architecture or classes.
        OSError: The download or the upload failed, or the folder cannot be written.
    """
    output, path = Path(output), Path(source)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        _refuse_existing(output)
    published = PUBLISHED.get(path.name) if path.is_file() else published_file(os.fspath(source))
    with error_context(os.fspath(source)):
        if published is not None and published.variant not in VARIANTS:
            _refuse_keypoints()
    if published is not None and not path.is_file():
        path = download_weights(published)
    model = read_rfdetr_model(
        path, variant=variant, class_names=class_names, ema=ema, trust_checkpoint=trust_checkpoint
    )
    if push_to_hub is not None:
        push_to_hub = create_repository(push_to_hub, private=private, token=None, kept="Nothing was written.")
    with atomic_directory(output) as folder:
        _write_folder(folder, model, push_to_hub or output.name, path.name)
    if push_to_hub is not None:
        message = f"Converted from {path.name}"
        files = [file for file in output.iterdir() if file.is_file()]
        upload(output, files, push_to_hub, kept=f"The converted model is in {output}.", commit_message=message)
    return Conversion(output, model.config, model.changes)


def _write_folder(folder: Path, model: RfdetrModel, name: str, source: str) -> None:
    config = model.config
    config.save_pretrained(folder)
    RfDetrImageProcessor.from_config(config).save_pretrained(folder)
    save_file(_unshared(model.state_dict), folder / "model.safetensors", {"format": "pt"})
    card = model_card(
        name,
        config,
        has_masks=has_segmentation_head(model.state_dict),
        converted_from=source,
        changes=model.changes,
        license="apache-2.0" if model.is_published else None,
    )
    write_text(folder / "README.md", card)


def convert_to_rfdetr(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Conversion:
    """Convert a folder or Hub repository, of this package or of transformers' port, to a file that rfdetr 1.11.2 loads.

    Args:
        source: Folder or Hub id of a detection or segmentation model, in any of the four key layouts.
        output: The new file, such as `model.pth`. `RFDETR.from_checkpoint` loads it, and the variant's class takes it
            as `pretrain_weights`.

    Raises:
        ValueError: rfdetr cannot build the model (rectangular input, another encoder width, ...), or it lacks tensors.
    """
    output, source = Path(output), resolve_name(os.fspath(source))
    if output.exists():
        _refuse_existing(output)
    with error_context(source):
        if not cached_file(source, "config.json"):  # from_pretrained would return the default configuration
            raise ValueError(
                "config.json must exist, because it has the architecture. Give a folder that save_pretrained wrote."
            )
        config = RfDetrConfig.from_pretrained(source)
        files = weight_files(source, None, None, {})
        if not files:
            raise ValueError("model.safetensors or pytorch_model.bin must exist, got neither. Give a complete folder.")
        changes: list[Change] = []
        state_dict = _model_tensors(to_original_layout(read_tensors(files)), config, changes)
        class_names = write_class_names(state_dict, config, changes)
        num_classes = len(state_dict["class_embed.bias"]) - 1
        has_masks = has_segmentation_head(state_dict)
        arguments = rfdetr_arguments(config, num_classes, has_masks=has_masks)
        model_name = rfdetr_class(nearest_variant(config, has_masks)[0])
    state_dict["_kp_active_mask"] = torch.zeros(0, 0, dtype=torch.bool)  # for keypoints; rfdetr's own files contain it
    write_rfdetr_file(output, state_dict, model_name, arguments, class_names)
    return Conversion(output, config, changes)


def _refuse_keypoints() -> None:
    raise ValueError(
        "the model must detect objects or segment instances, got an RF-DETR keypoint model. Use Roboflow's rfdetr"
        " (RFDETRKeypointPreview)."
    )


def _refuse_existing(output: Path) -> None:
    raise ValueError(f"`output` must be new, got {output}, which exists. Give another name, or remove it.")


def _model_class(state_dict: Mapping[str, Tensor]) -> type[RfDetrForObjectDetection]:
    return RfDetrForInstanceSegmentation if has_segmentation_head(state_dict) else RfDetrForObjectDetection


def _model_tensors(state_dict: dict[str, Tensor], config: RfDetrConfig, changes: list[Change]) -> dict[str, Tensor]:
    """Return the tensors of the model in its order, with tables fitted to the configuration; report all others.

    Raises:
        ValueError: A tensor is missing, has a wrong shape, or contains other values than finite floating-point numbers.
    """
    with torch.device("meta"):
        model = _model_class(state_dict)(config).state_dict()
    for name in [name for name in model if name in state_dict]:
        _check_numbers(name, state_dict[name])
    state_dict, fitted = fit_tables(state_dict, config, config)
    changes += fitted
    if missing := [name for name in model if name not in state_dict]:
        names = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        raise ValueError(f"all {len(model)} tensors of the model must exist, but {len(missing)} are missing: {names}")
    for name, expected in model.items():
        if state_dict[name].shape != expected.shape:
            found = shape_of(state_dict[name])
            raise ValueError(f"{name} must have the shape {shape_of(expected)} of the configuration, got {found}")
    for name in state_dict:
        if name not in model:
            reason = "dropped: empty, for keypoints" if name == "_kp_active_mask" else "dropped: not in the model"
            changes.append(Change(name, shape_of(state_dict[name]), reason))
    return {name: state_dict[name] for name in model}


def _check_numbers(name: str, tensor: Tensor) -> None:
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in FLOATS.values()
    if not is_dense or (tensor.numel() and not tensor.isfinite().all()):  # isfinite overflows on some empty shapes
        raise ValueError(
            f"{name} must contain finite floating-point numbers of 16 to 64 bits, got {tensor.dtype}, {tensor.layout}"
        )


def _unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors requires them: contiguous, each with its own memory."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in state_dict.items():
        pointer = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone(memory_format=torch.contiguous_format) if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return unshared
