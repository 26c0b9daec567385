"""A document as a Ray Serve application: what ``antiphon serve`` deploys, and a RayService's import_path (control speed).

    import_path: antiphon.apps.serve_entry:build
    args: {document: {apiVersion: ..., kind: LLMDeployment, ...}, drainS: 20, startTimeoutS: 600}

Must not know: how Ray was started.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError
from ray import serve
from ray.serve import Application

from antiphon.apps.process.config import LogSettings
from antiphon.apps.serve.deployment_set import Serving
from antiphon.apps.serve.gateway_app import GatewayReplica, Routing, SetGatewayReplica
from antiphon.apps.serve.plan import GATEWAY, GATEWAY_CPU, ServeSettings, plan_serve
from antiphon.apps.serve.pool import PoolReplica
from antiphon.core.document.loading import parse_object
from antiphon.core.document.part import Model
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import InvalidInput

_STOP_MARGIN_S = 10.0  # a replica gets this much longer than its worker, before Serve kills it


class BuildArgs(Model):
    """Arguments of ``build`` besides the document."""

    pinned: bool = Field(default=True, description="Nodes offer a custom resource pool-<name>; replicas ask for it.")
    drain_s: float = Field(default=20.0, ge=0, le=3600, strict=False, description="Time for requests in flight at a stop.")
    start_timeout_s: float = Field(default=600.0, gt=0, le=86_400, strict=False, description="Deadline of a worker's start.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Level of all logs.")
    log_format: Literal["text", "json"] = Field(default="json", description="For people or for machines.")


def build(args: Mapping[str, object]) -> Application:
    """The application of ``args["document"]`` on a cluster whose nodes are there already.

    Raises:
        SpecInvalid: the document has wrong fields.
        InvalidInput: other arguments are wrong.
    """
    document = parse_object(args.get("document"), "args.document")
    if not isinstance(document, LLMDeployment):
        raise InvalidInput(f"expected an LLMDeployment, got {document.kind}", "args.document.kind")
    try:
        rest = BuildArgs.model_validate({key: value for key, value in args.items() if key != "document"})
    except ValidationError as error:
        raise InvalidInput(str(error), "args") from error
    settings = ServeSettings(
        drain_s=rest.drain_s,
        start_timeout_s=rest.start_timeout_s,
        log=LogSettings(level=rest.log_level, format=rest.log_format),
    )
    return application(document, settings, pinned=rest.pinned, sized=True)


def application(document: LLMDeployment, settings: ServeSettings, *, pinned: bool, sized: bool) -> Application:
    """The application of ``document``: a Serve deployment per pool and one for the gateway.

    Args:
        document: what to serve.
        settings: how its processes are run.
        pinned: pools ask for their custom resource.
        sized: pools ask for memory and accelerators; without it only for processors.
    """
    plan = plan_serve(document)
    text = document.model_dump_json(by_alias=True)
    limits = _limits(settings)
    pools = [
        serve.deployment(
            name=pool.deployment_name,
            num_replicas=pool.num_replicas,
            ray_actor_options=pool.actor_options(pinned=pinned, sized=sized),
            **limits,
        )(PoolReplica).bind(text, pool.name, settings)
        for pool in plan.pools
    ]
    gateway = serve.deployment(name=GATEWAY, num_replicas=plan.num_gateways, ray_actor_options={"num_cpus": GATEWAY_CPU}, **limits)(
        GatewayReplica
    )
    return gateway.bind(text, settings, *pools)


def _limits(settings: ServeSettings) -> dict[str, Any]:
    """How replicas are stopped, probed and given up."""
    return {
        "graceful_shutdown_timeout_s": settings.drain_s + _STOP_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.05,  # requests do not pass through Serve: there is nothing to wait for
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 15.0,
        "max_constructor_retry_count": settings.max_start_attempts,
    }


def application_of(
    serving: Serving, settings: ServeSettings, run_dirs: Mapping[str, str], options: Mapping[str, Any] | None = None
) -> Application:
    """Documents that are served together as one application: their pools, the routers, and one gateway before them.

    Args:
        serving: the documents, their models resolved.
        settings: how processes are run; with a run directory and the directory's address.
        run_dirs: run directory of each deployment.
        options: Ray actor options of every replica, besides their own.
    """
    options = options or {}
    limits = _limits(settings)
    others: list[Application] = []
    for document in serving.deployments:
        name = document.metadata.name
        tier_pool = serving.tier_pool_of(name)
        if tier_pool is not None and tier_pool.first.deployment != name:
            continue  # the first one's process serves it too
        tier_pool_json = "" if tier_pool is None else json.dumps(tier_pool.to_value())
        mine = dataclasses.replace(settings, checkpoint=serving.checkpoints[name], run_dir=run_dirs[name])
        for pool in plan_serve(document).pools:
            deployment = serve.deployment(
                name=f"pool-{name}-{pool.name}",
                num_replicas=pool.num_replicas,
                ray_actor_options={**pool.actor_options(pinned=False, sized=False), **options},
                **limits,
            )(PoolReplica)
            others.append(deployment.bind(document.model_dump_json(by_alias=True), pool.name, mine, tier_pool_json))
    routing: Routing = "here"
    if any(composition.spec.router.artifact is not None for composition in serving.compositions):
        from antiphon.apps.coe_serve import CoeArgs, router_deployment  # doors and routers, which most documents have no use for

        routing = "replicas"
        args = CoeArgs(
            documents=serving.compositions,
            models=serving.models,
            directory=settings.directory,
            registers=True,
            http_port=None,
            grpc_port=0,
            start_timeout_s=settings.start_timeout_s,
        )
        others.append(router_deployment(args, options))
    gateway = serve.deployment(
        name=GATEWAY, num_replicas=serving.endpoint.replicas, ray_actor_options={"num_cpus": GATEWAY_CPU, **options}, **limits
    )(SetGatewayReplica)
    application: Application = gateway.bind(serving.to_json(), settings, routing, *others)
    return application
