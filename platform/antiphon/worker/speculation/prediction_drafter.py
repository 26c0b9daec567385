"""Drafts of the checkpoint's own modules for multi-token prediction (step speed).

Each module reads the model's last hidden states beside the tokens that followed them, and keeps KV of its own. With n + 1 tokens
known, whose last one is computed next, h[0..n-1] are there:

    module 0   rows up to n-1   h[i],  token[i+1]     its last row tells draft 1
    module 1   rows up to n-1   y0[i], token[i+2]     the last of which is draft 1; tells draft 2
    ...        further drafts: the last module goes on from what it made, one row behind the other

y is what the module before made. Rows that were made of drafts are made again of what came. Hidden states come from the runner
after every step (``hidden_states``); those of tokens that were computed elsewhere, or found in the prefix cache, are missing, and
modules then see a request from the first token on that is there without a gap. Legend: R rows, D hidden.
Must not know: the model's own layers, how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch

from antiphon.core.drafts import DraftAsked, Proposal
from antiphon.core.request import RequestId
from antiphon.models.layers.functional import Norm
from antiphon.models.layers.linear import Linear
from antiphon.worker.batch_builder import Run
from antiphon.worker.sampler import SamplingState
from antiphon.worker.speculation.local_decoder import LocalDecoder
from antiphon.worker.speculation.sequences import Sequences, drawing_state

MAX_ROWS = 512  # of one asking and module, as in token_drafter
MAX_HELD_ROWS = 8192  # hidden states of one request that no module has read yet; beyond, the oldest are gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One module's parts; ``decoder`` has its layer, its norm and the head."""

    embedding_norm: Norm
    hidden_norm: Norm
    projection: Linear
    decoder: LocalDecoder
    hands_on_normed: bool = False

    def enter(self, embedded_RD: torch.Tensor, hidden_RD: torch.Tensor) -> torch.Tensor:
        """What the layer gets, [R, D]."""
        return self.projection(torch.cat([self.embedding_norm(embedded_RD), self.hidden_norm(hidden_RD)], dim=-1))

    def leave(self, made_RD: torch.Tensor) -> torch.Tensor:
        """What is gone on from, of what the layer made, [R, D]."""
        return self.decoder.halves.hidden(made_RD) if self.hands_on_normed else made_RD


class _Tokens(Sequence[int]):
    """Known tokens and drafts behind them, seen from one of them on."""

    def __init__(self, known: Sequence[int], drafts: Sequence[int], first: int) -> None:
        self._known, self._drafts, self._first = known, drafts, first

    def __len__(self) -> int:
        return len(self._known) + len(self._drafts) - self._first

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        low, high, _ = (slice(index, index + 1) if isinstance(index, int) else index).indices(len(self))
        num_known = len(self._known)
        low, high = low + self._first, high + self._first
        found = [*self._known[low : min(high, num_known)], *self._drafts[max(0, low - num_known) : max(0, high - num_known)]]
        return found[0] if isinstance(index, int) else found


@dataclass(slots=True)
class _Seen:
    """One request. Rows are counted from token ``first`` on."""

    block_ids: list[int] = field(default_factory=list)
    first: int = 0
    num_hidden: int = 0  # rows of hidden states that came
    held: list[torch.Tensor] = field(default_factory=list)  # of them, those that module 0 has not made a row of, in order
    num_done: list[int] = field(default_factory=list)  # by module: rows in its KV that are made of known tokens
    made: list[torch.Tensor | None] = field(default_factory=list)  # by module from 1 on: its inputs from its ``num_done`` on
    drawing: SamplingState | None = None

    def restart(self, first: int, num_modules: int) -> None:
        """Know nothing but that the next row is token ``first``'s."""
        self.first, self.num_hidden, self.held = first, 0, []
        self.num_done, self.made = [0] * num_modules, [None] * num_modules


