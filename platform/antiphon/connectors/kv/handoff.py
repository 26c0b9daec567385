"""The KV hand-off: a decode worker asks a prefill worker for the KV of a prompt and gets it layer by layer (hot).

One transfer:

    decode side   REQUESTED ──KV of some tokens, a layer──► ARRIVING ──all in and KV_DONE──► loaded
                      └──peer lost, KV_FAILED, or no progress for the lease──► failed (the engine recomputes)
    prefill side  ARRIVED ──scheduled──► COMPUTING, rows go out as layers are done ──all out──► sent (blocks may go)
                      └──peer lost, PREFILL_ABORT──► aborted

Where layers have states, those behind the last token asked for go out when all is computed, a layer's plane in one or more parts.
They arrive with the same checks, and one that fails to arrive is recomputed with the KV: from the asker's own last snapshot.

Both ends copy between their own cache and the link's slots, so an abort on either side frees blocks at once: whatever still
arrives for an unknown transfer is dropped. A prefix that the decode side has cached is neither computed for it nor sent.
The two ends are in kv_decode and kv_prefill; here is what they share. Must not know: who schedules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from antiphon.core.kv import KVLayout
from antiphon.core.step import KVEvents
from antiphon.transport.base import Link, Slot

CHANNEL = "kv"
NUM_SLOTS = 8
TOKENS_PER_MESSAGE = 128
_MIN_STATE_SLOT_BYTES = 1 << 16  # a state is megabytes
TEXT_BYTES = 4096  # room after the token ids for salt, trace context and tenant
_MAX_SALT_BYTES = 1024  # longer ones travel as their hash


def write_text(salt: str, traceparent: str, tenant: str) -> bytes:
    """What stands after a request's token ids. The salt is a client's and may hold anything; a trace context has no NUL."""
    raw = salt.encode("utf-8", "surrogatepass")
    if len(raw) > _MAX_SALT_BYTES:
        salt = hashlib.blake2b(raw, digest_size=32).hexdigest()
    return f"{salt}\0{traceparent}\0{tenant}".encode("utf-8", "replace")[:TEXT_BYTES]


def read_text(text: str) -> tuple[str, str, str]:
    """Salt, trace context ("" = none) and tenant; an older asker names no tenant, and less than that is a salt."""
    salt, *others = text.rsplit("\0", 2)
    traceparent, tenant, *_ = [*others, "", ""]
    return salt, traceparent, tenant


def request_slot_bytes(max_model_len: int) -> int:
    """Slot size from decode to prefill: a prompt of the longest length and its texts."""
    return 4 * max_model_len + TEXT_BYTES


def kv_slot_bytes(layout: KVLayout) -> int:
    """Slot size from prefill to decode."""
    return max(layout.layer_token_bytes * TOKENS_PER_MESSAGE, _MIN_STATE_SLOT_BYTES if layout.has_state else 4096)


def kv_fields(*, revision: str, model_fingerprint: str, layout: KVLayout) -> Sequence[tuple[str, str]]:
    """The facts that both ends of a KV link must agree on."""
    return (("revision", revision), ("model", model_fingerprint), ("kv", layout.fingerprint))


NOTHING_HAPPENED = KVEvents()


class Sender:
    """Takes slots of one link. After ``take`` found none, the link counts as pending until a slot is taken; ``settle`` takes and
    keeps one when there is nothing left to send, so that the loop may sleep.
    """

    __slots__ = ("_kept", "_lacked", "link")

    def __init__(self, link: Link) -> None:
        self.link = link
        self._kept: Slot | None = None
        self._lacked = False

    def take(self) -> Slot | None:
        """A free slot, or None. Raises PeerLost."""
        slot, self._kept = self._kept, None
        if slot is None:
            slot = self.link.acquire()
        self._lacked = slot is None
        return slot

    def settle(self) -> None:
        """Nothing is left to send. Raises PeerLost."""
        if self._lacked:
            self._kept = self.take()
