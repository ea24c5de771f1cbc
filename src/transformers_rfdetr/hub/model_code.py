"""Copy code beside a checkpoint: that of the model, or the handler of an Inference Endpoint."""

import json
import shutil
from pathlib import Path

from ..atomic_files import write_text

_MODEL_FOLDER = Path(__file__).parents[1] / "model"
CODE_FILES = tuple(sorted(path.name for path in _MODEL_FOLDER.glob("*.py") if path.name != "__init__.py"))
_ENDPOINT_FOLDER = Path(__file__).with_name("endpoint")
_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_rf_detr.RfDetrImageProcessor"}
_DETECTION_MAP = {
    "AutoConfig": "configuration_rf_detr.RfDetrConfig",
    "AutoModel": "modeling_rf_detr.RfDetrModel",
    "AutoModelForObjectDetection": "modeling_rf_detr.RfDetrForObjectDetection",
}
_SEGMENTATION_MAP = {
    "AutoModelForInstanceSegmentation": "modeling_rf_detr.RfDetrForInstanceSegmentation",
    "AutoModelForImageSegmentation": "modeling_rf_detr.RfDetrForInstanceSegmentation",
    "AutoModelForUniversalSegmentation": "modeling_rf_detr.RfDetrForInstanceSegmentation",
}


def add_code(folder: Path) -> list[Path]:
    """Copy the code beside a saved model or image processor, so that both load where this package is not installed.

    `trust_remote_code=True` runs this code instead of the port of transformers >= 5.9.

    Returns:
        The files copied.
    """
    for name, auto_map in (
        ("config.json", _DETECTION_MAP | _PROCESSOR_MAP),
        ("preprocessor_config.json", _PROCESSOR_MAP),
    ):
        path = folder / name
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if any("Segmentation" in architecture for architecture in stored.get("architectures") or []):
                auto_map = auto_map | _SEGMENTATION_MAP
            text = json.dumps(stored | {"auto_map": auto_map}, indent=2, sort_keys=True)
            write_text(path, f"{text}\n")
    return [Path(shutil.copyfile(_MODEL_FOLDER / name, folder / name)) for name in CODE_FILES]


def add_endpoint(folder: Path) -> list[Path]:
    """Copy the files with which Inference Endpoints of the Hub serve a model: handler.py and requirements.txt.

    Returns:
        The files copied.
    """
    names = ("handler.py", "requirements.txt")
    return [Path(shutil.copyfile(_ENDPOINT_FOLDER / name, folder / name)) for name in names]
