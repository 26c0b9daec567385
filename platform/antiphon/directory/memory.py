"""The embedded directory store, and the one place that opens a directory by its address (control speed).

Addresses: ``redis://`` / ``rediss://`` / ``unix://`` (Redis), ``grpc://host:port`` (DirectoryService). ``antiphon.core.directory``
has the contract. Must not know: who routes on the records.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from antiphon.core.directory import (
    MAX_CLAIMS,
    MAX_INDICES,
    MAX_NOTE_BYTES,
    MAX_NOTES,
    MAX_NOTES_BYTES,
    MAX_POOLS,
    MAX_TOPIC_BYTES,
    MAX_TOPICS,
    MAX_WORKERS,
    Directory,
    WorkerRecord,
    check_epoch,
    check_lease,
    check_names,
)
from antiphon.core.errors import InvalidInput, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.directory.budgets import MemoryBudgets

__all__ = ["Directory", "MemoryDirectory", "WorkerRecord", "open_directory"]

NAMESPACE_VARIABLE = "ANTIPHON_NAMESPACE"  # apart from all others in a shared Redis; a cluster's, as the operator says
_NOTES_SWEPT_AT = 1024


@dataclass(slots=True)
class _Lease:
    info: WorkerInfo
    renewed_s: float
    lease_s: float


@dataclass(slots=True)
class _Claim:
    owner: str
    until_s: float


@dataclass(slots=True)
class _Note:
    encoded: bytes  # a str takes up to four times as much as its UTF-8
    until_s: float

    @property
    def text(self) -> str:
        return self.encoded.decode("utf-8", "surrogatepass")

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        return len(self.encoded)


class MemoryDirectory:
    """The store in this process; belongs to one event loop.

    Args:
        clock: monotonic seconds.
        wall: seconds since 1970; no epoch is much above.
        epoch_base: epochs start above it; a store that lost its memory is given a base above all it handed out before.
        settle_s: a store that lost its memory is given a lease's time, in which everybody who is alive renews. Until then it
            lists nobody and gives no index to newcomers (Unavailable): those who ask keep what they know.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        epoch_base: int = 0,
        settle_s: float = 0.0,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._settled_s = clock() + settle_s
        self._epoch_base = epoch_base
        self._leases: dict[WorkerId, _Lease] = {}
        self._claims: dict[tuple[str, str], dict[int, _Claim]] = {}
        self._epochs: dict[WorkerId, int] = {}
        self._notes: dict[str, dict[str, _Note]] = {}
        self._note_bytes: dict[str, int] = {}  # by topic
        self._all_note_bytes = 0  # their sum
        self._num_notes_kept = _NOTES_SWEPT_AT
        self.budgets = MemoryBudgets(clock)

    async def register(self, info: WorkerInfo, lease_s: float) -> bool:
        """See ``Directory``."""
        check_lease(lease_s)
        self._check_epoch(info.worker_id, info.epoch, "epoch")
        self._expire()
        held = self._leases.get(info.worker_id)
        if held is not None and held.info.epoch > info.epoch:
            return False
        if held is None and len(self._leases) >= MAX_WORKERS:
            raise Unavailable(f"the directory is full: {MAX_WORKERS} workers are registered")
        self._leases[info.worker_id] = _Lease(info=info, renewed_s=self._clock(), lease_s=lease_s)
        self._remember(info.worker_id, max(self._epochs.get(info.worker_id, 0), info.epoch))
        return True

    async def remove(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        """See ``Directory``."""
        held = self._leases.get(worker_id)
        if held is None or held.info.epoch != epoch:
            return False
        del self._leases[worker_id]
        return True

    async def workers(self, deployment: str | None = None) -> tuple[WorkerRecord, ...]:
        """See ``Directory``."""
        self._check_settled()
        self._expire()
        now = self._clock()
        return tuple(
            WorkerRecord(info=lease.info, age_s=now - lease.renewed_s, lease_s=lease.lease_s)
            for _, lease in sorted(self._leases.items())
            if deployment is None or lease.info.deployment == deployment
        )

    async def claim_index(self, deployment: str, pool: str, owner: str, lease_s: float, preferred: int | None = None) -> int:
        """See ``Directory``."""
        check_lease(lease_s)
        check_names(deployment=deployment, pool=pool, owner=owner)
        self._expire()
        if preferred is not None and not 0 <= preferred < MAX_INDICES:
            raise InvalidInput(f"index {preferred}, at most {MAX_INDICES} are given", "preferred")
        if (deployment, pool) not in self._claims and len(self._claims) >= MAX_POOLS:
            raise Unavailable(f"the directory is full: {MAX_POOLS} pools have claims")
        claims = self._claims.setdefault((deployment, pool), {})
        if preferred is None and all(claim.owner != owner for claim in claims.values()):
            self._check_settled()
        index = next((index for index, claim in claims.items() if claim.owner == owner), preferred)
        if index is None or (index in claims and claims[index].owner != owner):
            if sum(map(len, self._claims.values())) >= MAX_CLAIMS:
                raise Unavailable(f"the directory is full: {MAX_CLAIMS} indices are claimed")
            if len(claims) >= MAX_INDICES:
                raise Unavailable(f"all {MAX_INDICES} indices of {deployment}/{pool} are claimed")
            index = next(index for index in range(len(claims) + 1) if index not in claims)
        claims[index] = _Claim(owner=owner, until_s=self._clock() + lease_s)
        return index

    async def release_index(self, deployment: str, pool: str, owner: str) -> None:
        """See ``Directory``."""
        claims = self._claims.get((deployment, pool), {})
        for index in [index for index, claim in claims.items() if claim.owner == owner]:
            del claims[index]

    async def next_epoch(self, worker_id: WorkerId, after: Epoch = Epoch(0)) -> Epoch:
        """See ``Directory``."""
        check_names(worker_id=worker_id)
        self._check_epoch(worker_id, after, "after")
        epoch = max(self._epochs.get(worker_id, 0), self._epoch_base, after) + 1
        self._remember(worker_id, epoch)
        return Epoch(epoch)

    async def put_note(self, topic: str, key: str, text: str, lease_s: float) -> None:
        """See ``Notes``."""
        check_lease(lease_s)
        check_names(topic=topic, key=key)
        encoded = text.encode("utf-8", "surrogatepass")
        if len(encoded) > MAX_NOTE_BYTES:
            raise InvalidInput(f"a note of {len(encoded)} bytes, at most {MAX_NOTE_BYTES} are kept", "text")
        if topic not in self._notes and len(self._notes) >= MAX_TOPICS:
            for each in tuple(self._notes):
                self._sweep_notes(each)
            if len(self._notes) >= MAX_TOPICS:
                raise Unavailable(f"the directory is full: {MAX_TOPICS} topics have notes")
        notes = self._notes.setdefault(topic, {})
        self._drop_note(topic, key)
        while notes and (len(notes) >= MAX_NOTES or self._note_bytes[topic] + len(encoded) > MAX_TOPIC_BYTES):
            self._drop_note(topic, next(iter(notes)))
        notes[key] = _Note(encoded=encoded, until_s=self._clock() + lease_s)
        self._weigh(topic, len(encoded))
        while self._all_note_bytes > MAX_NOTES_BYTES:
            largest = max(self._note_bytes, key=self._note_bytes.__getitem__)
            self._drop_note(largest, next(iter(self._notes[largest])))
        if len(notes) > self._num_notes_kept:  # swept each time their number has doubled: O(1) per note
            self._sweep_notes(topic)
            self._num_notes_kept = max(_NOTES_SWEPT_AT, 2 * max((len(held) for held in self._notes.values()), default=0))

    async def note(self, topic: str, key: str) -> str | None:
        """See ``Notes``."""
        held = self._notes.get(topic, {}).get(key)
        return None if held is None or self._clock() >= held.until_s else held.text

    async def notes(self, topic: str) -> Mapping[str, str]:
        """See ``Notes``."""
        self._sweep_notes(topic)
        return {key: held.text for key, held in sorted(self._notes.get(topic, {}).items())}

    async def close(self) -> None:
        """See ``Directory``."""

    def _drop_note(self, topic: str, key: str) -> None:
        held = self._notes[topic].pop(key, None)
        self._weigh(topic, 0 if held is None else -held.num_bytes)

    def _weigh(self, topic: str, num_bytes: int) -> None:
        """Count bytes that came to a topic, or went."""
        self._note_bytes[topic] = self._note_bytes.get(topic, 0) + num_bytes
        self._all_note_bytes += num_bytes

    def _sweep_notes(self, topic: str) -> None:
        now = self._clock()
        for key in [key for key, held in self._notes.get(topic, {}).items() if now >= held.until_s]:
            self._drop_note(topic, key)
        if not self._notes.get(topic):
            self._notes.pop(topic, None)
            self._note_bytes.pop(topic, None)

    def _check_settled(self) -> None:
        left = self._settled_s - self._clock()
        if left > 0:
            raise Unavailable("the directory has restarted and waits for renewals", retry_after_s=left)

    def _expire(self) -> None:
        now = self._clock()
        for worker_id in [w for w, lease in self._leases.items() if now - lease.renewed_s >= lease.lease_s]:
            del self._leases[worker_id]
        for key, claims in tuple(self._claims.items()):
            for index in [index for index, claim in claims.items() if now >= claim.until_s]:
                del claims[index]
            if not claims:
                del self._claims[key]

    def _check_epoch(self, worker_id: WorkerId, epoch: Epoch, field: str) -> None:
        check_epoch(epoch, max(self._epochs.get(worker_id, 0), self._epoch_base, self._wall()), field)

    def _remember(self, worker_id: WorkerId, epoch: int) -> None:
        """Keep the highest epoch of an id; of too many, those who have no record are forgotten first."""
        if worker_id not in self._epochs and len(self._epochs) >= 8 * MAX_WORKERS:
            gone = next((known for known in self._epochs if known not in self._leases), None)
            if gone is None:
                raise Unavailable("the directory is full: it remembers no more ids")
            self._epoch_base = max(self._epoch_base, self._epochs.pop(gone))  # whoever it was, its epochs go on above
        self._epochs[worker_id] = epoch


def open_directory(address: str, *, timeout_s: float = 5.0) -> Directory:
    """The directory at ``address``; nothing is sent yet. Each of its calls takes ``timeout_s`` seconds at most.

    Raises:
        InvalidInput: the address has no known scheme.
    """
    scheme, separator, rest = address.partition("://")
    if separator and scheme in ("redis", "rediss", "unix"):
        from antiphon.directory.redis import RedisDirectory

        return RedisDirectory(address, timeout_s=timeout_s, namespace=os.environ.get(NAMESPACE_VARIABLE, ""))
    if separator and scheme == "grpc":
        from antiphon.rpc.directory.client import RemoteDirectory

        return RemoteDirectory(rest, timeout_s=timeout_s)
    raise InvalidInput(f"{address!r} is no directory: expected redis://, rediss://, unix:// or grpc://host:port", "directory")
