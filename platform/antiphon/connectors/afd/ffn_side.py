"""A2F and F2A, the FFN side: takes rows from many attention peers and answers them, with no state between messages (hot).

Must not know: what is computed, which experts are where. Legend: R rows, D hidden, K expert ids per row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from antiphon.connectors.afd.rows import RowFormat, SlotViews, copy_rows
from antiphon.connectors.headers import WIRE_DTYPES, Header, Kind, unpack
from antiphon.core.errors import AntiphonError, CorruptMessage, Overloaded, PeerLost, kept
from antiphon.core.ids import Epoch
from antiphon.device.ready import written
from antiphon.transport.base import Link, Listener, Message
from antiphon.transport.waiting import WaitSet, any_pending

_MAX_LINKS = 512
_MAX_OF_ONE = 4  # of one worker


@dataclass(slots=True, kw_only=True)
class FFNWork:
    """Rows that arrived for one layer from one peer; the views are valid until ``FFNSide.reply``."""

    link: Link
    message: Message
    header: Header
    rows_RD: torch.Tensor  # in the compute format
    ids_RK: torch.Tensor | None  # int32; None: a dense FFN
    weights_RK: torch.Tensor | None  # fp32
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
        compute_dtype: torch.dtype,
        experts_per_row: Sequence[int | None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``experts_per_row``: by layer number on the wire; 0 for a dense FFN, None where the model has none.

        Rows come in ``dtype``, are handed out in ``compute_dtype``, and go back in ``return_dtype``.
        """
        self.num_free_slots = -1  # fewest over all links when last at rest; a ring at rest has all of its slots. -1: not known yet
        self._epoch = epoch
        self._in = RowFormat(dtype, hidden_size)
        self._back = RowFormat(return_dtype, hidden_size)
        self._compute_dtype = compute_dtype
        self._experts_per_row = tuple(experts_per_row)
        self._clock = clock
        self._links: list[Link] = []
        self._views: dict[Link, tuple[SlotViews, SlotViews]] = {}  # of what comes in, and of what goes back
        self._listeners: list[Listener] = []
        self._waiting = WaitSet()
        self.num_changes = 0  # links added and dropped since start
        self.refusals: deque[AntiphonError] = deque(maxlen=64)  # peers dropped, and why

    def add_listener(self, listener: Listener) -> None:
        """Accept peers from ``listener`` from now on."""
        self._listeners.append(listener)
        self._waiting.add(listener)

    def add_link(self, link: Link) -> None:
        """Serve an open link."""
        self._links.append(link)
        self.num_changes += 1
        self._views[link] = (SlotViews(self._in), SlotViews(self._back))
        self._waiting.add(link)

    @property
    def num_peers(self) -> int:
        """Attention peers linked now."""
        return len(self._links)

    def serves(self, link: Link) -> bool:
        """True while the link is one of ours."""
        return link in self._views

    def poll(self) -> list[FFNWork]:
        """Everything that has arrived, from all peers; lost and faulty peers are dropped. Never blocks."""
        for listener in self._listeners:
            while listener.pending() and (link := listener.accept()) is not None:
                if self._is_one_too_many(link):
                    self.refusals.append(kept(Overloaded(f"{link.peer} is not taken: {len(self._links)} links are open")))
                    link.close()
                else:
                    self.add_link(link)
        works: list[FFNWork] = []
        for link in tuple(self._links):
            try:
                while (message := link.poll()) is not None:
                    works.append(self._parse(link, message))
            except (PeerLost, CorruptMessage) as error:
                self._drop(link, error)
                works = [work for work in works if work.link is not link]
            except Exception as error:  # noqa: BLE001 - whatever one peer's bytes do, the others are served
                self._drop(link, CorruptMessage(link.peer, f"{type(error).__name__}: {error}"))
                works = [work for work in works if work.link is not link]
        return works

    def _is_one_too_many(self, link: Link) -> bool:
        """Each costs memory and a look at every turn; one worker needs one, and for a moment another behind one that was cut."""
        return len(self._links) >= _MAX_LINKS or sum(each.peer == link.peer for each in self._links) >= _MAX_OF_ONE

    def reply(self, work: FFNWork, out_RD: torch.Tensor, *, compute_us: int, wait_us: int, batch_rows: int) -> bool:
        """Send the result of ``work`` and give its rows back; False when the peer is gone (its loss, not ours)."""
        num_rows = out_RD.shape[0]
        num_bytes = self._back.num_bytes(num_rows)
        header = Header(
            kind=Kind.F2A,
            epoch=self._epoch,
            step=work.header.step,
            layer=work.header.layer,
            ubatch=work.header.ubatch,
            dtype=WIRE_DTYPES[self._back.dtype],
            rows=num_rows,
            num_bytes=num_bytes,
            wait_us=min(wait_us, 0xFFFFFFFF),
            compute_us=min(compute_us, 0xFFFFFFFF),
            batch_rows=batch_rows,
        ).pack()
        if work.link not in self._views:
            return False  # dropped since
        try:
            # The peer has at most num_slots exchanges in flight and frees an answer's slot before it sends more rows,
            # so a slot is free unless the peer broke the rules.
            slot = work.link.acquire()
            if slot is None:
                raise PeerLost(work.link.peer, "left no slot free for its own answer")
            copy_rows(out_RD, self._views[work.link][1].of(slot.index, slot.data, num_rows).rows_RD)
            work.link.release(work.message)
            work.link.commit(slot, header, num_bytes, written(out_RD, slot.data))
        except PeerLost as error:
            self._drop(work.link, error)
            return False
        return True

    def rest(self) -> None:
        """Nothing has arrived, and everything is answered: count the free slots."""
        self.num_free_slots = min((link.num_free_slots for link in self._links), default=-1)

    def pending(self) -> bool:
        """Whether something may have arrived."""
        return any_pending(self._waiting.members)

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
        self._views.clear()

    def _parse(self, link: Link, message: Message) -> FFNWork:
        header = unpack(message.header, link.peer)
        if header.kind is not Kind.A2F:
            raise CorruptMessage(link.peer, f"unexpected {header.kind.name}")
        if header.epoch != link.peer_epoch:
            raise CorruptMessage(link.peer, f"epoch {header.epoch}, its hello said {link.peer_epoch}")
        num_ids = self._experts_per_row[header.layer] if header.layer < len(self._experts_per_row) else None
        if num_ids is None:
            raise CorruptMessage(link.peer, f"layer {header.layer} of {len(self._experts_per_row)}")
        if header.experts_per_row != num_ids:
            raise CorruptMessage(link.peer, f"{header.experts_per_row} experts per row in layer {header.layer}, expected {num_ids}")
        if header.dtype != WIRE_DTYPES[self._in.dtype]:
            raise CorruptMessage(link.peer, f"dtype code {header.dtype}")
        expected = self._in.num_bytes(header.rows, num_ids)
        if header.rows == 0 or header.num_bytes != expected or message.data.shape[0] != expected:
            raise CorruptMessage(link.peer, f"{message.data.shape[0]} bytes for {header.rows} rows")
        views = self._views[link][0].of(message.slot, message.data, header.rows, num_ids)
        return FFNWork(
            link=link,
            message=message,
            header=header,
            rows_RD=self._in.read(views, self._compute_dtype),
            ids_RK=views.ids_RK,
            weights_RK=views.weights_RK,
            arrived_s=self._clock(),
        )

    def refuse(self, work: FFNWork, why: str) -> None:
        """Drop the peer whose rows can't be computed as they are."""
        self._drop(work.link, CorruptMessage(work.link.peer, why))

    def _drop(self, link: Link, error: AntiphonError) -> None:
        if link in self._links:
            self._links.remove(link)
            del self._views[link]
            self.num_changes += 1
            self._waiting.remove(link)
            self.refusals.append(kept(error))
        link.close()
