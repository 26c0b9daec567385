"""The directory as a gRPC service over any store (control speed).

Must not know: which store it serves, or who calls.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
import grpc.aio

from antiphon.core.directory import Directory
from antiphon.core.errors import AntiphonError, Unavailable
from antiphon.core.identity import Identity
from antiphon.core.ids import Epoch, WorkerId
from antiphon.core.worker_info import WorkerInfo
from antiphon.rpc.credentials import knocking_options, server_credentials
from antiphon.rpc.directory.budgets import rows_of, uses_of, wish_of
from antiphon.rpc.doors.calls import Calls
from antiphon.rpc.doors.crowd import Crowd, RunningCalls
from antiphon.rpc.v1 import directory_pb2 as pb
from antiphon.rpc.v1 import directory_pb2_grpc as pb_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class DirectoryService(pb_grpc.DirectoryServicer):
    """Serves ``store``, which stays its owner's to close."""

    def __init__(self, store: Directory) -> None:
        self._store = store

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:  # noqa: N802
        """Register or renew a worker."""
        try:
            info = WorkerInfo.from_json(request.worker_info_json)
        except AntiphonError as error:
            await context.abort(_status(error), str(error))
        accepted = await _or_abort(self._store.register(info, request.lease_s), context)
        return pb.RegisterResponse(accepted=accepted)

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveResponse:  # noqa: N802
        """Remove a worker's record."""
        removal = self._store.remove(WorkerId(request.worker_id), Epoch(request.epoch))
        return pb.RemoveResponse(removed=await _or_abort(removal, context))

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Context) -> pb.ListWorkersResponse:  # noqa: N802
        """All live records, or one deployment's."""
        deployment = request.deployment if request.HasField("deployment") else None
        records = await _or_abort(self._store.workers(deployment), context)
        return pb.ListWorkersResponse(
            workers=[
                pb.WorkerLease(worker_info_json=record.info.to_json(), age_s=record.age_s, lease_s=record.lease_s)
                for record in records
            ]
        )

    async def ClaimIndex(self, request: pb.ClaimIndexRequest, context: Context) -> pb.ClaimIndexResponse:  # noqa: N802
        """Claim an index of a pool, or renew the claim."""
        claim = self._store.claim_index(
            request.deployment,
            request.pool,
            request.owner,
            request.lease_s,
            request.preferred if request.HasField("preferred") else None,
        )
        return pb.ClaimIndexResponse(index=await _or_abort(claim, context))

    async def ReleaseIndex(self, request: pb.ReleaseIndexRequest, context: Context) -> pb.ReleaseIndexResponse:  # noqa: N802
        """Give an index back."""
        await _or_abort(self._store.release_index(request.deployment, request.pool, request.owner), context)
        return pb.ReleaseIndexResponse()

    async def NextEpoch(self, request: pb.NextEpochRequest, context: Context) -> pb.NextEpochResponse:  # noqa: N802
        """A worker's next epoch."""
        epoch = await _or_abort(self._store.next_epoch(WorkerId(request.worker_id), Epoch(request.after)), context)
        return pb.NextEpochResponse(epoch=epoch)

    async def PutNote(self, request: pb.PutNoteRequest, context: Context) -> pb.PutNoteResponse:  # noqa: N802
        """Write a note."""
        await _or_abort(self._store.put_note(request.topic, request.key, request.text, request.lease_s), context)
        return pb.PutNoteResponse()

    async def GetNote(self, request: pb.GetNoteRequest, context: Context) -> pb.GetNoteResponse:  # noqa: N802
        """One note."""
        return pb.GetNoteResponse(text=await _or_abort(self._store.note(request.topic, request.key), context))

    async def ListNotes(self, request: pb.ListNotesRequest, context: Context) -> pb.ListNotesResponse:  # noqa: N802
        """All notes of a topic."""
        return pb.ListNotesResponse(texts=await _or_abort(self._store.notes(request.topic), context))

    async def TakeBudget(self, request: pb.TakeBudgetRequest, context: Context) -> pb.TakeBudgetResponse:  # noqa: N802
        """Reserve what a request may use."""
        verdict = await _or_abort(self._store.budgets.take_budget(wish_of(request)), context)
        return pb.TakeBudgetResponse(exceeded=verdict.exceeded or "", retry_after_s=verdict.retry_after_s)

    async def SettleBudget(self, request: pb.SettleBudgetRequest, context: Context) -> pb.SettleBudgetResponse:  # noqa: N802
        """End a reservation."""
        await _or_abort(self._store.budgets.settle_budget(request.tenant, request.ticket, request.num_tokens), context)
        return pb.SettleBudgetResponse()

    async def RenewBudgets(self, request: pb.RenewBudgetsRequest, context: Context) -> pb.RenewBudgetsResponse:  # noqa: N802
        """Keep reservations."""
        await _or_abort(self._store.budgets.renew_budgets(request.tenant, request.tickets, request.lease_s), context)
        return pb.RenewBudgetsResponse()

    async def AddUse(self, request: pb.AddUseRequest, context: Context) -> pb.AddUseResponse:  # noqa: N802
        """Add to the ledger."""
        await _or_abort(self._store.budgets.add_use(request.day, request.batch, uses_of(request.uses)), context)
        return pb.AddUseResponse()

    async def ListUse(self, request: pb.ListUseRequest, context: Context) -> pb.ListUseResponse:  # noqa: N802
        """The ledger of a day."""
        return pb.ListUseResponse(uses=rows_of(await _or_abort(self._store.budgets.used(request.day), context)))


class DirectoryServer:
    """A listening DirectoryService; ``address`` is what ``open_directory`` takes."""

    def __init__(self, server: grpc.aio.Server, address: str, crowd: Crowd) -> None:
        self._server = server
        self._crowd = crowd
        self.address = address

    @classmethod
    async def start(
        cls, store: Directory, *, host: str = "127.0.0.1", port: int = 0, identity: Identity | None = None
    ) -> DirectoryServer:
        """Listen on ``host:port`` for parts of this deployment; port 0 takes any free one.

        Raises:
            Unavailable: the port is taken.
        """
        running = RunningCalls()
        server = grpc.aio.server(interceptors=[Calls(running)], options=[("grpc.so_reuseport", 0), *knocking_options()])
        pb_grpc.add_DirectoryServicer_to_server(DirectoryService(store), server)  # type: ignore[no-untyped-call]  # generated
        try:
            bound = server.add_secure_port(f"{host}:{port}", server_credentials(identity))
        except RuntimeError as error:
            raise Unavailable(f"the directory can't listen on {host}:{port}: {error}") from error
        await server.start()
        return cls(server, f"grpc://{host}:{bound}", Crowd(bound, running))

    async def close(self, grace_s: float = 0.5) -> None:
        """Stop after at most ``grace_s`` seconds; idempotent."""
        self._crowd.close()
        await self._server.stop(grace_s)


async def _or_abort(call: Awaitable[T], context: Context) -> T:
    try:
        return await call
    except AntiphonError as error:
        await context.abort(_status(error), str(error))
        raise  # abort has raised already; this line tells the type checker
    except (ValueError, OverflowError) as error:  # a number that the answer has no room for
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise


def _status(error: AntiphonError) -> grpc.StatusCode:
    return grpc.StatusCode[error.grpc_status]
