"""RF-DETR instance segmentation and detection for Hugging Face transformers.

Importing the package lets transformers' Auto classes and pipelines answer RF-DETR checkpoints with these classes;
it changes nothing else. What only training and evaluation need is imported when it is named.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .model.configuration_rf_detr import RfDetrConfig, RfDetrDinov2Config, resolve_variant
from .model.image_processing_rf_detr import RfDetrImageProcessor
from .model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection, RfDetrModel
from .registration import register

if TYPE_CHECKING:
    from .data.augmentation import FlipAndCrop
    from .data.checks.check import check_dataset
    from .data.dataset import FollowEpoch, InstanceDataset, collate_fn
    from .data.sources import load_instance_dataset
    from .evaluation.coco_evaluator import InstanceSegmentationEvaluator, evaluate_instance_segmentation
    from .evaluation.report import analyse, write_report
    from .evaluation.torchmetrics_metric import InstanceSegmentationMetric
    from .hub.load import load
    from .inference.instances import Instances
    from .inference.predict import compile_for_inference, predict
    from .inference.tiling import predict_tiled
    from .inference.video import predict_video
    from .training.arguments import RfDetrTrainingArguments
    from .training.trainer import RfDetrTrainer

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
    "FlipAndCrop": "data.augmentation",
    "FollowEpoch": "data.dataset",
    "InstanceDataset": "data.dataset",
    "Instances": "inference.instances",
    "load": "hub.load",
    "compile_for_inference": "inference.predict",
    "predict": "inference.predict",
    "predict_tiled": "inference.tiling",
    "predict_video": "inference.video",
    "check_dataset": "data.checks.check",
    "analyse": "evaluation.report",
    "write_report": "evaluation.report",
    "collate_fn": "data.dataset",
    "load_instance_dataset": "data.sources",
    "InstanceSegmentationEvaluator": "evaluation.coco_evaluator",
    "evaluate_instance_segmentation": "evaluation.coco_evaluator",
    "InstanceSegmentationMetric": "evaluation.torchmetrics_metric",
    "RfDetrTrainer": "training.trainer",
    "RfDetrTrainingArguments": "training.arguments",
}

register()


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
