"""What importing the package adds to transformers' Auto classes and to our own models."""

import functools
import inspect
from typing import Any

from transformers.models.auto.configuration_auto import AutoConfig

# From its module: the top level of transformers 5.4 to 5.17 refuses the name where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
)

from .model.configuration_rf_detr import RfDetrConfig
from .model.image_processing_rf_detr import RfDetrImageProcessor
from .model.modeling_rf_detr import (
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrModel,
    RfDetrPreTrainedModel,
)


@functools.cache
def register() -> None:
    """Let `rf_detr` checkpoints load as our classes, also where transformers has a port of its own.

    The backbone's configuration is not registered: the port, which stays usable by name, would build ours from it.
    """
    AutoConfig.register("rf_detr", RfDetrConfig, exist_ok=True)
    AutoModel.register(RfDetrConfig, RfDetrModel, exist_ok=True)
    AutoModelForObjectDetection.register(RfDetrConfig, RfDetrForObjectDetection, exist_ok=True)
    AutoModelForInstanceSegmentation.register(RfDetrConfig, RfDetrForInstanceSegmentation, exist_ok=True)
    # pipeline("image-segmentation") asks this one, and never the one for instances.
    AutoModelForImageSegmentation.register(RfDetrConfig, RfDetrForInstanceSegmentation, exist_ok=True)
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        # Both backends: with one of them the port's processor would stay for the other.
        backends = {"torchvision": RfDetrImageProcessor, "pil": RfDetrImageProcessor}
        AutoImageProcessor.register(RfDetrConfig, image_processor_classes=backends, exist_ok=True)
    else:
        AutoImageProcessor.register(RfDetrConfig, slow_image_processor_class=RfDetrImageProcessor, exist_ok=True)
    # From above: the model's files also work without the package, and then keep transformers' own `push_to_hub`.
    for pushed in (RfDetrPreTrainedModel, RfDetrImageProcessor):
        pushed.push_to_hub = push_to_hub


def push_to_hub(self: Any, repo_id: str, *, with_code: bool = False, **settings: Any) -> Any:
    """Upload the model or image processor, a model with its card; see [`hub.push.push_to_hub`]."""
    from .hub.push import push_to_hub as push  # most programs never push, and the import takes time

    return push(self, repo_id, with_code=with_code, **settings)
