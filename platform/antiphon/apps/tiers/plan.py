"""Which deployments share one process and its memory because a composition's tiers say so, as plain values (control speed).

    CompositionOfExperts with tiers ──► one TierPool ──► one worker process, supervised like the first member's own
                                            └── a TierMember per expert of ours, each registered as a worker of its deployment

Pure. Must not know: how anything is loaded or started.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antiphon.core.document.composition import CompositionOfExperts, TiersSpec
from antiphon.core.document.spec import LLMDeployment


@dataclass(frozen=True, slots=True, kw_only=True)
class TierMember:
    """One expert on a model pool. ``memory_bytes`` None = as large as its files."""

    expert: str
    document: LLMDeployment
    checkpoint: str
    memory_bytes: int | None

    @property
    def deployment(self) -> str:
        """Name of its deployment."""
        return self.document.metadata.name

    @property
    def pool(self) -> str:
        """Name of its only pool."""
        return self.document.spec.pools[0].name

    def checkpoint_bytes(self) -> int:
        """Size of its files. Raises OSError."""
        return sum(path.stat().st_size for path in Path(self.checkpoint).iterdir() if path.is_file())


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPool:
    """Experts that share memory."""

    composition: str
    tiers: TiersSpec
    members: tuple[TierMember, ...]

    @property
    def first(self) -> TierMember:
        """Whose pool stands for the process of all."""
        return self.members[0]

    def to_value(self) -> dict[str, Any]:
        """For JSON; ``from_value`` takes it."""
        return {
            "composition": self.composition,
            "tiers": self.tiers.model_dump(mode="json", by_alias=True),
            "members": [
                {
                    "expert": member.expert,
                    "document": member.document.model_dump(mode="json", by_alias=True),
                    "checkpoint": member.checkpoint,
                    "memory_bytes": member.memory_bytes,
                }
                for member in self.members
            ],
        }

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> TierPool:
        """What ``to_value`` gave. Raises ValueError, TypeError or KeyError when it is something else."""
        return cls(
            composition=value["composition"],
            tiers=TiersSpec.model_validate_json(json.dumps(value["tiers"])),
            members=tuple(
                TierMember(
                    expert=member["expert"],
                    document=LLMDeployment.model_validate_json(json.dumps(member["document"])),
                    checkpoint=member["checkpoint"],
                    memory_bytes=member["memory_bytes"],
                )
                for member in value["members"]
            ),
        )


def tier_pools_of(
    deployments: Sequence[LLMDeployment], compositions: Sequence[CompositionOfExperts], checkpoints: Mapping[str, str]
) -> tuple[TierPool, ...]:
    """The model pools that the documents ask for; they have no ``tier_problems``."""
    documents = {document.metadata.name: document for document in deployments}
    tier_pools = []
    for composition in compositions:
        if composition.spec.tiers is None:
            continue
        members = tuple(
            TierMember(
                expert=expert.name,
                document=documents[expert.deployment_ref],
                checkpoint=checkpoints.get(expert.deployment_ref, ""),
                memory_bytes=expert.memory_bytes,
            )
            for expert in composition.spec.experts
            if expert.deployment_ref in documents
        )
        if members:
            tier_pools.append(TierPool(composition=composition.metadata.name, tiers=composition.spec.tiers, members=members))
    return tuple(tier_pools)
