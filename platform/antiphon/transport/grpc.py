"""Links over gRPC bidirectional streams: the portable fallback, anywhere two processes reach each other (hot).

A frame is credits.py's, with the payload behind it. A slot stays taken until its credit arrives, so at most num_slots messages
are under way in each direction. A received payload is the very bytes object gRPC made, seen as a tensor: never write into it.
Two threads an end per link, both blocked when idle.
Must not know: gRPC itself, which lives behind ``antiphon.rpc.raw_stream``.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import torch

from antiphon.core.errors import AntiphonError, CorruptMessage, Overloaded, PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.ready import THERE, Ready
from antiphon.rpc.raw_stream import RawServer, RawStream, open_stream
from antiphon.transport.base import HEADER_BYTES, Answer, Hello, Link, Listener, Message, Slot, Transport, await_bytes
from antiphon.transport.connect.address import join_host, split_host
from antiphon.transport.connect.hello import Greeting, check_layouts, decode_greeting, encode_greeting, encode_refusal
from antiphon.transport.connect.listener import QueuedListener
from antiphon.transport.credits import FRAME_BYTES, PREFIX, Credits, DamageError, is_credit
from antiphon.transport.slots import byte_rows, slots_of
from antiphon.transport.waiting import wait_on
from antiphon.transport.wakeup import Wakeup

SCHEME = "grpc://"
logger = logging.getLogger(__name__)
_MAX_FRAME_BYTES = 1 << 30  # what a listener takes before it knows the peer's layout
_EMPTY = torch.empty(0, dtype=torch.uint8)
_GREETING_S = 5.0  # a peer that connects and says nothing is dropped after this
_MAX_GREETINGS = 64  # at once, of one listener; further peers are turned away, and come again

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
        self._slot_credits = Credits(layout.num_slots, layout.recv_slot_bytes)
        memory = bytearray(layout.num_slots * layout.send_slot_bytes)
        whole = memoryview(memory)
        self._rows = [whole[i * layout.send_slot_bytes : (i + 1) * layout.send_slot_bytes] for i in range(layout.num_slots)]
        self._slots = slots_of(byte_rows(memory, layout.num_slots))
        self._messages = [Message(slot=i, header=memoryview(b""), data=_EMPTY) for i in range(layout.num_slots)]
        self._arrived: deque[bytes] = deque()  # appended to by the reader thread, as are the credits
        self._credits: deque[bytes] = deque()
        self._gone = False  # set by the reader thread; what arrived before is still handed out
        self._lost: str | None = None
        self._starved = self._parked = False
        self._wakeup = Wakeup()
        stream.attach(self._take)

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._theirs.worker_id

    @property
    def peer_epoch(self) -> Epoch:
        """The other end's epoch."""
        return self._theirs.epoch

    @property
    def num_free_slots(self) -> int:
        """Slots not in flight, those whose credit is still to be looked at included."""
        return len(self._slot_credits.free) + len(self._credits)

    def acquire(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost, CorruptMessage."""
        if self._gone or self._lost is not None:
            self._raise_lost()
        free = self._slot_credits.free
        while self._credits:
            try:
                free.append(self._slot_credits.take_credit(self._credits.popleft()))
            except DamageError as error:
                self._corrupt(error)
        if free:
            self._starved = False
            return self._slots[free.pop()]
        self._starved = True
        return None

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int, ready: Ready = THERE) -> None:
        """Queue the message; its bytes are copied here. Raises PeerLost."""
        await_bytes(ready, self.peer)
        if self._gone or self._lost is not None:
            self._raise_lost()
        if len(header) != HEADER_BYTES:
            raise ValueError(f"a header has {HEADER_BYTES} bytes")
        index = slot.index
        prefix = self._slot_credits.send(index, num_bytes)
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
        credit = self._slot_credits.release(message.slot)
        if self._lost is None:
            self._stream.send(credit)

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
        self._wakeup.close()

    def pending(self) -> bool:
        """True when a message, a loss or the slot that was lacking is there."""
        return bool(self._arrived or self._gone or self._lost or (self._starved and self._credits))

    def park(self) -> Sequence[int]:
        """Ask the reader thread to ring."""
        self._parked = True
        return (self._wakeup.fd,) if self._wakeup.fd >= 0 else ()

    def unpark(self, *, woken: bool) -> None:
        """Ask no longer."""
        self._parked = False
        if woken:
            self._wakeup.clear()

    def _take(self, frame: bytes | None) -> None:
        if frame is None:
            self._gone = True
        elif is_credit(frame) and len(self._credits) < self._num_slots:
            self._credits.append(frame)
        elif len(self._arrived) <= self._num_slots:  # one more than allowed is kept, to be found and told
            self._arrived.append(frame)
        if self._parked:
            self._wakeup.ring()

    def _open(self, frame: bytes) -> Message:
        try:
            slot, num_bytes = self._slot_credits.receive(frame)
            if num_bytes != len(frame) - FRAME_BYTES:
                raise DamageError(f"{len(frame) - FRAME_BYTES} bytes came, {num_bytes} were announced")
        except DamageError as error:
            self._corrupt(error)
        message = self._messages[slot]
        message.header = memoryview(frame)[PREFIX.size : FRAME_BYTES]
        message.data = torch.frombuffer(frame, dtype=torch.uint8, offset=FRAME_BYTES) if num_bytes else _EMPTY
        return message

    def _corrupt(self, error: DamageError) -> NoReturn:
        self._lost = f"corrupt message: {error}"
        self._stream.end()
        raise CorruptMessage(self.peer, str(error)) from None

    def _raise_lost(self) -> NoReturn:
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
        listener = QueuedListener(answer)
        try:
            greet = functools.partial(_greet_some, listener, threading.Semaphore(_MAX_GREETINGS))
            server = RawServer(join_host(name, port), greet, max_receive_bytes=_MAX_FRAME_BYTES)
        except Unavailable:
            listener.close()
            raise
        listener.open(SCHEME + join_host(name, server.port), stop=server.close)
        return listener

    def connect(self, address: str, hello: Hello, timeout_s: float) -> GrpcLink:
        """Open a link. Raises Unavailable, LayoutMismatch, PeerLost."""
        if not address.startswith(SCHEME):
            raise Unavailable(f"{address} is no {SCHEME} address")
        deadline = time.monotonic() + timeout_s
        stream = open_stream(
            address.removeprefix(SCHEME), max_receive_bytes=max(1 << 20, hello.layout.recv_slot_bytes + FRAME_BYTES)
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


def _greet_some(listener: QueuedListener, room: threading.Semaphore, stream: RawStream) -> None:
    """So that silent peers do not have all the streams that a server takes."""
    if not room.acquire(blocking=False):
        error = Overloaded("too many peers are being greeted", retry_after_s=_GREETING_S)
        listener.refuse(error)
        stream.send(encode_refusal(error))
        stream.end()
        return
    try:
        _greet(listener, stream)
    finally:
        room.release()


def _greet(listener: QueuedListener, stream: RawStream) -> None:
    """Whatever a peer does before its link is open, it is turned away for it; nothing of it reaches the listener's owner."""
    try:
        theirs = decode_greeting(stream.receive(_GREETING_S), stream.peer).hello
        mine = listener.answer(theirs)
        stream.send(encode_greeting(Greeting(hello=mine)))
        check_layouts(mine, theirs)
        link = GrpcLink(stream, mine, theirs)
    except AntiphonError as error:
        listener.refuse(error)
        stream.send(encode_refusal(error))
        stream.end()
    except Exception as error:
        logger.warning("%s is turned away", stream.peer, exc_info=error)
        listener.refuse(Unavailable(f"no link with {stream.peer}: {type(error).__name__}: {error}"))
        stream.end()
    else:
        listener.arrive(link)
