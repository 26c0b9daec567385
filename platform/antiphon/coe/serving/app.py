"""Runs one router process: the Router service, and the composition doors when its experts are elsewhere (control speed).

    start: load artifacts ─► look into the directory ─► bind ─► note the address ─► serve, looking around now and then
    stop:  take the address back ─► close the doors

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

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp

from antiphon.coe.serving.artifacts import WatchedRoutes
from antiphon.coe.serving.composition import Composition
from antiphon.coe.serving.doors.expert_key import check_key_host, check_lending
from antiphon.coe.serving.doors.grpc import CoeGrpcDoor
from antiphon.coe.serving.doors.http import CoeDoor
from antiphon.coe.serving.doors.published import ROUTES
from antiphon.coe.serving.expert_health import ExpertHealth
from antiphon.coe.serving.remote import routers_topic
from antiphon.core.directory import Directory
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.directory.memory import MemoryDirectory, open_directory
from antiphon.directory.workers import WorkerView
from antiphon.gateway.access.key_file import KeyFile
from antiphon.gateway.access.keys import ApiKeys
from antiphon.gateway.config import BoundPorts
from antiphon.gateway.http.manners import Manners
from antiphon.gateway.http.server import HttpServer
from antiphon.gateway.http.sites import OwnSites, is_loopback
from antiphon.gateway.openai.http_io import NotFound, RequestIds, error_response
from antiphon.rpc.certificates import DoorCertificate, TlsFiles
from antiphon.rpc.channels import ChannelLimits
from antiphon.rpc.router.service import RouterServicer
from antiphon.rpc.services import RpcServer

_log = logging.getLogger(__name__)

_LEASE_S = 3.0  # of a router's address in the directory
_TAKEN_BACK_S = 0.001  # the lease that ends one


@dataclass(frozen=True, slots=True, kw_only=True)
class CoeConfig:
    """Addresses, experts and limits of one router process."""

    documents: tuple[CompositionOfExperts, ...]
    endpoints: Mapping[str, ExternalEndpoint] = field(default_factory=dict)  # deploymentRef → where it is reached
    models: Mapping[str, str] = field(default_factory=dict)  # deploymentRef → model name of its workers in the directory
    directory: str | None = None  # None = this process is alone
    registers: bool = False  # gateways find it in the directory
    host: str = "127.0.0.1"
    http_port: int | None = 8100  # 0 = any free port; None = no HTTP
    grpc_port: int = 9100  # 0 = any free port
    reuse_port: bool = False  # several routers of one machine share the ports
    api_keys: frozenset[str] = field(default_factory=frozenset)  # plain; neither these nor a file = open
    api_keys_file: Path | None = None  # hashed
    tls: TlsFiles | None = None  # of the doors for users; None = plain text
    max_request_bytes: int = 4 * 2**20
    refresh_s: float = 0.5  # between looks for changed artifacts and experts


async def run_coe(config: CoeConfig, stop: asyncio.Event, *, on_bound: Callable[[BoundPorts], None] | None = None) -> None:
    """Serve until ``stop`` is set.

    Raises:
        CheckpointInvalid: an artifact can't be loaded; the message names it.
        InvalidInput: a document and its artifact don't fit, or an expert is not known.
        Unavailable: an address can't be bound.
    """
    directory: Directory = MemoryDirectory() if config.directory is None else open_directory(config.directory)
    try:
        await _run(config, directory, stop, on_bound)
    finally:
        await directory.close()


async def _run(config: CoeConfig, directory: Directory, stop: asyncio.Event, on_bound: Callable[[BoundPorts], None] | None) -> None:
    for document in config.documents:
        _check(document)
        if config.http_port is not None:  # its gRPC door decides, and asks no expert
            check_lending(document, is_open=not config.api_keys and config.api_keys_file is None, endpoints=config.endpoints)
    view = WorkerView(directory, refresh_s=config.refresh_s)
    owner = f"{config.host}:{os.getpid()}"
    compositions = {
        document.metadata.name: await asyncio.to_thread(_composition_of, document, config, view, directory, owner)
        for document in config.documents
    }
    file = None if config.api_keys_file is None else KeyFile(config.api_keys_file, field="the router's API keys")
    keys = ApiKeys(config.api_keys, file)
    door = CoeDoor(_alone(keys), compositions, keys=keys, max_request_bytes=config.max_request_bytes)
    http = None
    tls = None if config.tls is None else DoorCertificate(config.tls)
    if config.http_port is not None:
        served: ASGIApp = Manners(door, ROUTES, lambda _error: None)
        http = HttpServer(
            RequestIds(OwnSites(served, (), is_local=is_loopback(config.host)) if keys.is_open else served),
            host=config.host,
            port=config.http_port,
            reuse_port=config.reuse_port,
            tls=tls,
        )
    grpc = RpcServer(
        # Who asks a registered router has proven to be a part of the deployment.
        [RouterServicer(CoeGrpcDoor(compositions, ApiKeys() if config.registers else keys))],
        host=config.host,
        port=config.grpc_port,
        reuse_port=config.reuse_port,
        limits=ChannelLimits(max_message_bytes=config.max_request_bytes),
        tls=tls,
        public=not config.registers,  # a registered one is asked by gateways of its own deployment alone
        admit=None if config.registers else keys.check,
    )
    tasks: list[asyncio.Task[None]] = []
    looking = _Looking(config, directory, view, list(compositions.values()), owner)
    try:
        await looking.look(None)
        if http is not None:
            await http.start()
        await grpc.start()
        address = grpc.address if config.registers else None
        await looking.register(address)
        if on_bound is not None:
            on_bound(BoundPorts(host=config.host, http_port=0 if http is None else http.port, grpc_port=grpc.port))
        tasks = [asyncio.create_task(_wait(stop)), asyncio.create_task(looking.run(address))]
        if http is not None:
            tasks.append(asyncio.create_task(http.failed()))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a loop that failed raises here
        await looking.register(address, _TAKEN_BACK_S)
        await grpc.drain()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await grpc.close()
        if http is not None:
            await http.close()
        await door.close()
        for composition in compositions.values():
            await composition.close()


def _check(document: CompositionOfExperts) -> None:
    """Refuse what this process can't do as the document says, or may not."""
    where = document.model_name
    if document.spec.router.api_keys_secret is not None:
        raise InvalidInput(
            f"{where}: secrets are the cluster's; give --api-keys-env or --api-keys-file", "spec.router.apiKeysSecret"
        )
    for index, expert in enumerate(document.spec.experts):
        if expert.external is not None:
            check_key_host(expert.external, f"{where}: spec.experts[{index}].external")


