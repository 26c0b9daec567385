"""The in-process reference transport: both ends share the slots, so that nothing is copied (hot).

A commit hands the very tensor memory to the receiver. ``on_poll`` lets the composition root run the in-process peer inline:
it is called before a link looks for messages, which is how a monolith's FFN half runs when its attention half polls.
The two ends may also live in two threads.

Must not know: what runs in ``on_poll``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from antiphon.core.errors import AntiphonError, InvalidInput, LayoutMismatch, PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.transport.base import HEADER_BYTES, Answer, Hello, Link, Listener, Message, Slot
from antiphon.transport.bell import Bell
from antiphon.transport.slots import MessageViews, slots_of
from antiphon.transport.waiting import WaitSet

SCHEME = "loopback://"
_INLINE_SLEEP_S = 0.001  # between two calls of on_poll while waiting: the inline peer may be waiting for a third party


class _Lane:
    """One direction: slots of the sender, messages to the receiver. Deques are safe between two threads."""

    __slots__ = ("arrived", "free", "headers", "slots", "views")

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        memory = torch.zeros(num_slots, slot_bytes, dtype=torch.uint8)
        headers = memoryview(bytearray(num_slots * HEADER_BYTES))
        self.slots = slots_of(memory)
        self.headers = [headers[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(num_slots)]
        self.views = MessageViews(memory, headers)
        self.free = deque(range(num_slots))
        self.arrived: deque[Message] = deque()


class LoopbackLink(Link):
    """One end; see the seam for the rules. ``on_poll`` may be set at any time by the owner of the worker loop."""

    spin_s = 0.0
    spin_address = 0

    def __init__(self, mine: Hello, theirs: Hello, send: _Lane, recv: _Lane) -> None:
        """``send`` and ``recv`` are the peer's ``recv`` and ``send``; ``loopback_pair`` makes both ends."""
        self.on_poll: Callable[[], None] | None = None
        self._mine = mine.worker_id
        self._theirs = theirs
        self._send = send
        self._recv = recv
        self._other: LoopbackLink | None = None
        self._in_poll = False
        self._starved = False
        self._parked = False
        self._lost: str | None = None  # why every further call raises
        self._gone = False  # the peer closed; what it sent before is still handed out
        self._bell: Bell | None = None

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._theirs.worker_id

    @property
    def peer_epoch(self) -> Epoch:
        """The other end's epoch."""
        return self._theirs.epoch

    def acquire(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost."""
        if self._lost is not None or self._gone:
            self._raise_lost()
        if self._send.free:
            self._starved = False
            return self._send.slots[self._send.free.popleft()]
        self._starved = True
        return None

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int) -> None:
        """Hand the slot's memory to the peer. Raises PeerLost."""
        if self._lost is not None or self._gone:
            self._raise_lost()
        lane = self._send
        lane.headers[slot.index][:] = header
        lane.arrived.append(lane.views.view(slot.index, num_bytes))
        self._wake_peer()

    def poll(self) -> Message | None:
        """Run ``on_poll``, then the next message or None. Raises PeerLost and whatever ``on_poll`` raises."""
        if self._lost is not None:
            self._raise_lost()
        self._pump()
        if self._recv.arrived:
            return self._recv.arrived.popleft()
        if self._gone or self._lost is not None:
            self._raise_lost()
        return None

    def release(self, message: Message) -> None:
        """Give the slot back to the sender."""
        self._recv.free.append(message.slot)
        other = self._other
        if other is not None and other._starved:
            self._wake_peer()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message, running ``on_poll`` meanwhile. Raises PeerLost."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self._lost is not None:
                self._raise_lost()
            self._pump()
            left = deadline - time.monotonic()
            nap = left if self.on_poll is None else min(left, _INLINE_SLEEP_S)
            if WaitSet((self,)).wait(max(0.0, nap)):
                if (self._gone or self._lost is not None) and not self._recv.arrived:
                    self._raise_lost()
                return True
            if left <= 0:
                return False

    def close(self) -> None:
        """Close; the peer sees PeerLost once it has read what was sent."""
        if self._lost is None:
            self._lost = "closed here"
        other, self._other = self._other, None
        if other is not None:
            other._gone = True
            other._ring()
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.close()

    def pending(self) -> bool:
        """True when a message, a loss or the slot that was lacking is there."""
        return bool(self._recv.arrived or self._gone or self._lost or (self._starved and self._send.free))

    def park(self) -> Sequence[int]:
        """Ask to be rung."""
        if self._lost is not None:
            return ()
        if self._bell is None:
            self._bell = Bell()
        self._parked = True
        return (self._bell.fd,)

    def unpark(self, *, woken: bool) -> None:
        """Ask no longer."""
        self._parked = False
        if woken and self._bell is not None:
            self._bell.clear()

    def _pump(self) -> None:
        # The peer's pump may poll its own end, whose on_poll may be this side's pump: one level is enough.
        if self.on_poll is not None and not self._in_poll:
            self._in_poll = True
            try:
                self.on_poll()
            finally:
                self._in_poll = False

    def _wake_peer(self) -> None:
        other = self._other
        if other is not None and other._parked:
            other._ring()

    def _ring(self) -> None:
        bell = self._bell
        if bell is not None:
            bell.ring()

    def _raise_lost(self) -> None:
        if self._lost is None:
            self._lost = "it closed the link"
        raise PeerLost(self.peer, self._lost)


def loopback_pair(hello_a: Hello, hello_b: Hello) -> tuple[LoopbackLink, LoopbackLink]:
    """Both ends of a link, a's first. Raises LayoutMismatch when the layouts differ."""
    if differences := hello_a.layout.differences(hello_b.layout):
        raise LayoutMismatch(hello_b.worker_id, differences)
    layout = hello_a.layout
    a_to_b = _Lane(layout.num_slots, layout.send_slot_bytes)
    b_to_a = _Lane(layout.num_slots, layout.recv_slot_bytes)
    a, b = LoopbackLink(hello_a, hello_b, a_to_b, b_to_a), LoopbackLink(hello_b, hello_a, b_to_a, a_to_b)
    a._other, b._other = b, a
    return a, b


class LoopbackListener(Listener):
    """Accepts links made by the same ``LoopbackTransport``."""

    spin_s = 0.0
    spin_address = 0

    def __init__(self, transport: LoopbackTransport, name: str, answer: Answer) -> None:
        """``LoopbackTransport.listen`` makes these."""
        self._transport = transport
        self._name = name
        self._answer = answer
        self._arrived: deque[LoopbackLink] = deque()
        self._refused: deque[AntiphonError] = deque(maxlen=64)
        self._error: Exception | None = None
        self._bell = Bell()

    @property
    def address(self) -> str:
        """``loopback://<name>``."""
        return SCHEME + self._name

    def accept(self) -> LoopbackLink | None:
        """The next link, or None."""
        self._bell.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._arrived.popleft() if self._arrived else None

    def refused(self) -> AntiphonError | None:
        """Why the next peer was turned away, or None."""
        return self._refused.popleft() if self._refused else None

    def close(self) -> None:
        """Stop accepting."""
        self._transport._forget(self._name, self)
        self._bell.close()

    def pending(self) -> bool:
        """True when a link or an error waits."""
        return bool(self._arrived or self._error)

    def park(self) -> Sequence[int]:
        """The listener's doorbell."""
        return () if self._bell.fd < 0 else (self._bell.fd,)

    def unpark(self, *, woken: bool) -> None:
        """Nothing was announced: arrivals ring always."""

    def _arrive(self, address: str, hello: Hello) -> LoopbackLink:
        try:
            mine = self._answer(hello)
        except AntiphonError as error:
            self._refused.append(error)
            raise
        except Exception as error:
            self._error = self._error or error
            self._bell.ring()
            raise Unavailable(f"{address} failed to answer") from error
        if differences := mine.layout.differences(hello.layout):
            self._refused.append(LayoutMismatch(hello.worker_id, differences))
            raise LayoutMismatch(mine.worker_id, hello.layout.differences(mine.layout))
        near, far = loopback_pair(hello, mine)
        self._arrived.append(far)
        self._bell.ring()
        return near


class LoopbackTransport:
    """Links within one process, found by name within this object."""

    name = "loopback"

    def __init__(self) -> None:
        """No listener yet."""
        self._lock = threading.Lock()
        self._listeners: dict[str, LoopbackListener] = {}

    def listen(self, host: str, answer: Answer) -> LoopbackListener:
        """Accept links on ``loopback://<host>``. Raises InvalidInput if the name is taken."""
        with self._lock:
            if host in self._listeners:
                raise InvalidInput(f"{SCHEME}{host} is already listened on", "host")
            listener = self._listeners[host] = LoopbackListener(self, host, answer)
        return listener

    def connect(self, address: str, hello: Hello, timeout_s: float) -> LoopbackLink:
        """Open a link at once; ``timeout_s`` is never needed. Raises Unavailable, LayoutMismatch."""
        with self._lock:
            listener = self._listeners.get(address.removeprefix(SCHEME))
        if listener is None or not address.startswith(SCHEME):
            raise Unavailable(f"nobody listens on {address}")
        return listener._arrive(address, hello)

    def _forget(self, name: str, listener: LoopbackListener) -> None:
        with self._lock:
            if self._listeners.get(name) is listener:
                del self._listeners[name]
