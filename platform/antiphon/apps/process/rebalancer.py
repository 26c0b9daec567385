"""Moves experts between FFN workers while they serve: one thread in every attention worker, of which one acts (control speed).

The ready attention worker with the lowest id acts; when it dies the next one goes on from what the workers say they have:

    behind(target)? ──yes──► hold on every FFN worker ─► use on every attention worker ─► release on every FFN worker
         │no
    due, or wished? ──► rows since the last look ─► decide ─► stages, each of bounded memory ─► target := next stage

Workers that are gone need nothing; workers that come start with the placement in use (``newest``). Whatever is done in the wrong
order by two that both act costs time and no token: results don't depend on where an expert is computed.
Must not know: how experts are read or rows are sent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from antiphon.apps.process.expert_host import ExpertHost
from antiphon.core.document.experts import RebalanceSpec
from antiphon.core.errors import AntiphonError, Overloaded, Unavailable
from antiphon.core.ids import Epoch, Role, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.lease import BlockingDirectory
from antiphon.models.config import DecoderConfig
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.models.experts.rebalancing import BalancePolicy, Rows, decide, since, stages
from antiphon.rpc.experts import ExpertsCalls, PlaceStep, RebalanceWish

logger = logging.getLogger(__name__)

_TURN_S = 0.5
_POLL_S = 0.01  # first pause between two questions whether a phase is done; each is twice as long as the one before
_MAX_POLL_S = 0.2  # questions cost the workers that serve, and reading experts takes seconds
_PHASE_TIMEOUT_S = 600.0
_MAX_WISHES = 16
_MAX_CALLS = 1024
_LOOK_S = 0.5  # between two looks into the directory while a phase waits


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the balancing of a deployment needs to know of its model."""

    config: DecoderConfig
    itemsize_bytes: int  # of an expert's weight as it is held
    num_tensor: int  # slices of each group


