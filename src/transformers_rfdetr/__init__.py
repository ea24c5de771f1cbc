"""RF-DETR instance segmentation and detection for Hugging Face transformers.

Importing the package lets transformers' Auto classes and pipelines answer RF-DETR checkpoints with these classes;
it changes nothing else.
"""

from .configuration_rf_detr import RfDetrConfig, RfDetrDinov2Config, resolve_variant
from .image_processing_rf_detr import RfDetrImageProcessor
from .modeling_rf_detr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection, RfDetrModel
from .registration import register

__version__ = "0.1.0"
__all__ = [
    "RfDetrConfig",
    "RfDetrDinov2Config",
    "RfDetrForInstanceSegmentation",
    "RfDetrForObjectDetection",
    "RfDetrImageProcessor",
    "RfDetrModel",
    "resolve_variant",
]

register()
