"""The directory seam: who is registered, under which lease, and who owns which index of a pool (control speed).

A worker renews its record well within the lease; a record that is not renewed is gone. Every operation is idempotent and
re-creates what the store has lost, so that a store may restart empty: within one lease everybody is back.

    a replica:  claim_index() ──► next_epoch() ──► starts a worker     claims again every third of a lease
    a worker:   register() ──► register() ... ──► remove()             registers again every third of a lease

Every store keeps to the bounds at the end of this file: nobody can make it grow without end, or hold a record for ever.

Must not know: Redis, gRPC, or where the store runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from antiphon.core.budget import Budgets
from antiphon.core.errors import InvalidInput
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.worker_info import WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """One registered worker and its lease, as the directory sees them now."""

    info: WorkerInfo
    age_s: float  # since the last renewal
    lease_s: float

    @property
    def remaining_s(self) -> float:
        """Seconds until the record is gone unless it is renewed."""
        return max(0.0, self.lease_s - self.age_s)


class Notes(Protocol):
    """Small texts under leases, by topic and key: what replicas of one role tell each other. Raises like ``Directory``."""

    async def put_note(self, topic: str, key: str, text: str, lease_s: float) -> None:
        """Write, or write over; gone after ``lease_s`` seconds unless written again."""
        ...

    async def note(self, topic: str, key: str) -> str | None:
        """The text; None = there is none."""
        ...

    async def notes(self, topic: str) -> Mapping[str, str]:
        """All texts of the topic by key, ordered by key."""
        ...


class Directory(Notes, Protocol):
    """Where workers register. Every method raises Unavailable while the store can't be reached."""

    @property
    def budgets(self) -> Budgets:
        """What tenants may use and have used."""
        ...

    async def register(self, info: WorkerInfo, lease_s: float) -> bool:
        """Register, or renew with the newest load; the record stays for ``lease_s`` seconds.

        Returns:
            False when a worker of the same id with a higher epoch is registered: the caller is superseded and must stop.
        """
        ...

    async def remove(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        """Remove the record; True when it was there with exactly this epoch."""
        ...

    async def workers(self, deployment: str | None = None) -> Sequence[WorkerRecord]:
        """Records whose lease runs, of one deployment or of all, ordered by worker id."""
        ...

    async def claim_index(self, deployment: str, pool: str, owner: str, lease_s: float, preferred: int | None = None) -> int:
        """The index of ``owner`` within the pool, for ``lease_s`` seconds more.

        An owner that holds an index keeps it. Otherwise it gets ``preferred`` when that is free, else the lowest free one.
        """
        ...

    async def release_index(self, deployment: str, pool: str, owner: str) -> None:
        """Give the owner's index back at once."""
        ...

    async def next_epoch(self, worker_id: WorkerId, after: Epoch = Epoch(0)) -> Epoch:
        """An epoch higher than ``after`` and than any that was handed out or registered for this worker id."""
        ...

    async def close(self) -> None:
        """Give back connections; idempotent. Records stay until their leases end."""
        ...


MAX_LEASE_S = 3600.0
MAX_NAME_CHARS = 512
MAX_NOTE_BYTES = 1 << 18
MAX_WORKERS = 8192  # live records, and ids whose epochs are remembered times eight
MAX_POOLS = 4096
MAX_INDICES = 8192  # of one pool
MAX_CLAIMS = 1 << 16  # of all pools
MAX_TOPICS = 1024
MAX_NOTES = 1 << 16  # of one topic; the oldest go
MAX_TOPIC_BYTES = 1 << 26  # of one topic's notes; the oldest go
MAX_NOTES_BYTES = 1 << 29  # of all notes that a process keeps in its memory; the oldest of the largest topic go
# Epochs are seconds of the clock or count from one. One call moves an id by so many at most, so that no call can use up its epochs.
MAX_EPOCH_STEP = 1_000_000
MAX_EPOCH = 1 << 52  # the stores' numbers are doubles in part


def check_lease(lease_s: float) -> None:
    """Raise InvalidInput unless it is a time that ends."""
    if not (math.isfinite(lease_s) and 0 < lease_s <= MAX_LEASE_S):
        raise InvalidInput(f"a lease of {lease_s} s, expected more than 0 and at most {MAX_LEASE_S:g}", "lease_s")


def check_names(**names: str) -> None:
    """Raise InvalidInput unless each can be a key."""
    for field, name in names.items():
        if len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise InvalidInput(f"{name[:64]!r} of {len(name)} characters is no name", field)


def check_epoch(epoch: int, highest: float, field: str) -> None:
    """Raise InvalidInput where ``epoch`` is further than one step above ``highest``, which is the clock or what was handed out."""
    if not 0 <= epoch <= min(MAX_EPOCH, highest + MAX_EPOCH_STEP):
        raise InvalidInput(f"epoch {epoch} is out of range", field)
