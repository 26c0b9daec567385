"""Whole models of one process in three tiers: engines that can answer, copies in host memory, checkpoints on disk (control speed).

    disk ──read──► directory in memory ──convert──► engine ──first answer──► ready

Copies lie in a directory of a memory file system, so that an engine is built from either place by the same code. All engines
share one thread, copies are made on another. Implements ``coe.tiers.ExpertLoader`` and ``coe.tiered_pool.ExpertServer``.
Must not know: who decides what is loaded.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from antiphon.apps.wiring import AttentionPart, build_attention, resolve_model
from antiphon.coe.tiers import Load, LoadTimes, Prefetch, Tier
from antiphon.core.errors import CheckpointInvalid, DeadlineExceeded, Unavailable
from antiphon.core.ids import Epoch, Role, WorkerId
from antiphon.core.request import Request, RequestId, RequestOutput, SamplingParams
from antiphon.core.spec import LLMDeploymentSpec

_COPY_BYTES = 8 << 20
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfAsk:
    """A prompt in tokens."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(slots=True, kw_only=True)
class _Engine:
    part: AttentionPart
    tokens: dict[RequestId, list[int]] = field(default_factory=dict)
    ended: dict[RequestId, str | None] = field(default_factory=dict)  # its error, or None
    num_requests: int = 0

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.error


