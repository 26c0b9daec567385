"""The queue of keys: one pass of a key at a time, failures put off as long as it takes."""

from __future__ import annotations

import asyncio
import logging

import pytest

from antiphon_operator.controller.work_queue import Pass, WorkQueue
from antiphon_operator.kube.base import Conflict, ServerFault, Throttled

DEADLINE_S = 10.0


async def passes(queue: WorkQueue[str], count: list[int], wanted: int) -> None:
    running = asyncio.create_task(queue.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while count[0] < wanted:
                queue.add("a")
                await asyncio.sleep(0)
    finally:
        running.cancel()
        await asyncio.wait((running,))


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (ServerFault("oops"), ["again in 1 s", "again in 2 s", "again in 4 s"]),
        (Conflict("busy"), ["again in 1 s", "again in 2 s", "again in 4 s"]),
        (Throttled("slow down", 7.0), ["again in 7 s", "again in 7 s", "again in 7 s"]),
    ],
    ids=["500", "409", "429 with Retry-After"],
)
async def test_a_failure_is_put_off_longer_each_time_or_as_long_as_the_server_asks(
    error: Exception, waits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    count = [0]

    async def fail(key: str) -> float | None:
        raise error

    def passed(key: str, done: Pass) -> None:
        count[0] += 1
        assert done.error == type(error).__name__

    with caplog.at_level(logging.WARNING, logger="antiphon_operator.controller.work_queue"):
        await passes(WorkQueue(fail, on_pass=passed), count, 3)
    told = [record.getMessage() for record in caplog.records]
    assert [wait in text for wait, text in zip(waits, told, strict=False)] == [True, True, True]


async def test_a_key_is_never_handled_twice_at_once() -> None:
    count, inside, most = [0], 0, 0

    async def handle(key: str) -> float | None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        inside -= 1
        count[0] += 1
        return None

    await passes(WorkQueue(handle), count, 5)
    assert most == 1


async def test_a_bug_in_one_key_does_not_stop_the_others() -> None:
    done = asyncio.Event()

    async def handle(key: str) -> float | None:
        if key == "bad":
            raise KeyError("bug")
        done.set()
        return None

    queue: WorkQueue[str] = WorkQueue(handle)
    running = asyncio.create_task(queue.run())
    try:
        queue.add("bad")
        queue.add("good")
        async with asyncio.timeout(DEADLINE_S):
            await done.wait()
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait((running,))
