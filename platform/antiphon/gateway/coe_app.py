"""Runs one composition door process: HTTP and gRPC over routers whose experts are other processes (control speed).

    start: load artifacts ─► bind ─► serve, looking for changed artifacts        stop: close the doors

Must not know: Ray, files of documents.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from antiphon.coe.artifact import Artifact, load_artifact
from antiphon.coe.router import Router
from antiphon.core.composition import CompositionOfExperts, ExternalEndpoint
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.gateway.auth import ApiKeys
from antiphon.gateway.coe_composition import Composition
from antiphon.gateway.coe_grpc import CoeGrpcDoor
from antiphon.gateway.coe_http import CoeDoor
from antiphon.gateway.config import BoundPorts
from antiphon.gateway.http_io import NotFound, RequestIds, error_response
from antiphon.gateway.http_server import HttpServer
from antiphon.rpc.channels import ChannelLimits
from antiphon.rpc.router_service import RouterServicer
from antiphon.rpc.services import RpcServer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoeConfig:
    """Addresses, experts and limits of one composition door process."""

    documents: tuple[CompositionOfExperts, ...]
    endpoints: Mapping[str, ExternalEndpoint] = field(default_factory=dict)  # deploymentRef → where it is reached
    host: str = "127.0.0.1"
    http_port: int = 8100  # 0 = any free port
    grpc_port: int = 9100  # 0 = any free port
    reuse_port: bool = False  # several routers of one machine share the ports
    api_keys: frozenset[str] = field(default_factory=frozenset)  # empty = open
    max_request_bytes: int = 4 * 2**20
    refresh_s: float = 5.0  # between looks for a changed artifact


async def run_coe(config: CoeConfig, stop: asyncio.Event, *, on_bound: Callable[[BoundPorts], None] | None = None) -> None:
    """Serve until ``stop`` is set.

    Raises:
        CheckpointInvalid: an artifact can't be loaded; the message names it.
        InvalidInput: a document and its artifact don't fit, or an expert has no endpoint.
        Unavailable: an address can't be bound.
    """
    compositions = {
        document.metadata.name: await asyncio.to_thread(composition_of, document, config) for document in config.documents
    }
    keys = ApiKeys(config.api_keys)
    door = CoeDoor(_alone(), compositions, keys=keys, max_request_bytes=config.max_request_bytes)
    http = HttpServer(RequestIds(door), host=config.host, port=config.http_port, reuse_port=config.reuse_port)
    grpc = RpcServer(
        [RouterServicer(CoeGrpcDoor(compositions, keys))],
        host=config.host,
        port=config.grpc_port,
        reuse_port=config.reuse_port,
        limits=ChannelLimits(max_message_bytes=config.max_request_bytes),
    )
    tasks: list[asyncio.Task[None]] = []
    try:
        await http.start()
        await grpc.start()
        if on_bound is not None:
            on_bound(BoundPorts(host=config.host, http_port=http.port, grpc_port=grpc.port))
        watch = _watch(list(compositions.values()), config.refresh_s)
        tasks = [asyncio.create_task(_wait(stop)), asyncio.create_task(http.failed()), asyncio.create_task(watch)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a loop that failed raises here
        await grpc.drain()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await grpc.close()
        await http.close()
        await door.close()


def composition_of(document: CompositionOfExperts, config: CoeConfig) -> Composition:
    """One composition, its artifact loaded.

    Raises:
        CheckpointInvalid: the artifact can't be loaded.
        InvalidInput: document and artifact don't fit, or an expert has no endpoint.
    """
    endpoints = {}
    for expert in document.spec.experts:
        if expert.deployment_ref is None:
            continue
        if expert.deployment_ref not in config.endpoints:
            raise InvalidInput(
                f"expert {expert.name}: no endpoint is known for deployment {expert.deployment_ref!r}", "spec.experts"
            )
        endpoints[expert.name] = config.endpoints[expert.deployment_ref]
    router = Router(document.spec, _load(document), replica=f"{config.host}:{os.getpid()}")
    return Composition(document, router, models={}, endpoints=endpoints, workers=lambda: (), clock=time.monotonic)


def artifact_directory(document: CompositionOfExperts) -> Path | None:
    """Where the document's artifact is; None when it has none.

    Raises:
        InvalidInput: the uri is not a path of this machine.
    """
    reference = document.spec.router.artifact
    if reference is None:
        return None
    scheme, separator, rest = reference.uri.partition("://")
    if not separator:
        return Path(reference.uri)
    if scheme != "file":
        raise InvalidInput(
            f"artifact {reference.uri}: only paths and file:// are read here; mount others", "spec.router.artifact.uri"
        )
    return Path(rest)


def _load(document: CompositionOfExperts) -> Artifact | None:
    directory = artifact_directory(document)
    if directory is None:
        return None
    router = document.spec.router
    digest = None if router.artifact is None else router.artifact.digest
    return load_artifact(directory, slow_path=router.slow_path == "auto", digest=digest)


async def _watch(compositions: Sequence[Composition], refresh_s: float) -> None:
    """Swap in artifacts whose manifest changed; one that can't be loaded is named in the log and the old one goes on."""
    seen = {c.name: _stamp(c) for c in compositions}
    while True:
        await asyncio.sleep(refresh_s)
        for composition in compositions:
            stamp = _stamp(composition)
            if stamp is None or stamp == seen[composition.name]:
                continue
            seen[composition.name] = stamp
            try:
                artifact = await asyncio.to_thread(_load, composition.document)
                if artifact is not None:
                    composition.router.swap(artifact)
            except AntiphonError as error:
                _log.error("%s: the new artifact is refused, the old one goes on: %s", composition.name, error)


def _stamp(composition: Composition) -> tuple[int, int] | None:
    directory = artifact_directory(composition.document)
    if directory is None:
        return None
    try:
        found = (directory / "manifest.json").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


def _alone() -> FastAPI:
    """What stands behind the door when this process serves no model itself."""
    app = FastAPI(title="Antiphon router", docs_url=None, redoc_url=None)

    @app.get("/health")
    @app.get("/ready")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": []})

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def other(path: str) -> Response:
        return error_response(NotFound(f"there is no /{path} for this model here; compositions are named coe/<name>"))

    return app
