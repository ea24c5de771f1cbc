"""Fixtures of all tests.

torch and transformers are imported when a fixture needs them: pytest reads this file before it starts its workers, in
a process that runs no test.
"""

import gc
import importlib.util
import sys
from collections.abc import Iterator

import pytest

# rfdetr needs transformers >= 5.1, and is installed by `make test` only.
collect_ignore = [] if importlib.util.find_spec("rfdetr") else ["parity"]


def pytest_collection_finish() -> None:
    """Exclude what the imports created from garbage collection: a full collection would visit a million objects."""
    gc.collect()
    gc.freeze()
    _start_autograd()


def _start_autograd() -> None:
    """Run one backward pass before a test forks a process that trains.

    Tests that export or compile register a CUDA device that is not there. The first backward pass after that would
    start threads for it, and PyTorch refuses a backward pass in a fork of a process with such threads:
    https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork
    """
    if torch := sys.modules.get("torch"):
        torch.ones(1, requires_grad=True).sum().backward()


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