@dataclass(slots=True, kw_only=True)
class _Chain:
    """One request in one asking."""

    request_id: RequestId
    seen: _Seen
    known: Sequence[int]
    end: int  # one past the last row that is made of a hidden state of the model
    num_drafts: int  # 0: there is more to read first
    drawing: SamplingState
    first_position: int  # of the first draw
    inputs: list[torch.Tensor | None]  # by module, from its ``seen.num_done`` on
    num_done: list[int]  # by module, behind this asking
    drafts: list[int] = field(default_factory=list)
    last_1D: torch.Tensor | None = None  # what is gone on from, of the last row
    is_bad: bool = False

    def tokens(self, depth: int) -> _Tokens:
        """The token beside each row's hidden state."""
        return _Tokens(self.known, self.drafts, self.seen.first + depth)

    def rows(self, depth: int, number: int) -> tuple[int, int, torch.Tensor] | None:
        """First row, rows and hidden states that module ``number`` has to do at ``depth``; None: nothing."""
        if depth > number + 1:  # beyond the last module
            if self.num_drafts < depth or len(self.drafts) < depth - 1 or self.last_1D is None:
                return None
            return self.end + depth - number - 2, 1, self.last_1D
        hidden, first = self.inputs[number], self.seen.num_done[number]
        end = min(self.end, self._num_known(number) + len(self.drafts))
        if self.is_bad or hidden is None or end <= first:
            return None
        return first, end - first, hidden[: end - first]

    def note(self, number: int, first: int, made_RD: torch.Tensor) -> None:
        """Module ``number`` made rows from ``first`` on."""
        self.num_done[number] = max(first, min(first + len(made_RD), self._num_known(number)))
        if number + 1 < len(self.inputs):
            earlier = self.inputs[number + 1]
            self.inputs[number + 1] = made_RD if earlier is None else torch.cat([earlier, made_RD])

    def settle(self) -> None:
        """Keep what was made of known tokens, and hidden states of rows that are to be made again."""
        if self.is_bad:
            return
        seen, inputs = self.seen, self.inputs
        ends = [seen.num_hidden, *self.num_done[:-1]]
        for number, (old, new, end) in enumerate(zip(seen.num_done, self.num_done, ends, strict=True)):
            rows = inputs[number]
            kept = None if rows is None or end <= new else rows[new - old : end - old].clone()  # not a view of all of them
            if number == 0:
                seen.held = [] if kept is None else [kept]
            else:
                seen.made[number] = kept
        seen.num_done = self.num_done

    def _num_known(self, number: int) -> int:
        """Rows of a module whose tokens are known."""
        return len(self.known) - (number + 1) - self.seen.first


