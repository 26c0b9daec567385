"""Sessions to all generating workers, and requests on them (request speed).

    WorkerView ── sync(records) ──► one WorkerConnection per worker and epoch
                                      CONNECTING ─► CONNECTED ── lost ──► CONNECTING (backoff) ... ─► CLOSED

A lost session fails the requests on it with PeerLost; what happens to them is their owner's decision. A connection ends when its
worker registers with a new epoch, or is gone from the directory and silent. A worker that has requests and says nothing is asked
whether it lives: its rpc server answers while its engine computes, and nothing does in a process that is stopped or cut off. So is
one whose lease has run out: that it answers is all that speaks for it then.

Must not know: how workers are picked, text, or what a lost request does next.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import AntiphonError, PeerLost, Unavailable
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.request import Request, RequestId
from antiphon.core.worker_info import WorkerInfo
from antiphon.rpc.engine.codec import Answer
from antiphon.rpc.engine.session import EngineSession

_log = logging.getLogger(__name__)

_MIN_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 2.0
_SILENT_S = 1.0  # without a word, while requests are on it, before a worker is asked
_ASK_S = 1.0  # for one answer
_TRIES = 2  # one may be lost by this process: when it was stopped itself
_LOOK_EVERY_S = 0.25
_AT_ONCE = 16  # answers that are handed out before the loop goes round

_Inbox = asyncio.Queue[Answer | AntiphonError]


class WorkerConnection:
    """The session to one worker, opened again after each loss until closed. Belongs to one event loop."""

    def __init__(
        self, worker_id: WorkerId, epoch: Epoch, address: str, *, open_timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.address = address
        self._open_timeout_s = open_timeout_s
        self._clock = clock
        self._session: EngineSession | None = None
        self._connected = asyncio.Event()
        self._inboxes: dict[RequestId, _Inbox] = {}
        self.tenants: Counter[str] = Counter()  # of the requests on it
        self._tenant_of: dict[RequestId, str] = {}
        self._closed: AntiphonError | None = None
        self.heard_s = clock()
        self.has_lease = True
        self._task = asyncio.create_task(self._run(), name=f"engine session {worker_id}")

    @property
    def connected(self) -> bool:
        """True while the session is open."""
        return self._session is not None

    @property
    def num_inflight(self) -> int:
        """Requests on it."""
        return len(self._inboxes)

    async def wait_connected(self, timeout_s: float) -> None:
        """Return once the session is open.

        Raises:
            Unavailable: it isn't within ``timeout_s`` seconds.
        """
        # A burst is placed as a whole before its first is counted: what an engine refuses is tried again, what finds queues full
        # is not.
        await asyncio.sleep(0)
        if self._session is not None and self._closed is None:
            return
        opened = asyncio.ensure_future(self._connected.wait())
        try:
            await asyncio.wait({opened}, timeout=timeout_s)
        finally:
            opened.cancel()
        if not self._connected.is_set():
            raise Unavailable(f"no session with {self.worker_id} at {self.address}")
        if self._closed is not None:
            raise Unavailable(str(self._closed))  # nothing of the request's has been lost

    async def stream(self, request: Request, *, deadline_left_s: float | None) -> AsyncGenerator[Answer, None]:
        """Submit and yield answers until the finish; leaving early aborts the request.

        Raises:
            PeerLost: the session was lost before the finish.
            AntiphonError: what the engine refused or ended it with.
        """
        session = self._session
        if session is None:
            raise Unavailable(f"no session with {self.worker_id} at {self.address}")
        inbox: _Inbox = asyncio.Queue()  # bounded by the request's max_tokens
        request_id = request.request_id
        self._inboxes[request_id] = inbox
        self.tenants[request.tenant] += 1
        self._tenant_of[request_id] = request.tenant
        finished = False
        try:
            session.submit(request, deadline_left_s=deadline_left_s)
            while not finished:
                answer = await inbox.get()
                if isinstance(answer, AntiphonError):
                    finished = True
                    raise answer
                finished = answer.output.finish_reason is not None
                if answer.error is not None:
                    raise answer.error
                yield answer
        finally:
            del self._inboxes[request_id], self._tenant_of[request_id]
            self.tenants -= Counter([request.tenant])  # leaves no zeros behind
            if not finished:
                session.abort(request_id)

    async def close(self, why: AntiphonError | None = None) -> None:
        """Fail what is on it and end the session. Idempotent."""
        if self._closed is None:
            self._closed = why if why is not None else PeerLost(self.worker_id, "closed")
            self._fail_all(self._closed)
            self._connected.set()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff_s = _MIN_BACKOFF_S
        while self._closed is None:  # a cancellation that something on the way swallows ends it, too
            try:
                async with EngineSession(self.address) as session:
                    await session.open(self._open_timeout_s)
                    if self._closed is not None:
                        return
                    self._session = session
                    self._connected.set()
                    self.heard_s = self._clock()
                    backoff_s = _MIN_BACKOFF_S
                    watch = asyncio.create_task(self._watch(session), name=f"watch {self.worker_id}")
                    try:
                        async for answers in session.updates():
                            self.heard_s = self._clock()
                            await self._deliver_all(answers)
                    finally:
                        watch.cancel()
                        await asyncio.gather(watch, return_exceptions=True)
                    raise Unavailable(f"it was silent for {_SILENT_S:g} s and did not answer (stopped, or cut off)")
            except AntiphonError as error:
                self._lose(str(error))
            except Exception as error:  # noqa: BLE001 - whatever one worker says, its requests go on elsewhere
                _log.error("session with %s", self.worker_id, exc_info=error)
                self._lose(type(error).__name__)
            finally:
                self._session = None
                if self._closed is None:
                    self._connected.clear()
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(_MAX_BACKOFF_S, backoff_s * 2)

    def _lose(self, why: str) -> None:
        if self._session is not None:
            _log.warning("session with %s lost: %s", self.worker_id, why)
            self._fail_all(PeerLost(self.worker_id, why))

    async def _watch(self, session: EngineSession) -> None:
        """End the session of a worker that has requests or no lease, and answers nobody."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if (not self._inboxes and self.has_lease) or self._clock() - self.heard_s < _SILENT_S:
                continue
            for _ in range(_TRIES):
                if await session.answers(_ASK_S):
                    self.heard_s = self._clock()
                    break
            else:
                await session.close()
                return

    async def _deliver_all(self, answers: list[Answer]) -> None:
        """A few at a time, those of tenants with few requests first: a token of theirs is sent while a flood's are still cut up."""
        if len(answers) > _AT_ONCE and len(self.tenants) > 1:
            answers.sort(key=lambda answer: self.tenants[self._tenant_of.get(answer.output.request_id, "")])
        for start in range(0, len(answers), _AT_ONCE):
            if start:
                await asyncio.sleep(0)
            for answer in answers[start : start + _AT_ONCE]:
                self._deliver(answer)

    def _deliver(self, answer: Answer) -> None:
        inbox = self._inboxes.get(answer.output.request_id)
        if inbox is not None:
            inbox.put_nowait(answer)

    def _fail_all(self, error: AntiphonError) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)


