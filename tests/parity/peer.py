"""Build `rfdetr` models with random weights, small or full-size, and our models with the same weights."""

from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import rfdetr.config as rfdetr_config
import torch
from rfdetr.models.backbone import dinov2 as rfdetr_dinov2
from rfdetr.models.lwdetr import build_criterion_from_config, build_model_from_config

from transformers_rfdetr import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrForObjectDetection

PEER_CLASSES = {
    "rf-detr-nano": "RFDETRNanoConfig",
    "rf-detr-small": "RFDETRSmallConfig",
    "rf-detr-medium": "RFDETRMediumConfig",
    "rf-detr-large": "RFDETRLargeConfig",
    "rf-detr-base": "RFDETRBaseConfig",
    "rf-detr-large-deprecated": "RFDETRLargeDeprecatedConfig",
    "rf-detr-seg-preview": "RFDETRSegPreviewConfig",
    "rf-detr-seg-nano": "RFDETRSegNanoConfig",
    "rf-detr-seg-small": "RFDETRSegSmallConfig",
    "rf-detr-seg-medium": "RFDETRSegMediumConfig",
    "rf-detr-seg-large": "RFDETRSegLargeConfig",
    "rf-detr-seg-xlarge": "RFDETRSegXLargeConfig",
    "rf-detr-seg-2xlarge": "RFDETRSeg2XLargeConfig",
}

# At the size of a stand-in the other variants differ from these in their depth only.
_BRANCHES = {"rf-detr-nano", "rf-detr-base", "rf-detr-large-deprecated", "rf-detr-seg-nano", "rf-detr-seg-medium"}
every_branch = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in _BRANCHES else pytest.mark.long) for name in PEER_CLASSES]
)


@contextmanager
def narrow_dinov2(config: RfDetrConfig):
    """Let rfdetr build its backbone with the widths of `config`: its own choices are small, base and large."""
    backbone = config.backbone_config
    original = rfdetr_dinov2.get_config
    size = {name: getattr(backbone, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}

    def get_config(name: str, use_registers: bool) -> dict[str, Any]:
        settings = original(name, use_registers) | size
        settings.pop("out_indices", None)  # the file for registers names one tap, at which transformers 5 stops
        return settings

    widths = dict.fromkeys(("small", "base"), backbone.hidden_size)
    with (
        mock.patch.object(rfdetr_dinov2, "get_config", get_config),
        mock.patch.object(rfdetr_dinov2, "size_to_width", widths),
    ):
        yield


def peer_config(variant: str, config: RfDetrConfig) -> Any:
    """Return rfdetr's configuration of the same model."""
    backbone = config.backbone_config
    return getattr(rfdetr_config, PEER_CLASSES[variant])(
        device="cpu",
        encoder="dinov2_registers_windowed_small" if backbone.num_register_tokens else "dinov2_windowed_small",
        patch_size=backbone.patch_size,
        num_windows=backbone.num_windows,
        out_feature_indexes=backbone.out_indices,
        positional_encoding_size=backbone.image_size // backbone.patch_size,
        resolution=config.resolution,
        hidden_dim=config.d_model,
        sa_nheads=config.decoder_self_attention_heads,
        ca_nheads=config.decoder_cross_attention_heads,
        dec_n_points=config.decoder_n_points,
        dec_layers=config.decoder_layers,
        num_queries=config.num_queries,
        num_select=config.num_queries,
        group_detr=config.group_detr,
        num_classes=config.num_labels - 1,
        projector_scale=config.projector_scale,
    )


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, the zero-initialised ones too, at scales that keep activations moderate."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("norm.weight", "bn.weight", "lambda1")) or (".norm" in name and name.endswith("weight")):
            parameter.copy_(1.0 + 0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise)
        elif "refpoint_embed" in name:
            parameter.copy_(0.3 * noise)
        elif name.startswith("query_feat.") or "token" in name or "position_embeddings" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)


