"""Limits of tenants: how a wish is judged, and that two gateways over one store keep to them to the token."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.core.budget import TenantLimits, Use, Verdict, Wish
from antiphon.core.errors import InvalidInput
from antiphon.directory.budgets import MemoryBudgets
from antiphon.gateway.access.admission import Admission, RateLimited
from antiphon.gateway.access.key_lines import key_line, parse_lines
from antiphon.telemetry import disabled

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).parents[3] / "contract/doors/fake_engine.py")
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

TEXT_PATHS: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses/input_tokens": {"input": "x"},
}
ALICE, BOB, OPS = "alices-key-of-random-text", "bobs-key-of-random-text", "ops-key-of-random-text"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def wish(ticket: str, num_tokens: int = 0, lease_s: float = 30.0, **limits: int) -> Wish:
    return Wish(tenant="a", ticket=ticket, num_tokens=num_tokens, limits=TenantLimits(**limits), lease_s=lease_s)


async def test_a_minute_holds_no_more_than_its_limit_whenever_one_looks() -> None:
    clock = Clock()
    budgets = MemoryBudgets(clock)
    assert (await budgets.take_budget(wish("1", 60, tokens_per_min=100))).exceeded is None
    refused = await budgets.take_budget(wish("2", 41, tokens_per_min=100))
    assert (refused.exceeded, refused.retry_after_s) == ("tokens", 1.0)  # a reservation holds it: it may come back any time
    await budgets.settle_budget("a", "1", 20)
    await budgets.settle_budget("a", "1", 20)  # once
    clock.now_s += 10.5
    assert (await budgets.take_budget(wish("2", 80, tokens_per_min=100))).exceeded is None
    await budgets.settle_budget("a", "2", 80)
    refused = await budgets.take_budget(wish("3", 1, tokens_per_min=100))
    assert (refused.exceeded, refused.retry_after_s) == ("tokens", 50.5)
    clock.now_s += refused.retry_after_s
    assert (await budgets.take_budget(wish("3", 20, tokens_per_min=100))).exceeded is None
    assert (await budgets.take_budget(wish("4", 1, tokens_per_min=100))).exceeded == "tokens"


async def test_requests_are_counted_by_the_minute_and_streams_at_once() -> None:
    clock = Clock()
    budgets = MemoryBudgets(clock)
    limits = {"requests_per_min": 3, "num_streams": 2}
    assert (await budgets.take_budget(wish("1", **limits))).exceeded is None
    assert (await budgets.take_budget(wish("1", **limits))).exceeded is None  # the same call once more
    assert (await budgets.take_budget(wish("2", **limits))).exceeded is None
    assert (await budgets.take_budget(wish("3", **limits))).exceeded == "streams"
    await budgets.settle_budget("a", "1", 0)
    assert (await budgets.take_budget(wish("3", **limits))).exceeded is None
    await budgets.settle_budget("a", "2", 0)
    assert (await budgets.take_budget(wish("4", **limits))).exceeded == "requests"
    clock.now_s += 61
    assert (await budgets.take_budget(wish("4", **limits))).exceeded is None


async def test_a_reservation_that_nobody_renews_counts_as_used() -> None:
    clock = Clock()
    budgets = MemoryBudgets(clock)
    limits = {"tokens_per_min": 100, "num_streams": 1}
    await budgets.take_budget(wish("dead", 100, **limits))
    for _ in range(3):
        clock.now_s += 20
        await budgets.renew_budgets("a", ["dead", "unknown"], 30.0)
    assert (await budgets.take_budget(wish("2", 1, **limits))).exceeded == "streams"
    clock.now_s += 30
    assert (await budgets.take_budget(wish("2", 1, **limits))).exceeded == "tokens"
    await budgets.settle_budget("a", "dead", 5)  # too late: it is charged
    clock.now_s += 61
    assert (await budgets.take_budget(wish("2", 100, **limits))).exceeded is None


async def test_a_batch_is_in_the_ledger_once() -> None:
    budgets = MemoryBudgets()
    use = Use(tenant="a", model="m", num_requests=1, num_prompt_tokens=5, num_cached_tokens=2, num_output_tokens=3)
    for batch in ("one", "one", "two"):
        await budgets.add_use("2027-01-31", batch, [use])
    (found,) = await budgets.used("2027-01-31")
    assert (found.num_requests, found.num_prompt_tokens, found.num_cached_tokens, found.num_output_tokens) == (2, 10, 4, 6)
    assert not await budgets.used("2027-02-01")


def test_limits_are_a_tenants_and_its_lines_must_agree() -> None:
    limits = TenantLimits(requests_per_min=60, tokens_per_min=1000, num_streams=2)
    line = key_line("a", "user", ALICE, limits=limits)
    assert parse_lines(f"{line}\n{key_line('a', 'user', BOB)}")[0].limits == limits
    other = key_line("a", "user", BOB, limits=TenantLimits(num_streams=3))
    with pytest.raises(InvalidInput, match="different limits"):
        parse_lines(f"{line}\n{other}")
    for wrong in ("tokens=0", "tokens=-1", "tokens=1e3", "streams=x", "requests=" + "9" * 14):
        with pytest.raises(InvalidInput, match="no number"):
            parse_lines(f"a user sha256:{'0' * 64} {wrong}")


class SlowStore(MemoryBudgets):
    """A store across a network: what it was told is done, though the answer takes until ``answers`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()
        self.num_asked = 0

    async def take_budget(self, wish: Wish) -> Verdict:
        verdict = await super().take_budget(wish)
        await self._answer()
        return verdict

    async def settle_budget(self, tenant: str, ticket: str, num_tokens: int) -> None:
        await self._answer()  # and a call that is given up before it was sent has settled nothing
        await super().settle_budget(tenant, ticket, num_tokens)

    async def _answer(self) -> None:
        self.num_asked += 1
        await self.answers.wait()


@pytest.mark.parametrize("at", ["enter", "finish"])
async def test_a_client_that_leaves_while_the_store_is_asked_leaves_nothing_reserved(at: str) -> None:
    store, limits = SlowStore(), TenantLimits(tokens_per_min=100, num_streams=1)
    admission = Admission(store, lambda _tenant: limits, disabled())
    use = Use(tenant="a", model="m", num_requests=1, num_prompt_tokens=20, num_cached_tokens=0, num_output_tokens=5)

    async def request() -> None:
        turn = await admission.enter("a", 90, None)
        store.answers.clear()
        await turn.finish(use)

    if at == "finish":
        store.answers.set()
    asking = asyncio.create_task(request())
    await fake.until(lambda: store.num_asked == (1 if at == "enter" else 2))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    store.answers.set()
    running = asyncio.create_task(admission.run())
    try:
        used = 25 if at == "finish" else 0
        async with asyncio.timeout(10):
            while (await store.take_budget(wish("next", 100 - used, tokens_per_min=100, num_streams=1))).exceeded is not None:
                await asyncio.sleep(0)
        assert (await store.take_budget(wish("more", 1, tokens_per_min=100))).exceeded == "tokens"
    finally:
        running.cancel()


async def test_a_tenant_without_a_request_left_is_refused_before_its_body_is_looked_at(tmp_path: Path) -> None:
    """At every door that generates or counts tokens; the store is not asked for what it has refused already."""
    line = key_line("alice", "user", ALICE, limits=TenantLimits(requests_per_min=1))
    (tmp_path / "keys").write_text(f"{line}\n{key_line('bob', 'user', BOB)}")
    async with (
        fake.world(tmp_path, gateway={"api_keys_file": tmp_path / "keys"}, budgets=MemoryBudgets(Clock())) as one,
        httpx.AsyncClient(base_url=one.url, timeout=20) as http,
    ):

        async def ask(path: str, content: bytes, key: str = ALICE) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            return await http.post(path, content=content, headers=headers)

        good = b'{"model": "tiny", "prompt": "x", "max_tokens": 1}'
        assert (await ask("/v1/completions", b"no JSON")).status_code == 400  # not counted: nothing was asked for
        assert [(await ask("/v1/completions", good)).status_code for _ in range(2)] == [200, 429]
        for path in (
            *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank"),
            *TEXT_PATHS,
        ):
            answer = await ask(path, b"no JSON")
            assert answer.status_code == 429, (path, answer.text)
            assert 1 <= int(answer.headers["retry-after"]) <= 61
            assert (await ask(path, b"no JSON", BOB)).status_code == 400


@pytest.mark.parametrize("path", list(TEXT_PATHS))
async def test_what_a_tokenizer_is_asked_counts_among_a_keys_requests(tmp_path: Path, path: str) -> None:
    line = key_line("alice", "user", ALICE, limits=TenantLimits(requests_per_min=3, num_streams=1))
    (tmp_path / "keys").write_text(f"{line}\n{key_line('bob', 'user', BOB)}\n{key_line('ops', 'admin', OPS)}")
    body = {"model": "tiny", **TEXT_PATHS[path]}
    options = {"api_keys_file": tmp_path / "keys"}
    async with (
        fake.world(tmp_path, gateway=options, budgets=MemoryBudgets(Clock())) as one,
        httpx.AsyncClient(base_url=one.url, timeout=20) as http,
    ):

        async def ask(key: str = ALICE) -> httpx.Response:
            return await http.post(path, json=body, headers={"authorization": f"Bearer {key}"})

        assert [(await ask()).status_code for _ in range(4)] == [200, 200, 200, 429]  # its one place at once is free after each
        assert "requests a minute" in (await ask()).text
        assert {(await ask(BOB)).status_code for _ in range(4)} == {200}
        usage = (await http.get("/usage", headers={"authorization": f"Bearer {OPS}"})).json()["data"]
        assert not usage  # no model was asked


async def test_it_is_let_in_again_when_the_store_said_so_or_its_limits_are_others() -> None:
    clock, limits = Clock(), TenantLimits(requests_per_min=1)
    admission = Admission(MemoryBudgets(clock), lambda _tenant: limits, disabled(), clock=clock)
    await admission.enter("a", 1, None)
    admission.check_early("a")  # nobody has said no yet
    with pytest.raises(RateLimited) as first:
        await admission.enter("a", 1, None)
    clock.now_s += 10
    with pytest.raises(RateLimited) as later:
        admission.check_early("a")
    assert later.value.retry_after_s == first.value.retry_after_s - 10
    assert str(later.value) == str(first.value)
    clock.now_s += later.value.retry_after_s
    admission.check_early("a")
    await admission.enter("a", 1, None)
    with pytest.raises(RateLimited):
        await admission.enter("a", 1, None)
    limits = TenantLimits(requests_per_min=2)
    admission.check_early("a")


async def test_budgets_hold_to_the_token_over_two_gateways_and_the_ledger_has_all_of_it(tmp_path: Path) -> None:
    limit, most = 600, 24
    lines = [
        key_line("alice", "user", ALICE, limits=TenantLimits(tokens_per_min=limit)),
        key_line("bob", "user", BOB, limits=TenantLimits(num_streams=1)),
        key_line("ops", "admin", OPS),
    ]
    (tmp_path / "keys").write_text("\n".join(map(str, lines)))
    clock = Clock()
    budgets = MemoryBudgets(clock)
    options = {"api_keys_file": tmp_path / "keys"}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    async with (  # each with room for all that the budget lets in: what an engine refuses is no matter of budgets
        fake.world(tmp_path / "1", gateway=options, budgets=budgets, max_queued=limit) as one,
        fake.world(tmp_path / "2", gateway=options, budgets=budgets, max_queued=limit) as two,
        httpx.AsyncClient(timeout=20) as http,
    ):

        async def ask(number: int, key: str = ALICE, **more: object) -> httpx.Response:
            body = {"model": "tiny", "prompt": "what is it?", "max_tokens": most, "ignore_eos": True, **more}
            url = (one, two)[number % 2].url
            return await http.post(f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})

        async def count() -> int:
            answers = await asyncio.gather(*(ask(number) for number in range(60)))
            used = 0
            for answer in answers:
                if answer.status_code == 200:
                    used += answer.json()["usage"]["total_tokens"]
                else:
                    assert answer.status_code == 429
                    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                    assert int(answer.headers["retry-after"]) >= 1
            return used

        cost = (await ask(0)).json()["usage"]["total_tokens"]
        used = cost + await count() + await count()
        assert used == limit // cost * cost  # not one request more, and none less
        assert (await ask(0, max_tokens=limit)).status_code == 400  # never fits
        assert (await ask(0, key=BOB)).status_code == 200
        clock.now_s += 61
        assert await count() == limit // cost * cost

        # One at once, whichever gateway is asked; who leaves gives its place back.
        body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {BOB}"}
        async with http.stream("POST", f"{one.url}/v1/completions", json=body, headers=headers) as stream:
            assert stream.status_code == 200
            await anext(aiter(stream.aiter_lines()))
            assert (await ask(1, key=BOB)).status_code == 429
        async with asyncio.timeout(10):
            while (await ask(1, key=BOB)).status_code != 200:
                await asyncio.sleep(0.02)

        assert (await http.get(f"{one.url}/usage", headers=headers)).status_code == 403
        admin = {"authorization": f"Bearer {OPS}"}
        await http.get(f"{two.url}/usage", headers=admin)  # each writes what it has before it tells
        ledger = {row["tenant"]: row for row in (await http.get(f"{one.url}/usage", headers=admin)).json()["data"]}
        alice = ledger["alice"]
        assert alice["num_prompt_tokens"] + alice["num_output_tokens"] == used + limit // cost * cost
        assert alice["num_requests"] == 2 * (limit // cost)
        assert ledger["bob"]["num_requests"] == 3
        text = (await http.get(f"{one.url}/usage?format=csv", headers=admin)).text
        assert text.splitlines()[0].startswith("day,tenant,model,num_requests")
        assert (await http.get(f"{one.url}/usage?from=soon", headers=admin)).status_code == 400
