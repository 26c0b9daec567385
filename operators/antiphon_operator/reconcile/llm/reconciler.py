"""Reconciles one LLMDeployment: read, validate, plan, apply, status (control speed).

Level-based: everything is read anew, one step of the rollout is taken, and the status is written last; it may be stopped after any
write and started again. At rest it reads ten times and writes nothing; resync.py shares those reads. Must not know: why it is
called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from antiphon.core.document.policies import ScalingMode
from antiphon.core.document.spec import LLMDeployment
from antiphon_operator.api.conditions import ConditionSet, Reason
from antiphon_operator.kube.base import Conflict, Kube, NotFound, Object, UnknownField, controller_of, name_of, owner_reference
from antiphon_operator.kube.resources import (
    CONTROLLER_REVISION,
    DISRUPTION_BUDGET,
    LLM_DEPLOYMENT,
    MODEL_ARTIFACT,
    NETWORK_POLICY,
    POD,
    RAY_CLUSTER,
    RAY_SERVICE,
    SERVICE,
    SERVING_POOL,
    Resource,
)
from antiphon_operator.log_fields import note, note_object
from antiphon_operator.planning.autoscaler import Metrics
from antiphon_operator.planning.memory import memory_problems
from antiphon_operator.planning.rollout import Action, Step, World, next_step
from antiphon_operator.reconcile.gateways import GatewaySource
from antiphon_operator.reconcile.llm.accept import Refused, accept
from antiphon_operator.reconcile.llm.children import apply_children, tell_children
from antiphon_operator.reconcile.llm.drafts import with_draft_model
from antiphon_operator.reconcile.llm.gateway_api import GatewayObjects, apply_gateway_objects
from antiphon_operator.reconcile.llm.pools import PoolsPlan, plan_pools
from antiphon_operator.reconcile.llm.proof import with_proof
from antiphon_operator.reconcile.llm.rollout import plan_rollout, rollout_status
from antiphon_operator.reconcile.llm.stages import passed_stages
from antiphon_operator.reconcile.llm.status import (
    ModelState,
    Refusal,
    llm_status,
    refused_status,
    waiting_status,
)
from antiphon_operator.reconcile.llm.weights import Found, find_weights, model_of_refused
from antiphon_operator.reconcile.observe import Observed, view_cluster, view_pods, view_service
from antiphon_operator.reconcile.writer import NotOurs, Writer
from antiphon_operator.render import children as render
from antiphon_operator.render.names import (
    LABEL_DEPLOYMENT,
    LABEL_POOL,
    MANAGER,
    RAY_ORIGIN_LABEL,
    group_of,
)
from antiphon_operator.render.ray_cluster import bounds
from antiphon_operator.render.revision import Revision, from_object, render_revision, to_object
from antiphon_operator.render.route import inference_pool
from antiphon_operator.render.settings import Settings

BUSY_S = 5.0  # while something moves
METRICS_S = 15.0  # while a pool follows its metrics
REST_S = 600.0  # slow resync
_LOG = logging.getLogger(__name__)
_APPLY_TARGET = (Action.CREATE, Action.APPLY_SERVE, Action.APPLY_CLUSTER, Action.REPLACE_PENDING, Action.RESUME)


class MetricsSource(Protocol):
    """Where measured latencies, queues and KV usage come from."""

    async def read(self, namespace: str, document: LLMDeployment) -> Mapping[str, Metrics]:
        """The latest measures per pool; pools without any are left out. Never raises for an unreachable deployment."""
        ...


class NoMetrics:
    """A source that knows nothing; pools that follow metrics hold their sizes."""

    async def read(self, namespace: str, document: LLMDeployment) -> Mapping[str, Metrics]:
        """See MetricsSource."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """All that was read."""

    live: Object
    document: LLMDeployment
    owner: Object
    service: Object | None
    pools: Mapping[str, Object]
    revisions: Mapping[str, Object]
    surroundings: Mapping[tuple[str, str], Object]
    observed: Observed


class LLMReconciler:
    """Reconciles LLMDeployments through ``kube``. Holds nothing between calls; may be called for different keys at once."""

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        *,
        clock: Callable[[], float],
        metrics: MetricsSource | None = None,
        gateways: GatewaySource | None = None,
        busy_s: float = BUSY_S,
        on_stage: Callable[[str, float], None] | None = None,
    ) -> None:
        self._kube = kube
        self._settings = settings
        self._clock = clock
        self._busy_s = busy_s
        self._on_stage = on_stage  # told once of each stage of a start, with the seconds it took
        self._metrics = metrics if metrics is not None else NoMetrics()
        self._gateways = gateways  # None = KubeRay's word is taken for what runs

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """Take one step for the deployment.

        Returns:
            Seconds until it must be looked at again, or None when it is gone.

        Raises:
            KubeError: the API server failed; try again.
        """
        live = await self._kube.get(LLM_DEPLOYMENT, namespace, name)
        if live is None or "deletionTimestamp" in live["metadata"]:
            return None  # what it owns goes with it
        note_object(live)
        writer = Writer(kube=self._kube, owner_uid=live["metadata"]["uid"], now_s=self._clock())
        document: LLMDeployment | None = None
        try:
            document = accept(live, self._settings.runtime)
            document = await with_draft_model(self._kube, document)
            world = await self._read(live, document)
            weights = await self._weights(document)
            return await self._act(writer, world, weights)
        except Refused as refused:
            refusal = refused.refusal
        except NotOurs as error:
            refusal = Refusal(reason=Reason.NAME_CONFLICT, message=str(error))
        model = model_of_refused(live, (await self._kube.list(MODEL_ARTIFACT, namespace)).items)
        status, conditions = refused_status(live, refusal, model, document=document, now_s=writer.now_s)
        await _tell(writer, live, conditions)
        await writer.status(live, status)
        return REST_S / 10

    async def _read(self, live: Object, document: LLMDeployment) -> _World:
        namespace, name = live["metadata"]["namespace"], name_of(live)
        labels = {LABEL_DEPLOYMENT: name}
        try:
            clusters = await self._kube.list(RAY_CLUSTER, namespace, {RAY_ORIGIN_LABEL: name})
        except NotFound as error:
            raise Refused(Reason.KUBERAY_MISSING, "the API server knows no RayCluster: install KubeRay") from error
        service = await self._kube.get(RAY_SERVICE, namespace, name)
        if service is not None and controller_of(service) != live["metadata"]["uid"]:
            raise NotOurs(f"RayService {name} exists and is not ours")
        pods = await self._kube.list(POD, namespace, labels)
        pools = await self._kube.list(SERVING_POOL, namespace, labels)
        revisions = await self._kube.list(CONTROLLER_REVISION, namespace, labels)
        surroundings: dict[tuple[str, str], Object] = {}
        for resource in (SERVICE, DISRUPTION_BUDGET, NETWORK_POLICY):
            for item in (await self._kube.list(resource, namespace, labels)).items:
                surroundings[resource.kind, name_of(item)] = item
        gpu_resources = frozenset(pool.resources.gpu_resource for pool in document.spec.pools)
        uid = live["metadata"]["uid"]
        return _World(
            live=live,
            document=document,
            owner=owner_reference(live),
            service=service,
            pools={item["metadata"].get("labels", {}).get(LABEL_POOL, ""): item for item in pools.items},
            revisions={r["data"].get("revision", ""): r for r in revisions.items if controller_of(r) == uid},
            surroundings=surroundings,
            observed=Observed(
                service=None if service is None else view_service(service),
                clusters=tuple(view_cluster(item) for item in clusters.items),
                pods=view_pods(pods.items, gpu_resources),
            ),
        )

    async def _weights(self, document: LLMDeployment) -> Found:
        artifacts = await self._kube.list(MODEL_ARTIFACT, document.metadata.namespace)
        return find_weights(document, artifacts.items)

    async def _act(self, writer: Writer, world: _World, found: Found) -> float:
        observed, document = world.observed, world.document
        if not found.model.ready and observed.service is None:
            return await self._wait_for_model(writer, world, found.model)
        revision = self._revision(world, found)
        note(revision=revision.name)
        awaited = "" if found.model.ready else found.model.message
        if revision.name not in world.revisions and not awaited:  # what runs already has shown that it fits
            short = "; ".join(memory_problems(document.spec, found.sizes))  # known once the weights are there
            if short:
                raise Refused(Reason.INSUFFICIENT_MEMORY, short)
            await self._keep_revision(writer, world, revision)
        metrics = await self._metrics.read(document.metadata.namespace or "default", document) if _measures(document) else {}
        home = _home_cluster(observed)
        plan = plan_pools(document, world.pools, observed, metrics, cluster=home, now_s=writer.now_s)
        previous: Mapping[str, Any] = world.live.get("status", {})
        if self._gateways is not None:
            observed = await with_proof(self._gateways, document, plan, observed, previous, writer.now_s)
        planned = plan_rollout(document, observed, world.revisions, plan, revision, previous, writer.now_s, awaited=awaited)
        step = next_step(planned)
        if step.action not in (Action.NOTHING, Action.WAIT):
            _LOG.info("%s: %s", step.action.value, step.why)
        failed = previous.get("failedRevision", "")
        if step.action is Action.MARK_FAILED:
            failed = planned.wanted.name
        elif failed and failed != planned.wanted.name:
            failed = ""  # another document is wanted now
        await apply_children(self._kube, writer, document, world.owner, world.pools)
        await self._apply_service(writer, world, plan, step, planned, revision)
        await self._apply_surroundings(writer, world, plan.asked)
        active = "" if observed.service is None else observed.service.active
        before = GatewayObjects(route=str(previous.get("route", "")), pool=str(previous.get("inferencePool", "")))
        reached = await apply_gateway_objects(self._kube, writer, document, world.owner, active_cluster=active, before=before)
        if step.action is Action.DELETE_PENDING:
            await self._kube.delete(RAY_CLUSTER, document.metadata.namespace, planned.stale_pending)
        await self._raise_bounds(writer, world)
        await self._prune(world, keep={revision.name, step.revision.name, failed, previous.get("lastGoodRevision", "")})
        rollout = rollout_status(previous, observed, step, writer.now_s, is_complete=planned.ready)
        await tell_children(writer, document, world.pools, plan, observed, home)
        status, conditions = llm_status(
            world.live, document, plan, observed, step, found.model,
            rollout=rollout, failed=failed, last_good=previous.get("lastGoodRevision", ""),
            unapplied=tuple(writer.unapplied), reached=reached, now_s=writer.now_s,
        )  # fmt: skip
        await _tell(writer, world.live, conditions)
        await writer.status(world.live, status.model_dump(mode="json", by_alias=True, exclude_none=True))
        for stage, took_s in passed_stages(previous.get("stages", {}), status.stages):
            _LOG.info("stage %s after %.0f s", stage, took_s)
            if self._on_stage is not None:
                self._on_stage(stage, took_s)
        settled = step.action in (Action.NOTHING, Action.STALL) and plan.asked == _without_limits(world, plan)
        if not settled:
            return self._busy_s
        if writer.unapplied:
            return REST_S / 10  # whoever is in the way may go
        return METRICS_S if _measures(document) else REST_S

    async def _wait_for_model(self, writer: Writer, world: _World, model: ModelState) -> float:
        status, conditions = waiting_status(world.live, world.document, model, now_s=writer.now_s)
        await _tell(writer, world.live, conditions)
        await writer.status(world.live, status)
        return self._busy_s

    def _revision(self, world: _World, found: Found) -> Revision:
        """The revision of the document, as it was first rendered; a newer operator's rendering is not taken for it."""
        rendered = render_revision(world.document, self._settings, found.weights, draft_weights=found.draft_weights)
        kept = world.revisions.get(rendered.name)
        return rendered if kept is None else from_object(kept)

    async def _keep_revision(self, writer: Writer, world: _World, revision: Revision) -> None:
        if revision.name not in world.revisions:
            number = max((int(r.get("revision", 0)) for r in world.revisions.values()), default=0) + 1
            await writer.ensure(to_object(world.document, world.owner, revision, number))

    async def _apply_service(
        self, writer: Writer, world: _World, plan: PoolsPlan, step: Step, planned: World, wanted: Revision
    ) -> None:
        applied = planned.applied
        target = step.revision if step.action in _APPLY_TARGET or applied is None else applied
        kept = world.revisions.get(target.name)
        if target.name != wanted.name and kept is None:
            return  # its record is gone: what runs is left as it is until another revision is wanted
        revision = wanted if target.name == wanted.name or kept is None else from_object(kept)
        suspend = planned.suspended_spec
        if step.action is Action.SUSPEND or (step.action is Action.CREATE and world.document.spec.suspend):
            suspend = True
        elif step.action is Action.RESUME:
            suspend = False
        sizes = {name: plan.asked.get(name, 0) for name in _deployments(revision)}
        was_said = world.service is not None and "suspend" in world.service["spec"]
        service = render.ray_service(
            world.document, world.owner, revision, sizes, _limits(world.document, revision),
            suspend=suspend if suspend or was_said else None,
            new_clusters=step.action is not Action.REPLACE_PENDING and not planned.stale_pending,
        )  # fmt: skip
        try:
            # Its controller is ours alone: KubeRay writes the whole object once, with defaults of its own in every worker group,
            # and owns that list from then on.
            await writer.ensure(service, world.service, force=True)
        except UnknownField as error:
            raise Refused(
                Reason.UNSUPPORTED_KUBERAY, f"KubeRay's RayService lacks what is needed, upgrade it to 1.7 or newer: {error}"
            ) from error

    async def _apply_surroundings(self, writer: Writer, world: _World, sizes: Mapping[str, int]) -> None:
        document, owner = world.document, world.owner
        active = "" if world.observed.service is None else world.observed.service.active
        behind = inference_pool(document, owner, active)
        wanted = [
            *render.services(document, owner, active),
            *([] if behind is None else [behind[1]]),
            *render.disruption_budgets(document, owner, sizes),
            *render.network_policies(document, owner, self._settings),
        ]
        for value in wanted:
            await writer.ensure(value, world.surroundings.get((value["kind"], name_of(value))))
        names = {(value["kind"], name_of(value)) for value in wanted}
        by_kind: dict[str, Resource] = {r.kind: r for r in (SERVICE, DISRUPTION_BUDGET, NETWORK_POLICY)}
        for (kind, name), live in world.surroundings.items():
            if (kind, name) not in names and controller_of(live) == writer.owner_uid:
                await self._kube.delete(by_kind[kind], document.metadata.namespace, name, uid=live["metadata"]["uid"])

    async def _raise_bounds(self, writer: Writer, world: _World) -> None:
        """Bounds of groups never reach a living RayCluster by themselves."""
        wanted = bounds(world.document)
        for cluster in world.observed.clusters:
            patch: list[Object] = [{"op": "test", "path": "/metadata/resourceVersion", "value": cluster.resource_version}]
            for group, (index, most) in sorted(cluster.bounds.items()):
                if group in wanted and wanted[group] != most:
                    at = f"/spec/workerGroupSpecs/{index}"
                    patch += [
                        {"op": "test", "path": f"{at}/groupName", "value": group},
                        {"op": "replace", "path": f"{at}/maxReplicas", "value": wanted[group]},
                    ]
            if len(patch) > 1:
                try:
                    namespace = world.document.metadata.namespace
                    await self._kube.json_patch(RAY_CLUSTER, namespace, cluster.name, patch, manager=MANAGER)
                except (Conflict, NotFound):
                    continue  # it changed meanwhile: the next reconcile reads it anew

    async def _prune(self, world: _World, keep: set[str]) -> None:
        if world.observed.service is not None:
            keep = keep | {world.observed.service.revision}
        for name, live in world.revisions.items():
            if name not in keep:
                await self._kube.delete(CONTROLLER_REVISION, world.document.metadata.namespace, name_of(live))


async def _tell(writer: Writer, live: Object, conditions: ConditionSet) -> None:
    for condition in conditions.changes():
        await writer.event(live, condition, first=conditions.is_new(condition))


def _measures(document: LLMDeployment) -> bool:
    return any(pool.scaling.mode is ScalingMode.SLO for pool in document.spec.pools)


def _home_cluster(observed: Observed) -> str:
    """The cluster that the applied revision lives in, or will: the pending one while there is one."""
    service = observed.service
    if service is None:
        return ""
    return service.pending or service.active


def _deployments(revision: Revision) -> Sequence[str]:
    return [group_of(deployment["name"]) for deployment in revision.application["deployments"]]


def _limits(document: LLMDeployment, revision: Revision) -> Mapping[str, int]:
    wanted = bounds(document)
    return {g["groupName"]: wanted.get(g["groupName"], 0) for g in revision.ray_cluster["workerGroupSpecs"]}


def _without_limits(world: _World, plan: PoolsPlan) -> Mapping[str, int]:
    return {**plan.asked, **{pool.name: plan.sizes.replicas[pool.name] for pool in world.document.spec.pools}}
