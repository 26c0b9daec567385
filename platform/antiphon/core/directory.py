"""The directory seam: who is registered, under which lease, and who owns which index of a pool (control speed).

A worker renews its record well within the lease; a record that is not renewed is gone. Every operation is idempotent and
re-creates what the store has lost, so that a store may restart empty: within one lease everybody is back.

    a replica:  claim_index() ──► next_epoch() ──► starts a worker     claims again every third of a lease
    a worker:   register() ──► register() ... ──► remove()             registers again every third of a lease

Must not know: Redis, gRPC, or where the store runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