class _Looking:
    """Looks into the directory and at the artifacts now and then, and keeps this router's own note there."""

    def __init__(
        self, config: CoeConfig, directory: Directory, view: WorkerView, compositions: Sequence[Composition], owner: str
    ) -> None:
        self._config = config
        self._directory = directory
        self._view = view
        self._compositions = compositions
        self._owner = owner
        self._reachable = True

    async def run(self, address: str | None) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._config.refresh_s)
            await self.look(address)

    async def look(self, address: str | None) -> None:
        """Look once; while the directory is silent what was seen last stands."""
        for composition in self._compositions:
            await composition.refresh()
        try:
            if self._config.models:
                await self._view.refresh()
            await self.register(address)
            self._reachable = True
        except AntiphonError as error:
            if self._reachable:
                _log.warning("the directory can't be reached, going on with what was seen last: %s", error)
            self._reachable = False

    async def register(self, address: str | None, lease_s: float = _LEASE_S) -> None:
        """Note where this router is, for ``lease_s`` seconds."""
        if address is None:
            return
        for composition in self._compositions:
            await self._directory.put_note(routers_topic(composition.document.metadata.name), self._owner, address, lease_s)


def _composition_of(
    document: CompositionOfExperts, config: CoeConfig, view: WorkerView, directory: Directory, owner: str
) -> Composition:
    """One composition, its artifact loaded. Raises like ``run_coe``."""
    health = ExpertHealth(
        document,
        models=models_of(document, config.models, config.endpoints),
        endpoints=endpoints_of(document, config.endpoints),
        workers=lambda: view.workers,
        notes=directory,
        owner="" if config.registers else owner,  # a router behind gateways asks no expert itself
        clock=time.monotonic,
    )
    return Composition(document, WatchedRoutes(document, owner), health, directory)


def models_of(
    document: CompositionOfExperts, models: Mapping[str, str], endpoints: Mapping[str, ExternalEndpoint]
) -> dict[str, str]:
    """The served model behind each expert that is ours, by expert.

    Raises:
        InvalidInput: a deploymentRef is neither among ``models`` nor among ``endpoints``.
    """
    found = {}
    for index, expert in enumerate(document.spec.experts):
        reference = expert.deployment_ref
        if reference is None or reference in endpoints:
            continue
        if reference not in models:
            known = ", ".join(sorted({*models, *endpoints})) or "none"
            raise InvalidInput(
                f"expert {expert.name}: no endpoint is known for deployment {reference!r}; known: {known}",
                f"spec.experts[{index}].deploymentRef",
            )
        found[expert.name] = models[reference]
    return found


def endpoints_of(document: CompositionOfExperts, endpoints: Mapping[str, ExternalEndpoint]) -> dict[str, ExternalEndpoint]:
    """Where experts that are ours are reached elsewhere, by expert."""
    referred = ((expert.name, expert.deployment_ref) for expert in document.spec.experts)
    return {name: endpoints[reference] for name, reference in referred if reference is not None and reference in endpoints}


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


def _alone(keys: ApiKeys) -> FastAPI:
    """What stands behind the door when this process serves no model itself; it lists for whom a gateway would."""
    app = FastAPI(title="Antiphon router", docs_url=None, redoc_url=None)

    @app.get("/health")
    @app.get("/ready")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        try:
            keys.check(request.headers.get("authorization"))
        except AntiphonError as error:
            return error_response(error)
        return JSONResponse({"object": "list", "data": []})

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def other(path: str) -> Response:
        return error_response(NotFound(f"there is no /{path} for this model here; compositions are named coe/<name>"))

    return app
