"""A Redis that somebody else writes to, or that takes nothing more: workers and gateways of a deployment go on, and heal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from antiphon.core.budget import TenantLimits, Use, Wish
from antiphon.core.directory import MAX_EPOCH
from antiphon.core.errors import Unavailable
from antiphon.core.identity import Identity, new_key
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.lease import BlockingDirectory, LeaseKeeper
from antiphon.directory.redis import RedisDirectory
from antiphon.directory.workers import WorkerView

_spec = importlib.util.spec_from_file_location("directories", Path(__file__).parents[2] / "contract" / "test_directory.py")
assert _spec is not None
assert _spec.loader is not None
directories: Any = sys.modules.setdefault("directories", importlib.util.module_from_spec(_spec))
if directories.__spec__ is _spec:
    _spec.loader.exec_module(directories)

PREFIX = "antiphon:{directory}:"
LONG_S = 30.0
OURS = Identity.parse(new_key())
KINDS: dict[str, tuple[Any, ...]] = {
    "string": ("SET", "x"),
    "list": ("RPUSH", "x"),
    "set": ("SADD", "x", b"\xff\xfe"),
    "hash": ("HSET", "info", "x", "epoch", "nan", b"\xff", b"\xff"),
    "scores": ("ZADD", "1", b"\xff\xfe", "inf", "y"),
}


def info(index: int = 0, epoch: int = 1) -> WorkerInfo:
    made: WorkerInfo = directories.info(index, epoch=epoch)
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = directories.RedisServer(tmp_path_factory.mktemp("forged"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
async def directory(server: Any) -> AsyncIterator[RedisDirectory]:
    client = RedisDirectory(server.url, identity=OURS)
    await client._redis.flushall()
    yield client
    await client.close()


async def ids(directory: RedisDirectory) -> list[str]:
    return [record.info.worker_id for record in await directory.workers()]


async def test_keys_of_another_type_are_none(directory: RedisDirectory) -> None:
    """Under every name that the directory uses, and under names beside them."""
    store: Any = directory._redis
    await directory.register(info(), LONG_S)
    await directory.next_epoch(info().worker_id)
    wish = Wish(tenant="team", ticket="t", num_tokens=5, limits=TenantLimits(tokens_per_min=100), lease_s=LONG_S)
    await directory.budgets.take_budget(wish)
    names = {f"{PREFIX}{name}" for name in ("worker:demo/ffn/0", "epoch:demo/ffn/0", "workers:demo", "deployments", "workers:zz")}
    assert names - {f"{PREFIX}workers:zz"} <= {key.decode() for key in await store.keys()}
    names.add(f"{PREFIX}budget:team")
    for name in sorted(names):
        for kind, (command, *values) in KINDS.items():
            await store.delete(name)
            await store.execute_command(command, name, *values)
            await store.sadd(f"{PREFIX}zz", "x")
            if name != f"{PREFIX}deployments":
                await store.sadd(f"{PREFIX}deployments", "demo", "zz", b"\xff")
            await directory.workers()
            assert await directory.register(info(), LONG_S), (name, kind)
            assert await ids(directory) == ["demo/ffn/0"], (name, kind)
            assert 0 < await directory.next_epoch(info().worker_id) < MAX_EPOCH
            ticket = dataclasses.replace(wish, ticket=f"{kind}-{random.random()}", num_tokens=0)
            assert (await directory.budgets.take_budget(ticket)).exceeded is None, (name, kind)


async def test_records_that_nobody_of_ours_wrote_are_listed_by_no_gateway_and_end_no_view(directory: RedisDirectory) -> None:
    store: Any = directory._redis
    await directory.register(info(), LONG_S)
    real = await store.hgetall(f"{PREFIX}worker:demo/ffn/0")
    stranger = Identity.parse(new_key())
    forged: list[dict[Any, Any]] = [
        {b"info": b"x"},
        {b"info": b"\xff\xfe" * 100},
        {**real, b"proof": b""},
        {**real, b"proof": b"zz"},
        {**real, b"proof": stranger.prove("record", real[b"info"]).hex()},
        {**real, b"info": real[b"info"].replace(b"127.0.0.1", b"10.0.0.66")},
        {**real, b"lease_ms": b"1e300"},
        {**real, b"lease_ms": b"nan"},
        {**real, b"lease_ms": b"inf"},
        {**real, b"lease_ms": b"-5"},
        {**real, b"lease_ms": str(10**12)},
        {key: value for key, value in real.items() if key != b"lease_ms"},
        {**real, b"info": b"[" * 100_000},
    ]
    for number, record in enumerate(forged):
        await store.hset(f"{PREFIX}worker:demo/zz/{number}", mapping=record)
        if number % 2:
            await store.pexpire(f"{PREFIX}worker:demo/zz/{number}", 10**9)
        await store.sadd(f"{PREFIX}workers:demo", f"demo/zz/{number}")
    await store.hset(f"{PREFIX}worker:demo/zz/eternal", mapping=real)  # one of ours, kept for ever by somebody else
    await store.sadd(f"{PREFIX}workers:demo", "demo/zz/eternal")
    view = WorkerView(directory)
    await view.refresh()
    assert [worker.worker_id for worker in view.workers] == ["demo/ffn/0"]


@pytest.mark.parametrize("epoch", ["2", str(2**45), str(2**62), "inf", "1e308", "nan", "x", "-1"])
async def test_a_forged_epoch_ends_no_worker_and_uses_up_none(directory: RedisDirectory, epoch: str) -> None:
    store: Any = directory._redis
    assert await directory.register(info(), LONG_S)
    await store.hset(f"{PREFIX}worker:demo/ffn/0", "epoch", epoch)  # beside the record that has its proof
    assert await directory.register(info(), LONG_S)
    await store.delete(f"{PREFIX}worker:demo/ffn/0")
    await store.hset(
        f"{PREFIX}worker:demo/ffn/0", mapping={"info": info(epoch=2**40).to_json(), "epoch": epoch, "proof": "00" * 32}
    )
    assert await directory.register(info(), LONG_S)
    if float(epoch if epoch != "x" else "nan") > MAX_EPOCH:
        await store.set(f"{PREFIX}epoch:demo/ffn/0", epoch)
        assert 0 < await directory.next_epoch(info().worker_id) < time.time() + 1000
    assert await directory.register(info(epoch=5), LONG_S)
    assert not await directory.register(info(epoch=3), LONG_S)  # a real one still counts


async def test_accounts_that_somebody_spoiled_are_counted_on(directory: RedisDirectory) -> None:
    store: Any = directory._redis
    limits = TenantLimits(tokens_per_min=100)
    wish = Wish(tenant="team", ticket="a", num_tokens=60, limits=limits, lease_s=LONG_S)
    assert (await directory.budgets.take_budget(wish)).exceeded is None
    spoiled = {
        "o:z": "x",
        "o:y": "-1:5",
        "o:": "",
        "r:x": "1",
        "t:": "1",
        "t:9999999999": "x",
        "q": "1",
        b"\xff": b"\xff",
        "o": "1",
    }
    await store.hset(f"{PREFIX}budget:team", mapping=spoiled)
    assert (await directory.budgets.take_budget(dataclasses.replace(wish, ticket="b"))).exceeded == "tokens"
    await directory.budgets.settle_budget("team", "a", 10)
    assert (await directory.budgets.take_budget(dataclasses.replace(wish, ticket="c", num_tokens=90))).exceeded is None
    use = Use(tenant="team", model="m", num_requests=1, num_prompt_tokens=2, num_cached_tokens=0, num_output_tokens=3)
    await directory.budgets.add_use("2027-01-01", "b", [use])
    odd = {"x": 1, "[1]": 2, '["a","b","c"]': 3, '["team","m","num_requests","x"]': 4, b"\xff": 5, '[[],{},"num_requests"]': 6}
    await store.hset(f"{PREFIX}use:2027-01-01", mapping=odd)
    assert use in await directory.budgets.used("2027-01-01")


async def test_notes_that_are_no_text_are_none(directory: RedisDirectory) -> None:
    store: Any = directory._redis
    await directory.put_note("t", "k", "text", LONG_S)
    for key in ("odd", b"\xff"):
        await store.set(f"{PREFIX}note:t:".encode() + (key if isinstance(key, bytes) else key.encode()), b"\xff\xfe")
        await store.zadd(f"{PREFIX}notes:t", {key: 10**15})
    assert await directory.note("t", "odd") is None
    assert dict(await directory.notes("t")) == {"k": "text"}


@pytest.mark.parametrize("fault", ["memory", "disk", "rights"])
async def test_a_redis_that_refuses_to_write_ends_no_worker(
    server: Any, directory: RedisDirectory, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Full memory, a disk that takes no snapshot, rights that were taken away: renewals wait, and go on."""
    caplog.set_level(logging.INFO)
    store: Any = directory._redis
    keeping = BlockingDirectory(RedisDirectory(server.url, identity=OURS))
    keeper = LeaseKeeper(keeping, lambda: info(epoch=7), 0.6)
    try:
        if fault == "memory":
            await store.config_set("maxmemory", "1")
        elif fault == "disk":
            await store.config_set("dir", "/proc")
            await store.config_set("save", "3600 1")
            await store.set("x", "y")
            with contextlib.suppress(redis.ResponseError):
                await store.bgsave()

            async def failed() -> bool:
                return bool((await store.info("persistence"))["rdb_last_bgsave_status"] == "err")

            await directories.eventually(failed)
        else:
            await store.execute_command("ACL", "SETUSER", "default", "-evalsha", "-eval")
        end_s = time.monotonic() + 20.0
        while "can't be renewed" not in caplog.text:
            assert time.monotonic() < end_s
            keeper.check()
            await asyncio.sleep(0.05)
        with pytest.raises(Unavailable):
            await directory.register(info(1), LONG_S)
        assert not keeper.superseded
        keeper.check()
    finally:
        await store.config_set("maxmemory", "0")
        await store.config_set("save", "")
        await store.execute_command("ACL", "SETUSER", "default", "+@all")
    try:

        async def listed() -> bool:
            return await ids(directory) == ["demo/ffn/0"]

        await directories.eventually(listed)
        keeper.check()
    finally:
        keeper.close()
        keeping.close()


async def test_a_record_that_was_copied_is_listed_once(directory: RedisDirectory) -> None:
    """What one of ours wrote, an epoch ago, under other names: its proof is right."""
    store: Any = directory._redis
    await directory.register(info(epoch=1), LONG_S)
    old = await store.hgetall(f"{PREFIX}worker:demo/ffn/0")
    await directory.register(info(epoch=2), LONG_S)
    for name in ("demo/ffn/1", "demo/attention/0", "zz"):
        await store.hset(f"{PREFIX}worker:{name}", mapping=old)
        await store.pexpire(f"{PREFIX}worker:{name}", 20_000)
        await store.sadd(f"{PREFIX}workers:demo", name)
    assert [(record.info.worker_id, record.info.epoch) for record in await directory.workers()] == [("demo/ffn/0", 2)]
