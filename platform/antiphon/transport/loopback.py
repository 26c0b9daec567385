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
from antiphon.device.ready import THERE, Ready
from antiphon.transport.base import HEADER_BYTES, Answer, Hello, Link, Listener, Message, Slot, Transport, await_bytes
from antiphon.transport.connect.hello import check_layouts
from antiphon.transport.connect.listener import QueuedListener
from antiphon.transport.slots import MessageViews, slots_of
from antiphon.transport.waiting import wait_on
from antiphon.transport.wakeup import Wakeup

SCHEME = "loopback://"
_INLINE_SLEEP_S = 0.001  # between two calls of on_poll while waiting: the inline peer may be waiting for a third party


class _Direction:
    """One direction: slots of the sender, messages to the receiver. Deques are safe between two threads."""

    __slots__ = ("arrived", "free", "headers", "slots", "views")

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device | None) -> None:
        memory = torch.zeros(num_slots, slot_bytes, dtype=torch.uint8, device=device)
        headers = memoryview(bytearray(num_slots * HEADER_BYTES))
        self.slots = slots_of(memory)
        self.headers = [headers[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(num_slots)]
        self.views = MessageViews(memory, headers)
        self.free = deque(range(num_slots))
        self.arrived: deque[Message] = deque()


class LoopbackLink(Link):
    """One end; see the seam for the rules. ``on_poll`` may be set at any time by the owner of the worker loop."""

    spin_s = 0.0

    def __init__(self, mine: Hello, theirs: Hello, send: _Direction, recv: _Direction) -> None:
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
        self._wakeup: Wakeup | None = None

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
        """Slots not in flight."""
        return len(self._send.free)

    def acquire(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost."""
        if self._lost is not None or self._gone:
            self._raise_lost()
        if self._send.free:
            self._starved = False
            return self._send.slots[self._send.free.popleft()]
        self._starved = True
        return None

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int, ready: Ready = THERE) -> None:
        """Hand the slot's memory to the peer. Raises PeerLost."""
        await_bytes(ready, self.peer)
        if self._lost is not None or self._gone:
            self._raise_lost()
        direction = self._send
        direction.headers[slot.index][:] = header
        direction.arrived.append(direction.views.view(slot.index, num_bytes))
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
            if wait_on((self,), max(0.0, nap)):
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
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None:
            wakeup.close()

    def pending(self) -> bool:
        """True when a message, a loss or the slot that was lacking is there."""
        return bool(self._recv.arrived or self._gone or self._lost or (self._starved and self._send.free))

    def park(self) -> Sequence[int]:
        """Ask to be rung."""
        if self._lost is not None:
            return ()
        if self._wakeup is None:
            self._wakeup = Wakeup()
        self._parked = True
        return (self._wakeup.fd,)

    def unpark(self, *, woken: bool) -> None:
        """Ask no longer."""
        self._parked = False
        if woken and self._wakeup is not None:
            self._wakeup.clear()

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
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.ring()

    def _raise_lost(self) -> None:
        if self._lost is None:
            self._lost = "it closed the link"
        raise PeerLost(self.peer, self._lost)


def loopback_pair(hello_a: Hello, hello_b: Hello, device: torch.device | None = None) -> tuple[LoopbackLink, LoopbackLink]:
    """Both ends of a link, a's first; its slots lie on ``device``, where one stream orders what both ends do. None = host memory.

    Raises:
        LayoutMismatch: the layouts differ.
    """
    check_layouts(hello_a, hello_b)
    layout = hello_a.layout
    a_to_b = _Direction(layout.num_slots, layout.send_slot_bytes, device)
    b_to_a = _Direction(layout.num_slots, layout.recv_slot_bytes, device)
    a, b = LoopbackLink(hello_a, hello_b, a_to_b, b_to_a), LoopbackLink(hello_b, hello_a, b_to_a, a_to_b)
    a._other, b._other = b, a
    return a, b


class LoopbackTransport(Transport):
    """Links within one process, found by name within this object."""

    name = "loopback"

    def __init__(self) -> None:
        """No listener yet."""
        self._lock = threading.Lock()
        self._listeners: dict[str, QueuedListener] = {}

    def listen(self, host: str, answer: Answer) -> Listener:
        """Accept links on ``loopback://<host>``. Raises InvalidInput if the name is taken."""
        listener = QueuedListener(answer)
        with self._lock:
            if host in self._listeners:
                raise InvalidInput(f"{SCHEME}{host} is already listened on", "host")
            self._listeners[host] = listener
        listener.open(SCHEME + host, stop=lambda: self._forget(host))
        return listener

    def connect(self, address: str, hello: Hello, timeout_s: float) -> LoopbackLink:
        """Open a link at once; ``timeout_s`` is never needed. Raises Unavailable, LayoutMismatch."""
        with self._lock:
            listener = self._listeners.get(address.removeprefix(SCHEME))
        if listener is None or not address.startswith(SCHEME):
            raise Unavailable(f"nobody listens on {address}")
        try:
            theirs = listener.answer(hello)
        except AntiphonError as error:
            listener.refuse(error)
            raise
        try:
            check_layouts(theirs, hello)
        except LayoutMismatch as error:
            listener.refuse(error)  # this end raises its own, just below
        near, far = loopback_pair(hello, theirs)
        listener.arrive(far)
        return near

    def _forget(self, name: str) -> None:
        with self._lock:
            del self._listeners[name]
