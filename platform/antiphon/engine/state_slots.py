"""State slots of one engine, for models whose layers remember per sequence: who holds which, and which are snapshots (step speed).

A sequence that is computed holds two slots; each step reads the one and writes the other, so that a step can be computed twice. A
snapshot is a slot with the state at a block's end, under the block's hash, and lives by the rules of KV blocks: held while it is
written or read, free but findable otherwise, the oldest reused first. A cached prefix is worth as much as a snapshot reaches:

    blocks cached     ████████████████████░░░░
    snapshots         ·       ▲       ▲          computing starts behind the last ▲ within the blocks, reading that slot
                              every ``snapshot_blocks``, and the last full block of a prompt

Must not know: requests, queues, tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from antiphon.core.kv import LIVE_STATES
from antiphon.core.step import StateSnapshot, StateStep
from antiphon.engine.block_manager import BlockHash, KVBlockManager
from antiphon.engine.limits import SchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What of a request is cached: blocks from its start, and the snapshot at their end (None: no blocks, or no states)."""

    blocks: tuple[int, ...]
    snapshot: int | None = None


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A snapshot that this step writes; of a block that ends in guesses it may come to nothing."""

    slot: int
    block: int  # at whose end, from 1 on


class SequenceState:
    """The state slots of one sequence; only StateSlots changes it."""

    __slots__ = ("_end_block", "_own", "_pending", "_snapshot", "_written", "read")

    def __init__(self, own: Sequence[int], snapshot: int | None, end_block: int) -> None:
        self._own = (own[0], own[1])
        self._snapshot = snapshot  # held until the first step that started from it is over
        self._end_block = end_block  # the last full one of what was known when the sequence began
        self._pending: list[_Pending] = []
        self._written: int | None = None
        self.read = snapshot  # slot of the state behind the tokens computed; None = none are

    @property
    def arrival(self) -> int:
        """Where a state that is handed over goes."""
        return self._own[0]


class StateSlots:
    """Hands out state slots. Long-lived; only the scheduler touches it."""

    def __init__(self, num_slots: int, block_size_tokens: int, *, snapshot_blocks: int, prefix_caching: bool = True) -> None:
        self.num_slots = num_slots
        self._block_size = block_size_tokens
        self._every = snapshot_blocks
        self._pool = KVBlockManager(num_slots, block_size_tokens, prefix_caching=prefix_caching)

    @classmethod
    def of(cls, config: SchedulerConfig) -> StateSlots | None:
        """Those of an engine; None: its model has no states."""
        if config.num_state_slots is None:
            return None
        size, every = config.block_size_tokens, config.snapshot_blocks
        return cls(config.num_state_slots, size, snapshot_blocks=every, prefix_caching=config.prefix_caching)

    @property
    def num_free_slots(self) -> int:
        """Slots nobody holds, snapshots included."""
        return self._pool.num_free_blocks

    @property
    def num_snapshots(self) -> int:
        """Snapshots that a prefix lookup can find."""
        return self._pool.num_cached_blocks

    def reach(self, blocks: Sequence[int], hashes: Sequence[BlockHash]) -> Prefix:
        """As much of a cached prefix as can be gone on from: up to the last block whose end has a snapshot."""
        for count in range(len(blocks), 0, -1):
            slot = self._pool.find(hashes[count - 1])
            if slot is not None:
                return Prefix(blocks=tuple(blocks[:count]), snapshot=slot)
        return Prefix(blocks=())

    def fits(self, prefix: Prefix) -> bool:
        """Whether a sequence that goes on from ``prefix`` can be begun."""
        return self._pool.num_free_after(() if prefix.snapshot is None else (prefix.snapshot,)) >= LIVE_STATES

    def begin(self, prefix: Prefix, num_tokens: int) -> SequenceState:
        """Hold what a sequence needs; the caller saw that it fits. ``num_tokens``: known, and of use as a prefix to others."""
        if prefix.snapshot is not None:
            self._pool.hold((prefix.snapshot,))
        own = self._pool.allocate(LIVE_STATES)
        assert own is not None
        return SequenceState(own, prefix.snapshot, num_tokens // self._block_size)

    def plan(self, sequence: SequenceState, hashes: Sequence[BlockHash], first_token: int, num_tokens: int) -> StateStep:
        """Where the step that computes these tokens, guesses among them, reads and writes. ``hashes``: of the full blocks of those
        that are known.
        """
        if num_tokens == 0:
            assert sequence.read is not None  # a request that needs no computing starts from a snapshot, or goes on
            sequence._written = sequence.read
            return StateStep(read=sequence.read, write=sequence.read)
        first, second = sequence._own
        sequence._written = second if sequence.read == first else first
        snapshots = []
        for block in range(first_token // self._block_size + 1, (first_token + num_tokens) // self._block_size + 1):
            if block % self._every and block != sequence._end_block:
                continue
            if not self._pool.prefix_caching or (block <= len(hashes) and self._pool.find(hashes[block - 1]) is not None):
                continue
            fresh = self._pool.allocate(1)
            if fresh is None:
                break
            sequence._pending.append(_Pending(slot=fresh[0], block=block))
            snapshots.append(StateSnapshot(end_token=block * self._block_size, slot=fresh[0]))
        return StateStep(read=sequence.read, write=sequence._written, snapshots=tuple(snapshots))

    def computed(self, sequence: SequenceState, hashes: Sequence[BlockHash], num_tokens: int) -> None:
        """The planned step is over, and gave numbers: go on from what it wrote, and let others find its snapshots.

        Args:
            sequence: its sequence.
            hashes: of the full blocks of tokens that are known by now.
            num_tokens: computed, as far as they are known: snapshots behind them wait for more, or for ``settle``.
        """
        while sequence._pending and sequence._pending[0].block * self._block_size <= num_tokens:
            pending = sequence._pending.pop(0)
            self._pool.cache(pending.slot, hashes[pending.block - 1])
            self._pool.release((pending.slot,))
        sequence.read = sequence._written
        if sequence.read != sequence._snapshot:
            self._let_go(sequence)

    def settle(self, sequence: SequenceState) -> None:
        """Nothing more of the step is known to be right: snapshots that are left were of guesses."""
        self._pool.release([pending.slot for pending in sequence._pending])
        sequence._pending.clear()

    def arrived(self, sequence: SequenceState) -> None:
        """The state at the end of a hand-off is in ``arrival``."""
        sequence.read = sequence.arrival
        self._let_go(sequence)

    def end(self, sequence: SequenceState) -> None:
        """Give everything back; a step that was planned and not computed leaves no snapshot."""
        self._let_go(sequence)
        self.settle(sequence)
        self._pool.release(sequence._own)

    def _let_go(self, sequence: SequenceState) -> None:
        if sequence._snapshot is not None:
            self._pool.release((sequence._snapshot,))
            sequence._snapshot = None
