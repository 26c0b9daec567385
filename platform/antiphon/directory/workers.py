"""The gateway's view of the workers: the directory's latest records (control speed).

Requests read the view and never wait for the directory. While the directory can't be reached the last view stays, and its
``age_s`` grows. Must not know: who is picked, or how workers are talked to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import AntiphonError
from antiphon.core.worker_info import WorkerInfo

_log = logging.getLogger(__name__)


class WorkerSource(Protocol):
    """Where workers are registered; core.directory.Directory is one."""

    async def workers(self) -> Sequence[WorkerRecord]:
        """Records whose lease runs. Raises errors of the tree while the store can't be reached."""
        ...


class DeploymentWorkers:
    """The records of some deployments: others that share their store may serve models of the same name.

    Args:
        source: all records.
        deployments: names of those whose workers are meant.
    """

    def __init__(self, source: WorkerSource, deployments: Collection[str]) -> None:
        self._source = source
        self._deployments = frozenset(deployments)

    async def workers(self) -> Sequence[WorkerRecord]:
        """See ``WorkerSource``."""
        return [record for record in await self._source.workers() if record.info.deployment in self._deployments]


class WorkerView:
    """The latest records. Belongs to one event loop; ``run`` keeps it fresh until cancelled.

    Args:
        source: where workers are registered.
        refresh_s: seconds between looks.
        clock: monotonic seconds.
    """

    def __init__(self, source: WorkerSource, *, refresh_s: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._refresh_s = refresh_s
        self._clock = clock
        self._refreshed_s: float | None = None
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[Sequence[WorkerRecord]], None]] = []
        self.records: tuple[WorkerRecord, ...] = ()

    @property
    def age_s(self) -> float | None:
        """Seconds since the directory last answered; None before its first answer."""
        return None if self._refreshed_s is None else self._clock() - self._refreshed_s

    @property
    def workers(self) -> list[WorkerInfo]:
        """The workers of the records."""
        return [record.info for record in self.records]

    def on_refresh(self, listener: Callable[[Sequence[WorkerRecord]], None]) -> None:
        """Call ``listener`` with every answer of the directory."""
        self._listeners.append(listener)

    async def refresh(self) -> None:
        """Ask the directory once. Raises what it raises."""
        self.records = tuple(await self._source.workers())
        self._refreshed_s = self._clock()
        for listener in self._listeners:
            listener(self.records)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self, timeout_s: float) -> None:
        """Return after the next answer of the directory, or after ``timeout_s`` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def run(self) -> None:
        """Refresh until cancelled."""
        reachable = True
        while True:
            try:
                await self.refresh()
                if not reachable:
                    _log.info("the directory answers again")
                reachable = True
            except AntiphonError as error:
                if reachable:
                    _log.warning("the directory can't be reached, going on with the last view: %s", error)
                reachable = False
            await asyncio.sleep(self._refresh_s)
