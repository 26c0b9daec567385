"""An engine that several groups of requests share, and what it has done (step speed).

Must not know: how it was built, other engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from antiphon.apps.process.wiring.build import AttentionPart
from antiphon.core.request import RequestId, RequestOutput
from antiphon.engine.core import Outbox


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPoolCounts:
    """What an expert's engines have done since the model pool was made, evicted ones included."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_free_blocks: int = 0  # of its engine now; 0 when it is not resident


@dataclass(slots=True, kw_only=True, eq=False)
class AnswerGroup:
    """Requests that are answered together; ``done`` is called once, when none is left or with what went wrong."""

    left: set[RequestId]
    take: Outbox
    done: Callable[[BaseException | None], None]


@dataclass(slots=True, kw_only=True, eq=False)
class SharedEngine:
    """An engine of the pool; belongs to the engines' thread."""

    part: AttentionPart
    groups: dict[RequestId, AnswerGroup] = field(default_factory=dict)  # of live requests

    def take(self, outputs: Sequence[RequestOutput]) -> None:
        """The engine's outbox."""
        shared: dict[AnswerGroup, list[RequestOutput]] = {}
        for output in outputs:
            group = self.groups.get(output.request_id)
            if group is None:
                continue
            shared.setdefault(group, []).append(output)
            if output.finish_reason is not None:
                del self.groups[output.request_id]
                group.left.discard(output.request_id)
        for group, mine in shared.items():
            group.take(mine)
            if not group.left:
                group.done(None)

    def fail(self, error: BaseException) -> None:
        """Whoever waits for it gets ``error``."""
        for group in set(self.groups.values()):
            group.done(error)
        self.groups.clear()

    def counts(self, before: ModelPoolCounts) -> ModelPoolCounts:
        """``before``, and what this engine has done."""
        engine = self.part.engine
        stats = engine.scheduler.stats
        return ModelPoolCounts(
            num_steps=before.num_steps + engine.num_steps,
            num_prompt_tokens=before.num_prompt_tokens + stats.num_prompt_tokens,
            num_generation_tokens=before.num_generation_tokens + stats.num_generation_tokens,
            num_preemptions=before.num_preemptions + stats.num_preemptions,
            num_prefix_query_tokens=before.num_prefix_query_tokens + stats.num_prefix_query_tokens,
            num_prefix_hit_tokens=before.num_prefix_hit_tokens + stats.num_prefix_hit_tokens,
            num_free_blocks=engine.scheduler.blocks.num_free_blocks,
        )
