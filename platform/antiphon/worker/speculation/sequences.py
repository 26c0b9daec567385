"""What a drafter keeps of each request, on blocks of its own cache; the one asked about longest ago gives way (step speed).

Must not know: what is kept, models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container
from typing import Generic, Protocol, TypeVar

from antiphon.core.request import RequestId, SamplingParams
from antiphon.worker.sampler import SamplingState


class OnBlocks(Protocol):
    """Anything that holds blocks."""

    block_ids: list[int]


Kept = TypeVar("Kept", bound=OnBlocks)


class Sequences(Generic[Kept]):
    """By request, least recently used first. Belongs to the engine's loop."""

    def __init__(self, num_blocks: int, block_size_tokens: int, begin: Callable[[], Kept]) -> None:
        """``begin``: what is kept of a request that nothing is known of."""
        self._free = list(range(num_blocks))
        self._size = block_size_tokens
        self._begin = begin
        self._kept: OrderedDict[RequestId, Kept] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds."""
        return len(self._free)

    def use(self, request_id: RequestId) -> Kept:
        """What is kept of a request; it is the most recently used one now."""
        kept = self._kept.get(request_id)
        if kept is None:
            kept = self._kept[request_id] = self._begin()
        else:
            self._kept.move_to_end(request_id)
        return kept

    def grow(self, kept: Kept, num_tokens: int, busy: Container[RequestId]) -> bool:
        """Give it blocks for its first ``num_tokens`` tokens, at the expense of any not ``busy``; False: too few."""
        needed = -(-num_tokens // self._size) - len(kept.block_ids)
        if needed <= 0:
            return True
        for request_id in [name for name, other in self._kept.items() if other is not kept and name not in busy]:
            if len(self._free) >= needed:
                break
            self.forget(request_id)
        if len(self._free) < needed:
            return False
        kept.block_ids += [self._free.pop() for _ in range(needed)]
        return True

    def forget(self, request_id: RequestId) -> None:
        """Keep nothing of a request; unknown ids are ignored."""
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            self._free += kept.block_ids
            kept.block_ids = []


def drawing_state(sampling: SamplingParams | None, vocab_size: int) -> SamplingState:
    """A sampler's state that draws as the request's would, but for penalties and rules: with the same numbers at each place, a
    drafter that is near the model draws what the model will, at any temperature.
    """
    if sampling is None:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
    plain = SamplingParams(
        max_tokens=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
    )
    return SamplingState(plain, frozenset(), (), (), vocab_size)
