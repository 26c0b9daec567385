"""The door over HTTPS, with the credentials of a pod or a kubeconfig (control speed).

lightkube finds the server, its certificate and the token; requests are plain REST. Nothing is retried here: the caller's queue
backs off, with the server's Retry-After. Must not know: what is written.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx2
from lightkube.config import client_adapter
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError

from antiphon.core.errors import InvalidInput
from antiphon_operator.kube.base import (
    KubeError,
    Labels,
    Listing,
    Object,
    ServerFault,
    WatchEvent,
    error_of,
    name_of,
    namespace_of,
)
from antiphon_operator.kube.resources import Resource, resource_of

_REQUEST_DEADLINE_S = 30.0
_WATCH_SLACK_S = 15.0  # a watch that is silent this much longer than agreed is dead
_PAGE = 500
_APPLY = "application/apply-patch+yaml"
_JSON_PATCH = "application/json-patch+json"


def load_config(kubeconfig: str | None = None) -> SingleConfig:
    """The cluster to talk to: ``kubeconfig``, else the pod's own, else KUBECONFIG or ~/.kube/config.

    Raises:
        InvalidInput: there is none, or it can't be read.
    """
    try:
        config = KubeConfig.from_file(kubeconfig) if kubeconfig is not None else KubeConfig.from_env()
    except (ConfigError, OSError) as error:
        raise InvalidInput(f"no cluster to talk to: {error}", "kubeconfig") from error
    single = config.get()
    if single is None:
        raise InvalidInput("the kubeconfig has no current context", "kubeconfig")
    return single


class RestKube:
    """``Kube`` over HTTPS. Holds one connection pool; ``close`` it, or use it as a context manager."""

    def __init__(self, config: SingleConfig) -> None:
        timeout = httpx2.Timeout(_REQUEST_DEADLINE_S)
        self._client = client_adapter.AsyncClient(config, client_adapter.ConnectionParams(timeout=timeout))

    async def __aenter__(self) -> RestKube:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; again does nothing."""
        await self._client.aclose()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """See Kube."""
        response = await self._send("GET", _path(resource, namespace, name))
        return None if response.status_code == 404 else _checked(response)

    async def list(self, resource: Resource, namespace: str | None = None, labels: Labels | None = None) -> Listing:
        """See Kube."""
        params = {"limit": str(_PAGE)} | _selector(labels)
        items: list[Object] = []
        while True:
            page = _checked(await self._send("GET", _path(resource, namespace), params=params))
            for item in page.get("items") or ():
                items.append({"apiVersion": resource.api_version, "kind": resource.kind, **item})
            following = page["metadata"].get("continue")
            if not following:
                return Listing(items=tuple(items), resource_version=page["metadata"]["resourceVersion"])
            params["continue"] = following

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
        params = {"watch": "true", "resourceVersion": resource_version, "timeoutSeconds": str(max(1, int(timeout_s)))}
        request = self._client.build_request(
            "GET",
            _path(resource, namespace),
            params=params | _selector(labels),
            timeout=httpx2.Timeout(_REQUEST_DEADLINE_S, read=timeout_s + _WATCH_SLACK_S),
        )
        try:
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code >= 400:
                    await response.aread()
                    _checked(response)
                async for line in response.aiter_lines():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise error_of(int(status.get("code", 500)), str(status.get("message", status)))
                    if event["type"] != "BOOKMARK":
                        yield WatchEvent(type=event["type"], object=event["object"])
            finally:
                await response.aclose()
        except httpx2.TransportError as error:
            raise ServerFault(f"watch of {resource.plural} broke: {error!r}") from error

    async def apply(self, value: Object, *, manager: str, force: bool = False) -> Object:
        """See Kube."""
        return await self._apply(value, "", manager, force=force)

    async def apply_status(self, value: Object, *, manager: str) -> Object:
        """See Kube."""
        return await self._apply(value, "/status", manager, force=True)

    async def json_patch(
        self, resource: Resource, namespace: str | None, name: str, patch: Sequence[Object], *, manager: str
    ) -> Object:
        """See Kube."""
        response = await self._send(
            "PATCH",
            _path(resource, namespace, name),
            params={"fieldManager": manager},
            body=json.dumps(list(patch)),
            content_type=_JSON_PATCH,
        )
        return _checked(response)

    async def delete(self, resource: Resource, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """See Kube."""
        options: Object = {"propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        response = await self._send("DELETE", _path(resource, namespace, name), body=json.dumps(options))
        if response.status_code != 404:
            _checked(response)

    async def _apply(self, value: Object, subresource: str, manager: str, *, force: bool) -> Object:
        resource = resource_of(value["apiVersion"], value["kind"])
        response = await self._send(
            "PATCH",
            _path(resource, namespace_of(value), name_of(value)) + subresource,
            params={"fieldManager": manager, "force": "true" if force else "false"},
            body=json.dumps(value),
            content_type=_APPLY,
        )
        return _checked(response)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: str | None = None,
        content_type: str = "application/json",
    ) -> httpx2.Response:
        headers = {"Content-Type": content_type} if body is not None else {}
        try:
            return await self._client.request(method, path, params=dict(params or {}), content=body, headers=headers)
        except httpx2.TransportError as error:
            raise ServerFault(f"{method} {path}: {error!r}") from error


def _path(resource: Resource, namespace: str | None, name: str | None = None) -> str:
    parts = ["api"] if not resource.group else ["apis", resource.group]
    parts.append(resource.version)
    if namespace is not None and resource.namespaced:
        parts += ["namespaces", namespace]
    parts.append(resource.plural)
    if name is not None:
        parts.append(name)
    return "/" + "/".join(urllib.parse.quote(part, safe="") for part in parts)


def _selector(labels: Labels | None) -> dict[str, str]:
    if not labels:
        return {}
    parts = (f"{key}={of}" if isinstance(of, str) else f"{key} in ({','.join(sorted(of))})" for key, of in sorted(labels.items()))
    return {"labelSelector": ",".join(parts)}


def _checked(response: httpx2.Response) -> Object:
    if response.status_code < 400:
        value: Any = response.json()
        return dict(value)
    raise _error(response)


def _error(response: httpx2.Response) -> KubeError:
    try:
        message = str(response.json().get("message", response.text))
    except (ValueError, AttributeError):
        message = response.text[:512]
    wait = response.headers.get("Retry-After")
    return error_of(response.status_code, message, float(wait) if wait is not None and wait.isdigit() else None)
