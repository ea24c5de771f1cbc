"""RF-DETR instance segmentation and detection for Hugging Face transformers.

Importing the package lets transformers' Auto classes and pipelines answer RF-DETR checkpoints with these classes;
it changes nothing else. What only training and evaluation need is imported when it is named.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .configuration_rf_detr import RfDetrConfig, RfDetrDinov2Config, resolve_variant
from .image_processing_rf_detr import RfDetrImageProcessor
from .modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection, RfDetrModel
from .registration import register

if TYPE_CHECKING:
    from .augmentation import FlipAndCrop
    from .data import FollowEpoch, InstanceDataset, collate_fn
    from .data_sources import load_instance_dataset
    from .inference import Instances, compile_for_inference, predict
    from .metrics import InstanceSegmentationEvaluator, evaluate_instance_segmentation
    from .torch_metric import InstanceSegmentationMetric
    from .trainer import RfDetrTrainer, RfDetrTrainingArguments

__version__ = "0.1.0"
__all__ = [
    "FlipAndCrop",
    "FollowEpoch",
    "InstanceDataset",
    "InstanceSegmentationEvaluator",
    "InstanceSegmentationMetric",
    "Instances",
    "RfDetrConfig",
    "RfDetrDinov2Config",
    "RfDetrForInstanceSegmentation",
    "RfDetrForObjectDetection",
    "RfDetrImageProcessor",
    "RfDetrModel",
    "RfDetrTrainer",
    "RfDetrTrainingArguments",
    "collate_fn",
    "compile_for_inference",
    "evaluate_instance_segmentation",
    "load_instance_dataset",
    "predict",
    "resolve_variant",
]
_LATER = {
    "FlipAndCrop": "augmentation",
    "FollowEpoch": "data",
    "InstanceDataset": "data",
    "Instances": "inference",
    "compile_for_inference": "inference",
    "predict": "inference",
    "collate_fn": "data",
    "load_instance_dataset": "data_sources",
    "InstanceSegmentationEvaluator": "metrics",
    "evaluate_instance_segmentation": "metrics",
    "InstanceSegmentationMetric": "torch_metric",
    "RfDetrTrainer": "trainer",
    "RfDetrTrainingArguments": "trainer",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
