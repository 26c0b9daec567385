"""A worker that has gone wrong: whatever it answers, its requests end or go on at another, and nothing of the gateway ends."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.directory.memory import open_directory
from antiphon.rpc.services import RpcServer
from antiphon.rpc.v1 import engine_pb2 as pb
from attack.conftest import Target

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

LEASE_S = 600.0
NAME = WorkerId("target/attention/9")
BODY: dict[str, Any] = {"model": "target", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 2}
Answers = Callable[[pb.SubmitCommand], list[pb.EngineUpdate | bytes]]


def part(submit: pb.SubmitCommand, **fields: Any) -> pb.EngineUpdate:
    return pb.EngineUpdate(requests=[pb.RequestUpdate(**{"request_id": submit.request_id, "new_token_ids": [5], **fields})])


def told(**fields: Any) -> pb.TokenLogprob:
    return pb.TokenLogprob(**{"token_id": 5, "logprob": -1.0, "rank": 1, "top_token_ids": [5], "top_logprobs": [-1.0], **fields})


FORGED: dict[str, Answers] = {
    "log probabilities of unequal length": lambda s: [part(s, logprobs=[told(top_token_ids=[1, 2, 3])])],
    "a log probability that is none": lambda s: [part(s, logprobs=[told(logprob=math.nan)])],
    "a log probability beyond": lambda s: [part(s, logprobs=[told(top_logprobs=[math.inf])])],
    "a log probability of nothing": lambda s: [part(s, logprobs=[told(logprob=-math.inf)], finish_reason="length")],
    "a vector that is none": lambda s: [part(s, vector=[1.0, math.nan])],
    "times that are none": lambda s: [
        part(s, finish_reason="length", times=pb.RequestTimes(queue_s=math.nan, first_token_s=-math.inf, finished_s=-1.0))
    ],
    "a token beyond the vocabulary": lambda s: [
        part(s, new_token_ids=[2**32 - 1], logprobs=[told(token_id=2**32 - 1)]),
        part(s, finish_reason="length"),
    ],
    "tokens beyond, at the end": lambda s: [part(s, new_token_ids=[2**31, 400, 384], finish_reason="length")],
    "a token to stop at that is none": lambda s: [part(s, stop_token_id=2**32 - 1, finish_reason="stop")],
    "a log probability for no token": lambda s: [
        part(s, new_token_ids=[], logprobs=[told()] * 50),
        part(s, finish_reason="length"),
    ],
    "an end that there is none": lambda s: [part(s, finish_reason="because")],
    "an error that there is none": lambda s: [part(s, error_code="x" * 10_000, error_message="y" * 100_000)],
    "an error of the client's": lambda s: [
        part(s, finish_reason="error", error_code="peer_lost", error_message="\r\nset-cookie: a")
    ],
    "more tokens than there may be": lambda s: [part(s, new_token_ids=[5] * 5000), part(s, finish_reason="length")],
    "an end without a token": lambda s: [part(s, new_token_ids=[], finish_reason="length")],
    "two ends": lambda s: [part(s, finish_reason="length")] * 3,
    "counts beyond": lambda s: [
        part(s, num_cached_tokens=2**31 - 1, num_remote_tokens=2**31 - 1, num_preemptions=2**31 - 1, finish_reason="length")
    ],
    "a prompt's log probabilities that nobody asked for": lambda s: [
        part(s, prompt_logprobs={2**31: told(), 0: told()}, finish_reason="length")
    ],
    "a vector that nobody asked for": lambda s: [part(s, vector=[1.5] * 1000, finish_reason="length")],
    "others' requests": lambda s: [
        pb.EngineUpdate(requests=[pb.RequestUpdate(request_id=f"r{n}") for n in range(5000)]),
        part(s, finish_reason="length"),
    ],
    "no protobuf": lambda s: [b"\xff" * 40],
    "a message of 3 MiB": lambda s: [part(s, error_message="e" * (3 << 20), finish_reason="length")],
}
PAUSES_S = 0.05


class ForgedWorker:
    """An attention worker of the deployment's that answers what it likes, and says that it has all the room there is."""

    name = "antiphon.rpc.v1.Engine"

    def __init__(self, target: Target) -> None:
        self.answers: Answers = lambda _: []
        self.num_asked = 0
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._start())

    def _do(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30.0)

    async def _start(self) -> None:
        self._directory = open_directory(self._target.deployment.directory_address)
        self._server = RpcServer([self], host="127.0.0.1")
        await self._server.start()
        real = self._target.workers[Role.ATTENTION]
        load = replace(real.load, num_running=0, num_waiting=0, num_free_blocks=100_000, num_total_blocks=100_000)
        info = replace(real, worker_id=NAME, epoch=Epoch(1), endpoint=Endpoint(rpc=self._server.address), load=load, ready=True)
        assert await self._directory.register(info, LEASE_S)

    def add_to(self, server: grpc.aio.Server) -> None:
        handler = grpc.stream_stream_rpc_method_handler(self._session, pb.EngineCommand.FromString, _serialized)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(self.name, {"Session": handler}),))

    async def _session(self, commands: AsyncIterator[pb.EngineCommand], context: Any) -> None:
        await context.send_initial_metadata(())
        async for command in commands:
            if command.WhichOneof("command") == "submit":
                self.num_asked += 1
                for update in self.answers(command.submit):
                    await context.write(update)

    def close(self) -> None:
        async def end() -> None:
            await self._directory.remove(NAME, Epoch(1))
            await self._server.close()
            await self._directory.close()

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()


