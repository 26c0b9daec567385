"""The transport seam: links between two workers, made of slots (hot). Bytes only; connectors give them a meaning.

A ``Link`` joins this worker to one peer and carries messages both ways, in order, at most once. The sender acquires a
slot, computes into it in place, and commits it with a header; the receiver polls and gets a view that is valid until
it releases it. Slots are allocated once, when the link opens:

    sender:    acquire() -> Slot -> (write into slot.data) -> commit(slot, header, num_bytes)
    receiver:  poll() -> Message -> (read message.data) -> release(message)

After warm-up nothing here allocates tensors or blocks: ``acquire`` returns None while every slot is in flight and
``poll`` returns None while nothing has arrived; waiting (with its deadline) is ``wait``'s work. Slots may be committed and
messages released in any order; messages arrive in the order of their commits. Any call raises PeerLost once the peer is
gone (``poll`` first hands out what had arrived whole), and every later call raises it again, as does any call after this
end's own ``close``; ``release`` never raises. A link on which a CorruptMessage was found is closed: it raises PeerLost from
then on. Not thread-safe: a link belongs to one worker loop. Received data is read-only by contract. Slots, messages and
their tensors are the link's own objects, used again after commit and release: keep none of them.

A worker with several peers sleeps on all of them at once through ``waiting.WaitSet``, which needs ``Waitable``.

Life of a link:  OPENING ── hello both ways, fingerprints equal ──► OPEN ── close() ──► CLOSED
                    └── LayoutMismatch ──► CLOSED                    └── PeerLost ──► CLOSED
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from antiphon.core.errors import AntiphonError, InternalError
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.ready import DEADLINE_S, THERE, Ready

HEADER_BYTES = 64  # every message carries a fixed binary header of this size; its fields are the connector's


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLayout:
    """What both ends must agree on before a byte flows.

    ``fields`` is an ordered set of named facts (model digest, hidden size, dtype, shard, protocol version, ...); the link opens
    only if both ends have equal fields, and the error names the ones that differ.
    """

    channel: str  # "afd" or "kv"
    num_slots: int  # per direction
    send_slot_bytes: int
    recv_slot_bytes: int
    fields: tuple[tuple[str, str], ...]
    memory: str = ""  # kind of card memory this end would like slots in (device.shared), where the peer has it too; "": the host's

    def differences(self, other: LinkLayout) -> list[str]:
        """Names and values of the facts in which ``other``, the peer's layout seen from its end, does not match."""
        found = []
        if self.channel != other.channel:
            found.append(f"channel {self.channel} against {other.channel}")
        if self.num_slots != other.num_slots:
            found.append(f"num_slots {self.num_slots} against {other.num_slots}")
        if self.send_slot_bytes != other.recv_slot_bytes:
            found.append(f"send_slot_bytes {self.send_slot_bytes} against its recv_slot_bytes {other.recv_slot_bytes}")
        if self.recv_slot_bytes != other.send_slot_bytes:
            found.append(f"recv_slot_bytes {self.recv_slot_bytes} against its send_slot_bytes {other.send_slot_bytes}")
        mine, theirs = dict(self.fields), dict(other.fields)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                found.append(f"{name} {mine.get(name)} against {theirs.get(name)}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who opens a link, and with which layout; exchanged once in each direction."""

    worker_id: WorkerId
    epoch: Epoch
    layout: LinkLayout


@dataclass(slots=True)
class Slot:
    """A registered region to write a message into. ``data`` is uint8 [slot_bytes], owned by the link."""

    index: int
    data: torch.Tensor


@dataclass(slots=True)
class Message:
    """A received message; ``data`` is uint8 [num_bytes], a view valid until released."""

    slot: int
    header: memoryview  # HEADER_BYTES
    data: torch.Tensor


def await_bytes(ready: Ready, peer: WorkerId) -> None:
    """Wait until what goes to ``peer`` is there. Raises InternalError where it never comes."""
    if ready is not THERE and not ready.wait(DEADLINE_S):
        raise InternalError(f"what was to go to {peer} was not written within {DEADLINE_S:g} s")


class Waitable(Protocol):
    """What a ``WaitSet`` needs from a link or a listener to spin on it and then to sleep on it.

    Two more properties are optional: ``spin_channel``, the native control channel to spin on without the GIL (shared memory), and
    ``nap_s``, seconds after which a sleeper has to ask ``pending`` again because nothing rings (NIXL).
    """

    @property
    def spin_s(self) -> float:
        """Seconds it pays to spin from now on before sleeping; 0 where only sleeping pays, or once nothing moved for a while."""
        ...

    def pending(self) -> bool:
        """True when the next call has something to say: a message, a loss, a new link, or the slot ``acquire`` lacked."""
        ...

    def park(self) -> Sequence[int]:
        """Announce that this end goes to sleep; the file descriptors that become readable when it must wake."""
        ...

    def unpark(self, *, woken: bool) -> None:
        """Take the announcement back; ``woken`` is False when the sleep ran into its deadline."""
        ...


class Link(Waitable, Protocol):
    """One open connection to one peer; the module's docstring has the rules."""

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        ...

    @property
    def peer_epoch(self) -> Epoch:
        """The other end's epoch, from its hello."""
        ...

    @property
    def num_free_slots(self) -> int:
        """Slots of this end that are not in flight, for accounting; at rest it is all of them. Raises nothing."""
        ...

    def acquire(self) -> Slot | None:
        """A free slot to write into, or None while all are in flight. Raises PeerLost."""
        ...

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int, ready: Ready = THERE) -> None:
        """Send the first ``num_bytes`` of the slot with its header (HEADER_BYTES long), not before ``ready``.

        Nothing is published whose bytes are not there: a card writes later than the call that asked for it.

        Raises:
            PeerLost: the peer is gone.
            InternalError: the bytes are not there after ``ready.DEADLINE_S``.
        """
        ...

    def poll(self) -> Message | None:
        """The next message in order, or None; also drives progress. Raises PeerLost, CorruptMessage."""
        ...

    def release(self, message: Message) -> None:
        """Give a received message's slot back to the sender."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Spin, then sleep, until a message may be there (True) or the time is up (False). Raises PeerLost.

        If the last ``acquire`` returned None, a slot that may have come back also ends the wait.
        """
        ...

    def close(self) -> None:
        """Close; idempotent. The peer sees PeerLost."""
        ...


