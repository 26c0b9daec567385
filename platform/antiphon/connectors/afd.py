"""A2F and F2A, the attention side: rows out to the FFN shards, partial sums back (hot). ``ffn_side`` is the other end.

One exchange, attention side, for a layer and ubatch:

    IDLE ──send()──► SENT to every shard ──receive(): all partial sums in──► IDLE
                       │  ▲
            PeerLost   ▼  │ another replica of the shard, or the same one back: the rows go out again
                     HOLDING ──nobody within hold_s──► PeerLost to the caller

A dense FFN's rows go to every shard. Rows of a mixture of experts go only to shards that hold one of their experts, with ids and
weights, and come back as one partial sum per row and shard. The rows stay with the attention side until their answer is in, so a
lost FFN worker costs no recompute. Links come and go through ``add_link``, which other threads may call.

    A2F payload:  ids int32 [R, K] · weights fp32 [R, K] · rows [R, D]      (K = 0 for a dense FFN)
    F2A payload:  rows [R, D]

Legend: T rows, R rows that go to one shard, D hidden, K ids per row.
Must not know: what is computed on either side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from antiphon.connectors.expert_map import ExpertMap, Share
from antiphon.connectors.headers import TORCH_OF_WIRE, WIRE_DTYPES, Header, Kind, unpack
from antiphon.core.errors import CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.models.routing import Routing
from antiphon.transport.base import Link, Message
from antiphon.transport.waiting import WaitSet

CHANNEL = "afd"
BYTES_PER_ID = 8  # an expert id (int32) and its weight (fp32)
_WAIT_SLICE_S = 0.05


@dataclass(slots=True, kw_only=True)
class StageTimes:
    """Sums since start, in seconds on the attention side's own clock, and what the FFN side reported of itself."""

    num_exchanges: int = 0
    round_trip_s: float = 0.0  # from send to the last partial sum
    blocked_s: float = 0.0  # of it, waiting inside receive()
    ffn_compute_s: float = 0.0  # the slowest shard's, as reported
    ffn_wait_s: float = 0.0  # the slowest shard's queueing, as reported
    num_resent: int = 0
    num_rows_sent: int = 0  # over all shards


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """Rows in flight for one ubatch and lane."""

    step: int
    layer: int
    rows_TD: torch.Tensor
    sent_s: float
    shares: Sequence[Share | None]  # by shard; None: the shard gets no row
    waiting_for: set[int]  # shard indices whose partial sum is not in
    out_TD: torch.Tensor
    parts: list[torch.Tensor | None]  # partial sums by shard, where they have to be summed
    compute_us: int = 0
    wait_us: int = 0


