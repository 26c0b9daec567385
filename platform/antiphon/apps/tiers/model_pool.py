"""Whole models of one process in three tiers: engines that can answer, copies in host memory, checkpoints on disk (control speed).

    disk ──read──► directory in memory ──convert──► engine ──first answer──► ready

Copies lie in a directory of a memory file system, so that an engine is built from either place by the same code. All engines
share one thread, which gives each that has requests one step in turn; copies are made on another. Implements
``coe.tiers.policy.ExpertLoader`` and ``coe.tiers.pool.ExpertServer``. Must not know: who decides what is loaded.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from antiphon.apps.process.wiring.build import build_attention
from antiphon.apps.process.wiring.resolve import resolve_model
from antiphon.apps.tiers.host_copies import HostCopies
from antiphon.apps.tiers.shared_engine import AnswerGroup, ModelPoolCounts, SharedEngine
from antiphon.coe.tiers.policy import Load, LoadTimes, Prefetch, Tier
from antiphon.core.document.spec import LLMDeploymentSpec
from antiphon.core.errors import AntiphonError, DeadlineExceeded, ErrorInfo, Unavailable
from antiphon.core.ids import Epoch, Role, WorkerId
from antiphon.core.request import FinishReason, Request, RequestId, RequestOutput, SamplingParams
from antiphon.engine.core import Outbox

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPoolAsk:
    """A prompt in tokens."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams


