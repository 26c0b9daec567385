"""What a worker answers about its experts, and how it takes a new placement in while it serves (control speed).

    FFN worker        HOLD  ──reads beside the loop──► done    RELEASE ──► lets go
    attention worker  USE   ──from the next step on──► done once no row can leave by the old map

Every phase may be asked for again and again. A placement older than the one in use changes nothing. The order is the asker's to
keep (hold everywhere, use everywhere, release everywhere); when it is not kept, because somebody died, a worker that gets rows for
an expert it does not hold reads it: a moment lost, never a token. Must not know: who asks, or why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from antiphon.connectors.afd.expert_map import ExpertMap
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.core.ids import Role
from antiphon.models.config import DecoderConfig
from antiphon.models.experts.placement import ExpertPlacement
from antiphon.rpc.experts import ExpertLoad, PlaceStep, RebalanceWish
from antiphon.worker.ffn_worker import FFNWorker
from antiphon.worker.model_runner import AttentionWorker

# The thread that reads experts rests this many times as long as it reads, so that the loop beside it hardly notices. A lower
# priority would be worse: put off while it holds the interpreter's lock, it would keep the loop waiting.
_REST = 3.0
_MAX_NUMBER = 2**31 - 1  # it travels with every message in 32 bits, and the next one must fit, too


class ExpertHost:
    """An ``rpc.experts.ExpertsPort`` of one worker. Any thread may call.

    Args:
        config: The model.
        role: The worker's.
        worker_id: The worker's.
        deployment: The worker's.
        placement: The one it started with.
        ffn: Its FFN half, inline or its own; None where it has none.
        attention: Its attention half; None for FFN workers.
        changed: Called after a phase was done.
    """

    def __init__(
        self,
        *,
        config: DecoderConfig,
        role: Role,
        worker_id: str,
        deployment: str,
        placement: ExpertPlacement,
        ffn: FFNWorker | None,
        attention: AttentionWorker | None,
        changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._role = role
        self._worker_id = worker_id
        self._deployment = deployment
        self._ffn = ffn
        self._attention = attention
        self._changed = changed
        self._lock = threading.Lock()
        self._number = 0
        self._placement = placement
        self._held = 0  # highest number that is held whole
        self._reading: threading.Thread | None = None
        self._read_error: BaseException | None = None
        self.wish: Callable[[RebalanceWish], None] | None = None  # of the worker that balances

    @property
    def number(self) -> int:
        """Number of the placement the worker works by."""
        return self._number

    @property
    def placement(self) -> ExpertPlacement:
        """The placement the worker works by."""
        return self._placement

    def rows(self) -> dict[int, tuple[int, ...]]:
        """Rows of each routed expert since start, by layer number on the wire."""
        if self._ffn is None:
            return {}
        banks = self._ffn.halves.banks
        counted = self._ffn.halves.rows_by_expert()
        return {number: tuple(counts[: banks[number].config.gate.num_experts]) for number, counts in counted.items()}

    # ---- rpc.experts.ExpertsPort -------------------------------------------------------------------------------

    async def expert_load(self, deployment: str, metadata: Mapping[str, str]) -> ExpertLoad:
        """See ``ExpertsPort``."""
        del deployment, metadata
        spread = self._role in (Role.FFN, Role.ATTENTION)
        return ExpertLoad(
            deployment=self._deployment,
            placement_number=self._number,
            placement_json=self._placement.to_json(self._config) if spread else "",
            rows=self.rows(),
        )

    async def rebalance(self, wish: RebalanceWish, metadata: Mapping[str, str]) -> str:
        """See ``ExpertsPort``."""
        del metadata
        if self.wish is None:
            raise Unavailable(f"{self._worker_id} is a {self._role.value} worker, attention workers balance experts")
        if wish.placement_json:
            self._parsed(wish.placement_json)
        if wish.num_redundant is not None and not 0 <= wish.num_redundant <= self._config.num_experts * self._placement.num_groups:
            raise InvalidInput(f"{wish.num_redundant} more copies of {self._config.num_experts} experts", "num_redundant")
        self.wish(wish)
        return self._worker_id

    async def place(self, step: PlaceStep, metadata: Mapping[str, str]) -> bool:
        """See ``ExpertsPort``."""
        del metadata
        return self.take(step)

    # ---- phases ------------------------------------------------------------------------------------------------

    def take(self, step: PlaceStep) -> bool:
        """One phase; True when it is done.

        Raises:
            InvalidInput: the phase is not for this role, or the placement is not for this model and these groups.
            CheckpointInvalid: an expert can't be read.
        """
        if not 0 <= step.number <= _MAX_NUMBER:
            raise InvalidInput(f"placement number {step.number}, expected 0 to {_MAX_NUMBER}", "number")
        match step.phase, self._role:
            case "HOLD", Role.FFN:
                return self._hold(step)
            case "RELEASE", Role.FFN:
                return self._release(step)
            case "USE", Role.ATTENTION:
                return self._use(step)
        raise InvalidInput(f"phase {step.phase!r} is not for a worker of role {self._role.value}", "phase")

    def _hold(self, step: PlaceStep) -> bool:
        with self._lock:
            if step.number <= max(self._held, self._number):
                return True
            if self._reading is not None and self._reading.is_alive():
                return False
            if self._read_error is not None:
                error, self._read_error = self._read_error, None
                raise error
            placement = self._parsed(step.placement_json)
            self._reading = threading.Thread(target=self._read, args=(step.number, placement), name="experts", daemon=True)
            self._reading.start()
        return False

    def _read(self, number: int, placement: ExpertPlacement) -> None:
        assert self._ffn is not None  # only FFN workers hold
        try:
            self._ffn.halves.hold(placement, rest=_REST)
        except BaseException as error:  # noqa: BLE001  # the next HOLD raises it
            self._read_error = error
            return
        with self._lock:
            self._held = max(self._held, number)

    def _release(self, step: PlaceStep) -> bool:
        with self._lock:
            if step.number <= self._number:
                return True
            assert self._ffn is not None  # only FFN workers release
            placement = self._parsed(step.placement_json)
            self._number, self._placement = step.number, placement
            self._ffn.placement = step.number
            self._ffn.halves.release(placement)
        self._changed()
        return True

    def _use(self, step: PlaceStep) -> bool:
        assert self._attention is not None  # only attention workers use a map
        with self._lock:
            if step.number > self._number:
                placement = self._parsed(step.placement_json)
                self._attention.rebalance(ExpertMap(self._config, placement, step.number))
                self._number, self._placement = step.number, placement
                self._changed()
            return self._attention.has_switched

    def _parsed(self, text: str) -> ExpertPlacement:
        placement = ExpertPlacement.from_json(text, self._config)
        if placement.num_groups != self._placement.num_groups:
            raise InvalidInput(
                f"a placement over {placement.num_groups} groups, here are {self._placement.num_groups}", "placement"
            )
        return placement
