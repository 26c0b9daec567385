"""A2F and F2A: rows out to the FFN shards, partial sums back (hot). Two classes, one for each holder.

One exchange, attention side, for a layer and ubatch:

    IDLE ──send()──► SENT to every shard ──receive(): all partial sums in──► IDLE
                       │  ▲
            PeerLost   ▼  │ another replica of the shard, or the same one back: the rows go out again
                     HOLDING ──nobody within hold_s──► PeerLost to the caller

The rows stay with the attention side until their answer is in, so a lost FFN worker costs no recompute. Links come and go through
``add_link``, which other threads may call. Legend: T rows, D hidden, U ubatches.
Must not know: what is computed on either side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from antiphon.connectors.headers import TORCH_OF_WIRE, WIRE_DTYPES, Header, Kind, unpack
from antiphon.core.errors import AntiphonError, CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import Link, Listener, Message
from antiphon.transport.waiting import WaitSet

CHANNEL = "afd"
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


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """Rows in flight for one ubatch."""

    step: int
    layer: int
    rows_TD: torch.Tensor
    sent_s: float
    waiting_for: set[int]  # shard indices whose partial sum is not in
    out_TD: torch.Tensor
    parts: list[torch.Tensor | None]  # partial sums by shard, where there are several shards
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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``answer_timeout_s``: a peer silent this long while it owes is lost; ``hold_s``: wait this long for a replacement."""
        self.times = StageTimes()
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

    def send(self, step: int, layer: int, ubatch: int, rows_TD: torch.Tensor) -> None:
        """Start the exchange of rows_TD; they must not change until ``receive`` of the same ubatch returns.

        Raises:
            PeerLost: a shard has no worker and none came back in time.
        """
        if self._arrivals:
            self._take_arrivals()
        exchange = _Exchange(
            step=step,
            layer=layer,
            rows_TD=rows_TD,
            sent_s=self._clock(),
            waiting_for=set(range(len(self._shards))),
            out_TD=torch.empty(rows_TD.shape, dtype=self._return_dtype),
            parts=[None] * len(self._shards),
        )
        self._flight[ubatch] = exchange
        for index in range(len(self._shards)):
            self._post(index, ubatch, exchange)

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
        if len(self._shards) > 1:
            # Summed in the order of shards, not of arrival: the result must not depend on timing.
            torch.add(_present(exchange.parts[0]), _present(exchange.parts[1]), out=exchange.out_TD)
            for part in exchange.parts[2:]:
                exchange.out_TD.add_(_present(part))
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

    def _post(self, index: int, ubatch: int, exchange: _Exchange) -> None:
        rows_TD = exchange.rows_TD
        num_bytes = rows_TD.numel() * self._dtype.itemsize
        header = Header(
            kind=Kind.A2F,
            epoch=self._epoch,
            step=exchange.step,
            layer=exchange.layer,
            ubatch=ubatch,
            dtype=WIRE_DTYPES[self._dtype],
            rows=rows_TD.shape[0],
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
                slot.data[:num_bytes].view(self._dtype).view(rows_TD.shape).copy_(rows_TD)
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
        dtype = TORCH_OF_WIRE.get(header.dtype)
        if dtype is not self._return_dtype or header.rows != exchange.rows_TD.shape[0]:
            raise CorruptMessage(link.peer, f"{header.rows} rows of dtype code {header.dtype}")
        if header.num_bytes != message.data.numel() or header.num_bytes != exchange.out_TD.numel() * dtype.itemsize:
            raise CorruptMessage(link.peer, f"{message.data.numel()} bytes where its header says {header.num_bytes}")
        part_TD = message.data.view(dtype).view(exchange.out_TD.shape)
        if len(self._shards) == 1:
            exchange.out_TD.copy_(part_TD)
        else:
            exchange.parts[index] = part_TD.clone()
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
            if exchange is not None and index in exchange.waiting_for:
                self.times.num_resent += 1
                self._post(index, ubatch, exchange)


def _present(part: torch.Tensor | None) -> torch.Tensor:
    assert part is not None  # receive() loops until every shard has answered
    return part


@dataclass(slots=True, kw_only=True)
class FFNWork:
    """Rows that arrived for one layer from one peer; the view is valid until ``FFNSide.reply``."""

    link: Link
    message: Message
    header: Header
    rows_TD: torch.Tensor
    arrived_s: float


class FFNSide:
    """The FFN worker's end: many attention peers, no state between messages."""

    def __init__(
        self,
        *,
        epoch: Epoch,
        hidden_size: int,
        dtype: torch.dtype,
        return_dtype: torch.dtype,
        num_layers: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._epoch = epoch
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._return_dtype = return_dtype
        self._num_layers = num_layers
        self._clock = clock
        self._links: list[Link] = []
        self._listeners: list[Listener] = []
        self._waiting = WaitSet()
        self.refusals: deque[AntiphonError] = deque(maxlen=64)  # peers dropped, and why

    def add_listener(self, listener: Listener) -> None:
        """Accept peers from ``listener`` from now on."""
        self._listeners.append(listener)
        self._waiting.add(listener)

    def add_link(self, link: Link) -> None:
        """Serve an open link."""
        self._links.append(link)
        self._waiting.add(link)

    @property
    def num_peers(self) -> int:
        """Attention peers linked now."""
        return len(self._links)

    def poll(self) -> list[FFNWork]:
        """Everything that has arrived, from all peers; lost and faulty peers are dropped. Never blocks."""
        for listener in self._listeners:
            while (link := listener.accept()) is not None:
                self.add_link(link)
        works: list[FFNWork] = []
        for link in tuple(self._links):
            try:
                while (message := link.poll()) is not None:
                    works.append(self._parse(link, message))
            except (PeerLost, CorruptMessage) as error:
                self._drop(link, error)
                works = [work for work in works if work.link is not link]
        return works

    def reply(self, work: FFNWork, out_TD: torch.Tensor, *, compute_us: int, wait_us: int, batch_rows: int) -> bool:
        """Send the result of ``work`` and give its rows back; False when the peer is gone (its loss, not ours)."""
        num_bytes = out_TD.numel() * self._return_dtype.itemsize
        header = Header(
            kind=Kind.F2A,
            epoch=self._epoch,
            step=work.header.step,
            layer=work.header.layer,
            ubatch=work.header.ubatch,
            dtype=WIRE_DTYPES[self._return_dtype],
            rows=out_TD.shape[0],
            num_bytes=num_bytes,
            wait_us=min(wait_us, 0xFFFFFFFF),
            compute_us=min(compute_us, 0xFFFFFFFF),
            batch_rows=batch_rows,
        ).pack()
        try:
            # The peer has at most num_slots exchanges in flight and frees an answer's slot before it sends more rows,
            # so a slot is free unless the peer broke the rules.
            slot = work.link.acquire()
            if slot is None:
                raise PeerLost(work.link.peer, "left no slot free for its own answer")
            slot.data[:num_bytes].view(self._return_dtype).view(out_TD.shape).copy_(out_TD)
            work.link.release(work.message)
            work.link.commit(slot, header, num_bytes)
        except PeerLost as error:
            self._drop(work.link, error)
            return False
        return True

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something may have arrived (True) or the time is up."""
        return self._waiting.wait(timeout_s)

    def close(self) -> None:
        """Close listeners and links; idempotent."""
        for listener in self._listeners:
            listener.close()
        for link in self._links:
            link.close()
        self._listeners.clear()
        self._links.clear()

    def _parse(self, link: Link, message: Message) -> FFNWork:
        header = unpack(message.header, link.peer)
        if header.kind is not Kind.A2F:
            raise CorruptMessage(link.peer, f"unexpected {header.kind.name}")
        if header.epoch != link.peer_epoch:
            raise CorruptMessage(link.peer, f"epoch {header.epoch}, its hello said {link.peer_epoch}")
        if header.layer >= self._num_layers:
            raise CorruptMessage(link.peer, f"layer {header.layer} of {self._num_layers}")
        if TORCH_OF_WIRE.get(header.dtype) is not self._dtype:
            raise CorruptMessage(link.peer, f"dtype code {header.dtype}")
        expected = header.rows * self._hidden_size * self._dtype.itemsize
        if header.rows == 0 or header.num_bytes != expected or message.data.numel() != expected:
            raise CorruptMessage(link.peer, f"{message.data.numel()} bytes for {header.rows} rows")
        rows_TD = message.data.view(self._dtype).view(header.rows, self._hidden_size)
        return FFNWork(link=link, message=message, header=header, rows_TD=rows_TD, arrived_s=self._clock())

    def _drop(self, link: Link, error: AntiphonError) -> None:
        if link in self._links:
            self._links.remove(link)
            self._waiting.remove(link)
            self.refusals.append(error)
        link.close()


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
