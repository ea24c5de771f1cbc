"""Build checkpoint files of rfdetr for the conversion tests: small models in all forms that exist."""

import argparse

import torch
from safetensors.torch import load_file

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection

from small_models import randomised, stand_in_config

NAMES = ["barn", "house", "shed", "silo"]  # of the stand-ins, whose heads have five rows


POSITIONS = "backbone.0.encoder.encoder.embeddings.position_embeddings"


def model_of(variant="rf-detr-seg-nano", **overrides):
    torch.manual_seed(0)
    kind = RfDetrForInstanceSegmentation if "-seg-" in variant else RfDetrForObjectDetection
    return randomised(kind(stand_in_config(variant, **overrides))).eval()


def arguments_of(model, **changed):
    """Return the arguments that rfdetr stores for the model."""
    config = model.config
    backbone = config.backbone_config
    return {
        "encoder": "dinov2_windowed_small",
        "patch_size": backbone.patch_size,
        "num_windows": backbone.num_windows,
        "out_feature_indexes": list(backbone.out_indices),
        "positional_encoding_size": backbone.position_grid[0],
        "resolution": config.resolution,
        "projector_scale": list(config.projector_scale),
        "hidden_dim": config.d_model,
        "dec_layers": config.decoder_layers,
        "sa_nheads": config.decoder_self_attention_heads,
        "ca_nheads": config.decoder_cross_attention_heads,
        "dec_n_points": config.decoder_n_points,
        "num_queries": config.num_queries,
        "num_select": config.num_queries,
        "group_detr": config.group_detr,
        "num_classes": config.num_labels - 1,
        "segmentation_head": isinstance(model, RfDetrForInstanceSegmentation),
        "two_stage": True,
        "class_names": NAMES,
    } | changed


def legacy(model, **changed):
    return {"model": model.state_dict(), "args": argparse.Namespace(**arguments_of(model, **changed))}


def best_file(model):
    arguments = arguments_of(model)
    state = model.state_dict()
    return {
        "model": state,
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "args": {"class_names": arguments.pop("class_names"), "lr": 1e-4, "encoder": None},
        "model_name": "RFDETRSegNano",
        "model_config": arguments,
    }


def lightning_file(model, prefix="model."):
    content = best_file(model)
    del content["model"]
    content["state_dict"] = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    return content | {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(stored, expected):
    assert set(stored) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())


def nested(levels, kind=list):
    """Return a list of two references to a list of two references, and so on, with 2^levels texts in total."""
    value = kind(["x"])
    for _ in range(levels):
        value = kind([value, value])
    return value
