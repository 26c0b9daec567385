"""Sessions of a bench with a deployment's workers: requests in, arrival times and the workers' own figures out (control speed).

Must not know: what is measured with them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from antiphon.core.errors import DeadlineExceeded, Unavailable
from antiphon.core.ids import Role
from antiphon.core.request import Request, RequestId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.memory import open_directory
from antiphon.rpc.engine.session import EngineSession

START_TIMEOUT_S = 180.0
RUN_TIMEOUT_S = 600.0
FFN = "ffn."  # before the names of FFN workers' sums, which attention workers have too


@dataclass(slots=True)
class Progress:
    """Arrival times of one request's tokens."""

    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    num_steps: int = 0  # that brought tokens
    token_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    error: str | None = None


class Sessions:
    """Sessions with every generating worker; requests are dealt out in turn."""

    def __init__(self, directory_address: str) -> None:
        self._directory = open_directory(directory_address)
        self._sessions: list[EngineSession] = []
        self._readers: list[asyncio.Task[None]] = []
        self._requests: dict[RequestId, Progress] = {}
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        for info in await self._generating():
            session = EngineSession(info.endpoint.rpc)
            await session.open(START_TIMEOUT_S)
            self._sessions.append(session)
            self._readers.append(asyncio.create_task(self._read(session)))
        self._deadline = time.monotonic() + RUN_TIMEOUT_S
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for session in self._sessions:
            await session.close()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self._directory.close()

    def submit(self, request: Request, turn: int) -> Progress:
        """Ask the worker whose turn it is; what comes is in the progress."""
        progress = self._requests[request.request_id] = Progress(submitted_s=time.perf_counter())
        self._sessions[turn % len(self._sessions)].submit(request, deadline_left_s=RUN_TIMEOUT_S)
        return progress

    async def turn(self, run: Sequence[Progress], *, wait: bool = True) -> None:
        """Let tokens arrive. Raises what a request or a session failed with."""
        if wait:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), RUN_TIMEOUT_S)
        else:
            await asyncio.sleep(0)
        for reader in self._readers:
            if reader.done():
                reader.result()
        failed = [p.error for p in run if p.error is not None]
        if failed:
            raise Unavailable(f"a request failed: {failed[0]}")
        if time.monotonic() > self._deadline:
            raise DeadlineExceeded(f"the run did not end within {RUN_TIMEOUT_S:g} s")

    async def figures(self) -> Mapping[str, float]:
        """Sums since start over the generating workers, and over FFN workers, as their leases have them now."""
        total: dict[str, float] = {"num_steps": 0.0}
        for info in await self._workers():
            if info.role.generates:
                sums = {**info.load.gauges, "num_steps": float(info.load.num_steps)}
            elif info.role is Role.FFN:
                sums = {FFN + name: value for name, value in info.load.gauges.items()}
            else:
                continue
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + value
        return total

    async def _generating(self) -> list[WorkerInfo]:
        return [info for info in await self._workers() if info.role.generates]

    async def _workers(self) -> list[WorkerInfo]:
        return [record.info for record in await self._directory.workers("bench")]

    async def _read(self, session: EngineSession) -> None:
        async for answers in session.updates():
            now = time.perf_counter()
            for answer in answers:
                progress = self._requests.get(answer.output.request_id)
                if progress is None:
                    continue
                progress.token_s += [now] * len(answer.output.new_token_ids)
                progress.token_ids += answer.output.new_token_ids
                progress.num_steps += bool(answer.output.new_token_ids)
                if answer.output.finish_reason is not None:
                    progress.ended_s = now
                    progress.error = None if answer.error is None else str(answer.error)
            self._news.set()
