"""Links over gRPC bidirectional streams: the portable fallback, anywhere two processes reach each other (hot).

    data     ┌ kind ┬ slot ┬ seq ┬ num_bytes ┐ header ┬ payload
             └──u16─┴─u16──┴─u32─┴────u64────┘ 64 B   ┴ num_bytes
    credit   the same 16 bytes alone: the receiver gives ``slot`` back

A slot stays taken until its credit arrives, so at most num_slots messages are under way in each direction. A received payload is
the very bytes object gRPC made, seen as a tensor: never write into it. Two threads an end per link, both blocked when idle.
Must not know: gRPC itself, which lives behind ``antiphon.rpc.raw_stream``.
"""

from __future__ import annotations

import functools
import struct
import time
import warnings
from collections import deque
from collections.abc import Sequence

import torch

from antiphon.core.errors import AntiphonError, CorruptMessage, PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.rpc.raw_stream import RawServer, RawStream, open_stream
from antiphon.transport.address import join_host, split_host
from antiphon.transport.base import HEADER_BYTES, Answer, Hello, Link, Listener, Message, Slot, Transport
from antiphon.transport.bell import Bell
from antiphon.transport.hello import Greeting, check_layouts, decode_greeting, encode_greeting, encode_refusal
from antiphon.transport.reception import Reception
from antiphon.transport.slots import byte_rows, slots_of
from antiphon.transport.waiting import wait_on

SCHEME = "grpc://"
_PREFIX = struct.Struct("<HHIQ")  # kind, slot, sequence number, payload bytes
_DATA, _CREDIT = 1, 2
_PAYLOAD_AT = _PREFIX.size + HEADER_BYTES  # 80: payloads stay 16-byte aligned behind a bytes object's own header
_MAX_FRAME_BYTES = 1 << 30  # what a listener takes before it knows the peer's layout
_GREETING_S = 5.0  # a peer that connects and says nothing is dropped after this
_SEQ_MASK = 0xFFFFFFFF

