"""What a gateway knows of experts: rows by layer and expert over all workers, and where wishes to move them go (control speed).

Counts are asked from the workers every few seconds, so that neither a scrape nor a request waits for them. Must not know: what a
placement means, or how experts are moved.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from antiphon.core.errors import AntiphonError, InvalidInput, Unavailable
from antiphon.core.ids import Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.gateway.access.keys import ApiKeys
from antiphon.rpc.experts import AsyncExpertsCalls, ExpertLoad, PlaceStep, RebalanceWish
from antiphon.telemetry import CallbackOptions, Observation, Telemetry, semconv

_log = logging.getLogger(__name__)

_MAX_SERIES = 4096  # of layer x expert in the metrics, per deployment; beyond, only layers are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    info: WorkerInfo
    load: ExpertLoad


class GatewayExperts:
    """Asks the workers with experts; an ``rpc.experts.ExpertsPort``. Belongs to one event loop; ``run`` until cancelled.

    Args:
        workers: The latest records' workers.
        keys: Who may ask.
        telemetry: Takes the instruments.
        interval_s: Seconds between two rounds.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        workers: Callable[[], Sequence[WorkerInfo]],
        keys: ApiKeys,
        telemetry: Telemetry,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._keys = keys
        self._interval_s = interval_s
        self._clock = clock
        self._calls: dict[str, AsyncExpertsCalls] = {}
        self._answers: dict[tuple[WorkerId, Epoch], _Answer] = {}
        meter = telemetry.meter(__name__)
        meter.create_observable_counter(
            "antiphon.expert.rows", callbacks=[self._observe_rows], description="Rows by layer and expert, over all workers."
        )
        meter.create_observable_gauge(
            "antiphon.expert.imbalance",
            callbacks=[self._observe_imbalance],
            description="Rows of a layer's busiest expert over its mean, since start.",
        )

    async def run(self) -> None:
        """Ask again and again until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._interval_s)

    async def refresh(self) -> None:
        """Ask every worker that holds experts once; what a worker that is gone has counted stays out."""
        wanted = {(info.worker_id, info.epoch): info for info in self._workers() if info.num_experts and _counts(info)}
        found = await asyncio.gather(*(self._ask(info) for info in wanted.values()))
        self._answers = {key: answer for key, answer in zip(wanted, found, strict=True) if answer is not None}
        for address in self._calls.keys() - {info.endpoint.rpc for info in self._workers()}:
            await self._calls.pop(address).close()

    def load(self, deployment: str = "") -> ExpertLoad:
        """Rows of a deployment ("" = the only one with experts), as the last round found them.

        Raises:
            InvalidInput: it has no experts, or there are several and none is named.
        """
        name = self._named(deployment)
        answers = [answer for answer in self._answers.values() if answer.info.deployment == name]
        newest = max(answers, key=lambda answer: answer.load.placement_number, default=None)
        return ExpertLoad(
            deployment=name,
            placement_number=0 if newest is None else newest.load.placement_number,
            placement_json="" if newest is None else newest.load.placement_json,
            rows=_sum(answer.load.rows for answer in answers),
        )

    async def close(self) -> None:
        """Close all connections; idempotent."""
        for calls in self._calls.values():
            await calls.close()
        self._calls.clear()

    # ---- rpc.experts.ExpertsPort -------------------------------------------------------------------------------

    async def expert_load(self, deployment: str, metadata: Mapping[str, str]) -> ExpertLoad:
        """See ``ExpertsPort``; asks the workers now."""
        self._keys.check(metadata.get("authorization"), admin=True)
        await self.refresh()
        return self.load(deployment)

    async def rebalance(self, wish: RebalanceWish, metadata: Mapping[str, str]) -> str:
        """See ``ExpertsPort``."""
        self._keys.check(metadata.get("authorization"), admin=True)
        name = self._named(wish.deployment)
        ready = [i for i in self._workers() if i.deployment == name and i.role is Role.ATTENTION and i.ready and not i.draining]
        if not ready:
            raise Unavailable(f"{name} has no ready attention worker, which is who moves experts")
        acting = min(ready, key=lambda info: info.worker_id)
        return await self._call(acting).rebalance(wish)

    async def place(self, step: PlaceStep, metadata: Mapping[str, str]) -> bool:
        """See ``ExpertsPort``."""
        del step
        self._keys.check(metadata.get("authorization"), admin=True)
        raise InvalidInput("placements are brought in by workers; ask a gateway to rebalance")

    # ---- inside ------------------------------------------------------------------------------------------------

    def _named(self, deployment: str) -> str:
        names = sorted({info.deployment for info in self._workers() if info.num_experts})
        if deployment and deployment not in names:
            raise InvalidInput(f"no deployment {deployment!r} with experts; there are {', '.join(names) or 'none'}", "deployment")
        if not deployment and len(names) != 1:
            raise InvalidInput(f"which deployment? There are {', '.join(names) or 'none with experts'}", "deployment")
        return deployment or names[0]

    async def _ask(self, info: WorkerInfo) -> _Answer | None:
        try:
            return _Answer(info=info, load=await self._call(info).expert_load())
        except AntiphonError as error:
            _log.debug("%s does not tell its experts' load: %s", info.worker_id, error)
            return None

    def _call(self, info: WorkerInfo) -> AsyncExpertsCalls:
        address = info.endpoint.rpc
        if address not in self._calls:
            self._calls[address] = AsyncExpertsCalls(address)
        return self._calls[address]

    def _by_deployment(self) -> Iterable[tuple[dict[str, str], Mapping[int, Sequence[int]]]]:
        answers = tuple(self._answers.values())
        for name in sorted({answer.info.deployment for answer in answers}):
            mine = [answer for answer in answers if answer.info.deployment == name]
            attributes = {semconv.REQUEST_MODEL: mine[0].info.model, "antiphon.deployment": name}
            yield attributes, _sum(answer.load.rows for answer in mine)

    def _observe_rows(self, _options: CallbackOptions) -> Iterable[Observation]:
        for attributes, rows in self._by_deployment():
            if sum(len(counts) for counts in rows.values()) > _MAX_SERIES:
                continue
            for layer, counts in rows.items():
                for expert, count in enumerate(counts):
                    yield Observation(count, {**attributes, "layer": str(layer), "expert": str(expert)})

    def _observe_imbalance(self, _options: CallbackOptions) -> Iterable[Observation]:
        for attributes, rows in self._by_deployment():
            for layer, counts in rows.items():
                mean = sum(counts) / len(counts) if counts else 0.0
                yield Observation(max(counts) / mean if mean else 1.0, {**attributes, "layer": str(layer)})


def _counts(info: WorkerInfo) -> bool:
    """One slice of a group counts for all: each sees the same rows."""
    return info.role is not Role.ATTENTION and info.shard.tensor_index == 0


def _sum(parts: Iterable[Mapping[int, Sequence[int]]]) -> dict[int, tuple[int, ...]]:
    sums: dict[int, tuple[int, ...]] = {}
    for part in parts:
        for layer, rows in part.items():
            past = sums.get(layer, (0,) * len(rows))
            sums[layer] = tuple(a + b for a, b in zip(past, rows, strict=True))
    return dict(sorted(sums.items()))
