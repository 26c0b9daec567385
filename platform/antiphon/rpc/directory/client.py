"""The directory reached over gRPC (control speed).

Must not know: which store answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from antiphon.core.directory import WorkerRecord
from antiphon.core.errors import AntiphonError, InternalError, InvalidInput, Unavailable
from antiphon.core.identity import Identity
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.rpc.channels import ChannelLimits, PartChannel, channel_options
from antiphon.rpc.directory.budgets import RemoteBudgets
from antiphon.rpc.errors import closed_meanwhile
from antiphon.rpc.v1 import directory_pb2 as pb
from antiphon.rpc.v1 import directory_pb2_grpc as pb_grpc

T = TypeVar("T")

logger = logging.getLogger(__name__)

_OPTIONS = channel_options(ChannelLimits(max_backoff_s=1.0))  # one that restarts on its port is found again well within a lease


class RemoteDirectory:
    """A client of the DirectoryService at ``target`` (host:port); belongs to one event loop.

    Each call takes ``timeout_s`` seconds at most and waits that long for a service that is restarting.
    """

    def __init__(self, target: str, *, timeout_s: float = 5.0, identity: Identity | None = None) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._channel = PartChannel(target, options=_OPTIONS, identity=identity, grace_s=timeout_s)
        self.budgets = RemoteBudgets(self._call)

    async def register(self, info: WorkerInfo, lease_s: float) -> bool:
        """See ``Directory``."""
        request = pb.RegisterRequest(worker_info_json=info.to_json(), lease_s=lease_s)
        return (await self._call("Register", request, pb.RegisterResponse)).accepted

    async def remove(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        """See ``Directory``."""
        request = pb.RemoveRequest(worker_id=worker_id, epoch=epoch)
        return (await self._call("Remove", request, pb.RemoveResponse)).removed

    async def workers(self, deployment: str | None = None) -> tuple[WorkerRecord, ...]:
        """See ``Directory``."""
        request = pb.ListWorkersRequest(deployment=deployment)
        answer = await self._call("ListWorkers", request, pb.ListWorkersResponse)
        records = []
        for row in answer.workers:
            try:
                info = WorkerInfo.from_json(row.worker_info_json)
            except InvalidInput as error:  # of a newer version, or wrong: it must not hide the others
                logger.warning("a record is left out: %s", error)
                continue
            records.append(WorkerRecord(info=info, age_s=row.age_s, lease_s=row.lease_s))
        return tuple(records)

    async def claim_index(self, deployment: str, pool: str, owner: str, lease_s: float, preferred: int | None = None) -> int:
        """See ``Directory``."""
        request = pb.ClaimIndexRequest(deployment=deployment, pool=pool, owner=owner, lease_s=lease_s, preferred=preferred)
        return (await self._call("ClaimIndex", request, pb.ClaimIndexResponse)).index

    async def release_index(self, deployment: str, pool: str, owner: str) -> None:
        """See ``Directory``."""
        request = pb.ReleaseIndexRequest(deployment=deployment, pool=pool, owner=owner)
        await self._call("ReleaseIndex", request, pb.ReleaseIndexResponse)

    async def next_epoch(self, worker_id: WorkerId, after: Epoch = Epoch(0)) -> Epoch:
        """See ``Directory``."""
        request = pb.NextEpochRequest(worker_id=worker_id, after=after)
        return Epoch((await self._call("NextEpoch", request, pb.NextEpochResponse)).epoch)

    async def put_note(self, topic: str, key: str, text: str, lease_s: float) -> None:
        """See ``Notes``."""
        request = pb.PutNoteRequest(topic=topic, key=key, text=text, lease_s=lease_s)
        await self._call("PutNote", request, pb.PutNoteResponse)

    async def note(self, topic: str, key: str) -> str | None:
        """See ``Notes``."""
        answer = await self._call("GetNote", pb.GetNoteRequest(topic=topic, key=key), pb.GetNoteResponse)
        return answer.text if answer.HasField("text") else None

    async def notes(self, topic: str) -> Mapping[str, str]:
        """See ``Notes``."""
        answer = await self._call("ListNotes", pb.ListNotesRequest(topic=topic), pb.ListNotesResponse)
        return dict(sorted(answer.texts.items()))

    async def close(self) -> None:
        """See ``Directory``."""
        await self._channel.close()

    async def _call(self, method: str, request: Message, answer: type[T]) -> T:
        stub = pb_grpc.DirectoryStub(self._channel.now())  # type: ignore[no-untyped-call]  # generated
        try:
            reply = await getattr(stub, method)(request, timeout=self._timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise self._translated(error) from error
        except asyncio.CancelledError:
            if closed_meanwhile():
                raise Unavailable(f"the connection to the directory at {self._target} was closed") from None
            raise
        assert isinstance(reply, answer)
        return reply

    def _translated(self, error: grpc.aio.AioRpcError) -> AntiphonError:
        details = error.details() or error.code().name
        match error.code():
            case grpc.StatusCode.INVALID_ARGUMENT:
                return InvalidInput(details, "directory")
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
                return Unavailable(f"the directory at {self._target} can't be reached: {details}")
            case _:
                return InternalError(f"the directory at {self._target} failed: {details}")
