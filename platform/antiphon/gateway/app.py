"""Runs one gateway process: HTTP and gRPC over the same gateway, until told to stop (control speed).

    start: load tokenizers, try chat templates ─► look into the directory ─► bind ─► serve
    stop:  not ready, no new requests ─► open streams go on for drain_timeout_s ─► close

Must not know: Ray, documents, or which directory it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.types import ASGIApp

from antiphon.core.budget import Budgets
from antiphon.core.directory import Notes
from antiphon.core.errors import AntiphonError, InvalidInput
from antiphon.directory.memory import MemoryDirectory
from antiphon.directory.workers import WorkerSource
from antiphon.gateway.access.usage_routes import add_usage_routes
from antiphon.gateway.anthropic.routes import add_message_routes
from antiphon.gateway.compositions import Compositions, OpenCompositions
from antiphon.gateway.config import BoundPorts, GatewayConfig
from antiphon.gateway.embeddings.routes import add_embedding_routes
from antiphon.gateway.experts import GatewayExperts
from antiphon.gateway.gateway import Gateway
from antiphon.gateway.grpc.servicer import GrpcDoor
from antiphon.gateway.http.cors import with_cors
from antiphon.gateway.http.server import HttpServer
from antiphon.gateway.http.sites import OwnSites, is_loopback
from antiphon.gateway.openai.experts_routes import add_expert_routes
from antiphon.gateway.openai.http_io import RequestIds
from antiphon.gateway.openai.responses import add_response_routes
from antiphon.gateway.openai.routes import make_app
from antiphon.gateway.openai.text_routes import add_text_routes
from antiphon.gateway.replica_targets import ReplicaTargets
from antiphon.gateway.routing.endpoints import EndpointBoard, key_of
from antiphon.gateway.text.tokenizer import TextModel
from antiphon.gateway.web.routes import add_web_routes
from antiphon.models.pooling.facts import read_pooling
from antiphon.rpc.certificates import DoorCertificate
from antiphon.rpc.channels import ChannelLimits
from antiphon.rpc.experts import ExpertsServicer
from antiphon.rpc.inference import InferenceServicer
from antiphon.rpc.services import RpcServer, Service
from antiphon.telemetry import Telemetry, setup

_log = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0  # for the errors that end open streams to be sent


async def run_gateway(
    config: GatewayConfig,
    workers: WorkerSource,
    stop: asyncio.Event,
    *,
    on_bound: Callable[[BoundPorts], None] | None = None,
    telemetry: Telemetry | None = None,
    notes: Notes | None = None,
    open_compositions: OpenCompositions | None = None,
    budgets: Budgets | None = None,
) -> None:
    """Serve until ``stop`` is set, then drain.

    Args:
        config: addresses, models and limits.
        workers: where workers are registered.
        stop: set to end.
        on_bound: called once with the ports, when both doors are open.
        telemetry: traces and metrics; None = made here from the environment, and closed here.
        notes: where gateways and routers tell each other about experts and sessions; None = this gateway is alone.
        open_compositions: makes the configuration's compositions; None = a configuration that has some is refused.
        budgets: where tenants' limits are kept over several gateways; None = this gateway keeps them alone.

    Raises:
        CheckpointInvalid: a model's tokenizer or a composition's artifact can't be read.
        InvalidInput: a composition does not fit its artifact or the models.
        Unavailable: an address can't be bound.
    """
    notes = MemoryDirectory() if notes is None else notes
    if telemetry is not None:
        await _run(config, workers, stop, on_bound, telemetry, notes, open_compositions, budgets)
        return
    owned = setup("antiphon-gateway")
    try:
        await _run(config, workers, stop, on_bound, owned, notes, open_compositions, budgets)
    finally:
        await asyncio.to_thread(owned.close)


async def _run(
    config: GatewayConfig,
    workers: WorkerSource,
    stop: asyncio.Event,
    on_bound: Callable[[BoundPorts], None] | None,
    telemetry: Telemetry,
    notes: Notes,
    open_compositions: OpenCompositions | None,
    budgets: Budgets | None,
) -> None:
    models = {
        name: await asyncio.to_thread(TextModel.load, path, markers_are_text=name not in config.control_marker_models)
        for name, path in config.models.items()
    }
    pooling = {
        name: await asyncio.to_thread(read_pooling, path, config.tasks.get(name, "auto")) for name, path in config.models.items()
    }
    gateway = Gateway(config, models=models, source=workers, telemetry=telemetry, pooling=pooling, budgets=budgets)
    compositions = await _compositions(gateway, notes, open_compositions)
    experts = GatewayExperts(workers=lambda: gateway.view.workers, keys=gateway.keys, telemetry=telemetry)
    tls = None if config.tls is None else DoorCertificate(config.tls)
    application = make_app(gateway)
    add_expert_routes(application, experts)
    add_message_routes(application, gateway)
    add_response_routes(application, gateway, notes)
    add_text_routes(application, gateway)
    add_usage_routes(application, gateway)
    add_web_routes(application, gateway)
    add_embedding_routes(application, gateway)
    door: ASGIApp = application if compositions is None else compositions.before(application)
    if gateway.keys.is_open:
        door = RequestIds(OwnSites(door, config.cors_origins, is_local=is_loopback(config.host), refused=gateway.refused))
    http = HttpServer(
        with_cors(door, config.cors_origins),
        host=config.host,
        port=config.http_port,
        reuse_port=config.reuse_port,
        tls=tls,
        on_refused=gateway.refused_unread,
    )
    replicas = None if config.picker_targets is None else ReplicaTargets(config.picker_targets)
    grpc = RpcServer(
        [
            *([] if replicas is None else [_picker(replicas)]),
            InferenceServicer(GrpcDoor(gateway, None if compositions is None else compositions.generator)),
            ExpertsServicer(experts),
            *([] if compositions is None else compositions.services()),
        ],
        host=config.host,
        port=config.grpc_port,
        reuse_port=config.reuse_port,
        limits=ChannelLimits(max_message_bytes=config.max_request_bytes),
        public=True,
        tls=tls,
        admit=gateway.knocked,
    )
    tasks: list[asyncio.Task[None]] = []
    try:
        try:
            await gateway.view.refresh()
        except AntiphonError as error:
            _log.warning("the directory can't be reached yet: %s", error)
        if compositions is not None:
            await compositions.refresh()
        gateway.start()
        await gateway.templates.check()
        await http.start()
        await grpc.start()
        if on_bound is not None:
            on_bound(BoundPorts(host=config.host, http_port=http.port, grpc_port=grpc.port))
        loops = (gateway.view.run(), gateway.tell(), gateway.admission.run(), experts.run(), http.failed(), _wait(stop))
        tasks = [asyncio.create_task(loop) for loop in loops]
        if compositions is not None:
            tasks.append(asyncio.create_task(compositions.run()))
        if replicas is not None:
            tasks.append(asyncio.create_task(replicas.run()))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a loop that failed raises here
        gateway.draining = True
        await grpc.drain()
        await _drain(gateway, config.drain_timeout_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await grpc.close()
        await http.close()
        if compositions is not None:
            await compositions.close()
        await experts.close()
        await gateway.close()


async def _compositions(gateway: Gateway, notes: Notes, open_compositions: OpenCompositions | None) -> Compositions | None:
    if not gateway.config.compositions:
        return None
    if open_compositions is None:
        raise InvalidInput("this gateway was given compositions and nothing that serves them", "compositions")
    return await open_compositions(gateway, notes)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


async def _drain(gateway: Gateway, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    while gateway.num_requests and loop.time() < end_s:  # noqa: ASYNC110 - once in a process's life, and bounded
        await asyncio.sleep(0.05)
    if gateway.num_requests:
        _log.warning("%d requests were not finished within %.0f s of draining", gateway.num_requests, timeout_s)
        gateway.end_all()
        end_s = loop.time() + _LAST_WORDS_S
        while gateway.num_requests and loop.time() < end_s:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)


def _picker(replicas: ReplicaTargets) -> Service:
    from antiphon.rpc.endpoint_picker import PickerServicer

    return PickerServicer(board=EndpointBoard(), key_of=key_of, endpoints=lambda: replicas.endpoints)
