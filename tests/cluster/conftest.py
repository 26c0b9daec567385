"""Lets a step of a journey know how it ended."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    outcome = yield
    if outcome.get_result().when == "call":
        item.rep_failed = outcome.get_result().failed  # type: ignore[attr-defined]
