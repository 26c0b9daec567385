"""A MemoryApi behind Kubernetes' REST paths, on loopback: what kopf, lightkube and kubectl speak to in tests (control speed).

Must not know: the operator.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import yaml
from aiohttp import web

from antiphon_operator.kube.base import Gone, KubeError, Labels, NotFound, Object, Throttled
from antiphon_operator.kube.resources import RESOURCES, Resource
from antiphon_operator.render.canonical import parse_yaml
from antiphon_operator.testing.memory_api import MemoryApi

# kopf asks whether the server knows namespaces before it watches any.
_NAMESPACE = Resource(group="", version="v1", kind="Namespace", plural="namespaces", namespaced=False)
_REQUIREMENT = re.compile(r"([^,\s=]+)(?:\s+in\s+\(([^)]*)\)|={1,2}([^,]*))")  # key in (a,b), key=a, key==a
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class HttpApi:
    """Serves ``api`` on a free loopback port. Use as an async context manager; ``url`` is its address."""

    def __init__(self, api: MemoryApi, resources: Sequence[Resource] = RESOURCES) -> None:
        self.api = api
        self.url = ""
        self._resources = {(r.group, r.version, r.plural): r for r in (*resources, _NAMESPACE)}
        self._runner: web.AppRunner | None = None
        self._cut = asyncio.Event()

    async def __aenter__(self) -> HttpApi:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_get("/version", self._version)
        app.router.add_get("/api", self._core)
        app.router.add_get("/apis", self._groups)
        for prefix in ("/api/{version}", "/apis/{group}/{version}"):
            app.router.add_get(prefix, self._discover)
            for space in ("/namespaces/{namespace}", ""):  # the longer paths first
                app.router.add_route("*", f"{prefix}{space}/{{plural}}", self._collection)
                app.router.add_route("*", f"{prefix}{space}/{{plural}}/{{name}}", self._item)
                app.router.add_route("*", f"{prefix}{space}/{{plural}}/{{name}}/{{subresource}}", self._item)
        self._runner = web.AppRunner(app, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut_watches()
        if self._runner is not None:
            await self._runner.cleanup()

    def cut_watches(self) -> None:
        """End every open watch, as a restarting API server does."""
        self._cut.set()
        self._cut = asyncio.Event()

    def kubeconfig(self, namespace: str = "default") -> str:
        """A kubeconfig that leads here, as YAML."""
        return str(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "memory",
                    "contexts": [{"name": "memory", "context": {"cluster": "memory", "user": "tester", "namespace": namespace}}],
                    "clusters": [{"name": "memory", "cluster": {"server": self.url}}],
                    "users": [{"name": "tester", "user": {"token": "none"}}],
                }
            )
        )

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"major": "1", "minor": "36", "gitVersion": "v1.36.0"})

    async def _core(self, _: web.Request) -> web.Response:
        return web.json_response({"kind": "APIVersions", "versions": ["v1"]})

    async def _groups(self, _: web.Request) -> web.Response:
        groups = sorted({(group, version) for group, version, _ in self._resources if group})
        return web.json_response(
            {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {
                        "name": group,
                        "versions": [{"groupVersion": f"{group}/{version}", "version": version}],
                        "preferredVersion": {"groupVersion": f"{group}/{version}", "version": version},
                    }
                    for group, version in groups
                ],
            }
        )

    async def _discover(self, request: web.Request) -> web.Response:
        group, version = request.match_info.get("group", ""), request.match_info["version"]
        found: list[Object] = []
        for (at_group, at_version, plural), resource in sorted(self._resources.items()):
            if (at_group, at_version) == (group, version):
                entry = {"kind": resource.kind, "namespaced": resource.namespaced, "singularName": resource.kind.lower()}
                found.append({**entry, "name": plural, "verbs": _VERBS, "shortNames": [], "categories": []})
                found.append({**entry, "name": f"{plural}/status", "verbs": ["get", "patch", "update"]})
        if not found:
            return _failure(NotFound("the server could not find the requested resource"))
        group_version = f"{group}/{version}" if group else version
        return web.json_response({"kind": "APIResourceList", "groupVersion": group_version, "resources": found})

    def _resource(self, request: web.Request) -> Resource:
        key = (request.match_info.get("group", ""), request.match_info["version"], request.match_info["plural"])
        resource = self._resources.get(key)
        if resource is None:
            raise NotFound("the server could not find the requested resource")
        return resource

    async def _collection(self, request: web.Request) -> web.StreamResponse:
        namespace = request.match_info.get("namespace")
        try:
            resource = self._resource(request)
            if request.method == "POST":
                value = await request.json()
                value["metadata"].setdefault("namespace", namespace)
                manager = request.query.get("fieldManager", "unknown")
                return web.json_response(self.api.create(resource, value, manager=manager), status=201)
            labels = _labels(request.query.get("labelSelector"))
            if request.query.get("watch") in ("true", "1"):
                return await self._watch(request, resource, namespace, labels)
            listing = self.api.list(resource, namespace, labels)
            return web.json_response(
                {
                    "kind": f"{resource.kind}List",
                    "apiVersion": resource.api_version,
                    "metadata": {"resourceVersion": listing.resource_version},
                    "items": list(listing.items),
                }
            )
        except KubeError as error:
            return _failure(error)

    async def _watch(self, request: web.Request, resource: Resource, namespace: str | None, labels: Labels) -> web.StreamResponse:
        self.api.begin_watch(resource, namespace)
        version = int(request.query.get("resourceVersion") or 0)
        # Whole seconds: a fraction is an error, as it is to a real API server.
        deadline = time.monotonic() + int(request.query.get("timeoutSeconds") or 300)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        wake, cut = asyncio.Event(), self._cut
        self.api.listeners.append(wake.set)
        try:
            while not cut.is_set() and time.monotonic() < deadline:
                wake.clear()
                try:
                    events, version = self.api.events_since(resource, namespace, version, labels)
                except Gone as error:
                    await response.write(_line("ERROR", _status(error)))
                    break
                for event in events:
                    await response.write(_line(event.type, event.object))
                if not events:
                    await self._idle(wake, cut, deadline)
        except ConnectionResetError:
            pass  # the client left
        finally:
            self.api.listeners.remove(wake.set)
        return response

    @staticmethod
    async def _idle(wake: asyncio.Event, cut: asyncio.Event, deadline: float) -> None:
        tasks = [asyncio.create_task(wake.wait()), asyncio.create_task(cut.wait())]
        try:
            timeout = max(0.0, deadline - time.monotonic())
            await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _item(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info.get("namespace"), request.match_info["name"]
        try:
            resource = self._resource(request)
            subresource = request.match_info.get("subresource", "")
            manager = request.query.get("fieldManager", request.headers.get("User-Agent", "unknown").partition("/")[0])
            if request.method == "GET":
                value = self.api.get(resource, namespace, name)
                if value is None:
                    raise NotFound(f"{resource.plural} {name!r} not found")
                return web.json_response(_scale_of(value) if subresource == "scale" else value)
            if request.method == "DELETE":
                options = json.loads(await request.text() or "{}")
                self.api.delete(resource, namespace, name, uid=options.get("preconditions", {}).get("uid"))
                return web.json_response({"kind": "Status", "status": "Success"})
            body: Any = parse_yaml(await request.text())
            if subresource == "scale":
                patch = {"spec": {"replicas": body["spec"]["replicas"]}}
                done = self.api.merge_patch(resource, namespace, name, patch, manager=manager)
                return web.json_response(_scale_of(done))
            if request.method == "PUT":
                return web.json_response(self.api.update(resource, body, manager=manager, subresource=subresource))
            return web.json_response(
                self._patch(request, resource, namespace, name, body, manager=manager, subresource=subresource)
            )
        except KubeError as error:
            return _failure(error)

    def _patch(
        self,
        request: web.Request,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Any,
        *,
        manager: str,
        subresource: str,
    ) -> Object:
        if request.content_type == "application/apply-patch+yaml":
            body["metadata"].setdefault("namespace", namespace)
            force = request.query.get("force") == "true"
            return self.api.apply(resource, body, manager=manager, force=force, subresource=subresource)
        if request.content_type == "application/json-patch+json":
            return self.api.json_patch(resource, namespace, name, body, manager=manager, subresource=subresource)
        return self.api.merge_patch(resource, namespace, name, body, manager=manager, subresource=subresource)


def _scale_of(value: Object) -> Object:
    status = value.get("status", {})
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {key: value["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")},
        "spec": {"replicas": value["spec"].get("replicas", 0)},
        "status": {"replicas": status.get("replicas", 0), "selector": status.get("selector", "")},
    }


def _labels(selector: str | None) -> Labels:
    found: dict[str, str | frozenset[str]] = {}
    for key, values, value in _REQUIREMENT.findall(selector or ""):
        found[key] = frozenset(part.strip() for part in values.split(",")) if values else value
    return found


def _status(error: KubeError) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": type(error).__name__,
        "code": error.status,
        "message": str(error),
    }


def _failure(error: KubeError) -> web.Response:
    headers = {"Retry-After": str(max(0, round(error.retry_after_s)))} if isinstance(error, Throttled) else {}
    return web.json_response(_status(error), status=error.status, headers=headers)


def _line(type_: str, value: Object) -> bytes:
    return json.dumps({"type": type_, "object": value}).encode() + b"\n"
