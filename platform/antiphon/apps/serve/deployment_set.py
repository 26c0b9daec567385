"""Several documents served together: every pool once, one gateway before them, compositions over them (control speed).

Pure: what can't be served together is refused here, with the fields named. Must not know: processes, Ray, terminals.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from antiphon.apps.tiers.plan import TierPool, tier_pools_of
from antiphon.core.device import device_problems
from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.loading import Document
from antiphon.core.document.serving import EndpointSpec
from antiphon.core.document.spec import DRAFT_REFERENCE, LLMDeployment
from antiphon.core.errors import InvalidInput, Problem, SpecInvalid, UnknownModel
from antiphon.core.tiers import tier_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What one ``antiphon serve`` serves. ``checkpoints``: the directory of each deployment's model, once it is there."""

    deployments: tuple[LLMDeployment, ...]
    compositions: tuple[CompositionOfExperts, ...] = ()
    endpoint: EndpointSpec = field(default_factory=EndpointSpec)
    redis_url: str | None = None
    checkpoints: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def alone(cls, document: LLMDeployment, checkpoint: str) -> Serving:
        """One deployment."""
        return cls(
            deployments=(document,),
            endpoint=document.spec.endpoint,
            redis_url=document.spec.directory.redis_url,
            checkpoints={document.metadata.name: checkpoint},
        )

    @property
    def name(self) -> str:
        """What to call it: the composition's name, or the deployments'."""
        named = [c.model_name for c in self.compositions] or [d.metadata.name for d in self.deployments]
        return ", ".join(named)

    @property
    def num_workers(self) -> int:
        """Worker processes of all pools."""
        return sum(pool.replicas for document in self.deployments for pool in document.spec.pools)

    @property
    def tier_pools(self) -> tuple[TierPool, ...]:
        """Deployments that share a process and its memory, by what compositions say."""
        return tier_pools_of(self.deployments, self.compositions, self.checkpoints)

    @property
    def num_processes(self) -> int:
        """Processes of all workers: those on a model pool share one."""
        return self.num_workers - sum(len(tier_pool.members) - 1 for tier_pool in self.tier_pools)

    def tier_pool_of(self, deployment: str) -> TierPool | None:
        """The model pool that a deployment is on."""
        return next((tier_pool for tier_pool in self.tier_pools if deployment in {m.deployment for m in tier_pool.members}), None)

    @property
    def models(self) -> dict[str, str]:
        """Served model name of each deployment."""
        return {document.metadata.name: document.model_name for document in self.deployments}

    def run_dir_of(self, deployment: str, run_dir: Path) -> Path:
        """Where a deployment's processes keep logs and event log; apart from each other's when there are several."""
        return run_dir if len(self.deployments) == 1 else run_dir / deployment

    def with_ports(self, http_port: int | None, grpc_port: int | None) -> Serving:
        """The same on other ports; None = as it is."""
        given = {"http_port": http_port, "grpc_port": grpc_port}
        changed = {key: port for key, port in given.items() if port is not None}
        return replace(self, endpoint=self.endpoint.model_copy(update=changed))

    def to_json(self) -> str:
        """For processes; ``from_json`` takes it."""
        value: dict[str, Any] = {
            "deployments": [d.model_dump(mode="json", by_alias=True) for d in self.deployments],
            "compositions": [c.model_dump(mode="json", by_alias=True) for c in self.compositions],
            "endpoint": self.endpoint.model_dump(mode="json", by_alias=True),
            "redis_url": self.redis_url,
            "checkpoints": dict(self.checkpoints),
        }
        return json.dumps(value)

    @classmethod
    def from_json(cls, text: str) -> Serving:
        """What ``to_json`` gave."""
        value = json.loads(text)
        return cls(
            deployments=tuple(LLMDeployment.model_validate_json(json.dumps(d)) for d in value["deployments"]),
            compositions=tuple(CompositionOfExperts.model_validate_json(json.dumps(c)) for c in value["compositions"]),
            endpoint=EndpointSpec.model_validate_json(json.dumps(value["endpoint"])),
            redis_url=value["redis_url"],
            checkpoints=value["checkpoints"],
        )


