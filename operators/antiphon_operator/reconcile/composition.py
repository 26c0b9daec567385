"""Reconciles one CompositionOfExperts: references, router, how many experts are ready (control speed).

A reference that is missing or not ready degrades the composition and leaves the router's document as it is: the router has its own
circuit breakers and fallbacks. Must not know: how requests are routed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from antiphon.core.document.coe.experts import ExpertSpec
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import Problem, SpecInvalid
from antiphon_operator.api.conditions import ConditionSet, Reason, Type
from antiphon_operator.api.status import CompositionStatus, ExpertStatus
from antiphon_operator.kube.base import Kube, Object, name_of, owner_reference
from antiphon_operator.kube.resources import COMPOSITION, DEPLOYMENT, LLM_DEPLOYMENT, MODEL_ARTIFACT
from antiphon_operator.log_fields import note_object
from antiphon_operator.reconcile.llm.accept import Refused
from antiphon_operator.reconcile.llm.drafts import with_draft_model
from antiphon_operator.reconcile.llm.status import Refusal, refused_status
from antiphon_operator.reconcile.llm.weights import find_weights
from antiphon_operator.reconcile.tiers import NoTiers, TierSeen, TierSource
from antiphon_operator.reconcile.writer import NotOurs, Writer
from antiphon_operator.render.composition import Address, children, composition_service, key_of, lending_problems, router_name
from antiphon_operator.render.model_pool import Member, pool_problems, pool_scheme
from antiphon_operator.render.names import DEFAULT_HTTP_PORT, http_service
from antiphon_operator.render.settings import Settings

_NO_MEMBERS = "spec.tiers has no effect: every referenced LLMDeployment has workers of its own; with spec.suspend they share a pool"
BUSY_S = 10.0
TIERS_S = 30.0  # while experts come and go on a model pool
REST_S = 600.0


class CompositionReconciler:
    """Reconciles CompositionsOfExperts through ``kube``. Holds nothing between calls; ``tiers`` knows where experts are."""

    def __init__(self, kube: Kube, settings: Settings, *, clock: Callable[[], float], tiers: TierSource | None = None) -> None:
        self._kube = kube
        self._settings = settings
        self._clock = clock
        self._tiers: TierSource = NoTiers() if tiers is None else tiers

    async def reconcile(self, namespace: str, name: str) -> float | None:
        """Take one step for the composition; seconds until the next, or None when it is gone.

        Raises:
            KubeError: the API server failed; try again.
        """
        live = await self._kube.get(COMPOSITION, namespace, name)
        if live is None or "deletionTimestamp" in live["metadata"]:
            return None
        note_object(live)
        writer = Writer(kube=self._kube, owner_uid=live["metadata"]["uid"], now_s=self._clock())
        try:
            document = CompositionOfExperts.model_validate({k: live[k] for k in ("apiVersion", "kind", "metadata", "spec")})
            references = await self._references(document)
            members = await self._members(document, references)
            if problems := lending_problems(document, members):
                raise SpecInvalid(problems)
            for child in children(document, owner_reference(live), _addresses(document, references), self._settings, members):
                await writer.ensure(child)
            routers = await self._routers(document)
            pool: ModelPoolSeen | None = None
            if members:
                seen = await self._tiers.read(f"{_door_of(live, members)}/metrics") if routers.ready else {}
                pool = ModelPoolSeen(members=frozenset(m.name for m in members), ready=routers.ready > 0, tiers=seen)
            status, conditions = _status(live, document, references, routers, writer, _door_of(live, members), pool)
            value: Mapping[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
            settled = conditions.holds(Type.READY) and conditions.holds(Type.EXPERTS_READY)
            at_rest = settled and not conditions.holds(Type.DEGRADED)
        except ValidationError as error:
            text = "; ".join(e["msg"] for e in error.errors(include_input=False))
            value, conditions = refused_status(live, Refusal(reason=Reason.INVALID_SPEC, message=text), now_s=writer.now_s)
            at_rest = True
        except SpecInvalid as error:
            value, conditions = refused_status(live, Refusal(reason=Reason.INVALID_SPEC, message=str(error)), now_s=writer.now_s)
            at_rest = False  # a member may change, which this document's own watch does not see
        except NotOurs as error:
            refusal = Refusal(reason=Reason.NAME_CONFLICT, message=str(error))
            value, conditions = refused_status(live, refusal, now_s=writer.now_s)
            at_rest = False
        for condition in conditions.changes():
            await writer.event(live, condition, first=conditions.is_new(condition))
        await writer.status(live, value)
        return BUSY_S if not at_rest else REST_S if not value.get("modelPool") else TIERS_S

    async def _references(self, document: CompositionOfExperts) -> Mapping[str, Object | None]:
        names = sorted({e.deployment_ref for e in document.spec.experts if e.deployment_ref is not None})
        return {name: await self._kube.get(LLM_DEPLOYMENT, document.metadata.namespace, name) for name in names}

    async def _members(self, document: CompositionOfExperts, references: Mapping[str, Object | None]) -> tuple[Member, ...]:
        """The experts on the model pool: referenced deployments that are suspended, so that only the pool holds their weights.

        Raises:
            SpecInvalid: they can't share one.
        """
        suspended = {name: live for name, live in references.items() if live is not None and live["spec"].get("suspend")}
        if document.spec.tiers is None or not suspended:
            return ()
        artifacts = await self._kube.list(MODEL_ARTIFACT, document.metadata.namespace)
        members = []
        for name, live in suspended.items():
            try:
                member = LLMDeployment.model_validate({k: live[k] for k in ("apiVersion", "kind", "metadata", "spec")})
            except ValidationError as error:
                text = "; ".join(e["msg"] for e in error.errors(include_input=False))
                raise SpecInvalid([Problem(path=f"LLMDeployment/{name}", message=text)]) from error
            try:
                member = await with_draft_model(self._kube, member)
            except Refused as refused:
                raise SpecInvalid([Problem(path=f"LLMDeployment/{name}", message=refused.refusal.message)]) from refused
            found = find_weights(member, artifacts.items)
            members.append(Member(document=member, weights=found.weights, draft_weights=found.draft_weights, sizes=found.sizes))
        problems = pool_problems(document, members)
        if problems:
            raise SpecInvalid(problems)
        return tuple(members)

    async def _routers(self, document: CompositionOfExperts) -> RoutersSeen:
        return view_routers(await self._kube.get(DEPLOYMENT, document.metadata.namespace, router_name(document.metadata.name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutersSeen:
    """The router's pods."""

    ready: int
    behind: str  # why not all of those that run are of the present document, for people; "" = they are


