"""RF-DETR instance segmentation and detection for Hugging Face transformers.

Importing the package lets transformers' Auto classes and pipelines answer RF-DETR checkpoints with these classes;
it changes nothing else. A public name is imported when it is used.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assets import sample_image, tiny_checkpoint
    from .data.augmentation import FlipAndCrop
    from .data.checks.check import check_dataset
    from .data.dataset import InstanceDataset
    from .data.load import load_instance_dataset
    from .data.prepared import FollowEpoch, collate_fn
    from .data.splits import folds, split_dataset
    from .data.writers.write import write_dataset
    from .evaluation.calibration import calibrate
    from .evaluation.coco_evaluator import InstanceSegmentationEvaluator
    from .evaluation.error_analysis import analyse
    from .evaluation.evaluation_loop import evaluate_instance_segmentation
    from .evaluation.report import write_report
    from .evaluation.torchmetrics_metric import InstanceSegmentationMetric
    from .hub.load import load
    from .inference.compiled import compile_for_inference
    from .inference.instances import Instances
    from .inference.large_scale.predict_dataset import predict_dataset
    from .inference.predict import predict
    from .inference.suggestions import suggest
    from .inference.tiling import predict_tiled
    from .inference.video.predict_video import predict_video
    from .model.configuration_rf_detr import RfDetrConfig, RfDetrDinov2Config
    from .model.image_processing_rf_detr import RfDetrImageProcessor
    from .model.modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection, RfDetrModel
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
    "calibrate",
    "check_dataset",
    "collate_fn",
    "compile_for_inference",
    "evaluate_instance_segmentation",
    "folds",
    "load",
    "load_instance_dataset",
    "predict",
    "predict_dataset",
    "predict_tiled",
    "predict_video",
    "sample_image",
    "split_dataset",
    "suggest",
    "tiny_checkpoint",
    "write_dataset",
    "write_report",
]
# Public name -> the module that has it.
_LATER = {
    "FlipAndCrop": "data.augmentation",
    "FollowEpoch": "data.prepared",
    "InstanceDataset": "data.dataset",
    "InstanceSegmentationEvaluator": "evaluation.coco_evaluator",
    "InstanceSegmentationMetric": "evaluation.torchmetrics_metric",
    "Instances": "inference.instances",
    "RfDetrConfig": "model.configuration_rf_detr",
    "RfDetrDinov2Config": "model.configuration_rf_detr",
    "RfDetrForInstanceSegmentation": "model.modeling_rf_detr",
    "RfDetrForObjectDetection": "model.modeling_rf_detr",
    "RfDetrImageProcessor": "model.image_processing_rf_detr",
    "RfDetrModel": "model.modeling_rf_detr",
    "RfDetrTrainer": "training.trainer",
    "RfDetrTrainingArguments": "training.arguments",
    "analyse": "evaluation.error_analysis",
    "calibrate": "evaluation.calibration",
    "check_dataset": "data.checks.check",
    "collate_fn": "data.prepared",
    "compile_for_inference": "inference.compiled",
    "evaluate_instance_segmentation": "evaluation.evaluation_loop",
    "folds": "data.splits",
    "load": "hub.load",
    "load_instance_dataset": "data.load",
    "predict": "inference.predict",
    "predict_dataset": "inference.large_scale.predict_dataset",
    "predict_tiled": "inference.tiling",
    "predict_video": "inference.video.predict_video",
    "sample_image": "assets",
    "split_dataset": "data.splits",
    "suggest": "inference.suggestions",
    "tiny_checkpoint": "assets",
    "write_dataset": "data.writers.write",
    "write_report": "evaluation.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    from .registration import register

    register()


# Registration imports torch and transformers, which takes seconds. The command line answers --help without them, and
# registers when a command starts; `python -m transformers_rfdetr.cli.app` is how torchrun starts it.
if Path(*sys.argv[:1]).stem != "transformers-rfdetr" and "transformers_rfdetr.cli.app" not in sys.orig_argv:
    _register()