@dataclass(slots=True, kw_only=True)
class _Shard:
    """One shard of the FFN and the replicas of it that are connected; the first is in use."""

    links: list[Link] = field(default_factory=list)


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
        """``num_ubatches``: exchanges in flight at most (lanes included); ``answer_timeout_s``: a peer silent this long while it
        owes is lost; ``hold_s``: wait this long for a replacement; ``experts``: needed for mixtures of experts.
        """
        self.times = StageTimes()
        self.experts = experts  # may be set to another map of as many groups by the worker's loop, between exchanges
        self._epoch = epoch
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._return_dtype = return_dtype
        self._answer_timeout_s = answer_timeout_s
        self._hold_s = hold_s
        self._preferred = preferred_replica
        self._clock = clock
        self._shards = [_Shard() for _ in range(num_shards)]
        self._flight: list[_Exchange | None] = [None] * num_ubatches
        self._arrivals: deque[tuple[int, Link]] = deque()
        self._waiting = WaitSet()

    # ---- links -------------------------------------------------------------------------------------------------

    def add_link(self, shard: int, link: Link) -> None:
        """Offer an open link to a worker of ``shard``; safe from any thread, taken up at the next exchange."""
        self._arrivals.append((shard, link))

    def peers(self) -> set[tuple[WorkerId, Epoch]]:
        """Workers linked now, links still to be taken up included; safe from any thread."""
        linked = [link for shard in self._shards for link in tuple(shard.links)]
        return {(link.peer, link.peer_epoch) for link in [*linked, *(link for _, link in tuple(self._arrivals))]}

    @property
    def complete(self) -> bool:
        """True when every shard has a link."""
        self._take_arrivals()
        return all(shard.links for shard in self._shards)

    # ---- the exchange ------------------------------------------------------------------------------------------

    def send(self, step: int, layer: int, ubatch: int, rows_TD: torch.Tensor, routing: Routing | None = None) -> None:
        """Start the exchange of rows_TD; they must not change until ``receive`` of the same ubatch returns.

        Args:
            step: The step's number; answers to another are dropped.
            layer: The layer's number on the wire (DecoderConfig.ffns).
            ubatch: The exchange's place among those in flight.
            rows_TD: The rows, in any float type.
            routing: Experts of each row; None for a dense FFN.

        Raises:
            PeerLost: a shard has no worker and none came back in time.
        """
        if self._arrivals:
            self._take_arrivals()
        shares = self._shares(layer, rows_TD.shape[0], routing)
        exchange = _Exchange(
            step=step,
            layer=layer,
            rows_TD=rows_TD,
            sent_s=self._clock(),
            shares=shares,
            waiting_for={index for index, share in enumerate(shares) if share is not None},
            out_TD=torch.empty(rows_TD.shape, dtype=self._return_dtype),
            parts=[None] * len(self._shards),
        )
        self._flight[ubatch] = exchange
        for index, share in enumerate(shares):
            if share is not None:
                self._post(index, ubatch, exchange, share)

    def _shares(self, layer: int, num_rows: int, routing: Routing | None) -> Sequence[Share | None]:
        if routing is None:
            return [Share(rows_R=None, num_rows=num_rows)] * len(self._shards)
        assert self.experts is not None  # the composition root gives a map where the model has experts
        by_group = self.experts.split(layer, routing)
        num_tensor = len(self._shards) // self.experts.num_groups
        return by_group if num_tensor == 1 else [share for share in by_group for _ in range(num_tensor)]

    def receive(self, ubatch: int) -> torch.Tensor:
        """The FFN's result for the ubatch's rows, summed over shards, [T, D] in the return format.

        Raises:
            PeerLost: a shard has no worker and none came back in time.
            CorruptMessage: a peer's answer is not what its header promises.
        """
        exchange = self._flight[ubatch]
        assert exchange is not None, "receive() without send()"
        start_s = self._clock()
        while exchange.waiting_for:
            for index in tuple(exchange.waiting_for):
                self._drain(index)
            if exchange.waiting_for:
                self._wait(exchange)
        if len(self._shards) > 1 or exchange.shares[0] is None or exchange.shares[0].rows_R is not None:
            self._sum(exchange)
        now_s = self._clock()
        self._flight[ubatch] = None
        times = self.times
        times.num_exchanges += 1
        times.round_trip_s += now_s - exchange.sent_s
        times.blocked_s += now_s - start_s
        times.ffn_compute_s += exchange.compute_us * 1e-6
        times.ffn_wait_s += exchange.wait_us * 1e-6
        return exchange.out_TD

    def abandon(self) -> None:
        """Give up all exchanges in flight (the step failed); late answers are dropped by their step number."""
        self._flight = [None] * len(self._flight)

    def close(self) -> None:
        """Close all links; idempotent."""
        self._take_arrivals()
        for shard in self._shards:
            for link in shard.links:
                link.close()
            shard.links.clear()

    # ---- inside ------------------------------------------------------------------------------------------------

    @staticmethod
    def _sum(exchange: _Exchange) -> None:
        """Sum in the order of shards, not of arrival: the result must not depend on timing."""
        out_TD = exchange.out_TD
        fresh = True
        for share, part in zip(exchange.shares, exchange.parts, strict=True):
            if share is None or part is None:
                continue  # a part is None here only where its share is: receive() waits for the others
            if share.rows_R is None:
                if fresh:
                    out_TD.copy_(part)
                else:
                    out_TD.add_(part)
            else:
                if fresh:
                    out_TD.zero_()
                out_TD.index_add_(0, share.rows_R, part)
            fresh = False
        if fresh:
            out_TD.zero_()

    def _take_arrivals(self) -> None:
        while self._arrivals:
            index, link = self._arrivals.popleft()
            links = self._shards[index].links
            for old in [old for old in links if old.peer == link.peer]:
                old.close()  # the peer restarted: its older epoch answers no more
                links.remove(old)
                self._waiting.remove(old)
            links.append(link)
            self._waiting.add(link)
            links.sort(key=lambda each: each.peer)
            # Attention workers spread over the replicas of a shard instead of all using the first.
            turn = self._preferred % len(links)
            links[:] = links[turn:] + links[:turn]

    def _link(self, index: int) -> Link:
        """A link of the shard, waiting for one to come (back) for at most hold_s."""
        links = self._shards[index].links
        if not links:
            deadline = time.monotonic() + self._hold_s
            while not links:
                self._take_arrivals()
                if links:
                    break
                if time.monotonic() > deadline:
                    raise PeerLost(f"FFN shard {index}", f"no worker holds it and none came within {self._hold_s:g} s")
                time.sleep(0.002)
        return links[0]

    def _post(self, index: int, ubatch: int, exchange: _Exchange, share: Share) -> None:
        width = exchange.rows_TD.shape[1]
        experts_per_row = 0 if share.ids_RK is None else share.ids_RK.shape[1]
        num_head_bytes = share.num_rows * experts_per_row * BYTES_PER_ID
        num_bytes = num_head_bytes + share.num_rows * width * self._dtype.itemsize
        header = Header(
            kind=Kind.A2F,
            epoch=self._epoch,
            step=exchange.step,
            layer=exchange.layer,
            ubatch=ubatch,
            dtype=WIRE_DTYPES[self._dtype],
            experts_per_row=experts_per_row,
            rows=share.num_rows,
            num_bytes=num_bytes,
        ).pack()
        while True:
            link = self._link(index)
            try:
                slot = link.acquire()
                deadline = time.monotonic() + self._answer_timeout_s
                while slot is None:
                    if time.monotonic() > deadline:
                        raise PeerLost(link.peer, f"took no rows for {self._answer_timeout_s:g} s")
                    link.wait(_WAIT_SLICE_S)
                    self._drain(index)
                    if self._shards[index].links[:1] != [link]:
                        break  # lost while draining, and everything in flight is re-sent by then
                    slot = link.acquire()
                if slot is None:
                    continue
                if share.ids_RK is not None and share.weights_RK is not None:
                    head = slot.data[:num_head_bytes].view(torch.int32).view(2, share.num_rows, experts_per_row)
                    head[0].copy_(share.ids_RK)
                    head[1].view(torch.float32).copy_(share.weights_RK)
                target = slot.data[num_head_bytes:num_bytes].view(self._dtype).view(share.num_rows, width)
                if share.rows_R is None:
                    target.copy_(exchange.rows_TD)
                elif exchange.rows_TD.dtype is self._dtype:
                    torch.index_select(exchange.rows_TD, 0, share.rows_R, out=target)
                else:
                    target.copy_(exchange.rows_TD.index_select(0, share.rows_R))
                self.times.num_rows_sent += share.num_rows
                link.commit(slot, header, num_bytes)
            except PeerLost:
                self._drop(index, link)
                continue
            return

    def _drain(self, index: int) -> None:
        """Take every answer that has arrived from the shard's worker."""
        links = self._shards[index].links
        if not links:
            self._resend(index)
            return
        link = links[0]
        try:
            while (message := link.poll()) is not None:
                try:
                    self._accept(index, link, message)
                finally:
                    link.release(message)
        except (PeerLost, CorruptMessage):
            self._drop(index, link)
            self._resend(index)

    def _accept(self, index: int, link: Link, message: Message) -> None:
        header = unpack(message.header, link.peer)
        if header.kind is not Kind.F2A or header.ubatch >= len(self._flight):
            raise CorruptMessage(link.peer, f"unexpected {header.kind.name} for ubatch {header.ubatch}")
        if header.epoch != link.peer_epoch:
            return  # a zombie's late answer
        exchange = self._flight[header.ubatch]
        if exchange is None or (header.step, header.layer) != (exchange.step, exchange.layer) or index not in exchange.waiting_for:
            return  # an answer to rows that were given up or answered by another replica
        share = exchange.shares[index]
        assert share is not None  # it is waited for
        dtype = TORCH_OF_WIRE.get(header.dtype)
        if dtype is not self._return_dtype or header.rows != share.num_rows:
            raise CorruptMessage(link.peer, f"{header.rows} rows of dtype code {header.dtype}")
        width = exchange.out_TD.shape[1]
        if header.num_bytes != message.data.numel() or header.num_bytes != share.num_rows * width * dtype.itemsize:
            raise CorruptMessage(link.peer, f"{message.data.numel()} bytes where its header says {header.num_bytes}")
        part_RD = message.data.view(dtype).view(share.num_rows, width)
        if len(self._shards) == 1 and share.rows_R is None:
            exchange.out_TD.copy_(part_RD)
        else:
            exchange.parts[index] = part_RD.clone()
        exchange.waiting_for.remove(index)
        exchange.compute_us = max(exchange.compute_us, header.compute_us)
        exchange.wait_us = max(exchange.wait_us, header.wait_us)

    def _wait(self, exchange: _Exchange) -> None:
        if self._clock() - exchange.sent_s > self._answer_timeout_s:
            for index in tuple(exchange.waiting_for):
                links = self._shards[index].links
                if links:
                    self._drop(index, links[0])
                    self._resend(index)
            exchange.sent_s = self._clock()
            return
        index = next(iter(exchange.waiting_for))
        links = self._shards[index].links
        if len(self._shards) == 1 and links:
            try:
                links[0].wait(_WAIT_SLICE_S)
            except PeerLost:
                return  # the next drain sees it again and re-sends
        else:
            self._waiting.wait(_WAIT_SLICE_S)

    def _drop(self, index: int, link: Link) -> None:
        links = self._shards[index].links
        if link in links:
            links.remove(link)
            self._waiting.remove(link)
        link.close()

    def _resend(self, index: int) -> None:
        for ubatch, exchange in enumerate(self._flight):
            share = None if exchange is None else exchange.shares[index]
            if exchange is not None and share is not None and index in exchange.waiting_for:
                self.times.num_resent += 1
                self._post(index, ubatch, exchange, share)


def rows_out_bytes(num_rows: int, hidden_size: int, dtype: torch.dtype, experts_per_row: int) -> int:
    """Bytes of the largest A2F payload."""
    return num_rows * (hidden_size * dtype.itemsize + experts_per_row * BYTES_PER_ID)


def afd_fields(
    *,
    revision: str,
    model_fingerprint: str,
    shard: int,
    num_shards: int,
    hidden_size: int,
    dtype: torch.dtype,
    return_dtype: torch.dtype,
) -> Sequence[tuple[str, str]]:
    """The facts that both ends of an AFD link must agree on."""
    return (
        ("revision", revision),
        ("model", model_fingerprint),
        ("shard", f"{shard}/{num_shards}"),
        ("hidden_size", str(hidden_size)),
        ("a2f_dtype", str(dtype).removeprefix("torch.")),
        ("f2a_dtype", str(return_dtype).removeprefix("torch.")),
    )