class PredictionDrafter:
    """See the module. ``name``, ``is_free`` and ``priors`` are the seam's; ``take`` is ``hidden_states``'s."""

    name = "mtp"
    is_free = False
    priors: Sequence[float] = (0.7,)

    def __init__(self, modules: Sequence[Module]) -> None:
        """``modules``: in their order; their caches have equally many blocks."""
        self._modules = modules
        cache = modules[0].decoder.cache
        self._vocab_size = modules[0].decoder.halves.config.vocab_size
        self.sequences = Sequences(cache.num_blocks, cache.layout.block_size_tokens, self._begin_nothing)

    # ---- hidden_states.HiddenStates -----------------------------------------------------------------------

    def take(self, request_id: RequestId, first_token: int, hidden_RD: torch.Tensor) -> None:
        """Hidden states of a request's tokens from ``first_token`` on; those that came before are left."""
        seen = self.sequences.use(request_id)
        end = seen.first + seen.num_hidden
        num_old = max(0, end - first_token) if seen.num_hidden else 0
        fresh_RD, at = hidden_RD[num_old:], first_token + num_old
        if len(fresh_RD) == 0:
            return
        if seen.num_hidden == 0 or at > end or sum(map(len, seen.held)) + len(fresh_RD) > MAX_HELD_ROWS:
            at += max(0, len(fresh_RD) - MAX_HELD_ROWS)
            fresh_RD = fresh_RD[-MAX_HELD_ROWS:]
            seen.restart(at, len(self._modules))
        seen.held.append(fresh_RD)
        seen.num_hidden += len(fresh_RD)

    # ---- engine.speculation.drafter.Drafter ----------------------------------------------------------------------

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> Mapping[RequestId, Proposal]:
        """What the modules say; left out where the hidden state of the token before the last is missing, or is not read yet."""
        chains = self._begin(asked)
        if not chains:
            return {}
        for depth in range(1, 1 + max(len(self._modules), *(chain.num_drafts for chain in chains))):
            self._pass(chains, depth)
        for chain in chains:
            chain.settle()
        return {chain.request_id: Proposal(token_ids=tuple(chain.drafts)) for chain in chains if chain.drafts}

    def forget(self, request_id: RequestId) -> None:
        """Give its blocks back."""
        self.sequences.forget(request_id)

    def _begin(self, asked: Mapping[RequestId, DraftAsked]) -> list[_Chain]:
        chains: list[_Chain] = []
        busy: set[RequestId] = set()
        budget = max(MAX_ROWS, len(asked))
        for request_id, wanted in asked.items():
            seen = self.sequences.use(request_id)
            if seen.num_hidden == 0 or seen.first + seen.num_hidden != len(wanted.token_ids) - 1:
                continue
            num_pending = seen.num_hidden - seen.num_done[0]
            num_rows = min(num_pending, budget)
            num_further = max(0, wanted.num_drafts - len(self._modules))
            if num_rows < 1 or not self.sequences.grow(seen, seen.num_done[0] + num_rows + num_further, busy):
                continue
            busy.add(request_id)
            budget -= num_rows
            if seen.drawing is None:
                seen.drawing = drawing_state(wanted.sampling, self._vocab_size)
            chains.append(
                _Chain(
                    request_id=request_id,
                    seen=seen,
                    known=wanted.token_ids,
                    end=seen.num_done[0] + num_rows,
                    num_drafts=wanted.num_drafts if num_rows == num_pending else 0,
                    drawing=seen.drawing,
                    first_position=wanted.num_output_tokens,
                    inputs=[torch.cat(seen.held), *seen.made[1:]],
                    num_done=list(seen.num_done),
                )
            )
        return chains

    def _pass(self, chains: Sequence[_Chain], depth: int) -> None:
        """Every chain through the module of this depth, or, beyond the last, once more through that."""
        number = min(depth, len(self._modules)) - 1
        module = self._modules[number]
        due = [(chain, *rows) for chain in chains if (rows := chain.rows(depth, number)) is not None]
        due.sort(key=lambda each: each[2] != 1)  # decodes first
        if not due:
            return
        runs = [
            Run(token_ids=chain.tokens(number + 1), block_ids=chain.seen.block_ids, first_token=first, num_tokens=num_rows)
            for chain, first, num_rows, _ in due
        ]
        hidden_RD = torch.cat([hidden for _, _, _, hidden in due])
        made_RD = module.decoder.run(runs, lambda embedded_RD: module.enter(embedded_RD, hidden_RD))
        handed_on_RD, at = module.leave(made_RD), 0
        drawing: list[_Chain] = []
        drawn_at: list[int] = []  # rows
        for chain, first, num_rows, _ in due:
            mine_RD, at = handed_on_RD[at : at + num_rows], at + num_rows
            if depth <= len(self._modules):
                chain.note(number, first, mine_RD)
            chain.last_1D = mine_RD[-1:]
            if len(chain.drafts) == depth - 1 and chain.num_drafts >= depth:
                drawing.append(chain)
                drawn_at.append(at - 1)
        if not drawing:
            return
        tokens = module.decoder.draw(
            made_RD[torch.tensor(drawn_at, device=made_RD.device)],
            [chain.drawing for chain in drawing],
            [chain.first_position + len(chain.drafts) for chain in drawing],
        )
        for chain, token_id in zip(drawing, tokens, strict=True):
            if token_id is not None:
                chain.drafts.append(token_id)
                continue
            for each in self._modules:  # what it left in a cache is no number either, and others may read zeros times it
                each.decoder.cache.scrub(chain.seen.block_ids)
            chain.seen.restart(0, len(self._modules))
            chain.num_drafts, chain.is_bad = 0, True

    def _begin_nothing(self) -> _Seen:
        seen = _Seen()
        seen.restart(0, len(self._modules))
        return seen