def _serialized(update: pb.EngineUpdate | bytes) -> bytes:
    return update if isinstance(update, bytes) else update.SerializeToString()


def connected(target: Target) -> dict[str, bool]:
    workers = httpx.get(f"{target.http}/status", trust_env=False, timeout=10.0).json()["workers"]
    return {worker["worker_id"]: worker["ready"] and worker.get("connected", True) for worker in workers}


def until(seen: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30.0
    while not seen():
        assert time.monotonic() < end_s
        time.sleep(PAUSES_S)


def bodies() -> list[dict[str, Any]]:
    return [{**BODY, "prompt": [5, 6, 7, 10 + number], "stream": bool(number % 2)} for number in range(4)]


def text_of(answer: httpx.Response) -> str:
    found = ""
    for line in answer.text.splitlines():
        if (data := line.removeprefix("data: ")).startswith("{"):
            for choice in json.loads(data, parse_constant=no_number).get("choices", ()):
                found += choice["text"]
    return found


def no_number(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


@pytest.fixture(scope="module")
def expected(target: Target) -> list[str]:
    """What the real worker answers."""
    with httpx.Client(base_url=target.http, trust_env=False, timeout=60.0) as client:
        return [text_of(client.post("/v1/completions", json=body)) for body in bodies()]


@pytest.fixture
def insider(target: Target, expected: list[str]) -> Iterator[ForgedWorker]:
    worker = ForgedWorker(target)
    try:
        until(lambda: connected(target).get(NAME, False))
        yield worker
    finally:
        worker.close()
        until(lambda: NAME not in connected(target))
        target.check_unharmed()


# What can be told from an answer: the session is as good as lost, and its requests go on at the real worker.
TOLD = {
    "log probabilities of unequal length",
    "a log probability that is none",
    "a log probability beyond",
    "a vector that is none",
    "no protobuf",
}
INTERNAL = {"an end that there is none", "an error that there is none"}  # of the worker's own, as far as anybody can tell


@pytest.mark.parametrize("name", list(FORGED))
def test_an_answer_that_can_be_none_costs_its_request_at_most(
    target: Target, insider: ForgedWorker, expected: list[str], name: str
) -> None:
    """Nobody waits for a worker that can't be understood, and the next request is answered."""
    insider.answers = FORGED[name]
    with httpx.Client(base_url=target.http, trust_env=False, timeout=60.0) as client:
        for body, text in zip(bodies(), expected, strict=True):
            started_s = time.monotonic()
            answer = client.post("/v1/completions", json=body)
            assert time.monotonic() - started_s < 20.0
            assert answer.status_code == 200 or (name in INTERNAL and answer.status_code == 500), answer.text
            assert "set-cookie" not in answer.headers
            assert len(answer.content) < 2_000_000
            assert text_of(answer) == text or name not in TOLD
        assert "NaN" not in client.get("/metrics").text
    assert insider.num_asked, "it was not asked"