def view_routers(live: Object | None) -> RoutersSeen:
    """Read the router's Deployment as ``kubectl rollout status`` does: its status may speak of what was asked for before."""
    if live is None:
        return RoutersSeen(ready=0, behind="")
    status = live.get("status", {})
    behind, replicas = "", int(status.get("replicas", 0))
    old = replicas - int(status.get("updatedReplicas", 0))
    if status.get("observedGeneration", live["metadata"]["generation"]) < live["metadata"]["generation"]:
        behind = "the change of the router's Deployment has not been acted on yet"
    elif old > 0:
        behind = f"{old} of {replicas} router pods still run the former document"
    return RoutersSeen(ready=int(status.get("readyReplicas", 0)), behind=behind)


def _addresses(document: CompositionOfExperts, references: Mapping[str, Object | None]) -> dict[str, Address]:
    """Where each referenced deployment is, or will be: a missing one keeps the address it would have."""
    namespace = document.metadata.namespace or "default"
    out = {}
    for name, live in references.items():
        spec: Mapping[str, Any] = {} if live is None else live["spec"]
        port = spec.get("endpoint", {}).get("httpPort") or DEFAULT_HTTP_PORT
        model = spec.get("model", {}).get("name") or name
        scheme = "https" if spec.get("endpoint", {}).get("tls") else "http"
        url = f"{scheme}://{http_service(name)}.{namespace}.svc:{port}/v1"
        out[name] = Address(url=url, model=model)
    return out


def _asks_for_keys(spec: Mapping[str, Any]) -> bool:
    endpoint = spec.get("endpoint", {})
    return endpoint.get("apiKeysEnv") is not None or endpoint.get("apiKeysFile") is not None


def _expert(expert: ExpertSpec, reference: str, live: Object | None, addresses: Mapping[str, Address]) -> ExpertStatus:
    name, address = expert.name, addresses[reference]
    if live is None:
        return ExpertStatus(name=name, ready=False, url=address.url, message=f"there is no LLMDeployment {reference}")
    if _asks_for_keys(live["spec"]) and key_of(expert) is None:
        why = f"LLMDeployment {reference} asks for API keys: set apiKeySecret of this expert, to one of scope user"
        return ExpertStatus(name=name, ready=False, url=address.url, message=why)
    found = {c["type"]: c for c in live.get("status", {}).get("conditions", ())}
    # Requests may go wherever they are answered, be it by an older revision than the one asked for.
    ready = found.get(Type.AVAILABLE, found.get(Type.READY))
    holds = ready is not None and ready["status"] == "True"
    message = "" if holds else "not reconciled yet" if ready is None else f"{ready['reason']}: {ready.get('message', '')}"
    return ExpertStatus(name=name, ready=holds, url=address.url, message=message[:1000])


