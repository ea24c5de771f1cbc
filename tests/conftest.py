"""Fixtures of all tests.

torch and transformers are imported when a fixture needs them: pytest reads this file before it starts its workers, in
a process that runs no test.
"""

import gc
import importlib.util
from collections.abc import Iterator

import pytest

# rfdetr needs transformers >= 5.1, and is installed by `make test` only.
collect_ignore = [] if importlib.util.find_spec("rfdetr") else ["parity"]


def pytest_collection_finish() -> None:
    """Exclude what the imports created from garbage collection: a full collection would visit a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["RfDetrForObjectDetection", "RfDetrForInstanceSegmentation"], ids=["detection", "segmentation"])
def kind(request: pytest.FixtureRequest) -> type:
    import transformers_rfdetr

    return getattr(transformers_rfdetr, request.param)


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Without the progress bars of many small jobs."""
    from transformers import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def hf_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """caplog that also sees transformers' loggers, which do not propagate by themselves."""
    from transformers import logging

    logging.enable_propagation()
    monkeypatch.setattr(logging.get_logger("transformers"), "level", 0, raising=False)
    yield caplog
    logging.disable_propagation()
