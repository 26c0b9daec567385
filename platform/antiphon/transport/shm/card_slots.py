"""What orders two processes' use of slots in a card's memory: the host, or flags that cards write and wait for (hot).

By the host: it waits until its card is done, then tells the other end. By flags: it tells the other end at once, cards keep the
order among themselves, and both hosts run ahead of them. Every slot of a direction has two words for that, sequence numbers of its
uses:

    EMPTY ── the sender's card has written the slot, then ``filled`` = n ──► FILLED n
    FILLED n ── the receiver's card has read it, then ``consumed`` = n ──► EMPTY, for use n + 1
    either ── the host lost the other end: every word that its card may wait for = n + 2^62 ──► POISONED

A card waits for ``filled`` ≥ n before it reads and for ``consumed`` ≥ n - 1 before it writes, by a comparison that wraps around. A
poisoned word ends every wait at once, on rubbish: whoever computed with it asks ``lost`` when the card is done, and computes again.
Both ends count uses alike, because messages of a link are neither lost nor repeated; a link that opens again has words of its own.

Must not know: what slots hold, when a peer is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from antiphon.core.errors import InternalError
from antiphon.device.flags import WRAP, Flags
from antiphon.device.ready import DEADLINE_S
from antiphon.device.shared import SharedRegion

_FAR = 1 << 62  # ahead of any sequence number that is waited for


class CardSlots(Protocol):
    """One end's slots of a link, in both directions; numbers are the slots'."""

    region: SharedRegion

    def before_writing(self, slot: int) -> None:
        """A slot was taken to write into."""
        ...

    def written(self, slot: int) -> None:
        """It is written; the other end is told next."""
        ...

    def before_reading(self, slot: int) -> None:
        """The other end has told of a message."""
        ...

    def read(self, slot: int) -> None:
        """It is read; the slot is given back next."""
        ...

    def poison(self) -> None:
        """The other end is lost, or this one closes: nothing of this card waits any longer. Idempotent."""
        ...


class HostOrdered(CardSlots):
    """The host waits for its card."""

    def __init__(self, region: SharedRegion) -> None:
        """``region``: where the slots lie."""
        self.region = region

    def before_writing(self, slot: int) -> None:
        """The other end's card was done when it gave the slot back."""

    def written(self, slot: int) -> None:
        """Wait. Raises InternalError: the card is not done within ``ready.DEADLINE_S``."""
        if not self.region.settled().wait(DEADLINE_S):
            raise InternalError(f"the card was not done with a message within {DEADLINE_S:g} s")

    def before_reading(self, slot: int) -> None:
        """The other end's card was done when it told."""

    def read(self, slot: int) -> None:
        """Wait; a slot whose reading does not end is never written again."""
        self.written(slot)

    def poison(self) -> None:
        """No card waits."""


class FlagOrdered(CardSlots):
    """Cards wait for each other's flags."""

    def __init__(
        self, region: SharedRegion, flags: Flags, num_slots: int, *, connecting: bool, is_gone: Callable[[], bool], first: int = 0
    ) -> None:
        """``is_gone``: whether the other end is; ``first``: what the words hold to begin with."""
        self.region = region
        self.is_poisoned = False
        self._flags = flags
        self._num_slots = num_slots
        self._is_gone = is_gone
        mine, theirs = (0, 2 * num_slots) if connecting else (2 * num_slots, 0)
        self._filled_out, self._consumed_out = mine, mine + num_slots
        self._filled_in, self._consumed_in = theirs, theirs + num_slots
        self._sent, self._received = [first] * num_slots, [first] * num_slots

    def before_writing(self, slot: int) -> None:
        """What was there last is read first."""
        self._wait(self._consumed_out + slot, self._sent[slot])

    def written(self, slot: int) -> None:
        """Say so behind the writing."""
        self._sent[slot] = sequence = (self._sent[slot] + 1) % WRAP
        self._flags.write(self._filled_out + slot, sequence)

    def before_reading(self, slot: int) -> None:
        """It is there first."""
        self._received[slot] = sequence = (self._received[slot] + 1) % WRAP
        self._wait(self._filled_in + slot, sequence)

    def read(self, slot: int) -> None:
        """Say so behind the reading."""
        self._flags.write(self._consumed_in + slot, self._received[slot])

    def lost(self) -> bool:
        """Whether waits have been, or have to be, ended because the other end is gone; ends them."""
        if not self.is_poisoned and not self._is_gone():
            return False
        self.poison()  # also again: what the other end asked its card for may still be written over it
        return True

    def poison(self) -> None:
        """See ``CardSlots``; safe from any thread."""
        self.is_poisoned = True
        for slot in range(self._num_slots):
            self._flags.write_now(self._consumed_out + slot, (self._sent[slot] + _FAR) % WRAP)
            self._flags.write_now(self._filled_in + slot, (self._received[slot] + _FAR) % WRAP)

    def _wait(self, word: int, sequence: int) -> None:
        if not self._flags.wait(word, sequence, self._is_gone):
            self.poison()
