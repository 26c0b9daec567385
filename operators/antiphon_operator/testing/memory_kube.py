"""The operator's door onto a MemoryApi in the same process (control speed).

Must not know: HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from antiphon_operator.kube.base import Labels, Listing, NotFound, Object, WatchEvent
from antiphon_operator.kube.resources import Resource, resource_of
from antiphon_operator.testing.memory_api import MemoryApi


class MemoryKube:
    """``Kube`` over a MemoryApi. ``cut_watches`` ends every watch that is open."""

    def __init__(self, api: MemoryApi) -> None:
        self.api = api
        self._cut = asyncio.Event()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """See Kube."""
        return self.api.get(resource, namespace, name)

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Listing:
        """See Kube."""
        return self.api.list(resource, namespace, labels)

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        resource_version: str,
        labels: Labels | None = None,
        timeout_s: float = 300.0,
    ) -> AsyncIterator[WatchEvent]:
        """See Kube."""
        self.api.begin_watch(resource, namespace)
        wake, cut, version = asyncio.Event(), self._cut, int(resource_version)
        deadline = asyncio.get_running_loop().time() + timeout_s
        self.api.listeners.append(wake.set)
        try:
            while not cut.is_set():
                wake.clear()
                events, version = self.api.events_since(resource, namespace, version, labels)
                for event in events:
                    yield event
                remaining = deadline - asyncio.get_running_loop().time()
                if remaining <= 0:
                    return
                if not events:
                    await self._wait(wake, cut, remaining)
        finally:
            self.api.listeners.remove(wake.set)

    def cut_watches(self) -> None:
        """End every open watch, as a restarting API server does."""
        self._cut.set()
        self._cut = asyncio.Event()

    async def apply(self, value: Object, *, manager: str, force: bool = False) -> Object:
        """See Kube."""
        return self.api.apply(resource_of(value["apiVersion"], value["kind"]), value, manager=manager, force=force)

    async def apply_status(self, value: Object, *, manager: str) -> Object:
        """See Kube."""
        resource = resource_of(value["apiVersion"], value["kind"])
        return self.api.apply(resource, value, manager=manager, force=True, subresource="status")

    async def json_patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Sequence[Object], *, manager: str
    ) -> Object:
        """See Kube."""
        return self.api.json_patch(resource, namespace, name, patch, manager=manager)

    async def delete(self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """See Kube."""
        try:
            self.api.delete(resource, namespace, name, uid=uid)
        except NotFound:
            return

    @staticmethod
    async def _wait(wake: asyncio.Event, cut: asyncio.Event, timeout_s: float) -> None:
        tasks = [asyncio.create_task(wake.wait()), asyncio.create_task(cut.wait())]
        try:
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
