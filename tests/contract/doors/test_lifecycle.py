"""Cancellation, disconnects, deadlines, overload, lost workers and draining, through the real doors."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from antiphon.core.errors import CheckpointInvalid
from antiphon.telemetry import setup

_spec = importlib.util.spec_from_file_location("doors_fake_engine", Path(__file__).with_name("fake_engine.py"))
assert _spec is not None
assert _spec.loader is not None
fake = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
if not hasattr(fake, "world"):
    _spec.loader.exec_module(fake)

CHAT = "/v1/chat/completions"


def body(max_tokens: int = 100, **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": "what is it?"}],
        "max_tokens": max_tokens,
        "seed": 5,
        **fields,
    }


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[fake.World]:
    async with fake.world(tmp_path) as made:
        yield made


@pytest.fixture
async def http(world: fake.World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as made:
        yield made


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


async def text_of(response: httpx.Response) -> str:
    return "".join([choice["delta"].get("content") or "" async for event in events_of(response) for choice in event["choices"]])


async def test_a_client_that_leaves_a_stream_frees_the_engine(world: fake.World, http: httpx.AsyncClient) -> None:
    world.engine.stop_after_tokens = 10
    async with http.stream("POST", CHAT, json=body(stream=True)) as response:
        await anext(events_of(response))
        assert world.engine.num_live == 1
    await fake.until(lambda: world.engine.num_live == 0)
    assert len(world.engine.aborted) == 1


async def test_a_client_that_leaves_before_the_first_token_frees_the_engine(world: fake.World, http: httpx.AsyncClient) -> None:
    world.engine.stop_after_tokens = 0
    for stream in (True, False):
        asking = asyncio.create_task(http.post(CHAT, json=body(stream=stream)))
        await fake.until(lambda: world.engine.num_live == 1)
        asking.cancel()
        await fake.until(lambda: world.engine.num_live == 0)
    assert len(world.engine.aborted) == 2


async def test_a_deadline_without_a_token_is_a_504(world: fake.World, http: httpx.AsyncClient) -> None:
    world.engine.stop_after_tokens = 0
    answer = await http.post(CHAT, json=body(), headers={"x-request-timeout-s": "0.3"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    await fake.until(lambda: world.engine.num_live == 0)


async def test_a_deadline_in_a_stream_ends_it_with_an_error_event(world: fake.World, http: httpx.AsyncClient) -> None:
    world.engine.stop_after_tokens = 5
    headers = {"x-request-timeout-s": "0.5"}
    async with http.stream("POST", CHAT, json=body(stream=True), headers=headers) as response:
        assert response.status_code == 200
        events = [event async for event in events_of(response)]
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert events[-2]["choices"]


async def test_the_deadline_travels_to_the_engine(world: fake.World, http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json=body(1), headers={"x-request-timeout-s": "7"})
    request = world.engine.requests[-1]
    assert request.deadline_s is not None
    assert 5 < request.deadline_s - request.arrival_s <= 7


async def test_beyond_the_queues_it_is_429_at_once_and_what_was_accepted_completes(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, max_num_seqs=4, max_queued=4, step_s=0.002) as world,
        httpx.AsyncClient(base_url=world.url, timeout=30, limits=httpx.Limits(max_connections=200)) as http,
    ):
        answers = await asyncio.gather(*(http.post(CHAT, json=body(20)) for _ in range(80)))
        accepted = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(accepted) >= 8
        assert refused
        expected = world.text_of(world.chat_tokens_of("what is it?", 20, seed=5))
        assert {answer.json()["choices"][0]["message"]["content"] for answer in accepted} == {expected}
        for answer in refused:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"


async def test_a_refusal_of_the_engine_itself_is_a_429_too(tmp_path: Path) -> None:
    async with fake.world(tmp_path, max_num_seqs=1, max_queued=0) as world, httpx.AsyncClient(base_url=world.url) as http:
        # The record claims room that the engine doesn't have, as when another gateway was faster.
        await world.workers[0].register(max_num_seqs=50)
        await fake_refresh(http, world)
        world.engine.stop_after_tokens = 0
        first = asyncio.create_task(http.post(CHAT, json=body(2)))
        await fake.until(lambda: world.engine.num_live == 1)
        second = await http.post(CHAT, json=body(2))
        assert second.status_code == 429
        assert second.headers["retry-after"] == "2"
        world.engine.stop_after_tokens = None
        assert (await first).status_code == 200


async def fake_refresh(http: httpx.AsyncClient, world: fake.World) -> None:
    """Wait until the gateway has seen the newest records."""
    newest = world.workers[-1].info
    async with asyncio.timeout(10):
        while True:
            seen = {w["worker_id"]: w for w in (await http.get("/status")).json()["workers"]}
            record = seen.get(newest.worker_id)
            if record is not None and record["connected"] and record["max_num_seqs"] == newest.max_num_seqs:
                return
            await asyncio.sleep(0.01)


async def test_a_lost_workers_stream_goes_on_elsewhere_without_gap_or_duplicate(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, workers=("0", "1")) as world,
        httpx.AsyncClient(base_url=world.url, timeout=20) as http,
    ):
        await fake_refresh(http, world)
        for worker in world.workers:
            worker.engine.stop_after_tokens = 17
        async with http.stream("POST", CHAT, json=body(60, stream=True)) as response:
            events = events_of(response)
            first = [await anext(events)]
            while not any(choice["delta"].get("content") for choice in first[-1]["choices"]):  # some tokens are through
                first.append(await anext(events))
            busy = next(w for w in world.workers if w.engine.num_live)
            other = next(w for w in world.workers if w is not busy)
            other.engine.stop_after_tokens = None
            await busy.die()
            rest = [event async for event in events]
        text = "".join(c["delta"].get("content") or "" for event in [*first, *rest] for c in event["choices"])
        assert text == world.text_of(world.chat_tokens_of("what is it?", 60, seed=5))
        (resumed,) = other.engine.requests
        assert list(resumed.output_token_ids) == world.chat_tokens_of("what is it?", len(resumed.output_token_ids), seed=5)
        assert len(resumed.output_token_ids) > 0
        assert resumed.sampling.seed == 5


async def test_a_stream_waits_for_its_only_worker_to_come_back(world: fake.World, http: httpx.AsyncClient) -> None:
    worker = world.workers[0]
    worker.engine.stop_after_tokens = 9
    async with http.stream("POST", CHAT, json=body(30, stream=True)) as response:
        events = events_of(response)
        first = await anext(events)
        await worker.die()
        await world.directory.remove(worker.info.worker_id, worker.info.epoch)
        world.workers.clear()
        async with asyncio.timeout(10):  # the gateway knows that nobody is left
            while (await http.get("/status")).json()["workers"]:
                await asyncio.sleep(0.01)
        await world.add_worker("0", epoch=2)
        rest = [event async for event in events]
    text = "".join(c["delta"].get("content") or "" for event in [first, *rest] for c in event["choices"])
    assert text == world.text_of(world.chat_tokens_of("what is it?", 30, seed=5))


async def test_without_a_worker_it_is_503_with_retry_after(world: fake.World, http: httpx.AsyncClient) -> None:
    await world.workers[0].register(ready=False, message="loading weights")
    await wait_ready(http, ready=False)
    answer = await http.post(CHAT, json=body(2))
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "loading weights" in answer.json()["error"]["message"]
    await world.workers[0].register(ready=True, message="")
    await wait_ready(http, ready=True)
    assert (await http.post(CHAT, json=body(2))).status_code == 200


async def wait_ready(http: httpx.AsyncClient, *, ready: bool) -> None:
    async with asyncio.timeout(10):
        while ((await http.get("/ready")).status_code == 200) is not ready:
            await asyncio.sleep(0.01)


async def test_a_request_that_takes_its_workers_down_is_given_up(world: fake.World, http: httpx.AsyncClient) -> None:
    worker = world.workers[0]
    assert worker.servicer is not None
    worker.engine.stop_after_tokens = 0

    async def die_on_every_request() -> None:
        seen = 0
        while True:
            await fake.until(lambda seen=seen: len(worker.engine.requests) > seen)
            seen = len(worker.engine.requests)
            await worker._server.close()
            await worker.start()

    killing = asyncio.create_task(die_on_every_request())
    try:
        answer = await http.post(CHAT, json=body(5))
    finally:
        killing.cancel()
    assert answer.status_code == 503
    assert len(worker.engine.requests) == 5


async def test_draining_refuses_new_requests_and_lets_open_ones_finish(tmp_path: Path) -> None:
    async with fake.world(tmp_path) as world, httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        world.engine.stop_after_tokens = 5
        async with http.stream("POST", CHAT, json=body(12, stream=True)) as response:
            reading = asyncio.create_task(text_of(response))
            await fake.until(lambda: world.engine.num_live == 1)
            world.stop.set()
            await wait_ready(http, ready=False)
            refused = await http.post(CHAT, json=body(2))
            assert refused.status_code == 503
            world.engine.stop_after_tokens = None
            assert await reading == world.text_of(world.chat_tokens_of("what is it?", 12, seed=5))


async def test_status_shows_pools_workers_leases_and_load(world: fake.World, http: httpx.AsyncClient) -> None:
    await fake_refresh(http, world)
    status = (await http.get("/status")).json()
    (pool,) = status["pools"]
    assert (pool["name"], pool["role"], pool["num_ready"], pool["kv_usage"]) == ("monolith", "monolith", 1, 0.25)
    (worker,) = status["workers"]
    assert worker["worker_id"] == "demo/monolith/0"
    assert 0 < worker["lease_remaining_s"] <= fake.LEASE_S
    assert worker["connected"] is True
    assert (await http.get("/status", params={"deployment": "other"})).json()["workers"] == []


async def test_an_answer_is_the_same_whichever_worker_gives_it(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, workers=("0", "1", "2")) as world,
        httpx.AsyncClient(base_url=world.url, timeout=20) as http,
    ):
        await fake_refresh(http, world)
        prompts = [f"question {index}?" for index in range(12)]
        answers = await asyncio.gather(
            *(http.post("/v1/completions", json={"model": "tiny", "prompt": p, "max_tokens": 9, "seed": 4}) for p in prompts)
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.json()["choices"][0]["text"] == world.text_of(world.tokens_of(prompt, 9, seed=4))
        assert all(worker.engine.requests for worker in world.workers)


async def test_many_random_cancels_leave_nothing_behind(world: fake.World, http: httpx.AsyncClient) -> None:
    async def ask(index: int) -> None:
        try:
            async with asyncio.timeout(0.002 * (index % 17)):
                await http.post(CHAT, json=body(5 + index % 40, stream=index % 2 == 0))
        except (TimeoutError, httpx.HTTPError):
            pass

    for start in range(0, 120, 12):
        await asyncio.gather(*(ask(start + offset) for offset in range(12)))
    await fake.until(lambda: world.engine.num_live == 0)
    async with asyncio.timeout(10):
        while (await http.get("/status")).json()["num_requests"]:
            await asyncio.sleep(0.01)
    servicer = world.workers[0].servicer
    assert servicer is not None
    await fake.until(lambda: servicer.num_requests == 0)


async def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, gateway={"drain_timeout_s": 0.2}) as world,
        httpx.AsyncClient(base_url=world.url, timeout=20) as http,
    ):
        world.engine.stop_after_tokens = 5
        async with http.stream("POST", CHAT, json=body(12, stream=True)) as response:
            reading = asyncio.create_task(response.aread())
            await fake.until(lambda: world.engine.num_live == 1)
            world.stop.set()
            events = (await reading).decode().strip().split("\n\n")
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert (error["code"], error["message"]) == ("unavailable", "this gateway is shutting down")


async def test_tenants_do_not_share_the_prefix_cache_unless_the_document_says_so(tmp_path: Path) -> None:
    for shared in (False, True):
        settings = {"api_keys": frozenset({"alice", "bob"}), "shared_cache_models": frozenset({"tiny"} if shared else ())}
        async with (
            fake.world(tmp_path / str(shared), gateway=settings) as world,
            httpx.AsyncClient(base_url=world.url, timeout=20) as http,
        ):
            for key, asked in (("alice", ""), ("bob", ""), ("alice", ""), ("alice", "s"), ("bob", "s" * 250)):
                salt = {"cache_salt": asked} if asked else {}
                answer = await http.post(CHAT, json={**body(2), **salt}, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == 200
            salts = [request.cache_salt for request in world.engine.requests]
        if shared:
            assert salts == ["", "", "", "s", "s" * 250]
            continue
        assert salts[0] == salts[2]
        assert len(set(salts)) == 4
        assert {len(salt) for salt in salts} == {32}
        assert not any("alice" in salt or "bob" in salt for salt in salts)


async def test_a_checkpoints_sampling_defaults_hold_where_the_client_says_nothing(tmp_path: Path) -> None:
    for plain in (False, True):
        settings = {"plain_sampling_models": frozenset({"tiny"} if plain else ())}
        defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "min_p": 7}
        async with (
            fake.world(tmp_path / str(plain), gateway=settings, generation_config=defaults) as world,
            httpx.AsyncClient(base_url=world.url, timeout=20) as http,
        ):
            await http.post(CHAT, json=body(2))
            await http.post(CHAT, json={**body(2), "temperature": 0, "top_k": -1, "top_p": 1})
            open_, said = (request.sampling for request in world.engine.requests)
        found = (open_.temperature, open_.top_p, open_.top_k, open_.repetition_penalty, open_.min_p)
        assert found == pytest.approx((1.0, 1.0, 0, 1.0, 0.0) if plain else (0.6, 0.95, 20, 1.1, 0.0))
        assert (said.temperature, said.top_p, said.top_k) == (0.0, 1.0, 0)


async def test_a_template_without_end_is_refused_at_the_start(tmp_path: Path) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointInvalid, match="takes more time or memory than it may"):
        async with fake.world(tmp_path, chat_template=endless):
            pass


@pytest.fixture
async def asleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[fake.World]:
    """No worker yet, and a gateway that waits for one."""
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    waits = {"wake_timeout_s_by_model": {"tiny": 60.0}}
    with setup("antiphon-gateway-test") as telemetry:
        async with fake.world(tmp_path, workers=(), gateway=waits, telemetry=telemetry) as made:
            yield made


async def held(http: httpx.AsyncClient, num_requests: int) -> None:
    line = f'antiphon_requests_held{{gen_ai_request_model="tiny"}} {num_requests:.1f}'
    async with asyncio.timeout(30):
        while line not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.01)


async def test_a_request_for_a_pool_that_sleeps_waits_for_its_first_worker(asleep: fake.World) -> None:
    async with httpx.AsyncClient(base_url=asleep.url, timeout=20) as http:
        answer = asyncio.create_task(http.post(CHAT, json=body(4)))
        await held(http, 1)
        assert not answer.done()
        await asleep.add_worker("first")
        assert (await answer).status_code == 200
        await held(http, 0)


async def test_a_client_that_leaves_while_it_is_held_is_forgotten(asleep: fake.World) -> None:
    async with httpx.AsyncClient(base_url=asleep.url, timeout=20) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post(CHAT, json=body(4), timeout=0.5)
        await held(http, 0)


async def test_a_request_is_held_no_longer_than_the_document_says(tmp_path: Path) -> None:
    async with (
        fake.world(tmp_path, workers=(), gateway={"wake_timeout_s_by_model": {"tiny": 0.2}}) as never,
        httpx.AsyncClient(base_url=never.url, timeout=20) as http,
    ):
        answer = await http.post(CHAT, json=body(4))
        assert answer.status_code == 503
        assert "no worker of tiny is registered, 0.2 s after it was asked for" in answer.json()["error"]["message"]
