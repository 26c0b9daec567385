"""Drafts of a smaller decoder that reads the same tokens: a draft model, or the model's own first layers (step speed).

It keeps KV of the tokens that it has read. Asked again, it finds how many of them still stand, reads what came since, and goes on
token by token, all requests together:

    kept    a b c d1 d2          drafts of the last time, of which d1 was taken
    known   a b c d1 x           keeps a b c d1; reads x; drafts y1, reads it, drafts y2

Where it knows nothing (a request that was moved here, or gave way to others) it reads all of it, a bounded number of rows at a
time, and proposes nothing until it is through. Must not know: the larger model, how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from antiphon.core.drafts import DraftAsked, Proposal
from antiphon.core.request import RequestId
from antiphon.worker.batch_builder import Run
from antiphon.worker.sampler import SamplingState
from antiphon.worker.speculation.local_decoder import LocalDecoder
from antiphon.worker.speculation.sequences import Sequences, drawing_state

MAX_ROWS = 512  # of one asking: a long prompt is read over several steps, so that none of them waits for long


@dataclass(slots=True)
class _Read:
    """One request: the tokens whose KV is kept, drafts among them."""

    token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_known: int = 0  # leading ones that were known tokens when last asked
    drawing: SamplingState | None = None

    def num_standing(self, tokens: Sequence[int]) -> int:
        """How many of them are the request's; the last known token is read again, since its row is what is drawn at."""
        limit = min(len(self.token_ids), len(tokens) - 1)
        at = min(self.num_known, limit)
        while at < limit and self.token_ids[at] == tokens[at]:
            at += 1
        return at


@dataclass(slots=True, kw_only=True)
class _Chain:
    request_id: RequestId
    read: _Read
    drawing: SamplingState
    first_position: int  # of its first draw
    num_drafts: int  # 0: it only reads
    num_rows: int  # of the pass under way
    drafts: list[int] = field(default_factory=list)


class TokenDrafter:
    """See the module. ``name``, ``is_free`` and ``priors`` are the seam's."""

    is_free = False
    priors: Sequence[float] = (0.6,)

    def __init__(self, name: str, decoder: LocalDecoder, vocab_size: int) -> None:
        """``name``: as the document calls it; ``vocab_size``: of the model; its padding may be another."""
        self.name = name
        self._decoder = decoder
        self._vocab_size = vocab_size
        self._max_tokens = decoder.halves.max_model_len
        self.sequences = Sequences(decoder.cache.num_blocks, decoder.cache.layout.block_size_tokens, _Read)

    def propose(self, asked: Mapping[RequestId, DraftAsked]) -> Mapping[RequestId, Proposal]:
        """What the smaller decoder would say; left out where it is not through with what there is, or has no room for it."""
        chains = self._begin(asked)
        live = chains
        while live:
            live = self._pass(live)
        return {chain.request_id: Proposal(token_ids=tuple(chain.drafts)) for chain in chains if chain.drafts}

    def forget(self, request_id: RequestId) -> None:
        """Give its blocks back."""
        self.sequences.forget(request_id)

    def _begin(self, asked: Mapping[RequestId, DraftAsked]) -> list[_Chain]:
        chains: list[_Chain] = []
        busy: set[RequestId] = set()
        budget = max(MAX_ROWS, len(asked))
        for request_id, wanted in asked.items():
            tokens = wanted.token_ids
            num_drafts = min(wanted.num_drafts, self._max_tokens - len(tokens))
            if num_drafts < 1 or budget < 1:
                continue
            read = self.sequences.use(request_id)
            kept = read.num_standing(tokens)
            num_rows = min(len(tokens) - kept, budget)
            fresh = tokens[kept : kept + num_rows]
            if max(fresh) >= self._decoder.halves.config.vocab_size:
                continue
            if not self.sequences.grow(read, kept + num_rows + num_drafts, busy):
                continue
            busy.add(request_id)
            budget -= num_rows
            read.token_ids[kept:] = fresh
            read.num_known = kept + num_rows
            if read.drawing is None:
                read.drawing = drawing_state(wanted.sampling, self._decoder.halves.config.vocab_size)
            chains.append(
                _Chain(
                    request_id=request_id,
                    read=read,
                    drawing=read.drawing,
                    first_position=wanted.num_output_tokens,
                    num_drafts=num_drafts if read.num_known == len(tokens) else 0,
                    num_rows=num_rows,
                )
            )
        return chains

    def _pass(self, chains: list[_Chain]) -> list[_Chain]:
        """One pass over the rows that are due; the chains that go on."""
        chains = sorted(chains, key=lambda chain: chain.num_rows != 1)  # decodes first
        runs, ends, at = [], [], 0
        for chain in chains:
            read = chain.read
            first = len(read.token_ids) - chain.num_rows
            runs.append(Run(token_ids=read.token_ids, block_ids=read.block_ids, first_token=first, num_tokens=chain.num_rows))
            at += chain.num_rows
            ends.append(at - 1)
        x_TD = self._decoder.run(runs)
        drawing = [(chain, end) for chain, end in zip(chains, ends, strict=True) if chain.num_drafts]
        if not drawing:
            return []
        tokens = self._decoder.draw(
            x_TD[[end for _, end in drawing]],
            [chain.drawing for chain, _ in drawing],
            [chain.first_position + len(chain.drafts) for chain, _ in drawing],
        )
        live = []
        for (chain, _), token_id in zip(drawing, tokens, strict=True):
            if token_id is None:  # nor is what it left in the cache a number, where others may read zeros times it
                self._decoder.cache.scrub(chain.read.block_ids)
                self.sequences.forget(chain.request_id)
                continue
            if token_id >= self._vocab_size:
                continue
            chain.drafts.append(token_id)
            if len(chain.drafts) < chain.num_drafts:
                chain.read.token_ids.append(token_id)
                chain.num_rows = 1
                live.append(chain)
        return live
