"""Tools of a journey, and how each of its steps ended. Runs without the conftest of the whole suite, which needs our package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(os.environ.get("ANTIPHON_TOOLS", str(Path.home() / ".cache/antiphon/tools"))) / "bin"


def tool(name: str) -> Path:
    """Of this machine's path, or where the whole suite keeps its own."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(TOOLS / name)]))
    if found is None:
        pytest.fail(f"{name} is not on this machine's path")
    return Path(found)


@pytest.fixture(scope="session")
def kubectl() -> Path:
    return tool("kubectl")


@pytest.fixture(scope="session")
def helm() -> Path:
    return tool("helm")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    outcome = yield
    if outcome.get_result().when == "call":
        item.rep_failed = outcome.get_result().failed  # type: ignore[attr-defined]
