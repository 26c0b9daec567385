"""Sleeping on several links and listeners at once: spin while that pays, then park, then poll(2) (step).

    pending? ──no──► spin ──no──► park all ──► pending? ──no──► poll(2)
       └─yes─► True    └─yes─► True              └─yes─► True        └─► woken, or time up

Parking comes before the second look, so that whatever arrives in between either is seen or rings: no wake-up is lost.
Must not know: any one transport.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Iterable

from antiphon.transport.base import Waitable
from antiphon.transport.shm.control_channel import ControlChannel, spin

_MIN_POLL_S = 1e-3  # poll(2) counts in milliseconds
_SLICE_S = 20e-6  # of native spinning between two looks at links that can only be asked
_BELL_SLICE_S = 200e-6  # and at what usually rings


_SHARED_SPIN_S = 20e-6
_longest_spin_s = math.inf


def give_way() -> None:
    """Have links opened from now on hardly spin: the peers of this process need its processors while it waits."""
    global _longest_spin_s
    _longest_spin_s = _SHARED_SPIN_S


def bounded(spin_s: float) -> float:
    """Seconds to spin at most, of ``spin_s`` that would pay on processors of one's own."""
    return min(spin_s, _longest_spin_s)


def let_others_run() -> None:
    """Give the GIL to whoever wants it and return at once; time.sleep(0) takes 50 us on Linux (timer slack)."""
    select.select((), (), (), 0)


class WaitSet:
    """The links and listeners one worker loop sleeps on. Belongs to that loop, as the links do."""

    def __init__(self, members: Iterable[Waitable] = ()) -> None:
        self._members: tuple[Waitable, ...] = tuple(members)

    @property
    def members(self) -> tuple[Waitable, ...]:
        """What is waited on."""
        return self._members

    def add(self, member: Waitable) -> None:
        """Wait on ``member`` too."""
        self._members = (*self._members, member)

    def remove(self, member: Waitable) -> None:
        """Wait on ``member`` no longer; no error if it is not here."""
        self._members = tuple(m for m in self._members if m is not member)

    def wait(self, timeout_s: float) -> bool:
        """Wait until a member may have something to say (True) or the time is up (False); raises nothing of theirs."""
        return wait_on(self._members, timeout_s)


def wait_on(members: tuple[Waitable, ...], timeout_s: float) -> bool:
    """Spin while that pays, then sleep, until a member is pending (True) or ``timeout_s`` is over (False)."""
    deadline = time.monotonic() + timeout_s
    if any_pending(members):
        return True
    window = max((m.spin_s for m in members), default=0.0)
    if window > 0 and _spin(members, min(window, timeout_s)):
        return True
    return window < timeout_s and sleep_on(members, deadline)


def any_pending(members: Iterable[Waitable]) -> bool:
    """True when one of ``members`` has something to say now."""
    return any(m.pending() for m in members)


def _spin(members: tuple[Waitable, ...], window_s: float) -> bool:
    """Spin on all native channels at once, and ask the others in between: often those that want spinning, now and then the rest."""
    channels: tuple[ControlChannel, ...] = ()
    asked: tuple[Waitable, ...] = ()
    slice_s = _BELL_SLICE_S
    for member in members:
        channel: ControlChannel | None = getattr(member, "spin_channel", None)  # only links over shared memory have one
        if channel is not None:
            channels = (*channels, channel)
            continue
        asked = (*asked, member)
        if member.spin_s > 0:
            slice_s = _SLICE_S
    if not asked:
        return spin(channels, window_s)
    end = time.monotonic() + window_s
    while (left := end - time.monotonic()) > 0:
        if any_pending(asked) or (channels and spin(channels, min(slice_s, left))):
            return True
        if not channels:
            let_others_run()
    return False


def sleep_on(members: tuple[Waitable, ...], deadline: float) -> bool:
    """Sleep until a member is pending (True) or ``deadline`` (time.monotonic) has come (False)."""
    while not _sleep_once(members, deadline):  # a wakeup also rings for what is no news, such as a slot nobody lacked
        if time.monotonic() >= deadline:
            return False
    return True


def _sleep_once(members: tuple[Waitable, ...], deadline: float) -> bool:
    woken = False
    parked: list[Waitable] = []
    poller = select.poll()
    try:
        for member in members:
            parked.append(member)
            for fd in member.park():
                poller.register(fd, select.POLLIN)
        woken = any_pending(members) or _doze(members, poller, deadline)
    finally:
        for member in parked:
            member.unpark(woken=woken)
    return woken and any_pending(members)


def _doze(members: tuple[Waitable, ...], poller: select.poll, deadline: float) -> bool:
    """poll(2) in one go, or in naps where a member has to be asked now and then."""
    while (left := deadline - time.monotonic()) > 0:
        nap = min((n for m in members if (n := getattr(m, "nap_s", None)) is not None), default=left)
        if nap < min(left, _MIN_POLL_S):
            time.sleep(nap)
        elif poller.poll(int(min(nap, left) * 1e3 + 0.999)):  # rounded up: waking early would mean spinning again
            return True
        if nap < left and any_pending(members):
            return True
    return False
