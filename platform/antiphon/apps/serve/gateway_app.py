"""The gateway of a deployment: its thread, and its replica on Ray Serve (control speed).

The gateway opens its own ports, past Serve's proxies: tokens stream and disconnects arrive without a hop between. Its event
loop is a thread's own, so that neither Serve's control traffic nor the host's other work delays a token.
Must not know: how requests are answered.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from antiphon.apps.on_ray.joining import take_environment
from antiphon.apps.process.config import LogSettings
from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.door_thread import DoorThread, OnBound
from antiphon.apps.serve.host import open_private
from antiphon.apps.serve.plan import GATEWAY, ServeSettings
from antiphon.apps.serve.ray_runtime import keep_serve_on_loopback
from antiphon.apps.serve.stop_signals import wait_for_stop
from antiphon.apps.supervision.event_log import EventLog, EventLogEntry, Fact
from antiphon.coe.serving.doors.expert_key import check_key_host, check_lending
from antiphon.core.document.coe.experts import ExternalEndpoint
from antiphon.core.document.serving import EndpointSpec
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import Unavailable
from antiphon.directory.memory import open_directory
from antiphon.directory.workers import DeploymentWorkers
from antiphon.gateway.config import BoundPorts, GatewayConfig
from antiphon.gateway.text.dialect import TextFormats
from antiphon.models.loading.source import resolve
from antiphon.rpc.certificates import TlsFiles, own_door_context
from antiphon.telemetry import configure_logging
from antiphon.transport.connect.address import join_host

if TYPE_CHECKING:
    from antiphon.core.directory import Notes
    from antiphon.gateway.compositions import Compositions
    from antiphon.gateway.gateway import Gateway


async def _open_compositions(gateway: Gateway, notes: Notes) -> Compositions:
    from antiphon.coe.serving.gateway import GatewayCompositions  # with its router and numpy, where compositions are served

    return await GatewayCompositions.open(gateway, notes)


_STOP_MARGIN_S = 5.0

Routing = Literal["here", "replicas"]


def gateway_config(document: LLMDeployment, checkpoint: str, *, drain_s: float) -> GatewayConfig:
    """The gateway's part of a document.

    Raises:
        Unavailable: the environment variable that should hold the API keys is missing or empty.
    """
    return serving_config(Serving.alone(document, checkpoint), drain_s=drain_s)


def serving_config(serving: Serving, *, drain_s: float, routing: Routing = "here") -> GatewayConfig:
    """The gateway's part of documents that are served together.

    Raises:
        InvalidInput: an expert's key may not be sent to its host, or would be lent to all who reach a door without keys.
        Unavailable: an environment variable that should hold API keys is missing or empty.
    """
    endpoint = serving.endpoint
    keys: frozenset[str] = frozenset()
    if endpoint.api_keys_env is not None:
        keys = frozenset(key.strip() for key in os.environ.get(endpoint.api_keys_env, "").split(",") if key.strip())
        if not keys:
            raise Unavailable(f"spec.endpoint.apiKeysEnv: no API keys in the environment variable {endpoint.api_keys_env}")
    for composition in serving.compositions:
        if composition.spec.router.api_keys_secret is not None:
            raise Unavailable(
                f"{composition.model_name}: spec.router.apiKeysSecret: secrets are the cluster's; use endpoint.apiKeysFile"
            )
        for index, expert in enumerate(composition.spec.experts):
            _check_key(expert.external, f"{composition.model_name}: spec.experts[{index}].external")
        check_lending(composition, is_open=not keys and endpoint.api_keys_file is None)
    thresholds = {d.model_name: d.spec.scheduler.remote_prefill_min_tokens for d in serving.deployments}
    return GatewayConfig(
        checks_ahead=True,
        models={d.model_name: Path(serving.checkpoints[d.metadata.name]) for d in serving.deployments},
        formats={
            d.model_name: TextFormats(tool=d.spec.model.tool_format, reasoning=d.spec.model.reasoning_format)
            for d in serving.deployments
        },
        tasks={d.model_name: d.spec.model.task for d in serving.deployments},
        unknown_fields=endpoint.unknown_fields,
        host=endpoint.host,
        http_port=endpoint.http_port,
        grpc_port=endpoint.grpc_port,
        picker_targets=endpoint.picker_targets,
        reuse_port=endpoint.replicas > 1,
        api_keys=keys,
        api_keys_file=None if endpoint.api_keys_file is None else Path(endpoint.api_keys_file),
        metrics_access=endpoint.metrics_access,
        tls=None
        if endpoint.tls is None
        else TlsFiles(certificate=Path(endpoint.tls.certificate_file), key=Path(endpoint.tls.key_file)),
        shared_cache_models=frozenset(d.model_name for d in serving.deployments if d.spec.cache.sharing == "deployment"),
        control_marker_models=frozenset(d.model_name for d in serving.deployments if d.spec.model.markers_in_messages == "control"),
        plain_sampling_models=frozenset(d.model_name for d in serving.deployments if d.spec.model.sampling_defaults == "none"),
        cors_origins=endpoint.cors_origins,
        max_request_bytes=endpoint.max_request_bytes,
        default_deadline_s=endpoint.default_deadline_s,
        remote_prefill_min_tokens_by_model=thresholds,
        wake_timeout_s_by_model={d.model_name: d.spec.wake_timeout_s for d in serving.deployments if d.spec.wake_timeout_s > 0},
        drain_timeout_s=drain_s,
        compositions=serving.compositions,
        deployment_models=serving.models,
        document_revision=serving.deployments[0].metadata.revision if len(serving.deployments) == 1 else "",
        routing=routing,
    )


def _check_key(external: ExternalEndpoint | None, where: str) -> None:
    if external is None:
        return
    if external.api_key_secret is not None:
        raise Unavailable(f"{where}.apiKeySecret: secrets are the cluster's; use apiKeyEnv here")
    if external.api_key_env is not None and not os.environ.get(external.api_key_env):
        raise Unavailable(f"{where}.apiKeyEnv: no API key in the environment variable {external.api_key_env}")
    check_key_host(external, where)


def door_url(endpoint: EndpointSpec, host: str, port: int) -> str:
    """Where the HTTP door is, as seen from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - asked, not listened on
    return f"{'http' if endpoint.tls is None else 'https'}://{join_host(host, port)}"


