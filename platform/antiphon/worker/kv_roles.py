"""What a step means for KV hand-offs, one object for each role a worker has in them (step; ``offer`` hot).

    NoHandOff   the worker neither hands over nor is handed anything
    ReceivesKV  decodes: asks prefill workers for KV, and takes it in
    SendsKV     prefills: offers every layer's KV as it is made, and says when a request's is all there

Must not know: who schedules, how layers are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from antiphon.connectors.kv.decode_side import DecodeSide
from antiphon.connectors.kv.prefill_side import PrefillSide
from antiphon.core.errors import ErrorInfo
from antiphon.core.step import KVEvents, SchedulerOutput
from antiphon.models.attention.kv_cache import KVCache
from antiphon.models.config import DecoderConfig
from antiphon.models.decoder import StepState
from antiphon.worker.request_row import RequestRow, Scheduled
from antiphon.worker.sampler import all_finite
from antiphon.worker.ubatches.plan import Segment

_NOTHING = KVEvents()


class KVRole(Protocol):
    """The moments of a step at which KV may be on its way."""

    def poll(self) -> KVEvents:
        """What happened since last asked."""

    def begin(self, step: SchedulerOutput) -> None:
        """A step begins: requests that ended, loads that begin or are wanted no longer."""

    def take(self, row: RequestRow) -> None:
        """A request was taken in; some of its KV may be in the cache already."""

    def is_due(self, batch: Sequence[Scheduled]) -> bool:
        """Whether ``offer`` must be called after every layer of a step with this batch."""

    def is_worth_it(self, batch: Sequence[Scheduled]) -> bool:
        """Whether ``offer`` does something after a layer of such a step, where layers come one by one."""

    def offer(self, layer: int, batch: Sequence[Scheduled], run: Sequence[Segment], state: StepState) -> None:
        """``layer`` of one ubatch, whose rows ``run`` says, has written its K and V to the cache."""

    def end(self, row: RequestRow, error: ErrorInfo | None) -> None:
        """A step is over for a request; ``error``: why it ends here."""

    def close(self) -> None:
        """Close links; idempotent."""


class NoHandOff:
    """Of workers that prefill and decode by themselves."""

    def poll(self) -> KVEvents:
        """Nothing ever happens."""
        return _NOTHING

    def begin(self, step: SchedulerOutput) -> None:
        """Nothing to do."""

    def take(self, row: RequestRow) -> None:
        """Nothing to do."""

    def is_due(self, batch: Sequence[Scheduled]) -> bool:
        """Never."""
        return False

    def is_worth_it(self, batch: Sequence[Scheduled]) -> bool:
        """Never."""
        return False

    def offer(self, layer: int, batch: Sequence[Scheduled], run: Sequence[Segment], state: StepState) -> None:
        """Nothing to do."""

    def end(self, row: RequestRow, error: ErrorInfo | None) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class ReceivesKV(NoHandOff):
    """Of workers that decode what others prefill."""

    def __init__(self, side: DecodeSide) -> None:
        self._side = side

    def poll(self) -> KVEvents:
        """Loads that ended."""
        return self._side.poll()

    def begin(self, step: SchedulerOutput) -> None:
        """Give up loads that nobody wants now, and ask for new ones."""
        for request_id in step.kv_load_aborts:
            self._side.abort(request_id)
        for load in step.kv_loads:
            self._side.start(load)

    def is_worth_it(self, batch: Sequence[Scheduled]) -> bool:
        """While KV is on its way: taken in between steps alone, prompts would wait for four steps each."""
        return self._side.is_loading

    def offer(self, layer: int, batch: Sequence[Scheduled], run: Sequence[Segment], state: StepState) -> None:
        """Take in what has come; its blocks are those of requests that are in no step yet."""
        self._side.take_in()

    def close(self) -> None:
        """Close links; idempotent."""
        self._side.close()


class SendsKV:
    """Of workers that prefill for others."""

    def __init__(self, side: PrefillSide, cache: KVCache, config: DecoderConfig) -> None:
        self._side = side
        self._cache = cache
        self._config = config

    def poll(self) -> KVEvents:
        """Requests that arrived, and what became of those being sent."""
        return self._side.poll()

    def begin(self, step: SchedulerOutput) -> None:
        """Forget what ended."""
        for request_id in step.finished_request_ids:
            self._side.forget(request_id)

    def take(self, row: RequestRow) -> None:
        """Offer what the prefix cache has."""
        if row.kv_target is None:
            return
        first = row.kv_target.first_token
        num_cached = row.num_computed_tokens - first
        if num_cached > 0:
            slots = self._cache.slots(row.block_ids, first, num_cached)
            for layer in self._cache.layout.kv_layers:
                self._side.offer(row.request_id, layer, first, slots)

    def is_due(self, batch: Sequence[Scheduled]) -> bool:
        """Where a request of the batch is for another worker."""
        return any(part.row.kv_target is not None for part in batch)

    def is_worth_it(self, batch: Sequence[Scheduled]) -> bool:
        """As ``is_due``."""
        return self.is_due(batch)

    def offer(self, layer: int, batch: Sequence[Scheduled], run: Sequence[Segment], state: StepState) -> None:
        """Offer the rows' KV, but of requests whose rows are non-finite: such KV never leaves."""
        at = 0
        state.settle()
        are_numbers = all_finite(state.x_TD) and not state.bad_rows
        for segment in run:
            row, end = batch[segment.request].row, at + segment.num_tokens
            if not are_numbers:
                row.note_bad(state, at, end)
                if row.bad_at is None and not all_finite(state.x_TD[at:end]):
                    row.bad_at = self._config.layers[layer].prefix.rstrip(".")
            if row.kv_target is not None and row.bad_at is None and layer in self._cache.layout.kv_layers:
                skip = max(0, row.kv_target.first_token - segment.first_token)
                self._side.offer(row.request_id, layer, segment.first_token + skip, state.batch.slots_T[at + skip : end])
            at = end
        self._side.pump()

    def end(self, row: RequestRow, error: ErrorInfo | None) -> None:
        """Tell the asker that all is offered, or that nothing more comes."""
        if row.kv_target is None:
            return
        if row.bad_at is not None:
            self._side.forget(row.request_id, str(error))
        elif row.num_computed_tokens >= row.kv_target.first_token + row.kv_target.num_tokens:
            if row.state is not None:
                self._side.offer_state(row.request_id, row.state.write)
            self._side.finish(row.request_id)
        self._side.pump()

    def close(self) -> None:
        """Close listeners and links; idempotent."""
        self._side.close()
