"""A link that misbehaves on purpose: messages come late, the peer is lost at a chosen moment (test double, any speed).

Delays come from a seed and never reorder: the seam promises order. Must not know: which transport it wraps.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from antiphon.core.errors import PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.ready import THERE, Ready
from antiphon.transport.base import Link, Message, Slot
from antiphon.transport.waiting import wait_on


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong with what arrives at one end."""

    seed: int = 0
    min_delay_s: float = 0.0
    max_delay_s: float = 0.0
    lose_peer_after: int | None = None  # messages handed out before the peer is lost; None: never


class FaultyLink(Link):
    """``inner`` with ``faults`` on its receiving side; wrap both ends for both directions."""

    def __init__(self, inner: Link, faults: Faults, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds; a test's own makes delays exact."""
        self._inner = inner
        self._faults = faults
        self._clock = clock
        self._random = random.Random(faults.seed)
        self._held: deque[tuple[float, Message]] = deque()  # (when it may be handed out, message), in order
        self._num_handed_out = 0
        self._lost = False

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._inner.peer

    @property
    def peer_epoch(self) -> Epoch:
        """The other end's epoch."""
        return self._inner.peer_epoch

    @property
    def spin_s(self) -> float:
        """Until the held message is due: nothing rings for it."""
        return max(0.0, self._held[0][0] - self._clock()) if self._held else self._inner.spin_s

    @property
    def num_free_slots(self) -> int:
        """As the inner link."""
        return self._inner.num_free_slots

    def acquire(self) -> Slot | None:
        """As the inner link, unless the peer is lost by plan."""
        self._check()
        return self._inner.acquire()

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int, ready: Ready = THERE) -> None:
        """As the inner link, unless the peer is lost by plan."""
        self._check()
        self._inner.commit(slot, header, num_bytes, ready)

    def poll(self) -> Message | None:
        """The next message that is due."""
        self._check()
        self._collect()
        if not self._held or self._held[0][0] > self._clock():
            return None
        self._num_handed_out += 1
        return self._held.popleft()[1]

    def release(self, message: Message) -> None:
        """As the inner link."""
        self._inner.release(message)

    def wait(self, timeout_s: float) -> bool:
        """Wait until a message is due. Raises PeerLost."""
        self._check()
        found = wait_on((self,), timeout_s)
        self._check()
        if found and not self._held:
            self._collect()
        return found

    def close(self) -> None:
        """As the inner link."""
        self._inner.close()

    def pending(self) -> bool:
        """True when the head of what is held is due, or there is something new to hold."""
        if self._held:
            return self._held[0][0] <= self._clock()
        return self._inner.pending()

    def park(self) -> Sequence[int]:
        """As the inner link."""
        return self._inner.park()

    def unpark(self, *, woken: bool) -> None:
        """As the inner link."""
        self._inner.unpark(woken=woken)

    def _collect(self) -> None:
        while True:
            try:
                message = self._inner.poll()
            except PeerLost:
                if not self._held:
                    raise
                return
            if message is None:
                return
            earliest = self._held[-1][0] if self._held else 0.0
            delay_s = self._random.uniform(self._faults.min_delay_s, self._faults.max_delay_s)
            self._held.append((max(earliest, self._clock() + delay_s), message))

    def _check(self) -> None:
        after = self._faults.lose_peer_after
        if after is not None and self._num_handed_out >= after and not self._lost:
            self._lost = True
            self._inner.close()
        if self._lost:
            raise PeerLost(self.peer, "lost by plan")
