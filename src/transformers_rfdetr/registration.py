"""Register the models with the Auto classes of transformers."""

import functools
import inspect
from typing import Any

from transformers.models.auto.configuration_auto import AutoConfig

# From its module: without torchvision the top level of transformers 5.4 to 5.17 refuses the name.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
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
    """Let the Auto classes load `rf_detr` checkpoints as the classes of this package, not as transformers' own port.

    The backbone's configuration is not registered: the port, which can still be used by name, would then use it too.
    """
    AutoConfig.register("rf_detr", RfDetrConfig, exist_ok=True)
    AutoModel.register(RfDetrConfig, RfDetrModel, exist_ok=True)
    AutoModelForObjectDetection.register(RfDetrConfig, RfDetrForObjectDetection, exist_ok=True)
    AutoModelForInstanceSegmentation.register(RfDetrConfig, RfDetrForInstanceSegmentation, exist_ok=True)
    # For pipeline("image-segmentation") and for transformers' example scripts, which do not use
    # AutoModelForInstanceSegmentation.
    AutoModelForImageSegmentation.register(RfDetrConfig, RfDetrForInstanceSegmentation, exist_ok=True)
    AutoModelForUniversalSegmentation.register(RfDetrConfig, RfDetrForInstanceSegmentation, exist_ok=True)
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        # For both backends: otherwise the port's processor would be used with the other.
        backends = {"torchvision": RfDetrImageProcessor, "pil": RfDetrImageProcessor}
        AutoImageProcessor.register(RfDetrConfig, image_processor_classes=backends, exist_ok=True)
    else:
        AutoImageProcessor.register(RfDetrConfig, slow_image_processor_class=RfDetrImageProcessor, exist_ok=True)
    # Set here, because the files of model/ also work without the package, with transformers' own `push_to_hub`.
    for pushable in (RfDetrPreTrainedModel, RfDetrImageProcessor):
        pushable.push_to_hub = push_to_hub


def push_to_hub(self: Any, repo_id: str, *, with_code: bool = False, **settings: Any) -> Any:
    """Upload the model or image processor, a model with its card; see [`hub.push.push_to_hub`]."""
    from .hub.push import push_to_hub as push  # imported late, because it takes time and few programs push

    return push(self, repo_id, with_code=with_code, **settings)