class Rebalancer:
    """Runs until closed. Its owner calls ``check``, which raises what stopped it.

    Args:
        host: This worker's own end.
        directory: Where the workers are.
        deployment: Whose.
        revision: Of which revision.
        worker_id: This worker's.
        shape: The model.
        spec: When to balance; None = only when wished.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        host: ExpertHost,
        directory: BlockingDirectory,
        *,
        deployment: str,
        revision: str,
        worker_id: WorkerId,
        shape: ModelShape,
        spec: RebalanceSpec | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._directory = directory
        self._deployment = deployment
        self._revision = revision
        self._worker_id = worker_id
        self._shape = shape
        self._spec = spec
        self._clock = clock
        self._looked_s = clock()
        self._rows: Rows = {}  # at the last look
        self._wishes: list[RebalanceWish] = []
        self._calls: dict[str, ExpertsCalls] = {}
        self._wake = threading.Event()
        self._closing = False
        self._error: BaseException | None = None
        host.wish = self._take_wish
        self._thread = threading.Thread(target=self._run, name="rebalancer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what ended the thread, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop; a placement half brought in is brought in by whoever acts next. Idempotent."""
        self._closing = True
        self._wake.set()
        self._thread.join(10.0)
        for calls in self._calls.values():
            calls.close()
        self._calls.clear()

    # ---- the thread --------------------------------------------------------------------------------------------

    def _take_wish(self, wish: RebalanceWish) -> None:
        if len(self._wishes) >= _MAX_WISHES:
            raise Overloaded(f"{len(self._wishes)} moves of experts are wished for already")
        self._wishes.append(wish)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wake.wait(_TURN_S)
                self._wake.clear()
                if self._closing:
                    return
                try:
                    self._turn()
                except AntiphonError as error:
                    logger.warning("experts were not moved, still trying: %s", error)
        except BaseException as error:  # noqa: BLE001  # stored; the owner's check() raises it
            self._error = error

    def _turn(self) -> None:
        workers = self._workers()
        acting = acting_of(workers)
        if acting is None or acting.worker_id != self._worker_id:
            # Whoever was wished something has acted when it was passed on to; a wish that met the change is lost and said so.
            if self._wishes:
                logger.warning("%s moves experts now; wish again", "nobody" if acting is None else acting.worker_id)
                self._wishes.clear()
            return
        number, placement = self._target(workers)
        if any(info.load.placement != number for info in workers) or self._host.number != number:
            self._bring(number, placement)
        if self._wishes:
            wish = self._wishes.pop(0)
            try:
                self._look(placement, wish)
            except AntiphonError:
                raise
            except Exception:
                logger.exception("a wish to move experts failed; it is dropped")
        elif self._spec is not None and self._clock() - self._looked_s >= self._spec.interval_s:
            self._look(placement, None)

    def _target(self, workers: Sequence[WorkerInfo]) -> tuple[int, ExpertPlacement]:
        """The newest placement that a worker works by: whoever acted before may have died while it brought one in."""
        newest = max(workers, key=lambda info: info.load.placement)
        if newest.load.placement <= self._host.number:
            return self._host.number, self._host.placement
        found = self._call(newest).expert_load()
        return found.placement_number, ExpertPlacement.from_json(found.placement_json, self._shape.config)

    def _look(self, current: ExpertPlacement, wish: RebalanceWish | None) -> None:
        """Decide, and bring in what was decided."""
        self._looked_s = self._clock()
        spec = self._spec if self._spec is not None else RebalanceSpec()
        policy = BalancePolicy(
            threshold=spec.threshold,
            min_gain=spec.min_gain,
            min_rows=spec.min_rows,
            num_redundant=spec.redundant,
            num_nodes=spec.nodes,
        )
        config = self._shape.config
        if wish is not None and wish.placement_json:
            wanted: ExpertPlacement | None = ExpertPlacement.from_json(wish.placement_json, config)
        else:
            now = self.rows_now()
            rows = since(now, self._rows)
            self._rows = now
            if wish is not None:
                # Whoever asks has looked: what there is must do.
                redundant = spec.redundant if wish.num_redundant is None else wish.num_redundant
                policy = replace(policy, threshold=1.0, min_gain=1e-6, min_rows=1, num_redundant=redundant)
                if not any(sum(counts) for counts in rows.values()):
                    rows = dict(now.items())
            wanted = decide(config, current, rows, policy)
        if wanted is None or wanted == current:
            logger.info("experts stay where they are")
            return
        shape = self._shape
        for stage in stages(config, current, wanted, shape.itemsize_bytes, shape.num_tensor, spec.extra_memory_bytes):
            numbers = [info.load.placement for info in self._workers()]
            self._bring(max([self._host.number, *numbers]) + 1, stage)
        self._rows = self.rows_now()

    def rows_now(self) -> dict[int, list[int]]:
        """Rows by layer and expert, summed over the FFN workers; every slice of a group sees the same rows, one is asked."""
        sums: dict[int, list[int]] = {}
        for info in self._workers():
            if info.role is Role.FFN and info.shard.tensor_index == 0:
                try:
                    found = self._call(info).expert_load()
                except Unavailable:
                    continue  # gone, with its counts
                for number, rows in found.rows.items():
                    past = sums.setdefault(number, [0] * len(rows))
                    sums[number] = [a + b for a, b in zip(past, rows, strict=True)]
        return sums

    def _bring(self, number: int, placement: ExpertPlacement) -> None:
        """All workers to one placement, in the order that costs nobody a wait.

        Raises:
            Unavailable: a worker is there and does not get done.
        """
        start_s = time.perf_counter()
        text = placement.to_json(self._shape.config)
        for phase, role in (("HOLD", Role.FFN), ("USE", Role.ATTENTION), ("RELEASE", Role.FFN)):
            self._phase(PlaceStep(phase=phase, number=number, placement_json=text), role)
        logger.info("experts are at placement %d after %.2f s", number, time.perf_counter() - start_s)

    def _phase(self, step: PlaceStep, role: Role) -> None:
        deadline_s = time.monotonic() + _PHASE_TIMEOUT_S
        done: set[tuple[WorkerId, Epoch]] = set()
        waiting, looked_s = self._workers(), time.monotonic()
        pause_s = _POLL_S
        while True:
            if time.monotonic() - looked_s > _LOOK_S:
                waiting, looked_s = self._workers(), time.monotonic()
            left = [info for info in waiting if info.role is role and (info.worker_id, info.epoch) not in done]
            if not left:
                return
            for info in left:
                try:
                    if self._place(info, step):
                        done.add((info.worker_id, info.epoch))
                except Unavailable:
                    continue  # not there just now: it comes back, or its record goes
            if self._closing:
                raise Unavailable("shutting down")
            if time.monotonic() > deadline_s:
                raise Unavailable(
                    f"{', '.join(info.worker_id for info in left)}: {step.phase} of placement {step.number} is not done"
                )
            time.sleep(pause_s)
            pause_s = min(2.0 * pause_s, _MAX_POLL_S)

    def _place(self, info: WorkerInfo, step: PlaceStep) -> bool:
        if info.worker_id == self._worker_id:
            return self._host.take(step)
        return self._call(info).place(step)

    def _workers(self) -> list[WorkerInfo]:
        """FFN and attention workers of this revision."""
        records = self._directory.workers(self._deployment)
        return [r.info for r in records if r.info.revision == self._revision and r.info.role in (Role.FFN, Role.ATTENTION)]

    def _call(self, info: WorkerInfo) -> ExpertsCalls:
        address = info.endpoint.rpc
        if len(self._calls) > _MAX_CALLS:  # workers that restarted left their old addresses
            for calls in self._calls.values():
                calls.close()
            self._calls.clear()
        kept = self._calls.get(address)
        if kept is not None and not kept.is_outdated:
            return kept
        if kept is not None:
            kept.close()
        calls = self._calls[address] = ExpertsCalls(address, worker=True)
        return calls


def acting_of(workers: Sequence[WorkerInfo]) -> WorkerInfo | None:
    """The worker that moves experts: the ready attention worker with the lowest id."""
    ready = [info for info in workers if info.role is Role.ATTENTION and info.ready and not info.draining]
    return min(ready, key=lambda info: info.worker_id, default=None)


def adopt_newest(host: ExpertHost, role: Role, directory: BlockingDirectory, deployment: str, revision: str) -> None:
    """Start a worker with the placement in use: what it asks of its peers before it is ready, at best effort.

    A worker for which nobody answers starts as its document says, and is brought to the placement in use soon after.
    """
    try:
        workers = [r.info for r in directory.workers(deployment) if r.info.revision == revision]
        newest = max(workers, key=lambda info: info.load.placement, default=None)
        if newest is None or newest.load.placement == 0:
            return
        calls = ExpertsCalls(newest.endpoint.rpc, worker=True)
        try:
            found = calls.expert_load()
        finally:
            calls.close()
        phases = ("HOLD", "RELEASE") if role is Role.FFN else ("USE",)
        for phase in phases:
            step = PlaceStep(phase=phase, number=found.placement_number, placement_json=found.placement_json)
            while not host.take(step):
                time.sleep(_POLL_S)
    except AntiphonError as error:
        logger.info("starting with the document's placement of experts: %s", error)
