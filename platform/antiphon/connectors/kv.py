"""The KV hand-off: a decode worker asks a prefill worker for the KV of a prompt and gets it layer by layer (hot).

One transfer:

    decode side   REQUESTED ──KV of some tokens, a layer──► ARRIVING ──all in and KV_DONE──► loaded
                      └──peer lost, KV_FAILED, or no progress for the lease──► failed (the engine recomputes)
    prefill side  ARRIVED ──scheduled──► COMPUTING, rows go out as layers are done ──all out──► sent (blocks may go)
                      └──peer lost, PREFILL_ABORT──► aborted

Both ends copy between their own cache and the link's slots, so an abort on either side frees blocks at once: whatever still
arrives for an unknown transfer is dropped. A prefix that the decode side has cached is neither computed for it nor sent.
Must not know: who schedules.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from antiphon.connectors.headers import Header, Kind, unpack
from antiphon.core.errors import AntiphonError, CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.kv import KVLayout, KVLoad, KVTarget, TransferId
from antiphon.core.request import Request, RequestId, SamplingParams
from antiphon.core.step import KVEvents
from antiphon.models.kv_cache import KVCache
from antiphon.transport.base import Link, Listener, Message, Slot
from antiphon.transport.waiting import WaitSet

CHANNEL = "kv"
NUM_SLOTS = 8
TOKENS_PER_MESSAGE = 128
_TEXT_BYTES = 4096  # room after the token ids for salt and trace context


def request_slot_bytes(max_model_len: int) -> int:
    """Slot size from decode to prefill: a prompt of the longest length and its texts."""
    return 4 * max_model_len + _TEXT_BYTES


def kv_slot_bytes(layout: KVLayout) -> int:
    """Slot size from prefill to decode."""
    return max(layout.layer_token_bytes * TOKENS_PER_MESSAGE, 4096)


def kv_fields(*, revision: str, model_fingerprint: str, layout: KVLayout) -> Sequence[tuple[str, str]]:
    """The facts that both ends of a KV link must agree on."""
    return (("revision", revision), ("model", model_fingerprint), ("kv", layout.fingerprint))


class _Sender:
    """Takes slots of one link. After ``take`` found none, the link counts as pending until a slot is taken; ``settle`` takes and
    keeps one when there is nothing left to send, so that the loop may sleep.
    """

    __slots__ = ("_kept", "_lacked", "link")

    def __init__(self, link: Link) -> None:
        self.link = link
        self._kept: Slot | None = None
        self._lacked = False

    def take(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost."""
        slot, self._kept = self._kept, None
        if slot is None:
            slot = self.link.acquire()
        self._lacked = slot is None
        return slot

    def settle(self) -> None:
        """Nothing is left to send. Raises PeerLost."""
        if self._lacked:
            self._kept = self.take()


@dataclass(slots=True, kw_only=True)
class _Load:
    """A transfer that the decode side waits for."""

    load: KVLoad
    sender: _Sender
    num_missing: int  # tokens x layers
    progress_s: float
    slots: torch.Tensor  # int64, of tokens from load.first_token on


class DecodeSide:
    """The decode worker's end. Only ``add_link`` may be called from other threads."""

    def __init__(self, *, epoch: Epoch, cache: KVCache, clock: Callable[[], float] = time.monotonic) -> None:
        self._epoch = epoch
        self._cache = cache
        self._clock = clock
        self._senders: dict[WorkerId, _Sender] = {}
        self._arrivals: deque[Link] = deque()
        self._loads: dict[TransferId, _Load] = {}
        self._by_request: dict[RequestId, TransferId] = {}
        self._next_transfer = 1
        self._loaded: list[RequestId] = []
        self._failed: list[tuple[RequestId, str]] = []
        self._aborts: deque[tuple[_Sender, TransferId]] = deque()
        self.waiting = WaitSet()

    def add_link(self, link: Link) -> None:
        """Offer an open link to a prefill worker; safe from any thread."""
        self._arrivals.append(link)

    def peers(self) -> set[tuple[WorkerId, Epoch]]:
        """Prefill workers linked now, links still to be taken up included; safe from any thread."""
        return {
            (link.peer, link.peer_epoch)
            for link in [*(sender.link for sender in tuple(self._senders.values())), *tuple(self._arrivals)]
        }

    @property
    def num_transfers(self) -> int:
        """Transfers under way."""
        return len(self._loads)

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
            num_missing=load.num_tokens * self._cache.layout.num_layers,
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
        if self._aborts:
            self._send_aborts()
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
        if self._loads:
            now_s = self._clock()
            for transfer, load in tuple(self._loads.items()):
                if now_s - load.progress_s > load.load.deadline_s:
                    self.abort(load.load.request_id)
                    self._loads.pop(transfer, None)
                    self._failed.append((load.load.request_id, f"no KV for {load.load.deadline_s:g} s"))
        if not self._loaded and not self._failed:
            return _NOTHING
        events = KVEvents(loaded=tuple(self._loaded), failed=tuple(self._failed))
        self._loaded, self._failed = [], []
        return events

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
            self._senders[link.peer] = _Sender(link)
            self.waiting.add(link)

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

    def _ask(self, sender: _Sender, transfer: TransferId, load: KVLoad) -> bool:
        slot = sender.take()
        if slot is None:
            return False
        tokens = torch.tensor(load.token_ids, dtype=torch.int32).view(torch.uint8)
        text = f"{load.cache_salt}\0{load.traceparent or ''}".encode()[:_TEXT_BYTES]
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
                if not (at >= 0 and at + header.rows <= load.load.num_tokens and header.layer < layout.num_layers):
                    raise CorruptMessage(link.peer, f"KV of tokens {header.first}+{header.rows}, layer {header.layer}")
                if message.data.numel() != expected:
                    raise CorruptMessage(link.peer, f"{message.data.numel()} bytes of KV where {expected} belong")
                self._cache.load(header.layer, load.slots[at : at + header.rows], message.data)
                load.num_missing -= header.rows
            case Kind.KV_DONE:
                self._end(TransferId(header.step))
                if load.num_missing == 0:
                    self._loaded.append(load.load.request_id)
                else:
                    self._failed.append((load.load.request_id, f"{load.num_missing} rows of KV did not arrive"))
            case Kind.KV_FAILED:
                self._end(TransferId(header.step))
                self._failed.append((load.load.request_id, bytes(message.data.numpy()).decode(errors="replace")))
            case _:
                raise CorruptMessage(link.peer, f"unexpected {header.kind.name}")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """KV of some tokens in one layer, still to go out."""

    layer: int
    first_token: int
    slots: torch.Tensor


