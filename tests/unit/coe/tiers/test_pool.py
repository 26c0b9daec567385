import asyncio
from collections.abc import Callable, Sequence

import pytest

from antiphon.coe.tiers.policy import Load, LoadTimes, Prefetch, Tier, TierExpert, TierLimits
from antiphon.coe.tiers.pool import TieredPool
from antiphon.coe.tiers.standing import PoolOptions
from antiphon.core.errors import CheckpointInvalid, InvalidInput, Overloaded, Unavailable

EXPERTS = [TierExpert(name=name, memory_bytes=1, host_bytes=1, fetch_s=1.0, load_s=1.0) for name in "abcd"]
LIMITS = TierLimits(resident_bytes=2, host_bytes=1, fairness_window_s=60.0, max_group=4)


class StandInModelPool:
    """Holds names for weights; checks what a real one would need."""

    def __init__(self, broken: str = "") -> None:
        self.resident: list[str] = []
        self.copies: list[str] = []
        self.loads: list[Load] = []
        self.groups: list[tuple[str, int]] = []
        self.broken = broken
        self.open = asyncio.Event()
        self.open.set()

    async def load(self, action: Load, timeout_s: float) -> LoadTimes:
        for name in action.evict:
            self.resident.remove(name)
        for name in action.drop:
            self.copies.remove(name)
        if action.expert == self.broken:
            raise CheckpointInvalid("its weights are cut short")
        assert (action.from_tier is Tier.HOST) == (action.expert in self.copies)
        self.loads.append(action)
        self.resident.append(action.expert)
        if action.keep:
            self.copies.append(action.expert)
        assert len(self.resident) <= LIMITS.resident_bytes
        assert len(self.copies) <= LIMITS.host_bytes
        return LoadTimes(evict_s=0.0, read_s=0.25, convert_s=0.1, ready_s=0.1)

    async def prefetch(self, action: Prefetch, timeout_s: float) -> float:
        for name in action.drop:
            self.copies.remove(name)
        if action.expert == self.broken:
            raise CheckpointInvalid("its weights are cut short")
        await asyncio.sleep(0)
        self.copies.append(action.expert)
        assert len(self.copies) <= LIMITS.host_bytes
        return 0.25

    async def serve(self, expert: str, asks: Sequence[int], timeout_s: float) -> Sequence[str]:
        assert expert in self.resident
        await self.open.wait()
        self.groups.append((expert, len(asks)))
        return [f"{expert}{ask}" for ask in asks]


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0)


async def test_every_request_gets_its_own_experts_answer_in_few_switches() -> None:
    model_pool = StandInModelPool()
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS) as pool:
        asked = [("abcd"[i % 4], i) for i in range(40)]
        answers = await asyncio.gather(*(pool.submit(expert, i, 10.0) for expert, i in asked))
        assert answers == [f"{expert}{i}" for expert, i in asked]
        stats = pool.stats()
    assert stats.num_switches == len(model_pool.loads) == 4
    assert max(size for _, size in model_pool.groups) <= LIMITS.max_group
    assert stats.num_served == 40


async def test_an_expert_that_cannot_be_loaded_costs_only_its_own_requests() -> None:
    model_pool = StandInModelPool(broken="b")
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS) as pool:
        found = await asyncio.gather(*(pool.submit(e, 0, 10.0) for e in "abca"), return_exceptions=True)
        assert [found[0], found[2], found[3]] == ["a0", "c0", "a0"]
        assert isinstance(found[1], Unavailable)
        assert pool.stats().num_failed_loads == 1


async def test_measured_times_replace_estimates() -> None:
    model_pool = StandInModelPool()
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS, options=PoolOptions(prefetch=False)) as pool:
        assert pool.standing()["a"].load_s == pytest.approx(2.0)
        for _ in range(12):
            for expert in "abc":
                await pool.submit(expert, 0, 10.0)
        standing = pool.standing()
        assert standing["c"].tier is Tier.RESIDENT
        (absent,) = (name for name in "abc" if standing[name].tier is not Tier.RESIDENT)
        assert standing[absent].load_s == pytest.approx(0.45, abs=0.15)
        assert standing["d"].load_s == pytest.approx(2.0)


