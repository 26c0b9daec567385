"""Runs the tier policy: takes requests, serves residents side by side, loads one at a time, prefetches beside it (request speed).

    submit ─► waiting ─► plan ─► load or serve ─► answer          expect, foresee ─► forecast ─► evictions and prefetch

A group that is being served takes further requests of its expert in as long as the policy serves that expert next; a load waits
until those whom it evicts have answered. Owned by one event loop. A load that fails costs the requests of that expert, not the
pool; anything unforeseen stops the pool, is stored, and is what every later call raises. Must not know: how weights move, what a
request is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar

from antiphon.coe.tiers.forecast import Forecast
from antiphon.coe.tiers.policy import (
    Action,
    ExpertLoader,
    Load,
    LoadTimes,
    Policy,
    Prefetch,
    Serve,
    Tier,
    TierExpert,
    TierLimits,
    TierState,
    Wait,
    Waiting,
    after,
    plan,
    prefetch,
    tier_of,
)
from antiphon.coe.tiers.standing import ExpertServer, PoolOptions, PoolStats, TierStanding
from antiphon.core.errors import AntiphonError, DeadlineExceeded, InvalidInput, Overloaded, Unavailable

_log = logging.getLogger(__name__)

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")

_LEARNT = 0.3  # weight of the newest measured time in an expert's expected one


class TieredPool(Generic[Ask, Answer]):
    """More experts than fit in memory behind one queue. ``async with`` it, or ``start`` and ``close``."""

    def __init__(
        self,
        experts: Sequence[TierExpert],
        loader: ExpertLoader,
        server: ExpertServer[Ask, Answer],
        limits: TierLimits,
        *,
        options: PoolOptions = PoolOptions(),
        policy: Policy = plan,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``experts`` start on disk; their times are estimates that measured ones replace.

        Raises:
            InvalidInput: an expert does not fit in memory at all.
        """
        for expert in experts:
            if expert.memory_bytes > limits.resident_bytes:
                raise InvalidInput(
                    f"expert {expert.name!r} needs {expert.memory_bytes} bytes, the pool has {limits.resident_bytes}", "experts"
                )
        self._experts = {expert.name: expert for expert in experts}
        self._loader = loader
        self._server = server
        self._limits = limits
        self._options = options
        self._policy = policy
        self._clock = clock
        self._forecast = Forecast()
        self._state = TierState(resident=(), host=())
        self._ids = itertools.count()
        self._waiting: dict[int, tuple[Waiting, Ask, asyncio.Future[Answer]]] = {}
        self._news = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._running: Counter[str] = Counter()  # requests that are being answered, by expert
        self._foreseen: dict[str, float] = {}
        self._copying: tuple[Prefetch, asyncio.Task[float]] | None = None
        self._uncopied: set[str] = set()
        self._error: BaseException | None = None
        self._closed = False
        self._num_served = self._num_groups = self._num_switches = self._num_prefetches = self._num_failed = 0
        self._serve_s = 0.0
        self._loads: list[tuple[str, LoadTimes]] = []
        self._num_loads: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to serve, on the running event loop."""
        self._loop = asyncio.get_running_loop().create_task(self._run(), name="tiered-pool")

    async def close(self) -> None:
        """Stop; whoever waits gets Unavailable. Idempotent."""
        self._closed = True
        tasks = [task for task in (self._loop, self._copying[1] if self._copying else None, *self._serving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_all(Unavailable("the pool of experts has closed"))

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def submit(self, expert: str, ask: Ask, timeout_s: float) -> Answer:
        """The expert's answer.

        Raises:
            InvalidInput: there is no such expert.
            Overloaded: too many wait already.
            DeadlineExceeded: no answer in time.
            Unavailable: the expert can't be loaded, or the pool has stopped.
        """
        self._check()
        if expert not in self._experts:
            raise InvalidInput(f"the pool has no expert {expert!r}", "expert")
        if len(self._waiting) >= self._options.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait for experts already")
        request = Waiting(request_id=next(self._ids), expert=expert, arrival_s=self._clock())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = (request, ask, answer)
        self._news.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"expert {expert} did not answer within {timeout_s:g} s") from error
        finally:
            self._waiting.pop(request.request_id, None)

    def expect(self, shares: Mapping[str, float]) -> None:
        """The router has decided a request; ``shares`` (see ``forecast.shares_of``) say where the like of it go."""
        self._forecast.observe({name: share for name, share in shares.items() if name in self._experts}, self._clock())
        self._news.set()

    def foresee(self, rates: Mapping[str, float]) -> None:
        """Routers elsewhere expect so many requests per second, by expert; until they say otherwise. What ``expect`` was told of
        the same requests does not count twice: the higher rate holds."""
        self._foreseen = {name: rate for name, rate in rates.items() if name in self._experts}
        self._news.set()

    def standing(self) -> dict[str, TierStanding]:
        """Every expert now, for the directory."""
        waiting = Counter(request.expert for request, _, _ in self._waiting.values())
        found = {}
        for name, expert in self._experts.items():
            tier = tier_of(name, self._state)
            load_s = {Tier.RESIDENT: 0.0, Tier.HOST: expert.load_s, Tier.DISK: expert.load_s + expert.fetch_s}[tier]
            found[name] = TierStanding(tier=tier, num_waiting=waiting[name], num_running=self._running[name], load_s=load_s)
        return found

    def stats(self) -> PoolStats:
        """What it has done."""
        return PoolStats(
            num_served=self._num_served,
            num_groups=self._num_groups,
            num_switches=self._num_switches,
            num_prefetches=self._num_prefetches,
            num_failed_loads=self._num_failed,
            serve_s=self._serve_s,
            loads=tuple(self._loads),
            num_loads=dict(self._num_loads),
        )

    # ---- the loop ----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                self._news.clear()
                self._finish_copy()
                queue = [
                    request for request, _, answer in self._waiting.values() if not answer.done() and self._has_room(request.expert)
                ]
                now_s = self._clock()
                expected = self._expected(now_s)
                state = replace(self._state, busy=frozenset(+self._running))
                action = self._policy(self._experts, state, queue, expected, now_s, self._limits)
                self._start_copy(queue, expected, action)
                match action:
                    case Serve():
                        self._begin(action)
                    case Load() if not any(self._running[name] for name in action.evict):
                        await self._load(action)
                    case Wait(until_s=until_s):
                        await self._sleep(until_s - now_s)
                    case _:
                        await self._news.wait()  # submit, expect, an end of answers or of a copy set it; close cancels
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - stored; every later call raises it
            self._stop(error)

    def _has_room(self, expert: str) -> bool:
        """Whether more of its requests could be answered now; until then they are no reason to do anything."""
        return self._running[expert] < self._limits.max_group

    def _begin(self, action: Serve) -> None:
        """Let a group be answered beside everything else."""
        room = self._limits.max_group - self._running[action.expert]
        group = [self._waiting.pop(i) for i in action.request_ids[:room] if i in self._waiting]
        self._state = after(action, self._state)
        self._running[action.expert] += len(group)
        task = asyncio.get_running_loop().create_task(self._serve(action.expert, group), name=f"tiered-pool-{action.expert}")
        self._serving.add(task)
        task.add_done_callback(self._served)

    async def _serve(self, expert: str, group: Sequence[tuple[Waiting, Ask, asyncio.Future[Answer]]]) -> None:
        began_s = self._clock()
        try:
            asks = [ask for _, ask, _ in group]
            answers = await self._server.serve(expert, asks, self._options.serve_timeout_s)
            for (_, _, future), answer in zip(group, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except AntiphonError as error:
            _fail([future for _, _, future in group], error)
        finally:
            _fail([future for _, _, future in group], Unavailable("the pool of experts has stopped"))
            self._running[expert] -= len(group)
        self._serve_s += self._clock() - began_s
        self._num_groups += 1
        self._num_served += len(group)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._stop(error)
        self._news.set()

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._news.wait()
        except TimeoutError:
            return

    async def _load(self, action: Load) -> None:
        if self._copying is not None and self._copying[0].expert == action.expert:
            await asyncio.wait([self._copying[1]])  # its copy is on the way, and bounded by a deadline of its own
            return  # and plan again with what is there then
        if self._copying is not None:
            action = replace(action, keep=False, drop=())  # the room for another copy is being filled
        kept = tuple(name for name in self._state.resident if name not in action.evict)
        self._state = TierState(resident=kept, host=tuple(name for name in self._state.host if name not in action.drop))
        try:
            times = await self._loader.load(action, self._options.load_timeout_s)
        except AntiphonError as error:
            _log.warning("expert %s can't be loaded: %s", action.expert, error)
            self._num_failed += 1
            mine = [i for i, (request, _, _) in self._waiting.items() if request.expert == action.expert]
            _fail([self._waiting[i][2] for i in mine], Unavailable(f"expert {action.expert} can't be loaded: {error}"))
            self._take(mine)
            return
        self._num_switches += 1
        self._num_loads[action.expert] += 1
        self._uncopied.discard(action.expert)
        self._loads = [*self._loads[-99:], (action.expert, times)]
        self._state = after(action, self._state)
        read_s = times.read_s if action.from_tier is Tier.DISK else None
        self._learn(action.expert, fetch_s=read_s, load_s=times.evict_s + times.convert_s + times.ready_s)

    # ---- prefetch ----------------------------------------------------------------------------------------------

    def _start_copy(self, queue: Sequence[Waiting], expected: Mapping[str, float], action: Action | None) -> None:
        if not self._options.prefetch or self._copying is not None:
            return
        if isinstance(action, Load) and action.from_tier is Tier.DISK:
            return  # the disk is busy with it, and so is the room
        able = {name: expert for name, expert in self._experts.items() if name not in self._uncopied}
        copy = prefetch(able, self._state, queue, expected, self._limits)
        if copy is None or (isinstance(action, Load) and action.expert in copy.drop):
            return
        self._state = TierState(resident=self._state.resident, host=tuple(n for n in self._state.host if n not in copy.drop))
        task = asyncio.get_running_loop().create_task(self._copy(copy), name="tiered-pool-prefetch")
        self._copying = copy, task

    async def _copy(self, copy: Prefetch) -> float:
        try:
            return await self._loader.prefetch(copy, self._options.load_timeout_s)
        finally:
            self._news.set()

    def _finish_copy(self) -> None:
        if self._copying is None or not self._copying[1].done():
            return
        (copy, task), self._copying = self._copying, None
        error = task.exception()
        if error is None:
            self._num_prefetches += 1
            self._state = after(copy, self._state)
            self._learn(copy.expert, fetch_s=task.result(), load_s=None)
        elif isinstance(error, AntiphonError):
            _log.warning("expert %s can't be copied into host memory: %s", copy.expert, error)
            self._uncopied.add(copy.expert)  # until a load of it succeeds
        else:
            raise error

    # ---- bookkeeping -------------------------------------------------------------------------------------------

    def _learn(self, name: str, *, fetch_s: float | None, load_s: float | None) -> None:
        def newer(old_s: float, new_s: float | None) -> float:
            return old_s if new_s is None else old_s + _LEARNT * (new_s - old_s)

        expert = self._experts[name]
        self._experts[name] = replace(expert, fetch_s=newer(expert.fetch_s, fetch_s), load_s=newer(expert.load_s, load_s))

    def _take(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def _expected(self, now_s: float) -> dict[str, float]:
        own = self._forecast.expected(now_s)
        return {name: max(own.get(name, 0.0), self._foreseen.get(name, 0.0)) for name in own.keys() | self._foreseen.keys()}

    def _stop(self, error: BaseException) -> None:
        self._error = error
        self._fail_all(Unavailable(f"the pool of experts has stopped: {error}"))
        if self._loop is not None and self._loop is not asyncio.current_task():
            self._loop.cancel()

    def _check(self) -> None:
        if self._error is not None:
            raise Unavailable(f"the pool of experts has stopped: {self._error}") from self._error
        if self._closed or self._loop is None:
            raise Unavailable("the pool of experts is not open")

    def _fail_all(self, error: AntiphonError) -> None:
        _fail([future for _, _, future in self._waiting.values()], error)
        self._waiting.clear()


def _fail(futures: Sequence[asyncio.Future[Answer]], error: AntiphonError) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
