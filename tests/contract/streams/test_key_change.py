"""The deployment's key is changed under load: no stream is lost, nothing is restarted, and the old key opens nothing any more."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from antiphon.core import identity as identities
from antiphon.core.identity import Identity, adopt, adopt_file, new_key, own_identity
from antiphon.rpc.channels import open_part_channel
from antiphon.rpc.directory.service import DirectoryServer

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).parents[1] / "doors" / "fake_engine.py")
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

GATEWAY = """
import asyncio, sys, threading, time
from pathlib import Path
from antiphon.core import identity
identity.LOOK_S = 0.05
from antiphon.directory.memory import open_directory
from antiphon.gateway.app import run_gateway
from antiphon.gateway.config import GatewayConfig

def tell():
    seen = None
    while True:
        now = identity.own_identity()
        if now is not seen:
            seen = now
            print("keys", *(now.key_id(i).hex() for i in range(len(now.keys))), flush=True)
        time.sleep(0.05)

threading.Thread(target=tell, daemon=True).start()
config = GatewayConfig(models={"tiny": Path(sys.argv[1])}, http_port=0, grpc_port=0, refresh_s=0.05)
told = lambda ports: print("port", ports.http_port, flush=True)
asyncio.run(run_gateway(config, open_directory(sys.argv[2]), asyncio.Event(), on_bound=told))
"""


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(identities, "LOOK_S", 0.05)
    before = os.environ.get("ANTIPHON_KEY")
    path = tmp_path / "key"
    path.write_text(new_key())
    adopt_file(path)
    yield path
    if before is None:
        before = new_key()
    adopt(before)


def replace(path: Path, text: str) -> None:
    """As editors and the kubelet do it: the new file is there at once, whole."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


async def test_streams_go_on_while_the_key_is_changed(tmp_path: Path, key_file: Path) -> None:
    old, new = key_file.read_text(), new_key()
    async with fake.world(tmp_path / "world", max_num_seqs=64, step_s=0.02) as world, httpx.AsyncClient(timeout=60) as http:
        directory = await DirectoryServer.start(world.directory)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", GATEWAY, str(world.checkpoint), directory.address, stdout=asyncio.subprocess.PIPE
        )
        said: dict[str, list[str]] = {}

        async def listen() -> None:
            assert process.stdout is not None
            async for line in process.stdout:
                word, *rest = line.decode().split()
                said[word] = rest

        listening = asyncio.create_task(listen())
        try:
            await fake.until(lambda: "port" in said, 60)
            url = f"http://127.0.0.1:{said['port'][0]}"
            body: dict[str, Any] = {"model": "tiny", "prompt": "The choir", "max_tokens": 200, "seed": 3, "stream": False}
            expected = world.text_of(world.tokens_of("The choir", 200, seed=3))
            streams = [asyncio.create_task(http.post(f"{url}/v1/completions", json=body)) for _ in range(4)]
            for step, lines in enumerate((f"{old}\n{new}", f"{new}\n{old}", new)):
                names = [Identity.parse(lines).key_id(i).hex() for i in range(len(lines.split()))]
                replace(key_file, lines)
                await fake.until(lambda lines=lines: own_identity().keys == Identity.parse(lines).keys)  # type: ignore[misc]
                await fake.until(lambda names=names: said["keys"] == names)  # type: ignore[misc]
                # A new worker is a new connection in both directions: to the directory's server, and from the gateway.
                await world.add_worker(f"later-{step}")
                streams += [asyncio.create_task(http.post(f"{url}/v1/completions", json=body)) for _ in range(4)]

                async def is_connected(count: int = step + 2) -> bool:
                    workers = (await http.get(f"{url}/status")).json()["workers"]
                    return len(workers) == count and all(worker["connected"] for worker in workers)

                async with asyncio.timeout(20):
                    while not await is_connected():
                        await asyncio.sleep(0.05)
            for answer in await asyncio.gather(*streams):
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == expected
            for lines, may in ((old, False), (new, True)):
                async with open_part_channel(world.workers[0].info.endpoint.rpc, identity=Identity.parse(lines)) as channel:
                    call = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)
                    if may:
                        assert await call
                    else:
                        with pytest.raises(grpc.aio.AioRpcError):
                            await call
        finally:
            process.kill()
            await process.wait()
            await listening
            await directory.close()


def test_a_key_file_that_is_damaged_changes_nothing(key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = own_identity()
    for text in ("", "short", "\xff" * 40):
        replace(key_file, text) if text != "\xff" * 40 else key_file.write_bytes(b"\xff" * 40)
        assert "stay as they are" in _until_logged(caplog)
        assert own_identity() is before
        caplog.clear()
    key_file.unlink()
    for _ in range(3):
        identities.time.sleep(identities.LOOK_S)
        assert own_identity() is before


def test_a_key_file_that_is_being_written_is_taken_once_it_is_whole(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a key is another key, which nobody has."""
    before, whole = own_identity(), f"{new_key()}\n{new_key()}"
    now_s = key_file.stat().st_mtime
    monkeypatch.setattr(identities, "LOOK_S", 1.0)
    for number, end in enumerate((32, 50, 64, 100, len(whole))):
        key_file.write_text(whole[:end])
        os.utime(key_file, (now_s, now_s + 0.3 * number))  # its writer is slow
        monkeypatch.setattr("antiphon.core.identity.time.time", lambda at=now_s + 0.3 * number + 0.1: at)
        monkeypatch.setattr("antiphon.core.identity.time.monotonic", lambda at=now_s + 1e6 + 2.0 * number: at)
        assert own_identity() is before
    monkeypatch.setattr("antiphon.core.identity.time.time", lambda: now_s + 10)
    monkeypatch.setattr("antiphon.core.identity.time.monotonic", lambda: now_s + 1e6 + 100)
    assert own_identity().keys == Identity.parse(whole).keys


def _until_logged(caplog: pytest.LogCaptureFixture) -> str:
    for _ in range(200):
        own_identity()
        if caplog.text:
            return caplog.text
        identities.time.sleep(0.01)
    return ""