@dataclass(slots=True, kw_only=True)
class _Transfer:
    """A transfer that the prefill side works on."""

    request_id: RequestId
    transfer_id: TransferId
    pieces: deque[_Piece] = field(default_factory=deque)
    computed: bool = False  # all pieces are in the queue


@dataclass(slots=True, kw_only=True)
class _Peer:
    """A decode worker that is linked."""

    link: Link
    sender: _Sender
    transfers: dict[TransferId, _Transfer] = field(default_factory=dict)
    failures: deque[tuple[TransferId, str]] = field(default_factory=deque)


class PrefillSide:
    """The prefill worker's end: takes requests, and sends KV from the worker's own cache as slots get free."""

    def __init__(self, *, epoch: Epoch, cache: KVCache, clock: Callable[[], float] = time.monotonic) -> None:
        self._epoch = epoch
        self._cache = cache
        self._clock = clock
        self._listeners: list[Listener] = []
        self._peers: dict[int, _Peer] = {}
        self._next_peer = 0
        self._of_request: dict[RequestId, tuple[int, TransferId]] = {}
        self._arrived: list[Request] = []
        self._targets: dict[RequestId, KVTarget] = {}
        self._sent: list[RequestId] = []
        self._aborted: list[RequestId] = []
        self.waiting = WaitSet()
        self.refusals: deque[AntiphonError] = deque(maxlen=64)

    def add_listener(self, listener: Listener) -> None:
        """Accept decode workers from ``listener`` from now on."""
        self._listeners.append(listener)
        self.waiting.add(listener)

    def add_link(self, link: Link) -> None:
        """Serve an open link."""
        self._peers[self._next_peer] = _Peer(link=link, sender=_Sender(link))
        self._next_peer += 1
        self.waiting.add(link)

    @property
    def num_peers(self) -> int:
        """Decode workers linked now."""
        return len(self._peers)

    @property
    def num_transfers(self) -> int:
        """Transfers under way."""
        return len(self._of_request)

    def offer(self, request_id: RequestId, layer: int, first_token: int, slots: torch.Tensor) -> None:
        """KV of tokens [first_token, first_token + len(slots)) of ``layer`` is in the cache and may go out."""
        transfer = self._transfer(request_id)
        if transfer is None:
            return
        for start in range(0, slots.numel(), TOKENS_PER_MESSAGE):
            part = slots[start : start + TOKENS_PER_MESSAGE]
            transfer.pieces.append(_Piece(layer=layer, first_token=first_token + start, slots=part))

    def finish(self, request_id: RequestId) -> None:
        """All KV of the request has been offered."""
        transfer = self._transfer(request_id)
        if transfer is not None:
            transfer.computed = True

    def forget(self, request_id: RequestId, why: str = "the prefill worker gave it up") -> None:
        """The engine ended the request; if it was not handed over, its asker is told to compute by itself."""
        key = self._of_request.pop(request_id, None)
        if key is None or key[0] not in self._peers:
            return
        peer = self._peers[key[0]]
        if peer.transfers.pop(key[1], None) is not None:
            peer.failures.append((key[1], why))

    def pump(self) -> None:
        """Send what can be sent now; never blocks."""
        for number, peer in tuple(self._peers.items()):
            try:
                self._pump_peer(peer)
            except PeerLost as error:
                self._drop(number, error)

    def poll(self) -> KVEvents:
        """Take in requests, send what can be sent; what happened since the last call."""
        for listener in self._listeners:
            while (link := listener.accept()) is not None:
                self.add_link(link)
        for number, peer in tuple(self._peers.items()):
            try:
                while (message := peer.link.poll()) is not None:
                    try:
                        self._accept(number, peer, message)
                    finally:
                        peer.link.release(message)
            except (PeerLost, CorruptMessage) as error:
                self._drop(number, error)
        self.pump()
        if not (self._arrived or self._sent or self._aborted):
            return _NOTHING
        events = KVEvents(
            arrived=tuple(self._arrived), targets=dict(self._targets), sent=tuple(self._sent), aborted=tuple(self._aborted)
        )
        self._arrived, self._targets, self._sent, self._aborted = [], {}, [], []
        return events

    def close(self) -> None:
        """Close listeners and links; idempotent."""
        for listener in self._listeners:
            listener.close()
        for peer in self._peers.values():
            peer.link.close()
        self._listeners.clear()
        self._peers.clear()

    def _transfer(self, request_id: RequestId) -> _Transfer | None:
        key = self._of_request.get(request_id)
        if key is None or key[0] not in self._peers:
            return None
        return self._peers[key[0]].transfers.get(key[1])

    def _pump_peer(self, peer: _Peer) -> None:
        link, sender = peer.link, peer.sender
        while peer.failures:
            slot = sender.take()
            if slot is None:
                return
            transfer_id, why = peer.failures.popleft()
            text = torch.frombuffer(bytearray(why.encode()[:1024]), dtype=torch.uint8)
            slot.data[: text.numel()].copy_(text)
            header = Header(kind=Kind.KV_FAILED, epoch=self._epoch, step=transfer_id, num_bytes=text.numel())
            link.commit(slot, header.pack(), text.numel())
        for transfer in tuple(peer.transfers.values()):
            while transfer.pieces:
                slot = sender.take()
                if slot is None:
                    return
                self._send(link, slot, transfer.transfer_id, transfer.pieces.popleft())
            if transfer.computed:
                slot = sender.take()
                if slot is None:
                    return
                link.commit(slot, Header(kind=Kind.KV_DONE, epoch=self._epoch, step=transfer.transfer_id).pack(), 0)
                del peer.transfers[transfer.transfer_id]
                del self._of_request[transfer.request_id]
                self._sent.append(transfer.request_id)
        sender.settle()

    def _send(self, link: Link, slot: Slot, transfer_id: TransferId, piece: _Piece) -> None:
        num_bytes = self._cache.export(piece.layer, piece.slots, slot.data)
        header = Header(
            kind=Kind.KV,
            epoch=self._epoch,
            step=transfer_id,
            layer=piece.layer,
            rows=piece.slots.numel(),
            num_bytes=num_bytes,
            first=piece.first_token,
        )
        link.commit(slot, header.pack(), num_bytes)

    def _accept(self, number: int, peer: _Peer, message: Message) -> None:
        header = unpack(message.header, peer.link.peer)
        if header.epoch != peer.link.peer_epoch:
            return
        transfer_id = TransferId(header.step)
        match header.kind:
            case Kind.PREFILL:
                self._take_request(number, peer, transfer_id, header, message)
            case Kind.PREFILL_ABORT:
                transfer = peer.transfers.pop(transfer_id, None)
                if transfer is not None:
                    self._of_request.pop(transfer.request_id, None)
                    self._aborted.append(transfer.request_id)
            case _:
                raise CorruptMessage(peer.link.peer, f"unexpected {header.kind.name}")

    def _take_request(self, number: int, peer: _Peer, transfer_id: TransferId, header: Header, message: Message) -> None:
        num_token_bytes = 4 * header.rows
        if header.num_bytes != message.data.numel() or num_token_bytes > header.num_bytes or header.first >= header.rows:
            raise CorruptMessage(peer.link.peer, f"a request of {header.rows} tokens in {message.data.numel()} bytes")
        tokens = tuple(message.data[:num_token_bytes].view(torch.int32).tolist())
        salt, _, traceparent = bytes(message.data[num_token_bytes:].numpy()).decode(errors="replace").partition("\0")
        request_id = RequestId(f"{peer.link.peer}#{peer.link.peer_epoch}#{transfer_id}")
        now_s = self._clock()
        self._arrived.append(
            Request(
                request_id=request_id,
                prompt_token_ids=tokens,
                sampling=SamplingParams(max_tokens=1),
                arrival_s=now_s,
                deadline_s=now_s + 2 * header.spare / 1000,
                traceparent=traceparent or None,
                cache_salt=salt,
            )
        )
        self._targets[request_id] = KVTarget(
            peer=number, transfer_id=transfer_id, first_token=header.first, num_tokens=header.rows - header.first
        )
        self._of_request[request_id] = (number, transfer_id)
        peer.transfers[transfer_id] = _Transfer(request_id=request_id, transfer_id=transfer_id)

    def _drop(self, number: int, error: AntiphonError) -> None:
        peer = self._peers.pop(number)
        self.refusals.append(error)
        self.waiting.remove(peer.link)
        peer.link.close()
        for transfer in peer.transfers.values():
            self._of_request.pop(transfer.request_id, None)
            self._aborted.append(transfer.request_id)


_NOTHING = KVEvents()
