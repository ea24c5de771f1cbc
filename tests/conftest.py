"""Fixtures of all tests."""

import gc
import importlib.util
from collections.abc import Iterator

import pytest
from transformers import logging

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrForObjectDetection

# rfdetr needs transformers >= 5.1, and is installed by `make test` only.
collect_ignore = [] if importlib.util.find_spec("rfdetr") else ["parity"]


def pytest_collection_finish() -> None:
    """Exclude what the imports created from garbage collection: a full collection would visit a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[RfDetrForObjectDetection, RfDetrForInstanceSegmentation], ids=["detection", "segmentation"])
def kind(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Without the progress bars of many small jobs."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def hf_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """caplog that also sees transformers' loggers, which do not propagate by themselves."""
    logging.enable_propagation()
    monkeypatch.setattr(logging.get_logger("transformers"), "level", 0, raising=False)
    yield caplog
    logging.disable_propagation()
