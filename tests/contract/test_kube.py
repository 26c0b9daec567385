"""The contract of the door to Kubernetes, over the in-memory API, over HTTP, and over a real API server where there is one."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from antiphon_operator.api.crds import definitions
from antiphon_operator.kube.base import (
    Conflict,
    Gone,
    Kube,
    KubeError,
    NotFound,
    Refused,
    ServerFault,
    Throttled,
    UnknownField,
    WatchEvent,
    name_of,
    owner_reference,
)
from antiphon_operator.kube.resources import CONFIG_MAP, SERVING_POOL
from antiphon_operator.kube.rest import RestKube, load_config
from antiphon_operator.testing.http_api import HttpApi
from antiphon_operator.testing.memory_api import Call, MemoryApi
from antiphon_operator.testing.memory_kube import MemoryKube
from antiphon_operator.testing.real_api import ApiServer, find_assets

DEADLINE_S = 10.0


@dataclass
class Door:
    kube: Kube
    namespace: str
    api: MemoryApi | None
    cut_watches: Callable[[], None] | None


KUBECONFIG = os.environ.get("ANTIPHON_TEST_KUBECONFIG")
NAMESPACE = os.environ.get("ANTIPHON_TEST_NAMESPACE", "default")
ASSETS = find_assets()
PREFIX = f"t-{uuid.uuid4().hex[:6]}-"  # of this run: what it made on a cluster is deleted by it


@pytest.fixture(scope="module")
def api_server() -> Iterator[ApiServer]:
    assert ASSETS is not None
    with ApiServer(ASSETS) as server:
        server.install(definitions())
        yield server


def only_with(present: bool, name: str, why: str) -> Any:
    return pytest.param(name, marks=pytest.mark.skipif(not present, reason=why))


@pytest.fixture(
    params=[
        "memory",
        "http",
        only_with(ASSETS is not None, "envtest", "KUBEBUILDER_ASSETS names no directory with etcd and kube-apiserver"),
        only_with(KUBECONFIG is not None, "cluster", "ANTIPHON_TEST_KUBECONFIG names no throw-away cluster"),
    ]
)
async def door(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Door]:
    api = MemoryApi(clock=lambda: 1_700_000_000.0)
    path = tmp_path / "kubeconfig"
    if request.param == "memory":
        kube = MemoryKube(api)
        yield Door(kube, "default", api, kube.cut_watches)
    elif request.param == "http":
        async with HttpApi(api) as server:
            path.write_text(server.kubeconfig())
            async with RestKube(load_config(str(path))) as rest:
                yield Door(rest, "default", api, server.cut_watches)
    else:
        if request.param == "envtest":
            path.write_text(request.getfixturevalue("api_server").kubeconfig())
        async with RestKube(load_config(str(path) if request.param == "envtest" else KUBECONFIG)) as rest:
            namespace = "default" if request.param == "envtest" else NAMESPACE
            yield Door(rest, namespace, None, None)
            for resource in (CONFIG_MAP, SERVING_POOL):
                for item in (await rest.list(resource, namespace)).items:
                    if name_of(item).startswith(PREFIX):
                        await rest.delete(resource, namespace, name_of(item))


def config(door: Door, name: str, **data: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": door.namespace},
        "data": data,
    }


def pool(door: Door, name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.antiphon.dev/v1alpha1",
        "kind": "ServingPool",
        "metadata": {"name": name, "namespace": door.namespace},
        "spec": {"deployment": "d", "pool": "p", "role": "decode", "mode": "External", **spec},
    }


def fresh() -> str:
    return f"{PREFIX}{uuid.uuid4().hex[:8]}"


async def test_what_is_not_there_is_none(door: Door) -> None:
    assert await door.kube.get(CONFIG_MAP, door.namespace, fresh()) is None


async def test_apply_creates_and_get_reads(door: Door) -> None:
    name = fresh()
    created = await door.kube.apply(config(door, name, a="1"), manager="one")
    read = await door.kube.get(CONFIG_MAP, door.namespace, name)
    assert read is not None
    assert read["data"] == {"a": "1"}
    assert read["metadata"]["uid"] == created["metadata"]["uid"]


async def test_the_same_apply_again_changes_nothing(door: Door) -> None:
    name = fresh()
    first = await door.kube.apply(config(door, name, a="1"), manager="one")
    second = await door.kube.apply(config(door, name, a="1"), manager="one")
    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


async def test_generation_counts_changes_of_the_spec_only(door: Door) -> None:
    name = fresh()
    value = await door.kube.apply(pool(door, name, replicas=1, minReplicas=0, maxReplicas=4), manager="one")
    assert value["metadata"]["generation"] == 1
    value["metadata"] = {"name": name, "namespace": door.namespace}
    await door.kube.apply_status({**value, "status": {"replicas": 3}}, manager="one")
    changed = await door.kube.apply(pool(door, name, replicas=2, minReplicas=0, maxReplicas=4), manager="one")
    assert changed["metadata"]["generation"] == 2


async def test_status_is_apart_from_the_spec(door: Door) -> None:
    name = fresh()
    await door.kube.apply(pool(door, name, replicas=1, minReplicas=0, maxReplicas=4), manager="one")
    with_both = pool(door, name, replicas=9, minReplicas=0, maxReplicas=4) | {"status": {"replicas": 3}}
    after = await door.kube.apply_status(with_both, manager="one")
    assert after["spec"]["replicas"] == 1
    assert after["status"]["replicas"] == 3
    again = await door.kube.apply(pool(door, name, replicas=2, minReplicas=0, maxReplicas=4), manager="one")
    assert again["status"]["replicas"] == 3


async def test_a_field_that_the_only_owner_leaves_out_is_deleted(door: Door) -> None:
    name = fresh()
    await door.kube.apply(config(door, name, a="1", b="2"), manager="one")
    assert (await door.kube.apply(config(door, name, a="1"), manager="one"))["data"] == {"a": "1"}


async def test_a_field_with_a_second_owner_stays(door: Door) -> None:
    name = fresh()
    await door.kube.apply(config(door, name, a="1", b="2"), manager="one")
    await door.kube.apply(config(door, name, b="2"), manager="two")
    assert (await door.kube.apply(config(door, name, a="1"), manager="one"))["data"] == {"a": "1", "b": "2"}


async def test_another_managers_value_is_a_conflict_that_names_it(door: Door) -> None:
    name = fresh()
    await door.kube.apply(config(door, name, a="1"), manager="one")
    with pytest.raises(Conflict, match="one"):
        await door.kube.apply(config(door, name, a="2"), manager="two")


async def test_a_field_that_the_schema_lacks_is_told_from_a_failing_server(door: Door) -> None:
    if door.api is not None:
        pytest.skip("the in-memory API leaves schemas to the API server")
    with pytest.raises(UnknownField, match="surprise"):
        await door.kube.apply(pool(door, fresh(), surprise=1), manager="one")


async def test_force_takes_the_field(door: Door) -> None:
    name = fresh()
    await door.kube.apply(config(door, name, a="1"), manager="one")
    assert (await door.kube.apply(config(door, name, a="2"), manager="two", force=True))["data"] == {"a": "2"}


async def test_managed_fields_say_who_owns_what(door: Door) -> None:
    name = fresh()
    value = await door.kube.apply(config(door, name, a="1"), manager="one")
    (entry,) = [e for e in value["metadata"]["managedFields"] if e["manager"] == "one"]
    assert entry["operation"] == "Apply"
    assert "f:a" in entry["fieldsV1"]["f:data"]


async def test_a_list_is_narrowed_by_labels(door: Door) -> None:
    name, mark = fresh(), fresh()
    labelled = config(door, name, a="1")
    labelled["metadata"]["labels"] = {"mark": mark}
    await door.kube.apply(labelled, manager="one")
    await door.kube.apply(config(door, fresh(), a="1"), manager="one")
    listing = await door.kube.list(CONFIG_MAP, door.namespace, {"mark": mark})
    assert [item["metadata"]["name"] for item in listing.items] == [name]
    assert listing.items[0]["kind"] == "ConfigMap"


async def test_a_list_is_narrowed_by_any_of_several_labels(door: Door) -> None:
    names = [fresh(), fresh(), fresh()]
    for name in names:
        labelled = config(door, name, a="1")
        labelled["metadata"]["labels"] = {"mark": name}
        await door.kube.apply(labelled, manager="one")
    listing = await door.kube.list(CONFIG_MAP, door.namespace, {"mark": frozenset(names[:2])})
    assert sorted(item["metadata"]["name"] for item in listing.items) == sorted(names[:2])


async def test_a_json_patch_changes_and_a_failed_test_refuses(door: Door) -> None:
    name = fresh()
    await door.kube.apply(config(door, name, a="1"), manager="one")
    patch = [{"op": "test", "path": "/data/a", "value": "1"}, {"op": "replace", "path": "/data/a", "value": "2"}]
    assert (await door.kube.json_patch(CONFIG_MAP, door.namespace, name, patch, manager="two"))["data"] == {"a": "2"}
    with pytest.raises((Refused, Conflict)):
        await door.kube.json_patch(CONFIG_MAP, door.namespace, name, patch, manager="two")


async def test_a_json_patch_of_an_old_version_is_refused(door: Door) -> None:
    name = fresh()
    old = (await door.kube.apply(config(door, name, a="1"), manager="one"))["metadata"]["resourceVersion"]
    await door.kube.apply(config(door, name, a="2"), manager="one")
    patch = [
        {"op": "test", "path": "/metadata/resourceVersion", "value": old},
        {"op": "replace", "path": "/data/a", "value": "3"},
    ]
    with pytest.raises((Conflict, Refused)):
        await door.kube.json_patch(CONFIG_MAP, door.namespace, name, patch, manager="one")


async def test_a_json_patch_of_nothing_is_not_found(door: Door) -> None:
    with pytest.raises(NotFound):
        await door.kube.json_patch(CONFIG_MAP, door.namespace, fresh(), [], manager="one")


async def test_delete_removes_and_again_is_no_error(door: Door) -> None:
    name = fresh()
    await door.kube.apply(config(door, name, a="1"), manager="one")
    await door.kube.delete(CONFIG_MAP, door.namespace, name)
    assert await door.kube.get(CONFIG_MAP, door.namespace, name) is None
    await door.kube.delete(CONFIG_MAP, door.namespace, name)


async def test_delete_of_another_uid_is_refused(door: Door) -> None:
    name = fresh()
    await door.kube.apply(config(door, name, a="1"), manager="one")
    with pytest.raises(Conflict):
        await door.kube.delete(CONFIG_MAP, door.namespace, name, uid="another")


async def test_what_an_object_owns_goes_with_it(door: Door) -> None:
    if door.api is None:
        pytest.skip("a bare API server runs no garbage collector")
    parent, child = fresh(), fresh()
    owner = await door.kube.apply(config(door, parent, a="1"), manager="one")
    owned = config(door, child, a="1")
    owned["metadata"]["ownerReferences"] = [owner_reference(owner)]
    await door.kube.apply(owned, manager="one")
    await door.kube.delete(CONFIG_MAP, door.namespace, parent)
    assert await door.kube.get(CONFIG_MAP, door.namespace, child) is None


async def collect(stream: AsyncIterator[WatchEvent], count: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    async with asyncio.timeout(DEADLINE_S):
        async for event in stream:
            found.append((event.type, event.object["metadata"]["name"]))
            if len(found) == count:
                return found
    return found


async def test_a_watch_tells_every_change_after_its_version(door: Door) -> None:
    name, mark = fresh(), fresh()
    value = config(door, name, a="1")
    value["metadata"]["labels"] = {"mark": mark}
    start = (await door.kube.list(CONFIG_MAP, door.namespace)).resource_version
    await door.kube.apply(value, manager="one")
    await door.kube.apply({**value, "data": {"a": "2"}}, manager="one")
    await door.kube.delete(CONFIG_MAP, door.namespace, name)
    stream = door.kube.watch(CONFIG_MAP, door.namespace, resource_version=start, labels={"mark": mark})
    assert await collect(stream, 3) == [("ADDED", name), ("MODIFIED", name), ("DELETED", name)]


async def test_a_watch_ends_when_it_is_cut(door: Door) -> None:
    if door.cut_watches is None:
        pytest.skip("a real API server is not restarted by a test")
    start = (await door.kube.list(CONFIG_MAP, door.namespace)).resource_version
    task = asyncio.create_task(collect(door.kube.watch(CONFIG_MAP, door.namespace, resource_version=start), 1))
    async with asyncio.timeout(DEADLINE_S):
        while door.api is not None and not door.api.listeners:
            await asyncio.sleep(0)
    door.cut_watches()
    async with asyncio.timeout(DEADLINE_S):
        assert await task == []


async def test_a_watch_ends_after_its_time(door: Door) -> None:
    start = (await door.kube.list(SERVING_POOL, door.namespace)).resource_version
    stream = door.kube.watch(SERVING_POOL, door.namespace, resource_version=start, timeout_s=1.0)
    assert await collect(stream, 1) == []


async def test_a_watch_from_a_forgotten_version_is_gone(door: Door) -> None:
    if door.api is None:
        pytest.skip("a real API server forgets in its own time")
    await door.kube.apply(config(door, fresh(), a="1"), manager="one")
    door.api.forget_history()
    with pytest.raises(Gone):
        await collect(door.kube.watch(CONFIG_MAP, door.namespace, resource_version="0"), 1)


@pytest.mark.parametrize("error", [Throttled("slow down", 7.0), ServerFault("oops"), Conflict("busy"), Refused("no")])
async def test_a_failure_keeps_its_kind(door: Door, error: KubeError) -> None:
    if door.api is None:
        pytest.skip("a real API server does not fail on demand")

    def fault(call: Call) -> KubeError | None:
        return error if call.verb == "list" else None

    door.api.faults.append(fault)
    with pytest.raises(type(error)) as caught:
        await door.kube.list(CONFIG_MAP, door.namespace)
    if isinstance(caught.value, Throttled):
        assert caught.value.retry_after_s == 7.0