class EngineClient:
    """Connections to every generating worker of the latest records. Belongs to one event loop.

    Args:
        open_timeout_s: longest wait for a session to open.
        silence_s: a worker that is gone from the directory and silent for so long is lost.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, open_timeout_s: float = 5.0, silence_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open_timeout_s = open_timeout_s
        self._silence_s = silence_s
        self._clock = clock
        self._connections: dict[WorkerId, WorkerConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def num_inflight(self) -> int:
        """Requests on all workers."""
        return sum(connection.num_inflight for connection in self._connections.values())

    def inflight_on(self, worker_id: WorkerId) -> int:
        """This gateway's requests on a worker."""
        connection = self._connections.get(worker_id)
        return 0 if connection is None else connection.num_inflight

    def has_less(self, worker_id: WorkerId, tenant: str) -> bool:
        """Whether another tenant has so many more of this gateway's requests on a worker that one of them would make way."""
        connection = self._connections.get(worker_id)
        if connection is None:
            return False
        return max(connection.tenants.values(), default=0) > connection.tenants[tenant] + 1

    def answers(self, info: WorkerInfo) -> bool:
        """Whether the very worker of that record has a session that is open, and not silent."""
        connection = self._connections.get(info.worker_id)
        return connection is not None and connection.connected and connection.epoch == info.epoch

    def is_connected(self, worker_id: WorkerId) -> bool:
        """True while the session with the worker is open."""
        connection = self._connections.get(worker_id)
        return connection is not None and connection.connected

    def sync(self, records: Sequence[WorkerRecord]) -> None:
        """Open and close connections as the records ask."""
        infos = {record.info.worker_id: record.info for record in records if record.info.role.generates}
        for record in records:
            if record.info.worker_id in self._connections:
                self._connections[record.info.worker_id].has_lease = record.remaining_s > 0.0
        for worker_id, connection in list(self._connections.items()):
            info = infos.get(worker_id)
            if info is None:
                # A lease can run out while the worker still computes; only silence as well makes it lost.
                idle = connection.num_inflight == 0 or not connection.connected
                if idle or self._clock() - connection.heard_s > self._silence_s:
                    self._drop(connection, "gone from the directory")
            elif (info.epoch, info.endpoint.rpc) != (connection.epoch, connection.address):
                self._drop(connection, "it was started anew")
        for worker_id, info in infos.items():
            if worker_id not in self._connections:
                self._connections[worker_id] = WorkerConnection(
                    worker_id, info.epoch, info.endpoint.rpc, open_timeout_s=self._open_timeout_s, clock=self._clock
                )

    async def stream(
        self, worker_id: WorkerId, request: Request, *, deadline_left_s: float | None, connect_timeout_s: float | None = None
    ) -> AsyncGenerator[Answer, None]:
        """Run a request on a worker; see ``WorkerConnection.stream``. Waits for a session that is being opened,
        ``connect_timeout_s`` seconds at most.
        """
        connection = self._connections.get(worker_id)
        if connection is None:
            raise Unavailable(f"{worker_id} is gone from the directory")
        left_s = self._open_timeout_s if deadline_left_s is None else min(self._open_timeout_s, deadline_left_s)
        await connection.wait_connected(left_s if connect_timeout_s is None else min(left_s, connect_timeout_s))
        answers = connection.stream(request, deadline_left_s=deadline_left_s)
        try:
            async for answer in answers:
                yield answer
        finally:
            await answers.aclose()

    async def close(self) -> None:
        """End all sessions; the engines abort what is live. Idempotent."""
        for connection in list(self._connections.values()):
            self._drop(connection, "the gateway closes")
        if self._closing:
            await asyncio.gather(*self._closing)

    def _drop(self, connection: WorkerConnection, why: str) -> None:
        del self._connections[connection.worker_id]
        task = asyncio.create_task(connection.close(PeerLost(connection.worker_id, why)))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
