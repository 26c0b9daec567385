"""Leader election by Lease: at most one replica of the operator acts (control speed).

    Waiting --lease free, or unchanged for its duration--> Leading --not renewed until the renew deadline--> Lost (the process ends)

A replica measures the age of another's lease with its own clock from when it saw it change, so clocks need not agree. The renew
deadline is shorter than the lease: a leader that can't renew has stopped before another may start. A process that was kept from
running for longer asks once more: while the lease names it nobody else has led, and it goes on.

Must not know: what a leader does.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable

from antiphon.core.errors import Unavailable
from antiphon_operator.kube.base import Conflict, Kube, KubeError, NotFound, Object, Refused
from antiphon_operator.kube.resources import LEASE

_LOG = logging.getLogger(__name__)


class LeadershipLost(Unavailable):
    """The lease could not be renewed in time, or somebody else holds it; the process must end."""

    code = "leadership_lost"


class LeaderElection:
    """One replica's part in the election. ``clock`` is monotonic, in seconds; ``sleep`` waits on it."""

    def __init__(
        self,
        kube: Kube,
        *,
        namespace: str,
        name: str,
        identity: str,
        clock: Callable[[], float],
        duration_s: float = 60.0,
        renew_deadline_s: float = 45.0,
        retry_s: float = 5.0,
    ) -> None:
        if not retry_s < renew_deadline_s < duration_s:
            raise ValueError("retry < renew deadline < duration is needed, or two replicas could lead")
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._clock = clock
        self._duration_s = duration_s
        self._renew_deadline_s = renew_deadline_s
        self._retry_s = retry_s
        self._seen: tuple[str, float] | None = None  # resourceVersion of another's lease, and when it was first seen
        self._renewed_at = 0.0
        self.leading = False

    async def acquire(self) -> None:
        """Wait until this replica leads; failures of the API server are waited out."""
        while not await self.try_acquire():  # noqa: ASYNC110 - polls a server, there is nothing to wait on
            await asyncio.sleep(self._retry_s)

    async def try_acquire(self) -> bool:
        """Try once; True when this replica leads now."""
        started = self._clock()
        try:
            taken = await self._take()
        except KubeError as error:
            _LOG.warning("the lease can't be asked for: %s", error)
            taken = False
        if taken:
            self._renewed_at, self.leading = started, True
        return taken

    async def hold(self) -> None:
        """Keep renewing.

        Raises:
            LeadershipLost: always, in the end.
        """
        while True:
            await asyncio.sleep(self._retry_s)
            await self.renew()

    async def renew(self) -> None:
        """Renew once; a failure is forgiven until the renew deadline.

        Raises:
            LeadershipLost: the deadline has passed, or another replica leads.
        """
        started = self._clock()
        remaining = self._renew_deadline_s - (started - self._renewed_at)
        try:
            # Late because nothing of this process ran, it did no harm meanwhile: one more question decides.
            async with asyncio.timeout(max(remaining, self._retry_s)):
                lease = await self._kube.get(LEASE, self._namespace, self._name)
                if lease is None or lease["spec"].get("holderIdentity") != self._identity:
                    self.leading = False
                    raise LeadershipLost("another replica holds the lease")
                await self._patch(lease, transitions=int(lease["spec"].get("leaseTransitions", 0)))
            self._renewed_at = started
        except (KubeError, TimeoutError) as error:
            if self._clock() - self._renewed_at >= self._renew_deadline_s:
                self.leading = False
                raise LeadershipLost(f"the lease could not be renewed: {error!r}") from error

    async def release(self) -> None:
        """Give the lease up so that another replica need not wait; does nothing for a replica that does not lead."""
        if not self.leading:
            return
        self.leading = False
        lease = await self._kube.get(LEASE, self._namespace, self._name)
        if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
            await self._patch(lease, transitions=int(lease["spec"].get("leaseTransitions", 0)), holder="")

    async def _take(self) -> bool:
        lease = await self._kube.get(LEASE, self._namespace, self._name)
        if lease is None:
            try:
                # Two replicas may both find none: the second apply conflicts with the first one's holder.
                await self._kube.apply(self._fresh(), manager=self._identity)
            except Conflict:
                return False
            return True
        holder = lease["spec"].get("holderIdentity") or ""
        version = lease["metadata"]["resourceVersion"]
        if holder not in ("", self._identity):
            if self._seen is None or self._seen[0] != version:
                self._seen = (version, self._clock())
                return False
            if self._clock() - self._seen[1] < self._duration_s:
                return False
        transitions = int(lease["spec"].get("leaseTransitions", 0)) + (holder != self._identity)
        try:
            await self._patch(lease, transitions=transitions)
        except (Conflict, NotFound, Refused):
            return False  # somebody was faster
        return True

    async def _patch(self, lease: Object, *, transitions: int, holder: str | None = None) -> None:
        spec = {
            **lease["spec"],
            "holderIdentity": self._identity if holder is None else holder,
            "renewTime": _micro_time(),
            "leaseDurationSeconds": int(self._duration_s),
            "leaseTransitions": transitions,
        }
        version = lease["metadata"]["resourceVersion"]
        patch = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": version},
            {"op": "replace", "path": "/spec", "value": spec},
        ]
        await self._kube.json_patch(LEASE, self._namespace, self._name, patch, manager=self._identity)

    def _fresh(self) -> Object:
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "acquireTime": _micro_time(),
                "renewTime": _micro_time(),
                "leaseDurationSeconds": int(self._duration_s),
                "leaseTransitions": 0,
            },
        }


def _micro_time() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
