"""When answers are true that were used before they were there: links whose cards keep the order by flags (step).

Over such a link hosts run ahead of their cards: an answer is told of, and what follows from it asked of the card, while the other
card still computes. When the other end is lost then, its flags are poisoned and the card goes on with rubbish: the step is computed
again, with another worker. K and V that rubbish left in the cache are written over: the same tokens go to the same places.
Must not know: what is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from antiphon.connectors.afd.inflight import Peer
from antiphon.connectors.afd.shard_links import ShardLinks, flags_of
from antiphon.core.errors import InternalError, PeerLost

_LOOK_S = 50e-6  # between two looks whether the card is done


class Ahead:
    """Watches over the flagged links of an attention worker. Belongs to the worker's loop."""

    def __init__(
        self,
        links: ShardLinks,
        timeout_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``timeout_s``: a card that is not done for so long waits for a worker that is taken for lost."""
        self.num_repeats = 0  # steps computed again
        self._links = links
        self._timeout_s = timeout_s
        self._clock = clock
        self._sleep = sleep

    def begin(self) -> None:
        """A step begins."""
        self._links.num_lost_ahead = 0

    def is_true(self) -> bool:
        """Wait until the card is done with the step; False when a worker was lost whose answers it may not have waited for."""
        used = [(index, peers[0]) for index, peers in enumerate(self._links.shards) if peers and flags_of(peers[0].link)]
        if used:
            self._await(used)
        if self._links.num_lost_ahead == 0:
            return True
        self.num_repeats += 1
        return False

    def _await(self, used: list[tuple[int, Peer]]) -> None:
        flags = [flags_of(peer.link) for _, peer in used]
        settled = next(each.region.settled() for each in flags if each is not None)
        overdue_s = self._clock() + self._timeout_s
        while True:
            is_done = settled.done()
            is_overdue = not is_done and self._clock() > overdue_s
            if is_overdue and self._clock() > overdue_s + self._timeout_s:
                raise InternalError(f"the card is not done, {self._timeout_s:g} s after nothing made it wait any more")
            for (index, peer), each in zip(used, flags, strict=True):
                assert each is not None
                if is_overdue:
                    self._links.drop(index, peer, PeerLost(peer.link.peer, f"its card was silent for {self._timeout_s:g} s"))
                if each.lost():  # poisons again what it poisoned: the other card may yet write over it
                    self._links.drop(index, peer, PeerLost(peer.link.peer, "it was lost while our card waited for its card"))
            if is_done:
                return
            self._sleep(_LOOK_S)
