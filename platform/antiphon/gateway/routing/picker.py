"""Picks the workers of a request: a pure function from what is known to a RoutePlan (request speed).

    registered workers of the model ─► generating, ready, not draining ─► connected ─► room in the queue ─► cheapest

A full queue refuses the tenant who fills it; for who has less in it the engine makes way, exactly (``engine.fairness``).

The cost of a worker is its load (requests over sequences that run at once) plus half the used share of its KV blocks. A
worker that served a prompt with the same beginning is preferred as long as it costs at most ``MAX_IMBALANCE`` more than the
cheapest, so that a popular prefix doesn't pile up on one worker.

Must not know: connections, or how the inputs were counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from antiphon.core.errors import Overloaded, Unavailable
from antiphon.core.ids import Role, WorkerId
from antiphon.core.worker_info import WorkerInfo

MAX_IMBALANCE = 0.5
MAX_RETRY_AFTER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """A worker as the gateway sees it now.

    Leases carry the load of about a second ago; ``num_inflight`` and ``num_inflight_then`` (this gateway's own requests on it, now
    and when that load was read) say what has changed since.
    """

    info: WorkerInfo
    num_inflight: int = 0
    num_inflight_then: int = 0
    connected: bool = True
    makes_way: bool = False  # its queue, if full, is another tenant's

    @property
    def num_requests(self) -> int:
        """Best guess at the requests on the worker, of all gateways: never below our own."""
        load = self.info.load
        reported = load.num_waiting + load.num_running
        return max(self.num_inflight, reported + self.num_inflight - self.num_inflight_then)

    @property
    def num_waiting(self) -> int:
        """Best guess at the requests in its queue."""
        return max(0, self.num_requests - max(self.info.load.num_running, min(self.num_requests, self.info.max_num_seqs)))

    @property
    def is_full(self) -> bool:
        """True when it would refuse another request; a worker that states no limits never is."""
        info = self.info
        if info.max_num_seqs == 0:
            return False
        if self.num_requests >= info.max_num_seqs + info.max_queued_requests:
            return True
        # With requests waiting already, newer ones wait too: the queue can be full before all sequences run, for want of KV blocks.
        # What has ended since has made a place for one of those that waited.
        change = self.num_inflight - self.num_inflight_then
        return 0 < info.max_queued_requests <= info.load.num_waiting + change and info.load.num_waiting > 0

    @property
    def kv_usage(self) -> float:
        """Used share of its KV blocks, 0 to 1."""
        total = self.info.load.num_total_blocks
        return 0.0 if total == 0 else 1.0 - min(total, self.info.load.num_free_blocks) / total

    @property
    def cost(self) -> float:
        """What the picker minimises; grows with requests, queue and used KV."""
        load = (self.num_requests + self.num_waiting) / max(1, self.info.max_num_seqs)
        return load + 0.5 * self.kv_usage


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """Where a request goes, and why."""

    worker: WorkerId
    prefill_worker: WorkerId | None
    why: str
    num_prefix_tokens: int = 0  # of the prompt, likely in the worker's cache


def pick(
    model: str,
    snapshots: Sequence[WorkerSnapshot],
    *,
    num_prompt_tokens: int,
    prefix: Mapping[WorkerId, int] | None = None,
    excluded: AbstractSet[WorkerId] = frozenset(),
    revision: str | None = None,
    remote_prefill_min_tokens: int = 64,
    turn: int = 0,
) -> RoutePlan:
    """Choose the generating worker, and the prefill worker if one is worth it.

    Args:
        model: the name that the client sent.
        snapshots: all registered workers, of any role and model.
        num_prompt_tokens: length of what has to be computed.
        prefix: by worker, how many leading tokens of the prompt it has likely cached.
        excluded: workers that have just failed this request; taken only when there is no other.
        revision: go on with this revision as long as it has any registered worker (equal weights give equal tokens).
        remote_prefill_min_tokens: below so many uncached tokens no prefill worker is worth it.
        turn: rotates among equally cheap workers.

    Raises:
        Unavailable: no worker of the model is ready.
        Overloaded: all ready ones are full.
    """
    prefix = prefix or {}
    serving = [s for s in snapshots if s.info.model == model and s.info.role.generates]
    if revision is not None and any(s.info.revision == revision for s in serving):
        serving = [s for s in serving if s.info.revision == revision]
    ready = [s for s in serving if s.info.ready and not s.info.draining]
    if not ready:
        raise Unavailable(_why_none(model, serving), retry_after_s=2.0)
    candidates = [s for s in ready if s.connected] or ready
    candidates = [s for s in candidates if s.info.worker_id not in excluded] or candidates
    free = [s for s in candidates if not s.is_full] or [s for s in candidates if s.makes_way]
    if not free:
        raise Overloaded(f"all {len(candidates)} workers of {model} have full queues", min(retry_after_s(s) for s in candidates))
    chosen, why = _choose(free, prefix, turn)
    num_prefix_tokens = min(prefix.get(chosen.info.worker_id, 0), num_prompt_tokens)
    prefill = None
    if num_prompt_tokens - num_prefix_tokens >= remote_prefill_min_tokens:
        prefill = _pick_prefill(chosen.info, snapshots, excluded, turn)
    return RoutePlan(
        worker=chosen.info.worker_id,
        prefill_worker=None if prefill is None else prefill.info.worker_id,
        why=why,
        num_prefix_tokens=num_prefix_tokens,
    )


def _choose(free: Sequence[WorkerSnapshot], prefix: Mapping[WorkerId, int], turn: int) -> tuple[WorkerSnapshot, str]:
    cheapest = _cheapest(free, turn)
    warm = max(free, key=lambda s: (prefix.get(s.info.worker_id, 0), -s.cost))
    if prefix.get(warm.info.worker_id, 0) > 0 and warm.cost <= cheapest.cost + MAX_IMBALANCE:
        return warm, "prefix"
    return cheapest, "load"


def _cheapest(snapshots: Sequence[WorkerSnapshot], turn: int) -> WorkerSnapshot:
    least = min(s.cost for s in snapshots)
    equal = [s for s in snapshots if s.cost == least]
    return equal[turn % len(equal)]


def _pick_prefill(
    info: WorkerInfo, snapshots: Sequence[WorkerSnapshot], excluded: AbstractSet[WorkerId], turn: int
) -> WorkerSnapshot | None:
    """The cheapest prefill worker that pairs with the chosen one."""
    fitting = [
        s
        for s in snapshots
        if s.info.role is Role.PREFILL
        and s.info.ready
        and not s.info.draining
        and not s.is_full
        and s.info.worker_id not in excluded
        and (s.info.deployment, s.info.revision, s.info.fingerprint) == (info.deployment, info.revision, info.fingerprint)
    ]
    return _cheapest(fitting, turn) if fitting else None


def retry_after_s(snapshot: WorkerSnapshot) -> float:
    """A queue of as many requests as run at once takes about one request's time; a second each is a fair first guess."""
    return min(MAX_RETRY_AFTER_S, max(1.0, snapshot.num_waiting / max(1, snapshot.info.max_num_seqs)))


def _why_none(model: str, serving: Sequence[WorkerSnapshot]) -> str:
    if not serving:
        return f"no worker of {model} is registered"
    draining = sum(s.info.draining for s in serving)
    messages = sorted({s.info.message for s in serving if s.info.message})
    told = f"; {draining} draining" if draining else ""
    return f"no worker of {model} is ready ({len(serving)} registered{told})" + (f": {'; '.join(messages)}" if messages else "")
