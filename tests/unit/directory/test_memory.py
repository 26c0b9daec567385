"""The embedded directory on an injected clock, and the choice of a directory by its address."""

import pytest

from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.core.ids import Endpoint, Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.memory import MemoryDirectory, open_directory


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def info(index: int = 0) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(f"d/p/{index}"),
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


async def test_a_record_lives_exactly_as_long_as_its_lease() -> None:
    clock = Clock()
    directory = MemoryDirectory(clock=clock)
    await directory.register(info(), 5.0)
    clock.now += 4.0
    (record,) = await directory.workers()
    assert (record.age_s, record.remaining_s) == (4.0, 1.0)
    clock.now += 1.0
    assert await directory.workers() == ()


async def test_a_claim_lives_exactly_as_long_as_its_lease() -> None:
    clock = Clock()
    directory = MemoryDirectory(clock=clock)
    await directory.claim_index("d", "p", "a", 5.0)
    clock.now += 4.9
    assert await directory.claim_index("d", "p", "b", 5.0) == 1
    clock.now += 0.1
    assert await directory.claim_index("d", "p", "c", 5.0) == 0


async def test_epochs_start_above_the_base() -> None:
    assert await MemoryDirectory(epoch_base=500).next_epoch(WorkerId("d/p/0")) == 501


async def test_a_store_that_lost_its_memory_lists_nobody_until_everybody_had_time_to_renew() -> None:
    clock = Clock()
    directory = MemoryDirectory(clock=clock, settle_s=5.0)
    assert await directory.register(info(0), 5.0)
    with pytest.raises(Unavailable):
        await directory.workers()
    clock.now += 4.9
    assert await directory.register(info(0), 5.0)
    clock.now += 0.1
    assert [r.info.worker_id for r in await directory.workers()] == ["d/p/0"]


async def test_a_store_that_lost_its_memory_gives_former_owners_their_index_and_newcomers_none_yet() -> None:
    clock = Clock()
    directory = MemoryDirectory(clock=clock, settle_s=5.0)
    with pytest.raises(Unavailable):
        await directory.claim_index("d", "p", "new", 30.0)
    assert await directory.claim_index("d", "p", "old", 30.0, preferred=0) == 0
    assert await directory.claim_index("d", "p", "old", 30.0) == 0
    clock.now += 5.0
    assert await directory.claim_index("d", "p", "new", 30.0) == 1


@pytest.mark.parametrize("address", ["", "localhost:6379", "http://localhost:1", "redis:/localhost"])
def test_an_address_without_a_known_scheme_is_refused(address: str) -> None:
    with pytest.raises(InvalidInput, match="is no directory"):
        open_directory(address)
