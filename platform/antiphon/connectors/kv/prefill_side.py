"""The prefill worker's end of KV hand-offs (hot); connectors.kv draws them.

Must not know: who schedules.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from antiphon.connectors.headers import Header, Kind, unpack
from antiphon.connectors.kv.handoff import NOTHING_HAPPENED, TOKENS_PER_MESSAGE, Sender, read_text
from antiphon.core.errors import AntiphonError, CorruptMessage, PeerLost, kept
from antiphon.core.ids import Epoch
from antiphon.core.kv import KVTarget, TransferId
from antiphon.core.request import Request, RequestId, SamplingParams
from antiphon.core.step import KVEvents
from antiphon.models.attention.kv_cache import KVCache
from antiphon.transport.base import Link, Listener, Message, Slot
from antiphon.transport.waiting import WaitSet

_MAX_OWED = 1 << 14  # of one peer: requests that are under way, and refusals that it has not taken
_MAX_LEASE_S = 3600.0  # for which blocks are kept for a peer that takes nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """KV of some tokens in one layer, still to go out."""

    layer: int
    first_token: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _StatePiece:
    """A plane of one layer's state from ``first_byte`` on, still to go out."""

    layer: int
    plane: int
    slot: int
    first_byte: int = 0


@dataclass(slots=True, kw_only=True)
class _Transfer:
    """A transfer that the prefill side works on."""

    request_id: RequestId
    transfer_id: TransferId
    pieces: deque[_Piece | _StatePiece] = field(default_factory=deque)
    computed: bool = False  # all pieces are in the queue


@dataclass(slots=True, kw_only=True)
class _Peer:
    """A decode worker that is linked."""

    link: Link
    sender: Sender
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
        self._peers[self._next_peer] = _Peer(link=link, sender=Sender(link))
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

    def offer_state(self, request_id: RequestId, slot: int) -> None:
        """The state behind the last token asked for is in ``slot``, where it stays until the hand-off is over."""
        transfer = self._transfer(request_id)
        if transfer is not None:
            layout = self._cache.layout
            for layer in layout.state_layers:
                transfer.pieces.extend(_StatePiece(layer=layer, plane=plane, slot=slot) for plane in range(len(layout.states)))

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
            except Exception as error:  # noqa: BLE001 - whatever one peer's bytes do, the others are served
                self._drop(number, CorruptMessage(peer.link.peer, f"{type(error).__name__}: {error}"))
        self.pump()
        if not (self._arrived or self._sent or self._aborted):
            return NOTHING_HAPPENED
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
                piece = transfer.pieces.popleft()
                if isinstance(piece, _Piece):
                    self._send(link, slot, transfer.transfer_id, piece)
                elif (rest := self._send_state(link, slot, transfer.transfer_id, piece)) is not None:
                    transfer.pieces.appendleft(rest)
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

    def _send_state(self, link: Link, slot: Slot, transfer_id: TransferId, piece: _StatePiece) -> _StatePiece | None:
        """Send as much as a slot holds; what is left."""
        num_bytes = self._cache.export_state(piece.layer, piece.plane, piece.slot, piece.first_byte, slot.data)
        header = Header(
            kind=Kind.STATE,
            epoch=self._epoch,
            step=transfer_id,
            layer=piece.layer,
            ubatch=piece.plane,
            num_bytes=num_bytes,
            first=piece.first_byte,
        )
        link.commit(slot, header.pack(), num_bytes)
        end = piece.first_byte + num_bytes
        return replace(piece, first_byte=end) if end < self._cache.layout.states[piece.plane].num_bytes else None

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
        text = bytes(message.data[num_token_bytes:].numpy()).decode(errors="replace")
        salt, traceparent, tenant = read_text(text)
        request_id = RequestId(f"{peer.link.peer}#{peer.link.peer_epoch}#{transfer_id}")
        if transfer_id in peer.transfers:
            raise CorruptMessage(peer.link.peer, f"transfer {transfer_id} is asked for twice")
        if len(peer.transfers) + len(peer.failures) >= _MAX_OWED:
            raise CorruptMessage(peer.link.peer, f"it asks on and takes nothing of what it asked {_MAX_OWED} times")
        now_s = self._clock()
        self._arrived.append(
            Request(
                request_id=request_id,
                prompt_token_ids=tokens,
                sampling=SamplingParams(max_tokens=1),
                arrival_s=now_s,
                deadline_s=now_s + min(2 * header.spare / 1000, _MAX_LEASE_S),
                traceparent=traceparent or None,
                cache_salt=salt,
                tenant=tenant,
            )
        )
        self._targets[request_id] = KVTarget(
            peer=number, transfer_id=transfer_id, first_token=header.first, num_tokens=header.rows - header.first
        )
        self._of_request[request_id] = (number, transfer_id)
        peer.transfers[transfer_id] = _Transfer(request_id=request_id, transfer_id=transfer_id)

    def _drop(self, number: int, error: AntiphonError) -> None:
        peer = self._peers.pop(number)
        self.refusals.append(kept(error))
        self.waiting.remove(peer.link)
        peer.link.close()
        for transfer in peer.transfers.values():
            self._of_request.pop(transfer.request_id, None)
            self._aborted.append(transfer.request_id)
