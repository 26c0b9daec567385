"""Deployments at rest are looked at together, with few reads and no write, and whatever there is to do is noticed."""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
from collections.abc import Awaitable, Callable

import pytest

from antiphon_operator.controller.resync import MOST_AT_ONCE, Resync
from antiphon_operator.kube.base import Kube, KubeError, NotFound, ServerFault, Throttled
from antiphon_operator.kube.resources import (
    CONTROLLER_REVISION,
    DISRUPTION_BUDGET,
    EVENT,
    LLM_DEPLOYMENT,
    NETWORK_POLICY,
    RAY_CLUSTER,
    RAY_SERVICE,
    SERVICE,
    SERVING_POOL,
    Resource,
)
from antiphon_operator.reconcile.llm.reconciler import REST_S, LLMReconciler
from antiphon_operator.reconcile.rest_view import NUM_LISTS
from antiphon_operator.render.settings import Runtime, Settings
from antiphon_operator.testing.kuberay import KubeRay
from antiphon_operator.testing.memory_api import MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube

NOW_S = 1_700_000_000.0
NAMES = ("one", "two", "three")
DEADLINE_S = 10.0


async def reconcile(kube: Kube, namespace: str, name: str) -> float | None:
    settings = Settings(runtime=Runtime(image="antiphon/worker:1", ray_version="2.60.0"))
    return await LLMReconciler(kube, settings, clock=lambda: NOW_S).reconcile(namespace, name)


@functools.cache
def rested() -> MemoryApi:
    return asyncio.run(come_to_rest())


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    rested()  # outside of any test's event loop


async def at_rest() -> MemoryApi:
    return copy.deepcopy(rested())


async def come_to_rest() -> MemoryApi:
    api = MemoryApi(clock=lambda: NOW_S)
    kuberay = KubeRay(api=api)
    pools = [{"name": "attention", "role": "attention"}, {"name": "ffn", "role": "ffn"}]
    spec = {"model": {"uri": "/m"}, "topology": "afd", "pools": pools}
    for name in NAMES:
        api.create(LLM_DEPLOYMENT, {"metadata": {"name": name, "namespace": "default"}, "spec": spec}, manager="kubectl")
    resting: set[str] = set()
    for _ in range(30):
        for name in NAMES:
            if await reconcile(MemoryKube(api), "default", name) == REST_S:
                resting.add(name)
        if len(resting) == len(NAMES):
            api.calls.clear()
            api.forget_history()
            return api
        kuberay.tick()
    raise AssertionError("did not come to rest")


class Looking:
    """A resync over ``api`` in which all deployments rest."""

    def __init__(self, api: MemoryApi, look: Callable[[Kube, str, str], Awaitable[float | None]] = reconcile) -> None:
        self.unsettled: list[str] = []
        self.passes = 0
        self.resync = Resync(MemoryKube(api), look, unsettled=lambda _, name: self.unsettled.append(name), on_pass=self.passed)
        for name in NAMES:
            self.resync.rest("default", name, REST_S)

    def passed(self, _: object) -> None:
        self.passes += 1

    async def look(self) -> None:
        await self.resync.look_at("default", NAMES)


async def test_deployments_at_rest_cost_a_read_each_and_nine_lists_together() -> None:
    api = await at_rest()
    looking = Looking(api)
    await looking.look()
    assert (looking.unsettled, looking.passes, len(looking.resync)) == ([], 3, 3)
    assert NUM_LISTS == 9
    assert len(api.calls) == len(NAMES) + NUM_LISTS
    assert not [call for call in api.calls if call.writes]


@pytest.mark.parametrize(
    "resource",
    [SERVICE, DISRUPTION_BUDGET, NETWORK_POLICY, SERVING_POOL, CONTROLLER_REVISION, RAY_SERVICE, RAY_CLUSTER],
    ids=lambda resource: resource.kind,
)
async def test_what_vanished_without_a_word_is_noticed_and_left_to_a_pass_of_its_own(resource: Resource) -> None:
    api = await at_rest()
    names = [item["metadata"]["name"] for item in api.list(resource, "default").items]
    victims = [name for name in names if name.startswith("two")]
    for victim in victims:
        api.delete(resource, "default", victim)
        left = api.get(resource, "default", victim)
        if left is not None:  # KubeRay's finalizer
            left["metadata"]["finalizers"] = []
            api.update(resource, left, manager="kuberay-operator")
    api.calls.clear()
    looking = Looking(api)
    await looking.look()
    assert victims
    assert looking.unsettled == ["two"]
    assert len(looking.resync) == 2
    assert not [call for call in api.calls if call.writes]
    await reconcile(MemoryKube(api), "default", "two")
    assert [call for call in api.calls if call.writes], "a pass of its own had something to do"


