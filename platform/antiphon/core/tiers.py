"""Which experts can share the memory of one model pool (control speed, pure).

Must not know: how a model is loaded or started.
"""

from __future__ import annotations

from collections.abc import Sequence

from antiphon.core.document.composition import CompositionOfExperts
from antiphon.core.document.spec import LLMDeployment
from antiphon.core.errors import Problem


def tier_problems(deployments: Sequence[LLMDeployment], compositions: Sequence[CompositionOfExperts]) -> list[Problem]:
    """Why experts can't share memory: each must be one monolith, on one model pool, and no larger than the model pool."""
    documents = {document.metadata.name: document for document in deployments}
    problems: list[Problem] = []
    taken: dict[str, str] = {}
    for composition in compositions:
        tiers = composition.spec.tiers
        if tiers is None:
            continue
        where = f"{composition.kind}/{composition.metadata.name}"
        for index, expert in enumerate(composition.spec.experts):
            if expert.deployment_ref is None or expert.deployment_ref not in documents:
                continue
            path = f"{where}: spec.experts[{index}]"
            pools = documents[expert.deployment_ref].spec.pools
            if len(pools) != 1 or pools[0].role != "monolith" or pools[0].replicas != 1:
                message = f"an expert of spec.tiers is one monolith; {expert.deployment_ref} has other pools or replicas"
                problems.append(Problem(path=f"{path}.deploymentRef", message=message))
            if any(pool.worker_device != "cpu" for pool in pools):
                message = f"experts of spec.tiers share a process that computes on the CPU; {expert.deployment_ref} asks for a card"
                problems.append(Problem(path=f"{path}.deploymentRef", message=message))
            if expert.deployment_ref in taken:
                message = f"{expert.deployment_ref} shares memory already, as {taken[expert.deployment_ref]}"
                problems.append(Problem(path=f"{path}.deploymentRef", message=message))
            taken[expert.deployment_ref] = path
            if expert.memory_bytes is not None and expert.memory_bytes > tiers.resident_memory_bytes:
                message = f"more than spec.tiers.residentMemory, {tiers.resident_memory}"
                problems.append(Problem(path=f"{path}.memory", message=message))
    return problems