def door_trust(endpoint: EndpointSpec) -> ssl.SSLContext | bool:
    """What httpx verifies of this deployment's own door with."""
    return True if endpoint.tls is None else own_door_context(Path(endpoint.tls.certificate_file))


def ports_of(entry: EventLogEntry) -> BoundPorts:
    """Where the gateway of a "ready" entry listens."""
    facts = entry.facts
    return BoundPorts(host=str(facts["host"]), http_port=int(facts["http_port"]), grpc_port=int(facts["grpc_port"]))


def at_former_ports(config: GatewayConfig, entries: Sequence[EventLogEntry]) -> GatewayConfig:
    """Where any port will do, the ones that this run's gateway had before it was lost: clients know them."""
    former = next((ports_of(e) for e in reversed(entries) if e.subject == GATEWAY and e.kind == "ready"), None)
    if former is None or config.reuse_port:  # one of several: another may be listening there
        return config
    return replace(config, http_port=config.http_port or former.http_port, grpc_port=config.grpc_port or former.grpc_port)


def port_facts(bound: BoundPorts) -> dict[str, Fact]:
    """Where the gateway listens, as the event log has it."""
    return {"host": bound.host, "http_port": bound.http_port, "grpc_port": bound.grpc_port}


class GatewayThread(DoorThread):
    """A gateway on a thread of its own; closing lets open streams end within the drain time.

    Args:
        config: addresses, models and limits.
        directory: address of the directory of workers.
    """

    def __init__(self, config: GatewayConfig, directory: str) -> None:
        async def serve(stop: asyncio.Event, on_bound: OnBound) -> None:
            workers = open_directory(directory)
            try:
                from antiphon.gateway.app import run_gateway

                own = DeploymentWorkers(workers, config.deployment_models) if config.deployment_models else workers
                await run_gateway(
                    config,
                    own,
                    stop,
                    on_bound=on_bound,
                    notes=workers,
                    open_compositions=_open_compositions,
                    budgets=workers.budgets,
                )
            finally:
                await workers.close()

        super().__init__("gateway", serve, stop_timeout_s=config.drain_timeout_s + _STOP_MARGIN_S)


def log_to(path: Path, log: LogSettings) -> None:
    """Send this process's logs to a file of the run directory, as JSON: the console reads it too."""
    stream = os.fdopen(open_private(path, append=True), "a", buffering=1, encoding="utf-8")
    configure_logging(log.level, json=True, worker=GATEWAY, stream=stream)


class GatewayReplica:
    """The Serve deployment's class. Its constructor returns when the doors are open."""

    def __init__(self, document_json: str, settings: ServeSettings, *_pools: object) -> None:
        take_environment()
        from antiphon.apps.serve.directory_actor import directory_address  # needs Ray, which the direct kind leaves out

        document = LLMDeployment.model_validate_json(document_json)
        model = document.spec.model
        checkpoint = settings.checkpoint or str(resolve(model.uri, model.revision))
        config = gateway_config(document, checkpoint, drain_s=settings.drain_s)
        self._open(config, directory_address(document, settings), settings)

    def _open(self, config: GatewayConfig, directory: str, settings: ServeSettings) -> None:
        keep_serve_on_loopback()
        event_log = None if settings.run_dir is None else EventLog(Path(settings.run_dir))
        if settings.run_dir is not None:
            log_to(Path(settings.run_dir) / f"{GATEWAY}-{os.getpid()}.log", settings.log)
        again = config if event_log is None else at_former_ports(config, event_log.read())
        self._gateway = GatewayThread(again, directory)
        try:
            try:
                bound = self._gateway.wait_open(settings.start_timeout_s)
            except Unavailable:
                if again == config:
                    raise
                self._gateway = GatewayThread(config, directory)  # somebody has taken them meanwhile
                bound = self._gateway.wait_open(settings.start_timeout_s)
        except BaseException as error:
            if event_log is not None:
                event_log.write("failed", GATEWAY, pid=os.getpid(), message=str(error))
            self._gateway.close()
            raise
        if event_log is not None:
            event_log.write("ready", GATEWAY, pid=os.getpid(), facts=port_facts(bound))
            threading.Thread(target=self._close_when_told, args=(Path(settings.run_dir or ""),), daemon=True).start()

    def _close_when_told(self, run_dir: Path) -> None:
        """End as at a stop by Serve, when Serve can't ask for it any more."""
        wait_for_stop(run_dir)
        self._gateway.close()
        EventLog(run_dir).write("exited", GATEWAY, pid=os.getpid())

    async def check_health(self) -> None:
        """Serve's probe: raises when the gateway has stopped by itself."""
        self._gateway.check()

    async def __del__(self) -> None:
        await asyncio.to_thread(self._gateway.close)


class SetGatewayReplica(GatewayReplica):
    """The same for documents that are served together; ``settings.directory`` is given."""

    def __init__(self, serving_json: str, settings: ServeSettings, routing: Routing, *_others: object) -> None:
        assert settings.directory is not None
        take_environment()
        config = serving_config(Serving.from_json(serving_json), drain_s=settings.drain_s, routing=routing)
        self._open(config, settings.directory, settings)
