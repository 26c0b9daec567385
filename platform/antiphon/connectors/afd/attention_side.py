"""A2F and F2A, the attention side: rows out to the FFN shards, partial sums back (hot). ``ffn_side`` is the other end.

One exchange, attention side, for a layer and ubatch:

    IDLE ──send()──► SENT to every shard ──receive(): all partial sums in──► IDLE
                       │  ▲
            PeerLost   ▼  │ another replica of the shard, or the same one back: the rows go out again
                     HOLDING ──nobody within hold_s──► PeerLost to the caller

A dense FFN's rows go to every shard. Rows of a mixture of experts go only to shards that hold one of their experts, with ids and
weights, and come back as one partial sum per row and shard. The rows stay with the attention side until their answer is in, so a
lost FFN worker costs no recompute. Links come and go through ``add_link``, which other threads may call.

Answers are used where they arrived: the message of the last one is given back when the ubatch's next rows leave. ``rows`` knows how
payloads are laid out.

Legend: T rows, R rows that go to one shard, D hidden, K ids per row. Must not know: what is computed on either side.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from antiphon.connectors.afd.ahead import Ahead
from antiphon.connectors.afd.expert_map import ExpertMap, Share
from antiphon.connectors.afd.inflight import Exchange, Peer, StageTimes
from antiphon.connectors.afd.rows import RowFormat
from antiphon.connectors.afd.shard_links import ShardLinks
from antiphon.connectors.headers import WIRE_DTYPES, Header, Kind, unpack
from antiphon.core.errors import AntiphonError, CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.ready import written
from antiphon.models.experts.routing import Routing
from antiphon.transport.base import Link, Message, Slot

_WAIT_SLICE_S = 0.05


class AttentionSide:
    """The attention worker's end. ``send`` then ``receive`` per layer and ubatch, several ubatches in flight at once."""

    def __init__(
        self,
        *,
        epoch: Epoch,
        num_shards: int,
        num_ubatches: int,
        hidden_size: int,
        dtype: torch.dtype,
        return_dtype: torch.dtype,
        answer_timeout_s: float,
        hold_s: float,
        preferred_replica: int = 0,
        experts: ExpertMap | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``num_ubatches``: exchanges in flight at most (streams included); ``answer_timeout_s``: a peer silent this long while it
        owes is lost; ``hold_s``: wait this long for a replacement; ``experts``: needed for mixtures of experts.
        """
        self.times = StageTimes()
        self.experts = experts  # may be set to another map of as many groups by the worker's loop, between exchanges
        self.num_free_slots = -1  # fewest over all links when last at rest; a ring at rest has all of its slots. -1: not known yet
        self._epoch = epoch
        self._out = RowFormat(dtype, hidden_size)
        self._back = RowFormat(return_dtype, hidden_size)
        self._answer_timeout_s = answer_timeout_s
        self._clock = clock
        self._links = ShardLinks(
            num_shards, out=self._out, back=self._back, preferred_replica=preferred_replica, hold_s=hold_s, clock=clock
        )
        self._shards = self._links.shards
        self.ahead = Ahead(self._links, answer_timeout_s)
        self._exchanges = [Exchange(parts=[None] * num_shards, sent_to=[None] * num_shards) for _ in range(num_ubatches)]
        self._dense = _dense_shares(0, num_shards)
        self._waiting = self._links.waiting

    # ---- links -------------------------------------------------------------------------------------------------

    def add_link(self, shard: int, link: Link) -> None:
        """Offer an open link to a worker of ``shard``; safe from any thread, taken up when no rows are away or it is needed."""
        self._links.add(shard, link)

    def peers(self) -> set[tuple[WorkerId, Epoch]]:
        """Workers linked now, links still to be taken up included; safe from any thread."""
        return self._links.workers()

    @property
    def losses(self) -> deque[AntiphonError]:
        """Peers dropped, and why."""
        return self._links.losses

    @property
    def waits_s(self) -> float:
        """How long the rows that have been away longest have been so, 0 while none are; safe from any thread."""
        away = [exchange.sent_s for exchange in self._exchanges if exchange.is_away]
        return max(0.0, self._clock() - min(away)) if away else 0.0

    @property
    def missing_s(self) -> float:
        """How long a shard has had no worker, 0 where each has one; safe from any thread."""
        return self._links.missing_s

    def owing(self) -> dict[tuple[WorkerId, Epoch], float]:
        """Workers that have not answered rows, and for how long; safe from any thread."""
        found: dict[tuple[WorkerId, Epoch], float] = {}
        now_s = self._clock()
        for exchange in self._exchanges:
            for index in tuple(exchange.waiting_for) if exchange.is_away else ():
                for peer in self._shards[index][:1]:
                    key = (peer.link.peer, peer.link.peer_epoch)
                    found[key] = max(found.get(key, 0.0), now_s - exchange.sent_s)
        return found

    def lose(self, worker: tuple[WorkerId, Epoch], why: str) -> None:
        """Take a worker for lost, unless it has answered by the time the loop hears of it; safe from any thread."""
        self._links.silent.append((worker, why))

    @property
    def complete(self) -> bool:
        """True when every shard has a link."""
        self._links.take_arrivals()
        return all(self._shards)

    # ---- the exchange ------------------------------------------------------------------------------------------

    def send(self, step: int, layer: int, ubatch: int, rows_TD: torch.Tensor, routing: Routing | None = None) -> None:
        """Start the exchange of rows_TD; they must not change until ``receive`` of the same ubatch returns.

        What ``receive`` of this ubatch returned before is no longer valid.

        Args:
            step: The step's number; answers to another are dropped.
            layer: The layer's number on the wire (DecoderConfig.ffns).
            ubatch: The exchange's place among those in flight.
            rows_TD: The rows, in any float type.
            routing: Experts of each row; None for a dense FFN.

        Raises:
            PeerLost: a shard has no worker and none came back in time.
        """
        if self._links.has_arrivals and not any(other.is_away for other in self._exchanges):
            self._links.take_arrivals()
        exchange = self._exchanges[ubatch]
        exchange.give_back()
        exchange.step, exchange.layer, exchange.num_rows = step, layer, rows_TD.shape[0]
        exchange.coded = self._out.encode(rows_TD)
        exchange.shares = shares = self._shares(layer, exchange.num_rows, routing)
        exchange.sent_s = self._clock()
        exchange.overdue_s = exchange.sent_s + self._answer_timeout_s
        exchange.compute_us = exchange.wait_us = 0
        exchange.waiting_for.clear()
        for index, share in enumerate(shares):
            exchange.parts[index] = exchange.sent_to[index] = None
            if share is not None:
                exchange.waiting_for.add(index)
        exchange.is_away = True
        for index, share in enumerate(shares):
            if share is not None and exchange.sent_to[index] is None and not self._post(index, ubatch, exchange):
                self._send_owed(index)

    def receive(self, ubatch: int) -> torch.Tensor:
        """The FFN's result for the ubatch's rows, summed over shards, [T, D] in the return format.

        It lies where it arrived: use it before the ubatch's next ``send``, and do not write to it.

        Raises:
            PeerLost: a shard has no worker and none came back in time.
        """
        exchange = self._exchanges[ubatch]
        assert exchange.is_away, "receive() without send()"
        start_s = self._clock()
        waiting_for = exchange.waiting_for
        while waiting_for:
            for index in tuple(waiting_for):
                self._drain(index)
            if waiting_for:
                self._wait(exchange)
        exchange.is_away = False
        result_TD = exchange.result(self._back)
        now_s = self._clock()
        times = self.times
        times.num_exchanges += 1
        times.round_trip_s += now_s - exchange.sent_s
        times.blocked_s += now_s - start_s
        times.ffn_compute_s += exchange.compute_us * 1e-6
        times.ffn_wait_s += exchange.wait_us * 1e-6
        return result_TD

    def has_arrived(self, ubatch: int) -> bool:
        """Whether ``receive`` of this ubatch would return at once."""
        waiting_for = self._exchanges[ubatch].waiting_for
        for index in tuple(waiting_for):
            self._drain(index)
        return not waiting_for

    @property
    def has_arrivals(self) -> bool:
        """Links were offered that are taken up when no rows are away."""
        return self._links.has_arrivals

    def look_after_spares(self) -> None:
        """Notice what became of workers that are not in use; rows may be away."""
        self._links.look_after_spares()

    def rest(self) -> None:
        """No exchange is under way, and no result of one is in use: give everything back, and count the free slots."""
        for exchange in self._exchanges:
            exchange.give_back()
        self._links.look_after_spares()
        self.num_free_slots = self._links.fewest_free_slots()

    def abandon(self) -> None:
        """Give up all exchanges in flight (the step failed); late answers are dropped by their step number."""
        for exchange in self._exchanges:
            exchange.is_away = False
            exchange.waiting_for.clear()
            exchange.give_back()

    def close(self) -> None:
        """Close all links; idempotent."""
        self._links.take_arrivals()
        self.abandon()
        self._links.close()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _shares(self, layer: int, num_rows: int, routing: Routing | None) -> Sequence[Share | None]:
        if routing is None:
            if self._dense[0].num_rows != num_rows:
                self._dense = _dense_shares(num_rows, len(self._shards))
            return self._dense
        assert self.experts is not None  # the composition root gives a map where the model has experts
        by_group = self.experts.split(layer, routing)
        num_tensor = len(self._shards) // self.experts.num_groups
        return by_group if num_tensor == 1 else [share for share in by_group for _ in range(num_tensor)]

    def _post(self, index: int, ubatch: int, exchange: Exchange) -> bool:
        """Send rows to the shard's worker in use; False when it was lost meanwhile. Raises PeerLost: none came back in time."""
        share = exchange.shares[index]
        assert share is not None  # it is waited for
        num_rows = share.num_rows
        num_ids = 0 if share.ids_RK is None else share.ids_RK.shape[1]
        num_bytes = self._out.num_bytes(num_rows, num_ids)
        header = Header(
            kind=Kind.A2F,
            epoch=self._epoch,
            step=exchange.step,
            layer=exchange.layer,
            ubatch=ubatch,
            dtype=WIRE_DTYPES[self._out.dtype],
            experts_per_row=num_ids,
            rows=num_rows,
            num_bytes=num_bytes,
            spare=0 if self.experts is None else self.experts.number,
        ).pack()
        peer = self._links.in_use(index)
        try:
            slot = self._slot(index, peer)
            if slot is None:
                return False
            views = peer.out.of(slot.index, slot.data, num_rows, num_ids)
            if share.ids_RK is not None and share.weights_RK is not None:
                assert views.ids_RK is not None  # made for as many ids
                assert views.weights_RK is not None
                views.ids_RK.copy_(share.ids_RK)
                views.weights_RK.copy_(share.weights_RK)
            assert exchange.coded is not None  # send() fills it before it posts
            self._out.write(views, exchange.coded, share.rows_R)
            self.times.num_rows_sent += num_rows
            peer.link.commit(slot, header, num_bytes, written(exchange.coded.rows_TD, slot.data))
        except (PeerLost, CorruptMessage) as error:
            self._links.drop(index, peer, error)
            return False
        self.times.num_resent += exchange.sent_to[index] is not None
        exchange.sent_to[index] = peer
        peer.num_owed += 1
        return True

    def _slot(self, index: int, peer: Peer) -> Slot | None:
        """A slot to write into, waiting for the peer's answers; None when the peer was lost meanwhile. Raises PeerLost."""
        # A peer that owes answers to rows which were given up has slots for no more than it owes.
        slot = peer.link.acquire() if peer.num_owed < len(self._exchanges) else None
        if slot is not None:
            return slot
        deadline = self._clock() + self._answer_timeout_s
        while slot is None:
            if self._clock() > deadline:
                raise PeerLost(peer.link.peer, f"took no rows for {self._answer_timeout_s:g} s")
            peer.link.wait(_WAIT_SLICE_S)
            self._drain(index)
            if self._links.silent:
                self._drop_silent()
            if self._shards[index][:1] != [peer]:
                return None  # lost while draining
            if peer.num_owed < len(self._exchanges):
                slot = peer.link.acquire()
        return slot

    def _drain(self, index: int) -> None:
        """Take every answer that has arrived from the shard's worker."""
        peers = self._shards[index]
        if not peers:
            self._send_owed(index)
            return
        peer = peers[0]
        try:
            while (message := peer.link.poll()) is not None:
                self._accept(index, peer, message)
        except (PeerLost, CorruptMessage) as error:
            self._links.drop(index, peer, error)
            self._send_owed(index)

    def _accept(self, index: int, peer: Peer, message: Message) -> None:
        link = peer.link
        header = unpack(message.header, link.peer)
        if header.kind is not Kind.F2A or header.ubatch >= len(self._exchanges):
            raise CorruptMessage(link.peer, f"unexpected {header.kind.name} for ubatch {header.ubatch}")
        exchange = self._exchanges[header.ubatch]
        if (
            header.epoch != link.peer_epoch  # a zombie's late answer
            or header.step != exchange.step  # or one to rows that were given up
            or header.layer != exchange.layer
            or index not in exchange.waiting_for  # or that another replica has answered
        ):
            link.release(message)
            peer.num_owed -= header.epoch == link.peer_epoch
            return
        share = exchange.shares[index]
        assert share is not None  # it is waited for
        if header.dtype != WIRE_DTYPES[self._back.dtype] or header.rows != share.num_rows:
            raise CorruptMessage(link.peer, f"{header.rows} rows of dtype code {header.dtype}")
        num_bytes = self._back.num_bytes(share.num_rows)
        if header.num_bytes != num_bytes or message.data.shape[0] != num_bytes:
            raise CorruptMessage(link.peer, f"{message.data.shape[0]} bytes where its header says {header.num_bytes}")
        peer.num_owed -= 1
        exchange.parts[index] = peer.back.of(message.slot, message.data, share.num_rows).rows_RD
        exchange.messages.append((link, message))
        exchange.waiting_for.remove(index)
        exchange.compute_us = max(exchange.compute_us, header.compute_us)
        exchange.wait_us = max(exchange.wait_us, header.wait_us)

    def _drop_silent(self) -> None:
        for index in self._links.drop_silent(self.owing()):
            self._send_owed(index)

    def _wait(self, exchange: Exchange) -> None:
        if self._links.silent:
            self._drop_silent()
            return
        now_s = self._clock()
        if now_s > exchange.overdue_s:
            exchange.overdue_s = now_s + self._answer_timeout_s
            for index in tuple(exchange.waiting_for):
                peers = self._shards[index]
                if peers:
                    silent = PeerLost(peers[0].link.peer, f"owed an answer for {self._answer_timeout_s:g} s")
                    self._links.drop(index, peers[0], silent)
                    self._send_owed(index)
            return
        peers = self._shards[0]
        if len(self._shards) == 1 and peers:
            with contextlib.suppress(PeerLost):  # the next drain sees it again and re-sends
                peers[0].link.wait(_WAIT_SLICE_S)
        elif self._waiting.wait(_WAIT_SLICE_S):
            for index, peers in enumerate(self._shards):  # what came may be for another ubatch, from a shard not waited for here
                if peers:
                    self._drain(index)

    def _send_owed(self, index: int) -> None:
        """Send the shard's worker in use all that is waited for from the shard, but what it has been sent."""
        away, peers = enumerate(self._exchanges), self._shards[index]
        while not all(self._post(index, ubatch, each) for ubatch, each in away if each.is_unsent(index, peers[:1])):
            away = enumerate(self._exchanges)  # it was lost too: whoever is in use now gets everything


def _dense_shares(num_rows: int, num_shards: int) -> list[Share]:
    return [Share(rows_R=None, num_rows=num_rows)] * num_shards
