"""Keys waiting to be reconciled: each once, never two passes of one key at a time, failures put off (control speed).

Must not know: what a key means.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from antiphon.core.errors import AntiphonError
from antiphon_operator.kube.base import Throttled

Key = TypeVar("Key", bound=Hashable)
FIRST_BACKOFF_S = 1.0
LAST_BACKOFF_S = 300.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One finished pass, for metrics."""

    ok: bool
    seconds: float
    error: str = ""


class WorkQueue(Generic[Key]):
    """Runs ``handle(key)`` for added keys on at most ``num_workers`` tasks.

    ``handle`` returns seconds until the key is due again, or None. Its errors put the key off, as long as a Throttled asks or
    twice as long each time. Owned by one event loop.
    """

    def __init__(
        self,
        handle: Callable[[Key], Awaitable[float | None]],
        *,
        num_workers: int = 8,
        deadline_s: float = 120.0,
        on_pass: Callable[[Key, Pass], None] | None = None,
    ) -> None:
        self._handle = handle
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._on_pass = on_pass
        self._due: dict[Key, float] = {}  # loop time
        self._failures: dict[Key, int] = {}
        self._running: set[Key] = set()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._due) + len(self._running)

    def add(self, key: Key, delay_s: float = 0.0) -> None:
        """Make ``key`` due in ``delay_s``; an earlier due time stays."""
        due = asyncio.get_running_loop().time() + delay_s
        self._due[key] = min(due, self._due.get(key, due))
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled; passes under way are cancelled too, which any pass survives."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                now = loop.time()
                ready = [key for key, due in self._due.items() if due <= now and key not in self._running]
                for key in ready[: self._num_workers - len(self._running)]:
                    self._start(key)
                waiting = [due for key, due in self._due.items() if key not in self._running]
                full = len(self._running) >= self._num_workers
                timeout = None if full or not waiting else max(0.0, min(waiting) - loop.time())
                try:
                    async with asyncio.timeout(timeout):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, key: Key) -> None:
        del self._due[key]
        self._running.add(key)
        task = asyncio.get_running_loop().create_task(self._pass(key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, key: Key) -> None:
        started = asyncio.get_running_loop().time()
        again: float | None
        error = ""
        try:
            async with asyncio.timeout(self._deadline_s):
                again = await self._handle(key)
            self._failures.pop(key, None)
        except (AntiphonError, TimeoutError) as failure:
            error = type(failure).__name__
            again = self._backoff_s(key, failure)
            _LOG.warning("reconcile failed, again in %.0f s: %s", again, failure, extra={"key": str(key), "error": error})
        except Exception as failure:  # noqa: BLE001 - one document that trips a bug of ours must not stop the others
            error = type(failure).__name__
            again = self._backoff_s(key, failure)
            _LOG.exception("reconcile failed, again in %.0f s", again, extra={"key": str(key), "error": error})
        finally:
            self._running.discard(key)
            self._wake.set()
        if self._on_pass is not None:
            took = asyncio.get_running_loop().time() - started
            self._on_pass(key, Pass(ok=not error, seconds=took, error=error))
        if again is not None:
            self.add(key, again)

    def _backoff_s(self, key: Key, failure: Exception) -> float:
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        wait = min(FIRST_BACKOFF_S * 2.0**count, LAST_BACKOFF_S)
        return max(wait, failure.retry_after_s) if isinstance(failure, Throttled) else wait