class ExpertShelf:
    """Loads and serves several models in this process. Close it when done.

    Args:
        specs: the document's part of each expert, a monolith, by expert.
        checkpoints: directory of each expert's model.
        host_directory: where copies are kept; should lie in memory (``/dev/shm``).
        forget_pages: drop a file from the page cache after it was copied, so that "on disk" means the disk.
    """

    def __init__(
        self,
        specs: Mapping[str, LLMDeploymentSpec],
        checkpoints: Mapping[str, Path],
        host_directory: Path,
        *,
        forget_pages: bool = False,
    ) -> None:
        self._specs = dict(specs)
        self._checkpoints = dict(checkpoints)
        self._host = host_directory
        self._forget_pages = forget_pages
        self._engines: dict[str, _Engine] = {}
        self._compute = ThreadPoolExecutor(1, "expert-engines")
        self._disk = ThreadPoolExecutor(1, "expert-copies")
        self._closed = False

    @property
    def resident(self) -> tuple[str, ...]:
        """Experts that can answer now."""
        return tuple(self._engines)

    @property
    def copied(self) -> tuple[str, ...]:
        """Experts with a copy in host memory."""
        return tuple(name for name in self._checkpoints if (self._host / name).is_dir())

    def resident_bytes(self, expert: str) -> int:
        """Weights that a resident expert holds."""
        return sum(self._engines[expert].part.resident_bytes.values())

    def disk_bytes(self, expert: str) -> int:
        """Size of an expert's files."""
        return sum(path.stat().st_size for path in self._checkpoints[expert].iterdir() if path.is_file())

    async def load(self, action: Load, timeout_s: float) -> LoadTimes:
        """See ``ExpertLoader``."""
        return await self._on(self._compute, timeout_s, f"load of {action.expert}", lambda: self._load(action))

    async def prefetch(self, action: Prefetch, timeout_s: float) -> float:
        """See ``ExpertLoader``."""
        return await self._on(self._disk, timeout_s, f"copy of {action.expert}", lambda: self._prefetch(action))

    async def serve(self, expert: str, asks: Sequence[ShelfAsk], timeout_s: float) -> Sequence[tuple[int, ...]]:
        """See ``ExpertServer``: the tokens of each answer."""
        deadline_s = time.monotonic() + timeout_s
        return await self._on(self._compute, timeout_s, f"answers of {expert}", lambda: self._serve(expert, asks, deadline_s))

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
        for name in self.copied:
            shutil.rmtree(self._host / name, ignore_errors=True)

    # ---- on the threads ----------------------------------------------------------------------------------------

    def _load(self, action: Load) -> LoadTimes:
        began_s = time.perf_counter()
        for name in action.evict:
            self._engines.pop(name).part.close()
        self._drop(action.drop)
        if action.evict:
            _give_back_memory()
        evicted_s = time.perf_counter()
        copy = self._host / action.expert
        if action.from_tier is Tier.DISK:
            self._copy(action.expert)
        read_s = time.perf_counter()
        engine = self._build(action.expert, copy)
        built_s = time.perf_counter()
        self._engines[action.expert] = engine
        if action.from_tier is Tier.DISK and not action.keep:
            self._drop((action.expert,))
        _answer(engine, [ShelfAsk(token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=1, temperature=0.0))], began_s + 3600.0)
        return LoadTimes(
            evict_s=evicted_s - began_s,
            read_s=read_s - evicted_s,
            convert_s=built_s - read_s,
            ready_s=time.perf_counter() - built_s,
        )

    def _prefetch(self, action: Prefetch) -> float:
        began_s = time.perf_counter()
        self._drop(action.drop)
        self._copy(action.expert)
        return time.perf_counter() - began_s

    def _serve(self, expert: str, asks: Sequence[ShelfAsk], deadline_s: float) -> Sequence[tuple[int, ...]]:
        if expert not in self._engines:
            raise Unavailable(f"expert {expert} is not resident")
        return _answer(self._engines[expert], asks, deadline_s)

    def _build(self, expert: str, directory: Path) -> _Engine:
        spec = self._specs[expert]
        facts = resolve_model(spec, str(directory), "shelf")
        outputs: list[_Engine] = []
        part = build_attention(
            facts,
            spec,
            Role.MONOLITH,
            WorkerId(f"shelf/{expert}/0"),
            Epoch(1),
            lambda found: outputs[0].take(found),
            time.monotonic,
        )
        facts.checkpoint.close()
        engine = _Engine(part=part)
        outputs.append(engine)
        return engine

    def _copy(self, expert: str) -> None:
        source, to = self._checkpoints[expert], self._host / expert
        partial = self._host / f".{expert}.part"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for path in sorted(source.iterdir()):
                if path.is_file():
                    _copy_file(path, partial / path.name, forget=self._forget_pages)
            shutil.rmtree(to, ignore_errors=True)
            partial.rename(to)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointInvalid(f"expert {expert} can't be copied from {source}: {error}") from error

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            shutil.rmtree(self._host / name, ignore_errors=True)

    async def _on(self, threads: ThreadPoolExecutor, timeout_s: float, what: str, run: Callable[[], _Result]) -> _Result:
        if self._closed:
            raise Unavailable("the shelf of experts has closed")
        try:
            # The thread goes on behind a deadline that has passed; what is asked of it next waits for its end.
            return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(threads, run), timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{what} took longer than {timeout_s:g} s") from error


def _answer(engine: _Engine, asks: Sequence[ShelfAsk], deadline_s: float) -> list[tuple[int, ...]]:
    names = []
    for ask in asks:
        engine.num_requests += 1
        names.append(RequestId(f"shelf-{engine.num_requests}"))
        request = Request(
            request_id=names[-1],
            prompt_token_ids=ask.token_ids,
            sampling=ask.sampling,
            eos_token_ids=frozenset(),
            arrival_s=time.monotonic(),
        )
        engine.part.engine.submit(request)
    while not all(name in engine.ended for name in names):
        engine.part.engine.step()
        if time.monotonic() > deadline_s:
            for name in names:
                engine.part.engine.abort(name)
            engine.part.engine.step()
            break
    answers = [tuple(engine.tokens.pop(name, ())) for name in names]
    errors = [engine.ended.pop(name, "out of time") for name in names]
    for error in errors:
        if error is not None:
            raise Unavailable(error)
    return answers


def _copy_file(source: Path, to: Path, *, forget: bool) -> None:
    with source.open("rb") as reader, to.open("wb") as writer:
        if forget:
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while data := reader.read(_COPY_BYTES):
            writer.write(data)
        if forget:
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _give_back_memory() -> None:
    """Freed weights go back to the system, so that the next ones fit."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
