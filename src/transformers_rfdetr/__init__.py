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
    from .check_data import check_dataset
    from .data import FollowEpoch, InstanceDataset, collate_fn
    from .data_sources import load_instance_dataset
    from .inference import compile_for_inference, predict
    from .instances import Instances
    from .loading import load
    from .metrics import InstanceSegmentationEvaluator, evaluate_instance_segmentation
    from .report import analyse, write_report
    from .tiling import predict_tiled
    from .torch_metric import InstanceSegmentationMetric
    from .trainer import RfDetrTrainer
    from .training_arguments import RfDetrTrainingArguments
    from .video import predict_video

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
    "analyse",
    "check_dataset",
    "collate_fn",
    "compile_for_inference",
    "evaluate_instance_segmentation",
    "load",
    "load_instance_dataset",
    "predict",
    "predict_tiled",
    "predict_video",
    "resolve_variant",
    "write_report",
]
_LATER = {
    "FlipAndCrop": "augmentation",
    "FollowEpoch": "data",
    "InstanceDataset": "data",
    "Instances": "instances",
    "load": "loading",
    "compile_for_inference": "inference",
    "predict": "inference",
    "predict_tiled": "tiling",
    "predict_video": "video",
    "check_dataset": "check_data",
    "analyse": "report",
    "write_report": "report",
    "collate_fn": "data",
    "load_instance_dataset": "data_sources",
    "InstanceSegmentationEvaluator": "metrics",
    "evaluate_instance_segmentation": "metrics",
    "InstanceSegmentationMetric": "torch_metric",
    "RfDetrTrainer": "trainer",
    "RfDetrTrainingArguments": "training_arguments",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
