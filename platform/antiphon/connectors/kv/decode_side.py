"""The decode worker's end of KV hand-offs (hot); connectors.kv draws them.

Must not know: who schedules.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from antiphon.connectors.headers import Header, Kind, unpack
from antiphon.connectors.kv.handoff import NOTHING_HAPPENED, Sender, write_text
from antiphon.core.errors import AntiphonError, CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.kv import KVLoad, TransferId
from antiphon.core.request import RequestId
from antiphon.core.step import KVEvents
from antiphon.models.attention.kv_cache import KVCache
from antiphon.transport.base import Link, Message
from antiphon.transport.waiting import WaitSet


@dataclass(slots=True, kw_only=True)
class _Load:
    """A transfer that the decode side waits for."""

    load: KVLoad
    sender: Sender
    num_missing: int  # tokens x layers
    num_missing_bytes: int  # of the state
    arrived: torch.Tensor  # bool [layers, tokens]: what comes again is not counted again
    state_bytes: dict[tuple[int, int], int] = field(default_factory=dict)  # that have come, of each layer's plane, in order
    progress_s: float
    slots: torch.Tensor  # int64, of tokens from load.first_token on


class DecodeSide:
    """The decode worker's end. Only ``add_link`` may be called from other threads."""

    def __init__(self, *, epoch: Epoch, cache: KVCache, clock: Callable[[], float] = time.monotonic) -> None:
        self._epoch = epoch
        self._cache = cache
        self._clock = clock
        self._senders: dict[WorkerId, Sender] = {}
        self._arrivals: deque[Link] = deque()
        self._loads: dict[TransferId, _Load] = {}
        self._by_request: dict[RequestId, TransferId] = {}
        self._next_transfer = 1
        self._loaded: list[RequestId] = []
        self._failed: list[tuple[RequestId, str]] = []
        self._aborts: deque[tuple[Sender, TransferId]] = deque()
        self.waiting = WaitSet()
        self._silent: deque[tuple[WorkerId, Epoch, str]] = deque()  # peers to be dropped, if they still owe

    def add_link(self, link: Link) -> None:
        """Offer an open link to a prefill worker; safe from any thread."""
        self._arrivals.append(link)

    def peers(self) -> set[tuple[WorkerId, Epoch]]:
        """Prefill workers linked now, links still to be taken up included; safe from any thread."""
        return {
            (link.peer, link.peer_epoch)
            for link in [*(sender.link for sender in tuple(self._senders.values())), *tuple(self._arrivals)]
        }

    def owing(self) -> dict[tuple[WorkerId, Epoch], float]:
        """Prefill workers that owe KV, and for how long nothing of it has come; safe from any thread."""
        found: dict[tuple[WorkerId, Epoch], float] = {}
        now_s = self._clock()
        for load in tuple(self._loads.values()):
            key = (load.sender.link.peer, load.sender.link.peer_epoch)
            found[key] = max(found.get(key, 0.0), now_s - load.progress_s)
        return found

    def lose(self, worker: tuple[WorkerId, Epoch], why: str) -> None:
        """Take a prefill worker for lost, unless it owes nothing any more when the loop hears of it; safe from any thread."""
        self._silent.append((*worker, why))

    @property
    def num_transfers(self) -> int:
        """Transfers under way."""
        return len(self._loads)

    @property
    def is_loading(self) -> bool:
        """Whether KV that was asked for is still to come."""
        return bool(self._loads)

    def start(self, load: KVLoad) -> None:
        """Ask for KV; the outcome comes with ``poll``."""
        self._take_arrivals()
        sender = self._senders.get(load.prefill_worker)
        if sender is None:
            self._failed.append((load.request_id, f"{load.prefill_worker} is not connected"))
            return
        transfer = TransferId(self._next_transfer)
        self._next_transfer += 1
        try:
            sent = self._ask(sender, transfer, load)
        except PeerLost as error:
            self._drop(sender.link, error)
            sent = False
        if not sent:
            self._failed.append((load.request_id, f"{load.prefill_worker} takes no requests"))
            return
        self._loads[transfer] = _Load(
            load=load,
            sender=sender,
            num_missing=load.num_tokens * len(self._cache.layout.kv_layers),
            num_missing_bytes=self._cache.layout.state_bytes,
            arrived=torch.zeros(self._cache.layout.num_layers, load.num_tokens, dtype=torch.bool),
            progress_s=self._clock(),
            slots=self._cache.slots(load.block_ids, load.first_token, load.num_tokens),
        )
        self._by_request[load.request_id] = transfer

    def abort(self, request_id: RequestId) -> None:
        """Want it no longer; its blocks may be reused when this returns."""
        transfer = self._by_request.pop(request_id, None)
        if transfer is None:
            return
        self._aborts.append((self._loads.pop(transfer).sender, transfer))
        self._send_aborts()

    def poll(self) -> KVEvents:
        """Take in what has arrived; transfers that ended since the last call."""
        self._take_arrivals()
        if self._silent:
            self._drop_silent()
        if self._aborts:
            self._send_aborts()
        self.take_in()
        if self._loads:
            now_s = self._clock()
            for transfer, load in tuple(self._loads.items()):
                if now_s - load.progress_s > load.load.deadline_s:
                    self.abort(load.load.request_id)
                    self._loads.pop(transfer, None)
                    self._failed.append((load.load.request_id, f"no KV for {load.load.deadline_s:g} s"))
        if not self._loaded and not self._failed:
            return NOTHING_HAPPENED
        events = KVEvents(loaded=tuple(self._loaded), failed=tuple(self._failed))
        self._loaded, self._failed = [], []
        return events

    def take_in(self) -> None:
        """Take in what has arrived, also in the middle of a step: a link has far fewer slots than a prompt has messages.

        What ended is told by ``poll``.
        """
        for sender in tuple(self._senders.values()):
            link = sender.link
            try:
                if not self._aborts:
                    sender.settle()
                while (message := link.poll()) is not None:
                    try:
                        self._accept(link, message)
                    finally:
                        link.release(message)
            except (PeerLost, CorruptMessage) as error:
                self._drop(link, error)
            except Exception as error:  # noqa: BLE001 - whatever one peer's bytes do, the others are heard
                self._drop(link, CorruptMessage(link.peer, f"{type(error).__name__}: {error}"))

    def close(self) -> None:
        """Close all links; idempotent."""
        self._take_arrivals()
        for sender in self._senders.values():
            sender.link.close()
        self._senders.clear()

    def _take_arrivals(self) -> None:
        while self._arrivals:
            link = self._arrivals.popleft()
            old = self._senders.get(link.peer)
            if old is not None:
                self._drop(old.link, PeerLost(link.peer, "it restarted"))
            self._senders[link.peer] = Sender(link)
            self.waiting.add(link)

    def _drop_silent(self) -> None:
        owing = self.owing()
        while self._silent:
            worker, epoch, why = self._silent.popleft()
            sender = self._senders.get(worker)
            if (worker, epoch) in owing and sender is not None and sender.link.peer_epoch == epoch:
                self._drop(sender.link, PeerLost(worker, why))

    def _send_aborts(self) -> None:
        for _ in range(len(self._aborts)):
            sender, transfer = self._aborts.popleft()
            try:
                slot = sender.take()
                if slot is None:
                    self._aborts.append((sender, transfer))
                else:
                    sender.link.commit(slot, Header(kind=Kind.PREFILL_ABORT, epoch=self._epoch, step=transfer).pack(), 0)
            except PeerLost as error:
                self._drop(sender.link, error)

    def _ask(self, sender: Sender, transfer: TransferId, load: KVLoad) -> bool:
        slot = sender.take()
        if slot is None:
            return False
        tokens = torch.tensor(load.token_ids, dtype=torch.int32).view(torch.uint8)
        text = write_text(load.cache_salt, load.traceparent or "", load.tenant)
        num_bytes = tokens.numel() + len(text)
        slot.data[: tokens.numel()].copy_(tokens)
        slot.data[tokens.numel() : num_bytes].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        header = Header(
            kind=Kind.PREFILL,
            epoch=self._epoch,
            step=transfer,
            rows=len(load.token_ids),
            num_bytes=num_bytes,
            first=load.first_token,
            spare=int(load.deadline_s * 1000),
        )
        sender.link.commit(slot, header.pack(), num_bytes)
        return True

    def _accept(self, link: Link, message: Message) -> None:
        header = unpack(message.header, link.peer)
        if header.epoch != link.peer_epoch:
            return  # a zombie's late message
        load = self._loads.get(TransferId(header.step))
        if load is None or load.sender.link is not link:
            return  # aborted meanwhile
        load.progress_s = self._clock()
        match header.kind:
            case Kind.KV:
                layout = self._cache.layout
                at = header.first - load.load.first_token
                expected = header.rows * layout.layer_token_bytes
                if not (at >= 0 and at + header.rows <= load.load.num_tokens and header.layer in layout.kv_layers):
                    raise CorruptMessage(link.peer, f"KV of tokens {header.first}+{header.rows}, layer {header.layer}")
                if message.data.numel() != expected:
                    raise CorruptMessage(link.peer, f"{message.data.numel()} bytes of KV where {expected} belong")
                self._cache.load(header.layer, load.slots[at : at + header.rows], message.data)
                arrived = load.arrived[header.layer, at : at + header.rows]
                load.num_missing -= header.rows - int(arrived.count_nonzero())
                arrived.fill_(True)
            case Kind.STATE:
                self._take_state(link, header, load, message)
            case Kind.KV_DONE:
                self._end(TransferId(header.step))
                if load.num_missing == load.num_missing_bytes == 0:
                    self._loaded.append(load.load.request_id)
                else:
                    self._failed.append(
                        (
                            load.load.request_id,
                            f"{load.num_missing} rows of KV and {load.num_missing_bytes} bytes of state did not arrive",
                        )
                    )
            case Kind.KV_FAILED:
                self._end(TransferId(header.step))
                self._failed.append((load.load.request_id, bytes(message.data.numpy()).decode(errors="replace")))
            case _:
                raise CorruptMessage(link.peer, f"unexpected {header.kind.name}")

    def _take_state(self, link: Link, header: Header, load: _Load, message: Message) -> None:
        layout, slot = self._cache.layout, load.load.state_slot
        end = header.first + message.data.numel()
        if slot is None or header.layer not in layout.state_layers or header.ubatch >= len(layout.states):
            raise CorruptMessage(link.peer, f"a state of layer {header.layer}, plane {header.ubatch}, which has none")
        if header.num_bytes != message.data.numel() or end > layout.states[header.ubatch].num_bytes:
            raise CorruptMessage(link.peer, f"bytes {header.first} to {end} of a state of layer {header.layer}")
        begun = load.state_bytes.get((header.layer, header.ubatch), 0)
        if header.first > begun:
            raise CorruptMessage(link.peer, f"bytes {begun} to {header.first} of a state of layer {header.layer} did not come")
        self._cache.load_state(header.layer, header.ubatch, slot, header.first, message.data)
        load.state_bytes[header.layer, header.ubatch] = max(begun, end)
        load.num_missing_bytes -= max(0, end - begun)

    def _end(self, transfer: TransferId) -> None:
        load = self._loads.pop(transfer)
        self._by_request.pop(load.load.request_id, None)

    def _drop(self, link: Link, error: AntiphonError) -> None:
        linked = self._senders.get(link.peer)
        if linked is not None and linked.link is link:
            del self._senders[link.peer]
        self.waiting.remove(link)
        link.close()
        for transfer, load in tuple(self._loads.items()):
            if load.sender.link is link:
                self._end(transfer)
                self._failed.append((load.load.request_id, str(error)))
