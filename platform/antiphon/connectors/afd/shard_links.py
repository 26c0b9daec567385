"""Links of an attention worker to the FFN workers of every shard: who came, who is in use, who was lost (control).

Of a shard's workers the first is in use and the others are spares. Links come through ``add``, which other threads may call; all
else belongs to the worker's loop. Must not know: what is sent over them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container

from antiphon.connectors.afd.inflight import Peer
from antiphon.connectors.afd.rows import RowFormat, SlotViews
from antiphon.core.errors import AntiphonError, CorruptMessage, PeerLost, kept
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Link
from antiphon.transport.shm.card_slots import FlagOrdered
from antiphon.transport.waiting import WaitSet

_LOOK_S = 0.002  # between two looks for a worker that is waited for


def flags_of(link: Link) -> FlagOrdered | None:
    """What keeps the order of a link whose hosts run ahead of their cards; None for others."""
    card = getattr(link, "card", None)  # of shared memory alone
    return card if isinstance(card, FlagOrdered) else None


class ShardLinks:
    """The links of ``num_shards`` shards."""

    def __init__(
        self,
        num_shards: int,
        *,
        out: RowFormat,
        back: RowFormat,
        preferred_replica: int,
        hold_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``hold_s``: wait this long on ``clock`` for a worker of a shard that has none, with ``sleep`` between looks."""
        self.shards: list[list[Peer]] = [[] for _ in range(num_shards)]  # the first of a shard's replicas is in use
        self.waiting = WaitSet()  # on all of them
        self.losses: deque[AntiphonError] = deque(maxlen=64)  # peers dropped, and why
        self.num_lost_ahead = 0  # of them in use, over links whose answers are used before they are there
        self.silent: deque[tuple[tuple[WorkerId, Epoch], str]] = deque()  # workers that others take for lost, and why
        self._out = out
        self._back = back
        self._preferred = preferred_replica
        self._hold_s = hold_s
        self._clock = clock
        self._sleep = sleep
        self._arrivals: deque[tuple[int, Link]] = deque()
        self._empty_s: list[float | None] = [None] * num_shards  # when a shard's last worker was lost

    def add(self, shard: int, link: Link) -> None:
        """Offer an open link; safe from any thread."""
        self._arrivals.append((shard, link))

    @property
    def has_arrivals(self) -> bool:
        """Links wait to be taken up."""
        return bool(self._arrivals)

    def workers(self) -> set[tuple[WorkerId, Epoch]]:
        """Workers linked now, links still to be taken up included; safe from any thread."""
        linked = [peer.link for peers in self.shards for peer in tuple(peers)]
        return {(link.peer, link.peer_epoch) for link in [*linked, *(link for _, link in tuple(self._arrivals))]}

    def fewest_free_slots(self) -> int:
        """Over all links; -1 where there is none."""
        return min((peer.link.num_free_slots for peers in self.shards for peer in peers), default=-1)

    @property
    def missing_s(self) -> float:
        """How long the shard that has been without a worker longest has been so, 0 where each has one; safe from any thread."""
        came = {index for index, _ in tuple(self._arrivals)}
        since = [at for index, at in enumerate(self._empty_s) if at is not None and index not in came]
        return max(0.0, self._clock() - min(since)) if since else 0.0

    def take_arrivals(self, only: int | None = None) -> None:
        """Take up links that were offered; of shards other than ``only`` none while their rows may be away: the first link of a
        shard is the one that answers are expected from.
        """
        for _ in range(len(self._arrivals)):
            index, link = self._arrivals.popleft()
            if only is not None and index != only:
                self._arrivals.append((index, link))
                continue
            peers = self.shards[index]
            for old in [old for old in peers if old.link.peer == link.peer]:
                old.link.close()  # the peer restarted: its older epoch answers no more
                peers.remove(old)
                self.waiting.remove(old.link)
            self._empty_s[index] = None
            peers.append(Peer(link, SlotViews(self._out), SlotViews(self._back)))
            self.waiting.add(link)
            peers.sort(key=lambda each: each.link.peer)
            # Attention workers spread over the replicas of a shard instead of all using the first.
            turn = self._preferred % len(peers)
            peers[:] = peers[turn:] + peers[:turn]

    def in_use(self, index: int) -> Peer:
        """A worker of the shard, waiting for one to come (back). Raises PeerLost when none does within ``hold_s`` of the loss."""
        peers = self.shards[index]
        if not peers:
            lost_s = self._empty_s[index]
            deadline = (self._clock() if lost_s is None else lost_s) + self._hold_s
            while not peers:
                self.take_arrivals(only=index)
                if peers:
                    break
                if self._clock() > deadline:
                    last = f"; lost before: {self.losses[-1]}" if self.losses else ""
                    raise PeerLost(f"FFN shard {index}", f"no worker holds it and none came within {self._hold_s:g} s{last}")
                self._sleep(_LOOK_S)
        return peers[0]

    def drop(self, index: int, peer: Peer, error: AntiphonError) -> None:
        """A worker is lost, and why."""
        peers = self.shards[index]
        self.num_lost_ahead += peers[:1] == [peer] and flags_of(peer.link) is not None
        if peer in peers:
            self.losses.append(kept(error))
            peers.remove(peer)
            self.waiting.remove(peer.link)
            if not peers:
                self._empty_s[index] = self._clock()
        peer.link.close()

    def drop_silent(self, owing: Container[tuple[WorkerId, Epoch]]) -> list[int]:
        """Drop the workers in use that are ``silent`` and still owe something; their shards."""
        dropped = []
        while self.silent:
            worker, why = self.silent.popleft()
            for index, peers in enumerate(self.shards):
                if worker in owing and peers and (peers[0].link.peer, peers[0].link.peer_epoch) == worker:
                    self.drop(index, peers[0], PeerLost(worker[0], why))
                    dropped.append(index)
        return dropped

    def look_after_spares(self) -> None:
        """Nothing comes from a replica that is not in use, but its loss."""
        for index, peers in enumerate(self.shards):
            for spare in peers[1:]:
                try:
                    while (message := spare.link.poll()) is not None:
                        spare.link.release(message)
                        spare.num_owed = max(0, spare.num_owed - 1)
                except (PeerLost, CorruptMessage) as error:
                    self.drop(index, spare, error)

    def close(self) -> None:
        """Close all links; idempotent."""
        self.take_arrivals()
        for peers in self.shards:
            for peer in peers:
                self.waiting.remove(peer.link)
                peer.link.close()
            peers.clear()