async def test_a_change_of_the_document_that_no_watch_told_is_noticed() -> None:
    api = await at_rest()
    live = api.get(LLM_DEPLOYMENT, "default", "two")
    assert live is not None
    live["spec"]["pools"][0]["replicas"] = 2
    api.update(LLM_DEPLOYMENT, live, manager="kubectl")
    looking = Looking(api)
    await looking.look()
    assert looking.unsettled == ["two"]
    assert not [event for event in api.list(EVENT, "default").items if "looked" in event["message"]]


async def test_what_is_gone_is_forgotten() -> None:
    api = await at_rest()
    api.delete(LLM_DEPLOYMENT, "default", "two")
    looking = Looking(api)
    await looking.look()
    assert (looking.unsettled, len(looking.resync)) == ([], 2)


@pytest.mark.parametrize(("error", "wait"), [(ServerFault("oops"), "30 s"), (Throttled("slow", 90.0), "90 s")], ids=["500", "429"])
async def test_a_failing_api_server_is_asked_again_later_and_wakes_nobody(
    error: KubeError, wait: str, caplog: pytest.LogCaptureFixture
) -> None:
    api = MemoryApi(clock=lambda: NOW_S)
    api.faults.append(lambda call: error if call.verb == "list" else None)
    looking = Looking(api)
    with caplog.at_level(logging.WARNING, logger="antiphon_operator.controller.resync"):
        await looking.look()
    assert (looking.unsettled, len(looking.resync)) == ([], 3)
    (record,) = caplog.records
    assert wait in record.getMessage()


async def test_without_kuberay_every_deployment_gets_a_pass_that_says_so() -> None:
    api = MemoryApi(clock=lambda: NOW_S)
    api.faults.append(lambda call: NotFound("no such kind") if call.resource == "rayclusters" else None)
    looking = Looking(api)
    await looking.look()
    assert sorted(looking.unsettled) == sorted(NAMES)


async def test_a_look_that_fails_leaves_only_that_deployment_to_the_queue() -> None:
    async def look(_: Kube, namespace: str, name: str) -> float | None:
        if name == "two":
            raise KeyError("bug")
        return REST_S

    looking = Looking(MemoryApi(clock=lambda: NOW_S), look)
    await looking.look()
    assert looking.unsettled == ["two"]


async def test_a_deployment_that_wants_to_be_seen_often_does_not_rest() -> None:
    looking = Looking(MemoryApi(clock=lambda: NOW_S))
    assert not looking.resync.rest("default", "two", 5.0)
    assert len(looking.resync) == 2


async def test_a_batch_takes_who_is_due_and_who_will_be_before_long_of_one_namespace_and_rhythm() -> None:
    resync = Resync(MemoryKube(MemoryApi(clock=lambda: NOW_S)), reconcile, unsettled=lambda *_: None)
    now = asyncio.get_running_loop().time()
    resync.rest("a", "due", 600.0, first_s=-1.0)
    resync.rest("a", "soon", 600.0, first_s=200.0)
    resync.rest("a", "late", 600.0, first_s=500.0)
    resync.rest("a", "often", 15.0, first_s=0.0)
    resync.rest("b", "elsewhere", 600.0, first_s=0.0)
    assert resync.batch(now) == ("a", ("due", "soon"))
    for index in range(2 * MOST_AT_ONCE):
        resync.rest("c", f"n{index}", 600.0, first_s=-5.0)
    namespace, names = resync.batch(now)
    assert (namespace, len(names)) == ("c", MOST_AT_ONCE)


async def test_who_rests_is_looked_at_again_and_again_in_its_rhythm() -> None:
    seen: list[str] = []
    enough = asyncio.Event()

    async def look(every_s: float, _: Kube, namespace: str, name: str) -> float | None:
        seen.append(name)
        if len(seen) >= 6:
            enough.set()
        return every_s

    resync = Resync(
        MemoryKube(MemoryApi(clock=lambda: NOW_S)), functools.partial(look, 0.02), unsettled=lambda *_: None, shortest_s=0.01
    )
    running = asyncio.create_task(resync.run())
    try:
        resync.rest("default", "a", 0.02)
        resync.rest("default", "b", 0.02, first_s=0.0)
        async with asyncio.timeout(DEADLINE_S):
            await enough.wait()
    finally:
        running.cancel()
        await asyncio.wait((running,))
    assert {"a", "b"} <= set(seen)
