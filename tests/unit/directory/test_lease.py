"""Blocking calls to a directory, and the thread that keeps a worker's lease."""

import dataclasses
import threading
import time
from collections.abc import Callable

import pytest

from antiphon.core.errors import Unavailable
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.lease import BlockingDirectory, LeaseKeeper, patiently
from antiphon.directory.memory import MemoryDirectory, open_directory

INFO = WorkerInfo(
    worker_id=WorkerId("d/p/0"),
    deployment="d",
    pool="p",
    role=Role.MONOLITH,
    model="m",
    revision="r",
    fingerprint="f",
    epoch=Epoch(3),
    endpoint=Endpoint(rpc="h:1"),
    pid=1,
    host="h",
)


def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.005)


class FlakyDirectory(MemoryDirectory):
    """A store that can be made unreachable, or to forget everything."""

    def __init__(self) -> None:
        super().__init__()
        self.reachable = True

    async def register(self, info: WorkerInfo, lease_s: float) -> bool:
        if not self.reachable:
            raise Unavailable("gone")
        return await super().register(info, lease_s)


def test_the_first_words_with_a_directory_that_is_slow_are_said_again() -> None:
    stopping, calls = threading.Event(), 0

    def register() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise Unavailable("Deadline Exceeded")
        return "registered"

    assert patiently(register, 30.0, stopping) == "registered"
    for timeout_s in (0.0, 30.0):
        calls = 0
        with pytest.raises(Unavailable):
            patiently(register, timeout_s, stopping)
        stopping.set()


def test_a_lease_is_kept_until_the_keeper_closes() -> None:
    renewals = threading.Semaphore(0)

    def describe() -> WorkerInfo:
        renewals.release()
        return INFO

    with BlockingDirectory(MemoryDirectory()) as directory:
        keeper = LeaseKeeper(directory, describe, lease_s=0.3)
        for _ in range(6):  # twice the lease
            assert renewals.acquire(timeout=10)
        assert [r.info for r in directory.workers()] == [INFO]
        keeper.close()
        keeper.close()
        assert list(directory.workers()) == []


def test_a_change_is_published_at_once_when_asked_for() -> None:
    state = {"ready": False}
    with (
        BlockingDirectory(MemoryDirectory()) as directory,
        LeaseKeeper(directory, lambda: dataclasses.replace(INFO, ready=state["ready"]), lease_s=600) as keeper,
    ):
        state["ready"] = True
        keeper.renew_soon()
        eventually(lambda: directory.workers()[0].info.ready)


def test_renewals_outlast_a_store_that_goes_away_and_comes_back_empty() -> None:
    store = FlakyDirectory()
    with BlockingDirectory(store) as directory, LeaseKeeper(directory, lambda: INFO, lease_s=0.3) as keeper:
        store.reachable = False
        eventually(lambda: not directory.workers())
        store.reachable = True
        eventually(lambda: len(directory.workers()) == 1)
        keeper.check()


def test_a_superseded_worker_learns_it_and_leaves_the_newer_record_alone() -> None:
    with BlockingDirectory(MemoryDirectory()) as directory:
        keeper = LeaseKeeper(directory, lambda: INFO, lease_s=0.3)
        newer = dataclasses.replace(INFO, epoch=Epoch(4))
        directory.register(newer, 30)
        eventually(lambda: keeper.superseded)
        keeper.close()
        assert [r.info.epoch for r in directory.workers()] == [4]


def test_an_error_in_the_loop_is_stored_and_raised_by_check() -> None:
    answers = iter([INFO])
    with BlockingDirectory(MemoryDirectory()) as directory:
        keeper = LeaseKeeper(directory, lambda: next(answers), lease_s=0.1)

        def failed() -> bool:
            try:
                keeper.check()
            except StopIteration:
                return True
            return False

        eventually(failed)
        keeper.close()


def test_the_first_registration_fails_at_once_where_no_directory_is() -> None:
    with (
        BlockingDirectory(open_directory("grpc://127.0.0.1:1", timeout_s=0.2)) as directory,
        pytest.raises(Unavailable),
    ):
        LeaseKeeper(directory, lambda: INFO, lease_s=1)


def test_a_closed_client_answers_unavailable() -> None:
    directory = BlockingDirectory(MemoryDirectory())
    directory.close()
    directory.close()
    with pytest.raises(Unavailable):
        directory.workers()
