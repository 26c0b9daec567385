"""What a gateway needs of compositions of experts, as values and seams (request speed).

``coe.serving`` fills them in; a gateway without compositions never imports it, nor the router and its numpy. Must not know: how an
expert is chosen.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from starlette.types import ASGIApp

from antiphon.coe.routing.decision import ExpertState
from antiphon.core.directory import Notes
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.gateway.generation.request import Event, GenerationRequest
from antiphon.rpc.inference import Announce
from antiphon.rpc.services import Service

if TYPE_CHECKING:
    from antiphon.gateway.gateway import Gateway


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStanding:
    """An expert of a composition now."""

    name: str
    external: bool
    general: bool
    state: ExpertState


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositionStatus:
    """How a composition stands: degraded = an expert is down, and others answer for it."""

    name: str
    state: Literal["ready", "degraded", "unavailable"]
    message: str
    experts: tuple[ExpertStanding, ...]
    num_fallbacks: int  # answers that another than the chosen expert gave, at this gateway
    last_fallback: str  # why, and when; "" = none so far


class ServedComposition(Protocol):
    """One ``coe/<name>`` as lists of models and the status show it."""

    @property
    def name(self) -> str:
        """What clients send as the model."""

    @property
    def document(self) -> CompositionOfExperts:
        """Its document."""

    def status(self) -> CompositionStatus:
        """How it stands now."""


class CompositionGenerator(Protocol):
    """Answers requests whose model is a composition."""

    def generate(self, request: GenerationRequest, headers: Mapping[str, str], announce: Announce) -> AsyncGenerator[Event, None]:
        """The answer of the expert that is picked; ``announce`` is told who it is before the first event."""


class Compositions(Protocol):
    """All compositions of one gateway: its doors, its background work. Belongs to the gateway's event loop."""

    @property
    def generator(self) -> CompositionGenerator:
        """Answers for the gRPC door."""

    def before(self, app: ASGIApp) -> ASGIApp:
        """The HTTP application with the compositions' door in front of it."""

    def services(self) -> Sequence[Service]:
        """gRPC services beside the gateway's own."""

    async def refresh(self) -> None:
        """Exchange what is known with the other gateways and routers."""

    async def run(self) -> None:
        """Refresh until cancelled."""

    async def close(self) -> None:
        """Close connections to routers and external experts; idempotent."""


OpenCompositions = Callable[["Gateway", Notes], Awaitable[Compositions]]
