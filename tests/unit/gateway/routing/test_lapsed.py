"""A worker whose lease has run out while its session lives: it is asked on, until it does not answer or another has its name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.directory import workers
from antiphon.directory.memory import MemoryDirectory

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).parents[3] / "contract/doors/fake_engine.py")
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

BODY: dict[str, Any] = {"model": "tiny", "prompt": "what is it?", "max_tokens": 4, "seed": 1}


class Counted(MemoryDirectory):
    """Counts how often it was looked at."""

    num_looks = 0

    async def workers(self, deployment: str | None = None) -> Any:
        self.num_looks += 1
        return await super().workers(deployment)


async def looked(directory: Counted) -> None:
    """The gateway has seen the directory as it is now."""
    seen = directory.num_looks
    await fake.until(lambda: directory.num_looks >= seen + 2)


async def test_it_is_asked_until_it_does_not_answer(tmp_path: Path) -> None:
    directory = Counted()
    async with fake.world(tmp_path, directory=directory) as world, httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        info = world.workers[0].info
        assert await directory.remove(info.worker_id, info.epoch)
        await looked(directory)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert (await http.get("/ready")).status_code == 200
        await world.workers[0].die()
        await looked(directory)
        refused = await http.post("/v1/completions", json=BODY)
        assert (refused.status_code, "no worker of tiny" in refused.text) == (503, True)


async def test_it_is_not_asked_once_another_has_its_name(tmp_path: Path) -> None:
    directory = Counted()
    async with fake.world(tmp_path, directory=directory) as world, httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        info = world.workers[0].info
        assert await directory.remove(info.worker_id, info.epoch)
        await looked(directory)
        await world.add_worker("0", epoch=2)  # the first still answers
        await looked(directory)
        num_before = len(world.workers[0].engine.requests)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert len(world.workers[0].engine.requests) == num_before
        assert len(world.workers[1].engine.requests) == 1


async def test_its_time_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE_S", 0.0)
    directory = Counted()
    async with fake.world(tmp_path, directory=directory) as world, httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        info = world.workers[0].info
        assert await directory.remove(info.worker_id, info.epoch)
        await looked(directory)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 503