class ModelPool:
    """Loads and serves several models in this process. Close it when done.

    Args:
        specs: the document's part of each expert, a monolith, by expert.
        checkpoints: directory of each expert's model.
        host_directory: where copies are kept; should lie in memory (``/dev/shm``).
        forget_pages: drop a file from the page cache after it was copied, so that "on disk" means the disk.
        begin: called first on the engines' thread.
    """

    def __init__(
        self,
        specs: Mapping[str, LLMDeploymentSpec],
        checkpoints: Mapping[str, Path],
        host_directory: Path,
        *,
        forget_pages: bool = False,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self._specs = dict(specs)
        self._copies = HostCopies(checkpoints, host_directory, forget_pages=forget_pages)
        self._engines: dict[str, SharedEngine] = {}
        self._active: dict[str, SharedEngine] = {}  # those with requests; the engines' thread alone
        self._counts = dict.fromkeys(checkpoints, ModelPoolCounts())  # of engines that are gone
        self._num_asks = itertools.count()
        self._compute = ThreadPoolExecutor(1, "expert-engines", begin)
        self._disk = ThreadPoolExecutor(1, "expert-copies")
        self._closed = False

    @property
    def resident(self) -> tuple[str, ...]:
        """Experts that can answer now."""
        return tuple(self._engines)

    @property
    def copied(self) -> tuple[str, ...]:
        """Experts with a copy in host memory."""
        return self._copies.names

    def resident_bytes(self, expert: str) -> int:
        """Weights that an expert holds; 0 when it is not resident."""
        engine = self._engines.get(expert)
        return 0 if engine is None else sum(engine.part.resident_bytes.values())

    async def load(self, action: Load, timeout_s: float) -> LoadTimes:
        """See ``ExpertLoader``."""
        return await self._on(self._compute, timeout_s, f"load of {action.expert}", lambda: self._load(action))

    async def prefetch(self, action: Prefetch, timeout_s: float) -> float:
        """See ``ExpertLoader``."""
        return await self._on(self._disk, timeout_s, f"copy of {action.expert}", lambda: self._prefetch(action))

    async def serve(self, expert: str, asks: Sequence[ModelPoolAsk], timeout_s: float) -> Sequence[tuple[int, ...]]:
        """See ``ExpertServer``: the tokens of each answer."""
        tokens: dict[RequestId, list[int]] = {}
        errors: list[str] = []
        requests = [self._request(ask) for ask in asks]

        def take(outputs: Sequence[RequestOutput]) -> None:
            for output in outputs:
                if output.error is not None:
                    errors.append(str(output.error))
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)

        await self.answer(expert, requests, take, timeout_s)
        if errors:
            raise Unavailable(errors[0])
        return [tuple(tokens.get(request.request_id, ())) for request in requests]

    async def answer(self, expert: str, requests: Sequence[Request], take: Outbox, timeout_s: float) -> None:
        """Answer requests at a resident expert, together with whatever else it answers; ``take`` gets their outputs, each step's
        as it is done, on the engines' thread.

        Raises:
            Unavailable: the expert is not resident, or the model pool has closed.
            DeadlineExceeded: not all were answered in time; the rest is aborted, as it is when the caller is cancelled.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def end(error: BaseException | None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        def done(error: BaseException | None) -> None:
            loop.call_soon_threadsafe(end, error)

        group = AnswerGroup(left={request.request_id for request in requests}, take=take, done=done)
        self._submit(lambda: self._join(expert, requests, group))
        try:
            await asyncio.wait_for(ended, timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"answers of {expert} took longer than {timeout_s:g} s") from error
        finally:
            for request in requests:
                self.abort(expert, request.request_id)  # those that have ended are ignored

    def abort(self, expert: str, request_id: RequestId) -> None:
        """End a request within a step, if it is still there; from any thread."""
        engine = self._engines.get(expert)
        if engine is not None and request_id in engine.groups:
            engine.part.engine.abort(request_id)

    def counts(self, expert: str) -> ModelPoolCounts:
        """What an expert has done so far."""
        engine = self._engines.get(expert)
        return self._counts[expert] if engine is None else engine.counts(self._counts[expert])

    def close(self) -> None:
        """Let everything go; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._compute.shutdown(wait=True, cancel_futures=True)
        self._disk.shutdown(wait=True, cancel_futures=True)
        for engine in self._engines.values():
            engine.part.close()
        self._engines.clear()
        self._copies.drop(self.copied)

    # ---- on the threads ----------------------------------------------------------------------------------------

    def _load(self, action: Load) -> LoadTimes:
        began_s = time.perf_counter()
        for name in action.evict:
            engine = self._engines.pop(name)
            self._active.pop(name, None)
            self._counts[name] = replace(engine.counts(self._counts[name]), num_free_blocks=0)
            engine.fail(Unavailable(f"expert {name} was evicted"))
            engine.part.close()
        self._copies.drop(action.drop)
        if action.evict:
            _give_back_memory()
        evicted_s = time.perf_counter()
        copy = self._copies.path(action.expert)
        if action.from_tier is Tier.DISK:
            self._copies.make(action.expert)
        read_s = time.perf_counter()
        engine = self._build(action.expert, copy)
        built_s = time.perf_counter()
        self._engines[action.expert] = engine
        if action.from_tier is Tier.DISK and not action.keep:
            self._copies.drop((action.expert,))
        self._warm(engine)
        return LoadTimes(
            evict_s=evicted_s - began_s,
            read_s=read_s - evicted_s,
            convert_s=built_s - read_s,
            ready_s=time.perf_counter() - built_s,
        )

    def _prefetch(self, action: Prefetch) -> float:
        began_s = time.perf_counter()
        self._copies.drop(action.drop)
        self._copies.make(action.expert)
        return time.perf_counter() - began_s

    def _join(self, expert: str, requests: Sequence[Request], group: AnswerGroup) -> None:
        engine = self._engines.get(expert)
        if engine is None:
            group.done(Unavailable(f"expert {expert} is not resident"))
            return
        engine.groups |= {request.request_id: group for request in requests}
        for request in requests:
            try:
                engine.part.engine.submit(request)
            except AntiphonError as error:  # it ends alone; the others of its group are answered
                why = ErrorInfo.of(error)
                engine.take([RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=why)])
        if not self._active:
            self._submit(self._pump)
        self._active[expert] = engine

    def _pump(self) -> None:
        """One step of every engine that has requests, then again; loads and new requests come between."""
        for expert, engine in list(self._active.items()):
            try:
                engine.part.engine.step()
            except BaseException as error:  # noqa: BLE001 - those who wait raise it
                engine.fail(error)
            if not engine.groups and not engine.part.engine.has_inbox:
                del self._active[expert]
        if self._active:
            self._submit(self._pump)

    def _submit(self, work: Callable[[], None]) -> None:
        try:
            self._compute.submit(work)
        except RuntimeError as error:  # the model pool has closed
            if not self._closed:
                raise
            for engine in self._engines.values():
                engine.fail(Unavailable(f"the model pool of experts has closed: {error}"))

    def _build(self, expert: str, directory: Path) -> SharedEngine:
        spec = self._specs[expert]
        facts = resolve_model(spec, str(directory), "model pool")
        outputs: list[SharedEngine] = []
        part = build_attention(
            facts,
            spec,
            Role.MONOLITH,
            WorkerId(f"model-pool/{expert}/0"),
            Epoch(1),
            lambda found: outputs[0].take(found),
            time.monotonic,
        )
        facts.checkpoint.close()
        engine = SharedEngine(part=part)
        outputs.append(engine)
        return engine

    def _request(self, ask: ModelPoolAsk) -> Request:
        return Request(
            request_id=RequestId(f"pool-{next(self._num_asks)}"),
            prompt_token_ids=ask.token_ids,
            sampling=ask.sampling,
            eos_token_ids=frozenset(),
            arrival_s=time.monotonic(),
        )

    def _warm(self, engine: SharedEngine) -> None:
        """The first answer, which touches all weights."""
        request = self._request(ModelPoolAsk(token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=1, temperature=0.0)))
        engine.part.engine.submit(request)
        while engine.part.engine.step() or engine.part.engine.scheduler.has_requests:
            continue

    async def _on(self, threads: ThreadPoolExecutor, timeout_s: float, what: str, run: Callable[[], _Result]) -> _Result:
        if self._closed:
            raise Unavailable("the model pool of experts has closed")
        try:
            # The thread goes on behind a deadline that has passed; what is asked of it next waits for its end.
            return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(threads, run), timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{what} took longer than {timeout_s:g} s") from error


def _give_back_memory() -> None:
    """Freed weights go back to the system, so that the next ones fit."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
