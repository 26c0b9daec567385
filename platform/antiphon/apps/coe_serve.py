"""The router of compositions as a Ray Serve application, and as a thread of any process (control speed).

    import_path: antiphon.apps.coe_serve:build
    args: {documents: [{kind: CompositionOfExperts, ...}], endpoints: {<deployment>: {url, model}}, httpPort: 8100}

Each replica opens the doors itself, past Serve's proxies; replicas of one machine share the ports, so that a lost one's new
connections go to the others. Must not know: how a decision is made.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from ray import serve
from ray.serve import Application

from antiphon.apps.on_ray.joining import take_environment
from antiphon.apps.serve.door_thread import DoorThread
from antiphon.apps.serve.ray_runtime import keep_serve_on_loopback
from antiphon.coe.serving.app import CoeConfig, run_coe
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.part import Model, as_tuple
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.gateway.access.keys import keys_from

ROUTER = "router"  # Serve name of the deployment
ROUTER_CPU = 0.1  # what Ray reserves for a replica; a decision takes well under a millisecond
_STOP_TIMEOUT_S = 10.0


class CoeArgs(Model):
    """Arguments of ``build``."""

    documents: tuple[CompositionOfExperts, ...] = Field(description="The compositions.", min_length=1, max_length=256)
    endpoints: dict[str, ExternalEndpoint] = Field(default_factory=dict, description="Where each deploymentRef is reached.")
    models: dict[str, str] = Field(default_factory=dict, description="Model name that each deploymentRef's workers register with.")
    directory: str | None = Field(default=None, description="Address of the directory of workers; None = none.")
    registers: bool = Field(default=False, description="Gateways find the router in the directory, and ask it.")
    host: str = Field(default="127.0.0.1", description="Address to bind.")
    http_port: int | None = Field(default=8100, ge=0, le=65_535, description="HTTP; 0 = any free port, None = no HTTP.")
    grpc_port: int = Field(default=9100, ge=0, le=65_535, description="gRPC; 0 = any free port.")
    api_keys_env: str | None = Field(default=None, description="Environment variable with the accepted API keys; None = open.")
    api_keys_file: str | None = Field(default=None, description="File of hashed API keys; None = none.")
    start_timeout_s: float = Field(default=120.0, gt=0, le=3600, strict=False, description="Deadline of a replica's start.")

    _lists = field_validator("documents", mode="before")(as_tuple)

    @property
    def num_replicas(self) -> int:
        """The most that any document asks for."""
        return max(document.spec.router.replicas for document in self.documents)

    def api_keys(self) -> frozenset[str]:
        """The accepted keys.

        Raises:
            Unavailable: the environment variable that should hold them is missing or empty.
        """
        if self.api_keys_env is None:
            return frozenset()
        keys = keys_from(os.environ.get(self.api_keys_env))
        if not keys:
            raise Unavailable(f"no API keys in the environment variable {self.api_keys_env}")
        return keys

    def config(self) -> CoeConfig:
        """What one replica is told."""
        return CoeConfig(
            documents=self.documents,
            endpoints=self.endpoints,
            models=self.models,
            directory=self.directory,
            registers=self.registers,
            host=self.host,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            api_keys=self.api_keys(),
            api_keys_file=None if self.api_keys_file is None else Path(self.api_keys_file),
            reuse_port=self.num_replicas > 1 and not self.registers,  # a registered one is asked by its own address
        )


class CoeThread(DoorThread):
    """Composition doors on a thread of their own. ``wait_open`` also raises CheckpointInvalid and InvalidInput, for an artifact
    that can't be loaded and a document that doesn't fit it.
    """

    def __init__(self, config: CoeConfig) -> None:
        super().__init__("router", lambda stop, on_bound: run_coe(config, stop, on_bound=on_bound), stop_timeout_s=_STOP_TIMEOUT_S)


class CoeReplica:
    """The Serve deployment's class. Its constructor returns when the doors are open."""

    def __init__(self, args_json: str) -> None:
        take_environment()
        keep_serve_on_loopback()
        args = CoeArgs.model_validate_json(args_json)
        self._doors = CoeThread(args.config())
        try:
            self._bound = self._doors.wait_open(args.start_timeout_s)
        except BaseException:
            self._doors.close()
            raise

    async def check_health(self) -> None:
        """Serve's probe: raises when the doors have closed by themselves."""
        self._doors.check()

    async def ports(self) -> tuple[str, int, int]:
        """Host, HTTP port and gRPC port of this replica."""
        return self._bound.host, self._bound.http_port, self._bound.grpc_port

    async def __del__(self) -> None:
        await asyncio.to_thread(self._doors.close)


def build(args: Mapping[str, object]) -> Application:
    """The application of ``args``, see CoeArgs.

    Raises:
        InvalidInput: an argument is wrong.
    """
    try:
        checked = CoeArgs.model_validate(args)
    except ValidationError as error:
        raise InvalidInput(str(error), "args") from error
    return router_deployment(checked)


def router_deployment(checked: CoeArgs, options: Mapping[str, Any] | None = None) -> Application:
    """The routers as an application, or as a part of one; ``options`` are Ray actor options besides its own."""
    deployment = serve.deployment(
        name=ROUTER,
        num_replicas=checked.num_replicas,
        ray_actor_options={"num_cpus": ROUTER_CPU, **(options or {})},
        health_check_period_s=2.0,
        health_check_timeout_s=15.0,
        graceful_shutdown_wait_loop_s=0.05,  # requests do not pass through Serve: there is nothing to wait for
    )
    application: Application = deployment(CoeReplica).bind(checked.model_dump_json(by_alias=True))
    return application