class Listener(Waitable, Protocol):
    """Accepts links on one address."""

    @property
    def address(self) -> str:
        """What peers connect to; its scheme names the transport."""
        ...

    def accept(self) -> Link | None:
        """A link whose hello has been exchanged, or None; never blocks.

        Raises the first unexpected error of ``answer`` or of the listener's own thread. A peer that was turned away for
        its layout, or by an AntiphonError of ``answer``, raises nothing here: ``refused`` tells.
        """
        ...

    def refused(self) -> AntiphonError | None:
        """Why the next peer was turned away (a LayoutMismatch names the fields), or None; never blocks."""
        ...

    def close(self) -> None:
        """Stop accepting; links already accepted live on. Idempotent."""
        ...


# Chooses this end's layout for an arriving peer, or raises an AntiphonError (LayoutMismatch, Unavailable) to refuse it.
# Called at control speed from a thread of the listener (loopback: the connecting thread), one peer at a time.
Answer = Callable[[Hello], Hello]


class Transport(Protocol):
    """A way to move bytes between workers."""

    @property
    def name(self) -> str:
        """loopback, shm, nixl or grpc."""
        ...

    def listen(self, host: str, answer: Answer) -> Listener:
        """Accept links on an address of ``host``; ``answer`` is called once per arriving peer."""
        ...

    def connect(self, address: str, hello: Hello, timeout_s: float) -> Link:
        """Open a link.

        Raises:
            Unavailable: nobody there speaks this transport, or it can't be opened between the two (``auto`` tries the next).
            LayoutMismatch: both are there and disagree; the message names the fields.
            PeerLost: the peer was there and went away.
        """
        ...


PREFIX = struct.Struct("<IHHQ")  # magic, version, kind, epoch: the first 16 bytes of every connector header
MAGIC = 0x414E5450  # "ANTP"
PROTOCOL_VERSION = 1
