"""A link by one-sided NIXL writes into the peer's slots, with notifications (hot). transport.py opens it.

A message is a write of the slot, then its credits frame as the notification that follows the bytes; a release is a notification
alone. Writes are prepared once per slot and size class and posted again and again; a class is at most an eighth longer than the
message. Nothing moves unless somebody calls in, so ``pending`` asks NIXL, and a sleeper naps: an eighth as long as the link has
been quiet, between 50 us and 5 ms. The peer's loss shows on the control socket; NIXL itself may never tell.
Must not know: how the peer was found.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from antiphon.core.errors import CorruptMessage, PeerLost
from antiphon.core.ids import Epoch, WorkerId
from antiphon.device.ready import THERE, Ready
from antiphon.transport.base import HEADER_BYTES, Hello, Link, Message, Slot, await_bytes
from antiphon.transport.credits import FRAME_BYTES, PREFIX, Credits, DamageError, is_credit
from antiphon.transport.liveness import PeerLiveness
from antiphon.transport.nixl.agent import Agent
from antiphon.transport.slots import slots_of
from antiphon.transport.waiting import let_others_run, sleep_on

_MIN_CLASS_BYTES = 4096
_CLASSES_PER_OCTAVE = 8
_MIN_NAP_S, _MAX_NAP_S = 50e-6, 5e-3
_SPIN_S = 300e-6
_TURNS_PER_YIELD = 8  # of spinning between two looks at everything else
_WARM_UP = b"antiphon" * (FRAME_BYTES // 8)  # as long as a frame: UCX carries shorter ones by another way
_NUM_WARM_UPS = 16  # UCX changes its ways after the first few


def size_classes(slot_bytes: int) -> list[int]:
    """Lengths in which a slot may be written, ascending; the last is ``slot_bytes``."""
    classes = []
    octave = _MIN_CLASS_BYTES
    while octave < slot_bytes:
        classes += [octave + octave * i // _CLASSES_PER_OCTAVE for i in range(_CLASSES_PER_OCTAVE)]
        octave *= 2
    return [size for size in classes if size < slot_bytes] + [slot_bytes]


class NixlLink(Link):
    """One end; see the seam for the rules."""

    def __init__(
        self,
        mine: Hello,
        theirs: Hello,
        agent: Agent,
        send_memory: torch.Tensor,
        recv_memory: torch.Tensor,
        remote_address: int,
        remote_device: int,
        liveness: PeerLiveness,
    ) -> None:
        """Both memories are registered, uint8 [num_slots, slot_bytes]; the peer's slots start at ``remote_address``."""
        layout = mine.layout
        self._theirs = theirs
        self._agent = agent
        self._liveness = liveness
        self._memory = (send_memory, recv_memory)  # alive as long as it is registered
        self._slots = slots_of(send_memory)
        self._recv_rows = [recv_memory[i] for i in range(layout.num_slots)]
        self._messages = [Message(slot=i, header=memoryview(b""), data=recv_memory[i][:0]) for i in range(layout.num_slots)]
        self._slot_credits = Credits(layout.num_slots, layout.recv_slot_bytes)
        self._classes = size_classes(layout.send_slot_bytes)
        self._transfers: list[Any] = [None] * (layout.num_slots * len(self._classes))  # by slot and class, made when needed
        self._posted: list[Any] = [None] * layout.num_slots  # the unfinished transfer of each slot
        self._num_posted = 0
        self._arrived: deque[bytes] = deque()
        self._num_warm_ups_sent = 0
        self._num_warm_ups_came = 0
        self._starved = False
        self._lost: str | None = None
        self._quiet_since = time.monotonic()
        self._active = True  # something moved since the last sleep that brought nothing: spinning pays
        if layout.send_slot_bytes:
            device = send_memory.device
            pieces = [
                (
                    send_memory.data_ptr() + slot * layout.send_slot_bytes,
                    remote_address + slot * layout.send_slot_bytes,
                    size,
                )
                for slot in range(layout.num_slots)
                for size in self._classes
            ]
            agent.prepare(pieces, device.index or 0, remote_device, "DRAM" if device.type == "cpu" else "VRAM")

    @property
    def peer(self) -> WorkerId:
        """The worker at the other end."""
        return self._theirs.worker_id

    @property
    def peer_epoch(self) -> Epoch:
        """The other end's epoch."""
        return self._theirs.epoch

    @property
    def spin_s(self) -> float:
        """The window, as long as messages keep coming."""
        return _SPIN_S if self._active else 0.0

    @property
    def nap_s(self) -> float:
        """How long a sleeper may stay away."""
        return min(max((time.monotonic() - self._quiet_since) / 8, _MIN_NAP_S), _MAX_NAP_S)

    def warm_up(self) -> bool:
        """One turn of opening UCX's connection, before anything is in flight; True once it is open both ways.

        The first writes are slow and need this end's help to leave; later ones are over when they are posted. Raises PeerLost.
        """
        self._progress()
        if self._num_posted == 0 and self._num_warm_ups_sent < _NUM_WARM_UPS:
            self._num_warm_ups_sent += 1
            if not self._classes[-1]:
                self._agent.notify(_WARM_UP, self.peer)
            else:
                transfer = self._transfers[0] = self._transfers[0] or self._agent.transfer(0)
                if not self._agent.post(transfer, _WARM_UP, self.peer):
                    self._posted[0] = transfer
                    self._num_posted = 1
        over = self._num_posted == 0 and self._num_warm_ups_sent == _NUM_WARM_UPS
        return over and self._num_warm_ups_came >= _NUM_WARM_UPS

    @property
    def num_free_slots(self) -> int:
        """Slots not in flight, as of the last look."""
        return len(self._slot_credits.free)

    def acquire(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost, CorruptMessage."""
        if self._lost is not None or self._liveness.ended():
            self._raise_lost()
        free = self._slot_credits.free
        if not free:
            self._progress()
        if free:
            # Its credit is here, so its write is over at the far end; this end may still have to be told.
            slot = free[-1]
            if self._posted[slot] is None or self._settle(slot):
                self._starved = False
                return self._slots[free.pop()]
        self._starved = True
        return None

    def commit(self, slot: Slot, header: bytes | bytearray | memoryview, num_bytes: int, ready: Ready = THERE) -> None:
        """Post the write. Raises PeerLost."""
        await_bytes(ready, self.peer)
        if self._lost is not None:
            self._raise_lost()
        if len(header) != HEADER_BYTES:
            raise ValueError(f"a header has {HEADER_BYTES} bytes")
        index = slot.index
        frame = self._slot_credits.send(index, num_bytes) + header
        self._stir()
        if num_bytes == 0:
            self._agent.notify(frame, self.peer)
            return
        at = index * len(self._classes) + bisect_left(self._classes, num_bytes)
        transfer = self._transfers[at]
        if transfer is None:
            transfer = self._transfers[at] = self._agent.transfer(at)
        if not self._agent.post(transfer, frame, self.peer):
            self._posted[index] = transfer
            self._num_posted += 1

    def poll(self) -> Message | None:
        """The next message, or None. Raises PeerLost, CorruptMessage."""
        if self._lost is not None:
            self._raise_lost()
        if not self._arrived:
            self._progress()
            if not self._arrived:
                if self._liveness.ended():
                    self._progress()
                    if not self._arrived:
                        self._raise_lost()
                else:
                    return None
        frame = self._arrived.popleft()
        try:
            slot, num_bytes = self._slot_credits.receive(frame)
        except DamageError as error:
            self._corrupt(error)
        self._stir()
        message = self._messages[slot]
        message.header = memoryview(frame)[PREFIX.size : FRAME_BYTES]
        if message.data.shape[0] != num_bytes:
            message.data = self._recv_rows[slot][:num_bytes]
        return message

    def release(self, message: Message) -> None:
        """Notify the sender."""
        credit = self._slot_credits.release(message.slot)
        if self._lost is None:
            try:
                self._agent.notify(credit, self.peer)
            except PeerLost as error:
                self._lost = error.why

    def wait(self, timeout_s: float) -> bool:
        """Spin, then nap. Raises PeerLost."""
        if self._lost is not None:
            self._raise_lost()
        deadline = time.monotonic() + timeout_s
        found = self._spin(min(self.spin_s, timeout_s)) or sleep_on((self,), deadline)
        if (self._lost is not None or self._liveness.lost is not None) and not self._arrived:
            self._raise_lost()
        return found

    def close(self) -> None:
        """Close; NIXL's memory and threads go with it. Idempotent."""
        if self._lost is None:
            self._lost = "closed here"
        if self._liveness.fds:
            self._finish_posted()
            self._liveness.close()
            self._agent.close()
            self._transfers, self._posted, self._num_posted = [], [], 0

    def pending(self) -> bool:
        """True when a message, a loss or the slot that was lacking is there; drives progress."""
        if self._lost is not None or self._arrived:
            return True
        try:
            self._progress()
        except (PeerLost, CorruptMessage) as error:
            self._lost = error.why
        return bool(
            self._arrived or self._lost is not None or self._liveness.ended() or (self._starved and self._slot_credits.free)
        )

    def park(self) -> Sequence[int]:
        """The control socket, which tells of the peer's loss."""
        return self._liveness.fds

    def unpark(self, *, woken: bool) -> None:
        """Look at the control socket if it may have woken us."""
        if woken:
            self._liveness.look()
        else:
            self._active = False

    def _progress(self) -> None:
        for frame in self._agent.notifications():
            if is_credit(frame):
                try:
                    self._slot_credits.free.append(self._slot_credits.take_credit(frame))
                except DamageError as error:
                    self._corrupt(error)
            elif frame == _WARM_UP:
                self._num_warm_ups_came += 1
            else:
                self._arrived.append(frame)
        if self._num_posted:
            for slot, transfer in enumerate(self._posted):
                if transfer is not None:
                    self._settle(slot)

    def _spin(self, window_s: float) -> bool:
        end = time.monotonic() + window_s
        while True:
            for _ in range(_TURNS_PER_YIELD):
                if self._arrived:
                    return True
                self._progress()
            if self.pending():
                return True
            if time.monotonic() >= end:
                return False
            let_others_run()

    def _settle(self, slot: int) -> bool:
        if not self._agent.finished(self._posted[slot], self.peer):
            return False
        self._posted[slot] = None
        self._num_posted -= 1
        return True

    def _stir(self) -> None:
        self._active = True
        self._quiet_since = time.monotonic()

    def _corrupt(self, error: DamageError) -> NoReturn:
        self._lost = f"corrupt message: {error}"
        self.close()
        raise CorruptMessage(self.peer, str(error)) from None

    def _raise_lost(self) -> NoReturn:
        if self._lost is None:
            self._lost = self._liveness.lost or "it is gone"
        raise PeerLost(self.peer, self._lost)

    def _finish_posted(self) -> None:
        """Let what was committed leave before the agent goes, for a moment and while the peer is there."""
        deadline = time.monotonic() + 1.0
        while self._num_posted and self._liveness.lost is None and time.monotonic() < deadline:
            try:
                self._progress()
            except (PeerLost, CorruptMessage):
                return
            self._liveness.ended()