async def test_a_full_pool_refuses_at_once() -> None:
    model_pool = StandInModelPool()
    model_pool.open.clear()
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS, options=PoolOptions(max_waiting=2)) as pool:
        first = []
        for standing in ((0, 2), (0, 4), (2, 4)):
            first += [asyncio.create_task(pool.submit("a", len(first) + i, 10.0)) for i in range(2)]
            await _until(lambda a=standing: (pool.standing()["a"].num_waiting, pool.standing()["a"].num_running) == a)
        with pytest.raises(Overloaded):
            await pool.submit("a", 6, 10.0)
        model_pool.open.set()
        assert await asyncio.gather(*first) == [f"a{i}" for i in range(6)]


async def test_requests_join_a_group_that_is_being_answered_and_residents_answer_side_by_side() -> None:
    model_pool = StandInModelPool()
    model_pool.open.clear()
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS) as pool:
        asked = [asyncio.create_task(pool.submit("a", 0, 10.0))]
        await _until(lambda: pool.standing()["a"].num_running == 1)
        asked += [asyncio.create_task(pool.submit(expert, 1, 10.0)) for expert in "ab"]
        await _until(lambda: (pool.standing()["a"].num_running, pool.standing()["b"].num_running) == (2, 1))
        model_pool.open.set()
        assert await asyncio.gather(*asked) == ["a0", "a1", "b1"]


async def test_nobody_is_evicted_in_the_middle_of_an_answer() -> None:
    model_pool = StandInModelPool()
    model_pool.open.clear()
    now = [0.0]
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS, clock=lambda: now[0]) as pool:
        asked = [asyncio.create_task(pool.submit(expert, 0, 10.0)) for expert in "ab"]
        await _until(lambda: pool.standing()["a"].num_running + pool.standing()["b"].num_running == 2)
        asked.append(asyncio.create_task(pool.submit("c", 0, 10.0)))
        await _until(lambda: pool.standing()["c"].num_waiting == 1)
        now[0] = 100.0  # long past the window
        pool.expect({"c": 1.0})
        await asyncio.sleep(0)
        assert sorted(model_pool.resident) == ["a", "b"]
        model_pool.open.set()
        assert await asyncio.gather(*asked) == ["a0", "b0", "c0"]


async def test_what_routers_foresee_keeps_an_expert_resident() -> None:
    model_pool = StandInModelPool()
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS) as pool:
        for expert in "ab":
            await pool.submit(expert, 0, 10.0)
        pool.foresee({"a": 0.5, "elsewhere": 9.0})
        await pool.submit("c", 0, 10.0)
        assert model_pool.resident == ["a", "c"]


async def test_closing_ends_those_who_wait() -> None:
    model_pool = StandInModelPool()
    model_pool.open.clear()
    pool = TieredPool(EXPERTS, model_pool, model_pool, LIMITS)
    pool.start()
    waiting = asyncio.create_task(pool.submit("a", 0, 10.0))
    await asyncio.sleep(0)
    await pool.close()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await pool.submit("a", 0, 1.0)


async def test_strange_experts_and_ones_that_never_fit_are_refused() -> None:
    model_pool = StandInModelPool()
    async with TieredPool(EXPERTS, model_pool, model_pool, LIMITS) as pool:
        with pytest.raises(InvalidInput, match="no expert 'z'"):
            await pool.submit("z", 0, 1.0)
    huge = TierExpert(name="huge", memory_bytes=3, host_bytes=1, fetch_s=1.0, load_s=1.0)
    with pytest.raises(InvalidInput, match="huge"):
        TieredPool([huge], model_pool, model_pool, LIMITS)
