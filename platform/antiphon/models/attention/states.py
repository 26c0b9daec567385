"""Where the rows of one step find the states of their sequences and leave them (hot).

Decodes are one row each and are moved together; the rows of a prefill chunk run through one after another, and so do a request's
known token and the guesses behind it. A chunk is cut where a snapshot is wanted: the part before leaves its state in the snapshot's
slot, and the part behind goes on from there. Where rows are guesses, layers leave word of how a state is made again without those
that were wrong: from the state that was read, which no step writes.
Legend: B decoding requests, R rows. Must not know: who hands out slots, what a state is made of, who guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from antiphon.core.step import StateSnapshot, StateStep


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRun:
    """Rows of one request, of tokens from ``first_token`` on: its state before them is in slot ``read``, behind them it goes to
    ``write``. Snapshots at other places are not this run's.
    """

    first_token: int
    num_rows: int
    read: int
    write: int
    snapshots: Sequence[StateSnapshot] = ()
    has_guesses: bool = False  # the sequence's rows in the step end with guesses

    @classmethod
    def of(
        cls, step: StateStep, num_computed_tokens: int, first_token: int, num_rows: int, blank: int, *, has_guesses: bool = False
    ) -> StateRun:
        """A part of a step's rows of one request: a later one, in another ubatch, goes on from what the one before wrote.
        ``blank``: slot of zeros.
        """
        read = step.write if first_token > num_computed_tokens else step.read
        return cls(
            first_token=first_token,
            num_rows=num_rows,
            read=blank if read is None else read,
            write=step.write,
            snapshots=step.snapshots,
            has_guesses=has_guesses,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChunk:
    """Rows [first_row, first_row + num_rows) of the step, of one request."""

    first_row: int
    num_rows: int
    read: int
    write: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBatch:
    """The states of one step (or one ubatch of it), decodes first."""

    read_B: torch.Tensor  # int64 slots
    write_B: torch.Tensor
    chunks: Sequence[StateChunk]
    chunk_numbers: Sequence[int]  # the same as our kernels take them: first row, rows, read and write of each
    kept_from: torch.Tensor | None  # int64 slots that are written and have a snapshot
    kept_in: torch.Tensor | None  # and where those go
    has_guesses: bool  # layers are to tell how they make their states again
    _redos: list[Redo] = field(default_factory=list)  # of each layer so far

    @property
    def num_decodes(self) -> int:
        """Leading rows that are decodes."""
        return self.read_B.numel()

    @classmethod
    def lay_out(cls, runs: Sequence[StateRun], device: torch.device) -> StateBatch:
        """``runs`` in the order of their rows, decodes first; those of one sequence that follow one another run through as one."""
        runs = _joined(runs)
        num_decodes = next((i for i, run in enumerate(runs) if run.num_rows != 1), len(runs))
        decodes = runs[:num_decodes]
        kept: list[tuple[int, int]] = []
        chunks: list[StateChunk] = []
        for run in decodes:
            _cut(run, 0, kept)
        first_row = num_decodes
        for run in runs[num_decodes:]:
            chunks += _cut(run, first_row, kept)
            first_row += run.num_rows
        reads, writes = [run.read for run in decodes], [run.write for run in decodes]
        slots = torch.tensor([*reads, *writes, *(slot for slot, _ in kept), *(slot for _, slot in kept)], dtype=torch.int64)
        sizes = [num_decodes, num_decodes, len(kept), len(kept)]
        read_B, write_B, kept_from, kept_in = torch.split_with_sizes(slots.to(device), sizes)
        return cls(
            read_B=read_B,
            write_B=write_B,
            chunks=chunks,
            chunk_numbers=[number for each in chunks for number in (each.first_row, each.num_rows, each.read, each.write)],
            kept_from=kept_from if kept else None,
            kept_in=kept_in if kept else None,
            has_guesses=any(run.has_guesses for run in runs),
        )

    def keep(self, planes: Sequence[torch.Tensor]) -> None:
        """All rows of a layer are through: copy what was written at a snapshot's place to the snapshot."""
        if self.kept_from is not None and self.kept_in is not None:
            for plane in planes:
                plane.index_copy_(0, self.kept_in, plane.index_select(0, self.kept_from))

    def on_redo(self, redo: Redo) -> None:
        """How a layer makes its states again."""
        self._redos.append(redo)

    def redo(self, rows: Sequence[int], runs: Sequence[StateRun]) -> None:
        """Make states again of these of the step's rows alone, in all layers: what others left in ``runs``' slots is gone.

        Every run has the slot that it read before.
        """
        again = StateBatch.lay_out(runs, self.read_B.device)
        rows_R = torch.tensor(rows, device=self.read_B.device)
        for redo in self._redos:
            redo(rows_R, again)


Redo = Callable[[torch.Tensor, StateBatch], object]  # rows [R] of those that the layer was given, and where their states are


def _joined(runs: Sequence[StateRun]) -> list[StateRun]:
    found: list[StateRun] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and last.write == run.write and last.first_token + last.num_rows == run.first_token:
            found[-1] = replace(last, num_rows=last.num_rows + run.num_rows)
        else:
            found.append(run)
    return found


def _cut(run: StateRun, first_row: int, kept: list[tuple[int, int]]) -> list[StateChunk]:
    """Parts of a run; notes the snapshot at its end in ``kept``."""
    chunks: list[StateChunk] = []
    at, read = 0, run.read
    for snapshot in run.snapshots:
        end = snapshot.end_token - run.first_token
        if 0 < end < run.num_rows:
            chunks.append(StateChunk(first_row=first_row + at, num_rows=end - at, read=read, write=snapshot.slot))
            at, read = end, snapshot.slot
        elif end == run.num_rows:
            kept.append((run.write, snapshot.slot))
    chunks.append(StateChunk(first_row=first_row + at, num_rows=run.num_rows - at, read=read, write=run.write))
    return chunks
