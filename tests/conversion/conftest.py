"""Fixtures of the conversion tests."""

import copy

import pytest
import torch

from transformers_rfdetr.conversion import architecture, published_weights

from rfdetr_files import model_of


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    """Give rfdetr's small encoder the width of the stand-ins, and no network."""
    monkeypatch.setitem(architecture.ENCODERS, "dinov2_windowed_small", (32, 2, 0))
    monkeypatch.setattr(published_weights, "BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("RF_HOME", str(tmp_path / "weights"))


@pytest.fixture(scope="session")
def built_model():
    return model_of()


@pytest.fixture
def model(built_model):
    return copy.deepcopy(built_model)


@pytest.fixture
def save(tmp_path):
    def save(content, name="checkpoint.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save