def _starts(live: Object | None) -> bool:
    """Whether a referenced deployment that does not answer yet is on its way."""
    if live is None:
        return False
    reasons = {c["type"]: c["reason"] for c in live.get("status", {}).get("conditions", ())}
    why = reasons.get(Type.AVAILABLE, reasons.get(Type.READY))
    return why in (None, Reason.INITIALIZING, Reason.DOWNLOADING, Reason.PODS_PENDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPoolSeen:
    """The model pool as far as it is known."""

    members: frozenset[str]  # names of LLMDeployments
    ready: bool
    tiers: Mapping[str, TierSeen]

    def expert(self, name: str, reference: str, url: str) -> ExpertStatus:
        """The status of an expert on it."""
        seen = self.tiers.get(reference)
        return ExpertStatus(
            name=name,
            ready=self.ready,
            url=url,
            message="" if self.ready else "its model pool is starting",
            resident=None if seen is None else seen.resident,
            wake_s=None if seen is None else seen.wake_s,
        )


def _status(
    live: Object,
    document: CompositionOfExperts,
    references: Mapping[str, Object | None],
    routers: RoutersSeen,
    writer: Writer,
    door: str,
    pool: ModelPoolSeen | None,
) -> tuple[CompositionStatus, ConditionSet]:
    addresses = _addresses(document, references)
    experts, starting = [], set()
    for expert in document.spec.experts:
        if expert.deployment_ref is not None:
            reference = expert.deployment_ref
            if pool is not None and reference in pool.members:
                experts.append(pool.expert(expert.name, reference, f"{door}/v1"))
                starting.add(expert.name)
                continue
            experts.append(_expert(expert, reference, references[reference], addresses))
            if _starts(references[reference]):
                starting.add(expert.name)
        elif expert.external is not None:
            experts.append(ExpertStatus(name=expert.name, ready=True, url=expert.external.url))
    num_ready = sum(1 for expert in experts if expert.ready)
    generation = live["metadata"]["generation"]
    conditions = ConditionSet(live.get("status", {}).get("conditions", ()), generation=generation, now_s=writer.now_s)
    missing = [name for name, value in references.items() if value is None]
    if missing:
        message = f"no LLMDeployment of the name {', '.join(missing)}"
        conditions.set(Type.ACCEPTED, False, Reason.REFERENCE_NOT_FOUND, message)
    else:
        conditions.set(Type.ACCEPTED, True, Reason.ACCEPTED, _tiers_told(document, pool))
    down = "; ".join(f"{expert.name}: {expert.message}" for expert in experts if not expert.ready)
    all_ready = num_ready == len(experts)
    # The first start is no cause for concern; what was there and is gone is.
    before = {c["type"]: c["reason"] for c in live.get("status", {}).get("conditions", ())}
    first = before.get(Type.EXPERTS_READY, Reason.INITIALIZING) == Reason.INITIALIZING
    first = first and starting.issuperset(expert.name for expert in experts if not expert.ready)
    unavailable = Reason.INITIALIZING if first else Reason.EXPERT_UNAVAILABLE
    conditions.set(Type.EXPERTS_READY, all_ready, Reason.ALL_EXPERTS_READY if all_ready else unavailable, down)
    router = Reason.READY if routers.ready else Reason.INITIALIZING
    conditions.set(Type.ROUTER_READY, routers.ready > 0, router, f"{routers.ready} of {document.spec.router.replicas}")
    if num_ready == 0:
        conditions.set(Type.READY, False, Reason.INITIALIZING if first else Reason.NO_EXPERT_READY, down)
    elif not routers.ready:
        conditions.set(Type.READY, False, Reason.INITIALIZING, "no router is ready")
    elif routers.behind:
        conditions.set(Type.READY, False, Reason.NEW_REVISION, f"{routers.behind}; requests are answered meanwhile")
    else:
        conditions.set(Type.READY, True, Reason.READY)
    if writer.unapplied:
        why = "; ".join(item.message for item in writer.unapplied)
        conditions.set(Type.READY, False, writer.unapplied[0].reason, why)
        conditions.set(Type.DEGRADED, True, writer.unapplied[0].reason, why)
    else:
        degraded = not all_ready and not first
        conditions.set(Type.DEGRADED, degraded, Reason.EXPERT_UNAVAILABLE if degraded else Reason.HEALTHY, down)
    status = CompositionStatus(
        observed_generation=generation,
        conditions=conditions.values,
        experts=tuple(experts),
        experts_ready=f"{num_ready}/{len(experts)}",
        url=f"{door}/v1",
        model_pool=_pool_line(pool),
    )
    return status, conditions


def _door_of(live: Object, members: Sequence[Member]) -> str:
    """Where the router's HTTP API is within the cluster, without a path."""
    return f"{pool_scheme(members)}://{composition_service(name_of(live))}.{live['metadata']['namespace']}.svc:{DEFAULT_HTTP_PORT}"


def _tiers_told(document: CompositionOfExperts, pool: ModelPoolSeen | None) -> str:
    if document.spec.tiers is None:
        return ""
    return _NO_MEMBERS if pool is None else f"{', '.join(sorted(pool.members))} share a model pool"


def _pool_line(pool: ModelPoolSeen | None) -> str:
    """The model pool in a line, e.g. 2/3 resident."""
    if pool is None:
        return ""
    if not pool.tiers:
        return f"{len(pool.members)} experts"
    return f"{sum(seen.resident for seen in pool.tiers.values())}/{len(pool.members)} resident"
