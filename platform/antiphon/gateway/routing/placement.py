"""Puts requests on workers: the picker with the gateway's own counts (request speed).

Must not know: text, streams, or what happens on a worker.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import Overloaded
from antiphon.core.ids import Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.workers import WorkerView
from antiphon.gateway.routing.affinity import PrefixAffinity, prefix_keys
from antiphon.gateway.routing.engine_client import EngineClient
from antiphon.gateway.routing.picker import RoutePlan, WorkerSnapshot, pick, retry_after_s


class Placement:
    """Chooses workers. Belongs to one event loop.

    Args:
        view: the registered workers.
        client: knows what is in flight where.
        remote_prefill_min_tokens: see ``picker.pick``.
        by_model: the same, where a model differs.
    """

    def __init__(
        self,
        view: WorkerView,
        client: EngineClient,
        *,
        remote_prefill_min_tokens: int,
        by_model: Mapping[str, int] | None = None,
    ) -> None:
        self._view = view
        self._client = client
        self._remote_prefill_min_tokens = remote_prefill_min_tokens
        self._by_model = {} if by_model is None else dict(by_model)
        self._affinity = PrefixAffinity()
        self._prefilling: Counter[WorkerId] = Counter()
        self._inflight_then: dict[WorkerId, int] = {}
        self._ages_s: dict[WorkerId, float] = {}  # of the records when last seen
        self._turns = itertools.count()
        view.on_refresh(self._remember_inflight)

    def find(self, worker_id: WorkerId) -> WorkerInfo | None:
        """The worker's latest record."""
        return next((info for info in self._view.workers if info.worker_id == worker_id), None)

    def place(
        self,
        model: str,
        token_ids: Sequence[int],
        *,
        salt: str = "",
        tenant: str = "",
        excluded: AbstractSet[WorkerId] = frozenset(),
        revision: str | None = None,
    ) -> RoutePlan:
        """Choose for a prompt. Raises Unavailable, Overloaded."""
        keys = prefix_keys(token_ids, f"{model}\n{salt}")
        plan = pick(
            model,
            [self._snapshot(info, tenant) for info in self._view.workers],
            num_prompt_tokens=len(token_ids),
            prefix=self._affinity.match(keys),
            excluded=excluded,
            revision=revision,
            remote_prefill_min_tokens=self._by_model.get(model, self._remote_prefill_min_tokens),
            turn=next(self._turns),
        )
        self._affinity.record(keys, plan.worker)
        return plan

    def check_room(self, models: AbstractSet[str], tenant: str) -> None:
        """Refuse before anything is known of a request but its tenant, where every model's ready workers would refuse it.

        Args:
            models: those it may ask; where one of them has no worker that is ready, nothing is refused here.
            tenant: whose it is.

        Raises:
            Overloaded: so it is.
        """
        full: list[WorkerSnapshot] = []
        for info in self._view.workers:
            if info.model in models and info.role.generates and info.ready and not info.draining:
                snapshot = self._snapshot(info, tenant)
                if not snapshot.is_full or snapshot.makes_way:
                    return
                full.append(snapshot)
        if full and models <= {snapshot.info.model for snapshot in full}:
            raise Overloaded(f"all {len(full)} workers have full queues", min(retry_after_s(each) for each in full))

    def prefill_started(self, worker_id: WorkerId | None) -> None:
        """A request counts on that prefill worker until ``prefill_ended``."""
        if worker_id is not None:
            self._prefilling[worker_id] += 1

    def prefill_ended(self, worker_id: WorkerId | None) -> None:
        """Its first token is there, or will never be."""
        if worker_id is not None:
            self._prefilling[worker_id] -= 1
            if self._prefilling[worker_id] <= 0:
                del self._prefilling[worker_id]

    def _snapshot(self, info: WorkerInfo, tenant: str) -> WorkerSnapshot:
        return WorkerSnapshot(
            info=info,
            num_inflight=self._inflight(info),
            num_inflight_then=self._inflight_then.get(info.worker_id, 0),
            connected=self._client.is_connected(info.worker_id),
            makes_way=self._client.has_less(info.worker_id, tenant),
        )

    def _inflight(self, info: WorkerInfo) -> int:
        return self._prefilling[info.worker_id] if info.role is Role.PREFILL else self._client.inflight_on(info.worker_id)

    def _remember_inflight(self, records: Sequence[WorkerRecord]) -> None:
        """What was in flight when a load was told; an older one that is seen again says nothing of what has ended since."""
        then, ages = self._inflight_then, self._ages_s
        self._inflight_then, self._ages_s = {}, {}
        for record in records:
            worker_id = record.info.worker_id
            is_told_again = worker_id in then and record.age_s > ages[worker_id]
            self._inflight_then[worker_id] = then[worker_id] if is_told_again else self._inflight(record.info)
            self._ages_s[worker_id] = record.age_s
