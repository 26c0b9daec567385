"""A deployment over a Redis behind TLS, with a user and a password: who has neither gets nowhere, and neither shows."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from antiphon.apps.process.config import LogSettings
from antiphon.apps.serve.local import DirectDeployment
from antiphon.apps.serve.plan import ServeSettings
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import AntiphonError
from antiphon.directory.redis import RedisDirectory
from antiphon.testing import write_tiny_llama

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

USER, PASSWORD = "antiphon", "canary-of-a-password"
START_S = 240.0
BODY: dict[str, Any] = {"model": "behind", "prompt": [5, 6, 7], "max_tokens": 150, "temperature": 0, "ignore_eos": True}


def module(name: str, *path: str) -> Any:
    """A test's module by its file: tests' folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2].joinpath(*path))
    assert spec is not None
    assert spec.loader is not None
    found = sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    if found.__spec__ is spec:
        spec.loader.exec_module(found)
    return found


directories = module("directories", "contract", "test_directory.py")
tls = module("tls_at_doors", "contract", "doors", "test_tls.py")
behind_tls = module("redis_behind_tls", "attack", "stores", "test_redis_tls.py")


class Guarded(directories.RedisServer):  # type: ignore[misc]
    """A real Redis that knows one user; TLS stands before it, in a thread of its own."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        (base / "users.acl").write_text(f"user default off\nuser {USER} on >{PASSWORD} ~* &* +@all\n")
        self._command = [directories.redis_server_path(), "--port", "0", "--unixsocket", str(self.socket_path), "--save", ""]
        self._command += ["--aclfile", str(base / "users.acl")]
        self.authority, self.clients = tls.Authority("one"), tls.Authority("clients")
        self.door = behind_tls.TlsRedis(self, base)
        self.door.trusted.write_bytes(self.authority.pem)
        self.clients.issue(self.door.client)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        end_s = time.monotonic() + 20.0
        while not self.socket_path.exists():
            assert time.monotonic() < end_s, "redis-server did not start"
            time.sleep(0.01)
        self.renew()

    def renew(self) -> None:
        """Another certificate; connections that are open end."""
        asyncio.run_coroutine_threadsafe(self.door.restart(self.authority, self.clients), self._loop).result(20.0)

    def url_of(self, who: str) -> str:
        return str(self.door.url).replace("rediss://", f"rediss://{who}", 1)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.door.stop(), self._loop).result(20.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()
        super().stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(tmp_path_factory.mktemp("guarded"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def served(server: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The gateway's address, and the run directory."""
    base = tmp_path_factory.mktemp("served")
    checkpoint = write_tiny_llama(base / "model")
    (base / "run").mkdir(mode=0o700)
    document = LLMDeployment.model_validate(
        {
            "apiVersion": "serving.antiphon.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": "behind"},
            "spec": {
                "model": {"uri": str(checkpoint)},
                "topology": "afd",
                "pools": [{"name": "attention", "role": "attention"}, {"name": "ffn", "role": "ffn"}],
                "cache": {"numBlocks": 64},
                "endpoint": {"httpPort": 0, "grpcPort": 0},
                "directory": {"redisUrl": server.url_of(f"{USER}:{PASSWORD}@"), "leaseS": 5.0},
            },
        }
    )
    settings = ServeSettings(log=LogSettings(level="DEBUG"))
    deployment = DirectDeployment(document, checkpoint=str(checkpoint), run_dir=base / "run", settings=settings)
    try:
        deployment.start()
        end_s = time.monotonic() + START_S
        while not deployment.poll():
            assert time.monotonic() < end_s, "the deployment did not get ready"
            time.sleep(0.05)
        bound = deployment._gateway.wait_open(1.0)  # type: ignore[union-attr]
        yield f"http://127.0.0.1:{bound.http_port}", base / "run"
    finally:
        deployment.close()


def streamed(url: str, then: Any = None) -> str:
    """A stream's text; ``then`` is called behind its first event."""
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}, trust_env=False, timeout=60.0) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += "".join(choice["text"] for choice in event["choices"])
                if then is not None:
                    then()
                    then = None
    return text


def test_its_certificate_changes_under_a_stream(server: Guarded, served: tuple[str, Path]) -> None:
    url, _ = served
    whole = streamed(url)
    assert len(whole) > 20
    assert streamed(url, then=server.renew) == whole
    workers = httpx.get(f"{url}/status", trust_env=False, timeout=30.0).json()["workers"]
    assert {worker["worker_id"]: worker["ready"] for worker in workers} == {"behind/attention/0": True, "behind/ffn/0": True}
    assert streamed(url) == whole


@pytest.mark.parametrize("who", ["", f"{USER}:wrong@", f":{PASSWORD}@", f"default:{PASSWORD}@", f"nobody:{PASSWORD}@"])
async def test_who_does_not_know_user_and_password_is_told_nothing(server: Guarded, served: tuple[str, Path], who: str) -> None:
    stranger = RedisDirectory(server.url_of(who))
    try:
        with pytest.raises(AntiphonError) as error:
            await stranger.workers()
        assert PASSWORD not in str(error.value)
    finally:
        await stranger.close()


def test_the_password_is_in_no_log_and_no_process_list(served: tuple[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    url, run_dir = served
    assert streamed(url)
    for path in ("/status", "/metrics", "/v1/models", "/usage"):
        assert PASSWORD not in httpx.get(f"{url}{path}", trust_env=False, timeout=30.0).text
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.suffix in (".log", ".jsonl")]
    assert files
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert not [path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    shown = []
    for process in psutil.Process().children(recursive=True):
        try:
            shown.append(f"{process.name()} {process.cmdline()}")
        except psutil.Error:
            continue  # it has ended since
    assert shown
    assert not [line for line in shown if PASSWORD in line]
