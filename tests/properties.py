"""Tests of properties: hypothesis draws the cases, the same in every run."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def holds(count: int, **drawn: st.SearchStrategy) -> Callable:
    """Turn a property into a test with `count` cases, and with ten times as many in the long run."""

    def make_test(function: Callable) -> Callable:
        @pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
        def test(times: int) -> None:
            # Whether cases are slow or large does not matter here.
            no_checks = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
            settings(max_examples=times * count, derandomize=True, **no_checks)(given(**drawn)(function))()

        test.__name__ = function.__name__
        return test

    return make_test


def outcome(function: Callable, *arguments: Any, **named: Any) -> tuple[Any, str | None]:
    """Return the result of a call, or the message of its ValueError; any other exception fails the test."""
    try:
        return function(*arguments, **named), None
    except ValueError as error:
        return None, str(error) or pytest.fail("the error has no message")
