"""LoRA (https://arxiv.org/abs/2106.09685): adapters of the attention of DINOv2; the rest of DINOv2 is frozen.

The adapters of peft are injected into the model, which stays a model of this package. Its folders contain the merged
weights, and in a subfolder the adapter for `peft.PeftModel.from_pretrained`: the LoRA weights, and all modules after
DINOv2, which are trained as without LoRA.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from .distributed import copy_full_tensor

ADAPTER_FOLDER = "adapter"
DEFAULT_RANK = 16
_ENCODER = "backbone.0.encoder."
# All modules after DINOv2, by the ends of their names. "class_embed" and "bbox_embed" are also the ends of the names of
# the first stage's heads.
_TRAINED_MODULES = (
    *("projector", "decoder", "enc_output", "enc_output_norm", "refpoint_embed", "query_feat"),
    *("class_embed", "bbox_embed", "segmentation_head"),
)


def lora_config(model: nn.Module, rank: int) -> Any:
    """Return peft's configuration of adapters for query, key, value and output of each block that is used.

    The adapters are not scaled: `lora_alpha` equals the rank.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('`lora` requires peft: pip install "transformers-rfdetr[lora]".') from error
    blocks = "|".join(str(block) for block in range(model.config.backbone_config.num_used_layers))
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=rf".*encoder\.layer\.({blocks})\.attention\.(attention\.(query|key|value)|output\.dense)",
        modules_to_save=[name for name in _TRAINED_MODULES if any(n.endswith(name) for n, _ in model.named_modules())],
        base_model_name_or_path=model.config.name_or_path or None,
        inference_mode=True,
    )


def add_lora(model: nn.Module, rank: int) -> None:
    """Inject adapters into DINOv2 and freeze the rest of it; other parameters are trained if they were before.

    Raises:
        ValueError: the model has adapters already.
    """
    if hasattr(model, "peft_config") or any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("`lora` requires a model without adapters. Pass the model that `from_pretrained` returns.")
    config = lora_config(model, rank)
    from peft import inject_adapter_in_model

    trained = [p for name, p in model.named_parameters() if p.requires_grad and _ENCODER not in name]
    config.modules_to_save, config.inference_mode = None, False
    inject_adapter_in_model(config, model)
    del model.peft_config  # the model is not one of peft: it is saved with merged weights
    for parameter in trained:
        parameter.requires_grad_(True)


def save_adapter(model: nn.Module, rank: int, folder: Path) -> None:
    """Write the adapter of a model, for `PeftModel.from_pretrained` on the model that the training began with."""
    folder.mkdir(parents=True, exist_ok=True)
    lora_config(model, rank).save_pretrained(str(folder))
    tensors = {_peft_name(name): p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load what [`save_adapter`] wrote into the trained parameters of a model."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            copy_full_tensor(parameter, tensors[_peft_name(name)])


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(".default.", ".")
