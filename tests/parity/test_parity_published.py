"""The published files against rfdetr's own table."""

import pytest
import rfdetr.config as rfdetr_config
from rfdetr.assets.model_weights import ModelWeights, get_model_cache_dir

from transformers_rfdetr.conversion.published_weights import BASE_URL, PUBLISHED, published_file, weights_folder

from peer import PEER_CLASSES


def test_the_table_is_rfdetrs():
    assert {(file.name, BASE_URL + file.remote, file.md5) for file in PUBLISHED.values()} == {
        (asset.filename, asset.url, asset.md5_hash) for asset in ModelWeights
    }


@pytest.mark.parametrize("config", [*PEER_CLASSES.values(), "RFDETRKeypointPreviewConfig"])
def test_a_class_name_means_the_file_that_the_class_loads(config):
    loaded = getattr(rfdetr_config, config).model_fields["pretrain_weights"].default
    assert published_file(config.removesuffix("Config")).name == loaded


@pytest.mark.parametrize("variant", PEER_CLASSES)
def test_a_variant_has_the_architecture_of_the_class_that_loads_its_file(variant):
    assert published_file(PEER_CLASSES[variant].removesuffix("Config")).variant == variant


@pytest.mark.parametrize("names", [(), ("ROBOFLOW_HOME",), ("RF_HOME", "ROBOFLOW_HOME")])
@pytest.mark.parametrize("value", ["", "~/models", "models"])
def test_the_folder_is_rfdetrs(monkeypatch, tmp_path, names, value):
    monkeypatch.chdir(tmp_path)
    for name in ("RF_HOME", "ROBOFLOW_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in names:
        monkeypatch.setenv(name, value and f"{value}/{name}")
    assert str(weights_folder()) == get_model_cache_dir()
