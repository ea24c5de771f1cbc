"""Provide small models, their inputs and targets, and the datasets beside the repository, for all tests."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation
from transformers_rfdetr.model.variants_rf_detr import VARIANTS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def small_config(**overrides: Any) -> RfDetrConfig:
    """Return a configuration of a few thousand parameters: 2 decoder layers, 48 px, patches of 12 in 2 x 2 windows."""
    backbone = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 12,
        "num_windows": 2,
        "out_indices": [1, 2, 3, 4],
    } | overrides.pop("backbone_config", {})
    decoder = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "num_queries": 6,
        "group_detr": 3,
        "num_labels": 4,
    }
    return RfDetrConfig(backbone_config=backbone, **(decoder | overrides))


# A stand-in keeps a variant's branches (windows, taps, levels, points, layers) and shrinks its widths.
STAND_IN_BACKBONE = {"hidden_size": 32, "num_attention_heads": 2}
STAND_IN_DECODER = {
    "d_model": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 4,
    "num_queries": 7,
    "group_detr": 3,
    "num_labels": 5,
}


def stand_in_config(variant: str, grid: int | None = None, **overrides: Any) -> RfDetrConfig:
    """Return a small configuration with the branches of `variant` and a position table of `grid` x `grid` patches."""
    row = VARIANTS[variant]
    grid = grid or 2 * row.num_windows
    backbone = {"image_size": grid * row.patch_size, **STAND_IN_BACKBONE, **overrides.pop("backbone_config", {})}
    block = row.patch_size * row.num_windows
    resolution = overrides.pop("resolution", grid * row.patch_size // block * block)
    return RfDetrConfig.from_variant(
        variant, resolution=resolution, backbone_config=backbone, **(STAND_IN_DECODER | overrides)
    )


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter from its initial value, so that zeros do not hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


_MODELS: dict[str, torch.nn.Module] = {}


def small_model(kind: type = RfDetrForInstanceSegmentation, **overrides: Any) -> Any:
    """Return a model of `small_config` in evaluation mode: a copy, because building takes three times as long."""
    key = repr((kind, overrides))
    if key not in _MODELS:
        torch.manual_seed(0)
        _MODELS[key] = randomised(kind(small_config(**overrides))).eval()
    torch.manual_seed(0)
    return copy.deepcopy(_MODELS[key])


def targets(*counts: int, num_labels: int = 4, size: tuple[int, int] = (48, 48), seed: int = 0) -> list[dict]:
    """Return labels with `counts` rectangular objects in each image."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.arange(side) / side for side in size)
    labels = []
    for count in counts:
        extent = 0.2 + 0.3 * torch.rand(count, 2, generator=generator)
        centre = extent / 2 + (1 - extent) * torch.rand(count, 2, generator=generator)
        low, high = centre - extent / 2, centre + extent / 2
        inside_x = (columns >= low[:, :1]) & (columns < high[:, :1])
        inside_y = (rows >= low[:, 1:]) & (rows < high[:, 1:])
        labels.append(
            {
                "class_labels": torch.randint(num_labels, (count,), generator=generator),
                "boxes": torch.cat([centre, extent], dim=1),
                "masks": inside_y[:, :, None] & inside_x[:, None, :],
            }
        )
    return labels


def pixels(batch: int = 2, height: int = 48, width: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def shared_folder(name: str) -> Path:
    """Return the folder of a dataset beside the repository; skip the test if there is none."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {SHARED / name}, which does not come with the repository")
    return SHARED / name


def _fields(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that describe the model."""
    stored = config.to_dict() if hasattr(config, "to_dict") else config
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype", "auto_map", "use_cache"}
    return {
        key: _fields(value) if isinstance(value, dict) else value for key, value in stored.items() if key not in ignored
    }


def assert_same_model(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Check that class, weights and configuration are equal."""
    assert type(model) is type(expected)
    weights, expected_weights = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name
    one, other = _fields(model.config), _fields(expected.config)
    assert one == other, [(key, one.get(key), other.get(key)) for key in one | other if one.get(key) != other.get(key)]