def build_peer(variant: str, config: RfDetrConfig | None = None) -> tuple[Any, Any]:
    """Return rfdetr's model with random weights in evaluation mode, and its configuration; full size by default."""
    if config is None:
        settings = getattr(rfdetr_config, PEER_CLASSES[variant])(device="cpu")
        peer = build_model_from_config(settings)
    else:
        settings = peer_config(variant, config)
        with narrow_dinov2(config):
            peer = build_model_from_config(settings)
    randomise(peer)
    return peer.eval(), settings


def twins(variant: str, config: RfDetrConfig | None = None) -> tuple[Any, Any, Any]:
    """Return rfdetr's model, its configuration, and our model with the same random weights, in evaluation mode."""
    peer, settings = build_peer(variant, config)
    config = config or RfDetrConfig.from_variant(variant)
    ours = (RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection)(config)
    state = {name: tensor for name, tensor in peer.state_dict().items() if name != "_kp_active_mask"}
    ours.load_state_dict(state)
    return peer, settings, ours.eval()


def peer_criterion(settings: Any) -> Any:
    """Return rfdetr's criterion with the weights of its training configuration."""
    train = rfdetr_config.SegmentationTrainConfig if settings.segmentation_head else rfdetr_config.TrainConfig
    return build_criterion_from_config(settings, train(dataset_dir=".", output_dir="."))[0]


_TABLE = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(7))


def table_points(num_sets: int, num_points: int, device: torch.device) -> torch.Tensor:
    """Return the first rows of a fixed table, equal for every set, as our random points in the tests."""
    return _TABLE[:num_points].to(device).expand(num_sets, -1, -1)


@contextmanager
def table_rand():
    """Let rfdetr take its random points from the same table."""

    def rand(num_sets: int, num_points: int, two: int, device: Any = None) -> torch.Tensor:
        assert two == 2
        return table_points(num_sets, num_points, device).clone()

    with mock.patch.object(torch, "rand", rand):
        yield


def random_targets(config: RfDetrConfig, counts: list[int], size: tuple[int, int], seed: int = 0) -> list[dict]:
    """Return targets with `counts` objects per image; masks are ellipses in the boxes, on a grid of `size`."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    targets = []
    for count in counts:
        extent = 0.1 + 0.4 * torch.rand(count, 2, generator=generator)
        centre = extent / 2 + (1 - extent) * torch.rand(count, 2, generator=generator)
        dx = (x / size[1] - centre[:, 0, None, None]) / (extent[:, 0, None, None] / 2)
        dy = (y / size[0] - centre[:, 1, None, None]) / (extent[:, 1, None, None] / 2)
        targets.append(
            {
                "class_labels": torch.randint(config.num_labels, (count,), generator=generator),
                "boxes": torch.cat([centre, extent], dim=1),
                "masks": dx**2 + dy**2 <= 1,
            }
        )
    return targets


@contextmanager
def record_choices(choices: list[torch.Tensor]):
    """Collect the tokens that rfdetr's first stage selects: for each group, (B, K) indices."""
    original = torch.topk

    def topk(scores: torch.Tensor, count: int, dim: int) -> Any:
        result = original(scores, count, dim=dim)
        choices.extend(result[1] if scores.ndim == 3 else [result[1]])
        return result

    with mock.patch.object(torch, "topk", topk):
        yield


@contextmanager
def replay_choices(choices: list[torch.Tensor]):
    """Let our model select the same tokens, after checking that they are its own best ones up to rounding.

    Two tokens whose scores differ by less than the rounding of the layers before would else change places, and every
    query after them would belong to another object.
    """
    original, rest = torch.topk, iter(choices)

    def topk(scores: torch.Tensor, count: int, dim: int) -> Any:
        best, chosen = original(scores, count, dim=dim), next(rest)
        torch.testing.assert_close(scores.gather(dim, chosen), best.values, atol=1e-4, rtol=0)
        return torch.return_types.topk((best.values, chosen))

    with mock.patch.object(torch, "topk", topk):
        yield
