"""The directory for synchronous code, and the thread that keeps a worker's lease (control speed).

Must not know: what the worker does, or which store answers.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from antiphon.core.directory import Directory, WorkerRecord
from antiphon.core.errors import AntiphonError, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.worker_info import WorkerInfo

T = TypeVar("T")

_RENEWALS_PER_LEASE = 3  # two may be lost before the record is
_AGAIN_S = 0.2

logger = logging.getLogger(__name__)


class BlockingDirectory:
    """A ``Directory`` with blocking calls, usable from any thread; its event loop runs on a thread of its own.

    Args:
        directory: used by that loop alone from now on, and closed with this object.
        timeout_s: each call raises Unavailable after it.
    """

    def __init__(self, directory: Directory, *, timeout_s: float = 10.0) -> None:
        self._directory = directory
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="directory", daemon=True)
        self._thread.start()
        self._closed = False

    def register(self, info: WorkerInfo, lease_s: float) -> bool:
        """See ``Directory``."""
        return self._run(self._directory.register(info, lease_s))

    def remove(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        """See ``Directory``."""
        return self._run(self._directory.remove(worker_id, epoch))

    def workers(self, deployment: str | None = None) -> Sequence[WorkerRecord]:
        """See ``Directory``."""
        return self._run(self._directory.workers(deployment))

    def claim_index(self, deployment: str, pool: str, owner: str, lease_s: float, preferred: int | None = None) -> int:
        """See ``Directory``."""
        return self._run(self._directory.claim_index(deployment, pool, owner, lease_s, preferred))

    def release_index(self, deployment: str, pool: str, owner: str) -> None:
        """See ``Directory``."""
        self._run(self._directory.release_index(deployment, pool, owner))

    def next_epoch(self, worker_id: WorkerId, after: Epoch = Epoch(0)) -> Epoch:
        """See ``Directory``."""
        return self._run(self._directory.next_epoch(worker_id, after))

    def close(self) -> None:
        """Give back connections and the thread; idempotent."""
        if self._closed:
            return
        try:
            self._run(self._directory.close())
        except AntiphonError as error:
            logger.debug("closing the directory: %s", error)
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self._timeout_s)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            call.close()
            raise Unavailable("the directory client is closed")
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result(self._timeout_s)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise Unavailable(f"the directory did not answer within {self._timeout_s:g} s") from error


def patiently(call: Callable[[], T], timeout_s: float, stopping: threading.Event) -> T:
    """The call's answer, asked for again while the directory can't be reached: a machine that starts much is slow to answer.

    Raises:
        Unavailable: it is not reached within ``timeout_s`` seconds, or before ``stopping`` is set.
    """
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except Unavailable as error:
            if time.monotonic() >= end_s:
                raise
            logger.warning("still trying: %s", error)
            if stopping.wait(_AGAIN_S):
                raise


class LeaseKeeper:
    """Registers a worker and renews its lease from a thread until closed; then the record is removed.

    The first registration happens in the constructor's thread, so that a directory that can't be reached is noticed at once.
    Later the store may go away and come back empty: renewals go on, and re-create the record.

    Args:
        directory: where to register; not closed here.
        describe: the worker's newest record; called from the keeper's thread.
        lease_s: seconds the record outlives its last renewal.

    Raises:
        Unavailable: the directory can't be reached.
    """

    def __init__(self, directory: BlockingDirectory, describe: Callable[[], WorkerInfo], lease_s: float) -> None:
        self._directory = directory
        self._describe = describe
        self._lease_s = lease_s
        self._wake = threading.Event()
        self._closing = False
        self._superseded = threading.Event()
        self._error: BaseException | None = None
        self._identity: tuple[WorkerId, Epoch] | None = None
        self._thread: threading.Thread | None = None
        if self._renew():
            self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
            self._thread.start()

    @property
    def superseded(self) -> bool:
        """True once a worker of the same id and a higher epoch is registered: this one must stop."""
        return self._superseded.is_set()

    def check(self) -> None:
        """Raise what ended the renewals, if anything did."""
        if self._error is not None:
            raise self._error

    def renew_soon(self) -> None:
        """Renew now instead of at the next turn: for a change others wait for, such as ready or draining."""
        self._wake.set()

    def close(self) -> None:
        """Stop renewing and remove the record; idempotent. A directory that can't be reached is left to the lease."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(self._lease_s + 1.0)
        if self._identity is None or self._superseded.is_set():
            return
        try:
            self._directory.remove(*self._identity)
        except Unavailable as error:
            logger.info("the record of %s ends with its lease: %s", self._identity[0], error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _renew(self) -> bool:
        info = self._describe()
        self._identity = (info.worker_id, info.epoch)
        if not self._directory.register(info, self._lease_s):
            self._superseded.set()
        return not self._superseded.is_set()

    def _keep(self) -> None:
        reachable = True
        while True:
            self._wake.wait(self._lease_s / _RENEWALS_PER_LEASE)
            self._wake.clear()
            if self._closing:
                return
            try:
                if not self._renew():
                    return
                if not reachable:
                    logger.info("the directory is back")
                reachable = True
            except Unavailable as error:
                if reachable:
                    logger.warning("the lease can't be renewed, still trying: %s", error)
                reachable = False
            except BaseException as error:  # noqa: BLE001  # stored; the owner's check() raises it
                self._error = error
                return
