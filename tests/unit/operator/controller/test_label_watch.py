"""A deployment is looked at again when what belongs to it changes, also where its RayService says nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from antiphon_operator.controller.label_watch import WATCHED_BY_LABEL, LabelWatch
from antiphon_operator.kube.base import KubeError, NotFound, ServerFault
from antiphon_operator.kube.resources import HTTP_ROUTE, POD, Resource
from antiphon_operator.testing.memory_api import Call, MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

OURS = {"app.kubernetes.io/managed-by": "antiphon-operator", "serving.antiphon.dev/deployment": "demo"}


def pod(api: MemoryApi, name: str, labels: dict[str, str]) -> None:
    value = {"metadata": {"name": name, "namespace": "default", "labels": labels}, "spec": {}, "status": {"phase": "Running"}}
    api.create(POD, value)


def set_ready(api: MemoryApi, name: str, status: str, **more: Any) -> None:
    live = api.get(POD, "default", name)
    assert live is not None
    conditions = [{"type": "Ready", "status": status}]
    api.update(
        POD, {**live, "status": {"phase": "Running", "conditions": conditions, **more}}, manager="kubelet", subresource="status"
    )


@contextlib.asynccontextmanager
async def watching(api: MemoryApi, kube: MemoryKube, resource: Resource = POD) -> AsyncIterator[asyncio.Queue[tuple[str, str]]]:
    told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    begun = asyncio.Event()

    def seen(call: Call) -> KubeError | None:
        if call.verb == "watch":
            begun.set()
        return None

    api.faults.append(seen)
    watch = LabelWatch(
        kube,
        resource,
        facts=WATCHED_BY_LABEL[resource],
        namespaces=(),
        changed=lambda *key: told.put_nowait(key),
        missing_again_s=0.01,
    )
    task = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(10):
            await begun.wait()
            yield told
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def test_a_pod_that_is_ready_no_more_is_told_once_and_pods_of_others_never() -> None:
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    pod(api, "worker", OURS)
    pod(api, "stranger", {"app": "x"})
    async with watching(api, MemoryKube(api)) as told:
        assert told.empty(), "what is there at the start is no news"
        set_ready(api, "stranger", "False")
        set_ready(api, "worker", "False")
        assert await told.get() == ("default", "demo")
        set_ready(api, "worker", "False", podIP="10.0.0.1")
        api.delete(POD, "default", "worker")
        assert await told.get() == ("default", "demo")
        assert told.empty(), "an address is no news"


async def test_what_happened_while_nothing_was_heard_is_told_afterwards() -> None:
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    pod(api, "worker", OURS)
    kube = MemoryKube(api)
    async with watching(api, kube) as told:
        once = [ServerFault("the API server restarts")]
        api.faults.append(lambda call: once.pop() if once and call.verb in ("list", "watch") else None)
        api.quiet = True
        set_ready(api, "worker", "False")
        api.forget_history()
        api.quiet = False
        kube.cut_watches()
        assert await told.get() == ("default", "demo")


async def test_a_pod_deleted_while_nothing_was_heard_is_told_afterwards() -> None:
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    pod(api, "worker", OURS)
    kube = MemoryKube(api)
    async with watching(api, kube) as told:
        api.quiet = True
        api.delete(POD, "default", "worker")
        api.forget_history()
        api.quiet = False
        kube.cut_watches()
        assert await told.get() == ("default", "demo")


def route(api: MemoryApi) -> None:
    value = {"metadata": {"name": "demo", "namespace": "default", "labels": OURS}, "spec": {"hostnames": ["a.example"]}}
    api.create(HTTP_ROUTE, value)


async def test_a_route_that_somebody_edits_or_deletes_is_told_and_what_its_gateway_says_is_not() -> None:
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    route(api)
    async with watching(api, MemoryKube(api), HTTP_ROUTE) as told:
        live = api.get(HTTP_ROUTE, "default", "demo")
        assert live is not None
        api.update(HTTP_ROUTE, {**live, "status": {"parents": []}}, manager="gateway", subresource="status")
        live = api.get(HTTP_ROUTE, "default", "demo")
        assert live is not None
        api.update(HTTP_ROUTE, {**live, "spec": {"hostnames": ["b.example"]}}, manager="somebody")
        assert await told.get() == ("default", "demo")
        api.delete(HTTP_ROUTE, "default", "demo")
        assert await told.get() == ("default", "demo")
        assert told.empty()


async def test_a_kind_that_is_installed_later_is_watched_and_what_was_made_with_it_is_told() -> None:
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    refusals = [NotFound("no such kind")] * 2
    api.faults.append(lambda call: refusals.pop() if refusals and call.verb == "list" else None)
    route(api)
    async with watching(api, MemoryKube(api), HTTP_ROUTE) as told:
        assert await told.get() == ("default", "demo")
