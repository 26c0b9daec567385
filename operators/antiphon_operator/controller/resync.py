"""Deployments at rest, looked at again in a slow rhythm and many at a time (control speed).

    busy (in the queue) --a pass finds nothing to do--> resting --looked at, still nothing to do--> resting
                                                        resting --anything to do, or it changed--> busy

A look reads one document per deployment, and nine lists per fifty deployments of a namespace. Must not know: what there may be
to do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from antiphon.core.errors import AntiphonError
from antiphon_operator.controller.work_queue import Pass
from antiphon_operator.kube.base import Kube, Throttled
from antiphon_operator.reconcile.rest_view import Unsettled, read_at_once

MOST_AT_ONCE = 50  # bounds the memory of a look and the length of a label selector
SHORTEST_REST_S = 15.0  # what is due earlier is busy
_FAILED_AGAIN_S = 30.0
_DEADLINE_S = 300.0  # of one look at MOST_AT_ONCE deployments
_LOG = logging.getLogger(__name__)

Name = tuple[str, str]  # namespace, name
Look = Callable[[Kube, str, str], Awaitable[float | None]]


@dataclass(slots=True)
class _Rest:
    due: float  # loop time
    every_s: float


class Resync:
    """Looks at what rests. Owned by one event loop.

    Args:
        kube: the real door.
        look: one pass over a deployment through the door it is given; seconds until the next, None when the deployment is gone.
        unsettled: told of a deployment that needs a pass of its own.
        num_at_once: passes of one look that may be under way together.
        shortest_s: a deployment whose pass asks to be seen sooner than this is no deployment at rest.
        on_pass: told of every pass that found nothing to do.
    """

    def __init__(
        self,
        kube: Kube,
        look: Look,
        *,
        unsettled: Callable[[str, str], None],
        num_at_once: int = 8,
        shortest_s: float = SHORTEST_REST_S,
        on_pass: Callable[[Pass], None] | None = None,
    ) -> None:
        self._kube = kube
        self._look = look
        self._unsettled = unsettled
        self._places = asyncio.Semaphore(num_at_once)
        self._shortest_s = shortest_s
        self._on_pass = on_pass
        self._resting: dict[Name, _Rest] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._resting)

    def rest(self, namespace: str, name: str, every_s: float, *, first_s: float | None = None) -> bool:
        """Let the deployment rest and look at it every ``every_s``, first in ``first_s``; False when that is too often for rest."""
        if every_s < self._shortest_s:
            self.forget(namespace, name)
            return False
        due = asyncio.get_running_loop().time() + (every_s if first_s is None else first_s)
        self._resting[namespace, name] = _Rest(due=due, every_s=every_s)
        self._wake.set()
        return True

    def forget(self, namespace: str, name: str) -> None:
        """It does not rest any more, or is gone."""
        self._resting.pop((namespace, name), None)

    async def run(self) -> None:
        """Look at what is due until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            due = min((rest.due for rest in self._resting.values()), default=None)
            if due is not None and due <= loop.time():
                namespace, names = self.batch(loop.time())
                await self.look_at(namespace, names)
                continue
            try:
                async with asyncio.timeout(None if due is None else due - loop.time()):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def batch(self, now: float) -> tuple[str, tuple[str, ...]]:
        """A namespace and the deployments in it to look at together: who is due, and with them who will be before long."""
        (namespace, _), first = min(self._resting.items(), key=lambda item: item[1].due)
        soon = sorted(
            (rest.due, name)
            for (where, name), rest in self._resting.items()
            if where == namespace and rest.every_s == first.every_s and rest.due <= now + rest.every_s / 2
        )
        return namespace, tuple(name for _, name in soon[:MOST_AT_ONCE])

    async def look_at(self, namespace: str, names: Sequence[str]) -> None:
        """Look at ``names``; whatever there is to do, or goes wrong, is left to a pass of its own."""
        loop = asyncio.get_running_loop()
        for name in names:
            rest = self._resting[namespace, name]
            rest.due = loop.time() + rest.every_s
        try:
            async with asyncio.timeout(_DEADLINE_S):
                view = await read_at_once(self._kube, namespace, names)
                await asyncio.gather(*(self._one(view, namespace, name) for name in names))
        except Unsettled:
            for name in names:
                self._wakes(namespace, name)
        except (AntiphonError, TimeoutError) as error:
            again = max(_FAILED_AGAIN_S, error.retry_after_s) if isinstance(error, Throttled) else _FAILED_AGAIN_S
            _LOG.warning("deployments at rest could not be looked at, again in %.0f s: %r", again, error)
            for name in names:
                if (namespace, name) in self._resting:
                    self._resting[namespace, name].due = loop.time() + again

    async def _one(self, view: Kube, namespace: str, name: str) -> None:
        async with self._places:
            started = asyncio.get_running_loop().time()
            try:
                again = await self._look(view, namespace, name)
            except Unsettled:
                self._wakes(namespace, name)
                return
            except Exception as error:  # noqa: BLE001 - the queue makes the pass again, tells what is wrong and backs off
                _LOG.info("%s/%s could not be looked at: %r", namespace, name, error)
                self._wakes(namespace, name)
                return
            if self._on_pass is not None:
                self._on_pass(Pass(ok=True, seconds=asyncio.get_running_loop().time() - started))
        if again is None:
            self.forget(namespace, name)
        elif (namespace, name) in self._resting and not self.rest(namespace, name, again):
            self._unsettled(namespace, name)

    def _wakes(self, namespace: str, name: str) -> None:
        self.forget(namespace, name)
        self._unsettled(namespace, name)