with warnings.catch_warnings():
    # torch warns once per process about tensors over read-only bytes; ours are read-only by contract.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class GrpcLink(Link):
    """One end; see the seam for the rules. ``_take`` runs in the stream's reader thread, all else in the worker loop's."""

    spin_s = 0.0

    def __init__(self, stream: RawStream, mine: Hello, theirs: Hello) -> None:
        """The hellos have been exchanged and fit."""
        layout = mine.layout
        self._stream = stream
        self._theirs = theirs
        self._num_slots = layout.num_slots
        self._recv_slot_bytes = layout.recv_slot_bytes
        memory = bytearray(layout.num_slots * layout.send_slot_bytes)
        whole = memoryview(memory)
        self._rows = [whole[i * layout.send_slot_bytes : (i + 1) * layout.send_slot_bytes] for i in range(layout.num_slots)]
        self._slots = slots_of(byte_rows(memory, layout.num_slots))
        self._free = list(range(layout.num_slots - 1, -1, -1))
        self._in_flight = [False] * layout.num_slots
        self._held = [False] * layout.num_slots
        self._messages = [
            Message(slot=i, header=memoryview(b""), data=torch.empty(0, dtype=torch.uint8)) for i in range(layout.num_slots)
        ]
        self._send_seq = self._recv_seq = 0
        self._arrived: deque[bytes] = deque()  # appended to by the reader thread, as are the credits
        self._credits: deque[bytes] = deque()
        self._gone = False  # set by the reader thread; what arrived before is still handed out
        self._lost: str | None = None
        self._starved = self._parked = False
        self._bell = Bell()
        stream.attach(self._take)

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._theirs.worker_id

    @property
    def peer_epoch(self) -> Epoch:
        """The other end's epoch."""
        return self._theirs.epoch

    def acquire(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost, CorruptMessage."""
        if self._gone or self._lost is not None:
            self._raise_lost()
        while self._credits:
            self._take_credit(self._credits.popleft())
        if self._free:
            self._starved = False
            return self._slots[self._free.pop()]
        self._starved = True
        return None

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int) -> None:
        """Queue the message; its bytes are copied here. Raises PeerLost."""
        if self._gone or self._lost is not None:
            self._raise_lost()
        if len(header) != HEADER_BYTES:
            raise ValueError(f"a header has {HEADER_BYTES} bytes")
        index = slot.index
        self._in_flight[index] = True
        prefix = _PREFIX.pack(_DATA, index, self._send_seq, num_bytes)
        self._send_seq = (self._send_seq + 1) & _SEQ_MASK
        self._stream.send(b"".join((prefix, header, self._rows[index][:num_bytes])))

    def poll(self) -> Message | None:
        """The next message, or None. Raises PeerLost, CorruptMessage."""
        if self._lost is not None:
            self._raise_lost()
        if self._arrived:
            return self._open(self._arrived.popleft())
        if self._gone:
            self._raise_lost()
        return None

    def release(self, message: Message) -> None:
        """Send the slot's credit."""
        slot = message.slot
        self._held[slot] = False
        if self._lost is None:
            self._stream.send(_PREFIX.pack(_CREDIT, slot, 0, 0))

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a message may be there. Raises PeerLost."""
        if self._lost is None and wait_on((self,), timeout_s):
            if self._gone and not self._arrived:
                self._raise_lost()
            return True
        if self._lost is not None:
            self._raise_lost()
        return False

    def close(self) -> None:
        """Send what is queued, end the stream, join its threads."""
        if self._lost is None:
            self._lost = "closed here"
        self._stream.close()
        self._bell.close()

    def pending(self) -> bool:
        """True when a message, a loss or the slot that was lacking is there."""
        return bool(self._arrived or self._gone or self._lost or (self._starved and self._credits))

    def park(self) -> Sequence[int]:
        """Ask the reader thread to ring."""
        self._parked = True
        return (self._bell.fd,) if self._bell.fd >= 0 else ()

    def unpark(self, *, woken: bool) -> None:
        """Ask no longer."""
        self._parked = False
        if woken:
            self._bell.clear()

    def _take(self, frame: bytes | None) -> None:
        if frame is None:
            self._gone = True
        elif len(frame) >= 2 and frame[0] == _CREDIT and len(self._credits) < self._num_slots:
            self._credits.append(frame)
        elif len(self._arrived) <= self._num_slots:  # one more than allowed is kept, to be found and told
            self._arrived.append(frame)
        if self._parked:
            self._bell.ring()

    def _open(self, frame: bytes) -> Message:
        slot: int
        if len(frame) < _PAYLOAD_AT:
            self._corrupt(f"a frame of {len(frame)} bytes")
        kind, slot, seq, num_bytes = _PREFIX.unpack_from(frame)
        if kind != _DATA or slot >= self._num_slots or seq != self._recv_seq:
            self._corrupt(f"kind {kind}, slot {slot}, sequence number {seq} instead of {self._recv_seq}")
        if num_bytes != len(frame) - _PAYLOAD_AT or num_bytes > self._recv_slot_bytes:
            self._corrupt(f"{len(frame) - _PAYLOAD_AT} bytes, {num_bytes} announced, {self._recv_slot_bytes} allowed")
        if self._held[slot]:
            self._corrupt(f"slot {slot} sent again before its release")
        self._held[slot] = True
        self._recv_seq = (seq + 1) & _SEQ_MASK
        message = self._messages[slot]
        message.header = memoryview(frame)[_PREFIX.size : _PAYLOAD_AT]
        message.data = (
            torch.frombuffer(frame, dtype=torch.uint8, offset=_PAYLOAD_AT) if num_bytes else torch.empty(0, dtype=torch.uint8)
        )
        return message

    def _take_credit(self, frame: bytes) -> None:
        slot = _PREFIX.unpack(frame)[1] if len(frame) == _PREFIX.size else self._num_slots
        if slot >= self._num_slots or not self._in_flight[slot]:
            self._corrupt(f"credit for slot {slot}, which is not in flight")
        self._in_flight[slot] = False
        self._free.append(slot)

    def _corrupt(self, why: str) -> None:
        self._lost = f"corrupt message: {why}"
        self._stream.end()
        raise CorruptMessage(self.peer, why)

    def _raise_lost(self) -> None:
        if self._lost is None:
            self._lost = self._stream.lost or "the stream ended"
        raise PeerLost(self.peer, self._lost)


class GrpcTransport(Transport):
    """Links between any two processes that reach each other over TCP."""

    name = "grpc"

    def listen(self, host: str, answer: Answer) -> Listener:
        """Accept links on ``host`` (any free port) or ``host:port``.

        After the listener's close the port stays bound until its last link closes. Raises Unavailable.
        """
        name, port = split_host(host)
        reception = Reception(answer)
        try:
            server = RawServer(join_host(name, port), functools.partial(_greet, reception), max_receive_bytes=_MAX_FRAME_BYTES)
        except Unavailable:
            reception.close()
            raise
        reception.open(SCHEME + join_host(name, server.port), stop=server.close)
        return reception

    def connect(self, address: str, hello: Hello, timeout_s: float) -> GrpcLink:
        """Open a link. Raises Unavailable, LayoutMismatch, PeerLost."""
        if not address.startswith(SCHEME):
            raise Unavailable(f"{address} is no {SCHEME} address")
        deadline = time.monotonic() + timeout_s
        stream = open_stream(
            address.removeprefix(SCHEME), max_receive_bytes=max(1 << 20, hello.layout.recv_slot_bytes + _PAYLOAD_AT)
        )
        try:
            stream.send(encode_greeting(Greeting(hello=hello)))
            theirs = decode_greeting(stream.receive(max(0.0, deadline - time.monotonic())), address).hello
            check_layouts(hello, theirs)
        except PeerLost as error:
            stream.close()
            raise Unavailable(f"no link to {address}: {error.why}") from error
        except AntiphonError:
            stream.close()
            raise
        return GrpcLink(stream, hello, theirs)


def _greet(reception: Reception, stream: RawStream) -> None:
    try:
        theirs = decode_greeting(stream.receive(_GREETING_S), stream.peer).hello
        mine = reception.answer(theirs)
        stream.send(encode_greeting(Greeting(hello=mine)))
        reception.check(mine, theirs)
    except AntiphonError as error:
        stream.send(encode_refusal(error))
        stream.end()
    else:
        reception.arrive(GrpcLink(stream, mine, theirs))
