"""The gateway's view of the directory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import Unavailable
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.workers import GRACE_S, WorkerView


def record(name: str, **changes: Any) -> WorkerRecord:
    info = WorkerInfo(
        worker_id=WorkerId(name),
        deployment="d",
        pool="p",
        role=Role.MONOLITH,
        model="m",
        revision="r",
        fingerprint="f",
        epoch=Epoch(1),
        endpoint=Endpoint(rpc="h:1"),
        pid=1,
        host="h",
    )
    return WorkerRecord(info=replace(info, **changes), age_s=0.5, lease_s=5.0)


class Source:
    """Gives what it is told to."""

    def __init__(self) -> None:
        self.records: list[WorkerRecord] = []
        self.broken = False
        self.num_calls = 0

    async def workers(self) -> Sequence[WorkerRecord]:
        self.num_calls += 1
        if self.broken:
            raise Unavailable("no directory")
        return list(self.records)


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def test_before_the_first_answer_there_is_no_age() -> None:
    assert WorkerView(Source()).age_s is None


async def test_a_broken_directory_leaves_the_last_view_which_ages() -> None:
    source, clock = Source(), Clock()
    source.records = [record("a")]
    view = WorkerView(source, refresh_s=0.001, clock=clock)
    running = asyncio.create_task(view.run())
    try:
        async with asyncio.timeout(5):
            await view.wait(5)
            source.broken = True
            seen = source.num_calls
            while source.num_calls < seen + 3:
                await asyncio.sleep(0.001)
        clock.now_s += 7.0
        assert [info.worker_id for info in view.workers] == ["a"]
        assert view.age_s is not None
        assert view.age_s >= 7.0
        source.records, source.broken = [record("b")], False
        await view.wait(5)
        assert [info.worker_id for info in view.workers] == ["b"]
    finally:
        running.cancel()


async def test_who_answers_is_kept_for_a_while_without_a_lease() -> None:
    source, clock, answering = Source(), Clock(), {"a", "b", "c", "d"}
    view = WorkerView(source, clock=clock, answers=lambda info: info.worker_id in answering)
    source.records = [record("a", ready=True), record("b", ready=True), record("c"), record("d", ready=True, draining=True)]
    await view.refresh()
    source.records = []
    await view.refresh()
    assert [info.worker_id for info in view.workers] == ["a", "b"]  # the others took no requests
    assert {each.remaining_s for each in view.records} == {0.0}
    clock.now_s += GRACE_S / 2
    answering.remove("b")
    await view.refresh()
    assert [info.worker_id for info in view.workers] == ["a"]
    source.records = [record("a", ready=True)]
    await view.refresh()
    assert [each.remaining_s > 0 for each in view.records] == [True]
    source.records = []  # from now on it counts anew
    await view.refresh()
    clock.now_s += GRACE_S * 0.9
    await view.refresh()
    assert view.workers
    clock.now_s += GRACE_S * 0.2
    await view.refresh()
    assert not view.workers


async def test_whoever_registers_under_the_same_name_is_who_counts() -> None:
    source = Source()
    view = WorkerView(source, answers=lambda _info: True)
    source.records = [record("a", ready=True)]
    await view.refresh()
    source.records = [record("a", epoch=Epoch(2))]
    await view.refresh()
    assert [(info.epoch, info.ready) for info in view.workers] == [(2, False)]


async def test_an_error_outside_our_tree_ends_the_loop_for_its_owner_to_see() -> None:
    class Broken(Source):
        async def workers(self) -> Sequence[WorkerRecord]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await WorkerView(Broken()).run()


async def test_listeners_hear_every_answer() -> None:
    source = Source()
    view = WorkerView(source)
    heard: list[int] = []
    view.on_refresh(lambda records: heard.append(len(records)))
    await view.refresh()
    source.records = [record("a")]
    await view.refresh()
    assert heard == [0, 1]


async def test_waiting_ends_with_the_time() -> None:
    await asyncio.wait_for(WorkerView(Source()).wait(0.01), 5)  # raises TimeoutError if it does not
