"""The compositions of a gateway: made from its configuration, put before its doors, kept up to date (control speed).

Must not know: how a decision is made, or how an expert answers.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Self

from starlette.types import ASGIApp

from antiphon.coe.routing.learning.online import OnlineLearner
from antiphon.coe.serving.app import endpoints_of, models_of
from antiphon.coe.serving.artifacts import WatchedRoutes
from antiphon.coe.serving.composition import Composition
from antiphon.coe.serving.deciders import LocalRoutes, Routes
from antiphon.coe.serving.doors.generate import CoeGenerator
from antiphon.coe.serving.doors.grpc import CoeGrpcDoor
from antiphon.coe.serving.doors.http import CoeDoor
from antiphon.coe.serving.doors.published import OPERATIONS, ROUTES
from antiphon.coe.serving.expert_health import ExpertHealth
from antiphon.coe.serving.remote import RemoteRoutes
from antiphon.core.directory import Notes
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.http.manners import Manners
from antiphon.gateway.openai.http_io import RequestIds
from antiphon.rpc.router.service import RouterServicer
from antiphon.rpc.services import Service
from antiphon.telemetry import CallbackOptions, Observation, Telemetry


class GatewayCompositions:
    """Belongs to one event loop; ``run`` keeps them fresh until cancelled, ``close`` is idempotent."""

    def __init__(self, gateway: Gateway, notes: Notes, compositions: dict[str, Composition]) -> None:
        self._gateway = gateway
        self._compositions = compositions
        self._door: CoeDoor | None = None
        self.generator = CoeGenerator(compositions, gateway.generate, notes)
        watch_learning(gateway.telemetry, compositions)

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
        gateway.published = OPERATIONS if compositions else ()
        return cls(gateway, notes, compositions)

    def before(self, app: ASGIApp) -> ASGIApp:
        """The gateway's application with the compositions' door in front of it."""
        if not self._compositions:
            return app
        gateway = self._gateway
        self._door = CoeDoor(
            app,
            self._compositions,
            keys=gateway.keys,
            max_request_bytes=gateway.config.max_request_bytes,
            bodies=gateway.bodies,
            refused=gateway.refused,
            limits=gateway.admission,
        )
        return RequestIds(Manners(self._door, ROUTES, gateway.refused))

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


def watch_learning(telemetry: Telemetry, compositions: Mapping[str, Composition]) -> None:
    """Show what the routers of this process have learnt from feedback, and how far it speaks against their artifacts."""
    learning = {
        composition.name: composition.routes.router.learner
        for composition in compositions.values()
        if isinstance(composition.routes, LocalRoutes) and composition.routes.router.learner is not None
    }
    if not learning:
        return

    def each(value: Callable[[OnlineLearner], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: [Observation(value(learner), {"composition": name}) for name, learner in learning.items() if learner]

    def shifts(_: CallbackOptions) -> Iterable[Observation]:
        for name, learner in learning.items():
            for (category, expert), shift in (learner.shifts() if learner else {}).items():
                yield Observation(shift, {"composition": name, "category": category, "expert": expert})

    meter = telemetry.meter(__name__)
    meter.create_observable_counter(
        "antiphon.coe.feedback", callbacks=[each(lambda one: one.num_feedbacks)], description="Feedbacks that were learnt from."
    )
    meter.create_observable_gauge(
        "antiphon.coe.drift",
        callbacks=[each(lambda one: one.drift)],
        description="CUSUM of scores against the expected ones, in standard deviations; the alarm is at spec.learning.driftAlarm.",
    )
    meter.create_observable_counter(
        "antiphon.coe.drift.alarms", callbacks=[each(lambda one: one.num_alarms)], description="Times that drift reached the alarm."
    )
    meter.create_observable_gauge(
        "antiphon.coe.shift", callbacks=[shifts], description="What feedback has added to an expert's expected score in a category."
    )


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
