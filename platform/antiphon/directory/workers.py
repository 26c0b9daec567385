"""The gateway's view of the workers: the directory's latest records (control speed).

Requests read the view and never wait for the directory. While the directory can't be reached the last view stays, and its
``age_s`` grows. A lease that runs out says that the directory has not heard of a worker, not that it is gone: who talks with it
stays with it for ``GRACE_S``, as long as it answers. A record with another epoch ends that at once. Must not know: who is
picked, or how workers are talked to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final, Protocol

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import AntiphonError
from antiphon.core.ids import WorkerId
from antiphon.core.worker_info import WorkerInfo

_log = logging.getLogger(__name__)

GRACE_S: Final = 30.0  # that a worker without a lease is kept for, while it answers


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
        answers: whether a worker, which has proven who it is, answers now; None = nobody talks with any.
    """

    def __init__(
        self,
        source: WorkerSource,
        *,
        refresh_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        answers: Callable[[WorkerInfo], bool] | None = None,
    ) -> None:
        self._source = source
        self._answers = answers
        self._gone_s: dict[WorkerId, float] = {}  # since when those that are kept have no lease
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
        found = await self._source.workers()
        now_s = self._clock()
        self.records = (*found, *self._kept(found, now_s))
        self._refreshed_s = now_s
        for listener in self._listeners:
            listener(self.records)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _kept(self, found: Sequence[WorkerRecord], now_s: float) -> list[WorkerRecord]:
        """Records that are gone, of workers that answer."""
        if self._answers is None:
            return []
        here, gone_s, kept = {record.info.worker_id for record in found}, self._gone_s, []
        self._gone_s = {}
        for record in self.records:
            info = record.info
            if info.worker_id in here or not info.ready or info.draining or not self._answers(info):
                continue
            since_s = gone_s.get(info.worker_id)
            if since_s is None:
                _log.warning("%s has no lease any more, and answers: it is kept for %g s", info.worker_id, GRACE_S)
                since_s = now_s
            if now_s - since_s < GRACE_S:
                self._gone_s[info.worker_id] = since_s
                kept.append(replace(record, age_s=record.lease_s + now_s - since_s))
        return kept

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
