"""The compositions of a gateway: made from its configuration, put before its doors, kept up to date (control speed).

Must not know: how a decision is made, or how an expert answers.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import Self

from starlette.types import ASGIApp

from antiphon.coe.serving.app import endpoints_of, models_of
from antiphon.coe.serving.artifacts import WatchedRoutes
from antiphon.coe.serving.composition import Composition
from antiphon.coe.serving.deciders import Routes
from antiphon.coe.serving.doors.generate import CoeGenerator
from antiphon.coe.serving.doors.grpc import CoeGrpcDoor
from antiphon.coe.serving.doors.http import CoeDoor
from antiphon.coe.serving.expert_health import ExpertHealth
from antiphon.coe.serving.remote import RemoteRoutes
from antiphon.core.directory import Notes
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.openai.http_io import RequestIds
from antiphon.rpc.router.service import RouterServicer
from antiphon.rpc.services import Service


class GatewayCompositions:
    """Belongs to one event loop; ``run`` keeps them fresh until cancelled, ``close`` is idempotent."""

    def __init__(self, gateway: Gateway, notes: Notes, compositions: dict[str, Composition]) -> None:
        self._gateway = gateway
        self._compositions = compositions
        self._door: CoeDoor | None = None
        self.generator = CoeGenerator(compositions, gateway.generate, notes)

    @classmethod
    async def open(cls, gateway: Gateway, notes: Notes) -> Self:
        """The compositions of the gateway's configuration, their artifacts loaded where this process decides.

        Raises:
            CheckpointInvalid: an artifact can't be loaded; the message names it.
            InvalidInput: a document does not fit its artifact, or an expert is not served here.
        """
        compositions = {}
        for document in gateway.config.compositions:
            compositions[document.metadata.name] = await asyncio.to_thread(_composition, document, gateway, notes)
        gateway.compositions = compositions
        return cls(gateway, notes, compositions)

    def before(self, app: ASGIApp) -> ASGIApp:
        """The gateway's application with the compositions' door in front of it."""
        if not self._compositions:
            return app
        gateway = self._gateway
        self._door = CoeDoor(app, self._compositions, keys=gateway.keys, max_request_bytes=gateway.config.max_request_bytes)
        return RequestIds(self._door)

    def services(self) -> list[Service]:
        """The router's gRPC service."""
        return [RouterServicer(CoeGrpcDoor(self._compositions, self._gateway.keys))] if self._compositions else []

    async def refresh(self) -> None:
        """Exchange what is known with the other gateways and routers."""
        for composition in self._compositions.values():
            await composition.refresh()

    async def run(self) -> None:
        """Refresh until cancelled."""
        while True:
            await asyncio.sleep(self._gateway.config.refresh_s)
            await self.refresh()

    async def close(self) -> None:
        """Close connections to routers and external experts."""
        if self._door is not None:
            await self._door.close()
        await self.generator.close()
        for composition in self._compositions.values():
            await composition.close()


def _composition(document: CompositionOfExperts, gateway: Gateway, notes: Notes) -> Composition:
    config = gateway.config
    owner = f"{config.host}:{os.getpid()}:{secrets.token_hex(4)}"
    health = ExpertHealth(
        document,
        models=models_of(document, config.deployment_models, config.endpoints),
        endpoints=endpoints_of(document, config.endpoints),
        workers=lambda: gateway.view.workers,
        notes=notes,
        owner=owner,
        clock=time.monotonic,
    )
    if config.routing == "here":
        routes: Routes = WatchedRoutes(document, owner)
    else:
        routes = RemoteRoutes(document, notes, avoided=lambda: health.avoided)
    return Composition(document, routes, health, notes)