def serving_of(documents: Sequence[Document], source: str) -> Serving:
    """What the documents ask for together.

    Raises:
        SpecInvalid: there is nothing to serve, or the documents don't fit together; every problem is named.
    """
    deployments = tuple(document for document in documents if isinstance(document, LLMDeployment))
    compositions = tuple(document for document in documents if isinstance(document, CompositionOfExperts))
    problems = [
        *_nothing(documents, deployments, compositions),
        *_repeated(deployments, compositions),
        *unknown_references(deployments, compositions),
        *unknown_draft_models(deployments),
        *tier_problems(deployments, compositions),
        *_devices(deployments),
    ]
    endpoint, redis_url = EndpointSpec(), None
    if deployments:
        values, more = _merged([(d.metadata.name, "spec.endpoint", d.spec.endpoint) for d in deployments])
        problems += more
        endpoint = EndpointSpec.model_validate(values)
        urls = {d.spec.directory.redis_url for d in deployments}
        if len(urls) > 1:
            problems.append(_problem(deployments[1], "spec.directory.redisUrl", "deployments served together share one directory"))
        redis_url = deployments[0].spec.directory.redis_url
    if problems:
        raise SpecInvalid([replace(problem, source=source) for problem in problems])
    known = {document.metadata.name: document for document in deployments}
    deployments = tuple(document.with_draft_model(known) for document in deployments)
    return Serving(deployments=deployments, compositions=compositions, endpoint=endpoint, redis_url=redis_url)


def _problem(document: Document, path: str, message: str) -> Problem:
    return Problem(path=f"{document.kind}/{document.metadata.name}: {path}", message=message)


def _nothing(
    documents: Sequence[Document], deployments: Sequence[LLMDeployment], compositions: Sequence[CompositionOfExperts]
) -> list[Problem]:
    if not deployments and not compositions:
        kinds = ", ".join(f"{document.kind}/{document.metadata.name}" for document in documents)
        return [Problem(path="kind", message=f"serve takes LLMDeployment and CompositionOfExperts, there are {kinds}")]
    return [
        _problem(document, "spec.pools", f"nothing can be served while pool {pool.name} has 0 replicas")
        for document in deployments
        for pool in document.spec.pools
        if pool.replicas == 0
    ]


def _devices(deployments: Sequence[LLMDeployment]) -> list[Problem]:
    return [_problem(document, f"spec.{path}", why) for document in deployments for path, why in device_problems(document.spec)]


def _repeated(deployments: Sequence[LLMDeployment], compositions: Sequence[CompositionOfExperts]) -> list[Problem]:
    found = []
    names = Counter(document.metadata.name for document in deployments)
    models = Counter(document.model_name for document in deployments)
    for document in deployments:
        if names[document.metadata.name] > 1:
            found.append(_problem(document, "metadata.name", "another LLMDeployment has this name"))
        elif models[document.model_name] > 1:
            found.append(_problem(document, "spec.model.name", f"another LLMDeployment serves {document.model_name!r} too"))
    titles = Counter(document.metadata.name for document in compositions)
    found += [
        _problem(document, "metadata.name", "another CompositionOfExperts has this name")
        for document in compositions
        if titles[document.metadata.name] > 1
    ]
    return found


def unknown_references(deployments: Sequence[LLMDeployment], compositions: Sequence[CompositionOfExperts]) -> list[Problem]:
    """Experts that name a deployment which is not among these."""
    known = [document.metadata.name for document in deployments]
    return [
        _problem(
            composition,
            f"spec.experts[{index}].deploymentRef",
            f"there is no LLMDeployment {expert.deployment_ref!r} in the files; there are {', '.join(known) or 'none'}",
        )
        for composition in compositions
        for index, expert in enumerate(composition.spec.experts)
        if expert.deployment_ref is not None and expert.deployment_ref not in known
    ]


def unknown_draft_models(deployments: Sequence[LLMDeployment]) -> list[Problem]:
    """Draft models that name a deployment which is not among these, or can't draft."""
    known = {document.metadata.name: document for document in deployments}
    found = []
    for document in deployments:
        try:
            document.with_draft_model(known)
        except UnknownModel as error:
            found.append(_problem(document, DRAFT_REFERENCE, f"{error} in the files; there are {', '.join(known)}"))
        except InvalidInput as error:
            found.append(_problem(document, DRAFT_REFERENCE, str(error)))
    return found


def _merged(parts: Sequence[tuple[str, str, EndpointSpec]]) -> tuple[dict[str, Any], list[Problem]]:
    """All that any document says of the gateway; two may not say different things."""
    values: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    problems = []
    for name, path, part in parts:
        for key in sorted(part.model_fields_set):
            value = getattr(part, key)
            if key in values and values[key] != value:
                alias = type(part).model_fields[key].alias or key
                message = f"one gateway serves all: {said_by[key]} says {values[key]}, this one {value}"
                problems.append(Problem(path=f"LLMDeployment/{name}: {path}.{alias}", message=message))
            else:
                values[key], said_by[key] = value, name
    return values, problems
